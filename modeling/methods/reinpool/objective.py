"""How the ReinPool head is learned from cached token vectors: by reward, or by soft gates. The backbone is not needed.

Both objectives teach the same head. ``SoftGateObjective`` lets every vector count by its keep probability, through
which gradients flow, and follows the frozen model's own MaxSim scores. ``ReinforceObjective`` decides for real, keep
or drop, looks how well the pooled documents rank, and makes decisions that did better than their siblings likelier.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from sentence_transformers.util import get_rank, get_world_size
from torch import Tensor
from torch.nn import functional as F

from ...errors import InputError
from ...search.scoring import packed_maxsim
from ...training.losses import (
    divergence,
    first_places,
    gather,
    gather_tokens,
    product_dtype,
    refuse_unknown_teaching,
    refuse_untaught,
    row_uniform,
    taught,
)
from ...training.objective import Objective, Rows
from ...training.pairs import HeadData
from ...training.sides import Features
from .modeling_reinpool import ReinPoolModel


class _PoolingObjective(Objective):
    """What both objectives share: pooled documents are to score as whole ones do, for any number of vectors."""

    trains_on = "tokens"
    needs_labels = True

    learning_rates = {r"\bkeep\.": 30.0}
    """The last layer of the filter is zero at first: slow at the rate that suits the others."""

    def __init__(self, model: ReinPoolModel, settings: dict[str, Any]):
        super().__init__()
        self.settings = {name: v for name, v in settings.items() if name not in ("self", "model", "__class__")}
        scale, ladder = settings["score_scale"], settings["ladder"]
        if not 0 < scale < math.inf:
            raise InputError(f"--score_scale {scale}: scores need a positive factor before the softmax, e.g. 30.")
        refuse_unknown_teaching(settings.get("distill_weight", 0.0), settings.get("distill", "order"))
        for name in ("label_weight", "prior_weight", "entropy_weight"):
            if not 0 <= settings.get(name, 0) < math.inf:
                raise InputError(f"--{name} {settings[name]}: no weight. Use 0 or more.")
        try:
            self.ladder = [int(number) for number in ladder.split(",")]
        except ValueError:
            self.ladder = []
        if not self.ladder or min(self.ladder) < 1 or len(set(self.ladder)) < len(self.ladder):
            raise InputError(f"--ladder {ladder!r}: different numbers of vectors, with commas between, e.g. 1,4,16.")
        if model.config.pooling in ("mean", "slots") and self.ladder != [model.config.num_vectors]:
            raise InputError(
                f"--ladder {ladder}: pooling={model.config.pooling!r} always gives {model.config.num_vectors} "
                f"vector(s). Use --ladder {model.config.num_vectors}, or --pooling kmeans."
            )
        if settings["rungs"] < 1:
            raise InputError(f"--rungs {settings['rungs']}: a step would train nothing. Use 1 or more.")
        self.model = model
        self.data: HeadData | None = None

    def prepare(self, data: HeadData) -> Rows:
        """Keep the documents, whose vectors are measured at the end."""
        self.data = data
        return data

    @torch.no_grad()
    def finish(self) -> None:
        """Measure how long single vectors of documents are, where the config wants them equally long."""
        if self.data is not None:
            self.model.measure_norms(map(self._pooled, self.data.batches("document", 64)))

    def _pooled(self, documents: Features) -> Tensor:
        """The one vector of each document as an index holds it: ``(documents, dim)``."""
        tokens, mask = (documents[name].to(self.model.device) for name in ("token_embeddings", "attention_mask"))
        return self.model(tokens, mask).embeddings[:, 0]

    def _distillation(
        self, queries: Features, documents: Features, weights: Tensor, labels: Tensor, teacher_dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Divergence of the pooled documents' scores from MaxSim over all tokens, perhaps InfoNCE and another teacher.

        Queries travel between processes, being short, and scores come back.

        Args:
            queries: This process's queries.
            documents: This process's documents.
            weights: ``(documents, tokens)`` of the filter.
            labels: ``(queries,)`` row of each query's own document among this process's documents.
            teacher_dtype: Of the dearest product of a step, for which half precision is enough.
        """
        # A few numbers of vectors a step, the same for every process; over the steps, all of the ladder.
        generator = torch.Generator().manual_seed(hash((self.seed, self.progress[0])) % 2**63)
        drawn = torch.randperm(len(self.ladder), generator=generator)[: self.settings["rungs"]].tolist()
        query_tokens, query_mask = gather_tokens(queries["token_embeddings"], queries["attention_mask"])
        tokens, mask = documents["token_embeddings"], documents["attention_mask"]
        # A document that is there twice must not be its own negative: columns of its first place only.
        everyone = gather(documents["index"])
        columns, place = first_places(everyone)
        factor = self.settings["score_scale"] / query_mask.sum(1, keepdim=True)

        def scores(vectors: Tensor, there: Tensor) -> Tensor:  # (all queries, all different documents)
            mine = packed_maxsim(query_tokens.to(vectors.dtype), vectors, query_mask, there)
            # Rows, then transposed: of a gradient that is not contiguous, torch's all_gather mixes up the entries.
            return gather(mine.T.contiguous())[columns].T * factor

        with torch.no_grad():
            teacher = scores(tokens.to(teacher_dtype), mask)
        first = get_rank() * len(tokens)
        own = place[gather(labels + first)] if self.settings["label_weight"] else None
        if distill := self.settings.get("distill_weight"):
            told = gather(refuse_untaught(distill, queries.get("teacher")))
            lists = place[gather(queries["list"] + first)]  # (all queries, own document and negatives)
        losses: dict[str, Tensor] = {}
        for number in (self.ladder[rung] for rung in drawn):
            pooled, present = self.model.pool(tokens, weights, number)
            student = scores(self.model.quantize(self.model.fold(pooled)), present)
            parts = {"distillation": divergence(student, teacher)}
            if own is not None:
                parts["labels"] = self.settings["label_weight"] * F.cross_entropy(student, own)
            if distill:
                parts["teacher"] = distill * taught(student.gather(1, lists), told, self.settings["distill"])
            for name, value in parts.items():
                losses[name] = losses.get(name, 0) + value / len(drawn)
        return losses

    def get_config_dict(self) -> dict[str, Any]:
        """Settings, for the card."""
        return dict(self.settings)

    @property
    def citation(self) -> str:
        """BibTeX of the paper."""
        return """@misc{cha2026reinpool,
  title = {ReinPool: Reinforcement Learning Pooling Multi-Vector Embeddings for Retrieval System},
  author = {Cha and others},
  year = {2026},
  eprint = {2601.07125},
  archivePrefix = {arXiv}
}"""


