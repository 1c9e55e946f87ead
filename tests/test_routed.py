"""Routed entries, which meet under equal keys alone: against loops in float64, on disk, from a model to a server."""

from __future__ import annotations

import asyncio
import logging
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DOCUMENTS, QUERIES, needs_seismic
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder
from test_encode import write_lines
from transformers import BertModel

from polyrep import InputError
from polyrep.encoding import Embeddings, EncodedCorpus, embed
from polyrep.encoding import encode as encoding
from polyrep.encoding.embeddings import by_document, in_memory, joined, row_of, rows
from polyrep.encoding.encode import encode
from polyrep.encoding.encoders import token_router_of
from polyrep.encoding.shards import Origin, Shard, manifest_of, write_shard
from polyrep.encoding.views import encode_views, views_of, weights_of_views
from polyrep.encoding.windows import Windows
from polyrep.evaluation.systems import bytes_per_document, costs_of
from polyrep.files import write_json
from polyrep.hub import fingerprint
from polyrep.methods.citadel.objective import Entries, routed_scores
from polyrep.search import Hit, Service, commands, exact_search, open_index, ranking, routed, scoring
from polyrep.search.ranking import rescore, tie_ranks
from polyrep.search.scoring import _score_routed

KEYS, DIM, WHOLE = 40, 8, 4


def drawn(
    texts: int, seed: int, *, dim: int = DIM, whole: int = WHOLE, keys: int = KEYS, least: int = 0
) -> Embeddings:
    """Texts of ``least`` to nine entries, the last of ``least``; some have several under one key."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(least, 10, texts)
    lengths[-1] = least
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    values = rng.standard_normal((offsets[-1], dim)).astype(np.float16)
    named = rng.integers(0, keys, offsets[-1]).astype(np.int32)
    sentences = rng.standard_normal((texts, whole)).astype(np.float16) if whole else None
    return Embeddings("routed", values, offsets, named, dim, 0.0, Path(), sentences=sentences)


def entries(side: Embeddings, text: int) -> list[tuple[int, np.ndarray]]:
    part = slice(*side.offsets[text : text + 2])
    return list(zip(side.indices[part].tolist(), side.values[part].astype(np.float64), strict=True))


def looped(queries: Embeddings, documents: Embeddings, clamp: bool) -> np.ndarray:
    """Scores by the formula, ``(queries, documents)`` in float64."""
    scores = np.zeros((len(queries), len(documents)))
    for row in range(len(queries)):
        for column in range(len(documents)):
            for key, vector in entries(queries, row):
                met = [float(vector @ other) for named, other in entries(documents, column) if named == key]
                scores[row, column] += max([*met, 0.0] if clamp else met) if met else 0.0
            if queries.sentences is not None:
                pair = queries.sentences[row].astype(np.float64), documents.sentences[column].astype(np.float64)
                scores[row, column] += pair[0] @ pair[1]
    return scores


def origin(clamp: bool = True, **more: Any) -> Origin:
    fields = {"vocabulary": KEYS, "sentence_dim": WHOLE} | more
    return Origin("routed", "routed", fields.pop("dim", DIM), "routed" if clamp else "routed_unclamped", "m", **fields)


def ids_of(documents: Embeddings, prefix: str = "d") -> list[str]:
    return [f"{prefix}{number}" for number in range(len(documents))]


def found_by(scores: np.ndarray, ids: list[str], k: int) -> list[list[Hit]]:
    """Hits of a matrix of scores, ties by the higher id."""
    ranked = [sorted(zip(row, ids, strict=True), key=lambda hit: (round(hit[0], 5), hit[1])) for row in scores]
    return [[Hit(name, float(score)) for score, name in row[::-1][:k]] for row in ranked]


def close(found: list[list[Hit]], expected: list[list[Hit]]) -> bool:
    assert [[hit.id for hit in row] for row in found] == [[hit.id for hit in row] for row in expected]
    for row, truth in zip(found, expected, strict=True):
        assert [hit.score for hit in row] == pytest.approx([hit.score for hit in truth], rel=1e-4, abs=1e-4)
    return True


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize(("whole", "chunk"), [(WHOLE, 2**26), (0, 4 * DIM * 5)])
def test_the_oracle_is_the_formula(clamp, whole, chunk, monkeypatch):
    for module in (scoring, ranking):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    queries, documents = drawn(9, 1, whole=whole, keys=10), drawn(30, 2, whole=whole, keys=10)
    assert 0 in queries.lengths and 0 in documents.lengths  # some have no entry
    expected = looped(queries, documents, clamp)
    assert not clamp or whole or expected.min() == 0
    np.testing.assert_allclose(_score_routed(queries, documents, clamp=clamp), expected, atol=1e-4)
    similarity = "routed" if clamp else "routed_unclamped"
    ranks = tie_ranks(ids_of(documents))
    places, scores = exact_search(queries, documents, ranks, similarity=similarity, k=30)
    np.testing.assert_allclose(np.take_along_axis(expected, places, 1), scores, atol=1e-4)
    again, rescored = rescore(queries, documents, places[:, ::-1], ranks, similarity=similarity)
    np.testing.assert_allclose(rescored, scores, atol=1e-4)
    assert (again == places).all()


def test_one_key_for_all_is_maxsim_and_weights_alone_are_a_sparse_product():
    queries, documents = (drawn(n, n, whole=0, keys=1, least=1) for n in (5, 20))
    late = [in_memory(side.values, side.offsets) for side in (queries, documents)]
    ranks = tie_ranks(ids_of(documents))
    found = exact_search(queries, documents, ranks, similarity="routed_unclamped", k=20)
    expected = exact_search(*late, ranks, similarity="maxsim", k=20)
    assert (found[0] == expected[0]).all()
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-3)

    sides = [drawn(n, n, whole=0, dim=1) for n in (5, 20)]
    sides = [replace(side, values=np.abs(side.values)) for side in sides]
    matrices = []
    for side, pool in zip(sides, (np.add, np.maximum), strict=True):  # sums of a query, the largest of a document
        matrix = np.zeros((len(side), KEYS))
        owner = np.repeat(np.arange(len(side)), side.lengths)
        pool.at(matrix, (owner, side.indices), side.values[:, 0].astype(np.float64))
        matrices.append(matrix)
    np.testing.assert_allclose(_score_routed(*sides), matrices[0] @ matrices[1].T, atol=1e-4)


def test_chosen_texts_blocks_and_windows_keep_keys_and_whole_texts():
    side = drawn(6, 1)
    for made in (rows(side, np.array([4, 0, 5])), joined([rows(side, np.array([4, 0])), row_of(side, 5)])):
        for place, text in enumerate((4, 0, 5)):
            assert [key for key, _ in entries(made, place)] == [key for key, _ in entries(side, text)]
            np.testing.assert_array_equal(made.sentences[place], side.sentences[text])
    assert made.sentence_dim == WHOLE and made.filled.all()
    found = by_document(side, np.array([0, 2, 5, 6]))
    assert found.windows is None and len(found) == found.documents == 3
    assert found.offsets.tolist() == side.offsets[[0, 2, 5, 6]].tolist()
    np.testing.assert_allclose(found.sentences[1], side.sentences[2:5].astype(np.float64).mean(0), rtol=2**-10)


@pytest.fixture(params=[2**16, 3], ids=["whole lists", "pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists that are read and written at once, and some entries at a time, for some queries at a time."""
    monkeypatch.setattr(routed, "PIECE", request.param)
    monkeypatch.setattr(routed, "QUERIES", 64 if request.param > 3 else 2)


