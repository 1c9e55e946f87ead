"""The frontier command on real pages and tiny random models, and its advice on tables with known answers."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Pooling
from test_retrievers import vectors_of
from test_routed import looped
from test_scoring import dense
from transformers import AutoModel, BertConfig, BertTokenizer
from world import write_world

from polyrep import InputError
from polyrep.cli import main
from polyrep.encoding.windows import Windows
from polyrep.evaluation.frontier import command as frontier
from polyrep.evaluation.frontier import fit
from polyrep.evaluation.frontier import rows as candidates
from polyrep.evaluation.frontier.advice import fronts, parse_budget, recommend
from polyrep.evaluation.frontier.fit import REHEARSED, SHARE, fit_within
from polyrep.evaluation.frontier.fit_data import FitData, cloze_queries, in_measured_fifth, judged_queries
from polyrep.evaluation.frontier.full_model import FullModel
from polyrep.evaluation.frontier.picture import area, draw, labelled
from polyrep.evaluation.frontier.rivals import RIVALS
from polyrep.evaluation.frontier.rows import FULL, Candidate, Encoded, Method, quantized
from polyrep.evaluation.frontier.timed import rank_when_ready
from polyrep.hub import load
from polyrep.methods import CitadelPooling, UnifierModel
from polyrep.methods.citadel import frontier as citadel
from polyrep.methods.dense2sparse import frontier as dense2sparse
from polyrep.methods.unifier import frontier as unifier
from polyrep.report import write_results
from polyrep.search import exact_search
from polyrep.search.weighted import View, find_candidates
from polyrep.training.arguments import HeadArguments, RecipeArguments
from polyrep.training.datasets import datasets_of

WORDS = 200
"""Of the tiny models, so that Dense2Sparse can keep 128 of them."""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pages, and the questions that ask for them: two in three to learn from."""
    return write_world(tmp_path_factory.mktemp("data") / "pages", sizes={"train": 27, "test": 13})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, pages: Path, sparse_model: Any) -> dict[str, Path]:
    """Tiny random models over words of the pages: one vector a text, several, and sparse ones."""
    folder = tmp_path_factory.mktemp("models")
    text = (pages / "corpus.jsonl").read_text().lower()
    words = [w for w, _ in itertools.groupby(sorted(re.findall("[a-z]{4,}", text)))]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters)]
    vocabulary = [*special, *words[: WORDS - len(special)]]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    backbone = folder / "backbone"
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(backbone)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    AutoModel.from_config(BertConfig(vocab_size=WORDS, max_position_embeddings=64, **sizes)).save_pretrained(backbone)
    names = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    narrow = Dense(32, 16, bias=False, activation_function=torch.nn.Identity(), **names)
    several = [Transformer(str(backbone)), narrow, MultiVectorMask(), Normalize(**names)]
    made = {
        "dense": SentenceTransformer(modules=[Transformer(str(backbone)), Pooling(32, "mean")], device="cpu"),
        "late": MultiVectorEncoder(modules=several, device="cpu"),
        "sparse": sparse_model,
    }
    for name, model in made.items():
        model.save_pretrained(str(folder / name))
    return {name: folder / name for name in made}


LEARNED = ("ReinPool", "LEMUR", "Dense2Sparse", "MetaEmbed", "CITADEL")
"""How rows of methods of polyrep begin."""


def flags_of(folder: Path, model: Path, *flags: Any) -> list[str]:
    where = ["--cache_dir", folder / "embeddings", "--frontier_cache", folder / "kept"]
    argv = [model, "--frontier", *where, "--fit_seconds", 1, "--model_dtype", "float32", *flags]
    return [str(word) for word in argv]


def run(folder: Path, model: Path, *flags: Any) -> dict[str, Any]:
    return frontier.frontier(flags_of(folder, model, *flags))


def main_rows(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["system"]: row for row in results["rows"] if row["metric"] == "nDCG@10"}


def full_model(folder: Path, model: Path, dataset: Any, fit_data: FitData) -> FullModel:
    return FullModel(load(model), model, dataset, fit_data, str(folder / "embeddings"), folder / "kept", 1.0)


@pytest.fixture(scope="module")
def late(tmp_path_factory, pages, models) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("late")
    flags = ["--methods", "all", "--budget", "bytes=64", "--budget", "ms=1000,bytes=1", "--output", folder / "out"]
    return folder, run(folder, models["late"], "--dataset", pages, *flags)


# Rows


def test_every_method_of_a_late_interaction_model_has_its_rows(late):
    rows, ladder = main_rows(late[1]), (1, 2, 4, 8, 16, 32)
    assert late[1]["failures"] == []
    one_stage = {FULL, "BM25", "mean", "mean, int8", "mean, one-bit", f"{FULL}, int8", f"{FULL}, one-bit"}
    one_stage |= {f"{name}, {k}" for name in ("hierarchical", "ReinPool", "MetaEmbed") for k in ladder}
    one_stage |= {"MetaEmbed, 1 then 32", "CITADEL, words", "CITADEL"}
    one_stage |= {f"ReinPool, {k}, {how}" for k in (1, 4, 16, 32) for how in ("int8", "one-bit")}
    one_stage |= {f"hierarchical, {k}, {how}" for k in (4, 16, 32) for how in ("int8", "one-bit")}
    one_stage |= {"MUVERA, 10240", "MUVERA, 10240, one-bit", "MUVERA, 1280"}
    one_stage |= {"LEMUR, 2048", "LEMUR, 2048, int8"}  # of forty pages there are no more than 39 directions
    one_stage |= {"Dense2Sparse, 48/128 words", "Dense2Sparse, 12/128 words", "CSR, 32", "CSR, 64", "CSR, 128"}
    staged = {name for name in rows if "rerank" in name}
    assert rows.keys() - staged == one_stage
    assert {name.rpartition(", ")[0] for name in staged} == {
        name
        for name in one_stage
        if name.startswith(("BM25", "MUVERA, 10240", "Dense2Sparse", "CITADEL, words"))
        or name in ("mean", "mean, one-bit", "hierarchical, 8", "ReinPool, 1", "ReinPool, 8", "ReinPool, 1, one-bit")
        or name in ("LEMUR, 2048", "CSR, 128", "MetaEmbed, 1", "MetaEmbed, 8")
    }
    assert {name.rpartition(", ")[2] for name in staged} == {"rerank 50", "rerank 200"}


