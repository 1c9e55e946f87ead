"""Scores of queries and documents, as pure functions: inner product, MaxSim, routed entries, divergence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from sentence_transformers.util import maxsim as _stock_maxsim
from torch import Tensor

from ..encoding.embeddings import Embeddings
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


ROUTED = {"routed": True, "routed_unclamped": False}
"""Similarities of routed entries, and whether a query entry counts 0 where all its products are negative."""


def clamps(similarity: str) -> bool:
    """Whether a similarity of routed entries leaves out what is negative.

    Raises:
        InputError: It is a similarity of another kind.
    """
    if similarity not in ROUTED:
        raise InputError(
            f"similarity {similarity!r} compares vectors without keys; routed entries take {' or '.join(ROUTED)}."
        )
    return ROUTED[similarity]


class Lists(NamedTuple):
    """Where the entries of documents stand once they are sorted by key, then by document.

    Attributes:
        order: ``(entries,)`` place of each in the documents' own order.
        keys: ``(entries,)`` rising.
        owner: ``(entries,)`` number of the document, rising among those of a key.
    """

    order: np.ndarray
    keys: np.ndarray
    owner: np.ndarray

    @classmethod
    def of(cls, documents: Embeddings) -> Lists:
        """The lists of routed documents."""
        assert documents.indices is not None
        order = np.argsort(documents.indices, kind="stable")
        owner = np.repeat(np.arange(len(documents)), documents.lengths)
        return cls(order, documents.indices[order], owner[order])


def _score_routed(
    queries: Embeddings, documents: Embeddings, *, clamp: bool = True, lists: Lists | None = None
) -> Tensor:
    """Late interaction among entries of the same key: the oracle of the kind ``routed`` (CITADEL, eq. 5).

    Each query entry takes its best product with the document's entries of its key, 0 where there is none, and these
    are summed; the product of the vectors of whole texts is added where there are any. The weights of eq. 5 are folded
    into the entries. Eq. 5 is undefined without a shared key; the paper's code takes 0, and clamps each part at 0.

    Args:
        queries: Routed entries in float32 or narrower; two of one text may have one key.
        documents: Likewise.
        clamp: Whether a query entry counts 0 where its best product is negative.
        lists: Of the documents, where they are known.

    Returns:
        ``(queries, documents)`` in float32, summed in float64.
    """
    assert queries.indices is not None
    count, dim = len(documents), max(1, documents.dim)
    order, keys, owner = lists or Lists.of(documents)
    first, last = (np.searchsorted(keys, queries.indices, side) for side in ("left", "right"))  # (query entries,)
    lengths, asker = last - first, np.repeat(np.arange(len(queries)), queries.lengths)
    ends = np.cumsum(lengths)
    scores, start = np.zeros(len(queries) * count), 0
    while start < len(lengths):  # query entries with as many pairs as fit into memory
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + CHUNK_ELEMENTS // (4 * dim), "right")))
        asked = np.repeat(np.arange(start, stop), lengths[start:stop])  # (pairs,) query entry
        # (pairs,) place in the lists
        there = np.repeat(last[start:stop] - ends[start:stop] + before, lengths[start:stop]) + np.arange(len(asked))
        left, right = queries.values[asked], documents.values[order[there]]
        products = np.einsum("pd,pd->p", left.astype(np.float32), right.astype(np.float32))
        pair = asked * count + owner[there]  # of a query entry and a document, rising
        begins = np.flatnonzero(np.diff(pair, prepend=-1))
        if len(begins):
            best = np.maximum.reduceat(products, begins)
            best = np.maximum(best, 0) if clamp else best
            np.add.at(scores, asker[asked[begins]] * count + owner[there[begins]], best)
        start = stop
    found = torch.from_numpy(scores.reshape(len(queries), count)).float()
    if queries.sentences is not None and documents.sentences is not None:
        sides = (np.asarray(side.sentences, np.float32) for side in (queries, documents))
        found += dot(*map(torch.from_numpy, sides))
    return found


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
