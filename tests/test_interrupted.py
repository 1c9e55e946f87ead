"""Work that is killed at any moment, or done beside other work, or on a clock that jumps, ends as if nothing had been.

A process is killed at an event that Python tells of (a file opened, moved or removed, a folder made), by its number,
so that each test kills at the same moments every time.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import run_python, write_beir
from safetensors.numpy import load_file

from polyrep.cli import main

KILLED = """
import json, os, signal, sys
import toy
from polyrep.cli import main

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.copyfile"}

def run(words, inside, last):
    '''Its exit status, or -9 if it was killed at the event number `last`, and how many events there were.'''
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        seen = [0]
        def count(event, arguments):
            if event in EVENTS and str(arguments[0]).startswith(inside):
                seen[0] += 1
                if seen[0] == last:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        sys.stdout = open(os.devnull, "w")
        status = main(words)
        os.write(write, str(seen[0]).encode())
        os._exit(status)
    os.close(write)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, int(os.read(read, 100) or 0)

whole, killed, shares, plan = json.loads(sys.argv[1])
status, events = run(whole["words"], whole["inside"], None)
assert status == 0, status
moments = []
for share in shares:
    words = killed["words"]
    if plan == "train":
        last = [name for name in os.listdir(killed["inside"]) if os.path.exists(
            os.path.join(killed["inside"], name, "trainer_state.json"))] if os.path.isdir(killed["inside"]) else []
        words = words + (["--resume_from_checkpoint", "last"] if last else ["--overwrite"])
    status, _ = run(words, killed["inside"], share and max(1, int(share * events)))
    moments.append(status)
print(json.dumps([events, moments]))
"""


Command = tuple[list[str], Path]
"""Words, and the folder into which they write."""


def kill_at(shares: list[float | None], whole: Command, killed: Command, plan: str) -> list[int]:
    """Run a command whole, and another in pieces: killed after shares of the events of the first, None for never."""
    told = [{"words": words, "inside": str(inside)} for words, inside in (whole, killed)]
    result = run_python("-c", KILLED, json.dumps([*told, shares, plan]))
    assert result.returncode == 0, result.stderr[-3000:]
    events, statuses = json.loads(result.stdout.splitlines()[-1])
    assert events > 20 and statuses[-1] == 0
    return statuses


def test_training_killed_at_any_moment_ends_in_the_same_model(toy_run, tmp_path):
    def command(name: str) -> Command:
        return ["train", str(toy_run), "--output_dir", str(tmp_path / name), "--save_steps", "2"], tmp_path / name

    shares = [0.02, 0.3, 0.5, 0.4, 0.9, 0.15, None]
    statuses = kill_at(shares, command("whole"), command("killed"), "train")
    assert statuses.count(-signal.SIGKILL) >= 4
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ours, theirs = (load_file(run / "final" / "model.safetensors") for run in (killed, whole))
    assert ours.keys() == theirs.keys() and all((ours[name] == value).all() for name, value in theirs.items())
    logs = [json.loads((run / "training.json").read_text()) for run in (killed, whole)]
    losses = [[entry["loss"] for entry in record["log"] if "loss" in entry] for record in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert logs[0]["fingerprint"] == logs[1]["fingerprint"]
    assert {path.name for path in (killed / "final").iterdir()} == {path.name for path in (whole / "final").iterdir()}


def rows_of(output: Path) -> list[dict[str, Any]]:
    (file,) = output.glob("*.json")
    timed = ("search_ms_p50", "search_ms_p99", "encode_docs_per_s", "pareto")
    return [{k: v for k, v in row.items() if k not in timed} for row in json.loads(file.read_text())["rows"]]


def test_a_frontier_killed_at_any_moment_ends_in_the_same_table(multi_vector_model, tmp_path):
    multi_vector_model.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    data = write_beir(tmp_path / "tiny", "train")
    shutil.copy(data / "qrels" / "train.tsv", data / "qrels" / "test.tsv")

    def command(name: str) -> Command:
        inside = tmp_path / name
        words = ["evaluate", str(tmp_path / "model"), "--frontier", "--dataset", str(data), "--methods", "mean"]
        words += ["--methods", "hierarchical", "--name", "table"]
        places = {"output": "results", "cache_dir": "embeddings", "frontier_cache": "frontier"}
        return words + [w for flag, part in places.items() for w in (f"--{flag}", str(inside / part))], inside

    statuses = kill_at([0.1, 0.3, 0.5, 0.3, 0.2, None], command("whole"), command("killed"), "frontier")
    assert statuses.count(-signal.SIGKILL) >= 3
    assert rows_of(tmp_path / "killed" / "results") == rows_of(tmp_path / "whole" / "results")


JUMPING = """
import sys, time
import toy
from polyrep.cli import main
stock, jumps = time.time, [0]
def jumping():
    jumps[0] += 1
    return stock() + (86400 * 365 if jumps[0] % 2 else -86400)
