"""MTEB's tasks through the command: its numbers against ours, what is run again, and what is refused."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DOCUMENTS, QRELS, QUERIES
from PIL import Image
from room_examples import EXAMPLES
from sentence_transformers import SentenceTransformer

from polyrep import InputError
from polyrep.cli import main
from polyrep.data import RetrievalDataset, load_retrieval_dataset
from polyrep.evaluation import evaluate as evaluation
from polyrep.evaluation.evaluate import evaluate
from polyrep.evaluation.metrics import METRICS, per_query_metrics
from polyrep.evaluation.mteb import open_suites
from polyrep.evaluation.systems import rank_with_model
from polyrep.hub import fingerprint, load, save
from polyrep.report import check_results, to_markdown

ROUNDED = 5.1e-6
"""MTEB rounds each score to five decimals."""


@pytest.fixture
def mteb(tmp_path, monkeypatch) -> Any:
    monkeypatch.setenv("MTEB_CACHE", str(tmp_path / "home"))  # the first import of mteb makes this folder
    return importlib.import_module("mteb")


@pytest.fixture
def make_task(mteb, monkeypatch) -> Callable[..., Any]:
    """Register a retrieval task with data of its own; the class counts in ``loads`` how often they are read."""
    from datasets import Dataset
    from mteb.abstasks import AbsTaskRetrieval

    def make(
        name: str,
        documents: list[dict[str, Any]] | None = None,
        qrels: dict[str, dict[str, int]] = QRELS,
        failure: list[BaseException] | None = None,
        languages: tuple[str, ...] = (),
        **other: Any,
    ) -> Any:
        described: dict[str, Any] = {
            "name": name,
            "dataset": {"path": "nobody/" + name, "revision": "0123abc"},
            "description": "A few lines about commands.",
            "type": "Retrieval",
            "category": "t2t",
            "modalities": ["text"],
            "eval_splits": ["test"],
            "eval_langs": {language: ["eng-Latn"] for language in languages} or ["eng-Latn"],
            "main_score": "ndcg_at_10",
        }

        class Local(AbsTaskRetrieval):
            metadata = mteb.TaskMetadata(**described | other)
            loads = 0

            def load_data(self, num_proc: int | None = None, **options: Any) -> None:
                type(self).loads += 1
                if failure:
                    raise failure.pop()
                rows = documents or [{"id": k, "title": "", "text": v} for k, v in DOCUMENTS.items()]
                self.dataset = {}
                for number, language in enumerate(languages or ("default",)):
                    judged = dict(list(qrels.items())[number:])
                    queries = [{"id": k, "text": v} for k, v in QUERIES.items() if k in judged]
                    parts = {"corpus": Dataset.from_list(rows), "queries": Dataset.from_list(queries)}
                    self.dataset[language] = {"test": parts | {"relevant_docs": judged, "top_ranked": None}}
                self.data_loaded = True

        Local.__name__ = name
        monkeypatch.setitem(sys.modules["mteb.get_tasks"]._TASKS_REGISTRY, name, Local)
        return Local

    return make


@pytest.fixture
def make_benchmark(mteb, monkeypatch) -> Callable[..., Any]:
    def make(name: str, *tasks: Any, **options: Any) -> Any:
        benchmark = mteb.Benchmark(name=name, tasks=list(tasks), **options)
        registry = importlib.import_module("mteb.benchmarks.get_benchmark")._build_registry()
        monkeypatch.setitem(registry, name, benchmark)
        return benchmark

    return make


@pytest.fixture
def folder(tmp_path, sentence_model) -> Path:
    sentence_model.save_pretrained(str(tmp_path / "one"))
    return tmp_path / "one"


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many texts each call of the dense model's ``encode`` got."""
    calls: list[int] = []
    original = SentenceTransformer.encode

    def counting(self: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        calls.append(len(inputs))
        return original(self, inputs, *rest, **options)

    monkeypatch.setattr(SentenceTransformer, "encode", counting)
    return calls


def run(tmp_path: Path, *arguments: str | Path) -> dict[str, Any]:
    caches = ["--cache_dir", tmp_path / "cache", "--mteb_cache", tmp_path / "kept"]
    return evaluate([*map(str, [*arguments, *caches])])


def values(results: dict[str, Any], dataset: str) -> dict[tuple[str, str], float]:
    return {(r["system"], r["metric"]): r["value"] for r in results["rows"] if r["dataset"] == dataset}


# Numbers


def test_every_family_gets_the_numbers_of_our_own_evaluation(
    tmp_path, make_task, beir, folder, sparse_model, multi_vector_model
):
    make_task("Tiny")
    for name, model in (("sparse", sparse_model), ("many", multi_vector_model)):
        model.save_pretrained(str(tmp_path / name))
    models = [folder, tmp_path / "sparse", tmp_path / "many"]
    out = tmp_path / "out"
    results = run(
        tmp_path, *models, "--dataset", beir, "--mteb", "Tiny", "--dtype", "float32", "--output", out, "--name", "x"
    )
    ours, theirs = values(results, beir.name), values(results, "Tiny")
    assert set(theirs) == {(model.name, metric) for model in models for metric in METRICS}  # and none of BM25
    assert set(ours) - set(theirs) == {("BM25", metric) for metric in METRICS}
    for row in theirs:
        assert theirs[row] == pytest.approx(ours[row], abs=ROUNDED)
    assert len({theirs[model.name, "nDCG@10"] for model in models}) == 3  # nobody got another's numbers

    written = json.loads((out / "x.json").read_text(encoding="utf-8"))
    check_results(written)
    assert written == results
    assert written["versions"]["mteb"] == sys.modules["mteb"].__version__
    for row in written["rows"]:
        named = row.get("hub_dataset"), row.get("hub_revision")
        assert named == (("nobody/Tiny", "0123abc") if row["dataset"] == "Tiny" else (None, None))
        assert ("interval" in row) == (row["dataset"] != "Tiny")
    markdown = (out / "x.md").read_text(encoding="utf-8")
    assert "## Tiny, test\n" in markdown and f"| one | {theirs['one', 'nDCG@10']:.3f} |" in markdown


def test_queries_of_an_asymmetric_room_are_encoded_as_queries(tmp_path, make_task, beir, backbone):
    model: Any = EXAMPLES["polyrep_toy"](backbone, tmp_path).models["retriever"]
    with torch.no_grad():
        model[0].model.head.task_bias.mul_(50)
    save(model, tmp_path / "toy")
    dataset = load_retrieval_dataset(beir)
    right = per_query_metrics(dataset, rank_with_model("toy", model, dataset, dtype="float32")[0])
    model.encode_query = model.encode_document
    wrong = per_query_metrics(dataset, rank_with_model("toy", model, dataset, dtype="float32")[0])
    assert abs(right["nDCG@10"].mean() - wrong["nDCG@10"].mean()) > 0.01  # the task is told by the numbers

    make_task("Tiny")
    found = values(run(tmp_path, tmp_path / "toy", "--mteb", "Tiny", "--trust_remote_code"), "Tiny")
    for metric in METRICS:
        assert found["toy", metric] == pytest.approx(right[metric].mean(), abs=ROUNDED)


def test_images_are_documents_too(tmp_path, make_task, backbone):
    model: Any = EXAMPLES["polyrep_dual_encoder"](backbone, tmp_path).models["retriever"]
    save(model, tmp_path / "dual")
    generator = np.random.default_rng(0)
    images = {key: Image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for key in DOCUMENTS}
    dataset = RetrievalDataset("images", "test", images, QUERIES, QRELS)
    expected = per_query_metrics(dataset, rank_with_model("dual", model, dataset, dtype="float32")[0])

    rows = [{"id": key, "image": image} for key, image in images.items()]
    make_task("Pictures", rows, category="t2i", modalities=["text", "image"], type="Any2AnyRetrieval")
    found = values(run(tmp_path, tmp_path / "dual", "--mteb", "Pictures", "--trust_remote_code"), "Pictures")
    for metric in METRICS:
        assert found["dual", metric] == pytest.approx(expected[metric].mean(), abs=ROUNDED)


def test_prompts_of_the_model_are_used(tmp_path, make_task, beir, sentence_model):
    make_task("Tiny")
    sentence_model.save_pretrained(str(tmp_path / "bare"))
    sentence_model.save_pretrained(str(tmp_path / "prompted"))
    config = tmp_path / "prompted" / "config_sentence_transformers.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"prompts": {"query": "list files: ", "document": "port "}}))
    assert fingerprint(tmp_path / "bare") != fingerprint(tmp_path / "prompted")
    models = [tmp_path / "bare", tmp_path / "prompted"]
    results = run(tmp_path, *models, "--dataset", beir, "--mteb", "Tiny", "--dtype", "float32")
    ours, theirs = values(results, beir.name), values(results, "Tiny")
    assert theirs["prompted", "nDCG@10"] == pytest.approx(ours["prompted", "nDCG@10"], abs=ROUNDED)
    assert theirs["bare", "nDCG@10"] != theirs["prompted", "nDCG@10"]


def test_another_main_score_keeps_its_name(tmp_path, make_task, folder):
    make_task("Tiny", main_score="map_at_10")
    results = run(tmp_path, folder, "--mteb", "Tiny")
    assert [row["metric"] for row in results["rows"]] == ["map_at_10"]
    assert "| system | map_at_10 |" in to_markdown(results)


# Benchmarks


def test_a_benchmark_has_a_mean_and_a_task_named_twice_runs_once(tmp_path, make_task, make_benchmark, folder):
    first, second = make_task("First"), make_task("Second", qrels={"q1": QRELS["q1"]})
    make_benchmark("Both", first(), second())
    results = run(tmp_path, folder, "--mteb", "Both", "Second", "Both")
    assert (first.loads, second.loads) == (1, 1)
    main_rows = {row["dataset"]: row for row in results["rows"] if row["metric"] == "nDCG@10"}
    assert list(main_rows) == ["First", "Second", "Both"]
    assert len(results["rows"]) == 2 * len(METRICS) + 1
    assert main_rows["First"]["value"] != main_rows["Second"]["value"]
    mean = (main_rows["First"]["value"] + main_rows["Second"]["value"]) / 2
    assert main_rows["Both"]["value"] == pytest.approx(mean, abs=1e-9)
    assert main_rows["Both"]["mean_of_tasks"] == main_rows["Both"]["tasks_of_benchmark"] == 2
    assert "hub_dataset" not in main_rows["Both"]
    assert "## Both, test (mean of 2 tasks)" in to_markdown(results)


def test_a_mean_of_different_scores_is_called_as_on_the_leaderboard(tmp_path, make_task, make_benchmark, folder):
    make_benchmark("Both", make_task("First")(), make_task("Second", main_score="map_at_10")())
    results = run(tmp_path, folder, "--mteb", "Both")
    (mean,) = [row for row in results["rows"] if row["dataset"] == "Both"]
    main = [row["value"] for row in results["rows"] if row["metric"] in ("nDCG@10", "map_at_10")]
    assert mean["metric"] == "Mean(Task)" and mean["value"] == pytest.approx(sum(main) / 2)


def test_private_data_are_left_out_of_the_mean_and_said_to_be(tmp_path, caplog, make_task, make_benchmark, folder):
    tasks = [make_task(name, qrels=dict(list(QRELS.items())[i:])) for i, name in enumerate(("First", "Second"))]
    closed = make_task("Closed", failure=[PermissionError("not yours")], is_public=False)
    make_benchmark("Three", *(task() for task in tasks), closed())
    results = run(tmp_path, folder, "--mteb", "Three")
    (mean,) = [row for row in results["rows"] if row["dataset"] == "Three"]
    main = [row["value"] for row in results["rows"] if row["metric"] == "nDCG@10" and row is not mean]
    assert len(main) == 2 and mean["value"] == pytest.approx(sum(main) / 2)
    assert (mean["mean_of_tasks"], mean["tasks_of_benchmark"]) == (2, 3)
    assert "## Three, test (mean of 2 of its 3 tasks)" in to_markdown(results)
    assert "keep the data to themselves: Closed" in caplog.text


def test_benchmarks_that_take_other_languages_of_a_task_do_not_mix_them(tmp_path, make_task, make_benchmark, folder):
    task = make_task("Tiny", languages=("one", "two"))  # "two" judges a query less
    make_benchmark("Part", task().filter_languages(None, hf_subsets=["two"]))
    results = run(tmp_path, folder, "--mteb", "Tiny", "Part")
    both, part = (values(results, name)["one", "nDCG@10"] for name in ("Tiny", "Tiny in Part"))
    make_task("Alone")
    alone = values(run(tmp_path, folder, "--mteb", "Alone"), "Alone")["one", "nDCG@10"]
    assert both != part and both == pytest.approx((alone + part) / 2, abs=ROUNDED)


def test_a_task_of_tasks_has_the_mean_that_mteb_gives_it(tmp_path, mteb, monkeypatch, make_task, folder, encoded):
    from mteb.abstasks.aggregate_task_metadata import AggregateTaskMetadata
    from mteb.abstasks.aggregated_task import AbsTaskAggregate

    parts = [make_task("First"), make_task("Second", qrels={"q1": QRELS["q1"]})]

    class Whole(AbsTaskAggregate):
        metadata = AggregateTaskMetadata(
            name="Whole",
            description="Two tasks as one.",
            tasks=[part() for part in parts],
            main_score="ndcg_at_10",
            type="Retrieval",
            eval_splits=["test"],
        )

    monkeypatch.setitem(sys.modules["mteb.get_tasks"]._TASKS_REGISTRY, "Whole", Whole)
    results = run(tmp_path, folder, "--mteb", "Whole", "First", "Second")
    scores = {row["dataset"]: row["value"] for row in results["rows"] if row["metric"] == "nDCG@10"}
    assert scores["First"] != scores["Second"]
    assert scores["Whole"] == pytest.approx((scores["First"] + scores["Second"]) / 2, abs=ROUNDED)
    assert not [row for row in results["rows"] if row["dataset"] == "Whole" and "hub_dataset" in row]
    encoded.clear()
    assert run(tmp_path, folder, "--mteb", "Whole", "First", "Second")["rows"] == results["rows"] and not encoded
    assert [part.loads for part in parts] == [1, 1]


def test_rows_of_a_hub_data_set_say_so_and_those_of_a_folder_do_not(tmp_path, monkeypatch, beir):
    monkeypatch.setattr(evaluation, "load_retrieval_dataset", lambda *_, **__: load_retrieval_dataset(beir))
    rows = run(tmp_path, "bm25", "--dataset", "somebody/tiny")["rows"]
    assert len(rows) == len(METRICS)
    assert all(row["hub_dataset"] == "somebody/tiny" and "hub_revision" not in row for row in rows)
    assert not any("hub_dataset" in row for row in run(tmp_path, "bm25", "--dataset", beir)["rows"])


# The cache


def test_what_is_kept_is_not_run_again_unless_the_model_changes(tmp_path, make_task, folder, encoded):
    make_task("Tiny")
    first = run(tmp_path, folder, "--mteb", "Tiny")
    assert sum(encoded) == len(DOCUMENTS) + len(QUERIES)

    def again(*flags: str | Path) -> tuple[int, dict[str, Any]]:
        encoded.clear()
        results = run(tmp_path, folder, "--mteb", "Tiny", *flags)
        return len(encoded), results

    calls, second = again()
    assert calls == 0 and second["rows"] == first["rows"]
    for flags in (["--max_length", "3"], ["--model_dtype", "bfloat16"]):
        assert again(*flags)[0] and not again(*flags)[0]
    model = load(folder)
    with torch.no_grad():
        model[0].model.embeddings.word_embeddings.weight.add_(
            torch.randn(model[0].model.embeddings.word_embeddings.weight.shape, generator=torch.manual_seed(0))
        )
    model.save_pretrained(str(folder))
    calls, retrained = again()
    assert calls and retrained["models"] != first["models"]
    assert retrained["rows"] != first["rows"]


def test_what_is_kept_of_other_data_is_not_served(tmp_path, make_task, folder, encoded):
    make_task("Tiny")
    run(tmp_path, folder, "--mteb", "Tiny")
    make_task("Tiny", dataset={"path": "nobody/Tiny", "revision": "4567def"})
    encoded.clear()
    results = run(tmp_path, folder, "--mteb", "Tiny")
    assert encoded and {row["hub_revision"] for row in results["rows"]} == {"4567def"}


def test_an_interrupted_benchmark_goes_on(tmp_path, make_task, make_benchmark, folder):
    first, second = make_task("First"), make_task("Second", failure=[KeyboardInterrupt()])
    make_benchmark("Both", first(), second())
    arguments = [str(folder), "--mteb", "Both", "--mteb_cache", str(tmp_path / "kept")]
    assert main(["evaluate", *arguments]) == 130
    assert main(["evaluate", *arguments]) == 0
    assert (first.loads, second.loads) == (1, 2)


def test_a_file_that_was_cut_off_is_made_again(tmp_path, make_task, folder):
    task = make_task("Tiny")
    first = run(tmp_path, folder, "--mteb", "Tiny")
    (kept,) = (tmp_path / "kept").rglob("Tiny.json")
    kept.write_text(kept.read_text()[:100])
    assert run(tmp_path, folder, "--mteb", "Tiny")["rows"] == first["rows"]
    assert task.loads == 2


def test_data_that_are_not_to_be_had_are_named_and_the_rest_is_kept(
    tmp_path, capsys, make_task, make_benchmark, folder
):
    lost = make_task("Lost", failure=[ConnectionError("no network")])
    make_benchmark("Both", lost(), make_task("First")())
    out = tmp_path / "out"
    with pytest.raises(InputError, match="no data set for Lost, so .* no file is written .*ConnectionError: no net"):
        run(tmp_path, folder, "--mteb", "Both", "--output", out)
    assert not out.exists()
    printed = capsys.readouterr().out
    assert "## First, test" in printed and "## Both" not in printed and "Lost" not in printed.partition("Made by")[0]
    results = run(tmp_path, folder, "--mteb", "Both", "--output", out)  # the network is back
    assert {row["dataset"] for row in results["rows"]} == {"First", "Lost", "Both"}


# Refusals


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("nanobeir", "'NanoBEIR'."),
        ("scifact", "'SciFact'."),
        ("mteb(chinese)", r"'MTEB\(cmn, v1\)'."),
        ("NanoSciFact", "'NanoSciFactRetrieval'"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(mteb, name, nearest):
    with pytest.raises(InputError, match=f"--mteb '.*': MTEB .* knows no benchmark .* Nearest: .*{nearest}"):
        open_suites(["NanoBEIR", name])


def test_an_alias_is_called_by_its_name(mteb, caplog):
    (suite,) = open_suites(["MTEB(Chinese)", "MTEB(cmn, v1)"])
    assert suite.name == "MTEB(cmn, v1)" and len(suite.tasks) > 1
    assert "MTEB(Chinese) is an alias; the benchmark and its rows are called MTEB(cmn, v1)" in caplog.text


def test_what_cannot_be_run_is_refused_before_anything_is(tmp_path, mteb, folder, multi_vector_model, encoded):
    with pytest.raises(InputError, match="knows no benchmark"):
        run(tmp_path, folder, "--mteb", "NanoBEIR", "Absent")
    multi_vector_model.save_pretrained(str(tmp_path / "many"))
    with pytest.raises(InputError, match="one: takes text, but image is what Vidore3FinanceEnRetrieval, .* give it"):
        run(tmp_path, folder, "--mteb", "NanoBEIR", "ViDoRe(v3)")
    with pytest.raises(InputError, match="many: has several vectors .* none of retrieval: Banking77Classification"):
        run(tmp_path, folder, tmp_path / "many", "--mteb", "NanoBEIR", "Banking77Classification")
    assert not encoded and not (tmp_path / "kept").exists()


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(InputError, match=r"mteb is not installed.*polyrep\[mteb\]"):
        evaluate([str(folder), "--mteb", "NanoBEIR"])


def test_flags_that_would_do_nothing_are_refused(tmp_path, mteb, folder):
    with pytest.raises(InputError, match="neither --dataset nor --mteb"):
        run(tmp_path, folder)
    with pytest.raises(InputError, match="bm25: has no part in --mteb"):
        run(tmp_path, "bm25", folder, "--mteb", "NanoBEIR")
    with pytest.raises(InputError, match="--token_pooling mean: rows of --dataset alone"):
        run(tmp_path, folder, "--mteb", "NanoBEIR", "--token_pooling", "mean")


def test_a_data_set_called_like_a_task_is_refused(tmp_path, make_task, beir, folder):
    make_task(beir.name)
    with pytest.raises(InputError, match=f"both would be '{beir.name}'"):
        run(tmp_path, folder, "--dataset", beir, "--mteb", beir.name)


@pytest.mark.parametrize("name", ["hub_dataset", "hub_revision", "mean_of_tasks", "tasks_of_benchmark"])
def test_fields_of_the_rows_have_their_types(tmp_path, make_task, make_benchmark, folder, name):
    make_benchmark("Both", make_task("First")(), make_task("Second")())
    results = run(tmp_path, folder, "--mteb", "Both")
    check_results(results)
    broken = [row | {name: [row[name]]} if name in row else row for row in results["rows"]]
    with pytest.raises(InputError, match=f"field '{name}' is "):
        check_results(results | {"rows": broken})
