"""Systems to compare: a model through exact search, and the same model with its vectors pooled.

Each returns a :class:`Ranking`: what it found for every query, and what that cost in bytes, terms and seconds.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling
from tqdm import tqdm

from ..data.dataset import RetrievalDataset
from ..encoding.cache import embed
from ..encoding.embeddings import Embeddings, mean_of_tokens, row_of, sum_of_tokens
from ..encoding.encoders import kind_of
from ..encoding.windows import Windows
from ..errors import InputError
from ..files import staged_file
from ..hub.folder import Encoder
from ..search.ranking import exact_search, tie_ranks

logger = logging.getLogger(__name__)

DEPTH = 1000
"""Runs are cut here, as MTEB cuts them."""

TIMED_QUERIES = 32
TIMED_DOCUMENTS = 128


@dataclass(frozen=True)
class Ranking:
    """What one system found on one data set, and its costs.

    Attributes:
        system: Name of the row in tables.
        positions: ``(queries, depth)`` positions of documents in the corpus, best first.
        scores: ``(queries, depth)`` their scores.
        costs: Figures for the table; see :func:`costs_of`. ``search_ms`` is one query alone through exact search,
            reading the index from its memory map included; with ``encode_docs_per_s`` it depends on the machine.
        seconds: ``(queries,)`` what each query took alone, NaN where it was not timed; None where nobody asked.
        settings: How the system was set, for a line below the table.
    """

    system: str
    positions: np.ndarray
    scores: np.ndarray
    costs: dict[str, float] = field(default_factory=dict)
    seconds: np.ndarray | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def bytes_per_document(
    kind: str, dtype: str = "float16", *, dims: int = 0, nnz: float = 0.0, vectors: float = 0.0
) -> float:
    """Size of one document in an index, in bytes, before any compression of the index itself.

    Args:
        kind: ``dense`` (dims numbers), ``sparse`` (a 4-byte term id and a number per active term), ``multi`` (vectors
            of dims numbers and an 8-byte offset), ``binary`` (one bit per dimension of each vector) or ``routed``
            (dims numbers and a 4-byte document per entry; in int8 a 4-byte scale as well).
        dtype: numpy name of the numbers.
        dims: Numbers per vector.
        nnz: Mean active terms per document, for ``sparse``; mean entries, for ``routed``.
        vectors: Mean vectors per document, for ``multi``; for ``binary`` default 1.

    Raises:
        InputError: An unknown kind.
    """
    itemsize = np.dtype(dtype).itemsize
    match kind:
        case "dense":
            return dims * itemsize
        case "sparse":
            return nnz * (4 + itemsize)
        case "multi":
            return vectors * dims * itemsize + 8
        case "binary":
            return (vectors or 1) * -(-dims // 8)
        case "routed":
            return nnz * (dims * itemsize + 4 + 4 * (dtype == "int8"))
    raise InputError(f"bytes_per_document: unknown kind {kind!r}; use dense, sparse, multi, binary or routed.")


def flops(queries: np.ndarray, documents: np.ndarray) -> float:
    """Mean number of terms that a query and a document share, the work of an inverted index for one pair.

    Args:
        queries: ``(vocabulary,)`` share of the queries in which each term is active.
        documents: ``(vocabulary,)`` likewise for documents.
    """
    return float(queries @ documents)


def rank_with_model(
    name: str,
    model: Encoder,
    dataset: RetrievalDataset,
    *,
    pooling: list[str] | None = None,
    cache_dir: str | Path | None = None,
    dtype: str = "float16",
    batch_size: int = 16,
    windows: Windows | None = None,
) -> list[Ranking]:
    """Encode through the cache and search exactly; one ranking, and one more for each pooling of token vectors.

    Args:
        name: Row name.
        model: Any sentence-transformers model.
        dataset: Corpus and queries.
        pooling: For multi-vector models: ``"mean"`` or a number of vectors for hierarchical pooling.
        cache_dir: See :func:`polyrep.encoding.cache.embed`.
        dtype: See :func:`polyrep.encoding.cache.embed`.
        batch_size: Texts per forward pass.
        windows: How to cut documents; default: what the model does not read of one is dropped.

    Raises:
        InputError: ``pooling`` is malformed, or the model has one vector a text.
    """
    for how in pooling or []:
        if how != "mean" and not (how.isdecimal() and int(how) > 0):
            raise InputError(f"pooling {how!r}: expected `mean` or a number of vectors such as 8.")
    if pooling and kind_of(model) != "tokens":
        raise InputError(f"{name}: pooling {pooling} is for models with several vectors a text; this one has one.")
    options: dict[str, Any] = {"cache_dir": cache_dir, "dtype": dtype, "batch_size": batch_size}
    documents = embed(model, dataset.corpus, task="document", name=dataset.name, windows=windows, **options)
    queries = embed(model, dataset.queries, task="query", name=f"{dataset.name}-{dataset.split}", **options)
    similarity = str(model.similarity_fn_name)
    ranks = tie_ranks(list(dataset.corpus))
    # A cache may be of another day, so speed is measured now, on documents spread over the corpus.
    sample = list(dataset.corpus.values())[:: max(1, documents.documents // TIMED_DOCUMENTS)]
    model.encode_document(sample[:batch_size], batch_size=batch_size)  # the first call allocates
    started = time.perf_counter()
    pieces = [piece for text in sample for piece in windows.cut(text)] if windows else sample
    model.encode_document(pieces, batch_size=batch_size)
    speed = {"encode_docs_per_s": len(sample) / (time.perf_counter() - started)}

    def ranked(system: str, q: Embeddings, d: Embeddings, similarity: str) -> Ranking:
        options: dict[str, Any] = {"similarity": similarity, "device": model.device, "left_out": dataset.own}
        ranking = rank_embeddings(system, q, d, ranks, **options)
        return replace(ranking, costs=ranking.costs | speed)

    rankings = [ranked(name, queries, documents, similarity)]
    for how in pooling or []:
        if how == "mean":
            rankings.append(ranked(f"{name}, mean", sum_of_tokens(queries), mean_of_tokens(documents), "dot"))
        else:
            rankings.append(
                ranked(f"{name}, hierarchical {how}", queries, _hierarchical(documents, int(how)), similarity)
            )
    return rankings


def rank_embeddings(
    system: str,
    queries: Embeddings,
    documents: Embeddings,
    ranks: np.ndarray,
    *,
    similarity: str,
    left_out: np.ndarray | None = None,
    device: str | torch.device = "cpu",
) -> Ranking:
    """Search exactly, then time some queries alone.

    ``ranks`` decides ties, see :func:`polyrep.search.ranking.tie_ranks`; ``left_out (queries,)`` is one document of
    each query that is no answer to it, see :func:`polyrep.search.ranking.without`.
    """
    options: dict[str, Any] = {"similarity": similarity, "k": DEPTH, "device": device}
    positions, scores = exact_search(queries, documents, ranks, left_out=left_out, show_progress=True, **options)
    rows = timed_rows(len(queries))
    seconds = np.full(len(queries), np.nan)
    for row in rows:
        started = time.perf_counter()
        exact_search(row_of(queries, int(row)), documents, ranks, **options)
        seconds[row] = time.perf_counter() - started
    return Ranking(system, positions, scores, costs_of(queries, documents) | latency(seconds[rows].tolist()), seconds)


def timed_rows(queries: int) -> np.ndarray:
    """Places of the queries that are timed, spread over all of them."""
    return np.unique(np.linspace(0, queries - 1, min(TIMED_QUERIES, queries)).astype(int))


def refuse_uncut(dataset: RetrievalDataset, window: int) -> None:
    """InputError if the documents are images, which no window cuts."""
    if not isinstance(dataset.corpus, dict):
        raise InputError(
            f"--window {window}: the documents of {dataset.name} are images, which have no tokens to be cut at. Leave "
            "it out."
        )


def keep_ranking(path: Path, system: str, make: Callable[[], Ranking], depth: int) -> Ranking:
    """A ranking from the file ``path``, made and kept there first if it is missing or cannot be read.

    Args:
        path: A ``.safetensors`` file, which appears once it is whole.
        system: Name of the row.
        make: Makes the ranking.
        depth: Documents of a query that are kept.
    """
    if path.is_file():
        try:
            with safe_open(path, framework="numpy") as stored:
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
                said = stored.metadata()
                costs, settings = json.loads(said["costs"]), json.loads(said.get("settings", "{}"))
            return Ranking(system, tensors["positions"], tensors["scores"], costs, tensors.get("seconds"), settings)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            logger.warning("%s is damaged (%s), so its row is made again.", path, error)
    made = make()
    positions, scores = (np.ascontiguousarray(part[:, :depth]) for part in (made.positions, made.scores))
    tensors = {"positions": positions, "scores": scores}
    if made.seconds is not None:
        tensors["seconds"] = made.seconds
    with staged_file(path) as partial:
        said = {"costs": made.costs, "settings": made.settings}
        save_file(tensors, partial, metadata={name: json.dumps(of, allow_nan=False) for name, of in said.items()})
    return replace(made, system=system, positions=positions, scores=scores)


def costs_of(queries: Embeddings, documents: Embeddings) -> dict[str, float]:
    """Bytes per document; for sparse vectors also active dimensions of both sides and FLOPs; its windows, if any.

    For routed entries also how many a document has, and ``products``: how many a query and a document multiply on the
    mean, those under one key.
    """
    dtype = str(documents.values.dtype)
    windows: dict[str, float] = {}
    if documents.windows is not None:
        windows["windows_per_document"] = len(documents) / documents.documents
    if documents.kind == "tokens":
        vectors = float(documents.lengths.mean())
        return {
            "bytes_per_document": bytes_per_document("multi", dtype, dims=documents.dim, vectors=vectors),
            "vectors_per_document": vectors,
        }
    if documents.kind == "sparse":
        shares = [
            np.bincount(np.asarray(side.indices), minlength=side.dim) / side.documents for side in (queries, documents)
        ]
        nnz = float(documents.lengths.sum() / documents.documents)
        return windows | {
            "bytes_per_document": bytes_per_document("sparse", dtype, nnz=nnz),
            "active_dims": nnz,
            "query_active_dims": float(queries.lengths.mean()),
            "flops": flops(*shares),
        }
    if documents.kind == "routed":
        named = [np.asarray(side.indices) for side in (queries, documents)]
        most = 1 + max(int(keys.max(initial=0)) for keys in named)
        means = [np.bincount(k, minlength=most) / len(s) for k, s in zip(named, (queries, documents), strict=True)]
        entries = float(documents.lengths.mean())
        size = bytes_per_document("routed", dtype, dims=documents.dim, nnz=entries)
        if documents.sentences is not None:
            size += bytes_per_document("dense", str(documents.sentences.dtype), dims=documents.sentence_dim)
        return {
            "bytes_per_document": size,
            "entries_per_document": entries,
            "products": flops(*means),
        }
    size = bytes_per_document("dense", dtype, dims=documents.dim) * windows.get("windows_per_document", 1)
    return windows | {"bytes_per_document": size}


def _hierarchical(documents: Embeddings, vectors: int) -> Embeddings:
    """Documents pooled to at most ``vectors`` each by sentence-transformers' Ward clustering, no protected token."""
    assert documents.offsets is not None
    pooled: list[np.ndarray] = []
    bounds = zip(documents.offsets[:-1], documents.offsets[1:], strict=True)
    for start, stop in tqdm(bounds, desc=f"pool to {vectors}", unit="text", total=len(documents)):
        tokens = torch.from_numpy(np.array(documents.values[start:stop], np.float32))
        # The library takes a factor and rounds down; half a vector more makes it land on the number asked for.
        factor = max(len(tokens) / (vectors + 0.5), 1.0)
        means = HierarchicalTokenPooling(factor, num_protected_tokens=0).pool_one(tokens)
        pooled.append(torch.nn.functional.normalize(means, dim=-1).numpy())  # which sentence-transformers 6.0 leaves
    offsets = np.cumsum([0, *map(len, pooled)])
    return replace(documents, values=np.concatenate(pooled).astype(documents.values.dtype), offsets=offsets)


def latency(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile of seconds, in milliseconds."""
    return {
        "search_ms_p50": 1000 * float(np.percentile(seconds, 50)),
        "search_ms_p99": 1000 * float(np.percentile(seconds, 99)),
    }
