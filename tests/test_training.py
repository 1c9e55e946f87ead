"""Training through the command line: plans, overrides, checkpoints, interruption, several processes."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLI, run_python, run_two_processes
from safetensors.torch import load_file
from sentence_transformers import MultiVectorEncoder
from torch.nn import functional as F
from toy.objective import ToyLoss

import polyrep
from polyrep import InputError
from polyrep.cli import main
from polyrep.training import arguments, recipes, train
from polyrep.training import losses as objectives
from polyrep.training.build import build
from polyrep.training.objective import Objective, contract


def losses(output: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((output / "training.json").read_text())["log"] if "loss" in entry]


def edit_recipe(run: Path, folder: Path, **changes: object) -> Path:
    """A copy of the run with some recipe values changed."""
    shutil.copytree(run, folder)
    recipe = json.loads((run / "recipe.yaml").read_text().partition("\n")[2])
    (folder / "recipe.yaml").write_text("# test\n" + json.dumps(recipe | changes))
    return folder


@pytest.fixture(scope="module")
def trained(toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps in this process, a checkpoint after three."""
    output = tmp_path_factory.mktemp("runs") / "toy"
    flags = ["--output_dir", str(output), "--card", "late_interaction"]
    assert main(["train", str(toy_run), *flags]) == 0
    return output


def test_training_writes_a_folder_that_opens_and_differs_from_its_start(trained, toy_run):
    model = polyrep.load(trained / "final", trust_remote_code=True)
    start = load_file(trained / "init" / "model.safetensors")
    moved = {
        k: (v - start[k]).abs().max().item() for k, v in load_file(trained / "final" / "model.safetensors").items()
    }
    assert moved["head.project.weight"] > 1e-3 and moved["head.task_bias"] > 1e-3, "task reached the model in training"
    assert model.get_embedding_dimension() == 6
    assert len(losses(trained)) == 6
    record = json.loads((trained / "training.json").read_text())
    assert record["fingerprint"] == polyrep.hub.fingerprint(trained / "final")
    card = (trained / "final" / "README.md").read_text()
    assert str(trained) in record["command"] and str(trained) not in card
    assert "| command | `polyrep train toy --card late_interaction` |" in card, "no path of this machine"
    assert record["fingerprints"] == {"final": record["fingerprint"]} and record["card"]["pairs"] == {"tiny": 4}
    assert record["pairs"] == {"tiny": 4} and record["recipe"]["temperature"] == 0.1


def test_every_checkpoint_is_a_model_folder(trained):
    for step in (3, 6):
        folder = trained / f"checkpoint-{step}"
        assert (folder / "modeling_toy.py").is_file()
        assert polyrep.load(folder, trust_remote_code=True).get_embedding_dimension() == 6


