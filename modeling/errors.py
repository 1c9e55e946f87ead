"""The one exception that means "your input, not our code": the command line prints it without a traceback.

And what others raise, in one line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Input that cannot be used as given; the message names subject, observed value, consequence and remedy."""


class UsageError(SystemExit):
    """A command line that a parser has refused, which it has said; the argument is what it said last."""

    def __init__(self, message: str):
        super().__init__(2)
        self.message = message


class NoSplit(InputError):
    """A data set that is whole, and lacks the split that is asked for, or judges nothing in it."""


HALF = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair: what Python makes of a byte on the command line that is not UTF-8."""


def refuse_no_text(text: str, where: str) -> None:
    """Refuse what no tokenizer reads and no file holds.

    Args:
        text: A text, an id, a name; a path may hold any bytes.
        where: What it is, for the message.

    Raises:
        InputError: It holds half of a surrogate pair.
    """
    if half := HALF.search(text):
        raise InputError(
            f"{where}: holds {half[0]!r} at character {half.start()}, half of a surrogate pair, as bytes become that "
            "are not UTF-8, so it is no text. Write it in UTF-8."
        )


@contextmanager
def refusals() -> Iterator[None]:
    """A ValueError of what runs inside as InputError: shipped classes, which know no polyrep, refuse by the former."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error


def first_line(error: BaseException) -> str:
    """Class and first line of what another library says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
