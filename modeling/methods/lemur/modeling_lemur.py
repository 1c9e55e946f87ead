"""LEMUR: late interaction served by any index of single vectors, which ranks documents nearly as MaxSim would.

After Jaasaari, Hyvonen and Roos, "LEMUR: Learned Multi-Vector Retrieval" (ICML 2026, arXiv 2601.21853). MaxSim of a
query and a document is a sum over the query's token vectors x of g(x), the largest inner product of x with any of the
document's. LEMUR writes the function g of each document as psi(x) . w: psi, a small network, is the same for all
documents and learned once; w, the document's vector, follows from psi by least squares on a sample of token vectors,
the anchors. A query is then the sum of psi over its tokens, and the inner product of two vectors stands for MaxSim.

Where this differs from the paper and its code:

- The anchors are part of the model, so that a document added years later is regressed on what all others were.
- The least squares are ridge regression, without which 16-bit vectors would hold large numbers that cancel.
- ``rank`` directions are kept in which the documents differ most, seen with the eyes of queries: a singular value
  decomposition in the metric of query vectors. Its first ``embedding_dim`` are the vectors that an index holds, a
  quarter of the numbers and fewer for little loss.
- Queries have one definition, the masked sum over ``query_scale``, and everything that is random has a seed.
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

from .polyrep_fields import NORM, WIDTH, check_weight, checked, keep
from .polyrep_folder import BESIDE_A_HEAD, WholeWeights
from .polyrep_room import SIDES, EqualNorms, HeadModule, Module, check_score
from .polyrep_trunk import Trunk, TrunkTransformer, keep_trunk

_BLOCK = 2**25
"""Numbers in the largest intermediate of documents, 128 MiB; of queries, whose features are wider, twice that."""

_ANCHORS_AT_ONCE = 1024


class LemurConfig(PretrainedConfig):
    """Everything that the head needs to encode.

    Args:
        token_dim (int): Width of the token vectors.
        latent_dim (int): Features of psi.
        feature_type (str): mlp: psi is learned. elm: psi is drawn at random, which takes no training and two to four
            times the candidates.
        query_scale (float): What sums over a query's tokens are divided by. It moves no ranking, and keeps 16-bit
            numbers in range.
        num_anchors (int): Token vectors that a document's vector is regressed on. A fit on fewer tokens keeps those.
        ridge (float): Share of the features' mean square that is added to it in the regression; 0 is plain least
            squares.
        rank (int): Directions kept in which documents differ most for queries; 0 keeps none. A fit on fewer documents
            keeps fewer.
        embedding_dim (int): Numbers of a vector: up to rank, the first of those directions; or latent_dim, the
            features as they are, which is the default.
        seed (int): Of the fit.
        equal_norms (bool): The last of these numbers makes all documents equally long, so that cosine and L2 rank as
            the inner product does; see :class:`EqualNorms`. Not with the features as they are, all of which count.
        max_norm (float): The length that documents then have, which the fit measures. Longer ones are scaled back.
    """

    model_type = "polyrep_lemur"
    derived = ("token_dim", "seed", "max_norm")

    @checked(
        token_dim=WIDTH,
        latent_dim=WIDTH,
        feature_type=("mlp", "elm"),
        query_scale=(1e-6, 1e6),
        num_anchors=(1, 2**20),
        ridge=(0, 1e6),
        rank=(0, WIDTH[1]),
        embedding_dim=WIDTH,
        seed=(0, 2**32 - 1),
        max_norm=NORM,
    )
    def __init__(
        self,
        token_dim: int = 128,
        latent_dim: int = 2048,
        feature_type: str = "mlp",
        query_scale: float = 32.0,
        num_anchors: int = 8192,
        ridge: float = 0.01,
        rank: int = 512,
        embedding_dim: int | None = None,
        seed: int = 0,
        equal_norms: bool = False,
        max_norm: float | None = None,
        **kwargs,
    ):
        embedding_dim = latent_dim if embedding_dim is None else embedding_dim
        name = keep(self, locals())
        check_weight(name, token_dim=token_dim, latent_dim=latent_dim)
        check_weight(name, num_anchors=num_anchors, token_dim=token_dim)
        if rank > latent_dim:
            raise ValueError(
                f"{name}: rank={rank} directions of a space of latent_dim={latent_dim}. Use {latent_dim} or fewer."
            )
        if equal_norms and embedding_dim in (1, latent_dim):
            raise ValueError(
                f"{name}: embedding_dim={embedding_dim} has no number to spare for equal_norms=True. Use 2 to {rank}, "
                "or equal_norms=False."
            )
        if embedding_dim != latent_dim and self.directions > rank:
            raise ValueError(
                f"{name}: embedding_dim={embedding_dim}, but only rank={rank} directions are kept. Use up to {rank}, "
                f"or latent_dim={latent_dim} for the features themselves."
            )
        super().__init__(**kwargs)

    @property
    def directions(self) -> int:
        """How many of a vector's numbers stand for directions, or features."""
        return self.embedding_dim - self.equal_norms


