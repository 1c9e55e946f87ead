"""Costs against sizes of real arrays, rankings against plain loops."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import DOCUMENTS, QUERIES
from sentence_transformers.sparse_encoder.evaluation import SparseInformationRetrievalEvaluator
from test_scoring import brute_force, dense, sparse, texts_of

from polyrep import InputError
from polyrep.data import load_retrieval_dataset
from polyrep.encoding import Embeddings, embeddings
from polyrep.evaluation import systems as retrievers
from polyrep.evaluation.systems import bytes_per_document, costs_of, flops, rank_with_model


def vectors_of(rng: np.random.Generator, lengths: list[int], dim: int = 12, dtype: str = "float32") -> Embeddings:
    """Unit vectors of texts with that many tokens."""
    values = rng.normal(size=(sum(lengths), dim))
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return Embeddings("tokens", values.astype(dtype), np.cumsum([0, *lengths]), None, dim, 1.0, Path())


def active(embeddings: Embeddings) -> np.ndarray:
    return np.stack(texts_of(embeddings)) != 0


def normalised(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


# Costs


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("dims", [1, 7, 8, 9, 384])
def test_bytes_are_those_of_the_arrays(dims, dtype):
    assert bytes_per_document("dense", dtype, dims=dims) == np.zeros(dims, dtype).nbytes
    postings = np.zeros(dims, np.int32).nbytes + np.zeros(dims, dtype).nbytes
    assert bytes_per_document("sparse", dtype, nnz=dims) == postings
    for vectors in (1, 5):
        stored = np.zeros((vectors, dims), dtype).nbytes + np.zeros(1, np.int64).nbytes
        assert bytes_per_document("multi", dtype, dims=dims, vectors=vectors) == stored
        bits = np.packbits(np.zeros((vectors, dims), bool), axis=1)
        assert bytes_per_document("binary", dtype, dims=dims, vectors=vectors) == bits.nbytes
    assert bytes_per_document("binary", dtype, dims=dims) == math.ceil(dims / 8)


def test_bytes_of_an_unknown_kind_are_refused():
    with pytest.raises(InputError, match="'quaternary'.*dense, sparse, multi, binary or routed"):
        bytes_per_document("quaternary", dims=8)


def test_flops_are_the_mean_number_of_shared_terms():
    rng = np.random.default_rng(0)
    queries, documents = active(sparse(rng, 6)), active(sparse(rng, 11))
    shared = [int((q & d).sum()) for q in queries for d in documents]
    assert flops(queries.mean(axis=0), documents.mean(axis=0)) == pytest.approx(np.mean(shared))


def test_costs_of_one_vector_are_its_numbers():
    documents = dense(np.ones((4, 7), np.float16))
    assert costs_of(documents, documents) == {"bytes_per_document": documents.values.nbytes / 4}


def test_costs_of_several_vectors_count_the_mean_text():
    rng = np.random.default_rng(1)
    documents = vectors_of(rng, [3, 0, 8], dtype="float16")
    stored = (documents.values.nbytes + 3 * 8) / 3  # and an offset each
    assert costs_of(vectors_of(rng, [2]), documents) == pytest.approx(
        {"bytes_per_document": stored, "vectors_per_document": 11 / 3}
    )


def test_costs_of_sparse_vectors_tell_queries_from_documents():
    rng = np.random.default_rng(2)
    queries, documents = sparse(rng, 5), sparse(rng, 9)
    shared = [(q & d).sum() for q in active(queries) for d in active(documents)]
    assert costs_of(queries, documents) == pytest.approx(
        {
            "bytes_per_document": (documents.values.nbytes + documents.indices.nbytes) / 9,
            "active_dims": active(documents).sum(axis=1).mean(),
            "query_active_dims": active(queries).sum(axis=1).mean(),
            "flops": np.mean(shared),
        }
    )


def test_sparse_costs_equal_those_of_sentence_transformers(beir, sparse_model):
    dataset = load_retrieval_dataset(beir)
    costs = rank_with_model("sparse", sparse_model, dataset)[0].costs
    stock = SparseInformationRetrievalEvaluator(
        dataset.queries, dataset.corpus, {q: set(judged) for q, judged in dataset.qrels.items()}, write_csv=False
    )
    stock(sparse_model)
    assert costs["flops"] == pytest.approx(stock.sparsity_stats["avg_flops"])
    assert costs["active_dims"] == pytest.approx(stock.sparsity_stats["corpus_active_dims"])
    assert costs["query_active_dims"] == pytest.approx(stock.sparsity_stats["query_active_dims"])
    assert costs["flops"] > 0


# Models


@pytest.mark.parametrize("family", ["sentence_model", "multi_vector_model", "sparse_model"])
def test_a_model_ranks_as_its_own_vectors_say(monkeypatch, request, beir, family):
    monkeypatch.setattr(retrievers, "DEPTH", 3)
    model, dataset = request.getfixturevalue(family), load_retrieval_dataset(beir)
    ranking = rank_with_model("any", model, dataset, dtype="float32")[0]
    options = {"convert_to_sparse_tensor": False} if family == "sparse_model" else {}
    queries, documents = (
        model.encode_query(list(QUERIES.values()), **options),
        model.encode_document(list(DOCUMENTS.values()), **options),
    )
    for row, query in enumerate(queries):
        scores = [brute_force(np.asarray(query), np.asarray(d), str(model.similarity_fn_name)) for d in documents]
        best = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:3]
        assert ranking.positions[row].tolist() == best
        np.testing.assert_allclose(ranking.scores[row], [scores[p] for p in best], rtol=1e-4)


def test_an_index_in_half_precision_takes_half_the_bytes(beir, sentence_model):
    dataset = load_retrieval_dataset(beir)
    half, full = (rank_with_model("m", sentence_model, dataset, dtype=d)[0].costs for d in ("float16", "float32"))
    assert 2 * half["bytes_per_document"] == full["bytes_per_document"] == 32 * 4


# Pooling


def test_the_mean_row_is_one_vector_against_the_sum_of_the_query(beir, multi_vector_model):
    dataset = load_retrieval_dataset(beir)
    plain, mean = rank_with_model("m", multi_vector_model, dataset, pooling=["mean"], dtype="float32")
    assert (plain.system, mean.system) == ("m", "m, mean")
    sums = [v.sum(axis=0) for v in multi_vector_model.encode_query(list(QUERIES.values()))]
    means = [normalised(v.mean(axis=0)) for v in multi_vector_model.encode_document(list(DOCUMENTS.values()))]
    expected = np.array([[float(q @ d) for d in means] for q in sums])
    np.testing.assert_array_equal(mean.positions, np.argsort(-expected, axis=1))
    np.testing.assert_allclose(mean.scores, -np.sort(-expected, axis=1), rtol=1e-4)
    assert mean.costs["bytes_per_document"] == 16 * 4
    assert plain.costs["bytes_per_document"] > 3 * mean.costs["bytes_per_document"]


def test_pooling_to_one_vector_ranks_like_the_mean(beir, multi_vector_model):
    _, mean, one = rank_with_model(
        "m", multi_vector_model, load_retrieval_dataset(beir), pooling=["mean", "1"], dtype="float32"
    )
    assert one.system == "m, hierarchical 1" and one.costs["vectors_per_document"] == 1
    np.testing.assert_array_equal(one.positions, mean.positions)
    np.testing.assert_allclose(one.scores, mean.scores, rtol=1e-4)


def test_pooling_keeps_as_many_vectors_as_asked_or_as_there_are():
    lengths = list(range(41))
    documents = vectors_of(np.random.default_rng(3), lengths)
    for k in (1, 2, 3, 4, 5, 7, 8, 12, 16, 27, 32, 39, 40, 41, 64):
        pooled = retrievers._hierarchical(documents, k)
        assert pooled.lengths.tolist() == [min(k, tokens) for tokens in lengths]
        np.testing.assert_allclose(np.linalg.norm(pooled.values, axis=1), 1, rtol=1e-5)
        for before, after in zip(texts_of(documents)[: k + 1], texts_of(pooled), strict=False):
            np.testing.assert_allclose(after, before, atol=1e-6)  # nothing to merge


def test_one_pooled_vector_is_the_normalised_mean():
    documents = vectors_of(np.random.default_rng(4), [1, 2, 5, 30])
    expected = [normalised(text.mean(axis=0)) for text in texts_of(documents)]
    np.testing.assert_allclose(retrievers._hierarchical(documents, 1).values, expected, rtol=1e-5)
    np.testing.assert_allclose(retrievers.mean_of_tokens(documents).values, expected, rtol=1e-5)


def test_pooling_merges_the_vectors_that_are_close():
    north, east = np.eye(2)[0], np.eye(2)[1]
    values = np.stack([normalised(v) for v in (north, east, north + 0.1 * east, east + 0.1 * north)])
    documents = Embeddings("tokens", values.astype(np.float32), np.array([0, 4]), None, 2, 1.0, Path())
    pooled = sorted(retrievers._hierarchical(documents, 2).values.tolist())
    expected = sorted(normalised(values[i] + values[i + 2]).tolist() for i in (0, 1))
    np.testing.assert_allclose(pooled, expected, rtol=1e-5)


def test_the_mean_of_a_text_without_vectors_is_zero():
    documents = vectors_of(np.random.default_rng(5), [0, 2, 0, 0, 3, 0])
    sums = embeddings._sums(documents)
    np.testing.assert_allclose(sums, [text.sum(axis=0) for text in texts_of(documents)], rtol=1e-5, atol=1e-6)
    assert np.isfinite(embeddings.mean_of_tokens(documents).values).all()


@pytest.mark.parametrize("how", ["median", "0", "-1", "1.5", "²", ""])
def test_a_pooling_that_is_none_is_refused_before_anything_is_encoded(monkeypatch, beir, multi_vector_model, how):
    monkeypatch.delattr(retrievers, "embed")
    with pytest.raises(InputError, match=re.escape(repr(how)) + ".*`mean` or a number"):
        rank_with_model("m", multi_vector_model, load_retrieval_dataset(beir), pooling=["mean", how])


@pytest.mark.parametrize("family", ["sentence_model", "sparse_model"])
def test_one_vector_cannot_be_pooled(request, beir, family):
    with pytest.raises(InputError, match="m: pooling .*this one has one"):
        rank_with_model("m", request.getfixturevalue(family), load_retrieval_dataset(beir), pooling=["mean"])
