"""Train a whole model: the stock trainer of its sentence-transformers family over pairs of texts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict

from ..errors import InputError, first_line, refusals
from ..hub.cards import render_card
from ..hub.folder import Encoder, load, save
from ..hub.reading import check_length, positions_of
from .adapters import AdapterTrainerMixin, add_adapters, merge_adapters
from .arguments import TRAINERS
from .build import freeze, settle
from .checkpoints import CheckpointCallback, OneWriterMixin, WholeRunMixin, restore_state
from .datasets import datasets_of
from .mining import Miner, RemineCallback
from .objective import Objective, contract
from .recipes import Plan, read_recipe


class WholeTraining:
    """A whole model and the trainer of its family.

    Attributes:
        plan: The run.
        model: What is trained.
        trainer: The family's own.
        pair_counts: Data set -> number of its pairs.
        prepare_seconds: What was spent on the data's vectors before the first step: nothing.

    Args:
        plan: The run.
        init: Folder of the untrained model.
    """

    prepare_seconds = 0.0

    def __init__(self, plan: Plan, init: Path):
        self.plan = plan
        self.model: Any = load(init, trust_remote_code=plan.recipe.trust_remote_code)
        _keep_length(plan, self.model)
        if plan.recipe.lora_rank:
            add_adapters(self.model, plan.recipe.lora_rank)
        data, remine = _pairs(plan)
        self.pair_counts = {name: len(pairs) for name, pairs in data.items()}
        _refuse_unfit(plan, self.model, next(iter(data.values())))
        freeze(plan.recipe.freeze, self.model)
        with refusals():
            loss = plan.objective(self.model, **plan.objective_arguments)
        self.objective = objective = contract(loss)
        self.pairs = data
        if not plan.recipe.dry_run and not plan.args.resume_from_checkpoint:
            objective.initialize(data)
        if plan.args.learning_rate_mapping == {}:
            plan.args.learning_rate_mapping = _learning_rates(plan, loss, objective)
        _checkpoint_gradients(plan, self.model)
        if remine is not None:
            data = remine.shown()
        mixins = (WholeRunMixin, OneWriterMixin, *([AdapterTrainerMixin] if plan.recipe.lora_rank else []))
        with refusals():  # of arguments that do not go together
            self.trainer: Any = type("FamilyTrainer", (*mixins, TRAINERS[type(self.model).__name__][0]), {})(
                model=self.model,
                args=plan.args,
                train_dataset=DatasetDict(data) if len(data) > 1 else next(iter(data.values())),
                loss=loss,
                callbacks=[CheckpointCallback(objective), *([remine] if remine else [])],
            )

    def refuse_no_step(self) -> None:
        """InputError if the pairs make no whole batch."""
        with torch.random.fork_rng(devices=[]):
            empty = next(iter(self.trainer.get_train_dataloader().batch_sampler), None) is None
        if empty:
            pairs, batch = sum(self.pair_counts.values()), self.plan.args.train_batch_size
            raise InputError(
                f"{pairs} pairs make no batch of {batch}, so there is no step. Lower --per_device_train_batch_size, "
                "name more --datasets, or take another --batch_sampler."
            )

    def train(self, resume: Path | None) -> None:
        """Train, from a checkpoint if one is named."""
        self.trainer.train(resume_from_checkpoint=str(resume) if resume else None)

    def restore(self, checkpoint: Path) -> None:
        """Take the model and the state of a checkpoint, without a step."""
        self.model = load(checkpoint, trust_remote_code=self.model.trust_remote_code)  # adapters are merged there
        self.objective.model = self.model
        restore_state(self.trainer, checkpoint)

    def save(self, output: Path, context: dict[str, Any]) -> dict[str, Path]:
        """Write the trained model and its card as ``final``; return that name -> folder."""
        if self.plan.recipe.lora_rank and self.model is self.trainer.model:
            merge_adapters(self.model)
        self.objective.complete(self.pairs)
        settle(self.plan, self.model)
        card = self.plan.card
        readme = str(render_card(self.model, card, recipe=context)) if card else None
        return {"final": save(self.model, output / "final", readme=readme)}


def _keep_length(plan: Plan, model: Any) -> None:
    """Hold the length of training texts to the model's positions: lower the recipe's own, refuse the user's."""
    length = getattr(plan.args, "max_length", None)
    if not isinstance(length, int):
        return
    positions = positions_of(model)
    if positions is not None and length > positions and length == read_recipe(plan.run).get("max_length"):
        plan.args.max_length = positions
        if plan.args.process_index == 0:
            said = f"{plan.recipe.backbone} has positions for {positions}, so texts are cut there."
            print(f"The recipe reads {length} tokens of a text; {said}", flush=True)
        return
    check_length(model, length, plan.recipe.backbone)


def _refuse_unfit(plan: Plan, model: Any, pairs: Dataset) -> None:
    """InputError if the modules cannot encode the first pair, so that a dry run sees what training would."""
    try:
        model.encode_query(pairs[0]["query"], show_progress_bar=False)
        model.encode_document(pairs[0]["positive"], show_progress_bar=False)
    except Exception as error:  # of any kind, as the modules are anyone's
        modules = " + ".join(type(module).__name__ for module in model)
        raise InputError(
            f"{plan.recipe.backbone}: behind it, the run's modules ({modules}) encode no text: {first_line(error)}. "
            "Name another --backbone, or mend the configs of the run."
        ) from error


def _pairs(plan: Plan) -> tuple[dict[str, Dataset], RemineCallback | None]:
    """Pairs of each data set, with mined negatives if wanted, and what mines them anew before each further epoch."""
    recipe = plan.recipe
    miner = Miner(recipe) if recipe.hard_negatives and not recipe.dry_run else None
    found: dict[str, Dataset] = {}
    mined = {}
    for dataset in datasets_of(recipe):
        found[dataset.name] = dataset.pairs()
        if miner is None:
            continue
        if dataset.given:
            raise InputError(
                f"--hard_negatives {recipe.hard_negatives}: {dataset.name} brings negatives of its own. Use 0."
            )
        with plan.args.main_process_first(desc="mine negatives"):
            found[dataset.name] = miner.mine(dataset, found[dataset.name])
        mined[dataset.name] = (dataset, found[dataset.name])
    return found, RemineCallback(miner, mined) if miner is not None and recipe.remine else None


def _learning_rates(plan: Plan, loss: torch.nn.Module, objective: Objective) -> dict[str, float]:
    """Pattern -> learning rate, as far as a parameter has such a name: others the trainer would refuse."""
    names = [name for name, _ in loss.named_parameters()]
    return {
        pattern: factor * plan.args.learning_rate
        for pattern, factor in objective.learning_rates.items()
        if any(re.search(pattern, name) for name in names)
    }


def _checkpoint_gradients(plan: Plan, model: Encoder) -> None:
    """Ask the encoder itself, since not every sentence-transformers passes on what its trainer says."""
    if plan.args.gradient_checkpointing:
        kwargs = plan.args.gradient_checkpointing_kwargs or {"use_reentrant": False}
        first: Any = model[0]
        first.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        plan.args.gradient_checkpointing = False
