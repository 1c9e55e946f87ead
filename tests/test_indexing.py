"""From files to answers by the command line: encode, index, search."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from conftest import DOCUMENTS, QUERIES
from safetensors.torch import load_file, save_file
from test_encode import write_lines

from polyrep import InputError
from polyrep.cli import main
from polyrep.encoding import EncodedCorpus
from polyrep.hub import fingerprint
from polyrep.search import Added, open_index


@pytest.fixture(scope="module")
def encoded(static_model, tmp_path_factory) -> Path:
    """A folder with the model, and the small corpus encoded by it."""
    folder = tmp_path_factory.mktemp("encoded")
    static_model.save_pretrained(str(folder / "model"), create_model_card=False)
    write_lines(folder / "corpus.jsonl", DOCUMENTS)
    flags = ["--input", str(folder / "corpus.jsonl"), "--output", str(folder / "shards"), "--shard_size", "2"]
    assert main(["encode", str(folder / "model"), *flags]) == 0
    return folder


@pytest.mark.parametrize("scheme", ["faiss", "qdrant"])
def test_encoded_documents_are_indexed_once_and_found(scheme, encoded, tmp_path, static_model, capsys):
    uri = f"{scheme}://{tmp_path}/index"
    argv = ["index", str(encoded / "shards"), "--uri", uri]
    assert main(argv) == 0
    assert "5 documents written" in capsys.readouterr().out
    assert main(argv) == 0
    assert "0 documents written" in (said := capsys.readouterr().out) and "3 shards were there already" in said
    query = QUERIES["q3"]
    assert main(["search", query, "--uri", uri, "--model", str(encoded / "model"), "--k", "2"]) == 0
    asked, *lines = capsys.readouterr().out.splitlines()
    oracle = open_index("memory:")
    oracle.add(EncodedCorpus(encoded / "shards"))
    hits = oracle.search(static_model.encode_query([query]), 2)[0]
    assert asked == query and [line.split()[1] for line in lines] == [hit.id for hit in hits]
    scores = [float(line.split()[0]) for line in lines]
    assert scores == pytest.approx([hit.score for hit in hits], abs=1e-3), "engines hold half precision"
    assert hits[0].id == "d4", "the search retrieves something"


def test_an_index_of_another_model_is_refused(encoded, tmp_path, sentence_model, capsys):
    uri = f"faiss://{tmp_path}/index"
    assert main(["index", str(encoded / "shards"), "--uri", uri]) == 0
    sentence_model.save_pretrained(str(tmp_path / "other"), create_model_card=False)
    assert main(["search", "open ports", "--uri", uri, "--model", str(tmp_path / "other")]) == 2
    made, asked = fingerprint(encoded / "model")[:14], fingerprint(tmp_path / "other")[:14]
    assert f"were made by model {made}, not by {asked}" in capsys.readouterr().err
    assert main(["index", str(tmp_path), "--uri", uri]) == 2
    assert "no encoded corpus" in capsys.readouterr().err


def test_vectors_with_a_prompt_and_without_do_not_meet(encoded, tmp_path, capsys):
    """One model's weights, and a prompt that somebody set in between."""
    uri, model = f"faiss://{tmp_path}/index", shutil.copytree(encoded / "model", tmp_path / "model")
    config = json.loads((model / "config_sentence_transformers.json").read_text())
    config["prompts"] = {"query": "", "document": "manual page: "}
    (model / "config_sentence_transformers.json").write_text(json.dumps(config))
    flags = ["--input", str(encoded / "corpus.jsonl"), "--output", str(tmp_path / "shards")]
    assert main(["encode", str(model), *flags]) == 0
    assert main(["index", str(encoded / "shards"), "--uri", uri]) == 0
    assert main(["index", str(tmp_path / "shards"), "--uri", uri]) == 2
    assert "so their scores would not be comparable" in capsys.readouterr().err
    assert main(["search", "open ports", "--uri", uri, "--model", str(model)]) == 2
    assert "so scores would mean nothing" in capsys.readouterr().err


def test_vectors_of_an_older_fingerprint_are_told_as_such_and_can_be_forced(encoded, tmp_path, capsys):
    shards, uri = shutil.copytree(encoded / "shards", tmp_path / "shards"), f"faiss://{tmp_path}/index"
    for file in (shards / "manifest.json", *(shards / "shards").glob("*.json")):
        file.write_text(file.read_text().replace(fingerprint(encoded / "model"), fingerprint(encoded / "model", 1)))
    assert main(["index", str(shards), "--uri", uri]) == 0
    asked = ["search", QUERIES["q3"], "--uri", uri, "--model", str(encoded / "model")]
    assert main(asked) == 2
    assert "(of version 1, which says nothing of prompts and tokenizer), not by 2-" in capsys.readouterr().err
    assert main([*asked, "--force"]) == 0
    assert "d4" in capsys.readouterr().out


