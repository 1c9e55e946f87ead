"""LEMUR: read ``modeling_lemur.py`` for what it is, ``objective.py`` for how it is learned, then ``index.py``."""

from __future__ import annotations

from ...registry import Graph, Room, register
from .index import LemurIndex
from .modeling_lemur import (
    LemurConfig,
    LemurForRetrieval,
    LemurForRetrievalConfig,
    LemurModel,
    LemurOutput,
    LemurPooling,
    LemurTransformer,
    ridge_solution,
    token_maxima,
)
from .objective import LemurObjective

__all__ = [
    "LemurConfig",
    "LemurForRetrieval",
    "LemurForRetrievalConfig",
    "LemurIndex",
    "LemurModel",
    "LemurObjective",
    "LemurOutput",
    "LemurPooling",
    "LemurTransformer",
    "ridge_solution",
    "token_maxima",
]

_TOKENS = {"token_embeddings": ("batch", "tokens", "token_dim"), "attention_mask": ("batch", "tokens")}

register(
    Room(
        model=LemurForRetrieval,
        head=LemurModel,
        transformer=LemurTransformer,
        module=LemurPooling,
        objectives={"LemurObjective": LemurObjective},
        card="lemur",
        frontier="frontier:METHOD",
        seeded=True,
        graphs={LemurModel: {"model": Graph(_TOKENS)}},
    )
)
