"""Weight files of strangers: read within bounds, and compared with the model that is to hold them.

``check_weight_files`` looks at the files alone, before any code runs. ``check_sizes`` compares them with the model
that the configs describe, before that takes memory, and ``check_loaded`` the opened model with the files. What a file
says of itself is taken from its header; transformers and sentence-transformers read the weights.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ..errors import InputError
from ..files import read_json
from .fingerprint import weight_files
from .polyrep_folder import first_not_finite
from .polyrep_room import new_encoder

PREFIX = "polyrep_"
"""What every ``model_type`` of ours starts with."""

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

MOST_HEADER = 100_000_000
"""Bytes of a header, or of an index; safetensors has the same bound."""

MOST_TENSORS = 100_000
"""Of a file. The largest language models have some ten thousand, in many files."""

FLOATS = ("F64", "F32", "F16", "BF16")
"""What weights may be stored as, in a model that is not quantized."""


class Stored(NamedTuple):
    """What a header says of a tensor.

    Attributes:
        file: Where it lies.
        dtype: In the words of safetensors, e.g. ``F32``.
        shape: Its sizes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


def module_folders(folder: Path) -> list[Path]:
    """The folders that a model folder's modules lie in, the parts of a Router's among them; without any, itself.

    Raises:
        InputError: One of them leaves the folder.
    """
    listing = folder / "modules.json"
    if not listing.is_file():
        return [folder]
    paths = [part["path"] for part in read_json(listing, list, name=str, path=str, type=str)]
    if any("\0" in path for path in paths):
        raise InputError(f"{listing}: a module's path is none. Fetch or save the model again.")
    parts = [(listing, folder / path) for path in paths]
    for file, part in parts:  # grows while it is read
        try:
            outside = folder.resolve() not in (part.resolve(), *part.resolve().parents)
        except (OSError, RuntimeError) as error:  # a name that is too long, a link to itself
            raise InputError(f"{file}: module path {str(part)[:200]} cannot be read ({error}). Refused.") from None
        if outside:
            raise InputError(f"{file}: module path {part} leaves the folder. Refused; get a clean copy.")
        if len(parts) > 1000:
            raise InputError(f"{listing}: more than 1,000 modules. Refused; get a clean copy.")
        parts += [(file, part / name) for name in router_of(part).get("types", {}) if "\0" not in name]
    return list(dict.fromkeys(part for _, part in parts))


def router_of(part: Path) -> dict[str, Any]:
    """What a Router's folder says of its routes, that of an Asym in ``config.json``; nothing for any other module."""
    for name in ("router_config.json", "config.json"):
        content = read_json(part / name)
        if all(isinstance(content.get(field), dict) for field in ("types", "structure")):
            return content
    return {}


def check_weight_files(folder: Path) -> None:
    """Refuse weight files that are damaged, that are none, or that lead elsewhere; and pickles in their place.

    Nothing but headers is read, and of a pickle nothing.

    Raises:
        InputError: The file, what is wrong with it, and the remedy.
    """
    parts = module_folders(folder)
    for file in weight_files(folder):
        read_header(file)
    for part in parts:
        named = _named_weights(part)
        for config in part.glob("config.*.json"):  # which transformers reads where config.json names it
            if "transformers_weights" in read_json(config):
                raise InputError(f"{config}: names weights, which config.json alone may. Refused; get a clean copy.")
        for index in part.glob("*.safetensors.index.json"):
            shards = _shards(index)
            if index.name == named or index.name == INDEX and named is None and not (part / WEIGHTS).exists():
                _check_shards(index, shards)
        pickles = [name for name in ("pytorch_model.bin", "pytorch_model.bin.index.json") if (part / name).exists()]
        if pickles and not (part / WEIGHTS).exists() and not (part / INDEX).exists():
            raise InputError(
                f"{part / pickles[0]}: pickled weights only, which can run code when read, and no {WEIGHTS} beside "
                "them. Refused; convert them to safetensors first."
            )


