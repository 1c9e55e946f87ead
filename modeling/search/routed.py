"""Routed entries in lists on disk: late interaction in which a query meets what stands under its own keys alone.

A list holds the entries of one key, by document; a search reads the lists of the query's keys through memory maps and
nothing else, so that an index may be larger than memory. Every document has a score, as by the oracle
(the exact scores of ``polyrep.search.scoring``): 0 where it shares no key and there are no vectors of whole texts.

::

    bounds     (vocabulary + 1,)      where each key's list starts and ends
    values     (entries, dim)         float16, float32, or int8 with ``scales (entries,)``
    places     (entries,)             documents, rising within a list
    sentences  (documents, width)     vectors of whole texts, where there are any
    longest    (1,)                   length of the longest entry that was ever added
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast
from urllib.parse import SplitResult

import numpy as np
import torch

from ..encoding.embeddings import Embeddings, between
from ..encoding.shards import Shard
from ..errors import InputError
from .local import Documents, FolderIndex, InParts
from .protocol import Added, Asked, Hit, Queries, refuse_unfit_entries, refuse_unknown
from .ranking import refuse_not_finite_scores, scores_of, sort_keys, tie_ranks
from .scoring import CHUNK_ELEMENTS, ROUTED, clamps

logger = logging.getLogger(__name__)

PRECISIONS = ("float16", "float32", "int8")

PIECE = 2**16
"""Entries of a list that are compared at a time, and that are written at a time."""

QUERIES = 64
"""Queries of a batch, fewer where there are so many documents that their scores would not fit."""


class _Lists(NamedTuple):
    """What a generation holds; see the module."""

    bounds: np.ndarray
    values: np.ndarray
    places: np.ndarray
    longest: float
    scales: np.ndarray | None
    sentences: np.ndarray | None


class RoutedIndex(FolderIndex):
    """An inverted index of routed entries, exact among the entries that it keeps.

    Adding, replacing and deleting write all lists anew, some thousand entries at a time. Of what is added, vectors
    wait in a temporary file; keys, documents and the order of all entries are in memory meanwhile, vectors are not.

    Args:
        parts: ``routed:///absolute/path`` or ``routed:relative/path``.
        settings: To build: ``threshold`` (0), entries that are not longer are left out, 0 for none; an entry's length
            is its weight times that of its token's vector, and its product with a query entry is at most the product
            of both lengths. ``precision``, ``float16``, ``float32`` or ``int8``, default that of the corpus. An index
            that is there keeps both. To search: ``search_threshold`` (0), likewise.
        force: Accept another model's fingerprint.

    Raises:
        InputError: The URI names no folder, a setting is unknown, out of range or differs from what the index was
            built with, or the index is damaged.
    """

    backend = "routed"
    kind = "routed"
    similarities = tuple(ROUTED)
    elsewhere = "memory:"
    unit = "entries under keys"
    _ranks: torch.Tensor | None

    def __init__(self, parts: SplitResult, settings: dict[str, str], *, force: bool = False):
        super().__init__(parts, force=force)
        self.settings = {
            "threshold": _length(settings, "threshold", self.stored.get("threshold", 0.0), self.where),
            "precision": settings.pop("precision", self.stored.get("precision", "")),
        }
        self.search_threshold = _length(settings, "search_threshold", 0.0, self.where)
        refuse_unknown(settings, self.where, "threshold, precision and search_threshold")
        if self.settings["precision"] not in ("", *PRECISIONS):
            raise InputError(
                f"{self.where}: precision={self.settings['precision']}: entries cannot be stored so. Use one of "
                f"{', '.join(PRECISIONS)}, or leave it out for that of the corpus."
            )
        if self.stored and self.stored != self.settings:
            raise InputError(
                f"{self.where}: built with {self.stored}, not {self.settings}, which cannot be changed. Leave these "
                "settings out, or name another folder and add the shards there."
            )
        if self.lists is not None and self.search_threshold >= self.lists.longest and len(self.lists.places):
            raise InputError(
                f"{self.where}: search_threshold={self.search_threshold:g}, but the longest entry has the length "
                f"{self.lists.longest:.4g}, so every list would be empty. Use less."
            )

    def add(self, shards: Iterable[Shard]) -> Added:
        """See :class:`polyrep.search.Index`; documents that no query can tell from others are counted in a warning.

        Raises:
            InputError: See there; or the threshold leaves no entry.
        """
        added = super().add(shards)
        empty = self.statistics()["documents_without_entries"] if added.documents else 0
        if empty and (self.lists is None or self.lists.sentences is None):
            logger.warning(
                "%s: %s of %s documents have no entry%s and no vector of the whole text, so each has the score 0 for "
                "every query.",
                self.where,
                f"{empty:,}",
                f"{self.count():,}",
                f" longer than {self.settings['threshold']:g}" if self.settings["threshold"] else "",
            )
        return added

    def search(
        self,
        queries: Queries | Mapping[str, Queries],
        k: int = 10,
        *,
        weights: Mapping[str, float] | None = None,
        candidates: int | None = None,
        budget: Asked = None,
        first: Asked = None,
    ) -> list[list[Hit]]:
        """See :class:`polyrep.search.Index`; there is no weighted sum, no second stage and no budget.

        Ties go to the higher id, documents with the score 0 among them.
        """
        asked, total = self._query_vectors(queries, k, weights, budget, first), self.count()
        found: list[list[Hit]] = []
        step = max(1, min(QUERIES, CHUNK_ELEMENTS // max(1, total)))
        for start in range(0, len(asked) if total else 0, step):
            scores = torch.from_numpy(self._scores(between(asked, start, min(start + step, len(asked)))))
            refuse_not_finite_scores(scores)
            found += self._best(scores, min(k, total))
        return found or [[] for _ in range(len(asked))]

    def _best(self, scores: torch.Tensor, k: int) -> list[list[Hit]]:
        """The best ``k`` documents of each query; only those that could be among them are put in order."""
        least, ranks, found = scores.topk(k, dim=1).values[:, -1], self._tie_ranks(), []
        for row, limit in zip(scores, least, strict=True):
            places = (row >= limit).nonzero()[:, 0]
            keys, order = sort_keys(row[places], ranks[places]).topk(k)
            found += self.documents.hits(places[order].numpy()[None], scores_of(keys).numpy()[None])
        return found

    def statistics(self) -> dict[str, float]:
        """What the lists are like.

        Returns:
            ``documents``, ``entries``, ``entries_per_document``, ``documents_without_entries``, ``lists`` (keys that
            have any), ``longest_list`` (its entries) and ``gini`` of the lists' lengths: 0 where all are alike, nearly
            1 where one holds all.
        """
        documents = self.count()
        if self.lists is None or not documents:
            return statistics_of_lists(np.empty(0, np.int64), documents, 0)
        there = np.zeros(documents, bool)
        there[self.lists.places] = True
        return statistics_of_lists(np.diff(self.lists.bounds), documents, int((~there).sum()))

    def _scores(self, asked: Embeddings) -> np.ndarray:
        """Scores ``(queries, documents)`` of some queries."""
        (origin,) = self.origins.values()
        lists, scores = cast(_Lists, self.lists), np.zeros((len(asked), self.count()), np.float32)
        add_scores_of_lists(scores, asked, lambda key: self._pieces(lists, key), clamp=clamps(origin.similarity))
        if asked.sentences is not None and lists.sentences is not None:
            for start in range(0, scores.shape[1], PIECE):
                part = _wide(lists.sentences[start : start + PIECE])
                scores[:, start : start + PIECE] += asked.sentences @ part.T
        return scores

    def _pieces(self, lists: _Lists, key: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Entries of a list in float32 and their documents, all of a document's together."""
        start, stop = lists.bounds[key : key + 2].tolist()
        while start < stop:
            end = min(start + PIECE, stop)
            if end < stop:  # not amid a document
                place, documents = lists.places[end], lists.places[start:stop]
                end = start + int(np.searchsorted(documents, place) or np.searchsorted(documents, place, "right"))
            places = np.asarray(lists.places[start:end])
            if len(places) and not (0 <= places[0] and places[-1] < self.count() and (np.diff(places) >= 0).all()):
                raise InputError(f"{self.path}: the list of key {key} names no documents in order. {self._remedy}")
            values = _wide(lists.values[start:end])
            if lists.scales is not None:
                values *= lists.scales[start:end, None]
            if self.search_threshold:
                kept = _lengths(values) > self.search_threshold
                values, places = values[kept], places[kept]
            start = end
            if len(places):
                yield values, places

    def _tie_ranks(self) -> torch.Tensor:
        if self._ranks is None:
            self._ranks = torch.from_numpy(tie_ranks(self.documents.ids))
        return self._ranks

    @property
    def _precision(self) -> str:
        return self.settings["precision"] or next(iter(self.origins.values())).precision

    def _open(self, folder: Path | None, ids: list[str], arrays: dict[str, np.ndarray]) -> None:
        self.documents = Documents(ids)
        self._ranks = None
        self._added = _Added()
        self.lists: _Lists | None = None
        if folder is None:
            return
        (origin,) = self.origins.values()
        lists = _Lists(
            arrays["bounds"],
            arrays["values"],
            arrays["places"],
            float(arrays["longest"][0]),
            arrays.get("scales"),
            arrays.get("sentences"),
        )
        entries, bounds = len(lists.places), lists.bounds
        if bounds.shape != (origin.vocabulary + 1,) or bounds.dtype != np.int64 or bounds[0] or bounds[-1] != entries:
            raise ValueError(f"bounds of shape {bounds.shape}, not of {origin.vocabulary:,} lists")
        if (np.diff(bounds) < 0).any():
            raise ValueError("lists that end before they start")
        if lists.places.dtype != np.int32 or lists.places.ndim != 1:
            raise ValueError(f"documents of type {lists.places.dtype}")
        scaled = lists.values.dtype == np.int8
        if lists.values.shape != (entries, origin.dim) or not (scaled or lists.values.dtype.kind == "f"):
            raise ValueError(f"entries of shape {lists.values.shape} and type {lists.values.dtype}")
        if scaled != (lists.scales is not None) or (scaled and lists.scales.shape != (entries,)):  # type: ignore[union-attr]
            raise ValueError("scales that are missing, there without need, or not as many as entries")
        wide = (0, 0) if lists.sentences is None else lists.sentences.shape
        if wide != ((len(ids), origin.sentence_dim) if origin.sentence_dim else (0, 0)):
            raise ValueError(f"vectors of whole texts of shape {wide}")
        self.lists = lists

    def _append(self, shard: Shard) -> int:
        vectors, origin = shard.vectors, shard.origin
        refuse_unfit_entries(vectors, origin, f"{self.where}: document", shard.ids)
        assert vectors.indices is not None
        places = len(self.documents.ids) + np.repeat(np.arange(len(vectors), dtype=np.int32), vectors.lengths)
        values = np.asarray(vectors.values, np.float32)
        lengths = _lengths(values)
        keys, threshold = np.asarray(vectors.indices, np.int32), self.settings["threshold"]
        self._added.longest = max(self._added.longest, float(lengths.max(initial=0)))
        if threshold:
            kept = lengths > threshold
            self._added.left_out += int((~kept).sum())
            values, keys, places = values[kept], keys[kept], places[kept]
        self._added.take(keys, places.astype(np.int32), values, vectors.sentences, self._precision, self.where)
        return self.documents.append(shard.ids)

    def _write(self, folder: Path) -> Mapping[str, np.ndarray | InParts]:
        (origin,) = self.origins.values()
        old, added, total = self.lists, self._added, len(self.documents.ids)
        live = self.documents.compact()
        moved = np.full(total, -1, np.int32)
        moved[live] = np.arange(len(live), dtype=np.int32)
        known = np.empty(0, np.int32)
        keys, places = [known], [known]
        if old is not None:
            keys.append(np.repeat(np.arange(origin.vocabulary, dtype=np.int32), np.diff(old.bounds)))
            places.append(old.places)
        key, place = np.concatenate(keys + added.keys), moved[np.concatenate(places + added.places)]
        kept = np.flatnonzero(place >= 0)
        key, place = key[kept], place[kept]
        order = np.lexsort((place, key))
        if not len(order) and added.left_out and len(live):
            raise InputError(
                f"{self.where}: threshold={self.settings['threshold']:g}, but the longest entry of all documents has "
                f"the length {added.longest:.4g}, so no document would keep any and none could be found. Use less."
            )
        bounds = np.concatenate([[0], np.cumsum(np.bincount(key, minlength=origin.vocabulary))]).astype(np.int64)
        longest = max(added.longest, old.longest if old else 0)
        arrays: dict[str, np.ndarray | InParts] = {"bounds": bounds, "places": place[order]}
        arrays["longest"] = np.array([longest], np.float32)
        dtype, whole = np.dtype(self._precision), np.dtype("float32" if self._precision == "float32" else "float16")
        before = None if old is None else old.values
        arrays["values"] = _gathered(added.values, before, kept[order], (dtype, origin.dim))
        if self._precision == "int8":
            scales = [*([] if old is None or old.scales is None else [old.scales]), *added.scales]
            arrays["scales"] = np.concatenate([np.empty(0, np.float32), *scales])[kept[order]]
        if origin.sentence_dim:
            before = None if old is None else old.sentences
            arrays["sentences"] = _gathered(added.sentences, before, live, (whole, origin.sentence_dim))
        return arrays

    def _load(self) -> None:
        super()._load()
        if self.documents.unused:  # none is written
            raise InputError(f"{self.path}: has documents that lists name and it does not. {self._remedy}")

    def _save(self) -> None:
        super()._save()
        self._load()  # as maps of what was written, so that it is not in memory


