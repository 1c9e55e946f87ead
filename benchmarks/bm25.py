"""How BM25 is best set up, on dev, and what it has on test, alone and beside a dense model.

    python benchmarks/bm25.py --output results

Nothing is fitted but the share of BM25 in the hybrid, one for all data sets, on dev.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import Stemmer
from bm25s.stopwords import STOPWORDS_EN_PLUS
from dense2sparse_text import HYBRID_WEIGHTS, all_scores, ndcg, ranked_scores, standardised
from transformers import HfArgumentParser

from polyrep.data import RetrievalDataset, load_retrieval_dataset
from polyrep.data.named import made_here
from polyrep.encoding import embed
from polyrep.evaluation.bm25 import K1, Analyzer, B, analyzer, rank_with_bm25
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


@dataclass(frozen=True)
class Pieces(Analyzer):
    """The tokens of a dense model instead of words: what the own words of a Dense2Sparse head are.

    Attributes:
        tokenizer: Of the dense model, WordPiece.
        stems: Whether words of the vocabulary that have one stem are one.
    """

    tokenizer: Any = None
    stems: bool = False

    @cached_property
    def same(self) -> dict[str, str]:
        """Words of the vocabulary -> the shortest of those with their stem."""
        stem, groups = Stemmer.Stemmer("en").stemWord, defaultdict(list)
        for word in self.tokenizer.get_vocab() if self.stems else ():
            if re.fullmatch("[a-z]{3,}", word):
                groups[stem(word)].append(word)
        return {word: min(group, key=lambda w: (len(w), w)) for group in groups.values() for word in group}

    def words(self, texts: Iterable[str]) -> list[list[str]]:
        """Tokens of each text, as far as the model reads it."""
        read = self.tokenizer(list(texts), add_special_tokens=False, truncation=True)["input_ids"]
        return [[self.same.get(w, w) for w in self.tokenizer.convert_ids_to_tokens(ids)] for ids in read]

    @property
    def settings(self) -> dict[str, Any]:
        """What a reader of the table should know."""
        return {"tokens": "WordPiece", "one row a stem": self.stems, "k1": K1, "b": B}


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
    pieces = Pieces(tokenizer=model.tokenizer)
    variants = VARIANTS | {"BM25, word pieces": pieces, "BM25, pieces by stem": replace(pieces, stems=True)}
    rankings = [found(system, read) for system, read in variants.items()]
    lexical = np.zeros_like(scores)
    np.put_along_axis(lexical, rankings[0].positions, rankings[0].scores, 1)
    cut = [replace(r, positions=r.positions[:, :1000], scores=r.scores[:, :1000]) for r in rankings]
    return Found(dataset, [dense, *cut], standardised(lexical), standardised(scores))


PUBLISHED = 0.679
"""nDCG@10 of Anserini's BM25 on SciFact, of one field with Porter's stems: what a rival should have at least."""


def is_claimed(row: Mapping[str, Any]) -> bool:
    """Whether it is the row of that."""
    return (row["system"], row["dataset"], row["split"], row["metric"]) == ("BM25", "scifact", "test", "nDCG@10")


def claim(row: Mapping[str, Any]) -> dict[str, Any]:
    """That our rival is as strong as the published one."""
    entry = {"claim": "baselines.bm25_scifact", "value": row["value"], "interval": row["interval"], "target": 0.68}
    return entry | {"met": row["value"] >= 0.68, "published": PUBLISHED, "split": "test"}


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
        "claims": [claim(row) for row in rows if is_claimed(row)],
        "data": made_here(*args.datasets),
        "notes": [f"The hybrid's share of BM25, best on dev: {weight:.1f}."],
    }
    print(write_results(results, Path(args.output) if args.output else None))


if __name__ == "__main__":
    main()
