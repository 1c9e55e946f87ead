"""Two systems summed: rows of their weighted sum, whose weight is chosen on dev, and of reciprocal rank fusion.

Scores are summed as the systems give them, since that is what an index sums: the first system finds candidates, and
both score them, see :mod:`polyrep.search.weighted`. Scores of two systems differ in size, so the weights that are
tried are multiples of the ratio of their spreads among candidates of dev; what is chosen is a weight for raw scores.
The control that needs no weight is reciprocal rank fusion (Cormack et al. 2009).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..data.dataset import RetrievalDataset
from ..data.load import load_retrieval_dataset
from ..encoding.bm25 import Bm25
from ..encoding.cache import embed
from ..encoding.embeddings import Embeddings, row_of
from ..encoding.encode import NAMES
from ..encoding.encoders import kind_of
from ..encoding.windows import Windows
from ..errors import InputError
from ..hub.folder import Encoder
from ..search.ranking import exact_search, tie_ranks
from ..search.scoring import EMPTY_DOCUMENT_SCORE
from ..search.weighted import ScoredCandidates, View, find_candidates
from .bm25 import analyzer_of
from .metrics import per_query_metrics
from .systems import DEPTH, Ranking, costs_of, latency, timed_rows

MULTIPLES = (0.0, *(float(2 ** (power / 2)) for power in range(-10, 11)))
"""Weights that are tried, in units of the ratio of spreads: from none to 32, by steps of the square root of 2."""

CONSTANT = 60
"""Of reciprocal rank fusion, as its paper has it: a document at rank r gets 1 / (60 + r) from each system."""

HYBRID_NOTE = (
    "Sums are of raw scores: the first system finds candidates, both score them, and the weight is the best of "
    f"{len(MULTIPLES)} on dev unless it was given. RRF adds 1 / ({CONSTANT} + rank) of both systems and has no "
    "weight. Bytes are those of both."
)


class Flags(Protocol):
    """What of a command's flags is read here."""

    hybrid: bool
    hybrid_weight: float | None
    split: str
    keep_empty: bool
    language: str


@dataclass(frozen=True)
class Side:
    """One of two systems on one data set.

    Attributes:
        system: Name of its row.
        name: What an index calls its vectors.
        documents: Of the data set.
        similarity: How it compares.
        queries: Of the split that is measured.
        dev: Those that the weight is chosen by; None where it is given.
    """

    system: str
    name: str
    documents: Embeddings
    similarity: str
    queries: Embeddings
    dev: Embeddings | None

    @property
    def view(self) -> View:
        """For the queries that are measured."""
        return View(self.queries, self.documents, self.similarity)

    @property
    def dev_view(self) -> View:
        """For those that the weight is chosen by."""
        assert self.dev is not None
        return View(self.dev, self.documents, self.similarity)


def refuse_unfit_hybrid(args: Flags, models: Sequence[str], searches: bool) -> None:
    """InputError if there are not two systems to be summed, or nothing to choose a weight on but what is measured."""
    weight = args.hybrid_weight
    if not args.hybrid:
        if weight is not None:
            raise InputError(f"--hybrid_weight {weight}: there is no --hybrid, so nothing is summed. Add it.")
        return
    if len(models) != 2 or models[0] == models[1]:
        raise InputError(
            f"--hybrid: sums two MODELs, and {len(models)} are named ({', '.join(models)}). Name two, the one that "
            "finds candidates first; bm25 may be one."
        )
    if not searches:
        raise InputError("--hybrid: sums what is found in --dataset alone. Add one.")
    if weight is None and args.split == "dev":
        raise InputError(
            "--hybrid: the weight would be chosen on dev, which is measured. Measure test, or give --hybrid_weight."
        )


