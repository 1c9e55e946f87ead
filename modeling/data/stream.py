"""Documents to encode, read as a stream: JSON lines, Parquet, a folder of images, or a data set of the Hub.

A source is cut into spans of so many records, always at the same places, so that a span is the same documents whoever
reads it and whenever. Passing over a span costs little: lines are not parsed, row groups not read, images not opened.
"""

from __future__ import annotations

import hashlib
import io
import itertools
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

from ..errors import InputError
from .named import located
from .records import ID_FIELDS, identifier_in, lines_of, parsed, refuse_no_file, refuse_surrogates, text_in

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
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


READ_PARTS, READ_BYTES = 64, 2**16
"""Parts of JSON lines in all, and bytes of each, by which their number is estimated."""


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
            counts where there is one; a folder of images; a name of ``polyrep data list``; or ``ORG/NAME`` on the Hub.
        fields: Where records have what.
        split: Of a data set on the Hub.
        config: Likewise.
        revision: Likewise.

    Raises:
        InputError: It is none of these, or cannot be opened.
    """
    location = located(location)
    path = Path(location)
    if path.is_file():
        return _of_files([path], fields)
    if path.is_dir():
        if files := [file for name in ("corpus.jsonl", "corpus.jsonl.gz") if (file := path / name).is_file()]:
            return _of_files(files[:1], fields)
        kinds = {"JSON lines": (".jsonl", ".jsonl.gz"), "Parquet": (".parquet",), "images": IMAGES}
        found = {kind: _files_below(path, endings) for kind, endings in kinds.items()}
        found = {kind: files for kind, files in found.items() if files}
        if len(found) > 1:
            counts = ", ".join(f"{len(files):,} of {kind}" for kind, files in found.items())
            raise InputError(f"{path}: has files of several kinds ({counts}). Put those to be encoded into a folder.")
        for kind, files in found.items():
            return _of_images(path, files) if kind == "images" else _of_files(files, fields)
        raise InputError(f"{path}: no .jsonl, .parquet or image ({', '.join(IMAGES)}) in it: nothing to encode.")
    return _of_hub(location, fields, split, config, revision)


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


def _files_below(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    found = sorted(file for file in folder.rglob("*") if file.name.lower().endswith(endings))
    # A folder of parts may be called like one file, as Spark does.
    found = [file for file in found if not (file.is_dir() and any(file.iterdir()))]
    for file in found:
        refuse_no_file(file)
    return found


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
            yield from ((file, number, line) for number, line in lines_of(file))

    stream = lines()
    for number in itertools.count():
        if not (part := list(itertools.islice(stream, size))):
            return

        def digest(part: list[tuple[Path, int, bytes]] = part) -> str:
            return hashlib.sha256(b"".join(line.rstrip() + b"\n" for *_, line in part)).hexdigest()

        rows = ((f"{file}:{n}", line) for file, n, line in part)
        yield Span(number, len(part), partial(_documents, rows, fields, number * size), digest)


def _estimated_lines(files: list[Path]) -> int | None:
    """Lines by those in parts that are spread over the files, whose ends may be unlike; None for compressed files."""
    if any(file.suffix == ".gz" for file in files):
        return None
    parts, total = max(1, READ_PARTS // len(files)), 0
    for file in files:
        size, lines, read = file.stat().st_size, 0, 0
        step = max(READ_BYTES, size // parts)  # a small file is read whole
        with file.open("rb") as opened:
            for start in range(0, size, step):
                opened.seek(start)
                content = opened.read(READ_BYTES)
                lines, read = lines + content.count(b"\n"), read + len(content)
        total += round(lines * size / max(1, read))
    return total


def _of_parquet(files: list[Path], fields: Fields) -> Source:
    groups, identity = [], []  # of all files: file, row group, rows
    for path in files:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                parts = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
                rows, sizes = [part.num_rows for part in parts], [part.total_byte_size for part in parts]
        except (OSError, ValueError) as error:  # pyarrow's own errors are of these
            raise InputError(f"{path}: cannot be read as Parquet ({error}). Fetch it again.") from None
        groups += [(path, number, count) for number, count in enumerate(rows)]
        identity.append({"name": path.name, "bytes": path.stat().st_size, "rows": rows, "row_group_bytes": sizes})
    total = sum(count for *_, count in groups)
    return Source({"files": identity}, bool(fields.image), partial(_parquet_spans, groups, fields), total)


def _parquet_spans(groups: list[tuple[Path, int, int]], fields: Fields, size: int) -> Iterator[Span]:
    bounds = list(itertools.accumulate((count for *_, count in groups), initial=0))
    reader = _RowGroups(groups, (*fields, *ID_FIELDS), size)

    def rows(start: int, stop: int) -> Iterator[tuple[str, Any]]:
        for i, (path, *_) in enumerate(groups):
            first, last = max(start, bounds[i]) - bounds[i], min(stop, bounds[i + 1]) - bounds[i]
            if first < last:
                found = enumerate(reader.rows(i, first, last), first)
                yield from ((f"{path} row group {groups[i][1]} row {row}", content) for row, content in found)

    for number, start in enumerate(range(0, bounds[-1], size)):
        stop = min(start + size, bounds[-1])
        yield Span(number, stop - start, partial(_documents, rows(start, stop), fields, start))


class _RowGroups:
    """Row groups of Parquet files, each read from its start onwards: they may be larger than memory."""

    def __init__(self, groups: list[tuple[Path, int, int]], columns: tuple[str, ...], size: int):
        self.groups, self.columns, self.size = groups, columns, size
        self.group, self.row = -1, 0
        self.batches: Iterator[Any] = iter(())
        self.rest: Any = None  # of the batch that was cut

    def rows(self, group: int, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Some rows of a row group, as dictionaries."""
        if group != self.group or start < self.row:
            path, number, _ = self.groups[group]
            file = pyarrow.parquet.ParquetFile(path)
            there = [name for name in file.schema_arrow.names if name in self.columns]
            self.group, self.row, self.rest = group, 0, None
            self.batches = file.iter_batches(self.size, row_groups=[number], columns=there)
        while self.row < stop:
            batch = next(self.batches) if self.rest is None else self.rest
            first = min(max(start - self.row, 0), len(batch))
            last = min(stop - self.row, len(batch))
            yield from batch.slice(first, last - first).to_pylist()
            self.rest = batch.slice(last) if last < len(batch) else None
            self.row += last


