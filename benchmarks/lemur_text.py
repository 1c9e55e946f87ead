"""How well one LEMUR vector stands for MaxSim, what re-ranking gives back, and what it costs as a corpus grows.

    python benchmarks/lemur_text.py --ablation --output results     # settings, on dev of the first data set
    python benchmarks/lemur_text.py --output results                # the table on test, three seeds, and the growth

Fitted heads are kept under a hash of run, data, flags and code, so a second run fits only what is missing.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
import time
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.util import maxsim
from tqdm import tqdm
from transformers import HfArgumentParser

from polyrep.cli import train as train_run
from polyrep.data import RetrievalDataset, load_retrieval_dataset
from polyrep.encoding import Embeddings, embed
from polyrep.encoding.embeddings import in_memory, joined
from polyrep.encoding.embeddings import rows as rows_at
from polyrep.evaluation.frontier.muvera import Muvera
from polyrep.evaluation.metrics import per_query_metrics
from polyrep.evaluation.statistics import bootstrap_interval, macro_interval
from polyrep.evaluation.systems import Ranking, bytes_per_document, costs_of
from polyrep.evaluation.table import table_rows
from polyrep.files import read_json
from polyrep.hub import fetch, fingerprint, load
from polyrep.hub.folder import fastest_dtype
from polyrep.methods import LemurModel, LemurPooling
from polyrep.report import provenance, write_results
from polyrep.search import exact_search
from polyrep.search.ranking import filled, rescore, tie_ranks

ROOT = Path(__file__).parent.parent
RUN = ROOT / "hub_configs" / "lemur-minilm"
CODE = [
    file for part in ("methods/lemur", "training", "data") for file in sorted((ROOT / "modeling" / part).glob("*.py"))
]

DIMS = (2048, 512, 256, 128)
RERANKED = 200
SIZES = (1000, 3000, 10_000, 15_769)
LARGER = (30_000, 100_000)
"""Sizes reached by copies of the real documents, with noise on their LEMUR vectors: for time only."""

NOISE = 0.1
"""Deviation of the copies, as a share of that of the real vectors."""

SETTINGS_TRIED = 31
"""On dev: 24 sketches of tokens to learn from, ridges, numbers of documents, anchors and directions; 7 below."""

ABLATIONS: dict[str, list[str]] = {
    "recipe": [],
    "ridge 1e-6, nearly plain least squares": ["--ridge", "1e-6"],
    "ridge 0.1": ["--ridge", "0.1"],
    "tokens of queries alone": ["--queries", "judged"],
    "tokens of the corpus alone": ["--queries", "texts"],
    "random features (elm)": ["--feature_type", "elm"],
    "half the anchors": ["--num_anchors", "4096"],
}
"""Flags of the fit."""


@dataclass
class Arguments:
    """What to fit and measure."""

    datasets: list[str] = field(
        default_factory=lambda: ["tldr_pages", "scitldr", "scifact"], metadata={"help": "BEIR folders."}
    )
    pooled: list[str] = field(
        default_factory=lambda: ["tldr_pages", "scifact", "scitldr", "pubmedqa"],
        metadata={"help": "Data sets whose documents make the corpus that grows."},
    )
    backbone: str = field(
        default="models/four/late-interaction-minilm/final",
        metadata={"help": "Folder or Hub id of a MultiVectorEncoder."},
    )
    ablation: bool = field(default=False, metadata={"help": "Settings on dev instead of the table on test."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the fits."})
    growth_queries: int = field(default=300, metadata={"help": "Queries that the growing corpus is asked."})
    timed_queries: int = field(default=24, metadata={"help": "Queries that are timed, one at a time."})
    flags: str = field(default="", metadata={"help": "Flags of the run for every fit, e.g. '--max_steps 2'."})
    cache_dir: str = field(default=".cache", metadata={"help": "Embeddings and fitted heads."})
    output: str | None = field(default=None, metadata={"help": "Folder for the JSON and Markdown."})
    name: str = field(default="lemur-text", metadata={"help": "Name of the files."})


@dataclass
class Bench:
    """One data set with its cached token vectors."""

    args: Arguments
    source: str
    model: MultiVectorEncoder
    split: str

    @cached_property
    def dataset(self) -> RetrievalDataset:
        """Queries and judgments."""
        return load_retrieval_dataset(self.source, self.split)

    @cached_property
    def documents(self) -> Embeddings:
        """Encoded corpus."""
        return self._embed(dict(self.dataset.corpus), "document", self.dataset.name)

    @cached_property
    def queries(self) -> Embeddings:
        """Encoded queries."""
        return self._embed(self.dataset.queries, "query", f"{self.dataset.name}-{self.split}")

    def _embed(self, texts: dict[str, str], task: Any, name: str) -> Embeddings:
        cache = f"{self.args.cache_dir}/embeddings"
        return embed(self.model, texts, task=task, name=name, cache_dir=cache, batch_size=32)

    @cached_property
    def ranks(self) -> np.ndarray:
        """What decides ties."""
        return tie_ranks(list(self.dataset.corpus))

    @cached_property
    def exact(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions and scores of full MaxSim."""
        options: dict[str, Any] = {"similarity": "maxsim", "k": 1000, "show_progress": True}
        return exact_search(self.queries, self.documents, self.ranks, **options)

    @property
    def full_bytes(self) -> float:
        """Bytes of a document's token vectors."""
        return costs_of(self.queries, self.documents)["bytes_per_document"]

    @property
    def caches(self) -> list[str]:
        """What a fit reads, by names that tell its content."""
        train = load_retrieval_dataset(self.source, "train")
        return [self.documents.path.name, hashlib.sha256(json.dumps(train.queries).encode()).hexdigest()]

    def rows_of(self, system: str, queries: np.ndarray, documents: np.ndarray, *, again: bool = True) -> list[Ranking]:
        """Search by single vectors, and its first documents ranked again by MaxSim."""
        asked, found = in_memory(queries), in_memory(documents.astype(np.float16))
        positions, scores = exact_search(asked, found, self.ranks, similarity="dot", k=1000)
        costs = {
            "bytes_per_document": bytes_per_document("dense", dims=found.dim),
            "maxsim_top10_in_100": float(self.covered(positions).mean()),
        }
        rankings = [Ranking(system, positions, scores, costs)]
        if again:
            first = positions[:, :RERANKED]
            second = rescore(self.queries, self.documents, first, self.ranks, similarity="maxsim")
            costs = {"bytes_per_document": costs["bytes_per_document"] + self.full_bytes}
            rankings.append(Ranking(f"{system}, rerank {RERANKED}", *second, costs))
        return rankings

    def covered(self, positions: np.ndarray, top: int = 10, first: int = 100) -> np.ndarray:
        """Share of each query's best ``top`` by MaxSim that are among the first: ``(queries,)``."""
        return overlap(positions[:, :first], self.exact[0][:, :top])


