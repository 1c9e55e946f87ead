"""What unit length, L2 and quantization do to Gaussian and LEMUR, with and without the number that evens out lengths.

    python benchmarks/equal_norms.py --output results

One head a method and set. Its vectors are searched as they are, and without their last number, which is what a head
with ``--equal_norms false`` would give but for one dimension; that head is fitted too. Nothing is chosen here.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from bench import ROOT, code_of
from sentence_transformers.util import quantize_embeddings
from tqdm import tqdm
from transformers import HfArgumentParser

from polyrep.cli import train as train_run
from polyrep.data import RetrievalDataset, load_retrieval_dataset
from polyrep.encoding import Embeddings, embed
from polyrep.encoding.embeddings import in_memory
from polyrep.evaluation.frontier.rows import Encoded, quantized
from polyrep.evaluation.systems import Ranking, costs_of
from polyrep.evaluation.table import table_rows
from polyrep.hub import fetch, fingerprint, load
from polyrep.hub.folder import fastest_dtype
from polyrep.methods import GaussianHead, LemurModel
from polyrep.report import provenance, write_results
from polyrep.search import exact_search
from polyrep.search.ranking import tie_ranks

HEADS: dict[str, tuple[str, Any]] = {
    "Gaussian": ("gaussian-minilm-frozen", GaussianHead),
    "LEMUR": ("lemur-minilm", LemurModel),
}
FORMS = ("plain", "equal norms")
CODE = code_of("methods/gaussian", "methods/lemur", "training", "data")


@dataclass
class Arguments:
    """What to fit and measure."""

    datasets: list[str] = field(
        default_factory=lambda: ["tldr_pages", "scifact"], metadata={"help": "Names or BEIR folders."}
    )
    backbone: str = field(default="minilm", metadata={"help": "Backbone of Gaussian."})
    late: str = field(default="models/four/late-interaction-minilm/final", metadata={"help": "Backbone of LEMUR."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds of the fits."})
    flags: str = field(default="", metadata={"help": "Flags of the runs for every fit, e.g. '--max_steps 2'."})
    cache_dir: str = field(default=".cache", metadata={"help": "Embeddings and fitted heads."})
    output: str | None = field(default=None, metadata={"help": "Folder for the JSON and Markdown."})
    name: str = field(default="equal-norms", metadata={"help": "Name of the files."})


@dataclass
class Sides:
    """Vectors of a data set's test queries and documents by one head, float32."""

    queries: np.ndarray
    documents: np.ndarray


def fit(args: Arguments, method: str, source: str, seed: int, *flags: str) -> Any:
    """A head of the shipped run, kept under a hash of what it is made of."""
    run, backbone = HEADS[method][0], args.backbone if method == "Gaussian" else args.late
    depends = {
        "code": [hashlib.sha256(file.read_bytes()).hexdigest() for file in CODE],
        "recipe": {file.name: file.read_text() for file in sorted((ROOT / "hub_configs" / run).iterdir())},
        "flags": [*flags, *shlex.split(args.flags)],
        "backbone": fingerprint(fetch(backbone)),
        "source": source,
        "seed": seed,
    }
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(args.cache_dir) / "heads" / f"{Path(source).name}-{run}-{digest}"
    if not (folder / "training.json").is_file():
        where = ["--output_dir", str(folder), "--overwrite", "--cache_dir", f"{args.cache_dir}/embeddings"]
        what = ["--backbone", backbone, "--datasets", source, "--seed", str(seed), "--head_only", "true"]
        threads = torch.get_num_threads()
        train_run([run, *what, *where, "--save_strategy", "no", *depends["flags"]], prog="train.py")
        torch.set_num_threads(threads)
    return HEADS[method][1].from_pretrained(folder / "head").eval()


@torch.inference_mode()
def encode(head: Any, queries: Embeddings, documents: Embeddings) -> Sides:
    """What a head makes of cached vectors."""
    made = []
    for task, side in (("query", queries), ("document", documents)):
        if isinstance(head, LemurModel):
            found = getattr(head, f"encode_{task}_tokens")(side.values, side.offsets)
        else:
            found = head(torch.from_numpy(np.array(side.values, np.float32)), task=task).sentence_embedding
        made.append(found.numpy())
    return Sides(*made)


