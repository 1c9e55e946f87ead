"""The ReinPool room: its maths against plain loops in float64, what it refuses, and how it learns."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DOCUMENTS, QUERIES, run_python, write_beir
from safetensors.torch import load_file
from scipy.special import erf
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from torch import Tensor
from transformers import AutoModel, BertModel

import polyrep
from polyrep import InputError
from polyrep.cli import train
from polyrep.hub import fingerprint
from polyrep.hub.polyrep_folder import fingerprints_of
from polyrep.methods import (
    ReinforceObjective,
    ReinPoolConfig,
    ReinPoolModel,
    ReinPoolPooling,
    SoftGateObjective,
    spherical_kmeans,
)
from polyrep.methods.reinpool.objective import ndcg
from polyrep.search import maxsim
from polyrep.search.scoring import packed_maxsim
from polyrep.training.losses import row_uniform

TEXTS = [*DOCUMENTS.values(), *QUERIES.values()]
DIM = 8
LENGTHS = [5, 9, 1, 7]

# Settings that between them reach every part of the pooling.
SETTINGS: dict[str, dict[str, Any]] = {
    "mean": {},
    "soft mean": {"weights": "soft"},
    "no filter layer": {"num_layers": 0},
    "two filter layers": {"num_layers": 2, "num_heads": 2},
    "high threshold": {"threshold": 0.8, "min_keep": 2},
    "not normalised": {"normalize": False, "weights": "soft"},
    "projection": {"projection": True},
    "projection, not normalised": {"projection": True, "normalize": False},
    "k-means": {"pooling": "kmeans", "num_vectors": 3},
    "soft k-means": {"pooling": "kmeans", "num_vectors": 3, "weights": "soft", "normalize": False},
    "slots": {"pooling": "slots", "num_vectors": 3},
    "soft slots": {"pooling": "slots", "num_vectors": 2, "weights": "soft"},
    "positions": {"patch_columns": 3, "weights": "soft"},
    "refinement": {"refinement": 2},
    "refined clusters": {"refinement": 1, "pooling": "kmeans", "num_vectors": 2, "projection": True},
    "refined, not normalised": {"refinement": 1, "normalize": False},
    "binary": {"quantization": "binary", "projection": True, "pooling": "kmeans", "num_vectors": 2},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For models this small, waiting for threads takes longer than the work."""
    threads, patch = torch.get_num_threads(), pytest.MonkeyPatch()
    torch.set_num_threads(1)
    patch.setattr(os, "cpu_count", lambda: 1)  # else training asks for as many as there are
    yield
    torch.set_num_threads(threads)
    patch.undo()


def random_head(**config: Any) -> ReinPoolModel:
    """A head with random weights, whose log-odds have mean 0 and deviation 2: it keeps some and drops others."""
    torch.manual_seed(0)
    head = ReinPoolModel(ReinPoolConfig(**{"dim": DIM} | config)).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
        logits = head.keep_logits(torch.stack(documents([64] * 4, head.config.dim)), torch.ones(4, 64).bool())
        head.keep.weight.mul_(2 / logits.std())
        head.keep.bias.copy_((head.keep.bias - logits.mean()) * 2 / logits.std())
    return head


def documents(lengths: list[int] = LENGTHS, dim: int = DIM, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.functional.normalize(torch.randn(n, dim, generator=generator), dim=-1) for n in lengths]


def padded(rows: list[Tensor], filling: float = 0.0) -> tuple[Tensor, Tensor]:
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filling)
    return tokens, torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]


def in_order(vectors: Any) -> np.ndarray:
    """Vectors of a document sorted by their first number: two of equal weight are equally near to their mean."""
    vectors = np.asarray(vectors)
    return vectors[np.argsort(vectors[:, 0])]


