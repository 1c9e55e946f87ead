"""How much of late interaction survives in one vector, or a few, beside controls with the same supervision.

    python benchmarks/reinpool_text.py --ablation --output results     # every lever, on dev of the first data set
    python benchmarks/reinpool_text.py --output results                # the table on test, three seeds

Fitted heads, pooled baselines and rankings are kept under a hash of data, settings and the method's code, so a second
run, or one that was interrupted, makes only what is missing. After changes elsewhere, delete `heads` and `rankings` of
the cache.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import ROOT, FitBench, code_of
from bundle import bundle
from sentence_transformers import MultiVectorEncoder
from tqdm import tqdm
from transformers import AutoModel, HfArgumentParser, set_seed

from polyrep.cli import train as train_run
from polyrep.data import RetrievalDataset
from polyrep.encoding import Embeddings, embed
from polyrep.encoding.embeddings import mean_of_tokens, sum_of_tokens
from polyrep.evaluation.frontier.pooling import (
    LADDER,
    Pool,
    hierarchical_clusters,
    hierarchical_shares,
    hierarchically,
    pooled,
)
from polyrep.evaluation.metrics import per_query_metrics
from polyrep.evaluation.systems import Ranking, keep_ranking, rank_embeddings
from polyrep.evaluation.table import table_rows
from polyrep.files import read_json, write_json
from polyrep.hub import fetch, fingerprint, load
from polyrep.hub.folder import fastest_dtype
from polyrep.methods import ReinPoolConfig, ReinPoolModel, SoftGateObjective
from polyrep.methods.reinpool.frontier import by_head
from polyrep.report import provenance, write_results
from polyrep.training.arguments import HeadTrainingArguments
from polyrep.training.head_trainer import HeadTrainer
from polyrep.training.pairs import HeadData
from polyrep.training.recipes import resolve
from polyrep.training.sides import TokenSide

RUN = ROOT / "hub_configs" / "reinpool-minilm"
CODE = code_of("methods/reinpool", "training")

BINARY = (1, 4, 16, 32)
KEPT_DEPTH = 100
"""Documents of a ranking that are kept: as many as the metrics read."""

ONE = shlex.split("--ladder 1 --num_vectors 1 --pooling mean --refinement 0 --max_steps 150")
NO_FILTER = ["--freeze", "^keep"]
HARD = ["--weights", "hard", "--objective", "ReinforceObjective"]
ONE_VECTOR = {
    "ReinPool hard, inverse reward": [*ONE, *HARD, "--reward", "inverse", "--projection", "false"],
    "ReinPool hard, forward reward": [*ONE, *HARD, "--reward", "forward", "--projection", "false"],
    "ReinPool soft": [*ONE, "--projection", "false"],
    "ReinPool soft + projection": ONE,
    "mean + projection": [*ONE, *NO_FILTER],
}
"""One vector: the filter learned in every way, and beside the projection, and that projection by itself."""

NO_FILTER_NAME = "k-means refined without filter"
LADDERS = {"ReinPool": [], NO_FILTER_NAME: NO_FILTER}
"""Heads that give any number of vectors: the shipped recipe, and the same without its filter."""

SETTINGS_TRIED = 64
"""On dev: 59 sketches of heads, losses, rates and queries on one to three sets, and 5 of rewards."""

RANDOM = (1, 8, 32)

ABLATIONS: dict[str, list[str]] = {
    "recipe": [],
    "no filter": NO_FILTER,
    "filter of one layer": ["--num_layers", "1"],
    "filter of two layers": ["--num_layers", "2"],
    "filter from 50 % kept": ["--initial_keep_logit", "0"],
    "filter from 95 % kept": ["--initial_keep_logit", "3"],
    "filter held to its start": ["--prior_weight", "0.1"],
    "no refinement": ["--refinement", "0"],
    "no projection": ["--projection", "false"],
    "one number of vectors a step": ["--rungs", "1"],
    "no labels": ["--label_weight", "0"],
    "labels at 1": ["--label_weight", "1"],
    "sentences as queries too": ["--queries", "both"],
    "sentences alone": ["--queries", "inverse_cloze"],
    "slots": shlex.split("--pooling slots --num_vectors 4 --ladder 4"),
    "one vector, soft": ONE,
    "one vector, inverse reward": [*ONE, *HARD],
    "one vector, inverse reward, filter of one layer": [*ONE, *HARD, "--num_layers", "1"],
    "one vector, inverse reward, 32 samples": [*ONE, *HARD, "--samples", "32"],
    "one vector, inverse reward, no entropy": [*ONE, *HARD, "--entropy_weight", "0"],
    "one vector, inverse reward, sentences alone": [*ONE, *HARD, "--queries", "inverse_cloze"],
    "one vector, forward reward": [*ONE, *HARD, "--reward", "forward"],
    "one vector, forward reward, sentences alone": [*ONE, *HARD, "--reward", "forward", "--queries", "inverse_cloze"],
}
"""Levers, on dev of the first data set, one seed."""


@dataclass
class Arguments:
    """What to fit and measure."""

    datasets: list[str] = field(
        default_factory=lambda: ["tldr_pages", "scitldr", "scifact"], metadata={"help": "BEIR folders."}
    )
    backbone: str = field(
        default="models/four/late-interaction-minilm/final",
        metadata={"help": "Folder or Hub id of a MultiVectorEncoder."},
    )
    bundle: bool = field(default=True, metadata={"help": "Also four documents of the first data set as one."})
    transfer: list[str] = field(
        default_factory=lambda: ["pubmedqa"], metadata={"help": "Further data sets, for heads of other corpora."}
    )
    ablation: bool = field(default=False, metadata={"help": "Every lever on dev instead of the table on test."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the fits."})
    flags: str = field(default="", metadata={"help": "Flags of the run for every fit, e.g. '--max_steps 2'."})
    cache_dir: str = field(default=".cache", metadata={"help": "Embeddings, fitted heads and rankings."})
    output: str | None = field(default=None, metadata={"help": "Folder for the JSON, Markdown and PNG."})
    name: str = field(default="reinpool-text", metadata={"help": "Name of the files."})


class HierarchicalProjection(SoftGateObjective):
    """The control: the same projection and loss over clusters of HierarchicalTokenPooling instead of ours."""

    bench: Bench

    def forward(self, features: list[dict[str, torch.Tensor]], labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Loss of a batch."""
        index, mask = features[1]["index"].cpu().numpy(), features[1]["attention_mask"].cpu()

        def assign(tokens: torch.Tensor, weights: torch.Tensor, number: int) -> torch.Tensor:
            shares = hierarchical_shares(self.bench.documents, self.bench.hierarchical_clusters, index, mask, number)
            return shares.to(tokens.device)

        self.model.assign = assign  # type: ignore[method-assign]
        return super().forward(features, labels)


