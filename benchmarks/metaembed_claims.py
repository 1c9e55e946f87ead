"""What the benchmarks of MetaEmbed claim of their rows, and the picture of quality over the number of vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from frozen_tier import gain_claim, held_to_value

from polyrep.evaluation.frontier.pooling import LADDER

Values = Mapping[str, Mapping[str, Mapping[int, np.ndarray]]]
"""Data set -> row -> seed -> nDCG@10 of each query. What knows no seed stands under every one."""

LEAST_GAP = 0.02
"""nDCG@10 between two systems below which a share of what lies between them says nothing."""


def has(tests: Values, *rows: str) -> bool:
    """Whether every data set has these rows."""
    return all(row in values for values in tests.values() for row in rows)


def common(tests: Values, *rows: str) -> dict[str, dict[str, np.ndarray]]:
    """Some rows, each a mean over the seeds that all of them have: data set -> row -> value of each query.

    A row of one seed is thus compared with the very fits of that seed, not with a mean over others.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, values in tests.items():
        seeds = sorted(set.intersection(*(set(values[row]) for row in rows)))
        found[name] = {row: np.mean([values[row][seed] for seed in seeds], axis=0) for row in rows}
    return found


def gain(
    claim: str, tests: Values, ours: str, other: str, target: float | None = 0.0, by_value: bool = False
) -> list[dict[str, Any]]:
    """A claim in nDCG@10 points of one row less another, or none where a row is missing.

    Args:
        claim: Its name.
        tests: What was measured.
        ours: A row.
        other: The row that it is held against.
        target: Points.
        by_value: Hold the value to the target, not the lower end of its interval.
    """
    if not has(tests, ours, other):
        return []
    entry = gain_claim(claim, common(tests, ours, other), ours, other, target) | {"control": other}
    return [held_to_value(entry) if by_value and target is not None else entry]


def monotone(claim: str, tests: Values, system: str, numbers: Sequence[int] = LADDER) -> list[dict[str, Any]]:
    """The share of steps from one number of vectors to the next that lose 0.2 points or less, over the data sets."""
    rows = [f"{system}, {k}" for k in numbers]
    if not has(tests, *rows):
        return []
    values = common(tests, *rows).values()
    macro = [100 * float(np.mean([of[row].mean() for of in values])) for row in rows]
    steps = np.diff(macro)
    share = float(np.mean(steps >= -0.2))
    entry: dict[str, Any] = {"claim": claim, "value": share, "target": 1.0, "met": share == 1.0, "split": "test"}
    return [entry | {"system": system, "worst_step": float(steps.min()), "macro": macro}]


def gap_closed(
    claim: str, tests: Values, ours: str, low: str, high: str, target: float = 0.75
) -> list[dict[str, Any]]:
    """Which share of the way from one row to a better one a row has gone, as a mean over data sets.

    Data sets where these two are less than :data:`LEAST_GAP` apart are left out; without any there is no claim.
    """
    if not has(tests, ours, low, high):
        return []
    by_dataset = {}
    for name, values in common(tests, ours, low, high).items():
        found, least, most = (float(values[row].mean()) for row in (ours, low, high))
        if most - least >= LEAST_GAP:
            by_dataset[name] = (found - least) / (most - least)
    if not by_dataset:
        return []
    value = float(np.mean(list(by_dataset.values())))
    entry: dict[str, Any] = {"claim": claim, "value": value, "target": target, "met": value >= target}
    return [entry | {"system": ours, "split": "test", "from": low, "to": high, "by_dataset": by_dataset}]


def draw(results: dict[str, Any], path: Path, lines: Mapping[str, str], across: Mapping[str, str]) -> None:
    """Quality and bytes over the number of vectors: a panel for each data set, a line for each way to have them.

    Args:
        results: With rows called ``SYSTEM, NUMBER``.
        path: Of the picture.
        lines: System -> its colour; its interval is shaded.
        across: Rows of no number, drawn as a line across the panel -> style of the line.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in results["rows"] if row["metric"] == "nDCG@10"]
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    size = (1 + 3.3 * len(datasets), 3.9)
    figure, axes = plt.subplots(1, len(datasets), figsize=size, squeeze=False, layout="constrained")
    for axis, dataset in zip(axes[0], datasets, strict=True):
        of = {row["system"]: row for row in rows if row["dataset"] == dataset}
        for system, color in lines.items():
            if not (there := [k for k in LADDER if f"{system}, {k}" in of]):
                continue
            found = [of[f"{system}, {k}"] for k in there]
            axis.plot(there, [row["value"] for row in found], "o-", color=color, label=system, markersize=4)
            low, high = zip(*(row["interval"] for row in found), strict=True)
            axis.fill_between(there, low, high, color=color, alpha=0.12, linewidth=0)
        for system, style in across.items():
            if system in of:
                axis.axhline(of[system]["value"], color="grey", linestyle=style, linewidth=0.9, label=system)
        axis.set_xscale("log", base=2)
        axis.set_xticks(LADDER, [str(k) for k in LADDER])
        axis.set_xlabel("vectors of a document")
        most = LADDER[-1]
        sizes = [row["bytes_per_document"] for name, row in of.items() if name in {f"{s}, {most}" for s in lines}]
        if sizes:
            width = round(max(sizes) / most)  # bytes of a vector, without the offset of a document
            top = axis.secondary_xaxis("top", functions=(lambda k, w=width: k * w, lambda b, w=width: b / w))
            top.set_xticks([k * width for k in LADDER], [f"{k * width:,}" for k in LADDER], fontsize=7)
            top.set_xlabel("bytes of them", fontsize=8)
        axis.set_title(dataset, fontsize=10)
        axis.grid(linewidth=0.3)
    axes[0][0].set_ylabel("nDCG@10, test, and its 95 % interval")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
