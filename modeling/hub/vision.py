"""The vision encoder of a dual encoder, opened so that its features are cached like any embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.module import Module
from transformers import AutoModel, AutoProcessor

from ..errors import InputError
from .code import may_run
from .folder import check_files, opening
from .polyrep_towers import image_features
from .weights import check_loaded, check_sizes


def fetch_vision(name: str, revision: str | None = None) -> Path:
    """Local folder of a vision encoder of transformers, downloaded first if it is a Hub id (safetensors only).

    Raises:
        InputError: It is not to be had, lacks weights or an image processor, is damaged, is an adapter of another, or
            names code.
    """
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
        except (HFValidationError, HfHubHTTPError, OSError) as error:
            raise InputError(
                f"--vision {name}: no such folder, and not to be had from the Hub ({type(error).__name__}). Check the "
                "path, the ORG/NAME and the network."
            ) from error
    check_files(folder)
    if not any(folder.glob("*.safetensors")) or not any(folder.glob("*processor_config.json")):
        raise InputError(
            f"--vision {name}: needs weights (*.safetensors) and a preprocessor_config.json; it holds "
            f"{sorted(file.name for file in folder.iterdir())[:9]}."
        )
    may_run(folder, trusted=False)
    check_sizes(folder)
    return folder


def image_processor_of(folder: str) -> Any:
    """A folder's image processor; AutoImageProcessor itself would want torchvision in transformers 5.17."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    return getattr(processor, "image_processor", processor)


class VisionEncoder(SentenceTransformer):
    """Images to their pooled features ``(images, width)``, as the encoder gives them."""

    @classmethod
    def open(cls, folder: Path, dtype: torch.dtype) -> VisionEncoder:
        """Open a folder with weights and an image processor.

        Raises:
            InputError: It cannot be opened, or lacks weights that its features need.
        """
        with opening(folder):
            features = _Features(folder, dtype)
            check_loaded(folder, features.model, reads="pooler_output")
        return cls(modules=[features], similarity_fn_name="dot")


class _Features(Module):
    """The encoder and what a dual encoder's folder will pool of it."""

    tokenizer = None
    modalities = ["image"]

    def __init__(self, folder: Path, dtype: torch.dtype):
        super().__init__()
        self.model = AutoModel.from_pretrained(folder, dtype=dtype, use_safetensors=True, trust_remote_code=False)
        self.processor = image_processor_of(str(folder))

    def preprocess(self, inputs: list[Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Pixels of opened images."""
        return {**self.processor(inputs, return_tensors="pt"), "modality": "image"}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add ``sentence_embedding (batch, width)``."""
        pooled = image_features(self.model, features["pixel_values"].to(self.model.dtype))
        return {**features, "sentence_embedding": pooled.float()}

    def get_embedding_dimension(self) -> int:
        """Width of the features: of one image, since every architecture says it under another name."""
        with torch.inference_mode():
            image = self.preprocess([Image.new("RGB", (64, 64))])
            return self.forward({**image, "pixel_values": image["pixel_values"].to(self.model.device)})[
                "sentence_embedding"
            ].shape[1]

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: it goes into a dual encoder's folder, never into one of its own."""
        raise NotImplementedError("A vision encoder is saved as part of a dual encoder.")
