"""Gaussian: a text is a mean and a variance, and any inner-product index ranks by the divergence between two of them.

After Zamani and Bendersky, "Multivariate Representation Learning for Information Retrieval" (SIGIR 2023, arXiv
2304.14522). A query Q and a document D are normal distributions with diagonal covariance, and a score is -KL(Q||D).
An encoder reads ``[CLS] [VAR] text [SEP]``: the mean is a linear map of the text's state, the variance the softplus of
a linear map of the state of [VAR], a learned embedding that this model inserts by itself.

The paper's index vectors replace a trace by a ratio of determinants, which is another score and leaves the range of
floats. Ours are exact. In units of the variance at the start, m = mean / sqrt(v0) and r = variance / v0, and with n
dimensions in each of G groups that share a variance (n = 1 and G = k without groups)::

    query      [ 1     | sum over a group of m^2 + n r, less u  (G) | m      (k) ]
    document   [ gamma | 1 - 1 / r                              (G) | 2 m/r  (k) ] / 2
               gamma = -sum of log r - sum of m^2 (1 / r - 1) + u sum over groups of (1 - 1 / r)
               u = n + |m|^2 / G                        for means of unit length; else n, and m^2 / r in gamma

    -KL(Q||D) = query . document + what depends on Q alone: 1/2 sum of (1 + log r - m^2 - r), less 1/2 |m|^2 of D if
                that is the same for all

What all documents share is left out because it is large, so that a half-precision index would round the rest away, and
because a graph index (HNSW) would take documents with it for neighbours. So is u, what all queries have in their
second part before training: it would multiply differences between documents that gamma takes back, and a graph index
would see both as distance. Before training a document is [0 | 0 | m] and a query [1 | 0 | m], the backbone's own
vector. Other divergences factor in the same way.
"""

# mypy: ignore-errors
# Shipped: it speaks to transformers and torch through attributes that these type as Tensor | Module.

from __future__ import annotations

import bisect
import copy
import inspect
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, initialization
from transformers.utils import ModelOutput

from .polyrep_fields import NORM, WIDTH, check_weight, checked, config_of, fields_of, keep, unless_given
from .polyrep_folder import BESIDE_A_HEAD, WholeWeights, whole_encoder
from .polyrep_room import (
    EqualNorms,
    HeadModule,
    Module,
    SentenceTransformer,
    Transformer,
    check_score,
    pool_tokens,
    text_inputs,
    text_limit,
    warn_of_no_task,
)
from .polyrep_trunk import OF_VECTORS, Trunk, keep_trunk, pooled_parts, stock_parts

try:
    from sentence_transformers.sentence_transformer.modules import Pooling
