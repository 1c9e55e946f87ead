"""Retrieval data sets in BEIR layout, from a folder or from the Hugging Face Hub.

A data set is a corpus, the queries of one split and their judgments (qrels). Everything is checked while it is read,
because a silently skipped line moves nDCG by an amount that nobody can explain later.

Folder layout, each ``.jsonl`` optionally gzipped (``.jsonl.gz``)::

    corpus.jsonl      {"_id": "d1", "title": "optional", "text": "..."}
    queries.jsonl     {"_id": "q1", "text": "..."}
    qrels/test.tsv    header line, then: query id <TAB> document id <TAB> integer score

On the Hub both common arrangements are read: configurations ``corpus``, ``queries`` and ``default`` in one repository,
or ``corpus`` and ``queries`` with the judgments in ``<repository>-qrels``.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
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
        corpus: Document id -> text (title, one space, text; stripped), in file order.
        queries: Query id -> text, only the queries that the split judges.
        qrels: Query id -> {document id: integer relevance}.
    """

    name: str
    split: str
    corpus: dict[str, str]
    queries: dict[str, str]
    qrels: Judgments

    def pairs(self) -> Dataset:
        """One row ``{"query", "positive"}`` for every positive judgment, in the order of the qrels."""
        relevant = [(q, d) for q, judged in self.qrels.items() for d, score in judged.items() if score > 0]
        return Dataset.from_dict(
            {"query": [self.queries[q] for q, _ in relevant], "positive": [self.corpus[d] for _, d in relevant]}
        )


def load_retrieval_dataset(
    path_or_id: str | Path, split: str = "test", *, revision: str | None = None, keep_empty: bool = False
) -> RetrievalDataset:
    """Read one split of a retrieval data set.

    A data set with a train split but no dev split still has a dev split here: the tenth of the train queries whose
    hashed id says so, which ``split="train"`` then leaves out. Choosing settings on test is thus never necessary.

    Args:
        path_or_id: A folder in BEIR layout, or a data set id on the Hub such as ``"mteb/scifact"``.
        split: Split of the qrels, e.g. ``"train"``, ``"dev"``, ``"test"``.
        revision: Commit, tag or branch of a Hub data set.
        keep_empty: Accept documents and queries without text instead of refusing the data set.

    Raises:
        InputError: A file, line or field is missing or malformed; an id is duplicated or unknown; a text is empty.
    """
    source = str(path_or_id)
    folder = Path(path_or_id)
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

    corpus = _index(corpus_rows, f"{source} corpus", keep_empty, lambda r: f"{r.get('title') or ''} {r['text']}")
    all_queries = _index(query_rows, f"{source} queries", keep_empty, lambda r: r["text"])
    qrels = _check_qrels(read_qrels(wanted), corpus, all_queries)
    if wanted != split or (split == "train" and "dev" not in splits):
        qrels = {q: judged for q, judged in qrels.items() if _in_dev_tenth(q) == (split == "dev")}
    if not qrels:
        raise InputError(f"{source}: split {split!r} judges no query, so there is nothing to train on or to measure.")
    queries = {q: text for q, text in all_queries.items() if q in qrels}
    return RetrievalDataset(
        folder.name or folder.resolve().name, split, corpus, queries, {q: qrels[q] for q in queries}
    )


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
        corpus, queries = (
            next(iter(load_dataset(source, name, revision=revision).values())) for name in ("corpus", "queries")
        )
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

    def rows(part: Dataset, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        return ((f"{source} {name} row {number}", row) for number, row in enumerate(part, start=1))

    return rows(corpus, "corpus"), rows(queries, "queries"), set(judgments), read_qrels


def _index(rows: Iterable[tuple[str, Any]], subject: str, keep_empty: bool, text_of: Any) -> dict[str, str]:
    """Map id -> stripped text, refusing what would silently change a measurement."""
    texts: dict[str, str] = {}
    for place, row in rows:
        for field in ("_id", "text"):
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                found = f"{field}={row[field]!r}" if isinstance(row, dict) and field in row else f"no {field!r}"
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
