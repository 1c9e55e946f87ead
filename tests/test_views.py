"""Models that give several kinds of vectors in one pass: what is encoded, searched and served of them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DOCUMENTS, QUERIES
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from test_calibration import MADE
from test_encode import read, write_lines
from test_search import same

from polyrep import InputError
from polyrep.encoding import EncodedCorpus
from polyrep.encoding import encode as encoding
from polyrep.encoding.encode import encode
from polyrep.encoding.views import encode_views, views_of
from polyrep.hub import fingerprint
from polyrep.hub.calibration import write_calibration
from polyrep.search import Hit, Service, commands, open_index
from polyrep.search.commands import search

DIM, WEIGHT = 32, 0.3


class SeveralViews(Pooling):
    """A mean over tokens, the largest positive parts, and the tokens; it counts what it is asked."""

    texts = 0

    def views(self) -> dict[str, dict[str, Any]]:
        return {
            "lexicon": {"kind": "sparse", "dim": DIM, "similarity": "dot", "output": "largest", "weight": 1.0},
            "dense": {"kind": "sentence", "dim": DIM, "similarity": "cosine", "output": "means", "weight": WEIGHT},
            "tokens": {
                "kind": "tokens",
                "dim": DIM,
                "similarity": "maxsim",
                "output": "token_embeddings",
                "mask": "attention_mask",
            },
        }

    def forward(self, features: Any) -> Any:
        SeveralViews.texts += len(features["input_ids"])
        states, mask = features["token_embeddings"], features["attention_mask"][..., None]
        features["means"] = (states * mask).sum(1) / mask.sum(1)
        features["largest"] = (states - 0.7).relu().masked_fill(mask == 0, 0).amax(1)
        return super().forward(features)


@pytest.fixture
def model(sentence_model: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model, which ``load`` gives for its folder."""
    sentence_model.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    double: Any = SentenceTransformer(str(tmp_path / "model"))
    double[1].__class__ = SeveralViews
    for module in (encoding, commands):
        monkeypatch.setattr(module, "load", lambda *_, **__: double)
    return double


def alone(model: Any, text: str) -> dict[str, np.ndarray]:
    """Views of one text, without padding."""
    with torch.inference_mode():
        batch = model.tokenizer(text, return_tensors="pt")
        states = model[0].model(**batch).last_hidden_state[0].numpy()
    return {"lexicon": np.maximum(states - 0.7, 0).max(0), "dense": states.mean(0), "tokens": states}


def encoded(tmp_path: Path, *flags: str) -> Any:
    source = write_lines(tmp_path / "corpus.jsonl", DOCUMENTS)
    words = [str(tmp_path / "model"), "--input", str(source), "--output", str(tmp_path / "out"), "--shard_size", "2"]
    return encode([*words, "--precision", "float32", *flags])


def test_one_pass_writes_a_corpus_of_each_view(model, tmp_path):
    expected = {name: alone(model, text) for name, text in DOCUMENTS.items()}
    SeveralViews.texts = 0
    said = encoded(tmp_path, "--views", "dense,lexicon,tokens")
    assert SeveralViews.texts == len(DOCUMENTS)
    assert {name: summary["documents"] for name, summary in said.items()} == dict.fromkeys(
        ["dense", "lexicon", "tokens"], 5
    )
    for name, view in views_of(model).items():
        corpus = EncodedCorpus(tmp_path / "out" / name)
        origin = corpus.origin
        assert (origin.name, origin.kind, origin.dim, origin.similarity) == (name, view.kind, DIM, view.similarity)
        assert origin.fingerprint == fingerprint(tmp_path / "model") and len(corpus.records) == 3
        ids, found = read(corpus)
        assert ids == list(DOCUMENTS)
        for identifier, vectors in zip(ids, found, strict=True):
            np.testing.assert_allclose(vectors, expected[identifier][name], atol=1e-5)
    # A shard of one view that is lost is made again, and only the texts in it are read.
    (tmp_path / "out" / "lexicon" / "shards" / "00000001.json").unlink()
    encoded(tmp_path, "--views", "dense,lexicon,tokens")
    assert SeveralViews.texts == len(DOCUMENTS) + 2
    assert len(EncodedCorpus(tmp_path / "out" / "lexicon")) == 5


def test_views_are_summed_by_the_weights_of_the_model_or_by_others(model, tmp_path):
    pytest.importorskip("qdrant_edge")
    encoded(tmp_path, "--views", "dense,lexicon")
    uri = f"qdrant://{tmp_path}/index"
    commands.index([str(tmp_path / "out" / name) for name in ("dense", "lexicon")] + ["--uri", uri])
    queries, argv = list(QUERIES.values()), ["--uri", uri, "--model", str(tmp_path / "model"), "--k", "3"]

    def expected(weights: dict[str, float]) -> list[list[Hit]]:
        documents, found = {name: alone(model, text) for name, text in DOCUMENTS.items()}, []
        for query in queries:
            asked = alone(model, query)
            hits = []
            for name, views in documents.items():
                cosine = asked["dense"] @ views["dense"]
                cosine /= np.linalg.norm(asked["dense"]) * np.linalg.norm(views["dense"])
                lexical = asked["lexicon"] @ views["lexicon"]
                hits.append(Hit(name, float(weights.get("lexicon", 0) * lexical + weights.get("dense", 0) * cosine)))
            found.append(sorted(hits, key=lambda hit: -hit.score)[:3])
        return found

    assert same(search([*queries, *argv]), expected({"lexicon": 1, "dense": WEIGHT}))
    weights = ["--weights", "dense=2,lexicon=0.5", "--candidates", "5"]
    assert same(search([*queries, *argv, *weights]), expected({"lexicon": 0.5, "dense": 2}))
    assert same(search([*queries, *argv, "--name", "dense"]), expected({"dense": 1}))
    with pytest.raises(InputError, match="--name dense: --weights says which vectors"):
        search([*queries, *argv, "--name", "dense", *weights])

    index = open_index("memory:")
    for name in ("dense", "lexicon"):
        index.add(EncodedCorpus(tmp_path / "out" / name))

    async def served(**options: Any) -> list[list[Hit]]:
        async with Service(model, index, fingerprint=fingerprint(tmp_path / "model"), **options) as service:
            return await service.search(queries, 3)

    assert same(asyncio.run(served()), expected({"lexicon": 1, "dense": WEIGHT}))
    assert same(asyncio.run(served(weights={"dense": 1, "lexicon": 2})), expected({"lexicon": 2, "dense": 1}))
    with pytest.raises(InputError, match=r"the service: weights\['other'\]=1: there are no scores of that name"):
        asyncio.run(served(weights={"other": 1}))


