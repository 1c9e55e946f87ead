"""A test room: mean-pooled token states, projected, with a bias of its own for queries and for documents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel, initialization
from transformers.utils import ModelOutput

from .polyrep_fields import WIDTH, checked, config_of
from .polyrep_folder import WholeWeights
from .polyrep_room import HeadModule, Module, new_encoder


class ToyHeadConfig(PretrainedConfig):
    model_type = "polyrep_toy_head"
    derived = ("base_model_id", "base_fingerprint")

    @checked(input_dim=WIDTH, projection_dim=WIDTH)
    def __init__(
        self,
        input_dim: int = 32,
        projection_dim: int = 8,
        base_model_id: str | None = None,
        base_fingerprint: str | None = None,
        **kwargs,
    ):
        self.input_dim, self.projection_dim = input_dim, projection_dim
        self.base_model_id, self.base_fingerprint = base_model_id, base_fingerprint
        super().__init__(**kwargs)


class ToyHead(WholeWeights, PreTrainedModel):
    config_class = ToyHeadConfig

    def __init__(self, config):
        super().__init__(config)
        self.project = nn.Linear(config.input_dim, config.projection_dim)
        self.task_bias = nn.Parameter(torch.empty(2, config.projection_dim))
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, ToyHead):
            initialization.normal_(module.task_bias, std=0.02)

    def forward(self, embedding, task=None):
        return self.project(embedding) + self.task_bias[int(task == "document")]


class ToyConfig(ToyHeadConfig):
    model_type = "polyrep_toy"
    sub_configs = {"encoder_config": AutoConfig}

    @checked(projection_dim=WIDTH)
    def __init__(self, encoder_config=None, projection_dim: int = 8, **kwargs):
        self.encoder_config = config_of(encoder_config, type(self).__name__)
        kwargs["input_dim"] = self.encoder_config.hidden_size
        super().__init__(projection_dim=projection_dim, **kwargs)


@dataclass
class ToyOutput(ModelOutput):
    sentence_embedding: torch.Tensor | None = None


class ToyModel(WholeWeights, PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.encoder = new_encoder(config.encoder_config)
        self.head = ToyHead(ToyHeadConfig(config.input_dim, config.projection_dim))
        self.post_init()

    @classmethod
    def from_encoder(cls, backbone, **config):
        encoder = AutoModel.from_pretrained(backbone)
        model = cls(ToyConfig(encoder_config=encoder.config, **config))
        model.encoder = encoder
        return model

    def forward(self, input_ids, attention_mask, task=None, **kwargs):
        states = self.encoder(input_ids, attention_mask).last_hidden_state  # (batch, tokens, hidden)
        mask = attention_mask[..., None].to(states.dtype)
        return ToyOutput(sentence_embedding=self.head((states * mask).sum(1) / mask.sum(1), task))


class ToyPooling(HeadModule, Module):
    head_class = ToyHead
    forward_kwargs = {"task"}

    def forward(self, features, task=None):
        vectors = self.model(features["sentence_embedding"], task)
        return features | {"sentence_embedding": vectors}


for config, model in ((ToyHeadConfig, ToyHead), (ToyConfig, ToyModel)):
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModel")
