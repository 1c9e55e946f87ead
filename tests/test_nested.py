"""Nested vectors: a prefix of one index is searched as an index of that prefix would be, and nothing else is."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DOCUMENTS, QUERIES
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.base.modules.module import Module
from test_calibration import MADE
from test_encode import read, write_lines

from polyrep import InputError
from polyrep.cli import main
from polyrep.encoding import EncodedCorpus, cache
from polyrep.encoding import encode as encoding
from polyrep.encoding.embeddings import Embeddings, in_memory
from polyrep.encoding.encode import encode
from polyrep.encoding.nested import checked_groups, first_vectors, groups_of
from polyrep.encoding.shards import Origin, Shard, origin_of
from polyrep.hub import fingerprint
from polyrep.hub.calibration import write_calibration
from polyrep.search import Added, BudgetError, Hit, Index, Searcher, Service, commands, cut_shards, open_index
from polyrep.search.commands import search

DIM = 8
GROUPS = ((1, 1), (2, 4), (4, 8), (8, 16))
TOKENS = tuple((None, documents) for _, documents in GROUPS)


# --- vectors without a model -----------------------------------------------------------------------------------------


def drawn(texts: int, vectors: int, seed: int = 0) -> np.ndarray:
    """Vectors ``(texts, vectors, dim)`` of unit length."""
    values = np.random.default_rng(seed).normal(size=(texts, vectors, DIM))
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


def flat(values: np.ndarray) -> Embeddings:
    return in_memory(values.reshape(-1, DIM), np.arange(len(values) + 1) * values.shape[1])


def shard(values: np.ndarray, groups: Any = GROUPS, checksum: str = "", **fields: Any) -> Shard:
    origin = Origin("multi", "tokens", DIM, "maxsim", "model", "float32", nested=groups)
    return Shard([f"d{i}" for i in range(len(values))], flat(values), replace(origin, **fields), checksum)


def score(query: np.ndarray, document: np.ndarray, mean: bool = False) -> float:
    """MaxSim by its definition, in float64."""
    best = [max(float(q @ d) for d in document.astype(np.float64)) for q in query.astype(np.float64)]
    return sum(best) / (len(best) if mean else 1)


def brute(
    queries: np.ndarray,
    documents: np.ndarray,
    pair: tuple[int, int],
    k: int,
    among: Sequence[Sequence[int]] | None = None,
    mean: bool = False,
) -> list[list[Hit]]:
    """The best documents by their first vectors, of all or of some."""
    found = []
    for row, query in enumerate(queries):
        places = range(len(documents)) if among is None else among[row]
        hits = [Hit(f"d{i}", score(query[: pair[0]], documents[i, : pair[1]], mean)) for i in places]
        found.append(sorted(hits, key=lambda hit: hit.score, reverse=True)[:k])
    return found


def places(found: list[list[Hit]]) -> list[list[int]]:
    return [[int(hit.id[1:]) for hit in hits] for hits in found]


def same(found: list[list[Hit]], expected: list[list[Hit]]) -> bool:
    assert places(found) == places(expected)
    for hits, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose([hit.score for hit in hits], [hit.score for hit in wanted], rtol=0, atol=1e-6)
    return True


@pytest.fixture(params=["memory:", "qdrant:", "server"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An index that holds the prefixes of all groups; in memory those of any number."""
    if request.param == "memory:":
        yield "memory:"
        return
    pytest.importorskip("qdrant_edge")
    if request.param == "qdrant:":
        yield f"qdrant:{tmp_path}/index?prefixes=4,8"
        return
    pytest.importorskip("qdrant_client")
    from qdrant_server import StandIn

    with StandIn() as server:
        yield f"qdrant+http://{server.address}/nested?prefixes=4,8"


def another(uri: str, name: str) -> str:
    """The URI of another index of the same kind."""
    return uri.replace("/index", f"/{name}").replace("/nested", f"/{name}")


def plain(uri: str, name: str) -> str:
    """The same without settings."""
    return another(uri, name).partition("?")[0]


QUERY_NUMBERS = {1: 1, 4: 2, 8: 4, 16: 8}
"""Of each budget, by the groups above."""


@pytest.mark.parametrize("similarity", ["maxsim", "meanmaxsim"])
@pytest.mark.parametrize("budget", [1, 4, 8, 16])
def test_a_budget_is_an_index_of_that_prefix(uri, budget, similarity):
    documents, queries = drawn(40, 16), drawn(70, 8, seed=1)  # more queries than are in one request
    index = open_index(uri)
    assert index.add([shard(documents, similarity=similarity)]) == Added(documents=40)
    pair = QUERY_NUMBERS[budget], budget
    found = index.search(flat(queries), 6, budget=budget)
    assert same(found, brute(queries, documents, pair, 6, mean=similarity == "meanmaxsim"))
    assert found == index.search(list(queries), 6, budget=pair) == index.search(flat(queries), 6, budget=list(pair))
    # An index of nothing but the prefix, asked without a budget.
    small = open_index(plain(uri, "cut"))
    small.add(cut_shards([shard(documents, similarity=similarity)], budget))
    assert small.origins["multi"].nested == tuple(group for group in GROUPS if group[1] <= budget)
    assert same(small.search(flat(queries), 6), found)
    # And one of vectors that were cut by hand.
    by_hand = open_index(plain(uri, "by-hand"))
    by_hand.add([shard(documents[:, :budget], (), similarity=similarity)])
    assert same(by_hand.search(flat(queries[:, : pair[0]]), 6), found)


