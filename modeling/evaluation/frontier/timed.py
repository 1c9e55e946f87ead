"""Indexes held ready, as a search engine holds them: what it takes to answer one query, and two stages of search.

Exact search for evaluation reads the memory map anew for each batch, so that any corpus fits. Here the vectors lie in
memory in float32 and sparse ones as postings, so that the time of a query is that of scoring alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from sentence_transformers.util import SimilarityFunction
from torch import Tensor

from ...encoding.embeddings import Embeddings, between, row_of
from ...search.ranking import (
    deeper,
    exact_search,
    refuse_not_finite_scores,
    refuse_unlike_sides,
    rescore,
    sort_keys,
    sparse_rows,
    unpacked,
    without,
)
from ...search.routed import add_scores_of_lists
from ...search.scoring import Lists, best_windows, clamps, maxsim_of_flat
from ..systems import Ranking, costs_of, latency, timed_rows

MEMORY = 4 * 2**30
"""Bytes of float32 up to which an index is held in memory."""

RERANK_DEPTH = 200
"""Documents kept of a query: as many as a second stage reads."""

BLOCK_ELEMENTS = 2**22
"""Numbers of the largest intermediate of token vectors: it stays in a processor's cache, which is twice as fast."""

QUERY_VECTORS = 1024
"""Most vectors of the queries that are scored together."""


def loaded(documents: Embeddings) -> Embeddings:
    """Documents with their vectors in memory in float32; as they are if that takes more than :data:`MEMORY`."""
    if documents.kind == "sparse" or documents.values.size * 4 > MEMORY:
        return documents
    return replace(documents, values=np.array(documents.values, np.float32))


