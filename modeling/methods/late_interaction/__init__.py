"""Late interaction: read ``modeling_late_interaction.py`` for what it is; stock losses train it."""

from __future__ import annotations

from ...hub.forms import processor_of
from ...registry import Room, register
from .modeling_late_interaction import (
    LateInteractionConfig,
    LateInteractionModel,
    LateInteractionOutput,
    LateInteractionTransformer,
)

__all__ = [
    "LateInteractionConfig",
    "LateInteractionModel",
    "LateInteractionOutput",
    "LateInteractionTransformer",
]

register(
    Room(
        model=LateInteractionModel,
        transformer=LateInteractionTransformer,
        load_processor=processor_of,
        card="late_interaction",
    )
)
