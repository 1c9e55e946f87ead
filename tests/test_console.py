"""What commands print and are given, on consoles that lack characters, on closed ones, in bytes that are no text."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import CLI, DOCUMENTS, IMPORTABLE, PATIENCE, ROOT, write_beir
from sentence_transformers import SentenceTransformer
from test_encode import write_lines

from polyrep import InputError
from polyrep.cli import main
from polyrep.encoding.cache import embed
from polyrep.errors import HALF
from polyrep.files import read_json

BYTES = os.fsdecode(b"caf\xe9")
"""Bytes of a command line or a path that are not UTF-8."""


@pytest.fixture(scope="module")
def folder(static_model: SentenceTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a corpus with ids and texts outside ASCII, its shards and their index."""
    folder = tmp_path_factory.mktemp("console")
    static_model.save_pretrained(str(folder / "model"), create_model_card=False)
    write_lines(folder / "corpus.jsonl", {f"{name}é": f"{text} → ✓" for name, text in DOCUMENTS.items()})
    argv = ["encode", str(folder / "model"), "--input", str(folder / "corpus.jsonl"), "--output"]
    assert main([*argv, str(folder / "shards")]) == 0
    assert main(["index", str(folder / "shards"), "--uri", f"faiss://{folder}/index"]) == 0
    return folder


def searched(folder: Path, *queries: str) -> list[str]:
    return ["search", *queries, "--uri", f"faiss://{folder}/index", "--model", str(folder / "model")]


@pytest.fixture
def printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Callable[[], str]]]:
    """Have what is printed go into a file in an encoding; the result gives what has arrived there."""
    opened = []

    def to(encoding: str, file: str = "", **options: bool) -> Callable[[], str]:
        path = Path(file or tmp_path / "printed")
        for name in ("stdout", "stderr"):
            opened.append(io.TextIOWrapper(path.open("wb"), encoding=encoding, **options))
            monkeypatch.setattr(sys, name, opened[-1])
            path = tmp_path / "stderr"
        return lambda: (tmp_path / "printed").read_text(encoding)

    yield to
    monkeypatch.undo()
    for stream in opened:
        stream.close()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_console_that_lacks_characters_shows_their_escapes(encoding, folder, tmp_path, printed):
    arrived = printed(encoding)
    output = tmp_path / "ausgabe→"
    commands = [
        searched(folder, "what → is é?"),
        ["encode", str(folder / "model"), "--input", str(folder / "corpus.jsonl"), "--output", str(output)],
        ["index", str(folder / "shards"), "--uri", f"faiss://{tmp_path}/→"],
        ["evaluate", str(folder / "model"), "--dataset", str(write_beir(tmp_path / "data→"))],
    ]
    for command in commands:
        assert main(command) == 0, command
        assert main([*command[:1], "nowhere→", *command[2:]]) in (0, 2)
    found = arrived()
    arrow, accent = "\\u2192", "\\xe9" if encoding == "ascii" else "é"
    assert f"what {arrow} is {accent}?\n" in found and f"d2{accent}\n" in found
    assert f"ausgabe{arrow}: 5 documents" in found and f"/{arrow}: 5 documents" in found and f"data{arrow}" in found
    sys.stderr.flush()
    assert f"error: nowhere{arrow}" in (tmp_path / "stderr").read_text(encoding)


