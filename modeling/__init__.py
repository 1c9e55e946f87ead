"""polyrep: one embedding backbone, many retrieval representations.

Each method is a *room*: a sub-package whose ``modeling_<room>.py`` is also the code that its models carry to the Hub.
``ROOMS`` lists them; importing polyrep registers their classes with ``AutoConfig`` and ``AutoModel``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sentence_transformers.base.modules.module import Module
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from .errors import InputError
from .hub import load, localize, save

__all__ = ["ROOMS", "InputError", "Room", "load", "localize", "register", "save"]
__version__ = "0.1.0"


@dataclass(frozen=True)
class Room:
    """What the shared parts of polyrep need to know of a method.

    Attributes:
        model: The PreTrainedModel; its ``config_class.model_type`` is the key in ``ROOMS``.
        module: The sentence-transformers module with the room's head, if it has one.
        objectives: Training objectives by class name; their typed constructor arguments become flags of ``train``.
        card: Name of the template in ``model_cards/``.
    """

    model: type[PreTrainedModel]
    module: type[Module] | None = None
    objectives: dict[str, type[Any]] = field(default_factory=dict)
    card: str | None = None

    @property
    def config(self) -> type[PretrainedConfig]:
        """The config class, one per model class."""
        return self.model.config_class

    @property
    def shipped_module(self) -> str:
        """Import name of the one file that is shipped to the Hub."""
        return self.model.__module__


ROOMS: dict[str, Room] = {}


def register(room: Room) -> None:
    """Add a room: its folders open with AutoModel, train with ``train`` and pass through ``save``."""
    ROOMS[room.config.model_type] = room
    AutoConfig.register(room.config.model_type, room.config, exist_ok=True)
    AutoModel.register(room.config, room.model, exist_ok=True)
