"""Public benchmarks, run by MTEB itself: its tasks, data and metrics, and our cache keys, checks and rows.

A number for a leaderboard has to be MTEB's own, so nothing is measured here. What is ours: names are settled and
models refused before hours of encoding; what MTEB keeps of a run is filed under everything that the numbers depend on,
so that a model trained anew in the same folder is measured anew; and the outcome has the layout of every other result.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import json
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sentence_transformers import MultiVectorEncoder, SparseEncoder
from tqdm import tqdm

from ..encoding.cache import cache_key
from ..encoding.encoders import kind_of
from ..errors import InputError
from ..hub.cards import hub_source
from ..hub.folder import Encoder
from ..report import METRIC_NAMES

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Suite:
    """What one name on the command line stands for.

    Attributes:
        name: Name of the benchmark or of the task, as MTEB spells it.
        tasks: Name in tables -> MTEB's task.
        benchmark: MTEB's benchmark; None for a task named alone.
    """

    name: str
    tasks: dict[str, Any]
    benchmark: Any = None


@dataclass
class SuiteRows:
    """Rows of one model, and what kept other rows away.

    Attributes:
        rows: In the layout of :func:`polyrep.report.write_results`.
        unavailable: Name in tables -> why the data set could not be had.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)


def mteb_package() -> Any:
    """The package ``mteb``, imported only when it is asked for: that takes seconds.

    Raises:
        InputError: It is not installed.
    """
    try:
        return importlib.import_module("mteb")
    except ModuleNotFoundError as error:
        if error.name != "mteb":
            raise
        raise InputError(
            '--mteb: the package mteb is not installed, so there are no benchmarks. Run `pip install "polyrep[mteb]"`.'
        ) from None


def open_suites(names: Sequence[str]) -> list[Suite]:
    """Find benchmarks and tasks by name; no data set is opened.

    A task that several of them have is one object under one name. Where two benchmarks take different languages or
    splits of a task, the second one's name says whose it is.

    Raises:
        InputError: MTEB knows no benchmark or task of a name; the nearest names are listed.
    """
    mteb = mteb_package()
    found: dict[str, tuple[list[Any], Any]] = {}
    for name in names:
        try:
            benchmark = mteb.get_benchmark(name)
        except KeyError:
            try:
                found[name] = ([mteb.get_task(name)], None)
            except KeyError:
                raise InputError(_unknown(name)) from None
        else:
            if benchmark.name != name:
                logger.warning("%s is an alias; the benchmark and its rows are called %s.", name, benchmark.name)
            found[benchmark.name] = (list(benchmark.tasks), benchmark)
    suites: list[Suite] = []
    labels: dict[Any, str] = {}
    tasks: dict[str, Any] = {}
    for name, (listed, benchmark) in found.items():
        for task in listed:
            short = task.metadata.name
            label = labels.setdefault(_scope(task), short if short not in tasks else f"{short} in {name}")
            tasks.setdefault(label, task)
        suites.append(Suite(name, {labels[_scope(task)]: tasks[labels[_scope(task)]] for task in listed}, benchmark))
    return suites


def refuse_unfit(system: str, model: Encoder, suites: Sequence[Suite]) -> None:
    """Refuse, before anything is encoded, a model that tasks ask for what it cannot do.

    Raises:
        InputError: Names the tasks and what they need: a kind of input, or one vector a text.
    """
    mteb_package()
    from mteb.abstasks import AbsTaskRetrieval

    tasks = {label: task for suite in suites for label, task in suite.tasks.items()}
    lacking: dict[tuple[Any, ...], list[str]] = {}
    for label, task in tasks.items():
        for needed in _inputs_of(task):
            if not model.supports(needed[0] if len(needed) == 1 else needed):
                lacking.setdefault(needed, []).append(label)
                break
    for needed, labels in lacking.items():
        raise InputError(
            f"{system}: takes {', '.join(map(str, model.modalities))}, but {' with '.join(needed)} is what "
            f"{', '.join(labels)} would give it. Leave out the model or these tasks."
        )
    if isinstance(model, MultiVectorEncoder):
        others = [label for label, task in tasks.items() if not isinstance(task, AbsTaskRetrieval)]
        if others:
            raise InputError(
                f"{system}: has several vectors a text, with which MTEB can only search, and these tasks are none of "
                f"retrieval: {', '.join(others)}. Leave out the model or these tasks."
            )


