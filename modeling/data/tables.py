"""Pairs of a query and a document or page image, in Parquet or on the Hub, as a data set."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import Dataset, DatasetDict, Image, load_dataset
from datasets.exceptions import DatasetsError

from ..errors import InputError, NoSplit, first_line
from .beir import hub_rows
from .dataset import Given, Judgments, RetrievalDataset, in_dev_tenth
from .records import refuse_no_file, shown, visible


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
    for file in folder.glob("**/*.parquet") if folder.is_dir() else ():
        if not file.is_dir():
            refuse_no_file(file)
    try:
        table = load_dataset(source, revision=revision)
    except (OSError, ValueError, TypeError, DatasetsError, pyarrow.ArrowException) as error:
        other = (folder / "README.md").is_file() or any(folder.glob("corpus.jsonl*"))  # a clone of the Hub's, or BEIR
        if folder.is_dir() and not other:
            reason = first_line(error.__cause__ or error)
            raise InputError(f"{_damaged(folder)}: cannot be read as a table ({reason}). Fetch it again.") from None
        return None
    columns = next(iter(table.values())).column_names
    needed = "query" in columns or not queries and "_id" not in columns
    return table if needed and any(name in columns for name in _DOCUMENT_COLUMNS) else None


def _damaged(folder: Path) -> Path:
    """The first Parquet file without a readable footer; the folder, where the damage lies elsewhere."""
    for file in sorted(folder.glob("**/*.parquet")):
        try:
            pyarrow.parquet.ParquetFile(file).close()
        except (OSError, ValueError, pyarrow.ArrowException):
            return file
    return folder


def from_pairs(source: str, table: DatasetDict, split: str | None) -> RetrievalDataset:
    """Documents of all splits, and the queries of one, if any; without a dev split, a tenth of train as elsewhere.

    Equal documents are one, and so are equal queries, with a judgment for each of their rows.
    """
    wanted = "train" if split == "dev" and "dev" not in table and "train" in table else split
    if wanted is not None and wanted not in table:
        raise NoSplit(f"{source}: no split {split!r}; it has {sorted(table)}.")
    first = next(iter(table.values()))
    column = next(name for name in _DOCUMENT_COLUMNS if name in first.column_names)
    pages = _Pages(column) if isinstance(first.features[column], Image) else None
    texts: dict[str, str] = {}
    queries: dict[str, str] = {}
    qrels: Judgments = {}
    document_of: dict[str, str] = {}
    query_of: dict[str, str] = {}
    given: Given = {}
    extra = [name for name in first.column_names if re.fullmatch(r"negative_\d+", name)]
    lists = [name for name in ("scores", "label") if extra and isinstance(first[:1].get(name, [None])[0], list)]
    given_columns = [*extra, *lists[:1]]
    for name, part in table.items():
        part = part.cast_column(column, Image(decode=False)) if pages is not None else part
        for number, (place, row) in enumerate(hub_rows(part, f"{source} {name}", first=0)):
            stored = _stored(place, column, row[column], image=pages is not None)
            digest = hashlib.sha256(stored if isinstance(stored, bytes) else stored.encode()).hexdigest()
            document = document_of.setdefault(digest, f"{name}-{number}")
            if pages is not None:
                pages.places.setdefault(document, (part, number))
                pages.digests.setdefault(document, digest)
            else:
                texts.setdefault(document, str(stored))
            asked = _stored(place, column, row["query"]) if wanted else ""
            if name == wanted:
                query = query_of.setdefault(str(asked), f"{name}-{number}")
                queries[query] = str(asked)
                qrels.setdefault(query, {})[document] = 1
                given.setdefault((query, document), []).append({name: row[name] for name in given_columns})
    if wanted != split or (split == "train" and "dev" not in table):
        qrels = {q: judged for q, judged in qrels.items() if in_dev_tenth(q) == (split == "dev")}
    if wanted and not qrels:
        raise NoSplit(f"{source}: split {split!r} has no pair, so there is nothing to train on or to measure.")
    corpus: Mapping[str, Any] = texts if pages is None else pages
    kept = {pair: rows for pair, rows in given.items() if pair[0] in qrels} if extra else {}
    return RetrievalDataset(Path(source).name, split or "corpus", corpus, {q: queries[q] for q in qrels}, qrels, kept)


def _stored(place: str, column: str, content: Any, *, image: bool = False) -> str | bytes:
    """A text without outer space, or of an image its bytes, or its path where it lies elsewhere.

    Raises:
        InputError: It is empty, or nothing of the kind.
    """
    found = (content or {}).get("bytes") or (content or {}).get("path") if image else content
    if found and not isinstance(found, str | bytes if image else str):
        raise InputError(f"{place}: {shown(found)} is no text of a query or {column}. Convert the column to strings.")
    if isinstance(found, str) and not image:
        found = visible(found)
    if not found:
        raise InputError(f"{place}: an empty query or {column}, which encodes to an arbitrary vector. Remove the row.")
    return found
