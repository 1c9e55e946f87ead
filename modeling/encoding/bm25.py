"""BM25 over the stems of a language, and as sparse vectors, which an index holds beside others of the same documents.

Texts of scripts without spaces are read by characters and pairs of them, see :func:`polyrep.data.words.words_of`,
whatever the language. A document's vector has for each of its words the part that this can have in a score, a query's
how often it occurs there, so that the score is the inner product.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..data.words import SPACELESS, words_of
from ..errors import InputError
from ..files import digest, read_json, write_json
from .embeddings import Embeddings

FILE = "bm25.json"
"""In the folder of an encoded corpus: the words by which its queries are read."""

FORMAT = "polyrep-bm25-1"

K1, B = 1.5, 0.75
"""Saturation of a repeated word, and how much a document's length counts."""

STOP_WORDS = {
    "da": "DANISH",
    "de": "GERMAN",
    "en": "EN",
    "es": "SPANISH",
    "fr": "FRENCH",
    "it": "ITALIAN",
    "nl": "DUTCH",
    "no": "NORWEGIAN",
    "pt": "PORTUGUESE",
    "ru": "RUSSIAN",
    "sv": "SWEDISH",
    "tr": "TURKISH",
}
"""ISO 639-1 code -> the list of ``bm25s``, of languages that have a stemmer, too.

English is Lucene's 33 words: NLTK's 179 were no better on the dev splits of tldr_pages, SciTLDR and SciFact.
"""

_OTHER_CODES = {
    **{"dan": "da", "deu": "de", "dut": "nl", "eng": "en", "esl": "es", "fra": "fr", "fre": "fr", "ger": "de"},
    **{"ita": "it", "nld": "nl", "nor": "no", "por": "pt", "rus": "ru", "spa": "es", "swe": "sv", "tur": "tr"},
    **{"nb": "no", "nob": "no"},  # as Norwegian texts are labelled
}

_MISSING = 'bm25: the packages bm25s and PyStemmer are not both installed. Run `pip install "polyrep[quickstart]"`.'

SAMPLE = 1000
"""Documents, spread over the corpus, by which a language is told."""


@dataclass(frozen=True)
class Analyzer:
    """What BM25 takes from a text.

    Attributes:
        language: ISO 639 code of the stems; ``none`` for words as they are.
        stop_words: Words that are left out.
    """

    language: str = "none"
    stop_words: frozenset[str] = frozenset()

    def words(self, texts: Iterable[str]) -> list[list[str]]:
        """Stems of each text, in order, without stop words."""
        return list(self.through(texts))

    def through(self, texts: Iterable[str]) -> Iterator[list[str]]:
        """:meth:`words` of one text after the other."""
        if self.language == "tr":  # whose small I has no dot
            texts = (text.replace("I", "ı") for text in texts)
        kept = ([word for word in words_of(text) if word not in self.stop_words] for text in texts)
        if self.language == "none":
            return kept
        import Stemmer

        stemmer = Stemmer.Stemmer(self.language)  # it has a state, so that threads cannot share one
        return map(stemmer.stemWords, kept)

    @property
    def settings(self) -> dict[str, Any]:
        """What a reader of the table should know."""
        stemmer = "none" if self.language == "none" else "Snowball"
        return {
            "language": self.language,
            "stemmer": stemmer,
            "stop_words": len(self.stop_words),
            "k1": K1,
            "b": B,
        }


def analyzer(language: str, texts: Sequence[str] = ()) -> Analyzer:
    """The stop words and the stemmer of a language; of one that ``bm25s`` has no stop words of, the stemmer alone.

    Args:
        language: ISO 639 code of two or three letters, ``none``, or ``auto`` for the language of the texts.
        texts: What ``auto`` reads.

    Raises:
        InputError: ``bm25s`` or PyStemmer is not installed, there is no such stemmer, or the texts do not tell.
    """
    try:
        import Stemmer
        from bm25s import stopwords
    except ModuleNotFoundError:
        raise InputError(_MISSING) from None
    code = language_of(texts) if language == "auto" else language.lower()
    if code is None:
        raise InputError(
            f"--language auto: the words of {len(texts):,} documents do not tell one of {', '.join(STOP_WORDS)}, so "
            "BM25 might be weaker than it is. Name the language, or none for words as they are."
        )
    if code == "none":
        return Analyzer()
    code = _OTHER_CODES.get(code, code)
    try:
        if not re.fullmatch("[a-z]{2,3}", code):  # a name, and some are of algorithms
            raise KeyError(code)
        Stemmer.Stemmer(code)
    except KeyError:
        raise InputError(
            f"--language {language}: PyStemmer knows no such language, so BM25 would miss inflected words. Use an ISO "
            "639 code such as en, de, fi or ar, none for words as they are, or auto."
        ) from None
    listed = getattr(stopwords, f"STOPWORDS_{STOP_WORDS[code]}") if code in STOP_WORDS else ()
    return Analyzer(code, frozenset(listed))


def spread(texts: Iterable[str]) -> list[str]:
    """Some of many texts, from first to last and equally far apart: all of a few, else not many more than SAMPLE."""
    kept: list[str] = []
    step = 1
    for number, text in enumerate(texts):
        if number % step == 0:
            kept.append(text)
        if len(kept) >= 2 * SAMPLE:
            kept, step = kept[::2], 2 * step
    return kept


