"""Models packed for the demo: what is left out comes back, what is rounded is near, and heads find their model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import packed
import pytest
import torch
from conftest import write_beir
from safetensors.torch import load_file, save_file
from transformers import AutoModel, PreTrainedModel

import polyrep
from polyrep.cli import main
from polyrep.errors import InputError
from polyrep.hub.fingerprint import fingerprint, fingerprints
from polyrep.hub.folder import packaged_minilm

SHIPPED = Path(packed.__file__).parent / "models"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Weights of every kind: borrowed, one that is rounded, and what stays as it is."""
    torch.manual_seed(0)
    minilm = load_file(packaged_minilm() / "model.safetensors")
    tensors = {
        "theirs": minilm["encoder.layer.0.output.dense.weight"].clone(),
        "wide": torch.randn(100, 50, dtype=torch.float32) * torch.logspace(-3, 3, 100)[:, None],
        "filters": torch.randn(32, 16, 3, 3),
        "zeros": torch.zeros(100, 100),
        "vector": torch.randn(5000),
        "terms": torch.arange(5000).view(100, 50),
        "little": torch.randn(4, 4),
    }
    (tmp_path / "model" / "1_Module").mkdir(parents=True)
    save_file(tensors, tmp_path / "model" / "1_Module" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "model" / "config.json").write_text('{"a": 1}')
    (tmp_path / "model" / "README.md").write_text("card")
    return tmp_path / "model"


def test_what_is_unpacked_differs_by_half_a_step_of_a_row_at_most(folder, tmp_path):
    small = packed.pack(folder, tmp_path / "small")
    back = packed.unpack(small, tmp_path / "back")
    file = Path("1_Module") / "model.safetensors"
    before, after = load_file(folder / file), load_file(back / file)
    assert before.keys() == after.keys()
    for name in ("theirs", "zeros", "vector", "terms", "little"):
        assert torch.equal(before[name], after[name]), name
    for name in ("wide", "filters"):
        step = before[name].abs().flatten(1).amax(1) / 127
        off = (before[name].double() - after[name].double()).abs().flatten(1).amax(1)
        assert (off <= step / 2 * 1.001).all() and off.max() > 0
    assert json.loads((back / "config.json").read_text()) == {"a": 1} and not (back / "README.md").exists()
    assert not (small / file).exists()
    # A byte a weight; vectors and whole numbers as they are.
    kept = 100 * 50 + 32 * 16 * 9 + 100 * 100 + 5000 * 4 + 5000 * 8
    size = (small / "1_Module" / "model.packed.safetensors").stat().st_size
    assert size < kept + 5_000  # scales, the small one and the header


def test_unpacking_again_is_the_same_to_the_byte(folder, tmp_path):
    small = packed.pack(folder, tmp_path / "small")
    one, two = packed.unpack(small, tmp_path / "one"), packed.unpack(small, tmp_path / "two")
    assert fingerprint(one) == fingerprint(two)
    again = packed.pack(one, tmp_path / "again")  # what was rounded once is not rounded further
    assert fingerprint(packed.unpack(again, tmp_path / "three")) == fingerprint(one)


def test_another_vocabulary_is_refused(folder, backbone, tmp_path):
    shutil.copyfile(backbone / "tokenizer.json", folder / "tokenizer.json")
    shutil.copyfile(backbone / "tokenizer_config.json", folder / "tokenizer_config.json")
    with pytest.raises(InputError, match="vocabulary of 61 tokens"):
        packed.pack(folder, tmp_path / "small")


def test_packing_over_something_and_unpacking_something_else_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="exists already.*Remove it"):
        packed.pack(folder, tmp_path)
    with pytest.raises(InputError, match="no packed file"):
        packed.unpack(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    with pytest.raises(InputError, match="packed already"):
        packed.pack(packed.pack(folder, tmp_path / "small"), tmp_path / "smaller")
    assert not (tmp_path / "smaller").exists()


@pytest.mark.parametrize("name", sorted(path.name for path in SHIPPED.iterdir()))
def test_a_packed_folder_is_opened_by_no_door_and_ours_say_what_it_is(name, tmp_path, capsys):
    with pytest.raises(InputError, match=rf"packed for the demo.*--unpack \S*{name} --output"):
        polyrep.load(SHIPPED / name, trust_remote_code=True)
    model = str(SHIPPED / name)
    for words in (
        ["train", "reinpool-minilm", "--output_dir", str(tmp_path / "run"), "--backbone", model],
        ["evaluate", model, "--dataset", str(write_beir(tmp_path / "tiny"))],
    ):
        assert main(words) == 2
        assert "packed for the demo" in capsys.readouterr().err
    with pytest.raises(OSError, match="model.safetensors"):
        AutoModel.from_pretrained(SHIPPED / name)


@pytest.mark.parametrize("name", sorted(path.name for path in SHIPPED.iterdir()))
def test_the_shipped_models_open_and_belong_together(name, tmp_path):
    folder = packed.unpack(SHIPPED / name, tmp_path / name)
    model = polyrep.load(folder, trust_remote_code=True)
    if isinstance(model, PreTrainedModel):  # a head, which says what it stands behind
        late = packed.unpack(SHIPPED / "late-interaction-minilm", tmp_path / "late")
        assert model.config.base_fingerprint in {*fingerprints(late), *fingerprints(packaged_minilm())}
    else:
        assert any(len(vector) for vector in model.encode_query(["a dog on a beach"]))
