"""Images with captions as a retrieval data set: every caption is a query, its image the only relevant document.

A folder holds the captions in one of two layouts, and of the images the files or vectors of an encoder.

Captions::

    dataset_meta.json   Karpathy's layout (any name that starts with ``dataset``): {"images": [{"imgid": 0,
                        "filename": "a.jpg", "split": "train", "sentences": [{"sentid": 0, "raw": "..."}, ...]}, ...]}
    captions.jsonl      {"image": "a.jpg", "split": "train", "captions": ["...", ...]}, one line an image

Images, one of::

    images/             the files, under the name (and ``filepath``) that the captions give
    img_embs.parquet    columns ``id``, ``emb`` (or ``embedding``); text_embs.parquet beside it, of captions, by sentid
    *.npy               (images, width), in the order of the captions file
    *.safetensors       a tensor ``images`` (images, width), and perhaps ``captions`` (captions, width), in that order

The parquet layout is that of the public ``lsr42/*-dense`` data sets. Splits are train, val (also asked for as dev) and
test; Karpathy's COCO has a fourth, restval, which belongs to train unless the caller leaves it out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from safetensors import SafetensorError, safe_open
from transformers.image_utils import load_image

from ..errors import InputError, first_line
from .dataset import RetrievalDataset, dataset_name
from .records import identifier_in, lines_of, parsed, refuse_no_file, refuse_surrogates, shown, text_in, visible


@dataclass(frozen=True)
class _Row:
    """An image of the captions file: its place there, id, file, split, and its captions by id."""

    place: int
    identifier: str
    file: str
    split: str
    captions: dict[str, str]


def is_captions(folder: Path) -> bool:
    """Whether a folder is a data set of this kind."""
    return folder.is_dir() and _captions_file(folder) is not None


def load_captions(folder: Path, split: str, *, restval: str = "train") -> RetrievalDataset:
    """Read one split; its corpus are the split's own images, as this task is measured.

    Args:
        folder: The data set.
        split: train, dev (or val) or test.
        restval: ``train``: images of the split restval count as train. ``ignore``: they are left out.

    Raises:
        InputError: A file is malformed, the split has no image, an image has no caption or an empty one, images are
            there twice or in neither form, or vectors do not fit the ids.
    """
    if restval not in ("train", "ignore"):
        raise InputError(f"--restval {restval!r}: use train or ignore.")
    file = _captions_file(folder)
    assert file is not None
    rows = list(_karpathy(file) if file.suffix == ".json" else _jsonl(file))
    wanted = {"dev": ("dev", "val"), "val": ("dev", "val"), "train": ("train",)}.get(split, (split,))
    wanted += ("restval",) if split == "train" and restval == "train" else ()
    chosen = [row for row in rows if row.split in wanted]
    if not chosen:
        raise InputError(f"{file}: split {split!r} has no image; there are {sorted({row.split for row in rows})}.")
    for row in chosen:
        if not row.captions:
            raise InputError(
                f"{file}: {row.identifier!r} of split {split!r} has no caption, so nothing can be asked for it. Add "
                "one, or remove the image."
            )
        for identifier, caption in row.captions.items():
            if not caption:
                raise InputError(f"{file}: caption {identifier!r} of {row.identifier!r} is empty. Remove it.")
    for kind, ids in (
        ("image", [row.identifier for row in rows]),
        ("caption", [identifier for row in rows for identifier in row.captions]),
    ):
        if len(set(ids)) < len(ids):
            twice = next(i for i, other in zip(sorted(ids), sorted(ids)[1:], strict=False) if i == other)
            raise InputError(f"{file}: {kind} {twice!r} is there twice, so judgments of it are ambiguous. Rename one.")
    queries = {identifier: text for row in chosen for identifier, text in row.captions.items()}
    qrels = {identifier: {row.identifier: 1} for row in chosen for identifier in row.captions}
    corpus: Mapping[str, Any] = dict.fromkeys((row.identifier for row in chosen), None)
    vectors: dict[str, np.ndarray] = {}
    if (folder / "images").is_dir():
        corpus = ImageFiles({row.identifier: folder / "images" / row.file for row in chosen}, folder / "images")
    else:
        vectors = _vectors(folder, rows, chosen)
    name = dataset_name(folder)
    return RetrievalDataset(name, split, corpus, queries, qrels, vectors=vectors, folder=folder)


class ImageFiles(Mapping[str, Any]):
    """Image id -> image, opened when it is asked for: a collection does not fit into memory.

    Raises:
        InputError: A file is missing, or outside the folder that it should lie in.
    """

    def __init__(self, paths: Mapping[str, Path], inside: Path):
        for identifier, path in paths.items():
            try:
                outside, there = inside.resolve() not in path.resolve().parents, path.is_file()
            except (OSError, RuntimeError, ValueError) as error:  # too long, in a circle, or no text
                raise InputError(
                    f"{inside}: image {shown(identifier)} has the name {shown(path.name)}, which no file can have or "
                    f"which leads nowhere ({first_line(error)}). Mend its name."
                ) from None
            if outside:
                raise InputError(f"{path}: image {identifier!r} lies outside {inside}. Refused; mend its name.")
            if not there:
                raise InputError(f"{path}: no such file, but {identifier!r} is in the captions. Add it or remove it.")
        self.paths = dict(paths)
        # Of the files, so that the key of a cache does not decode every image.
        self.digests = _Digests(self.paths)

    def __getitem__(self, identifier: str) -> Any:
        try:
            return load_image(str(self.paths[identifier]))  # upright and RGB
        except Exception as error:  # Pillow raises SyntaxError and kinds of its own too
            raise InputError(
                f"{self.paths[identifier]}: cannot be read as an image ({error}). Replace the file or remove it."
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)


class _Digests(dict[str, str]):
    """Image id -> SHA-256 of its file, taken when it is asked for."""

    def __init__(self, paths: Mapping[str, Path]):
        self.paths = paths

    def get(self, identifier: str, default: Any = None) -> Any:
        if identifier not in self:
            self[identifier] = hashlib.sha256(self.paths[identifier].read_bytes()).hexdigest()
        return self[identifier]


def _captions_file(folder: Path) -> Path | None:
    """The one captions file of a folder, None where there is none; what ``datasets`` writes is not meant."""
    others = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
    found = [file for file in sorted(folder.glob("dataset*.json")) if file.name not in others]
    found += [file for file in (folder / "captions.jsonl",) if file.is_file()]
    if len(found) > 1:
        raise InputError(f"{folder}: {' and '.join(file.name for file in found)} both tell captions. Keep one.")
    for file in found:
        refuse_no_file(file)
    return found[0] if found else None


def _karpathy(file: Path) -> Iterator[_Row]:
    try:
        images = json.loads(file.read_text(encoding="utf-8-sig"))["images"]
        for place, image in enumerate(images):
            sentences = image["sentences"]
            captions = {identifier_in(s, "sentid"): text_in(s, "raw", None) for s in sentences}
            if len(captions) < len(sentences):
                raise ValueError(f"imgid {shown(image['imgid'])} has a sentid twice")
            identifier = identifier_in(image, "imgid")
            name = Path(image.get("filepath") or "") / image.get("filename", identifier)
            yield _row(place, identifier, str(name), image["split"], captions)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise InputError(
            f"{file}: not of Karpathy's layout ({first_line(error)}). Expected images with imgid, split "
            "and sentences, each with sentid and raw."
        ) from None


def _jsonl(file: Path) -> Iterator[_Row]:
    for place, (number, line) in enumerate(lines_of(file)):
        try:
            row = parsed(line)
            if not isinstance(row["image"], str) or not isinstance(row["captions"], list):
                raise TypeError("image is a name and captions are a list")
            texts = [text_in({"caption": text}, "caption", None) for text in row["captions"]]
            captions = {f"{row['image']}#{i}": text for i, text in enumerate(texts)}
            yield _row(place, row["image"], row["image"], row["split"], captions)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{file}:{number}: not a JSON object with image, split and captions ({first_line(error)})."
            ) from None


def _row(place: int, identifier: str, file: str, split: Any, captions: dict[str, str]) -> _Row:
    if not isinstance(split, str):
        raise ValueError(f"split={shown(split)}")
    if not visible(identifier):
        raise ValueError("an image without a name")
    for field, text in (("image", identifier), ("file", file), ("split", split)):
        refuse_surrogates(text, field)
    return _Row(place, identifier, file, split, captions)


def _vectors(folder: Path, rows: list[_Row], chosen: list[_Row]) -> dict[str, np.ndarray]:
    """Vectors of the chosen images, and of their captions if there are any: ``(images, width), (captions, width)``."""
    found = sorted([*folder.glob("*.npy"), *folder.glob("*.safetensors"), *folder.glob("img_embs.parquet")])
    if len(found) != 1:
        raise InputError(
            f"{folder}: expected the images in images/, or one file of their vectors (.npy, .safetensors or "
            f"img_embs.parquet); there are {[file.name for file in found]}."
        )
    file = found[0]
    refuse_no_file(file)
    image_ids = [row.identifier for row in chosen]
    caption_ids = [identifier for row in chosen for identifier in row.captions]
    if file.suffix == ".parquet":
        vectors = {"document": _from_parquet(file, image_ids)}
        if (beside := folder / "text_embs.parquet").is_file():
            vectors["query"] = _from_parquet(beside, caption_ids)
        return vectors
    if file.suffix == ".npy":
        try:
            arrays = {"images": np.load(file, mmap_mode="r", allow_pickle=False)}
        except Exception as error:  # numpy reads the header as Python, with errors of that
            raise InputError(f"{file}: no array of numbers ({error}). Save it with numpy.save.") from None
    else:
        try:
            with safe_open(file, framework="np") as tensors:
                arrays = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118  no mapping
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: damaged or truncated ({error}). Fetch it again.") from None
        if "images" not in arrays:
            raise InputError(f"{file}: no tensor 'images'; there are {sorted(arrays)}.")
    vectors = {"document": _picked(file, arrays["images"], len(rows), [row.place for row in chosen], "image")}
    if "captions" in arrays:
        firsts = np.cumsum([0, *(len(row.captions) for row in rows)])
        places = [int(firsts[row.place]) + i for row in chosen for i in range(len(row.captions))]
        vectors["query"] = _picked(file, arrays["captions"], int(firsts[-1]), places, "caption")
    return vectors


def _picked(file: Path, array: np.ndarray, expected: int, places: list[int], kind: str) -> np.ndarray:
    if array.ndim != 2 or len(array) != expected or not np.issubdtype(array.dtype, np.floating):
        raise InputError(
            f"{file}: {kind} vectors of shape {array.shape} and type {array.dtype}, but the captions file has "
            f"{expected} {kind}s, so vectors would go with other {kind}s. Expected ({expected}, width) of floats."
        )
    return _finite(file, array[places], kind)


def _from_parquet(file: Path, ids: list[str]) -> np.ndarray:
    try:
        table = pyarrow.parquet.read_table(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{file}: no readable parquet file ({error}). Fetch it again.") from None
    column = next((name for name in ("emb", "embedding") if name in table.column_names), None)
    if "id" not in table.column_names or column is None:
        raise InputError(f"{file}: columns {table.column_names}; expected id, and emb or embedding.")
    place = {str(identifier): i for i, identifier in enumerate(table["id"].to_pylist())}
    if len(place) < len(table):
        raise InputError(f"{file}: {len(table) - len(place)} ids are there twice, so vectors are ambiguous. Keep one.")
    if missing := [identifier for identifier in ids if identifier not in place]:
        raise InputError(
            f"{file}: has no vector of {missing[0]!r} ({len(missing)} of {len(ids)} missing), which the captions file "
            "names. Remove it there or add its vector."
        )
    taken = table[column].take([place[identifier] for identifier in ids]).combine_chunks()
    widths = set(np.diff(taken.offsets.to_numpy())) if hasattr(taken, "offsets") else {taken.type.list_size}
    if len(widths) != 1:
        raise InputError(f"{file}: vectors of widths {sorted(int(w) for w in widths)}; expected one width.")
    return _finite(file, taken.flatten().to_numpy(zero_copy_only=False).reshape(len(ids), -1), "parquet")


def _finite(file: Path, vectors: np.ndarray, kind: str) -> np.ndarray:
    bad = ~np.isfinite(vectors.astype(np.float32)).all(axis=1)
    if bad.any():
        raise InputError(
            f"{file}: {int(bad.sum())} {kind} vectors are not finite, the first at {int(bad.argmax())} of the split, "
            "so every score with them would be meaningless. Make them again."
        )
    return vectors
