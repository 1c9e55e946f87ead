"""UnifieR against its formulas, in float64 and with loops, and what its two views may and may not do to each other."""

from __future__ import annotations

import copy
import importlib
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DOCUMENTS, QRELS, QUERIES, ROOT, run_python, write_beir
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from test_encode import write_lines
from torch.nn import functional as F
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
)

import polyrep
from polyrep import InputError
from polyrep.cli import main
from polyrep.data import RetrievalDataset
from polyrep.encoding import Embeddings
from polyrep.encoding.encode import encode
from polyrep.hub.cards import render_card
from polyrep.hub.example import one_folder
from polyrep.methods import (
    UnifierConfig,
    UnifierHead,
    UnifierHeadConfig,
    UnifierHeadObjective,
    UnifierModel,
    UnifierObjective,
    UnifierPooling,
)
from polyrep.methods.unifier import modeling_unifier, weight
from polyrep.methods.unifier.objective import document_frequency
from polyrep.methods.unifier.weight import choose_dense_weight
from polyrep.search import commands
from polyrep.training.arguments import RecipeArguments
from polyrep.training.datasets import dev_of
from polyrep.training.pairs import HeadData

TEXTS = list(DOCUMENTS.values())
SIZES: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "vocab_size": 11,
    "special_token_ids": [0, 1],
}


def stirred(model: Any, by: float = 0.3) -> Any:
    """A model with other weights than those at the start, where the branch changes nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * by)
    return model


def head(**config: Any) -> UnifierHead:
    torch.manual_seed(0)
    return stirred(UnifierHead(UnifierHeadConfig(**SIZES | config)).double()).eval()


@pytest.fixture
def read() -> dict[str, torch.Tensor]:
    """What a head reads of three texts of 6, 3 and 1 tokens; 0 and 1 are special ones."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([6, 3, 1])
    return {
        "token_states": torch.randn(3, 6, 8, dtype=torch.float64, generator=generator),
        "pooled": torch.randn(3, 8, dtype=torch.float64, generator=generator),
        "input_ids": torch.tensor([[0, 4, 5, 6, 9, 1], [0, 7, 1, 3, 3, 3], [0, 2, 2, 2, 2, 2]]),
        "attention_mask": (torch.arange(6) < lengths[:, None]).long(),
    }


def batch_of(model: SentenceTransformer, texts: list[str], task: str = "document") -> dict[str, torch.Tensor]:
    batch = model.preprocess(texts, task=task)
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


def encoder_of(folder: Path, pooling: str = "mean", unit: bool = True) -> SentenceTransformer:
    first = Transformer(str(folder))
    modules = [first, Pooling(first.get_embedding_dimension(), pooling), *([Normalize()] if unit else [])]
    return SentenceTransformer(modules=modules, device="cpu", similarity_fn_name="cosine" if unit else "dot")


# The formulas.


def norm(vector: torch.Tensor, layer: torch.nn.LayerNorm) -> torch.Tensor:
    centred = vector - vector.mean()
    return centred / math.sqrt(float((centred**2).mean()) + layer.eps) * layer.weight + layer.bias


def gelu(vector: torch.Tensor) -> torch.Tensor:
    return torch.tensor([0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in vector.tolist()], dtype=torch.float64)


def attended(layer: Any, states: list[torch.Tensor]) -> list[torch.Tensor]:
    """Attention of each token to all, head by head and token by token."""
    part, found = 8 // layer.heads, []
    maps = [[m.weight @ state + m.bias for state in states] for m in (layer.query, layer.key, layer.value)]
    for query in maps[0]:
        mixed = []
        for place in range(layer.heads):
            cut = slice(place * part, (place + 1) * part)
            scores = [math.exp(float(query[cut] @ key[cut]) / math.sqrt(part)) for key in maps[1]]
            mixed.append(sum(s * value[cut] for s, value in zip(scores, maps[2], strict=True)) / sum(scores))
        found.append(layer.output.weight @ torch.cat(mixed) + layer.output.bias)
    return found


def branch(model: UnifierHead, states: list[torch.Tensor], dense: torch.Tensor) -> list[torch.Tensor]:
    """What the layers of the branch make of a text's tokens, the dense vector among them."""
    if model.config.reads_global:
        states = [model.global_map.weight @ norm(dense, model.global_norm), *states]
    for layer in model.layers:
        if layer.norm_first:
            read = [norm(state, layer.attention_norm) for state in states]
            states = [state + out for state, out in zip(states, attended(layer, read), strict=True)]
            read = [norm(state, layer.norm) for state in states]
            inside = [layer.down.weight @ gelu(layer.up.weight @ x + layer.up.bias) + layer.down.bias for x in read]
            states = [state + out for state, out in zip(states, inside, strict=True)]
        else:
            summed = [state + out for state, out in zip(states, attended(layer, states), strict=True)]
            states = [norm(state, layer.attention_norm) for state in summed]
            inside = [layer.down.weight @ gelu(layer.up.weight @ x + layer.up.bias) + layer.down.bias for x in states]
            states = [norm(state + out, layer.norm) for state, out in zip(states, inside, strict=True)]
    return states[1:] if model.config.reads_global else states


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"lexicon_init": "copy"},
        {"global_token": "none"},
        {"global_token": "attached", "normalize": True},
        {"lexicon_layers": 0},
        {"lexicon_layers": 1, "mlm_head": True, "split_layer": -1},
        {"projection": True},
        {"own_words": False},
    ],
    ids=str,
)
def test_the_lexicon_view_follows_the_formula(read, config):
    model = head(**config)
    with torch.no_grad():
        output = model(**read)
        for text in range(3):
            dense = read["pooled"][text]
            dense = model.map.weight @ dense if model.config.projection else dense
            dense = dense / math.sqrt(float(dense @ dense)) if model.config.normalize else dense
            torch.testing.assert_close(output.dense[text], dense)
            length = int(read["attention_mask"][text].sum())
            states = branch(model, list(read["token_states"][text, :length]), dense)
            if model.config.mlm_head:
                mapped = [gelu(model.transform.weight @ s + model.transform.bias) for s in states]
                states = [norm(state, model.transform_norm) for state in mapped]
            for word in range(11):
                most = 0.0
                for state, token in zip(states, read["input_ids"][text].tolist(), strict=False):
                    if token not in (0, 1):
                        score = float(model.decoder.weight[word] @ state + model.decoder.bias[word])
                        most = max(most, score)
                        if model.config.own_words and token == word:
                            more = math.expm1(float(model.own.weight[word])) + float(model.own_bias)
                            most = max(most, float(model.decoder.weight[word] @ state) + more)
                times = read["input_ids"][text, :length].tolist().count(word) if word not in (0, 1) else 0
                more = 1.9 * times / (0.9 + times) if model.config.own_words and times else 1.0
                assert output.lexicon[text, word].item() == pytest.approx(more * math.log(1 + most), abs=1e-9)
    assert (output.lexicon[:2] > 0).any() and not output.lexicon[2].any()  # a special token alone has no word


