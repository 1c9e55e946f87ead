"""A disk that takes no more, and folders that cannot be made: said in one line, and what was finished is kept."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import CLI, IMPORTABLE, run_python
from safetensors import SafetensorError
from safetensors.torch import load_file

from polyrep import InputError
from polyrep.cli import main
from polyrep.files import disk_error, refuse_unwritable, remove_leftovers, staged_folder

LIMITED = f"""
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
sys.argv[0] = {CLI!r}
runpy.run_path({CLI!r}, run_name="__main__")
"""
"""The command line where no file may be larger than so many bytes, which stands for a full disk."""


def run_limited(most: int, words: list[str], scratch: Path) -> subprocess.CompletedProcess[str]:
    # git, asked for the commit, would leave a half of the repository's index
    return run_python("-c", LIMITED, str(most), *words, env=os.environ | IMPORTABLE | {"GIT_INDEX_FILE": str(scratch)})


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("manifest.json", "training.json", "README.md")  # which say when
    }


@pytest.mark.parametrize("most", [200, 3000])
def test_encoding_goes_on_after_a_full_disk(most, backbone, beir, tmp_path):
    """With no room for the manifest, and with room for it and none for a shard: five vectors are larger."""
    words = ["encode", str(backbone), "--input", str(beir), "--precision", "float32", "--shard_size", "50"]
    lines = "".join(f'{{"_id": "d{number}", "text": "list file {number}"}}\n' for number in range(60))
    (beir / "corpus.jsonl").write_text(lines)
    full = run_limited(most, [*words, "--output", str(tmp_path / "full")], tmp_path / "index")
    assert full.returncode == 2 and "Traceback" not in full.stderr
    file = "manifest.json" if most == 200 else "shards/00000000.safetensors"
    assert re.search(f"error: {tmp_path}/full/{file}: File too large, so the work stops", full.stderr)
    assert not any(path.name.endswith("safetensors") for path in (tmp_path / "full").rglob("*"))
    assert main([*words, "--output", str(tmp_path / "full")]) == main([*words, "--output", str(tmp_path / "one")]) == 0
    assert content(tmp_path / "full") == content(tmp_path / "one")


SHORT_OF_MEMORY = """
import json, resource, sys
from polyrep.cli import main
room, small, large = json.loads(sys.argv[1])
assert main(small) == 0  # all that is imported is there now
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
sys.exit(main(large))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux how much is used")
def test_encoding_goes_on_where_memory_was_short(backbone, beir, tmp_path):
    words = ["encode", str(backbone), "--batch_size", "2000", "--shard_size", "2000", "--input"]
    lines = "".join(f'{{"_id": "d{number}", "text": "{"list file " * 30}{number}"}}\n' for number in range(4000))
    (beir / "corpus.jsonl").write_text(lines)
    (tmp_path / "one.jsonl").write_text(lines.partition("\n")[0])
    small = [*words, str(tmp_path / "one.jsonl"), "--output", str(tmp_path / "small")]
    large = [*words, str(beir), "--output", str(tmp_path / "short")]
    short = run_python("-c", SHORT_OF_MEMORY, json.dumps([2**24, small, large]))
    assert short.returncode == 2 and "Traceback" not in short.stderr
    assert "error: encode: not enough memory" in short.stderr and "What was finished is kept." in short.stderr
    assert main([*words, str(beir), "--output", str(tmp_path / "one")]) == main(large) == 0
    assert content(tmp_path / "short") == content(tmp_path / "one")


@pytest.mark.parametrize("share", [0.5, 1.5])
def test_training_starts_again_after_a_full_disk(share, toy_run, backbone, tmp_path):
    """With no room for the model, and with room for it and none for the optimizer, which is twice as large."""
    words = ["train", str(toy_run), "--output_dir", str(tmp_path / "out"), "--overwrite"]
    most = int(share * (backbone / "model.safetensors").stat().st_size)
    full = run_limited(most, words, tmp_path / "index")
    assert full.returncode == 2 and "Traceback" not in full.stderr
    assert re.search(rf"error: {tmp_path}/out\S*: .*, so the work stops here", full.stderr)
    assert (share < 1) != (tmp_path / "out" / "init").is_dir() and not (tmp_path / "out" / "final").exists()
    assert (share < 1) != ("Interrupted at step 3; last checkpoint: None" in full.stdout)
    assert main(words) == main(["train", str(toy_run), "--output_dir", str(tmp_path / "one")]) == 0
    found, expected = (load_file(tmp_path / run / "final" / "model.safetensors") for run in ("out", "one"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("below", ["", "/deeper/still"])
@pytest.mark.parametrize(
    "command",
    [
        "train {run} --output_dir {place}",
        "train gaussian-minilm-frozen --datasets {data} --output_dir {place}",
        "train gaussian-minilm-frozen --datasets {data} --output_dir {out} --cache_dir {place}",
        "encode minilm --input {data} --output {place}",
    ],
)
def test_a_place_that_cannot_be_written_to_is_refused_first(command, below, toy_run, beir, tmp_path, capsys):
    file, out = tmp_path / "file", tmp_path / "out"
    file.write_text("mine")
    assert main(command.format(run=toy_run, data=beir, out=out, place=f"{file}{below}").split()) == 2
    said = capsys.readouterr().err
    assert f"{file}{below}: {file} is no folder, so nothing can be written there" in said
    assert file.read_text() == "mine" and not out.exists()


def test_a_folder_of_others_is_refused():
    with pytest.raises(InputError, match="--output /proc/1: /proc/1 cannot be written to"):
        refuse_unwritable(Path("/proc/1"), "--output")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), errno.ENOSPC),
        (SafetensorError("I/O error: File too large (os error 27)"), errno.EFBIG),
        (RuntimeError("write error in index.faiss: 0 != 3 (No space left on device)"), errno.ENOSPC),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 136704 vs 136596"), errno.EIO),
        (
            RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0"),
            errno.EIO,
        ),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), None),
        (RuntimeError("CUDA out of memory"), None),
        (InputError("No space left on device"), None),
        (KeyboardInterrupt(), None),
    ],
)
def test_what_a_full_disk_raises_is_known_whatever_library_raises_it(error, code):
    found = disk_error(error)
    assert (found.errno if found else None) == code


def test_an_empty_folder_is_filled_where_a_rename_replaces_none(tmp_path, monkeypatch):
    """As on Windows, where what was written would be lost."""
    rename = os.rename

    def renamed(source: Path, target: Path) -> None:
        if os.path.exists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        rename(source, target)

    monkeypatch.setattr(os, "rename", renamed)
    (tmp_path / "folder").mkdir()
    with staged_folder(tmp_path / "folder") as staged:
        (staged / "file").write_text("written", encoding="utf-8")
    assert content(tmp_path / "folder") == {"file": b"written"}


def test_leftovers_are_those_of_processes_that_have_ended(tmp_path):
    with subprocess.Popen(["true"]) as ended:
        pass
    places = [tmp_path / f".name.{socket.gethostname()}-{number}.partial" for number in (ended.pid, os.getpid())]
    for place in places:
        place.mkdir()
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == places[1:]
