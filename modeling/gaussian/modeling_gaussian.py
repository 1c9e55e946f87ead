"""Gaussian: a text is a mean and a variance, and any inner-product index ranks by the divergence between two of them.

After Zamani and Bendersky, "Multivariate Representation Learning for Information Retrieval" (SIGIR 2023, arXiv
2304.14522). A query Q and a document D are normal distributions with diagonal covariance, and a score is -KL(Q||D).
An encoder reads ``[CLS] [VAR] text [SEP]``: the mean is a linear map of the text's state, the variance the softplus of
a linear map of the state of [VAR], a learned embedding that this model inserts by itself.

The paper's index vectors replace a trace by a ratio of determinants, which is another score and leaves the range of
floats. Ours are exact. With n dimensions in each of G groups that share a variance (n = 1 and G = k without groups):

    query      [ 1     | sum over a group of mean^2 + n variance  (G) | mean               (k) ]
    document   [ gamma | -1 / variance                            (G) | 2 mean / variance  (k) ] / 2
               gamma = - sum of n log(variance / v0) + sum over a group of mean^2 / variance

    -KL(Q||D) = query . document + 1/2 sum of (1 + log(variance_Q / v0))

The last sum is the same for all documents. So is v0, the variance at the start, which is taken out of gamma because
a half-precision index would round what is left of it away. Other divergences factor in the same way.
"""

from __future__ import annotations

import copy
import inspect
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    PretrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.utils import ModelOutput

try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Module, Transformer
except ImportError:  # AutoModel works without sentence-transformers
    SentenceTransformer, Module, Transformer = None, nn.Module, nn.Module

_CHOICES = {
    "divergence": ("kl", "reverse_kl", "likelihood", "w2", "csd", "dot"),
    "mean_from": ("mean", "cls"),
    "variance_from": ("var_token", "mean", "cls"),
}


