"""Dense2Sparse: read ``modeling_dense2sparse.py`` for what it is, then ``objective.py`` for how it is learned.

Across images and texts, a dual encoder comes before: it brings both into one space, for a head to turn into words.
"""

from __future__ import annotations

from ...registry import Graph, Room, register
from ..dual_encoder.backbone import load_processor, open_backbone
from .modeling_dense2sparse import (
    CheckedTransformer,
    Dense2SparseConfig,
    Dense2SparseForRetrieval,
    Dense2SparseForRetrievalConfig,
    Dense2SparseModel,
    Dense2SparseOutput,
    Dense2SparsePooling,
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
]

register(
    Room(
        model=Dense2SparseForRetrieval,
        head=Dense2SparseModel,
        module=Dense2SparsePooling,
        transformer=CheckedTransformer,
        objectives={"Dense2SparseLoss": Dense2SparseLoss},
        card="dense2sparse",
        frontier="frontier:METHOD",
        open_backbone=open_backbone,
        load_processor=load_processor,
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
