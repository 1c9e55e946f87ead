"""Folders and Hub repositories in the layout of BEIR: read line by line, and refused with file and line."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError

from ..errors import InputError, first_line
from .dataset import Judgments
from .records import decoded, identifier_in, lines_of, parsed, shown, text_in

MOST_RELEVANCE = 2**31 - 1
"""Of a judgment: what trec_eval counts with."""


def read_jsonl(folder: Path, stem: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) for each line of ``stem.jsonl`` or ``stem.jsonl.gz``; a place is ``file:line``."""
    path = next((p for p in (folder / f"{stem}.jsonl", folder / f"{stem}.jsonl.gz") if p.is_file()), None)
    if path is None:
        raise InputError(f"{folder}: {stem}.jsonl (or {stem}.jsonl.gz) is missing; a BEIR data set needs it.")
    for number, line in lines_of(path):
        try:
            row = parsed(line)
        except ValueError as error:
            raise InputError(
                f"{path}:{number}: {error}. "
                'Expected one object per line, such as {"_id": "d1", "title": "...", "text": "..."}.'
            ) from None
        yield f"{path}:{number}", row


def read_tsv(path: Path) -> Iterator[tuple[str, Any, Any, Any]]:
    """Yield (place, query id, document id, score) for each judgment; the first line is a header."""
    for number, line in lines_of(path):
        try:
            fields = decoded(line).split("\t")
        except ValueError as error:
            raise InputError(f"{path}:{number}: {error}.") from None
        if len(fields) != 3:
            raise InputError(
                f"{path}:{number}: {len(fields)} tab-separated fields, expected 3: query id, document id, score."
            )
        if number > 1:
            yield f"{path}:{number}", fields[0], fields[1], fields[2]
        elif fields[-1].strip().lstrip("+-").replace(".", "", 1).isdigit():
            raise InputError(
                f"{path}:1: the first line is a judgment, but a header is expected there, so it would be lost. "
                "Put the line `query-id<TAB>corpus-id<TAB>score` above it."
            )


def open_beir(source: str, split: str, revision: str | None) -> tuple[Iterator, Iterator, set[str], Any]:
    """Rows of corpus and queries, names of splits, and what reads the judgments of one: of a folder, or of the Hub.

    Raises:
        InputError: There is no such folder, or it is no data set; ``split`` is what the message names as expected.
    """
    folder = Path(source)
    if any((folder / f"corpus.jsonl{suffix}").is_file() for suffix in ("", ".gz")):
        qrels = folder / "qrels"
        splits = {file.stem for file in qrels.glob("*.tsv")}
        corpus, queries = (read_jsonl(folder, name) for name in ("corpus", "queries"))
        return corpus, queries, splits, lambda name: read_tsv(qrels / f"{name}.tsv")
    if folder.is_dir() and not (folder / "README.md").is_file():
        raise InputError(
            f"{folder}: the folder has neither corpus.jsonl nor corpus.jsonl.gz, so it is no BEIR data set. "
            f"Expected corpus.jsonl, queries.jsonl and qrels/{split}.tsv."
        )
    return open_hub(source, revision)


def open_hub(source: str, revision: str | None) -> tuple[Iterator, Iterator, set[str], Any]:
    """The same four parts as a folder gives, read through ``datasets`` (Arrow files, no remote code)."""
    try:
        corpus, queries = (load_part(source, name, revision) for name in ("corpus", "queries"))
        for name in ("default", "qrels"):
            with suppress(ValueError):
                judgments = load_dataset(source, name, revision=revision)
                break
        else:  # this arrangement keeps its judgments in a repository of their own
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

    corpus_rows, query_rows = hub_rows(corpus, f"{source} corpus"), hub_rows(queries, f"{source} queries")
    return corpus_rows, query_rows, set(judgments), read_qrels


def load_part(source: str, name: str, revision: str | None) -> Dataset:
    """One configuration of a Hub data set, whatever its only split is called."""
    return next(iter(load_dataset(source, name, revision=revision).values()))


def hub_rows(part: Dataset, subject: str, first: int = 1) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) for each row of a table, counted from ``first``.

    Raises:
        InputError: A row cannot be read.
    """
    rows = iter(part)
    for number in itertools.count(first):
        try:
            row = next(rows, None)
        except (OSError, ValueError, pyarrow.ArrowException) as error:  # a string of Arrow may be no UTF-8
            raise InputError(f"{subject}: cannot be read from row {number} on ({first_line(error)}).") from None
        if row is None:
            return
        yield f"{subject} row {number}", row


def texts_by_id(
    rows: Iterable[tuple[str, Any]], subject: str, keep_empty: bool, *, titles: bool = False
) -> dict[str, str]:
    """Map id -> stripped text, refusing what would silently change a measurement.

    Args:
        rows: Place and record.
        subject: What an empty file is called by.
        keep_empty: Accept empty texts.
        titles: Whether a title stands before the text, as in a corpus.
    """
    texts: dict[str, str] = {}
    for place, row in rows:
        try:
            identifier, text = identifier_in(row), text_in(row, title="title" if titles else None)
        except ValueError as error:
            raise InputError(
                f'{place}: {error}; expected a JSON object with strings "_id" and "text"'
                + (', and perhaps "title".' if titles else ".")
            ) from None
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


def check_qrels(
    rows: Iterable[tuple[str, Any, Any, Any]], corpus: dict[str, str], queries: dict[str, str]
) -> Judgments:
    """Judgments by query, each checked against the corpus, the queries and the other judgments."""
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
            raise InputError(f"{place}: score {shown(score)} is not an integer.") from None
        if abs(relevance) > MOST_RELEVANCE:
            raise InputError(f"{place}: score {shown(score)} is no grade of relevance; expected 0, 1 or a few more.")
        if qrels.setdefault(query, {}).setdefault(document, relevance) != relevance:
            raise InputError(f"{place}: judges ({query!r}, {document!r}) twice with different scores. Keep one.")
    return qrels
