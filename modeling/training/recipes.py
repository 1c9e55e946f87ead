"""Read what a run is: its recipe, and the values over it, which a command line gives as flags and code by name.

A run is a folder with a ``recipe.yaml`` whose lines are ``flag: value``. The run decides which flags there are: the
recipe's own, the config fields of the method, the constructor arguments of the objective, and every argument of the
family's trainer. What comes of it is a :class:`Plan`, which :func:`~polyrep.training.train.run` trains.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import HfArgumentParser

from ..errors import InputError, first_line, refusals
from ..files import read_json, shipped_folder
from ..flags import as_flags, command_line, refuse_out_of_range, say_usage
from ..hub.cards import check_template
from ..hub.folder import family_of
from ..registry import ROOMS, Room
from .arguments import (
    TRAINERS,
    HeadArguments,
    HeadTrainingArguments,
    MultiVectorTrainingArguments,
    RecipeArguments,
    config_classes,
    config_flags,
    flags_of,
    negative_columns,
)
from .objective import contract

_SILENT: tuple[Any, ...] = ("none", "tensorboard", ["none"], ["tensorboard"], [])
"""Trackers that a recipe may name, since they write to the disk alone."""

CONSENTS = (
    "trust_remote_code",
    "overwrite",
    "resume_from_checkpoint",
    "push_to_hub",
    "hub_model_id",
    "hub_token",
    "hub_private_repo",
    "report_to",
    "trackio_space_id",
)
"""What a recipe, which may be a stranger's, cannot say: the command line alone gives consent."""


@dataclass(frozen=True)
class Plan:
    """A resolved run, ready to train.

    Attributes:
        run: Its folder.
        room: The method; None for stock modules.
        recipe: What to train, from what, on what.
        config: Fields of the method's config.
        objective: Class of the loss.
        objective_arguments: Arguments of its constructor.
        args: Those of the trainer.
        defaults: What the recipe says.
        command: What was asked for, as a command.
        head: How the vectors of a frozen backbone are cached, for a run that trains a head on them; else None.
    """

    run: Path
    room: Room | None
    recipe: RecipeArguments
    config: dict[str, Any]
    objective: type[nn.Module]
    objective_arguments: dict[str, Any]
    args: Any
    defaults: dict[str, Any]
    command: str
    head: HeadArguments | None = None

    @property
    def card(self) -> str | None:
        """Template of the model's card; None for none."""
        return self.recipe.card or (self.room.card if self.room else None)

    def with_trainer(self, **values: Any) -> Plan:
        """The same plan with other values of some of the trainer's arguments.

        They are not made anew: that would start torch.distributed, which a plan does once.
        """
        args = copy.copy(self.args)
        for name, value in values.items():
            setattr(args, name, value)
        return replace(self, args=args)


def resolve(argv: list[str], *, prog: str = "polyrep train") -> Plan:
    """The plan of a command line: a run, and flags over its recipe.

    Raises:
        InputError: A file of the run, or a flag, cannot be used as it is.
    """
    if not argv or argv[0].startswith("-"):
        parser = _parser([RecipeArguments, MultiVectorTrainingArguments], prog)
        if not {"-h", "--help"} & set(argv):
            parser.error("name a RUN first, e.g. hub_configs/late-interaction-minilm")
        parser.parse_args(["--help"])
    return _plan(_read_run(argv[0]), {}, argv[1:], prog, command_line(prog, argv, launcher="accelerate launch"))


def plan_of(run: str | Path, **values: Any) -> Plan:
    """The plan of a run, and values over its recipe, by the names of their flags: for code that trains.

    Raises:
        InputError: A file of the run, or a value, cannot be used as it is.
    """
    prog = "polyrep train"
    return _plan(_read_run(str(run)), values, [], prog, command_line(prog, [str(run), *as_flags(values)]))


@dataclass(frozen=True)
class _Run:
    """The files of a run, read: its folder, its ``config.json`` and ``recipe.yaml``, and what they name."""

    folder: Path
    family: str
    room: Room | None
    method: dict[str, Any]
    recipe: dict[str, Any]


def _read_run(name: str) -> _Run:
    folder = _find_run(name)
    method = read_json(
        folder / "config.json", remedy="Mend it, or take the run that came with polyrep.", model_type=str
    )
    return _Run(
        folder,
        family_of(folder).__name__,
        ROOMS.get(method.get("model_type", "")),
        {k: v for k, v in method.items() if k not in ("model_type", "architectures", "auto_map")},
        read_recipe(folder),
    )


def _find_run(name: str) -> Path:
    """A run by path, or by name among the runs that polyrep ships."""
    for folder in (Path(name), shipped_folder("hub_configs") / name):
        if (folder / "recipe.yaml").is_file():
            return folder
    shipped = sorted(path.parent.name for path in shipped_folder("hub_configs").glob("*/recipe.yaml"))
    raise InputError(f"{name}: no folder with a recipe.yaml. Shipped runs: {', '.join(shipped)}.")


