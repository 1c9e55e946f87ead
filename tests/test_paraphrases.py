"""Overlap of rankings against loops in float64, pairs of wordings from every source, and the command end to end."""

from __future__ import annotations

import importlib
import json
import random
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import DOCUMENTS, QRELS, QUERIES, ROOT, write_beir
from PIL import Image

from polyrep import InputError
from polyrep.cli import main
from polyrep.data import RetrievalDataset, load_retrieval_dataset, pairs_of
from polyrep.data.noise import cut_short
from polyrep.evaluation import RankSimilarityEvaluator
from polyrep.evaluation.bm25 import rank_with_bm25
from polyrep.evaluation.evaluate import evaluate
from polyrep.evaluation.frontier.command import frontier
from polyrep.evaluation.indexes import opened, rank_with_index
from polyrep.evaluation.metrics import best_first
from polyrep.evaluation.rank_similarity import (
    average_overlap,
    best_documents,
    compare_wordings,
    jaccard,
    open_pairs,
    rbo,
)
from polyrep.evaluation.statistics import clustered_intervals
from polyrep.evaluation.systems import DEPTH, Ranking, rank_with_model
from polyrep.hub import fingerprint, load
from polyrep.report import check_results
from polyrep.search.protocol import Hit

# Overlap of two lists


def loops(a: list[int], b: list[int], p: float) -> tuple[float, float, float]:
    """AO, JS and RBO of two lists, by sets and sums as their definitions read; below 0 is no document."""
    agreement = []
    for depth in range(1, len(a) + 1):
        one, other = ({x for x in part[:depth] if x >= 0} for part in (a, b))
        longer = max(len(one), len(other))
        agreement.append(len(one & other) / longer if longer else 0.0)
    united = len(one | other)
    k = len(a)
    weighed = sum(share * p**depth for depth, share in enumerate(agreement, start=1))
    extrapolated = (1 - p) / p * weighed + agreement[-1] * p**k
    return sum(agreement) / k, len(one & other) / united if united else 0.0, extrapolated


def lists(k: int, documents: int, count: int, seed: int, shortest: int) -> np.ndarray:
    """``(count, k)`` lists of so many of the documents, from ``shortest`` to ``k`` long."""
    rng = np.random.default_rng(seed)
    found = np.full((count, k), -1)
    for row in found:
        length = rng.integers(shortest, k + 1)
        row[:length] = rng.choice(documents, length, replace=False)
    return found


@pytest.mark.parametrize(("k", "shortest"), [(1, 1), (10, 10), (10, 0), (37, 3)])
@pytest.mark.parametrize("p", [0.5, 0.9])
def test_overlaps_are_what_a_loop_finds(k, shortest, p):
    one, other = (lists(k, 2 * k, 200, seed, shortest) for seed in (0, 1))
    expected = np.array([loops(a, b, p) for a, b in zip(one.tolist(), other.tolist(), strict=True)])
    found = np.stack([average_overlap(one, other), jaccard(one, other), rbo(one, other, p)], axis=1)
    assert found.dtype == np.float64 and len(np.unique(expected[:, 0])) > 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    again = np.stack([average_overlap(other, one), jaccard(other, one), rbo(other, one, p)], axis=1)
    np.testing.assert_array_equal(again, found)  # symmetric, to the bit


def test_many_pairs_are_compared_in_blocks_to_the_same_numbers(monkeypatch):
    one, other = (lists(10, 20, 50, seed, 4) for seed in (0, 1))
    whole = rbo(one, other)
    monkeypatch.setattr("polyrep.evaluation.rank_similarity.BLOCK", 300)  # three pairs
    np.testing.assert_array_equal(rbo(one, other), whole)


@pytest.mark.parametrize("measure", [average_overlap, jaccard, rbo])
def test_the_same_list_has_1_and_lists_without_a_common_document_have_0(measure):
    same = lists(10, 30, 20, 0, 1)  # some are shorter than 10
    np.testing.assert_allclose(measure(same, same), 1, rtol=1e-12)
    apart = np.where(same < 0, -1, same + 30)
    np.testing.assert_array_equal(measure(same, apart), 0)
    empty = np.full((1, 10), -1)
    assert measure(empty, empty).tolist() == [0] and measure(empty, same[:1]).tolist() == [0]


@pytest.mark.parametrize("measure", [average_overlap, jaccard, rbo])
def test_the_numbers_of_documents_do_not_matter(measure):
    one, other = (lists(10, 20, 50, seed, 5) for seed in (0, 1))
    renamed = np.append(np.random.default_rng(2).permutation(20), -1)  # -1 stays what it is
    np.testing.assert_array_equal(measure(renamed[one], renamed[other]), measure(one, other))


def test_average_overlap_sees_the_order_and_jaccard_does_not():
    one, turned = np.array([[0, 1, 2, 3]]), np.array([[3, 2, 1, 0]])
    assert average_overlap(one, turned)[0] == pytest.approx((0 + 0 + 2 / 3 + 1) / 4) and jaccard(one, turned)[0] == 1


