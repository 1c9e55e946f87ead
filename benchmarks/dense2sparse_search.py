"""Search in sparse lexical vectors by Seismic and Qdrant, and in the dense vectors that they came from by FAISS.

python benchmarks/dense2sparse_search.py --head models/dense2sparse-mobilenet-minilm/head --dataset PATH \
    --output results

Images are documents of about 50-200 words out of the vocabulary, captions are queries of 10-40. Every top 10 is
checked against exact search in the same run. A collection with fewer documents than asked for is filled up with noisy
copies of itself, see `replicated`, and its rows say so. What is timed is one query alone, on one thread, from its
arrays to the positions of documents, the index being built; the oracle is no engine, so it has no time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shlex
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from dense2sparse_text import with_head
from scipy.sparse import csr_matrix
from sentence_transformers.sparse_encoder.search_engines import semantic_search_seismic
from transformers import AutoModel

from polyrep.data import load_retrieval_dataset
from polyrep.encoding import Embeddings
from polyrep.encoding.embeddings import in_memory, joined
from polyrep.encoding.embeddings import rows as rows_at
from polyrep.errors import InputError
from polyrep.evaluation.systems import costs_of
from polyrep.hub import fingerprint, load
from polyrep.hub.folder import fastest_dtype
from polyrep.report import provenance, write_results
from polyrep.search import exact_search
from polyrep.search.local import package
from polyrep.search.ranking import sparse_rows
from polyrep.training.vectors import encode_dataset

SIZES = (1_000, 10_000, 100_000)
TOP = 10
DEPTH = 100
"""Candidates of the first of two stages."""

TIE = 1e-4
"""Scores this close, relatively, tie: engines add in float32 and in another order than the oracle."""

TARGET = 0.99
"""Share of the queries whose top 10 an engine must get right, up to 10,000 documents."""

WEIGHT_NOISE, SWAPPED, DENSE_NOISE = 0.1, 0.1, 0.1
"""Of a copy: deviation of the log of its weights, share of its words, length of the noise on a unit vector."""

# Seismic prunes to be fast. With these settings it found the exact top 10 of every query in synthetic vectors of 1,000
# and 10,000 documents: words by topic, noisy copies, and words drawn alone, among which no block is alike.
QUERY_CUT = 1_000
"""Words of a query that are looked up: all. With the 10 heaviest, some queries of 10-40 words lose a document."""

N_POSTINGS, MAX_FRACTION = 400, 6.0
"""Documents that a word's list keeps, its heaviest: how many on average over words, how many times as many at most.

Of 1,000 documents this drops nothing. The default of 3,500, for millions, takes several times as long at 100,000.
"""

SUMMARY_ENERGY, HEAP_FACTOR = 0.8, 0.9
"""A block of documents is skipped if its summary promises less than the factor times the k-th best score so far.

A summary has the heaviest words that make up this share of its block's weight. With the default of 0.4 it misses so
many that even a factor of 0.5 lost a document of a third of the queries for words drawn alone. With 1.0 it is a true
bound, and larger by half.
"""

N_KNN = 0
"""Neighbours of what was found that are looked at too: none, so that no graph of them has to be built."""

PACKAGES = {"seismic": "pyseismic-lsr", "qdrant_edge": "qdrant-edge-py", "faiss": "faiss-cpu"}
"""What is imported, and where it comes from."""

UPSERT = 1_000
"""Documents that Qdrant takes at a time."""


class Engine(Protocol):
    """An index, and the search in it by a query's terms and weights, or by its dense vector."""

    def search(self, query: Any, k: int) -> list[int]:
        """Positions of the best ``k`` documents or fewer, best first."""

    def size(self) -> int:
        """Bytes of the index."""


