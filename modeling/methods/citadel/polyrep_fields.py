"""What the fields of a shipped config may hold: types, ranges and choices, checked before anything is made of them.

Beside ``polyrep_room.py``, and renewed like it.
"""

# mypy: ignore-errors
# Shipped: it speaks to transformers and torch through attributes that these type as Tensor | Module.

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
import reprlib
from types import UnionType
from typing import get_args, get_origin, get_type_hints

import torch
from transformers import AutoConfig, PretrainedConfig

WIDTH = (1, 65_536)
"""Smallest and largest width of a vector, so that no config asks for more memory than any model has."""
LAYERS = (0, 1_000)
WORDS = (1, 2**24)
NORM = (1e-6, 1e15)
_NUMBERS = 2**32
"""Most numbers of one weight: of 262,144 words times a width of 16,384."""

_TEXT, _ITEMS, _DEPTH = 1_000, 2**16, 20
_BACKBONE = dict.fromkeys(("base_model_id", "base_revision", "base_fingerprint"), str | None)
_SWITCHES = ("output_hidden_states", "output_attentions", "return_dict", "use_cache")
_THEIRS = {
    "architectures": list[str] | None,
    "problem_type": str | None,
    "quantization_config": dict | None,
} | dict.fromkeys(_SWITCHES, bool | None)
_THEIRS |= dict.fromkeys(("attn_implementation", "_attn_implementation"), str | dict | None)
_THEIRS |= dict.fromkeys(("experts_implementation", "_experts_implementation"), str | dict | None)

# Of configs that are not ours, by name; the first that fits counts. Shipped models stay well below.
_SIZES = {
    r"hidden_size|d_model|n_embd|num_attention_heads|n_heads?": WIDTH,
    r"vocab_size": WORDS,
    r"num_labels": (0, WIDTH[1]),
    r"(\w+_)?(layers?|depths?|blocks)": (-1, LAYERS[1]),
    r"(max_position_embeddings|n_positions|\w*max_length|\w*_window\w*)": (-1, 2**40),
    r"(\w+_)?(sizes?|dims?|width|channels|heads|labels|buckets|experts|groups|size_mult|multiplier|ratio)|d_\w+": (
        -1,
        2**20,
    ),
}


def checked(**allowed):
    """Hold the arguments of a config's constructor to their annotations and to what is allowed, before it runs.

    An annotation is bool, int, float, str, a list of one of these, or several of them with None. A bool is no number,
    an int is a float too, and NaN and infinity are neither. An argument without annotation is the constructor's to
    check. What transformers keeps in its own fields is checked by transformers, whose errors become a ValueError.

    Args:
        allowed: Argument -> its smallest and largest number, or its choices; of a list those of each item.

    Raises:
        ValueError: In the constructor. It names class, field, value and what to use.
    """

    def decorate(init):
        signature = inspect.signature(init)
        hints = _THEIRS | _BACKBONE | get_type_hints(init)

        @functools.wraps(init)
        def constructor(self, /, *args, **kwargs):
            owner, names = type(self).__name__, _fields(type(self))
            theirs = {field: value for field, value in kwargs.items() if field not in names}
            _check_theirs(owner, type(self), theirs)
            given = signature.bind(self, *args, **kwargs).arguments
            for field, value in (given | given.pop("kwargs", {})).items():
                if field in hints and not _fits(value, hints[field], allowed.get(field)):
                    use = _expected(hints[field], allowed.get(field))
                    raise ValueError(f"{owner}: {field}={shown(value)} does not fit. Use {use}.")
            try:
                init(self, *args, **kwargs)
            except Exception as error:
                if not str(error).startswith(f"{owner}: "):
                    _blame(owner, theirs, error)
                raise

        constructor.arguments = signature.parameters.keys() - {"self"}
        return constructor

    return decorate


def check_weight(owner: str, **sizes: int) -> None:
    """ValueError if one weight of these sizes would hold more numbers than that of any model."""
    if math.prod(sizes.values()) > _NUMBERS:
        product = " x ".join(f"{field}={value}" for field, value in sizes.items())
        raise ValueError(
            f"{owner}: {product} makes a weight of {math.prod(sizes.values()):,} numbers, more than any model has. "
            f"Use sizes whose product is {_NUMBERS:,} or less."
        )


