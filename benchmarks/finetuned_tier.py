"""What the benchmarks of fine-tuned encoders share: a model for each form and seed, within a budget of time.

Every finished model is a line in ``<cache_dir>/<name>.jsonl``. A command ends when the next model would not fit into
its time budget, and goes on after the last line when it is started again.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import ROOT
from frozen_tier import DEPTH, gain_claim, significant
from transformers import HfArgumentParser

from polyrep.cli import train as train_run
from polyrep.data import load_retrieval_dataset
from polyrep.encoding import embed
from polyrep.evaluation.metrics import METRICS, per_query_metrics
from polyrep.evaluation.systems import Ranking, costs_of
from polyrep.evaluation.table import metric_rows
from polyrep.hub import fetch, fingerprint, load
from polyrep.hub.folder import fastest_dtype
from polyrep.report import provenance, write_results
from polyrep.search import exact_search
from polyrep.search.ranking import tie_ranks


@dataclass
class Arguments:
    """What to train and measure."""

    stage: str = field(default="dev", metadata={"help": "dev, test or table; see above."})
    datasets: list[str] = field(
        default_factory=lambda: ["tldr_pages", "scitldr", "scifact"], metadata={"help": "BEIR folders."}
    )
    backbone: str = field(default="minilm", metadata={"help": "Folder or Hub id of a SentenceTransformer."})
    forms: list[str] = field(default_factory=list, metadata={"help": "Names of rows; default: all, or the best."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds; dev takes the first."})
    time_budget: float = field(default=540.0, metadata={"help": "Seconds after which no further model is started."})
    max_steps: int = field(default=300, metadata={"help": "Steps of each model."})
    batch: int = field(default=128, metadata={"help": "Pairs of a step."})
    flags: str = field(default="", metadata={"help": "Flags of the run for every model, e.g. '--learning_rate 5e-5'."})
    cache_dir: str = field(default=".cache", metadata={"help": "Finished rows and mined negatives."})
    output: str | None = field(default=None, metadata={"help": "Folder for the JSON and Markdown."})
    name: str = field(default="", metadata={"help": "Name of the files; default: the benchmark's."})


@dataclass
class Tier:
    """One benchmark.

    Attributes:
        name: Of its files.
        control: The form that all others are tested against.
        forms: Form -> flags.
        claims: Claim -> the forms of which the best on dev makes it, and its target in points.
        run_of: Form -> the run that its flags are of.
        monitors: Beginnings of what is logged and kept.
        code: Files that a row depends on.
        matched: Form -> controls that learned from what it did, of which the best on dev is its own; default: control.
    """

    name: str
    control: str
    forms: Mapping[str, list[str]]
    claims: Mapping[str, tuple[Sequence[str], float]]
    run_of: Callable[[str], str]
    monitors: tuple[str, ...]
    code: Sequence[Path]
    matched: Callable[[str], Sequence[str]] | None = None

    def control_of(self, form: str, on_dev: Mapping[str, float]) -> str:
        """The control that a form is held to."""
        found = [name for name in (self.matched(form) if self.matched else ()) if name in on_dev]
        return max(found, key=lambda name: on_dev[name], default=self.control)

    def competing(self) -> list[str]:
        """Forms that are chosen among."""
        return list(dict.fromkeys(form for forms, _ in self.claims.values() for form in forms))


class Rows:
    """Finished models, a line each."""

    def __init__(self, args: Arguments, tier: Tier):
        code = [hashlib.sha256(file.read_bytes()).hexdigest() for file in tier.code]
        same = ("datasets", "backbone", "max_steps", "batch", "flags")
        depends = {name: getattr(args, name) for name in same} | {"code": code, "forms": tier.forms}
        runs = sorted({tier.run_of(form) for form in tier.forms})
        files = [file for run in runs for file in sorted((ROOT / "hub_configs" / run).iterdir())]
        depends["runs"] = [file.read_text(encoding="utf-8") for file in files]
        splits = ("train", "dev", "test")
        depends["splits"] = [load_retrieval_dataset(s, split).qrels for s in args.datasets for split in splits]
        self.key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:12]
        self.path = Path(args.cache_dir) / f"{args.name}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def all(self, split: str) -> dict[tuple[str, int], dict[str, Any]]:
        """Rows of a split by form and seed; a line cut off by an interruption is left out, and made again."""
        found: dict[tuple[str, int], dict[str, Any]] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if (row["key"], row["split"]) == (self.key_of(row["form"]), split):
                found[row["form"], row["seed"]] = row
        return found

    def append(self, row: dict[str, Any]) -> None:
        """Add a finished row."""
        whole = not self.path.is_file() or not (content := self.path.read_bytes()) or content.endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(("" if whole else "\n") + json.dumps(row | {"key": self.key_of(row["form"])}) + "\n")

    def key_of(self, form: str) -> str:
        """What a row of a form depends on, as a hash: here, what all rows do."""
        return self.key


def trained(args: Arguments, tier: Tier, form: str, seed: int, output: Path) -> tuple[Path, dict[str, float]]:
    """Train one model into ``output``.

    Returns:
        Its folder, and what was monitored.
    """
    argv = [tier.run_of(form), "--backbone", args.backbone, "--datasets", *args.datasets]
    argv += ["--output_dir", str(output), "--seed", str(seed), "--max_steps", str(args.max_steps)]
    argv += ["--save_strategy", "no", "--per_device_train_batch_size", str(args.batch)]
    argv += ["--mined_cache", f"{args.cache_dir}/mined"]
    final = train_run([*argv, *tier.forms[form], *shlex.split(args.flags)], prog="train.py")
    assert final is not None
    log = json.loads((output / "training.json").read_text(encoding="utf-8"))["log"]
    logged = next((entry for entry in reversed(log) if "loss" in entry), {})
    return final, {name: value for name, value in logged.items() if name.startswith(tier.monitors)}


def measured(args: Arguments, tier: Tier, form: str, seed: int, split: str) -> dict[str, Any]:
    """Train one model and measure it: rankings of every set, what it cost, and what was monitored."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        final, monitors = trained(args, tier, form, seed, Path(scratch) / "model")
        model = load(final, dtype=fastest_dtype("auto"))
        model.max_seq_length = 256
        datasets: dict[str, Any] = {}
        for source in args.datasets:
            dataset = load_retrieval_dataset(source, split)
            documents = embed(model, dataset.corpus, task="document", name=dataset.name, batch_size=128)
            queries = embed(model, dataset.queries, task="query", name=f"{dataset.name}-{split}", batch_size=128)
            positions, scores = exact_search(
                queries,
                documents,
                tie_ranks(list(dataset.corpus)),
                similarity=str(model.similarity_fn_name),
                k=DEPTH,
                device=model.device,
            )
            found = per_query_metrics(dataset, Ranking(form, positions, scores))
            datasets[dataset.name] = {
                "metrics": {name: [round(float(v), 5) for v in values] for name, values in found.items()},
                "costs": costs_of(queries, documents),
            }
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    seconds = round(time.perf_counter() - started, 1)
    return {"form": form, "seed": seed, "split": split, "seconds": seconds, **monitors, "datasets": datasets}