class SoftGateObjective(_PoolingObjective):
    """Every vector counts by its keep probability, so that gradients reach the filter.

    So it does while training even of a head with ``weights="hard"``, which then decides by its threshold.

    The loss is the divergence, in both directions, of the softmax over a batch of the pooled documents' scores from
    that of the frozen model's MaxSim over all tokens, and with ``label_weight`` InfoNCE beside it, which by itself
    over-fits a few thousand pairs.

    Args:
        score_scale: Factor of scores per query token before the softmax.
        ladder: Numbers of vectors to train; the head then serves all of them.
        rungs: Of the ladder, drawn each step, at most. A second costs less than a second step, since filter and frozen
            scores are shared.
        label_weight: Weight of InfoNCE on the judgments.
        prior_weight: Weight of the squared distance of the filter's logits from their start, where all are kept.
        distill_weight: Weight of what a further teacher, ``--teacher``, says of each query's document and negatives,
            see :func:`polyrep.training.losses.taught`.
        distill: Follow that teacher's order, or its scores.
    """

    def __init__(
        self,
        model: ReinPoolModel,
        score_scale: float = 30.0,
        ladder: str = "1",
        rungs: int = 1,
        label_weight: float = 0.0,
        prior_weight: float = 0.0,
        distill_weight: float = 0.0,
        distill: str = "order",
    ):
        super().__init__(model, locals())

    def forward(self, features: list[Features], labels: Tensor) -> dict[str, Tensor]:
        """Loss of a batch.

        Args:
            features: Queries ``(batch, ...)``, then documents ``(candidates, ...)``; each with ``token_embeddings``,
                ``attention_mask`` and ``index``, the text's place in the corpus.
            labels: ``(batch,)`` row of each query's own document among this process's documents.

        Returns:
            Parts of the loss by name; their sum is minimised.
        """
        queries, documents = features
        mask = documents["attention_mask"]
        logits = self.model.keep_logits(documents["token_embeddings"], mask).float()
        weights = torch.sigmoid(logits) * mask
        self.metrics = {"kept": (weights.detach().sum() / mask.sum())}
        dtype = product_dtype(weights.device)
        with torch.autocast(weights.device.type, enabled=False):
            losses = self._distillation(queries, documents, weights, labels, dtype)
        if self.settings["prior_weight"]:
            start = self.model.config.initial_keep_logit
            distance = ((logits - start) * mask).square().sum() / _usual_count(mask)
            losses["prior"] = self.settings["prior_weight"] * distance
        return losses


