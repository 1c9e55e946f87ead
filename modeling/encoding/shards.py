"""Encoded corpora: folders of shards from which any index can be built, and built again.

::

    DIR/manifest.json                 what the vectors are, and which model made them of what; written first
    DIR/shards/00000042.safetensors   ids and vectors of 4,096 documents, in the order of the input
    DIR/shards/00000042.json          its documents, bytes, SHA-256, and what of the input could not be read
    DIR/errors.jsonl                  all of the latter
    DIR/complete.json                 how many shards there are; written once all of them are there

A shard counts only once its ``.json`` is there, which is written last, so whatever stops the work leaves whole shards
and nothing else. A shard holds ``ids`` (UTF-8, one after another) with ``id_offsets``, and by kind::

    sentence   values (documents, dim)                        one vector per document
    tokens     values (vectors of all documents, dim), offsets
    sparse     values (active terms of all documents), indices, offsets
    routed     values (entries of all documents, dim), indices, offsets[, sentences (documents, width)]

Where documents are cut into windows, ``sentence`` and ``sparse`` have a row for each window, and ``windows`` bounds
those of each document.

Numbers are ``float32``; ``float16``; ``int8``, with a ``scales`` number for each vector, by which its largest becomes
127, so that no calibration is needed; or ``binary``, one bit a number, its sign, eight in a byte. ``sentences`` beside
``int8`` are ``float16``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ..errors import InputError
from ..files import file_sha256, read_json, staged_file, write_json
from .arrays import check_bounds
from .embeddings import SIDE_BY_SIDE, Embeddings, Kind
from .nested import Groups, checked_groups

FORMAT = "polyrep-encoded-1"
_AGAIN = "Encode the corpus again."
_RECORD = "Delete it and run `polyrep encode` again."
PRECISIONS = ("float16", "float32", "int8", "binary")
KINDS = ("sentence", "tokens", "sparse", "routed")
_SIZES = range(2**48)


@dataclass(frozen=True)
class Origin:
    """What vectors are and where they come from, by which an index tells its own from strangers.

    Attributes:
        name: What an index calls them beside others of the same documents.
        kind: ``sentence``, ``tokens``, ``sparse`` or ``routed``.
        dim: Width of a vector; of sparse ones the size of the vocabulary.
        similarity: How the model scores: ``dot``, ``cosine``, ``maxsim``, ``meanmaxsim``, ``routed``, ...
        fingerprint: :func:`polyrep.hub.fingerprint` of the model.
        precision: Of the numbers, one of :data:`PRECISIONS`.
        window: Tokens of the windows that documents are cut into; 0 for none.
        stride: Tokens from the start of one window to the start of the next; 0 without windows.
        nested: Query vectors and document vectors of the prefixes that can be searched, see
            :mod:`polyrep.encoding.nested`; empty where there are none.
        vocabulary: Keys that ``routed`` entries can have; else 0.
        sentence_dim: Width of the vectors of whole texts beside ``routed`` entries; 0 where there are none.
    """

    name: str
    kind: Kind
    dim: int
    similarity: str
    fingerprint: str
    precision: str = "float16"
    window: int = 0
    stride: int = 0
    nested: Groups = ()
    vocabulary: int = 0
    sentence_dim: int = 0

    @property
    def by_window(self) -> bool:
        """Whether a document may have several rows: vectors of all windows are side by side where it has several."""
        return self.window > 0 and self.kind not in SIDE_BY_SIDE

    def described(self) -> dict[str, Any]:
        """The fields, as a manifest has them; those of windows, groups and keys only where there are any."""
        without = {"window": self.window, "stride": self.window, "nested": self.nested}
        without |= {"vocabulary": self.vocabulary, "sentence_dim": self.sentence_dim}
        return {name: value for name, value in asdict(self).items() if without.get(name, True)}


def origin_of(content: Any, where: Path) -> Origin:
    """The origin that a manifest describes.

    Args:
        content: What the manifest says, from a file.
        where: The file, for the message.

    Raises:
        InputError: A field is missing, unknown, of another type or out of range.
    """
    try:
        origin = Origin(**content)
        texts = (origin.name, origin.kind, origin.similarity, origin.fingerprint, origin.precision)
        numbers = (origin.dim, origin.window, origin.stride, origin.vocabulary, origin.sentence_dim)
        if not all(isinstance(text, str) for text in texts) or {*map(type, numbers)} != {int}:
            raise ValueError("a field of another type")
        if origin.kind not in KINDS or origin.precision not in PRECISIONS or not 0 < origin.dim < 2**31:
            raise ValueError(f"kind {origin.kind!r:.40}, precision {origin.precision!r:.40}, width {origin.dim}")
        if not 0 <= origin.stride <= origin.window < 2**31 or bool(origin.stride) != bool(origin.window):
            raise ValueError(f"window {origin.window}, stride {origin.stride}")
        routed = origin.kind == "routed"
        if not routed <= origin.vocabulary < 2**31 or not 0 <= origin.sentence_dim < 2**31:
            raise ValueError(f"vocabulary {origin.vocabulary}, vectors of whole texts of {origin.sentence_dim}")
        if not routed and (origin.vocabulary or origin.sentence_dim):
            raise ValueError(f"a vocabulary of keys or vectors of whole texts beside {origin.kind} vectors")
        if "nested" in content:
            origin = replace(origin, nested=checked_groups(origin.nested, "nested"))
            if origin.kind != "tokens" or origin.window:
                raise ValueError(f"nested groups of {origin.kind} vectors, windows of {origin.window} tokens")
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{where}: says of its vectors what nothing can be made of ({error}), so the numbers have no meaning. "
            "Encode the documents again."
        ) from None
    return origin


@dataclass(frozen=True)
class Shard:
    """Some documents of an encoded corpus.

    Attributes:
        ids: Their ids, in the order of the vectors; one may occur twice, and then its last vector counts.
        vectors: Their vectors in float16 or float32, whatever the file holds them in; of a document that is cut into
            windows, those of each window.
        origin: What the vectors are.
        checksum: SHA-256 of the file, by which an index knows a shard that it has already; empty without a file.
    """

    ids: Sequence[str]
    vectors: Embeddings
    origin: Origin
    checksum: str = ""


class StoredShard(Shard):
    """A shard in a file, which is compared with its checksum and read once its content is asked for.

    An index that knows the checksum already never asks.
    """

    def __init__(self, path: Path, origin: Origin, checksum: str):
        self.__dict__ |= {"path": path, "origin": origin, "checksum": checksum}  # frozen

    @property
    def ids(self) -> Sequence[str]:
        """See :class:`Shard`."""
        return self._content[0]

    @property
    def vectors(self) -> Embeddings:
        """See :class:`Shard`."""
        return self._content[1]

    @cached_property
    def _content(self) -> tuple[Sequence[str], Embeddings]:
        path: Path = self.__dict__["path"]
        found = file_sha256(path) if path.is_file() else "missing"
        if found != self.checksum:
            raise InputError(
                f"{path}: its SHA-256 is {found}, expected {self.checksum}, so these are not the vectors that were "
                f"written. Delete {path.with_suffix('.json').name} beside it and run `polyrep encode` again."
            )
        return _read_content(path, self.origin)


class EncodedCorpus:
    """An encoded corpus on disk, to be read shard by shard: ``for shard in EncodedCorpus(folder): ...``.

    Args:
        folder: What ``polyrep encode`` wrote.

    Raises:
        InputError: There is no manifest, or it is of another format, or shards are missing.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        if not path.is_file():
            raise InputError(f"{path}: missing, so this is no encoded corpus. Make one with `polyrep encode`.")
        self.manifest: dict[str, Any] = read_json(path, remedy=_AGAIN)
        found = self.manifest.get("format")
        if found != FORMAT:
            raise InputError(
                f"{path}: its format is {found!r:.80}, not {FORMAT}, so the shards mean something "
                "else. Encode the corpus again."
            )
        self.origin = origin_of(self.manifest.get("vectors"), path)
        shards = read_json(self.folder / "complete.json", remedy=_AGAIN).get("shards")
        if shards != len(self.records):
            wanted = str(shards or "more")
            raise InputError(
                f"{self.folder}: {len(self.records)} shards are done of {wanted:.80}, so an index would lack "
                "documents. Run the command in manifest.json again, which goes on where it stopped."
            )

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """What is known of each finished shard, in order: ``number, documents, bytes, sha256, ...``."""
        return [read_record(path) for path in sorted((self.folder / "shards").glob("*.json"))]

    def __len__(self) -> int:
        """Documents."""
        return sum(record["documents"] for record in self.records)

    def __iter__(self) -> Iterator[Shard]:
        """Every shard; the file of each is compared with its checksum before it is read."""
        return (StoredShard(shard_path(self.folder, r["number"]), self.origin, r["sha256"]) for r in self.records)


