"""Qdrant, embedded or as a server: one index, over two engines.

A document is a point: its number is made from its id, the id lies in the payload, and each corpus added under another
name is one more named vector of the same points. A document that is cut into windows is a point for each, numbered
from 0 on without a gap; those from 1 on say in their payload which they are. Sparse vectors have an exact inverted
index, single vectors HNSW from Qdrant's threshold on, and several vectors none: they rank candidates anew, or are
scanned.

Of nested vectors the first of each document is a single vector beside all of them, so that it finds what they rank;
``prefixes=4,8`` stores more of these, as several vectors, each of which can be searched and can rank.

What the index knows of itself lies with it, in flat keys, so that a dropped collection forgets its uploads too::

    polyrep                      version of this layout
    polyrep/layout               settings that a collection is made with
    polyrep/origin/NAME          origin of the vectors NAME
    polyrep/prefixes/NAME        numbers of first vectors that are stored beside them
    polyrep/shard/NAME/SHA-256   true once every document of that shard is written

Several readers of a server do no harm; let one process at a time write.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult

import numpy as np

from ..encoding.embeddings import Embeddings, Kind, rows
from ..encoding.nested import first_vectors
from ..encoding.shards import Origin, Shard, origin_of
from ..errors import InputError
from .budget import BudgetError, Stage, budgeted_stages, refuse_budget
from .local import folder_of
from .protocol import (
    CANDIDATES,
    Added,
    Asked,
    Hit,
    Queries,
    by_document,
    candidates_of,
    checked_origin,
    refuse_unknown,
    refuse_unlike_groups,
    tell_without_candidates,
    unique_ids,
    weighted_stages,
    whole_number,
)
from .qdrant_engine import SIMILARITIES, Embedded, Engine, Request
from .qdrant_remote import Server, Unreachable
from .ranking import sparse_rows
from .scoring import EMPTY_DOCUMENT_SCORE

VERSION, LAYOUT, ORIGIN, SHARD = "polyrep", "polyrep/layout", "polyrep/origin/", "polyrep/shard/"
PREFIXES = "polyrep/prefixes/"
NAMESPACE = uuid.UUID("5f1c6a1e-6d3c-5d0e-9a57-0c2b8f6f7a11")
"""Under it a document's id becomes the UUID of its point; Qdrant takes no strings."""

POINTS = 256
"""Documents in a request at most, as Qdrant's manual advises."""

BYTES = 8 * 2**20
"""Size of a request at most, unless one document is larger; a server takes 32 MiB."""

NUMBER = 20
"""Bytes of a number in JSON: a float16 or float32 has that many digits once it is a double."""

QUERIES = 64
"""Queries in a request."""

WINDOWS = 4
"""How many points are asked for at first for each document, where documents are cut into windows."""


def open_embedded(parts: SplitResult, settings: dict[str, str], *, force: bool = False) -> QdrantIndex:
    """Open ``qdrant:///PATH?prefetch=&quantization=&on_disk=&prefixes=``; see :func:`polyrep.search.open_index`.

    Raises:
        InputError: A setting is unknown or contradicts the index; the folder is in use, damaged, or something else.
    """
    prefetch, layout = _read_settings(settings, parts.geturl(), ())
    return QdrantIndex(Embedded(folder_of(parts)), prefetch, layout, force)


def open_server(parts: SplitResult, settings: dict[str, str], *, force: bool = False) -> QdrantIndex:
    """Open ``qdrant+http(s)://HOST:PORT/COLLECTION?shards=&replicas=&prefetch=&quantization=&on_disk=&prefixes=``.

    The API key is read from the environment variable ``QDRANT_API_KEY``.

    Raises:
        InputError: A setting is unknown or contradicts the collection, the server does not answer or refuses the key,
            or the collection was made by something else.
    """
    uri, name = parts.geturl(), parts.path.strip("/")
    if not parts.hostname or not name or "/" in name:
        raise InputError(f"{uri}: names no collection of a server. Write qdrant+http://host:6333/collection.")
    prefetch, layout = _read_settings(settings, uri, ("shards", "replicas"))
    return QdrantIndex(Server(parts.scheme.removeprefix("qdrant+"), parts.netloc, name), prefetch, layout, force)


