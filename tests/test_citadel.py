"""CITADEL against its formulas, in float64 and with loops, and against the methods that it has as its limits."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DOCUMENTS, QUERIES, run_python
from datasets import Dataset
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Pooling
from torch.nn import functional as F
from transformers import AutoModel

import polyrep
from polyrep import InputError
from polyrep.encoding.shards import Origin, Shard
from polyrep.encoding.views import View, encode_views, views_of
from polyrep.hub.example import one_folder
from polyrep.methods import (
    CitadelHead,
    CitadelHeadConfig,
    CitadelHeadObjective,
    CitadelModel,
    CitadelObjective,
    CitadelPooling,
    CitadelTransformer,
)
from polyrep.methods.citadel import modeling_citadel
from polyrep.methods.citadel.objective import everyones, flat, routed_scores, scores_of
from polyrep.search import open_index
from polyrep.search.scoring import maxsim

ASKED, TEXTS = list(QUERIES.values()), list(DOCUMENTS.values())
SIZES: dict[str, Any] = {
    "dim": 8,
    "num_hidden_layers": 2,
    "router_layer": 1,
    "vocab_size": 11,
    "special_token_ids": [0, 1],
    "token_dim": 3,
}


def stirred(model: Any, by: float = 0.3) -> Any:
    """A model with other weights than those at the start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * by)
    return model


def head(**config: Any) -> CitadelHead:
    torch.manual_seed(0)
    return stirred(CitadelHead(CitadelHeadConfig(**SIZES | config)).double()).eval()


