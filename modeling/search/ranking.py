"""Exact search, and the order of equal scores: the one oracle for losses, evaluation and indexes.

Search keeps only the running best of each query, so memory does not grow with the corpus. Ties go to the document with
the higher id, as trec_eval and MTEB break them; without such a rule two runs of one model could differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy.sparse import csr_matrix
from sentence_transformers.util import SimilarityFunction
from torch import Tensor
from tqdm import tqdm

from ..encoding.embeddings import Embeddings, between, row_of, rows, side_by_side
from ..errors import InputError
from .scoring import (
    CHUNK_ELEMENTS,
    EMPTY_DOCUMENT_SCORE,
    Lists,
    _score_routed,
    best_windows,
    clamps,
    maxsim_of_flat,
    padded_within,
    refuse_not_maxsim,
)


def exact_search(
    queries: Embeddings,
    documents: Embeddings,
    ranks: np.ndarray,
    *,
    similarity: str,
    k: int = 1000,
    left_out: np.ndarray | None = None,
    show_progress: bool = False,
    device: str | torch.device = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """Score every pair, in chunks, and keep the best ``k`` documents of each query.

    Args:
        queries: Encoded queries.
        documents: Encoded documents, of the same kind; of one that is cut into windows, the best window counts.
        ranks: ``(documents,)`` what decides ties; see :func:`tie_ranks`.
        similarity: Name of the model's similarity: ``dot``, ``cosine``, ``euclidean``, ``manhattan`` for one vector a
            text, ``dot`` or ``cosine`` for sparse vectors, ``maxsim`` or ``meanmaxsim`` for several vectors,
            ``routed`` or ``routed_unclamped`` for routed entries.
        k: How many documents to keep at most.
        left_out: See :func:`without`.
        show_progress: Show a progress bar.
        device: Where to compute.

    Returns:
        Positions of the documents and their scores, each ``(queries, min(k, documents))``, best first.

    Raises:
        InputError: The two sides do not fit together, or a score is not finite.
    """
    refuse_unlike_sides(queries, documents)
    rank_of = torch.from_numpy(ranks)
    wanted, k = k, min(deeper(k, left_out), documents.documents)
    scorer, found = _Scorer(queries, documents, similarity, device), []
    with tqdm(total=len(queries), desc="search", unit="query", disable=not show_progress) as progress:
        for start, stop in _query_ranges(queries):
            best = torch.empty(stop - start, 0, dtype=torch.int64)
            for members, scores in scorer(start, stop):
                refuse_not_finite_scores(scores)
                best = torch.cat([best, sort_keys(scores.cpu(), rank_of[members])], dim=1)
                best = best.topk(min(k, best.shape[1]), dim=1).values
            found.append(best)
            progress.update(stop - start)
    return without(left_out, *unpacked(torch.cat(found), rank_of), wanted)


def deeper(k: int, left_out: np.ndarray | None) -> int:
    """How deep to search for ``k`` documents, one of which may be left out."""
    return k + (left_out is not None and bool((left_out >= 0).any()))


def without(
    left_out: np.ndarray | None, positions: np.ndarray, scores: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best ``k`` of each query but one document, which takes the last place where there are no others.

    Args:
        left_out: ``(queries,)`` place of the document, -1 for none; see ``RetrievalDataset.own``. None: all are kept.
        positions: ``(queries, depth)`` best first, as :func:`deeper` asks.
        scores: Likewise; that of a document in the last place becomes -inf.
        k: How many documents to keep at most.
    """
    if left_out is None or not (left_out >= 0).any():
        return positions[:, :k], scores[:, :k]
    hit = positions == left_out[:, None]  # (queries, depth)
    order = np.argsort(hit, axis=1, kind="stable")[:, :k]
    scores = np.where(hit, -np.inf, scores).astype(scores.dtype)
    return np.take_along_axis(positions, order, 1), np.take_along_axis(scores, order, 1)