def _read_settings(settings: dict[str, str], uri: str, counts: tuple[str, ...]) -> tuple[int, dict[str, Any]]:
    """Candidates of a first stage, and what a collection is made with as far as the URI says it."""
    prefetch = whole_number(settings, "prefetch", 200, uri)
    layout: dict[str, Any] = {name: whole_number(settings, name, 1, uri) for name in counts if name in settings}
    for name, choices in {"quantization": ("none", "int8", "binary"), "on_disk": ("false", "true")}.items():
        if name in settings:
            layout[name] = settings.pop(name)
            if layout[name] not in choices:
                raise InputError(f"{uri}: {name}={layout[name]}: expected {' or '.join(choices)}.")
    if (said := settings.pop("prefixes", None)) is not None:
        numbers = [int(part) if re.fullmatch("[0-9]+", part) else 0 for part in said.split(",")]
        if min(numbers) < 1:
            raise InputError(f"{uri}: prefixes={said}: expected numbers of first vectors, e.g. prefixes=4,8.")
        layout["prefixes"] = sorted({*numbers})
    refuse_unknown(settings, uri, ", ".join(("prefetch", "quantization", "on_disk", "prefixes", *counts)))
    return prefetch, layout


class QdrantIndex:
    """Documents in Qdrant; see :class:`polyrep.search.Index`.

    Deleted documents come back when their shard is added again. A document without any vector or term is counted but
    never found, and a sparse search finds only documents that share a term with the query.

    Args:
        engine: What holds the points.
        prefetch: Candidates that the first of two stages finds.
        layout: Settings for a collection that is not there yet; of one that is there, what it must have.
        force: Accept another model's fingerprint.
    """

    def __init__(self, engine: Engine, prefetch: int, layout: dict[str, Any], force: bool):
        self.engine, self.where, self.prefetch, self.force = engine, engine.where, prefetch, force
        self.records = engine.open()
        self._counts: dict[str, int] = {}  # points with a vector of a name, until this process changes them
        self.layout: dict[str, Any] = self.records.get(LAYOUT, layout)
        prefixes = self.layout.get("prefixes", []) if isinstance(self.layout, dict) else None
        if not isinstance(prefixes, list) or not all(type(count) is int for count in prefixes):
            raise InputError(f"{self.where}: its layout is {self.layout!r:.80}, so the index is damaged. Delete it.")
        if self.records.get(VERSION, 1) != 1:
            raise InputError(f"{self.where}: of format {self.records[VERSION]}, not 1. Use the polyrep that wrote it.")
        defaults = {"quantization": "none", "on_disk": "false"}
        for name, value in layout.items():
            if (made := self.layout.get(name, defaults.get(name))) != value:
                raise InputError(
                    f"{self.where}: made with {name}={made or 'the default'}, which {name}={value} cannot change. "
                    "Leave the setting out, or start a new index."
                )
        where = Path(self.where)
        self.origins = {k[len(ORIGIN) :]: origin_of(v, where) for k, v in self.records.items() if k.startswith(ORIGIN)}
        for name, origin in self.origins.items():
            if name != origin.name or origin.similarity not in SIMILARITIES[origin.kind]:
                raise InputError(
                    f"{self.where}: its vectors {name!r} are called {origin.name!r} and compared by "
                    f"{origin.similarity!r:.40}, so the index is damaged. Delete it and add its corpora again."
                )
        self._prefixes = {origin.name: self._stored_prefixes(origin) for origin in self.origins.values()}

    def add(self, shards: Iterable[Shard]) -> Added:
        """Write documents; see :class:`polyrep.search.Index`.

        Raises:
            InputError: The vectors do not belong here, or the server stayed away; then running it again goes on.
        """
        added = Added()
        self._counts.clear()
        try:
            for shard in shards:
                added = self._add(shard, added)
            if self.origins:
                self.engine.finish()
        except Unreachable as error:
            raise InputError(
                f"{error} {added.documents:,} documents were written in whole shards by this run. Run it again once "
                "the server is back: it goes on with the shard that was being written."
            ) from None
        return added

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
        """The best ``k`` documents of each query; two stages and a weighted sum are one request to the engine.

        Only queries without candidates, see :class:`polyrep.search.Index`, are asked again.

        Raises:
            InputError: The index is empty, the queries or weights do not fit, or documents lack vectors.
            BudgetError: No such prefix is stored.
        """
        if weights is not None:
            refuse_budget(budget, first, self.where, "a weighted sum is of all vectors. Leave one of the two out.")
            summed = weighted_stages(self.origins, queries, k, self.where, weights)
            count = candidates_of(candidates, CANDIDATES, self.where)
            if not self._windowed:
                return self._weighted(summed, k, max(k, count))
            ((_, _, weight),) = summed  # since there are no vectors of another name beside windows
            return [[hit._replace(score=weight * hit.score) for hit in hits] for hits in self.search(queries, k)]
        asked_for = budgeted_stages(self.origins, queries, k, self.where, budget, first)
        stored = [self._stored(stage) for stage in asked_for]
        prefetch = candidates_of(candidates, self.prefetch, self.where)
        # How many points a document has is not asked for, since counting reads every point.
        each = WINDOWS if self._windowed else 1
        return by_document(lambda depth: self._nearest(asked_for, stored, depth, max(depth, prefetch)), k, each)

    def _weighted(
        self, asked_for: Sequence[tuple[Origin, Embeddings, float]], k: int, candidates: int
    ) -> list[list[Hit]]:
        """The best ``k`` documents by the weighted sum of their scores."""
        names, total = [origin.name for origin, _, _ in asked_for], len(asked_for[0][1])
        if self._counts.get("", 0) <= candidates:  # all are candidates, unless another process has added some
            self._counts.clear()
        documents = self._checked_points(names)
        whole, candidates = candidates >= documents, max(1, min(candidates, documents))
        sides = [self._vectors(asked, 0, total, origin.similarity) for origin, asked, _ in asked_for]
        hits: list[list[Hit]] = [[] for _ in range(total)]
        waiting = list(range(total))
        for start in range(len(names)):  # which name finds the candidates of those that have none
            order = [*range(start, len(names)), *range(start)]
            first = sides[start]
            asked = [row for row in waiting if first[row] is not None]
            for batch in (asked[at : at + QUERIES] for at in range(0, len(asked), QUERIES)):
                vectors = [tuple(sides[place][row] for place in order) for row in batch]
                views = [asked_for[place] for place in order]
                request = Request(
                    [names[place] for place in order],
                    vectors,
                    k,
                    candidates,
                    self._quantized and views[0][0].kind == "sentence",
                    [tuple(_factor(*pair) for pair in zip(views, row, strict=True)) for row in vectors],
                    [EMPTY_DOCUMENT_SCORE if origin.kind == "tokens" else 0.0 for origin, _, _ in views],
                    whole,
                )
                for row, points in zip(batch, self.engine.query(request), strict=True):
                    hits[row] = [Hit(point.payload["id"], point.score) for point in points]
            waiting = [row for row in waiting if not hits[row]]
            if not start:
                tell_without_candidates(len(waiting), total, names, self.where)
        return hits

    def _checked_points(self, names: Sequence[str]) -> int:
        """How many points there are, each with a vector under every name that gives all documents one.

        Raises:
            InputError: Some have none.
        """
        for name in ["", *(name for name in names if self.origins[name].kind == "sentence")]:
            if name not in self._counts:
                self._counts[name] = self.engine.count(name=name)
            if lacking := self._counts[""] - self._counts[name]:
                self._counts.clear()  # another process may be adding them
                raise InputError(
                    f"{self.where}: {lacking:,} documents have no vector {name!r}, so their sums would lack a part. "
                    "Add these to the index, or delete them."
                )
        return self._counts[""]

    @property
    def _quantized(self) -> bool:
        return self.layout.get("quantization", "none") != "none"

    def _stored(self, stage: Stage) -> Origin:
        """The vectors that a stage compares, as the engine has them."""
        prefixes = self._prefixes.get(stage.origin.name, {})
        if stage.documents is None:
            return stage.origin
        if stage.documents not in prefixes:
            raise BudgetError(
                f"{self.where}: stores the first {', '.join(map(str, prefixes))} and all {stage.origin.nested[-1][1]} "
                f"of a document's vectors {stage.origin.name!r}; {stage.documents} asked. Use one of these, or start "
                f"an index with prefixes={stage.documents} in its URI; memory: searches any number."
            )
        return prefixes[stage.documents]

    def _nearest(self, asked_for: Sequence[Stage], stored: Sequence[Origin], k: int, prefetch: int) -> list[list[Hit]]:
        """The best ``k`` points of each query, as hits of their documents."""
        names = [origin.name for origin in stored]
        single = [origin.kind != stage.origin.kind for origin, stage in zip(stored, asked_for, strict=True)]
        last = asked_for[-1].origin.similarity
        quantized = self._quantized and stored[0].kind == "sentence"
        hits: list[list[Hit]] = [[] for _ in range(len(asked_for[0].queries))]
        for start in range(0, len(hits), QUERIES):
            stop = min(start + QUERIES, len(hits))
            vectors = [self._vectors(stage.queries, start, stop, stage.origin.similarity) for stage in asked_for]
            # An empty query has no best document, and an engine would refuse the whole request.
            asked = {
                start + i: row for i, row in enumerate(zip(*vectors, strict=True)) if all(v is not None for v in row)
            }
            # MaxSim against a single vector is the product with the sum of the query's.
            wanted = [
                tuple(vector.sum(0) if one else vector for vector, one in zip(row, single, strict=True))
                for row in asked.values()
            ]
            found = self.engine.query(Request(names, wanted, k, prefetch, quantized))
            for (row, vector), points in zip(asked.items(), found, strict=True):
                scale = _scale(last, vector[-1])
                hits[row] = [_hit(point, scale, self._windowed) for point in points]
        return hits

    def delete(self, ids: Iterable[str]) -> int:
        """Remove documents; returns how many were there."""
        documents = dict.fromkeys(unique_ids(ids), 0)
        self._counts.clear()
        points = self._points_from(documents) if self.origins else []
        if points:
            # Forgotten before, not after: a shard that is said to be whole must be.
            self._record({key: False for key, known in self.records.items() if key.startswith(SHARD) and known})
            self._remove(points)
            self.engine.flush()
        return len({point_id(identifier) for identifier in documents}.intersection(points))

    def count(self) -> int:
        """Documents in the index."""
        return self.engine.count(documents=self._windowed) if self.origins else 0

    def close(self) -> None:
        """Let go of the folder or the connection."""
        self.engine.close()

    @property
    def _windowed(self) -> bool:
        return any(origin.by_window for origin in self.origins.values())

    def _points_from(self, documents: Mapping[str, int]) -> list[str]:
        """Those points that exist of documents' windows from a number on, the last windows first."""
        found: list[str] = []
        while documents:
            asked, documents = list(documents.items()), {}
            for start in range(0, len(asked), POINTS):
                points = {point_id(*one): one for one in asked[start : start + POINTS]}
                there = self.engine.existing(list(points))
                found += [point for point in points if point in there]
                if self._windowed:
                    documents |= {name: number + 1 for point, (name, number) in points.items() if point in there}
        return found[::-1]

    def _remove(self, points: list[str]) -> None:
        """Remove points in their order, so that whatever stops it leaves no gap in a document's windows."""
        for start in range(0, len(points), POINTS):
            self.engine.delete(points[start : start + POINTS])

    def _add(self, shard: Shard, added: Added) -> Added:
        origin = checked_origin(self.origins, shard.origin, self.where, kinds=tuple(SIMILARITIES), force=self.force)
        if origin.similarity not in SIMILARITIES[origin.kind]:
            raise InputError(
                f"{self.where}: cannot score {origin.kind} vectors by {origin.similarity}, only by "
                f"{', '.join(SIMILARITIES[origin.kind])}. Use another back end."
            )
        self._announce(origin)
        key = f"{SHARD}{origin.name}/{shard.checksum}"
        if shard.checksum and self.records.get(key):
            return replace(added, shards_known=added.shards_known + 1)
        refuse_unlike_groups(shard)
        names, vectors = _points_of(shard)
        if origin.by_window:  # a document may come in the place of one with more windows
            self._remove(self._points_from({name: number + 1 for name, number in names}))
        prefixes = self._prefixes[origin.name]
        spans = batches(vectors, 1 + sum(prefixes) / origin.nested[-1][1] if prefixes else 1.0)
        replaced = sum(self._write(names[a:b], vectors, a, b, origin) for a, b in spans)
        replaced += len(shard.ids) - len({name for name, _ in names}) if origin.by_window else 0
        self.engine.flush()
        if shard.checksum:
            self._record({key: True})
        return replace(added, documents=added.documents + len(shard.ids), replaced=added.replaced + replaced)

    def _announce(self, origin: Origin) -> None:
        """Make room for vectors of a new name and for their prefixes, unless it is there."""
        wanted = self._wanted_prefixes(origin)
        if origin.name not in self.origins:
            records: dict[str, Any] = {ORIGIN + origin.name: origin.described()}
            if self.origins:
                self.engine.extend(self._named() | {origin.name: origin}, origin, self.layout, records)
            else:
                records = {VERSION: 1, LAYOUT: self.layout} | records
                self.engine.create(origin, self.layout, records)
            self.records |= records
            self.origins[origin.name], self._prefixes[origin.name] = origin, {}
        stored = self._prefixes[origin.name]
        for count in wanted:  # no document is written before all are there
            if count not in stored:
                new, key = _prefix(origin, count), PREFIXES + origin.name
                records = {key: [*stored, count]}
                self.engine.extend(self._named() | {new.name: new}, new, self.layout, records)
                self.records |= records
                stored[count] = new

    def _named(self) -> dict[str, Origin]:
        """All vectors of the engine by name, those of prefixes too."""
        prefixes = (prefix for several in self._prefixes.values() for prefix in several.values())
        return self.origins | {prefix.name: prefix for prefix in prefixes}

    def _wanted_prefixes(self, origin: Origin) -> list[int]:
        """How many first vectors of a document are to be stored beside all of them.

        Raises:
            InputError: Of these vectors there are no such prefixes, or their names are taken.
        """
        asked: list[int] = self.layout.get("prefixes", [])
        if not origin.nested:
            if asked and origin.kind == "tokens":
                raise InputError(
                    f"{self.where}: made with prefixes={','.join(map(str, asked))}, but vectors {origin.name!r} are "
                    "not nested, so their first mean nothing by themselves. Start an index without, or encode with a "
                    "model that has nested_groups."
                )
            wanted = []
        else:
            full = origin.nested[-1][1]
            if asked and asked[-1] > full:
                raise InputError(
                    f"{self.where}: made with prefixes={','.join(map(str, asked))}, but a document holds {full} "
                    f"vectors {origin.name!r}. Start an index with prefixes below that."
                )
            wanted = [count for count in sorted({1, *asked}) if count < full]
        names = {origin.name, *(_prefix(origin, count).name for count in wanted)}
        others = {name for name in self.origins if name != origin.name}
        others |= {p.name for name, several in self._prefixes.items() if name != origin.name for p in several.values()}
        if taken := names & others:
            raise InputError(
                f"{self.where}: has vectors {min(taken)!r} already, and those of {origin.name!r} would be called so. "
                "Give one another --name when encoding, or use an index of their own."
            )
        return wanted

    def _stored_prefixes(self, origin: Origin) -> dict[int, Origin]:
        """Prefixes of vectors that an index has, by their numbers of vectors."""
        counts = self.records.get(PREFIXES + origin.name, [])
        most = origin.nested[-1][1] if origin.nested else 0
        if not isinstance(counts, list) or not all(type(count) is int and 0 < count < most for count in counts):
            raise InputError(
                f"{self.where}: says that it stores the first {counts!r:.40} of {most} vectors {origin.name!r}, so it "
                "is damaged. Delete it and add its corpora again."
            )
        return {count: _prefix(origin, count) for count in counts}

    def _write(
        self, names: Sequence[tuple[str, int]], embeddings: Embeddings, start: int, stop: int, origin: Origin
    ) -> int:
        """Write some points, each an id and a window's number; returns how many documents took another's place."""
        types = self.engine.types
        vectors = self._named_vectors(embeddings, start, stop, origin)
        points = {point_id(*name): (name, v) for name, v in zip(names, vectors, strict=True)}
        known = self.engine.existing(list(points))
        # Upserting a point drops its vectors of other names, so only what is new is upserted.
        new = [
            types.PointStruct(
                id=point,
                vector=v or {},
                payload={"id": identifier} | ({"window": number} if number else {}),
            )
            for point, ((identifier, number), v) in points.items()
            if point not in known
        ]
        changed = [
            types.PointVectors(id=point, vector=v)
            for point, (_, v) in points.items()
            if point in known and v is not None
        ]
        emptied = [point for point, (_, v) in points.items() if point in known and v is None]
        there = len(known) if len(self.origins) == 1 or not known else self.engine.having(sorted(known), origin.name)
        if origin.by_window:
            there = sum(number == 0 and point in known for point, ((_, number), _) in points.items())
        self.engine.write(origin.name, new, changed, emptied)
        return there + len(names) - len(points)

    def _named_vectors(
        self, embeddings: Embeddings, start: int, stop: int, origin: Origin
    ) -> list[dict[str, Any] | None]:
        """What is written of some texts, by name: their vectors and the prefixes of these; None for a text without."""
        found = [
            None if v is None else {origin.name: v} for v in self._vectors(embeddings, start, stop, origin.similarity)
        ]
        for count, prefix in self._prefixes[origin.name].items():
            cut = first_vectors(rows(embeddings, np.arange(start, stop)), count)
            if prefix.kind == "sentence":
                cut = replace(cut, kind="sentence", offsets=None)
            for named, v in zip(found, self._vectors(cut, 0, len(cut), prefix.similarity), strict=True):
                if named is not None:
                    named[prefix.name] = v
        return found

    def _record(self, changes: dict[str, Any]) -> None:
        if changes:
            self.engine.record(self.records, changes)
            self.records |= changes

    def _vectors(self, embeddings: Embeddings, start: int, stop: int, similarity: str) -> list[Any]:
        """Vectors of some texts as the engine takes them; None for a text that has none."""
        if embeddings.kind == "sparse":
            matrix = sparse_rows(embeddings, start, stop, similarity)
            bounds, terms, weights = matrix.indptr.tolist(), matrix.indices.tolist(), matrix.data.tolist()
            sparse = self.engine.types.SparseVector
            return [
                sparse(indices=terms[a:b], values=weights[a:b]) if a < b else None
                for a, b in zip(bounds, bounds[1:], strict=False)
            ]
        if embeddings.offsets is None:
            return list(np.asarray(embeddings.values[start:stop], np.float32))
        bounds = embeddings.offsets[start : stop + 1]
        values = np.asarray(embeddings.values[bounds[0] : bounds[-1]], np.float32)
        return [part if len(part) else None for part in np.split(values, bounds[1:-1] - bounds[0])]


