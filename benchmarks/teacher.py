r"""Does a real teacher, a cross-encoder that reads query and document together, move what labels could not?

    train="accelerate launch train.py hub_configs/late-interaction-minilm --datasets tldr_pages"
    taught="--objective LateInteractionObjective --hard_negatives 3 --teacher cross-encoder/ms-marco-MiniLM-L12-v2"
    $train --output_dir models/taught/labels
    $train --output_dir models/taught/negatives --objective LateInteractionObjective --hard_negatives 3
    $train --output_dir models/taught/teacher $taught --distill_weight 1 --distill scores
    python benchmarks/teacher.py --teacher cross-encoder/ms-marco-MiniLM-L12-v2 --output results \
        --late models/taught/labels/final models/taught/negatives/final models/taught/teacher/final

Each method learns with its teacher and without, and so does its control: same pairs, same negatives, same steps.
Weights are chosen on dev with the first seed. What the teacher makes of the dense model's 50 best is in the table:
nobody learns more from it than it knows. Late interaction is trained beforehand, as above, and measured on
``--late_dataset`` alone.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import frozen_tier
import gaussian_frozen
import multilayer_frozen
import numpy as np
import reinpool_text
from bench import code_of
from frozen_tier import chosen_on_dev, gain_claim, test_tables
from transformers import HfArgumentParser

from polyrep.data import load_retrieval_dataset
from polyrep.data.named import made_here
from polyrep.evaluation.bm25 import rank_with_bm25
from polyrep.evaluation.metrics import per_query_metrics
from polyrep.evaluation.rerank import Reranker
from polyrep.evaluation.systems import Ranking, rank_embeddings, rank_with_model
from polyrep.evaluation.table import display_name, table_rows
from polyrep.hub import fetch, fingerprint, load
from polyrep.hub.folder import fastest_dtype
from polyrep.report import print_and_write, provenance
from polyrep.training.pairs import HeadData
from polyrep.training.teachers import open_teacher

NEGATIVES = "--negatives 4 --depth 8"
"""Of every fit, taught or not: what the teacher is asked about, a few of the nearest."""

WEIGHTS = ("0.1", "0.3", "1")
FOLLOW = {"by order": "order", "by scores": "scores"}


@dataclass
class Arguments(frozen_tier.Arguments):
    """What to fit and measure."""

    datasets: list[str] = field(
        default_factory=lambda: ["tldr_pages", "scifact"], metadata={"help": "Names or BEIR folders."}
    )
    teacher: str = field(default="cross-encoder/ms-marco-MiniLM-L12-v2", metadata={"help": "Who teaches."})
    several: str = field(
        default="models/four/late-interaction-minilm/final",
        metadata={"help": "A model with several vectors a text, for ReinPool."},
    )
    late: list[str] = field(
        default_factory=list, metadata={"help": "Late interaction by labels, then others that are compared with it."}
    )
    late_dataset: str = field(default="tldr_pages", metadata={"help": "What those learned from."})
    flags: str = field(default=NEGATIVES, metadata={"help": "Flags of the run for every fit."})
    note: list[str] = field(default_factory=list, metadata={"help": "Sentences below the tables, on the models."})
    name: str = field(default="teacher", metadata={"help": "Name of the files."})


class Vectors(gaussian_frozen.Bench):
    """Gaussian and its control, on cached vectors."""


class Layers(multilayer_frozen.Bench):
    """MultiLayer and its control, on cached layers."""

    def __init__(self, args: Arguments, source: str, model: Any, teacher: Any):
        super().__init__(args, source, model)  # type: ignore[arg-type]
        self.teacher = teacher

    def pairs(self, plan: Any, token: str) -> HeadData:
        """Training pairs, scored for those who are taught."""
        taught = bool(plan.objective_arguments["distill_weight"])
        if taught not in self.training:  # type: ignore[comparison-overlap]
            teacher = self.teacher if taught else None
            settings = {"negatives": plan.head.negatives, "depth": plan.head.depth, "teacher": teacher}
            data = HeadData(kind="layers", labels=True, **settings)
            data.add(self.model, self.split("train"), token=token, **self.options)
            data.parts = [frozen_tier.in_memory(part) for part in data.parts]
            self.training[taught] = data  # type: ignore[index]
        return self.training[taught]  # type: ignore[index]


class Pooled(frozen_tier.Bench):
    """ReinPool's eight vectors of a late-interaction model."""

    run, code = reinpool_text.RUN, code_of("methods/reinpool", "training")

    @cached_property
    def tokens(self) -> reinpool_text.Bench:
        """The same data set with its cached token vectors."""
        return reinpool_text.Bench(self.args, self.source, self.model)

    def depends(self, system: str) -> dict[str, Any]:
        """The token vectors."""
        return {"documents": self.tokens.documents.path.name}

    def fit(self, system: str, flags: list[str], seed: int) -> frozen_tier.Found:
        """Fit a head, pool the documents to eight vectors, and rank dev and test."""
        flags = flags[: len(flags) - len(self.flags)]  # which the other bench adds
        documents = self.tokens.by_head(self.tokens.head(flags, seed), [8])[8]
        arrays: dict[str, np.ndarray] = {}
        costs: dict[str, float] = {}
        for split in ("dev", "test"):
            found = rank_embeddings(system, self.tokens.queries(split), documents, self.ranks, similarity="maxsim")
            arrays[f"{split}.positions"] = found.positions[:, : frozen_tier.DEPTH].astype(np.int32)
            arrays[f"{split}.scores"] = found.scores[:, : frozen_tier.DEPTH]
            costs = {name: found.costs[name] for name in ("bytes_per_document",)}
        return arrays, costs


