"""Damaged and hostile inputs by the thousand: each must open, or be refused in a sentence, within seconds.

A module for each kind of input has ``run(count, seed, folder)``, which gives an :class:`Outcome` for each case. Some
hundred cases run in the suite; ``make fuzz`` runs them by the ten thousand.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

SECONDS = 60.0
"""What takes longer hangs."""


class Outcome(NamedTuple):
    """What came of a case.

    Attributes:
        case: What was done to the input, enough to make it again.
        verdict: ``opened``, ``refused`` (a ValueError with a message), or ``fault``: any other exception, a hang.
        detail: The message, or class and message of the exception.
        seconds: How long it took.
    """

    case: str
    verdict: str
    detail: str
    seconds: float


watchers: list[Callable[[str, Any], None]] = []
"""Told of each ``case`` before it runs and of its ``outcome``, since a process may die of it."""


class Hang(BaseException):
    """Raised in what takes longer than :data:`SECONDS`; no handler for Exception takes it for its own."""


def judge(case: str, call: Callable[[], Any]) -> Outcome:
    """Run one case. Main thread alone: the limit is an alarm."""

    def ring(*_: Any) -> None:
        raise Hang(f"longer than {SECONDS:g} s")

    for tell in watchers:
        tell("case", case)
    started = time.perf_counter()
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        call()
        verdict, detail = "opened", ""
    except ValueError as error:  # InputError is one
        verdict, detail = ("refused", str(error)) if str(error).strip() else ("fault", f"empty {type(error).__name__}")
    except (Exception, SystemExit, Hang) as error:
        verdict, detail = "fault", f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    outcome = Outcome(case, verdict, detail, time.perf_counter() - started)
    for tell in watchers:
        tell("outcome", outcome)
    return outcome
