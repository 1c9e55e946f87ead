"""Scores become probabilities: by maps that are right by hand, in a folder that keeps them, at every door."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DOCUMENTS, write_beir
from PIL import Image
from room_examples import EXAMPLES
from scipy.optimize import minimize

import polyrep
from polyrep import InputError
from polyrep.cli import main
from polyrep.data import load_retrieval_dataset
from polyrep.encoding.embeddings import in_memory
from polyrep.encoding.encoders import uncertainty_of
from polyrep.encoding.shards import Origin, Shard
from polyrep.encoding.windows import Windows
from polyrep.evaluation.calibrate import Candidates, candidates_of, choose, fit
from polyrep.evaluation.reliability import binned, draw_panels, error_if_true, error_interval
from polyrep.hub import fingerprint
from polyrep.hub.calibration import Calibration, calibration_of, inputs_of, read_calibration, write_calibration
from polyrep.search import Hit, Searcher, Service, open_index
from polyrep.search.probability import _probable

WORDS = (
    "archive file port socket print line search folder copy move delete network disk user group process memory image "
    "sound video text table column row sort merge split compress convert download upload server client key password "
    "time date color font page book music game"
).split()

MADE = Calibration(
    fingerprint="f",
    dataset="tiny",
    split="dev",
    queries="judged",
    depth=100,
    seed=0,
    counts={"queries": 40, "candidates": 400, "relevant": 40},
    held_out="a fifth in turn",
    ece={"1": 0.03, "10": 0.0126},
    command="polyrep calibrate",
    weights={"score": 2.0, "lead": 1.0},
    at=[0.0, 1.0, 3.0],
    probability=[0.1, 0.5, 0.9],
)


@pytest.fixture(scope="module")
def folder(static_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return polyrep.save(static_model, tmp_path_factory.mktemp("models") / "static")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty documents of words, and for each a query of some of its words and of others."""
    root, draw = tmp_path_factory.mktemp("data") / "words", random.Random(0)
    (root / "qrels").mkdir(parents=True)
    documents = [draw.sample(WORDS, 6) for _ in range(60)]
    queries = [draw.sample(words, 2) + draw.sample(WORDS, draw.randrange(3)) for words in documents]
    for name, prefix, texts in (("corpus", "d", documents), ("queries", "q", queries)):
        lines = [{"_id": f"{prefix}{n}", "text": f"{' '.join(words)}. {words[0]}."} for n, words in enumerate(texts)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    judged = "".join(f"q{n}\td{n}\t1\n" for n in range(60))
    (root / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return root


@pytest.fixture(scope="module")
def calibrated(folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("calibrated")
    copy = shutil.copytree(folder, root / "model")
    cache = ["--cache_dir", str(root / "cache")]
    assert main(["calibrate", str(copy), "--dataset", str(data), "--depth", "20", *cache]) == 0
    return copy


def candidates(queries: int = 200, depth: int = 8, seed: int = 0, wide: bool = False) -> Candidates:
    """Documents whose relevance follows a known law of score and lead, and of the query's uncertainty."""
    generator = np.random.default_rng(seed)
    scores = -np.sort(-generator.normal(size=(queries, depth)), axis=1)
    uncertainty = generator.normal(size=queries)
    logits = scores + 2 * inputs_of(scores)["lead"] - 1 - (2 * uncertainty[:, None] if wide else 0)
    relevant = generator.random(scores.shape) < 1 / (1 + np.exp(-logits))
    return Candidates(scores, relevant, np.ones_like(relevant), uncertainty if wide else None)


# --- the map -----------------------------------------------------------------------------------------------------


def test_a_documents_lead_is_over_the_best_other_one():
    found = inputs_of(np.array([[0.9, 0.7, 0.4], [0.5, 0.5, 0.1]]))
    np.testing.assert_allclose(found["lead"], [[0.2, -0.2, -0.5], [0.0, 0.0, -0.4]], atol=1e-15)
    assert inputs_of(np.array([[0.9]]))["lead"] == [[0.0]]


def test_probabilities_of_a_map_are_those_of_a_hand():
    # Evidence 2 x 0.9 + 0.2 = 2 lies half-way from 1 to 3, 2 x 0.7 - 0.2 = 1.2 a tenth of it; -0.5 - 5 is below all.
    found = MADE.probabilities(np.array([[0.9, 0.7, -2.0]]))
    np.testing.assert_allclose(found, [[0.7, 0.54, 0.1]])


def test_an_isotonic_map_is_that_of_a_hand():
    """Of 0, 1, 0, 1 at rising scores the middle two violate the order and share a half; no end is surer than 2/3."""
    four = Candidates(
        np.array([[4.0], [3.0], [2.0], [1.0]]), np.array([[1], [0], [1], [0]], bool), np.ones((4, 1), bool)
    )
    fitted = fit(four, ("score",))
    asked = replace(four, scores=np.array([[0.0], [1.0], [1.5], [2.5], [3.5], [9.0]]))
    expected = [1 / 3, 1 / 3, (1 / 3 + 1 / 2) / 2, 1 / 2, (1 / 2 + 2 / 3) / 2, 2 / 3]
    np.testing.assert_allclose(fitted.probabilities(asked)[:, 0], expected)


def test_weights_are_those_of_a_logistic_regression():
    some = candidates()
    fitted = fit(some, ("score", "lead"))
    columns = np.stack([some.inputs[name].ravel() for name in ("score", "lead")], 1)
    standard = (columns - columns.mean(0)) / columns.std(0)

    def loss(parameters):
        logits = standard @ parameters[:2] + parameters[2]
        likelihood = np.logaddexp(0, logits) - some.relevant.ravel() * logits
        return likelihood.sum() + (parameters[:2] ** 2).sum() / 2

    expected = minimize(loss, np.zeros(3)).x[:2] / columns.std(0)
    np.testing.assert_allclose([fitted.weights["score"], fitted.weights["lead"]], expected, rtol=2e-3)


@pytest.mark.parametrize("wide", [False, True])
def test_a_higher_score_or_lead_never_has_a_lower_probability(wide):
    some = candidates(wide=wide)
    chosen, held_out = choose(some)
    grid = np.linspace(-6, 6, 101)
    for other in (-3.0, 0.0, 2.0):
        inputs = {"score": grid, "lead": np.full(101, other), "uncertainty": np.full(101, other)}
        for moving, still in (("score", "lead"), ("lead", "score")):
            swapped = inputs | {moving: grid, still: np.full(101, other)}
            evidence = sum(weight * swapped[name] for name, weight in chosen.weights.items())
            assert (np.diff(np.interp(evidence, chosen.at, chosen.probability)) >= 0).all()
    probability = chosen.probabilities(some)
    assert (np.diff(probability, axis=1) <= 1e-12).all(), "the order of a query's documents"
    assert ((0 < probability) & (probability < 1) & (0 < held_out) & (held_out < 1)).all()


def test_inputs_are_read_where_they_tell_something():
    assert set(choose(candidates(1000))[0].weights) == {"score", "lead"}
    assert set(choose(candidates(1000, wide=True))[0].weights) == {"score", "lead", "uncertainty"}
    useless = replace(candidates(1000), uncertainty=np.random.default_rng(9).normal(size=1000))
    assert set(choose(useless)[0].weights) == {"score", "lead"}
    lonely = candidates(1000, depth=1)  # whose lead is 0
    assert set(choose(lonely)[0].weights) == {"score"}


def test_a_map_by_which_scores_would_count_against_a_document_is_none():
    some = candidates()
    against = replace(some, relevant=~some.relevant)
    assert fit(against, ("score", "lead")) is None
    assert set(choose(against)[0].weights) == {"score"}


def test_judgments_of_one_kind_in_four_fifths_of_the_queries_are_mapped_by_the_score():
    """As of a model that is nearly always right, with ``--depth 1``: the one that is not falls into one fold."""
    some = candidates(60, depth=1)
    relevant = np.ones_like(some.relevant)
    relevant[np.argmin(some.scores[:, 0])] = False
    chosen, held_out = choose(replace(some, relevant=relevant))
    assert set(chosen.weights) == {"score"} and np.isfinite(held_out).all()
    # One at the lowest score, 59 above it: no surer than 1 / 3 and 60 / 61.
    asked = np.array([[-9.0], [9.0]])
    np.testing.assert_allclose(
        chosen.probabilities(Candidates(asked, asked > 0, np.ones((2, 1), bool)))[:, 0], [1 / 3, 60 / 61]
    )


def test_probabilities_of_the_law_that_made_the_judgments_come_back():
    chosen, _ = choose(candidates(2000))
    test = candidates(2000, seed=1)
    found = chosen.probabilities(test)
    law = 1 / (1 + np.exp(1 - test.scores - 2 * test.inputs["lead"]))
    assert np.abs(found - law).mean() < 0.02
    assert binned(found.ravel(), test.relevant.ravel()).error < 0.02


# --- how far it holds --------------------------------------------------------------------------------------------


def test_the_error_is_that_of_bins_of_equal_mass():
    generator = np.random.default_rng(0)
    probability = generator.permutation(np.linspace(0.01, 0.99, 95))
    relevant = generator.random(95) < probability**2
    order = np.argsort(probability)
    edges = [round(95 * part / 10) for part in range(11)]
    bins = [order[start:stop] for start, stop in zip(edges, edges[1:], strict=False)]
    expected = sum(len(b) / 95 * abs(probability[b].mean() - relevant[b].mean()) for b in bins)
    assert binned(probability, relevant).error == pytest.approx(expected)


def test_the_order_of_equal_probabilities_does_not_matter():
    probability, relevant = np.full(100, 0.3), np.arange(100) < 30
    assert binned(probability, relevant).error == pytest.approx(0)
    assert binned(probability[:5], relevant[:5]).error == pytest.approx(0.7)


def test_what_chance_leaves_is_what_true_probabilities_have():
    probability = np.full(1000, 0.5)  # one value: the error is |mean - 0.5|, half-normal of deviation 0.5 / sqrt(1000)
    assert error_if_true(probability, draws=2000) == pytest.approx(0.5 / 1000**0.5 * (2 / np.pi) ** 0.5, rel=0.05)
    low, high = error_interval(np.full((500, 1), 0.5), np.random.default_rng(0).random((500, 1)) < 0.7)
    assert low < 0.2 < high and high - low < 0.1


def test_a_picture_is_drawn(tmp_path):
    bins = binned(np.linspace(0, 1, 50), np.arange(50) > 25)
    draw_panels(tmp_path / "some.png", {"one": {"a": bins, "b": bins}, "two": {"a": bins}})
    assert Image.open(tmp_path / "some.png").size[0] > 1000


# --- in a folder -------------------------------------------------------------------------------------------------


def test_the_command_keeps_a_calibration_in_the_models_folder(calibrated, folder, data):
    found = read_calibration(calibrated, fingerprint(folder))
    assert fingerprint(calibrated) == fingerprint(folder)
    assert (found.dataset, found.split, found.depth) == ("words", "dev", 20)
    assert found.counts["queries"] == 60 and found.counts["candidates"] == 1200
    assert 20 <= found.counts["relevant"] <= 60 and set(found.ece) == {"1", "10"}
    assert str(data.parent) not in found.command and "calibrate" in found.command
    assert Image.open(calibrated / "calibration.png").size[0] > 500
    assert {file.name for file in calibrated.iterdir()} - {file.name for file in folder.iterdir()} == {
        "calibration.json",
        "calibration.png",
    }


def test_sentences_stand_in_for_queries(folder, data, tmp_path, capsys):
    copy = shutil.copytree(folder, tmp_path / "model")
    (bare := tmp_path / "bare").mkdir()
    lines = [
        f"{' '.join(WORDS[n % 40 :][:5])} of {n}. {WORDS[n % 40]} {n} is what it shows, mostly. More {n}."
        for n in range(60)
    ]
    (bare / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": f"d{n}", "text": line}) + "\n" for n, line in enumerate(lines))
    )
    asked = ["calibrate", str(copy), "--dataset", str(bare), "--cache_dir", str(tmp_path / "cache")]
    assert main([*asked, "--queries", "inverse_cloze"]) == 0
    found = read_calibration(copy, fingerprint(copy))
    assert (found.queries, found.split, found.counts["queries"]) == ("inverse_cloze", "cloze", 60)
    assert main([*asked, "--queries", "texts", "--overwrite"]) == 2
    assert "--queries 'texts': use judged or inverse_cloze" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "not an object"),
        ({"version": 2}, "of another version"),
        ({"at": [0.0, 1.0]}, "2 places have 3 probabilities"),
        ({"at": [], "probability": []}, "0 places"),
        ({"at": [0.0, 1.0, 1.0]}, "places do not rise"),
        ({"probability": [0.5, 0.4, 0.9]}, "probabilities fall"),
        ({"probability": [0.1, 0.5, 1.5]}, "not from 0 to 1"),
        ({"probability": [0.1, None, 0.5]}, "no finite number"),
        ({"probability": [0.1, "0.2", 0.5]}, "no finite number"),
        ({"at": [0.0, 1.0, 10**400]}, "no finite number"),
        ({"weights": {"score": -1.0}}, "none below 0"),
        ({"weights": {"rank": 1.0}}, "weights are"),
        ({"weights": {}}, "weights are"),
        ({"counts": {"queries": 40}}, "counts are"),
        ({"ece": {"1": 0.1}}, "without that of the ten best"),
        ({"depth": "100"}, "depth is '100'"),
        ({"dataset": None}, "dataset is None"),
        ({"fingerprint": "2-" + "0" * 64}, "made for model 2-000000000000, and this one is"),
    ],
    ids=str,
)
def test_a_file_that_is_damaged_or_another_models_is_refused(content, said, folder, tmp_path, data, capsys):
    copy = shutil.copytree(folder, tmp_path / "model")
    write_calibration(copy, replace(MADE, fingerprint=fingerprint(copy)))
    file = copy / "calibration.json"
    assert read_calibration(copy, fingerprint(copy)).at == MADE.at
    whole = json.loads(file.read_text())
    file.write_text(content if isinstance(content, str) else json.dumps(whole | content))
    with pytest.raises(InputError, match="make it again with `polyrep calibrate --overwrite`") as refusal:
        read_calibration(copy, fingerprint(copy))
    assert str(file) in str(refusal.value) and said in str(refusal.value)
    cache = ["--cache_dir", str(tmp_path / "cache")]
    assert main(["calibrate", str(copy), "--dataset", str(data), *cache]) == 2
    assert "exists and would be replaced. Pass --overwrite" in capsys.readouterr().err
    assert main(["calibrate", str(copy), "--dataset", str(data), *cache, "--overwrite"]) == 0
    assert read_calibration(copy, fingerprint(copy)).dataset == "words"