def test_without_a_budget_all_vectors_are_compared(uri):
    documents, queries = drawn(20, 16), drawn(4, 8, seed=1)
    index = open_index(uri)
    index.add([shard(documents)])
    assert same(index.search(flat(queries), 5), brute(queries, documents, (8, 16), 5))
    assert index.search(flat(queries), 5, budget=16) == index.search(flat(queries), 5)


def test_the_smallest_group_that_holds_a_budget_says_how_many_query_vectors():
    documents, queries = drawn(30, 16), drawn(5, 8, seed=1)
    index = open_index("memory:")
    index.add([shard(documents)])
    for budget, count in {2: 2, 3: 2, 4: 2, 5: 4, 9: 8, 15: 8}.items():
        assert same(index.search(flat(queries), 5, budget=budget), brute(queries, documents, (count, budget), 5))
    for pair in ((3, 5), (8, 1), (1, 16)):
        assert same(index.search(flat(queries), 5, budget=pair), brute(queries, documents, pair, 5))
    # Of groups with the same documents the largest, so that the full number of these is the whole.
    index = open_index("memory:")
    index.add([shard(documents[:, :4], ((1, 1), (2, 4), (8, 4)))])
    assert same(index.search(flat(queries), 5, budget=4), index.search(flat(queries), 5))
    assert same(index.search(flat(queries), 5, budget=3), brute(queries, documents, (8, 3), 5))


@pytest.mark.parametrize("budget", [4, 16, None])
@pytest.mark.parametrize("candidates", [7, 40])
def test_a_prefix_finds_what_the_budget_ranks(uri, budget, candidates):
    documents, queries = drawn(40, 16), drawn(6, 8, seed=1)
    index = open_index(uri)
    index.add([shard(documents)])
    among = places(brute(queries, documents, (1, 1), candidates))
    pair = QUERY_NUMBERS[budget or 16], budget or 16
    expected = brute(queries, documents, pair, 5, among)
    assert same(index.search(flat(queries), 5, first=1, budget=budget, candidates=candidates), expected)
    assert same(index.search(flat(queries), 5, first=(1, 1), budget=budget, candidates=candidates), expected)
    if budget != 4 and candidates == 7:
        assert not same_places(expected, brute(queries, documents, pair, 5)), "the first stage leaves some out"
    among = places(brute(queries, documents, (2, 4), candidates))
    found = index.search(flat(queries), 5, first=4, candidates=candidates)
    assert same(found, brute(queries, documents, (8, 16), 5, among))


def same_places(one: list[list[Hit]], other: list[list[Hit]]) -> bool:
    return places(one) == places(other)


def test_candidates_are_those_of_the_uri_unless_they_are_said(uri):
    documents, queries = drawn(40, 16), drawn(6, 8, seed=1)
    index = open_index(f"{uri}{'&' if '?' in uri else '?'}prefetch=6")
    index.add([shard(documents)])
    for candidates, count in {None: 6, 9: 9, 2: 5}.items():  # never fewer than are wanted
        among = places(brute(queries, documents, (1, 1), count))
        found = index.search(flat(queries), 5, first=1, candidates=candidates)
        assert same(found, brute(queries, documents, (8, 16), 5, among))


def test_queries_that_keep_their_tokens_are_compared_whole(uri):
    documents, queries = drawn(30, 16), [drawn(1, count, seed=count)[0] for count in (3, 1, 5)]
    index = open_index(uri)
    index.add([shard(documents, TOKENS)])
    for budget in (1, 4, 8, 16):
        expected = [brute(query[None], documents, (len(query), budget), 5)[0] for query in queries]
        assert same(index.search(queries, 5, budget=budget), expected)
    expected = [
        brute(query[None], documents, (len(query), 16), 3, places(brute(query[None], documents, (len(query), 1), 6)))[
            0
        ]
        for query in queries
    ]
    assert same(index.search(queries, 3, first=1, candidates=6), expected)
    with pytest.raises(BudgetError, match="queries keep the vectors of all their tokens. Use 4 alone"):
        index.search(queries, 5, budget=(2, 4))


def test_documents_that_come_go_and_change_are_found_by_their_prefix(uri):
    documents, queries = drawn(30, 16), drawn(5, 8, seed=1)
    index = open_index(uri)
    index.add([shard(documents[:20], checksum="a" * 64)])
    asked = {"budget": 4}, {"first": 1, "candidates": 30}
    for options in asked:
        index.search(flat(queries), 5, **options)
    # Added later, and in the place of others.
    changed = drawn(10, 16, seed=5)
    late = replace(shard(changed), ids=[f"d{i}" for i in range(15, 25)])
    assert index.add([late]) == Added(documents=10, replaced=5)
    now = np.concatenate([documents[:15], changed])
    assert same(index.search(flat(queries), 5, budget=4), brute(queries, now, (2, 4), 5))
    assert same(index.search(flat(queries), 5, first=1, candidates=30), brute(queries, now, (8, 16), 5))
    assert index.delete(["d24", "d23"]) == 2
    assert same(index.search(flat(queries), 5, budget=4), brute(queries, now[:23], (2, 4), 5))
    assert same(index.search(flat(queries), 5, first=1, candidates=30), brute(queries, now[:23], (8, 16), 5))
    assert index.count() == 23


