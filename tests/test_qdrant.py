"""Qdrant as a back end: the embedded library itself, and our path to a server against a stand-in over HTTP."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import ROOT, run_python
from scipy.sparse import csr_matrix

from polyrep.encoding import Embeddings
from polyrep.encoding.embeddings import in_memory
from polyrep.encoding.shards import Origin, Shard
from polyrep.errors import InputError
from polyrep.search import Added, open_index

pytest.importorskip("qdrant_edge")
pytest.importorskip("qdrant_client")

from qdrant_server import StandIn  # noqa: E402

from polyrep.search import qdrant, qdrant_engine, qdrant_remote  # noqa: E402

DIM, WORDS = 8, 30


def vectors_of(kind: str, count: int, seed: int = 0, dtype: type = np.float32) -> Embeddings:
    """Random vectors of ``count`` texts."""
    rng = np.random.default_rng(seed)
    if kind == "sentence":
        return in_memory(rng.normal(size=(count, DIM)).astype(dtype))
    offsets = np.concatenate([[0], np.cumsum(rng.integers(2, 6, count))]).astype(np.int64)
    if kind == "tokens":
        return in_memory(rng.normal(size=(offsets[-1], DIM)).astype(dtype), offsets)
    terms = [np.sort(rng.choice(WORDS, length, replace=False)) for length in np.diff(offsets)]
    weights = rng.random(offsets[-1]).astype(dtype)
    return Embeddings("sparse", weights, offsets, np.concatenate(terms).astype(np.int32), WORDS, 0.0, Path())


def shard_of(
    vectors: Embeddings,
    similarity: str = "dot",
    *,
    name: str = "first",
    ids: list[str] | None = None,
    checksum: str = "",
    fingerprint: str = "a" * 64,
    precision: str = "float32",
) -> Shard:
    origin = Origin(name, vectors.kind, vectors.dim, similarity, fingerprint, precision)
    return Shard(ids or [f"d{i}" for i in range(len(vectors))], vectors, origin, checksum)


def texts_of(vectors: Embeddings) -> list[np.ndarray]:
    """Vectors of each text as float64 matrices; sparse ones written out."""
    values = vectors.values.astype(np.float64)
    if vectors.offsets is None:
        return [row[None] for row in values]
    parts = [slice(a, b) for a, b in zip(vectors.offsets, vectors.offsets[1:], strict=False)]
    if vectors.indices is None:
        return [values[part] for part in parts]
    return [np.bincount(vectors.indices[part], values[part], WORDS)[None] for part in parts]


def score(query: np.ndarray, document: np.ndarray, similarity: str) -> float:
    """The definition, in float64."""
    if similarity == "euclidean":
        return -float(np.sqrt(((query - document) ** 2).sum()))
    if similarity == "manhattan":
        return -float(np.abs(query - document).sum())
    if similarity == "cosine":
        query, document = query / np.linalg.norm(query), document / np.linalg.norm(document)
    best = (query @ document.T).max(1)
    return float(best.mean() if similarity == "meanmaxsim" else best.sum())


def brute_force(
    queries: Embeddings, documents: Embeddings, similarity: str, k: int, among: list[list[int]] | None = None
) -> list[list[tuple[str, float]]]:
    texts, found = texts_of(documents), []
    for row, query in enumerate(texts_of(queries)):
        candidates = range(len(texts)) if among is None else among[row]
        scores = [(f"d{i}", score(query, texts[i], similarity)) for i in candidates]
        found.append(sorted(scores, key=lambda hit: -hit[1])[:k])
    return found


def same(found: list[list[Any]], expected: list[list[tuple[str, float]]], tolerance: float = 1e-5) -> bool:
    assert [[hit.id for hit in hits] for hits in found] == [[hit[0] for hit in hits] for hits in expected]
    for hits, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose([hit.score for hit in hits], [hit[1] for hit in wanted], rtol=tolerance)
    return True


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr(qdrant_remote, "PAUSE", 0.001)
    monkeypatch.delenv("QDRANT_API_KEY", raising=False)
    with StandIn() as server:
        yield server


@pytest.fixture(params=["embedded", "server"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "embedded":
        return f"qdrant://{tmp_path}/index"
    return f"qdrant+http://{request.getfixturevalue('stand_in').address}/index"


@pytest.mark.parametrize(
    ("kind", "similarity"),
    [(kind, similarity) for kind, known in qdrant_engine.SIMILARITIES.items() for similarity in known],
)
def test_scores_are_those_of_the_definition(uri: str, kind: str, similarity: str) -> None:
    documents, queries = vectors_of(kind, 40), vectors_of(kind, 5, seed=1)
    index = open_index(uri)
    assert index.add([shard_of(documents, similarity)]) == Added(documents=40)
    expected = brute_force(queries, documents, similarity, 7)
    if kind == "sparse":  # a document without a common term has no entry in an inverted index
        expected = [[hit for hit in hits if hit[1] > 0] for hits in expected]
    assert same(index.search(queries, 7), expected)


def test_half_precision_is_stored_and_scores_nearly_the_same(uri: str) -> None:
    documents, queries = vectors_of("tokens", 40, dtype=np.float16), vectors_of("tokens", 5, seed=1)
    index = open_index(uri)
    index.add([shard_of(documents, "maxsim", precision="int8")])
    found, expected = index.search(queries, 40), brute_force(queries, documents, "maxsim", 40)
    for hits, wanted in zip(found, expected, strict=True):  # Qdrant rounds the query, too
        np.testing.assert_allclose([h.score for h in hits], [w[1] for w in wanted], rtol=5e-3, atol=5e-3)
    assert index.engine._params(index.origins["first"], {}).datatype == "float16" if "http" in uri else True


@pytest.mark.parametrize("first", ["sparse", "sentence"])
def test_two_stages_rank_the_candidates_of_the_first_by_the_second(uri: str, first: str) -> None:
    """The second corpus has other documents as well; a document with one kind of vectors keeps them."""
    candidates, ranking = vectors_of(first, 30), vectors_of("tokens", 40, seed=2)
    index = open_index(uri + "?prefetch=10")
    assert index.add([shard_of(candidates)]) == Added(documents=30)
    assert index.add([shard_of(ranking, "maxsim", name="second")]) == Added(documents=40)
    assert index.count() == 40 and list(index.origins) == ["first", "second"]
    queries, tokens = vectors_of(first, 70, seed=3), vectors_of("tokens", 70, seed=4)
    among = [
        [int(name[1:]) for name, value in hits if first != "sparse" or value > 0]
        for hits in brute_force(queries, candidates, "dot", 10)
    ]
    index = reopened(index, uri + "?prefetch=10")
    found = index.search({"first": queries, "second": tokens}, 4)
    assert same(found, brute_force(tokens, ranking, "maxsim", 4, among))
    assert same(index.search({"second": tokens}, 3), brute_force(tokens, ranking, "maxsim", 3))


def reopened(index: Any, uri: str) -> Any:
    index.close()
    return open_index(uri)


def test_two_stages_are_one_request_for_many_queries(stand_in: StandIn) -> None:
    index = open_index(f"qdrant+http://{stand_in.address}/index")
    index.add([shard_of(vectors_of("sentence", 9)), shard_of(vectors_of("tokens", 9), "maxsim", name="second")])
    stand_in.requests.clear()
    index.search({"first": vectors_of("sentence", 64), "second": vectors_of("tokens", 64)}, 3)
    assert stand_in.requests == [("POST", "/collections/index/points/query/batch")]


def test_the_last_vector_of_an_id_counts_and_replacements_are_counted(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qdrant, "POINTS", 3)
    values = np.eye(DIM, dtype=np.float32)[:6]
    ids = ["x", "y", "x", "z", "y", "w"]  # x again in the batch of x, y in the next
    index = open_index(uri)
    assert index.add([shard_of(in_memory(values), ids=ids)]) == Added(documents=6, replaced=2)
    assert index.count() == 4
    assert [index.search(in_memory(values[i : i + 1]), 1)[0][0].id for i in (2, 3, 4, 5)] == ["x", "z", "y", "w"]
    # Of another kind nothing is there to be replaced, but for an id that comes twice.
    again = shard_of(in_memory(values), name="second", ids=ids)
    assert index.add([again]) == Added(documents=6, replaced=2)
    assert index.add([again]) == Added(documents=6, replaced=6)
    assert index.add([shard_of(in_memory(values[:1]), ids=["x"])]) == Added(documents=1, replaced=1)
    assert same(index.search({"second": in_memory(values[2:3])}, 1), [[("x", 1.0)]])
    index.close()


def test_a_shard_is_written_once_until_documents_are_deleted(uri: str) -> None:
    shard = shard_of(vectors_of("sentence", 5), checksum="c" * 64)
    index = open_index(uri)
    assert index.delete(["d1"]) == index.count() == 0
    assert index.add([shard, shard]) == Added(documents=5, shards_known=1)
    index = reopened(index, uri)
    assert index.add([shard]) == Added(shards_known=1)
    assert index.delete(["d1", "d4", "d1", "nobody"]) == 2 and index.count() == 3
    index = reopened(index, uri)
    assert {hit.id for hit in index.search(vectors_of("sentence", 1), 9)[0]} == {"d0", "d2", "d3"}
    assert index.add([shard]) == Added(documents=5, replaced=3) and index.count() == 5
    index.close()


def test_a_document_that_lost_its_vectors_is_not_found_by_them(uri: str) -> None:
    full, offsets = vectors_of("tokens", 3), np.array([0, 1, 1, 2])
    index = open_index(uri)
    index.add([shard_of(full, "maxsim")])
    index.add([shard_of(in_memory(full.values[:2], offsets), "maxsim")])
    assert index.count() == 3
    assert {hit.id for hit in index.search([full.values[:2]], 5)[0]} == {"d0", "d2"}
    assert index.search([full.values[:0], full.values[:2]], 1)[0] == []
    index.close()


def test_vectors_of_another_model_are_refused_unless_forced(uri: str) -> None:
    index, other = open_index(uri), shard_of(vectors_of("sentence", 2), fingerprint="b" * 64)
    index.add([shard_of(vectors_of("sentence", 4))])
    with pytest.raises(InputError, match="made by model aaaaaaaaaaaa"):
        index.add([other])
    with pytest.raises(InputError, match="have similarity dot"):
        index.add([shard_of(vectors_of("sentence", 2), "cosine")])
    with pytest.raises(InputError, match="cannot score tokens vectors by dot"):
        index.add([shard_of(vectors_of("tokens", 2), name="second")])
    index.close()
    with pytest.raises(InputError, match="not by bbbbbbbbbbbb"):
        open_index(uri, fingerprint="b" * 64)
    index = open_index(uri, fingerprint="b" * 64, force=True)
    assert index.add([other]) == Added(documents=2, replaced=2)
    index.close()


def test_settings_are_checked_and_kept(uri: str) -> None:
    index = open_index(uri + "?quantization=binary&on_disk=true")
    index.add([shard_of(vectors_of("sentence", 4)), shard_of(vectors_of("tokens", 4), "maxsim", name="second")])
    index = reopened(index, uri + "?quantization=binary")
    queries, documents = vectors_of("sentence", 2, seed=1), vectors_of("sentence", 4)
    assert same(index.search({"first": queries}, 4), brute_force(queries, documents, "dot", 4))
    index.close()
    with pytest.raises(InputError, match="made with quantization=binary, which quantization=none cannot change"):
        open_index(uri + "?quantization=none")
    with pytest.raises(InputError, match="quantization=int4: expected none or int8 or binary"):
        open_index(uri + "?quantization=int4")
    with pytest.raises(InputError, match="unknown settings shard"):
        open_index(uri + "?shard=3")
    with pytest.raises(InputError, match="prefetch=0"):
        open_index(uri + "?prefetch=0")


def test_what_a_server_collection_is_made_with(stand_in: StandIn) -> None:
    """Also vectors that come later must be placed, quantized and left without a graph as the settings say."""
    where = f"qdrant+http://{stand_in.address}/index?shards=3&replicas=2&quantization=int8&on_disk=true"
    tokens = shard_of(vectors_of("tokens", 4), "maxsim", name="tokens")
    dense = shard_of(vectors_of("sentence", 4), "euclidean", name="dense", precision="int8")
    sparse = shard_of(vectors_of("sparse", 4), name="sparse", precision="float16")
    open_index(where).add([tokens, dense, sparse])
    made = stand_in.collections["index"]
    assert (made["shard_number"], made["replication_factor"]) == (3, 2)
    assert made["sparse_vectors"]["sparse"]["index"] == {"datatype": "float16", "memory": "cold"}
    assert made["vectors"]["tokens"] == {
        "size": DIM,
        "distance": "Dot",
        "multivector_config": {"comparator": "max_sim"},
        "datatype": "float32",
        "memory": "cold",
        "hnsw_config": {"m": 0},
    }
    quantization = {"scalar": {"type": "int8", "memory": "pinned"}}
    assert made["vectors"]["dense"] == {
        "size": DIM,
        "distance": "Euclid",
        "datatype": "float16",
        "memory": "cold",
        "quantization_config": quantization,
    }


def test_several_vectors_have_no_graph_in_a_folder(tmp_path: Path) -> None:
    """A scan of candidates needs none, and building one over every vector of every document takes hours."""
    index = open_index(f"qdrant://{tmp_path}/index")
    index.add([shard_of(vectors_of("tokens", 4), "maxsim", name="early"), shard_of(vectors_of("sentence", 4))])
    index.add([shard_of(vectors_of("tokens", 4), "maxsim", name="late")])
    made = json.loads((tmp_path / "index/shard/edge_config.json").read_text())["vectors"]
    index.close()
    graphs = {name: (params.get("hnsw_config") or {}).get("m", 16) for name, params in made.items()}
    assert graphs == {"early": 0, "first": 16, "late": 0}


def test_requests_stay_small_unless_one_document_is_large() -> None:
    lengths = np.array([1, 300, 1, 20000, 1, 1])
    vectors = in_memory(np.zeros((lengths.sum(), 64), np.float16), np.concatenate([[0], np.cumsum(lengths)]))
    sizes = lengths * 64 * qdrant.NUMBER
    bounds = list(qdrant.batches(vectors))
    assert bounds == [(0, 3), (3, 4), (4, 6)] and sizes[3] > qdrant.BYTES > sizes[:3].sum()
    many = list(qdrant.batches(in_memory(np.zeros((1000, 4)))))
    assert many == [(0, 256), (256, 512), (512, 768), (768, 1000)]


def test_a_folder_that_is_foreign_locked_or_damaged_is_refused(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    for name, text in {"notes.txt": "mine", "polyrep.json": '{"format": "of another back end"}'}.items():
        (tmp_path / "foreign" / name).write_text(text)
        with pytest.raises(InputError, match="no polyrep.json of this back end"):
            open_index(f"qdrant://{tmp_path}/foreign")
    uri = f"qdrant://{tmp_path}/index"
    index = open_index(uri)
    with pytest.raises(InputError, match="empty"):
        index.search(vectors_of("sentence", 1))
    index.add([shard_of(vectors_of("sentence", 4))])
    with pytest.raises(InputError, match="If a process has it open"):
        open_index(uri)
    index.close()
    next((tmp_path / "index/shard/segments").rglob("segment.json")).write_text("{")
    with pytest.raises(InputError, match="damaged: delete the folder"):
        open_index(uri)
    (tmp_path / "index/polyrep.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        open_index(uri)
    with pytest.raises(InputError, match="names no folder"):
        open_index("qdrant://index")


def test_a_vector_name_that_was_not_recorded_is_no_obstacle(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a crash between the two steps."""
    index = open_index(uri)
    index.add([shard_of(vectors_of("sentence", 4))])
    second = shard_of(vectors_of("tokens", 4), "maxsim", name="second")
    with monkeypatch.context() as patch:
        send = qdrant_remote.Server._call
        patch.setattr(qdrant_engine.Embedded, "record", crash)
        patch.setattr(
            qdrant_remote.Server, "_call", lambda s, m, **a: crash() if m == "update_collection" else send(s, m, **a)
        )
        with pytest.raises(KeyboardInterrupt):
            index.add([second])
    index = reopened(index, uri)
    assert index.add([second]) == Added(documents=4)
    assert len(index.search({"second": vectors_of("tokens", 1)}, 9)[0]) == 4
    index.close()