def overlap(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Share of each row's wanted numbers that were found: ``(rows,)``."""
    return (found[:, :, None] == wanted[:, None]).any(1).mean(1)


def fit(args: Arguments, sources: list[str], seed: int, flags: list[str], documents: list[str]) -> Path:
    """Fit a head with the shipped run and flags over it; the folder above it has ``training.json``."""
    flags = [*flags, *shlex.split(args.flags)]
    depends = {
        "code": [hashlib.sha256(file.read_bytes()).hexdigest() for file in CODE],
        "recipe": {file.name: file.read_text(encoding="utf-8") for file in sorted(RUN.iterdir())},
        "documents": documents,
        "flags": flags,
        "seed": seed,
    }
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:12]
    name = "-".join(Path(source).name for source in sources)
    folder = Path(args.cache_dir) / "heads" / f"{name}-lemur-{digest}"
    if not (folder / "training.json").is_file():
        where = ["--output_dir", str(folder), "--overwrite", "--cache_dir", f"{args.cache_dir}/embeddings"]
        what = ["--backbone", args.backbone, "--datasets", *sources, "--seed", str(seed)]
        threads = torch.get_num_threads()
        train_run([RUN.name, *what, *where, "--save_strategy", "no", "--head_only", "true", *flags], prog="train.py")
        torch.set_num_threads(threads)
    return folder / "head"


