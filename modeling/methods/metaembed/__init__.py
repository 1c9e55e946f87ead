"""MetaEmbed: read ``modeling_metaembed.py`` for what it is, then ``objective.py`` for how it is learned.

Two methods in one: a model whose encoder is trained with its meta tokens, and a head over the cached token vectors of
a frozen late-interaction model.
"""

from __future__ import annotations

from ...hub.forms import processor_of
from ...registry import Graph, Room, register
from .backbone import open_backbone
from .modeling_metaembed import (
    MetaEmbedBudget,
    MetaEmbedConfig,
    MetaEmbedForRetrieval,
    MetaEmbedForRetrievalConfig,
    MetaEmbedHead,
    MetaEmbedHeadConfig,
    MetaEmbedModel,
    MetaEmbedOutput,
    MetaEmbedPooling,
    MetaEmbedTransformer,
)
from .objective import CachedMetaEmbedObjective, MetaEmbedHeadObjective, MetaEmbedObjective

__all__ = [
    "CachedMetaEmbedObjective",
    "MetaEmbedBudget",
    "MetaEmbedConfig",
    "MetaEmbedForRetrieval",
    "MetaEmbedForRetrievalConfig",
    "MetaEmbedHead",
    "MetaEmbedHeadConfig",
    "MetaEmbedHeadObjective",
    "MetaEmbedModel",
    "MetaEmbedObjective",
    "MetaEmbedOutput",
    "MetaEmbedPooling",
    "MetaEmbedTransformer",
]

_TOKENS = {"token_embeddings": ("batch", "tokens", "dim"), "attention_mask": ("batch", "tokens")}

register(
    Room(
        model=MetaEmbedModel,
        transformer=MetaEmbedTransformer,
        objectives={
            "MetaEmbedObjective": MetaEmbedObjective,
            "CachedMetaEmbedObjective": CachedMetaEmbedObjective,
        },
        load_processor=processor_of,
        card="metaembed",
    )
)

register(
    Room(
        model=MetaEmbedForRetrieval,
        head=MetaEmbedHead,
        transformer=MetaEmbedTransformer,
        module=MetaEmbedPooling,
        objectives={"MetaEmbedHeadObjective": MetaEmbedHeadObjective},
        card="metaembed",
        example="example_frozen:build",
        frontier="frontier:METHOD",
        open_backbone=open_backbone,
        graphs={MetaEmbedHead: {"model": Graph(_TOKENS, outputs=("token_embeddings", "mask"))}},
    )
)
