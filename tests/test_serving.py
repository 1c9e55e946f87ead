"""The server of docs/serving.md, as the page has it, under uvicorn in a process of its own."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import warm
from conftest import DOCUMENTS, PATIENCE, ROOT
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder

import polyrep
from polyrep.encoding.embeddings import in_memory
from polyrep.encoding.shards import Origin, manifest_of, write_shard
from polyrep.files import write_json
from polyrep.hub import fingerprint
from polyrep.search import Busy, Deadline, Service

pytest.importorskip("uvicorn")

TEXTS = [f"{word} {text}" for word in ("show", "list", "print", "make") for text in DOCUMENTS.values()]
WAITING = 20

WRAPPER = f"""
import functools, os, time
import server
from sentence_transformers import SentenceTransformer

server.Service = functools.partial(server.Service, waiting_texts={WAITING})
app, encode_query = server.app, SentenceTransformer.encode_query

def slow(self, texts, **options):
    while not os.path.exists("gate"):
        time.sleep(0.01)
    if "poison" in texts:
        raise RuntimeError("secret of " + __file__)
    return encode_query(self, texts, **options)

SentenceTransformer.encode_query = slow
"""
"""The page's server, whose model is busy with queries as long as there is no file ``gate``."""


def example() -> str:
    return re.search(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(encoding="utf-8"), re.S)[1]


def until(condition: Callable[[], bool]) -> None:
    """Poll; what is awaited has to come, however slow the machine."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Server:
    """A running server, and how to speak with it."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes], log: Path):
        self.process, self.log, self.gate = process, log, folder / "gate"
        self.threads = ThreadPoolExecutor(WAITING)
        running = re.compile(r"running on http://127\.0\.0\.1:(\d+)")
        until(lambda: process.poll() is not None or bool(running.search(log.read_text())))
        assert process.poll() is None, log.read_text()
        self.port = int(running.search(log.read_text())[1])
        self.gate.touch()

    def raw(self, method: str, path: str, body: Any = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        return connection.getresponse()

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        response = self.raw("POST", path, json.dumps(body))
        return response.status, json.load(response)

    def later(self, path: str, **body: Any) -> Future[tuple[int, Any]]:
        return self.threads.submit(self.post, path, **body)

    def health(self) -> dict[str, Any]:
        return json.load(self.raw("GET", "/health"))

    def occupy(self) -> Future[tuple[int, Any]]:
        """Have the model busy with one query until the gate is opened."""
        self.gate.unlink()
        before = self.health()["batches"]
        answer = self.later("/search", query="busy")
        until(lambda: self.health()["batches"] == before + 1)
        return answer


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, sentence_model: SentenceTransformer) -> Path:
    return polyrep.save(sentence_model, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, sentence_model: SentenceTransformer
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "server.py").write_text(example())
    (folder / "served.py").write_text(WRAPPER)
    origin = Origin("vectors", "sentence", 32, "cosine", fingerprint(model_folder), "float32")
    write_json(folder / "corpus" / "manifest.json", manifest_of(origin))
    for number, start in enumerate(range(0, len(TEXTS), 8)):
        ids = [f"d{place}" for place in range(len(TEXTS))][start : start + 8]
        vectors = in_memory(sentence_model.encode_document(TEXTS[start : start + 8]))
        write_shard(folder / "corpus", number, ids, vectors, "float32")
    write_json(folder / "corpus" / "complete.json", {"shards": number + 1})
    environment = os.environ | {
        "POLYREP_MODEL": str(model_folder),
        "POLYREP_INDEX": "memory:",
        "POLYREP_CORPUS": str(folder / "corpus"),
        "OMP_NUM_THREADS": "1",
    }
    command = [warm.python(), "-m", "uvicorn", "served:app", "--port", "0"]
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        found = Server(folder, process, log)
        yield found
        # Told to end under load, it answers what it has taken, and then ends without an error.
        answer = found.occupy()
        waiting = [found.later("/search", query=text) for text in TEXTS[:8]]
        until(lambda: found.health()["waiting"] == len(waiting))
        process.send_signal(signal.SIGTERM)
        until(lambda: "Shutting down" in log.read_text())
        found.gate.touch()
        assert {one.result(PATIENCE)[0] for one in (answer, *waiting)} == {200}
        process.wait(PATIENCE)
        assert process.returncode in (0, -signal.SIGTERM)  # uvicorn's newer versions end by the signal
        assert "Finished server process" in log.read_text() and "Traceback" not in log.read_text().split("Shutting")[1]
    finally:
        process.kill()


