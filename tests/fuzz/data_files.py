"""Data files damaged in every way that strangers send them: BEIR folders, tables of pairs, captions, images, streams.

A valid little data set is written, one thing of it is damaged, and one of the readers opens it. What opens must hold
texts alone; what is refused must say where.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from polyrep.data import RetrievalDataset, load_corpus, load_retrieval_dataset, records
from polyrep.data import stream as streams

from . import Outcome, judge

LONGEST = 8192
"""Bytes of a line that are allowed here: a small bomb is one too."""

DEEP = "[" * 4000

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 7, 1.5, float("nan"), float("inf"), 10**400, 2**63, [], ["x"], {}, {"a": {"b": []}}),
    *(
        "",
        " ",
        "\u200b",
        "\ufeff\u2060",
        "\ufeffx",
        "\ud83d",
        "x\udc00",
        "a\x00b",
        "a\tb",
        "\n",
        "\u2028",
        "é",
        "\U0001f431",
    ),
    *("d1", "q1", "x" * (2 * LONGEST), "../up", "/etc/hostname", "y" * 300, "nan", "1e3", "\u0661"),
]

LINES = [
    *(b"", b"\n\n", b"\x00", b"\xff\xfe", b"\xe9t\xe9", b"\xef\xbb\xbf", b"{", b"[]", b"null", b"1", b'"x"', b"NaN"),
    *(DEEP.encode(), b'{"_id": "d9", "text": ' + DEEP.encode(), b"x" * (2 * LONGEST), b" " * (2 * LONGEST)),
    *(
        b"9" * 5000,
        b'{"_id": "d9", "text": "\\ud800"}',
        b'{"_id": "d1", "text": "twice"}',
        b"q1\td1\t1",
        b"q1\td1\t-1",
    ),
    *(b"q1\td1\t" + b"9" * 30, b"q1\td1\t1.0", b"q1\td1", b"\t\t", b"q1\tnowhere\t1", b"\r"),
]

GARBAGE = [
    b"",
    b"\x00" * 64,
    b"PAR1",
    b"PAR1" + b"\x00" * 64 + b"PAR1",
    b"\x1f\x8b\x08" + b"\x00" * 20,
    b"no file at all",
]


def run(count: int, seed: int, folder: Path) -> list[Outcome]:
    """Damage a data set in ``count`` ways and open each by one of the readers.

    Args:
        count: How many cases.
        seed: Of the draws; the name of a case tells them all.
        folder: An empty one, left empty.
    """
    outcomes = []
    with (
        mock.patch.object(records, "MOST_BYTES", LONGEST),
        mock.patch.object(datasets.config, "HF_DATASETS_CACHE", folder / "cache"),
    ):
        shown = datasets.is_progress_bar_enabled()
        datasets.disable_progress_bars()
        for number in range(count):
            draw = random.Random(f"{seed} {number}")
            place = folder / str(number)
            place.mkdir(parents=True)
            write, readers = draw.choices(KINDS, WEIGHTS)[0]
            what = write(draw, place)
            reader = draw.choice(readers)
            found = judge(f"{seed} {number}: {reader.__name__} of {what}", lambda r=reader, p=place: r(p))  # type: ignore[misc]
            if found.verdict == "refused" and str(place) not in found.detail:
                found = found._replace(verdict="fault", detail=f"says no place: {found.detail}")
            outcomes.append(found)
            shutil.rmtree(place)
        shutil.rmtree(folder / "cache", ignore_errors=True)
        if shown:
            datasets.enable_progress_bars()
    return outcomes


# Readers, each with what must hold of all that it opens.


def measured(place: Path) -> None:
    """The test split, as ``evaluate`` reads it."""
    dataset = load_retrieval_dataset(place)
    _check_corpus(dataset)
    assert dataset.queries and dataset.queries.keys() == dataset.qrels.keys()
    for query, judged in dataset.qrels.items():
        _check_text(query)
        _check_text(dataset.queries[query])
        assert judged and all(document in set(dataset.corpus) for document in judged)
        assert all(type(grade) is int and abs(grade) < 2**31 for grade in judged.values())


def corpus(place: Path) -> None:
    """The documents alone."""
    _check_corpus(load_corpus(place))


def streamed(place: Path) -> None:
    """What ``encode`` reads, span by span."""
    source = streams.open_source(str(place), streams.Fields())
    for span in source.spans(3):
        found, errors = span.read()
        assert len(found) + len(errors) == span.records > 0
        for document in found:
            _check_text(document.id)
            if isinstance(document.content, str):
                _check_text(document.content)
            else:
                try:
                    assert streams.picture(document.content).mode == "RGB"
                except ValueError as error:
                    assert str(error)
        for error in errors:
            assert error["place"] and error["error"]
            json.dumps(error, ensure_ascii=False).encode()


def _check_corpus(dataset: RetrievalDataset) -> None:
    assert len(dataset.corpus) > 0
    for identifier in dataset.corpus:
        _check_text(identifier)
    if isinstance(dataset.corpus, dict) and not dataset.vectors:
        for text in dataset.corpus.values():
            _check_text(text)
    for vectors in dataset.vectors.values():
        assert np.isfinite(np.asarray(vectors, np.float32)).all() and vectors.ndim == 2


def _check_text(text: Any) -> None:
    assert isinstance(text, str) and records.visible(text), ascii(text)
    text.encode()


# Kinds of data sets: each writes one with something wrong, and says what.


def beir(draw: random.Random, place: Path) -> str:
    """A folder in BEIR layout, plain or zipped."""
    documents = [{"_id": f"d{i}", "title": "a title", "text": f"text number {i}"} for i in range(4)]
    queries = [{"_id": f"q{i}", "text": f"query {i}"} for i in range(3)]
    judged = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(3))]
    said = []
    zipped = draw.random() < 0.3
    damaged = draw.choice(["corpus", "corpus", "queries", "qrels"])
    texts: dict[str, list[bytes]] = {"qrels": [line.encode() for line in judged]}
    for stem, rows in (("corpus", documents), ("queries", queries)):
        if stem == damaged and draw.random() < 0.5:
            said.append(_damage_row(draw, rows))
        texts[stem] = [
            json.dumps(row, ensure_ascii=draw.random() < 0.5).encode(errors="surrogatepass") for row in rows
        ]
    if not said and draw.random() < 0.5:
        said.append(_damage_lines(draw, texts[damaged]))
    (place / "qrels").mkdir()
    ending = draw.choice([b"\n", b"\r\n"])
    for stem, lines in texts.items():
        name = "qrels/test.tsv" if stem == "qrels" else f"{stem}.jsonl" + ".gz" * zipped
        content = (b"\xef\xbb\xbf" * (draw.random() < 0.1)) + ending.join(lines) + ending
        (place / name).write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
        if stem == damaged and not said:
            said.append(f"{name}, {_damage_file(draw, place / name)}")
    return f"BEIR, {damaged}, {'; '.join(said)}"


def table(draw: random.Random, place: Path) -> str:
    """Pairs in Parquet."""
    queries: list[Any] = ["one", "two", "one"]
    texts: list[Any] = ["a text", "another", "a third"]
    column = draw.choice([queries, texts])
    said = "whole"
    if draw.random() < 0.6:
        value = draw.choice(VALUES)
        same = isinstance(value, str | None) and draw.random() < 0.8
        column[:] = [column[0], value, column[2]] if same else [value] * 3
        said = ascii(value)[:40]
    arrays = {"query": _array(queries), "document": _array(texts)}
    if draw.random() < 0.1:
        arrays[draw.choice(["query", "document"])] = pyarrow.array([b"\xff", b"x", b"\xe9"]).cast(
            pyarrow.string(), safe=False
        )
        said += ", Latin-1"
    file = place / "test.parquet"
    pyarrow.parquet.write_table(pyarrow.table(arrays), file)
    if said == "whole":
        said = _damage_file(draw, file)
    return f"pairs, {said}"


def captions(draw: random.Random, place: Path) -> str:
    """Images with captions in either layout, as files or as vectors."""
    rows: list[dict[str, Any]] = [
        {"image": f"{i}.png", "split": "test", "captions": ["a caption", "another"]} for i in range(3)
    ]
    images: list[dict[str, Any]] = [
        {
            "imgid": i,
            "filename": f"{i}.png",
            "split": "test",
            "sentences": [{"sentid": 2 * i + j, "raw": "a caption"} for j in range(2)],
        }
        for i in range(3)
    ]
    karpathy, said = draw.random() < 0.5, ""
    if draw.random() < 0.6:
        row = images[1] if karpathy else rows[1]
        said = _damage_row(draw, [row["sentences"][1] if karpathy and draw.random() < 0.4 else row])
    lines = [json.dumps(row).encode() for row in rows]
    if not said and not karpathy and draw.random() < 0.5:
        said = _damage_lines(draw, lines)
    file = place / ("dataset.json" if karpathy else "captions.jsonl")
    file.write_bytes(json.dumps({"images": images}).encode() if karpathy else b"\n".join(lines))
    if draw.random() < 0.5:
        (place / "images").mkdir()
        for i in range(3):
            (place / "images" / f"{i}.png").write_bytes(PICTURE)
        target = place / "images" / "1.png"
    else:
        target = place / "images.npy"
        np.save(target, np.ones((3, 2), draw.choice([np.float32, np.float16])))
    if not said:
        target = draw.choice([file, target])
        said = f"{target.name}, {_damage_file(draw, target)}"
    return f"captions, {said}"


def pictures(draw: random.Random, place: Path) -> str:
    """A folder of images."""
    for i in range(3):
        (place / f"{i}.png").write_bytes(PICTURE)
    odd = place / os.fsdecode(
        draw.choice([b"\xff.png", b"a\nb.png", b"x" * 250 + b".png", "é.PNG".encode(), b"-.jpg"])
    )
    odd.write_bytes(PICTURE)
    return f"images, {ascii(odd.name)[:20]}, {_damage_file(draw, draw.choice([place / '1.png', odd]))}"


def lines(draw: random.Random, place: Path) -> str:
    """JSON lines under any name, several files."""
    rows = [{"id": i, "title": None, "text": f"text number {i}"} for i in range(5)]
    said = _damage_row(draw, rows) if draw.random() < 0.5 else ""
    texts = [json.dumps(row).encode() for row in rows]
    said = said or _damage_lines(draw, texts)
    (place / "a.jsonl").write_bytes(b"\n".join(texts))
    (place / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join(texts), 1))
    if draw.random() < 0.3:
        said += f"; {_damage_file(draw, draw.choice([place / 'a.jsonl', place / 'b.jsonl.gz']))}"
    return f"lines, {said}"


def _array(values: list[Any]) -> Any:
    """A column, of strings where Parquet cannot hold the values."""
    try:
        if {} not in values:
            return pyarrow.array(values)
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError):
        pass
    return pyarrow.array([str(value).encode(errors="replace").decode() for value in values])


# Damage, each said in words.


def _damage_row(draw: random.Random, rows: list[dict[str, Any]]) -> str:
    row = draw.choice(rows)
    field = draw.choice(list(row))
    match draw.randrange(5):
        case 0:
            del row[field]
            return f"no {field}"
        case 1:
            rows.append(dict(row))
            return "a row twice"
        case 2:
            row[f"{field}s"] = row.pop(field)
            return f"{field}s for {field}"
        case _:
            row[field] = draw.choice(VALUES)
            return f"{field}={ascii(row[field])[:40]}"


def _damage_lines(draw: random.Random, texts: list[bytes]) -> str:
    place, line = draw.randrange(len(texts) + 1), draw.choice(LINES)
    if draw.random() < 0.7:
        texts.insert(place, line)
    else:
        place = min(place, len(texts) - 1)
        texts[place] = line if draw.random() < 0.5 else texts[place][: draw.randrange(len(texts[place]) + 1)]
    return f"line {place + 1} is {line[:30]!r} of {len(line)}, or cut"


def _damage_file(draw: random.Random, file: Path) -> str:
    """Damage of a file's bytes, or of what lies in its place."""
    content = bytearray(file.read_bytes())
    ways: dict[str, Callable[[], Any]] = {
        "flipped bits": lambda: [
            content.__setitem__(i, content[i] ^ (1 << draw.randrange(8)))
            for i in (draw.randrange(len(content)) for _ in range(draw.choice([1, 1, 3, 20])))
        ],
        "cut": lambda: content.__delitem__(slice(draw.randrange(len(content)), None)),
        "a part lost": lambda: content.__delitem__(slice(*sorted(draw.choices(range(len(content)), k=2)))),
        "bytes put in": lambda: content.__setitem__(
            slice(draw.randrange(len(content)), 0), draw.randbytes(draw.choice([1, 4, 100]))
        ),
        "twice": lambda: content.extend(content),
        "garbage": lambda: content.__setitem__(slice(None), draw.choice(GARBAGE)),
        "zipped": lambda: content.__setitem__(slice(None), gzip.compress(bytes(content))),
    }
    if draw.random() < 0.7:
        way = draw.choice(list(ways))
        ways[way]()
        file.write_bytes(content)
        return way
    file.unlink()
    match draw.randrange(6):
        case 0:
            file.mkdir()
            return "a folder"
        case 1:
            file.mkdir()
            (file / "inside.txt").write_bytes(content)
            return "a folder with a file"
        case 2:
            file.symlink_to(file.with_name("nowhere"))
            return "a broken link"
        case 3:
            file.symlink_to(file)
            return "a link to itself"
        case 4:
            os.mkfifo(file)
            return "a pipe"
    return "missing"


def _picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (10, 200, 30)).save(buffer, "png")
    return buffer.getvalue()


PICTURE = _picture()

Reader = Callable[[Path], None]
KINDS: list[tuple[Callable[[random.Random, Path], str], tuple[Reader, ...]]] = [
    (beir, (measured, measured, corpus, streamed)),
    (lines, (streamed,)),
    (captions, (measured,)),
    (pictures, (streamed,)),
    (table, (streamed,)),
    (table, (measured, corpus)),
]
WEIGHTS = [50, 15, 15, 10, 8, 2]
"""A table that is read as pairs goes through ``datasets``, which takes a tenth of a second."""