@pytest.mark.parametrize("clamp", [True, False])
def test_the_index_is_the_oracle_after_every_change(clamp, pieces, tmp_path):
    queries, uri = drawn(7, 1), f"routed:{tmp_path}/index"
    disk, memory, known = open_index(uri), open_index("memory:"), origin(clamp)
    parts = [(ids_of(part, prefix), part) for part, prefix in ((drawn(25, 2), "a"), (drawn(9, 3), "b"))]
    newer = (["a3", "a20", "b1", "c"], drawn(4, 4))

    def check() -> None:
        for index in (disk, open_index(uri)):
            assert index.count() == memory.count()
            assert close(index.search(queries, 50), memory.search(queries, 50))
            assert close(index.search({"routed": row_of(queries, 2)}, 3), memory.search(row_of(queries, 2), 3))

    for index in (disk, memory):
        index.add(Shard(ids, vectors, known) for ids, vectors in parts)
    documents = joined([vectors for _, vectors in parts])
    truth = found_by(looped(queries, documents, clamp), [*parts[0][0], *parts[1][0]], 50)
    assert close(disk.search(queries, 50), truth)
    check()
    for index in (disk, memory):
        assert index.add([Shard(*newer, known)]).replaced == 3
    check()
    for index in (disk, memory):
        assert index.delete(["a0", "a24", "b1", "unknown"]) == 3
    check()
    for index in (disk, memory):
        index.add([Shard(["a0"], rows(queries, np.array([0])), known)])
    check()


