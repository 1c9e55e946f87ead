"""A tiny UnifieR: one folder for each view, and a head behind a bare encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from ...hub.example import Example, TinyRun, one_folder
from .modeling_unifier import (
    UnifierConfig,
    UnifierHead,
    UnifierHeadConfig,
    UnifierModel,
    UnifierPooling,
    UnifierTransformer,
)

SMALL = "--initial_active 8 --document_top_k 20 --query_top_k 10"  # a vocabulary of a few dozen words
WHOLE = f"{SMALL} --batch_sampler batch_sampler --bf16 false --hard_negatives 1 --negative_margin 0"
RUNS = {
    "whole": TinyRun("unifier-minilm", f"{WHOLE} --gate query"),
    "head": TinyRun("unifier-minilm-frozen", f"{SMALL} --depth 4"),
}


def build(backbone: Path, scratch: Path) -> Example:
    """Two retrievers and a pipeline."""
    torch.manual_seed(9)

    def stirred(head: UnifierHead) -> UnifierHead:
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return head

    encoder = SentenceTransformer(modules=[Transformer(str(backbone)), Pooling(32, "mean"), Normalize()], device="cpu")
    how: dict[str, Any] = {"split_layer": -2, "initial_active": 20, "gate": "query"}
    dense = UnifierModel.from_modules(encoder, stirred(UnifierHead.from_backbone(encoder, **how)))
    words = UnifierModel.from_modules(encoder, stirred(UnifierHead.from_backbone(encoder, view="lexicon", **how)))
    bare = SentenceTransformer(modules=[Transformer(str(backbone))], device="cpu")
    head = UnifierHead.from_backbone(bare, view="lexicon", split_layer=-1, lexicon_layers=1, query_top_k=42)
    pipeline = [Transformer(str(backbone)), UnifierPooling(stirred(head))]
    return Example(
        {
            "retriever": one_folder(dense, backbone, scratch / "unifier-dense", transformer=UnifierTransformer),
            "words-retriever": one_folder(
                words, backbone, scratch / "unifier-words", SparseEncoder, UnifierTransformer
            ),
            "pipeline": SparseEncoder(modules=pipeline, device="cpu"),
        },
        weight="encoder.encoder.layer.0.output.dense.weight",
        bad_config=[
            (UnifierHeadConfig, {"split_layer": 7, "num_hidden_layers": 6}, r"split_layer=7.*0 \(embeddings\) to 6"),
            (UnifierConfig, {"split_layer": -14}, "split_layer=-14.*-13 to -1"),
            (UnifierHeadConfig, {"num_heads": 7}, "num_heads=7 does not divide hidden_size=384"),
            (UnifierHeadConfig, {"vocab_size": 10, "query_top_k": 11}, "query_top_k=11 of a vocabulary of 10"),
            (UnifierHeadConfig, {"vocab_size": 10, "words": 11}, "words=11 of a vocabulary of 10"),
            (UnifierHeadConfig, {"global_token": "both"}, "detached, attached, none"),
            (UnifierHeadConfig, {"gate": "document"}, "none, query"),
            (UnifierHeadConfig, {"view": "sum"}, "dense, lexicon"),
            (UnifierHeadConfig, {"dense_weight": -0.1}, "dense_weight=-0.1"),
            (UnifierHeadConfig, {"dense_weight": float("nan")}, "dense_weight=nan"),
        ],
        symmetric=True,
    )
