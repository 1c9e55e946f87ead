"""How nested vectors are learned: one contrastive loss for each prefix, over the same vectors.

One loss, three ways to feed it. ``MetaEmbedObjective`` trains a whole model with the trainers of
sentence-transformers, ``CachedMetaEmbedObjective`` does so in batches larger than memory, and
``MetaEmbedHeadObjective`` fits a head to the cached token vectors of a frozen late-interaction model.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers.multi_vector_encoder.losses import CachedMultiVectorMultipleNegativesRankingLoss
from sentence_transformers.util import get_rank
from torch import Tensor
from torch.nn import functional as F

from ...errors import InputError
from ...training.losses import (
    divergence,
    gather,
    gather_tokens,
    in_batch_labels,
    judged_relevant,
    maxsim_taught,
    product_dtype,
    refuse_single,
    unwrapped,
)
from ...training.objective import Objective, Rows
from ...training.pairs import HeadData
from ...training.sides import Features, pad_tokens
from .modeling_metaembed import MetaEmbedHead

if TYPE_CHECKING:
    from datasets import Dataset

SAMPLE = 1024
"""Documents by which a new projection is set, at most."""


def group_scores(
    similarity: Tensor, groups: Sequence[Sequence[int | None]], query_mask: Tensor, mean: bool = False
) -> list[Tensor]:
    """Scores ``(queries, documents)`` of each group: the best of the first document vectors for each first query one.

    Args:
        similarity: ``(queries, query vectors, documents, document vectors)`` inner products.
        groups: Pairs of numbers of vectors, of a query and of a document; None for all of a query.
        query_mask: ``(queries, query vectors)``, True for vectors that are there.
        mean: Divide by the number of query vectors, so that scores of all groups are of one size.
    """
    found = []
    for asked, held in groups:
        # amax: while vectors are still equal, each of them gets its share of the gradient.
        best = similarity[:, :asked, :, :held].amax(-1)  # (queries, first vectors, documents)
        there = query_mask[:, :asked, None]
        total = (best * there).sum(1)
        found.append(total / there.sum(1).clamp(min=1) if mean else total)
    return found


def principal_axes(vectors: Tensor, dim: int) -> Tensor:
    """The directions ``(dim, width)`` that keep most of the inner products of some vectors ``(texts, width)``."""
    unit = F.normalize(vectors.double(), dim=-1)
    axes = torch.linalg.eigh(unit.T @ unit).eigenvectors  # ascending
    return axes.flip(1)[:, :dim].T.to(vectors.dtype)


class _NestedLoss(Objective):
    """The loss, given all vectors of each text.

    With ``q_i`` and ``d_j`` of unit length, of a group of ``a`` query and ``b`` document vectors::

        s = sum over i <= a of max over j <= b of q_i . d_j       L = sum over groups of weight * CE(s / temperature)

    Args:
        temperature: Scores are divided by it. The paper's is .03.
        score: sum, as in the paper, or mean over the query's vectors, for one size of scores in all groups.
        nested: Train all groups of the config; else the last, all vectors, alone.
        diversity_weight: Weight of the mean squared cosine between two vectors of a document.
        group_weights: Weights of the groups in their order, with commas between; default: 1 each.
    """

    def __init__(
        self,
        model: Any,
        temperature: float = 0.03,
        score: str = "sum",
        nested: bool = True,
        diversity_weight: float = 0.0,
        group_weights: str = "",
    ):
        super().__init__()
        self.model = model
        if not 0 < temperature < math.inf:
            raise InputError(f"--temperature {temperature}: scores are divided by it. Use a positive one, e.g. 0.03.")
        if score not in ("sum", "mean"):
            raise InputError(f"--score {score!r}: unknown. Use sum or mean.")
        if not 0 <= diversity_weight < math.inf:
            raise InputError(f"--diversity_weight {diversity_weight}: below 0 it makes vectors alike. Use 0 or more.")
        config = self.config
        if config.output != "token_embeddings":
            raise InputError(
                f"--output {config.output}: trains several vectors, and the model gives one. Train with "
                "token_embeddings, then polyrep.save(model, folder, view='sentence_embedding')."
            )
        self.groups = config.groups if nested else config.groups[-1:]
        self.weights = _weights(group_weights, len(self.groups))
        self.temperature, self.score, self.nested = temperature, score, nested
        self.diversity_weight, self.group_weights = diversity_weight, group_weights

    @property
    def config(self) -> Any:
        """That of the model that is trained, or of the head."""
        raise NotImplementedError

    def contrast(
        self,
        queries: Tensor,
        query_mask: Tensor,
        documents: Tensor,
        own: Tensor,
        left_out: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Parts of the loss of some queries against all documents, and the step's metrics.

        Args:
            queries: ``(queries, query vectors, dim)``.
            query_mask: ``(queries, query vectors)``, True for vectors that are there.
            documents: ``(documents, document vectors, dim)``.
            own: ``(queries,)`` row of each query's own document.
            left_out: ``(queries, documents)`` True for what is no negative of a query.

        Raises:
            InputError: There is no other document.
        """
        refuse_single(documents)
        with torch.autocast(own.device.type, enabled=False):  # sums of 16 / .03 need more than half precision
            queries, documents = _at_least_float(queries), _at_least_float(documents)
            similarity = (queries.flatten(0, 1) @ documents.flatten(0, 1).T).view(
                *queries.shape[:2], *documents.shape[:2]
            )
            parts = {}
            scored = group_scores(similarity, self.groups, query_mask, self.score == "mean")
            for group, weight, scores in zip(self.groups, self.weights, scored, strict=True):
                scores = scores / self.temperature
                if left_out is not None:
                    others = left_out & ~F.one_hot(own, scores.shape[1]).bool()
                    scores = scores.masked_fill(others, -math.inf)
                parts[_name(group)] = weight * F.cross_entropy(scores, own)
            cosines = _pairwise(documents)
            if self.diversity_weight:
                parts["diversity"] = self.diversity_weight * cosines.square().mean()
            self.metrics = self._metrics(similarity.detach(), query_mask, cosines.detach(), own)
        return parts

    def _metrics(self, similarity: Tensor, query_mask: Tensor, cosines: Tensor, own: Tensor) -> dict[str, Tensor]:
        """Mean cosine between a document's vectors, and how many of them answer: their number if all did so alike."""
        rows = torch.arange(len(own), device=own.device)
        wins = similarity[rows, :, own].argmax(-1)[query_mask].bincount(minlength=similarity.shape[-1])
        shares = wins / wins.sum().clamp(min=1)
        return {"pairwise_cosine": cosines.mean(), "vectors_that_answer": torch.special.entr(shares).sum().exp()}

    def get_config_dict(self) -> dict[str, Any]:
        """Arguments, for the model card."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters if name != "model"}

    @property
    def citation(self) -> str:
        """BibTeX, for the model card."""
        return (
            "@inproceedings{xiao2026metaembed,\n"
            "    title={MetaEmbed: Scaling Multimodal Retrieval at Test-Time with Flexible Late Interaction},\n"
            "    author={Zilin Xiao and Qi Ma and Mengting Gu and Chun-cheng Jason Chen and Xintao Chen and Vicente "
            "Ordonez and Vijai Mohan},\n"
            "    booktitle={ICLR},\n"
            "    year={2026},\n"
            "    url={https://arxiv.org/abs/2509.18095},\n"
            "}"
        )


class MetaEmbedObjective(_NestedLoss):
    """Train a whole model: pairs of query and document, and any number of hard negatives, with in-batch negatives.

    Documents of all processes are negatives. The encoder runs once a text, whatever the number of groups.

    Args:
        own_negatives: A hard negative is that of its own query alone, as in the paper; else of all queries.
    """

    learning_rates = {r"\bmetas\.": 100.0, r"\bresidual\.": 10.0}
    """What is new has far to go: at the rate of the encoder, meta tokens would stay the words that they start as."""

    def __init__(
        self,
        model: Any,
        temperature: float = 0.03,
        score: str = "sum",
        nested: bool = True,
        own_negatives: bool = False,
        diversity_weight: float = 0.0,
        group_weights: str = "",
    ):
        super().__init__(model, temperature, score, nested, diversity_weight, group_weights)
        self.own_negatives = own_negatives

    @property
    def inner(self) -> Any:
        """The MetaEmbedModel."""
        inner: Any = getattr(unwrapped(self.model)[0], "model", None)
        if str(getattr(getattr(inner, "config", None), "model_type", "")) != "polyrep_metaembed":
            raise InputError(f"{type(self).__name__}: the model has no meta tokens. Use a MetaEmbedModel.")
        return inner  # the class may be the folder's own

    @property
    def config(self) -> Any:
        """That of the model."""
        return self.inner.config

    def initialize(self, pairs: Mapping[str, Dataset]) -> None:
        """Set a new projection to the principal axes of the backbone's vectors of some documents."""
        inner, model = self.inner, unwrapped(self.model)
        if inner.config.projection_dim is None or inner.config.own_projection:
            return
        documents = [text for data in pairs.values() for text in data["positive"][:]]
        sample = documents[:: -(-len(documents) // SAMPLE)]
        training, found = model.training, []
        model.eval()
        with torch.no_grad():
            for start in range(0, len(sample), 32):
                batch = model.preprocess(sample[start : start + 32], task="document")
                there = {name: v.to(model.device) if isinstance(v, Tensor) else v for name, v in batch.items()}
                found.append(inner.pooled(**there))
            inner.projection.weight.copy_(principal_axes(torch.cat(found).float(), inner.config.projection_dim))
        model.train(training)

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> dict[str, Tensor]:
        """Parts of the loss of a batch: columns of queries, their documents, and hard negatives."""
        (queries, mask), *columns = (
            self._vectors(features, "document" if column else "query")
            for column, features in enumerate(sentence_features)
        )
        return self.losses(queries, mask, [vectors for vectors, _ in columns])

    def _vectors(self, features: Mapping[str, Any], task: str) -> tuple[Tensor, Tensor]:
        output = self.model({**features}, task=task)
        return output["token_embeddings"], output["attention_mask"].bool()

    def losses(self, queries: Tensor, query_mask: Tensor, columns: Sequence[Tensor]) -> dict[str, Tensor]:
        """Parts of the loss, from the vectors of this process.

        Args:
            queries: ``(batch, query vectors, dim)``.
            query_mask: ``(batch, query vectors)``.
            columns: Of documents: the own ones, and hard negatives, each ``(batch, document vectors, dim)``.
        """
        batch, device = len(queries), queries.device
        documents = gather(torch.cat(list(columns)))
        own = in_batch_labels(batch, device, len(columns))
        left_out = None
        if self.own_negatives and len(columns) > 1:
            place = torch.arange(len(documents), device=device)
            negative = place % (batch * len(columns)) >= batch
            # A process's columns lie behind one another, so that rows of one query are a batch apart.
            mine = (place // (batch * len(columns)) == get_rank()) & (
                place % batch == torch.arange(batch, device=device)[:, None]
            )
            left_out = negative & ~mine
        return self.contrast(queries, query_mask, documents, own, left_out)


class _GradCache(CachedMultiVectorMultipleNegativesRankingLoss):
    """The stock loss's way through a large batch, with the losses of an objective."""

    def __init__(self, objective: MetaEmbedObjective, mini_batch_size: int):
        super().__init__(objective.model, mini_batch_size=mini_batch_size)
        self.losses = objective.losses

    def calculate_loss(
        self, reps: list[list[Tensor]], masks_chunks: list[list[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        """Loss from all vectors."""
        # Chunks differ in width where queries keep their tokens.
        queries, mask = (torch.cat(pad_tokens(parts)) for parts in (reps[0], masks_chunks[0]))
        parts = self.losses(queries, mask, [torch.cat(column) for column in reps[1:]])
        loss = torch.stack(list(parts.values())).sum()
        if with_backward:
            loss.backward()
        return loss.detach() if with_backward else loss


class CachedMetaEmbedObjective(MetaEmbedObjective):
    """The same for batches larger than memory: vectors first, then their gradients, then the encoder (GradCache).

    Gao, Zhang, Han and Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (2021). Costs
    a second forward pass.

    Args:
        mini_batch_size: Texts whose activations are in memory at a time.
    """

    uses_gradient_cache = True

    def __init__(
        self,
        model: Any,
        mini_batch_size: int = 32,
        temperature: float = 0.03,
        score: str = "sum",
        nested: bool = True,
        own_negatives: bool = False,
        diversity_weight: float = 0.0,
        group_weights: str = "",
    ):
        if mini_batch_size < 1:
            raise InputError(f"--mini_batch_size {mini_batch_size}: use 1 or more.")
        super().__init__(model, temperature, score, nested, own_negatives, diversity_weight, group_weights)
        self.mini_batch_size = mini_batch_size

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Loss of a batch."""
        # Made anew, since trainers wrap the model after the objective has been made.
        return _GradCache(self, self.mini_batch_size)(sentence_features)


class MetaEmbedHeadObjective(_NestedLoss):
    """Fit a head to the cached token vectors of a frozen late-interaction model: the model is the head alone.

    Beside the contrast, which learns from judgments, each group is to score the documents of a batch as MaxSim over
    all tokens does: the divergence of their softmaxes, in both directions, as ReinPool's heads learn.

    Args:
        label_weight: Weight of the contrast.
        maxsim_weight: Weight of the divergence from MaxSim over all tokens, a mean over the groups.
        score_scale: Factor of scores per query vector before the softmax of the divergence.
    """

    trains_on = "tokens"
    needs_labels = True
    learning_rates = {r"\bsharpness\.": 100.0}
    """It is about ten, where other parameters are below one."""
    model: MetaEmbedHead

    def __init__(
        self,
        model: MetaEmbedHead,
        temperature: float = 0.03,
        score: str = "sum",
        nested: bool = True,
        diversity_weight: float = 0.0,
        group_weights: str = "",
        label_weight: float = 1.0,
        maxsim_weight: float = 0.0,
        score_scale: float = 30.0,
    ):
        super().__init__(model, temperature, score, nested, diversity_weight, group_weights)
        for name, value in (("label_weight", label_weight), ("maxsim_weight", maxsim_weight)):
            if not 0 <= value < math.inf:
                raise InputError(f"--{name} {value}: below 0 it would teach the opposite. Use 0 or more.")
        if not label_weight and not maxsim_weight:
            raise InputError("--label_weight 0 --maxsim_weight 0: nothing would be learned. Leave one out.")
        if not 0 < score_scale < math.inf:
            raise InputError(f"--score_scale {score_scale}: a softmax needs a positive factor, e.g. 30.")
        self.label_weight, self.maxsim_weight, self.score_scale = label_weight, maxsim_weight, score_scale

    @property
    def config(self) -> Any:
        """That of the head."""
        return self.model.config

    @torch.no_grad()
    def prepare(self, data: HeadData) -> Rows:
        """Set a projection to the principal axes of the documents' mean vectors."""
        if self.config.projection_dim is not None:
            means = data.document_means().float()
            weight = self.model.projection.weight
            weight.copy_(principal_axes(means[:: -(-len(means) // SAMPLE)], self.config.projection_dim))
        return data

    def forward(self, features: list[Features], labels: Tensor) -> dict[str, Tensor]:
        """Parts of the loss of a batch of :class:`~polyrep.training.pairs.HeadData`: queries, and all documents."""
        queries, documents = features
        (asked, asked_mask), (local, _) = (self.encode(side, task) for side, task in zip(features, TASKS, strict=True))
        everything = gather(local)
        own = labels + get_rank() * len(local)
        parts = self.contrast(asked, asked_mask, everything, own, judged_relevant(features))
        parts = {name: part * (1 if name == "diversity" else self.label_weight) for name, part in parts.items()}
        if self.maxsim_weight:
            with torch.autocast(own.device.type, enabled=False):
                parts["maxsim"] = self.maxsim_weight * self._divergence(
                    asked, asked_mask, everything, queries, documents, product_dtype(own.device)
                )
        return parts

    def encode(self, features: Features, task: str) -> tuple[Tensor, Tensor]:
        """All vectors of texts ``(texts, vectors, dim)`` and their mask ``(texts, vectors)``."""
        output = self.model(features["token_embeddings"], features["attention_mask"], task)
        return output.token_embeddings, output.mask

    def _divergence(
        self,
        asked: Tensor,
        asked_mask: Tensor,
        everything: Tensor,
        queries: Features,
        documents: Features,
        dtype: torch.dtype,
    ) -> Tensor:
        """Divergence of the groups' scores from MaxSim over all tokens, of all queries and different documents."""
        teacher, columns, _ = maxsim_taught(queries, documents, dtype)
        asked, asked_mask = gather_tokens(_at_least_float(asked), asked_mask)
        held = _at_least_float(everything)[columns]
        similarity = (asked.flatten(0, 1) @ held.flatten(0, 1).T).view(*asked.shape[:2], *held.shape[:2])
        scored = group_scores(similarity, self.groups, asked_mask, mean=True)
        scale = self.score_scale
        return torch.stack([divergence(scores * scale, teacher * scale) for scores in scored]).mean()


TASKS = ("query", "document")


def _name(group: Sequence[int | None]) -> str:
    """A group in the log: 2x4, or of queries that keep their tokens tokensx4."""
    asked, held = group
    return f"{'tokens' if asked is None else asked}x{held}"


def _at_least_float(vectors: Tensor) -> Tensor:
    """Vectors in float32, or as they are if they are in more."""
    return vectors.to(torch.promote_types(vectors.dtype, torch.float32))


def _pairwise(documents: Tensor) -> Tensor:
    """Cosines of each two different vectors of a document: ``(documents, pairs)``; zero for one vector alone."""
    number = documents.shape[1]
    if number < 2:
        return documents.new_zeros(1)
    cosines = documents @ documents.transpose(1, 2)  # (documents, vectors, vectors)
    first, second = torch.triu_indices(number, number, 1, device=documents.device)
    return cosines[:, first, second]


def _weights(said: str, count: int) -> list[float]:
    """Weights of the groups; InputError if they are none, or not as many."""
    try:
        weights = [float(number) for number in said.split(",")] if said else [1.0] * count
    except ValueError:
        weights = []
    if len(weights) != count or not all(0 <= weight < math.inf for weight in weights) or not sum(weights):
        raise InputError(
            f"--group_weights {said!r}: {count} groups are trained, and each needs a weight of 0 or more, one of them "
            f"above. Use e.g. {','.join(['1'] * count)}."
        )
    return weights
