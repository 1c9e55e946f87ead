"""What a stranger's folder could run: nothing without the flag on the command line, whichever door it comes to."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import toy  # noqa: F401  registers the test room
from conftest import ROOT
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

import polyrep
from polyrep import InputError
from polyrep.cli import main
from polyrep.hub.code import listed_activation, listed_module, may_run
from polyrep.training.recipes import CONSENTS, plan_of

MARK = "ran"
CODE = """
from pathlib import Path
Path({place!r}).touch()
from sentence_transformers.base.modules.transformer import Transformer as Thing
"""


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """Puts the file ``evil.py`` into a folder, where one can import it; the mark says whether that happened."""
    mark = tmp_path / MARK

    def put(folder: Path) -> Path:
        (folder / "evil.py").write_text(CODE.format(place=str(mark)))
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, "evil", raising=False)
        monkeypatch.setattr("builtins.input", lambda *_: "y")  # what transformers asks where nobody said anything
        return mark

    return put


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# Folders of models


def names_a_module(folder: Path) -> None:
    listing = json.loads((folder / "modules.json").read_text())
    listing[0]["type"] = "evil.Thing"
    (folder / "modules.json").write_text(json.dumps(listing))


def names_an_activation(folder: Path) -> None:
    edit(folder / "2_Dense" / "config.json", activation_function="evil.Thing")


def names_a_module_of_a_router(folder: Path) -> None:
    listing = json.loads((folder / "modules.json").read_text())
    listing[0] = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.router.Router"}
    (folder / "modules.json").write_text(json.dumps(listing))
    (folder / "0").mkdir()
    router = {"types": {"0": "evil.Thing"}, "structure": {"query": ["0"], "document": ["0"]}, "parameters": {}}
    (folder / "router_config.json").write_text(json.dumps(router))


def names_a_tokenizer_of_words(folder: Path) -> None:
    listing = json.loads((folder / "modules.json").read_text())
    kind = "sentence_transformers.sentence_transformer.modules.word_embeddings.WordEmbeddings"
    listing[0] = {"idx": 0, "name": "0", "path": "0_Words", "type": kind}
    (folder / "modules.json").write_text(json.dumps(listing))
    (folder / "0_Words").mkdir()
    config = {"tokenizer_class": "evil.Thing", "update_embeddings": False, "max_seq_length": 9}
    (folder / "0_Words" / "wordembedding_config.json").write_text(json.dumps(config))


def maps_a_tokenizer(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.Thing"]}, tokenizer_class="Thing")


def maps_a_model(folder: Path) -> None:
    edit(folder / "config.json", auto_map={"AutoModel": "evil.Thing", "AutoConfig": "evil.Thing"}, model_type="thing")


def fetches_an_attention(folder: Path) -> None:
    edit(folder / "config.json", attn_implementation="someone/else")


def fetches_an_attention_for_a_part(folder: Path) -> None:
    edit(folder / "config.json", _attn_implementation_internal={"": "someone/else"})


HOSTILE = [
    names_a_module,
    names_an_activation,
    names_a_module_of_a_router,
    names_a_tokenizer_of_words,
    maps_a_tokenizer,
    maps_a_model,
    fetches_an_attention,
    fetches_an_attention_for_a_part,
]


@pytest.fixture
def plain(backbone: Path, tmp_path: Path) -> Path:
    """A stock model with a Dense, which opens."""
    modules = [Transformer(str(backbone)), Pooling(32, "mean"), Dense(32, 8)]
    folder = tmp_path / "plain"
    polyrep.save(SentenceTransformer(modules=modules, device="cpu"), folder)
    return folder


def demo(folder: Path, data: Path) -> int:
    spec = importlib.util.spec_from_file_location("demo_app", ROOT / "demo" / "app.py")
    assert spec and spec.loader
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    app.open_vision(str(folder), None, trusted=False)
    return 0


DOORS: dict[str, Callable[[Path, Path], int]] = {
    "load": lambda folder, data: bool(polyrep.load(folder)),
    "evaluate": lambda folder, data: main(["evaluate", str(folder), "--dataset", str(data), "--baselines", "none"]),
    "frontier": lambda folder, data: main(["evaluate", str(folder), "--frontier", "--dataset", str(data)]),
    "encode": lambda folder, data: main(["encode", str(folder), "--input", str(data), "--output", f"{data}-encoded"]),
    "search": lambda folder, data: main(["search", "x", "--uri", f"memory:{data}-made", "--model", str(folder)]),
    "publish": lambda folder, data: main(["publish", str(folder), "--repo", "me/it", "--dry_run"]),
    "export": lambda folder, data: main(["export-onnx", str(folder)]),
    "demo": demo,
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("spoil", HOSTILE)
def test_no_door_runs_what_a_model_folder_names(plain, evil, beir, capsys, door, spoil):
    spoil(plain)
    mark = evil(plain)
    try:
        status = DOORS[door](plain, beir)
    except ValueError as error:
        status, said = 2, str(error)
    else:
        said = capsys.readouterr().err
    assert not mark.exists()
    if spoil is not maps_a_tokenizer or status == 2:  # transformers may have a tokenizer of its own for the model
        assert status == 2 and "Traceback" not in said and said.strip()


@pytest.mark.parametrize("spoil", [names_a_module, names_an_activation])
def test_what_the_user_trusts_runs(plain, evil, spoil):
    """So that the test above would notice."""
    spoil(plain)
    mark = evil(plain)
    with contextlib.suppress(Exception):
        polyrep.load(plain, trust_remote_code=True)
    assert mark.exists()


def test_a_folder_that_only_lies_beside_foreign_code_opens_without_it(plain, evil):
    mark = evil(plain)
    assert polyrep.load(plain, device="cpu").encode(["a file"]).shape == (1, 8)
    assert not mark.exists()


def test_our_own_code_needs_no_flag_until_a_byte_of_it_changes(trained, tmp_path):
    assert may_run(trained / "final", trusted=False)
    changed = shutil.copytree(trained / "final", tmp_path / "changed")
    code = changed / "modeling_toy.py"
    code.write_text(code.read_text() + "\n")
    assert not may_run(changed, trusted=False) and may_run(changed, trusted=True)
    shutil.copy(trained / "final" / "modeling_toy.py", code)
    edit(changed / "config.json", auto_map={"AutoModel": "someone/else--modeling_toy.ToyModel"})
    assert not may_run(changed, trusted=False)
    with pytest.raises(InputError, match="takes its code from another repository"):
        may_run(changed, trusted=True)


def test_our_own_code_opens_no_tokenizer_of_another_folder(trained, backbone, evil, tmp_path):
    """Code that may run is that of the folder which was looked at."""
    other = shutil.copytree(backbone, tmp_path / "other")
    maps_a_tokenizer(other)
    mark = evil(other)
    (other / "evil.py").write_text(
        (other / "evil.py").read_text() + "from transformers import BertTokenizer as Thing\n"
    )
    changed = shutil.copytree(trained / "final", tmp_path / "changed")
    edit(changed / "sentence_bert_config.json", tokenizer_name_or_path=str(other))
    for trusted in (False, True):
        with pytest.raises(InputError, match="tokenizer_name_or_path .*opens something else than the files of this"):
            polyrep.load(changed, trust_remote_code=trusted)
    assert not mark.exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"model_args": {"adapter_kwargs": {"subfolder": "adapter"}}},
        {"config_kwargs": {"transformers_weights": "adapter_model.bin"}},
        {"model_kwargs": {"use_kernels": True}},
        {"model_kwargs": {"variant": "other"}},
    ],
)
def test_a_module_opens_its_own_files_alone(plain, settings):
    polyrep.load(plain, device="cpu")
    file = plain / "sentence_bert_config.json"
    file.rename(file.with_name("sentence_roberta_config.json"))
    edit(file.with_name("sentence_roberta_config.json"), **settings)
    with pytest.raises(InputError, match="opens something else than the files of this folder"):
        polyrep.load(plain, device="cpu")


# Runs


@pytest.fixture(scope="module")
def trained(toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "toy"
    assert main(["train", str(toy_run), "--output_dir", str(output), "--max_steps", "3"]) == 0
    return output


def strangers_run(toy_run: Path, folder: Path, **recipe: object) -> Path:
    """A run that somebody sent."""
    shutil.copytree(toy_run, folder)
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(json.dumps(json.loads(text.partition("\n")[2]) | recipe))
    return folder


def train(run: Path, output: Path, *flags: str) -> int:
    return main(["train", str(run), "--output_dir", str(output), "--max_steps", "2", *flags])


@pytest.mark.parametrize("flag", CONSENTS)
def test_a_recipe_gives_no_consent(toy_run, tmp_path, capsys, flag):
    run = strangers_run(toy_run, tmp_path / "run", **{flag: "true"})
    assert train(run, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert f"recipe.yaml: {flag}: true is for whoever trains to say" in said
    assert not (tmp_path / "out").exists()


def test_a_backbone_with_code_ends_in_a_sentence(backbone, evil, beir, tmp_path, capsys):
    other = shutil.copytree(backbone, tmp_path / "other")
    maps_a_model(other)
    mark = evil(other)
    flags = ["--datasets", str(beir), "--output_dir", str(tmp_path / "out"), "--dry_run"]
    assert main(["train", "late-interaction-minilm", "--backbone", str(other), *flags]) == 2
    assert "Traceback" not in capsys.readouterr().err and not mark.exists()


def test_trust_covers_what_the_command_names(toy_run, backbone, tmp_path, capsys):
    run = strangers_run(toy_run, tmp_path / "run")
    assert train(run, tmp_path / "out", "--trust_remote_code") == 2
    assert f"pass --backbone {backbone} too" in capsys.readouterr().err
    assert train(run, tmp_path / "out", "--trust_remote_code", "--backbone", str(backbone)) == 0
    assert plan_of(run, trust_remote_code=True, backbone=str(backbone)).recipe.trust_remote_code


def test_the_code_of_a_run_stays_where_it_is(toy_run, evil, tmp_path):
    """Files that lie in a run go into no model, whatever their names."""
    run = strangers_run(toy_run, tmp_path / "run")
    mark = evil(run)
    (run / "modeling_toy.py").write_text((run / "evil.py").read_text())
    (run / "tokenization_evil.py").write_text((run / "evil.py").read_text())
    (run / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": [null, "tokenization_evil.Thing"]}}')
    edit(run / "config.json", auto_map={"AutoConfig": "evil.Thing", "AutoModel": "evil.Thing"})
    assert train(run, tmp_path / "out") == 0
    assert not mark.exists()
    made = {file.name for place in ("init", "final") for file in (tmp_path / "out" / place).glob("*.py")}
    assert made == {"modeling_toy.py", "polyrep_fields.py", "polyrep_folder.py", "polyrep_room.py"}
    assert "evil" not in (tmp_path / "out" / "final" / "config.json").read_text()


def test_a_run_names_no_module_of_its_own(toy_run, evil, tmp_path, capsys):
    run = strangers_run(toy_run, tmp_path / "run")
    mark = evil(run)
    names_a_module(run)
    assert train(run, tmp_path / "out") == 2
    assert "modules.json: 'evil.Thing' is no module of sentence-transformers" in capsys.readouterr().err
    assert not mark.exists() and not (tmp_path / "out" / "final").exists()


def test_a_run_of_a_head_names_no_module_of_its_own(evil, multi_vector_model, tmp_path, capsys, beir):
    run = shutil.copytree(ROOT / "hub_configs" / "reinpool-minilm", tmp_path / "run")
    mark = evil(run)
    polyrep.save(multi_vector_model, tmp_path / "late")
    (run / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "", "type": "evil.Thing"}]')
    flags = ["--backbone", str(tmp_path / "late"), "--datasets", str(beir), "--split", "test"]
    flags += ["--model_dtype", "float32", "--per_device_train_batch_size", "2", "--cache_dir", str(tmp_path / "cache")]
    train(run, tmp_path / "out", *flags)
    assert not mark.exists() and not any((tmp_path / "out").rglob("evil.py"))


@pytest.mark.parametrize("name", ["os.abort", "evil.Thing", "torch.hub.load", "torch.nn.Threshold", "Tanh"])
def test_a_run_names_no_activation_but_those_of_torch(backbone, beir, evil, stock_run, tmp_path, capsys, name):
    run = stock_run
    mark = evil(run)
    edit(run / "1_Dense" / "config.json", activation_function=name)
    flags = ["--backbone", str(backbone), "--datasets", str(beir), "--split", "test", "--hard_negatives", "0"]
    assert train(run, tmp_path / "out", *flags) == 2
    assert f"activation_function {name!r} is none of torch.nn" in capsys.readouterr().err
    assert not mark.exists()


@pytest.mark.parametrize("setting", ["model_args", "config_kwargs", "backend", "tokenizer_name_or_path"])
def test_a_run_opens_nothing_else_than_the_backbone(backbone, beir, stock_run, tmp_path, capsys, setting):
    run = stock_run
    edit(run / "sentence_bert_config.json", **{setting: {"trust_remote_code": True}})
    flags = ["--backbone", str(backbone), "--datasets", str(beir), "--split", "test", "--hard_negatives", "0"]
    assert train(run, tmp_path / "out", *flags) == 2
    assert f"{setting!r} is no setting that a run may make" in capsys.readouterr().err


def test_a_module_outside_of_the_run_is_refused(backbone, beir, stock_run, tmp_path, capsys):
    run = stock_run
    listing = json.loads((run / "modules.json").read_text())
    listing[1]["path"] = "../elsewhere"
    (run / "modules.json").write_text(json.dumps(listing))
    assert train(run, tmp_path / "out", "--backbone", str(backbone), "--datasets", str(beir), "--split", "test") == 2
    assert "module path '../elsewhere' leaves the folder" in capsys.readouterr().err


def test_the_tokenizer_of_a_backbone_runs_nothing_because_the_run_has_a_method(toy_run, backbone, evil, tmp_path):
    changed = shutil.copytree(backbone, tmp_path / "backbone")
    mark = evil(changed)
    maps_a_tokenizer(changed)
    run = strangers_run(toy_run, tmp_path / "run", backbone=str(changed))
    train(run, tmp_path / "out")
    assert not mark.exists() and not list((tmp_path / "out").rglob("evil.py"))


def test_a_checkpoint_from_elsewhere_runs_nothing(trained, toy_run, evil, tmp_path, capsys):
    output = shutil.copytree(trained, tmp_path / "out")
    checkpoint = output / "checkpoint-3"
    mark = evil(checkpoint)
    names_a_module(checkpoint)
    flags = ["--output_dir", str(output), "--resume_from_checkpoint", "last", "--max_steps", "5"]
    assert main(["train", str(toy_run), *flags]) == 2
    assert "evil.py: is not the code of this polyrep, and going on from it would run it" in capsys.readouterr().err
    assert not mark.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_the_state_of_a_checkpoint_is_read_as_weights_only(trained, toy_run, tmp_path, capsys, name):
    class Evil:
        def __reduce__(self):
            return (tmp_path / MARK).touch, ()

    output = shutil.copytree(trained, tmp_path / "run")
    checkpoint = max(output.glob("checkpoint-*"), default=None)
    assert checkpoint is not None
    (checkpoint / name).write_bytes(pickle.dumps(Evil()))
    flags = ["--output_dir", str(output), "--max_steps", "9", "--resume_from_checkpoint", "last"]
    assert main(["train", str(toy_run), *flags]) == 2
    assert "is damaged, or would run code" in capsys.readouterr().err and not (tmp_path / MARK).exists()


@pytest.mark.parametrize("text", ["a: !!python/object/apply:os.abort []", "- a", "[" * 5000, "\xff", "1: 2", "{a: {b"])
def test_a_recipe_that_is_none_is_refused(toy_run, tmp_path, capsys, text):
    run = strangers_run(toy_run, tmp_path / "run")
    (run / "recipe.yaml").write_bytes(text.encode("latin-1"))
    assert train(run, tmp_path / "out") == 2
    assert "recipe.yaml: " in capsys.readouterr().err


@pytest.mark.parametrize("setting", [{"deepspeed": "evil.py"}, {"accelerator_config": "evil.json"}])
def test_a_recipe_that_names_a_file_which_is_not_there_is_refused(toy_run, tmp_path, capsys, setting):
    run = strangers_run(toy_run, tmp_path / "run", **setting)
    assert train(run, tmp_path / "out") == 2
    assert "a flag of the trainer names what is not there" in capsys.readouterr().err


@pytest.mark.parametrize(
    "setting",
    [
        {"backbone": 5},
        {"backbone": None},
        {"backbone": ["a"]},
        {"datasets": [1]},
        {"max_steps": None},
        {"seed": True},
        {"learning_rate": [0.1, None]},
        {"freeze": ["("]},
    ],
    ids=str,
)
def test_a_recipe_with_a_value_of_another_kind_is_refused_by_its_flag(toy_run, tmp_path, capsys, setting):
    run = strangers_run(toy_run, tmp_path / "run", **setting)
    assert main(["train", str(run), "--output_dir", str(tmp_path / "out")]) == 2
    assert re.search(f"(recipe.yaml: |--){next(iter(setting))}", capsys.readouterr().err)


@pytest.mark.parametrize("template", ["../README", "/etc/passwd", "_doors", "none"])
def test_a_recipe_names_a_card_of_ours(toy_run, tmp_path, capsys, template):
    run = strangers_run(toy_run, tmp_path / "run", card=template)
    assert train(run, tmp_path / "out") == 2
    assert "no such template" in capsys.readouterr().err


def test_lists_hold_what_is_stock_and_what_is_ours():
    where = Path("modules.json")
    assert listed_module("sentence_transformers.models.Pooling", where) is Pooling
    assert listed_module("modeling_toy.ToyPooling", where).__name__ == "ToyPooling"
    for name in (
        "sentence_transformers.util.misc.import_from_string",
        "sentence_transformers.util.os",
        "os.abort",
        "Dense",
    ):
        with pytest.raises(InputError, match="refused"):
            listed_module(name, where)
    assert isinstance(listed_activation("torch.nn.modules.linear.Identity", where), torch.nn.Identity)
    assert isinstance(listed_activation("torch.nn.modules.activation.GELU", where), torch.nn.GELU)
