"""docs/add-a-method.md, followed to the letter in a copy of the repository: what it builds obeys the rooms' rules."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest
import warm
from conftest import PATIENCE, ROOT
from setuptools import find_packages
from world import write_world

from polyrep.hub.cards import VARIABLES

PAGE = (ROOT / "docs" / "add-a-method.md").read_text(encoding="utf-8")

INSTALLED = """
import importlib.util, sys

class Copy:  # as an editable install of the copy would have it: its modeling/ is the package polyrep
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "polyrep":
            folder = {root!r} + "/modeling"
            return importlib.util.spec_from_file_location(
                name, folder + "/__init__.py", submodule_search_locations=[folder]
            )

sys.meta_path.insert(0, Copy)
"""

ONLY = """
def pytest_configure():  # the other rooms are tested where this test is
    import polyrep, room_examples
    for rooms in (polyrep.ROOMS, room_examples.EXAMPLES):
        for other in set(rooms) - {{{model_type!r}}}:
            del rooms[other]
    for run in [run for run in room_examples.RUNS if run[0] != {model_type!r}]:
        del room_examples.RUNS[run]

def pytest_collection_modifyitems():
    import test_publish
    test_publish.TEMPLATES[:] = ["late_interaction", {room!r}]  # the first is of stock modules
"""

RUN = """
import json, runpy, sys
from polyrep.cli import main

for program, *arguments in json.loads(sys.argv[1]):
    sys.argv = [program, *arguments]
    try:
        code = main(arguments) if program == "polyrep" else runpy.run_path(program, run_name="__main__")
    except SystemExit as exit:
        code = exit.code
    if code and isinstance(code, int | str):
        sys.exit(f"{program} {' '.join(arguments)}: {code}")
"""

SHORT = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--save_steps", "2"]
"""Flags that make a training of the page one of seconds."""

PYTEST = ["python", "-m", "pytest"]


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the path that stands in bold over it."""

    language: str
    text: str
    path: str | None = None

    @property
    def is_change(self) -> bool:
        return self.language == "diff"


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page in order; a fence of more ticks holds those of fewer."""
    found, lines, over = [], iter(page.splitlines()), ""
    for line in lines:
        if fence := re.fullmatch(r"(`{3,})(\w*)", line):
            text = []
            for inner in lines:
                if inner == fence[1]:
                    break
                text.append(inner)
            else:
                raise AssertionError(f"{line}: is never closed")
            bold = re.fullmatch(r"\*\*`([^`]+)`\*\*", over)
            found.append(Block(fence[2], "\n".join(text) + "\n", bold[1] if bold else None))
        over = line or over
    return found


def changed(text: str, diff: str) -> str:
    """A file's text after a change whose parts are divided by ``@@``; each must fit at exactly one place."""
    lines = text.splitlines(keepends=True)
    for part in re.split(r"^@@.*\n", diff, flags=re.M):
        marked = part.splitlines(keepends=True)
        assert {line[0] for line in marked} <= set(" +-"), f"no diff:\n{part}"
        before, after = ([line[1:] for line in marked if line[0] in signs] for signs in (" -", " +"))
        places = [start for start in range(len(lines)) if lines[start : start + len(before)] == before]
        assert len(places) == 1, f"fits at {len(places)} places:\n{part}"
        lines[places[0] : places[0] + len(before)] = after
    return "".join(lines)


def follow(page: list[Block], root: Path) -> None:
    """Write the page's files, make its changes and copy what it copies below ``root``."""
    for block in page:
        if block.path and block.is_change:
            file = root / block.path
            file.write_text(changed(file.read_text(encoding="utf-8"), block.text), encoding="utf-8")
        elif block.path:
            file = root / block.path
            assert not file.exists(), f"{block.path}: is there already"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
    for *sources, target in (words[1:] for words in commands(page) if words[0] == "cp"):
        for source in sources:
            shutil.copy(root / source, root / target)


def commands(page: list[Block]) -> list[list[str]]:
    """The commands of the page, one list of words each."""
    lines = [
        line
        for block in page
        if block.language == "bash"
        for line in block.text.replace("\\\n", " ").splitlines()
        if line.strip()
    ]
    return [shlex.split(line, comments=True) for line in lines]


def small_copy(root: Path) -> Path:
    """What the page needs of the repository, and a few documents under the name of its data set."""
    for name in ("modeling", "hub_configs", "model_cards", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "train.py", "evaluate.py"):
        shutil.copy(ROOT / name, root)
    write_world(root / ".sets" / "python_docs", sizes={"train": 8, "test": 6})
    return root


@pytest.fixture(scope="module")
def page() -> list[Block]:
    return blocks(PAGE)


@pytest.fixture(scope="module")
def room(page: list[Block]) -> str:
    """The name of the room that the page builds."""
    return next(
        found[1] for b in page if (found := re.fullmatch(r"modeling/methods/(\w+)/modeling_\1\.py", b.path or ""))
    )


@pytest.fixture(scope="module")
def copy(page: list[Block], room: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The copy after all that the page asks for, with what makes Python see it in ``.site``."""
    root = small_copy(tmp_path_factory.mktemp("copy"))
    follow(page, root)
    (root / ".site").mkdir()
    (root / ".site" / "sitecustomize.py").write_text(INSTALLED.format(root=str(root)))
    (root / ".site" / "only_this_room.py").write_text(ONLY.format(model_type=f"polyrep_{room}", room=room))
    return root


def run(copy: Path, *arguments: str, installed: bool = True) -> str:
    """What Python says that runs in the copy, with the copy's polyrep; fails if it fails."""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "POLYREP_DATA": str(copy / ".sets")}
    environment["PYTHONPATH"] = str(copy / ".site") if installed else ""
    command, nothing = [warm.python(), *arguments], subprocess.DEVNULL
    ran = subprocess.run(
        command, cwd=copy, env=environment, stdin=nothing, capture_output=True, text=True, timeout=PATIENCE
    )
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-5000:]
    return ran.stdout


