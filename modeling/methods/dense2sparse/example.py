"""A tiny Dense2Sparse: one folder for texts, one for images and texts, and a head behind a text encoder."""

from __future__ import annotations

from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from ...hub.example import Example, TinyRun, one_folder
from ..dual_encoder.backbone import load_processor
from ..dual_encoder.example import dual_encoder, image_text_folder
from .modeling_dense2sparse import (
    CheckedTransformer,
    Dense2SparseConfig,
    Dense2SparseForRetrieval,
    Dense2SparseForRetrievalConfig,
    Dense2SparseModel,
    Dense2SparsePooling,
)

RUNS = {
    "words": TinyRun(
        "dense2sparse-minilm",
        "--document_top_k 20 --query_top_k 10 --depth 4",
        together="--negatives 2 --control term --noise 0.5 --mixup 0.5",
    ),
}


def build(backbone: Path, scratch: Path) -> Example:
    """Two retrievers and a pipeline."""
    torch.manual_seed(4)
    encoder = SentenceTransformer(modules=[Transformer(str(backbone)), Pooling(32, "mean"), Normalize()], device="cpu")
    head = Dense2SparseModel.from_backbone(encoder, query_top_k=20, document_top_k=30, average_length=5.0)
    with torch.no_grad():
        head.vocabulary.bias.normal_()
        head.own_weight.uniform_(0.5, 2)
    head.restrict_expansion(torch.arange(10, head.config.vocab_size))
    encoder.save_pretrained(str(scratch / "encoder"))
    retriever = Dense2SparseForRetrieval.from_encoder(str(scratch / "encoder"), head=head)
    towers = dual_encoder(backbone, scratch)
    towers.save_pretrained(scratch / "towers")
    processor = load_processor(str(scratch / "texts"), str(scratch / "vision"))
    processor.save_pretrained(scratch / "towers")
    images = Dense2SparseForRetrieval.from_encoder(
        str(scratch / "towers"), query_top_k=20, document_top_k=30, average_length=5.0
    )
    family = (SparseEncoder, CheckedTransformer, "expand")
    return Example(
        {
            "retriever": one_folder(retriever, backbone, scratch / "dense2sparse-retriever", SparseEncoder),
            "images": image_text_folder(images, processor, scratch / "dense2sparse-images", *family),
            "pipeline": SparseEncoder(modules=[*encoder.children(), Dense2SparsePooling(head)], device="cpu"),
        },
        weight="head.own_weight",
        bad_config=[
            (Dense2SparseConfig, {"input_dim": 0}, "input_dim=0"),
            (Dense2SparseConfig, {"vocab_size": 10, "document_top_k": 11}, "document_top_k=11 of a vocabulary of 10"),
            (Dense2SparseConfig, {"query_top_k": 0}, "query_top_k=0"),
            (Dense2SparseConfig, {"mass": 1.5}, "mass=1.5"),
            (Dense2SparseConfig, {"min_weight": float("nan")}, "min_weight=nan"),
            (Dense2SparseConfig, {"activation": "relu"}, "log1p_relu, double_log1p"),
            (Dense2SparseConfig, {"expansion": "none", "own_tokens": None}, "every vector is empty"),
            (Dense2SparseConfig, {"expansion_size": 40_000}, "expansion_size=40000"),
            (Dense2SparseConfig, {"own_tokens": "learned", "foreign_words": True}, "taken for other words"),
            (Dense2SparseForRetrievalConfig, {"pooling": "max"}, "pooling='max'"),
            (
                Dense2SparseForRetrievalConfig,
                {"encoder_config": towers.config, "input_dim": 12, "expansion": "query"},
                "leaves images without a word",
            ),
            (
                Dense2SparseForRetrievalConfig,
                {"encoder_config": towers.config, "input_dim": 13},
                "the towers give vectors of 12, but input_dim=13",
            ),
        ],
    )