class GaussianHeadConfig(PretrainedConfig):
    """How a vector becomes a mean and a variance, and what these score by.

    Args:
        input_dim (int): Width of the vectors that are read.
        mean_dim (int): Dimensions k of the distribution. Default: as many as an index no wider than the input allows.
        projection_dim (int): Width of the index vectors, which follows from ``mean_dim`` and may be given instead.
        variance_groups (int): G equal groups of dimensions that share a variance each; default: none share.
        beta (float): Sharpness of the softplus. Also sets the variance at the start, log(2) / beta, which acts as the
            temperature of the score: about .05 for means of unit length.
        variance_floor (float): Added to every variance.
        divergence (str): kl, reverse_kl, likelihood (of the query's mean), w2 (Wasserstein, squared), csd (the closed
            form of sampled distances of PCME++), or dot: the mean alone, which is the control.
        separate_variance (bool): A map to the variance for queries, and one for documents. A query's variance hardly
            moves a ranking and can say how sure the query is; a document's weighs heavily.
        normalize_mean (bool): Bring means to unit length. Default: as the backbone does (``from_encoder``,
            ``from_backbone``, ``train``), else yes.
        base_model_id (str): The backbone whose vectors the head was trained on, with revision and fingerprint.
        base_revision (str): Its commit on the Hub.
        base_fingerprint (str): SHA-256 over its weight files and module configs.
    """

    model_type = "polyrep_gaussian_head"
    # What follows from the backbone, and is nobody's choice.
    derived = ("input_dim", "base_model_id", "base_revision", "base_fingerprint")
    similarity_fn_name = "dot"

    def __init__(
        self,
        input_dim: int = 384,
        mean_dim: int | None = None,
        projection_dim: int | None = None,
        variance_groups: int | None = None,
        beta: float = 14.0,
        variance_floor: float = 1e-3,
        divergence: str = "kl",
        separate_variance: bool = False,
        normalize_mean: bool | None = None,
        base_model_id: str | None = None,
        base_revision: str | None = None,
        base_fingerprint: str | None = None,
        **kwargs,
    ):
        name = type(self).__name__
        for field, value, optional in (
            ("input_dim", input_dim, False),
            ("mean_dim", mean_dim, True),
            ("projection_dim", projection_dim, True),
            ("variance_groups", variance_groups, True),
        ):
            if not (optional and value is None) and (type(value) is not int or value < 1):
                raise ValueError(f"{name}: {field}={value!r} is no number of dimensions. Use 1 or more.")
        for field, value in (("beta", beta), ("variance_floor", variance_floor)):
            if not 0 < value < math.inf:
                raise ValueError(
                    f"{name}: {field}={value}: a variance could be zero, and scores divide by it. Use more than 0, "
                    f"e.g. {14 if field == 'beta' else 1e-3}."
                )
        _check_choice(name, "divergence", divergence)
        for field, value in (("variance_groups", variance_groups), ("separate_variance", separate_variance)):
            if value and divergence == "dot":
                raise ValueError(f"{name}: {field}={value} with divergence='dot', which has no variance.")
        self.input_dim, self.variance_groups, self.divergence = input_dim, variance_groups, divergence
        self.beta, self.variance_floor, self.separate_variance = beta, variance_floor, separate_variance
        self.normalize_mean = normalize_mean is not False
        self.base_model_id, self.base_revision, self.base_fingerprint = base_model_id, base_revision, base_fingerprint
        self.mean_dim = self._mean_dim(mean_dim, projection_dim)
        self.projection_dim = self._index_dim(self.mean_dim)
        super().__init__(**kwargs)

    @property
    def groups(self) -> int:
        """How many variances a text has."""
        return self.variance_groups or self.mean_dim

    @property
    def initial_variance(self) -> float:
        """The variance v0 of every text before training, when the map is zero."""
        return math.log(2) / self.beta + self.variance_floor

    def _index_dim(self, mean_dim: int) -> int:
        """Width of an index vector of a distribution of so many dimensions."""
        if self.divergence in ("dot", "csd"):
            return mean_dim + (self.divergence == "csd")
        return mean_dim + (self.variance_groups or mean_dim) + 1

    def _mean_dim(self, mean_dim: int | None, projection_dim: int | None) -> int:
        """The number of dimensions that was asked for, by itself or by the width of the index."""
        name, groups = type(self).__name__, self.variance_groups
        step = groups or 1
        possible = [k for k in range(step, self.input_dim + 1, step)]
        rule = {"dot": "k", "csd": "k + 1"}.get(self.divergence, f"k + {groups} + 1" if groups else "2 k + 1")
        if mean_dim is None:
            wanted = self.input_dim if projection_dim is None else projection_dim
            fitting = [k for k in possible if self._index_dim(k) <= wanted]
            mean_dim = fitting[-1] if fitting else 0
            if not fitting or projection_dim not in (None, self._index_dim(mean_dim)):
                near = [k for k in (mean_dim, mean_dim + step) if k in possible] or possible[:1]
                remedy = " or ".join(f"{self._index_dim(k)} (mean_dim={k})" for k in near) or "fewer groups"
                raise ValueError(
                    f"{name}: no mean_dim up to input_dim={self.input_dim} gives an index of {wanted} dimensions, "
                    f"which divergence={self.divergence!r} with variance_groups={groups} makes of {rule}. "
                    f"Use {remedy}."
                )
        if mean_dim > self.input_dim:
            raise ValueError(
                f"{name}: mean_dim={mean_dim} of input_dim={self.input_dim}: a linear map makes no dimensions. Use "
                f"{self.input_dim} or fewer."
            )
        if mean_dim % step:
            raise ValueError(
                f"{name}: variance_groups={groups} does not divide mean_dim={mean_dim}, so groups would be uneven. "
                f"Use mean_dim={max(step, mean_dim - mean_dim % step)}."
            )
        if projection_dim not in (None, self._index_dim(mean_dim)):
            raise ValueError(
                f"{name}: mean_dim={mean_dim} with variance_groups={groups} gives an index of {rule} = "
                f"{self._index_dim(mean_dim)} dimensions, not projection_dim={projection_dim}. Leave one of them out."
            )
        return mean_dim