def test_lists_that_cannot_be_compared_are_refused():
    fine = np.array([[0, 1]])
    for other, said in (
        (np.array([[0, 1, 2]]), r"shapes \(1, 2\) and \(1, 3\)"),
        (np.array([0, 1]), r"\(2,\) cannot be compared"),
        (np.array([[1, 1]]), "b: a list has a document twice"),
    ):
        with pytest.raises(InputError, match=said):
            average_overlap(fine, other)
    for p in (0, 1, 1.5):
        with pytest.raises(InputError, match=f"rbo: p={p}"):
            rbo(fine, fine, p)


# Pairs


PAIRS = [
    {"split": "test", "a": "q1", "b": "q2", "similarity": 4.5, "kind": "same"},
    {"split": "test", "a": "q3", "b": "q1", "similarity": None},
    {"split": "dev", "a": "x1", "b": "x2", "similarity": 1},
]


def write_pairs(folder: Path, pairs: list[Any]) -> Path:
    path = folder / "paraphrases.jsonl"
    path.write_text("".join(pair if isinstance(pair, str) else json.dumps(pair) + "\n" for pair in pairs))
    return path


def test_pairs_of_a_file_keep_their_sides_ratings_and_kinds(beir):
    write_pairs(beir, PAIRS)
    pairs = pairs_of(load_retrieval_dataset(beir))
    assert (pairs.a.tolist(), pairs.b.tolist()) == ([0, 2], [1, 0])
    assert pairs.similarity[0] == 4.5 and np.isnan(pairs.similarity[1])
    assert pairs.kinds.tolist() == ["same", "file"] and not pairs.needs_second_search and pairs.same_text == 0


BAD = {
    '{"split": "test", "a": "q1"': "not a JSON object",
    "[1]\n": "not an object but list",
    '{"a": "q1", "b": "q2"}\n': "no 'split'",
    '{"split": "test", "a": "q1"}\n': "no 'b'",
    '{"split": "test", "a": "q1", "b": "q1"}\n': "pairs query 'q1' with itself.*Remove the line",
    '{"split": "test", "a": "q1", "b": "nobody"}\n': "query 'nobody' is none of split 'test'.*Mend the id",
    '{"split": "test", "a": "q1", "b": "x1"}\n': "query 'x1' is judged in another split.*lies across splits",
    '{"split": "test", "a": "q1", "b": "q2", "similarity": 5.1}\n': "similarity=5.1. Expected .* from 0 to 5",
    '{"split": "test", "a": "q1", "b": "q2", "similarity": -1}\n': "similarity=-1",
    '{"split": "test", "a": "q1", "b": "q2", "similarity": NaN}\n': "similarity=nan",
    '{"split": "test", "a": "q1", "b": "q2", "similarity": true}\n': "similarity=True",
    '{"split": "test", "a": "q1", "b": "q2", "similarity": "4"}\n': "similarity='4'",
    '{"split": "test", "a": "q1", "b": "q2", "kind": 3}\n': "kind=3",
    '{"split": "test", "a": "q1", "b": "q3"}\n': "pairs 'q1' with 'q3' again.*Remove one",
}


@pytest.mark.parametrize("line", BAD)
def test_a_line_that_cannot_be_used_is_refused_with_its_place(beir, line):
    with (beir / "queries.jsonl").open("a") as file:
        file.write('{"_id": "x1", "text": "of another split"}\n')
    path = write_pairs(beir, [PAIRS[1], line])  # which has q3 with q1
    with pytest.raises(InputError, match=f"{path}:2: .*{BAD[line]}"):
        pairs_of(load_retrieval_dataset(beir))


def test_a_split_without_pairs_and_a_set_without_a_file_are_refused(beir):
    dataset = load_retrieval_dataset(beir)
    with pytest.raises(InputError, match=r"paraphrases.jsonl: no such file.*take them from qrels, misspelt or cut"):
        pairs_of(dataset)
    write_pairs(beir, PAIRS[2:])
    with pytest.raises(InputError, match=r"no pair of split 'test'; there are pairs of \['dev'\]"):
        pairs_of(dataset)
    with pytest.raises(InputError, match="tiny: is no folder of queries.jsonl or captions but a table"):
        pairs_of(replace(dataset, folder=None))
    with pytest.raises(InputError, match="paraphrases 'guess': no source of pairs. Use one of file, qrels"):
        pairs_of(dataset, "guess")
    with pytest.raises(InputError, match="tiny, test: no pair of wordings by qrels, so there is nothing to compare"):
        pairs_of(dataset, "qrels")  # no two queries have a document in common


def test_pairs_of_judgments_are_all_queries_with_a_relevant_document_in_common():
    rng = np.random.default_rng(0)
    qrels = {f"q{i}": {f"d{j}": int(rng.integers(0, 3)) for j in rng.choice(9, 3, replace=False)} for i in range(12)}
    queries = {query: f"text of {query}" for query in qrels} | {"q5": "text of q4"}
    dataset = RetrievalDataset("any", "test", {f"d{j}": f"text {j}" for j in range(9)}, queries, qrels)
    relevant = [{d for d, grade in qrels[q].items() if grade > 0} for q in queries]
    expected = [(i, j) for i in range(12) for j in range(i + 1, 12) if relevant[i] & relevant[j]]
    assert (4, 5) in expected  # of one text, which is no other wording
    pairs = pairs_of(dataset, "qrels")
    assert list(zip(pairs.a, pairs.b, strict=True)) == [pair for pair in expected if pair != (4, 5)]
    assert pairs.same_text == 1 and np.isnan(pairs.similarity).all()
    common = [{f"d{j}" for j in row.indices} for row in pairs.common]
    assert common == [relevant[a] & relevant[b] for a, b in zip(pairs.a, pairs.b, strict=True)]


