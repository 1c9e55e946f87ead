"""A corpus of token vectors pooled to fewer of them, at several numbers of vectors in one pass.

A fitted head and hierarchical clustering both go over the cached token vectors once and give every number of vectors
that is asked for, which is how a ladder of them costs little more than one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from torch import Tensor
from tqdm import tqdm

from ...encoding.embeddings import Embeddings
from ...files import staged_file
from ...training.sides import TokenSide, pad_tokens

LADDER = (1, 2, 4, 8, 16, 32)
"""Numbers of vectors at which pooled documents are compared."""

Pool = Callable[[np.ndarray, Tensor, Tensor], dict[int, tuple[Tensor, Tensor]]]
"""Number of vectors -> vectors and which of them are there, from places of documents, padded tokens and their mask."""


def token_batches(documents: Embeddings, size: int = 256) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
    """Documents of like length together: places, ``(documents, tokens, dim)`` in float32, and the mask."""
    side = TokenSide(documents)
    order = np.argsort(documents.lengths, kind="stable")
    for start in range(0, len(order), size):
        features = side.features(order[start : start + size])
        yield order[start : start + size], features["token_embeddings"], features["attention_mask"]


def pooled(documents: Embeddings, pool: Pool, *, binary: bool = False, desc: str = "pool") -> dict[int, Embeddings]:
    """Run ``pool`` over a corpus.

    Args:
        documents: Of kind ``tokens``.
        pool: See :data:`Pool`.
        binary: Keep signs alone, as vectors of unit length.
        desc: Name of the progress bar.

    Returns:
        Number of vectors -> embeddings of kind ``tokens`` in float16.
    """
    found: dict[int, list[tuple[np.ndarray, Tensor, Tensor]]] = {}
    with torch.inference_mode():
        batches = token_batches(documents)
        for rows, tokens, mask in tqdm(batches, desc=desc, leave=False, total=-(-len(documents) // 256)):
            for number, (vectors, there) in pool(rows, tokens, mask).items():
                if binary:
                    vectors = torch.where(vectors >= 0, 1.0, -1.0) * vectors.shape[-1] ** -0.5
                found.setdefault(number, []).append((rows, vectors.half(), there))
    result = {}
    for number, parts in found.items():
        rows = np.concatenate([rows for rows, _, _ in parts])
        back = torch.from_numpy(np.argsort(rows))
        # Where a text keeps its tokens, batches differ in width.
        vectors = torch.cat(pad_tokens([v for _, v, _ in parts]))[back]  # (documents, number, dim)
        there = torch.cat(pad_tokens([t for _, _, t in parts]))[back]
        offsets = np.concatenate([[0], there.sum(1).cumsum(0).numpy()])
        result[number] = replace(documents, values=vectors[there].numpy(), offsets=offsets)
    return result


def hierarchically(
    documents: Embeddings, clusters: dict[int, np.ndarray], numbers: Iterable[int], head: Any = None
) -> Pool:
    """HierarchicalTokenPooling without a protected token, and through the projection of a head where given.

    Args:
        documents: The corpus.
        clusters: Those of :func:`hierarchical_clusters`.
        numbers: Numbers of vectors.
        head: A head that pools.
    """

    def pool(rows: np.ndarray, tokens: Tensor, mask: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        result = {}
        for k in numbers:
            shares = hierarchical_shares(documents, clusters, rows, mask, k)
            vectors, there = torch.nn.functional.normalize(shares @ tokens, dim=-1), shares.any(-1)
            result[k] = (head.fold(vectors) if head else vectors, there)
        return result

    return pool


def hierarchical_clusters(documents: Embeddings, numbers: Iterable[int], folder: Path) -> dict[int, np.ndarray]:
    """Cluster of every token at every number of vectors above one, by HierarchicalTokenPooling's own linkage.

    Its ``pool_one`` makes the linkage anew for each number; one linkage cut at all of them gives the same.

    Args:
        documents: Of kind ``tokens``.
        numbers: Numbers of vectors, at most 128.
        folder: Where the clusters are kept; numbers that are not there yet join them.

    Returns:
        Number of vectors -> ``(tokens of all documents,)``.
    """
    file = folder / "clusters.safetensors"
    wanted = [k for k in numbers if k > 1]
    stored = load_file(file) if file.is_file() else {}
    if missing := [k for k in wanted if str(k) not in stored]:
        offsets = documents.offsets
        assert offsets is not None
        found = {k: np.zeros(len(documents.values), np.int8) for k in missing}
        for i in tqdm(range(len(documents)), desc="hierarchical", leave=False):
            part = slice(offsets[i], offsets[i + 1])
            vectors = torch.from_numpy(np.array(documents.values[part], np.float32))
            if len(vectors) < 2:
                continue
            distances = (1 - vectors @ vectors.T).clamp_(0, 2).numpy()
            tree = hierarchy.linkage(squareform(distances, checks=False), method="ward")
            for k in found:
                cut = hierarchy.fcluster(tree, t=k, criterion="maxclust") - 1
                found[k][part] = np.unique(cut, return_inverse=True)[1]
        stored |= {str(k): torch.from_numpy(v) for k, v in found.items()}
        with staged_file(file) as partial:
            save_file(stored, partial)
    return {k: stored[str(k)].numpy() for k in wanted}


def hierarchical_shares(
    documents: Embeddings, clusters: dict[int, np.ndarray], rows: np.ndarray, mask: Tensor, number: int
) -> Tensor:
    """1 where a token is in a cluster: ``(documents, number, tokens)``, for documents by their place."""
    member = torch.full(mask.shape, -1)
    if number == 1:
        member[mask] = 0
    else:
        offsets = documents.offsets
        assert offsets is not None
        parts = [clusters[number][offsets[i] : offsets[i + 1]] for i in rows]
        member[mask] = torch.from_numpy(np.concatenate(parts)).long()
    return (member[:, None] == torch.arange(number)[:, None]).float()