def read_of(lengths: list[int], ids: list[list[int]], seed: int = 3) -> dict[str, Any]:
    """What a head reads of some texts; 0 and 1 are special tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(ids), len(ids[0])
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    return {
        "token_embeddings": torch.randn(*shape, 8, dtype=torch.float64, generator=generator),
        "router_states": torch.randn(*shape, 8, dtype=torch.float64, generator=generator),
        "pooled": torch.randn(shape[0], 8, dtype=torch.float64, generator=generator),
        "input_ids": torch.tensor(ids),
        "attention_mask": mask.long(),
    }


DOCUMENT = read_of([6, 3, 1], [[0, 4, 5, 6, 9, 1], [0, 7, 1, 3, 3, 3], [0, 2, 2, 2, 2, 2]])
QUERY = read_of([4, 5], [[0, 4, 7, 1, 0], [0, 9, 5, 5, 1]], seed=4)


# The formulas, number by number.


def router(model: CitadelHead, state: torch.Tensor, token: int) -> list[float]:
    """Scores of all words at a token."""
    if model.config.mlm_head:
        mapped = model.transform.weight @ state + model.transform.bias
        state = torch.tensor([0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in mapped.tolist()]).double()
        centred = state - state.mean()
        unit = centred / math.sqrt(float((centred**2).mean()) + model.transform_norm.eps)
        state = unit * model.transform_norm.weight + model.transform_norm.bias
    scores = [float(row @ state + bias) for row, bias in zip(model.decoder.weight, model.decoder.bias, strict=True)]
    if model.config.own_bonus:
        scores[token] += float(model.bonus)
    return scores


def by_hand(model: CitadelHead, read: dict[str, Any], task: str) -> list[list[tuple[int, float, torch.Tensor]]]:
    """Entries of each text: key, weight and vector of a token, for each token and each of its keys."""
    texts = []
    for text, length in enumerate(read["attention_mask"].sum(1).tolist()):
        entries = []
        for place in range(length):
            token = int(read["input_ids"][text, place])
            if token in (0, 1):
                continue
            vector = torch.ones(1, dtype=torch.float64)
            if model.config.token_dim != 0:
                vector = model.projection.weight @ read["token_embeddings"][text, place]
            if model.config.routing == "static":
                entries.append((token, 1.0, vector))
                continue
            scores = router(model, read["router_states"][text, place], token)
            keys = sorted(range(len(scores)), key=lambda key: -scores[key])
            for key in keys[: model.config.query_keys if task == "query" else model.config.document_keys]:
                weight = math.log(1 + max(0.0, scores[key]))
                if weight > (0 if task == "query" else model.config.threshold):
                    entries.append((key, weight, vector))
        texts.append(entries)
    return texts


def score_by_hand(queries: list, documents: list, clamp: bool) -> torch.Tensor:
    """s of each query and document without the part of whole texts."""
    scores = torch.zeros(len(queries), len(documents), dtype=torch.float64)
    for row, asked in enumerate(queries):
        for column, held in enumerate(documents):
            for key, weight, vector in asked:
                met = [w * weight * float(v @ vector) for k, w, v in held if k == key]
                if met:
                    scores[row, column] += max(0.0, max(met)) if clamp else max(met)
    return scores


CASES: list[dict[str, Any]] = [
    {},
    {"clamp": False},
    {"query_keys": 2, "document_keys": 3},
    {"query_keys": 3, "document_keys": 1, "clamp": False},
    {"threshold": 0.4},
    {"own_bonus": False},
    {"token_dim": 0},
    {"token_dim": None},
    {"mlm_head": True},
    {"routing": "static", "clamp": False},
    {"cls_dim": 0},
    {"cls_dim": 5, "normalize": True},
]


@pytest.mark.parametrize("config", CASES, ids=str)
def test_the_score_follows_the_formula(config):
    model = head(**config)
    with torch.no_grad():
        outputs = [model(**read, task=task) for read, task in ((QUERY, "query"), (DOCUMENT, "document"))]
        hands = [by_hand(model, read, task) for read, task in ((QUERY, "query"), (DOCUMENT, "document"))]
        for output, texts in zip(outputs, hands, strict=True):
            for text, entries in enumerate(texts):
                there = output.mask[text]
                assert sorted(output.keys[text][there].tolist()) == sorted(key for key, _, _ in entries)
                assert sorted(output.weights[text][there].tolist()) == pytest.approx(sorted(w for _, w, _ in entries))
        expected = score_by_hand(*hands, model.config.clamp)
        assert expected.any()
        if model.config.sentence_dim:
            sides = []
            for read in (QUERY, DOCUMENT):
                whole = [model.sentence_map.weight @ u if model.config.cls_dim else u for u in read["pooled"]]
                sides.append([u / math.sqrt(float(u @ u)) if model.config.normalize else u for u in whole])
            expected += torch.stack(
                [torch.stack([model.sentence_scale * (q @ d) for d in sides[1]]) for q in sides[0]]
            )
        sides = [everyones([output]) for output in outputs]
        found = scores_of(*sides, model.config.clamp)
        torch.testing.assert_close(found, expected)


def test_training_sees_all_words_and_inference_the_keys_that_are_kept():
    model = head(document_keys=2)
    with torch.no_grad():
        every, kept = model(**DOCUMENT, task="document", prune=False), model(**DOCUMENT, task="document")
        for text, length in enumerate(DOCUMENT["attention_mask"].sum(1).tolist()):
            most, few = [0.0] * 11, [0.0] * 11
            for place in range(length):
                token = int(DOCUMENT["input_ids"][text, place])
                if token not in (0, 1):
                    scores = router(model, DOCUMENT["router_states"][text, place], token)
                    best = sorted(scores)[-2:]
                    for key, score in enumerate(scores):
                        weight = math.log(1 + max(0.0, score))
                        most[key] = max(most[key], weight)
                        few[key] = max(few[key], weight) if score in best else few[key]
            assert every.router_embedding[text].tolist() == pytest.approx(most)
            assert kept.sentence_embedding[text].tolist() == pytest.approx(few)
    assert torch.equal(every.keys, kept.keys) and torch.equal(every.weights, kept.weights)


@pytest.mark.parametrize("block", [1, 2, 4, 4096])
def test_blocks_of_words_and_of_tokens_change_nothing(monkeypatch, block):
    model = head(document_keys=4)
    whole, every = model(**DOCUMENT), model(**DOCUMENT, prune=False)
    every.router_embedding.square().sum().backward()
    slope = model.decoder.weight.grad.clone()
    model.zero_grad()
    monkeypatch.setattr(modeling_citadel, "WORD_BLOCK", block)
    monkeypatch.setattr(modeling_citadel, "TOKEN_BLOCK", block)
    with torch.no_grad():
        for prune, expected in ((True, whole), (False, every)):
            found = model(**DOCUMENT, prune=prune)
            assert torch.equal(found.keys, expected.keys)
            torch.testing.assert_close(found.weights, expected.weights)
    found = model(**DOCUMENT, prune=False)
    for name in ("dispatched", "probability", "activation"):
        torch.testing.assert_close(found[name], every[name])
    found.router_embedding.square().sum().backward()
    torch.testing.assert_close(model.decoder.weight.grad, slope)


# What it is in its limits.


def test_own_words_with_weight_one_are_coil():
    model = head(routing="static")
    with torch.no_grad():
        query, document = everyones([model(**QUERY, task="query")]), everyones([model(**DOCUMENT)])
        assert query["weights"].unique().tolist() == [0, 1]
        queries = [model.projection(QUERY["token_embeddings"][i]) for i in range(2)]
        documents = [model.projection(DOCUMENT["token_embeddings"][i]) for i in range(3)]
        for row, asked in enumerate(QUERY["input_ids"].tolist()):
            for column, held in enumerate(DOCUMENT["input_ids"].tolist()):
                total = 0.0  # COIL, equation 5: exact matches, each of a query's tokens with its best
                for i in range(int(QUERY["attention_mask"][row].sum())):
                    same = [
                        float(queries[row][i] @ documents[column][j])
                        for j in range(int(DOCUMENT["attention_mask"][column].sum()))
                        if held[j] == asked[i] and asked[i] not in (0, 1)
                    ]
                    total += max(0.0, *same) if same else 0.0
                bare = [{name: value for name, value in side.items() if name != "dense"} for side in (query, document)]
                assert float(scores_of(*bare, True)[row, column]) == pytest.approx(total)


def test_one_key_for_all_is_maxsim():
    generator = torch.Generator().manual_seed(5)
    queries, documents = (
        torch.randn(*shape, 6, dtype=torch.float64, generator=generator) for shape in ((3, 4), (5, 7))
    )
    masks = [torch.rand(part.shape[:2], generator=generator) > 0.3 for part in (queries, documents)]
    for mask in masks:
        mask[:, 0] = True
    sides = [
        flat(
            torch.full_like(mask, 9, dtype=torch.int64)[..., None],
            torch.ones_like(part[..., :1]),
            part,
            mask[..., None],
        )
        for part, mask in zip((queries, documents), masks, strict=True)
    ]
    found = routed_scores(*sides, (3, 5), clamp=False)
    torch.testing.assert_close(found.float(), maxsim(queries, documents, *masks), atol=1e-4, rtol=1e-4)


def test_weights_alone_are_a_sparse_model():
    model = head(token_dim=0, cls_dim=0, query_keys=2, document_keys=3)
    with torch.no_grad():
        query, document = model(**QUERY, task="query"), model(**DOCUMENT)
        expected = query.sentence_embedding @ document.sentence_embedding.T
        torch.testing.assert_close(scores_of(everyones([query]), everyones([document]), True), expected)
    assert (query.sentence_embedding > 0).any() and expected.any()


def test_entries_without_a_match_score_nothing():
    asked = flat(*(torch.tensor(x) for x in ([[[3]]], [[[1.0]]], [[[1.0, 0.0]]], [[[True]]])))
    held = flat(
        *(
            torch.tensor(x)
            for x in ([[[4]], [[3]]], [[[1.0]], [[1.0]]], [[[1.0, 0.0]], [[-2.0, 0.0]]], [[[True]], [[True]]])
        )
    )
    assert routed_scores(asked, held, (1, 2)).tolist() == [[0, 0]]
    assert routed_scores(asked, held, (1, 2), clamp=False).tolist() == [[0, -2]]
    none = flat(
        *(part[:0] for part in (torch.zeros(1, 1, 1).long(), torch.ones(1, 1, 1), torch.ones(1, 1, 2))),
        torch.zeros(0, 1, 1).bool(),
    )
    assert routed_scores(none, held, (2, 2)).tolist() == [[0, 0], [0, 0]]


def test_gradients_of_the_score_are_those_of_its_loop():
    model = head(query_keys=2, clamp=False)
    sides = [everyones([model(**QUERY, task="query")]), everyones([model(**DOCUMENT)])]
    bare = [{name: value for name, value in side.items() if name != "dense"} for side in sides]
    slopes = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    (scores_of(*bare, False) * slopes).sum().backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()

    def entries(read: dict[str, Any], task: str) -> list:
        texts = []
        output = model(**read, task=task)
        for text in range(len(output.keys)):
            spots = output.mask[text].nonzero().tolist()
            texts.append(
                [(int(output.keys[text, i, k]), output.weights[text, i, k], output.vectors[text, i]) for i, k in spots]
            )
        return texts

    total: Any = 0.0
    queries, documents = entries(QUERY, "query"), entries(DOCUMENT, "document")
    for row, asked in enumerate(queries):
        for column, held in enumerate(documents):
            for key, weight, vector in asked:
                met = [w * weight * (v @ vector) for k, w, v in held if k == key]
                total = total + (slopes[row, column] * torch.stack(met).max() if met else 0)
    total.backward()
    for name, value in model.named_parameters():
        if value.grad is not None and value.grad.any():
            torch.testing.assert_close(found[name], value.grad, msg=name)
    assert {"projection.weight", "decoder.weight", "bonus"} <= found.keys()


# Padding, and texts without words.


@pytest.mark.parametrize("prune", [True, False])
def test_padding_changes_nothing(prune):
    model = head()
    with torch.no_grad():
        together = model(**DOCUMENT, task="document", prune=prune)
        for text, length in enumerate(DOCUMENT["attention_mask"].sum(1).tolist()):
            part = {name: value[text : text + 1] for name, value in DOCUMENT.items()}
            alone = {name: value if name == "pooled" else value[:, :length] for name, value in part.items()}
            found = model(**alone, task="document", prune=prune)
            torch.testing.assert_close(found.router_embedding[0], together.router_embedding[text])
            torch.testing.assert_close(found.weights[0], together.weights[text, :length])
            assert not together.mask[text, length:].any() and not together.weights[text, length:].any()
    if not prune:
        sums = [model(**{k: v[i : i + 1] for k, v in DOCUMENT.items()}, prune=False) for i in range(3)]
        for name in ("dispatched", "probability", "activation"):
            torch.testing.assert_close(together[name], sum(found[name] for found in sums) / 3)
        words = [4, 1, 0]  # of each text, without special tokens
        assert float(together.dispatched.sum()) == pytest.approx(sum(words) / 3)
        assert float(together.probability.sum()) == pytest.approx(sum(words) / 3)


def test_balance_is_least_where_all_words_are_as_frequent():
    objective = CitadelHeadObjective(CitadelHead(CitadelHeadConfig(dim=8, router_reads="vectors", vocab_size=11)))

    def balance(first: list[float], share: list[float]) -> float:
        column = {"dispatched": torch.tensor(first), "probability": torch.tensor(share)}
        column |= {"activation": torch.tensor(0.0), "mask": torch.ones(1, 1, 1, dtype=torch.bool)}
        return float(objective.balance([[column], [column]])["balance"]) / objective.balance_weight / 2

    even = balance([2.0] * 4, [2.0] * 4)
    assert even == pytest.approx(4 * 2.0 * 2.0)  # of T tokens and K words, T * T / K
    for uneven in ([5.0, 1.0, 1.0, 1.0], [8.0, 0.0, 0.0, 0.0], [3.0, 2.0, 2.0, 1.0]):
        assert balance(uneven, uneven) > even


# What is there before training.


def encoder_of(folder: Path, unit: bool = True) -> SentenceTransformer:
    first = Transformer(str(folder))
    modules = [first, Pooling(first.get_embedding_dimension(), "mean"), *([Normalize()] if unit else [])]
    return SentenceTransformer(modules=modules, device="cpu", similarity_fn_name="cosine" if unit else "dot")


def late_model(folder: Path) -> MultiVectorEncoder:
    torch.manual_seed(1)
    names: Any = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    narrow = Dense(32, 16, bias=False, activation_function=torch.nn.Identity(), **names)
    mask = MultiVectorMask(skiplist_words=[":"])
    return MultiVectorEncoder(modules=[Transformer(str(folder)), narrow, mask, Normalize(**names)], device="cpu")


def batch_of(model: Any, texts: list[str], task: str = "document") -> dict[str, torch.Tensor]:
    return {k: v for k, v in model.preprocess(texts, task=task).items() if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize("unit", [True, False])
def test_the_vector_of_a_text_starts_as_the_backbones_own(backbone, unit):
    plain = encoder_of(backbone, unit)
    model = CitadelModel.from_modules(plain, token_dim=8).eval()
    batch = batch_of(plain, TEXTS)
    with torch.no_grad():
        expected = plain.eval()(dict(batch))["sentence_embedding"]
        assert torch.equal(model.encode_routed(**batch, task="document").sentence_embedding, expected)
        scale = 20 if unit else 1
        torch.testing.assert_close(model.encode_routed(**batch, task="query").sentence_embedding, scale * expected)


@pytest.mark.parametrize("active", [1, 3])
def test_training_starts_as_coil_with_as_many_words_as_are_asked_for(backbone, active):
    plain = encoder_of(backbone)
    model = CitadelModel.from_modules(plain, token_dim=8, initial_active=active, router_layer=1).eval()
    batch = batch_of(plain, TEXTS)
    model.head.calibrate(lambda: model(**batch, task="document"))
    with torch.no_grad():
        query = model(**batch, task="query", prune=False)
        known = ~torch.isin(batch["input_ids"], torch.tensor(model.config.special_token_ids))
        counted = known & batch["attention_mask"].bool()
        own = (query.keys[..., 0] == batch["input_ids"])[counted]
        assert own.float().mean() >= modeling_citadel.OWN_FIRST - 1 / len(own)
        wide = model.head
        wide.config.document_keys = 61  # all words
        found = model(**batch, task="document")
        assert int(found.mask.sum()) == active * int(counted.sum())
        lengths = (found.vectors[counted].norm(dim=-1)).mean() * found.weights[counted].amax(-1).mean()
        assert float(lengths) == pytest.approx(1, rel=1e-4)


def test_a_router_of_vectors_starts_as_the_words_own(backbone):
    late = late_model(backbone)
    model = CitadelHead.from_backbone(late, initial_active=3)
    assert model.config.dim == 16 and not model.config.own_bonus and model.config.sentence_dim == 0
    rows = F.normalize(model.decoder.weight.detach(), dim=-1)
    special = set(model.config.special_token_ids)
    words = [i for i in range(model.config.vocab_size) if i not in special]
    assert model.terms.tolist() == words
    torch.testing.assert_close(rows, modeling_citadel.vectors_of_words(late, torch.tensor(words)))
    with torch.no_grad():
        read = modeling_citadel.vectors_of_words(late, torch.tensor(words))
        model.config.document_keys = len(words)
        found = model.eval()(read[None], task="document")
    assert int(found.mask.sum()) == 3 * len(words)
    firsts = (found.weights[0, :, 0].expm1()).mean()
    assert float(firsts) == pytest.approx(math.e - 1, rel=1e-4)


def test_projections_start_at_the_principal_axes(backbone):
    late = late_model(backbone)
    model = CitadelHead.from_backbone(late, token_dim=4)
    vectors = torch.randn(200, 16, generator=torch.Generator().manual_seed(7)) * torch.linspace(3, 0.1, 16)
    model.calibrate(lambda: model(vectors[None], task="document"))
    found = model.projection.weight.detach()
    torch.testing.assert_close(found @ found.T, torch.eye(4))
    expected = torch.linalg.svd(vectors, full_matrices=False).Vh[:4]
    torch.testing.assert_close((found @ expected.T).abs(), torch.eye(4), atol=1e-4, rtol=0)


# Doors.


@pytest.fixture
def folder(backbone: Path, tmp_path: Path) -> Path:
    inner = CitadelModel.from_modules(encoder_of(backbone), token_dim=8, initial_active=4, router_layer=1)
    model = one_folder(inner, backbone, tmp_path / "inner", SparseEncoder, CitadelTransformer)
    return polyrep.save(model, tmp_path / "model")


FRESH = """
import sys, torch
from transformers import AutoModel, AutoTokenizer
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
tokens = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)(["list a file"], return_tensors="pt")
found = model.encode_routed(**tokens, task="query")
print("SUMS", *(float(found[name].double().sum()) for name in ("keys", "weights", "vectors", "sentence_embedding")))
"""


def test_entries_come_from_automodel_without_polyrep(folder):
    ran = run_python("-c", FRESH, str(folder), cwd=folder.parent)
    assert ran.returncode == 0, ran.stderr[-2000:]
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    tokens = polyrep.load(folder, trust_remote_code=True).tokenizer(["list a file"], return_tensors="pt")
    with torch.no_grad():
        found = model.encode_routed(**tokens, task="query")
    sums = [float(x) for x in ran.stdout.partition("SUMS ")[2].splitlines()[0].split()]
    expected = [float(found[name].double().sum()) for name in ("keys", "weights", "vectors", "sentence_embedding")]
    assert sums == pytest.approx(expected, rel=1e-5)
    tokens_there = tokens["input_ids"].shape[1]
    assert found.keys.shape == (1, tokens_there, 1) and found.vectors.shape == (1, tokens_there, 8)
    assert found.sentence_embedding.shape == (1, 32) and not found.mask[0, 0].any()  # [CLS]


def test_the_router_alone_is_a_sparse_encoder_and_no_other_family_opens_it(folder):
    model = SparseEncoder(str(folder), trust_remote_code=True, device="cpu")
    found = model.encode_document(TEXTS).to_dense()
    with torch.no_grad():
        expected = model[0].model(**batch_of(model, TEXTS), task="document").router_embedding
    torch.testing.assert_close(found, expected)
    assert model.get_embedding_dimension() == found.shape[1] == model[0].model.config.vocab_size
    with torch.no_grad():
        output = model[0].model(**batch_of(model, TEXTS))
    assert "last_hidden_state" not in output
    with pytest.raises(ValueError, match="lets every two token vectors meet.*Open it as SparseEncoder.*encode_routed"):
        _ = output.last_hidden_state  # of whoever pools
    for family in (MultiVectorEncoder, SentenceTransformer):
        with pytest.raises(Exception):  # noqa: B017  of sentence-transformers, each version in its own way
            family(str(folder), trust_remote_code=True, device="cpu").encode_document(TEXTS)
    with pytest.raises(ValueError, match="CitadelTransformer: stands in a MultiVectorEncoder that lets every two"):
        MultiVectorEncoder(modules=list(model.children()), device="cpu")


def test_a_head_routes_the_vectors_of_a_frozen_late_interaction_model(backbone, tmp_path):
    late = late_model(backbone)
    stir = stirred(CitadelHead.from_backbone(late, token_dim=None, initial_active=4, document_keys=2), 0.1)
    polyrep.save(stir, tmp_path / "head")
    pooling = CitadelPooling.from_pretrained(tmp_path / "head")
    whole = SparseEncoder(modules=[*late.children(), pooling], device="cpu")
    polyrep.save(whole, tmp_path / "whole")
    one = polyrep.load(tmp_path / "whole", trust_remote_code=True)
    assert len(one) == 1 and one[0].model.config.trunk
    for task, encode in (("query", late.encode_query), ("document", late.encode_document)):
        vectors = encode(TEXTS)
        entries = pooling.route(vectors, task=task)
        with torch.no_grad():
            found = one[0].model.encode_routed(**batch_of(one, TEXTS, task), task=task)
            passed = whole(whole.preprocess(TEXTS, task=task), task=task)
        for text, own in enumerate(vectors):
            there = entries.mask[text]
            assert torch.equal(entries.vectors[text, : len(own)], torch.as_tensor(own))  # the vectors that are there
            for other in (found, passed):
                assert entries.keys[text][there].tolist() == other["keys"][text][other["mask"][text]].tolist()
                torch.testing.assert_close(entries.weights[text][there], other["weights"][text][other["mask"][text]])
        assert (entries.mask.sum((1, 2)) > 0).all() and found.sentence_embedding is None
    again = CitadelPooling.from_pretrained(tmp_path / "whole")
    assert torch.equal(again.model.decoder.weight, pooling.model.decoder.weight)
    with pytest.raises(ValueError, match="lets every two token vectors meet"):
        MultiVectorEncoder(modules=[*late.children(), pooling], device="cpu")


def test_a_threshold_prunes_documents_alone_and_more_of_it_more_of_them(folder):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    batch = batch_of(polyrep.load(folder, trust_remote_code=True), TEXTS)
    with torch.no_grad():
        queries, before = model.encode_routed(**batch, task="query"), model.encode_routed(**batch)
        for threshold in (0.2, 0.6, 1.0):
            model.head.config.threshold = threshold
            found = model.encode_routed(**batch)
            assert torch.equal(found.mask, before.mask & (before.weights > threshold))
            assert torch.equal(model.encode_routed(**batch, task="query").mask, queries.mask)


def routing_model(kind: str, backbone: Path, where: Path) -> Any:
    """A model that routes: one folder, or a head behind an encoder or behind a late-interaction model."""
    few: dict[str, Any] = {"token_dim": 8, "initial_active": 4, "document_keys": 2}
    if kind == "folder":
        inner = CitadelModel.from_modules(encoder_of(backbone), router_layer=1, **few)
        made = one_folder(inner, backbone, where / "inner", SparseEncoder, CitadelTransformer)
        return polyrep.load(polyrep.save(made, where / "model"), trust_remote_code=True)
    if kind == "encoder":
        first = Transformer(str(backbone))
        head = CitadelHead.from_backbone(encoder_of(backbone), router_layer=1, clamp=False, **few)
        return SparseEncoder(modules=[first, CitadelPooling(head)], device="cpu")
    late = late_model(backbone)
    head = stirred(CitadelHead.from_backbone(late, **few), 0.1)
    return SparseEncoder(modules=[*late.children(), CitadelPooling(head)], device="cpu")


@pytest.mark.parametrize("kind", ["folder", "encoder", "late"])
def test_the_views_of_a_model_are_its_router_and_its_entries(kind, backbone, tmp_path):
    model = routing_model(kind, backbone, tmp_path).eval()
    config: Any = list(model.children())[-1].model.config
    views, whole = views_of(model), 0 if kind == "late" else 32
    similarity = "routed_unclamped" if kind == "encoder" else "routed"
    assert config.entry_dim == 8 and list(views) == ["router", "routed"]
    assert views["router"] == View("sparse", config.vocab_size, "dot", "", weight=0.0)
    further: dict[str, Any] = {"weight": 1.0, "vocabulary": config.vocab_size, "sentence_dim": whole}
    assert views["routed"] == View("routed", 8, similarity, "", **further)
    sides, passed = {}, {}
    for task, texts, encode in (
        ("query", ASKED, model.encode_query),
        ("document", TEXTS, model.encode_document),
    ):
        found = encode_views(model, texts, ["router", "routed"], task=task, batch_size=2)
        with torch.no_grad():
            passed[task] = model(model.preprocess(texts, task=task), task=task)
        weights = encode(texts).to_dense()
        sides[task] = found["routed"]
        for number in range(len(texts)):
            router = np.zeros(config.vocab_size)
            part = slice(*found["router"].offsets[number : number + 2])
            router[found["router"].indices[part]] = found["router"].values[part]
            np.testing.assert_allclose(router, weights[number].numpy(), atol=1e-5)
            own, part = passed[task], slice(*found["routed"].offsets[number : number + 2])
            token, place = own["mask"][number].nonzero(as_tuple=True)
            assert found["routed"].indices[part].tolist() == own["keys"][number, token, place].tolist()
            vectors = own["weights"][number, token, place][:, None] * own["vectors"][number, token]
            np.testing.assert_allclose(found["routed"].values[part], vectors.numpy(), atol=1e-5)
        if whole:
            np.testing.assert_allclose(found["routed"].sentences, passed[task]["dense"].numpy(), atol=1e-5)
    expected = scores_of(*(everyones([passed[task]]) for task in ("query", "document")), clamp=config.clamp)
    assert len(np.unique(expected.numpy().round(4))) > len(ASKED)
    origin = Origin("routed", "routed", 8, similarity, "m", vocabulary=config.vocab_size, sentence_dim=whole)
    index = open_index(f"routed:{tmp_path}/index?precision=float32")
    index.add([Shard(list(DOCUMENTS), sides["document"], origin)])
    for row, hits in zip(expected.tolist(), index.search(sides["query"], len(TEXTS)), strict=True):
        assert {hit.id: hit.score for hit in hits} == pytest.approx(dict(zip(DOCUMENTS, row, strict=True)), abs=1e-4)


# How it is learned.


def columns(model: Any, *texts: list[str]) -> list[dict[str, Any]]:
    return [{**model.preprocess(part, task="document" if number else "query")} for number, part in enumerate(texts)]


@pytest.fixture
def whole(folder: Path) -> SparseEncoder:
    model: Any = polyrep.load(folder)
    stirred(model[0].model.head, 0.1)
    return model


@pytest.mark.parametrize(
    "settings", [{}, {"tau": 2.0, "router_weight": 0.5, "balance_weight": 1.0}, {"router_weight": 0.0}], ids=str
)
def test_the_loss_is_that_of_the_paper(whole, settings):
    objective = CitadelObjective(whole, sparsity_weight=0.1, **settings)
    own, hard = TEXTS[:3], TEXTS[2:]
    whole.eval()
    found = objective(columns(whole, ASKED, own, hard))
    head = whole[0].model.head.double()
    outputs = []
    with torch.no_grad():
        for number, texts in enumerate((ASKED, own, hard)):
            task = "document" if number else "query"
            inner = whole[0].model
            batch = batch_of(whole, texts, task)
            deep = inner.encoder(**batch, output_hidden_states=True)
            last, states = deep.last_hidden_state.double(), deep.hidden_states[1].double()
            weights = batch["attention_mask"][..., None].double()
            pooled = (last * weights).sum(1) / weights.sum(1)
            read = {"token_embeddings": last, "router_states": states, "pooled": pooled}
            read |= {name: batch[name] for name in ("input_ids", "attention_mask")}
            outputs.append(head(**read, task=task, prune=False))
    query, documents = outputs[0], outputs[1:]
    special = set(head.config.special_token_ids)

    def entries(output: Any) -> list:
        texts = []
        for text in range(len(output.keys)):
            spots = output.mask[text].nonzero().tolist()
            texts.append(
                [
                    (int(output.keys[text, i, k]), float(output.weights[text, i, k]), output.vectors[text, i])
                    for i, k in spots
                ]
            )
        return texts

    scores = score_by_hand(entries(query), [text for output in documents for text in entries(output)], True)
    scores += query.dense @ torch.cat([output.dense for output in documents]).T
    own_rows = torch.arange(3)
    expected = {"entries": F.cross_entropy(scores / objective.tau, own_rows)}
    router = query.router_embedding @ torch.cat([output.router_embedding for output in documents]).T
    if objective.router_weight:
        expected["router"] = objective.router_weight * F.cross_entropy(router, own_rows)
    balance, sparsity = 0.0, 0.0
    for side in ([query], documents):
        first = sum(output.dispatched for output in side) / len(side)
        share = sum(output.probability for output in side) / len(side)
        balance += float(first @ share)
        sparsity += float(sum(output.activation for output in side) / len(side))
    expected["balance"] = objective.balance_weight * torch.tensor(balance)
    expected["sparsity"] = 0.1 * torch.tensor(sparsity)
    assert found.keys() == expected.keys() and special
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-4), name


def test_words_that_occur_are_trained_and_kept_in_the_end(whole):
    inner = whole[0].model
    objective = CitadelObjective(whole)
    pairs = {"tiny": Dataset.from_dict({"query": ASKED[:2], "positive": TEXTS[:2]})}
    objective.initialize(pairs)
    occurring = set(batch_of(whole, ASKED[:2])["input_ids"].unique().tolist())
    occurring |= set(batch_of(whole, TEXTS[:2])["input_ids"].unique().tolist())
    expected = sorted(occurring - set(inner.config.special_token_ids))
    assert inner.head.terms[inner.head.learned].tolist() == expected
    whole.train()
    sum(objective(columns(whole, ASKED[:2], TEXTS[:2])).values()).backward()
    slope = inner.head.decoder.weight.grad
    assert slope[inner.head.learned].any() and not slope[~inner.head.learned].any()
    trained = inner.head.train()(**dummy(inner, TEXTS[:2], whole), prune=False)
    objective.complete(pairs)
    assert inner.head.terms.tolist() == expected == sorted(expected) and inner.head.config.words == len(expected)
    kept = inner.head.eval()(**dummy(inner, TEXTS[:2], whole), prune=False)
    torch.testing.assert_close(kept.router_embedding, trained.router_embedding)


def dummy(inner: Any, texts: list[str], model: Any) -> dict[str, Any]:
    """What a whole model's head reads of texts."""
    batch = batch_of(model, texts)
    with torch.no_grad():
        deep = inner.encoder(**batch, output_hidden_states=True)
    read = {"token_embeddings": deep.last_hidden_state, "router_states": deep.hidden_states[1]}
    return read | {name: batch[name] for name in ("input_ids", "attention_mask")}


