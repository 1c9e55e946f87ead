"""MetaEmbed: read ``modeling_metaembed.py`` for what it is, then ``objective.py`` for how it is learned.

Two methods in one: a model whose encoder is trained with its meta tokens, and a head over the cached token vectors of
a frozen late-interaction model.
"""

from __future__ import annotations

from ...hub.forms import processor_of
from ...registry import Graph, Room, register
from .modeling_metaembed import (
    PAPER,
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
