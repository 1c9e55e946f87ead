"""What two views of one pass gain together, beside their controls and the hybrids that need two models.

    python benchmarks/unifier_text.py --dev --output results                                    # what dev chooses
    python benchmarks/unifier_text.py --chosen results/unifier-text-dev.json --output results   # the table on test

Token states of the frozen encoder are cached once, at two layers. Every system is then one fit over all data sets,
with the shipped run's pairs, negatives and steps. UnifieR, the dense view alone and the lexicon view alone are each
tuned on dev, one setting for all sets; the other fits take over what UnifieR chose. The weight of every sum is chosen
on dev, one for all sets, too. What was fitted and found is kept, see ``unifier_study.py``, so that an interrupted run
goes on where it was.
"""

from __future__ import annotations

import copy
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from frozen_tier import RAW, gain_claim, held_to_value
from safetensors import safe_open
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import HfArgumentParser
from unifier_study import (
    ADAPTER_BM25,
    ADAPTER_D2S,
    CANDIDATES,
    DENSE,
    FEWER,
    MOST_FLOPS,
    OWN,
    OWN_BM25,
    OWN_D2S,
    RAW_BM25,
    RAW_D2S,
    SUM,
    SYSTEMS,
    TRIES,
    TUNED,
    TWO_MODELS,
    UNIFIER,
    WORDS,
    Arguments,
    Bench,
    Study,
    best,
)

from polyrep.data.named import made_here
from polyrep.encoding.embeddings import row_of, rows
from polyrep.encoding.shards import Origin, Shard
from polyrep.errors import InputError
from polyrep.evaluation.hybrid import MULTIPLES
from polyrep.evaluation.systems import Ranking
from polyrep.evaluation.table import table_rows
from polyrep.files import read_json, write_json
from polyrep.hub import fetch, fingerprint, load
from polyrep.hub.folder import fastest_dtype
from polyrep.hub.reading import set_length
from polyrep.methods import UnifierHead, UnifierModel
from polyrep.report import print_and_write, provenance, write_results
from polyrep.search import open_index
from polyrep.search.weighted import View, find_candidates

SKETCHES = (
    "Before, some 35 sketches on dev, with one seed and up to 100 steps, led to own words, the temperature of the "
    "words, the loss of the sum and the steps of the dense view alone."
)

TIMED = 100
"""Queries of a data set that are timed, one at a time."""

# What it costs


def encode_flops(bench: Bench, path: Path) -> dict[str, Any]:
    """FLOPs of texts as long as are read: one pass with both views, as a share of those of two models."""
    with safe_open(path, framework="numpy") as stored:
        count = int(json.loads(stored.metadata()["costs"])["words"])
    head = UnifierHead.from_backbone(bench.model, projection=True)
    head.restrict(head.terms[:count].clone())
    model = UnifierModel.around(copy.deepcopy(bench.model[0].model).float(), head.float()).eval()
    ids = head.terms[torch.arange(8 * bench.args.max_length).view(8, -1) % count]
    found = {}
    for name, views in {"both": ("dense", "lexicon"), "dense": ("dense",), "lexicon": ("lexicon",)}.items():
        # A kernel of attention would not be counted.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
            model(ids, task="document", views=views)
        found[name] = counter.get_total_flops() / len(ids)
    ratio = found["both"] / (found["dense"] + found["lexicon"])
    claim = {"claim": "unifier.encode_flops_ratio", "value": ratio, "target": 0.8, "met": ratio <= 0.8, "words": count}
    return claim | {"flops_per_text": found, "tokens": bench.args.max_length, "system": UNIFIER}


def engine_figures(study: Study, bench: Bench) -> dict[str, Any]:
    """What Qdrant finds and how long it takes, with the views of UnifieR's first fit in an index on this machine."""
    setting, seed = study.settings[UNIFIER], study.args.seeds[0]
    weight, sources = study.weight(UNIFIER, setting), study.sources(bench, UNIFIER, setting, seed)
    path = bench.kept_at("engine", [source.key for source in sources], weight, TIMED).with_suffix(".json")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, _engine_figures(bench, [source.view("test") for source in sources], weight))
    return dict(read_json(path))