def _of_images(folder: Path, files: list[Path]) -> Source:
    names, listing = [file.relative_to(folder).as_posix() for file in files], hashlib.sha256()
    for name, file in zip(names, files, strict=True):
        listing.update(f"{name}:{file.stat().st_size}\n".encode(errors="surrogateescape"))

    def spans(size: int) -> Iterator[Span]:
        for number, start in enumerate(range(0, len(names), size)):
            part = names[start : start + size]
            rows = ((name, Document(name, folder / name)) for name in part)
            yield Span(number, len(part), partial(_documents, rows, Fields(), start))

    identity = {"images": len(names), "sha256_of_names_and_sizes": listing.hexdigest()}
    return Source(identity, True, spans, len(names))


def _of_hub(location: str, fields: Fields, split: str, config: str, revision: str | None) -> Source:
    try:
        revision = HfApi().dataset_info(location, revision=revision).sha  # a branch may move before the next run
        stream = load_dataset(location, config or None, split=split, revision=revision, streaming=True)
        if stream.column_names:  # what is not needed is not decoded either
            stream = stream.select_columns([n for n in stream.column_names if n in (*fields, *ID_FIELDS)])
        if fields.image:
            stream = stream.cast_column(fields.image, Image(decode=False))
    except (OSError, ValueError, KeyError, DatasetsError, HfHubHTTPError) as error:
        raise InputError(
            f"{location}: not to be had from the Hub ({type(error).__name__}: {error}). Check the path, ORG/NAME, "
            "--split, --config and the network."
        ) from None

    def spans(size: int) -> Iterator[Span]:
        rows = iter(stream)
        for number in itertools.count():
            try:
                part = list(itertools.islice(rows, size))
            except (OSError, ValueError, DatasetsError, HfHubHTTPError) as error:
                raise InputError(
                    f"{location}: broke off after {number * size:,} records ({type(error).__name__}: {error}). What "
                    "is encoded stays: run the command again."
                ) from None
            if not part:
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
            # The name of a file may be no text.
            errors.append({"place": place.encode(errors="backslashreplace").decode(), "error": str(error)})
    return found, errors


def _document(row: Any, fields: Fields, number: int) -> Document:
    if isinstance(row, Document):
        refuse_surrogates(row.id, "the name")
        return row
    if isinstance(row, bytes):
        row = parsed(row)
    if not isinstance(row, dict):
        raise ValueError(f"not an object but {type(row).__name__}")
    try:
        identifier = str(number) if fields.id == ROW_NUMBER else identifier_in(row, fields.id)
    except ValueError as error:
        raise ValueError(
            f"no id ({error}): name its field with --id_field, or number the records with --id_field {ROW_NUMBER}"
        ) from None
    if fields.image:
        image = row.get(fields.image)
        content = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(content, bytes):
            raise ValueError(f"no bytes of an image in {fields.image}")
        return Document(identifier, content)
    try:
        whole = text_in(row, fields.text, fields.title)
    except ValueError as error:
        raise ValueError(f"no text ({error}): name its field with --text_field") from None
    if not whole:
        raise ValueError("an empty text, which encodes to an arbitrary vector")
    return Document(identifier, whole)
