"""The back ends in this process against brute force in float64, and their folders against whatever stops a change."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from conftest import needs_seismic, run_python
from scipy.sparse import csr_matrix

from polyrep import InputError, files
from polyrep.encoding import Embeddings
from polyrep.encoding.embeddings import in_memory
from polyrep.encoding.shards import Origin, Shard
from polyrep.files import file_sha256
from polyrep.search import Added, Hit, Index, local, open_index
from polyrep.search.protocol import as_embeddings

DIM = {"sentence": 16, "tokens": 8, "sparse": 300, "routed": 8}
KEYS = 60
CASES = [
    ("memory:", "sentence", "dot"),
    ("memory:", "sentence", "cosine"),
    ("memory:", "sentence", "euclidean"),
    ("memory:", "tokens", "maxsim"),
    ("memory:", "tokens", "meanmaxsim"),
    ("memory:", "sparse", "dot"),
    ("memory:", "routed", "routed"),
    ("routed:{}", "routed", "routed"),
    ("routed:{}", "routed", "routed_unclamped"),
    ("faiss:{}?index=flat", "sentence", "dot"),
    ("faiss:{}?index=flat", "sentence", "cosine"),
    ("faiss:{}?index=hnsw", "sentence", "dot"),
    ("faiss:{}?index=hnsw", "sentence", "cosine"),
    ("seismic:{}", "sparse", "dot"),
    ("qdrant:{}", "sentence", "dot"),
    ("qdrant:{}", "tokens", "maxsim"),
    ("qdrant:{}", "sparse", "dot"),
]
ON_DISK = [
    ("faiss:{}", "sentence", "dot"),
    ("faiss:{}?index=hnsw", "sentence", "dot"),
    ("seismic:{}", "sparse", "dot"),
    ("routed:{}", "routed", "routed"),
]
OWN = {"sentence": "dot", "sparse": "dot", "routed": "routed"}
"""Similarity of a kind, where a test takes one."""

Texts = dict[str, np.ndarray]  # id -> its vector, or its (vectors, dim), of routed ones with the key before each


def texts(kind: str, count: int, seed: int, prefix: str = "d") -> Texts:
    """Vectors of unequal lengths, or words drawn alone; all texts share word or key 0, so that no score is 0."""
    rng = np.random.default_rng(seed)
    drawn: Texts = {}
    for number in range(count):
        if kind == "sparse":
            vector = np.zeros(DIM[kind])
            vector[rng.choice(DIM[kind], 20, replace=False)] = rng.gamma(1.5, 0.5, 20)
            vector[0] = rng.uniform(0.1, 0.2)
        elif kind == "routed":
            vector = rng.standard_normal((rng.integers(2, 9), 1 + DIM[kind]))
            vector[:, 0] = rng.integers(0, KEYS, len(vector))
            vector[0] = np.abs(vector[0]) * (np.arange(1 + DIM[kind]) > 0)  # under key 0, and alike everywhere
        else:
            vector = rng.standard_normal((rng.integers(1, 6), DIM[kind])[kind == "sentence" :]) * rng.uniform(0.5, 2)
        drawn[f"{prefix}{number}é"] = vector.astype(np.float16)
    return drawn


def packed(kind: str, vectors: list[np.ndarray]) -> Embeddings:
    if kind == "sentence":
        return in_memory(np.stack(vectors))
    if kind == "tokens":
        return in_memory(np.concatenate(vectors), np.cumsum([0, *map(len, vectors)]))
    if kind == "routed":
        entries, offsets = np.concatenate(vectors), np.cumsum([0, *map(len, vectors)])
        return Embeddings(kind, entries[:, 1:], offsets, entries[:, 0].astype(np.int32), DIM[kind], 0.0, Path())
    terms = [np.flatnonzero(vector) for vector in vectors]
    values = np.concatenate([vector[term] for vector, term in zip(vectors, terms, strict=True)])
    offsets = np.cumsum([0, *map(len, terms)])
    return Embeddings("sparse", values, offsets, np.concatenate(terms).astype(np.int32), DIM[kind], 0.0, Path())


def shard(kind: str, documents: Texts, similarity: str = "", name: str = "v", checksum: str = "") -> Shard:
    origin = Origin(name, kind, DIM[kind], similarity or OWN[kind], "model", vocabulary=KEYS * (kind == "routed"))
    return Shard(list(documents), packed(kind, list(documents.values())), origin, checksum)


def score(similarity: str, query: np.ndarray, document: np.ndarray) -> float:
    query, document = query.astype(np.float64), document.astype(np.float64)
    if similarity == "euclidean":
        return -float(np.linalg.norm(query - document))
    if similarity == "cosine":
        return float(query @ document / np.linalg.norm(query) / np.linalg.norm(document))
    if similarity == "dot":
        return float(query @ document)
    if similarity.startswith("routed"):
        least = 0.0 if similarity == "routed" else -np.inf
        met = [[q[1:] @ d[1:] for d in document if d[0] == q[0]] for q in query]
        return float(sum(max(max(products), least) for products in met if products))
    best = [max(float(q @ d) for d in document) for q in query]
    return sum(best) / (len(best) if similarity == "meanmaxsim" else 1)


def oracle(similarity: str, queries: Texts, documents: Texts, k: int) -> list[list[Hit]]:
    found = []
    for query in queries.values():
        hits = [Hit(identifier, score(similarity, query, vectors)) for identifier, vectors in documents.items()]
        found.append(sorted(hits, key=lambda hit: hit.score, reverse=True)[:k])
    return found


def same(found: list[list[Hit]], expected: list[list[Hit]]) -> bool:
    assert [[hit.id for hit in row] for row in found] == [[hit.id for hit in row] for row in expected]
    for row, truth in zip(found, expected, strict=True):
        assert [hit.score for hit in row] == pytest.approx([hit.score for hit in truth], rel=1e-5, abs=1e-6)
    return True


def closed(index: Index) -> None:
    """Let go of the folder, where a back end holds it."""
    getattr(index, "close", lambda: None)()


Opener = Callable[[], Index]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0].format('')}-{case[1]}-{case[2]}")
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Opener, str, str]:
    uri, kind, similarity = request.param
    return lambda **more: open_index(uri.format(tmp_path / "index"), **more), kind, similarity


@pytest.fixture(params=ON_DISK, ids=lambda case: case[0].format(""))
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Opener, str, Path]:
    """A back end with a folder, in which 40 documents are."""
    uri, kind, _ = request.param
    path = tmp_path / "index"
    open_index(uri.format(path)).add([shard(kind, texts(kind, 40, 1), checksum="one")])
    return lambda **more: open_index(uri.format(path), **more), kind, path


def test_back_ends_find_what_brute_force_finds(case):
    opened, kind, similarity = case
    documents, queries, index = texts(kind, 60, 1), texts(kind, 7, 2, "q"), opened()
    halves = [dict(list(documents.items())[:40]), dict(list(documents.items())[40:])]
    assert index.add(shard(kind, half, similarity) for half in halves) == Added(60, 0, 0)
    assert index.count() == 60
    asked = packed(kind, list(queries.values()))
    assert same(index.search(asked, 10), oracle(similarity, queries, documents, 10))
    assert same(index.search({"v": asked}, 100), oracle(similarity, queries, documents, 60))  # more than there are
    assert all(type(hit) is Hit and type(hit.score) is float for row in index.search(asked, 3) for hit in row)


def test_a_later_document_replaces_an_earlier_one(case):
    opened, kind, similarity = case
    documents, queries, index = texts(kind, 30, 1), texts(kind, 3, 2, "q"), opened()
    newer = texts(kind, 12, 3)  # ids of the first 12
    twice = shard(kind, texts(kind, 1, 4, "d") | {"x": texts(kind, 1, 5)["d0é"]}, similarity)
    twice = replace(twice, ids=["x", "x"])  # within a shard, too, the last one counts
    assert index.add([shard(kind, documents, similarity), shard(kind, newer, similarity), twice]) == Added(44, 13, 0)
    truth = documents | newer | {"x": texts(kind, 1, 5)["d0é"]}
    asked = packed(kind, list(queries.values()))
    assert same(index.search(asked, 40), oracle(similarity, queries, truth, 40))
    assert index.add([shard(kind, dict(list(documents.items())[:5]), similarity)]) == Added(5, 5, 0)
    assert same(index.search(asked, 40), oracle(similarity, queries, truth | dict(list(documents.items())[:5]), 40))
    assert index.count() == 31


def test_deleted_documents_are_not_found(case):
    opened, kind, similarity = case
    documents, queries, index = texts(kind, 30, 1), texts(kind, 3, 2, "q"), opened()
    asked = packed(kind, list(queries.values()))
    assert index.delete(["d1é"]) == 0
    index.add([shard(kind, documents, similarity, checksum="one")])
    gone = [identifier for identifier in documents if int(identifier[1:-1]) % 3 == 0]
    assert index.delete([*gone, gone[0], "unknown"]) == 10
    rest = {identifier: vectors for identifier, vectors in documents.items() if identifier not in gone}
    assert index.count() == 20
    assert same(index.search(asked, 30), oracle(similarity, queries, rest, 30))
    assert index.add([shard(kind, documents, similarity, checksum="one")]) == Added(30, 20, 0)  # they come back
    assert same(index.search(asked, 5), oracle(similarity, queries, documents, 5))
    assert index.delete(documents) == 30
    assert (index.count(), index.search(asked, 5)) == (0, [[], [], []])
    if not isinstance(index, type(open_index("memory:"))):
        closed(index)
        index = opened()
        assert (index.count(), index.search(asked, 5)) == (0, [[], [], []])
    index.add([shard(kind, rest, similarity)])
    assert same(index.search(asked, 5), oracle(similarity, queries, rest, 5))


def test_known_shards_are_passed_over(case):
    opened, kind, similarity = case
    shards = [shard(kind, texts(kind, 9, seed, f"s{seed}-"), similarity, checksum=str(seed)) for seed in range(3)]
    index = opened()
    assert index.add(shards[:2]) == Added(18, 0, 0)
    assert index.add(shards) == Added(9, 0, 2)
    assert index.add(shards) == Added(0, 0, 3)
    assert index.count() == 27


def test_strangers_are_refused(case):
    opened, kind, similarity = case
    index, mine = opened(), shard(kind, texts(kind, 5, 1), similarity)
    with pytest.raises(InputError, match="empty, so there is nothing to search in"):
        index.search(mine.vectors)
    index.add([mine])
    other = next(name for name in DIM if name != kind)
    for origin, words in {
        replace(mine.origin, kind=other): r"have kind|holds \w+ vectors, not",
        replace(mine.origin, dim=77): f"have dim {DIM[kind]}, these have 77",
        replace(mine.origin, similarity="manhattan"): f"have similarity {similarity}, these have manhattan",
        replace(mine.origin, fingerprint="stranger"): "made by model model, these by stranger",
    }.items():
        with pytest.raises(InputError, match=words):
            index.add([replace(mine, origin=origin)])
    for queries, words in {
        "width": f"queries are {kind} of width 3",
        "nan": "a number that is not finite",
        "k": "k=0, so nothing could be found",
        "name": "asked for other; it has v",
    }.items():
        asked = replace(mine.vectors, dim=3) if queries == "width" else mine.vectors
        if queries == "nan":
            asked = replace(asked, values=np.full_like(asked.values, np.nan))
        with pytest.raises(InputError, match=words):
            index.search({"other": asked} if queries == "name" else asked, 0 if queries == "k" else 10)
    assert index.count() == 5
    closed(index)
    index = opened(force=True)
    index.add([replace(mine, origin=replace(mine.origin, fingerprint="stranger"))])
    assert index.count() == 5


def test_queries_come_in_every_form(case):
    opened, kind, similarity = case
    documents, queries, index = texts(kind, 20, 1), list(texts(kind, 4, 2).values()), opened()
    index.add([shard(kind, documents, similarity)])
    wide = [query.astype(np.float32) for query in queries]
    forms = [packed(kind, queries)]
    if kind == "routed":  # which have keys, so that no array is enough
        forms.append(replace(forms[0], values=forms[0].values.astype(np.float32)))
    elif kind == "sparse":
        matrix = torch.from_numpy(np.stack(wide))
        forms += [csr_matrix(np.stack(wide)), matrix.to_sparse(), matrix.to_sparse_csr()]
    else:
        forms += [wide, [torch.from_numpy(query) for query in wide]]
        forms += [np.stack(wide), torch.from_numpy(np.stack(wide)).double()] if kind == "sentence" else []
    expected = index.search(forms[0], 5)
    assert all(index.search(form, 5) == expected for form in forms) and len(expected) == 4
    assert index.search(as_embeddings(forms[0], index.origins["v"], "test"), 5) == expected


def test_a_folder_opened_again_is_the_same_index(stored):
    opened, kind, path = stored
    queries = texts(kind, 5, 2)
    asked = packed(kind, list(queries.values()))
    index = opened()
    index.add([shard(kind, texts(kind, 10, 3, "e"), checksum="two")])
    index.delete(["d0é", "e1é"])
    index.add([shard(kind, texts(kind, 2, 4), checksum="three")])
    found = index.search(asked, 50)
    truth = texts(kind, 40, 1) | texts(kind, 10, 3, "e") | texts(kind, 2, 4)
    del truth["e1é"]
    again = opened(fingerprint="model")
    assert (again.count(), again.origins) == (49, index.origins)
    assert same(again.search(asked, 50), oracle(OWN[kind], queries, truth, 50)) and again.search(asked, 50) == found
    assert again.add([shard(kind, texts(kind, 2, 4), checksum="three")]) == Added(0, 0, 1)
    assert sorted(p.name for p in path.iterdir()) == [".lock", "00000004", "polyrep.json"]
    with pytest.raises(InputError, match="made by model model, not by other"):
        opened(fingerprint="other")


@pytest.mark.parametrize("first", [True, False])
def test_a_kill_before_a_generation_counts_leaves_the_old_index(stored, first, monkeypatch):
    opened, kind, path = stored
    if first:
        shutil.rmtree(path)
    index, real = opened(), os.replace
    asked, more = packed(kind, list(texts(kind, 3, 2).values())), shard(kind, texts(kind, 8, 7), checksum="two")
    before = [] if first else index.search(asked)

    def refuse(source: Path, target: Path) -> None:
        if Path(target).name == "polyrep.json" and any(path.glob("0*/ids.bin")):
            written = max(path.glob("0*/ids.bin"))
            assert written.parent.name == ("00000001" if first else "00000002")
            raise OSError("killed")
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", refuse)
        if first:
            with pytest.raises(OSError, match="killed"):
                index.add([more])
        for change in () if first else (lambda: index.add([more]), lambda: index.delete(["d1é"])):
            with pytest.raises(OSError, match="killed"):
                change()
    for survivor in (index, opened()):
        assert survivor.count() == (0 if first else 40)
        assert first or survivor.search(asked) == before
    assert index.add([more]) == Added(8, 0 if first else 8, 0)
    assert opened().search(asked) == index.search(asked) != before
    assert len(list(path.glob("0*"))) == 1, "one generation is left"


KILLS = """
import os, signal, sys
import test_search as helpers
from polyrep.search import open_index

