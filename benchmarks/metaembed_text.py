"""What nested vectors of a trained encoder gain at every size, beside controls of the same steps, pairs and start.

    python benchmarks/metaembed_text.py --stage dev       # every form and setting with one seed; again until done
    python benchmarks/metaembed_text.py --stage test      # what dev chose, with every seed; again until done
    python benchmarks/metaembed_text.py --stage costs     # seconds to encode, memory of a step
    python benchmarks/metaembed_text.py --stage table --output results

Models are trained on the union of the train sets, each once for a form, a setting and a seed. MetaEmbed, one vector,
the mean with a projection and late interaction are tuned on dev; the other forms take over MetaEmbed's setting. Of one
model of meta tokens come all numbers of vectors. Of the late-interaction model come hierarchical pooling and ReinPool,
which is fitted to the vectors of each data set, of as many bytes. A model is measured on dev and test as soon as it is
there; what is chosen follows from dev alone.

Every finished one is a line in ``<cache_dir>/metaembed-text.jsonl``. A command ends when the next would not fit into
``--time_budget``, and goes on after the last line when it is started again.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
from frozen_tier import at_most
from metaembed_claims import draw, gain, gap_closed, monotone
from metaembed_costs import costs
from metaembed_study import (
    ALIKE,
    LADDERS,
    LATE,
    MEAN,
    NESTED,
    NO_RESIDUAL,
    NOT_NESTED,
    PAPER,
    SINGLE,
    TUNED,
    Arguments,
    Study,
)
from metaembed_study import FORMS as ALL_FORMS
from transformers import HfArgumentParser

from polyrep.data.named import made_here
from polyrep.errors import InputError
from polyrep.evaluation.bm25 import rank_with_bm25
from polyrep.evaluation.frontier.pooling import LADDER
from polyrep.evaluation.metrics import METRICS, per_query_metrics
from polyrep.evaluation.table import metric_rows
from polyrep.hub import fetch, fingerprint
from polyrep.report import print_and_write, provenance

STAGES = ("dev", "test", "costs", "table")
MOST = LADDER[-1]
LINES = {NESTED: "C0", LADDERS: "C1", "hierarchical": "C2", NOT_NESTED: "C4"}
ACROSS = {LATE: "-", SINGLE: "--", MEAN: "-.", "BM25": ":"}


class Table:
    """What was found on test, by data set, row and seed.

    Args:
        study: Whose rows are all there.
    """

    def __init__(self, study: Study):
        self.study = study
        self.metrics: dict[str, dict[str, dict[str, np.ndarray]]] = {}  # data set -> row -> metric -> (seeds, queries)
        self.costs: dict[str, dict[str, dict[str, float]]] = {}
        self.tests: dict[str, dict[str, dict[int, np.ndarray]]] = {}
        found: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
        self.models: dict[str, list[dict[str, Any]]] = {}
        for job in study.jobs("test"):
            row = study.found.get((job.key, job.seed))
            if row is None:
                raise InputError(
                    f"--stage table: {job.key} with seed {job.seed} has no row yet, so a mean over the seeds would "
                    "lack it. Run --stage test first, until it says that all is done."
                )
            self.models.setdefault(job.form, []).append(row)
            for dataset, measured in row["datasets"].items():
                for name, entry in measured["test"].items():
                    found.setdefault(dataset, {}).setdefault(name, {})[job.seed] = entry
        for source in study.args.datasets:
            dataset = study.dataset(source, "test")
            self._add(dataset.name, found[dataset.name])
            ranking = rank_with_bm25(dataset, 100)
            values = per_query_metrics(dataset, ranking)
            self.metrics[dataset.name]["BM25"] = {metric: values[metric][None] for metric in METRICS}
            self.costs[dataset.name]["BM25"] = ranking.costs
            self.tests[dataset.name]["BM25"] = dict.fromkeys(study.args.seeds, values["nDCG@10"])

    def _add(self, dataset: str, found: dict[str, dict[int, dict[str, Any]]]) -> None:
        """Rows of a data set, of which each has its seeds."""
        self.metrics[dataset], self.costs[dataset], self.tests[dataset] = {}, {}, {}
        for name, seeds in found.items():
            entries = list(seeds.values())
            several = {metric: np.array([entry["metrics"][metric] for entry in entries]) for metric in METRICS}
            self.metrics[dataset][name] = several
            known = [entry["costs"] for entry in entries]
            self.costs[dataset][name] = {cost: float(np.mean([of[cost] for of in known])) for cost in known[0]}
            self.tests[dataset][name] = dict(zip(seeds, several["nDCG@10"], strict=True))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of all data sets, tested against late interaction, or where it was left out, all vectors."""
        reference = LATE if LATE in self.study.forms else f"{NESTED}, {MOST}"
        return [
            row
            for name in self.metrics
            for row in metric_rows(name, "test", self.metrics[name], self.costs[name], reference)
        ]

    # Claims

    @property
    def claims(self) -> list[dict[str, Any]]:
        """What can be claimed of what is there."""
        tests, whole = self.tests, f"{NESTED}, {MOST}"
        found = gain("metaembed.gain_over_single", tests, whole, SINGLE)
        found += gain("metaembed.mmr_gain_1", tests, f"{NESTED}, 1", f"{NOT_NESTED}, 1", 3.0, by_value=True)
        found += gain("metaembed.mmr_cost_full", tests, whole, f"{NOT_NESTED}, {MOST}", -0.5, by_value=True)
        for k in LADDER:
            ours, target = f"{NESTED}, {k}", 0.0 if k <= 8 else -0.5
            found += gain(f"metaembed.margin_over_hierarchical_{k}", tests, ours, f"hierarchical, {k}", target)
            found += gain(f"metaembed.margin_over_reinpool_{k}", tests, ours, f"{LADDERS}, {k}", -0.5)
        found += gap_closed("metaembed.gap_closed_8", tests, f"{NESTED}, 8", MEAN, LATE)
        found += gain("metaembed.residual_gain", tests, whole, f"{NO_RESIDUAL}, {MOST}")
        found += monotone("metaembed.monotone_steps", tests, NESTED)
        return [*found, *self._of_models(), *self._ratios()]

    def _of_models(self) -> list[dict[str, Any]]:
        """How alike a document's vectors are, and by how much fewer differ from the first of all."""
        models = self.models[NESTED]
        common: dict[str, Any] = {"system": NESTED, "split": "test"}
        found = [at_most("metaembed.prefix_error", max(row["prefix_error"] for row in models), 1e-6) | common]
        by_dataset = {name: float(np.mean([row["cosine_8"][name] for row in models])) for name in self.metrics}
        mean = float(np.mean(list(by_dataset.values())))
        return [*found, at_most("metaembed.pairwise_cosine_8", mean, 0.9, by_dataset=by_dataset) | common]

    def _ratios(self) -> list[dict[str, Any]]:
        """What 8 vectors of a query and 32 of a document cost, as a share of all tokens."""
        found = []
        for claim, cost in (("search_ratio", "search_ms_p50"), ("index_ratio", "bytes_per_document")):
            if LATE in self.study.forms:
                by_dataset = {name: of[f"{NESTED}, {MOST}"][cost] / of[LATE][cost] for name, of in self.costs.items()}
                mean = float(np.mean(list(by_dataset.values())))
                entry = at_most(f"metaembed.{claim}", mean, 0.35, by_dataset=by_dataset)
                found.append(entry | {"system": f"{NESTED}, {MOST}", "control": LATE, "split": "test"})
        return found


