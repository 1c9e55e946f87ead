"""The one exception that means "your input, not our code": the command line prints it without a traceback."""

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
