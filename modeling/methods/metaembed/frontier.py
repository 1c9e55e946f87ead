"""MetaEmbed's rows in the frontier: one nested head at every number of vectors, and its own two stages of search."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor
from transformers import AutoModel

from ...encoding.embeddings import Embeddings
from ...encoding.nested import groups_of, queries_for
from ...evaluation.frontier.fit import costs_of_fit, fit_run
from ...evaluation.frontier.full_model import FullModel
from ...evaluation.frontier.pooling import LADDER, Pool, pooled
from ...evaluation.frontier.rows import STAGES, Candidate, Encoded, Method, Once
from .modeling_metaembed import MetaEmbedHead

DEPTH = 200
"""Documents of a query that the first vector finds, for all vectors to put in order."""


def by_head(head: MetaEmbedHead, task: str, numbers: list[int]) -> Pool:
    """The first vectors that a fitted head gives, at several numbers."""

    def pool(_: np.ndarray, tokens: Tensor, mask: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        made = head(tokens, mask, task, max(numbers))
        return {k: (made.token_embeddings[:, :k], made.mask[:, :k]) for k in numbers}

    return pool


def rows(full: FullModel) -> Iterator[Candidate]:
    """A nested head, at several numbers of vectors; and one index of which the first vector finds, and all re-rank."""

    def make() -> tuple[dict[int, int], dict[int, Embeddings], dict[int, Embeddings], dict[str, float]]:
        folder = fit_run(full, METHOD.run, METHOD.fit_digest())
        head = AutoModel.from_pretrained(folder).eval()
        groups = groups_of(head)
        asked: dict[int, Any] = {k: queries_for(groups, k) for k in LADDER}
        queries = pooled(full.queries, by_head(head, "query", sorted(set(asked.values()))))
        documents = pooled(full.documents, by_head(head, "document", list(LADDER)))
        return asked, queries, documents, costs_of_fit(folder.parent)

    made = Once(make)

    def row(k: int) -> Encoded:
        numbers, queries, documents, costs = made()
        asked, held = queries[number := numbers[k]], documents[k]
        costs = costs | {"vectors_per_document": float(k)}
        settings = {"vectors": f"{number} of a query, {k} of a document"}
        if k == number == 1:
            asked, held = (replace(side, kind="sentence", offsets=None) for side in (asked, held))
            return Encoded(asked, held, "dot", costs, settings)
        return Encoded(asked, held, "maxsim", costs, settings)

    def both() -> Encoded:
        first, most = row(1), max(LADDER)
        return replace(first, then=(row(most), DEPTH), settings={"vectors": f"1 finds {DEPTH}, {most} order them"})

    for k in LADDER:
        yield Candidate(f"MetaEmbed, {k}", partial(row, k), k in STAGES)
    yield Candidate(f"MetaEmbed, 1 then {max(LADDER)}", both)


METHOD = Method(
    rows, ("tokens",), ("methods/metaembed", "evaluation/frontier/pooling.py"), "metaembed-minilm-frozen", "MetaEmbed"
)
