"""Retrieval data sets in BEIR layout, from a folder or from the Hugging Face Hub.

A data set is a corpus, the queries of one split and their judgments (qrels). Everything is checked while it is read,
because a silently skipped line moves nDCG by an amount that nobody can explain later.

Folder layout, each ``.jsonl`` optionally gzipped (``.jsonl.gz``)::

    corpus.jsonl      {"_id": "d1", "title": "optional", "text": "..."}
    queries.jsonl     {"_id": "q1", "text": "..."}
    qrels/test.tsv    header line, then: query id <TAB> document id <TAB> integer score

On the Hub both common arrangements are read: configurations ``corpus``, ``queries`` and ``default`` in one repository,
or ``corpus`` and ``queries`` with the judgments in ``<repository>-qrels``. So is a plain table of pairs, with a
column ``query`` and one of ``document``, ``positive``, ``answer``, ``text`` or ``image``: equal documents are one, and
each row is a judgment. Page images stay as they are stored until they are encoded. Such a table may bring its own
hard negatives for training, in columns ``negative_1`` and so on, and in ``scores`` what a teacher gave to the document
and to each of them. Images with captions, or vectors of both, are another kind of folder: see ``captions.py``.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import logging
import math
import random
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Image, load_dataset
from datasets.exceptions import DatasetsError

from .errors import InputError

logger = logging.getLogger(__name__)

Judgments = dict[str, dict[str, int]]


@dataclass(frozen=True)
class RetrievalDataset:
    """A corpus with the judged queries of one split.

    Attributes:
        name: Last part of the folder or repository name, used in tables.
        split: Name of the split, e.g. ``"test"``.
        corpus: Document id -> text (title, one space, text; stripped), in file order; or -> page image.
        queries: Query id -> text, only the queries that the split judges.
        qrels: Query id -> {document id: integer relevance}.
        given: Query id -> what a table holds for training beside its document: ``negative_1`` ..., ``scores``.
        vectors: ``document``, and perhaps ``query`` -> ``(texts or images, width)`` in their order, of a data set that
            brings what some encoder gave; images that are there as vectors alone are None in the corpus.
    """

    name: str
    split: str
    corpus: Mapping[str, Any]
    queries: dict[str, str]
    qrels: Judgments
    given: dict[str, dict[str, Any]] = field(default_factory=dict)
    vectors: Mapping[str, np.ndarray] = field(default_factory=dict)

    def pairs(self) -> Dataset:
        """One row ``{"query", "positive"}`` for each positive judgment in the order of the qrels."""
        relevant = [(q, d) for q, judged in self.qrels.items() for d, score in judged.items() if score > 0]
        columns = {"query": [self.queries[q] for q, _ in relevant], "positive": [self.corpus[d] for _, d in relevant]}
        for name in next(iter(self.given.values()), {}):
            columns[name if name.startswith("negative_") else "label"] = [self._given(q, name) for q, _ in relevant]
        return Dataset.from_dict(columns)

    def _given(self, query: str, name: str) -> Any:
        """A negative of a query, or a teacher's scores of its document and of its negatives."""
        value, length = self.given[query][name], len(self.given[query])
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


def dataset_name(source: str | Path) -> str:
    """What tables and caches call a data set: the last part of its folder or of its id."""
    return Path(source).name or Path(source).resolve().name


