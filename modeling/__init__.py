"""polyrep: one embedding backbone, many retrieval representations.

Each method is a *room*: a folder under ``methods/``, whose ``modeling_<room>.py`` is also the code that its models
carry to the Hub. ``ROOMS`` lists them; importing polyrep registers their classes with ``AutoConfig`` and
``AutoModel``.
"""

from __future__ import annotations

from . import methods as methods
from .errors import InputError
from .hub.code import localize
from .hub.folder import load, save
from .registry import ROOMS, Graph, Room, register

__all__ = ["ROOMS", "Graph", "InputError", "Room", "load", "localize", "register", "save"]
__version__ = "0.1.0"
