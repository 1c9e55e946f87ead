"""A tiny CITADEL: one folder with its encoder, and routers behind a bare encoder and a late-interaction model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Pooling

from ...hub.example import Example, TinyRun, one_folder
from .modeling_citadel import (
    CitadelConfig,
    CitadelHead,
    CitadelHeadConfig,
    CitadelModel,
    CitadelPooling,
    CitadelTransformer,
)

WHOLE = "--batch_sampler batch_sampler --bf16 false --token_dim 8 --cls_dim 16"
RUNS = {
    "whole": TinyRun("citadel-minilm", WHOLE, together="--learning_rate 1e-4"),
    "head": TinyRun("citadel-minilm-frozen", "--depth 4 --token_dim 8 --label_weight 0.5"),
}


def build(backbone: Path, scratch: Path) -> Example:
    """A retriever and two pipelines."""
    torch.manual_seed(13)

    def stirred(head: CitadelHead) -> CitadelHead:
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if head.config.own_bonus:
                head.bonus.add_(3)  # so that rounding chooses no other key
            else:
                head.restrict(head.terms[::4])
        return head

    encoder = SentenceTransformer(modules=[Transformer(str(backbone)), Pooling(32, "mean"), Normalize()], device="cpu")
    every: Any = {"document_keys": 61, "initial_active": 30}  # of documents, so that rounding cuts off none
    head = CitadelHead.from_backbone(encoder, router_layer=1, token_dim=8, **every)
    bare = SentenceTransformer(modules=[Transformer(str(backbone))], device="cpu")
    weights = CitadelHead.from_backbone(bare, router_layer=-1, token_dim=0, cls_dim=0, **every)
    names: Any = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    narrow = Dense(32, 16, bias=False, activation_function=torch.nn.Identity(), **names)
    late = [Transformer(str(backbone)), narrow, MultiVectorMask(), Normalize(**names)]
    routed = CitadelHead.from_backbone(MultiVectorEncoder(modules=late, device="cpu"), token_dim=8, **every)
    return Example(
        {
            "retriever": one_folder(
                CitadelModel.from_modules(encoder, stirred(head)),
                backbone,
                scratch / "citadel-retriever",
                SparseEncoder,
                CitadelTransformer,
            ),
            "pipeline": SparseEncoder(modules=[*late, CitadelPooling(stirred(routed))], device="cpu"),
            "weights": SparseEncoder(
                modules=[Transformer(str(backbone)), CitadelPooling(stirred(weights))], device="cpu"
            ),
        },
        weight="encoder.encoder.layer.0.output.dense.weight",
        bad_config=[
            (CitadelHeadConfig, {"router_layer": 7, "num_hidden_layers": 6}, r"router_layer=7.*0 \(embeddings\) to 6"),
            (CitadelConfig, {"router_layer": -14}, "router_layer=-14.*-13 to -1"),
            (CitadelHeadConfig, {"router_layer": -2, "router_reads": "vectors"}, "router_layer=-2.*token vectors"),
            (CitadelHeadConfig, {"mlm_head": True, "router_reads": "vectors"}, "mlm_head=True.*Leave it out"),
            (CitadelHeadConfig, {"own_bonus": True, "router_reads": "vectors"}, "own_bonus=True.*Leave it out"),
            (CitadelHeadConfig, {"query_keys": 0}, "query_keys=0.*from 1"),
            (CitadelHeadConfig, {"document_keys": 0}, "document_keys=0.*from 1"),
            (CitadelHeadConfig, {"token_dim": -1}, "token_dim=-1"),
            (CitadelHeadConfig, {"cls_dim": -1}, "cls_dim=-1"),
            (CitadelHeadConfig, {"threshold": -0.5}, "threshold=-0.5"),
            (CitadelHeadConfig, {"threshold": float("nan")}, "threshold=nan"),
            (CitadelHeadConfig, {"vocab_size": 10, "words": 11}, "words=11 of a vocabulary of 10"),
            (CitadelHeadConfig, {"routing": "random"}, "learned, static"),
            (CitadelConfig, {"dim": 12}, "dim=12.*width 768"),
        ],
    )