except ImportError:  # only stock_modules makes one
    pass

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
        variance_groups (int): G equal groups of dimensions that share a variance each; 0 or null: none share.
        beta (float): Sharpness of the softplus. Also sets the variance at the start, log(2) / beta, which acts as the
            temperature of the score: about .05 for means of unit length.
        variance_floor (float): Added to every variance.
        divergence (str): kl, reverse_kl, likelihood (of the query's mean), w2 (Wasserstein, squared), csd (the closed
            form of sampled distances of PCME++), or dot: the mean alone, which is the control, whatever is said of
            the variance.
        separate_variance (bool): A map to the variance for queries, and one for documents. A query's variance hardly
            moves a ranking and can say how sure the query is; a document's weighs heavily.
        normalize_input (bool): Bring what is read to unit length first. Default: as the backbone does, else not.
        normalize_mean (bool): Bring means to unit length. Default: as the backbone does (``from_encoder``,
            ``from_backbone``, ``train``), else yes.
        equal_norms (bool): One more number of an index vector, by which all documents are equally long, so that cosine
            and L2 rank as the inner product does; see :class:`EqualNorms`. It counts in ``projection_dim``. Not with
            dot of means of unit length, which are that already.
        max_norm (float): The length that documents then have, which training measures. Longer ones are scaled back.
    """

    model_type = "polyrep_gaussian_head"
    # What follows from the backbone or from training, and is nobody's choice.
    derived = ("input_dim", "max_norm")
    similarity_fn_name = "dot"

    @checked(
        input_dim=WIDTH,
        mean_dim=WIDTH,
        projection_dim=(1, 2 * WIDTH[1] + 2),
        variance_groups=(0, WIDTH[1]),
        beta=(1e-6, 1e6),
        variance_floor=(1e-9, 1e6),
        divergence=_CHOICES["divergence"],
        max_norm=NORM,
    )
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
        normalize_input: bool | None = None,
        normalize_mean: bool | None = None,
        equal_norms: bool = False,
        max_norm: float | None = None,
        **kwargs,
    ):
        variance_groups = variance_groups or None
        normalize_input, normalize_mean = bool(normalize_input), normalize_mean is not False
        name = keep(self, locals())
        if divergence == "dot":
            self.variance_groups, self.separate_variance = None, False
            self.equal_norms = equal_norms and not normalize_mean
        self.mean_dim = self._mean_dim(mean_dim, projection_dim)
        check_weight(name, input_dim=input_dim, mean_dim=self.mean_dim)
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
        own = mean_dim + self.equal_norms
        if self.divergence in ("dot", "csd"):
            return own + (self.divergence == "csd")
        return own + (self.variance_groups or mean_dim) + 1

    def _mean_dim(self, mean_dim: int | None, projection_dim: int | None) -> int:
        """The number of dimensions that was asked for, by itself or by the width of the index."""
        name, groups = type(self).__name__, self.variance_groups
        step = groups or 1
        possible = range(step, min(self.input_dim, 2**31) + 1, step)
        rule = {"dot": "k", "csd": "k + 1"}.get(self.divergence, f"k + {groups} + 1" if groups else "2 k + 1")
        rule += " + 1" * self.equal_norms
        if mean_dim is None:
            wanted = self.input_dim if projection_dim is None else projection_dim
            fitting = bisect.bisect_right(possible, wanted, key=self._index_dim)
            mean_dim = possible[fitting - 1] if fitting else 0
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


class GaussianHead(EqualNorms, WholeWeights, PreTrainedModel):
    """The head: a linear map to the mean, and one to the variance, without bias (section 3.1 of the paper)."""

    config_class = GaussianHeadConfig
    _keys_to_ignore_on_load_unexpected = BESIDE_A_HEAD
    _supports_sdpa = _supports_flash_attn = True  # no attention here, whatever the encoder is asked for

    def __init__(self, config):
        super().__init__(config)
        self.mean_map = nn.Parameter(torch.empty(config.mean_dim, config.input_dim))
        if config.divergence != "dot":
            self.variance_map = nn.Parameter(torch.empty(config.groups, config.input_dim))
        if config.separate_variance:
            self.query_variance_map = nn.Parameter(torch.empty(config.groups, config.input_dim))
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, GaussianHead):  # ranks as the backbone does: its first dimensions, and one variance
            initialization.eye_(module.mean_map)
            for name in ("variance_map", "query_variance_map"):
                if hasattr(module, name):
                    initialization.zeros_(getattr(module, name))

    @classmethod
    def from_backbone(cls, model: SentenceTransformer, **config) -> GaussianHead:
        """An untrained head for any SentenceTransformer."""
        return cls(GaussianHeadConfig(**_as_backbone(model, config) | {"input_dim": model.get_embedding_dimension()}))

    @torch.no_grad()
    def align(self, moments: Tensor) -> None:
        """Start the mean at the leading principal axes of the backbone's vectors, which keeps most of their ranking.

        With as many dimensions as the input has there is nothing to choose, and the map stays the identity.

        Args:
            moments: ``(input_dim, input_dim)`` sum over texts of the products of a vector's values.
        """
        if self.config.mean_dim == self.config.input_dim:
            return
        axes = torch.linalg.eigh(moments.cpu().double())[1].flip(1)[:, : self.config.mean_dim]  # (input_dim, mean_dim)
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
            if not (self.training or torch.compiler.is_compiling() or torch.jit.is_tracing()):
                _refuse_not_finite(*([embedding] if wide is embedding else [embedding, wide]))
            if config.normalize_input:
                embedding, wide = F.normalize(embedding, dim=-1), F.normalize(wide, dim=-1)
            mean = F.linear(embedding, self.mean_map.to(exact))
            if config.normalize_mean:
                mean = F.normalize(mean, dim=-1)
            if config.divergence == "dot":
                return GaussianOutput(sentence_embedding=self.with_equal_norms(mean, task == "query"), mean=mean)
            warn_of_no_task(self, task)
            own = task == "query" and config.separate_variance
            linear = F.linear(wide, (self.query_variance_map if own else self.variance_map).to(exact))
            variance = F.softplus(linear, config.beta) + config.variance_floor
            index = self._index(mean, variance, task == "query")
            if self.training:  # every map takes part in every pass, as sharing gradients between processes asks for
                index = index + 0 * sum(parameter.sum() for parameter in self.parameters())
            return GaussianOutput(
                sentence_embedding=self.with_equal_norms(index, task == "query"),
                mean=mean,
                variance=variance,
                uncertainty=variance.log().sum(-1) * (config.mean_dim // config.groups / 2),
            )

    def _index(self, mean: Tensor, variance: Tensor, query: bool) -> Tensor:
        """Vectors ``(batch, dim)`` whose inner product is the score, less what depends on a query alone."""
        config, start = self.config, self.config.initial_variance
        size = config.mean_dim // config.groups

        def grouped(value):  # (batch, k) to (batch, groups)
            return value.unflatten(-1, (config.groups, size)).sum(-1)

        if config.divergence in ("w2", "csd"):
            length = mean.square().sum(-1, keepdim=True) - float(config.normalize_mean)
            spread = -length - size * (variance - start).sum(-1, keepdim=True)  # (batch, 1)
            shared = 0.0 if query else math.sqrt(start)
            deviation = (variance.sqrt() - shared) * (1 if query else 2 * size)
            first, last = (torch.ones_like(spread), mean) if query else (spread, 2 * mean)
            return torch.cat([first, last] if config.divergence == "csd" else [first, deviation, last], -1)
        mean, ratio = mean / math.sqrt(start), variance / start
        wide = ratio.repeat_interleave(size, -1)  # (batch, k)
        squares, moment = mean.square(), grouped(mean.square()) + size * ratio
        logs = size * ratio.log().sum(-1, keepdim=True)  # (batch, 1)
        one = torch.ones_like(logs)
        usual = (size if config.divergence == "kl" else 0) + float(config.normalize_mean) / start / config.groups
        match config.divergence, query:
            case "reverse_kl", True:
                parts = one, -1 / ratio, 2 * mean / wide
            case "reverse_kl", False:
                parts = logs / 2, (moment - size) / 2, mean / 2
            case _, True:
                parts = one, (moment if config.divergence == "kl" else grouped(squares)) - usual, mean
            case _:
                # Unit means have one length, which is taken out of gamma like everything that all documents share.
                gamma = -logs - (squares * (1 / wide - float(config.normalize_mean))).sum(-1, keepdim=True)
                gamma = gamma + usual * (1 - 1 / ratio).sum(-1, keepdim=True)
                parts = gamma / 2, (1 - 1 / ratio) / 2, mean / wide
        return torch.cat(parts, -1)

    def query_constant(self, query: GaussianOutput) -> Tensor:
        """What -KL(Q||D) has beyond the inner product of index vectors: ``(batch,)``, in nats, for kl alone.

        No ranking needs it. With it as one more coordinate, against a 1 of every document, an index gives -KL itself.
        """
        config, start = self.config, self.config.initial_variance
        size, ratio = config.mean_dim // config.groups, query.variance / start
        own = size * (1 + ratio.log() - ratio).sum(-1) - query.mean.square().sum(-1) / start
        return (own - float(config.normalize_mean) / start) / 2


class GaussianConfig(GaussianHeadConfig):
    """An encoder and the head in one.

    Args:
        encoder_config (dict): Config of the encoder.
        mean_from (str): What the mean reads: mean over the tokens, or cls, the first. Default: the backbone's own.
        variance_from (str): What the variance reads: var_token, a learned token in second place, or the same as the
            mean could: mean or cls. With divergence dot nothing is inserted.
        trunk (list): Modules behind the pooling, see :func:`keep_trunk`; with a var_token there are none.
        max_position_embeddings (int): Most tokens of a text: one less than the encoder takes if there is a var_token;
            -1 for no limit.
    """

    model_type = "polyrep_gaussian"
    sub_configs = {"encoder_config": AutoConfig}
    derived = (*GaussianHeadConfig.derived, "max_position_embeddings")

    @checked(
        mean_from=_CHOICES["mean_from"], variance_from=_CHOICES["variance_from"], max_position_embeddings=(-1, 2**31)
    )
    def __init__(
        self,
        encoder_config=None,
        mean_from: str | None = None,
        variance_from: str = "var_token",
        max_position_embeddings: int = -1,
        trunk=None,
        **kwargs,
    ):
        name = type(self).__name__
        kwargs["input_dim"] = keep_trunk(self, config_of(encoder_config, name), trunk, OF_VECTORS)
        self.mean_from, self.variance_from = mean_from or "mean", variance_from
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**kwargs)
        if self.divergence == "dot":
            self.variance_from = self.mean_from
        if self.trunk and self.variance_from == "var_token":
            raise ValueError(
                f"{name}: variance_from='var_token' reads the encoder's own states, but the mean stands behind "
                f"{len(self.trunk)} modules of the trunk. Use variance_from={self.mean_from!r}."
            )


class GaussianModel(WholeWeights, Trunk, PreTrainedModel):
    """Encoder, the embedding of [VAR] and the head in one state dict; ``task`` says which side of a score a text is.

    [VAR] is inserted as an embedding, so tokenizer and vocabulary stay the backbone's.
    """

    config_class = GaussianConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config):
        super().__init__(config)
        self.add_trunk(config)
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
        return cls.from_modules(SentenceTransformer(str(backbone), device="cpu"), head, **config)

    @classmethod
    def from_modules(cls, model, head: GaussianHead | None = None, **config) -> GaussianModel:
        """Likewise of an opened SentenceTransformer."""
        pooling, normalize, trunk, maps = cls.check_backbone(model)
        if head is not None:
            config = fields_of(head.config) | {"variance_from": pooling} | config
            if normalize and not head.config.normalize_input:  # else the head does it
                trunk = [{"type": "Normalize"}]
        config = unless_given(_as_backbone(model, config), mean_from=pooling)
        encoder = whole_encoder(model[0].model, cls.__name__)
        whole = cls(GaussianConfig(encoder_config=encoder.config, trunk=trunk, **config))
        whole.take_trunk(encoder, maps)
        limit = text_limit(encoder)
        whole.config.max_position_embeddings = limit - (limit > -1 and hasattr(whole, "var_embedding"))
        if hasattr(whole, "var_embedding"):
            whole._check_embeddings()
            with torch.no_grad():  # as unlike any word, and as little in the way, as can be
                whole.var_embedding.copy_(encoder.get_input_embeddings().weight.mean(0))
        if head is not None:
            whole.head.load_state_dict(head.state_dict())
        return whole.to(encoder.dtype)

    @staticmethod
    def check_backbone(model: SentenceTransformer) -> tuple:
        """See :func:`pooled_parts`."""
        remedy = "Put the head behind it: SentenceTransformer(modules=[*backbone.children(), GaussianPooling(...)]), "
        return pooled_parts(model, "GaussianModel", _CHOICES["mean_from"], remedy + "or --pipeline.")

    def stock_modules(self, tokenizer) -> list:
        """What stands between encoder and head, as modules of sentence-transformers; ValueError where it is none."""
        if hasattr(self, "var_embedding") or self.config.variance_from != self.config.mean_from:
            raise ValueError(
                f"GaussianModel: variance_from={self.config.variance_from!r} is no vector that stock modules give. "
                "Keep it as one folder."
            )
        pooling = Pooling(self.config.encoder_config.hidden_size, self.config.mean_from)
        return [pooling, *stock_parts(self, tokenizer, "sentence_embedding")]

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
        config, inputs = self.config, text_inputs(input_ids, attention_mask, token_type_ids)
        tokens, limit, mask = input_ids.shape[1], config.max_position_embeddings, inputs["attention_mask"]
        if -1 < limit < tokens:
            raise ValueError(
                f"GaussianModel: a text of {tokens} tokens, but the encoder has room for {limit}"
                f"{' and [VAR]' if hasattr(self, 'var_embedding') else ''} (max_position_embeddings). Cut texts: "
                f"tokenizer(..., truncation=True, max_length={limit})."
            )
        if hasattr(self, "var_embedding"):
            place = torch.arange(2 * tokens, device=mask.device)
            order = torch.where(mask == 0, place[tokens:], place[:tokens]).argsort(dim=1)  # padding last: of texts
            input_ids = input_ids.gather(1, order)  # padded on the left, too, the first place is the text's own then
            inputs = {name: value.gather(1, order) for name, value in inputs.items()}
            mask = inputs["attention_mask"]
            embedded = self.encoder.get_input_embeddings()(input_ids)
            inserted = self.var_embedding.to(embedded.dtype).expand(embedded.shape[0], 1, -1)
            embedded = torch.cat([embedded[:, :1], inserted, embedded[:, 1:]], 1)  # (batch, tokens + 1, width)
            inputs = {name: torch.cat([value[:, :1], value], 1) for name, value in inputs.items()}
            states = self.encoder(inputs_embeds=embedded, **inputs).last_hidden_state
            wide = states[:, 1]
            states = torch.cat([states[:, :1], states[:, 2:]], 1)
        else:
            states = self.encoder(input_ids=input_ids, **inputs).last_hidden_state
            wide = pool_tokens(states, mask, config.variance_from)
        mean = self.behind(pool_tokens(states, mask, config.mean_from))
        return self.head(mean, self.behind(wide) if config.trunk else wide, task=task)

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
        """Refuse a score other than the inner product, and leave room for [VAR]."""
        _check_score(model, type(self).__name__, self.model.config)
        limit = self.model.config.max_position_embeddings
        if limit > -1:  # the backbone's own length may be all that its encoder takes
            self.max_seq_length = min(self.max_seq_length or limit, limit)


class GaussianPooling(HeadModule, Module):
    """The head behind any modules that leave one vector a text, which then gives both mean and variance.

    Args:
        model: A head; default: a new one of these fields of GaussianHeadConfig.
        config: ``input_dim, mean_dim, projection_dim, variance_groups, beta, variance_floor, divergence,
            separate_variance, normalize_input, normalize_mean, equal_norms, max_norm``.
    """

    head_class, inside = GaussianHead, GaussianConfig.model_type
    forward_kwargs = {"task"}

    def forward(self, features, task=None):
        """Replace ``sentence_embedding`` by the index vector, beside ``mean``, ``variance`` and ``uncertainty``."""
        features.update(self.model(features["sentence_embedding"], task=task))
        return features

    def on_model_ready(self, model):
        """Check what stands before and how the model scores; the inner product is set where nothing is."""
        self.check_backbone(model)
        self.check_last(model, "their product is no divergence")
        _check_score(model, type(self).__name__, self.model.config)


def _check_score(model, owner: str, config: GaussianHeadConfig) -> None:
    because = "a divergence is the inner product of its index vectors and of nothing else"
    check_score(
        model, owner, because, "cut terms out of the divergence. Train a head with a smaller mean_dim.", config
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


def _as_backbone(model, config: dict) -> dict:
    """Fields of a config that normalises where the backbone does, by a module or by its score."""
    unit = any(type(module).__name__ == "Normalize" for module in model) or model.similarity_fn_name == "cosine"
    return unless_given(config, normalize_input=unit, normalize_mean=unit)


for config, model in ((GaussianHeadConfig, GaussianHead), (GaussianConfig, GaussianModel)):
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModel")