def check_hits(model: SentenceTransformer, query: str, hits: list[dict[str, Any]], k: int) -> None:
    """Against cosines in float64: right scores, best first, and none that is better was left out."""
    sides = [model.encode_query([query]).astype(np.float64), model.encode_document(TEXTS).astype(np.float64)]
    [expected] = np.divide(sides[0] @ sides[1].T, np.outer(*(np.linalg.norm(side, axis=1) for side in sides)))
    scores = [hit["score"] for hit in hits]
    assert len({hit["id"] for hit in hits}) == len(hits) == k
    assert scores == sorted(scores, reverse=True)
    np.testing.assert_allclose(scores, [expected[int(hit["id"][1:])] for hit in hits], atol=1e-5)
    np.testing.assert_allclose(scores, np.sort(expected)[::-1][:k], atol=1e-5)


def test_example_is_short() -> None:
    lines = example().splitlines()
    assert len([line for line in lines if line]) <= 47
    assert max(map(len, lines)) <= 119


def test_health(server: Server, model_folder: Path) -> None:
    health = server.health()
    del health["batches"]
    assert health == {
        "model": "tiny",
        "fingerprint": fingerprint(model_folder),
        "documents": len(TEXTS),
        "ready": True,
        "waiting": 0,
    }


def test_search_equals_exact_search(server: Server, sentence_model: SentenceTransformer) -> None:
    status, found = server.post("/search", query="show open ports")
    assert status == 200
    check_hits(sentence_model, "show open ports", *found["hits"], k=10)
    queries = ["make an archive", "find a pattern in a file"]
    status, found = server.post("/search", query=queries, k=3)
    assert status == 200
    for query, hits in zip(queries, found["hits"], strict=True):
        check_hits(sentence_model, query, hits, k=3)


@pytest.mark.parametrize("task", ["query", "document"])
def test_encode_equals_the_model(server: Server, sentence_model: SentenceTransformer, task: str) -> None:
    status, found = server.post("/encode", texts=TEXTS[:3], task=task)
    assert status == 200
    expected = getattr(sentence_model, f"encode_{task}")(TEXTS[:3])
    np.testing.assert_allclose(found["vectors"], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/search", {"query": "a", "k": 101}),
        ("/search", {"query": "a", "k": 0}),
        ("/search", {"query": ""}),
        ("/search", {"query": []}),
        ("/search", {"query": ["a"] * 65}),
        ("/search", {"query": "a" * 10_001}),
        ("/search", {"query": "\ud800"}),
        ("/search", {"query": "a", "budget": 0}),
        ("/search", {"query": "a", "first": "many"}),
        ("/search", {}),
        ("/search", []),
        ("/encode", {"texts": ["a", ""], "task": "query"}),
        ("/encode", {"texts": ["a"], "task": "passage"}),
    ],
)
def test_what_breaks_a_limit_is_refused(server: Server, path: str, body: Any) -> None:
    before = server.health()["batches"]
    response = server.raw("POST", path, json.dumps(body))
    detail = "a value is missing, of another type or outside its limits"
    assert (response.status, json.load(response)) == (422, {"detail": detail})
    assert server.health()["batches"] == before


@pytest.mark.parametrize("name", ["budget", "first"])
def test_a_budget_that_the_index_does_not_hold_is_refused(server: Server, name: str) -> None:
    before = server.health()["batches"]
    assert server.post("/search", query="a", **{name: 4}) == (
        422,
        {"detail": "the index cannot be searched at this budget"},
    )
    assert server.health()["batches"] == before


def test_broken_json_is_refused(server: Server) -> None:
    assert server.raw("POST", "/search", '{"query": ').status == 422


def test_large_body_is_refused(server: Server) -> None:
    large = json.dumps({"query": "a"}) + " " * 2**20
    assert server.raw("POST", "/search", large).status == 413
    chunks = (large[start : start + 2**16].encode() for start in range(0, len(large), 2**16))
    assert server.raw("POST", "/search", chunks).status == 413  # without a Content-Length


