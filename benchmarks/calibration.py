"""Whether a probability that `polyrep calibrate` gives holds: fitted on dev, measured once on the test queries.

    python benchmarks/calibration.py --output results

Which inputs a map reads is chosen on dev by cross-validation; beside it stand the score alone, and maps that were
fitted on the other sets. `MODEL@SET,SET` measures a model on some sets alone.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import HfArgumentParser

from polyrep.data import load_retrieval_dataset
from polyrep.evaluation.calibrate import DEPTHS, Candidates, Map, candidates_of, choose, fit, reliability
from polyrep.evaluation.reliability import draw_panels, error_if_true, error_interval
from polyrep.hub import fetch, fingerprint, load
from polyrep.hub.folder import fastest_dtype
from polyrep.report import provenance, write_results

TARGET = 0.05


@dataclass
class Arguments:
    """What to measure."""

    models: list[str] = field(
        default_factory=lambda: [
            *("minilm", "models/gaussian-minilm-frozen/final", "models/dense2sparse-minilm/final"),
            "models/four/late-interaction-minilm/final",
        ],
        metadata={"help": "Folders, or minilm; MODEL@SET,SET for some sets alone."},
    )
    datasets: list[str] = field(
        default_factory=lambda: ["tldr_pages", "scitldr", "scifact"], metadata={"help": "Names or BEIR folders."}
    )
    depth: int = field(default=100, metadata={"help": "Candidates of a query."})
    seed: int = field(default=0, metadata={"help": "Of folds, bootstrap and draws."})
    cache_dir: str = field(default=".cache/embeddings", metadata={"help": "Embeddings."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that the models carry."})
    output: str | None = field(default=None, metadata={"help": "Folder for the JSON, Markdown and PNG."})
    name: str = field(default="calibration", metadata={"help": "Name of the files."})


def called(depth: int) -> str:
    """How many documents of a query count, in words."""
    return "best" if depth == 1 else f"{depth} best"


def between(row: dict[str, Any]) -> str:
    """Interval of a row, and what its map reads."""
    low, high = row["interval"]
    return f"{low:.3f} to {high:.3f}, from {' and '.join(row['inputs'])}"


def measured(chosen: Map, test: Candidates, seed: int) -> dict[str, dict[str, Any]]:
    """Metric -> fields of its row."""
    probability = np.where(test.there, chosen.probabilities(test), np.nan)
    found: dict[str, dict[str, Any]] = {}
    for depth in reversed(DEPTHS):
        some, relevant = probability[:, :depth], test.relevant[:, :depth]
        bins = reliability(probability, test)[depth]
        interval = error_interval(some, relevant, seed)
        found[f"ECE, {called(depth)}"] = {"value": bins.error, "interval": list(interval)}
        found[f"by chance, {called(depth)}"] = {"value": error_if_true(some[~np.isnan(some)], seed)}
    sure = probability[:, :10] >= 0.5
    found["documents with p >= 0.5, a query"] = {"value": float(sure.sum() / len(sure))}
    if sure.any():
        found["of these relevant"] = {"value": float(test.relevant[:, :10][sure].mean())}
    return found


def main() -> None:
    """Measure and write."""
    (args,) = HfArgumentParser([Arguments]).parse_args_into_dataclasses()
    made_by = provenance(shlex.join(["python", *sys.argv]))
    rows: list[dict[str, Any]] = []
    claims: list[dict[str, Any]] = []
    models: dict[str, str] = {}
    panels: dict[str, dict[str, Any]] = {
        f"{Path(source).name}, {called(depth)}": {} for depth in reversed(DEPTHS) for source in args.datasets
    }
    for entry in args.models:
        source, _, some = entry.partition("@")
        folder = fetch(source)
        model = load(folder, dtype=fastest_dtype("auto"), trust_remote_code=args.trust_remote_code)
        system = folder.parent.name if folder.name == "final" else source
        models[system] = fingerprint(folder)
        maps, tests, alone = {}, {}, {}
        for name in some.split(",") if some else args.datasets:
            parts = {}
            for split in ("dev", "test"):
                dataset = load_retrieval_dataset(name, split)
                options = {"cache_dir": args.cache_dir, "batch_size": 16, "dtype": "float16"}
                parts[split] = candidates_of(model, dataset, args.depth, **options)
            maps[dataset.name] = choose(parts["dev"], args.seed)[0]
            alone[dataset.name], tests[dataset.name] = fit(parts["dev"], ("score",)), parts["test"]
        for name, test in tests.items():
            base = {"system": system, "dataset": name, "split": "test", "queries": len(test.scores)}
            base["inputs"] = list(maps[name].weights)
            found = measured(maps[name], test, args.seed)
            for depth in reversed(DEPTHS):
                bins = reliability(alone[name].probabilities(test), test)[depth]
                found[f"score alone: ECE, {called(depth)}"] = {"value": bins.error}
            others = [reliability(maps[o].probabilities(test), test)[10].error for o in maps if o != name]
            if others:
                found["fitted on another set, worst: ECE, 10 best"] = {"value": max(others)}
            rows += [base | {"metric": metric, **fields} for metric, fields in found.items()]
            for depth in reversed(DEPTHS):
                value = found[f"ECE, {called(depth)}"]["value"]
                claim = f"calibration.ece: {system}, {name}, {called(depth)}"
                met = {"value": value, "target": TARGET, "met": bool(value <= TARGET)}
                claims.append({"claim": claim, "system": system, "split": "test", **met})
                bins = reliability(maps[name].probabilities(test), test)[depth]
                panels[f"{name}, {called(depth)}"][system] = bins
    results = made_by | {
        "name": args.name,
        "seeds": [args.seed],
        "models": models,
        "settings_tried": 1,
        "rows": rows,
        "claims": claims,
        "notes": [
            "ECE: expected calibration error on the test queries in ten bins of equal mass, of the best document of "
            "each query or of its ten best, by a map fitted on dev; 95 % bootstrap intervals over queries below. By "
            "chance: what is left of it on so many documents if every probability is true. A document that nobody "
            "judged counts as not relevant.",
            *(
                f"{row['system']} on {row['dataset']}, {row['metric']}: {between(row)}."
                for row in rows
                if "interval" in row
            ),
        ],
    }
    shown = {title: curves for title, curves in panels.items() if curves}
    picture = lambda _, path: draw_panels(path, shown)  # noqa: E731
    print(write_results(results, Path(args.output) if args.output else None, picture))


if __name__ == "__main__":
    main()
