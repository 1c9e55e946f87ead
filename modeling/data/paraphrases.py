"""Pairs of wordings of one need: from a file, from the judgments, from captions, or made by misspelling and cutting.

A file is ``paraphrases.jsonl`` (or ``.jsonl.gz``) in the data set's folder, one pair a line::

    {"split": "test", "a": "q1", "b": "q2", "similarity": 4.2, "kind": "same_image"}

``a`` and ``b`` are ids of queries that the split judges; ``similarity`` is a mean rating of people from 0 to 5, null
or left out where nobody rated; ``kind`` is a word of the file's own. Queries with a relevant document in common,
captions of one image among them, are pairs without a rating, and looser: they may ask for different sides of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from scipy.sparse import csr_matrix, triu

from ..errors import InputError
from .beir import read_jsonl
from .captions import is_captions
from .dataset import RetrievalDataset
from .noise import narrowed
from .records import identifier_in, lines_of, parsed, shown

Source = Literal["file", "qrels", "captions", "misspelt", "cut"]

SOURCES: tuple[str, ...] = get_args(Source)
"""Where pairs come from."""

FILE = "paraphrases.jsonl"

BEST = 5.0
"""The highest rating."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of queries that say one need in two wordings.

    Attributes:
        dataset: Whose queries the first wordings are.
        reworded: Whose queries the second are: the same data set, or one of its queries with less in them.
        source: See :data:`SOURCES`.
        a: ``(pairs,)`` places of the first wordings among the queries of ``dataset``.
        b: ``(pairs,)`` places of the second among those of ``reworded``.
        similarity: ``(pairs,)`` ratings from 0 to 5, NaN where there is none.
        kinds: ``(pairs,)`` what the file calls each pair, else the source.
        same_text: How many pairs were left out since both wordings are the same text.
    """

    dataset: RetrievalDataset
    reworded: RetrievalDataset
    source: str
    a: np.ndarray
    b: np.ndarray
    similarity: np.ndarray
    kinds: np.ndarray
    same_text: int = 0

    def __len__(self) -> int:
        return len(self.a)

    @property
    def needs_second_search(self) -> bool:
        """Whether the second wordings are queries of their own, which have to be searched for as well."""
        return self.reworded is not self.dataset

    @property
    def sides(self) -> list[RetrievalDataset]:
        """What has to be searched for: the queries of the data set, and the reworded ones where they are others."""
        return [self.dataset, self.reworded] if self.needs_second_search else [self.dataset]

    @cached_property
    def relevant(self) -> tuple[csr_matrix, csr_matrix]:
        """For each wording ``(pairs, documents)`` whether a document is relevant to it."""
        return relevance(self.dataset)[self.a], relevance(self.reworded)[self.b]

    @cached_property
    def common(self) -> csr_matrix:
        """``(pairs, documents)`` whether a document is relevant to both wordings."""
        return self.relevant[0].multiply(self.relevant[1]).tocsr()


def pairs_of(dataset: RetrievalDataset, source: Source | str = "file", *, seed: int = 0) -> Pairs:
    """Pairs of wordings of the queries of a split.

    Args:
        dataset: The split, as :func:`polyrep.data.load_retrieval_dataset` reads it.
        source: ``file``: ``paraphrases.jsonl`` in its folder. ``qrels``: queries with a relevant document in common.
            ``captions``: captions of one image. ``misspelt``, ``cut``: each query, and the same with slips of the
            fingers or without its end, by :func:`polyrep.data.noise.narrowed`, alike on every machine.
        seed: Of misspelling and cutting.

    Raises:
        InputError: There is no such source, no such file, a line of it cannot be used, or the split has no pair.
    """
    if source not in SOURCES:
        raise InputError(f"paraphrases {source!r}: no source of pairs. Use one of {', '.join(SOURCES)}.")
    reworded, ratings, kinds = dataset, None, None
    if source == "file":
        a, b, ratings, kinds = _from_file(dataset)
    elif source in ("misspelt", "cut"):
        reworded = _narrowed(dataset, source, seed)  # type: ignore[arg-type]
        a = b = np.arange(len(dataset.queries))
    else:
        if source == "captions" and not (dataset.folder and is_captions(dataset.folder)):
            raise InputError(
                f"{dataset.name}: holds no images with captions, so no two captions are of one image. Use qrels for "
                "queries with a relevant document in common."
            )
        known = relevance(dataset).astype(np.int32)
        a, b = triu(known @ known.T, k=1).nonzero()
        order = np.lexsort((b, a))
        a, b = a[order], b[order]
    first, second = (np.array(list(side.queries.values()), object) for side in (dataset, reworded))
    differ = first[a] != second[b]
    if not differ.any():
        raise InputError(
            f"{dataset.name}, {dataset.split}: no pair of wordings by {source}{_but_same(len(differ))}, so there is "
            "nothing to compare. Choose another split or another source of pairs."
        )
    similarity = np.full(len(a), np.nan) if ratings is None else ratings
    words = np.full(len(a), source, object) if kinds is None else kinds
    same = int((~differ).sum())
    return Pairs(dataset, reworded, source, a[differ], b[differ], similarity[differ], words[differ], same)


def relevance(dataset: RetrievalDataset) -> csr_matrix:
    """``(queries, documents)`` which documents of the corpus are judged relevant to which query."""
    place = {identifier: number for number, identifier in enumerate(dataset.corpus)}
    judged = [
        (row, place[document])
        for row, query in enumerate(dataset.queries)
        for document, grade in dataset.qrels[query].items()
        if grade > 0 and document in place
    ]
    rows, columns = np.array(judged, np.int64).reshape(-1, 2).T
    return csr_matrix((np.ones(len(rows), bool), (rows, columns)), shape=(len(dataset.queries), len(place)))


def _narrowed(dataset: RetrievalDataset, how: Literal["misspelt", "cut"], seed: int) -> RetrievalDataset:
    """The same split with less in its queries, under their own ids."""
    queries = narrowed(dataset.queries, how, seed)
    # What is left of a query may not tell any more that a document is that query itself.
    own = bool((dataset.own >= 0).any())
    vectors = {side: given for side, given in dataset.vectors.items() if side != "query"}  # of the whole queries
    return replace(dataset, split=f"{dataset.split}-{how}", queries=queries, same_ids=own, vectors=vectors)


def _from_file(dataset: RetrievalDataset) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Places of both wordings, ratings and kinds of a split's pairs, each ``(pairs,)``."""
    path = _file_of(dataset)
    place = {identifier: number for number, identifier in enumerate(dataset.queries)}
    found: dict[tuple[int, int], tuple[float, str]] = {}
    splits: set[str] = set()
    for where, row in _rows(path):
        try:
            split, kind = (_word(row, name, default) for name, default in (("split", None), ("kind", "file")))
            ids, rating = [identifier_in(row, side) for side in "ab"], _rating(row)
        except ValueError as error:
            raise InputError(
                f'{where}: {error}. Expected {{"split": "test", "a": "q1", "b": "q2", "similarity": 4.2, "kind": '
                '"..."}, with a similarity from 0 to 5 or null.'
            ) from None
        if ids[0] == ids[1]:
            raise InputError(
                f"{where}: pairs query {shown(ids[0])} with itself, whose results are always alike. Remove the line."
            )
        splits.add(split)
        if not _same_split(split, dataset.split):
            continue
        for identifier in ids:
            if identifier not in place:
                raise InputError(f"{where}: {_stranger(dataset, identifier)}")
        one, other = (place[identifier] for identifier in ids)
        if (one, other) in found or (other, one) in found:
            raise InputError(f"{where}: pairs {ids[0]!r} with {ids[1]!r} again, so it would count twice. Remove one.")
        found[one, other] = rating, kind
    if not found:
        raise InputError(
            f"{path}: no pair of split {dataset.split!r}; there are pairs of {sorted(splits) or 'none'}. Measure one "
            "of these, or take pairs from qrels."
        )
    a, b = np.array(list(found), np.int64).T
    ratings, kinds = zip(*found.values(), strict=True)
    return a, b, np.array(ratings, float), np.array(kinds, object)


