"""What Dense2Sparse gains on text, beside its controls and rivals on the same cached vectors.

    python benchmarks/dense2sparse_text.py --quick                      # the quick start's table, terms and picture
    python benchmarks/dense2sparse_text.py --ablation --flags '--max_steps 60' --output results  # every lever, on dev
    python benchmarks/dense2sparse_text.py --output results             # the table on test, three seeds
    python benchmarks/dense2sparse_text.py --output results --splade naver/splade-v3            # with a trained rival

Fitted heads and encoded texts are kept under a hash of everything that they depend on, so a second run, or one that
was interrupted, does only what is missing; with ``--splade`` it encodes that rival and takes the rest as it is.
"""

from __future__ import annotations

import hashlib
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import ROOT, FitBench, code_of
from safetensors.torch import load_model
from scipy.sparse import csr_matrix
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense
from tqdm import tqdm
from transformers import AutoModel, HfArgumentParser, set_seed

from polyrep.cli import train as train_run
from polyrep.data import RetrievalDataset
from polyrep.data.named import made_here
from polyrep.encoding import Embeddings, embed
from polyrep.errors import InputError
from polyrep.evaluation.bm25 import rank_with_bm25
from polyrep.evaluation.frontier.csr import CSR_BATCH, CSR_RATE, CSR_SIZES, CSR_STEPS, csr, fit_module, with_csr
from polyrep.evaluation.metrics import per_query_metrics
from polyrep.evaluation.systems import Ranking, rank_embeddings
from polyrep.evaluation.table import table_rows
from polyrep.files import read_json
from polyrep.hub import fetch, fingerprint, load
from polyrep.hub.folder import fastest_dtype
from polyrep.methods.dense2sparse.frontier import OPERATING_POINTS, pruned, with_head
from polyrep.report import provenance, write_results
from polyrep.training.losses import info_nce
from polyrep.training.pairs import HeadData
from polyrep.training.sides import SentenceSide

RUN = ROOT / "hub_configs" / "dense2sparse-minilm"

CONTROL = ["--control", "caption"]
LABELS = ["--label_weight", "0.5"]
WIDE, NARROW = OPERATING_POINTS

SETTINGS_TRIED = 90
"""On dev: 30 first sketches, the levers below, 46 operating points; and 14 settings of CSR, 4 of the adapter."""

HYBRID_WEIGHTS = np.arange(0.1, 1.0, 0.1)

ABLATIONS: dict[str, dict[str, list[str]]] = {
    "default": {"default": []},
    "control": {f"control by {how}": ["--control", how] for how in ("batch", "caption", "term")},
    "initialisation and alignment": {
        "ridge alignment alone (1 step)": ["--max_steps", "1"],
        "word embeddings without alignment": ["--alignment", "none"],
        "random without alignment": ["--initialization", "random", "--alignment", "none"],
    },
    "head": {
        "one hidden layer": ["--hidden_layers", "1"],
        "gate supervision 0.1": ["--gate_weight", "0.1"],
    },
    "regulariser": {
        "L1": ["--regularizer", "l1", "--regularizer_weight", "0.003"],
        "FLOPS": ["--regularizer", "flops", "--regularizer_weight", "0.1"],
    },
    "own tokens": {
        "as published (no own tokens or alignment; L1; both directions)": [
            *("--own_tokens", "none", "--alignment", "none", "--bidirectional", "true"),
            *("--regularizer", "l1", "--regularizer_weight", "0.003"),
        ],
        "no own tokens (as the paper)": ["--own_tokens", "none"],
        "no expansion": ["--expansion", "none"],
    },
    "teacher": {
        "dense and 15 % BM25": ["--teacher_lexical", "0.15"],
        "half labels": ["--label_weight", "0.5"],
        "labels alone": ["--label_weight", "1"],
    },
}


