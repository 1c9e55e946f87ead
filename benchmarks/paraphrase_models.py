r"""Who is stable, and who is merely constant: every text model of the repository on two wordings of one need.

    python benchmarks/paraphrase_models.py --output results

A table for each set and one picture: AO@10 of two wordings against nDCG@10 of both. Beside the models stand
all-MiniLM-L6-v2, BM25, and a control that gives every query the same list, whose AO is 1 by definition. A model that
is not there is listed with the command that makes it. Sets are named with the source of their pairs:
``coco_paraphrases`` has captions rated by people, which may be measured and are not part of the project; in SciTLDR
several summaries are of one paper.
"""

from __future__ import annotations

import gc
import logging
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from bench import ROOT
from frozen_tier import at_most
from scipy.stats import mannwhitneyu, spearmanr
from transformers import HfArgumentParser

from polyrep.data import Pairs, RetrievalDataset, load_retrieval_dataset, pairs_of
from polyrep.data.named import made_here
from polyrep.encoding.cache import embed
from polyrep.errors import InputError
from polyrep.evaluation.bm25 import rank_with_bm25
from polyrep.evaluation.rank_similarity import (
    RankSimilarity,
    best_documents,
    compare_wordings,
    paraphrase_notes,
    refuse_depth,
)
from polyrep.evaluation.systems import DEPTH, Ranking, rank_with_model
from polyrep.evaluation.table import display_name, refuse_doubles, table_rows
from polyrep.hub import fetch, fingerprint, load
from polyrep.hub.folder import fastest_dtype
from polyrep.report import print_and_write, provenance
from polyrep.search.ranking import deeper, exact_search, tie_ranks

logger = logging.getLogger(__name__)

RUNS = (
    *("late-interaction-minilm", "reinpool-minilm", "reinpool-minilm-one", "lemur-minilm", "metaembed-minilm"),
    *("metaembed-minilm-frozen", "citadel-minilm", "citadel-minilm-frozen", "dense2sparse-minilm", "unifier-minilm"),
    *("unifier-minilm-frozen", "multilayer-minilm", "multilayer-minilm-frozen", "multilayer-minilm-multi"),
    *("gaussian-minilm", "gaussian-minilm-frozen"),
)
"""Runs of hub_configs/ whose models read text."""

MINILM, BM25, CONSTANT = "all-MiniLM-L6-v2", "BM25", "the same list for all"

ALIKE, APART = 4.0, 2.0
"""Ratings from which on wordings say one need, and below which two queries have nothing to do with each other."""


@dataclass
class Arguments:
    """What to measure."""

    models: list[str] = field(
        default_factory=lambda: [f"models/{run}/final" for run in RUNS], metadata={"help": "Folders of models."}
    )
    sets: list[str] = field(
        default_factory=lambda: ["coco_paraphrases=file", "scitldr=qrels"],
        metadata={"help": "Data sets, each with the source of its pairs behind =."},
    )
    baseline: str = field(default="minilm", metadata={"help": "The dense model that claims are of."})
    k: int = field(default=10, metadata={"help": "Documents of a list that are compared."})
    output: str | None = field(default=None, metadata={"help": "Folder for the three files."})
    name: str = field(default="paraphrase-models", metadata={"help": "Name of the files."})
    cache_dir: str = field(default=".cache/embeddings", metadata={"help": "Where embeddings are kept."})
    model_dtype: str = field(default="auto", metadata={"help": "Weights in memory."})
    batch_size: int = field(default=32, metadata={"help": "Texts per forward pass."})
    seed: int = field(default=0, metadata={"help": "Of random pairs and of the bootstrap."})


@dataclass
class Found:
    """What was found on one data set."""

    pairs: Pairs
    rankings: list[Ranking]
    reworded: list[Ranking]
    overlaps: list[RankSimilarity]
    seconds: dict[str, float] = field(default_factory=dict)


def missing(source: str) -> str | None:
    """Why a model cannot be measured, with the command that makes it; None if it can be."""
    if source == "minilm" or Path(source).exists() or "models" not in Path(source).parts:
        return None
    run = Path(source).parent.name if Path(source).name == "final" else Path(source).name
    recipe = ROOT / "hub_configs" / run / "recipe.yaml"
    if not recipe.is_file():
        return f"{source} is not there, and no run of hub_configs/ makes it"
    command = recipe.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    return f"not trained yet: {command}"


def opened(sets: Sequence[str], k: int) -> list[Found]:
    """The data sets with their pairs.

    Raises:
        InputError: One cannot be used.
    """
    found = []
    for said in sets:
        name, _, source = said.rpartition("=")
        if not name:
            raise InputError(f"--sets {said}: has no source of pairs. Write e.g. scitldr=qrels.")
        dataset = load_retrieval_dataset(name)
        refuse_depth(k, dataset, DEPTH)
        found.append(Found(pairs_of(dataset, source), [], [], []))
    refuse_doubles(sets, [of.pairs.dataset.name for of in found])
    return found


