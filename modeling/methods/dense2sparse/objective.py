"""How the Dense2Sparse head is learned from cached vectors: prepare once in closed form, then distil.

``prepare`` sees the corpus and does what needs no gradient: keep the words that occur, start own weights at BM25's,
and align the vocabulary projection with the words of the documents. ``forward`` then distils the dense model's scores
into sparse ones under a regulariser, with control over what queries may be expanded to.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from sentence_transformers.util import get_rank
from torch import Tensor
from torch.nn import functional as F

from ...errors import InputError
from ...search.scoring import dot
from ...training.losses import gather, info_nce, judged_relevant, row_uniform
from ...training.objective import Objective, Rows
from ...training.pairs import HeadData
from ...training.sides import Features
from .modeling_dense2sparse import Dense2SparseModel


class Dense2SparseLoss(Objective):
    """Distillation of dense scores into sparse ones, with a regulariser and expansion control.

    The paper (section 3) distils in both directions against a nearly one-hot softmax of the dense scores, adds L1 on
    each side and controls the expansion of captions, which are the queries here. Defaults leave it where dev said so;
    every lever is a flag.

    Args:
        model: The head.
        teacher_temperature (float): Softmax temperature of the dense scores.
        teacher_unit (str): What the temperature is counted in. deviation: the standard deviation of a query's scores
            over the documents, since one encoder's cosines spread from 0 to 1 and another's from .6 to 1. score: as
            it is.
        teacher_lexical (float): Share of BM25 in the teacher's scores; 0 distils the dense model alone.
        label_weight (float): Share of the loss on labelled pairs (InfoNCE); 0 uses no label at all.
        bidirectional (bool): Also distil from documents to queries, as the paper does.
        regularizer (str): joint: sum over words of mean query weight times mean document weight, a smooth stand-in for
            FLOPs. flops: squared mean weight of each side. l1: mean weight of each side, as the paper.
        regularizer_weight (float): Its weight after the ramp.
        ramp (float): Share of the steps over which that weight rises quadratically.
        initialization (str): words: the backbone's word embeddings. random: for the control.
        alignment (str): ridge: regress the documents' own word weights on their vectors, in closed form, around the
            initialisation. none: start from that.
        alignment_ridge (float): Ridge penalty as a share of the vectors' mean variance.
        alignment_gain (float): Logits are this multiple of the regression's prediction.
        alignment_bias (float): Added to every logit: below zero, fewer words are added.
        own_scale (float): Initial own weight of the rarest word.
        control (str): Granularity of expansion control for queries: none, batch, caption or term.
        control_until (float): Share of the steps over which the probability of expansion rises from 0 to 1.
        gate_weight (float): Weight of the supervision of document logits by the words of their queries.
        min_document_frequency (int): Expand only to words that occur in that many documents.
        noise (float): Length of Gaussian noise that is added to each unit vector of a batch, for head and dense model
            alike: they then agree around the training data too, not only where a dense model that has seen it is sure.
        mixup (float): Share of a document's vector that is another one's, at most; drawn for each, likewise.
    """

    trains_on = "sentence"

    learning_rates = {r"\bown_": 15.0, r"\blog_scale$": 15.0}
    """Pattern of parameter names -> multiple of the learning rate: one number a word moves less than a matrix."""

    def __init__(
        self,
        model: Dense2SparseModel,
        teacher_temperature: float = 0.55,
        teacher_unit: str = "deviation",
        teacher_lexical: float = 0.0,
        label_weight: float = 0.0,
        bidirectional: bool = False,
        regularizer: str = "joint",
        regularizer_weight: float = 0.3,
        ramp: float = 0.3,
        initialization: str = "words",
        alignment: str = "ridge",
        alignment_ridge: float = 0.1,
        alignment_gain: float = 2.0,
        alignment_bias: float = -0.3,
        own_scale: float = 2.0,
        control: str = "none",
        control_until: float = 0.95,
        gate_weight: float = 0.0,
        min_document_frequency: int = 1,
        noise: float = 0.0,
        mixup: float = 0.0,
    ):
        given = {name: value for name, value in locals().items() if name not in ("self", "model", "__class__")}
        super().__init__()
        for name, value, known in (
            ("teacher_unit", teacher_unit, ("deviation", "score")),
            ("regularizer", regularizer, ("joint", "flops", "l1")),
            ("initialization", initialization, ("words", "random")),
            ("alignment", alignment, ("ridge", "none")),
            ("control", control, ("none", "batch", "caption", "term")),
        ):
            if value not in known:
                raise InputError(f"--{name} {value!r}: unknown. Use one of {', '.join(known)}.")
        for name, share in (("label_weight", label_weight), ("teacher_lexical", teacher_lexical), ("ramp", ramp)):
            if not 0 <= share <= 1:
                raise InputError(f"--{name} {share}: a share, so 0 to 1.")
        if teacher_temperature <= 0 or control_until <= 0:
            raise InputError("--teacher_temperature and --control_until must be above 0.")
        self.model = model
        self.settings = given

    @property
    def needs_labels(self) -> bool:
        """Whether pairs come from judgments; without, from the dense model's own ranking."""
        return self.settings["label_weight"] > 0

    def __getattr__(self, name: str) -> Any:
        """Settings by name."""
        settings = self.__dict__.get("settings", {})
        return settings[name] if name in settings else super().__getattr__(name)

    @torch.no_grad()
    def prepare(self, data: HeadData) -> Rows:
        """Set everything that follows from the corpus in closed form; a pass over it, a second for the alignment.

        Raises:
            InputError: No document holds a word of the vocabulary.
        """
        head, config = self.model, self.model.config
        if data.has_images and self.teacher_lexical:
            raise InputError(
                f"--teacher_lexical {self.teacher_lexical}: images have no words for BM25 to score. Use 0."
            )
        frequency, texts, tokens = torch.zeros(config.vocab_size), 0, 0.0
        occurring = torch.zeros(config.vocab_size)
        # Captions, which are the queries then, tell the words of images.
        worded = "query" if data.has_images else "document"  # the side whose words are indexed
        for side in ("query",) if data.has_images else ("document", "query"):
            for batch in data.batches(side, max(16, min(1024, 2**25 // config.vocab_size))):  # counts are of all words
                counts, lengths = head.count(batch["input_ids"], batch["attention_mask"])
                occurring += (counts > 0).sum(0)
                if side == worded:
                    frequency += (counts > 0).sum(0)
                    texts, tokens = texts + len(counts), tokens + float(lengths.sum())
        if not tokens:
            raise InputError(f"none of {texts:,} documents holds a word of the vocabulary, so nothing can be learned.")
        config.average_length = tokens / texts
        terms = ((occurring > 0) & (frequency >= self.min_document_frequency)).nonzero()[:, 0]
        head.restrict_expansion(terms)
        # The product of both sides' weights is BM25's idf, so each takes the root.
        idf = torch.log(1 + (texts - frequency + 0.5) / (frequency + 0.5))
        head.own_weight.copy_(self.own_scale * (idf / idf.max()).clamp(min=0.02).sqrt())
        if self.initialization == "random":
            head.vocabulary.reset_parameters()
        if self.alignment == "ridge":
            self._align(data)
        if self.teacher_lexical:
            self.lexical = copy.deepcopy(head).requires_grad_(False)
            self.lexical.config.expansion, self.lexical.config.own_tokens = "none", "learned"
        if self.label_weight < 1:
            self._measure_teachers(data)
        return data

    def _align(self, data: HeadData) -> None:
        """Ridge regression of texts' own word weights on their vectors, around the initial projection.

        Of the documents; where these are images, of their captions on both the captions' and the images' vectors.

        With X the centred hidden vectors, Z the centred weights and E the initial projection brought to the best
        common scale, the projection becomes E + (X'X + cI)^-1 X'(Z - XE'): where the corpus says little, the word
        embedding stands. This is MILCO's lexical alignment before distillation, without its gradient steps.
        """
        head, dim = self.model, self.model.config.input_dim
        words = head.config.expansion_size
        moment, cross, mean_x, mean_z = (
            torch.zeros(shape, dtype=torch.float64) for shape in ((dim, dim), (dim, words), (dim,), (words,))
        )
        texts = 0
        for vectors, words_of in self._worded(data):
            hidden = head.hidden(vectors["sentence_embedding"])
            counts, lengths = head.count(words_of["input_ids"], words_of["attention_mask"], compact=True)
            own = head.own_weight[head.expansion_terms].relu() * head.saturate(counts, lengths, "document")
            hidden, own = hidden.double(), own.double()  # products of large sums are subtracted below
            moment += hidden.T @ hidden
            cross += hidden.T @ own
            mean_x, mean_z, texts = mean_x + hidden.sum(0), mean_z + own.sum(0), texts + len(hidden)
        mean_x, mean_z = mean_x / texts, mean_z / texts
        moment = moment / texts - mean_x[:, None] * mean_x
        cross = cross / texts - mean_x[:, None] * mean_z
        prior = head.vocabulary.weight.T.double()  # (dim, words)
        reached = moment @ prior
        prior = prior * ((prior * cross).sum() / (prior * reached).sum().clamp(min=1e-12)).clamp(min=0)
        penalty = self.alignment_ridge * moment.diagonal().mean() * torch.eye(dim, dtype=torch.float64)
        solution = prior + torch.linalg.solve(moment + penalty, cross - moment @ prior)
        head.vocabulary.weight.copy_(self.alignment_gain * solution.T)
        head.vocabulary.bias.copy_(self.alignment_gain * (mean_z - mean_x @ solution) + self.alignment_bias)

    @staticmethod
    def _worded(data: HeadData) -> Iterator[tuple[Features, Features]]:
        """Features whose vectors, and features whose words, belong together."""
        if not data.has_images:
            yield from ((batch, batch) for batch in data.batches("document"))
            return
        for captions, images in data.pair_batches():
            yield captions, captions
            yield images, captions

    def _measure_teachers(self, data: HeadData) -> None:
        """Standard deviation of each teacher's scores of a query over the documents, the mean over some queries."""
        queries = next(iter(data.batches("query")))
        sums, texts = torch.zeros(2, 2, len(queries["index"]), dtype=torch.float64), 0  # (teacher, moment, queries)
        for batch in data.batches("document"):
            for teacher, scores in enumerate(self._teachers(queries, batch)):
                sums[teacher] += torch.stack([scores.double().sum(1), scores.double().square().sum(1)])
            texts += len(batch["index"])
        first, second = sums.unbind(1)
        deviation = (second / texts - (first / texts) ** 2).clamp(min=1e-12).sqrt().mean(1)
        self.deviations = [float(x) for x in deviation]

    def _teachers(self, queries: Features, documents: Features) -> list[Tensor]:
        """Dense scores, and BM25's if they teach too, each ``(queries, documents)``."""
        found = [dot(queries["sentence_embedding"], documents["sentence_embedding"])]
        if self.teacher_lexical:
            found.append(
                dot(*(self._encode(self.lexical, f, t) for f, t in ((queries, "query"), (documents, "document"))))
            )
        return found

    @staticmethod
    def _encode(head: Any, features: Features, task: str, gate: Tensor | None = None) -> Tensor:
        return head(
            features["sentence_embedding"],
            features.get("input_ids"),
            features.get("attention_mask"),
            task,
            gate=gate,
            compact=True,
            modality="text" if "input_ids" in features else "image",
        ).sentence_embedding

    def forward(self, features: list[Features], labels: Tensor | None = None) -> dict[str, Tensor]:
        """Loss of a batch.

        Args:
            features: Queries ``(batch, ...)``, then documents ``(candidates, ...)``; each with ``sentence_embedding``,
                ``index``, its place in the corpus, and unless it is an image ``input_ids`` and ``attention_mask``.
            labels: ``(batch,)`` row of each query's own document among this process's documents.

        Returns:
            Parts of the loss by name; their sum is minimised.

        Raises:
            InputError: Every document of the batch has become empty.
        """
        step, steps = self.progress
        queries, documents = (self._blurred(side, len(features[0]["index"]), n) for n, side in enumerate(features))
        sparse_queries = self._encode(
            self.model, queries, "query", self._draw_gate(len(queries["index"]), step, steps)
        )
        local_documents = self._encode(self.model, documents, "document")
        # Summed over processes, so that all of them stop, or none.
        filled = gather(torch.stack([sparse_queries.detach().sum(), local_documents.detach().sum()])[None]).sum(0)
        if not filled.all():
            raise InputError(
                f"every {'query' if filled[1] else 'document'} of step {step} is empty, so nothing can be learned: "
                f"the regulariser (--regularizer_weight {self.regularizer_weight:g}) outweighs the distillation. "
                "Lower it tenfold or lengthen --ramp; if this is one of the first steps, raise --alignment_bias."
            )
        # Half precision is for the projections: scores a thousandth apart decide what is learned.
        with torch.autocast(sparse_queries.device.type, enabled=False):
            return self._losses(queries, documents, sparse_queries.float(), local_documents.float(), labels)

    def _blurred(self, features: Features, batch: int, side: int) -> Features:
        """Features with noise on their vectors, and documents with a share of others'; of the same length as before.

        Draws go by the query that a row belongs to, ``(batch, rows of it)``, so several processes draw what one does.
        """
        vectors, (step, _) = features["sentence_embedding"], self.progress
        if not self.training or not (self.noise or self.mixup):
            return features
        rest = len(vectors) // batch - 1  # negatives of each query, behind the own documents

        def draw(use: int, *shape: int) -> Tensor:
            # Below zero, where no seed of the expansion control is.
            seed = -(4 * self.seed + 2 * side + use + 1)
            uniform = row_uniform(batch, 1 + rest, *shape, seed=seed, step=step, device=vectors.device)
            return torch.cat([uniform[:, 0], uniform[:, 1:].reshape(batch * rest, *shape)])

        lengths = vectors.norm(dim=1, keepdim=True)
        if self.mixup and side:
            share = self.mixup * draw(0, 1)
            everyone = gather(vectors[:batch])  # own documents of all processes; each row meets the next query's
            following = (get_rank() * batch + torch.arange(1, batch + 1, device=vectors.device)) % len(everyone)
            others = everyone[torch.cat([following, following.repeat_interleave(rest)])]
            vectors = (1 - share) * vectors + share * others
        normal = torch.erfinv(2 * draw(1, vectors.shape[1]).clamp(1e-6, 1 - 1e-6) - 1) * 2**0.5  # (rows, dim)
        vectors = vectors + self.noise * lengths * normal / vectors.shape[1] ** 0.5
        return {**features, "sentence_embedding": F.normalize(vectors, dim=1) * lengths}

    def _losses(
        self,
        queries: Features,
        documents: Features,
        sparse_queries: Tensor,
        local_documents: Tensor,
        labels: Tensor | None,
    ) -> dict[str, Tensor]:
        step, steps = self.progress
        all_queries, all_documents = gather(sparse_queries), gather(local_documents)
        scale = self.model.log_scale.exp()
        scores = dot(sparse_queries, all_documents) * scale  # (batch, all candidates)
        losses = {}
        if self.label_weight < 1:
            with torch.no_grad():
                teacher = self._teacher_logits(queries, documents)  # (all queries, all candidates)
            mine = [
                slice(get_rank() * len(side), (get_rank() + 1) * len(side))
                for side in (sparse_queries, local_documents)
            ]
            loss = _divergence(scores, teacher[mine[0]])
            if self.bidirectional:
                loss = (loss + _divergence(dot(local_documents, all_queries) * scale, teacher[:, mine[1]].T)) / 2
            losses["distillation"] = (1 - self.label_weight) * loss
        if self.label_weight > 0:
            assert labels is not None
            own = labels + get_rank() * len(local_documents)
            index = documents["index"]
            known = judged_relevant([queries, documents]) if "judged" in queries else None
            losses["labels"] = self.label_weight * info_nce(scores, own, index[labels], gather(index), known)
        if self.gate_weight > 0:
            losses["gate"] = self.gate_weight * self._gate_loss(sparse_queries, documents, labels)
        ramp = min(1.0, step / max(1.0, self.ramp * steps)) ** 2
        losses["regularizer"] = self.regularizer_weight * ramp * self._cost(all_queries, all_documents)
        return losses

    def _teacher_logits(self, queries: Features, documents: Features) -> Tensor:
        """Scores that the sparse ones are to follow, over the temperature: ``(all queries, all documents)``."""
        scores = dot(*(gather(side["sentence_embedding"]) for side in (queries, documents)))
        if self.teacher_lexical:
            words = (
                gather(self._encode(self.lexical, side, task))
                for side, task in ((queries, "query"), (documents, "document"))
            )
            # In units of the dense model's spread, so that the temperature keeps its meaning.
            lexical = dot(*words) * (self.deviations[0] / self.deviations[1])
            scores = (1 - self.teacher_lexical) * scores + self.teacher_lexical * lexical
        return scores / (self.teacher_temperature * (self.deviations[0] if self.teacher_unit == "deviation" else 1.0))

    def _draw_gate(self, batch: int, step: int, steps: int) -> Tensor | None:
        """Which words each query may be expanded to, or None for all: the paper's control, and two finer ones."""
        if self.control == "none" or not self.training:
            return None
        probability = min(1.0, step / (self.control_until * steps))
        device = self.model.device
        if self.control == "batch":  # one draw for everyone
            draw = torch.rand(1, 1, generator=torch.Generator().manual_seed(hash((self.seed, step)) % 2**63))
            return (draw < probability).float().expand(batch, 1).to(device)
        columns = 1 if self.control == "caption" else self.model.config.expansion_size
        return (row_uniform(batch, columns, seed=self.seed, step=step, device=device) < probability).float()

    def _gate_loss(self, sparse_queries: Tensor, documents: Features, labels: Tensor | None) -> Tensor:
        """Document logits are pulled up on the words of their query, each as much as the query weighs it."""
        logits = self.model.vocabulary(self.model.hidden(documents["sentence_embedding"][labels]))  # (batch, words)
        weights = sparse_queries.detach()
        return -(weights * F.logsigmoid(logits)).sum(1).div(weights.sum(1).clamp(min=1e-6)).mean()

    def _cost(self, queries: Tensor, documents: Tensor) -> Tensor:
        mean_query, mean_document = queries.mean(0), documents.mean(0)
        if self.regularizer == "joint":
            return mean_query @ mean_document
        if self.regularizer == "flops":
            return mean_query.square().sum() + mean_document.square().sum()
        return mean_query.sum() + mean_document.sum()

    def get_config_dict(self) -> dict[str, Any]:
        """Settings, for the card."""
        return dict(self.settings)

    @property
    def citation(self) -> str:
        """BibTeX of the paper."""
        return """@inproceedings{nguyen2024multimodal,
  title = {Multimodal Learned Sparse Retrieval with Probabilistic Expansion Control},
  author = {Nguyen, Thong and Hendriksen, Mariya and Yates, Andrew and de Rijke, Maarten},
  booktitle = {ECIR},
  year = {2024},
  eprint = {2402.17535}
}"""


def _divergence(scores: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of the softmax of ``scores`` from that of ``teacher``: mean over ``(rows, columns)``' rows."""
    return F.kl_div(scores.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)
