"""Look at a file of FAISS before FAISS does, which follows whatever it holds: a wrong number ends the process."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np

_KINDS = {"flat": b"IxFI", "hnsw": b"IHNf"}
_INNER_PRODUCT = 0


def check_faiss_file(path: Path, kind: str, dim: int, count: int) -> None:
    """Refuse what is not an index of inner products of ``count`` vectors.

    Args:
        path: The file.
        kind: ``flat`` or ``hnsw``.
        dim: Width of a vector.
        count: How many there should be.

    Raises:
        ValueError: What is wrong.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        _header(file, kind, dim, count)
        if kind == "hnsw":
            _graph(file, size, count)
            _header(file, "flat", dim, count)
        if _number(file, "<u8") != dim * count or file.tell() + 4 * dim * count != size:
            raise ValueError(f"{size:,} bytes are not those of {count} vectors of width {dim}")


def _header(file: BinaryIO, kind: str, dim: int, count: int) -> None:
    """Code, width, number of vectors, two unused numbers, whether it is trained, and what it compares by."""
    if file.read(4) != _KINDS.get(kind):
        raise ValueError(f"not a {kind} index of FAISS")
    found = _number(file, "<i4"), _number(file, "<i8")
    file.read(16)
    if found != (dim, count) or (_number(file, "u1"), _number(file, "<i4")) != (1, _INNER_PRODUCT):
        raise ValueError(f"{found[1]} vectors of width {found[0]} for {count} ids and width {dim}")


def _graph(file: BinaryIO, size: int, count: int) -> None:
    """The links: of every vector, level by level, room for so many neighbours, -1 where there is none."""
    _vector(file, size, "<f8")
    room = _vector(file, size, "<i4")  # of all levels up to each one
    levels, starts = _vector(file, size, "<i4"), _vector(file, size, "<u8")
    neighbours = _vector(file, size, "<i4")
    entry, highest = _number(file, "<i4"), _number(file, "<i4")
    file.read(12)  # settings that every search and every build sets anew
    if len(levels) != count or not len(room):
        raise ValueError(f"levels of {len(levels)} vectors for {count} ids")
    if not count:  # all were deleted
        if entry != -1 or highest != -1 or len(neighbours) or starts.tolist() != [0]:
            raise ValueError("links without a vector")
        return
    rising = room[0] == 0 and (np.diff(room) >= 0).all()
    if not rising or levels.min() < 1 or levels.max() >= len(room) or highest != levels.max() - 1:
        raise ValueError("levels that a graph cannot have")
    ends = np.concatenate([[0], np.cumsum(room[levels], dtype=np.int64)])
    if len(starts) != count + 1 or (starts != ends).any() or ends[-1] != len(neighbours):
        raise ValueError("links that begin elsewhere")
    if not 0 <= entry < count or levels[entry] != levels.max() or not _within(neighbours, count):
        raise ValueError("links that lead to no vector")
    for level in range(1, int(levels.max())):
        (there,) = np.nonzero(levels > level)
        links = neighbours[ends[there][:, None] + np.arange(room[level], room[level + 1])]
        if (levels[links[links >= 0]] <= level).any():
            raise ValueError("links that lead to a lower level")


def _within(neighbours: np.ndarray, count: int) -> bool:
    return not len(neighbours) or bool(-1 <= neighbours.min() and neighbours.max() < count)


def _number(file: BinaryIO, dtype: str) -> int:
    found = np.frombuffer(file.read(np.dtype(dtype).itemsize), dtype)
    if not len(found):
        raise ValueError("the file ends too early")
    return int(found[0])


def _vector(file: BinaryIO, size: int, dtype: str) -> np.ndarray:
    count, width = _number(file, "<u8"), np.dtype(dtype).itemsize
    if count * width > size - file.tell():
        raise ValueError(f"{count:,} numbers in a file of {size:,} bytes")
    return np.frombuffer(file.read(count * width), dtype)