def read_header(file: Path) -> dict[str, Stored]:
    """What a file of safetensors holds, by name; its weights are not read.

    Raises:
        InputError: It is no regular file, damaged, or too large to be believed.
    """
    size = _size(file)
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise InputError(
                    f"{file}: damaged or truncated ({size:,} bytes, and a header of {length:,}). Delete it and fetch "
                    "it again."
                )
            if length > MOST_HEADER:
                raise InputError(f"{file}: a header of {length:,} bytes; the most is {MOST_HEADER:,}. Refused.")
            header = stream.read(length)
        if (count := header.count(b'"data_offsets"')) > MOST_TENSORS:
            raise InputError(f"{file}: {count:,} tensors; the most is {MOST_TENSORS:,}. Refused: this is no model.")
        with safe_open(file, framework="pt"):  # which checks types, shapes and offsets against the file's length
            pass
        pairs = json.loads(header, object_pairs_hook=_no_doubles)
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: damaged or truncated ({error}). Delete it and fetch it again.") from None
    pairs.pop("__metadata__", None)
    return {name: Stored(file, entry["dtype"], tuple(entry["shape"])) for name, entry in pairs.items()}


def stored_weights(part: Path) -> dict[str, Stored]:
    """What the files hold that transformers and sentence-transformers read for one module; nothing without files.

    Raises:
        InputError: See :func:`check_weight_files`.
    """
    name = _named_weights(part) or (WEIGHTS if (part / WEIGHTS).exists() else INDEX)
    if not (part / name).exists():
        return {}
    if not name.endswith(".index.json"):
        return read_header(part / name)
    return _check_shards(part / name, _shards(part / name))


def check_sizes(folder: Path, *, turned: bool = False, whole: bool = False) -> None:
    """Refuse weights of other sizes or types than the configs ask for, before a model of these sizes takes memory.

    Models of ours compare by themselves; those with code of others are not known before it runs.

    Args:
        folder: The model's.
        turned: Refuse also weights of as many values in another shape, some of which transformers turns as it reads.
        whole: Refuse also weights that no file has: for an encoder that something else than ``load`` opens.

    Raises:
        InputError: The tensor, both sizes, and the remedy.
    """
    for part in module_folders(folder):
        fields = read_json(part / "config.json")
        if not fields.get("model_type") or "quantization_config" in fields:
            continue
        if fields["model_type"].startswith(PREFIX):
            continue
        stored = stored_weights(part)
        layers = fields.get("num_hidden_layers")
        if stored and isinstance(layers, int) and layers > max(len(stored), 1000):
            raise InputError(
                f"{part / 'config.json'}: num_hidden_layers={layers}, but the weights are {len(stored)} tensors, so "
                "they are of another model. Fetch or save the model again."
            )
        model = _described(part) if stored else None
        if model is not None:
            for name, found, tensor in _pairs(model, stored):
                _refuse_other(name, found, tensor, turned)
            if whole:
                _refuse_missing(part, model, stored, "")


def check_loaded(folder: Path, model: nn.Module, reads: str = "") -> None:
    """Refuse an opened model with weights that no file has, which are random numbers, or that are not finite.

    Args:
        folder: Where it was opened from.
        model: A sentence-transformers model, or a PreTrainedModel.
        reads: What is read of a PreTrainedModel's output.

    Raises:
        InputError: The first weights, and the remedy.
    """
    listed = (folder / "modules.json").is_file()
    for part, module in _modules(folder, model):
        inner = next((m for m in module.modules() if isinstance(m, PreTrainedModel)), None)
        kind = type(module)
        stock = kind.__module__.startswith(("sentence_transformers.", "transformers.")) or kind.__name__ == "Backbone"
        ours = isinstance(inner, PreTrainedModel) and (inner.config.model_type or "").startswith(PREFIX)
        stored = stored_weights(part)
        if inner is not None and (stock or ours):
            _refuse_missing(part, inner, stored, str(getattr(module, "modality_config", reads)))
        elif inner is None and not listed and (lost := sorted(set(module.state_dict()) - set(stored))):
            raise InputError(
                f"{folder}: names no modules, and a {type(module).__name__} of its family has weights, {lost[0]} for "
                "one, that no file has, so they would be random. Fetch or save the model again."
            )
        if name := first_not_finite(module):
            owner = next((found.file for key, found in stored.items() if name.endswith(key)), part)
            raise InputError(
                f"{owner}: {name} has values that are not finite, so no vector is. Fetch or save the model again."
            )
        if inner is None and stock:
            for name, parameter in module.named_parameters():
                if parameter.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
                    raise InputError(
                        f"{part}: {name} is stored as {str(parameter.dtype).removeprefix('torch.')}, which the module "
                        "does not compute with. Save it as float32."
                    )
        words, rows = _rows(module)
        if words > rows:
            raise InputError(
                f"{part}: the tokenizer has {words:,} tokens and the weights {rows:,} rows, so some texts could not "
                "be encoded. They are of different models; fetch or save the model again."
            )