def shown(value) -> str:
    """A value in a message: cut where it is long or deep, or a number of thousands of digits."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python refuses to write it out
        return f"a {type(value).__name__} that is too long to show"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlong = 40


def _fits(value, hint, allowed) -> bool:
    """Whether a value is of a type, and all its numbers or texts are allowed."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if value is None or isinstance(value, bool):
        return type(value) in kinds
    for kind in kinds:
        if (get_origin(kind) or kind) is list and isinstance(value, (list, tuple)):
            item = (get_args(kind) or (str,))[0]
            return len(value) <= _ITEMS and all(_fits(part, item, allowed) for part in value)
    if isinstance(value, str):
        return str in kinds and (value in allowed if allowed else len(value) <= _TEXT and value.isprintable())
    if isinstance(value, dict):
        return dict in kinds
    if not (type(value) is int and (int in kinds or float in kinds) or type(value) is float and float in kinds):
        return False
    return allowed[0] <= value <= allowed[1] if allowed else -math.inf < value < math.inf


def _expected(hint, allowed) -> str:
    """What :func:`_fits` takes, in words."""
    found = []
    for kind in get_args(hint) if isinstance(hint, UnionType) else (hint,):
        if (get_origin(kind) or kind) is list:
            found.append(f"a list, each of {_expected((get_args(kind) or (str,))[0], allowed)}")
        elif kind in (int, float):
            between = f" from {allowed[0]:,} to {allowed[1]:,}" if allowed else ""
            found.append(f"a {'whole ' if kind is int else ''}number{between}")
        elif kind is str:
            found.append(f"one of {', '.join(allowed)}" if allowed else f"a line of up to {_TEXT:,} characters")
        else:
            found.append({bool: "true or false", dict: "an object"}.get(kind, "null"))
    return ", or ".join(found)


def _fields(kind: type) -> set:
    """Names of the arguments of a config class of ours and of those that it extends."""
    ours = [getattr(vars(part).get("__init__"), "arguments", ()) for part in kind.__mro__]
    return _BACKBONE.keys() | {name for names in ours for name in names}


def _check_theirs(owner: str, kind: type, fields: dict) -> None:
    """ValueError for fields that are not ours, and would harm if transformers took them."""
    check_sizes(owner, fields)
    known = {field.name for field in dataclasses.fields(PretrainedConfig)} | {"model_type"}
    for field, value in fields.items():
        there = inspect.getattr_static(kind, field, known)
        if field == "self" or there is not known and field not in known and not getattr(there, "fset", None):
            raise ValueError(f"{owner}: {field}={shown(value)} is no field, but a part of every config. Leave it out.")
        if field == "model_type" and value != kind.model_type:
            raise ValueError(
                f"{owner}: model_type={shown(value)}, but this is the config of a {kind.model_type}. Open it with "
                "AutoConfig, or leave it out."
            )
        if field == "auto_map" and not (isinstance(value, dict) and all(isinstance(k, str) for k in value.values())):
            raise ValueError(
                f"{owner}: auto_map={shown(value)} names no code. Use an object of texts, or leave it out."
            )


def _blame(owner: str, fields: dict, error: Exception) -> None:
    """ValueError that names the field which transformers refuses in its own way, or what it says of several."""
    for field, value in fields.items():
        try:
            PretrainedConfig(**{field: value})
        except Exception:
            why = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{owner}: {field}={shown(value)} is refused by transformers ({type(error).__name__}: {why}). Leave "
                "it out, or save the model again."
            ) from error
    if not isinstance(error, ValueError):
        why = " ".join(str(error).split())[:300]
        raise ValueError(f"{owner}: {', '.join(fields)} are refused by transformers ({why}).") from error


