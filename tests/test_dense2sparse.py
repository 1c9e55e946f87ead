"""The Dense2Sparse room: its maths against plain loops in float64, what it refuses, and its training."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DOCUMENTS, QUERIES, run_python, write_beir
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, BertConfig, BertForMaskedLM, BertModel, BertTokenizer, PreTrainedTokenizerFast

import polyrep
from polyrep import InputError
from polyrep.cli import main, train
from polyrep.data import load_retrieval_dataset
from polyrep.hub import fingerprint
from polyrep.hub.folder import packaged_minilm
from polyrep.hub.polyrep_folder import fingerprints_of
from polyrep.methods import (
    Dense2SparseConfig,
    Dense2SparseForRetrieval,
    Dense2SparseLoss,
    Dense2SparseModel,
    Dense2SparsePooling,
)
from polyrep.training.pairs import HeadData

TEXTS = [*DOCUMENTS.values(), *QUERIES.values()]


def random_head(**config: Any) -> Dense2SparseModel:
    torch.manual_seed(0)
    head = Dense2SparseModel(
        Dense2SparseConfig(
            **{"input_dim": 6, "vocab_size": 12, "special_token_ids": [0, 1], "average_length": 4.0} | config
        )
    )
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
        head.own_weight.uniform_(0.2, 2.0)
    return head.eval()


def by_hand(head: Dense2SparseModel, vector: np.ndarray, tokens: list[int], task: str) -> np.ndarray:
    """One text's word weights, a word at a time in float64."""
    w = {name: value.double().numpy() for name, value in head.state_dict().items()}
    x = w["input.weight"] @ vector + w["input.bias"]
    x = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * w["norm.weight"] + w["norm.bias"]
    own = [t for t in tokens if t not in head.config.special_token_ids]
    weights = np.zeros(head.config.vocab_size)
    if not own:
        return weights
    for row, term in enumerate(w["expansion_terms"].astype(int)):
        weights[term] = math.log1p(max(0.0, w["vocabulary.weight"][row] @ x + w["vocabulary.bias"][row]))
    k1 = math.log1p(math.exp(w["own_saturation"]))
    b = 1 / (1 + math.exp(-w["own_length"]))
    for term in set(own):
        tf = own.count(term)
        norm = k1 * (1 - b + b * len(own) / head.config.average_length)
        saturated = 1.0 if task == "query" else tf * (k1 + 1) / (tf + norm)
        weights[term] = max(weights[term], max(0.0, w["own_weight"][term]) * saturated)
    return weights


@pytest.mark.parametrize("task", ["query", "document"])
def test_weights_are_those_of_the_formula(task):
    head = random_head(expansion_size=12)
    head.restrict_expansion(torch.tensor([2, 3, 5, 8, 11]))
    vectors = torch.randn(4, 6)
    tokens = [[0, 5, 5, 9, 1], [2, 2, 2, 11], [0, 1], [7]]
    ids = torch.tensor([row + [5] * (6 - len(row)) for row in tokens])  # padded with the id of a real word
    mask = torch.tensor([[1] * len(row) + [0] * (6 - len(row)) for row in tokens])
    found = head(vectors, ids, mask, task).sentence_embedding
    expected = np.stack([by_hand(head, v, t, task) for v, t in zip(vectors.double().numpy(), tokens, strict=True)])
    np.testing.assert_allclose(found.detach(), expected, atol=1e-5)
    assert not found[2].any(), "special tokens only: an empty vector"
    compact = head(vectors, ids, mask, task, compact=True).sentence_embedding
    np.testing.assert_allclose(compact.detach(), expected[:, head.expansion_terms], atol=1e-5)


def test_expansion_only_on_the_side_that_may():
    head = random_head(expansion="document")
    vectors, ids = torch.randn(1, 6), torch.tensor([[4]])
    assert (head(vectors, ids, task="query").sentence_embedding > 0).nonzero()[:, 1].tolist() == [4]
    assert (head(vectors, ids, task="document").sentence_embedding > 0).sum() > 1


def test_gate_holds_back_expansion_but_never_own_tokens():
    head = random_head()
    vectors, ids = torch.randn(2, 6), torch.tensor([[4, 7], [9, 9]])
    free = head(vectors, ids, task="query").sentence_embedding
    own = torch.zeros(2, 12).scatter_(1, ids, 1.0)
    closed = head(vectors, ids, task="query", gate=torch.zeros(2, 1)).sentence_embedding
    torch.testing.assert_close(closed, free * own)
    gate = (torch.rand(2, 12) < 0.5).float()
    torch.testing.assert_close(
        head(vectors, ids, task="query", gate=gate).sentence_embedding, free * torch.maximum(gate, own)
    )


