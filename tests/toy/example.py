"""The test room's tiny models."""

from __future__ import annotations

from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from polyrep.hub.example import Example, one_folder

from .modeling_toy import ToyHead, ToyHeadConfig, ToyModel, ToyPooling


def build(backbone: Path, scratch: Path) -> Example:
    torch.manual_seed(3)
    retriever = ToyModel.from_encoder(backbone, projection_dim=6)
    head = ToyPooling(ToyHead(ToyHeadConfig(32, 6)))
    pipeline = SentenceTransformer(
        modules=[Transformer(str(backbone)), Pooling(32, "mean"), head], similarity_fn_name="dot", device="cpu"
    )
    return Example(
        {"retriever": one_folder(retriever, backbone, scratch / "toy-retriever"), "pipeline": pipeline},
        weight="head.task_bias",
        bad_config=[
            (ToyHeadConfig, {"projection_dim": 0}, "projection_dim=0"),
            (ToyHeadConfig, {"input_dim": "8"}, "input_dim='8'"),
        ],
    )
