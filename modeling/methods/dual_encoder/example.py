"""A tiny dual encoder: random text and vision encoders with random maps between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import MobileNetV2Config, MobileNetV2Model
from transformers.models.mobilenet_v2.image_processing_pil_mobilenet_v2 import MobileNetV2ImageProcessorPil

from ...hub.example import Example, one_folder
from ...hub.folder import Encoder
from .backbone import load_processor
from .modeling_dual_encoder import DualEncoderConfig, DualEncoderHeadConfig, DualEncoderModel, DualEncoderTransformer


def build(backbone: Path, scratch: Path) -> Example:
    """One folder for images and texts."""
    model = dual_encoder(backbone, scratch)
    processor = load_processor(str(scratch / "texts"), str(scratch / "vision"))
    return Example(
        {
            "retriever": image_text_folder(
                model, processor, scratch / "dual", SentenceTransformer, DualEncoderTransformer
            )
        },
        weight="head.text.linear.weight",
        bad_config=[
            (DualEncoderHeadConfig, {"text_dim": 0}, "text_dim=0"),
            (DualEncoderHeadConfig, {"hidden_dim": -1}, "hidden_dim=-1"),
            (DualEncoderHeadConfig, {"dropout": 1.0}, "dropout=1.0"),
            (DualEncoderConfig, {"encoder_config": {"model_type": "bert"}}, "'bert'.*clip, siglip, blip"),
            (DualEncoderConfig, {"text_config": {"model_type": "bert"}}, "text_config and vision_config"),
            (DualEncoderConfig, {"pooling": "max"}, "pooling='max'"),
        ],
        symmetric=True,
    )


def dual_encoder(backbone: Path, scratch: Path, vision: Path | None = None) -> DualEncoderModel:
    """The model alone, of ``scratch / "texts"`` and ``vision`` or :func:`tiny_vision`."""
    texts = SentenceTransformer(modules=[Transformer(str(backbone)), Pooling(32, "mean"), Normalize()], device="cpu")
    texts.save_pretrained(str(scratch / "texts"))
    vision = vision or tiny_vision(scratch / "vision")
    torch.manual_seed(9)
    model = DualEncoderModel.from_encoder(str(scratch / "texts"), vision=str(vision), projection_dim=12, hidden_dim=8)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def tiny_vision(folder: Path) -> Path:
    """A random MobileNetV2 for images of 32 pixels, with its processor."""
    torch.manual_seed(10)
    config = MobileNetV2Config(depth_multiplier=0.35, finegrained_output=False, image_size=32)
    model = MobileNetV2Model(config).eval()
    for module in model.modules():  # as drawn by default, so little comes through that all images look alike
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    model.save_pretrained(folder)
    square = {"height": 32, "width": 32}
    MobileNetV2ImageProcessorPil(size=square, do_center_crop=False).save_pretrained(folder)
    return folder


def image_text_folder(
    model: Any, processor: Any, folder: Path, family: type[Encoder], transformer: type[Transformer], *keywords: str
) -> Any:
    """A model for images and texts as a folder."""
    methods = {"text": "forward", "image": "encode_image"}
    return one_folder(model, processor, folder, family, transformer, methods=methods, keywords=["task", *keywords])
