"""What the index needs of an engine of Qdrant, and the engine that is a library in this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

from ..encoding.shards import Origin
from ..errors import InputError
from ..files import read_json, refuse_unwritable, staged_folder, write_json
from .local import package

SIMILARITIES = {
    "sentence": {"dot": "Dot", "cosine": "Cosine", "euclidean": "Euclid", "manhattan": "Manhattan"},
    "tokens": {"maxsim": "Dot", "meanmaxsim": "Dot"},
    "sparse": {"dot": "Dot", "cosine": "Dot"},  # the vectors of the latter get unit length first
}
"""Kind of vectors -> similarity -> what Qdrant calls it."""

QUANTIZED = {"rescore": True, "oversampling": 2.0}
"""How quantized vectors are searched: twice as many are found as wanted, and ranked by the original ones."""


class Request(NamedTuple):
    """What an engine is asked in one go: the best ``k`` points of each query.

    Attributes:
        names: Names of vectors. With two, the first finds ``prefetch`` candidates, which the second ranks; with
            ``factors`` it is the sum over all names that ranks them.
        queries: Of each query a vector for each name.
        k: Points.
        prefetch: Candidates.
        quantized: Whether the first vectors are.
        factors: Of each query what the score of each name is multiplied by, where points are ranked by the sum. Of
            these queries a name may lack its vector.
        absent: For each name the score of a point without such a vector, or without a common word.
        whole: Whether all points are candidates.
    """

    names: Sequence[str]
    queries: Sequence[tuple[Any, ...]]
    k: int
    prefetch: int
    quantized: bool
    factors: Sequence[tuple[float, ...]] = ()
    absent: Sequence[float] = ()
    whole: bool = False

    def sums(self) -> Iterator[list[tuple[str, Any, float, float]]]:
        """Of each query to be summed its names that have a vector, with vector, factor and score of what is absent."""
        for vectors, factors in zip(self.queries, self.factors, strict=True) if self.factors else ():
            parts = zip(self.names, vectors, factors, self.absent, strict=True)
            yield [part for part in parts if part[1] is not None]


class Engine(Protocol):
    """What :class:`polyrep.search.qdrant.QdrantIndex` needs of an engine."""

    where: str
    """Name of the index in messages."""
    types: Any
    """Has ``PointStruct, PointVectors, SparseVector``."""

    def open(self) -> dict[str, Any]:
        """Open what is there; returns its records, none if nothing is there."""

    def create(self, origin: Origin, layout: dict[str, Any], records: dict[str, Any]) -> None:
        """Begin a collection with its first vectors and records, wholly or not at all."""

    def extend(
        self, origins: Mapping[str, Origin], new: Origin, layout: dict[str, Any], records: dict[str, Any]
    ) -> None:
        """Add a vector name to the collection, then records; does nothing twice."""

    def record(self, records: dict[str, Any], changes: dict[str, Any]) -> None:
        """Change records for good."""

    def existing(self, points: Sequence[str]) -> set[str]:
        """Those of the points that exist."""

    def having(self, points: Sequence[str], name: str) -> int:
        """How many of the points have a vector of this name."""

    def write(self, name: str, new: Sequence[Any], changed: Sequence[Any], emptied: Sequence[str]) -> None:
        """Insert points, set vectors of others, and remove those of a third kind."""

    def delete(self, points: Sequence[str]) -> None:
        """Remove points."""

    def flush(self) -> None:
        """Return once all that was written would survive a crash."""

    def finish(self) -> None:
        """Build what makes search quick."""

    def query(self, request: Request) -> list[list[Any]]:
        """The best points of each query, with ``payload`` and ``score``."""

    def count(self, documents: bool = False, name: str = "") -> int:
        """Points; or those that are no further window of a document, or that have a vector of this name."""

    def close(self) -> None:
        """Let go of everything."""


def datatype(origin: Origin) -> str:
    """Type of the numbers that an engine stores; nothing wider than what the corpus was encoded in."""
    return "float32" if origin.precision == "float32" else "float16"


class _Guarded:
    """The library's objects, whose errors have no class of their own, and whose panics pass every handler."""

    def __init__(self, guarded: Any, where: str):
        self._guarded, self._where = guarded, where

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._guarded, name)

        def call(*arguments: Any) -> Any:
            try:
                return method(*arguments)
            except BaseException as error:
                if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                    raise
                raise InputError(
                    f"{self._where}: the engine cannot {name} it ({(str(error).splitlines() or [''])[0]:.300}). If a "
                    "process has it open, close that, and make room if the disk is full; else it is damaged: delete "
                    "the folder and add its corpora again."
                ) from None

        return call


