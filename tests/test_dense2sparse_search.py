"""The benchmark of sparse search: engines against the oracle, copies, and the second stage against a loop."""

from __future__ import annotations

import json
import sys
import tomllib
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, needs_seismic

from polyrep import InputError
from polyrep.encoding import Embeddings
from polyrep.report import check_results, to_markdown
from polyrep.search import exact_search
from polyrep.search.ranking import sparse_rows

sys.path.insert(0, str(ROOT / "benchmarks"))
import dense2sparse_search as search

VOCABULARY, DOCUMENTS, QUERIES = 500, 300, 20


def sparse(rows: int, words: tuple[int, int], seed: int, always: bool = False) -> Embeddings:
    """Vectors of words drawn alone, with weights that leave no tie; ``always`` gives each of them word 0 as well."""
    rng = np.random.default_rng(seed)
    terms = [np.sort(rng.choice(np.arange(1, VOCABULARY), rng.integers(*words), replace=False)) for _ in range(rows)]
    if always:
        terms = [np.r_[0, row] for row in terms]
    offsets = np.cumsum([0, *map(len, terms)])
    values = rng.gamma(1.5, 0.5, offsets[-1]).astype(np.float16)
    return Embeddings("sparse", values, offsets, np.concatenate(terms).astype(np.int32), VOCABULARY, 0.0, Path())


@pytest.fixture(scope="module")
def documents() -> Embeddings:
    return sparse(DOCUMENTS, (20, 40), seed=1, always=True)


@pytest.fixture(scope="module")
def queries() -> Embeddings:
    return sparse(QUERIES, (5, 15), seed=2)


@pytest.fixture(scope="module")
def oracle(queries: Embeddings, documents: Embeddings) -> list[list[int]]:
    return exact_search(queries, documents, np.arange(DOCUMENTS), similarity="dot", k=search.TOP)[0].tolist()


@pytest.fixture(
    scope="module",
    params=[pytest.param(search.Seismic, marks=needs_seismic), search.Qdrant],
    ids=lambda kind: kind.name,
)
def engine(request: pytest.FixtureRequest, documents: Embeddings) -> search.Engine:
    return request.param(documents)


def test_engines_find_what_the_oracle_finds(engine, queries, documents, oracle):
    found = [engine.search(query, search.TOP) for query in search.rows_of(queries)]
    assert [set(row) for row in found] == [set(row) for row in oracle]
    assert [row[0] for row in found] == [row[0] for row in oracle]  # best first
    # An index holds at least a number of two bytes for every weight, and a few more than that at most.
    assert 2 * len(documents.values) < engine.size() < 200 * len(documents.values)


def test_engines_leave_out_documents_without_a_common_word(engine, queries, documents):
    query = search.rows_of(queries)[0]
    sharing = {n for n, (terms, _) in enumerate(search.rows_of(documents)) if set(terms) & set(query[0])}
    assert 0 < len(sharing) < DOCUMENTS
    assert set(engine.search(query, DOCUMENTS)) <= sharing
    assert len(engine.search(query, 3)) == 3


def test_faiss_finds_what_the_oracle_finds():
    vectors = np.random.default_rng(0).standard_normal((DOCUMENTS, 16)).astype(np.float32)
    asked = np.random.default_rng(1).standard_normal((QUERIES, 16)).astype(np.float32)
    flat = search.Flat(vectors)
    expected = np.argsort(-(asked.astype(np.float64) @ vectors.T), axis=1)[:, : search.TOP]
    assert [flat.search(query, search.TOP) for query in asked] == expected.tolist()
    assert 0 <= flat.size() - vectors.nbytes < 100  # a header and the vectors


def test_two_stages_with_all_candidates_are_exact_search(engine, queries, documents, oracle):
    # By word 0 alone, which every document has, the first stage ranks by something else entirely.
    own = (np.zeros(1, np.int32), np.ones(1, np.float16))
    asked, kept = sparse_rows(queries, 0, QUERIES, "dot"), sparse_rows(documents, 0, DOCUMENTS, "dot")

    def found(depth: int) -> list[list[int]]:
        both = search.TwoStages(engine, kept, depth)
        return [both.search((own, query), search.TOP) for query in asked]

    assert found(DOCUMENTS) == oracle
    few = found(search.TOP)
    first = set(np.argsort(-kept[:, 0].toarray()[:, 0], kind="stable")[: search.TOP].tolist())
    assert all(set(row) == first for row in few) and few != oracle