def test_an_index_of_one_view_is_searched_and_served_by_that_view(model, tmp_path):
    """Whatever the model gives by itself; and a calibration of that is none of another view."""
    encoded(tmp_path, "--views", "dense,lexicon")
    print_, query = fingerprint(tmp_path / "model"), next(iter(QUERIES.values()))
    write_calibration(tmp_path / "model", replace(MADE, fingerprint=print_))
    model._polyrep_folder = tmp_path / "model"
    asked = alone(model, query)
    scores = {name: float(asked["lexicon"] @ alone(model, text)["lexicon"]) for name, text in DOCUMENTS.items()}
    expected = [[Hit(name, scores[name]) for name in sorted(scores, key=lambda name: -scores[name])[:3]]]

    async def served(index: Any) -> list[list[Hit]]:
        async with Service(model, index, fingerprint=print_) as service:
            return await service.search([query], 3)

    for name in ("lexicon", "dense"):
        index = open_index("memory:")
        index.add(EncodedCorpus(tmp_path / "out" / name))
        found = asyncio.run(served(index))
        assert all((hit.probability is not None) == (name == "dense") for hit in found[0])
        assert name == "dense" or same(found, expected)
        uri = f"qdrant://{tmp_path}/{name}"
        commands.index([str(tmp_path / "out" / name), "--uri", uri])
        assert same(search([query, "--uri", uri, "--model", str(tmp_path / "model"), "--k", "3"]), found)


def test_a_view_is_summed_with_vectors_of_the_model_by_another_name(model, tmp_path):
    encoded(tmp_path, "--views", "lexicon")
    source = str(tmp_path / "corpus.jsonl")
    encode([str(tmp_path / "model"), "--input", source, "--output", str(tmp_path / "own"), "--name", "own"])
    uri, query = f"qdrant://{tmp_path}/index", next(iter(QUERIES.values()))
    commands.index([str(tmp_path / "out" / "lexicon"), str(tmp_path / "own"), "--uri", uri])
    argv = [query, "--uri", uri, "--model", str(tmp_path / "model"), "--k", "5"]
    asked, own = alone(model, query), model.encode_query(query)
    expected = {}
    for name, text in DOCUMENTS.items():
        cosine = float(model.similarity(own, model.encode_document(text)))
        expected[name] = 2 * cosine + float(asked["lexicon"] @ alone(model, text)["lexicon"])
    (hits,) = search([*argv, "--weights", "own=2,lexicon=1"])
    assert {hit.id: hit.score for hit in hits} == pytest.approx(expected, rel=1e-3)
    with pytest.raises(
        InputError, match="--candidates 7: of a weighted sum or of two stages alone, and there is neither"
    ):
        search([*argv, "--name", "own", "--candidates", "7"])


def test_queries_have_views_too_and_none_is_no_text(model):
    found = encode_views(model, list(QUERIES.values()), ["tokens", "lexicon"], task="query", batch_size=2)
    assert list(found) == ["tokens", "lexicon"] and len(found["tokens"]) == len(found["lexicon"]) == len(QUERIES)
    empty = encode_views(model, [], ["tokens", "lexicon", "dense"], task="query")
    assert [len(vectors) for vectors in empty.values()] == [0, 0, 0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--views", "dense,sparse"], "has no view 'sparse'; it has lexicon, dense, tokens"),
        (["--views", "dense,dense"], "expected names of views, each once"),
        (["--views", "dense,"], "expected names of views, each once"),
        (["--views", "../dense"], "expected names of views, each once"),
        (["--views", "dense", "--name", "x"], "--name x: views have names of their own"),
        (["--views", "lexicon", "--precision", "int8"], "kept in float16 or float32 alone"),
    ],
)
def test_views_that_there_are_not_are_refused(flags, words, model, tmp_path):
    with pytest.raises(InputError, match=words):
        encoded(tmp_path, *flags)
    assert not (tmp_path / "out").exists()


def test_most_models_have_no_views(sentence_model, tmp_path):
    sentence_model.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    with pytest.raises(InputError, match="has no view 'dense'; it has one kind of vectors, which has no name"):
        encoded(tmp_path, "--views", "dense")


def test_views_whose_sum_has_no_weight_are_summed_by_a_weight_that_is_given(model, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.WEIGHT", None)
    encoded(tmp_path, "--views", "dense,lexicon")
    index = open_index("memory:")
    for name in ("dense", "lexicon"):
        index.add(EncodedCorpus(tmp_path / "out" / name))
    with pytest.raises(InputError, match="has chosen no weight for 'dense' in the sum of lexicon and dense"):
        Service(model, index, fingerprint=fingerprint(tmp_path / "model"))
    Service(model, index, fingerprint=fingerprint(tmp_path / "model"), weights={"lexicon": 1, "dense": 2})