# --- the formula, a vector at a time in float64 ---


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def attention(w: dict[str, np.ndarray], part: str, heads: int, states: np.ndarray, context: np.ndarray | None = None):
    """A layer over the rows of ``states``, which attend to one another or to the rows of ``context``."""

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean()) / math.sqrt(x.var() + 1e-5)
        return x * w[f"{part}.{name}.weight"] + w[f"{part}.{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return w[f"{part}.{name}.weight"] @ x + w[f"{part}.{name}.bias"]

    normed = [norm(row, "norm") for row in states]
    seen = normed if context is None else [norm(row, "context_norm") for row in context]
    size, result = states.shape[1] // heads, []
    for state, row in zip(states, normed, strict=True):
        mixed = []
        for head in range(heads):
            cut = slice(head * size, (head + 1) * size)
            scores = [linear(row, "query")[cut] @ linear(other, "key")[cut] / math.sqrt(size) for other in seen]
            shares = np.exp(scores) / np.exp(scores).sum()
            mixed.append(sum(s * linear(other, "value")[cut] for s, other in zip(shares, seen, strict=True)))
        state = state + linear(np.concatenate(mixed), "out")
        hidden = linear(norm(state, "ffn_norm"), "ffn_in")
        result.append(state + linear(hidden * (1 + erf(hidden / math.sqrt(2))) / 2, "ffn_out"))
    return np.stack(result)


def lloyd(vectors: np.ndarray, weights: list[float], k: int) -> list[int]:
    """Number of each vector's cluster, None-free only for those that weigh something."""
    vectors = [unit(v) for v in vectors]
    some = [i for i, weight in enumerate(weights) if weight > 0]
    mean = unit(sum(weights[i] * vectors[i] for i in some))
    centres = [vectors[max(some, key=lambda i: vectors[i] @ mean)]]
    while len(centres) < k:
        unexplained = {i: weights[i] * (1 - max(vectors[i] @ c for c in centres)) for i in some}
        worst = max(some, key=unexplained.__getitem__)
        if unexplained[worst] <= 1e-6:
            break
        centres.append(vectors[worst])

    def nearest(i: int) -> int:
        return max(range(len(centres)), key=lambda c: vectors[i] @ centres[c])

    for _ in range(8):
        members = [[i for i in some if nearest(i) == c] for c in range(len(centres))]
        for c, own in enumerate(members):
            if own:
                centres[c] = unit(sum(weights[i] * vectors[i] for i in own))
    return [nearest(i) if weights[i] > 0 else -1 for i in range(len(vectors))]


def by_hand(head: ReinPoolModel, document: Tensor) -> tuple[list[np.ndarray], list[float], list[np.ndarray]]:
    """Vectors of one document, keep probability of each token, and the vectors before projection and signs."""
    config, tokens = head.config, document.double().numpy()
    w = {name: value.double().numpy() for name, value in head.state_dict().items()}
    states = tokens
    if config.patch_columns:
        quarter, places = config.dim // 4, []
        for n in range(len(tokens)):
            row, column = divmod(n, config.patch_columns)
            rates = [100 ** (-i / quarter) for i in range(quarter)]
            sines = [f(x * r) for x in (row, column) for f in (math.sin, math.cos) for r in rates]
            places.append(unit(np.array(sines)))  # half of the squares of any angle's sine and cosine are 1
        states = tokens + np.stack(places)
    for layer in range(config.num_layers):
        states = attention(w, f"filter.{layer}", config.num_heads, states)
    probability = [sigmoid(float(w["keep.weight"][0] @ state + w["keep.bias"][0])) for state in states]
    weights = probability
    if config.weights == "hard":
        least = sorted(range(len(tokens)), key=lambda i: -probability[i])[: config.min_keep]
        weights = [float(p > config.threshold or i in least) for i, p in enumerate(probability)]
    k = config.num_vectors
    if config.pooling == "slots":
        shares = []
        for token, weight in zip(tokens, weights, strict=True):
            powers = np.exp([token @ unit(slot) * math.exp(w["slot_log_scale"]) for slot in w["slots"]])
            shares.append(weight * powers / powers.sum())
        shares = np.array(shares).T  # (vectors, tokens)
    else:
        cluster = lloyd(tokens, weights, k) if k > 1 else [0] * len(tokens)
        shares = np.array([[x * (c == number) for x, c in zip(weights, cluster, strict=True)] for number in range(k)])
    before, after = [], []
    kept = tokens[np.array(weights) > 0]
    for share in shares:
        if share.sum() == 0:
            continue
        vector = sum(s * token for s, token in zip(share, tokens, strict=True))
        vector = unit(vector) if config.normalize else vector / share.sum()
        for layer in range(config.refinement):
            vector = attention(w, f"refine.{layer}", config.num_heads, vector[None], kept)[0]
        vector = unit(vector) if config.normalize else vector
        before.append(vector)
        if config.projection:
            projected = w["project.weight"] @ vector
            vector = w["project.weight"].T @ (unit(projected) if config.normalize else projected)
        if config.quantization == "binary":
            vector = np.where(vector >= 0, 1, -1) / math.sqrt(config.dim)
        after.append(vector)
    return after, probability, before


@pytest.mark.parametrize("name", SETTINGS)
def test_pooled_vectors_are_those_of_the_formula(name):
    head, rows = random_head(**SETTINGS[name]), documents()
    tokens, mask = padded(rows, filling=0.3)  # padding that is not zero must count nothing either
    with torch.no_grad():
        output = head(tokens, mask)
    assert output.embeddings.shape == (len(rows), head.config.num_vectors, DIM)
    for row, vectors, there, probability in zip(
        rows, output.embeddings, output.mask, output.keep_probability, strict=True
    ):
        expected, kept, _ = by_hand(head, row)
        assert int(there.sum()) == len(expected)
        np.testing.assert_allclose(in_order(vectors[there]), in_order(expected), atol=2e-5)
        assert not vectors[~there].any()
        np.testing.assert_allclose(probability[: len(row)], kept, atol=1e-5)
        assert not probability[len(row) :].any()
    decided = (output.keep_probability[mask] > head.config.threshold).tolist()
    assert set(decided) == {True, False}, "a filter that keeps all or nothing would not show what it does"


def test_queries_need_no_projection():
    head, rows = random_head(projection=True), documents()
    query = np.random.default_rng(0).normal(size=DIM)
    matrix = head.project.weight.detach().double().numpy()
    with torch.no_grad():
        stored = head(*padded(rows)).embeddings[:, 0].double().numpy()
    for row, vector in zip(rows, stored, strict=True):
        (pooled,) = by_hand(head, row)[2]
        assert query @ vector == pytest.approx((matrix @ query) @ unit(matrix @ pooled), abs=1e-5)


@pytest.mark.parametrize("settings", [{}, {"weights": "soft"}, {"num_layers": 0}, {"num_layers": 2}])
def test_an_untrained_head_is_plain_mean_pooling(settings):
    torch.manual_seed(0)
    head, rows = ReinPoolModel(ReinPoolConfig(dim=DIM, projection=True, refinement=1, **settings)).eval(), documents()
    with torch.no_grad():
        output = head(*padded(rows))
    for row, vectors, probability in zip(rows, output.embeddings, output.keep_probability, strict=True):
        np.testing.assert_allclose(vectors[0], unit(row.double().numpy().mean(0)), atol=1e-6)
        np.testing.assert_allclose(probability[: len(row)], sigmoid(1), atol=1e-6)


@pytest.mark.parametrize("weights", ["hard", "soft"])
def test_an_untrained_head_for_several_vectors_is_plain_clusters(weights):
    torch.manual_seed(0)
    head = ReinPoolModel(ReinPoolConfig(dim=DIM, pooling="kmeans", num_vectors=3, weights=weights)).eval()
    rows = documents([12, 3, 8])
    with torch.no_grad():
        output = head(*padded(rows))
    for row, vectors, there in zip(rows, output.embeddings, output.mask, strict=True):
        row = row.double().numpy()
        cluster = np.array(lloyd(row, [1.0] * len(row), 3))
        expected = [unit(row[cluster == c].mean(0)) for c in sorted(set(cluster))]
        np.testing.assert_allclose(in_order(vectors[there]), in_order(expected), atol=1e-5)


def test_at_least_min_keep_vectors_are_kept_and_they_are_the_likeliest():
    rows = documents([6, 2])
    for least in (1, 2, 4):
        head = random_head(threshold=0.999999, min_keep=least)
        with torch.no_grad():
            tokens, mask = padded(rows)
            logits = head.keep_logits(tokens, mask)
            weights = head.decide(logits, mask)
        for row, kept, logit in zip(rows, weights, logits, strict=True):
            expected = sorted(range(len(row)), key=lambda i: -logit[i].item())[:least]
            assert kept.nonzero()[:, 0].tolist() == sorted(expected)


# --- clusters ---


@pytest.mark.parametrize("k", [1, 2, 4, 7])
def test_clusters_are_those_of_plain_loops(k):
    rows = documents([20, 5, 13], seed=k)
    tokens, mask = padded(rows)
    weights = torch.rand(mask.shape, generator=torch.Generator().manual_seed(k)) * mask
    weights[:, 2] = 0
    found = spherical_kmeans(tokens, weights, k)
    for row, weight, cluster in zip(rows, weights, found, strict=True):
        weight = weight[: len(row)].double().tolist()
        expected = lloyd(row.double().numpy(), weight, k)
        assert [int(c) for c, x in zip(cluster, weight, strict=False) if x > 0] == [c for c in expected if c >= 0]


def test_clusters_are_the_same_each_time_and_whatever_the_padding():
    rows = documents([11, 6])
    tokens, mask = padded(rows)
    first = spherical_kmeans(tokens, mask.float(), 4)
    torch.manual_seed(5)
    assert torch.equal(first, spherical_kmeans(tokens, mask.float(), 4))
    wide = torch.cat([tokens, torch.randn(2, 9, DIM)], 1)
    wide[1, 6:] = torch.randn(14, DIM)
    found = spherical_kmeans(wide, torch.nn.functional.pad(mask, (0, 9)).float(), 4)
    for row, narrow, padding in zip(rows, first, found, strict=True):
        assert torch.equal(narrow[: len(row)], padding[: len(row)])


def test_what_weighs_nothing_neither_seeds_nor_moves_a_cluster():
    two = torch.eye(DIM)[[0, 0, 1, 1]] + 0.01 * torch.eye(DIM)[[2, 3, 4, 5]]
    far = -(torch.eye(DIM)[[0, 0]] + torch.eye(DIM)[[1, 1]])  # would be the first to seed another cluster
    tokens, weights = torch.cat([two, far])[None], torch.tensor([[1.0, 1, 1, 1, 0, 0]])
    cluster = spherical_kmeans(tokens, weights, 2)[0].tolist()
    assert cluster[0] == cluster[1] != cluster[2] == cluster[3]
    assert len(set(spherical_kmeans(tokens, torch.ones(1, 6), 2)[0, :4].tolist())) == 1, "with weight, they do"


@pytest.mark.parametrize("k", [3, 5])
def test_a_document_with_fewer_different_vectors_gets_fewer(k):
    torch.manual_seed(0)
    head = ReinPoolModel(ReinPoolConfig(dim=DIM, pooling="kmeans", num_vectors=k)).eval()
    rows = [torch.eye(DIM)[[0, 1, 0, 1, 0, 1]], torch.eye(DIM)[[3] * 4], torch.eye(DIM)[:6], 2 * torch.eye(DIM)[:1]]
    with torch.no_grad():
        output = head(*padded(rows))
    assert output.mask.sum(1).tolist() == [2, 1, k, 1]
    assert not output.embeddings[~output.mask].any()
    found = {tuple(v.round().int().tolist()) for v in output.embeddings[0][output.mask[0]]}
    assert found == {tuple(torch.eye(DIM).int()[i].tolist()) for i in (0, 1)}


def test_more_vectors_than_tokens_are_kept_gives_one_for_each_kept_token():
    head = random_head(pooling="kmeans", num_vectors=4, threshold=0.999999, min_keep=2)
    (row,) = documents([9])
    with torch.no_grad():
        output = head(row[None])
        weights = head.decide(head.keep_logits(row[None], torch.ones(1, 9).bool()), torch.ones(1, 9).bool())[0]
    assert output.mask.shape == (1, 4) and output.mask.sum() == 2
    np.testing.assert_allclose(in_order(output.embeddings[0, output.mask[0]]), in_order(row[weights > 0]), atol=1e-6)


def test_a_head_serves_other_numbers_of_vectors_but_slots_do_not():
    (row,) = documents([9])
    clusters, slots = random_head(pooling="kmeans", num_vectors=2), random_head(pooling="slots", num_vectors=2)
    with torch.no_grad():
        assert clusters(row[None], num_vectors=3).embeddings.shape == (1, 3, DIM)
        assert slots(row[None], num_vectors=2).embeddings.shape == (1, 2, DIM)
    with pytest.raises(ValueError, match="num_vectors=3, but this head gives 2 .pooling='slots'"):
        slots(row[None], num_vectors=3)


# --- a set, or places on a page ---


def test_without_places_a_document_is_a_set():
    head = random_head(weights="soft")
    (row,) = documents([7])
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    with torch.no_grad():
        one, other = head(row[None]), head(row[order][None])
    torch.testing.assert_close(one.keep_probability[:, order], other.keep_probability, atol=1e-5, rtol=0)
    torch.testing.assert_close(one.embeddings, other.embeddings, atol=1e-5, rtol=0)


def test_equal_patches_on_other_places_get_other_decisions():
    row = torch.eye(DIM)[[0, 1, 0, 2, 0, 3]][None]  # the first vector at row 0 column 0, 0-2, and 1-1
    mask = torch.ones(1, 6).bool()
    with torch.no_grad():
        placed, free = (
            random_head(patch_columns=columns).keep_logits(row, mask)[0, [0, 2, 4]] for columns in (3, None)
        )
    torch.testing.assert_close(free, free[:1].expand(3), atol=1e-5, rtol=0)
    assert min((a - b).abs() for a, b in itertools.combinations(placed, 2)) > 1e-2


def test_places_are_counted_from_the_first_vector_that_is_there():
    head = random_head(patch_columns=3)
    rows = documents([7, 4])
    tokens, mask = padded(rows)
    left = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    with torch.no_grad():
        torch.testing.assert_close(
            head(left, mask.flip(1)).embeddings, head(tokens, mask).embeddings, atol=1e-5, rtol=0
        )


# --- refinement ---


def test_refinement_starts_as_no_change_and_then_counts():
    plain, refined = random_head(), random_head(refinement=2)
    fresh = ReinPoolModel(refined.config).state_dict()
    refined.load_state_dict({name: plain.state_dict().get(name, value) for name, value in fresh.items()})
    tokens, mask = padded(documents())
    with torch.no_grad():
        torch.testing.assert_close(refined(tokens, mask).embeddings, plain(tokens, mask).embeddings)
        torch.nn.init.normal_(refined.refine[1].out.weight)
        assert (refined(tokens, mask).embeddings - plain(tokens, mask).embeddings).abs().max() > 1e-2


def test_refinement_looks_only_at_what_is_kept():
    head = random_head(refinement=1)
    tokens, mask = padded(documents([9]))
    weights = torch.tensor([[1.0, 1, 0, 1, 0, 0, 1, 1, 0]])
    dropped, kept = tokens.clone(), tokens.clone()
    dropped[0, [2, 4]], kept[0, [3, 6]] = tokens[0, [0, 1]], tokens[0, [6, 3]] * 0.5
    with torch.no_grad():
        first, unmoved = (head.pool(x, weights, 1)[0] for x in (tokens, dropped))
        share = weights[:, None]
        mixed = [head.combine(x, share, (weights > 0)[:, None]) for x in (tokens, kept)]
    torch.testing.assert_close(first, unmoved)
    assert not torch.allclose(*mixed, atol=1e-3)


# --- batches, types, and every door of the pooling ---


@pytest.mark.parametrize("name", [*SETTINGS])
def test_a_document_gives_the_same_alone_and_in_any_batch(name):
    pooling = ReinPoolPooling(random_head(dropout=0.5, **SETTINGS[name]))
    pooling.model.train()  # nobody encodes with dropout
    rows = documents()
    together, alone = pooling.pool(rows), [pooling.pool_one(row) for row in rows]
    tokens, mask = padded(rows, filling=7.0)
    by_mask = pooling.pool(tokens, attention_mask=mask)
    left = pooling.pool(
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left"), padding_side="left"
    )
    for i, expected in enumerate(alone):
        count = len(expected)
        assert count <= pooling.model.config.num_vectors
        assert not by_mask[i, count:].any() and not left[i, : left.shape[1] - count].any()
        for found in (together[i], by_mask[i, :count], left[i, left.shape[1] - count :]):
            np.testing.assert_allclose(in_order(found), in_order(expected), atol=1e-5)
    assert pooling.model.training, "training goes on as it was"


def test_training_has_dropout_and_pooling_has_none():
    head = random_head(dropout=0.5, weights="soft").train()
    tokens, mask = padded(documents())
    with torch.no_grad():
        assert not torch.equal(head.keep_logits(tokens, mask), head.keep_logits(tokens, mask))
    pooling = ReinPoolPooling(head)
    torch.testing.assert_close(pooling.pool(tokens, attention_mask=mask), pooling.pool(tokens, attention_mask=mask))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_vectors_come_back_in_the_type_they_came_in(dtype):
    pooling = ReinPoolPooling(random_head(pooling="kmeans", num_vectors=2, projection=True, refinement=1))
    rows = documents()
    found = pooling.pool([row.to(dtype) for row in rows])
    expected = pooling.pool([row.to(dtype).float() for row in rows])
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs.to(dtype))
    half = ReinPoolPooling(random_head(projection=True, refinement=1, weights="soft").to(torch.bfloat16))
    whole = ReinPoolPooling(random_head(projection=True, refinement=1, weights="soft"))
    for ours, theirs in zip(half.pool(rows), whole.pool(rows), strict=True):
        assert ours.dtype == torch.float32
        assert torch.cosine_similarity(ours, theirs).min() > 0.99


