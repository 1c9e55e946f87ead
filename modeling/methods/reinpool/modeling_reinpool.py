"""ReinPool: hundreds of token vectors of a document become one, or k, after a learned filter has chosen among them.

After Cha et al., "ReinPool: Reinforcement Learning Pooling Multi-Vector Embeddings for Retrieval System" (2026, arXiv
2601.07125): a small transformer decides for each token vector of a frozen late-interaction model whether it is kept,
and what is kept is averaged. The paper publishes neither its algorithm in full nor code; where this code is its own:

- Many vectors: the kept vectors are clustered, since one mean of several topics is none of them. MaxSim against one
  vector is the dot product with the sum of the query's vectors, so one vector per document serves any dense index.
- ``projection`` learns which directions matter. It acts on both sides while training and is then folded into the
  documents, <Aq, u> = <q, A'u>, so that queries stay as they are.
- ``refinement`` lets each pooled vector look back at the tokens once more and move. It starts as no change at all.
"""

# mypy: ignore-errors
# Shipped: it speaks to transformers and torch through attributes that these type as Tensor | Module.

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, initialization
from transformers.utils import ModelOutput

from .polyrep_fields import LAYERS, NORM, WIDTH, check_weight, checked, keep
from .polyrep_folder import BESIDE_A_HEAD, WholeWeights
from .polyrep_room import EqualNorms, TokenPoolingModule, check_score, warn_of_no_task
from .polyrep_trunk import Trunk, TrunkTransformer, keep_trunk

_CHOICES = {
    "output": ("token_embeddings", "sentence_embedding"),
    "pooling": ("mean", "kmeans", "slots"),
    "weights": ("hard", "soft"),
    "quantization": ("none", "binary"),
    "tasks": ("document", "query"),
}


class ReinPoolConfig(PretrainedConfig):
    """Everything that the head needs to pool.

    Args:
        dim (int): Width of the token vectors.
        num_layers (int): Transformer layers of the filter; 0 judges each vector by itself.
        num_heads (int): Attention heads of each layer.
        ffn_mult (int): Width of its feed-forward part over dim.
        dropout (float): While training.
        initial_keep_logit (float): Log-odds of keeping any vector before training; at 1, the probability is 73 %.
        patch_columns (int): Page images: patches in a row, so that the filter knows where on the page a vector lies.
            None: the vectors are a set.
        num_vectors (int): Vectors of a document, at most.
        output (str): token_embeddings for a MultiVectorEncoder; sentence_embedding for one vector and dot product.
        pooling (str): How what is kept becomes num_vectors: mean (one), kmeans, or slots, which are learned.
        weights (str): hard: a vector is kept or not. soft: it counts in its cluster by its keep probability.
        threshold (float): Keep probability above which hard weights keep.
        min_keep (int): Vectors that hard weights keep at least, the likeliest first.
        normalize (bool): Bring pooled vectors to unit length, before the projection.
        projection (bool): Learn which directions of the space matter.
        refinement (int): Layers through which pooled vectors look back at the tokens: those that are kept, or with
            soft weights all, whatever their probability.
        quantization (str): none, or binary for signs, one bit a dimension.
        tasks (list): What is pooled: document, and query where queries are to be pooled too.
        equal_norms (bool): Of a sentence_embedding: one more number, by which all documents are equally long, so that
            cosine and L2 rank as the inner product does; see :class:`EqualNorms`. Not with binary, whose are already.
        max_norm (float): The length that documents then have, which training measures. Longer ones are scaled back.
    """

    model_type = "polyrep_reinpool"
    derived = ("dim", "max_norm")

    @checked(
        **_CHOICES,
        dim=WIDTH,
        num_layers=LAYERS,
        num_heads=WIDTH,
        ffn_mult=(1, 64),
        dropout=(0, 0.999),
        initial_keep_logit=(-100, 100),
        patch_columns=WIDTH,
        num_vectors=WIDTH,
        threshold=(1e-9, 1 - 1e-9),
        min_keep=(1, 2**20),
        refinement=LAYERS,
        max_norm=NORM,
    )
    def __init__(
        self,
        dim: int = 128,
        num_layers: int = 1,
        num_heads: int = 4,
        ffn_mult: int = 4,
        dropout: float = 0.0,
        initial_keep_logit: float = 1.0,
        patch_columns: int | None = None,
        num_vectors: int = 1,
        output: str = "token_embeddings",
        pooling: str = "mean",
        weights: str = "hard",
        threshold: float = 0.5,
        min_keep: int = 1,
        normalize: bool = True,
        projection: bool = False,
        refinement: int = 0,
        quantization: str | None = None,
        tasks: list[str] | str | None = None,
        equal_norms: bool = False,
        max_norm: float | None = None,
        **kwargs,
    ):
        quantization = quantization or "none"
        tasks = [tasks] if isinstance(tasks, str) else list(tasks or ["document"])
        equal_norms = equal_norms and output == "sentence_embedding" and quantization == "none"
        self._check(keep(self, locals()))
        kwargs.pop("hidden_size", None)
        super().__init__(**kwargs)
        self.hidden_size = dim  # the name under which sentence-transformers looks for the width

    @property
    def embedding_dim(self) -> int:
        """Width of the vectors that are compared."""
        return self.dim + self.equal_norms

    def _check(self, name: str) -> None:
        dim, heads, vectors = self.dim, self.num_heads, self.num_vectors
        check_weight(name, dim=dim, width=dim, ffn_mult=self.ffn_mult)
        check_weight(name, num_vectors=vectors, dim=dim)
        if dim % heads:
            fitting = next(h for h in range(min(heads, dim, 10_000), 0, -1) if dim % h == 0)
            raise ValueError(
                f"{name}: num_heads={heads} does not divide dim={dim}, so attention heads would be uneven. Use a "
                f"divisor of {dim}, e.g. {fitting}."
            )
        if self.patch_columns and dim % 4:
            raise ValueError(f"{name}: patch_columns needs dim in fours for its sines, but dim={dim}. Use None.")
        if self.pooling == "mean" and vectors > 1:
            raise ValueError(
                f"{name}: pooling='mean' gives one vector, but num_vectors={vectors}. Use pooling='kmeans'."
            )
        if self.output == "sentence_embedding" and vectors > 1:
            raise ValueError(
                f"{name}: output='sentence_embedding' is one vector, but num_vectors={vectors}. Use num_vectors=1, or "
                "output='token_embeddings' in a MultiVectorEncoder."
            )


