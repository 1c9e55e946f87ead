"""What is written down of a run: the plan before it, what may not change when it is resumed, and what came of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import nn

from ..data.dataset import dataset_name
from ..data.named import entry_of, located, on_hub
from ..errors import InputError
from ..files import read_json, write_json
from ..flags import changed_fields
from ..hub.cards import data_licence, hub_source, public_command, stated_licence
from ..hub.fingerprint import fingerprint
from ..hub.folder import MINILM_ID, fetch, local
from ..hub.vision import fetch_vision
from ..report import provenance
from .arguments import RecipeArguments
from .checkpoints import batch_size
from .objective import contract
from .recipes import Plan

RUN = "run.json"
"""File beside the checkpoints with what may not change when a run goes on."""

SINCE = ("hard_negatives", "negative_margin", "lora_rank", "teacher", "remine", "restval")
"""Settings that older runs did not write down; they had the defaults."""

OF_RUNS = ("datasets", "split", "keep_empty", "revision", "teacher_revision", "freeze")
"""Further settings of a recipe from which follows what a step does."""

OF_TRAINERS = (
    *("learning_rate", "learning_rate_mapping", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("gradient_accumulation_steps", "seed", "data_seed", "bf16", "fp16", "max_length", "prompts"),
    *("batch_sampler", "multi_dataset_batch_sampler", "dataloader_drop_last", "label_smoothing_factor"),
)
"""Arguments of a trainer from which follows what a step does; how long it trains, saves and logs may change."""

OF_HEADS = (
    *("queries", "cloze_sentences", "query_texts", "max_length", "vocabulary", "negatives", "depth", "vision"),
    *("vision_revision", "model_dtype"),
)
"""Settings from which, with the corpus, follows what a head is before its first step."""


def print_plan(plan: Plan, model: nn.Module, trainer: Any, counts: dict[str, int]) -> None:
    """Show what a run would do: the resolved plan of ``--dry_run``."""
    args = plan.args
    steps, per_epoch = planned_steps(trainer)
    everything = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    plan_lines = {
        "run": plan.run,
        "backbone": plan.recipe.backbone,
        "method": plan.config or "stock modules: " + ", ".join(type(module).__name__ for module in model.children()),
        "objective": f"{plan.recipe.objective} {plan.objective_arguments}",
        "pairs": ", ".join(f"{name} {count:,}" for name, count in counts.items()) + f" = {sum(counts.values()):,}",
        "batch": f"{args.train_batch_size} x {args.world_size} processes x {args.gradient_accumulation_steps}",
        "steps": f"{steps:,} ({steps / per_epoch:.3g} epochs of {per_epoch:,})",
        "parameters": f"{everything:,}, {trainable:,} trainable",
        "output": Path(args.output_dir) / "final",
    }
    print("\n".join(f"{key:<11} {value}" for key, value in plan_lines.items()))


def planned_steps(trainer: Any) -> tuple[int, int]:
    """Optimiser steps of a run, and of an epoch."""
    args = trainer.args
    per_epoch = math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps)
    return args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs), per_epoch


def lasting_settings(plan: Plan) -> dict[str, Any]:
    """What may not change when a run goes on from a checkpoint."""
    recipe, trainer = plan.recipe, plan.args.to_dict()
    settings = {"backbone": recipe.backbone, "objective": recipe.objective, **plan.config}
    settings |= {name: getattr(recipe, name) for name in SINCE + OF_RUNS} | plan.objective_arguments
    if plan.head:
        settings |= {name: getattr(plan.head, name) for name in OF_HEADS}
    settings |= {name: trainer[name] for name in OF_TRAINERS if name in trainer and name not in settings}
    return json.loads(json.dumps(settings | {"batch_size": batch_size(plan.args)}))


def refuse_another_run(plan: Plan, output: Path) -> None:
    """InputError if what is in a folder was started with other settings than those of the plan that goes on."""
    before = {name: getattr(RecipeArguments, name) for name in SINCE} | read_json(output / RUN)
    now = lasting_settings(plan)
    changed = [f"{name} ({value}, now {now.get(name)})" for name, value in before.items() if now.get(name) != value]
    if changed:
        raise InputError(
            f"{output}: started with another {', '.join(changed)}, so going on would mix two runs. Leave these flags "
            f"as they were ({RUN}), or start anew in another --output_dir."
        )


def written(output: Path, steps: int) -> Path | None:
    """The folder that a run has made after so many steps, if that is there, whole and unchanged."""
    record = read_json(output / "training.json")
    made = record.get("fingerprints") or {"final": record.get("fingerprint")}
    whole = all(fingerprint(output / name) == value for name, value in made.items())
    return output / list(made)[-1] if whole and record.get("steps") == steps else None


def base_id(backbone: str) -> str:
    """A backbone's name for others: its Hub id, or the last part of a path that says something; the rest is ours."""
    if backbone == "minilm":
        return MINILM_ID
    path = Path(backbone).resolve()
    return (path.parent if path.name == "final" else path).name if path.is_dir() else backbone


