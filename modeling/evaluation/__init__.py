"""Metrics, statistics, tables; MTEB; every way to make an index smaller."""

from .bm25 import rank_with_bm25
from .evaluate import EvaluationArguments, evaluate_models
from .evaluator import RankSimilarityEvaluator
from .metrics import per_query_metrics
from .rank_similarity import RankSimilarity, average_overlap, compare_wordings, jaccard, rbo
from .statistics import bootstrap_interval, compare
from .systems import Ranking, rank_embeddings, rank_with_model

__all__ = [
    "EvaluationArguments",
    "RankSimilarity",
    "RankSimilarityEvaluator",
    "Ranking",
    "average_overlap",
    "bootstrap_interval",
    "compare",
    "compare_wordings",
    "evaluate_models",
    "jaccard",
    "per_query_metrics",
    "rank_embeddings",
    "rank_with_bm25",
    "rank_with_model",
    "rbo",
]