@pytest.mark.parametrize("scores", [1, 200, 2**21])
def test_gradients_through_the_largest_scores_are_those_of_the_whole_table(monkeypatch, scores):
    monkeypatch.setattr(modeling_unifier, "CACHED_SCORES", scores)
    monkeypatch.setattr(modeling_unifier, "PAIR_BLOCK", 4)
    generator = torch.Generator().manual_seed(2)
    parts = [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((2, 5, 4), (70, 4), (70,))]
    counted = torch.tensor([[True, True, False, True, True], [True, False, False, False, False]])
    found, expected = ([part.clone().requires_grad_() for part in parts] for _ in range(2))
    ours = torch.log1p(F.relu(modeling_unifier._Most.apply(*found, counted)))
    table = F.linear(*expected).masked_fill(~counted[..., None], -math.inf)
    theirs = torch.log1p(F.relu(table.amax(1)))
    torch.testing.assert_close(ours, theirs)
    slopes = torch.randn(2, 70, dtype=torch.float64, generator=generator)
    for made in (ours, theirs):
        (made * slopes).sum().backward()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("scores", [1, 2**21])
def test_a_processor_finds_the_largest_scores_that_other_devices_find(monkeypatch, scores):
    monkeypatch.setattr(modeling_unifier, "WORD_BLOCK", 2)
    monkeypatch.setattr(modeling_unifier, "CACHED_SCORES", scores)
    generator = torch.Generator().manual_seed(2)
    parts = [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((3, 5, 4), (70, 4), (70,))]
    counted = torch.tensor([[True, False, True, True, False], [False] * 5, [False, False, True, False, False]])
    values, places = modeling_unifier._most(*parts, counted)
    alone, nowhere = modeling_unifier._most(*parts, counted, placed=False)
    assert nowhere is None and torch.equal(alone, values)
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)  # which takes the other way
    expected, others = modeling_unifier._most(*parts, counted)
    torch.testing.assert_close(values, expected)
    assert torch.equal(places, others) and torch.equal(places[2], torch.full((70,), 2))
    assert (values[1] == -math.inf).all()


def test_the_top_words_of_a_side_are_kept(read):
    model, whole = head(query_top_k=2, document_top_k=5), head()
    with torch.no_grad():
        every = whole(**read).lexicon
        for task, kept in (("query", 2), ("document", 5), (None, 5)):
            found = model(**read, task=task).lexicon
            for text in range(3):
                expected = torch.zeros(11, dtype=torch.float64)
                for word in every[text].argsort(descending=True, stable=True)[:kept]:
                    expected[word] = every[text, word]
                torch.testing.assert_close(found[text], expected)
            assert torch.equal(model(**read, task=task, prune=False).lexicon, every)


def test_the_gate_weighs_the_views_of_queries_alone(read):
    model = head(gate="query")
    with torch.no_grad():
        query, document = model(**read, task="query"), model(**read, task="document")
        for text in range(3):
            inner = float(model.gate.weight[0] @ query.dense[text] + model.gate.bias[0])
            assert query.gate[text].item() == pytest.approx(2 / (1 + math.exp(-inner)))
        assert document.gate is None and torch.equal(query.dense, document.dense)
        weighed = modeling_unifier.weighed(query)
        torch.testing.assert_close(weighed["dense"], query.dense * query.gate[:, None])
        torch.testing.assert_close(weighed["lexicon"], query.lexicon * (2 - query.gate[:, None]))
        assert torch.equal(modeling_unifier.weighed(document)["lexicon"], document.lexicon)
        assert model(**read, task="query", views=("dense",)).gate is None  # of one view it would change no ranking
    fresh = UnifierHead(UnifierHeadConfig(**SIZES, gate="query")).double()
    assert fresh(**read, task="query").gate.tolist() == [1, 1, 1]


# What is there before training.


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("unit", [True, False])
def test_before_training_the_dense_view_is_the_backbones_to_the_bit(backbone, pooling, unit):
    plain = encoder_of(backbone, pooling, unit)
    model = UnifierModel.from_modules(plain, projection=True).eval()
    for task in ("query", "document"):
        batch = batch_of(plain, TEXTS, task)
        with torch.no_grad():
            expected = plain.eval()(dict(batch))["sentence_embedding"]
            for views in (("dense",), ("dense", "lexicon")):
                assert torch.equal(model(**batch, task=task, views=views).dense, expected)
    assert model.config.similarity_fn_name == ("cosine" if unit else "dot")


def test_a_backbone_that_is_compared_by_cosine_has_unit_vectors(backbone):
    plain = encoder_of(backbone, unit=False)
    plain.similarity_fn_name = "cosine"
    model = UnifierModel.from_modules(plain).eval()
    with torch.no_grad():
        batch = batch_of(plain, TEXTS)
        expected = F.normalize(plain.eval()(dict(batch))["sentence_embedding"], dim=-1)
        torch.testing.assert_close(model(**batch).dense, expected)
    assert model.config.similarity_fn_name == "cosine"


def test_before_training_the_branch_changes_nothing_whether_or_not_it_reads_the_dense_vector(backbone):
    views = []
    for config in ({"lexicon_layers": 0}, {}, {"global_token": "none"}, {"lexicon_layers": 5}):
        model = UnifierModel.from_encoder(str(backbone), **config).eval()
        with torch.no_grad():
            views.append(model(**batch_of(encoder_of(backbone), TEXTS)).lexicon)
    for other in views[1:]:
        torch.testing.assert_close(other, views[0])


