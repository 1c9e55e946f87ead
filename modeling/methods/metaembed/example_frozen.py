"""Tiny meta tokens over the token vectors of a frozen late-interaction model: several vectors a text, and one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

from ...hub.example import Example, TinyRun
from .modeling_metaembed import MetaEmbedHead, MetaEmbedHeadConfig, MetaEmbedPooling

SMALL = "--num_query_vectors 2 --num_document_vectors 4 --projection_dim 8 --depth 4"
RUNS = {"head": TinyRun("metaembed-minilm-frozen", f"{SMALL} --maxsim_weight 0.5", together="--negatives 2")}


def build(backbone: Path, scratch: Path) -> Example:
    """A pipeline of each output."""
    torch.manual_seed(12)

    def modules() -> list[torch.nn.Module]:
        names: Any = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
        narrow = Dense(32, 16, bias=False, activation_function=torch.nn.Identity(), **names)
        return [Transformer(str(backbone)), narrow, MultiVectorMask(), Normalize(**names)]

    def pooling(**config: Any) -> MetaEmbedPooling:
        head = MetaEmbedHead(MetaEmbedHeadConfig(dim=16, num_query_vectors=2, num_document_vectors=4, **config))
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        return MetaEmbedPooling(head)

    one = pooling(output="sentence_embedding", projection_dim=12)
    return Example(
        {
            "pipeline": MultiVectorEncoder(modules=[*modules(), pooling(query_side="tokens")], device="cpu"),
            "single": SentenceTransformer(modules=[*modules(), one], device="cpu"),
        },
        bad_config=[
            (MetaEmbedHeadConfig, {"dim": 0}, "dim=0"),
            (MetaEmbedHeadConfig, {"num_layers": 0}, "num_layers=0"),
            (MetaEmbedHeadConfig, {"num_heads": 7}, "num_heads=7 does not divide dim=128.*e.g. 4"),
            (MetaEmbedHeadConfig, {"groups": [[None, 1]], "query_side": "tokens"}, r"untrained. End .*\[None, 32\]"),
            (MetaEmbedHeadConfig, {"groups": [[1, 32]], "query_side": "tokens"}, "wants null for queries"),
            (MetaEmbedHeadConfig, {"query_budget": 9}, "a query holds 8 vectors; 9 asked"),
            (MetaEmbedHeadConfig, {"dropout": 1}, "dropout=1"),
        ],
    )