def crash(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def corpora(documents: int = 256, shards: int = 6) -> list[Shard]:
    """Two corpora of the same documents in shards."""
    found = []
    for name, kind, similarity in (("first", "sentence", "dot"), ("second", "tokens", "maxsim")):
        for number in range(shards):
            vectors = vectors_of(kind, documents, seed=number)
            ids = [f"{number}/{i}" for i in range(documents)]
            found.append(shard_of(vectors, similarity, name=name, ids=ids, checksum=f"{name}-{number}"))
    return found


def content(uri: str) -> list[Any]:
    """What an index holds, as far as one can see, rounded for JSON."""
    index = open_index(uri)
    queries = {"first": vectors_of("sentence", 20, seed=99), "second": vectors_of("tokens", 20, seed=98)}
    found = [index.search({name: vectors}, 2000) for name, vectors in queries.items()] + [index.search(queries, 20)]
    index.close()
    return [index.records, json.loads(json.dumps([[sorted(hits) for hits in part] for part in found]))]


def die_at(number: int) -> None:
    """Have a step of the engine be the last of this process, which ends as by kill -9, within it or right after."""
    steps, moment = count(1), random.Random(number).uniform(1e-5, 5e-3)

    def dying(step: Any) -> Any:
        def taken(*arguments: Any) -> Any:
            if next(steps) < number:
                return step(*arguments)
            signal.setitimer(signal.ITIMER_REAL, moment)  # SIGALRM ends a process that does not ask for it
            step(*arguments)
            signal.pause()

        return taken

    for name in ("write", "flush", "record"):
        setattr(qdrant_engine.Embedded, name, dying(getattr(qdrant_engine.Embedded, name)))


def survive_kills(folder: str) -> None:
    """Upload undisturbed, then with children that do not live to the end; runs in a process of its own, to fork."""
    shards = corpora()

    def upload(name: str, last: int | None = None) -> int:
        child = os.fork()
        if not child:
            if last:
                die_at(last)
            open_index(f"qdrant://{folder}/{name}").add(shards)
            os._exit(0)
        return os.waitpid(child, 0)[1]

    assert upload("whole") == 0
    records, before = Path(folder, "killed/polyrep.json"), []
    for last in (2, 5, 9, 13):  # a shard takes three steps, so that they do not all die in the same one
        assert upload("killed", last) == signal.SIGALRM
        before.append(records.read_text().count("true") if records.exists() else 0)
    assert upload("killed") == 0
    print(json.dumps([before, content(f"qdrant://{folder}/whole") == content(f"qdrant://{folder}/killed")]))


def test_kills_in_mid_upload_lose_nothing(tmp_path: Path) -> None:
    result = run_python("-c", f"import test_qdrant; test_qdrant.survive_kills({str(tmp_path)!r})")
    assert result.returncode == 0, result.stderr
    before, equal = json.loads(result.stdout.splitlines()[-1])
    assert equal and before == sorted(before) and 0 < before[-1] < len(corpora(1)), before


@pytest.mark.parametrize("failure", ["drop", "lose", 503, 429])
def test_a_server_that_stumbles_is_asked_again(stand_in: StandIn, failure: Any) -> None:
    where = f"qdrant+http://{stand_in.address}/index"
    shards = corpora(40, 3)
    stand_in.failures = {"/points": [failure] * 2, "/points/vectors": [failure]}
    index = open_index(where)
    assert index.add(shards) == Added(documents=240)
    assert not any(stand_in.failures.values())
    whole = f"qdrant+http://{stand_in.address}/whole"
    open_index(whole).add(shards)
    assert content(where) == content(whole)


def test_a_server_that_stays_away_costs_the_open_shard(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qdrant, "POINTS", 20)
    monkeypatch.setattr(qdrant_remote, "TRIES", 3)
    shards = corpora(40, 3)[:3]
    where = f"qdrant+http://{stand_in.address}/index"

    def upload() -> Iterator[Shard]:
        yield shards[0]
        # Of the second shard a batch is looked up and written, and the next one stays without an answer.
        stand_in.failures = {"/points": [None, None, 503, 503, 503]}
        yield from shards[1:]

    with pytest.raises(InputError, match=r"no answer to \w+ in 3 tries.* 40 documents .* Run it again"):
        open_index(where).add(upload())
    stand_in.failures = {}
    assert open_index(where).add(shards) == Added(documents=80, replaced=20, shards_known=1)
    with pytest.raises(InputError, match="no answer to info in 1 tries"):
        open_index("qdrant+http://127.0.0.1:9/index")


def test_a_refusal_is_no_reason_to_ask_again(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    where = f"qdrant+http://{stand_in.address}/index"
    index = open_index(where)
    index.add([shard_of(vectors_of("sentence", 4))])
    stand_in.requests.clear()
    stand_in.failures = {"/points": [422]}
    with pytest.raises(InputError, match="refused retrieve.*422"):
        index.add([shard_of(vectors_of("sentence", 4))])
    assert len(stand_in.requests) == 1
    stand_in.key = "secret"
    with pytest.raises(InputError, match="QDRANT_API_KEY") as refusal:
        index.count()
    assert "secret" not in str(refusal.value)
    monkeypatch.setenv("QDRANT_API_KEY", "secret")
    with pytest.warns(UserWarning, match="insecure"):
        assert open_index(where).count() == 4


def test_a_collection_that_is_foreign_dropped_or_of_an_old_server(stand_in: StandIn) -> None:
    where, shard = f"qdrant+http://{stand_in.address}/index", shard_of(vectors_of("sentence", 4), checksum="c" * 64)
    index = open_index(where)
    index.add([shard])
    index.engine.client.delete_collection("index")
    assert open_index(where).add([shard]) == Added(documents=4)
    stand_in.collections["index"]["metadata"] = {"owner": "somebody"}
    with pytest.raises(InputError, match="not made by polyrep"):
        open_index(where)
    stand_in.version = "1.18.2"
    with pytest.raises(InputError, match="is Qdrant 1.18.2, .* Use 1.19 or later"):
        open_index(where)
    with pytest.raises(InputError, match="names no collection"):
        open_index(f"qdrant+http://{stand_in.address}")


def test_sparse_queries_of_scipy(uri: str) -> None:
    documents = vectors_of("sparse", 12)
    index = open_index(uri)
    index.add([shard_of(documents)])
    query = csr_matrix(([1.0], ([0], [int(documents.indices[0])])), shape=(1, WORDS))
    assert index.search(query, 12)[0]
    index.close()


def test_the_cluster_of_the_manual_is_consistent() -> None:
    text = (ROOT / "docs/compose.yaml").read_text()
    file = yaml.safe_load(text)
    nodes = file["services"]
    assert len(nodes) == 3
    seed = next(iter(nodes))
    for name, node in nodes.items():
        assert node["image"].split(":v")[1].split(".")[:2] >= [str(part) for part in qdrant_remote.OLDEST]
        options = dict(zip(node["command"][1::2], node["command"][2::2], strict=True))
        joins = {} if name == seed else {"--bootstrap": f"http://{seed}:6335"}
        assert options == {"--uri": f"http://{name}:6335"} | joins
        assert node["environment"]["QDRANT__CLUSTER__ENABLED"] == "true"
        assert node["environment"]["QDRANT__SERVICE__API_KEY"].startswith("${QDRANT_API_KEY:?")
        assert "readyz" in node["healthcheck"]["test"][-1]
    assert len({node["ports"][0].rsplit(":", 1)[0] for node in nodes.values()}) == 3
    assert {node["volumes"][0].split(":")[0] for node in nodes.values()} == set(file["volumes"]) == set(nodes)


def test_a_panic_of_the_engine_is_said_in_a_sentence(tmp_path):
    index = open_index(f"qdrant:{tmp_path}/index")
    vectors = vectors_of("sentence", 5)
    index.add([shard_of(vectors)])

    class PanicException(BaseException):  # as the library's, which is no Exception
        pass

    class Damaged:
        def query_batch(self, request: Any) -> None:
            raise PanicException("offset entry exists")

        def count(self, request: Any) -> None:
            raise KeyboardInterrupt

    index.close()
    index.engine.shard = qdrant_engine._Guarded(Damaged(), index.where)
    with pytest.raises(InputError, match="the engine cannot query_batch it .offset entry exists.*delete the folder"):
        index.search(vectors)
    with pytest.raises(KeyboardInterrupt):
        index.count()


@pytest.mark.parametrize(
    "records",
    [
        {"polyrep/layout": [1]},
        {"polyrep/origin/first": {"name": "first"}},
        {"polyrep/origin/first": None},
        {"polyrep/origin/other": None},
        {"polyrep": "1"},
    ],
)
def test_records_of_a_stranger_are_refused(records, tmp_path):
    uri, path = f"qdrant:{tmp_path}/index", tmp_path / "index" / "polyrep.json"
    index = open_index(uri)
    index.add([shard_of(vectors_of("sentence", 5))])
    index.close()
    path.write_text(json.dumps(json.loads(path.read_text()) | records))
    with pytest.raises(InputError):
        open_index(uri)
    path.write_text('["polyrep"]')
    with pytest.raises(InputError, match="has no polyrep.json of this back end|not an object"):
        open_index(uri)