@dataclass
class GaussianOutput(ModelOutput):
    """A text as a distribution, and as a vector of an index.

    Attributes:
        sentence_embedding: ``(batch, projection_dim)`` for an index by inner product, in float32 at least. Queries and
            documents have different ones.
        mean: ``(batch, k)``.
        variance: ``(batch, k)``, or ``(batch, groups)``; the dimensions of a group are side by side.
        uncertainty: ``(batch,)`` half the sum of the log variances, in nats: the entropy, up to a constant.
    """

    sentence_embedding: Tensor | None = None
    mean: Tensor | None = None
    variance: Tensor | None = None
    uncertainty: Tensor | None = None


class GaussianHead(PreTrainedModel):
    """The head: a linear map to the mean, and one to the variance, without bias (section 3.1 of the paper)."""

    config_class = GaussianHeadConfig
    _supports_sdpa = _supports_flash_attn = True  # no attention here, whatever the encoder is asked for

    def __init__(self, config):
        super().__init__(config)
        self.mean_map = nn.Parameter(torch.empty(config.mean_dim, config.input_dim))
        self.variance_map = nn.Parameter(torch.empty(config.groups, config.input_dim))
        if config.separate_variance:
            self.query_variance_map = nn.Parameter(torch.empty(config.groups, config.input_dim))
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, GaussianHead):  # ranks as the backbone does: its first dimensions, and one variance
            initialization.eye_(module.mean_map)
            initialization.zeros_(module.variance_map)
            if module.config.separate_variance:
                initialization.zeros_(module.query_variance_map)

    @classmethod
    def from_backbone(cls, model: SentenceTransformer, **config) -> GaussianHead:
        """An untrained head for any SentenceTransformer."""
        normalizes = any(type(module).__name__ == "Normalize" for module in model)
        config["normalize_mean"] = normalizes if config.get("normalize_mean") is None else config["normalize_mean"]
        return cls(GaussianHeadConfig(**config | {"input_dim": model.get_embedding_dimension()}))

    @torch.no_grad()
    def align(self, embeddings: Tensor) -> None:
        """Start the mean at the leading principal axes of the backbone's vectors, which keeps most of their ranking.

        With as many dimensions as the input has there is nothing to choose, and the map stays the identity.

        Args:
            embeddings: ``(texts, input_dim)``, or their second moments ``(input_dim, input_dim)``.
        """
        if self.config.mean_dim == self.config.input_dim:
            return
        moments = embeddings.double()
        moments = (
            moments if len(moments) == len(moments.T) and torch.equal(moments, moments.T) else moments.T @ moments
        )
        axes = torch.linalg.eigh(moments)[1].flip(1)[:, : self.config.mean_dim]  # (input_dim, mean_dim)
        signs = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # the same on every machine
        self.mean_map.copy_((axes * signs).T)

    def forward(
        self,
        sentence_embedding: Tensor,
        variance_embedding: Tensor | None = None,
        task: str | None = None,
        **kwargs,
    ) -> GaussianOutput:
        """Distributions and index vectors.

        Args:
            sentence_embedding: ``(batch, input_dim)`` what the mean is made of.
            variance_embedding: ``(batch, input_dim)`` what the variance is made of; default: the same.
            task: "query", else a document.
            kwargs: Ignored.

        Raises:
            ValueError: A value is not finite.
        """
        config = self.config
        exact = torch.promote_types(sentence_embedding.dtype, torch.float32)  # gamma overflows half precision
        with torch.autocast(sentence_embedding.device.type, enabled=False):
            embedding = sentence_embedding.to(exact)
            wide = embedding if variance_embedding is None else variance_embedding.to(exact)
            if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
                _refuse_not_finite(embedding, wide)
            mean = F.linear(embedding, self.mean_map.to(exact))
            if config.normalize_mean:
                mean = F.normalize(mean, dim=-1)
            if config.divergence == "dot":
                return GaussianOutput(sentence_embedding=mean, mean=mean)
            own = task == "query" and config.separate_variance
            linear = F.linear(wide, (self.query_variance_map if own else self.variance_map).to(exact))
            variance = F.softplus(linear, config.beta) + config.variance_floor
            return GaussianOutput(
                sentence_embedding=self._index(mean, variance, task == "query"),
                mean=mean,
                variance=variance,
                uncertainty=variance.log().sum(-1) * (config.mean_dim // config.groups / 2),
            )

    def _index(self, mean: Tensor, variance: Tensor, query: bool) -> Tensor:
        """Vectors ``(batch, projection_dim)`` whose inner product is the score, less what depends on a query alone."""
        config = self.config
        size = config.mean_dim // config.groups
        wide = variance.repeat_interleave(size, -1)  # (batch, k)

        def grouped(value):  # (batch, k) to (batch, groups)
            return value.unflatten(-1, (config.groups, size)).sum(-1)

        squares = mean.square()
        logs = size * (variance / config.initial_variance).log().sum(-1, keepdim=True)  # (batch, 1)
        spread = squares.sum(-1, keepdim=True) + size * variance.sum(-1, keepdim=True)
        one = torch.ones_like(logs)
        match config.divergence, query:
            case "kl", True:
                parts = one, grouped(squares) + size * variance, mean
            case "likelihood", True:
                parts = one, grouped(squares), mean
            case "kl" | "likelihood", False:
                gamma = -logs - (squares / wide).sum(-1, keepdim=True)
                parts = gamma / 2, -0.5 / variance, mean / wide
            case "reverse_kl", True:
                parts = one / 2, -0.5 / variance, mean / wide
            case "reverse_kl", False:
                parts = logs, grouped(squares) + size * variance, mean
            case "w2", True:
                parts = one, variance.sqrt(), mean
            case "w2", False:
                parts = -spread, 2 * size * variance.sqrt(), 2 * mean
            case "csd", True:
                parts = one, mean
            case _:
                parts = -spread, 2 * mean
        return torch.cat(parts, -1)


class GaussianConfig(GaussianHeadConfig):
    """An encoder and the head in one.

    Args:
        encoder_config (dict): Config of the encoder.
        mean_from (str): What the mean reads: mean over the tokens, or cls, the first. Default: the backbone's own.
        variance_from (str): What the variance reads: var_token, a learned token in second place, or the same as the
            mean could: mean or cls.
        normalize_input (bool): Bring both to unit length before the maps. Default: as the backbone does.
        max_position_embeddings (int): Most tokens of a text: one less than the encoder takes if there is a var_token;
            -1 for no limit.
    """

    model_type = "polyrep_gaussian"
    sub_configs = {"encoder_config": AutoConfig}
    derived = (*GaussianHeadConfig.derived, "max_position_embeddings")

    def __init__(
        self,
        encoder_config=None,
        mean_from: str | None = None,
        variance_from: str = "var_token",
        normalize_input: bool | None = None,
        max_position_embeddings: int = -1,
        **kwargs,
    ):
        if isinstance(encoder_config, dict):
            encoder_config = AutoConfig.for_model(**encoder_config)
        self.encoder_config = encoder_config or AutoConfig.for_model("bert")
        self.mean_from, self.variance_from = mean_from or "mean", variance_from
        self.normalize_input, self.max_position_embeddings = bool(normalize_input), max_position_embeddings
        for field in ("mean_from", "variance_from"):
            _check_choice(type(self).__name__, field, getattr(self, field))
        kwargs["input_dim"] = self.encoder_config.hidden_size
        super().__init__(**kwargs)


class GaussianModel(PreTrainedModel):
    """Encoder, the embedding of [VAR] and the head in one state dict; ``task`` says which side of a score a text is.

    [VAR] is inserted as an embedding, so tokenizer and vocabulary stay the backbone's.
    """

    config_class = GaussianConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config):
        super().__init__(config)
        encoders = (
            AutoModelForTextEncoding if type(config.encoder_config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
        )
        self.encoder = encoders.from_config(config.encoder_config)
        self.head = GaussianHead(config)
        if config.variance_from == "var_token":
            if "inputs_embeds" not in inspect.signature(self.encoder.forward).parameters:
                raise ValueError(_no_embeddings(self.encoder, "takes none"))
            self.var_embedding = nn.Parameter(torch.empty(self.encoder.get_input_embeddings().embedding_dim))
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, GaussianModel) and hasattr(module, "var_embedding"):
            initialization.zeros_(module.var_embedding)

    @classmethod
    def from_encoder(cls, backbone: str, head: GaussianHead | None = None, **config) -> GaussianModel:
        """A model from any embedding model that is a transformer, one pooling and perhaps a normalisation.

        Args:
            backbone: Folder or Hub id of a SentenceTransformer, or of a bare encoder.
            head: A head trained on its pooled vectors, which then also give the variance; default: an untrained one.
            config: Fields of GaussianConfig.

        Raises:
            ValueError: The backbone has modules that one folder of this kind cannot hold, or takes no embeddings.
        """
        model = SentenceTransformer(str(backbone), device="cpu")
        pooling, normalizes = cls.check_backbone(model)
        own = {"mean_from": pooling, "normalize_input": normalizes, "normalize_mean": normalizes}
        if head is not None:
            known = GaussianHeadConfig().to_dict().keys() - PretrainedConfig().to_dict().keys()
            config = {name: getattr(head.config, name) for name in known} | {"variance_from": pooling} | config
        config |= {name: value for name, value in own.items() if config.get(name) is None}
        encoder = model[0].model
        config["max_position_embeddings"] = _text_limit(encoder, config.get("variance_from", "var_token"))
        whole = cls(GaussianConfig(encoder_config=encoder.config, **config))
        whole.encoder = encoder
        if hasattr(whole, "var_embedding"):
            whole._check_embeddings()
            with torch.no_grad():  # as unlike any word, and as little in the way, as can be
                whole.var_embedding.copy_(encoder.get_input_embeddings().weight.mean(0))
        if head is not None:
            whole.head.load_state_dict(head.state_dict())
        return whole.to(encoder.dtype)

    @staticmethod
    def check_backbone(model: SentenceTransformer) -> tuple[str, bool]:
        """Pooling of a SentenceTransformer and whether it normalises; ValueError if it does more than that."""
        names = [type(module).__name__ for module in model]
        pooled = names[:2] == ["Transformer", "Pooling"]
        pooling = model[1].pooling_mode if pooled else None
        plain = pooled and model[1].include_prompt and not getattr(model[0], "do_lower_case", False)
        if not plain or pooling not in _CHOICES["mean_from"] or names[2:] not in ([], ["Normalize"]):
            raise ValueError(
                f"GaussianModel: the backbone is {' + '.join(names)} with pooling {pooling!r}, and one folder of this "
                "kind holds a transformer and one pooling, mean or cls. Put the head behind it instead: "
                "SentenceTransformer(modules=[*backbone.children(), GaussianPooling(...)]), or --pipeline."
            )
        return pooling, names[2:] == ["Normalize"]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        task: str | None = None,
        **kwargs,
    ) -> GaussianOutput:
        """Distributions and index vectors of texts.

        Args:
            input_ids: ``(batch, tokens)``.
            attention_mask: ``(batch, tokens)``; default: all tokens count.
            token_type_ids: ``(batch, tokens)``, for encoders that know them.
            task: "query", else a document.
            kwargs: Ignored; what other retrievers read.

        Raises:
            ValueError: A text is longer than the encoder has room for.
        """
        config = self.config
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        tokens, limit = input_ids.shape[1], config.max_position_embeddings
        if -1 < limit < tokens:
            raise ValueError(
                f"GaussianModel: a text of {tokens} tokens, but the encoder has room for {limit}"
                f"{' and [VAR]' if hasattr(self, 'var_embedding') else ''}. Cut texts: "
                f"tokenizer(..., truncation=True, max_length={limit})."
            )
        inputs = {"attention_mask": mask} | ({} if token_type_ids is None else {"token_type_ids": token_type_ids})
        if hasattr(self, "var_embedding"):
            if not mask[:, :1].all():  # padded on the left: the first place must be the text's own
                order = mask.argsort(dim=1, descending=True, stable=True)
                input_ids = input_ids.gather(1, order)
                inputs = {name: value.gather(1, order) for name, value in inputs.items()}
                mask = inputs["attention_mask"]
            embedded = self.encoder.get_input_embeddings()(input_ids)
            inserted = self.var_embedding.to(embedded.dtype).expand(len(embedded), 1, -1)
            embedded = torch.cat([embedded[:, :1], inserted, embedded[:, 1:]], 1)  # (batch, tokens + 1, width)
            inputs = {name: torch.cat([value[:, :1], value], 1) for name, value in inputs.items()}
            states = self.encoder(inputs_embeds=embedded, **inputs).last_hidden_state
            wide = states[:, 1]
            states = torch.cat([states[:, :1], states[:, 2:]], 1)
        else:
            states = self.encoder(input_ids=input_ids, **inputs).last_hidden_state
            wide = _pool_tokens(states, mask, config.variance_from)
        pooled = _pool_tokens(states, mask, config.mean_from)
        if config.normalize_input:
            pooled, wide = F.normalize(pooled, dim=-1), F.normalize(wide, dim=-1)
        return self.head(pooled, wide, task=task)

    @torch.no_grad()
    def _check_embeddings(self) -> None:
        """ValueError if the encoder does not read embeddings as it reads their tokens."""
        encoder = copy.deepcopy(self.encoder).eval()
        ids = torch.arange(6, device=self.encoder.device).view(1, 6) + 5
        try:
            embedded = encoder.get_input_embeddings()(ids)
            found = encoder(inputs_embeds=embedded, attention_mask=torch.ones_like(ids)).last_hidden_state
        except Exception as error:
            raise ValueError(_no_embeddings(encoder, f"refuses them ({error})")) from error
        expected = encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        if not torch.allclose(found.float(), expected.float(), 1e-2, 1e-2):
            raise ValueError(_no_embeddings(encoder, "reads them otherwise than their tokens"))


