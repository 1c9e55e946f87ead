"""Encoded corpora and indexes as strangers could hand them over: other manifests, other bytes, digests made to fit."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from polyrep.encoding import EncodedCorpus
from polyrep.encoding.embeddings import Embeddings
from polyrep.encoding.shards import Origin, manifest_of, write_shard
from polyrep.files import write_json
from polyrep.search import open_index

from . import Outcome, judge

DIM = {"sentence": 8, "tokens": 8, "sparse": 50, "routed": 8}
SIMILARITY = {"sentence": "dot", "tokens": "maxsim", "sparse": "dot", "routed": "routed"}
KEYS = 30
DOCUMENTS = 40
STORES = [
    ("memory:", "sentence", "float16"),
    ("memory:", "tokens", "float32"),
    ("memory:", "sparse", "float16"),
    ("memory:", "sentence", "int8"),
    ("memory:", "sentence", "binary"),
    ("faiss:{}", "sentence", "float16"),
    ("faiss:{}?index=hnsw", "sentence", "float16"),
    *([("seismic:{}", "sparse", "float16")] if importlib.util.find_spec("seismic") else []),
    ("memory:", "routed", "int8"),
    ("routed:{}", "routed", "float16"),
    ("routed:{}", "routed", "int8"),
    ("qdrant:{}", "sentence", "float16"),
    ("qdrant:{}", "tokens", "float16"),
]
"""URI, kind and precision: of ``memory:`` the corpus is damaged, of the others the index."""

_UNTRIED = (".lock", "mutable_id_tracker")
"""Locks; and Qdrant's log of ids, for whose counts the library asks for memory, and ends the process without it."""

VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 7, 2**31, 2**63, 10**30, 0.5, 1e308, "", "x", "..", "../../../etc/passwd", "/etc/passwd"),
    *("\ud800", "a\0b", [], {}, [1], [[2**40, 2**40]], ["<f4", [2**40]], ["O", [5]], ["<f4", [-1, -1]], {"a": {}}),
    *("float64", "tokens", "sparse", "sentence", "cosine", "maxsim", "dot", "hnsw", "int8", "binary"),
]


def run(count: int, seed: int, folder: Path) -> list[Outcome]:
    """Damage ``count`` folders, of which each must be refused, or opened and searched.

    Args:
        count: How many.
        seed: Of what is drawn.
        folder: An empty folder to work in.
    """
    draw, made, outcomes = random.Random(seed), {}, []
    for number in range(count):
        uri, kind, precision = store = STORES[number % len(STORES)]
        if store not in made:
            made[store] = _make(folder / f"whole{len(made)}", *store)
        place = folder / "case"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(made[store], place)
        said = "; ".join(_damage(place, draw) for _ in range(draw.choice([1, 1, 1, 2, 3])))
        outcomes.append(judge(f"{number} of seed {seed}: {uri} {kind} {precision}: {said}", _search(place, uri, kind)))
    return outcomes


