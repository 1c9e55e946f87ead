"""Draw what a variance knows: documents of a topic and two queries as ellipses, and what abstaining gains.

    python benchmarks/gaussian_pictures.py --output results

Fits the shipped head with a variance for each dimension to tldr_pages; the curve is read from gaussian-frozen.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt

from polyrep.cli import train
from polyrep.data import load_retrieval_dataset
from polyrep.encoding import embed
from polyrep.files import staged_folder, write_json
from polyrep.hub import fetch, fingerprint, load
from polyrep.hub.folder import fastest_dtype
from polyrep.methods import GaussianHead, GaussianOutput
from polyrep.methods.gaussian.show import draw_ellipses
from polyrep.report import provenance

ROOT = Path(__file__).parent.parent
DATA = "tldr_pages"
FIT = ["gaussian-minilm-frozen", "--datasets", DATA, "--variance_groups", "0", "--head_only", "true"]
NARROW, WIDE = "List the contents of a zip archive without extracting it.", "compress"


def distributions(head: GaussianHead, vectors: np.ndarray, task: str) -> GaussianOutput:
    """Means and variances of cached vectors."""
    with torch.inference_mode():
        return head(torch.from_numpy(np.asarray(vectors, np.float32)), task=task)


def draw_topic(path: Path, documents: GaussianOutput, queries: GaussianOutput, names: list[str]) -> None:
    """The pages and both queries as ellipses."""
    figure, axis = plt.subplots(figsize=(7.5, 5), layout="constrained")
    draw_ellipses(axis, documents, queries, names, [f"narrow: {NARROW}", f"wide: {WIDE}"])
    figure.legend(loc="outside upper center", frameon=False)
    figure.savefig(path, dpi=144)
    plt.close(figure)


def draw_abstention(path: Path, curves: dict[str, Any]) -> None:
    """nDCG@10 of the queries that are still answered, a panel for each data set and a line for each predictor."""
    datasets = curves["datasets"]
    figure, axes = plt.subplots(1, len(datasets), figsize=(1 + 3.6 * len(datasets), 3.6), layout="constrained")
    shares = [100 * share for share in curves["shares"]]
    for axis, (name, lines) in zip(np.atleast_1d(axes), datasets.items(), strict=True):
        for number, (predictor, values) in enumerate(lines.items()):
            label = "certainty of the query" if predictor == "certainty" else predictor
            axis.plot(shares, values, "o-" if number == 0 else "--", color=f"C{number}", label=label, ms=4)
        axis.axhline(next(iter(lines.values()))[-1], color="0.6", lw=1, ls=":", label="all queries")
        axis.set_title(name)
        axis.grid(alpha=0.3)
    figure.supxlabel("% of the queries that are answered, the most certain first", fontsize="medium")
    figure.supylabel("nDCG@10", fontsize="medium")
    handles = np.atleast_1d(axes)[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=144)
    plt.close(figure)


def main() -> None:
    """Draw both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=12, help="pages around the wide query")
    parser.add_argument("--flags", default="", help="flags of the fit, e.g. '--max_steps 2'")
    parser.add_argument("--frozen", type=Path, default=ROOT / "results" / "gaussian-frozen.json")
    parser.add_argument("--cache_dir", default=".cache/embeddings")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder of the pictures")
    args = parser.parse_args()
    matplotlib.use("Agg")
    made_by = provenance(shlex.join(["python", *sys.argv]))
    dataset, folder = load_retrieval_dataset(DATA), fetch("minilm")
    model = load(folder, dtype=fastest_dtype("auto"))
    with tempfile.TemporaryDirectory() as scratch:
        more = ["--output_dir", scratch, "--cache_dir", args.cache_dir, "--save_strategy", "no"]
        head = GaussianHead.from_pretrained(train([*FIT, *more, *shlex.split(args.flags)], prog="train.py")).eval()
    options: dict[str, Any] = {"cache_dir": args.cache_dir, "batch_size": 32, "kind": "sentence"}
    vectors = embed(model, dataset.corpus, task="document", name="tldr_pages", **options).values
    asked = model.encode_query([NARROW, WIDE])
    queries = distributions(head, asked, "query")
    everything = distributions(head, vectors, "document")
    near = (queries.sentence_embedding[1] @ everything.sentence_embedding.T).topk(args.documents).indices
    documents = GaussianOutput(mean=everything.mean[near], variance=everything.variance[near])
    names = [list(dataset.corpus)[place] for place in near]
    curves = json.loads(args.frozen.read_text(encoding="utf-8"))["abstention"]
    base = {"system": "Gaussian", "dataset": dataset.name, "split": dataset.split}
    shown = [*zip(names, everything.uncertainty[near].tolist(), strict=True)]
    shown += zip((NARROW, WIDE), queries.uncertainty.tolist(), strict=True)
    rows = [base | {"metric": f"uncertainty in nats, {name}", "value": value} for name, value in shown]
    with staged_folder(args.output, merge=True) as staged:
        draw_topic(staged / "gaussian-ellipses.png", documents, queries, names)
        draw_abstention(staged / "gaussian-abstention.png", curves)
        results = {"name": "gaussian-ellipses", "seeds": [0], "settings_tried": 1, "rows": rows, "claims": []}
        write_json(staged / "gaussian-ellipses.json", made_by | results | {"models": {"minilm": fingerprint(folder)}})
    print(*(f"{value:9.2f}  {name}" for name, value in shown), sep="\n")


if __name__ == "__main__":
    main()
