"""The small model of every room, so that the same tests hold all of them to the same rules."""

import sys
from typing import Any

import toy  # noqa: F401  registers the test room
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

from polyrep.registry import ROOMS

EXAMPLES = {name: room.named(room.example) for name, room in ROOMS.items()}
"""``model_type`` -> what makes the room's :class:`polyrep.hub.example.Example`: of a backbone and a scratch folder."""

RUNS = {
    (room, name): run
    for room, build in EXAMPLES.items()
    for name, run in getattr(sys.modules[build.__module__], "RUNS", {}).items()
}
"""``model_type`` and a word -> :class:`polyrep.hub.example.TinyRun`."""


def behind(pipeline: Any) -> SentenceTransformer | MultiVectorEncoder:
    """The backbone of a pipeline, whose last module is the method's."""
    modules = [module for name, module in pipeline.named_children()][:-1]
    several = any(isinstance(module, MultiVectorMask) for module in modules)
    return (MultiVectorEncoder if several else SentenceTransformer)(modules=modules, device="cpu")
