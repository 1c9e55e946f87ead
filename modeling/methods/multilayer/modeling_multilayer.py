"""MultiLayer: several layers of one encoder take part in training, and one vector is served, at no cost if you like.

After Xie and Lukasiewicz, "Investigating Multi-layer Representations for Dense Passage Retrieval" (Findings of EMNLP
2025, arXiv 2509.23861). A text is the state of its first token, or the mean of all, at some chosen layers. A query is
the first layer named, normally the last of the encoder; ``pooling`` says what a document is::

    last               that layer alone: the dual encoder that everything else must beat
    self_contrastive   the same when encoding. In training the other layers are extra negatives (``objective.py``)
    mean, scalar_mix   the mean of the layers, or one weighted by a softmax
    multi              all of them; a score is the best of them: several vectors, for a MultiVectorEncoder

    linear             one linear map of all of them together, queries too, which starts as the first layer alone

The last is ours, and made for an encoder that stays frozen, as ``projection`` is, one map behind every layer. Ours
are also layers that count from either end, so that one recipe serves encoders of any depth, and ``pool_queries``.
"""

# mypy: ignore-errors
# Shipped: it speaks to transformers and torch through attributes that these type as Tensor | Module.

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, initialization
from transformers.utils import ModelOutput, cached_file

from .polyrep_fields import LAYERS, WIDTH, check_weight, checked, config_of, fields_of, keep, unless_given
from .polyrep_folder import BESIDE_A_HEAD, WholeWeights, read_settings, whole_encoder
from .polyrep_room import (
    HeadModule,
    Module,
    SentenceTransformer,
    Transformer,
    keep_states,
    new_encoder,
    pool_tokens,
    pooling_of,
    text_inputs,
    warn_of_no_task,
)
from .polyrep_trunk import TrunkTransformer

try:
    from sentence_transformers.base.modules import Dense, Normalize, Router
    from sentence_transformers.sentence_transformer.modules import Pooling
except ImportError:  # only to_plain_encoder makes some
    pass

_CHOICES = {
    "pooling": ("self_contrastive", "last", "mean", "scalar_mix", "linear", "multi"),
    "token": ("mean", "cls"),
}


