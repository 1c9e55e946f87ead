"""What do I lose and what do I save: every way to make the index of one model on one corpus smaller, in one table.

The corpus is encoded once. Each method is fitted within a time, ranked on an index held ready, and kept under a hash
of all it depends on, so that a second run makes only what is missing. Compact rows also serve as the first of two
stages, whose documents the full model orders.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ...data.named import made_here, on_hub
from ...encoding.embeddings import Embeddings
from ...encoding.encoders import kind_of
from ...encoding.windows import Windows, refuse_stride
from ...errors import InputError
from ...files import digest, refuse_unwritable
from ...flags import command_line, parse
from ...hub.cards import hub_source
from ...hub.fingerprint import fingerprint
from ...hub.folder import Encoder, fastest_dtype, fetch, load
from ...hub.reading import set_length
from ...registry import ROOMS
from ...report import hardware, print_and_write, provenance, refuse_unwritable_results
from ..bm25 import analyzer, rank_with_bm25
from ..metrics import METRICS, per_query_metrics
from ..rank_similarity import K, open_pairs, paraphrase_entries, paraphrase_notes
from ..rerank import THEN, Reranker, open_reranker, refuse_depths, rerank_notes
from ..systems import Ranking, costs_of, keep_ranking, latency, refuse_uncut, timed_rows
from ..table import display_name, metric_rows, notes_on, refuse_doubles, settings_of, window_notes
from .advice import Budget, fronts, learned_margins, parse_budget, recommend
from .fit import code_digest
from .fit_data import FitData, cloze_queries, judged_queries
from .full_model import FullModel
from .picture import draw
from .rivals import RIVALS
from .rows import COMMON, FULL, Candidate, Encoded, Method
from .timed import RERANK_DEPTH, loaded, rank_in_two_stages, rank_when_ready

STAGE_DEPTHS = (50, 200)
BUDGETS = ["bytes=256", "bytes=1024", "bytes=4096"]
BM25 = "BM25"

NOTE = (
    "Search ms: one query alone on an index held ready, in float32 in memory unless the row says otherwise; making "
    "the query's vectors is no part of it. int8 and one-bit rows are timed as they are computed here, after "
    "dequantising. Two stages store both and take the time of both; they return no more documents than they score "
    "again, which bounds their Recall@100. Front: no other row is as good at as few bytes (or milliseconds) and "
    "better in one of the two."
)

WINDOWS_NOTE = "What is learned here is learned from the first of what the model reads of a document."

logger = logging.getLogger(__name__)


@dataclass
class FrontierArguments:
    """What to compare, on what, and how much it may cost."""

    _argument_group_name = "frontier"

    dataset: list[str] = field(default_factory=list, metadata={"help": "BEIR folders or Hub data set ids."})
    frontier: bool = field(default=True, metadata={"help": "This command."})
    methods: list[str] = field(default_factory=lambda: ["all"], metadata={"help": "all, or some by name."})
    budget: list[str] = field(
        default_factory=list,
        metadata={
            "action": "extend",
            "help": "Most bytes a document or ms a query, e.g. bytes=256, ms=5, bytes=2048,ms=5; may be repeated. "
            f"Default: {' '.join(BUDGETS)}.",
        },
    )
    split: str = field(default="test", metadata={"help": "Split of the judgments that is measured."})
    queries: str = field(
        default="judged",
        metadata={
            "help": "judged: learn from train, measure --split. inverse_cloze: sentences of the documents, removed "
            "from them, for a corpus without queries; a fifth is measured, the others are learned from."
        },
    )
    language: str = field(
        default="en",
        metadata={
            "help": "Of BM25's stems and stop words: an ISO 639 code; auto for that of each corpus; none for words "
            "as they are."
        },
    )
    fit_seconds: float = field(default=90.0, metadata={"help": "Most seconds to fit a head, encoding left out."})
    paraphrases: str | None = field(
        default=None,
        metadata={
            "help": "How alike are results of two wordings of one need, of every row: pairs by file, qrels or "
            "captions, as without --frontier."
        },
    )
    output: str | None = field(default=None, metadata={"help": "Folder for <name>.json, <name>.md and <name>.png."})
    name: str | None = field(default=None, metadata={"help": "Name of the three files; default: frontier-<data set>."})
    revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of a Hub model."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that the model carries (pin --revision)."}
    )
    keep_empty: bool = field(default=False, metadata={"help": "Accept empty texts instead of refusing the data set."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens per text; default: the model's own."})
    window: int | None = field(
        default=None,
        metadata={"help": "Cut documents into windows of so many tokens; default: what is not read is dropped."},
    )
    stride: int | None = field(
        default=None, metadata={"help": "Tokens from one window to the next; default: --window, no overlap."}
    )
    rerank: str | None = field(
        default=None,
        metadata={"help": "A cross-encoder or a late-interaction model that orders the best of each first stage."},
    )
    rerank_depth: list[int] = field(
        default_factory=lambda: [50], metadata={"help": "Documents of a query that it orders, e.g. 50 200."}
    )
    rerank_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of it on the Hub."})
    model_dtype: str = field(
        default="auto", metadata={"help": "Weights in memory: float32, bfloat16, float16, or auto for the fastest."}
    )
    batch_size: int = field(default=32, metadata={"help": "Texts per forward pass."})
    cache_dir: str = field(default=".cache/embeddings", metadata={"help": "Where embeddings are kept."})
    frontier_cache: str = field(default=".cache/frontier", metadata={"help": "Where heads and rows are kept."})
    settings_tried: int = field(default=1, metadata={"help": "How many settings were tried before this table."})
    seed: int = field(default=0, metadata={"help": "Seed of fits, draws and the bootstrap."})


@dataclass
class Found:
    """The rows of one data set, and what could not be made one."""

    rankings: list[Ranking] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """A row to be ranked: its name, what it depends on, and how it is made."""

    system: str
    depends: Any
    make: Callable[[], Ranking]
    stages: bool = False

    @property
    def ordered(self) -> bool:
        """Whether ``--rerank`` orders what it finds."""
        return self.stages or self.system == FULL


def frontier(argv: list[str], *, prog: str = "polyrep evaluate") -> dict[str, Any]:
    """Compare every way to make a model's index smaller; print the table and what fits each budget.

    Args:
        argv: The model and flags.
        prog: How it was called.

    Returns:
        The results, in the layout of :func:`polyrep.report.write_results`, with ``recommendations`` and ``failures``.

    Raises:
        InputError: The model, a data set or a flag cannot be used.
    """
    about = "Compare every way to make the index of MODEL smaller on a corpus, and say what fits a budget. Methods: "
    about += f"{', '.join(all_methods())}."
    args, source = parse(FrontierArguments, argv, prog, about, "MODEL", "Folder, Hub id, or minilm.")
    budgets = [parse_budget(text) for text in args.budget or BUDGETS]
    _refuse_flags(args)
    output = Path(args.output) if args.output else None
    refuse_unwritable_results(output, args.name or "frontier")
    for flag in ("cache_dir", "frontier_cache"):
        refuse_unwritable(Path(getattr(args, flag)), f"--{flag}")
    models = _open(args, source)
    methods = chosen_methods(args.methods, source, models[0].model)
    reranker = open_reranker(args, [full.dataset for full in models])
    pairs = {of.dataset.name: of for of in open_pairs(args.paraphrases, K, [full.dataset for full in models])}
    if any(all_methods()[name].reads_dev for name in methods):
        _ = [full.dev for full in models]  # read before anything is encoded, since it may be refused
    results = {
        "name": args.name or f"frontier-{'-'.join(full.dataset.name for full in models)}",
        **provenance(command_line(prog, argv)),
        "seeds": [args.seed],
        "settings_tried": args.settings_tried,
        "models": {display_name(source): fingerprint(models[0].folder)},
        "rows": [],
        "claims": [],
        "data": made_here(*args.dataset),
        "recommendations": [],
        "failures": [],
        "notes": [
            NOTE,
            *window_notes(args.window, args.stride),
            *([WINDOWS_NOTE] if args.window else ()),
            *rerank_notes(args.rerank, args.window),
            *(full.fit_data.note for full in models if full.fit_data.note),
            *(note for full in models for note in notes_on(full.dataset)),
        ],
        "fit_seconds": args.fit_seconds,
    }
    for path, full in zip(args.dataset, models, strict=True):
        found = rank_all(full, methods, reranker)
        rows, advice, margins = tabulate(full, found.rankings, budgets)
        results["rows"] += [row | hub_source(*on_hub(path)) for row in rows]
        results["recommendations"] += advice
        results["claims"] += margins
        results["failures"] += found.failures
        if of := pairs.get(full.dataset.name):
            results.setdefault("paraphrases", [])
            results["paraphrases"] += paraphrase_entries(of, found.rankings, None, seed=args.seed)
    if pairs:
        results["notes"] += paraphrase_notes(list(pairs.values()))
    if reranker:
        results["models"][reranker.name] = reranker.fingerprint
    print_and_write(results, output, picture=draw)
    return results


def _open(args: FrontierArguments, source: str) -> list[FullModel]:
    """The model, once, on every data set.

    Raises:
        InputError: It, or a data set, cannot be used.
    """
    parts = [_read(args, path) for path in args.dataset]
    if args.window:
        for dataset, _ in parts:
            refuse_uncut(dataset, args.window)
    refuse_doubles(args.dataset, [dataset.name for dataset, _ in parts])
    for dataset, _ in parts:
        # With the default, it is the row alone that may fail.
        if args.language != "en" and isinstance(next(iter(dataset.corpus.values())), str):
            analyzer(args.language, list(dataset.corpus.values()))
    folder = fetch(source, revision=args.revision, trust_remote_code=args.trust_remote_code)
    weights = fastest_dtype(args.model_dtype)
    model: Any = load(folder, trust_remote_code=args.trust_remote_code, dtype=weights)
    windows = None
    if isinstance(model, Encoder):
        set_length(model, args.max_length, source)
        windows = Windows.of(model, args.window, args.stride, source)
    return [
        FullModel(
            model,
            folder,
            dataset,
            fit_data,
            args.cache_dir,
            Path(args.frontier_cache),
            fit_seconds=args.fit_seconds,
            seed=args.seed,
            weights=weights,
            batch_size=args.batch_size,
            trust_remote_code=args.trust_remote_code,
            language=args.language,
            windows=windows,
        )
        for dataset, fit_data in parts
    ]


def all_methods() -> dict[str, Method]:
    """Name of ``--methods`` -> method: what rooms bring, then their rivals."""
    rooms = {room.package.rpartition(".")[2]: room.named(room.frontier) for room in ROOMS.values() if room.frontier}
    if twice := sorted(rooms.keys() & RIVALS.keys()):
        raise InputError(f"--methods {twice[0]}: a room and a rival are called so. Rename the room's folder.")
    return rooms | RIVALS


def learned_titles() -> tuple[str, ...]:
    """Methods of this package that learn, by what stands before a comma in their rows."""
    return tuple(method.title for method in all_methods().values() if method.title)


def chosen_methods(names: list[str], source: str, model: Encoder) -> list[str]:
    """The methods that are asked for and apply to the model.

    Raises:
        InputError: A method was named that does not apply, or the model is none to make smaller.
    """
    if not isinstance(model, Encoder) or kind_of(model) not in ("tokens", "sentence"):
        raise InputError(
            f"{source}: is a {type(model).__name__}, but an index is made smaller here from dense vectors, one or "
            "several a text. Name a SentenceTransformer or a MultiVectorEncoder."
        )
    fitting = [name for name, method in all_methods().items() if kind_of(model) in method.kinds]
    for name in names:
        if name != "all" and name not in fitting:
            raise InputError(
                f"--methods {name}: is not for a {type(model).__name__} such as {source}. Use all, or some of "
                f"{', '.join(fitting)}."
            )
    return [name for name in fitting if "all" in names or name in names]


def rank_all(full: FullModel, methods: list[str], reranker: Reranker | None = None) -> Found:
    """Rank every row of one data set, or take it from where it is kept; a row that fails does not stop the others.

    Raises:
        Exception: Whatever stopped the full model's own row.
    """
    # Times are of the machine, the device and the number of threads, and so are fits within a time.
    machine = [hardware(), str(full.model.device)]
    data = [
        full.queries.path.name,
        full.documents.path.name,
        full.dataset.qrels,
        full.dataset.own.tolist(),
        full.seed,
        machine,
    ]
    learned = [full.fit_data.dataset.queries, full.fit_data.dataset.qrels, full.fit_data.settings, full.fit_seconds]
    jobs = list(_jobs(full, methods, learned))
    out = Found()
    in_memory: list[Embeddings] = []
    ordered = len(reranker.depths) if reranker else 0
    total = len(jobs) + sum(len(STAGE_DEPTHS) * job.stages + ordered * job.ordered for job in jobs)
    with tqdm(total=total, desc=full.dataset.name, unit="row") as progress:
        while jobs:
            job = jobs.pop(0)  # and with it what it holds, once it is done
            progress.set_postfix_str(job.system)
            key = digest([job.system, data, job.depends])
            try:
                ranking = keep_ranking(_place(full, key), job.system, job.make, RERANK_DEPTH)
            except (Exception, SystemExit) as error:  # the latter is how a parser refuses a value of a recipe
                if job.system == FULL:
                    raise
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                logger.warning("%s, %s failed: %s", full.dataset.name, job.system, reason)
                logger.debug("What failed:", exc_info=error)
                out.failures.append({"system": job.system, "dataset": full.dataset.name, "reason": reason})
                progress.update(1 + len(STAGE_DEPTHS) * job.stages + ordered * job.ordered)
                continue
            out.rankings.append(ranking)
            progress.update()
            if reranker and job.ordered:
                jobs[:0] = [_ordered(full, ranking, reranker, depth, key) for depth in reranker.depths]
            if job.stages:
                jobs[:0] = [_second_stage(full, ranking, depth, [key, depth], in_memory) for depth in STAGE_DEPTHS]
    return out


def _place(full: FullModel, key: str) -> Path:
    return full.kept / "rows" / f"{full.dataset.name}-{key}.safetensors"


def _jobs(full: FullModel, methods: list[str], learned: Any) -> Iterator[Job]:
    """The rows of one stage, the references first."""
    whole = Candidate(FULL, lambda: Encoded(full.queries, full.documents, full.similarity))
    yield Job(FULL, code_digest(*COMMON), lambda: _ranked(full, whole))
    if isinstance(next(iter(full.dataset.corpus.values())), str):  # images have no words to find them by
        code = code_digest(*COMMON, "evaluation/bm25.py", "encoding/bm25.py", "data/words.py")
        yield Job(BM25, [code, full.language], lambda: _bm25(full), True)
    known = all_methods()
    for name in methods:
        method = known[name]
        depends = [method.digest(), learned if method.run else None]
        if method.reads_dev:
            depends.append([full.dev.queries, full.dev.qrels] if full.dev else None)
        for candidate in method.rows(full):
            yield Job(candidate.system, depends, lambda c=candidate: _ranked(full, c), candidate.first_stage)  # type: ignore[misc]


def _ranked(full: FullModel, candidate: Candidate) -> Ranking:
    row = candidate.make()
    options: dict[str, Any] = {"similarity": row.similarity, "device": full.model.device, "left_out": full.dataset.own}
    ranking = rank_when_ready(candidate.system, row.queries, row.documents, full.ranks, **options)
    if row.then:  # one index: the bytes of the second stage are those of both
        then, depth = row.then
        size = costs_of(then.queries, then.documents)["bytes_per_document"]
        held: dict[str, Any] = {"similarity": then.similarity, "device": full.model.device}
        held["full_bytes"] = size - ranking.costs["bytes_per_document"]
        sides = then.queries, loaded(then.documents)
        ranking = rank_in_two_stages(candidate.system, ranking, depth, *sides, full.ranks, **held)
        row = replace(row, costs=then.costs)
    return replace(ranking, costs=ranking.costs | row.costs, settings=row.settings)


def _bm25(full: FullModel) -> Ranking:
    """BM25 with the time of the queries that every row is timed by."""
    ranking = rank_with_bm25(full.dataset, RERANK_DEPTH, language=full.language)
    assert ranking.seconds is not None
    rows = timed_rows(len(ranking.seconds))
    seconds = np.full(len(ranking.seconds), np.nan)
    seconds[rows] = ranking.seconds[rows]
    costs = ranking.costs | latency(seconds[rows].tolist())
    costs.pop("encode_docs_per_s")  # which no other row has: their texts were encoded once, perhaps on another day
    return replace(ranking, seconds=seconds, costs=costs)


def _ordered(full: FullModel, first: Ranking, reranker: Reranker, depth: int, depends: Any) -> Job:
    """The best of a first stage, or of the full model, in the order of ``--rerank``."""
    depends = [depends, depth, reranker.fingerprint, str(reranker.model.dtype), code_digest("evaluation/rerank.py")]
    depends.append(reranker.windows and reranker.windows.key)
    return Job(reranker.system(first, depth), depends, lambda: reranker.rank(first, full.dataset, depth))


def _second_stage(full: FullModel, first: Ranking, depth: int, depends: Any, in_memory: list[Embeddings]) -> Job:
    system = f"{first.system}, rerank {depth}"

    def make() -> Ranking:
        if not in_memory:  # from the first row that reads it on
            in_memory.append(loaded(full.documents))
        size = costs_of(full.queries, full.documents)["bytes_per_document"]
        options: dict[str, Any] = {"similarity": full.similarity, "device": full.model.device, "full_bytes": size}
        return rank_in_two_stages(system, first, depth, full.queries, in_memory[0], full.ranks, **options)

    return Job(system, [depends, code_digest(*COMMON)], make)


def tabulate(
    full: FullModel, rankings: list[Ranking], budgets: list[Budget]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of one data set with intervals, tests against the full model and fronts; advice for each budget; claims."""
    values = {ranking.system: per_query_metrics(full.dataset, ranking) for ranking in rankings}
    stacked = {system: {metric: of[metric][None] for metric in METRICS} for system, of in values.items()}
    costs = {ranking.system: ranking.costs | settings_of(ranking) for ranking in rankings}
    rows = metric_rows(full.dataset.name, full.dataset.split, stacked, costs, FULL, full.seed)
    main = [row for row in rows if row["metric"] == "nDCG@10"]
    for row, found in zip(main, fronts(main), strict=True):
        row["pareto"] = found
    per_query = {system: of["nDCG@10"] for system, of in values.items()}
    advice = recommend(main, per_query, budgets, full=FULL, seed=full.seed)
    same = f" Rows were chosen and measured on the same {len(full.dataset.queries):,} queries."
    advice = [entry | {"dataset": full.dataset.name, "text": entry["text"] + same} for entry in advice]
    stored = [row for row in main if THEN not in row["system"]]  # what another model orders says nothing of methods
    margins = learned_margins(stored, per_query, learned_titles(), seed=full.seed)
    return rows, advice, [entry | {"dataset": full.dataset.name} for entry in margins]