def projection(folder: Path) -> torch.Tensor:
    """The map ``(dim, hidden)`` of an original ColBERT checkpoint, whichever of its files has it.

    Raises:
        InputError: None has, or it is of another model.
    """
    found = stored_weights(folder).get("linear.weight")
    if found is None:
        raise InputError(
            f"{folder}: a ColBERT checkpoint without linear.weight, the map from states to token vectors, so they "
            "would be random. Fetch or save the model again."
        )
    width = read_json(folder / "config.json").get("hidden_size")
    if len(found.shape) != 2 or found.shape[1] != width or found.dtype not in FLOATS:
        raise InputError(
            f"{found.file}: linear.weight is {list(found.shape)} of {found.dtype}, and cannot map states of width "
            f"{width} to token vectors. Fetch or save the model again."
        )
    with safe_open(found.file, framework="pt") as weights:
        return weights.get_tensor("linear.weight")


def _size(file: Path) -> int:
    """Bytes of a regular file; others may never end, or never begin."""
    try:
        found = file.stat()
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}). Fetch or save the model again.") from None
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{file}: is no regular file, so it holds no weights. Fetch or save the model again.")
    return found.st_size


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name occurs twice in its header")
    return content


def _named_weights(part: Path) -> str | None:
    """The file that a config names for the weights in place of the usual one."""
    fields = read_json(part / "config.json")
    name = fields.get("transformers_weights")
    if name is None:
        return None
    suffixes = (".safetensors", ".safetensors.index.json")
    if not isinstance(name, str) or not _plain(name) or not name.endswith(suffixes):
        raise InputError(
            f"{part / 'config.json'}: transformers_weights={name!r} names no safetensors in this folder. Refused; "
            "get a clean copy."
        )
    if not (part / name).exists():
        raise InputError(f"{part / name}: is missing, and config.json names it for the weights. Fetch it again.")
    return name


def _plain(name: str) -> bool:
    """Whether a name is one of a file in the same folder, on any system."""
    return bool(name) and PurePosixPath(name).name == name and not {"/", "\\", "\0", ":"} & set(name)


def _shards(index: Path) -> dict[str, str]:
    """Name of a weight -> name of the file beside an index that is to hold it."""
    if _size(index) > MOST_HEADER:
        raise InputError(f"{index}: {_size(index):,} bytes; the most is {MOST_HEADER:,}. Refused.")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"{index}: no weight_map from weights to files. Fetch or save the model again.")
    for name in dict.fromkeys(map(str, shards.values())):
        if not _plain(name) or not name.endswith(".safetensors"):
            raise InputError(f"{index}: {name!r} is no safetensors file of this folder. Refused; get a clean copy.")
    return shards


def _check_shards(index: Path, shards: dict[str, str]) -> dict[str, Stored]:
    """What the files of an index hold; InputError if one is missing, or lacks what the index promises."""
    stored: dict[str, Stored] = {}
    for name in dict.fromkeys(shards.values()):
        if not (index.parent / name).exists():
            raise InputError(f"{index.parent / name}: is missing, and {index.name} names it. Fetch the model again.")
        stored |= read_header(index.parent / name)
    if lacking := sorted(name for name, file in shards.items() if stored.get(name, (None,))[0] != index.parent / file):
        raise InputError(
            f"{index}: {shards[lacking[0]]} lacks {', '.join(lacking[:3])} ({len(lacking)} in all). Fetch or save the "
            "model again."
        )
    return stored


