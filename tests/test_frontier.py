"""The frontier command on real pages and tiny random models, and its advice on tables with known answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from polyrep.candidates import METHODS
from polyrep.data import load_retrieval_dataset
from polyrep.evaluation import evaluate


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pages, and the questions that ask for them: two in three to learn from."""
    source = load_retrieval_dataset(ROOT / "data" / "tldr_pages", "train")
    asked = dict(list((query, next(iter(judged))) for query, judged in source.qrels.items())[:40])
    folder = tmp_path_factory.mktemp("data") / "pages"
    (folder / "qrels").mkdir(parents=True)
    documents = dict.fromkeys(asked.values())
    for stem, texts in (("corpus", {d: source.corpus[d] for d in documents}), ("queries", source.queries)):
        wanted = {key: texts[key] for key in (documents if stem == "corpus" else asked)}
        lines = [json.dumps({"_id": key, "text": text}) for key, text in wanted.items()]
        (folder / f"{stem}.jsonl").write_text("\n".join(lines) + "\n")
    for split, place in (("train", (0, 1)), ("test", (2,))):
        lines = [f"{q}\t{d}\t1" for number, (q, d) in enumerate(asked.items()) if number % 3 in place]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory, sentence_model, multi_vector_model, sparse_model) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {"dense": sentence_model, "late": multi_vector_model, "sparse": sparse_model}
    for name, model in made.items():
        model.save_pretrained(str(folder / name))
    return {name: folder / name for name in made}


def run(folder: Path, model: Path, *flags: Any, fit_seconds: float = 1.0) -> dict[str, Any]:
    where = ["--cache_dir", folder / "embeddings", "--frontier_cache", folder / "kept"]
    argv = [model, "--frontier", *where, "--fit_seconds", fit_seconds, "--model_dtype", "float32", *flags]
    return evaluate([str(word) for word in argv])


def main_rows(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["system"]: row for row in results["rows"] if row["metric"] == "nDCG@10"}


@pytest.fixture(scope="module")
def late(tmp_path_factory, pages, models) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("late")
    named = [name for name in METHODS if name != "lemur"]
    flags = ["--methods", *named, "--budget", "bytes=64", "--budget", "ms=1000", "--output", folder / "out"]
    return folder, run(folder, models["late"], "--dataset", pages, *flags)


def test_every_method_of_a_late_interaction_model_has_its_rows(late):
    rows = main_rows(late[1])
    assert late[1]["failures"] == []
    print(sorted(rows))
