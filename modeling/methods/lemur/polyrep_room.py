"""What all shipped files share: checks of a config, of a backbone and of a score, and the folder of a head.

A model folder holds a copy of this file beside its modeling file, since it must open where polyrep is not installed.
The one to change is ``polyrep/hub/polyrep_room.py``: `make rooms` renews the copies in the folders of the methods, and
a test compares them byte by byte. It defines no config class: transformers would load it twice.
"""

# mypy: ignore-errors
# Shipped: it speaks to transformers and torch through attributes that these type as Tensor | Module.

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import logging
import math
import re
import reprlib
import shutil
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import cached_file

try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Module, Transformer
except ImportError:  # AutoModel works without sentence-transformers
    SentenceTransformer, Module, Transformer = None, nn.Module, nn.Module

logger = logging.getLogger(__name__)

NOT_FINGERPRINTED = ("transformers_version", "_name_or_path", "__version__")

EXPORTS = {"onnx", "openvino"}
"""Folders of what was made of a model for other engines."""

OF_TOKENIZERS = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "do_lower_case",
    "model_max_length",
    "strip_accents",
    "tokenize_chinese_chars",
    "truncation_side",
)
"""What of a ``tokenizer_config.json`` changes tokens."""

ELSEWHERE = (
    "config.json",
    "data_config.json",
    "generation_config.json",
    "sentence_bert_config.json",
    "tokenizer_config.json",
)
"""Configs that are read by themselves, or change no vector."""

SIMILARITIES = {"SentenceTransformer": "cosine", "SparseEncoder": "dot", "MultiVectorEncoder": "maxsim"}
"""Family -> similarity where the folder names none."""


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


WIDTH = (1, 65_536)
"""Smallest and largest width of a vector, so that no config asks for more memory than any model has."""
LAYERS = (0, 1_000)
WORDS = (1, 2**24)
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
    """ValueError that names the field which transformers refuses in its own way; nothing where it takes each."""
    for field, value in fields.items():
        try:
            PretrainedConfig(**{field: value})
        except Exception:
            why = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{owner}: {field}={shown(value)} is refused by transformers ({type(error).__name__}: {why}). Leave "
                "it out, or save the model again."
            ) from error


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
        tuples = path and field == "return_dict" and value is False  # without the names that are read
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


def fields_of(config: PretrainedConfig) -> dict:
    """What a head's config says of the head, for the config of a model that holds it."""
    own = type(config)().to_dict().keys() - PretrainedConfig().to_dict().keys()
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


def new_encoder(config: PretrainedConfig, reads: str = "input_ids") -> PreTrainedModel:
    """An encoder of a config's kind, without the decoder where there is one (T5).

    Args:
        config: Of the encoder.
        reads: What its ``forward`` must take.

    Raises:
        ValueError: The config makes none.
    """
    encoders = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
    try:
        encoder = encoders.from_config(config)
    except Exception as error:  # each model refuses in its own way
        why = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{type(config).__name__}: no encoder can be made of it ({type(error).__name__}: {why}). Take the config "
            "from the backbone's folder again."
        ) from error
    if reads not in inspect.signature(encoder.forward).parameters:
        raise ValueError(
            f"{type(config).__name__}: its {type(encoder).__name__} reads no {reads}. Use the config of another one."
        )
    return encoder


