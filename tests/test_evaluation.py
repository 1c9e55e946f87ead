"""Metrics against loops and against MTEB, intervals against the textbook, and the command from end to end."""

from __future__ import annotations

import json
import math
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_beir
from PIL import Image
from world import write_world

from polyrep import InputError, report
from polyrep.cli import main
from polyrep.data import RetrievalDataset, load_retrieval_dataset
from polyrep.evaluation import statistics, table
from polyrep.evaluation.bm25 import rank_with_bm25
from polyrep.evaluation.evaluate import evaluate
from polyrep.evaluation.metrics import METRICS, per_query_metrics
from polyrep.evaluation.statistics import bootstrap_interval, compare, holm
from polyrep.evaluation.systems import Ranking, rank_with_model
from polyrep.hub import fingerprint, load
from polyrep.hub.folder import fastest_dtype
from polyrep.report import check_results

# Metrics


def dcg(gains: list[int]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))


def brute_force(judged: dict[str, int], ranked: list[str]) -> dict[str, float]:
    gains = [judged.get(document, 0) for document in ranked]
    ideal = sorted(judged.values(), reverse=True)
    relevant = sum(gain > 0 for gain in judged.values())
    first = next((rank for rank, gain in enumerate(gains[:10], start=1) if gain > 0), math.inf)
    return {
        "nDCG@10": dcg(gains[:10]) / dcg(ideal[:10]) if relevant else 0.0,
        "nDCG@3": dcg(gains[:3]) / dcg(ideal[:3]) if relevant else 0.0,
        "MRR@10": 1 / first,
        "Recall@100": sum(gain > 0 for gain in gains[:100]) / relevant if relevant else 0.0,
    }


def ranked(scores: np.ndarray, ids: list[str], depth: int = 1000) -> tuple[Ranking, list[list[str]]]:
    """The ranking of ``(queries, documents)`` scores, ties by higher id, and the same as lists of ids."""
    order = [sorted(range(len(ids)), key=lambda i, s=row: (s[i], ids[i]), reverse=True)[:depth] for row in scores]
    ranking = Ranking("any", np.array(order), np.take_along_axis(scores, np.array(order), axis=1))
    return ranking, [[ids[i] for i in row] for row in order]


def judged(qrels: dict[str, dict[str, int]], ids: list[str]) -> RetrievalDataset:
    return RetrievalDataset("any", "test", dict.fromkeys(ids, "text"), dict.fromkeys(qrels, "text"), qrels)


def test_a_querys_own_document_is_none_that_it_found():
    ids = [f"d{i}" for i in range(130)]
    scores = np.array([-np.arange(130.0)] * 2)
    corpus = dict.fromkeys(ids, "text") | {"d0": "A question"}
    qrels = {"d0": {"d10": 1, "d100": 2}, "q": {"d10": 1, "d100": 2}}
    dataset = RetrievalDataset("any", "test", corpus, {"d0": "a question", "q": "a question"}, qrels)
    found = per_query_metrics(dataset, ranked(scores, ids)[0])
    for row, own in enumerate(([0], [])):
        expected = brute_force(qrels["d0"], [i for i in ids if int(i[1:]) not in own])
        assert {metric: values[row] for metric, values in found.items()} == pytest.approx(expected)
    assert found["MRR@10"].tolist() == [1 / 10, 0] and found["Recall@100"].tolist() == [1, 0.5]


def test_queries_that_are_documents_are_measured_without_themselves(tmp_path, folders):
    texts = {
        "a": "print a file",
        "b": "show open ports",
        "c": "pack a folder",
        "a2": "show a file",
        "b2": "list ports",
    }
    folder = tmp_path / "twins"
    (folder / "qrels").mkdir(parents=True)
    for stem, chosen in (("corpus", texts), ("queries", {q: texts[q] for q in "ab"})):
        lines = [json.dumps({"_id": i, "text": text}) + "\n" for i, text in chosen.items()]
        (folder / f"{stem}.jsonl").write_text("".join(lines))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\na\ta2\t1\nb\tb2\t1\n")
    results = run(tmp_path, folders["one"], "--dataset", folder)
    values = {row["system"]: row["value"] for row in results["rows"] if row["metric"] == "nDCG@10"}
    assert values["BM25"] == 1  # each finds the one other document with a word of it
    assert results["notes"] == [
        "twins, test: 2 of 2 queries have the id of a document, which is the query itself; for that query it is left "
        "out of what is found."
    ]