def test_vectors_of_other_names_stand_beside_nested_ones(uri):
    documents, queries = drawn(20, 16), drawn(4, 8, seed=1)
    single = documents[:, 0]
    dense = Shard([f"d{i}" for i in range(20)], in_memory(single), Origin("dense", "sentence", DIM, "dot", "model"))
    for before in ([dense, shard(documents)], [shard(documents), dense]):
        index = open_index(another(uri, before[0].origin.name))
        index.add(before)
        assert {*index.origins} == {"multi", "dense"} and index.count() == 20
        found = index.search({"multi": flat(queries)}, 4, budget=4)
        assert same(found, brute(queries, documents, (2, 4), 4))
        found = index.search({"multi": flat(queries)}, 4, first=1, candidates=5)
        assert same(found, brute(queries, documents, (8, 16), 4, places(brute(queries, documents, (1, 1), 5))))
        asked = {"dense": queries[:, 0], "multi": flat(queries)}
        summed = index.search(asked, 4, weights={"dense": 0.0, "multi": 1.0})
        assert same(summed, brute(queries, documents, (8, 16), 4))
        for refused in ({"budget": 4}, {"first": 1}):
            with pytest.raises(BudgetError, match="of one kind of vectors, and dense and multi are asked for"):
                index.search(asked, 4, **refused)
            with pytest.raises(BudgetError, match="a weighted sum is of all vectors"):
                index.search(asked, 4, weights={"dense": 1.0, "multi": 1.0}, **refused)
            with pytest.raises(BudgetError, match="a document has one vector under 'dense'"):
                index.search({"dense": queries[:, 0]}, 4, **refused)


BAD = [
    (0, "budget=0: a document holds 16 vectors; 0 asked. Use 1 to 16"),
    (-3, "budget=-3: a document holds 16 vectors; -3 asked"),
    (64, "budget=64: a document holds 16 vectors; 64 asked"),
    (8.0, "budget=8.0: expected a whole number of document vectors"),
    (True, "budget=True: expected a whole number"),
    ("8", "budget='8': expected a whole number"),
    ("48", "budget='48': expected a whole number"),
    ((4, 8, 16), "expected a whole number"),
    ((), "expected a whole number"),
    ((4, None), "expected a whole number"),
    ((0, 4), "a query holds 8 vectors; 0 asked"),
    ((9, 4), "a query holds 8 vectors; 9 asked"),
    ((None, 4), "a query holds 8 vectors; None asked"),
    ((2, 17), "a document holds 16 vectors; 17 asked"),
]


@pytest.mark.parametrize(("asked", "words"), BAD)
def test_a_budget_that_there_cannot_be_is_refused(asked, words):
    index = open_index("memory:")
    index.add([shard(drawn(3, 16))])
    queries = flat(drawn(2, 8))
    for name in ("budget", "first"):
        with pytest.raises(BudgetError, match=words.replace("budget", name).replace("(", r"\(")):
            index.search(queries, 2, **{name: asked})


def test_a_first_stage_larger_than_what_ranks_is_refused(uri):
    index = open_index(uri)
    index.add([shard(drawn(3, 16))])
    with pytest.raises(BudgetError, match="first=8 has more vectors than budget=4"):
        index.search(flat(drawn(2, 8)), 2, budget=4, first=8)
    for candidates in (0, -1, 2.5, True):
        with pytest.raises(InputError, match="candidates=.*so nothing could be ranked"):
            index.search(flat(drawn(2, 8)), 2, first=1, candidates=candidates)


def test_queries_with_too_few_vectors_are_refused(uri):
    index = open_index(uri)
    index.add([shard(drawn(5, 16))])
    with pytest.raises(BudgetError, match="a query has 3 vectors; 4 go with 8 of a document"):
        index.search(flat(drawn(2, 3)), 2, budget=8)
    assert len(index.search(flat(drawn(2, 3)), 2, budget=4)[0]) == 2


def test_vectors_that_are_not_nested_have_no_budget(uri):
    index = open_index(plain(uri, "others"))
    index.add([shard(drawn(3, 16), ())])
    for refused in ({"budget": 4}, {"first": 1}):
        with pytest.raises(BudgetError, match="'multi' are not nested by what their manifest says"):
            index.search(flat(drawn(2, 8)), 2, **refused)
    index = open_index(plain(uri, "windows"))
    index.add([shard(drawn(3, 16), (), window=128, stride=64)])
    with pytest.raises(BudgetError, match="are of windows of 128 tokens, one window's behind the other's"):
        index.search(flat(drawn(2, 8)), 2, budget=4)


