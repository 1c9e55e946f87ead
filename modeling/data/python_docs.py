"""``python_docs``: a corpus that every machine has, the documentation of the Python packages that are installed.

A document is what one object of a package says of itself: its qualified name as title, its docstring without the first
paragraph as text. The query is that first paragraph, the summary, which says in a sentence what the object does. So
the task is that of somebody who knows what a function should do and looks for its page.

- The name stays in the document: whoever reads documentation sees names, and searches by them, too. It is not in the
  query. Markup leaves the query: of ``:class:`~a.B``` it keeps ``B``, of code its letters, of a heading its words.
- Documents have 12 words or more, summaries 4 to 30. One object is one document, under the shortest of its names;
  what an object inherits is not its own, and a text that another document has already is left out.
- Objects with equal summaries are the answers to one query. Classes are whole in one split, and so are those that
  share a summary: a hash of the first name assigns them, a tenth to test, a tenth to dev, the rest to train.

``docstrings.py`` reads, in processes of its own. What they give is kept in the user's cache, under a hash of the
versions of everything that was read, with a ``provenance.json`` that names them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import queue
import re
import site
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import InputError
from ..files import digest, file_sha256, staged_folder, write_json
from . import docstrings
from .converters import write_beir
from .dataset import dataset_name, tenth

logger = logging.getLogger(__name__)

NAME = "python_docs"
PACKAGES = (
    *("stdlib", "PIL", "accelerate", "datasets", "jinja2", "matplotlib", "networkx", "numpy", "pandas"),
    *("scipy", "sentence_transformers", "sklearn", "sympy", "torch", "transformers"),
)
"""What is read where nothing is named: the standard library, and packages that come with polyrep."""

WORDS_OF_SUMMARY = range(4, 31)
WORDS_OF_TEXT = 12
SECONDS = 60.0
"""A module that imports for longer is passed over."""

TOO_LONG = "did not come back within"

Row = dict[str, str]


def is_python_docs(name: str) -> bool:
    """Whether a data set is named so: ``python_docs``, or ``python_docs:PACKAGE,PACKAGE``."""
    return name.partition(":")[0] == NAME


def python_docs(name: str, kept_in: Path, *, seconds: float = SECONDS) -> Path:
    """The folder of the corpus, in BEIR layout, read anew where packages have changed.

    Args:
        name: ``python_docs``, or with the importable names of packages, ``python_docs:requests,fastapi``.
        kept_in: Where corpora are kept.
        seconds: That a module may take to be imported.

    Raises:
        InputError: A package is not installed or cannot be imported, or there is nothing to search in it.
    """
    packages = _packages(name)
    versions = {package: _version(package) for package in packages}
    made_of = {"python": platform.python_version(), "platform": sys.platform, "packages": versions}
    code = [file_sha256(Path(file)) for file in (__file__, str(docstrings.__file__))]
    # The last part is what tables call the data set.
    folder = kept_in / NAME / digest([made_of, code]) / dataset_name(name)
    if (folder / "provenance.json").is_file():
        return folder
    rows: list[Row] = []
    passed_over: dict[str, str] = {}
    # Each package is read by a process of its own, for which a thread only waits.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        read = pool.map(lambda package: read_package(package, seconds), packages)
        bar = tqdm(packages, desc="reading the documentation of installed packages", unit="package")
        for package, (found, failed) in zip(bar, read, strict=True):
            if not found and package in failed and name != NAME:
                raise InputError(
                    f"{package}: cannot be imported ({failed[package]}), so its documentation cannot be read. Mend "
                    "the installation, or leave the package out."
                )
            rows += found
            passed_over |= failed
    for module, why in passed_over.items():
        if TOO_LONG in why or module in packages:
            logger.warning("%s: %s is not in it: %s. A run on another machine may have it.", name, module, why)
    documents, queries, judged = arranged(rows)
    if not queries:
        raise InputError(
            f"{name}: no object in it has a summary of {WORDS_OF_SUMMARY[0]} to {WORDS_OF_SUMMARY[-1]} words and a "
            f"description of {WORDS_OF_TEXT} or more, so there is nothing to search. Name packages with documentation."
        )
    with staged_folder(folder) as staged:
        write_beir(staged, documents, queries, judged)
        counts = {split: len({query for query, _ in pairs}) for split, pairs in judged.items()}
        # Without the order of words: a few docstrings list a set.
        words = {name: sorted(text.split()) for name, (_, text) in documents.items()}
        made = {"documents": len(documents), "queries": counts, "fingerprint": digest([words, queries, judged])}
        write_json(staged / "provenance.json", {"name": name} | made | made_of | {"passed_over": passed_over})
    return folder


def _packages(name: str) -> tuple[str, ...]:
    """What a name of the corpus asks for, each checked to be there."""
    _, colon, listed = name.partition(":")
    if not colon:
        return tuple(package for package in PACKAGES if package == "stdlib" or _spec(package))
    packages = tuple(dict.fromkeys(part.strip() for part in listed.split(",")))
    for package in packages:
        if not re.fullmatch(r"(?!__)[A-Za-z_]\w*", package):
            raise InputError(f"{name}: {package!r} is no name of a package. Write {NAME}:requests,fastapi, say.")
        if package != "stdlib" and _spec(package) is None:
            raise InputError(
                f"{name}: {package} is not installed in this environment, so there is no documentation to read. "
                f"Install it here, or check the name: it is the one of `import {package}`."
            )
    return packages


def _spec(package: str) -> ModuleSpec | None:
    """Where a package lies; None if it cannot be imported."""
    try:
        return importlib.util.find_spec(package)
    except (ImportError, ValueError):  # __main__ has none
        return None


def _version(package: str) -> str:
    """Of the distribution that a module comes from; of one that lies about, its files' sizes and times as well."""
    if package == "stdlib":
        return platform.python_version()
    names = _distributions().get(package, [])
    version = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    spec = _spec(package)
    assert spec is not None
    places = [Path(place) for place in spec.submodule_search_locations or [spec.origin or ""]]
    installed = [Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")]
    if version and any(place.is_relative_to(where) for place in places for where in installed):
        return version
    files = sorted(file for place in places for file in (place.rglob("*.py") if place.is_dir() else [place]))
    seen = digest([[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()])
    return f"{version} as of {seen}".strip()


@cache
def _distributions() -> Mapping[str, list[str]]:
    """Top-level module -> distributions that bring it; finding out takes a tenth of a second."""
    return {name: sorted(set(found)) for name, found in importlib.metadata.packages_distributions().items()}


def read_package(package: str, seconds: float) -> tuple[list[Row], dict[str, str]]:
    """What ``docstrings.py`` prints of a package, and the modules that it passed over, each with the reason."""
    passed_over: dict[str, str] = {}
    while True:
        rows, failed, hung = _read_once(package, sorted(passed_over), seconds)
        passed_over |= failed
        if hung is None:
            return rows, passed_over
        passed_over[hung] = f"{TOO_LONG} {seconds:g} s, or ended the process"
        if hung == package:
            return [], passed_over


def _read_once(package: str, skipped: list[str], seconds: float) -> tuple[list[Row], dict[str, str], str | None]:
    """Rows, failures, and the module at which the process had to be stopped or ended by itself."""
    rows: list[Row] = []
    failed: dict[str, str] = {}
    module, done = package, False
    with tempfile.TemporaryDirectory() as scratch:
        for line in _lines(package, skipped, scratch, seconds):
            row = json.loads(line)
            if "importing" in row:
                module = row["importing"]
            elif "skipped" in row:
                failed[row["skipped"]] = row["why"]
            elif row.get("done"):
                done = True
            else:
                doc = VARIES.sub("", ADDRESS.sub("0x...", row["doc"].replace(scratch, "~")))
                rows.append(row | {"doc": doc.encode("utf-8", "replace").decode()})  # half a surrogate pair is no text
    return rows, failed, None if done else module or package


VARIES = re.compile(r"^.*# may vary.*\n?", re.MULTILINE)
"""Lines of examples that some packages run at import, with other numbers each time."""

ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{9,}\b")
"""Where an object lay in memory, which some docstrings tell."""


def _lines(package: str, skipped: list[str], scratch: str, seconds: float) -> Iterator[bytes]:
    """Lines of the program, which is stopped when none comes for so long."""
    private = ("HOME", "USERPROFILE", "TMPDIR", "TEMP", "TMP", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR")
    environment = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY")}
    environment |= dict.fromkeys((*private, "HF_HOME", "TORCHINDUCTOR_CACHE_DIR"), scratch)
    environment["PYTHONUSERBASE"] = site.getuserbase()  # which goes by HOME
    # The same words from every run: some docstrings are made of sets.
    environment |= {
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "MPLBACKEND": "Agg",
        "HF_HUB_OFFLINE": "1",
        "USE_TF": "0",
    }
    # -P: the folder of the program holds modules that would stand before others of these names.
    command = [sys.executable, "-P", str(docstrings.__file__), package, "--skip", *skipped]
    nothing: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=scratch, env=environment, **nothing) as process:
        reader = threading.Thread(target=_read_into, args=(process.stdout, lines), daemon=True)
        reader.start()
        try:
            while line := lines.get(timeout=seconds):
                yield line
        except queue.Empty:
            return
        finally:
            process.kill()
            reader.join()


def _read_into(stream: Any, lines: queue.SimpleQueue[bytes]) -> None:
    """Pass lines on, and an empty one when there are no more."""
    for line in stream:
        lines.put(line)
    lines.put(b"")


def arranged(
    rows: Sequence[Row],
) -> tuple[dict[str, tuple[str, str]], dict[str, str], dict[str, list[tuple[str, str]]]]:
    """Documents, queries and judgments of docstrings.

    Args:
        rows: ``name``, ``class`` (the class that it is, or is of) and ``doc``. Of equal texts the first stays.

    Returns:
        Document id -> (title, text), query id -> text, and split -> pairs of query id and document id. A document's
        id is its name.
    """
    documents: dict[str, tuple[str, str]] = {}
    texts: set[str] = set()
    answers: dict[str, list[str]] = defaultdict(list)
    together = _Groups()
    for row in rows:
        summary, text = summary_and_text(row["doc"])
        long_enough = len(re.findall(r"\w+", text)) >= WORDS_OF_TEXT and len(summary.split()) in WORDS_OF_SUMMARY
        if not long_enough or row["name"] in documents or text in texts:
            continue
        texts.add(text)
        documents[row["name"]] = (row["name"], text)
        answers[summary].append(row["name"])
        together.join(row["class"] or row["name"], row["name"], answers[summary][0])
    queries: dict[str, str] = {}
    judged: dict[str, list[tuple[str, str]]] = {"train": [], "dev": [], "test": []}
    for summary, names in answers.items():
        queries[f"q:{names[0]}"] = summary
        split = {0: "test", 1: "dev"}.get(tenth(together.first(names[0])), "train")
        judged[split] += [(f"q:{names[0]}", name) for name in names]
    return documents, queries, judged


class _Groups:
    """Names that belong together, directly or through others; the first in the alphabet stands for all."""

    def __init__(self) -> None:
        self.above: dict[str, str] = {}

    def first(self, name: str) -> str:
        while (above := self.above.setdefault(name, name)) != name:
            self.above[name] = self.above[above]
            name = self.above[name]
        return name

    def join(self, *names: str) -> None:
        firsts = [self.first(name) for name in names]
        for first in firsts:
            self.above[first] = min(firsts)


SIGNATURE = re.compile(r"(?:\s*(?:\w+ = )?[\w.]+\((?:[^()]|\([^()]*\))*\)(?:[ ]*-+>[^\n]*)?(?:\n|$))+")
"""What extension modules write in front: how to call, on a line or on several."""

REFERENCE = re.compile(r":[\w:+-]+:`(?:[^`<]*<)?~?([^`>]*)>?`|\[`~?\.?([^`\]]+)`?\]")
"""A reference in reStructuredText or to a page of Hugging Face's; the last part of its target is what remains."""

MARKUP = re.compile(r"`+|[=~^\-]{4,}|(?<![\w*])\*{1,2}(?=\w)|(?<=[\w.])\*{1,2}(?![\w*])")
"""Of code, of headings, of emphasis."""


def summary_and_text(doc: str) -> tuple[str, str]:
    """The first paragraph, as one line without markup, and the rest; a signature in front is part of the rest."""
    signature = found[0] if (found := SIGNATURE.match(doc := doc.strip())) else ""
    first, *others = re.split(r"\n\s*\n", doc.removeprefix(signature).strip())
    plain = REFERENCE.sub(lambda found: (found[1] or found[2] or "").rpartition(".")[2], first)
    return " ".join(MARKUP.sub("", plain).split()), "\n\n".join([signature.strip(), *others]).strip()
