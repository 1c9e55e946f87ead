"""Publishing: what goes into a repository, what does not, and that others open it; on a Hub of our own."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm
import yaml
from conftest import CLI, IMPORTABLE, QUERIES, run_python, write_beir
from hub_server import HubServer, Repository, running_hub
from huggingface_hub import ModelCard
from room_examples import EXAMPLES, no_folder_holds
from test_calibration import MADE
from transformers import AutoModel, PreTrainedModel

import polyrep
from polyrep import InputError
from polyrep.cli import main
from polyrep.hub import cards, fingerprint, load, localize
from polyrep.hub.calibration import write_calibration
from polyrep.hub.forms import own_form
from polyrep.publishing import after_training, doors, inspection, publish, signatures, upload
from polyrep.publishing.inspection import refuse_secrets, verify
from polyrep.report import provenance, write_results

TEXTS = list(QUERIES.values())
TEMPLATES = sorted(path.stem for path in polyrep.files.shipped_folder("model_cards").glob("[!_]*.md"))

RECIPE = {
    "command": "accelerate launch train.py hub_configs/gaussian-minilm",
    "backbone_id": "sentence-transformers/all-MiniLM-L6-v2",
    "backbone_revision": None,
    "vision_id": None,
    "labels": True,
    "objective": "GaussianObjective",
    "pairs": {"tiny": 4881, "big": 3},
    "datasets": {"tiny": None, "big": "someone/big"},
    "licences": {"backbone": "apache-2.0", "vision": None, "data": {"tiny": "cc-by-4.0", "big": None}},
    "versions": "torch 2",
    "batch_size": 128,
    "learning_rate": 0.001,
    "length": "300 steps",
    "seed": 7,
}


CARD = ["--card", "late_interaction"]
ON_HUB = {"hub_dataset": "mteb/nano", "hub_revision": "a" * 40}  # as MTEB's tasks are


def results_of(folder: Path, digest: str, name: str = "measured", **changes: Any) -> Path:
    """A results file with one row of a model and one of a baseline, as ``evaluate`` writes it."""
    row = {"dataset": "tiny", "split": "test", "metric": "nDCG@10", "queries": 3}
    results: dict[str, Any] = {
        "name": name,
        **provenance("python evaluate.py /data/somewhere/model --dataset tiny --output /data/there"),
        "seeds": [0],
        "settings_tried": 3,
        "models": {"model": digest, "control": "0" * 64},
        "rows": [
            row | {"system": "model", "value": 0.61234, "bytes_per_document": 100},
            row | {"system": "model", "value": 0.5, "metric": "Recall@100"},
            row | {"system": "control", "value": 0.51234, "bytes_per_document": 100},
            row | {"system": "model", "dataset": "NanoTiny", "value": 0.7} | ON_HUB,
        ],
        "claims": [{"claim": "gain", "value": 0.1, "target": 0.05, "met": True, "system": "model"}],
    }
    write_results(results | changes, folder)
    return folder / f"{name}.json"


def finish(model: Any, output: Path, name: str = "final", recipe: dict[str, Any] | None = None) -> Path:
    """A folder as ``train`` leaves it, with results beside it."""
    folder = polyrep.save(model, output / name)
    digest = fingerprint(folder)
    if recipe:
        record = {"fingerprint": digest, "fingerprints": {name: digest}, "template": "gaussian", "card": recipe}
        (output / "training.json").write_text(json.dumps(record))
    results_of(output / "results", digest)
    return folder


@pytest.fixture(autouse=True)
def warm_doors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that opens folders without polyrep is a fork of one without it."""
    monkeypatch.setattr(sys, "executable", warm.python())


