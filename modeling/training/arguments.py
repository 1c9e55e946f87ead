"""What a run may be told: the flags in their groups.

Those of every run are dataclasses here. Those of a method are read from its classes: the fields of its config, the
constructor arguments of its objective. So a method adds its flags by being written, and ``--help`` is always complete.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Collection
from dataclasses import dataclass, field, make_dataclass
from functools import partial
from typing import Any, Union, get_args, get_origin, get_type_hints

from sentence_transformers import (
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoderTrainer,
    SparseEncoderTrainingArguments,
)
from transformers import PretrainedConfig, TrainingArguments

from ..errors import InputError


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


def config_flags(config: type, given: dict[str, Any]) -> list[type]:
    """The fields of a config class, and of those of ours that it extends, as groups of flags.

    Args:
        config: Its ``derived`` names fields that follow from the backbone, and are no flags.
        given: The fields that the run's ``config.json`` sets: their defaults.
    """
    groups: list[type] = []
    named: set[str] = set()
    for owner in config_classes(config):  # what a class names again is its own
        groups.append(flags_of(owner, f"method: {owner.model_type}", given, named))
        named |= set(inspect.signature(owner).parameters)
    return groups


def config_classes(config: type) -> list[Any]:
    """A config class and those of ours that it extends and passes the rest of its arguments to."""
    return [
        owner
        for owner in config.__mro__
        if issubclass(owner, PretrainedConfig) and owner is not PretrainedConfig and "__init__" in vars(owner)
    ]


def flags_of(owner: type, group: str, defaults: dict[str, Any], without: Collection[str] = ()) -> type:
    """A dataclass of the number, string and switch arguments of a class, for the parser to turn into flags.

    Args:
        owner: The class; what its docstring says of an argument is the flag's help.
        group: Heading in ``--help``.
        defaults: Argument -> what takes the place of the class's own default.
        without: Arguments that get no flag.

    Raises:
        InputError: It needs an argument that no flag can hold.
    """
    function = owner.__init__  # type: ignore[misc]
    hints, helps = get_type_hints(function), _argument_helps(owner)
    flags = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in without or name in getattr(owner, "derived", ()):
            continue
        hint, missing = hints.get(name), parameter.default is inspect.Parameter.empty
        if _without_none(hint) not in (int, float, str, bool, list[int]):
            required = missing and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            if required and name not in ("self", "model", *defaults):
                raise InputError(f"{owner.__name__}: needs {name!r}, which no flag can hold. Choose another class.")
            continue
        default = defaults.get(name, None if missing else parameter.default)
        shown: dict[str, Any] = {"metadata": {"help": helps.get(name, name).replace("%", "%%")}}
        if hint == list[int]:
            shown["default_factory"] = partial(list, [default] if isinstance(default, int) else default or ())
        else:
            shown["default"] = default
        flags.append((name, hint, field(**shown)))
    return make_dataclass("Flags", flags, namespace={"_argument_group_name": group})


def _argument_helps(owner: type) -> dict[str, str]:
    """What the Google docstrings of a class and its parents say of each argument."""
    texts = [inspect.cleandoc(part.__doc__ or "") for part in reversed(owner.__mro__)]
    # One entry: "    name (type): first line" and the deeper lines below it.
    entries = re.findall(r"^ {4}(\w+)(?: \([^)]*\))?: (.+(?:\n {5,}.+)*)", "\n".join(texts), re.M)
    return {name: " ".join(text.split()).replace("`", "") for name, text in entries}


def _without_none(hint: Any) -> Any:
    """``X`` of ``X | None``; any other type as it is."""
    parts = get_args(hint)
    optional = get_origin(hint) in (Union, types.UnionType) and len(parts) == 2 and parts[1] is type(None)
    return parts[0] if optional else hint


def negative_columns(count: int) -> list[str]:
    """Columns of mined negatives, as ``mine_hard_negatives`` names them."""
    return [f"negative_{number}" for number in range(1, count + 1)]