def refuse_unlike_sides(queries: Embeddings, documents: Embeddings) -> None:
    """Refuse two sides that one model cannot have made."""
    if (queries.kind, queries.dim) != (documents.kind, documents.dim):
        raise InputError(
            f"queries are {queries.kind} of width {queries.dim}, documents {documents.kind} of width {documents.dim}: "
            "they come from different models and cannot be scored. Encode both with one model."
        )
    if queries.sentence_dim != documents.sentence_dim:
        raise InputError(
            f"queries have vectors of whole texts of width {queries.sentence_dim}, documents of "
            f"{documents.sentence_dim}, so a part of each score would be lost. Encode both with one model."
        )


def refuse_not_finite_scores(scores: Tensor) -> None:
    """Refuse scores that no ranking could follow."""
    if not torch.isfinite(scores).all():
        raise InputError("a score is not finite, so no ranking exists. The embeddings are damaged or overflow.")


def rescore(
    queries: Embeddings,
    documents: Embeddings,
    positions: np.ndarray,
    ranks: np.ndarray,
    *,
    similarity: str,
    device: str | torch.device = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """Order the documents that a first stage found for each query by the model's own score.

    All documents of a query are scored at once, from their vectors side by side, without padding.

    Args:
        queries: Encoded queries.
        documents: Encoded documents of the same kind; of these only what ``positions`` names is read.
        positions: ``(queries, candidates)`` places of documents in the corpus.
        ranks: ``(documents,)`` what decides ties; see :func:`tie_ranks`.
        similarity: As for :func:`exact_search`.
        device: Where to compute.

    Returns:
        Positions and scores, each ``(queries, candidates)``, best first.

    Raises:
        InputError: The two sides do not fit together, or a score is not finite.
    """
    refuse_unlike_sides(queries, documents)
    found = torch.empty(positions.shape, device=device)
    for row, candidates in enumerate(positions):
        found[row] = score_candidates(queries, documents, row, candidates, similarity, device)
    refuse_not_finite_scores(found)
    keys = sort_keys(found.cpu(), torch.from_numpy(ranks[positions]))
    order = keys.argsort(dim=1, descending=True)
    return positions[np.arange(len(positions))[:, None], order.numpy()], scores_of(keys.gather(1, order)).numpy()


def score_candidates(
    queries: Embeddings,
    documents: Embeddings,
    row: int,
    candidates: np.ndarray,
    similarity: str,
    device: str | torch.device,
) -> Tensor:
    """Scores ``(candidates,)`` of some documents for the query at ``row``."""
    bounds: np.ndarray | None = None
    if documents.windows is not None:  # those of all candidates, side by side
        candidates, bounds = side_by_side(documents.windows, candidates)
    if queries.kind == "sparse":
        chosen = rows(documents, candidates)
        left, right = sparse_rows(queries, row, row + 1, similarity), sparse_rows(chosen, 0, len(chosen), similarity)
        scores = torch.from_numpy((left @ right.T).toarray())[0]
        return scores if bounds is None else best_windows(scores[None], bounds)[0]
    if queries.kind == "routed":
        return _score_routed(row_of(queries, row), rows(documents, candidates), clamp=clamps(similarity))[0]
    if queries.offsets is None or documents.offsets is None:
        pairwise = SimilarityFunction.to_similarity_pairwise_fn(similarity)
        query, vectors = (
            torch.from_numpy(np.array(values, np.float32)).to(device)
            for values in (queries.values[row : row + 1], documents.values[candidates])
        )
        scores = pairwise(query.expand(len(vectors), -1), vectors)
        return scores if bounds is None else best_windows(scores[None], bounds)[0]
    query = torch.from_numpy(np.array(queries.values[slice(*queries.offsets[row : row + 2])], np.float32))
    places, bounds = side_by_side(documents.offsets, candidates)
    tokens = torch.from_numpy(np.asarray(documents.values[places], np.float32)).to(device)
    return maxsim_of_flat(query.to(device), tokens, torch.from_numpy(bounds), similarity)[:, 0]


def tie_ranks(document_ids: list[str]) -> np.ndarray:
    """Rank of each document among documents of equal score, 0 first: ``(documents,)``, the highest id winning."""
    ranks = np.empty(len(document_ids), np.int64)
    ranks[sorted(range(len(document_ids)), key=document_ids.__getitem__, reverse=True)] = np.arange(len(document_ids))
    return ranks


def sort_keys(scores: Tensor, ranks: Tensor) -> Tensor:
    """Pack score and tie rank into one integer that sorts as the pair does, so that one top-k decides both.

    Bits of a float32 read as an integer sort like the float if it is positive and backwards if it is negative.
    """
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0, with which it ties
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (0xFFFFFFFF - ranks)


def unpacked(keys: Tensor, ranks: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Positions of documents and their scores, from keys of :func:`sort_keys` with these ranks of all documents."""
    position_of = torch.empty_like(ranks)
    position_of[ranks] = torch.arange(len(ranks))
    return position_of[0xFFFFFFFF - (keys & 0xFFFFFFFF)].numpy(), scores_of(keys).numpy()


def scores_of(keys: Tensor) -> Tensor:
    """The scores that were packed by :func:`sort_keys`, in float32."""
    ordered = (keys >> 32).int()
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _query_ranges(queries: Embeddings) -> Iterator[tuple[int, int]]:
    """Batches of queries: many single vectors, fewer sets of them."""
    size = 256 if queries.kind != "tokens" else max(1, 4096 // max(int(queries.lengths.max()), 1))
    return ((start, min(start + size, len(queries))) for start in range(0, len(queries), size))


_Scored = Iterator[tuple[np.ndarray, Tensor]]  # positions of some documents, and the scores (queries, documents)


class _Scorer:
    """Scores of a batch of queries, chunk by chunk of the documents; a method for each kind of vectors."""

    def __init__(self, queries: Embeddings, documents: Embeddings, similarity: str, device: str | torch.device):
        self.queries, self.documents, self.similarity, self.device = queries, documents, similarity, device
        self.order = np.argsort(documents.lengths, kind="stable")  # equal lengths side by side: little padding
        self.lists: dict[tuple[int, int], Lists] = {}

    def __call__(self, start: int, stop: int) -> _Scored:
        """Scores of the queries ``start:stop``."""
        score: Callable[[int, int], _Scored] = getattr(self, f"_{self.queries.kind}")
        return score(start, stop)

    def _sentence(self, start: int, stop: int) -> _Scored:
        score, documents = SimilarityFunction.to_similarity_fn(self.similarity), self.documents
        batch = torch.from_numpy(self.queries.values[start:stop].astype(np.float32)).to(self.device)
        differences = documents.dim if self.similarity == "manhattan" else 1  # which are all in memory at once
        step = max(1, CHUNK_ELEMENTS // (max(stop - start, documents.dim) * differences))
        for members, first, last in self._parts(step):
            chunk = torch.from_numpy(documents.values[first:last].astype(np.float32)).to(self.device)
            yield members, self._of_documents(members, score(batch, chunk))

    def _tokens(self, start: int, stop: int) -> _Scored:
        refuse_not_maxsim(self.similarity)
        assert self.queries.offsets is not None
        bounds = self.queries.offsets[start : stop + 1]
        batch = torch.from_numpy(self.queries.values[bounds[0] : bounds[-1]].astype(np.float32)).to(self.device)
        counts = torch.from_numpy(np.diff(bounds)).to(self.device)
        # Query of each query vector: (vectors of all queries,)
        owner = torch.repeat_interleave(torch.arange(stop - start, device=self.device), counts)
        lengths = self.documents.lengths[self.order]
        first = int(np.searchsorted(lengths, 1))
        if first:  # nothing to take the maximum over: below every real score
            yield self.order[:first], torch.full((stop - start, first), EMPTY_DOCUMENT_SCORE)
        for part in padded_within(lengths[first:], CHUNK_ELEMENTS // max(len(batch), self.documents.dim)):
            members = self.order[first:][part]
            chunk = torch.from_numpy(filled(self.documents, members)).to(self.device)  # (documents, vectors, dim)
            similarities = (batch @ chunk.flatten(0, 1).T).view(len(batch), *chunk.shape[:2])
            scores = torch.zeros(stop - start, len(chunk), device=self.device)
            scores.index_add_(0, owner, similarities.amax(-1))
            yield members, scores / counts.clamp(min=1)[:, None] if self.similarity == "meanmaxsim" else scores

    def _sparse(self, start: int, stop: int) -> _Scored:
        batch = sparse_rows(self.queries, start, stop, self.similarity)
        step = max(1, CHUNK_ELEMENTS // max(stop - start, 1))
        for members, first, last in self._parts(step):
            scores = (batch @ sparse_rows(self.documents, first, last, self.similarity).T).toarray()
            yield members, self._of_documents(members, torch.from_numpy(scores))

    def _routed(self, start: int, stop: int) -> _Scored:
        batch, clamp = between(self.queries, start, stop), clamps(self.similarity)
        for members, first, last in self._parts(max(1, CHUNK_ELEMENTS // (4 * max(stop - start, 1)))):
            part = between(self.documents, first, last)
            if (first, last) not in self.lists:
                self.lists[first, last] = Lists.of(part)
            yield members, _score_routed(batch, part, clamp=clamp, lists=self.lists[first, last])

    def _parts(self, step: int) -> Iterator[tuple[np.ndarray, int, int]]:
        """Documents with about ``step`` rows, and the bounds of these; all windows of a document are in one part."""
        count, windows = self.documents.documents, self.documents.windows
        first = 0
        while first < count:
            last = min(first + step, count)
            if windows is not None:
                last = max(first + 1, int(np.searchsorted(windows, windows[first] + step, side="right")) - 1)
            yield np.arange(first, last), *((first, last) if windows is None else map(int, windows[[first, last]]))
            first = last

    def _of_documents(self, members: np.ndarray, scores: Tensor) -> Tensor:
        windows = self.documents.windows
        if windows is None:
            return scores
        return best_windows(scores, windows[members[0] : members[-1] + 2] - windows[members[0]])


def filled(embeddings: Embeddings, members: np.ndarray) -> np.ndarray:
    """Vectors ``(members, most vectors, dim)`` in float32, gathered without a loop over texts.

    Shorter texts repeat their last vector, which changes no maximum and so needs no mask.
    """
    assert embeddings.offsets is not None
    lengths = embeddings.lengths[members]
    columns = np.minimum(np.arange(lengths.max()), lengths[:, None] - 1)
    return embeddings.values[embeddings.offsets[members][:, None] + columns].astype(np.float32)


def sparse_rows(embeddings: Embeddings, start: int, stop: int, similarity: str) -> csr_matrix:
    """Rows ``start:stop`` of a sparse cache as ``(stop - start, vocabulary)``; of unit length for cosine."""
    if similarity not in ("dot", "cosine"):
        raise InputError(f"similarity {similarity!r} is not defined for an inverted index; use dot or cosine.")
    assert embeddings.offsets is not None and embeddings.indices is not None
    bounds = embeddings.offsets[start : stop + 1]
    part = slice(int(bounds[0]), int(bounds[-1]))
    values = embeddings.values[part].astype(np.float32)
    if similarity == "cosine":
        lengths = np.diff(bounds)
        squares = np.bincount(np.repeat(np.arange(stop - start), lengths), values**2, minlength=stop - start)
        values /= np.repeat(np.sqrt(np.maximum(squares, 1e-24)), lengths).astype(np.float32)
    return csr_matrix((values, embeddings.indices[part], bounds - bounds[0]), shape=(stop - start, embeddings.dim))