def test_rescoring_is_a_loop_over_words(queries, documents):
    rng = np.random.default_rng(3)
    candidates = rng.integers(0, DOCUMENTS, (QUERIES, 30))
    candidates[2, 5:] = -1
    candidates[3] = -1
    asked, kept = sparse_rows(queries, 0, QUERIES, "dot"), sparse_rows(documents, 0, DOCUMENTS, "dot")
    found = search.rescore(asked, kept, candidates)
    weights = [dict(zip(*(part.tolist() for part in row), strict=True)) for row in search.rows_of(documents)]
    for row, (terms, values) in enumerate(search.rows_of(queries)):
        for column, chosen in enumerate(candidates[row]):
            expected = -np.inf if chosen < 0 else 0.0
            for term, value in zip(terms.tolist(), values.tolist(), strict=True):
                expected += value * weights[chosen].get(term, 0.0)
            assert found[row, column] == pytest.approx(expected, rel=1e-12)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(search.rescore(asked[7], kept, candidates[7:8]), found[7:8])  # one query alone


def test_agreement_forgives_ties_and_nothing_else():
    exact = np.array([[4.0, 2.0]])
    for found, same, recall in (
        ([4.0, 2.0], 1, 1),
        ([2.0, 4.0], 1, 1),  # sets
        ([4.0, 2.0 * (1 - search.TIE / 2)], 1, 1),  # a document that ties with the last
        ([4.0, 2.0 * (1 - search.TIE * 2)], 0, 1 / 2),
        ([3.0, 2.0], 0, 1),  # no such documents, but each is as good as the worst of the best
        ([4.0, -np.inf], 0, 1 / 2),
    ):
        assert search.agreement(np.array([found]), exact) == {"top 10 exact": same, "recall of top 10": recall}
    nothing = search.agreement(np.array([[3.0, -np.inf]]), np.array([[3.0, 0.0]]))
    assert nothing["top 10 exact"] == 1  # a document that is not listed is as good as one without a common word


def test_copies_are_as_many_as_asked_for_and_no_duplicates(documents):
    count = 2 * DOCUMENTS + 50
    made = search.replicated(documents, count, seed=0)
    assert len(made) == count and made.values.dtype == documents.values.dtype
    rows = search.rows_of(made)
    assert len({(terms.tobytes(), values.tobytes()) for terms, values in rows}) == count
    for terms, _ in rows:
        assert (np.diff(terms) > 0).all() and terms.min() >= 0 and terms.max() < VOCABULARY
    for (terms, values), (kept, weights) in zip(rows, search.rows_of(documents), strict=False):
        assert terms.tolist() == kept.tolist() and values.tolist() == weights.tolist()  # the originals come first
    again, other = (search.replicated(documents, count, seed) for seed in (0, 1))
    for part in ("values", "indices", "offsets"):
        np.testing.assert_array_equal(getattr(made, part), getattr(again, part))
    assert not np.array_equal(made.values[: len(other.values)], other.values[: len(made.values)])
    assert len(search.replicated(documents, 7, seed=0)) == 7


def test_copies_are_near_to_what_they_copy(documents):
    made = sparse_rows(search.replicated(documents, 2 * DOCUMENTS, seed=0), 0, 2 * DOCUMENTS, "dot")
    originals, copies = made[:DOCUMENTS], made[DOCUMENTS:]
    shared = originals.multiply(copies > 0).tocsr()
    kept = shared.nnz / originals.nnz
    assert kept == pytest.approx(1 - search.SWAPPED, abs=0.01)
    ratio = np.log((copies.multiply(originals > 0).tocsr().data / shared.data).astype(np.float64))
    # Words that the swap brought back with another weight are the few that are far off, hence the quartiles.
    assert np.median(ratio) == pytest.approx(0, abs=0.01)
    assert np.diff(np.percentile(ratio, (25, 75)))[0] / 1.349 == pytest.approx(search.WEIGHT_NOISE, rel=0.1)
    with pytest.raises(InputError, match="1 document cannot make 2"):
        search.replicated(sparse(1, (5, 6), seed=0), 2, seed=0)


