"""Documents to encode, read as a stream: JSON lines, Parquet, a folder of images, or a data set of the Hub.

A source is cut into spans of so many records, always at the same places, so that a span is the same documents whoever
reads it and whenever. Passing over a span costs little: lines are not parsed, row groups not read, images not opened.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet
from datasets import Image, load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from .errors import InputError

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
ID_FIELDS = ("_id", "id", "docid", "doc_id")
ROW_NUMBER = "row_number"
"""In place of a field, the number of the record, from 0."""


class Fields(NamedTuple):
    """Where a record has what; an empty ``id`` is the first there is of :data:`ID_FIELDS`."""

    id: str = ""
    text: str = "text"
    title: str = "title"
    image: str = ""


class Document(NamedTuple):
    """What is to be encoded: a text, or an image as file or bytes, which :func:`picture` opens."""

    id: str
    content: str | bytes | Path


@dataclass(frozen=True)
class Span:
    """Consecutive records of a source.

    Attributes:
        number: Which span, from 0.
        records: How many it has.
        read: Gives its documents, and what of it cannot be used, as ``{"place": ..., "error": ...}``.
        digest: Gives a hash of the records as they are, or an empty string where that would mean reading them.
    """

    number: int
    records: int
    read: Callable[[], tuple[list[Document], list[dict[str, str]]]]
    digest: Callable[[], str] = str


@dataclass(frozen=True)
class Source:
    """A stream of documents.

    Attributes:
        identity: What tells it from another input, as far as that can be known without reading it.
        images: Whether its documents are images.
        spans: Gives its spans in order, for a number of records each.
        total: Records, or an estimate, for a progress bar; None where nobody knows.
    """

    identity: dict[str, Any]
    images: bool
    spans: Callable[[int], Iterator[Span]]
    total: int | None = None


def open_source(
    location: str, fields: Fields, *, split: str = "train", config: str = "", revision: str | None = None
) -> Source:
    """Open an input by what it is.

    Args:
        location: A ``.jsonl`` (``.gz``) or ``.parquet`` file; a folder of such files, of which ``corpus.jsonl`` alone
            counts where there is one; a folder of images; or ``ORG/NAME`` on the Hub.
        fields: Where records have what.
        split: Of a data set on the Hub.
        config: Likewise.
        revision: Likewise.

    Raises:
        InputError: It is none of these, or cannot be opened.
    """
    path = Path(location)
    if path.is_file():
        return _of_files([path], fields)
    if path.is_dir():
        for names in (["corpus.jsonl", "corpus.jsonl.gz"], ["**/*.jsonl", "**/*.jsonl.gz"], ["**/*.parquet"]):
            if files := sorted(file for name in names for file in path.glob(name)):
                return _of_files(files, fields)
        return _of_images(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", location):
        return _of_hub(location, fields, split, config, revision)
    raise InputError(
        f"{location}: no such file or folder, nor ORG/NAME of the Hub. Give a .jsonl or .parquet file, a folder of "
        "such files or of images, or a data set."
    )


def picture(content: bytes | Path) -> Any:
    """Decode an image as RGB.

    Raises:
        ValueError: It cannot be decoded.
    """
    from PIL import Image as Pillow

    try:
        with Pillow.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Pillow.DecompressionBombError) as error:  # PIL raises all of them
        raise ValueError(f"not a readable image ({type(error).__name__})") from None


def _of_files(files: list[Path], fields: Fields) -> Source:
    kinds = {file.name.removesuffix(".gz").rpartition(".")[2] for file in files}
    if kinds == {"parquet"}:
        return _of_parquet(files, fields)
    if kinds != {"jsonl"}:
        raise InputError(f"{files[0]}: ends neither in .jsonl, .jsonl.gz nor .parquet, so how to read it is unknown.")
    if fields.image:
        raise InputError(f"--image_field {fields.image}: JSON lines hold texts. Put images in a folder or in Parquet.")
    names = [{"name": file.name, "bytes": file.stat().st_size} for file in files]
    return Source({"files": names}, False, partial(_line_spans, files, fields), _estimated_lines(files))


def _line_spans(files: list[Path], fields: Fields, size: int) -> Iterator[Span]:
    def lines() -> Iterator[tuple[Path, int, bytes]]:
        for file in files:
            with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as opened:
                try:
                    yield from ((file, n, line) for n, line in enumerate(opened, 1) if line.strip())
                except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                    raise InputError(
                        f"{file}: damaged or truncated ({error}), so documents would be missing. Fetch it again."
                    ) from None

    stream = lines()
    for number in itertools.count():
        if not (part := list(itertools.islice(stream, size))):
            return

        def digest(part: list[tuple[Path, int, bytes]] = part) -> str:
            return hashlib.sha256(b"".join(line.rstrip() + b"\n" for *_, line in part)).hexdigest()

        rows = ((f"{file}:{n}", line) for file, n, line in part)
        yield Span(number, len(part), partial(_documents, rows, fields, number * size), digest)


def _estimated_lines(files: list[Path]) -> int | None:
    """Lines by the length of the first; None for compressed files."""
    if any(file.suffix == ".gz" for file in files):
        return None
    with files[0].open("rb") as opened:
        first = [len(line) for line in itertools.islice(opened, 1000)]
    return sum(file.stat().st_size for file in files) * len(first) // max(1, sum(first))


def _of_parquet(files: list[Path], fields: Fields) -> Source:
    try:
        opened = [pyarrow.parquet.ParquetFile(file) for file in files]
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these
        raise InputError(f"{files[0].parent}: a Parquet file cannot be read ({error}). Fetch it again.") from None
    groups = []  # of all files: file, row group, rows
    identity = []
    for path, file in zip(files, opened, strict=True):
        metadata = file.metadata
        rows = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        sizes = [metadata.row_group(g).total_byte_size for g in range(metadata.num_row_groups)]
        groups += [(path, file, g, n) for g, n in enumerate(rows)]
        identity.append({"name": path.name, "bytes": path.stat().st_size, "rows": rows, "row_group_bytes": sizes})
    total = sum(n for *_, n in groups)
    return Source({"files": identity}, bool(fields.image), partial(_parquet_spans, groups, fields), total)


def _parquet_spans(groups: list[tuple[Path, Any, int, int]], fields: Fields, size: int) -> Iterator[Span]:
    bounds = list(itertools.accumulate((n for *_, n in groups), initial=0))
    kept: dict[int, list[dict[str, Any]]] = {}  # the row group that was read last, since spans cut groups

    def rows(start: int, stop: int) -> Iterator[tuple[str, Any]]:
        for i, (path, file, group, _) in enumerate(groups):
            first, last = max(start, bounds[i]), min(stop, bounds[i + 1])
            if first >= last:
                continue
            if i not in kept:
                kept.clear()
                there = file.schema_arrow.names
                kept[i] = file.read_row_group(group, [n for n in there if n in (*fields, *ID_FIELDS)]).to_pylist()
            for row in range(first - bounds[i], last - bounds[i]):
                yield f"{path} row {row}", kept[i][row]

    for number, start in enumerate(range(0, bounds[-1], size)):
        stop = min(start + size, bounds[-1])
        yield Span(number, stop - start, lambda a=start, b=stop: _documents(rows(a, b), fields, a))  # type: ignore[misc]


def _of_images(folder: Path) -> Source:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGES and file.is_file())
    if not files:
        raise InputError(
            f"{folder}: no .jsonl, .parquet or image ({', '.join(IMAGES)}) in it, so there is nothing to encode."
        )
    names = [file.relative_to(folder).as_posix() for file in files]
    pairs = list(zip(names, files, strict=True))
    listing = "".join(f"{name}:{file.stat().st_size}\n" for name, file in pairs)

    def spans(size: int) -> Iterator[Span]:
        for number, start in enumerate(range(0, len(files), size)):
            part = [Document(*pair) for pair in pairs[start : start + size]]
            yield Span(number, len(part), lambda part=part: (part, []))  # type: ignore[misc]

    identity = {"images": len(files), "sha256_of_names_and_sizes": hashlib.sha256(listing.encode()).hexdigest()}
    return Source(identity, True, spans, len(files))


def _of_hub(location: str, fields: Fields, split: str, config: str, revision: str | None) -> Source:
    try:
        revision = HfApi().dataset_info(location, revision=revision).sha  # a branch may move before the next run
        stream = load_dataset(location, config or None, split=split, revision=revision, streaming=True)
        if fields.image:
            stream = stream.cast_column(fields.image, Image(decode=False))
    except (OSError, ValueError, KeyError, DatasetsError, HfHubHTTPError) as error:
        raise InputError(
            f"{location}: not to be had from the Hub ({type(error).__name__}: {error}). Check the path, ORG/NAME, "
            "--split, --config and the network."
        ) from None

    def spans(size: int) -> Iterator[Span]:
        rows = (row for row in stream)
        for number in itertools.count():
            if not (part := list(itertools.islice(rows, size))):
                return
            places = ((f"{location} {split} row {number * size + i}", row) for i, row in enumerate(part))
            yield Span(number, len(part), partial(_documents, places, fields, number * size))

    known = stream.info.splits
    total = known[split].num_examples if known and split in known else None
    identity = {"dataset": location, "config": config, "split": split, "revision": revision}
    return Source(identity, bool(fields.image), spans, total)


def _documents(
    rows: Iterable[tuple[str, Any]], fields: Fields, first: int
) -> tuple[list[Document], list[dict[str, str]]]:
    """Documents of records, and the records that are none."""
    found, errors = [], []
    for number, (place, row) in enumerate(rows, first):
        try:
            found.append(_document(row, fields, number))
        except ValueError as error:
            errors.append({"place": place, "error": str(error)})
    return found, errors


def _document(row: Any, fields: Fields, number: int) -> Document:
    if isinstance(row, bytes):
        try:
            row = json.loads(row)
        except ValueError as error:
            raise ValueError(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"not an object but {type(row).__name__}")
    field = fields.id or next((name for name in ID_FIELDS if name in row), "")
    identifier = number if field == ROW_NUMBER else row.get(field)
    if isinstance(identifier, bool) or not isinstance(identifier, str | int) or identifier == "":
        raise ValueError(
            f"no id in {field or ', '.join(ID_FIELDS)}: name its field with --id_field, or number the records with "
            f"--id_field {ROW_NUMBER}"
        )
    if fields.image:
        image = row.get(fields.image)
        content = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(content, bytes):
            raise ValueError(f"no bytes of an image in {fields.image}")
        return Document(str(identifier), content)
    text, title = row.get(fields.text), row.get(fields.title) or ""
    if not isinstance(text, str) or not isinstance(title, str):
        raise ValueError(f"no text in {fields.text}: name its field with --text_field")
    whole = f"{title} {text}".strip()
    if not whole:
        raise ValueError("an empty text, which encodes to an arbitrary vector")
    return Document(str(identifier), whole)