@pytest.mark.parametrize(("scheme", "kind"), [("faiss", "sentence"), ("seismic", "sparse")])
def test_back_ends_of_one_vector_name_those_that_can(scheme, kind, tmp_path):
    if scheme == "seismic":
        pytest.importorskip("seismic")
    from test_search import shard as another
    from test_search import texts

    index = open_index(f"{scheme}:{tmp_path}/index")
    documents = texts(kind, 5, 1)
    made = another(kind, documents)
    index.add([made])
    for refused in ({"budget": 4}, {"first": 1}):
        with pytest.raises(BudgetError, match="there is no prefix. Use memory: or qdrant:, which hold several"):
            index.search(made.vectors, 2, **refused)


def test_an_index_takes_vectors_of_one_set_of_groups(uri):
    documents = drawn(5, 16)
    index = open_index(uri)
    index.add([shard(documents)])
    with pytest.raises(
        InputError, match=r"nested groups \(1, 1\), .*, these no nested groups, so a budget would mean"
    ):
        index.add([shard(documents, ())])
    with pytest.raises(InputError, match="so a budget would mean two things"):
        index.add(cut_shards([shard(documents)], 8))
    with pytest.raises(InputError, match="'d0': has 15 vectors, and its nested groups say 16"):
        index.add([shard(documents[:, :15])])
    assert index.count() == 5
    old = open_index(plain(uri, "old"))
    old.add([shard(documents, ())])
    with pytest.raises(InputError, match=r"have no nested groups, these nested groups \(1, 1\)"):
        old.add([shard(documents)])


# --- Qdrant ----------------------------------------------------------------------------------------------------------


def test_two_stages_and_a_prefix_are_one_request_and_outlive_the_process():
    pytest.importorskip("qdrant_edge")
    pytest.importorskip("qdrant_client")
    from qdrant_server import StandIn

    documents, queries = drawn(20, 16), drawn(64, 8, seed=1)
    with StandIn() as server:
        uri = f"qdrant+http://{server.address}/nested"
        open_index(uri + "?prefixes=8").add([shard(documents)])
        index = open_index(uri)
        assert {
            name: "multivector_config" not in v for name, v in server.collections["nested"]["vectors"].items()
        } == {
            "multi": False,
            "multi-first-1": True,  # a single vector, for which there is a graph
            "multi-first-8": False,
        }
        for options in ({"first": 1}, {"budget": 8}, {"first": 1, "budget": 8}):
            server.requests.clear()
            index.search(flat(queries), 3, **options)
            assert server.requests == [("POST", "/collections/nested/points/query/batch")]
        with pytest.raises(BudgetError, match="stores the first 1, 8 and all 16 of .* 4 asked. .* with prefixes=4 in"):
            index.search(flat(queries), 3, budget=4)


@pytest.fixture
def embedded(tmp_path: Path) -> str:
    pytest.importorskip("qdrant_edge")
    return f"qdrant:{tmp_path}/index"


def test_an_index_keeps_its_prefixes_when_it_is_opened_again(embedded):
    documents, queries = drawn(30, 16), drawn(4, 8, seed=1)
    index = open_index(embedded + "?prefixes=8,4")
    index.add([shard(documents[:20], checksum="a" * 64)])
    index.close()
    index = open_index(embedded)
    late = replace(shard(documents[20:]), ids=[f"d{i}" for i in range(20, 30)])
    index.add([late])
    for budget in (1, 4, 8):
        found = index.search(flat(queries), 5, budget=budget)
        assert same(found, brute(queries, documents, (QUERY_NUMBERS[budget], budget), 5))
    index.close()
    with pytest.raises(InputError, match="made with prefixes="):
        open_index(embedded + "?prefixes=2")


