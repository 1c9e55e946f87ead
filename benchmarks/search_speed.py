"""Exact MaxSim search against a loop over documents and against sentence-transformers' own scoring, in one run.

python benchmarks/search_speed.py --model models/four/late-interaction-minilm/final --output results
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sentence_transformers.util import maxsim

from polyrep.data import load_retrieval_dataset
from polyrep.encoding import embed
from polyrep.hub import fingerprint, load
from polyrep.report import provenance, write_results
from polyrep.search import exact_search
from polyrep.search.ranking import tie_ranks

DATA = "tldr_pages"


def main() -> None:
    """Time the three ways on the same vectors, check that they agree, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/four/late-interaction-minilm/final")
    parser.add_argument("--output", type=Path, help="folder for search-speed.json and .md")
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--documents", type=int, default=6357)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    dataset = load_retrieval_dataset(DATA)
    model = load(args.model, dtype=torch.float32)
    texts = dict(list(dataset.corpus.items())[: args.documents])
    asked = dict(list(dataset.queries.items())[: args.queries])
    cached = {"cache_dir": ".cache/embeddings", "name": "search-speed"}
    documents = embed(model, texts, task="document", **cached)
    queries = embed(model, asked, task="query", **cached)
    split = [
        [
            torch.from_numpy(np.asarray(side.values[a:b], np.float32))
            for a, b in zip(side.offsets, side.offsets[1:], strict=False)
        ]
        for side in (queries, documents)
    ]

    ranks = tie_ranks(list(texts))

    def loop() -> torch.Tensor:
        return torch.tensor([[(q @ d.T).amax(1).sum() for d in split[1]] for q in split[0]])

    def batched() -> torch.Tensor:
        positions, scores = exact_search(queries, documents, ranks, similarity="maxsim", k=len(texts))
        return torch.zeros(len(asked), len(texts)).scatter_(1, torch.from_numpy(positions), torch.from_numpy(scores))

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "polyrep exact_search": batched,
        "sentence-transformers maxsim": lambda: maxsim(split[0], split[1]),
        "loop over documents": loop,
    }
    rows, first = [], None
    for name, way in ways.items():
        seconds = []
        for _ in range(args.repeats):
            started = time.perf_counter()
            scores = way()
            seconds.append(time.perf_counter() - started)
        first = scores if first is None else first
        torch.testing.assert_close(scores, first, rtol=1e-3, atol=1e-3)
        row = {"system": name, "dataset": "tldr_pages", "split": "test", "metric": "ms per query"}
        rows.append(row | {"value": 1000 * min(seconds) / len(asked)})
    fastest = rows[0]["value"]
    rows += [r | {"metric": "times exact_search", "value": r["value"] / fastest} for r in rows]
    results = {
        "name": "search-speed",
        **provenance(shlex.join(["python", *sys.argv])),
        "seeds": [],
        "settings_tried": 1,
        "models": {args.model: fingerprint(Path(args.model))},
        "rows": rows,
        "claims": [],
    }
    print(write_results(results, args.output))


if __name__ == "__main__":
    main()