def opened(folder: Path) -> LemurModel:
    """A head that gives its features, from which all its widths follow."""
    return LemurPooling.from_pretrained(str(folder), embedding_dim=DIMS[0], equal_norms=False).model.eval()


def encode(head: LemurModel, bench: Bench) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Both sides at full width, and seconds for the documents."""
    started = time.perf_counter()
    documents = head.encode_document_tokens(bench.documents.values, bench.documents.offsets)
    seconds = time.perf_counter() - started
    return head.encode_query_tokens(bench.queries.values, bench.queries.offsets), documents, seconds


@torch.inference_mode()
def by_widths(head: LemurModel, bench: Bench, label: str, *, again: bool = True) -> tuple[list[Ranking], float]:
    """Rows of one head at every width, and seconds to encode the documents."""
    queries, documents, seconds = encode(head, bench)
    rankings = []
    for dim in DIMS:
        sides = [head.reduce(side, task, dim).numpy() for side, task in ((queries, "query"), (documents, "document"))]
        rankings += bench.rows_of(f"{label}, {dim}", *sides, again=again)
    return rankings, seconds


@torch.inference_mode()
def mean_of_features(head: LemurModel, bench: Bench) -> list[Ranking]:
    """The control without least squares: a document is the mean of its tokens' features."""
    offsets, values = bench.documents.offsets, bench.documents.values
    assert offsets is not None
    made = np.empty((len(bench.documents), DIMS[0]), np.float32)
    for start in range(0, len(made), 256):
        stop = min(start + 256, len(made))
        tokens = torch.from_numpy(values[offsets[start] : offsets[stop]].astype(np.float32))
        sums = np.add.reduceat(head.features(tokens).numpy(), offsets[start:stop] - offsets[start], axis=0)
        made[start:stop] = sums / bench.documents.lengths[start:stop, None]
    queries = head.encode_query_tokens(bench.queries.values, bench.queries.offsets).numpy()
    return bench.rows_of(f"mean of features, {DIMS[0]}", queries, made, again=False)


def by_muvera(bench: Bench, repetitions: int, k_sim: int, seed: int) -> list[Ranking]:
    """Fixed dimensional encodings of both sides, of 16 numbers a partition."""
    encoder = Muvera(bench.documents.dim, k_sim=k_sim, dim_proj=16, repetitions=repetitions, seed=seed)
    sides = [
        encode(side.values, side.offsets).numpy()
        for encode, side in ((encoder.queries, bench.queries), (encoder.documents, bench.documents))
    ]
    return bench.rows_of(f"MUVERA, {sides[0].shape[1]}", *sides)


@dataclass
class Measured:
    """Rankings of one data set, and what the claims need of them."""

    bench: Bench
    rankings: list[Ranking] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def of(self, system: str) -> list[Ranking]:
        """The seeds of a system."""
        return [ranking for ranking in self.rankings if ranking.system == system]

    def ndcg(self, system: str) -> np.ndarray:
        """nDCG@10 of each query, averaged over seeds."""
        found = [per_query_metrics(self.bench.dataset, ranking)["nDCG@10"] for ranking in self.of(system)]
        return np.mean(found, axis=0)

    def covered(self, system: str) -> np.ndarray:
        """Share of the exact ten best among the first hundred, of each query."""
        return np.mean([self.bench.covered(ranking.positions) for ranking in self.of(system)], axis=0)


