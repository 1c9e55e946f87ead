"""How two views are learned together: each from the pairs, and each from what the other ranks.

One loss, two ways to feed it. ``UnifierObjective`` trains a whole model with the trainers of sentence-transformers;
``UnifierHeadObjective`` fits the branch and the gate to the cached token states of a frozen encoder.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import chain, islice, repeat
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers.util import get_rank, get_world_size
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from ...encoding.embeddings import Embeddings
from ...errors import InputError, refusals
from ...hub.polyrep_room import pool_tokens
from ...search.scoring import dot
from ...training.losses import gather, in_batch_labels, judged_relevant, refuse_single, unwrapped
from ...training.objective import Objective, Rows
from ...training.pairs import HeadData
from ...training.sides import Features, SentenceSide, Side
from .modeling_unifier import VIEWS, UnifierHead

if TYPE_CHECKING:
    from datasets import Dataset

SAMPLE = 128
"""Documents by which the bias of the words is set."""

DENSE_BATCH, DENSE_RATE, DENSE_NEGATIVES = 128, 1e-3, 2
"""Pairs of a step, learning rate and negatives of a pair, of the dense view alone: see ``dense_steps``."""

HEAD_RATE = 50.0
"""Learning rate of branch, words and gate, as a multiple of the encoder's: they are new, and have far to go."""

_CHOICES = {"kl": ("forward", "reverse", "none"), "rows": ("occurring", "all")}