def test_dense_copies_are_near_and_as_long():
    vectors = np.random.default_rng(0).standard_normal((DOCUMENTS, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    before = vectors.copy()
    made = search.replicated_dense(vectors, 2 * DOCUMENTS, seed=0)
    np.testing.assert_array_equal(vectors, before)
    np.testing.assert_array_equal(made[:DOCUMENTS], vectors)
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, rtol=1e-5)
    assert len(np.unique(made, axis=0)) == len(made)
    cosine = (made[DOCUMENTS:] * vectors).sum(1)
    assert cosine.mean() == pytest.approx(1 / np.sqrt(1 + search.DENSE_NOISE**2), abs=1e-3)
    np.testing.assert_array_equal(search.replicated_dense(vectors, 2 * DOCUMENTS, seed=0), made)
    assert not np.array_equal(search.replicated_dense(vectors, 2 * DOCUMENTS, seed=1), made)


def test_rows_fit_the_layout_and_name_copies(queries, documents, capfd):
    rng = np.random.default_rng(0)
    dense = [rng.standard_normal((n, 16)).astype(np.float32) for n in (QUERIES, DOCUMENTS)]
    rows = search.measure(queries, queries, documents, *dense, sizes=(100, 400), dataset="toy", repeats=1)
    fields = {"name": "n", "command": "c", "created": "", "commit": "", "hardware": "", "versions": {}, "seeds": [0]}
    results = fields | {"settings_tried": 1, "models": {}, "rows": rows, "claims": [], "drawn": []}
    check_results(results)
    json.dumps(results)
    page = to_markdown(results)
    assert "## toy, 100 documents, test" in page
    assert "## toy, 400 documents, 100 of them replicated with noise, test" in page
    value = {(row["documents"], row["system"], row["metric"]): row["value"] for row in rows}
    assert len(value) == len(rows)
    timed = {system for _, system, metric in value if metric == "ms per query"}
    assert timed == {row["system"] for row in rows} - {"sparse, exact search"}
    assert all(value[size, "sparse, Qdrant", "top 10 exact"] == 1 for size in (100, 400))
    assert all(value[size, search.Flat.name, "top 10 exact"] == 1 for size in (100, 400))
    # The first stage had all words and more candidates than are returned, so nothing can be lost by the second.
    assert value[400, "sparse, Qdrant, two stages", "recall of top 10"] == 1
    words = int(documents.offsets[100])
    assert value[100, "sparse, exact search", "MB"] == pytest.approx((words * (4 + 4) + 101 * 4) / 1e6)
    with pytest.raises(InputError, match="queries differ in number: 20 sparse, 20 unexpanded, 19 dense"):
        search.measure(queries, queries, documents, dense[0][1:], dense[1])
    with pytest.raises(InputError, match="5 documents have no top 10"):
        search.measure(queries, queries, documents, *dense, sizes=(5,))


@pytest.mark.parametrize("package", ["seismic", "qdrant_edge", "faiss"])
def test_a_missing_engine_says_how_to_get_it(package, queries, documents, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    dense = np.ones((QUERIES, 4), np.float32), np.ones((DOCUMENTS, 4), np.float32)
    extra = "seismic" if package == "seismic" else "search"
    with pytest.raises(InputError, match=rf'{package}: not installed.*pip install "polyrep\[{extra}\]"'):
        search.measure(queries, queries, documents, *dense, sizes=(20,))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {requirement.partition(">")[0] for requirement in project["optional-dependencies"][extra]}
    assert search.PACKAGES[package] in named


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere: not found.*--head FOLDER"):
        search.load_vectors(Namespace(head=tmp_path / "nowhere", backbone=tmp_path, dataset=tmp_path, queries=1))
    with pytest.raises(InputError, match="nothing: not found.*--dataset FOLDER"):
        search.load_vectors(Namespace(head=tmp_path, backbone=tmp_path, dataset=tmp_path / "nothing", queries=1))
