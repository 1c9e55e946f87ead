"""The trunk that a head stands on: an encoder and the stock modules behind it, in one state dict with the head.

A late-interaction model of sentence-transformers is a list of modules: a transformer, linear maps, a mask of the
tokens that are scored, a normalisation. AutoModel opens the first of them alone. Here they are parts of the method's
own model, whose folder is therefore the whole method for every library. Beside ``polyrep_room.py``, and renewed like
it; there is no config class here either.
"""

# mypy: ignore-errors
# Shipped: it speaks to transformers and torch through attributes that these type as Tensor | Module.

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel, initialization
from transformers.utils import cached_file

from .polyrep_fields import WIDTH, WORDS, check_weight, fields_of, part_config, shown
from .polyrep_folder import read_settings, whole_encoder
from .polyrep_room import MultiVectorEncoder, Transformer, new_encoder, pooling_of

try:
    from sentence_transformers.base import modules
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
except ImportError:  # only stock_parts makes some
    pass

_ACTIVATIONS = {
    name: getattr(nn, name)
    for name in ("Identity", *nn.modules.activation.__all__)
    if name not in ("MultiheadAttention", "Threshold")  # which need arguments
}

_FIELDS = {
    "Dense": ("out_features", "bias", "activation", "residual"),
    "MultiVectorMask": ("skiplist_ids", "skiplist_tasks", "keep_only_token_ids"),
    "Normalize": (),
}
"""Stock module -> what the trunk keeps of it."""

OF_VECTORS = ("Dense", "Normalize")
"""Those that may stand behind a pooling."""


class Dense(nn.Module):
    """A linear map of each vector, an activation behind it, and perhaps the vector itself once more."""

    def __init__(self, width: int, out_features: int, bias: bool, activation: str, residual: bool):
        super().__init__()
        self.linear = nn.Linear(width, out_features, bias=bias)
        self.activation = _ACTIVATIONS[activation]()
        self.residual = nn.Linear(width, out_features, bias=False) if residual and width != out_features else None
        self.adds = residual

    def forward(self, vectors: Tensor) -> Tensor:
        """``(..., width)`` to ``(..., out_features)``."""
        made = self.activation(self.linear(vectors))
        if not self.adds:
            return made
        return made + (vectors if self.residual is None else self.residual(vectors))


def keep_trunk(config: PretrainedConfig, encoder_config, trunk, kinds: tuple = tuple(_FIELDS)) -> int:
    """Set ``encoder_config`` and ``trunk`` of a config, and return the width of the vectors that they give.

    Args:
        config: The config.
        encoder_config: Config of the encoder, or a dict of its fields.
        trunk: The modules behind it in their order, each a dict of its ``type`` and of those of its settings that the
            type has here: a Dense of ``out_features, bias, activation, residual``; a MultiVectorMask of
            ``skiplist_ids, skiplist_tasks, keep_only_token_ids``; a Normalize of none.
        kinds: Types that there may be.

    Raises:
        ValueError: A part is none of these, or does not fit what stands before it.
    """
    owner = type(config).__name__
    encoder = part_config(
        {"model_type": "bert"} if encoder_config is None else encoder_config, owner, "encoder_config"
    )
    width = encoder_width(encoder)
    if type(width) is not int or not WIDTH[0] <= width <= WIDTH[1]:
        raise ValueError(
            f"{owner}: encoder_config of {encoder.model_type!r} has hidden_size={shown(width)}, and token vectors "
            "must have one width. Use the config of an encoder of texts or of pages."
        )
    parts = [] if trunk is None else trunk
    if not isinstance(parts, (list, tuple)) or len(parts) > 64 or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{owner}: trunk={shown(trunk)} does not fit. Use a list of up to 64 objects, each a module.")
    kept = []
    for part in parts:
        kind = part.get("type")
        if kind not in kinds or set(part) - {"type", *_FIELDS[kind]}:
            use = "; ".join(
                f"{name} of {', '.join(fields) or 'nothing'}" for name, fields in _FIELDS.items() if name in kinds
            )
            raise ValueError(f"{owner}: trunk={shown(trunk)} has {shown(part)}, which is no module here. Use {use}.")
        part = _CHECKS[kind](part, f"{owner}: trunk={shown(part)} ")
        if kind == "Dense":
            check_weight(owner, **{"trunk.out_features": part["out_features"], "width": width})
            width = part["out_features"]
        kept.append(part)
    config.encoder_config, config.trunk = encoder, kept
    return width