def cost_claims(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """What meta tokens cost to encode and to train."""
    time, memory = figures["encode_overhead"], figures["step_memory_ratio"]
    return [
        at_most("metaembed.encode_overhead", time, 1.35, seconds=figures["encode_seconds"], system=NESTED),
        at_most("metaembed.step_memory_ratio", memory, 1.4, bytes=figures["step_bytes"], system=NESTED),
    ]


def notes(study: Study) -> list[str]:
    """What a reader of the tables should know."""
    args = study.args
    chosen = [f"{form}: --learning_rate {study.choice(form)}" for form in TUNED if form in study.forms]
    tried = sum(len(study.tries(form)) for form in TUNED if form in study.forms)
    found = [
        f"Each model: {args.max_steps} steps of {args.batch} pairs of {', '.join(args.datasets)} together, texts cut "
        f"at {args.max_length} tokens while training and at {args.encoded_length} in the index. {'; '.join(chosen)}, "
        f"chosen on dev among {tried} with seed {args.seeds[0]}.",
    ]
    others = [form for form in study.forms if form not in TUNED]
    if others:
        seeds = ", ".join(map(str, args.ablation_seeds))
        found.append(f"{', '.join(others)}: with MetaEmbed's setting and seeds {seeds} alone, as in the claims.")
    if PAPER in others:
        found.append(f"{PAPER}: 16 vectors of a query and 64 of a document, with a group of (16, 32) that it has not.")
    if study.pools:
        found.append(
            f"hierarchical and {LADDERS}: of the {LATE} model of the same seed; {LADDERS} is fitted to each data set, "
            f"{' '.join(ALIKE)} at --learning_rate {study.choice(LADDERS)}."
        )
    return found


def checked(args: Arguments) -> Arguments:
    """The arguments; InputError for those that do not go together."""
    if args.stage not in STAGES:
        raise InputError(f"--stage {args.stage}: unknown. There are {', '.join(STAGES)}.")
    known = [*ALL_FORMS, LADDERS]
    if unknown := [form for form in args.forms if form not in known]:
        raise InputError(f"--forms {', '.join(unknown)}: unknown. There are {', '.join(map(repr, known))}.")
    if args.tries < 1:
        raise InputError(f"--tries {args.tries}: nothing would be there to choose. Use 1 or more.")
    if LADDERS in args.forms and LATE not in args.forms:
        raise InputError(f"--forms: {LADDERS} pools the vectors of {LATE!r}, which is not among them. Name it, too.")
    if beyond := sorted(set(args.ablation_seeds) - set(args.seeds)):
        raise InputError(
            f"--ablation_seeds {' '.join(map(str, beyond))}: not among --seeds {' '.join(map(str, args.seeds))}, so "
            "MetaEmbed would have no model to compare them with. Name some of those."
        )
    return args


def main() -> None:
    """Make what a stage lacks, or write the table."""
    args = checked(HfArgumentParser([Arguments]).parse_args_into_dataclasses()[0])
    study = Study(args)
    if args.stage in ("dev", "test"):
        study.run(args.stage)
        return
    figures = costs(study)
    if args.stage == "costs":
        print(figures)
        return
    table = Table(study)
    results = provenance(shlex.join(["python", *sys.argv])) | {
        "name": args.name,
        "seeds": args.seeds,
        "settings_tried": sum(len(study.tries(form)) for form in [*TUNED, LADDERS] if form in args.forms),
        "models": {args.backbone: fingerprint(fetch(args.backbone))},
        "data": made_here(*args.datasets),
        "rows": table.rows,
        "dev": {form: study.on_dev(form) for form in [*TUNED, LADDERS] if form in args.forms},
        "claims": [*table.claims, *cost_claims(figures)],
        "notes": notes(study),
    }
    print_and_write(results, Path(args.output) if args.output else None, lambda r, path: draw(r, path, LINES, ACROSS))


if __name__ == "__main__":
    main()
