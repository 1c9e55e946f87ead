"""The one exception that means "your input, not our code": the command line prints it without a traceback."""

from __future__ import annotations


class InputError(ValueError):
    """Input that cannot be used as given; the message names subject, observed value, consequence and remedy."""
