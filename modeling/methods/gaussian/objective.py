"""How means and variances are learned: contrastively on the divergence, from a teacher, and from what narrows a text.

One loss, two ways to feed it. ``GaussianObjective`` trains a whole model with the trainers of sentence-transformers;
``GaussianHeadObjective`` fits a head to the cached vectors of a frozen backbone, which takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from sentence_transformers.util import get_rank
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import InputError
from ...training.losses import (
    gather,
    in_batch_labels,
    judged_relevant,
    learned_scale,
    refuse_single,
    refuse_unknown_teaching,
    refuse_untaught,
    scored_lists,
    taught,
    unwrapped,
)
from ...training.objective import Objective, Rows
from ...training.pairs import HeadData
from ...training.sides import Features
from .modeling_gaussian import GaussianHead, GaussianOutput

Output = Any
"""A GaussianOutput; to a type checker each of its fields may be None."""

ALIGNED = 4096
"""Texts whose vectors decide where the mean of a whole model starts; and documents that are measured in the end."""


class _GaussianContrast(Objective):
    """The loss, given distributions of queries and documents.

    With s(q, d) the score of the index, -KL(Q||D) less what depends on the query alone, it is the sum of::

        contrast_weight   CE over the documents of the batch of s / tau
        distill_weight    what a teacher says of the query's document and negatives, by order (the paper's section
                          3.4) or by scores, see :func:`polyrep.training.losses.taught`
        prior_weight      KL of each document's variance from that at the start: a variational bottleneck whose prior
                          moves along with the means, which are of one length anyway
        inclusion_weight  -log sigmoid(H / scale), where H is how far a text's distribution lies inside that of the
                          same text cut short or misspelt (ProLIP, arXiv 2410.18857): less text must be wider.
                          Of queries, and with ``inclusion_documents`` of documents
        difficulty_weight log(1 + exp(u(q') - u(q))) for queries q with a larger contrastive loss than q': what is
                          harder to answer must be wider. u is the uncertainty a dimension, in units of scale

    The paper distils alone, from random heads and at temperature 1, where the variance of the reproduction never
    moved. Here the variance starts as the temperature that contrastive training likes (``beta``), and takes a learning
    rate of its own. The whole batch is one product of index vectors: memory grows with queries plus documents.

    Args:
        tau: Temperature of scores. Default: 1 for divergences that divide by the variance, else .05 for unit vectors.
        learn_tau: Learn it, at the learning rate of everything else. It is no part of the model: a resumed run starts
            from ``tau`` again.
        variance_rate: Learning rate of the variance, as a multiple of the mean's.
        contrast_weight: See above.
        distill_weight: See above; needs --teacher, or data with scores.
        distill: Follow the teacher's order, or its scores.
        prior_weight: See above.
        inclusion_weight: See above.
        inclusion_documents: See above. A document's variance weighs in its score, so this changes rankings.
        difficulty_weight: See above.
    """

    def __init__(
        self,
        model: Any,
        tau: float | None = None,
        learn_tau: bool = False,
        variance_rate: float = 1.0,
        contrast_weight: float = 1.0,
        distill_weight: float = 0.0,
        distill: str = "order",
        prior_weight: float = 0.0,
        inclusion_weight: float = 0.0,
        inclusion_documents: bool = False,
        difficulty_weight: float = 0.0,
    ):
        super().__init__()
        self.model = model
        config = self.head.config
        tau = tau if tau is not None else {"dot": 0.05, "w2": 0.1, "csd": 0.1}.get(config.divergence, 1.0)
        if not 0 < tau < math.inf:
            raise InputError(f"--tau {tau}: scores are divided by it. Use e.g. 1, or 0.05 with --divergence dot.")
        weights = {"contrast": contrast_weight, "distill": distill_weight, "prior": prior_weight}
        weights |= {"inclusion": inclusion_weight, "difficulty": difficulty_weight}
        checked = {f"{name}_weight": weight for name, weight in weights.items()} | {"variance_rate": variance_rate}
        for name, value in checked.items():
            if not 0 <= value < math.inf:
                raise InputError(f"--{name} {value}: below 0 it would teach the opposite. Use 0 or more.")
        refuse_unknown_teaching(distill_weight, distill)
        if not contrast_weight and not distill_weight:
            raise InputError("--contrast_weight 0 --distill_weight 0: nothing would be learned. Use one of them.")
        if config.divergence == "dot":  # the control, which has no variance
            weights |= dict.fromkeys(("prior", "inclusion", "difficulty"), 0.0)
        self.tau, self.variance_rate, self.weights = tau, variance_rate, weights
        self.inclusion_documents, self.distill = inclusion_documents, distill
        self.log_scale = learned_scale(nn.Parameter(torch.tensor(-math.log(tau)), requires_grad=learn_tau))

    @property
    def head(self) -> GaussianHead:
        """The part of the model that makes distributions."""
        raise NotImplementedError

    @property
    def learning_rates(self) -> dict[str, float]:
        """Pattern of parameter names -> multiple of the learning rate."""
        return {r"variance_map|var_embedding": self.variance_rate}

    def losses(
        self,
        queries: Output,
        documents: Output,
        labels: Tensor,
        known: Tensor | None = None,
        lists: Tensor | None = None,
        teacher: Tensor | None = None,
        narrowed: Iterable[tuple[Output, Output]] = (),
    ) -> dict[str, Tensor]:
        """Parts of the loss.

        Args:
            queries: Of this process.
            documents: Of all processes; only ``sentence_embedding`` counts, and of this process for what is else.
            labels: ``(queries,)`` row of each query's own document.
            known: ``(queries, documents)`` True for what is relevant, the own document among it, and so no negative.
            lists: ``(queries, length)`` rows of the documents that the teacher has scored for each query.
            teacher: ``(queries, length)`` its scores.
            narrowed: Texts in full, and the same with less of them.

        Raises:
            InputError: There is no other document, or a teacher's score, to learn from.
        """
        refuse_single(documents.sentence_embedding)
        weights, parts = self.weights, {}
        with torch.autocast(labels.device.type, enabled=False):  # terms of some hundred nats differ by less than one
            scores = queries.sentence_embedding @ documents.sentence_embedding.T * self.log_scale.exp()
        own = F.one_hot(labels, scores.shape[1]).bool()
        masked = scores if known is None else scores.masked_fill(known & ~own, -torch.inf)
        each = F.cross_entropy(masked, labels, reduction="none")
        if weights["contrast"]:
            parts["contrast"] = weights["contrast"] * each.mean()
        if weights["distill"]:
            teacher = refuse_untaught(weights["distill"], teacher)
            assert lists is not None
            parts["distill"] = weights["distill"] * taught(scores.gather(1, lists), teacher, self.distill)
        if queries.variance is None:
            return parts
        if weights["prior"]:
            ratios = documents.variance / self.head.config.initial_variance
            size = self.head.config.mean_dim // self.head.config.groups
            parts["prior"] = weights["prior"] * (ratios - 1 - ratios.log()).sum(-1).mean() * size / 2
        if weights["inclusion"]:
            wider = torch.stack([inclusion(full, less) for full, less in narrowed])
            parts["inclusion"] = weights["inclusion"] * wider.sum()
        wide = queries.uncertainty * (2 / self.head.config.mean_dim)  # (queries,) mean log variance
        if weights["difficulty"]:
            harder = each.detach()[:, None] > each.detach()  # (queries, queries)
            wrong = F.softplus((wide - wide[:, None]) / SCALE)
            parts["difficulty"] = weights["difficulty"] * (wrong * harder).sum() / harder.sum().clamp(min=1)
        self.metrics = {
            "query_log_variance": wide.detach().mean(),
            "query_log_variance_std": wide.detach().std(correction=0),
        }
        return parts

    def narrowed_sides(self, *sides: Any) -> tuple[Any, ...]:
        """Of what stands for queries and for documents, what is narrowed."""
        return sides[: 1 + self.inclusion_documents]

    def get_config_dict(self) -> dict[str, Any]:
        """Arguments, for the model card."""
        learned = {"learn_tau": True} if self.log_scale.requires_grad else {}
        weights = {f"{name}_weight": value for name, value in self.weights.items()}
        more: dict[str, Any] = {"inclusion_documents": True} if self.inclusion_documents else {}
        more |= {"distill": self.distill} if self.weights["distill"] else {}
        return {"tau": self.tau, "variance_rate": self.variance_rate} | weights | more | learned

    @property
    def citation(self) -> str:
        """BibTeX, for the model card."""
        return (
            "@inproceedings{zamani-bendersky-2023-multivariate,\n"
            "    title={Multivariate Representation Learning for Information Retrieval},\n"
            "    author={Hamed Zamani and Michael Bendersky},\n"
            "    booktitle={SIGIR},\n"
            "    year={2023},\n"
            "    url={https://arxiv.org/abs/2304.14522},\n"
            "}"
        )


SCALE = 0.1
"""Difference of mean log variances that counts as one, in the losses that ask for an order of widths."""


def inclusion(full: Output, less: Output) -> Tensor:
    """Mean of -log sigmoid(H / SCALE), H a dimension's mean of log of the integral of p^2 q over that of p q^2.

    It is positive where p, the text in full, lies inside q, the same with less of it. Only variances are moved: means
    are what ranks, and would otherwise be drawn apart for the sake of the second term.

    Args:
        full: Distributions of ``batch`` texts.
        less: Of the same texts cut short or misspelt.
    """
    p, q = full.variance, less.variance  # (batch, groups)
    squares = (full.mean - less.mean).detach().square()
    apart = squares.unflatten(-1, (p.shape[-1], -1)).mean(-1)  # (batch, groups)
    inner, outer = p / 2 + q, p + q / 2
    inside = (q / p).log() + (outer / inner).log() + apart * (1 / outer - 1 / inner)
    return F.softplus(-inside.mean(-1) / 2 / SCALE).mean()


class GaussianObjective(_GaussianContrast):
    """Train a whole model: pairs of query and document, any number of hard negatives, and teacher scores if wanted.

    Documents of all processes are negatives. Scores of a teacher come as labels: for each pair those of its document
    and of its negatives, as sentence-transformers' own distillation losses take them.
    """

    @property
    def head(self) -> GaussianHead:
        """The part of the model that makes distributions."""
        for module in unwrapped(self.model):
            inner: Any = getattr(module, "model", None)
            kind = getattr(getattr(inner, "config", None), "model_type", "")  # the class may be the folder's own
            if kind.startswith("polyrep_gaussian"):
                return getattr(inner, "head", inner)
        raise InputError(
            f"{type(self).__name__}: the model makes no distributions. Use a GaussianModel, or put a GaussianPooling "
            "behind the modules of any other."
        )

    def initialize(self, pairs: Mapping[str, Any]) -> None:
        """Start the mean at the principal axes of the backbone's vectors of some training texts."""
        if self.head.config.mean_dim == self.head.config.input_dim:
            return
        texts = _some_texts(pairs, ("query", "positive"))
        seen: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
        try:
            model: Any = unwrapped(self.model)
            model.encode_document(texts, show_progress_bar=False)
        finally:
            hook.remove()
        vectors = torch.cat(seen).cpu().double()
        self.head.align(vectors.T @ vectors)

    def complete(self, pairs: Mapping[str, Any]) -> None:
        """Measure how long index vectors of documents are, by some training texts."""
        model: Any = unwrapped(self.model)
        options: dict[str, Any] = {"convert_to_tensor": True, "show_progress_bar": False}
        if self.head.config.equal_norms:
            texts = [_some_texts(pairs, ("positive",))]
            self.head.measure_norms(model.encode_document(some, **options) for some in texts)

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> dict[str, Tensor]:
        """Parts of the loss of a batch: columns of queries, their documents, and hard negatives."""
        query, *columns = sentence_features
        queries = self.encoded(query, "query")
        outputs = [self.encoded(column, "document") for column in columns]
        batch, local = len(queries.sentence_embedding), _stacked(outputs)
        documents: Output = GaussianOutput(
            sentence_embedding=gather(local.sentence_embedding), mean=local.mean, variance=local.variance
        )
        own = in_batch_labels(batch, queries.sentence_embedding.device, len(columns))
        narrowed = []
        if self.weights["inclusion"]:
            narrowed = [
                (full, self.encoded(shortened(features), task))
                for full, features, task in self.narrowed_sides(
                    (queries, query, "query"), (outputs[0], columns[0], "document")
                )
            ]
        scored = scored_lists(own, len(columns), labels)
        return self.losses(queries, documents, own, narrowed=narrowed, **scored)

    def encoded(self, features: Features, task: str) -> Output:
        """Distributions of texts, which the model itself only gives as index vectors."""
        seen: list[Output] = []
        hook = self.head.register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            self.model(dict(features), task=task)
        finally:
            hook.remove()
        return seen[0]


class GaussianHeadObjective(_GaussianContrast):
    """Fit a head to the vectors of a frozen backbone, from the cache: the model is the head alone.

    Negatives are the other documents of the batch and what ``negatives`` draws of the backbone's nearest.
    """

    trains_on = "sentence"
    needs_labels = True
    model: GaussianHead
    data: HeadData | None = None

    @property
    def head(self) -> GaussianHead:
        """The model itself."""
        return self.model

    @property
    def narrowed(self) -> tuple[str, ...]:
        """The sides whose texts the data must also have with less of them."""
        return self.narrowed_sides(*_TASKS) if self.weights["inclusion"] else ()

    def prepare(self, data: HeadData) -> Rows:
        """Start the mean at the principal axes of the backbone's vectors."""
        width = self.head.config.input_dim
        moments = torch.zeros(width, width, dtype=torch.float64)
        for side in ("query", "document"):
            for features in data.batches(side):
                vectors = features["sentence_embedding"].double()
                moments += vectors.T @ vectors
        self.head.align(moments)
        self.data = data
        return data

    def finish(self) -> None:
        """Measure how long index vectors of documents are."""
        if self.data is not None:
            batches = self.data.batches("document")
            self.head.measure_norms(self.mining_vectors(features, "document") for features in batches)

    def mining_vectors(self, features: Features, task: str) -> Tensor:
        """Index vectors of texts."""
        return self.model(features["sentence_embedding"].to(self.log_scale.device), task=task).sentence_embedding

    def forward(self, features: list[Features], labels: Tensor) -> dict[str, Tensor]:
        """Parts of the loss of a batch of :class:`~polyrep.training.pairs.HeadData`: queries, and all documents."""
        sides = [self.model(side["sentence_embedding"], task=t) for side, t in zip(features, _TASKS, strict=True)]
        queries, local = sides
        documents = GaussianOutput(
            sentence_embedding=gather(local.sentence_embedding), mean=local.mean, variance=local.variance
        )
        first = get_rank() * len(local.sentence_embedding)
        lists = features[0].get("list")
        narrowed = []
        if self.narrowed:
            for output, side, task in self.narrowed_sides(*zip(sides, features, _TASKS, strict=True)):
                narrowed.append((output, self.model(side["narrow_embedding"], task=task)))
        return self.losses(
            queries,
            documents,
            labels + first,
            known=judged_relevant(features),
            lists=None if lists is None else lists + first,
            teacher=features[0].get("teacher"),
            narrowed=narrowed,
        )


_TASKS = ("query", "document")


def _some_texts(pairs: Mapping[str, Any], sides: tuple[str, ...]) -> list[str]:
    """About :data:`ALIGNED` texts of some columns, spread over all data sets."""
    texts: list[str] = []
    for rows in pairs.values():
        take = range(0, len(rows), max(1, len(rows) * len(pairs) * len(sides) // ALIGNED))
        texts += [row[side] for row in rows.select(take) for side in sides]
    return texts


def shortened(features: Features) -> Features:
    """Tokenised texts cut to a random third to two thirds of their tokens, with their last token at the end."""
    ids, mask = features["input_ids"], features["attention_mask"]
    order = mask.argsort(dim=1, descending=True, stable=True)  # texts padded on the left begin at the first place
    ids, mask = ids.gather(1, order), mask.gather(1, order)
    lengths = mask.sum(1)
    share = torch.rand(len(ids), device=ids.device) / 3 + 1 / 3
    kept = torch.minimum((lengths * share).long().clamp(min=3), lengths)  # (batch,)
    last = ids.gather(1, (lengths - 1).clamp(min=0)[:, None])
    places = torch.arange(ids.shape[1], device=ids.device)
    cut = {
        "input_ids": torch.where(places == kept[:, None] - 1, last, ids),
        "attention_mask": mask * (places < kept[:, None]),
    }
    return {**features, **cut}


def _stacked(outputs: list[Output]) -> Output:
    """Outputs under one another."""
    return GaussianOutput(**{name: torch.cat([output[name] for output in outputs]) for name in outputs[0].keys()})