def test_nothing_to_pool_gives_nothing_and_queries_pass():
    pooling = ReinPoolPooling(random_head())
    assert pooling.pool([]) == []
    assert pooling.pool(torch.zeros(0, 3, DIM)).shape == (0, 3, DIM)
    rows = documents()
    assert pooling.pool(rows, task="query") is rows and pooling.pool_one(rows[0], task="query") is rows[0]
    assert [len(x) for x in pooling.pool(rows)] == [1] * len(rows)
    features = {"token_embeddings": torch.zeros(0, 3, DIM), "attention_mask": torch.zeros(0, 3)}
    assert pooling(dict(features), task="document")["token_embeddings"].shape == (0, 3, DIM)
    with pytest.raises(ValueError, match="^ReinPoolPooling: padding_side='middle'"):
        pooling.pool(torch.ones(1, 2, DIM), padding_side="middle")
    with pytest.raises(ValueError, match=rf"^ReinPoolPooling: a text .* shape \({DIM},\).* shape \(tokens, dim\)"):
        pooling.pool([torch.ones(DIM)])


@pytest.mark.parametrize("tasks", [["query", "document"], "query"])
def test_what_is_pooled_can_be_chosen_and_is_remembered(tasks, tmp_path):
    head = random_head()
    head.save_pretrained(tmp_path / "head")
    rows = documents()
    pooling = ReinPoolPooling(head, tasks=tasks)
    pooling.save(tmp_path / "saved")
    opened = ReinPoolPooling.from_pretrained(tmp_path / "saved")
    changed = ReinPoolPooling.from_pretrained(tmp_path / "head", tasks=tasks)
    expected = [tasks] if isinstance(tasks, str) else tasks
    for door in (pooling, opened, changed):
        assert door.tasks == door.model.config.tasks == expected
        assert [len(x) for x in door.pool(rows, task="query")] == [1] * len(rows)
        assert [len(x) for x in door.pool(rows)] == ([1] * len(rows) if "document" in expected else LENGTHS)


# --- what is refused ---


@pytest.mark.parametrize(
    ("tokens", "mask", "options", "words"),
    [
        (torch.ones(2, 3, 5), None, {}, r"shape \(2, 3, 5\).*\(documents, tokens, 8\).*not recorded"),
        (torch.ones(3, DIM), None, {}, r"shape \(3, 8\)"),
        (torch.ones(2, 3, DIM), torch.ones(2, 4), {}, r"mask of shape \(2, 4\)"),
        (torch.ones(3, 2, DIM), torch.tensor([[1, 1], [0, 0], [1, 0]]), {}, "document 1 of the batch has no token"),
        (torch.ones(1, 2, DIM), None, {"num_vectors": 0}, "num_vectors=0"),
        (torch.ones(1, 2, DIM), None, {"num_vectors": 2.0}, "num_vectors=2.0"),
        (torch.ones(1, 2, DIM), None, {"num_vectors": 2}, "pooling='mean' gives one vector, not 2"),
    ],
)
def test_what_cannot_be_pooled_is_refused(tokens, mask, options, words):
    with pytest.raises(ValueError, match=words):
        random_head()(tokens, mask, **options)


@pytest.mark.parametrize(("value", "length"), [(math.nan, "nan"), (math.inf, "inf"), (0.0, "0.0")])
def test_a_vector_that_means_nothing_is_refused_unless_it_is_padding(value, length):
    tokens, mask = padded(documents([3, 5, 4]))
    tokens[2, 1] = value
    with pytest.raises(ValueError, match=f"document 2 of the batch has a token vector of length {length}"):
        random_head()(tokens, mask)
    mask[2, 1] = False
    with torch.no_grad():
        assert random_head()(tokens, mask).embeddings.isfinite().all()


