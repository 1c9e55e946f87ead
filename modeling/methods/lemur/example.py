"""A tiny LEMUR behind late interaction, with maps that were drawn instead of solved for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

from ...hub.example import Example, TinyRun
from .modeling_lemur import LemurConfig, LemurModel, LemurPooling

RUNS = {
    "pooling": TinyRun(
        "lemur-minilm",
        "--latent_dim 24 --num_anchors 30 --rank 3 --embedding_dim 3 --num_tokens 60 --bf16 false",
        batch=8,
        solved=("query_map", "document_map", "document_mean"),
    ),
}


def build(backbone: Path, scratch: Path) -> Example:
    """A pipeline."""
    torch.manual_seed(8)
    names: Any = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    narrow = Dense(32, 16, bias=False, activation_function=torch.nn.Identity(), **names)
    shape = {"token_dim": 16, "latent_dim": 24, "num_anchors": 40, "rank": 12, "embedding_dim": 10}
    head: Any = LemurModel(LemurConfig(**shape, equal_norms=True, max_norm=20.0))
    with torch.no_grad():
        head.anchors.copy_(torch.nn.functional.normalize(torch.randn(40, 16), dim=-1))
        for map_ in (head.query_map, head.document_map):
            map_.normal_()
        head.document_mean.normal_()
    return Example(
        {
            "pipeline": SentenceTransformer(
                modules=[
                    Transformer(str(backbone)),
                    narrow,
                    MultiVectorMask(),
                    Normalize(**names),
                    LemurPooling(head),
                ],
                device="cpu",
            )
        },
        bad_config=[
            (LemurConfig, {"token_dim": 0}, "token_dim=0"),
            (LemurConfig, {"latent_dim": 2.0}, "latent_dim=2.0"),
            (LemurConfig, {"num_anchors": 0}, "num_anchors=0"),
            (LemurConfig, {"rank": -1}, "rank=-1"),
            (LemurConfig, {"latent_dim": 100, "rank": 200}, "rank=200 directions of a space of latent_dim=100"),
            (LemurConfig, {"rank": 64, "embedding_dim": 65}, "only rank=64 directions are kept. Use up to 64"),
            (LemurConfig, {"feature_type": "cnn"}, "feature_type='cnn'.*mlp, elm"),
            (LemurConfig, {"query_scale": 0.0}, "query_scale=0.0"),
            (LemurConfig, {"ridge": -1.0}, "ridge=-1.0"),
            (LemurConfig, {"seed": None}, "seed=None"),
        ],
    )
