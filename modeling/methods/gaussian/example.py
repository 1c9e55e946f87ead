"""A tiny Gaussian: one folder with its encoder, and a head behind a stock pooling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from ...hub.example import Example, TinyRun, one_folder
from .modeling_gaussian import (
    GaussianConfig,
    GaussianHeadConfig,
    GaussianModel,
    GaussianPooling,
    GaussianTransformer,
)

WHOLE = "--batch_sampler batch_sampler --bf16 false --hard_negatives 1 --negative_margin 0"
TOGETHER = "--inclusion_weight 0 --difficulty_weight 0 --learn_tau true --learning_rate 0.01"
"""Texts are cut short by each process for itself, and widths ordered within each."""
RUNS = {
    "whole": TinyRun("gaussian-minilm", WHOLE, together=TOGETHER),
    "head": TinyRun("gaussian-minilm-frozen", together=TOGETHER),
}


def build(backbone: Path, scratch: Path) -> Example:
    """A retriever and a pipeline."""
    torch.manual_seed(7)

    def stirred(model: torch.nn.Module, *names: str) -> Any:
        with torch.no_grad():
            for name in names:
                model.get_parameter(name).add_(torch.randn_like(model.get_parameter(name)) * 0.3)
        return model

    retriever = GaussianModel.from_encoder(
        str(backbone), mean_dim=12, variance_groups=3, equal_norms=True, max_norm=80.0
    )
    retriever = stirred(retriever, "head.variance_map", "var_embedding")
    pooling = GaussianPooling(input_dim=32, mean_dim=15, equal_norms=True, max_norm=1000.0)
    pooling = stirred(pooling, "model.mean_map", "model.variance_map")
    modules = [Transformer(str(backbone)), Pooling(32, "mean"), pooling]
    folder = scratch / "gaussian-retriever"
    return Example(
        {
            "retriever": one_folder(retriever, backbone, folder, transformer=GaussianTransformer),
            "pipeline": SentenceTransformer(modules=modules, device="cpu"),
        },
        weight="encoder.encoder.layer.0.output.dense.weight",
        bad_config=[
            (GaussianHeadConfig, {"mean_dim": 0}, "mean_dim=0"),
            (GaussianHeadConfig, {"variance_groups": 1.5}, "variance_groups=1.5"),
            (GaussianHeadConfig, {"variance_floor": 0.0}, "variance_floor=0.0.*from 1e-09 to"),
            (GaussianHeadConfig, {"beta": -1.0}, "beta=-1.0"),
            (GaussianHeadConfig, {"divergence": "js"}, "kl, reverse_kl, likelihood, w2, csd, dot"),
            (GaussianHeadConfig, {"projection_dim": 384}, r"2 k \+ 1. Use 383 .mean_dim=191. or 385 .mean_dim=192."),
            (
                GaussianHeadConfig,
                {"projection_dim": 384, "variance_groups": 16},
                r"k \+ 16 \+ 1. Use 369 .mean_dim=352",
            ),
            (GaussianHeadConfig, {"projection_dim": 2}, "Use 3 .mean_dim=1."),
            (GaussianHeadConfig, {"mean_dim": 9, "projection_dim": 20}, "= 19 dimensions, not projection_dim=20"),
            (GaussianHeadConfig, {"mean_dim": 385}, "mean_dim=385 of input_dim=384"),
            (GaussianHeadConfig, {"mean_dim": 100, "variance_groups": 16}, "does not divide.*mean_dim=96"),
            (GaussianConfig, {"mean_from": "max"}, "mean_from='max'.*mean, cls"),
            (GaussianConfig, {"variance_from": "max"}, "var_token, mean, cls"),
        ],
    )
