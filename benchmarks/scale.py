"""What a million, a hundred million and a billion documents take, from what was measured: the table of docs/scale.md.

python benchmarks/scale.py

Bytes per document are those on disk in Qdrant at the largest size that was measured. A search by graph grows with the
logarithm of the documents on a node; one that looks at every vector, or at all postings of a word, with their number.
Both are extrapolations from that size, and the page says so.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- python benchmarks/scale.py -->\n", "<!-- end -->"

SIZES = (10**6, 10**8, 10**9)
NODE_BYTES = 48e9
"""Of a node with 64 GB, what vectors may take."""

WEIGHTS, TOKENS, FLOPS = 10.6e6, 184, 40e12
"""Of all-MiniLM-L6-v2 in its layers; of a mean document of the three sets; a GPU's that are reached, an assumption."""

SYSTEMS = {
    "dense": "graph",
    "Gaussian": "graph",
    "sparse": "scan",
    "ReinPool, 1": "graph",
    "LEMUR": "graph",
    "ReinPool, 8": "scan",
    "full multi-vector": "scan",
    "two stages": "graph",
}


def table(results: dict[str, Any]) -> str:
    """The table as Markdown."""
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for row in results["rows"]:
        if row["system"].endswith(", Qdrant"):
            rows.setdefault(row["system"].removesuffix(", Qdrant"), {})[row["documents"]] = row
    lines = [
        "| representation | bytes per document | documents | on disk | nodes | GPU hours | ms per query |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, way in SYSTEMS.items():
        measured = rows[name]
        large = max(measured)
        each = measured[large]["bytes"] / large
        for size in SIZES:
            nodes = math.ceil(each * size / NODE_BYTES)
            ms = milliseconds(measured[large]["ms_p50"], large, size / nodes, way)
            hours = 2 * WEIGHTS * TOKENS * size / FLOPS / 3600
            first = f"{name} | {each:,.0f}" if size == SIZES[0] else " | "
            cells = [first, f"{size:,}", _bytes(each * size), f"{nodes:,}", _short(hours), _short(ms)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def milliseconds(measured: float, size: int, documents: float, way: str) -> float:
    """A query's time on a node with so many documents, from that among ``size``."""
    return measured * (documents / size if way == "scan" else math.log(documents) / math.log(size))


def _bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number / 1e6:,.0f} MB"


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def inserted(page: str, made: str, begin: str = BEGIN) -> str:
    """The page with the table between its marks."""
    head, _, rest = page.partition(begin)
    return head + begin + made + END + rest.partition(END)[2]


def main() -> None:
    """Bring the page up to date."""
    made = table(json.loads((ROOT / "results" / "search.json").read_text(encoding="utf-8")))
    PAGE.write_text(inserted(PAGE.read_text(encoding="utf-8"), made), encoding="utf-8")
    print(made)


if __name__ == "__main__":
    main()