# --- behind late-interaction models ---


def attached(
    retriever: MultiVectorEncoder, head: ReinPoolModel, family: Any = MultiVectorEncoder, **options: Any
) -> Any:
    return family(modules=[*retriever.children(), ReinPoolPooling(head)], device="cpu", **options)


@pytest.fixture
def head() -> ReinPoolModel:
    return random_head(dim=16, pooling="kmeans", num_vectors=2)


def test_a_head_pools_for_one_call(multi_vector_model, head):
    pooling = ReinPoolPooling(head)
    whole = multi_vector_model.encode_document(TEXTS)
    pooled = multi_vector_model.encode_document(TEXTS, token_pooling=pooling)
    assert max(len(x) for x in pooled) == 2 < min(len(x) for x in whole)
    for text, found in zip(whole, pooled, strict=True):
        expected, _, _ = by_hand(head, text)
        np.testing.assert_allclose(in_order(found), in_order(expected), atol=2e-5)
    queries = multi_vector_model.encode_query(TEXTS), multi_vector_model.encode_query(TEXTS, token_pooling=pooling)
    assert all(torch.equal(*pair) for pair in zip(*queries, strict=True))


def test_a_saved_pipeline_opens_and_its_head_opens_through_automodel(multi_vector_model, head, tmp_path):
    model = attached(multi_vector_model, head)
    folder = polyrep.save(model, tmp_path / "pipeline", form="pipeline")
    opened = polyrep.load(folder, trust_remote_code=True, device="cpu")
    for ours, theirs in zip(opened.encode_document(TEXTS), model.encode_document(TEXTS), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert opened.get_embedding_dimension() == 16 and opened.similarity_fn_name == "maxsim"
    part = json.loads((folder / "modules.json").read_text())[-1]["path"]
    alone = AutoModel.from_pretrained(folder / part, trust_remote_code=True).eval()
    assert type(alone).__name__ == "ReinPoolModel"
    tokens, mask = padded(documents(dim=16))
    with torch.no_grad():
        ours, theirs = alone(token_embeddings=tokens, attention_mask=mask), head(tokens, mask)
    assert set(ours) == {"embeddings", "mask", "keep_probability"}
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value)


def late_interaction(backbone: Path, kind: str) -> MultiVectorEncoder:
    torch.manual_seed(1)
    names = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    transformer = Transformer(str(backbone))
    mask = MultiVectorMask()
    if kind == "query expansion":
        expansion = {"strategy": "fixed", "attend": False, "length": 24}
        transformer = Transformer(str(backbone), query_expansion=expansion)
    elif kind == "skiplist":
        mask = MultiVectorMask(skiplist_words=[":", "a", "##s"], skiplist_tasks=["query", "document"])
    elif kind == "image patches":
        vocabulary = transformer.tokenizer.get_vocab()
        mask = MultiVectorMask(keep_only_token_ids=[vocabulary[x] for x in ("file", "##s", "##e", "list")])
    narrow = Dense(32, 16, bias=False, activation_function=torch.nn.Identity(), **names)
    return MultiVectorEncoder(modules=[transformer, narrow, mask, Normalize(**names)], device="cpu")


@pytest.mark.parametrize("kind", ["plain", "query expansion", "skiplist", "image patches"])
def test_the_dot_product_of_one_vector_is_maxsim(backbone, kind):
    retriever = late_interaction(backbone, kind)
    settings = {"weights": "soft", "projection": True}
    many = attached(retriever, random_head(dim=16, **settings))
    one = attached(retriever, random_head(dim=16, output="sentence_embedding", **settings), SentenceTransformer)
    queries, texts = list(QUERIES.values()), list(DOCUMENTS.values())
    expected = many.similarity(many.encode_query(queries), many.encode_document(texts))
    found = one.similarity(one.encode_query(queries), one.encode_document(texts))
    assert found.shape == (len(queries), len(texts))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    plain = late_interaction(backbone, "plain")
    scored = [len(x) for x in retriever.encode_query(queries)], [len(x) for x in retriever.encode_document(texts)]
    usual = [len(x) for x in plain.encode_query(queries)], [len(x) for x in plain.encode_document(texts)]
    assert (scored != usual) == (kind != "plain"), "the case must differ from the plain one"
    for query, vector in zip(retriever.encode_query(queries), one.encode_query(queries), strict=True):
        np.testing.assert_allclose(vector, np.asarray(query).sum(0), atol=1e-5)


def test_one_vector_scores_by_dot_product_and_nothing_else(multi_vector_model):
    head = random_head(dim=16, output="sentence_embedding")
    assert attached(multi_vector_model, head, SentenceTransformer).similarity_fn_name == "dot"
    with pytest.raises(ValueError, match="similarity_fn_name='cosine'.*Use similarity_fn_name='dot'"):
        attached(multi_vector_model, head, SentenceTransformer, similarity_fn_name="cosine")
    with pytest.raises(ValueError, match="truncate_dim=4"):
        attached(multi_vector_model, head, SentenceTransformer, truncate_dim=4)


def test_the_wrong_family_for_the_output_is_refused_with_the_way_to_open_it(multi_vector_model):
    single, many = random_head(dim=16, output="sentence_embedding"), random_head(dim=16)
    with pytest.raises(ValueError, match="'sentence_embedding' in a MultiVectorEncoder.*output='token_embeddings'"):
        attached(multi_vector_model, single)
    with pytest.raises(ValueError, match="'token_embeddings' in a SentenceTransformer.*output='sentence_embedding'"):
        attached(multi_vector_model, many, SentenceTransformer)


def test_a_backbone_of_another_width_is_refused(multi_vector_model):
    head = random_head(base_model_id="theirs")
    with pytest.raises(ValueError, match=r"width 16.*dim=8.*\(theirs\)"):
        attached(multi_vector_model, head)
    with pytest.raises(ValueError, match=r"\(documents, tokens, 8\).*\(theirs\)"):
        multi_vector_model.encode_document(TEXTS[:1], token_pooling=ReinPoolPooling(head))


def test_another_backbone_gives_a_warning_that_names_both(backbone, head, tmp_path, caplog):
    other = tmp_path / "other"
    shutil.copytree(backbone, other)
    model = BertModel.from_pretrained(backbone)
    torch.nn.init.normal_(model.embeddings.word_embeddings.weight)
    model.save_pretrained(other)
    head.config.base_model_id, head.config.base_fingerprint = "ours", fingerprint(backbone)
    assert fingerprints_of(Transformer(str(backbone))) == [fingerprint(backbone), fingerprint(backbone, 1)]
    with caplog.at_level(logging.WARNING):
        pipeline = attached(late_interaction(backbone, "plain"), head)
        assert "fingerprint" not in caplog.text
        attached(late_interaction(other, "plain"), head)
    assert "ours" in caplog.text and fingerprint(backbone)[:16] in caplog.text
    assert str(other) in caplog.text and fingerprint(other)[:16] in caplog.text
    caplog.clear()
    polyrep.save(pipeline, tmp_path / "saved")
    with caplog.at_level(logging.WARNING):
        polyrep.load(tmp_path / "saved", trust_remote_code=True)
    assert "fingerprint" not in caplog.text


def test_a_head_opens_with_other_settings_but_not_with_another_shape(tmp_path):
    random_head().save_pretrained(tmp_path / "head")
    opened = ReinPoolPooling.from_pretrained(tmp_path / "head", num_vectors=8, pooling="kmeans", threshold=0.3)
    rows = documents([20, 15])
    expected = random_head(num_vectors=8, pooling="kmeans", threshold=0.3)
    for ours, row in zip(opened.pool(rows), rows, strict=True):
        np.testing.assert_allclose(in_order(ours), in_order(by_hand(expected, row)[0]), atol=2e-5)
    for name, value in {"refinement": 2, "projection": True, "num_layers": 3, "dim": 4, "patch_columns": 2}.items():
        with pytest.raises(ValueError, match=f"{name}={value}, but the head was trained with {name}="):
            ReinPoolPooling.from_pretrained(tmp_path / "head", **{name: value})
    with pytest.raises(ValueError, match="pooling='slots'"):
        ReinPoolPooling.from_pretrained(tmp_path / "head", pooling="slots")
    for wrong, meant in {"quantize": "quantization", "vectors": "num_vectors"}.items():
        with pytest.raises(ValueError, match=f"{wrong}=1 is no setting. Did you mean '{meant}'"):
            ReinPoolPooling.from_pretrained(tmp_path / "head", **{wrong: 1})
    with pytest.raises(ValueError, match=r"min_keep=3 has nothing to decide.*add weights='hard'"):
        ReinPoolPooling.from_pretrained(tmp_path / "head", weights="soft", min_keep=3)
    random_head(pooling="slots", num_vectors=2).save_pretrained(tmp_path / "slots")
    with pytest.raises(ValueError, match="num_vectors=3"):
        ReinPoolPooling.from_pretrained(tmp_path / "slots", num_vectors=3)