def _make(folder: Path, uri: str, kind: str, precision: str) -> Path:
    corpus = folder if uri == "memory:" else folder.with_name(f"{folder.name}-corpus")
    keys = {"vocabulary": KEYS, "sentence_dim": 4} if kind == "routed" else {}
    origin = Origin("v", kind, DIM[kind], SIMILARITY[kind], "model", precision, **keys)
    write_json(corpus / "manifest.json", manifest_of(origin, task="document"))
    for number in range(2):
        ids = [f"d{number}-{place}é" for place in range(DOCUMENTS // 2)]
        write_shard(corpus, number, ids, _vectors(kind, DOCUMENTS // 2, number), precision)
    write_json(corpus / "complete.json", {"shards": 2})
    if uri != "memory:":
        index = open_index(uri.format(folder))
        index.add(EncodedCorpus(corpus))
        index.search(_vectors(kind, 2, 9), 5)  # Seismic builds its index now
        getattr(index, "close", lambda: None)()
    return folder


def _vectors(kind: str, count: int, seed: int) -> Embeddings:
    rng = np.random.default_rng(seed)
    if kind == "sentence":
        return Embeddings(kind, _floats(rng, count, DIM[kind]), None, None, DIM[kind], 0.0, Path())
    offsets = np.arange(count + 1, dtype=np.int64) * 3
    if kind == "tokens":
        return Embeddings(kind, _floats(rng, 3 * count, DIM[kind]), offsets, None, DIM[kind], 0.0, Path())
    if kind == "routed":
        keys, values = rng.integers(0, KEYS, 3 * count, np.int32), _floats(rng, 3 * count, DIM[kind])
        whole = _floats(rng, count, 4)
        return Embeddings(kind, values, offsets, keys, DIM[kind], 0.0, Path(), sentences=whole)
    words = np.concatenate([np.sort(rng.choice(DIM[kind], 3, replace=False)) for _ in range(count)]).astype(np.int32)
    return Embeddings(kind, np.abs(_floats(rng, 3 * count)), offsets, words, DIM[kind], 0.0, Path())


def _floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def _search(place: Path, uri: str, kind: str) -> Callable[[], None]:
    def call() -> None:
        index = open_index(uri.format(place))
        try:
            if uri == "memory:":
                corpus = EncodedCorpus(place)
                len(corpus)
                index.add(corpus)
            for row in index.search(_vectors(kind, 3, 5), 5):
                assert len(row) <= 5
                assert all(type(hit.id) is str and math.isfinite(hit.score) for hit in row)
        finally:
            getattr(index, "close", lambda: None)()

    return call


def _damage(place: Path, draw: random.Random) -> str:
    """Change one file; returns what was done."""
    files = sorted(path for path in place.rglob("*") if path.is_file() and not path.name.startswith(_UNTRIED))
    manifests = [path for path in files if path.suffix == ".json"]
    if not files:
        return "nothing is left"
    file = draw.choice(manifests if manifests and draw.random() < 0.5 else files)
    name = file.relative_to(place).as_posix()
    if file.suffix == ".json" and draw.random() < 0.8:
        return f"{name}: {_change_json(file, draw)}"
    done = _change_bytes(file, draw)
    if file.is_file() and draw.random() < 0.5:  # whoever damages a file on purpose makes its digest fit
        _fit_digests(place, file)
        done += ", and what is said of it fits"
    return f"{name}: {done}"


def _change_json(file: Path, draw: random.Random) -> str:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return "was no JSON already"
    spots = list(_spots(content))
    value = draw.choice(VALUES)
    if not spots:
        file.write_text(json.dumps(value))
        return f"is {value!r}"
    parent, key = draw.choice(spots)
    if draw.random() < 0.15:
        del parent[key]
        said = f"without {key!r}"
    elif draw.random() < 0.1 and isinstance(parent, dict):
        parent[draw.choice(["../../x", "/etc/passwd", "", "new"])] = parent.pop(key)
        said = f"{key!r} is called otherwise"
    else:
        parent[key] = value
        said = f"{key!r} is {value!r}"
    file.write_text(json.dumps(content))
    return said


def _spots(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON value, as what holds it and its key."""
    for key in (
        list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    ):
        yield content, key
        yield from _spots(content[key])


def _change_bytes(file: Path, draw: random.Random) -> str:
    content = bytearray(file.read_bytes())
    how = draw.choice(["cut", "flipped", "flipped", "numbers", "longer", "empty", "gone", "a folder"])
    place = draw.randrange(len(content) + 1)
    if how == "gone":
        file.unlink()
        return how
    if how == "a folder":
        file.unlink()
        file.mkdir()
        return how
    if how == "cut":
        del content[place:]
    elif how == "empty":
        content.clear()
    elif how == "longer":
        content += bytes(draw.randrange(1, 64))
    elif how == "numbers":  # a NaN of each width, a huge count, a negative one
        number = draw.choice(
            [b"\x00\x7e", b"\x00\x00\xc0\x7f", b"\xff" * 8, b"\xff\xff\xff\xff\xff\x00\x00\x00", b"\x00" * 8]
        )
        content[place : place + len(number)] = number[: len(content) - place]
    else:
        for _ in range(draw.choice([1, 1, 4, 16])):
            if content:
                content[draw.randrange(len(content))] = draw.randrange(256)
    file.write_bytes(content)
    return f"{how} at {place}"


def _fit_digests(place: Path, file: Path) -> None:
    """Have records and manifests say of a file what it is now."""
    digest, size = hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_size
    record, manifest = file.with_suffix(".json"), place / "polyrep.json"
    # Not that of Seismic's own file, which nothing else can vouch for: its reader ends the process on some numbers.
    for path in (record, manifest):
        if path == file or not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if path == record:
                content |= {"sha256": digest, "bytes": size}
            else:
                content["files"][file.name] = size
                if file.name in content["sha256"]:
                    content["sha256"][file.name] = digest
        except (ValueError, LookupError, TypeError):
            continue
        path.write_text(json.dumps(content))
