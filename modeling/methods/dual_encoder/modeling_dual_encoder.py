"""Dual encoder: texts and images as dense vectors of one space, that an image may be found by what it shows.

Two towers, one a side, are either one model that brings both (CLIP, SigLIP, BLIP), or a text and a vision encoder that
stay as they are, with a small map behind each. It is the frozen backbone of heads for images and texts, and a teacher.
"""

# mypy: ignore-errors
# Shipped: it speaks to transformers and torch through attributes that these type as Tensor | Module.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from .polyrep_fields import check_weight, checked, fields_of, keep
from .polyrep_folder import WholeWeights, whole_encoder
from .polyrep_room import SentenceTransformer, Transformer, pooling_of, text_inputs
from .polyrep_towers import (
    BOTH_TOWERS,
    MAPS,
    ImageInputs,
    Projections,
    Towers,
    image_features,
    initialize_projections,
    open_both_towers,
    shared_width,
    tower_configs,
)

_CHOICES = {"pooling": ("mean", "cls", "lasttoken")}


class DualEncoderHeadConfig(PretrainedConfig):
    """The two maps that bring a text encoder and a vision encoder into one space.

    Args:
        text_dim (int): Width of the text encoder's vectors.
        image_dim (int): Width of the vision encoder's features.
        projection_dim (int): Width of the shared space.
        hidden_dim (int): Width of a residual layer (GELU) beside each linear map; 0 for none.
        dropout (float): Share of an image's features that a training step leaves out.
        text_dropout (float): Share of a text's.
        vision_model_id (str): The vision encoder.
    """

    model_type = "polyrep_dual_encoder_head"
    derived = ("text_dim", "image_dim", "vision_model_id")

    @checked(**MAPS)
    def __init__(
        self,
        text_dim: int = 384,
        image_dim: int = 1280,
        projection_dim: int = 512,
        hidden_dim: int = 0,
        dropout: float = 0.0,
        text_dropout: float = 0.0,
        vision_model_id: str | None = None,
        **kwargs,
    ):
        name = keep(self, locals())
        for width in ({"text_dim": text_dim}, {"image_dim": image_dim}):
            check_weight(name, **width, projection_dim=max(projection_dim, hidden_dim))
        super().__init__(**kwargs)


@dataclass
class DualEncoderOutput(ModelOutput):
    """What the two maps and the towers return.

    Attributes:
        sentence_embedding: ``(batch, projection_dim)`` dense vectors of unit length.
    """

    sentence_embedding: Tensor | None = None


class DualEncoderHead(Projections, WholeWeights, PreTrainedModel):
    """One map a side, from an encoder's vectors into the space that both share."""

    config_class = DualEncoderHeadConfig
    _supports_sdpa = _supports_flash_attn = True

    def __init__(self, config):
        super().__init__(config)
        self.add_projections(config)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        initialize_projections(module)

    @classmethod
    def from_backbone(cls, model: SentenceTransformer, **config) -> DualEncoderHead:
        """An untrained head for a text SentenceTransformer."""
        return cls(DualEncoderHeadConfig(text_dim=model.get_embedding_dimension(), **config))

    def forward(self, sentence_embedding: Tensor, modality: str = "text", **kwargs) -> DualEncoderOutput:
        """Vectors of one side, ``(batch, text_dim)`` or ``(batch, image_dim)``, in the shared space.

        Raises:
            ValueError: The vectors have another width than this side's encoder gives.
        """
        return DualEncoderOutput(sentence_embedding=self.project(sentence_embedding, modality))


class DualEncoderConfig(DualEncoderHeadConfig):
    """Two towers whose vectors can be compared: one model that has both, or two encoders and a head.

    Args:
        encoder_config (dict): Config of CLIP, SigLIP or BLIP, which bring both towers and their maps; or
        text_config (dict): config of the text encoder, and
        vision_config (dict): of the vision encoder.
        pooling (str): How token states become the text encoder's vector: mean, cls or lasttoken.
        normalize (bool): Bring that vector to unit length before it is mapped.
    """

    model_type = "polyrep_dual_encoder"
    sub_configs = {"encoder_config": AutoConfig, "text_config": AutoConfig, "vision_config": AutoConfig}

    @checked(**_CHOICES)
    def __init__(
        self,
        encoder_config=None,
        text_config=None,
        vision_config=None,
        pooling: str = "mean",
        normalize: bool = True,
        **kwargs,
    ):
        if encoder_config is None and text_config is None and vision_config is None:  # as a default
            text_config, vision_config = {"model_type": "bert", "hidden_size": 384}, {"model_type": "mobilenet_v2"}
        name, parts = type(self).__name__, (encoder_config, text_config, vision_config)
        self.encoder_config, self.text_config, self.vision_config = tower_configs(name, *parts)
        self.pooling, self.normalize = pooling, normalize
        if self.encoder_config is not None:
            kwargs["projection_dim"] = shared_width(self.encoder_config)
        super().__init__(**kwargs)
        width = getattr(self.text_config, "hidden_size", self.text_dim)
        if width != self.text_dim:
            raise ValueError(
                f"{name}: text_config gives vectors of {width}, but text_dim={self.text_dim}, so the maps belong to "
                "another encoder. Use the one that they were trained on."
            )


