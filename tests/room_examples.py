"""The small model of every room, so that the same tests hold all of them to the same rules."""

import sys
from typing import Any

import toy  # noqa: F401  registers the test room
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import CNN, Dropout

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


def no_folder_holds(pipeline: Any) -> SentenceTransformer | MultiVectorEncoder:
    """A pipeline with one module more before its head, of a class that no method's own model has."""
    *modules, head = pipeline.children()
    several = any(isinstance(module, MultiVectorMask) for module in modules)
    more = CNN(16, out_channels=16, kernel_sizes=[1]) if several else Dropout()
    return type(pipeline)(modules=[*modules, more, head], prompts=pipeline.prompts, device="cpu")
