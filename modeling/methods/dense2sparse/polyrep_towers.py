"""Two towers, one for texts and one for images, whose vectors can be compared; shared by shipped files of images.

One model that brings both (CLIP, SigLIP, BLIP), or two encoders with a map behind each. A model holds them as
``TwoTowers``, or is them, as the dual encoder is. The one to change is that of ``polyrep.hub``, whose copies `make
rooms` renews, as of ``polyrep_room.py``; it has no config class either.
"""

# mypy: ignore-errors
# Shipped: it speaks to transformers and torch through attributes that these type as Tensor | Module.

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    BlipForImageTextRetrieval,
    CLIPModel,
    PretrainedConfig,
    PreTrainedModel,
    SiglipModel,
    initialization,
)
from transformers.image_utils import load_image

from .polyrep_fields import WIDTH, part_config
from .polyrep_room import new_encoder, pool_tokens

BOTH_TOWERS = {"clip": CLIPModel, "siglip": SiglipModel, "blip": BlipForImageTextRetrieval}

MAPS = {
    "text_dim": WIDTH,
    "image_dim": WIDTH,
    "projection_dim": WIDTH,
    "hidden_dim": (0, WIDTH[1]),
    "dropout": (0, 0.999),
    "text_dropout": (0, 0.999),
}
"""What the fields of the maps may be, for ``checked``."""

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".heic", ".avif")


def tower_configs(owner: str, both=None, text=None, vision=None) -> tuple:
    """Configs of the towers, from dicts of their fields: of both in one, or of each; the others are None.

    Raises:
        ValueError: They are neither, or of a model whose vectors are not known.
    """
    if (both is None) != (text is not None and vision is not None):
        raise ValueError(
            f"{owner}: one of encoder_config, text_config and vision_config is missing, or one too many. Use "
            "encoder_config for both towers, or text_config and vision_config for one each."
        )
    parts = {"encoder_config": both, "text_config": text, "vision_config": vision}
    both, text, vision = (None if part is None else part_config(part, owner, field) for field, part in parts.items())
    if both is not None and both.model_type not in BOTH_TOWERS:
        raise ValueError(
            f"{owner}: encoder_config is of {both.model_type!r}, whose image and text vectors this does not know. Use "
            f"one of {', '.join(BOTH_TOWERS)}, or a text and a vision encoder of their own."
        )
    return both, text, vision


def shared_width(config: PretrainedConfig) -> int:
    """Width of the space that both towers of CLIP, SigLIP or BLIP share."""
    if config.model_type == "siglip":  # no map behind its towers
        return config.vision_config.hidden_size
    return config.image_text_hidden_size if config.model_type == "blip" else config.projection_dim


def open_both_towers(backbone: str, owner: str) -> PreTrainedModel:
    """CLIP, SigLIP or BLIP from a folder or Hub id; ValueError if it lacks a weight that its vectors need."""
    kind = BOTH_TOWERS[AutoConfig.from_pretrained(backbone, trust_remote_code=False).model_type]
    encoder, found = kind.from_pretrained(backbone, output_loading_info=True)
    if missing := sorted(key for key in found["missing_keys"] if not key.startswith("itm_head")):
        raise ValueError(
            f"{owner}: {backbone} lacks {missing[0]} and {len(missing) - 1} more weights of {kind.__name__}, which "
            "would be random. Name a checkpoint made for retrieval."
        )
    return encoder


def image_features(encoder: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    """One vector an image: the pooled output of a vision encoder, or its first position if it pools nothing."""
    output = encoder(pixel_values=pixel_values)
    pooled = getattr(output, "pooler_output", None)
    return output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)


class ProjectionLayer(nn.Module):
    """Standardise, then a linear map, and a residual layer beside it: ``(batch, width)`` to ``(batch, out)``."""

    def __init__(self, width: int, config: PretrainedConfig, dropout: float):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.linear = nn.Linear(width, config.projection_dim)
        self.hidden = None
        if config.hidden_dim:
            inner = nn.Linear(width, config.hidden_dim), nn.GELU(), nn.Dropout(dropout)
            self.hidden = nn.Sequential(*inner, nn.Linear(config.hidden_dim, config.projection_dim, bias=False))
        self.dropout = nn.Dropout(dropout)

    def forward(self, vectors: Tensor) -> Tensor:
        """Map a side's vectors."""
        state = self.dropout((vectors - self.mean) / self.deviation)
        return self.linear(state) if self.hidden is None else self.linear(state) + self.hidden(state)


class Projections:
    """One map a side, from an encoder's vectors into the space that both share; beside a module class."""

    def add_projections(self, config: PretrainedConfig) -> None:
        """Make the maps, in the constructor."""
        self.text = ProjectionLayer(config.text_dim, config, config.text_dropout)
        self.image = ProjectionLayer(config.image_dim, config, config.dropout)
        self.log_scale = nn.Parameter(torch.tensor(3.0))  # of cosines, in the contrastive objective

    def project(self, vectors: Tensor, modality: str) -> Tensor:
        """Vectors of one side in the shared space, of unit length; ValueError for those of another encoder."""
        side = self.image if modality == "image" else self.text
        width = side.mean.shape[0]
        if vectors.shape[-1] != width:
            raise ValueError(
                f"{type(self).__name__}: {modality} vectors of width {vectors.shape[-1]}, but this head was made for "
                f"{width}, so they come from another encoder. Use the one it was trained on, or train a head."
            )
        return F.normalize(side(vectors), dim=-1)


