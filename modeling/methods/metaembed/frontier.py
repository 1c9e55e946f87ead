"""MetaEmbed's rows in the frontier: one nested head at every number of vectors, and its own two stages of search."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
from torch import Tensor
from transformers import AutoModel

from ...encoding.embeddings import Embeddings, sum_of_tokens
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


def queries_by_head(head: MetaEmbedHead, queries: Embeddings, numbers: Iterable[int]) -> dict[int, Embeddings]:
    """Number of document vectors -> queries with the vectors that go with it, which may be those of all tokens.

    Args:
        head: Fitted.
        queries: The frozen model's, of kind ``tokens``.
        numbers: Of document vectors.
    """
    counts = {k: queries_for(groups_of(head), k) for k in numbers}
    some = sorted({count for count in counts.values() if count is not None})
    if some:
        found = pooled(queries, by_head(head, "query", some))
        return {k: found[count] for k, count in counts.items() if count is not None}

    def kept(_: np.ndarray, tokens: Tensor, mask: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        made = head(tokens, mask, "query")
        return {0: (made.token_embeddings, made.mask)}

    return dict.fromkeys(counts, pooled(queries, kept)[0])


def as_searched(queries: Embeddings, documents: Embeddings) -> tuple[Embeddings, Embeddings, str]:
    """Both sides and their similarity: documents of one vector lie in an index of such, which asks for no MaxSim.

    Args:
        queries: Of kind ``tokens``.
        documents: Of kind ``tokens``, as many vectors of each.
    """
    if len(documents.values) > len(documents):
        return queries, documents, "maxsim"
    return sum_of_tokens(queries), replace(documents, kind="sentence", offsets=None), "dot"


def rows(full: FullModel) -> Iterator[Candidate]:
    """A nested head, at several numbers of vectors; and one index of which the first vector finds, and all re-rank."""

    def make() -> tuple[dict[int, Embeddings], dict[int, Embeddings], dict[int, str], dict[str, float]]:
        folder = fit_run(full, METHOD.run, METHOD.fit_digest())
        head = AutoModel.from_pretrained(folder).eval()
        said = {k: str(queries_for(groups_of(head), k) or "all tokens") for k in LADDER}
        documents = pooled(full.documents, by_head(head, "document", list(LADDER)))
        return queries_by_head(head, full.queries, LADDER), documents, said, costs_of_fit(folder.parent)

    made = Once(make)

    def row(k: int) -> Encoded:
        queries, documents, said, costs = made()
        settings = {"vectors": f"{said[k]} of a query, {k} of a document"}
        return Encoded(*as_searched(queries[k], documents[k]), costs | {"vectors_per_document": float(k)}, settings)

    def both() -> Encoded:
        first, most = row(1), max(LADDER)
        return replace(first, then=(row(most), DEPTH), settings={"vectors": f"1 finds {DEPTH}, {most} order them"})

    for k in LADDER:
        yield Candidate(f"MetaEmbed, {k}", partial(row, k), k in STAGES)
    yield Candidate(f"MetaEmbed, 1 then {max(LADDER)}", both)


METHOD = Method(
    rows, ("tokens",), ("methods/metaembed", "evaluation/frontier/pooling.py"), "metaembed-minilm-frozen", "MetaEmbed"
)