class Bench(FitBench):
    """One data set with its cached vectors, and everything that can be fitted to them."""

    run, code, label = RUN, CODE, "reinpool"

    def __init__(self, args: Arguments, source: str, model: MultiVectorEncoder, length: int | None = None):
        super().__init__(args, source, model)
        self.length = length

    def encoded(self, dataset: RetrievalDataset, task: str) -> TokenSide:
        """Token vectors of the queries or the documents."""
        with self.at_length():
            if task == "document":
                return TokenSide.encode(self.model, dict(dataset.corpus), "document", dataset.name, **self.options)
            return TokenSide.encode(
                self.model, dataset.queries, "query", f"{dataset.name}-{dataset.split}", **self.options
            )

    @contextmanager
    def at_length(self) -> Iterator[None]:
        """The model with this data set's number of tokens."""
        usual = self.model.max_seq_length
        self.model.max_seq_length = self.length or usual
        try:
            yield
        finally:
            self.model.max_seq_length = usual

    @cached_property
    def documents(self) -> Embeddings:
        """Encoded corpus."""
        return self.encoded(self.split("dev"), "document").embeddings

    def queries(self, split: str) -> Embeddings:
        """Encoded queries of a split."""
        return self.encoded(self.split(split), "query").embeddings

    @property
    def inputs(self) -> dict[str, Any]:
        """What tells the vectors that a fit reads."""
        return {"documents": self.documents.path.name}

    def head(self, flags: list[str], seed: int) -> Path:
        """Fit a head with the shipped run and flags over it."""
        flags = [*flags, *self.flags]

        def fit(folder: Path) -> None:
            where = ["--output_dir", str(folder), "--overwrite", "--cache_dir", self.options["cache_dir"]]
            what = ["--backbone", self.args.backbone, "--datasets", str(self.source), "--seed", str(seed)]
            length = ["--max_length", str(self.length)] if self.length else []
            train_run(
                [self.run.name, *what, *where, *length, "--save_strategy", "no", "--head_only", "true", *flags],
                prog="train.py",
            )

        return self.fitted(self.label, {"arguments": flags, "seed": seed, "length": self.length}, fit) / "head"

    def hierarchical_projection(self, seed: int) -> Path:
        """The control: a projection alone, on the clusters of HierarchicalTokenPooling, by the recipe's own steps."""

        def fit(folder: Path) -> None:
            argv = [RUN.name, "--datasets", str(self.source), "--seed", str(seed), "--output_dir", str(folder)]
            plan = resolve([*argv, *self.flags], prog="train.py")
            set_seed(seed)
            data = HeadData(kind="tokens", negatives=plan.head.negatives, labels=True, depth=plan.head.depth)
            with self.at_length():
                data.add(self.model, self.split("train"), **self.options)
            head = ReinPoolModel(
                ReinPoolConfig(
                    dim=self.documents.dim,
                    num_layers=0,
                    projection=True,
                    pooling="kmeans",
                    num_vectors=8,
                    weights="soft",
                )
            )
            head.keep.requires_grad_(False)
            objective = HierarchicalProjection(head, **plan.objective_arguments)
            objective.bench = self
            arguments: HeadTrainingArguments = plan.args
            arguments.save_strategy = "no"
            trainer = HeadTrainer(objective=objective, args=arguments, train_dataset=data, data_collator=data.collate)
            trainer.train()
            head.__dict__.pop("assign")
            head.save_pretrained(folder / "head")
            write_json(folder / "training.json", {"log": trainer.state.log_history})

        return self.fitted("hierarchical-projection", {"seed": seed, "length": self.length}, fit) / "head"

    @cached_property
    def hierarchical_clusters(self) -> dict[int, np.ndarray]:
        """Cluster of every token at every number of vectors, by the linkage that HierarchicalTokenPooling uses."""
        folder = Path(self.args.cache_dir) / "clusters" / f"{self.documents.path.name}"
        return hierarchical_clusters(self.documents, LADDER, folder)

    # Pooling: each gives every document's vectors, for some numbers of vectors

    def pooled(self, pool: Pool, binary: bool = False) -> dict[int, Embeddings]:
        """Run ``pool(rows, tokens, mask)`` over the corpus: number of vectors -> embeddings of kind tokens."""
        return pooled(self.documents, pool, binary=binary, desc=f"{self.name}, pool")

    def by_head(self, folder: Path, numbers: Iterable[int], **kwargs: Any) -> dict[int, Embeddings]:
        """Pooled by a fitted head."""
        return self.pooled(by_head(AutoModel.from_pretrained(folder).eval(), numbers), **kwargs)

    def hierarchical(self, numbers: Iterable[int], folder: Path | None = None, **kwargs: Any) -> dict[int, Embeddings]:
        """HierarchicalTokenPooling without a protected token, and through the projection of a head where given."""
        head: ReinPoolModel | None = AutoModel.from_pretrained(folder).eval() if folder else None
        clusters = self.hierarchical_clusters
        return self.pooled(hierarchically(self.documents, clusters, numbers, head), **kwargs)

    def random(self, numbers: Iterable[int], seed: int) -> dict[int, Embeddings]:
        """Token vectors drawn at random."""
        generator = torch.Generator().manual_seed(seed)

        def pool(rows: np.ndarray, tokens: torch.Tensor, mask: torch.Tensor) -> dict:
            short = max(numbers) - mask.shape[1]  # a batch of short documents has fewer tokens than are drawn
            if short > 0:
                tokens, mask = (
                    torch.nn.functional.pad(tokens, (0, 0, 0, short)),
                    torch.nn.functional.pad(mask, (0, short)),
                )
            order = torch.rand(mask.shape, generator=generator).masked_fill(~mask, -1).argsort(1, descending=True)
            chosen = {k: order[:, :k] for k in numbers}
            return {
                k: (tokens.gather(1, o[..., None].expand(-1, -1, tokens.shape[-1])), mask.gather(1, o))
                for k, o in chosen.items()
            }

        return self.pooled(pool)

    # Ranking

    def ranking(
        self,
        system: str,
        split: str,
        key: Any,
        documents: Callable[[], Embeddings],
        single: bool = False,
        bits: bool = False,
    ) -> Ranking:
        """Exact search, kept under a hash of ``key``; ``single`` scores one vector by the summed query."""
        dataset = self.split(split)
        depends = {"key": key, "split": split, "documents": self.documents.path.name, "data": dataset.qrels}
        path = Path(self.args.cache_dir) / "rankings" / f"{self.name}-{_digest(depends)}.safetensors"

        def make() -> Ranking:
            queries, found = self.queries(split), documents()
            if single:
                queries = sum_of_tokens(queries)
                found = replace(found, kind="sentence", offsets=None)
            made = rank_embeddings(system, queries, found, self.ranks, similarity="dot" if single else "maxsim")
            costs = made.costs | {"vectors_per_document": float(found.lengths.mean())}
            if bits:
                costs["bytes_per_document"] = costs["vectors_per_document"] * found.dim / 8 + (0 if single else 8)
            return replace(made, costs=costs)

        return keep_ranking(path, system, make, KEPT_DEPTH)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


