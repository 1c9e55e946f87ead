"""Encoding a corpus into shards: equal to what the model gives, whatever the input, and whatever interrupts it."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import DOCUMENTS, ROOT, run_python, run_two_processes
from datasets import Dataset
from PIL import Image
from room_examples import EXAMPLES
from safetensors.torch import load_file, save_file
from scipy.sparse import csr_matrix

from polyrep import InputError, files
from polyrep.cli import main
from polyrep.data import stream as sources
from polyrep.encoding import EncodedCorpus
from polyrep.encoding import encode as encoding
from polyrep.encoding.encode import encode
from polyrep.hub import save

TEXTS = {
    f"d{n}": " ".join(["open", "ports", *list(DOCUMENTS.values())[n % 5].split()][: 2 + n % 7]) for n in range(23)
}


def write_lines(path: Path, texts: dict[str, str]) -> Path:
    lines = "".join(json.dumps({"_id": i, "title": "", "text": t}) + "\n" for i, t in texts.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w")
    with opened as file:
        file.write(lines)
    return path


@pytest.fixture(scope="module")
def static(static_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("static")
    static_model.save_pretrained(str(folder), create_model_card=False)
    return folder


@pytest.fixture(scope="module")
def image_model(backbone, tmp_path_factory) -> Path:
    scratch = tmp_path_factory.mktemp("images")
    model = EXAMPLES["polyrep_dual_encoder"](backbone, scratch).models["retriever"]
    return save(model, scratch / "saved")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "corpus.jsonl", TEXTS)


def run(model: Path, source: Path | str, output: Path, *flags: str) -> EncodedCorpus:
    encode([str(model), "--input", str(source), "--output", str(output), "--trust_remote_code", *flags])
    return EncodedCorpus(output)


def read(corpus: EncodedCorpus) -> tuple[list[str], list[np.ndarray]]:
    """Ids, and one dense array a document."""
    ids: list[str] = []
    vectors: list[np.ndarray] = []
    for shard in corpus:
        ids += shard.ids
        values, offsets = shard.vectors.values.astype(np.float32), shard.vectors.offsets
        if shard.vectors.kind == "sparse":
            shape = (len(shard.ids), shard.vectors.dim)
            vectors += list(csr_matrix((values, shard.vectors.indices, offsets), shape=shape).toarray())
        elif offsets is None:
            vectors += list(values)
        else:
            vectors += [values[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]
    return ids, vectors


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"  # which says when
    }


@pytest.mark.parametrize("family", ["sentence_model", "multi_vector_model", "sparse_model"])
@pytest.mark.parametrize("precision", ["float16", "float32", "int8", "binary"])
def test_shards_hold_what_the_model_gives_in_the_order_of_the_input(family, precision, corpus, tmp_path, request):
    model = request.getfixturevalue(family)
    model.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    flags = ["--precision", precision, "--shard_size", "5", "--batch_size", "4"]
    if family == "sparse_model" and precision in ("int8", "binary"):
        with pytest.raises(InputError, match="float16 or float32 alone"):
            run(tmp_path / "model", corpus, tmp_path / "out", *flags)
        return
    encoded = run(tmp_path / "model", corpus, tmp_path / "out", *flags)
    assert [record["documents"] for record in encoded.records] == [5, 5, 5, 5, 3]
    ids, found = read(encoded)
    assert ids == list(TEXTS)
    for identifier, vector in zip(ids, found, strict=True):
        exact = torch.as_tensor(model.encode_document([TEXTS[identifier]])[0])
        exact = (exact.to_dense() if exact.is_sparse else exact).float().numpy()
        assert vector.shape == exact.shape
        if precision == "binary":
            clear = np.abs(exact) > 1e-4  # batches of other widths round otherwise
            assert (np.sign(vector) == np.sign(exact))[clear].all()
            np.testing.assert_allclose(np.linalg.norm(vector, axis=-1), 1, rtol=1e-5)
        else:  # int8: half a step, and 2^-10 of the largest of 127 steps, since it passes through float16
            step = np.abs(exact).max(-1, keepdims=True) / 127
            bound = {"float16": 2**-11 * np.abs(exact) + 1e-5, "float32": 1e-5, "int8": 0.63 * step}[precision]
            assert (np.abs(vector - exact) <= bound).all()


def test_the_same_documents_come_out_of_every_kind_of_input(static, corpus, tmp_path, monkeypatch):
    table = pyarrow.table({"_id": list(TEXTS), "text": list(TEXTS.values()), "year": [1] * len(TEXTS)})
    pyarrow.parquet.write_table(table, tmp_path / "corpus.parquet", row_group_size=4)  # spans of 5 cut the groups
    first = dict(list(TEXTS.items())[:9])
    write_lines(tmp_path / "parts" / "a.jsonl", first)
    write_lines(tmp_path / "parts" / "b.jsonl", {i: t for i, t in TEXTS.items() if i not in first})
    stream = Dataset.from_dict({"_id": list(TEXTS), "text": list(TEXTS.values())}).to_iterable_dataset()
    asked = []
    monkeypatch.setattr(sources, "load_dataset", lambda *a, **k: asked.append((a, k)) or stream)
    monkeypatch.setattr(
        sources, "HfApi", lambda: SimpleNamespace(dataset_info=lambda *a, **k: SimpleNamespace(sha="c" * 40))
    )
    zipped = write_lines(tmp_path / "zip" / "corpus.jsonl.gz", TEXTS)
    write_lines(tmp_path / "beir" / "corpus.jsonl", TEXTS)
    write_lines(tmp_path / "beir" / "queries.jsonl", {"q": "not a document"})
    inputs = [corpus, zipped, tmp_path / "corpus.parquet", tmp_path / "parts", tmp_path / "beir", "someone/texts"]
    expected = None
    for number, source in enumerate(inputs):
        encoded = run(static, source, tmp_path / f"out{number}", "--shard_size", "5")
        ids, vectors = read(encoded)
        assert ids == list(TEXTS), source
        assert [record["records"] for record in encoded.records] == [5, 5, 5, 5, 3]
        expected = vectors if expected is None else expected
        np.testing.assert_array_equal(np.stack(vectors), np.stack(expected))
    assert asked[0][1]["streaming"] and asked[0][1]["revision"] == "c" * 40, "a commit, whatever the branch does"


def test_titles_ids_and_numbers_are_taken_from_the_fields_that_are_named(static, tmp_path):
    rows = [{"key": 7, "head": "open", "body": "ports"}, {"key": "b", "head": None, "body": "a file"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    flags = ["--id_field", "key", "--title_field", "head", "--text_field", "body"]
    ids, named = read(run(static, tmp_path / "rows.jsonl", tmp_path / "named", *flags))
    assert ids == ["7", "b"]
    counted, _ = read(run(static, tmp_path / "rows.jsonl", tmp_path / "n", *flags[2:], "--id_field", "row_number"))
    assert counted == ["0", "1"]
    whole, plain = read(
        run(static, write_lines(tmp_path / "p.jsonl", {"x": "open ports", "y": "a file"}), tmp_path / "p")
    )
    np.testing.assert_array_equal(np.stack(named), np.stack(plain))


def test_a_record_that_cannot_be_used_is_left_out_and_counted(static, tmp_path, capsys):
    lines = ['{"_id": "a", "text": "open ports"}', "{broken", '{"text": "no id"}', '{"_id": "e", "text": " "}', "[1]"]
    lines += ['{"_id": "f", "text": 3}', r'{"_id": "g", "text": "half \ud800"}', "[" * 100_000]
    lines += ['{"_id": "z", "text": "a file"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    argv = ["encode", str(static), "--input", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out")]
    assert main(argv) == 0
    assert read(EncodedCorpus(tmp_path / "out"))[0] == ["a", "z"]
    errors = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert [error["place"].rpartition(":")[2] for error in errors] == [str(n) for n in range(2, 9)]
    expected = [
        "not a JSON object",
        "--id_field",
        "empty text",
        "not an object",
        "--text_field",
        "surrogate",
        "too deep",
    ]
    assert all(words in error["error"] for error, words in zip(errors, expected, strict=True))
    assert "2 documents" in (said := capsys.readouterr()).out and "7 records could not be used" in said.out
    assert main([*argv, "--strict"]) == 2
    assert "7 records could not be used" in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text("\n".join(lines[1:6]))
    with pytest.raises(InputError, match="none of the first 5 records can be used; the first, .*not a JSON object"):
        run(static, tmp_path / "bad.jsonl", tmp_path / "bad")


def test_images_are_read_from_folders_and_from_parquet_and_the_undecodable_ones_left_out(image_model, tmp_path):
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    names = ["a.png", "b.png", "more/c.jpg", "more/d.png"]
    for shade, name in enumerate(names):
        Image.new("RGB", (40, 30), (60 * shade, 20, 255 - 60 * shade)).save(folder / name)
    (folder / "b.png").write_bytes(b"no image at all")
    (folder / os.fsdecode(b"\xff.png")).write_bytes((folder / "a.png").read_bytes())
    encoded = run(image_model, folder, tmp_path / "out", "--shard_size", "3", "--batch_size", "2")
    ids, found = read(encoded)
    assert ids == ["a.png", "more/c.jpg", "more/d.png"]
    errors = {e["place"]: e["error"] for e in map(json.loads, open(tmp_path / "out" / "errors.jsonl"))}
    assert errors.keys() == {"b.png", "\\udcff.png"} and "not a readable image" in errors["b.png"]
    with pytest.raises(InputError, match="2 records could not be used"):
        run(image_model, folder, tmp_path / "out", "--shard_size", "3", "--batch_size", "2", "--strict")
    table = {"id": names, "page": [{"bytes": (folder / name).read_bytes(), "path": name} for name in names]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "pages.parquet")
    flags = ["--image_field", "page", "--batch_size", "2", "--shard_size", "3"]
    again, from_table = read(run(image_model, tmp_path / "pages.parquet", tmp_path / "table", *flags))
    assert again == ids
    np.testing.assert_array_equal(np.stack(found), np.stack(from_table))


def test_a_second_run_encodes_what_is_missing_and_nothing_else(static, corpus, tmp_path, monkeypatch):
    encoded = run(static, corpus, tmp_path / "out", "--shard_size", "5")
    before = hashes(tmp_path / "out")
    (tmp_path / "out" / "shards" / "00000002.json").unlink()
    (tmp_path / "out" / "shards" / "00000004.safetensors").write_bytes(b"short")
    calls = []
    stock = sources._documents
    monkeypatch.setattr(
        sources, "_documents", lambda rows, fields, first: calls.append(first) or stock(rows, fields, first)
    )
    with pytest.raises(InputError, match="4 shards are done of 5"):
        EncodedCorpus(tmp_path / "out")
    with pytest.raises(InputError, match="SHA-256 is .* expected .*Delete 00000004.json"):
        _ = list(encoded)[4].ids
    run(static, corpus, tmp_path / "out", "--shard_size", "5")
    assert calls == [10, 20] and hashes(tmp_path / "out") == before


def test_going_on_with_something_else_is_refused(static, corpus, tmp_path, sentence_model):
    output = tmp_path / "out"
    run(static, corpus, output, "--shard_size", "5")
    with pytest.raises(InputError, match="begun with another shard_size"):
        run(static, corpus, output, "--shard_size", "6")
    with pytest.raises(InputError, match="begun with another vectors"):
        run(static, corpus, output, "--shard_size", "5", "--precision", "int8")
    sentence_model.save_pretrained(str(tmp_path / "other"), create_model_card=False)
    with pytest.raises(InputError, match="begun with another vectors, model, max_length|another vectors"):
        run(tmp_path / "other", corpus, output, "--shard_size", "5")
    corpus.write_text(corpus.read_text().replace("open", "OPEN", 1))  # as long as before
    with pytest.raises(InputError, match="the input has changed"):
        run(static, corpus, output, "--shard_size", "5")
    write_lines(corpus, TEXTS | {"new": "one more"})
    with pytest.raises(InputError, match="begun with another input"):
        run(static, corpus, output, "--shard_size", "5")
    manifest = output / "manifest.json"
    manifest.write_text(manifest.read_text().replace("polyrep-encoded-1", "polyrep-encoded-0"))
    with pytest.raises(InputError, match="format is 'polyrep-encoded-0'"):
        EncodedCorpus(output)
    with pytest.raises(InputError, match="no encoded corpus"):
        EncodedCorpus(tmp_path)


def test_a_refused_try_leaves_nothing_that_binds_the_next(static, static_model, corpus, tmp_path):
    output, broken = tmp_path / "out", tmp_path / "broken.jsonl"
    broken.write_text('{"_id": "a"}\n')
    with pytest.raises(InputError, match="none of the first 1 records can be used"):
        run(static, broken, output)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no record"):
        run(static, tmp_path / "empty.jsonl", output)
    static_model.save_pretrained(str(tmp_path / "nan"), create_model_card=False)
    weights = load_file(tmp_path / "nan" / "model.safetensors")
    save_file(
        {name: tensor * float("nan") for name, tensor in weights.items()}, tmp_path / "nan" / "model.safetensors"
    )
    with pytest.raises(InputError, match="not finite"):
        run(tmp_path / "nan", corpus, output)
    assert not output.exists()
    output.mkdir()
    (output / "manifest.json").write_text('{"format": "polyrep-encoded-1", "task": "query"}')
    assert read(run(static, corpus, output))[0] == list(TEXTS)


def test_a_damaged_record_of_a_shard_is_named(static, corpus, tmp_path):
    out = tmp_path / "out"
    run(static, corpus, out)
    record = out / "shards" / "00000000.json"
    known = json.loads(record.read_text())
    for wrong in ({"errors": 7}, {"bytes": None}, {"input_sha256": 1}, {"documents": "5"}, {"number": 3}):
        record.write_text(json.dumps(known | wrong))
        with pytest.raises(InputError, match="00000000.json: no record of that shard. Delete it and run"):
            run(static, corpus, out)
    record.unlink()
    assert run(static, corpus, out).records[0]["sha256"] == known["sha256"]


@pytest.mark.parametrize("blocked", ["out", "."])
def test_an_output_that_cannot_be_written_is_refused_before_a_model_is_opened(blocked, corpus, tmp_path, monkeypatch):
    place = tmp_path / "taken"
    place.write_text("a file where a folder belongs")
    argv = ["--input", str(corpus), "--output", str(place / blocked)]
    with pytest.raises(InputError, match=f"--output .*: {place} is no folder"):
        encode(["nowhere", *argv])

    def refuse(**options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(InputError, match=f"{tmp_path} cannot be written to .Read-only file system."):
        encode(["nowhere", *argv[:3], str(tmp_path / "new" / "out")])
    assert not (tmp_path / "new").exists()


def test_a_refusal_before_the_first_shard_leaves_nothing_that_binds_the_next_try(static, corpus, tmp_path):
    with pytest.raises(InputError, match="none of the first 23 records can be used"):
        run(static, corpus, tmp_path / "out", "--text_field", "body")
    assert read(run(static, corpus, tmp_path / "out", "--shard_size", "5"))[0] == list(TEXTS)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--precision", "float8"], "float16, float32, int8, binary"),
        (["--task", "title"], "document or query"),
        (["--batch_size", "0"], "--batch_size 0: is out of its range"),
        (["--input", "nowhere"], "no such file or folder"),
        (["--image_field", "x"], "JSON lines hold texts"),
        (["--input", ""], "--input: missing"),
        (["--input", "."], "lies in the input"),
    ],
)
def test_flags_that_mean_nothing_are_refused(flags, words, static, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [str(static), "--input", str(corpus), "--output", str(tmp_path / "out"), *flags]
    with pytest.raises(InputError, match=words):
        encode(argv)
    assert not (tmp_path / "out").exists()


def test_inputs_that_cannot_be_read_are_refused(static, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="nothing to encode"):
        run(static, tmp_path / "empty", tmp_path / "out")
    whole = write_lines(tmp_path / "corpus.jsonl.gz", TEXTS).read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="damaged or truncated"):
        run(static, tmp_path / "cut.jsonl.gz", tmp_path / "out2")
    (tmp_path / "no.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        run(static, tmp_path / "no.parquet", tmp_path / "out3")
    (tmp_path / "no.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no record"):
        run(static, tmp_path / "no.jsonl", tmp_path / "out6")
    (tmp_path / "both").mkdir()
    write_lines(tmp_path / "both" / "metadata.jsonl", TEXTS)
    Image.new("RGB", (4, 4)).save(tmp_path / "both" / "a.png")
    with pytest.raises(InputError, match="several kinds .1 of JSON lines, 1 of images."):
        run(static, tmp_path / "both", tmp_path / "out7")
    (tmp_path / "words.csv").write_text("a,b")
    with pytest.raises(InputError, match="how to read it is unknown"):
        run(static, tmp_path / "words.csv", tmp_path / "out4")
    Image.new("RGB", (4, 4)).save(tmp_path / "empty" / "a.png")
    with pytest.raises(InputError, match="takes text, but the input is images"):
        run(static, tmp_path / "empty", tmp_path / "out5")


def test_a_vector_that_is_not_finite_stops_before_anything_of_its_shard_is_written(static_model, corpus, tmp_path):
    static_model.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    word = static_model.tokenizer.encode("tar").ids[1]
    weights["embedding.weight"][word] = 1e30  # more than 16 bits hold
    save_file(weights, file)
    with pytest.raises(InputError, match="not finite"):
        run(tmp_path / "model", corpus, tmp_path / "out", "--shard_size", "2")
    assert not list((tmp_path / "out" / "shards").glob("*.partial"))
    with pytest.raises(InputError, match="shards are done of more"):
        EncodedCorpus(tmp_path / "out")


KILLS = """
import os, random, signal, sys, time
from polyrep.encoding import encode as encoding
from polyrep.cli import main

