"""What all shipped files share: checks of a config, of a backbone and of a score, and the folder of a head.

A model folder holds a copy of this file beside its modeling file, since it must open where polyrep is not installed.
The one to change is ``polyrep/hub/polyrep_room.py``: `make rooms` renews the copies in the folders of the methods, and
a test compares them byte by byte. It defines no config class: transformers would load it twice.
"""

# mypy: ignore-errors
# Shipped: it speaks to transformers and torch through attributes that these type as Tensor | Module.

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from difflib import get_close_matches
from pathlib import Path

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


def check_counts(owner: str, low: int = 1, **values) -> None:
    """ValueError that names the first value that is no whole number from ``low`` on."""
    for field, value in values.items():
        if type(value) is not int or value < low:
            raise ValueError(f"{owner}: {field}={value!r} is no count. Use a whole number from {low} on.")


def check_choices(owner: str, choices: dict[str, tuple], **values) -> None:
    """ValueError that names the first value that is none of its field's choices."""
    for field, value in values.items():
        if value not in choices[field]:
            raise ValueError(f"{owner}: {field}={value!r} is unknown. Use one of {', '.join(choices[field])}.")


def unless_given(config: dict, **values) -> dict:
    """Fields of a config, with these values for those that are left out or None."""
    return config | {name: value for name, value in values.items() if config.get(name) is None}


def fields_of(config: PretrainedConfig) -> dict:
    """What a head's config says of the head, for the config of a model that holds it."""
    own = type(config)().to_dict().keys() - PretrainedConfig().to_dict().keys()
    return {name: getattr(config, name) for name in own}


def config_of(part) -> PretrainedConfig:
    """An encoder's config from a dict of its fields, as a folder holds it; default: BERT's."""
    return AutoConfig.for_model(**part) if isinstance(part, dict) else part or AutoConfig.for_model("bert")


def new_encoder(config: PretrainedConfig) -> PreTrainedModel:
    """An encoder of a config's kind, without the decoder where there is one (T5)."""
    encoders = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
    return encoders.from_config(config)


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
    return [file for file in files if not {"onnx", "openvino"} & set(file.relative_to(folder).parts)]


def module_configs(folder: Path) -> list[tuple[Path, dict]]:
    """Every module's config of a model folder, parsed."""
    names = ("config.json", "sentence_bert_config.json")
    files = [file for name in names for file in sorted(folder.rglob(name))]
    return [(file, json.loads(file.read_text(encoding="utf-8"))) for file in files]


def fingerprint(folder: Path) -> str:
    """SHA-256 over the weight files and module configs of a model folder.

    Tokenizer, prompts and card do not count, nor do version stamps and the path a model was loaded from, so a copy
    saved again has the same value.
    """
    digest = hashlib.sha256()
    for file in weight_files(folder):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file.relative_to(folder)}:{content}\n".encode())
    for file, fields in module_configs(folder):
        content = json.dumps(without(fields, NOT_FINGERPRINTED), sort_keys=True)
        digest.update(f"{file.relative_to(folder)}:{content}\n".encode())
    return digest.hexdigest()


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
        if any((fields.get("model_type") or "").startswith("polyrep_") for fields in parts):
            return []
    return [fingerprint(folder) for folder in folders]


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
                self.other_backbone(before[0].model.name_or_path, found[-1])

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
