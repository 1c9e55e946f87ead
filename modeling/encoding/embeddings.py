"""Embeddings of many texts in flat arrays, and the arithmetic on them that needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

Kind = Literal["sentence", "tokens", "sparse", "routed", "layers", "cls_layers", "states"]
"""What is kept of a text; see the table of :mod:`polyrep.encoding.cache`."""

SIDE_BY_SIDE: tuple[Kind, ...] = ("tokens", "routed")
"""Kinds of which the rows of all windows are the document's; of others each window is compared by itself."""


@dataclass(frozen=True)
class Embeddings:
    """Encoded texts, memory-mapped.

    Attributes:
        kind: What a text became; see the table of :mod:`polyrep.encoding.cache`.
        values: The numbers, in the shape of the table.
        offsets: ``(texts + 1,)`` bounds of each text's rows for ``tokens``, ``sparse``, ``routed`` and ``states``;
            else None.
        indices: ``(rows,)`` vocabulary index of each value for ``sparse``, key of each entry for ``routed``, id of
            each token for ``states``; else None.
        dim: Width of a vector (vocabulary size for ``sparse``).
        seconds: Wall time that encoding took.
        path: The cache folder.
        windows: ``(documents + 1,)`` bounds of each document's rows where documents are cut into windows, each of
            which is a text here; None where a document is one text.
        sentences: ``(texts, width)`` for ``routed``: a vector of each whole text, whose inner product is added to the
            score; None where there is none.
    """

    kind: Kind
    values: np.ndarray
    offsets: np.ndarray | None
    indices: np.ndarray | None
    dim: int
    seconds: float
    path: Path
    windows: np.ndarray | None = None
    sentences: np.ndarray | None = None

    @property
    def documents(self) -> int:
        """How many there are; as many as texts unless they are cut into windows."""
        return len(self) if self.windows is None else len(self.windows) - 1

    def __len__(self) -> int:
        return len(self.values) if self.offsets is None else len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Vectors (``tokens``), terms (``sparse``), entries (``routed``) or tokens (``states``) of each text.

        Else 1, or its layers.
        """
        if self.offsets is None:
            return np.full(len(self.values), 1 if self.values.ndim == 2 else self.values.shape[1])
        return np.diff(self.offsets)

    @property
    def filled(self) -> np.ndarray:
        """``(texts,)`` whether a text has anything to be compared by."""
        return self.lengths > 0 if self.sentences is None else np.ones(len(self), bool)

    @property
    def sentence_dim(self) -> int:
        """Width of the vectors of whole texts beside routed entries; 0 where there are none."""
        return 0 if self.sentences is None else self.sentences.shape[1]


def in_memory(values: np.ndarray, offsets: np.ndarray | None = None) -> Embeddings:
    """Vectors that are there already as embeddings without a cache: one a text, or with ``offsets`` several."""
    kind: Kind = "sentence" if offsets is None else "tokens"
    return Embeddings(kind, values, offsets, None, values.shape[1], 0.0, Path())


def rows(embeddings: Embeddings, positions: np.ndarray) -> Embeddings:
    """Some texts of ``embeddings``, in the order of ``positions`` and in memory; of windows each by itself."""
    embeddings = replace(embeddings, windows=None)
    if embeddings.offsets is None:
        return replace(embeddings, values=embeddings.values[positions])
    places, bounds = side_by_side(embeddings.offsets, positions)
    indices = None if embeddings.indices is None else embeddings.indices[places]
    sentences = None if embeddings.sentences is None else embeddings.sentences[positions]
    return replace(embeddings, values=embeddings.values[places], indices=indices, offsets=bounds, sentences=sentences)


def side_by_side(bounds: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of chosen texts one after another.

    Args:
        bounds: ``(texts + 1,)`` where each text's rows start and end.
        chosen: ``(chosen,)`` places of texts.

    Returns:
        Places of their rows, and ``(chosen + 1,)`` where those of each start and end.
    """
    lengths = bounds[chosen + 1] - bounds[chosen]
    found = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return np.repeat(bounds[chosen] - found[:-1], lengths) + np.arange(found[-1]), found


