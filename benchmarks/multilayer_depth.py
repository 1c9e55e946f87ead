"""An encoder cut at each depth: what is left of its quality, and how much faster it is.

    python benchmarks/multilayer_depth.py --output results

Three models are fine-tuned on the same pairs in the same steps: the plain dual encoder, AdaptiveLayerLoss of
sentence-transformers over the same loss, and ``MultiLayerObjective`` with ``early_weight``. Beside them stands the
untouched backbone, and on it, frozen, one linear map of all layers up to the cut. Also counts what encoding costs.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import multilayer_frozen as frozen
import numpy as np
import torch
from datasets import DatasetDict
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import AdaptiveLayerLoss, MultipleNegativesRankingLoss
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, HfArgumentParser, set_seed

from polyrep.data import load_retrieval_dataset
from polyrep.encoding import Embeddings, embed
from polyrep.evaluation.metrics import per_query_metrics
from polyrep.evaluation.systems import Ranking, costs_of
from polyrep.evaluation.table import table_rows
from polyrep.files import shipped_folder, staged_folder, write_json
from polyrep.hub import fetch, fingerprint, load
from polyrep.hub.folder import fastest_dtype
from polyrep.methods import MultiLayerModel, MultiLayerObjective
from polyrep.report import provenance, write_results
from polyrep.search import exact_search
from polyrep.search.ranking import tie_ranks

SCALE = 20.0
PLAIN, ADAPTIVE, OURS, RAW = "dual encoder", "AdaptiveLayerLoss", "early layers", "all-MiniLM-L6-v2"
LINEAR = "frozen + linear map"
TIMED = 192


@dataclass
class Arguments:
    """What to train and measure."""

    datasets: list[str] = field(default_factory=lambda: ["tldr_pages"], metadata={"help": "BEIR folders."})
    backbone: str = field(default="minilm", metadata={"help": "Folder or Hub id of a SentenceTransformer."})
    max_steps: int = field(default=60, metadata={"help": "Steps of each model."})
    batch: int = field(default=32, metadata={"help": "Pairs of a step."})
    max_length: int = field(default=128, metadata={"help": "Tokens per text in training."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Of all three models."})
    early_weight: float = field(default=1.0, metadata={"help": "Weight of our early layers."})
    seed: int = field(default=0, metadata={"help": "Of data order and dropout."})
    cache_dir: str = field(default=".cache", metadata={"help": "Embeddings, rankings and trained models."})
    output: str | None = field(default=None, metadata={"help": "Folder for the JSON, Markdown and PNG."})
    name: str = field(default="multilayer-depth", metadata={"help": "Name of the files."})


def trained(args: Arguments, variant: str, folder: Path) -> Path:
    """A fine-tuned encoder as a plain folder, kept under a hash of what it depends on."""
    settings = {k: v for k, v in vars(args).items() if k not in ("output", "name", "cache_dir")}
    depends = settings | {"variant": variant, "code": [file.read_text(encoding="utf-8") for file in frozen.CODE]}
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:12]
    kept = Path(args.cache_dir) / "depth" / f"{variant.replace(' ', '-')}-{digest}"
    if (kept / "modules.json").is_file():
        return kept
    pairs = {source: load_retrieval_dataset(source, "train").pairs() for source in args.datasets}
    set_seed(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        if variant == OURS:
            inner = MultiLayerModel.from_encoder(str(folder), layers=[-1, -2, -3, -4, -5, -6], pooling="last")
            model = one_folder(inner, folder, Path(scratch) / "start")
            inner = model[0].model
            loss: Any = MultiLayerObjective(model, lambda_=0.0, tau=1 / SCALE, early_weight=args.early_weight)
        else:
            model = SentenceTransformer(str(folder))
            loss = MultipleNegativesRankingLoss(model, scale=SCALE)
            loss = AdaptiveLayerLoss(model, loss) if variant == ADAPTIVE else loss
        model.max_seq_length = args.max_length
        SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=scratch,
                max_steps=args.max_steps,
                per_device_train_batch_size=args.batch,
                learning_rate=args.learning_rate,
                warmup_steps=0.1,
                max_grad_norm=2.0,
                bf16=True,
                use_cpu=not torch.accelerator.is_available(),
                batch_sampler="no_duplicates",
                dataloader_drop_last=True,
                save_strategy="no",
                logging_steps=10,
                report_to="none",
                seed=args.seed,
                router_mapping={"query": "query", "positive": "document"},
            ),
            train_dataset=DatasetDict(pairs),
            loss=loss,
        ).train()
        with staged_folder(kept) as staged:
            if variant == OURS:
                plain = inner.cpu().to_plain_encoder(Path(scratch) / "plain", source=folder)
                SentenceTransformer(str(plain), device="cpu").save_pretrained(str(staged))
            else:
                model.cpu().save_pretrained(str(staged))
            write_json(staged / "depth.json", settings)
    return kept


def one_folder(model: MultiLayerModel, backbone: Path, folder: Path) -> SentenceTransformer:
    """A MultiLayerModel as sentence-transformers opens it."""
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        source = shipped_folder("hub_configs") / "multilayer-minilm" / name
        folder.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(source.read_bytes())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(folder)
    opened = load(folder)
    opened.max_seq_length = load(backbone).max_seq_length
    return opened


def encode_seconds(folder: Path, depths: range, texts: list[str]) -> dict[int, float]:
    """Seconds per text of the backbone cut at each depth, the fastest of three rounds, each depth in turn."""
    with tempfile.TemporaryDirectory() as scratch:
        models = {}
        for depth in depths:
            short = MultiLayerModel.from_encoder(str(folder), layers=[depth], pooling="last")
            models[depth] = one_folder(short, folder, Path(scratch) / str(depth))
        best = dict.fromkeys(depths, np.inf)
        for _ in range(3):
            for depth, model in models.items():
                started = time.perf_counter()
                model.encode_document(texts, batch_size=32)
                best[depth] = min(best[depth], (time.perf_counter() - started) / len(texts))
    return best


def cost_claims(folder: Path, texts: list[str]) -> list[dict[str, Any]]:
    """What self-contrastive costs when encoding, beside the plain encoder: FLOPs, and whether a bit differs."""
    plain = SentenceTransformer(str(folder), device="cpu")
    with tempfile.TemporaryDirectory() as scratch:
        inner = MultiLayerModel.from_encoder(str(folder), layers=[-1, -3])
        ours = one_folder(inner, folder, Path(scratch) / "model").to("cpu")
    counts, vectors = [], []
    for model in (ours, plain):
        with FlopCounterMode(display=False) as counter:
            vectors.append(model.encode_document(texts, convert_to_tensor=True))
        counts.append(counter.get_total_flops())
    ratio, equal = counts[0] / counts[1], int(torch.equal(*vectors))
    return [
        {"claim": "multilayer.encode_flops_ratio", "value": ratio, "target": 1.0, "met": abs(ratio - 1) < 0.005},
        {"claim": "multilayer.bit_equal", "value": equal, "target": 1, "met": equal == 1},
    ]


def at_layer(embeddings: Embeddings, layer: int) -> Embeddings:
    """One layer of a cache of all."""
    return replace(embeddings, kind="sentence", values=embeddings.values[:, layer])


def main() -> None:
    """Train, cut, measure and write."""
    (args,) = HfArgumentParser([Arguments]).parse_args_into_dataclasses()
    made_by = provenance(shlex.join(["python", *sys.argv]))
    folder = fetch(args.backbone)
    models = {RAW: folder, **{v: trained(args, v, folder) for v in (PLAIN, ADAPTIVE, OURS)}}
    depth = load(folder)[0].model.config.num_hidden_layers
    depths = range(1, depth + 1)
    tests = {Path(source).name: load_retrieval_dataset(source, "test") for source in args.datasets}
    sample = [text for d in tests.values() for text in list(d.corpus.values())[:: len(d.corpus) * 3 // TIMED]][:TIMED]
    seconds = encode_seconds(folder, depths, sample)

    rankings: dict[str, list[Ranking]] = {name: [] for name in tests}

    def add(dataset: str, system: str, cut: int, queries: Embeddings, documents: Embeddings) -> None:
        ranks = tie_ranks(list(tests[dataset].corpus))
        positions, scores = exact_search(queries, documents, ranks, similarity="cosine", k=frozen.DEPTH)
        costs = costs_of(queries, documents) | {"encode_ms_per_document": 1000 * seconds[cut]}
        costs |= {"encode_docs_per_s": 1 / seconds[cut]}
        rankings[dataset].append(Ranking(f"{system}, {cut}", positions, scores, costs))

    options: dict[str, Any] = {"cache_dir": f"{args.cache_dir}/embeddings", "batch_size": 32, "kind": "layers"}
    for system, place in models.items():
        model = load(place, dtype=fastest_dtype("auto"))
        model.max_seq_length = 256
        for name, dataset in tests.items():
            documents = embed(model, dataset.corpus, task="document", name=name, **options)
            queries = embed(model, dataset.queries, task="query", name=f"{name}-test", **options)
            for cut in depths:
                add(name, system, cut, at_layer(queries, cut), at_layer(documents, cut))
    bench_args = frozen.Arguments(datasets=args.datasets, backbone=args.backbone, cache_dir=args.cache_dir)
    model = load(folder, dtype=fastest_dtype("auto"))
    for source in args.datasets:
        bench = frozen.Bench(bench_args, source, model)
        for cut in depths:
            layers = " ".join(map(str, range(cut, -1, -1)))
            frozen.SETTINGS[f"{LINEAR} {cut}"] = ["--pooling", "linear", "--layers", *layers.split()]
            ranking = bench.ranked(f"{LINEAR} {cut}", "3e-4", args.seed, "test")
            costs = {k: v for k, v in ranking.costs.items() if k == "bytes_per_document"}
            costs |= {"encode_ms_per_document": 1000 * seconds[cut], "encode_docs_per_s": 1 / seconds[cut]}
            rankings[bench.name].append(replace(ranking, system=f"{LINEAR}, {cut}", costs=costs))

    rows = [
        row for name, found in rankings.items() for row in table_rows(tests[name], found, f"{ADAPTIVE}, {depth // 2}")
    ]
    per_query = {(n, r.system): per_query_metrics(tests[n], r)["nDCG@10"] for n in tests for r in rankings[n]}
    half = depth // 2
    claims = cost_claims(folder, sample[:64])
    for claim, system, beside in (
        ("half_depth_retention", OURS, PLAIN),
        ("half_depth_retention_adaptive", ADAPTIVE, PLAIN),
        ("half_depth_retention_plain", PLAIN, PLAIN),
        ("half_depth_retention_frozen_linear", LINEAR, LINEAR),
    ):
        full = {n: per_query[n, f"{beside}, {depth}"] for n in tests}
        cut = {n: per_query[n, f"{system}, {half}"] for n in tests}
        by_dataset = {n: float(cut[n].mean() / full[n].mean()) for n in tests}
        generator = np.random.default_rng(0)
        resampled = []
        for n in tests:
            drawn = generator.integers(len(full[n]), size=(10_000, len(full[n])))
            resampled.append(cut[n][drawn].mean(1) / full[n][drawn].mean(1))
        low, high = (float(x) for x in np.percentile(np.mean(resampled, axis=0), [2.5, 97.5]))
        entry = {"claim": f"multilayer.{claim}", "value": float(np.mean(list(by_dataset.values())))}
        entry |= {"interval": [low, high], "of": f"{beside}, {depth}", "split": "test", "by_dataset": by_dataset}
        claims.append(entry | {"target": None, "met": None})
    speed = {"claim": "multilayer.half_depth_speedup", "value": seconds[depth] / seconds[half]}
    claims.append(speed | {"target": None, "met": None})
    results = made_by | {
        "name": args.name,
        "seeds": [args.seed],
        "settings_tried": 1,
        "models": {name: fingerprint(place) for name, place in models.items()},
        "axis": "encode_ms_per_document",
        "training": {k: v for k, v in vars(args).items() if k not in ("output", "name", "cache_dir")},
        "rows": rows,
        "claims": claims,
    }
    print(write_results(results, Path(args.output) if args.output else None))


if __name__ == "__main__":
    main()
