"""Nested vectors: the first of a text are an embedding of their own, so a search may use as many as it wants.

A model is trained to this (Matryoshka Multi-Vector Retrieval: Xiao et al., "MetaEmbed", ICLR 2026), and it or any
module of it says so by an attribute or a property ``nested_groups``: pairs of query vectors and document vectors that
go together, ascending, the last pair all that the model gives::

    nested_groups = [[1, 1], [2, 4], [4, 8], [8, 32]]
    nested_groups = [[None, 1], [None, 8], [None, 32]]  # queries keep the vectors of all their tokens

A corpus says these groups of its vectors, and so does an index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from torch import nn

from ..errors import InputError
from .embeddings import Embeddings

Groups = tuple[tuple[int | None, int], ...]
"""Query vectors (None: all) and document vectors that go together, ascending; empty where vectors are not nested."""


def groups_of(model: Any) -> Groups:
    """Groups that a model says its vectors have; none for most models.

    Args:
        model: Any model; it and its modules are looked at, the outermost first.

    Raises:
        InputError: What it says are no nested groups.
    """
    parts = [model, *(model.modules() if isinstance(model, nn.Module) else ())]
    for part in parts:
        if (said := getattr(part, "nested_groups", None)) is not None:
            return checked_groups(said, f"{type(part).__name__}.nested_groups")
    return ()


def checked_groups(said: Any, where: str) -> Groups:
    """Groups in any form of pairs as tuples.

    Args:
        said: What a model or a file says.
        where: What it is, for the message.

    Raises:
        InputError: There is no pair; a number is no whole one from 1 on; a query number is None beside others that are
            not; or a pair is not larger than the one before it.
    """
    try:
        pairs = tuple((queries, documents) for queries, documents in said)
    except (TypeError, ValueError):
        pairs = ()
    numbers = [number for pair in pairs for number in pair]
    whole = all(type(number) is int and number >= 1 for number in numbers if number is not None)
    all_or_none = len({queries is None for queries, _ in pairs}) == 1
    if not (pairs and whole and all_or_none and all(documents is not None for _, documents in pairs)):
        raise InputError(
            f"{where}: {said!r:.200}: expected pairs of query vectors and document vectors, whole numbers from 1 on, "
            "so it is not known what a prefix is. Write e.g. [[1, 1], [4, 8], [8, 32]], or None in each pair for "
            "queries that keep all their tokens."
        )
    for pair, larger in pairwise(pairs):
        if pair == larger or any((one or 0) > (other or 0) for one, other in zip(pair, larger, strict=True)):
            raise InputError(
                f"{where}: {list(larger)} follows {list(pair)}, so the groups are not nested: each is a prefix of the "
                "next. Write them in ascending order."
            )
    return pairs


def queries_for(groups: Groups, documents: int) -> int | None:
    """Query vectors that go with so many of a document: of the smallest group that holds these; None for all.

    Args:
        groups: As :func:`groups_of` gives them.
        documents: As many as the last group has, or fewer.
    """
    least = min(held for _, held in groups if held >= documents)
    # Of groups with the same number of document vectors, the one with most query vectors.
    return [asked for asked, held in groups if held == least][-1]


def first_vectors(embeddings: Embeddings, count: int) -> Embeddings:
    """The first vectors of every text, in memory; what is behind them is not read.

    Args:
        embeddings: Several vectors a text, memory-mapped or not.
        count: How many of each.

    Raises:
        InputError: They are of another kind, or a text has fewer.
    """
    lengths = embeddings.lengths
    if embeddings.kind != "tokens" or embeddings.offsets is None:
        raise InputError(f"the first {count} vectors of each text: it has {embeddings.kind} vectors, not several.")
    if len(lengths) and lengths.min() < count:
        raise InputError(f"the first {count} vectors of each text: one has {lengths.min()}. Ask for fewer.")
    offsets = np.arange(len(lengths) + 1, dtype=np.int64) * count
    places = embeddings.offsets[:-1, None] + np.arange(count)  # (texts, count)
    return replace(embeddings, values=embeddings.values[places.ravel()], offsets=offsets)


def refuse_other_lengths(vectors: Embeddings, ids: Sequence[str], count: int | None) -> None:
    """Refuse texts that have not as many vectors as their groups say.

    Args:
        vectors: Of the texts.
        ids: ``(texts,)``.
        count: How many each should have; None for any number.

    Raises:
        InputError: Names the first that has not.
    """
    wrong = np.flatnonzero(vectors.lengths != (vectors.lengths if count is None else count))
    if len(wrong):
        raise InputError(
            f"{ids[wrong[0]]!r:.80}: has {vectors.lengths[wrong[0]]} vectors, and its nested groups say {count}, so a "
            "prefix would not be what the model was trained for. Mend the model's nested_groups and encode again."
        )