def test_a_pipeline_is_not_taken_for_its_head(backbone, head, tmp_path):
    polyrep.save(attached(late_interaction(backbone, "plain"), head), tmp_path / "saved", form="pipeline")
    with pytest.raises(ValueError, match=r"holds a model of type 'pipeline', not a polyrep_reinpool head.*subfolder="):
        ReinPoolPooling.from_pretrained(tmp_path / "saved", num_vectors=4)
    module = json.loads((tmp_path / "saved" / "modules.json").read_text())[-1]["path"]
    opened = ReinPoolPooling.from_pretrained(tmp_path / "saved", subfolder=module)
    rows = documents([4, 3], head.config.dim)
    for ours, row in zip(opened.pool(rows), rows, strict=True):
        np.testing.assert_allclose(ours, ReinPoolPooling(head).pool([row])[0], atol=1e-6)


def test_a_head_without_its_weights_names_the_file(tmp_path):
    random_head().save_pretrained(tmp_path / "head")
    (tmp_path / "head" / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        ReinPoolPooling.from_pretrained(tmp_path / "head")


# --- the objectives ---


def features(rows: list[Tensor], index: list[int]) -> dict[str, Tensor]:
    tokens, mask = padded(rows)
    return {"token_embeddings": tokens, "attention_mask": mask, "index": torch.tensor(index)}


QUERY_OF = [0, 3, 4]
"""Place of each query of the batch among all queries."""
DOCUMENT_OF = [2, 5, 2, 0, 5]
"""Place of each document of the batch: those of the queries, then others. Two are there twice."""
RELEVANT = [(0, 2), (1, 2), (2, 1), (3, 5), (4, 2), (4, 0)]


ALL_QUERIES = documents([3, 2, 4, 5, 1], seed=3)
ALL_DOCUMENTS = documents([5, 3, 9, 4, 2, 7], seed=2)


@pytest.fixture
def batch() -> list[dict[str, Tensor]]:
    return [
        features([ALL_QUERIES[i] for i in QUERY_OF], QUERY_OF),
        features([ALL_DOCUMENTS[i] for i in DOCUMENT_OF], DOCUMENT_OF),
    ]


LABELS = torch.arange(3)


def corpus_of(queries: list[Tensor], texts: list[Tensor], relevant: list[tuple[int, int]]) -> Any:
    """What an objective asks of the training data."""
    return SimpleNamespace(
        query_sums=lambda: torch.stack([query.sum(0) for query in queries]),
        document_means=lambda: torch.nn.functional.normalize(torch.stack([text.mean(0) for text in texts]), dim=-1),
        relevant=lambda: torch.tensor(relevant),
        most_tokens=lambda: max(map(len, texts)),
    )


def reinforce(head: ReinPoolModel, seed: int = 0, step: int = 0, **settings: Any) -> ReinforceObjective:
    objective = ReinforceObjective(head, **{"bank": 500} | settings)  # five queries: 500 draws miss none of them
    objective.prepare(corpus_of(ALL_QUERIES, ALL_DOCUMENTS, RELEVANT))
    objective.seed, objective.progress = seed, (step, 100)
    return objective


def rows_of(side: dict[str, Tensor]) -> list[np.ndarray]:
    pairs = zip(side["token_embeddings"], side["attention_mask"], strict=True)
    return [tokens[mask].double().numpy() for tokens, mask in pairs]


def test_ndcg_is_that_of_trec_eval():
    pytrec_eval = pytest.importorskip("pytrec_eval", reason="no wheel for Linux aarch64")
    scores = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    relevant = torch.rand(20, 30, generator=torch.Generator().manual_seed(1)) < 0.1
    relevant[0] = False
    names = [f"d{i}" for i in range(30)]
    run = {str(q): dict(zip(names, row.tolist(), strict=True)) for q, row in enumerate(scores)}
    qrels = {str(q): dict(zip(names, row.int().tolist(), strict=True)) for q, row in enumerate(relevant)}
    judged = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg", "ndcg_cut.3,10"}).evaluate(run)
    for cutoff, measure in ((None, "ndcg"), (3, "ndcg_cut_3"), (10, "ndcg_cut_10")):
        expected = [judged[str(q)][measure] if relevant[q].any() else 0.0 for q in range(20)]
        np.testing.assert_allclose(ndcg(scores, relevant, cutoff), expected, atol=1e-5)


def drawn(objective: ReinforceObjective, probability: list[list[float]]) -> np.ndarray:
    """``(batch, samples, 9)`` what is kept in each sample, from the same uniform numbers as the objective's."""
    samples = objective.settings["samples"]
    uniform = row_uniform(3, samples, 9, seed=objective.seed, step=objective.progress[0]).double().numpy()
    kept = np.zeros((3, samples, 9), bool)
    for b, row in enumerate(probability):
        kept[b, :, : len(row)] = uniform[b, :, : len(row)] < np.array(row)
    return kept


def sampled_rewards(objective: ReinforceObjective, batch: list[dict[str, Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    """Rewards ``(batch, samples)`` and what was kept for them, a sample and a rank at a time."""
    head, cutoff = objective.model, objective.settings["cutoff"]
    queries, texts = rows_of(batch[0]), rows_of(batch[1])
    hand = [by_hand(head, torch.from_numpy(text)) for text in texts]
    kept = drawn(objective, [hand[b][1] for b in range(3)])
    everything = [query.double().numpy().sum(0) for query in ALL_QUERIES]
    means = [unit(text.double().numpy().mean(0)) for text in ALL_DOCUMENTS]
    rewards = np.zeros(kept.shape[:2])

    def gain(rank: int) -> float:
        return 0.0 if cutoff is not None and rank > cutoff else 1 / math.log2(1 + rank)

    for b, s in itertools.product(range(3), range(kept.shape[1])):
        chosen = texts[b][kept[b, s, : len(texts[b])]]
        vector = unit(chosen.sum(0)) if len(chosen) else np.zeros(DIM)
        if objective.settings["reward"] == "inverse":
            scores = [vector @ unit(query) for query in everything]
            ranking = sorted(range(5), key=lambda q: -scores[q])
            asks = {q for q, d in RELEVANT if d == DOCUMENT_OF[b]}
            ideal = sum(gain(rank) for rank in range(1, len(asks) + 1))
            rewards[b, s] = sum(gain(rank) for rank, q in enumerate(ranking, 1) if q in asks) / ideal
        else:
            asked = queries[b].sum(0)
            others = [mean @ asked for d, mean in enumerate(means) if d != DOCUMENT_OF[b]]
            rewards[b, s] = gain(1 + sum(score > vector @ asked for score in others))
    return rewards, kept


@pytest.mark.parametrize("reward", ["inverse", "forward"])
@pytest.mark.parametrize("cutoff", [None, 2])
def test_rewards_and_their_gradient_are_those_of_plain_loops(batch, reward, cutoff):
    head = random_head()
    objective = reinforce(head, seed=3, step=8, reward=reward, cutoff=cutoff, samples=6, entropy_weight=0.3)
    losses = objective(batch, LABELS)
    assert set(losses) == {"policy", "entropy"}, "no part of this head has gradients of its own"
    rewards, kept = sampled_rewards(objective, batch)
    assert objective.metrics["reward"].item() == pytest.approx(rewards.mean(), abs=1e-5)
    differ = [b for b in range(3) if rewards[b].max() > rewards[b].min()]
    assert objective.metrics["skipped"].item() == pytest.approx(1 - len(differ) / 3)
    assert differ
    probability = [by_hand(head, torch.from_numpy(row))[1] for row in rows_of(batch[1])[:3]]
    policy, slope = 0.0, torch.zeros(3, 9)
    for b, s in itertools.product(differ, range(6)):
        advantage = rewards[b, s] - np.mean([rewards[b, other] for other in range(6) if other != s])
        for n, p in enumerate(probability[b]):
            policy -= advantage * math.log(p if kept[b, s, n] else 1 - p) / 6 / len(differ)
            slope[b, n] -= advantage * (float(kept[b, s, n]) - p) / 6 / len(differ)  # derivative by the log-odds
    assert losses["policy"].item() == pytest.approx(policy, abs=1e-4)
    everyone = [p for row in probability for p in row]
    entropy = -np.mean([p * math.log(p) + (1 - p) * math.log(1 - p) for p in everyone])
    assert losses["entropy"].item() == pytest.approx(-0.3 * entropy, abs=1e-5)
    assert objective.metrics["kept"].item() == pytest.approx(np.mean(everyone), abs=1e-5)
    own = {name: value[:3] for name, value in batch[1].items()}
    logits = head.keep_logits(own["token_embeddings"], own["attention_mask"])
    parameters = [*head.filter.parameters(), *head.keep.parameters()]
    expected = torch.autograd.grad(logits, parameters, slope)
    for found, wanted in zip(torch.autograd.grad(losses["policy"], parameters), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-3)


def test_draws_follow_from_seed_and_step(batch):
    head = random_head()
    losses = [
        [
            reinforce(head, seed, step, reward=reward)(batch, LABELS)["policy"].item()
            for reward in ("inverse", "forward")
        ]
        for seed, step in ((0, 1), (0, 1), (0, 2), (1, 1))
    ]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2] != losses[3] != losses[0]


def test_documents_whose_samples_all_rank_alike_are_skipped(batch):
    alone = [{name: value[:1] for name, value in side.items()} for side in batch]
    objective = reinforce(random_head(), bank=0)  # one query, which every sample ranks first
    losses = objective(alone, LABELS[:1])
    assert objective.metrics["skipped"].item() == 1 and objective.metrics["reward"].item() == 1
    assert losses["policy"].item() == 0
    assert all(not g.any() for g in torch.autograd.grad(losses["policy"], list(objective.model.parameters())))


def test_the_bank_is_a_sample_of_all_queries_beside_those_of_the_batch(batch):
    objective = reinforce(random_head(), bank=0, reward="inverse")
    seen: list[int] = []
    plain = objective.query_vectors

    class Counting:
        def __len__(self) -> int:
            return len(plain)

        def __getitem__(self, rows: Tensor) -> Tensor:
            seen.extend(rows.tolist())
            return plain[rows]

    objective.query_vectors = Counting()  # type: ignore[assignment]
    objective(batch, LABELS)
    assert seen == QUERY_OF
    objective.settings["bank"], drawn_ones = 1, set()
    for step in range(30):
        seen.clear()
        objective.progress = (step, 100)
        objective(batch, LABELS)
        assert set(QUERY_OF) <= set(seen) and len(seen) == len(set(seen)) <= 4
        drawn_ones |= set(seen)
    assert drawn_ones == set(range(5))


def test_what_has_gradients_of_its_own_is_distilled_on_what_the_filter_keeps(batch):
    head = random_head(projection=True, pooling="kmeans", num_vectors=2)
    objective = reinforce(head, ladder="2", entropy_weight=0.0)
    losses = objective(batch, LABELS)
    assert set(losses) == {"policy", "distillation"}
    assert losses["distillation"].item() == pytest.approx(distillation_by_hand(head, batch, 2)[0], rel=1e-3)
    gradients = torch.autograd.grad(losses["distillation"], list(head.keep.parameters()), allow_unused=True)
    assert gradients == (None, None), "the filter learns by reward"


def distillation_by_hand(head: ReinPoolModel, batch: list[dict[str, Tensor]], number: int) -> tuple[float, float]:
    """Divergence both ways, and InfoNCE, of documents that are in the batch, each once."""
    queries, texts = rows_of(batch[0]), rows_of(batch[1])
    columns = [i for i, d in enumerate(DOCUMENT_OF) if d not in DOCUMENT_OF[:i]]
    usual, head.config.num_vectors = head.config.num_vectors, number
    pooled = {c: by_hand(head, torch.from_numpy(texts[c]))[0] for c in columns}
    head.config.num_vectors = usual

    def score(query: np.ndarray, vectors: Any) -> float:
        return 30.0 / len(query) * sum(max(float(token @ v) for v in vectors) for token in query)

    teacher = np.array([[score(query, texts[c]) for c in columns] for query in queries])
    student = np.array([[score(query, pooled[c]) for c in columns] for query in queries])

    def divergence(s: np.ndarray, t: np.ndarray) -> float:
        total = 0.0
        for ours, theirs in zip(s, t, strict=True):
            p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (theirs, ours))
            total += float(sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)))
        return total / len(s)

    own = [[DOCUMENT_OF[c] for c in columns].index(DOCUMENT_OF[b]) for b in range(3)]
    labels = -np.mean([row[o] - math.log(np.exp(row).sum()) for row, o in zip(student, own, strict=True)])
    return (divergence(student, teacher) + divergence(student.T, teacher.T)) / 2, float(labels)