def _licence_of(source: str) -> str | None:
    """Licence of a data set: the table's of one that is known by name, else what its own card states."""
    entry = entry_of(source)
    return entry.licence if entry else data_licence(located(source))


def card_context(plan: Plan, counts: dict[str, int]) -> dict[str, Any]:
    """What the card says of a run: nothing of the machine that made it, and whose weights and data went into it."""
    recipe = plan.recipe
    vision = plan.head.vision if plan.head else ""
    sources = {dataset_name(source): source for source in recipe.datasets}
    names = {name: sources.get(name) or sources[name.removesuffix("-cloze")] for name in counts}
    backbone = fetch(recipe.backbone, revision=recipe.revision)
    licences = {
        "backbone": stated_licence(backbone),
        "vision": stated_licence(fetch_vision(vision, plan.head.vision_revision)) if plan.head and vision else None,
        "data": {name: _licence_of(source) for name, source in names.items()},
    }
    return {
        "command": public_command(plan.command),
        "backbone_id": base_id(recipe.backbone),
        # A snapshot is called by its commit.
        "backbone_revision": None if local(recipe.backbone) else backbone.name,
        "vision_id": base_id(vision) if vision else None,
        "labels": contract(plan.objective).learns_from_labels(plan.objective_arguments),
        "objective": recipe.objective,
        "pairs": counts,
        "datasets": {name: hub_source(*on_hub(source)).get("hub_dataset") for name, source in names.items()},
        "licences": licences,
        "versions": ", ".join(f"{name} {version}" for name, version in provenance("")["versions"].items()),
        "seed": plan.args.seed,
        "batch_size": batch_size(plan.args),
        "learning_rate": plan.args.learning_rate,
        "length": f"{plan.args.max_steps} steps"
        if plan.args.max_steps > 0
        else f"{plan.args.num_train_epochs:g} epochs",
    }


def write_record(
    plan: Plan, made: dict[str, Path], context: dict[str, Any], state: Any, seconds: float, output: Path
) -> None:
    """Write ``training.json``: what was asked for, on which machine, and what came of it.

    Args:
        plan: The run.
        made: ``head`` and ``final`` -> folder, as far as they were written.
        context: What the card says of the run.
        state: The trainer's.
        seconds: Of preparing and training.
        output: Where it is written.
    """
    args, recipe = plan.args, plan.recipe
    fingerprints = {name: fingerprint(folder) for name, folder in made.items()}
    asked = plan.defaults | changed_fields(recipe) | plan.config | plan.objective_arguments
    write_json(
        output / "training.json",
        provenance(plan.command)
        | {
            "recipe": asked,
            "learning_rate": args.learning_rate,
            "steps": state.global_step,
            "batch_size": batch_size(args),
            "seed": args.seed,
            "backbone_fingerprint": fingerprint(fetch(recipe.backbone, revision=recipe.revision)),
            "fingerprint": fingerprints[list(made)[-1]],
            "fingerprints": fingerprints,
            "template": plan.card,
            "card": context,
            "pairs": context["pairs"],
            "seconds": round(seconds, 1),
            "log": state.log_history,
        },
    )