@dataclass
class ReinPoolOutput(ModelOutput):
    """What the head returns.

    Attributes:
        embeddings: ``(batch, vectors, dim)`` pooled vectors, zero where ``mask`` is False.
        mask: ``(batch, vectors)``, True for vectors that are there: a document may have fewer than asked for.
        keep_probability: ``(batch, tokens)`` of each token vector, zero where there is none.
    """

    embeddings: Tensor | None = None
    mask: Tensor | None = None
    keep_probability: Tensor | None = None


class _Attention(nn.Module):
    """Pre-LN attention and feed-forward part, both residual: of a set over itself, or of one set over another."""

    def __init__(self, config: ReinPoolConfig, cross: bool = False):
        super().__init__()
        dim, hidden = config.dim, config.ffn_mult * config.dim
        self.heads, self.dropout = config.num_heads, config.dropout
        self.norm, self.ffn_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.context_norm = nn.LayerNorm(dim) if cross else None
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.ffn_in, self.ffn_out = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, states: Tensor, mask: Tensor, context: Tensor | None = None) -> Tensor:
        """``states (batch, n, dim)`` attend to ``context (batch, m, dim)``, by default to themselves.

        ``mask (batch, n or 1, m)`` is True for what they may attend to.
        """
        normed = self.norm(states)
        context = normed if context is None else self.context_norm(context)
        split = (states.shape[0], -1, self.heads, states.shape[-1] // self.heads)
        query, key, value = (
            part(x).view(split).transpose(1, 2)  # (batch, heads, n or m, dim / heads)
            for part, x in ((self.query, normed), (self.key, context), (self.value, context))
        )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None], dropout_p=dropout)
        states = states + F.dropout(self.out(mixed.transpose(1, 2).flatten(2)), dropout)
        hidden = F.dropout(F.gelu(self.ffn_in(self.ffn_norm(states))), dropout)
        return states + self.ffn_out(hidden)