# The table


@dataclass
class Measured:
    """Rankings of one data set, and what the claims need of them."""

    bench: Bench
    split: str
    rankings: list[Ranking] = field(default_factory=list)
    known: dict[str, dict[str, np.ndarray]] = field(default_factory=dict, repr=False)

    @cached_property
    def dataset(self) -> RetrievalDataset:
        """Queries and judgments."""
        return self.bench.split(self.split)

    def add(self, system: str, key: Any, documents: Callable[[], Embeddings], **kwargs: Any) -> None:
        """Rank, and keep the row."""
        self.rankings.append(self.bench.ranking(system, self.split, key, documents, **kwargs))

    def per_query(self, system: str, metric: str = "nDCG@10") -> np.ndarray:
        """A metric of each query, averaged over seeds: ``(queries,)``."""
        if system not in self.known:
            found = [per_query_metrics(self.dataset, r) for r in self.rankings if r.system == system]
            self.known[system] = {name: np.mean([f[name] for f in found], axis=0) for name in found[0]}
        return self.known[system][metric]


class Lazily:
    """One pass over the corpus for several rows, made when the first of them is not there yet."""

    def __init__(self, make: Callable[[], dict[int, Embeddings]]):
        self.make = make

    @cached_property
    def made(self) -> dict[int, Embeddings]:
        """The pass."""
        return self.make()

    def at(self, number: int) -> Callable[[], Embeddings]:
        """What gives the row's vectors."""
        return lambda: self.made[number]