def test_captions_of_one_image_are_pairs_and_other_sets_have_none(tmp_path, beir):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = [{"image": f"{i}.jpg", "split": "test", "captions": [f"{word} {i}" for word in "abc"]} for i in range(2)]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.save(folder / "images.npy", np.eye(2, dtype=np.float32))
    pairs = pairs_of(load_retrieval_dataset(folder), "captions")
    expected = [(0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5)]
    assert list(zip(pairs.a.tolist(), pairs.b.tolist(), strict=True)) == expected
    with pytest.raises(InputError, match="tiny: holds no images with captions.*Use qrels"):
        pairs_of(load_retrieval_dataset(beir), "captions")


@pytest.mark.parametrize("how", ["misspelt", "cut"])
def test_narrowed_queries_are_searched_for_under_their_own_ids(beir, how):
    dataset = load_retrieval_dataset(beir)
    pairs = pairs_of(dataset, how)
    assert pairs.needs_second_search and list(pairs.reworded.queries) == list(QUERIES)
    assert [side.split for side in pairs.sides] == ["test", f"test-{how}"]
    assert pairs.reworded.split == f"test-{how}" and pairs.reworded.qrels == dataset.qrels
    assert all(new != old for new, old in zip(pairs.reworded.queries.values(), QUERIES.values(), strict=True))
    assert pairs_of(dataset, how).reworded.queries == pairs.reworded.queries
    assert pairs_of(dataset, how, seed=1).reworded.queries != pairs.reworded.queries
    if how == "cut":
        expected = {q: cut_short(text, random.Random(f"0 cut {q}")) for q, text in QUERIES.items()}
        assert pairs.reworded.queries == expected


def test_narrowed_captions_keep_the_vectors_of_images_and_not_those_of_captions(beir):
    given = {side: np.eye(5, dtype=np.float32) for side in ("document", "query")}
    reworded = pairs_of(replace(load_retrieval_dataset(beir), vectors=given), "cut").reworded
    assert list(reworded.vectors) == ["document"] and reworded.vectors["document"] is given["document"]


# What is measured of a system


def ranked(scores: np.ndarray, documents: list[str], depth: int | None = None) -> Ranking:
    order = [sorted(range(len(documents)), key=lambda i, s=row: (s[i], documents[i]), reverse=True) for row in scores]
    positions = np.array(order)[:, :depth]
    return Ranking("any", positions, np.take_along_axis(scores, positions, axis=1))


def toy(queries: int = 12, documents: int = 30) -> RetrievalDataset:
    """Queries in twos, of which both have the same relevant document; query 4i and its twin are rated alike."""
    corpus = {f"d{i}": f"document {i}" for i in np.random.default_rng(0).permutation(documents)}
    asked = {f"q{i}": f"query {i}" for i in range(queries)}
    return RetrievalDataset("toy", "test", corpus, asked, {f"q{i}": {f"d{i // 2}": 1} for i in range(queries)})


def test_a_constant_ranker_agrees_with_itself_and_finds_nothing():
    dataset = toy()
    scores = np.tile(np.arange(30, dtype=np.float32), (12, 1))  # the relevant documents are wherever they are
    found = compare_wordings(pairs_of(dataset, "qrels"), ranked(scores, list(dataset.corpus)), k=5)
    [entry] = found.summary()
    assert entry["average_overlap"] == entry["jaccard"] == 1 and entry["rbo"] == pytest.approx(1)
    assert entry["floor"] == 1 and entry["flip_rate"] == 0
    best = {list(dataset.corpus)[-1 - rank]: rank for rank in range(10)}
    ndcg = [1 / np.log2(best[f"d{i}"] + 2) if f"d{i}" in best else 0 for i in range(6)]
    assert entry["ndcg_a"] == entry["ndcg_b"] == pytest.approx(np.mean(ndcg)) and entry["ndcg_a"] < 0.5


def test_what_is_measured_is_what_a_loop_finds_and_knows_no_order_of_documents():
    dataset, k = toy(), 5
    ids = list(dataset.corpus)
    scores = np.random.default_rng(1).integers(0, 12, (12, 30)).astype(np.float32)  # many ties
    pairs = pairs_of(dataset, "qrels")
    found = compare_wordings(pairs, ranked(scores, ids), k=k)
    tops = [
        [ids[i] for i in sorted(range(30), key=lambda i, s=row: (s[i], ids[i]), reverse=True)][:k] for row in scores
    ]
    for number, (a, b) in enumerate(zip(pairs.a, pairs.b, strict=True)):
        one, other = ([int(d[1:]) for d in tops[q]] for q in (a, b))
        assert found.average_overlap[number] == pytest.approx(loops(one, other, 0.9)[0], abs=1e-12)
        assert found.finds[:, number].tolist() == [f"d{a // 2}" in tops[q] for q in (a, b)]
    [entry] = found.summary()
    flips = found.finds[0] != found.finds[1]
    assert entry["pairs"] == entry["documents"] == 6 and entry["flip_rate"] == pytest.approx(flips.mean())
    assert 0 < flips.sum() < 6 and entry["pairs_one"] == flips.sum()
    assert entry["average_overlap_one"] == pytest.approx(found.average_overlap[flips].mean())
    assert sum(entry[f"pairs_{name}"] for name in ("both", "one", "none")) == 6
    assert entry["short_lists"] == entry["empty_lists"] == 0

    turned = np.random.default_rng(2).permutation(30)
    other = replace(dataset, corpus={ids[i]: dataset.corpus[ids[i]] for i in turned})
    again = compare_wordings(pairs_of(other, "qrels"), ranked(scores[:, turned], list(other.corpus)), k=k)
    assert again.summary() == found.summary()