def head_features(late: MultiVectorEncoder) -> list[dict[str, torch.Tensor]]:
    features = []
    for texts, task in ((ASKED, "query"), (TEXTS, "document")):
        with torch.no_grad():
            found = late(late.preprocess(texts, task=task), task=task)
        part = {name: found[name] for name in ("token_embeddings", "attention_mask")}
        features.append(part | {"index": torch.arange(len(texts))})
    features[1]["index"][4] = 0  # the last is the first once more
    features[1]["token_embeddings"][4] = features[1]["token_embeddings"][0]
    features[1]["attention_mask"][4] = features[1]["attention_mask"][0]
    features[0]["judged"] = torch.tensor([[1], [2], [3]])
    return features


def kl(teacher: torch.Tensor, student: torch.Tensor) -> float:
    """Mean over rows of the divergence of softmaxes, number by number."""
    total = 0.0
    for row, other in zip(teacher.double().tolist(), student.double().tolist(), strict=True):
        p, q = ([math.exp(x) / sum(math.exp(y) for y in z) for x in z] for z in (row, other))
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / len(teacher)


def test_a_head_learns_what_maxsim_scores(backbone):
    late = late_model(backbone).eval()
    model = stirred(CitadelHead.from_backbone(late, token_dim=8, initial_active=6), 0.1)
    objective = CitadelHeadObjective(model, label_weight=0.5, maxsim_weight=2.0, score_scale=3.0, router_weight=0.7)
    features = head_features(late)
    labels = torch.arange(3)
    found = objective([dict(part) for part in features], labels)
    with torch.no_grad():
        query, document = (
            model(side["token_embeddings"], side["attention_mask"], task, prune=False)
            for side, task in zip(features, ("query", "document"), strict=True)
        )
        scores = scores_of(everyones([query]), everyones([document]), True)
        masks = [side["attention_mask"].bool() for side in features]
        full = maxsim(features[0]["token_embeddings"], features[1]["token_embeddings"], *masks)
        lengths = masks[0].sum(1, keepdim=True)
        columns = [0, 1, 2, 3]  # each document once
        for name, said, weight in (
            ("maxsim", scores, 2.0),
            ("router", query.router_embedding @ document.router_embedding.T, 0.7),
        ):
            student, teacher = (3.0 * (part / lengths)[:, columns] for part in (said, full))
            expected = weight * (kl(teacher, student) + kl(teacher.T, student.T)) / 2
            assert float(found[name]) == pytest.approx(expected, rel=1e-4), name
        known = scores.clone()
        known[0, 4] = -math.inf  # equals its own, so it is no negative
        assert float(found["labels"]) == pytest.approx(0.5 * float(F.cross_entropy(known, labels)), rel=1e-5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = objective([dict(part) for part in features], labels)["maxsim"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    assert all(not torch.equal(before[name], value) for name, value in model.state_dict().items() if "weight" in name)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("whole", {"tau": 0.0}, "--tau 0.0"),
        ("whole", {"router_weight": -1.0}, "--router_weight -1.0"),
        ("whole", {"balance_weight": math.nan}, "--balance_weight nan"),
        ("whole", {"rows": "some"}, "--rows 'some'.*occurring, all"),
        ("head", {"label_weight": -1.0}, "--label_weight -1.0"),
        ("head", {"maxsim_weight": 0.0}, "--label_weight 0 --maxsim_weight 0"),
        ("head", {"score_scale": 0.0}, "--score_scale 0.0"),
    ],
)
def test_settings_that_teach_nothing_are_refused(kind, settings, words):
    model = CitadelHead(CitadelHeadConfig(dim=8, router_reads="vectors", vocab_size=11))
    with pytest.raises(InputError, match=words):
        (CitadelObjective if kind == "whole" else CitadelHeadObjective)(model, **settings)


