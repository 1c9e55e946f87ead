"""UnifieR: read ``modeling_unifier.py`` for what it is, then ``objective.py`` for how it is learned."""

from __future__ import annotations

from ...registry import Graph, Room, register
from .modeling_unifier import (
    UnifierConfig,
    UnifierHead,
    UnifierHeadConfig,
    UnifierModel,
    UnifierOutput,
    UnifierPooling,
    UnifierTransformer,
)
from .objective import UnifierHeadObjective, UnifierObjective

__all__ = [
    "UnifierConfig",
    "UnifierHead",
    "UnifierHeadConfig",
    "UnifierHeadObjective",
    "UnifierModel",
    "UnifierObjective",
    "UnifierOutput",
    "UnifierPooling",
    "UnifierTransformer",
]

HEAD_READS = {
    "token_states": ("batch", "tokens", "hidden_size"),
    "pooled": ("batch", "hidden_size"),
    "input_ids": ("batch", "tokens"),
    "attention_mask": ("batch", "tokens"),
}

register(
    Room(
        model=UnifierModel,
        head=UnifierHead,
        module=UnifierPooling,
        transformer=UnifierTransformer,
        objectives={"UnifierObjective": UnifierObjective, "UnifierHeadObjective": UnifierHeadObjective},
        card="unifier",
        frontier="frontier:METHOD",
        settled="weight:choose_dense_weight",
        graphs={
            UnifierModel: {"model": Graph(outputs=("dense", "lexicon", "gate"))},
            UnifierHead: {"model": Graph(HEAD_READS, outputs=("dense", "lexicon", "gate"))},
        },
    )
)
