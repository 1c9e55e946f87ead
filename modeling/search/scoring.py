"""Scores of queries and documents, as pure functions of tensors: inner product, MaxSim, divergence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from sentence_transformers.util import maxsim as _stock_maxsim
from torch import Tensor

from ..errors import InputError

CHUNK_ELEMENTS = 2**26
"""Numbers in the largest intermediate of a scoring step (256 MiB in float32)."""

EMPTY_DOCUMENT_SCORE = -1e9
"""MaxSim of a document without a vector, e.g. of skipped words only."""


def dot(queries: Tensor, documents: Tensor) -> Tensor:
    """Inner products: ``(queries, dim)`` and ``(documents, dim)`` give ``(queries, documents)`` in float32."""
    return queries.float() @ documents.float().T


def maxsim(queries: Tensor, documents: Tensor, query_mask: Tensor, document_mask: Tensor) -> Tensor:
    """Late interaction: each query vector takes its best document vector, and these are summed (ColBERT, eq. 3).

    Args:
        queries: ``(queries, query vectors, dim)``, padded.
        documents: ``(documents, document vectors, dim)``, padded.
        query_mask: ``(queries, query vectors)``, True where a vector counts.
        document_mask: ``(documents, document vectors)``, likewise.

    Returns:
        ``(queries, documents)`` in float32.
    """
    return _stock_maxsim(queries.float(), documents.float(), a_mask=query_mask, b_mask=document_mask)


def kl(queries: Any, documents: Any) -> Tensor:
    """KL(Q||D) of every query from every document, in nats, exactly: the oracle of the room ``gaussian``.

    It is computed in float64 through two matrix products, so memory grows with queries plus documents.

    Args:
        queries: Has ``mean (..., queries, k)`` and ``variance (..., queries, groups)`` of normal distributions with
            diagonal covariance; the dimensions of a group are side by side, and without groups each is its own.
        documents: Likewise ``(..., documents, k)``, with as many groups or not. Leading dimensions broadcast.

    Returns:
        ``(..., queries, documents)`` in the type of the means.

    Raises:
        InputError: Dimensions differ, groups do not divide them, or a variance is not positive.
    """
    sides = []
    for name, side in (("queries", queries), ("documents", documents)):
        if side.variance is None:
            raise InputError(f"kl: the {name} have no variance, as with divergence 'dot'. Use a model that has one.")
        size, groups = side.mean.shape[-1], side.variance.shape[-1]
        if size % groups or size != queries.mean.shape[-1]:
            raise InputError(
                f"kl: {name} have means of {size} dimensions and variances of {groups}, queries means of "
                f"{queries.mean.shape[-1]}. Use distributions of one model."
            )
        if not (side.variance > 0).all():
            raise InputError(
                f"kl: a variance of the {name} is {float(side.variance.min())}, so the divergence is not defined. "
                "Pass variances, not their logarithms, and more than 0."
            )
        mean, variance = (part.cpu() if part.device.type == "mps" else part for part in (side.mean, side.variance))
        sides += [mean.double(), variance.double().repeat_interleave(size // groups, -1)]
    mean, variance, other, wide = sides
    logs = wide.log().sum(-1)[..., None, :] - variance.log().sum(-1)[..., :, None]  # (..., queries, documents)
    trace = (mean.square() + variance) @ (1 / wide).mT - 2 * mean @ (other / wide).mT
    found = (logs + trace + (other.square() / wide).sum(-1)[..., None, :] - mean.shape[-1]) / 2
    return found.to(queries.mean)


def packed_maxsim(queries: Tensor, documents: Tensor, query_mask: Tensor, document_mask: Tensor) -> Tensor:
    """:func:`maxsim` for training: no work on the padding of queries, and products in the type of what is passed.

    Shapes are those of :func:`maxsim`. Half precision errs by less than 1 % of a score, sums being in float32.
    """
    vectors, owner = queries[query_mask], query_mask.nonzero()[:, 0]  # (vectors of all queries, dim), (vectors,)
    scores = []
    step = max(1, CHUNK_ELEMENTS // max(1, len(vectors) * documents.shape[1]))
    for start in range(0, len(documents), step):
        part, mask = documents[start : start + step], document_mask[start : start + step]
        similarity = (vectors @ part.flatten(0, 1).T).unflatten(1, mask.shape)  # (vectors, part, tokens)
        best = similarity.masked_fill(~mask, -torch.inf).amax(-1).float()
        scores.append(best.new_zeros(len(queries), len(part)).index_add(0, owner, best))
    return torch.cat(scores, 1)


def maxsim_of_flat(
    query: Tensor, tokens: Tensor, bounds: Tensor, similarity: str, owner: Tensor | None = None
) -> Tensor:
    """MaxSim of queries and documents whose vectors lie side by side, without padding.

    Args:
        query: ``(vectors of all queries, dim)``.
        tokens: ``(vectors of all documents, dim)``.
        bounds: ``(documents + 1,)`` where each document's vectors start and end.
        similarity: ``maxsim`` or ``meanmaxsim``.
        owner: ``(vectors of all queries,)`` number of the query that each belongs to; default: one query.

    Returns:
        ``(documents, queries)`` in float32.
    """
    refuse_not_maxsim(similarity)
    owner = torch.zeros(len(query), dtype=torch.int64) if owner is None else owner
    count = int(owner[-1]) + 1 if len(owner) else 1
    best = torch.segment_reduce(tokens @ query.T, "max", offsets=bounds.to(tokens.device), axis=0)
    owner = owner.to(tokens.device)
    scores = torch.zeros(len(best), count, device=tokens.device).index_add_(1, owner, best)  # (documents, queries)
    if similarity == "meanmaxsim":
        scores = scores / owner.bincount(minlength=count).clamp(min=1)
    empty = (bounds.diff() == 0).to(tokens.device)
    return scores.masked_fill(empty[:, None], EMPTY_DOCUMENT_SCORE)


def best_windows(scores: Tensor, bounds: np.ndarray) -> Tensor:
    """Scores of documents from those of their windows, the best of which counts.

    Args:
        scores: ``(queries, windows)``.
        bounds: ``(documents + 1,)`` where each document's windows start and end; it has one at least.

    Returns:
        ``(queries, documents)``.
    """
    offsets = torch.from_numpy(np.asarray(bounds, np.int64)).to(scores.device)
    return torch.segment_reduce(scores.T.contiguous(), "max", offsets=offsets, axis=0).T


def refuse_not_maxsim(similarity: str) -> None:
    """Raise InputError if a similarity is none that compares several vectors a text."""
    if similarity not in ("maxsim", "meanmaxsim"):
        raise InputError(
            f"similarity {similarity!r} is for one vector a text; several vectors take maxsim or meanmaxsim."
        )


def padded_within(lengths: np.ndarray, most: int) -> Iterator[slice]:
    """Batches of texts, shortest first, each as large as its padding allows.

    Args:
        lengths: ``(texts,)`` vectors of each, none of them 0, in rising order.
        most: Vectors of a batch with padding, unless one text alone has more.
    """
    first = 0
    while first < len(lengths):
        sizes = np.arange(1, len(lengths) - first + 1) * lengths[first:]  # at the width of the longest among them
        last = first + max(1, int(np.searchsorted(sizes, most, side="right")))
        yield slice(first, last)
        first = last