class ReadyIndex:
    """Documents prepared for exact search, query by query.

    Args:
        documents: Encoded documents of kind ``sentence``, ``tokens``, ``sparse`` or ``routed``.
        ranks: ``(documents,)`` what decides ties; see :func:`polyrep.search.ranking.tie_ranks`.
        similarity: As for :func:`polyrep.search.ranking.exact_search`.
        device: Where to compute.

    Attributes:
        in_memory: Whether the vectors lie in memory; if not, each search reads the memory map.
    """

    def __init__(self, documents: Embeddings, ranks: np.ndarray, similarity: str, device: str | torch.device = "cpu"):
        self.ranks, self.similarity, self.device = ranks, similarity, device
        self.documents = loaded(documents)
        self.in_memory = documents.kind == "sparse" or self.documents is not documents
        self.rank_of = torch.from_numpy(ranks)
        self.vectors = torch.empty(0)
        if documents.kind == "sparse":
            matrix = sparse_rows(documents, 0, len(documents), similarity).T.tocsr()  # (vocabulary, documents)
            self.postings, self.everywhere, self.numbers = _without_full_rows(matrix)
        elif documents.kind == "routed" and self.in_memory:
            self.lists, self.clamp = Lists.of(documents), clamps(similarity)
            self.entries = self.documents.values[self.lists.order]
            self.documents = documents  # whose own order nothing reads any more
            sentences = documents.sentences
            self.sentences = None if sentences is None else np.array(sentences, np.float32)
        elif self.in_memory:
            self.vectors = torch.from_numpy(self.documents.values).to(device)
            if similarity == "cosine":
                self.vectors = torch.nn.functional.normalize(self.vectors, dim=-1)

    def search(self, queries: Embeddings, k: int = RERANK_DEPTH) -> tuple[np.ndarray, np.ndarray]:
        """The best ``k`` documents of each query: positions and scores, each ``(queries, min(k, documents))``.

        Raises:
            InputError: The two sides do not fit together, or a score is not finite.
        """
        refuse_unlike_sides(queries, self.documents)
        if not self.in_memory:
            options: dict[str, Any] = {"similarity": self.similarity, "k": k, "device": self.device}
            return exact_search(queries, self.documents, self.ranks, **options)
        found = []
        for start, stop in _batches(queries):
            scores = self._scores(queries, start, stop).cpu()  # (queries, texts)
            if self.documents.windows is not None:
                scores = best_windows(scores, self.documents.windows)
            refuse_not_finite_scores(scores)
            found.append(sort_keys(scores, self.rank_of).topk(min(k, scores.shape[1]), dim=1).values)
        return unpacked(torch.cat(found), self.rank_of)

    def _scores(self, queries: Embeddings, start: int, stop: int) -> Tensor:
        if queries.kind == "sparse":
            sparse = sparse_rows(queries, start, stop, self.similarity)
            found = (sparse @ self.postings).toarray()
            if len(self.everywhere):
                found += sparse[:, self.everywhere].toarray() @ self.numbers
            return torch.from_numpy(found)
        if queries.kind == "routed":
            return torch.from_numpy(self._of_lists(between(queries, start, stop)))
        if queries.offsets is None:
            batch = torch.from_numpy(np.asarray(queries.values[start:stop], np.float32)).to(self.device)
            if self.similarity == "cosine":
                return torch.nn.functional.normalize(batch, dim=-1) @ self.vectors.T
            return SimilarityFunction.to_similarity_fn(self.similarity)(batch, self.vectors)
        bounds = queries.offsets[start : stop + 1]
        batch = torch.from_numpy(np.asarray(queries.values[bounds[0] : bounds[-1]], np.float32)).to(self.device)
        owner = torch.from_numpy(np.repeat(np.arange(stop - start), np.diff(bounds)))
        scores = torch.zeros(stop - start, len(self.documents), device=self.device)
        offsets = self.documents.offsets
        assert offsets is not None
        first = 0
        while first < len(self.documents):
            most = offsets[first] + BLOCK_ELEMENTS // max(1, len(batch))
            last = max(first + 1, int(np.searchsorted(offsets, most, side="right")) - 1)
            part = torch.from_numpy(offsets[first : last + 1] - offsets[first])
            tokens = self.vectors[offsets[first] : offsets[last]]
            block = maxsim_of_flat(batch, tokens, part, self.similarity, owner)  # (documents, queries with vectors)
            scores[: block.shape[1], first:last] = block.T
            first = last
        return scores

    def _of_lists(self, queries: Embeddings) -> np.ndarray:
        """Scores ``(queries, documents)`` of routed queries, which read the lists of their keys alone."""
        scores = np.zeros((len(queries), len(self.documents)), np.float32)
        queries = replace(queries, values=np.asarray(queries.values, np.float32))

        def one_list(key: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            first, last = (int(np.searchsorted(self.lists.keys, key, side)) for side in ("left", "right"))
            if first < last:
                yield self.entries[first:last], self.lists.owner[first:last]

        add_scores_of_lists(scores, queries, one_list, clamp=self.clamp)
        if queries.sentences is not None and self.sentences is not None:
            scores += np.asarray(queries.sentences, np.float32) @ self.sentences.T
        return scores


def _without_full_rows(matrix: csr_matrix) -> tuple[csr_matrix, np.ndarray, np.ndarray]:
    """Postings without those that name every document, which are scored as dense vectors are: many times as fast.

    Args:
        matrix: ``(vocabulary, documents)``.

    Returns:
        The matrix with these rows emptied, their places, and their numbers ``(rows, documents)``.
    """
    lengths = np.diff(matrix.indptr)
    full = lengths == matrix.shape[1]
    kept = np.repeat(~full, lengths)
    offsets = np.concatenate([[0], np.cumsum(np.where(full, 0, lengths))])
    rest = csr_matrix((matrix.data[kept], matrix.indices[kept], offsets), shape=matrix.shape)
    return rest, np.flatnonzero(full), matrix[full].toarray()


def _batches(queries: Embeddings) -> Iterator[tuple[int, int]]:
    size = 256 if queries.offsets is None else max(1, QUERY_VECTORS // max(1, int(queries.lengths.max())))
    return ((start, min(start + size, len(queries))) for start in range(0, len(queries), size))


def rank_when_ready(
    system: str,
    queries: Embeddings,
    documents: Embeddings,
    ranks: np.ndarray,
    *,
    similarity: str,
    left_out: np.ndarray | None = None,
    device: str | torch.device = "cpu",
) -> Ranking:
    """Search exactly on a :class:`ReadyIndex`, then time some queries alone, after one that warms up.

    ``left_out (queries,)`` is one document of each that is no answer to it.

    Returns:
        The ranking, :data:`RERANK_DEPTH` deep; ``from_memory_map`` is among its costs if the index was not in memory.
    """
    index = ReadyIndex(documents, ranks, similarity, device)
    found = index.search(queries, deeper(RERANK_DEPTH, left_out))
    positions, scores = without(left_out, *found, RERANK_DEPTH)
    seconds = np.full(len(queries), np.nan)
    rows = timed_rows(len(queries))
    index.search(row_of(queries, int(rows[0])))
    for row in rows:
        query = row_of(queries, int(row))
        started = time.perf_counter()
        index.search(query)
        seconds[row] = time.perf_counter() - started
    costs = costs_of(queries, documents) | latency(seconds[rows].tolist())
    if not index.in_memory:
        costs["from_memory_map"] = 1.0
    return Ranking(system, positions, scores, costs, seconds)


def rank_in_two_stages(
    system: str,
    first: Ranking,
    depth: int,
    queries: Embeddings,
    documents: Embeddings,
    ranks: np.ndarray,
    *,
    similarity: str,
    full_bytes: float,
    device: str | torch.device = "cpu",
) -> Ranking:
    """The best ``depth`` documents of a first stage, ordered by the full model's own score.

    Args:
        system: Name of the row.
        first: What the first stage found, with its seconds.
        depth: Documents of a query that are scored again.
        queries: Encoded by the full model.
        documents: Encoded by the full model, best :func:`loaded`.
        ranks: What decides ties.
        similarity: The full model's.
        full_bytes: Bytes a document of the full vectors as an index stores them.
        device: Where to compute.

    Returns:
        The ranking. Its bytes are those of both stages, and of the first alone ``first_stage_bytes``; the time of a
        query is that of both.
    """
    assert first.seconds is not None
    found = first.positions[:, :depth]
    options: dict[str, Any] = {"similarity": similarity, "device": device}
    positions, scores = rescore(queries, documents, found, ranks, **options)
    seconds = np.full(len(queries), np.nan)
    for row in timed_rows(len(queries)):
        query = row_of(queries, int(row))
        started = time.perf_counter()
        rescore(query, documents, found[row : row + 1], ranks, **options)
        seconds[row] = first.seconds[row] + time.perf_counter() - started
    own = first.costs["bytes_per_document"]
    taken = ("fit_seconds", "steps", "from_memory_map")
    costs: dict[str, float] = {name: first.costs[name] for name in taken if name in first.costs}
    if isinstance(documents.values, np.memmap):
        costs["from_memory_map"] = 1.0
    costs |= {
        "first_stage_bytes": own,
        "bytes_per_document": own + full_bytes,
    }
    return Ranking(system, positions, scores, costs | latency(seconds[~np.isnan(seconds)].tolist()), seconds)
