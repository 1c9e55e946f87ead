"""Models that give several kinds of vectors of a text in one pass, each of which is called a view.

Some module of such a model has a method ``views()`` that says what there is, as name -> fields of :class:`View`, the
view that finds candidates first::

    {"lexicon": {"kind": "sparse", "dim": 30522, "similarity": "dot", "output": "lexicon", "weight": 1.0},
     "dense": {"kind": "sentence", "dim": 384, "similarity": "dot", "output": "dense", "weight": 12.5}}

A batch asks it for some of them by ``views``, their names, and then holds their fields when the model has read it. A
method ``weighed(batch)`` of that module, where there is one, gives these fields as a search sums them.

A model that routes its tokens to keys (:func:`polyrep.encoding.encoders.token_router_of`) has the view ``routed``, its
entries, and as a sparse encoder before it ``router``, the weights that it gives by itself. Of an index that holds
both, the router finds candidates and the entries alone rank them, so they weigh 0 and 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers.util import batch_to_device
from torch import nn
from tqdm import tqdm

from ..errors import InputError
from .embeddings import Embeddings, Kind, joined, rows
from .encoders import encode_chunk, kind_of, prompt_of, token_router_of


@dataclass(frozen=True)
class View:
    """What a model says of one of its views.

    Attributes:
        kind: ``sentence``, ``sparse``, ``tokens`` or ``routed``.
        dim: Width of a vector; of sparse ones the size of the vocabulary.
        similarity: How two vectors are compared.
        output: Field of the batch: ``(batch, dim)``, for sparse vectors too; or ``(batch, tokens, dim)``. Empty where
            the model is asked otherwise.
        mask: For ``tokens`` the field ``(batch, tokens)`` that is not 0 where a vector counts.
        weight: Of its scores in a sum of those of all views; None where none was chosen.
        vocabulary: Keys that ``routed`` entries can have; else 0.
        sentence_dim: Width of the vectors of whole texts beside ``routed`` entries; 0 where there are none.
    """

    kind: Kind
    dim: int
    similarity: str
    output: str
    mask: str = ""
    weight: float | None = None
    vocabulary: int = 0
    sentence_dim: int = 0


def views_of(model: Any) -> dict[str, View]:
    """Views of a model by name, the one that finds candidates first; none for most models."""
    if (part := part_with_views(model)) is not None:
        return {name: View(**said) for name, said in part.views().items()}
    if (router := token_router_of(model)) is None:
        return {}
    config = router.config
    similarity = "routed" if config.clamp else "routed_unclamped"
    further = {"weight": 1.0, "vocabulary": config.vocab_size, "sentence_dim": config.sentence_dim}
    routed = View("routed", config.entry_dim, similarity, "", **further)
    if kind_of(model) != "sparse":
        return {"routed": routed}
    width = int(model.get_embedding_dimension() or 0)
    return {"router": View("sparse", width, str(model.similarity_fn_name or "dot"), "", weight=0.0), "routed": routed}


def weights_of_views(model: Any, names: Sequence[str], subject: str) -> dict[str, float]:
    """What a model says that its views weigh in a sum, of those that are there; empty where there are less than two.

    Args:
        model: Any model.
        names: What there is to be summed.
        subject: What is searched, for the refusal.

    Raises:
        InputError: It has not chosen a weight.
    """
    there = {name: view.weight for name, view in views_of(model).items() if name in names}
    if len(there) < 2:
        return {}
    if missing := [name for name, weight in there.items() if weight is None]:
        raise InputError(
            f"{subject}: the model has chosen no weight for {missing[0]!r} in the sum of {' and '.join(there)}, and "
            "their scores differ in size. Give the weights, or train it with a data set that has dev queries."
        )
    return {name: float(weight) for name, weight in there.items() if weight is not None}


@torch.inference_mode()
def encode_views(
    model: Any, texts: Sequence[str], names: Sequence[str], *, task: str, batch_size: int = 32, progress: str = ""
) -> dict[str, Embeddings]:
    """Encode texts once, into several kinds of vectors.

    Args:
        model: Opened by :func:`polyrep.load`, with a part that has ``views()``.
        texts: As many as fit into memory, encoded.
        names: Of the views that are wanted.
        task: ``query`` or ``document``.
        batch_size: Texts per forward pass.
        progress: What a progress bar says; none without it.

    Returns:
        Name -> vectors in float32, in the order of the texts.

    Raises:
        InputError: The model has no such view, or its output is not what it says of it.
    """
    views = views_of(model)
    refuse_unknown_views(views, names, type(model).__name__)
    if not texts:
        return {name: _one_after_another(views[name], []) for name in names}
    if part_with_views(model) is None:
        kinds = {name: views[name].kind for name in names}
        return {n: encode_chunk(model, list(texts), task, k, batch_size).embeddings(k) for n, k in kinds.items()}
    encoded: dict[str, list[Embeddings]] = {name: [] for name in names}
    prompt = prompt_of(model, task)
    model.eval()
    part = part_with_views(model)
    order = sorted(
        range(len(texts)), key=lambda number: -len(texts[number])
    )  # side by side with others of their length
    starts = range(0, len(texts), batch_size)
    for start in tqdm(starts, desc=progress, unit="batch", disable=not progress):
        batch = model.preprocess([texts[i] for i in order[start : start + batch_size]], prompt=prompt, task=task)
        found = model({**batch_to_device(batch, model.device), "views": tuple(names)}, task=task)
        found = part.weighed(found) if hasattr(part, "weighed") else found
        for name in names:
            encoded[name].append(_flat(views[name], name, found))
    return {name: rows(_one_after_another(views[name], encoded[name]), np.argsort(order)) for name in names}


def refuse_unknown_views(views: Mapping[str, View], names: Sequence[str], source: str) -> None:
    """InputError if a model has no view of a name."""
    for name in names:
        if name not in views:
            has = f"it has {', '.join(views)}" if views else "it has one kind of vectors, which has no name"
            raise InputError(f"{source}: has no view {name!r}; {has}. Name those, or leave --views out.")


def part_with_views(model: Any) -> Any:
    """The module of a model that has several views; None for most models."""
    parts = model.children() if isinstance(model, nn.Module) else ()
    return next((part for part in parts if callable(getattr(part, "views", None))), None)


def _flat(view: View, name: str, output: Any) -> Embeddings:
    """A batch of one view as flat arrays."""
    tensor = output.get(view.output)
    if tensor is None or tensor.shape[-1] != view.dim:
        shape = "nothing" if tensor is None else f"{tuple(tensor.shape)}"
        raise InputError(f"view {name!r}: said to have {view.dim} numbers, and gives {shape}. The model is broken.")
    if view.kind == "sentence":
        return _embeddings(view, tensor.float().cpu().numpy())
    if view.kind == "tokens":
        mask = output[view.mask].bool()
        return _embeddings(view, tensor[mask].float().cpu().numpy(), mask.sum(1).cpu().numpy())
    text_of, word = tensor.nonzero(as_tuple=True)
    counts = text_of.bincount(minlength=len(tensor)).cpu().numpy()
    return _embeddings(view, tensor[text_of, word].float().cpu().numpy(), counts, word.cpu().numpy())


def _embeddings(
    view: View, values: np.ndarray, lengths: np.ndarray | None = None, words: np.ndarray | None = None
) -> Embeddings:
    offsets = None if lengths is None else np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    indices = None if words is None else words.astype(np.int32)
    return Embeddings(view.kind, values, offsets, indices, view.dim, 0.0, Path())


def _one_after_another(view: View, parts: Sequence[Embeddings]) -> Embeddings:
    if parts:
        return joined(parts)
    empty = np.empty(0 if view.kind == "sparse" else (0, view.dim), np.float32)
    none, named = np.empty(0, np.int64), view.kind in ("sparse", "routed")
    found = _embeddings(view, empty, None if view.kind == "sentence" else none, none if named else None)
    return replace(found, sentences=np.empty((0, view.sentence_dim), np.float32)) if view.sentence_dim else found
