"""The LEMUR room: its maths against plain loops in float64, what it refuses, and how it is fitted and served."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DOCUMENTS, QUERIES, write_beir
from scipy.special import erf
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from torch import Tensor
from torch.nn import functional as F

import polyrep
from polyrep import InputError
from polyrep.cli import train
from polyrep.data import load_corpus, texts_as_queries
from polyrep.hub import fingerprint
from polyrep.methods import (
    LemurConfig,
    LemurIndex,
    LemurModel,
    LemurObjective,
    LemurPooling,
    ridge_solution,
    token_maxima,
)
from polyrep.methods.lemur.objective import WINDOW, _sample_windows
from polyrep.search import maxsim
from polyrep.training.head_trainer import OWN_WEIGHTS

DIM, LATENT = 12, 20


def texts(lengths: list[int], seed: int = 1, dim: int = DIM) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(n, dim, generator=generator), dim=-1) for n in lengths]


def head(seed: int = 0, anchors: int = 60, **config: Any) -> LemurModel:
    """A head with random weights and anchors, as if fitted."""
    torch.manual_seed(seed)
    model = LemurModel(
        LemurConfig(**{"token_dim": DIM, "latent_dim": LATENT, "num_anchors": anchors, "rank": 8} | config)
    ).eval()
    with torch.no_grad():
        model.anchors.copy_(torch.cat(texts([anchors], seed + 50)))
        model.target_mean.fill_(0.3)
        model.target_std.fill_(0.2)
        for parameter in model.norm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        for name in ("document_map", "query_map", "document_mean") if model.config.rank else ():
            getattr(model, name).normal_()
    return model


def pooled(model: LemurModel, rows: list[Tensor], task: str) -> np.ndarray:
    return LemurPooling(model).pool(rows, task=task).double().numpy()


# --- the formula, a number at a time in float64 ---


def psi(model: LemurModel, x: Tensor) -> np.ndarray:
    weight = {name: value.double().numpy() for name, value in model.state_dict().items()}
    hidden = weight["linear.weight"] @ x.double().numpy() + weight["linear.bias"]
    hidden = (hidden - hidden.mean()) / math.sqrt(hidden.var() + 1e-5)
    hidden = hidden * weight["norm.weight"] + weight["norm.bias"]
    return 0.5 * hidden * (1 + erf(hidden / math.sqrt(2)))


def largest(x: Tensor, document: Tensor) -> float:
    return max(float(x.double() @ c.double()) for c in document)


def regressed(model: LemurModel, document: Tensor, ridge: float) -> np.ndarray:
    """The document's weights by numpy's least squares, the ridge as further rows."""
    features = np.stack([psi(model, x) for x in model.anchors])  # (anchors, latent)
    target = np.array([(largest(x, document) - 0.3) / 0.2 for x in model.anchors])
    damping = math.sqrt(ridge * (features**2).sum() / features.shape[1])
    features = np.concatenate([features, damping * np.eye(features.shape[1])])
    target = np.concatenate([target, np.zeros(features.shape[1])])
    return np.linalg.lstsq(features, target, rcond=None)[0]


@pytest.mark.parametrize("ridge", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("anchors", [60, 9])  # more and fewer than features
def test_vectors_are_those_of_the_formula(ridge, anchors):
    if anchors < LATENT and not ridge:
        return  # the least norm of many solutions, below
    model = head(anchors=anchors, ridge=ridge)
    documents, queries = texts([5, 1, 7]), texts([3, 4], seed=2)
    for ours, document in zip(pooled(model, documents, "document"), documents, strict=True):
        np.testing.assert_allclose(ours, regressed(model, document, ridge), rtol=1e-3, atol=1e-4)
    for ours, query in zip(pooled(model, queries, "query"), queries, strict=True):
        np.testing.assert_allclose(ours, sum(psi(model, x) for x in query) / 32, rtol=1e-4, atol=1e-5)


def test_the_solver_gives_the_least_squares_of_least_norm():
    generator = np.random.default_rng(3)
    for shape in ((30, 8), (8, 30)):
        features, target = generator.normal(size=shape), generator.normal(size=shape[0])
        ours = target @ ridge_solution(torch.from_numpy(features), 0.0).numpy()
        np.testing.assert_allclose(ours, np.linalg.lstsq(features, target, rcond=None)[0], atol=1e-10)


def test_with_fewer_anchors_than_features_anchors_are_interpolated_as_the_ridge_vanishes():
    documents, off = texts([6, 3]), []
    for ridge in (1e-2, 1e-4, 1e-9):
        model = head(anchors=LATENT - 8, rank=0, ridge=ridge)
        found = model.features(model.anchors).double().detach().numpy() @ pooled(model, documents, "document").T
        exact = [[(largest(x, d) - 0.3) / 0.2 for d in documents] for x in model.anchors]
        off.append(np.abs(found - exact).max())
    assert off[0] > off[1] > off[2] and off[2] < 1e-4 and off[0] > 1e-2


def test_rankings_do_not_depend_on_how_targets_are_standardised():
    documents, queries = texts([5, 1, 7, 4, 9]), texts([3, 4], seed=2)
    rankings = []
    for mean, std in ((0.3, 0.2), (0.0, 1.0), (-2.0, 0.05)):
        model = head(rank=0)
        model.target_mean.fill_(mean)
        model.target_std.fill_(std)
        scores = pooled(model, queries, "query") @ pooled(model, documents, "document").T
        # All documents move alike: differences scale by the deviation and nothing else.
        differences = (scores - scores[:, :1]) * std
        rankings.append(differences)
    np.testing.assert_allclose(rankings[1], rankings[0], atol=1e-4)
    np.testing.assert_allclose(rankings[2], rankings[0], atol=1e-4)


def test_least_squares_follow_maxsim_and_the_mean_of_features_does_not():
    model = head(anchors=4000, latent_dim=256, rank=0, ridge=1e-3)
    documents, queries = texts([12] * 200, seed=5), texts([8] * 40, seed=6)
    exact = maxsim(
        torch.stack(queries), torch.stack(documents), torch.ones(40, 8).bool(), torch.ones(200, 12).bool()
    ).numpy()
    asked = pooled(model, queries, "query")
    means = np.stack([np.mean([psi(model, x) for x in d], axis=0) for d in documents])

    def recall(scores: np.ndarray) -> float:  # of the exact first five among the first twenty
        top, best = (-scores).argsort(1)[:, :20], (-exact).argsort(1)[:, :5]
        return float(np.mean([len(set(a) & set(b)) / 5 for a, b in zip(top, best, strict=True)]))

    assert recall(asked @ pooled(model, documents, "document").T) > 0.75
    assert recall(asked @ means.T) < 0.5


def test_the_order_of_tokens_and_padding_change_nothing():
    model, rows = head(embedding_dim=6), texts([7, 2, 5])
    for task in ("query", "document"):
        whole = pooled(model, rows, task)
        turned = [row[torch.randperm(len(row), generator=torch.Generator().manual_seed(9))] for row in rows]
        np.testing.assert_allclose(pooled(model, turned, task), whole, atol=1e-5)
        tokens = torch.full((3, 11, DIM), float("nan"))  # padding, whatever it holds
        mask = torch.zeros(3, 11).bool()
        for place, row in enumerate(rows):
            tokens[place, 2 : 2 + len(row)], mask[place, 2 : 2 + len(row)] = row, True
        with torch.no_grad():
            padded = model(tokens, mask, task=task).sentence_embedding
        np.testing.assert_allclose(padded.numpy(), whole, atol=1e-5)


def test_reduced_vectors_are_the_first_directions_of_the_features():
    wide, rows = head(), texts([7, 2, 5])
    for size in (1, 5, 8):
        narrow = head(embedding_dim=size)
        for task in ("query", "document"):
            whole = torch.from_numpy(pooled(wide, rows, task)).float()
            np.testing.assert_allclose(
                pooled(narrow, rows, task), wide.reduce(whole, task, size).numpy(), rtol=1e-3, atol=1e-3
            )
    assert wide.reduce(whole, "query", LATENT) is whole


def test_long_corpora_are_encoded_in_blocks(monkeypatch):
    from polyrep.methods.lemur import modeling_lemur

    model, rows = head(), texts([9, 1, 4, 4, 2, 8])
    whole = pooled(model, rows, "document")
    monkeypatch.setattr(modeling_lemur, "_BLOCK", 1)
    monkeypatch.setattr(modeling_lemur, "_ANCHORS_AT_ONCE", 7)
    np.testing.assert_allclose(pooled(model, rows, "document"), whole, atol=1e-5)
    offsets = np.cumsum([0, *map(len, rows)])
    again = model.encode_document_tokens(torch.cat(rows).numpy(), offsets)
    np.testing.assert_allclose(again.numpy(), whole, atol=1e-5)
    points = torch.cat(texts([5], seed=8))
    brute = [[largest(x, row) for x in points] for row in rows]
    ours = [token_maxima(points, row[None])[0].tolist() for row in rows]
    np.testing.assert_allclose(ours, brute, atol=1e-6)


def test_a_changed_head_is_solved_anew():
    model, rows = head(), texts([4])
    before = pooled(model, rows, "document")
    np.testing.assert_array_equal(pooled(model, rows, "document"), before)
    with torch.no_grad():
        model.anchors.mul_(-1)
    assert np.abs(pooled(model, rows, "document") - before).max() > 1e-3
    model.config.ridge = 5.0
    assert np.abs(pooled(model, rows, "document")).max() < np.abs(before).max()


def test_a_head_is_solved_anew_after_steps_of_an_optimizer_that_no_weight_knows_of():
    model, rows = head(), texts([4])
    before = pooled(model, rows, "document")
    optimizer, versions = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True), [model.linear.weight._version]
    model.train()
    for _ in range(2):
        model(torch.stack(rows), task="query").sentence_embedding.sum().backward()
        optimizer.step()
        in_training = model(torch.stack(rows), task="document").sentence_embedding.detach()
    assert [model.linear.weight._version] == versions, "fused AdamW counts its changes now"
    fresh = LemurModel(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    expected = pooled(fresh, rows, "document")
    assert np.abs(expected - before).max() > 1e-3
    np.testing.assert_allclose(in_training.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(pooled(model.eval(), rows, "document"), expected, atol=1e-5)


def test_no_cast_rounds_the_head(tmp_path):
    model, rows = head(), texts([4, 6])
    before = pooled(model, rows, "document")
    model.save_pretrained(tmp_path)
    opened = LemurModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for cast in (model.bfloat16(), model.half(), opened):
        assert {t.dtype for t in cast.state_dict().values()} == {torch.float32}
        np.testing.assert_array_equal(pooled(cast, rows, "document"), before)
    tokens = torch.stack(texts([5, 5])).bfloat16()
    assert model(tokens, task="document").sentence_embedding.dtype == torch.float32


# --- what is refused ---


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m(torch.randn(2, 3, DIM)), "task=None.*encode_query and encode_document"),
        (lambda m: m(torch.randn(2, 3, DIM + 1), task="query"), r"\(2, 3, 13\), but the head was made for.*12\)"),
        (lambda m: m(torch.randn(2, 3, DIM), torch.ones(2, 4), task="query"), r"a mask of shape \(2, 4\)"),
        (
            lambda m: m(torch.randn(2, 3, DIM), torch.tensor([[1, 1, 0], [0, 0, 0]]), task="document"),
            "document 1 has no token",
        ),
        (lambda m: m(torch.full((1, 3, DIM), torch.nan), task="document"), "document 0 of the batch.*not finite"),
        (lambda m: m.encode_document_tokens(torch.randn(4, DIM), [0, 4, 4]), "document 1 has no token"),
        (lambda m: LemurPooling(m).pool([torch.randn(0, DIM)], task="query"), "query 0 has no token"),
        (lambda m: LemurPooling(m).pool([torch.randn(2, 5)], task="query"), r"query 0 has shape \(2, 5\)"),
        (lambda m: LemurPooling(m).pool([torch.randn(2, DIM)], task="q"), "task='q'"),
    ],
)
def test_unusable_tokens_are_refused(call: Callable[[LemurModel], Any], words):
    with pytest.raises(ValueError, match=words):
        call(head())


def test_a_head_without_anchors_or_with_a_singular_system_is_refused():
    empty = LemurModel(LemurConfig(token_dim=DIM, latent_dim=LATENT, rank=0))
    with pytest.raises(ValueError, match="has no anchors yet.*Fit it"):
        pooled(empty, texts([3]), "document")
    for anchors in (60, 9):
        singular = head(anchors=anchors, ridge=0.0, rank=0)
        singular.anchors.copy_(singular.anchors[:1].expand(anchors, -1))
        with pytest.raises(ValueError, match=f"features of {anchors} anchors are linearly dependent.*Use a ridge"):
            pooled(singular, texts([3]), "document")
        singular.config.ridge = 0.01
        assert np.isfinite(pooled(singular, texts([3]), "document")).all()


def late_interaction(backbone: Path, folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    names = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    narrow = Dense(32, DIM, bias=False, activation_function=torch.nn.Identity(), **names)
    modules = [Transformer(str(backbone)), narrow, MultiVectorMask(), Normalize(**names)]
    MultiVectorEncoder(modules=modules, device="cpu").save_pretrained(str(folder))
    return folder


def test_another_encoder_is_refused_by_its_fingerprint_or_width(backbone, tmp_path):
    own, other = (late_interaction(backbone, tmp_path / str(seed), seed) for seed in (0, 1))
    fitted = head(base_model_id="org/colbert", base_fingerprint=fingerprint(own))
    pooling = LemurPooling(fitted)
    encoders = {folder: MultiVectorEncoder(str(folder), device="cpu") for folder in (own, other)}
    whole = SentenceTransformer(modules=[*encoders[own].children(), pooling], device="cpu")
    assert str(whole.similarity_fn_name) == "dot"
    with pytest.raises(ValueError, match="the encoder before it has fingerprint.*fitted to org/colbert"):
        SentenceTransformer(modules=[*encoders[other].children(), pooling], device="cpu")
    tokens = encoders[own].encode_query(list(QUERIES.values()))
    pooling.pool(tokens, task="query", fingerprint=fingerprint(own))
    with pytest.raises(ValueError, match="these token vectors are of an encoder with fingerprint"):
        pooling.pool(tokens, task="query", fingerprint=fingerprint(other))
    fitted.save_pretrained(tmp_path / "head")
    unchecked = LemurPooling.from_pretrained(str(tmp_path / "head"), base_fingerprint=None)
    SentenceTransformer(modules=[*encoders[other].children(), unchecked], device="cpu")
    with pytest.raises(ValueError, match=f"vectors have width {DIM}, but the head was made for token_dim=16"):
        SentenceTransformer(modules=[*encoders[own].children(), LemurPooling(lemur_of_width(16))], device="cpu")
    with pytest.raises(ValueError, match="similarity.*cosine.*inner product"):
        SentenceTransformer(modules=[*encoders[own].children(), pooling], similarity_fn_name="cosine", device="cpu")
    with pytest.raises(ValueError, match="truncate_dim=4.*embedding_dim=4"):
        SentenceTransformer(modules=[*encoders[own].children(), pooling], truncate_dim=4, device="cpu")
    with pytest.raises(ValueError, match="one vector a text, which a MultiVectorEncoder does not read"):
        MultiVectorEncoder(modules=[*encoders[own].children(), pooling], device="cpu")


def lemur_of_width(dim: int) -> LemurModel:
    return LemurModel(LemurConfig(token_dim=dim, latent_dim=LATENT, rank=0))


def test_only_what_weights_allow_changes_on_loading(tmp_path):
    head().save_pretrained(tmp_path)
    narrow = LemurPooling.from_pretrained(str(tmp_path), embedding_dim=3)
    assert narrow.get_embedding_dimension() == 3 and narrow.pool(texts([4]), task="query").shape == (1, 3)
    with pytest.raises(ValueError, match="query_scale=1.0, but the head was fitted with query_scale=32.0"):
        LemurPooling.from_pretrained(str(tmp_path), query_scale=1.0)
    with pytest.raises(ValueError, match="embedding_dim=9, but only rank=8"):
        LemurPooling.from_pretrained(str(tmp_path), embedding_dim=9)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="of type 'bert', not a polyrep_lemur head"):
        LemurPooling.from_pretrained(str(tmp_path / "other"))


# --- the index ---


def test_the_index_takes_documents_later_and_ranks_by_maxsim(tmp_path):
    model, rows, queries = head(embedding_dim=8), texts([5, 3, 8, 2, 6, 4]), texts([3, 4], seed=2)
    at_once, later = LemurIndex(model), LemurIndex(model)
    names = [f"d{n}" for n in range(6)]
    at_once.add(names, rows)
    later.add(names[:2], rows[:2])
    reopened = LemurIndex.load(later.save(tmp_path / "index"))
    reopened.add(names[2:], rows[2:])
    np.testing.assert_allclose(reopened.vectors, at_once.vectors, atol=1e-3)
    np.testing.assert_array_equal(reopened.tokens, at_once.tokens)
    again = LemurIndex.load(reopened.save(tmp_path / "index"))
    assert again.search(queries, k=6) == reopened.search(queries, k=6)
    for query, found in zip(queries, at_once.search(queries, k=6, candidates=6), strict=True):
        exact = {name: sum(largest(x, row) for x in query) for name, row in zip(names, rows, strict=True)}
        assert [name for name, _ in found] == sorted(exact, key=exact.__getitem__, reverse=True)
        np.testing.assert_allclose([score for _, score in found], sorted(exact.values(), reverse=True), atol=5e-3)
    scores = pooled(model, queries, "query") @ pooled(model, rows, "document").T
    first = at_once.search(queries, k=1, candidates=0)
    assert [found[0][0] for found in first] == [names[place] for place in scores.argmax(1)]


def test_what_the_index_cannot_hold_is_refused(tmp_path):
    index, rows = LemurIndex(head(base_fingerprint="a" * 64)), texts([5, 3])
    with pytest.raises(InputError, match="holds no document"):
        index.search(rows)
    for names, words in ((["a", "a"], "id 'a' twice"), (["a"], "1 ids for 2 documents")):
        with pytest.raises(InputError, match=words):
            index.add(names, rows)
    with pytest.raises(InputError, match="document 1 has no token"):
        index.add(["a", "b"], [rows[0], rows[0][:0]])
    with pytest.raises(InputError, match="an encoder with fingerprint bbbb"):
        index.add(["a", "b"], rows, fingerprint="b" * 64)
    with pytest.raises(InputError, match="does not fit into 16 bits"):
        index.add(["a", "b"], [row * 1e6 for row in rows])
    assert len(index) == 0
    index.add(["a", "b"], rows)
    with pytest.raises(InputError, match="id 'b' twice"):
        index.add(["b"], rows[:1])
    with pytest.raises(InputError, match="k=0"):
        index.search(rows, k=0)
    with pytest.raises(InputError, match="an encoder with fingerprint bbbb"):
        index.search(rows, fingerprint="b" * 64)
    with pytest.raises(InputError, match="no index.json"):
        LemurIndex.load(tmp_path)
    folder = index.save(tmp_path / "index")
    content = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(content | {"ids": ["a"]}))
    with pytest.raises(InputError, match="1 ids, 2 vectors and 2 documents' tokens"):
        LemurIndex.load(folder)


# --- the fit ---


@pytest.fixture(scope="module")
def run(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A late-interaction model and the flags of a small fit to a few documents."""
    root = tmp_path_factory.mktemp("lemur")
    encoder = late_interaction(backbone, root / "encoder" / "final")
    data = write_beir(root / "data", "train")
    flags = ["lemur-minilm", "--backbone", str(encoder), "--datasets", str(data), "--cache_dir", str(root / "cache")]
    flags += "--latent_dim 24 --num_anchors 30 --rank 3 --embedding_dim 3 --per_device_train_batch_size 8".split()
    flags += "--max_steps 40 --save_steps 20 --num_tokens 60 --bf16 false --logging_steps 5".split()
    return root, flags