def test_without_own_tokens_the_head_is_the_papers():
    head = random_head(own_tokens=None)
    vectors = torch.randn(3, 6)
    expected = torch.log1p(torch.relu(head.vocabulary(head.norm(head.input(vectors)))))
    torch.testing.assert_close(head(vectors).sentence_embedding, expected)
    head.config.activation = "double_log1p"
    torch.testing.assert_close(head(vectors).sentence_embedding, torch.log1p(expected))


def test_hidden_layers_start_as_none_and_then_count():
    plain, deep = random_head(), random_head(hidden_layers=1)
    deep.load_state_dict(plain.state_dict(), strict=False)
    fresh = Dense2SparseModel(deep.config).layers.state_dict()
    deep.layers.load_state_dict(fresh)
    vectors, ids = torch.randn(2, 6), torch.tensor([[4, 7], [9, 9]])
    torch.testing.assert_close(plain(vectors, ids).sentence_embedding, deep(vectors, ids).sentence_embedding)
    torch.nn.init.normal_(deep.layers[0][-1].weight)
    assert not torch.allclose(plain(vectors, ids).sentence_embedding, deep(vectors, ids).sentence_embedding)


@pytest.mark.parametrize(
    "pruning", [{"document_top_k": 3}, {"mass": 0.6}, {"min_weight": 0.9}, {"document_top_k": 4, "mass": 0.7}]
)
def test_pruning_keeps_the_heaviest(pruning):
    head = random_head()
    vectors, ids = torch.randn(5, 6), torch.randint(2, 12, (5, 4))
    full = head(vectors, ids).sentence_embedding.detach().double().numpy()
    for name, value in pruning.items():
        setattr(head.config, name, value)
    found = head(vectors, ids).sentence_embedding
    for row, kept in zip(full, found, strict=True):
        expected, total, summed = np.zeros_like(row), row[row >= pruning.get("min_weight", 0)].sum(), 0.0
        for place, term in enumerate(np.argsort(-row)):
            if row[term] <= pruning.get("min_weight", 0) or place >= pruning.get("document_top_k", 99):
                break
            if summed >= pruning.get("mass", 2) * total:
                break
            expected[term], summed = row[term], summed + row[term]
        np.testing.assert_allclose(kept.detach(), expected, atol=1e-6)


def test_query_and_document_have_limits_of_their_own():
    head = random_head(query_top_k=1, document_top_k=2)
    vectors, ids = torch.randn(3, 6), torch.randint(2, 12, (3, 4))
    assert ((head(vectors, ids, task="query").sentence_embedding > 0).sum(1) == 1).all()
    assert ((head(vectors, ids, task="document").sentence_embedding > 0).sum(1) == 2).all()


# --- where a head starts ---


def test_a_head_starts_from_a_masked_language_models_output_layer(backbone, tmp_path):
    config = BertConfig.from_pretrained(backbone, architectures=["BertForMaskedLM"])
    model = BertForMaskedLM(config)
    torch.nn.init.normal_(model.cls.predictions.transform.LayerNorm.weight)
    torch.nn.init.normal_(model.cls.predictions.bias)
    model.save_pretrained(tmp_path)
    tokenizer = BertTokenizer.from_pretrained(backbone)
    tokenizer.save_pretrained(tmp_path)
    head = Dense2SparseModel.from_mlm(str(tmp_path), 32)
    decoder = model.get_output_embeddings()
    torch.testing.assert_close(head.vocabulary.weight, decoder.weight)
    torch.testing.assert_close(head.vocabulary.bias, decoder.bias)
    torch.testing.assert_close(head.norm.weight, model.cls.predictions.transform.LayerNorm.weight)
    assert head.words == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))


@pytest.mark.parametrize("dim", [32, 16, 48])
def test_a_head_starts_from_the_word_embeddings_of_an_embedding_model(backbone, dim):
    model = BertModel.from_pretrained(backbone)
    head = Dense2SparseModel.from_mlm(model, dim, BertTokenizer.from_pretrained(backbone))
    words = model.get_input_embeddings().weight
    assert head.vocabulary.weight.shape == (len(words), dim)
    if dim == 32:
        expected = torch.nn.functional.normalize(words - words.mean(0), dim=1)
        torch.testing.assert_close(head.vocabulary.weight, expected)
    assert set(head.config.special_token_ids) == set(range(5))