def _described(part: Path) -> PreTrainedModel | None:
    """The encoder of a config without memory; None for what only the library itself can say what is wrong with."""
    try:
        config = AutoConfig.from_pretrained(part, trust_remote_code=False)  # else it would ask whoever sits there
        with torch.device("meta"):
            return new_encoder(config)
    except Exception:  # whatever a config can raise, opening it does again
        return None


def _pairs(model: PreTrainedModel, stored: dict[str, Stored]) -> Iterator[tuple[str, Stored | None, torch.Tensor]]:
    """Each weight of a model with what is stored for it, under its own name, or as transformers translates names.

    That is with the prefix of a larger model around this one, or without that of the model inside this one.
    """
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    for name, tensor in model.state_dict().items():
        names = (name, prefix + name, name.removeprefix(prefix))
        yield name, next((stored[key] for key in names if key in stored), None), tensor


def _refuse_other(name: str, found: Stored | None, tensor: torch.Tensor, turned: bool) -> None:
    """InputError for a stored tensor that a model's cannot be."""
    if found is None:
        return
    if math.prod(found.shape) != tensor.numel() or turned and found.shape != tensor.shape:
        raise InputError(
            f"{found.file}: {name} is {list(found.shape)}, and the config asks for {list(tensor.shape)}, so they are "
            "of different models. Fetch or save the model again."
        )
    if (found.dtype in FLOATS) != tensor.is_floating_point():
        kind = "numbers with a fraction" if tensor.is_floating_point() else "whole numbers"
        raise InputError(
            f"{found.file}: {name} is stored as {found.dtype}, and the model computes with {kind}. Save it as such, "
            "or with the config of its quantization."
        )


def _modules(folder: Path, model: nn.Module) -> Iterator[tuple[Path, nn.Module]]:
    """The modules of a model, each with the folder it comes from; a Router's one by one."""
    listing: list[dict[str, Any]] = read_json(folder / "modules.json", list)
    if isinstance(model, PreTrainedModel):
        yield folder, model
    elif not listing:
        yield from ((folder, module) for module in model.children())
    for entry, module in zip(listing, model.children(), strict=False):
        part = folder / entry["path"]
        if not isinstance(module, Router):
            yield part, module
            continue
        for route, names in router_of(part)["structure"].items():
            inside: Any = module.sub_modules[route]
            for name, inner in zip(names, inside, strict=False):
                yield part / name, inner


def _refuse_missing(part: Path, model: PreTrainedModel, stored: dict[str, Stored], reads: str) -> None:
    """InputError for weights that no file has. What names do not settle, transformers does, by opening it again."""
    state = model.state_dict()
    # Of vectors that are not read, so that files need not have it; what stands on an encoder reads them.
    pooler = "pooler_output" not in reads and model.base_model is model
    there = {t.data_ptr() for name, found, t in _pairs(model, stored) if found is not None and not t.is_meta}
    missing = {
        name
        for name, found, tensor in _pairs(model, stored)
        if found is None and tensor.data_ptr() not in there and not (pooler and "pooler" in name.split("."))
    }
    names_more = type(model).__module__.startswith("transformers.") or hasattr(model, "_check_files")
    if missing and stored and names_more:
        opened: Any = type(model).from_pretrained(
            part, config=model.config, use_safetensors=True, output_loading_info=True
        )
        missing &= set(opened[1]["missing_keys"])
    if missing:
        first = [name for name in state if name in missing]
        raise InputError(
            f"{part}: the weights lack {', '.join(first[:3])} ({len(first)} in all), which would be random numbers. "
            "Fetch or save the model again."
        )


def _rows(module: nn.Module) -> tuple[int, int]:
    """Tokens of a tokenizer and rows of its embeddings, of a module that looks vectors up; else nothing."""
    if not isinstance(module, StaticEmbedding):
        return 0, 0
    return max(module.tokenizer.get_vocab().values(), default=-1) + 1, module.num_embeddings
