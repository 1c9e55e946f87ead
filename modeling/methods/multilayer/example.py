"""A tiny MultiLayer: one folder with two encoders, and heads with one vector and with several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer

from ...hub.example import Example, TinyRun, one_folder
from .modeling_multilayer import MultiLayerConfig, MultiLayerHeadConfig, MultiLayerModel, MultiLayerPooling

WHOLE = "--batch_sampler batch_sampler --bf16 false --hard_negatives 1 --negative_margin 0"
RUNS = {
    "tied": TinyRun("multilayer-minilm", WHOLE),
    "untied": TinyRun("multilayer-minilm", f"{WHOLE} --tied false --objective CachedMultiLayerObjective"),
    "adapters": TinyRun("multilayer-minilm", f"{WHOLE} --lora_rank 2 --learning_rate 0.01"),
    "head": TinyRun("multilayer-minilm-frozen", "--layers -1 -2 -3"),
}


def build(backbone: Path, scratch: Path) -> Example:
    """A retriever and two pipelines."""
    torch.manual_seed(6)

    def stirred(model: torch.nn.Module) -> Any:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model

    retriever = stirred(MultiLayerModel.from_encoder(str(backbone), layers=[-1, 0], pooling="scalar_mix", tied=False))
    mixed = MultiLayerPooling(layers=[-1, 0, 1], pooling="scalar_mix", normalize=True)
    several = MultiLayerPooling(layers=[-1, 1], pooling="multi", projection=True, hidden_size=32, normalize=True)
    return Example(
        {
            "retriever": one_folder(retriever, backbone, scratch / "multilayer-retriever"),
            "pipeline": SentenceTransformer(modules=[Transformer(str(backbone)), stirred(mixed)], device="cpu"),
            "multi": MultiVectorEncoder(modules=[Transformer(str(backbone)), stirred(several)], device="cpu"),
        },
        weight="query_encoder.encoder.layer.0.output.dense.weight",
        bad_config=[
            (MultiLayerHeadConfig, {"layers": []}, r"layers=\[\] names no hidden states"),
            (MultiLayerHeadConfig, {"layers": "-1,-3"}, "layers='-1,-3' .*each of a whole number"),
            (MultiLayerHeadConfig, {"layers": [-1, True]}, r"layers=\[-1, True\] .*each of a whole number"),
            (MultiLayerHeadConfig, {"layers": [-1, -1]}, "names a layer twice"),
            (MultiLayerHeadConfig, {"layers": [-1, 12], "num_hidden_layers": 12}, r"0 to 12 they are \[12, 12\]"),
            (
                MultiLayerConfig,
                {"layers": [-1, 13]},
                r"names 13, .* 12 layers.* 0 \(embeddings\) to 12 .*-13 to -1",
            ),
            (MultiLayerConfig, {"layers": [-1, -14]}, "names -14"),
            (MultiLayerHeadConfig, {"pooling": "max"}, "self_contrastive, last, mean, scalar_mix, linear, multi"),
            (MultiLayerHeadConfig, {"token": "max"}, "token='max'.*mean, cls"),
            (MultiLayerHeadConfig, {"layers": [-1], "pooling": "mean"}, "nothing to pool"),
            (MultiLayerHeadConfig, {"pool_queries": True}, "would change nothing"),
            (MultiLayerHeadConfig, {"pooling": "linear", "projection": True}, "one map behind another"),
        ],
    )
