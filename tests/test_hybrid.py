"""Sums of two systems in the table, and in an index from the command line, against plain loops."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DOCUMENTS, QUERIES, ROOT, run_python, write_beir
from test_bm25 import bm25
from test_encode import write_lines
from test_evaluation import brute_force
from world import write_world

from polyrep import InputError
from polyrep.cli import main
from polyrep.data import RetrievalDataset, load_retrieval_dataset
from polyrep.encoding import EncodedCorpus
from polyrep.encoding import bm25 as words_of_bm25
from polyrep.encoding.embeddings import in_memory
from polyrep.encoding.encode import encode
from polyrep.evaluation import hybrid
from polyrep.evaluation.evaluate import evaluate
from polyrep.evaluation.hybrid import MULTIPLES
from polyrep.evaluation.metrics import per_query_metrics
from polyrep.evaluation.systems import Ranking
from polyrep.search import open_index
from polyrep.search.commands import search, weights_of
from polyrep.search.ranking import tie_ranks
from polyrep.search.weighted import View

Scores = dict[str, dict[str, float]]  # query -> document -> score


@pytest.fixture
def bag(static_model: Any, tmp_path: Path) -> Path:
    static_model.save_pretrained(str(tmp_path / "bag"), create_model_card=False)
    return tmp_path / "bag"


def run(tmp_path: Path, *words: str | Path) -> dict[str, Any]:
    flags = ["--dtype", "float32", "--cache_dir", str(tmp_path / "cache")]
    return evaluate([*map(str, words), *flags])


def rows_of(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["system"]: row for row in results["rows"] if row["metric"] == "nDCG@10"}


def both(model: Any, dataset: Any) -> tuple[Scores, Scores]:
    """Cosines of the model, and BM25 by its formula."""
    corpus, texts = list(dataset.corpus), list(dataset.corpus.values())
    documents = model.encode_document(texts).astype(np.float64)
    documents /= np.linalg.norm(documents, axis=1, keepdims=True)
    dense, words = {}, {}
    for name, query in dataset.queries.items():
        vector = model.encode_query([query])[0].astype(np.float64)
        dense[name] = dict(zip(corpus, (documents @ (vector / np.linalg.norm(vector))).tolist(), strict=True))
        words[name] = dict(zip(corpus, bm25(query, texts), strict=True))
    return dense, words


def ndcg(dataset: Any, scores: Scores) -> float:
    def of(query: str) -> float:
        said = scores[query]
        ranked = sorted(said, key=lambda d: (np.float32(said[d]), d), reverse=True)
        return brute_force(dataset.qrels[query], ranked)["nDCG@10"]

    return float(np.mean([of(query) for query in dataset.queries]))


def summed(first: Scores, second: Scores, weight: float) -> Scores:
    return {q: {d: said[d] + weight * second[q][d] for d in said} for q, said in first.items()}


@pytest.mark.parametrize("first", ["bag", "bm25"])
def test_the_weight_is_chosen_on_dev_and_the_sum_measured_on_test(first, bag, static_model, tmp_path):
    folder = write_world(tmp_path / "world", sizes={"train": 6, "dev": 8, "test": 10})
    models = [bag, "bm25"] if first == "bag" else ["bm25", bag]
    results = run(tmp_path, *models, "--dataset", folder, "--hybrid")
    rows = rows_of(results)
    names = ["bag", "BM25"] if first == "bag" else ["BM25", "bag"]
    title = " + ".join(names)
    assert set(rows) == {"bag", "BM25", f"{title}, summed", f"{title}, RRF"}

    dev, test = (load_retrieval_dataset(str(folder), split) for split in ("dev", "test"))
    sides = {split.split: both(static_model, split)[:: 1 if first == "bag" else -1] for split in (dev, test)}
    spreads = [
        np.std([value - np.mean(list(said.values())) for said in side.values() for value in said.values()])
        for side in sides["dev"]
    ]
    tried = {w: ndcg(dev, summed(*sides["dev"], w)) for w in (m * spreads[0] / spreads[1] for m in MULTIPLES)}
    said = rows[f"{title}, summed"]["settings"]
    chosen = weights_of(said["weights"])
    assert (
        list(chosen) == (["dense", "bm25"] if first == "bag" else ["bm25", "dense"]) and chosen[list(chosen)[0]] == 1
    )
    weight = chosen[list(chosen)[1]]
    assert ndcg(dev, summed(*sides["dev"], weight)) == pytest.approx(max(tried.values()), abs=1e-3)
    assert any(math.isclose(weight, one, rel_tol=6e-3) for one in tried)
    assert said["chosen_on"] == f"dev ({len(dev.queries)} queries)"
    measured = rows[f"{title}, summed"]
    assert measured["value"] == pytest.approx(ndcg(test, summed(*sides["test"], weight)), abs=1e-3)
    assert measured["bytes_per_document"] > rows["bag"]["bytes_per_document"] and measured["search_ms_p50"] > 0
    assert any("the first system finds candidates" in note for note in results["notes"])

    fusion: Scores = {q: dict.fromkeys(test.corpus, 0.0) for q in test.queries}
    for side in sides["test"]:
        for query, of in side.items():
            found = sorted((d for d in of if of[d]), key=lambda d, o=of: (np.float32(o[d]), d), reverse=True)
            for rank, document in enumerate(found, start=1):
                fusion[query][document] += 1 / (60 + rank)
    assert rows[f"{title}, RRF"]["value"] == pytest.approx(ndcg(test, fusion), abs=1e-3)


def test_a_weight_that_is_given_is_used(bag, static_model, tmp_path, beir):
    results = run(tmp_path, "bm25", bag, "--dataset", beir, "--hybrid", "--hybrid_weight", "0.5")
    dataset = load_retrieval_dataset(str(beir), "test")
    dense, words = both(static_model, dataset)
    row = rows_of(results)["BM25 + bag, summed"]
    assert row["value"] == pytest.approx(ndcg(dataset, summed(words, dense, 0.5)))
    assert row["settings"] == {"weights": "bm25=1,dense=0.5"}


def test_sums_are_ranked_again_like_every_row(bag, tmp_path, beir):
    flags = ["--hybrid", "--hybrid_weight", "0.5", "--rerank", bag, "--rerank_depth", "5"]
    rows = rows_of(run(tmp_path, "bm25", bag, "--dataset", beir, *flags))
    again = rows["BM25 + bag, summed, then 5 best by bag"]
    assert again["value"] == pytest.approx(rows["bag"]["value"])  # five documents are all
    assert "BM25 + bag, RRF, then 5 best by bag" in rows


def test_hybrids_are_compared_with_the_better_of_their_two(bag, sparse_model, multi_vector_model, tmp_path):
    folder = write_world(tmp_path / "world", sizes={"train": 6, "dev": 8, "test": 10})
    for name, model in (("words", sparse_model), ("late", multi_vector_model)):
        model.save_pretrained(str(tmp_path / name), create_model_card=False)
    command = [str(ROOT / "benchmarks" / "hybrids.py"), "--datasets", str(folder), "--dense", str(bag)]
    command += ["--words", str(tmp_path / "words"), "--late", str(tmp_path / "late")]
    done = run_python(*command, "--cache_dir", str(tmp_path / "cache"), "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "out" / "hybrids.json").read_text(encoding="utf-8"))
    rows, claims = rows_of(results), {claim["claim"]: claim for claim in results["claims"]}
    pairs = [("dense", "BM25"), ("dense", "Dense2Sparse"), ("late interaction", "dense"), ("late interaction", "BM25")]
    assert len(rows) == 4 + 2 * len(pairs) and len(claims) == 2 * len(pairs)
    for one, other in pairs:
        best = max(rows[one]["value"], rows[other]["value"])
        label = f"hybrids.{one}_{other}".lower().replace(" ", "_")
        for how in ("summed", "RRF"):
            row = rows[f"{one} + {other}, {how}"]
            assert rows[row["reference"]]["value"] == best and row["reference"] in (one, other)
            assert row["difference"] == pytest.approx(row["value"] - best) and row["p_value"] <= 1
        gain = 100 * rows[f"{one} + {other}, summed"]["difference"]
        assert claims[f"{label}_gain"]["value"] == pytest.approx(gain)
        over = 100 * (rows[f"{one} + {other}, summed"]["value"] - rows[f"{one} + {other}, RRF"]["value"])
        assert claims[f"{label}_over_rrf"]["value"] == pytest.approx(over)
    assert not any("reference" in rows[name] for name in ("BM25", "dense", "Dense2Sparse", "late interaction"))


def test_a_place_for_which_nothing_was_found_counts_for_nothing():
    """Where fewer documents share a word with the query than a ranking has places."""
    dataset = RetrievalDataset("any", "test", {"a": "", "b": "", "c": ""}, {"q": ""}, {"q": {"a": 1, "c": 1}})
    positions, scores = np.array([[2, 0, 0]]), np.array([[3.0, -np.inf, -np.inf]])
    found = per_query_metrics(dataset, Ranking("any", positions, scores))
    assert found["Recall@100"].tolist() == [0.5] and found["MRR@10"].tolist() == [1.0]
    assert found["nDCG@10"] == pytest.approx([1 / (1 + 1 / math.log2(3))])


def test_fusion_keeps_no_number_for_each_query_and_document(monkeypatch):
    monkeypatch.setattr(hybrid, "DEPTH", 10)
    draw = np.random.default_rng(0)
    documents, queries = ({f"{n}": "" for n in range(count)} for count in (3000, 2000))
    dataset = RetrievalDataset("any", "test", documents, queries, {"0": {"0": 1}})
    views = [
        View(*(in_memory(draw.standard_normal((len(side), 4)).astype(np.float32)) for side in sides), "dot")
        for sides in [(queries, documents)] * 2
    ]
    tracemalloc.start()
    positions, scores = hybrid.fused(views, dataset, tie_ranks(list(documents)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert positions.shape == scores.shape == (2000, 10) and peak < 2000 * 3000
    best = [np.argsort(-(view.queries.values[7] @ view.documents.values.T))[:10].tolist() for view in views]
    fusion = {place: sum(1 / (61 + side.index(place)) for side in best if place in side) for place in sum(best, [])}
    assert scores[7].tolist() == pytest.approx(sorted(fusion.values(), reverse=True)[:10])
    assert [fusion[place] for place in positions[7].tolist()] == pytest.approx(scores[7].tolist())


@pytest.mark.parametrize(
    ("models", "flags", "words"),
    [
        ([], [], "sums two MODELs, and 1 are named"),
        (["bm25"], ["--split", "dev"], "the weight would be chosen on dev, which is measured"),
        (["bm25"], [], "no queries to choose the weight on .* Or give --hybrid_weight"),
        (["bm25"], ["--hybrid_weight", "-1"], "--hybrid_weight -1.0: is out of its range"),
        (["bm25"], ["--hybrid_weight", "nan"], "--hybrid_weight nan: is out of its range"),
    ],
)
def test_sums_that_cannot_be_made_are_refused_before_anything_is_encoded(models, flags, words, bag, tmp_path):
    beir = write_beir(tmp_path / "tiny", "dev" if "dev" in flags else "test")
    with pytest.raises(InputError, match=words):
        run(tmp_path, bag, *models, "--dataset", beir, "--hybrid", *flags)
    with pytest.raises(InputError, match="there is no --hybrid, so nothing is summed"):
        run(tmp_path, bag, "--dataset", beir, "--hybrid_weight", "1")
    assert not (tmp_path / "cache").exists()


# An index


@pytest.fixture
def encoded(bag: Path, tmp_path: Path) -> Path:
    """One corpus by BM25 and by a model."""
    source = write_lines(tmp_path / "corpus.jsonl", DOCUMENTS)
    for model, name in (("bm25", "words"), (bag, "dense")):
        flags = ["--input", str(source), "--output", str(tmp_path / name), "--shard_size", "2"]
        assert encode([str(model), *flags, "--precision", "float32"])["documents"] == 5
    return tmp_path


def test_bm25_and_a_model_are_summed_from_the_command_line(encoded, static_model, tmp_path):
    corpus = EncodedCorpus(encoded / "words")
    assert (corpus.origin.name, corpus.origin.kind, len(corpus.records)) == ("bm25", "sparse", 3)
    uri = f"qdrant://{tmp_path}/index"
    assert main(["index", str(encoded / "words"), str(encoded / "dense"), "--uri", uri]) == 0
    models = f"{encoded / 'bag'},{encoded / 'words'}"
    said = " ".join(QUERIES.values())
    argv = [said, "xylophone", "--uri", uri, "--model", models, "--k", "5"]
    found = search([*argv, "--weights", "bm25=1,dense=0.3"])
    texts = list(DOCUMENTS.values())
    vectors = static_model.encode_document(texts)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for query, hits in zip((said, "xylophone"), found, strict=True):
        asked = static_model.encode_query([query])[0]
        scores = np.array(bm25(query, texts)) + 0.3 * vectors @ (asked / np.linalg.norm(asked))
        order = [list(DOCUMENTS)[place] for place in np.argsort(-scores)]
        assert [hit.id for hit in hits] == order
        assert [hit.score for hit in hits] == pytest.approx(sorted(scores.tolist(), reverse=True), rel=1e-4)
    ((hit,),) = search([QUERIES["q1"], "--uri", uri, "--model", str(encoded / "words"), "--k", "1"])
    assert (hit.id, hit.score) == ("d2", pytest.approx(max(bm25(QUERIES["q1"], texts)), rel=1e-5))
    for weights, words in {
        "bm25=1,dense": "--weights bm25=1,dense: 'dense' is no name and number",
        "bm25=1,bm25=2": "'bm25=2' is no name and number, or names vectors again",
        "bm25=1,sparse=2": r"weights\['sparse'\]=2.0: there are no scores of that name, only of 'bm25', 'dense'",
        "bm25=1,dense=-2": r"weights\['dense'\]=-2.0: expected a number from 0 on",
        "bm25=0,dense=0": "weights are all 0",
        "bm25=nan,dense=1": r"weights\['bm25'\]=nan",
    }.items():
        with pytest.raises(InputError, match=words):
            search([*argv, "--weights", weights])
    with pytest.raises(InputError, match="several models, but no --weights"):
        search(argv)
    with pytest.raises(InputError, match="its vectors 'bm25' were made by model bm25-.*, which is none of --model"):
        search([said, "--uri", uri, "--model", str(encoded / "bag"), "--weights", "bm25=1,dense=1"])
    with pytest.raises(InputError, match="--model bm25: its queries are read by the words of the documents"):
        search([said, "--uri", uri, "--model", "bm25"])


def test_queries_of_bm25_are_encoded_by_the_words_of_its_documents(encoded, tmp_path):
    source = write_lines(tmp_path / "queries.jsonl", QUERIES)
    flags = ["--input", str(source), "--output", str(tmp_path / "queries"), "--task", "query"]
    with pytest.raises(InputError, match="BM25 knows words by the documents that have them"):
        encode(["bm25", *flags])
    for source in (encoded / "words", encoded / "bag"):
        with pytest.raises(InputError, match="--language de: "):
            encode([str(source), *flags, "--language", "de"])
    encode([str(encoded / "words"), *flags, "--precision", "float32"])
    (asked,) = EncodedCorpus(tmp_path / "queries")
    index = open_index("memory:")
    index.add(EncodedCorpus(encoded / "words"))
    for hits, query in zip(index.search(asked.vectors, 5), QUERIES.values(), strict=True):
        expected = dict(zip(DOCUMENTS, bm25(query, list(DOCUMENTS.values())), strict=True))
        assert {hit.id: hit.score for hit in hits} == pytest.approx(expected, abs=1e-6)
    # The same command goes on, and other documents are another corpus.
    source = ["--input", str(tmp_path / "corpus.jsonl"), "--output", str(encoded / "words"), "--shard_size", "2"]
    before = json.loads((encoded / "words" / "bm25.json").read_text())
    (encoded / "words" / "shards" / "00000001.json").unlink()
    assert encode(["bm25", *source, "--precision", "float32"])["done"] == 3
    assert json.loads((encoded / "words" / "bm25.json").read_text()) == before
    (encoded / "words" / "bm25.json").write_text("{")  # which is made again though all shards are there
    encode(["bm25", *source, "--precision", "float32"])
    assert json.loads((encoded / "words" / "bm25.json").read_text()) == before
    write_lines(tmp_path / "corpus.jsonl", DOCUMENTS | {"d6": "one more"})
    with pytest.raises(InputError, match="begun with another vectors"):
        encode(["bm25", *source, "--precision", "float32"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--precision", "int8"], "kept in float16 or float32 alone"),
        (["--window", "8"], "--window: BM25 has one kind of vectors, of whole texts"),
        (["--language", "klingon"], "PyStemmer knows no such language"),
        (["--views", "a,b"], "--views: BM25 has one kind of vectors"),
    ],
)
def test_what_bm25_cannot_do_is_refused(flags, words, tmp_path):
    source = write_lines(tmp_path / "corpus.jsonl", DOCUMENTS)
    with pytest.raises(InputError, match=words):
        encode(["bm25", "--input", str(source), "--output", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_the_language_of_a_corpus_is_told_from_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(words_of_bm25, "SAMPLE", 8)
    german = "der Hund und die Katze sind in dem Haus, das nicht so alt ist"
    english = "the dog and the cat are in the house that is not so old as this"
    mixed = {f"d{n:02}": german if n < 20 else english for n in range(40)}
    sources = {"mixed": mixed, "german": dict.fromkeys(mixed, german)}
    for name, texts in sources.items():
        write_lines(tmp_path / f"{name}.jsonl", texts)

    def told(name: str) -> str:
        argv = ["--input", str(tmp_path / f"{name}.jsonl"), "--output", str(tmp_path / name), "--language", "auto"]
        encode(["bm25", *argv])
        return words_of_bm25.Bm25.load(tmp_path / name).analyzer.language

    assert told("german") == "de"
    with pytest.raises(InputError, match="--language auto: the words of .* documents do not tell"):
        told("mixed")
    assert words_of_bm25.spread(map(str, range(100))) == [str(n) for n in range(0, 100, 8)]
