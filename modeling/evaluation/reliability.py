"""How far probabilities can be relied on: bins of equal mass, the expected calibration error, and their picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BINS = 10


class Bins(NamedTuple):
    """Probabilities in bins of equal mass, lowest first.

    Attributes:
        predicted: ``(bins,)`` mean probability.
        observed: ``(bins,)`` share that is relevant.
        counts: ``(bins,)`` how many.
    """

    predicted: np.ndarray
    observed: np.ndarray
    counts: np.ndarray

    @property
    def error(self) -> float:
        """Expected calibration error: the mean distance of the two, by counts."""
        return float(np.average(np.abs(self.predicted - self.observed), weights=self.counts))


def binned(probability: np.ndarray, relevant: np.ndarray, bins: int = BINS) -> Bins:
    """Bins of equal mass, one more or less.

    Equal probabilities may fall into two bins; each of them then counts as relevant as all of them are in the mean, so
    that their order does not matter.

    Args:
        probability: ``(documents,)``.
        relevant: ``(documents,)`` whether each is.
        bins: How many; of fewer documents, one each.
    """
    values, group, counts = np.unique(probability, return_inverse=True, return_counts=True)
    share = np.bincount(group, relevant) / counts
    ordered = np.repeat(values, counts), np.repeat(share, counts)
    edges = np.linspace(0, len(probability), min(bins, len(probability)) + 1).round().astype(int)
    sizes = np.diff(edges)
    predicted, observed = (np.add.reduceat(part, edges[:-1]) / sizes for part in ordered)
    return Bins(predicted, observed, sizes)


def error_if_true(probability: np.ndarray, seed: int = 0, draws: int = 200) -> float:
    """The expected calibration error that chance alone leaves on so many documents, if the probabilities are true.

    Args:
        probability: ``(documents,)``.
        seed: Of the draws.
        draws: How often judgments are drawn from the probabilities.
    """
    generator = np.random.default_rng(seed)
    return float(
        np.mean([binned(probability, generator.random(len(probability)) < probability).error for _ in range(draws)])
    )


def error_interval(
    probability: np.ndarray, relevant: np.ndarray, seed: int = 0, resamples: int = 1000
) -> tuple[float, float]:
    """95 % percentile interval of the expected calibration error, over queries.

    Args:
        probability: ``(queries, documents)``, NaN where fewer were found.
        relevant: Likewise.
        seed: Of the resampling.
        resamples: How many times to resample the queries.
    """
    generator, found = np.random.default_rng(seed), []
    for _ in range(resamples):
        some = generator.integers(len(probability), size=len(probability))
        drawn, judged = probability[some], relevant[some]
        there = ~np.isnan(drawn)
        found.append(binned(drawn[there], judged[there]).error)
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def draw_reliability(axis: Any, bins: Bins, label: str, color: str = "C0") -> None:
    """A curve of what share is relevant against what was predicted, with 95 % intervals of the shares (Wilson)."""
    share, counts, z = bins.observed, bins.counts, 1.96
    centre = (share + z**2 / (2 * counts)) / (1 + z**2 / counts)
    half = z / (1 + z**2 / counts) * np.sqrt(share * (1 - share) / counts + z**2 / (4 * counts**2))
    errors = np.clip([share - centre + half, centre + half - share], 0, None)
    axis.errorbar(
        bins.predicted, share, errors, fmt="o-", color=color, label=label, capsize=3, lw=1, elinewidth=0.8, ms=4
    )


def draw_panels(path: Path, panels: dict[str, dict[str, Bins]]) -> None:
    """Reliability of probabilities, a panel for each title and a curve for each label."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1 + 3.6 * columns, 0.8 + 3.4 * rows), squeeze=False, layout="constrained"
    )
    labels = list(dict.fromkeys(label for curves in panels.values() for label in curves))
    for unused in axes.flat[len(panels) :]:
        unused.set_visible(False)
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=False):
        axis.plot([0, 1], [0, 1], color="0.6", lw=1, ls=":", label="as predicted")
        for label, bins in curves.items():
            draw_reliability(axis, bins, label, f"C{labels.index(label)}")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    figure.supxlabel("predicted probability, mean of a bin", fontsize="medium")
    figure.supylabel("share judged relevant (95 % interval)", fontsize="medium")
    most = max(axes.flat[: len(panels)], key=lambda axis: len(axis.get_legend_handles_labels()[1]))
    figure.legend(*most.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=144)
    plt.close(figure)
