"""The same text with less in it: cut short, or misspelt. Either tells a model less of what is meant than the whole."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Literal

from .words import units_of

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def narrowed(
    texts: Mapping[str, str], how: Literal["cut", "misspelt", "either"] = "either", seed: int = 0
) -> dict[str, str]:
    """Every text with less in it, the same on every machine.

    Args:
        texts: Id -> text.
        how: ``cut``, ``misspelt``, or for each text ``either``.
        seed: Which words, and which letters.
    """
    found = {}
    for identifier, text in texts.items():
        draw = random.Random(f"{seed} {how} {identifier}")
        chosen = draw.choice(("cut", "misspelt")) if how == "either" else how
        found[identifier] = cut_short(text, draw) if chosen == "cut" else misspelt(text, draw)
    return found


def cut_short(text: str, draw: random.Random) -> str:
    """The first third to two thirds of a text's words, at least one; of a script without spaces, of its characters."""
    words = units_of(" ".join(text.split()))
    return "".join(words[: max(1, int(len(words) * draw.uniform(1 / 3, 2 / 3)))]).strip()


def misspelt(text: str, draw: random.Random) -> str:
    """A text with a letter swapped, dropped, doubled or replaced in a third of its longer words, at least in one."""
    words = text.split()
    long_enough = [i for i, word in enumerate(words) if len(word) > 3] or list(range(len(words)))
    for i in draw.sample(long_enough, min(len(long_enough), max(1, len(long_enough) // 3))):
        words[i] = _slip(words[i], draw)
    return " ".join(words)


def _slip(word: str, draw: random.Random) -> str:
    """Another word, one slip of the fingers away."""
    while True:
        place = draw.randrange(len(word))
        before, letter, after = word[:place], word[place], word[place + 1 :]
        slip = draw.choice(
            (before + after[:1] + letter + after[1:], before + after, before + letter * 2 + after)
            if len(word) > 1
            else (letter * 2,)
        )
        slip = draw.choice((slip, before + draw.choice(LETTERS) + after))
        if slip != word:
            return slip