def test_prefixes_that_a_crash_left_out_are_made_before_a_document_is_written(embedded, monkeypatch):
    from polyrep.search.qdrant_engine import Embedded

    documents, queries = drawn(10, 16), drawn(3, 8, seed=1)
    extend, calls = Embedded.extend, []

    def failing(self: Any, *arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise InputError("killed")
        extend(self, *arguments)

    monkeypatch.setattr(Embedded, "extend", failing)
    index = open_index(embedded + "?prefixes=4")
    with pytest.raises(InputError, match="killed"):
        index.add([shard(documents)])
    assert index.count() == 0
    index.close()
    index = open_index(embedded)
    index.add([shard(documents)])
    assert same(index.search(flat(queries), 5, budget=4), brute(queries, documents, (2, 4), 5))
    assert same(index.search(flat(queries), 5, budget=1), brute(queries, documents, (1, 1), 5))


@pytest.mark.parametrize("said", ["", "0", "4,", "4,-8", "four", "4;8", "1.5"])
def test_prefixes_that_are_no_numbers_are_refused(said, embedded):
    with pytest.raises(InputError, match="prefixes=.*: expected numbers of first vectors, e.g. prefixes=4,8"):
        open_index(f"{embedded}?prefixes={said.replace(';', '%3B')}")


def test_prefixes_that_there_are_not_are_refused(embedded):
    with pytest.raises(InputError, match="made with prefixes=4,32, but a document holds 16 vectors 'multi'"):
        open_index(embedded + "?prefixes=4,32").add([shard(drawn(3, 16))])
    with pytest.raises(InputError, match="made with prefixes=4, but vectors 'multi' are not nested"):
        open_index(embedded + "?prefixes=4").add([shard(drawn(3, 16), ())])
    assert not Path(embedded.removeprefix("qdrant:")).exists(), "nothing was begun"
    open_index(embedded + "?prefixes=16").add([shard(drawn(3, 16))])  # all vectors, which are there anyway


def test_small_numbers_find_what_whole_numbers_rank(embedded):
    documents, queries = drawn(40, 16), drawn(6, 8, seed=1)
    index = open_index(embedded + "?quantization=int8&prefixes=4")
    index.add([shard(documents)])
    assert same(index.search(flat(queries), 5, first=1, candidates=40), brute(queries, documents, (8, 16), 5))
    assert same(index.search(flat(queries), 5, budget=4), brute(queries, documents, (2, 4), 5))


@pytest.mark.parametrize("pair", [(1, 8), (3, 2), (8, 16)])
def test_an_index_of_any_pair_opens_again_and_is_searched_by_what_is_within(pair, embedded):
    documents, queries = drawn(20, 16), drawn(4, 8, seed=1)
    index = open_index(embedded)
    index.add(cut_shards([shard(documents)], pair))
    index.close()
    index = open_index(embedded)
    within = tuple(one for one in GROUPS if one[0] <= pair[0] and one[1] <= pair[1] and one != pair)
    assert index.origins["multi"].nested == (*within, pair)
    assert same(index.search(flat(queries), 5), brute(queries, documents, pair, 5))
    found = index.search(flat(queries), 5, first=1, candidates=6)
    first = min(pair[0], QUERY_NUMBERS[1]), 1
    assert same(found, brute(queries, documents, pair, 5, places(brute(queries, documents, first, 6))))


def test_names_of_prefixes_are_taken(embedded, tmp_path):
    index = open_index(embedded)
    index.add([shard(drawn(3, 16))])
    with pytest.raises(InputError, match="has vectors 'multi-first-1' already, and those of 'multi-first-1' would"):
        index.add([shard(drawn(3, 16), (), name="multi-first-1")])
    other = open_index(f"qdrant:{tmp_path}/other")
    other.add([shard(drawn(3, 16), (), name="multi-first-1")])
    with pytest.raises(InputError, match="has vectors 'multi-first-1' already, and those of 'multi' would be called"):
        other.add([shard(drawn(3, 16))])


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (
            "polyrep/prefixes/multi",
            [1, 99],
            "says that it stores the first .* of 16 vectors 'multi', so it is damaged",
        ),
        ("polyrep/prefixes/multi", "1", "so it is damaged"),
        ("polyrep/layout", {"prefixes": 4}, "its layout is .* so the index is damaged"),
    ],
)
def test_records_that_mean_nothing_are_refused(key, value, words, embedded):
    index = open_index(embedded)
    index.add([shard(drawn(3, 16))])
    index.close()
    path = Path(embedded.removeprefix("qdrant:")) / "polyrep.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(InputError, match=words):
        open_index(embedded)


def test_requests_are_of_fewer_documents_where_prefixes_come_on_top():
    from polyrep.search.qdrant import BYTES, NUMBER, batches

    vectors = flat(drawn(100, 16))
    for times in (1000.0, 2000.0):
        spans = list(batches(vectors, times))
        assert [number for span in spans for number in range(*span)] == list(range(100))
        assert spans[0][1] == max(1, int(BYTES / (times * 16 * DIM * NUMBER)))


# --- groups ----------------------------------------------------------------------------------------------------------


def test_slices_are_those_of_a_loop_whatever_the_lengths(tmp_path):
    lengths = np.array([3, 5, 2, 7])
    values = np.random.default_rng(0).normal(size=(lengths.sum(), DIM)).astype(np.float32)
    (tmp_path / "values.bin").write_bytes(values.tobytes())
    mapped = np.memmap(tmp_path / "values.bin", np.float32, "r", shape=values.shape)
    whole = in_memory(mapped, np.cumsum([0, *lengths]))
    cut = first_vectors(whole, 2)
    parts = np.split(values, np.cumsum(lengths)[:-1])
    np.testing.assert_array_equal(cut.values, np.concatenate([part[:2] for part in parts]))
    assert cut.offsets.tolist() == [0, 2, 4, 6, 8] and not isinstance(cut.values.base, np.memmap)
    with pytest.raises(InputError, match="the first 3 vectors of each text: one has 2"):
        first_vectors(whole, 3)
    with pytest.raises(InputError, match="it has sentence vectors, not several"):
        first_vectors(in_memory(values), 1)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ([], "expected pairs"),
        ("abc", "expected pairs"),
        (7, "expected pairs"),
        ([1, 2], "expected pairs"),
        ([[1, 1, 1]], "expected pairs"),
        ([[1, None]], "expected pairs"),
        ([[0, 1]], "expected pairs"),
        ([[1, 1.0]], "expected pairs"),
        ([[True, 1]], "expected pairs"),
        ([[None, 1], [4, 8]], "expected pairs"),
        ([[1, 1], [1, 1]], r"\[1, 1\] follows \[1, 1\], so the groups are not nested"),
        ([[4, 8], [2, 16]], r"\[2, 16\] follows \[4, 8\]"),
        ([[None, 8], [None, 4]], r"\[None, 4\] follows \[None, 8\]"),
    ],
)
def test_groups_that_are_not_nested_are_refused(said, words, tmp_path):
    with pytest.raises(InputError, match=words):
        checked_groups(said, "a model")
    content = {**Origin("multi", "tokens", DIM, "maxsim", "f").described(), "nested": said}
    with pytest.raises(InputError, match="says of its vectors what nothing can be made of"):
        origin_of(content, tmp_path)