def text_inputs(input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None) -> dict:
    """What an encoder reads beside the tokens: all count by default, and types only where there are some."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return {"attention_mask": mask} | ({} if token_type_ids is None else {"token_type_ids": token_type_ids})


def text_limit(encoder: PreTrainedModel) -> int:
    """Most tokens of a text: the encoder's positions less those of padding (RoBERTa); -1 for no limit."""
    positions = getattr(encoder.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 0:
        return -1
    for module in encoder.modules():
        if isinstance(getattr(module, "position_embeddings", None), nn.Embedding):
            padding = getattr(module, "padding_idx", None)
            positions -= padding + 1 if isinstance(padding, int) else 0
    return positions


def pool_tokens(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """States ``(batch, tokens, dim)`` to a vector each: mean, cls or lasttoken, to the bit as the stock Pooling."""
    if pooling == "mean":
        weights = mask[..., None].to(states.dtype)  # (batch, tokens, 1)
        exact = torch.promote_types(states.dtype, torch.float32)
        total = (states * weights).sum(1, dtype=exact)
        return (total / weights.sum(1, dtype=exact).clamp(min=1e-9)).to(states.dtype)
    # The first or last token that counts: not the first or last column, whichever side texts are padded on.
    ranks = mask if pooling == "cls" else mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return states[torch.arange(states.shape[0], device=states.device), ranks.to(torch.int32).argmax(1)]


def pooling_of(model, owner: str, poolings: tuple, remedy: str, prompts: bool = True) -> tuple[str, bool]:
    """Pooling of a SentenceTransformer and whether it normalises; ValueError if it does more than that.

    Args:
        model: The SentenceTransformer.
        owner: Whose folder is to hold it.
        poolings: Those that it may have.
        remedy: What to do else.
        prompts: Whether it may put words before a text.
    """
    names = [type(module).__name__ for module in model]
    pooled = names[:2] == ["Transformer", "Pooling"]
    pooling = model[1].pooling_mode if pooled else None
    plain = pooled and model[1].include_prompt and not getattr(model[0], "do_lower_case", False)
    plain = plain and (prompts or not any((model.prompts or {}).values()))
    if not plain or pooling not in poolings or names[2:] not in ([], ["Normalize"]):
        raise ValueError(
            f"{owner}: the backbone is {' + '.join(names)} with pooling {pooling!r} and prompts {model.prompts}, and "
            f"one folder of this kind holds a transformer and one pooling, {' or '.join(poolings)}"
            f"{'' if prompts else ', and no prompt'}. {remedy}"
        )
    return pooling, names[2:] == ["Normalize"]


def check_score(model, owner: str, because: str, cut: str) -> None:
    """Let a model score by the inner product where nothing is said; ValueError for what would rank otherwise.

    Args:
        model: A sentence-transformers model.
        owner: Who checks.
        because: Why another similarity is wrong.
        cut: What ``truncate_dim`` would do, and the remedy.
    """
    if model._similarity_fn_name is None:
        model.similarity_fn_name = "dot"
    if str(model.similarity_fn_name) != "dot":
        raise ValueError(
            f"{owner}: similarity_fn_name={model.similarity_fn_name!r}, but {because}. Use similarity_fn_name='dot'."
        )
    if model.truncate_dim is not None:
        raise ValueError(f"{owner}: truncate_dim={model.truncate_dim} would {cut}")


def without(content, keys: tuple):
    """A copy of parsed JSON without some keys, at every depth."""
    if isinstance(content, dict):
        return {k: without(v, keys) for k, v in content.items() if k not in keys}
    return [without(v, keys) for v in content] if isinstance(content, list) else content


def weight_files(folder: Path) -> list[Path]:
    """Every weight file of a model folder, those of its modules and of their parts included, but no exports."""
    files = sorted(folder.rglob("*.safetensors"))
    return [file for file in files if not EXPORTS & set(file.relative_to(folder).parts)]


def read_settings(file: Path) -> dict:
    """The object that a JSON file holds; ValueError if it holds none."""
    try:
        content = json.loads(file.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({error}). Fetch or save the model again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds {shown(content)}, not an object. Fetch or save the model again.")
    return content


def module_configs(folder: Path) -> list[tuple[Path, dict]]:
    """Every module's config of a model folder, parsed."""
    names = ("config.json", "sentence_bert_config.json")
    files = [file for name in names for file in sorted(folder.rglob(name))]
    return [(file, read_settings(file)) for file in files]


def tokenizer_files(folder: Path) -> list[tuple[Path, object]]:
    """What tells how texts become tokens: the fast tokenizer where there is one, else the vocabularies as they are."""
    found = []
    for file in sorted(folder.rglob("tokenizer.json")):
        # transformers writes down what it truncated and padded to last.
        found.append((file, without(read_settings(file), ("truncation", "padding"))))
    fast = {file.parent for file, _ in found}
    names = ("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
    for file in sorted(file for name in names for file in folder.rglob(name) if file.parent not in fast):
        found.append((file, hashlib.sha256(file.read_bytes()).hexdigest()))
    for file in sorted(folder.rglob("tokenizer_config.json")):
        fields = read_settings(file)
        found.append((file, {name: fields[name] for name in OF_TOKENIZERS if fields.get(name) not in (None, "right")}))
    return found


def settings_of(folder: Path) -> list[tuple[Path, object]]:
    """What a folder says of its modules' order, prompts, similarity, dimensions kept, images and chats, cleaned."""
    found = []
    if (file := folder / "modules.json").is_file():
        parts = json.loads(file.read_text(encoding="utf-8"))
        # A class has had several places, and lies in the folder or in the package.
        kinds = [(part["type"].rpartition(".")[2], part.get("path"), part.get("kwargs") or []) for part in parts]
        found.append((file, kinds))
    if (file := folder / "config_sentence_transformers.json").is_file():
        fields = without(read_settings(file), (*NOT_FINGERPRINTED, "requirements"))
        fields["prompts"] = {task: text for task, text in (fields.get("prompts") or {}).items() if text}
        family = fields.setdefault("model_type", "SentenceTransformer")
        fields["similarity_fn_name"] = fields.get("similarity_fn_name") or SIMILARITIES.get(family)
        found.append((file, {name: value for name, value in fields.items() if value not in (None, {}, "")}))
    for file in sorted([*folder.rglob("*config.json"), *folder.rglob("artifact.metadata")]):
        if file.name not in ELSEWHERE and not EXPORTS & set(file.relative_to(folder).parts):
            found.append((file, without(read_settings(file), NOT_FINGERPRINTED)))
    for file in sorted(folder.rglob("*.jinja")):
        found.append((file, hashlib.sha256(file.read_bytes()).hexdigest()))
    return found


def fingerprint(folder: Path, version: int = 2) -> str:
    """SHA-256 over all of a model folder that changes a vector.

    That is weights, configs of modules and their order, prompts, similarity, ``truncate_dim``, tokenizer and image
    processor. Card and code do not count, nor do version stamps and the path a model was loaded from, so a copy saved
    again has the same value.

    Args:
        folder: The model.
        version: 1 is what older heads, indexes and results hold: over weights and configs of modules alone.

    Returns:
        Hex digits; from version 2 on with the version before them, as in ``2-5f1c...``.
    """
    digest = hashlib.sha256()
    for file in weight_files(folder):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file.relative_to(folder).as_posix()}:{content}\n".encode())
    said = [(file, without(fields, NOT_FINGERPRINTED)) for file, fields in module_configs(folder)]
    if version > 1:
        said = [part for part in said if not EXPORTS & set(part[0].relative_to(folder).parts)]
        said += settings_of(folder) + tokenizer_files(folder)
    for file, fields in said:
        content = json.dumps(fields, sort_keys=True)
        digest.update(f"{file.relative_to(folder).as_posix()}:{content}\n".encode())
    return digest.hexdigest() if version == 1 else f"{version}-{digest.hexdigest()}"


def fingerprints(folder: Path) -> list[str]:
    """Fingerprints of a folder of all versions, the latest first, to compare with what was written down once."""
    return [fingerprint(folder, version) for version in (2, 1)]


def fingerprints_of(module) -> list[str]:
    """Fingerprints of the folders that a module may have come from; none if that is not to be known.

    Of a repository in the cache they are those of all its versions, unless the model tells its commit, as it does in
    transformers 5.17 and no longer in 5.23. A folder that holds a head already has none: it was put together with its
    backbone on purpose.
    """
    source = getattr(getattr(module, "model", None), "name_or_path", None)
    if not source:
        return []
    folders = [Path(source)]
    if not folders[0].is_dir():
        commit = getattr(module.model.config, "_commit_hash", None)
        try:
            folder = Path(cached_file(source, "config.json", local_files_only=True, revision=commit)).parent
        except OSError:
            return []
        folders = [folder] if commit else sorted(path for path in folder.parent.iterdir() if path.is_dir())
    for folder in folders:
        parts = [fields for file, fields in module_configs(folder) if file.parent != folder]
        if any(str(fields.get("model_type")).startswith("polyrep_") for fields in parts):
            return []
    return [found for folder in folders for found in fingerprints(folder)]


class HeadModule:
    """A head as a sentence-transformers module, beside the class of theirs that it extends: its folder, its backbone.

    Args:
        model: The head; default: a new one of these fields of its config.
        config: See there.

    Attributes:
        head_class: The PreTrainedModel; its ``base_fingerprint`` says what it was trained on.
        reads: Field of its config: the width of the vectors that it reads.
        gives: Likewise: of those that it makes.
        changeable: Fields that a head may be opened with other values of.
        made: How a head comes about, in messages.
    """

    head_class = None
    reads, gives = "input_dim", "projection_dim"
    changeable = {"base_fingerprint"}
    made = "trained"

    def __init__(self, model: PreTrainedModel | None = None, **config):
        super().__init__()
        self.model = self.head_class(self.head_class.config_class(**config)) if model is None else model

    def on_model_ready(self, model):
        """Check the backbone, as soon as there is one."""
        self.check_backbone(model)

    def check_backbone(self, model) -> None:
        """Refuse a backbone with vectors of another width, and warn of other weights than the head was trained on.

        A pipeline does this by itself when it is put together. For pooling in single calls, call it once.

        Args:
            model: A sentence-transformers model, with this module in it or without.
        """
        modules, config = list(model), self.model.config
        before = modules[: modules.index(self)] if self in modules else modules
        widths = [module.get_embedding_dimension() for module in before if hasattr(module, "get_embedding_dimension")]
        width, expected = next((w for w in reversed(widths) if w), None), getattr(config, self.reads)
        if width is not None and width != expected:
            raise ValueError(
                f"{type(self).__name__}: the backbone's vectors have width {width}, but the head was made for "
                f"{self.reads}={expected}. Use the backbone it was {self.made} on "
                f"({config.base_model_id or 'not recorded'}), or a head made for this one."
            )
        if before and config.base_fingerprint:
            found = fingerprints_of(before[0])
            if found and config.base_fingerprint not in found:
                self.other_backbone(before[0].model.name_or_path, found[0])

    def other_backbone(self, name: str, found: str) -> None:
        """Say that a backbone, by its name and fingerprint, is not the one that the head was trained on."""
        config = self.model.config
        logger.warning(
            f"{type(self).__name__}: the head was trained on {config.base_model_id} (fingerprint "
            f"{config.base_fingerprint[:16]}), this backbone is {name} (fingerprint {found[:16]}). Same shape, other "
            "vectors: expect worse results."
        )

    def check_last(self, model, loss: str) -> None:
        """ValueError if a module stands behind this one, with what would be lost."""
        if (last := list(model)[-1]) is not self:
            raise ValueError(
                f"{type(self).__name__}: {type(last).__name__} stands behind it and would change the vectors, so that "
                f"{loss}. Put this module last."
            )

    def get_embedding_dimension(self):
        """Width of the vectors."""
        return getattr(self.model.config, self.gives)

    def save(self, output_path, *args, **kwargs):
        """Write the head as a folder of its own, and the code to the folder above, where it is looked for."""
        self.model.save_pretrained(output_path)
        for file in Path(output_path).glob("*.py"):
            shutil.copy(file, Path(output_path).parent)

    @classmethod
    def load(cls, model_name_or_path, subfolder="", **kwargs):
        """Open a head's folder or repository, or the module folder of a saved pipeline.

        Args:
            model_name_or_path: Folder or Hub id.
            subfolder: Of the head in it.
            kwargs: ``revision, token, local_files_only, cache_folder``; and fields in ``changeable`` to open the head
                with other values of, such as ``base_fingerprint=None`` to let any backbone pass.

        Raises:
            ValueError: It holds something else, or a field is not to be changed.
        """
        kept = {k: v for k, v in kwargs.items() if k in ("revision", "token", "local_files_only")}
        kept["cache_dir"] = kwargs.get("cache_folder")
        content, _ = PretrainedConfig.get_config_dict(model_name_or_path, subfolder=subfolder, **kept)
        expected = cls.head_class.config_class
        if content.get("model_type") != expected.model_type:
            raise ValueError(
                f"{cls.__name__}: {model_name_or_path} holds a model of type {content.get('model_type')!r}, not a "
                f"{expected.model_type} head. Name the head's own folder; of a saved pipeline that is its last "
                f"module: subfolder='4_{cls.__name__}', or whichever number it has in modules.json."
            )
        model = cls.head_class.from_pretrained(model_name_or_path, subfolder=subfolder, **kept)
        fields = model.config.to_dict()
        for name in kwargs.keys() - fields.keys():
            if near := get_close_matches(name, cls.changeable - {name}, n=1, cutoff=0.65):
                raise ValueError(f"{cls.__name__}: {name}={kwargs[name]!r} is no setting. Did you mean {near[0]!r}?")
        changes = {k: v for k, v in kwargs.items() if k in fields and fields[k] != v and k not in kept}
        if changes:
            cls.check_changes(fields, changes)
            model.config = expected(**(fields | changes))
        return cls(model)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """:meth:`load`, by the name that transformers has for it."""
        return cls.load(*args, **kwargs)

    @classmethod
    def check_changes(cls, fields: dict, changes: dict, fixed: set = frozenset()) -> None:
        """ValueError for a change to a field that the weights fit no other value of, or that is ``fixed`` here."""
        allowed = cls.changeable - fixed
        if name := next(iter(sorted(changes.keys() - allowed)), None):
            raise ValueError(
                f"{cls.__name__}: {name}={changes[name]!r}, but the head was {cls.made} with {name}={fields[name]!r}, "
                f"and its weights fit nothing else. Change only {', '.join(sorted(allowed))}, or get another head."
            )


class WholeWeights:
    """A model opens with all its weights or not at all; beside PreTrainedModel, and before it.

    transformers only logs which weights a file lacks, and makes random ones.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """As transformers has it, of safetensors unless ``use_safetensors=False`` says so.

        Raises:
            ValueError: A weight is missing, of another shape or type than the config asks for, or not finite.
        """
        kwargs.setdefault("use_safetensors", True)  # a pickle can run code when read
        source, other_sizes = pretrained_model_name_or_path, kwargs.pop("ignore_mismatched_sizes", False)
        if source is not None and not other_sizes:
            cls._check_sizes(source, **kwargs)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, found = super().from_pretrained(source, *args, **kwargs)
        owner = f"{cls.__name__}: {source or 'the state dict'}"
        if missing := sorted(found["missing_keys"]):
            raise ValueError(
                f"{owner} lacks {', '.join(missing[:3])} ({len(missing)} in all), which would be random numbers. "
                "Fetch or save the model again."
            )
        if found["mismatched_keys"] and not other_sizes:
            _refuse_sizes(owner, *min(found["mismatched_keys"]))
        if name := first_not_finite(model):
            raise ValueError(
                f"{owner}: {name} has values that are not finite, so no vector is. Fetch or save the model again."
            )
        return (model, found) if output_loading_info else model

    @classmethod
    def _check_sizes(cls, source, config=None, subfolder="", **kwargs) -> None:
        """Compare a file with the config before a model of these sizes takes memory; shards, as they are read."""
        places = ("cache_dir", "local_files_only", "proxies", "revision", "token")
        where = {name: kwargs[name] for name in places if name in kwargs} | {"subfolder": subfolder}
        try:
            header = _header(cached_file(source, "model.safetensors", **where))
        except (OSError, ValueError):  # in several files, or damaged, which safetensors says
            return
        if not isinstance(config, PretrainedConfig):
            of = {"return_unused_kwargs": True, **where, **kwargs}
            config = cls.config_class.from_pretrained(source if config is None else config, **of)[0]
        with torch.device("meta"):
            expected = cls(config).state_dict()
        for name, tensor in expected.items():
            if name not in header:
                continue
            dtype, shape = header[name]["dtype"], tuple(header[name]["shape"])
            owner = f"{cls.__name__}: {source}"
            if shape != tensor.shape:
                _refuse_sizes(owner, name, shape, tensor.shape)
            if (dtype in ("F64", "F32", "F16", "BF16")) != tensor.is_floating_point():
                raise ValueError(
                    f"{owner} stores {name} as {dtype}, and the model has {str(tensor.dtype).removeprefix('torch.')} "
                    "there. Save it as such."
                )


def first_not_finite(model: nn.Module) -> str | None:
    """Name of the first weight with a value that is not finite."""
    for name, tensor in model.state_dict().items():
        if tensor.is_meta or tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            continue
        # A sum is a tenth of the work, and finite only if all values are; or it overflows.
        if not tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)).isfinite():
            if not tensor.isfinite().all():
                return name
    return None


def _refuse_sizes(owner: str, name: str, found: tuple, expected: tuple) -> None:
    raise ValueError(
        f"{owner} has {name} of {list(found)}, and the config asks for {list(expected)}, so they are of different "
        "models. Fetch or save the model again."
    )


def _header(file) -> dict:
    """What a file of safetensors says of its tensors, by name."""
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return json.loads(stream.read(length)) if length <= min(100_000_000, Path(file).stat().st_size) else {}