@pytest.fixture(scope="module")
def models(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    scratch = tmp_path_factory.mktemp("examples")
    rooms = ("gaussian", "reinpool_for_retrieval")
    gaussian, reinpool = (EXAMPLES[f"polyrep_{name}"](backbone, scratch) for name in rooms)
    gaussian.models["retriever"].prompts = {"query": "port: ", "document": "file: "}
    return {"gaussian": gaussian.models["retriever"], "reinpool": reinpool.models["pipeline"]}


@pytest.fixture
def finished(models: dict[str, Any], tmp_path: Path) -> Path:
    return finish(models["gaussian"], tmp_path / "gaussian", recipe=RECIPE)


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """What ``publish --dry_run`` says when it refuses; it must not have written anything into the folder."""
    before = {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()}
    assert main(["publish", str(folder), "--repo", "someone/model", "--dry_run", *flags]) == 2
    assert {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()} == before
    return capsys.readouterr().err


# --- the whole way, on a Hub of our own --------------------------------------------------------------------------

PUBLISH = """
import json, os, sys, time, urllib.request
time.sleep = lambda seconds: None  # what the client waits before it tries again
from polyrep.publishing import publish
from polyrep.cli import main
from polyrep.publishing.inspection import verify

for step in json.loads(sys.argv[1]):
    if step.get("trusting"):
        publish.verify = lambda *arguments: None
    else:
        publish.verify = verify
    if "drops" in step:
        urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/drops/{step['drops']}", data=b"")
    os.environ["HF_TOKEN"] = step.get("token", "hf_test")
    if not os.environ["HF_TOKEN"]:
        del os.environ["HF_TOKEN"]
    print("STATUS", main(step["arguments"]), flush=True)
    print("ENDED", file=sys.stderr, flush=True)
"""

OPEN = """
import importlib.abc, json, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("polyrep", "modeling", "toy"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import numpy as np
import sentence_transformers, torch
from transformers import AutoModel, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

jobs, texts = json.loads(sys.argv[1]), json.loads(sys.argv[2])
report = {}
for name, (family, repo, revision) in jobs.items():
    pinned = {"revision": revision, "trust_remote_code": True}
    model = getattr(sentence_transformers, family)(repo, device="cpu", **pinned)
    for task, encode in (("query", model.encode_query), ("document", model.encode_document)):
        report[f"{name} {task}"] = [np.asarray(vector).tolist() for vector in encode(texts)]
    if name == "gaussian":
        prompted = [model.prompts["query"] + text for text in texts]
        tokens = AutoTokenizer.from_pretrained(repo, **pinned)(prompted, padding=True, return_tensors="pt")
        with torch.no_grad():
            output = AutoModel.from_pretrained(repo, **pinned)(**tokens, task="query")
        report["auto query"] = output.sentence_embedding.tolist()
    else:
        whole = AutoModel.from_pretrained(repo, **pinned)
        tokens = AutoTokenizer.from_pretrained(repo, **pinned)(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            output = whole(**tokens, task="document")
        pooled = [vectors[there].tolist() for vectors, there in zip(output.token_embeddings, output.mask)]
        report["auto document"], head = pooled, whole.head
        module = get_class_from_dynamic_module("modeling_reinpool.ReinPoolPooling", repo, revision=revision)
        pooling = module.from_pretrained(repo, revision=revision)
        parts = [{k: v.tolist() for k, v in part.state_dict().items()} for part in (head, pooling.model)]
        report["heads agree"] = parts[0] == parts[1] and bool(parts[0])
print("REPORT" + json.dumps(report))
"""


def on_hub(hub: HubServer, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with a Hub that is ours."""
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test", "HF_HOME": str(cache)}
    return run_python(*arguments, env=environment | IMPORTABLE | {"HF_HUB_DISABLE_TELEMETRY": "1"}, cwd=cache)


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with running_hub() as server:
        yield server


@pytest.fixture(scope="module")
def published(
    hub: HubServer, models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[str, str, list[str]]]:
    """One process publishes one thing after another: step -> (status, what it wrote to stderr, commits after it)."""
    root = tmp_path_factory.mktemp("published")
    gaussian = finish(models["gaussian"], root / "gaussian", recipe=RECIPE)
    (gaussian / "optimizer.pt").write_bytes(b"a pickle")
    (gaussian / "added_tokens.json").write_text("{}")
    reinpool = finish(models["reinpool"], root / "reinpool")
    older = shutil.copytree(root / "gaussian", root / "older")
    (gaussian / "added_tokens.json").unlink()
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}

    def step(name: str, folder: Path, repo: str, **options: Any) -> dict[str, Any]:
        flags = options.pop("flags", [])
        return {"name": name, "arguments": ["publish", str(folder), "--repo", repo, *flags], **options}

    first = ["--hub_dataset", "tiny=someone/tiny:default", "--license", "apache-2.0"]
    steps = [
        step("first", older / "final", "someone/gaussian", flags=first),
        step("pipeline", reinpool, "org/reinpool", flags=["--private"]),
        step("again", older / "final", "someone/gaussian", flags=first, trusting=True),
        step("other results", gaussian, "someone/gaussian", trusting=True),
        step("now private", gaussian, "someone/gaussian", flags=["--private"]),
        step("no such licence", gaussian, "someone/gaussian", flags=["--license", "nonsense"], trusting=True),
        step("another kind", reinpool, "someone/gaussian"),
        step("no token", gaussian, "someone/gaussian", token=""),
        step("read only", gaussian, "someone/new", token="hf_read"),
    ]
    hub.repositories["someone/stranger"] = Repository(False)
    hub.repositories["someone/stranger"].add({"weights.gguf": b"x"}, "not ours")
    steps += [
        step("a stranger's", gaussian, "someone/stranger"),
        step("lost", gaussian, "someone/lost", trusting=True, drops=100),  # more than the client tries
        step("recovered", gaussian, "someone/lost", trusting=True, drops=0),
    ]
    ran = on_hub(hub, root, "-c", PUBLISH, json.dumps(steps))
    statuses = [line.split()[1] for line in ran.stdout.splitlines() if line.startswith("STATUS")]
    assert len(statuses) == len(steps), ran.stderr[-3000:]
    assert {path: path.read_bytes() for path in before} == before, "publishing must not change a folder"
    errors = ran.stderr.split("ENDED")
    return {s["name"]: (*end, ran.stdout) for s, end in zip(steps, zip(statuses, errors, strict=False), strict=True)}


def test_a_repository_is_complete_and_made_in_one_commit(published, hub):
    assert published["first"][0] == "0", published["first"][1]
    repository = hub.repositories["someone/gaussian"]
    assert len(repository.commits) == 3  # made, first, other results: publishing the same again makes none
    commit, files = repository.commits[1]
    assert commit in published["first"][2], "the printed lines name the commit"
    assert set(files) == {
        *(".gitattributes", "README.md", "results.png"),
        *("modeling_gaussian.py", "polyrep_fields.py", "polyrep_folder.py", "polyrep_room.py", "polyrep_trunk.py"),
        *(".eval_results/someone--tiny.yaml", ".eval_results/mteb--nano.yaml"),
        *("config.json", "config_sentence_transformers.json", "modules.json", "sentence_bert_config.json"),
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"),
    }
    for name, content in files.items():
        assert b"/data/somewhere" not in content and str(Path.home()).encode() not in content, name
    settings = json.loads(files["config_sentence_transformers.json"])
    assert settings["requirements"] == polyrep.hub.code.REQUIREMENTS
    entries = yaml.safe_load(files[".eval_results/someone--tiny.yaml"])
    assert [(e["dataset"], e["value"]) for e in entries] == [({"id": "someone/tiny", "task_id": "default"}, 0.61234)]
    entries = yaml.safe_load(files[".eval_results/mteb--nano.yaml"])
    nano = {"id": "mteb/nano", "task_id": "NanoTiny", "revision": "a" * 40}
    assert [(e["dataset"], e["value"]) for e in entries] == [(nano, 0.7)]
    assert not hub.repositories["someone/gaussian"].private and hub.repositories["org/reinpool"].private


def test_what_a_new_version_no_longer_has_is_removed(published, hub):
    _, files = hub.repositories["someone/gaussian"].commits[-1]
    assert "Removed, since this version has them not: added_tokens.json, .eval_results/s" in published["first"][2]
    assert not {".eval_results/someone--tiny.yaml", "added_tokens.json"} & set(files)
    assert {"model.safetensors", ".gitattributes", ".eval_results/mteb--nano.yaml"} < set(files)


def test_the_card_says_what_the_model_is_made_of_and_scores(published, hub):
    _, files = hub.repositories["someone/gaussian"].commits[1]
    card = ModelCard(files["README.md"].decode())
    data = card.data.to_dict()
    assert "these weights | apache-2.0 |" in card.text
    assert data["license"] == "apache-2.0" and data["base_model"] == RECIPE["backbone_id"]
    assert data["datasets"] == ["someone/big"] and "gaussian" in data["tags"]
    (index,) = data["model-index"]
    assert index["name"] == "someone/gaussian"
    found = [(r["dataset"]["type"], m["type"], m["value"]) for r in index["results"] for m in r["metrics"]]
    tiny = [("someone/tiny", "ndcg_at_10", 0.61234), ("someone/tiny", "recall_at_100", 0.5)]
    assert sorted(found) == [("mteb/nano", "ndcg_at_10", 0.7), *tiny]
    assert ".eval_results/someone--tiny.yaml" in files
    pinned = 'SentenceTransformer("someone/gaussian", revision="<commit>", trust_remote_code=True)'
    for words in (
        *(pinned, 'AutoModel.from_pretrained("someone/gaussian", revision', 'AutoTokenizer.from_pretrained("someone/'),
        *(
            "### NanoTiny",
            "| model | 0.612 |",
            "| control | 0.512 |",
            "settings tried: 3",
            "![",
            "(results.png)",
            "| gain | 0.1 |",
        ),
        *(
            "training data tiny | cc-by-4.0",
            "training data big | not stated",
            "tiny 4,881",
            "@inproceedings",
            "## Limits",
        ),
        *("Deviations from the paper", "--dataset tiny`"),
    ):
        assert words in card.text, words
    assert "somewhere" not in card.text and "{{" not in card.text and "\n\n\n" not in card.text


def test_others_open_it_at_that_commit_without_polyrep(published, hub, models, tmp_path):
    jobs = {
        "gaussian": ("SentenceTransformer", "someone/gaussian", hub.repositories["someone/gaussian"].commits[1][0]),
        "reinpool": ("MultiVectorEncoder", "org/reinpool", hub.repositories["org/reinpool"].commits[1][0]),
    }
    ran = on_hub(hub, tmp_path, "-c", OPEN, json.dumps(jobs), json.dumps(TEXTS))
    assert ran.returncode == 0, ran.stderr[-3000:]
    report = json.loads(ran.stdout.partition("REPORT")[2])
    assert report["heads agree"]
    for name, model in models.items():
        for task, encode in (("query", model.encode_query), ("document", model.encode_document)):
            for ours, theirs in zip(encode(TEXTS), report[f"{name} {task}"], strict=True):
                np.testing.assert_allclose(np.asarray(ours), theirs, atol=1e-5)
    np.testing.assert_allclose(models["gaussian"].encode_query(TEXTS), report["auto query"], atol=1e-5)
    for ours, theirs in zip(models["reinpool"].encode_document(TEXTS), report["auto document"], strict=True):
        np.testing.assert_allclose(np.asarray(ours), theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("another kind", "holds a model of another kind (polyrep_gaussian, SentenceTransformer"),
        ("a stranger's", "holds a model of another kind (none that can be told)"),
        ("no token", "no token for the Hub"),
        ("now private", "exists and is public, so --private cannot be kept"),
        ("no such licence", 'the Hub refuses the card: Invalid metadata in README.md.\n- "license" must be one of'),
        ("read only", "the Hub refused (HTTP 403), so the token may not write there"),
        ("lost", "no commit was made; the folder is as it was. Run the same command again"),
    ],
)
def test_what_the_hub_or_the_network_refuses_is_said_with_the_way_on(published, step, words):
    status, error, _ = published[step]
    assert ("refuses the card" in error) == (step == "no such licence"), error
    assert status == "2" and words in error, error


def test_after_a_lost_connection_the_same_command_goes_on(published, hub):
    assert published["recovered"][0] == "0", published["recovered"][1]
    assert [len(files) > 5 for _, files in hub.repositories["someone/lost"].commits] == [False, True]
    assert "someone/new" not in hub.repositories
    assert list(hub.repositories["someone/stranger"].commits[-1][1]) == ["weights.gguf"]


def test_train_publishes_what_it_measured(toy_run, hub, tmp_path):
    data = shutil.copytree(toy_run.parent / "data" / "tiny", tmp_path / "tiny")
    shutil.copyfile(data / "qrels" / "train.tsv", data / "qrels" / "test.tsv")
    flags = ["--datasets", str(data), "--output_dir", str(tmp_path / "out"), "--card", "late_interaction"]
    target = ["--push_to_hub", "true", "--hub_model_id", "someone/toy", "--hub_private_repo", "true"]
    ran = on_hub(hub, tmp_path, CLI, "train", str(toy_run), *flags, *target)
    assert ran.returncode == 0, ran.stderr[-3000:]
    repository = hub.repositories["someone/toy"]
    assert repository.private and len(repository.commits) == 2
    card = ModelCard(repository.commits[-1][1]["README.md"].decode())
    measured = json.loads((tmp_path / "out" / "results" / "test.json").read_text())
    assert {"BM25", "out"} < {row["system"] for row in measured["rows"]}  # and the untouched backbone
    own = next(r["value"] for r in measured["rows"] if (r["system"], r["metric"]) == ("out", "nDCG@10"))
    (index,) = card.data.to_dict()["model-index"]
    values = [m["value"] for r in index["results"] for m in r["metrics"] if m["type"] == "ndcg_at_10"]
    assert values == [round(own, 5)] and str(tmp_path) not in card.content


# --- what is refused ---------------------------------------------------------------------------------------------


KILLED = """
import os, signal, sys
from polyrep.publishing import publish
from polyrep.cli import main

publish.verify = lambda *arguments: None
end, number = sys.argv[1], int(sys.argv[2])

def hook(event, arguments):
    if event in ("open", "os.rename") and str(arguments[0]).endswith(end):
        os.kill(os.getpid(), number)

sys.addaudithook(hook)
main(["publish", *sys.argv[3:]])
"""
"""Publishes, until a file of some name is opened or moved."""


@pytest.mark.parametrize(
    ("end", "number"),
    [("model.safetensors", signal.SIGKILL), ("README.md", signal.SIGKILL), ("README.md", signal.SIGTERM)],
)
def test_killed_while_it_publishes_nothing_is_half_done(end, number, finished, tmp_path, monkeypatch):
    before = {path: path.read_bytes() for path in finished.parent.rglob("*") if path.is_file()}
    argv = [str(finished), "--repo", "someone/model", "--dry_run", "--output", str(tmp_path / "out" / "repository")]
    result = run_python("-c", KILLED, end, str(int(number)), *argv)
    assert result.returncode == -number, result.stderr[-3000:]
    assert not (tmp_path / "out" / "repository").exists()
    assert {path: path.read_bytes() for path in before} == before
    monkeypatch.setattr(publish, "verify", lambda *arguments: None)
    assert main(["publish", *argv]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["repository"], "what was left is removed"


def test_an_unfinished_folder_is_told_all_that_it_lacks(finished, capsys):
    shutil.rmtree(finished.parent / "results")
    (finished / "model.safetensors").unlink()
    error = refused(finished, capsys)
    assert "not finished" in error and "no model.safetensors" in error and "no results. Measure the model" in error
    assert "no such folder" in refused(finished / "nowhere", capsys)


def test_results_of_another_model_are_refused(finished, capsys, tmp_path):
    other = results_of(finished.parent / "results", "1" * 64, name="older")
    assert f"{other}: measured on model (11111111111111 (of version 1" in refused(finished, capsys)
    # Of a folder that the user names, other models' files are no concern; of one that is named, they are.
    assert [result["name"] for result in publish.collect(finished, [str(other.parent)]).results] == ["measured"]
    assert "another model's" in refused(finished, capsys, "--results", str(other))
    other.write_text("{}")
    assert "older.json: no results of `evaluate`" in refused(finished, capsys)
    other.write_text("{")
    assert "older.json:1: not valid JSON" in refused(finished, capsys)


def test_a_retrained_model_does_not_keep_its_numbers_or_its_recipe(finished, models, capsys):
    with torch.no_grad():
        models["gaussian"][0].model.head.mean_map.add_(0.25)
        polyrep.save(models["gaussian"], finished)
        models["gaussian"][0].model.head.mean_map.sub_(0.25)
    assert "another model's" in refused(finished, capsys)
    again = publish.collect(finished, [str(results_of(finished.parent / "r", fingerprint(finished)))])
    assert again.recipe is None
    notes = publish._what_is_missing(again, publish.PublishArguments("a/b"))
    assert ["no --license" in notes[0], "training.json is of other weights" in notes[1], len(notes)] == [True, True, 2]
    alone = replace(again, recipe=RECIPE, results=[again.results[0] | {"rows": again.results[0]["rows"][:1]}])
    (note,) = publish._what_is_missing(alone, publish.PublishArguments("a/b", license="mit"))
    assert "nothing was measured beside the model" in note


@pytest.mark.parametrize("name", ["model", "a/b/c", "so me/model", "a/-b", "a/b--c", "a/b.git", "a/" + "b" * 100])
def test_a_name_that_the_hub_would_refuse_is_refused_first(name, tmp_path, capsys):
    assert main(["publish", str(tmp_path / "nowhere"), "--repo", name, "--dry_run"]) == 2
    assert "the Hub would refuse this name" in capsys.readouterr().err


def test_flags_that_lead_nowhere_are_refused(finished, capsys, tmp_path):
    assert "no such template. There are citadel, dense2sparse," in refused(finished, capsys, "--card", "nothing")
    assert "no such template" in refused(finished, capsys, "--card", "_doors")
    assert "expected NAME=ORG/NAME" in refused(finished, capsys, "--hub_dataset", "tiny")
    assert "the results have no such data set" in refused(finished, capsys, "--hub_dataset", "x=a/b")
    for output in (tmp_path, finished / "hub"):
        assert "exists, or is in the model's folder" in refused(finished, capsys, "--output", str(output))


def test_code_that_is_not_ours_runs_only_with_the_users_word(finished, capsys):
    code = finished / "modeling_gaussian.py"
    code.write_text(code.read_text() + "\n# a change that nobody here has read\n")
    assert "is not the code of this polyrep, and opening the model would run it" in refused(finished, capsys)


def test_an_export_of_other_weights_is_refused(finished, capsys):
    (finished / "onnx").mkdir()
    (finished / "onnx" / "export.json").write_text(json.dumps({"fingerprint": "2" * 64}))
    assert "exported from other weights" in refused(finished, capsys)
    (finished / "onnx" / "export.json").unlink()
    (finished / "onnx" / "model.onnx").write_bytes(b"of unknown weights")
    assert "by something that does not say from which" in refused(finished, capsys)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        (
            "config_extra.json",
            '{"data": "/mnt/disk/me/data"}',
            "config_extra.json:1: holds the path /mnt/disk/me/data",
        ),
        ("config_extra.json", '{"data": "C:\\\\Users\\\\me"}', "holds the path C:"),
        ("notes.txt", "one\nlog in with hf_abcdefghijklmnopqrst\n", "notes.txt:2: holds a token"),
        ("notes.txt", "ask somebody@host\n", "holds the user name somebody"),
        ("config_extra.json", '{"author": "somebody"}', "holds the user name somebody"),
        (
            "README.md",
            "somebody may read this\n\n| run by | somebody |\n",
            "README.md:3: holds the user name somebody",
        ),
        ("notes.txt", "file:///home/me/data", "holds the path /home/me/data"),
        ("notes.txt", "path:/home/me/data", "holds the path /home/me/data"),
        ("notes.txt", '{"a":"https://x.y/z","b":"/home/me/data"}', "holds the path /home/me/data"),
        ("modeling_x.py", "somebody = max(1, 2)", None),
        ("notes.txt", "//server/share", "holds the path /server/share"),
        ("notes.txt", f"-I{Path(__file__).parent.parent}/x", f"holds the path {Path(__file__).parent.parent}"),
        ("model.onnx", "\x00\x01at /opt/me/polyrep/export.py\x00", "holds the path /opt/me/polyrep/export.py"),
        ("tokenizer.json", '{"x": "hf_abcdefghijklmnopqrst"}', "holds a token"),
        ("notes.txt", "see https://host/a/b and a/b/c, 1/2, ~/x and <a></a>; somebodyelse\n", None),
        ("tokenizer.json", '{"vocab": {"/usr/bin": 1}}', None),
    ],
)
def test_nothing_tells_of_the_machine_that_made_it(tmp_path, monkeypatch, file, text, words):
    monkeypatch.setattr(inspection.getpass, "getuser", lambda: "somebody")
    monkeypatch.chdir(Path(__file__).parent.parent)
    (tmp_path / file).write_text(text)
    if words is None:
        return refuse_secrets(tmp_path)
    with pytest.raises(InputError) as caught:
        refuse_secrets(tmp_path)
    assert words in str(caught.value) and "hf_abcdef" not in str(caught.value)


def test_a_name_that_is_public_anyway_is_none_to_hide(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"author": "somebody", "for": "root"}')
    monkeypatch.setattr(inspection.getpass, "getuser", lambda: "somebody")
    refuse_secrets(tmp_path, "somebody/model")
    for user in (lambda: "root", lambda: {}["no passwd entry"]):  # everybody's, and nobody's
        monkeypatch.setattr(inspection.getpass, "getuser", user)
        refuse_secrets(tmp_path)


def test_an_account_called_like_a_word_of_the_command_publishes(models, tmp_path, monkeypatch):
    command = "accelerate launch train.py hub_configs/gaussian-minilm --learning_rate 0.001 --datasets tiny"
    rows = [{"system": "bm25", "dataset": "tiny", "split": "test", "metric": "nDCG@10", "value": 0.5, "queries": 9}]
    results = provenance("python evaluate.py final --dataset tiny --baselines bm25") | {"name": "test", "claims": []}
    results |= {"rows": rows, "models": {}, "seeds": [7], "settings_tried": 1}
    recipe = RECIPE | {"command": command}
    card = cards.render_card(models["gaussian"], "gaussian", recipe=recipe, results=[results], fingerprints=[])
    (tmp_path / "README.md").write_text(str(card), encoding="utf-8")
    (tmp_path / "config.json").write_text('{"similarity_fn_name": "cosine", "split": "train"}')
    verbs = ["train", "evaluate", "encode", "index", "search", "publish", "data"]
    for user in [
        *re.findall(r"[a-z][\w]+", command.replace("tiny", "")),
        *verbs,
        "final",
        "python",
        "system",
        "cosine",
    ]:
        monkeypatch.setattr(inspection.getpass, "getuser", lambda user=user: user)
        refuse_secrets(tmp_path, "someone/model")
    (tmp_path / "notes.txt").write_text("ask train or somebody\n")
    monkeypatch.setattr(inspection.getpass, "getuser", lambda: "somebody")
    with pytest.raises(InputError, match="the user name somebody"):
        refuse_secrets(tmp_path, "someone/model")


def test_claims_of_another_model_are_refused(finished, capsys):
    results, digest = finished.parent / "results", fingerprint(finished)
    claim = {"claim": "gain", "value": 0.1, "target": None, "met": None}
    results_of(results, digest, claims=[claim | {"system": "control"}])
    assert "claims 'gain' of control, and the card is of model" in refused(finished, capsys)
    results_of(results, digest, claims=[claim])
    assert "claims 'gain' of one of several models without saying which" in refused(finished, capsys)
    results_of(results, digest, claims=[claim], models={"model": digest})
    assert publish.collect(finished, []).results[0]["claims"] == [claim]


def test_of_one_number_measured_twice_the_latest_counts(finished, models):
    results_of(finished.parent / "results", fingerprint(finished), "earlier", created="2020-01-01T00:00:00Z")
    rows = [{"system": "model", "dataset": "tiny", "split": "dev", "metric": "nDCG@10", "value": 0.9}]
    later = results_of(finished.parent / "results", fingerprint(finished), "later", created="2999-01-01T00:00:00Z")
    content = json.loads(later.read_text())
    content["rows"][0]["value"] = 0.75
    later.write_text(json.dumps(content | {"rows": content["rows"] + rows}))
    found = publish.collect(finished, [])
    assert [result["name"] for result in found.results] == ["earlier", "measured", "later"]
    entries = publish._eval_results(found, {"tiny": cards.HubId("a/tiny", "x")}, "a/b")
    assert [entry["value"] for entry in entries["a--tiny"]] == [0.75], "and dev is for choosing"
    card = cards.render_card(
        models["gaussian"], "gaussian", results=found.results, fingerprints=found.fingerprints, model_id="a/b"
    )
    index = card.data.to_dict()["model-index"][0]["results"]
    values = [(r["dataset"]["split"], m["value"]) for r in index for m in r["metrics"] if m["type"] == "ndcg_at_10"]
    assert sorted(values) == [("dev", 0.9), ("test", 0.7), ("test", 0.75)]


def test_code_of_another_repository_is_not_run(finished, capsys):
    tokenizer = finished / "tokenizer_config.json"
    content = json.loads(tokenizer.read_text())
    reference = {"auto_map": {"AutoTokenizer": ["someone/else--code.Tokenizer", None]}}
    tokenizer.write_text(json.dumps(content | reference))
    assert "takes its code from another repository (someone/else--code.Tokenizer)" in refused(finished, capsys)
    for file in finished.glob("*.py"):  # no code of its own, so no flag is asked for
        file.unlink()
    assert "takes its code from another repository" in refused(finished, capsys)


def test_the_header_of_weights_is_read_too(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"from": "/home/me/model"})
    with pytest.raises(InputError, match="/home/me/model"):
        refuse_secrets(tmp_path)


def test_a_folder_that_others_would_open_as_another_model_is_not_uploaded(models, tmp_path):
    folder = polyrep.save(models["reinpool"], tmp_path / "reinpool")
    model = load(folder, trust_remote_code=True, device="cpu")
    with torch.no_grad():
        model[-1].model.head.project.weight.add_(0.5)  # as if the folder held other weights than what was measured
    with pytest.raises(InputError, match="family MultiVectorEncoder: opened without polyrep, document/text/0 differs"):
        verify(folder, model)


def test_heads_are_compared_by_what_they_give_too(models):
    head = models["reinpool"][-1].model
    calls = [
        {"inputs": inputs, "method": graph.method, "fixed": dict(graph.fixed), "outputs": graph.outputs}
        for graph, inputs in signatures.trials(head)
    ]
    before = doors.tried(head, calls)
    assert {"0/None/keep_probability", "1/None/embeddings", "weight/keep.weight"} <= set(before)
    inspection._compare("head", doors.tried(head, calls), before)
    head.config.quantization, kept = "binary", head.config.quantization
    try:
        with pytest.raises(InputError, match="1/None/embeddings differs"):
            inspection._compare("head", doors.tried(head, calls), before)
    finally:
        head.config.quantization = kept


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (torch.tensor([1.0, float("nan")]), "differs by nan"),
        (torch.tensor([1.0, 2.0, 3.0]), r"has shape \(3,\) from the folder's own \(2,\)"),
        (torch.tensor([1.0, 2.1]), "differs by 0.1"),
        (torch.tensor([1.0, 2.0001]), None),
        (None, "gives other parts than the model, e.g. x"),
    ],
)
def test_vectors_agree_but_for_rounding(theirs, words):
    found = {} if theirs is None else {"x": theirs}
    with pytest.raises(InputError, match=words) if words else nullcontext():
        inspection._compare("a door", found, {"x": torch.tensor([1.0, 2.0])})


@pytest.fixture
def old_pipeline(models: dict[str, Any], tmp_path: Path) -> Path:
    """A finished folder as older versions wrote it: the modules of sentence-transformers, the backbone in the root."""
    folder = tmp_path / "old" / "final"
    models["reinpool"].save_pretrained(str(folder), create_model_card=False)
    localize(folder)
    results_of(tmp_path / "old" / "results", fingerprint(folder))
    assert json.loads((folder / "config.json").read_text())["model_type"] == "bert"
    return folder


def test_a_calibration_goes_with_the_model_and_the_card_says_so(finished, tmp_path, capsys):
    write_calibration(finished, replace(MADE, fingerprint=fingerprint(finished)))
    target = tmp_path / "hub"
    arguments = ["publish", str(finished), "--repo", "someone/model", "--dry_run", "--output", str(target)]
    assert main(arguments) == 0
    assert (target / "calibration.json").read_bytes() == (finished / "calibration.json").read_bytes()
    card = (target / "README.md").read_text()
    assert "40 queries of tiny (dev), with an expected calibration error of 0.013 for the ten best" in card
    write_calibration(finished, MADE)
    assert "made for model f, and this one is" in refused(finished, capsys)


def test_modules_of_an_older_version_are_published_as_one_folder(old_pipeline, models, tmp_path, capsys):
    (old_pipeline / "LICENSE").write_text("all may use it")
    target = tmp_path / "hub"
    arguments = ["publish", str(old_pipeline), "--repo", "someone/model", "--dry_run", "--output", str(target)]
    before = {path: path.read_bytes() for path in old_pipeline.rglob("*") if path.is_file()}
    assert main(arguments) == 0, capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before
    said = capsys.readouterr().out
    assert "published is the same model in one folder" in said and fingerprint(target)[:14] in said
    opened = AutoModel.from_pretrained(target)
    assert type(opened).__name__ == "ReinPoolForRetrieval" and not list(target.glob("[0-9]_*/"))
    tokens = models["reinpool"].tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = opened(**tokens, task="document")
    for ours, vectors, there in zip(
        models["reinpool"].encode_document(TEXTS), output.token_embeddings, output.mask, strict=True
    ):
        np.testing.assert_allclose(np.asarray(ours), vectors[there], atol=1e-5)
    assert (target / "LICENSE").read_text() == "all may use it"
    card = (target / "README.md").read_text()
    assert "| model | 0.612 |" in card and "refuse the root" not in card, "what the modules scored, it scores"
    # Its users may replace it by a newer one: the two are the same method.
    assert upload.model_kind(old_pipeline) == upload.model_kind(target) != upload.model_kind(old_pipeline / "0_X")


def test_an_export_of_the_head_of_such_modules_is_not_taken_for_the_whole(old_pipeline, capsys):
    (old_pipeline / "onnx").mkdir()
    (old_pipeline / "onnx" / "export.json").write_text(json.dumps({"fingerprint": fingerprint(old_pipeline)}))
    assert "is an export of the head, and what is published is the whole model" in refused(old_pipeline, capsys)


def test_modules_that_no_folder_holds_are_published_as_they_are(models, tmp_path, capsys):
    folder = finish(no_folder_holds(models["reinpool"]), tmp_path / "modules")
    target = tmp_path / "hub"
    assert main(["publish", str(folder), "--repo", "someone/model", "--dry_run", "--output", str(target)]) == 0
    assert "one folder" not in capsys.readouterr().out
    assert "AutoModel and AutoTokenizer refuse the root" in (target / "README.md").read_text()
    with pytest.raises(ValueError, match="is a pipeline of"):
        AutoModel.from_pretrained(target, trust_remote_code=True)


def test_queries_that_are_lengthened_are_compared_through_sentence_transformers(models, tmp_path, capsys):
    model = no_folder_holds(models["reinpool"])
    *modules, cnn, head = model.children()
    modules[0].query_expansion = {"strategy": "fixed", "length": 24}
    try:
        folder = finish(type(model)(modules=[*modules, head], device="cpu"), tmp_path / "lengthened")
        arguments = ["--repo", "someone/model", "--dry_run", "--output", str(tmp_path / "hub")]
        assert main(["publish", str(folder), *arguments]) == 0, capsys.readouterr().err
    finally:
        modules[0].query_expansion = None
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "Queries are lengthened to 24 tokens by\n`[MASK]`" in card and "Documents are cut" not in card


def test_a_head_alone_is_published_by_the_whole_models_results(models, tmp_path, capsys):
    head = models["reinpool"][-1].model
    whole = finish(models["reinpool"], tmp_path / "run")
    folder = polyrep.save(head, tmp_path / "run" / "head")
    digests = {"final": fingerprint(whole), "head": fingerprint(folder)}
    record = {"fingerprint": digests["final"], "fingerprints": digests, "template": "reinpool", "card": RECIPE}
    (tmp_path / "run" / "training.json").write_text(json.dumps(record))
    arguments = ["--repo", "someone/head", "--dry_run", "--output", str(tmp_path / "hub")]
    assert main(["publish", str(folder), *arguments]) == 0, capsys.readouterr().err
    card = (tmp_path / "hub" / "README.md").read_text()
    assert 'ReinPoolPooling.from_pretrained("someone/head", num_vectors=4, revision="<commit>")' in card
    assert "| model | 0.612 |" in card and "library_name: transformers" in card
    assert 'AutoModel.from_pretrained("someone/head", revision="<commit>", trust_remote_code=True)' in card


# --- cards -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def examples(backbone: Path, multi_vector_model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model of every kind that a template may be of: ``template/kind`` -> model."""
    found: dict[str, Any] = {"late_interaction/stock": multi_vector_model}
    for room_type, build in EXAMPLES.items():
        template = polyrep.ROOMS[room_type].card
        if template is None:
            continue
        for kind, model in build(backbone, tmp_path_factory.mktemp("example")).models.items():
            images = "_images" if kind == "images" else ""
            found[f"{template}{images}/{kind}"] = model
            last = model[len(model) - 1].model
            if len(model) > 1:
                found[f"{template}/head of {kind}"] = last
                if len(model) > 2:  # else the head reads the encoder itself, behind which nothing may stand
                    found[f"{template}/modules of {kind}"] = no_folder_holds(model)
            elif isinstance(getattr(last, "head", None), PreTrainedModel):
                found[f"{template}{images}/head in {kind}"] = last.head
    return found


@pytest.mark.parametrize("recipe", [RECIPE, None], ids=["trained", "not recorded"])
@pytest.mark.parametrize("model_id", ["someone/model", None], ids=["published", "local"])
def test_cards_of_every_kind_of_model_show_code_that_fits_it(recipe, model_id, examples):
    assert {name.partition("/")[0] for name in examples} == set(TEMPLATES)
    for name, model in examples.items():
        template, _, kind = name.partition("/")
        text = cards.render_card(model, template, recipe=recipe, model_id=model_id).content
        assert not {"{{", "{%", "\n\n\n"} & {text[i : i + n] for n in (2, 3) for i in range(len(text))}, name
        for heading in ("## Use", "## Licences", "## Citation", "## Limits", "## Deviations from the paper"):
            assert heading in text, (name, heading)
        assert ("tiny 4,881" in text) == bool(recipe) and ("is not recorded here" in text) != bool(recipe), name
        assert ("code in this repository" in text) == (name != "late_interaction/stock"), name
        assert ('revision="<commit>"' in text) == ("stands for the 40 digits" in text) == bool(model_id), name
        snippets = re.findall(r"```python\n(.*?)```", text, re.S)
        assert snippets, name
        for snippet in snippets:
            # A head has no family to open it by, and a folder without a head of its own no place to open one from.
            family = re.search(
                r"(SentenceTransformer|SparseEncoder|MultiVectorEncoder)\(\"(someone|path/to/this)", snippet
            )
            assert not (kind.startswith("head") and family), (name, snippet)
            assert "path/to/head" not in snippet, (name, snippet)
            assert not re.search(r"\b(opened|opened_head|head_alone|backbone_id)\b", snippet), (name, snippet)
        check_ways(name, model, text, model_id or "path/to/this/folder")


def check_ways(name: str, model: Any, text: str, place: str) -> None:
    """A card names what opens the model in the form that ``save`` gives it, and says what its root is."""
    room = polyrep.registry.room_of(model.config.model_type) if isinstance(model, PreTrainedModel) else own_form(model)
    form = "head" if isinstance(model, PreTrainedModel) else "folder" if room else "modules"
    form = "stock" if name == "late_interaction/stock" else form
    module = room.module if room else None
    by_module = form == "modules" or bool(getattr(module, "inside", None) if form == "folder" else module)
    assert bool(re.search(rf"\w+Pooling\.from_pretrained\(\"{place}\"", text)) == by_module, name
    root = re.search(rf"AutoModel\.from_pretrained\(\"{place}\"(, revision=\S+)?, trust", text)
    assert bool(root) == (form in ("folder", "head")), name
    assert ("AutoModel and AutoTokenizer refuse the root" in text) == (form == "modules"), name
    assert ("is in `0_Backbone` and the head in `" in text) == (form == "modules"), name
    assert ("serves it or refuses it" in text) == (form == "folder"), name
    assert ("opens the first alone" in text) == (form == "stock"), name
    table = text.partition("### Every way to open it")[2].partition("\n## ")[0]
    rows = [row.partition(",")[0] for row in re.findall(r"^\| (.+?) \| `", table, re.M)]
    head = form == "folder" and (len(model) > 1 or hasattr(model[0].model, "head"))
    wanted = {
        "folder": ["transformers", "sentence-transformers", *["the head alone"] * head],
        "head": ["transformers", *["the head alone"] * by_module],
        "modules": ["sentence-transformers", "the head alone", "the head alone"],
        "stock": ["sentence-transformers"],
    }
    assert rows == wanted[form], name


def test_a_card_says_what_stands_before_texts(models):
    model = models["gaussian"]
    assert 'has to: query `"port: "`, document `"file: "`.' in cards.render_card(model, "gaussian").content
    assert "has to:" not in cards.render_card(models["reinpool"], "reinpool").content


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{{ card_data }} {{ modelid }}", "asks for 'modelid'.*Did you mean 'model_id'"),
        ("{% if recipe %}{{ zzzzzz }}{% endif %}", "asks for 'zzzzzz'.*Variables: card_data, title"),
        ("{% include '_part.md' %}", "_part.md: asks for 'result'.*'results'"),
        ("{{ recipe.command }}", "has no recipe"),
        ("{% if %}", "broken.md:1:"),
    ],
)
def test_a_template_with_a_hole_is_refused(text, words, models, tmp_path, monkeypatch):
    (tmp_path / "broken.md").write_text(text)
    (tmp_path / "_part.md").write_text("{{ result }}")
    monkeypatch.setattr(cards, "shipped_folder", lambda name: tmp_path)
    with pytest.raises(InputError, match=f"(?s){words}"):
        cards.render_card(models["gaussian"], "broken")