def constant(dataset: RetrievalDataset) -> Ranking:
    """What a ranker finds that does not read the query: the documents as they stand in the corpus."""
    depth = min(DEPTH, len(dataset.corpus))
    positions = np.tile(np.arange(depth), (len(dataset.queries), 1))
    return Ranking(CONSTANT, positions, np.tile(-np.arange(depth, dtype=np.float32), (len(positions), 1)))


def add(of: Found, both: Sequence[Ranking], args: Arguments) -> None:
    """Keep what a system found, for the queries and, where they are others, for the reworded ones."""
    of.rankings.append(both[0])
    of.reworded.append(both[-1])
    of.overlaps.append(compare_wordings(of.pairs, *both, k=args.k, seed=args.seed))


def measure(args: Arguments, found: Sequence[Found]) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Rank every data set by every system; returns fingerprints, and what is missing."""
    fingerprints, failures = {}, []
    for of in found:
        for rank in (rank_with_bm25, constant):
            add(of, [rank(side) for side in of.pairs.sides], args)
    options: dict[str, Any] = {"cache_dir": args.cache_dir, "batch_size": args.batch_size}
    for source in dict.fromkeys([args.baseline, *args.models]):
        name = display_name(source)
        if reason := missing(source):
            logger.warning("%s: %s", name, reason)
            failures += [{"system": name, "dataset": of.pairs.dataset.name, "reason": reason} for of in found]
            continue
        folder = fetch(source)
        fingerprints[name] = fingerprint(folder)
        model = load(folder, dtype=fastest_dtype(args.model_dtype))
        for of in found:
            both = [rank_with_model(name, model, side, **options)[0] for side in of.pairs.sides]
            add(of, both, args)
            if source == args.baseline:
                of.seconds = overhead(model, of, both, args)
        del model
        gc.collect()
    return fingerprints, failures


def overhead(model: Any, of: Found, rankings: Sequence[Ranking], args: Arguments) -> dict[str, float]:
    """Seconds of an exact search for all queries, vectors being there, and of the comparison of what it found."""
    options: dict[str, Any] = {"cache_dir": args.cache_dir, "batch_size": args.batch_size}
    documents = embed(model, of.pairs.dataset.corpus, task="document", name=of.pairs.dataset.name, **options)
    ranks = tie_ranks(list(of.pairs.dataset.corpus))
    taken = {"search": 0.0}
    for side in of.pairs.sides:
        queries = embed(model, side.queries, task="query", name=f"{side.name}-{side.split}", **options)
        started = time.perf_counter()
        how: dict[str, Any] = {"similarity": str(model.similarity_fn_name), "k": deeper(DEPTH, side.own)}
        exact_search(queries, documents, ranks, left_out=side.own, device=model.device, **how)
        taken["search"] += time.perf_counter() - started
    started = time.perf_counter()
    compared = compare_wordings(of.pairs, *rankings, k=args.k, seed=args.seed)
    taken["compare"] = time.perf_counter() - started
    started = time.perf_counter()
    compared.summary(args.seed)
    return taken | {"intervals": time.perf_counter() - started}


def by_loops(a: Sequence[int], b: Sequence[int], p: float) -> tuple[float, float, float]:
    """AO, JS and RBO of two lists by sets, as their definitions read; below 0 is no document."""
    agreement = []
    for depth in range(1, len(a) + 1):
        one, other = ({place for place in part[:depth] if place >= 0} for part in (a, b))
        longer = max(len(one), len(other))
        agreement.append(len(one & other) / longer if longer else 0.0)
    weighed = sum(share * p**depth for depth, share in enumerate(agreement, start=1))
    united = len(one | other)
    shared = len(one & other) / united if united else 0.0
    return sum(agreement) / len(a), shared, (1 - p) / p * weighed + agreement[-1] * p ** len(a)


def metric_error(of: Found, k: int) -> float:
    """The largest difference of the three measures from those of loops, over every pair of every system."""
    worst = 0.0
    for ranking, reworded, overlap in zip(of.rankings, of.reworded, of.overlaps, strict=True):
        first = best_documents(of.pairs.dataset, ranking, k)[of.pairs.a]
        second = best_documents(of.pairs.reworded, reworded, k)[of.pairs.b]
        lists = zip(first.tolist(), second.tolist(), strict=True)
        expected = np.array([by_loops(a, b, overlap.p) for a, b in lists])
        found = np.stack([overlap.average_overlap, overlap.jaccard, overlap.rbo], axis=1)
        worst = max(worst, float(np.abs(found - expected).max()))
    return worst


def at_least(name: str, value: float, target: float, **more: Any) -> dict[str, Any]:
    """A claim that is held to its value."""
    return {"claim": f"paraphrase.{name}", "value": value, "target": target, "met": value >= target} | more


def correlation(overlap: np.ndarray, rating: np.ndarray) -> float:
    """Spearman's, 0 where one of the two is the same everywhere and so says nothing of the other."""
    if min(len(np.unique(overlap)), len(np.unique(rating))) < 2:
        return 0.0
    return float(spearmanr(overlap, rating).statistic)


