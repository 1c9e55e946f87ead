"""How a dual encoder's inputs are prepared, and how a plain CLIP, SigLIP or BLIP becomes the backbone of a head."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, VisionTextDualEncoderProcessor

from ...files import read_json
from ...hub.vision import image_processor_of
from .modeling_dual_encoder import DualEncoderConfig, DualEncoderModel, DualEncoderTransformer
from .polyrep_towers import BOTH_TOWERS


def load_processor(backbone: str, vision: str | None = None) -> Any:
    """What turns texts, or texts and images, into a model's inputs.

    Args:
        backbone: Folder or Hub id whose own it is; of two towers, or of a text encoder.
        vision: Of the vision encoder that goes with it, where that is another.
    """
    if vision is not None:
        tokenizer = AutoTokenizer.from_pretrained(backbone, trust_remote_code=False)
        return VisionTextDualEncoderProcessor(image_processor_of(vision), tokenizer)
    kind = AutoConfig.from_pretrained(backbone, trust_remote_code=False).model_type
    both = kind in (*BOTH_TOWERS, DualEncoderConfig.model_type)
    return (AutoProcessor if both else AutoTokenizer).from_pretrained(backbone, trust_remote_code=False)


def open_backbone(backbone: str, dtype: torch.dtype | None) -> SentenceTransformer | None:
    """A plain CLIP, SigLIP or BLIP folder as a SentenceTransformer for texts and images; None for any other."""
    if read_json(Path(backbone) / "config.json").get("model_type") not in BOTH_TOWERS:
        return None
    output = {"method_output_name": "sentence_embedding"}
    modalities = {"text": {"method": "forward", **output}, "image": {"method": "encode_image", **output}}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps weights that are mapped
        DualEncoderModel.from_encoder(backbone).save_pretrained(folder)
        load_processor(backbone).save_pretrained(folder)
        transformer = DualEncoderTransformer(
            folder,
            model_kwargs={"dtype": dtype},
            modality_config=modalities,
            module_output_name="sentence_embedding",
            unpad_inputs=False,
        )
    return SentenceTransformer(modules=[transformer], similarity_fn_name="dot")