draw = random.Random(0)

def ended(output, step="write_shard", last=None):
    pid, moment = os.fork(), draw.uniform(1e-5, 2e-2)
    if pid == 0:
        def dying(*arguments, **record):
            done[0] += 1
            if done[0] == last:
                signal.setitimer(signal.ITIMER_REAL, moment)  # SIGALRM ends a process that does not ask for it
                stock(*arguments, **record)
                signal.pause()
            return stock(*arguments, **record)

        done, stock = [0], getattr(encoding, step)
        setattr(encoding, step, dying)
        sys.stdout = sys.stderr = open(os.devnull, "w")
        os._exit(main(["encode", *sys.argv[2:], "--output", output]))
    return os.waitpid(pid, 0)[1]

assert ended(sys.argv[1] + "/whole") == 0
killed = sys.argv[1] + "/killed"
assert ended(killed, "_begin", 1) == signal.SIGALRM
for _ in range(10):
    assert ended(killed, last=draw.randint(1, 8)) == signal.SIGALRM
assert ended(killed, "_finish", 1) == signal.SIGALRM
assert ended(killed) == 0
"""
"""Ends a run twelve times as by kill -9: in its first step, in one of its next eight shards, and in its last step."""


def test_killed_in_any_of_its_steps_it_ends_in_the_same_shards(static, tmp_path):
    texts = {f"{n}-{i}": f"{t} {n}" for n in range(200) for i, t in TEXTS.items()}
    corpus = write_lines(tmp_path / "corpus.jsonl", texts)
    argv = [str(tmp_path), str(static), "--input", str(corpus), "--shard_size", "50"]
    result = run_python("-c", KILLS, *argv)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(list((tmp_path / "whole" / "shards").glob("*.json"))) > 10 * 8, "no run came to its end"
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")
    assert len(EncodedCorpus(tmp_path / "killed")) == len(texts)


def test_two_processes_share_the_shards(static, corpus, tmp_path):
    run(static, corpus, tmp_path / "one", "--shard_size", "3")
    flags = [str(static), "--input", str(corpus), "--output", str(tmp_path / "two"), "--shard_size", "3"]
    result = run_two_processes(ROOT / "encode.py", *flags)
    assert result.returncode == 0, result.stderr[-3000:]
    assert hashes(tmp_path / "two") == hashes(tmp_path / "one")
    assert "two 1/2" in result.stderr, "which of how many processes the bar is of"
    said = [line for line in result.stdout.splitlines() if "documents in" in line]
    assert any("8 shards" in line for line in said), "the last of them finds all shards"


def test_spans_of_parquet_are_the_same_whichever_of_them_are_read(tmp_path):
    table = pyarrow.table({"_id": list(TEXTS), "text": list(TEXTS.values())})
    pyarrow.parquet.write_table(table, tmp_path / "corpus.parquet", row_group_size=9)
    for wanted in ([0, 1, 2, 3, 4, 5], [1, 3, 5], [4], [2, 0, 5, 1]):
        spans = list(sources.open_source(str(tmp_path / "corpus.parquet"), sources.Fields()).spans(4))
        assert len(spans) == 6
        for number in wanted:
            found, errors = spans[number].read()
            assert found == [sources.Document(*pair) for pair in list(TEXTS.items())[4 * number :][:4]] and not errors


def test_a_process_leaves_the_shards_of_another(static, corpus, tmp_path, monkeypatch, capsys):
    """As if the second of two had died; strictness is a matter for the last."""
    corpus.write_text("{broken\n" + corpus.read_text())
    alone = SimpleNamespace(
        process_index=0,
        num_processes=2,
        device=torch.device("cpu"),
        is_main_process=True,
        is_local_main_process=True,
        destroy_process_group=lambda: None,
    )
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "PartialState", lambda cpu: alone)
        flags = ["--input", str(corpus), "--output", str(tmp_path / "out"), "--shard_size", "3", "--strict"]
        encode([str(static), *flags])
    assert "4 shards are left to other processes" in capsys.readouterr().out
    assert [path.stem for path in sorted((tmp_path / "out" / "shards").glob("*.json"))] == [
        f"{n:08d}" for n in (0, 2, 4, 6)
    ]
    with pytest.raises(InputError, match="1 records could not be used"):
        encode([str(static), *flags])
    assert read(EncodedCorpus(tmp_path / "out"))[0] == list(TEXTS), "another number of processes goes on"


def test_how_many_documents_there_are_is_told_by_all_parts_of_a_file(tmp_path):
    def total(*sizes: int) -> int | None:
        path = tmp_path / f"{len(sizes)}.jsonl"
        path.write_bytes(b"".join(b'{"text": "%s"}\n' % (b"a" * size) for size in sizes))
        return sources.open_source(str(path), sources.Fields()).total

    assert total(*range(1, 400)) == 399
    # Of 11 MB, the first fifth has nine of ten documents.
    assert total(*[100] * 18_000, *[4500] * 2000) == pytest.approx(20_000, rel=0.1)