def load_retrieval_dataset(
    path_or_id: str | Path,
    split: str = "test",
    *,
    revision: str | None = None,
    keep_empty: bool = False,
    restval: str = "train",
) -> RetrievalDataset:
    """Read one split of a retrieval data set.

    A data set with a train split but no dev split still has a dev split here: the tenth of the train queries whose
    hashed id says so, which ``split="train"`` then leaves out. Choosing settings on test is thus never necessary.

    Args:
        path_or_id: A folder in BEIR layout, or a data set id on the Hub such as ``"mteb/scifact"``.
        split: Split of the qrels, e.g. ``"train"``, ``"dev"``, ``"test"``.
        revision: Commit, tag or branch of a Hub data set.
        keep_empty: Accept documents and queries without text instead of refusing the data set.
        restval: For images with captions, see :func:`polyrep.captions.load_captions`.

    Raises:
        InputError: A file, line or field is missing or malformed; an id is duplicated or unknown; a text is empty.
    """
    source = str(path_or_id)
    folder = Path(path_or_id)
    from . import captions  # which needs RetrievalDataset

    if captions.is_captions(folder):
        return captions.load_captions(folder, split, restval=restval)
    if (table := _open_pairs(source, revision)) is not None:
        return _from_pairs(source, table, split)
    if any((folder / f"corpus.jsonl{suffix}").is_file() for suffix in ("", ".gz")):
        corpus_rows = _read_jsonl(folder, "corpus")
        query_rows = _read_jsonl(folder, "queries")
        splits = {file.stem for file in (folder / "qrels").glob("*.tsv")}

        def read_qrels(name: str) -> Iterator[tuple[str, Any, Any, Any]]:
            return _read_tsv(folder / "qrels" / f"{name}.tsv")

    elif folder.is_dir() and not (folder / "README.md").is_file():
        raise InputError(
            f"{folder}: the folder has neither corpus.jsonl nor corpus.jsonl.gz, so it is no BEIR data set. "
            f"Expected corpus.jsonl, queries.jsonl and qrels/{split}.tsv."
        )
    else:
        if not folder.is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
            raise InputError(f"{source}: no such folder, and not of the form ORG/NAME of a Hub data set either.")
        corpus_rows, query_rows, splits, read_qrels = _open_hub(source, revision)

    wanted = split
    if split in ("train", "dev") and "train" in splits and "dev" not in splits:
        wanted = "train"
        logger.info("%s has no dev split: dev is a fixed tenth of its train queries.", source)
    if wanted not in splits:
        raise InputError(f"{source}: no judgments for split {split!r}; it has {sorted(splits) or 'none'}.")

    corpus = _index(corpus_rows, f"{source} corpus", keep_empty, _text_of_document)
    all_queries = _index(query_rows, f"{source} queries", keep_empty, lambda r: r["text"])
    qrels = _check_qrels(read_qrels(wanted), corpus, all_queries)
    if wanted != split or (split == "train" and "dev" not in splits):
        qrels = {q: judged for q, judged in qrels.items() if _in_dev_tenth(q) == (split == "dev")}
    if not qrels:
        raise InputError(f"{source}: split {split!r} judges no query, so there is nothing to train on or to measure.")
    queries = {q: text for q, text in all_queries.items() if q in qrels}
    return RetrievalDataset(dataset_name(folder), split, corpus, queries, {q: qrels[q] for q in queries})


def load_corpus(path_or_id: str | Path, *, revision: str | None = None, keep_empty: bool = False) -> RetrievalDataset:
    """Read the documents alone: queries and judgments need not be there, and are left out if they are.

    Args:
        path_or_id: As for :func:`load_retrieval_dataset`.
        revision: Likewise.
        keep_empty: Likewise.

    Raises:
        InputError: The corpus is missing or malformed.
    """
    source, folder = str(path_or_id), Path(path_or_id)
    if (table := _open_pairs(source, revision, queries=False)) is not None:
        corpus: Mapping[str, Any] = _from_pairs(source, table, None).corpus
    else:
        if any(folder.glob("corpus.jsonl*")) or folder.is_dir() and not (folder / "README.md").is_file():
            rows = _read_jsonl(folder, "corpus")
        else:
            try:
                rows = _hub_rows(_load(source, "corpus", revision), f"{source} corpus")
            except (OSError, ValueError, DatasetsError) as error:
                raise InputError(
                    f"{source}: neither a folder with corpus.jsonl nor a readable Hub data set "
                    f"({type(error).__name__}: {error}). Check the path, the id and the network."
                ) from error
        corpus = _index(rows, f"{source} corpus", keep_empty, _text_of_document)
    return RetrievalDataset(dataset_name(folder), "corpus", corpus, {}, {})


