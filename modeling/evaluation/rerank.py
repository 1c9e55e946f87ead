"""A second model that orders the best documents of any system: a cross-encoder, or late interaction.

A cross-encoder reads a query and a document together, so it has nothing to find by. The first documents of a ranking
are scored again and put in that order; those behind them are left out, as from an engine that passes on what it has
ranked.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from sentence_transformers import CrossEncoder, SparseEncoder

from ..data.dataset import RetrievalDataset
from ..encoding.cache import cache_key, embed
from ..encoding.embeddings import row_of
from ..encoding.windows import Windows
from ..errors import InputError
from ..files import digest
from ..hub.fingerprint import fingerprint
from ..hub.folder import fastest_dtype, fetch
from ..hub.reading import ready_to_read
from ..report import hardware
from ..search.ranking import rescore, scores_of, sort_keys, tie_ranks
from ..training.teachers import open_teacher, score_pairs
from .systems import DEPTH, Ranking, costs_of, keep_ranking, latency, timed_rows
from .table import display_name

THEN = ", then "
"""What stands behind the first stage in the name of a row."""

RERANK_NOTE = (
    "Two stages: the first finds, and the model that is named orders as many documents as are told; no others are "
    "returned, which bounds their Recall@100. A cross-encoder reads the texts and stores nothing, so bytes are those "
    "of the first stage; of a model with vectors both are stored. Search ms are those of both stages, without making "
    "the query's vectors."
)
WINDOWS_NOTE = (
    "A second model with vectors reads documents in the same windows; a cross-encoder reads the beginning of each."
)


def rerank_notes(model: str | None, window: int | None) -> list[str]:
    """What a reader of a table should know of documents that a second model orders."""
    return [] if model is None else [RERANK_NOTE, *([WINDOWS_NOTE] if window else ())]


def refuse_depths(model: str | None, depths: Sequence[int], revision: str | None) -> None:
    """InputError if documents are to be ranked again by nobody, or more of them than a ranking holds."""
    if model is None:
        for flag, given in (("--rerank_depth", depths != [50]), ("--rerank_revision", revision)):
            if given:
                raise InputError(f"{flag}: there is no --rerank, so nothing is ranked again. Add it, or leave it out.")
    for depth in depths:
        if not 1 <= depth <= DEPTH:
            raise InputError(f"--rerank_depth {depth}: a ranking holds {DEPTH:,} documents at most. Use 1 to {DEPTH}.")


class Flags(Protocol):
    """What of a command's flags :func:`open_reranker` reads."""

    rerank: str | None
    rerank_depth: list[int]
    rerank_revision: str | None
    window: int | None
    stride: int | None
    trust_remote_code: bool
    model_dtype: str
    batch_size: int
    cache_dir: str


def open_reranker(args: Flags, datasets: Sequence[RetrievalDataset]) -> Reranker | None:
    """Open what ``--rerank`` names; None without it.

    Args:
        args: The flags of a command.
        datasets: Whose documents it is to read.

    Raises:
        InputError: It cannot be opened, gives no score of a query and a document, or does not read the documents.
    """
    if args.rerank is None:
        return None
    source, trust = args.rerank, {"revision": args.rerank_revision, "trust_remote_code": args.trust_remote_code}
    folder = fetch(source, **trust)  # type: ignore[arg-type]
    model: Any = open_teacher(source, dtype=fastest_dtype(args.model_dtype), flag="--rerank", **trust)  # type: ignore[arg-type]
    pairs = isinstance(model, CrossEncoder)
    if pairs:
        ready_to_read(model, folder, source)
        if model.num_labels != 1:
            raise InputError(
                f"--rerank {source}: gives {model.num_labels} numbers a pair, of which none is said to be its score. "
                "Use a cross-encoder that gives one."
            )
    elif isinstance(model, SparseEncoder):
        raise InputError(
            f"--rerank {source}: has sparse vectors, which find documents rather than order them. Use a cross-encoder "
            "or a model with dense vectors."
        )
    for dataset in datasets:
        kind = "text" if isinstance(dataset.corpus, dict) else "image"
        if kind not in model[0].modalities or kind == "image" and pairs:
            raise InputError(
                f"--rerank {source}: does not read the {kind}s of {dataset.name}. Use a model that does, or leave it "
                "out."
            )
    depths = tuple(dict.fromkeys(args.rerank_depth))  # rows of one name would be taken for seeds
    windows = None if pairs else Windows.of(model, args.window, args.stride, source)
    return Reranker(source, folder, model, depths, Path(args.cache_dir), args.batch_size, windows)


