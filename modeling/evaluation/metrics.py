"""Metrics per query, by pytrec_eval, as MTEB has them: text = title + space + text, ties by higher id first."""

from __future__ import annotations

import numpy as np
import pytrec_eval

from ..data.dataset import RetrievalDataset
from ..report import METRIC_NAMES
from .systems import Ranking

METRICS = tuple(METRIC_NAMES)
"""Metrics that every table shows. A new one is named there, and measured in :func:`per_query_metrics`."""


def per_query_metrics(dataset: RetrievalDataset, ranking: Ranking) -> dict[str, np.ndarray]:
    """Each metric of :data:`METRICS` for each query: ``(queries,)``, in the order of ``dataset.queries``.

    A query's own document (``dataset.own``) is none that it found.
    """
    ids = list(dataset.corpus)
    run, top10 = {}, {}
    for query, own, positions, scores in zip(
        dataset.queries, dataset.own.tolist(), ranking.positions.tolist(), ranking.scores.tolist(), strict=True
    ):
        found = [(ids[p], s) for p, s in zip(positions, scores, strict=True) if p != own]
        # Reciprocal rank has no cut-off in trec_eval: cut the run instead.
        run[query], top10[query] = dict(found), dict(found[:10])
    measured = pytrec_eval.RelevanceEvaluator(dataset.qrels, {"ndcg_cut.3,10", "recall.100"}).evaluate(run)
    reciprocal = pytrec_eval.RelevanceEvaluator(dataset.qrels, {"recip_rank"}).evaluate(top10)
    sources = {
        "nDCG@10": (measured, "ndcg_cut_10"),
        "nDCG@3": (measured, "ndcg_cut_3"),
        "MRR@10": (reciprocal, "recip_rank"),
        "Recall@100": (measured, "recall_100"),
    }
    return {
        metric: np.array([sources[metric][0][query][sources[metric][1]] for query in dataset.queries])
        for metric in METRICS
    }
