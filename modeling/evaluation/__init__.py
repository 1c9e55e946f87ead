"""Metrics, statistics, tables; MTEB; every way to make an index smaller."""

from .bm25 import rank_with_bm25
from .evaluate import EvaluationArguments, evaluate_models
from .metrics import per_query_metrics
from .statistics import bootstrap_interval, compare
from .systems import Ranking, rank_embeddings, rank_with_model

__all__ = [
    "EvaluationArguments",
    "Ranking",
    "bootstrap_interval",
    "compare",
    "evaluate_models",
    "per_query_metrics",
    "rank_embeddings",
    "rank_with_bm25",
    "rank_with_model",
]