class ReinforceObjective(_PoolingObjective):
    """Decisions are drawn, keep or drop, and those whose pooled vector ranks better than its siblings' get likelier.

    REINFORCE with the mean reward of a document's other samples as baseline. The reward is nDCG of rankings by the
    pooled vector, uncut by default: with one relevant text, a cut reward is nearly always zero.

    What has gradients of its own, projection or refinement, is distilled as in SoftGateObjective, on what the filter
    keeps; without either, ``score_scale, ladder, rungs`` and ``label_weight`` have nothing to act on.

    Args:
        reward: inverse: the pooled document ranks queries, those of the batch and a sample of all. forward: its
            query ranks the whole corpus, of which only this document is drawn anew.
        metric: ndcg, the only one.
        cutoff: Rank below which a relevant text counts nothing; None counts all.
        samples: Draws of a document, two at least.
        bank: Queries of the whole corpus that a document ranks beside the batch's, for the inverse reward.
        entropy_weight: Bonus for undecided filters.
        score_scale: See SoftGateObjective.
        ladder: See SoftGateObjective; rewards are always those of one vector.
        rungs: See SoftGateObjective.
        label_weight: See SoftGateObjective.
    """

    one_corpus = True
    """Rewards rank the texts of all data sets together, so that none may be there twice."""

    learning_rates = {r"\bkeep\.": 5.0}
    """Less than for soft gates: most of a reward's gradient is noise, under which a filter drifts to drop all."""

    def __init__(
        self,
        model: ReinPoolModel,
        reward: str = "inverse",
        metric: str = "ndcg",
        cutoff: int | None = None,
        samples: int = 8,
        bank: int = 4096,
        entropy_weight: float = 1e-3,
        score_scale: float = 30.0,
        ladder: str = "1",
        rungs: int = 1,
        label_weight: float = 0.0,
    ):
        super().__init__(model, locals())
        for name, choice, known in (("reward", reward, ("inverse", "forward")), ("metric", metric, ("ndcg",))):
            if choice not in known:
                raise InputError(f"--{name} {choice!r}: unknown. Use one of {', '.join(known)}.")
        for name, value, least in (("samples", samples, 2), ("bank", bank, 0), ("cutoff", cutoff, 1)):
            if value is not None and value < least:
                raise InputError(f"--{name} {value}: at least {least}, else there is nothing to compare.")
        if model.config.weights == "soft":
            raise InputError(
                "--weights soft: rewards are those of keeping or dropping, but this head would weigh by probability "
                "when it encodes. Add --weights hard."
            )
        if model.config.pooling == "slots":
            raise InputError("--pooling slots: rewards are those of one vector. Use --pooling kmeans, or mean.")
        self.distils = any(not name.startswith(("filter.", "keep.")) for name, _ in model.named_parameters())

    def prepare(self, data: HeadData) -> Rows:
        """Keep the sums of all queries and which document each asks for."""
        sums = data.query_sums()
        # Of unit length: a document ranks queries here, and a long query must not win by its length.
        self.query_vectors = F.normalize(sums, dim=-1)
        pairs = data.relevant()
        self.documents = int(pairs[:, 1].max()) + 1
        self.relevant = (pairs[:, 0] * self.documents + pairs[:, 1]).unique()  # sorted codes of (query, document)
        self.document_means = data.document_means()
        self.most_tokens = data.most_tokens()
        return super().prepare(data)

    def forward(self, features: list[Features], labels: Tensor) -> dict[str, Tensor]:
        """Loss of a batch; see :meth:`SoftGateObjective.forward`."""
        queries, documents = features
        tokens, mask = documents["token_embeddings"], documents["attention_mask"]
        logits = self.model.keep_logits(tokens, mask).float()
        device, dtype = logits.device, product_dtype(logits.device)
        with torch.autocast(device.type, enabled=False):
            own_logits, own_mask = logits[labels], mask[labels]  # (batch, tokens)
            draws = row_uniform(
                len(labels),
                self.settings["samples"],
                self.most_tokens,
                seed=self.seed,
                step=self.progress[0],
                device=device,
            )[..., : mask.shape[1]]
            # (batch, samples, tokens); a sample that drops all keeps the likeliest, as encoding does
            kept = (draws < torch.sigmoid(own_logits.detach())[:, None]) & own_mask[:, None]
            likeliest = own_logits.masked_fill(~own_mask, -math.inf).argmax(1)
            likeliest = F.one_hot(likeliest, mask.shape[1]).bool()[:, None]
            pooled_from = torch.where(kept.any(-1, keepdim=True), kept, likeliest)
            with torch.no_grad():
                shares = pooled_from.to(tokens.dtype)
                pooled = self.model.fold(self.model.combine(tokens[labels], shares, pooled_from))
                reward = self._inverse if self.settings["reward"] == "inverse" else self._forward
                rewards = reward(pooled, queries, documents, labels)  # (batch, samples)
                others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
                advantage = rewards - others
                informative = (rewards.max(1).values - rewards.min(1).values) > 1e-9
            log_kept, log_dropped = F.logsigmoid(own_logits), F.logsigmoid(-own_logits)
            chosen = torch.where(kept, log_kept[:, None], log_dropped[:, None]) * own_mask[:, None]
            log_probability = chosen.sum(-1)  # (batch, samples)
            count = gather(informative.float()[:, None]).sum().clamp(min=1) / get_world_size()
            losses = {"policy": -(advantage * log_probability).mean(1)[informative].sum() / count}
            if self.settings["entropy_weight"]:
                entropy = -(log_kept.exp() * log_kept + log_dropped.exp() * log_dropped) * own_mask
                losses["entropy"] = -self.settings["entropy_weight"] * (entropy.sum() / _usual_count(own_mask))
            self.metrics = {
                "reward": rewards.mean(),
                "skipped": 1 - informative.float().mean(),
                "kept": torch.sigmoid(own_logits.detach())[own_mask].mean(),
            }
            if self.distils:
                weights = self.model.decide(logits.detach(), mask)
                losses |= self._distillation(queries, documents, weights, labels, dtype)
        return losses

    def _inverse(self, pooled: Tensor, queries: Features, documents: Features, labels: Tensor) -> Tensor:
        """Quality (nDCG) of the ranking of queries by each sample: ``(batch, samples)``."""
        device = pooled.device
        generator = torch.Generator().manual_seed(hash((self.seed, self.progress[0], 1)) % 2**63)
        drawn = torch.randint(len(self.query_vectors), (self.settings["bank"],), generator=generator)
        bank = torch.cat([gather(queries["index"]).cpu(), drawn]).unique()
        scores = pooled @ self.query_vectors[bank].to(device).T  # (batch, samples, bank)
        codes = bank[None] * self.documents + documents["index"][labels].cpu()[:, None]
        relevant = torch.isin(codes, self.relevant).to(device)  # (batch, bank)
        return ndcg(scores, relevant[:, None], self.settings["cutoff"])

    def _forward(self, pooled: Tensor, queries: Features, documents: Features, labels: Tensor) -> Tensor:
        """Gain of each document's own query when a sample takes its place in the corpus: ``(batch, samples)``.

        The other documents stay at their plain mean: a batch has so few that the own one is nearly always first.
        """
        asked = (queries["token_embeddings"] * queries["attention_mask"][..., None]).sum(1)  # (batch, dim)
        others = asked @ self.model.fold(self.document_means.to(pooled.device)).T  # (batch, documents)
        others = others.scatter(1, documents["index"][labels][:, None], -math.inf)
        scores = torch.einsum("bsd,bd->bs", pooled, asked)
        rank = 1 + (others[:, None] > scores[..., None]).sum(-1)
        return _gain(rank, self.settings["cutoff"])


def ndcg(scores: Tensor, relevant: Tensor, cutoff: int | None = None) -> Tensor:
    """Binary nDCG: ``(..., candidates)`` scores and relevance give ``(...)``, 0 where none is relevant."""
    rank = 1 + scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    gained = (_gain(rank, cutoff) * relevant).sum(-1)
    count = relevant.sum(-1, keepdim=True)
    place = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    ideal = (_gain(place, cutoff) * (place <= count)).sum(-1)
    return torch.where(ideal > 0, gained / ideal.clamp(min=1e-12), 0.0)


def _gain(rank: Tensor, cutoff: int | None) -> Tensor:
    gain = 1 / torch.log2(1.0 + rank)
    return gain if cutoff is None else gain * (rank <= cutoff)


def _usual_count(mask: Tensor) -> Tensor:
    """Vectors of a process's documents, averaged over processes: they then give the mean that one would."""
    return gather(mask.sum()[None]).sum() / get_world_size()