def test_a_resumed_run_has_the_same_next_losses(trained, toy_run, tmp_path):
    output = tmp_path / "resumed"
    shutil.copytree(trained / "init", output / "init")
    shutil.copytree(trained / "checkpoint-3", output / "checkpoint-3")
    (output / "checkpoint-9").mkdir()  # cut off before its state was written, so not to be taken
    (output / "checkpoint-9" / "trainer_state.json").write_text('{"global_')
    assert main(["train", str(toy_run), "--output_dir", str(output), "--resume_from_checkpoint", "last"]) == 0
    np.testing.assert_allclose(losses(output), losses(trained), rtol=1e-5)
    for name, tensor in load_file(output / "final" / "model.safetensors").items():
        torch.testing.assert_close(tensor, load_file(trained / "final" / "model.safetensors")[name])


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_has_nothing_left_to_do_and_keeps_every_byte(trained, toy_run, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    before = content(output)
    flags = ["--output_dir", str(output), "--resume_from_checkpoint", "last", "--card", "late_interaction"]
    assert main(["train", str(toy_run), *flags]) == 0
    assert "nothing is left to do" in capsys.readouterr().out and content(output) == before
    assert main(["train", str(toy_run), *flags, "--max_steps", "4"]) == 2
    assert "6 steps behind it, and 4 are asked for" in capsys.readouterr().err and content(output) == before
    record = json.loads((output / "training.json").read_text())
    del record["fingerprints"]  # as older runs wrote it
    (output / "training.json").write_text(json.dumps(record))
    assert main(["train", str(toy_run), *flags]) == 0 and "nothing is left to do" in capsys.readouterr().out
    shutil.rmtree(output / "final")  # as if it had been killed after its last step
    assert main(["train", str(toy_run), *flags]) == 0
    assert "checkpoint-7" not in [path.name for path in output.iterdir()] and losses(output) == losses(trained)
    weights = (output / "final" / "model.safetensors").read_bytes()
    assert weights == before["final/model.safetensors"] == before["checkpoint-6/model.safetensors"]


def test_a_longer_run_goes_on_and_is_recorded_as_a_whole(trained, toy_run, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    state = json.loads((output / "checkpoint-6" / "trainer_state.json").read_text())
    state["stateful_callbacks"]["SoFar"]["attributes"]["seconds"] = 1000.0
    (output / "checkpoint-6" / "trainer_state.json").write_text(json.dumps(state))
    flags = ["--output_dir", str(output), "--resume_from_checkpoint", "last", "--max_steps", "9"]
    assert main(["train", str(toy_run), *flags]) == 0
    assert "Going on from step 6 of 9" in capsys.readouterr().out
    record = json.loads((output / "training.json").read_text())
    summary = record["log"][-1]
    assert record["steps"] == 9 and losses(output)[:6] == losses(trained) and len(losses(output)) == 9
    np.testing.assert_allclose(summary["train_loss"], np.mean(losses(output)), rtol=1e-4)
    assert record["seconds"] > 1000 and 1000 < summary["train_runtime"] <= record["seconds"] + 1
    assert summary["train_steps_per_second"] == round(9 / summary["train_runtime"], 3)
    assert summary["train_samples_per_second"] == round(9 * 2 / summary["train_runtime"], 3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--learning_rate", "0.02"], r"another learning_rate \(0.01, now 0.02\)"),
        (["--per_device_train_batch_size", "1"], r"another batch_size \(2, now 1\)"),
        (["--gradient_accumulation_steps", "3"], r"another gradient_accumulation_steps \(1, now 3\)"),
        (["--weight_decay", "0.5", "--seed", "7"], r"another weight_decay \(0.0, now 0.5\), seed \(42, now 7\)"),
        (["--freeze", "encoder"], r"another freeze \(\[\], now \['encoder'\]\)"),
    ],
)
def test_what_a_step_does_may_not_change_when_a_run_goes_on(trained, toy_run, tmp_path, capsys, flags, words):
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    told = ["train", str(toy_run), "--output_dir", str(output), "--resume_from_checkpoint", "last", *flags]
    assert main(told) == 2
    assert re.search(words, capsys.readouterr().err)
    assert content(output) == content(trained)


def test_an_older_run_that_did_not_write_its_trainers_settings_goes_on(trained, toy_run, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(trained, output, ignore=shutil.ignore_patterns("final", "checkpoint-6"))
    old = {"backbone", "objective", "projection_dim", "temperature"}
    run = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps({name: run[name] for name in old}))
    state = json.loads((output / "checkpoint-3" / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["SoFar"]
    (output / "checkpoint-3" / "trainer_state.json").write_text(json.dumps(state))
    flags = ["--output_dir", str(output), "--resume_from_checkpoint", "last", "--save_steps", "5", "--seed", "42"]
    assert main(["train", str(toy_run), *flags]) == 0
    np.testing.assert_allclose(losses(output), losses(trained), rtol=1e-5)


def test_card_and_record_name_one_batch_size(toy_run, tmp_path):
    flags = ["--output_dir", str(tmp_path), "--gradient_accumulation_steps", "2", "--max_steps", "1"]
    assert main(["train", str(toy_run), *flags, "--card", "late_interaction"]) == 0
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["batch_size"] == record["card"]["batch_size"] == 2 * 2
    assert (
        "| batch size, learning rate, length, seed | 4, 0.01, 1 steps, 42 |"
        in (tmp_path / "final" / "README.md").read_text()
    )


def test_ctrl_c_leaves_the_last_checkpoint_intact_and_resuming_gives_the_same_losses(toy_run, trained, tmp_path):
    output = tmp_path / "interrupted"
    interrupt = """
import os, signal, sys, toy
from transformers import TrainerCallback
from polyrep.training import whole
from polyrep.cli import main

class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)

plain = whole.CheckpointCallback
whole.CheckpointCallback = lambda *_: type("Both", (Interrupt, plain), {})()
sys.exit(main(sys.argv[1:]))
"""
    result = run_python("-c", interrupt, "train", str(toy_run), "--output_dir", str(output))
    assert result.returncode == 130
    assert "Interrupted at step" in result.stdout and "checkpoint-3" in result.stdout
    assert not (output / "final").exists()
    polyrep.load(output / "checkpoint-3", trust_remote_code=True)
    assert main(["train", str(toy_run), "--output_dir", str(output), "--resume_from_checkpoint", "last"]) == 0
    np.testing.assert_allclose(losses(output)[-3:], losses(trained)[-3:], rtol=1e-5)


NOTE_WRITERS = """
import os
from pathlib import Path
from sentence_transformers import SentenceTransformer
stock = SentenceTransformer.save_pretrained

def save_pretrained(self, path, *args, **kwargs):
    stock(self, path, *args, **kwargs)
    (Path(path) / f"writer-{os.environ['RANK']}").touch()

SentenceTransformer.save_pretrained = save_pretrained
"""
"""Program text that leaves a file in each saved folder, named by the process that saved it."""


def test_two_processes_train_what_one_does(toy_run, trained, tmp_path):
    """Two processes with a batch of 1 each are one process with a batch of 2, dropout being 0."""
    program = tmp_path / "cli.py"
    program.write_text(NOTE_WRITERS + Path(CLI).read_text())
    output = tmp_path / "two"
    flags = ["--output_dir", str(output), "--per_device_train_batch_size", "1"]
    result = run_two_processes(program, "train", str(toy_run), *flags)
    assert result.returncode == 0, result.stderr[-3000:]
    writers = {path.name for path in output.glob("checkpoint-*/writer-*")}
    assert writers == {"writer-0"}, "each checkpoint has one writer"
    np.testing.assert_allclose(losses(output), losses(trained), rtol=1e-4)
    expected = load_file(trained / "final" / "model.safetensors")
    for name, tensor in load_file(output / "final" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-3)  # Adam turns rounding into steps


def test_the_objective_is_infonce(sentence_model):
    """Against the formula, on features that the model passes through."""
    rng = torch.Generator().manual_seed(0)
    queries, documents = (torch.randn(4, 5, generator=rng) for _ in range(2))
    loss = ToyLoss(lambda features, task: features, temperature=0.5)(
        [{"sentence_embedding": queries}, {"sentence_embedding": documents}]
    )
    q, d = F.normalize(queries, dim=1).double(), F.normalize(documents, dim=1).double()
    each = [-(q[i] @ d[i] / 0.5 - torch.logsumexp(d @ q[i] / 0.5, 0)) for i in range(4)]
    torch.testing.assert_close(loss.double(), torch.stack(each).mean(), rtol=1e-5, atol=1e-6)


def test_dry_run_prints_the_plan_and_writes_nothing(toy_run, tmp_path, capsys):
    output = tmp_path / "never"
    flags = ["--output_dir", str(output), "--dry_run", "--projection_dim", "4", "--temperature", "0.5"]
    assert main(["train", str(toy_run), *flags]) == 0
    plan = dict(
        line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line[:1].isalpha() and " " in line
    )
    assert not output.exists()
    assert plan["pairs"] == "tiny 4 = 4" and plan["steps"].startswith("6 ")
    assert "'temperature': 0.5" in plan["objective"] and "'projection_dim': 4" in plan["method"]
    encoder = sum(
        p.numel()
        for p in polyrep.load(json.loads((toy_run / "recipe.yaml").read_text()[7:])["backbone"])[0].parameters()
    )
    assert plan["parameters"].startswith(f"{encoder + 32 * 4 + 4 + 2 * 4:,},")


def test_the_shipped_recipe_resolves_and_any_flag_overrides(tmp_path):
    plan = recipes.resolve(
        ["late-interaction-minilm", "--learning_rate", "3e-5", "--scale", "2", "--max_length", "64"]
    )
    assert plan.args.learning_rate == 3e-5 and plan.args.max_length == 64 and plan.objective_arguments["scale"] == 2.0
    assert plan.args.per_device_train_batch_size == 32 and plan.args.report_to in ([], ["none"])
    assert (plan.run / "recipe.yaml").read_text().splitlines()[
        0
    ] == f"# accelerate launch train.py hub_configs/{plan.run.name}"
    folder = tmp_path / "init"
    build(plan, folder)
    model = polyrep.load(folder)
    assert isinstance(model, MultiVectorEncoder)
    assert [type(m).__name__ for m in model] == ["LateInteractionTransformer"]
    assert [part["type"] for part in model[0].model.config.trunk] == ["Dense", "MultiVectorMask", "Normalize"]
    assert model.max_seq_length == 256
    vectors = model.encode_document(["list open ports"])[0]
    assert vectors.shape[1] == 128
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)), rtol=1e-4, atol=1e-4)


