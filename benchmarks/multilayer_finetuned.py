"""What several layers gain when the whole encoder is trained: every form beside the dual encoder.

    python benchmarks/multilayer_finetuned.py --stage dev --time_budget 540     # all forms, one seed; again until done
    python benchmarks/multilayer_finetuned.py --stage test --time_budget 540    # the control and the best three
    python benchmarks/multilayer_finetuned.py --stage table --output results

A model is trained on the union of the train sets for each form and seed, and every finished one is a line in
``<cache_dir>/multilayer-finetuned.jsonl``. A command ends when the next model would not fit into its time budget, and
goes on after the last line when it is started again. Meant for a GPU; ``--max_steps 2`` tries it on any machine.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import multilayer_frozen as frozen
import numpy as np
import torch
from transformers import HfArgumentParser

from polyrep.cache import embed
from polyrep.data import load_retrieval_dataset
from polyrep.evaluation import METRICS, macro_interval, metric_rows, per_query_metrics
from polyrep.hub import fastest_dtype, fetch, fingerprint, load
from polyrep.report import provenance, write_results
from polyrep.retrievers import Ranking, costs_of
from polyrep.scoring import exact_search, tie_ranks
from polyrep.training import train as train_run

ROOT = Path(__file__).parent.parent
CONTROL, FOUR, SEVEN = frozen.CONTROL, frozen.FOUR, frozen.SEVEN


def _form(pooling: str, layers: str = "-1 -3", *rest: str, lambda_: str = "0") -> list[str]:
    return ["--pooling", pooling, "--layers", *layers.split(), "--lambda_", lambda_, *rest]


PUBLISHED: dict[str, list[str]] = {
    "mean [-1,-3]": _form("mean"),
    "scalar mix [-1,-3]": _form("scalar_mix"),
    "scalar mix [-1,-5]": _form("scalar_mix", "-1 -5"),
    "multi [-1,-3]": _form("multi"),
    "multi [-1..-4]": _form("multi", FOUR),
    "last + regulariser 0.1": _form("last", lambda_="0.1"),
    "last + regulariser 1": _form("last", lambda_="1"),
    **{f"self-contrastive [-1,-3], lambda {w}": _form("self_contrastive", lambda_=w) for w in ("0", "0.1", "1")},
    "self-contrastive [-1,-5], lambda 0.1": _form("self_contrastive", "-1 -5", lambda_="0.1"),
}
OURS: dict[str, list[str]] = {
    "self-contrastive, learned temperature": _form("self_contrastive", "-1 -3", "--learn_tau", "true", lambda_="0.1"),
    "self-contrastive, stop-gradient": _form("self_contrastive", "-1 -3", "--mode", "stop_gradient", lambda_="0.1"),
    "self-contrastive, margin": _form("self_contrastive", "-1 -3", "--mode", "margin", lambda_="0.1"),
    "self-contrastive, random layer": _form("self_contrastive", SEVEN, "--random_layer", "true", lambda_="0.1"),
    "self-contrastive, queries too": _form("self_contrastive", "-1 -3", "--query_side", "true", lambda_="0.1"),
    "linear, all layers": _form("linear", SEVEN),
    "early layers too": _form("last", "-1 -2 -3 -4 -5 -6", "--early_weight", "0.5"),
}
CLS = ["--token", "cls", "--normalize", "false", "--tau", "1"]
BESIDE: dict[str, list[str]] = {
    "dual encoder, [CLS] and dot product": _form("last", "-1", *CLS),
    "self-contrastive, [CLS] and dot product": _form("self_contrastive", "-1 -3", *CLS, lambda_="1"),
}
RUNS = ("multilayer-minilm", "multilayer-minilm-multi")
SETTINGS = {CONTROL: _form("last", "-1"), **PUBLISHED, **OURS, **BESIDE}


@dataclass
class Arguments:
    """What to train and measure."""

    stage: str = field(default="dev", metadata={"help": "dev, test or table; see above."})
    datasets: list[str] = field(
        default_factory=lambda: ["data/tldr_pages", "data/scitldr", "data/scifact"], metadata={"help": "BEIR folders."}
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
    name: str = field(default="multilayer-finetuned", metadata={"help": "Name of the files."})


class Rows:
    """Finished models, a line each."""

    def __init__(self, args: Arguments):
        code = [hashlib.sha256(file.read_bytes()).hexdigest() for file in frozen.CODE]
        same = ("datasets", "backbone", "max_steps", "batch", "flags")
        depends = {name: getattr(args, name) for name in same} | {"code": code, "forms": SETTINGS}
        runs = [file for run in RUNS for file in sorted((ROOT / "hub_configs" / run).iterdir())]
        depends["runs"] = [file.read_text(encoding="utf-8") for file in runs]
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
            if (row["key"], row["split"]) == (self.key, split):
                found[row["form"], row["seed"]] = row
        return found

    def append(self, row: dict[str, Any]) -> None:
        """Add a finished row."""
        whole = not self.path.is_file() or not (content := self.path.read_bytes()) or content.endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(("" if whole else "\n") + json.dumps(row | {"key": self.key}) + "\n")


def measured(args: Arguments, form: str, seed: int, split: str) -> dict[str, Any]:
    """Train one model and measure it: rankings of every set, what it cost, and what was monitored."""
    flags = SETTINGS[form]
    run = RUNS["multi" in flags[1]]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        argv = [run, "--backbone", args.backbone, "--datasets", *args.datasets, "--output_dir", f"{scratch}/model"]
        argv += ["--seed", str(seed), "--max_steps", str(args.max_steps), "--save_strategy", "no"]
        argv += ["--per_device_train_batch_size", str(args.batch), "--mined_cache", f"{args.cache_dir}/mined"]
        final = train_run([*argv, *flags, *shlex.split(args.flags)], prog="train.py")
        log = json.loads((Path(scratch) / "model" / "training.json").read_text(encoding="utf-8"))["log"]
        assert final is not None
        model = load(final, trust_remote_code=True, dtype=fastest_dtype("auto"))
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
                k=frozen.DEPTH,
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
    logged = next((entry for entry in reversed(log) if "loss" in entry), {})
    monitors = {k: v for k, v in logged.items() if k.startswith("layer_")}
    seconds = round(time.perf_counter() - started, 1)
    return {"form": form, "seed": seed, "split": split, "seconds": seconds, **monitors, "datasets": datasets}


def macro(row: dict[str, Any]) -> float:
    """Mean nDCG@10 of the sets."""
    return float(np.mean([np.mean(part["metrics"]["nDCG@10"]) for part in row["datasets"].values()]))


def best_on_dev(rows: Rows, seed: int, count: int) -> list[str]:
    """The forms that were best on dev, and the best published one, never the rows that stand beside."""
    found = rows.all("dev")
    known = [form for form in [*PUBLISHED, *OURS] if (form, seed) in found]
    ordered = sorted(known, key=lambda form: -macro(found[form, seed]))
    return list(dict.fromkeys([*ordered[:count], *[form for form in ordered if form in PUBLISHED][:1]]))


def main() -> None:
    """Train what is missing, or write the table."""
    (args,) = HfArgumentParser([Arguments]).parse_args_into_dataclasses()
    rows, started = Rows(args), time.perf_counter()
    if args.stage == "table":
        print(table(args, rows))
        return
    if args.stage == "dev":
        wanted = [(form, args.seeds[0]) for form in args.forms or SETTINGS]
    else:
        forms = args.forms or [CONTROL, *best_on_dev(rows, args.seeds[0], 3)]
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
        row = measured(args, form, seed, args.stage)
        rows.append(row)
        longest = max(longest, row["seconds"])
        print(f"{form:<44} seed {seed} {args.stage} {100 * macro(row):.2f} in {row['seconds']:.0f} s", flush=True)
    print(f"all {len(wanted)} models of {args.stage} are done.")


def table(args: Arguments, rows: Rows) -> str:
    """Results of what was measured on test, with the claims."""
    found, on_dev = rows.all("test"), rows.all("dev")
    forms = list(dict.fromkeys(form for form, _ in found))
    names = [Path(source).name for source in args.datasets]
    if CONTROL not in forms:
        sys.exit("--stage table: the control has no row on test yet. Run --stage dev, then --stage test.")
    values: dict[str, dict[str, dict[str, np.ndarray]]] = {name: {} for name in names}
    lines = []
    for name in names:
        costs = {}
        for form in forms:
            seeds = [row for (other, _), row in found.items() if other == form]
            parts = [row["datasets"][name] for row in seeds]
            values[name][form] = {metric: np.array([part["metrics"][metric] for part in parts]) for metric in METRICS}
            monitors = [name for name in seeds[0] if name.startswith("layer_")]
            costs[form] = parts[0]["costs"] | {k: float(np.mean([row[k] for row in seeds])) for k in monitors}
        lines += metric_rows(name, "test", values[name], costs, CONTROL)
    partial = {form: sorted(seed for other, seed in found if other == form) for form in forms}
    if unfinished := [form for form, seeds in partial.items() if seeds != sorted(args.seeds)]:
        sys.exit(
            f"--stage table: {unfinished[0]!r} has seeds {partial[unfinished[0]]} only. Finish --stage test first."
        )
    means = {name: {form: v["nDCG@10"].mean(0) for form, v in values[name].items()} for name in names}
    first = {form: row for (form, seed), row in on_dev.items() if seed == args.seeds[0]}
    claims, best = [], ""
    for claim, group in (("gain_finetuned", PUBLISHED), ("gain_best_form_finetuned", PUBLISHED | OURS)):
        known = [form for form in forms if form in group]
        if not known:
            continue
        best = max(known, key=lambda form: macro(first[form]) if form in first else 0.0)
        gains = {name: 100 * (means[name][best] - means[name][CONTROL]) for name in names}
        by_dataset = {name: float(gain.mean()) for name, gain in gains.items()}
        value = float(np.mean(list(by_dataset.values())))
        entry = {"claim": f"multilayer.{claim}", "value": value, "target": 0.5, "met": value >= 0.5, "system": best}
        interval = list(macro_interval(gains))
        claims.append(entry | {"interval": interval, "split": "test", "by_dataset": by_dataset})
    if claims:
        tested = list(dict.fromkeys(entry["system"] for entry in claims))
        better = frozen.significant(means, tested, CONTROL)[best]
        entry = {"claim": "multilayer.significant_datasets", "value": len(better), "target": 2}
        claims.append(entry | {"met": len(better) >= 2, "system": best, "datasets": better, "split": "test"})
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


if __name__ == "__main__":
    main()