def test_every_block_is_a_file_a_change_or_something_to_run(page):
    assert {b.language for b in page if b.path} == {"python", "json", "yaml", "markdown", "diff"}
    assert {b.language for b in page if not b.path} == {"bash", "python", "text"}


def test_a_method_is_one_folder_and_one_line_beside_its_run_its_card_and_its_test(copy, room):
    made, changed = set(), set()
    for top in ("modeling", "hub_configs", "model_cards", "tests", "pyproject.toml", "setup.py"):
        for file in [copy / top, *(copy / top).rglob("*.*")]:
            path = file.relative_to(copy).as_posix()
            if file.is_dir() or "__pycache__" in path:
                continue
            if not (ROOT / path).exists():
                made.add(path)
            elif file.read_bytes() != (ROOT / path).read_bytes():
                changed.add(path)
    folder = f"modeling/methods/{room}/"
    own = (folder, f"hub_configs/{room}-minilm/", f"model_cards/{room}.md", f"tests/test_{room}.py")
    assert all(path.startswith(own) for path in made) and all(any(p.startswith(o) for p in made) for o in own)
    assert changed == {"modeling/methods/__init__.py"}
    before, after = ((root / "modeling/methods/__init__.py").read_text().splitlines() for root in (ROOT, copy))
    assert [line for line in after if line not in before] == [f"from .{room} import *"] and len(after) == len(
        before
    ) + 1
    assert f"methods.{room}" in find_packages(str(copy / "modeling")), "the wheel takes it"


def test_the_new_room_passes_the_checks_of_the_page(copy, page, room, tmp_path):
    checks = [words for words in commands(page) if words[0] == "ruff" or words[:3] == PYTEST]
    assert [words[:2] for words in checks] == [["ruff", "check"], ["ruff", "format"], PYTEST[:2]]
    for words in checks[:2]:
        run(copy, "-m", *words)
    report = tmp_path / "report.xml"
    run(copy, *checks[2][1:], "-p", "only_this_room", f"--junitxml={report}")
    cases = ElementTree.parse(report).findall(".//testcase")
    assert cases and not [case.get("name") for case in cases if len(case)], "each passed: none failed or was skipped"
    of_file = [case.get("classname").rpartition(".")[2] for case in cases]
    assert of_file.count("test_rooms") >= 15 and of_file.count("test_publish") == 4 and f"test_{room}" in of_file
    assert of_file.count("test_room_training") == 7
    named = [case.get("name") for case in cases if room in case.get("name")]
    assert f"test_shipped_files_import_only_what_every_machine_has[modeling_{room}.py]" in named
    assert sum(f"[polyrep_{room}]" in name for name in named) == 4, "compiled, in bfloat16, twice in stock trainers"


def test_the_new_room_trains_is_measured_and_published_as_on_the_page(copy, page, room):
    steps = [words for words in commands(page) if words[0] not in ("ruff", "cp") and words[:3] != PYTEST]
    steps = [words[2:] if words[:2] == ["accelerate", "launch"] else words for words in steps]
    steps = [words[1:] if words[0] == "python" else words for words in steps]
    assert [words[0] for words in steps] == ["train.py", "evaluate.py", "polyrep"]
    said = run(copy, "-c", RUN, json.dumps([words + SHORT if words[0] == "train.py" else words for words in steps]))
    (final,) = (copy / "models").glob("*/final")
    assert all(f"\n| {system} |" in said for system in (final.parent.name, "all-MiniLM-L6-v2", "BM25")), said
    assert "open without polyrep" in said
    assert f"`accelerate launch train.py hub_configs/{final.parent.name}" in (final / "README.md").read_text()
    code = "\n".join(b.text for b in page if b.language == "python" and not b.path)
    printed = run(copy, "-c", f"import sys; sys.modules['polyrep'] = None  # not installed\n{code}", installed=False)
    tokens = re.findall(r"^(\d\.\d\d) (\S+)$", printed, re.M)
    assert " ".join(token for _, token in tokens) == "[CLS] group rows by the values of a column [SEP]", printed
    assert sum(float(weight) for weight, _ in tokens) == pytest.approx(1, abs=0.05)


def test_the_page_lists_every_variable_of_a_card():
    table = PAGE.partition("## What a card may say")[2]
    assert dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.M)) == VARIABLES


def test_a_change_that_does_not_fit_is_noticed():
    assert changed("a\nb\nc\n", " a\n-b\n+B\n@@\n c\n+d\n") == "a\nB\nc\nd\n"
    for text, diff in (("a\n", "-b\n+c\n"), ("a\na\n", "-a\n+b\n"), ("aa\n", "-a\n+b\n"), ("a\n", "a\n")):
        with pytest.raises(AssertionError, match="fits at [02] places|no diff"):
            changed(text, diff)
    with pytest.raises(AssertionError, match="never closed"):
        blocks("```python\n1\n")
    outer = "**`card.md`**\n\n````markdown\n```python\n1\n```\n````\n\nLater:\n\n```bash\nls\n```\n"
    assert blocks(outer) == [Block("markdown", "```python\n1\n```\n", "card.md"), Block("bash", "ls\n")]