class Seismic:
    """Blocks of similar documents with summaries, by sentence-transformers' public function; weights in float16."""

    name = "Seismic"

    def __init__(self, documents: Embeddings):
        package("seismic")
        self.words = [str(term) for term in range(documents.dim)]
        corpus = [self._decoded(query) for query in rows_of(documents)]
        settings = {
            "n_postings": N_POSTINGS,
            "max_fraction": MAX_FRACTION,
            "summary_energy": SUMMARY_ENERGY,
            "num_threads": 1,
        }
        options: dict[str, Any] = {"index_kwargs": settings, "search_kwargs": self._pruning(), "output_index": True}
        *_, self.index = semantic_search_seismic(corpus[:1], corpus, **options)

    def search(self, query: tuple[np.ndarray, np.ndarray], k: int) -> list[int]:
        """See :class:`Engine`."""
        options: dict[str, Any] = {"corpus_index": self.index, "top_k": k, "search_kwargs": self._pruning()}
        found = semantic_search_seismic([self._decoded(query)], **options)[0][0]
        return [hit["corpus_id"] for hit in found]

    def size(self) -> int:
        """See :class:`Engine`; the vectors, the lists and the summaries in a file."""
        with tempfile.TemporaryDirectory(prefix="polyrep-") as folder:
            self.index.save(f"{folder}/saved")
            return Path(folder, "saved.index.seismic").stat().st_size

    def _decoded(self, query: tuple[np.ndarray, np.ndarray]) -> list[tuple[str, float]]:
        """Pairs of word and weight; the words are numbers, of which no two could be the same text."""
        return [(self.words[term], weight) for term, weight in zip(*(part.tolist() for part in query), strict=True)]

    def _pruning(self) -> dict[str, Any]:
        return {"query_cut": QUERY_CUT, "heap_factor": HEAP_FACTOR, "n_knn": N_KNN, "num_threads": 1}


class Qdrant:
    """An inverted index that finds exactly the best, by Qdrant's engine in this process."""

    name = "Qdrant"

    def __init__(self, documents: Embeddings):
        self.edge = edge = package("qdrant_edge")
        half = documents.values.dtype == np.float16  # as many bits as the weights have
        kind = edge.VectorStorageDatatype.Float16 if half else edge.VectorStorageDatatype.Float32
        config = edge.EdgeConfig(
            sparse_vectors={"words": edge.EdgeSparseVectorParams(datatype=kind)},
            # From one kilobyte on, `optimize` makes the index that a server would make of a large collection.
            optimizers=edge.EdgeOptimizersConfig(indexing_threshold=1, default_segment_number=1),
            max_search_threads=1,
            wal_enabled=False,  # a log for crashes is no part of an index
        )
        self.folder = Path(tempfile.mkdtemp(prefix="polyrep-"))
        self.shard = edge.EdgeShard.create(str(self.folder), config)
        weakref.finalize(self, _dispose, self.shard, self.folder)
        points = [
            edge.Point(position, {"words": self._vector(document)})
            for position, document in enumerate(rows_of(documents))
        ]
        for start in range(0, len(points), UPSERT):
            self.shard.update(edge.UpdateOperation.upsert_points(points[start : start + UPSERT]))
        self.shard.optimize()
        self.shard.flush()

    def search(self, query: tuple[np.ndarray, np.ndarray], k: int) -> list[int]:
        """See :class:`Engine`."""
        nearest = self.edge.Query.Nearest(self._vector(query), using="words")
        return [hit.id for hit in self.shard.query(self.edge.QueryRequest(limit=k, query=nearest))]

    def size(self) -> int:
        """See :class:`Engine`; the vectors and the lists in files, which are made larger than what is in them."""
        return sum(512 * file.stat().st_blocks for file in self.folder.rglob("*") if file.is_file())

    def _vector(self, row: tuple[np.ndarray, np.ndarray]) -> Any:
        return self.edge.SparseVector(*(part.tolist() for part in row))


class Flat:
    """The plain alternative that a user of the dense vectors has: FAISS compares the query with every document."""

    name = "dense, FAISS flat"

    def __init__(self, documents: np.ndarray):
        self.faiss = package("faiss")
        self.faiss.omp_set_num_threads(1)
        self.index = self.faiss.IndexFlatIP(documents.shape[1])
        self.index.add(np.ascontiguousarray(documents, np.float32))

    def search(self, query: np.ndarray, k: int) -> list[int]:
        """See :class:`Engine`."""
        return [position for position in self.index.search(query[None], k)[1][0].tolist() if position >= 0]

    def size(self) -> int:
        """See :class:`Engine`; serialized."""
        return self.faiss.serialize_index(self.index).nbytes


class TwoStages:
    """Candidates by a query's own words from an engine, then the best of them by the exact scores of all its words."""

    def __init__(self, engine: Engine, documents: csr_matrix, depth: int = DEPTH):
        self.engine, self.documents, self.depth = engine, documents, depth

    def search(self, query: tuple[tuple[np.ndarray, np.ndarray], csr_matrix], k: int) -> list[int]:
        """See :class:`Engine`; a query is its own terms and weights, and ``(1, vocabulary)`` with all of them."""
        own, whole = query
        candidates = np.array(self.engine.search(own, self.depth), np.int64)
        scores = rescore(whole, self.documents, candidates[None])[0]
        return candidates[np.argsort(-scores, kind="stable")[:k]].tolist()

    def size(self) -> int:
        """See :class:`Engine`; beside the vectors for the scores."""
        return self.engine.size()


