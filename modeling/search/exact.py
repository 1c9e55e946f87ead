"""Exact search in memory, for vectors of every kind: the oracle, and enough for some ten thousand documents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from urllib.parse import SplitResult

import numpy as np

from ..encoding.embeddings import Embeddings, rows, side_by_side
from ..encoding.nested import first_vectors
from ..encoding.shards import KINDS, Origin, Shard
from ..errors import InputError
from .budget import Stage, budgeted_stages, refuse_budget
from .local import Vectors
from .protocol import (
    CANDIDATES,
    Added,
    Asked,
    Hit,
    Queries,
    by_document,
    candidates_of,
    checked_origin,
    first_of_each,
    refuse_unfit_entries,
    refuse_unknown,
    refuse_unlike_groups,
    tell_without_candidates,
    unique_ids,
    weighted_stages,
    whole_number,
)
from .ranking import exact_search, rescore, tie_ranks
from .weighted import View, best_windows_of, find_candidates

PREFIXES = 2
"""How many prefixes of all documents are kept: what finds and what ranks, for the next queries at the same budget."""


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
        self._prefixes: dict[tuple[str, int], Embeddings] = {}  # likewise, the one used last at the end
        self._aligned: tuple[str, ...] = ()  # names whose documents are known to be in one order, and these
        self._documents: list[str] = []
        self._document_ranks = np.empty(0, np.int64)

    def add(self, shards: Iterable[Shard]) -> Added:
        """See :class:`polyrep.search.Index`."""
        written = replaced = known = 0
        for shard in shards:
            origin = checked_origin(
                self.origins, shard.origin, self.where, kinds=KINDS, force=self.force, beside_windows=True
            )
            key = origin.name, shard.checksum
            if key in self._shards:
                known += 1
                continue
            refuse_unlike_groups(shard)
            refuse_unfit_entries(shard.vectors, origin, f"{self.where}: document", shard.ids)
            self.origins[origin.name] = origin
            replaced += self._vectors.setdefault(origin.name, Vectors()).add(shard.ids, shard.vectors)
            self._ranks.pop(origin.name, None)
            self._prefixes.clear()
            self._aligned = ()
            written += len(shard.ids)
            if shard.checksum:
                self._shards.add(key)
        return Added(written, replaced, known)

    def search(
        self,
        queries: Queries | Mapping[str, Queries],
        k: int = 10,
        *,
        weights: Mapping[str, float] | None = None,
        candidates: int | None = None,
        budget: Asked = None,
        first: Asked = None,
    ) -> list[list[Hit]]:
        """See :class:`polyrep.search.Index`. Ties go to the higher id."""
        if weights is not None:
            refuse_budget(budget, first, self.where, "a weighted sum is of all vectors. Leave one of the two out.")
            summed = weighted_stages(self.origins, queries, k, self.where, weights)
            return self._weighted(summed, k, candidates_of(candidates, CANDIDATES, self.where))
        finds, *ranks = budgeted_stages(self.origins, queries, k, self.where, budget, first)
        found = self._nearest(finds, max(k, candidates_of(candidates, self.prefetch, self.where)) if ranks else k)
        return self._ranked_anew(ranks[0], found, k) if ranks else found

    def _nearest(self, stage: Stage, k: int) -> list[list[Hit]]:
        """The best ``k`` documents of each query under one name."""
        origin, asked, _ = stage
        store, vectors = self._vectors[origin.name], self._prefix(origin.name, stage.documents)
        if not len(asked) or not len(vectors):
            return [[] for _ in range(len(asked))]
        ranks = self._tie_ranks(origin)

        def nearest(depth: int) -> list[list[Hit]]:
            found = exact_search(asked, vectors, ranks, similarity=origin.similarity, k=depth)
            return store.hits(*found, origin.by_window)

        return by_document(nearest, min(k, self.count()), store.each)

    def _prefix(self, name: str, count: int | None) -> Embeddings:
        """The first vectors of every document under a name; None for all."""
        vectors = self._vectors[name].contiguous()
        if count is None:
            return vectors
        kept = self._prefixes.pop((name, count), None)
        self._prefixes[name, count] = first_vectors(vectors, count) if kept is None else kept
        if len(self._prefixes) > PREFIXES:
            del self._prefixes[next(iter(self._prefixes))]
        return self._prefixes[name, count]

    def _ranked_anew(self, stage: Stage, first: list[list[Hit]], k: int) -> list[list[Hit]]:
        """The best ``k`` of the documents that a first stage found for each query, by their vectors under a name."""
        origin, asked, count = stage
        store = self._vectors[origin.name]
        vectors = store.contiguous()
        ranks, found = self._tie_ranks(origin), []
        for row, hits in enumerate(first):
            kept = np.array([place for hit in hits for place in store.places(hit.id)], np.int64)
            query, chosen = rows(asked, np.array([row])), rows(vectors, kept)  # what is not a candidate is not read
            chosen = chosen if count is None else first_vectors(chosen, count)
            places = scores = np.arange(len(kept))[None]
            if kept.size:
                places, scores = rescore(query, chosen, places, ranks[kept], similarity=origin.similarity)
            found += [first_of_each(several)[:k] for several in store.hits(kept[places], scores, origin.by_window)]
        return found

    def _weighted(
        self, asked_for: Sequence[tuple[Origin, Embeddings, float]], k: int, candidates: int
    ) -> list[list[Hit]]:
        names = [origin.name for origin, _, _ in asked_for]
        self._align(names)
        views = [View(asked, self._side(origin.name), origin.similarity) for origin, asked, _ in asked_for]
        ids, ranks = self._documents, self._document_ranks
        found = find_candidates(views, ranks, count=max(k, candidates))
        tell_without_candidates(found.not_by_first, len(found.positions), names, self.where)
        best = found.best([weight for _, _, weight in asked_for], ranks, k)
        # Where windows of one name alone count, a sum is that of one of them; of several, each name has its own best.
        cut = [view for view, (o, _, weight) in zip(views, asked_for, strict=True) if o.by_window and weight]
        hits = []
        for row, (places, scores) in enumerate(best):
            which: Sequence[int | None] = [None] * len(places)
            if len(cut) == 1:
                which = best_windows_of(cut[0], row, places)
            said = zip(places.tolist(), scores.tolist(), which, strict=True)
            hits.append([Hit(ids[place], score, window=window) for place, score, window in said])
        return hits

    def _align(self, names: Sequence[str]) -> None:
        """Put documents under several names into the order of the first.

        Raises:
            InputError: Some have no vectors under one of the names.
        """
        if {*names} <= {*self._aligned}:
            return
        sides = [self._side(name) for name in names]  # which leaves no gaps among ids
        documents = [dict.fromkeys(self._vectors[name].ids) for name in names]
        for name, theirs in zip(names, documents, strict=True):
            for other, those in zip(names, documents, strict=True):
                if lacking := theirs.keys() - those.keys():
                    raise InputError(
                        f"{self.where}: {len(lacking):,} documents, e.g. {min(lacking)!r:.80}, have vectors {name!r} "
                        f"and no {other!r}, so their sums would lack a part. Add these to the index, or delete them."
                    )
        for name, vectors, theirs in zip(names, sides, documents, strict=True):
            if list(theirs) == list(documents[0]):
                continue
            place = {identifier: number for number, identifier in enumerate(theirs)}
            order, bounds = np.array([place[identifier] for identifier in documents[0]]), None
            if vectors.windows is not None:
                order, bounds = side_by_side(vectors.windows, order)
            store = self._vectors[name] = Vectors()
            store.add(list(documents[0]), replace(rows(vectors, order), windows=bounds))
            self._ranks.pop(name, None)
            self._prefixes.clear()
        self._aligned, self._documents = tuple(names), list(documents[0])
        self._document_ranks = tie_ranks(self._documents)

    def _side(self, name: str) -> Embeddings:
        """Vectors of all documents under a name, in the order of their ids."""
        store = self._vectors[name]
        vectors = store.contiguous()
        return replace(vectors, windows=store.bounds())

    def delete(self, ids: Iterable[str]) -> int:
        """See :class:`polyrep.search.Index`. Shards are forgotten, so that adding one again brings documents back."""
        asked = {*unique_ids(ids)}
        removed = asked & self._ids()
        for store in self._vectors.values():
            store.remove(removed)
        if removed:
            self._shards.clear()
            self._ranks.clear()
            self._prefixes.clear()
            self._aligned = ()
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