def test_costs_follow_from_what_an_index_stores(late):
    rows = {name: row["bytes_per_document"] for name, row in main_rows(late[1]).items()}
    vectors = main_rows(late[1])[FULL]["vectors_per_document"]
    dim = 16
    assert rows[FULL] == pytest.approx(vectors * dim * 2 + 8) and vectors > 8
    assert rows[f"{FULL}, int8"] == pytest.approx(vectors * dim + 8)
    assert rows[f"{FULL}, one-bit"] == pytest.approx(vectors * dim / 8 + 8)
    assert (rows["mean"], rows["mean, int8"], rows["mean, one-bit"]) == (dim * 2, dim, dim / 8)
    assert (rows["MUVERA, 10240"], rows["MUVERA, 10240, one-bit"]) == (10240 * 2, 10240 / 8)
    assert (rows["MUVERA, 1280"], rows["ReinPool, 1"], rows["ReinPool, 1, one-bit"]) == (1280 * 2, dim * 2, dim / 8)
    assert rows["ReinPool, 4, one-bit"] <= 4 * dim / 8 + 8
    assert (rows["LEMUR, 2048"], rows["LEMUR, 2048, int8"]) == (4096, 2048)
    assert (rows["MetaEmbed, 1"], rows["MetaEmbed, 8"]) == (dim * 2, 8 * dim * 2 + 8)
    routed = main_rows(late[1])["CITADEL"]
    assert rows["CITADEL"] == pytest.approx(routed["entries_per_document"] * (dim * 2 + 4)) and routed["products"] > 0
    for name, row in main_rows(late[1]).items():
        if "rerank" in name:
            first = rows[name.rpartition(", ")[0]]
            assert row["first_stage_bytes"] == first and row["bytes_per_document"] == pytest.approx(first + rows[FULL])
        assert row["search_ms_p99"] >= row["search_ms_p50"] > 0
        fitted = name.startswith((*LEARNED, "CSR"))
        assert ("fit_seconds" in row) == ("steps" in row) == fitted
        assert not fitted or row["steps"] >= 1
    # With every document scored again by the full model, the ranking is the full model's.
    mine = main_rows(late[1])
    assert mine["mean, rerank 50"]["value"] == mine[FULL]["value"] == mine["CSR, 128, rerank 200"]["value"]


def test_one_index_finds_by_its_first_vector_and_orders_by_all(late):
    rows = main_rows(late[1])
    both, most = rows["MetaEmbed, 1 then 32"], rows["MetaEmbed, 32"]
    assert both["bytes_per_document"] == most["bytes_per_document"] == 32 * 16 * 2 + 8
    assert both["first_stage_bytes"] == rows["MetaEmbed, 1"]["bytes_per_document"] == 16 * 2
    assert both["value"] == most["value"]  # of so few documents the first vector finds all
    assert both["settings"] == {"vectors": "1 finds 200, 32 order them"}
    assert rows["MetaEmbed, 4"]["settings"] == {"vectors": "all tokens of a query, 4 of a document"}


def test_rows_of_a_router_are_what_it_makes_of_cached_vectors(tmp_path, pages, models):
    full = full_model(tmp_path, models["late"], *judged_queries(str(pages), "test"))
    words, entries = (candidate.make() for candidate in citadel.METHOD.rows(full))
    (folder,) = (tmp_path / "kept" / "heads").glob("*/head")
    pooling = CitadelPooling.from_pretrained(folder)
    for task, cached, weights, made in (
        ("query", full.queries, words.queries, entries.queries),
        ("document", full.documents, words.documents, entries.documents),
    ):
        cuts = np.split(np.asarray(cached.values, np.float32), cached.offsets[1:-1])
        found = pooling.route(list(map(torch.from_numpy, cuts)), task=task)
        for number in range(len(made)):
            part = slice(*made.offsets[number : number + 2])
            token, place = found.mask[number].nonzero(as_tuple=True)
            assert made.indices[part].tolist() == found.keys[number, token, place].tolist()
            vectors = found.weights[number, token, place][:, None] * found.vectors[number, token]
            np.testing.assert_allclose(made.values[part], vectors.numpy(), rtol=2e-3, atol=1e-4)
            largest: dict[int, float] = {}
            for key, weight in zip(made.indices[part], found.weights[number, token, place].tolist(), strict=True):
                largest[key] = max(weight, largest.get(key, 0.0))
            part = slice(*weights.offsets[number : number + 2])
            kept = dict(zip(weights.indices[part].tolist(), weights.values[part].tolist(), strict=True))
            assert kept == pytest.approx(largest, rel=1e-3)
    assert entries.similarity == "routed" and entries.documents.values.dtype == np.float16
    ranking = rank_when_ready("CITADEL", entries.queries, entries.documents, full.ranks, similarity="routed")
    expected = np.take_along_axis(looped(entries.queries, entries.documents, True), ranking.positions, 1)
    np.testing.assert_allclose(ranking.scores, expected, rtol=1e-4, atol=1e-5)
    assert (np.diff(ranking.scores) <= 0).all() and len(np.unique(ranking.scores)) > len(full.dataset.queries)


