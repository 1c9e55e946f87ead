"""Fit what a model's scores mean on one's own data: ``polyrep calibrate MODEL --dataset NAME``.

The best documents of each judged query are candidates, relevant where the data set says so; what nobody judged counts
as not relevant, so a probability is that of being *judged* relevant. Weights of the inputs come from a logistic
regression, the map from an isotonic one. Which inputs are read is decided by the log loss on queries that the fit did
not see: the simplest that is as good.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from ..data.dataset import RetrievalDataset
from ..data.load import load_corpus, load_retrieval_dataset
from ..data.made_queries import inverse_cloze
from ..encoding.cache import embed
from ..encoding.encoders import uncertainty_of
from ..encoding.windows import Windows, refuse_stride
from ..errors import InputError, NoSplit
from ..files import refuse_unwritable, staged_folder
from ..flags import command_line, parse
from ..hub.calibration import CALIBRATION, PICTURE, Calibration, inputs_of, sum_of, write_calibration
from ..hub.cards import public_command
from ..hub.fingerprint import fingerprint
from ..hub.folder import Encoder, fastest_dtype, fetch, load, local
from ..search.ranking import exact_search, tie_ranks
from ..search.scoring import EMPTY_DOCUMENT_SCORE
from .reliability import binned, draw_panels
from .systems import refuse_uncut

CHOICES = (("score",), ("score", "lead"), ("score", "uncertainty"), ("score", "lead", "uncertainty"))
"""Inputs that a map may read, the simplest first."""

FOLDS = 5
LEAST_QUERIES, LEAST_ANSWERED = 30, 20
DEPTHS = (1, 10)
"""How many of the best documents of a query count in what is said of errors."""


@dataclass
class CalibrateArguments:
    """What to calibrate on."""

    _argument_group_name = "calibrate"

    dataset: str = field(default="", metadata={"help": "A data set as for evaluate; its corpus should be like yours."})
    split: str = field(
        default="dev",
        metadata={"help": "Split of the judged queries; a set without dev gives a tenth of train. Never test."},
    )
    queries: str = field(
        default="judged",
        metadata={"help": "judged, or inverse_cloze: sentences of the documents, for a corpus without judgments."},
    )
    depth: int = field(default=100, metadata={"help": "Of each query's documents, how many of the best to fit on."})
    window: int | None = field(default=None, metadata={"help": "Cut documents as your index has them; see encode."})
    stride: int | None = field(default=None, metadata={"help": "Likewise."})
    seed: int = field(default=0, metadata={"help": "Seed of the folds, and of what sentences are taken."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a calibration that is there."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that the model carries."})
    keep_empty: bool = field(default=False, metadata={"help": "Accept empty texts instead of refusing the data set."})
    dtype: str = field(default="float16", metadata={"help": "Numbers in the index: float16 or float32."})
    model_dtype: str = field(default="float32", metadata={"help": "Weights in memory, as for encode."})
    batch_size: int = field(default=16, metadata={"help": "Texts per forward pass."})
    cache_dir: str = field(
        default=".cache/embeddings", metadata={"help": "Where embeddings are kept for the next run."}
    )


@dataclass(frozen=True)
class Candidates:
    """The best documents of each query, and what is known of them.

    Attributes:
        scores: ``(queries, depth)``, best first.
        relevant: ``(queries, depth)``.
        there: ``(queries, depth)`` False where a query has fewer documents.
        uncertainty: ``(queries,)``, or None where the model says nothing of it.
    """

    scores: np.ndarray
    relevant: np.ndarray
    there: np.ndarray
    uncertainty: np.ndarray | None = None

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """See :func:`polyrep.hub.calibration.inputs_of`."""
        return inputs_of(self.scores, self.uncertainty)

    def of(self, queries: np.ndarray) -> Candidates:
        """Those of some queries."""
        wide = None if self.uncertainty is None else self.uncertainty[queries]
        return Candidates(self.scores[queries], self.relevant[queries], self.there[queries], wide)


@dataclass(frozen=True)
class Map:
    """The fitted part of a :class:`~polyrep.hub.calibration.Calibration`."""

    weights: Mapping[str, float]
    at: np.ndarray
    probability: np.ndarray

    def probabilities(self, candidates: Candidates) -> np.ndarray:
        """``(queries, depth)``."""
        return np.interp(sum_of(self.weights, candidates.inputs), self.at, self.probability)


def calibrate(argv: list[str], *, prog: str = "polyrep calibrate") -> Calibration:
    """Calibrate the model that ``argv`` names, and write the result into its folder.

    Args:
        argv: The folder and flags.
        prog: How it was called.

    Returns:
        What ``calibration.json`` holds; ``calibration.png`` beside it shows how far it can be relied on.

    Raises:
        InputError: The model, the data set or a flag cannot be used, there are too few queries, or there is a
            calibration already.
    """
    about = "Fit what scores of a model mean, and keep it in the model's folder: search then gives probabilities."
    args, name = parse(CalibrateArguments, argv, prog, about, "MODEL", "Folder of the model.")
    folder = _folder(name, args)
    dataset = _dataset(args)
    if args.window:
        refuse_uncut(dataset, args.window)
    _refuse_few(len(dataset.queries), LEAST_QUERIES, "queries", args)
    model = load(folder, trust_remote_code=args.trust_remote_code, dtype=fastest_dtype(args.model_dtype))
    if not isinstance(model, Encoder):
        raise InputError(f"{name}: the folder of a head, which encodes no text. Name the folder that has it on top.")
    windows = Windows.of(model, args.window, args.stride, name)
    options = {"cache_dir": args.cache_dir, "dtype": args.dtype, "batch_size": args.batch_size}
    candidates = candidates_of(model, dataset, args.depth, windows, **options)
    answered = int(candidates.relevant.any(1).sum())
    _refuse_few(answered, LEAST_ANSWERED, f"queries with a relevant document among their {args.depth} best", args)
    if (candidates.relevant == candidates.there).all():
        raise InputError(f"--depth {args.depth}: all documents found are relevant, so nothing tells. Raise it.")
    chosen, held_out = choose(candidates, args.seed)
    made = Calibration(
        fingerprint=fingerprint(folder),
        dataset=dataset.name,
        split=dataset.split,
        queries=args.queries,
        depth=args.depth,
        seed=args.seed,
        counts={
            "queries": len(candidates.scores),
            "candidates": int(candidates.there.sum()),
            "relevant": int(candidates.relevant.sum()),
        },
        held_out=f"a fifth of the queries in turn, by the map of the other four (seed {args.seed})",
        ece={str(depth): bins.error for depth, bins in reliability(held_out, candidates).items()},
        command=public_command(command_line(prog, argv)),
        weights=dict(chosen.weights),
        at=chosen.at.tolist(),
        probability=chosen.probability.tolist(),
        window=windows.tokens if windows else 0,
        stride=windows.stride if windows else 0,
    )
    panels = {_titled(depth): {dataset.name: bins} for depth, bins in reliability(held_out, candidates).items()}
    with staged_folder(folder, merge=True) as staged:
        draw_panels(staged / PICTURE, panels)
        write_calibration(staged, made)
    print(_said(made, folder), flush=True)
    return made


def candidates_of(
    model: Encoder, dataset: RetrievalDataset, depth: int, windows: Windows | None = None, **options: Any
) -> Candidates:
    """Search every query of a data set exactly.

    Args:
        model: Any sentence-transformers model.
        dataset: Corpus, queries and judgments.
        depth: Documents of each query.
        windows: How to cut documents; default: what the model does not read of one is dropped.
        options: ``cache_dir``, ``dtype`` and ``batch_size`` of :func:`polyrep.encoding.cache.embed`.
    """
    documents = embed(model, dataset.corpus, task="document", name=dataset.name, windows=windows, **options)
    queries = embed(model, dataset.queries, task="query", name=f"{dataset.name}-{dataset.split}", **options)
    positions, scores = exact_search(
        queries,
        documents,
        tie_ranks(list(dataset.corpus)),
        similarity=str(model.similarity_fn_name),
        k=depth,
        left_out=dataset.own,
        device=model.device,
    )
    ids = np.array(list(dataset.corpus), object)
    judged = [{d for d, grade in dataset.qrels[q].items() if grade > 0} for q in dataset.queries]
    there = np.isfinite(scores) & (scores > EMPTY_DOCUMENT_SCORE)
    relevant = np.array([[d in some for d in ids[row]] for some, row in zip(judged, positions, strict=True)]) & there
    wide = uncertainty_of(model, list(dataset.queries.values()), options.get("batch_size", 16))
    # What is not there has the first one's score, so that one document alone leads by nothing.
    return Candidates(np.where(there, scores, np.where(there[:, :1], scores[:, :1], 0)), relevant, there, wide)


def fit(candidates: Candidates, names: Sequence[str]) -> Map | None:
    """A map that reads some inputs; None if a higher score or lead would make a document less probable.

    None as well where there are several inputs to weigh, and documents that all are relevant, or none of them.

    Args:
        candidates: What to fit it to.
        names: Of the inputs.
    """
    there, inputs = candidates.there, candidates.inputs
    relevant = candidates.relevant[there].astype(int)
    columns = np.stack([inputs[name][there] for name in names], 1)  # (documents, inputs)
    weights = dict.fromkeys(names, 1.0)
    if len(names) > 1:
        if relevant.min() == relevant.max():
            return None
        spread = columns.std(0)
        spread[spread == 0] = 1.0
        found = LogisticRegression(max_iter=1000).fit((columns - columns.mean(0)) / spread, relevant)
        weights = dict(zip(names, (found.coef_[0] / spread).tolist(), strict=True))
    if min(weights["score"], weights.get("lead", 0.0)) < 0:
        return None
    evidence = sum_of(weights, {name: inputs[name][there] for name in names})
    steps = IsotonicRegression(out_of_bounds="clip").fit(evidence, relevant)
    at, first = np.unique(steps.X_thresholds_, return_index=True)
    return Map(weights, at, _no_surer_than_counts(steps.predict(evidence), steps.y_thresholds_[first]))


def choose(candidates: Candidates, seed: int = 0) -> tuple[Map, np.ndarray]:
    """The map of the simplest inputs that are as good as any, and what it gives to queries that it has not seen.

    Each fifth of the queries is left out once. Inputs are as good as the best if their log loss a query is within one
    standard error of it.

    Args:
        candidates: What to fit it to.
        seed: Of the folds.

    Returns:
        The map fitted to all, and ``(queries, depth)`` probabilities by maps that did not see the query.
    """
    fold = np.random.default_rng(seed).permutation(len(candidates.scores)) % FOLDS
    losses, held_out = [], []
    usable = [names for names in CHOICES if candidates.uncertainty is not None or "uncertainty" not in names]
    maps = {names: fitted for names in usable if (fitted := fit(candidates, names))}
    for names in list(maps):
        found = np.zeros(candidates.scores.shape)
        for number in range(FOLDS):
            part = fit(candidates.of(fold != number), names)
            if part is None:
                del maps[names]
                break
            found[fold == number] = part.probabilities(candidates.of(fold == number))
        else:
            chance = np.where(candidates.relevant, found, 1 - found)
            losses.append(-np.log(np.where(candidates.there, chance, 1.0)).sum(1))  # (queries,)
            held_out.append(found)
    best = losses[int(np.argmin([loss.mean() for loss in losses]))]
    for names, loss, found in zip(maps, losses, held_out, strict=True):
        worse = loss - best
        if worse.mean() <= worse.std() / np.sqrt(len(worse)):
            return maps[names], found
    raise AssertionError("the best is as good as itself")


def reliability(probability: np.ndarray, candidates: Candidates) -> dict[int, Any]:
    """Bins of the probabilities of the best documents of each query, by how many of them count."""
    found = {}
    for depth in DEPTHS:
        there = candidates.there[:, :depth]
        found[depth] = binned(probability[:, :depth][there], candidates.relevant[:, :depth][there])
    return found


def _no_surer_than_counts(fitted: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """Probabilities without 0 and 1: of n documents alike, the next is otherwise with 1 / (n + 2) (Laplace)."""
    low, high = (1 / (np.sum(fitted == value) + 2) for value in (0.0, 1.0))
    lowest, highest = (low if fitted.min() == 0 else 0.0), (1 - high if fitted.max() == 1 else 1.0)
    return np.clip(probability, min(lowest, highest), max(lowest, highest))


def _folder(name: str, args: CalibrateArguments) -> Path:
    """The model's folder, where the result is to lie."""
    if not args.dataset:
        raise InputError("--dataset: missing, so there is nothing to calibrate on. Name a data set with judgments.")
    if args.queries not in ("judged", "inverse_cloze"):
        raise InputError(f"--queries {args.queries!r}: use judged or inverse_cloze.")
    refuse_stride(args.window, args.stride)
    if name == "minilm" or not local(name):
        raise InputError(
            f"{name}: a calibration lies in the model's folder, and this is none of yours. Save the model first: "
            f"polyrep.save(polyrep.load({name!r}), 'models/{Path(name).name}')."
        )
    folder = fetch(name, trust_remote_code=args.trust_remote_code)
    if (folder / CALIBRATION).exists() and not args.overwrite:
        raise InputError(f"{folder / CALIBRATION}: exists and would be replaced. Pass --overwrite.")
    refuse_unwritable(folder)
    refuse_unwritable(Path(args.cache_dir), "--cache_dir")
    fastest_dtype(args.model_dtype)
    return folder