def test_code_gets_the_plan_that_a_command_gets(toy_run, tmp_path):
    values = {"temperature": 0.5, "projection_dim": 4, "max_steps": 3, "freeze": ["encoder", "x"], "overwrite": True}
    plan = recipes.plan_of(toy_run, **values, output_dir=str(tmp_path))
    words = shlex.split(plan.command)
    assert words[:3] == ["polyrep", "train", str(toy_run)]
    same = recipes.resolve(words[2:])
    for part in ("run", "recipe", "config", "objective", "objective_arguments", "head", "command"):
        assert getattr(plan, part) == getattr(same, part)
    assert plan.args.to_dict() == same.args.to_dict() and plan.objective_arguments == {"temperature": 0.5}
    assert plan.with_trainer(max_steps=5).args.max_steps == 5 and plan.args.max_steps == 3
    with pytest.raises(InputError, match="'temprature' is no flag.*'temperature'"):
        recipes.plan_of(toy_run, temprature=1)


def test_help_is_grouped_and_complete(capsys):
    with pytest.raises(SystemExit):
        main(["train", "late-interaction-minilm", "--help"])
    text = capsys.readouterr().out
    for heading in (
        "recipe:",
        "objective: MultiVectorMultipleNegativesRankingLoss:",
        "training (MultiVectorEncoderTrainingArguments):",
    ):
        assert heading in text
    for flag in (
        "--backbone",
        "--dry_run",
        "--scale",
        "--resume_from_checkpoint",
        "--report_to",
        "--gradient_checkpointing",
    ):
        assert flag in text
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "--dry_run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "flags", "words"),
    [
        ({"learning_rat": 1}, [], "'learning_rat' is no flag.*'learning_rate'"),
        ({"objective": "Nope"}, [], "'Nope'.*ToyLoss"),
        ({"datasets": []}, [], "no training data"),
        ({"datasets": ["no/such/folder"]}, [], "no such file or folder"),
        ({"freeze": ["nothing"]}, [], "'nothing': matches no parameter"),
        ({"backbone": "./nowhere"}, [], "nowhere"),
        ({}, ["--resume_from_checkpoint", "last"], "no complete checkpoint"),
        ({}, ["--resume_from_checkpoint", "./missing"], "./missing"),
        ({"auto_find_batch_size": True}, [], "another batch than card and record say"),
        ({"logging_strategy": "steps", "save_strategy": "best"}, [], "save_strategy|metric"),
        ({}, ["--learning_rate", "1e30", "--max_grad_norm", "0"], "loss is (nan|inf).*step"),
    ],
)
def test_what_cannot_be_trained_is_refused(toy_run, tmp_path, capsys, changes, flags, words):
    run = edit_recipe(toy_run, tmp_path / "run", **changes)
    assert main(["train", str(run), "--output_dir", str(tmp_path / "out"), *flags]) == 2
    assert pytest.raises(InputError, match="(?s)" + words).matches(InputError(capsys.readouterr().err))
    assert not (tmp_path / "out" / "final").exists()


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("config.json", {"projektion_dim": 4}, "'projektion_dim' is no field of ToyConfig"),
        ("config.json", {"projection_dim": 0}, "projection_dim=0"),
        ("recipe.yaml", {"freeze": "encoder"}, r"'encoder' is not a list; write \[encoder\]"),
        ("recipe.yaml", {"objective": "MatryoshkaLoss"}, "needs 'loss', which no flag can hold"),
    ],
)
def test_run_files_are_checked_before_anything_is_made(toy_run, tmp_path, capsys, file, changes, words):
    run = edit_recipe(toy_run, tmp_path / "run", **(changes if file == "recipe.yaml" else {}))
    if file == "config.json":
        (run / file).write_text(json.dumps(json.loads((run / file).read_text()) | changes))
    assert main(["train", str(run), "--output_dir", str(tmp_path / "out")]) == 2
    assert re.search(words, capsys.readouterr().err)


