"""CITADEL: read ``modeling_citadel.py`` for what it is, then ``objective.py`` for how it is learned."""

from __future__ import annotations

from ...registry import Graph, Room, register
from .modeling_citadel import (
    CitadelConfig,
    CitadelEntries,
    CitadelHead,
    CitadelHeadConfig,
    CitadelModel,
    CitadelOutput,
    CitadelPooling,
    CitadelTransformer,
)
from .objective import CitadelHeadObjective, CitadelObjective

__all__ = [
    "CitadelConfig",
    "CitadelEntries",
    "CitadelHead",
    "CitadelHeadConfig",
    "CitadelHeadObjective",
    "CitadelModel",
    "CitadelObjective",
    "CitadelOutput",
    "CitadelPooling",
    "CitadelTransformer",
]

HEAD_READS = {"token_embeddings": ("batch", "tokens", "dim"), "attention_mask": ("batch", "tokens")}

GIVES = ("sentence_embedding", "keys", "weights", "vectors", "dense")

register(
    Room(
        model=CitadelModel,
        head=CitadelHead,
        module=CitadelPooling,
        transformer=CitadelTransformer,
        objectives={"CitadelObjective": CitadelObjective, "CitadelHeadObjective": CitadelHeadObjective},
        card="citadel",
        frontier="frontier:METHOD",
        graphs={
            CitadelModel: {"model": Graph(outputs=GIVES)},
            CitadelHead: {"model": Graph(HEAD_READS, outputs=GIVES)},
        },
    )
)