def language_of(texts: Sequence[str]) -> str | None:
    """The language of which most stop words are in the texts, or None if they do not tell.

    One word in ten must be a stop word of it, and of words that one of two languages has, twice as many its own. So
    texts in two languages tell none; but one without a list here may be taken for its neighbour, as Catalan for
    Spanish.

    Returns:
        A code of :data:`STOP_WORDS`, or ``none`` if most is in scripts without spaces.
    """
    from bm25s import stopwords

    sample = texts[:: max(1, len(texts) // SAMPLE)]
    counts = Counter(word for text in sample for word in words_of(text))
    if 2 * sum(count for word, count in counts.items() if re.match(f"[{SPACELESS}]", word)) > counts.total():
        return "none"
    # Against the long lists of the others, the short one of English would look rare.
    names = STOP_WORDS | {"en": "EN_PLUS"}
    lists = {code: frozenset(getattr(stopwords, f"STOPWORDS_{name}")) for code, name in names.items()}

    def found(words: frozenset[str]) -> int:
        return sum(counts[word] for word in words)

    best = max(lists, key=lambda code: found(lists[code]))
    own = found(lists[best])
    sure = all(found(lists[best] - words) >= 2 * found(words - lists[best]) for c, words in lists.items() if c != best)
    return best if sure and own >= max(10, counts.total() / 10) else None


@dataclass(frozen=True)
class Bm25:
    """BM25 (Lucene's variant) of one corpus.

    Attributes:
        analyzer: How words are taken from texts.
        documents: How many there are.
        average: Words of a document on average.
        frequencies: Word -> number of documents that have it, in the order of the vectors' dimensions.
    """

    analyzer: Analyzer
    documents: int
    average: float
    frequencies: dict[str, int]

    @classmethod
    def of(cls, read: Analyzer, texts: Iterable[str]) -> Bm25:
        """Count the words of a corpus, which is passed through once.

        Raises:
            InputError: It has no word.
        """
        documents = total = 0
        frequencies: Counter[str] = Counter()
        for words in read.through(texts):
            documents, total = documents + 1, total + len(words)
            frequencies.update(dict.fromkeys(words, 1))
        if not total:
            raise InputError(
                f"bm25: none of {documents:,} documents has a word of two letters that is no stop word, so nothing "
                "could be found by it. Leave it out, or name another --language."
            )
        return cls(read, documents, total / documents, dict(frequencies))

    @classmethod
    def load(cls, folder: str | Path) -> Bm25:
        """What :meth:`save` wrote.

        Raises:
            InputError: The file is damaged, or of another format, or PyStemmer is not installed.
        """
        path, remedy = Path(folder, FILE), "Encode the corpus again."
        said = read_json(path, remedy=remedy, words=list, stop_words=list, language=str)
        try:
            if (said["format"], said["k1"], said["b"]) != (FORMAT, K1, B):
                raise ValueError(f"format {said['format']!r:.40}, k1 {said['k1']!r:.40}, b {said['b']!r:.40}")
            counts, documents, average = said["frequencies"], said["documents"], said["average"]
            if type(documents) is not int or type(average) is not float or not 0 < average < 2**31:
                raise ValueError(f"{documents!r:.40} documents of {average!r:.40} words")
            if not said["words"] or any(type(count) is not int or not 0 < count <= documents for count in counts):
                raise ValueError("a word that no document has, or more than there are")
            frequencies = dict(zip(said["words"], counts, strict=True))
            if len(frequencies) != len(counts):
                raise ValueError("a word twice")
            read = Analyzer(str(said["language"]), frozenset(said["stop_words"]))
            read.words([""])  # for which there must be a stemmer of the language
            return cls(read, documents, average, frequencies)
        except ModuleNotFoundError:
            raise InputError(_MISSING) from None
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: no words of BM25 ({error}), so no query could be read. {remedy}") from None

    def save(self, folder: Path) -> None:
        """Write what queries are read by."""
        write_json(folder / FILE, self._described)

    @cached_property
    def fingerprint(self) -> str:
        """What tells its vectors from those of another corpus or language."""
        return f"bm25-{digest(self._described)}"

    @property
    def dim(self) -> int:
        """Words of the vocabulary."""
        return len(self.frequencies)

    def of_documents(self, texts: Iterable[str]) -> Embeddings:
        """Texts of the corpus as sparse vectors in float32."""

        def parts(found: Counter[str]) -> Iterator[tuple[float, int]]:
            length = K1 * (1 - B + B * found.total() / self.average)
            for word, count in found.items():
                if (place := self._places.get(word)) is not None:
                    yield count / (count + length) * self._rarity[place], place

        return self._vectors(map(parts, map(Counter, self.analyzer.through(texts))))

    def of_queries(self, texts: Iterable[str]) -> Embeddings:
        """Queries as sparse vectors in float32; words that no document has are left out."""
        return self._vectors(
            ((count, place) for word, count in found.items() if (place := self._places.get(word)) is not None)
            for found in map(Counter, self.analyzer.through(texts))
        )

    def _vectors(self, texts: Iterable[Iterable[tuple[float, int]]]) -> Embeddings:
        values: list[float] = []
        places: list[int] = []
        bounds = [0]
        for pairs in texts:
            for place, value in sorted((place, value) for value, place in pairs):
                places.append(place)
                values.append(value)
            bounds.append(len(places))
        numbers = np.array(values, np.float32), np.array(bounds, np.int64), np.array(places, np.int32)
        return Embeddings("sparse", *numbers, self.dim, 0.0, Path())

    @cached_property
    def _rarity(self) -> list[float]:
        """What a word weighs, by its place."""
        counts = np.array(list(self.frequencies.values()), np.float64)
        return np.log1p((self.documents - counts + 0.5) / (counts + 0.5)).tolist()

    @cached_property
    def _places(self) -> dict[str, int]:
        return {word: place for place, word in enumerate(self.frequencies)}

    @property
    def _described(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "language": self.analyzer.language,
            "stop_words": sorted(self.analyzer.stop_words),
            "k1": K1,
            "b": B,
            "documents": self.documents,
            "average": self.average,
            "words": list(self.frequencies),
            "frequencies": list(self.frequencies.values()),
        }