def test_overwrite_deletes_nothing_before_the_new_run_can_start(toy_run, tmp_path):
    output = tmp_path / "out"
    (output / "final").mkdir(parents=True)
    flags = ["--output_dir", str(output), "--overwrite"]
    assert main(["train", str(toy_run), *flags, "--freeze", "nothing"]) == 2
    assert (output / "final").is_dir()


def test_a_run_resumed_with_another_model_is_refused(toy_run, trained, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(trained, output)
    flags = ["--output_dir", str(output), "--resume_from_checkpoint", "last", "--projection_dim", "5"]
    assert main(["train", str(toy_run), *flags]) == 2
    assert "another projection_dim" in capsys.readouterr().err


def test_code_of_another_repository_in_a_backbone_does_not_run(toy_run, backbone, tmp_path):
    """The map survives in the saved config; training must neither fetch what it names nor fail on it."""
    changed = tmp_path / "backbone"
    shutil.copytree(backbone, changed)
    config = json.loads((changed / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "someone/else--modeling_x.X"}
    (changed / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="someone/else"):
        polyrep.load(changed, trust_remote_code=True)
    assert polyrep.load(changed, device="cpu").encode(["file"]).shape == (1, 32)


def test_draws_follow_seed_step_and_row_but_not_the_rank(monkeypatch):
    whole = objectives.row_uniform(6, 2, seed=3, step=7)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(objectives, "get_world_size", lambda: 3)
        monkeypatch.setattr(objectives, "get_rank", lambda rank=rank: rank)
        parts.append(objectives.row_uniform(2, 2, seed=3, step=7))
    assert torch.equal(torch.cat(parts), whole) and 0 <= whole.min() and whole.max() < 1
    monkeypatch.undo()
    assert not torch.equal(objectives.row_uniform(6, 2, seed=3, step=8), whole)
    assert not torch.equal(objectives.row_uniform(6, 2, seed=4, step=7), whole)


def test_an_earlier_run_is_not_replaced_by_accident(toy_run, trained, capsys):
    before = polyrep.hub.fingerprint(trained / "final")
    assert main(["train", str(toy_run), "--output_dir", str(trained)]) == 2
    assert "--overwrite" in capsys.readouterr().err and polyrep.hub.fingerprint(trained / "final") == before


def test_freezing_keeps_weights(toy_run, tmp_path):
    output = tmp_path / "frozen"
    assert (
        main(["train", str(toy_run), "--output_dir", str(output), "--freeze", r"\.encoder\.", "--max_steps", "2"]) == 0
    )
    start, end = (load_file(output / part / "model.safetensors") for part in ("init", "final"))
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved == {"head.project.weight", "head.project.bias", "head.task_bias"}


def test_unknown_commands_and_runs_say_what_there_is(capsys):
    before = signal.getsignal(signal.SIGINT)
    assert main(["fly"]) == 2 and "train" in capsys.readouterr().out
    assert main(["train", "no-such-run"]) == 2 and "late-interaction-minilm" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_several_gpus_in_one_process_are_refused(toy_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(arguments.SentenceTrainingArguments, "n_gpu", 2)
    assert main(["train", str(toy_run), "--output_dir", str(tmp_path / "out")]) == 2
    assert "2 GPUs" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_stock_loss_is_answered_for_and_a_loss_that_answers_by_itself_must_inherit():
    modules = [importlib.import_module(family[2]) for family in arguments.TRAINERS.values()]
    losses = [getattr(module, name) for module in modules for name in module.__all__]
    assert losses and all(contract(loss) is Objective for loss in losses)
    with pytest.raises(TypeError, match="Halfway: has 'prepare'.*Inherit from Objective"):
        contract(type("Halfway", (torch.nn.Module,), {"prepare": lambda self, data: data}))


def test_stock_modules_are_made_for_the_width_of_the_backbone(backbone, toy_run, stock_run, tmp_path, capsys):
    """The run is of 384 numbers, the backbone has 32."""
    data = json.loads((toy_run / "recipe.yaml").read_text()[7:])["datasets"][0]
    run = stock_run
    words = [str(run), "--backbone", str(backbone), "--datasets", data, "--output_dir", str(tmp_path / "out")]
    words += ["--max_steps", "1", "--max_length", "16", "--bf16", "false", "--per_device_train_batch_size", "2"]
    assert main(["train", *words, "--dry_run"]) == 0 and main(["train", *words]) == 0
    model = polyrep.load(tmp_path / "out" / "final")
    assert (model[1].in_features, model[1].out_features) == (32, 128)
    dense = json.loads((run / "1_Dense" / "config.json").read_text())
    (run / "1_Dense" / "config.json").write_text(json.dumps(dense | {"module_input_name": "nothing"}))
    capsys.readouterr()
    assert main(["train", *words, "--overwrite", "--dry_run"]) == 2
    assert "the run's modules (Transformer + Dense + MultiVectorMask + Normalize) encode no text: KeyError" in (
        capsys.readouterr().err
    )


def test_a_backbone_that_cuts_its_vectors_is_measured_so_and_no_head_is_put_behind_it(sentence_model, beir, tmp_path):
    sentence_model.save_pretrained(str(tmp_path / "cut"), create_model_card=False)
    settings = tmp_path / "cut" / "config_sentence_transformers.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"truncate_dim": 16}))
    model, out = str(tmp_path / "cut"), str(tmp_path / "out")
    (beir / "qrels" / "train.tsv").write_text((beir / "qrels" / "test.tsv").read_text())
    assert main(["encode", model, "--input", str(beir), "--output", str(tmp_path / "encoded")]) == 0
    (shard,) = (tmp_path / "encoded" / "shards").glob("*.safetensors")
    assert load_file(shard)["values"].shape == (5, 16)
    flags = ["--dataset", str(beir), "--baselines", "none", "--output", str(tmp_path / "results")]
    assert main(["evaluate", model, *flags, "--cache_dir", str(tmp_path / "cache")]) == 0
    rows = json.loads((tmp_path / "results" / "results.json").read_text())["rows"]
    assert {row["bytes_per_document"] for row in rows if row["metric"] == "nDCG@10"} == {16 * 2}
    for run in ("gaussian-minilm-frozen", "gaussian-minilm"):
        plan = recipes.plan_of(run, backbone=model, datasets=[str(beir)], output_dir=out)
        with pytest.raises(InputError, match=r"cuts its vectors to 16 numbers \(truncate_dim\)"):
            train.run(plan)
    assert not Path(out).exists()
