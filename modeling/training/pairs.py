"""Pairs of query and document from the caches of any number of data sets, with negatives: ``HeadData``.

A data set is a :class:`Part`: both sides encoded, and for each query what may be drawn beside it. ``HeadData`` numbers
the pairs of all parts, and makes a batch of some of them by asking each part for its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.dataset import RetrievalDataset
from ..data.noise import narrowed as with_less_in_them
from ..encoding.embeddings import Embeddings, mean_of_tokens, sum_of_tokens
from ..errors import InputError
from ..search.ranking import exact_search, tie_ranks
from .sides import Features, SentenceSide, Side, concatenated
from .teachers import Teacher, score_pairs
from .vectors import encode_dataset


@dataclass(frozen=True)
class Part:
    """One data set of the pairs.

    Attributes:
        queries: Its queries, encoded.
        documents: Its documents, encoded.
        nearest: ``(queries, depth)`` rows of the documents that are nearest to each query, from which negatives are
            drawn.
        judged: ``(queries, most judged)`` places of what is no negative of it among those of all data sets, plus 1; 0
            for none: its relevant documents, those of queries with its text, and its own. None without labels.
        own: ``(queries,)`` row of the document that each query is itself, which is never near to it; -1 for none.
        narrowed: Task -> the same texts with less in them.
        score: Gives a teacher's scores of ``(pairs, 2)`` rows of queries and documents; None without one.
        teacher_scores: ``(queries, depth + most judged)`` what it gives to the nearest, then to the judged; of
            padding, to the first document. None without a teacher.
    """

    queries: Side
    documents: Side
    nearest: np.ndarray
    judged: np.ndarray | None = None
    own: np.ndarray | None = None
    narrowed: Mapping[str, Side] = field(default_factory=dict)
    score: Callable[[np.ndarray], np.ndarray] | None = None
    teacher_scores: np.ndarray | None = None

    def scored(self) -> Part:
        """The same with the teacher's scores of what is nearest now, if there is a teacher."""
        if self.score is None:
            return self
        assert self.judged is not None
        judged = np.maximum(self.judged - 1 - self.documents.first, 0)
        wanted = np.concatenate([self.nearest, judged], axis=1)  # (queries, depth + most judged)
        rows = np.repeat(np.arange(len(wanted)), wanted.shape[1])
        scores = self.score(np.stack([rows, wanted.reshape(-1)], axis=1)).reshape(wanted.shape)
        return replace(self, teacher_scores=scores)

    def batch(self, asked: np.ndarray, own: np.ndarray, draws: np.ndarray) -> tuple[Features, Features, Features]:
        """Features of queries ``(batch,)``, of their own documents ``(batch,)``, and of negatives.

        Args:
            asked: Rows of the queries.
            own: Rows of their own documents.
            draws: ``(batch, negatives)`` in [0, 1), which negatives to take of each query's nearest.
        """
        drawn = (draws * self.nearest.shape[1]).astype(np.int64)
        places = [asked, own, self.nearest[asked[:, None], drawn].reshape(-1)]
        queries, *documents = (
            side.features(rows) | self._narrowed(task, rows)
            for side, task, rows in zip(
                (self.queries, self.documents, self.documents), ("query", "document", "document"), places, strict=True
            )
        )
        if self.judged is not None:  # so that no relevant document need count as a negative
            queries["judged"] = torch.from_numpy(self.judged[asked])
        if self.teacher_scores is not None:
            assert self.judged is not None
            column = (self.judged[asked] == self.documents.places(own)[:, None] + 1).argmax(1)
            columns = np.concatenate([self.nearest.shape[1] + column[:, None], drawn], axis=1)  # own, then negatives
            queries["teacher"] = torch.from_numpy(self.teacher_scores[asked[:, None], columns])
        return queries, documents[0], documents[1]

    def _narrowed(self, task: str, rows: np.ndarray) -> Features:
        if task not in self.narrowed:
            return {}
        vectors = self.narrowed[task].embeddings.values[rows].astype(np.float32)
        return {"narrow_embedding": torch.from_numpy(vectors)}


