"""Pairs of query and document from the caches of any number of data sets, with negatives: ``HeadData``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.dataset import RetrievalDataset
from ..data.noise import narrowed
from ..encoding.embeddings import mean_of_tokens, sum_of_tokens
from ..errors import InputError
from ..search.ranking import exact_search, tie_ranks
from .sides import Features, encode_dataset, encode_side, is_of_images
from .teachers import Teacher, score_pairs


class HeadData(Dataset):
    """Pairs of query and document, with negatives from the backbone's own ranking, over one or more data sets.

    Args:
        kind: What the head reads: ``sentence`` for one vector a text, ``tokens`` for several, ``layers`` for one a
            layer. Nearest documents of token vectors are those of their mean, since a full late-interaction search
            would cost more than the fit; of layers those of the last.
        negatives: Documents drawn for each query from the ``depth`` nearest of the backbone.
        labels: Take pairs from the judgments. Without, the nearest document takes the place of the judged one, so
            that no judgment has any influence. Images are always paired with their captions, which is all their text.
        depth: See ``negatives``.
        narrow_sides: ``query`` or ``document`` or both, whose texts are also encoded cut short or misspelt
            (:func:`polyrep.data.noise.narrowed`), for kind sentence.
        teacher: Scores each query's documents and nearest, for kind sentence and with labels.
    """

    def __init__(
        self,
        *,
        kind: Literal["sentence", "tokens", "layers"] = "sentence",
        negatives: int = 2,
        labels: bool = False,
        depth: int = 100,
        narrow_sides: Sequence[str] = (),
        teacher: Teacher | None = None,
    ):
        if negatives < 0 or depth < 1:
            raise InputError(f"--negatives {negatives}, --depth {depth}: none can be drawn. Use 0 and 1, or more.")
        self.kind, self.negatives, self.labels, self.depth, self.seed = kind, negatives, labels, depth, 0
        self.narrow_sides, self.teacher = tuple(narrow_sides), teacher
        if (teacher is not None or narrow_sides) and not (labels and kind == "sentence"):
            raise InputError(
                "--teacher, or texts with less in them: are for an objective that learns from judgments, and from one "
                "vector a text."
            )
        self.less: list[dict[str, Any]] = []  # queries, documents or both, narrowed
        self.taught: list[np.ndarray] = []  # (queries, depth + most judged) the teacher's scores: nearest, then judged
        self.teach: list[Callable[[np.ndarray], np.ndarray]] = []  # and what makes them
        # queries, documents, nearest (queries, depth)
        self.parts: list[tuple[Any, Any, np.ndarray]] = []
        self.pairs = np.empty((0, 3), np.int64)  # data set, query, document
        self.judged: list[np.ndarray] = []  # (queries, most judged) places of relevant documents from 1 on, else 0
        self.epoch = 0  # set by the trainer

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
        firsts = [sum(len(part[side]) for part in self.parts) for side in (0, 1)]
        queries, documents = encode_dataset(
            model, dataset, kind=self.kind, images=images, first=(firsts[0], firsts[1]), **options
        )
        if is_of_images(documents):
            self.labels = True
        if self.parts and self.has_images != is_of_images(documents):
            raise InputError(f"{dataset.name}: one data set holds images, another texts. Train on one kind at a time.")
        ranks = tie_ranks(list(dataset.corpus))
        sides, similarity = (queries.embeddings, documents.embeddings), "dot"
        if self.kind == "tokens":
            sides = sum_of_tokens(sides[0]), mean_of_tokens(sides[1])
        elif self.kind == "layers":
            sides, similarity = (queries.last(), documents.last()), str(model.similarity_fn_name)
        if sides[0].dim == sides[1].dim:
            nearest, _ = exact_search(*sides, ranks, similarity=similarity, k=self.depth)
        elif self.negatives or self.teacher is not None or not self.labels:
            raise InputError(
                f"{dataset.name}: queries have vectors of {sides[0].dim} and documents of {sides[1].dim}, so none is "
                "nearest and could be drawn. Use --negatives 0 and an objective that learns from judgments."
            )
        else:
            nearest = np.zeros((len(queries), 1), np.int64)
        if self.labels:
            place = {identifier: i for i, identifier in enumerate(dataset.corpus)}
            judged = [
                (row, place[d])
                for row, query in enumerate(dataset.queries)
                for d, relevance in dataset.qrels[query].items()
                if relevance > 0
            ]
            pairs = np.array(judged, np.int64).reshape(-1, 2)
            counts = np.bincount(pairs[:, 0], minlength=len(queries))
            relevant = np.zeros((len(queries), counts.max(initial=1)), np.int64)
            starts = np.repeat(np.cumsum(counts) - counts, counts)
            relevant[pairs[:, 0], np.arange(len(pairs)) - starts] = firsts[1] + pairs[:, 1] + 1
            self.judged.append(relevant)
        else:
            pairs = np.stack([np.arange(len(queries)), nearest[:, 0]], axis=1)
        numbered = np.concatenate([np.full((len(pairs), 1), len(self.parts)), pairs], axis=1)
        self.parts.append((queries, documents, nearest))
        self.pairs = np.concatenate([self.pairs, numbered])
        less = {}
        for task, texts, name in (
            ("query", dataset.queries, f"{dataset.name}-{dataset.split}-narrowed"),
            ("document", dataset.corpus, f"{dataset.name}-narrowed"),
        ):
            if task in self.narrow_sides:
                less[task] = encode_side(model, narrowed(texts), task, name, **options)
        self.less.append(less)
        if self.teacher is not None:
            settings = {"cache_dir": options.get("cache_dir"), "batch_size": options.get("batch_size", 32)}
            names = (f"{dataset.name}-{dataset.split}", dataset.name)
            self.teach.append(
                partial(score_pairs, self.teacher, dataset.queries, dataset.corpus, names=names, **settings)
            )
            self.taught.append(self._taught(len(self.parts) - 1))

    def _taught(self, number: int) -> np.ndarray:
        """The teacher's scores of every query's nearest and judged documents; of padding, the first's."""
        documents, nearest = self.parts[number][1:]
        judged = np.maximum(self.judged[number] - 1 - documents.first, 0)
        wanted = np.concatenate([nearest, judged], axis=1)  # (queries, depth + most judged)
        rows = np.repeat(np.arange(len(wanted)), wanted.shape[1])
        return self.teach[number](np.stack([rows, wanted.reshape(-1)], axis=1)).reshape(wanted.shape)

    def mine_again(self, encode: Callable[[Features, str], Tensor]) -> None:
        """Take each query's nearest documents anew, by the inner product of the vectors that ``encode`` makes."""
        for number, (queries, documents, nearest) in enumerate(self.parts):
            sides = []
            for side, task in ((queries, "query"), (documents, "document")):
                rows = np.arange(len(side))
                with torch.inference_mode():
                    vectors = [
                        encode(side.features(part), task) for part in np.array_split(rows, -(-len(rows) // 2048))
                    ]
                values = torch.cat(vectors).float().cpu().numpy()
                sides.append(replace(side.embeddings, values=values, dim=values.shape[1]))
            ranks = np.arange(len(documents))
            found, _ = exact_search(sides[0], sides[1], ranks, similarity="dot", k=nearest.shape[1])
            self.parts[number] = (queries, documents, found)
            if self.teach:
                self.taught[number] = self._taught(number)

    def even_out(self, first: int) -> None:
        """Repeat pairs of the parts from ``first`` on until each has about as many as the largest of them.

        Each repeat draws its own negatives.
        """
        counts = np.bincount(self.pairs[:, 0])
        times = np.where(np.arange(len(counts)) < first, 1, np.round(counts[first:].max() / counts))
        self.pairs = np.repeat(self.pairs, times.astype(int)[self.pairs[:, 0]], axis=0)

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
        query_parts, own_parts, negative_parts, members = [], [], [], []
        for number in np.unique(pairs[:, 0]):
            queries, documents, nearest = self.parts[number]
            member = np.flatnonzero(pairs[:, 0] == number)
            drawn = (draws[member] * nearest.shape[1]).astype(np.int64)
            asked, own = pairs[member, 1], pairs[member, 2]
            texts = [asked, own, nearest[asked[:, None], drawn].reshape(-1)]
            found = [side.features(rows) for side, rows in zip((queries, documents, documents), texts, strict=True)]
            if self.labels:  # so that no relevant document need count as a negative
                found[0]["judged"] = torch.from_numpy(self.judged[number][asked])
            for features, rows, task in zip(found, texts, ("query", "document", "document"), strict=True):
                if task in self.narrow_sides:
                    less = self.less[number][task].embeddings.values[rows]
                    features["narrow_embedding"] = torch.from_numpy(less.astype(np.float32))
            if self.taught:
                column = (self.judged[number][asked] == documents.first + own[:, None] + 1).argmax(1)
                columns = np.concatenate([nearest.shape[1] + column[:, None], drawn], axis=1)  # own, then negatives
                found[0]["teacher"] = torch.from_numpy(self.taught[number][asked[:, None], columns])
            query_parts.append(found[0])
            own_parts.append(found[1])
            negative_parts.append(found[2])
            members.append(member)
        back = torch.from_numpy(np.argsort(np.concatenate(members)))  # from data set by data set to the order of rows
        features = [_concatenated(query_parts), _concatenated(own_parts + negative_parts)]
        places = [back, torch.cat([back, torch.arange(len(pairs), len(features[1]["index"]))])]
        features = [{n: v[order] for n, v in side.items()} for side, order in zip(features, places, strict=True)]
        if self.taught:  # rows of the documents that the teacher's scores are of
            drawn_of = len(pairs) + back[:, None] * self.negatives + torch.arange(self.negatives)
            features[0]["list"] = torch.cat([torch.arange(len(pairs))[:, None], drawn_of], 1)
        return {"features": features, "labels": torch.arange(len(pairs))}

    def batches(self, side: str, size: int = 1024) -> Iterator[Features]:
        """Every query or document once, in order, a batch at a time."""
        for queries, documents, _ in self.parts:
            texts = documents if side == "document" else queries
            for start in range(0, len(texts), size):
                yield texts.features(np.arange(start, min(start + size, len(texts))))

    @property
    def has_images(self) -> bool:
        """Whether the documents are images, which have no text of their own."""
        return any(is_of_images(documents) for _, documents, _ in self.parts)

    def pair_batches(self, size: int = 1024) -> Iterator[tuple[Features, Features]]:
        """Features of every pair's query and document, in order, a batch at a time."""
        for number, (queries, documents, _) in enumerate(self.parts):
            pairs = self.pairs[self.pairs[:, 0] == number]
            for start in range(0, len(pairs), size):
                part = pairs[start : start + size]
                yield queries.features(part[:, 1]), documents.features(part[:, 2])

    def query_sums(self) -> Tensor:
        """``(queries, dim)`` sum of each query's token vectors, over all data sets."""
        sums = [sum_of_tokens(queries.embeddings).values for queries, _, _ in self.parts]
        return torch.from_numpy(np.concatenate(sums))

    def document_means(self) -> Tensor:
        """``(documents, dim)`` normalised mean of each document's token vectors, over all data sets."""
        means = [mean_of_tokens(documents.embeddings).values for _, documents, _ in self.parts]
        return torch.from_numpy(np.concatenate(means).astype(np.float32))

    def relevant(self) -> Tensor:
        """``(pairs, 2)`` place of a query and of its document among those of all data sets."""
        firsts = np.array([(queries.first, documents.first) for queries, documents, _ in self.parts])
        return torch.from_numpy(self.pairs[:, 1:] + firsts[self.pairs[:, 0]])

    def most_tokens(self) -> int:
        """Vectors of the longest document."""
        return max(int(documents.embeddings.lengths.max()) for _, documents, _ in self.parts)


def _concatenated(parts: list[Features]) -> Features:
    """Features of several parts under one another, token ids or vectors padded to the longest."""
    joined = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        if tensors[0].ndim > 1 and not name.endswith(("sentence_embedding", "layer_embeddings", "narrow_embedding")):
            tensors = pad_tokens(tensors)
        joined[name] = torch.cat(tensors)
    return joined


def pad_tokens(tensors: list[Tensor]) -> list[Tensor]:
    """Pad the second axis, that of tokens, to the longest with zeros."""
    width = max(tensor.shape[1] for tensor in tensors)
    return [
        torch.nn.functional.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, width - tensor.shape[1]))
        for tensor in tensors
    ]
