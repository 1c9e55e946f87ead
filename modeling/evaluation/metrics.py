"""Metrics per query, to the last digit those of trec_eval, as MTEB has them: ties by higher document id first."""

from __future__ import annotations

import numpy as np

from ..data.dataset import RetrievalDataset
from ..report import METRIC_NAMES
from ..search.ranking import tie_ranks, without
from .systems import Ranking

METRICS = tuple(METRIC_NAMES)
"""Metrics that every table shows. A new one is named there, and measured in :func:`per_query_metrics`."""

DEEPEST = 100
"""Documents of a ranking that a metric looks at, at most."""


def per_query_metrics(dataset: RetrievalDataset, ranking: Ranking) -> dict[str, np.ndarray]:
    """Each metric of :data:`METRICS` for each query: ``(queries,)``, in the order of ``dataset.queries``.

    Gains are the judgments themselves, those of 0 and below being none, and the document at rank r counts
    ``1 / log2(r + 1)`` of its gain (trec_eval's ``ndcg_cut``). A query without a relevant document has 0 everywhere.
    A query's own document (``dataset.own``) is none that it found, nor is one with a score of -inf.
    """
    found = _grades_found(dataset, ranking)  # (queries, depth)
    best = _best_grades(dataset)  # (queries, most relevant documents of a query)
    relevant = found > 0
    first = np.where(relevant[:, :10].any(1), relevant[:, :10].argmax(1) + 1, np.inf)
    measured = {
        "nDCG@10": _share(_gain(found, 10), _gain(best, 10)),
        "nDCG@3": _share(_gain(found, 3), _gain(best, 3)),
        "MRR@10": 1 / first,
        "Recall@100": _share(relevant[:, :100].sum(1), (best > 0).sum(1)),
    }
    return {metric: measured[metric] for metric in METRICS}


def best_first(dataset: RetrievalDataset, ranking: Ranking, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """The documents that a ranking has first, equal scores in the order of trec_eval, a query's own document last.

    Returns:
        Positions and scores, each ``(queries, depth)`` or less; a score of -inf fills a place for which nothing was
        found.
    """
    ranks = tie_ranks(list(dataset.corpus))
    positions, scores = without(dataset.own, ranking.positions, ranking.scores, ranking.positions.shape[1])
    # trec_eval holds scores in float32, so what is equal there is a tie.
    rounded = scores.astype(np.float32)
    if rounded.shape[1] > depth and (rounded[:, 1:] <= rounded[:, :-1]).all():
        # Best first, so behind the last tie with the last document that is wanted nothing can be among them.
        tied = int((rounded >= rounded[:, depth - 1, None]).sum(1).max(initial=0))
        positions, scores, rounded = positions[:, :tied], scores[:, :tied], rounded[:, :tied]
    order = np.lexsort((ranks[positions], -rounded), axis=1)[:, :depth]
    return np.take_along_axis(positions, order, 1), np.take_along_axis(scores, order, 1)


def _grades_found(dataset: RetrievalDataset, ranking: Ranking) -> np.ndarray:
    """Judgment of each document of a ranking, best first, 0 for what is not judged: ``(queries, depth)``."""
    positions, scores = best_first(dataset, ranking, DEEPEST)
    place = {identifier: number for number, identifier in enumerate(dataset.corpus)}
    judged = [(-1, 0)]  # so that there is one
    judged += [
        (query * len(place) + place[document], grade)
        for query, identifier in enumerate(dataset.queries)
        for document, grade in dataset.qrels[identifier].items()
        if document in place  # of the others, which no ranking finds, the best ranking has them
    ]
    keys, grades = np.array(sorted(judged), np.int64).T  # of query and document together, in rising order
    wanted = np.arange(len(positions))[:, None] * len(place) + positions
    at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where((keys[at] == wanted) & (scores > -np.inf), grades[at], 0)


def _best_grades(dataset: RetrievalDataset) -> np.ndarray:
    """Judgments of each query in falling order, as the best of all rankings finds them: ``(queries, most)``."""
    judged = [sorted(dataset.qrels[query].values(), reverse=True) for query in dataset.queries]
    best = np.zeros((len(judged), max(1, *map(len, judged))), np.int64)
    for row, grades in zip(best, judged, strict=True):
        row[: len(grades)] = grades
    return best


def _gain(grades: np.ndarray, depth: int) -> np.ndarray:
    """Discounted gain of the first ranks, ``(queries,)``, added one after the other as trec_eval does."""
    cut = np.maximum(grades[:, :depth], 0)
    return (cut / np.log2(np.arange(2, cut.shape[1] + 2))).cumsum(1)[:, -1]


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """A part of a whole, 0 where the whole is none."""
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)