def run_suites(
    system: str,
    model: Encoder,
    suites: Sequence[Suite],
    *,
    fingerprint: str,
    cache_dir: str | Path,
    batch_size: int = 16,
    unavailable: Mapping[str, str] | None = None,
) -> SuiteRows:
    """Run the tasks that are not in the cache yet, and make rows of all: main scores, and the mean of each benchmark.

    Every task is in the cache once it is done, so what was interrupted goes on from there.

    Args:
        system: Name of the rows.
        model: Any sentence-transformers model, of a kind that :func:`refuse_unfit` lets pass.
        suites: What to measure it on.
        fingerprint: That of the model's folder.
        cache_dir: Where MTEB keeps its results.
        batch_size: Texts per forward pass.
        unavailable: Tasks whose data set could not be had a moment ago, which are not tried again.

    Returns:
        The rows, and the tasks without data. A benchmark that lacks a task has no mean, unless only tasks are lacking
        whose data their owners keep to themselves: its mean is then that of the others, and says so.
    """
    mteb = mteb_package()
    cache = mteb.ResultCache(cache_path=cache_dir)
    wrapped = _wrap(system, model, fingerprint)
    measured = SuiteRows(unavailable=dict(unavailable or {}))
    tasks = {label: task for suite in suites for label, task in suite.tasks.items()}
    results: dict[str, Any] = {}
    with tqdm(tasks.items(), desc=system, unit="task") as progress:
        for label, task in progress:
            progress.set_postfix_str(label)
            if label in measured.unavailable:
                continue
            try:
                results[label] = _run(wrapped, task, cache, batch_size)
            except _NoDataError as error:
                measured.unavailable[label] = str(error)
                continue
            measured.rows += _task_rows(system, label, task, results[label])
    for suite in suites:
        done = [results[label] for label in suite.tasks if label in results]
        lacking = [task for label, task in suite.tasks.items() if label not in results]
        if suite.benchmark is None or len(done) < 2 or any(task.metadata.is_public for task in lacking):
            continue
        measured.rows += _mean_rows(system, suite, done)
    return measured


def left_out(suites: Sequence[Suite], unavailable: Mapping[str, str]) -> list[str]:
    """Of the tasks without data those that a benchmark's table does without: its private ones."""
    return [
        label
        for suite in suites
        for label, task in suite.tasks.items()
        if label in unavailable and suite.benchmark is not None and not task.metadata.is_public
    ]


class _NoDataError(Exception):
    """A task's data set could not be loaded; the text is the reason."""


def _unknown(name: str) -> str:
    """The refusal of a name, with the nearest ones, whatever the case of their letters."""
    mteb = mteb_package()
    from mteb.get_tasks import TASK_LIST

    benchmarks = mteb.get_benchmarks()
    proper = {alias.lower(): benchmark.name for benchmark in benchmarks for alias in benchmark.aliases}
    proper |= {
        known.lower(): known for known in [*(t.metadata.name for t in TASK_LIST), *(b.name for b in benchmarks)]
    }
    near = [name.lower()] if name.lower() in proper else difflib.get_close_matches(name.lower(), proper, n=5)
    nearest = ", ".join(dict.fromkeys(repr(proper[match]) for match in near))
    return f"--mteb {name!r}: MTEB {mteb.__version__} knows no benchmark and no task of this name. " + (
        f"Nearest: {nearest}." if nearest else "The names are in its documentation, or in mteb.get_benchmarks()."
    )


def _scope(task: Any) -> tuple[Any, ...]:
    """What makes two tasks the same measurement: a benchmark may take some languages or splits of a task."""
    return task.metadata.name, tuple(task.eval_splits), tuple(sorted(task.hf_subsets))


def _inputs_of(task: Any) -> list[tuple[Any, ...]]:
    """Kinds of input that a model must take, each with what one input of it holds."""
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.types import PromptType

    if isinstance(task, AbsTaskRetrieval):  # the sides may differ, and one document be image and text
        return [tuple(sorted(task.metadata.get_modalities(side))) for side in (PromptType.query, PromptType.document)]
    return [(modality,) for modality in task.metadata.modalities]


def _wrap(system: str, model: Encoder, fingerprint: str) -> Any:
    """The model as MTEB takes it, under a name that files its results by all that they depend on.

    MTEB files by name and revision, and takes both from the model's card: of a model of one's own they say what it
    was trained from. Its idea of the kinds of input that an opened model takes is text, whatever the model.
    """
    mteb = mteb_package()
    from mteb.models.sentence_transformer_wrapper import MultiVectorWrapper, SparseEncoderWrapper

    wrapper: Any = mteb.SentenceTransformerEncoderWrapper
    if isinstance(model, MultiVectorEncoder | SparseEncoder):
        wrapper = MultiVectorWrapper if isinstance(model, MultiVectorEncoder) else SparseEncoderWrapper
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # MTEB asks for a width by its former name
        wrapped = wrapper(model)
    key = cache_key(model, {}, task="query and document", kind=kind_of(model), dtype="float32")
    settings = {
        "settings": hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16],
        "mteb": mteb.__version__,
    }
    kinds = [kind for kind in ("text", "image", "audio", "video") if model.supports(kind)]
    wrapped.mteb_model_meta = wrapped.mteb_model_meta.model_copy(
        update={
            "name": f"polyrep/{system}",
            "revision": fingerprint,
            "experiment_kwargs": settings,
            "modalities": kinds,
        }
    )
    return wrapped