def encoder_width(config: PretrainedConfig) -> int | None:
    """Width of an encoder's token vectors: of a page retriever of transformers, behind its own projection."""
    if _retrieval(config):
        return getattr(config, "embedding_dim", None)
    return getattr(config.get_text_config(), "hidden_size", None)


def _retrieval(config: PretrainedConfig) -> str | None:
    """Name of the class of transformers that makes token vectors itself (ColPali, ColQwen2); None for others."""
    name = next(iter(getattr(config, "architectures", None) or [""]))
    return name if isinstance(name, str) and name.endswith("ForRetrieval") else None


def _checked_dense(part: dict, said: str) -> dict:
    found = {"type": "Dense", "bias": False, "activation": "Identity", "residual": False} | part
    width = found.get("out_features")
    if type(width) is not int or not WIDTH[0] <= width <= WIDTH[1]:
        raise ValueError(f"{said}has out_features={shown(width)}. Use a whole number from {WIDTH[0]} to {WIDTH[1]:,}.")
    if not isinstance(found["activation"], str) or found["activation"] not in _ACTIVATIONS:
        raise ValueError(f"{said}has no such activation. Use one of torch.nn, e.g. Identity or Tanh.")
    if type(found["bias"]) is not bool or type(found["residual"]) is not bool:
        raise ValueError(f"{said}has a bias or residual that is neither true nor false. Use one of these.")
    return found


def _checked_mask(part: dict, said: str) -> dict:
    found = {"type": "MultiVectorMask", "skiplist_ids": [], "skiplist_tasks": ["document"]} | part
    for field in ("skiplist_ids", "keep_only_token_ids"):
        ids = found.get(field) or []
        if not isinstance(ids, list) or len(ids) > WORDS[1] or any(type(i) is not int or i < 0 for i in ids):
            raise ValueError(f"{said}has {field} that are no ids of tokens. Use a list of whole numbers from 0.")
        found[field] = ids
    if not isinstance(found["skiplist_tasks"], list) or set(map(str, found["skiplist_tasks"])) - {"query", "document"}:
        raise ValueError(f"{said}has other skiplist_tasks than query and document. Use a list of these.")
    return found


_CHECKS = {"Dense": _checked_dense, "MultiVectorMask": _checked_mask, "Normalize": lambda part, said: dict(part)}


def new_trunk_encoder(config: PretrainedConfig) -> PreTrainedModel:
    """An encoder of a config's kind; of a page retriever, with its own projection."""
    if name := _retrieval(config):
        kind = getattr(transformers, name, None)
        if (
            not isinstance(kind, type)
            or not issubclass(kind, PreTrainedModel)
            or kind.config_class is not type(config)
        ):
            raise ValueError(f"{type(config).__name__}: transformers has no {name} for it. Use a newer version.")
        return kind(config)
    return new_encoder(config)


def new_trunk(config: PretrainedConfig) -> nn.ModuleList:
    """The modules behind an encoder; what has no weight is there for the place that it has in the config."""
    parts, width = nn.ModuleList(), encoder_width(config.encoder_config)
    for part in config.trunk:
        if part["type"] == "Dense":
            parts.append(Dense(width, *(part[field] for field in _FIELDS["Dense"])))
            width = part["out_features"]
        else:
            parts.append(nn.Identity())
    return parts


