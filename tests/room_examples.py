"""A small model of every room, so that the same tests hold all of them to the same rules.

A room adds a function here that builds its models on a tiny backbone; nothing else in the shared tests changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import toy
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from toy.modeling_toy import ToyHead, ToyHeadConfig, ToyModel, ToyPooling
from transformers import AutoTokenizer

from polyrep.hub import Encoder


@dataclass
class Example:
    """What the room tests need of a room.

    Attributes:
        models: Name -> sentence-transformers model of each kind of folder that the room makes.
        weight: Name of a weight of the room's own in the first model's root file, for the test that drops it.
        bad_config: (config class, arguments, word the error must contain) for each check of the config.
    """

    models: dict[str, Encoder]
    weight: str | None = None
    bad_config: list[tuple[type, dict[str, Any], str]] = field(default_factory=list)


def toy_example(backbone: Path, scratch: Path) -> Example:
    torch.manual_seed(3)
    retriever = ToyModel.from_encoder(backbone, projection_dim=6)
    folder = scratch / "toy-retriever"
    retriever.save_pretrained(folder)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(folder)
    output = {"text": {"method": "forward", "method_output_name": "sentence_embedding"}}
    transformer = Transformer(
        str(folder), modality_config=output, module_output_name="sentence_embedding", unpad_inputs=False
    )
    one_folder = SentenceTransformer(modules=[transformer], similarity_fn_name="dot", device="cpu")
    one_folder.module_kwargs = {"0": ["task"]}
    head = ToyPooling(ToyHead(ToyHeadConfig(32, 6)))
    pipeline = SentenceTransformer(
        modules=[Transformer(str(backbone)), Pooling(32, "mean"), head], similarity_fn_name="dot", device="cpu"
    )
    return Example(
        {"retriever": one_folder, "pipeline": pipeline},
        weight="head.task_bias",
        bad_config=[
            (ToyHeadConfig, {"projection_dim": 0}, "projection_dim=0"),
            (ToyHeadConfig, {"input_dim": "8"}, "input_dim='8'"),
        ],
    )


EXAMPLES: dict[str, Callable[[Path, Path], Example]] = {toy.ToyModel.config_class.model_type: toy_example}
