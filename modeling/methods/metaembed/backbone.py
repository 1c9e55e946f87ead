"""Any model of one vector a text whose tokens a head reads, as if it were a late-interaction model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

from ...hub.folder import family_of, load


def open_backbone(folder: str, dtype: torch.dtype | None) -> MultiVectorEncoder | None:
    """A SentenceTransformer that pools by the mean, as its transformer alone; None for any other model.

    Its token states are the token vectors, as they are: their mean, from which a head starts, is then its own vector.

    Args:
        folder: Of the model.
        dtype: Of its weights; None as they are saved.
    """
    if family_of(Path(folder)) is not SentenceTransformer:
        return None
    model: Any = load(folder, dtype=dtype)
    names = [type(module).__name__ for module in model]
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        return None
    if model[1].pooling_mode != "mean" or not model[1].include_prompt:
        return None
    modules = [model[0], MultiVectorMask()]
    return MultiVectorEncoder(modules=modules, prompts=model.prompts, device=str(model.device))