def _read(args: FrontierArguments, path: str) -> tuple[Any, FitData]:
    if args.queries == "inverse_cloze":
        return cloze_queries(path, Path(args.frontier_cache) / "cloze", keep_empty=args.keep_empty)
    return judged_queries(path, args.split, keep_empty=args.keep_empty)


def _refuse_flags(args: FrontierArguments) -> None:
    refuse_stride(args.window, args.stride)
    refuse_depths(args.rerank, args.rerank_depth, args.rerank_revision)
    if args.rerank and max(args.rerank_depth) > RERANK_DEPTH:
        raise InputError(
            f"--rerank_depth {max(args.rerank_depth)}: rows of the frontier hold {RERANK_DEPTH} documents of a query. "
            f"Use {RERANK_DEPTH} or less."
        )
    if not args.frontier:
        raise InputError("--frontier false: then it is the ordinary table. Leave the flag out.")
    if not args.dataset:
        raise InputError("no --dataset, so there is nothing to measure on. Name data sets.")
    if args.paraphrases in ("misspelt", "cut"):
        raise InputError(
            f"--paraphrases {args.paraphrases}: makes queries that every row would have to be searched with again, "
            "which --frontier does not. Use file, qrels or captions, or evaluate the model without --frontier."
        )
    if args.queries not in ("judged", "inverse_cloze"):
        raise InputError(f"--queries {args.queries!r}: use judged or inverse_cloze.")
    if not 0 < args.fit_seconds < float("inf"):
        raise InputError(f"--fit_seconds {args.fit_seconds}: no time to fit a head in. Use e.g. 90.")
    known = all_methods()
    if unknown := [name for name in args.methods if name != "all" and name not in known]:
        raise InputError(f"--methods {unknown[0]}: unknown. Use all, or some of {', '.join(known)}.")
