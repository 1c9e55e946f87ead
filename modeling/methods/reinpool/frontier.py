"""ReinPool's rows in the frontier: one head, several numbers of vectors and three precisions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from torch import Tensor
from transformers import AutoModel

from ...encoding.embeddings import Embeddings
from ...evaluation.frontier.fit import costs_of_fit, fit_run
from ...evaluation.frontier.full_model import FullModel
from ...evaluation.frontier.pooling import LADDER, Pool, pooled
from ...evaluation.frontier.rows import (
    QUANTIZATIONS,
    QUANTIZED_NUMBERS,
    STAGES,
    Candidate,
    Encoded,
    Method,
    Once,
    few_vectors,
    quantized,
)
from .modeling_reinpool import ReinPoolModel, ReinPoolPooling


def by_head(head: ReinPoolModel, numbers: Iterable[int]) -> Pool:
    """Pooling by a fitted ReinPool head."""

    def pool(_: np.ndarray, tokens: Tensor, mask: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        weights = head.decide(head.keep_logits(tokens, mask), mask)
        pools = {k: head.pool(tokens, weights, k) for k in numbers}
        return {k: (head.fold(vectors), there) for k, (vectors, there) in pools.items()}

    return pool


def mean_pooled(model: MultiVectorEncoder) -> SentenceTransformer:
    """A late-interaction model whose one vector a text is the mean of its tokens, of a query their sum."""
    head = ReinPoolModel.from_backbone(model, num_layers=0, output="sentence_embedding")
    modules: list[Any] = [*model.children(), ReinPoolPooling(head)]
    return SentenceTransformer(modules=modules, prompts=model.prompts, similarity_fn_name="dot")  # type: ignore[arg-type]


def rows(full: FullModel) -> Iterator[Candidate]:
    """A ReinPool head, at several numbers of vectors, in half precision, one byte and one bit."""

    def make() -> tuple[dict[int, Embeddings], dict[str, float]]:
        folder = fit_run(full, METHOD.run, METHOD.fit_digest())
        head = AutoModel.from_pretrained(folder).eval()
        return pooled(full.documents, by_head(head, LADDER)), costs_of_fit(folder.parent)

    made = Once(make)

    def row(k: int, precision: str | None) -> Encoded:
        found, costs = made()
        return quantized(few_vectors(full, found[k], costs), precision)

    for k in LADDER:
        yield Candidate(f"ReinPool, {k}", partial(row, k, None), k in STAGES)
    for k, (name, precision) in product(QUANTIZED_NUMBERS, QUANTIZATIONS.items()):
        yield Candidate(f"ReinPool, {k}, {name}", partial(row, k, precision), (k, name) == (1, "one-bit"))


METHOD = Method(
    rows, ("tokens",), ("methods/reinpool", "evaluation/frontier/pooling.py"), "reinpool-minilm", "ReinPool"
)
