"""Which row of a table to take: what lies on a front, and what fits a budget, in plain words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import InputError
from ...report import family_of
from ..statistics import bootstrap_interval, compare

Budget = dict[str, float]
"""``bytes`` of a document in the index, ``ms`` of a query alone, or both -> the most that it may be."""

COSTS = {"bytes": "bytes_per_document", "ms": "search_ms_p50"}
"""Unit of a budget -> the cost of a row that it limits."""

LEVEL = 0.05
"""A difference with a corrected p-value below this is called significant."""

NEAR = 0.05
"""Costs within this share of each other are called about the same."""


def parse_budget(text: str) -> Budget:
    """Read ``bytes=256``, ``ms=5``, or both with a comma between.

    Raises:
        InputError: Another unit, one unit twice, or a limit that is no positive number.
    """
    found: Budget = {}
    for part in text.split(","):
        unit, _, limit = part.strip().partition("=")
        try:
            value = float(limit)
        except ValueError:
            value = math.nan
        if unit not in COSTS or unit in found or not 0 < value < math.inf:
            raise InputError(
                f"--budget {text!r}: {part.strip()!r} is no limit. Write bytes=256, ms=5, or bytes=2048,ms=5."
            )
        found[unit] = value
    return found


def fronts(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """For each row of one data set the units (``bytes``, ``ms``) in which no other row is better.

    Another row is better if its ``value`` is at least as high at no higher cost, and one of the two is strictly so.
    """
    quality = np.array([row["value"] for row in rows])
    found: list[list[str]] = [[] for _ in rows]
    for unit, name in COSTS.items():
        costs = np.array([row[name] for row in rows])
        for place in range(len(rows)):
            no_worse = (quality >= quality[place]) & (costs <= costs[place])
            strictly = (quality > quality[place]) | (costs < costs[place])
            if not (no_worse & strictly).any():
                found[place].append(unit)
    return found


def within(rows: Iterable[Mapping[str, Any]], budget: Budget) -> list[Mapping[str, Any]]:
    """Rows that meet a budget, see :func:`parse_budget`."""
    return [row for row in rows if all(row[COSTS[unit]] <= most for unit, most in budget.items())]


def best_of(rows: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The best of some rows of nDCG@10, of equal ones the cheapest; there must be one."""
    return max(rows, key=lambda row: (row["value"], *(-row[cost] for cost in COSTS.values())))


