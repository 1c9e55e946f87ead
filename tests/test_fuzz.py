"""Some hundred damaged inputs of each kind are opened or refused; and what the program makes of those that kill."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from collections import Counter
from types import SimpleNamespace

import fuzz
import pytest
from fuzz import __main__ as program
from fuzz import judge


@pytest.mark.parametrize("kind", program.KINDS)
def test_damaged_input_is_opened_or_refused(kind, tmp_path):
    outcomes = importlib.import_module(f"fuzz.{kind}").run(240, 0, tmp_path)
    faults = [f"{outcome.case}\n  {outcome.detail}" for outcome in outcomes if outcome.verdict == "fault"]
    assert not faults, "\n".join(faults[:10])
    counts = Counter(outcome.verdict for outcome in outcomes)
    assert len(outcomes) == 240 and counts["opened"] > 10 and counts["refused"] > 10


def kind_of(*steps, monkeypatch):
    """A kind whose cases are these calls, and what the program makes of it."""

    def run(count, seed, folder):
        return [judge(f"case {number}", steps[number]) for number in range(count)]

    monkeypatch.setitem(sys.modules, "fuzz.made_up", SimpleNamespace(run=run))
    return list(program.outcomes("made_up", len(steps), 0))


def refuse():
    raise ValueError("no")


def test_each_case_is_judged_by_what_came_of_it(monkeypatch):
    def empty():
        raise ValueError

    found = kind_of(int, refuse, empty, lambda: {}["x"], lambda: sys.exit(2), monkeypatch=monkeypatch)
    assert [(outcome.case, outcome.verdict, outcome.detail) for outcome in found] == [
        ("case 0", "opened", ""),
        ("case 1", "refused", "no"),
        ("case 2", "fault", "empty ValueError"),
        ("case 3", "fault", "KeyError: 'x'"),
        ("case 4", "fault", "SystemExit: 2"),
    ]
    assert program.table({"made_up": found}).splitlines()[1].split()[:5] == ["made_up", "5", "1", "1", "3"]


def test_a_case_that_kills_the_process_is_a_fault_of_its_name(monkeypatch):
    found = kind_of(int, lambda: os._exit(3), int, monkeypatch=monkeypatch)
    assert [(outcome.case, outcome.verdict) for outcome in found] == [("case 0", "opened"), ("case 1", "fault")]
    assert "exit 3" in found[1].detail


def test_a_case_that_no_alarm_reaches_is_a_fault_of_its_name(monkeypatch):
    monkeypatch.setattr(program, "SECONDS", 0.2)

    def deaf():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        time.sleep(600)

    started = time.perf_counter()
    found = kind_of(deaf, monkeypatch=monkeypatch)
    assert [(outcome.case, outcome.verdict) for outcome in found] == [("case 0", "fault")]
    assert "hangs" in found[0].detail and time.perf_counter() - started < 600


def test_a_case_that_asks_for_too_much_memory_is_a_fault(monkeypatch):
    found = kind_of(lambda: bytearray(2 * program.MEMORY), monkeypatch=monkeypatch)
    assert [outcome.verdict for outcome in found] == ["fault"] and "MemoryError" in found[0].detail


def test_a_case_that_takes_long_is_a_fault(monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 0.1)
    assert judge("slow", lambda: time.sleep(30)).verdict == "fault"