uri, kind, path = sys.argv[1:]
asked = helpers.packed(kind, list(helpers.texts(kind, 3, 2).values()))
new = helpers.shard(kind, helpers.texts(kind, 8, 7, "new"), checksum="two")

def killed(step):
    pid = os.fork()
    if pid == 0:
        seen = [0]

        def hook(event, arguments):
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and path in str(arguments[0]):
                seen[0] += 1
                if seen[0] == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        index = open_index(uri)
        sys.addaudithook(hook)
        index.add([new])
        os._exit(0)
    return os.waitpid(pid, 0)[1] == signal.SIGKILL

before, step, states = open_index(uri).search(asked), 1, set()
while killed(step):
    index, step = open_index(uri), step + 1
    states.add(index.count())
    if index.count() == 48:
        break
    assert index.count() == 40 and index.search(asked) == before, step
else:
    index = open_index(uri)
assert step > 8 and 40 in states, step
index.add([new])
index.add([helpers.shard(kind, helpers.texts(kind, 1, 9, "last"))])
assert index.count() == open_index(uri).count() == 49
assert len([name for name in os.listdir(path) if name.isdigit()]) == 1
print("survived", step)
"""
"""Ends, as by kill -9, what adds to an index, at every change that it makes to a file, one after another."""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_killed_at_any_change_of_a_file_an_index_is_the_old_or_the_new_one(stored):
    opened, kind, path = stored
    closed(opened())
    result = run_python("-c", KILLS, opened().where, kind, str(path))
    assert result.returncode == 0 and "survived" in result.stdout, result.stderr[-3000:]


def test_an_error_among_shards_leaves_the_old_index(stored):
    opened, kind, _ = stored
    asked = packed(kind, list(texts(kind, 3, 2).values()))
    index = opened()
    before, stranger = index.search(asked, 99), shard(kind, texts(kind, 1, 1), "cosine")
    with pytest.raises(InputError, match=f"have similarity {OWN[kind]}, these have cosine"):
        index.add([shard(kind, texts(kind, 9, 5), checksum="two"), stranger])
    assert index.search(asked, 99) == before == opened().search(asked, 99)


def test_two_writers_do_not_lose_documents_without_a_word(stored):
    opened, kind, _ = stored
    one, two = opened(), opened()
    one.add([shard(kind, texts(kind, 3, 5, "one"))])
    with pytest.raises(InputError, match="changed by another process"):
        two.add([shard(kind, texts(kind, 3, 5, "two"))])
    assert two.count() == 43 and two.add([shard(kind, texts(kind, 3, 5, "two"))]) == Added(3, 0, 0)


def test_damage_is_refused_by_name(stored, tmp_path):
    opened, kind, path = stored
    manifest, folder = path / "polyrep.json", path / "00000001"
    content = manifest.read_text()
    for file in sorted(folder.iterdir()):
        kept = file.read_bytes()
        file.write_bytes(kept[:-1])
        with pytest.raises(InputError, match=f"{file.name}: has {len(kept) - 1:,} bytes, expected {len(kept):,}"):
            opened()
        file.unlink()
        with pytest.raises(InputError, match=f"{file.name}: is missing"):
            opened()
        file.write_bytes(kept)
    ids = folder / "ids.bin"
    kept = ids.read_bytes()
    ids.write_bytes(b"\xff" * len(kept))
    with pytest.raises(InputError, match="00000001: cannot be read"):
        opened()
    ids.write_bytes(kept)
    for broken, words in {
        content[:-9]: "polyrep.json: cannot be read",
        "[]": "polyrep.json: cannot be read",
        json.dumps(json.loads(content) | {"backend": "other"}): "for other, not polyrep-index-1 for",
        json.dumps(json.loads(content) | {"generation": 9}): "is missing",
        json.dumps({k: v for k, v in json.loads(content).items() if k != "arrays"}): "'arrays'",
    }.items():
        manifest.write_text(broken)
        with pytest.raises(InputError, match=words):
            opened()
    manifest.unlink()
    with pytest.raises(InputError, match="polyrep.json: missing, but .* holds something"):
        opened()
    shutil.rmtree(path)
    assert opened().count() == 0 and not path.exists()  # looking writes nothing


@pytest.mark.parametrize(("uri", "kind", "similarity"), [*ON_DISK, ("qdrant:{}", "sentence", "dot")])
def test_an_index_that_cannot_be_written_is_refused_before_a_shard_is_read(uri, kind, similarity, tmp_path):
    (tmp_path / "taken").write_text("a file where a folder belongs")
    read: list[Shard] = []
    index = open_index(uri.format(tmp_path / "taken" / "index"))
    with pytest.raises(InputError, match="taken is no folder"):
        index.add(read.append(one) or one for one in [shard(kind, texts(kind, 3, 1))] * 2)
    assert len(read) <= 1


def test_a_manifest_of_a_stranger_leads_nowhere(stored, tmp_path):
    opened, kind, path = stored
    manifest = path / "polyrep.json"
    whole = json.loads(manifest.read_text())
    (tmp_path / "outside.bin").write_bytes(bytes(160))
    (origin,) = whole["origins"].values()
    for more in (
        {"arrays": whole["arrays"] | {"../../outside": ["<f4", [40]]}},
        {"files": whole["files"] | {"../../outside.bin": 160}},
        {"arrays": whole["arrays"] | {"live": ["O", [40]]}},  # pointers, which numpy would follow
        {"arrays": whole["arrays"] | {"live": ["<i8", [2**32, 2**32]]}},  # whose product is 0 in 64 bits
        {"arrays": whole["arrays"] | {"live": ["<i8", [-40]]}},
        {"arrays": []},
        {"origins": {}},
        {"origins": {"v": origin | {"dim": 2**40}}},
        {"origins": {"v": origin | {"dim": "16"}}},
        {"origins": {"v": origin | {"kind": "tokens"}}},
        {"origins": {"v": origin | {"similarity": "manhattan"}}},
        {"origins": {"w": origin}},
        {"origins": {"v": origin | {"more": 1}}},
        {"settings": [1]},
        {"shards": [[]]},
        {"generation": -1},
    ):
        manifest.write_text(json.dumps(whole | more))
        with pytest.raises(InputError):
            opened()
    for generation in ("1", True, -1, None):
        manifest.write_text(json.dumps(whole | {"generation": generation}))
        with pytest.raises(InputError, match=f"its generation is {generation!r}, not a number from 0 on"):
            opened()
    manifest.write_text("[" * 100_000)
    with pytest.raises(InputError, match="polyrep.json: cannot be read"):
        opened()
    manifest.write_text(json.dumps(whole))
    for positions in ([-1, *range(1, 40)], [*range(39), 40], [0, *range(39)]):
        (path / "00000001" / "live.bin").write_bytes(np.array(positions, np.int64).tobytes())
        with pytest.raises(InputError, match="positions that no document has"):
            opened()


@pytest.mark.parametrize("variant", ["flat", "hnsw"])
def test_faiss_reads_only_what_was_written_or_cannot_lead_it_astray(variant, tmp_path):
    uri, path = f"faiss:{tmp_path}/index?index={variant}", tmp_path / "index"
    open_index(uri).add([shard("sentence", texts("sentence", 200, 1))])
    file, manifest = path / "00000001" / "index.faiss", path / "polyrep.json"
    content, whole = file.read_bytes(), json.loads(manifest.read_text())
    assert whole["sha256"] == {"index.faiss": hashlib.sha256(content).hexdigest()}
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match="SHA-256 is not the one that was written"):
        open_index(uri)
    del whole["sha256"]  # as older indexes are, and as a stranger may have it
    manifest.write_text(json.dumps(whole))
    assert open_index(uri).count() == 200
    huge, far = (2**39).to_bytes(8, "little"), (10**9).to_bytes(4, "little")
    places = {0: b"IxF2", 4: far, 8: huge, 32: b"\0", 33: far, 37: huge}
    if variant == "hnsw":
        import faiss

        engine = faiss.deserialize_index(np.frombuffer(content, np.uint8))
        links = faiss.vector_to_array(engine.hnsw.neighbors).tobytes()
        start = content.index(links)
        levels = content.index(faiss.vector_to_array(engine.hnsw.levels).tobytes())
        after = start + len(links)
        high = int(np.argmin(faiss.vector_to_array(engine.hnsw.levels)))  # a vector of the lowest level alone
        upper = faiss.vector_to_array(engine.hnsw.offsets)[engine.hnsw.entry_point] + 64
        places |= {start: far, start - 8: huge, levels: far, levels - 8: huge, after: far, after + 4: far}
        places |= {start + 4 * int(upper): high.to_bytes(4, "little"), after + 20: b"IxF2"}
    for place, wrong in places.items():
        file.write_bytes(content[:place] + wrong + content[place + len(wrong) :])
        with pytest.raises(InputError, match="00000001: cannot be read"):
            open_index(uri)
    file.write_bytes(content)
    assert open_index(uri).count() == 200


@needs_seismic
def test_words_outside_the_vocabulary_are_refused(tmp_path):
    uri = f"seismic:{tmp_path}/index"
    open_index(uri).add([shard("sparse", texts("sparse", 9, 1))])
    for name, wrong in {"indices": np.int32(300), "offsets": np.int64(10**9), "values": np.float16("nan")}.items():
        file = tmp_path / "index" / "00000001" / f"{name}.bin"
        content = file.read_bytes()
        file.write_bytes(content[:8] + wrong.tobytes() + content[8 + wrong.nbytes :])
        with pytest.raises(InputError, match="00000001: cannot be read"):
            open_index(uri)
        file.write_bytes(content)
    assert open_index(uri).count() == 9


def test_two_stages_rank_candidates_anew():
    index = open_index("memory:?prefetch=12")
    first, second = texts("sentence", 50, 1), texts("tokens", 50, 2)
    for identifier in list(second)[::4]:
        del second[identifier]  # cannot be ranked, so it is left out
    index.add([shard("sentence", first, name="one")])
    assert index.add([shard("tokens", second, "maxsim", "many", "x")]) == Added(37, 0, 0)
    assert index.count() == 50
    asked = texts("sentence", 6, 3), texts("tokens", 6, 4)
    queries = {
        name: packed(kind, list(texts.values()))
        for name, kind, texts in zip(("one", "many"), ("sentence", "tokens"), asked, strict=True)
    }
    expected = []
    for row, candidates in enumerate(oracle("dot", asked[0], first, 12)):
        kept = {hit.id: second[hit.id] for hit in candidates if hit.id in second}
        assert 0 < len(kept) < 12
        expected += oracle("maxsim", dict([list(asked[1].items())[row]]), kept, 10)
    assert same(index.search(queries, 10), expected)
    assert same(index.search(queries, 3), [row[:3] for row in expected])
    assert same(index.search({"many": queries["many"]}, 60), oracle("maxsim", asked[1], second, 60))
    with pytest.raises(InputError, match="so say which the queries are for"):
        index.search(queries["one"])
    index.delete(second)  # nothing is left for the second stage
    assert (index.count(), index.search(queries, 5)) == (13, [[]] * 6)


def test_ties_go_to_the_higher_id():
    index = open_index("memory:")
    origin = Origin("v", "sentence", 2, "dot", "m")
    index.add([Shard(["a", "c", "b", "d"], in_memory(np.ones((4, 2), np.float32)), origin)])
    assert index.search(np.ones((1, 2)), 2) == [[Hit("d", 2.0), Hit("c", 2.0)]]
    index.delete(["a"])
    assert index.search(np.ones((1, 2)), 2) == [[Hit("d", 2.0), Hit("c", 2.0)]]


def test_one_kind_of_vectors_means_one_stage(stored):
    opened, kind, _ = stored
    index = opened()
    more = "memory:" if kind == "routed" else "memory: or qdrant:"
    with pytest.raises(InputError, match=f"no place for 'second' beside them.*{more}"):
        index.add([shard(kind, texts(kind, 3, 1), name="second")])
    asked = packed(kind, [texts(kind, 1, 1)["d0é"]])
    with pytest.raises(InputError, match=f"no second stage. Use {more}"):
        index.search({"v": asked, "second": asked})


@pytest.mark.parametrize(
    ("uri", "kind", "similarity"),
    [("faiss:{}", "sentence", "euclidean"), ("seismic:{}", "sparse", "cosine"), ("routed:{}", "routed", "maxsim")],
)
def test_similarities_that_an_engine_lacks_are_refused(uri, kind, similarity, tmp_path):
    index = open_index(uri.format(tmp_path / "index"))
    with pytest.raises(InputError, match=f"are compared by {similarity}.*Use memory:"):
        index.add([shard(kind, texts(kind, 3, 1), similarity)])


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("other:x", "other is no back end"),
        ("faiss:", "names no folder. Write faiss:///absolute/path"),
        ("faiss:///", "names no folder"),
        ("seismic://relative/path", "with three slashes"),
        ("faiss:a#b", "%23 stands for #"),
        ("memory:/tmp", "there is no path"),
        ("memory:?prefetch=0", "prefetch=0: expected a whole number"),
        ("memory:?fetch=1", "unknown settings fetch. There are prefetch"),
        ("faiss:x?index=ivf", "there are index=flat and index=hnsw"),
        ("faiss:x?index=hnsw&m=1", "m of 2 or more"),
        ("faiss:x?m=8", "unknown settings m"),
        ("seismic:x?heap_factor=1.5", "heap_factor=1.5: expected a number above 0, 1 at most"),
        ("seismic:x?max_fraction=nan", "max_fraction=nan: expected a number above 0, 1000"),
        ("seismic:x?summary_energy=much", "summary_energy=much"),
        ("seismic:x?index=flat", "unknown settings index. There are n_postings"),
        ("routed:x?threshold=-1", "threshold=-1: entries have a length from 0 on.*0 keeps every entry"),
        ("routed:x?search_threshold=nan", "search_threshold=nan: entries have a length"),
        (
            "routed:x?precision=binary",
            "precision=binary: entries cannot be stored so. Use one of float16",
        ),
        ("routed:x?m=8", "unknown settings m. There are threshold, precision and search_threshold"),
    ],
)
def test_uris_that_mean_nothing_are_refused(uri, words):
    with pytest.raises(InputError, match=words):
        open_index(uri)


def test_paths_may_be_relative_and_hold_spaces(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    open_index("faiss:some%20where/index").add([shard("sentence", texts("sentence", 3, 1))])
    assert open_index(f"faiss://{tmp_path}/some where/index").count() == 3


@pytest.mark.parametrize(("package", "extra"), [("faiss", "search"), ("seismic", "seismic")])
def test_a_missing_package_is_named(package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf'{package}: not installed.*pip install "polyrep\[{extra}\]"'):
        open_index(f"{package}:x")


def random_vectors(count: int, seed: int) -> np.ndarray:
    """Of lengths that differ up to tenfold."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, 16)) * rng.lognormal(0, 0.7, (count, 1))).astype(np.float32)