def _scale(similarity: str, vector: Any) -> float:
    """What Qdrant's score of a query's vector is multiplied by to be the oracle's."""
    if similarity == "meanmaxsim":
        return 1 / len(vector)
    # Qdrant's distances are better when smaller, as the oracle's negated ones are when larger.
    return -1.0 if similarity in ("euclidean", "manhattan") else 1.0


def _factor(view: tuple[Origin, Embeddings, float], vector: Any) -> float:
    return 0.0 if vector is None else view[2] * _scale(view[0].similarity, vector)


def point_id(identifier: str, window: int = 0) -> str:
    """The UUID of a document's point, or of one of its windows."""
    point = uuid.uuid5(NAMESPACE, identifier)
    return str(uuid.uuid5(point, str(window)) if window else point)


def _hit(point: Any, scale: float, by_window: bool) -> Hit:
    window = point.payload.get("window", 0) if by_window else None
    return Hit(point.payload["id"], scale * point.score, window=window)


def _points_of(shard: Shard) -> tuple[list[tuple[str, int]], Embeddings]:
    """Id and window's number of each point of a shard, and its vectors; a document that occurs twice, as the last."""
    bounds = shard.vectors.windows
    if bounds is None:
        return [(identifier, 0) for identifier in shard.ids], shard.vectors
    last = {identifier: place for place, identifier in enumerate(shard.ids)}
    spans = [range(*bounds[place : place + 2].tolist()) for place in sorted(last.values())]
    names = [
        (identifier, row - span.start)
        for identifier, span in zip(sorted(last, key=last.__getitem__), spans, strict=True)
        for row in span
    ]
    return names, rows(shard.vectors, np.array([row for span in spans for row in span], np.int64))


def _prefix(origin: Origin, count: int) -> Origin:
    """The first vectors of nested ones as the engine has them: a single one is quick to find, as one vector a text."""
    kind: Kind = "sentence" if count == 1 else "tokens"
    similarity = "dot" if count == 1 else origin.similarity
    return replace(origin, name=f"{origin.name}-first-{count}", kind=kind, similarity=similarity, nested=())


def batches(embeddings: Embeddings, times: float = 1.0) -> Iterator[tuple[int, int]]:
    """Bounds of runs of texts that make requests of at most :data:`POINTS` and about :data:`BYTES`.

    What is sent is ``times`` as large as the embeddings.
    """
    numbers = times * embeddings.lengths * (2 if embeddings.kind == "sparse" else embeddings.dim)
    ends, start = np.cumsum(numbers) * NUMBER, 0
    while start < len(embeddings):
        limit = BYTES + (ends[start - 1] if start else 0)
        stop = max(start + 1, min(start + POINTS, int(np.searchsorted(ends, limit, "right"))))
        yield start, stop
        start = stop
