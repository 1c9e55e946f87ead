"""What is lost of documents longer than a model reads, and what windows win back.

    python benchmarks/bundle.py --source tldr_pages --output .cache/bundle4
    python benchmarks/windows.py --output results

Two sets of long documents: pages of tldr_pages joined four by four, and of python_docs those documents with more than
``--longer_than`` tokens. Of both those are taken that queries of dev or test ask for, so that an hour is enough. Each
model reads the beginning of a document alone, and windows of it. How the windows of a model with one vector a text are
cut is chosen on dev; test is measured once. Several vectors a text are those of all windows together, so there they
lie side by side, as long as the model reads.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from polyrep.data import RetrievalDataset, load_retrieval_dataset
from polyrep.data.named import made_here
from polyrep.encoding.windows import Windows, room_for_text
from polyrep.evaluation.bm25 import rank_with_bm25
from polyrep.evaluation.metrics import per_query_metrics
from polyrep.evaluation.systems import Ranking, rank_with_model
from polyrep.evaluation.table import display_name, table_rows
from polyrep.hub import fetch, fingerprint, load
from polyrep.hub.folder import fastest_dtype
from polyrep.report import print_and_write, provenance


@dataclass
class Arguments:
    """What to measure."""

    sources: list[str] = field(
        default_factory=lambda: [".cache/bundle4", "python_docs"], metadata={"help": "Data sets with dev and test."}
    )
    longer_than: int = field(default=1024, metadata={"help": "Tokens of the documents of python_docs that are taken."})
    dense: str = field(default="minilm", metadata={"help": "A model with one vector a text."})
    late: str | None = field(default=None, metadata={"help": "A model with several vectors a text."})
    settings: list[str] = field(
        default_factory=lambda: ["254", "128/64"], metadata={"help": "WINDOW or WINDOW/STRIDE to choose from."}
    )
    cache_dir: str = field(default=".cache/embeddings", metadata={"help": "Where embeddings are kept."})
    output: str | None = field(default=None, metadata={"help": "Folder for the JSON and Markdown."})
    name: str = field(default="windows", metadata={"help": "Name of the files."})


def asked_for(source: str, longer_than: int, model: Any) -> dict[str, RetrievalDataset]:
    """Split -> its queries, with those documents of more tokens that queries of dev or test ask for."""
    splits = {split: load_retrieval_dataset(source, split) for split in ("dev", "test")}
    wanted = {d for dataset in splits.values() for judged in dataset.qrels.values() for d in judged}
    whole = splits["dev"].corpus
    corpus = {d: t for d, t in whole.items() if d in wanted and len(model.tokenizer.tokenize(t)) > longer_than}
    found = {}
    for split, dataset in splits.items():
        qrels = {q: {d: s for d, s in judged.items() if d in corpus} for q, judged in dataset.qrels.items()}
        queries = {q: dataset.queries[q] for q, judged in qrels.items() if judged}
        name = Path(source).name + (f" over {longer_than:,} tokens" if longer_than else "")
        found[split] = RetrievalDataset(name, split, corpus, queries, {q: qrels[q] for q in queries})
    return found


def said(setting: str) -> str:
    """A setting in words."""
    window, _, stride = setting.partition("/")
    return f"windows of {window}" + (f", every {stride}" if stride else ", side by side")


def windows_of(model: Any, setting: str) -> Windows | None:
    """How a setting cuts documents."""
    window, _, stride = setting.partition("/")
    return Windows.of(model, int(window), int(stride) if stride else None, "model")


def main() -> None:
    """Choose on dev, measure on test, write."""
    (args,) = HfArgumentParser([Arguments]).parse_args_into_dataclasses()
    made_by = provenance(shlex.join(["python", *sys.argv]))
    dense = load(fetch(args.dense), dtype=fastest_dtype("auto"))
    late = load(fetch(args.late), dtype=fastest_dtype("auto")) if args.late else None
    rows, notes = [], []
    for source in args.sources:
        longer_than = args.longer_than if source == "python_docs" else 0
        splits = asked_for(source, longer_than, dense)
        options: dict[str, Any] = {"cache_dir": args.cache_dir, "batch_size": 32}

        def ranked(model: Any, split: str, system: str, setting: str | None = None) -> Ranking:
            cut = windows_of(model, setting) if setting else None
            (found,) = rank_with_model(system, model, splits[split], windows=cut, **options)  # noqa: B023
            return found

        dev = {}
        for setting in args.settings:
            found = ranked(dense, "dev", said(setting), setting)
            dev[setting] = float(per_query_metrics(splits["dev"], found)["nDCG@10"].mean())
        best = max(dev, key=dev.__getitem__)
        name, test = display_name(args.dense), splits["test"]
        first = f"{name}, first {dense.max_seq_length}"
        rankings = [rank_with_bm25(test), ranked(dense, "test", first)]
        rankings += [ranked(dense, "test", f"{name}, {said(best)}", best)]
        if late and not longer_than:
            room = str(room_for_text(late))
            name = display_name(args.late)
            rankings += [ranked(late, "test", f"{name}, first {late.max_seq_length}")]
            rankings += [ranked(late, "test", f"{name}, {said(room)}", room)]
        rankings = [replace(r, costs={n: v for n, v in r.costs.items() if n != "encode_docs_per_s"}) for r in rankings]
        rows += table_rows(test, rankings, first)
        scores = ", ".join(f"{said(setting)} {value:.3f}" for setting, value in dev.items())
        counts = [len(dense.tokenizer.tokenize(text)) for text in test.corpus.values()]
        notes.append(
            f"{test.name}: {len(test.corpus):,} documents of {sum(counts) / len(counts):,.0f} tokens on average. "
            f"nDCG@10 on dev ({len(splits['dev'].queries):,} queries): {scores}."
        )
    results = {
        "name": args.name,
        **made_by,
        "seeds": [0],
        "settings_tried": len(args.settings),
        "models": {display_name(m): fingerprint(fetch(m)) for m in (args.dense, args.late) if m},
        "rows": rows,
        "claims": [],
        "data": made_here(*args.sources),
        "notes": notes,
        "drawn": [],
    }
    print_and_write(results, Path(args.output) if args.output else None)


if __name__ == "__main__":
    main()
