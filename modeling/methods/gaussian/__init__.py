"""Gaussian: read ``modeling_gaussian.py`` for what it is, then ``objective.py`` for how it is learned."""

from __future__ import annotations

from ...registry import Graph, Room, register
from ...search.scoring import kl as kl_divergence
from .modeling_gaussian import (
    GaussianConfig,
    GaussianHead,
    GaussianHeadConfig,
    GaussianModel,
    GaussianOutput,
    GaussianPooling,
    GaussianTransformer,
)
from .objective import GaussianHeadObjective, GaussianObjective

__all__ = [
    "GaussianConfig",
    "GaussianHead",
    "GaussianHeadConfig",
    "GaussianHeadObjective",
    "GaussianModel",
    "GaussianObjective",
    "GaussianOutput",
    "GaussianPooling",
    "GaussianTransformer",
    "kl_divergence",
]

register(
    Room(
        model=GaussianModel,
        head=GaussianHead,
        module=GaussianPooling,
        transformer=GaussianTransformer,
        objectives={
            "GaussianObjective": GaussianObjective,
            "GaussianHeadObjective": GaussianHeadObjective,
        },
        card="gaussian",
        graphs={
            GaussianModel: {"model": Graph(outputs=("sentence_embedding", "uncertainty"))},
            GaussianHead: {
                "model": Graph(
                    {"sentence_embedding": ("batch", "input_dim")}, outputs=("sentence_embedding", "uncertainty")
                )
            },
        },
    )
)