class ReinPoolModel(EqualNorms, WholeWeights, PreTrainedModel):
    """The head: a filter over token vectors, and the pooling of what it keeps."""

    config_class = ReinPoolConfig
    _keys_to_ignore_on_load_unexpected = BESIDE_A_HEAD
    _supports_sdpa = _supports_flash_attn = True  # so that it may sit behind any backbone

    def __init__(self, config):
        super().__init__(config)
        self.filter = nn.ModuleList(_Attention(config) for _ in range(config.num_layers))
        self.keep = nn.Linear(config.dim, 1)
        if config.pooling == "slots":
            self.slots = nn.Parameter(torch.empty(config.num_vectors, config.dim))
            self.slot_log_scale = nn.Parameter(torch.empty(()))
        self.refine = nn.ModuleList(_Attention(config, cross=True) for _ in range(config.refinement))
        if config.projection:
            self.project = nn.Linear(config.dim, config.dim, bias=False)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self.keep:  # every vector is kept alike, which is plain mean pooling
            initialization.zeros_(module.weight)
            initialization.constant_(module.bias, self.config.initial_keep_logit)
        elif module is getattr(self, "project", None):
            initialization.eye_(module.weight)
        elif any(module in (layer.out, layer.ffn_out) for layer in self.refine):  # starts as no change
            initialization.zeros_(module.weight)
            initialization.zeros_(module.bias)
        elif module is self and self.config.pooling == "slots":
            initialization.normal_(module.slots, std=self.config.dim**-0.5)
            initialization.constant_(module.slot_log_scale, math.log(10.0))

    @classmethod
    def from_backbone(cls, model, **config) -> ReinPoolModel:
        """An untrained head, which pools by the plain mean or by plain clusters, for a MultiVectorEncoder."""
        return cls(ReinPoolConfig(dim=model.get_embedding_dimension(), **config))

    def keep_logits(self, token_embeddings: Tensor, attention_mask: Tensor) -> Tensor:
        """Log-odds of keeping each vector, independent of one another given all: ``(batch, tokens)``."""
        states, mask = token_embeddings, attention_mask
        if self.config.patch_columns:
            states = states + self._patch_positions(mask).to(states.dtype)
        for layer in self.filter:
            states = layer(states, mask[:, None])
        return self.keep(states)[..., 0]

    def _patch_positions(self, mask: Tensor) -> Tensor:
        """Sines of row and column of each patch, row by row: ``(batch, tokens, dim)``."""
        place = (mask.long().cumsum(1) - 1).clamp(min=0)
        quarter = self.config.dim // 4
        rates = 100.0 ** (-torch.arange(quarter, device=mask.device) / quarter)
        scale = (2 / self.config.dim) ** 0.5  # of unit length, as the vectors that they are added to
        row, column = (
            x[..., None] * rates for x in (place // self.config.patch_columns, place % self.config.patch_columns)
        )
        return torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], dim=-1) * scale

    def decide(self, logits: Tensor, attention_mask: Tensor) -> Tensor:
        """Weight of each vector, ``(batch, tokens)``: 0 or 1 for hard weights, else its keep probability."""
        probability = torch.sigmoid(logits.float()) * attention_mask
        if self.config.weights == "soft":
            return probability
        keep = probability > self.config.threshold
        least = torch.sym_min(self.config.min_keep, logits.shape[1])
        likeliest = probability.masked_fill(~attention_mask, -1.0).topk(least, dim=1).indices
        return (keep.scatter(1, likeliest, True) & attention_mask).to(probability.dtype)

    def assign(self, token_embeddings: Tensor, weights: Tensor, num_vectors: int) -> Tensor:
        """How much of each token goes into each vector: ``(batch, vectors, tokens)``.

        Args:
            token_embeddings: ``(batch, tokens, dim)``, zero where there is no token.
            weights: ``(batch, tokens)``; what weighs nothing is left out.
            num_vectors: Vectors of a document, at most.
        """
        if self.config.pooling == "slots":
            logits = token_embeddings @ F.normalize(self.slots, dim=-1).T * self.slot_log_scale.exp()
            return (torch.softmax(logits, dim=-1) * weights[..., None]).transpose(1, 2)
        if num_vectors == 1:
            return weights[:, None]
        clusters = spherical_kmeans(token_embeddings, weights, num_vectors)
        number = torch.arange(num_vectors, device=clusters.device)
        return (clusters[:, None] == number[:, None]) * weights[:, None]

    def combine(self, token_embeddings: Tensor, shares: Tensor, attended: Tensor) -> Tensor:
        """Averages of tokens, refined by another look at them, before the projection: ``(batch, vectors, dim)``.

        Args:
            token_embeddings: ``(batch, tokens, dim)``, zero where there is no token.
            shares: ``(batch, vectors, tokens)``, how much of each token goes into each vector.
            attended: ``(batch, vectors or 1, tokens)``, True for tokens that the refinement may look at.
        """
        pooled = shares @ token_embeddings
        if self.config.normalize:
            pooled = F.normalize(pooled, dim=-1)
        else:
            pooled = pooled / shares.sum(-1, keepdim=True).clamp(min=1e-12)
        for layer in self.refine:
            pooled = layer(pooled, attended, token_embeddings)
        return F.normalize(pooled, dim=-1) if self.config.normalize and self.config.refinement else pooled

    def pool(self, token_embeddings: Tensor, weights: Tensor, num_vectors: int) -> tuple[Tensor, Tensor]:
        """Pooled vectors before the projection, and the mask ``(batch, vectors)`` of those that are there."""
        shares = self.assign(token_embeddings, weights, num_vectors)
        return self.combine(token_embeddings, shares, (weights > 0)[:, None]), shares.sum(-1) > 0

    def fold(self, pooled: Tensor) -> Tensor:
        """What an index stores: ``A'(A v / |A v|)`` for a projection A, so that queries need none; perhaps signs."""
        if self.config.projection:
            projected = self.project(pooled)
            projected = F.normalize(projected, dim=-1) if self.config.normalize else projected
            pooled = projected @ self.project.weight
        return pooled

    def quantize(self, pooled: Tensor) -> Tensor:
        """Signs as a vector of unit length where ``quantization`` asks for it; straight through for gradients."""
        if self.config.quantization == "none":
            return pooled
        signs = torch.where(pooled >= 0, 1.0, -1.0).to(pooled.dtype) * pooled.shape[-1] ** -0.5
        return signs + pooled - pooled.detach() if pooled.requires_grad else signs

    def forward(
        self, token_embeddings: Tensor, attention_mask: Tensor | None = None, num_vectors: int | None = None, **kwargs
    ) -> ReinPoolOutput:
        """Pool documents.

        Args:
            token_embeddings: ``(batch, tokens, dim)``, padded.
            attention_mask: ``(batch, tokens)``, True where there is a token; default: all.
            num_vectors: Vectors of a document, at most; default: the config's. Not for slots, which are learned.
            kwargs: Ignored.

        Raises:
            ValueError: Another width than the config's, a document without a token, a vector that is not finite or
                is zero, or a number of vectors that the pooling cannot give.
        """
        config = self.config
        mask = torch.ones(token_embeddings.shape[:2], device=token_embeddings.device)
        mask = mask.bool() if attention_mask is None else attention_mask.bool()
        num_vectors = config.num_vectors if num_vectors is None else num_vectors
        self._check(token_embeddings, mask, num_vectors)
        dtype = token_embeddings.dtype
        tokens = torch.where(mask[..., None], token_embeddings, 0).to(self.dtype)
        logits = self.keep_logits(tokens, mask)
        pooled, present = self.pool(tokens, self.decide(logits, mask).to(tokens.dtype), num_vectors)
        embeddings = torch.where(present[..., None], self.quantize(self.fold(pooled)), 0)
        return ReinPoolOutput(
            embeddings=embeddings.to(dtype), mask=present, keep_probability=torch.sigmoid(logits.float()) * mask
        )

    def one_vector(self, vectors: Tensor, mask: Tensor, task: str | None) -> Tensor:
        """Sum of a text's vectors ``(batch, vectors, dim)`` as dense indexes hold it: ``(batch, embedding_dim)``."""
        return self.with_equal_norms(torch.where(mask[..., None], vectors, 0).sum(1), task == "query")

    def _check(self, tokens: Tensor, mask: Tensor, num_vectors: int) -> None:
        config, name = self.config, type(self).__name__
        if tokens.ndim != 3 or tokens.shape[-1] != config.dim:
            raise ValueError(
                f"{name}: token vectors of shape {tuple(tokens.shape)}, but the head was made for (documents, tokens, "
                f"{config.dim}). Use the backbone it was trained on ({config.base_model_id or 'not recorded'}), or "
                "train a head for this one."
            )
        if mask.shape != tokens.shape[:2]:
            raise ValueError(f"{name}: a mask of shape {tuple(mask.shape)} for tokens {tuple(tokens.shape)}.")
        if not isinstance(num_vectors, int) or num_vectors < 1:
            raise ValueError(f"{name}: num_vectors={num_vectors!r} is no number of vectors. Use 1 or more.")
        if num_vectors != config.num_vectors and (config.pooling == "slots" or config.output == "sentence_embedding"):
            raise ValueError(
                f"{name}: num_vectors={num_vectors}, but this head gives {config.num_vectors} (pooling="
                f"{config.pooling!r}, output={config.output!r}). Use a head made for {num_vectors}."
            )
        if num_vectors > 1 and config.pooling == "mean":
            raise ValueError(f"{name}: pooling='mean' gives one vector, not {num_vectors}. Use pooling='kmeans'.")
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # a graph cannot look at the numbers
            return
        norms = tokens.float().norm(dim=-1)  # one pass finds NaN, infinity and zero
        bad = mask & ~((norms > 0) & norms.isfinite())
        empty = ~mask.any(1)
        if bool((bad.any(1) | empty).any()):
            row = int((bad.any(1) | empty).nonzero()[0])
            if empty[row]:
                raise ValueError(
                    f"{name}: document {row} of the batch has no token that counts, so there is nothing to pool. "
                    "Leave empty documents out, or loosen the skiplist or keep_only_token_ids of the backbone."
                )
            raise ValueError(
                f"{name}: document {row} of the batch has a token vector of length "
                f"{float(norms[row][bad[row]][0])}, so its pooled vector would mean nothing. The backbone is broken "
                "or its numbers overflow; use float32."
            )


