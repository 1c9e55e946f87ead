"""Checkpoints that one process writes, that open without polyrep, and that a run goes on from."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerState

from ..errors import InputError
from ..files import read_json
from ..hub.code import localize
from .objective import Objective


class OneWriterMixin:
    """Put before a sentence-transformers trainer: of several processes, only the main one writes a checkpoint.

    Newer releases of transformers ask every process to save, while this ``_save`` takes itself for process zero's, so
    all of them would write the same files at once.
    """

    def _save(self, *args: Any, **kwargs: Any) -> None:
        trainer: Any = super()
        if self.args.should_save:  # type: ignore[attr-defined]
            trainer._save(*args, **kwargs)


def batch_size(args: Any) -> int:
    """Pairs of an optimiser step: of all processes, and of all passes whose gradients it sums."""
    return args.train_batch_size * args.world_size * args.gradient_accumulation_steps


class SoFar(TrainerCallback, ExportableState):
    """What a run has taken before it was resumed, which every checkpoint keeps in ``trainer_state.json``.

    Attributes:
        seconds: Of training.
        loss: Sum over the steps.
        first: The step that this process goes on from.

    Args:
        trainer: Whose steps these are.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.seconds = self.loss = 0.0
        self.first = 0
        self.started: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over what the checkpoint says; one of an older polyrep says nothing."""
        before = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]
        self.seconds, self.loss, self.first = before["seconds"], before["loss"], state.global_step
        self.started = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """The same with what this process has added."""
        seconds, loss = self.seconds, self.loss
        if self.started is not None:
            seconds += time.perf_counter() - self.started
            loss += self.trainer._total_loss_scalar + float(getattr(self.trainer, "_tr_loss", 0.0))
        return {"args": {}, "attributes": {"seconds": seconds, "loss": loss}}


class WholeRunMixin:
    """Put before a trainer: what it logs last is of the whole run, and no checkpoint goes by the clock."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.so_far = SoFar(self)
        self.add_callback(self.so_far)  # type: ignore[attr-defined]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log; of a run's summary, seconds and loss with those before this process, unless these are not known."""
        if "train_loss" in logs and bool(self.so_far.first) == bool(self.so_far.seconds):
            trainer: Any = self
            seconds, step = self.so_far.state()["attributes"]["seconds"], trainer.state.global_step
            logs |= {
                "train_runtime": round(seconds, 4),
                "train_steps_per_second": round(step / seconds, 3),
                "train_samples_per_second": round(step * batch_size(trainer.args) / seconds, 3),
                "train_loss": (self.so_far.loss + trainer._total_loss_scalar) / step,
            }
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save; the trainer then removes by date, so no earlier checkpoint may seem newer, as on a clock set back."""
        trainer: Any = self
        output = Path(trainer.args.output_dir)
        earlier = [(path, path.stat().st_mtime) for path in output.glob("checkpoint-*")]
        if earlier and trainer.args.should_save:
            os.utime(output)  # to what now is on that disk
            late = max(date for _, date in earlier) - output.stat().st_mtime
            for path, date in earlier if late > 0 else ():
                os.utime(path, (date - late - 2,) * 2)
        super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]


class CheckpointCallback(TrainerCallback):
    """Makes every checkpoint a folder that opens without polyrep, and stops a run that is no longer finite.

    Args:
        objective: Whose ``metrics`` are logged as they are at that step; None where the trainer logs their means.
    """

    def __init__(self, objective: Objective | None = None):
        self.objective = objective

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Raise InputError before a checkpoint is written, and an older one deleted for it, if a weight is NaN."""
        if control.should_save and not all(torch.isfinite(parameter).all() for parameter in model.parameters()):
            raise InputError(f"a weight is not finite at step {state.global_step}; {_WHEN_NOT_FINITE}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Localise the checkpoint that was just written."""
        if state.is_world_process_zero:
            localize(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Raise InputError on a NaN or infinite loss; add the objective's figures to what is logged."""
        loss = (logs or {}).get("loss", 0.0)
        if logs and "loss" in logs and self.objective:
            shown = {name: round(float(value), 4) for name, value in self.objective.metrics.items()}
            logs.update(shown)
            state.log_history[-1].update(shown)
        if not math.isfinite(loss):
            raise InputError(f"loss is {loss} at step {state.global_step}; {_WHEN_NOT_FINITE}")


_WHEN_NOT_FINITE = (
    "further steps cannot mend the model, so training stops. Start anew with a lower --learning_rate or "
    "--max_grad_norm, or in float32; earlier checkpoints are intact."
)


def checkpoint_to_resume(output: Path, wanted: str | None) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint`` asks for; None where it asks for none."""
    if not wanted:
        return None
    if wanted.lower() not in ("last", "true"):
        if not _is_complete(Path(wanted)):
            raise InputError(f"--resume_from_checkpoint {wanted}: no complete checkpoint (trainer_state.json) there.")
        return Path(wanted)
    if (last := last_checkpoint(output)) is None:
        raise InputError(f"--resume_from_checkpoint {wanted}: {output} holds no complete checkpoint to go on from.")
    return last


def last_checkpoint(output: Path) -> Path | None:
    """The latest complete checkpoint of a run; None where there is none."""
    complete = [path for path in output.glob("checkpoint-*") if _is_complete(path)]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def restore_state(trainer: Any, checkpoint: Path) -> None:
    """Have a trainer know what it knew when it wrote a checkpoint."""
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    trainer.so_far.on_train_begin(trainer.args, trainer.state, trainer.control)


def steps_of(checkpoint: Path) -> int:
    """Steps that a complete checkpoint has behind it."""
    return read_json(checkpoint / "trainer_state.json")["global_step"]


def _is_complete(checkpoint: Path) -> bool:
    """The trainer writes its state last, so a checkpoint cut off while it was written has none that can be read."""
    try:
        return "global_step" in read_json(checkpoint / "trainer_state.json")
    except (OSError, InputError):
        return False
