"""What is written down of a run: the plan before it, and what its card says after it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..data.dataset import dataset_name
from ..hub.cards import data_licence, public_command, stated_licence
from ..hub.folder import MINILM_ID, Encoder, fetch, local
from ..hub.vision import fetch_vision
from ..report import provenance
from .recipes import Plan


def print_plan(plan: Plan, model: Encoder, trainer: Any, counts: dict[str, int], output: Path) -> None:
    """Show what a run would do: the resolved plan of ``--dry_run``."""
    args = plan.args
    per_epoch = math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
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
        "output": output / "final",
    }
    print("\n".join(f"{key:<11} {value}" for key, value in plan_lines.items()))


def base_id(backbone: str) -> str:
    """A backbone's name for others: its Hub id, or the last part of a path that says something; the rest is ours."""
    if backbone == "minilm":
        return MINILM_ID
    path = Path(backbone).resolve()
    return (path.parent if path.name == "final" else path).name if path.is_dir() else backbone


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
        "data": {name: data_licence(source) for name, source in names.items()},
    }
    return {
        "command": public_command(plan.command),
        "backbone_id": base_id(recipe.backbone),
        # A snapshot is called by its commit.
        "backbone_revision": None if local(recipe.backbone) else backbone.name,
        "vision_id": base_id(vision) if vision else None,
        "labels": plan.objective_arguments.get("label_weight", 1) > 0,
        "objective": recipe.objective,
        "pairs": counts,
        "datasets": {name: None if Path(source).is_dir() else source for name, source in names.items()},
        "licences": licences,
        "versions": ", ".join(f"{name} {version}" for name, version in provenance("")["versions"].items()),
        "seed": plan.args.seed,
        "batch_size": plan.args.train_batch_size * plan.args.world_size,
        "learning_rate": plan.args.learning_rate,
        "length": f"{plan.args.max_steps} steps"
        if plan.args.max_steps > 0
        else f"{plan.args.num_train_epochs:g} epochs",
    }


def not_default(values: Any, defaults: Any) -> dict[str, Any]:
    """Fields that differ from the defaults."""
    return {key: value for key, value in vars(values).items() if value != getattr(defaults, key)}