def test_a_manifest_says_groups_only_where_there_are_some(tmp_path):
    none = Origin("multi", "tokens", DIM, "maxsim", "f")
    assert "nested" not in none.described() and origin_of(none.described(), tmp_path) == none
    for groups in (GROUPS, TOKENS):
        origin = replace(none, nested=groups)
        assert origin_of(json.loads(json.dumps(origin.described())), tmp_path) == origin
    for fields in ({"kind": "sentence"}, {"window": 8, "stride": 8}):
        with pytest.raises(InputError, match="nested groups of"):
            origin_of(replace(none, nested=GROUPS, **fields).described(), tmp_path)


# --- models ----------------------------------------------------------------------------------------------------------


class Nested(Module):
    """Vectors of a text: its mean, turned by a matrix for each, and weighed less and less; 8 of a query, else 16."""

    nested_groups: Any = [list(pair) for pair in GROUPS]
    counts = {"query": 8, "document": 16}

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.register_buffer("turned", torch.randn(16, 32, DIM, generator=generator))

    def get_embedding_dimension(self) -> int:
        """Of each vector."""
        return DIM

    def forward(self, features: dict[str, Any], task: str | None = None) -> dict[str, Any]:
        states, mask = features["token_embeddings"], features["attention_mask"][..., None]
        means = (states * mask).sum(1) / mask.sum(1)  # (batch, 32)
        vectors = torch.einsum("bi,rio->bro", means, self.turned[: self.counts[task or "document"]])
        features["token_embeddings"] = torch.nn.functional.normalize(vectors, dim=-1)
        features["attention_mask"] = torch.ones(vectors.shape[:2], dtype=torch.int64)
        return features

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Nothing: the tests hand out the model in memory."""


@pytest.fixture
def model(backbone: Path, multi_vector_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model with nested vectors, which ``load`` gives for its folder."""
    multi_vector_model.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    double = MultiVectorEncoder(modules=[Transformer(str(backbone)), Nested()], device="cpu")
    double.module_kwargs = {"1": ["task"]}
    double._polyrep_folder = tmp_path / "model"
    for module in (encoding, commands):
        monkeypatch.setattr(module, "load", lambda *_, **__: double)
    return double


def encoded(tmp_path: Path, *flags: str, output: str = "out") -> EncodedCorpus:
    source = write_lines(tmp_path / "corpus.jsonl", DOCUMENTS)
    words = [str(tmp_path / "model"), "--input", str(source), "--output", str(tmp_path / output), "--shard_size", "2"]
    encode([*words, "--precision", "float32", *flags])
    return EncodedCorpus(tmp_path / output)


def sides(model: Any, queries: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """What the model gives, one text at a time."""
    asked = [model.encode_query([query], convert_to_numpy=True)[0] for query in queries]
    return np.stack(asked), np.stack(
        [model.encode_document([t], convert_to_numpy=True)[0] for t in DOCUMENTS.values()]
    )


def by_name(found: list[list[Hit]]) -> list[list[Hit]]:
    """Hits of the loop by the ids of the documents."""
    names = list(DOCUMENTS)
    return [[hit._replace(id=names[int(hit.id[1:])]) for hit in hits] for hits in found]


def close(found: list[list[Hit]], expected: list[list[Hit]], tolerance: float = 1e-5) -> bool:
    assert [[hit.id for hit in hits] for hits in found] == [[hit.id for hit in hits] for hits in expected]
    for hits, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose([hit.score for hit in hits], [hit.score for hit in wanted], rtol=0, atol=tolerance)
    return True


def test_groups_are_found_in_a_model_or_any_part_of_it(model, multi_vector_model):
    assert groups_of(model) == GROUPS
    assert groups_of(multi_vector_model) == ()
    model.nested_groups = [[8, 16]]
    assert groups_of(model) == ((8, 16),), "the outermost says it"
    del model.nested_groups
    model[1].nested_groups = [[4, 8], [2, 16]]
    with pytest.raises(InputError, match="Nested.nested_groups: .* so the groups are not nested"):
        groups_of(model)


def test_a_corpus_says_the_groups_of_its_model(model, tmp_path):
    corpus = encoded(tmp_path)
    assert corpus.origin.nested == GROUPS
    ids, vectors = read(corpus)
    _, documents = sides(model, ["open ports"])
    assert ids == list(DOCUMENTS)
    np.testing.assert_allclose(np.stack(vectors), documents, atol=1e-5)
    queries = encoded(tmp_path, "--task", "query", output="queries")
    assert queries.origin.nested == GROUPS and {len(one) for one in read(queries)[1]} == {8}


def test_a_corpus_of_windows_says_none(model, tmp_path):
    corpus = encoded(tmp_path, "--window", "4")
    assert corpus.origin.nested == () and corpus.origin.window == 4
    index = open_index("memory:")
    index.add(corpus)
    with pytest.raises(BudgetError, match="are of windows of 4 tokens"):
        index.search(model.encode_query(["open ports"]), 2, budget=4)


def test_a_model_that_gives_other_numbers_than_it_says_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(Nested, "counts", {"query": 8, "document": 12})
    with pytest.raises(InputError, match="has 12 vectors, and its nested groups say 16"):
        encoded(tmp_path)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Nested, "counts", {"query": 6, "document": 16})
    encoded(tmp_path)
    with pytest.raises(InputError, match="has 6 vectors, and its nested groups say 8"):
        encoded(tmp_path, "--task", "query", output="queries")