class GaussianTransformer(Transformer):
    """The stock Transformer around a GaussianModel, in a model that must not score or cut its vectors otherwise."""

    def on_model_ready(self, model):
        """Refuse a score other than the inner product."""
        _check_score(model, self.model.config)


class GaussianPooling(Module):
    """The head behind any modules that leave one vector a text, which then gives both mean and variance.

    Args:
        model: A head; default: a new one of these fields of GaussianHeadConfig.
        config: ``input_dim, mean_dim, projection_dim, variance_groups, beta, variance_floor, divergence,
            separate_variance, normalize_mean``.
    """

    forward_kwargs = {"task"}

    def __init__(self, model: GaussianHead | None = None, **config):
        super().__init__()
        self.model = GaussianHead(GaussianHeadConfig(**config)) if model is None else model

    def forward(self, features, task=None):
        """Replace ``sentence_embedding`` by the index vector, beside ``mean``, ``variance`` and ``uncertainty``."""
        features.update(self.model(features["sentence_embedding"], task=task))
        return features

    def on_model_ready(self, model):
        """Check what stands before and how the model scores; the inner product is set where nothing is."""
        before = list(model)[: list(model).index(self)]
        widths = [module.get_embedding_dimension() for module in before if hasattr(module, "get_embedding_dimension")]
        width, config = next((w for w in reversed(widths) if w), None), self.model.config
        if width not in (None, config.input_dim):
            raise ValueError(
                f"GaussianPooling: input_dim={config.input_dim}, but what stands before it gives vectors of {width}. "
                f"Use the backbone it was trained on ({config.base_model_id or 'not recorded'}), or "
                f"GaussianPooling(input_dim={width}, ...)."
            )
        _check_score(model, config)

    def get_embedding_dimension(self):
        """Width of the index vectors."""
        return self.model.config.projection_dim

    def save(self, output_path, *args, **kwargs):
        """Write the head as a folder of its own, and this code to the folder above, where it is looked for."""
        self.model.save_pretrained(output_path)
        shutil.copy(sys.modules[type(self).__module__].__file__, Path(output_path).parent)

    @classmethod
    def load(cls, model_name_or_path, subfolder="", **kwargs):
        """Open a head's folder or repository, or the module folder of a saved pipeline."""
        kept = {k: v for k, v in kwargs.items() if k in ("revision", "token", "local_files_only")}
        kept["cache_dir"] = kwargs.get("cache_folder")
        return cls(GaussianHead.from_pretrained(model_name_or_path, subfolder=subfolder, **kept))

    from_pretrained = load


