"""Train any run: a Hub folder without weights (``hub_configs/<run>``) in, a Hub folder with weights out.

The folder's ``recipe.yaml`` gives the default of every flag and the command line overrides them. What trains is the
stock trainer of the sentence-transformers family that the folder names, which is Accelerate underneath, so mixed
precision, several processes, resuming and reporting are theirs. Here is only what they leave open: reading the recipe,
building the untrained model as ``<output_dir>/init``, and writing the trained one as ``<output_dir>/final``.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import re
import shutil
import tempfile
import time
import types
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, make_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from datasets import DatasetDict
from sentence_transformers import (
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoderTrainer,
    SparseEncoderTrainingArguments,
)
from sentence_transformers.base.modules.transformer import Transformer
from sentence_transformers.util.misc import import_from_string
from transformers import AutoTokenizer, HfArgumentParser, TrainerCallback, set_seed

from . import ROOMS, Room
from .data import load_retrieval_dataset
from .errors import InputError
from .files import staged_folder, write_json
from .hub import FAMILIES, Encoder, family_of, fetch, fingerprint, load, localize, save, shipped_folder
from .report import provenance

@dataclass
class SentenceTrainingArguments(SentenceTransformerTrainingArguments):
    """The stock arguments under a heading of their own in ``--help``."""

    _argument_group_name = "training (SentenceTransformerTrainingArguments)"


@dataclass
class SparseTrainingArguments(SparseEncoderTrainingArguments):
    """The stock arguments under a heading of their own in ``--help``."""

    _argument_group_name = "training (SparseEncoderTrainingArguments)"


@dataclass
class MultiVectorTrainingArguments(MultiVectorEncoderTrainingArguments):
    """Likewise, with ``max_length`` as a flag can give it: one integer (a recipe may also give one per task)."""

    _argument_group_name = "training (MultiVectorEncoderTrainingArguments)"

    max_length: int | None = field(default=None, metadata={"help": "Tokens per text while training."})


TRAINERS: dict[str, tuple[type, type, str]] = {
    "SentenceTransformer": (
        SentenceTransformerTrainer,
        SentenceTrainingArguments,
        "sentence_transformers.sentence_transformer.losses",
    ),
    "SparseEncoder": (SparseEncoderTrainer, SparseTrainingArguments, "sentence_transformers.sparse_encoder.losses"),
    "MultiVectorEncoder": (
        MultiVectorEncoderTrainer,
        MultiVectorTrainingArguments,
        "sentence_transformers.multi_vector_encoder.losses",
    ),
}
"""Family -> trainer, its arguments, and where its losses live."""


@dataclass
class RecipeArguments:
    """What to train, from what, on what. Every other flag belongs to the method, its objective or the trainer."""

    _argument_group_name = "recipe"

    backbone: str = field(default="minilm", metadata={"help": "Folder, Hub id, or `minilm` (packaged, offline)."})
    revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of a Hub backbone."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the backbone's own code (pin --revision)."})
    datasets: list[str] = field(default_factory=list, metadata={"help": "BEIR folders or Hub data set ids."})
    split: str = field(default="train", metadata={"help": "Split whose positive judgments are the training pairs."})
    keep_empty: bool = field(default=False, metadata={"help": "Accept empty texts instead of refusing the data set."})
    objective: str = field(default="", metadata={"help": "Class name of the loss: the room's own, else the family's."})
    freeze: list[str] = field(default_factory=list, metadata={"help": "Regular expressions of parameters to freeze."})
    card: str = field(default="", metadata={"help": "Template in model_cards/; default: the room's."})
    overwrite: bool = field(default=False, metadata={"help": "Replace what an earlier run left in --output_dir."})
    dry_run: bool = field(default=False, metadata={"help": "Print the resolved plan and stop."})


@dataclass
class Plan:
    """A resolved run, ready to build: the parsed flags in their four groups."""

    run: Path
    room: Room | None
    recipe: RecipeArguments
    config: dict[str, Any]
    objective: Callable[..., torch.nn.Module]
    objective_arguments: dict[str, Any]
    args: Any
    command: str


def train(argv: list[str], *, prog: str = "polyrep train") -> Path | None:
    """Train the run named first in ``argv``; the rest are flags.

    Returns:
        The folder of the trained model; None after ``--dry_run`` or after Ctrl-C.

    Raises:
        InputError: The run, a flag, the data or the backbone cannot be used, or the loss stopped being finite.
    """
    plan = resolve(argv, prog=prog)
    args, recipe = plan.args, plan.recipe
    output = Path(args.output_dir)
    resume = _checkpoint_to_resume(output, args.resume_from_checkpoint)
    if not (resume or recipe.dry_run) and args.process_index == 0:
        left = [path for path in [output / "final", *output.glob("checkpoint-*")] if path.exists()]
        if left and not recipe.overwrite:
            raise InputError(
                f"{output}: holds {left[0].name} of an earlier run, which would be replaced. Go on from there with "
                "--resume_from_checkpoint last, choose another --output_dir, or pass --overwrite."
            )
        for path in left:
            shutil.rmtree(path)
    if args.use_cpu:  # accelerate launch gives each process one thread unless told otherwise
        torch.set_num_threads(max(torch.get_num_threads(), (os.cpu_count() or 1) // args.world_size))
    set_seed(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        if recipe.dry_run:
            args.output_dir = scratch  # the trainer makes its folder at once
        init = Path(args.output_dir) / "init"
        with args.main_process_first(desc="build the untrained model"):
            if args.process_index == 0 and not (resume and init.exists()):
                shutil.rmtree(init, ignore_errors=True)
                build(plan, init)
        model = load(init, trust_remote_code=True)
        trainer, counts = _trainer(plan, model)
        if recipe.dry_run:
            _print_plan(plan, model, trainer, counts, output)
            return None
        started = time.perf_counter()
        try:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        except KeyboardInterrupt:
            last = _last_checkpoint(output)
            how = "Go on with --resume_from_checkpoint last." if last else "There is no checkpoint yet (--save_steps)."
            print(f"Interrupted at step {trainer.state.global_step}; last checkpoint: {last}. {how}", flush=True)
            raise
    if args.process_index != 0:
        return None
    card = recipe.card or (plan.room.card if plan.room else None)
    final = save(model, output / "final", card=card, recipe=_card_context(plan, counts))
    write_json(
        output / "training.json",
        provenance(plan.command)
        | {
            "recipe": _changed(recipe, RecipeArguments()) | plan.config | plan.objective_arguments,
            "backbone_fingerprint": fingerprint(fetch(recipe.backbone, revision=recipe.revision)),
            "fingerprint": fingerprint(final),
            "pairs": counts,
            "seconds": round(time.perf_counter() - started, 1),
            "log": trainer.state.log_history,
        },
    )
    return final


def resolve(argv: list[str], *, prog: str = "polyrep train") -> Plan:
    """Read the recipe, then the flags over it; each flag is checked by type and unknown ones are refused."""
    named = argv[0] if argv and not argv[0].startswith("-") else None
    run = _find_run(named) if named else None
    family = family_of(run).__name__ if run else "MultiVectorEncoder"
    room = ROOMS.get(_json(run / "config.json").get("model_type", "")) if run else None
    recipe_defaults = _read_recipe(run) if run else {}
    probe = HfArgumentParser(RecipeArguments, add_help=False, allow_abbrev=False)
    probe.set_defaults(**{k: v for k, v in recipe_defaults.items() if k in {f.name for f in fields(RecipeArguments)}})
    named_objective = probe.parse_known_args(argv[1:] if named else argv)[0].objective
    objective = _find_objective(named_objective, family, room) if run else None

    groups: list[type] = [RecipeArguments]
    if room:
        groups.append(_flags_of(room.model.config_class.__init__, f"method: {run.name}", _json(run / "config.json")))
    if objective:
        groups.append(_flags_of(objective.__init__, f"objective: {named_objective}", {}, objective.__doc__))
    groups.append(TRAINERS[family][1])
    parser = HfArgumentParser(
        groups,
        prog=prog,
        usage=f"{prog} RUN [--flag value ...]",
        description="Train RUN, a folder such as hub_configs/late-interaction-minilm. Its recipe.yaml gives the "
        "defaults shown here; any flag overrides them. Name a RUN before --help to see its method's flags too.",
        allow_abbrev=False,
    )
    flags = {action.dest for action in parser._actions}
    for key in recipe_defaults:
        if key not in flags:
            near = get_close_matches(key, flags, n=1)
            raise InputError(
                f"{run}/recipe.yaml: {key!r} is no flag of this run, so it would be ignored. "
                + (f"Did you mean {near[0]!r}?" if near else "See --help for the flags.")
            )
    # bf16 on a machine without an accelerator is only accepted together with use_cpu.
    parser.set_defaults(**({"use_cpu": not torch.accelerator.is_available()} | recipe_defaults))
    if run is None:
        parser.parse_args(argv if {"-h", "--help"} & set(argv) else ["--help"])
    # The trainer's arguments start torch.distributed, so nothing above may fail on one process only.
    recipe, *method, args = parser.parse_args_into_dataclasses(argv[1:], look_for_args_file=False)
    config = vars(method.pop(0)) if room else {}
    if not recipe.datasets:
        raise InputError(f"{run}: no training data. Name at least one with --datasets.")
    args.logging_nan_inf_filter = False  # a loss that is not finite must show, not be replaced by the last good one
    if not args.router_mapping:
        args.router_mapping = {"query": "query", "positive": "document"}
    command = " ".join([f"accelerate launch {prog}" if prog.endswith(".py") else prog, *argv])
    return Plan(run, room, recipe, config, objective, vars(method.pop(0)), args, command)


def build(plan: Plan, folder: Path) -> None:
    """Write the untrained model: the run's folder plus the backbone's weights and tokenizer.

    A room builds itself through ``from_encoder``. Without a room the stock modules that ``modules.json`` lists are
    built: the first from the backbone, the others from their own config with fresh weights.
    """
    recipe = plan.recipe
    backbone = fetch(recipe.backbone, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
    with staged_folder(folder) as staged:
        shutil.copytree(plan.run, staged, dirs_exist_ok=True, ignore=shutil.ignore_patterns("recipe.yaml"))
        if plan.room:
            model = plan.room.model.from_encoder(str(backbone), **plan.config)
            model.save_pretrained(staged)
            AutoTokenizer.from_pretrained(backbone).save_pretrained(staged)
            localize(staged)
            return
        family = family_of(plan.run)
        modules: list[torch.nn.Module] = [Transformer(str(backbone), **_json(plan.run / "sentence_bert_config.json"))]
        for part in _json(plan.run / "modules.json")[1:]:
            module, _, name = part["type"].rpartition(".")
            if not module.startswith("sentence_transformers."):
                raise InputError(f"{plan.run}/modules.json: {part['type']} is neither stock nor of a registered room.")
            module_class = getattr(importlib.import_module(module), name)
            config = module_class.load_config(str(plan.run), subfolder=part["path"])
            if "activation_function" in config:  # Dense names a class and takes an instance
                config["activation_function"] = import_from_string(config["activation_function"])()
            modules.append(module_class(**config))
        settings = _json(plan.run / "config_sentence_transformers.json")
        keep = {key: settings[key] for key in ("prompts", "similarity_fn_name") if settings.get(key)}
        family(modules=modules, **keep).save_pretrained(str(staged))


class CheckpointCallback(TrainerCallback):
    """Makes every checkpoint a folder that opens without polyrep, and stops a run whose loss is not finite."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Localise the checkpoint that was just written."""
        if state.is_world_process_zero:
            localize(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Raise InputError on a NaN or infinite loss; earlier checkpoints stay as they are."""
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise InputError(
                f"loss is {loss} at step {state.global_step}, so further steps would ruin the model. Lower "
                "--learning_rate or --max_grad_norm, or train in float32; earlier checkpoints are intact."
            )


def _trainer(plan: Plan, model: Encoder) -> tuple[Any, dict[str, int]]:
    """The family's trainer over one data set per source, and the number of pairs in each."""
    sources = {}
    for source in plan.recipe.datasets:
        loaded = load_retrieval_dataset(source, plan.recipe.split, keep_empty=plan.recipe.keep_empty)
        if loaded.name in sources:
            raise InputError(f"--datasets: two are called {loaded.name!r}; rename one folder.")
        sources[loaded.name] = loaded.pairs()
    for pattern in plan.recipe.freeze:
        matched = [parameter for name, parameter in model.named_parameters() if re.search(pattern, name)]
        if not matched:
            names = [name for name, _ in model.named_parameters()]
            raise InputError(f"--freeze {pattern!r}: matches no parameter. The first is {names[0]!r}.")
        for parameter in matched:
            parameter.requires_grad_(False)
    trainer = TRAINERS[type(model).__name__][0](
        model=model,
        args=plan.args,
        train_dataset=DatasetDict(sources) if len(sources) > 1 else next(iter(sources.values())),
        loss=plan.objective(model, **plan.objective_arguments),
        callbacks=[CheckpointCallback()],
    )
    return trainer, {name: len(pairs) for name, pairs in sources.items()}


def _print_plan(plan: Plan, model: Encoder, trainer: Any, counts: dict[str, int], output: Path) -> None:
    args = plan.args
    per_epoch = max(len(trainer.get_train_dataloader()) // args.gradient_accumulation_steps, 1)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
    everything = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    plan_lines = {
        "run": plan.run,
        "backbone": plan.recipe.backbone,
        "method": plan.config or "stock modules: " + ", ".join(type(module).__name__ for module in model),
        "objective": f"{plan.recipe.objective} {plan.objective_arguments}",
        "pairs": ", ".join(f"{name} {count:,}" for name, count in counts.items()) + f" = {sum(counts.values()):,}",
        "batch": f"{args.train_batch_size} x {args.world_size} processes x {args.gradient_accumulation_steps}",
        "steps": f"{steps:,} ({args.num_train_epochs:g} epochs of {per_epoch:,})",
        "parameters": f"{everything:,}, {trainable:,} trainable",
        "output": output / "final",
    }
    print("\n".join(f"{key:<11} {value}" for key, value in plan_lines.items()))


def _find_run(name: str) -> Path:
    """A run by path, or by name among the runs that polyrep ships."""
    for folder in (Path(name), shipped_folder("hub_configs") / name):
        if (folder / "recipe.yaml").is_file():
            return folder
    shipped = sorted(path.parent.name for path in shipped_folder("hub_configs").glob("*/recipe.yaml"))
    raise InputError(f"{name}: no folder with a recipe.yaml. Shipped runs: {', '.join(shipped)}.")


def _read_recipe(run: Path) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{run}/recipe.yaml: not valid YAML ({error}).") from None
    if not isinstance(recipe, dict):
        raise InputError(f"{run}/recipe.yaml: expected `flag: value` lines, found {type(recipe).__name__}.")
    return recipe


def _find_objective(name: str, family: str, room: Room | None) -> Callable[..., torch.nn.Module]:
    own = room.objectives if room else {}
    losses = importlib.import_module(TRAINERS[family][2])
    known = sorted([*own, *losses.__all__])
    if name not in known:
        raise InputError(f"--objective {name!r}: unknown to {family}. Choose one of {', '.join(known)}.")
    return own.get(name) or getattr(losses, name)


def _flags_of(
    function: Callable[..., Any], group: str, defaults: dict[str, Any], documentation: str | None = None
) -> type:
    """A dataclass of the number, string and switch arguments of ``function``, for the parser to turn into flags."""
    hints = get_type_hints(function)
    # One entry of a Google docstring: "    name (type): first line" and the deeper lines below it.
    entries = re.findall(r"^ {4}(\w+)(?: \([^)]*\))?: (.+(?:\n {5,}.+)*)", inspect.cleandoc(documentation or ""), re.M)
    helps = {name: " ".join(text.split()).replace("`", "") for name, text in entries}
    flags = []
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints.get(name)
        optional = get_origin(hint) in (Union, types.UnionType) and len(get_args(hint)) == 2 and get_args(hint)[1] is type(None)
        if (get_args(hint)[0] if optional else hint) not in (int, float, str, bool):
            continue
        default = defaults.get(name, None if parameter.default is inspect.Parameter.empty else parameter.default)
        flags.append((name, hint, field(default=default, metadata={"help": helps.get(name, name).replace("%", "%%")})))
    return make_dataclass("Flags", flags, namespace={"_argument_group_name": group})


def _checkpoint_to_resume(output: Path, wanted: str | None) -> Path | None:
    if not wanted:
        return None
    if wanted.lower() not in ("last", "true"):
        if not _is_complete(Path(wanted)):
            raise InputError(f"--resume_from_checkpoint {wanted}: no complete checkpoint (trainer_state.json) there.")
        return Path(wanted)
    if (last := _last_checkpoint(output)) is None:
        raise InputError(f"--resume_from_checkpoint {wanted}: {output} holds no complete checkpoint to go on from.")
    return last


def _last_checkpoint(output: Path) -> Path | None:
    complete = [path for path in output.glob("checkpoint-*") if _is_complete(path)]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_complete(checkpoint: Path) -> bool:
    """The trainer writes its state last, so a checkpoint cut off while it was written has none that can be read."""
    try:
        return "global_step" in json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False


def _card_context(plan: Plan, counts: dict[str, int]) -> dict[str, Any]:
    return {
        "command": f"accelerate launch train.py hub_configs/{plan.run.name}",
        "backbone": plan.recipe.backbone,
        "objective": plan.recipe.objective,
        "pairs": counts,
        "seed": plan.args.seed,
        "batch_size": plan.args.train_batch_size * plan.args.world_size,
        "learning_rate": plan.args.learning_rate,
        "epochs": plan.args.num_train_epochs,
    }


def _changed(values: Any, defaults: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(values).items() if value != getattr(defaults, key)}


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


__all__ = ["CheckpointCallback", "Plan", "RecipeArguments", "build", "resolve", "train"]