@torch.no_grad()
def spherical_kmeans(vectors: Tensor, weights: Tensor, num_vectors: int, iterations: int | None = None) -> Tensor:
    """Clusters of each document's vectors by direction, for all documents at once.

    Lloyd's iterations from a deterministic start: the vector nearest to the document's mean, then again and again the
    one that the seeds so far explain worst. Two calls give the same clusters.

    Args:
        vectors: ``(batch, tokens, dim)``, padded.
        weights: ``(batch, tokens)`` weight of each vector; what weighs nothing neither moves a cluster nor seeds one.
        num_vectors: Clusters, at most; documents with fewer different vectors get fewer.
        iterations: Of Lloyd's. None: the fewer clusters the more, four for two and one from five on, since a few
            seeds are outliers and have far to go, while of many some are better left where they are.

    Returns:
        ``(batch, tokens)`` number of each vector's cluster.
    """
    iterations = max(1, 8 // num_vectors) if iterations is None else iterations
    vectors, weights = vectors.float(), weights.float()
    rows = torch.arange(vectors.shape[0], device=vectors.device)
    # Lengths go into weights and scores, so that no unit copy of all vectors is made.
    lengths = vectors.norm(dim=-1).clamp(min=1e-12)
    pull = (weights / lengths)[:, None]  # (batch, 1, tokens)

    def cosine(centre: Tensor) -> Tensor:  # of every token: (batch, tokens)
        # The transpose, not centre[..., None]: torch 2.13 on CPUs has a path for it that takes a seventh of the time.
        return (vectors @ centre[:, None].transpose(1, 2))[..., 0] / lengths

    def token(place: Tensor) -> Tensor:  # (batch, dim)
        return vectors[rows, place] / lengths[rows, place][:, None]

    present = weights > 0
    mean = F.normalize(pull @ vectors, dim=-1)[:, 0]
    centres = [token(cosine(mean).masked_fill(~present, -2).argmax(1))]
    filled, nearest = [present.any(1)], torch.full_like(weights, -1)
    for _ in range(num_vectors - 1):
        nearest = torch.maximum(nearest, cosine(centres[-1]))
        worst, seed = ((1 - nearest) * weights).max(1)
        centres.append(token(seed))
        filled.append(worst > 1e-6)
    centre, alive = torch.stack(centres, 1), torch.stack(filled, 1)  # (batch, clusters, dim), (batch, clusters)
    number = torch.arange(num_vectors, device=vectors.device)[:, None]
    for step in range(iterations + 1):
        clusters = (vectors @ centre.transpose(1, 2)).masked_fill(~alive[:, None], -math.inf).argmax(-1)
        if step < iterations:
            total = ((clusters[:, None] == number) * pull) @ vectors
            moved = total.norm(dim=-1, keepdim=True) > 1e-6  # a cluster that lost its members stays where it was
            centre = torch.where(moved, F.normalize(total, dim=-1), centre)
    return clusters


class ReinPoolForRetrievalConfig(ReinPoolConfig):
    """A late-interaction model and the head in one.

    Args:
        encoder_config (dict): Config of the encoder.
        trunk (list): Modules behind the encoder, see :func:`keep_trunk`.
    """

    model_type = "polyrep_reinpool_for_retrieval"
    sub_configs = {"encoder_config": AutoConfig}

    @checked()
    def __init__(self, encoder_config=None, trunk=None, **kwargs):
        width = keep_trunk(self, encoder_config, trunk)
        super().__init__(**{"dim": width} | kwargs)
        if self.dim != width:
            raise ValueError(
                f"{type(self).__name__}: dim={self.dim}, but encoder and trunk give token vectors of width {width}, "
                "so the head belongs to others. Use those that it was trained on."
            )


@dataclass
class ReinPoolRetrievalOutput(ModelOutput):
    """What the whole model returns.

    Attributes:
        sentence_embedding: ``(batch, dim)``, if the head's output is one.
        token_embeddings: ``(batch, vectors, dim)`` else: of what is not pooled, one a token.
        mask: ``(batch, vectors)``, True for vectors that count in a score.
        keep_probability: ``(batch, tokens)`` of each token vector of what is pooled.
    """

    sentence_embedding: Tensor | None = None
    token_embeddings: Tensor | None = None
    mask: Tensor | None = None
    keep_probability: Tensor | None = None


class ReinPoolForRetrieval(WholeWeights, Trunk, PreTrainedModel):
    """A late-interaction model and the head in one state dict."""

    config_class = ReinPoolForRetrievalConfig
    otherwise = (
        "Put the head behind it: MultiVectorEncoder(modules=[*backbone.children(), ReinPoolPooling(...)]), "
        "or --pipeline true."
    )
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = True

    def __init__(self, config):
        super().__init__(config)
        self.add_trunk(config)
        self.head = ReinPoolModel(config)
        self.post_init()

    @property
    def width(self) -> int:
        """Of its vectors."""
        return self.config.embedding_dim

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        task: str | None = None,
        num_vectors: int | None = None,
        **kwargs,
    ) -> ReinPoolRetrievalOutput:
        """Vectors of texts or pages.

        Args:
            input_ids: ``(batch, tokens)``.
            attention_mask: ``(batch, tokens)``; default: all tokens count.
            task: "query", else a document.
            num_vectors: Vectors of what is pooled, at most; default: the config's.
            kwargs: What else the encoder reads.

        Raises:
            ValueError: See ``ReinPoolModel``.
        """
        if "query" not in self.config.tasks:
            warn_of_no_task(self, task)
        tokens, mask = self.token_vectors(input_ids, attention_mask, task, **kwargs)
        single = self.config.output == "sentence_embedding"
        if (task or "document") not in self.config.tasks:
            if single:
                return ReinPoolRetrievalOutput(sentence_embedding=self.head.one_vector(tokens, mask, task))
            return ReinPoolRetrievalOutput(token_embeddings=tokens, mask=mask)
        made = self.head(tokens, mask, num_vectors)
        if single:
            one = self.head.one_vector(made.embeddings, made.mask, task)
            return ReinPoolRetrievalOutput(sentence_embedding=one, keep_probability=made.keep_probability)
        return ReinPoolRetrievalOutput(
            token_embeddings=made.embeddings, mask=made.mask, keep_probability=made.keep_probability
        )