def _check_choice(name: str, field: str, value: str) -> None:
    if value not in _CHOICES[field]:
        raise ValueError(f"{name}: {field}={value!r} is unknown. Use one of {', '.join(_CHOICES[field])}.")


def _check_score(model, config) -> None:
    """Let a model score by the inner product, and refuse what would give another ranking."""
    if model._similarity_fn_name is None:
        model.similarity_fn_name = "dot"
    if model.similarity_fn_name != "dot":
        raise ValueError(
            f"{config.model_type}: similarity_fn_name={model.similarity_fn_name!r}, but a divergence is the inner "
            "product of its index vectors and of nothing else. Leave it out, or use 'dot'."
        )
    if model.truncate_dim is not None:
        raise ValueError(
            f"{config.model_type}: truncate_dim={model.truncate_dim} would cut terms out of the divergence. Train a "
            "head with a smaller mean_dim instead."
        )


def _refuse_not_finite(*embeddings: Tensor) -> None:
    """ValueError that names the first text of a batch whose vector is not finite."""
    for vectors in embeddings:
        bad = ~torch.isfinite(vectors).all(-1)
        if bad.any():
            raise ValueError(
                f"GaussianHead: the vector of text {int(bad.int().argmax())} of the batch is not finite, so neither "
                "would be its distribution. Encode in float32 or bfloat16; if it stays, the backbone is broken."
            )