@pytest.fixture(scope="module")
def fitted(run: tuple[Path, list[str]]) -> Path:
    root, flags = run
    train([*flags, "--output_dir", str(root / "out")], prog="train.py")
    return root / "out"


def test_a_fit_learns_and_its_folder_opens_as_one_dense_model(fitted, run):
    log = [entry["loss"] for entry in json.loads((fitted / "training.json").read_text())["log"] if "loss" in entry]
    assert log[-1] < 0.85 * log[0]
    model = SentenceTransformer(str(fitted / "final"), trust_remote_code=True, device="cpu")
    found = model.encode_document(list(DOCUMENTS.values()))
    assert found.shape == (len(DOCUMENTS), 3)
    encoder = MultiVectorEncoder(run[1][2], device="cpu")
    pooling = LemurPooling.from_pretrained(str(fitted / "head"))
    assert pooling.model.config.base_fingerprint == fingerprint(Path(run[1][2]))
    tokens = encoder.encode_document(list(DOCUMENTS.values()))
    np.testing.assert_allclose(pooling.pool(tokens, task="document").numpy(), found, atol=1e-4)
    asked = encoder.encode_query(list(QUERIES.values()))
    np.testing.assert_allclose(
        pooling.pool(asked, task="query").numpy(), model.encode_query(list(QUERIES.values())), atol=1e-4
    )