def trunk_parts(model, owner: str, remedy: str) -> tuple[PreTrainedModel, list[dict], list[nn.Module]]:
    """What a late-interaction model of sentence-transformers is made of, as far as one folder can hold it.

    Args:
        model: A MultiVectorEncoder, or the modules of one.
        owner: Who asks, for messages.
        remedy: What to do if it has more.

    Returns:
        The encoder, the modules behind it as ``trunk`` of a config has them, and those of them that are a Dense.

    Raises:
        ValueError: A module is no part of a trunk, or is used in another way than there.
    """
    parts = list(model)
    names = " + ".join(type(module).__name__ for module in parts)
    first = parts[0]
    encoder = getattr(first, "model", None)
    if len(parts) == 1 and hasattr(encoder, "trunk") and not hasattr(encoder, "head"):  # of whichever method's file
        maps = [part for part in encoder.trunk if hasattr(part, "linear")]
        return encoder.encoder, encoder.config.trunk, maps

    def refuse(why: str):
        raise ValueError(
            f"{owner}: the backbone is {names}, of which {why}; one folder of this kind holds Transformer, "
            f"{', '.join(_FIELDS)}. {remedy}"
        )

    if type(first).__name__ not in ("Transformer", "Backbone") or not isinstance(encoder, PreTrainedModel):
        refuse(f"{type(first).__name__} is no transformer")
    if getattr(first, "do_lower_case", False):
        refuse("the Transformer makes texts lower-case")
    asked = {params["method"] for params in first.modality_config.values()}
    given = {params["method_output_name"] for params in first.modality_config.values()}
    expected = "embeddings" if _retrieval(encoder.config) else "last_hidden_state"
    if asked != {"forward"} or given != {expected} or first.module_output_name != "token_embeddings":
        refuse("the Transformer takes something else than token vectors from its model")
    try:
        with torch.device("meta"):
            same = type(new_trunk_encoder(part_config(encoder.config.to_dict(), owner, "encoder_config")))
    except ValueError as error:
        refuse(f"the encoder opens by itself alone ({error})")
    if same is not type(encoder):
        refuse(f"the encoder is a {type(encoder).__name__}, where its config asks for a {same.__name__}")
    whole_encoder(encoder, owner)
    return encoder, *_parts_of(parts[1:], first.tokenizer, refuse)


def pooled_parts(model, owner: str, poolings: tuple, remedy: str) -> tuple:
    """What a SentenceTransformer is made of, as far as one folder can hold it; see :func:`pooling_of`.

    Returns:
        Its pooling; whether it normalises what that gives; and if there is a Dense behind it, all that is, as
        ``trunk`` of a config has it, and those modules of it that are a Dense.

    Raises:
        ValueError: It has other modules.
    """
    modules = list(model)
    if not {"Dense"} & {type(module).__name__ for module in modules[2:]}:
        return *pooling_of(model, owner, poolings, remedy), [], []

    def refuse(why: str):
        names = " + ".join(type(module).__name__ for module in modules)
        raise ValueError(
            f"{owner}: the backbone is {names}, of which {why}; one folder of this kind holds Transformer, Pooling, "
            f"{', '.join(OF_VECTORS)}. {remedy}"
        )

    trunk, maps = _parts_of(modules[2:], None, refuse, OF_VECTORS, "sentence_embedding")
    pooling, _ = pooling_of(model, owner, poolings, remedy, more=True)
    return pooling, False, trunk, maps


