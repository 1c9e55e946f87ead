"""How much of late interaction is left where tokens meet under equal keys alone, beside controls and other ways.

    python benchmarks/citadel_text.py --dev --output results                                   # what dev chooses
    python benchmarks/citadel_text.py --chosen results/citadel-frozen-dev.json --output results   # the table on test
    python benchmarks/citadel_text.py --tier finetuned --dev --output results    # the same of the whole encoder

The tier ``frozen`` fits a router to the cached token vectors of a late-interaction model, ``finetuned`` trains the
encoder for an epoch. Either is one fit over all data sets. The method is tuned on dev, and its controls take over what
it chose. Fits and rankings are kept under a hash of data, settings and code, so that an interrupted run goes on where
it was; `--fit_only 1/2` and `--fit_only 2/2` share them between two processes, each with OMP_NUM_THREADS=1, as the run
after them should have it, too: heads of ReinPool are those of a number of threads.
"""

from __future__ import annotations

import re
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from citadel_study import (
    CITADEL,
    FULL,
    NARROW,
    NO_BALANCE,
    POOLED,
    RERANKED,
    RIVALS,
    STATIC,
    STORED,
    TIERS,
    WEIGHTS,
    Arguments,
    Bench,
    Study,
    cut_to,
)
from frozen_tier import at_most, best_settings, gain_claim, held_to_value
from tqdm import tqdm
from transformers import HfArgumentParser

from polyrep.data.named import made_here
from polyrep.encoding.embeddings import row_of, rows
from polyrep.encoding.shards import Origin, Shard
from polyrep.errors import InputError
from polyrep.evaluation.frontier.timed import ReadyIndex
from polyrep.evaluation.systems import Ranking
from polyrep.evaluation.table import table_rows
from polyrep.files import digest, read_json, write_json
from polyrep.hub import fetch, fingerprint, load
from polyrep.hub.folder import fastest_dtype
from polyrep.report import print_and_write, provenance, write_results
from polyrep.search import exact_search, open_index
from polyrep.search.ranking import rescore

TIMED = 100
"""Queries of a data set that are timed, one at a time."""

Values = dict[str, dict[str, np.ndarray]]
"""Data set -> row -> nDCG@10 of each query, averaged over seeds."""


# An index of it


def engine_figures(study: Study, bench: Bench, chosen: str) -> dict[str, Any]:
    """What an index of the first fit finds, and how long a query takes beside exact MaxSim, in one run."""
    folder = study.fit(CITADEL, chosen, study.args.seeds[0])
    name = digest([folder.parent.name, STORED, bench.texts, TIMED])
    path = Path(study.args.cache_dir) / "rankings" / f"citadel-{bench.name}-engine-{name}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, _engine_figures(bench, study.vectors(bench, CITADEL, folder)))
    return dict(read_json(path))


def _engine_figures(bench: Bench, made: Mapping[str, Any]) -> dict[str, Any]:
    ids, queries, documents = list(bench.split("test").corpus), made["test"], made["documents"]
    widths = {"vocabulary": made["vocabulary"], "sentence_dim": documents.sentence_dim}
    origin = Origin("routed", "routed", documents.dim, made["similarity"], "", **widths)
    options: dict[str, Any] = {"similarity": made["similarity"]}
    _, scores = exact_search(queries, documents, bench.ranks, k=10, **options)
    with tempfile.TemporaryDirectory() as folder:
        index: Any = open_index(f"routed:{folder}/index")
        parts = (np.arange(start, min(start + 1024, len(ids))) for start in range(0, len(ids), 1024))
        index.add(Shard([ids[place] for place in part], rows(documents, part), origin) for part in parts)
        hits = index.search(queries, 10)
        place_of = {name: place for place, name in enumerate(ids)}
        places = np.array([[place_of[hit.id] for hit in row] for row in hits])
        said = np.array([[hit.score for hit in row] for row in hits])
        # What was found, by the oracle; what has one score may stand in any order.
        _, right = rescore(queries, documents, places, bench.ranks, **options)
        same = np.isclose(said, scores, rtol=1e-5, atol=1e-6) & np.isclose(right, scores, rtol=1e-5, atol=1e-6)
        full, asked = ReadyIndex(bench.documents, bench.ranks, "maxsim"), bench.queries("test")
        ms: dict[str, list[float]] = {CITADEL: [], FULL: []}
        for row in np.unique(np.linspace(0, len(queries) - 1, min(TIMED, len(queries))).astype(int)).tolist():
            one, other = row_of(queries, row), row_of(asked, row)
            for name, search in (
                (CITADEL, lambda one=one: index.search(one, 10)),
                (FULL, lambda o=other: full.search(o, 10)),
            ):
                started = time.perf_counter()  # in turn, so that what else the machine does meets both
                search()
                ms[name].append(1000 * (time.perf_counter() - started))
    medians = {name: float(np.median(values[1:] or values)) for name, values in ms.items()}
    return {"ms": medians, "equal": int(same.all(1).sum()), "queries": len(queries)}