@dataclass
class LemurOutput(ModelOutput):
    """What the head returns.

    Attributes:
        sentence_embedding: ``(texts, embedding_dim)`` in float32, to be compared by the inner product.
    """

    sentence_embedding: Tensor | None = None


def token_maxima(points: Tensor, token_embeddings: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Largest inner product of each point with any token vector of each document: g in the paper.

    Args:
        points: ``(points, dim)``.
        token_embeddings: ``(documents, tokens, dim)``, padded.
        attention_mask: ``(documents, tokens)``, True where there is a token; default: all, which is faster.

    Returns:
        ``(documents, points)``.
    """
    found = []
    for part in points.split(_ANCHORS_AT_ONCE):
        products = (token_embeddings.flatten(0, 1) @ part.T).unflatten(0, token_embeddings.shape[:2])
        if attention_mask is not None:
            products.masked_fill_(~attention_mask[..., None], -math.inf)
        found.append(products.amax(1))  # (documents, part)
    return torch.cat(found, 1)


def ridge_solution(features: Tensor, ridge: float) -> Tensor:
    """The matrix S that takes values y at the anchors to the weights w = y S of their ridge regression on features.

    w minimises ``|Z w - y|^2 + e |w|^2`` for features Z, with e the ridge times the mean square of a column of Z. It
    is solved by Cholesky's factors in float64, of Z'Z or, where there are fewer anchors than features, of ZZ', which
    give the same w; there w interpolates y as the ridge goes to 0.

    Args:
        features: ``(anchors, features)``.
        ridge: See LemurConfig.

    Returns:
        ``(anchors, features)`` in float64.

    Raises:
        ValueError: The system is singular.
    """
    features = features.double()
    wide = features.shape[0] < features.shape[1]
    gram = features @ features.T if wide else features.T @ features
    gram.diagonal().add_(ridge * features.square().sum() / features.shape[1])
    factor, failed = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal()
    if int(failed) or not bool(pivots.min() > 1e-7 * pivots.max()):
        raise ValueError(
            f"LemurModel: the features of {features.shape[0]} anchors are linearly dependent (ridge={ridge:g}), so "
            "least squares have no one solution. Use a ridge above 0, e.g. 0.01, or more and different anchors."
        )
    if wide:
        return torch.cholesky_solve(features, factor)
    return torch.cholesky_solve(features.T, factor).T


class LemurModel(EqualNorms, WholeWeights, PreTrainedModel):
    """The head: token vectors of a query or of a document become one vector."""

    config_class = LemurConfig
    _keys_to_ignore_on_load_unexpected = BESIDE_A_HEAD
    _supports_sdpa = _supports_flash_attn = True  # so that it may sit behind any backbone
    _keep_in_fp32_modules_strict = {"linear", "norm", "anchors", "target", "document", "query"}

    def __init__(self, config):
        super().__init__(config)
        self.linear, self.norm = nn.Linear(config.token_dim, config.latent_dim), nn.LayerNorm(config.latent_dim)
        self.register_buffer("anchors", torch.zeros(config.num_anchors, config.token_dim))
        self.register_buffer("target_mean", torch.zeros(()))
        self.register_buffer("target_std", torch.ones(()))
        if config.rank:
            self.register_buffer("document_mean", torch.zeros(config.latent_dim))
            self.register_buffer("document_map", torch.zeros(config.latent_dim, config.rank))
            self.register_buffer("query_map", torch.zeros(config.latent_dim, config.rank))
        self._solved: tuple[object, tuple[Tensor, Tensor]] | None = None
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self.linear:
            scale = (3 * self.config.token_dim) ** -0.5  # as torch's own, but a bias that counts as much as a vector
            initialization.normal_(module.weight, std=scale)
            initialization.normal_(module.bias, std=scale)

    def _apply(self, fn, recurse=True):
        """Move to another device, but never to another type: of rounded features, an index is another solution."""

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        return super()._apply(moved, recurse)

    def train(self, mode=True):
        """Forget what was solved for: not every optimizer lets a weight know that it changed it (fused AdamW)."""
        if mode != self.training:
            self._solved = None
        return super().train(mode)

    @classmethod
    def from_backbone(cls, model, **config) -> LemurModel:
        """A head that is not fitted yet, for the token vectors of a MultiVectorEncoder."""
        return cls(LemurConfig(token_dim=model.get_embedding_dimension(), **config))

    def features(self, token_embeddings: Tensor) -> Tensor:
        """Psi: ``(..., token_dim)`` to ``(..., latent_dim)``."""
        return F.gelu(self.norm(self.linear(token_embeddings)))

    def encode_query_tokens(self, values, offsets) -> Tensor:
        """Queries whose token vectors lie under one another, a block at a time.

        Args:
            values: ``(tokens of all queries, token_dim)``, an array, memory-mapped or not, or a tensor.
            offsets: ``(queries + 1,)`` bounds of each query's tokens.

        Returns:
            ``(queries, embedding_dim)`` in float32.
        """
        return self._encode_ragged(values, offsets, "query")

    def encode_document_tokens(self, values, offsets) -> Tensor:
        """Documents likewise: those of a corpus, or one that is added to an index later.

        Args:
            values: ``(tokens of all documents, token_dim)``.
            offsets: ``(documents + 1,)``.

        Returns:
            ``(documents, embedding_dim)`` in float32.
        """
        return self._encode_ragged(values, offsets, "document")

    @torch.inference_mode()
    def _encode_ragged(self, values, offsets, task) -> Tensor:
        offsets = torch.tensor(offsets) if not isinstance(offsets, Tensor) else offsets
        lengths = offsets.diff()
        if not bool(lengths.all()):
            raise ValueError(_no_token(task, int(lengths.argmin())))
        order = lengths.argsort(stable=True)  # equal lengths side by side: little padding
        made = torch.empty(len(lengths), self.config.embedding_dim, device=self.device)
        start = 0
        while start < len(order):
            # As many as fit, at the width of the longest among them.
            sizes = torch.arange(1, len(order) - start + 1) * lengths[order[start:]] * _ANCHORS_AT_ONCE
            rows = order[start : start + max(1, int(torch.searchsorted(sizes, _BLOCK, right=True)))]
            columns = torch.arange(int(lengths[rows[-1]]))
            mask = columns < lengths[rows][:, None]  # (texts, tokens)
            places = torch.minimum(offsets[rows][:, None] + columns, offsets[rows + 1][:, None] - 1)
            tokens = torch.as_tensor(values[places.numpy()]).to(self.device)
            # Shorter texts repeat their last token, which changes no maximum, so that documents need no mask.
            mask = mask.to(self.device) if task == "query" else None
            made[rows] = self(tokens, mask, task=task).sentence_embedding
            start += len(rows)
        return made

    def forward(
        self, token_embeddings: Tensor, attention_mask: Tensor | None = None, task: str | None = None, **kwargs
    ) -> LemurOutput:
        """Encode queries or documents.

        Args:
            token_embeddings: ``(texts, tokens, token_dim)``, padded.
            attention_mask: ``(texts, tokens)``, True where there is a token; default: all.
            task: ``query`` or ``document``; the two are encoded in different ways.
            kwargs: Ignored.

        Raises:
            ValueError: No task, another width than the config's, a text without a token, a vector that is not finite,
                or documents for a head that is not fitted.
        """
        mask = None if attention_mask is None else attention_mask.bool()
        self._check(token_embeddings, mask, task)
        # In float32 whatever stands before it: rounding errors of the maxima would go into a regression.
        with torch.autocast(token_embeddings.device.type, enabled=False):
            tokens = token_embeddings.float()
            if mask is not None:
                tokens = torch.where(mask[..., None], tokens, 0)
            if task == "query":
                seen = self.features(tokens)
                made = (seen if mask is None else seen * mask[..., None]).sum(1) / self.config.query_scale
                made = self.reduce(made, task, self.config.directions)
            else:
                solution, constant = self._solution()
                values = (token_maxima(self.anchors, tokens, mask) - self.target_mean) / self.target_std
                made = values @ solution - constant
            made = self.with_equal_norms(made, task == "query")
        return LemurOutput(sentence_embedding=made)

    def reduce(self, vectors: Tensor, task: str, embedding_dim: int) -> Tensor:
        """Vectors of all features as the first of the directions that matter.

        A head with that ``embedding_dim``, and without ``equal_norms``, gives the same at once.

        Args:
            vectors: ``(texts, latent_dim)`` of queries or of documents.
            task: Of which.
            embedding_dim: How many directions, up to the config's rank; or latent_dim for no change.

        Returns:
            ``(texts, embedding_dim)``.
        """
        if embedding_dim == self.config.latent_dim:
            return vectors
        if task == "query":
            return vectors @ self.query_map[:, :embedding_dim]
        return (vectors - self.document_mean) @ self.document_map[:, :embedding_dim]

    def _solution(self) -> tuple[Tensor, Tensor]:
        """What takes standardised maxima at the anchors to a document's vector, made anew after any change.

        It is not saved: solving takes a second or two, and the file would be ten times as large.
        """
        if not torch.compiler.is_compiling():
            of = [self.linear.weight, self.linear.bias, self.norm.weight, self.norm.bias, self.anchors]
            maps = [self.document_map, self.document_mean] if self.config.rank else []
            state = [(t.data_ptr(), t.device, 0 if t.is_inference() else t._version) for t in of + maps]
            key = (state, self.config.ridge, self.config.directions)
            if self.training or self._solved is None or self._solved[0] != key:
                with torch.inference_mode(False), torch.no_grad():  # to be used outside it, too
                    self._solved = (key, self._solve())
        elif self._solved is None:
            raise RuntimeError("LemurModel: encode a document once before the model is compiled: it solves a system.")
        return self._solved[1]

    def _solve(self) -> tuple[Tensor, Tensor]:
        solution, size = self.solve(), self.config.directions
        constant = solution.new_zeros(size)
        if size < self.config.latent_dim:
            onto = self.document_map[:, :size].to(solution)
            solution, constant = solution @ onto, self.document_mean.to(solution) @ onto
        return solution.to(self.anchors), constant.to(self.anchors)

    def solve(self) -> Tensor:
        """:func:`ridge_solution` of the anchors' features: ``(anchors, latent_dim)`` in float64.

        Raises:
            ValueError: The head is not fitted, or the system is singular.
        """
        if not bool(self.anchors.any()):
            raise ValueError(
                "LemurModel: the head has no anchors yet, so documents have nothing to be regressed on. Fit it with "
                "`train.py hub_configs/lemur-minilm`, or open one that is fitted."
            )
        features = torch.cat([self.features(part) for part in self.anchors.split(_ANCHORS_AT_ONCE)])
        if features.device.type == "mps":  # which knows no float64
            return ridge_solution(features.cpu(), self.config.ridge)
        return ridge_solution(features, self.config.ridge)

    def _check(self, tokens: Tensor, mask: Tensor | None, task: str | None) -> None:
        config, name = self.config, type(self).__name__
        if task not in ("query", "document"):
            raise ValueError(
                f"{name}: task={task!r}, but queries and documents are encoded in different ways. Use task='query' or "
                "'document'; in sentence-transformers encode_query and encode_document, which pass it, and in the "
                f"arguments of its trainer {SIDES}."
            )
        if tokens.ndim != 3 or tokens.shape[-1] != config.token_dim:
            raise ValueError(
                f"{name}: token vectors of shape {tuple(tokens.shape)}, but the head was made for (texts, tokens, "
                f"{config.token_dim}). Use the encoder it was fitted to ({config.base_model_id or 'not recorded'}), "
                "or fit a head to this one."
            )
        if mask is not None and mask.shape != tokens.shape[:2]:
            raise ValueError(f"{name}: a mask of shape {tuple(mask.shape)} for tokens {tuple(tokens.shape)}.")
        if torch.compiler.is_compiling():  # what looks at values would break the graph
            return
        if tokens.shape[0] and not tokens.shape[1]:
            raise ValueError(_no_token(task, 0))
        broken = ~torch.isfinite(tokens).all(2)  # (texts, tokens)
        if mask is not None:
            if not bool(mask.any(1).all()):
                raise ValueError(_no_token(task, int((~mask.any(1)).int().argmax())))
            broken &= mask
        broken = broken.any(1)
        if bool(broken.any()):
            raise ValueError(
                f"{name}: {task} {int(broken.int().argmax())} of the batch has a token vector that is not finite, so "
                "every score with it would be meaningless. Mend the encoder, or use float32."
            )


def _no_token(task: str, place: int) -> str:
    return (
        f"LemurModel: {task} {place} has no token, so there is no MaxSim to stand for. Remove it, or loosen the "
        "encoder's skiplist."
    )


class LemurForRetrievalConfig(LemurConfig):
    """A late-interaction model and the head in one.

    Args:
        encoder_config (dict): Config of the encoder.
        trunk (list): Modules behind the encoder, see :func:`keep_trunk`.
    """

    model_type = "polyrep_lemur_for_retrieval"
    sub_configs = {"encoder_config": AutoConfig}

    @checked()
    def __init__(self, encoder_config=None, trunk=None, **kwargs):
        width = keep_trunk(self, encoder_config, trunk)
        super().__init__(**{"token_dim": width} | kwargs)
        if self.token_dim != width:
            raise ValueError(
                f"{type(self).__name__}: token_dim={self.token_dim}, but encoder and trunk give token vectors of "
                f"width {width}, so the head belongs to others. Use those that it was fitted to."
            )


class LemurForRetrieval(WholeWeights, Trunk, PreTrainedModel):
    """A late-interaction model and the head in one state dict."""

    config_class = LemurForRetrievalConfig
    otherwise = (
        "Put the head behind it: SentenceTransformer(modules=[*backbone.children(), LemurPooling(head)]), "
        "or --pipeline true."
    )
    _supports_sdpa = _supports_flash_attn = True

    def __init__(self, config):
        super().__init__(config)
        self.add_trunk(config)
        self.head = LemurModel(config)
        self.post_init()
        self._keep_in_fp32_modules_strict = {"head"}  # not the head's own words for it, which an encoder has, too

    @property
    def width(self) -> int:
        """Of its vectors."""
        return self.config.embedding_dim

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        task: str | None = None,
        **kwargs,
    ) -> LemurOutput:
        """Vectors of texts or pages.

        Args:
            input_ids: ``(batch, tokens)``.
            attention_mask: ``(batch, tokens)``; default: all tokens count.
            task: ``query`` or ``document``; the two are encoded in different ways.
            kwargs: What else the encoder reads.

        Raises:
            ValueError: See ``LemurModel``.
        """
        return self.head(*self.token_vectors(input_ids, attention_mask, task, **kwargs), task=task)


class LemurTransformer(TrunkTransformer):
    """The stock Transformer around a LemurForRetrieval, in a model that must not score its vectors otherwise."""

    def on_model_ready(self, model):
        """Set the inner product where nothing is, and refuse a score that ranks otherwise."""
        _check_score(model, self.model.config, type(self).__name__)


class LemurPooling(HeadModule, Module):
    """The head as last module behind a late-interaction model: a SentenceTransformer scored by the dot product.

    By itself, :meth:`pool` encodes token vectors that are there already.
    """

    head_class, inside = LemurModel, LemurForRetrievalConfig.model_type
    reads, gives = "token_dim", "embedding_dim"
    changeable = {"embedding_dim", "ridge", "equal_norms", "max_norm"} | HeadModule.changeable
    made = "fitted"
    forward_kwargs = {"task"}

    def forward(self, features, task=None):
        """Add ``sentence_embedding`` to what the encoder gives for a batch."""
        output = self.model(features["token_embeddings"], features["attention_mask"], task=task)
        features["sentence_embedding"] = output.sentence_embedding
        return features

    def pool(self, embeddings, *, task, fingerprint=None):
        """Encode token vectors.

        Args:
            embeddings: A list of ``(tokens, token_dim)``, tensors or arrays, one a text.
            task: ``query`` or ``document``.
            fingerprint: Of the encoder that made them (:func:`polyrep.hub.fingerprint`), where it is known.

        Returns:
            ``(texts, embedding_dim)`` in float32.

        Raises:
            ValueError: They are of another encoder than the head was fitted to, by fingerprint or by width; a text has
                no token; the task is neither.
        """
        if fingerprint and self.model.config.base_fingerprint not in (None, fingerprint):
            self.refuse(fingerprint, "these token vectors are of an encoder with")
        config, rows = self.model.config, [torch.as_tensor(text) for text in embeddings]
        for place, row in enumerate(rows):
            if row.ndim != 2 or row.shape[1] != config.token_dim:
                raise ValueError(
                    f"LemurPooling: {task} {place} has shape {tuple(row.shape)}, not (tokens, "
                    f"{config.token_dim}). Use the encoder it was fitted to "
                    f"({config.base_model_id or 'not recorded'}), or fit a head to this one."
                )
        if not rows:
            return torch.empty(0, config.embedding_dim)
        lengths = torch.tensor([len(row) for row in rows])
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return self.model._encode_ragged(torch.cat(rows), offsets, task)

    def other_backbone(self, name, found):
        """Refuse it: the regression is on its very token vectors."""
        self.refuse(found, "the encoder before it has")

    def refuse(self, found, subject):
        """ValueError for token vectors of an encoder with another fingerprint."""
        config = self.model.config
        raise ValueError(
            f"LemurPooling: {subject} fingerprint {found[:16]}, but the head was fitted to {config.base_model_id} "
            f"(fingerprint {config.base_fingerprint[:16]}), so scores would mean nothing. Use that encoder, fit a "
            "head to this one, or open the head with base_fingerprint=None to go unchecked."
        )

    def on_model_ready(self, model):
        """Check the encoder before it and how the model scores; the inner product is set where nothing is."""
        self.check_backbone(model)
        self.check_last(model, "their product is no MaxSim")
        if type(model).__name__ != "SentenceTransformer":
            raise ValueError(
                f"LemurPooling: gives one vector a text, which a {type(model).__name__} does not read. Use "
                "SentenceTransformer(modules=[*encoder.children(), LemurPooling.from_pretrained(head)])."
            )
        _check_score(model, self.model.config, type(self).__name__)


def _check_score(model, config: LemurConfig, owner: str) -> None:
    because = "the inner product is what stands for MaxSim, and cosine loses quality"
    instead = f"Open the head with embedding_dim={model.truncate_dim}, which keeps the directions that matter."
    check_score(model, owner, because, f"cut features off at random. {instead}", config)


for config, model in ((LemurConfig, LemurModel), (LemurForRetrievalConfig, LemurForRetrieval)):
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModel")