def _is_shipped(run: Path) -> bool:
    """Whether a run is one of polyrep's own."""
    return run.resolve().parent == shipped_folder("hub_configs").resolve()


def read_recipe(run: Path) -> dict[str, Any]:
    """The flags that a run sets; InputError if its ``recipe.yaml`` cannot be read."""
    try:
        recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{run}/recipe.yaml: not valid YAML ({first_line(error)}).") from None
    if not isinstance(recipe, dict) or not all(isinstance(flag, str) for flag in recipe):
        raise InputError(f"{run}/recipe.yaml: expected `flag: value` lines, found {type(recipe).__name__}.")
    silent = {"report_to"} if recipe.get("report_to") in _SILENT else set()
    if asked := [flag for flag in CONSENTS if flag in recipe.keys() - silent]:
        raise InputError(
            f"{run}/recipe.yaml: {asked[0]}: {recipe[asked[0]]} is for whoever trains to say, since it runs code, "
            f"replaces files or uploads. Remove the line, and pass --{asked[0]} where you want it."
        )
    return recipe


def _plan(run: _Run, values: Mapping[str, Any], flags: list[str], prog: str, command: str) -> Plan:
    """The plan of a run, with values over its recipe and flags over both."""
    # The objective decides which flags there are, so it is looked up before the parser proper is built.
    own = run.recipe.get("objective", "")
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--objective", default=values.get("objective", own))
    chooser.add_argument("--backbone", default=values.get("backbone"))
    said = chooser.parse_known_args(flags)[0]
    name = said.objective
    objective = _find_objective(name, run)
    on_cache = contract(objective).trains_on is not None  # a head over cached vectors
    groups: list[type] = [RecipeArguments, *([HeadArguments] if on_cache else []), *_method_flags(run, on_cache)]
    groups.append(flags_of(objective, f"objective: {name}", {}))
    parser = _parser([*groups, HeadTrainingArguments if on_cache else TRAINERS[run.family][1]], prog)
    known = {action.dest: action for action in parser._actions}
    defaults = run.recipe
    if own and name != own:  # settings of the recipe's own objective mean nothing to another
        others = inspect.signature(_find_objective(own, run)).parameters
        defaults = {key: value for key, value in defaults.items() if key in known or key not in others}
    _refuse_unknown(defaults, known, f"{run.folder}/recipe.yaml")
    _refuse_unknown(values, known, run.folder.name)
    defaults = {**defaults, **values}
    # bf16 on a machine without an accelerator is only accepted together with use_cpu.
    parser.set_defaults(**({"use_cpu": not torch.accelerator.is_available()} | defaults))
    refuse_out_of_range(vars(parser.parse_args(flags)))
    # The trainer's arguments start torch.distributed, so nothing above may fail on one process only.
    try:
        with refusals():
            recipe, *middle, args = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    except (OSError, ImportError, LookupError, TypeError) as error:  # a setting names a file or a package
        raise InputError(
            f"{run.folder.name}: a flag of the trainer names what is not there ({first_line(error)}). Mend it, or "
            "leave it out."
        ) from error
    head = middle.pop(0) if on_cache else None
    *method, objective_arguments = (dict(vars(part)) for part in middle)
    config = dict(run.method) if run.room else {}  # fields that no flag can hold reach the config as they are
    for fields in method:
        config |= fields
    plan = Plan(run.folder, run.room, recipe, config, objective, objective_arguments, args, defaults, command, head)
    if recipe.trust_remote_code and said.backbone is None and not _is_shipped(run.folder):
        raise InputError(
            f"--trust_remote_code: covers what the command names, and the backbone {recipe.backbone} is named by "
            f"{run.folder}/recipe.yaml alone. Read its code, then pass --backbone {recipe.backbone} too."
        )
    _refuse_contradictions(plan)
    _settle(plan)
    return plan


def _find_objective(name: str, run: _Run) -> type[nn.Module]:
    """A class by name: the room's own, else the family's."""
    own = run.room.objectives if run.room else {}
    losses = importlib.import_module(TRAINERS[run.family][2])
    known = sorted([*own, *losses.__all__])
    if name not in known:
        raise InputError(f"--objective {name!r}: unknown to {run.family}. Choose one of {', '.join(known)}.")
    return own.get(name) or getattr(losses, name)


def _method_flags(run: _Run, on_cache: bool) -> list[type]:
    """The fields of the method's config as flags: of the head's, where a head is trained."""
    if not run.room:
        return []
    fields = [name for owner in config_classes(run.room.config) for name in inspect.signature(owner).parameters]
    if unknown := [name for name in run.method if name not in fields]:
        raise InputError(
            f"{run.folder}/config.json: {unknown[0]!r} is no field of {run.room.config.__name__}, so it would be "
            f"ignored. Fields: {', '.join(name for name in fields if name != 'kwargs')}."
        )
    owner: Any = run.room.head.config_class if on_cache and run.room.head else run.room.config
    return config_flags(owner, run.method)


