"""Exact search against plain loops in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from polyrep import InputError
from polyrep.encoding import Embeddings
from polyrep.search import ranking, scoring


def dense(values: np.ndarray) -> Embeddings:
    return Embeddings("sentence", values, None, None, values.shape[1], 1.0, Path())


def ragged(rng: np.random.Generator, lengths: list[int], dim: int = 5) -> Embeddings:
    offsets = np.cumsum([0, *lengths])
    return Embeddings(
        "tokens", rng.normal(size=(offsets[-1], dim)).astype(np.float16), offsets, None, dim, 1.0, Path()
    )


def sparse(rng: np.random.Generator, texts: int, vocabulary: int = 12) -> Embeddings:
    matrix = rng.random((texts, vocabulary)) * (rng.random((texts, vocabulary)) < 0.4)
    rows, columns = np.nonzero(matrix)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=texts))])
    values = matrix[rows, columns].astype(np.float32)
    return Embeddings("sparse", values, offsets, columns.astype(np.int32), vocabulary, 1.0, Path())


def texts_of(embeddings: Embeddings) -> list[np.ndarray]:
    values = embeddings.values.astype(np.float64)
    if embeddings.kind == "sentence":
        return list(values)
    parts = [slice(a, b) for a, b in zip(embeddings.offsets[:-1], embeddings.offsets[1:], strict=True)]
    if embeddings.kind == "tokens":
        return [values[part] for part in parts]
    rows = np.zeros((len(parts), embeddings.dim))
    for row, part in enumerate(parts):
        rows[row, embeddings.indices[part]] = values[part]
    return list(rows)


def brute_force(query: np.ndarray, document: np.ndarray, similarity: str) -> float:
    if similarity in ("maxsim", "meanmaxsim"):
        if not len(document):
            return scoring.EMPTY_DOCUMENT_SCORE
        total = sum(max(float(q @ d) for d in document) for q in query)
        return total / (len(query) if similarity == "meanmaxsim" else 1)
    if similarity == "cosine":
        return float(query @ document / (np.linalg.norm(query) * np.linalg.norm(document)))
    if similarity == "euclidean":
        return -float(np.linalg.norm(query - document))
    if similarity == "manhattan":
        return -float(np.abs(query - document).sum())
    return float(query @ document)


def cases() -> list[tuple[str, Embeddings, Embeddings]]:
    rng = np.random.default_rng(0)
    one = [dense(rng.normal(size=(n, 7)).astype(np.float32)) for n in (9, 40)]
    many = [ragged(rng, rng.integers(1, 9, n).tolist()) for n in (9, 40)]
    words = [sparse(rng, n) for n in (9, 40)]
    return [
        ("dot", *one),
        ("cosine", *one),
        ("euclidean", *one),
        ("maxsim", *many),
        ("meanmaxsim", *many),
        ("dot", *words),
        ("cosine", *words),
    ]


@pytest.mark.parametrize(("similarity", "queries", "documents"), cases())
@pytest.mark.parametrize("budget", [2**26, 200])  # one chunk, and chunks of a few documents
def test_search_finds_what_a_loop_finds(monkeypatch, similarity, queries, documents, budget):
    monkeypatch.setattr(ranking, "CHUNK_ELEMENTS", budget)
    ids = [f"d{i}" for i in range(len(documents))]
    positions, scores = ranking.exact_search(queries, documents, ranking.tie_ranks(ids), similarity=similarity, k=10)
    for row, query in enumerate(texts_of(queries)):
        expected = [(brute_force(query, d, similarity), ids[i], i) for i, d in enumerate(texts_of(documents))]
        best = sorted(expected, key=lambda e: (round(e[0], 5), e[1]), reverse=True)[:10]
        np.testing.assert_allclose(scores[row], [score for score, _, _ in best], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(
            [expected[p][0] for p in positions[row]], [score for score, _, _ in best], atol=1e-4
        )


@pytest.mark.parametrize(("similarity", "queries", "documents"), cases())
@pytest.mark.parametrize("k", [3, 1000])
def test_a_document_that_is_left_out_takes_nobodys_place(similarity, queries, documents, k):
    ranks = ranking.tie_ranks([f"d{i}" for i in range(len(documents))])
    options = {"similarity": similarity, "k": len(documents)}
    whole, scores = ranking.exact_search(queries, documents, ranks, **options)
    left_out = whole[:, 1].copy()
    left_out[0] = -1
    found, found_scores = ranking.exact_search(queries, documents, ranks, left_out=left_out, **(options | {"k": k}))
    assert found.shape == (len(queries), min(k, len(documents)))
    for row, place in enumerate(left_out):
        kept = [(p, s) for p, s in zip(whole[row], scores[row], strict=True) if p != place]
        assert list(zip(found[row], found_scores[row], strict=True))[: len(kept)] == kept[:k]
        if k > len(kept) < len(documents):
            assert found[row, -1] == place and found_scores[row, -1] == -np.inf


def test_ties_go_to_the_higher_document_id_also_at_the_cut(monkeypatch):
    monkeypatch.setattr(ranking, "CHUNK_ELEMENTS", 14)  # two documents a chunk
    values = np.zeros((9, 7), np.float32)
    values[4, 0] = 1.0
    values[6, 0] = -0.0
    query = np.eye(1, 7, dtype=np.float32)
    ids = ["b", "a", "i", "c", "d", "h", "g", "e", "f"]
    positions, scores = ranking.exact_search(
        dense(query), dense(values), ranking.tie_ranks(ids), similarity="dot", k=4
    )
    assert [ids[p] for p in positions[0]] == ["d", "i", "h", "g"]
    assert scores[0].tolist() == [1.0, 0.0, 0.0, 0.0]


def test_sort_keys_keep_the_order_of_every_sign_and_the_score_itself():
    scores = torch.tensor([[-torch.finfo(torch.float32).max, -2.0, -1e-30, 0.0, 1e-30, 1.5, 3e38]])
    keys = ranking.sort_keys(scores, torch.arange(7))
    assert (keys.diff() > 0).all()
    torch.testing.assert_close(ranking.scores_of(keys), scores, rtol=0, atol=0)


def test_a_document_without_vectors_comes_last():
    rng = np.random.default_rng(1)
    queries, documents = ragged(rng, [3]), ragged(rng, [2, 0, 4])
    positions, scores = ranking.exact_search(
        queries, documents, ranking.tie_ranks(["a", "b", "c"]), similarity="maxsim", k=3
    )
    assert positions[0, -1] == 1 and scores[0, -1] == scoring.EMPTY_DOCUMENT_SCORE


def test_maxsim_ignores_padding():
    rng = np.random.default_rng(2)
    queries, documents = (torch.from_numpy(rng.normal(size=(n, 4, 5))) for n in (3, 6))
    query_mask, document_mask = (torch.tensor([True, True, True, False]).expand(n, 4) for n in (3, 6))
    expected = [[brute_force(q[:3].numpy(), d[:3].numpy(), "maxsim") for d in documents] for q in queries]
    np.testing.assert_allclose(scoring.maxsim(queries, documents, query_mask, document_mask), expected, rtol=1e-5)


def test_embeddings_that_do_not_fit_together_are_refused():
    with pytest.raises(InputError, match="width 3.*width 4"):
        ranking.exact_search(
            dense(np.ones((1, 3))), dense(np.ones((2, 4))), ranking.tie_ranks(["a", "b"]), similarity="dot"
        )
    with pytest.raises(InputError, match="'maxsim'|'euclidean'"):
        rng = np.random.default_rng(3)
        ranking.exact_search(sparse(rng, 2), sparse(rng, 2), ranking.tie_ranks(["a", "b"]), similarity="euclidean")
    with pytest.raises(InputError, match="not finite"):
        ranking.exact_search(
            dense(np.full((1, 3), np.nan)), dense(np.ones((1, 3))), ranking.tie_ranks(["a"]), similarity="dot"
        )
