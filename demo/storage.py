"""What is kept between two starts of the demo: unpacked models, and a corpus once it is encoded.

Encoded things are folders in the format of :mod:`polyrep.encoding.cache`, memory-mapped when they are opened.
Their keys name the model's files, the rooms' code and the texts but no library and no processor, so that a folder made
on one machine serves another.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from packed import unpack
from tqdm import tqdm

from polyrep.encoding import Embeddings
from polyrep.encoding.cache import FORMAT, open_cache
from polyrep.encoding.embeddings import Kind, joined
from polyrep.encoding.encoders import encode_chunk
from polyrep.errors import InputError
from polyrep.files import file_sha256, staged_folder, write_json
from polyrep.hub.code import code_of
from polyrep.hub.folder import Encoder
from polyrep.registry import ROOMS

PART = 256
"""Documents that are encoded and written together: what an interruption loses at most."""


def open_models(folder: Path, names: Mapping[str, str], cache: Path) -> dict[str, Path]:
    """Find the models of the demo.

    Args:
        folder: Of packed models (:mod:`packed`), a folder each; or of the outputs of runs, ``<run>/{head,final}``.
        names: Run -> ``head`` or ``final``, what is opened of it.
        cache: Where packed models are unpacked.

    Returns:
        Run -> folder of an ordinary model.

    Raises:
        InputError: A model is not there.
    """
    found = {}
    for run, part in names.items():
        if (folder / run / part).is_dir():
            found[run] = folder / run / part
        elif (folder / run / "config.json").is_file():
            files = sorted(file for file in (folder / run).rglob("*") if file.is_file())
            hashes = [(str(file.relative_to(folder)), file_sha256(file)) for file in files]
            digest = digest_of([hashes, digest_of_code()])
            found[run] = unpack(folder / run, cache / "models" / f"{run}-{digest}")
        else:
            raise InputError(
                f"{folder}: holds neither {run}/{part} nor {run} as a packed model, so the demo lacks a "
                f"representation. Run `accelerate launch train.py hub_configs/{run}` and name the folder of outputs."
            )
    return found


def digest_of(content: Any) -> str:
    """Twelve hex digits that tell JSON contents apart."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def digest_of_code() -> str:
    """Tells apart versions of the rooms' code, which goes into unpacked models and makes the vectors."""
    files = sorted({file for room in ROOMS.values() for file in code_of(room.model.__module__)})
    return digest_of([(file.name, file_sha256(file)) for file in files])


def place(cache: Path, name: str, key: dict[str, Any]) -> Path:
    """Where embeddings of a key are kept, or would be."""
    return cache / f"{name}-{digest_of(key)}"


def kept(cache: Path, name: str, key: dict[str, Any], make: Callable[[], Embeddings]) -> Embeddings:
    """Embeddings of a key from the cache, made and written first if they are not there.

    Args:
        cache: Folder of all that is kept.
        name: Readable part of the folder's name.
        key: All that they depend on, with ``kind``.
        make: Makes them.
    """
    path = place(cache, name, key)
    if not path.exists():
        made = make()
        parts = {"values": made.values, "offsets": made.offsets, "indices": made.indices}
        arrays = {}
        with staged_folder(path) as staged:
            for part, array in parts.items():
                if array is not None:
                    (staged / f"{part}.bin").write_bytes(np.ascontiguousarray(array).data)
                    arrays[part] = (str(array.dtype), list(array.shape))
            manifest = {"format": FORMAT, "key": key, "dim": made.dim, "arrays": arrays, "seconds": made.seconds}
            write_json(staged / "manifest.json", manifest)
    return open_cache(path, key)


def encoded(
    cache: Path, name: str, key: dict[str, Any], model: Encoder, texts: Mapping[str, str], *, batch_size: int = 32
) -> Embeddings:
    """Documents encoded by a model, a part at a time, so that an interrupted start goes on where it stopped.

    Args:
        cache: Folder of all that is kept.
        name: Readable part of the folder's name.
        key: As for :func:`kept`.
        model: The encoder.
        texts: Id -> document.
        batch_size: Texts per forward pass.
    """
    kind: Kind = key["kind"]
    documents, parts = list(texts.values()), place(cache, name, key).with_suffix(".parts")

    def encode(start: int) -> Embeddings:
        found = encode_chunk(model, documents[start : start + PART], "document", kind, batch_size).embeddings(kind)
        return replace(found, values=found.values.astype(np.float16), indices=None)

    def encode_all() -> Embeddings:
        found = []
        with tqdm(total=len(documents), desc=f"encoding by {name}", unit="document") as progress:
            for start in range(0, len(documents), PART):
                part_key = key | {"start": start, "part": PART}
                found.append(kept(parts, str(start), part_key, partial(encode, start)))
                progress.update(len(found[-1]))
        return joined(found)

    whole = kept(cache, name, key, encode_all)
    shutil.rmtree(parts, ignore_errors=True)
    return whole
