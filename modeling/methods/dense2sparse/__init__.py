"""Dense2Sparse: read ``modeling_dense2sparse.py`` for what it is, then ``objective.py`` for how it is learned.

Across images and text, ``contrastive.py`` comes before: it brings a text and a vision encoder into one space, for a
head to turn into words.
"""

from __future__ import annotations

from ...registry import Graph, Room, register
from .contrastive import DualEncoderLoss
from .modeling_dense2sparse import (
    CheckedTransformer,
    Dense2SparseConfig,
    Dense2SparseForRetrieval,
    Dense2SparseForRetrievalConfig,
    Dense2SparseModel,
    Dense2SparseOutput,
    Dense2SparsePooling,
    DualEncoderConfig,
    DualEncoderHead,
    DualEncoderHeadConfig,
    DualEncoderModel,
)
from .objective import Dense2SparseLoss
from .vocabulary import head_from_words

__all__ = [
    "CheckedTransformer",
    "Dense2SparseConfig",
    "Dense2SparseForRetrieval",
    "Dense2SparseForRetrievalConfig",
    "Dense2SparseLoss",
    "Dense2SparseModel",
    "Dense2SparseOutput",
    "Dense2SparsePooling",
    "DualEncoderConfig",
    "DualEncoderHead",
    "DualEncoderHeadConfig",
    "DualEncoderLoss",
    "DualEncoderModel",
]

register(
    Room(
        model=Dense2SparseForRetrieval,
        head=Dense2SparseModel,
        module=Dense2SparsePooling,
        objectives={"Dense2SparseLoss": Dense2SparseLoss},
        card="dense2sparse",
        frontier="frontier:METHOD",
        open_backbone=Dense2SparseForRetrieval.open_backbone,
        load_processor=Dense2SparseForRetrieval.load_processor,
        head_from_words=head_from_words,
        graphs={
            Dense2SparseModel: {
                "model": Graph(
                    {
                        "sentence_embedding": ("batch", "input_dim"),
                        "input_ids": ("batch", "tokens"),
                        "attention_mask": ("batch", "tokens"),
                    }
                )
            }
        },
    )
)
register(
    Room(
        model=DualEncoderModel,
        head=DualEncoderHead,
        objectives={"DualEncoderLoss": DualEncoderLoss},
        card="dual_encoder",
        joins_vision=True,
        load_processor=DualEncoderModel.load_processor,
        example="example_dual_encoder:build",
        graphs={
            DualEncoderHead: {
                "text": Graph({"sentence_embedding": ("batch", "text_dim")}),
                "image": Graph({"sentence_embedding": ("batch", "image_dim")}, fixed={"modality": "image"}),
            }
        },
    )
)