class _TwoViews(Objective):
    """The loss, given both views of each text (sections 3.2 and 3.3 of the paper).

    With ``s_den`` and ``s_lex`` the inner products of a query with all documents of the batch, its own and the mined
    negatives of everybody among them, each divided by a temperature of its own::

        dense_loss * CE(s_den) + lexicon_loss * CE(s_lex) + kl_weight * KL(softmax s_den || softmax s_lex)
        + sum_loss * CE(s_den + s_lex) + flops_weight * FLOPs of queries and of documents
        + CE(g s_den + (2 - g) s_lex), with a gate: of the gate alone, which the scores are constants to

    FLOPs of some texts are the sum over words of the squared mean weight. The paper scores both views by plain inner
    products; a cosine is bounded by 1 and a lexicon score is not, so that each has a temperature here.

    Args:
        tau: Temperature of the dense scores. Default: .05 for vectors of unit length, else 1.
        lexicon_tau: Temperature of the lexicon scores.
        dense_loss: Weight of the dense view's own loss; 0 trains the lexicon view alone, as a control.
        lexicon_loss: Weight of the lexicon view's own loss; 0 trains the dense view alone, as a control, and then no
            word is scored.
        sum_loss: Weight of the loss of the sum, by which each view learns what the other does not find; ours.
        kl: What the views learn from each other: forward, the lexicon's distribution is to cover the dense one's;
            reverse, the other way round; or none.
        kl_weight: Its weight.
        flops_weight: Weight of what an inverted index would cost.
        rows: Words that are trained, and kept in the end: those that occur in the training texts, or all.
        dense_steps: Of a frozen encoder with a projection: steps in which that learns alone, before the others, from
            pooled vectors. It wants hundreds, and one of them takes milliseconds; a step of both views reads every
            token, and takes seconds.
        word_sample: Words that a step scores beside those of its texts, drawn anew each step; None for all. A text
            then has weights, and a cost, of these alone. Scoring words is most of the time of a step.
    """

    def __init__(
        self,
        model: Any,
        tau: float | None = None,
        lexicon_tau: float = 1.0,
        dense_loss: float = 1.0,
        lexicon_loss: float = 1.0,
        sum_loss: float = 0.0,
        kl: str = "forward",
        kl_weight: float = 1.0,
        flops_weight: float = 2e-3,
        rows: str = "occurring",
        word_sample: int | None = None,
        dense_steps: int = 0,
    ):
        super().__init__()
        self.model = model
        if word_sample is not None and word_sample < 0:
            raise InputError(
                f"--word_sample {word_sample}: below 0 there are no words. Use 0 or more, or leave it out."
            )
        tau = tau if tau is not None else 0.05 if self.head.config.normalize else 1.0
        for name, value in (("tau", tau), ("lexicon_tau", lexicon_tau)):
            if not 0 < value < math.inf:
                raise InputError(f"--{name} {value}: scores are divided by it. Use e.g. 0.05 for cosines, else 1.")
        weights = {"dense_loss": dense_loss, "lexicon_loss": lexicon_loss}
        others = {"sum_loss": sum_loss, "kl_weight": kl_weight, "flops_weight": flops_weight}
        for name, value in (weights | others).items():
            if not 0 <= value < math.inf:
                raise InputError(f"--{name} {value}: below 0 it would teach the opposite. Use 0 or more.")
        for name, choice in (("kl", kl), ("rows", rows)):
            if choice not in _CHOICES[name]:
                raise InputError(f"--{name} {choice!r}: unknown. Use one of {', '.join(_CHOICES[name])}.")
        if not dense_loss and not lexicon_loss:
            raise InputError("--dense_loss 0 --lexicon_loss 0: no view would learn from the pairs. Leave one out.")
        if not all(weights.values()) and kl != "none":
            idle = next(name for name, value in weights.items() if not value)
            raise InputError(
                f"--{idle} 0 with --kl {kl}: a view would learn from one that does not learn. Add --kl none."
            )
        if sum_loss and not all(weights.values()):
            raise InputError(f"--sum_loss {sum_loss:g}: sums two views, and one of them does not learn. Leave it out.")
        if self.head.config.gate == "query" and not all(weights.values()):
            raise InputError("--gate query: weighs two views, and one of them does not learn. Use --gate none.")
        if not lexicon_loss and self.trains_on and not self.head.config.projection:
            raise InputError(
                "--lexicon_loss 0: of a frozen encoder the dense view learns nothing. Add --projection true, a "
                "linear map behind it."
            )
        if dense_steps < 0:
            raise InputError(f"--dense_steps {dense_steps}: cannot be taken. Use 0 or more.")
        if dense_steps and not (dense_loss and self.trains_on and self.head.config.projection):
            raise InputError(
                f"--dense_steps {dense_steps}: are of a map behind a frozen encoder's dense view, and none "
                "learns here. Add --projection true to a run of UnifierHeadObjective, or leave it out."
            )
        self.tau, self.lexicon_tau, self.dense_loss, self.lexicon_loss = tau, lexicon_tau, dense_loss, lexicon_loss
        self.sum_loss, self.kl, self.kl_weight, self.flops_weight, self.rows = (
            sum_loss,
            kl,
            kl_weight,
            flops_weight,
            rows,
        )
        self.word_sample, self.dense_steps = word_sample, dense_steps

    @property
    def head(self) -> Any:
        """The UnifierHead that is trained."""
        raise NotImplementedError

    @property
    def views(self) -> tuple[str, ...]:
        """Those that a step computes: both, unless nothing is learned of words, which cost the most."""
        return VIEWS if self.lexicon_loss else ("dense",)

    @contextmanager
    def some_words(self, sides: Iterable[Mapping[str, Any]]) -> Iterator[None]:
        """Let the head score the words of some texts and :attr:`word_sample` others meanwhile, the same everywhere."""
        head = self.head
        if self.word_sample is None:
            yield
            return
        there = torch.zeros(head.config.vocab_size, dtype=torch.bool, device=head.terms.device)
        for side in sides:
            there[side["input_ids"].to(there.device).flatten()] = True
        drawn = torch.randint(len(head.terms), (self.word_sample,), generator=self._drawn).to(there.device)
        if get_world_size() > 1:
            every = there.int()
            torch.distributed.all_reduce(every)
            there = every > 0
        there[head.terms[drawn]] = True
        head.step_words = there[head.terms]
        try:
            yield
        finally:
            head.step_words = None

    @cached_property
    def _drawn(self) -> torch.Generator:
        """What draws the same words in all processes."""
        return torch.Generator().manual_seed(0)

    def losses(
        self,
        queries: Mapping[str, Tensor],
        documents: Mapping[str, Tensor],
        own: Tensor,
        known: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Parts of the loss of some queries against all documents.

        Args:
            queries: :attr:`views`, ``dense (queries, dim)`` and ``lexicon (queries, words)``, and perhaps ``gate
                (queries,)``.
            documents: Likewise ``dense (documents, dim)``, ``lexicon (documents, words)``.
            own: ``(queries,)`` row of each query's own document.
            known: ``(queries, documents)`` True for what is relevant, the own document among it, and so no negative.

        Raises:
            InputError: There is no other document, or all queries or all documents have lost their words.
        """
        refuse_single(documents["dense"])
        if "lexicon" in self.views:
            # Summed over processes, so that all of them stop, or none.
            filled = torch.stack([queries["lexicon"].detach().sum(), documents["lexicon"].detach().sum()])
            filled = gather(filled[None]).sum(0)
            if not filled.all():
                raise InputError(
                    f"every {'query' if filled[1] else 'document'} of a step has lost its words, so nothing can be "
                    f"learned: --flops_weight {self.flops_weight:g} outweighs the pairs. Lower it tenfold."
                )
        with torch.autocast(own.device.type, enabled=False):
            taus = {"dense": self.tau, "lexicon": self.lexicon_tau}
            scores = {view: dot(queries[view].float(), documents[view].float()) / taus[view] for view in self.views}
            hot = F.one_hot(own, len(documents["dense"])).bool()
            left_out = torch.zeros_like(hot) if known is None else known & ~hot

            def ranked(scores: Tensor) -> Tensor:
                return scores.masked_fill(left_out, -1e9)  # finite: the divergence of two infinities is none

            weights = {"dense": self.dense_loss, "lexicon": self.lexicon_loss}
            parts = {view: weights[view] * F.cross_entropy(ranked(said), own) for view, said in scores.items()}
            self.metrics = {}
            if "lexicon" not in scores:
                return parts
            if self.sum_loss:
                both = scores["dense"] + scores["lexicon"]
                parts["both"] = self.sum_loss * F.cross_entropy(ranked(both), own)
            if self.kl != "none":
                first, second = (ranked(scores[view]).log_softmax(1) for view in VIEWS)
                first, second = (first, second) if self.kl == "forward" else (second, first)
                parts["kl"] = self.kl_weight * F.kl_div(second, first, reduction="batchmean", log_target=True)
            sides = gather(queries["lexicon"]).float(), documents["lexicon"].float()
            parts["flops"] = self.flops_weight * torch.stack([side.mean(0).square().sum() for side in sides]).sum()
            if "gate" in queries:
                gate = queries["gate"].float()[:, None]
                total = gate * scores["dense"].detach() + (2 - gate) * scores["lexicon"].detach()
                parts["sum"] = F.cross_entropy(ranked(total), own)
        active = [(side.detach() > 0).sum(1).float().mean() for side in sides]
        self.metrics = dict(zip(("query_words", "document_words"), active, strict=True))
        if "gate" in queries:
            self.metrics["gate"] = queries["gate"].detach().float().mean()
        return parts

    def get_config_dict(self) -> dict[str, Any]:
        """Arguments, for the model card."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters if name != "model"}

    @property
    def citation(self) -> str:
        """BibTeX, for the model card."""
        return (
            "@inproceedings{shen2023unifier,\n"
            "    title={UnifieR: A Unified Retriever for Large-Scale Retrieval},\n"
            "    author={Tao Shen and Xiubo Geng and Chongyang Tao and Can Xu and Guodong Long and Kai Zhang and "
            "Daxin Jiang},\n"
            "    booktitle={KDD},\n"
            "    year={2023},\n"
            "    url={https://arxiv.org/abs/2205.11194},\n"
            "}"
        )


class UnifierObjective(_TwoViews):
    """Train a whole model: pairs of query and document, and any number of hard negatives, with in-batch negatives.

    Documents of all processes are negatives, of both views the same ones.
    """

    @property
    def head(self) -> Any:
        """That of the model, or of a pipeline's last module."""
        for module in unwrapped(self.model):
            inner: Any = getattr(module, "model", None)
            kind = str(getattr(getattr(inner, "config", None), "model_type", ""))
            if kind.startswith("polyrep_unifier"):  # the class may be the folder's own
                return getattr(inner, "head", inner)
        raise InputError(
            f"{type(self).__name__}: the model has no two views. Use a UnifierModel, or put a UnifierPooling behind a "
            "Transformer."
        )

    @property
    def learning_rates(self) -> dict[str, float]:
        """What is new learns at :data:`HEAD_RATE` times the rate of the encoder."""
        (name,) = [name for name, module in self.named_modules() if module is self.head]
        return {rf"^{re.escape(name)}\.": HEAD_RATE}

    def initialize(self, pairs: Mapping[str, Dataset]) -> None:
        """Find the words that occur, their weights as own words, and their bias by some documents."""
        model, head = unwrapped(self.model), self.head
        occurring = torch.zeros(head.config.vocab_size, dtype=torch.bool)
        frequency, count = torch.zeros(head.config.vocab_size, dtype=torch.int64), 0
        for data in pairs.values():
            for name in (name for name in data.column_names if name != "label"):
                for start in range(0, len(data), 1024):
                    ids = model.preprocess(list(data[name][start : start + 1024]))["input_ids"].cpu()
                    there = torch.zeros(len(ids), len(occurring), dtype=torch.bool).scatter(1, ids, True)
                    occurring |= there.any(0)
                    if name == "positive":
                        frequency, count = frequency + there.sum(0), count + len(ids)
        if head.config.own_words:
            head.weigh_own(frequency, count)
        if self.rows == "occurring":
            head.learned.copy_(occurring.to(head.terms.device)[head.terms])
            if not head.learned.any():
                raise InputError("no training text holds a word of the vocabulary, so no word could be learned.")
        documents = [text for data in pairs.values() for text in data["positive"][:]]
        sample = documents[:: -(-len(documents) // SAMPLE)]
        training = model.training
        model.eval()
        head.train()  # which computes what is learned alone

        def encode() -> None:
            for start in range(0, len(sample), 16):
                batch = model.preprocess(sample[start : start + 16], task="document")
                there = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                self._views(there, "document", VIEWS)

        head.calibrate(encode)
        model.train(training)

    def complete(self, pairs: Mapping[str, Dataset]) -> None:
        """Leave out the words that did not occur."""
        head = self.head
        if not head.learned.all():
            head.restrict(head.terms[head.learned])

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> dict[str, Tensor]:
        """Parts of the loss of a batch: columns of queries, their documents, and hard negatives."""
        sides = list(sentence_features)
        with self.some_words(sides):
            queries, *columns = (
                self._views(features, "document" if column else "query", self.views)
                for column, features in enumerate(sides)
            )
        documents = {view: gather(torch.cat([column[view] for column in columns])) for view in self.views}
        batch = len(queries["dense"])
        return self.losses(queries, documents, in_batch_labels(batch, documents["dense"].device, len(columns)))

    def _views(self, features: Mapping[str, Any], task: str, views: tuple[str, ...]) -> dict[str, Tensor]:
        """Views of texts, and of queries the gate."""
        output = self.model({**features, "views": views, "prune": False}, task=task)
        return {name: output[name] for name in (*views, "gate") if name in output}


def document_frequency(documents: Embeddings, size: int) -> np.ndarray:
    """In how many documents each entry of the vocabulary is, ``(size,)``, of cached token states."""
    assert documents.offsets is not None and documents.indices is not None
    found = np.zeros(size, np.int64)
    for start in range(0, len(documents), 4096):
        bounds = documents.offsets[start : start + 4097]
        ids = documents.indices[bounds[0] : bounds[-1]].astype(np.int64)
        texts = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
        found += np.bincount(np.unique(texts * size + ids) % size, minlength=size)
    return found


def _pooled(side: Side, task: str) -> SentenceSide:
    """One vector a text, in memory."""
    return SentenceSide(side.single(task), side.first, same=side.same)


class UnifierHeadObjective(_TwoViews):
    """Fit the branch and the gate to the cached token states of a frozen encoder: the model is the head alone.

    Negatives are the other documents of the batch and what ``negatives`` draws of the encoder's nearest. The dense
    view is the encoder's own, which learns nothing here unless the head has a ``projection``.
    """

    trains_on = "states"
    needs_labels = True
    model: UnifierHead

    @property
    def head(self) -> Any:
        """The model."""
        return self.model

    @property
    def layer_token(self) -> str:
        """As the config says."""
        return self.head.config.pooling

    @property
    def state_layers(self) -> tuple[int, ...]:
        """The layer of the split, and the last."""
        config = self.head.config
        return (-1,) if config.split_is_last else (config.split_layer, -1)

    @torch.no_grad()
    def prepare(self, data: HeadData) -> Rows:
        """Keep the words that occur, and set their weights as own words and their bias by some documents.

        Raises:
            InputError: No text holds a word of the vocabulary.
        """
        head = self.head
        sides = [side for part in data.parts for side in (part.queries, part.documents)]
        if self.rows == "occurring":
            occurring = torch.zeros(head.config.vocab_size, dtype=torch.bool)
            for side in sides:
                occurring[torch.from_numpy(side.embeddings.indices[:].astype("int64"))] = True  # type: ignore[index]
            with refusals():
                head.restrict(occurring.nonzero()[:, 0])

        if head.config.own_words:
            found = [document_frequency(part.documents.embeddings, head.config.vocab_size) for part in data.parts]
            head.weigh_own(torch.from_numpy(sum(found)), sum(len(part.documents) for part in data.parts))

        def encode() -> None:
            for part in data.parts:
                rows = torch.arange(0, len(part.documents), -(-len(part.documents) * len(data.parts) // SAMPLE))
                for some in rows.split(16):
                    features = part.documents.features(some.numpy())
                    self.encode({name: value.to(head.device) for name, value in features.items()}, "document")

        head.calibrate(encode)
        if self.dense_steps:
            self._learn_map(data)
        return data

    @torch.enable_grad()
    def _learn_map(self, data: HeadData) -> None:
        """Let the map of the dense view learn alone before, from pooled vectors, with which a step takes milliseconds.

        A step of both views reads every token and takes seconds, so that they have a hundredth of the steps that a map
        needs.
        """
        head, pooled = self.head, copy.copy(data)
        pooled.parts = [
            replace(part, queries=_pooled(part.queries, "query"), documents=_pooled(part.documents, "document"))
            for part in data.parts
        ]
        pooled.negatives = DENSE_NEGATIVES if data.negatives else 0
        pooled.even_out(0)  # else a map of many data sets follows the largest
        batches: DataLoader = DataLoader(pooled, DENSE_BATCH, shuffle=True, collate_fn=pooled.collate)
        optimizer = torch.optim.AdamW(head.map.parameters(), DENSE_RATE, weight_decay=0.0)
        steps = islice(chain.from_iterable(repeat(batches)), self.dense_steps)
        for batch in tqdm(steps, "dense view", self.dense_steps, leave=False):
            asked, found = ({k: v.to(head.device) for k, v in side.items()} for side in batch["features"])
            queries, documents = (
                head(None, side["sentence_embedding"], None, views=("dense",)).dense for side in (asked, found)
            )
            own = batch["labels"].to(head.device)
            # Of this process's documents alone: all of them take the same steps.
            known = (asked["judged"][..., None] == found["index"] + 1).any(1)
            known[torch.arange(len(own)), own] = False
            scores = dot(queries, documents) / self.tau
            loss = F.cross_entropy(scores.masked_fill(known, -1e9), own)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def forward(self, features: list[Features], labels: Tensor) -> dict[str, Tensor]:
        """Parts of the loss of a batch of :class:`~polyrep.training.pairs.HeadData`: queries, and all documents."""
        with self.some_words(features):
            queries, local = (
                self.encode(side, task, self.views) for side, task in zip(features, ("query", "document"), strict=True)
            )
        documents = {view: gather(local[view]) for view in self.views}
        own = labels + get_rank() * len(local["dense"])
        return self.losses(queries, documents, own, judged_relevant(features))

    def encode(
        self, features: Features, task: str, views: tuple[str, ...] = VIEWS, prune: bool = False
    ) -> dict[str, Tensor]:
        """Views of texts, and of queries the gate.

        Args:
            features: Of a :class:`~polyrep.training.sides.StatesSide` with ``state_layers``.
            task: ``query`` or ``document``.
            views: Those that are computed.
            prune: Whether the top k words are kept.
        """
        states, mask = features["token_states"], features["attention_mask"]
        pooled = pool_tokens(states[:, :, -1], mask, self.model.config.pooling)
        output = self.model(states[:, :, 0], pooled, features["input_ids"], mask, task, views, prune=prune)
        return {name: output[name] for name in (*views, "gate") if output.get(name) is not None}
