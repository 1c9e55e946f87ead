"""Embeddings on disk: written once, a chunk at a time, and read back through memory maps.

Encoding is the slow part of every experiment here, and everything after it is cheap, so each (model, texts, settings)
is encoded once. A cache is a folder of plain arrays with a ``manifest.json`` that says in readable form what they are
and everything they depend on. No more than one chunk of vectors is ever in memory while it is written.

Kinds of output::

    sentence   values (texts, dim)                                one vector per text
    tokens     values (tokens of all texts, dim), offsets         several vectors per text (late interaction)
    sparse     values (active terms of all texts), indices, offsets
    routed     values (entries of all texts, dim), indices, offsets[, sentences (texts, width)]
                                                                  a token's vector by its weight, under a key
    layers     values (texts, layers + 1, dim)                    masked mean of every layer, embeddings first
    cls_layers values (texts, layers + 1, dim)                    first token of every layer
    states     values (tokens of all texts, layers, dim), indices, offsets
                                                                  every token at some layers, and which token it is

``states`` are what a method reads that looks at the tokens of an encoder inside: of 1,000 texts of 128 tokens, two
layers of width 384 take 197 MB in float16. Its rows are the tokens that count, special ones and a prompt's included,
in their order.

Where documents are cut into windows, each window is a text, and ``windows`` bounds those of each document; with
several vectors or entries a text, those of all its windows are the document's.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import itertools
import json
import logging
import math
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from sentence_transformers.base.modules.module import Module
from tqdm import tqdm
from transformers import PreTrainedModel

from ..errors import InputError, refuse_no_text
from ..files import staged_folder, write_json
from ..hub.fingerprint import NOT_FINGERPRINTED, without
from ..hub.folder import Encoder
from .arrays import mapped_arrays
from .embeddings import SIDE_BY_SIDE, Embeddings, Kind, means
from .encoders import encode_chunk, kind_of, layers_of, refuse_broken_prompts, refuse_not_finite_vectors
from .windows import Windows

logger = logging.getLogger(__name__)

FORMAT = "polyrep-embeddings-1"
CHUNK = 1024
"""Texts per chunk: enough that sorting by length inside it saves the padding, little enough to be no memory."""


_NAMED = ("sparse", "routed", "states")
"""Kinds of which a row is of a term, a key, or a token."""


def embed(
    model: Encoder,
    texts: Mapping[str, Any],
    *,
    task: Literal["query", "document"],
    cache_dir: str | Path | None = None,
    kind: Kind | None = None,
    dtype: str = "float16",
    batch_size: int = 16,
    name: str = "texts",
    show_progress: bool = True,
    windows: Windows | None = None,
    layers: Sequence[int] | None = None,
) -> Embeddings:
    """Encode texts through the cache.

    Args:
        model: Any sentence-transformers model.
        texts: Id -> text or page image, in the order of the result.
        task: Whether the texts are queries or documents (prompts and asymmetric models depend on it).
        cache_dir: Where caches live; None keeps this one only as long as the result is referenced.
        kind: What to keep; default: what the model's family gives.
        dtype: ``float16`` or ``float32`` on disk.
        batch_size: Texts per forward pass.
        name: Readable part of the cache's folder name, e.g. the data set.
        show_progress: Show a progress bar.
        windows: How to cut the texts; default: what a model does not read of a text is dropped.
        layers: For kind ``states``, which hidden states are kept, in this order; see
            :func:`polyrep.encoding.encoders.layers_of`.

    Raises:
        InputError: No text; images to be cut; no layers for ``states``, or some for another kind; a vector is not
            finite in ``dtype``; the disk is too small; a cache of this key is damaged.
    """
    if not texts:
        raise InputError(f"{name}: no text to encode.")
    if windows and not isinstance(texts, dict):  # which images are not, since they are opened late
        raise InputError(f"{name}: holds images, which have no tokens to be cut at. Leave --window out.")
    if dtype not in ("float16", "float32"):
        raise InputError(f"dtype {dtype!r}: caches hold float16 or float32.")
    if isinstance(texts, dict) and next(iter(texts.values())) is None:
        raise InputError(
            f"{name}: holds vectors instead of images, which only the encoder that made them could compare with "
            "others. Put the files into images/, or train a head on the vectors."
        )
    kind = kind or kind_of(model)
    if layers is not None and kind != "states":
        raise InputError(f"{name}: layers {list(layers)} are for kind 'states', and {kind!r} is asked for. Drop one.")
    key = cache_key(model, texts, task=task, kind=kind, dtype=dtype, windows=windows, layers=layers)
    temporary = None
    if cache_dir is None:
        temporary = tempfile.mkdtemp(prefix="polyrep-")
        cache_dir = temporary
    path = _place(cache_dir, name, key)
    if not path.exists():
        _explain_miss(path, key)
        try:
            _write(path, key, model, texts, batch_size, show_progress, windows)
        except BaseException:
            if temporary:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
    embeddings = open_cache(path, key)
    if temporary:
        weakref.finalize(embeddings, shutil.rmtree, temporary, ignore_errors=True)
    return embeddings


def store(
    model: Encoder,
    texts: Mapping[str, Any],
    vectors: np.ndarray,
    *,
    task: Literal["query", "document"],
    cache_dir: str | Path,
    name: str = "texts",
    dtype: str = "float16",
    windows: Windows | None = None,
) -> Embeddings:
    """Put vectors that are known already where :func:`embed` looks for those of ``model``, so that nothing is encoded.

    Args:
        model: A model with one vector a text, which would give these vectors.
        texts: Id -> text, in the order of the vectors.
        vectors: ``(texts, dim)``.
        task: As for :func:`embed`.
        cache_dir: Likewise.
        name: Likewise.
        dtype: Likewise.
        windows: Likewise; the vectors are of whole documents all the same.

    Raises:
        InputError: There are not as many vectors as texts, or one is not finite in ``dtype``.
    """
    if len(vectors) != len(texts):
        raise InputError(f"{name}: {len(vectors)} vectors for {len(texts)} texts. Pass one for each.")
    key = cache_key(model, texts, task=task, kind="sentence", dtype=dtype, windows=windows)
    path = _place(cache_dir, name, key)
    if not path.exists():
        with np.errstate(over="ignore"):  # refused below, by the id of its text
            values = np.ascontiguousarray(vectors, dtype)
        refuse_not_finite_vectors(values, None, list(texts), dtype)
        with staged_folder(path) as staged:
            (staged / "values.bin").write_bytes(values.data)
            arrays = {"values": (dtype, list(values.shape))}
            manifest = {"format": FORMAT, "key": key, "dim": values.shape[1], "arrays": arrays, "seconds": 0.0}
            write_json(staged / "manifest.json", manifest)
    return open_cache(path, key)


def open_cache(path: str | Path, key: dict[str, Any] | None = None) -> Embeddings:
    """Open a cache folder, refusing one that is foreign, truncated, or made for another ``key``.

    Raises:
        InputError: Names the folder and what is wrong: the missing or short file, or each field that differs.
    """
    path = Path(path)
    remedy = f"Delete {path} to have it made again."
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: no readable manifest.json ({error}), so this is no embedding cache.") from None
    fields = {"key", "dim", "seconds", "arrays"}
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or fields - manifest.keys():
        raise InputError(
            f"{path}: manifest.json is not of format {FORMAT}, so the arrays mean something else. {remedy}"
        )
    if key is not None and (differing := _differences(manifest["key"], key)):
        raise InputError(f"{path}: made for something else: {'; '.join(differing)}. {remedy}")
    arrays: dict[str, Any] = {"offsets": None, "indices": None}
    arrays |= mapped_arrays(path, manifest["arrays"], remedy)
    try:
        return Embeddings(
            manifest["key"]["kind"], dim=manifest["dim"], seconds=manifest["seconds"], path=path, **arrays
        )
    except (TypeError, LookupError) as error:
        raise InputError(f"{path}: manifest.json lacks what every cache has ({error}). {remedy}") from None


def cache_key(
    model: Encoder,
    texts: Mapping[str, Any],
    *,
    task: str,
    kind: str,
    dtype: str,
    windows: Windows | None = None,
    layers: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Everything that embeddings depend on, readable; two equal keys mean equal embeddings.

    Raises:
        InputError: An id, a text or a prompt holds half of a surrogate pair.
    """
    refuse_broken_prompts(model)
    further: dict[str, Any] = {"layers": layers_of(model, layers)} if kind == "states" else {}
    if windows:
        further["windows"] = windows.key
    digest = hashlib.sha256()
    known = getattr(texts, "digests", {})
    for identifier in texts:
        text = known.get(identifier) or texts[identifier]
        for part in (identifier, text):
            if isinstance(part, str):
                refuse_no_text(part, f"text {identifier!r}")
        content = text.encode() if isinstance(text, str) else f"{text.mode}{text.size}".encode() + text.tobytes()
        for part in (identifier.encode(), content):  # lengths keep ("a", "bc") apart from ("ab", "c")
            digest.update(len(part).to_bytes(8, "little") + part)
    return {
        "kind": kind,
        "dtype": dtype,
        "task": task,
        "prompts": dict(model.prompts),
        "default_prompt": model.default_prompt_name,
        "max_length": None if model.max_seq_length == math.inf else model.max_seq_length,
        "truncate_dim": getattr(model, "truncate_dim", None),
        "texts": {"count": len(texts), "sha256": digest.hexdigest()},
        "max_active_dims": getattr(model, "max_active_dims", None),
        "module_kwargs": dict(getattr(model, "module_kwargs", None) or {}),
        "modules": [describe(module) for module in model],
        "tokenizer": _tokenizer_hash(model),
        "versions": {
            name: importlib.metadata.version(name) for name in ("torch", "transformers", "sentence-transformers")
        },
    } | further