def joined(blocks: Sequence[Embeddings]) -> Embeddings:
    """Texts of all blocks, one after another; of a single block the block itself."""
    if len(blocks) == 1:
        return blocks[0]
    offsets = indices = sentences = None
    if blocks[0].offsets is not None:
        lengths = np.concatenate([block.lengths for block in blocks])
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    if blocks[0].indices is not None:
        indices = np.concatenate([block.indices for block in blocks if block.indices is not None])
    if blocks[0].sentences is not None:
        sentences = np.concatenate([block.sentences for block in blocks if block.sentences is not None])
    values = np.concatenate([block.values for block in blocks])
    return replace(blocks[0], values=values, offsets=offsets, indices=indices, sentences=sentences, path=Path())


def by_document(windows: Embeddings, bounds: np.ndarray) -> Embeddings:
    """Windows as documents: with several vectors or entries a text, those of all windows are the document's.

    Of vectors of whole texts beside entries the document has the mean, whose score is the mean of its windows'.

    Args:
        windows: Each as a text.
        bounds: ``(documents + 1,)`` where each document's windows start and end.
    """
    if windows.kind not in SIDE_BY_SIDE:
        return replace(windows, windows=bounds)
    assert windows.offsets is not None
    sentences = None if windows.sentences is None else means(windows.sentences, bounds)
    return replace(windows, offsets=windows.offsets[bounds], sentences=sentences)


def means(vectors: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Mean of each document's vectors, ``(documents, dim)`` in the type of ``vectors``.

    Args:
        vectors: ``(windows, dim)``.
        bounds: ``(documents + 1,)`` where each document's windows start and end; it has one at least.
    """
    if len(bounds) < 2:
        return vectors[:0]
    sums = np.add.reduceat(vectors, bounds[:-1], axis=0, dtype=np.float32)
    return (sums / np.diff(bounds)[:, None]).astype(vectors.dtype)


def row_of(embeddings: Embeddings, row: int) -> Embeddings:
    """One text of a cache as a cache of its own."""
    return between(embeddings, row, row + 1)


def between(embeddings: Embeddings, start: int, stop: int) -> Embeddings:
    """The texts ``start:stop`` as a cache of their own, of which nothing is copied; of windows each by itself."""
    if embeddings.offsets is None:
        return replace(embeddings, values=embeddings.values[start:stop])
    bounds = embeddings.offsets[start : stop + 1]
    part = slice(int(bounds[0]), int(bounds[-1]))
    indices = None if embeddings.indices is None else embeddings.indices[part]
    sentences = None if embeddings.sentences is None else embeddings.sentences[start:stop]
    return replace(
        embeddings, values=embeddings.values[part], indices=indices, offsets=bounds - bounds[0], sentences=sentences
    )


def _sums(embeddings: Embeddings) -> np.ndarray:
    """Sum of each text's vectors: ``(texts, dim)`` in float32. An empty text sums to zero."""
    assert embeddings.offsets is not None
    sums = np.zeros((len(embeddings), embeddings.dim), np.float32)
    filled = embeddings.lengths > 0
    sums[filled] = np.add.reduceat(embeddings.values, embeddings.offsets[:-1][filled], axis=0, dtype=np.float32)
    return sums


def sum_of_tokens(queries: Embeddings) -> Embeddings:
    """Queries as one vector: MaxSim against a single document vector is the dot product with this sum."""
    return replace(queries, kind="sentence", values=_sums(queries), offsets=None)


def mean_of_tokens(documents: Embeddings) -> Embeddings:
    """Documents as the normalised mean of their vectors."""
    sums = _sums(documents)
    unit = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    return replace(documents, kind="sentence", values=unit.astype(documents.values.dtype), offsets=None)