def test_vectors_of_two_models_are_each_searched_by_their_own(encoded, tmp_path, static_model, capsys):
    static_model.save_pretrained(str(tmp_path / "other"), create_model_card=False)
    weights = load_file(tmp_path / "other" / "model.safetensors")
    save_file({name: -tensor for name, tensor in weights.items()}, tmp_path / "other" / "model.safetensors")
    flags = ["--input", str(encoded / "corpus.jsonl"), "--output", str(tmp_path / "second"), "--name", "second"]
    assert main(["encode", str(tmp_path / "other"), *flags]) == 0
    uri = f"qdrant://{tmp_path}/index"
    assert main(["index", str(encoded / "shards"), str(tmp_path / "second"), "--uri", uri]) == 0
    argv = ["search", "open ports", "--uri", uri, "--model", str(tmp_path / "other")]
    assert main(argv) == 0
    assert main([*argv, "--name", "dense"]) == 2
    assert "its vectors 'dense' were made by model" in capsys.readouterr().err
    assert main([*argv, "--name", "dense", "--force"]) == 0


def test_queries_are_no_documents(encoded, tmp_path, capsys):
    flags = ["--input", str(encoded / "corpus.jsonl"), "--output", str(tmp_path / "queries"), "--task", "query"]
    assert main(["encode", str(encoded / "model"), *flags]) == 0
    assert main(["index", str(tmp_path / "queries"), "--uri", f"faiss://{tmp_path}/index"]) == 2
    assert "holds queries" in capsys.readouterr().err


def test_a_known_shard_is_not_read_again_and_signs_do_not_mix_with_numbers(encoded, tmp_path):
    index = open_index("memory:")
    index.add(EncodedCorpus(encoded / "shards"))
    for file in shutil.copytree(encoded / "shards", tmp_path / "gone").glob("shards/*.safetensors"):
        file.unlink()
    assert index.add(EncodedCorpus(tmp_path / "gone")) == Added(shards_known=3)
    with pytest.raises(InputError, match="SHA-256 is missing"):
        open_index("memory:").add(EncodedCorpus(tmp_path / "gone"))
    flags = ["--input", str(encoded / "corpus.jsonl"), "--output", str(tmp_path / "signs"), "--precision", "binary"]
    assert main(["encode", str(encoded / "model"), *flags]) == 0
    with pytest.raises(InputError, match="are float16, these binary"):
        index.add(EncodedCorpus(tmp_path / "signs"))
    with pytest.raises(InputError, match="takes a list of ids"):
        index.delete("d1")


def test_a_corpus_of_a_stranger_is_refused_by_name(encoded, tmp_path):
    folder = shutil.copytree(encoded / "shards", tmp_path / "corpus")
    record, manifest = folder / "shards" / "00000001.json", folder / "manifest.json"
    known, whole = json.loads(record.read_text()), json.loads(manifest.read_text())
    for more in ({"number": 0}, {"number": "../x"}, {"documents": -1}, {"documents": 0.5}, {"sha256": 1}):
        record.write_text(json.dumps(known | more))
        with pytest.raises(InputError, match="00000001.json: no record of that shard"):
            EncodedCorpus(folder)
    for content in ("[]", "null", '{"shards": {}}'):
        record.write_text(content)
        with pytest.raises(InputError, match="00000001.json: (no record of that shard|holds)"):
            EncodedCorpus(folder)
    record.write_text(json.dumps(known))
    wrong = [{"dim": 0}, {"dim": 2**40}, {"dim": "32"}, {"kind": "layers"}, {"precision": 3}, {"name": None}, {"x": 1}]
    for more in wrong:
        manifest.write_text(json.dumps(whole | {"vectors": whole["vectors"] | more}))
        with pytest.raises(InputError, match="manifest.json: says of its vectors what nothing can be made of"):
            EncodedCorpus(folder)
    for content in ("[]", "3", '{"format": "polyrep-encoded-1"}'):
        manifest.write_text(content)
        with pytest.raises(InputError, match="manifest.json: "):
            EncodedCorpus(folder)
    manifest.write_text(json.dumps(whole))
    shard = folder / "shards" / "00000001.safetensors"
    arrays = load_file(shard)
    arrays["values"][1, 3] = float("nan")
    save_file(arrays, shard)
    record.write_text(json.dumps(known | {"sha256": hashlib.sha256(shard.read_bytes()).hexdigest()}))
    with pytest.raises(InputError, match="00000001.safetensors: not a shard .*a number that is not finite"):
        open_index("memory:").add(EncodedCorpus(folder))


def test_a_uri_that_keeps_nothing_is_refused(encoded, capsys):
    for uri, words in (("memory:", "gone when the command ends"), ("", "--uri: missing"), ("x:y", "no back end")):
        assert main(["index", str(encoded / "shards"), "--uri", uri]) == 2
        assert words in capsys.readouterr().err
