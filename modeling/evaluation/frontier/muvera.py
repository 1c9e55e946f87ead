"""MUVERA: sets of token vectors as one vector whose inner product follows MaxSim, without any training.

Fixed dimensional encodings (Dhulipala et al. 2024, arXiv 2405.19504). Random hyperplanes cut the space into
partitions; a query's vector in a partition is the sum of its tokens there, a document's the mean, so that tokens that
lie close meet in one partition and are multiplied there. Several independent repetitions are put side by side.

Where several tokens of a document are equally near to a partition that has none of its own, the paper takes any; here
the one deepest on the partition's side is taken, so that the order of tokens never matters. Both sides are divided by
the square root of the number of repetitions, so that the inner product is their mean and keeps the scale of MaxSim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from ...search.scoring import padded_within

BLOCK = 2**16
"""Tokens, padding included, that are encoded at a time."""


class Muvera:
    """Random partitions and projections, drawn once; the same arguments give the same encodings.

    Args:
        dim: Width of a token vector.
        k_sim: Hyperplanes of a repetition, which make ``2 ** k_sim`` partitions (section 2, SimHash).
        dim_proj: Width that the vectors of a partition are projected to, by entries of plus or minus
            ``dim_proj ** -0.5``; None keeps them as they are.
        repetitions: Independent draws, put side by side.
        final_dim: Width that the whole is hashed to by a count sketch; None for no hashing.
        seed: Of the draws.

    Attributes:
        width: Numbers of an encoding.
        hyperplanes: ``(repetitions, dim, k_sim)`` their normals.
        projections: ``(repetitions, dim, dim_proj)``; None without projection.

    Raises:
        InputError: An argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        k_sim: int = 5,
        dim_proj: int | None = 16,
        repetitions: int = 20,
        final_dim: int | None = None,
        seed: int = 0,
    ):
        if not 0 <= k_sim <= 12:
            raise InputError(f"Muvera: k_sim={k_sim}, but 2 to that power are the partitions. Use 0 to 12.")
        for name, value in (
            ("dim", dim),
            ("dim_proj", dim_proj),
            ("repetitions", repetitions),
            ("final_dim", final_dim),
        ):
            if value is not None and value < 1:
                raise InputError(f"Muvera: {name}={value}, so an encoding would hold no number. Use 1 or more.")
        generator = torch.Generator().manual_seed(seed)
        self.dim, self.k_sim, self.repetitions = dim, k_sim, repetitions
        self.hyperplanes = torch.randn(repetitions, dim, k_sim, generator=generator)
        self.projections: Tensor | None = None
        if dim_proj is not None:
            coins = torch.randint(0, 2, (repetitions, dim, dim_proj), generator=generator)
            self.projections = (2.0 * coins - 1) * dim_proj**-0.5
        places = torch.arange(2**k_sim)[:, None] >> torch.arange(k_sim) & 1
        self.sides = 2.0 * places - 1  # (partitions, k_sim): on which side of each hyperplane a partition lies
        whole = repetitions * 2**k_sim * (dim_proj or dim)
        self.width = final_dim or whole
        self._sketch: tuple[Tensor, Tensor] | None = None  # where each number goes, and its sign
        if final_dim is not None:
            bucket = torch.randint(0, final_dim, (whole,), generator=generator)
            self._sketch = bucket, 2.0 * torch.randint(0, 2, (whole,), generator=generator) - 1

    def documents(self, values: np.ndarray | Tensor, offsets: np.ndarray) -> Tensor:
        """Encode documents: in each partition the mean of their tokens, or the token nearest to it.

        Args:
            values: ``(tokens of all documents, dim)``; a memory map is read a block at a time.
            offsets: ``(documents + 1,)`` bounds of each document's tokens.

        Returns:
            ``(documents, width)`` in float32.

        Raises:
            InputError: A document has no token, or the vectors have another width.
        """
        lengths = np.diff(offsets)
        if not lengths.all():
            raise InputError(
                f"Muvera: document {int(lengths.argmin())} has no token, so no partition has a vector. Leave it out."
            )
        return self._encoded(values, offsets, fill=True)

    def queries(self, values: np.ndarray | Tensor, offsets: np.ndarray) -> Tensor:
        """Encode queries: in each partition the sum of their tokens, zero where there is none.

        Args:
            values: ``(tokens of all queries, dim)``.
            offsets: ``(queries + 1,)`` bounds of each query's tokens.

        Returns:
            ``(queries, width)`` in float32.

        Raises:
            InputError: The vectors have another width.
        """
        return self._encoded(values, offsets, fill=False)

    def _encoded(self, values: np.ndarray | Tensor, offsets: np.ndarray, fill: bool) -> Tensor:
        if values.shape[1] != self.dim:
            raise InputError(f"Muvera: vectors of width {values.shape[1]}, but dim={self.dim}. Make one for them.")
        found = torch.zeros(len(offsets) - 1, self.width)
        for texts, tokens, mask in _blocks(values, offsets):
            parts = [self._repetition(number, tokens, mask, fill) for number in range(self.repetitions)]
            encoded = torch.cat(parts, 1) * self.repetitions**-0.5
            if self._sketch:
                bucket, sign = self._sketch
                encoded = torch.zeros(len(texts), self.width).index_add_(1, bucket, encoded * sign)
            found[texts] = encoded
        return found

    def _repetition(self, number: int, tokens: Tensor, mask: Tensor, fill: bool) -> Tensor:
        """One repetition of padded texts: ``(texts, tokens, dim)`` to ``(texts, partitions * dim_proj)``."""
        depths = tokens @ self.hyperplanes[number]  # (texts, tokens, k_sim), positive on one side
        agreement = torch.where(depths > 0, 1.0, -1.0) @ self.sides.T  # (texts, tokens, partitions): k_sim - 2 Hamming
        inside = ((agreement == self.k_sim) & mask[..., None]).float()
        projected = tokens if self.projections is None else tokens @ self.projections[number]
        sums = inside.transpose(1, 2) @ projected  # (texts, partitions, dim_proj)
        if not fill:
            return sums.flatten(1)
        counts = inside.sum(1)[..., None]  # (texts, partitions, 1)
        depth = depths @ self.sides.T
        nearness = agreement + 0.9 * depth / (1 + depth.abs())  # agreements are 2 apart, so depth only breaks ties
        nearest = nearness.masked_fill(~mask[..., None], -math.inf).argmax(1)[..., None]  # (texts, partitions, 1)
        filling = projected.gather(1, nearest.expand(-1, -1, projected.shape[-1]))
        return torch.where(counts > 0, sums / counts.clamp(min=1), filling).flatten(1)


def _blocks(values: np.ndarray | Tensor, offsets: np.ndarray) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Texts of like length padded together: their places, ``(texts, tokens, dim)`` in float32, and the mask."""
    lengths = np.diff(offsets)
    order = np.argsort(lengths, kind="stable")
    order = order[np.searchsorted(lengths[order], 1) :]  # a text without token stays zero
    for part in padded_within(lengths[order], BLOCK):
        texts = np.sort(order[part])
        columns = np.arange(lengths[texts].max())
        mask = columns < lengths[texts][:, None]  # (texts, tokens)
        places = np.where(mask, offsets[:-1][texts][:, None] + columns, offsets[:-1][texts][:, None])
        found = values[torch.from_numpy(places)] if isinstance(values, Tensor) else torch.from_numpy(values[places])
        there = torch.from_numpy(mask)
        yield torch.from_numpy(texts), found.float() * there[..., None], there
