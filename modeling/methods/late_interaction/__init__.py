"""Late interaction: read ``modeling_late_interaction.py`` for what it is, then ``objective.py`` for what trains it."""

from __future__ import annotations

from ...hub.forms import processor_of
from ...registry import Room, register
from .modeling_late_interaction import (
    LateInteractionConfig,
    LateInteractionModel,
    LateInteractionOutput,
    LateInteractionTransformer,
)
from .objective import LateInteractionObjective

__all__ = [
    "LateInteractionConfig",
    "LateInteractionModel",
    "LateInteractionObjective",
    "LateInteractionOutput",
    "LateInteractionTransformer",
]

register(
    Room(
        model=LateInteractionModel,
        transformer=LateInteractionTransformer,
        objectives={"LateInteractionObjective": LateInteractionObjective},
        load_processor=processor_of,
        card="late_interaction",
    )
)
