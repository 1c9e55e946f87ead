"""Results as one JSON file, one Markdown table and one picture, each with the command that made them."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from .errors import InputError, first_line
from .files import refuse_unwritable, staged_folder, write_json, write_text

METRIC_NAMES = {"nDCG@10": "ndcg_at_10", "nDCG@3": "ndcg_at_3", "MRR@10": "mrr_at_10", "Recall@100": "recall_at_100"}
"""Metrics that every table shows, in this order, and what MTEB calls them; ``evaluation/metrics.py`` measures them."""

_RESULTS = {
    "name": str,
    "command": str,
    "created": str,
    "commit": str,
    "hardware": str,
    "versions": dict,
    "seeds": list,
    "settings_tried": int,
    "models": dict,
    "rows": list,
    "claims": list,
}
_ROW = {"system": str, "dataset": str, "split": str, "metric": str, "value": (int, float)}
_MAYBE = {
    "hub_dataset": str,
    "hub_revision": str,
    "settings": dict,
    "task_type": str,
    "mean_of_tasks": int,
    "tasks_of_benchmark": int,
}
_OVERLAP = {
    **{"system": str, "dataset": str, "split": str, "source": str, "group": str, "pairs": int, "k": int},
    **{"average_overlap": (int, float), "ndcg_a": (int, float), "ndcg_b": (int, float), "short_lists": int},
}
_NONE: dict[str, Any] = {"value": 0}
_CLAIM = {"claim": str, "value": (int, float), "target": (int, float, type(None)), "met": (bool, type(None))}


def write_results(
    results: dict[str, Any], output: Path | None, picture: Callable[[dict[str, Any], Path], None] | None = None
) -> str:
    """Check results against the shared layout and write ``<name>.json``, ``.md`` and, where there are sizes, ``.png``.

    Args:
        results: ``name, command, created, commit, hardware, versions, seeds, settings_tried, models {system:
            fingerprint}, rows, claims``. A row has ``system, dataset, split, metric, value`` and what applies of
            ``interval, std, bytes_per_document, flops, active_dims, ...``; ``settings``, which a line below the tables
            says; ``hub_dataset`` and, where known, ``hub_revision`` of a data set of the Hub; ``task_type`` of MTEB,
            without which it is Retrieval; and a benchmark's mean ``mean_of_tasks, tasks_of_benchmark``.
            With rows by MTEB, ``versions`` has ``mteb``. A claim has ``claim, value, target, met``
            (both None without a target), where it needs data ``split``, and where several models were measured the
            ``system`` it is of. Optionally ``axis``, the cost that the
            picture sets quality against (default ``bytes_per_document``); ``drawn``, the families of systems (what
            stands before a comma) that it shows, none for no picture; and ``gap``, two systems from which a second
            axis counts 0 and 1. Also optional: ``recommendations``, each with a ``text`` and its ``dataset``;
            ``failures``, each a ``system``, its ``dataset`` and the ``reason`` why it has no row; ``notes``, sentences
            below the tables; ``paraphrases``, entries of
            :meth:`polyrep.evaluation.rank_similarity.RankSimilarity.summary`; ``data``, of a data set that was made on
            this machine the ``documents``, ``fingerprint`` and ``packages``.
        output: Folder to write to; None writes nothing.
        picture: Draws results into a file; default: :func:`draw`.

    Returns:
        The Markdown.

    Raises:
        InputError: A field is missing or of the wrong type.
    """
    check_results(results)
    markdown = to_markdown(results)
    if output is not None:
        with staged_folder(output, merge=True) as staged:
            write_json(staged / f"{results['name']}.json", results)
            write_text(staged / f"{results['name']}.md", markdown)
            if results.get("drawn") != [] and (picture or _points(results)):
                (picture or draw)(results, staged / f"{results['name']}.png")
    return markdown


def refuse_unwritable_results(output: Path | None, name: str) -> None:
    """Refuse, before anything is measured, a place that :func:`write_results` could not write to.

    Args:
        output: Folder to write to, which need not exist; None for none.
        name: Of the files.

    Raises:
        InputError: The folder cannot be made or written to, or files cannot be called so.
    """
    if output is None:
        return
    if not name or name != Path(name).name or len(name.encode(errors="replace")) > 200 or not name.isprintable():
        raise InputError(f"--name {name!r}: files cannot be called so. Use a short name without slashes.")
    refuse_unwritable(output, "--output")
    if taken := [file for end in ("json", "md", "png") if (file := output / f"{name}.{end}").is_dir()]:
        raise InputError(f"{taken[0]}: a folder, where a file is to be written. Choose another --name.")


def print_and_write(
    results: dict[str, Any], output: Path | None, picture: Callable[[dict[str, Any], Path], None] | None = None
) -> None:
    """Print the table, whatever becomes of the files, and then write them; see :func:`write_results`.

    Raises:
        InputError: The files cannot be written.
    """
    print(write_results(results, None), flush=True)
    try:
        write_results(results, output, picture)
    except OSError as error:
        raise InputError(
            f"--output {output}: {results['name']}.json, .md and .png could not be written ({first_line(error)}), so "
            "of what was measured only the table above is left. Make room or name another folder, and run it again: "
            "what was encoded is kept."
        ) from error


def check_results(results: dict[str, Any]) -> None:
    """Refuse results that lack a field of the shared layout or have it with another type."""
    _check_fields(results, _RESULTS, "results")
    for kind, layout in (("rows", _ROW), ("claims", _CLAIM)):
        for number, entry in enumerate(results[kind]):
            _check_fields(entry, layout, f"{kind}[{number}]")
    for number, row in enumerate(results["rows"]):
        _check_fields(row, {name: kind for name, kind in _MAYBE.items() if name in row}, f"rows[{number}]")
    for number, entry in enumerate(results.get("paraphrases", [])):
        _check_fields(entry, _OVERLAP, f"paraphrases[{number}]")
    for claim in results["claims"]:
        if (claim["target"] is None) != (claim["met"] is None):
            raise InputError(f"claim {claim['claim']!r}: target and met are both given or both null.")


def to_markdown(results: dict[str, Any]) -> str:
    """One table per data set, best system first, then the claims and where the numbers come from."""
    lines = [f"# {results['name']}", ""]
    for dataset, split in dict.fromkeys((row["dataset"], row["split"]) for row in results["rows"]):
        by_system: dict[str, dict[str, dict[str, Any]]] = {}
        for row in results["rows"]:
            if (row["dataset"], row["split"]) == (dataset, split):
                by_system.setdefault(row["system"], {})[row["metric"]] = row
        best_first = sorted(by_system.items(), key=lambda item: item[1].get("nDCG@10", _NONE)["value"], reverse=True)
        table = [_table_cells(system, metrics) for system, metrics in best_first]
        failed = [entry for entry in results.get("failures", []) if entry["dataset"] == dataset]
        table += [{"system": e["system"], "nDCG@10": f"failed: {e['reason'][:200]}".replace("|", "/")} for e in failed]
        columns = dict.fromkeys(column for cells in table for column in cells)
        used = [column for column in columns if any(cells.get(column) for cells in table)]
        first = next(iter(by_system.values()))
        queries = first.get("nDCG@10", _NONE).get("queries")
        note = f" ({queries:,} queries)" if queries else _mean_note(next(iter(first.values())))
        lines += [f"## {dataset}, {split}{note}", ""]
        lines += ["| " + " | ".join(used) + " |", "|" + "---|" * len(used)]
        lines += ["| " + " | ".join(cells.get(column, "") for column in used) + " |" for cells in table] + [""]
        advice = [entry["text"] for entry in results.get("recommendations", []) if entry["dataset"] == dataset]
        lines += [f"- {text}" for text in advice] + [""] * bool(advice)
    if results["claims"]:
        lines += ["| claim | value | target | met |", "|---|---|---|---|"]
        lines += [
            f"| {c['claim']} | {c['value']:.4g} | {_or(c['target'], '.4g')} | {c['met']} |" for c in results["claims"]
        ]
        lines += [""]
    for dataset, split, source in dict.fromkeys(
        (e["dataset"], e["split"], e["source"]) for e in results.get("paraphrases", [])
    ):
        lines += [f"## {dataset}, {split}, two wordings by {source}", ""]
        lines += _overlap_table(
            [e for e in results["paraphrases"] if (e["dataset"], e["split"], e["source"]) == (dataset, split, source)]
        )
    commit = results["commit"][:12] + results["commit"][40:]  # keeps -dirty
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    references = {row["reference"] for row in results["rows"] if "reference" in row}
    if references:
        lines += [
            "Brackets: 95 % bootstrap interval over queries. Difference: nDCG@10 less that of "
            f"{', '.join(sorted(references))}; p: paired two-sided bootstrap, Holm-corrected within each table.",
            "",
        ]
    for note in [*_settings_notes(results["rows"]), *results.get("notes", [])]:
        lines += [note, ""]
    lines += [
        f"Made by `{results['command']}` on {results['hardware']}, commit {commit}, {versions}; "
        f"seeds {results['seeds']}, settings tried: {results['settings_tried']}.",
    ]
    lines += [
        f"{system}: fingerprint {digest[:16]} (SHA-256 over all that changes a vector)."
        for system, digest in results["models"].items()
    ]
    for name, made in results.get("data", {}).items():
        packages = ", ".join(f"{package} {version}" for package, version in made["packages"].items())
        lines += [f"{name}: {made['documents']:,} documents, fingerprint {made['fingerprint']}, read from {packages}."]
    return "\n".join(lines) + "\n"


_AXIS_NAMES = {
    "bytes_per_document": "bytes per document",
    "flops": "FLOPs: words that a query and a document share",
    "encode_ms_per_document": "milliseconds to encode a document",
}


def draw(results: dict[str, Any], path: Path) -> None:
    """Quality with its interval against a cost, on a logarithmic axis unless it is time, a panel per data set.

    Systems without that cost are lines across the panel.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cost = results.get("axis", "bytes_per_document")
    shown = results.get("drawn")
    placed = _points(results)
    points = [row for row in placed if shown is None or family_of(row) in shown]
    across = [row for row in results["rows"] if row["metric"] == "nDCG@10" and not row.get(cost)]
    datasets = list(dict.fromkeys(row["dataset"] for row in points))
    curves = [name for name in datasets if sum(row["dataset"] == name for row in points) > 2]
    datasets = curves or datasets  # beside real curves, a panel of two points only takes room
    colors = {family: f"C{number}" for number, family in enumerate(dict.fromkeys(map(family_of, points)))}
    columns = min(len(datasets), 2)
    rows = -(-len(datasets) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1 + 4.5 * columns, 0.6 + 3.2 * rows), squeeze=False, layout="constrained"
    )
    for unused in axes.flat[len(datasets) :]:
        unused.set_visible(False)
    for axis, dataset in zip(axes.flat, datasets, strict=False):
        _draw_curves(axis, [row for row in points if row["dataset"] == dataset], cost, colors)
        _draw_across(axis, [row for row in across if row["dataset"] == dataset])
        if results.get("gap"):
            _draw_gap(axis, [row for row in placed if row["dataset"] == dataset], results["gap"])
        axis.set_xscale("linear" if cost == "encode_ms_per_document" else "log")
        axis.margins(x=0.12)
        axis.set_title(dataset)
        axis.grid(alpha=0.3)
    figure.supxlabel(_AXIS_NAMES.get(cost, cost), fontsize="medium")
    second = f"; right: 0 is {results['gap'][0]}, 1 is {results['gap'][1]}" if results.get("gap") else ""
    figure.supylabel(f"nDCG@10 (95 % interval{second})", fontsize="medium")
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=2 * columns, frameon=False
    )
    figure.savefig(path, dpi=144)
    plt.close(figure)


