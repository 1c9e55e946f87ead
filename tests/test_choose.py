"""docs/choose.md says what was measured."""

from __future__ import annotations

import json
import re
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import choose

PAGE = ROOT / "docs" / "choose.md"


def test_the_tables_of_docs_choose_follow_from_the_measurements():
    page = PAGE.read_text()
    assert all(page.count(choose.begin(name)) == 1 for name in choose.made())
    assert page.count("<!-- end -->") == len(choose.made())
    assert choose.filled(page) == page, "run python benchmarks/choose.py"


def test_a_changed_figure_is_put_right():
    page = PAGE.read_text()
    first = choose.made()["bytes"].splitlines()[2]
    assert page.count(first) == 1 and choose.filled(page.replace(first, "| 16 | nothing |")) == page


def row(system, value, size, ms=1.0, **more):
    return {"system": system, "value": value, "bytes_per_document": size, "search_ms_p50": ms} | more


def test_the_best_row_within_a_limit_is_named_beside_the_best_that_needs_no_fitting():
    rows = [
        row("ReinPool, 4", 0.6, 100),
        row("mean", 0.5, 100),
        row("CSR, 32", 0.55, 100),
        row("full model", 0.7, 101),
    ]
    *_, small, large = choose.within("bytes_per_document", (100, None), [rows, rows]).splitlines()
    assert small == "| 100 | " + " | ".join(["ReinPool, 4: 0.600", "mean: 0.500"] * 2) + " |"
    assert large == "| any | " + " | ".join(["full model: 0.700"] * 4) + " |"


def test_of_rows_that_read_the_same_the_cheapest_is_named():
    rows = [row("mean", 0.70004, 200), row("hierarchical, 4", 0.69996, 100)]
    assert "| hierarchical, 4: 0.700 |" in choose.within("bytes_per_document", (None,), [rows, rows])


def test_stars_and_costs_of_the_named_rows(monkeypatch):
    monkeypatch.setattr(choose, "NAMED", ("mean",))
    sets = [[row("mean", 0.5, 1256.4, ms, p_value=p)] for ms, p in ((0.24, 0.049), (12.6, 0.05))]
    assert choose.named(sets).splitlines()[-1] == "| mean | 0.500* | 0.500 | 1,256 | 0.2 and 13 |"


def test_engines_are_those_at_the_largest_size():
    base = {"ms_p50": 2.04, "recall": 0.5, "bytes": 3e6}
    rows = [base | {"system": f"dense, {engine}", "documents": n} for engine in ("Qdrant", "exact") for n in (10, 20)]
    rows[1]["recall"] = 0.75  # Qdrant, 20 documents
    assert choose.engines(rows).splitlines()[2:] == ["| dense | Qdrant | 0.750 | 2.0 | 3 |"]


@pytest.mark.parametrize("name", choose.SETS)
def test_every_row_within_bytes_is_one_of_the_frontier(name):
    """The page names rows of the tables behind it, as these write them."""
    values = {r["system"]: f"{r['value']:.3f}" for r in choose.frontier(name)}
    table = choose.made()["bytes"].splitlines()[2:]
    column = 2 + 2 * choose.SETS.index(name)
    cells = [re.split(r"\s*\|\s*", line)[column : column + 2] for line in table]
    quoted = [cell.rpartition(": ")[::2] for pair in cells for cell in pair]
    assert len(quoted) == 2 * len(choose.BYTES) and all(values[system] == figure for system, figure in quoted)


def test_the_page_says_what_the_frontiers_are_of():
    page = PAGE.read_text()
    for name in choose.SETS:
        results = json.loads((ROOT / "results" / f"frontier-{name}.json").read_text())
        (queries,) = {r["queries"] for r in results["rows"]}
        assert f"{queries} test queries" in page and f"frontier-{name}.png" in page
