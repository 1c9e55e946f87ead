"""What each representation costs in each engine as a corpus grows: bytes, seconds to build, milliseconds, recall.

python benchmarks/search.py --output results

The documents of several real data sets are one corpus in a seeded order; beyond them, documents are replicated with
noise on their vectors, and rows say so. Heads are those of the shipped runs, trained before. What is timed is one
query alone, from its vectors to ids and scores. Recall is against exact search by the same vectors, and of two stages
against full MaxSim. Finished rows are kept, and a run that was interrupted goes on.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dense2sparse_search import replicated
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import AutoModel, HfArgumentParser

from polyrep.data import load_retrieval_dataset
from polyrep.encoding import Embeddings, embed
from polyrep.encoding.embeddings import in_memory, joined, rows
from polyrep.encoding.shards import Origin, Shard
from polyrep.evaluation.frontier.pooling import pooled
from polyrep.files import read_json
from polyrep.hub import fetch, fingerprint, load
from polyrep.hub.folder import fastest_dtype
from polyrep.methods import LemurPooling
from polyrep.methods.dense2sparse.frontier import pruned, with_head
from polyrep.methods.reinpool.frontier import by_head
from polyrep.report import provenance, write_results
from polyrep.search import Index, open_index
from polyrep.training.vectors import encode_dataset

TOP = 10
SHARD = 2048
NOISE = 0.1
"""Length of the noise on a unit vector of a copy."""

SPAN = {"dense": 200, "several": 50}
"""Queries that are timed at most; those of several vectors take seconds each in a large corpus."""

PATIENCE = 60.0
"""Seconds after which no further query is timed, if ten have been."""

STAGES = ("LEMUR", "full multi-vector")
"""Finds candidates, and ranks them anew."""

ENGINES = {
    "sentence": {"exact": "memory:", "FAISS flat": "faiss://{}?index=flat", "FAISS HNSW": "faiss://{}?index=hnsw"},
    "sparse": {"exact": "memory:", "Seismic": "seismic://{}"},
    "tokens": {"exact": "memory:"},
}
"""Beside Qdrant, which takes all of them."""

KINDS = {"sparse": "sparse", "full multi-vector": "tokens", "ReinPool, 8": "tokens"}
"""Of representations that are not one vector."""

COLOURS = {
    "dense": "#4269d0",
    "Gaussian": "#efb118",
    "sparse": "#ff725c",
    "full multi-vector": "#6b6b6b",
    "ReinPool, 1": "#a463f2",
    "ReinPool, 8": "#9c6b4e",
    "LEMUR": "#3ca951",
    "two stages": "#97bbf5",
}


@dataclass
class Arguments:
    """What to measure."""

    datasets: list[str] = field(default_factory=lambda: ["tldr_pages", "scitldr", "scifact"])
    sizes: list[int] = field(default_factory=lambda: [1_000, 10_000, 100_000])
    backbone: str = field(
        default="models/four/late-interaction-minilm/final", metadata={"help": "Of several vectors."}
    )
    models: str = field(default="models/tldr", metadata={"help": "Folder of the shipped runs' outputs."})
    cache_dir: str = ".cache"
    systems: list[str] = field(default_factory=list, metadata={"help": "Only these representations."})
    time_budget: float = field(default=0.0, metadata={"help": "Seconds after which no row is begun; 0: none."})
    output: str | None = None


@dataclass
class Representation:
    """One form of all documents and queries.

    Attributes:
        name: In the table.
        kind: As in :class:`polyrep.encoding.shards.Origin`.
        similarity: Likewise.
        queries: Vectors of the queries.
        documents: Of the real documents, in the order of the pool.
        head: What documents go through once copies have noise, for vectors that no noise of one length would fit.
    """

    name: str
    kind: Any
    similarity: str
    queries: Embeddings
    documents: Embeddings
    head: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def origin(self) -> Origin:
        """What an index is told."""
        return Origin(self.name, self.kind, self.documents.dim, self.similarity, "")

    def shards(self, size: int, ids: list[str]) -> Iterator[Shard]:
        """The first ``size`` documents; copies come with noise."""
        whole = replicated(self.documents, size, 0) if self.kind == "sparse" and size > len(self.documents) else None
        real = len(self.documents)
        for start in range(0, size, SHARD):
            places = np.arange(start, min(start + SHARD, size))
            part = rows(whole or self.documents, places if whole else places % real)
            part = noisy(part, places >= real, start)
            if self.head is not None:
                part = in_memory(self.head(part.values))
            yield Shard(ids[start : start + SHARD], part, self.origin)


def noisy(part: Embeddings, copies: np.ndarray, seed: int) -> Embeddings:
    """Vectors of which those of copies have noise on them, at the length that they had."""
    if part.kind == "sparse" or not copies.any():
        return part
    moved = np.repeat(copies, part.lengths) if part.offsets is not None else copies
    values = np.array(part.values, np.float32)
    draw = np.random.default_rng(seed)
    length = np.linalg.norm(values[moved], axis=1, keepdims=True)
    noise = draw.standard_normal((moved.sum(), part.dim), np.float32) * (NOISE / part.dim**0.5)
    found = values[moved] + noise * length
    values[moved] = found * length / np.linalg.norm(found, axis=1, keepdims=True).clip(1e-9)
    return replace(part, values=values.astype(np.float16))


class Corpus:
    """Real documents and queries of several data sets, in every representation."""

    def __init__(self, args: Arguments):
        self.args = args
        self.datasets = [load_retrieval_dataset(path, "test") for path in args.datasets]
        self.options: dict[str, Any] = {"cache_dir": f"{args.cache_dir}/embeddings"}
        documents = sum(len(dataset.corpus) for dataset in self.datasets)
        queries = sum(len(dataset.queries) for dataset in self.datasets)
        draw = np.random.default_rng(0)
        self.order, self.asked = draw.permutation(documents), np.sort(draw.permutation(queries)[: SPAN["dense"]])
        real = [f"{dataset.name}/{i}" for dataset in self.datasets for i in dataset.corpus]
        real = [real[place] for place in self.order]
        self.ids = [f"{real[n % documents]}#{n // documents}" for n in range(max(args.sizes))]
        self.real = documents

    @cached_property
    def sentences(self) -> list[tuple[Any, Any]]:
        """Sides of each data set by MiniLM, with the texts' words."""
        model = load("minilm", dtype=fastest_dtype("auto"))
        return [encode_dataset(model, dataset, **self.options) for dataset in self.datasets]

    @cached_property
    def tokens(self) -> Representation:
        """The full model."""
        model = load(self.args.backbone, dtype=fastest_dtype("auto"))
        queries, documents = [], []
        for dataset in self.datasets:
            queries.append(embed(model, dataset.queries, task="query", name=f"{dataset.name}-test", **self.options))
            documents.append(embed(model, dataset.corpus, task="document", name=dataset.name, **self.options))
        return self._made("full multi-vector", "tokens", "maxsim", queries, documents)

    def head(self, run: str) -> Path:
        """Folder of a trained head."""
        return fetch(f"{self.args.models}/{run}/head")

    @torch.inference_mode()
    def make(self, name: str) -> Representation:
        """A representation by its name in the table."""
        if name == "full multi-vector":
            return self.tokens
        if name == "dense":
            sides = [[side.embeddings for side in pair] for pair in self.sentences]
            return self._made(name, "sentence", "cosine", *zip(*sides, strict=True))
        if name == "Gaussian":
            head = AutoModel.from_pretrained(self.head("gaussian-minilm-frozen")).eval()

            @torch.inference_mode()
            def index(vectors: np.ndarray, task: str = "document") -> np.ndarray:
                embeddings = torch.from_numpy(np.array(vectors, np.float32))
                return head(embeddings, task=task).sentence_embedding.half().numpy()

            dense = self.make("dense")
            queries = in_memory(index(dense.queries.values, "query"))
            return replace(dense, name=name, similarity="dot", queries=queries, head=index)
        if name == "sparse":
            head = AutoModel.from_pretrained(self.head("dense2sparse-minilm")).eval()
            most = {task: getattr(head.config, f"{task}_top_k") for task in TASKS}  # which with_head switches off
            sides = [
                [pruned(with_head(head, side, task), most[task]) for side, task in zip(pair, TASKS, strict=True)]
                for pair in self.sentences
            ]
            return self._made(name, "sparse", "dot", *zip(*sides, strict=True))
        if name.startswith("ReinPool"):
            head = AutoModel.from_pretrained(self.head("reinpool-minilm")).eval()
            number = int(name.partition(", ")[2])
            documents = pooled(self.tokens.documents, by_head(head, [number]))[number]
            if number > 1:
                return replace(self.tokens, name=name, documents=documents)
            # With one vector a document, MaxSim is the inner product with the sum of the query's vectors.
            asked = self.tokens.queries
            summed = np.add.reduceat(asked.values, asked.offsets[:-1])  # type: ignore[index]
            return Representation(name, "sentence", "dot", in_memory(summed), in_memory(documents.values))
        head = LemurPooling.from_pretrained(str(self.head("lemur-minilm"))).model.eval()
        queries = head.encode_query_tokens(self.tokens.queries.values, self.tokens.queries.offsets)
        documents = head.encode_document_tokens(self.tokens.documents.values, self.tokens.documents.offsets)
        return Representation(name, "sentence", "dot", in_memory(queries.numpy()), in_memory(documents.half().numpy()))

    def _made(self, name: str, kind: str, similarity: str, queries: Any, documents: Any) -> Representation:
        """Put the data sets under one another, in the order of the pool."""
        asked, found = rows(joined(list(queries)), self.asked), rows(joined(list(documents)), self.order)
        if kind != "sparse":
            asked, found = (
                replace(side, values=np.asarray(side.values, t)) for side, t in ((asked, "f4"), (found, "f2"))
            )
        return Representation(name, kind, similarity, asked, found)


