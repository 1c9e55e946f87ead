"""A tiny ReinPool behind late interaction: several vectors a text, and one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

from ...hub.example import Example, TinyRun
from .modeling_reinpool import ReinPoolConfig, ReinPoolModel, ReinPoolPooling

SMALL = "--num_vectors 2 --ladder 1,2,3 --depth 4"
RUNS = {
    "soft gate": TinyRun("reinpool-minilm", f"{SMALL} --prior_weight 0.1", together="--negatives 2 --prior_weight 20"),
    "reinforce": TinyRun(
        "reinpool-minilm",
        f"{SMALL} --objective ReinforceObjective --weights hard --bank 8 --entropy_weight 0.1",
        together="--negatives 2 --entropy_weight 2",
    ),
}


def build(backbone: Path, scratch: Path) -> Example:
    """A pipeline of each output."""
    torch.manual_seed(5)

    def modules() -> list[torch.nn.Module]:
        names: Any = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
        narrow = Dense(32, 16, bias=False, activation_function=torch.nn.Identity(), **names)
        return [Transformer(str(backbone)), narrow, MultiVectorMask(), Normalize(**names)]

    def pooling(**config: Any) -> ReinPoolPooling:
        head = ReinPoolModel(ReinPoolConfig(dim=16, **config))
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        return ReinPoolPooling(head)

    many = pooling(pooling="kmeans", num_vectors=2, refinement=1, projection=True)
    one = pooling(output="sentence_embedding", weights="soft", projection=True)
    return Example(
        {
            "pipeline": MultiVectorEncoder(modules=[*modules(), many], device="cpu"),
            "single": SentenceTransformer(modules=[*modules(), one], device="cpu"),
        },
        bad_config=[
            (ReinPoolConfig, {"dim": 0}, "dim=0"),
            (ReinPoolConfig, {"dim": True}, "dim=True"),
            (ReinPoolConfig, {"num_layers": -1}, "num_layers=-1"),
            (ReinPoolConfig, {"num_heads": 7}, "num_heads=7 does not divide dim=128.*e.g. 4"),
            (ReinPoolConfig, {"ffn_mult": 0.5}, "ffn_mult=0.5"),
            (ReinPoolConfig, {"num_vectors": 0}, "num_vectors=0"),
            (ReinPoolConfig, {"num_vectors": 2}, "num_vectors=2. Use pooling='kmeans'"),
            (ReinPoolConfig, {"min_keep": 0}, "min_keep=0"),
            (ReinPoolConfig, {"refinement": "1"}, "refinement='1'"),
            (ReinPoolConfig, {"patch_columns": 0}, "patch_columns=0"),
            (ReinPoolConfig, {"dim": 6, "num_heads": 2, "patch_columns": 3}, "dim=6. Use None"),
            (ReinPoolConfig, {"output": "embedding"}, "token_embeddings, sentence_embedding"),
            (ReinPoolConfig, {"pooling": "max"}, "mean, kmeans, slots"),
            (ReinPoolConfig, {"weights": "both"}, "weights='both'.*hard, soft"),
            (ReinPoolConfig, {"quantization": "int8"}, "quantization='int8'.*none, binary"),
            (ReinPoolConfig, {"dropout": 1}, "dropout=1"),
            (ReinPoolConfig, {"threshold": 0.0}, "threshold=0.0"),
            (
                ReinPoolConfig,
                {"output": "sentence_embedding", "pooling": "kmeans", "num_vectors": 4},
                "is one vector, but num_vectors=4",
            ),
        ],
    )
