"""Exact search in memory, for vectors of every kind: the oracle, and enough for some ten thousand documents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from urllib.parse import SplitResult

import numpy as np

from ..encoding.embeddings import rows
from ..encoding.shards import KINDS, Origin, Shard
from ..errors import InputError
from .local import Vectors
from .protocol import (
    Added,
    Hit,
    Queries,
    by_document,
    checked_origin,
    refuse_unknown,
    stages,
    unique_ids,
    whole_number,
)
from .ranking import exact_search, rescore, tie_ranks


class ExactIndex:
    """Documents in memory, every one of which is scored; see :class:`polyrep.search.Index` for what it does.

    A search in two stages takes the best ``prefetch`` documents of the first, or ``k`` if that is more, and leaves out
    those without vectors for the second.

    Args:
        parts: ``memory:``.
        settings: ``prefetch``, 200 without it.
        force: Accept another model's fingerprint.

    Raises:
        InputError: The URI names a place, or a setting is unknown or out of range.
    """

    def __init__(self, parts: SplitResult, settings: dict[str, str], *, force: bool = False):
        self.where = parts.geturl()
        if parts.netloc or parts.path:
            raise InputError(f"{self.where}: nothing is kept on disk, so there is no path. Write memory:.")
        self.prefetch = whole_number(settings, "prefetch", 200, self.where)
        refuse_unknown(settings, self.where, "prefetch")
        self.force = force
        self.origins: dict[str, Origin] = {}
        self._vectors: dict[str, Vectors] = {}
        self._shards: set[tuple[str, str]] = set()
        self._ranks: dict[str, np.ndarray] = {}  # by name, as long as its documents stay the same

    def add(self, shards: Iterable[Shard]) -> Added:
        """See :class:`polyrep.search.Index`."""
        written = replaced = known = 0
        for shard in shards:
            origin = checked_origin(self.origins, shard.origin, self.where, kinds=KINDS, force=self.force)
            key = origin.name, shard.checksum
            if key in self._shards:
                known += 1
                continue
            self.origins[origin.name] = origin
            replaced += self._vectors.setdefault(origin.name, Vectors()).add(shard.ids, shard.vectors)
            self._ranks.pop(origin.name, None)
            written += len(shard.ids)
            if shard.checksum:
                self._shards.add(key)
        return Added(written, replaced, known)

    def search(self, queries: Queries | Mapping[str, Queries], k: int = 10) -> list[list[Hit]]:
        """See :class:`polyrep.search.Index`. Ties go to the higher id."""
        (origin, asked), *second = stages(self.origins, queries, k, self.where)
        store = self._vectors[origin.name]
        vectors = store.contiguous()
        if not len(asked) or not len(vectors):
            return [[] for _ in range(len(asked))]
        ranks, similarity = self._tie_ranks(origin), origin.similarity

        def nearest(depth: int) -> tuple[np.ndarray, np.ndarray]:
            return exact_search(asked, vectors, ranks, similarity=similarity, k=depth)

        if not second:
            by_window = origin.by_window
            return by_document(lambda depth: store.hits(*nearest(depth), by_window), min(k, self.count()), store.each)
        positions, _ = nearest(max(k, self.prefetch))
        ((origin, asked),) = second
        other = self._vectors[origin.name]
        vectors, ranks = other.contiguous(), self._tie_ranks(origin)
        found = []
        for row, candidates in enumerate(positions.tolist()):
            places = [other.position.get(store.ids[candidate], -1) for candidate in candidates]
            kept = np.array([[place for place in places if place >= 0]], np.int64)
            query = rows(asked, np.array([row]))
            best = rescore(query, vectors, kept, ranks, similarity=origin.similarity) if kept.size else (kept, kept)
            found += other.hits(best[0][:, :k], best[1][:, :k])
        return found

    def delete(self, ids: Iterable[str]) -> int:
        """See :class:`polyrep.search.Index`. Shards are forgotten, so that adding one again brings documents back."""
        asked = {*unique_ids(ids)}
        removed = asked & self._ids()
        for store in self._vectors.values():
            store.remove(removed)
        if removed:
            self._shards.clear()
            self._ranks.clear()
        return len(removed)

    def count(self) -> int:
        """See :class:`polyrep.search.Index`; a document with vectors of several kinds counts once."""
        return len(self._ids())

    def _ids(self) -> set[str]:
        return set().union(*(store.position for store in self._vectors.values()))

    def _tie_ranks(self, origin: Origin) -> np.ndarray:
        """Of the positions in their present order, which is that of contiguous vectors."""
        if origin.name not in self._ranks:
            self._ranks[origin.name] = tie_ranks(self._vectors[origin.name].ids)
        return self._ranks[origin.name]
