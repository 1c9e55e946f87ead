"""Dense2Sparse: read ``modeling_dense2sparse.py`` for what it is, then ``objective.py`` for how it is learned."""

from __future__ import annotations

from .. import Room, register
from .modeling_dense2sparse import (
    Dense2SparseConfig,
    Dense2SparseForRetrieval,
    Dense2SparseForRetrievalConfig,
    Dense2SparseModel,
    Dense2SparseOutput,
    Dense2SparsePooling,
)
from .objective import Dense2SparseLoss

__all__ = [
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
        objectives={"Dense2SparseLoss": Dense2SparseLoss},
        card="dense2sparse",
    )
)
