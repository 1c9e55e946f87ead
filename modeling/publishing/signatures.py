"""What a graph of a model reads and gives, and inputs of any size to make it with and to compare it by.

A retriever reads what its tokenizer and its image processor give. What a head reads, only its room can tell:
:class:`polyrep.Graph`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoProcessor, AutoTokenizer, PreTrainedModel

from ..errors import InputError, first_line
from ..files import read_json
from ..registry import Graph, room_of

TRACED = (3, 12)
"""Texts, and tokens of the longest, that a graph is made with; neither 1 nor equal, which would be taken for fixed."""

MOST_TOKENS = 200
"""Longest texts that graphs are compared at."""

Inputs = dict[str, Tensor]
Axes = tuple[str | None, ...]


@dataclass
class Signature:
    """One way into a model, of which a graph is made.

    Attributes:
        name: Of the file; ``model`` for the one that needs none.
        method: Of the model.
        outputs: Fields of what it returns.
        fixed: Arguments that no graph can take.
        example: (batch, tokens, seed) -> inputs of that size.
        axes: Input -> the name of each axis that may vary, None where it may not.
    """

    name: str
    method: str
    outputs: tuple[str, ...]
    fixed: Mapping[str, Any]
    example: Callable[[int, int, int], Inputs]
    axes: dict[str, Axes]

    def label(self, name: str) -> str:
        """Name of an input in the graph, where no output may have the same."""
        return f"input_{name}" if name in self.outputs else name


def signatures_of(model: PreTrainedModel, part: Path) -> list[Signature]:
    """Ways into a model: what its room says, and for a retriever what its folder does."""
    graphs = _graphs(model)
    settings: dict[str, Any] = {}
    if not any(graph.inputs for graph in graphs.values()) and "input_ids" in arguments_of(model, "forward"):
        told = read_json(part / "sentence_bert_config.json")
        _refuse_lengthened(told, part)
        settings = told.get("modality_config") or {"text": {}}
    modalities = {"model" if kind == "text" else kind: entry for kind, entry in settings.items()}
    found = []
    for name, entry in modalities.items():
        output = entry.get("method_output_name") or "sentence_embedding"
        outputs = (output, "mask") if output == "token_embeddings" else (output,)
        graph = graphs.get(name) or Graph(outputs=outputs)
        method = entry.get("method") or "forward"
        if name not in ("model", "image"):
            raise InputError(f"{part}: reads {name}, and only texts and images can be exported. Save it without.")
        taken = arguments_of(model, method)
        if hasattr(model, "token_vectors"):  # of a trunk, which hands on what its encoder reads
            taken += arguments_of(model.encoder, "forward")  # type: ignore[arg-type]
        example = _images(part) if name == "image" else _texts(model, part)
        axes: dict[str, Axes] = {
            key: ("batch", *(None,) * (value.ndim - 1)) if name == "image" else ("batch", "tokens")
            for key, value in example(*TRACED, 0).items()
            if key in taken
        }
        found.append(Signature(name, method, graph.outputs, graph.fixed, example, axes))
    for name, graph in graphs.items():
        if graph.inputs:
            axes = {
                key: tuple(axis if _size(model, axis) is None else None for axis in named)
                for key, named in graph.inputs.items()
            }
            found.append(Signature(name, graph.method, graph.outputs, graph.fixed, _random(model, graph), axes))
    if not found:
        raise InputError(
            f"{part}: {type(model).__name__} reads no text, and its room does not say what it reads. Name its inputs "
            "in Room(graphs={...}); see polyrep.Graph."
        )
    return found


def _refuse_lengthened(settings: Mapping[str, Any], part: Path) -> None:
    """InputError for queries that are lengthened before they are encoded, which no tokenizer does by itself."""
    if expansion := settings.get("query_expansion"):
        raise InputError(
            f"{part}: its queries are lengthened to {expansion['length']} tokens, whose places the model is told "
            "beside the tokens, and a graph that reads a tokenizer's output alone would give others. Serve the folder "
            "with torch, or train a model without query_expansion."
        )


def arguments_of(model: PreTrainedModel, method: str) -> list[str]:
    """Names of what a method of the model takes."""
    return list(inspect.signature(getattr(model, method)).parameters)


def _size(model: PreTrainedModel, axis: str) -> int | None:
    """Size of an axis that the model's config fixes: a number, or the length of a list."""
    value = getattr(model.config, axis, None)
    return len(value) if isinstance(value, list) else value