# Claims


def retention(claim: str, tests: Values, other: str) -> dict[str, Any]:
    """Share of another row's nDCG@10 that the method keeps: the mean of the data sets, with resampled queries."""
    generator, resampled, by_set = np.random.default_rng(0), [], {}
    for name, values in tests.items():
        ours, whole = values[CITADEL], values[other]
        drawn = generator.integers(len(ours), size=(2000, len(ours)))
        resampled.append(ours[drawn].mean(1) / np.maximum(whole[drawn].mean(1), 1e-9))
        by_set[name] = float(ours.mean() / max(whole.mean(), 1e-9))
    interval = [float(x) for x in np.percentile(np.mean(resampled, axis=0), [2.5, 97.5])]
    entry = {"claim": claim, "value": float(np.mean(list(by_set.values()))), "interval": interval, "target": 0.97}
    return held_to_value(entry) | {"control": other, "split": "test", "by_dataset": by_set}


def quality_claims(study: Study, tests: Values, chosen: str) -> list[dict[str, Any]]:
    """What is kept of MaxSim, and gained over the controls and the rivals."""
    found = []
    if study.args.tier == "frozen":
        found.append(retention("citadel.posthoc_retention", tests, FULL))
    elif f"{FULL}, trained alike" in study.fitted:
        found.append(retention("citadel.retention", tests, f"{FULL}, trained alike"))
    seeds = study.args.ablation_seeds
    for claim, control, target in (("gain_over_static", STATIC, 0.0), ("gain_over_weights", WEIGHTS, 1.0)):
        if control in study.fitted:
            values = {name: study.ndcg(name, chosen, seeds, "test") for name in (CITADEL, control)}
            alike = {b.name: {name: values[name][b.name] for name in values} for b in study.benches}
            entry = gain_claim(f"citadel.{claim}", alike, CITADEL, control, target) | {"control": control}
            found.append(held_to_value(entry) if target else entry)
    others = [name for name in ("ReinPool", "hierarchical") if name in study.args.rivals]
    if others:
        margins = {}
        for k in POOLED:
            macro = {
                rival: float(np.mean([values[f"{rival}, {k}, int8"].mean() for values in tests.values()]))
                for rival in others
            }
            rival = f"{max(macro, key=macro.__getitem__)}, {k}, int8"
            entry = gain_claim("citadel.margin_at_equal_bytes", tests, cut_to(k), rival, -0.5)
            margins[k] = held_to_value(entry) | {"control": rival}
        at = {str(k): {name: said[name] for name in ("value", "interval", "control")} for k, said in margins.items()}
        found.append(margins[POOLED[-1]] | {"at_vectors": at})
    return found


def small(claim: str, by_dataset: Mapping[str, float], target: float) -> dict[str, Any]:
    """A claim on a mean over data sets that is to be small."""
    value = float(np.mean(list(by_dataset.values())))
    return at_most(f"citadel.{claim}", value, target, system=CITADEL, split="test", by_dataset=dict(by_dataset))


def cost_claims(study: Study, rankings: Mapping[str, Sequence[Ranking]], chosen: str) -> list[dict[str, Any]]:
    """What entries cost beside all token vectors, how even their lists are, and what an index does."""

    def mean(dataset: str, system: str, cost: str) -> float:
        return float(np.mean([r.costs[cost] for r in rankings[dataset] if r.system == system]))

    def ratio(cost: str, ours: str, theirs: str) -> dict[str, float]:
        return {name: mean(name, ours, cost) / max(mean(name, theirs, cost), 1e-9) for name in rankings}

    found = [
        small("interactions_ratio", ratio("products", CITADEL, FULL), 0.01),
        small("bytes_ratio", ratio("bytes_per_document", CITADEL, FULL), 0.15),
    ]
    if NO_BALANCE in study.fitted:
        ours = study.rehearsal if study.few else CITADEL
        found.append(small("largest_list_ratio", ratio("longest_list", ours, NO_BALANCE), 0.5) | {"system": ours})
    figures = {bench.name: engine_figures(study, bench, chosen) for bench in study.benches}
    exact = sum(said["equal"] for said in figures.values()) / sum(said["queries"] for said in figures.values())
    ratios = {name: said["ms"][FULL] / said["ms"][CITADEL] for name, said in figures.items()}
    common: dict[str, Any] = {"system": CITADEL, "split": "test"}
    speedup = float(np.mean(list(ratios.values())))
    return [
        *found,
        {"claim": "citadel.index_exact", "value": exact, "target": 1.0, "met": exact == 1} | common,
        {"claim": "citadel.speedup", "value": speedup, "target": 10.0, "met": speedup >= 10}
        | {"by_dataset": ratios, "ms": {name: said["ms"] for name, said in figures.items()}}
        | common,
    ]


