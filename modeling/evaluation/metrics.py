"""Metrics per query, by pytrec_eval, as MTEB has them: text = title + space + text, ties by higher id first."""

from __future__ import annotations

import numpy as np
import pytrec_eval

from ..data.dataset import RetrievalDataset
from .systems import Ranking

METRICS = ("nDCG@10", "nDCG@3", "MRR@10", "Recall@100")


def per_query_metrics(dataset: RetrievalDataset, ranking: Ranking) -> dict[str, np.ndarray]:
    """Each metric of :data:`METRICS` for each query: ``(queries,)``, in the order of ``dataset.queries``."""
    ids = list(dataset.corpus)
    found = list(zip(dataset.queries, ranking.positions.tolist(), ranking.scores.tolist(), strict=True))
    run = {query: {ids[p]: s for p, s in zip(positions, scores, strict=True)} for query, positions, scores in found}
    # Reciprocal rank has no cut-off in trec_eval: cut the run instead.
    top10 = {
        query: {ids[p]: s for p, s in zip(positions[:10], scores[:10], strict=True)}
        for query, positions, scores in found
    }
    measured = pytrec_eval.RelevanceEvaluator(dataset.qrels, {"ndcg_cut.3,10", "recall.100"}).evaluate(run)
    reciprocal = pytrec_eval.RelevanceEvaluator(dataset.qrels, {"recip_rank"}).evaluate(top10)
    sources = (
        (measured, "ndcg_cut_10"),
        (measured, "ndcg_cut_3"),
        (reciprocal, "recip_rank"),
        (measured, "recall_100"),
    )
    return {
        metric: np.array([source[query][measure] for query in dataset.queries])
        for metric, (source, measure) in zip(METRICS, sources, strict=True)
    }
