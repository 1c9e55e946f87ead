"""BM25 as whoever compares with it would set it up: by ``bm25s``, with the stop words and the stems of a language.

Texts of scripts without spaces are read by characters and pairs of them, see :func:`polyrep.data.words.words_of`,
whatever the language.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from ..data.dataset import RetrievalDataset
from ..data.words import SPACELESS, words_of
from ..errors import InputError
from ..search.ranking import deeper, without
from .systems import DEPTH, Ranking, bytes_per_document, flops, latency

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
        if self.language == "tr":  # whose small I has no dot
            texts = (text.replace("I", "ı") for text in texts)
        kept = [[word for word in words_of(text) if word not in self.stop_words] for text in texts]
        if self.language == "none":
            return kept
        import Stemmer

        stemmer = Stemmer.Stemmer(self.language)  # it has a state, so that threads cannot share one
        return [stemmer.stemWords(words) for words in kept]

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
        raise InputError(
            'bm25: the packages bm25s and PyStemmer are not both installed. Run `pip install "polyrep[quickstart]"`.'
        ) from None
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


def analyzer_of(dataset: RetrievalDataset, language: str | Analyzer) -> Analyzer:
    """The :func:`analyzer` by which BM25 finds documents of a data set.

    Raises:
        InputError: It has nothing to find them by, which is no word in any, or images; or see :func:`analyzer`.
    """
    texts: list[Any] = list(dataset.corpus.values()) if isinstance(dataset.corpus, dict) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(
            f"{dataset.name}: documents are images, in which BM25 finds no words. Leave it out (--baselines none)."
        )
    if any(map(words_of, texts)):
        made = language if isinstance(language, Analyzer) else analyzer(language, texts)
        if any(made.words([text])[0] for text in texts):
            return made
    raise InputError(
        f"{dataset.name}: no document has a word of two letters that is no stop word, so BM25 would find nothing. "
        "Leave it out (--baselines none)."
    )


def rank_with_bm25(dataset: RetrievalDataset, depth: int | None = None, *, language: str | Analyzer = "en") -> Ranking:
    """BM25 (Lucene's variant, k1 = 1.5, b = 0.75) over stems without stop words, by ``bm25s``.

    Args:
        dataset: Corpus and queries.
        depth: Documents of a query; default: :data:`polyrep.evaluation.systems.DEPTH`.
        language: See :func:`analyzer`; or one made by hand.

    Raises:
        InputError: See :func:`analyzer_of`.
    """
    read = analyzer_of(dataset, language)
    import bm25s

    started = time.perf_counter()
    index = bm25s.BM25(k1=K1, b=B, method="lucene")
    index.index(read.words(dataset.corpus.values()), show_progress=False)
    seconds = time.perf_counter() - started
    queries = read.words(dataset.queries.values())
    # Ties must fall as everywhere else: put the documents in order of falling id, then sort stably.
    by_id = sorted(range(len(dataset.corpus)), key=list(dataset.corpus).__getitem__, reverse=True)
    positions, scores, timed = [], [], []
    for query in tqdm(queries, desc="bm25", unit="query"):
        begun = time.perf_counter()
        found = index.get_scores(query) if query else np.zeros(len(by_id), np.float32)
        order = np.argsort(-found[by_id], kind="stable")[: deeper(depth or DEPTH, dataset.own)]
        timed.append(time.perf_counter() - begun)
        positions.append(np.asarray(by_id)[order])
        scores.append(found[positions[-1]])
    # bm25s keeps one score per (term, document) pair, in float32.
    nnz = len(index.scores["data"]) / len(dataset.corpus)
    postings = np.diff(index.scores["indptr"])  # documents of each term
    askings = np.zeros(len(postings))  # queries of each term
    for query in queries:
        askings[index.get_tokens_ids(query)] += 1  # a repeated term counts once
    found, scored = without(dataset.own, np.stack(positions), np.stack(scores), depth or DEPTH)
    costs = {
        "bytes_per_document": bytes_per_document("sparse", "float32", nnz=nnz),
        "active_dims": nnz,
        "flops": flops(askings / len(queries), postings / len(dataset.corpus)),
        "encode_docs_per_s": len(dataset.corpus) / seconds,
    }
    return Ranking("BM25", found, scored, costs | latency(timed), np.array(timed), read.settings)
