"""Late interaction: a vector a token, and as score of a query and a document the sum of the best match of each token.

After Khattab and Zaharia, "ColBERT: Efficient and Effective Passage Search via Contextualized Late Interaction over
BERT" (SIGIR 2020, arXiv 2004.12832). An encoder, one linear map to a narrow vector a token, and unit length: what
ReinPool and LEMUR make small. All of it is a trunk, see ``polyrep_trunk.py``; there is no head.
"""

# mypy: ignore-errors
# Shipped: it speaks to transformers and torch through attributes that these type as Tensor | Module.

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .polyrep_fields import WIDTH, checked, keep
from .polyrep_folder import WholeWeights
from .polyrep_room import SentenceTransformer
from .polyrep_trunk import Trunk, TrunkTransformer, keep_trunk, trunk_parts


class LateInteractionConfig(PretrainedConfig):
    """An encoder and what stands behind it.

    Args:
        encoder_config (dict): Config of the encoder.
        trunk (list): Modules behind the encoder, see :func:`keep_trunk`; default: a Dense to dim, a MultiVectorMask
            and a Normalize.
        dim (int): Width of the token vectors.
    """

    model_type = "polyrep_late_interaction"
    sub_configs = {"encoder_config": AutoConfig}

    @checked(dim=WIDTH)
    def __init__(self, encoder_config=None, trunk=None, dim: int = 128, **kwargs):
        if trunk is None:
            trunk = [{"type": "Dense", "out_features": dim}, {"type": "MultiVectorMask"}, {"type": "Normalize"}]
        name = keep(self, locals())
        width = keep_trunk(self, encoder_config, trunk)
        if dim != width:
            raise ValueError(f"{name}: dim={dim}, but encoder and trunk give vectors of width {width}. Use that.")
        kwargs.pop("hidden_size", None)
        super().__init__(**kwargs)
        self.hidden_size = dim  # the name under which sentence-transformers looks for the width


@dataclass
class LateInteractionOutput(ModelOutput):
    """What the model returns.

    Attributes:
        token_embeddings: ``(batch, tokens, dim)``.
        mask: ``(batch, tokens)``, True for vectors that count in a score.
    """

    token_embeddings: Tensor | None = None
    mask: Tensor | None = None


class LateInteractionModel(WholeWeights, Trunk, PreTrainedModel):
    """A late-interaction model in one state dict."""

    config_class = LateInteractionConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = True

    def __init__(self, config):
        super().__init__(config)
        self.add_trunk(config)
        self.post_init()

    @classmethod
    def from_encoder(cls, backbone: str, **config) -> LateInteractionModel:
        """An untrained model on the encoder of any embedding model, whose own pooling is left out.

        Args:
            backbone: Folder or Hub id of a SentenceTransformer or of a bare encoder.
            config: Fields of LateInteractionConfig.

        Raises:
            ValueError: It does not begin with an encoder.
        """
        model = SentenceTransformer(str(backbone), device="cpu")
        encoder, _, _ = trunk_parts([model[0]], cls.__name__, "Name another backbone.")
        return cls.of_parts(LateInteractionConfig(encoder_config=encoder.config, **config), encoder)

    @classmethod
    def from_modules(cls, model, **config) -> LateInteractionModel:
        """A model of a trained MultiVectorEncoder's modules.

        Raises:
            ValueError: It has modules that one folder of this kind cannot hold.
        """
        return super().from_modules(model, **{"dim": model.get_embedding_dimension()} | config)

    @property
    def width(self) -> int:
        """Of its vectors."""
        return self.config.dim

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        task: str | None = None,
        **kwargs,
    ) -> LateInteractionOutput:
        """Token vectors of texts or pages.

        Args:
            input_ids: ``(batch, tokens)``.
            attention_mask: ``(batch, tokens)``; default: all tokens count.
            task: "query", else a document.
            kwargs: What else the encoder reads.
        """
        vectors, mask = self.token_vectors(input_ids, attention_mask, task, **kwargs)
        return LateInteractionOutput(token_embeddings=vectors, mask=mask)


class LateInteractionTransformer(TrunkTransformer):
    """The stock Transformer around a LateInteractionModel, which a MultiVectorEncoder or a head behind it reads."""

    def on_model_ready(self, model):
        """Refuse a model of one vector a text, unless something behind makes one."""
        if list(model)[-1] is self and type(model).__name__ != "MultiVectorEncoder":
            raise ValueError(
                f"LateInteractionTransformer: gives a vector a token, which a {type(model).__name__} does not read. "
                "Open it as MultiVectorEncoder."
            )


LateInteractionConfig.register_for_auto_class()
LateInteractionModel.register_for_auto_class("AutoModel")
