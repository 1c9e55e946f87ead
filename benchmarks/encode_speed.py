"""Encoding into shards beside a bare ``model.encode`` of the same texts, and its memory as the corpus grows.

python benchmarks/encode_speed.py --output results

Throughput is measured in one process, turn about, the model being loaded: shards on disk against vectors in memory.
Memory is that of a process of its own for each size, its most at any time, with a model of word vectors (those of
all-MiniLM-L6-v2), so that the corpus and not the encoder decides; the texts are repeated under ids of their own.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from transformers import HfArgumentParser

from polyrep.data import load_corpus
from polyrep.encoding import encode as encoding
from polyrep.hub import fetch, fingerprint, load
from polyrep.hub.folder import packaged_minilm
from polyrep.report import provenance, write_results


@dataclass
class Arguments:
    """What to measure."""

    dataset: str = "tldr_pages"
    models: list[str] = field(default_factory=lambda: ["minilm", "models/four/late-interaction-minilm/final"])
    texts: int = field(default=768, metadata={"help": "For throughput, in two shards."})
    repeats: int = 3
    sizes: list[int] = field(default_factory=lambda: [10_000, 100_000])
    output: str | None = None


def written(path: Path, texts: list[str], count: int) -> Path:
    """A file of so many documents."""
    with path.open("w", encoding="utf-8") as file:
        for number, text in zip(range(count), itertools.cycle(texts), strict=False):
            file.write(json.dumps({"_id": str(number), "text": text}) + "\n")
    return path


def throughput(name: str, texts: list[str], repeats: int) -> list[dict[str, Any]]:
    """Documents per second of both ways, and their ratio."""
    model = load(name)
    rates: dict[str, list[float]] = {"model.encode": [], "polyrep encode": []}
    stock = encoding.load
    encoding.load = lambda *args, **kwargs: model  # both find the model in memory  # type: ignore[assignment]
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = written(Path(folder) / "corpus.jsonl", texts, len(texts))
            for turn in range(repeats + 1):
                started = time.perf_counter()
                model.encode_document(texts, batch_size=32, show_progress_bar=False, convert_to_numpy=True)
                bare = time.perf_counter() - started
                started = time.perf_counter()
                with contextlib.redirect_stdout(sys.stderr):
                    half = str(len(texts) // 2)
                    encoding.encode(
                        [name, "--input", str(source), "--output", f"{folder}/{turn}", "--shard_size", half]
                    )
                ours = time.perf_counter() - started
                if turn:  # the first warms up
                    rates["model.encode"].append(len(texts) / bare)
                    rates["polyrep encode"].append(len(texts) / ours)
    finally:
        encoding.load = stock
    label = "minilm" if name == "minilm" else Path(name).parent.name
    base = {"dataset": "throughput", "split": "test", "repeats": repeats}
    rows = [
        base | {"system": f"{system}, {label}", "metric": "documents per second", "value": float(np.median(found))}
        for system, found in rates.items()
    ]
    ratio = np.median(np.array(rates["polyrep encode"]) / np.array(rates["model.encode"]))
    rows.append(base | {"system": f"polyrep encode, {label}", "metric": "over model.encode", "value": float(ratio)})
    return rows


PEAK = """
import resource, sys
from polyrep.cli import main
assert main(["encode", *sys.argv[1:]]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def memory(texts: list[str], sizes: list[int]) -> list[dict[str, Any]]:
    """Most bytes that a process which encodes so many documents ever holds."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        minilm = packaged_minilm()
        words = load_file(minilm / "model.safetensors")["embeddings.word_embeddings.weight"].float().numpy()
        tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        module = StaticEmbedding(tokenizer, embedding_weights=words)
        SentenceTransformer(modules=[module]).save_pretrained(f"{folder}/model", create_model_card=False)
        for size in sizes:
            source = written(Path(folder) / f"{size}.jsonl", texts, size)
            argv = [f"{folder}/model", "--input", str(source), "--output", f"{folder}/{size}"]
            run = subprocess.run(
                [sys.executable, "-c", PEAK, *argv], capture_output=True, text=True, check=True, env=dict(os.environ)
            )
            peak = int(run.stdout.split()[-1])
            row = {"system": "polyrep encode, word vectors", "metric": f"peak MB, {size:,} documents"}
            more = {"input_mb": source.stat().st_size / 1e6, "documents": size}
            rows.append(row | more | {"dataset": "memory", "split": "test", "value": peak / 1e6})
    return rows


def main() -> None:
    """Measure, and write the results."""
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]  # type: ignore[arg-type]
    texts = list(load_corpus(args.dataset).corpus.values())
    rows = memory(texts, args.sizes)
    for name in args.models:
        rows += throughput(name, texts[: args.texts], args.repeats)
    ratios = {row["system"]: row["value"] for row in rows if row["metric"] == "over model.encode"}
    peaks = [row["value"] for row in rows if row["dataset"] == "memory"]
    growth = peaks[-1] / peaks[0]
    claims = [
        {"claim": f"encode.throughput_{system.partition(', ')[2]}", "value": v, "target": 0.95, "met": v >= 0.95}
        for system, v in ratios.items()
    ]
    claims.append({"claim": "encode.memory_growth_10x", "value": growth, "target": 1.1, "met": growth <= 1.1})
    results = provenance(shlex.join(["python", *sys.argv])) | {
        "name": "encode-speed",
        "seeds": [],
        "settings_tried": 1,
        "models": {name: fingerprint(fetch(name)) for name in args.models},
        "rows": rows,
        "claims": claims,
        "drawn": [],
    }
    print(write_results(results, Path(args.output) if args.output else None))


if __name__ == "__main__":
    main()