def measure(
    queries: Embeddings,
    unexpanded: Embeddings,
    documents: Embeddings,
    dense_queries: np.ndarray,
    dense_documents: np.ndarray,
    sizes: tuple[int, ...] = SIZES,
    *,
    dataset: str = "vectors",
    split: str = "test",
    repeats: int = 3,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Build each index at each size and search it, in one and in two stages.

    Args:
        queries: Sparse vectors of the queries, all words.
        unexpanded: The same queries with no other words than their own, for the first of two stages.
        documents: Sparse vectors of the documents.
        dense_queries: ``(queries, dim)`` in float32.
        dense_documents: ``(documents, dim)`` likewise.
        sizes: How many documents to search in.
        dataset: Its name in the rows.
        split: Likewise.
        repeats: How often each query is timed; the least counts.
        seed: Of the noise on copies.

    Returns:
        Rows of a results file: for each size and system the share of queries whose top 10 is the exact one, the share
        of the exact top 10 that is found, milliseconds per query, megabytes (10^6) and seconds to build.

    Raises:
        InputError: Queries or documents are not as many in one form as in the other, a size is less than the top, or
            an engine is not installed.
    """
    _refuse_uneven("queries", sparse=len(queries), unexpanded=len(unexpanded), dense=len(dense_queries))
    _refuse_uneven("documents", sparse=len(documents), dense=len(dense_documents))
    if min(sizes) < TOP:
        raise InputError(f"measure: {min(sizes)} documents have no top {TOP}. Use sizes of {TOP} or more.")
    for name in PACKAGES:  # an hour's run shall not end at the last of them
        package(name)
    rows: list[dict[str, Any]] = []
    for size in sizes:
        copies = max(0, size - len(documents))
        note = f", {copies:,} of them replicated with noise" if copies else ""
        base = {"dataset": f"{dataset}, {size:,} documents{note}", "split": split, "queries": len(queries)}
        for row in (
            *_sparse_rows(queries, unexpanded, replicated(documents, size, seed), repeats),
            *_dense_rows(dense_queries, replicated_dense(dense_documents, size, seed), repeats),
        ):
            rows.append(base | {"documents": size, "replicated_with_noise": copies} | row)
    return rows


def _sparse_rows(
    queries: Embeddings, unexpanded: Embeddings, documents: Embeddings, repeats: int
) -> list[dict[str, Any]]:
    """Rows of exact search, and of each engine in one and in two stages."""
    asked, kept = (sparse_rows(side, 0, len(side), "dot") for side in (queries, documents))
    exact, _ = exact_search(queries, documents, np.arange(len(documents)), similarity="dot", k=TOP)
    best = rescore(asked, kept, exact)
    costs = costs_of(queries, documents)
    costs["bytes"] = sum(array.nbytes for array in (kept.data, kept.indices, kept.indptr))
    costs["unexpanded_active_dims"] = float(unexpanded.lengths.mean())
    rows = _rows("sparse, exact search", {"MB": costs["bytes"] / 1e6}, **costs)
    for kind in (Seismic, Qdrant):
        engine, cost = _built(kind, documents)
        found, ms = _timed(engine, rows_of(queries), repeats)
        values = agreement(rescore(asked, kept, found), best) | {"ms per query": ms} | cost
        rows += _rows(f"sparse, {kind.name}", values, bytes=engine.size())
        found, ms = _timed(TwoStages(engine, kept), list(zip(rows_of(unexpanded), asked, strict=True)), repeats)
        values = agreement(rescore(asked, kept, found), best) | {"ms per query": ms}
        rows += _rows(f"sparse, {kind.name}, two stages", values, candidates=DEPTH)
    return rows


def _dense_rows(queries: np.ndarray, documents: np.ndarray, repeats: int) -> list[dict[str, Any]]:
    """Rows of FAISS, whose top 10 is checked against exact search in the dense vectors."""
    sides = [in_memory(side) for side in (queries, documents)]
    exact, _ = exact_search(*sides, np.arange(len(documents)), similarity="dot", k=TOP)
    engine, cost = _built(Flat, documents)
    found, ms = _timed(engine, list(np.ascontiguousarray(queries, np.float32)), repeats)
    scores, best = (np.einsum("qd,qkd->qk", queries, documents[chosen], dtype=np.float64) for chosen in (found, exact))
    values = agreement(scores, best) | {"ms per query": ms} | cost
    return _rows(Flat.name, values, bytes=engine.size(), bytes_per_document=4.0 * documents.shape[1])


def rescore(queries: csr_matrix, documents: csr_matrix, candidates: np.ndarray) -> np.ndarray:
    """Exact inner products of each query with some documents, in float64 and all documents of a query at once.

    Args:
        queries: ``(queries, vocabulary)``.
        documents: ``(documents, vocabulary)``.
        candidates: ``(queries, candidates)`` positions of documents; -1 where a query has no more of them.

    Returns:
        ``(queries, candidates)``, minus infinity where there is no candidate.
    """
    scores = np.full(candidates.shape, -np.inf)
    for row, chosen in enumerate(candidates):
        query = queries[row].toarray()[0].astype(np.float64)  # (vocabulary,)
        scores[row, chosen >= 0] = documents[chosen[chosen >= 0]] @ query
    return scores


def agreement(found: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """How far what was found is what should have been; documents whose scores tie count as equal.

    Args:
        found: ``(queries, k)`` true scores of the documents that an engine found; minus infinity where it found none.
        exact: ``(queries, k)`` scores of the best documents.

    Returns:
        The share of queries with nothing but the best, and the share of the best that was found.
    """
    best = -np.sort(-exact)
    # Engines leave out documents without a common word, whose score is 0.
    ours = -np.sort(-np.where(np.isinf(found), 0, found))
    slack = TIE * np.abs(best)
    same = (np.abs(ours - best) <= slack).all(1)
    recall = ours >= best[:, -1:] - slack[:, -1:]
    return {"top 10 exact": float(same.mean()), "recall of top 10": float(recall.mean())}


def replicated(documents: Embeddings, count: int, seed: int) -> Embeddings:
    """``count`` documents: those given, in turn, and after them noisy copies of them, as often as it takes.

    Each weight of a copy is multiplied by a log-normal number, and a share of its words gives way to words of one
    other document with their weights there, so that copies are near to each other but no duplicates.

    Args:
        documents: Sparse vectors, at least two if there are to be copies.
        count: How many to make.
        seed: Of the noise.

    Raises:
        InputError: Copies of a single document are asked for.
    """
    total = len(documents)
    if count > total < 2:
        raise InputError(f"replicated: {total} document cannot make {count:,} that differ. Pass two or more.")
    assert documents.offsets is not None and documents.indices is not None
    rng = np.random.default_rng(seed)
    source = np.arange(count) % total
    other = (source + rng.integers(1, max(total, 2), count)) % total  # never the document itself
    lengths = documents.lengths[source]
    row = np.repeat(np.arange(count), lengths)  # (active words of all,)
    entry = np.arange(len(row)) + np.repeat(documents.offsets[source] - np.cumsum(lengths) + lengths, lengths)
    copied = row >= total
    swapped = copied & (rng.random(len(row)) < SWAPPED) & (documents.lengths[other[row]] > 0)
    drawn = (rng.random(len(row)) * documents.lengths[other[row]]).astype(np.int64)
    entry = np.where(swapped, documents.offsets[other[row]] + drawn, entry)
    factor = np.where(copied, rng.lognormal(0, WEIGHT_NOISE, len(row)), 1)
    values = (documents.values[entry] * factor).astype(documents.values.dtype)
    # In order of document and word, and a word that the swap brought in again only once.
    key, place = np.unique(row * documents.dim + documents.indices[entry], return_index=True)
    offsets = np.searchsorted(key, np.arange(count + 1) * documents.dim)
    indices = (key % documents.dim).astype(documents.indices.dtype)
    return replace(documents, values=values[place], indices=indices, offsets=offsets)


def replicated_dense(documents: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The same for dense vectors ``(documents, dim)``: copies with Gaussian noise, as long as what they copy."""
    rng = np.random.default_rng(seed)
    made = documents[np.arange(count) % len(documents)].astype(np.float32)
    copies = made[len(documents) :]
    length = np.linalg.norm(copies, axis=1, keepdims=True)
    noise = rng.standard_normal(copies.shape, np.float32) * (DENSE_NOISE / np.sqrt(documents.shape[1]))
    copies += noise * length
    copies *= length / np.linalg.norm(copies, axis=1, keepdims=True)
    return made


def rows_of(embeddings: Embeddings) -> list[tuple[np.ndarray, np.ndarray]]:
    """Terms and weights of each text."""
    assert embeddings.offsets is not None and embeddings.indices is not None
    bounds = embeddings.offsets[1:-1]
    return list(zip(np.split(embeddings.indices, bounds), np.split(embeddings.values, bounds), strict=True))


def load_vectors(args: argparse.Namespace) -> tuple[Embeddings, Embeddings, Embeddings, np.ndarray, np.ndarray]:
    """What :func:`measure` takes, by a trained head: queries, unexpanded queries, documents, and both sides dense.

    Args:
        args: ``head`` and ``backbone``, folders of the head and of its dense encoder; ``dataset``, that of images
            with captions, all of which are searched in; ``queries``, how many captions of test ask.

    Raises:
        InputError: A folder is not there.
    """
    for name in ("head", "backbone", "dataset"):
        if not Path(getattr(args, name)).is_dir():
            raise InputError(
                f"{getattr(args, name)}: not found, so there is nothing to search in. Pass --{name} FOLDER."
            )
    head = AutoModel.from_pretrained(args.head).eval()
    model = load(args.backbone, dtype=fastest_dtype("auto"))
    sides = {
        split: encode_dataset(model, load_retrieval_dataset(args.dataset, split), cache_dir=".cache/embeddings")
        for split in ("test", "dev", "train")
    }
    captions = sides["test"][0]
    chosen = np.linspace(0, len(captions) - 1, args.queries).astype(int)
    images = [with_head(head, side, "document") for _, side in sides.values()]
    dense = [np.asarray(side.embeddings.values, np.float32) for _, side in sides.values()]
    asked = [rows_at(with_head(head, captions, "query", expand=expand), chosen) for expand in (True, False)]
    return (*asked, joined(images), np.asarray(captions.embeddings.values[chosen], np.float32), np.concatenate(dense))


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head", default="models/dense2sparse-mobilenet-minilm/head")
    parser.add_argument("--backbone", default="models/dual-encoder-mobilenet-minilm/final")
    parser.add_argument("--dataset", required=True, help="folder of images with captions, or of their features")
    parser.add_argument("--output", type=Path, help="folder for dense2sparse-search.json and .md")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="how many documents to search in")
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    name, seed = Path(args.dataset).name, 0
    rows = measure(*load_vectors(args), tuple(args.sizes), dataset=name, repeats=args.repeats, seed=seed)
    claims = [
        {
            "claim": f"dense2sparse.{kind.name.lower()}_top10_exact_{row['documents']}",
            "value": row["value"],
            "target": TARGET,
            "met": row["value"] >= TARGET,
        }
        for kind in (Seismic, Qdrant)
        for row in rows
        if row["system"] == f"sparse, {kind.name}" and row["metric"] == "top 10 exact" and row["documents"] <= 10_000
    ]
    results = provenance(shlex.join(["python", *sys.argv])) | {
        "name": "dense2sparse-search",
        "seeds": [seed],
        "settings_tried": 1,
        "models": {"dense2sparse": fingerprint(Path(args.head))},
        "rows": rows,
        "claims": claims,
        "drawn": [],
    }
    for installed in PACKAGES.values():
        results["versions"][installed] = importlib.metadata.version(installed)
    print(write_results(results, args.output))