class MultiLayerHeadConfig(PretrainedConfig):
    """Which layers represent a text, and how they become one vector, or several.

    Args:
        layers (list): Hidden states of the encoder: 0 is the embeddings, 12 or -1 the last of twelve layers. The first
            named is the one that stands alone: of queries, and of documents unless they are pooled.
        pooling (str): What a document is: self_contrastive, last, mean, scalar_mix, linear or multi.
        token (str): What a text is at a layer: mean over its tokens, or cls, its first. Default: the backbone's own
            where there is one (``from_encoder``, ``from_backbone``, ``train``), else mean.
        normalize (bool): Bring vectors to unit length. Default: likewise, else not, and scores are inner products.
        pool_queries (bool): Pool queries as documents are: for mean and scalar_mix; linear always does.
        projection (bool): One linear map behind every layer, the identity at first.
        hidden_size (int): Width of the encoder's states; known once there is an encoder.
        num_hidden_layers (int): The encoder's layers; likewise.
    """

    model_type = "polyrep_multilayer_head"
    # What follows from the backbone, and is nobody's choice.
    derived = ("hidden_size", "num_hidden_layers")

    @checked(**_CHOICES, layers=(-LAYERS[1] - 1, LAYERS[1]), hidden_size=WIDTH, num_hidden_layers=LAYERS)
    def __init__(
        self,
        layers: list[int] = (-1, -3),
        pooling: str = "self_contrastive",
        token: str | None = None,
        normalize: bool | None = None,
        pool_queries: bool = False,
        projection: bool = False,
        hidden_size: int | None = None,
        num_hidden_layers: int | None = None,
        **kwargs,
    ):
        token, normalize = token or "mean", bool(normalize)
        name = keep(self, locals())
        self.layers = list(layers)
        if not layers:
            raise ValueError(f"{name}: layers={self.layers} names no hidden states. Use whole numbers, e.g. [-1, -3].")
        check_weight(name, layers=len(layers), hidden_size=hidden_size or 1, width=hidden_size or 1)
        if len(layers) == 1 and pooling not in ("last", "linear"):
            raise ValueError(
                f"{name}: pooling={pooling!r} of the single layer {layers[0]} has nothing to pool. Name more layers, "
                "or use pooling='last'."
            )
        if pool_queries and pooling not in ("mean", "scalar_mix"):
            raise ValueError(
                f"{name}: pool_queries with pooling={pooling!r} would change nothing. It is for mean and scalar_mix."
            )
        if pooling == "linear" and projection:
            raise ValueError(f"{name}: projection with pooling='linear' is one map behind another. Leave it out.")
        super().__init__(**kwargs)
        self.fit(num_hidden_layers, hidden_size)

    def fit(self, num_hidden_layers: int | None, hidden_size: int | None) -> None:
        """Take depth and width of an encoder, or ValueError if it has no such layers."""
        depth, name = num_hidden_layers, type(self).__name__
        places = self.layers
        if depth is not None:
            for layer in self.layers:
                if not -depth - 1 <= layer <= depth:
                    raise ValueError(
                        f"{name}: layers={self.layers} names {layer}, but the encoder has {depth} layers, so its "
                        f"hidden states are 0 (embeddings) to {depth} (last), or {-depth - 1} to -1."
                    )
            places = [layer % (depth + 1) for layer in self.layers]
        if len(set(places)) < len(places):
            raise ValueError(
                f"{name}: layers={self.layers} names a layer twice"
                + (f" (of hidden states 0 to {depth} they are {places})" if depth is not None else "")
                + ", so it would be compared with itself. Name each once."
            )
        made = (self.num_hidden_layers, self.hidden_size)
        if any(ours not in (None, theirs) for ours, theirs in zip(made, (depth, hidden_size), strict=True)):
            raise ValueError(
                f"{name}: made for num_hidden_layers={made[0]} and hidden_size={made[1]}, but the encoder has {depth} "
                f"layers of width {hidden_size}. Use the backbone it was trained on "
                f"({self.base_model_id or 'not recorded'}), or train it anew."
            )
        self.num_hidden_layers, self.hidden_size = depth, hidden_size

    @property
    def similarity_fn_name(self) -> str:
        """How vectors are scored: those of unit length by cosine, others by the inner product of their training."""
        return "cosine" if self.normalize else "dot"

    @property
    def pools(self) -> bool:
        """Whether a document is more than its first layer, so that hidden states are needed when encoding."""
        return self.pooling in ("mean", "scalar_mix", "linear", "multi")

    def deepest(self, encoding: bool = False) -> int:
        """The last hidden state that is read: of all ``layers``, or of those that count when encoding."""
        layers = self.layers if self.pools or not encoding else self.layers[:1]
        return max(layer % (self.num_hidden_layers + 1) for layer in layers)

    def is_last(self, layer: int) -> bool:
        """Whether a layer is the encoder's last, which it returns anyway."""
        return layer in (-1, self.num_hidden_layers)


@dataclass
class MultiLayerOutput(ModelOutput):
    """What head and model return.

    Attributes:
        sentence_embedding: ``(batch, dim)``, unless the pooling is multi.
        token_embeddings: ``(batch, vectors, dim)`` if it is: a vector for each layer of a document, one of a query.
        mask: ``(batch, vectors)``, True: all of them count.
        hidden_states: ``(batch, layers, dim)`` each layer as a vector of its own, where asked for, as training does.
    """

    sentence_embedding: Tensor | None = None
    token_embeddings: Tensor | None = None
    mask: Tensor | None = None
    hidden_states: Tensor | None = None