def add_ladder(out: Measured, system: str, key: Any, make: Callable[..., dict[int, Embeddings]], numbers: Any) -> None:
    """Rows of a pooling at several numbers of vectors; one vector is scored as one vector."""
    pooled = Lazily(lambda: make(numbers))
    for k in numbers:
        out.add(f"{system}, {k}", [key, k], pooled.at(k), single=k == 1)


def add_binary(out: Measured, system: str, key: Any, make: Callable[..., dict[int, Embeddings]]) -> None:
    """The same, one bit a dimension."""
    pooled = Lazily(lambda: make(BINARY, binary=True))
    for k in BINARY:
        out.add(f"{system} one-bit, {k}", [key, k, "binary"], pooled.at(k), single=k == 1, bits=True)


def measure(bench: Bench, split: str, seeds: list[int], every: bool = True) -> Measured:
    """Every row of the table for one data set; ``every`` includes the ways to learn one vector."""
    out = Measured(bench, split)
    out.add("full MaxSim", "full", lambda: bench.documents)
    out.add(
        "mean",
        "mean",
        lambda: replace(mean_of_tokens(bench.documents), offsets=np.arange(len(bench.documents) + 1)),
        single=True,
    )
    for seed in seeds:
        add_ladder(out, "random tokens", ["random", seed], lambda n, s=seed: bench.random(n, s), RANDOM)
    add_ladder(out, "hierarchical", "hierarchical", bench.hierarchical, LADDER)
    add_binary(out, "hierarchical", "hierarchical", bench.hierarchical)
    plain = untrained(bench)
    add_ladder(
        out, "k-means", ["kmeans", CODE[0].read_text(encoding="utf-8")], lambda n: bench.by_head(plain, n), LADDER[1:]
    )
    for seed in seeds:
        projection = bench.hierarchical_projection(seed)
        key = [projection.parent.name]

        def projected(numbers: Any, folder: Path = projection, **kwargs: Any) -> dict[int, Embeddings]:
            return bench.hierarchical(numbers, folder, **kwargs)

        add_ladder(out, "hierarchical + projection", key, projected, LADDER)
        add_binary(out, "hierarchical + projection", key, projected)
        for system, flags in LADDERS.items():
            if system == NO_FILTER_NAME and (seed != seeds[0] or not every):
                continue
            folder = bench.head(flags, seed)

            def by_head(numbers: Any, folder: Path = folder, **kwargs: Any) -> dict[int, Embeddings]:
                return bench.by_head(folder, numbers, **kwargs)

            add_ladder(out, system, folder.parent.name, by_head, LADDER)
            if system == "ReinPool":
                add_binary(out, system, folder.parent.name, by_head)
        for system, flags in ONE_VECTOR.items() if every else []:
            if seed != seeds[0] and not system.endswith("+ projection"):
                continue  # several seeds where claims rest on it
            folder = bench.head(flags, seed)
            pooled = Lazily(lambda f=folder: bench.by_head(f, (1,)))
            out.add(system, folder.parent.name, pooled.at(1), single=True)
    return out