def initialize_projections(module: nn.Module) -> None:
    """What a model that holds maps adds to its ``_init_weights``: a residual layer starts as none."""
    if isinstance(module, Projections):
        initialization.constant_(module.log_scale, 3.0)
    elif isinstance(module, ProjectionLayer):
        initialization.zeros_(module.mean)
        initialization.ones_(module.deviation)
        if module.hidden is not None:
            initialization.zeros_(module.hidden[-1].weight)


class Towers:
    """Texts and images to vectors of one space; beside a module class, which makes ``head`` where there are maps."""

    def add_towers(self, config: PretrainedConfig) -> None:
        """Make the encoders of a config with ``encoder_config``, or ``text_config`` and ``vision_config``."""
        parts = [config]
        for part in parts if config.dtype is not None else ():  # transformers says it to the parts of a model's config
            inner = [value for name in part.sub_configs if (value := getattr(part, name, None)) is not None]
            for value in inner:  # and not to theirs
                value.dtype = config.dtype
            parts += inner
        if config.encoder_config is not None:
            self.encoder = BOTH_TOWERS[config.encoder_config.model_type](config.encoder_config)
        else:
            self.text_encoder = new_encoder(config.text_config)
            self.vision_encoder = new_encoder(config.vision_config, "pixel_values")

    def get_input_embeddings(self) -> nn.Module:
        """The text tower's word embeddings, from which a head takes its words."""
        if self.config.encoder_config is None:
            return self.text_encoder.get_input_embeddings()
        blip = self.config.encoder_config.model_type == "blip"
        return (self.encoder.text_encoder if blip else self.encoder.text_model).get_input_embeddings()

    def text_vectors(self, input_ids: Tensor, attention_mask: Tensor, **inputs) -> Tensor:
        """Dense vectors of texts: ``(batch, tokens)`` to ``(batch, projection_dim)``, of unit length."""
        if self.config.encoder_config is None:
            states = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
            vectors = pool_tokens(states, attention_mask, self.config.pooling)
            vectors = F.normalize(vectors, dim=-1) if self.config.normalize else vectors
            return self.head.project(vectors, "text")
        kind = self.config.encoder_config.model_type
        if kind == "blip":
            states = self.encoder.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            vectors = self.encoder.text_proj(states[:, 0])
        elif kind == "clip":
            vectors = self.encoder.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        else:  # SigLIP reads its last position, and learned with padding up to there and no mask
            text = self.config.encoder_config.text_config
            missing = max(0, text.max_position_embeddings - input_ids.shape[1])
            input_ids = torch.where(attention_mask.bool(), input_ids, text.pad_token_id)
            input_ids = F.pad(input_ids, (0, missing), value=text.pad_token_id)
            vectors = self.encoder.get_text_features(input_ids=input_ids).pooler_output
        return F.normalize(vectors, dim=-1)

    def image_vectors(self, pixel_values: Tensor) -> Tensor:
        """Dense vectors of images: ``(batch, channels, height, width)`` to ``(batch, projection_dim)``."""
        pixel_values = pixel_values.to(self.dtype)
        if self.config.encoder_config is None:
            return self.head.project(image_features(self.vision_encoder, pixel_values), "image")
        if self.config.encoder_config.model_type == "blip":
            states = self.encoder.vision_model(pixel_values).last_hidden_state
            return F.normalize(self.encoder.vision_proj(states[:, 0]), dim=-1)
        return F.normalize(self.encoder.get_image_features(pixel_values=pixel_values).pooler_output, dim=-1)


class _Maps(Projections, nn.Module):
    def __init__(self, config: PretrainedConfig):
        super().__init__()
        self.add_projections(config)


class TwoTowers(Towers, PreTrainedModel):
    """The towers as a part of another model, which asks them for tied weights and for modules not to be split."""

    _supports_sdpa = _supports_flash_attn = True

    def __init__(self, config: PretrainedConfig):
        super().__init__(config)
        self.add_towers(config)
        if config.encoder_config is None:
            self.head = _Maps(config)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        initialize_projections(module)


class ImageInputs:
    """Images checked before they are encoded; beside the stock Transformer around a model for images and texts.

    On its own it would take the path of an image that does not exist for a text, and encode the file's name.
    """

    def preprocess(self, inputs, *args, **kwargs):
        """Open images, refuse what cannot be opened, and hand on RGB."""
        if "image" in self.modalities and isinstance(inputs, (list, tuple)):
            inputs = [opened(item) for item in inputs]
        return super().preprocess(inputs, *args, **kwargs)


def opened(item):
    """An image or the path of one as an RGB image, upright; a dict's ``image`` likewise; anything else as it is."""
    if isinstance(item, dict) and "image" in item:
        return {**item, "image": opened(item["image"])}
    remote = isinstance(item, str) and item.startswith(("http://", "https://"))
    named = item.partition("?")[0] if remote else item
    path = isinstance(item, Path) or isinstance(item, str) and named.lower().endswith(_IMAGE_SUFFIXES)
    if not path and not (isinstance(item, str) and item.startswith("data:image/")) and not hasattr(item, "getbands"):
        return item
    if path and not remote and not Path(item).is_file():
        raise ValueError(
            f"{str(item)!r}: looks like the path of an image, but there is no such file, and its name would be "
            "encoded as a text. Mend the path; if it is a text, let it end in something else, a space say."
        )
    try:
        return load_image(str(item) if path else item)  # upright, RGB, whatever the mode was
    except Exception as error:  # Pillow raises SyntaxError and its own kinds too, and a network whatever it likes
        raise ValueError(
            f"{str(item)[:200]!r}: cannot be read as an image ({type(error).__name__}: {error}), so there is nothing "
            "to encode. Replace the file or leave it out."
        ) from error
