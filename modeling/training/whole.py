"""Train a whole model: the stock trainer of its sentence-transformers family over pairs."""

from __future__ import annotations

import re
from typing import Any

import torch
from datasets import DatasetDict

from ..errors import InputError
from ..hub.folder import Encoder
from .adapters import AdapterTrainerMixin
from .checkpoints import CheckpointCallback, OneWriterMixin
from .datasets import datasets_of
from .mining import Miner, RemineCallback
from .recipes import TRAINERS, Plan


def family_trainer(plan: Plan, model: Encoder) -> tuple[Any, dict[str, int]]:
    """The family's trainer over one data set per source, and the number of pairs in each."""
    sources, loaded_from, callbacks = {}, {}, []
    miner = Miner(plan.recipe) if plan.recipe.hard_negatives and not plan.recipe.dry_run else None
    for loaded in datasets_of(plan.recipe):
        sources[loaded.name] = loaded.pairs()
        if miner is not None and loaded.given:
            raise InputError(
                f"--hard_negatives {plan.recipe.hard_negatives}: {loaded.name} brings negatives of its own. Use 0."
            )
        if miner is not None:
            with plan.args.main_process_first(desc="mine negatives"):
                sources[loaded.name] = miner.mine(loaded, sources[loaded.name])
            loaded_from[loaded.name] = (loaded, sources[loaded.name])
    freeze(plan.recipe.freeze, model)
    objective: Any = plan.objective(model, **plan.objective_arguments)
    if hasattr(objective, "prepare") and not plan.recipe.dry_run and not plan.args.resume_from_checkpoint:
        objective.prepare(sources)
    if plan.args.learning_rate_mapping == {} and hasattr(objective, "learning_rates"):
        names = [name for name, _ in objective.named_parameters()]
        plan.args.learning_rate_mapping = {
            pattern: factor * plan.args.learning_rate
            for pattern, factor in objective.learning_rates.items()
            if any(re.search(pattern, name) for name in names)
        }
    if miner is not None and plan.recipe.remine:
        callbacks = [RemineCallback(miner, loaded_from)]
        sources = callbacks[0].shown()
    # Asked for here, since not every sentence-transformers passes on what its trainer says.
    if plan.args.gradient_checkpointing:
        kwargs = plan.args.gradient_checkpointing_kwargs or {"use_reentrant": False}
        first: Any = model[0]
        first.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        plan.args.gradient_checkpointing = False
    mixins = (OneWriterMixin, AdapterTrainerMixin) if plan.recipe.lora_rank else (OneWriterMixin,)
    trainer = type("FamilyTrainer", (*mixins, TRAINERS[type(model).__name__][0]), {})(
        model=model,
        args=plan.args,
        train_dataset=DatasetDict(sources) if len(sources) > 1 else next(iter(sources.values())),
        loss=objective,
        callbacks=[CheckpointCallback(objective), *callbacks],
    )
    return trainer, {name: len(pairs) for name, pairs in sources.items()}


def freeze(patterns: list[str], model: torch.nn.Module) -> None:
    """Leave parameters as they are; InputError names a pattern that matches none."""
    for pattern in patterns:
        matched = [parameter for name, parameter in model.named_parameters() if re.search(pattern, name)]
        if not matched:
            names = [name for name, _ in model.named_parameters()]
            raise InputError(f"--freeze {pattern!r}: matches no parameter. The first is {names[0]!r}.")
        for parameter in matched:
            parameter.requires_grad_(False)