def untrained(bench: Bench) -> Path:
    """Folder of a head that keeps everything: spherical k-means."""
    folder = Path(bench.args.cache_dir) / "heads" / f"untrained-{bench.documents.dim}" / "head"
    if not folder.exists():
        ReinPoolModel(
            ReinPoolConfig(dim=bench.documents.dim, num_layers=0, pooling="kmeans", num_vectors=8)
        ).save_pretrained(folder)
    return folder


def rank_single(bench: Bench, split: str) -> Ranking:
    """all-MiniLM-L6-v2, the backbone's own single-vector model."""
    model, dataset = load("minilm", dtype=fastest_dtype("auto")), bench.split(split)
    model.max_seq_length = bench.length or bench.model.max_seq_length
    documents = embed(model, dataset.corpus, task="document", name=dataset.name, **bench.options)
    queries = embed(model, dataset.queries, task="query", name=f"{dataset.name}-{split}", **bench.options)
    return rank_embeddings("all-MiniLM-L6-v2", queries, documents, bench.ranks, similarity="cosine")


def add_transfer(out: Measured, heads: dict[str, Path]) -> None:
    """Rows of heads that were fitted on other corpora."""
    for other, folder in heads.items():
        if other != out.bench.name:
            pooled = Lazily(lambda f=folder: out.bench.by_head(f, (1, 8)))
            for k in (1, 8):
                out.add(f"ReinPool of {other}, {k}", [folder.parent.name, k], pooled.at(k), single=k == 1)


def gap_closed(out: Measured, system: str, rows: np.ndarray, metric: str = "nDCG@10") -> np.ndarray:
    """(system - mean) / (full - mean), for each row of query positions."""
    ours, low, high = (out.per_query(name, metric)[rows].mean(1) for name in (system, "mean", "full MaxSim"))
    return (ours - low) / np.maximum(high - low, 1e-9)


