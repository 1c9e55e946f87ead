"""The tables of docs/choose.md, from the frontiers and the search engines that were measured.

python benchmarks/choose.py

A row is the best within a limit by its nDCG@10 alone; the page says how little some of the differences mean.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scale import SYSTEMS, inserted

from polyrep.evaluation.frontier.command import learned_titles
from polyrep.evaluation.frontier.rows import FULL

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "choose.md"

SETS = ("tldr_pages", "scifact")
BYTES = (16, 72, 128, 264, 520, 2056, 4104, None)
MILLISECONDS = (0.5, 3, 12)
ENGINES = ("FAISS flat", "FAISS HNSW", "Seismic", "Qdrant")
FITTED = (*learned_titles(), "CSR")
"""Methods that a corpus is needed for before the first document can be encoded."""

NAMED = (
    FULL,
    "ReinPool, 32, int8",
    "hierarchical, 32, int8",
    "ReinPool, 16, one-bit",
    "hierarchical, 16, one-bit",
    "ReinPool, 1",
    "LEMUR, 512",
    "mean",
    "LEMUR, 512, rerank 50",
    "Dense2Sparse, 48/128 words, rerank 50",
    "mean, rerank 50",
    "BM25, rerank 50",
    "Dense2Sparse, 48/128 words",
    "BM25",
    "CSR, 128",
    "MUVERA, 10240",
    "mean, one-bit",
    "LEMUR, 512, one-bit",
)
"""Rows that the page speaks of."""

UNITS = {"bytes_per_document": "bytes", "search_ms_p50": "ms"}

Row = dict[str, Any]


def frontier(name: str) -> list[Row]:
    """Rows of a data set's frontier, with nDCG@10 as value."""
    results = json.loads((ROOT / "results" / f"frontier-{name}.json").read_text(encoding="utf-8"))
    return [row for row in results["rows"] if row["metric"] == "nDCG@10"]


def within(cost: str, limits: Sequence[float | None], sets: Sequence[Sequence[Row]]) -> str:
    """The best row of each set within each limit of a cost, and the best of those that nothing was fitted for."""
    heads = [head for name in SETS for head in (name, "nothing fitted")]
    lines = [f"| at most, {UNITS[cost]} | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for limit in limits:
        cells = ["any" if limit is None else f"{limit:,}"]
        for rows in sets:
            fitting = [row for row in rows if limit is None or row[cost] <= limit]
            plain = [row for row in fitting if row["system"].partition(", ")[0] not in FITTED]
            # Of rows that read the same, the cheapest.
            best = [max(part, key=lambda row: (round(row["value"], 3), -row[cost])) for part in (fitting, plain)]
            cells += [f"{row['system']}: {row['value']:.3f}" for row in best]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def named(sets: Sequence[Sequence[Row]]) -> str:
    """The rows that the page speaks of, on both sets; a star where the difference to the full model is significant."""
    lines = [f"| row | {' | '.join(SETS)} | bytes per document | ms per query |", "|---|---|---|---|---|"]
    for name in NAMED:
        both = [next(row for row in rows if row["system"] == name) for rows in sets]
        values = [f"{row['value']:.3f}{'*' if row.get('p_value', 1) < 0.05 else ''}" for row in both]
        sizes, times = ([_number(row[cost]) for row in both] for cost in ("bytes_per_document", "search_ms_p50"))
        costs = [" and ".join(dict.fromkeys(pair)) for pair in (sizes, times)]
        lines.append(f"| {' | '.join([name, *values, *costs])} |")
    return "\n".join(lines) + "\n"


def engines(rows: Sequence[Row]) -> str:
    """Each representation in each engine, at the largest size that was measured."""
    most = max(row["documents"] for row in rows)
    large = {row["system"]: row for row in rows if row["documents"] == most}
    lines = ["| representation | engine | recall@10 | ms per query | MB on disk |", "|---|---|---|---|---|"]
    for name in SYSTEMS:
        for engine in ENGINES:
            if row := large.get(f"{name}, {engine}"):
                figures = [f"{row['recall']:.3f}", _number(row["ms_p50"]), f"{row['bytes'] / 1e6:,.0f}"]
                lines.append(f"| {' | '.join([name, engine, *figures])} |")
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def made() -> dict[str, str]:
    """Name of each table -> the table as Markdown."""
    sets = [frontier(name) for name in SETS]
    search = json.loads((ROOT / "results" / "search.json").read_text(encoding="utf-8"))
    makers: dict[str, Callable[[], str]] = {
        "bytes": lambda: within("bytes_per_document", BYTES, sets),
        "ms": lambda: within("search_ms_p50", MILLISECONDS, sets),
        "rows": lambda: named(sets),
        "engines": lambda: engines(search["rows"]),
    }
    return {name: make() for name, make in makers.items()}


def begin(name: str) -> str:
    """The mark before a table."""
    return f"<!-- python benchmarks/choose.py: {name} -->\n"


def filled(page: str) -> str:
    """The page with all tables between their marks."""
    for name, table in made().items():
        page = inserted(page, table, begin(name))
    return page


def main() -> None:
    """Bring the page up to date."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(*made().values(), sep="\n")


if __name__ == "__main__":
    main()