@pytest.mark.parametrize("number", [1, 3])
def test_distillation_labels_and_prior_are_those_of_plain_loops(batch, number):
    head = random_head(projection=True, refinement=1, pooling="kmeans", num_vectors=2, weights="soft")
    objective = SoftGateObjective(head, ladder=str(number), label_weight=0.7, prior_weight=0.2)
    losses = objective(batch, LABELS)
    divergence, labels = distillation_by_hand(head, batch, number)
    assert losses["distillation"].item() == pytest.approx(divergence, rel=1e-3)
    assert losses["labels"].item() == pytest.approx(0.7 * labels, rel=1e-3)
    probability = [p for row in rows_of(batch[1]) for p in by_hand(head, torch.from_numpy(row))[1]]
    distance = np.mean([(math.log(p / (1 - p)) - 1) ** 2 for p in probability])
    assert losses["prior"].item() == pytest.approx(0.2 * distance, rel=1e-3)
    assert objective.metrics["kept"].item() == pytest.approx(np.mean(probability), rel=1e-4)
    assert set(SoftGateObjective(head)(batch, LABELS)) == {"distillation"}


def test_gradients_of_soft_gates_reach_every_part(batch):
    for settings in ({"pooling": "kmeans", "num_vectors": 2}, {"pooling": "slots", "num_vectors": 2}):
        head = random_head(projection=True, refinement=1, weights="soft", **settings)
        SoftGateObjective(head, ladder="2")(batch, LABELS)["distillation"].backward()
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None, name
            if not name.endswith("key.bias"):  # a softmax does not see what is added to all of its entries
                assert parameter.grad.abs().max() > 1e-9, name


def test_each_step_trains_one_number_of_the_ladder_and_steps_all_of_them(batch, monkeypatch):
    head = random_head(pooling="kmeans", num_vectors=2, weights="soft")
    objective, seen = SoftGateObjective(head, ladder="1,2,5"), []
    plain = head.pool
    monkeypatch.setattr(head, "pool", lambda t, w, number: (seen.append(number), plain(t, w, number))[1])

    def steps(seed: int) -> list[int]:
        seen.clear()
        for step in range(150):
            objective.seed, objective.progress = seed, (step, 150)
            with torch.no_grad():
                objective(batch, LABELS)
        return list(seen)

    first, other = steps(0), steps(1)
    assert first == steps(0) != other
    # Of 150 fair draws from three, each is drawn 50 times with a standard deviation of 5.8.
    assert all(25 < first.count(number) < 75 for number in (1, 2, 5)) and len(first) == 150


def test_a_step_of_several_numbers_is_the_mean_of_steps_of_each(batch):
    head = random_head(projection=True, refinement=1, pooling="kmeans", num_vectors=2, weights="soft")

    def losses(**settings: Any) -> dict[str, float]:
        objective = SoftGateObjective(head, label_weight=0.7, prior_weight=0.2, **settings)
        return {name: value.item() for name, value in objective(batch, LABELS).items()}

    together, one, three = losses(ladder="1,3", rungs=2), losses(ladder="1"), losses(ladder="3")
    for name, value in together.items():
        assert value == pytest.approx((one[name] + three[name]) / 2, rel=1e-5), name
    assert one["distillation"] != pytest.approx(three["distillation"], rel=1e-3)
    assert losses(ladder="1,3", rungs=5) == pytest.approx(together)


