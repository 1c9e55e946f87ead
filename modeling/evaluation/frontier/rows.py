"""Ways to make an index smaller or faster, each as rows for one table: what the frontier command compares.

A method is a function of a :class:`~polyrep.evaluation.frontier.full_model.FullModel` that lists its rows; a row's
vectors are made when it is ranked, so that kept rows cost nothing and rows of one fit share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from sentence_transformers.util import quantize_embeddings

from ...encoding.embeddings import Embeddings, in_memory, sum_of_tokens
from ...files import digest, shipped_folder
from ..systems import bytes_per_document
from .fit import code_digest
from .full_model import FullModel

FULL = "full model"
QUANTIZED_NUMBERS = (1, 4, 16, 32)
"""Numbers of vectors that are quantised, too."""

STAGES = (1, 8)
"""Numbers of vectors at which pooled documents are a first stage, too."""

BLOCK = 2**18
"""Vectors that are quantised at a time."""

T = TypeVar("T")


@dataclass(frozen=True)
class Encoded:
    """What a row searches.

    Attributes:
        queries: Encoded queries.
        documents: Encoded documents.
        similarity: As for :func:`polyrep.search.ranking.exact_search`.
        costs: What replaces or joins the costs that follow from the arrays.
        settings: How it was set, for a line below the table.
        then: What puts the best documents in order, of the same index: its vectors hold those of this row. And how
            many documents of a query it orders.
    """

    queries: Embeddings
    documents: Embeddings
    similarity: str
    costs: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    then: tuple[Encoded, int] | None = None


@dataclass(frozen=True)
class Candidate:
    """A row to be.

    Attributes:
        system: Its name.
        make: Makes its vectors.
        first_stage: Whether it also serves as the first of two stages.
    """

    system: str
    make: Callable[[], Encoded]
    first_stage: bool = False


@dataclass(frozen=True)
class Method:
    """A way to make an index smaller.

    Attributes:
        rows: Lists its rows.
        kinds: Of the models that it applies to.
        code: Files of the package that its rows depend on.
        run: What is fitted by it: the name of a shipped run, or anything else that tells its settings.
        title: What stands before a comma in the rows of a room; empty for a rival.
        reads_dev: Whether something is chosen on :attr:`FullModel.dev`.
    """

    rows: Callable[[FullModel], Iterator[Candidate]]
    kinds: tuple[str, ...]
    code: tuple[str, ...] = ()
    run: str = ""
    title: str = ""
    reads_dev: bool = False

    def digest(self) -> str:
        """Hash of the code and of the recipe that its rows depend on."""
        recipe = shipped_folder("hub_configs") / self.run
        files = sorted(recipe.glob("*.*")) if self.run else []
        learned = (*LEARNED, "data") if self.run else ()
        return digest([code_digest(*COMMON, *learned, *self.code), [file.read_text("utf-8") for file in files]])

    def fit_digest(self) -> str:
        """Hash of the code that what it fits depends on."""
        return code_digest(*LEARNED, *self.code)


class Once(Generic[T]):
    """Something that several rows share, made when the first of them asks; what went wrong is told to each of them."""

    def __init__(self, make: Callable[[], T]):
        self.make = make
        self.made: list[T] = []
        self.error: BaseException | None = None

    def __call__(self) -> T:
        """The thing."""
        if self.error is not None:
            raise self.error
        if not self.made:
            try:
                self.made.append(self.make())
            except (Exception, SystemExit) as error:
                self.error = error
                raise
        return self.made[0]


QUANTIZATIONS = {"int8": "int8", "one-bit": "binary"}
"""Name in tables -> name in sentence-transformers."""

COMMON = (
    "evaluation/frontier/rows.py",
    "evaluation/frontier/timed.py",
    "evaluation/systems.py",
    "search/ranking.py",
    "search/scoring.py",
)
"""Code that every row depends on."""

LEARNED = (
    "evaluation/frontier/fit.py",
    "evaluation/frontier/fit_data.py",
    "evaluation/frontier/full_model.py",
    "training",
)
"""Code that whatever is fitted depends on."""


def quantized(row: Encoded, precision: str | None) -> Encoded:
    """A row with its documents quantised, as vectors again: what an index computes with, and the bytes that it stores.

    Queries stay as they are, so that scores are those of asymmetric rescoring. The ranges of int8 are those of the
    documents; a value stands for the middle of its bucket. One bit is the sign, of vectors of unit length.

    Args:
        row: Dense vectors, one or several a document.
        precision: ``int8`` or ``binary``; None for no change.
    """
    if precision is None:
        return row
    values, dim = row.documents.values, row.documents.dim
    blocks = [slice(start, start + BLOCK) for start in range(0, len(values), BLOCK)]
    low = np.min([values[block].min(0) for block in blocks], axis=0).astype(np.float32)
    high = np.max([values[block].max(0) for block in blocks], axis=0).astype(np.float32)
    steps = np.where(high > low, (high - low) / 255, 0)
    found = np.empty(values.shape, np.float16)
    for block in blocks:
        part = np.asarray(values[block], np.float32)
        if precision == "binary":
            bits = np.unpackbits(quantize_embeddings(part, "ubinary"), axis=-1, count=dim)  # type: ignore[arg-type]
            found[block] = (2.0 * bits - 1) * dim**-0.5
        else:
            codes = quantize_embeddings(part, "int8", ranges=np.stack([low, high]))
            found[block] = low + (np.asarray(codes, np.float32) + 128.5) * steps
    several = row.documents.kind == "tokens"
    vectors = float(row.documents.lengths.sum() / row.documents.documents)
    if precision == "binary":
        size = bytes_per_document("binary", dims=dim, vectors=vectors) + 8 * several  # and an offset
    else:
        size = bytes_per_document("multi", "int8", dims=dim, vectors=vectors) - 8 * (not several)
    return replace(row, documents=replace(row.documents, values=found), costs=row.costs | {"bytes_per_document": size})


def lazily_quantized(make: Callable[[], Encoded], precision: str) -> Encoded:
    """A row quantised when it is asked for."""
    return quantized(make(), precision)


def one_vector(full: FullModel, documents: Embeddings, costs: dict[str, float] | None = None) -> Encoded:
    """One vector a document against the sum of the query's, which is MaxSim then."""
    return Encoded(sum_of_tokens(full.queries), documents, "dot", costs or {})


def few_vectors(full: FullModel, documents: Embeddings, costs: dict[str, float]) -> Encoded:
    """Pooled documents; if each has one vector, as one vector."""
    costs = costs | {"vectors_per_document": float(documents.lengths.mean())}
    if (documents.lengths == 1).all():
        return one_vector(full, replace(documents, kind="sentence", offsets=None), costs)
    return Encoded(full.queries, documents, full.similarity, costs)


def as_vectors(tokens: Embeddings, encode: Callable[..., torch.Tensor], dtype: Any = np.float16) -> Embeddings:
    """One vector a text, by a function of flat token vectors and their offsets, a few thousand texts at a time."""
    assert tokens.offsets is not None
    parts = []
    for start in range(0, len(tokens), 4096):
        bounds = tokens.offsets[start : start + 4097]
        values = tokens.values[bounds[0] : bounds[-1]]
        parts.append(encode(values, bounds - bounds[0]).cpu().numpy().astype(dtype))
    return in_memory(np.concatenate(parts))