def statistics_of_lists(lengths: np.ndarray, documents: int, empty: int) -> dict[str, float]:
    """What lists of entries are like; see :meth:`RoutedIndex.statistics`.

    Args:
        lengths: ``(keys,)`` entries of each list, those without any among them or not.
        documents: How many there are.
        empty: How many of them are in no list.
    """
    lengths = np.sort(lengths[lengths > 0])
    found: dict[str, float] = {"documents": documents, "entries": int(lengths.sum())}
    found |= {"entries_per_document": found["entries"] / max(1, documents), "documents_without_entries": empty}
    if not len(lengths):
        return found | {"lists": 0, "longest_list": 0, "gini": 0.0}
    ranks = np.arange(1, len(lengths) + 1)
    gini = 2 * float(ranks @ lengths) / (len(lengths) * lengths.sum()) - (len(lengths) + 1) / len(lengths)
    return found | {"lists": len(lengths), "longest_list": int(lengths[-1]), "gini": float(gini)}


def add_scores_of_lists(
    scores: np.ndarray,
    asked: Embeddings,
    pieces: Callable[[int], Iterable[tuple[np.ndarray, np.ndarray]]],
    *,
    clamp: bool,
) -> None:
    """Add what queries score with the entries of their own keys; no other list is read.

    Args:
        scores: ``(queries, documents)`` in float32, which is added to.
        asked: Routed queries in float32.
        pieces: Gives the list of a key, some of it at a time: entries ``(entries, dim)`` in float32 and the documents
            that they are of ``(entries,)``, rising, all of a document's together.
        clamp: Whether a query entry counts 0 where its best product is negative.
    """
    assert asked.indices is not None
    owner = np.repeat(np.arange(len(asked)), asked.lengths)
    order = np.argsort(asked.indices, kind="stable")  # by key, then by query
    keys, starts = np.unique(asked.indices[order], return_index=True)
    for key, start, stop in zip(keys.tolist(), starts, [*starts[1:], len(order)], strict=False):
        rows = order[start:stop]
        askers, groups = np.unique(owner[rows], return_index=True)  # a query may have a key twice
        for values, places in pieces(key):
            products = asked.values[rows] @ values.T  # (query entries, entries of the list)
            begins = np.flatnonzero(np.diff(places, prepend=-1))
            if len(begins) < len(places):
                products = np.maximum.reduceat(products, begins, axis=1)  # (query entries, documents)
            if clamp:
                np.maximum(products, 0, out=products)
            if len(askers) < len(rows):
                products = np.add.reduceat(products, groups, axis=0)
            if len(askers) == 1:
                scores[askers[0], places[begins]] += products[0]
            else:
                scores[np.ix_(askers, places[begins])] += products


