"""What every reader of data gives: a corpus, the queries of one split, and their judgments (qrels)."""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ..errors import InputError
from .words import words_of

Judgments = dict[str, dict[str, int]]
Given = dict[tuple[str, str], list[dict[str, Any]]]


@dataclass(frozen=True)
class RetrievalDataset:
    """A corpus with the judged queries of one split.

    Attributes:
        name: Last part of the folder or repository name, used in tables.
        split: Name of the split, e.g. ``"test"``.
        corpus: Document id -> text (title, one space, text; stripped), in file order; or -> page image.
        queries: Query id -> text, only the queries that the split judges.
        qrels: Query id -> {document id: integer relevance}.
        given: Query id and document id -> for each row of a table that pairs them, what it holds for training beside:
            ``negative_1`` ..., ``scores``.
        vectors: ``document``, and perhaps ``query`` -> ``(texts or images, width)`` in their order, of a data set that
            brings what some encoder gave; images that are there as vectors alone are None in the corpus.
        same_ids: Whether a document with the id of a query is that query itself, so that it is no answer to it. None:
            what the texts say, see :attr:`own`.
        folder: Where it was read from; None if it lies in no folder.
    """

    name: str
    split: str
    corpus: Mapping[str, Any]
    queries: dict[str, str]
    qrels: Judgments
    given: Given = field(default_factory=dict)
    vectors: Mapping[str, np.ndarray] = field(default_factory=dict)
    same_ids: bool | None = None
    folder: Path | None = None

    @cached_property
    def own(self) -> np.ndarray:
        """``(queries,)`` place of each query's own document in the corpus, which is left out for it; -1 for none.

        Where queries are documents (ArguAna, Quora, duplicates), each would find itself first: BEIR leaves out a
        document with the query's id, and MTEB does in the tasks that say so. Ids that are mere numbers may meet by
        chance, so unless :attr:`same_ids` tells, at least half of such documents must have the words of their query. A
        document that is judged relevant to the query is never left out.
        """
        place = {identifier: number for number, identifier in enumerate(self.corpus)}
        relevant = {q for q in self.queries if self.qrels.get(q, {}).get(q, 0) > 0}
        found = np.array([-1 if q in relevant else place.get(q, -1) for q in self.queries], np.int64)
        if self.same_ids is None and isinstance(self.corpus, dict):  # images are opened late, and hold no query
            pairs = [(self.queries[q], self.corpus[q]) for q, at in zip(self.queries, found, strict=True) if at >= 0]
            same = 2 * sum(_same_text(query, document) for query, document in pairs) >= len(pairs)
        else:
            same = bool(self.same_ids)
        return found if same else np.full_like(found, -1)

    def pairs(self) -> Dataset:
        """One row ``{"query", "positive"}`` for each positive judgment in the order of the qrels.

        Of a table that brings negatives, one for each of its rows.
        """
        rows = [
            (q, d, held)
            for q, judged in self.qrels.items()
            for d, score in judged.items()
            if score > 0
            for held in self.given.get((q, d), [{}])
        ]
        columns = {
            "query": [self.queries[q] for q, _, _ in rows],
            "positive": [self.corpus[d] for _, d, _ in rows],
        }
        for name in rows[0][2] if rows else ():
            column = name if name.startswith("negative_") else "label"
            columns[column] = [self._given(q, held, name) for q, _, held in rows]
        return Dataset.from_dict(columns)

    def _given(self, query: str, held: dict[str, Any], name: str) -> Any:
        """A negative of a pair, or a teacher's scores of its document and of its negatives."""
        value, length = held[name], len(held)
        if name.startswith("negative_"):
            if not isinstance(value, str) or not value.strip():
                raise InputError(
                    f"{self.name} {query}: {name} is {value!r}, which encodes to an arbitrary vector. Remove the row."
                )
            return value.strip()
        fits = isinstance(value, list) and len(value) == length
        if not fits or not all(isinstance(score, int | float) and math.isfinite(score) for score in value):
            raise InputError(
                f"{self.name} {query}: {name} is {value!r}; expected {length} numbers, of the document and of each of "
                "its negatives."
            )
        return [float(score) for score in value]


def _same_text(query: Any, document: Any) -> bool:
    """Whether two texts are one, but for a title, a part that was cut off, and how it is written.

    So it is if four fifths of the words of the shorter are in the longer; where one has no words, if they are equal.
    """
    if not isinstance(query, str) or not isinstance(document, str):
        return False
    asked, there = (unicodedata.normalize("NFKC", text).casefold() for text in (query, document))
    words, others = set(words_of(asked)), set(words_of(there))
    if not words or not others:
        return asked.split() == there.split()
    return 5 * len(words & others) >= 4 * min(len(words), len(others))


def dataset_name(source: str | Path) -> str:
    """What tables and caches call a data set: the last part of its name, folder or id, fit to be a file's name."""
    name = re.sub("[:,]", "-", Path(source).name or Path(source).resolve().name)
    return name if len(name) <= 100 else f"{name[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def tenth(identifier: str) -> int:
    """0 to 9, by a hash of an id."""
    return int(hashlib.md5(identifier.encode(), usedforsecurity=False).hexdigest(), 16) % 10


def in_dev_tenth(query_id: str) -> bool:
    """Whether a train query is set aside for dev."""
    return tenth(query_id) == 0
