"""Folders and Hub repositories in the layout of BEIR: read line by line, and refused with file and line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError

from ..errors import InputError
from .dataset import Judgments


def read_jsonl(folder: Path, stem: str) -> Iterator[tuple[str, dict[str, Any]]]:
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


def read_tsv(path: Path) -> Iterator[tuple[str, Any, Any, Any]]:
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


def hub_rows(part: Dataset, subject: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) for each row of a table of the Hub."""
    return ((f"{subject} row {number}", row) for number, row in enumerate(part, start=1))


def text_of_document(row: dict[str, Any]) -> str:
    """Title, a space and text, as MTEB joins them."""
    return f"{row.get('title') or ''} {row['text']}"


def texts_by_id(rows: Iterable[tuple[str, Any]], subject: str, keep_empty: bool, text_of: Any) -> dict[str, str]:
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
            raise InputError(f"{place}: score {score!r} is not an integer.") from None
        if qrels.setdefault(query, {}).setdefault(document, relevance) != relevance:
            raise InputError(f"{place}: judges ({query!r}, {document!r}) twice with different scores. Keep one.")
    return qrels