def _parts_of(stock: list, tokenizer, refuse, kinds: tuple = tuple(_FIELDS), place: str = "token_embeddings") -> tuple:
    """Stock modules of some place between modules as parts of a trunk, and those of them that are a Dense."""
    parts, maps = [], []
    for module in stock:
        kind = type(module).__name__
        places = {getattr(module, f"module_{way}put_name", place) for way in ("in", "out")}
        if kind not in kinds or places != {place}:
            refuse(f"{kind} {'works on ' + ' and '.join(sorted(places)) if kind in kinds else 'is no such module'}")
        part = {"type": kind}
        if kind == "Dense":
            activation = type(module.activation_function).__name__
            if type(module.activation_function) is not _ACTIVATIONS.get(activation):
                refuse(f"Dense has the activation {activation}")
            part |= {
                "out_features": module.out_features,
                "bias": module.linear.bias is not None,
                "activation": activation,
                "residual": bool(getattr(module, "use_residual", False)),
            }
            maps.append(module)
        elif kind == "MultiVectorMask":
            found = {word: tokenizer.convert_tokens_to_ids(word) for word in module.skiplist_words}
            unknown = tokenizer.unk_token_id if module.skiplist_words else None
            part |= {  # a word that is no token is skipped by nobody, or all unknown ones would be
                "skiplist_ids": [i for word, i in found.items() if i != unknown or word == tokenizer.unk_token],
                "skiplist_tasks": list(module.skiplist_tasks),
                "keep_only_token_ids": list(module.keep_only_token_ids or []),
            }
        parts.append(part)
    return parts, maps


_OF_NO_ENCODER = {
    *("modality", "num_images_per_sample", "num_videos_per_sample", "prompt_length", "sentence_embedding"),
    *("offset_mapping", "overflow_to_sample_mapping", "special_tokens_mask"),
}
"""What sentence-transformers and tokenizers say beside the inputs."""


def readable(encoder: nn.Module) -> frozenset | None:
    """Names of what an encoder reads; None for one that takes any."""
    named = inspect.signature(encoder.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in named.values())
    return None if takes_any else frozenset(named)


def read_inputs(inputs: dict, reads: frozenset | None) -> dict:
    """Those of a batch's inputs that an encoder reads, see :func:`readable`."""
    return {
        name: value
        for name, value in inputs.items()
        if value is not None and (name not in _OF_NO_ENCODER if reads is None else name in reads)
    }


