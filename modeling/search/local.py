"""What the back ends in this process share: ids and positions, vectors in memory, and folders that survive a kill.

::

    PATH/polyrep.json        format, origins, settings, known shards, and which generation counts
    PATH/00000007/*.bin      ids and other arrays of that generation, as they lie in memory
    PATH/00000007/...        files of the engine

Each change writes a new generation and then replaces ``polyrep.json``, so whatever stops it leaves the old index or
the new one. One process may change an index at a time; others that have it open go on with what they read.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from urllib.parse import SplitResult, unquote_to_bytes

import numpy as np
from filelock import FileLock

from ..encoding.arrays import mapped_arrays, plain_name
from ..encoding.embeddings import Embeddings, Kind, joined, rows
from ..encoding.shards import Origin, Shard, origin_of, packed_ids, unpacked_ids
from ..errors import InputError
from ..files import file_sha256, known_sha256, refuse_unwritable, write_json
from .budget import refuse_budget
from .protocol import Added, Asked, Hit, Queries, checked_origin, stages, unique_ids

FORMAT = "polyrep-index-1"
MANIFEST = "polyrep.json"
ON_WINDOWS = os.name == "nt"


REMEDIES = {
    "seismic": "Its package has a wheel for Python 3.11 on Linux x86-64 with glibc 2.34: there run "
    '`pip install "polyrep[seismic]"`. Elsewhere `pip install pyseismic-lsr` compiles it, for which it wants Rust.'
}
"""How to get what the extra ``search`` does not bring."""


def package(name: str) -> Any:
    """An engine's package.

    Raises:
        InputError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        remedy = REMEDIES.get(name, 'Run `pip install "polyrep[search]"`.')
        raise InputError(f"{name}: not installed, so this back end cannot work. {remedy}") from None


def folder_of(parts: SplitResult) -> Path:
    """Folder that a URI names: ``scheme:///absolute/path`` or ``scheme:relative/path``; ``%20`` stands for a space.

    On Windows ``scheme:///C:/path`` names a drive.

    Raises:
        InputError: It names none, or something after two slashes or ``#``, which would be no part of the path.
    """
    if not parts.path.strip("/") or parts.netloc or parts.fragment:
        raise InputError(
            f"{parts.geturl()}: names no folder. Write {parts.scheme}:///absolute/path, with three slashes, or "
            f"{parts.scheme}:relative/path; %23 stands for # and %3F for ?."
        )
    path = os.fsdecode(unquote_to_bytes(os.fsencode(parts.path)))
    return Path(path[1:] if ON_WINDOWS and re.match("/[A-Za-z]:", path) else path)