def _parser(groups: list[type], prog: str) -> HfArgumentParser:
    try:
        parser = HfArgumentParser(
            groups,  # type: ignore[arg-type]
            prog=prog,
            usage=f"{prog} RUN [--flag value ...]",
            description="Train RUN, a folder such as hub_configs/late-interaction-minilm. Its recipe.yaml gives the "
            "defaults shown here; any flag overrides them. Name a RUN before --help to see its method's flags too.",
            allow_abbrev=False,
        )
    except argparse.ArgumentError as error:
        raise InputError(f"two parts of this run have a flag of one name: {error}. Rename one argument.") from None
    say_usage(parser)
    return parser


def _refuse_unknown(values: Mapping[str, Any], known: Mapping[str, argparse.Action], where: str) -> None:
    """InputError if a value is that of no flag, or no list where the flag takes one."""
    for key, value in values.items():
        if key not in known:
            near = get_close_matches(key, known, n=1)
            raise InputError(
                f"{where}: {key!r} is no flag of this run, so it would be ignored. "
                + (f"Did you mean {near[0]!r}?" if near else "See --help for the flags.")
            )
        if known[key].nargs == "+" and not isinstance(value, list):
            raise InputError(f"{where}: {key}: {value!r} is not a list; write [{value}].")
        for part in value if known[key].nargs == "+" else [value]:
            if not _fits(key, part, known[key]):
                raise InputError(f"{where}: {key}: {part!r} is no value of this flag. See --help for what it takes.")


def _fits(key: str, value: Any, flag: argparse.Action) -> bool:
    """Whether a value of a recipe is of its flag's kind: a number, or for what is polyrep's own a text.

    The trainer's other flags take objects too, and check them.
    """
    if value is None:
        return flag.default is None
    if flag.type in (int, float):
        return isinstance(value, str | int | float | dict) and not isinstance(value, bool)  # max_length: one per task
    own = any(key in group.__dataclass_fields__ for group in (RecipeArguments, HeadArguments))
    return flag.type is not str or not own or isinstance(value, str)


def _refuse_contradictions(plan: Plan) -> None:
    """InputError if values do not go together."""
    recipe, name, on_cache = plan.recipe, plan.objective.__name__, plan.head is not None
    distils = contract(plan.objective).learns_from_teacher(plan.objective_arguments)
    if getattr(plan.args, "auto_find_batch_size", False):
        raise InputError(
            "--auto_find_batch_size: would train with another batch than card and record say, and than a resumed run "
            "has. Set --per_device_train_batch_size, and --gradient_accumulation_steps for what does not fit."
        )
    if not recipe.datasets:
        raise InputError(f"{plan.run}: no training data. Name at least one with --datasets.")
    if on_cache and (recipe.hard_negatives or recipe.lora_rank):
        raise InputError(
            f"--hard_negatives {recipe.hard_negatives}, --lora_rank {recipe.lora_rank}: are for training the whole "
            f"model, and {name} fits a head. Use --negatives, and leave the other out."
        )
    if on_cache and distils and not recipe.teacher:
        raise InputError(f"{name} learns from scores (--distill_weight), and nobody has scored. Name a --teacher.")
    if recipe.remine and not on_cache and not recipe.hard_negatives:
        raise InputError("--remine true: nothing is mined. Add --hard_negatives, e.g. 1.")
    if recipe.teacher and (not on_cache and not recipe.hard_negatives or not distils):
        raise InputError(
            f"--teacher {recipe.teacher}: {name} would not learn from its scores. Use an objective with "
            "--distill_weight above 0" + ("." if on_cache else ", and --hard_negatives for it to score.")
        )
    if plan.card:
        check_template(plan.card)


def _settle(plan: Plan) -> None:
    """What the trainer's arguments must be, or are unless someone said otherwise."""
    args = plan.args
    args.logging_nan_inf_filter = False  # a loss that is not finite must show, not be replaced by the last good one
    if plan.head:
        args.remove_unused_columns = False  # batches are features, not columns
        args.dataloader_drop_last = True  # a smaller last batch would be another objective
        return
    # At least ten: a table may bring its own.
    documents = dict.fromkeys(["positive", *negative_columns(max(plan.recipe.hard_negatives, 10))], "document")
    tasks = {"query": "query"} | documents
    args.router_mapping = args.router_mapping or tasks
    prompts = read_json(plan.run / "config_sentence_transformers.json", prompts=dict).get("prompts") or {}
    if not args.prompts and prompts:  # encoding adds these by itself, training does not
        args.prompts = {column: prompts.get(task, "") for column, task in tasks.items()}