def _draw_curves(axis: Any, rows: list[dict[str, Any]], cost: str, colors: dict[str, str]) -> None:
    """A curve for each family of systems, also for one that has none here: the first panel's legend is that of all."""
    named: set[str] = set()  # one name for points of several families at the same place
    for family, color in colors.items():
        mine = sorted((row for row in rows if family_of(row) == family), key=lambda row: row[cost])
        sizes, values = [row[cost] for row in mine], [row["value"] for row in mine]
        intervals = [row.get("interval", [row["value"]] * 2) for row in mine]
        errors = [[v - low for v, (low, _) in zip(values, intervals, strict=True)]]
        errors.append([high - v for v, (_, high) in zip(values, intervals, strict=True)])
        axis.errorbar(sizes, values, errors, fmt="o-", color=color, label=family, capsize=3, lw=1, elinewidth=0.8)
        for size, value, row in zip(sizes, values, mine, strict=True):
            label = row["system"].partition(", ")[2].replace("hierarchical ", "k=")
            if label in named and cost == "flops":
                continue
            named.add(label)
            below = (0, -12) if label == "mean" else (-2, 5)  # the mean and k=1 lie on one another
            axis.annotate(label, (size, value), below, textcoords="offset points", fontsize=7, ha="right")


def _draw_across(axis: Any, rows: list[dict[str, Any]]) -> None:
    for row, style in zip(rows, ("-", "--", ":", "-.") * len(rows), strict=False):
        axis.axhline(row["value"], ls=style, color="0.5", lw=1, label=row["system"])