def test_claims_set_the_best_learned_row_of_each_size_against_the_best_other(late):
    rows, claims = main_rows(late[1]), late[1]["claims"]
    assert [claim["claim"] for claim in claims] == [
        f"frontier.learned_margin_{n}" for n in (16, 64, 256, 1024, 4096, 16384)
    ]
    for claim in claims:
        within = {n: r for n, r in rows.items() if r["bytes_per_document"] <= int(claim["claim"].split("_")[-1])}
        learned = {n: r["value"] for n, r in within.items() if n.startswith(LEARNED)}
        others = [r["value"] for n, r in within.items() if n not in learned]
        assert claim["value"] == pytest.approx(100 * (max(learned.values()) - max(others)))
        sizes = [within[claim[side]]["bytes_per_document"] for side in ("learned", "rival")]
        assert claim["met"] == (claim["value"] > 0 or claim["value"] == 0 and sizes[0] <= sizes[1])
        assert claim["learned"] in learned
        assert claim["interval"][0] <= claim["value"] <= claim["interval"][1]


def test_labels_too_near_to_one_another_leave_the_better():
    front = [{"system": name, "bytes_per_document": size} for name, size in (("a", 10), ("b", 11), ("c", 40))]
    assert labelled(front) == {"b", "c"}
    assert labelled(front[:1]) == {"a"} and labelled([]) == set()


def test_the_files_show_fronts_advice_and_what_was_measured(late):
    folder, results = late
    table, text = main_rows(results), (folder / "out" / "frontier-pages.md").read_text()
    assert json.loads((folder / "out" / "frontier-pages.json").read_text())["rows"] == results["rows"]
    assert (folder / "out" / "frontier-pages.png").read_bytes().startswith(b"\x89PNG")
    for name, row in table.items():
        for unit, cost in (("bytes", "bytes_per_document"), ("ms", "search_ms_p50")):
            beaten = any(
                other["value"] >= row["value"]
                and other[cost] <= row[cost]
                and (other["value"] > row["value"] or other[cost] < row[cost])
                for other in table.values()
            )
            assert (unit in row["pareto"]) != beaten, name
    assert {row["reference"] for row in table.values() if "reference" in row} == {FULL}
    header = next(line for line in text.splitlines() if line.startswith("| system"))
    assert {"front", "fit s", "bytes/doc", "search ms (p50 / p99)"} <= {cell.strip() for cell in header.split("|")}
    assert [entry["budget"] for entry in results["recommendations"]] == [{"bytes": 64}, {"ms": 1000, "bytes": 1}]
    best = results["recommendations"][0]
    within = {name: row["value"] for name, row in table.items() if row["bytes_per_document"] <= 64}
    assert within[best["system"]] == max(within.values()) and best["text"] in text
    nearest = results["recommendations"][1]
    assert nearest["system"] is None and table[nearest["nearest"]]["bytes_per_document"] == 2
    assert f"chosen and measured on the same {table[FULL]['queries']} queries" in best["text"]


def test_a_dense_model_has_the_methods_that_apply_to_it(tmp_path, pages, models):
    results = run(tmp_path, models["dense"], "--dataset", pages)
    single = {f"{FULL}, int8", f"{FULL}, one-bit", "CSR, 32", "CSR, 64", "CSR, 128", "BM25"}
    single |= {"Dense2Sparse, 48/128 words", "Dense2Sparse, 12/128 words", "UnifieR, lexicon", "UnifieR, both views"}
    rows = main_rows(results)
    stages = single - {"CSR, 32", "CSR, 64", "UnifieR, both views"}
    assert rows.keys() == {FULL, *single, *(f"{name}, rerank {n}" for name in stages for n in (50, 200))}
    assert results["failures"] == [] and rows[f"{FULL}, one-bit"]["bytes_per_document"] == 32 / 8
    assert [entry["budget"] for entry in results["recommendations"]] == [{"bytes": n} for n in (256, 1024, 4096)]
    assert rows["CSR, 128, rerank 50"]["value"] == rows[FULL]["value"]
    words, both = rows["UnifieR, lexicon"], rows["UnifieR, both views"]
    assert both["bytes_per_document"] == words["bytes_per_document"] + 32 * 2 and both["steps"] >= 1
    assert both["active_dims"] == words["active_dims"] <= 128 and both["flops"] == words["flops"]


# UnifieR's two views


@pytest.fixture(scope="module")
def unified(tmp_path_factory, pages, models) -> tuple[FullModel, dict[str, Encoded], Path]:
    """A tiny model whose similarity is the cosine, its two rows, and the folder of the head."""
    folder = tmp_path_factory.mktemp("unified")
    full = full_model(folder, models["dense"], *judged_queries(str(pages), "test"))
    full.dev = None  # on which the words of so small a world are right by themselves, and the weight would be 0
    found = {candidate.system.partition(", ")[2]: candidate.make() for candidate in unifier.METHOD.rows(full)}
    (head,) = (folder / "kept" / "heads").glob("*/head")
    return full, found, head


