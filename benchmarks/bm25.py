"""How BM25 is best set up, on dev, and what it has on test, alone and beside a dense model.

    python benchmarks/bm25.py --output results

Nothing is fitted but the share of BM25 in the hybrid, one for all data sets, on dev.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from bm25s.stopwords import STOPWORDS_EN_PLUS
from dense2sparse_text import HYBRID_WEIGHTS, all_scores, ndcg, ranked_scores, standardised
from transformers import HfArgumentParser

from polyrep.data import RetrievalDataset, load_retrieval_dataset
from polyrep.data.named import made_here
from polyrep.encoding import embed
from polyrep.evaluation.bm25 import Analyzer, analyzer, rank_with_bm25
from polyrep.evaluation.systems import Ranking, costs_of
from polyrep.evaluation.table import table_rows
from polyrep.hub import fetch, fingerprint, load
from polyrep.hub.folder import fastest_dtype
from polyrep.report import provenance, write_results
from polyrep.search.ranking import tie_ranks

HYBRID = "dense + BM25"
ENGLISH = analyzer("en")
VARIANTS = {
    "BM25": ENGLISH,
    "BM25, no stems": replace(ENGLISH, language="none"),
    "BM25, no stop words": replace(ENGLISH, stop_words=frozenset()),
    "BM25, 179 stop words": replace(ENGLISH, stop_words=frozenset(STOPWORDS_EN_PLUS)),
}


@dataclass
class Arguments:
    """What to measure."""

    datasets: list[str] = field(
        default_factory=lambda: ["tldr_pages", "scitldr", "scifact", "pubmedqa"],
        metadata={"help": "BEIR folders."},
    )
    backbone: str = field(default="minilm", metadata={"help": "Folder, Hub id, or minilm."})
    cache_dir: str = field(default=".cache/embeddings", metadata={"help": "Embeddings."})
    output: str | None = field(default=None, metadata={"help": "Folder for the JSON and Markdown."})
    name: str = field(default="bm25", metadata={"help": "Name of the files."})


@dataclass(frozen=True)
class Found:
    """What one split has, and the scores that a hybrid is made of, each ``(queries, documents)``."""

    dataset: RetrievalDataset
    rankings: list[Ranking]
    lexical: np.ndarray
    dense: np.ndarray

    def hybrid(self, weight: float) -> Ranking:
        """Ranking by both."""
        scores = weight * self.lexical + (1 - weight) * self.dense
        made = ranked_scores(HYBRID, scores, tie_ranks(list(self.dataset.corpus)), {})
        parts = {ranking.system: ranking.costs["bytes_per_document"] for ranking in self.rankings}
        return replace(made, costs={"bytes_per_document": parts["dense"] + parts["BM25"]})


def measure(dataset: RetrievalDataset, model: Any, options: Mapping[str, Any]) -> Found:
    """The dense model and BM25 in every setting, without their times."""

    def found(system: str, read: Analyzer) -> Ranking:
        ranking = rank_with_bm25(dataset, len(dataset.corpus), language=read)
        costs = {name: ranking.costs[name] for name in ("bytes_per_document", "active_dims", "flops")}
        return replace(ranking, system=system, costs=costs)

    documents = embed(model, dataset.corpus, task="document", name=dataset.name, **options)
    queries = embed(model, dataset.queries, task="query", name=f"{dataset.name}-{dataset.split}", **options)
    scores = all_scores(queries, documents)
    dense = ranked_scores("dense", scores, tie_ranks(list(dataset.corpus)), costs_of(queries, documents))
    rankings = [found(system, read) for system, read in VARIANTS.items()]
    lexical = np.zeros_like(scores)
    np.put_along_axis(lexical, rankings[0].positions, rankings[0].scores, 1)
    cut = [replace(r, positions=r.positions[:, :1000], scores=r.scores[:, :1000]) for r in rankings]
    return Found(dataset, [dense, *cut], standardised(lexical), standardised(scores))


def main() -> None:
    """Choose on dev, measure, and write."""
    (args,) = HfArgumentParser([Arguments]).parse_args_into_dataclasses()
    made_by = provenance(shlex.join(["python", *sys.argv]))
    folder = fetch(args.backbone)
    model = load(folder, dtype=fastest_dtype("auto"))
    options = {"cache_dir": args.cache_dir, "batch_size": 32}
    found = {
        split: [measure(load_retrieval_dataset(source, split), model, options) for source in args.datasets]
        for split in ("dev", "test")
    }
    means = [np.mean([ndcg(part.dataset, part.hybrid(w)) for part in found["dev"]]) for w in HYBRID_WEIGHTS]
    weight = float(HYBRID_WEIGHTS[np.argmax(means)])
    rows = [
        row
        for parts in found.values()
        for part in parts
        for row in table_rows(part.dataset, [*part.rankings, part.hybrid(weight)], "dense")
    ]
    results = made_by | {
        "name": args.name,
        "seeds": [0],
        "models": {args.backbone: fingerprint(folder)},
        "settings_tried": len(VARIANTS) + len(HYBRID_WEIGHTS),
        "drawn": [],
        "rows": rows,
        "claims": [],
        "data": made_here(*args.datasets),
        "notes": [f"The hybrid's share of BM25, best on dev: {weight:.1f}."],
    }
    print(write_results(results, Path(args.output) if args.output else None))


if __name__ == "__main__":
    main()