def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_measured(tmp_path, beir, capsys):
    (tmp_path / "file").write_text("")
    for flags, said in (
        (["--output", tmp_path / "file"], "file is no folder"),
        (["--output", tmp_path / "file" / "below"], "file is no folder"),
        (["--output", tmp_path / ("x" * 300)], "cannot be written to (File name too long)"),
        (["--output", tmp_path / "new", "--name", "a/b"], "--name 'a/b'"),
    ):
        argv = ["evaluate", "no-such-model", "--dataset", str(beir), *map(str, flags)]
        assert main(argv) == 2
        assert said in capsys.readouterr().err
    assert main(["evaluate", "bm25", "--dataset", str(beir), "--split", "no", "--output", str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("flags", [["--baselines", "none"], ["--frontier"]], ids=["table", "frontier"])
def test_a_cache_that_cannot_be_written_to_is_refused_at_the_start(tmp_path, beir, folders, capsys, flags):
    (tmp_path / "file").write_text("")
    argv = ["evaluate", folders["one"], *flags, "--dataset", beir, "--cache_dir", tmp_path / "file" / "below"]
    assert main([*map(str, argv)]) == 2
    assert f"--cache_dir {tmp_path / 'file' / 'below'}: {tmp_path / 'file'} is no folder" in capsys.readouterr().err


def test_a_table_is_printed_though_it_cannot_be_written(tmp_path, beir, capsys, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write_json", full)
    argv = ["evaluate", "bm25", "--dataset", beir, "--baselines", "none", "--output", tmp_path / "out", "--name", "n"]
    assert main([*map(str, argv)]) == 2
    said = capsys.readouterr()
    assert "| BM25 |" in said.out and "n.json, .md and .png could not be written" in said.err
    assert "No space left" in said.err


@pytest.mark.parametrize("texts", [["\U0001f431", "!"], ["the of", "a b"]])
def test_a_corpus_without_a_word_for_bm25_is_refused_before_anything_is_encoded(tmp_path, texts, capsys):
    folder = tmp_path / "wordless"
    (folder / "qrels").mkdir(parents=True)
    rows = [json.dumps({"_id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("".join(rows))
    (folder / "queries.jsonl").write_text(rows[0])
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nd0\td1\t1\n")
    assert main(["evaluate", "bm25", "--dataset", str(folder)]) == 2
    assert "wordless: no document has a word" in (said := capsys.readouterr().err) and "--baselines none" in said


@pytest.mark.parametrize("levels", [4, 30, 10**6])  # how many scores there are: from ties everywhere to none
def test_metrics_are_what_a_loop_finds(levels):
    rng = np.random.default_rng(levels)
    ids = [f"d{i}" for i in rng.permutation(130)]  # "d9" is higher than "d10"
    qrels = {}
    for query in range(40):
        documents = rng.choice(ids, size=rng.integers(1, 25), replace=False).tolist()
        qrels[f"q{query}"] = {d: int(grade) for d, grade in zip(documents, rng.integers(0, 4, 25), strict=False)}
    qrels["q-nothing-relevant"] = {ids[0]: 0}
    scores = rng.integers(-levels, levels, size=(len(qrels), len(ids))).astype(np.float32) / 8
    ranking, lists = ranked(scores, ids, depth=110)
    found = per_query_metrics(judged(qrels, ids), ranking)
    expected = [brute_force(qrels[query], row) for query, row in zip(qrels, lists, strict=True)]
    assert tuple(found) == METRICS
    for metric in METRICS:
        np.testing.assert_allclose(found[metric], [e[metric] for e in expected], rtol=1e-9, err_msg=metric)
        assert len(set(found[metric])) > 3  # the cases differ


def test_a_tie_goes_to_the_higher_id():
    ids = ["a", "b", "c"]
    scores = np.array([[1.0, 1.0, 0.5]] * 2, np.float32)
    found = per_query_metrics(judged({"lower": {"a": 1}, "higher": {"b": 1}}, ids), ranked(scores, ids)[0])
    assert found["MRR@10"].tolist() == [1 / 2, 1]
    np.testing.assert_allclose(found["nDCG@3"], [1 / math.log2(3), 1])


@pytest.mark.parametrize("tied", [False, True])
def test_a_document_at_rank_11_is_beyond_the_first_ten(tied):
    ids = [f"d{i:02}" for i in range(12, 0, -1)]
    scores = np.zeros((1, 12), np.float32) if tied else -np.arange(12, dtype=np.float32)[None]
    for document, rank in (("d03", 10), ("d02", 11)):
        found = per_query_metrics(judged({"q": {document: 2}}, ids), ranked(scores, ids)[0])
        assert found["MRR@10"].tolist() == [1 / 10 if rank == 10 else 0]
        np.testing.assert_allclose(found["nDCG@10"], [1 / math.log2(11) if rank == 10 else 0])
        assert (found["nDCG@3"].tolist(), found["Recall@100"].tolist()) == ([0], [1])


def read(folder: Path, stem: str) -> list[dict[str, str]]:
    """Rows of a BEIR file with the names that MTEB gives to columns, read without polyrep."""
    rows = map(json.loads, (folder / f"{stem}.jsonl").read_text(encoding="utf-8").splitlines())
    return [{"id": row["_id"], "title": row.get("title", ""), "text": row["text"]} for row in rows]


@pytest.mark.filterwarnings("ignore:The `get_sentence_embedding_dimension`:FutureWarning")
@pytest.mark.parametrize("titled", [False, True])
def test_mteb_finds_the_same_numbers_for_every_query(tmp_path, monkeypatch, static_model, titled):
    monkeypatch.setenv("MTEB_CACHE", str(tmp_path))  # the first import of mteb makes this folder
    import mteb
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    folder = write_world(tmp_path / "world")
    if not titled:
        rows = [json.loads(line) | {"title": ""} for line in (folder / "corpus.jsonl").read_text().splitlines()]
        (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = load_retrieval_dataset(folder)
    per_query: dict[str, dict[str, float]] = {}

    class Local(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="Local",
            dataset={"path": str(folder), "revision": "local"},
            description="A folder in BEIR layout.",
            type="Retrieval",
            category="t2t",
            modalities=["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, num_proc: int | None = None, **options: Any) -> None:
            judgments: dict[str, dict[str, int]] = {}
            for line in (folder / "qrels" / "test.tsv").read_text(encoding="utf-8").splitlines()[1:]:
                query, document, score = line.split("\t")
                judgments.setdefault(query, {})[document] = int(score)
            queries = [{k: v for k, v in row.items() if k != "title"} for row in read(folder, "queries")]
            split = {
                "corpus": Dataset.from_list(read(folder, "corpus")),
                "queries": Dataset.from_list([row for row in queries if row["id"] in judgments]),
                "relevant_docs": judgments,
                "top_ranked": None,
            }
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

        def task_specific_scores(self, scores: dict[str, dict[str, float]], *rest: Any, **options: Any) -> dict:
            per_query.update(scores)  # MTEB itself keeps means of five decimals only
            return {}

    options = {"show_progress_bar": False, "co2_tracker": False}
    means = mteb.evaluate(static_model, Local(), cache=None, **options).task_results[0].scores["test"][0]
    found = per_query_metrics(dataset, rank_with_model("static", static_model, dataset, dtype="float32")[0])
    assert set(per_query) == set(dataset.queries) and len(per_query) > 50
    for metric, measure in (("nDCG@10", "ndcg_cut_10"), ("nDCG@3", "ndcg_cut_3"), ("Recall@100", "recall_100")):
        theirs = [per_query[query][measure] for query in dataset.queries]
        np.testing.assert_allclose(found[metric], theirs, atol=1e-6, err_msg=metric)
    assert found["MRR@10"].mean() == pytest.approx(means["mrr_at_10"], abs=1e-6)
    assert found["nDCG@10"].mean() == pytest.approx(means["ndcg_at_10"], abs=1e-5)
    assert 0.1 < found["nDCG@10"].mean() < 0.9  # a model that finds something and misses something


# Intervals and comparisons


def test_the_interval_of_many_queries_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).beta(2, 1, 500)
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    samples = np.random.default_rng(1).beta(2, 1, size=(400, 60))  # of mean 2/3
    intervals = [bootstrap_interval(sample, seed, resamples=400) for seed, sample in enumerate(samples)]
    covered = np.mean([low <= 2 / 3 <= high for low, high in intervals])
    assert 0.95 - 4 * math.sqrt(0.95 * 0.05 / 400) < covered < 0.99


def test_seeds_are_averaged_for_each_query_first():
    values = np.random.default_rng(2).random((5, 80))
    assert bootstrap_interval(values) == bootstrap_interval(values.mean(axis=0))
    low, high = bootstrap_interval(values)
    flat_low, flat_high = bootstrap_interval(np.concatenate([values.mean(axis=0)] * 5))  # as if queries were 400
    assert high - low > 1.5 * (flat_high - flat_low)
    reference = np.random.default_rng(3).random((3, 80))
    assert compare({"a": values}, reference) == compare({"a": values.mean(axis=0)}, reference.mean(axis=0))


def test_a_seed_decides_the_resampling():
    values = np.random.default_rng(4).random(50)
    assert bootstrap_interval(values, seed=7) == bootstrap_interval(values, seed=7)
    assert bootstrap_interval(values, seed=7) != bootstrap_interval(values, seed=8)
    other = values[::-1]
    assert compare({"a": other}, values, seed=7) == compare({"a": other}, values, seed=7)
    assert compare({"a": other}, values, seed=7) != compare({"a": other}, values, seed=8)


def test_queries_are_drawn_with_replacement():
    means = statistics._resampled_means(np.array([0.0, 1.0, 2.0]), 0, 30_000)
    expected = {0: 1, 1: 3, 2: 6, 3: 7, 4: 6, 5: 3, 6: 1}  # of the 27 triples of 0, 1, 2 how many have this sum
    sums, counts = np.unique(np.round(3 * means).astype(int), return_counts=True)
    assert sums.tolist() == list(expected)
    np.testing.assert_allclose(counts / 30_000, np.array(list(expected.values())) / 27, atol=0.01)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_clear_difference_has_its_sign_and_size_and_a_small_p(sign):
    rng = np.random.default_rng(5)
    reference = rng.random(200)
    system = reference + sign * rng.normal(0.1, 0.05, 200)
    (outcome,) = compare({"a": system}, reference)
    assert outcome["difference"] == pytest.approx(system.mean() - reference.mean())
    low, high = outcome["difference_interval"]
    assert low < outcome["difference"] < high and low * high > 0
    assert outcome["p_value"] == pytest.approx(2 / 10_001)  # no resample on the other side


def test_equal_systems_do_not_differ():
    values = np.random.default_rng(6).random(100)
    assert compare({"same": values.copy()}, values) == [
        {"difference": 0.0, "difference_interval": [0.0, 0.0], "p_value": 1.0}
    ]


def test_a_small_difference_on_every_query_counts_although_the_intervals_overlap():
    rng = np.random.default_rng(7)
    reference = rng.random(300)
    system = reference + rng.normal(0.005, 0.01, 300)
    (low, _), (_, high) = bootstrap_interval(system), bootstrap_interval(reference)
    assert low < high
    assert compare({"a": system}, reference)[0]["p_value"] < 0.01
    assert compare({"a": rng.permutation(system)}, reference)[0]["p_value"] > 0.05  # the pairs torn apart


@pytest.mark.parametrize("shift", [0.0, 0.01, 0.02, 0.03, 0.04, 0.06])
def test_p_is_below_5_percent_where_the_interval_leaves_out_zero(shift):
    rng = np.random.default_rng(8)
    reference = rng.random(150)
    differences = rng.normal(0, 0.15, 150)
    (outcome,) = compare({"a": reference + differences - differences.mean() + shift}, reference)
    low, high = outcome["difference_interval"]
    assert (outcome["p_value"] < 0.05) == (low > 0 or high < 0)
    error = differences.std() / math.sqrt(150)
    assert outcome["p_value"] == pytest.approx(math.erfc(shift / error / math.sqrt(2)), abs=0.02)  # a z test


def test_holm_multiplies_the_smallest_by_their_number_and_so_on():
    # In order: 0.005 * 4 = 0.02, 0.01 * 3 = 0.03, 0.03 * 2 = 0.06, 0.04 * 1 = 0.04, which may not fall below 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5, 0.001]) == pytest.approx([1.0, 1.0, 0.003])
    assert holm([0.2]) == [0.2] and holm([]) == []


def test_holm_keeps_the_order_and_lies_between_none_and_bonferroni():
    p_values = np.random.default_rng(9).random(20) ** 3
    corrected = np.array(holm(p_values.tolist()))
    assert (np.diff(corrected[np.argsort(p_values)]) >= 0).all()
    assert (corrected >= p_values).all() and (corrected <= np.minimum(1, 20 * p_values)).all()


def test_each_system_of_a_table_is_corrected_for_the_others():
    rng = np.random.default_rng(10)
    reference = rng.random(100)
    systems = {f"s{i}": reference + rng.normal(0.01 * i, 0.1, 100) for i in range(4)}
    alone = [compare({name: values}, reference)[0] for name, values in systems.items()]
    together = compare(systems, reference)
    assert [o["p_value"] for o in together] == pytest.approx(holm([o["p_value"] for o in alone]))
    assert [o["difference"] for o in together] == [o["difference"] for o in alone]


def test_the_seed_reaches_every_interval_and_test_of_a_table():
    rng, ids = np.random.default_rng(11), [f"d{i}" for i in range(30)]
    dataset = judged({f"q{i}": {ids[i]: 1} for i in range(30)}, ids)
    good, poor = ((np.eye(30) + rng.normal(0, noise, (30, 30))).astype(np.float32) for noise in (0.4, 0.6))
    rankings = [replace(ranked(scores, ids)[0], system=name) for name, scores in (("good", good), ("poor", poor))]
    tables = {seed: table.table_rows(dataset, rankings, "poor", seed) for seed in (1, 2)}
    for seed, rows in tables.items():
        for ranking, row in zip([r for r in rankings for _ in METRICS], rows, strict=True):
            values = per_query_metrics(dataset, ranking)[row["metric"]]
            assert row["interval"] == list(bootstrap_interval(values, seed))
        values, reference = (per_query_metrics(dataset, ranking)["nDCG@10"] for ranking in rankings)
        assert compare({"good": values}, reference, seed)[0].items() < rows[0].items()
    assert tables[1][0]["interval"] != tables[2][0]["interval"]
    assert tables[1][0]["difference_interval"] != tables[2][0]["difference_interval"]


# The command


@pytest.fixture
def folders(tmp_path, sentence_model, multi_vector_model) -> dict[str, Path]:
    """Saved models by row name."""
    found = {"one": tmp_path / "one", "many": tmp_path / "many" / "final"}
    sentence_model.save_pretrained(str(found["one"]))
    multi_vector_model.save_pretrained(str(found["many"]))
    return found


def run(tmp_path: Path, *arguments: str | Path) -> dict[str, Any]:
    return evaluate([*map(str, arguments), "--cache_dir", str(tmp_path / "cache")])


def test_a_run_writes_table_picture_and_numbers(tmp_path, capsys, beir, folders):
    out = tmp_path / "out"
    arguments = [
        *folders.values(),
        "--dataset",
        beir,
        "--token_pooling",
        "mean",
        "1",
        "2",
        "--output",
        out,
        "--name",
        "x",
    ]
    results = run(tmp_path, *arguments, "--seed", 3, "--settings_tried", 5)

    written = json.loads((out / "x.json").read_text(encoding="utf-8"))
    check_results(written)
    assert written == results
    assert (written["seeds"], written["settings_tried"]) == ([3], 5)
    assert written["models"] == {name: fingerprint(folder) for name, folder in folders.items()}
    command = shlex.split(written["command"])
    assert command[:2] == ["polyrep", "evaluate"] and command[2:4] == [str(f) for f in folders.values()]

    systems = ["BM25", "one", "many", "many, mean", "many, hierarchical 1", "many, hierarchical 2"]
    rows = {(row["system"], row["metric"]): row for row in written["rows"]}
    assert list(rows) == [(system, metric) for system in systems for metric in METRICS]
    dataset = load_retrieval_dataset(beir)
    rankings = [rank_with_bm25(dataset), *rank_with_model("one", load(folders["one"]), dataset)]
    rankings += rank_with_model("many", load(folders["many"]), dataset, pooling=["mean", "1", "2"])
    for ranking in rankings:
        for metric, values in per_query_metrics(dataset, ranking).items():
            row = rows[ranking.system, metric]
            assert row["value"] == pytest.approx(values.mean())
            assert row["interval"] == list(bootstrap_interval(values, seed=3))
            assert (row["dataset"], row["split"], row["queries"]) == (beir.name, "test", 3)
        main_row = rows[ranking.system, "nDCG@10"]
        assert main_row["bytes_per_document"] == pytest.approx(ranking.costs["bytes_per_document"])
        if ranking.system == "BM25":
            assert "reference" not in main_row and "p_value" not in main_row
        else:
            assert main_row["reference"] == "BM25"
            assert main_row["difference"] == pytest.approx(main_row["value"] - rows["BM25", "nDCG@10"]["value"])

    markdown = (out / "x.md").read_text(encoding="utf-8")
    assert markdown in capsys.readouterr().out
    for system in systems:
        assert f"| {system} | {rows[system, 'nDCG@10']['value']:.3f} [" in markdown
    with Image.open(out / "x.png") as image:
        assert image.format == "PNG" and image.size == (int((1 + 4.5) * 144), int((0.6 + 3.2) * 144))


def test_the_last_baseline_is_the_reference_unless_another_is_named(tmp_path, beir, folders):
    def reference(*arguments: str | Path) -> set[str]:
        results = run(tmp_path, folders["many"], "--dataset", beir, *arguments)
        return {row["reference"] for row in results["rows"] if "reference" in row}

    assert reference("--baselines", f"bm25,{folders['one']}") == {"one"}
    assert reference("--baselines", f"bm25,{folders['one']}", "--reference", "BM25") == {"BM25"}
    assert reference("--token_pooling", "1", "--reference", "many, hierarchical 1") == {"many, hierarchical 1"}
    assert reference("--baselines", "none", "--token_pooling", "mean") == {"many"}


def test_a_length_for_a_bag_of_words_is_refused(tmp_path, beir, static_model):
    static_model.save_pretrained(str(tmp_path / "static"), create_model_card=False)
    with pytest.raises(InputError, match="has no maximal length, so --max_length 4 means nothing"):
        run(tmp_path, tmp_path / "static", "--dataset", beir, "--baselines", "none", "--max_length", 4)


def test_flags_reach_the_model_and_the_index(tmp_path, beir, folders):
    arguments = [folders["one"], "--dataset", beir, "--baselines", "none"]
    results = run(tmp_path, *arguments, "--max_length", 4, "--dtype", "float32", "--model_dtype", "bfloat16")
    kept = sorted((tmp_path / "cache").iterdir())
    dataset, model = load_retrieval_dataset(beir), load(folders["one"], dtype=torch.bfloat16)
    model.max_seq_length = 4
    ranking = rank_with_model("one", model, dataset, dtype="float32", cache_dir=tmp_path / "cache")[0]
    assert len(kept) == 2 and sorted((tmp_path / "cache").iterdir()) == kept  # the same model, settings and texts
    main_row = results["rows"][0]
    assert main_row["bytes_per_document"] == 32 * 4
    assert main_row["value"] == per_query_metrics(dataset, ranking)["nDCG@10"].mean()


def test_every_data_set_has_its_own_rows(tmp_path, beir, folders):
    other = write_beir(tmp_path / "other", split="dev")
    write = other / "queries.jsonl"
    write.write_text(write.read_text().replace("show open ports", "print a file"))
    (beir / "qrels" / "dev.tsv").write_text((beir / "qrels" / "test.tsv").read_text())
    results = run(tmp_path, "bm25", "--dataset", beir, other, "--split", "dev")
    values = {row["dataset"]: row["value"] for row in results["rows"] if row["metric"] == "nDCG@10"}
    for folder in (beir, other):
        dataset = load_retrieval_dataset(folder, "dev")
        assert values[folder.name] == per_query_metrics(dataset, rank_with_bm25(dataset))["nDCG@10"].mean()
    assert values[beir.name] != values["other"]


REFUSED = {
    "--reference minilm": "--reference 'minilm': no such system; there are 'BM25', 'one'",
    "--reference many": "--reference 'many': no such system",
    "--token_pooling mean": "--token_pooling mean: no model here has several vectors",
    "--model_dtype float8": "--model_dtype 'float8': use float32, bfloat16, float16 or auto",
    "--dtype int8": "dtype 'int8': caches hold float16 or float32",
    "--baselines bm25,absent": "absent: no such folder",
    "--split absent": "no judgments for split 'absent'; it has .'test'.",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_cannot_be_used_is_refused_before_anything_is_encoded(tmp_path, beir, folders, flags):
    with pytest.raises(InputError, match=REFUSED[flags]):
        run(tmp_path, folders["one"], "--dataset", beir, "--output", tmp_path / "out", *flags.split())
    assert not (tmp_path / "cache").exists() and not (tmp_path / "out").exists()


def test_a_type_of_weights_that_is_none_is_refused_before_anything_is_read(monkeypatch):
    module = sys.modules[evaluate.__module__]
    monkeypatch.setattr(module, "load_retrieval_dataset", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(InputError, match="float8"):
        evaluate(["bm25", "--dataset", "nowhere", "--model_dtype", "float8"])


def test_a_pooling_that_is_none_is_refused_before_anything_is_encoded(tmp_path, beir, folders):
    with pytest.raises(InputError, match="pooling 'median': expected `mean` or a number"):
        run(tmp_path, folders["many"], "--dataset", beir, "--token_pooling", "median")
    assert not (tmp_path / "cache").exists()


def test_a_reference_that_no_pooling_made_is_refused(tmp_path, beir, folders):
    with pytest.raises(InputError, match="'many, mean': no such system; there are 'BM25', 'many'"):
        run(tmp_path, folders["many"], "--dataset", beir, "--reference", "many, mean")


def test_two_sources_of_one_name_are_refused(tmp_path, beir, folders):
    twin = folders["many"].rename(tmp_path / "many" / "one")
    with pytest.raises(InputError, match=f"{folders['one']} and {twin}: both would be 'one'"):
        run(tmp_path, folders["one"], twin, "--dataset", beir)
    second = write_beir(tmp_path / "copy" / beir.name)
    with pytest.raises(InputError, match=f"{beir} and {second}: both would be '{beir.name}'"):
        run(tmp_path, folders["one"], "--dataset", beir, second)


def test_the_command_line_says_what_is_wrong_and_returns_2(capsys, beir):
    assert main(["evaluate", "bm25", "--dataset", str(beir), "--reference", "absent"]) == 2
    assert capsys.readouterr().err.startswith("error: --reference 'absent'")


@pytest.mark.parametrize(
    ("system", "name"),
    [
        ("bm25", "BM25"),
        ("minilm", "all-MiniLM-L6-v2"),
        ("sentence-transformers/all-MiniLM-L6-v2", "all-MiniLM-L6-v2"),
        ("runs/late/final", "late"),
        ("runs/late/final/", "late"),
        ("runs/late/step-10", "step-10"),
        ("final", "final"),
    ],
)
def test_a_row_is_called_like_its_folder(system, name):
    assert table.display_name(system) == name


@pytest.mark.parametrize("capability", ["avx512_bf16", "amx_bf16", None])
def test_automatic_weights_are_halved_where_the_processor_can(monkeypatch, capability):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True, "avx2": True}, raising=False)
    assert fastest_dtype("auto") == (torch.bfloat16 if capability else torch.float32)


@pytest.mark.parametrize("seed", range(20))
def test_metrics_are_those_of_trec_eval_to_the_last_digit(seed):
    """Ties in scores, ids whose order differs from their places, grades from -1 to 3, queries that nothing answers."""
    pytrec_eval = pytest.importorskip("pytrec_eval", reason="no wheel for Linux aarch64")
    rng = np.random.default_rng(seed)
    documents = [f"{name}{'é' * (name % 3)}" for name in rng.permutation(150)]
    depth = int(rng.choice([1, 2, 7, 10, 30, 120, 150]))
    qrels = {}
    for query in (f"q{number}" for number in range(40)):
        judged = rng.choice(documents, int(rng.integers(1, 40)), replace=False)
        qrels[query] = {
            document: int(grade) for document, grade in zip(judged, rng.integers(-1, 4, len(judged)), strict=True)
        }
    qrels["q0"] = {documents[0]: 0, documents[1]: -1}
    qrels["q1"]["not in the corpus"] = 3
    positions = np.stack([rng.permutation(150)[:depth] for _ in qrels])
    scores = -np.sort(-rng.integers(0, 12, positions.shape) / 7, axis=1).astype(np.float32)
    corpus = dict.fromkeys(documents, "text")
    dataset = RetrievalDataset("made", "test", corpus, dict.fromkeys(qrels, "text"), qrels)
    found = per_query_metrics(dataset, Ranking("made", positions, scores))
    run = {
        query: {documents[p]: float(s) for p, s in zip(*pair, strict=True)}
        for query, *pair in zip(qrels, positions, scores, strict=True)
    }
    measured = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.3,10", "recall.100", "recip_rank"}).evaluate(run)
    names = {"nDCG@10": "ndcg_cut_10", "nDCG@3": "ndcg_cut_3", "Recall@100": "recall_100", "MRR@10": "recip_rank"}
    for metric, name in names.items():
        expected = np.array([measured[query][name] for query in qrels])
        if metric == "MRR@10":
            expected[expected < 1 / 10.5] = 0
        np.testing.assert_array_max_ulp(found[metric], expected, 0)