class HeadData(Dataset):
    """Pairs of query and document, with negatives from the backbone's own ranking, over one or more data sets.

    Args:
        kind: What the head reads: ``sentence`` for one vector a text, ``tokens`` for several, ``layers`` for one a
            layer, ``states`` for every token at some layers. What is near is told by one vector a text, see
            :meth:`polyrep.training.sides.Side.single`.
        negatives: Documents drawn for each query from the ``depth`` nearest of the backbone.
        labels: Take pairs from the judgments. Without, the nearest document takes the place of the judged one, so
            that no judgment has any influence. Images are always paired with their captions, which is all their text.
        depth: See ``negatives``.
        narrowed: ``query`` or ``document`` or both, whose texts are also encoded cut short or misspelt
            (:func:`polyrep.data.noise.narrowed`), for kind sentence.
        teacher: Scores each query's documents and nearest, with labels.

    Attributes:
        parts: The data sets.
        pairs: ``(pairs, 3)`` number of a data set, row of a query and of its document.
        seed: Of the draws; set by the trainer.
        epoch: On which the draws depend too; set by the trainer.
    """

    def __init__(
        self,
        *,
        kind: Literal["sentence", "tokens", "layers", "states"] = "sentence",
        negatives: int = 2,
        labels: bool = False,
        depth: int = 100,
        narrowed: Sequence[str] = (),
        teacher: Teacher | None = None,
    ):
        if negatives < 0 or depth < 1:
            raise InputError(f"--negatives {negatives}, --depth {depth}: none can be drawn. Use 0 and 1, or more.")
        if teacher is not None and not labels:
            raise InputError("--teacher: is for an objective that learns from judgments.")
        if narrowed and not (labels and kind == "sentence"):
            raise InputError(
                "texts with less in them: are for an objective that learns from judgments, and from one vector a text."
            )
        self.kind, self.negatives, self.labels, self.depth = kind, negatives, labels, depth
        self.narrowed, self.teacher = tuple(narrowed), teacher
        self.parts: list[Part] = []
        self.pairs = np.empty((0, 3), np.int64)
        self.seed = self.epoch = 0

    # Building

    def add(self, model: Any, dataset: RetrievalDataset, images: Any = None, **options: Any) -> None:
        """Encode a data set, or map its cache, and add its pairs.

        Args:
            model: The frozen backbone.
            dataset: Whose vectors, if it brings any, are taken instead.
            images: Encodes the documents where the backbone cannot.
            options: Those of the encoding.

        Raises:
            InputError: The two sides do not fit together, or a caption of an image holds no known word.
        """
        first = sum(len(part.queries) for part in self.parts), sum(len(part.documents) for part in self.parts)
        queries, documents = encode_dataset(model, dataset, kind=self.kind, images=images, first=first, **options)
        if documents.has_images:
            self.labels = True
        if self.parts and self.has_images != documents.has_images:
            raise InputError(f"{dataset.name}: one data set holds images, another texts. Train on one kind at a time.")
        documents = replace(documents, same=_first_equal(dataset.corpus))
        nearest = self._nearest(model, dataset, queries.single("query"), documents.single("document"))
        if self.labels:
            pairs, judged = _judged(dataset, documents)
        else:
            pairs, judged = np.stack([np.arange(len(queries)), nearest[:, 0]], axis=1), None
        part = Part(queries, documents, nearest, judged, dataset.own, self._narrowed(model, dataset, options))
        if self.teacher is not None:
            settings = {"cache_dir": options.get("cache_dir"), "batch_size": options.get("batch_size", 32)}
            names = (f"{dataset.name}-{dataset.split}", dataset.name)
            score = partial(score_pairs, self.teacher, dataset.queries, dataset.corpus, names=names, **settings)
            part = replace(part, score=score).scored()
        numbered = np.concatenate([np.full((len(pairs), 1), len(self.parts)), pairs], axis=1)
        self.parts.append(part)
        self.pairs = np.concatenate([self.pairs, numbered])

    def _nearest(
        self, model: Any, dataset: RetrievalDataset, queries: Embeddings, documents: Embeddings
    ) -> np.ndarray:
        """``(queries, depth)`` rows of each query's nearest documents; of the first, where nothing is drawn."""
        if queries.dim == documents.dim:
            similarity = str(model.similarity_fn_name) if self.kind in ("layers", "states") else "dot"
            ranks = tie_ranks(list(dataset.corpus))
            depth = min(self.depth, _others(dataset.own, len(documents)))
            options: dict[str, Any] = {"similarity": similarity, "k": depth, "left_out": dataset.own}
            return exact_search(queries, documents, ranks, **options)[0]
        if self.negatives or self.teacher is not None or not self.labels:
            raise InputError(
                f"{dataset.name}: queries have vectors of {queries.dim} and documents of {documents.dim}, so none is "
                "nearest and could be drawn. Use --negatives 0 and an objective that learns from judgments."
            )
        return np.zeros((len(queries), 1), np.int64)

    def _narrowed(self, model: Any, dataset: RetrievalDataset, options: dict[str, Any]) -> dict[str, Side]:
        """Task -> its texts with less in them, of the sides that are wanted."""
        texts = {
            "query": (dataset.queries, f"{dataset.name}-{dataset.split}-narrowed"),
            "document": (dataset.corpus, f"{dataset.name}-narrowed"),
        }
        return {
            task: SentenceSide.encode(model, with_less_in_them(whole), task, name, **options)
            for task, (whole, name) in texts.items()
            if task in self.narrowed
        }

    def count(self, pairs: int) -> None:
        """Add pairs of a data set that are only counted, for a plan."""
        number = self.pairs[:, 0].max(initial=-1) + 1
        self.pairs = np.concatenate([self.pairs, np.full((pairs, 3), number)])

    def even_out(self, first: int) -> None:
        """Repeat pairs of the parts from ``first`` on until each has about as many as the largest of them.

        Each repeat draws its own negatives.
        """
        counts = np.bincount(self.pairs[:, 0])
        times = np.where(np.arange(len(counts)) < first, 1, np.round(counts[first:].max() / counts))
        self.pairs = np.repeat(self.pairs, times.astype(int)[self.pairs[:, 0]], axis=0)

    def mine_again(self, encode: Callable[[Features, str], Tensor]) -> None:
        """Take each query's nearest documents anew, by the inner product of the vectors that ``encode`` makes."""
        for number, part in enumerate(self.parts):
            queries, documents = _encoded(part.queries, "query", encode), _encoded(part.documents, "document", encode)
            ranks = np.arange(len(part.documents))
            options: dict[str, Any] = {"similarity": "dot", "k": part.nearest.shape[1], "left_out": part.own}
            found, _ = exact_search(queries, documents, ranks, **options)
            self.parts[number] = replace(part, nearest=found).scored()

    # Batches

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, row: int) -> np.ndarray:
        return np.append(self.pairs[row], row)

    def collate(self, rows: list[np.ndarray]) -> dict[str, Any]:
        """A batch: ``features`` of queries and of documents, own ones first, then negatives; and ``labels``.

        With labels, queries carry ``judged``: ``index`` of every relevant document plus 1, padded with 0. With a
        teacher, ``list (batch, 1 + negatives)`` rows of their documents in the batch, and its ``teacher`` scores.
        """
        pairs = np.stack(rows)  # (batch, 4): data set, query, document, row
        # Draws follow from the seed and the rows, so that neither an interruption nor more processes change them.
        draws = np.stack(
            [np.random.default_rng([self.seed, self.epoch, row]).random(self.negatives) for row in pairs[:, 3]]
        )
        members = [np.flatnonzero(pairs[:, 0] == number) for number in np.unique(pairs[:, 0])]
        found = [self.parts[pairs[m[0], 0]].batch(pairs[m, 1], pairs[m, 2], draws[m]) for m in members]
        asked, own, negatives = (list(parts) for parts in zip(*found, strict=True))
        queries, documents = concatenated(asked), concatenated(own + negatives)
        back = torch.from_numpy(np.argsort(np.concatenate(members)))  # from data set by data set to the order of rows
        queries = {name: values[back] for name, values in queries.items()}
        if self.teacher is not None:  # rows of the documents that the teacher's scores are of
            drawn_of = len(pairs) + back[:, None] * self.negatives + torch.arange(self.negatives)
            queries["list"] = torch.cat([torch.arange(len(pairs))[:, None], drawn_of], 1)
        back = torch.cat([back, torch.arange(len(pairs), len(documents["index"]))])
        documents = {name: values[back] for name, values in documents.items()}
        return {"features": [queries, documents], "labels": torch.arange(len(pairs))}

    # The whole of it, for what an objective sets before the first step

    def batches(self, side: str, size: int = 1024) -> Iterator[Features]:
        """Every query or document once, in order, a batch at a time."""
        for part in self.parts:
            texts = part.documents if side == "document" else part.queries
            for start in range(0, len(texts), size):
                yield texts.features(np.arange(start, min(start + size, len(texts))))

    def pair_batches(self, size: int = 1024) -> Iterator[tuple[Features, Features]]:
        """Features of every pair's query and document, in order, a batch at a time."""
        for number, part in enumerate(self.parts):
            pairs = self.pairs[self.pairs[:, 0] == number]
            for start in range(0, len(pairs), size):
                rows = pairs[start : start + size]
                yield part.queries.features(rows[:, 1]), part.documents.features(rows[:, 2])

    @property
    def has_images(self) -> bool:
        """Whether the documents are images, which have no text of their own."""
        return any(part.documents.has_images for part in self.parts)

    def query_sums(self) -> Tensor:
        """``(queries, dim)`` sum of each query's token vectors, over all data sets."""
        sums = [sum_of_tokens(part.queries.embeddings).values for part in self.parts]
        return torch.from_numpy(np.concatenate(sums))

    def document_means(self) -> Tensor:
        """``(documents, dim)`` normalised mean of each document's token vectors, over all data sets."""
        means = [mean_of_tokens(part.documents.embeddings).values for part in self.parts]
        return torch.from_numpy(np.concatenate(means).astype(np.float32))

    def relevant(self) -> Tensor:
        """``(pairs, 2)`` place of a query and of its document among those of all data sets."""
        found = np.empty((len(self.pairs), 2), np.int64)
        for number, part in enumerate(self.parts):
            mine = self.pairs[:, 0] == number
            found[mine, 0] = part.queries.places(self.pairs[mine, 1])
            found[mine, 1] = part.documents.places(self.pairs[mine, 2])
        return torch.from_numpy(found)

    def most_tokens(self) -> int:
        """Vectors of the longest document."""
        return max(int(part.documents.embeddings.lengths.max()) for part in self.parts)