def macro(row: dict[str, Any]) -> float:
    """Mean nDCG@10 of the sets."""
    return float(np.mean([np.mean(part["metrics"]["nDCG@10"]) for part in row["datasets"].values()]))


def best_on_dev(rows: Rows, tier: Tier, seed: int, count: int) -> list[str]:
    """The competing forms that were best on dev, and the best of each claim."""
    found = rows.all("dev")
    ordered = sorted((f for f in tier.competing() if (f, seed) in found), key=lambda form: -macro(found[form, seed]))
    firsts = [next((form for form in ordered if form in forms), None) for forms, _ in tier.claims.values()]
    chosen = list(dict.fromkeys([*ordered[:count], *filter(None, firsts)]))
    values = {form: macro(row) for (form, other), row in found.items() if other == seed}
    return list(dict.fromkeys([*(tier.control_of(form, values) for form in chosen), *chosen]))


def run(tier: Tier) -> None:
    """Train what is missing, or write the table."""
    (args,) = HfArgumentParser([Arguments]).parse_args_into_dataclasses()
    args.name = args.name or tier.name
    rows, started = Rows(args, tier), time.perf_counter()
    if args.stage == "table":
        print(table(args, tier, rows))
        return
    if args.stage == "dev":
        wanted = [(form, args.seeds[0]) for form in args.forms or tier.forms]
    else:
        forms = args.forms or list(dict.fromkeys([tier.control, *best_on_dev(rows, tier, args.seeds[0], 3)]))
        if len(forms) < 2:
            sys.exit("--stage test: no form has a row on dev yet. Run --stage dev first, or name --forms.")
        wanted = [(form, seed) for form in forms for seed in args.seeds]
    missing = [pair for pair in wanted if pair not in rows.all(args.stage)]
    longest = max((row["seconds"] for row in rows.all(args.stage).values()), default=0.0)
    for done, (form, seed) in enumerate(missing):
        left = args.time_budget - (time.perf_counter() - started)
        if left < longest:
            print(f"{len(missing) - done} of {len(wanted)} models are left; run the same command again.")
            return
        row = measured(args, tier, form, seed, args.stage)
        rows.append(row)
        longest = max(longest, row["seconds"])
        print(f"{form:<44} seed {seed} {args.stage} {100 * macro(row):.2f} in {row['seconds']:.0f} s", flush=True)
    print(f"all {len(wanted)} models of {args.stage} are done.")