def claims(measured: list[Measured], heads: list[Path]) -> list[dict[str, Any]]:
    """The figures that the card promises: macro means, with intervals from resampling the queries of every set."""
    generator = np.random.default_rng(0)
    draws = [generator.integers(len(m.dataset.queries), size=(2000, len(m.dataset.queries))) for m in measured]
    everyone = [np.arange(len(m.dataset.queries))[None] for m in measured]
    found: list[dict[str, Any]] = []

    def claim(name: str, statistic: Callable[..., np.ndarray], target: float | None, bound: str = "value") -> None:
        by_set = [float(statistic(m, rows)[0]) for m, rows in zip(measured, everyone, strict=True)]
        resampled = np.mean([statistic(m, rows) for m, rows in zip(measured, draws, strict=True)], axis=0)
        interval = [float(x) for x in np.percentile(resampled, [2.5, 97.5])]
        value = float(np.mean(by_set))
        held = {"value": value, "lower": interval[0]}[bound]
        entry: dict[str, Any] = {"claim": f"reinpool.{name}", "value": value, "interval": interval}
        entry |= {"target": target, "met": None if target is None else bool(held >= target), "held_to": bound}
        found.append(entry | {"split": measured[0].split, "by_dataset": dict(zip(names, by_set, strict=True))})

    names = [m.bench.name for m in measured]

    def points(m: Measured, rows: np.ndarray, ours: str, *others: str) -> np.ndarray:
        best = max(others, key=lambda name: m.per_query(name).mean())  # the stronger control of each set
        return 100 * (m.per_query(ours)[rows].mean(1) - m.per_query(best)[rows].mean(1))

    for k, target in ((1, 0.4), (2, None), (4, 0.6), (8, 0.75), (16, 0.9), (32, 0.97)):
        claim(f"gap_closed_{k}", lambda m, rows, k=k: gap_closed(m, f"ReinPool, {k}", rows), target)
    claim("gap_closed_binary16", lambda m, rows: gap_closed(m, "ReinPool one-bit, 16", rows), 0.6)
    claim(
        "filter_net_gain_1",
        lambda m, rows: points(m, rows, "ReinPool soft + projection", "mean + projection"),
        0.0,
        "lower",
    )
    for k in LADDER:
        both = (f"hierarchical, {k}", f"hierarchical + projection, {k}")
        target = 0.0 if k <= 8 else -0.5
        claim(
            f"margin_over_hierarchical_{k}",
            lambda m, r, k=k, b=both: points(m, r, f"ReinPool, {k}", *b),
            target,
            "lower",
        )
    for k in BINARY:
        both = (f"hierarchical one-bit, {k}", f"hierarchical + projection one-bit, {k}")
        claim(
            f"margin_over_hierarchical_binary{k}",
            lambda m, r, k=k, b=both: points(m, r, f"ReinPool one-bit, {k}", *b),
            None,
        )

    def retention(m: Measured, rows: np.ndarray) -> np.ndarray:
        return m.per_query("ReinPool, 1", "nDCG@3")[rows].mean(1) / m.per_query("full MaxSim", "nDCG@3")[rows].mean(1)

    def transferred(m: Measured, rows: np.ndarray) -> np.ndarray:
        others = [f"ReinPool of {name}, 1" for name in names if name != m.bench.name]
        return np.mean([gap_closed(m, other, rows) for other in others], axis=0)

    claim("retention_1_ndcg3", retention, None)
    claim("gap_closed_1_ndcg3", lambda m, rows: gap_closed(m, "ReinPool, 1", rows, "nDCG@3"), None)
    if len(measured) > 1:
        claim("transfer_gap_closed", transferred, 0.0, "lower")
    seconds = [read_json(folder.parent / "training.json")["seconds"] for folder in heads]
    size = sum(p.numel() for p in AutoModel.from_pretrained(heads[0]).parameters())
    for name, value, target in (("fit_seconds", max(seconds), 180), ("parameters", size, 2_000_000)):
        found.append({"claim": f"reinpool.{name}", "value": value, "target": target, "met": bool(value <= target)})
    return found