TASKS = ("query", "document")


class Table:
    """Finished rows, kept in a file."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = (
            [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
        )

    def has(self, system: str, size: int) -> bool:
        """Whether this was measured."""
        return any((row["system"], row["documents"]) == (system, size) for row in self.rows)

    def add(self, system: str, size: int, **figures: float) -> None:
        """Keep a row, unless it is kept already."""
        if self.has(system, size):
            return
        row = {"system": system, "documents": size} | figures
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


def measure(args: Arguments, table: Table) -> None:
    """Every row that is not there yet."""
    corpus, started = Corpus(args), time.perf_counter()
    for name in tqdm(args.systems or [n for n in COLOURS if n != "two stages"], desc="representations"):
        engines = {**ENGINES[KINDS.get(name, "sentence")], "Qdrant": "qdrant://{}"}
        missing = [s for s in args.sizes if not all(table.has(f"{name}, {engine}", s) for engine in engines)]
        made = corpus.make(name) if missing else None
        for size in missing:
            assert made is not None
            if args.time_budget and time.perf_counter() - started > args.time_budget:
                return
            exact = measured(corpus, made, size, "memory:", table, f"{name}, exact", [])
            for engine, uri in list(engines.items())[1:]:
                if not table.has(f"{name}, {engine}", size):
                    first = corpus.make(STAGES[0]) if (name, engine) == (STAGES[1], "Qdrant") else None
                    measured(corpus, made, size, uri, table, f"{name}, {engine}", exact, first)


def measured(
    corpus: Corpus,
    made: Representation,
    size: int,
    uri: str,
    table: Table,
    system: str,
    exact: list[list[str]],
    first: Representation | None = None,
) -> list[list[str]]:
    """Build an index, search it, and keep the row; returns what was found.

    Args:
        corpus: The corpus.
        made: What to put into the index.
        size: How many documents.
        uri: Of the index, with a place for its folder.
        table: Where rows go.
        system: Name of the row.
        exact: What should be found; empty for the oracle itself.
        first: Vectors of a first stage, to be added to the same index after it was measured.
    """
    folder = Path(tempfile.mkdtemp(prefix="polyrep-")) / "index"
    note = {"replicated_with_noise": max(0, size - corpus.real)}
    most = SPAN["several" if made.kind == "tokens" else "dense"]
    try:
        index = open_index(uri.format(folder))
        started = time.perf_counter()
        index.add(made.shards(size, corpus.ids))
        asked = [rows(made.queries, np.array([n])) for n in range(min(most, len(made.queries)))]
        index.search(asked[0], TOP)  # what is built at the first search belongs to the build
        seconds = time.perf_counter() - started
        if not exact:  # all at once: the oracle is quicker so
            exact = [[hit.id for hit in hits] for hits in index.search(rows(made.queries, np.arange(len(asked))), TOP)]
        found, ms = timed(index, asked)
        kept = {"bytes": occupied(folder) if folder.exists() else in_arrays(made, size), "build_seconds": seconds}
        row = {"recall": recalled(found, exact)} | quantiles(ms) | kept | note
        if first is not None:
            started = time.perf_counter()
            index.add(first.shards(size, corpus.ids))
            both = [{first.name: rows(first.queries, np.array([n])), made.name: a} for n, a in enumerate(asked)]
            index.search(both[0], TOP)
            seconds += time.perf_counter() - started
            found, ms = timed(index, both)
            kept = {"bytes": occupied(folder), "build_seconds": seconds}
            table.add("two stages, Qdrant", size, recall=recalled(found, exact), **quantiles(ms), **kept, **note)
        table.add(system, size, **row)  # last: with it, this index is done
        getattr(index, "close", lambda: None)()
    finally:
        shutil.rmtree(folder.parent)
    return exact


def timed(index: Index, asked: list[Any]) -> tuple[list[list[str]], list[float]]:
    """What each query finds, and its milliseconds; no further one is asked once patience is over."""
    found, ms, begun = [], [], time.perf_counter()
    for queries in asked:
        started = time.perf_counter()
        hits = index.search(queries, TOP)[0]
        ms.append(1000 * (time.perf_counter() - started))
        found.append([hit.id for hit in hits])
        if len(ms) >= 10 and time.perf_counter() - begun > PATIENCE:
            break
    return found, ms


def quantiles(ms: list[float]) -> dict[str, float]:
    """Median and 99th percentile, and of how many."""
    return {"ms_p50": float(np.median(ms)), "ms_p99": float(np.percentile(ms, 99)), "queries": len(ms)}


def recalled(found: list[list[str]], exact: list[list[str]]) -> float:
    """Mean share of the exact best that was found."""
    return float(np.mean([len({*ours} & {*best}) / len(best) for ours, best in zip(found, exact, strict=False)]))


def occupied(folder: Path) -> int:
    """Bytes on disk; engines make files larger than what is in them."""
    return sum(512 * file.stat().st_blocks for file in folder.rglob("*") if file.is_file())


def in_arrays(made: Representation, size: int) -> int:
    """Bytes of the vectors alone, as if copies were as long as what they copy."""
    arrays = (made.documents.values, made.documents.indices, made.documents.offsets, made.documents.sentences)
    whole = sum(array.nbytes for array in arrays if array is not None)
    return round(whole * size / len(made.documents))


METRICS = {
    "recall": "recall@10 of exact search",
    "ms_p50": "ms per query, p50",
    "ms_p99": "ms per query, p99",
    "bytes": "MB",
    "build_seconds": "seconds to build",
}


def report_rows(table: Table) -> list[dict[str, Any]]:
    """Rows of the results file."""
    found = []
    for row in sorted(table.rows, key=lambda row: row["documents"]):
        copies = (
            f", {row['replicated_with_noise']:,} of them replicated with noise" if row["replicated_with_noise"] else ""
        )
        base = {"dataset": f"pooled, {row['documents']:,} documents{copies}", "split": "test", **row}
        per = {"bytes_per_document": row["bytes"] / row["documents"]}
        found += [
            base | per | {"metric": metric, "value": row[key] / (1e6 if key == "bytes" else 1)}
            for key, metric in METRICS.items()
        ]
    return found


def draw(results: dict[str, Any], path: Path) -> None:
    """Growth of milliseconds and bytes, a line for each system, by representation and engine."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots(1, 2)
    styles = {"exact": ":", "FAISS flat": "--", "FAISS HNSW": "-.", "Qdrant": "-", "Seismic": "-."}
    shown: dict[str, dict[int, dict[str, float]]] = {}
    for row in results["rows"]:
        shown.setdefault(row["system"], {})[row["documents"]] = row
    for system, by_size in shown.items():
        name, _, engine = system.rpartition(", ")
        sizes = sorted(by_size)
        for axis, key, scale in ((axes[0], "ms_p50", 1), (axes[1], "bytes", 1e-6)):
            if key == "bytes" and engine not in ("Qdrant", "Seismic"):
                continue
            values = [by_size[size][key] * scale for size in sizes]
            axis.plot(sizes, values, styles[engine], color=COLOURS[name], marker="o", ms=3, lw=1.4)
    for axis, title in ((axes[0], "ms per query (median)"), (axes[1], "MB on disk")):
        axis.set(xscale="log", yscale="log", xlabel="documents", title=title)
        axis.grid(alpha=0.25)
    lines = [axes[1].plot([], [], color=colour, lw=2, label=name)[0] for name, colour in COLOURS.items()]
    lines += [axes[1].plot([], [], style, color="black", label=engine)[0] for engine, style in styles.items()]
    figure.legend(handles=lines, loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, and write the results once every row is there."""
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]  # type: ignore[arg-type]
    folders = [args.backbone, *(f"{args.models}/{run}/head" for run in RUNS)]
    models = {folder: fingerprint(fetch(folder)) for folder in folders}
    key = {"models": models, "arguments": {k: v for k, v in asdict(args).items() if k in ("datasets", "sizes")}}
    path = Path(args.cache_dir) / "search" / "rows.jsonl"
    if read_json(path.with_name("key.json")) != key:
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name("key.json").write_text(json.dumps(key), encoding="utf-8")
    table = Table(path)
    measure(args, table)
    results = provenance(shlex.join(["python", *sys.argv])) | {
        "name": "search",
        "seeds": [0],
        "settings_tried": 1,
        "models": models,
        "rows": report_rows(table),
        "claims": claims(table),
        "axis": "ms_p50",
        "notes": [
            "Bytes are what the files occupy; of exact search, which keeps none, those of the vectors.",
            "Qdrant is the engine in this process (qdrant-edge-py). All engines use the threads that they like.",
            "The noise on copies is drawn anew for each representation, also for the two of two stages.",
            "Seconds to build include drawing that noise, and for Gaussian its head. Of fewer than 100 queries the "
            "99th percentile is about the largest.",
        ],
    }
    picture: Callable[[dict[str, Any], Path], None] = draw
    print(write_results(results, Path(args.output) if args.output else None, picture))


RUNS = ("gaussian-minilm-frozen", "dense2sparse-minilm", "reinpool-minilm", "lemur-minilm")


def claims(table: Table) -> list[dict[str, Any]]:
    """Recall of the engines in the largest corpus."""
    largest = max((row["documents"] for row in table.rows), default=0)
    return [
        {
            "claim": f"search.recall10_{row['system'].lower().replace(', ', '_').replace(' ', '_')}_{largest}",
            "value": row["recall"],
            "target": None,
            "met": None,
        }
        for row in table.rows
        if row["documents"] == largest and not row["system"].endswith("exact")
    ]


if __name__ == "__main__":
    main()
