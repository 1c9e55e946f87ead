"""What a method tells the rest of polyrep: a Room, and the table of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from sentence_transformers.base.modules.module import Module
from sentence_transformers.base.modules.transformer import Transformer
from transformers import AutoConfig, AutoModel, PreTrainedModel


@dataclass(frozen=True)
class Graph:
    """One ONNX graph of a model, where ``export-onnx`` cannot tell by itself; see :mod:`polyrep.publishing.export`.

    A retriever needs none: its graphs read what its folder's tokenizer and image processor give.

    Attributes:
        inputs: Input -> its axes, each a field of the config, whose number or length is its size, or the name of a
            size that varies: ``batch``, ``tokens``. Empty: what the tokenizer gives.
        outputs: Fields of what the model returns; one that is None is left out.
        method: Of the model.
        fixed: Further arguments, the same in every call.
    """

    inputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("sentence_embedding",)
    method: str = "forward"
    fixed: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Room:
    """What the shared parts of polyrep need to know of a method.

    Attributes:
        model: The PreTrainedModel of a run's folder; its config's ``model_type`` is the key in ``ROOMS``. Has
            ``from_encoder(backbone, **config)``, which makes an untrained one, and where a head is trained for it,
            ``from_encoder(backbone, head=head)`` and ``check_backbone(backbone)``, a ValueError where one folder
            cannot hold the two. Its config may have ``similarity_fn_name``, the score of its vectors.
        head: The PreTrainedModel that ``module`` owns, where that is another class. What is trained on cached vectors
            has ``from_backbone(backbone, **config)``, whose config takes ``base_model_id``, ``base_revision`` and
            ``base_fingerprint``.
        module: The sentence-transformers module, if the room has one.
        transformer: The sentence-transformers module around ``model``, where a pipeline is to become one folder: then
            ``model`` has ``from_modules(backbone, head)``, which makes it of an opened backbone, and where it is to
            become modules again ``stock_modules(tokenizer)``, what stands between its encoder and its head.
        objectives: Training objectives by class name; their typed constructor arguments become flags of ``train``.
        card: Name of the template in ``model_cards/``.
        graphs: Model or head -> name -> what ``export-onnx`` writes of it: of a head all its graphs, of a retriever
            what differs from the default. The graph that needs no name is ``model``.
        example: Its tiny model for the shared tests, a function of a backbone and a scratch folder that gives a
            :class:`~polyrep.hub.example.Example`, as ``module:name`` inside its folder.
        frontier: Its rows in the frontier, a :class:`~polyrep.evaluation.frontier.rows.Method`, named
            likewise. None of these is imported before it is asked for.
        mean_pooled: A function, named likewise, that turns a late-interaction model into one whose vectors are the
            mean of its tokens. Exactly one room gives it.
        settled: A function ``(model, datasets)``, named likewise, that once a whole model is trained sets in its
            config what is chosen on the development queries of the data sets that have some.
        seeded: Whether the head draws what is not learned: its config then takes the ``seed`` of the run.
        joins_vision: Whether the head brings the vectors of a text encoder and of a vision encoder (``--vision``) into
            one space: its config then takes ``image_dim`` and ``vision_model_id``, and where the vision encoder is a
            model of its own, ``model.from_encoder`` and ``load_processor`` take its folder as ``vision``.
        open_backbone: ``(folder, dtype)`` to the backbone, for folders that are to be opened otherwise than they say
            themselves; None, or one that returns None, for any other. The type is None for weights as they are saved.
        load_processor: ``(backbone, **vision)`` to what prepares the inputs of the model; None: the
            backbone's tokenizer.
        encoders: Modules of the model that adapters train (``--lora_rank``), as far as it has them.
        head_from_words: ``(words, backbone, **config)`` to a head that reads the words of another model
            (``--vocabulary``), and to their tokenizer; None for a head that reads none.
    """

    model: type[PreTrainedModel]
    head: type[PreTrainedModel] | None = None
    module: type[Module] | None = None
    transformer: type[Transformer] | None = None
    objectives: dict[str, type[Any]] = field(default_factory=dict)
    card: str | None = None
    graphs: Mapping[type[PreTrainedModel], Mapping[str, Graph]] = field(default_factory=dict)
    example: str = "example:build"
    frontier: str = ""
    mean_pooled: str = ""
    settled: str = ""
    seeded: bool = False
    joins_vision: bool = False
    open_backbone: Callable[[str, torch.dtype | None], Any] | None = None
    load_processor: Callable[..., Any] | None = None
    encoders: tuple[str, ...] = ("encoder",)
    head_from_words: Callable[..., tuple[PreTrainedModel, Any]] | None = None

    @property
    def package(self) -> str:
        """The package of the method, e.g. ``polyrep.methods.toy``."""
        return self.model.__module__.rpartition(".")[0]

    def named(self, reference: str) -> Any:
        """What ``module:name`` is in the folder of the method, which is imported for it."""
        module, _, name = reference.partition(":")
        return getattr(importlib.import_module(f"{self.package}.{module}"), name)

    @property
    def config(self) -> Any:
        """Config class of ``model``."""
        return self.model.config_class


ROOMS: dict[str, Room] = {}
"""``model_type`` of a model's config -> its room."""


def register(room: Room) -> None:
    """Add a room: its folders open with AutoModel, train with ``train`` and pass through ``save``."""
    for model in filter(None, (room.model, room.head)):
        config: Any = model.config_class
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
    ROOMS[room.config.model_type] = room


def room_of(model_type: str | None) -> Room | None:
    """The room that a config's ``model_type`` belongs to, of its model or of its head; None for a stock model."""
    for room in ROOMS.values():
        if model_type in {part.config_class.model_type for part in (room.model, room.head) if part}:  # type: ignore[union-attr]
            return room
    return None