def test_concurrent_requests_are_encoded_together(server: Server, sentence_model: SentenceTransformer) -> None:
    first = server.occupy()
    before = server.health()["batches"]
    texts = TEXTS[:15]
    found = [server.later("/search", query=text, k=1 + number) for number, text in enumerate(texts)]
    until(lambda: server.health()["waiting"] == len(texts))
    server.gate.touch()
    check_hits(sentence_model, "busy", *first.result(PATIENCE)[1]["hits"], k=10)
    for number, (text, answer) in enumerate(zip(texts, found, strict=True)):
        check_hits(sentence_model, text, *answer.result(PATIENCE)[1]["hits"], k=1 + number)
    assert server.health()["batches"] == before + 1


def test_full_queue_refuses_and_recovers(server: Server, sentence_model: SentenceTransformer) -> None:
    first = server.occupy()
    waiting = server.later("/search", query=TEXTS[:WAITING])
    until(lambda: server.health()["waiting"] == WAITING)
    refused = server.raw("POST", "/search", json.dumps({"query": "one more"}))
    assert (refused.status, refused.headers["Retry-After"], json.load(refused)) == (503, "1", {"detail": "busy"})
    server.gate.touch()
    assert first.result(PATIENCE)[0] == 200
    assert len(waiting.result(PATIENCE)[1]["hits"]) == WAITING
    assert server.post("/search", query="one more")[0] == 200


def test_error_is_told_to_the_log_alone_and_fails_its_own_request(
    server: Server, sentence_model: SentenceTransformer
) -> None:
    first = server.occupy()
    found = [server.later("/search", query=query) for query in ("poison", "make an archive")]
    until(lambda: server.health()["waiting"] == 2)
    server.gate.touch()
    assert first.result(PATIENCE)[0] == 200
    assert found[0].result(PATIENCE) == (500, {"detail": "internal error"})
    check_hits(sentence_model, "make an archive", *found[1].result(PATIENCE)[1]["hits"], k=10)
    until(lambda: "RuntimeError: secret of" in server.log.read_text())
    assert server.post("/search", query="show open ports")[0] == 200
    assert server.health()["ready"]


def header(path: str, length: int) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {length}", "", ""]
    return "\r\n".join(lines).encode()


