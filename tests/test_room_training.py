"""Rules of every training: a dry run leaves nothing, an interrupted run goes on, two processes do what one does."""

from __future__ import annotations

import importlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLI, DOCUMENTS, QUERIES, ROOT, run_two_processes, write_beir
from datasets import Dataset
from room_examples import EXAMPLES, RUNS, behind
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch.nn import functional as F

from polyrep.cli import main
from polyrep.hub.example import TinyRun
from polyrep.hub.polyrep_room import SIDES
from polyrep.training.arguments import TRAINERS

SMALL = "--max_steps 4 --save_steps 2 --save_total_limit 5 --logging_steps 1 --disable_tqdm true".split()

# Not Adam, whose first step is as long for a gradient of mere rounding as for any other.
TOGETHER = "--max_steps 3 --save_strategy no --max_grad_norm 1e9 --optim sgd --learning_rate 0.05".split()


@dataclass
class Trained:
    """A folder of a run, and the arguments of ``train`` that made it but for the folder and the batch."""

    tiny: TinyRun
    arguments: list[str]
    folder: Path

    @property
    def record(self) -> dict[str, Any]:
        return json.loads((self.folder / "training.json").read_text())

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.record["log"] if "loss" in entry]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """What was learned: of a head, or of a whole model."""
        part = "head" if (self.folder / "head").is_dir() else "final"
        return load_file(self.folder / part / "model.safetensors")

    def again(self, folder: Path, *more: str) -> Trained:
        """The same run in another folder, with further arguments."""
        arguments = [*self.arguments, *more]
        batch = ["--per_device_train_batch_size", str(self.tiny.batch)]
        assert main(["train", *arguments, *batch, "--output_dir", str(folder)]) == 0
        return Trained(self.tiny, arguments, folder)


