"""The package as a whole: how it is imported, what it contains, and what its texts may say."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

import polyrep


def tracked(*suffixes: str) -> list[Path]:
    """Files of the clone with one of the suffixes (all tracked and new ones that are not ignored)."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return [ROOT / name for name in listed if name.endswith(suffixes) and (ROOT / name).is_file()]


def imports_of(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) if not node.level}


LAYERS = ["errors", "console", "files", "flags", "report", "registry"]  # the ground, then the wings as data travels
LAYERS += ["data", "hub", "encoding", "search", "training", "evaluation", "methods", "cli", "__init__"]
MODULES = sorted(file.relative_to(ROOT / "modeling") for file in (ROOT / "modeling").rglob("*.py"))


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_imports_its_own_wing_and_what_lies_below(module):
    own, imported = module.parts[0].removesuffix(".py"), set()
    for node in ast.walk(ast.parse((ROOT / "modeling" / module).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            imported.add([*module.parts[: -node.level], *(node.module or "__init__").split(".")][0])
    below = {own, *LAYERS[: LAYERS.index("methods" if own == "publishing" else own)]}  # these two stand side by side
    assert imported <= below | ({"publishing"} if "methods" in below - {own} else set())
    assert not [name for name in imports_of(ROOT / "modeling" / module) if name.split(".")[0] == "polyrep"]


@pytest.mark.parametrize("module", [m for m in MODULES if m.parts[0] not in ("methods", "__init__.py")], ids=str)
def test_no_code_outside_methods_names_a_method(module):
    methods = {m.parts[1] for m in MODULES if m.parts[0] == "methods" and len(m.parts) > 2}
    named = re.compile("|".join(method.replace("_", "_?") for method in methods), re.I)
    nodes = list(ast.walk(ast.parse((ROOT / "modeling" / module).read_text())))
    values = [value for node in nodes for value in vars(node).values()]
    words = [w for value in values for w in (value if isinstance(value, list) else [value]) if isinstance(w, str)]
    prose = [n.value.value for n in nodes if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    assert methods and not [word for word in words if named.search(word) and word not in prose]


ELSEWHERE = {
    "fcntl",
    "grp",
    "pwd",
    "resource",
    "termios",
    "os.fork",
    "os.getuid",
    "os.geteuid",
    "os.killpg",
    "os.mkfifo",
}
ELSEWHERE |= {"os.kill", "os.statvfs", "signal.SIGALRM", "signal.SIGKILL"}
"""What Windows lacks; and ``os.kill``, which ends a process there that it should only ask about."""

ON_LINUX_ALONE = {"say_below_launcher"}
"""Functions that return at once where the machine lacks what they need."""


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_works_on_windows_too(module):
    tree = ast.parse((ROOT / "modeling" / module).read_text(encoding="utf-8"))
    here = [node for node in ast.walk(tree) if not (isinstance(node, ast.FunctionDef) and node.name in ON_LINUX_ALONE)]
    inside = {id(part) for node in ast.walk(tree) if node not in here for part in ast.walk(node)}
    used = {ast.unparse(node) for node in here if isinstance(node, ast.Attribute) and id(node) not in inside}
    assert not ELSEWHERE & (used | imports_of(ROOT / "modeling" / module))


def test_nothing_imports_the_source_folder_by_its_own_name():
    offenders = [f for f in tracked(".py") if any(name.split(".")[0] == "modeling" for name in imports_of(f))]
    assert not offenders and tracked(".py")


def test_the_wheel_holds_the_package_and_its_data_and_nothing_at_the_top_level(tmp_path):
    """Built from a copy of the files in git, so that nothing of this machine can slip in."""
    source = tmp_path / "source"
    for file in tracked(""):
        if "data" not in file.relative_to(ROOT).parts[:1]:
            target = source / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(source),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {name.split("/")[0] for name in names} == {"polyrep", f"polyrep-{polyrep.__version__}.dist-info"}
    modules = {
        f"polyrep/{file.relative_to(ROOT / 'modeling')}"
        for file in tracked(".py")
        if (ROOT / "modeling") in file.parents
    }
    assert modules <= set(names)
    assert "polyrep/model_cards/late_interaction.md" in names
    assert "polyrep/hub_configs/late-interaction-minilm/sentence_bert_config.json" in names
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert "polyrep = polyrep.cli:main" in zipfile.ZipFile(next(tmp_path.glob("*.whl"))).read(entry_points).decode()


def test_constraints_name_exact_versions_of_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == polyrep.__version__
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pinned = dict(line.partition(";")[0].split("==") for line in lines)  # without the machines that it is for
    everything = project["dependencies"] + [d for extra in project["optional-dependencies"].values() for d in extra]
    named = {re.split(r"[<>=\[ ]", d)[0] for d in everything} - {"polyrep"}
    assert named <= set(pinned) and pinned["torch"] == "2.13.0"
    bounds = dict(d.split(">=") for d in project["dependencies"])
    assert {k: f">={bounds[k]}" for k in ("transformers", "sentence-transformers")} == polyrep.hub.code.REQUIREMENTS


def test_the_table_in_readme_is_that_of_results():
    rows = json.loads((ROOT / "results" / "baselines.json").read_text())["rows"]
    measured = {(r["system"], r["dataset"]): f"{r['value']:.3f}" for r in rows if r["metric"] == "nDCG@10"}
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    start = next(i for i, row in enumerate(cells) if row[0] == "system")
    systems = 0
    for row in cells[start + 2 :]:
        if len(row) != len(cells[start]):
            break
        quoted = dict(zip(cells[start][1:5], row[1:5], strict=True))
        assert quoted == {dataset: measured[row[0], dataset] for dataset in quoted}
        systems += 1
    assert systems >= 4


def test_figures_in_readme_docs_and_cards_stand_in_results():
    """Every number with three decimals that a text quotes is one of results/, rounded."""
    values: set[str] = set()

    def collect(node: object) -> None:
        if isinstance(node, dict | list):
            for child in node.values() if isinstance(node, dict) else node:
                collect(child)
        elif isinstance(node, int | float):
            values.add(f"{abs(node):.3f}".removeprefix("0"))

    for file in (ROOT / "results").glob("*.json"):
        collect(json.loads(file.read_text()))
    texts = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "model_cards").glob("*.md")]
    quoted = {
        (text.name, figure)
        for text in texts
        for figure in re.findall(r"(?<![\d.])0?(\.\d{3})(?!\d)", text.read_text())
    }
    assert quoted and not {q for q in quoted if q[1] not in values}


@pytest.mark.parametrize("word", ["/" + "work/", "/" + "root/", "pypi" + ".org/simple"])
def test_no_file_knows_the_machine_it_was_made_on(word):
    texts = tracked(".py", ".md", ".yaml", ".yml", ".toml", ".json", ".txt", "Makefile", "run")
    assert not [f for f in texts if word in f.read_text(encoding="utf-8", errors="ignore")]


WRITTEN = {".py", ".md", ".yaml", ".yml", ".toml", ".json", ".txt", ".css", ".html", ".rst", ".gitignore", ""}


def test_the_repository_carries_what_we_wrote_and_made_alone():
    """Text and code, pictures of results, and weights of the demo's heads: no data of others, no archives."""
    files = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    made = {".png": "results/", ".safetensors": "demo/models/"}
    strangers = [f for f in files if (kind := Path(f).suffix) not in WRITTEN and not f.startswith(made.get(kind, "?"))]
    assert not strangers
    assert not [f for f in files if f.startswith("data/") or f.endswith((".jsonl", ".tsv"))]