def test_what_cannot_be_learned_from_is_refused(whole, backbone):
    static = CitadelHead(CitadelHeadConfig(dim=8, router_reads="vectors", routing="static", vocab_size=11))
    with pytest.raises(InputError, match="--routing static.*citadel-minilm"):
        CitadelHeadObjective(static)
    plain = encoder_of(backbone)
    with pytest.raises(InputError, match="the model has no router. Use a CitadelModel"):
        _ = CitadelObjective(plain).head
    objective = CitadelObjective(whole)
    with pytest.raises(InputError, match="a batch of one pair"):
        objective(columns(whole, ASKED[:1], TEXTS[:1]))
    with torch.no_grad():
        whole[0].model.head.decoder.bias.fill_(-1e6)
    with pytest.raises(InputError, match="every query of a step has lost its entries.*--sparsity_weight 1e-05"):
        objective(columns(whole, ASKED, TEXTS[:3]))


# Bad input.


def test_what_does_not_fit_is_refused(backbone, tmp_path):
    model = head()
    with pytest.raises(ValueError, match=r"token vectors of shape \(3, 6, 7\).*made for \(texts, tokens, 8\)"):
        model(**DOCUMENT | {"token_embeddings": DOCUMENT["token_embeddings"][..., :7]})
    with pytest.raises(ValueError, match="no input_ids, and with routing=.* a token has its own word by its id"):
        model(**DOCUMENT | {"input_ids": None})
    broken = DOCUMENT["token_embeddings"].clone()
    broken[1, 2, 0] = math.nan
    with pytest.raises(ValueError, match="text 1 of the batch has token vectors that are not finite"):
        model(**DOCUMENT | {"token_embeddings": broken})
    broken[1, 2, 0], broken[1, 4, 0] = 0, math.nan  # of padding
    assert torch.isfinite(model(**DOCUMENT | {"token_embeddings": broken}).weights).all()
    with pytest.raises(ValueError, match="none of the words is one of the head's"):
        model.restrict(torch.tensor([42]))
    bare = SentenceTransformer(modules=[Transformer(str(backbone))], device="cpu")
    fitted = CitadelHead.from_backbone(bare, router_layer=1)
    with pytest.raises(ValueError, match="stands in CitadelPooling, but reads hidden states"):
        SparseEncoder(modules=[CitadelPooling(copy.deepcopy(fitted))], device="cpu")
    fitted.config.vocab_size = 99
    with pytest.raises(ValueError, match="vocab_size=99, but the encoder knows 61 tokens"):
        SparseEncoder(modules=[Transformer(str(backbone)), CitadelPooling(fitted)], device="cpu")
    deep = CitadelHead(CitadelHeadConfig(dim=32, num_hidden_layers=4, router_layer=1, vocab_size=61))
    with pytest.raises(ValueError, match="made for num_hidden_layers=4 and dim=32, but the encoder has 2 layers"):
        CitadelModel.from_modules(bare, deep)
    late = late_model(backbone)
    narrow = CitadelHead(CitadelHeadConfig(dim=12, router_reads="vectors", vocab_size=61))
    with pytest.raises(ValueError, match="the backbone's vectors have width 16, but the head was made for dim=12"):
        SparseEncoder(modules=[*late.children(), CitadelPooling(narrow)], device="cpu")
    with pytest.raises(ValueError, match="router_reads='states'.*token vectors alone do not tell the keys"):
        CitadelPooling(fitted).route([torch.ones(2, 32)])
    with pytest.raises(ValueError, match="no text is there to be routed"):
        CitadelPooling(narrow).route([])
    twice = SentenceTransformer(modules=[Transformer(str(backbone)), Pooling(32, "max")], device="cpu")
    with pytest.raises(ValueError, match="Transformer . Pooling with pooling 'max'"):
        CitadelModel.from_modules(twice)


def test_a_text_without_words_has_no_entry_and_a_vector_of_its_own():
    model = head()
    with torch.no_grad():
        found = model(**DOCUMENT)
    assert not found.mask[2].any() and not found.sentence_embedding[2].any()  # a special token alone
    assert np.isfinite(found.dense[2].numpy()).all() and found.dense[2].any()


def test_a_late_interaction_model_is_opened_as_one(backbone, tmp_path):
    late_model(backbone).save_pretrained(str(tmp_path / "late"))
    encoder_of(backbone).save_pretrained(str(tmp_path / "plain"))
    for source, late in ((tmp_path / "late", True), (tmp_path / "plain", False), (backbone, False)):
        config = CitadelModel.from_encoder(str(source), token_dim=8).config
        assert (config.router_reads == "vectors") == late == bool(config.trunk)
        assert config.dim == (16 if late else 32) and config.sentence_dim == (0 if late else 32)