class ReinPoolTransformer(TrunkTransformer):
    """The stock Transformer around a ReinPoolForRetrieval, in a model that must not score its vectors otherwise."""

    def on_model_ready(self, model):
        """Check that the family and its score fit the output."""
        _check_family(model, self.model.config, type(self).__name__)


class ReinPoolPooling(TokenPoolingModule):
    """The head as token pooling: for one call, by itself, or as last module behind any MultiVectorEncoder.

    With ``output="sentence_embedding"`` it makes a SentenceTransformer of the same modules: one vector per document,
    the unnormalised sum of the scored token vectors per query, and the dot product, which then equals MaxSim.
    """

    head_class, inside = ReinPoolModel, ReinPoolForRetrievalConfig.model_type
    reads, gives = "dim", "embedding_dim"
    changeable = {"num_vectors", "pooling", "output", "weights", "threshold", "min_keep", "quantization", "tasks"}
    changeable |= {"equal_norms", "max_norm"} | TokenPoolingModule.changeable
    output_field = "embeddings"

    def __init__(self, model: ReinPoolModel, *, tasks: str | list[str] | None = None):
        super().__init__(model)
        given = tasks or model.config.tasks
        self.tasks = model.config.tasks = [given] if isinstance(given, str) else list(given)

    def forward(self, features, task=None):
        """Replace a batch's token vectors by pooled ones, or sum those of a query."""
        tokens, mask = features["token_embeddings"], features["attention_mask"].bool()
        single = self.model.config.output == "sentence_embedding"
        if not self.applies_to("query"):
            warn_of_no_task(self, task)
        if not self.applies_to(task):
            if single:
                features["sentence_embedding"] = self.model.one_vector(tokens, mask, task)
            return features
        if len(tokens):
            output = self._run(tokens, mask, task)
            if single:
                features["sentence_embedding"] = self.model.one_vector(output.embeddings, output.mask, task)
            else:
                features["token_embeddings"], features["attention_mask"] = output.embeddings, output.mask
        return features

    def on_model_ready(self, model):
        """Check the backbone, and that the family and its score fit the output."""
        _check_family(model, self.model.config, type(self).__name__)
        self.check_backbone(model)

    @classmethod
    def check_changes(cls, fields, changes, fixed=frozenset()):
        """Refuse what fits no weights, and a threshold where nothing is decided."""
        if "slots" in (fields["pooling"], changes.get("pooling")):  # learned, as many as there are
            fixed = fixed | {"pooling", "num_vectors"}
        super().check_changes(fields, changes, fixed)
        decisions = sorted({"threshold", "min_keep"} & changes.keys())
        if decisions and (fields | changes)["weights"] == "soft":
            raise ValueError(
                f"{cls.__name__}: {decisions[0]}={changes[decisions[0]]!r} has nothing to decide, since this head "
                "weighs by probability (weights='soft'). Leave it out, or add weights='hard'."
            )


def _check_family(model, config: ReinPoolConfig, owner: str) -> None:
    """ValueError if a sentence-transformers model reads another output than a head gives, or scores it otherwise."""
    family, output = type(model).__name__, config.output
    single = output == "sentence_embedding"
    if family == "MultiVectorEncoder" and single or family == "SentenceTransformer" and not single:
        raise ValueError(
            f"{owner}: output={output!r} in a {family}, which reads another one. Open the head with "
            f"ReinPoolPooling.from_pretrained(head, output={_CHOICES['output'][1 - single]!r})."
        )
    if single and family == "SentenceTransformer":
        because = "a query is the unnormalised sum of its token vectors and a document may have any length"
        check_score(model, owner, because, "cut off part of every score. Use None.", config)


for config, model in ((ReinPoolConfig, ReinPoolModel), (ReinPoolForRetrievalConfig, ReinPoolForRetrieval)):
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModel")