def _rows(system: str, values: dict[str, float], **more: Any) -> list[dict[str, Any]]:
    return [{"system": system, "metric": metric, "value": value} | more for metric, value in values.items()]


def _built(kind: Callable[[Any], Any], documents: Any) -> tuple[Any, dict[str, float]]:
    started = time.perf_counter()
    engine = kind(documents)
    seconds = time.perf_counter() - started
    return engine, {"MB": engine.size() / 1e6, "seconds to build": seconds}


def _timed(engine: Any, queries: list[Any], repeats: int) -> tuple[np.ndarray, float]:
    """Positions ``(queries, TOP)``, -1 where there are fewer, and the median over queries of their least time (ms)."""
    found = np.full((len(queries), TOP), -1)
    for row, query in enumerate(queries):  # also warms up
        hits = engine.search(query, TOP)
        found[row, : len(hits)] = hits
    seconds = np.empty((repeats, len(queries)))
    for repeat in range(repeats):
        for row, query in enumerate(queries):
            started = time.perf_counter()
            engine.search(query, TOP)
            seconds[repeat, row] = time.perf_counter() - started
    return found, 1000 * float(np.median(seconds.min(0)))


def _dispose(shard: Any, folder: Path) -> None:
    shard.close()
    shutil.rmtree(folder, ignore_errors=True)


def _refuse_uneven(what: str, **counts: int) -> None:
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count:,} {name}" for name, count in counts.items())
        raise InputError(f"measure: {what} differ in number: {found}. Pass the same {what} in each form.")


if __name__ == "__main__":
    main()