def scores_in(hits: list[list[Hit]], ids: list[str]) -> np.ndarray:
    """Scores ``(queries, documents)`` from hits that name every document once."""
    assert all(sorted(hit.id for hit in row) == sorted(ids) for row in hits)
    found = [{hit.id: hit.score for hit in row} for row in hits]
    return np.array([[row[name] for name in ids] for row in found])


def stored_as(documents: Embeddings, precision: str, threshold: float) -> Embeddings:
    """Entries as an index holds them: those longer than a threshold, in steps of a 127th of their largest number."""
    kept = kept_above(documents, threshold)
    values = kept.values.astype(np.float64)
    if precision == "int8":
        steps = np.abs(values).max(1, keepdims=True) / 127
        values = np.rint(values / np.where(steps, steps, 1)) * steps
    return replace(kept, values=values)


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 2.5])
@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_index_oracle_and_a_step_of_training_give_one_score(precision, threshold, clamp, tmp_path):
    queries, documents = drawn(9, 1, keys=12), drawn(40, 2, keys=12)
    held = stored_as(documents, precision, threshold)
    assert 0 in queries.lengths and 0 in documents.lengths
    assert (held.lengths == 0).sum() > (documents.lengths == 0).sum() or not threshold  # it empties some
    expected = looped(queries, held, clamp)
    oracle = _score_routed(queries, held, clamp=clamp).numpy()
    np.testing.assert_allclose(oracle, expected, rtol=1e-5, atol=1e-4)
    index = open_index(f"routed:{tmp_path}/index?precision={precision}&threshold={threshold}")
    index.add([Shard(ids_of(documents), documents, origin(clamp))])
    assert index.statistics()["documents_without_entries"] == (held.lengths == 0).sum()
    found = scores_in(index.search(queries, len(documents)), ids_of(documents))
    np.testing.assert_allclose(found, oracle, rtol=1e-5, atol=1e-4)
    sides = [
        Entries(
            torch.from_numpy(side.indices.astype(np.int64)),
            torch.from_numpy(side.values.astype(np.float64)),
            torch.from_numpy(np.repeat(np.arange(len(side)), side.lengths)),
        )
        for side in (queries, held)
    ]
    whole = queries.sentences.astype(np.float64) @ documents.sentences.astype(np.float64).T
    trained = routed_scores(*sides, (len(queries), len(documents)), clamp).numpy() + whole
    np.testing.assert_allclose(trained, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("precision", "bytes_"), [("float16", 68), ("int8", 40), ("float32", 132)])
def test_an_entry_takes_as_many_bytes_as_are_said(precision, bytes_, tmp_path):
    documents = drawn(200, 1, dim=32)
    index = open_index(f"routed:{tmp_path}/index?precision={precision}")
    index.add([Shard(ids_of(documents), documents, origin(dim=32))])
    folder, total = tmp_path / "index" / "00000001", int(documents.offsets[-1])
    files = [folder / f"{name}.bin" for name in ("values", "scales", "places")]
    assert sum(file.stat().st_size for file in files if file.exists()) == total * bytes_
    assert bytes_per_document("routed", precision, dims=32, nnz=10) == 10 * bytes_
    assert isinstance(index.lists.values, np.memmap) and isinstance(index.lists.sentences, np.memmap)
    said = index.statistics()
    assert (said["entries"], said["documents"]) == (total, 200)
    assert said["entries_per_document"] == total / 200


@pytest.mark.parametrize("whole", [WHOLE, 0])
def test_a_row_says_what_entries_cost_and_how_many_are_multiplied(whole):
    queries, documents = (drawn(n, n, dim=32, whole=whole, keys=12) for n in (7, 30))
    found, pairs = costs_of(queries, documents), 0
    for row in range(7):
        asked = [key for key, _ in entries(queries, row)]
        pairs += sum(asked.count(key) for column in range(30) for key, _ in entries(documents, column))
    assert found["products"] == pytest.approx(pairs / (7 * 30))
    assert found["entries_per_document"] == pytest.approx(documents.offsets[-1] / 30)
    assert found["bytes_per_document"] == pytest.approx(documents.offsets[-1] / 30 * (32 * 2 + 4) + whole * 2)


