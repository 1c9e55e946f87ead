"""CITADEL's rows in the frontier: the words and the entries of a router over a late-interaction model's vectors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModel

from ...encoding.embeddings import Embeddings, joined, rows
from ...evaluation.frontier.fit import costs_of_fit, fit_run
from ...evaluation.frontier.full_model import FullModel
from ...evaluation.frontier.pooling import token_batches
from ...evaluation.frontier.rows import Candidate, Encoded, Method, Once
from .modeling_citadel import CitadelHead

BATCH = 64
"""Texts at a time: of 256 tokens each, their scores of a block of words are a quarter of a gigabyte."""


class Routed(NamedTuple):
    """What a router makes of texts: weights of words, and entries under them."""

    words: Embeddings
    entries: Embeddings


def table_rows(full: FullModel) -> Iterator[Candidate]:
    """The weights of words alone, which any sparse engine searches, and the entries of which they are the lists."""

    def make() -> tuple[CitadelHead, Routed, Routed, dict[str, float]]:
        folder = fit_run(full, METHOD.run, METHOD.fit_digest())
        head = AutoModel.from_pretrained(folder).eval()
        sides = (
            routed_tokens(head, side, task) for side, task in ((full.queries, "query"), (full.documents, "document"))
        )
        return head, *sides, costs_of_fit(folder.parent)

    made = Once(make)

    def words() -> Encoded:
        _, queries, documents, costs = made()
        return Encoded(queries.words, documents.words, "dot", costs)

    def entries() -> Encoded:
        head, queries, documents, costs = made()
        return Encoded(queries.entries, documents.entries, similarity_of(head), costs)

    yield Candidate("CITADEL, words", words, True)
    yield Candidate("CITADEL", entries)


def similarity_of(head: CitadelHead) -> str:
    """Name of the score of its entries."""
    return "routed" if head.config.clamp else "routed_unclamped"


@torch.inference_mode()
def routed_tokens(head: CitadelHead, tokens: Embeddings, task: str) -> Routed:
    """What a head whose router reads token vectors makes of cached texts, in one pass.

    Args:
        head: Fitted to the model.
        tokens: Of kind ``tokens``.
        task: ``query`` or ``document``.

    Returns:
        Embeddings of kinds ``sparse`` and ``routed``, of documents in the half precision that an index stores.
    """
    dtype = np.float16 if task == "document" else np.float32
    words, entries, places = [], [], []
    batches = token_batches(tokens, BATCH)
    for chosen, vectors, mask in tqdm(batches, desc="CITADEL", leave=False, total=-(-len(tokens) // BATCH)):
        made = head(vectors, mask, task)
        text_of, word = made.router_embedding.nonzero(as_tuple=True)
        values, width = made.router_embedding[text_of, word], made.router_embedding.shape[1]
        words.append(_flat("sparse", values, text_of, word, len(chosen), width, dtype))
        text_of, token, place = made.mask.nonzero(as_tuple=True)
        values = made.weights[text_of, token, place][:, None] * made.vectors[text_of, token]
        keys = made.keys[text_of, token, place]
        entries.append(_flat("routed", values, text_of, keys, len(chosen), values.shape[1], dtype))
        places.append(chosen)
    back = np.argsort(np.concatenate(places))
    return Routed(*(replace(rows(joined(parts), back), windows=tokens.windows) for parts in (words, entries)))


def _flat(
    kind: str, values: torch.Tensor, text_of: torch.Tensor, indices: torch.Tensor, texts: int, dim: int, dtype: type
) -> Embeddings:
    """Some rows of ``texts`` texts, one text after another."""
    offsets = np.cumsum([0, *text_of.bincount(minlength=texts).tolist()], dtype=np.int64)
    named = indices.numpy().astype(np.int32)
    return Embeddings(kind, values.numpy().astype(dtype), offsets, named, dim, 0.0, Path())  # type: ignore[arg-type]


METHOD = Method(
    table_rows,
    ("tokens",),
    ("methods/citadel", "evaluation/frontier/pooling.py", "search/routed.py"),
    "citadel-minilm-frozen",
    "CITADEL",
)