def load_dev(path: str, dataset: RetrievalDataset, args: Flags) -> RetrievalDataset | None:
    """The queries that the weight is chosen by: dev, or of a set without one a fixed tenth of train.

    Args:
        path: As ``--dataset`` names it.
        dataset: What is measured.
        args: The flags.

    Raises:
        InputError: There are none, or the split that is measured shares some with them.
    """
    if not args.hybrid or args.hybrid_weight is not None:
        return None
    try:
        dev = load_retrieval_dataset(path, "dev", keep_empty=args.keep_empty)
    except InputError as error:
        raise InputError(f"--hybrid: no queries to choose the weight on ({error}) Or give --hybrid_weight.") from None
    if shared := dev.queries.keys() & dataset.queries.keys():
        raise InputError(
            f"--hybrid: {len(shared):,} queries of {path}, {dataset.split}, are in dev, too, on which the weight "
            "would be chosen. Mend the splits, or give --hybrid_weight."
        )
    return dev


def side_of_model(
    system: str,
    model: Encoder,
    dataset: RetrievalDataset,
    dev: RetrievalDataset | None,
    windows: Windows | None,
    **options: Any,
) -> Side:
    """A model's vectors, which are in the cache as far as it was measured already.

    Args:
        system: Name of its row.
        model: Any sentence-transformers model.
        dataset: What is measured.
        dev: See :class:`Side`.
        windows: How documents are cut.
        options: ``cache_dir``, ``dtype`` and ``batch_size`` of :func:`polyrep.encoding.cache.embed`.
    """
    documents = embed(model, dataset.corpus, task="document", name=dataset.name, windows=windows, **options)
    asked = [
        None if one is None else embed(model, one.queries, task="query", name=f"{one.name}-{one.split}", **options)
        for one in (dataset, dev)
    ]
    assert asked[0] is not None
    return Side(system, NAMES[kind_of(model)], documents, str(model.similarity_fn_name), asked[0], asked[1])


def side_of_bm25(system: str, dataset: RetrievalDataset, dev: RetrievalDataset | None, language: str) -> Side:
    """BM25 of the corpus as sparse vectors."""
    read = Bm25.of(analyzer_of(dataset, language), dataset.corpus.values())
    queries, asked = (None if one is None else read.of_queries(one.queries.values()) for one in (dataset, dev))
    assert queries is not None
    return Side(system, "bm25", read.of_documents(dataset.corpus.values()), "dot", queries, asked)


def rank_hybrid(
    first: Side, second: Side, dataset: RetrievalDataset, dev: RetrievalDataset | None, weight: float | None
) -> list[Ranking]:
    """The weighted sum of two systems, and their reciprocal rank fusion.

    Args:
        first: What finds candidates; its weight is 1.
        second: The other system.
        dataset: What is measured.
        dev: What the weight is chosen on.
        weight: Of ``second``, where it is given.
    """
    ranks = tie_ranks(list(dataset.corpus))
    settings: dict[str, Any] = {}
    if weight is None:
        assert dev is not None
        candidates = find_candidates([first.dev_view, second.dev_view], ranks, count=DEPTH, left_out=dev.own)
        weight = choose_weight([Tuned(candidates, dev, ranks)])
        settings = {"chosen_on": f"dev ({len(dev.queries):,} queries)"}
    names = (first.name, second.name) if first.name != second.name else (first.system, second.system)
    settings = {"weights": f"{names[0]}=1,{names[1]}={weight:g}"} | settings
    views = [first.view, second.view]
    candidates = find_candidates(views, ranks, count=DEPTH, left_out=dataset.own, show_progress=True)
    if candidates.not_by_first:
        settings["queries_without_candidates_by_the_first"] = candidates.not_by_first
    seconds = np.full(len(first.queries), np.nan)
    for row in timed_rows(len(seconds)):
        alone = [view._replace(queries=row_of(view.queries, int(row))) for view in views]
        started = time.perf_counter()
        find_candidates(alone, ranks, count=DEPTH).best((1.0, weight), ranks, DEPTH)
        seconds[row] = time.perf_counter() - started
    both = [costs_of(side.queries, side.documents)["bytes_per_document"] for side in (first, second)]
    costs = {"bytes_per_document": sum(both)}
    title = f"{first.system} + {second.system}"
    timed = costs | latency(seconds[~np.isnan(seconds)].tolist())
    summed = filled(candidates.best((1.0, weight), ranks, DEPTH), len(ranks))
    return [
        Ranking(f"{title}, summed", *summed, timed, seconds, settings),
        Ranking(f"{title}, RRF", *fused(views, dataset, ranks), costs),
    ]


