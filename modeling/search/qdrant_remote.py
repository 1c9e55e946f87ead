"""The engine that is a server or a cluster of Qdrant, over HTTP."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..encoding.shards import Origin
from ..errors import InputError
from .local import package
from .qdrant_engine import QUANTIZED, SIMILARITIES, Request, datatype

logger = logging.getLogger(__name__)

OLDEST = (1, 19)
"""Version of a server that has collection metadata, vector names in existing collections and memory placement."""

TRIES = 6
"""How often a request is sent while a server does not answer."""

PAUSE = 1.0
"""Seconds before the second try, more or less; twice as many before each further one."""

TIMEOUT = 60
"""Seconds in which a server answers a request."""


class Unreachable(InputError):
    """A server did not answer, however often it was asked."""


class Server:
    """A server or a cluster over HTTP, by Qdrant's client, whose requests are sent again while nothing answers."""

    def __init__(self, scheme: str, address: str, collection: str):
        self.types: Any = package("qdrant_client.models")
        self.errors = package("qdrant_client.http.exceptions")
        self.exhausted = package("qdrant_client.common.client_exceptions").ResourceExhaustedResponse
        self.transport: Any = package("httpx").TransportError
        self.url, self.collection = f"{scheme}://{address}", collection
        self.where = f"{self.url}/{collection}"
        self.client = package("qdrant_client").QdrantClient(
            url=self.url, api_key=os.environ.get("QDRANT_API_KEY"), timeout=TIMEOUT, check_compatibility=False
        )

    def open(self) -> dict[str, Any]:
        """See :class:`Engine`.

        Raises:
            InputError: Nothing answers, or something too old; or the collection is not ours.
        """
        version = self._send("info", {}, 1).version
        if tuple(int(part) for part in version.split("-")[0].split(".")[:2]) < OLDEST:
            raise InputError(
                f"{self.url}: is Qdrant {version}, which lacks what this index needs. "
                f"Use {'.'.join(map(str, OLDEST))} or later."
            )
        if not self._call("collection_exists"):
            return {}
        records = self._call("get_collection").config.metadata or {}
        if "polyrep" not in records:
            raise InputError(
                f"{self.where}: exists, but was not made by polyrep, and nothing is written into it. Name another "
                "collection."
            )
        return records

    def create(self, origin: Origin, layout: dict[str, Any], records: dict[str, Any]) -> None:
        """See :class:`Engine`."""
        params = self._params(origin, layout)
        self._call(
            "create_collection",
            vectors_config=None if origin.kind == "sparse" else {origin.name: params},
            sparse_vectors_config={origin.name: params} if origin.kind == "sparse" else None,
            shard_number=layout.get("shards"),
            replication_factor=layout.get("replicas"),
            metadata=records,
        )

    def extend(
        self, origins: Mapping[str, Origin], new: Origin, layout: dict[str, Any], records: dict[str, Any]
    ) -> None:
        """See :class:`Engine`."""
        m, params = self.types, self._params(new, layout)
        changes: dict[str, Any]
        if new.kind == "sparse":
            config = m.SparseVectorNameConfig(sparse=m.SparseVectorConfig(datatype=datatype(new)))
            changes = {"sparse_vectors_config": {new.name: params}}
        else:
            wanted = params.model_dump(include={"size", "distance", "multivector_config", "datatype"})
            config = m.DenseVectorNameConfig(dense=m.DenseVectorConfig(**wanted))
            kept = params.model_dump(include={"hnsw_config", "quantization_config", "memory"}, exclude_none=True)
            changes = {"vectors_config": {new.name: m.VectorParamsDiff(**kept)}}
        self._call("create_vector_name", vector_name=new.name, vector_name_config=config)
        self._call("update_collection", **changes, metadata=records)

    def record(self, records: dict[str, Any], changes: dict[str, Any]) -> None:
        """See :class:`Engine`."""
        self._call("update_collection", metadata=changes)  # the server merges keys

    def existing(self, points: Sequence[str]) -> set[str]:
        """See :class:`Engine`."""
        found = self._call("retrieve", ids=list(points), with_payload=False, with_vectors=False)
        return {str(record.id) for record in found}

    def having(self, points: Sequence[str], name: str) -> int:
        """See :class:`Engine`."""
        m = self.types
        among = m.Filter(must=[m.HasIdCondition(has_id=list(points)), m.HasVectorCondition(has_vector=name)])
        return self._call("count", count_filter=among, exact=True).count

    def write(self, name: str, new: Sequence[Any], changed: Sequence[Any], emptied: Sequence[str]) -> None:
        """See :class:`Engine`."""
        if new:
            self._call("upsert", points=list(new), wait=True)
        if changed:
            self._call("update_vectors", points=list(changed), wait=True)
        if emptied:
            self._call("delete_vectors", vectors=[name], points=list(emptied), wait=True)

    def delete(self, points: Sequence[str]) -> None:
        """See :class:`Engine`."""
        self._call("delete", points_selector=self.types.PointIdsList(points=list(points)), wait=True)

    def flush(self) -> None:
        """See :class:`Engine`; each request waited already."""

    def finish(self) -> None:
        """See :class:`Engine`; a server does it by itself."""

    def query(self, request: Request) -> list[list[Any]]:
        """See :class:`Engine`."""
        m, requests = self.types, []
        quantized = m.QuantizationSearchParams(**QUANTIZED)
        params = m.SearchParams(quantization=quantized) if request.quantized else None
        wanted: dict[str, Any] = {"limit": request.k, "with_payload": ["id", "window"]}
        exact = m.SearchParams(exact=True, quantization=m.QuantizationSearchParams(ignore=True))
        for parts in request.sums():
            nearest = [_nearest(m, vector, name) for name, vector, _, _ in parts]
            whole, limit = request.whole, request.prefetch
            found = m.Prefetch(**nearest[0], limit=limit, params=exact if whole else params)
            around = None if whole else [found]
            others = [m.Prefetch(**q, limit=limit, prefetch=around, params=exact) for q in nearest[1:]]
            variables = [f"$score[{place}]" for place in range(len(parts))]
            terms = [m.MultExpression(mult=[p[2], name]) for name, p in zip(variables, parts, strict=True)]
            absent = {name: part[3] for name, part in zip(variables, parts, strict=True)}
            formula = m.FormulaQuery(formula=m.SumExpression(sum=terms), defaults=absent)
            requests.append(m.QueryRequest(query=formula, prefetch=[found, *others], **wanted))
        for vectors in () if request.factors else request.queries:
            first, *rest = (_nearest(m, v, name) for v, name in zip(vectors, request.names, strict=True))
            if rest:
                found = m.Prefetch(**first, limit=request.prefetch, params=params)
                requests.append(m.QueryRequest(**rest[0], prefetch=[found], **wanted))
            else:
                requests.append(m.QueryRequest(**first, params=params, **wanted))
        found = self._call("query_batch_points", requests=requests) if requests else []
        return [response.points for response in found]

    def count(self, documents: bool = False, name: str = "") -> int:
        """See :class:`Engine`."""
        m, among = self.types, []
        if documents:
            among.append(m.IsEmptyCondition(is_empty=m.PayloadField(key="window")))
        if name:
            among.append(m.HasVectorCondition(has_vector=name))
        return self._call("count", count_filter=m.Filter(must=among) if among else None, exact=True).count

    def close(self) -> None:
        """See :class:`Engine`."""
        self.client.close()

    def _params(self, origin: Origin, layout: dict[str, Any]) -> Any:
        m = self.types
        memory = "cold" if layout.get("on_disk") == "true" else None
        if origin.kind == "sparse":
            return m.SparseVectorParams(index=m.SparseIndexParams(datatype=datatype(origin), memory=memory))
        several = origin.kind == "tokens"
        quantization = {
            "int8": m.ScalarQuantization(scalar=m.ScalarQuantizationConfig(type="int8", memory="pinned")),
            "binary": m.BinaryQuantization(binary=m.BinaryQuantizationConfig(memory="pinned")),
        }.get(layout.get("quantization", "none"))
        return m.VectorParams(
            size=origin.dim,
            distance=SIMILARITIES[origin.kind][origin.similarity],
            multivector_config=m.MultiVectorConfig(comparator="max_sim") if several else None,
            datatype=datatype(origin),
            memory=memory,
            quantization_config=None if several else quantization,
            hnsw_config=m.HnswConfigDiff(m=0) if several else None,
        )

    def _call(self, method: str, **arguments: Any) -> Any:
        return self._send(method, {"collection_name": self.collection} | arguments, TRIES)

    def _send(self, method: str, arguments: dict[str, Any], tries: int) -> Any:
        """Call the client, again and again while the server is away or overloaded.

        Raises:
            InputError: The server refuses, which another try would not change.
            Unreachable: It gave no answer in as many tries.
        """
        for attempt in range(1, tries + 1):
            try:
                return getattr(self.client, method)(**arguments)
            except self.errors.UnexpectedResponse as error:
                if error.status_code < 500 and error.status_code != 429:
                    if error.status_code == 409 and attempt > 1:
                        return None  # done by a try whose answer was lost
                    hint = "Set QDRANT_API_KEY to a key that may write. " if error.status_code in (401, 403) else ""
                    raise InputError(f"{self.where}: refused {method}. {hint}{_line(error)}") from None
                failure: Exception = error
            except self.errors.ResponseHandlingException as error:
                if not isinstance(error.source, self.transport):
                    raise InputError(
                        f"{self.where}: its answer to {method} is not Qdrant's ({_line(error)})."
                    ) from None
                failure = error
            except self.exhausted as error:
                failure = error
            if attempt < tries:
                pause = PAUSE * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
                logger.warning("%s: %s failed (%s); next try in %.1f s.", self.where, method, _line(failure), pause)
                time.sleep(pause)
        raise Unreachable(f"{self.where}: no answer to {method} in {tries} tries ({_line(failure)}).")


def _nearest(types: Any, vector: Any, name: str) -> dict[str, Any]:
    """What asks for the nearest vectors of a name."""
    nearest = vector if hasattr(vector, "indices") else vector.tolist()
    return {"query": types.NearestQuery(nearest=nearest), "using": name}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