def _engine_figures(bench: Bench, views: Sequence[View], weight: float) -> dict[str, Any]:
    names, documents = ("lexicon", "dense"), list(bench.split("test").corpus)
    weights, total = dict(zip(names, (1.0, weight), strict=True)), len(views[0].queries)
    exact = find_candidates(views, bench.ranks, count=len(documents)).best((1.0, weight), bench.ranks, 11)
    with tempfile.TemporaryDirectory() as folder:
        index = open_index(f"qdrant:{folder}/index")
        for name, view in zip(names, views, strict=True):
            origin = Origin(name, view.documents.kind, view.documents.dim, "dot", "")
            for start in range(0, len(documents), 1024):
                places = np.arange(start, min(start + 1024, len(documents)))
                index.add([Shard(documents[start : start + 1024], rows(view.documents, places), origin)])
        asked = dict(zip(names, (view.queries for view in views), strict=True))
        found = index.search(asked, 10, weights=weights, candidates=len(documents))
        equal = [
            _same([(hit.id, hit.score) for hit in hits], [documents[place] for place in places], scores)
            for hits, (places, scores) in zip(found, exact, strict=True)
        ]
        ms: dict[str, list[float]] = {"lexicon": [], "sum": []}
        for row in np.unique(np.linspace(0, total - 1, min(TIMED, total)).astype(int)).tolist():
            alone = {name: row_of(queries, row) for name, queries in asked.items()}
            for how in ms:  # in turn, so that what else the machine does meets both
                started = time.perf_counter()
                if how == "sum":
                    index.search(alone, 10, weights=weights)
                else:
                    index.search({"lexicon": alone["lexicon"]}, 10)
                ms[how].append(1000 * (time.perf_counter() - started))
        getattr(index, "close", lambda: None)()
    return {how: float(np.median(values[1:])) for how, values in ms.items()} | {"equal": sum(equal), "queries": total}


def _same(hits: list[tuple[str, float]], documents: list[str], scores: np.ndarray) -> bool:
    """Whether the best ten are those of brute force; what has one score to 1e-5 may stand in any order."""
    if len(hits) != min(10, len(documents)):
        return False
    said = dict(zip(documents, scores.tolist(), strict=True))
    return all(
        name in said and np.isclose(said[name], score, rtol=1e-5) and np.isclose(score, right, rtol=1e-5)
        for (name, score), right in zip(hits, scores, strict=False)
    )


# Claims

Values = dict[str, dict[str, np.ndarray]]
"""Data set -> row -> nDCG@10 of each query, averaged over seeds."""


def gains(study: Study, tests: Values, tier: str = "") -> list[dict[str, Any]]:
    """What the sum gains over either view and over the hybrids of two models that were measured.

    Args:
        study: The fits.
        tests: What was measured.
        tier: What the names of the claims begin with, behind the method's.
    """
    measured = set.intersection(*({*values} for values in tests.values()))
    views = f"{UNIFIER}, lexicon", f"{UNIFIER}, dense"
    better = {name: max(views, key=lambda view: values[view].mean()) for name, values in tests.items()}
    with_better = {name: values | {"better view": values[better[name]]} for name, values in tests.items()}
    uni = held_to_value(gain_claim(f"unifier.{tier}uni_gain", with_better, SUM, "better view", 1.0))
    found = [uni | {"better": better}]
    if ADAPTER_BM25 in study.hybrids:
        claim = f"unifier.{tier}margin_over_adapter_bm25"
        own = {
            rival: gain_claim(claim, tests, SUM, f"{rival}, sum", None)
            for rival in (ADAPTER_BM25, OWN_BM25, OWN_D2S, ADAPTER_D2S)
            if f"{rival}, sum" in measured
        }
        over = {rival: {part: said[part] for part in ("value", "interval")} for rival, said in own.items()}
        rivals = [f"{rival}, sum" for rival in (ADAPTER_BM25, OWN_BM25) if rival in own]
        best = max(rivals, key=lambda rival: np.mean([values[rival].mean() for values in tests.values()]))
        found.append(gain_claim(claim, tests, SUM, best) | {"rival": best, "over_others": over})
        found.append(held_to_value(gain_claim(f"unifier.{tier}dense_cost", tests, views[1], DENSE, -0.3)))
    if TWO_MODELS in study.hybrids:
        claim = f"unifier.{tier}margin_over_two_models"
        found.append(held_to_value(gain_claim(claim, tests, SUM, f"{TWO_MODELS}, sum", -0.3)))
    loss = gain_claim(f"unifier.{tier}candidates_200_loss", tests, SUM, FEWER, 0.2)
    return [*found, loss | {"met": loss["value"] <= 0.2, "held_to": "value"}]


