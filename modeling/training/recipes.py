"""Read what a run is: its recipe, and the flags over it.

A run is a folder with a ``recipe.yaml`` whose lines are ``flag: value``. The run decides which flags there are: the
recipe's own, the config fields of the method, the constructor arguments of the objective, and every argument of the
family's trainer. So a method adds its flags by being written, and ``--help`` is always complete.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import shlex
import types
from collections.abc import Collection
from dataclasses import dataclass, field, make_dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from sentence_transformers import (
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoderTrainer,
    SparseEncoderTrainingArguments,
)
from transformers import HfArgumentParser, PretrainedConfig, TrainingArguments

from ..errors import InputError
from ..files import read_json, shipped_folder
from ..hub.folder import family_of
from ..registry import ROOMS, Room


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


@dataclass
class HeadTrainingArguments(TrainingArguments):
    """The stock arguments of transformers, for a head on cached embeddings."""

    _argument_group_name = "training (TrainingArguments)"


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
    restval: str = field(
        default="train", metadata={"help": "Images of Karpathy's split restval: train with them, or ignore."}
    )
    objective: str = field(default="", metadata={"help": "Class name of the loss: the room's own, else the family's."})
    hard_negatives: int = field(
        default=0, metadata={"help": "Negatives of each pair, mined among the documents that the backbone ranks high."}
    )
    negative_margin: float = field(
        default=0.05, metadata={"help": "Leave out what scores above the own document's score less this share of it."}
    )
    mined_cache: str = field(default=".cache/mined", metadata={"help": "Where embeddings for mining are kept."})
    remine: bool = field(
        default=False, metadata={"help": "Mine anew with the model so far, before each epoch after the first."}
    )
    teacher: str = field(
        default="",
        metadata={"help": "Model, a cross-encoder too, whose scores an objective with distill_weight learns from."},
    )
    teacher_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of a Hub teacher."})
    lora_rank: int = field(default=0, metadata={"help": "Train adapters of this rank (PEFT), merged at the end."})
    freeze: list[str] = field(default_factory=list, metadata={"help": "Regular expressions of parameters to freeze."})
    card: str = field(default="", metadata={"help": "Template in model_cards/; default: the room's."})
    overwrite: bool = field(default=False, metadata={"help": "Replace what an earlier run left in --output_dir."})
    dry_run: bool = field(default=False, metadata={"help": "Print the resolved plan and stop."})


QUERIES = ("judged", "inverse_cloze", "both", "texts", "judged+texts")
"""Where a head's training queries come from."""


