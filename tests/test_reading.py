"""Texts as models read them: no longer than there are positions, and padded though a tokenizer has no token for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DOCUMENTS, write_beir
from safetensors.numpy import load_file
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModel,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    GPT2Config,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

import polyrep
from polyrep import InputError
from polyrep.cli import main
from polyrep.hub.reading import positions_of

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
ENCODERS = {
    "bert": (BertConfig(vocab_size=100, max_position_embeddings=20, **SMALL), 20),
    "roberta": (RobertaConfig(vocab_size=100, max_position_embeddings=20, pad_token_id=1, **SMALL), 18),
    "bart": (BartConfig(vocab_size=100, max_position_embeddings=20, **BART), 20),
    "gpt2": (GPT2Config(vocab_size=100, n_positions=20, n_embd=32, n_layer=1, n_head=4), 20),
    "rotary": (ModernBertConfig(vocab_size=100, max_position_embeddings=20, pad_token_id=0, **SMALL), None),
}
"""Config, and its positions: all of the table; less that of padding and those before it; or computed, without end."""


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_reads_as_many_tokens_as_it_has_positions(name, backbone, tmp_path):
    config, positions = ENCODERS[name]
    AutoModel.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(backbone, model_max_length=int(1e30)).save_pretrained(tmp_path)  # none is known
    model = polyrep.load(tmp_path, device="cpu")
    assert positions_of(model) == positions
    text = "list " * 30
    assert np.isfinite(model.encode([text])).all()
    if positions:
        assert model.max_seq_length == positions
        model.max_seq_length = positions + 1
        with pytest.raises((IndexError, RuntimeError)):
            model.encode([text])


@pytest.mark.parametrize(
    "command",
    [
        "evaluate {model} --dataset {data} --cache_dir out",
        "evaluate {model} --frontier --dataset {data} --cache_dir out",
        "train gaussian-minilm-frozen --backbone {model} --datasets {data} --output_dir out --cache_dir out",
        "train late-interaction-minilm --backbone {model} --datasets {data} --output_dir out --dry_run",
    ],
)
def test_a_length_that_a_model_cannot_read_is_refused(command, backbone, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = write_beir(tmp_path / "data", "train")
    shutil.copy(data / "qrels" / "train.tsv", data / "qrels" / "test.tsv")
    words = command.format(model=backbone, data=data).split()
    for length, said in ((65, "has positions for 64 tokens"), (2, "adds 2 tokens to each text")):
        assert main([*words, "--max_length", str(length)]) == 2
        assert f"--max_length {length}: {backbone} {said}" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("values.bin"))


def test_a_model_that_says_that_it_reads_more_than_it_can_is_refused_by_encode(backbone, tmp_path, beir, capsys):
    SentenceTransformer(str(backbone), device="cpu").save_pretrained(str(tmp_path / "model"), create_model_card=False)
    said = tmp_path / "model" / "sentence_bert_config.json"
    said.write_text(json.dumps(json.loads(said.read_text()) | {"max_seq_length": 100}))
    words = ["encode", str(tmp_path / "model"), "--input", str(beir), "--output", str(tmp_path / "out")]
    assert main(words) == 2
    assert "reads 100 tokens of a text, but has positions for 64" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_maximal_length_takes_none(static_model, tmp_path, beir, capsys):
    static_model.save_pretrained(str(tmp_path / "static"), create_model_card=False)
    for more in ([], ["--frontier"]):
        assert main(["evaluate", str(tmp_path / "static"), "--dataset", str(beir), "--max_length", "8", *more]) == 2
        assert "has no maximal length, so --max_length 8 means nothing" in capsys.readouterr().err


@pytest.fixture(scope="module")
def unpadded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT of one layer, whose tokenizer has an end of text and nothing to pad with."""
    folder = tmp_path_factory.mktemp("unpadded")
    words = sorted({word for text in DOCUMENTS.values() for word in text.replace(":", " : ").split()})
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(["<end>", "<unk>", *words])}, "<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=len(words) + 2, n_positions=64, n_embd=32, n_layer=1, n_head=4, **still)
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


def test_a_tokenizer_without_padding_gives_the_same_vectors_at_every_door(unpadded, tmp_path, caplog, beir):
    model, texts = polyrep.load(unpadded, device="cpu"), list(DOCUMENTS.values())
    assert "pads with '<end>'" in caplog.text
    alone = np.concatenate([model.encode([text]) for text in texts])
    np.testing.assert_allclose(model.encode(texts), alone, atol=1e-5)
    words = ["encode", str(unpadded), "--input", str(beir), "--output", str(tmp_path / "encoded")]
    assert main([*words, "--precision", "float32"]) == 0
    shard = load_file(tmp_path / "encoded" / "shards" / "00000000.safetensors")
    np.testing.assert_allclose(shard["values"], alone, atol=1e-5)
    words = ["evaluate", str(unpadded), "--dataset", str(beir), "--baselines", "none", "--dtype", "float32"]
    assert main([*words, "--cache_dir", str(tmp_path / "cache")]) == 0
    (cached,) = (tmp_path / "cache").glob("*-document-*/values.bin")
    np.testing.assert_allclose(np.fromfile(cached, np.float32).reshape(alone.shape), alone, atol=1e-5)


def test_what_is_trained_on_such_a_model_pads_wherever_it_is_opened(unpadded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_beir(tmp_path / "data", "train")
    short = ["--max_steps", "1", "--per_device_train_batch_size", "2", "--bf16", "false"]
    words = ["--backbone", str(unpadded), "--datasets", str(data), *short]
    assert main(["train", "late-interaction-minilm", *words, "--output_dir", "late", "--freeze", "wpe"]) == 0
    model = MultiVectorEncoder("late/final", device="cpu", trust_remote_code=True)
    assert model.tokenizer.pad_token == "<end>" and len(model.encode_document(list(DOCUMENTS.values()))) == 5
    assert main(["train", "reinpool-minilm", *words, "--backbone", "late/final", "--output_dir", "head"]) == 0
    assert AutoTokenizer.from_pretrained("head/final", trust_remote_code=True).pad_token == "<end>"


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(unpadded, tmp_path):
    folder = shutil.copytree(unpadded, tmp_path / "model")
    for file in folder.glob("*token*.json"):
        content = json.loads(file.read_text())
        content.pop("eos_token", None)
        file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="no token to pad with.*tokenizer.pad_token"):
        polyrep.load(folder)