def _run(wrapped: Any, task: Any, cache: Any, batch_size: int) -> Any:
    """MTEB's result of one task, from the cache where it is whole there.

    Raises:
        _NoDataError: The data set could not be loaded.
    """
    mteb, meta, name = mteb_package(), wrapped.mteb_model_meta, task.metadata.name
    for part in task.metadata.tasks if task.is_aggregate else ():
        _run(wrapped, part, cache, batch_size)
    try:
        known = cache.load_task_result(name, meta)
    except ValueError:  # cut off while it was written
        known = None
    if known is None or known.dataset_revision != task.metadata.revision:
        cache.get_task_result_path(name, meta).unlink(missing_ok=True)
        known = None
    encoded = known is not None and not known.get_missing_evaluations(task)
    if not encoded and not task.is_aggregate:
        try:
            task.load_data()
        except Exception as error:  # every task has code of its own for this
            raise _NoDataError(f"{type(error).__name__}: {error}".partition("\n")[0]) from error
    options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": True}
    mteb.evaluate(wrapped, task, cache=cache, encode_kwargs=options, co2_tracker=False, show_progress_bar=False)
    if task.data_loaded:
        task.unload_data()
    # Read back, since the cache rounds, and the next run must not differ from this one. It may hold languages and
    # splits that another benchmark asked for.
    return cache.load_task_result(name, meta).validate_and_filter_scores(task)


def _task_rows(system: str, label: str, task: Any, result: Any) -> list[dict[str, Any]]:
    """The main score by MTEB's mean over languages and splits; beside nDCG@10 also the metrics of our other tables."""
    metadata = task.metadata
    shared = {"system": system, "dataset": label, "split": ", ".join(task.eval_splits), "task_type": metadata.type}
    source = {} if task.is_aggregate else hub_source(metadata.dataset["path"], metadata.revision)
    measures = {_metric(metadata.main_score): "main_score"}
    if metadata.main_score == METRIC_NAMES["nDCG@10"]:
        scored = [scores for entries in result.scores.values() for scores in entries]
        measures |= {
            ours: theirs
            for ours, theirs in METRIC_NAMES.items()
            if ours not in measures and all(theirs in scores for scores in scored)
        }
    values = {
        ours: float(result.get_score(getter=lambda s, name=theirs: s[name])) for ours, theirs in measures.items()
    }
    if unknown := [ours for ours, value in values.items() if not math.isfinite(value)]:
        logger.warning("%s, %s: MTEB gives no number for %s; left out.", system, label, ", ".join(unknown))
    return [
        shared | {"metric": ours, "value": value} | source for ours, value in values.items() if ours not in unknown
    ]


def _mean_rows(system: str, suite: Suite, results: Sequence[Any]) -> list[dict[str, Any]]:
    """The mean that heads the benchmark's leaderboard: over tasks, unless it is said to be over types or languages."""
    from mteb.benchmarks.benchmark import BenchmarkAggregation

    leading = ("MEAN_TASK", "MEAN_SUBSET", "MEAN_TASK_TYPE")
    kinds = [BenchmarkAggregation[name] for name in leading]
    kind = next((kind for kind in kinds if kind in suite.benchmark.aggregations), kinds[0])
    ((name, value),) = kind.aggregate(list(results)).items()
    metrics = {_metric(task.metadata.main_score) for task in suite.tasks.values()}
    splits = dict.fromkeys(split for result in results for split in result.scores)
    row = {
        "system": system,
        "dataset": suite.name,
        "split": ", ".join(splits),
        "metric": metrics.pop() if len(metrics) == 1 and kind is kinds[0] else name,
        "value": value,
        "mean_of_tasks": len(results),
        "tasks_of_benchmark": len(suite.tasks),
    }
    return [] if value is None else [row | {"value": float(value)}]  # None of a task that has no score


def _metric(main_score: str) -> str:
    return next((ours for ours, theirs in METRIC_NAMES.items() if theirs == main_score), main_score)