@dataclass
class HeadArguments:
    """How the frozen backbone's embeddings are cached, what a step sees of them, and what the head goes into."""

    _argument_group_name = "cached embeddings"

    cache_dir: str = field(default=".cache/embeddings", metadata={"help": "Where embeddings are kept."})
    model_dtype: str = field(
        default="auto", metadata={"help": "Backbone's weights while encoding; auto for the fastest safe."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Tokens per text; default: the backbone's own."})
    encode_batch_size: int = field(default=32, metadata={"help": "Texts per forward pass of the backbone."})
    queries: str = field(
        default="judged",
        metadata={
            "help": "judged: those of the data set. inverse_cloze: sentences of the documents, removed from them, "
            "for a corpus without queries. both: the two of a data set, each about as often. texts: documents as they "
            "are, read by the query encoder, for a head that learns from tokens. judged+texts: again the two."
        },
    )
    query_texts: int = field(default=2048, metadata={"help": "With texts: how many documents at most, by their ids."})
    cloze_sentences: int = field(default=3, metadata={"help": "Sentences taken of a document, at most a third."})
    negatives: int = field(default=2, metadata={"help": "Documents drawn per query from the backbone's nearest."})
    depth: int = field(default=100, metadata={"help": "How many of the nearest they are drawn from."})
    vision: str = field(default="", metadata={"help": "Folder or Hub id of the vision encoder of a dual encoder."})
    vision_revision: str | None = field(
        default=None, metadata={"help": "Commit, tag or branch of a Hub vision encoder."}
    )
    vocabulary: str = field(
        default="", metadata={"help": "Model whose words are used where the backbone's tokens are none."}
    )
    head_only: bool = field(
        default=False, metadata={"help": "Write <output_dir>/head alone, to attach to the backbone by hand."}
    )
    pipeline: bool = field(
        default=False,
        metadata={"help": "Put the head behind the backbone's own modules, where one folder cannot hold them."},
    )


@dataclass
class Plan:
    """A resolved run, ready to build: the parsed flags in their groups."""

    run: Path
    room: Room | None
    recipe: RecipeArguments
    config: dict[str, Any]
    objective: type[torch.nn.Module]
    objective_arguments: dict[str, Any]
    args: Any
    defaults: dict[str, Any]
    command: str
    head: HeadArguments | None = None


def resolve(argv: list[str], *, prog: str = "polyrep train") -> Plan:
    """Read the recipe, then the flags over it; each flag is checked by type and unknown ones are refused."""
    if not argv or argv[0].startswith("-"):
        parser = _parser([RecipeArguments, MultiVectorTrainingArguments], prog)
        if not {"-h", "--help"} & set(argv):
            parser.error("name a RUN first, e.g. hub_configs/late-interaction-minilm")
        parser.parse_args(["--help"])
    run, flags = _find_run(argv[0]), argv[1:]
    family = family_of(run).__name__
    method = read_json(run / "config.json")
    room = ROOMS.get(method.get("model_type", ""))
    defaults = _read_recipe(run)
    # The objective decides which flags there are, so it is looked up before the parser proper is built.
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--objective", default=defaults.get("objective", ""))
    name = chooser.parse_known_args(flags)[0].objective
    objective = _find_objective(name, family, room)

    on_cache = hasattr(objective, "trains_on")  # a head over cached embeddings
    groups: list[type] = [RecipeArguments, *([HeadArguments] if on_cache else [])]
    arguments = HeadTrainingArguments if on_cache else TRAINERS[family][1]
    # Fields that no flag can hold (lists, say) reach the config from the file as they are.
    fixed = {k: v for k, v in method.items() if k not in ("model_type", "architectures", "auto_map")}
    if room:
        fields = [name for owner in _config_classes(room.config) for name in inspect.signature(owner).parameters]
        if unknown := [k for k in fixed if k not in fields]:
            raise InputError(
                f"{run}/config.json: {unknown[0]!r} is no field of {room.config.__name__}, so it would be ignored. "
                f"Fields: {', '.join(k for k in fields if k != 'kwargs')}."
            )
        owner: Any = room.head.config_class if on_cache and room.head else room.config
        seen: set[str] = set()
        for part in _config_classes(owner):  # what a class names again is its own
            groups.append(_flags_of(part, f"method: {part.model_type}", method, seen))
            seen |= set(inspect.signature(part).parameters)
    groups.append(_flags_of(objective, f"objective: {name}", {}))
    parser = _parser([*groups, arguments], prog)
    known = {action.dest: action for action in parser._actions}
    if name != defaults.get("objective", name):  # settings of the recipe's own objective mean nothing to another
        own = inspect.signature(_find_objective(defaults["objective"], family, room)).parameters
        defaults = {key: value for key, value in defaults.items() if key in known or key not in own}
    for key, value in defaults.items():
        if key in known and known[key].nargs == "+" and not isinstance(value, list):
            raise InputError(f"{run}/recipe.yaml: {key}: {value!r} is not a list; write [{value}].")
        if key not in known:
            near = get_close_matches(key, known, n=1)
            raise InputError(
                f"{run}/recipe.yaml: {key!r} is no flag of this run, so it would be ignored. "
                + (f"Did you mean {near[0]!r}?" if near else "See --help for the flags.")
            )
    # bf16 on a machine without an accelerator is only accepted together with use_cpu.
    parser.set_defaults(**({"use_cpu": not torch.accelerator.is_available()} | defaults))
    # The trainer's arguments start torch.distributed, so nothing above may fail on one process only.
    recipe, *middle, args = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    head = middle.pop(0) if on_cache else None
    *method_flags, objective_flags = (dict(vars(part)) for part in middle)
    config = fixed if room else {}
    for flags_of_class in method_flags:
        config |= flags_of_class
    for flag, value, most in (
        ("hard_negatives", recipe.hard_negatives, 100),
        ("negative_margin", recipe.negative_margin, 1),
    ):
        if not 0 <= value <= most:
            raise InputError(f"--{flag} {value}: use 0 to {most}.")
    if not recipe.datasets:
        raise InputError(f"{run}: no training data. Name at least one with --datasets.")
    args.logging_nan_inf_filter = False  # a loss that is not finite must show, not be replaced by the last good one
    if on_cache:
        args.remove_unused_columns = False  # batches are features, not columns
        args.dataloader_drop_last = True  # a smaller last batch would be another objective
    if on_cache and (recipe.hard_negatives or recipe.lora_rank):
        raise InputError(
            f"--hard_negatives {recipe.hard_negatives}, --lora_rank {recipe.lora_rank}: are for training the whole "
            f"model, and {name} fits a head. Use --negatives, and leave the other out."
        )
    if on_cache and objective_flags.get("distill_weight") and not recipe.teacher:
        raise InputError(f"--distill_weight {objective_flags['distill_weight']}: nobody has scored. Name a --teacher.")
    if recipe.remine and not on_cache and not recipe.hard_negatives:
        raise InputError("--remine true: nothing is mined. Add --hard_negatives, e.g. 1.")
    if recipe.teacher and (not on_cache and not recipe.hard_negatives or not objective_flags.get("distill_weight")):
        raise InputError(
            f"--teacher {recipe.teacher}: {name} would not learn from its scores. Use an objective with "
            "--distill_weight above 0" + ("." if on_cache else ", and --hard_negatives for it to score.")
        )
    # At least ten: a table may bring its own.
    documents = dict.fromkeys(["positive", *negative_columns(max(recipe.hard_negatives, 10))], "document")
    tasks = {"query": "query"} | documents
    if not on_cache and not args.router_mapping:
        args.router_mapping = tasks
    prompts = read_json(run / "config_sentence_transformers.json").get("prompts") or {}
    if not on_cache and not args.prompts and prompts:  # encoding adds these by itself, training does not
        args.prompts = {column: prompts.get(task, "") for column, task in tasks.items()}
    command = shlex.join([*(["accelerate", "launch"] if prog.endswith(".py") else []), *prog.split(), *argv])
    return Plan(run, room, recipe, config, objective, objective_flags, args, defaults, command, head)


def negative_columns(count: int) -> list[str]:
    """Columns of mined negatives, as ``mine_hard_negatives`` names them."""
    return [f"negative_{number}" for number in range(1, count + 1)]


def _config_classes(config: type) -> list[Any]:
    """A config class and those of ours that it extends and passes the rest of its arguments to."""
    return [
        owner
        for owner in config.__mro__
        if issubclass(owner, PretrainedConfig) and owner is not PretrainedConfig and "__init__" in vars(owner)
    ]


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


def _find_objective(name: str, family: str, room: Room | None) -> type[torch.nn.Module]:
    own = room.objectives if room else {}
    losses = importlib.import_module(TRAINERS[family][2])
    known = sorted([*own, *losses.__all__])
    if name not in known:
        raise InputError(f"--objective {name!r}: unknown to {family}. Choose one of {', '.join(known)}.")
    return own.get(name) or getattr(losses, name)


def _parser(groups: list[type], prog: str) -> HfArgumentParser:
    try:
        return HfArgumentParser(
            groups,  # type: ignore[arg-type]
            prog=prog,
            usage=f"{prog} RUN [--flag value ...]",
            description="Train RUN, a folder such as hub_configs/late-interaction-minilm. Its recipe.yaml gives the "
            "defaults shown here; any flag overrides them. Name a RUN before --help to see its method's flags too.",
            allow_abbrev=False,
        )
    except argparse.ArgumentError as error:
        raise InputError(f"two parts of this run have a flag of one name: {error}. Rename one argument.") from None


def _flags_of(owner: type, group: str, defaults: dict[str, Any], without: Collection[str] = ()) -> type:
    """A dataclass of the number, string and switch arguments of a class, for the parser to turn into flags."""
    function = owner.__init__  # type: ignore[misc]
    hints = get_type_hints(function)
    # One entry of a Google docstring: "    name (type): first line" and the deeper lines below it.
    texts = [inspect.cleandoc(part.__doc__ or "") for part in reversed(owner.__mro__)]
    entries = re.findall(r"^ {4}(\w+)(?: \([^)]*\))?: (.+(?:\n {5,}.+)*)", "\n".join(texts), re.M)
    helps = {name: " ".join(text.split()).replace("`", "") for name, text in entries}
    flags = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in without or name in getattr(owner, "derived", ()):
            continue
        hint = hints.get(name)
        optional = (
            get_origin(hint) in (Union, types.UnionType)
            and len(get_args(hint)) == 2
            and get_args(hint)[1] is type(None)
        )
        if (get_args(hint)[0] if optional else hint) not in (int, float, str, bool, list[int]):
            required = (
                parameter.default is inspect.Parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            )
            if required and name not in ("self", "model", *defaults):
                raise InputError(f"{owner.__name__}: needs {name!r}, which no flag can hold. Choose another class.")
            continue
        default = defaults.get(name, None if parameter.default is inspect.Parameter.empty else parameter.default)
        shown: dict[str, Any] = {"metadata": {"help": helps.get(name, name).replace("%", "%%")}}
        if hint == list[int]:
            values = [default] if isinstance(default, int) else list(default or ())
            shown["default_factory"] = partial(list, values)
        else:
            shown["default"] = default
        flags.append((name, hint, field(**shown)))
    return make_dataclass("Flags", flags, namespace={"_argument_group_name": group})
