"""Dual encoder: read ``modeling_dual_encoder.py`` for what it is, then ``objective.py`` for how it is learned."""

from __future__ import annotations

from ...registry import Graph, Room, register
from .backbone import load_processor
from .modeling_dual_encoder import (
    DualEncoderConfig,
    DualEncoderHead,
    DualEncoderHeadConfig,
    DualEncoderModel,
    DualEncoderOutput,
    DualEncoderTransformer,
)
from .objective import DualEncoderLoss

__all__ = [
    "DualEncoderConfig",
    "DualEncoderHead",
    "DualEncoderHeadConfig",
    "DualEncoderLoss",
    "DualEncoderModel",
    "DualEncoderOutput",
    "DualEncoderTransformer",
]

register(
    Room(
        model=DualEncoderModel,
        head=DualEncoderHead,
        objectives={"DualEncoderLoss": DualEncoderLoss},
        card="dual_encoder",
        joins_vision=True,
        load_processor=load_processor,
        graphs={
            DualEncoderHead: {
                "text": Graph({"sentence_embedding": ("batch", "text_dim")}),
                "image": Graph({"sentence_embedding": ("batch", "image_dim")}, fixed={"modality": "image"}),
            }
        },
    )
)
