"""What heads learn from, and fitting them within a time that is kept by a rehearsal.

A :class:`Subject` is a model on a corpus: its encodings, made once, of what is measured and of what heads learn from.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from ...files import digest, read_json
from ...training.recipes import resolve
from .subject import Subject

REHEARSED = 12
"""Steps of a rehearsal: enough that the first, which allocates, counts for little."""

SHARE = 0.9
"""Of the time that the rehearsal leaves, what is planned: steps differ, and the machine is not alone."""


def fit_within(seconds: float, most: int, fit: Callable[[int, Path], None], folder: Path) -> None:
    """Fit with as many steps as a time allows, found by timing a few of them first.

    Args:
        seconds: Time for preparing the objective and training; encoding is not part of it.
        most: Steps of the recipe, which are never exceeded.
        fit: Trains a number of steps into a folder and writes ``training.json`` there, as the train command does.
        folder: Of the result.
    """
    steps = most
    if most > REHEARSED:
        with tempfile.TemporaryDirectory() as scratch:
            fit(REHEARSED, Path(scratch) / "rehearsal")
            rehearsal = read_json(Path(scratch) / "rehearsal" / "training.json")
        training = next(entry["train_runtime"] for entry in rehearsal["log"] if "train_runtime" in entry)
        preparing = max(0.0, rehearsal["seconds"] - training)
        fitting = math.floor(SHARE * (seconds - preparing) * REHEARSED / max(training, 1e-3))
        steps = max(1, min(most, fitting))
    fit(steps, folder)


def fitted(on: Subject, label: str, depends: Any, most: int, fit: Callable[[int, Path], None]) -> Path:
    """The folder that ``fit`` fills within the subject's time, kept under a hash of what it depends on.

    Args:
        on: The subject, whose lessons are learned from.
        label: Readable part of the folder's name.
        depends: Settings and code of the fit.
        most: See :func:`fit_within`.
        fit: Likewise.
    """
    sides: tuple[Literal["query", "document"], ...] = ("query", "document")
    lessons = [on.encoded(on.lessons.dataset, task).path.name for task in sides]
    key = [depends, lessons, on.lessons.dataset.qrels, on.fit_seconds, on.seed]
    folder = on.kept / "heads" / f"{on.dataset.name}-{label}-{digest(key)}"
    if not (folder / "training.json").is_file():
        with steady_threads():
            fit_within(on.fit_seconds, most, fit, folder)
    return folder


def costs_of_fit(folder: Path) -> dict[str, float]:
    """Seconds and steps of a fit, for its rows."""
    training = read_json(folder / "training.json")
    return {"fit_seconds": float(training["seconds"]), "steps": float(training["steps"])}


def fit_run(on: Subject, run: str, flags: list[str], code: str, *, single: bool = False) -> Path:
    """Fit the head of a shipped run on the subject's lessons, by the train command.

    Args:
        on: The subject.
        run: Name of the run.
        flags: Flags over its recipe.
        code: Hash of the method's code.
        single: Whether the head reads one vector a text instead of several.

    Returns:
        The folder of the head, with ``training.json`` in the folder above.
    """
    from ...training.train import train  # with all that trains: kept rows need not wait for it

    backbone = on.single[0] if single else on.folder
    sides: tuple[Literal["query", "document"], ...] = ("query", "document")
    if single:
        for task in sides:
            on.side(on.lessons.dataset, task)
    length = on.model.max_seq_length
    argv = [run, "--backbone", str(backbone), "--datasets", on.lessons.source, *on.lessons.flags, *flags]
    argv += ["--cache_dir", on.cache_dir, "--encode_batch_size", str(on.batch_size), "--seed", str(on.seed)]
    argv += ["--model_dtype", str(on.weights).removeprefix("torch."), "--head_only", "true", "--save_strategy", "no"]
    argv += ["--max_length", str(length)] if isinstance(length, int) else []
    argv += ["--trust_remote_code", str(on.trust_remote_code or backbone != on.folder)]
    plan = resolve([*argv, "--output_dir", str(on.kept)], prog="polyrep train")
    pairs = len(on.lessons.dataset.queries)
    batch = plan.args.per_device_train_batch_size
    if not hasattr(plan.objective, "planned_rows"):  # else it does not go through pairs
        batch = min(batch, pairs)
    most = plan.args.max_steps
    if most < 1:
        most = math.ceil(plan.args.num_train_epochs * (pairs // batch))

    def fit(steps: int, folder: Path) -> None:
        where = ["--output_dir", str(folder), "--overwrite", "--per_device_train_batch_size", str(batch)]
        train([*argv, *where, "--max_steps", str(steps)], prog="polyrep train")

    recipe = {file.name: file.read_text(encoding="utf-8") for file in sorted(plan.run.glob("*.*"))}
    return fitted(on, run, [recipe, flags, code, on.lessons.flags], most, fit) / "head"


@contextmanager
def steady_threads() -> Iterator[None]:
    """Leave torch with the threads it had, since training may take more, and searches are timed with those."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def code_digest(*names: str) -> str:
    """Hash of files of the package, by name in it; a folder stands for all its Python files."""
    root = Path(__file__).parents[2]
    files = [file for name in names for file in [root / name, *sorted((root / name).glob("*.py"))] if file.is_file()]
    return digest([file.read_text(encoding="utf-8") for file in files])