def test_no_directions_keep_the_scores_of_the_sampled_queries_better():
    """Of a matrix of scores, no product of that rank is nearer than that of its largest singular values."""
    model = head(anchors=60, rank=3, ridge=0.01)
    objective = LemurObjective(model)
    tokens, documents = torch.cat(texts([90], seed=11)), texts([4] * 30, seed=12)
    tokens[:, :2] *= 6  # queries that see two directions of the space above all
    windows = torch.arange(90) // 3
    maxima = token_maxima(model.anchors, torch.stack(documents))
    objective.samples = (tokens, windows, (maxima - model.target_mean) / model.target_std)
    objective.finish()
    wide = torch.from_numpy(pooled(model, documents, "document")).float()
    asked = model.encode_query_tokens(tokens, torch.arange(0, 91, 3))
    exact = (asked @ (wide - wide.mean(0)).T).double()
    kept = (model.reduce(asked, "query", 3) @ model.reduce(wide, "document", 3).T).double()
    best = torch.linalg.svdvals(exact)[3:].square().sum()
    plain = torch.linalg.svd(wide - wide.mean(0), full_matrices=False).Vh[:3].T
    by_variance = ((asked @ plain) @ ((wide - wide.mean(0)) @ plain).T).double()
    assert best <= (kept - exact).square().sum() < 1.05 * best
    assert (by_variance - exact).square().sum() > 1.5 * best, "principal components alone, which no query weighs"
    spread = [model.reduce(side, t, 3).square().mean(0) for side, t in ((asked, "query"), (wide, "document"))]
    torch.testing.assert_close(*spread, rtol=0.05, atol=0)  # alike, as graph indexes need


