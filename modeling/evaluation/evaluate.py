"""Measure retrieval models: metrics per query, honest comparisons, and a table with its picture.

Numbers agree with MTEB: pytrec_eval metrics, document text = title + space + text, runs cut at 1,000, ties by higher
document id first. Every comparison is a paired bootstrap over queries, corrected for the number of rows in its table.
Public benchmarks by name are MTEB's own business: see ``mteb.py``.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sentence_transformers import MultiVectorEncoder

from ..data.load import load_retrieval_dataset
from ..errors import InputError
from ..flags import parse
from ..hub.cards import hub_source
from ..hub.fingerprint import fingerprint
from ..hub.folder import Encoder, family_of, fastest_dtype, fetch, load
from ..report import provenance, write_results
from .mteb import left_out, mteb_package, open_suites, refuse_unfit, run_suites
from .systems import Ranking, rank_with_bm25, rank_with_model
from .table import display_name, refuse_doubles, refuse_unknown, table_rows

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
    refuse_unknown(reference.partition(", ")[0], names)  # a comma and what follows name a pooling
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
            measured = run_suites(
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
