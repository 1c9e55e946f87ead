"""The picture of the frontier command: quality against bytes, with the time of a query as the area of a marker."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from ...report import family_of

COLORS = [f"C{number}" for number in range(10) if number != 7]
"""Of methods: those of matplotlib without the grey, which the legend uses."""

APART = 1.15
"""Two labels on the front stand at least so far apart, as the ratio of their bytes."""

SIZES = (0.5, 5.0, 50.0)
"""Milliseconds that the legend shows."""


def area(milliseconds: float) -> float:
    """Area of a marker in square points: by the logarithm of the time, since rows differ a thousandfold."""
    return float(10 + 40 * np.clip(np.log10(max(milliseconds, 1e-3) / 0.1), 0, 4))


ACROSS = {"full model": ("-", "0.25"), "BM25": ("--", "0.5")}
"""Systems that are lines across, since every row is to be read against them -> style and shade."""


def draw(results: dict[str, Any], path: Path) -> None:
    """A panel per data set: a colour per method, diamonds for two stages, rings on the front, which a line joins."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in results["rows"] if row["metric"] == "nDCG@10"]
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    families = dict.fromkeys(family_of(row) for row in rows if row["system"] not in ACROSS)
    colors = dict(zip(families, itertools.cycle(COLORS), strict=False))
    figure, axes = plt.subplots(len(datasets), 1, figsize=(6.25, 0.5 + 4.1 * len(datasets)), squeeze=False)
    for axis, dataset in zip(axes[:, 0], datasets, strict=True):
        mine = [row for row in rows if row["dataset"] == dataset]
        front = [row for row in mine if "bytes" in row.get("pareto", [])]
        front.sort(key=lambda row: row["bytes_per_document"])
        _draw_across(axis, [row for row in mine if row["system"] in ACROSS])
        _draw_rows(axis, [row for row in mine if row["system"] not in ACROSS], colors)
        _draw_front(axis, front)
        axis.set_xscale("log")
        axis.margins(x=0.14)
        _cut_below(axis, mine, front)
        axis.set_title(f"{dataset}, {mine[0]['split']}", fontsize=9, loc="left", pad=4)
        axis.set_ylabel("nDCG@10 (95 % interval)", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25, which="major")
    axes[-1, 0].set_xlabel("bytes per document", fontsize=8)
    figure.legend(
        handles=_handles(colors), loc="upper center", ncols=5, frameon=False, fontsize=7.5, handletextpad=0.3
    )
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.5 / figure.get_figheight()))
    figure.savefig(path, dpi=144)
    plt.close(figure)


def _draw_across(axis: Any, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        style, shade = ACROSS[row["system"]]
        axis.axhline(row["value"], ls=style, color=shade, lw=1, zorder=1)
        name = f"{row['system']}, {row['bytes_per_document']:,.0f} bytes"
        # Below its line, as names of rows stand above theirs.
        where: dict[str, Any] = {"transform": axis.get_yaxis_transform(), "ha": "left", "va": "top"}
        axis.text(0.006, row["value"], name, fontsize=7, **where)


def _draw_rows(axis: Any, rows: list[dict[str, Any]], colors: dict[str, str]) -> None:
    for row in rows:
        low, high = row.get("interval", [row["value"]] * 2)
        place, color = row["bytes_per_document"], colors[family_of(row)]
        axis.plot([place, place], [low, high], color=color, lw=0.6, alpha=0.35, zorder=1)
        size = area(row["search_ms_p50"])
        axis.scatter(place, row["value"], s=size, marker=_marker(row), color=color, alpha=0.8, linewidths=0, zorder=2)


def _draw_front(axis: Any, front: list[dict[str, Any]]) -> None:
    """Rings, the line that joins them, and the names of those that are not too near to one another."""
    places, values = [row["bytes_per_document"] for row in front], [row["value"] for row in front]
    axis.step(places, values, where="post", color="0.2", lw=0.8, zorder=1.5)
    named = labelled(front)
    for row, place, value in zip(front, places, values, strict=True):
        size = area(row["search_ms_p50"]) + 14
        axis.scatter(place, value, s=size, marker=_marker(row), facecolors="none", edgecolors="0.1", lw=1, zorder=3)
        if row["system"] in named:
            staged = _marker(row) == "D"
            name = row["system"] if staged else row["system"].partition(", ")[2]  # else the colour says the rest
            above: dict[str, Any] = {"textcoords": "offset points", "ha": "right"}  # where no row can lie
            axis.annotate(name, (place, value), (-(size**0.5) / 2, 14 if staged else 4), fontsize=6.5, **above)


def _cut_below(axis: Any, rows: list[dict[str, Any]], front: list[dict[str, Any]]) -> None:
    """Leave out rows far below all others, and name them."""
    floor = _floor(rows, front)
    if below := [f"{row['system']} {row['value']:.3f}" for row in rows if row["value"] < floor]:
        axis.set_ylim(bottom=floor)
        where = {"transform": axis.transAxes, "ha": "right", "va": "bottom", "fontsize": 6.5, "color": "0.3"}
        axis.text(0.994, 0.01, f"below: {', '.join(below)}", **where)


def _handles(colors: dict[str, str]) -> list[Any]:
    """What the legend shows."""
    from matplotlib.lines import Line2D

    grey: dict[str, Any] = {"color": "0.45", "ls": "none"}
    return [
        *(Line2D([], [], marker="o", ls="none", color=color, label=name, ms=5) for name, color in colors.items()),
        Line2D([], [], marker="D", label="two stages", ms=4.5, **grey),
        Line2D([], [], marker="o", mfc="none", mec="0.1", ls="-", color="0.2", lw=0.8, label="front", ms=6.5),
        *(Line2D([], [], marker="o", label=f"{ms:g} ms", ms=area(ms) ** 0.5, **grey) for ms in SIZES),
    ]


def _marker(row: dict[str, Any]) -> str:
    return "D" if "rerank" in row["system"] else "o"


def labelled(front: list[dict[str, Any]]) -> set[str]:
    """Systems of a front that get a label: of those too near to one another for two, the better.

    Args:
        front: Its rows, in order of their bytes.
    """
    kept: list[dict[str, Any]] = []
    for row in front:  # each better than the one before
        if kept and row["bytes_per_document"] < APART * kept[-1]["bytes_per_document"]:
            kept.pop()
        kept.append(row)
    return {row["system"] for row in kept}


def _floor(rows: list[dict[str, Any]], front: list[dict[str, Any]]) -> float:
    """Where the vertical axis begins: below all that lies on the front, and below BM25.

    A row far below these would press the others together.
    """
    wanted = [*front, *(row for row in rows if row["system"] == "BM25")] or rows
    low = min(row.get("interval", [row["value"]])[0] for row in wanted)
    return float(low - 0.1 * (max(row["value"] for row in rows) - low))