class MultiLayerHead(WholeWeights, PreTrainedModel):
    """The head: a text's state at each chosen layer becomes its vector."""

    config_class = MultiLayerHeadConfig
    _keys_to_ignore_on_load_unexpected = BESIDE_A_HEAD
    _supports_sdpa = _supports_flash_attn = True  # no attention here, whatever the encoder is asked for

    def __init__(self, config):
        super().__init__(config)
        layers, dim = len(config.layers), config.hidden_size
        if (config.projection or config.pooling == "linear") and not dim:
            raise ValueError(
                f"MultiLayerHead: hidden_size={dim!r}, but the linear map needs the width of the encoder's states. "
                "Pass hidden_size, e.g. 384."
            )
        if config.pooling == "linear":
            self.map = nn.Linear(layers * dim, dim, bias=False)
        elif config.projection:
            self.map = nn.Linear(dim, dim, bias=False)
        self.mix = nn.Parameter(torch.zeros(layers), requires_grad=config.pooling == "scalar_mix")
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MultiLayerHead):
            initialization.zeros_(module.mix)
            if hasattr(module, "map"):  # starts as the first layer alone
                initialization.eye_(module.map.weight)

    @classmethod
    def from_backbone(cls, model: SentenceTransformer, **config) -> MultiLayerHead:
        """An untrained head for a SentenceTransformer of a transformer, one pooling and perhaps a normalisation."""
        return cls(MultiLayerHeadConfig(**_of_backbone(model, config)))

    def forward(
        self,
        layer_embeddings: Tensor,
        task: str | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> MultiLayerOutput:
        """Vectors of texts.

        Args:
            layer_embeddings: ``(batch, layers, hidden_size)`` the text at each of ``config.layers``, or at the first
                alone where that is all that counts.
            task: "query", else a document.
            output_hidden_states: Also give every layer as a vector of its own.
            kwargs: Ignored.
        """
        pooling, alone = self.config.pooling, task == "query" and not self.config.pool_queries
        if self.config.pools and pooling != "linear" and not self.config.pool_queries:
            warn_of_no_task(self, task)
        states = self.map(layer_embeddings) if self.config.projection else layer_embeddings
        if pooling == "linear":
            vectors = self.map(states.flatten(1))
        elif alone or pooling in ("last", "self_contrastive"):
            vectors = states[:, :1] if pooling == "multi" else states[:, 0]
        elif pooling == "multi":
            vectors = states
        else:  # uniform weights of scalar_mix are the mean
            vectors = torch.einsum("m,bmd->bd", self.mix.softmax(0).to(states.dtype), states)
        if self.config.normalize:
            vectors = F.normalize(vectors, dim=-1)
        if vectors.ndim == 2:
            output = MultiLayerOutput(sentence_embedding=vectors)
        else:
            all_count = torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)
            output = MultiLayerOutput(token_embeddings=vectors, mask=all_count)
        if output_hidden_states:
            output.hidden_states = F.normalize(states, dim=-1) if self.config.normalize else states
        return output


class MultiLayerConfig(MultiLayerHeadConfig):
    """An encoder and the head in one.

    Args:
        encoder_config (dict): Config of the encoder.
        tied (bool): One encoder for queries and documents; if not, each has its own.
    """

    model_type = "polyrep_multilayer"
    sub_configs = {"encoder_config": AutoConfig}

    @checked()
    def __init__(self, encoder_config=None, tied: bool = True, **kwargs):
        self.encoder_config, self.tied = config_of(encoder_config, type(self).__name__), tied
        kwargs["hidden_size"] = self.encoder_config.hidden_size
        kwargs["num_hidden_layers"] = self.encoder_config.num_hidden_layers
        super().__init__(**kwargs)