def views_by_hand(full: FullModel, folder: Path) -> list[dict[str, np.ndarray]]:
    """Both views of queries and of documents by the whole model, a text at a time."""
    head = AutoModel.from_pretrained(folder)
    head.config.query_top_k, head.config.document_top_k = 48, 128
    whole = UnifierModel.from_modules(load(full.folder), head).eval()
    sides = []
    for task, texts in (("query", full.dataset.queries), ("document", full.dataset.corpus)):
        with torch.no_grad():
            given = [whole.encode_views(**full.model.preprocess([text]), task=task) for text in texts.values()]
        sides.append({view: torch.cat([one[view] for one in given]).double().numpy() for view in given[0]})
    return sides


def test_a_row_of_two_views_ranks_by_their_weighted_sum(unified):
    full, found, head = unified
    both = found["both views"]
    queries, documents = views_by_hand(full, head)
    assert np.linalg.norm(documents["dense"], axis=1) == pytest.approx(1)  # as a cosine compares them
    weight = float(both.settings["weights"].partition("dense=")[2])
    assert weight > 0
    expected = sum(
        times * queries[view] @ documents[view].T for view, times in (("lexicon", 1), ("dense", weight))
    )  # (queries, documents)
    options: dict[str, Any] = {"similarity": both.similarity, "left_out": full.dataset.own}
    ranking = rank_when_ready("both", both.queries, both.documents, full.ranks, **options)
    assert ranking.positions.shape == expected.shape
    np.testing.assert_allclose(ranking.scores, np.take_along_axis(expected, ranking.positions, 1), 5e-3, 5e-3)
    assert (np.diff(np.take_along_axis(expected, ranking.positions, 1)) < 5e-3 * np.abs(expected).max()).all()
    assert both.documents.values.min() < 0 and both.documents.values.dtype == np.float16


def test_a_row_of_two_views_is_what_a_search_of_all_candidates_sums(unified):
    full, found, _ = unified
    both, lexicon = found["both views"], found["lexicon"]
    words = full.model.tokenizer.vocab_size
    sides: list[list[Any]] = []
    for summed, alone in ((both.queries, lexicon.queries), (both.documents, lexicon.documents)):
        is_dense = summed.indices >= words
        np.testing.assert_array_equal(summed.values[~is_dense], alone.values)
        np.testing.assert_array_equal(summed.indices[~is_dense], alone.indices)
        sides.append([alone, dense(summed.values[is_dense].reshape(len(alone), 32))])
    views = [View(*side, "dot") for side in zip(*sides, strict=True)]
    count = len(full.dataset.corpus)
    expected = find_candidates(views, full.ranks, count=count).best((1, 1), full.ranks, count)
    summed = exact_search(both.queries, both.documents, full.ranks, similarity="dot", k=count)
    for places, scores, (wanted, sums) in zip(*summed, expected, strict=True):
        np.testing.assert_allclose(scores, sums, rtol=1e-5)
        apart = np.abs(np.diff(sums)) > 1e-4  # else rounding decides
        clear = np.append(True, apart) & np.append(apart, True)
        assert places[clear].tolist() == wanted[clear].tolist() and clear.any()


def test_the_weight_of_the_dense_view_is_chosen_on_what_is_not_measured(tmp_path, monkeypatch, pages, models):
    asked = []
    stock = unifier.encoded

    def encoded(full: FullModel, head: Any, task: str, dataset: Any = None, most: int | None = None) -> Any:
        if dataset is not None:
            asked.append((dataset, most))
        return stock(full, head, task, dataset, most)

    monkeypatch.setattr(unifier, "encoded", encoded)
    said = []
    for split in ("test", "dev"):
        results = run(tmp_path, models["dense"], "--dataset", pages, "--methods", "unifier", "--split", split)
        assert results["failures"] == []
        said.append(main_rows(results)["UnifieR, both views"]["settings"])
    (dev, _), (train, most) = asked
    measured, fit_data = judged_queries(str(pages), "dev")
    assert dev.queries == measured.queries and most == unifier.SAMPLE
    assert train.queries == fit_data.dataset.queries and not train.queries.keys() & dev.queries.keys()
    assert said[0]["chosen_on"] == f"dev ({len(dev.queries)} queries)"
    assert said[1]["chosen_on"].endswith(f"{len(train.queries)} queries that heads learn from")


def test_other_judgments_of_dev_make_the_rows_anew_that_read_them(tmp_path, pages, models):
    full = full_model(tmp_path, models["dense"], *judged_queries(str(pages), "test"))
    assert full.dev is not None and not full.dev.queries.keys() & full.dataset.queries.keys()
    assert not full.dev.queries.keys() & full.fit_data.dataset.queries.keys()

    def depends() -> dict[str, str]:
        jobs = frontier._jobs(full, ["dense2sparse", "unifier"], [])
        return {job.system: json.dumps(job.depends) for job in jobs}

    before = depends()
    full.dev.qrels[next(iter(full.dev.queries))] = {next(iter(full.dataset.corpus)): 1}
    changed = {system for system, depended in depends().items() if depended != before[system]}
    assert changed == {"UnifieR, lexicon", "UnifieR, both views"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [("similarity", "scores by euclidean"), ("module", "UnifierModel.*Dense"), ("depth", "split_layer=-3")],
)
def test_a_model_that_has_no_two_views_says_why(tmp_path, pages, models, change, reason):
    model = load(models["dense"])
    if change == "similarity":
        model.similarity_fn_name = "euclidean"
    elif change == "module":
        narrow = Dense(32, 16, bias=False, activation_function=torch.nn.Identity())
        model = SentenceTransformer(modules=[*model.children(), narrow], device="cpu")
    else:
        inner = model[0].model
        inner.encoder.layer, inner.config.num_hidden_layers = inner.encoder.layer[:1], 1
    model.save_pretrained(str(tmp_path / "model"))
    results = run(tmp_path, tmp_path / "model", "--dataset", pages, "--methods", "unifier")
    assert [failure["system"] for failure in results["failures"]] == ["UnifieR, lexicon", "UnifieR, both views"]
    assert all(re.search(reason, failure["reason"]) for failure in results["failures"])
    assert FULL in main_rows(results) and not list(tmp_path.glob("embeddings/*states*"))


