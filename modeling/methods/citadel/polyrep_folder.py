"""What a model's folder holds and what tells it from others: its fingerprint, and weights that are all there.

Beside ``polyrep_room.py``, and renewed like it.
"""

# mypy: ignore-errors
# Shipped: it speaks to transformers and torch through attributes that these type as Tensor | Module.

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.utils import cached_file

from .polyrep_fields import shown

NOT_FINGERPRINTED = ("transformers_version", "_name_or_path", "__version__")

ADDED = {"equal_norms": False, "max_norm": None, "trunk": []}
"""Fields that configs of before lack -> the value that says the same, so that a model of before stays itself."""

EXPORTS = {"onnx", "openvino"}
"""Folders of what was made of a model for other engines."""

OF_TOKENIZERS = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "chat_template",
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

BESIDE_A_HEAD = [r"^(\w*encoder|trunk|var_embedding)(\.|$)"]
"""Weights of a whole model, which a head leaves when it is opened from there."""

SIMILARITIES = {"SentenceTransformer": "cosine", "SparseEncoder": "dot", "MultiVectorEncoder": "maxsim"}
"""Family -> similarity where the folder names none."""


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
    said = []
    for file, fields in module_configs(folder):
        own = {name: value for name, value in fields.items() if name not in ADDED or value != ADDED[name]}
        said.append((file, without(own, NOT_FINGERPRINTED)))
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
        if source is not None:
            cls._check_files(source, not other_sizes, **kwargs)
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
    def _check_files(cls, source, compare, config=None, subfolder="", **kwargs) -> None:
        """Compare a file with the config before a model of these sizes takes memory; shards, as they are read.

        An index of shards leads to no other place, whether or not sizes are to be compared.
        """
        places = ("cache_dir", "local_files_only", "proxies", "revision", "token")
        where = {name: kwargs[name] for name in places if name in kwargs} | {"subfolder": subfolder}
        try:
            header = _header(cached_file(source, "model.safetensors", **where))
        except (OSError, ValueError):  # in several files, or damaged, which safetensors says
            _refuse_leading_elsewhere(f"{cls.__name__}: {source}", source, where)
            return
        if not compare:
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


def _refuse_leading_elsewhere(owner: str, source, where: dict) -> None:
    """ValueError for an index of weights that names anything but files of safetensors beside it."""
    try:
        index = cached_file(source, "model.safetensors.index.json", **where)
    except OSError:  # there is none
        return
    shards = read_settings(Path(index)).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{owner}: its index has no weight_map. Fetch or save the model again.")
    for name in shards.values():
        if not isinstance(name, str) or not name.endswith(".safetensors") or {"/", "\\", "\0", ":"} & set(name):
            raise ValueError(f"{owner}: its index names {shown(name)}, no safetensors beside it. Get a clean copy.")


def whole_encoder(encoder: nn.Module, owner: str) -> nn.Module:
    """An encoder as it was opened from a folder or the Hub, which is opened again to know what it lacks there.

    transformers makes random numbers of weights that no file has. Those of a pooler may lack: they are not read.

    Raises:
        ValueError: A weight is in no file, or not finite.
    """
    source = getattr(encoder, "name_or_path", None)
    if not source:  # put together in memory, or no encoder of transformers, which others refuse
        return encoder
    options = {"config": encoder.config, "output_loading_info": True, "device_map": "meta"}  # takes no memory
    found = {"missing_keys": ()}
    with contextlib.suppress(OSError):  # it lies in a folder inside that one
        there, _ = PretrainedConfig.get_config_dict(source)
        if not str(there.get("model_type")).startswith("polyrep_"):  # which has been saved over it since
            _, found = type(encoder).from_pretrained(source, **options)
    if missing := sorted(name for name in found["missing_keys"] if "pooler" not in name.split(".")):
        raise ValueError(
            f"{owner}: {source} lacks {', '.join(missing[:3])} ({len(missing)} in all), which would be random "
            "numbers. Fetch or save the backbone again."
        )
    if name := first_not_finite(encoder):
        raise ValueError(f"{owner}: {source}: {name} has values that are not finite. Fetch or save it again.")
    return encoder


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