def measure(args: Arguments, bench: Bench) -> Measured:
    """Every row of the table for one data set."""
    out = Measured(bench)
    out.rankings.append(Ranking("full MaxSim", *bench.exact, {"bytes_per_document": bench.full_bytes}))
    for seed in args.seeds:
        folder = fit(args, [bench.source], seed, [], bench.caches)
        rankings, seconds = by_widths(opened(folder), bench, "LEMUR")
        fitting = read_json(folder.parent / "training.json")["seconds"]
        share = 5000 / len(bench.documents)
        out.seconds.append(fitting + seconds * share)
        out.rankings += rankings
        if seed == args.seeds[0]:
            out.rankings += mean_of_features(opened(folder), bench)
        out.rankings += by_muvera(bench, 20, 5, seed) + by_muvera(bench, 4, 5, seed)
    return out


def claims(measured: list[Measured], growth: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures that the card promises: means over the data sets, intervals over their queries."""
    found: list[dict[str, Any]] = []
    names = [m.bench.dataset.name for m in measured]

    def claim(name: str, values: list[np.ndarray], target: float, *, strict: bool = False) -> None:
        per_set = dict(zip(names, values, strict=True))
        interval = list(macro_interval(per_set))
        add(name, {name: float(v.mean()) for name, v in per_set.items()}, interval, target, strict)

    def add(name: str, by_set: dict[str, float], interval: list[float], target: float, strict: bool) -> None:
        value = float(np.mean(list(by_set.values())))
        met = interval[0] > target if strict else value >= target
        entry: dict[str, Any] = {"claim": f"lemur.{name}", "value": value, "interval": interval, "target": target}
        entry |= {"met": bool(met), "held_to": "lower" if strict else "value", "split": measured[0].bench.split}
        found.append(entry | {"by_dataset": by_set})

    def retention(name: str, system: str) -> None:
        """Ratio of the means, both resampled over the same queries."""
        draw, ratios, by_set = np.random.default_rng(0), [], {}
        for m in measured:
            ours, whole = m.ndcg(system), m.ndcg("full MaxSim")
            rows = draw.integers(len(ours), size=(2000, len(ours)))
            ratios.append(ours[rows].mean(1) / whole[rows].mean(1))
            by_set[m.bench.dataset.name] = float(ours.mean() / whole.mean())
        add(name, by_set, [float(x) for x in np.percentile(np.mean(ratios, axis=0), [2.5, 97.5])], 0.99, False)

    widest, rival = f"LEMUR, {DIMS[0]}", "MUVERA, 10240"
    claim("recall100_top10", [m.covered(widest) for m in measured], 0.95)
    for dim in DIMS[1:]:
        claim(f"recall100_top10_{dim}", [m.covered(f"LEMUR, {dim}") for m in measured], 0.95)
    margins = [100 * (m.ndcg(widest) - m.ndcg(rival)) for m in measured]
    claim("margin_over_muvera_5x", margins, 0.0, strict=True)
    for dim in (DIMS[0], DIMS[1], DIMS[-1]):
        name = "rerank200_retention" if dim == DIMS[0] else f"rerank200_retention_{dim}"
        retention(name, f"LEMUR, {dim}, rerank 200")
    for row in growth:
        if (row.get("documents"), row["system"]) != (10_000, f"LEMUR, {DIMS[0]}, rerank 200"):
            continue
        if "time_ratio" in row:
            for name, target in (("time", 0.10), ("flops", 0.05)):
                value = row[f"{name}_ratio"]
                entry = {"claim": f"lemur.rerank200_{name}_ratio_10k", "value": value, "target": target}
                found.append(entry | {"met": bool(value <= target), "interval": row[f"{name}_interval"]})
    slowest = max(seconds for m in measured for seconds in m.seconds)
    found.append({"claim": "lemur.fit_seconds", "value": slowest, "target": 300, "met": bool(slowest <= 300)})
    return found


# A corpus that grows


class Pool:
    """Documents of several data sets as one corpus in a seeded order, and some of their test queries."""

    def __init__(self, args: Arguments, model: MultiVectorEncoder):
        self.benches = [Bench(args, source, model, "test") for source in args.pooled]
        draw = np.random.default_rng(0)
        first = np.cumsum([0, *(len(b.documents) for b in self.benches)])
        self.order = draw.permutation(first[-1])
        place = np.argsort(self.order)
        self.documents = taken([b.documents for b in self.benches], self.order)
        self.ids = np.array([f"{b.dataset.name}/{i}" for b in self.benches for i in b.dataset.corpus])[self.order]
        asked = [(n, row) for n, b in enumerate(self.benches) for row in range(len(b.queries))]
        chosen = sorted(draw.permutation(len(asked))[: args.growth_queries].tolist())
        self.queries = taken([b.queries for b in self.benches], np.array(chosen))
        where = [{identifier: i for i, identifier in enumerate(b.dataset.corpus)} for b in self.benches]
        judged = [list(b.dataset.qrels.values()) for b in self.benches]
        self.relevant = [
            {int(place[first[n] + where[n][d]]): score for d, score in judged[n][row].items()}
            for n, row in (asked[i] for i in chosen)
        ]

    def dataset(self, size: int) -> tuple[RetrievalDataset, np.ndarray]:
        """The first ``size`` documents, and the queries with something relevant among them."""
        ids = self.ids[:size].tolist()
        kept = {q: {p: s for p, s in found.items() if p < size} for q, found in enumerate(self.relevant)}
        kept = {q: found for q, found in kept.items() if any(s > 0 for s in found.values())}
        qrels = {str(q): {ids[p]: s for p, s in found.items()} for q, found in kept.items()}
        texts = dict.fromkeys(qrels, "")
        return RetrievalDataset("pooled", "test", dict.fromkeys(ids, ""), texts, qrels), np.array(list(kept))


def taken(sides: list[Embeddings], order: np.ndarray) -> Embeddings:
    """Texts of several caches, in an order, in float32 in memory."""
    found = rows_at(joined(sides), order)
    return replace(found, values=np.asarray(found.values, np.float32))


def grow(args: Arguments, model: MultiVectorEncoder) -> list[dict[str, Any]]:
    """Quality, milliseconds and FLOPs of a query, as the corpus grows."""
    pool = Pool(args, model)
    folder = fit(args, args.pooled, args.seeds[0], [], [name for b in pool.benches for name in b.caches])
    return grown(args, pool, opened(folder))


@torch.inference_mode()
def grown(args: Arguments, pool: Pool, head: LemurModel) -> list[dict[str, Any]]:
    """The rows of :func:`grow`, by a head that is fitted to the whole pool."""
    started = time.perf_counter()
    whole = head.encode_document_tokens(pool.documents.values, pool.documents.offsets)
    encoding = time.perf_counter() - started
    asked = head.encode_query_tokens(pool.queries.values, pool.queries.offsets)
    rows: list[dict[str, Any]] = []
    for size in tqdm((*SIZES, *LARGER), desc="growth"):
        real = min(size, len(pool.ids))
        documents = rows_at(pool.documents, np.arange(real))
        dataset, kept = pool.dataset(real)
        base: dict[str, Any] = {"dataset": "pooled", "split": "test", "documents": size}
        if size <= len(pool.ids):
            ranks = tie_ranks(list(dataset.corpus))
            queries = rows_at(pool.queries, kept)
            positions, scores = exact_search(queries, documents, ranks, similarity="maxsim", k=1000)
            full = per_query_metrics(dataset, Ranking("full MaxSim", positions, scores))["nDCG@10"]
            quality: dict[str, dict[str, np.ndarray]] = {"full MaxSim": {"nDCG@10": full}}
            for dim in DIMS[:2]:
                sides = (head.reduce(asked[kept], "query", dim), head.reduce(whole[:size], "document", dim))
                found = exact_search(
                    in_memory(sides[0].numpy()), in_memory(sides[1].half().numpy()), ranks, similarity="dot", k=1000
                )
                again = rescore(queries, documents, found[0][:, :200], ranks, similarity="maxsim")
                quality[f"LEMUR, {dim}"] = {
                    "recall@100 of MaxSim's ten best": overlap(found[0][:, :100], positions[:, :10]),
                    "nDCG@10": per_query_metrics(dataset, Ranking("", *found))["nDCG@10"],
                }
                quality[f"LEMUR, {dim}, rerank 200"] = {
                    "nDCG@10": per_query_metrics(dataset, Ranking("", *again))["nDCG@10"]
                }
            for system, metrics in quality.items():
                for metric, values in metrics.items():
                    interval = list(bootstrap_interval(values))
                    row = {"system": system, "metric": f"{metric}, {size:,}", "value": float(values.mean())}
                    rows.append(base | row | {"interval": interval, "queries": len(values)})
        rows += [base | row for row in timed(args, head, documents, pool.queries, asked, whole[:real], size)]
    rows.append(
        {
            "system": f"LEMUR, {DIMS[0]}",
            "dataset": "pooled",
            "split": "test",
            "metric": "ms to encode a document from its tokens",
            "value": 1000 * encoding / len(whole),
        }
    )
    return rows


def timed(
    args: Arguments,
    head: LemurModel,
    documents: Embeddings,
    queries: Embeddings,
    asked: torch.Tensor,
    vectors: torch.Tensor,
    size: int,
) -> list[dict[str, Any]]:
    """Milliseconds of one query alone, and its FLOPs, of full MaxSim and of both stages.

    Full MaxSim is sentence-transformers' own over padded blocks of documents of similar length, held ready; beyond the
    real documents it goes over the same blocks again, and the LEMUR vectors are noisy copies.
    """
    order, lengths = np.argsort(documents.lengths, kind="stable"), documents.lengths
    blocks = []
    for rows in np.array_split(order, max(1, len(order) // 256)):
        tokens = torch.from_numpy(filled(documents, rows))
        mask = torch.arange(tokens.shape[1]) < torch.from_numpy(lengths[rows])[:, None]
        blocks.append((tokens, mask))
    times, extra = divmod(size, len(documents))
    # The rest as blocks spread over all lengths.
    rest = np.linspace(0, len(blocks) - 1, max(1, round(len(blocks) * extra / len(documents)))).astype(int)
    part = [blocks] * times + ([[blocks[i] for i in rest]] if extra else [])
    chosen = np.linspace(0, len(queries) - 1, args.timed_queries).astype(int)
    bounds = queries.offsets
    assert bounds is not None
    whole, found = [], []
    many: dict[int, torch.Tensor] = {}
    for dim in DIMS[:2]:
        one = head.reduce(vectors, "document", dim).float()
        copies = [one]
        generator = torch.Generator().manual_seed(0)
        while sum(map(len, copies)) < size:
            copies.append(one + NOISE * one.std() * torch.randn(one.shape, generator=generator))
        many[dim] = torch.cat(copies)[:size].contiguous()
    seconds: dict[int, list[float]] = {dim: [] for dim in many}
    tokens_asked, tokens_found = [], {dim: [] for dim in many}
    ranks = np.arange(len(documents))
    for row in chosen:
        tokens = torch.from_numpy(queries.values[bounds[row] : bounds[row + 1]].astype(np.float32))
        tokens_asked.append(len(tokens))
        started = time.perf_counter()
        scores = torch.cat([maxsim(tokens[None], block, b_mask=mask)[0] for some in part for block, mask in some])
        scores.topk(min(10, len(scores)))
        whole.append(time.perf_counter() - started)
        query = rows_at(queries, np.array([row]))
        for dim, index in many.items():
            started = time.perf_counter()
            vector = head.reduce(head(tokens[None], task="query").sentence_embedding, "query", dim)
            first = (index @ vector[0]).topk(min(200, len(index))).indices.numpy() % len(documents)
            found = rescore(query, documents, first[None], ranks, similarity="maxsim")
            seconds[dim].append(time.perf_counter() - started)
            tokens_found[dim].append(int(lengths[found[0]].sum()))
    width, latent = head.config.token_dim, head.config.latent_dim
    count = np.array(tokens_asked)
    exact_flops = 2 * width * count * float(lengths.mean()) * size
    note = {"copies": True} if size > len(documents) else {}
    rows = [
        {"system": "full MaxSim", "metric": f"ms per query, {size:,}", "value": 1000 * float(np.median(whole))} | note
    ]
    for dim in many:
        flops = 2 * count * width * latent + 2 * dim * size + 2 * width * count * np.array(tokens_found[dim])
        flops = flops + (2 * latent * dim if dim < latent else 0)
        ratios = np.array(seconds[dim]) / np.array(whole)
        row = {"system": f"LEMUR, {dim}, rerank 200", "metric": f"ms per query, {size:,}"}
        row |= {"value": 1000 * float(np.median(seconds[dim])), "time_ratio": float(np.median(ratios))}
        row |= {"flops_ratio": float((flops / exact_flops).mean())}
        again = np.random.default_rng(0).integers(len(ratios), size=(2000, len(ratios)))
        row["time_interval"] = [float(x) for x in np.percentile(np.median(ratios[again], axis=1), [2.5, 97.5])]
        row["flops_interval"] = list(bootstrap_interval(flops / exact_flops))
        rows.append(row | note)
        for name, ratio in (("time", "time_ratio"), ("FLOPs", "flops_ratio")):
            metric = f"{name} over full MaxSim's, {size:,}"
            rows.append({"system": row["system"], "metric": metric, "value": row[ratio]} | note)
    return rows


def ablation(args: Arguments, bench: Bench) -> list[dict[str, Any]]:
    """Settings on dev, one seed."""
    rankings = [Ranking("full MaxSim", *bench.exact, {"maxsim_top10_in_100": 1.0})]
    for name, flags in tqdm(ABLATIONS.items(), desc="ablation"):
        folder = fit(args, [bench.source], args.seeds[0], flags, bench.caches)
        rankings += by_widths(opened(folder), bench, name, again=False)[0]
    return table_rows(
        bench.dataset,
        [replace(r, costs={"maxsim_top10_in_100": r.costs["maxsim_top10_in_100"]}) for r in rankings],
        "full MaxSim",
    )


def main() -> None:
    """Fit, measure and write."""
    (args,) = HfArgumentParser([Arguments]).parse_args_into_dataclasses()
    made_by = provenance(shlex.join(["python", *sys.argv]))  # the code as it is now, not after an hour of edits
    folder = fetch(args.backbone)
    model = load(folder, dtype=fastest_dtype("auto"))
    results: dict[str, Any] = made_by | {
        "name": f"{args.name}-ablation" if args.ablation else args.name,
        "seeds": args.seeds[:1] if args.ablation else args.seeds,
        "models": {args.backbone: fingerprint(folder)},
        "settings_tried": SETTINGS_TRIED,
        "claims": [],
        "drawn": [],
    }
    if args.ablation:
        results["rows"] = ablation(args, Bench(args, args.datasets[0], model, "dev"))
    else:
        growth = grow(args, model)  # first, while nothing else fills the memory
        measured = [measure(args, Bench(args, source, model, "test")) for source in args.datasets]
        rows = [row for m in measured for row in table_rows(m.bench.dataset, m.rankings, "full MaxSim")]
        results |= {"rows": [*rows, *growth], "claims": claims(measured, growth)}
    print(write_results(results, Path(args.output) if args.output else None))


if __name__ == "__main__":
    main()
