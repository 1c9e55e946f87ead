"""Pages say what was measured."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def script(name: str):
    """A file of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_docs_scale_follows_from_the_measurements():
    scale = script("scale")
    page = (ROOT / "docs" / "scale.md").read_text()
    results = json.loads((ROOT / "results" / "search.json").read_text())
    assert scale.inserted(page, scale.table(results)) == page, "run python benchmarks/scale.py"
    assert all(f"| {name} |" in page for name in scale.SYSTEMS)


def test_the_arithmetic_of_scale_is_that_of_a_hand():
    scale = script("scale")
    assert scale.milliseconds(5.0, 100_000, 10**7, "graph") == pytest.approx(7)  # seven decades instead of five
    assert scale.milliseconds(5.0, 100_000, 10**7, "scan") == 5 * 100
    rows = [
        {"system": f"{name}, Qdrant", "documents": size, "bytes": 480 * size, "ms_p50": 5.0}
        for name in scale.SYSTEMS
        for size in (10_000, 100_000)
    ]
    first, *_ = [line for line in scale.table({"rows": rows}).splitlines() if line.startswith("| dense")]
    assert first.startswith("| dense | 480 | 1,000,000 | 480 MB | 1 |")
    assert "| 1,000,000,000 | 480.0 GB | 10 | 27 |" in scale.table({"rows": rows})  # 3.9 GFLOP a document


def test_links_between_pages_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *(page for name in ("docs", "demo", "data") for page in (ROOT / name).rglob("*.md"))]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_files_of_the_package_that_a_text_names_are_there():
    folders = ("docs", "demo", "data", "model_cards", "results")
    texts = [
        ROOT / "Makefile",
        *ROOT.glob("*.md"),
        *(text for name in folders for text in (ROOT / name).rglob("*.md")),
    ]
    for text in texts:
        for path in re.findall(r"\bmodeling/[\w/.*]*[\w*]", text.read_text()):
            assert [*ROOT.glob(path)] or "/attentive" in path, f"{text.name}: {path}"  # which add-a-method.md makes


def test_equations_have_no_command_that_github_refuses():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        assert "\\operatorname" not in page.read_text(), f"{page.name}: write \\mathrm"
