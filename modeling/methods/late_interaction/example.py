"""A tiny late-interaction model in one folder, with a list of tokens that no score counts."""

from __future__ import annotations

from pathlib import Path

import torch
from sentence_transformers import MultiVectorEncoder

from ...hub.example import Example, TinyRun, one_folder
from .modeling_late_interaction import LateInteractionConfig, LateInteractionModel, LateInteractionTransformer

RUNS = {"whole": TinyRun("late-interaction-minilm", "--batch_sampler batch_sampler --bf16 false --dim 8")}


def build(backbone: Path, scratch: Path) -> Example:
    """A retriever."""
    torch.manual_seed(9)
    trunk = [
        {"type": "Dense", "out_features": 16, "bias": True, "activation": "Tanh", "residual": True},
        {"type": "MultiVectorMask", "skiplist_ids": list(range(5, 40))},
        {"type": "Normalize"},
    ]
    retriever = LateInteractionModel.from_encoder(str(backbone), trunk=trunk, dim=16)
    folder = scratch / "late-interaction-retriever"
    family = (MultiVectorEncoder, LateInteractionTransformer)
    return Example(
        {"retriever": one_folder(retriever, backbone, folder, *family, output="token_embeddings")},
        weight="trunk.0.linear.weight",
        bad_config=[
            (LateInteractionConfig, {"dim": 0}, "dim=0"),
            (
                LateInteractionConfig,
                {"dim": 64, "trunk": []},
                "dim=64, but encoder and trunk .* 768",
            ),
            (LateInteractionConfig, {"trunk": [{"type": "LSTM"}]}, "'LSTM'.*is no module here. Use Dense of"),
            (LateInteractionConfig, {"trunk": [{"type": "Dense"}]}, "out_features=None"),
            (LateInteractionConfig, {"trunk": [{"type": "Normalize", "p": 1}]}, "is no module here"),
            (
                LateInteractionConfig,
                {"trunk": [{"type": "Dense", "out_features": 128, "activation": "os.system"}]},
                "no such activation",
            ),
            (
                LateInteractionConfig,
                {"trunk": [{"type": "Dense", "out_features": 128, "bias": 1}]},
                "neither true nor false",
            ),
            (
                LateInteractionConfig,
                {"trunk": [{"type": "MultiVectorMask", "skiplist_ids": [-1]}]},
                "skiplist_ids that are no ids",
            ),
            (
                LateInteractionConfig,
                {"trunk": [{"type": "MultiVectorMask", "skiplist_tasks": ["passage"]}]},
                "other skiplist_tasks",
            ),
        ],
    )