@pytest.mark.parametrize("reward", ["inverse", "forward"])
def test_reward_teaches_the_filter_to_tell_topics_from_noise(reward):
    """Two vectors of a document are its topic and five those of other documents; a mark in the last place tells."""
    generator = torch.Generator().manual_seed(0)
    topics = torch.nn.functional.normalize(torch.randn(24, 15, generator=generator), dim=-1)
    marked = lambda rows, mark: torch.cat([rows, torch.full((len(rows), 1), mark)], 1)  # noqa: E731
    corpus = []
    for d in range(24):
        others = torch.randperm(24, generator=generator)
        noise = topics[others[others != d][:5]]
        corpus.append(torch.cat([marked(topics[[d, d]], 0.5), marked(noise, -0.5)]))
    queries = [marked(topic[None], 0.0) for topic in topics]
    torch.manual_seed(0)
    head = ReinPoolModel(ReinPoolConfig(dim=16, num_layers=0))
    objective = ReinforceObjective(head, reward=reward)
    objective.prepare(corpus_of(queries, corpus, [(d, d) for d in range(24)]))
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    everything, rewards = [features(queries, [*range(24)]), features(corpus, [*range(24)])], []
    for step in range(60):
        objective.progress = (step, 60)
        loss = sum(objective(everything, torch.arange(24)).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rewards.append(objective.metrics["reward"].item())
    with torch.no_grad():
        kept = torch.sigmoid(head.keep_logits(everything[1]["token_embeddings"], everything[1]["attention_mask"]))
    assert kept[:, :2].mean() > kept[:, 2:].mean() + 0.5
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.1


def test_maxsim_while_training_is_maxsim(batch):
    queries, texts = batch
    parts = queries["token_embeddings"], texts["token_embeddings"]
    masks = queries["attention_mask"], texts["attention_mask"]
    expected = [
        [sum(max(float(q @ d) for d in text) for q in query) for text in rows_of(texts)] for query in rows_of(queries)
    ]
    np.testing.assert_allclose(packed_maxsim(*parts, *masks), expected, atol=1e-5)
    np.testing.assert_allclose(maxsim(*parts, *masks), expected, atol=1e-5)
    half = packed_maxsim(*(part.bfloat16() for part in parts), *masks)
    assert half.dtype == torch.float32
    np.testing.assert_allclose(half, expected, atol=0.05)


def test_no_relevance_beyond_the_judgments_is_rewarded(batch):
    objective = reinforce(random_head(), samples=2)
    pairs = [divmod(int(code), objective.documents) for code in objective.relevant]
    assert pairs == sorted(RELEVANT)


@pytest.mark.parametrize(
    ("kind", "settings", "config", "words"),
    [
        (SoftGateObjective, {"ladder": "0"}, {}, "--ladder '0'.*e.g. 1,4,16"),
        (SoftGateObjective, {"ladder": "a"}, {}, "--ladder 'a'"),
        (SoftGateObjective, {"ladder": "1,1"}, {}, "--ladder '1,1': different numbers"),
        (SoftGateObjective, {"ladder": ""}, {}, "--ladder ''"),
        (SoftGateObjective, {"ladder": "1,4"}, {}, "--ladder 1,4: pooling='mean' always gives 1 vector"),
        (SoftGateObjective, {}, {"pooling": "slots", "num_vectors": 4}, "'slots' always gives 4.*Use --ladder 4"),
        (SoftGateObjective, {"rungs": 0}, {}, "--rungs 0: a step would train nothing"),
        (SoftGateObjective, {"score_scale": 0.0}, {}, "--score_scale 0.0"),
        (SoftGateObjective, {"score_scale": math.inf}, {}, "--score_scale inf"),
        (SoftGateObjective, {"label_weight": -1.0}, {}, "--label_weight -1.0"),
        (ReinforceObjective, {"reward": "x"}, {}, "--reward 'x': unknown. Use one of inverse, forward"),
        (ReinforceObjective, {"metric": "mrr"}, {}, "--metric 'mrr'"),
        (ReinforceObjective, {"samples": 1}, {}, "--samples 1: at least 2"),
        (ReinforceObjective, {"bank": -1}, {}, "--bank -1"),
        (ReinforceObjective, {"cutoff": -3}, {}, "--cutoff -3: at least 1"),
        (ReinforceObjective, {"cutoff": 0}, {}, "--cutoff 0: at least 1"),
        (ReinforceObjective, {}, {"pooling": "slots"}, "--pooling slots"),
        (ReinforceObjective, {}, {"weights": "soft"}, "--weights soft: rewards are those of .* Add --weights hard"),
    ],
)
def test_objectives_refuse_bad_settings(kind, settings, config, words):
    with pytest.raises(InputError, match=words):
        kind(random_head(**config), **settings)


def test_objectives_tell_their_settings():
    settings = SoftGateObjective(random_head(), score_scale=12.0).get_config_dict()
    weights = dict.fromkeys(("label_weight", "prior_weight", "distill_weight"), 0.0)
    assert settings == {"score_scale": 12.0, "ladder": "1", "rungs": 1, "distill": "order"} | weights
    assert ReinforceObjective(random_head(), samples=3).get_config_dict()["samples"] == 3


# --- from end to end ---

OBJECTIVES = {
    "SoftGateObjective": ["--prior_weight", "0.1"],
    "ReinforceObjective": "--objective ReinforceObjective --weights hard --bank 8 --entropy_weight 0.1".split(),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, multi_vector_model: MultiVectorEncoder) -> Path:
    """The shipped run on the small data and a small backbone."""
    root = tmp_path_factory.mktemp("reinpool")
    multi_vector_model.save_pretrained(str(root / "encoder"))
    shipped = polyrep.files.shipped_folder("hub_configs") / "reinpool-minilm"
    shutil.copytree(shipped, root / "run")
    config = json.loads((root / "run" / "config.json").read_text())
    (root / "run" / "config.json").write_text(json.dumps(config | {"num_vectors": 2}))
    recipe = {
        "backbone": str(root / "encoder"),
        "datasets": [str(write_beir(root / "data" / "tiny", "train"))],
        "objective": "SoftGateObjective",
        "ladder": "1,2,3",
        "label_weight": 0.3,
        "pipeline": True,
        "negatives": 1,
        "depth": 4,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 0.01,
        "report_to": "none",
        "disable_tqdm": True,
        "cache_dir": str(root / "cache"),
    }
    (root / "run" / "recipe.yaml").write_text("# test\n" + json.dumps(recipe))
    return root / "run"


@pytest.fixture(scope="module")
def trained(run: Path) -> dict[str, Path]:
    """Objective -> what four steps with it gave, with a checkpoint after each two."""
    for name, flags in OBJECTIVES.items():
        train([str(run), "--output_dir", str(run.parent / name), *flags])
    return {name: run.parent / name for name in OBJECTIVES}


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "head" / "model.safetensors")


def losses(folder: Path) -> list[float]:
    return [e["loss"] for e in json.loads((folder / "training.json").read_text())["log"] if "loss" in e]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_writes_a_head_and_a_pipeline_of_it(trained, run, objective):
    model = polyrep.load(trained[objective] / "final", trust_remote_code=True, device="cpu")
    assert type(model) is MultiVectorEncoder
    pooling = ReinPoolPooling.from_pretrained(trained[objective] / "head")
    backbone = MultiVectorEncoder(str(run.parent / "encoder"), device="cpu")
    expected = backbone.encode_document(TEXTS, token_pooling=pooling)
    for ours, theirs in zip(model.encode_document(TEXTS), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        assert len(ours) == 2
    config = pooling.model.config
    assert (config.base_model_id, config.base_fingerprint) == ("encoder", fingerprint(run.parent / "encoder"))
    fresh = ReinPoolModel(ReinPoolConfig(**(config.to_dict())))
    moved = {
        name: not torch.equal(value, fresh.state_dict()[name])
        for name, value in weights_of(trained[objective]).items()
    }
    assert moved["keep.weight"] and moved["project.weight"] and moved["refine.0.out.weight"]
    log = json.loads((trained[objective] / "training.json").read_text())["log"][0]
    parts = {"SoftGateObjective": {"prior"}, "ReinforceObjective": {"policy", "entropy", "reward", "skipped"}}
    assert parts[objective] | {"distillation", "labels", "kept"} <= set(log)
    card = (trained[objective] / "final" / "README.md").read_text()
    assert objective in card and str(run.parent / objective) not in card


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_checkpoint_is_a_head_that_opens(trained, objective):
    for step in (2, 4):
        head = AutoModel.from_pretrained(trained[objective] / f"checkpoint-{step}", trust_remote_code=True)
        assert type(head).__name__ == "ReinPoolModel"


KILLED = """
import os, signal, sys
from polyrep.training import checkpoints, frozen
from polyrep.cli import train

class Kill(checkpoints.CheckpointCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

frozen.CheckpointCallback = Kill
train(sys.argv[1:])
"""


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_after_kill_9_the_next_losses_are_those_of_an_unbroken_run(trained, run, objective, tmp_path):
    arguments = [str(run), "--output_dir", str(tmp_path), "--head_only", "true", *OBJECTIVES[objective]]
    killed = run_python("-c", KILLED, *arguments)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]
    train([*arguments, "--resume_from_checkpoint", "last"])
    assert len(losses(tmp_path)) == 4
    np.testing.assert_allclose(losses(tmp_path), losses(trained[objective]), rtol=1e-5)
    for name, value in weights_of(trained[objective]).items():
        if not name.endswith("key.bias"):  # a softmax does not see it: what it gets is rounding, scaled up by Adam
            torch.testing.assert_close(weights_of(tmp_path)[name], value, msg=name, rtol=1e-4, atol=1e-5)
    assert not (tmp_path / "final").exists()