def test_a_graph_finds_vectors_of_unequal_lengths(tmp_path):
    documents, queries = random_vectors(3_000, 1), random_vectors(50, 2)
    index = open_index(f"faiss:{tmp_path}/index?index=hnsw&ef_construction=60&ef_search=64")
    origin = Origin("v", "sentence", 16, "dot", "m")
    index.add([Shard([str(n) for n in range(3_000)], in_memory(documents), origin)])
    truth = np.argsort(-(queries.astype(np.float64) @ documents.T), axis=1)
    found = [{int(hit.id) for hit in row} for row in index.search(queries, 10)]
    assert np.mean([len(row & set(best[:10])) / 10 for row, best in zip(found, truth, strict=True)]) > 0.98
    gone = np.random.default_rng(3).permutation(3_000)[:1_490]
    assert index.delete([str(n) for n in gone]) == 1_490
    assert index.engine.ntotal == 3_000  # passed over, as the graph keeps them
    rest = [best[~np.isin(best, gone)].tolist() for best in truth]
    hurried = open_index(f"faiss:{tmp_path}/index?ef_search=20")  # half of as many candidates would not do
    found = [[int(hit.id) for hit in row] for row in hurried.search(queries, 20)]
    assert {len(row) for row in found} == {20}
    assert np.mean([len({*row} & {*best[:20]}) / 20 for row, best in zip(found, rest, strict=True)]) > 0.93
    every = index.search(queries[:2], 5_000)
    assert [[int(hit.id) for hit in row] for row in every] == rest[:2]
    index.delete([str(n) for n in np.setdiff1d(np.arange(3_000), gone)[:310]])
    assert index.engine.ntotal == index.count() == 1_200  # built again, since 60 % were unused
    assert open_index(f"faiss:{tmp_path}/index").search(queries, 10) == index.search(queries, 10)


