"""What ReinPool costs: pooling beside encoding, clustering beside hierarchical pooling, and the memory of a fit.

python benchmarks/reinpool.py --head models/tldr/reinpool-minilm/head --output results
"""

from __future__ import annotations

import argparse
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling

from polyrep.data import load_retrieval_dataset
from polyrep.hub import fingerprint, load
from polyrep.hub.folder import fastest_dtype
from polyrep.methods import ReinPoolConfig, ReinPoolModel, ReinPoolPooling
from polyrep.report import provenance, write_results

ROOT = Path(__file__).parent.parent
DATA = "scifact"
FIT = [*("reinpool-minilm", "--datasets", DATA, "--head_only", "true", "--save_strategy", "no"), "--overwrite"]


def best_of(repeats: int, call: Callable[[], object]) -> float:
    """Least seconds of several calls, the first of which allocates."""
    call()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/four/late-interaction-minilm/final")
    parser.add_argument("--head", default="models/tldr/reinpool-minilm/head")
    parser.add_argument("--output", type=Path, help="folder for reinpool-speed.json and .md")
    parser.add_argument("--documents", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    dataset = load_retrieval_dataset(DATA)
    texts = list(dataset.corpus.values())[:: len(dataset.corpus) // args.documents][: args.documents]
    model = load(args.model, dtype=fastest_dtype("auto"))
    encode = best_of(args.repeats, lambda: model.encode_document(texts, batch_size=32))
    tokens = [vectors.float() for vectors in model.encode_document(texts, batch_size=32)]
    batches = [tokens[start : start + 32] for start in range(0, len(tokens), 32)]

    def milliseconds(call: Callable[[list], object]) -> float:
        return 1000 * best_of(args.repeats, lambda: [call(batch) for batch in batches]) / len(tokens)

    rows, claims = [], []
    base = {"dataset": "scifact", "split": "test"}

    def row(system: str, value: float, metric: str = "ms per document") -> float:
        rows.append({"system": system, "metric": metric, "value": value} | base)
        return value

    whole = row("encoding", 1000 * encode / len(texts))
    shares = {}
    for number in (1, 8, 32):
        pooling = ReinPoolPooling.from_pretrained(args.head, num_vectors=number)
        shares[number] = row(f"ReinPool to {number}", milliseconds(pooling.pool)) / whole
        row(f"ReinPool to {number}", shares[number], "share of encoding")
    ratios = {}
    for number in (4, 8, 16, 32):
        plain = ReinPoolModel(
            ReinPoolConfig(dim=tokens[0].shape[1], num_layers=0, pooling="kmeans", num_vectors=number)
        )
        clusters = milliseconds(ReinPoolPooling(plain).pool)
        row(f"k-means to {number}, batched", clusters)
        factor = sum(map(len, tokens)) / len(tokens) / number
        stock = HierarchicalTokenPooling(max(factor, 1.0), num_protected_tokens=0)

        def unit(batch: list[torch.Tensor], stock: HierarchicalTokenPooling = stock) -> list[torch.Tensor]:
            return [torch.nn.functional.normalize(vectors, dim=-1) for vectors in stock.pool(batch)]

        ratios[number] = row(f"HierarchicalTokenPooling to about {number}", milliseconds(unit)) / clusters
        row(f"k-means to {number}, batched", ratios[number], "times faster than hierarchical")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train.py"), *FIT, "--backbone", args.model, "--output_dir", folder]
        subprocess.run([*command, "--max_steps", "1"], check=True, stdout=subprocess.DEVNULL)  # makes the cache
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        fit = row("a fit, its start and the map of its cache included", time.perf_counter() - started, "seconds")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    row("a fit", peak, "GiB at most")
    for name, value, target, met in (
        ("encode_overhead", shares[8], 0.05, shares[8] <= 0.05),
        ("kmeans_speedup_over_hierarchical", ratios[8], 10.0, ratios[8] >= 10),
        ("fit_seconds_whole_command", fit, None, None),
    ):
        claims.append({"claim": f"reinpool.{name}", "value": value, "target": target, "met": met})
    claims[0]["by_number_of_vectors"] = {str(k): v for k, v in shares.items()}
    claims[1]["by_number_of_vectors"] = {str(k): v for k, v in ratios.items()}
    results = {
        "name": "reinpool-speed",
        **provenance(shlex.join(["python", *sys.argv])),
        "seeds": [0],
        "settings_tried": 1,
        "models": {args.model: fingerprint(Path(args.model)), args.head: fingerprint(Path(args.head))},
        "rows": rows,
        "claims": claims,
    }
    print(write_results(results, args.output))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