class Embedded:
    """Qdrant's library; the folder has its files in ``shard`` and our records in ``polyrep.json``."""

    def __init__(self, folder: Path):
        self.edge = edge = package("qdrant_edge")
        self.folder, self.where = folder, str(folder)
        self.types = SimpleNamespace(
            PointStruct=edge.Point, PointVectors=edge.PointVectors, SparseVector=edge.SparseVector
        )
        self.shard: Any = None

    def open(self) -> dict[str, Any]:
        """See :class:`Engine`.

        Raises:
            InputError: The folder is in use, damaged, or not ours.
        """
        remedy = "Delete the index and add the shards again."
        records = read_json(self.folder / "polyrep.json", remedy=remedy) if self.folder.is_dir() else {}
        there = self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir()))
        if there and "polyrep" not in records:
            raise InputError(
                f"{self.where}: has no polyrep.json of this back end, so nothing is written into it. "
                "Name an empty folder, or one that is not there."
            )
        if records:
            self._load()
        return records

    def create(self, origin: Origin, layout: dict[str, Any], records: dict[str, Any]) -> None:
        """See :class:`Engine`."""
        refuse_unwritable(self.folder)
        with staged_folder(self.folder) as staged:
            self.edge.EdgeShard.create(str(staged / "shard"), self._config({origin.name: origin}, layout)).close()
            write_json(staged / "polyrep.json", records)
        self._load()

    def extend(
        self, origins: Mapping[str, Origin], new: Origin, layout: dict[str, Any], records: dict[str, Any]
    ) -> None:
        """See :class:`Engine`."""
        edge, kind = self.edge, self._member(self.edge.VectorStorageDatatype, datatype(new))
        if new.kind == "sparse":
            operation = edge.UpdateOperation.create_sparse_vector(new.name, None, kind)
        else:
            distance = getattr(edge.Distance, SIMILARITIES[new.kind][new.similarity])
            operation = edge.UpdateOperation.create_dense_vector(new.name, new.dim, distance, self._several(new), kind)
        self.shard.update(operation)
        self.shard.flush()
        self.shard.close()
        self._load(self._config(origins, layout))  # only a configuration says that there be no graph
        self.record(read_json(self.folder / "polyrep.json"), records)

    def record(self, records: dict[str, Any], changes: dict[str, Any]) -> None:
        """See :class:`Engine`."""
        write_json(self.folder / "polyrep.json", records | changes)

    def existing(self, points: Sequence[str]) -> set[str]:
        """See :class:`Engine`."""
        return {str(record.id) for record in self.shard.retrieve(list(points), False, False)}

    def having(self, points: Sequence[str], name: str) -> int:
        """See :class:`Engine`."""
        edge = self.edge
        among = edge.Filter(must=[edge.HasIdCondition(set(points)), edge.HasVectorCondition(name)])
        return self.shard.count(edge.CountRequest(exact=True, filter=among))

    def write(self, name: str, new: Sequence[Any], changed: Sequence[Any], emptied: Sequence[str]) -> None:
        """See :class:`Engine`."""
        operation = self.edge.UpdateOperation
        if new:
            self.shard.update(operation.upsert_points(list(new)))
        if changed:
            self.shard.update(operation.update_vectors(list(changed)))
        if emptied:
            self.shard.update(operation.delete_vectors(list(emptied), [name]))

    def delete(self, points: Sequence[str]) -> None:
        """See :class:`Engine`."""
        self.shard.update(self.edge.UpdateOperation.delete_points(list(points)))

    def flush(self) -> None:
        """See :class:`Engine`."""
        self.shard.flush()

    def finish(self) -> None:
        """See :class:`Engine`."""
        self.shard.optimize()
        self.shard.flush()

    def query(self, request: Request) -> list[list[Any]]:
        """See :class:`Engine`."""
        edge, requests = self.edge, []
        quantized = edge.QuantizationSearchParams(**QUANTIZED)
        params = edge.SearchParams(quantization=quantized) if request.quantized else None
        exact = edge.SearchParams(exact=True, quantization=edge.QuantizationSearchParams(ignore=True))
        for parts in request.sums():
            variables = [f"$score[{place}]" for place in range(len(parts))]
            nearest = [edge.Query.Nearest(vector, using=name) for name, vector, _, _ in parts]
            whole, limit = request.whole, request.prefetch
            found = edge.Prefetch(limit=limit, query=nearest[0], params=exact if whole else params)
            around = None if whole else [found]
            others = [edge.Prefetch(limit=limit, query=q, prefetches=around, params=exact) for q in nearest[1:]]
            write = edge.Expression
            terms = [
                write.Mult([write.Constant(factor), write.Variable(variable)])
                for variable, (_, _, factor, _) in zip(variables, parts, strict=True)
            ]
            absent = {variable: part[3] for variable, part in zip(variables, parts, strict=True)}
            requests.append(
                edge.QueryRequest(
                    limit=request.k,
                    query=edge.Formula(write.Sum(terms), absent),
                    prefetches=[found, *others],
                    with_payload=["id"],
                )
            )
        for vectors in () if request.factors else request.queries:
            first, *rest = (
                edge.Query.Nearest(vector, using=name) for vector, name in zip(vectors, request.names, strict=True)
            )
            found = edge.Prefetch(limit=request.prefetch, query=first, params=params) if rest else None
            requests.append(
                edge.QueryRequest(
                    limit=request.k,
                    query=rest[0] if rest else first,
                    prefetches=[found] if found else None,
                    params=None if found else params,
                    with_payload=["id", "window"],
                )
            )
        return self.shard.query_batch(edge.QueryBatchRequest(requests)) if requests else []

    def count(self, documents: bool = False, name: str = "") -> int:
        """See :class:`Engine`."""
        edge, among = self.edge, []
        if documents:
            among.append(edge.IsEmptyCondition("window"))
        if name:
            among.append(edge.HasVectorCondition(name))
        return self.shard.count(edge.CountRequest(exact=True, filter=edge.Filter(must=among) if among else None))

    def close(self) -> None:
        """See :class:`Engine`."""
        if self.shard is not None:
            self.shard.close()

    def _load(self, config: Any = None) -> None:
        load = _Guarded(self.edge.EdgeShard, self.where)
        self.shard = _Guarded(load.load(str(self.folder / "shard"), config), self.where)

    def _config(self, origins: Mapping[str, Origin], layout: dict[str, Any]) -> Any:
        edge = self.edge
        memory = edge.Memory.Cold if layout.get("on_disk") == "true" else None
        dense, sparse = {}, {}
        for name, origin in origins.items():
            kind = self._member(edge.VectorStorageDatatype, datatype(origin))
            if origin.kind == "sparse":
                sparse[name] = edge.EdgeSparseVectorParams(datatype=kind, memory=memory)
                continue
            dense[name] = edge.EdgeVectorParams(
                size=origin.dim,
                distance=getattr(edge.Distance, SIMILARITIES[origin.kind][origin.similarity]),
                multivector_config=self._several(origin),
                datatype=kind,
                memory=memory,
                quantization_config=self._quantization(layout) if origin.kind == "sentence" else None,
                hnsw_config=edge.HnswIndexConfig(0, 100, 10_000) if origin.kind == "tokens" else None,
            )
        return edge.EdgeConfig(vectors=dense or None, sparse_vectors=sparse or None)

    def _quantization(self, layout: dict[str, Any]) -> Any:
        edge = self.edge
        return {
            "int8": edge.ScalarQuantizationConfig(type=edge.ScalarType.Int8, memory=edge.Memory.Pinned),
            "binary": edge.BinaryQuantizationConfig(memory=edge.Memory.Pinned),
        }.get(layout.get("quantization", "none"))

    def _several(self, origin: Origin) -> Any:
        edge = self.edge
        return edge.MultiVectorConfig(edge.MultiVectorComparator.MaxSim) if origin.kind == "tokens" else None

    def _member(self, choices: Any, name: str) -> Any:
        return getattr(choices, name.capitalize())