time.time = jumping
sys.exit(main(sys.argv[1:]))
"""
"""The command line on a clock that is a year ahead, then a day back, and so on."""


def test_nothing_is_decided_by_the_clock(toy_run, tmp_path):
    """Of three checkpoints the last two are kept, whatever their dates say, and what took how long is as it was."""
    run = tmp_path / "run"
    steady = ["train", str(toy_run), "--lr_scheduler_type", "constant", "--output_dir"]
    words = [*steady, str(run), "--save_steps", "1", "--save_total_limit", "2"]
    assert main([*words, "--max_steps", "3"]) == 0
    year_ahead = (run / "checkpoint-2").stat().st_mtime + 86400 * 365
    for step in (2, 3):
        os.utime(run / f"checkpoint-{step}", (year_ahead + 10 * step,) * 2)
    jumped = run_python("-c", JUMPING, *words, "--max_steps", "6", "--resume_from_checkpoint", "last")
    assert jumped.returncode == 0, jumped.stderr[-3000:]
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-5", "checkpoint-6"}
    assert main([*steady, str(tmp_path / "whole")]) == 0
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (run, tmp_path / "whole"))
    assert all((ours[name] == value).all() for name, value in theirs.items())
    record = json.loads((run / "training.json").read_text())
    summary = record["log"][-1]
    assert 0 < summary["train_runtime"] < 300 and 0 < record["seconds"] < 300
    assert summary["train_steps_per_second"] == pytest.approx(6 / summary["train_runtime"], rel=1e-2)


def test_a_cache_of_another_day_is_a_cache(backbone, beir, tmp_path):
    words = ["evaluate", str(backbone), "--dataset", str(beir), "--baselines", "none", "--cache_dir"]
    words += [str(tmp_path / "cache"), "--output", str(tmp_path / "results")]
    assert main(words) == 0
    before = {path: path.stat().st_ino for path in (tmp_path / "cache").rglob("*.bin")}
    for number, path in enumerate(before):
        os.utime(path, (86400 * 365 * (100 if number % 2 else 1),) * 2)
    first = rows_of(tmp_path / "results")
    jumped = run_python("-c", JUMPING, *words)
    assert jumped.returncode == 0, jumped.stderr[-3000:]
    assert before and {path: path.stat().st_ino for path in (tmp_path / "cache").rglob("*.bin")} == before
    assert rows_of(tmp_path / "results") == first


AT_ONCE = """
import json, os, sys
from polyrep.cli import main

pids = []
for words in json.loads(sys.argv[1]):
    pids.append(os.fork())
    if not pids[-1]:
        os._exit(main(words))
assert not any([os.waitpid(pid, 0)[1] for pid in pids])
"""


def test_two_processes_at_once_share_a_cache_and_a_corpus(backbone, beir, tmp_path):
    """Each is alone in what it thinks, and what stands there in the end is whole."""
    lines = "".join(json.dumps({"_id": f"d{n}", "text": f"list file {n}"}) + "\n" for n in range(40))
    (beir / "corpus.jsonl").write_text(lines)
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    encode = ["encode", str(backbone), "--input", str(beir), "--shard_size", "4", "--output"]
    evaluate = ["evaluate", str(backbone), "--dataset", str(beir), "--baselines", "none", "--cache_dir"]
    both = [[*encode, str(tmp_path / "shared")], [*evaluate, str(tmp_path / "cache")]]
    result = run_python("-c", AT_ONCE, json.dumps([words for words in both for _ in range(2)]))
    assert result.returncode == 0, result.stderr[-3000:]
    assert main([*encode, str(tmp_path / "alone")]) == 0
    for path in (tmp_path / "alone" / "shards").iterdir():
        assert (tmp_path / "shared" / "shards" / path.name).read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert not [path for path in tmp_path.rglob("*.partial")]
