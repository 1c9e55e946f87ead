"""Pairs of a query and a document or page image, in Parquet or on the Hub, as a data set."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Image, load_dataset
from datasets.exceptions import DatasetsError

from ..errors import InputError, NoSplit
from .dataset import Judgments, RetrievalDataset, in_dev_tenth


class _Pages(Mapping[str, Any]):
    """Document id -> page image, decoded when it is asked for: a corpus of pages does not fit into memory."""

    def __init__(self, column: str):
        self.column = column
        self.places: dict[str, tuple[Dataset, int]] = {}
        self.digests: dict[str, str] = {}  # of the stored bytes, so that a cache need not decode every page

    def __getitem__(self, identifier: str) -> Any:
        from PIL import Image as Pillow

        table, row = self.places[identifier]
        stored = table[row][self.column]
        return Pillow.open(io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]).convert("RGB")

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


_DOCUMENT_COLUMNS = ("document", "positive", "answer", "text", "image")


def open_pairs(source: str, revision: str | None, queries: bool = True) -> DatasetDict | None:
    """A table of pairs, or of documents alone, local or on the Hub; None for everything in BEIR layout."""
    folder = Path(source)
    if folder.is_dir() and not (any(folder.glob("**/*.parquet")) and not (folder / "queries.jsonl").is_file()):
        return None
    if not folder.is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return None
    try:
        table = load_dataset(source, revision=revision)
    except (OSError, ValueError, DatasetsError):
        return None
    columns = next(iter(table.values())).column_names
    needed = "query" in columns or not queries and "_id" not in columns
    return table if needed and any(name in columns for name in _DOCUMENT_COLUMNS) else None


def from_pairs(source: str, table: DatasetDict, split: str | None) -> RetrievalDataset:
    """Documents of all splits, and the queries of one, if any; without a dev split, a tenth of train as elsewhere."""
    wanted = "train" if split == "dev" and "dev" not in table and "train" in table else split
    if wanted is not None and wanted not in table:
        raise NoSplit(f"{source}: no split {split!r}; it has {sorted(table)}.")
    first = next(iter(table.values()))
    column = next(name for name in _DOCUMENT_COLUMNS if name in first.column_names)
    pages = _Pages(column) if isinstance(first.features[column], Image) else None
    texts: dict[str, str] = {}
    queries: dict[str, str] = {}
    qrels: Judgments = {}
    id_of: dict[str, str] = {}
    given: dict[str, dict[str, Any]] = {}
    extra = [name for name in first.column_names if re.fullmatch(r"negative_\d+", name)]
    lists = [name for name in ("scores", "label") if extra and isinstance(first[:1].get(name, [None])[0], list)]
    given_columns = [*extra, *lists[:1]]
    for name, part in table.items():
        part = part.cast_column(column, Image(decode=False)) if pages is not None else part
        for number, row in enumerate(part):
            document, query = row[column], row["query"] if wanted else "none is read"
            empty = not (document.strip() if isinstance(document, str) else document)
            if not isinstance(query, str) or not query.strip() or empty:
                raise InputError(
                    f"{source} {name} row {number}: an empty query or {column}, which encodes to an arbitrary vector. "
                    "Remove the row."
                )
            raw = document if pages is None else document["bytes"] or document["path"]
            digest = hashlib.sha256(raw.strip().encode() if isinstance(raw, str) else raw).hexdigest()
            identifier = id_of.setdefault(digest, f"{name}-{number}")
            if pages is not None:
                pages.places.setdefault(identifier, (part, number))
                pages.digests.setdefault(identifier, digest)
            else:
                texts.setdefault(identifier, document.strip())
            if name == wanted:
                queries[f"{name}-{number}"] = query.strip()
                qrels[f"{name}-{number}"] = {identifier: 1}
                given[f"{name}-{number}"] = {column: row[column] for column in given_columns}
    if wanted != split or (split == "train" and "dev" not in table):
        qrels = {q: judged for q, judged in qrels.items() if in_dev_tenth(q) == (split == "dev")}
    if wanted and not qrels:
        raise NoSplit(f"{source}: split {split!r} has no pair, so there is nothing to train on or to measure.")
    corpus: Mapping[str, Any] = texts if pages is None else pages
    kept = {q: given[q] for q in qrels} if extra else {}
    return RetrievalDataset(Path(source).name, split or "corpus", corpus, {q: queries[q] for q in qrels}, qrels, kept)