class MultiLayerModel(WholeWeights, PreTrainedModel):
    """Encoder and head in one state dict; with ``tied=False`` a second encoder for queries, chosen by ``task``."""

    config_class = MultiLayerConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config):
        super().__init__(config)
        self.encoder = new_encoder(config.encoder_config)
        if not config.tied:
            self.query_encoder = new_encoder(config.encoder_config)
        self.head = MultiLayerHead(config)
        self.post_init()

    @classmethod
    def from_encoder(cls, backbone: str, head: MultiLayerHead | None = None, **config) -> MultiLayerModel:
        """A model from any embedding model that is a transformer, one pooling and perhaps a normalisation.

        Args:
            backbone: Folder or Hub id of a SentenceTransformer, or of a bare encoder.
            head: A trained head; default: an untrained one.
            config: Fields of MultiLayerConfig; ``token`` and ``normalize`` default to the backbone's own.

        Raises:
            ValueError: The backbone has modules that one folder of this kind cannot hold.
        """
        return cls.from_modules(SentenceTransformer(str(backbone), device="cpu"), head, **config)

    @classmethod
    def from_modules(cls, model, head: MultiLayerHead | None = None, **config) -> MultiLayerModel:
        """Likewise of an opened SentenceTransformer, or of its modules."""
        whole_encoder(model[0].model, cls.__name__)
        if head is not None:
            cls.check_backbone(model)
            config = fields_of(head.config) | config
        else:
            config = _of_backbone(model, config)
        encoder = model[0].model
        whole = cls(MultiLayerConfig(encoder_config=encoder.config, **config))
        whole.encoder = encoder
        if not whole.config.tied:
            whole.query_encoder = copy.deepcopy(encoder)
        if head is not None:
            whole.head.load_state_dict(head.state_dict())
        whole = whole.to(encoder.dtype)
        asked = whole.head.mix.is_meta  # whether there is such a model, which has no weights then
        if whole.config.deepest() < whole.config.num_hidden_layers and not asked:
            with contextlib.suppress(ValueError):  # what cannot be left out costs time and changes no vector
                whole = whole.truncate()
        return whole

    @staticmethod
    def check_backbone(model: SentenceTransformer) -> tuple[str, bool]:
        """Pooling of a SentenceTransformer and whether it normalises; ValueError if it does more than that."""
        if [type(module).__name__ for module in model] in (["Transformer"], ["Backbone"]):  # read at its layers alone
            return "mean", False
        remedy = "Take its transformer alone: SentenceTransformer(modules=[Transformer(backbone), MultiLayerPooling("
        return pooling_of(model, "MultiLayerModel", _CHOICES["token"], remedy + "layers=[-1, -3])]).")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        task: str | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> MultiLayerOutput:
        """Vectors of texts.

        Args:
            input_ids: ``(batch, tokens)``.
            attention_mask: ``(batch, tokens)``; default: all tokens count.
            token_type_ids: ``(batch, tokens)``, for encoders that know them.
            task: "query", else a document.
            output_hidden_states: Also give every chosen layer as a vector of its own.
            kwargs: Ignored; what other retrievers read.
        """
        config, inputs = self.config, text_inputs(input_ids, attention_mask, token_type_ids)
        shown = bool(config.output_hidden_states if output_hidden_states is None else output_hidden_states)
        queries_too = config.pool_queries or config.pooling == "linear"
        alone = not shown and (not config.pools or task == "query" and not queries_too)
        layers = config.layers[:1] if alone else config.layers
        if not config.tied:
            warn_of_no_task(self, task)
        encoder = self.query_encoder if task == "query" and not config.tied else self.encoder
        deep = not all(config.is_last(layer) for layer in layers)
        if deep:
            keep_states(encoder)
        output = encoder(input_ids=input_ids, output_hidden_states=deep, **inputs)
        if deep:
            keep_states(encoder)
        if deep and output.hidden_states is None:
            raise ValueError(
                f"MultiLayerModel: {type(encoder).__name__} returned no hidden states, so layers {layers} cannot be "
                "read. Use another encoder, or layers=[-1] with pooling='last'."
            )
        states = [output.hidden_states[layer] for layer in layers] if deep else [output.last_hidden_state]
        pooled = torch.stack([pool_tokens(state, inputs["attention_mask"], config.token) for state in states], 1)
        return self.head(pooled, task=task, output_hidden_states=shown)

    def stock_modules(self, tokenizer) -> list:
        """What stands between encoder and head: nothing; ValueError for two encoders."""
        if not self.config.tied:
            raise ValueError("MultiLayerModel: has two encoders, of which a head stands behind one. Keep one folder.")
        return []

    @property
    def width(self) -> int:
        """Of its vectors."""
        return self.config.hidden_size

    @torch.no_grad()
    def truncate(self, layer: int | None = None) -> MultiLayerModel:
        """A model of its own whose encoder ends early: quicker by what is left out.

        Args:
            layer: A hidden state that it serves alone; default: end after the last that this model reads to encode.

        Raises:
            ValueError: Nothing would be left, a document is pooled over several layers, or the encoder normalises its
                last state once more, so that a short one gives other vectors.
        """
        config, depth = self.config, self.config.num_hidden_layers
        if layer is not None and config.pools:
            raise ValueError(f"truncate: documents are pooled over layers {config.layers}; leave layer={layer} out.")
        kept = config.deepest(encoding=True) if layer is None else layer
        kept = kept % (depth + 1) if -depth - 1 <= kept <= depth else 0
        if kept < 1:
            raise ValueError(f"truncate: layer={layer} leaves no encoder. Use 1 to {depth}, or {-depth} to -1.")
        encoder = copy.deepcopy(config.encoder_config)
        for name, value in encoder.to_dict().items():  # what is listed layer by layer
            if name in ("layer_types", "attention_types") and isinstance(value, list):
                setattr(encoder, name, value[:kept])
        encoder.num_hidden_layers = kept
        layers = [place % (depth + 1) for place in config.layers] if config.pools else [kept]
        fields = {name: getattr(config, name) for name in ("token", "normalize", "pool_queries", "projection", "tied")}
        pooling = config.pooling if config.pools else "last"
        short = type(self)(MultiLayerConfig(encoder_config=encoder, layers=layers, pooling=pooling, **fields))
        weights = self.state_dict()
        if not config.pools:
            weights["head.mix"] = short.head.mix
        short.load_state_dict({name: weights[name] for name in short.state_dict()})
        short.to(self.device, self.dtype)
        ids = torch.arange(16, device=self.device).view(2, 8) % encoder.vocab_size
        for name in ("encoder", "query_encoder")[: 1 if config.tied else 2]:
            full, cut = copy.deepcopy(getattr(self, name)).eval(), getattr(short, name).eval()
            expected = full(input_ids=ids, output_hidden_states=True).hidden_states[kept]
            if not torch.allclose(cut(input_ids=ids).last_hidden_state.float(), expected.float(), 1e-2, 1e-2):
                raise ValueError(
                    f"truncate: {type(full).__name__} changes its last state once more after the layers, so that cut "
                    f"after {kept} of {depth} it gives other vectors. Let layers start with the last."
                )
        return short.train(self.training)

    @torch.no_grad()
    def to_plain_encoder(self, folder: str | Path, source: str | Path | None = None, **kwargs) -> Path:
        """Write what encodes as stock modules, which sentence-transformers opens without remote code.

        Layers that only took part in training are left out; untied towers become a Router.

        Args:
            folder: Where to write; must not exist yet.
            source: Where tokenizer and prompts are; default: what this model was loaded from.
            kwargs: ``revision, token`` for a source on the Hub.

        Returns:
            The folder.

        Raises:
            ValueError: The pooling needs hidden states, or see ``truncate``.
            FileExistsError: There is such a folder.
        """
        config, folder, source = self.config, Path(folder), str(source or self.name_or_path)
        if config.pools:
            raise ValueError(
                f"to_plain_encoder: pooling={config.pooling!r} reads layers {config.layers} of a document, which no "
                "stock module does. It is for self_contrastive and last; keep this folder as it is."
            )
        if folder.exists():
            raise FileExistsError(f"to_plain_encoder: {folder} exists and would be mixed with. Choose another.")
        short = self if config.is_last(config.layers[0]) else self.truncate()
        tokenizer = AutoTokenizer.from_pretrained(source, config=config.encoder_config, **kwargs)
        try:
            found = cached_file(source, "config_sentence_transformers.json", **kwargs)
            settings = read_settings(Path(found))
        except OSError:  # a model that was never a SentenceTransformer
            settings = {}
        similarity = settings.get("similarity_fn_name") or config.similarity_fn_name
        folder.parent.mkdir(parents=True, exist_ok=True)
        options = {"ignore_cleanup_errors": True}  # Windows keeps weights that are mapped
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-", **options) as scratch:

            def tower(encoder, name):
                path = Path(scratch) / name
                encoder.save_pretrained(path)
                tokenizer.save_pretrained(path)
                modules = [Transformer(str(path)), Pooling(config.hidden_size, config.token)]
                if config.projection:
                    dense = Dense(config.hidden_size, config.hidden_size, False, nn.Identity())
                    dense.linear.weight.copy_(short.head.map.weight)
                    modules.append(dense)
                return [*modules, Normalize()] if config.normalize else modules

            modules = tower(short.encoder, "encoder")
            if not config.tied:
                modules = [Router.for_query_document(tower(short.query_encoder, "query"), modules)]
            plain = SentenceTransformer(
                modules=modules, prompts=settings.get("prompts"), similarity_fn_name=similarity, device="cpu"
            )
            plain.save_pretrained(str(Path(scratch) / "plain"))
            os.rename(Path(scratch) / "plain", folder)
        return folder