def test_the_floor_is_the_overlap_of_queries_that_have_nothing_in_common():
    dataset = toy(queries=80, documents=60)
    rng = np.random.default_rng(3)
    scores = rng.standard_normal((80, 60)).astype(np.float32)
    scores[1::2] = scores[::2]  # both wordings of a pair find the same list, and others lists of their own
    found = compare_wordings(pairs_of(dataset, "qrels"), ranked(scores, list(dataset.corpus)), k=10)
    assert found.average_overlap.tolist() == [1.0] * 40
    # Of two random lists the share in common at depth d is d of 60 on the mean: (1 + ... + 10) / 10 / 60.
    assert found.floor == pytest.approx(5.5 / 60, rel=0.15)


def test_pairs_are_told_by_their_rating_and_by_what_they_have_in_common(tmp_path):
    folder = tmp_path / "rated"
    (folder / "qrels").mkdir(parents=True)
    corpus, queries = DOCUMENTS, {f"q{i}": f"text {i}" for i in range(6)}
    for stem, texts in (("corpus", corpus), ("queries", queries)):
        lines = [json.dumps({"_id": key, "text": text}) + "\n" for key, text in texts.items()]
        (folder / f"{stem}.jsonl").write_text("".join(lines))
    judged = [f"q{i}\td{1 + i // 3}\t1\n" for i in range(6)]  # q0 to q2 have d1, the others d2
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judged))
    ratings = {"q0 q1": 4.0, "q0 q2": 3.999, "q1 q2": 3.0, "q3 q4": 2.9, "q3 q5": None, "q0 q5": 5.0, "q1 q4": 0}
    rows = [
        {
            "split": "test",
            "a": pair[:2],
            "b": pair[3:],
            "similarity": rating,
            "kind": "other" if rating in (0, 5) else "x",
        }
        for pair, rating in ratings.items()
    ]
    write_pairs(folder, rows)
    pairs = pairs_of(load_retrieval_dataset(folder))
    scores = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    found = compare_wordings(pairs, ranked(scores, list(corpus)), k=2)
    places = {name: np.flatnonzero(members).tolist() for name, members in found.groups().items()}
    assert places == {
        "rated >= 4": [0],
        "rated 3 to 4": [1, 2],
        "rated < 3": [3],
        "not rated": [4],
        "no document in common: other": [5, 6],
    }
    entries = {entry["group"]: entry for entry in found.summary()}
    assert "flip_rate" not in entries["no document in common: other"] and "flip_rate" in entries["not rated"]
    assert "average_overlap_interval" not in entries["rated 3 to 4"]  # of one document, so nothing can be said


def test_a_list_that_is_shorter_is_compared_as_far_as_it_goes():
    dataset = toy(queries=4)
    ids = list(dataset.corpus)
    place = {identifier: number for number, identifier in enumerate(ids)}
    scores = np.full((4, 30), -np.inf, np.float32)
    for query, names in enumerate((["d0", "d7"], ["d0"], ["d1", "d2", "d3"], [])):
        scores[query, [place[name] for name in names]] = [5, 4, 3][: len(names)]
    pairs = pairs_of(dataset, "qrels")
    found = compare_wordings(pairs, ranked(scores, ids), k=3)
    assert found.average_overlap.tolist() == pytest.approx([(1 + 1 / 2 + 1 / 2) / 3, 0])
    assert found.jaccard.tolist() == [1 / 2, 0] and found.lengths.tolist() == [[2, 3], [1, 0]]
    [entry] = found.summary()
    assert (entry["short_lists"], entry["empty_lists"]) == (3, 1)
    shallow = replace(ranked(scores, ids, depth=2), system="a second stage of two")
    assert compare_wordings(pairs, shallow, k=3).lengths.tolist() == [[2, 2], [1, 0]]


@pytest.mark.parametrize("best_is_first", [True, False])
def test_the_first_of_a_deep_ranking_with_ties_are_those_of_all_of_it(best_is_first):
    dataset = toy(queries=4, documents=90)
    ids, rng = list(dataset.corpus), np.random.default_rng(0)
    scores = rng.integers(0, 6, (4, 90)).astype(np.float32)  # fifteen of each, so that ties go on
    scores[3, 4:] = -np.inf
    expected = [sorted(range(90), key=lambda i, s=row: (s[i], ids[i]), reverse=True)[:10] for row in scores]
    # In no order, or in the order of scores alone, as the ids of ties do not say.
    order = np.argsort(-scores, axis=1, kind="stable") if best_is_first else rng.permuted([range(90)] * 4, axis=1)
    found, at = best_first(dataset, Ranking("any", order, np.take_along_axis(scores, order, 1)), 10)
    assert found.tolist() == expected and at.tolist() == np.take_along_axis(scores, found, 1).tolist()