def test_a_backbone_whose_tokens_are_no_words_takes_the_vocabulary_of_another_model(run, tmp_path):
    """A backbone with a token for each letter at a word's end (CLIP): refused with the flags that help, which do."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *(f"{x}</w>" for x in letters), *letters]
    pieces += [f"filler{i}" for i in range(40)]  # more ids than the head has words
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokens = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", end_of_word_suffix="</w>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", unk_token="<unk>", model_max_length=64
    )
    folder = tmp_path / "unigram"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(pieces), **sizes)).save_pretrained(folder)
    model = SentenceTransformer(modules=[Transformer(str(folder)), Pooling(32, "mean"), Normalize()], device="cpu")
    model.save_pretrained(str(tmp_path / "backbone"))
    flags = ["--backbone", str(tmp_path / "backbone"), "--output_dir", str(tmp_path / "out"), "--save_strategy", "no"]
    with pytest.raises(
        InputError, match="is BPE, and neither WordPiece nor Unigram.*--vocabulary .* --own_tokens none"
    ):
        train([str(run), *flags])
    flags += ["--vocabulary", str(run.parent / "encoder")]
    with pytest.raises(InputError, match="Add --own_tokens none"):
        train([str(run), *flags])
    train([str(run), *flags, "--own_tokens", "none"])
    retriever = polyrep.load(tmp_path / "out" / "final", trust_remote_code=True)
    head = Dense2SparseModel.from_pretrained(tmp_path / "out" / "head")
    known = BertTokenizer.from_pretrained(run.parent / "encoder").get_vocab()
    words = head.decode(retriever.encode_document(["zebra file"])[0])
    assert words and set(dict(words)) <= set(known)
    pipeline = SparseEncoder(modules=[*model.children(), Dense2SparsePooling(head)], device="cpu")
    torch.testing.assert_close(
        pipeline.encode_document(TEXTS).to_dense(),
        retriever.encode_document(TEXTS).to_dense().cpu(),
        atol=1e-5,
        rtol=1e-4,
    )


# --- behind any SentenceTransformer ---


@pytest.fixture
def head(sentence_model) -> Dense2SparseModel:
    head = Dense2SparseModel.from_backbone(sentence_model)
    with torch.no_grad():
        head.own_weight.uniform_(0.5, 2.0)
    return head


def test_any_sentence_transformer_becomes_a_sparse_encoder(sentence_model, head, tmp_path):
    head.save_pretrained(tmp_path / "head")
    pooling = Dense2SparsePooling.from_pretrained(tmp_path / "head")
    model = SparseEncoder(modules=[*sentence_model.children(), pooling], device="cpu")
    embedding = model.encode_query(["list file port"])[0]
    assert embedding.is_sparse and embedding.shape == (61,) and model.get_embedding_dimension() == 61
    assert model.similarity_fn_name == "dot"
    decoded = model[-1].model.decode(embedding, top_k=3)
    assert decoded == [(w, pytest.approx(x)) for w, x in model.decode(embedding, top_k=3)]
    assert len(decoded) == 3 and decoded == sorted(decoded, key=lambda pair: -pair[1])
    assert model[-1].model.decode(torch.stack([embedding, embedding]).to_dense(), top_k=3) == [decoded, decoded]
    assert len(model[-1].model.decode(embedding)) == int((embedding.to_dense() > 0).sum())


def test_texts_without_a_known_word_are_empty_and_never_nan(sentence_model, head):
    model = SparseEncoder(modules=[*sentence_model.children(), Dense2SparsePooling(head)], device="cpu")
    vectors = model.encode_document(["", "你好", "file"]).to_dense()
    assert torch.isfinite(vectors).all()
    assert (vectors > 0).any(1).tolist() == [False, False, True]
    assert head.decode(vectors)[0] == []


def test_decode_refuses_what_it_cannot_read(head):
    with pytest.raises(ValueError, match=r"shape \(7,\).*61 words"):
        head.decode(torch.zeros(7))
    with pytest.raises(ValueError, match="top_k=0"):
        head.decode(torch.zeros(61), top_k=0)


def test_own_tokens_need_token_ids():
    with pytest.raises(ValueError, match="no input_ids"):
        random_head()(torch.randn(1, 6))


def test_vectors_of_another_width_are_refused(sentence_model, head):
    with pytest.raises(ValueError, match="width 7.*input_dim=6"):
        random_head()(torch.randn(1, 7), torch.tensor([[4]]))
    wide = Dense(32, 8)
    with pytest.raises(ValueError, match="width 8.*input_dim=32"):
        SparseEncoder(modules=[*sentence_model.children(), wide, Dense2SparsePooling(head)], device="cpu")


def test_another_vocabulary_is_refused_for_own_tokens(sentence_model, head):
    with torch.no_grad():
        head.vocabulary_text[0] += 1  # another first word
    with pytest.raises(ValueError, match="own tokens would be taken for other words"):
        SparseEncoder(modules=[*sentence_model.children(), Dense2SparsePooling(head)], device="cpu")


def test_inputs_without_padding_are_refused(head):
    with pytest.raises(ValueError, match="unpad_inputs=False"):
        Dense2SparsePooling(head)({"sentence_embedding": torch.zeros(2, 32), "input_ids": torch.zeros(1, 9).long()})


def test_another_backbone_gives_a_warning_that_names_both(backbone, head, tmp_path, caplog):
    other = tmp_path / "other"
    shutil.copytree(backbone, other)
    model = BertModel.from_pretrained(backbone)
    torch.nn.init.normal_(model.embeddings.word_embeddings.weight)
    model.save_pretrained(other)
    head.config.base_model_id, head.config.base_fingerprint = "ours", fingerprint(backbone)
    assert fingerprints_of(Transformer(str(backbone))) == [fingerprint(backbone), fingerprint(backbone, 1)]

    def attach(folder: Path) -> SparseEncoder:
        return SparseEncoder(
            modules=[Transformer(str(folder)), Pooling(32, "mean"), Dense2SparsePooling(head)], device="cpu"
        )

    with caplog.at_level(logging.WARNING):
        pipeline = attach(backbone)
        assert "fingerprint" not in caplog.text
        attach(other)
    assert "ours" in caplog.text and fingerprint(backbone)[:16] in caplog.text and str(other) in caplog.text
    caplog.clear()
    polyrep.save(pipeline, tmp_path / "saved")
    with caplog.at_level(logging.WARNING):
        polyrep.load(tmp_path / "saved", trust_remote_code=True)
    assert "fingerprint" not in caplog.text


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_one_folder_gives_what_the_pipeline_gives(backbone, pooling, tmp_path):
    model = SentenceTransformer(modules=[Transformer(str(backbone)), Pooling(32, pooling), Normalize()], device="cpu")
    model.save_pretrained(str(tmp_path / "encoder"))
    head = Dense2SparseModel.from_backbone(model)
    pipeline = SparseEncoder(modules=[*model.children(), Dense2SparsePooling(head)], device="cpu")
    retriever = Dense2SparseForRetrieval.from_encoder(str(tmp_path / "encoder"), head=head).eval()
    tokens = pipeline.preprocess(TEXTS)
    inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    for task, encode in (("query", pipeline.encode_query), ("document", pipeline.encode_document)):
        with torch.no_grad():
            found = retriever(**inputs, task=task).sentence_embedding
        torch.testing.assert_close(found, encode(TEXTS).to_dense(), atol=1e-5, rtol=1e-4)


def test_a_backbone_with_more_modules_is_refused_for_one_folder(backbone, tmp_path):
    model = SentenceTransformer(modules=[Transformer(str(backbone)), Pooling(32, "mean"), LayerNorm(32)], device="cpu")
    model.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="Transformer . Pooling . LayerNorm.*--pipeline true"):
        Dense2SparseForRetrieval.from_encoder(str(tmp_path))


# --- the objective ---


@pytest.fixture
def data(sentence_model, tmp_path) -> HeadData:
    data = HeadData(negatives=1, depth=3)
    data.add(
        sentence_model, load_retrieval_dataset(write_beir(tmp_path / "tiny", "train"), "train"), show_progress=False
    )
    return data


@pytest.fixture
def batch(data) -> dict[str, Any]:
    torch.manual_seed(0)
    return data.collate([data[i] for i in range(len(data))])


def prepared(sentence_model: SentenceTransformer, data: HeadData, **settings: Any) -> Dense2SparseLoss:
    torch.manual_seed(0)
    objective = Dense2SparseLoss(Dense2SparseModel.from_backbone(sentence_model), **settings)
    objective.prepare(data)
    return objective


def deviation_of(data: HeadData) -> float:
    """Standard deviation of a query's dense scores over the documents, the mean over queries."""
    queries, documents = (
        next(iter(data.batches(side)))["sentence_embedding"].double() for side in ("query", "document")
    )
    return float((queries @ documents.T).std(1, correction=0).mean())