def claims(args: Arguments, found: Sequence[Found], measured: int) -> Iterator[dict[str, Any]]:
    """What the table is held to."""
    baseline, test = display_name(args.baseline), {"split": "test"}
    yield at_most("paraphrase.metric_error", max(metric_error(of, args.k) for of in found), 1e-12, **test)
    for of in found:
        name = of.pairs.dataset.name
        overlap = next(one for one in of.overlaps if one.system == baseline)
        rating, common = of.pairs.similarity, of.pairs.common.getnnz(1) > 0
        rated = ~np.isnan(rating)
        if len(np.unique(rating[rated])) > 1:
            same = rated & common
            value, within = (correlation(overlap.average_overlap[some], rating[some]) for some in (rated, same))
            more = test | {"dataset": name, "system": baseline, "pairs": int(rated.sum())}
            more["with_a_document_in_common"] = within
            yield at_least("validity", value, 0.40, **more)
        alike, apart = common & (rating >= ALIKE), ~common & (rating < APART)
        if alike.any() and apart.any():
            won = mannwhitneyu(overlap.average_overlap[alike], overlap.average_overlap[apart]).statistic
            value = float(won / (alike.sum() * apart.sum()))  # the area under the curve
            more = test | {"dataset": name, "system": baseline, "pairs": [int(alike.sum()), int(apart.sum())]}
            yield at_least("discrimination", value, 0.90, **more)
    seconds: Mapping[str, float] = {
        part: sum(of.seconds[part] for of in found) for part in ("search", "compare", "intervals")
    }
    share = seconds["compare"] / seconds["search"]
    yield at_most("paraphrase.evaluator_overhead", share, 0.05, **test, seconds=seconds)
    yield at_least("models_measured", measured, 8, **test)


def draw(results: dict[str, Any], path: Path) -> None:
    """A panel for each data set: AO of two wordings against the mean nDCG@10 of both, a point for each system."""
    panels = list(dict.fromkeys((entry["dataset"], entry["source"]) for entry in results["paraphrases"]))
    figure, axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 5), squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels, strict=True):
        entries = [e for e in results["paraphrases"] if (e["dataset"], e["source"]) == panel]
        group = entries[0]["group"]
        for number, entry in enumerate(entry for entry in entries if entry["group"] == group):
            x, y = (entry["ndcg_a"] + entry["ndcg_b"]) / 2, entry["average_overlap"]
            low, high = entry.get("average_overlap_interval", (y, y))
            style = {"color": "0.4" if entry["system"] in (BM25, CONSTANT) else f"C{number % 10}", "capsize": 2}
            axis.errorbar(x, y, [[max(0.0, y - low)], [max(0.0, high - y)]], fmt="o", lw=1, ms=4, **style)
            axis.annotate(entry["system"], (x, y), (4, 3), textcoords="offset points", fontsize=7)
        axis.set_title(f"{panel[0]}, pairs: {group}", fontsize=10)
        axis.set_ylim(-0.02, 1.05)
        axis.margins(x=0.15)
        axis.grid(alpha=0.3)
    figure.supxlabel("nDCG@10, mean of both wordings", fontsize="medium")
    figure.supylabel(f"AO@{results['paraphrases'][0]['k']} (95 % interval)", fontsize="medium")
    figure.savefig(path, dpi=144)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and write."""
    words = list(sys.argv[1:] if argv is None else argv)
    (args,) = HfArgumentParser([Arguments]).parse_args_into_dataclasses(words)
    made_by = provenance(shlex.join(["python", "benchmarks/paraphrase_models.py", *words]))
    if reason := missing(args.baseline):
        raise InputError(f"--baseline {args.baseline}: {reason}. Claims are of it; make it first.")
    found = opened(args.sets, args.k)
    fingerprints, failures = measure(args, found)
    baseline = display_name(args.baseline)
    results = made_by | {
        "name": args.name,
        "seeds": [args.seed],
        "settings_tried": 1,
        "models": fingerprints,
        "rows": [row for of in found for row in table_rows(of.pairs.dataset, of.rankings, baseline, args.seed)],
        "paraphrases": [entry for of in found for one in of.overlaps for entry in one.summary(args.seed)],
        "claims": list(claims(args, found, len(fingerprints) + 1)),  # and BM25
        "failures": failures,
        "data": made_here(*(said.rpartition("=")[0] for said in args.sets)),
        "notes": paraphrase_notes([of.pairs for of in found], args.k),
    }
    print_and_write(results, Path(args.output) if args.output else None, draw)
    return results


if __name__ == "__main__":
    main()
