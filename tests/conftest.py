"""What all tests share: settings that make them alike on every machine, small data, and how they start programs.

It imports nothing that takes long, since the process that hands tests to workers needs none of it: fixtures of models
stand in small_models.py.
"""

from __future__ import annotations

import atexit
import gc
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
import warm

# Whoever starts the tests may be a terminal of any width, a launcher, or somebody with settings of their own.
_THEIRS = ("ACCELERATE_", "GRADIO_", "HF_", "HUGGINGFACE_", "MASTER_", "SENTENCE_TRANSFORMERS_", "TRANSFORMERS_")
_THEIRS += ("COLUMNS", "FORCE_COLOR", "GROUP_RANK", "LOCAL_", "MTEB_CACHE", "POLYREP_DATA", "RANK", "WORLD_SIZE")
for _name in [name for name in os.environ if name.startswith(_THEIRS) and name != "HF_HUB_OFFLINE"]:
    del os.environ[_name]

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same numbers on every machine
os.environ["OMP_NUM_THREADS"] = "1"  # several workers share the cores, and threads that wait for a core burn it
os.environ["OMP_WAIT_POLICY"] = "passive"  # nor may those that a training takes for itself
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hub-")  # nor on what its user has downloaded
if "PYTEST_XDIST_WORKER" not in os.environ:  # one for all workers, since reading python_docs takes a while
    os.environ["POLYREP_CACHE"] = tempfile.mkdtemp(prefix="polyrep-")
    os.environ["MPLCONFIGDIR"] = tempfile.mkdtemp(prefix="matplotlib-")  # a home that cannot be written has none
    for _name in ("POLYREP_CACHE", "MPLCONFIGDIR"):
        atexit.register(shutil.rmtree, os.environ[_name], ignore_errors=True)

ROOT = Path(__file__).parent.parent

atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)


def pytest_configure(config: pytest.Config) -> None:
    """Import the models where tests run: in this process, unless it has workers for them."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        as_if_started_by_hand()
        config.pluginmanager.import_plugin("small_models")


def as_if_started_by_hand() -> None:
    """Undo what a process takes over from those that start it in the background: signals ignored, and a umask."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGALRM, signal.SIGCHLD):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.umask(0o022)


def pytest_collection_finish() -> None:
    """Have the collector of garbage pass over what was imported, a million objects that live to the end."""
    gc.freeze()


needs_seismic = pytest.mark.skipif(
    importlib.util.find_spec("seismic") is None,
    reason="Seismic is not installed: see README.md for where it has a wheel",
)


PATIENCE = 1200
"""Seconds after which a test no longer waits for what has to come: a machine that does much else takes long."""

DOCUMENTS = {
    "d1": "tar: archive files into one file",
    "d2": "ss: show open ports and sockets",
    "d3": "cat: print a file",
    "d4": "grep: search lines of files for a pattern",
    "d5": "ls: list a folder",
}
QUERIES = {"q1": "show open ports", "q2": "make an archive", "q3": "find a pattern in a file"}
QRELS = {"q1": {"d2": 1}, "q2": {"d1": 2}, "q3": {"d4": 1, "d3": 1}}


def write_beir(folder: Path, split: str = "test") -> Path:
    """The small data set above as a BEIR folder."""
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": k, "title": "", "text": v}) + "\n" for k, v in DOCUMENTS.items())
    )
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": k, "text": v}) + "\n" for k, v in QUERIES.items())
    )
    lines = [f"{q}\t{d}\t{s}\n" for q, judged in QRELS.items() for d, s in judged.items()]
    (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    return write_beir(tmp_path / "tiny")


CLI = str(ROOT / "tests" / "toy_cli.py")
"""The program `polyrep`, with the test room."""

IMPORTABLE = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))}
"""What has programs import the tests, and what the tests themselves import."""


def run_python(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run Python with the tests importable; the caller looks at returncode, stdout and stderr."""
    options = {"env": os.environ | IMPORTABLE, "timeout": PATIENCE} | options
    return subprocess.run([warm.python(), *arguments], capture_output=True, text=True, **options)


def run_two_processes(program: str | Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program in two processes that know of each other, as `torchrun` and `accelerate launch` start them."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return run_python(*launch, str(program), *arguments)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest test, which all would wait for if it came late."""
    for item in items:
        if "seismic:" in item.name:  # a case that opens an index of it
            item.add_marker(needs_seismic)
    items.sort(key=lambda item: not item.nodeid.endswith("[README.md]"))