def _judged(dataset: RetrievalDataset, documents: Side) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of the judgments, ``(pairs, 2)`` rows of a query and of a relevant document, and :attr:`Part.judged`."""
    place = {identifier: i for i, identifier in enumerate(dataset.corpus)}
    rows = [
        (row, place[document])
        for row, query in enumerate(dataset.queries)
        for document, relevance in dataset.qrels[query].items()
        if relevance > 0
    ]
    pairs = np.array(rows, np.int64).reshape(-1, 2)
    asked = {text: i for i, text in enumerate(dict.fromkeys(dataset.queries.values()))}
    texts = np.array([asked[text] for text in dataset.queries.values()])  # (queries,) equal ones have one number
    own = np.flatnonzero(dataset.own >= 0)
    known = np.unique(  # (known, 2) text and document
        np.concatenate(
            [
                np.stack([texts[pairs[:, 0]], documents.places(pairs[:, 1])], 1),
                np.stack([texts[own], documents.places(dataset.own[own])], 1),
            ]
        ),
        axis=0,
    )
    counts = np.bincount(known[:, 0], minlength=len(asked))
    judged = np.zeros((len(asked), counts.max(initial=1)), np.int64)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    judged[known[:, 0], np.arange(len(known)) - starts] = known[:, 1] + 1
    return pairs, judged[texts]


def _first_equal(corpus: Mapping[str, Any]) -> np.ndarray | None:
    """:attr:`polyrep.training.sides.Side.same` of the documents; images are opened late, and differ."""
    if not isinstance(corpus, dict) or not isinstance(next(iter(corpus.values())), str):
        return None
    first: dict[str, int] = {}
    same = np.array([first.setdefault(text, row) for row, text in enumerate(corpus.values())], np.int64)
    return same if len(first) < len(corpus) else None


def _others(own: np.ndarray, documents: int) -> int:
    """How many documents every query has beside the one that it is itself."""
    return max(1, documents - bool((own >= 0).any()))


def _encoded(side: Side, task: str, encode: Callable[[Features, str], Tensor]) -> Embeddings:
    """A side's texts by the vectors that ``encode`` makes of their features."""
    rows = np.arange(len(side))
    with torch.inference_mode():
        vectors = [encode(side.features(part), task) for part in np.array_split(rows, -(-len(rows) // 2048))]
    values = torch.cat(vectors).float().cpu().numpy()
    return replace(side.embeddings, values=values, dim=values.shape[1])