class Trunk:
    """Texts or pages to token vectors and the mask of those that are scored; beside PreTrainedModel.

    Attributes:
        otherwise: What to do with a backbone that has other modules than a trunk.
    """

    otherwise = "Keep the modules: form='pipeline'."

    @classmethod
    def from_encoder(cls, backbone: str, head=None, **config) -> Trunk:
        """A model from any late-interaction model of sentence-transformers whose modules one folder can hold.

        Args:
            backbone: Folder or Hub id of a MultiVectorEncoder.
            head: A trained head; default: an untrained one.
            config: Fields of the untrained one's config.

        Raises:
            ValueError: The backbone has other modules.
        """
        return cls.from_modules(MultiVectorEncoder(str(backbone), device="cpu"), head, **config)

    @classmethod
    def from_modules(cls, model, head=None, **config) -> Trunk:
        """Likewise of an opened model, or of its modules."""
        encoder, trunk, maps = cls.check_backbone(model)
        if head is not None:
            config = fields_of(head.config) | config
        return cls.of_parts(
            cls.config_class(encoder_config=encoder.config, trunk=trunk, **config), encoder, maps, head
        )

    @classmethod
    def check_backbone(cls, model):
        """See :func:`trunk_parts`."""
        return trunk_parts(model, cls.__name__, cls.otherwise)

    def stock_modules(self, tokenizer) -> list:
        """What stands between encoder and head, as modules of sentence-transformers."""
        return stock_parts(self, tokenizer)

    def add_trunk(self, config: PretrainedConfig) -> None:
        """Make encoder and modules, in the constructor."""
        self.encoder = new_trunk_encoder(config.encoder_config)
        self._reads = readable(self.encoder)
        self.trunk = new_trunk(config)

    @classmethod
    def of_parts(
        cls, config: PretrainedConfig, encoder: PreTrainedModel, maps: list | None = None, head=None
    ) -> Trunk:
        """A model around an encoder that is there already, of which no second one is made.

        Args:
            config: Of the model.
            encoder: Becomes part of the model.
            maps: Dense modules whose weights are copied; default: new ones.
            head: Whose weights are copied, where the model has one; default: a new one.
        """
        with torch.device("meta"):
            whole = cls(config)
        whole.trunk = new_trunk(config)
        if hasattr(whole, "head"):
            whole.head = type(whole.head)(config)
        if head is not None:
            whole.head.load_state_dict(head.state_dict())
        whole.take_trunk(encoder, maps)
        return whole.to(encoder.dtype)

    def _init_weights(self, module):
        super()._init_weights(module)
        for part in self.trunk:
            if isinstance(part, Dense) and module in (part.linear, part.residual):
                initialization.kaiming_uniform_(module.weight, a=5**0.5)  # torch's own, not that of the encoder's kind
                if module.bias is not None:
                    bound = module.in_features**-0.5
                    initialization.uniform_(module.bias, -bound, bound)

    def take_trunk(self, encoder: PreTrainedModel, maps: list[nn.Module] | None) -> None:
        """Take the encoder of a model, and the weights of its Dense modules where there are some."""
        self.encoder = encoder
        if maps is None:
            return
        for ours, theirs in zip((part for part in self.trunk if isinstance(part, Dense)), maps, strict=True):
            ours.linear.load_state_dict(theirs.linear.state_dict())
            if ours.residual is not None:
                ours.residual.load_state_dict(theirs.residual.state_dict())

    def get_input_embeddings(self) -> nn.Module:
        """The encoder's word embeddings."""
        return self.encoder.get_input_embeddings()

    def behind(self, vectors: Tensor) -> Tensor:
        """What the modules behind a pooling make of its vectors: ``(batch, width)``."""
        for part, module in zip(self.config.trunk, self.trunk, strict=True):
            vectors = module(vectors) if part["type"] == "Dense" else F.normalize(vectors, p=2, dim=-1)
        return vectors

    def token_vectors(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        task: str | None,
        query_expansion_positions: Tensor | None = None,
        **inputs,
    ) -> tuple[Tensor, Tensor]:
        """Token vectors of texts or pages, to the bit those of the stock modules.

        Args:
            input_ids: ``(batch, tokens)``.
            attention_mask: ``(batch, tokens)``; default: all tokens count.
            task: "query", else a document.
            query_expansion_positions: ``(batch, tokens)``, true for tokens that lengthen a query.
            inputs: What else the encoder reads, such as ``pixel_values``.

        Returns:
            ``(batch, tokens, width)``, and ``(batch, tokens)``, True for vectors that count in a score.
        """
        if input_ids is not None:
            inputs["input_ids"] = input_ids
            attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        output = self.encoder(**read_inputs(inputs, self._reads) | {"return_dict": True})
        vectors = output.embeddings if _retrieval(self.config.encoder_config) else output.last_hidden_state
        mask = torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)
        if attention_mask is not None:
            mask = attention_mask.bool()
        for part, module in zip(self.config.trunk, self.trunk, strict=True):
            if part["type"] == "Dense":
                vectors = module(vectors)
            elif part["type"] == "Normalize":
                vectors = F.normalize(vectors, p=2, dim=-1)
            elif input_ids is not None:
                mask = _scored(part, input_ids, mask, task, query_expansion_positions)
        return vectors, mask


def stock_parts(model: Trunk, tokenizer, place: str = "token_embeddings") -> list[nn.Module]:
    """The modules of sentence-transformers that a trunk's parts were, with its weights."""
    names, made = {"module_input_name": place, "module_output_name": place}, []
    for part, module in zip(model.config.trunk, model.trunk, strict=True):
        if part["type"] == "Dense":
            linear = module.linear
            dense = modules.Dense(
                linear.in_features,
                linear.out_features,
                bias=part["bias"],
                activation_function=module.activation,
                use_residual=part["residual"],
                **names,
            ).to(linear.weight)
            dense.linear.load_state_dict(linear.state_dict())
            if module.residual is not None:
                dense.residual.load_state_dict(module.residual.state_dict())
            made.append(dense)
        elif part["type"] == "Normalize":
            made.append(modules.Normalize(**names))
        else:
            words = tokenizer.convert_ids_to_tokens(part["skiplist_ids"])
            ids = part["keep_only_token_ids"] or None
            made.append(MultiVectorMask(words, skiplist_tasks=part["skiplist_tasks"], keep_only_token_ids=ids))
    return made