@dataclass(frozen=True)
class Group:
    """A method's systems, each without a teacher and with one.

    Attributes:
        method: Name of the claims.
        bench: Opens a data set.
        systems: Name -> flags without a teacher; the control first.
        rate: Learning rate, and further flags of all.
    """

    method: str
    bench: Any
    systems: dict[str, list[str]]
    rate: dict[str, str]

    def taught(self, teacher: str) -> dict[str, list[str]]:
        """Name -> flags, of those that are taught too."""
        found = dict(self.systems)
        for name, flags in self.systems.items():
            for how, follow in FOLLOW.items():
                found[f"{name}, taught {how}"] = [*flags, "--teacher", teacher, "--distill", follow]
        return found

    def tries(self, system: str) -> list[str]:
        """Settings that are tried on dev."""
        name, comma, _ = system.partition(", taught")
        rate = self.rate[name]
        return [f"{rate} --distill_weight {weight}" for weight in WEIGHTS] if comma else [rate]


GROUPS = (
    Group(
        "gaussian",
        Vectors,
        {"vector": gaussian_frozen.VECTOR, "Gaussian": gaussian_frozen.SETTINGS["kl, 1 group"]},
        {"vector": "1e-3 --tau 0.035", "Gaussian": "1e-3"},
    ),
    Group(
        "multilayer",
        Layers,
        {
            "last layer": multilayer_frozen.SETTINGS[multilayer_frozen.CONTROL],
            "all layers": multilayer_frozen.SETTINGS["linear, all layers"],
        },
        {"last layer": "1e-3 --tau 0.03", "all layers": "3e-4"},
    ),
    Group("reinpool", Pooled, {"ReinPool, 8": []}, {"ReinPool, 8": "5e-4"}),
)


def references(args: Arguments, bench: Any, reranker: Reranker) -> list[Ranking]:
    """BM25, the untouched dense model, and its 50 best in the teacher's own order."""
    dataset = bench.split("test")
    (dense,) = rank_with_model(display_name(args.backbone), bench.model, dataset, **bench.options)
    found = [rank_with_bm25(dataset), dense, reranker.rank(dense, dataset, 50)]
    return [Ranking(r.system, r.positions, r.scores, {}) for r in found]


def late_rows(args: Arguments) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of models that were trained beforehand, and what each gains over each before it."""
    dataset = load_retrieval_dataset(args.late_dataset, "test")
    rankings, values = [], {}
    for name in args.late:
        system = f"late interaction, {Path(name).parent.name}"
        model = load(fetch(name), dtype=fastest_dtype("auto"))
        (found,) = rank_with_model(system, model, dataset, cache_dir=f"{args.cache_dir}/embeddings", batch_size=32)
        rankings.append(Ranking(system, found.positions, found.scores, {}))
        values[system] = per_query_metrics(dataset, found)["nDCG@10"]
    pairs = list(combinations(values, 2))
    claims = [gain_claim(f"teacher.late_interaction: {a} over {b}", {dataset.name: values}, a, b) for b, a in pairs]
    return table_rows(dataset, rankings, next(iter(values))), claims


def main() -> None:
    """Fit, measure and write."""
    (args,) = HfArgumentParser([Arguments]).parse_args_into_dataclasses()
    made_by = provenance(shlex.join(["python", *sys.argv]))
    opened = {name: load(fetch(name), dtype=fastest_dtype("auto")) for name in (args.backbone, args.several)}
    teacher = open_teacher(args.teacher, dtype=fastest_dtype("auto"))
    folder = fetch(args.teacher)
    reranker = Reranker(args.teacher, folder, teacher, (50,), Path(args.cache_dir) / "embeddings")
    rows: list[dict[str, Any]] = []
    claims: list[dict[str, Any]] = []
    tried = 0
    for group in GROUPS:
        several = group.bench is Pooled
        more = {} if several else {"teacher": teacher}
        args.backbone, usual = args.several if several else args.backbone, args.backbone
        systems = group.taught(args.teacher)
        group.bench.settings = systems
        benches = [group.bench(args, source, opened[args.backbone], **more) for source in args.datasets]
        seeds: Sequence[int] = args.seeds[:1] if several else args.seeds
        settings, values = chosen_on_dev(benches, {system: group.tries(system) for system in systems}, seeds)
        beside: Any = partial(references, args, reranker=reranker) if group is GROUPS[0] else lambda bench: []
        first = next(iter(systems))
        found, tests = test_tables(benches, settings, values, seeds, beside, first)
        rows += found
        tried += sum(len(group.tries(system)) for system in systems)
        for name in group.systems:
            best = max((s for s in systems if s.startswith(f"{name}, taught")), key=lambda s: values[s])
            claims.append(gain_claim(f"teacher.{group.method}: {name}", tests, best, name))
        args.backbone = usual
    if args.late:
        some, more_claims = late_rows(args)
        rows, claims = rows + some, claims + more_claims
    results = made_by | {
        "name": args.name,
        "seeds": args.seeds,
        "models": {display_name(n): fingerprint(fetch(n)) for n in (args.backbone, args.several, args.teacher)},
        "settings_tried": tried,
        "drawn": [],
        "rows": rows,
        "claims": claims,
        "data": made_here(*args.datasets),
        "notes": [
            "Differences and p are to the first system of each method, or to late interaction by labels. Taught by "
            "order: the order that the teacher gives a query's document and four negatives; by scores: its softmax "
            "over them. ReinPool and late interaction were fitted with one seed.",
            *args.note,
        ],
    }
    print_and_write(results, Path(args.output) if args.output else None)


if __name__ == "__main__":
    main()
