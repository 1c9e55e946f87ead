"""The stock Trainer of transformers over an objective with the shape of a sentence-transformers loss.

The objective is called as ``objective(features, labels)`` with ``features = [queries, documents]``. So the losses and
modules of that library train here too, which is how controls and rivals get the same data in the same order.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ..errors import InputError
from .checkpoints import WholeRunMixin
from .objective import contract
from .pairs import HeadData
from .sides import Features

OWN_WEIGHTS = "objective.safetensors"
"""File of a checkpoint with what the objective itself learns."""


class HeadTrainer(WholeRunMixin, Trainer):
    """The stock Trainer over an objective with the shape of a sentence-transformers loss.

    What trains is the objective as a whole: a step is then one forward pass, which is what sharing gradients between
    processes asks for. What is saved is ``objective.model``.

    Args:
        objective: An :class:`~polyrep.training.objective.Objective`, or a stock loss.
        remine: Take negatives anew before each further epoch, of the nearest by the objective's ``mining_vectors``. A
            resumed epoch takes them by the model that it resumes from.
        kwargs: Those of the Trainer.

    Raises:
        InputError: The objective makes no single vectors to mine with.
    """

    def __init__(self, *, objective: nn.Module, remine: bool = False, **kwargs: Any):
        self.contract = contract(objective)
        encode = self.contract.mining_vectors if remine else None
        if remine and encode is None:
            raise InputError(f"--remine true: {type(objective).__name__} makes no vectors to mine with. Leave it out.")
        super().__init__(model=objective, **kwargs)
        self.objective: Any = objective
        self.model_accepts_loss_kwargs = False
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        if isinstance(self.train_dataset, HeadData):
            self.train_dataset.seed = self.args.seed
            self.add_callback(_EpochCallback(self.train_dataset, encode))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """AdamW with the objective's own rates; a parameter that no pattern names takes ``--learning_rate``."""
        rates = self.contract.learning_rates
        groups: dict[float, list[Any]] = {}
        for name, parameter in self.objective.named_parameters():
            if parameter.requires_grad:
                factor = next((value for pattern, value in rates.items() if re.search(pattern, name)), 1.0)
                groups.setdefault(factor, []).append(parameter)
        optimizer, options = self.get_optimizer_cls_and_kwargs(self.args)
        rate = options.pop("lr")
        self.optimizer = optimizer(
            [{"params": part, "lr": rate * factor} for factor, part in groups.items()],
            weight_decay=self.args.weight_decay,
            **options,
        )
        return self.optimizer

    def get_train_dataloader(self) -> Any:
        """The stock one, unless there is no whole batch, which it would pass over in silence."""
        self.refuse_no_batch()
        return super().get_train_dataloader()

    def refuse_no_batch(self) -> None:
        """InputError if there are fewer pairs than a step takes."""
        batch = self.args.train_batch_size * self.args.world_size
        pairs = len(self.train_dataset)  # type: ignore[arg-type]
        if pairs < batch:
            raise InputError(
                f"{pairs} pairs, but a step takes {batch}, so there is no step. Lower "
                "--per_device_train_batch_size, or name more --datasets."
            )

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of a batch."""
        self.contract.seed = self.args.seed
        self.contract.progress = (self.state.global_step, self.state.max_steps)
        losses = model(inputs["features"], inputs["labels"])
        if not isinstance(losses, dict):
            losses = {"objective": losses}
        shown = losses | self.contract.metrics
        for name, value in shown.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=value.device)) + value.detach()
        self._steps += 1
        total = torch.stack(list(losses.values())).sum()
        return (total, {}) if return_outputs else total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of each part of the loss since the last time."""
        if "loss" in logs and len(self._sums) > 1:
            logs |= {name: round(float(value) / self._steps, 4) for name, value in self._sums.items()}
        if "loss" in logs:
            self._sums, self._steps = {}, 0
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:  # newer trainers ask every process
            return
        folder = Path(output_dir or str(self.args.output_dir))
        self.contract.finish()
        self.objective.model.save_pretrained(folder)
        if own := self._own_weights():
            save_file(own, folder / OWN_WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        load_model(self.objective.model, folder / "model.safetensors")
        if own := self._own_weights():
            if not (folder / OWN_WEIGHTS).is_file():
                raise InputError(
                    f"{folder}: lacks {OWN_WEIGHTS}, what {type(self.objective).__name__} learned beside the model, "
                    "so going on would forget it. Start anew in another --output_dir."
                )
            self.objective.load_state_dict(own | load_file(folder / OWN_WEIGHTS), strict=False)

    def _own_weights(self) -> dict[str, Tensor]:
        """What the objective learns beside the model, which it needs to go on and nobody needs afterwards."""
        weights = self.objective.state_dict()
        return {name: value.contiguous() for name, value in weights.items() if not name.startswith("model.")}


class _EpochCallback(TrainerCallback):
    """Tells the data which epoch it is, on which its draws depend, and may have it mine with the model so far."""

    def __init__(self, data: HeadData, encode: Callable[[Features, str], Tensor] | None):
        self.data, self.encode = data, encode

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.data.epoch = int(state.epoch or 0)
        if self.encode and self.data.epoch:
            self.data.mine_again(self.encode)