def test_stored_vectors_are_cut_as_an_index_cuts_them(model, tmp_path):
    stored = cache.embed(model, DOCUMENTS, task="document", cache_dir=tmp_path / "cache", dtype="float32")
    _, documents = sides(model, ["open ports"])
    np.testing.assert_allclose(first_vectors(stored, 4).values.reshape(5, 4, DIM), documents[:, :4], atol=1e-5)


def test_the_command_line_searches_at_a_budget(model, tmp_path, capsys):
    pytest.importorskip("qdrant_edge")
    encoded(tmp_path)
    queries = list(QUERIES.values())
    asked, documents = sides(model, queries)
    uri = f"qdrant://{tmp_path}/index?prefixes=4"
    assert main(["index", str(tmp_path / "out"), "--uri", uri]) == 0
    argv = [*queries, "--uri", uri, "--model", str(tmp_path / "model"), "--k", "3"]
    assert close(search(argv), by_name(brute(asked, documents, (8, 16), 3)))
    assert close(search([*argv, "--budget", "4"]), by_name(brute(asked, documents, (2, 4), 3)))
    assert close(search([*argv, "--budget", "1,4", "--name", "multi"]), by_name(brute(asked, documents, (1, 4), 3)))
    among = places(brute(asked, documents, (1, 1), 4))
    found = search([*argv, "--first", "1", "--candidates", "4"])
    assert close(found, by_name(brute(asked, documents, (8, 16), 3, among)))
    found = search([*argv, "--first", "1", "--budget", "4", "--candidates", "4"])
    assert close(found, by_name(brute(asked, documents, (2, 4), 3, among)))
    capsys.readouterr()
    for flags, words in {
        ("--budget", "8"): "8 asked",
        ("--budget", "0"): "a document holds 16 vectors; 0 asked",
        ("--budget", "many"): "--budget many: expected document vectors",
        ("--budget", "1,2,3"): "--budget 1,2,3: expected",
        ("--first", "x"): "--first x: expected",
        ("--candidates", "9"): "--candidates 9: of a weighted sum or of two stages alone, and there is neither",
        ("--weights", "multi=1", "--budget", "4"): "a weighted sum is of all vectors",
    }.items():
        assert main(["search", *argv, *flags]) == 2
        assert words in capsys.readouterr().err


def test_the_command_line_indexes_a_prefix(model, tmp_path, capsys):
    pytest.importorskip("qdrant_edge")
    corpus = encoded(tmp_path)
    queries = list(QUERIES.values())
    asked, documents = sides(model, queries)
    uri = f"qdrant://{tmp_path}/index"
    argv = ["index", str(tmp_path / "out"), "--uri", uri]
    for refused in ("32", "0"):
        assert main([*argv, "--budget", refused]) == 2
        assert f"a document holds 16 vectors; {refused} asked" in capsys.readouterr().err
        assert not (tmp_path / "index").exists()
    for _ in range(2):
        assert main([*argv, "--budget", "6"]) == 0
    assert "3 shards were there already" in capsys.readouterr().out
    index = open_index(uri)
    assert index.origins["multi"].nested == ((1, 1), (2, 4), (4, 6))
    index.close()
    asking = [*queries, "--uri", uri, "--model", str(tmp_path / "model"), "--k", "3"]
    assert close(search(asking), by_name(brute(asked, documents, (4, 6), 3)))
    among = places(brute(asked, documents, (1, 1), 4))
    found = search([*asking, "--first", "1", "--candidates", "4"])
    assert close(found, by_name(brute(asked, documents, (4, 6), 3, among)))
    assert main(["search", *asking, "--budget", "8"]) == 2
    assert "a document holds 6 vectors; 8 asked" in capsys.readouterr().err
    assert main(argv) == 2
    assert "so a budget would mean two things" in capsys.readouterr().err
    assert [shard_.checksum for shard_ in cut_shards(corpus, 6)] == [shard_.checksum for shard_ in corpus]


