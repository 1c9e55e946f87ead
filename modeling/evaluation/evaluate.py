"""Measure retrieval models: metrics per query, honest comparisons, and a table with its picture.

Numbers agree with MTEB: metrics of trec_eval, document text = title + space + text, runs cut at 1,000, ties by higher
document id first. Every comparison is a paired bootstrap over queries, corrected for the number of rows in its table.
Public benchmarks by name are MTEB's own business: see ``mteb.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sentence_transformers import MultiVectorEncoder

from ..data.dataset import RetrievalDataset
from ..data.load import load_retrieval_dataset
from ..data.named import made_here, on_hub
from ..data.paraphrases import Pairs
from ..encoding.windows import Windows, refuse_stride
from ..errors import InputError
from ..files import refuse_unwritable
from ..flags import as_flags, changed_fields, command_line, parse
from ..hub.cards import hub_source
from ..hub.fingerprint import fingerprint
from ..hub.folder import Encoder, family_of, fastest_dtype, fetch, load
from ..hub.reading import set_length
from ..report import print_and_write, provenance, refuse_unwritable_results
from .bm25 import analyzer_of, rank_with_bm25
from .hybrid import HYBRID_NOTE, Side, load_dev, rank_hybrid, refuse_unfit_hybrid, side_of_bm25, side_of_model
from .indexes import is_index, open_askers, opened, rank_with_index, refuse_unfit_indexes
from .mteb import Suite, left_out, mteb_package, open_suites, refuse_unfit, run_suites
from .rank_similarity import K, open_pairs, paraphrase_entries, paraphrase_notes
from .rerank import open_reranker, refuse_depths, rerank_notes
from .systems import Ranking, rank_with_model, refuse_uncut
from .table import display_name, notes_on, refuse_doubles, refuse_unknown, table_rows, window_notes

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
            "bm25 and its --language nor --token_pooling, --dtype, --reference have a part in them."
        },
    )
    frontier: bool = field(
        default=False,
        metadata={"help": "Instead: every way to make one MODEL's index smaller; `MODEL --frontier --help` has more."},
    )
    split: str = field(default="test", metadata={"help": "Split of the judgments; choose settings on dev, not test."})
    baselines: str = field(default="bm25", metadata={"help": "Comma-separated: bm25, minilm, any model; or none."})
    language: str = field(
        default="en",
        metadata={
            "help": "Of bm25's stems and stop words: an ISO 639 code; auto for that of each corpus; none for words "
            "as they are."
        },
    )
    token_pooling: list[str] = field(
        default_factory=list,
        metadata={"help": "Extra rows for multi-vector models: mean, or vectors kept (1 2 4 ...)."},
    )
    hybrid: bool = field(
        default=False,
        metadata={
            "help": "Sum the scores of two MODELs in a further row: the first finds candidates, and the weight of the "
            "second is chosen on dev. bm25 may be one of them."
        },
    )
    hybrid_weight: float | None = field(
        default=None, metadata={"help": "Weight of the second MODEL's scores, instead of one that is chosen on dev."}
    )
    rerank: str | None = field(
        default=None,
        metadata={
            "help": "A cross-encoder or a late-interaction model that orders the best of each system in further rows."
        },
    )
    rerank_depth: list[int] = field(
        default_factory=lambda: [50], metadata={"help": "Documents of a query that it orders, e.g. 50 200."}
    )
    rerank_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of it on the Hub."})
    paraphrases: str | None = field(
        default=None,
        metadata={
            "help": "How alike are results of one need in two wordings: pairs of the data set's paraphrases.jsonl "
            "(file), of queries with a document in common (qrels), of captions of one image (captions), or of each "
            "query and the same misspelt or cut short (misspelt, cut)."
        },
    )
    paraphrase_k: int = field(default=K, metadata={"help": "Documents of a list that --paraphrases compares."})
    index_model: str = field(
        default="minilm",
        metadata={"help": "What makes vectors of queries where MODEL is the URI of an index; as --model of search."},
    )
    index_weights: str = field(
        default="", metadata={"help": "Rank there by a weighted sum of several kinds; as --weights of search."}
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
    window: int | None = field(
        default=None,
        metadata={"help": "Cut documents into windows of so many tokens; default: what is not read is dropped."},
    )
    stride: int | None = field(
        default=None, metadata={"help": "Tokens from one window to the next; default: --window, no overlap."}
    )
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


@dataclass(frozen=True)
class System:
    """One of those that are compared.

    Attributes:
        name: In tables.
        source: As the user names it.
        folder: Where it is; None for BM25 and for an index.
    """

    name: str
    source: str
    folder: Path | None

    @property
    def is_index(self) -> bool:
        """Whether it is an index, which is searched as it is."""
        return is_index(self.source)

    def open(self, args: EvaluationArguments) -> Encoder:
        """The model, with weights and length as they are asked for."""
        assert self.folder
        model = load(self.folder, trust_remote_code=args.trust_remote_code, dtype=fastest_dtype(args.model_dtype))
        if not isinstance(model, Encoder):
            raise InputError(
                f"{self.source}: the folder of a head, which encodes no text. Name the folder that has it on top."
            )
        set_length(model, args.max_length, self.source)
        return model

    def windows(self, model: Encoder, args: EvaluationArguments) -> Windows | None:
        """How the documents of data sets are cut for the model."""
        return Windows.of(model, args.window, args.stride, self.source)


@dataclass
class Measurements:
    """What was found of all systems.

    Attributes:
        rankings: Data set -> what each system found there.
        reworded: Data set -> likewise, for its queries in other words, where these are queries of their own.
        fingerprints: System -> its fingerprint.
        benchmark_rows: Rows of MTEB's tasks, which MTEB measures itself.
        unavailable: Task -> why its data could not be had.
    """

    rankings: dict[str, list[Ranking]]
    reworded: dict[str, list[Ranking]] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    benchmark_rows: list[dict[str, Any]] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)

    def wordings_of(self, dataset: str) -> tuple[list[Ranking], list[Ranking] | None]:
        """What each system found for both wordings; None where the second are queries of the data set."""
        return self.rankings[dataset], self.reworded.get(dataset)


class Asked(NamedTuple):
    """Queries that are searched for, and where it is kept what each system found.

    Attributes:
        dataset: Whose queries.
        dev: What a weight is chosen on.
        rankings: One or more for each system, in their order.
    """

    dataset: RetrievalDataset
    dev: RetrievalDataset | None
    rankings: list[Ranking]


def evaluate(argv: list[str], *, prog: str = "polyrep evaluate") -> dict[str, Any]:
    """Measure the models named in ``argv``; see :func:`evaluate_models`."""
    about = "Measure MODELs and print the table; write it as JSON, Markdown and PNG with --output."
    wanted = "Folders, Hub ids, or minilm; bm25 needs no model; or URIs of indexes, with --index_model."
    args, models = parse(EvaluationArguments, argv, prog, about, "MODEL", wanted, nargs="+")
    return evaluate_models(args, models, command=command_line(prog, argv))


def evaluate_models(args: EvaluationArguments, models: Sequence[str], *, command: str | None = None) -> dict[str, Any]:
    """Measure models and print the table; write JSON, Markdown and PNG if ``args.output`` is set.

    Args:
        args: What to measure, on what, against what.
        models: Folders, Hub ids, ``minilm`` or ``bm25``, or URIs of indexes.
        command: What the results say that they were made by; default: the command that asks for the same.

    Returns:
        The results, in the layout of :func:`polyrep.report.write_results`.

    Raises:
        InputError: A model, data set or flag cannot be used.
    """
    # Whatever can be refused is refused before hours of encoding.
    refuse_unwritable_results(Path(args.output) if args.output else None, args.name)
    fastest_dtype(args.model_dtype)
    refuse_stride(args.window, args.stride)
    refuse_depths(args.rerank, args.rerank_depth, args.rerank_revision)
    refuse_unfit_hybrid(args, models, bool(args.dataset))
    datasets, suites = _open_data(args)
    systems, reference = _open_systems(args, models, bool(datasets))
    _refuse_unfit(args, systems, datasets, suites)
    pairs = open_pairs(args.paraphrases, args.paraphrase_k, datasets)
    devs = [load_dev(path, dataset, args) for path, dataset in zip(args.dataset, datasets, strict=True)]
    data = made_here(*args.dataset)
    pair = [next(system for system in systems if system.source == model) for model in models] if args.hybrid else []
    found = _measure(args, systems, datasets, suites, pair, devs, pairs)
    rows = [
        row | hub_source(*on_hub(path))
        for path, dataset in zip(args.dataset, datasets, strict=True)
        for row in table_rows(dataset, found.rankings[dataset.name], reference, args.seed)
    ]
    made = provenance(command or command_line("polyrep evaluate", [*models, *as_flags(changed_fields(args))]))
    if suites:
        made["versions"]["mteb"] = mteb_package().__version__
    results = {
        "name": args.name,
        **made,
        "seeds": [args.seed],
        "settings_tried": args.settings_tried,
        "models": found.fingerprints,
        "rows": rows + found.benchmark_rows,
        "claims": [],
        "data": data,
        "notes": [
            *window_notes(args.window, args.stride),
            *([HYBRID_NOTE] if args.hybrid else ()),
            *rerank_notes(args.rerank, args.window),
            *(note for d in datasets for note in notes_on(d)),
        ],
    }
    if pairs:
        how: dict[str, Any] = {"k": args.paraphrase_k, "seed": args.seed}
        results["paraphrases"] = [
            entry for of in pairs for entry in paraphrase_entries(of, *found.wordings_of(of.dataset.name), **how)
        ]
        results["notes"] += paraphrase_notes(pairs, args.paraphrase_k)
    _write(args, results, suites, found.unavailable)
    return results


def _open_data(args: EvaluationArguments) -> tuple[list[RetrievalDataset], list[Suite]]:
    """The data sets and the benchmarks; InputError if there are none."""
    if not args.dataset and not args.mteb:
        raise InputError(
            "neither --dataset nor --mteb, so there is nothing to measure on. Name data sets or benchmarks."
        )
    datasets = [load_retrieval_dataset(path, args.split, keep_empty=args.keep_empty) for path in args.dataset]
    suites = open_suites(args.mteb) if args.mteb else []
    tasks = list(dict.fromkeys(label for suite in suites for label in (*suite.tasks, suite.name)))
    refuse_doubles([*args.dataset, *tasks], [*(dataset.name for dataset in datasets), *tasks])
    return datasets, suites


def _open_systems(args: EvaluationArguments, models: Sequence[str], searches: bool) -> tuple[list[System], str]:
    """Baselines and models, fetched, and the name of the one that the others are compared with.

    Args:
        args: The flags.
        models: What the user names.
        searches: Whether there is a data set to search, where MTEB does not.
    """
    baselines = [name for name in args.baselines.split(",") if name and name != "none"]
    if not searches:
        if "bm25" in models:
            raise InputError(
                "bm25: has no part in --mteb, which runs embedding models. Leave it out or add --dataset."
            )
        if args.token_pooling:
            raise InputError(f"--token_pooling {' '.join(args.token_pooling)}: rows of --dataset alone. Add one.")
        if args.rerank:
            raise InputError(f"--rerank {args.rerank}: orders what is found in --dataset alone. Add one.")
        if args.window:
            raise InputError(f"--window {args.window}: cuts documents of --dataset alone, not those of MTEB. Add one.")
        if args.paraphrases:
            raise InputError(f"--paraphrases {args.paraphrases}: compares what is found in --dataset alone. Add one.")
        if uris := [name for name in models if is_index(name)]:
            raise InputError(f"{uris[0]}: an index, which is searched with --dataset alone. Add one.")
        baselines = [name for name in baselines if name != "bm25"]
    sources = list(dict.fromkeys([*baselines, *models]))
    names = [source if is_index(source) else display_name(source) for source in sources]
    ordering = [args.rerank] if args.rerank and args.rerank not in sources else []
    refuse_doubles([*sources, *ordering], [*names, *map(display_name, ordering)])
    reference = args.reference or names[sources.index(baselines[-1]) if baselines else 0]
    refuse_unknown(reference.partition(", ")[0], names)  # a comma and what follows name a pooling
    systems = []
    for name, source in zip(names, sources, strict=True):
        folder = None
        if source != "bm25" and not is_index(source):
            folder = fetch(source, revision=args.revision, trust_remote_code=args.trust_remote_code)
        systems.append(System(name, source, folder))
    return systems, reference


def _refuse_unfit(
    args: EvaluationArguments, systems: Sequence[System], datasets: Sequence[RetrievalDataset], suites: Sequence[Suite]
) -> None:
    """InputError if there is nothing to pool or cut, no word for BM25, no cache, or a model that cannot be run."""
    encodes = any(system.folder for system in systems)
    for flag, used in (("cache_dir", encodes and bool(datasets)), ("mteb_cache", encodes and bool(suites))):
        if used:
            refuse_unwritable(Path(getattr(args, flag)), f"--{flag}")
    if any(system.source == "bm25" for system in systems):
        for dataset in datasets:
            analyzer_of(dataset, args.language)
    elif args.language != "en":
        raise InputError(
            f"--language {args.language}: of bm25, which is no row here, so it would change nothing. Add bm25 to "
            "--baselines, with a --dataset, or leave it out."
        )
    refuse_unfit_indexes(args, [system.source for system in systems if system.is_index], datasets, bool(suites))
    folders = [system.folder for system in systems if system.folder]
    if args.token_pooling and MultiVectorEncoder not in map(family_of, folders):
        raise InputError(f"--token_pooling {' '.join(args.token_pooling)}: no model here has several vectors a text.")
    for dataset in datasets:
        if args.window:
            refuse_uncut(dataset, args.window)
    open_reranker(args, datasets)
    for system in systems:
        if system.folder and (suites or args.window):  # only an opened model says what it takes
            model = system.open(args)
            system.windows(model, args)
            if suites:
                refuse_unfit(system.name, model, suites)


def _measure(
    args: EvaluationArguments,
    systems: Sequence[System],
    datasets: Sequence[RetrievalDataset],
    suites: Sequence[Suite],
    pair: Sequence[System],
    devs: Sequence[RetrievalDataset | None],
    pairs: Sequence[Pairs],
) -> Measurements:
    """Rank every data set by every system and by the sum of a pair, and run the benchmarks.

    One model is in memory at a time.
    """
    found = Measurements({dataset.name: [] for dataset in datasets})
    found.reworded = {of.dataset.name: [] for of in pairs if of.needs_second_search}
    asked = [Asked(d, dev, found.rankings[d.name]) for d, dev in zip(datasets, devs, strict=True)]
    for of, dev in zip(pairs, devs, strict=True) if pairs else ():
        if of.needs_second_search:
            asked.append(Asked(of.reworded, dev, found.reworded[of.dataset.name]))
    sides: dict[tuple[str, str, str], Side] = {}  # of a system, a data set and its split
    for system in systems:
        if system.is_index:
            askers = open_askers(system.source, args)
            for asker in askers:
                found.fingerprints[f"{system.name} by {display_name(asker.source)}"] = asker.fingerprint
            depth = args.paraphrase_k if pairs else 1
            with opened(system.source, askers, datasets[0]) as target:
                for dataset, _, rankings in asked:
                    rankings.append(rank_with_index(system.source, target, askers, dataset, args, depth))
            continue
        if not system.folder:
            for dataset, dev, rankings in asked:
                rankings.append(rank_with_bm25(dataset, language=args.language))
                if system in pair:
                    side = side_of_bm25(system.name, dataset, dev, args.language)
                    sides[system.name, dataset.name, dataset.split] = side
            continue
        digest = found.fingerprints[system.name] = fingerprint(system.folder)
        model = system.open(args)
        options: dict[str, Any] = {"cache_dir": args.cache_dir, "dtype": args.dtype, "batch_size": args.batch_size}
        options["windows"] = system.windows(model, args)
        pooling = None
        if isinstance(model, MultiVectorEncoder):
            pooling = list(dict.fromkeys(args.token_pooling))  # twins would be taken for seeds
        for dataset, dev, rankings in asked:
            rankings += rank_with_model(system.name, model, dataset, pooling=pooling, **options)
            if system in pair:
                side = side_of_model(system.name, model, dataset, dev, **options)
                sides[system.name, dataset.name, dataset.split] = side
        if suites:
            measured = run_suites(
                system.name,
                model,
                suites,
                fingerprint=digest,
                cache_dir=args.mteb_cache,
                batch_size=args.batch_size,
                unavailable=found.unavailable,
            )
            found.benchmark_rows += measured.rows
            found.unavailable = measured.unavailable
    for dataset, dev, rankings in asked if pair else ():
        one, other = (sides[system.name, dataset.name, dataset.split] for system in pair)
        rankings += rank_hybrid(one, other, dataset, dev, args.hybrid_weight)
    if reranker := open_reranker(args, datasets):
        found.fingerprints[reranker.name] = reranker.fingerprint
        for dataset, _, rankings in asked:
            rankings += [reranker.rank(r, dataset, d) for r in list(rankings) for d in reranker.depths]
    return found


def _write(
    args: EvaluationArguments, results: dict[str, Any], suites: Sequence[Suite], unavailable: Mapping[str, str]
) -> None:
    """Print the table, and write it if it is whole.

    Raises:
        InputError: A task's data could not be had, so that it is not.
    """
    private = left_out(suites, unavailable)
    if private:
        logger.warning("Left out, since their owners keep the data to themselves: %s.", ", ".join(private))
    failed = {label: reason for label, reason in unavailable.items() if label not in private}
    whole = bool(results["rows"]) and not failed
    if results["rows"]:
        print_and_write(results, Path(args.output) if args.output and whole else None)
    if not whole:
        label, reason = next(iter((failed or unavailable).items()))
        raise InputError(
            f"--mteb: no data set for {', '.join(failed or unavailable)}, so the table lacks them and no file is "
            f"written ({label}: {reason}). What is done is kept in {args.mteb_cache}: check the network, and `hf auth "
            "login` for data that is not open, and give the command again; or leave them out."
        )