class Tuned(NamedTuple):
    """What a weight is chosen by.

    Attributes:
        candidates: With the scores of both systems.
        dev: Whose queries they are of.
        ranks: See :func:`polyrep.search.ranking.tie_ranks`.
    """

    candidates: ScoredCandidates
    dev: RetrievalDataset
    ranks: np.ndarray


def choose_weight(tuned: Sequence[Tuned]) -> float:
    """The weight of the second system with the highest nDCG@10 on dev, the smallest of equals.

    Args:
        tuned: One or more data sets, on whose mean it is chosen.
    """
    unit = ratio_of_spreads([scores for one in tuned for scores in one.candidates.scores])
    tried: dict[float, float] = {}
    for multiple in MULTIPLES:
        weight = float(f"{multiple * unit:.3g}")  # as it is printed, so that what is measured is what is used
        values = []
        for candidates, dev, ranks in tuned:
            found = filled(candidates.best((1.0, weight), ranks, DEPTH), len(ranks))
            values.append(per_query_metrics(dev, Ranking("tried", *found))["nDCG@10"].mean())
        tried[weight] = float(np.mean(values))
    return max(tried, key=lambda weight: (tried[weight], -weight))


def ratio_of_spreads(scores: Sequence[np.ndarray]) -> float:
    """The weight of the second system at which the scores of both differ alike among the candidates of a query.

    Args:
        scores: Of each query ``(2, candidates)``.

    Returns:
        The ratio of standard deviations; 1 where one is 0.
    """
    real = [part[:, (part > EMPTY_DOCUMENT_SCORE).all(0)] for part in scores]
    within = [part - part.mean(1, keepdims=True) for part in real if part.size]
    spreads = np.concatenate(within, 1).std(1) if within else np.zeros(2)
    return float(spreads[0] / spreads[1]) if spreads.all() else 1.0


def fused(views: Sequence[View], dataset: RetrievalDataset, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions and scores of reciprocal rank fusion, each ``(queries, depth)``, best first."""
    options: dict[str, Any] = {"k": DEPTH, "left_out": dataset.own}
    sides = [exact_search(v.queries, v.documents, ranks, similarity=v.similarity, **options) for v in views]
    best = []
    for row in range(len(dataset.queries)):  # one by one, lest there be a number for each query and document
        places, parts = [], []
        for view, (positions, scores) in zip(views, sides, strict=True):
            found = scores[row] > -np.inf
            if view.documents.kind == "sparse":  # where documents that share no word are not found
                found &= scores[row] != 0
            places.append(positions[row, found])
            parts.append(1 / (CONSTANT + 1 + np.flatnonzero(found)))
        united, which = np.unique(np.concatenate(places), return_inverse=True)
        total = np.bincount(which, np.concatenate(parts), len(united)).astype(np.float32)
        order = np.lexsort((ranks[united], -total))[:DEPTH]
        best.append((united[order], total[order]))
    return filled(best, len(ranks))


def filled(best: Sequence[tuple[np.ndarray, np.ndarray]], documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of equal length, ``(queries, depth)``, in which what is lacking is some other document, at -inf."""
    depth = min(DEPTH, documents)
    positions = np.zeros((len(best), depth), np.int64)
    scores = np.full((len(best), depth), -np.inf, np.float32)
    for row, (places, said) in enumerate(best):
        others = np.setdiff1d(np.arange(min(2 * depth, documents)), places)[: depth - len(places)]
        positions[row], scores[row, : len(said)] = np.concatenate([places, others]), said
    return positions, scores