def _scored(part: dict, input_ids: Tensor, mask: Tensor, task: str | None, expansion: Tensor | None) -> Tensor:
    """Tokens that count in a score: ``(batch, tokens)``."""
    if task == "query" and expansion is not None:
        mask = mask | expansion.bool()
    if part["skiplist_ids"] and (task or "document") in part["skiplist_tasks"]:
        mask = mask & ~_among(input_ids, part["skiplist_ids"])
    if task != "query" and part["keep_only_token_ids"]:
        mask = mask & _among(input_ids, part["keep_only_token_ids"])
    return mask


def _among(input_ids: Tensor, listed: list[int]) -> Tensor:
    """Tokens that a list has: ``(batch, tokens)``."""
    ids = torch.tensor(listed, device=input_ids.device)
    if torch.compiler.is_compiling():  # ONNX has no search for isin to become
        return (input_ids[..., None] == ids).any(-1)
    return torch.isin(input_ids, ids)


_FEATURES = {
    "sentence_embedding": "sentence_embedding",
    "token_embeddings": "token_embeddings",
    "mask": "attention_mask",
    "hidden_states": "all_layer_embeddings",
}
"""Field of a model's output -> name that it has between modules."""


class TrunkTransformer(Transformer):
    """The stock Transformer around a model whose output says itself which of its vectors count.

    The stock one would keep the tokenizer's mask.
    """

    forward_kwargs = {"task"}

    def forward(self, features, task=None, **kwargs):
        """Add what the model gives: ``sentence_embedding``, or ``token_embeddings`` and their ``attention_mask``."""
        given = {**features, **kwargs}
        if task is not None:  # trainers put it into the batch, by their router_mapping
            given["task"] = task
        output = self.model(**given)
        features.update({name: output[field] for field, name in _FEATURES.items() if output.get(field) is not None})
        return features

    def get_embedding_dimension(self):
        """Width of the vectors."""
        return self.model.width


class Backbone(Transformer):
    """The stock Transformer as first module of a pipeline, in a folder of its own.

    In the root it would be all that AutoModel and some servers open, who then give the backbone for the method.
    """

    save_in_root = False

    def save(self, output_path, *args, **kwargs):
        """Write it, and to the root the code that refuses to open the pipeline in part."""
        super().save(output_path, *args, **kwargs)
        root = Path(output_path).parent
        for file in Path(__file__).parent.glob("polyrep_*.py"):
            shutil.copy(file, root)
        refusal = {"model_type": "pipeline", "auto_map": {"AutoConfig": f"{Path(__file__).stem}.Pipeline"}}
        (root / "config.json").write_text(json.dumps(refusal, indent=2), encoding="utf-8", newline="\n")


class Pipeline:
    """What AutoConfig finds in the root of a pipeline: a refusal that says how to open it."""

    @classmethod
    def register_for_auto_class(cls, *args) -> None:
        """Called by AutoConfig before it asks."""

    @classmethod
    def from_pretrained(cls, name, **kwargs):
        """ValueError with the class of sentence-transformers that opens the folder, and the places of its parts."""
        where = {k: v for k, v in kwargs.items() if k in ("cache_dir", "local_files_only", "revision", "token")}
        listing = json.loads(Path(cached_file(name, "modules.json", **where)).read_bytes())
        family = read_settings(Path(cached_file(name, "config_sentence_transformers.json", **where)))["model_type"]
        names = [part["type"].rpartition(".")[2] for part in listing]
        raise ValueError(
            f"{name}: is a pipeline of {', '.join(names)}, of which AutoModel would open the first alone and give "
            f"its vectors for the method's. Use sentence_transformers.{family}({str(name)!r}, "
            f"trust_remote_code=True); by itself the backbone is in the subfolder {listing[0]['path']!r}, and the "
            f"head in {listing[-1]['path']!r}."
        )
