"""What sums of two models gain over the better of them: words, meanings and late interaction, on three data sets.

    python benchmarks/hybrids.py --output results

The rows are those of `polyrep evaluate --hybrid`: the first system finds candidates, the weight of the second is
chosen on each set's dev, and reciprocal rank fusion is the control that has none.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from frozen_tier import gain_claim
from transformers import HfArgumentParser

from polyrep.data import load_retrieval_dataset
from polyrep.data.named import made_here
from polyrep.evaluation.bm25 import rank_with_bm25
from polyrep.evaluation.evaluate import EvaluationArguments
from polyrep.evaluation.hybrid import HYBRID_NOTE, MULTIPLES, load_dev, rank_hybrid, side_of_bm25, side_of_model
from polyrep.evaluation.metrics import per_query_metrics
from polyrep.evaluation.statistics import compare, holm
from polyrep.evaluation.systems import Ranking, rank_with_model
from polyrep.evaluation.table import table_rows
from polyrep.hub import fetch, fingerprint, load
from polyrep.hub.folder import fastest_dtype
from polyrep.report import print_and_write, provenance

BM25, DENSE, WORDS, LATE = "BM25", "dense", "Dense2Sparse", "late interaction"
PAIRS = [(DENSE, BM25), (DENSE, WORDS), (LATE, DENSE), (LATE, BM25)]
BETTER = "the better of the two"
HOW = ("summed", "RRF")

TIMES = ("search_ms_p50", "search_ms_p99", "encode_docs_per_s")
"""What is left out of the rows: the frontier times each way to search by itself, on an idle machine."""


@dataclass
class Arguments:
    """What to measure."""

    datasets: list[str] = field(
        default_factory=lambda: ["tldr_pages", "scitldr", "scifact"], metadata={"help": "BEIR folders."}
    )
    dense: str = field(default="minilm", metadata={"help": "Folder, Hub id, or minilm."})
    words: str = field(
        default="models/hybrids/dense2sparse-minilm/final", metadata={"help": "Folder of Dense2Sparse."}
    )
    late: str = field(
        default="models/four/late-interaction-minilm/final", metadata={"help": "Folder of a late-interaction model."}
    )
    cache_dir: str = field(default=".cache/embeddings", metadata={"help": "Embeddings."})
    output: str | None = field(default=None, metadata={"help": "Folder for the JSON and Markdown."})
    name: str = field(default="hybrids", metadata={"help": "Name of the files."})


Values = dict[str, dict[str, np.ndarray]]
"""Pair -> row, or the better of the two -> nDCG@10 of each query."""


def measure(source: str, models: Mapping[str, Any], cache_dir: str) -> tuple[list[dict[str, Any]], Values]:
    """Rows of one data set, each sum tested against the better of its two systems there."""
    dataset = load_retrieval_dataset(source)
    dev = load_dev(source, dataset, EvaluationArguments(hybrid=True))
    rankings = [rank_with_bm25(dataset)]
    sides = {BM25: side_of_bm25(BM25, dataset, dev, "en")}
    options: dict[str, Any] = {"cache_dir": cache_dir, "batch_size": 32}
    for name, model in models.items():
        rankings += rank_with_model(name, model, dataset, **options)
        sides[name] = side_of_model(name, model, dataset, dev, None, **options)
    found = {ranking.system: nd_cg(ranking, dataset) for ranking in rankings}
    pairs: Values = {}
    tested: dict[str, dict[str, Any]] = {}  # row of a sum or of a fusion -> its test
    for one, other in PAIRS:
        better = max((one, other), key=lambda name: found[name].mean())
        both = pairs[f"{one} + {other}"] = {BETTER: found[better]}
        for how, ranking in zip(HOW, rank_hybrid(sides[one], sides[other], dataset, dev, None), strict=True):
            rankings.append(ranking)
            both[how] = nd_cg(ranking, dataset)
            tested[ranking.system] = {"reference": better, **compare({how: both[how]}, found[better])[0]}
    corrected = holm([test["p_value"] for test in tested.values()])
    for test, p_value in zip(tested.values(), corrected, strict=True):
        test["p_value"] = p_value
    rows = []
    for row in table_rows(dataset, rankings, BM25):
        row = {name: value for name, value in row.items() if name not in (*tested[ranking.system], *TIMES)}
        rows.append(row | (tested.get(row["system"], {}) if row["metric"] == "nDCG@10" else {}))
    return rows, pairs


def nd_cg(ranking: Ranking, dataset: Any) -> np.ndarray:
    """nDCG@10 of each query."""
    return per_query_metrics(dataset, ranking)["nDCG@10"]


def claims_of(found: Mapping[str, Values]) -> list[dict[str, Any]]:
    """What each sum gains over the better of its two on each set, and over fusion, on the mean of the sets."""
    claims = []
    for one, other in PAIRS:
        pair = f"{one} + {other}"
        tests = {name: pairs[pair] for name, pairs in found.items()}
        for claim, control in (("gain", BETTER), ("over_rrf", "RRF")):
            label = pair.lower().replace(" + ", "_").replace(" ", "_")
            made = gain_claim(f"hybrids.{label}_{claim}", tests, "summed", control, None)
            claims.append(made | {"system": f"{pair}, summed"})
    return claims


def main() -> None:
    """Measure and write."""
    (args,) = HfArgumentParser([Arguments]).parse_args_into_dataclasses()
    made_by = provenance(shlex.join(["python", *sys.argv]))
    folders = {name: fetch(source) for name, source in ((DENSE, args.dense), (WORDS, args.words), (LATE, args.late))}
    models = {name: load(folder, dtype=fastest_dtype("auto")) for name, folder in folders.items()}
    rows: list[dict[str, Any]] = []
    found: dict[str, Values] = {}
    for source in args.datasets:
        more, pairs = measure(source, models, args.cache_dir)
        found[more[0]["dataset"]] = pairs
        rows += more
    results = made_by | {
        "name": args.name,
        "seeds": [0],
        "settings_tried": len(MULTIPLES),
        "models": {name: fingerprint(folder) for name, folder in folders.items()},
        "drawn": [],
        "rows": rows,
        "claims": claims_of(found),
        "data": made_here(*args.datasets),
        "notes": [
            HYBRID_NOTE,
            "Each sum and each fusion is compared with the better of its two on test, set by set, which is the harder "
            "rival: nobody knows it before. Claims are macro means in points of nDCG@10. Times are not measured here.",
            f"{DENSE} is {args.dense} as it is, which saw no label of these sets; {WORDS} and {LATE} learned from "
            "their train queries.",
        ],
    }
    print_and_write(results, Path(args.output) if args.output else None)


if __name__ == "__main__":
    main()