def test_what_shares_no_word_with_the_query_is_not_found_by_an_inverted_index():
    dataset = toy(queries=2)
    scores = np.zeros((2, 30), np.float32)
    scores[:, 3] = 1
    ranking = ranked(scores, list(dataset.corpus))
    assert (best_documents(dataset, ranking, 5) >= 0).all()  # a dense model whose scores are 0 by chance
    inverted = best_documents(dataset, replace(ranking, costs={"active_dims": 2.0}), 5)
    assert inverted.tolist() == [[3, -1, -1, -1, -1]] * 2


def test_rankings_that_do_not_belong_to_the_pairs_are_refused(beir):
    dataset = load_retrieval_dataset(beir)
    pairs = pairs_of(dataset, "cut")
    scores = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    ranking = ranked(scores, list(DOCUMENTS))
    for k in (0, 6):
        with pytest.raises(InputError, match=f"tiny: k={k}, but lists have 1 to 5 documents"):
            compare_wordings(pairs, ranking, ranking, k=k)
    with pytest.raises(InputError, match="any: pairs by cut need a second ranking"):
        compare_wordings(pairs, ranking, k=3)
    for wrong in (
        replace(ranking, positions=ranking.positions[:2]),
        replace(ranking, positions=ranking.positions + 1),
        replace(ranking, positions=ranking.positions[:0]),
        replace(ranking, positions=ranking.positions[:, :0]),
    ):
        with pytest.raises(InputError, match="any: a ranking of .* Rank these queries in this corpus"):
            compare_wordings(pairs, ranking, wrong, k=3)
    other = replace(pairs, reworded=replace(pairs.reworded, corpus=dict(reversed(DOCUMENTS.items()))))
    with pytest.raises(InputError, match="tiny and tiny: other documents, or in another order"):
        compare_wordings(other, ranking, ranking, k=3)


def test_lists_are_not_compared_deeper_than_rankings_go():
    dataset = toy(documents=DEPTH + 20)
    with pytest.raises(InputError, match=f"toy: k={DEPTH + 1}, but lists have 1 to {DEPTH:,} documents"):
        open_pairs("qrels", DEPTH + 1, [dataset])
    assert len(open_pairs("qrels", DEPTH, [dataset])[0]) == 6


def test_clusters_are_resampled_whole():
    values = np.repeat(np.random.default_rng(0).standard_normal(40), 5)[None]  # five times the same
    clusters = np.repeat(np.arange(40), 5)
    [[low, high]] = clustered_intervals(values, clusters)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / np.sqrt(40), rel=0.05)  # of 40 draws, not of 200
    [[low, high]] = clustered_intervals(values, np.arange(200))
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / np.sqrt(200), rel=0.05)
    assert clustered_intervals(values, np.zeros(200)) is None


# The evaluator of sentence-transformers


@pytest.fixture
def twins(tmp_path) -> Path:
    """The small data set with a second wording of each query, and pairs of them."""
    folder = write_beir(tmp_path / "twins")
    second = {"q1b": "which ports are open", "q2b": "archive files", "q3b": "search files for a pattern"}
    with (folder / "queries.jsonl").open("a") as file:
        file.writelines(json.dumps({"_id": query, "text": text}) + "\n" for query, text in second.items())
    with (folder / "qrels" / "test.tsv").open("a") as file:
        file.writelines(f"{q}b\t{d}\t{grade}\n" for q, judged in QRELS.items() for d, grade in judged.items())
    ratings = {"q1": 4.5, "q2": 4, "q3": 2}
    write_pairs(folder, [{"split": "test", "a": q, "b": f"{q}b", "similarity": of} for q, of in ratings.items()])
    return folder


@pytest.mark.parametrize("family", ["sentence_model", "sparse_model", "multi_vector_model"])
@pytest.mark.parametrize("source", ["file", "cut"])
def test_the_evaluator_measures_what_the_command_does_for_all_three_families(tmp_path, twins, request, family, source):
    model = request.getfixturevalue(family)
    dataset = load_retrieval_dataset(twins)
    pairs = pairs_of(dataset, source)
    evaluator = RankSimilarityEvaluator(dataset, source, k=2, name="twins")
    assert evaluator.primary_metric == "both_found@2" and evaluator.greater_is_better
    found = evaluator(model, str(tmp_path / "out"), epoch=1, steps=5)
    rankings = [rank_with_model("any", model, side, dtype="float32")[0] for side in pairs.sides]
    expected = compare_wordings(pairs, *rankings, k=2)
    members = next(iter(expected.groups().values()))
    assert found["twins_average_overlap@2"] == pytest.approx(expected.average_overlap[members].mean())
    assert found["twins_flip_rate"] == pytest.approx((expected.finds[0] != expected.finds[1])[members].mean())
    assert found["twins_both_found@2"] == pytest.approx(expected.finds.all(0)[members].mean())
    assert found["twins_ndcg@10_b"] == pytest.approx(expected.ndcg[1, members].mean())
    assert evaluator.primary_metric == "twins_both_found@2" and evaluator.primary_metric in found
    evaluator(model, str(tmp_path / "out"), epoch=2)
    header, *lines = (tmp_path / "out" / "rank_similarity_twins_results.csv").read_text().splitlines()
    assert header.startswith("epoch,steps,average_overlap@2") and [line[:4] for line in lines] == ["1,5,", "2,-1"]


