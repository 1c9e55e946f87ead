"""What heads are fitted on, and that it is nothing that is measured."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...data.dataset import RetrievalDataset
from ...data.load import load_corpus, load_retrieval_dataset
from ...data.made_queries import NoSentences, inverse_cloze, texts_as_queries
from ...errors import InputError, NoSplit
from ...files import digest, staged_folder, write_text


@dataclass(frozen=True)
class FitData:
    """What heads are fitted on.

    Attributes:
        dataset: Queries, documents and judgments.
        source: What a run takes for them as ``datasets``.
        settings: Further values of the run's, by the names of their flags.
        note: What a reader should know of them; empty if nothing.
    """

    dataset: RetrievalDataset
    source: str
    settings: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def has_queries(self) -> bool:
        """Whether the queries are there as a split of the source, not made of its documents."""
        return "queries" not in self.settings


def judged_queries(source: str, split: str, *, keep_empty: bool = False) -> tuple[RetrievalDataset, FitData]:
    """The judged queries of a split, and to fit on those of train; without a train split, sentences of documents.

    Documents too short to take a sentence from are themselves what heads learn from.

    Args:
        source: Folder or Hub id.
        split: What is measured.
        keep_empty: As for :func:`polyrep.data.load.load_retrieval_dataset`.

    Raises:
        InputError: The data set or the split cannot be used, or it is the one that heads learn from.
    """
    if split == "train":
        raise InputError("--split train: heads learn from it, so they would be measured on what they saw. Use test.")
    dataset = load_retrieval_dataset(source, split, keep_empty=keep_empty)
    try:
        train = load_retrieval_dataset(source, "train", keep_empty=keep_empty)
    except NoSplit:
        pass
    else:
        return dataset, FitData(train, source, {"keep_empty": keep_empty, "split": "train"})
    corpus = load_corpus(source, keep_empty=keep_empty)
    try:
        made, how, what = inverse_cloze(corpus), "inverse_cloze", "sentences of its documents (inverse cloze)"
    except NoSentences:
        made, how, what = (
            texts_as_queries(corpus),
            "texts",
            "its documents, which are too short to take sentences from",
        )
    note = f"{dataset.name} has no train split, so heads learned from {what}."
    return dataset, FitData(made, source, {"keep_empty": keep_empty, "queries": how}, note)


def cloze_queries(source: str, folder: Path, *, keep_empty: bool = False) -> tuple[RetrievalDataset, FitData]:
    """Sentences of documents, removed from them, as queries: a fifth is measured, heads are fitted on the others.

    Args:
        source: Folder or Hub id of a corpus; queries are not read.
        folder: Where both are written as a data set, which a run then reads.
        keep_empty: As for :func:`polyrep.data.load.load_corpus`.

    Raises:
        InputError: The corpus cannot be used, or has too few sentences for both parts.
    """
    corpus = load_corpus(source, keep_empty=keep_empty)
    whole = inverse_cloze(corpus)
    measured = {query for query in whole.queries if in_measured_fifth(query)}
    if not 0 < len(measured) < len(whole.queries):
        raise InputError(
            f"{source}: {len(whole.queries)} sentences, of which {len(measured)} would be measured and the others "
            "learned from, and neither may be none. Use a larger corpus, or judged queries."
        )
    target = folder / digest([whole.queries, whole.corpus]) / corpus.name
    if not target.exists():
        with staged_folder(target) as staged:
            for stem, texts in (("corpus", whole.corpus), ("queries", whole.queries)):
                lines = [json.dumps({"_id": key, "text": text}) for key, text in texts.items()]
                write_text(staged / f"{stem}.jsonl", "\n".join(lines) + "\n")
            for split in ("train", "dev"):  # with a split called dev, none of train is set aside for one
                wanted = [q for q in whole.queries if (q in measured) == (split == "dev")]
                lines = [f"{q}\t{document}\t1" for q in wanted for document in whole.qrels[q]]
                write_text(staged / "qrels" / f"{split}.tsv", "\n".join(["query-id\tcorpus-id\tscore", *lines, ""]))
    dev = load_retrieval_dataset(target, "dev", keep_empty=True)
    dataset = RetrievalDataset(corpus.name, "cloze", dev.corpus, dev.queries, dev.qrels)
    train = load_retrieval_dataset(target, "train", keep_empty=True)
    note = f"Queries of {corpus.name} are sentences of its documents, removed from them: a fifth is measured, the "
    note += "heads learned from the others. They are easier to find than what people ask."
    return dataset, FitData(train, str(target), {"split": "train", "keep_empty": True}, note)


def in_measured_fifth(query: str) -> bool:
    """Whether a query is measured, by a hash of its id, so that another corpus order changes nothing."""
    return int(hashlib.sha256(query.encode()).hexdigest(), 16) % 5 == 0
