"""Weighted sums of several kinds of vectors: every back end that has them against brute force in float64."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_search import DIM, Texts, packed, same, score, shard, texts
from test_windows import cut_shard, cut_texts

from polyrep import InputError
from polyrep.encoding.embeddings import Embeddings
from polyrep.encoding.shards import Origin, Shard
from polyrep.search import Hit, Index, open_index

KINDS = {"words": ("sparse", "dot"), "dense": ("sentence", "cosine"), "many": ("tokens", "meanmaxsim")}
WEIGHTS = {"words": 1.0, "dense": 0.3, "many": 0.7}
PAIRS = [("words", "dense"), ("dense", "words"), ("many", "dense"), ("words", "dense", "many")]


@pytest.fixture(params=["memory:", "qdrant:{}", "server"])
def index(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Index]:
    if request.param != "memory:":
        pytest.importorskip("qdrant_edge")
    if request.param != "server":
        yield open_index(request.param.format(tmp_path / "index"))
        return
    pytest.importorskip("qdrant_client")
    from qdrant_server import StandIn

    with StandIn() as server:
        yield open_index(f"qdrant+http://{server.address}/sums")


def drawn(name: str, count: int, seed: int, prefix: str = "d") -> Texts:
    kind = KINDS[name][0]
    found = texts(kind, count, seed, prefix)
    if kind == "sparse":  # so that some texts share no word
        for number, vector in enumerate(found.values()):
            vector[0] = 0
            vector[60 if number % 2 else 0 :] = 0
            vector[1] = vector[1] if number % 3 else 0.5 + number / 100  # no ties, which an engine breaks as it likes
    return found


def added(index: Index, documents: dict[str, Texts]) -> None:
    for name, vectors in documents.items():
        made = shard(KINDS[name][0], vectors, KINDS[name][1], name)
        index.add([replace(made, origin=replace(made.origin, precision="float32"))])  # unit length is no float16


def summed(
    names: tuple[str, ...],
    queries: dict[str, Texts],
    documents: dict[str, Texts],
    k: int,
    candidates: int,
    weights: dict[str, float] = WEIGHTS,
) -> list[list[Hit]]:
    """Candidates of the first name, or of the next where they share nothing, by the sum over all names."""
    found, first = [], documents[names[0]]
    for row in range(len(queries[names[0]])):
        asked = {name: list(queries[name].values())[row] for name in names}
        said = {n: {d: score(KINDS[n][1], asked[n], documents[n][d]) for d in first} for n in names}
        among: list[str] = []
        for name in names:
            best = sorted(first, key=lambda d, n=name: (said[n][d], d), reverse=True)[:candidates]
            among = [d for d in best if KINDS[name][0] != "sparse" or said[name][d]]
            if among:
                break
        if candidates >= len(first):
            among = list(first)
        hits = [Hit(d, sum(weights[name] * said[name][d] for name in names)) for d in among]
        found.append(sorted(hits, key=lambda hit: (hit.score, hit.id), reverse=True)[:k])
    return found


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
@pytest.mark.parametrize("candidates", [7, 40, 1000])
def test_candidates_of_the_first_name_are_ranked_by_the_weighted_sum(index, names, candidates):
    documents = {name: drawn(name, 40, seed) for seed, name in enumerate(names, start=1)}
    # The same documents in another order.
    documents[names[1]] = dict(sorted(documents[names[1]].items(), key=lambda item: item[0][::-1]))
    queries = {name: drawn(name, 9, seed, "q") for seed, name in enumerate(names, start=7)}
    added(index, documents)
    asked = {name: packed(KINDS[name][0], list(queries[name].values())) for name in names}
    weights = {name: WEIGHTS[name] for name in names}
    found = index.search(asked, 6, weights=weights, candidates=candidates)
    assert same(found, summed(names, queries, documents, 6, candidates))
    gone = list(documents[names[0]])[::3]
    index.delete(gone)
    rest = {name: {d: v for d, v in some.items() if d not in gone} for name, some in documents.items()}
    found = index.search(asked, 6, weights=weights, candidates=candidates)
    assert same(found, summed(names, queries, rest, 6, candidates))


@pytest.mark.parametrize("candidates", [5, 1000])
def test_a_query_without_words_is_answered_by_the_next_name_and_told(index, candidates, caplog):
    documents = {name: drawn(name, 30, seed) for seed, name in enumerate(("words", "dense"))}
    queries = {name: drawn(name, 4, seed, "q") for seed, name in enumerate(("words", "dense"), start=5)}
    for empty in ("q1é", "q2é"):
        queries["words"][empty] = np.zeros(DIM["sparse"], np.float16)
    queries["words"]["q2é"][299] = 1  # which no document has
    documents["words"] = {name: vector * (np.arange(300) < 299) for name, vector in documents["words"].items()}
    added(index, documents)
    asked = {name: packed(KINDS[name][0], list(some.values())) for name, some in queries.items()}
    weights = {"words": 1.0, "dense": 0.3}
    with caplog.at_level(logging.WARNING):
        found = index.search(asked, 4, weights=weights, candidates=candidates)
    assert same(found, summed(("words", "dense"), queries, documents, 4, candidates))
    if candidates == 5:
        assert "2 of 4 queries share no word with any document by 'words', so 'dense' finds" in caplog.text
    caplog.clear()
    some = {name: packed(KINDS[name][0], list(texts_.values())[:1]) for name, texts_ in queries.items()}
    index.search(some, 4, weights=weights, candidates=candidates)
    assert not caplog.text


def test_ties_of_sums_go_to_the_higher_id():
    index = open_index("memory:")
    ids, ones = ["a", "c", "b", "d"], np.ones((4, 16), np.float32)
    for name in ("one", "two"):
        index.add([Shard(ids, packed("sentence", list(ones)), Origin(name, "sentence", 16, "dot", "m"))])
    found = index.search({"one": ones[:1], "two": ones[:1]}, 3, weights={"one": 1, "two": 0.5}, candidates=3)
    assert found == [[Hit("d", 24.0), Hit("c", 24.0), Hit("b", 24.0)]]


@pytest.mark.parametrize("candidates", [6, 1000])
def test_the_best_window_of_a_document_counts_under_each_name(candidates):
    """Windows beside windows of other places, and beside whole documents; and as a second stage.

    A hit says which was best where there is one: of a sum, where windows of one name alone have a part in it.
    """
    index = open_index("memory:?prefetch=4")
    counts = {f"d{n}": 1 + n % 3 for n in range(20)}
    cut = {
        "words": cut_texts("sparse", counts, 1),
        "dense": cut_texts("sentence", dict(reversed([(d, 4 - n) for d, n in counts.items()])), 2),
        "many": {d: several[:1] for d, several in cut_texts("tokens", counts, 3).items()},
    }
    for name, documents in cut.items():
        kind, similarity = KINDS[name]
        found = [vectors for several in documents.values() for vectors in several]
        window = {} if name == "many" else {"window": 8, "stride": 8}
        bounds = np.cumsum([0, *map(len, documents.values())]) if window else None
        vectors = replace(packed(kind, found), windows=bounds)
        index.add([Shard(list(documents), vectors, Origin(name, kind, DIM[kind], similarity, "m", **window))])
    queries = {name: texts(KINDS[name][0], 5, 9, "q") for name in cut}
    asked = {name: packed(KINDS[name][0], list(some.values())) for name, some in queries.items()}

    def all_said(name: str, row: int, document: str) -> list[float]:
        query = list(queries[name].values())[row]
        return [score(KINDS[name][1], query, vectors) for vectors in cut[name][document]]

    def said(name: str, row: int, document: str) -> float:
        return max(all_said(name, row, document))

    def best_of(name: str, found: list[list[Hit]]) -> list[list[int]]:
        return [[int(np.argmax(all_said(name, row, hit.id))) for hit in hits] for row, hits in enumerate(found)]

    def told(found: list[list[Hit]]) -> list[list[int | None]]:
        return [[hit.window for hit in hits] for hits in found]

    for names, one in {("words", "dense", "many"): "", ("dense", "words"): "", ("many", "dense"): "dense"}.items():
        weights = {n: WEIGHTS[n] for n in names}
        found = index.search({n: asked[n] for n in names}, 4, weights=weights, candidates=candidates)
        assert told(found) == (best_of(one, found) if one else [[None] * 4] * 5)
        expected = []
        for row in range(5):
            first = sorted(counts, key=lambda d, r=row, n=names[0]: said(n, r, d), reverse=True)[:candidates]
            hits = [Hit(d, sum(WEIGHTS[n] * said(n, row, d) for n in names)) for d in first]
            expected.append(sorted(hits, key=lambda hit: hit.score, reverse=True)[:4])
        assert same(found, expected)
    for first, then in (("many", "dense"), ("dense", "many"), ("dense", "words")):
        second, expected = index.search({first: asked[first], then: asked[then]}, 3), []
        for row in range(5):
            among = sorted(counts, key=lambda d, r=row, n=first: said(n, r, d), reverse=True)[:4]
            hits = [Hit(d, said(then, row, d)) for d in among]
            expected.append(sorted(hits, key=lambda hit: hit.score, reverse=True)[:3])
        assert same(second, expected)
        assert told(second) == ([[None] * 3] * 5 if then == "many" else best_of(then, second))
    weights = {"words": 0, "dense": 2.0}
    found = index.search({n: asked[n] for n in weights}, 4, weights=weights, candidates=candidates)
    assert told(found) == best_of("dense", found) and any(window for row in told(found) for window in row)


def test_a_sum_of_windows_alone_is_their_score_and_says_which_was_best(index):
    documents = cut_texts("sentence", {f"d{n}": 1 + n % 3 for n in range(20)}, 1)
    index.add([cut_shard("sentence", "dot", documents)])
    asked = packed("sentence", list(texts("sentence", 3, 2).values()))
    (name,) = index.origins
    plain = index.search(asked, 5)
    halved = [[hit._replace(score=hit.score / 2) for hit in hits] for hits in plain]
    found = index.search({name: asked}, 5, weights={name: 0.5})
    assert same(found, halved) and any(hit.window for hits in found for hit in hits)
    assert [[hit.window for hit in hits] for hits in found] == [[hit.window for hit in hits] for hits in plain]


def test_documents_without_vectors_of_a_name_are_refused(index):
    documents = {name: drawn(name, 12, seed) for seed, name in enumerate(("words", "dense"))}
    last = documents["dense"].pop("d7é")
    added(index, documents)
    asked = {name: packed(KINDS[name][0], list(some.values())[:1]) for name, some in documents.items()}
    for _ in range(2):
        with pytest.raises(InputError, match="1 documents.* no .*'dense'.*so their sums would lack a part"):
            index.search(asked, 3, weights={"words": 1, "dense": 1})
    added(index, {"dense": {"d7é": last}})
    assert len(index.search(asked, 3, weights={"words": 1, "dense": 1})[0]) == 3


NAN = float("nan")


@pytest.mark.parametrize(
    ("weights", "candidates", "words"),
    [
        ({"words": 1, "dense": 1, "other": 2}, 9, r"weights\['other'\]=2: there are no scores of that name"),
        ({"words": 1}, 9, "weights has no 'dense', so its part of the sum is not known"),
        ({"words": 1, "dense": -0.5}, 9, r"weights\['dense'\]=-0.5: expected a number from 0 on"),
        ({"words": NAN, "dense": 1}, 9, r"weights\['words'\]=nan: expected a number from 0 on"),
        ({"words": 1, "dense": float("inf")}, 9, r"weights\['dense'\]=inf: expected"),
        ({"words": 1, "dense": "0.3"}, 9, r"weights\['dense'\]='0.3': expected"),
        ({"words": True, "dense": 1}, 9, r"weights\['words'\]=True: expected"),
        ({"words": 0, "dense": 0.0}, 9, "weights are all 0, so every document would have the score 0"),
        ({"words": 1, "dense": 1}, 0, "candidates=0, so nothing could be ranked"),
    ],
)
def test_weights_that_mean_nothing_are_refused(index, weights, candidates, words):
    documents = {name: drawn(name, 3, 1) for name in ("words", "dense")}
    added(index, documents)
    asked = {name: packed(KINDS[name][0], list(some.values())) for name, some in documents.items()}
    with pytest.raises(InputError, match=words):
        index.search(asked, 3, weights=weights, candidates=candidates)


@pytest.mark.parametrize(("uri", "name"), [("faiss:{}", "dense"), ("seismic:{}", "words")])
def test_back_ends_of_one_kind_say_what_sums(uri, name, tmp_path):
    index = open_index(uri.format(tmp_path / "index"))
    documents = drawn(name, 3, 1)
    added(index, {name: documents})
    asked: Embeddings = packed(KINDS[name][0], list(documents.values()))
    with pytest.raises(InputError, match="so there is no sum. Use memory: or qdrant:, which hold several"):
        index.search({name: asked}, 3, weights={name: 1.0})


def test_a_weighted_sum_is_one_request_of_a_server():
    pytest.importorskip("qdrant_edge")
    pytest.importorskip("qdrant_client")
    from qdrant_server import StandIn

    with StandIn() as server:
        index = open_index(f"qdrant+http://{server.address}/sums")
        documents = {name: texts(KINDS[name][0], 20, 1) for name in ("words", "dense")}  # all share a word
        added(index, documents)
        asked = {name: packed(KINDS[name][0], list(some.values())) for name, some in documents.items()}
        for number in range(2):
            before = len(server.requests)
            index.search(asked, 3, weights={"words": 1, "dense": 0.3}, candidates=5)
            paths = [path.rpartition("/")[2] for _, path in server.requests[before:]]
            assert paths == (["count", "count", "batch"] if not number else ["batch"])


def test_sums_are_of_whole_numbers_though_candidates_are_found_by_small_ones(tmp_path):
    """One byte a dimension finds; what is summed are the vectors themselves, found first or not."""
    pytest.importorskip("qdrant_edge")
    index = open_index(f"qdrant:{tmp_path}/index?quantization=int8")
    names = ("words", "dense")
    documents = {name: drawn(name, 60, seed) for seed, name in enumerate(names, start=1)}
    queries = {name: drawn(name, 6, seed, "q") for seed, name in enumerate(names, start=7)}
    added(index, documents)
    asked = {name: packed(KINDS[name][0], list(some.values())) for name, some in queries.items()}
    weights = {"words": 0.01, "dense": 1.0}
    for candidates in (30, 60):
        found = index.search(asked, 8, weights=weights, candidates=candidates)
        assert same(found, summed(names, queries, documents, 8, candidates, weights))
    first = {name: asked[name] for name in ("dense", "words")}
    found = index.search(first, 8, weights=weights, candidates=60)
    assert same(found, summed(("dense", "words"), queries, documents, 8, 60, weights))


def test_documents_of_another_process_are_summed_though_all_were_candidates_before():
    pytest.importorskip("qdrant_edge")
    pytest.importorskip("qdrant_client")
    from qdrant_server import StandIn

    names = ("words", "dense")
    documents = {name: drawn(name, 40, seed) for seed, name in enumerate(names, start=1)}
    few = {name: dict(list(some.items())[:6]) for name, some in documents.items()}
    queries = {name: drawn(name, 5, seed, "q") for seed, name in enumerate(names, start=7)}
    asked = {name: packed(KINDS[name][0], list(some.values())) for name, some in queries.items()}
    weights = {name: WEIGHTS[name] for name in names}
    with StandIn() as server:
        uri = f"qdrant+http://{server.address}/sums"
        index = open_index(uri)
        added(index, few)
        assert same(index.search(asked, 6, weights=weights), summed(names, queries, few, 6, 1000))
        added(open_index(uri), documents)
        assert same(index.search(asked, 6, weights=weights), summed(names, queries, documents, 6, 1000))