def test_eight_bits_err_by_half_a_step_of_each_entry(tmp_path):
    queries, documents = drawn(6, 1), drawn(50, 2)
    index = open_index(f"routed:{tmp_path}/index?precision=int8")
    index.add([Shard(ids_of(documents), documents, origin())])
    step = np.abs(documents.values.astype(np.float64)).max() / 127 / 2
    exact = looped(queries, documents, True)
    for row, hits in enumerate(index.search(queries, 50)):
        allowed = sum(np.abs(vector).sum() for _, vector in entries(queries, row)) * step + 1e-3
        assert max(abs(hit.score - exact[row, int(hit.id[1:])]) for hit in hits) <= allowed


def test_a_corpus_in_eight_bits_is_indexed_as_it_is(tmp_path):
    documents, known = drawn(30, 2), replace(origin(), precision="int8")
    write_json(tmp_path / "corpus" / "manifest.json", manifest_of(known, task="document"))
    write_shard(tmp_path / "corpus", 0, ids_of(documents), documents, "int8")
    write_json(tmp_path / "corpus" / "complete.json", {"shards": 1})
    corpus = EncodedCorpus(tmp_path / "corpus")
    assert corpus.origin == known
    (shard,) = corpus
    disk, memory = open_index(f"routed:{tmp_path}/index"), open_index("memory:")
    for index in (disk, memory):
        index.add(corpus)
    assert disk.lists.values.dtype == np.int8
    order = np.argsort(documents.indices, kind="stable")
    codes = np.rint(documents.values / (np.abs(documents.values).max(1, keepdims=True).astype(np.float32) / 127))
    np.testing.assert_array_equal(disk.lists.values, codes[order])
    np.testing.assert_array_equal(shard.vectors.sentences, documents.sentences)
    queries = drawn(5, 1)
    assert close(disk.search(queries, 30), memory.search(queries, 30))
    assert open_index(f"routed:{tmp_path}/index").add(corpus).shards_known == 1


def kept_above(documents: Embeddings, threshold: float) -> Embeddings:
    kept = np.linalg.norm(documents.values.astype(np.float32), axis=1) > threshold
    owner = np.repeat(np.arange(len(documents)), documents.lengths)[kept]
    offsets = np.cumsum([0, *np.bincount(owner, minlength=len(documents))], dtype=np.int64)
    return replace(documents, values=documents.values[kept], indices=documents.indices[kept], offsets=offsets)


def test_a_threshold_leaves_out_short_entries_when_adding_and_when_searching(tmp_path):
    queries, documents = drawn(6, 1, whole=0), drawn(60, 2, whole=0)
    known, ids, scores = origin(sentence_dim=0), ids_of(documents), []
    open_index(f"routed:{tmp_path}/all").add([Shard(ids, documents, known)])
    kept = []
    for threshold in (0.0, 2.0, 2.8, 3.3):
        index = open_index(f"routed:{tmp_path}/{threshold}?threshold={threshold}")
        index.add([Shard(ids, documents, known)])
        expected = looped(queries, kept_above(documents, threshold), True)
        assert close(index.search(queries, 60), found_by(expected, ids, 60))
        later = open_index(f"routed:{tmp_path}/all?search_threshold={threshold}")
        assert close(later.search(queries, 60), index.search(queries, 60))
        scores.append(expected)
        kept.append(index.statistics()["entries"])
        assert open_index(f"routed:{tmp_path}/{threshold}").settings["threshold"] == threshold
    assert kept == sorted(kept, reverse=True) and len({*kept}) == 4
    assert all((less <= more).all() for more, less in zip(scores, scores[1:], strict=False))  # of what is clamped
    with pytest.raises(InputError, match=r"built with {'threshold': 2.0, .*cannot be changed"):
        open_index(f"routed:{tmp_path}/2.0?threshold=2.8")


def test_a_threshold_that_empties_the_corpus_is_refused(tmp_path):
    documents = drawn(20, 2)
    longest = float(np.linalg.norm(documents.values.astype(np.float32), axis=1).max())
    index = open_index(f"routed:{tmp_path}/index?threshold=1000")
    with pytest.raises(InputError, match=f"threshold=1000, but the longest entry .* length {longest:.4g}.*Use less"):
        index.add([Shard(ids_of(documents), documents, origin())])
    assert index.count() == 0 and open_index(f"routed:{tmp_path}/index").count() == 0
    open_index(f"routed:{tmp_path}/other").add([Shard(ids_of(documents), documents, origin())])
    with pytest.raises(InputError, match="search_threshold=1000, but the longest entry .* every list would be empty"):
        open_index(f"routed:{tmp_path}/other?search_threshold=1000")