def test_a_shard_that_an_index_knows_is_not_read_to_be_cut(model, tmp_path):
    corpus = encoded(tmp_path)
    index = open_index("memory:")
    index.add(cut_shards(corpus, 4))
    for path in (tmp_path / "out" / "shards").glob("*.safetensors"):
        path.unlink()
    assert index.add(cut_shards(corpus, 4)) == Added(shards_known=3)


# --- probabilities and the server ------------------------------------------------------------------------------------


@pytest.fixture
def calibrated(model: Any, tmp_path: Path) -> tuple[Any, Index, str]:
    """A model whose scores of all vectors have probabilities, and an index of it in memory."""
    corpus, print_ = encoded(tmp_path), fingerprint(tmp_path / "model")
    write_calibration(tmp_path / "model", replace(MADE, fingerprint=print_))
    index = open_index("memory:")
    index.add(corpus)
    return model, index, print_


def test_scores_at_another_budget_have_no_probability(calibrated, tmp_path, caplog):
    model, index, print_ = calibrated
    texts = ["open ports", "list files"]
    vectors = model.encode_query(texts)
    searcher = Searcher(model, index, print_)

    def sure(searcher: Searcher, **plan: Any) -> set[bool]:
        return {hit.probability is not None for hits in searcher.search(texts, vectors, 3, **plan) for hit in hits}

    assert sure(searcher) == sure(searcher, budget=16) == sure(searcher, first=1) == {True}
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert sure(searcher, budget=8) == sure(searcher, budget=8) == {False}
        assert sure(searcher, budget=(4, 16)) == sure(searcher, first=1, budget=4) == {False}
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3 and "are compared as (4, 8), the calibration is of (8, 16), so their scores" in said[0]
    small = open_index("memory:")
    small.add(cut_shards(EncodedCorpus(tmp_path / "out"), 8))
    assert sure(Searcher(model, small, print_)) == {False}


def test_a_server_answers_each_request_at_its_budget(calibrated, tmp_path):
    model, index, print_ = calibrated
    texts = list(QUERIES.values())
    asked, documents = sides(model, texts)
    plans = [{}, {"budget": 4}, {"budget": [2, 8]}, {"first": 1}, {"first": (1, 1), "budget": 8}, {"budget": 16}]
    draw = random.Random(0)

    async def served() -> list[tuple[dict[str, Any], int, list[list[Hit]]]]:
        async with Service(model, index, fingerprint=print_) as service:

            async def one(plan: dict[str, Any], k: int) -> tuple[dict[str, Any], int, list[list[Hit]]]:
                return plan, k, await service.search(texts, k, **plan)

            found = await asyncio.gather(*(one(draw.choice(plans), draw.randint(1, 4)) for _ in range(15)))
            assert service.health()["batches"] <= 3, "texts of all budgets are encoded together"
            for plan, words in (
                ({"budget": 64}, "the index: budget=64: a document holds 16 vectors; 64 asked"),
                ({"budget": 4, "first": 8}, "first=8 has more vectors than budget=4"),
                ({"first": "1"}, "expected a whole number"),
                ({"first": [[1], 4]}, "a query holds 8 vectors"),
            ):
                before = service.health()["batches"]
                with pytest.raises(BudgetError, match=words):
                    await service.search(texts, 3, **plan)
                assert service.health()["batches"] == before, "refused before anything is encoded"
            return found

    pairs = {"4": (2, 4), "[2, 8]": (2, 8), "8": (4, 8), "16": (8, 16), "None": (8, 16)}
    for plan, k, found in asyncio.run(served()):
        pair = pairs[str(plan.get("budget"))]
        assert close(found, by_name(brute(asked, documents, pair, k)))  # 200 candidates are all documents
        assert all((hit.probability is not None) == (pair == (8, 16)) for hits in found for hit in hits)


def test_a_prefix_that_a_served_index_does_not_store_fails_its_own_request(model, tmp_path):
    pytest.importorskip("qdrant_edge")
    index = open_index(f"qdrant://{tmp_path}/index")
    index.add(encoded(tmp_path))
    texts = list(QUERIES.values())
    asked, documents = sides(model, texts)

    async def served() -> list[Any]:
        async with Service(model, index, fingerprint=fingerprint(tmp_path / "model")) as service:
            both = (service.search(texts, 3, budget=4), service.search(texts, 3, budget=1))
            return await asyncio.gather(*both, return_exceptions=True)

    refused, found = asyncio.run(served())
    assert isinstance(refused, BudgetError) and "stores the first 1 and all 16" in str(refused)
    assert close(found, by_name(brute(asked, documents, (1, 1), 3)))


def test_a_server_of_one_vector_has_no_budget(sentence_model):
    vectors = sentence_model.encode_document(list(DOCUMENTS.values()))
    index = open_index("memory:")
    index.add([Shard(list(DOCUMENTS), in_memory(vectors), Origin("v", "sentence", 32, "cosine", "f"))])
    for empty, words in ((False, "a document has one vector under 'v'"), (True, "it holds no or several kinds")):
        service = Service(sentence_model, open_index("memory:") if empty else index, fingerprint="f")
        with pytest.raises(BudgetError, match=words):
            asyncio.run(service.search(["open ports"], 3, budget=4))
