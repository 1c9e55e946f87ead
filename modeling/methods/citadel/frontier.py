"""CITADEL's row in the frontier: the words of a router that was fitted to a late-interaction model's token vectors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModel

from ...encoding.embeddings import Embeddings, joined, rows
from ...evaluation.frontier.fit import costs_of_fit, fit_run
from ...evaluation.frontier.full_model import FullModel
from ...evaluation.frontier.pooling import token_batches
from ...evaluation.frontier.rows import Candidate, Encoded, Method
from .modeling_citadel import CitadelHead

BATCH = 256
"""Texts at a time."""


def table_rows(full: FullModel) -> Iterator[Candidate]:
    """The weights of words alone, which any sparse engine searches."""

    def words() -> Encoded:
        folder = fit_run(full, METHOD.run, METHOD.fit_digest())
        head = AutoModel.from_pretrained(folder).eval()
        queries, documents = (
            words_of_tokens(head, side, task) for side, task in ((full.queries, "query"), (full.documents, "document"))
        )
        return Encoded(queries, documents, "dot", costs_of_fit(folder.parent))

    yield Candidate("CITADEL, words", words, True)


@torch.inference_mode()
def words_of_tokens(head: CitadelHead, tokens: Embeddings, task: str) -> Embeddings:
    """What a head whose router reads token vectors gives to the words of cached texts.

    Args:
        head: Fitted to the model.
        tokens: Of kind ``tokens``.
        task: ``query`` or ``document``.

    Returns:
        Embeddings of kind ``sparse``, in float16.
    """
    parts, places = [], []
    batches = token_batches(tokens, BATCH)
    for chosen, vectors, mask in tqdm(batches, desc="CITADEL", leave=False, total=-(-len(tokens) // BATCH)):
        weights = head(vectors, mask, task).router_embedding.numpy()
        text_of, word = weights.nonzero()
        offsets = np.concatenate([[0], np.cumsum(np.bincount(text_of, minlength=len(weights)))]).astype(np.int64)
        values = weights[text_of, word].astype(np.float16)
        parts.append(Embeddings("sparse", values, offsets, word.astype(np.int32), weights.shape[1], 0.0, Path()))
        places.append(chosen)
    return replace(rows(joined(parts), np.argsort(np.concatenate(places))), windows=tokens.windows)


METHOD = Method(
    table_rows,
    ("tokens",),
    ("methods/citadel", "evaluation/frontier/pooling.py"),
    "citadel-minilm-frozen",
    "CITADEL",
)