def _file_of(dataset: RetrievalDataset) -> Path:
    if dataset.folder is None:
        raise InputError(
            f"{dataset.name}: is no folder of queries.jsonl or captions but a table, of the Hub or made in memory, so "
            f"{FILE} has no place in it. Write such a folder, or take pairs from qrels."
        )
    for name in (FILE, f"{FILE}.gz"):
        if (path := dataset.folder / name).is_file():
            return path
    raise InputError(
        f"{dataset.folder / FILE}: no such file, so there are no pairs. Write one line for each pair, {{"
        '"split": "test", "a": "q1", "b": "q2", "similarity": 4.2}, or take them from qrels, misspelt or cut.'
    )


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in lines_of(path):
        try:
            yield f"{path}:{number}", parsed(line)
        except ValueError as error:
            raise InputError(f"{path}:{number}: {error}. Expected one pair per line.") from None


def _word(row: Any, name: str, default: str | None) -> str:
    """A word of a row; the default where it is not there."""
    if not isinstance(row, dict):
        raise ValueError(f"not an object but {type(row).__name__}")
    found = row.get(name, default)
    if not isinstance(found, str) or not found:
        raise ValueError(f"{name}={shown(found)}" if name in row else f"no {name!r}")
    return found


def _rating(row: dict[str, Any]) -> float:
    """The similarity of a row, NaN for none."""
    found = row.get("similarity")
    if found is None:
        return math.nan
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found <= BEST:
        raise ValueError(f"similarity={shown(found)}")
    return float(found)


def _same_split(said: str, split: str) -> bool:
    return said == split or {said, split} <= {"dev", "val"}


def _stranger(dataset: RetrievalDataset, identifier: str) -> str:
    """Why a query cannot be one of a pair: there is none, or it is of another split."""
    known: set[str] = set()
    if dataset.folder and any((dataset.folder / f"queries.jsonl{packed}").is_file() for packed in ("", ".gz")):
        known = {identifier_in(row) for _, row in read_jsonl(dataset.folder, "queries")}
    if identifier in known:
        return (
            f"query {shown(identifier)} is judged in another split than {dataset.split!r}, so the pair lies across "
            "splits, and what is trained on would be measured. Remove the line, or mend its split."
        )
    return (
        f"query {shown(identifier)} is none of split {dataset.split!r}, so it cannot be searched for. Mend the id, or "
        "remove the line."
    )


def _but_same(pairs: int) -> str:
    return f" but {pairs:,} of equal texts" if pairs else ""
