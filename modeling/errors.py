"""The one exception that means "your input, not our code": the command line prints it without a traceback.

And what others raise, in one line.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Input that cannot be used as given; the message names subject, observed value, consequence and remedy."""


class NoSplit(InputError):
    """A data set that is whole, and lacks the split that is asked for, or judges nothing in it."""


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
