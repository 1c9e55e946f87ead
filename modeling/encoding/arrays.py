"""Arrays that lie in a folder as in memory, and a manifest that says what they are: checked before any is touched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .embeddings import SIDE_BY_SIDE, Embeddings


def plain_name(name: Any) -> bool:
    """Whether this is the name of a file in a folder, and cannot lead out of it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set("/\\:\0") & set(name)


def mapped_arrays(folder: Path, described: Any, remedy: str) -> dict[str, np.ndarray]:
    """Arrays of a folder, each in a file ``NAME.bin``, mapped into memory.

    Args:
        folder: Where they are.
        described: Name -> ``[dtype, shape]``, from a file.
        remedy: What to do about a damaged folder.

    Raises:
        InputError: A description means nothing, or a file is missing or not as long as it says.
    """
    if not isinstance(described, Mapping):
        raise InputError(f"{folder}: its arrays are described by {described!r:.80}, not by name. {remedy}")
    arrays: dict[str, np.ndarray] = {}
    for name, entry in described.items():
        dtype, shape = _described(folder, name, entry, remedy)
        file = folder / f"{name}.bin"
        expected = math.prod(shape) * dtype.itemsize
        found = file.stat().st_size if file.is_file() else -1
        if found != expected:
            state = f"has {found:,} bytes" if found >= 0 else "is missing"
            raise InputError(f"{file}: {state}, expected {expected:,}, so it is truncated. {remedy}")
        # An empty file cannot be mapped.
        arrays[name] = np.memmap(file, dtype, "r", shape=shape) if expected else np.empty(shape, dtype)
    return arrays


def _described(folder: Path, name: Any, entry: Any, remedy: str) -> tuple[np.dtype, tuple[int, ...]]:
    try:
        dtype, shape = np.dtype(str(entry[0])), tuple(entry[1])
        sizes = all(type(size) is int and 0 <= size < 2**48 for size in shape)
        if not plain_name(name) or dtype.kind not in "iuf" or not sizes or not isinstance(entry, list | tuple):
            raise ValueError
    except (TypeError, ValueError, LookupError, SyntaxError):
        raise InputError(f"{folder}: its array {name!r:.80} is described by {entry!r:.80}. {remedy}") from None
    return dtype, shape


def check_bounds(vectors: Embeddings, texts: int | None = None, vocabulary: int = 0, sentence_dim: int = 0) -> None:
    """Refuse flat arrays that do not fit together, which engines would follow out of their memory.

    Args:
        vectors: Of several vectors, words or routed entries a text, or of one.
        texts: How many there should be; None for any number.
        vocabulary: Keys that routed entries can have.
        sentence_dim: Width of the vectors of whole texts beside routed entries; 0 for none.

    Raises:
        ValueError: What does not fit.
    """
    values, offsets, indices = vectors.values, vectors.offsets, vectors.indices
    if values.dtype.kind != "f" or values.ndim != (1 if vectors.kind == "sparse" else 2):
        raise ValueError(f"values of shape {values.shape} and type {values.dtype}")
    if vectors.kind != "sparse" and values.shape[1] != vectors.dim:
        raise ValueError(f"values of width {values.shape[1]}, not {vectors.dim}")
    named = vectors.kind in ("sparse", "routed")  # a row is of a word, or of a key
    if (offsets is None) != (vectors.kind == "sentence") or (indices is None) == named:
        raise ValueError(f"offsets or indices are missing, or there without need, for {vectors.kind} vectors")
    if offsets is not None:
        if offsets.ndim != 1 or offsets.dtype.kind != "i" or not len(offsets):
            raise ValueError(f"offsets of shape {offsets.shape} and type {offsets.dtype}")
        if offsets[0] != 0 or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
            raise ValueError(f"offsets that do not rise from 0 to {len(values):,}")
    if indices is not None:
        if indices.shape != values.shape[:1] or indices.dtype.kind != "i":
            raise ValueError(f"indices of shape {indices.shape} and type {indices.dtype}")
        most = vectors.dim if vectors.kind == "sparse" else vocabulary
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < most:
            raise ValueError(f"a word or key outside the vocabulary of {most:,}")
    if (sentences := vectors.sentences) is not None or sentence_dim:
        shape, kind = ("no", "no") if sentences is None else (sentences.shape, sentences.dtype.kind)
        if shape != (len(vectors), sentence_dim) or kind != "f":
            raise ValueError(f"vectors of whole texts of shape {shape}, not {(len(vectors), sentence_dim)}")
    if (windows := vectors.windows) is not None:
        if windows.ndim != 1 or windows.dtype.kind != "i" or not len(windows) or vectors.kind in SIDE_BY_SIDE:
            raise ValueError(f"windows of shape {windows.shape} and type {windows.dtype} for {vectors.kind} vectors")
        if windows[0] != 0 or windows[-1] != len(vectors) or (np.diff(windows) < 1).any():
            raise ValueError(f"windows that do not rise from 0 to {len(vectors):,}")
    if texts is not None and vectors.documents != texts:
        raise ValueError(f"{vectors.documents} vectors of {len(values)} terms for {texts} ids")