def describe(module: torch.nn.Module) -> dict[str, Any]:
    """Class, config hash and weight hash of one module, taken from memory, so that an edited model differs."""
    configs: dict[str, Any] = {}
    for name, part in module.named_modules():  # a Router holds further modules, and a module a model
        if isinstance(part, Module):
            configs[name] = part.get_config_dict()
        elif isinstance(part, PreTrainedModel):
            configs[name] = without(part.config.to_diff_dict(), NOT_FINGERPRINTED)
    weights = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        weights.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return {
        "class": type(module).__name__,
        "config": hashlib.sha256(json.dumps(configs, sort_keys=True, default=str).encode()).hexdigest(),
        "weights": weights.hexdigest(),
    }


def _tokenizer_hash(model: Any) -> str:
    tokenizer = model.tokenizer
    if tokenizer is None:  # of images alone
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    content = json.loads(backend.to_str()) if hasattr(backend, "to_str") else tokenizer.get_vocab()
    if backend is not tokenizer:  # transformers sets these at each call, so they tell what was encoded before
        content |= {"truncation": None, "padding": None}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write(
    path: Path,
    key: dict[str, Any],
    model: Encoder,
    texts: Mapping[str, Any],
    batch_size: int,
    show_progress: bool,
    windows: Windows | None,
) -> None:
    """Encode chunk by chunk, appending to the arrays of a staged folder."""
    started = time.perf_counter()
    owners = [np.zeros(0, np.int64)]  # of each text or window, the place of its document
    dim, shape_tail, rows, counts = 0, (), 0, [np.zeros(1, np.int64)]
    named = key["kind"] in _NAMED
    names = ["values", "indices"] if named else ["values"]
    whole: list[np.ndarray] = []  # vectors of whole texts beside entries, few enough to wait
    with staged_folder(path) as staged:
        files: dict[str, BinaryIO] = {name: (staged / f"{name}.bin").open("wb") for name in names}
        try:
            with tqdm(total=len(texts), desc=path.name, unit="text", disable=not show_progress) as progress:
                size = max(1, CHUNK // 8) if key["kind"] == "states" else CHUNK  # a text is hundreds of vectors there
                for ids, places, chunk in _chunks(texts, windows, size):
                    values, lengths, indices, dim, sentences = encode_chunk(
                        model, chunk, key["task"], key["kind"], batch_size, key.get("layers")
                    )
                    with np.errstate(over="ignore"):  # an overflow is refused below, by the id of its text
                        values = values.astype(key["dtype"])
                    refuse_not_finite_vectors(values, lengths, ids, key["dtype"])
                    # Not tofile, which drops the last bytes without an error when the disk is full.
                    files["values"].write(np.ascontiguousarray(values).data)
                    if indices is not None:
                        files["indices"].write(indices.astype(np.int32).data)
                    if lengths is not None:
                        counts.append(lengths)
                    if sentences is not None:
                        with np.errstate(over="ignore"):
                            whole.append(sentences.astype(key["dtype"]))
                        refuse_not_finite_vectors(whole[-1], None, ids, key["dtype"])
                    rows, shape_tail = rows + len(values), values.shape[1:]
                    owners.append(places)
                    written = sum(file.tell() for file in files.values())
                    _refuse_too_large(path, written, int(places[-1]) + 1, len(texts))
                    progress.update(int(places[-1]) + 1 - progress.n)
                    del values, lengths, indices
                    _return_freed_memory()
        finally:
            for file in files.values():
                file.close()
        arrays: dict[str, tuple[str, list[int]]] = {"values": (key["dtype"], [rows, *shape_tail])}
        if named:
            arrays["indices"] = ("int32", [rows])
        bounds = np.searchsorted(np.concatenate(owners), np.arange(len(texts) + 1)).astype(np.int64)
        further: dict[str, np.ndarray] = {}
        if key["kind"] in ("tokens", *_NAMED):
            further["offsets"] = np.cumsum(np.concatenate(counts), dtype=np.int64)
        if whole:
            further["sentences"] = np.concatenate(whole)
        if windows and key["kind"] in SIDE_BY_SIDE:
            further["offsets"] = further["offsets"][bounds]
            if whole:
                further["sentences"] = means(further["sentences"], bounds)
        elif windows:
            further["windows"] = bounds
        for name, array in further.items():
            (staged / f"{name}.bin").write_bytes(np.ascontiguousarray(array).data)
            arrays[name] = (str(array.dtype), list(array.shape))
        seconds = round(time.perf_counter() - started, 2)
        write_json(
            staged / "manifest.json", {"format": FORMAT, "key": key, "dim": dim, "arrays": arrays, "seconds": seconds}
        )


def _refuse_too_large(path: Path, written: int, done: int, total: int) -> None:
    """InputError once what is written of many texts tells that the disk is too small for all of them."""
    if done < CHUNK:
        return
    needed, free = written / done * (total - done), shutil.disk_usage(path.parent).free
    if needed > free:
        raise InputError(
            f"{path}: a text takes {written / done / 1000:,.0f} kB, so {total - done:,} more need {needed / 1e9:,.1f} "
            f"GB, and {free / 1e9:,.1f} GB of the disk are free. Name another --cache_dir, fewer texts or a lower "
            "--max_length."
        )


def _chunks(
    texts: Mapping[str, Any], windows: Windows | None, size: int
) -> Iterator[tuple[list[str], np.ndarray, list[Any]]]:
    """Texts or windows that are encoded together: the id and the place of each one's document, and what it is."""

    def pieces() -> Iterator[tuple[str, int, Any]]:
        for place, identifier in enumerate(texts):
            text = texts[identifier]
            for piece in windows.cut(text) if windows else [text]:
                yield identifier, place, piece

    stream = pieces()
    while chunk := list(itertools.islice(stream, size)):
        ids, places, content = zip(*chunk, strict=True)
        yield list(ids), np.array(places, np.int64), list(content)


def _return_freed_memory() -> None:
    """Give freed blocks back to the system: glibc keeps those of thousands of small arrays, and memory would creep."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def _explain_miss(path: Path, key: dict[str, Any]) -> None:
    """Log which field made an existing cache of the same name unusable: encoding again for no reason is a puzzle."""
    prefix = path.name.rpartition("-")[0]
    for other in sorted(path.parent.glob(f"{prefix}-*/manifest.json")):
        try:
            differing = _differences(json.loads(other.read_text(encoding="utf-8"))["key"], key)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        logger.info("Encoding again: %s differs in %s.", other.parent.name, "; ".join(differing))


def _differences(cached: Any, wanted: Any, place: str = "") -> list[str]:
    """Name every leaf in which two keys differ, e.g. ``max_length: cached 128, wanted 256``."""
    if isinstance(cached, dict) and isinstance(wanted, dict):
        names = dict.fromkeys([*cached, *wanted])
        return [d for n in names for d in _differences(cached.get(n), wanted.get(n), f"{place}.{n}".lstrip("."))]
    if isinstance(cached, list) and isinstance(wanted, list) and len(cached) == len(wanted):
        return [
            d for i, pair in enumerate(zip(cached, wanted, strict=True)) for d in _differences(*pair, f"{place}[{i}]")
        ]
    return [] if cached == wanted else [f"{place}: cached {cached!r}, wanted {wanted!r}"]


def _place(cache_dir: str | Path, name: str, key: dict[str, Any]) -> Path:
    return Path(cache_dir) / f"{name}-{key['task']}-{key['kind']}-{_digest(key)[:12]}"


def _digest(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