def table(args: Arguments, tier: Tier, rows: Rows) -> str:
    """Results of what was measured on test, with the claims."""
    found, on_dev = rows.all("test"), rows.all("dev")
    forms = list(dict.fromkeys(form for form, _ in found))
    names = [Path(source).name for source in args.datasets]
    if tier.control not in forms:
        sys.exit("--stage table: the control has no row on test yet. Run --stage dev, then --stage test.")
    partial = {form: sorted(seed for other, seed in found if other == form) for form in forms}
    if unfinished := [form for form, seeds in partial.items() if seeds != sorted(args.seeds)]:
        sys.exit(
            f"--stage table: {unfinished[0]!r} has seeds {partial[unfinished[0]]} only. Finish --stage test first."
        )
    values: dict[str, dict[str, dict[str, np.ndarray]]] = {name: {} for name in names}
    lines = []
    for name in names:
        costs = {}
        for form in forms:
            seeds = [row for (other, _), row in found.items() if other == form]
            parts = [row["datasets"][name] for row in seeds]
            values[name][form] = {metric: np.array([part["metrics"][metric] for part in parts]) for metric in METRICS}
            monitors = [monitor for monitor in seeds[0] if monitor.startswith(tier.monitors)]
            costs[form] = parts[0]["costs"] | {k: float(np.mean([row[k] for row in seeds])) for k in monitors}
        lines += metric_rows(name, "test", values[name], costs, tier.control)
    means = {name: {form: v["nDCG@10"].mean(0) for form, v in values[name].items()} for name in names}
    first = {form: macro(row) for (form, seed), row in on_dev.items() if seed == args.seeds[0]}
    control = {form: tier.control_of(form, {name: v for name, v in first.items() if name in forms}) for form in forms}
    claims: list[dict[str, Any]] = []
    for claim, (group, target) in tier.claims.items():
        if known := [form for form in forms if form in group]:
            best = max(known, key=lambda form: first.get(form, 0.0))
            entry = gain_claim(claim, means, best, control[best], target) | {"control": control[best]}
            claims.append(entry | {"met": entry["value"] >= target, "held_to": "value"} if target else entry)
    if claims:
        tested, best = list(dict.fromkeys(entry["system"] for entry in claims)), claims[-1]["system"]
        better = significant(means, tested, control[best])[best]
        claim = f"{tier.name.partition('-')[0]}.significant_datasets"
        entry = {"claim": claim, "value": len(better), "target": 2, "met": len(better) >= 2}
        claims.append(entry | {"system": best, "datasets": better, "split": "test"})
    results = provenance(shlex.join(["python", *sys.argv])) | {
        "name": args.name,
        "seeds": args.seeds,
        "settings_tried": len(on_dev),
        "models": {args.backbone: fingerprint(fetch(args.backbone))},
        "drawn": [],
        "rows": lines,
        "dev": {form: macro(row) for (form, _), row in on_dev.items()},
        "claims": claims,
    }
    return write_results(results, Path(args.output) if args.output else None)