def test_a_saved_copy_has_the_calibration_and_a_changed_model_has_not(calibrated, tmp_path, caplog):
    model = polyrep.load(calibrated)
    copy = polyrep.save(model, tmp_path / "copy")
    assert (copy / "calibration.json").read_bytes() == (calibrated / "calibration.json").read_bytes()
    assert calibration_of(polyrep.load(copy), fingerprint(copy)) == read_calibration(calibrated, fingerprint(copy))
    with torch.no_grad():
        next(model.parameters()).add_(0.01)
    with caplog.at_level(logging.WARNING):
        changed = polyrep.save(model, tmp_path / "changed")
    assert not (changed / "calibration.json").exists() and "The calibration is left behind" in caplog.text
    assert calibration_of(polyrep.load(changed), fingerprint(changed)) is None


def test_a_folder_keeps_no_calibration_of_a_model_that_it_had_before(calibrated, tmp_path):
    copy = shutil.copytree(calibrated, tmp_path / "model")
    model = polyrep.load(copy)
    kept = (copy / "calibration.json").read_bytes()
    polyrep.save(model, copy)
    assert (copy / "calibration.json").read_bytes() == kept and (copy / "calibration.png").is_file()
    anew = type(model)(modules=list(model), prompts=dict(model.prompts), device="cpu")  # the same, of no folder
    polyrep.save(anew, copy)
    assert (copy / "calibration.json").read_bytes() == kept
    with torch.no_grad():
        next(anew.parameters()).add_(0.01)
    polyrep.save(anew, copy)
    assert not list(copy.glob("calibration.*"))
    assert calibration_of(polyrep.load(copy), fingerprint(copy)) is None