def forms(sides: Sides) -> Iterator[tuple[str, Sides]]:
    """The vectors without their last number, and with it."""
    for form, stop in zip(FORMS, (-1, None), strict=True):
        yield form, Sides(sides.queries[:, :stop], sides.documents[:, :stop])


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of unit length, as ``normalize_embeddings=True`` gives them."""
    return torch.nn.functional.normalize(torch.from_numpy(vectors), dim=1).numpy()


def signs(vectors: np.ndarray) -> np.ndarray:
    """One bit a number, as 1 and -1: their product ranks as the Hamming distance does."""
    bits = np.unpackbits(quantize_embeddings(vectors, "ubinary"), axis=1, count=vectors.shape[1])  # type: ignore[arg-type]
    return 2.0 * bits.astype(np.float32) - 1


def codes(vectors: np.ndarray, precision: Any = "int8") -> np.ndarray:
    """One byte a number, in ranges of these vectors alone, as ``encode(precision=...)`` gives them."""
    return np.asarray(quantize_embeddings(vectors, precision), np.float32)


def in_one_range(vectors: np.ndarray) -> np.ndarray:
    """One byte a number and one range for all, of 99 % of the numbers, which is what engines do by themselves."""
    low, high = np.quantile(vectors, [0.005, 0.995])
    step = (high - low) / 255
    return low + np.round((vectors.clip(low, high) - low) / step).astype(np.float32) * np.float32(step)


def searched(sides: Sides) -> Iterator[tuple[str, Encoded]]:
    """Every way to search vectors."""
    queries, documents = sides.queries, sides.documents
    yield "inner product", Encoded(in_memory(queries), in_memory(documents), "dot")
    yield "unit length", Encoded(in_memory(unit(queries)), in_memory(unit(documents)), "dot")
    yield "L2", Encoded(in_memory(queries), in_memory(documents), "euclidean")
    whole = Encoded(in_memory(queries), in_memory(documents), "dot")
    yield "int8 documents", quantized(whole, "int8")
    yield "int8 documents in one range", Encoded(in_memory(queries), in_memory(in_one_range(documents)), "dot")
    yield "int8 of both sides", Encoded(in_memory(codes(queries)), in_memory(codes(documents)), "dot")
    both = (in_memory(codes(side, "uint8")) for side in (queries, documents))
    yield "uint8 of both sides", Encoded(*both, "dot")
    yield "one bit documents", quantized(whole, "binary")
    yield "one bit of both sides", Encoded(in_memory(signs(queries)), in_memory(signs(documents)), "dot")


def graph_recall(sides: Sides, metric: int) -> float:
    """Share of the exact ten best that a graph of our default settings finds, by the same vectors and metric."""
    queries, documents = (np.ascontiguousarray(side, np.float32) for side in (sides.queries, sides.documents))
    graph = faiss.IndexHNSWFlat(documents.shape[1], 32, metric)
    graph.hnsw.efConstruction, graph.hnsw.efSearch = 200, 128
    flat = faiss.IndexFlat(documents.shape[1], metric)
    found = []
    for index in (graph, flat):
        index.add(documents)
        found.append(index.search(queries, 10)[1])
    return float((found[0][:, :, None] == found[1][:, None]).any(1).mean())


def clipped(lengths: np.ndarray, most: float) -> float:
    """Share of documents beyond ``max_norm``."""
    return float((lengths > most).mean())


def measure(args: Arguments, method: str, model: Any, source: str) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of a method on one set, and what its claims need."""
    dataset: RetrievalDataset = load_retrieval_dataset(source, "test")
    options: dict[str, Any] = {"cache_dir": f"{args.cache_dir}/embeddings", "batch_size": 32}
    documents = embed(model, dict(dataset.corpus), task="document", name=dataset.name, **options)
    queries = embed(model, dataset.queries, task="query", name=f"{dataset.name}-test", **options)
    ranks = tie_ranks(list(dataset.corpus))
    rankings, extra, seen = [], [], {"same": [], "half": [], "spread": [], "below": []}

    def ranked(system: str, encoded: Encoded) -> np.ndarray:
        sides = encoded.queries, encoded.documents
        found = exact_search(*sides, ranks, similarity=encoded.similarity, k=100, left_out=dataset.own)
        costs = encoded.costs or costs_of(encoded.queries, encoded.documents)
        if not encoded.costs:  # stored in two bytes a number, or in one where they are codes
            costs = {"bytes_per_document": encoded.documents.dim * (1 if "int8" in system else 2)}
        if "one bit" in system:
            costs = {"bytes_per_document": float(-(-encoded.documents.dim // 8))}
        rankings.append(Ranking(system, *found, costs))
        return found[0][:, :10]

    for seed in args.seeds:
        sides = encode(fit(args, method, source, seed), queries, documents)
        lengths = np.linalg.norm(sides.documents[:, :-1], axis=1)
        most = float(np.linalg.norm(sides.documents[0]))
        half = np.random.default_rng(seed).permutation(len(lengths))[: len(lengths) // 2]
        seen["half"].append(clipped(np.delete(lengths, half), lengths[half].max() * most / lengths.max()))
        seen["below"].append(clipped(lengths, most * 0.999999))
        seen["spread"].append(float(lengths.std() / lengths.mean()))
        for form, part in forms(sides):
            best = {how: ranked(f"{method}, {form}, {how}", encoded) for how, encoded in searched(part)}
            if form != FORMS[0]:
                same = (best["unit length"] == best["inner product"]) & (best["L2"] == best["inner product"])
                seen["same"].append(float(same.all(1).mean()))
            for name, metric in (("inner product", faiss.METRIC_INNER_PRODUCT), ("L2", faiss.METRIC_L2)):
                if form != FORMS[0] or name != "L2":
                    row = {"system": f"{method}, {form}, graph by {name}", "dataset": dataset.name, "split": "test"}
                    row |= {"metric": "recall@10 of exact search", "value": graph_recall(part, metric)}
                    extra.append(row)
        other = encode(fit(args, method, source, seed, "--equal_norms", "false"), queries, documents)
        ranked(
            f"{method}, one dimension more, inner product",
            Encoded(in_memory(other.queries), in_memory(other.documents), "dot"),
        )
    rows = table_rows(dataset, rankings, f"{method}, {FORMS[0]}, inner product")
    return rows + extra, {name: float(np.mean(values)) for name, values in seen.items()}


def main() -> None:
    """Fit, measure and write."""
    (args,) = HfArgumentParser([Arguments]).parse_args_into_dataclasses()
    made_by = provenance(shlex.join(["python", *sys.argv]))
    rows, claims, models = [], [], {}
    for method, backbone in (("Gaussian", args.backbone), ("LEMUR", args.late)):
        folder = fetch(backbone)
        models[backbone] = fingerprint(folder)
        model = load(folder, dtype=fastest_dtype("auto"))
        by_dataset: dict[str, dict[str, float]] = {}
        for source in tqdm(args.datasets, desc=method):
            found, by_dataset[Path(source).name] = measure(args, method, model, source)
            rows += found
        for name, claim in (
            ("same", "share of queries whose ten best are the same by inner product, unit length and L2"),
            ("below", "share of documents beyond max_norm"),
            ("half", "share beyond it, of the half of a corpus that it was not measured on"),
            ("spread", "deviation of documents' lengths over their mean"),
        ):
            values = {dataset: seen[name] for dataset, seen in by_dataset.items()}
            claims.append(
                {
                    "claim": f"{method.lower()}: {claim}",
                    "value": float(np.mean(list(values.values()))),
                    "target": None,
                    "met": None,
                    "split": "test",
                    "by_dataset": values,
                }
            )
    results = made_by | {
        "name": args.name,
        "seeds": args.seeds,
        "models": models,
        "settings_tried": 1,
        "drawn": [],
        "rows": rows,
        "claims": claims,
    }
    print(write_results(results, Path(args.output) if args.output else None))


if __name__ == "__main__":
    main()
