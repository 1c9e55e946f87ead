"""Peak memory of encoding 10,000 and 100,000 documents to token vectors: through the cache, and the plain way.

    python benchmarks/cache_memory.py --output results

The encoder is all-MiniLM-L6-v2 cut to one layer, since memory and not quality is measured; texts are tldr-pages,
repeated under new ids. Each figure comes from a process of its own, less what that process held before it encoded.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

from polyrep.data import load_retrieval_dataset
from polyrep.encoding import embed
from polyrep.hub.folder import packaged_minilm
from polyrep.report import provenance, write_results

DATA = "tldr_pages"


def measure(way: str, documents: int) -> float:
    """Peak resident memory that encoding adds, in MiB."""
    transformer = Transformer(str(packaged_minilm()), model_kwargs={"dtype": torch.bfloat16})
    transformer.model.encoder.layer = transformer.model.encoder.layer[:1]
    torch.manual_seed(0)
    names = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    dense = Dense(384, 128, bias=False, activation_function=torch.nn.Identity(), **names).to(torch.bfloat16)
    model = MultiVectorEncoder(modules=[transformer, dense, MultiVectorMask()])
    source = list(load_retrieval_dataset(DATA).corpus.values())
    texts = {str(number): source[number % len(source)] for number in range(documents)}
    model.encode_document(source[:64])  # what the libraries allocate once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        if way == "cache":
            kept = embed(model, texts, task="document", cache_dir=folder, show_progress=False)
        else:
            kept = model.encode_document(list(texts.values()), batch_size=16, convert_to_numpy=True)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert len(kept) == documents
    return (peak - before) / 1024


def main() -> None:
    """Run every measurement in its own process and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for cache-memory.json and .md")
    parser.add_argument("--documents", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--one", nargs=2, metavar=("WAY", "DOCUMENTS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]))))
        return
    rows = []
    for documents in args.documents:
        for way in ("cache", "in memory"):
            command = [sys.executable, __file__, "--one", way, str(documents)]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append(
                {
                    "system": way,
                    "dataset": f"{documents:,} documents",
                    "split": "all",
                    "metric": "added peak MiB",
                    "value": float(printed.splitlines()[-1]),
                }
            )
            print(rows[-1], flush=True)
    results = {
        "name": "cache-memory",
        **provenance(shlex.join(["python", *sys.argv])),
        "seeds": [0],
        "settings_tried": 1,
        "models": {},
        "rows": rows,
        "claims": [],
    }
    print(write_results(results, args.output))


if __name__ == "__main__":
    main()