def test_resuming_with_other_tokens_is_refused(trained, run):
    folder = trained["SoftGateObjective"]
    with pytest.raises(InputError, match="started with another max_length"):
        changed = ["--resume_from_checkpoint", "last", "--max_length", "8", *OBJECTIVES["SoftGateObjective"]]
        train([str(run), "--output_dir", str(folder), *changed])


def test_another_run_on_the_same_texts_leaves_the_backbone_alone(trained, run, tmp_path, monkeypatch):
    def encode(*_: Any, **__: Any) -> None:
        pytest.fail("encoded again")

    for name in ("encode", "encode_query", "encode_document"):
        monkeypatch.setattr(MultiVectorEncoder, name, encode)
    flags = ["--output_dir", str(tmp_path), "--head_only", "true", "--save_strategy", "no"]
    train([str(run), *flags, "--seed", "1"])
    assert losses(tmp_path) != losses(trained["SoftGateObjective"])
    with pytest.raises(pytest.fail.Exception, match="encoded again"):
        train([str(run), *flags, "--overwrite", "--cache_dir", str(tmp_path / "empty")])


def test_a_corpus_without_queries_trains_on_its_own_sentences(trained, run, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(run.parent / "data" / "tiny" / "corpus.jsonl", folder)
    flags = ["--datasets", str(folder), "--head_only", "true", "--save_strategy", "no"]
    with pytest.raises(InputError, match="no judgments for split 'train'"):
        train([str(run), *flags, "--output_dir", str(tmp_path / "judged")])
    for objective, more in OBJECTIVES.items():
        output = tmp_path / objective
        train([str(run), *flags, "--output_dir", str(output), "--queries", "inverse_cloze", *more])
        # Of two parts, name and description, three documents have a description of four words.
        assert json.loads((output / "training.json").read_text())["pairs"] == {"bare-cloze": 3}
        assert weights_of(output)["keep.weight"].abs().max() > 0
    both = [
        "--queries",
        "both",
        "--save_strategy",
        "no",
        "--head_only",
        "true",
        "--output_dir",
        str(tmp_path / "both"),
    ]
    train([str(run), *both])
    assert json.loads((tmp_path / "both" / "training.json").read_text())["pairs"] == {"tiny": 4, "tiny-cloze": 3}
    with pytest.raises(InputError, match="--queries both: ReinforceObjective ranks all texts as one corpus"):
        train([str(run), *both, "--output_dir", str(tmp_path / "twice"), *OBJECTIVES["ReinforceObjective"]])
    with pytest.raises(InputError, match="--queries 'none': use one of judged, inverse_cloze, both, texts"):
        train([str(run), *flags, "--output_dir", str(tmp_path / "none"), "--queries", "none"])
    with pytest.raises(InputError, match="started with another queries"):
        shutil.copytree(trained["SoftGateObjective"] / "checkpoint-2", tmp_path / "both" / "checkpoint-2")
        train([str(run), "--output_dir", str(tmp_path / "both"), "--resume_from_checkpoint", "last"])


def test_one_vector_trains_as_a_sentence_transformer(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "config_sentence_transformers.json"
    one = ["--output", "sentence_embedding", "--pooling", "mean", "--num_vectors", "1", "--ladder", "1"]
    flags = [
        "--output_dir",
        str(tmp_path / "out"),
        "--save_strategy",
        "no",
        "--cache_dir",
        str(tmp_path / "cache"),
        *one,
    ]
    with pytest.raises(InputError, match="'sentence_embedding' in a MultiVectorEncoder"):
        train([str(tmp_path / "run"), *flags])
    assert not (tmp_path / "cache").exists(), "refused before anything is encoded"
    settings = json.loads(file.read_text()) | {"model_type": "SentenceTransformer", "similarity_fn_name": "dot"}
    file.write_text(json.dumps(settings))
    train([str(tmp_path / "run"), *flags])
    model = polyrep.load(tmp_path / "out" / "final", trust_remote_code=True, device="cpu")
    assert type(model) is SentenceTransformer and model.similarity_fn_name == "dot"
    backbone = MultiVectorEncoder(str(run.parent / "encoder"), device="cpu")
    head = ReinPoolPooling.from_pretrained(tmp_path / "out" / "head", output="token_embeddings")
    expected = [x[0] for x in backbone.encode_document(TEXTS, token_pooling=head)]
    np.testing.assert_allclose(model.encode_document(TEXTS), np.stack(expected), atol=1e-5)
    sums = np.stack([x.sum(0) for x in backbone.encode_query(TEXTS)])
    np.testing.assert_allclose(model.encode_query(TEXTS), sums, atol=1e-5)


def test_a_shorter_length_is_that_of_the_pipeline_too(run, tmp_path):
    flags = ["--output_dir", str(tmp_path), "--save_strategy", "no", "--max_length", "9", "--max_steps", "1"]
    train([str(run), *flags])
    assert polyrep.load(tmp_path / "final", trust_remote_code=True, device="cpu").max_seq_length == 9


def test_a_backbone_with_one_vector_a_text_is_refused(run, sentence_model, tmp_path):
    sentence_model.save_pretrained(str(tmp_path / "dense"))
    with pytest.raises(
        InputError, match="is a SentenceTransformer.*several vectors a text.*Name a MultiVectorEncoder"
    ):
        train([str(run), "--backbone", str(tmp_path / "dense"), "--output_dir", str(tmp_path / "out")])


def test_a_sample_that_drops_all_is_rewarded_for_the_vector_that_encoding_would_keep():
    head = ReinPoolModel(ReinPoolConfig(dim=4, num_layers=0, num_heads=1, pooling="mean", initial_keep_logit=-40.0))
    with torch.no_grad():
        head.keep.weight[0, 2] = 1.0  # the second token is the likeliest, and none is likely
    objective = ReinforceObjective(head, reward="forward", samples=2)
    tokens = torch.eye(4)[None, [0, 2, 1]]
    seen = {}
    objective._forward = lambda pooled, *_: seen.setdefault("pooled", pooled)[..., 0]
    objective.most_tokens = 3
    side = {"token_embeddings": tokens, "attention_mask": torch.ones(1, 3).bool(), "index": torch.zeros(1).long()}
    objective([side, side], torch.zeros(1).long())
    torch.testing.assert_close(seen["pooled"], torch.eye(4)[2].expand(1, 2, 4))
    torch.testing.assert_close(head(tokens).embeddings, torch.eye(4)[None, None, 2])


def test_the_filter_starts_where_the_config_says():
    head = ReinPoolModel(ReinPoolConfig(dim=8, num_heads=2, initial_keep_logit=-1.0))
    probability = head(torch.randn(2, 3, 8)).keep_probability
    torch.testing.assert_close(probability, torch.full((2, 3), 1 / (1 + math.e)))


def test_a_misspelt_setting_is_refused(tmp_path):
    ReinPoolModel(ReinPoolConfig(dim=8, num_heads=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_vector=4 is no setting. Did you mean 'num_vectors'"):
        ReinPoolPooling.from_pretrained(tmp_path, num_vector=4)


def test_one_bit_vectors_are_trained_through_their_signs():
    torch.manual_seed(0)
    config = {"dim": 8, "num_layers": 0, "num_heads": 1, "pooling": "kmeans", "projection": True}
    queries = {"token_embeddings": torch.randn(3, 4, 8), "attention_mask": torch.ones(3, 4).bool()}
    documents = {"token_embeddings": torch.randn(3, 5, 8), "attention_mask": torch.ones(3, 5).bool()}
    features = [side | {"index": torch.arange(3)} for side in (queries, documents)]
    found = {}
    for quantization in ("none", "binary"):
        head = ReinPoolModel(ReinPoolConfig(quantization=quantization, **config))
        losses = SoftGateObjective(head)(features, torch.arange(3))
        sum(losses.values()).backward()
        found[quantization] = losses["distillation"].item()
        assert head.project.weight.grad.abs().sum() > 0
    assert found["none"] != found["binary"]
