"""Documents ranked by the weighted sum of what several kinds of vectors say of them.

The first vectors find candidates, and every kind scores all of these, not only those that it would have found itself:
with as many candidates as documents it is the full sum (UnifieR, "uni-retrieval"). Scores are summed as models give
them. They differ in size, a cosine being 1 at most and a sum over words some tens, and that is what weights are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from ..encoding.embeddings import Embeddings, rows, side_by_side
from .ranking import exact_search, refuse_not_finite_scores, score_candidates, scores_of, sort_keys


class View(NamedTuple):
    """Queries and documents as vectors of one kind, and how these are compared.

    The documents of several views are the same, in the same order.
    """

    queries: Embeddings
    documents: Embeddings
    similarity: str


@dataclass(frozen=True)
class ScoredCandidates:
    """What was found for each query, and all its scores.

    Attributes:
        positions: Of each query ``(candidates,)`` places of documents.
        scores: Of each query ``(views, candidates)``.
        not_by_first: Queries for which the first view found nothing.
    """

    positions: list[np.ndarray]
    scores: list[np.ndarray]
    not_by_first: int

    def best(self, weights: Sequence[float], ranks: np.ndarray, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Positions and weighted sums of the best ``k`` candidates of each query, best first.

        Args:
            weights: ``(views,)``.
            ranks: ``(documents,)`` what decides ties; see :func:`polyrep.search.ranking.tie_ranks`.
            k: How many at most.
        """
        found = []
        for places, scores in zip(self.positions, self.scores, strict=True):
            sums = torch.from_numpy(np.asarray(weights, np.float64) @ scores.astype(np.float64))
            keys, order = sort_keys(sums, torch.from_numpy(ranks[places])).sort(descending=True)
            found.append((places[order.numpy()][:k], scores_of(keys).numpy()[:k]))
        return found


def find_candidates(
    views: Sequence[View],
    ranks: np.ndarray,
    *,
    count: int,
    left_out: np.ndarray | None = None,
    device: str | torch.device = "cpu",
    show_progress: bool = False,
) -> ScoredCandidates:
    """Find the best documents of each query by the first view, and score them by all.

    Sparse vectors and routed entries find documents that share a word or a key with the query. Where there is none, or
    the query has no word or no vector, the next view finds the candidates.

    Args:
        views: One or more.
        ranks: ``(documents,)`` what decides ties; see :func:`polyrep.search.ranking.tie_ranks`.
        count: Candidates of a query at most; where there are no more documents, all of them are.
        left_out: See :func:`polyrep.search.ranking.without`.
        device: Where to compute.
        show_progress: Show a progress bar.

    Raises:
        InputError: The sides of a view do not fit together, or a score is not finite.
    """
    total, documents = len(views[0].queries), views[0].documents.documents
    positions: list[np.ndarray] = [np.empty(0, np.int64)] * total
    known: dict[int, tuple[int, np.ndarray]] = {}  # query -> the view that found its candidates, and their scores
    waiting, not_by_first = np.arange(total), 0
    for number, view in enumerate(views):
        if not len(waiting) or not documents:
            break
        places, scores = exact_search(
            rows(view.queries, waiting),
            view.documents,
            ranks,
            similarity=view.similarity,
            k=count,
            left_out=None if left_out is None else left_out[waiting],
            show_progress=show_progress,
            device=device,
        )
        there = scores > -np.inf
        matched = there & view.queries.filled[waiting][:, None]
        if view.documents.kind in ("sparse", "routed"):
            matched &= scores != 0
        found = matched.any(1)
        kept = there if count >= documents else matched
        for row in np.flatnonzero(found).tolist():
            positions[waiting[row]] = places[row, kept[row]]
            known[int(waiting[row])] = number, scores[row, kept[row]]
        waiting = waiting[~found]
        not_by_first = not_by_first or len(waiting)
    said = []
    for row, candidates in enumerate(positions):
        scored = np.zeros((len(views), len(candidates)), np.float32)
        for number, view in enumerate(views) if len(candidates) else ():
            if known[row][0] == number:
                scored[number] = known[row][1]
            else:
                scored[number] = score_candidates(
                    view.queries, view.documents, row, candidates, view.similarity, device
                ).cpu()
        refuse_not_finite_scores(torch.from_numpy(scored))
        said.append(scored)
    return ScoredCandidates(positions, said, not_by_first)


def best_windows_of(view: View, row: int, positions: np.ndarray) -> list[int]:
    """Which window of each document scores best for the query at ``row``, the first of equals.

    Args:
        view: Documents may be cut into windows.
        row: Of the query.
        positions: ``(documents,)`` their places.
    """
    if view.documents.windows is None or not len(positions):
        return [0] * len(positions)
    places, bounds = side_by_side(view.documents.windows, positions)
    vectors = replace(view.documents, windows=None)
    scores = score_candidates(view.queries, vectors, row, places, view.similarity, "cpu").numpy()
    return [int(scores[start:stop].argmax()) for start, stop in pairwise(bounds.tolist())]