def read_record(path: Path, **further: type) -> dict[str, Any]:
    """What is known of a shard.

    Args:
        path: The record.
        further: Type of fields that are needed beside those of every record.

    Raises:
        InputError: It is of another shard, or lacks a field.
    """
    record = read_json(path, remedy=_RECORD)
    kinds = {"number": int, "documents": int, "bytes": int, "sha256": str} | further
    whole = all(type(record.get(name)) is kind for name, kind in kinds.items())
    if not (whole and f"{record['number']:08d}" == path.stem and record["documents"] in _SIZES):
        raise InputError(f"{path}: no record of that shard. {_RECORD}")
    return record


def shard_path(folder: Path, number: int) -> Path:
    """File of a shard; its record has the same name and ends in ``.json``."""
    return folder / "shards" / f"{number:08d}.safetensors"


def write_shard(
    folder: Path, number: int, ids: Sequence[str], vectors: Embeddings, precision: str, **record: Any
) -> dict[str, Any]:
    """Write a shard, then its record, each whole or not at all.

    Args:
        folder: Of the corpus.
        number: Of the shard.
        ids: ``(documents,)``.
        vectors: As many.
        precision: How to write the numbers.
        record: What else the record says.

    Returns:
        The record.
    """
    arrays = packed_ids(ids) | narrowed_arrays(vectors, precision)
    path = shard_path(folder, number)
    with staged_file(path) as partial:
        save_file(arrays, partial)
        checksum = file_sha256(partial)
        size = partial.stat().st_size
    record = {"number": number, "documents": len(ids), "bytes": size, "sha256": checksum} | record
    write_json(path.with_suffix(".json"), record)
    return record