def test_an_evaluator_that_could_measure_nothing_is_refused(beir, twins):
    with pytest.raises(InputError, match="k=6, but lists have 1 to 5 documents"):
        RankSimilarityEvaluator(load_retrieval_dataset(twins), k=6)
    with pytest.raises(InputError, match="rbo: p=1"):
        RankSimilarityEvaluator(load_retrieval_dataset(twins), k=2, p=1)
    with pytest.raises(InputError, match="twins, test: the pairs are of another data set"):
        RankSimilarityEvaluator(load_retrieval_dataset(twins), pairs_of(load_retrieval_dataset(twins)), k=2)
    write_pairs(beir, PAIRS)
    with pytest.raises(InputError, match="tiny, test: no pair has a relevant document in common"):
        RankSimilarityEvaluator(load_retrieval_dataset(beir), k=2)


# The command


@pytest.fixture
def saved(tmp_path, multi_vector_model) -> Path:
    multi_vector_model.save_pretrained(str(tmp_path / "many"))
    return tmp_path / "many"


def run(tmp_path: Path, *arguments: Any) -> dict[str, Any]:
    return evaluate([*map(str, arguments), "--cache_dir", str(tmp_path / "cache")])


@pytest.mark.parametrize("source", ["file", "misspelt"])
def test_the_command_compares_wordings_of_every_row(tmp_path, twins, saved, capsys, source):
    flags = ["--dataset", twins, "--token_pooling", "mean", "--hybrid", "--hybrid_weight", 0.5, "--paraphrase_k", 2]
    flags += ["--paraphrases", source, "--output", tmp_path / "out", "--name", "x", "--seed", 3]
    results = run(tmp_path, "bm25", saved, *flags)
    written = json.loads((tmp_path / "out" / "x.json").read_text())
    check_results(written)
    assert written == results
    systems = list(dict.fromkeys(row["system"] for row in results["rows"]))
    assert systems == ["BM25", "many", "many, mean", "BM25 + many, summed", "BM25 + many, RRF"]
    groups = ["rated >= 4", "rated < 3"] if source == "file" else ["all"]
    entries = results["paraphrases"]
    assert [(e["system"], e["group"]) for e in entries] == [(s, g) for s in systems for g in groups]

    dataset = load_retrieval_dataset(twins)
    pairs = pairs_of(dataset, source)
    rankings = [rank_with_bm25(side) for side in pairs.sides]
    assert entries[: len(groups)] == compare_wordings(pairs, *rankings, k=2, seed=3).summary(3)
    queries = {row["queries"] for row in results["rows"]}
    assert queries == {6}  # the table itself is of the queries of the split

    page = (tmp_path / "out" / "x.md").read_text()
    assert page in capsys.readouterr().out and f"## twins, test, two wordings by {source}" in page
    first = entries[0]
    row = next(line for line in page.splitlines() if line.startswith(f"| {groups[0]} ({first['pairs']}) | BM25 |"))
    assert f"| {first['average_overlap']:.3f} [" in row and f"{first['ndcg_a']:.3f} / {first['ndcg_b']:.3f}" in row
    assert "A ranker that gives every query the same list has 1" in page


def test_rows_of_a_second_stage_are_compared_too(tmp_path, twins, saved):
    flags = ["--dataset", twins, "--rerank", saved, "--rerank_depth", 3, "--paraphrases", "cut", "--paraphrase_k", 2]
    entries = run(tmp_path, "bm25", "--baselines", "none", *flags)["paraphrases"]
    assert [entry["system"] for entry in entries] == ["BM25", "BM25, then 3 best by many"]


def test_the_frontier_compares_wordings_of_every_row(tmp_path, twins, saved):
    flags = ["--frontier", "--methods", "mean", "--frontier_cache", tmp_path / "rows", "--dataset", twins]
    (twins / "qrels" / "train.tsv").write_text((twins / "qrels" / "test.tsv").read_text())
    with pytest.raises(InputError, match="--paraphrases cut: makes queries that every row would have to be searched"):
        frontier([str(saved), *map(str, flags), "--paraphrases", "cut"])
    with pytest.raises(InputError, match="twins: k=10, but lists have 1 to 5 documents"):
        frontier([str(saved), *map(str, flags), "--paraphrases", "file"])
    with (twins / "corpus.jsonl").open("a") as file:
        file.writelines(json.dumps({"_id": f"more{i}", "text": f"tool {i}: more"}) + "\n" for i in range(8))
    flags += ["--paraphrases", "file", "--cache_dir", tmp_path / "cache"]
    results = frontier([str(saved), *map(str, flags)])
    systems = dict.fromkeys(row["system"] for row in results["rows"])
    assert dict.fromkeys(entry["system"] for entry in results["paraphrases"]) == systems and len(systems) > 3


