"""A small world of texts that we invented: 300 documents in English, 40 in German, 40 in Chinese, and their queries.

``velmora.txt`` and ``orrest.txt`` are English. In each file a document is a line ``# title``, its text on one line,
and the queries that it answers, each after ``?``. A query that stands with two documents is answered by both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
ENGLISH = ("velmora", "orrest")


class Page(NamedTuple):
    """A document and the queries that it answers."""

    id: str
    title: str
    text: str
    queries: tuple[str, ...]


@cache
def pages(*names: str) -> tuple[Page, ...]:
    """The documents of some files, e.g. ``pages("velmora", "german")``."""
    found = []
    for name in names:
        for number, block in enumerate((HERE / f"{name}.txt").read_text(encoding="utf-8").strip().split("\n\n")):
            title, text, *queries = block.split("\n")
            assert title.startswith("# ") and queries and all(query.startswith("? ") for query in queries), block
            found.append(Page(f"{name}-{number:03}", title[2:], text, tuple(query[2:] for query in queries)))
    return tuple(found)


def write_world(folder: Path, *names: str, sizes: Mapping[str, int] | None = None) -> Path:
    """Some files as a data set in BEIR layout: of five documents, train asks for three.

    Args:
        folder: A new one; its name is the data set's.
        names: Files; the English ones if none is named.
        sizes: Split -> queries to keep; their documents alone are the corpus. All of all if None.
    """
    judged: dict[str, dict[str, list[str]]] = {"train": {}, "dev": {}, "test": {}}
    split_of: dict[str, str] = {}
    for number, page in enumerate(pages(*(names or ENGLISH))):
        for query in page.queries:
            split = split_of.setdefault(query, ("test", "dev", "train", "train", "train")[number % 5])
            judged[split].setdefault(query, []).append(page.id)
    if sizes is not None:
        judged = {split: dict(list(judged[split].items())[:size]) for split, size in sizes.items()}
    wanted = {document for asked in judged.values() for found in asked.values() for document in found}
    kept = [page for page in pages(*(names or ENGLISH)) if sizes is None or page.id in wanted]
    ids = {query: f"q{number}" for number, query in enumerate(q for asked in judged.values() for q in asked)}
    (folder / "qrels").mkdir(parents=True)
    _write(folder / "corpus.jsonl", [{"_id": page.id, "title": page.title, "text": page.text} for page in kept])
    _write(folder / "queries.jsonl", [{"_id": identifier, "text": query} for query, identifier in ids.items()])
    for split, asked in judged.items():
        rows = [f"{ids[query]}\t{document}\t1\n" for query, found in asked.items() for document in found]
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows))
    return folder


def _write(file: Path, rows: Sequence[Mapping[str, str]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
