"""What unit length, L2 and quantization do to Gaussian and LEMUR, with and without the number that evens out lengths.

    python benchmarks/equal_norms.py --output results

One head a method and set, of the shipped run. Its vectors are searched as they are, and without their last number,
which is what a head with ``--equal_norms false`` gives but for one dimension; that head is measured too. Nothing is
chosen here. `make results-sets` fits the heads.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from sentence_transformers.util import quantize_embeddings
from tqdm import tqdm
from transformers import HfArgumentParser

from polyrep.data import RetrievalDataset, load_retrieval_dataset
from polyrep.encoding import Embeddings, embed
from polyrep.encoding.embeddings import in_memory
from polyrep.evaluation.frontier.rows import Encoded, quantized
from polyrep.evaluation.systems import Ranking
from polyrep.evaluation.table import table_rows
from polyrep.hub import fetch, fingerprint, load
from polyrep.hub.folder import fastest_dtype
from polyrep.hub.polyrep_room import HEADROOM
from polyrep.methods import GaussianHead, LemurModel, LemurPooling
from polyrep.report import provenance, write_results
from polyrep.search import exact_search
from polyrep.search.ranking import tie_ranks

RUNS = {"Gaussian": "gaussian-minilm-frozen", "LEMUR": "lemur-minilm"}
FORMS = ("plain", "equal norms")


@dataclass
class Arguments:
    """What to measure."""

    datasets: list[str] = field(
        default_factory=lambda: ["tldr_pages", "scifact"], metadata={"help": "Names or BEIR folders."}
    )
    models: str = field(
        default="models/norms", metadata={"help": "Folder with <set>/<run>/head, and <run>-plain of Gaussian."}
    )
    backbone: str = field(default="minilm", metadata={"help": "Backbone of Gaussian."})
    late: str = field(default="models/four/late-interaction-minilm/final", metadata={"help": "Backbone of LEMUR."})
    cache_dir: str = field(default=".cache", metadata={"help": "Embeddings."})
    output: str | None = field(default=None, metadata={"help": "Folder for the JSON and Markdown."})
    name: str = field(default="equal-norms", metadata={"help": "Name of the files."})


@dataclass
class Sides:
    """Vectors of a data set's test queries and documents by one head, float32."""

    queries: np.ndarray
    documents: np.ndarray


def head_of(args: Arguments, method: str, source: str, more: str = "") -> Path:
    """Folder of the head of the shipped run, or of one beside it."""
    return Path(args.models) / Path(source).name / f"{RUNS[method]}{more}" / "head"


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


def in_one_range(vectors: np.ndarray, left_out: float) -> np.ndarray:
    """One byte a number and one range for all, which is what engines do by themselves.

    Args:
        vectors: Documents.
        left_out: Share of the numbers that are cut to the range.
    """
    low, high = np.quantile(vectors, [left_out / 2, 1 - left_out / 2])
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
    for name, left_out in (("one range", 0.0), ("one range of 99 %", 0.01)):
        yield (
            f"int8 documents in {name}",
            Encoded(in_memory(queries), in_memory(in_one_range(documents, left_out)), "dot"),
        )
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


def measure(args: Arguments, method: str, model: Any, source: str) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of a method on one set, and what its claims need."""
    dataset: RetrievalDataset = load_retrieval_dataset(source, "test")
    options: dict[str, Any] = {"cache_dir": f"{args.cache_dir}/embeddings", "batch_size": 32}
    documents = embed(model, dict(dataset.corpus), task="document", name=dataset.name, **options)
    queries = embed(model, dataset.queries, task="query", name=f"{dataset.name}-test", **options)
    ranks = tie_ranks(list(dataset.corpus))
    rankings: list[Ranking] = []
    graphs: list[dict[str, Any]] = []

    def ranked(system: str, encoded: Encoded) -> np.ndarray:
        sides = encoded.queries, encoded.documents
        found = exact_search(*sides, ranks, similarity=encoded.similarity, k=100, left_out=dataset.own)
        bits = 1 if "one bit" in system else 8 if "int8" in system else 16
        costs = {"bytes_per_document": float(-(-encoded.documents.dim * bits // 8))}
        rankings.append(Ranking(system, *found, costs))
        return found[0][:, :10]

    if method == "LEMUR":  # the last of its directions makes room for the number
        head = LemurModel.from_pretrained(head_of(args, method, source)).eval()
        plain = LemurPooling.from_pretrained(str(head_of(args, method, source)), equal_norms=False).model
        other = encode(plain.eval(), queries, documents)
        made = ((other.queries, True), (other.documents, False))
        sides = Sides(*(head.with_equal_norms(torch.from_numpy(s[:, :-1]), query).numpy() for s, query in made))
    else:
        head = GaussianHead.from_pretrained(head_of(args, method, source)).eval()
        sides = encode(head, queries, documents)
        plain = GaussianHead.from_pretrained(head_of(args, method, source, "-plain")).eval()
        other = encode(plain, queries, documents)
    lengths = np.linalg.norm(sides.documents[:, :-1], axis=1)
    half = np.random.default_rng(0).permutation(len(lengths))[: len(lengths) // 2]
    seen = {
        "beyond": float((lengths > head.config.max_norm * 0.999999).mean()),
        "half": float((np.delete(lengths, half) > HEADROOM * lengths[half].max()).mean()),
        "spread": float(lengths.std() / lengths.mean()),
    }
    for form, part in forms(sides):
        best = {how: ranked(f"{method}, {form}, {how}", encoded) for how, encoded in searched(part)}
        same = (best["unit length"] == best["inner product"]) & (best["L2"] == best["inner product"])
        seen[form] = float(same.all(1).mean())
        for name, metric in (("inner product", faiss.METRIC_INNER_PRODUCT), ("L2", faiss.METRIC_L2)):
            if form != FORMS[0] or name != "L2":
                row = {"system": f"{method}, {form}, graph by {name}", "dataset": dataset.name, "split": "test"}
                graphs.append(row | {"metric": "recall@10 of exact search", "value": graph_recall(part, metric)})
    whole = Encoded(in_memory(other.queries), in_memory(other.documents), "dot")
    ranked(f"{method}, one dimension more, inner product", whole)
    return table_rows(dataset, rankings, f"{method}, {FORMS[0]}, inner product") + graphs, seen


def main() -> None:
    """Fit, measure and write."""
    (args,) = HfArgumentParser([Arguments]).parse_args_into_dataclasses()
    made_by = provenance(shlex.join(["python", *sys.argv]))
    rows, claims, models = [], [], {}
    for method, backbone in (("Gaussian", args.backbone), ("LEMUR", args.late)):
        model = load(fetch(backbone), dtype=fastest_dtype("auto"))
        for source in args.datasets:
            folder = head_of(args, method, source)
            models[folder.parent.as_posix()] = fingerprint(folder)
        by_dataset: dict[str, dict[str, float]] = {}
        for source in tqdm(args.datasets, desc=method):
            found, by_dataset[Path(source).name] = measure(args, method, model, source)
            rows += found
        for name, claim in (
            (FORMS[0], "queries with the same ten best by inner product, unit length and L2, plain"),
            (FORMS[1], "queries with the same ten best by inner product, unit length and L2, equal norms"),
            ("beyond", "documents beyond max_norm"),
            ("half", "documents of one half of a corpus beyond a max_norm measured on the other"),
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
        "seeds": [0],
        "models": models,
        "settings_tried": 1,
        "drawn": [],
        "rows": rows,
        "claims": claims,
    }
    print(write_results(results, Path(args.output) if args.output else None))


if __name__ == "__main__":
    main()