def index_of(tmp_path: Path, model: Path, dataset: Path, engine: str) -> str:
    """The URI of an index of a data set's documents."""
    encoded = tmp_path / "encoded"
    assert main(["encode", str(model), "--input", str(dataset), "--output", str(encoded)]) == 0
    uri = f"{engine}:{tmp_path / 'index'}"
    assert main(["index", str(encoded), "--uri", uri]) == 0
    return uri


@pytest.mark.parametrize("source", ["file", "misspelt"])
def test_an_index_is_measured_as_its_users_search_it(tmp_path, twins, sentence_model, source):
    folder = tmp_path / "one"
    sentence_model.save_pretrained(str(folder))
    uri = index_of(tmp_path, folder, twins, "faiss")
    flags = ["--dataset", twins, "--paraphrases", source, "--paraphrase_k", 2, "--index_model", folder]
    results = run(tmp_path, uri, folder, "--baselines", "none", *flags)
    values = {system: [row["value"] for row in results["rows"] if row["system"] == system] for system in (uri, "one")}
    assert values[uri] == values["one"] and set(values["one"]) != {0}  # an exact index finds what the model does
    pairs = {
        system: [{**e, "system": ""} for e in results["paraphrases"] if e["system"] == system] for system in values
    }
    assert pairs[uri] == pairs["one"]
    assert results["models"] == {f"{uri} by one": fingerprint(folder), "one": fingerprint(folder)}


@pytest.mark.parametrize("weights", ["", "lexicon=1"])
def test_hits_of_an_index_are_cut_and_chosen_as_other_rankings_are(monkeypatch, weights):
    dataset = toy(documents=DEPTH + 20)
    # The first query is the document of its id, and is no answer to itself.
    ids = list(dataset.corpus)
    queries = {ids[0]: "a document", "q": "none"}
    dataset = replace(dataset, queries=queries, qrels=dict.fromkeys(queries, {"d1": 1}), same_ids=True)

    def find(target, askers, texts, args):
        assert args.k == DEPTH + 1  # one more, since one may be left out
        return [[Hit(name, float(max(0, 900 - rank))) for rank, name in enumerate(ids[: args.k])] for _ in texts]

    monkeypatch.setattr("polyrep.evaluation.indexes.find", find)
    kinds = {"dense": "sentence", "lexicon": "sparse"}
    target = SimpleNamespace(origins={name: SimpleNamespace(kind=kind) for name, kind in kinds.items()})
    asker = SimpleNamespace(made=lambda origin: True)
    args = SimpleNamespace(index_model="", index_weights=weights, revision=None)
    args.trust_remote_code, args.model_dtype = False, "float32"
    found = rank_with_index("any:", target, [asker], dataset, args, DEPTH)
    own = ids[0] != "d1"
    lengths = (found.scores > -np.inf).sum(1).tolist()
    assert own and lengths == ([899, 900] if weights else [DEPTH, DEPTH])
    assert found.positions[:, :2].tolist() == [[1, 2], [0, 1]]


@pytest.mark.parametrize("count", [5, 6])
def test_an_index_is_let_go_of_also_where_it_is_refused(monkeypatch, beir, count):
    closed = []
    target = SimpleNamespace(count=lambda: count, close=lambda: closed.append(count))
    monkeypatch.setattr("polyrep.evaluation.indexes.open_index", lambda uri, fingerprint: target)
    refused = nullcontext() if count == 5 else pytest.raises(InputError, match="any:: holds 6 documents, tiny has 5")
    with refused, opened("any:", [SimpleNamespace(fingerprint="f")], load_retrieval_dataset(beir)) as found:
        assert found is target and not closed
    assert closed == [count]


def test_an_index_of_other_documents_is_refused(tmp_path, twins, sentence_model):
    folder = tmp_path / "one"
    sentence_model.save_pretrained(str(folder))
    other = write_beir(tmp_path / "other")
    text = (other / "corpus.jsonl").read_text()
    (other / "corpus.jsonl").write_text(text.replace('"d5"', '"e5"'))
    uri = index_of(tmp_path, folder, other, "faiss")
    flags = ["--index_model", folder, "--baselines", "none"]
    with pytest.raises(InputError, match="has document 'e5', which is none of twins, so rankings of two corpora"):
        run(tmp_path, uri, "--dataset", twins, *flags)
    (twins / "corpus.jsonl").write_text("".join((twins / "corpus.jsonl").read_text().splitlines(True)[:4]))
    with pytest.raises(InputError, match="holds 5 documents, twins has 4"):
        run(tmp_path, uri, "--dataset", twins, *flags)


