"""Hits with the probability that they are relevant, where the model's folder says how scores become probabilities."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..encoding.encoders import kind_of, uncertainty_of
from ..encoding.nested import groups_of
from ..encoding.shards import Origin
from ..hub.calibration import Calibration, calibration_of
from .budget import budgets_of
from .protocol import Asked, Hit, Index

logger = logging.getLogger(__name__)


class Searcher:
    """Searches an index with the queries of one model.

    Args:
        model: What :func:`polyrep.load` opens.
        index: Where to search.
        fingerprint: :func:`polyrep.hub.fingerprint` of the model.

    Raises:
        InputError: The calibration in the model's folder is damaged, or of another model.
    """

    def __init__(self, model: Any, index: Index, fingerprint: str):
        self._model, self._index, self._fingerprint = model, index, fingerprint
        self._told: set[tuple[str, str]] = set()
        self._calibration = calibration_of(model, fingerprint)

    def search(
        self,
        texts: Sequence[str],
        vectors: Any,
        k: int,
        name: str = "",
        *,
        candidates: int | None = None,
        budget: Asked = None,
        first: Asked = None,
    ) -> list[list[Hit]]:
        """The best ``k`` documents of each query, with probabilities where there is a calibration for their vectors.

        That is of all vectors of a document, so scores at a smaller budget have none.

        Args:
            texts: The queries.
            vectors: What the model made of them, as :class:`polyrep.search.Index` takes it.
            k: How many documents.
            name: Which vectors of the index; default: its only ones.
            candidates: As for :class:`polyrep.search.Index`.
            budget: Likewise.
            first: Likewise.
        """
        calibration = self._applicable(name, budget, first)
        # A document's lead needs another one beside it.
        depth = k if calibration is None else max(k, 2)
        plan: dict[str, Any] = {"candidates": candidates, "budget": budget, "first": first}
        plan = {key: value for key, value in plan.items() if value is not None}
        found = self._index.search({name: vectors} if name else vectors, depth, **plan)
        if calibration is None:
            return found
        wide = uncertainty_of(self._model, texts) if "uncertainty" in calibration.weights else None
        sparse = self._origin(name).kind == "sparse"  # type: ignore[union-attr]
        return [
            _probable(calibration, hits, None if wide is None else wide[row : row + 1], sparse)[:k]
            for row, hits in enumerate(found)
        ]

    def _origin(self, name: str) -> Origin | None:
        origins: dict[str, Origin] = self._index.origins
        return origins.get(name or next(iter(origins), ""))

    def _applicable(self, name: str, budget: Asked, first: Asked) -> Calibration | None:
        """The calibration, unless it is of other scores than those of these vectors."""
        origin, made = self._origin(name), self._calibration
        if made is None or origin is None:
            return None
        why = None
        if origin.precision == "binary":
            why = "are signs"
        elif origin.fingerprint != self._fingerprint:
            why = "were made by another model"
        elif origin.kind != kind_of(self._model):
            why = f"are a view of kind {origin.kind}, the calibration of kind {kind_of(self._model)}"
        elif (origin.window, origin.stride) != (made.window, made.stride):
            cuts = [_cut(origin.window, origin.stride), _cut(made.window, made.stride)]
            why = "are of {}, the calibration of {}".format(*cuts)
        elif budget is not None or first is not None or origin.nested:
            scored, full = budgets_of(origin, budget, first, "the index")[-1], groups_of(self._model)[-1:]
            if full != (tuple(scored),):
                why = f"are compared as {tuple(scored)}, the calibration is of {', '.join(map(str, full)) or 'all'}"
        if why:
            if (origin.name, why) not in self._told:
                logger.warning("Vectors %r %s, so their scores have no probabilities.", origin.name, why)
            self._told.add((origin.name, why))
            return None
        return made


def _cut(window: int, stride: int) -> str:
    return f"--window {window} --stride {stride}" if window else "whole documents"


def _probable(calibration: Calibration, hits: list[Hit], uncertainty: np.ndarray | None, sparse: bool) -> list[Hit]:
    """Hits of one query, best first, with their probabilities."""
    if not hits:
        return hits
    scores = [hit.score for hit in hits]
    if sparse and len(scores) == 1:
        scores.append(0.0)  # of a document without a word of the query, which not every engine finds
    found = calibration.probabilities(np.array([scores]), uncertainty)[0, : len(hits)]
    return [hit._replace(probability=value) for hit, value in zip(hits, found.tolist(), strict=True)]
