"""Fixed dimensional encodings against loops, and against what their inner product must be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from polyrep import InputError
from polyrep.evaluation.frontier import muvera
from polyrep.evaluation.frontier.muvera import Muvera

LENGTHS = [3, 1, 7, 2, 12, 5]


def tokens_of(seed: int, lengths: list[int], dim: int = 8) -> tuple[np.ndarray, np.ndarray]:
    values = np.random.default_rng(seed).normal(size=(sum(lengths), dim)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True), np.cumsum([0, *lengths])


def by_loops(made: Muvera, values: np.ndarray, offsets: np.ndarray, document: bool) -> np.ndarray:
    """Every text, repetition, partition and token by itself, in float64."""
    rows = []
    for start, stop in itertools.pairwise(offsets):
        parts = []
        for number in range(made.repetitions):
            planes = made.hyperplanes[number].double().numpy()
            project = np.eye(made.dim) if made.projections is None else made.projections[number].double().numpy()
            tokens = values[start:stop].astype(np.float64)
            codes = [tuple(bool(x @ plane > 0) for plane in planes.T) for x in tokens]
            for partition in range(2**made.k_sim):
                code = tuple(bool(partition >> bit & 1) for bit in range(made.k_sim))
                mine = [x @ project for x, other in zip(tokens, codes, strict=True) if other == code]
                if mine or not document:
                    total = np.sum(mine, axis=0) if mine else np.zeros(project.shape[1])
                    parts.append(total / len(mine) if document else total)
                    continue
                sides = np.array([1 if bit else -1 for bit in code])
                keys = [
                    (-sum(a != b for a, b in zip(other, code, strict=True)), sides @ (x @ planes))
                    for x, other in zip(tokens, codes, strict=True)
                ]
                parts.append(tokens[max(range(len(keys)), key=keys.__getitem__)] @ project)
        rows.append(np.concatenate(parts) / np.sqrt(made.repetitions))
    return np.stack(rows)


@pytest.mark.parametrize("dim_proj", [None, 4])
@pytest.mark.parametrize("k_sim", [0, 3])
def test_encodings_are_those_of_loops(monkeypatch, k_sim, dim_proj):
    monkeypatch.setattr(muvera, "BLOCK", 16)  # several blocks
    values, offsets = tokens_of(0, LENGTHS)
    made = Muvera(8, k_sim, dim_proj, repetitions=3, seed=5)
    for document, encode in ((True, made.documents), (False, made.queries)):
        expected = by_loops(made, values, offsets, document)
        assert made.width == expected.shape[1]
        np.testing.assert_allclose(encode(values, offsets).numpy(), expected, atol=1e-5)
        np.testing.assert_allclose(encode(torch.from_numpy(values), offsets).numpy(), expected, atol=1e-5)


def test_one_partition_is_the_sum_of_a_query_times_the_mean_of_a_document():
    (queries, asked), (documents, bounds) = tokens_of(1, [2, 4]), tokens_of(2, LENGTHS)
    made = Muvera(8, k_sim=0, dim_proj=None, repetitions=7)
    found = made.queries(queries, asked) @ made.documents(documents, bounds).T
    sums = np.add.reduceat(queries, asked[:-1])
    means = np.add.reduceat(documents, bounds[:-1]) / np.diff(bounds)[:, None]
    np.testing.assert_allclose(found.numpy(), sums @ means.T, atol=1e-5)


def test_projections_and_the_sketch_keep_inner_products_on_average():
    """Of one repetition with the same partitions, over many draws: the mean comes near the unprojected product."""
    (queries, asked), (documents, bounds) = tokens_of(3, [4]), tokens_of(4, [6])
    plain = Muvera(8, k_sim=0, dim_proj=None, repetitions=1)
    exact = float(plain.queries(queries, asked) @ plain.documents(documents, bounds).T)
    for options in ({"dim_proj": 2}, {"dim_proj": None, "final_dim": 4}):
        draws = []
        for seed in range(4000):
            made = Muvera(8, k_sim=0, repetitions=1, seed=seed, **options)
            draws.append(float(made.queries(queries, asked) @ made.documents(documents, bounds).T))
        error = np.std(draws) / np.sqrt(len(draws))
        assert np.std(draws) > 0 and abs(np.mean(draws) - exact) < 4 * error


def test_the_order_of_tokens_does_not_matter():
    values, offsets = tokens_of(5, [9])
    shuffled = values[np.random.default_rng(0).permutation(9)]
    made = Muvera(8, k_sim=4, dim_proj=3, repetitions=5)
    torch.testing.assert_close(made.documents(values, offsets), made.documents(shuffled, offsets))
    torch.testing.assert_close(made.queries(values, offsets), made.queries(shuffled, offsets))


def test_a_document_that_holds_the_tokens_of_a_query_comes_first():
    documents, bounds = tokens_of(6, [10] * 30, dim=32)
    asked = np.cumsum([0] + [4] * 30)
    queries = documents.reshape(30, 10, 32)[:, :4].reshape(-1, 32)
    made = Muvera(32, k_sim=3, dim_proj=8, repetitions=20)
    best = (made.queries(queries, asked) @ made.documents(documents, bounds).T).argmax(1)
    assert (best == torch.arange(30)).float().mean() > 0.9  # by chance 1/30


def test_a_seed_decides_and_a_query_without_token_is_zero():
    values, offsets = tokens_of(7, [3])
    one, same, other = (Muvera(8, seed=seed).documents(values, offsets) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.allclose(one, other)
    assert not Muvera(8).queries(values, np.array([0, 0, 3]))[0].any()


def test_what_cannot_be_encoded_is_refused():
    values, offsets = tokens_of(8, [3])
    with pytest.raises(InputError, match="document 1 has no token"):
        Muvera(8).documents(values, np.array([0, 2, 2, 3]))
    with pytest.raises(InputError, match="width 8, but dim=6"):
        Muvera(6).queries(values, offsets)
    for options in ({"k_sim": 13}, {"dim_proj": 0}, {"repetitions": 0}, {"final_dim": -1}):
        with pytest.raises(InputError, match=next(iter(options))):
            Muvera(8, **options)