def _texts(model: PreTrainedModel, part: Path) -> Callable[[int, int, int], Inputs]:
    """What the folder's tokenizer makes of random words; the first text is the longest."""
    try:
        processor = AutoProcessor.from_pretrained(part, trust_remote_code=False)
        tokenizer: Any = getattr(processor, "tokenizer", processor)
        if not hasattr(tokenizer, "get_vocab"):
            tokenizer = AutoTokenizer.from_pretrained(part, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{part}: no tokenizer that can be opened ({first_line(error)}), so there are no texts to compare with. "
            "Save the tokenizer of the model into the folder."
        ) from error
    limit = min(tokenizer.model_max_length, *_positions(model.config.to_dict()), MOST_TOKENS)
    special = set(tokenizer.all_special_ids)
    ids = [i for i in sorted(tokenizer.get_vocab().values()) if i not in special]

    def example(batch: int, tokens: int, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        lengths = [max(1, tokens - row * tokens // batch) for row in range(batch)]
        drawn = [[ids[i] for i in torch.randint(len(ids), (n,), generator=generator).tolist()] for n in lengths]
        texts = [tokenizer.decode(row) for row in drawn]
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=min(tokens, limit), return_tensors="pt")
        return dict(encoded)

    return example


def _positions(config: dict[str, Any]) -> list[int]:
    """How long a text may be, as a config and those in it say."""
    own = config.get("max_position_embeddings")
    found = [own] if isinstance(own, int) and own > 0 else []
    return found + [limit for part in config.values() if isinstance(part, dict) for limit in _positions(part)]


def _images(part: Path) -> Callable[[int, int, int], Inputs]:
    """What the folder's image processor makes of random pixels."""
    try:
        processor: Any = AutoProcessor.from_pretrained(part, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{part}: no image processor that can be opened ({first_line(error)}), so there are no images to compare "
            "with. Save the processor of the model into the folder."
        ) from error
    processor = getattr(processor, "image_processor", processor)

    def example(batch: int, tokens: int, seed: int) -> Inputs:
        pixels = np.random.default_rng(seed).integers(0, 256, (batch, 48, 64, 3), dtype=np.uint8)
        return dict(processor(images=[Image.fromarray(image) for image in pixels], return_tensors="pt"))

    return example


def trials(head: PreTrainedModel) -> list[tuple[Graph, Inputs]]:
    """Random inputs for each graph that a head's room tells of, to compare two openings of it by."""
    drawn = [(graph, _random(head, graph)(*TRACED, 0)) for graph in _graphs(head).values() if graph.inputs]
    return [(g, {n: v.to(head.dtype) if v.is_floating_point() else v for n, v in x.items()}) for g, x in drawn]


def _graphs(model: PreTrainedModel) -> Mapping[str, Graph]:
    """What a model's room tells of it; by the model type, since the class may be a folder's own copy of the room's."""
    room = room_of(model.config.model_type)
    told = room.graphs.items() if room else ()
    return next((graphs for owner, graphs in told if owner.config_class.model_type == model.config.model_type), {})  # type: ignore[union-attr]


def _random(model: PreTrainedModel, graph: Graph) -> Callable[[int, int, int], Inputs]:
    """Random inputs of a head: vectors of unit length, token ids, and a mask that pads all texts but the first."""

    def example(batch: int, tokens: int, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.tensor([max(1, tokens - row * tokens // batch) for row in range(batch)])
        varying, inputs = {"batch": batch, "tokens": tokens}, {}
        for name, axes in graph.inputs.items():
            sizes = [_size(model, axis) or varying.get(axis, 32) for axis in axes]
            if name == "attention_mask":
                inputs[name] = (torch.arange(tokens) < lengths[:, None]).long()
            elif name.endswith("_ids"):
                inputs[name] = torch.randint(model.config.vocab_size, sizes, generator=generator)
            else:
                inputs[name] = F.normalize(torch.randn(sizes, generator=generator), dim=-1)
        return inputs

    return example
