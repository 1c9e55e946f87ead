"""Intervals and honest comparisons: paired bootstrap over queries, corrected for the rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

RESAMPLES = 10_000


def bootstrap_interval(values: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % percentile interval of the mean over queries.

    Args:
        values: ``(queries,)``, or ``(seeds, queries)``, which is averaged over seeds first.
        seed: Seed of the resampling.
        resamples: How many times to resample.
    """
    low, high = np.percentile(_resampled_means(_over_seeds(values), seed, resamples), [2.5, 97.5])
    return float(low), float(high)


def macro_interval(values: Mapping[str, np.ndarray], seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % percentile interval of the mean over data sets of the means over their queries.

    Args:
        values: Data set -> ``(queries,)``.
        seed: Seed of the resampling.
        resamples: How many times to resample the queries of every set.
    """
    generator = np.random.default_rng(seed)
    means = [v[generator.integers(len(v), size=(resamples, len(v)))].mean(1) for v in values.values()]
    low, high = np.percentile(np.mean(means, axis=0), [2.5, 97.5])
    return float(low), float(high)


def clustered_intervals(
    values: np.ndarray, clusters: np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> np.ndarray | None:
    """95 % percentile intervals of means over values that come in clusters, which are resampled whole.

    Values of one cluster are no independent draws: to resample them one by one would make the interval too narrow.

    Args:
        values: ``(measures, values)``.
        clusters: ``(values,)`` number of the cluster of each.
        seed: Seed of the resampling.
        resamples: How many times to resample.

    Returns:
        ``(measures, 2)``; None if all values are of one cluster, of which nothing can be said.
    """
    _, member = np.unique(clusters, return_inverse=True)
    count = int(member.max(initial=-1)) + 1
    if count < 2:
        return None
    # One row for each cluster: the sum of each measure, and behind them how many values it has.
    sums = np.stack([np.bincount(member, row, count) for row in (*values, np.ones(len(member)))], axis=1)
    generator = np.random.default_rng(seed)
    block = max(1, 2**21 // count)
    sizes = [min(block, resamples - start) for start in range(0, resamples, block)]
    drawn = np.concatenate([sums[generator.integers(count, size=(size, count))].sum(1) for size in sizes])
    return np.percentile(drawn[:, :-1] / drawn[:, -1:], [2.5, 97.5], axis=0).T


def compare(
    systems: Mapping[str, np.ndarray], reference: np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> list[dict[str, Any]]:
    """Paired two-sided bootstrap of each system against one reference, Holm-corrected over the systems.

    Args:
        systems: Name -> ``(queries,)`` or ``(seeds, queries)`` values; seeds are averaged per query first.
        reference: Values of the reference on the same queries.
        seed: Seed of the resampling, the same for every system.
        resamples: How many times to resample.

    Returns:
        For each system ``difference`` (of means), its 95 % ``difference_interval`` and the corrected ``p_value``.
    """
    outcomes, p_values = [], []
    for values in systems.values():
        differences = _over_seeds(values) - _over_seeds(reference)
        means = _resampled_means(differences, seed, resamples)
        # One resample is added on each side, so that p is never zero (Davison and Hinkley 1997, section 4.2).
        tails = ((means <= 0).sum() + 1, (means >= 0).sum() + 1)
        p_values.append(min(1.0, 2 * float(min(tails)) / (resamples + 1)))
        outcomes.append(
            {
                "difference": float(differences.mean()),
                "difference_interval": [float(x) for x in np.percentile(means, [2.5, 97.5])],
            }
        )
    return [outcome | {"p_value": p} for outcome, p in zip(outcomes, holm(p_values), strict=True)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the family-wise error stays below the level that corrected values are held to."""
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def _over_seeds(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, dtype=np.float64).reshape(-1, np.shape(values)[-1]).mean(axis=0)


def _resampled_means(values: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Means of ``resamples`` draws with replacement, in blocks that bound memory at 16 MiB of indices."""
    generator = np.random.default_rng(seed)
    block = max(1, 2**21 // len(values))
    sizes = [min(block, resamples - start) for start in range(0, resamples, block)]
    return np.concatenate([values[generator.integers(len(values), size=(n, len(values)))].mean(axis=1) for n in sizes])
