"""The small model of every room, so that the same tests hold all of them to the same rules."""

import toy  # noqa: F401  registers the test room

from polyrep.registry import ROOMS

EXAMPLES = {name: room.named(room.example) for name, room in ROOMS.items()}
"""``model_type`` -> what makes the room's :class:`polyrep.hub.example.Example`: of a backbone and a scratch folder."""
