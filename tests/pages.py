"""Fenced blocks of Markdown pages, and a reader who runs them one after another as the page says.

Commands run in this process, since importing torch for each of them takes many seconds: a shell of a few lines knows
the programs that pages may name, ``Reader.PROGRAMS``. Any other is an error, as is whatever those refuse. After each
command its reader looks at what it has left behind.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import io
import json
import os
import re
import runpy
import secrets
import shlex
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import warm
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import DOCUMENTS, PATIENCE, QRELS, QUERIES
from datasets import Dataset
from hub_server import running_hub
from huggingface_hub import constants
from qdrant_server import StandIn
from small_world import SmallWorld
from torch.distributed.run import get_args_parser

from polyrep.cli import main
from polyrep.encoding import EncodedCorpus
from polyrep.files import read_json
from polyrep.hub import fingerprint
from polyrep.report import check_results

QUICK_FRONTIER = ["--methods", "mean", "reinpool", "--fit_seconds", "1"]
"""Of all ways to make an index smaller, one that is learned and one that is not."""

NOT_RUN = {"text", "bibtex", "json", "yaml", "diff", "markdown", "{toctree}"}
"""Languages of blocks that are no code to run; some are read in another way."""

_FENCE = re.compile(r"( *)(`{3,}|~{3,})([^`\s]*)[^`]*")
_SHAPE = re.compile(r"(list of )?\(((?:(?:at most )?\d+|[a-z]+)(?:, (?:\d+|[a-z]+))*),?\)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the line where its text begins, its language, and its text."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path, text: str | None = None) -> list[Block]:
    """Every fenced block of a page, also of those in lists."""
    found: list[Block] = []
    fence, body = None, []
    for number, line in enumerate((text or page.read_text(encoding="utf-8")).splitlines(), start=1):
        match = _FENCE.fullmatch(line)
        if fence is None and match:
            fence, start, body = match, number + 1, []
        elif fence and match and match[2].startswith(fence[2]) and not match[3]:
            found.append(Block(page, start, fence[3], "".join(f"{part}\n" for part in body)))
            fence = None
        elif fence:
            body.append(line.removeprefix(fence[1]))
    assert fence is None, f"{page}:{start - 1}: a block that does not end"
    return found


class Reader:
    """Somebody who runs the blocks of a page in the small world, top down.

    Args:
        world: Where.
        standing_for: Word on the page -> what this reader takes for it.
    """

    def __init__(self, world: SmallWorld, standing_for: Mapping[str, str]):
        self.world, self.standing_for = world, dict(standing_for)
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.shell: dict[str, str] = {}
        self.addresses: dict[str, str] = {}
        self.trained: set[Path] = set()
        self.opened = ""
        self.left = contextlib.ExitStack()

    def __enter__(self) -> Reader:
        self.left.enter_context(mock.patch.dict(os.environ, MTEB_CACHE=str(self.world.folder / ".cache" / "mteb")))
        self.left.enter_context(mock.patch.object(sys, "path", [str(self.world.folder), *sys.path]))
        self.left.enter_context(self.world.entered())
        self.left.enter_context(mock.patch.object(sys, "executable", warm.python()))
        self.left.callback(torch.set_num_threads, torch.get_num_threads())
        self.left.callback(self._forget, set(sys.modules))
        return self

    def __exit__(self, *_: Any) -> None:
        if len(self.names) > 1:
            self.names.clear()
            gc.collect()  # engines that are open in this process
        self.left.close()
        self.world.clear()

    def read(self, block: Block) -> bool:
        """Run a block, if it is one to be run."""
        run: Callable[[Block], None] | None = {"python": self._python, "bash": self._bash}.get(block.language)
        if run is not None:
            self.world.provide(block.text)
            run(block)
        return run is not None

    def _python(self, block: Block) -> None:
        """Run code, or save it where the page says to; values are as large as comments beside them say."""
        before = block.page.read_text(encoding="utf-8").splitlines()[: block.line - 2]
        paragraph = "\n".join(before).rstrip().rpartition("\n\n")[2]
        code = self._replaced(block.text)
        if saved := re.search(r"[Ss]ave this as `([\w./-]+)`", paragraph):
            Path(saved[1]).write_text(code, encoding="utf-8")
            return
        blank = "\n" * (block.line - 1)  # so that an error names the line of the page
        exec(compile(blank + code, str(block.page), "exec", dont_inherit=True), self.names)
        for statement in ast.parse(code).body:
            comment = code.splitlines()[statement.end_lineno - 1].rpartition("  # ")[2]
            shape = _SHAPE.match(comment) or _SHAPE.fullmatch(comment.rpartition(": ")[2])
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name) and shape:
                check_shape(self.names[statement.targets[0].id], shape, f"{block.page}: {comment}")

    def _replaced(self, text: str) -> str:
        for word, meant in self.standing_for.items():
            text = re.sub(rf"(?<![\w/]){re.escape(word)}(?!\w)", lambda _, meant=meant: meant, text)
        return text

    # --- commands ----------------------------------------------------------------------------------------------------

    def _bash(self, block: Block) -> None:
        text = self._replaced(block.text)
        text = re.sub(r"\$\(openssl rand -hex (\d+)\)", lambda n: secrets.token_hex(int(n[1])), text)
        for line in re.sub(r"\\\n\s*", " ", text).splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split, lexer.commenters = True, "#"
            command: list[str] = []
            for word in [*lexer, "&&"]:
                if word != "&&":
                    assert not set(word) <= set("();<>|&"), f"{block}: {word} is unknown to the shell of the tests"
                    command.append(word)
                elif command:
                    self._command(command, f"{block}: {shlex.join(command)}")
                    command = []

    def _command(self, words: list[str], what: str) -> None:
        if words[0] == "export":
            os.environ.update(word.split("=", 1) for word in words[1:])
            return
        environment = {}
        while words and re.match(r"[A-Z_]+=", words[0]):
            name, _, environment[name] = words.pop(0).partition("=")
        if not words:
            return self.shell.update(environment)
        for name, value in {**os.environ, **self.shell}.items():
            words = [re.sub(rf"\$(?:{name}\b|{{{name}}})", lambda _, value=value: value, word) for word in words]
        for named, real in self.addresses.items():
            words = [word.replace(named, real) for word in words]
        program = self.PROGRAMS.get(words[0])
        assert program, f"{what}: teach the tests what {words[0]} does, or call the block `text`"
        try:
            with mock.patch.dict(os.environ, environment):
                program(self, words[1:])
        except AssertionError as error:
            raise AssertionError(f"{what}\n{error}") from error

    def _python_program(self, words: list[str]) -> None:
        path, *arguments = words
        if path == "-m":
            raise AssertionError("name a file")
        verb = {"train.py": "train", "evaluate.py": "evaluate", "encode.py": "encode"}.get(path)
        if verb:
            self._before(verb, arguments)
        with contextlib.ExitStack() as around:
            around.enter_context(mock.patch.object(sys, "argv", [path, *arguments]))
            around.enter_context(mock.patch.object(sys, "path", [str(Path(path).parent.resolve()), *sys.path]))
            if "--frontier" in arguments:
                sys.argv += QUICK_FRONTIER
            if "--mteb" in arguments:
                around.enter_context(mock.patch("mteb.abstasks.AbsTaskRetrieval.load_data", few_lines))
            output = said_by(lambda: runpy.run_path(path, run_name="__main__"))
        assert output.strip(), "it said nothing"
        if verb:
            self.AFTER[verb](self, arguments, output)

    def _accelerate(self, words: list[str]) -> None:
        assert words[0] == "launch"
        parsed = launch_command_parser().parse_args(words[1:])
        self._python_program([parsed.training_script, *parsed.training_script_args])

    def _torchrun(self, words: list[str]) -> None:
        parsed = get_args_parser().parse_args(words)
        self._python_program([parsed.training_script, *parsed.training_script_args])

    def _polyrep(self, words: list[str]) -> None:
        verb, *arguments = words
        self._before(verb, arguments)
        if verb == "publish" and "--dry_run" not in arguments:
            output = self._publish_for_real(words)
        else:
            output = said_by(lambda: main(words))
        self.AFTER[verb](self, arguments, output)

    def _publish_for_real(self, words: list[str]) -> str:
        """To a Hub on this machine; that the folder opens elsewhere was seen in the dry run, where there was one."""
        with running_hub() as hub, contextlib.ExitStack() as around:
            for name, value in {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
                around.enter_context(mock.patch.object(constants, name, value))
            around.enter_context(mock.patch.dict(os.environ, HF_TOKEN="hf_test"))
            if self.opened == words[1]:
                around.enter_context(mock.patch("polyrep.publishing.publish.verify"))
            output = said_by(lambda: main(words))
            _, files = hub.repositories[flag(words, "--repo")].commits[-1]
            assert {"README.md", "model.safetensors"} <= set(files)
        return output

    def _make(self, words: list[str]) -> None:
        """Its targets exist, and name files that exist; tests that made would run for hours."""
        ran = subprocess.run(["make", "-n", *words], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        scripts = re.findall(r"python ([\w/]+\.py)", ran.stdout)
        assert ran.stdout.strip() and all(Path(script).is_file() for script in scripts), ran.stdout

    def _pip(self, words: list[str]) -> None:
        """What it names can be installed, or is; of polyrep's extras there is none that is not declared."""
        assert words[0] == "install"
        known = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
        for extras in re.findall(r"(?:polyrep|\.)\[([\w,]+)\]", " ".join(words)):
            assert set(extras.split(",")) <= set(known), f"extras are {', '.join(known)}"
        options = ["--dry-run", "--no-index", "--no-build-isolation", "--no-deps", "--disable-pip-version-check"]
        ran = subprocess.run(
            [sys.executable, "-m", "pip", *words, *options], capture_output=True, text=True, timeout=PATIENCE
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr

    def _curl(self, words: list[str]) -> None:
        assert shutil.which("curl"), "install curl"
        ran = subprocess.run(["curl", "--fail-with-body", *words], capture_output=True, text=True, timeout=PATIENCE)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        asked = json.loads(flag(words, "-d"))
        for hits in json.loads(ran.stdout)["hits"]:
            assert len(hits) == asked["k"] and all(hit["id"] in self._documents() for hit in hits)

    def _uvicorn(self, words: list[str]) -> None:
        """In a thread, at a port that is free; what comes after it finds it under the one on the page."""
        import uvicorn

        given = uvicorn.main.make_context("uvicorn", list(words)).params
        wait = given["timeout_graceful_shutdown"]
        server = uvicorn.Server(
            uvicorn.Config(given["app"], given["host"], 0, timeout_graceful_shutdown=wait, log_level="error")
        )
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while thread.is_alive() and not server.started:
            time.sleep(0.05)
        assert server.started, "the server ended at its start"
        self.addresses[f"localhost:{given['port']}"] = "{}:{}".format(*server.servers[0].sockets[0].getsockname())

        def end() -> None:
            server.should_exit = True
            thread.join(PATIENCE)

        self.left.callback(end)

    def _docker(self, words: list[str]) -> None:
        """There is none for tests: its file is looked at, and a stand-in takes the place of the first node."""
        assert words[0] == "compose" and "up" in words
        file = Path(flag(words, "-f"))
        assert set(words) <= {"compose", "-f", str(file), "up", "-d", "--detach", "--wait"}
        text = file.read_text(encoding="utf-8")
        [port] = yaml.safe_load(text)["services"]["qdrant-1"]["ports"]
        [name] = set(re.findall(r"\$\{(\w+):\?", text))
        stand_in = self.left.enter_context(StandIn(key=os.environ[name]))
        self.addresses[port.rpartition(":")[0].replace("127.0.0.1", "localhost")] = stand_in.address

    PROGRAMS: Mapping[str, Callable[[Reader, list[str]], None]] = {
        "python": _python_program,
        "accelerate": _accelerate,
        "torchrun": _torchrun,
        "polyrep": _polyrep,
        "make": _make,
        "pip": _pip,
        "curl": _curl,
        "uvicorn": _uvicorn,
        "docker": _docker,
    }

    # --- what a command must leave -----------------------------------------------------------------------------------

    def _before(self, verb: str, arguments: list[str]) -> None:
        """A run that the page has not made before is one that its readers have not."""
        if verb == "train":
            output = self._output_of(arguments)
            self.before = set(output.rglob("*"))
            if output not in self.trained and "--dry_run" not in arguments:
                shutil.rmtree(output, ignore_errors=True)
                self.trained.add(output)

    def _output_of(self, arguments: list[str]) -> Path:
        recipe = yaml.safe_load((self.world.folder / arguments[0] / "recipe.yaml").read_text())
        return Path(flag(arguments, "--output_dir") or recipe["output_dir"])

    def _documents(self) -> set[str]:
        """Ids of all documents in the small world's data."""
        return self.world.document_ids

    def _trained(self, arguments: list[str], output: str) -> None:
        folder = self._output_of(arguments)
        if "--dry_run" in arguments:
            assert re.search(r"^objective ", output, re.M) and set(folder.rglob("*")) == self.before, output
            return
        record = read_json(folder / "training.json")
        assert record["steps"] == 2 and record["fingerprints"]
        for name, digest in record["fingerprints"].items():
            assert fingerprint(folder / name) == digest

    def _evaluated(self, arguments: list[str], output: str) -> None:
        assert "nDCG@10" in output, output
        if not (place := flag(arguments, "--output")):
            return
        files = list(Path(place).glob("*.json"))
        assert files
        for file in files:
            results = read_json(file)
            check_results(results)
            assert results["rows"] and file.with_suffix(".md").is_file()
            assert all(0 <= row["value"] <= 1 for row in results["rows"] if row["metric"] == "nDCG@10")

    def _calibrated(self, arguments: list[str], output: str) -> None:
        found = read_json(Path(arguments[0]) / "calibration.json")
        assert (
            found["fingerprint"] == fingerprint(arguments[0]) and f"{found['counts']['queries']:,} queries" in output
        )
        assert (Path(arguments[0]) / "calibration.png").is_file()

    def _encoded(self, arguments: list[str], output: str) -> None:
        views = flag(arguments, "--views").split(",")  # "" without
        for corpus in [EncodedCorpus(Path(flag(arguments, "--output"), view)) for view in views]:
            assert len(corpus) > 0 and f"{len(corpus):,} documents" in output, output
        assert "could not be used" not in output, output

    def _indexed(self, arguments: list[str], output: str) -> None:
        corpora = [word for word in arguments[: arguments.index("--uri")] if not word.startswith("-")]
        assert f"now it has {len(EncodedCorpus(corpora[0])):,} documents" in output, output

    def _searched(self, arguments: list[str], output: str) -> None:
        query, *hits = output.splitlines()
        assert query == arguments[0] and len(hits) == int(flag(arguments, "--k") or 10), output
        scores = [float(hit.split()[0]) for hit in hits]
        assert scores == sorted(scores, reverse=True) and {hit.split()[1] for hit in hits} <= self._documents()

    def _known(self, arguments: list[str], output: str) -> None:
        verb, *names = arguments
        assert verb != "get" or list(Path(flag(arguments, "--output") or output.strip()).glob("corpus.jsonl*"))
        assert (names[0] if names else "python_docs") in output or verb == "get", output

    def _exported(self, arguments: list[str], output: str) -> None:
        folder = Path(arguments[0]) / "onnx"
        assert read_json(next(Path(arguments[0]).rglob("export.json"))) and list(folder.glob("*.onnx")), output

    def _published(self, arguments: list[str], output: str) -> None:
        repo = flag(arguments, "--repo")
        if "--dry_run" in arguments:
            self.opened = arguments[0]
            assert "Nothing was uploaded" in output, output
            card = (Path(flag(arguments, "--output")) / "README.md").read_text(encoding="utf-8")
            assert f'"{repo}", revision="<commit>"' in card and "## Results of this model" in card
        else:
            assert re.search(rf"{repo}: .* at commit [0-9a-f]{{40}}", output), output

    AFTER: Mapping[str, Callable[[Reader, list[str], str], None]] = {
        "data": _known,
        "train": _trained,
        "evaluate": _evaluated,
        "calibrate": _calibrated,
        "encode": _encoded,
        "index": _indexed,
        "search": _searched,
        "export-onnx": _exported,
        "publish": _published,
    }

    def _forget(self, modules: set[str]) -> None:
        """Unload what was imported from the small world, whose names mean something else elsewhere."""
        for name in set(sys.modules) - modules:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(self.world.folder)):
                del sys.modules[name]
        importlib.invalidate_caches()