@pytest.fixture(scope="module", params=RUNS, ids=" ".join)
def trained(
    request: pytest.FixtureRequest, backbone: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Trained]:
    """Four steps, with a checkpoint after each two."""
    (room, _), tiny = request.param, RUNS[request.param]
    root = tmp_path_factory.mktemp("runs")
    example = EXAMPLES[room](backbone, tmp_path_factory.mktemp("example"))
    pipeline = example.models.get("pipeline")
    stands_on = behind(pipeline) if pipeline else SentenceTransformer(modules=[Transformer(str(backbone))])
    if len(stands_on) == 1:  # behind a bare encoder, where the method takes the place of the pooling
        stands_on.append(Pooling(stands_on[0].get_embedding_dimension(), "mean"))
    stands_on.save_pretrained(str(root / "backbone"))
    arguments = [tiny.run, "--backbone", str(root / "backbone"), "--datasets", str(write_beir(root / "tiny", "train"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)  # where caches are
        yield Trained(tiny, [*arguments, *SMALL, *tiny.flags.split()], root).again(root / "whole")


def test_a_dry_run_tells_the_plan_and_leaves_nothing(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trained.again(Path("out"), "--dry_run", "true")
    plan = dict(re.findall(r"^([a-z]+) +(.+)", capsys.readouterr().out, re.M))
    pairs = trained.record["pairs"]
    assert plan["pairs"].startswith(" + ".join(f"{name} {count}" for name, count in pairs.items()))
    assert plan["objective"].startswith(trained.record["recipe"]["objective"]) and plan["steps"].startswith("4 ")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_goes_on_to_what_an_unbroken_one_gives(trained, tmp_path):
    interrupted = shutil.copytree(trained.folder, tmp_path / "interrupted")
    for later in ("final", "head", "checkpoint-4"):
        shutil.rmtree(interrupted / later, ignore_errors=True)
    resumed = trained.again(interrupted, "--resume_from_checkpoint", "last")
    assert resumed.losses == trained.losses and len(resumed.losses) == 4
    ours, theirs = resumed.weights, trained.weights
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, msg=name)


def test_a_run_interrupted_after_its_last_step_is_written_without_another(trained, tmp_path):
    interrupted = shutil.copytree(trained.folder, tmp_path / "interrupted")
    for later in ("final", "head"):
        shutil.rmtree(interrupted / later, ignore_errors=True)
    resumed = trained.again(interrupted, "--resume_from_checkpoint", "last")
    assert resumed.losses == trained.losses and resumed.record["steps"] == 4
    assert {path.name for path in interrupted.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert all(torch.equal(resumed.weights[name], value) for name, value in trained.weights.items())


def test_a_finished_run_keeps_every_byte_and_a_longer_one_goes_on_from_its_end(trained, tmp_path, capsys):
    shutil.copytree(trained.folder, tmp_path / "whole")
    before = {path: path.read_bytes() for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    trained.again(tmp_path / "whole", "--resume_from_checkpoint", "last")
    assert "nothing is left to do" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    longer = trained.again(tmp_path / "whole", "--resume_from_checkpoint", "last", "--max_steps", "5")
    assert "Going on from step 4 of 5" in capsys.readouterr().out
    assert longer.losses[:4] == trained.losses and len(longer.losses) == longer.record["steps"] == 5


def test_two_processes_train_what_one_does(trained, tmp_path):
    """With half a batch each: what is compared across a batch is gathered from both, negatives included."""
    one = trained.again(tmp_path / "one", *TOGETHER, *trained.tiny.together.split())
    half = ["--per_device_train_batch_size", str(trained.tiny.batch // 2), "--ddp_backend", "gloo"]
    ran = run_two_processes(CLI, "train", *one.arguments, *half, "--output_dir", str(tmp_path / "two"))
    assert ran.returncode == 0, ran.stderr[-3000:]
    two = Trained(trained.tiny, one.arguments, tmp_path / "two")
    np.testing.assert_allclose(two.losses, one.losses, rtol=1e-3)
    ours, theirs = two.weights, one.weights
    for name in theirs.keys() - set(trained.tiny.solved):
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-4, rtol=1e-3, msg=name)


MAPPING = {"query": "query", "positive": "document"}
PAIRS = {"query": list(QUERIES.values()), "positive": list(DOCUMENTS.values())[: len(QUERIES)]}


def stock_loss(model: Any, folder: Path, mapping: dict[str, str]) -> float:
    """Mean over three steps of one batch in the library's own trainer, at a rate that learns nothing."""
    family = type(model).__name__
    trainer, arguments, module = TRAINERS[family]
    losses = importlib.import_module(module)
    if family == "SentenceTransformer":
        loss = losses.MultipleNegativesRankingLoss(model, scale=1, similarity_fct=model.similarity)
    elif family == "SparseEncoder":
        inner = losses.SparseMultipleNegativesRankingLoss(model)
        loss = losses.SpladeLoss(model, inner, document_regularizer_weight=0)
    else:
        loss = losses.MultiVectorMultipleNegativesRankingLoss(model)
    settings = {"learning_rate": 0.0, "max_steps": 3, "per_device_train_batch_size": len(QUERIES)}
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    args = arguments(output_dir=str(folder), router_mapping=mapping, **settings, **quiet)
    return trainer(model=model, args=args, train_dataset=Dataset.from_dict(PAIRS), loss=loss).train().training_loss


@pytest.mark.parametrize("room", EXAMPLES)
def test_the_librarys_own_trainer_encodes_each_column_as_its_side(room, backbone, tmp_path):
    assert SIDES == f"router_mapping={MAPPING}" and SIDES in (ROOT / "model_cards" / "_doors.md").read_text()
    for kind, model in EXAMPLES[room](backbone, tmp_path / "example").models.items():
        queries, documents = model.encode_query(PAIRS["query"]), model.encode_document(PAIRS["positive"])
        scores = model.similarity(queries, documents)
        expected = F.cross_entropy(scores, torch.arange(len(scores))).item()
        found = stock_loss(model, tmp_path / kind, MAPPING)
        np.testing.assert_allclose(found, expected, rtol=2e-4, err_msg=kind)


@pytest.mark.parametrize("room", sorted(EXAMPLES.keys() - {"polyrep_toy"}))
def test_the_librarys_own_trainer_that_is_told_no_side_says_what_becomes_of_queries(room, backbone, tmp_path, caplog):
    for kind, model in EXAMPLES[room](backbone, tmp_path / "example").models.items():
        as_query, as_document = model.encode_query(PAIRS["query"]), model.encode_document(PAIRS["query"])
        differ = not torch.equal(model.similarity(as_query, as_query), model.similarity(as_query, as_document))
        caplog.clear()
        logging.Logger.warning_once.cache_clear()
        with caplog.at_level(logging.WARNING):
            try:
                stock_loss(model, tmp_path / kind, {})
                said = caplog.text
            except ValueError as refusal:
                said = str(refusal)
        assert (SIDES in said) == (differ and type(model).__name__ != "MultiVectorEncoder"), kind