def test_documents_without_entries_are_found_by_the_whole_text_or_counted(tmp_path, caplog):
    documents, place = drawn(20, 2), 19
    bare = int((documents.lengths == 0).sum())
    assert documents.lengths[place] == 0
    documents.sentences[place] *= 20
    with_whole, without = open_index(f"routed:{tmp_path}/a"), open_index(f"routed:{tmp_path}/b")
    with caplog.at_level(logging.WARNING):
        with_whole.add([Shard(ids_of(documents), documents, origin())])
        assert not caplog.records
        without.add([Shard(ids_of(documents), replace(documents, sentences=None), origin(sentence_dim=0))])
    assert f"{bare} of 20 documents have no entry and no vector of the whole text" in caplog.text
    for index in (with_whole, without):
        assert index.statistics()["documents_without_entries"] == bare
    asked = replace(drawn(1, 5), sentences=documents.sentences[place : place + 1])
    assert with_whole.search(asked, 1)[0][0].id == f"d{place}"


def test_lists_are_described_by_their_lengths(tmp_path):
    keys = np.array([3, 3, 3, 7, 7, 9], np.int32)  # three lists of 3, 2 and 1 entries
    values, offsets = np.ones((6, DIM), np.float16), np.array([0, 4, 4, 6])
    vectors = Embeddings("routed", values, offsets, keys, DIM, 0.0, Path())
    index = open_index(f"routed:{tmp_path}/index")
    assert index.statistics()["entries"] == 0
    index.add([Shard(["a", "b", "c"], vectors, origin(sentence_dim=0))])
    differences = sum(abs(one - other) for one in (1, 2, 3) for other in (1, 2, 3))
    expected = {"documents": 3, "entries": 6, "documents_without_entries": 1, "lists": 3, "longest_list": 3}
    expected |= {"entries_per_document": 2.0, "gini": pytest.approx(differences / (2 * 3 * 6))}
    assert index.statistics() == expected