# Heads without queries


@pytest.mark.parametrize(
    ("texts", "queries"),
    [
        (["One dog barks very loudly. Nobody hears it.", "A cat."], ["One dog barks very loudly."]),
        (["a dog", "a cat"], ["a dog", "a cat"]),
    ],
)
def test_without_a_train_split_heads_learn_from_the_documents(tmp_path, texts, queries):
    folder = tmp_path / "short"
    (folder / "qrels").mkdir(parents=True)
    lines = [json.dumps({"_id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("".join(lines))
    (folder / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "dog"}) + "\n")
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td0\t1\n")
    dataset, fit_data = judged_queries(str(folder), "test")
    assert dataset.queries == {"q": "dog"} and not fit_data.has_queries
    assert set(fit_data.dataset.queries.values()) <= {*queries, "Nobody hears it."} and fit_data.note
    recipe = RecipeArguments(datasets=[str(folder)])
    (again,) = datasets_of(recipe, HeadArguments(queries=fit_data.settings["queries"]))  # what a fit then reads
    assert again.queries == fit_data.dataset.queries and again.qrels == fit_data.dataset.qrels


# Keeping rows, and failures

QUICK = ("--methods", "mean", "quantization")


def test_a_second_run_makes_only_what_is_missing(tmp_path, monkeypatch, pages, models):
    first = run(tmp_path, models["late"], "--dataset", pages, *QUICK)
    made = []
    stock = frontier.rank_when_ready
    monkeypatch.setattr(frontier, "rank_when_ready", lambda name, *a, **k: made.append(name) or stock(name, *a, **k))
    assert run(tmp_path, models["late"], "--dataset", pages, *QUICK)["rows"] == first["rows"] and not made
    kept = sorted((tmp_path / "kept" / "rows").iterdir(), key=lambda file: file.stat().st_mtime)
    kept[0].write_bytes(b"cut off")  # the full model's, which is the first
    (tmp_path / "kept" / "rows" / ".other.1.partial").write_bytes(b"half")
    run(tmp_path, models["late"], "--dataset", pages, *QUICK)
    assert made == [FULL]
    run(tmp_path, models["late"], "--dataset", pages, *QUICK, "--max_length", 8)  # other vectors, other rows
    assert set(made) == {FULL, "mean", "mean, int8", "mean, one-bit", f"{FULL}, int8", f"{FULL}, one-bit"}


def test_an_interruption_loses_nothing_that_is_finished(tmp_path, monkeypatch, pages, models):
    stock, made = frontier.rank_when_ready, []

    def interrupted(name: str, *args: Any, **options: Any) -> Any:
        made.append(name)
        if name == "mean, one-bit":
            raise KeyboardInterrupt
        return stock(name, *args, **options)

    monkeypatch.setattr(frontier, "rank_when_ready", interrupted)
    assert main(["evaluate", *flags_of(tmp_path, models["late"], "--dataset", pages, *QUICK)]) == 130
    assert made == [FULL, "mean", "mean, int8", "mean, one-bit"]
    monkeypatch.setattr(frontier, "rank_when_ready", lambda name, *a, **k: made.append(name) or stock(name, *a, **k))
    run(tmp_path, models["late"], "--dataset", pages, *QUICK)
    assert made[4:] == ["mean, one-bit", f"{FULL}, int8", f"{FULL}, one-bit"]


def test_a_method_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, pages, models):
    asked = []

    def broken(full: FullModel) -> Any:
        def fail() -> Any:
            asked.append(1)
            raise ValueError("no | luck")

        made = candidates.Once(fail)
        return iter([Candidate("broken, 1", made, True), Candidate("broken, 2", made)])

    monkeypatch.setitem(RIVALS, "muvera", Method(broken, ("tokens",)))
    argv = flags_of(tmp_path, models["late"], "--dataset", pages, "--methods", "muvera", "mean", "--output", tmp_path)
    assert main(["evaluate", *argv]) == 0
    results = json.loads((tmp_path / "frontier-pages.json").read_text())
    reason = "ValueError: no | luck"
    assert results["failures"] == [
        {"system": name, "dataset": "pages", "reason": reason} for name in ("broken, 1", "broken, 2")
    ]
    assert len(asked) == 1  # what both rows share is not tried twice
    assert {"mean", "mean, rerank 50", FULL} <= main_rows(results).keys()
    assert "| broken, 1 | failed: ValueError: no / luck |" in (tmp_path / "frontier-pages.md").read_text()


