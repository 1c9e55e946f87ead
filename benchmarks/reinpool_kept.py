"""Pictures of the tokens that a trained ReinPool filter keeps.

    python benchmarks/reinpool_kept.py --output results

The pages are polyrep's own documentation.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch

from polyrep.data import load_retrieval_dataset
from polyrep.data.named import made_here
from polyrep.files import staged_folder, write_json, write_text
from polyrep.hub import fingerprint, load
from polyrep.methods import ReinPoolPooling
from polyrep.methods.reinpool.show import kept_tokens_html, kept_tokens_png, token_pieces
from polyrep.report import provenance

DATA = "python_docs:polyrep"


def main() -> None:
    """Draw three pages that the filter was not chosen on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/late-interaction-minilm/final")
    parser.add_argument("--head", default="models/reinpool-minilm/head")
    parser.add_argument("--documents", nargs="*", help="ids of documents; default: three test pages over the corpus")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder for reinpool-kept.png, .html, .json")
    args = parser.parse_args()
    dataset = load_retrieval_dataset(DATA)
    judged = [next(iter(documents)) for documents in dataset.qrels.values()]
    chosen = args.documents or judged[:: max(1, len(judged) // 3)][:3]
    retriever = load(args.model)
    pooling = ReinPoolPooling.from_pretrained(args.head)
    shown = []
    for identifier in chosen:
        tokens, vectors = token_pieces(retriever, dataset.corpus[identifier])
        with torch.inference_mode():
            output = pooling.model.to(vectors.device)(vectors[None])
            shown.append((tokens, output.keep_probability[0].cpu().numpy()))
    pages = [kept_tokens_html(*one, title=name) for one, name in zip(shown, chosen, strict=True)]
    with staged_folder(args.output, merge=True) as staged:
        kept_tokens_png(shown, staged / "reinpool-kept.png", titles=chosen)
        write_text(staged / "reinpool-kept.html", pages[0])
        figures = {
            name: [[t, round(float(p), 3)] for t, p in zip(*one, strict=True)]
            for one, name in zip(shown, chosen, strict=True)
        }
        models = {args.model: fingerprint(Path(args.model)), args.head: fingerprint(Path(args.head))}
        made_by = provenance(shlex.join(["python", *sys.argv]))
        row = {"system": "ReinPool filter", "dataset": dataset.name, "split": dataset.split}
        rows = [
            row | {"metric": f"mean keep probability, {name}", "value": float(one[1].mean())}
            for one, name in zip(shown, chosen, strict=True)
        ]
        results = {"name": "reinpool-kept", "seeds": [0], "settings_tried": 1, "models": models, "rows": rows}
        results["data"] = made_here(DATA)
        write_json(staged / "reinpool-kept.json", made_by | results | {"claims": [], "keep_probability": figures})


if __name__ == "__main__":
    main()
