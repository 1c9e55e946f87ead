"""Fitting heads for the frontier, each within a time that is kept by a rehearsal."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...files import digest, read_json
from ...training.objective import contract
from ...training.recipes import plan_of
from .full_model import FullModel

REHEARSED = 12
"""Steps of a rehearsal: enough that the first, which allocates, counts for little."""

SHARE = 0.9
"""Of the time that the rehearsal leaves, what is planned: steps differ, and the machine is not alone."""


def fit_within(seconds: float, most: int, fit: Callable[[int, Path], None], folder: Path) -> None:
    """Fit with as many steps as a time allows, found by timing a few of them first.

    Args:
        seconds: Time for preparing the objective and training; encoding is not part of it.
        most: Steps of the recipe, which are never exceeded.
        fit: Trains a number of steps into a folder and writes ``training.json`` there, as training does.
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


def fitted(full: FullModel, label: str, depends: Any, most: int, fit: Callable[[int, Path], None]) -> Path:
    """The folder that ``fit`` fills within the time of a fit, kept under a hash of what it depends on.

    Args:
        full: The model, on the data that heads are fitted on.
        label: Readable part of the folder's name.
        depends: Settings and code of the fit.
        most: See :func:`fit_within`.
        fit: Likewise.
    """
    data = full.fit_data.dataset
    caches = [full.encoded(data, "query").path.name, full.encoded(data, "document").path.name]
    key = [depends, caches, data.qrels, full.fit_seconds, full.seed]
    folder = full.kept / "heads" / f"{full.dataset.name}-{label}-{digest(key)}"
    if not (folder / "training.json").is_file():
        with steady_threads():
            fit_within(full.fit_seconds, most, fit, folder)
    return folder


def costs_of_fit(folder: Path) -> dict[str, float]:
    """Seconds and steps of a fit, for its rows."""
    training = read_json(folder / "training.json")
    return {"fit_seconds": float(training["seconds"]), "steps": float(training["steps"])}


def fit_run(full: FullModel, name: str, code: str, *, single: bool = False, **values: Any) -> Path:
    """Fit the head of a shipped run.

    Args:
        full: The model, on the data that heads are fitted on.
        name: Of the run.
        code: Hash of the method's code.
        single: Whether the head reads one vector a text instead of several.
        values: What is other than in the run's recipe, by the names of its flags.

    Returns:
        The folder of the head, with ``training.json`` in the folder above.
    """
    from ...training.train import run  # with all that trains: kept rows need not wait for it

    data, backbone = full.fit_data, full.single[0] if single else full.folder
    if single:  # encoded here, where the vectors follow from those of tokens
        full.side(data.dataset, "query"), full.side(data.dataset, "document")
    settings = {**data.settings, **values}
    if isinstance(full.model.max_seq_length, int):
        settings["max_length"] = full.model.max_seq_length
    plan = plan_of(
        name,
        backbone=str(backbone),
        trust_remote_code=full.trust_remote_code,
        datasets=[data.source],
        cache_dir=full.cache_dir,
        encode_batch_size=full.batch_size,
        model_dtype=str(full.weights).removeprefix("torch."),
        seed=full.seed,
        head_only=True,
        overwrite=True,
        save_strategy="no",
        output_dir=str(full.kept),
        **settings,
    )
    batch, pairs = plan.args.per_device_train_batch_size, len(data.dataset.queries)
    if contract(plan.objective).planned_rows(plan.objective_arguments) is None:  # else it goes through other rows
        batch = min(batch, pairs)
    most = plan.args.max_steps
    if most < 1:
        most = math.ceil(plan.args.num_train_epochs * (pairs // batch))

    def fit(steps: int, folder: Path) -> None:
        run(plan.with_trainer(output_dir=str(folder), max_steps=steps, per_device_train_batch_size=batch))

    recipe = {file.name: file.read_text(encoding="utf-8") for file in sorted(plan.run.glob("*.*"))}
    return fitted(full, name, [recipe, values, code, data.settings], most, fit) / "head"


@contextmanager
def steady_threads() -> Iterator[None]:
    """Leave torch with the threads it had, since training may take more, and searches are timed with those."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def code_digest(*names: str) -> str:
    """Hash of files of the package, by name in it; a folder stands for all its Python files.

    Raises:
        FileNotFoundError: There is no such file or folder, so that what moved is not left out without a word.
    """
    parts = [Path(__file__).parents[2] / name for name in names]
    files = [file for part in parts for file in (sorted(part.glob("*.py")) if part.is_dir() else [part])]
    return digest([file.read_text(encoding="utf-8") for file in files])