def test_a_graph_that_leads_to_too_few_is_not_trusted(tmp_path):
    index = open_index(f"faiss:{tmp_path}/index?index=hnsw&ef_search=1&m=2")
    documents = texts("sentence", 60, 1)
    index.add([shard("sentence", documents)])
    index.engine.hnsw.neighbors = type(index.engine.hnsw.neighbors)()
    index.engine.hnsw.neighbors.resize(60 * 4 * 8)
    index.engine.hnsw.reset()
    index.engine.hnsw.entry_point = -1  # as if no document could be reached
    queries = texts("sentence", 4, 2)
    found = index.search(packed("sentence", list(queries.values())), 5)
    assert same(found, oracle("dot", queries, documents, 5))


def test_what_an_index_was_built_with_stays(tmp_path):
    uri = f"faiss:{tmp_path}/index"
    open_index(f"{uri}?index=hnsw&m=8").add([shard("sentence", texts("sentence", 9, 1))])
    for settings in ("index=flat", "index=hnsw&m=16", "m=32"):
        with pytest.raises(InputError, match=r"built with {'index': 'hnsw', 'm': 8}, not .* cannot be changed"):
            open_index(f"{uri}?{settings}")
    index = open_index(f"{uri}?ef_search=300")
    assert (index.settings, index.ef_search, index.count()) == ({"index": "hnsw", "m": 8}, 300, 9)