REFUSED = {
    "--paraphrases guess": "paraphrases 'guess': no source",
    "--paraphrases captions": "holds no images with captions",
    "--paraphrases file --paraphrase_k 0": "twins: k=0, but lists have 1 to 5 documents",
    "--paraphrases file": "twins: k=10, but lists have 1 to 5 documents",
    "--paraphrase_k 2": "--paraphrase_k 2: there is no --paraphrases",
    "--index_model bm25": "--index_model bm25: of an index, and no MODEL is the URI of one",
    "--index_weights a=1": "--index_weights a=1: of an index",
    "memory:": "--uri memory:: is gone when the command ends",
    "faiss:nowhere --window 4": "--window: has no part in an index such as faiss:nowhere",
    "faiss:nowhere --max_length 8": "--max_length: has no part in an index such as faiss:nowhere",
    "faiss:nowhere --hybrid --hybrid_weight 1": "--hybrid: has no part in an index",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_cannot_be_compared_is_refused_before_anything_is_encoded(tmp_path, twins, flags):
    with pytest.raises(InputError, match=REFUSED[flags]):
        run(tmp_path, "bm25", *flags.split(), "--dataset", twins)
    assert not (tmp_path / "cache").exists()


def test_pairs_and_indexes_have_no_part_in_benchmarks(monkeypatch):
    module = sys.modules[evaluate.__module__]
    monkeypatch.setattr(module, "open_suites", lambda _: [])
    for words, said in (
        (["minilm", "--paraphrases", "cut"], "--paraphrases cut: compares what is found in --dataset alone"),
        (["faiss:nowhere"], "faiss:nowhere: an index, which is searched with --dataset alone"),
    ):
        with pytest.raises(InputError, match=said):
            evaluate([*words, "--mteb", "NanoBEIR"])


# The table of all models


@pytest.fixture
def script(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("paraphrase_models")


def test_the_benchmark_sets_models_beside_a_constant_list(tmp_path, twins, saved, sentence_model, script, capsys):
    sentence_model.save_pretrained(str(tmp_path / "one"))
    with (twins / "paraphrases.jsonl").open("a") as file:
        file.writelines(
            json.dumps({"split": "test", "a": a, "b": b, "similarity": rating, "kind": "other"}) + "\n"
            for a, b, rating in (("q1", "q2", 0.5), ("q2", "q3b", 1))
        )
    flags = [
        "--models",
        saved,
        tmp_path / "models" / "lemur-minilm" / "final",
        "--model_dtype",
        "float32",
        "--sets",
        f"{twins}=file",
        "--k",
        2,
    ]
    flags += ["--baseline", tmp_path / "one", "--cache_dir", tmp_path / "cache", "--output", tmp_path / "out"]
    results = script.main([*map(str, flags)])
    systems = ["BM25", "the same list for all", "one", "many"]
    assert list(dict.fromkeys(row["system"] for row in results["rows"])) == systems
    entries = {(e["system"], e["group"]): e for e in results["paraphrases"]}
    assert len(entries) == 4 * 3 and entries["the same list for all", "rated >= 4"]["average_overlap"] == 1
    [failure] = results["failures"]
    recipe = (ROOT / "hub_configs" / "lemur-minilm" / "recipe.yaml").read_text().splitlines()[0]
    assert failure["system"] == "lemur-minilm" and failure["reason"] == f"not trained yet: {recipe[2:]}"

    claims = {claim["claim"].removeprefix("paraphrase."): claim for claim in results["claims"]}
    assert 0 <= claims["metric_error"]["value"] <= 1e-12 and claims["metric_error"]["met"]
    assert (claims["models_measured"]["value"], claims["models_measured"]["met"]) == (3, False)
    dataset = load_retrieval_dataset(twins)
    pairs = pairs_of(dataset)
    overlap = compare_wordings(pairs, rank_with_model("one", load(tmp_path / "one"), dataset)[0], k=2).average_overlap
    alike, apart = (overlap[:2], overlap[3:])  # rated 4.5 and 4, and 0.5 and 1 of other documents
    won = np.mean([(a > b) + (a == b) / 2 for a in alike for b in apart])
    assert claims["discrimination"]["value"] == pytest.approx(won) and claims["discrimination"]["pairs"] == [2, 2]
    seconds = claims["evaluator_overhead"]["seconds"]
    assert claims["evaluator_overhead"]["value"] == seconds["compare"] / seconds["search"]

    page = (tmp_path / "out" / "paraphrase-models.md").read_text()
    assert "| lemur-minilm | failed: not trained yet: accelerate launch" in page and page in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "paraphrase-models.png") as image:
        assert image.size == (round(6.5 * 144), 5 * 144)


def test_the_benchmark_knows_every_run_that_reads_text(script):
    runs = {path.parent.name for path in (ROOT / "hub_configs").glob("*/recipe.yaml")}
    assert set(script.RUNS) == {run for run in runs if "mobilenet" not in run}
    assert all("hub_configs/" + run in script.missing(f"nowhere/models/{run}/final") for run in script.RUNS)


def test_the_benchmark_refuses_what_it_cannot_measure(twins, script):
    with pytest.raises(InputError, match="--baseline .*lemur-minilm/final: not trained yet: accelerate launch"):
        script.main(["--baseline", f"{twins}/models/lemur-minilm/final", "--sets", f"{twins}=file"])
    with pytest.raises(InputError, match="--sets scitldr: has no source of pairs"):
        script.main(["--sets", "scitldr"])
    with pytest.raises(InputError, match="twins: k=6"):
        script.main(["--sets", f"{twins}=file", "--k", "6"])