def test_commands_and_licences_as_others_may_read_them(tmp_path):
    command = "accelerate launch train.py hub_configs/x --backbone /home/me/models/late/final --output_dir=/tmp/x"
    command += " --datasets ../data/a /mnt/b data/c --overwrite --cache_dir /tmp/y --push_to_hub true --seed 3"
    command += " --baselines bm25,/mnt/models/other/final --hub_token hf_secret"
    command += """ --prompts '{"query": "/home/me/x"}'"""
    public = "accelerate launch train.py hub_configs/x --backbone late --datasets a b data/c --seed 3"
    public += """ --baselines bm25,other --prompts '{"query": "x"}'"""
    assert cards.public_command(command) == public
    dashed = "polyrep train x --output-dir /mnt/out --hub-token=hf_secret --push-to-hub true --learning-rate 0.1"
    assert cards.public_command(dashed) == "polyrep train x --learning-rate 0.1"
    for word in ("polyrep", "train", "publish", "--seed", "3", "x"):  # an account or repository of that name
        asked = (
            f"polyrep train x --hub_model_id {word}/{word} --output_dir {word} --backbone /home/{word}/{word} --seed 3"
        )
        assert cards.public_command(asked) == shlex.join(["polyrep", "train", "x", "--backbone", word, "--seed", "3"])
    for metadata, licence in (
        ("license: mit", "mit"),
        ("license: [mit, cc-by-4.0]", "mit, cc-by-4.0"),
        ("license: other\nlicense_name: ours", "ours"),
        ("tags: [a]", None),
        ("license: [", None),
        ("- a\n- list", None),
    ):
        (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n\n# x\n")
        assert cards.stated_licence(tmp_path) == licence
    assert cards.stated_licence(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "no name to publish under"),
        (["--hub_model_id", "toy"], "the Hub would refuse this name"),
        (["--hub_model_id", "a/toy", "--hub_token", "hf_x"], "--hub_token: command lines are kept"),
        (["--hub_model_id", "a/toy"], "no token for the Hub"),
        (["--hub_model_id", "a/toy", "--dry_run", "true"], "this run makes no card"),
        (["--hub_model_id", "a/toy", "--dry_run", "true", *CARD], "(?s)on the test split of its data.*split 'test'"),
        (["--hub_model_id", "a/toy", "--dry_run", "true", *CARD, "--output_dir", "backbone0"], "like its backbone"),
        (["--hub_model_id", "a/toy", "--card", "nothing"], "no such template"),
    ],
)
def test_a_run_that_could_not_be_published_is_refused_before_it_trains(toy_run, capsys, monkeypatch, flags, words):
    monkeypatch.setattr(upload, "get_token", lambda: None)
    assert main(["train", str(toy_run), "--push_to_hub", "true", *flags]) == 2
    assert re.search(words, capsys.readouterr().err)


def test_data_of_vectors_alone_cannot_be_measured(toy_run, tmp_path, capsys, monkeypatch):
    data = write_beir(tmp_path / "tiny")
    loaded = polyrep.data.load.load_retrieval_dataset(data)
    monkeypatch.setattr(
        after_training, "load_retrieval_dataset", lambda *_, **__: replace(loaded, vectors={"query": None})
    )
    target = ["--push_to_hub", "true", "--hub_model_id", "a/b", "--datasets", str(data), "--dry_run", "true", *CARD]
    assert main(["train", str(toy_run), *target]) == 2
    assert "brings vectors, not what they were made of" in capsys.readouterr().err


def test_the_door_opener_imports_nothing_of_ours():
    ran = run_python(
        "-P",
        "-c",
        f"import runpy; runpy.run_path({doors.__file__!r}); import sys; "
        "print([name for name in sys.modules if name.startswith('polyrep')])",
    )
    assert ran.stdout.strip() == "[]", ran.stderr