class MultiLayerTransformer(TrunkTransformer):
    """The stock Transformer around a MultiLayerModel, whose vectors are several for multi."""

    def on_model_ready(self, model):
        """Check that the family reads the output."""
        config = self.model.config
        _check_family(model, config, type(self).__name__)
        if model._similarity_fn_name is None and config.pooling != "multi":
            model.similarity_fn_name = config.similarity_fn_name


class MultiLayerPooling(HeadModule, Module):
    """The head behind any stock Transformer that returns its hidden states.

    With ``pooling="multi"`` the model is a MultiVectorEncoder, else a SentenceTransformer.

    Args:
        model: A head; default: a new one of these fields of MultiLayerHeadConfig.
        config: ``layers, pooling, token, normalize, pool_queries, projection, hidden_size``.
    """

    head_class, inside = MultiLayerHead, MultiLayerConfig.model_type
    reads = gives = "hidden_size"
    forward_kwargs = {"task"}

    def forward(self, features, task=None):
        """Pool a batch's hidden states into ``sentence_embedding``, or for multi into ``token_embeddings``."""
        config = self.model.config
        states = features.pop("all_layer_embeddings", None)
        deep = states is not None
        if not deep and (config.pools or not config.is_last(config.layers[0])):
            raise ValueError(
                f"MultiLayerPooling: the encoder gave no hidden states, so layers {config.layers} cannot be read. Put "
                "this module directly behind a Transformer whose model returns them, or use pooling='last' with "
                "layers=[-1]."
            )
        if "cu_seq_lens_q" in features:
            raise ValueError(
                "MultiLayerPooling: the encoder was fed without padding, so texts cannot be told apart. Load the "
                "Transformer with unpad_inputs=False."
            )
        chosen = [states[layer] for layer in config.layers] if deep else [features["token_embeddings"]]
        pooled = torch.stack([pool_tokens(s, features["attention_mask"], config.token) for s in chosen], 1)
        output = self.model(pooled, task=task, output_hidden_states=deep)
        if config.pooling == "multi":
            features["token_embeddings"], features["attention_mask"] = output.token_embeddings, output.mask
        else:
            features["sentence_embedding"] = output.sentence_embedding
        if deep:
            features["all_layer_embeddings"] = output.hidden_states
        return features

    def on_model_ready(self, model):
        """Check encoder and family, and let the encoder keep its hidden states if encoding needs them."""
        config, modules = self.model.config, list(model)
        before = modules[modules.index(self) - 1] if modules.index(self) else None
        encoder = getattr(before, "model", None)
        if not isinstance(encoder, PreTrainedModel):
            names = " + ".join(type(module).__name__ for module in modules)
            raise ValueError(
                f"MultiLayerPooling: stands in {names}, but reads hidden states, which only a Transformer before it "
                "gives. Use modules=[Transformer(backbone), MultiLayerPooling(...)]."
            )
        wanted = _check_family(model, config, "MultiLayerPooling")
        depth = getattr(encoder.config, "num_hidden_layers", None)
        width = getattr(encoder.config, "hidden_size", None)
        if depth is None or width is None:
            raise ValueError(
                f"MultiLayerPooling: {type(encoder).__name__} tells no num_hidden_layers and hidden_size, so its "
                "hidden states are not known. Use a text encoder such as BERT."
            )
        config.fit(depth, width)
        self.check_backbone(model)
        if keep_states not in before._forward_hooks.values():
            before.register_forward_pre_hook(keep_states)
            before.register_forward_hook(keep_states)
        if config.pools or not config.is_last(config.layers[0]):
            encoder.config.output_hidden_states = True
        if not config.normalize and wanted == "SentenceTransformer" and model._similarity_fn_name is None:
            model.similarity_fn_name = "dot"


def _check_family(model, config: MultiLayerHeadConfig, owner: str) -> str:
    """Name of the family that reads a head's output; ValueError if a model is of another."""
    wanted = "MultiVectorEncoder" if config.pooling == "multi" else "SentenceTransformer"
    if wanted not in [family.__name__ for family in type(model).__mro__]:
        raise ValueError(
            f"{owner}: pooling={config.pooling!r} in a {type(model).__name__}, which would read another output. Open "
            f"it as {wanted}, or train a run that is one, multilayer-minilm{'-multi' * (config.pooling == 'multi')}."
        )
    return wanted


def _of_backbone(model, config) -> dict:
    """Fields of a config with the backbone's pooling, normalisation, depth and width where they are not given."""
    token, normalize = MultiLayerModel.check_backbone(model)
    encoder = model[0].model.config
    known = {"num_hidden_layers": encoder.num_hidden_layers, "hidden_size": encoder.hidden_size}
    return unless_given(config, token=token, normalize=normalize) | known


for config, model in ((MultiLayerHeadConfig, MultiLayerHead), (MultiLayerConfig, MultiLayerModel)):
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModel")
