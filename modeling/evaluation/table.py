"""Rows of a table: systems, metrics, intervals, costs and tests against one of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.dataset import RetrievalDataset
from ..errors import InputError
from .metrics import METRICS, per_query_metrics
from .statistics import bootstrap_interval, compare
from .systems import Ranking


def table_rows(
    dataset: RetrievalDataset, rankings: Sequence[Ranking], reference: str, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows of one data set: every system and metric with its interval, and on nDCG@10 the test against a reference.

    Several rankings of one system are its seeds: they are averaged for each query before anything is resampled.

    Raises:
        InputError: No system is called ``reference``.
    """
    seeds: dict[str, list[Ranking]] = {}
    for ranking in rankings:
        seeds.setdefault(ranking.system, []).append(ranking)
    values: dict[str, dict[str, np.ndarray]] = {}
    costs: dict[str, dict[str, Any]] = {}
    for system, repeated in seeds.items():
        measured = [per_query_metrics(dataset, ranking) for ranking in repeated]
        values[system] = {metric: np.stack([m[metric] for m in measured]) for metric in METRICS}
        known = [ranking.costs for ranking in repeated]
        costs[system] = {name: float(np.mean([cost[name] for cost in known])) for name in known[0]}
        costs[system] |= settings_of(repeated[0])
    return metric_rows(dataset.name, dataset.split, values, costs, reference, seed)


def metric_rows(
    dataset: str,
    split: str,
    values: Mapping[str, Mapping[str, np.ndarray]],
    costs: Mapping[str, Mapping[str, Any]],
    reference: str,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """The rows of :func:`table_rows`, from what was measured.

    Args:
        dataset: Name of the data set.
        split: Its split.
        values: System -> metric -> ``(seeds, queries)``.
        costs: System -> what goes beside its nDCG@10, such as :func:`settings_of`.
        reference: The system that the others are tested against.
        seed: Seed of the resampling.

    Raises:
        InputError: No system is called ``reference``.
    """
    refuse_unknown(reference, values)
    others = [system for system in values if system != reference]
    tests = dict(
        zip(
            others, compare({s: values[s]["nDCG@10"] for s in others}, values[reference]["nDCG@10"], seed), strict=True
        )
    )
    rows = []
    for system, measured in values.items():
        for metric in METRICS:
            scores = measured[metric]
            row: dict[str, Any] = {
                "system": system,
                "dataset": dataset,
                "split": split,
                "metric": metric,
                "value": float(scores.mean()),
                "interval": list(bootstrap_interval(scores, seed)),
                "queries": scores.shape[1],
            }
            if len(scores) > 1:
                row |= {"seeds": len(scores), "std": float(scores.mean(axis=1).std(ddof=1))}
            if metric == "nDCG@10":
                row |= costs[system]
                if system in tests:
                    row |= {"reference": reference} | tests[system]
            rows.append(row)
    return rows


def settings_of(ranking: Ranking) -> dict[str, Any]:
    """What a row says of how its system was set: nothing where there is nothing to set."""
    return {"settings": ranking.settings} if ranking.settings else {}


def notes_on(dataset: RetrievalDataset) -> list[str]:
    """What a reader of a data set's rows should know of how they were measured."""
    count = int((dataset.own >= 0).sum())
    if not count:
        return []
    return [
        f"{dataset.name}, {dataset.split}: {count:,} of {len(dataset.queries):,} queries have the id of a document, "
        "which is the query itself; for that query it is left out of what is found."
    ]


def window_notes(window: int | None, stride: int | None) -> list[str]:
    """What a reader should know of documents that were cut into windows."""
    if window is None:
        return []
    every = f"a new one every {stride}" if stride and stride < window else "side by side"
    return [
        f"Models read documents in windows of {window:,} tokens, {every}: the best window of a document counts, with "
        "several vectors a text those of all windows together. Bytes are those of all windows."
    ]


def refuse_doubles(sources: Sequence[str], names: Sequence[str]) -> None:
    """Refuse two sources of one name: rows are told apart by it, so both would show the numbers of one of them."""
    for name in names:
        if names.count(name) > 1:
            twins = [source for source, other in zip(sources, names, strict=True) if other == name]
            raise InputError(
                f"{' and '.join(twins)}: both would be {name!r} in the table. Rename a folder or leave one out."
            )


def refuse_unknown(reference: str, systems: Collection[str]) -> None:
    """InputError if no system is called ``reference``."""
    if reference not in systems:
        raise InputError(f"--reference {reference!r}: no such system; there are {', '.join(map(repr, systems))}.")


def display_name(system: str) -> str:
    """Row name: the folder's, with its parent where that says more (``late-interaction-minilm`` for ``.../final``)."""
    if system == "bm25":
        return "BM25"
    if system == "minilm":
        return "all-MiniLM-L6-v2"
    path = Path(system)
    return path.parent.name if path.name == "final" and path.parent.name else path.name