@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_full_disk_behind_the_output_is_said(unbuffered, folder, printed, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    printed("utf-8", "/dev/full", write_through=unbuffered)
    assert main(searched(folder, "open ports")) == 2
    sys.stderr.flush()
    assert "standard output: cannot be written (No space left on device)" in (tmp_path / "stderr").read_text()


def run(command: list[str], **options: object) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | IMPORTABLE | {"PYTHONIOENCODING": "ascii"}
    return subprocess.run([sys.executable, CLI, *command], env=environment, timeout=PATIENCE, **options)


def test_a_reader_that_has_gone_ends_a_command_without_a_word(folder):
    reader, writer = os.pipe()
    os.close(reader)
    ended = run(searched(folder, "open ports"), stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert ended.returncode == 141 and b"Error" not in ended.stderr


def test_streams_that_are_closed_take_everything(folder, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert main(searched(folder, "open ports")) == 0


def test_another_error_of_the_system_is_not_taken_for_the_console(monkeypatch, printed):
    def refuse(argv: list[str], prog: str) -> None:
        raise PermissionError("not the console")

    printed("utf-8", write_through=True)
    monkeypatch.setattr("polyrep.cli.train", refuse)
    with pytest.raises(PermissionError, match="not the console"):
        main(["train"])


def test_bytes_that_are_no_text_are_refused_before_a_model_is_opened(folder, tmp_path, capsys):
    no_model = ["--model", "nowhere"]
    assert main([*searched(folder, "open ports", BYTES), *no_model]) == 2
    assert r"query 'caf\udce9': holds '\udce9' at character 3, half of a surrogate pair" in capsys.readouterr().err
    argv = ["encode", "nowhere", "--input", str(folder / "corpus.jsonl"), "--output", str(tmp_path / "out")]
    assert main([*argv, "--name", BYTES]) == 2
    assert r"--name: holds '\udce9'" in capsys.readouterr().err


def test_paths_may_be_any_bytes(folder, tmp_path, capsys):
    source = write_lines(tmp_path / f"{BYTES}.jsonl", DOCUMENTS)
    with source.open("a") as lines:
        lines.write("{broken\n")
    output = tmp_path / BYTES / "out"
    assert main(["encode", str(folder / "model"), "--input", str(source), "--output", str(output)]) == 0
    assert str(source) in json.dumps(read_json(output / "manifest.json"), ensure_ascii=False)
    assert len((output / "errors.jsonl").read_text(encoding="utf-8").splitlines()) == 1
    index = tmp_path / BYTES / "index"
    assert main(["index", str(output), "--uri", f"faiss://{index}"]) == 0
    assert (index / "polyrep.json").is_file()
    argv = ["search", "open ports", "--model", str(folder / "model"), "--uri"]
    capsys.readouterr()
    for uri in (f"faiss://{index}", f"faiss://{tmp_path}/caf%E9/index"):
        assert main([*argv, uri]) == 0
        assert "d2" in capsys.readouterr().out


def test_what_a_library_cannot_open_is_said(monkeypatch, capsys):
    def refuse(argv: list[str], prog: str) -> None:
        argv[0].encode()

    monkeypatch.setattr("polyrep.cli.train", refuse)
    assert main(["train", BYTES]) == 2
    assert r"'caf\udce9': holds half of a surrogate pair" in capsys.readouterr().err
    monkeypatch.setattr("polyrep.cli.train", lambda argv, prog: "\ud800".encode())
    with pytest.raises(UnicodeEncodeError):  # nobody gave that: the fault is ours
        main(["train", "run"])


@pytest.mark.parametrize("where", ["id", "text", "prompt"])
def test_no_text_is_refused_by_its_place(where, static_model, monkeypatch):
    texts = {"id": {"\ud800": "a"}, "text": {"d1": "a", "d2": "b \udfff"}, "prompt": {"d1": "a"}}[where]
    if where == "prompt":
        monkeypatch.setattr(static_model, "prompts", {"query": "", "document": "\udc80: "})
    place = {"id": r"text '\\ud800'", "text": "text 'd2'", "prompt": "the model's prompt 'document'"}[where]
    with pytest.raises(InputError, match=f"{place}: holds .* half of a surrogate pair"):
        embed(static_model, texts, task="document", show_progress=False)
    assert not HALF.search("😀 é")


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="only Linux tells when another process ends")
def test_a_refusal_is_the_last_that_is_read_below_a_launcher(tmp_path):
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--num_processes", "1", "--cpu"]
    command = [*launch, str(ROOT / "train.py"), "lemur-minilm", "--no_such_flag", "3"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    said = "train.py: error: unrecognized arguments: --no_such_flag 3"
    assert ran.returncode != 0 and ran.stderr.splitlines()[-1] == said, ran.stderr
    assert "CalledProcessError" in ran.stderr and ran.stderr.count(said) == 2


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="only Linux tells when another process ends")
def test_a_refusal_stands_where_no_process_can_be_started(monkeypatch, capsys):
    tried: list[str] = []

    def no_memory() -> int:
        tried.append("fork")
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    launcher = subprocess.Popen([sys.executable, "-c", "input()", "accelerate", "launch"], stdin=subprocess.PIPE)
    try:
        monkeypatch.setattr(os, "getppid", lambda: launcher.pid)
        monkeypatch.setattr(os, "fork", no_memory)
        monkeypatch.delenv("RANK", raising=False)
        assert main(["train", "lemur-minilm", "--seed", "-1"]) == 2
    finally:
        launcher.communicate(b"\n")
    assert tried == ["fork"] and "error: --seed -1: is out of its range" in capsys.readouterr().err


def test_every_refusal_is_said_below_a_launcher(monkeypatch, capsys):
    below: list[str] = []
    monkeypatch.setattr("polyrep.cli.say_below_launcher", below.append)
    assert main(["train", "lemur-minilm", "--seed", "-1"]) == 2
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate"])
    assert capsys.readouterr().err.splitlines()[-1] == below[1]
    assert below[0].startswith("error: --seed -1: is out of its range") and below[1].endswith("are required: MODEL")