def test_an_interrupted_fit_goes_on_to_the_same_head(fitted, run, tmp_path):
    root, flags = run
    out = tmp_path / "out"
    train([*flags, "--output_dir", str(out), "--max_steps", "40", "--save_total_limit", "5"], prog="train.py")
    checkpoint = LemurModel.from_pretrained(out / "checkpoint-20")
    assert checkpoint.anchors.any() and checkpoint.query_map.any(), "every checkpoint encodes"
    for gone in (out / "final", out / "head", out / "checkpoint-40"):
        shutil.rmtree(gone)
    learned = (out / "checkpoint-20" / OWN_WEIGHTS).rename(out / "aside")
    with pytest.raises(InputError, match="lacks objective.safetensors.*Start anew"):
        train([*flags, "--output_dir", str(out), "--resume_from_checkpoint", "last"], prog="train.py")
    learned.rename(out / "checkpoint-20" / OWN_WEIGHTS)
    train([*flags, "--output_dir", str(out), "--resume_from_checkpoint", "last"], prog="train.py")
    ours, theirs = (LemurModel.from_pretrained(folder / "head").state_dict() for folder in (out, fitted))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-3)


def test_random_features_take_no_step(run, tmp_path):
    _, flags = run
    out = tmp_path / "out"
    train([*flags, "--output_dir", str(out), "--feature_type", "elm", "--queries", "texts"], prog="train.py")
    record = json.loads((out / "training.json").read_text())
    assert record["steps"] == 0 and record["pairs"] == {"data": len(DOCUMENTS)}
    found = LemurPooling.from_pretrained(str(out / "head")).pool(texts([3]), task="document")
    assert torch.isfinite(found).all() and found.abs().max() > 0