def rows_of(out: Measured) -> list[dict[str, Any]]:
    """Rows of the table with the gap that they close, where there is a gap of two points or more."""
    rows = table_rows(out.dataset, out.rankings, "full MaxSim")
    value = {(row["system"], row["metric"]): row["value"] for row in rows}
    for row in rows:
        low, high = (value[name, row["metric"]] for name in ("mean", "full MaxSim"))
        if row["metric"] in ("nDCG@10", "nDCG@3"):
            row["retention"] = row["value"] / high
            if high - low >= 0.02:
                row["gap_closed"] = (row["value"] - low) / (high - low)
    return rows


def ablation(bench: Bench, seed: int) -> dict[str, Any]:
    """Every lever on dev, one data set, one seed."""
    out = Measured(bench, "dev")
    out.add("full MaxSim", "full", lambda: bench.documents)
    mean = replace(mean_of_tokens(bench.documents), offsets=np.arange(len(bench.documents) + 1))
    out.add("mean", "mean", lambda: mean, single=True)
    for variant, flags in tqdm(ABLATIONS.items(), desc="ablation"):
        folder = bench.head(flags, seed)
        config = AutoModel.from_pretrained(folder).config
        numbers = (1,) if config.pooling == "mean" else LADDER if config.pooling == "kmeans" else (config.num_vectors,)
        pooled = Lazily(lambda f=folder, n=numbers: bench.by_head(f, n))
        for k in numbers:
            out.add(f"{variant}, {k}", [folder.parent.name, k], pooled.at(k), single=k == 1)
        values = {k: round(float(out.per_query(f"{variant}, {k}").mean()), 4) for k in numbers}
        print(f"{variant:<40} {values}", flush=True)
    drawn = ["full MaxSim", "mean", "recipe", "no filter", "no refinement", "no projection", "slots"]
    return {"rows": rows_of(out), "drawn": drawn}


def main() -> None:
    """Fit, measure and write."""
    (args,) = HfArgumentParser([Arguments]).parse_args_into_dataclasses()
    made_by = provenance(shlex.join(["python", *sys.argv]))  # the code as it is now, not after an hour of edits
    folder = fetch(args.backbone)
    model = load(folder, dtype=fastest_dtype("auto"))
    benches = [Bench(args, source, model) for source in args.datasets]

    def write(outcome: dict[str, Any]) -> str:
        results = made_by | {
            "name": f"{args.name}-ablation" if args.ablation else args.name,
            "seeds": args.seeds[:1] if args.ablation else args.seeds,
            "models": {args.backbone: fingerprint(folder)},
            "settings_tried": SETTINGS_TRIED,
            "gap": ["mean", "full MaxSim"],
            "claims": [],
            **outcome,
        }
        return write_results(results, Path(args.output) if args.output else None)

    if args.ablation:
        print(write(ablation(benches[0], args.seeds[0])))
        return
    measured = []
    for bench in benches:
        out = measure(bench, "test", args.seeds)
        out.rankings.append(rank_single(bench, "test"))
        measured.append(out)
    heads = {bench.name: bench.head([], args.seeds[0]) for bench in benches}
    beside = []
    if args.bundle:
        path = Path(args.cache_dir) / "bundle4"
        bench = Bench(args, str(path if path.exists() else bundle(args.datasets[0], path)), model, length=512)
        beside.append(measure(bench, "test", args.seeds[:1], every=False))  # its fits take four times as long
    for source in args.transfer:
        out = Measured(Bench(args, source, model), "test")
        out.add("full MaxSim", "full", lambda b=out.bench: b.documents)
        means = Lazily(
            lambda b=out.bench: {1: replace(mean_of_tokens(b.documents), offsets=np.arange(len(b.documents) + 1))}
        )
        out.add("mean", "mean", means.at(1), single=True)
        beside.append(out)
    for out in [*measured, *beside]:
        if out.bench.length is None:
            add_transfer(out, heads)
    outcome = {
        "rows": [row for out in [*measured, *beside] for row in rows_of(out)],
        "drawn": [
            "full MaxSim",
            "mean",
            "all-MiniLM-L6-v2",
            "hierarchical",
            "hierarchical + projection",
            "ReinPool",
            "ReinPool one-bit",
        ],
        "claims": claims(measured, [bench.head([], seed) for bench in benches for seed in args.seeds]),
    }
    print(write(outcome))


if __name__ == "__main__":
    main()
