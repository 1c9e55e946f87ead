"""A second model over the best documents of any system: a cross-encoder, which reads a query and a document together,
or a model of several vectors a text.

The first documents of a ranking are scored again and put in that order; those behind them are left out, as from an
engine that passes on what it has ranked.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder

from ..data.dataset import RetrievalDataset
from ..encoding.cache import cache_key, embed
from ..encoding.embeddings import row_of
from ..errors import InputError
from ..files import digest
from ..hub.fingerprint import fingerprint
from ..hub.folder import fastest_dtype, fetch, load, load_cross_encoder, names_cross_encoder
from ..report import hardware
from ..search.ranking import refuse_not_finite_scores, rescore, scores_of, sort_keys, tie_ranks
from .systems import Ranking, costs_of, keep_ranking, latency
from .table import display_name

DEEPEST = 1000
"""Documents of a query that are ranked again, at most: as many as a ranking holds."""


@dataclass
class Reranker:
    """A model that orders what another system found; :func:`open_reranker` opens it.

    Attributes:
        source: As the user names it.
        folder: Where it is.
        model: A CrossEncoder, or a model with several vectors a text.
        cache_dir: Where embeddings are kept, and what was ranked again.
        batch_size: Pairs or texts per forward pass.
    """

    source: str
    folder: Path
    model: Any
    cache_dir: Path
    batch_size: int = 16
    _encoded: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """In tables."""
        return display_name(self.source)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of its folder."""
        return fingerprint(self.folder)

    def rank(self, first: Ranking, dataset: RetrievalDataset, depth: int) -> Ranking:
        """The best ``depth`` documents of each query in the model's order.

        What was ranked is kept, so that a second run ranks nothing again.

        Args:
            first: What a system found.
            dataset: Whose texts the positions are of.
            depth: Documents of a query that are scored.

        Returns:
            The ranking. Its bytes are those of the first stage, and of vectors that are stored beside it; a query takes
            the time of both where that of the first is known, else none is told.

        Raises:
            InputError: A score is not finite.
        """
        system = f"{first.system}, then {depth} best by {self.name}"
        found = np.ascontiguousarray(first.positions[:, :depth])
        settings = cache_key(self.model, {}, task="rerank", kind="scores", dtype="float32")
        data = [list(dataset.corpus), list(dataset.queries), *self._texts(dataset, found)]
        seconds = None if first.seconds is None else first.seconds.tolist()
        key = digest([settings, data, found.tolist(), first.costs, seconds, hardware(), str(self.model.device)])
        place = self.cache_dir / "reranked" / f"{dataset.name}-{dataset.split}-{key}.safetensors"
        how = self._by_pairs if isinstance(self.model, CrossEncoder) else self._by_vectors
        return keep_ranking(place, system, lambda: how(system, first, found, dataset), depth)

    @staticmethod
    def _texts(dataset: RetrievalDataset, found: np.ndarray) -> tuple[list[str], list[str]]:
        """All queries, and the documents that are scored, by their place."""
        documents = list(dataset.corpus.values())
        return list(dataset.queries.values()), [documents[place] for place in np.unique(found)]

    def _by_pairs(self, system: str, first: Ranking, found: np.ndarray, dataset: RetrievalDataset) -> Ranking:
        queries, documents = list(dataset.queries.values()), list(dataset.corpus.values())

        def scored(row: int) -> Any:
            pairs = [(queries[row], documents[place]) for place in found[row].tolist()]
            # Without the sigmoid that a model may end in, which makes ties of high scores.
            options = {"activation_fn": torch.nn.Identity(), "convert_to_tensor": True, "show_progress_bar": False}
            return self.model.predict(pairs, batch_size=self.batch_size, **options).float().cpu()

        scored(0)  # the first call allocates
        taken, rows = np.empty(len(found)), []
        for row in tqdm(range(len(found)), desc=system, unit="query"):
            started = time.perf_counter()
            rows.append(scored(row))
            taken[row] = time.perf_counter() - started
        scores = torch.stack(rows)
        refuse_not_finite_scores(scores)
        keys = sort_keys(scores, torch.from_numpy(tie_ranks(list(dataset.corpus))[found]))
        keys, order = keys.sort(dim=1, descending=True)
        positions = np.take_along_axis(found, order.numpy(), 1)
        return _with_costs(Ranking(system, positions, scores_of(keys).numpy()), first, taken, 0.0)

    def _by_vectors(self, system: str, first: Ranking, found: np.ndarray, dataset: RetrievalDataset) -> Ranking:
        options: dict[str, Any] = {"cache_dir": self.cache_dir, "batch_size": self.batch_size}
        queries = embed(self.model, dataset.queries, task="query", name=f"{dataset.name}-{dataset.split}", **options)
        documents = embed(self.model, dataset.corpus, task="document", name=dataset.name, **options)
        ranks, similarity = tie_ranks(list(dataset.corpus)), str(self.model.similarity_fn_name)
        how: dict[str, Any] = {"similarity": similarity, "device": self.model.device}
        positions, scores = rescore(queries, documents, found, ranks, **how)
        taken = np.full(len(found), np.nan)
        for row in np.linspace(0, len(found) - 1, min(TIMED_QUERIES, len(found))).astype(int):
            query = row_of(queries, int(row))
            started = time.perf_counter()
            rescore(query, documents, found[row : row + 1], ranks, **how)
            taken[row] = time.perf_counter() - started
        size = costs_of(queries, documents)["bytes_per_document"]
        return _with_costs(Ranking(system, positions, scores), first, taken, size)


def _with_costs(ranking: Ranking, first: Ranking, taken: np.ndarray, size: float) -> Ranking:
    """The costs of both stages, from the seconds ``(queries,)`` and the bytes of the second."""
    own = first.costs["bytes_per_document"]
    costs = {"first_stage_bytes": own, "bytes_per_document": own + size}
    if first.seconds is None:
        return replace(ranking, costs=costs)
    seconds = first.seconds + taken
    return replace(ranking, costs=costs | latency(seconds[~np.isnan(seconds)].tolist()), seconds=seconds)
