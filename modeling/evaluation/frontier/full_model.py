"""The model whose index is to be made smaller, on the queries that are measured: everything encoded once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from ...data.dataset import RetrievalDataset
from ...data.load import load_retrieval_dataset
from ...encoding.cache import embed, store
from ...encoding.embeddings import Embeddings, mean_of_tokens, sum_of_tokens
from ...encoding.encoders import kind_of
from ...encoding.windows import Windows
from ...errors import InputError, NoSplit
from ...files import digest
from ...hub.folder import Encoder, load, save
from ...registry import ROOMS
from ...search.ranking import tie_ranks
from ...training.sides import SentenceSide, StatesSide
from .fit_data import FitData


@dataclass
class FullModel:
    """The full model on a data set, beside which every smaller index is measured.

    Attributes:
        model: The full model.
        folder: Its folder.
        dataset: What is measured.
        fit_data: What heads are fitted on.
        cache_dir: Of embeddings.
        kept: Folder of what is fitted and ranked.
        fit_seconds: Most seconds of a fit.
        seed: Of fits and draws.
        weights: Type of the model's weights in memory.
        batch_size: Texts per forward pass.
        trust_remote_code: Whether the model's own code may run.
        language: Of BM25's stems and stop words.
        windows: How documents that are measured are cut; heads are fitted on what the model reads of a whole one.
    """

    model: Encoder
    folder: Path
    dataset: RetrievalDataset
    fit_data: FitData
    cache_dir: str
    kept: Path
    fit_seconds: float = 90.0
    seed: int = 0
    weights: torch.dtype = torch.float32
    batch_size: int = 32
    trust_remote_code: bool = False
    language: str = "en"
    windows: Windows | None = None

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
        return embed(self.model, texts, task=task, name=name, batch_size=self.batch_size, **self._kept(dataset, task))

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
    def dev(self) -> RetrievalDataset | None:
        """Judged queries of the split dev that are not measured, to choose settings on; None without any.

        Raises:
            InputError: There are some, and they cannot be used.
        """
        if not isinstance(self.dataset.corpus, dict):  # of images, each split has its own
            return None
        try:
            keep_empty = self.fit_data.settings.get("keep_empty", False)
            found = load_retrieval_dataset(self.fit_data.source, "dev", keep_empty=keep_empty)
        except NoSplit:
            return None
        queries = {query: text for query, text in found.queries.items() if query not in self.dataset.queries}
        if not queries:
            return None
        qrels = {query: found.qrels[query] for query in queries}
        return replace(found, corpus=self.dataset.corpus, queries=queries, qrels=qrels)

    @cached_property
    def single(self) -> tuple[Path, SentenceTransformer]:
        """A model with one vector a text, and its folder: of a late-interaction model, the mean of its tokens."""
        if self.kind == "sentence":
            return self.folder, self.model  # type: ignore[return-value]
        folder = self.kept / "single" / digest([str(self.model), self.documents.path.name])
        if not folder.exists():
            pools = [room.named(room.mean_pooled) for room in ROOMS.values() if room.mean_pooled]
            if len(pools) != 1:
                raise InputError(f"{len(pools)} rooms pool tokens to their mean, and one must: see Room.mean_pooled.")
            pool = pools[0]
            save(pool(self.model), folder)
        return folder, load(folder, trust_remote_code=self.trust_remote_code, dtype=self.weights)

    def side(self, dataset: RetrievalDataset, task: Literal["query", "document"]) -> SentenceSide:
        """Queries or documents as one vector a text; of tokens these are taken from their cache, not encoded."""
        model = self.single[1]
        texts, name = _texts_of(dataset, task)
        kept = self._kept(dataset, task)
        if self.kind == "tokens":
            tokens = self.encoded(dataset, task)
            vectors = (sum_of_tokens if task == "query" else mean_of_tokens)(tokens).values
            store(model, texts, vectors, task=task, name=name, **kept)
        return SentenceSide.encode(model, texts, task, name, batch_size=self.batch_size, **kept)

    def states(self, dataset: RetrievalDataset, task: Literal["query", "document"], **options: Any) -> StatesSide:
        """Queries or documents as token states; ``options`` are ``layers`` and ``token`` of ``StatesSide.encode``."""
        texts, name = _texts_of(dataset, task)
        options |= self._kept(dataset, task)
        return StatesSide.encode(self.model, texts, task, name, batch_size=self.batch_size, **options)

    def _kept(self, dataset: RetrievalDataset, task: str) -> dict[str, Any]:
        """Where embeddings are kept, and how their texts are cut."""
        cut = task == "document" and dataset is self.dataset
        return {"cache_dir": self.cache_dir, "windows": self.windows if cut else None}


def _texts_of(dataset: RetrievalDataset, task: str) -> tuple[Any, str]:
    """Texts and the name of their cache, as training calls it."""
    return (dataset.queries, f"{dataset.name}-{dataset.split}") if task == "query" else (dataset.corpus, dataset.name)
