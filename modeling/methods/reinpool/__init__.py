"""ReinPool: read ``modeling_reinpool.py`` for what it is, then ``objective.py`` for how it is learned.

``show.py`` draws what the filter keeps.
"""

from __future__ import annotations

from ...registry import Graph, Room, register
from .modeling_reinpool import (
    ReinPoolConfig,
    ReinPoolForRetrieval,
    ReinPoolForRetrievalConfig,
    ReinPoolModel,
    ReinPoolOutput,
    ReinPoolPooling,
    ReinPoolTransformer,
    spherical_kmeans,
)
from .objective import ReinforceObjective, SoftGateObjective

__all__ = [
    "ReinPoolConfig",
    "ReinPoolForRetrieval",
    "ReinPoolForRetrievalConfig",
    "ReinPoolModel",
    "ReinPoolOutput",
    "ReinPoolPooling",
    "ReinPoolTransformer",
    "ReinforceObjective",
    "SoftGateObjective",
    "spherical_kmeans",
]

_TOKENS = {"token_embeddings": ("batch", "tokens", "dim"), "attention_mask": ("batch", "tokens")}

register(
    Room(
        model=ReinPoolForRetrieval,
        head=ReinPoolModel,
        transformer=ReinPoolTransformer,
        module=ReinPoolPooling,
        objectives={"SoftGateObjective": SoftGateObjective, "ReinforceObjective": ReinforceObjective},
        card="reinpool",
        frontier="frontier:METHOD",
        mean_pooled="frontier:mean_pooled",
        graphs={
            ReinPoolModel: {  # the filter alone is enough for a pooling of one's own
                "model": Graph(_TOKENS, outputs=("keep_probability",)),
                "pooling": Graph(_TOKENS, outputs=("embeddings", "mask")),
            }
        },
    )
)