def ablations(study: Study, tier: str = "") -> list[dict[str, Any]]:
    """What some parts gain, both sides with the seeds of the ablations; of the sum, and of each view."""
    found = []
    for claim, sides in {
        "global_token_gain": (UNIFIER, "no dense vector"),
        "kl_gain": ("KL", UNIFIER),
        "sum_loss_gain": (UNIFIER, "no loss of the sum"),
        "gate_gain": ("gate", UNIFIER),
        "own_words_gain": (UNIFIER, "no own words"),
    }.items():
        if not {*sides} <= study.settings.keys():
            continue
        tests: Values = {}
        for bench in study.benches:
            tests[bench.name] = {}
            for system in sides:
                for row in ("sum", "lexicon", "dense"):
                    several = [
                        bench.measured(row_ranking(study, bench, system, row, seed), "test")
                        for seed in study.args.ablation_seeds
                    ]
                    tests[bench.name][f"{system}, {row}"] = np.mean(several, axis=0)
        made = {
            row: gain_claim(f"unifier.{tier}{claim}", tests, f"{sides[0]}, {row}", f"{sides[1]}, {row}", None)
            for row in ("sum", "lexicon", "dense")
        }
        found.append(made["sum"] | {"views": {row: made[row]["value"] for row in ("lexicon", "dense")}})
    return found


def row_ranking(study: Study, bench: Bench, system: str, row: str, seed: int) -> Ranking:
    """The ranking of test that a row of a system with both views has by one of its fits."""
    setting = study.settings[system]
    if row == "sum":
        return study.whole(bench, system, setting, seed, "test")
    return bench.ranking(f"{system}, {row}", [study.source(bench, system, setting, seed, row)], "test")


def cost_claims(study: Study, rankings: Mapping[str, Sequence[Ranking]]) -> list[dict[str, Any]]:
    """What the lexicon view, one pass and a search cost."""
    path = study.fit(UNIFIER, study.settings[UNIFIER], study.args.seeds[0])
    figures = {bench.name: engine_figures(study, bench) for bench in study.benches}
    ratios = {name: said["sum"] / said["lexicon"] for name, said in figures.items()}
    ratio = float(np.mean(list(ratios.values())))
    exact = sum(said["equal"] for said in figures.values()) / sum(said["queries"] for said in figures.values())
    common: dict[str, Any] = {"system": UNIFIER, "split": "test"}
    return [
        encode_flops(study.benches[0], path),
        flops_claim(rankings),
        {"claim": "unifier.search_ms_ratio", "value": ratio, "target": 1.5, "met": ratio <= 1.5}
        | {"by_dataset": ratios, "ms": figures}
        | common,
        {"claim": "unifier.engine_exact", "value": exact, "target": 1.0, "met": exact == 1} | common,
    ]


def flops_claim(rankings: Mapping[str, Sequence[Ranking]], tier: str = "") -> dict[str, Any]:
    """Words that a query and a document share by the lexicon view, where they are most."""
    flops = {
        name: float(np.mean([r.costs["flops"] for r in found if r.system == f"{UNIFIER}, lexicon"]))
        for name, found in rankings.items()
    }
    highest = max(flops.values())
    claim = {"claim": f"unifier.{tier}flops", "value": highest, "target": 5.0, "met": highest <= 5}
    return claim | {"by_dataset": flops, "system": UNIFIER, "split": "test"}


# The picture

SHOWN = (
    f"{UNIFIER}, lexicon",
    f"{UNIFIER}, dense",
    SUM,
    f"{TWO_MODELS}, sum",
    f"{ADAPTER_BM25}, sum",
    f"{ADAPTER_D2S}, sum",
    f"{OWN_BM25}, sum",
    f"{OWN_D2S}, sum",
    f"{RAW_BM25}, sum",
    f"{RAW_D2S}, sum",
    DENSE,
    WORDS,
    OWN,
    "BM25",
    RAW,
)
OURS = SHOWN[:3]