def few_lines(task: Any, *_: Any, **options: Any) -> None:
    """In place of the method by which a task of MTEB fetches its data."""
    parts = {
        "corpus": Dataset.from_list([{"id": key, "title": "", "text": text} for key, text in DOCUMENTS.items()]),
        "queries": Dataset.from_list([{"id": key, "text": text} for key, text in QUERIES.items()]),
        "relevant_docs": QRELS,
        "top_ranked": None,
    }
    task.dataset = {subset: dict.fromkeys(task.metadata.eval_splits, parts) for subset in task.hf_subsets}
    task.data_loaded = True


def said_by(function: Callable[[], Any]) -> str:
    """What a command prints; it has to end well."""
    said, wrong = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(wrong):
        try:
            status = function()
        except SystemExit as end:
            status = end.code
    assert not isinstance(status, int) or status == 0, f"exit status {status}: {wrong.getvalue()[-3000:]}"
    return said.getvalue()


def flag(arguments: list[str], name: str) -> str:
    """Value of a flag of a command, or nothing."""
    for number, word in enumerate(arguments):
        if word == name:
            return arguments[number + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return ""


def check_shape(value: Any, said: re.Match[str], where: str) -> None:
    """A value has the shape that a comment says: of numbers the same, of words any."""
    for part in value if said[1] else [value]:
        sizes = said[2].split(", ")
        assert len(np.shape(part)) == len(sizes), where
        for size, text in zip(np.shape(part), sizes, strict=True):
            most = text.removeprefix("at most ")
            assert not most.isdecimal() or size == int(most) or text != most and size < int(most), (where, size)


def to_run(blocks: list[Block]) -> list[Block]:
    return [block for block in blocks if block.language in ("python", "bash")]


def check_languages(blocks: list[Block]) -> None:
    for block in blocks:
        assert block.language in {"python", "bash"} | NOT_RUN, f"{block}: language {block.language!r}"
        if block.language == "json":
            json.loads(block.text)
        elif block.language == "yaml":
            yaml.safe_load(block.text)
        elif block.language == "bibtex":
            check_bibtex(block)


def check_bibtex(block: Block) -> None:
    """Entries with a key, and ``name = {value}`` with whole braces for each of the fields that a citation needs."""
    for entry in re.split(r"\n(?=@)", block.text.strip()):
        head, *fields, end = entry.splitlines()
        found = {}
        for line in fields:
            field = re.fullmatch(r"\s+(\w+)\s*= \{(.*)\},?", line)
            assert field and field[2].count("{") == field[2].count("}"), f"{block}: {line}"
            found[field[1]] = field[2]
        assert re.fullmatch(r"@\w+\{[\w-]+,", head) and end == "}", f"{block}: {head} ... {end}"
        assert {"title", "author", "year"} <= set(found) and re.fullmatch(r"\d{4}", found["year"]), f"{block}: {found}"


def read_card(world: SmallWorld, card: Path, standing_for: dict[str, str]) -> None:
    blocks = blocks_of(card)
    check_languages(blocks)
    assert to_run(blocks) and any(block.language == "bibtex" for block in blocks)
    with Reader(world, standing_for) as reader:
        ran = [block for block in blocks if reader.read(block)]
    assert ran == to_run(blocks)