@dataclass
class Arguments:
    """What to fit and measure."""

    datasets: list[str] = field(
        default_factory=lambda: ["tldr_pages", "scitldr", "scifact"], metadata={"help": "BEIR folders."}
    )
    backbone: str = field(default="minilm", metadata={"help": "Folder, Hub id, or minilm."})
    splade: str | None = field(
        default=None, metadata={"help": "A trained SparseEncoder as a rival in the table: folder or Hub id."}
    )
    quick: bool = field(
        default=False, metadata={"help": "One data set, one seed, and the top terms of three queries."}
    )
    ablation: bool = field(default=False, metadata={"help": "Every lever on dev instead of the table on test."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the fits."})
    flags: str = field(default="", metadata={"help": "Flags of the run for every fit, e.g. '--max_steps 2'."})
    cache_dir: str = field(default=".cache", metadata={"help": "Embeddings and fitted heads."})
    output: str | None = field(default=None, metadata={"help": "Folder for the JSON, Markdown and PNG."})
    name: str = field(default="dense2sparse-text", metadata={"help": "Name of the files."})


class MaskedContrastiveLoss(torch.nn.Module):
    """InfoNCE over cosines with a learned temperature; the same document elsewhere in the batch is no negative.

    The label branch of Dense2SparseLoss for dense vectors, so that both learn from the same pairs in the same way.
    """

    def __init__(self, model: SentenceTransformer):
        super().__init__()
        self.model, self.log_scale = model, torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, features: list[dict[str, torch.Tensor]], labels: torch.Tensor) -> torch.Tensor:
        """Loss of a batch of queries and documents."""
        sides = [self.model(dict(side))["sentence_embedding"] for side in features]
        queries, documents = (torch.nn.functional.normalize(side, dim=1) for side in sides)
        index = features[1]["index"]
        return info_nce(queries @ documents.T * self.log_scale.exp(), labels, index[labels], index)


class Bench(FitBench):
    """One data set with its cached vectors, and everything that can be fitted to them."""

    run, code = RUN, code_of("methods/dense2sparse", "training")
    rival_steps, rival_batch = CSR_STEPS, CSR_BATCH

    def queries(self, split: str) -> SentenceSide:
        """Encoded queries of a split."""
        dataset = self.split(split)
        return SentenceSide.encode(self.model, dataset.queries, "query", f"{dataset.name}-{split}", **self.options)

    @cached_property
    def documents(self) -> SentenceSide:
        """Encoded corpus."""
        dataset = self.split("dev")
        return SentenceSide.encode(self.model, dataset.corpus, "document", dataset.name, **self.options)

    @property
    def inputs(self) -> dict[str, Any]:
        """What tells the vectors that a fit reads."""
        vectors = np.ascontiguousarray(self.documents.embeddings.values).data
        return {"backbone": fingerprint(fetch(self.args.backbone)), "documents": hashlib.sha256(vectors).hexdigest()}

    def dense2sparse(self, flags: list[str], seed: int, *, whole: bool = False) -> Path:
        """Fit a head with the shipped run and flags over it; ``whole`` writes the retriever too."""
        # Projections in half precision where the processor computes in it; scores never are.
        flags = ["--bf16", str(fastest_dtype("auto") == torch.bfloat16), *self.flags, *flags]

        def fit(folder: Path) -> None:
            where = ["--output_dir", str(folder), "--overwrite", "--cache_dir", self.options["cache_dir"]]
            what = ["--backbone", self.args.backbone, "--datasets", str(self.source), "--seed", str(seed)]
            plain = ["--save_strategy", "no", "--head_only", str(not whole)]
            train_run([self.run.name, *what, *where, *plain, *flags], prog="train.py")

        return self.fitted("d2s", {"arguments": flags, "seed": seed, "whole": whole}, fit)

    def rival(self, kind: str, seed: int, size: int = 0, labels: bool = True) -> torch.nn.Module:
        """A stock module fitted on the same pairs with the same sampling and steps: ``adapter`` or ``csr``."""
        dim = self.model.get_embedding_dimension()
        if kind == "adapter":
            module: torch.nn.Module = Dense(dim, dim, bias=False, activation_function=torch.nn.Identity())
            torch.nn.init.eye_(module.linear.weight)
            model: Any = SentenceTransformer(modules=[module], device="cpu")
            objective: Any = MaskedContrastiveLoss(model)
        else:
            module, objective = csr(dim, size)
        steps = (
            self.rival_steps
            if "--max_steps" not in self.flags
            else int(self.flags[self.flags.index("--max_steps") + 1])
        )
        rate = 3e-4 if kind == "adapter" else CSR_RATE  # the former the best on dev of 1e-4 to 1e-3

        def fit(folder: Path) -> None:
            set_seed(seed)
            data = HeadData(labels=labels)
            data.add(self.model, self.split("train"), **self.options)
            options = {"steps": steps, "rate": rate, "batch": self.rival_batch, "seed": seed}
            fit_module(module, objective, data, folder, **options)

        folder = self.fitted(kind, {"seed": seed, "size": size, "labels": labels, "rate": rate, "steps": steps}, fit)
        load_model(module, folder / "module.safetensors")
        return module.eval()

    def ranking(
        self, system: str, queries: Embeddings, documents: Embeddings, similarity: str = "dot", **extra: float
    ) -> Ranking:
        """Exact search, with further figures for the row."""
        ranking = rank_embeddings(system, queries, documents, self.ranks, similarity=similarity)
        return replace(ranking, costs=ranking.costs | extra)


def readability(side: SentenceSide, documents: Embeddings, special: list[int]) -> dict[str, float]:
    """Share of the 20 heaviest words that occur in their own text, and entropy of word use in bits."""
    kept = ~np.isin(side.tokens, special)
    text_of = np.repeat(np.arange(len(side)), np.diff(side.offsets))
    shape = (len(side), documents.dim)
    own = csr_matrix((np.ones(kept.sum(), np.float32), (text_of[kept], side.tokens[kept])), shape=shape)
    weights = csr_matrix((documents.values.astype(np.float32), documents.indices, documents.offsets), shape=shape)
    shares = []
    for start in range(0, len(side), 512):
        block = torch.from_numpy(weights[start : start + 512].toarray())
        heavy, terms = block.topk(20, dim=1)
        present = torch.from_numpy(own[start : start + 512].toarray()).gather(1, terms) > 0
        shares.append((present & (heavy > 0)).sum(1) / (heavy > 0).sum(1).clamp(min=1))
    usage = np.bincount(documents.indices, minlength=documents.dim) / len(documents.indices)
    entropy = -float((usage[usage > 0] * np.log2(usage[usage > 0])).sum())
    return {"own_token_share": float(torch.cat(shares).mean()), "entropy_bits": entropy}


def standardised(scores: np.ndarray) -> np.ndarray:
    """Scores of each query less their mean, over their deviation: ``(queries, documents)``."""
    return (scores - scores.mean(1, keepdims=True)) / np.maximum(scores.std(1, keepdims=True), 1e-9)


def all_scores(queries: Embeddings, documents: Embeddings) -> np.ndarray:
    """Every inner product: ``(queries, documents)``."""
    if queries.kind == "sentence":
        return np.asarray(queries.values, np.float32) @ np.asarray(documents.values, np.float32).T
    sides = [
        csr_matrix((side.values.astype(np.float32), side.indices, side.offsets), shape=(len(side), side.dim))
        for side in (queries, documents)
    ]
    return (sides[0] @ sides[1].T).toarray()


def ranked_scores(system: str, scores: np.ndarray, ranks: np.ndarray, costs: dict[str, float]) -> Ranking:
    """Ranking by given scores, ties as everywhere."""
    order = np.lexsort((ranks[None].repeat(len(scores), 0), -scores), axis=1)[:, :1000]
    return Ranking(system, order, np.take_along_axis(scores, order, 1), costs)


def ndcg(dataset: RetrievalDataset, ranking: Ranking) -> float:
    """Mean nDCG@10."""
    return float(per_query_metrics(dataset, ranking)["nDCG@10"].mean())


def ablation(args: Arguments, benches: list[Bench], write: Callable[[dict[str, Any]], None]) -> None:
    """Every lever on dev, one seed, at both operating points; written after each, so that none is lost."""
    rows: list[dict[str, Any]] = []
    dense: dict[str, float] = {}
    for bench in benches:
        dataset, queries = bench.split("dev"), bench.queries("dev")
        adapter: Any = bench.rival("adapter", args.seeds[0])
        adapted = [adapted_by(adapter, side) for side in (queries, bench.documents)]
        plain = (queries.embeddings, bench.documents.embeddings)
        for system, sides in (("dense", plain), ("dense; adapter with labels", adapted)):
            ranking = bench.ranking(system, *sides)
            row = {
                "system": system,
                "dataset": dataset.name,
                "split": "dev",
                "metric": "nDCG@10",
                "group": "references",
            }
            rows.append(row | {"value": ndcg(dataset, ranking), "queries": len(queries)} | ranking.costs)
            dense.setdefault(bench.source, rows[-1]["value"])  # the first is the dense model
    for group, variants in tqdm(ABLATIONS.items(), desc="ablation"):
        for variant, flags in variants.items():
            for bench in benches:
                dataset, queries = bench.split("dev"), bench.queries("dev")
                folder = bench.dense2sparse(flags, args.seeds[0])
                head = AutoModel.from_pretrained(folder / "head")
                special = head.config.special_token_ids
                whole = with_head(head, queries, "query"), with_head(head, bench.documents, "document")
                for point, (query_words, document_words) in OPERATING_POINTS.items():
                    q, d = pruned(whole[0], query_words), pruned(whole[1], document_words)
                    ranking = bench.ranking(point, q, d, **readability(bench.documents, d, special))
                    row = {
                        "system": f"{variant}, {point}",
                        "dataset": dataset.name,
                        "split": "dev",
                        "metric": "nDCG@10",
                        "value": ndcg(dataset, ranking),
                        "group": group,
                        "variant": variant,
                        "point": point,
                        "queries": len(queries),
                        "fit_seconds": read_json(folder / "training.json")["seconds"],
                    }
                    row["ratio"] = row["value"] / dense[bench.source]
                    rows.append(row | ranking.costs)
            latest = [r for r in rows if r.get("variant") == variant]
            for point in dict.fromkeys(r["point"] for r in latest):
                mine = [r for r in latest if r["point"] == point]
                values = " ".join(f"{r['value']:.4f}@{r['flops']:.2f}" for r in mine)
                print(
                    f"{variant:<32} {point:<10} ratio {np.mean([r['ratio'] for r in mine]):.4f}  {values}", flush=True
                )
            write({"rows": rows, "settings_tried": SETTINGS_TRIED, "axis": "flops"})


@dataclass
class Measured:
    """The table's rankings of one data set, and what the claims need of them."""

    dataset: RetrievalDataset
    rankings: list[Ranking]
    fit_seconds: list[float]

    def per_query(self, system: str) -> np.ndarray:
        """nDCG@10 of each query, averaged over seeds: ``(queries,)``."""
        values = [per_query_metrics(self.dataset, r)["nDCG@10"] for r in self.rankings if r.system == system]
        return np.mean(values, axis=0)

    def cost(self, system: str, name: str) -> float:
        """A cost of a system, averaged over seeds."""
        return float(np.mean([r.costs[name] for r in self.rankings if r.system == system]))


def measure(
    args: Arguments, bench: Bench, split: str, weights: dict[str, float], rival: SparseEncoder | None = None
) -> Measured:
    """Every row of the table for one data set."""
    dataset, queries, documents = bench.split(split), bench.queries(split), bench.documents
    out = Measured(dataset, [], [])
    add = out.rankings.append
    bm25, lexical = rank_with_bm25(dataset), bm25_scores(dataset)
    dense = all_scores(queries.embeddings, documents.embeddings)
    add(bm25)
    add(bench.ranking("dense", queries.embeddings, documents.embeddings))
    sizes = [min(64, queries.embeddings.dim)] if args.quick else CSR_SIZES
    dense_bytes = out.cost("dense", "bytes_per_document")

    def hybrid(system: str, scores: np.ndarray, extra_bytes: float) -> None:
        weight = weights[system]
        mixed = weight * standardised(scores) + (1 - weight) * standardised(dense)
        add(ranked_scores(system, mixed, bench.ranks, {"bytes_per_document": dense_bytes + extra_bytes}))

    hybrid("dense + BM25", lexical, bm25.costs["bytes_per_document"])
    out.rankings.extend(splade_rows(args, bench, split, rival) if rival else [])
    variants = {"Dense2Sparse": []}
    if not args.quick:
        variants["Dense2Sparse controlled"] = CONTROL
        variants["Dense2Sparse with labels"] = LABELS
        variants["Dense2Sparse without expansion"] = ["--expansion", "none"]
    for seed in args.seeds:
        for variant, flags in variants.items():
            if flags and seed != args.seeds[0]:
                continue  # several seeds where claims rest on it
            folder = bench.dense2sparse(flags, seed, whole=args.quick and not flags)
            if not flags:
                out.fit_seconds.append(read_json(folder / "training.json")["seconds"])
            head = AutoModel.from_pretrained(folder / "head").eval()
            special = head.config.special_token_ids
            q, d = with_head(head, queries, "query"), with_head(head, documents, "document")

            def row(system: str, q_: Embeddings, d_: Embeddings, special: list[int] = special) -> None:
                add(bench.ranking(system, q_, d_, **readability(documents, d_, special)))

            for point, (query_words, document_words) in OPERATING_POINTS.items():
                if "--expansion" not in flags or point == WIDE:
                    row(f"{variant}, {point}", pruned(q, query_words), pruned(d, document_words))
            if flags:
                continue
            query_words, document_words = OPERATING_POINTS[WIDE]
            best = pruned(q, query_words), pruned(d, document_words)
            half = pruned(q, query_words, 0.5), pruned(d, document_words, 0.5)
            row(f"{variant}, half mass", *half)
            for words in sizes:
                row(f"{variant}, {words} words", pruned(q, words), pruned(d, words))
            hybrid("dense + Dense2Sparse", all_scores(*best), out.cost(f"{variant}, {WIDE}", "bytes_per_document"))
        for size in sizes if seed == args.seeds[0] else []:
            module = bench.rival("csr", seed, size, labels=False)
            sides = [with_csr(module, side) for side in (queries, documents)]
            add(bench.ranking(f"CSR, {size} dims", *sides, similarity="cosine"))
        if not args.quick:
            adapter: Any = bench.rival("adapter", seed)
            adapted = [adapted_by(adapter, side) for side in (queries, documents)]
            add(bench.ranking("dense, adapter with labels", *adapted))
    return out


def open_splade(name: str) -> SparseEncoder:
    """A trained sparse model, to be measured as it is.

    Raises:
        InputError: There is none of that name, or it is of another kind.
    """
    rival = load(fetch(name), dtype=fastest_dtype("auto"))
    if not isinstance(rival, SparseEncoder):
        raise InputError(
            f"--splade {name}: is a {type(rival).__name__}, whose vectors are no weights of words. Name a "
            "SparseEncoder, e.g. naver/splade-v3, or leave it out."
        )
    return rival


def splade_rows(args: Arguments, bench: Bench, split: str, rival: SparseEncoder) -> list[Ranking]:
    """A trained sparse model whole, and cut to as many words as our best row."""
    assert args.splade
    dataset, name = bench.split(split), f"SPLADE ({Path(args.splade).name})"
    texts = (("query", dataset.queries, f"{dataset.name}-{split}"), ("document", dataset.corpus, dataset.name))
    whole = [embed(rival, some, task=task, name=where, **bench.options) for task, some, where in texts]
    cut = [pruned(side, words) for side, words in zip(whole, OPERATING_POINTS[WIDE], strict=True)]
    score = str(rival.similarity_fn_name or "dot")
    return [bench.ranking(system, *s, similarity=score) for system, s in ((name, whole), (f"{name}, {WIDE}", cut))]


def adapted_by(adapter: torch.nn.Module, side: SentenceSide) -> Embeddings:
    """Dense vectors through the linear adapter, of unit length again."""
    with torch.inference_mode():
        vectors = adapter.linear(torch.from_numpy(np.asarray(side.embeddings.values, np.float32)))
    unit = torch.nn.functional.normalize(vectors, dim=1).numpy().astype(np.float16)
    return replace(side.embeddings, values=unit)


def bm25_scores(dataset: RetrievalDataset) -> np.ndarray:
    """BM25 of every pair: ``(queries, documents)``."""
    ranking = rank_with_bm25(dataset, depth=len(dataset.corpus))
    scores = np.zeros((len(dataset.queries), len(dataset.corpus)), np.float32)
    np.put_along_axis(scores, ranking.positions, ranking.scores, 1)
    return scores


def hybrid_weights(args: Arguments, benches: list[Bench]) -> dict[str, float]:
    """Share of the lexical side in each hybrid: one for all data sets, the best mean on dev."""
    totals: dict[str, np.ndarray] = {
        name: np.zeros(len(HYBRID_WEIGHTS)) for name in ("dense + BM25", "dense + Dense2Sparse")
    }
    for bench in benches:
        dataset, queries = bench.split("dev"), bench.queries("dev")
        dense = standardised(all_scores(queries.embeddings, bench.documents.embeddings))
        folder = bench.dense2sparse([], args.seeds[0], whole=args.quick)
        head = AutoModel.from_pretrained(folder / "head").eval()
        query_words, document_words = OPERATING_POINTS[WIDE]
        q = pruned(with_head(head, queries, "query"), query_words)
        d = pruned(with_head(head, bench.documents, "document"), document_words)
        for name, scores in (("dense + BM25", bm25_scores(dataset)), ("dense + Dense2Sparse", all_scores(q, d))):
            lexical = standardised(scores)
            totals[name] += [
                ndcg(dataset, ranked_scores(name, w * lexical + (1 - w) * dense, bench.ranks, {}))
                for w in HYBRID_WEIGHTS
            ]
    return {name: float(HYBRID_WEIGHTS[total.argmax()]) for name, total in totals.items()}


def claims(measured: list[Measured]) -> list[dict[str, Any]]:
    """The figures that the card promises, with intervals from resampling the queries of every data set."""
    generator = np.random.default_rng(0)
    draws = [generator.integers(len(m.dataset.queries), size=(2000, len(m.dataset.queries))) for m in measured]
    split = measured[0].dataset.split

    def macro(statistic: Callable[[Measured, np.ndarray], np.ndarray]) -> tuple[float, list[float]]:
        """Mean over data sets of a statistic of rows of query positions, and its interval."""
        everyone = [np.arange(len(m.dataset.queries))[None] for m in measured]
        value = float(np.mean([statistic(m, rows) for m, rows in zip(measured, everyone, strict=True)]))
        resampled = np.mean([statistic(m, rows) for m, rows in zip(measured, draws, strict=True)], axis=0)
        return value, [float(x) for x in np.percentile(resampled, [2.5, 97.5])]

    means: dict[tuple[int, str], np.ndarray] = {}

    def mean(m: Measured, system: str, rows: np.ndarray) -> np.ndarray:
        key = (id(m), system)
        if key not in means:
            means[key] = m.per_query(system)
        return means[key][rows].mean(1)

    def ratio(system: str, reference: str) -> tuple[float, list[float]]:
        return macro(lambda m, rows: mean(m, system, rows) / mean(m, reference, rows))

    def points(system: str, *references: str) -> tuple[float, list[float]]:
        return macro(
            lambda m, rows: 100 * (mean(m, system, rows) - np.max([mean(m, r, rows) for r in references], axis=0))
        )

    found: list[dict[str, Any]] = []

    def claim(
        name: str, outcome: tuple[float, list[float]], target: float | None, met: bool | None, **more: Any
    ) -> None:
        value, interval = outcome
        entry = {
            "claim": f"dense2sparse.{name}",
            "value": value,
            "interval": interval or None,
            "target": target,
            "met": met,
        }
        found.append(entry | {"split": split} | more)

    for point, limit, target in ((WIDE, 5.0, 1.0), (NARROW, 1.0, 0.97)):
        outcome = ratio(f"Dense2Sparse, {point}", "dense")
        highest = max(m.cost(f"Dense2Sparse, {point}", "flops") for m in measured)
        claim(
            f"text_ratio_at_flops{limit:g}", outcome, target, outcome[0] >= target and highest <= limit, flops=highest
        )
    for size in CSR_SIZES:
        outcome = points(f"Dense2Sparse, {size} words", f"CSR, {size} dims")
        claim(f"margin_over_csr_{size}", outcome, 0.0, outcome[0] >= 0)
    outcome = points("dense + Dense2Sparse", "dense", f"Dense2Sparse, {WIDE}")
    claim("hybrid_gain", outcome, 0.0, outcome[0] > 0)
    shares = [m.cost(f"Dense2Sparse, {WIDE}", "own_token_share") for m in measured]
    claim("own_token_share", (float(np.mean(shares)), []), None, None, by_dataset=shares)
    seconds = [s for m in measured for s in m.fit_seconds]
    claim("fit_seconds", (max(seconds), []), 300, max(seconds) <= 300, fits=seconds)
    outcome = points(f"Dense2Sparse, {WIDE}", "Dense2Sparse, half mass")
    claim("half_mass_loss", outcome, 1.0, outcome[0] <= 1.0)
    claim(
        "labels_ratio_to_adapter", ratio(f"Dense2Sparse with labels, {WIDE}", "dense, adapter with labels"), None, None
    )
    return found


NEXT = """
Next, with data of your own (a folder with corpus.jsonl, or any name of `polyrep data list`):
  make quickstart DATASET=my/folder                              this table for your documents and queries
  accelerate launch train.py hub_configs/dense2sparse-minilm --datasets my/folder        the same head as a recipe
  accelerate launch encode.py {model} --input my/folder --output encoded
  polyrep index encoded --uri qdrant:my/index                    then: polyrep search "..." --model ... --uri ...
Other representations, for your bytes and milliseconds: docs/choose.md"""


def show_words(bench: Bench, folder: Path) -> None:
    """Print the heaviest words of three queries and of the document that each finds first."""
    model = load(folder)
    dataset = bench.split("test")
    texts = list(dataset.queries.values())
    chosen = [texts[i] for i in np.linspace(0, len(texts) - 1, 5).astype(int)[1:4]]
    vectors = model.encode_query(chosen)
    print("\nHeaviest words of three queries; + marks a word that the query does not hold:")
    for text, words in zip(chosen, model.decode(vectors, top_k=10), strict=True):
        own = dict(model.decode(model.encode_query([text], expand=False)[0]))
        print(f"  {text}\n    " + ", ".join(f"{'' if w in own else '+'}{w} {x:.1f}" for w, x in words))


def main() -> None:
    """Fit, measure and write."""
    (args,) = HfArgumentParser([Arguments]).parse_args_into_dataclasses()
    made_by = provenance(shlex.join(["python", *sys.argv]))  # the code as it is now, not after an hour of edits
    model = load(fetch(args.backbone), dtype=fastest_dtype("auto"))
    rival = open_splade(args.splade) if args.splade else None
    if args.quick:
        args.datasets, args.seeds = args.datasets[:1], args.seeds[:1]
    benches = [Bench(args, source, model) for source in args.datasets]

    def write(outcome: dict[str, Any]) -> str:
        results = made_by | {
            "name": f"{args.name}-ablation" if args.ablation else args.name,
            "seeds": args.seeds,
            "models": {name: fingerprint(fetch(name)) for name in (args.backbone, args.splade) if name},
            "claims": [],
            "data": made_here(*args.datasets),
            **outcome,
        }
        return write_results(results, Path(args.output) if args.output else None)

    if args.ablation:
        args.seeds = args.seeds[:1]
        ablation(args, benches, write)
        return
    weights = hybrid_weights(args, benches)
    measured = [measure(args, bench, "test", weights, rival) for bench in benches]
    rows = [row for m in measured for row in table_rows(m.dataset, m.rankings, "dense")]
    outcome = {
        "rows": rows,
        "settings_tried": 1 if args.quick else SETTINGS_TRIED,
        "axis": "flops",
        "hybrid_weights": weights,
        "claims": [] if args.quick else claims(measured),
    }
    print(write(outcome))
    if args.quick:
        bench = benches[0]
        fitted = bench.dense2sparse([], args.seeds[0], whole=True)
        show_words(bench, fitted / "final")
        print(f"\nThe model: {fitted / 'final'}")
        if args.output:
            print(f"Quality against FLOPs: {Path(args.output) / args.name}.png")
        print(NEXT.format(model=fitted / "final"))


if __name__ == "__main__":
    main()