class Documents:
    """Ids of documents and their positions in an engine. A document that is replaced or removed leaves its own unused.

    A document that is cut into windows has a position for each, side by side.

    Attributes:
        ids: ``(positions,)`` ids, also of positions that are unused.
        position: Id -> the position that counts, of windows the first.
        windows: Id -> how many positions the document has, of those with more than one.
    """

    def __init__(self, ids: Sequence[str] = ()):
        self.ids = list(ids)
        self.position = dict(zip(self.ids, range(len(self.ids)), strict=True))
        self.windows: dict[str, int] = {}

    def restore(self, live: np.ndarray) -> None:
        """Let these positions count, ``(positions,)`` in order, and no others.

        Raises:
            ValueError: Those of a document are not side by side.
        """
        places = live.tolist()
        names = [self.ids[place] for place in places]
        self.windows = {name: count for name, count in Counter(names).items() if count > 1}
        last = dict(zip(names, places, strict=True))
        self.position = dict(zip(reversed(names), reversed(places), strict=True))  # the first, as the last to be set
        for name, count in self.windows.items():
            if last[name] - self.position[name] + 1 != count:
                raise ValueError(f"windows of {name!r:.80} that are not side by side")

    def append(self, ids: Sequence[str], bounds: np.ndarray | None = None) -> int:
        """Give the next positions to ``ids``; returns how many took the place of another document.

        ``bounds (ids + 1,)`` are those of their windows; None where each has one position.
        """
        before, start = len(self.position), len(self.ids)
        counts = np.ones(len(ids), np.int64) if bounds is None else np.diff(bounds)
        starts = start + np.cumsum(counts) - counts
        self.ids.extend(ids if bounds is None else np.repeat(np.array(ids, object), counts))
        self.position.update(zip(ids, starts.tolist(), strict=True))
        for name, count in zip(ids, counts.tolist(), strict=True) if bounds is not None or self.windows else ():
            self.windows.pop(name, None)
            if count > 1:
                self.windows[name] = count
        return len(ids) - (len(self.position) - before)

    def remove(self, ids: Iterable[str]) -> int:
        """Remove documents; returns how many there were."""
        found = [identifier for identifier in ids if self.position.pop(identifier, None) is not None]
        for identifier in found:
            self.windows.pop(identifier, None)
        return len(found)

    @property
    def used(self) -> int:
        """Positions that count."""
        return len(self.position) + sum(self.windows.values()) - len(self.windows)

    @property
    def unused(self) -> int:
        """Positions that do not count any more."""
        return len(self.ids) - self.used

    def bounds(self) -> np.ndarray | None:
        """``(documents + 1,)`` where each document's windows start and end, without gaps; None if none has several."""
        if not self.windows:
            return None
        counts = (self.windows.get(name, 1) for name in sorted(self.position, key=self.position.__getitem__))
        return np.cumsum([0, *counts], dtype=np.int64)

    def live(self) -> np.ndarray:
        """Positions that count, in order."""
        starts = np.sort(np.fromiter(self.position.values(), np.int64, len(self.position)))
        if (bounds := self.bounds()) is None:
            return starts
        return np.repeat(starts - bounds[:-1], np.diff(bounds)) + np.arange(bounds[-1])

    def compact(self) -> np.ndarray:
        """Give the documents new positions without gaps; returns their old ones."""
        live = self.live()
        self.ids = [self.ids[position] for position in live.tolist()]
        self.restore(np.arange(len(self.ids)))
        return live

    def places(self, name: str) -> range:
        """Positions of a document, none if it is not there."""
        start = self.position.get(name)
        return range(0) if start is None else range(start, start + self.windows.get(name, 1))

    @property
    def each(self) -> int:
        """Positions of a document on average, rounded up."""
        return -(-self.used // max(1, len(self.position)))

    def hits(self, positions: np.ndarray, scores: np.ndarray, by_window: bool = False) -> list[list[Hit]]:
        """What was found, from ``(queries, k)`` positions, -1 where there is nothing, and scores.

        With ``by_window`` positions are those of windows, and hits say which.
        """

        def hit(place: int, score: float) -> Hit:
            name = self.ids[place]
            return Hit(name, score, window=place - self.position[name] if by_window else None)

        return [
            [hit(place, score) for place, score in zip(*row, strict=True) if place >= 0]
            for row in zip(positions.tolist(), scores.tolist(), strict=True)
        ]


class Vectors(Documents):
    """Documents with their vectors, kept in the blocks that they came in until they are needed side by side."""

    def __init__(self, ids: Sequence[str] = (), vectors: Embeddings | None = None):
        super().__init__(ids)
        self.blocks = [] if vectors is None else [vectors]

    def add(self, ids: Sequence[str], vectors: Embeddings) -> int:
        """Add documents; returns how many took the place of another."""
        self.blocks.append(replace(vectors, windows=None))
        return self.append(ids, vectors.windows)

    def contiguous(self) -> Embeddings:
        """Vectors of all positions in the order of ``ids``, which have no gaps then; something was added before."""
        vectors = joined(self.blocks)
        if self.unused:
            vectors = rows(vectors, self.compact())
        self.blocks = [vectors]
        return vectors


class InParts(NamedTuple):
    """An array that is written without ever being whole in memory.

    Attributes:
        dtype: Of the numbers.
        shape: Of the whole.
        parts: Its rows, some at a time, made as they are asked for.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    parts: Iterator[np.ndarray]


class FolderIndex(ABC):
    """An index with one kind of vectors in a folder; see :class:`polyrep.search.Index` for what it does."""

    backend: ClassVar[str]
    kind: ClassVar[Kind]
    similarities: ClassVar[tuple[str, ...]]
    """Which it can compute."""

    elsewhere: ClassVar[str] = "memory: or qdrant:"
    """What holds vectors of this kind beside others."""

    unit: ClassVar[str] = "one vector a document"
    """What is held, of which there is no prefix."""

    documents: Documents
    settings: dict[str, Any]
    """What the index was built with; set by the subclass from the URI and from ``stored``."""

    def __init__(self, parts: SplitResult, *, force: bool):
        self.path = folder_of(parts)
        self.where = parts.geturl()
        self.force = force
        self._load()

    @abstractmethod
    def _open(self, folder: Path | None, ids: list[str], arrays: dict[str, np.ndarray]) -> None:
        """Set ``documents`` from all ``ids`` and take what a generation holds; without a folder, begin with none."""

    @abstractmethod
    def _append(self, shard: Shard) -> int:
        """Add documents in memory; returns how many replaced another."""

    @abstractmethod
    def _write(self, folder: Path) -> Mapping[str, np.ndarray | InParts]:
        """Write the engine's files; returns arrays to be written beside them, and given to ``_open`` later."""

    def count(self) -> int:
        """See :class:`polyrep.search.Index`."""
        return len(self.documents.position)

    @property
    def _by_window(self) -> bool:
        return any(origin.by_window for origin in self.origins.values())

    def add(self, shards: Iterable[Shard]) -> Added:
        """See :class:`polyrep.search.Index`; all shards are added, or after an error none."""
        refuse_unwritable(self.path)
        written = replaced = known = 0
        changed = False
        try:
            for shard in shards:
                origin = self._checked_origin(shard.origin)
                if shard.checksum in self.shards:
                    known += 1
                    continue
                changed = True
                self.origins[origin.name] = origin
                replaced += self._append(shard)
                written += len(shard.ids)
                self.shards |= {shard.checksum} - {""}
            if changed:
                self._save()
        except BaseException:
            if changed:
                self._load()
            raise
        return Added(written, replaced, known)

    def delete(self, ids: Iterable[str]) -> int:
        """See :class:`polyrep.search.Index`. Shards are forgotten, so that adding one again brings documents back."""
        removed = self.documents.remove(unique_ids(ids))
        if removed:
            self.shards.clear()
            try:
                self._save()
            except BaseException:
                self._load()
                raise
        return removed

    def _checked_origin(self, origin: Origin) -> Origin:
        known = checked_origin(self.origins, origin, self.where, kinds=[self.kind], force=self.force)
        if origin.similarity not in self.similarities:
            raise InputError(
                f"{self.where}: vectors {origin.name!r} are compared by {origin.similarity}; this back end knows "
                f"{' and '.join(self.similarities)}. Use {self.elsewhere}."
            )
        if self.origins.keys() - {origin.name}:
            raise InputError(
                f"{self.where}: holds vectors {', '.join(self.origins)} and has no place for {origin.name!r} beside "
                f"them. Use an index of their own, or one of {self._several}."
            )
        return known

    def _query_vectors(
        self,
        queries: Queries | Mapping[str, Queries],
        k: int,
        weights: Mapping[str, float] | None,
        budget: Asked,
        first: Asked,
    ) -> Embeddings:
        """Queries of the one stage that there can be."""
        refuse_budget(
            budget,
            first,
            self.where,
            f"it holds {self.unit}, of which there is no prefix. Use memory: or qdrant:, which hold several.",
        )
        if weights is not None:
            raise InputError(
                f"{self.where}: weights={dict(weights)}, but it holds one kind of vectors, so there is no sum. Use "
                f"{self._several}."
            )
        if isinstance(queries, Mapping) and len(queries) > 1:
            raise InputError(
                f"{self.where}: asked for {', '.join(queries)}, but it holds one kind of vectors, so there is no "
                f"second stage. Use {self.elsewhere}."
            )
        ((_, asked),) = stages(self.origins, queries, k, self.where)
        return asked

    def _load(self) -> None:
        """Read what is in the folder, which may be nothing."""
        self.origins: dict[str, Origin] = {}
        self.shards: set[str] = set()
        self.stored: dict[str, Any] = {}
        manifest = self._manifest()
        self.generation: int = manifest.get("generation", 0)
        if not self.generation:
            self._open(None, [], {})
            return
        folder = self.path / f"{self.generation:08d}"
        try:
            self._check_files(folder, manifest)
            arrays = mapped_arrays(folder, manifest["arrays"], self._remedy)
            live = arrays.pop("live")
            ids = unpacked_ids({name: arrays.pop(name) for name in ("ids", "id_offsets")})
            if len(live) and (live[0] < 0 or live[-1] >= len(ids) or (np.diff(live) <= 0).any()):
                raise ValueError("positions that no document has")
            self.origins = {
                name: origin_of(origin, self.path / MANIFEST) for name, origin in manifest["origins"].items()
            }
            ((name, origin),) = self.origins.items()
            if (name, self.kind) != (origin.name, origin.kind) or origin.similarity not in self.similarities:
                raise ValueError(f"{origin.kind} vectors {name!r} of {origin.name!r} compared by {origin.similarity}")
            self.shards, self.stored = set(manifest["shards"]), dict(manifest["settings"])
            self._open(folder, ids, arrays)
            self.documents.restore(live)
            if self.documents.windows and not origin.by_window:
                raise ValueError("several positions of a document that is not cut into windows")
        except InputError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise InputError(f"{folder}: cannot be read ({error!r}). {self._remedy}") from None

    def _check_files(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Refuse files that are not those that were written; of arrays the size is compared alone."""
        digests = manifest.get("sha256", {})  # which older indexes lack
        for name, size in manifest["files"].items():
            if not plain_name(name):
                raise ValueError(f"a file called {name!r}")
            file = folder / name
            found = file.stat().st_size if file.is_file() else -1
            if found != size:
                state = f"has {found:,} bytes" if found >= 0 else "is missing"
                raise InputError(f"{file}: {state}, expected {size:,}. {self._remedy}")
            if name in digests and known_sha256(file) != digests[name]:
                raise InputError(f"{file}: its SHA-256 is not the one that was written. {self._remedy}")
        if lacking := {f"{name}.bin" for name in manifest["arrays"]} - manifest["files"].keys():
            raise ValueError(f"arrays without a file: {', '.join(lacking)}")

    def _save(self) -> None:
        """Write a new generation, and then let it count; one process at a time."""
        self.path.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path / ".lock"):
            self._save_locked()

    def _save_locked(self) -> None:
        found = self._manifest().get("generation", 0)
        if found != self.generation:
            raise InputError(
                f"{self.path}: changed by another process since it was opened (generation {found}, not "
                f"{self.generation}), whose documents would be lost. Open the index again."
            )
        marker = {"format": FORMAT, "backend": self.backend}
        if not self.generation:  # from now on the folder is known as an index, even if the first generation stays half
            write_json(self.path / MANIFEST, marker | {"generation": 0})
        folder = self.path / f"{self.generation + 1:08d}"
        shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed before it counted
        folder.mkdir()
        arrays: dict[str, np.ndarray | InParts] = {**self._write(folder), **packed_ids(self.documents.ids)}
        engine = {file.name: file_sha256(file) for file in folder.iterdir()}  # an engine believes what its files say
        arrays["live"] = self.documents.live()
        for name, array in arrays.items():
            with (folder / f"{name}.bin").open("wb") as file:
                for part in array.parts if isinstance(array, InParts) else [array]:
                    # Not tofile, which drops the last bytes without an error when the disk is full.
                    file.write(np.ascontiguousarray(part).data)
        content = marker | {
            "generation": self.generation + 1,
            "documents": self.count(),
            "origins": {name: origin.described() for name, origin in self.origins.items()},
            "settings": self.settings,
            "sha256": engine,
            "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
            "arrays": {name: [array.dtype.str, list(array.shape)] for name, array in arrays.items()},
            "shards": sorted(self.shards),
        }
        write_json(self.path / MANIFEST, content)
        self.generation += 1
        for other in self.path.glob("[0-9]" * 8):  # the former one, and what a process that was killed did not remove
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)

    def _manifest(self) -> dict[str, Any]:
        """Content of ``polyrep.json``, ``{}`` where there is no index yet."""
        path = self.path / MANIFEST
        if not path.is_file():
            if self.path.exists() and (not self.path.is_dir() or any(p.name[0] != "." for p in self.path.iterdir())):
                raise InputError(
                    f"{path}: missing, but {self.path} holds something, so it is no index, or a damaged one. "
                    "Name another folder, or delete this one."
                )
            return {}
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            kept, generation = (manifest.get("format"), manifest.get("backend")), manifest.get("generation")
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise InputError(f"{path}: cannot be read ({error}). {self._remedy}") from None
        if kept != (FORMAT, self.backend):
            raise InputError(
                f"{path}: of format {kept[0]} for {kept[1]}, not {FORMAT} for {self.backend}. Open it by its own "
                "back end, or name another folder."
            )
        if type(generation) is not int or generation < 0:
            raise InputError(f"{path}: its generation is {generation!r:.80}, not a number from 0 on. {self._remedy}")
        return manifest

    @property
    def _several(self) -> str:
        return f"{self.elsewhere}, which {'hold' if ' or ' in self.elsewhere else 'holds'} several"

    @property
    def _remedy(self) -> str:
        return f"The index is damaged: delete {self.path} and add the shards again."