@dataclass
class Reranker:
    """A model that orders what another system found; :func:`open_reranker` opens it.

    Attributes:
        source: As the user names it.
        folder: Where it is.
        model: A CrossEncoder, or a model with dense vectors.
        depths: How many documents of a query it orders, each in a row of its own.
        cache_dir: Where embeddings are kept, and what was ranked again.
        batch_size: Pairs or texts per forward pass.
        windows: How a model with vectors cuts documents; default: what it does not read of one is dropped.
    """

    source: str
    folder: Path
    model: Any
    depths: tuple[int, ...]
    cache_dir: Path
    batch_size: int = 16
    windows: Windows | None = None

    @property
    def name(self) -> str:
        """In tables."""
        return display_name(self.source)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of its folder."""
        return fingerprint(self.folder)

    def system(self, first: Ranking, depth: int) -> str:
        """Name of a row."""
        return f"{first.system}{THEN}{depth} best by {self.name}"

    def rank(self, first: Ranking, dataset: RetrievalDataset, depth: int) -> Ranking:
        """The best ``depth`` documents of each query in the model's order.

        What was ranked is kept, so that a second run ranks nothing again.

        Args:
            first: What a system found.
            dataset: Whose texts the positions are of.
            depth: Documents of a query that are scored.

        Returns:
            The ranking. Its bytes are those of the first stage, and of vectors that are stored beside it; the time of
            a query is that of both, of the queries that the first was timed by.

        Raises:
            InputError: A score is not finite.
        """
        system = self.system(first, depth)
        found = np.ascontiguousarray(first.positions[:, :depth])
        texts = list(dataset.corpus.values())
        data = [list(dataset.corpus), dataset.queries, [texts[place] for place in np.unique(found)], found.tolist()]
        key = digest([self._settings, data, hardware(), str(self.model.device)])  # times are of the machine
        place = self.cache_dir / "reranked" / f"{dataset.name}-{dataset.split}-{key}.safetensors"
        how = self._by_pairs if isinstance(self.model, CrossEncoder) else self._by_vectors
        ranking = keep_ranking(place, system, lambda: how(system, found, dataset), depth)
        return _of_both(first, _without_unfound(ranking, found, first.scores[:, :depth] > -np.inf))

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """What scores depend on beside the texts."""
        kept: dict[str, Any] = {"task": "rerank", "kind": "scores", "dtype": "float32", "windows": self.windows}
        return cache_key(self.model, {}, **kept)

    def _by_pairs(self, system: str, found: np.ndarray, dataset: RetrievalDataset) -> Ranking:
        queries, documents = list(dataset.queries.values()), list(dataset.corpus.values())
        pairs = np.column_stack([np.repeat(np.arange(len(found)), found.shape[1]), found.ravel()])
        how: dict[str, Any] = {"names": (f"{dataset.name}-{dataset.split}", dataset.name), "cache_dir": self.cache_dir}
        said = score_pairs(self.model, dataset.queries, dataset.corpus, pairs, batch_size=self.batch_size, **how)
        scores = torch.from_numpy(said.reshape(found.shape))
        keys = sort_keys(scores, torch.from_numpy(tie_ranks(list(dataset.corpus))[found]))
        keys, order = keys.sort(dim=1, descending=True)
        positions = np.take_along_axis(found, order.numpy(), 1)
        taken = np.full(len(found), np.nan)
        for row in timed_rows(len(found)):
            texts = [(queries[row], documents[place]) for place in found[row].tolist()]
            started = time.perf_counter()
            self.model.predict(texts, batch_size=self.batch_size, show_progress_bar=False)
            taken[row] = time.perf_counter() - started
        return Ranking(system, positions, scores_of(keys).numpy(), {"bytes_per_document": 0.0}, taken)

    def _by_vectors(self, system: str, found: np.ndarray, dataset: RetrievalDataset) -> Ranking:
        model = self.model
        options: dict[str, Any] = {"cache_dir": self.cache_dir, "batch_size": self.batch_size}
        queries = embed(model, dataset.queries, task="query", name=f"{dataset.name}-{dataset.split}", **options)
        options["windows"] = self.windows
        documents = embed(model, dataset.corpus, task="document", name=dataset.name, **options)
        ranks, similarity = tie_ranks(list(dataset.corpus)), str(model.similarity_fn_name)
        how: dict[str, Any] = {"similarity": similarity, "device": model.device}
        positions, scores = rescore(queries, documents, found, ranks, **how)
        taken = np.full(len(found), np.nan)
        for row in timed_rows(len(found)):
            query = row_of(queries, int(row))
            started = time.perf_counter()
            rescore(query, documents, found[row : row + 1], ranks, **how)
            taken[row] = time.perf_counter() - started
        return Ranking(system, positions, scores, costs_of(queries, documents), taken)


def _without_unfound(ranking: Ranking, asked: np.ndarray, found: np.ndarray) -> Ranking:
    """What the first stage did not find, where it found less than it was asked for, at -inf behind the rest."""
    if found.all():
        return ranking
    whole = np.all(found, axis=1, keepdims=True)
    there = np.repeat(whole, ranking.positions.shape[1], axis=1)
    for row in np.flatnonzero(~whole):
        there[row] = np.isin(ranking.positions[row], asked[row, found[row]])
    order = np.argsort(~there, axis=1, kind="stable")
    scores = np.where(there, ranking.scores, -np.inf).astype(np.float32)
    positions, scores = (np.take_along_axis(part, order, 1) for part in (ranking.positions, scores))
    return replace(ranking, positions=positions, scores=scores)


def _of_both(first: Ranking, second: Ranking) -> Ranking:
    """A second stage with the bytes and the seconds of both, but for what is not known of the first."""
    assert second.seconds is not None
    costs = {}
    if (own := first.costs.get("bytes_per_document")) is not None:
        costs = {"first_stage_bytes": own, "bytes_per_document": own + second.costs["bytes_per_document"]}
    if first.seconds is None:
        return replace(second, costs=costs, seconds=None)
    seconds = first.seconds + second.seconds
    return replace(second, costs=costs | latency(seconds[~np.isnan(seconds)].tolist()), seconds=seconds)
