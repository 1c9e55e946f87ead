"""What tells one model from another: all that changes a vector, and nothing else."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoTokenizer

import polyrep
from polyrep.hub.fingerprint import fingerprint, fingerprints


@pytest.fixture(scope="module")
def model(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    modules = [Transformer(str(backbone)), Pooling(32, "mean"), Dense(32, 8), Normalize()]
    folder = tmp_path_factory.mktemp("models") / "whole"
    return polyrep.save(SentenceTransformer(modules=modules, prompts={"query": "find: "}, device="cpu"), folder)


def edit(name: str, **fields: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | fields))

    return change


def one_bit(folder: Path) -> None:
    file = folder / "2_Dense" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def one_weight(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, file, metadata={"format": "pt"})


def without_the_last_module(folder: Path) -> None:
    listing = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(listing[:-1]))


def another_word(folder: Path) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["##qq"] = content["model"]["vocab"].pop("port")
    file.write_text(json.dumps(content))


def keeps_case(folder: Path) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["normalizer"]["lowercase"] = False
    file.write_text(json.dumps(content))


CHANGES = {
    "a bit of a Dense": one_bit,
    "a weight": one_weight,
    "no last module": without_the_last_module,
    "a word": another_word,
    "case": keeps_case,
    "a document prompt": edit("config_sentence_transformers.json", prompts={"query": "find: ", "document": "page: "}),
    "no prompt": edit("config_sentence_transformers.json", prompts={}),
    "the default prompt": edit("config_sentence_transformers.json", default_prompt_name="query"),
    "similarity": edit("config_sentence_transformers.json", similarity_fn_name="dot"),
    "dimensions kept": edit("config_sentence_transformers.json", truncate_dim=4),
    "family": edit("config_sentence_transformers.json", model_type="SparseEncoder"),
    "length": edit("sentence_bert_config.json", max_seq_length=7),
    "length of the tokenizer": edit("tokenizer_config.json", model_max_length=7),
    "side": edit("tokenizer_config.json", truncation_side="left"),
    "pooling": edit("1_Pooling/config.json", pooling_mode="cls"),
    "activation": edit("2_Dense/config.json", activation_function="torch.nn.modules.linear.Identity"),
    "images": edit("preprocessor_config.json", image_mean=[0.5, 0.5, 0.5]),
}

NEUTRAL = {
    "card": lambda folder: (folder / "README.md").write_text("# other words"),
    "license": lambda folder: (folder / "LICENSE").write_text("any"),
    "versions": edit("config_sentence_transformers.json", __version__={"transformers": "9"}),
    "requirements": edit("config_sentence_transformers.json", requirements={"transformers": ">=9"}),
    "empty prompt": edit("config_sentence_transformers.json", prompts={"query": "find: ", "document": ""}),
    "stamp": edit("config.json", transformers_version="9.9", _name_or_path="/somewhere"),
    "export": lambda folder: (folder / "onnx").mkdir() or edit("onnx/config.json", a=1)(folder),
    "generation": edit("generation_config.json", max_length=3),
    "name of the tokenizer": edit("tokenizer_config.json", name_or_path="/somewhere"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_vector_changes_it(model, tmp_path, change):
    copy = shutil.copytree(model, tmp_path / "copy")
    assert fingerprint(copy) == fingerprint(model)
    CHANGES[change](copy)
    assert fingerprint(copy) != fingerprint(model)


@pytest.mark.parametrize("change", NEUTRAL)
def test_what_changes_none_does_not(model, tmp_path, change):
    copy = shutil.copytree(model, tmp_path / "copy")
    NEUTRAL[change](copy)
    assert fingerprint(copy) == fingerprint(model)


def test_a_copy_saved_again_and_used_has_the_same(model, tmp_path):
    opened = polyrep.load(model)
    opened.encode_query(["a file of many files"])  # transformers writes truncation and padding into the tokenizer
    polyrep.save(opened, tmp_path / "again")
    opened.save_pretrained(str(tmp_path / "stock"))
    assert fingerprint(tmp_path / "again") == fingerprint(tmp_path / "stock") == fingerprint(model)


def test_a_tokenizer_without_a_fast_file_counts_by_its_words(backbone, tmp_path):
    folder = shutil.copytree(backbone, tmp_path / "slow")
    AutoTokenizer.from_pretrained(folder).save_vocabulary(str(folder))
    (folder / "tokenizer.json").unlink()
    before = fingerprint(folder)
    (folder / "vocab.txt").write_text((folder / "vocab.txt").read_text().replace("port", "dock"))
    assert fingerprint(folder) != before


def test_versions_are_told_apart_and_the_first_is_what_it_was(model, tmp_path):
    """Version 1 by its definition: sizes and names of the weights, and two kinds of configs; nothing else."""
    lines = []
    for name in ("2_Dense/model.safetensors", "model.safetensors"):
        lines.append(f"{name}:{hashlib.sha256((model / name).read_bytes()).hexdigest()}\n")
    configs = [f"{part}config.json" for part in ("1_Pooling/", "2_Dense/", "3_Normalize/", "")]
    for name in (*configs, "sentence_bert_config.json"):
        fields = json.loads((model / name).read_text())
        fields = {k: v for k, v in fields.items() if k not in ("transformers_version", "_name_or_path", "__version__")}
        lines.append(f"{name}:{json.dumps(fields, sort_keys=True)}\n")
    found = [file.relative_to(model).as_posix() for file in sorted(model.rglob("config.json"))]
    assert found == configs
    first = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert fingerprints(model) == [fingerprint(model), first]
    assert fingerprint(model).startswith("2-") and len(fingerprint(model)) == 66


def test_order_and_places_of_weights_count(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "2_Dense").rename(copy / "3_Dense")
    assert fingerprint(copy) != fingerprint(model)
    assert torch.equal(
        *(load_file(f / d / "model.safetensors")["linear.weight"] for f, d in ((model, "2_Dense"), (copy, "3_Dense")))
    )