class _Added:
    """Entries that were added since the index was written, in the order in which they came."""

    def __init__(self) -> None:
        self.keys: list[np.ndarray] = []
        self.places: list[np.ndarray] = []
        self.scales: list[np.ndarray] = []
        self.values, self.sentences = _Waiting(), _Waiting()
        self.longest, self.left_out = 0.0, 0

    def take(
        self,
        keys: np.ndarray,
        places: np.ndarray,
        values: np.ndarray,
        sentences: np.ndarray | None,
        precision: str,
        where: str,
    ) -> None:
        """Keep the entries of some documents, their numbers in a precision."""
        if precision == "int8":
            scales = np.abs(values).max(1, initial=0).astype(np.float32) / 127
            self.scales.append(scales)
            narrow = np.rint(values / np.where(scales == 0, 1, scales)[:, None]).astype(np.int8)
        else:
            narrow = _narrowed(values, precision, where)
        self.keys.append(keys)
        self.places.append(places)
        self.values.put(narrow)
        if sentences is not None:
            self.sentences.put(_narrowed(sentences, "float32" if precision == "float32" else "float16", where))


class _Waiting:
    """Rows in a temporary file, which is gone with the process."""

    def __init__(self) -> None:
        self._file: BinaryIO | None = None
        self._rows, self._dtype = 0, np.dtype(np.float16)
        self._tail: tuple[int, ...] = ()

    def put(self, rows: np.ndarray) -> None:
        """Take further rows, which are all of one type and width."""
        if self._file is None:
            self._file = cast(BinaryIO, tempfile.TemporaryFile())
            self._dtype, self._tail = rows.dtype, rows.shape[1:]
        self._file.write(np.ascontiguousarray(rows).data)
        self._rows += len(rows)

    def mapped(self) -> np.ndarray | None:
        """All rows, through a memory map; None if there are none."""
        if self._file is None or not self._rows:
            return None
        self._file.flush()
        return np.memmap(self._file, self._dtype, "r", shape=(self._rows, *self._tail))  # type: ignore[call-overload]


