"""``PYTHONPATH=tests python -m fuzz``: all kinds of damaged input, in child processes of little memory and time.

A kind is a module of this package with ``run(count, seed, folder)``. A child that dies or hangs is the fault of the
case that it was at. Nothing is written; the exit status is 1 if there was a fault.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import pkgutil
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from tqdm import tqdm

import fuzz
from fuzz import SECONDS, Outcome

KINDS = sorted(module.name for module in pkgutil.iter_modules(fuzz.__path__) if not module.name.startswith("_"))
CHUNK = 1_000
"""Cases of a child."""
MEMORY = 8 * 2**30
"""Bytes of address space of a child."""
START = 120.0
"""Seconds that a child may take before its first case, and between two."""


def main(scratch: str) -> int:
    """Run the kinds, and print what came of them; ``scratch`` is a folder that does not stay."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("kinds", nargs="*", default=KINDS, help=f"of {', '.join(KINDS)}; default: all")
    parser.add_argument("--count", type=int, default=20_000, help="cases in all")
    parser.add_argument("--seed", type=int, default=0, help="of the first child; the next ones count up")
    parser.add_argument("--faults", type=int, default=20, help="most faults to print in full")
    given = parser.parse_args()
    if unknown := set(given.kinds) - set(KINDS):
        parser.error(f"no kind {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    count = max(1, given.count // len(given.kinds))
    found: dict[str, list[Outcome]] = {}
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    os.environ |= {"HF_HOME": f"{scratch}/hub", "POLYREP_CACHE": f"{scratch}/cache"}
    for kind in given.kinds:
        importlib.import_module(f"fuzz.{kind}")
        found[kind] = []
        with tqdm(total=count, desc=kind, disable=None) as bar:
            for outcome in outcomes(kind, count, given.seed):
                found[kind].append(outcome)
                bar.update()
    print(table(found))
    faults = [(kind, outcome) for kind, tried in found.items() for outcome in tried if outcome.verdict == "fault"]
    for kind, outcome in faults[: given.faults]:
        print(f"\n{kind}, {outcome.case}\n  {outcome.detail}")
    if faults:
        print(f"\n{len(faults)} faults. A case again: python -m fuzz KIND --seed SEED --count {CHUNK}")
    return int(bool(faults))


def table(found: dict[str, list[Outcome]]) -> str:
    """What came of each kind."""
    lines = [f"{'kind':16}{'tried':>8}{'opened':>8}{'refused':>9}{'fault':>7}{'slowest':>10}"]
    for kind, tried in found.items():
        counts = [sum(outcome.verdict == verdict for outcome in tried) for verdict in ("opened", "refused", "fault")]
        slowest = max((outcome.seconds for outcome in tried), default=0.0)
        lines.append(f"{kind:16}{len(tried):8,}{counts[0]:8,}{counts[1]:9,}{counts[2]:7,}{slowest:8.2f} s")
    return "\n".join(lines)


def outcomes(kind: str, count: int, seed: int) -> Iterator[Outcome]:
    """What comes of so many cases of a kind, a child after another, as soon as it is known."""
    for number, first in enumerate(range(0, count, CHUNK)):
        yield from _of_child(kind, min(CHUNK, count - first), seed + number)


def _of_child(kind: str, count: int, seed: int) -> Iterator[Outcome]:
    fork = multiprocessing.get_context("fork")  # what a kind imports is imported once
    ours, theirs = fork.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        child = fork.Process(target=_child, args=(theirs, kind, count, seed, folder))
        child.start()
        theirs.close()
        case, started, ended = f"seed {seed}, before the first case", time.perf_counter(), False
        try:
            while ours.poll(START if "before" in case else 3 * SECONDS):
                what, value = ours.recv()
                if what == "case":
                    case, started = value, time.perf_counter()
                elif what == "outcome":
                    case = f"seed {seed}, after {value.case}"
                    yield value
                else:
                    ended = True
                    break
            else:
                yield Outcome(case, "fault", "hangs where no alarm reaches it", time.perf_counter() - started)
        except EOFError:
            pass
        finally:
            if not ended:
                child.kill()
            child.join()
        if not ended and child.exitcode != -9:
            yield Outcome(case, "fault", f"the process died: exit {child.exitcode}", time.perf_counter() - started)


def _child(pipe: Connection, kind: str, count: int, seed: int, folder: str) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    fuzz.watchers.append(lambda what, value: pipe.send((what, value)))
    try:
        importlib.import_module(f"fuzz.{kind}").run(count, seed, Path(folder))
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"[:1000]
        pipe.send(("outcome", Outcome(f"seed {seed}, outside of any case", "fault", said, 0.0)))
    pipe.send(("end", None))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        status = main(place)
    sys.exit(status)