def test_small_corpora_shrink_what_was_asked_for_and_say_so(run, tmp_path, caplog):
    _, flags = run
    with caplog.at_level(logging.WARNING, "polyrep.methods.lemur.objective"):
        train(
            [*flags, "--output_dir", str(tmp_path / "out"), "--num_anchors", "500", "--rank", "20"]
            + ["--embedding_dim", "15", "--head_only", "true", "--max_steps", "2"],
            prog="train.py",
        )
    said = " ".join(record.message for record in caplog.records)
    assert "500 anchors were asked for" in said and "20 directions were asked for" in said
    config = LemurModel.from_pretrained(tmp_path / "out" / "head").config
    assert config.num_anchors < 60 and config.rank == config.directions == len(DOCUMENTS) - 1
    with pytest.raises(InputError, match="--num_tokens 1"):
        train([*flags, "--output_dir", str(tmp_path / "no"), "--num_tokens", "1"], prog="train.py")


def test_texts_as_queries_are_documents_by_their_ids(tmp_path):
    corpus = load_corpus(write_beir(tmp_path / "data"))
    every = texts_as_queries(corpus)
    assert every.queries == dict(corpus.corpus) and every.qrels == {i: {i: 1} for i in corpus.corpus}
    some = texts_as_queries(corpus, 2)
    assert len(some.queries) == 2 and some.queries.items() <= every.queries.items()
    assert texts_as_queries(corpus, 2).queries == some.queries
    with pytest.raises(InputError, match="--query_texts 0"):
        texts_as_queries(corpus, 0)