def _read_content(path: Path, origin: Origin) -> tuple[list[str], Embeddings]:
    """Ids and vectors of a shard's file, with numbers widened to float16 or float32."""
    try:
        arrays = load_file(path)
        ids = unpacked_ids(arrays)
        values = widened(arrays, origin)
        bounds, terms = arrays.get("offsets"), arrays.get("indices")
        windows, sentences = arrays.get("windows"), arrays.get("sentences")
        vectors = Embeddings(origin.kind, values, bounds, terms, origin.dim, 0.0, Path(), windows, sentences)
        check_bounds(vectors, len(ids), origin.vocabulary, origin.sentence_dim)
        if origin.by_window != (vectors.windows is not None):
            raise ValueError(f"windows of {origin.window} tokens by its manifest, and otherwise by its arrays")
        if not np.isfinite(values).all() or (sentences is not None and not np.isfinite(sentences).all()):
            raise ValueError("a number that is not finite")
    except (SafetensorError, OSError, KeyError, ValueError, IndexError, TypeError) as error:
        raise InputError(
            f"{path}: not a shard of {origin.kind} vectors of width {origin.dim} ({error}). Encode it again."
        ) from None
    return ids, vectors


def packed_ids(ids: Sequence[str]) -> dict[str, np.ndarray]:
    """Ids as arrays, which a safetensors file can hold."""
    encoded = [identifier.encode() for identifier in ids]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return {"ids": np.frombuffer(b"".join(encoded), np.uint8), "id_offsets": offsets}


def unpacked_ids(arrays: dict[str, np.ndarray]) -> list[str]:
    """The ids in what :func:`packed_ids` gave."""
    blob, bounds = arrays["ids"].tobytes(), arrays["id_offsets"].tolist()
    return [blob[start:stop].decode() for start, stop in zip(bounds, bounds[1:], strict=False)]


def narrowed_arrays(vectors: Embeddings, precision: str) -> dict[str, np.ndarray]:
    """What is written of vectors in a precision."""
    arrays: dict[str, np.ndarray] = {}
    values = np.ascontiguousarray(vectors.values)
    if precision == "binary":
        arrays["values"] = np.packbits(values > 0, axis=-1)
    elif precision == "int8":
        scales = np.abs(values).max(-1, initial=0).astype(np.float32) / 127  # (vectors,)
        arrays["values"] = np.rint(values / np.where(scales == 0, 1, scales)[:, None]).astype(np.int8)
        arrays["scales"] = scales
    else:
        arrays["values"] = values.astype(precision)
    if vectors.offsets is not None:
        arrays["offsets"] = np.ascontiguousarray(vectors.offsets, np.int64)
    if vectors.indices is not None:
        arrays["indices"] = np.ascontiguousarray(vectors.indices, np.int32)
    if vectors.windows is not None:
        arrays["windows"] = np.ascontiguousarray(vectors.windows, np.int64)
    if vectors.sentences is not None:
        arrays["sentences"] = np.ascontiguousarray(
            vectors.sentences, "float32" if precision == "float32" else "float16"
        )
    return arrays


def widened(arrays: dict[str, np.ndarray], origin: Origin) -> np.ndarray:
    """Numbers of a shard as floating point; those of one bit as vectors of unit length."""
    values = arrays["values"]
    if origin.precision == "binary":
        bits = np.unpackbits(values, axis=-1, count=origin.dim)
        return ((2.0 * bits - 1) / np.sqrt(origin.dim)).astype(np.float32)
    if origin.precision == "int8":
        return values * arrays["scales"][:, None]
    return values


def manifest_of(origin: Origin, **more: Any) -> dict[str, Any]:
    """Content of ``manifest.json``."""
    return json.loads(json.dumps({"format": FORMAT, "vectors": origin.described()} | more))
