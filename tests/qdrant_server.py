"""A stand-in for a Qdrant server: the REST calls that polyrep's client makes, answered by Qdrant's embedded library.

It proves that our requests are what the real client sends over real HTTP, that a real engine understands the vectors
in them, and what we do when a server fails, disappears or refuses the key. It does not prove what only a server does:
its validation of requests, its own optimizer, consensus, shards and replicas, the merge of metadata inside it, strict
mode, timeouts and limits of size. Those are described by Qdrant's manual and by nothing here.
"""

from __future__ import annotations

import json
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import qdrant_edge as edge


class StandIn:
    """``with StandIn() as server: open_index(f"qdrant+http://{server.address}/name")``.

    Attributes:
        key: API key that it wants; empty for none.
        requests: ``(method, path)`` of all that came.
        failures: Path ending -> what the next requests to it get: a status, ``drop`` (no answer, nothing done) or
            ``lose`` (done, but the answer is lost).
    """

    def __init__(self, key: str = ""):
        self.key, self.requests, self.failures = key, [], {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.shards: dict[str, Any] = {}
        self.version = "1.20.0"
        self.lock = threading.Lock()

    def __enter__(self) -> StandIn:
        self.folder = tempfile.TemporaryDirectory()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                stand_in.handle(self)

            do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = handle_any

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.address = f"127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.http.shutdown()
        self.http.server_close()
        for shard in self.shards.values():
            shard.close()
        self.folder.cleanup()

    def handle(self, http: Any) -> None:
        """Answer one request."""
        body = json.loads(http.rfile.read(int(http.headers.get("Content-Length") or 0)) or b"{}")
        path = urlsplit(http.path).path
        self.requests.append((http.command, path))
        if self.key and http.headers.get("api-key") != self.key:
            return self.answer(http, 401, {"status": {"error": "Must provide an API key"}})
        failing = next((f for end, f in self.failures.items() if path.endswith(end) and f), [])
        failure = failing.pop(0) if failing else None
        if isinstance(failure, int):
            return self.answer(http, failure, {"status": {"error": "failure of the test"}})
        if failure != "drop":
            try:
                with self.lock:
                    status, result = self.result(http.command, [unquote(p) for p in path.split("/")[1:]], body)
            except Exception as error:  # what a server would call a bad request
                status, result = 400, {"status": {"error": str(error)}}
        if failure:
            http.close_connection = True
            return http.connection.close()
        return self.answer(http, status, result)

    def answer(self, http: Any, status: int, content: Any) -> None:
        """Send JSON."""
        data = json.dumps(content).encode()
        http.send_response(status)
        http.send_header("Content-Type", "application/json")
        http.send_header("Content-Length", str(len(data)))
        http.end_headers()
        http.wfile.write(data)

    def result(self, method: str, path: list[str], body: dict[str, Any]) -> tuple[int, Any]:
        """Status and content of an answer."""
        if path == [""]:
            return 200, {"title": "stand-in", "version": self.version}
        name, call = path[1], [method, *path[2:]]
        if call == ["PUT"]:
            if name in self.collections:
                return 409, {"status": {"error": f"Collection `{name}` already exists!"}}
            self.create(name, body)
            return ok(True)
        if call == ["GET", "exists"]:
            return ok({"exists": name in self.collections})
        if name not in self.collections:
            return 404, {"status": {"error": f"Collection `{name}` doesn't exist!"}}
        settings, shard, operation = self.collections[name], self.shards[name], edge.UpdateOperation
        match call:
            case ["GET"]:
                return ok(information(settings, shard))
            case ["DELETE"]:
                del self.collections[name]
                self.shards.pop(name).close()
                return ok(True)
            case ["PATCH"]:
                settings["metadata"] |= body.pop("metadata", {})
                for which in ("vectors", "sparse_vectors"):
                    for vector, change in body.pop(which, {}).items():
                        settings[which][vector] |= change
                assert not body, f"unknown: {body}"
                return ok(True)
            case ["PUT", "vectors", vector] if "dense" in body:
                self.collections[name]["vectors"][vector] = p = body["dense"]
                update = operation.create_dense_vector(
                    vector, p["size"], getattr(edge.Distance, p["distance"]), several(p), datatype(p)
                )
            case ["PUT", "vectors", vector]:
                settings["sparse_vectors"][vector] = {"index": body["sparse"]}
                update = operation.create_sparse_vector(vector, None, datatype(body["sparse"]))
            case ["PUT", "points"]:
                update = operation.upsert_points(
                    [edge.Point(p["id"], vectors_of(p["vector"]), p.get("payload")) for p in body["points"]]
                )
            case ["PUT", "points", "vectors"]:
                update = operation.update_vectors(
                    [edge.PointVectors(p["id"], vectors_of(p["vector"])) for p in body["points"]]
                )
            case ["POST", "points", "vectors", "delete"]:
                update = operation.delete_vectors(body["points"], body["vector"])
            case ["POST", "points", "delete"]:
                update = operation.delete_points(body["points"])
            case ["POST", "points"]:
                return ok([{"id": str(r.id)} for r in shard.retrieve(body["ids"], False, False)])
            case ["POST", "points", "count"]:
                return ok({"count": shard.count(edge.CountRequest(True, condition(body.get("filter"))))})
            case ["POST", "points", "query", "batch"]:
                found = shard.query_batch(edge.QueryBatchRequest([request_of(s) for s in body["searches"]]))
                return ok([{"points": [scored(point) for point in points]} for points in found])
            case _:
                return 404, {"status": {"error": f"the stand-in knows no {call}"}}
        shard.update(update)
        return ok({"operation_id": 0, "status": "completed"})

    def create(self, name: str, body: dict[str, Any]) -> None:
        """Make a collection."""
        settings = {"vectors": {}, "sparse_vectors": {}, "metadata": {}} | body
        dense = {
            vector: edge.EdgeVectorParams(
                p["size"], getattr(edge.Distance, p["distance"]), multivector_config=several(p), datatype=datatype(p)
            )
            for vector, p in settings["vectors"].items()
        }
        sparse = {
            vector: edge.EdgeSparseVectorParams(datatype=datatype(p.get("index", {})))
            for vector, p in settings["sparse_vectors"].items()
        }
        place = str(Path(self.folder.name) / f"{name}-{len(self.requests)}")
        self.shards[name] = edge.EdgeShard.create(
            place, edge.EdgeConfig(vectors=dense or None, sparse_vectors=sparse or None)
        )
        self.collections[name] = settings


def ok(result: Any) -> tuple[int, Any]:
    return 200, {"result": result, "status": "ok", "time": 0.0}


def information(settings: dict[str, Any], shard: Any) -> dict[str, Any]:
    """What a server tells of a collection; its settings apart from ours are made up."""
    params = {
        "vectors": settings["vectors"],
        "sparse_vectors": settings["sparse_vectors"],
        "shard_number": settings.get("shard_number") or 1,
        "replication_factor": settings.get("replication_factor") or 1,
    }
    optimizers = {
        "deleted_threshold": 0.2,
        "vacuum_min_vector_number": 1000,
        "default_segment_number": 0,
        "flush_interval_sec": 5,
    }
    return {
        "status": "green",
        "optimizer_status": "ok",
        "segments_count": 1,
        "points_count": shard.count(edge.CountRequest()),
        "payload_schema": {},
        "config": {
            "params": params,
            "hnsw_config": {"m": 16, "ef_construct": 100, "full_scan_threshold": 10000},
            "optimizer_config": optimizers,
            "metadata": settings["metadata"],
        },
    }


def several(params: dict[str, Any]) -> Any:
    comparator = (params.get("multivector_config") or {}).get("comparator")
    assert comparator in (None, "max_sim")
    return edge.MultiVectorConfig(edge.MultiVectorComparator.MaxSim) if comparator else None


def datatype(params: dict[str, Any]) -> Any:
    return getattr(edge.VectorStorageDatatype, params["datatype"].capitalize())


def vector_of(vector: Any) -> Any:
    return edge.SparseVector(vector["indices"], vector["values"]) if isinstance(vector, dict) else vector


def vectors_of(named: dict[str, Any]) -> dict[str, Any]:
    return {name: vector_of(vector) for name, vector in named.items()}


def condition(content: dict[str, Any] | None) -> Any:
    if content is None:
        return None
    if "is_empty" in content["must"][0]:
        return edge.Filter(must=[edge.IsEmptyCondition(content["must"][0]["is_empty"]["key"])])
    *has_id, has_vector = content["must"]
    ids = [edge.HasIdCondition(set(one["has_id"])) for one in has_id]
    return edge.Filter(must=[*ids, edge.HasVectorCondition(has_vector["has_vector"])])


def nearest(request: dict[str, Any]) -> Any:
    return edge.Query.Nearest(vector_of(request["query"]["nearest"]), using=request["using"])


def prefetches_of(request: dict[str, Any]) -> Any:
    found = [
        edge.Prefetch(limit=p["limit"], query=nearest(p), prefetches=prefetches_of(p))
        for p in request.get("prefetch") or []
    ]
    return found or None


def sum_of(query: dict[str, Any]) -> Any:
    write = edge.Expression
    pairs = [term["mult"] for term in query["formula"]["sum"]]
    terms = [write.Mult([write.Constant(factor), write.Variable(variable)]) for factor, variable in pairs]
    return edge.Formula(write.Sum(terms), query["defaults"])


def request_of(request: dict[str, Any]) -> Any:
    return edge.QueryRequest(
        limit=request["limit"],
        query=sum_of(request["query"]) if "formula" in request["query"] else nearest(request),
        prefetches=prefetches_of(request),
        with_payload=request["with_payload"],
    )


def scored(point: Any) -> dict[str, Any]:
    return {"id": str(point.id), "version": 0, "score": point.score, "payload": point.payload}