def draw(results: dict[str, Any], path: Path) -> None:
    """nDCG@10 with its interval: a panel for each data set, a line for each system."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows_ = [row for row in results["rows"] if row["metric"] == "nDCG@10"]
    shown = [name for name in SHOWN if any(row["system"] == name for row in rows_)][::-1]
    datasets = list(dict.fromkeys(row["dataset"] for row in rows_))
    size = (2.6 + 3.2 * len(datasets), 0.9 + 0.3 * len(shown))
    figure, axes = plt.subplots(1, len(datasets), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis, dataset in zip(axes[0], datasets, strict=True):
        for row in rows_:
            if row["dataset"] == dataset and row["system"] in shown:
                place, color = shown.index(row["system"]), "C0" if row["system"] in OURS else "grey"
                axis.plot(row["interval"], [place, place], color=color, linewidth=1.2)
                axis.plot(row["value"], place, "D" if row["system"] == SUM else "o", color=color, markersize=5)
                if row["system"] == SUM:
                    axis.axvline(row["value"], color="C0", linewidth=0.8, linestyle="--")
        axis.set_title(f"{dataset}, {rows_[0]['split']}", fontsize=10)
        axis.set_xlabel("nDCG@10")
        axis.grid(axis="x", linewidth=0.3)
    axes[0][0].set_yticks(range(len(shown)), shown)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Fit, measure and write."""
    (args,) = HfArgumentParser([Arguments]).parse_args_into_dataclasses()
    if unknown := set(args.systems) - SYSTEMS.keys():
        raise InputError(f"--systems {' '.join(sorted(unknown))}: unknown. There are {', '.join(map(repr, SYSTEMS))}.")
    made_by = provenance(shlex.join(["python", *sys.argv]))  # the code as it is now, not after an hour of edits
    folder = fetch(args.backbone)
    model, whole = (load(folder, dtype=fastest_dtype("auto")) for _ in range(2))
    set_length(model, args.max_length, args.backbone)
    study = Study(args, [Bench(args, source, model, whole) for source in args.datasets])
    common = made_by | {
        "models": {args.backbone: fingerprint(folder)},
        "settings_tried": sum(len(TRIES[system]) for system in TUNED if system in study.fitted),
        "data": made_here(*args.datasets),
    }
    output = Path(args.output) if args.output else None
    if args.dev:
        results = common | {
            "name": f"{args.name}-dev",
            "seeds": args.seeds[:1],
            "rows": [row | {"system": f"{row['system']}: {row['setting']}"} for row in study.tried],
            "chosen": best(study.tried),
            "claims": [],
            "notes": [
                f"Fits with one seed. {SKETCHES}",
                f"Settings of words are allowed with at most {MOST_FLOPS:g} FLOPs on each set.",
            ],
        }
        print(write_results(results, output))
        return
    rankings, found, tests = tables(study)
    results = common | {
        "name": args.name,
        "seeds": args.seeds,
        "rows": found,
        "claims": [*gains(study, tests), *ablations(study), *cost_claims(study, rankings)],
        "notes": notes(study),
    }
    print_and_write(results, output, draw)


def tables(study: Study) -> tuple[dict[str, list[Ranking]], list[dict[str, Any]], Values]:
    """What was found on test of each data set, the rows of that, and nDCG@10 of each query."""
    rankings = {bench.name: study.rankings(bench) for bench in study.benches}
    reference = f"{study.hybrids[0]}, sum"
    found: list[dict[str, Any]] = []
    tests: Values = {}
    for bench in study.benches:
        some, dataset = rankings[bench.name], bench.split("test")
        found += table_rows(dataset, some, reference)
        tests[bench.name] = {
            name: np.mean([bench.measured(r, "test") for r in some if r.system == name], axis=0)
            for name in dict.fromkeys(r.system for r in some)
        }
    for row in found:
        system = row["system"].partition(", ")[0]
        if row["metric"] == "nDCG@10" and system in study.chosen[1] and row["system"] in (system, f"{system}, sum"):
            row["dev_macro"] = study.chosen[1][system]
    return rankings, found, tests


def notes(study: Study) -> list[str]:
    """What a reader of the tables should know."""
    others = [system for system in study.settings if system not in TUNED]
    beside = (
        f" {', '.join(others)}: with UnifieR's setting and seeds {', '.join(map(str, study.args.ablation_seeds))} "
        "alone, with which UnifieR is compared for their claims."
        if others
        else ""
    )
    tuned = ", ".join(system for system in TUNED if system in study.settings)
    return [
        f"One fit over {', '.join(bench.name for bench in study.benches)} together, of texts cut at "
        f"{study.args.max_length} tokens; {RAW}, Dense2Sparse and {OWN}, which are fitted to each set, the former "
        f"with seed {study.args.seeds[0]}, read the backbone's own length. {tuned} were tuned on dev, "
        f"{len(TRIES[UNIFIER])}, {len(TRIES[DENSE])} and {len(TRIES[WORDS])} settings, those of words with at most "
        f"{MOST_FLOPS:g} FLOPs. {SKETCHES}{beside}",
        f"Sums are of raw scores: the words, or beside BM25 and Dense2Sparse the dense vectors, find {CANDIDATES:,} "
        f"candidates, both score them, and the weight of the other score is the best of {len(MULTIPLES)} on dev with "
        "the first seed, one for all sets.",
        "encode_flops_ratio: the two models are this one twice, with one view each. That of the words runs the whole "
        "encoder too, whose vector its branch reads; without it, it would end at the split.",
        "engine_exact: scores that are equal to 1e-5 may stand in any order. search_ms_ratio: medians of "
        f"{TIMED} queries a set, asked one at a time of Qdrant in this process.",
    ]


if __name__ == "__main__":
    main()
