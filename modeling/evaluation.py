"""Measure retrieval models: metrics per query, honest comparisons, and a table with its picture.

Numbers agree with MTEB: pytrec_eval metrics, document text = title + space + text, runs cut at 1,000, ties by higher
document id first. Every comparison is a paired bootstrap over queries, corrected for the number of rows in its table.
Public benchmarks by name are MTEB's own business: see ``benchmarks.py``.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytrec_eval
from sentence_transformers import MultiVectorEncoder

from .benchmarks import left_out, measure, mteb_package, open_suites, refuse_unfit
from .data.dataset import RetrievalDataset
from .data.load import load_retrieval_dataset
from .errors import InputError
from .flags import parse
from .hub.cards import hub_source
from .hub.fingerprint import fingerprint
from .hub.folder import Encoder, family_of, fastest_dtype, fetch, load
from .report import provenance, write_results
from .retrievers import Ranking, rank_with_bm25, rank_with_model

METRICS = ("nDCG@10", "nDCG@3", "MRR@10", "Recall@100")
RESAMPLES = 10_000

logger = logging.getLogger(__name__)


@dataclass
class EvaluationArguments:
    """What to measure, on what, against what."""

    _argument_group_name = "evaluation"

    dataset: list[str] = field(default_factory=list, metadata={"help": "BEIR folders or Hub data set ids."})
    mteb: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Benchmarks or tasks of MTEB by name, e.g. NanoBEIR. They have splits of their own, and neither "
            "bm25 nor --token_pooling, --dtype, --reference have a part in them."
        },
    )
    frontier: bool = field(
        default=False,
        metadata={"help": "Instead: every way to make one MODEL's index smaller; `MODEL --frontier --help` has more."},
    )
    split: str = field(default="test", metadata={"help": "Split of the judgments; choose settings on dev, not test."})
    baselines: str = field(default="bm25", metadata={"help": "Comma-separated: bm25, minilm, any model; or none."})
    token_pooling: list[str] = field(
        default_factory=list,
        metadata={"help": "Extra rows for multi-vector models: mean, or vectors kept (1 2 4 ...)."},
    )
    output: str | None = field(default=None, metadata={"help": "Folder for <name>.json, <name>.md and <name>.png."})
    name: str = field(default="results", metadata={"help": "Name of the three files."})
    reference: str | None = field(
        default=None, metadata={"help": "System that the others are compared with; default: the last baseline."}
    )
    revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of Hub models."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that the models carry (pin --revision)."}
    )
    keep_empty: bool = field(default=False, metadata={"help": "Accept empty texts instead of refusing the data set."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens per text; default: each model's own."})
    dtype: str = field(default="float16", metadata={"help": "Numbers in the index: float16 or float32."})
    model_dtype: str = field(
        default="float32",
        metadata={"help": "Weights in memory: float32, bfloat16, float16, or auto for the fastest safe."},
    )
    batch_size: int = field(default=16, metadata={"help": "Texts per forward pass."})
    cache_dir: str = field(
        default=".cache/embeddings", metadata={"help": "Where embeddings are kept for the next run."}
    )
    mteb_cache: str = field(
        default=".cache/mteb", metadata={"help": "Where finished tasks of --mteb are kept for the next run."}
    )
    settings_tried: int = field(default=1, metadata={"help": "How many settings were tried before this table."})
    seed: int = field(default=0, metadata={"help": "Seed of the bootstrap."})


def evaluate(argv: list[str], *, prog: str = "polyrep evaluate", untrusted: Collection[str] = ()) -> dict[str, Any]:
    """Measure the models named in ``argv`` and print the table; write JSON, Markdown and PNG with ``--output``.

    Args:
        argv: Models and flags.
        prog: How it was called.
        untrusted: Models whose code does not run whatever the flag says.

    Returns:
        The results, in the layout of :func:`polyrep.report.write_results`.

    Raises:
        InputError: A model, data set or flag cannot be used.
    """
    if any(word.partition("=")[0] == "--frontier" for word in argv):
        from .frontier import frontier  # with all that fits heads: an ordinary table need not wait for it

        return frontier(argv, prog=prog, untrusted=untrusted)
    about = "Measure MODELs and print the table; write it as JSON, Markdown and PNG with --output."
    wanted = "Folders, Hub ids, or minilm; bm25 needs no model."
    args, models = parse(EvaluationArguments, argv, prog, about, "MODEL", wanted, nargs="+")
    if not args.dataset and not args.mteb:
        raise InputError(
            "neither --dataset nor --mteb, so there is nothing to measure on. Name data sets or benchmarks."
        )
    datasets = [load_retrieval_dataset(path, args.split, keep_empty=args.keep_empty) for path in args.dataset]
    suites = open_suites(args.mteb) if args.mteb else []
    baselines = [name for name in args.baselines.split(",") if name and name != "none"]
    if not datasets:
        if "bm25" in models:
            raise InputError(
                "bm25: has no part in --mteb, which runs embedding models. Leave it out or add --dataset."
            )
        if args.token_pooling:
            raise InputError(f"--token_pooling {' '.join(args.token_pooling)}: rows of --dataset alone. Add one.")
        baselines = [name for name in baselines if name != "bm25"]
    systems = list(dict.fromkeys([*baselines, *models]))
    # Whatever can be refused is refused before hours of encoding.
    names = [display_name(system) for system in systems]
    refuse_doubles(systems, names)
    tasks = list(dict.fromkeys(label for suite in suites for label in (*suite.tasks, suite.name)))
    refuse_doubles([*args.dataset, *tasks], [*(dataset.name for dataset in datasets), *tasks])
    reference = args.reference or display_name(baselines[-1] if baselines else systems[0])
    _refuse_unknown(reference.partition(", ")[0], names)  # a comma and what follows name a pooling
    weights = fastest_dtype(args.model_dtype)
    trusted = {system: args.trust_remote_code and system not in untrusted for system in systems}
    folders = {
        system: fetch(system, revision=args.revision, trust_remote_code=trusted[system])
        for system in systems
        if system != "bm25"
    }
    if args.token_pooling and MultiVectorEncoder not in map(family_of, folders.values()):
        raise InputError(f"--token_pooling {' '.join(args.token_pooling)}: no model here has several vectors a text.")

    def opened(system: str) -> Encoder:
        model = load(folders[system], trust_remote_code=trusted[system], dtype=weights)
        if not isinstance(model, Encoder):
            raise InputError(
                f"{system}: the folder of a head, which encodes no text. Name the folder that has it on top."
            )
        if args.max_length:
            if model.max_seq_length is None:
                raise InputError(f"{system}: has no maximal length, so --max_length {args.max_length} means nothing.")
            model.max_seq_length = args.max_length
        return model

    for name, system in zip(names, systems, strict=True):
        if suites and system != "bm25":  # only an opened model says what it takes
            refuse_unfit(name, opened(system), suites)
    rankings: dict[str, list[Ranking]] = {dataset.name: [] for dataset in datasets}
    fingerprints: dict[str, str] = {}
    benchmark_rows: list[dict[str, Any]] = []
    unavailable: dict[str, str] = {}
    for name, system in zip(names, systems, strict=True):
        if system == "bm25":
            for dataset in datasets:
                rankings[dataset.name].append(rank_with_bm25(dataset))
            continue
        fingerprints[name] = fingerprint(folders[system])
        model = opened(system)
        pooling = args.token_pooling if isinstance(model, MultiVectorEncoder) else None
        for dataset in datasets:
            rankings[dataset.name] += rank_with_model(
                name,
                model,
                dataset,
                pooling=pooling,
                cache_dir=args.cache_dir,
                dtype=args.dtype,
                batch_size=args.batch_size,
            )
        if suites:
            measured = measure(
                name,
                model,
                suites,
                fingerprint=fingerprints[name],
                cache_dir=args.mteb_cache,
                batch_size=args.batch_size,
                unavailable=unavailable,
            )
            benchmark_rows += measured.rows
            unavailable = measured.unavailable
    rows = [
        row | hub_source(path)
        for path, dataset in zip(args.dataset, datasets, strict=True)
        for row in table_rows(dataset, rankings[dataset.name], reference, args.seed)
    ]
    made = provenance(shlex.join(["python", prog, *argv] if prog.endswith(".py") else [*prog.split(), *argv]))
    if suites:
        made["versions"]["mteb"] = mteb_package().__version__
    results = {
        "name": args.name,
        **made,
        "seeds": [args.seed],
        "settings_tried": args.settings_tried,
        "models": fingerprints,
        "rows": rows + benchmark_rows,
        "claims": [],
    }
    private = left_out(suites, unavailable)
    if private:
        logger.warning("Left out, since their owners keep the data to themselves: %s.", ", ".join(private))
    failed = {label: reason for label, reason in unavailable.items() if label not in private}
    whole = bool(results["rows"]) and not failed
    if results["rows"]:
        print(write_results(results, Path(args.output) if args.output and whole else None))
    if not whole:
        label, reason = next(iter((failed or unavailable).items()))
        raise InputError(
            f"--mteb: no data set for {', '.join(failed or unavailable)}, so the table lacks them and no file is "
            f"written ({label}: {reason}). What is done is kept in {args.mteb_cache}: check the network, and `hf auth "
            "login` for data that is not open, and give the command again; or leave them out."
        )
    return results


def table_rows(
    dataset: RetrievalDataset, rankings: Sequence[Ranking], reference: str, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows of one data set: every system and metric with its interval, and on nDCG@10 the test against a reference.

    Several rankings of one system are its seeds: they are averaged for each query before anything is resampled.

    Raises:
        InputError: No system is called ``reference``.
    """
    seeds: dict[str, list[Ranking]] = {}
    for ranking in rankings:
        seeds.setdefault(ranking.system, []).append(ranking)
    values, costs = {}, {}
    for system, repeated in seeds.items():
        measured = [per_query_metrics(dataset, ranking) for ranking in repeated]
        values[system] = {metric: np.stack([m[metric] for m in measured]) for metric in METRICS}
        known = [ranking.costs for ranking in repeated]
        costs[system] = {name: float(np.mean([cost[name] for cost in known])) for name in known[0]}
    return metric_rows(dataset.name, dataset.split, values, costs, reference, seed)