def test_documents_that_are_not_finite_are_refused(tmp_path):
    index = open_index(f"faiss:{tmp_path}/index")
    documents = {"a": np.full(DIM["sentence"], np.inf, np.float32)}
    with pytest.raises(InputError, match="a document has a number that is not finite"):
        index.add([shard("sentence", documents)])
    assert index.count() == 0 and not index.origins


@needs_seismic
def test_seismic_keeps_what_it_built(tmp_path):
    uri, documents, queries = f"seismic:{tmp_path}/index", texts("sparse", 50, 1), texts("sparse", 4, 2)
    documents = {n: v.astype(np.float32) * 1.0001 for n, v in documents.items()}  # no number of them fits in float16
    asked = packed("sparse", list(queries.values()))
    index = open_index(uri)
    index.add([shard("sparse", documents)])
    assert same(index.search(asked, 50), oracle("dot", queries, documents, 50))
    (kept,) = (tmp_path / "index").glob("*/*.seismic")
    before = kept.stat().st_mtime_ns
    again = open_index(f"{uri}?heap_factor=1.0&query_cut=500")
    assert same(again.search(asked, 50), oracle("dot", queries, documents, 50))
    assert kept.stat().st_mtime_ns == before
    content = kept.read_bytes()
    kept.write_bytes(content[: len(content) // 2])
    assert same(open_index(uri).search(asked, 50), oracle("dot", queries, documents, 50))
    assert kept.stat().st_size == len(content)
    open_index(f"{uri}?n_postings=300").search(asked)
    assert len(list(kept.parent.glob("*.seismic"))) == 2


@needs_seismic
def test_seismic_leaves_out_what_shares_no_word(tmp_path):
    index = open_index(f"seismic:{tmp_path}/index")
    # The first has a word past those of 16 bits, the second its words in no order, the last none.
    vectors = csr_matrix(([1.0, 3.0, 2.0], [70_000, 9, 5], [0, 1, 3, 3]), shape=(3, 70_001))
    origin = Origin("v", "sparse", 70_001, "dot", "m")
    index.add([Shard(["a", "b", "c"], as_embeddings(vectors, origin, "test"), origin)])
    queries = csr_matrix(([1.0, 3.0, 1.0, 1.0], ([0, 0, 2, 3], [70_000, 9, 6, 5])), shape=(5, 70_001))
    assert index.search(queries) == [[Hit("b", 9.0), Hit("a", 1.0)], [], [], [Hit("b", 2.0)], []]


def test_a_large_file_of_an_engine_is_hashed_once_until_it_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGE", 1)
    index = open_index(f"faiss:{tmp_path}/index")
    index.add([shard("sentence", texts("sentence", 20, 1))])
    read = []
    monkeypatch.setattr(files, "file_sha256", lambda path: read.append(path) or file_sha256(path))
    for _ in range(2):
        open_index(f"faiss:{tmp_path}/index")
    assert len(read) == 1
    read[0].write_bytes(read[0].read_bytes()[:-1] + b"\x01")
    with pytest.raises(InputError, match="its SHA-256 is not the one that was written"):
        open_index(f"faiss:{tmp_path}/index")


def test_a_drive_of_windows_stands_after_three_slashes(monkeypatch):
    monkeypatch.setattr(local, "ON_WINDOWS", True)
    for uri, folder in {
        "faiss:///C:/an%20index": "C:/an index",
        "faiss:C:/index": "C:/index",
        "faiss:///srv/x": "/srv/x",
    }.items():
        assert local.folder_of(urlsplit(uri)) == Path(folder)