def _gathered(added: _Waiting, old: np.ndarray | None, order: np.ndarray, form: tuple[np.dtype, int]) -> InParts:
    """Rows of an old array and of those that were added behind it, in another order; ``form`` is type and width."""
    new, known, (dtype, width) = added.mapped(), 0 if old is None else len(old), form

    def parts() -> Iterator[np.ndarray]:
        for start in range(0, len(order), PIECE):
            wanted = order[start : start + PIECE]
            rows, late = np.empty((len(wanted), width), dtype), wanted >= known
            if old is not None:
                rows[~late] = old[wanted[~late]]
            if new is not None:
                rows[late] = new[wanted[late] - known]
            yield rows

    return InParts(dtype, (len(order), width), parts())


def _wide(values: np.ndarray) -> np.ndarray:
    """Numbers in float32, by torch, which takes several of them at a time where numpy takes one by one."""
    return torch.from_numpy(np.array(values)).float().numpy()


def _lengths(values: np.ndarray) -> np.ndarray:
    """``(entries,)`` of entries in float32, without another array of their size."""
    return np.sqrt(np.einsum("ed,ed->e", values, values))


def _narrowed(values: np.ndarray, precision: str, where: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # refused in the next line
        narrow = np.asarray(values, precision)
    if not np.isfinite(narrow).all():
        raise InputError(
            f"{where}: a document has a number that is not finite in {precision}, so its scores would mean nothing. "
            "Numbers above 65,504 want ?precision=float32."
        )
    return narrow


def _length(settings: dict[str, Any], name: str, default: float, uri: str) -> float:
    """A setting of a URI from 0 on, taken out of ``settings``."""
    value = settings.pop(name, default)
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number < np.inf:
        raise InputError(
            f"{uri}: {name}={value}: entries have a length from 0 on, so this leaves out none or all. Pass a number, "
            "e.g. 0.9; 0 keeps every entry."
        )
    return number