def shared(fit_only: str) -> tuple[int, int]:
    """Which of how many processes ``--fit_only`` is, from 0 on."""
    match = re.fullmatch(r"(\d+)/(\d+)", fit_only)
    number, total = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= total:
        raise InputError(
            f"--fit_only {fit_only}: names no share of the fits. Use e.g. 1/2 in one process, 2/2 in another."
        )
    return number - 1, total


def main() -> None:
    """Fit, measure and write."""
    (args,) = HfArgumentParser([Arguments]).parse_args_into_dataclasses()
    if args.tier not in TIERS:
        raise InputError(f"--tier {args.tier}: unknown. There are {', '.join(TIERS)}.")
    for flag, known in (("systems", TIERS[args.tier].systems), ("rivals", RIVALS)):
        if unknown := set(getattr(args, flag)) - set(known):
            raise InputError(
                f"--{flag} {' '.join(sorted(unknown))}: unknown. There are {', '.join(map(repr, known))}."
            )
    if args.systems and CITADEL not in args.systems:
        raise InputError(f"--systems: {CITADEL!r} is missing, which all others are compared with. Add it.")
    share = shared(args.fit_only) if args.fit_only else None
    args.name = args.name or f"citadel-{args.tier}"
    made_by = provenance(shlex.join(["python", *sys.argv]))  # the code as it is now, not after an hour of edits
    folder = fetch(args.backbone)
    model = load(folder, dtype=fastest_dtype("auto"))
    study = Study(args, [Bench(args, source, model) for source in args.datasets])
    if share:
        for job in tqdm(study.jobs()[share[0] :: share[1]], desc=f"share {args.fit_only}"):
            job()
        return
    output = Path(args.output) if args.output else None
    common = made_by | {
        "models": {args.backbone: fingerprint(folder)},
        "settings_tried": len(study.tier.tries),
        "data": made_here(*args.datasets),
    }
    if args.dev:
        tried = study.tried()
        results = common | {
            "name": f"{args.name}-dev",
            "seeds": args.seeds[:1],
            "rows": [row | {"system": f"{row['system']}: {row['setting']}"} for row in tried],
            "chosen": best_settings(tried),
            "claims": [],
            "drawn": [],
            "notes": [f"Fits of {args.tuning_steps} steps with one seed."] if args.tuning_steps else [],
        }
        print(write_results(results, output))
        return
    chosen = study.choice()
    rankings = {bench.name: study.rankings(bench, chosen) for bench in study.benches}
    found: list[dict[str, Any]] = []
    tests: Values = {}
    for bench in study.benches:
        some = rankings[bench.name]
        found += table_rows(bench.split("test"), some, FULL)
        tests[bench.name] = {
            name: np.mean([bench.measured(r, "test") for r in some if r.system == name], axis=0)
            for name in dict.fromkeys(r.system for r in some)
        }
    claims = [*quality_claims(study, tests, chosen), *cost_claims(study, rankings, chosen)]
    results = common | {
        "name": args.name,
        "seeds": args.seeds,
        "rows": found,
        "claims": [claim | {"tier": args.tier} for claim in claims],
        "drawn": [FULL, CITADEL, "ReinPool", "hierarchical"],
        "notes": notes(study, chosen),
    }
    print_and_write(results, output)


def notes(study: Study, chosen: str) -> list[str]:
    """What a reader of the tables should know."""
    args, names = study.args, ", ".join(bench.name for bench in study.benches)
    few = [name for name in study.fitted if not study.tier.systems[name].whole]
    ablations = f" {', '.join(few)}: at {args.tuning_steps} steps, as {study.rehearsal}." if study.few else ""
    return [
        f"{CITADEL}: --learning_rate {chosen}, one fit over {names} together, chosen on dev of all. Its controls have "
        f"the same setting, and seeds {', '.join(map(str, args.ablation_seeds))} alone; gains over them are of these "
        f"seeds.{ablations}",
        f"Bytes of {CITADEL} are those of its entries: of 32 numbers 68 in float16, 40 in int8. Products: how many "
        "inner products a query and a document take, on the mean. Rows as large as so many vectors keep the longest "
        "entries of the corpus.",
        f"{FULL}, {NARROW}, ReinPool, hierarchical and LEMUR read the backbone's token vectors. ReinPool and LEMUR "
        f"are fitted to each set alone, with its judgments or its texts; LEMUR finds {RERANKED} documents, and MaxSim "
        "orders them.",
        f"speedup: medians of {TIMED} queries a set, one at a time, of an index on disk and of MaxSim over vectors in "
        "memory. index_exact: scores are equal to 1e-5.",
    ]


if __name__ == "__main__":
    main()
