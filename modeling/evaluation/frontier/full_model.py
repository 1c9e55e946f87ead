"""What the frontier compares on: a model, a corpus, and what heads learn from, encoded once."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from ...data.dataset import RetrievalDataset
from ...data.load import load_corpus, load_retrieval_dataset
from ...data.made_queries import inverse_cloze
from ...encoding.cache import embed, store
from ...encoding.embeddings import Embeddings, mean_of_tokens, sum_of_tokens
from ...encoding.encoders import kind_of
from ...errors import InputError
from ...files import digest, staged_folder, write_text
from ...hub.folder import Encoder, load, save
from ...registry import ROOMS
from ...search.ranking import tie_ranks
from ...training.sides import Side, encode_side


@dataclass(frozen=True)
class Lessons:
    """What heads are fitted on.

    Attributes:
        dataset: Queries, documents and judgments.
        source: What ``--datasets`` of the train command takes for them.
        flags: Further flags of it.
        note: What a reader should know of them; empty if nothing.
    """

    dataset: RetrievalDataset
    source: str
    flags: list[str] = field(default_factory=list)
    note: str = ""

    @property
    def has_queries(self) -> bool:
        """Whether the queries are there as a split of the source, not made of its documents."""
        return "inverse_cloze" not in self.flags


@dataclass
class Subject:
    """A model on the queries that are measured.

    Attributes:
        model: The full model.
        folder: Its folder.
        dataset: What is measured.
        lessons: What heads are fitted on.
        cache_dir: Of embeddings.
        kept: Folder of what is fitted and ranked.
        fit_seconds: Most seconds of a fit.
        seed: Of fits and draws.
        weights: Type of the model's weights in memory.
        batch_size: Texts per forward pass.
        trust_remote_code: Whether the model's own code may run.
    """

    model: Encoder
    folder: Path
    dataset: RetrievalDataset
    lessons: Lessons
    cache_dir: str
    kept: Path
    fit_seconds: float = 90.0
    seed: int = 0
    weights: torch.dtype = torch.float32
    batch_size: int = 32
    trust_remote_code: bool = False

    @property
    def kind(self) -> str:
        """``tokens`` or ``sentence``, see :data:`polyrep.encoding.embeddings.Kind`."""
        return kind_of(self.model)

    @property
    def similarity(self) -> str:
        """Name of the full model's own."""
        return str(self.model.similarity_fn_name)

    def encoded(self, dataset: RetrievalDataset, task: Literal["query", "document"]) -> Embeddings:
        """Queries or documents as the full model encodes them."""
        texts, name = _texts_of(dataset, task)
        options: dict[str, Any] = {"cache_dir": self.cache_dir, "batch_size": self.batch_size}
        return embed(self.model, texts, task=task, name=name, **options)

    @cached_property
    def queries(self) -> Embeddings:
        """Those that are measured."""
        return self.encoded(self.dataset, "query")

    @cached_property
    def documents(self) -> Embeddings:
        """The corpus."""
        return self.encoded(self.dataset, "document")

    @cached_property
    def ranks(self) -> np.ndarray:
        """What decides ties."""
        return tie_ranks(list(self.dataset.corpus))

    @cached_property
    def single(self) -> tuple[Path, SentenceTransformer]:
        """A model with one vector a text, and its folder: of a late-interaction model, the mean of its tokens."""
        if self.kind == "sentence":
            return self.folder, self.model  # type: ignore[return-value]
        folder = self.kept / "single" / digest([str(self.model), self.documents.path.name])
        if not folder.exists():
            pool = next(room.named(room.mean_pooled) for room in ROOMS.values() if room.mean_pooled)
            save(pool(self.model), folder)
        return folder, load(folder, trust_remote_code=True, dtype=self.weights)

    def side(self, dataset: RetrievalDataset, task: Literal["query", "document"]) -> Side:
        """Queries or documents as one vector a text; of tokens these are taken from their cache, not encoded."""
        model = self.single[1]
        texts, name = _texts_of(dataset, task)
        if self.kind == "tokens":
            tokens = self.encoded(dataset, task)
            vectors = (sum_of_tokens if task == "query" else mean_of_tokens)(tokens).values
            store(model, texts, vectors, task=task, name=name, cache_dir=self.cache_dir)
        return encode_side(model, texts, task, name, cache_dir=self.cache_dir, batch_size=self.batch_size)


def _texts_of(dataset: RetrievalDataset, task: str) -> tuple[Any, str]:
    """Texts and the name of their cache, as the train command calls it."""
    return (dataset.queries, f"{dataset.name}-{dataset.split}") if task == "query" else (dataset.corpus, dataset.name)


def judged(source: str, split: str, *, keep_empty: bool = False) -> tuple[RetrievalDataset, Lessons]:
    """The judged queries of a split, and as lessons those of train; without a train split, sentences of documents.

    Args:
        source: Folder or Hub id.
        split: What is measured.
        keep_empty: As for :func:`polyrep.data.load.load_retrieval_dataset`.

    Raises:
        InputError: The data set or the split cannot be used, or it is the one that heads learn from.
    """
    if split == "train":
        raise InputError("--split train: heads learn from it, so they would be measured on their lessons. Use test.")
    dataset = load_retrieval_dataset(source, split, keep_empty=keep_empty)
    flags = ["--keep_empty", str(keep_empty)]
    try:
        train = load_retrieval_dataset(source, "train", keep_empty=keep_empty)
    except InputError as error:
        if not re.search(r"no (judgments for )?split 'train'|split 'train' judges no query", str(error)):
            raise  # a train split that is there and damaged
        note = f"{dataset.name} has no train split, so heads learned from sentences of its documents (inverse cloze)."
        sentences = inverse_cloze(load_corpus(source, keep_empty=keep_empty))
        return dataset, Lessons(sentences, source, [*flags, "--queries", "inverse_cloze"], note)
    return dataset, Lessons(train, source, [*flags, "--split", "train"])


def cloze(source: str, folder: Path, *, keep_empty: bool = False) -> tuple[RetrievalDataset, Lessons]:
    """Sentences of documents, removed from them, as queries: a fifth is measured, the others are lessons.

    Args:
        source: Folder or Hub id of a corpus; queries are not read.
        folder: Where both are written as a data set, for the train command.
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
    lessons = load_retrieval_dataset(target, "train", keep_empty=True)
    note = f"Queries of {corpus.name} are sentences of its documents, removed from them: a fifth is measured, the "
    note += "heads learned from the others. They are easier to find than what people ask."
    return dataset, Lessons(lessons, str(target), ["--split", "train", "--keep_empty", "true"], note)


def in_measured_fifth(query: str) -> bool:
    """Whether a query is measured, by a hash of its id, so that another corpus order changes nothing."""
    return int(hashlib.sha256(query.encode()).hexdigest(), 16) % 5 == 0