def test_the_temperature_follows_how_far_dense_scores_spread(sentence_model, data, batch, monkeypatch):
    q, d = batch["features"]
    dense = (q["sentence_embedding"].double() @ d["sentence_embedding"].double().T).float()
    absolute = prepared(sentence_model, data, teacher_unit="score")
    torch.testing.assert_close(absolute._teacher_logits(q, d), dense / 0.55)
    objective = prepared(sentence_model, data)
    expected = objective._teacher_logits(q, d)
    torch.testing.assert_close(expected, dense / (0.55 * deviation_of(data)), rtol=1e-4, atol=1e-4)

    def squeezed(features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As of an encoder whose cosines lie close together: each is a tenth of what it was, and .9 more."""
        vectors = features["sentence_embedding"]
        more = torch.full((len(vectors), 1), 0.9**0.5)
        return {**features, "sentence_embedding": torch.cat([0.1**0.5 * vectors, more], 1)}

    plain = data.batches
    monkeypatch.setattr(data, "batches", lambda side, size=1024: map(squeezed, plain(side, size)))
    objective._measure_teachers(data)
    found = objective._teacher_logits(squeezed(q), squeezed(d))
    torch.testing.assert_close(found.softmax(1), expected.softmax(1), rtol=1e-3, atol=1e-5)


def test_preparation_sets_what_bm25_would(sentence_model, data):
    objective = prepared(sentence_model, data, own_scale=3.0)
    head, tokenizer = objective.model, sentence_model.tokenizer
    own = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in DOCUMENTS.values()]
    known = [[t for t in row if t not in head.config.special_token_ids] for row in own]
    assert head.config.average_length == pytest.approx(np.mean([len(row) for row in known]))
    assert head.expansion_terms.tolist() == sorted({t for row in known for t in row})
    idf = np.array(
        [math.log(1 + (5 - df + 0.5) / (df + 0.5)) for df in (sum(t in row for row in known) for t in range(61))]
    )
    np.testing.assert_allclose(head.own_weight.detach(), 3 * np.sqrt(np.maximum(idf / idf.max(), 0.02)), rtol=1e-5)


def test_alignment_is_the_ridge_regression_that_it_says(sentence_model, data):
    settings = {"alignment_ridge": 0.3, "alignment_gain": 2.5, "alignment_bias": -0.7}
    start = prepared(sentence_model, data, alignment="none").model
    head = prepared(sentence_model, data, **settings).model
    features = next(iter(data.batches("document")))
    with torch.no_grad():
        x = start.hidden(features["sentence_embedding"]).double().numpy()
        own_only = Dense2SparseModel(Dense2SparseConfig(**start.config.to_diff_dict()))
        own_only.load_state_dict(start.state_dict())
        own_only.config.expansion = "none"
        z = (
            own_only(
                features["sentence_embedding"],
                features["input_ids"],
                features["attention_mask"],
                "document",
                compact=True,
            )
            .sentence_embedding.double()
            .numpy()
        )
    prior = start.vocabulary.weight.detach().double().numpy().T
    xc, zc = x - x.mean(0), z - z.mean(0)
    best = ((xc @ prior) * zc).sum() / ((xc @ prior) ** 2).sum()  # least squares for one common scale
    prior = prior * max(best, 0)
    penalty = 0.3 * (xc**2).mean()
    # Ridge as plain least squares with one more row for each dimension.
    root = np.sqrt(penalty * len(x)) * np.eye(x.shape[1])
    moved = np.linalg.lstsq(np.vstack([xc, root]), np.vstack([zc - xc @ prior, np.zeros_like(prior)]), rcond=None)[0]
    expected = 2.5 * (prior + moved)
    np.testing.assert_allclose(head.vocabulary.weight.detach().numpy().T, expected, atol=2e-4)
    bias = 2.5 * (z.mean(0) - x.mean(0) @ (prior + moved)) - 0.7
    np.testing.assert_allclose(head.vocabulary.bias.detach(), bias, atol=2e-3)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("regularizer", ["joint", "flops", "l1"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_distillation_and_regulariser_against_loops(sentence_model, data, batch, regularizer, bidirectional):
    objective = prepared(
        sentence_model, data, regularizer=regularizer, bidirectional=bidirectional, regularizer_weight=0.5, ramp=0.5
    )
    objective.progress = (1, 4)  # half the ramp
    q, d = batch["features"]
    with torch.no_grad():
        losses = objective(batch["features"], batch["labels"])
        encode = objective._encode
        zq, zd = (
            encode(objective.model, q, "query").double().numpy(),
            encode(objective.model, d, "document").double().numpy(),
        )
    teacher = (q["sentence_embedding"].double() @ d["sentence_embedding"].double().T).numpy()
    teacher /= 0.55 * deviation_of(data)
    student = zq @ zd.T

    def divergence(s: np.ndarray, t: np.ndarray) -> float:
        p, r = softmax(t), softmax(s)
        return float((p * (np.log(p) - np.log(r))).sum(1).mean())

    expected = divergence(student, teacher)
    if bidirectional:
        expected = (expected + divergence(student.T, teacher.T)) / 2
    assert losses["distillation"].item() == pytest.approx(expected, rel=1e-4)
    cost = 0.0
    for term in range(zq.shape[1]):
        a, b = zq[:, term].mean(), zd[:, term].mean()
        cost += {"joint": a * b, "flops": a * a + b * b, "l1": a + b}[regularizer]
    assert losses["regularizer"].item() == pytest.approx(0.5 * 0.25 * cost, rel=1e-4)


def test_scores_are_compared_in_full_precision_whatever_trains(sentence_model, data, batch):
    """Cosines that half precision cannot tell apart are a large step at this temperature."""
    unit = {"teacher_temperature": 0.001, "teacher_unit": "score"}
    objective = prepared(sentence_model, data, regularizer_weight=0.0, **unit)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = objective(batch["features"], batch["labels"])["distillation"]
        sides = [
            objective._encode(objective.model, side, task).double()
            for side, task in zip(batch["features"], ("query", "document"), strict=True)
        ]
    dense = [side["sentence_embedding"].double() for side in batch["features"]]
    p, q = softmax((dense[0] @ dense[1].T).numpy() / 0.001), softmax((sides[0] @ sides[1].T).numpy())
    expected = (p * (np.log(p + 1e-300) - np.log(q))).sum(1).mean()
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected, rel=1e-3)


def test_negatives_follow_from_seed_epoch_and_row(data):
    data.negatives = 6
    rows = [data[i] for i in range(len(data))]
    first, again = (data.collate(rows)["features"][1]["index"] for _ in range(2))
    torch.testing.assert_close(first, again)
    data.epoch = 1
    assert not torch.equal(first, data.collate(rows)["features"][1]["index"])


def test_fewer_pairs_than_a_batch_are_refused(run, tmp_path):
    flags = ["--output_dir", str(tmp_path), "--per_device_train_batch_size", "64", "--save_strategy", "no"]
    with pytest.raises(InputError, match="3 pairs, but a step takes 64"):
        train([str(run), *flags])


def test_labels_ignore_the_same_document_elsewhere_in_the_batch(sentence_model, data, batch):
    objective = prepared(sentence_model, data, label_weight=1.0, regularizer_weight=0.0)
    q, d = batch["features"]
    with torch.no_grad():
        losses = objective(batch["features"], batch["labels"])
        scores = objective._encode(objective.model, q, "query") @ objective._encode(objective.model, d, "document").T
    assert "distillation" not in losses and len(set(d["index"].tolist())) < len(d["index"]), "the batch has doubles"
    expected = []
    for row, own in enumerate(batch["labels"].tolist()):
        others = [c for c in range(len(d["index"])) if c == own or d["index"][c] != d["index"][own]]
        expected.append(-(scores[row, own] - torch.logsumexp(scores[row, others], 0)))
    assert losses["labels"].item() == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)


def test_the_lexical_teacher_is_bm25_in_units_of_the_dense_one(sentence_model, data, batch):
    objective = prepared(sentence_model, data, teacher_lexical=0.4)
    q, d = batch["features"]
    everything = next(iter(data.batches("document")))
    dense, words = (s.double() for s in objective._teachers(next(iter(data.batches("query"))), everything))
    assert objective.deviations[0] / objective.deviations[1] == pytest.approx(
        float(dense.std(1, correction=0).mean() / words.std(1, correction=0).mean()), rel=1e-4
    )
    batch_dense, batch_words = objective._teachers(q, d)
    mixed = 0.6 * batch_dense + 0.4 * batch_words * objective.deviations[0] / objective.deviations[1]
    torch.testing.assert_close(objective._teacher_logits(q, d), mixed / (0.55 * objective.deviations[0]))
    with torch.no_grad():
        own = objective.lexical(
            q["sentence_embedding"], q["input_ids"], q["attention_mask"], "query"
        ).sentence_embedding
    assert ((own > 0).sum(1) <= q["attention_mask"].sum(1)).all(), "the lexical teacher has no expansion"


@pytest.mark.parametrize("granularity", ["batch", "caption", "term"])
def test_expansion_control_draws_follow_from_seed_and_step(sentence_model, data, granularity):
    objective = prepared(sentence_model, data, control=granularity, control_until=0.5)
    draw = lambda step, batch=400: objective._draw_gate(batch, step, 100)  # noqa: E731
    assert not draw(0).any(), "nothing is expanded at the start"
    assert draw(50).all() and draw(99).all(), "everything after control_until"
    torch.testing.assert_close(draw(25), draw(25))
    objective.seed = 1
    other = draw(25)
    objective.seed = 0
    columns = objective.model.config.expansion_size if granularity == "term" else 1
    assert draw(25).shape == (400, columns)
    if granularity == "batch":
        assert all(len(draw(step).unique()) == 1 for step in range(10, 40))
        assert 0.2 < np.mean([draw(step)[0].item() for step in range(50)]) < 0.8
    else:
        assert not torch.equal(other, draw(25))
        assert 0.4 < draw(25).mean() < 0.6, "half the way, half the draws"
    objective.eval()
    assert draw(0) is None, "encoding is never controlled"


def test_control_reaches_queries_only(sentence_model, data, batch):
    objective = prepared(sentence_model, data, control="caption", regularizer_weight=0.0)
    seen: list[tuple[str, bool]] = []
    plain = objective._encode
    objective._encode = lambda head, f, task, gate=None: (
        seen.append((task, gate is not None)),
        plain(head, f, task, gate),
    )[1]
    objective(batch["features"], batch["labels"])
    assert seen == [("query", True), ("document", False)]


def test_gate_supervision_raises_the_documents_logits_of_query_words(sentence_model, data, batch):
    objective = prepared(sentence_model, data, gate_weight=1.0)
    q, d = batch["features"]
    losses = objective(batch["features"], batch["labels"])
    with torch.no_grad():
        weights = objective._encode(objective.model, q, "query").double()
        logits = objective.model.vocabulary(objective.model.hidden(d["sentence_embedding"])).double()
    expected = 0.0
    for row, own in enumerate(batch["labels"].tolist()):
        log_sigmoid = -torch.log1p(torch.exp(-logits[own]))
        expected -= float((weights[row] * log_sigmoid).sum() / weights[row].sum()) / len(weights)
    assert losses["gate"].item() == pytest.approx(expected, rel=1e-4)
    (gradient,) = torch.autograd.grad(losses["gate"], [objective.model.own_weight], allow_unused=True)
    assert gradient is None, "the query's weights are a gate, not a target"


def test_a_regulariser_that_empties_everything_stops_with_a_remedy(sentence_model, data, batch):
    objective = prepared(sentence_model, data)
    with torch.no_grad():
        objective.model.own_weight.fill_(-1.0)
        objective.model.vocabulary.bias.fill_(-100.0)
    objective.progress = (7, 10)
    with pytest.raises(InputError, match=r"every document of step 7 is empty.*--regularizer_weight 0.3.*Lower it"):
        objective(batch["features"], batch["labels"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"control": "word"}, "--control 'word'.*caption"),
        ({"label_weight": 1.5}, "--label_weight 1.5"),
        ({"teacher_temperature": 0.0}, "--teacher_temperature"),
        ({"regularizer": "l2"}, "joint, flops, l1"),
    ],
)
def test_the_objective_refuses_bad_settings(settings, words):
    with pytest.raises(InputError, match=words):
        Dense2SparseLoss(random_head(), **settings)


# --- from end to end ---


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, backbone: Path) -> Path:
    """The shipped run on the small data and a small backbone."""
    root = tmp_path_factory.mktemp("d2s")
    model = SentenceTransformer(modules=[Transformer(str(backbone)), Pooling(32, "mean"), Normalize()], device="cpu")
    model.save_pretrained(str(root / "encoder"))
    shipped = polyrep.files.shipped_folder("hub_configs") / "dense2sparse-minilm"
    shutil.copytree(shipped, root / "run")
    config = json.loads((root / "run" / "config.json").read_text())
    (root / "run" / "config.json").write_text(json.dumps(config | {"document_top_k": 20, "query_top_k": 10}))
    recipe = {
        "backbone": str(root / "encoder"),
        "datasets": [str(write_beir(root / "data" / "tiny", "train"))],
        "objective": "Dense2SparseLoss",
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
def trained(run: Path) -> Path:
    train([str(run), "--output_dir", str(run.parent / "out")])
    return run.parent / "out"


def test_training_writes_a_retriever_and_its_head(trained, run):
    retriever = polyrep.load(trained / "final", trust_remote_code=True)
    head = Dense2SparseModel.from_pretrained(trained / "head")
    pipeline = SparseEncoder(
        modules=[*SentenceTransformer(str(run.parent / "encoder"), device="cpu").children(), Dense2SparsePooling(head)]
    )
    torch.testing.assert_close(
        retriever.encode_document(TEXTS).to_dense().cpu(),
        pipeline.encode_document(TEXTS).to_dense().cpu(),
        atol=1e-5,
        rtol=1e-4,
    )
    assert head.config.base_fingerprint == fingerprint(run.parent / "encoder")
    assert head.config.base_model_id == "encoder", "a name, not a path of this machine"
    log = json.loads((trained / "training.json").read_text())["log"]
    assert {"distillation", "regularizer", "loss"} <= set(log[0])
    assert "SparseEncoder" in (trained / "final" / "README.md").read_text()


def test_every_checkpoint_is_a_head_that_opens(trained):
    for step in (2, 4):
        head = AutoModel.from_pretrained(trained / f"checkpoint-{step}", trust_remote_code=True)
        assert type(head).__name__ == "Dense2SparseModel"


def test_without_labels_judgments_have_no_influence(trained, run, tmp_path):
    data = write_beir(tmp_path / "tiny", "train")
    lines = (data / "qrels" / "train.tsv").read_text().splitlines()
    other = [line.rpartition("\td")[0] + "\td5\t1" for line in lines[1:]]
    (data / "qrels" / "train.tsv").write_text("\n".join([lines[0], *dict.fromkeys(other)]) + "\n")
    flags = ["--datasets", str(data), "--head_only", "true", "--save_strategy", "no"]
    train([str(run), *flags, "--output_dir", str(tmp_path / "free")])
    for name, value in load_file(trained / "head" / "model.safetensors").items():
        torch.testing.assert_close(load_file(tmp_path / "free" / "head" / "model.safetensors")[name], value)
    train([str(run), *flags, "--output_dir", str(tmp_path / "labels"), "--label_weight", "1"])
    weights = load_file(tmp_path / "labels" / "head" / "model.safetensors")["vocabulary.weight"]
    assert not torch.equal(weights, load_file(tmp_path / "free" / "head" / "model.safetensors")["vocabulary.weight"])


def test_a_backbone_of_more_modules_trains_as_a_pipeline(run, backbone, tmp_path):
    model = SentenceTransformer(modules=[Transformer(str(backbone)), Pooling(32, "mean"), LayerNorm(32)], device="cpu")
    model.save_pretrained(str(tmp_path / "wide"))
    flags = ["--backbone", str(tmp_path / "wide"), "--output_dir", str(tmp_path / "out"), "--save_strategy", "no"]
    with pytest.raises(InputError, match="--pipeline true"):
        train([str(run), *flags])
    train([str(run), *flags, "--pipeline", "true"])
    code = (
        "import sys, sentence_transformers as st; sys.modules['polyrep'] = None\n"
        f"m = st.SparseEncoder({str(tmp_path / 'out' / 'final')!r}, trust_remote_code=True, device='cpu')\n"
        "print('NAMES', [type(x).__name__ for x in m], m.encode_query(['list file']).shape)"
    )
    result = run_python("-c", code)
    assert "'Dense2SparsePooling'] torch.Size([1, 61])" in result.stdout, result.stderr[-2000:]


def test_a_strong_regulariser_stops_the_run_with_its_figure(run, tmp_path):
    flags = ["--regularizer", "l1", "--regularizer_weight", "1e4", "--ramp", "0", "--learning_rate", "0.5"]
    with pytest.raises(InputError, match="--regularizer_weight 10000"):
        train([str(run), "--output_dir", str(tmp_path), "--max_steps", "60", *flags, "--save_strategy", "no"])


def test_the_run_refuses_a_late_interaction_backbone(run, multi_vector_model, tmp_path):
    multi_vector_model.save_pretrained(str(tmp_path / "late"))
    with pytest.raises(InputError, match="one dense vector a text"):
        train([str(run), "--backbone", str(tmp_path / "late"), "--output_dir", str(tmp_path / "out")])


def test_flags_name_what_can_be_chosen_and_not_what_follows(run, capsys):
    with pytest.raises(SystemExit):
        main(["train", str(run), "--help"])
    said = capsys.readouterr().out
    assert "--document_top_k" in said and "--control" in said
    assert "--vocabulary_bytes" not in said and "--base_fingerprint" not in said


def test_the_real_vocabulary_is_word_pieces():
    head = Dense2SparseModel.from_mlm(str(packaged_minilm()), 384)
    assert head.config.vocab_size == 30_522 and head.words[2003] == "is"