def inverse_cloze(dataset: RetrievalDataset, sentences: int = 3, seed: int = 0) -> RetrievalDataset:
    """A data set whose queries are sentences of the documents, each removed from its own (Lee et al., 2019).

    It lets a head be fitted to any corpus without queries. No more than a third of a document's sentences are taken,
    of two sentences one, and none of fewer than four words; a document that has too few is only there to be told
    apart from.

    Args:
        dataset: The corpus.
        sentences: Most sentences of one document.
        seed: Which ones.

    Raises:
        InputError: The documents are images, or no document has sentences enough.
    """
    if sentences < 1:
        raise InputError(f"--cloze_sentences {sentences}: at least 1, else there is no query.")
    corpus: dict[str, str] = {}
    queries: dict[str, str] = {}
    qrels: Judgments = {}
    for identifier, text in dataset.corpus.items():
        if not isinstance(text, str):
            raise InputError(
                f"{dataset.name}: {identifier!r} is an image, which has no sentences. Use judged queries."
            )
        parts = [part for part in re.split(r"(?<=[.!?:])\s+|\n+", text) if part.strip()]
        long_enough = [i for i, part in enumerate(parts) if len(part.split()) >= 4]
        count = min(sentences, len(long_enough), max(1, len(parts) // 3) if len(parts) > 1 else 0)
        taken = set(random.Random(f"{seed} {identifier}").sample(long_enough, count))
        corpus[identifier] = " ".join(part for i, part in enumerate(parts) if i not in taken)
        for i in sorted(taken):
            queries[f"{identifier}#{i}"] = parts[i].strip()
            qrels[f"{identifier}#{i}"] = {identifier: 1}
    if not queries:
        raise InputError(
            f"{dataset.name}: no document has two sentences, one of four words or more, so none can be taken for a "
            "query. Use judged queries."
        )
    asked = len({next(iter(judged)) for judged in qrels.values()})
    logger.info("%s: %s sentences of %s of %s documents.", dataset.name, len(queries), asked, len(corpus))
    return replace(dataset, name=f"{dataset.name}-cloze", split="cloze", corpus=corpus, queries=queries, qrels=qrels)


def texts_as_queries(dataset: RetrievalDataset, most: int = 2048) -> RetrievalDataset:
    """A data set whose queries are documents as they are, for what a head can learn of the query encoder alone.

    Args:
        dataset: The corpus.
        most: Of a larger corpus, so many documents, by their hashed ids.

    Raises:
        InputError: The documents are images.
    """
    if most < 1:
        raise InputError(f"--query_texts {most}: at least 1, else there is no query.")
    ids = list(dataset.corpus)
    if len(ids) > most:
        kept = set(sorted(ids, key=lambda i: hashlib.md5(i.encode(), usedforsecurity=False).hexdigest())[:most])
        ids = [identifier for identifier in ids if identifier in kept]
    queries = {identifier: dataset.corpus[identifier] for identifier in ids}
    if not isinstance(queries[ids[0]], str):
        raise InputError(
            f"{dataset.name}: its documents are images, which no query encoder reads. Use judged queries."
        )
    qrels = {identifier: {identifier: 1} for identifier in ids}
    return replace(dataset, split="texts", queries=queries, qrels=qrels)


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


def _open_pairs(source: str, revision: str | None, queries: bool = True) -> DatasetDict | None:
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


def _from_pairs(source: str, table: DatasetDict, split: str | None) -> RetrievalDataset:
    """Documents of all splits, and the queries of one, if any; without a dev split, a tenth of train as elsewhere."""
    wanted = "train" if split == "dev" and "dev" not in table and "train" in table else split
    if wanted is not None and wanted not in table:
        raise InputError(f"{source}: no split {split!r}; it has {sorted(table)}.")
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
        qrels = {q: judged for q, judged in qrels.items() if _in_dev_tenth(q) == (split == "dev")}
    if wanted and not qrels:
        raise InputError(f"{source}: split {split!r} has no pair, so there is nothing to train on or to measure.")
    corpus: Mapping[str, Any] = texts if pages is None else pages
    kept = {q: given[q] for q in qrels} if extra else {}
    return RetrievalDataset(Path(source).name, split or "corpus", corpus, {q: queries[q] for q in qrels}, qrels, kept)


def _in_dev_tenth(query_id: str) -> bool:
    return int(hashlib.md5(query_id.encode(), usedforsecurity=False).hexdigest(), 16) % 10 == 0


def _read_jsonl(folder: Path, stem: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) for each line of ``stem.jsonl`` or ``stem.jsonl.gz``; a place is ``file:line``."""
    path = next((p for p in (folder / f"{stem}.jsonl", folder / f"{stem}.jsonl.gz") if p.is_file()), None)
    if path is None:
        raise InputError(f"{folder}: {stem}.jsonl (or {stem}.jsonl.gz) is missing; a BEIR data set needs it.")
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.rstrip())
                except json.JSONDecodeError as error:
                    raise InputError(
                        f"{path}:{number}: not a JSON object ({error.msg} at column {error.colno}). "
                        'Expected one object per line, such as {"_id": "d1", "title": "...", "text": "..."}.'
                    ) from None
                yield f"{path}:{number}", row
        except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
            raise InputError(f"{path}: damaged or truncated ({error}). Fetch the file again.") from None


def _read_tsv(path: Path) -> Iterator[tuple[str, Any, Any, Any]]:
    """Yield (place, query id, document id, score) for each judgment; the first line is a header."""
    with path.open(encoding="utf-8", errors="replace") as lines:  # a replaced id is unknown and thus refused
        for number, line in enumerate(lines, start=1):
            fields = line.rstrip("\r\n").split("\t")
            if line.strip() and len(fields) != 3:
                raise InputError(
                    f"{path}:{number}: {len(fields)} tab-separated fields, expected 3: query id, document id, score."
                )
            if number == 1 and fields[-1].strip().lstrip("+-").replace(".", "", 1).isdigit():
                raise InputError(
                    f"{path}:1: the first line is a judgment, but a header is expected there, so it would be lost. "
                    "Put the line `query-id<TAB>corpus-id<TAB>score` above it."
                )
            if number > 1 and line.strip():
                yield f"{path}:{number}", fields[0], fields[1], fields[2]


def _open_hub(source: str, revision: str | None) -> tuple[Iterator, Iterator, set[str], Any]:
    """The same four parts as a folder gives, read through ``datasets`` (Arrow files, no remote code)."""
    try:
        corpus, queries = (_load(source, name, revision) for name in ("corpus", "queries"))
        try:
            judgments = load_dataset(source, "default", revision=revision)
        except ValueError:  # this arrangement keeps its judgments in a repository of their own
            judgments = load_dataset(f"{source}-qrels")
    except (OSError, ValueError, DatasetsError) as error:
        raise InputError(
            f"{source}: neither a BEIR folder nor a readable Hub data set ({type(error).__name__}: {error}). "
            "Check the path, the id and the network; a Hub data set needs configurations corpus, queries and default."
        ) from error

    def read_qrels(split: str) -> Iterator[tuple[str, Any, Any, Any]]:
        for number, row in enumerate(judgments[split], start=1):
            place = f"{source} {split} row {number}"
            if missing := {"query-id", "corpus-id", "score"} - row.keys():
                raise InputError(f"{place}: no {sorted(missing)}; expected query-id, corpus-id and score.")
            yield place, str(row["query-id"]), str(row["corpus-id"]), row["score"]  # ids read from TSV are numbers

    corpus_rows, query_rows = _hub_rows(corpus, f"{source} corpus"), _hub_rows(queries, f"{source} queries")
    return corpus_rows, query_rows, set(judgments), read_qrels


def _load(source: str, name: str, revision: str | None) -> Dataset:
    """One configuration of a Hub data set, whatever its only split is called."""
    return next(iter(load_dataset(source, name, revision=revision).values()))


def _hub_rows(part: Dataset, subject: str) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((f"{subject} row {number}", row) for number, row in enumerate(part, start=1))


def _text_of_document(row: dict[str, Any]) -> str:
    return f"{row.get('title') or ''} {row['text']}"


def _index(rows: Iterable[tuple[str, Any]], subject: str, keep_empty: bool, text_of: Any) -> dict[str, str]:
    """Map id -> stripped text, refusing what would silently change a measurement."""
    texts: dict[str, str] = {}
    for place, row in rows:
        for part in ("_id", "text"):
            if not isinstance(row, dict) or not isinstance(row.get(part), str):
                found = f"{part}={row[part]!r}" if isinstance(row, dict) and part in row else f"no {part!r}"
                raise InputError(f'{place}: {found}; expected a JSON object with strings "_id" and "text".')
        identifier, text = row["_id"], text_of(row).strip()
        if identifier in texts:
            raise InputError(f"{place}: id {identifier!r} occurs twice, so judgments of it are ambiguous. Rename one.")
        if not text and not keep_empty:
            raise InputError(
                f"{place}: {identifier!r} has an empty text, which encodes to an arbitrary vector. "
                "Remove it, or accept empty texts with --keep_empty."
            )
        texts[identifier] = text
    if not texts:
        raise InputError(f"{subject}: empty; at least one line is needed.")
    return texts


def _check_qrels(
    rows: Iterable[tuple[str, Any, Any, Any]], corpus: dict[str, str], queries: dict[str, str]
) -> Judgments:
    qrels: Judgments = {}
    for place, query, document, score in rows:
        for identifier, known, kind in ((query, queries, "query"), (document, corpus, "document")):
            if identifier not in known:
                raise InputError(
                    f"{place}: judges {kind} {identifier!r}, which is not in the data set, so its metric would be "
                    f"wrong. Add the {kind} or remove the line."
                )
        try:
            relevance = int(score)
            if not isinstance(score, str) and relevance != score:  # the Hub has numbers, and int(0.5) is 0
                raise ValueError
        except (ValueError, TypeError, OverflowError):
            raise InputError(f"{place}: score {score!r} is not an integer.") from None
        if qrels.setdefault(query, {}).setdefault(document, relevance) != relevance:
            raise InputError(f"{place}: judges ({query!r}, {document!r}) twice with different scores. Keep one.")
    return qrels
