"""ReinPool's rows in the frontier: one head, several numbers of vectors and three precisions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import product

import numpy as np
from torch import Tensor
from transformers import AutoModel

from ...encoding.embeddings import Embeddings
from ...evaluation.frontier.fit import costs_of_fit, fit_run
from ...evaluation.frontier.pooling import LADDER, Pool, pooled
from ...evaluation.frontier.rivals import METHODS
from ...evaluation.frontier.rows import PRECISIONS, QUANTISED, STAGES, Candidate, Encoded, Once, few_vectors, quantised
from ...evaluation.frontier.subject import Subject
from . import ReinPoolModel


def by_head(head: ReinPoolModel, numbers: Iterable[int]) -> Pool:
    """Pooling by a fitted ReinPool head."""

    def pool(rows: np.ndarray, tokens: Tensor, mask: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        weights = head.decide(head.keep_logits(tokens, mask), mask)
        pools = {k: head.pool(tokens, weights, k) for k in numbers}
        return {k: (head.fold(vectors), there) for k, (vectors, there) in pools.items()}

    return pool


def reinpool(on: Subject) -> Iterator[Candidate]:
    """A ReinPool head, at several numbers of vectors, in half precision, one byte and one bit."""
    method = METHODS["reinpool"]

    def make() -> tuple[dict[int, Embeddings], dict[str, float]]:
        folder = fit_run(on, method.run, [], method.fit_digest())
        head = AutoModel.from_pretrained(folder).eval()
        return pooled(on.documents, by_head(head, LADDER)), costs_of_fit(folder.parent)

    made = Once(make)

    def row(k: int, precision: str | None) -> Encoded:
        found, costs = made()
        return quantised(few_vectors(on, found[k], costs), precision)

    for k in LADDER:
        yield Candidate(f"ReinPool, {k}", partial(row, k, None), k in STAGES)
    for k, (name, precision) in product(QUANTISED, PRECISIONS.items()):
        yield Candidate(f"ReinPool, {k}, {name}", partial(row, k, precision), (k, name) == (1, "one-bit"))