def _no_embeddings(encoder, why: str) -> str:
    return (
        f"GaussianModel: [VAR] enters through inputs_embeds, and {type(encoder).__name__} {why}. Use "
        "variance_from='mean', or put the head behind the backbone: "
        "SentenceTransformer(modules=[*backbone.children(), GaussianPooling(...)])."
    )


def _text_limit(encoder, variance_from: str) -> int:
    """Most tokens of a text: the encoder's positions less those of padding (RoBERTa) and [VAR]; -1 for no limit."""
    positions = getattr(encoder.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 0:
        return -1
    for module in encoder.modules():
        if isinstance(getattr(module, "position_embeddings", None), nn.Embedding):
            padding = getattr(module, "padding_idx", None)
            positions -= padding + 1 if isinstance(padding, int) else 0
    return positions - (variance_from == "var_token")


def _pool_tokens(states: Tensor, mask: Tensor, token: str) -> Tensor:
    """States ``(batch, tokens, dim)`` to a vector each, as the stock Pooling does."""
    if token == "cls":  # the first token that counts: not the first column where texts are padded on the left
        return states[torch.arange(len(states), device=states.device), mask.to(torch.int32).argmax(1)]
    weights = mask[..., None].to(states.dtype)  # (batch, tokens, 1)
    exact = torch.promote_types(states.dtype, torch.float32)
    total = (states * weights).sum(1, dtype=exact)
    return (total / weights.sum(1, dtype=exact).clamp(min=1e-9)).to(states.dtype)


for config, model in ((GaussianHeadConfig, GaussianHead), (GaussianConfig, GaussianModel)):
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModel")
