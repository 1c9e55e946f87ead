"""Indexes held ready and second stages, against exact search and plain loops."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_retrievers import vectors_of
from test_routed import drawn
from test_scoring import brute_force, dense, ragged, sparse, texts_of

from polyrep import InputError
from polyrep.encoding.embeddings import Embeddings
from polyrep.evaluation.frontier import timed as ready
from polyrep.evaluation.frontier.timed import ReadyIndex, rank_in_two_stages, rank_when_ready
from polyrep.evaluation.systems import Ranking, costs_of, keep_ranking
from polyrep.search import exact_search
from polyrep.search.ranking import rescore, tie_ranks

RANKS = tie_ranks([f"d{i:02}" for i in range(12)])


def sides(kind: str) -> tuple:
    rng = np.random.default_rng(3)
    if kind == "tokens":
        return ragged(rng, [3, 1, 4]), ragged(rng, [2, 5, 0, 1, 7, 3, 3, 2, 0, 6, 4, 1])
    if kind == "sparse":
        return sparse(rng, 3), sparse(rng, 12)
    if kind == "routed":
        return drawn(3, 1, keys=6), drawn(12, 2, keys=6)
    return dense(rng.normal(size=(3, 6)).astype(np.float16)), dense(rng.normal(size=(12, 6)).astype(np.float16))


def in_terms(matrix: np.ndarray) -> Embeddings:
    text_of, term = matrix.nonzero()
    offsets = np.append(0, np.bincount(text_of, minlength=len(matrix)).cumsum())
    values = matrix[text_of, term].astype(np.float32)
    return Embeddings("sparse", values, offsets, term.astype(np.int32), matrix.shape[1], 0.0, Path())


CASES = [
    ("tokens", "maxsim"),
    ("tokens", "meanmaxsim"),
    ("sentence", "dot"),
    ("sentence", "cosine"),
    ("sentence", "euclidean"),
    ("sentence", "manhattan"),
    ("sparse", "dot"),
    ("sparse", "cosine"),
    ("routed", "routed"),
    ("routed", "routed_unclamped"),
]


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("kind,similarity", CASES)
def test_a_ready_index_finds_what_exact_search_finds(monkeypatch, kind, similarity, in_memory):
    monkeypatch.setattr(ready, "MEMORY", 2**20 if in_memory else 0)
    monkeypatch.setattr(ready, "BLOCK_ELEMENTS", 100)  # several blocks of documents
    monkeypatch.setattr(ready, "QUERY_VECTORS", 8)
    queries, documents = sides(kind)
    index = ReadyIndex(documents, RANKS, similarity)
    assert index.in_memory == (in_memory or kind == "sparse")
    expected = exact_search(queries, documents, RANKS, similarity=similarity, k=5)
    positions, scores = index.search(queries, 5)
    np.testing.assert_array_equal(positions, expected[0])
    np.testing.assert_allclose(scores, expected[1], rtol=1e-4)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_terms_of_every_document_are_scored_as_a_dense_vector(similarity):
    rng = np.random.default_rng(5)
    matrix = rng.normal(size=(12, 9)) * (rng.random((12, 9)) < 0.4)
    matrix[:, [2, 7]] = rng.normal(size=(12, 2))  # of either sign
    asked = rng.normal(size=(3, 9)) * (rng.random((3, 9)) < 0.5)
    asked[0] = 0
    queries, documents = in_terms(asked), in_terms(matrix)
    index = ReadyIndex(documents, RANKS, similarity)
    assert index.everywhere.tolist() == [2, 7] and index.postings.nnz == np.count_nonzero(matrix) - 24
    positions, scores = index.search(queries, 12)
    if similarity == "cosine":
        asked, matrix = (part / np.maximum(np.linalg.norm(part, axis=1)[:, None], 1e-12) for part in (asked, matrix))
    np.testing.assert_allclose(scores, np.take_along_axis(asked @ matrix.T, positions, 1), rtol=1e-5, atol=1e-6)
    assert (np.diff(scores) <= 0).all() and positions[0].tolist() == list(range(11, -1, -1))


@pytest.mark.parametrize("kind,similarity", [case for case in CASES if case[0] not in ("sparse", "routed")])
def test_a_second_stage_orders_by_the_full_score(kind, similarity):
    queries, documents = sides(kind)
    candidates = np.stack([np.random.default_rng(row).permutation(12)[:7] for row in range(3)])
    positions, scores = rescore(queries, documents, candidates, RANKS, similarity=similarity)
    for row, query in enumerate(texts_of(queries)):
        loop = {p: brute_force(query, texts_of(documents)[p], similarity) for p in candidates[row].tolist()}
        best = sorted(loop, key=lambda p: (loop[p], p), reverse=True)  # of equal scores the higher id
        assert positions[row].tolist() == best
        np.testing.assert_allclose(scores[row], [loop[p] for p in best], rtol=1e-3, atol=1e-4)


def test_ties_of_a_second_stage_go_to_the_higher_id():
    vector = np.ones((1, 4), np.float16)
    documents = dense(np.repeat(vector, 12, axis=0))
    candidates = np.array([[4, 9, 0, 7]])
    assert rescore(dense(vector), documents, candidates, RANKS, similarity="dot")[0].tolist() == [[9, 7, 4, 0]]


def test_a_second_stage_of_every_document_is_exact_search():
    queries, documents = sides("tokens")
    every = np.tile(np.arange(12), (3, 1))
    found = rescore(queries, documents, every, RANKS, similarity="maxsim")
    expected = exact_search(queries, documents, RANKS, similarity="maxsim")
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5)


def test_sides_that_do_not_fit_are_refused():
    queries, documents = sides("tokens")
    other = replace(documents, dim=9)
    for search in (
        lambda: rescore(queries, other, np.zeros((3, 1), int), RANKS, similarity="maxsim"),
        lambda: ReadyIndex(documents, RANKS, "maxsim").search(replace(queries, dim=9)),
    ):
        with pytest.raises(InputError, match="width"):
            search()
    with pytest.raises(InputError, match="maxsim or meanmaxsim"):
        ReadyIndex(documents, RANKS, "dot").search(queries)


def test_a_ranking_has_the_time_of_the_queries_that_were_timed(monkeypatch):
    queries, documents = sides("tokens")
    searched = []
    stock = ReadyIndex.search

    def slow(self, asked, k=ready.RERANK_DEPTH):
        searched.append(len(asked))
        time.sleep(0.02)
        return stock(self, asked, k)

    monkeypatch.setattr(ReadyIndex, "search", slow)
    monkeypatch.setattr("polyrep.evaluation.systems.TIMED_QUERIES", 2)
    ranking = rank_when_ready("any", queries, documents, RANKS, similarity="maxsim")
    assert searched == [3, 1, 1, 1]  # all, one to warm up, and two that count
    assert np.isnan(ranking.seconds).tolist() == [False, True, False]
    # No tight bound from above: the machine may be busy with something else.
    assert 20 <= ranking.costs["search_ms_p50"] <= ranking.costs["search_ms_p99"] < 20_000
    assert "from_memory_map" not in ranking.costs


def test_a_row_says_that_its_index_was_not_in_memory(monkeypatch):
    monkeypatch.setattr(ready, "MEMORY", 0)
    queries, documents = sides("sentence")
    assert rank_when_ready("any", queries, documents, RANKS, similarity="dot").costs["from_memory_map"] == 1


def test_two_stages_cost_what_both_cost():
    queries, documents = sides("tokens")
    rng = np.random.default_rng(0)
    first = rank_when_ready("first", *(vectors_of(rng, [1] * n) for n in (3, 12)), RANKS, similarity="maxsim")
    first = replace(first, seconds=np.array([5.0, np.nan, 7.0]), costs=first.costs | {"fit_seconds": 3.0})
    own, full = first.costs["bytes_per_document"], costs_of(queries, documents)["bytes_per_document"]
    options = {"similarity": "maxsim", "full_bytes": full}
    both = rank_in_two_stages("both", first, 4, queries, ready.loaded(documents), RANKS, **options)
    assert both.costs["first_stage_bytes"] == own and both.costs["bytes_per_document"] == own + full
    assert both.costs["fit_seconds"] == 3 and 6000 < both.costs["search_ms_p50"] < 6500  # the mean of 5 and 7 seconds
    for found, candidates in zip(both.positions, first.positions, strict=True):
        assert set(found) == set(candidates[:4])


def test_a_kept_ranking_is_made_once_and_again_if_its_file_is_damaged(tmp_path, caplog):
    made = []

    def make() -> Ranking:
        made.append(1)
        seconds, settings = np.array([1, np.nan]), {"language": "en"}
        return Ranking("x", np.arange(6).reshape(2, 3), np.ones((2, 3), np.float32), {"a": 1.5}, seconds, settings)

    path = tmp_path / "rows" / "x.safetensors"
    for _ in range(2):
        ranking = keep_ranking(path, "name", make, 2)
        assert (ranking.system, ranking.costs, ranking.settings) == ("name", {"a": 1.5}, {"language": "en"})
        np.testing.assert_array_equal(ranking.positions, [[0, 1], [3, 4]])
        np.testing.assert_array_equal(ranking.seconds, [1, np.nan])
    assert len(made) == 1 and [p.name for p in path.parent.iterdir()] == ["x.safetensors"]
    path.write_bytes(path.read_bytes()[:-9])
    keep_ranking(path, "name", make, 2)
    assert len(made) == 2 and "damaged" in caplog.text


def test_an_interruption_leaves_no_kept_ranking(tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("polyrep.files.os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        keep_ranking(tmp_path / "x.safetensors", "x", lambda: Ranking("x", np.zeros((1, 1)), np.zeros((1, 1))), 1)
    assert not list(tmp_path.iterdir())