# --- what is refused before anything is encoded ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "flags", "said"),
    [
        ("minilm", [], "Save the model first: polyrep.save(polyrep.load('minilm'), 'models/minilm')"),
        ("someone/model", [], "Save the model first: polyrep.save(polyrep.load('someone/model'), 'models/model')"),
        ("", ["--dataset", ""], "--dataset: missing"),
        ("", ["--split", "train"], "no judgments for split 'train'"),
        ("", ["--depth", "0"], "--depth 0: is out of its range"),
        ("", ["--stride", "4"], "--stride 4: there are no windows to be that far apart"),
        ("", ["--model_dtype", "int8"], "--model_dtype 'int8'"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(model, flags, said, folder, data, tmp_path, capsys):
    asked = [model or str(folder), "--dataset", str(data), "--cache_dir", str(tmp_path / "cache"), *flags]
    assert main(["calibrate", *asked]) == 2
    assert said in (told := capsys.readouterr().err)
    assert "--queries inverse_cloze" in told or "no judgments" not in told
    assert not (tmp_path / "cache").exists() and not (folder / "calibration.json").exists()


def test_too_few_queries_are_refused_with_what_helps(folder, data, tmp_path, capsys):
    few = write_beir(tmp_path / "few", "dev")
    cache = ["--cache_dir", str(tmp_path / "cache")]
    assert main(["calibrate", str(folder), "--dataset", str(few), *cache]) == 2
    assert "has 3 queries, too few to tell a probability (at least 30). Judge more" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
    lost = shutil.copytree(data, tmp_path / "lost")
    judged = [line.split("\t")[0] for line in (data / "qrels" / "dev.tsv").read_text().splitlines()[1:]]
    (lost / "qrels" / "dev.tsv").write_text("q\td\ts\n" + "".join(f"{q}\td0\t0\n" for q in judged))
    assert main(["calibrate", str(folder), "--dataset", str(lost), *cache]) == 2
    assert "has 0 queries with a relevant document among their 100 best" in capsys.readouterr().err
    assert not (folder / "calibration.json").exists()


# --- in a search -------------------------------------------------------------------------------------------------


def index_of(model: Any, digest: str, precision: str = "float32") -> Any:
    index = open_index("memory:")
    vectors = in_memory(model.encode_document(list(DOCUMENTS.values())))
    origin = Origin("dense", "sentence", vectors.dim, "cosine", digest, precision)
    index.add([Shard(list(DOCUMENTS), vectors, origin, "")])
    return index


def test_search_and_server_give_the_probability_beside_the_score(calibrated):
    model, digest = polyrep.load(calibrated), fingerprint(calibrated)
    made, index = read_calibration(calibrated, digest), index_of(model, digest)
    queries = ["show open ports", "archive"]

    async def served(k: int) -> list[list[Any]]:
        async with Service(model, index, fingerprint=digest) as service:
            return await service.search(queries, k)

    plain = index.search(model.encode_query(queries), 5)
    assert all(hit.probability is None for hits in plain for hit in hits)
    expected = made.probabilities(np.array([[hit.score for hit in hits] for hits in plain]))
    for k in (1, 3, 9):
        for found in (
            asyncio.run(served(k)),
            Searcher(model, index, digest).search(queries, model.encode_query(queries), k),
        ):
            assert [[hit.id for hit in hits] for hits in found] == [[hit.id for hit in hits[:k]] for hits in plain]
            for hits, row in zip(found, expected, strict=True):
                np.testing.assert_allclose([hit.probability for hit in hits], row[:k], rtol=1e-5)


def test_the_command_prints_probabilities(calibrated, folder, tmp_path, capsys):
    lines = [json.dumps({"_id": name, "text": text}) + "\n" for name, text in DOCUMENTS.items()]
    (tmp_path / "corpus.jsonl").write_text("".join(lines))
    shards, uri = str(tmp_path / "shards"), f"faiss://{tmp_path}/index"
    assert main(["encode", str(folder), "--input", str(tmp_path / "corpus.jsonl"), "--output", shards]) == 0
    assert main(["index", shards, "--uri", uri]) == 0
    capsys.readouterr()
    asked = ["search", "show open ports", "--uri", uri, "--k", "2", "--model"]
    assert main([*asked, str(folder)]) == 0
    plain = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert main([*asked, str(calibrated)]) == 0
    found = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [[score, name] for score, _, name in found] == plain
    scores = np.array([[float(score) for score, _ in plain]])
    expected = read_calibration(calibrated, fingerprint(calibrated)).probabilities(scores)[0]
    assert [float(said.removeprefix("p=")) for _, said, _ in found] == pytest.approx(expected.tolist(), abs=2e-3)


def test_scores_of_signs_and_of_another_model_have_no_probability(calibrated, caplog):
    model, digest = polyrep.load(calibrated), fingerprint(calibrated)
    signs, other = index_of(model, digest, "binary"), index_of(model, "another")
    vectors = model.encode_query(["open ports"])
    for index, why in ((signs, "are signs"), (other, "were made by another model")):
        searcher = Searcher(model, index, digest)
        for _ in range(2):
            assert {hit.probability for hit in searcher.search(["open ports"], vectors, 3)[0]} == {None}
        assert caplog.text.count(f"{why}, so their scores have no probabilities") == 1


def test_scores_of_windows_have_the_probabilities_of_windows_alone(folder, data, tmp_path, caplog):
    copy = shutil.copytree(folder, tmp_path / "model")
    asked = ["calibrate", str(copy), "--dataset", str(data), "--depth", "20", "--cache_dir", str(tmp_path / "cache")]
    assert main([*asked, "--window", "4", "--stride", "2"]) == 0
    digest = fingerprint(copy)
    made, model = read_calibration(copy, digest), polyrep.load(copy)
    assert (made.window, made.stride) == (4, 2)
    windows = Windows.of(model, 4, 2, "model")
    found = candidates_of(model, load_retrieval_dataset(data, "dev"), 3, windows)
    cuts = [windows.cut(json.loads(line)["text"]) for line in (data / "corpus.jsonl").read_text().splitlines()]
    query = json.loads((data / "queries.jsonl").read_text().splitlines()[0])["text"]
    best = [float(model.similarity(model.encode_query(query), model.encode_document(cut)).max()) for cut in cuts]
    np.testing.assert_allclose(found.scores[0], sorted(best, reverse=True)[:3], rtol=1e-3)

    vectors = [model.encode_document(windows.cut(text)) for text in DOCUMENTS.values()]
    bounds = np.cumsum([0, *map(len, vectors)])
    asked_for = model.encode_query(["open ports"])
    for cut, origin in ((True, (4, 2)), (True, (4, 4)), (False, ())):
        index = open_index("memory:")
        embeddings = replace(in_memory(np.concatenate(vectors)), windows=bounds) if cut else in_memory(vectors[0][:1])
        ids = list(DOCUMENTS)[: embeddings.documents]
        index.add([Shard(ids, embeddings, Origin("v", "sentence", 384, "cosine", digest, "float32", *origin), "")])
        hits = Searcher(model, index, digest).search(["open ports"], asked_for, 2)[0]
        assert all((hit.probability is not None) == (origin == (4, 2)) for hit in hits)
    assert "are of --window 4 --stride 4, the calibration of --window 4 --stride 2" in caplog.text
    assert "are of whole documents, the calibration of --window 4 --stride 2" in caplog.text
    file = copy / "calibration.json"
    old = {name: value for name, value in json.loads(file.read_text()).items() if name not in ("window", "stride")}
    file.write_text(json.dumps(old))
    assert read_calibration(copy, digest) == replace(made, window=0, stride=0)


def test_the_only_document_with_a_word_of_the_query_leads_those_without():
    """Whether an engine lists them with 0, as exact search does, or not at all."""
    made = replace(MADE, weights={"score": 1.0, "lead": 1.0}, at=[0.0, 4.0], probability=[0.0, 1.0])
    lists = [[Hit("a", 1.0), Hit("b", 0.0)], [Hit("a", 1.0)]]
    assert [_probable(made, hits, None, True)[0].probability for hits in lists] == [0.5, 0.5]
    assert [len(_probable(made, hits, None, True)) for hits in [*lists, []]] == [2, 1, 0]
    assert _probable(made, lists[1], None, False)[0].probability == 0.25


def test_a_calibration_of_another_model_is_refused_by_search_and_server(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    write_calibration(copy, MADE)
    model, digest = polyrep.load(copy), fingerprint(copy)
    for door in (Searcher, lambda *given: Service(*given[:2], fingerprint=given[2])):
        with pytest.raises(InputError, match="made for model f, and this one is"):
            door(model, index_of(model, digest), digest)


# --- how sure a query is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["retriever", "pipeline"])
def test_the_uncertainty_of_queries_comes_from_the_part_that_has_it(kind, backbone, tmp_path, static_model):
    model = EXAMPLES["polyrep_gaussian"](backbone, tmp_path).models[kind]
    texts = ["show open ports", "a", "find a pattern in a file of many lines", "make an archive"]
    alone = torch.cat([uncertainty_one(model, text) for text in texts])
    np.testing.assert_allclose(uncertainty_of(model, texts, batch_size=3), alone, rtol=1e-4)
    assert not any(part._forward_hooks for part in model.modules())
    assert uncertainty_of(static_model, texts) is None


def uncertainty_one(model: Any, text: str) -> torch.Tensor:
    """Of one text, by the model's own call: half the sum of the log variances over all dimensions of the mean."""
    batch = model.preprocess([text], prompt=model.prompts.get("query") or None, task="query")
    with torch.no_grad():
        if len(model) > 1:
            output = model(batch, task="query")
        else:
            output = model[0].model(**{k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}, task="query")
    size = output["mean"].shape[-1] // output["variance"].shape[-1]
    return output["variance"].log().sum(-1) * size / 2


def test_a_map_that_reads_uncertainty_is_given_it(backbone, tmp_path):
    model = EXAMPLES["polyrep_gaussian"](backbone, tmp_path).models["retriever"]
    folder = polyrep.save(model, tmp_path / "model")
    made = replace(
        MADE, fingerprint=fingerprint(folder), weights={"score": 1.0, "uncertainty": -1.0}, at=[-500.0, 500.0]
    )
    write_calibration(folder, replace(made, probability=[0.0, 1.0]))
    model = polyrep.load(folder)
    index = open_index("memory:")
    vectors = in_memory(model.encode_document(list(DOCUMENTS.values())))
    index.add(
        [Shard(list(DOCUMENTS), vectors, Origin("d", "sentence", vectors.dim, "dot", made.fingerprint, "float32"), "")]
    )
    (hits,) = Searcher(model, index, made.fingerprint).search(["open ports"], model.encode_query(["open ports"]), 3)
    wide = float(uncertainty_one(model, "open ports"))
    expected = [min(max((hit.score - wide + 500) / 1000, 0), 1) for hit in hits]
    assert [hit.probability for hit in hits] == pytest.approx(expected, rel=1e-4)


def test_candidates_are_judged_by_what_counts_as_relevant(static_model, data):
    dataset = load_retrieval_dataset(data, "dev")
    found = candidates_of(static_model, dataset, 5)
    assert found.scores.shape == (60, 5) and (np.diff(found.scores, axis=1) <= 0).all() and found.there.all()
    similarity = static_model.similarity(
        static_model.encode_query(list(dataset.queries.values())),
        static_model.encode_document(list(dataset.corpus.values())),
    )
    best = similarity.topk(5).indices.numpy()
    np.testing.assert_array_equal(found.relevant, best == np.arange(60)[:, None])