def check_sizes(owner: str, content, path: str = "", depth: int = 0) -> None:
    """ValueError for a size in a config that is not ours, or in one inside it, that no model has; or no end of those.

    Args:
        owner: Whose config.
        content: Its fields, or the value of one.
        path: Where it lies.
        depth: Likewise.
    """
    if depth > _DEPTH:
        raise ValueError(f"{owner}: {path[:100]} holds more than {_DEPTH} values inside each other. Save it again.")
    if isinstance(content, int) and abs(content) >= 2**63:
        raise ValueError(f"{owner}: {path}={shown(content)} does not fit. Use a number of up to 18 digits.")
    for field, value in content.items() if isinstance(content, dict) else ():
        where = f"{path}.{field}" if path else str(field)
        for pattern, (low, high) in _SIZES.items():
            if re.fullmatch(pattern, str(field)):
                for size in value if isinstance(value, (list, tuple)) else (value,):
                    if isinstance(size, (int, float)) and not low <= size <= high:
                        raise ValueError(
                            f"{owner}: {where}={shown(value)} does not fit. Use a number from {low:,} to {high:,}."
                        )
                break
        tuples = path and field == "return_dict" and value is not True  # without the names that are read
        if tuples or field in _SWITCHES and not isinstance(value, (bool, type(None))):
            raise ValueError(f"{owner}: {where}={shown(value)} does not fit. Use true, or leave it out.")
        if field == "chunk_size_feed_forward" and type(value) is not int:
            raise ValueError(f"{owner}: {where}={shown(value)} does not fit. Use 0.")
        if field in ("dtype", "torch_dtype") and not isinstance(value, (dict, torch.dtype, type(None))):
            if not isinstance(value, str) or not isinstance(getattr(torch, value, None), torch.dtype):
                raise ValueError(f"{owner}: {where}={shown(value)} is no type of weights. Use e.g. 'float32'.")
        check_sizes(owner, value, where, depth + 1)
    for value in content if isinstance(content, (list, tuple)) else ():
        check_sizes(owner, value, path, depth + 1)


def part_config(part, owner: str, field: str) -> PretrainedConfig:
    """A config that is not ours, from a dict of its fields, as a folder holds it.

    Raises:
        ValueError: It is none, or of no model that transformers has.
    """
    if isinstance(part, PretrainedConfig):
        return part
    kind = part.get("model_type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind.startswith("polyrep_"):
        found = f"of model_type={shown(kind)}" if isinstance(part, dict) else shown(part)
        raise ValueError(
            f"{owner}: {field} is {found}, no config of an encoder. Use that of a backbone, as an object."
        )
    check_sizes(owner, part, field)
    try:
        config = AutoConfig.for_model(**{name: value for name, value in part.items() if name != "auto_map"})
    except Exception as error:  # each model refuses in its own way
        why = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{owner}: {field} of model_type={shown(kind)} makes no config ({type(error).__name__}: {why}). Take it "
            "from the backbone's folder again."
        ) from error
    width = getattr(config, "hidden_size", None)
    for other in ("vocab_size", "intermediate_size"):
        if isinstance(width, int) and isinstance(size := getattr(config, other, None), int):
            check_weight(owner, **{f"{field}.{other}": size, f"{field}.hidden_size": width})
    return config


def unless_given(config: dict, **values) -> dict:
    """Fields of a config, with these values for those that are left out or None."""
    return config | {name: value for name, value in values.items() if config.get(name) is None}


def fields_of(config: PretrainedConfig | dict, kind: type | None = None) -> dict:
    """What a config says of a head, for that of a model that holds it, or the other way round.

    Args:
        config: Of a head, or of a whole model; or its fields, of which a folder of before may lack some.
        kind: The head's config class; default: that of the config.
    """
    own = (kind or type(config))().to_dict().keys() - PretrainedConfig().to_dict().keys()
    if isinstance(config, dict):
        return {name: config[name] for name in own & config.keys()}
    return {name: getattr(config, name) for name in own}


def config_of(part, owner: str) -> PretrainedConfig:
    """A text encoder's config from a dict of its fields, as a folder holds it; default: BERT's.

    Raises:
        ValueError: It is of no model whose token states have one width.
    """
    config = part_config({"model_type": "bert"} if part is None else part, owner, "encoder_config")
    for field, low in (("hidden_size", 1), ("num_hidden_layers", 0)):
        if type(value := getattr(config, field, None)) is not int or value < low:
            raise ValueError(
                f"{owner}: encoder_config of {config.model_type!r} has {field}={shown(value)}, and its states must "
                "have one width and depth. Use the config of a text encoder."
            )
    return config


def keep(config: PretrainedConfig, given: dict) -> str:
    """Set what a head's config is made of as its fields, and what is known of the backbone that the head was made on.

    That is ``base_model_id`` and ``base_revision``, its commit on the Hub, and ``base_fingerprint``, its
    :func:`fingerprint`; None where they are not recorded.

    Args:
        config: The config.
        given: ``locals()`` of its constructor, the further arguments as ``kwargs``.

    Returns:
        The config's name, for messages.
    """
    base = {name: given["kwargs"].pop(name, None) for name in ("base_model_id", "base_revision", "base_fingerprint")}
    own = {name: value for name, value in given.items() if name not in ("self", "kwargs", "__class__")}
    vars(config).update(own | base)
    return type(config).__name__
