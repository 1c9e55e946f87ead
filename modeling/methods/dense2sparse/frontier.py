"""Dense2Sparse's rows in the frontier: one head at its operating points."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import AutoModel

from ...encoding.embeddings import Embeddings
from ...evaluation.frontier.fit import costs_of_fit, fit_run
from ...evaluation.frontier.full_model import FullModel
from ...evaluation.frontier.rows import Candidate, Encoded, Method, Once
from ...hub.folder import fastest_dtype
from ...training.sides import SentenceSide, encode_sparse


def rows(full: FullModel) -> Iterator[Candidate]:
    """A Dense2Sparse head at its two operating points."""

    def make() -> tuple[Embeddings, Embeddings, dict[str, float]]:
        half = fastest_dtype("auto") == torch.bfloat16
        sharper = MEAN_OF_TOKENS if full.kind == "tokens" else {}
        folder = fit_run(full, METHOD.run, METHOD.fit_digest(), single=True, bf16=half, **sharper)
        head = AutoModel.from_pretrained(folder).eval()
        queries = with_head(head, full.side(full.dataset, "query"), "query")
        return queries, with_head(head, full.side(full.dataset, "document"), "document"), costs_of_fit(folder.parent)

    made = Once(make)

    def row(query_words: int, document_words: int) -> Encoded:
        queries, documents, costs = made()
        return Encoded(pruned(queries, query_words), pruned(documents, document_words), "dot", costs)

    for point, words in OPERATING_POINTS.items():
        yield Candidate(f"Dense2Sparse, {point}", partial(row, *words), True)


OPERATING_POINTS = {"48/128 words": (48, 128), "12/128 words": (12, 128)}
"""Words kept of a query and of a document: the best on dev with FLOPs of at most 5 and of at most 1 on every set."""


MEAN_OF_TOKENS = {"teacher_temperature": 0.22}
"""Of a head that reads the mean of token vectors: the sharper teacher was the better one on dev of tldr_pages, where
.22, .35 and .55 were tried; an embedding model wants the recipe's .55."""


def with_head(head: Any, side: SentenceSide, task: str, expand: bool = True) -> Embeddings:
    """Encode with a Dense2Sparse head, keeping every word that a document can hold, a third of the vocabulary.

    Args:
        head: A Dense2SparseModel, whose own pruning is switched off.
        side: Queries or documents.
        task: ``query`` or ``document``.
        expand: Whether words beyond the text's own may count.
    """
    config = head.config
    config.document_top_k = config.query_top_k = config.mass = config.min_weight = None
    ids = ("input_ids", "attention_mask")
    what: dict[str, Any] = {"modality": "text" if side.tokens is not None else "image", "compact": True}
    compact = encode_sparse(
        lambda f: head(f["sentence_embedding"], *map(f.get, ids), task, expand=expand, **what).sentence_embedding, side
    )
    assert compact.indices is not None
    terms = head.expansion_terms.numpy().astype(np.int32)
    return replace(compact, indices=terms[compact.indices], dim=config.vocab_size)


def pruned(embeddings: Embeddings, words: int | None = None, mass: float | None = None) -> Embeddings:
    """What the head's own pruning leaves (a test holds both to the same result), without encoding again.

    Args:
        embeddings: Of kind ``sparse``.
        words: Heaviest words of a text that are kept.
        mass: Share of a text's weight that the kept words reach together.
    """
    assert embeddings.offsets is not None and embeddings.indices is not None
    lengths = embeddings.lengths
    text_of = np.repeat(np.arange(len(embeddings)), lengths)
    heaviest_first = np.lexsort((-embeddings.values.astype(np.float32), text_of))
    values = embeddings.values[heaviest_first].astype(np.float64)
    place = np.arange(len(values)) - np.repeat(embeddings.offsets[:-1], lengths)
    keep = place < (words or embeddings.dim)
    if mass is not None:
        before = np.cumsum(values) - values
        before -= np.repeat(before[np.minimum(embeddings.offsets[:-1], len(values) - 1)], lengths)
        total = np.bincount(text_of, values, minlength=len(embeddings))
        keep &= before < mass * total[text_of]
    kept = heaviest_first[keep]
    counts = np.bincount(text_of[keep], minlength=len(embeddings))
    return replace(
        embeddings,
        values=embeddings.values[kept],
        indices=embeddings.indices[kept],
        offsets=np.concatenate([[0], np.cumsum(counts)]),
    )


METHOD = Method(rows, ("tokens", "sentence"), ("methods/dense2sparse",), "dense2sparse-minilm", "Dense2Sparse")
