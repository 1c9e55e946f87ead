"""MultiLayer: read ``modeling_multilayer.py`` for what it is, then ``objective.py`` for how it is learned."""

from __future__ import annotations

from ...registry import Graph, Room, register
from .modeling_multilayer import (
    MultiLayerConfig,
    MultiLayerHead,
    MultiLayerHeadConfig,
    MultiLayerModel,
    MultiLayerOutput,
    MultiLayerPooling,
    MultiLayerTransformer,
)
from .objective import CachedMultiLayerObjective, MultiLayerHeadObjective, MultiLayerObjective

__all__ = [
    "CachedMultiLayerObjective",
    "MultiLayerConfig",
    "MultiLayerHead",
    "MultiLayerHeadConfig",
    "MultiLayerHeadObjective",
    "MultiLayerModel",
    "MultiLayerObjective",
    "MultiLayerOutput",
    "MultiLayerPooling",
    "MultiLayerTransformer",
]

register(
    Room(
        model=MultiLayerModel,
        head=MultiLayerHead,
        module=MultiLayerPooling,
        transformer=MultiLayerTransformer,
        objectives={
            "MultiLayerObjective": MultiLayerObjective,
            "CachedMultiLayerObjective": CachedMultiLayerObjective,
            "MultiLayerHeadObjective": MultiLayerHeadObjective,
        },
        card="multilayer",
        encoders=("encoder", "query_encoder"),
        graphs={
            MultiLayerHead: {
                "model": Graph(
                    {"layer_embeddings": ("batch", "layers", "hidden_size")},
                    outputs=("sentence_embedding", "token_embeddings"),
                )
            }
        },
    )
)
