"""What Gaussian index vectors cost and how exact they are: memory of a training step, precision, bytes and time.

python benchmarks/gaussian.py --output results
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from reinpool import best_of
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from polyrep.data import load_retrieval_dataset
from polyrep.encoding import embed
from polyrep.hub import fetch, fingerprint, load
from polyrep.hub.folder import fastest_dtype
from polyrep.methods import GaussianHead, GaussianHeadConfig, GaussianHeadObjective, GaussianOutput
from polyrep.report import provenance, write_results
from polyrep.search import kl

ROOT = Path(__file__).parent.parent
DATA = "tldr_pages"
WIDTH, MEANS, BATCH = 768, 383, 512
"""The paper's encoder, distribution and batch."""


def step(form: str, batch: int) -> dict[str, float]:
    """Peak memory and time of the loss and its gradient in this process, the maps included, an encoder not."""
    torch.manual_seed(0)
    head = GaussianHead(GaussianHeadConfig(input_dim=WIDTH, mean_dim=MEANS))
    objective = GaussianHeadObjective(head)
    vectors = [F.normalize(torch.randn(batch, WIDTH), dim=-1) for _ in range(2)]

    def loss(size: int) -> torch.Tensor:
        query, document = (head(v[:size], task=task) for v, task in zip(vectors, ("query", "document"), strict=True))
        labels = torch.arange(size)
        if form == "products":
            return objective.losses(query, document, labels)["contrast"]
        sides = [
            Normal(mean, variance.sqrt())
            for mean, variance in (
                (query.mean[:, None], query.variance[:, None]),
                (document.mean[None], document.variance[None]),
            )
        ]
        return F.cross_entropy(-kl_divergence(*sides).sum(-1), labels)  # (batch, batch, k) in between

    loss(8).backward()  # what any step allocates once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    found = loss(batch)
    found.backward()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"MiB": max(1, peak - before) / 1024, "seconds": seconds, "loss": float(found)}


def errors() -> dict[str, float]:
    """Largest relative error of -KL by index vectors: unit means, variances from 1e-3 to 10, 200 x 5,000 pairs."""
    generator = torch.Generator().manual_seed(0)
    sides = []
    for count in (200, 5000):
        mean = F.normalize(torch.randn(count, MEANS, generator=generator, dtype=torch.float64), dim=-1)
        variance = 10 ** (torch.rand(count, MEANS, generator=generator, dtype=torch.float64) * 4 - 3)
        sides.append(GaussianOutput(mean=mean, variance=variance))
    query, document = sides
    exact = torch.cat(
        [
            -kl_divergence(
                Normal(q.mean[None], q.variance.sqrt()[None]), Normal(document.mean, document.variance.sqrt())
            ).sum(-1)[None]
            for q in (GaussianOutput(mean=m, variance=v) for m, v in zip(query.mean, query.variance, strict=True))
        ]
    )
    found = {"oracle": float(((-kl(query, document) - exact) / exact).abs().max())}
    head = GaussianHead(GaussianHeadConfig(input_dim=WIDTH, mean_dim=MEANS))
    constant = head.query_constant(query)[:, None]
    for name, dtype in (("float64", torch.float64), ("float32", torch.float32)):
        q, d = (head._index(s.mean.to(dtype), s.variance.to(dtype), s is query) for s in sides)
        found[name] = float((((q @ d.T).double() + constant - exact) / exact).abs().max())
    return found


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", choices=("products", "pairs"), help="measure one form in this process, and stop")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cache_dir", default=".cache/embeddings")
    parser.add_argument("--output", type=Path, help="folder for gaussian-speed.json and .md")
    args = parser.parse_args()
    if args.step:
        print(json.dumps(step(args.step, args.batch)))
        return
    rows: list[dict[str, Any]] = []

    def row(system: str, metric: str, value: float) -> float:
        rows.append({"system": system, "metric": metric, "value": value, "dataset": "tldr_pages", "split": "test"})
        return value

    memory = {}
    for form, name in (("products", "index vectors"), ("pairs", "every pair by dimension")):
        command = [sys.executable, __file__, "--step", form, "--batch", str(args.batch)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        memory[form] = row(f"training step, {name}", "MiB", found["MiB"])
        row(f"training step, {name}", "seconds", found["seconds"])
        row(f"training step, {name}", "loss", found["loss"])
    precision = errors()
    for name, value in precision.items():
        row(f"largest relative error of -KL, {name}", "share", value)

    dataset = load_retrieval_dataset(DATA)
    folder = fetch("minilm")
    model = load(folder, dtype=fastest_dtype("auto"))
    options: dict[str, Any] = {"cache_dir": args.cache_dir, "batch_size": 32, "kind": "sentence"}
    documents = embed(model, dataset.corpus, task="document", name="tldr_pages", **options).values.astype(np.float32)
    queries = embed(model, dataset.queries, task="query", name="tldr_pages-test", **options).values.astype(np.float32)
    systems = {"backbone": (queries, documents)}
    for name, config in (("191 dimensions", {}), ("382 dimensions, 1 variance", {"variance_groups": 1})):
        head = GaussianHead(GaussianHeadConfig(input_dim=documents.shape[1], **config)).eval()
        with torch.inference_mode():
            both = [
                head(torch.from_numpy(vectors), task=task).sentence_embedding.numpy()
                for vectors, task in ((queries, "query"), (documents, "document"))
            ]
            batch = torch.from_numpy(documents)
            made = 1000 * best_of(args.repeats, lambda head=head, batch=batch: head(batch, task="document"))
        row(f"Gaussian, {name}", "ms to make 1,000 vectors", 1000 * made / len(documents))
        systems[f"Gaussian, {name}"] = (both[0], both[1])
    times = {}
    for name, (asked, kept) in systems.items():
        row(name, "bytes per document", 2 * kept.shape[1])
        for kind in ("flat", "HNSW"):
            if kind == "flat":
                index: Any = faiss.IndexFlatIP(kept.shape[1])
            else:
                index = faiss.IndexHNSWFlat(kept.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
            index.add(kept)
            single = best_of(args.repeats, lambda index=index, asked=asked: [index.search(q[None], 10) for q in asked])
            times[name, kind] = row(name, f"ms per query, FAISS {kind}", 1000 * single / len(asked))
    ratio = memory["products"] / memory["pairs"]
    speed = times["Gaussian, 191 dimensions", "flat"] / times["backbone", "flat"]
    dims = GaussianHeadConfig(input_dim=WIDTH, mean_dim=MEANS).projection_dim
    claims: list[dict[str, Any]] = [
        {"claim": "gaussian.kl_error_fp64", "value": precision["float64"], "target": 1e-9},
        {"claim": "gaussian.kl_error_fp32", "value": precision["float32"], "target": 1e-4},
        {"claim": "gaussian.index_dims", "value": dims, "target": 2 * MEANS + 1},
        {"claim": "gaussian.training_memory_ratio", "value": ratio, "target": 0.1},
    ]
    for claim in claims:
        equal = claim["claim"].endswith("dims")
        claim["met"] = claim["value"] == claim["target"] if equal else claim["value"] <= claim["target"]
    claims.append({"claim": "gaussian.query_time_ratio", "value": speed, "target": None, "met": None})
    results = provenance(shlex.join(["python", *sys.argv])) | {
        "name": "gaussian-speed",
        "seeds": [0],
        "settings_tried": 1,
        "models": {"minilm": fingerprint(folder)},
        "rows": rows,
        "claims": claims,
    }
    print(write_results(results, args.output))


if __name__ == "__main__":
    main()
