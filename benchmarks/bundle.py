"""Join the documents of a data set to long ones of several topics, the case that pooling finds hardest.

    python benchmarks/bundle.py --source tldr_pages --output .cache/bundle4    # 1,590 bundles of four pages

The documents of each split are shuffled and joined four by four, so that no bundle mixes splits and each document is
in one bundle; documents that no query asks for go with train. A bundle is relevant if it holds a relevant document.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from polyrep.data import load_retrieval_dataset
from polyrep.files import staged_folder

SPLITS = ("train", "dev", "test")


@dataclass
class Arguments:
    """What to join."""

    source: str = field(metadata={"help": "BEIR folder or Hub id with the splits train, dev and test."})
    output: str = field(metadata={"help": "Folder to write the new data set to."})
    size: int = field(default=4, metadata={"help": "Documents of a bundle."})
    seed: int = field(default=0, metadata={"help": "Of the shuffling."})


def bundle(source: str, output: str | Path, size: int = 4, seed: int = 0) -> Path:
    """Write the bundled data set in BEIR layout and return its folder."""
    datasets = {split: load_retrieval_dataset(source, split) for split in SPLITS}
    split_of = dict.fromkeys(datasets["train"].corpus, "train")
    for split in SPLITS[1:]:  # a document that two splits judge goes with the one that measures
        split_of |= {d: split for judged in datasets[split].qrels.values() for d in judged}
    corpus, bundle_of = {}, {}
    for split in SPLITS:
        members = [d for d in datasets[split].corpus if split_of[d] == split]
        random.Random(f"{seed} {split}").shuffle(members)
        for number, start in enumerate(range(0, len(members), size)):
            identifier = f"{split}-{number:04d}"
            corpus[identifier] = "\n".join(datasets[split].corpus[d] for d in members[start : start + size])
            bundle_of |= dict.fromkeys(members[start : start + size], identifier)
    with staged_folder(Path(output)) as staged:
        _write_jsonl(staged / "corpus.jsonl", corpus)
        _write_jsonl(staged / "queries.jsonl", {q: t for split in SPLITS for q, t in datasets[split].queries.items()})
        (staged / "qrels").mkdir()
        for split, dataset in datasets.items():
            lines = ["query-id\tcorpus-id\tscore"]
            for query, judged in dataset.qrels.items():
                best: dict[str, int] = {}
                for document, relevance in judged.items():
                    best[bundle_of[document]] = max(relevance, best.get(bundle_of[document], 0))
                lines += [f"{query}\t{identifier}\t{relevance}" for identifier, relevance in best.items()]
            (staged / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Path(output)


def _write_jsonl(path: Path, texts: dict[str, str]) -> None:
    lines = (json.dumps({"_id": identifier, "text": text}, ensure_ascii=False) for identifier, text in texts.items())
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(sys.argv[1:])
    print(bundle(arguments.source, arguments.output, arguments.size, arguments.seed))