def metric_rows(
    dataset: str,
    split: str,
    values: Mapping[str, Mapping[str, np.ndarray]],
    costs: Mapping[str, Mapping[str, float]],
    reference: str,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """The rows of :func:`table_rows`, from what was measured.

    Args:
        dataset: Name of the data set.
        split: Its split.
        values: System -> metric -> ``(seeds, queries)``.
        costs: System -> what goes beside its nDCG@10.
        reference: The system that the others are tested against.
        seed: Seed of the resampling.

    Raises:
        InputError: No system is called ``reference``.
    """
    _refuse_unknown(reference, values)
    others = [system for system in values if system != reference]
    tests = dict(
        zip(
            others, compare({s: values[s]["nDCG@10"] for s in others}, values[reference]["nDCG@10"], seed), strict=True
        )
    )
    rows = []
    for system, measured in values.items():
        for metric in METRICS:
            scores = measured[metric]
            row: dict[str, Any] = {
                "system": system,
                "dataset": dataset,
                "split": split,
                "metric": metric,
                "value": float(scores.mean()),
                "interval": list(bootstrap_interval(scores, seed)),
                "queries": scores.shape[1],
            }
            if len(scores) > 1:
                row |= {"seeds": len(scores), "std": float(scores.mean(axis=1).std(ddof=1))}
            if metric == "nDCG@10":
                row |= costs[system]
                if system in tests:
                    row |= {"reference": reference} | tests[system]
            rows.append(row)
    return rows


def per_query_metrics(dataset: RetrievalDataset, ranking: Ranking) -> dict[str, np.ndarray]:
    """Each metric of :data:`METRICS` for each query: ``(queries,)``, in the order of ``dataset.queries``."""
    ids = list(dataset.corpus)
    found = list(zip(dataset.queries, ranking.positions.tolist(), ranking.scores.tolist(), strict=True))
    run = {query: {ids[p]: s for p, s in zip(positions, scores, strict=True)} for query, positions, scores in found}
    # Reciprocal rank has no cut-off in trec_eval: cut the run instead.
    top10 = {
        query: {ids[p]: s for p, s in zip(positions[:10], scores[:10], strict=True)}
        for query, positions, scores in found
    }
    measured = pytrec_eval.RelevanceEvaluator(dataset.qrels, {"ndcg_cut.3,10", "recall.100"}).evaluate(run)
    reciprocal = pytrec_eval.RelevanceEvaluator(dataset.qrels, {"recip_rank"}).evaluate(top10)
    sources = (
        (measured, "ndcg_cut_10"),
        (measured, "ndcg_cut_3"),
        (reciprocal, "recip_rank"),
        (measured, "recall_100"),
    )
    return {
        metric: np.array([source[query][measure] for query in dataset.queries])
        for metric, (source, measure) in zip(METRICS, sources, strict=True)
    }


def bootstrap_interval(values: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % percentile interval of the mean over queries.

    Args:
        values: ``(queries,)``, or ``(seeds, queries)``, which is averaged over seeds first.
        seed: Seed of the resampling.
        resamples: How many times to resample.
    """
    low, high = np.percentile(_resampled_means(_over_seeds(values), seed, resamples), [2.5, 97.5])
    return float(low), float(high)


def macro_interval(values: Mapping[str, np.ndarray], seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % percentile interval of the mean over data sets of the means over their queries.

    Args:
        values: Data set -> ``(queries,)``.
        seed: Seed of the resampling.
        resamples: How many times to resample the queries of every set.
    """
    generator = np.random.default_rng(seed)
    means = [v[generator.integers(len(v), size=(resamples, len(v)))].mean(1) for v in values.values()]
    low, high = np.percentile(np.mean(means, axis=0), [2.5, 97.5])
    return float(low), float(high)


def compare(
    systems: Mapping[str, np.ndarray], reference: np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> list[dict[str, Any]]:
    """Paired two-sided bootstrap of each system against one reference, Holm-corrected over the systems.

    Args:
        systems: Name -> ``(queries,)`` or ``(seeds, queries)`` values; seeds are averaged per query first.
        reference: Values of the reference on the same queries.
        seed: Seed of the resampling, the same for every system.
        resamples: How many times to resample.

    Returns:
        For each system ``difference`` (of means), its 95 % ``difference_interval`` and the corrected ``p_value``.
    """
    outcomes, p_values = [], []
    for values in systems.values():
        differences = _over_seeds(values) - _over_seeds(reference)
        means = _resampled_means(differences, seed, resamples)
        # One resample is added on each side, so that p is never zero (Davison and Hinkley 1997, section 4.2).
        tails = ((means <= 0).sum() + 1, (means >= 0).sum() + 1)
        p_values.append(min(1.0, 2 * float(min(tails)) / (resamples + 1)))
        outcomes.append(
            {
                "difference": float(differences.mean()),
                "difference_interval": [float(x) for x in np.percentile(means, [2.5, 97.5])],
            }
        )
    return [outcome | {"p_value": p} for outcome, p in zip(outcomes, holm(p_values), strict=True)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the family-wise error stays below the level that corrected values are held to."""
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def _over_seeds(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, dtype=np.float64).reshape(-1, np.shape(values)[-1]).mean(axis=0)


def _resampled_means(values: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Means of ``resamples`` draws with replacement, in blocks that bound memory at 16 MiB of indices."""
    generator = np.random.default_rng(seed)
    block = max(1, 2**21 // len(values))
    sizes = [min(block, resamples - start) for start in range(0, resamples, block)]
    return np.concatenate([values[generator.integers(len(values), size=(n, len(values)))].mean(axis=1) for n in sizes])


def refuse_doubles(sources: Sequence[str], names: Sequence[str]) -> None:
    """Refuse two sources of one name: rows are told apart by it, so both would show the numbers of one of them."""
    for name in names:
        if names.count(name) > 1:
            twins = [source for source, other in zip(sources, names, strict=True) if other == name]
            raise InputError(
                f"{' and '.join(twins)}: both would be {name!r} in the table. Rename a folder or leave one out."
            )


def _refuse_unknown(reference: str, systems: Collection[str]) -> None:
    if reference not in systems:
        raise InputError(f"--reference {reference!r}: no such system; there are {', '.join(map(repr, systems))}.")


def display_name(system: str) -> str:
    """Row name: the folder's, with its parent where that says more (``late-interaction-minilm`` for ``.../final``)."""
    if system == "bm25":
        return "BM25"
    if system == "minilm":
        return "all-MiniLM-L6-v2"
    path = Path(system)
    return path.parent.name if path.name == "final" and path.parent.name else path.name