def recommend(
    rows: Sequence[Mapping[str, Any]],
    per_query: Mapping[str, np.ndarray],
    budgets: Sequence[Budget],
    *,
    full: str,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """For each budget the best row that meets it, and what that loses and saves against the full model.

    Args:
        rows: nDCG@10 of every system on one data set, with ``bytes_per_document`` and ``search_ms_p50``.
        per_query: System -> its nDCG@10 of each query, ``(queries,)``.
        budgets: See :func:`parse_budget`.
        full: Name of the full model's row.
        seed: Of the resampling.

    Returns:
        For each budget ``budget, system, text``; ``cheapest``, the cheapest row within it that is not significantly
        worse than ``system``, and ``as_good_as_full``, the cheapest within it not significantly worse than the full
        model, each None if there is no other. Where no row meets a budget, ``system`` is None and ``nearest`` names
        the row that misses it least.
    """
    others = [row["system"] for row in rows if row["system"] != full]
    beside_full = _tests(per_query, others, full, seed)
    found = []
    for budget in budgets:
        fitting = within(rows, budget)
        if not fitting:
            found.append(_nothing_fits(rows, budget))
            continue
        best, unit = best_of(fitting), "bytes" if "bytes" in budget else "ms"
        cheaper = [row for row in fitting if row[COSTS[unit]] < best[COSTS[unit]]]
        tests = _tests(per_query, [row["system"] for row in cheaper], best["system"], seed)
        entry: dict[str, Any] = {"budget": budget, "system": best["system"]}
        entry["cheapest"] = _cheapest(cheaper, tests, unit)
        entry["as_good_as_full"] = None if best["system"] == full else _cheapest(fitting, beside_full, unit)
        text = _in_words(entry, {row["system"]: row for row in rows}, full, beside_full, unit)
        found.append(entry | {"text": text})
    return found


def _nothing_fits(rows: Sequence[Mapping[str, Any]], budget: Budget) -> dict[str, Any]:
    nearest = min(rows, key=lambda row: max(row[COSTS[unit]] / most for unit, most in budget.items()))
    needs = " and ".join(amount(unit, nearest[COSTS[unit]]) for unit in budget)
    text = (
        f"Within {_limits(budget)}: no row. The nearest is {nearest['system']}, which needs {needs} and has nDCG@10 "
        f"{nearest['value']:.3f}."
    )
    nothing = dict.fromkeys(("system", "cheapest", "as_good_as_full"))
    return {"budget": budget, **nothing, "nearest": nearest["system"], "text": text}


def _in_words(
    entry: Mapping[str, Any],
    rows: Mapping[str, Mapping[str, Any]],
    full: str,
    beside_full: Mapping[str, Mapping[str, Any]],
    unit: str,
) -> str:
    """What :func:`recommend` says of a budget that some row meets."""
    best = rows[entry["system"]]
    text = f"Within {_limits(entry['budget'])}: {best['system']}, nDCG@10 {best['value']:.3f}"
    if best["system"] == full:
        text += ". It is the full model itself, which fits."
    else:
        # Of the row itself the p-value is that of the table, which is corrected for all its rows.
        own = {**beside_full[best["system"]], **({"p_value": best["p_value"]} if "p_value" in best else {})}
        text += f". {_against(best, rows[full])}; {_significance(own)}."
    named = [(entry["cheapest"], "that")]
    if entry["as_good_as_full"] not in (best["system"], entry["cheapest"]):
        named.append((entry["as_good_as_full"], "the full model"))
    for system, other in named:
        if system:
            value, cost = rows[system]["value"], amount(unit, rows[system][COSTS[unit]])
            text += f" The cheapest that is not significantly worse than {other}: {system}, {value:.3f} at {cost}."
    return text


def _limits(budget: Budget) -> str:
    return " and ".join(amount(unit, most) for unit, most in budget.items())


def learned_margins(
    rows: Sequence[Mapping[str, Any]],
    per_query: Mapping[str, np.ndarray],
    learned: Sequence[str],
    *,
    limits: Sequence[int] = (16, 64, 256, 1024, 4096, 16384),
    seed: int = 0,
) -> list[dict[str, Any]]:
    """What the best learned row within so many bytes gains over the best other row within them.

    Args:
        rows: As for :func:`recommend`.
        per_query: Likewise.
        learned: Methods that count as learned, by what stands before a comma in a system.
        limits: Bytes of a document. Where none of the two kinds fits, there is no entry.
        seed: Of the resampling.

    Returns:
        For each limit a claim: points of nDCG@10 with their interval; met if the learned row is on the front of bytes.
    """
    found = []
    for limit in limits:
        fitting = [row for row in rows if row["bytes_per_document"] <= limit]
        ours = [row for row in fitting if family_of(row) in learned]
        others = [row for row in fitting if row not in ours]
        if ours and others:
            best, rival = (max(part, key=lambda row: (row["value"], -row[COSTS["bytes"]])) for part in (ours, others))
            gains = 100 * (per_query[best["system"]] - per_query[rival["system"]])
            entry = {"claim": f"frontier.learned_margin_{limit}", "value": float(gains.mean()), "target": 0.0}
            entry |= {"interval": list(bootstrap_interval(gains, seed)), "met": _leads(best, rival)}
            found.append(entry | {"learned": best["system"], "rival": rival["system"], "split": best["split"]})
    return found


def _leads(row: Mapping[str, Any], rival: Mapping[str, Any]) -> bool:
    """Whether a row stays on the front of bytes beside another that fits the same limit."""
    ahead, level = row["value"] > rival["value"], row["value"] == rival["value"]
    return bool(ahead or level and row[COSTS["bytes"]] <= rival[COSTS["bytes"]])


def amount(unit: str, value: float) -> str:
    """A cost in words."""
    return f"{value:,.0f} bytes a document" if unit == "bytes" else f"{value:.3g} ms a query"


def _tests(
    per_query: Mapping[str, np.ndarray], systems: Sequence[str], reference: str, seed: int
) -> dict[str, dict[str, Any]]:
    """Each system against the reference by itself: a correction for many would call more of them no worse."""
    return {system: compare({system: per_query[system]}, per_query[reference], seed)[0] for system in systems}


def _cheapest(rows: Sequence[Mapping[str, Any]], tests: Mapping[str, Mapping[str, Any]], unit: str) -> str | None:
    good = [row for row in rows if row["system"] in tests and not _is_worse(tests[row["system"]])]
    return min(good, key=lambda row: (row[COSTS[unit]], -row["value"]))["system"] if good else None


def _is_worse(test: Mapping[str, Any]) -> bool:
    return bool(test["difference"] < 0 and test["p_value"] < LEVEL)


def _significance(test: Mapping[str, Any]) -> str:
    p_value = f"p {test['p_value']:.3f}" if test["p_value"] >= 0.001 else "p < 0.001"
    name = "loss" if test["difference"] < 0 else "gain"
    verdict = "significant" if test["p_value"] < LEVEL else "not significant"
    return f"this {name} of {abs(test['difference']):.3f} is {verdict} ({p_value})"


def _against(row: Mapping[str, Any], full: Mapping[str, Any]) -> str:
    """What a row keeps of the full model's quality, and at which share of its costs."""
    size, full_size = row[COSTS["bytes"]], full[COSTS["bytes"]]
    time, full_time = row[COSTS["ms"]], full[COSTS["ms"]]
    kept = f"It keeps {100 * row['value'] / full['value']:.0f} % of" if full["value"] else "Beside"
    ratio = full_size / size
    speed = full_time / time
    bytes_ = f"at 1/{ratio:.0f} of the bytes" if ratio >= 1.5 else f"at {_times(1 / ratio)} times the bytes"
    pace = f"{_times(speed)} times as fast" if speed >= 1 else f"taking {_times(1 / speed)} times as long"
    if abs(ratio - 1) < NEAR:
        bytes_ = "with about as many bytes"
    if abs(speed - 1) < NEAR:
        pace = "about as fast"
    return f"{kept} the full model's {full['value']:.3f} {bytes_}, {pace}"


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"