def half_a_request(server: Server) -> socket.socket:
    """A connection over which a header and a part of its body have come."""
    connection = socket.create_connection(("127.0.0.1", server.port), PATIENCE)
    connection.sendall(
        b"POST /search HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    )
    return connection


def test_slow_and_vanishing_clients_hold_up_nobody(server: Server, sentence_model: SentenceTransformer) -> None:
    slow = [half_a_request(server) for _ in range(40)]
    deaf = []
    for _ in range(20):  # asks for more than a socket holds, and reads nothing
        deaf.append(socket.create_connection(("127.0.0.1", server.port), PATIENCE))
        body = json.dumps({"texts": ["a file"] * 64, "task": "document"}).encode()
        deaf[-1].sendall(header("/encode", len(body)) + body)
    status, found = server.post("/search", query="make an archive")
    assert status == 200
    check_hits(sentence_model, "make an archive", *found["hits"], k=10)
    for connection in (*slow, *deaf):  # gone without a goodbye
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    assert server.post("/search", query="show open ports")[0] == 200


def test_a_client_that_goes_while_its_query_is_encoded_costs_no_other(
    server: Server, sentence_model: SentenceTransformer
) -> None:
    first = server.occupy()
    gone = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    gone.request("POST", "/search", json.dumps({"query": "gone"}), {"Content-Type": "application/json"})
    kept = server.later("/search", query="make an archive")
    until(lambda: server.health()["waiting"] == 2)
    gone.close()
    server.gate.touch()
    assert first.result(PATIENCE)[0] == 200
    check_hits(sentence_model, "make an archive", *kept.result(PATIENCE)[1]["hits"], k=10)
    until(lambda: server.health()["waiting"] == 0)


def test_requests_are_answered_in_their_order(sentence_model: SentenceTransformer) -> None:
    order: list[int] = []

    async def call(service: Service) -> None:
        async def one(number: int) -> None:
            await service.encode([TEXTS[number]], "query")
            order.append(number)

        await asyncio.gather(*map(one, range(20)))

    answers(sentence_model, EMPTY, call, batch_texts=3)
    assert order == list(range(20))


def test_a_body_that_comes_too_slowly_is_refused() -> None:
    sent: list[dict[str, Any]] = []
    parts = [{"type": "http.request", "body": b"{", "more_body": True}]

    async def receive() -> dict[str, Any]:
        return parts.pop() if parts else await asyncio.get_running_loop().create_future()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["type"] == "http.request" and message["more_body"]:
            pass
        await send({"type": "http.response.start", "status": 400 if message["type"] == "http.disconnect" else 200})
        if message["type"] == "http.disconnect":
            raise ConnectionError("the client has gone")

    asyncio.run(Deadline(app, 0.05)({"type": "http"}, receive, send))
    assert sent[0]["status"] == 408 and (b"connection", b"close") in sent[0]["headers"] and len(sent) == 2
    sent.clear()
    parts += [{"type": "http.request", "body": b"}", "more_body": False}]
    asyncio.run(Deadline(app, PATIENCE)({"type": "http"}, receive, send))
    assert [message["status"] for message in sent] == [200]

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("not the client's fault")

    with pytest.raises(RuntimeError, match="not the client's fault"):
        asyncio.run(Deadline(broken, PATIENCE)({"type": "http"}, receive, send))


def answers(model: Any, index: Any, call: Callable[[Service], Any], **options: Any) -> Any:
    async def run() -> Any:
        async with Service(model, index, fingerprint="f", **options) as service:
            return await call(service)

    return asyncio.run(run())


EMPTY = SimpleNamespace(origins={})


def test_vectors_of_every_kind(sparse_model: SparseEncoder, multi_vector_model: MultiVectorEncoder) -> None:
    texts = ["show open ports", "list files"]
    found = answers(sparse_model, EMPTY, lambda service: service.encode(texts, "document"))
    dense = np.zeros((2, 64))
    for row, vector in zip(dense, json.loads(json.dumps(found)), strict=True):
        row[vector["indices"]] = vector["values"]
    np.testing.assert_allclose(dense, sparse_model.encode_document(texts).to_dense(), atol=1e-5)
    found = answers(multi_vector_model, EMPTY, lambda service: service.encode(texts, "query"))
    for vectors, expected in zip(json.loads(json.dumps(found)), multi_vector_model.encode_query(texts), strict=True):
        np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_strangers_are_refused(sentence_model: SentenceTransformer) -> None:
    foreign = SimpleNamespace(origins={"v": Origin("v", "sentence", 32, "cosine", "another")})
    with pytest.raises(polyrep.InputError, match="made by model another, not by f"):
        Service(sentence_model, foreign, fingerprint="f")
    with pytest.raises(polyrep.InputError, match="a head alone"):
        Service(sentence_model[0].model, EMPTY, fingerprint="f")


def test_a_service_that_could_answer_nothing_is_refused(sentence_model: SentenceTransformer) -> None:
    for limits in ({"batch_texts": 0}, {"waiting_texts": 0}):
        with pytest.raises(polyrep.InputError, match="no request could be answered"):
            Service(sentence_model, EMPTY, fingerprint="a", **limits)
    with pytest.raises(polyrep.InputError, match="k=0"):
        asyncio.run(Service(sentence_model, EMPTY, fingerprint="a").search(["open ports"], 0))


def test_request_that_is_given_up_does_not_stop_the_others(sentence_model: SentenceTransformer) -> None:
    async def call(service: Service) -> Any:
        gone, kept = (asyncio.create_task(service.encode([text], "query")) for text in ("gone", "kept"))
        await asyncio.sleep(0)  # both have handed over their texts
        gone.cancel()
        with pytest.raises(Busy):
            await service.encode(["a"] * 3, "query")
        return await kept

    found = answers(sentence_model, EMPTY, call, waiting_texts=4)
    np.testing.assert_allclose(found, sentence_model.encode_query(["kept"]), atol=1e-5)