class DualEncoderModel(Towers, WholeWeights, PreTrainedModel):
    """The towers as a model of their own: ``forward`` encodes texts, and ``encode_image`` images."""

    config_class = DualEncoderConfig
    _supports_sdpa = _supports_flash_attn = True

    def __init__(self, config):
        super().__init__(config)
        self.add_towers(config)
        if config.encoder_config is None:
            self.head = DualEncoderHead(config)
        self.post_init()

    @classmethod
    def from_encoder(
        cls, backbone: str, head: DualEncoderHead | None = None, vision: str | None = None, **config
    ) -> DualEncoderModel:
        """A dual encoder from pretrained parts.

        Args:
            backbone: Folder or Hub id of CLIP, SigLIP or ``BlipForImageTextRetrieval``; or of a SentenceTransformer
                for texts, and then:
            head: A trained head; default: an untrained one.
            vision: Folder or Hub id of a vision encoder that AutoModel opens.
            config: Fields of DualEncoderHeadConfig for the untrained head.

        Raises:
            ValueError: A tower's width differs from the head's, or the backbone's modules do not fit in one folder.
        """
        kind = AutoConfig.from_pretrained(backbone, trust_remote_code=False).model_type
        if kind in BOTH_TOWERS:
            encoder = open_both_towers(backbone, "DualEncoderModel")
            model = cls(DualEncoderConfig(encoder_config=encoder.config))
            model.encoder = encoder
            return model.to(encoder.dtype)
        if vision is None:
            raise ValueError(
                f"DualEncoderModel: {backbone} of {kind!r} has one tower. Name a vision encoder for the other, or "
                f"one of {', '.join(BOTH_TOWERS)}."
            )
        texts = SentenceTransformer(str(backbone), device="cpu")
        whole_encoder(texts[0].model, cls.__name__)
        pooling, normalize = cls.check_backbone(texts)
        images = whole_encoder(AutoModel.from_pretrained(vision, trust_remote_code=False).eval(), cls.__name__)
        image_dim = _feature_width(images)
        if head is None:
            head = DualEncoderHead.from_backbone(texts, image_dim=image_dim, **config)
        for tower, found, expected in (
            ("vision", image_dim, head.config.image_dim),
            ("text", texts.get_embedding_dimension(), head.config.text_dim),
        ):
            if found != expected:
                raise ValueError(
                    f"DualEncoderModel: the {tower} tower gives vectors of width {found}, but the head was made for "
                    f"{expected}, so its map cannot read them. Use the encoder whose features it was trained on."
                )
        parts = {"text_config": texts[0].model.config, "vision_config": images.config}
        model = cls(DualEncoderConfig(**fields_of(head.config), **parts, pooling=pooling, normalize=normalize))
        model.text_encoder, model.vision_encoder = texts[0].model, images
        model.head.load_state_dict(head.state_dict())
        return model.to(texts[0].model.dtype)

    @staticmethod
    def check_backbone(model: SentenceTransformer) -> tuple[str, bool]:
        """Pooling of a SentenceTransformer and whether it normalises; ValueError if it does more than that."""
        remedy = "Name a backbone of these parts alone."
        return pooling_of(model, "DualEncoderModel", _CHOICES["pooling"], remedy, prompts=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        task: str | None = None,
        **kwargs,
    ) -> DualEncoderOutput:
        """Dense vectors of texts; both tasks alike."""
        inputs = text_inputs(input_ids, attention_mask, token_type_ids)
        return DualEncoderOutput(sentence_embedding=self.text_vectors(input_ids, **inputs))

    def encode_image(self, pixel_values: Tensor, task: str | None = None) -> DualEncoderOutput:
        """Dense vectors of images, ``(batch, channels, height, width)`` as the processor gives them."""
        return DualEncoderOutput(sentence_embedding=self.image_vectors(pixel_values))


class DualEncoderTransformer(ImageInputs, Transformer):
    """The stock Transformer around a dual encoder, with images checked first."""


@torch.no_grad()
def _feature_width(encoder: PreTrainedModel) -> int:
    """Width of a vision encoder's features: of one image, since every architecture says it under another name."""
    size = getattr(encoder.config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.zeros(1, getattr(encoder.config, "num_channels", 3), height, width, dtype=encoder.dtype)
    return image_features(encoder, pixels).shape[1]


for config, model in ((DualEncoderHeadConfig, DualEncoderHead), (DualEncoderConfig, DualEncoderModel)):
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModel")
