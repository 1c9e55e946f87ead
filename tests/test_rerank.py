"""A second model that orders the best documents of any system, against pairs scored one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DOCUMENTS, QRELS, QUERIES
from sentence_transformers import CrossEncoder
from test_evaluation import brute_force
from test_search import score
from test_windows import rows_of
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from polyrep.cli import main
from polyrep.data import load_retrieval_dataset
from polyrep.encoding.windows import Windows
from polyrep.evaluation.bm25 import rank_with_bm25
from polyrep.evaluation.evaluate import evaluate
from polyrep.evaluation.frontier.command import frontier
from polyrep.evaluation.rerank import Reranker
from polyrep.evaluation.systems import Ranking
from polyrep.hub import load


def write_cross_encoder(folder: Path, backbone: Path, labels: int = 1) -> Path:
    """A random cross-encoder over the words of the tiny models, as it stands on the Hub."""
    torch.manual_seed(3)
    config = BertConfig.from_pretrained(backbone, num_labels=labels, initializer_range=0.4)
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(folder)
    return folder


@pytest.fixture
def models(tmp_path, backbone, static_model, multi_vector_model, sparse_model) -> dict[str, Path]:
    found = {"cross": write_cross_encoder(tmp_path / "cross", backbone)}
    found["three"] = write_cross_encoder(tmp_path / "three", backbone, labels=3)
    for name, model in {"bag": static_model, "many": multi_vector_model, "sparse": sparse_model}.items():
        found[name] = tmp_path / name
        model.save_pretrained(str(found[name]), create_model_card=False)
    return found


def run(tmp_path: Path, *arguments: Any) -> dict[str, Any]:
    return evaluate([*map(str, arguments), "--cache_dir", str(tmp_path / "cache")])


def bm25_order(beir: Path) -> dict[str, list[str]]:
    """Documents of each query as BM25 has them."""
    dataset, names = load_retrieval_dataset(beir, "test"), list(DOCUMENTS)
    found = rank_with_bm25(dataset).positions
    return {query: [names[place] for place in row] for query, row in zip(QUERIES, found, strict=True)}


def logits(folder: Path) -> dict[tuple[str, str], float]:
    """Every pair through transformers alone."""
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = {}
    for query, text in QUERIES.items():
        for name, document in DOCUMENTS.items():
            with torch.inference_mode():
                batch = tokenizer(text, document, return_tensors="pt", truncation="longest_first", max_length=64)
                found[query, name] = float(model(**batch).logits[0, 0])
    return found


@pytest.mark.parametrize("name", ["cross", "bag"])
def test_what_the_first_stage_did_not_find_stays_behind(name, tmp_path, beir, models):
    dataset = load_retrieval_dataset(beir, "test")
    open_model = CrossEncoder if name == "cross" else load
    model = Reranker(name, models[name], open_model(str(models[name])), (5,), tmp_path / "cache")
    places = np.tile([4, 2, 0, 1, 3], (len(dataset.queries), 1))
    costs, seconds = {"bytes_per_document": 1.0}, np.ones(len(places))
    whole = model.rank(Ranking("all", places, np.zeros(places.shape, np.float32), costs, seconds), dataset, 5)
    scores = np.zeros(places.shape, np.float32)
    scores[0, 3:] = -np.inf
    part = model.rank(Ranking("some", places, scores, costs, seconds), dataset, 5)
    assert part.positions[0, :3].tolist() == [place for place in whole.positions[0] if place in (4, 2, 0)]
    assert np.isinf(part.scores[0, 3:]).all() and sorted(part.positions[0, 3:]) == [1, 3]
    np.testing.assert_array_equal(part.positions[1:], whole.positions[1:])
    np.testing.assert_array_equal(part.scores[1:], whole.scores[1:])


def test_the_best_of_a_system_come_in_the_order_of_a_cross_encoder(tmp_path, beir, models, monkeypatch):
    flags = [models["bag"], "--dataset", beir, "--rerank", models["cross"], "--rerank_depth", 2, 4]
    results = run(tmp_path, *flags, "--output", tmp_path / "out")
    rows, first, scores = rows_of(results), bm25_order(beir), logits(models["cross"])
    assert len(set(scores.values())) == len(scores)
    systems = {"BM25", "bag"}
    assert set(rows) == systems | {f"{name}, then {depth} best by cross" for name in systems for depth in (2, 4)}
    for depth in (2, 4):
        expected: dict[str, list[float]] = {"nDCG@10": [], "MRR@10": []}
        for query in QUERIES:
            ranked = sorted(first[query][:depth], key=lambda name: -scores[query, name])
            for metric, values in expected.items():
                values.append(brute_force(QRELS[query], ranked)[metric])
        for metric, values in expected.items():
            row = rows_of(results, metric)[f"BM25, then {depth} best by cross"]
            assert row["value"] == pytest.approx(np.mean(values))
    row = rows["BM25, then 4 best by cross"]
    assert row["bytes_per_document"] == rows["BM25"]["bytes_per_document"]  # a cross-encoder stores nothing
    assert row["search_ms_p50"] > rows["BM25"]["search_ms_p50"]
    assert set(results["models"]) == {"bag", "cross"} and any("Two stages" in note for note in results["notes"])
    assert "BM25, then 4 best by cross" in (tmp_path / "out" / "results.md").read_text()

    # A second run scores no pair again.
    monkeypatch.setattr(CrossEncoder, "predict", lambda *_, **__: pytest.fail("scored again"))
    again = rows_of(run(tmp_path, *flags))
    assert {name: row["value"] for name, row in again.items()} == {name: row["value"] for name, row in rows.items()}


def test_what_was_said_of_a_pair_is_not_asked_again(tmp_path, beir, models, monkeypatch):
    asked, predict = [], CrossEncoder.predict

    def counted(model, pairs, **options):
        asked.extend(pairs if "activation_fn" in options else [])  # without, it is timed
        return predict(model, pairs, **options)

    monkeypatch.setattr(CrossEncoder, "predict", counted)
    for depth in (2, 3):
        run(
            tmp_path,
            "bm25",
            "--dataset",
            beir,
            "--baselines",
            "none",
            "--rerank",
            models["cross"],
            "--rerank_depth",
            depth,
        )
        assert len(asked) == len(set(asked)) == depth * len(QUERIES)


def test_high_scores_do_not_tie_as_the_sigmoid_would_have_them(tmp_path, beir, models, backbone):
    model = BertForSequenceClassification.from_pretrained(models["cross"])
    with torch.no_grad():
        model.classifier.bias += 40.0  # where a float32 after the sigmoid is 1 for all
    model.save_pretrained(models["cross"])
    assert (CrossEncoder(str(models["cross"])).predict([("ports", t) for t in DOCUMENTS.values()]) == 1).all()
    results = run(tmp_path, "bm25", "--dataset", beir, "--baselines", "none", "--rerank", models["cross"])
    first, scores = bm25_order(beir), logits(models["cross"])
    expected = []
    for query in QUERIES:
        ranked = sorted(first[query], key=lambda name: -scores[query, name])
        expected.append(brute_force(QRELS[query], ranked)["nDCG@10"])
    assert rows_of(results)["BM25, then 50 best by cross"]["value"] == pytest.approx(np.mean(expected))


def test_the_best_of_a_system_come_in_the_order_of_late_interaction(tmp_path, beir, models, multi_vector_model):
    flags = ["bm25", "--dataset", beir, "--baselines", "none", "--rerank", models["many"], "--rerank_depth", 3]
    rows, first = rows_of(run(tmp_path, *flags, "--dtype", "float32")), bm25_order(beir)
    vectors = multi_vector_model.encode_document(list(DOCUMENTS.values()))
    documents = {name: one.numpy() for name, one in zip(DOCUMENTS, vectors, strict=True)}
    expected = []
    for query, text in QUERIES.items():
        asked = multi_vector_model.encode_query([text])[0].numpy()
        ranked = sorted(first[query][:3], key=lambda name: -score("maxsim", asked, documents[name]))
        expected.append(brute_force(QRELS[query], ranked)["nDCG@10"])
    row = rows["BM25, then 3 best by many"]
    assert row["value"] == pytest.approx(np.mean(expected))
    mean = np.mean([len(one) for one in vectors])
    assert row["bytes_per_document"] == pytest.approx(row["first_stage_bytes"] + mean * 16 * 2 + 8)


def test_the_frontier_orders_each_first_stage_and_the_full_model(tmp_path, beir, models):
    flags = [models["many"], "--frontier", "--dataset", beir, "--methods", "mean", "--rerank", models["cross"]]
    flags += ["--cache_dir", tmp_path / "cache", "--frontier_cache", tmp_path / "kept", "--rerank_depth", 5]
    flags += ["--queries", "judged", "--model_dtype", "float32"]
    results = frontier([str(word) for word in flags])
    rows, scores = rows_of(results), logits(models["cross"])
    assert results["failures"] == []
    ranked = {q: sorted(DOCUMENTS, key=lambda name: -scores[q, name]) for q in QUERIES}  # noqa: B023
    expected = np.mean([brute_force(QRELS[query], ranked[query])["nDCG@10"] for query in QUERIES])
    for first in ("full model", "BM25", "mean"):  # all of them find all five documents
        row = rows[f"{first}, then 5 best by cross"]
        assert row["value"] == pytest.approx(expected)
        assert row["bytes_per_document"] == rows[first]["bytes_per_document"]
        assert row["search_ms_p50"] > rows[first]["search_ms_p50"]
    assert not any("by cross" in str(claim) for claim in results["claims"])


def test_vectors_of_windows_order_as_windows(tmp_path, beir, models, static_model):
    """What is asked for stands at the end of long documents, in windows of their own."""
    lines = [json.loads(line) for line in (beir / "corpus.jsonl").read_text().splitlines()]
    corpus = {line["_id"]: f"{'cat dog list ' * 6}{line['text']}" for line in lines}
    text = "".join(json.dumps({"_id": name, "text": text}) + "\n" for name, text in corpus.items())
    (beir / "corpus.jsonl").write_text(text)
    flags = ["bm25", "--dataset", beir, "--baselines", "none", "--rerank", models["bag"], "--rerank_depth", 5, 5]
    results = run(tmp_path, *flags, "--window", 8, "--stride", 4)
    windows = Windows.of(static_model, 8, 4, "bag")
    expected, count = [], np.mean([len(windows.cut(text)) for text in corpus.values()])
    for query, asked in QUERIES.items():
        vector = static_model.encode_query(asked)
        best = {
            name: max(score("cosine", vector, window) for window in static_model.encode(windows.cut(text)))
            for name, text in corpus.items()
        }
        ranked = sorted(best, key=lambda name: (best[name], name), reverse=True)  # noqa: B023
        expected.append(brute_force(QRELS[query], ranked)["nDCG@10"])
    row = rows_of(results)["BM25, then 5 best by bag"]
    assert row["value"] == pytest.approx(np.mean(expected))
    assert row["bytes_per_document"] == pytest.approx(row["first_stage_bytes"] + count * 384 * 2) and count > 2
    assert "seeds" not in row  # which two rows of one name would be
    assert any("a cross-encoder reads the beginning of each" in note for note in results["notes"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rerank", "three"], "gives 3 numbers a pair"),
        (["--rerank", "sparse"], "has sparse vectors"),
        (["--rerank", "nowhere"], "nowhere"),
        (["--rerank", "cross", "--rerank_depth", "0"], "--rerank_depth 0"),
        (["--rerank", "cross", "--rerank_depth", "5000"], "--rerank_depth 5000"),
        (["--rerank_depth", "20"], "there is no --rerank"),
        (["--rerank_revision", "main"], "there is no --rerank"),
    ],
)
@pytest.mark.parametrize("frontier", [False, True])
def test_what_cannot_order_is_refused_before_anything_is_encoded(
    tmp_path, beir, models, flags, words, frontier, capsys
):
    named = [str(models.get(word, word)) for word in flags]
    command = ["evaluate", str(models["bag"]), "--dataset", str(beir), "--cache_dir", str(tmp_path / "cache"), *named]
    assert main([*command, "--frontier"] if frontier else command) == 2
    assert words in capsys.readouterr().err
    assert not list((tmp_path / "cache").glob("*document*"))


def test_what_a_cross_encoder_would_call_needs_the_users_word(tmp_path, beir, models, capsys):
    config = models["cross"] / "config.json"
    named = json.loads(config.read_text()) | {"sbert_ce_default_activation_function": "os.getcwd"}
    config.write_text(json.dumps(named))
    flags = ["evaluate", str(models["bag"]), "--dataset", str(beir), "--rerank", str(models["cross"])]
    assert main([*flags, "--cache_dir", str(tmp_path / "cache")]) == 2
    assert "'os.getcwd' is none of torch.nn" in capsys.readouterr().err