def test_adding_holds_no_vectors_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(routed, "PIECE", 2**12)
    dim, texts, each = 256, 2_000, 20
    known = origin(sentence_dim=0, dim=dim)

    def shards() -> Iterator[Shard]:
        for number in range(40):
            part = np.arange(texts // 40 + 1, dtype=np.int64) * each
            values = np.full((part[-1], dim), 1 + number, np.float16)
            named = (np.arange(part[-1]) % KEYS).astype(np.int32)
            vectors = Embeddings("routed", values, part, named, dim, 0.0, Path())
            yield Shard([f"{number}-{n}" for n in range(texts // 40)], vectors, known)

    index = open_index(f"routed:{tmp_path}/index")
    routed_bytes = texts * each * dim * 2
    tracemalloc.start()
    index.add(shards())
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert index.lists.values.nbytes == routed_bytes and most < 0.7 * routed_bytes


def test_what_does_not_belong_into_an_index_is_refused(tmp_path):
    vectors, known, asked = drawn(5, 1), origin(), drawn(1, 3, least=2)
    stranger = replace(asked, indices=asked.indices * 0 + 99)
    broken = vectors.values.copy()
    broken[3] = np.nan
    whole = vectors.sentences.copy()
    whole[2] = np.inf
    owner = int(np.searchsorted(vectors.offsets, 3, "right")) - 1
    cases = {
        f"document 'd{owner}': an entry has a number that is not finite": replace(vectors, values=broken),
        "document 'd2': the vector of the whole text has a number": replace(vectors, sentences=whole),
        "has the key 40, but the vocabulary of 'routed' has 40 from 0 on": replace(
            vectors, indices=np.where(np.arange(len(vectors.values)) == 3, 40, vectors.indices)
        ),
        "vectors of whole texts of width 0, but 'routed' has 8 and 4": replace(vectors, sentences=None),
    }
    for uri in (f"routed:{tmp_path}/index", "memory:"):
        index = open_index(uri)
        for words, wrong in cases.items():
            with pytest.raises(InputError, match=words):
                index.add([Shard(ids_of(vectors), wrong, known)])
        index.add([Shard(ids_of(vectors), vectors, known)])
        for more, words in {
            "vocabulary": "have vocabulary 40, these have 50",
            "sentence_dim": "have sentence_dim 4, these have 50",
            "fingerprint": "were made by model m, these by 50",
        }.items():
            other = replace(known, **{more: 50 if more != "fingerprint" else "50"})
            with pytest.raises(InputError, match=words):
                index.add([Shard(ids_of(vectors), vectors, other)])
        with pytest.raises(InputError, match=r"query 0: has the key 99, but the vocabulary of 'routed' has 40"):
            index.search(stranger)
        with pytest.raises(InputError, match="of width 0, but 'routed' has 8 and 4"):
            index.search(replace(vectors, sentences=None))
        assert index.count() == 5
    index = open_index(f"routed:{tmp_path}/overflow")
    with pytest.raises(InputError, match="not finite in float16.*precision=float32"):
        index.add([Shard(ids_of(vectors), replace(vectors, values=vectors.values.astype("f4") * 1e6), known)])
    assert index.count() == 0


@needs_seismic
def test_other_engines_say_what_holds_routed_entries(tmp_path):
    vectors = drawn(5, 1)
    for uri in (f"faiss:{tmp_path}/a", f"seismic:{tmp_path}/b", f"qdrant:{tmp_path}/c"):
        with pytest.raises(InputError, match="vectors, not routed. Use routed: or memory:"):
            open_index(uri).add([Shard(ids_of(vectors), vectors, origin())])


def test_the_router_finds_what_routed_entries_rank():
    queries, documents, ids = drawn(6, 1), drawn(50, 2), [f"d{n}" for n in range(50)]
    weights = np.abs(np.random.default_rng(3).standard_normal((56, KEYS)))
    router = in_memory(weights.astype(np.float32))
    found = np.argsort(-(weights[50:] @ weights[:50].T), axis=1)[:, :12]
    scores, expected = looped(queries, documents, True), []
    for row, places in enumerate(found):
        expected += found_by(scores[row : row + 1, places], [ids[place] for place in places], 5)
    index = open_index("memory:?prefetch=12")
    index.add([Shard(ids, rows(router, np.arange(50)), Origin("router", "sentence", KEYS, "dot", "m"))])
    index.add([Shard(ids, documents, origin())])
    asked = {"router": rows(router, np.arange(50, 56)), "routed": queries}
    assert close(index.search(asked, 5), expected)
    assert close(index.search(asked, 5, weights={"router": 0, "routed": 1}, candidates=12), expected)


def test_a_damaged_list_is_refused_when_it_is_read(tmp_path):
    documents, queries = drawn(20, 2), drawn(5, 1)
    index = open_index(f"routed:{tmp_path}/index")
    index.add([Shard(ids_of(documents), documents, origin())])
    file = tmp_path / "index" / "00000001" / "places.bin"
    whole = np.frombuffer(file.read_bytes(), np.int32)
    for wrong in (whole[::-1], whole + 50, whole - 50):
        file.write_bytes(np.ascontiguousarray(wrong).tobytes())
        with pytest.raises(InputError, match="names no documents in order. The index is damaged"):
            open_index(f"routed:{tmp_path}/index").search(queries)
    file.write_bytes(whole.tobytes())
    bounds = tmp_path / "index" / "00000001" / "bounds.bin"
    content = np.frombuffer(bounds.read_bytes(), np.int64).copy()
    content[3] = content[-1] + 5
    bounds.write_bytes(content.tobytes())
    with pytest.raises(InputError, match="lists that end before they start"):
        open_index(f"routed:{tmp_path}/index")


class Routing(BertModel):
    """Keys are a token's own word, and of documents the next word too; words that five divides have no entry."""

    def encode_routed(self, input_ids: Any, attention_mask: Any, task: str | None = None, **more: Any) -> Any:
        states = self(input_ids=input_ids, attention_mask=attention_mask, **more).last_hidden_state
        size = self.get_input_embeddings().num_embeddings
        keys = (input_ids[..., None] + torch.arange(1 if task == "query" else 2)) % size
        mask = attention_mask.bool()[..., None] & (keys % 5 > 0)
        fields = {"keys": keys, "weights": 1.0 + keys % 3, "vectors": states[..., :6], "mask": mask}
        return fields | {"sentence_embedding": states[:, 0, :WHOLE]}


class Behind(SparseAutoEncoder):
    """The same behind other modules, which leaves entries in a batch."""

    def route(self, embeddings: Any) -> None:
        """For vectors that are there."""

    def forward(self, features: Any, **more: Any) -> Any:
        task, inputs = features.get("task"), {n: features[n] for n in ("input_ids", "attention_mask")}
        said = Routing.encode_routed(self.model.encoder[0], **inputs, task=task)
        features |= {name: value for name, value in said.items() if name != "sentence_embedding"}
        features["dense"] = said["sentence_embedding"]
        return super().forward(features)


@pytest.fixture
def model(sparse_model: SparseEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A sparse encoder with a router inside, which ``load`` gives for its folder."""
    sparse_model.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    double: Any = SparseEncoder(str(tmp_path / "model"), device="cpu")
    double[0].model.__class__ = Routing
    said = {"entry_dim": 6, "sentence_dim": WHOLE, "clamp": True}
    for name, value in said.items():
        setattr(double[0].model.config, name, value)
    for module in (encoding, commands):
        monkeypatch.setattr(module, "load", lambda *_, **__: double)
    return double


def alone(model: Any, text: str, task: str) -> tuple[list[tuple[int, np.ndarray]], np.ndarray]:
    """Entries of one text, unpadded, and the vector of the whole."""
    with torch.inference_mode():
        tokens = model.tokenizer(text, return_tensors="pt")
        states = BertModel.forward(model[0].model, **tokens).last_hidden_state[0].numpy().astype(np.float64)
    size, found = model[0].model.config.vocab_size, []
    for word, state in zip(tokens["input_ids"][0].tolist(), states, strict=True):
        for key in [word] if task == "query" else [word, (word + 1) % size]:
            if key % 5:
                found.append((key, (1 + key % 3) * state[:6]))
    return found, states[0, :WHOLE]


def expected_hits(model: Any, queries: list[str], documents: dict[str, str], k: int) -> list[list[Hit]]:
    sides, found = {name: alone(model, text, "document") for name, text in documents.items()}, []
    for query in queries:
        asked, whole = alone(model, query, "query")
        scores = []
        for others, other in sides.values():
            met = [[float(v @ d) for named, d in others if named == key] for key, v in asked]
            scores.append(sum(max([*products, 0.0]) for products in met) + whole @ other)
        found += found_by(np.array([scores]), list(sides), k)
    return found


def encoded(tmp_path: Path, *flags: str) -> Any:
    source = write_lines(tmp_path / "corpus.jsonl", DOCUMENTS)
    words = [str(tmp_path / "model"), "--input", str(source), "--output", str(tmp_path / "out"), "--shard_size", "2"]
    return encode([*words, *flags])


def test_a_model_is_encoded_indexed_searched_and_served(model, tmp_path):
    said = encoded(tmp_path, "--views", "router,routed", "--precision", "float32")
    assert {name: one["documents"] for name, one in said.items()} == {"router": 5, "routed": 5}
    corpus = EncodedCorpus(tmp_path / "out" / "routed")
    size, print_ = model[0].model.config.vocab_size, fingerprint(tmp_path / "model")
    more = {"precision": "float32", "vocabulary": size, "sentence_dim": WHOLE}
    assert corpus.origin == Origin("routed", "routed", 6, "routed", print_, **more)
    texts = dict(DOCUMENTS)
    for shard in corpus:
        for place, name in enumerate(shard.ids):
            ours, (theirs, whole) = entries(shard.vectors, place), alone(model, texts.pop(name), "document")
            assert [key for key, _ in ours] == [key for key, _ in theirs]
            np.testing.assert_allclose([v for _, v in ours], [v for _, v in theirs], atol=1e-5)
            np.testing.assert_allclose(shard.vectors.sentences[place], whole, atol=1e-5)
    assert not texts
    uri, queries = f"routed://{tmp_path}/index", list(QUERIES.values())
    commands.index([str(tmp_path / "out" / "routed"), "--uri", uri])
    truth = expected_hits(model, queries, DOCUMENTS, 3)
    argv = ["--uri", uri, "--model", str(tmp_path / "model"), "--k", "3"]
    assert close(commands.search([*queries, *argv]), truth)

    async def served(index: Any) -> list[list[Hit]]:
        async with Service(model, index, fingerprint=print_) as service:
            return await service.search(queries, 3)

    assert close(asyncio.run(served(open_index(uri))), truth)
    both = open_index("memory:")
    for name in ("router", "routed"):
        both.add(EncodedCorpus(tmp_path / "out" / name))
    # Every document is among the candidates.
    assert weights_of_views(model, ["router", "routed"], "test") == {"router": 0.0, "routed": 1.0}
    assert close(asyncio.run(served(both)), truth)
    asked = encode_views(model, queries, ["router", "routed"], task="query")
    assert close(both.search(asked, 3, candidates=5), truth)
    with pytest.raises(InputError, match="--precision binary: routed entries have their weight"):
        encoded(tmp_path, "--views", "routed", "--precision", "binary")


def test_without_views_the_model_is_the_sparse_encoder_that_it_is(model, tmp_path):
    encoded(tmp_path)
    assert EncodedCorpus(tmp_path / "out").origin.kind == "sparse"
    assert list(views_of(model)) == ["router", "routed"]
    found = encode_views(model, [], ["router", "routed"], task="query")
    assert [len(side) for side in found.values()] == [0, 0] and found["routed"].sentence_dim == WHOLE


def test_a_cache_holds_entries_also_of_windows(model, tmp_path):
    texts = DOCUMENTS | {"long": "open the list of ports " * 9}
    options: dict[str, Any] = {"task": "document", "kind": "routed", "batch_size": 2, "show_progress": False}
    found = embed(model, texts, cache_dir=tmp_path / "cache", **options)
    assert (found.kind, found.dim, found.sentence_dim, len(found)) == ("routed", 6, WHOLE, 6)
    assert isinstance(found.values, np.memmap) and isinstance(found.sentences, np.memmap)
    again = embed(model, texts, cache_dir=tmp_path / "cache", **options)
    np.testing.assert_array_equal(again.sentences, found.sentences)
    for place, text in enumerate(DOCUMENTS.values()):
        ours, (theirs, whole) = entries(found, place), alone(model, text, "document")
        assert [key for key, _ in ours] == [key for key, _ in theirs]
        np.testing.assert_allclose([v for _, v in ours], [v for _, v in theirs], rtol=2e-3, atol=1e-3)
        np.testing.assert_allclose(found.sentences[place], whole, rtol=2e-3, atol=1e-3)
    windows = Windows.of(model, 8, None, "model")
    cut = embed(model, texts, windows=windows, **options)
    pieces = [alone(model, piece, "document") for piece in windows.cut(texts["long"])]
    assert cut.windows is None and len(cut) == cut.documents == 6 and len(pieces) > 2
    assert [key for key, _ in entries(cut, 5)] == [key for found, _ in pieces for key, _ in found]
    np.testing.assert_allclose(cut.sentences[5], np.mean([whole for _, whole in pieces], 0), rtol=2e-3, atol=1e-3)


def test_a_router_behind_other_modules_is_asked_by_a_whole_pass(model, sparse_model):
    texts = list(DOCUMENTS.values())
    inside = encode_views(model, texts, ["routed"], task="document")["routed"]
    config = model[0].model.config
    head, encoder = model[2], model[0].model
    head.__class__ = Behind
    head.__dict__["model"] = SimpleNamespace(
        config=config, encoder=[encoder]
    )  # no part of the module, as it is another's
    encoder.__class__ = BertModel
    assert token_router_of(model).config is config and token_router_of(sparse_model) is None
    behind = encode_views(model, texts, ["routed"], task="document")["routed"]
    np.testing.assert_array_equal(behind.indices, inside.indices)
    np.testing.assert_allclose(behind.values, inside.values, atol=1e-6)
    np.testing.assert_allclose(behind.sentences, inside.sentences, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("vocab_size", 9, "gives keys from .* but vocab_size=9 in its config, so no list would hold them"),
        ("entry_dim", 5, r"widths \(6, 4\) .* but entry_dim=5 and sentence_dim=4"),
        ("sentence_dim", 0, r"widths \(6, 4\) .* but entry_dim=6 and sentence_dim=0"),
    ],
)
def test_a_router_that_gives_what_its_config_does_not_say_is_refused(field, value, words, model):
    setattr(model[0].model.config, field, value)
    with pytest.raises(InputError, match=words):
        encode_views(model, ["open ports"], ["routed"], task="document")


def test_a_model_without_a_router_is_refused(sentence_model):
    with pytest.raises(InputError, match="kind 'routed': SentenceTransformer has no router"):
        embed(sentence_model, DOCUMENTS, task="document", kind="routed", show_progress=False)
    assert views_of(sentence_model) == {}


@pytest.mark.parametrize("more", [{"vocabulary": 0}, {"vocabulary": "9"}, {"sentence_dim": -1}, {"kind": "tokens"}])
def test_a_manifest_that_describes_no_keys_is_refused(more, tmp_path):
    content = manifest_of(origin(), task="document")
    content["vectors"] |= more
    write_json(tmp_path / "manifest.json", content)
    write_json(tmp_path / "complete.json", {"shards": 0})
    with pytest.raises(InputError, match="says of its vectors what nothing can be made of"):
        EncodedCorpus(tmp_path)