def _draw_gap(axis: Any, rows: list[dict[str, Any]], ends: list[str]) -> None:
    """A second axis that counts 0 at one system and 1 at another, where they are far enough apart."""
    values = [row["value"] for name in ends for row in rows if row["system"] == name]
    low, high = values if len(values) == 2 else (0, 0)
    if high - low >= 0.02:  # of a smaller gap, a share says nothing
        axis.secondary_yaxis(
            "right", functions=(lambda y: (y - low) / (high - low), lambda share: low + share * (high - low))
        )


def family_of(row: Mapping[str, Any]) -> str:
    """What stands before the first comma of a system: the method, whose rows are one curve."""
    return str(row["system"].partition(", ")[0])


def _points(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that have a place in the picture."""
    cost = results.get("axis", "bytes_per_document")
    return [row for row in results["rows"] if row["metric"] == "nDCG@10" and row.get(cost)]


def provenance(command: str) -> dict[str, Any]:
    """Where numbers come from: command, date, commit, hardware and versions, as every results file records them."""
    packages = ("polyrep", "torch", "transformers", "sentence-transformers", "datasets", "accelerate")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {
        "command": command,
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _commit(),
        "hardware": hardware(),
        "versions": versions,
    }


def hardware() -> str:
    """Processor, threads and GPU of this process, on which times depend."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{_processor()}, {torch.get_num_threads()} threads{gpu}"


def _commit() -> str:
    """Commit of the clone that runs, with ``-dirty`` for uncommitted changes; ``unknown`` outside a clone."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():  # installed: a commit found further up would be somebody else's
        return "unknown"
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        described = subprocess.run(git, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return "unknown"
    return described.stdout.strip() or "unknown"


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _check_fields(entry: Any, layout: dict[str, Any], subject: str) -> None:
    for name, kind in layout.items():
        if not isinstance(entry, dict) or name not in entry or not isinstance(entry[name], kind):
            found = repr(entry.get(name, "nothing")) if isinstance(entry, dict) else repr(entry)
            raise InputError(f"{subject}: field {name!r} is {found}; the layout of results needs {kind}.")


def _mean_note(row: dict[str, Any]) -> str:
    """What stands behind the name of a benchmark, whose number is a mean over its tasks."""
    if "mean_of_tasks" not in row:
        return ""
    count, whole = row["mean_of_tasks"], row.get("tasks_of_benchmark", row["mean_of_tasks"])
    return f" (mean of {count} tasks)" if count == whole else f" (mean of {count} of its {whole} tasks)"


def _table_cells(system: str, metrics: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Cells of one row by column, empty where a figure does not apply; without nDCG@10, a column per metric."""
    if "nDCG@10" not in metrics:
        return {"system": system} | {metric: f"{row['value']:.4g}" for metric, row in metrics.items()}
    main = metrics["nDCG@10"]
    low, high = main.get("interval", (None, None))
    difference = ""
    if "difference" in main:
        p_value = f"p {main['p_value']:.3f}" if main["p_value"] >= 0.001 else "p < 0.001"
        difference = f"{main['difference']:+.3f} ({p_value})"
    latency = [_or(main.get(f"search_ms_{p}"), ".1f") for p in ("p50", "p99")]
    return {
        "system": system,
        "nDCG@10": f"{main['value']:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else ""),
        **{name: _or(metrics.get(name, {}).get("value"), ".3f") for name in METRIC_NAMES if name != "nDCG@10"},
        "gap closed": _or(main.get("gap_closed"), ".0%"),
        "retention": _or(main.get("retention"), ".0%"),
        "difference": difference,
        "bytes/doc": _or(main.get("bytes_per_document"), ",.0f"),
        "windows/doc": _or(main.get("windows_per_document"), ".1f"),
        "vectors/doc": _or(main.get("vectors_per_document"), ".1f"),
        "entries/doc": _or(main.get("entries_per_document"), ".1f"),
        "products": _or(main.get("products"), ".1f"),
        "longest list": _or(main.get("longest_list"), ",.0f"),
        "Gini of lists": _or(main.get("gini"), ".2f"),
        "without entries": _or(main.get("documents_without_entries"), ",.0f"),
        "active dims": _or(main.get("active_dims"), ".1f"),
        "query dims": _or(main.get("query_active_dims"), ".1f"),
        "FLOPs": _or(main.get("flops"), ".2f"),
        "MaxSim's 10 best in 100": _or(main.get("maxsim_top10_in_100"), ".3f"),
        "own words in top 20": _or(main.get("own_token_share"), ".2f"),
        "layer margin": _or(main.get("layer_margin"), ".2f"),
        "layer saturation": _or(main.get("layer_saturation"), ".3f"),
        "layer wins": _or(main.get("layer_wins"), ".3f"),
        "std of log variance": _or(main.get("log_variance_std"), ".3f"),
        "top 10 moved": _or(main.get("test_rank_change"), ".0%"),
        "encode docs/s": _or(main.get("encode_docs_per_s"), ",.0f"),
        "search ms (p50 / p99)": " / ".join(latency) + (" from disk" if main.get("from_memory_map") else "")
        if all(latency)
        else "",
        "fit s": _or(main.get("fit_seconds"), ".0f"),
        "front": ", ".join(main.get("pareto", [])),
    }


def _overlap_table(entries: list[dict[str, Any]]) -> list[str]:
    """Lines of a table: how alike each system's results for two wordings are, by groups of pairs."""
    table = []
    for entry in entries:
        cells = {"pairs": f"{entry['group']} ({entry['pairs']:,})", "system": entry["system"]}
        for name, measure in (("AO", "average_overlap"), ("JS", "jaccard"), ("RBO", "rbo"), ("flips", "flip_rate")):
            column = name if measure == "flip_rate" else f"{name}@{entry['k']}"
            cells[column] = _or(entry.get(measure), ".3f")
            if measure in ("average_overlap", "flip_rate") and f"{measure}_interval" in entry:
                cells[column] += " [{:.3f}, {:.3f}]".format(*entry[f"{measure}_interval"])
        if "flip_rate" in entry:
            for found in ("both", "one", "none"):
                overlap = _or(entry.get(f"average_overlap_{found}"), ".3f")
                cells[f"AO {found}"] = f"{overlap} ({entry[f'pairs_{found}']:,})".strip()
        cells["floor"] = _or(entry.get("floor"), ".3f")
        cells["nDCG@10 a / b"] = f"{entry['ndcg_a']:.3f} / {entry['ndcg_b']:.3f}"
        if entry["short_lists"]:
            cells["short lists"] = f"{entry['short_lists']:,}"
        table.append(cells)
    # The group that matters most comes first, whose systems stand side by side.
    groups = list(dict.fromkeys(entry["group"] for entry in entries))
    order = sorted(range(len(entries)), key=lambda number: groups.index(entries[number]["group"]))
    columns = list(dict.fromkeys(column for cells in table for column in cells))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return [*lines, *("| " + " | ".join(table[n].get(c, "") for c in columns) + " |" for n in order), ""]


def _settings_notes(rows: list[dict[str, Any]]) -> list[str]:
    """How systems were set, and on which data sets."""
    where: dict[str, list[str]] = {}
    for row in rows:
        if settings := row.get("settings"):
            said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())
            where.setdefault(f"{row['system']}: {said}", []).append(row["dataset"])
    return [f"{said} ({', '.join(dict.fromkeys(datasets))})." for said, datasets in where.items()]


def _or(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
