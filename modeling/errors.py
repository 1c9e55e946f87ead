"""The one exception that means "your input, not our code": the command line prints it without a traceback.

And what others raise, in one line.
"""

from __future__ import annotations


class InputError(ValueError):
    """Input that cannot be used as given; the message names subject, observed value, consequence and remedy."""


def first_line(error: BaseException) -> str:
    """Class and first line of what another library says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