def _dataset(args: CalibrateArguments) -> RetrievalDataset:
    if args.queries == "inverse_cloze":
        return inverse_cloze(load_corpus(args.dataset, keep_empty=args.keep_empty), sentences=1, seed=args.seed)
    try:
        return load_retrieval_dataset(args.dataset, args.split, keep_empty=args.keep_empty)
    except NoSplit as error:
        raise InputError(
            f"{error} Name another --split, or calibrate on sentences of the documents: --queries inverse_cloze."
        ) from error


def _refuse_few(count: int, least: int, what: str, args: CalibrateArguments) -> None:
    """InputError if there are too few of something to tell a probability."""
    if count < least:
        remedy = "Take a larger corpus."
        if args.queries == "judged":
            remedy = "Judge more, name a larger --split, or take sentences of the documents: --queries inverse_cloze."
        raise InputError(
            f"--dataset {args.dataset}: has {count} {what}, too few to tell a probability (at least {least}). {remedy}"
        )


def _titled(depth: int) -> str:
    return "best document of a query" if depth == 1 else f"{depth} best documents of a query"


def _said(made: Calibration, folder: Path) -> str:
    counts = made.counts
    errors = ", ".join(f"{error:.3f} ({_titled(int(depth))})" for depth, error in made.ece.items())
    return (
        f"{folder / CALIBRATION}: from {' and '.join(made.weights)}, by {counts['queries']:,} queries of "
        f"{made.dataset}, {made.split}, with {counts['relevant']:,} relevant documents among "
        f"{counts['candidates']:,}; expected calibration error on held-out queries: {errors}."
    )
