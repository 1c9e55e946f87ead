"""Words of a text, in scripts with and without spaces between them."""

from __future__ import annotations

import math
import re
import unicodedata

EAST_ASIAN = (
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3031-\u3035\u303b\u3041-\u3096\u3099-\u309f\u30a1-\u30fa\u30fc-\u30ff"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003fffd"
)
"""Chinese characters and both kinds of kana, as ranges of a pattern; Korean has spaces."""

SOUTH_EAST_ASIAN = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0eba\u0ebc-\u0ece\u0edc-\u0edf\u1000-\u103f\u1050-\u109f\u1780-\u17d3"
)
"""Letters and signs of Thai, Lao, Burmese and Khmer, whose spaces part phrases."""

SPACELESS = EAST_ASIAN + SOUTH_EAST_ASIAN
"""Scripts without spaces between words."""

_RUNS = re.compile(f"([{SPACELESS}]+)")
# Vowels and accents that stand behind a letter, which Python counts as none: without them दिल्ली would have no word.
_MARKS = "".join(mark for mark in map(chr, range(0x300, 0x20000)) if unicodedata.category(mark)[0] == "M")
_WORD = re.compile(f"\\w+(?:[{_MARKS}]+\\w*)*")
# Letters as wide as a Chinese character, kana of half that width, and the ligatures of a printed page.
_FORMS = re.compile("[\ufb00-\ufb06\uff01-\uff9f]+")
_UNIT = re.compile(f"[{SPACELESS}]|[^\\s{SPACELESS}]+")
_SENTENCE = re.compile(
    r"(?<=[.!?:؟۔।॥])\s+|\n+"
    r"|(?<=[。！？｡។။])(?![。！？｡」』”’）])\s*|(?<=[。！？｡][」』”’）])\s*"
    f"|(?<=[{SOUTH_EAST_ASIAN}])\\s+(?=[{SOUTH_EAST_ASIAN}])"
)


def words_of(text: str) -> list[str]:
    """What a text is found by, in small letters of their plain form: words of two letters or more.

    Of a script without spaces, each character and each two neighbours, as Lucene's CJKAnalyzer has it with single
    characters: nobody asks with the words that a dictionary would cut, and one character may be a whole query.
    """
    found: list[str] = []
    plain = _FORMS.sub(lambda form: unicodedata.normalize("NFKC", form[0]), text.replace("\u00ad", ""))
    small = unicodedata.normalize("NFC", plain).lower().replace("i\u0307", "i")  # of İ, which has a dot already
    for number, part in enumerate(_RUNS.split(small)):
        if number % 2:  # a run of such a script
            found += [character for character in part if character.isalnum()]
            found += map("".join, zip(part, part[1:], strict=False))
        else:
            found += [word for word in _WORD.findall(part) if len(word) > 1]
    return found


def sentences_of(text: str) -> list[str]:
    """Sentences, in order: parted at what ends them, at new lines, and in scripts of South-East Asia at spaces."""
    return [part for part in _SENTENCE.split(text) if part.strip()]


def count_words(text: str) -> int:
    """About how many words a text has.

    As many as spaces tell. Of a script without them, one for one and a half characters of Chinese and Japanese, and
    one for four of Thai and its like, which is what their words have on average.
    """
    if not _RUNS.search(text):
        return len(text.split())
    others = re.sub(f"[{SPACELESS}]+", " ", text)
    east, south = (len(re.findall(f"[{script}]", text)) for script in (EAST_ASIAN, SOUTH_EAST_ASIAN))
    spaced = sum(any(map(str.isalnum, word)) for word in others.split())  # not what stands between characters
    return spaced + math.ceil(east / 1.5) + math.ceil(south / 4)


def units_of(text: str) -> list[str]:
    """Words, each with the space behind it; of a script without spaces, characters."""
    bounds = [match.start() for match in _UNIT.finditer(text)]
    return [text[start:stop] for start, stop in zip(bounds, [*bounds[1:], len(text)], strict=True)]