def test_without_the_full_model_there_is_no_table(tmp_path, monkeypatch, pages, models):
    def fail(name: str, *_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(frontier, "rank_when_ready", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path, models["late"], "--dataset", pages, *QUICK)


@pytest.mark.parametrize(
    "model,flags,message",
    [
        ("late", ["--methods", "mean", "pca"], "--methods pca: unknown.*hierarchical"),
        ("dense", ["--methods", "muvera"], "not for a SentenceTransformer.*dense2sparse, unifier, csr, quantization"),
        ("sparse", [], "SparseEncoder.*MultiVectorEncoder"),
        ("late", ["--budget", "kb=3"], "'kb=3' is no limit"),
        ("late", ["--queries", "mine"], "judged or inverse_cloze"),
        ("late", ["--split", "train"], "learn from it"),
        ("late", ["--fit_seconds", "0"], "no time"),
        ("late", ["--frontier", "false"], "ordinary table"),
        ("late", ["--language", "xx"], "--language xx: PyStemmer knows no"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_encoded(tmp_path, pages, models, model, flags, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path, models[model], "--dataset", pages, *flags)
    assert not (tmp_path / "embeddings").exists()


def test_no_data_set_is_refused(tmp_path, models):
    with pytest.raises(InputError, match="no --dataset"):
        run(tmp_path, models["late"])


# What heads learn from


def test_sentences_stand_in_for_queries_and_none_is_measured_that_was_learned_from(tmp_path, pages, models):
    (pages / "queries.jsonl").rename(tmp_path / "hidden")
    try:
        dataset, fit_data = cloze_queries(str(pages), tmp_path / "cloze")
        flags = ["--dataset", pages, "--queries", "inverse_cloze", "--methods", "reinpool"]
        results = run(tmp_path, models["late"], *flags)
    finally:
        (tmp_path / "hidden").rename(pages / "queries.jsonl")
    assert dataset.split == "cloze" and dataset.name == "pages"
    learned = fit_data.dataset.queries
    assert not dataset.queries.keys() & learned.keys() and all(map(in_measured_fifth, dataset.queries))
    assert not any(map(in_measured_fifth, learned)) and dict(dataset.corpus) == dict(fit_data.dataset.corpus)
    for query, text in [*dataset.queries.items(), *learned.items()]:
        (document,) = {**dataset.qrels, **fit_data.dataset.qrels}[query]
        assert text not in dataset.corpus[document].splitlines()
    rows = main_rows(results)
    assert {row["split"] for row in rows.values()} == {"cloze"} and rows["ReinPool, 1"]["steps"] >= 1
    assert rows[FULL]["queries"] == len(dataset.queries) and "sentences" in results["notes"][1]


def test_about_a_fifth_is_measured():
    share = np.mean([in_measured_fifth(f"d{i}#{i % 3}") for i in range(5000)])
    assert abs(share - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 5000)


def test_without_a_train_split_heads_learn_from_sentences(tmp_path, pages):
    folder = tmp_path / "pages"
    (folder / "qrels").mkdir(parents=True)
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        (folder / name).write_bytes((pages / name).read_bytes())
    dataset, fit_data = judged_queries(str(folder), "test")
    assert dataset.split == "test" and fit_data.dataset.split == "cloze"
    assert fit_data.settings["queries"] == "inverse_cloze" and "no train split" in fit_data.note
    assert judged_queries(str(pages), "test")[1].dataset.split == "train"
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nnobody\tnothing\t1\n")
    with pytest.raises(InputError, match="judges query 'nobody'"):  # damaged is not absent
        judged_queries(str(folder), "test")


def test_one_vector_from_the_cache_is_what_the_model_would_encode(tmp_path, pages, models):
    full = full_model(tmp_path, models["late"], *judged_queries(str(pages), "test"))
    model = full.single[1]
    for task, texts, encode in (
        ("query", full.dataset.queries, model.encode_query),
        ("document", full.dataset.corpus, model.encode_document),
    ):
        encoded = encode(list(texts.values()))
        np.testing.assert_allclose(full.side(full.dataset, task).embeddings.values, encoded, rtol=2e-3, atol=5e-3)


# Fitting within a time


@pytest.mark.parametrize(
    "preparing,per_step,seconds,most,expected",
    [
        (0.0, 0.5, 90, 1000, math.floor(SHARE * 90 / 0.5)),
        (30.0, 0.5, 90, 1000, math.floor(SHARE * 60 / 0.5)),
        (0.0, 0.01, 90, 300, 300),  # never more than the recipe's
        (100.0, 0.5, 90, 300, 1),  # and never none
    ],
)
def test_steps_are_those_that_a_rehearsal_allows(tmp_path, preparing, per_step, seconds, most, expected):
    fits = []

    def fit(steps: int, folder: Path) -> None:
        fits.append(steps)
        folder.mkdir()
        training = {"seconds": preparing + steps * per_step, "log": [{"loss": 1}, {"train_runtime": steps * per_step}]}
        (folder / "training.json").write_text(json.dumps(training))

    fit_within(seconds, most, fit, tmp_path / "head")
    assert fits == [REHEARSED, expected] and [file.name for file in tmp_path.iterdir()] == ["head"]


def test_a_short_recipe_needs_no_rehearsal(tmp_path):
    fits = []
    fit_within(1.0, REHEARSED, lambda steps, folder: fits.append((steps, folder)), tmp_path)
    assert fits == [(REHEARSED, tmp_path)]


# Quantisation


@pytest.mark.parametrize("kind", ["sentence", "tokens"])
def test_a_quantised_vector_is_the_middle_of_its_bucket_or_its_signs(monkeypatch, kind):
    monkeypatch.setattr(candidates, "BLOCK", 5)
    rng = np.random.default_rng(0)
    documents = vectors_of(rng, [3, 1, 4]) if kind == "tokens" else dense(rng.normal(size=(8, 12)).astype(np.float32))
    row = Encoded(documents, documents, "dot", {"fit_seconds": 2.0})
    assert quantized(row, None) is row
    coarse, signs = quantized(row, "int8"), quantized(row, "binary")
    step = (documents.values.max(0) - documents.values.min(0)) / 255
    error = np.abs(coarse.documents.values - documents.values).max(0)
    assert (error <= step / 2 + 2e-3).all() and (error > step / 8).any()
    np.testing.assert_array_equal(signs.documents.values > 0, documents.values > 0)
    np.testing.assert_allclose(np.linalg.norm(signs.documents.values.astype(float), axis=1), 1, rtol=1e-2)
    several = kind == "tokens"
    vectors = 8 / 3 if several else 1  # a mean of 8 vectors in 3 documents
    expected = [12 * vectors + 8 * several, 2 * vectors + 8 * several]  # 12 bits take 2 bytes
    found = [quantised_row.costs["bytes_per_document"] for quantised_row in (coarse, signs)]
    assert found == pytest.approx(expected) and coarse.costs["fit_seconds"] == 2
    assert coarse.queries is documents


# Advice

TABLE = {
    # name: nDCG@10, bytes, ms
    FULL: (0.80, 1000, 10.0),
    "near": (0.79, 100, 2.0),
    "fair": (0.72, 20, 1.0),
    "poor": (0.50, 10, 0.5),
    "waste": (0.60, 200, 0.8),
}


def table() -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    rows = [
        {"system": name, "value": value, "bytes_per_document": size, "search_ms_p50": ms}
        for name, (value, size, ms) in TABLE.items()
    ]
    noise = np.tile([0.3, -0.3], 100)  # makes a difference of 0.01 a matter of chance
    per_query = {name: np.full(200, value) + (noise if name == "near" else 0) for name, (value, *_) in TABLE.items()}
    return rows, per_query


def advice(budget: str) -> dict[str, Any]:
    (found,) = recommend(*table(), [parse_budget(budget)], full=FULL)
    return found


def test_fronts_are_what_nothing_beats():
    rows, _ = table()
    found = dict(zip(TABLE, fronts(rows), strict=True))
    assert found == {
        FULL: ["bytes", "ms"],
        "near": ["bytes", "ms"],
        "fair": ["bytes", "ms"],
        "poor": ["bytes", "ms"],
        "waste": ["ms"],
    }
    twice = fronts([*rows, dict(rows[0])])
    assert twice[0] == twice[-1] == ["bytes", "ms"]  # of two equal rows neither beats the other
    dearer = fronts([*rows, rows[0] | {"search_ms_p50": 11.0}])
    assert dearer[-1] == ["bytes"]


def test_the_best_row_within_a_budget_is_named_with_what_it_loses_and_saves():
    found = advice("bytes=150")
    assert (found["system"], found["budget"]) == ("near", {"bytes": 150})
    assert found["as_good_as_full"] == "near" and found["cheapest"] is None
    for words in ("nDCG@10 0.790", "99 %", "0.800", "1/10 of the bytes", "5 times as fast", "not significant"):
        assert words in found["text"], words


def test_costs_that_are_about_the_same_are_called_so():
    rows, per_query = table()
    rows[1] |= {"bytes_per_document": 1030, "search_ms_p50": 10.3}
    (found,) = recommend(rows[1:2] + rows[:1], per_query, [{"ms": 10.4}], full=FULL)
    assert found["system"] == FULL
    rows[1]["value"] = 0.81
    (found,) = recommend(rows[:2], per_query, [{"ms": 10.4}], full=FULL)
    assert "with about as many bytes, about as fast" in found["text"]


def test_a_significant_loss_is_called_one():
    found = advice("bytes=50")
    assert found["system"] == "fair" and found["as_good_as_full"] is None and found["cheapest"] is None
    assert "loss of 0.080 is significant" in found["text"] and "keeps 90 %" in found["text"]


def test_a_budget_of_both_is_met_in_both():
    assert advice("bytes=250,ms=0.9")["system"] == "waste"
    assert advice("ms=0.9")["system"] == "waste" and advice("bytes=250")["system"] == "near"


def test_the_full_model_may_be_the_best_and_something_cheaper_as_good():
    found = advice("bytes=1000")
    assert found["system"] == FULL and found["cheapest"] == "near"
    assert "full model itself" in found["text"] and "near, 0.790 at 100 bytes" in found["text"]


def test_a_budget_that_nothing_meets_names_the_nearest():
    found = advice("bytes=5")
    assert found["system"] is None and found["nearest"] == "poor" and "10 bytes a document" in found["text"]
    assert advice("ms=0.1,bytes=150")["nearest"] == "poor"  # misses the time fivefold, fair tenfold


@pytest.mark.parametrize(
    "text", ["256", "bytes", "bytes=", "bytes=x", "kb=3", "bytes=0", "ms=-1", "ms=nan", "ms=1,ms=2"]
)
def test_a_malformed_budget_is_refused(text):
    with pytest.raises(InputError, match="bytes=2048,ms=5"):
        parse_budget(text)


def test_a_budget_is_read():
    assert parse_budget("bytes=2048, ms=0.5") == {"bytes": 2048, "ms": 0.5}


def test_results_go_to_the_picture_that_is_given(tmp_path, late):
    drawn = []
    write_results(late[1], tmp_path, picture=lambda results, path: drawn.append(path.name))
    assert drawn == ["frontier-pages.png"]


def test_the_picture_joins_the_front_and_rings_its_rows(tmp_path, monkeypatch):
    rows, _ = table()
    rows += [{"system": "BM25", "value": 0.4, "bytes_per_document": 5, "search_ms_p50": 0.1}]
    rows += [{"system": "poor, rerank 50", "value": 0.81, "bytes_per_document": 1010, "search_ms_p50": 3.0}]
    for row, found in zip(rows, fronts(rows), strict=True):
        row |= {"pareto": found, "metric": "nDCG@10", "dataset": "d", "split": "test"}
    figures = []
    monkeypatch.setattr("matplotlib.pyplot.close", figures.append)
    draw({"rows": rows}, tmp_path / "x.png")
    monkeypatch.undo()
    (axis,) = figures[0].axes
    joined = [line for line in axis.lines if line.get_drawstyle() == "steps-post"]
    front = sorted((r for r in rows if "bytes" in r["pareto"]), key=lambda r: r["bytes_per_document"])
    expected = [[r["bytes_per_document"], r["value"]] for r in front]
    assert [line.get_xydata().tolist() for line in joined] == [expected] and len(front) == 6
    rings = [part for part in axis.collections if not len(part.get_facecolors())]
    assert [ring.get_offsets()[0].tolist() for ring in rings] == expected
    across = [line.get_ydata()[0] for line in axis.lines if list(line.get_xdata()) == [0, 1]]
    assert across == [0.8, 0.4]  # the full model and BM25
    assert area(0.2) < area(2) < area(200)


@pytest.mark.parametrize(
    ("name", "methods"),
    [("late", ["mean", "reinpool", "dense2sparse"]), ("dense", ["quantization", "dense2sparse", "unifier", "csr"])],
)
def test_every_row_is_of_all_windows(tmp_path, pages, models, name, methods):
    flags = ["--dataset", pages, "--window", 20, "--stride", 10, "--methods", *methods]
    results = run(tmp_path, models[name], *flags)
    rows, (dataset, _) = main_rows(results), judged_queries(str(pages), "test")
    assert results["failures"] == [] and "windows of 20 tokens, a new one every 10" in " ".join(results["notes"])
    model = load(models[name])
    cuts = [Windows.of(model, 20, 10, name).cut(text) for text in dataset.corpus.values()]
    mean = np.mean([len(several) for several in cuts])
    assert mean > 1.5
    if name == "late":
        vectors = [len(vectors) for several in cuts for vectors in model.encode_document(several)]
        assert rows["full model"]["vectors_per_document"] == pytest.approx(sum(vectors) / len(cuts))
        assert rows["mean"]["bytes_per_document"] == 16 * 2
        assert "windows_per_document" not in rows["Dense2Sparse, 48/128 words"]  # of the mean of all
    else:
        sizes = {"full model": 32 * 2, "full model, int8": 32, "full model, one-bit": 32 // 8}
        for system, size in sizes.items():
            assert rows[system]["bytes_per_document"] == pytest.approx(mean * size)
        names = [name for name in rows if name.startswith(("CSR", "Dense2Sparse", "UnifieR")) and "rerank" not in name]
        learned = [rows[name] for name in names]
        assert learned and all(row["windows_per_document"] == pytest.approx(mean) for row in learned)
    # The second stage scores all documents of so small a corpus as the full model does.
    assert rows["BM25, rerank 50"]["value"] == pytest.approx(rows["full model"]["value"])


def test_two_data_sets_have_rows_of_their_own(tmp_path, pages, models):
    other = tmp_path / "others"
    (other / "qrels").mkdir(parents=True)
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv", "qrels/train.tsv"):
        (other / name).write_bytes((pages / name).read_bytes())
    flags = ["--methods", "mean", "--budget", "bytes=99", "--language", "none"]
    results = run(tmp_path, models["late"], "--dataset", pages, other, *flags)
    assert {row["dataset"] for row in results["rows"]} == {"pages", "others"}
    assert [entry["dataset"] for entry in results["recommendations"]] == ["pages", "others"]
    assert [row["settings"]["language"] for row in results["rows"] if "settings" in row] == ["none", "none"]
    assert results["name"] == "frontier-pages-others"


@pytest.mark.parametrize("trusted", [False, True])
def test_a_fit_trusts_code_that_the_user_does(monkeypatch, tmp_path, trusted):
    asked = {}
    monkeypatch.setattr(fit, "plan_of", lambda name, **values: asked.update(values))
    full = SimpleNamespace(
        folder=tmp_path,
        single=(tmp_path / "single", None),
        side=lambda dataset, task: None,
        fit_data=SimpleNamespace(dataset=None, source="x", settings={}),
        model=SimpleNamespace(max_seq_length=None),
        weights=torch.float32,
        trust_remote_code=trusted,
        **dict.fromkeys(("cache_dir", "batch_size", "seed", "kept")),
    )
    with pytest.raises(AttributeError):  # of the plan, which is none here
        fit.fit_run(full, "some-run", "code", single=True)
    assert asked["trust_remote_code"] is trusted


def test_images_are_not_opened_to_tell_their_language(monkeypatch):
    opened: list[str] = []

    class Images(dict[str, Any]):
        def values(self) -> Any:
            return (opened.append(name) for name in self)

    data = SimpleNamespace(corpus=Images.fromkeys("abc"), name="pictures"), None

    def stop(*_: Any, **__: Any) -> None:
        raise InputError("as far as the model")

    monkeypatch.setattr(frontier, "_read", lambda args, path: data)
    monkeypatch.setattr(frontier, "fetch", stop)
    for language in ("en", "auto"):
        with pytest.raises(InputError, match="as far as the model"):
            frontier._open(frontier.FrontierArguments(dataset=["pictures"], language=language), "m")
    assert len(opened) <= 1


@pytest.mark.parametrize(("kind", "expected"), [("tokens", 0.22), ("sentence", None)])
def test_words_of_a_mean_of_tokens_have_a_sharper_teacher(monkeypatch, kind, expected):
    asked = {}

    def caught(full, name, code, **values):
        asked.update(values)
        raise InputError("enough")

    monkeypatch.setattr(dense2sparse, "fit_run", caught)
    (first, *_) = dense2sparse.rows(SimpleNamespace(kind=kind))
    with pytest.raises(InputError, match="enough"):
        first.make()
    assert asked.get("teacher_temperature") == expected