def test_learned_tokens_come_in_runs_of_both_sides():
    from polyrep.encoding import Embeddings
    from polyrep.training.sides import TokenSide

    def side(lengths: list[int], start: int) -> TokenSide:
        values = np.arange(start, start + sum(lengths), dtype=np.float32)[:, None]
        return TokenSide(Embeddings("tokens", values, np.cumsum([0, *lengths]), None, 1, 0.0, Path()))

    sides = [side([100, 70, 40], 0), side([5, 3], 1000)]
    tokens, runs = _sample_windows(sides, 150, np.random.default_rng(0))
    values = tokens[:, 0].numpy()
    assert (values >= 1000).sum() == 8 and 100 <= (values < 1000).sum() <= 142, "what one lacks, the other gives"
    for run in runs.unique():
        part = values[runs == run]
        assert len(part) <= WINDOW and (np.diff(part) == 1).all()
    assert len(set(values)) == len(values) and (runs.diff() >= 0).all()
    # A side whose first run is longer than its share gives none, and the numbers go on.
    tokens, runs = _sample_windows([side([8], 0), side([3], 100), side([5], 200)], 12, np.random.default_rng(0))
    assert tokens[:, 0].tolist() == [100, 101, 102, *range(8)] and runs.tolist() == [0] * 3 + [1] * 8
    everything, _ = _sample_windows(sides, 10_000, np.random.default_rng(0))
    assert len(everything) == 218


def test_polyrep_saves_and_loads_a_head(tmp_path):
    model = head()
    folder = polyrep.save(model, tmp_path / "head")
    np.testing.assert_array_equal(
        pooled(polyrep.load(folder), texts([4]), "document"), pooled(model, texts([4]), "document")
    )