def test_copied_layers_are_the_last_ones_of_a_bert(backbone):
    plain = encoder_of(backbone)
    model = UnifierHead.from_backbone(plain, lexicon_init="copy", lexicon_layers=2, global_token="none")
    batch = batch_of(plain, TEXTS)
    with torch.no_grad():
        output = plain[0].model.eval()(**batch, output_hidden_states=True)
        states = output.hidden_states[0]
        for layer in model.layers:
            states = layer(states, batch["attention_mask"].bool())
    there = batch["attention_mask"].bool()
    torch.testing.assert_close(states[there], output.last_hidden_state[there], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("active", [1, 7, 30])
def test_the_bias_leaves_as_many_words_as_are_asked_for(backbone, active):
    plain = encoder_of(backbone)
    model = UnifierModel.from_modules(plain, initial_active=active, split_layer=1, own_words=False).eval()
    batch = batch_of(plain, TEXTS)
    model.head.calibrate(lambda: model(**batch))
    with torch.no_grad():
        found = model(**batch).lexicon
    assert int((found > 0).sum()) == active * len(TEXTS)
    assert not found[:, model.config.special_token_ids].any()
    more = UnifierModel.from_modules(plain, initial_active=10**4).eval()  # than there are words
    assert math.isfinite(float(more.head.decoder.bias.detach().sum()))


def test_own_words_are_compared_with_the_mean_of_them(backbone):
    plain = encoder_of(backbone)
    model = UnifierModel.from_modules(plain, lexicon_layers=0, split_layer=1).eval()
    batch = batch_of(plain, TEXTS)
    model.head.calibrate(lambda: model(**batch))
    with torch.no_grad():
        states = plain[0].model.eval()(**batch, output_hidden_states=True).hidden_states[1].double()
        scores = [
            float(model.head.decoder.weight[int((model.head.terms == word).nonzero())].double() @ state)
            for text, ids in zip(states, batch["input_ids"].tolist(), strict=True)
            for state, word in zip(text, ids, strict=True)
            if word not in model.config.special_token_ids
        ]
    assert float(model.head.own_bias) == pytest.approx(-float(np.mean(scores)), rel=1e-5)


def test_own_words_start_with_the_root_of_their_inverse_document_frequency():
    """Counted in cached token states, and for a word of no other score the weight itself."""
    texts = [[2, 3, 3], [3, 4], [], [3, 2]]
    indices = np.array([word for text in texts for word in text], np.int32)
    offsets = np.cumsum([0, *map(len, texts)])
    states = Embeddings("states", np.zeros((len(indices), 2, 8), np.float16), offsets, indices, 8, 0.0, Path())
    frequency = document_frequency(states, 11)
    assert frequency.tolist() == [sum(word in text for text in texts) for word in range(11)]
    model = UnifierHead(UnifierHeadConfig(**SIZES, lexicon_layers=0)).double().eval()
    model.restrict(torch.tensor([2, 3, 9]))
    model.weigh_own(torch.from_numpy(frequency), len(texts))
    with torch.no_grad():
        model.decoder.weight.zero_()
        model.decoder.bias.zero_()
        ids = torch.tensor([[3, 4, 9, 0]])
        found = model(torch.zeros(1, 4, 8).double(), torch.zeros(1, 8).double(), ids).lexicon[0]
    for word in range(11):
        of = math.sqrt(math.log(1 + (4 - int(frequency[word]) + 0.5) / (int(frequency[word]) + 0.5)))
        assert found[word].item() == pytest.approx(of if word in (3, 9) else 0)  # 4 is no word of the head any more


def tiny(kind: Any, config: Any, folder: Path, backbone: Path) -> Path:
    torch.manual_seed(0)
    stirred(kind(config), 0.1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(folder)
    return folder


def masked(name: str, folder: Path, backbone: Path) -> Path:
    """A random masked language model of some kind, with the small tokenizer."""
    words = len(AutoTokenizer.from_pretrained(backbone))
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    common: dict[str, Any] = {"vocab_size": words, "pad_token_id": 0}
    config: Any
    if name == "distilbert":
        config = DistilBertConfig(**common, dim=32, n_layers=2, n_heads=4, hidden_dim=48)
        return tiny(DistilBertForMaskedLM, config, folder, backbone)
    kind, config = {"bert": (BertForMaskedLM, BertConfig), "modernbert": (ModernBertForMaskedLM, ModernBertConfig)}[
        name
    ]
    return tiny(kind, config(**common, **shape), folder, backbone)


@pytest.mark.parametrize("name", ["bert", "modernbert", "distilbert"])
def test_a_masked_language_models_own_scores_are_the_words(name, backbone, tmp_path):
    plain = encoder_of(masked(name, tmp_path / name, backbone))
    model = UnifierModel.from_modules(plain, lexicon_layers=0, own_words=False).eval()
    assert model.config.mlm_head and model.config.split_layer == -1
    language = {"bert": BertForMaskedLM, "modernbert": ModernBertForMaskedLM, "distilbert": DistilBertForMaskedLM}[
        name
    ]
    batch = batch_of(plain, TEXTS)
    batch.pop("token_type_ids", None)
    shift: set[float] = set()
    with torch.no_grad():
        logits = language.from_pretrained(tmp_path / name).eval()(**batch).logits
        model.head.calibrate(lambda: model(**batch))
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        model.head._seen = seen
        model(**batch)
    for text, ids in enumerate(batch["input_ids"].tolist()):
        counted = [t for t, i in enumerate(ids) if i not in model.config.special_token_ids]
        for column, word in enumerate(model.head.terms.tolist()):
            expected = max(float(logits[text, token, word]) for token in counted)
            shift.add(round(expected - float(seen[0][0][text, column]), 3))
    assert max(shift) - min(shift) <= 0.002  # but for the bias that all words share


def test_an_encoder_without_a_language_model_scores_words_by_their_embeddings(backbone, tmp_path):
    plain = encoder_of(backbone)
    assert not UnifierHead.from_backbone(plain).config.mlm_head
    model = UnifierModel.from_modules(plain, lexicon_layers=0, split_layer=1, own_words=False).eval()
    words = plain[0].model.get_input_embeddings().weight
    assert torch.equal(model.head.decoder.weight, words[model.head.terms])
    assert torch.equal(model.head.terms, torch.tensor([i for i in range(len(words)) if i >= 5]))  # [PAD] to [MASK]
    of_masked = encoder_of(masked("bert", tmp_path / "bert", backbone))
    told = UnifierHead.from_backbone(of_masked, mlm_head=False)
    assert not told.config.mlm_head and told.config.split_layer == -3


# What the views may do to each other.


def gradients(model: UnifierModel, view: str, texts: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest gradient of each layer of the encoder by a view's vectors."""
    model.zero_grad()
    model(**texts)[view].square().sum().backward()
    layers = model.encoder.encoder.layer
    return {
        str(number): max(float(p.grad.abs().max()) if p.grad is not None else 0.0 for p in layer.parameters())
        for number, layer in enumerate(layers)
    }


@pytest.mark.parametrize("global_token", ["detached", "attached", "none"])
def test_words_pull_at_the_layers_of_the_dense_view_only_where_its_vector_is_attached(backbone, global_token):
    plain = encoder_of(backbone)
    model = UnifierModel.from_modules(plain, split_layer=1, global_token=global_token).eval()
    stirred(model.head, 0.2)  # the branch reads nothing at first
    found = gradients(model, "lexicon", batch_of(plain, TEXTS))
    assert found["0"] > 0  # a layer below the split, which both views share
    assert (found["1"] > 0) == (global_token == "attached")
    assert all(value > 0 for value in gradients(model, "dense", batch_of(plain, TEXTS)).values())


def test_the_gate_pulls_at_nothing_but_itself(backbone):
    plain = encoder_of(backbone)
    model = stirred(UnifierModel.from_modules(plain, gate="query"), 0.1).eval()
    model(**batch_of(plain, TEXTS), task="query").gate.sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {"head.gate.weight", "head.gate.bias"}


# The objective.


def sides(queries: int = 3, documents: int = 7, gated: bool = False) -> tuple[Any, Any, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    made = [
        {
            "dense": F.normalize(torch.randn(rows, 4, generator=generator), dim=-1),
            "lexicon": torch.rand(rows, 9, generator=generator) * (torch.rand(rows, 9, generator=generator) > 0.4),
        }
        for rows in (queries, documents)
    ]
    if gated:
        made[0]["gate"] = torch.rand(queries, generator=generator) * 2
    return made[0], made[1], torch.tensor([2, 0, 5])[:queries]


def objective(**settings: Any) -> UnifierHeadObjective:
    config = {name: settings.pop(name) for name in ("gate", "normalize") if name in settings}
    return UnifierHeadObjective(UnifierHead(UnifierHeadConfig(**SIZES | config)), **settings)


@pytest.mark.parametrize("kl", ["forward", "reverse", "none"])
@pytest.mark.parametrize("judged", [False, True])
def test_the_loss_follows_its_formula(kl, judged):
    queries, documents, own = sides(gated=True)
    known = torch.zeros(3, 7, dtype=torch.bool)
    known[0, [2, 4]] = known[2, 5] = True
    settings = {"tau": 0.1, "lexicon_tau": 0.5, "dense_loss": 0.7, "lexicon_loss": 1.3, "kl_weight": 0.4}
    settings["sum_loss"] = 0.6
    parts = objective(kl=kl, flops_weight=0.01, **settings).losses(queries, documents, own, known if judged else None)
    expected = dict.fromkeys(("dense", "lexicon", "both", "kl", "sum"), 0.0)
    for row in range(3):
        right = int(own[row])
        left = [d for d in range(7) if not judged or d == right or not known[row, d]]
        scores = {
            view: [float(queries[view][row] @ documents[view][d]) / tau for d in left]
            for view, tau in (("dense", 0.1), ("lexicon", 0.5))
        }
        gate = float(queries["gate"][row])
        pairs = [*zip(scores["dense"], scores["lexicon"], strict=True)]
        scores["both"] = [dense + lexicon for dense, lexicon in pairs]
        scores["sum"] = [gate * dense + (2 - gate) * lexicon for dense, lexicon in pairs]
        shares = {}
        for view, values in scores.items():
            total = sum(math.exp(value) for value in values)
            shares[view] = [math.exp(value) / total for value in values]
            expected[view] -= math.log(shares[view][left.index(right)]) / 3
        p, q = (shares[view] for view in (("dense", "lexicon") if kl != "reverse" else ("lexicon", "dense")))
        expected["kl"] += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 3
    cost = sum(
        (sum(float(side["lexicon"][row, word]) for row in range(len(side["lexicon"]))) / len(side["lexicon"])) ** 2
        for side in (queries, documents)
        for word in range(9)
    )
    weights = {"dense": 0.7, "lexicon": 1.3, "both": 0.6, "kl": 0.4, "sum": 1.0}
    assert parts.pop("flops").item() == pytest.approx(0.01 * cost, rel=1e-5)
    assert ("kl" in parts) == (kl != "none")
    for name, value in parts.items():
        assert value.item() == pytest.approx(weights[name] * expected[name], rel=1e-4), name


@pytest.mark.parametrize("sample", [0, 1, 400])
def test_a_step_scores_the_words_of_its_texts_and_some_others(sample):
    made = objective(word_sample=sample)
    head, generator = stirred(made.head.train()), torch.Generator().manual_seed(3)
    features = {
        "token_states": torch.randn(2, 6, 2, 8, generator=generator),
        "input_ids": torch.tensor([[0, 4, 5, 6, 9, 1], [0, 7, 1, 0, 0, 0]]),
        "attention_mask": (torch.arange(6) < torch.tensor([[6], [3]])).long(),
    }
    with made.some_words([features]):
        scored = head.terms[head.step_words].tolist()
        few = made.encode(features, "document")["lexicon"]
    assert head.step_words is None
    assert {0, 1, 4, 5, 6, 7, 9} <= {*scored} and 7 <= len(scored) <= 7 + min(sample, 4)
    assert sample < 400 or len(scored) == 11  # so many draws miss none of them
    whole = made.encode(features, "document")["lexicon"]
    torch.testing.assert_close(few[:, scored], whole[:, scored])
    left_out = [word for word in range(11) if word not in scored]
    assert (whole > 0).any() and not few[:, left_out].any()
    few.sum().backward()
    assert head.decoder.weight.grad is not None and not head.decoder.weight.grad[left_out].any()


def test_the_loss_of_the_sum_trains_both_views():
    queries, documents, own = sides()
    learned = [*queries.values(), *documents.values()]
    for tensor in learned:
        tensor.requires_grad_()
    objective(sum_loss=1.0, kl="none").losses(queries, documents, own)["both"].backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in learned)


def test_the_map_of_a_frozen_encoder_learns_alone_first(backbone, tmp_path):
    """From its pooled vectors, by the temperature of the dense view, until it ranks the pairs better than before."""
    plain = encoder_of(backbone)
    dataset = RetrievalDataset("tiny", "train", DOCUMENTS, QUERIES, QRELS)
    data = HeadData(kind="states", negatives=1, labels=True, depth=3)
    data.add(plain, dataset, layers=(1, -1), token="mean", cache_dir=tmp_path)
    parts, pairs = list(data.parts), data.pairs.copy()

    def fitted(steps: int) -> UnifierHead:
        torch.manual_seed(0)
        head = UnifierHead.from_backbone(plain, projection=True, split_layer=1)
        UnifierHeadObjective(head, kl="none", tau=0.5, dense_steps=steps).prepare(data)
        return head.eval()

    def loss(head: UnifierHead) -> float:
        asked, found = (
            torch.from_numpy(side.single(task).values)
            for side, task in ((parts[0].queries, "query"), (parts[0].documents, "document"))
        )
        with torch.no_grad():
            queries, documents = (head(None, vectors, None, views=("dense",)).dense for vectors in (asked, found))
        scores = (queries @ documents.T)[pairs[:, 1]] / 0.5
        return F.cross_entropy(scores, torch.from_numpy(pairs[:, 2])).item()

    before, after = fitted(0), fitted(60)
    assert torch.equal(before.map.weight, torch.eye(len(before.map.weight)))
    assert loss(after) < loss(before) - 0.1
    for name, weight_ in before.state_dict().items():
        assert name == "map.weight" or torch.equal(weight_, after.state_dict()[name]), name
    assert data.parts == parts and np.array_equal(data.pairs, pairs) and data.kind == "states" and data.negatives == 1


def test_the_sum_trains_the_gate_and_not_the_views():
    queries, documents, own = sides(gated=True)
    learned = [*queries.values(), *documents.values()]
    for tensor in learned:
        tensor.requires_grad_()
    objective().losses(queries, documents, own)["sum"].backward()
    assert queries["gate"].grad.abs().max() > 0
    assert all(tensor.grad is None or not tensor.grad.any() for tensor in learned if tensor is not queries["gate"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tau": 0.0}, "--tau 0.0: scores are divided by it"),
        ({"lexicon_tau": float("nan")}, "--lexicon_tau nan"),
        ({"flops_weight": -1.0}, "--flops_weight -1.0"),
        ({"kl": "both"}, "--kl 'both': unknown. Use one of forward, reverse, none"),
        ({"rows": "few"}, "--rows 'few'.*occurring, all"),
        ({"word_sample": -1}, "--word_sample -1: below 0"),
        ({"sum_loss": math.inf}, "--sum_loss inf"),
        ({"dense_loss": 0.0, "kl": "none", "sum_loss": 1.0}, "--sum_loss 1: sums two views.*Leave it out"),
        ({"dense_steps": -1}, "--dense_steps -1: cannot be taken"),
        ({"dense_steps": 5}, "--dense_steps 5: are of a map.*Add --projection true"),
        ({"dense_loss": 0.0, "lexicon_loss": 0.0}, "no view would learn"),
        ({"dense_loss": 0.0}, "--dense_loss 0 with --kl forward.*Add --kl none"),
        ({"lexicon_loss": 0.0, "kl": "none", "gate": "query"}, "--gate query.*Use --gate none"),
        ({"lexicon_loss": 0.0, "kl": "none"}, "--lexicon_loss 0: .*Add --projection true"),
    ],
    ids=str,
)
def test_settings_that_teach_nothing_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        objective(**settings)


def test_a_batch_that_has_lost_its_words_is_refused():
    queries, documents, own = sides()
    documents["lexicon"] = torch.zeros_like(documents["lexicon"])
    with pytest.raises(InputError, match="every document of a step has lost its words.*--flops_weight"):
        objective().losses(queries, documents, own)


def test_the_dense_view_alone_scores_no_word_and_nothing_but_its_loss_trains_it(backbone, tmp_path, monkeypatch):
    plain = encoder_of(backbone)
    whole, made = UnifierModel.from_modules(encoder_of(backbone)), tmp_path / "model"
    model = one_folder(whole, backbone, made, transformer=modeling_unifier.UnifierTransformer).eval()
    features = [batch_of(plain, TEXTS[:2], "query"), batch_of(plain, TEXTS[2:4])]

    def no_words(*args: Any) -> None:
        raise AssertionError("a word was scored")

    monkeypatch.setattr(UnifierHead, "_lexicon", no_words)
    alone = UnifierObjective(model, lexicon_loss=0.0, kl="none", tau=0.5)
    parts = alone(features)
    dense = [plain(dict(side))["sentence_embedding"] for side in features]
    expected = F.cross_entropy(dense[0] @ dense[1].T / 0.5, torch.arange(2))
    assert parts.keys() == {"dense"} and parts["dense"].item() == pytest.approx(expected.item(), rel=1e-5)
    parts["dense"].backward()
    assert all(parameter.grad is None for parameter in model[0].model.head.parameters())


@pytest.mark.parametrize("pipeline", [False, True])
def test_what_is_new_learns_faster_than_the_encoder(pipeline, backbone, tmp_path):
    if pipeline:
        head = UnifierHead.from_backbone(encoder_of(backbone))
        model = SentenceTransformer(modules=[encoder_of(backbone)[0], UnifierPooling(head)], device="cpu")
    else:
        whole = UnifierModel.from_modules(encoder_of(backbone))
        model = one_folder(whole, backbone, tmp_path / "model", transformer=modeling_unifier.UnifierTransformer)
    loss = UnifierObjective(model)
    (pattern,), (factor,) = zip(*loss.learning_rates.items(), strict=True)
    faster = {id(parameter) for name, parameter in loss.named_parameters() if re.search(pattern, name)}
    assert factor > 1 and faster == {id(parameter) for parameter in loss.head.parameters()}


def test_words_that_occur_are_trained_and_kept_in_the_end(backbone):
    plain = encoder_of(backbone)
    model = UnifierModel.from_modules(plain, initial_active=5)
    whole = SentenceTransformer(modules=[plain[0]], device="cpu")
    whole[0].model = model
    whole[0].__class__ = modeling_unifier.UnifierTransformer
    pairs = {"tiny": Dataset.from_dict({"query": ["port"], "positive": ["file port"]})}
    loss = UnifierObjective(whole)
    loss.initialize(pairs)
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    expected = sorted(tokenizer.convert_tokens_to_ids(["port", "file"]))
    assert model.head.terms[model.head.learned].tolist() == expected
    model.train()
    made = model(**batch_of(plain, ["file list port"]), prune=False).lexicon
    assert set(made[0].nonzero()[:, 0].tolist()) <= set(expected)
    loss.complete(pairs)
    assert model.head.terms.tolist() == expected and model.config.words == len(model.head.decoder.weight) == 2
    with pytest.raises(InputError, match="no training text holds a word"):
        loss.initialize({"none": Dataset.from_dict({"query": [""], "positive": [""]})})


# Doors.

FRESH = """
import importlib.abc, json, sys
import torch

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("polyrep", "modeling", "toy"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from sentence_transformers import SentenceTransformer, SparseEncoder
from transformers import AutoModel, AutoTokenizer

dense, lexicon, texts = json.loads(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(dense, trust_remote_code=True)
tokens = tokenizer(texts, padding=True, return_tensors="pt")
said = {}
for name, folder in (("dense", dense), ("lexicon", lexicon)):
    with torch.no_grad():
        model = AutoModel.from_pretrained(folder, trust_remote_code=True)
        output = model(**tokens, task="query")
        both = model.encode_views(**tokens, task="query")
    said[f"auto {name}"] = {key: output[key].tolist() for key in ("dense", "lexicon", "gate", "sentence_embedding")}
    said[f"views {name}"] = [list(model.views()), {key: value.tolist() for key, value in both.items()}]
vectors = SentenceTransformer(dense, trust_remote_code=True, device="cpu").encode_query(texts)
said["SentenceTransformer"] = vectors.tolist()
words = SparseEncoder(lexicon, trust_remote_code=True, device="cpu").encode_query(texts)
said["SparseEncoder"] = words.to_dense().tolist()
print("REPORT" + json.dumps(said))
"""


def test_both_folders_open_without_polyrep_and_are_the_same_weights(backbone, tmp_path):
    whole = stirred(UnifierModel.from_encoder(str(backbone), gate="query", query_top_k=9), 0.05).eval()
    model = one_folder(whole, backbone, tmp_path / "made", transformer=modeling_unifier.UnifierTransformer)
    model.prompts = {"query": "", "document": ""}
    folders = [polyrep.save(model, tmp_path / view, view=view) for view in ("dense", "lexicon")]
    assert model[0].model.config.view == "dense"
    texts = list(QUERIES.values())
    batch = batch_of(model, texts, "query")
    with torch.no_grad():
        expected = whole(**batch, task="query")
    ran = run_python("-c", FRESH, json.dumps([*map(str, folders), texts]), cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    said = json.loads(ran.stdout.partition("REPORT")[2])
    for view in ("dense", "lexicon"):
        for name in ("dense", "lexicon", "gate"):
            np.testing.assert_allclose(said[f"auto {view}"][name], expected[name], atol=1e-5)
        np.testing.assert_allclose(said[f"auto {view}"]["sentence_embedding"], expected[view], atol=1e-5)
        names, both = said[f"views {view}"]
        assert names == ["lexicon", "dense"]
        for name, vectors in modeling_unifier.weighed(expected).items():
            np.testing.assert_allclose(both[name], vectors, atol=1e-5)
    np.testing.assert_allclose(said["SentenceTransformer"], expected.dense, atol=1e-5)
    np.testing.assert_allclose(said["SparseEncoder"], expected.lexicon, atol=1e-5)


@pytest.mark.parametrize("gate", ["none", "query"])
def test_one_pass_is_encoded_indexed_and_searched_by_the_weight_of_the_config(gate, backbone, tmp_path):
    how: dict[str, Any] = {"gate": gate, "normalize": True, "dense_weight": 3.5}
    whole = stirred(UnifierModel.from_encoder(str(backbone), **how), 0.05).eval()
    model = one_folder(whole, backbone, tmp_path / "made", transformer=modeling_unifier.UnifierTransformer)
    folder = polyrep.save(model, tmp_path / "model")
    corpus = write_lines(tmp_path / "corpus.jsonl", DOCUMENTS)
    flags = ["--views", "dense,lexicon", "--precision", "float32", "--model_dtype", "float32"]
    encode([str(folder), "--input", str(corpus), "--output", str(tmp_path / "both"), *flags])
    uri = f"qdrant://{tmp_path}/index"
    commands.index([*(str(tmp_path / "both" / view) for view in ("lexicon", "dense")), "--uri", uri])
    queries = list(QUERIES.values())
    found = commands.search([*queries, "--uri", uri, "--model", str(folder), "--model_dtype", "float32", "--k", "3"])
    with torch.no_grad():
        asked = whole.encode_views(**batch_of(model, queries, "query"), task="query")
        there = whole.encode_views(**batch_of(model, TEXTS), task="document")
    expected = asked["lexicon"] @ there["lexicon"].T + 3.5 * asked["dense"] @ there["dense"].T
    for row, hits in zip(expected, found, strict=True):
        scores, places = row.topk(3)
        assert [hit.id for hit in hits] == [list(DOCUMENTS)[place] for place in places]
        np.testing.assert_allclose([hit.score for hit in hits], scores, rtol=1e-4)


def test_the_weight_of_the_dense_view_is_the_best_on_dev(backbone, tmp_path, monkeypatch):
    whole = stirred(UnifierModel.from_encoder(str(backbone), gate="query", normalize=True), 0.3).eval()
    model = one_folder(whole, backbone, tmp_path / "made", transformer=modeling_unifier.UnifierTransformer)
    config, ids = model[0].model.config, list(DOCUMENTS)
    judged = {q: {ids[(3 * number + 1) % len(ids)]: 1} for number, q in enumerate(QUERIES)}
    dev = RetrievalDataset("tiny", "dev", DOCUMENTS, QUERIES, judged)
    choose_dense_weight(model, [])
    assert config.dense_weight is None
    choose_dense_weight(model, [dev, dev])
    with torch.no_grad():
        asked = whole.encode_views(**batch_of(model, list(QUERIES.values()), "query"), task="query")
        there = whole.encode_views(**batch_of(model, TEXTS), task="document")
    sums = [asked[view] @ there[view].T for view in ("lexicon", "dense")]

    def worth(weight: float) -> float:
        order = (sums[0] + weight * sums[1]).argsort(dim=1, descending=True)
        ranks = [order[row].tolist().index(ids.index(next(iter(judged[q])))) for row, q in enumerate(QUERIES)]
        return float(np.mean([1 / math.log2(2 + rank) for rank in ranks]))

    unit = float(sums[0].std(1).mean() / sums[1].std(1).mean())
    others = [worth(unit * 2.0**power) for power in range(-5, 6)]
    assert worth(config.dense_weight) >= max(others) - 1e-9 and max(others) > min(others)
    config.dense_weight = 0.25
    choose_dense_weight(model, [dev])
    assert config.dense_weight == 0.25, "what was given stays"
    config.dense_weight = None
    monkeypatch.setattr(weight, "DOCUMENTS", 2)
    monkeypatch.setattr(weight, "QUERIES", 2)
    encoded, whole_encode = [], weight.encode_views

    def counted(model: Any, texts: list[str], *args: Any, **options: Any) -> Any:
        encoded.append(len(texts))
        return whole_encode(model, texts, *args, **options)

    monkeypatch.setattr(weight, "encode_views", counted)
    choose_dense_weight(model, [dev])
    assert config.dense_weight is not None
    assert encoded == [2, 2], "two queries, and the two documents that they judge"


def test_development_queries_that_cannot_be_used_are_refused_before_training(backbone, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = write_beir(tmp_path / "tiny", "train")
    assert dev_of(RecipeArguments(datasets=[str(data)])) == []
    shutil.copy(data / "qrels" / "train.tsv", data / "qrels" / "dev.tsv")
    (dev,) = dev_of(RecipeArguments(datasets=[str(data)]))
    assert dev.queries == QUERIES
    assert dev_of(RecipeArguments(datasets=[str(data)], split="dev")) == [], "the run learns from these"
    with (data / "qrels" / "dev.tsv").open("a") as file:
        file.write("q1\tnowhere\t1\n")
    flags = ["--backbone", str(backbone), "--datasets", str(data), "--output_dir", "out", "--initial_active", "8"]
    assert main(["train", "unifier-minilm-frozen", *flags]) == 2
    assert "nowhere" in capsys.readouterr().err and not (tmp_path / "out" / "init").exists()


def test_the_head_attaches_behind_any_transformer_and_shows_either_view(backbone, tmp_path):
    plain = encoder_of(backbone)
    made = stirred(UnifierHead.from_backbone(plain, split_layer=1), 0.1)
    with torch.no_grad():
        expected = UnifierModel.from_modules(plain, made).eval()(**batch_of(plain, TEXTS))
    model = SentenceTransformer(modules=[Transformer(str(backbone)), UnifierPooling(made)], device="cpu")
    np.testing.assert_allclose(model.encode_document(TEXTS), expected.dense, atol=1e-6)
    both = model({**model.preprocess(TEXTS), "views": tuple(model[1].views())}, task="document")
    torch.testing.assert_close(both["lexicon"], expected.lexicon)
    folder = polyrep.save(model, tmp_path / "words", view="lexicon")
    again = polyrep.load(folder)
    assert type(again) is SparseEncoder and made.config.view == "dense"
    torch.testing.assert_close(again.encode_document(TEXTS).to_dense(), expected.lexicon, atol=1e-5, rtol=1e-5)


def test_a_view_that_is_not_there_is_refused(backbone, sentence_model, tmp_path):
    head_behind = UnifierPooling(UnifierHead.from_backbone(encoder_of(backbone)))
    model = SentenceTransformer(modules=[Transformer(str(backbone)), head_behind], device="cpu")
    with pytest.raises(InputError, match="view='sum': is no view of the model. Use dense or lexicon"):
        polyrep.save(model, tmp_path / "x", view="sum")
    for other in (sentence_model, head_behind.model):
        with pytest.raises(InputError, match="view='dense': .*several views of a text. Leave it out"):
            polyrep.save(other, tmp_path / "x", view="dense")
    with pytest.raises(ValueError, match="view='dense' in a SparseEncoder.*Open it as SentenceTransformer"):
        SparseEncoder(modules=list(model.children()), device="cpu")


# Bad input.


def test_backbones_that_do_not_fit_are_refused(backbone, tmp_path):
    words = len(AutoTokenizer.from_pretrained(backbone))
    albert = AlbertConfig(
        vocab_size=words, embedding_size=16, hidden_size=32, num_attention_heads=4, intermediate_size=48
    )
    narrow = tiny(AlbertModel, albert, tmp_path / "albert", backbone)
    with pytest.raises(ValueError, match="hidden_size=32 of AlbertModel.*width 16.*as wide as its states"):
        UnifierModel.from_encoder(str(narrow))
    with pytest.raises(ValueError, match=r"split_layer=3.*2 layers.*-3 to -1"):
        UnifierModel.from_encoder(str(backbone), split_layer=3)
    with pytest.raises(ValueError, match="mlm_head=True, but .* has none. Use mlm_head=False"):
        UnifierModel.from_encoder(str(backbone), mlm_head=True)
    with pytest.raises(ValueError, match="lexicon_init='copy' takes the last 3 layers.*Use lexicon_init='identity'"):
        UnifierModel.from_encoder(str(backbone), lexicon_init="copy", lexicon_layers=3)
    other = BertConfig.from_pretrained(backbone, hidden_act="relu")
    folder = tiny(BertModel, other, tmp_path / "relu", backbone)
    with pytest.raises(ValueError, match="lexicon_init='copy'"):
        UnifierModel.from_encoder(str(folder), lexicon_init="copy")
    masked_other = tiny(BertForMaskedLM, other, tmp_path / "masked", backbone)
    with pytest.raises(ValueError, match="BertForMaskedLM .*Use mlm_head=False"):
        UnifierModel.from_encoder(str(masked_other))


def test_states_that_are_not_finite_are_refused_by_their_text(read):
    model = head()
    for name in ("token_states", "pooled"):
        bad = copy.deepcopy(read)
        bad[name][1].view(-1)[3] = math.nan
        with pytest.raises(ValueError, match="text 1 of the batch are not finite.*float32"):
            model(**bad)


def test_a_head_behind_another_vocabulary_is_refused(backbone, tmp_path):
    config = BertConfig.from_pretrained(backbone, vocab_size=99)
    folder = tiny(BertModel, config, tmp_path / "more", backbone)
    made = UnifierPooling(UnifierHead.from_backbone(encoder_of(backbone)))
    with pytest.raises(ValueError, match="vocab_size=.*the encoder knows 99 tokens"):
        SentenceTransformer(modules=[Transformer(str(folder)), made], device="cpu")
    with pytest.raises(ValueError, match="vocab_size=.*the encoder knows 99 tokens"):
        UnifierModel.from_modules(encoder_of(folder), made.model)
    assert UnifierConfig(encoder_config=config).vocab_size == 99


def test_rows_of_the_embeddings_that_no_token_has_are_no_words(backbone, tmp_path):
    tokens = len(AutoTokenizer.from_pretrained(backbone))
    folder = tiny(BertModel, BertConfig.from_pretrained(backbone, vocab_size=tokens + 3), tmp_path / "wide", backbone)
    made = UnifierHead.from_backbone(encoder_of(folder), initial_active=10**4, view="lexicon")
    assert made.config.vocab_size == tokens + 3 and int(made.terms.max()) == tokens - 1
    model = SparseEncoder(modules=[Transformer(str(folder)), UnifierPooling(made)], device="cpu")
    found = model.encode_document(TEXTS[:1])
    assert found.shape[1] == model.get_embedding_dimension() == tokens + 3
    assert all(isinstance(word, str) for word, _ in model.decode(found[0]))


def test_a_language_model_whose_weights_lack_its_head_is_an_encoder_alone(backbone, tmp_path):
    folder = shutil.copytree(backbone, tmp_path / "alone")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    made = UnifierHead.from_backbone(encoder_of(folder))
    assert not made.config.mlm_head and made.config.split_layer == -3
    with pytest.raises(ValueError, match="mlm_head=True, but the weights of .* lack cls.*Use mlm_head=False"):
        UnifierHead.from_backbone(encoder_of(folder), mlm_head=True)


def test_the_card_says_that_words_were_left_out_only_where_some_were(backbone):
    made = UnifierHead.from_backbone(encoder_of(backbone), dense_weight=2.0)
    assert "have been left out" not in str(render_card(made, "unifier"))
    made.restrict(made.terms[:7].clone())
    assert "have been left out (7 are there)" in str(render_card(made, "unifier"))


@pytest.mark.parametrize("gate", ["none", "query"])
@pytest.mark.parametrize("lexicon_init", ["identity", "copy"])
def test_the_card_tells_how_this_model_began(lexicon_init, gate, backbone, tmp_path):
    plain = encoder_of(masked("bert", tmp_path / "bert", backbone))
    made = UnifierHead.from_backbone(plain, lexicon_init=lexicon_init, gate=gate)
    said = " ".join(str(render_card(made, "unifier")).split())
    assert ("started as the last ones of the encoder" in said) == (lexicon_init == "copy")
    assert ("change nothing at first" in said) == (lexicon_init == "identity")
    assert "start as the output layer of the masked language model" in said and "as the word embeddings" not in said
    assert ("gate in a picture" in said) == (gate == "query")


def test_an_opened_model_says_what_it_was_made_of(backbone, tmp_path):
    UnifierModel.from_encoder(str(backbone), dense_weight=0.3).save_pretrained(tmp_path / "model")
    config = AutoModel.from_pretrained(tmp_path / "model").config
    assert isinstance(config, UnifierConfig) and config.dense_weight == 0.3 and config.num_heads == 4
    assert (config.split_layer, config.num_hidden_layers, config.hidden_size) == (-3, 2, 32)


def test_the_benchmark_runs_whole_and_its_second_run_fits_nothing(backbone, tmp_path):
    pytest.importorskip("qdrant_edge")
    data = write_beir(tmp_path / "tiny", "train")
    for split in ("dev", "test"):
        shutil.copy(data / "qrels" / "train.tsv", data / "qrels" / f"{split}.tsv")
    command = [str(ROOT / "benchmarks" / "unifier_text.py"), "--datasets", str(data), "--backbone", str(backbone)]
    command += ["--cache_dir", str(tmp_path / "cache"), "--output", str(tmp_path / "out"), "--seeds", "0"]
    command += ["--max_length", "64"]
    command += ["--systems", "UnifieR", "dense only", "lexicon only", "gate", "BM25 negatives"]
    command += [
        "--flags",
        "--max_steps 2 --per_device_train_batch_size 2 --depth 3 --document_top_k 20 --query_top_k 10",
    ]
    first = run_python(*command)
    assert first.returncode == 0, first.stderr[-3000:]
    results = json.loads((tmp_path / "out" / "unifier-text.json").read_text(encoding="utf-8"))
    rows = {row["system"]: row["value"] for row in results["rows"] if row["metric"] == "nDCG@10"}
    views = {f"{system}, {view}" for system in ("UnifieR", "gate") for view in ("dense", "lexicon", "sum")}
    hybrids = {
        f"{one} + {other}, sum" for one in ("dense only", "all-MiniLM-L6-v2") for other in ("BM25", "Dense2Sparse")
    }
    assert views | hybrids | {"UnifieR, RRF", "UnifieR, sum of 200", "dense only + lexicon only, sum"} <= rows.keys()
    claims = {claim["claim"]: claim for claim in results["claims"]}
    gain = rows["UnifieR, sum"] - max(rows["UnifieR, dense"], rows["UnifieR, lexicon"])
    assert claims["unifier.uni_gain"]["value"] == pytest.approx(100 * gain)
    assert claims["unifier.engine_exact"]["value"] == 1.0
    assert 0.5 < claims["unifier.encode_flops_ratio"]["value"] < 1
    assert claims["unifier.candidates_200_loss"]["value"] == 0, "there are fewer documents"
    assert (tmp_path / "out" / "unifier-text.png").stat().st_size > 10_000
    second = run_python(*command)
    assert second.returncode == 0 and "train_runtime" in first.stdout and "train_runtime" not in second.stdout
    again = json.loads((tmp_path / "out" / "unifier-text.json").read_text(encoding="utf-8"))
    assert [again["rows"], again["claims"]] == [results["rows"], results["claims"]]


def test_the_fine_tuned_benchmark_trains_each_form_once(backbone, tmp_path):
    data, cache = write_beir(tmp_path / "tiny", "train"), tmp_path / "cache"
    for split in ("dev", "test"):
        shutil.copy(data / "qrels" / "train.tsv", data / "qrels" / f"{split}.tsv")
    command = [str(ROOT / "benchmarks" / "unifier_finetuned.py"), "--datasets", str(data), "--backbone", str(backbone)]
    command += ["--cache_dir", str(cache), "--output", str(tmp_path / "out"), "--max_steps", "2"]
    command += ["--train_length", "8", "--max_length", "16", "--seeds", "0", "1", "--learning_rates", "0.02"]
    command += ["--flags", "--per_device_train_batch_size 2 --negative_margin 0 --document_top_k 20 --query_top_k 10"]

    def run(*flags: str) -> int:
        """Trainings that a command makes."""
        done = run_python(*command, *flags)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.count("train_runtime")

    assert run("--fit_only", "dense only") == 2 and not (tmp_path / "out").exists()
    kept = sorted((cache / "finetuned").iterdir())
    dates = [path.stat().st_mtime_ns for path in kept]
    forms = ["--systems", "dense only", "lexicon only", "KL"]
    assert run(*forms) == 2 * 3, "UnifieR and the two others that were not there"
    assert [path.stat().st_mtime_ns for path in kept] == dates
    results = json.loads((tmp_path / "out" / "unifier-finetuned.json").read_text(encoding="utf-8"))
    rows = {row["system"]: row for row in results["rows"] if row["metric"] == "nDCG@10"}
    sums = {"UnifieR", "KL", "dense only + lexicon only", "dense only + BM25"}
    alone = {"BM25", "all-MiniLM-L6-v2", "dense only", "lexicon only", "UnifieR, dense", "UnifieR, lexicon"}
    assert {f"{name}, sum" for name in sums | {"all-MiniLM-L6-v2 + BM25"}} | alone <= rows.keys()
    assert all(rows[name]["seeds"] == 2 for name in ("UnifieR, sum", "dense only", "dense only + BM25, sum"))
    assert results["seeds"] == [0, 1] and results["settings_tried"] == 3
    claims = {claim["claim"].removeprefix("unifier.finetuned_"): claim for claim in results["claims"]}
    value = {name: row["value"] for name, row in rows.items()}
    for claim, difference, target in (
        ("uni_gain", value["UnifieR, sum"] - max(value["UnifieR, dense"], value["UnifieR, lexicon"]), 1.0),
        ("margin_over_two_models", value["UnifieR, sum"] - value["dense only + lexicon only, sum"], -0.3),
        ("margin_over_adapter_bm25", value["UnifieR, sum"] - value["dense only + BM25, sum"], 0.0),
        ("dense_cost", value["UnifieR, dense"] - value["dense only"], -0.3),
        ("kl_gain", value["KL, sum"] - value["UnifieR, sum"], None),
    ):
        assert claims[claim]["value"] == pytest.approx(100 * difference) and claims[claim]["target"] == target
    assert claims["uni_gain"]["met"] == (claims["uni_gain"]["value"] >= 1.0), "held to its value"
    assert claims["margin_over_adapter_bm25"]["met"] == (claims["margin_over_adapter_bm25"]["interval"][0] > 0)
    assert claims["flops"]["value"] == rows["UnifieR, lexicon"]["flops"]

    assert run(*forms) == 0, "nothing is missing"
    again = json.loads((tmp_path / "out" / "unifier-finetuned.json").read_text(encoding="utf-8"))
    assert [again["rows"], again["claims"]] == [results["rows"], results["claims"]]

    stock = tmp_path / "stock"
    BertForMaskedLM(AutoConfig.from_pretrained(backbone)).save_pretrained(stock)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(stock)
    assert run(*forms, "--splade", str(stock)) == 2
    beside = json.loads((tmp_path / "out" / "unifier-finetuned.json").read_text(encoding="utf-8"))
    found = {row["system"]: row for row in beside["rows"] if row["metric"] == "nDCG@10"}
    assert found.keys() - rows.keys() == {"SPLADE", "dense only + SPLADE, sum"}
    assert found["SPLADE"]["seeds"] == 2 and found["SPLADE"]["flops"] > 0 and beside["settings_tried"] == 4
    assert beside["claims"] == results["claims"] and str(stock) in beside["models"]


@pytest.mark.parametrize(
    ("flags", "refusal"),
    [
        (
            ["--systems", "dense only", "BM25 negatives"],
            "--systems 'BM25 negatives': unknown form. There are 'UnifieR'",
        ),
        (["--fit_only", "dense"], "--fit_only 'dense': unknown form. .*'dense only'"),
    ],
)
def test_the_fine_tuned_benchmark_refuses_before_it_trains(flags, refusal, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    finetuned = importlib.import_module("unifier_finetuned")
    monkeypatch.setattr("sys.argv", ["unifier_finetuned.py", *flags])
    monkeypatch.setattr(finetuned, "Study", None)
    with pytest.raises(InputError, match=refusal):
        finetuned.main()


def test_hybrids_of_the_benchmark_are_as_strong_as_they_can_be(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    study, text = importlib.import_module("unifier_study"), importlib.import_module("unifier_text")
    made: Any = SimpleNamespace(one=lambda bench, system, seed: system, hybrids=[study.TWO_MODELS, study.ADAPTER_BM25])
    bench: Any = SimpleNamespace(bm25="BM25", dense2sparse="words", raw="raw", adapted=lambda seed: "own")
    for name, parts in {
        study.TWO_MODELS: [study.WORDS, study.DENSE],
        study.RAW_BM25: ["raw", "BM25"],
        study.OWN_D2S: ["own", "words"],
        study.ADAPTER_BM25: [study.DENSE, "BM25"],
    }.items():
        assert study.Study.hybrid(made, bench, name, 0) == parts, "what finds candidates comes first"
    hybrids = [study.ADAPTER_BM25, study.ADAPTER_D2S, study.OWN_BM25, study.OWN_D2S, study.TWO_MODELS]
    rows = [study.SUM, f"{study.UNIFIER}, lexicon", f"{study.UNIFIER}, dense", study.DENSE, study.FEWER]
    values = dict.fromkeys([*rows, *(f"{name}, sum" for name in hybrids)], 0.5)
    for better in (study.ADAPTER_BM25, study.OWN_BM25):
        tests = {"one": {row: np.full(9, value) for row, value in (values | {f"{better}, sum": 0.6}).items()}}
        claims = {claim["claim"]: claim for claim in text.gains(made, tests)}
        claim = claims["unifier.margin_over_adapter_bm25"]
        assert claim["rival"] == f"{better}, sum" and claim["value"] == pytest.approx(-10)
