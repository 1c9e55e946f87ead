"""Ways to make an index smaller or faster, each as rows for one table: what the frontier command compares.

A method is a function of a :class:`~polyrep.fitting.Subject` that lists its rows; a row's vectors are made when it is
ranked, so that kept rows cost nothing and rows of one fit share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from safetensors.torch import load_model
from sentence_transformers.util import quantize_embeddings
from torch import Tensor
from transformers import AutoModel, set_seed

from .encoding.embeddings import Embeddings, in_memory, mean_of_tokens, sum_of_tokens
from .files import digest, shipped_folder
from .fitting import Subject, code_digest, costs_of_fit, fit_run, fitted
from .hub.folder import fastest_dtype
from .lemur import LemurModel, LemurPooling
from .muvera import Muvera
from .pooling import LADDER, by_head, hierarchical_clusters, hierarchically, pooled
from .retrievers import bytes_per_document
from .sparsify import (
    CSR_BATCH,
    CSR_RATE,
    CSR_SIZES,
    CSR_STEPS,
    OPERATING_POINTS,
    csr,
    fit_module,
    pruned,
    with_csr,
    with_head,
)
from .training.pairs import HeadData

FULL = "full model"
LEARNED = ("ReinPool", "LEMUR", "Dense2Sparse")
"""Methods of this package that learn, by what stands before a comma in their rows."""

QUANTISED = (1, 4, 16, 32)
"""Numbers of vectors that are quantised, too."""

STAGES = (1, 8)
"""Numbers of vectors at which pooled documents are a first stage, too."""

LEMUR_DIMS = (2048, 512, 256, 128)
"""Of the features themselves, and of the directions that matter most."""

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
    """

    queries: Embeddings
    documents: Embeddings
    similarity: str
    costs: dict[str, float] = field(default_factory=dict)


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
    """

    rows: Callable[[Subject], Iterator[Candidate]]
    kinds: tuple[str, ...]
    code: tuple[str, ...] = ()
    run: str = ""

    def digest(self) -> str:
        """Hash of the code and of the recipe that its rows depend on."""
        recipe = shipped_folder("hub_configs") / self.run
        files = sorted(recipe.glob("*.*")) if self.run else []
        learned = ("fitting.py", "training.py", "data.py") if self.run else ()
        return digest([code_digest(*COMMON, *learned, *self.code), [file.read_text("utf-8") for file in files]])

    def fit_digest(self) -> str:
        """Hash of the code that what it fits depends on."""
        return code_digest("fitting.py", *self.code)


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


def mean(on: Subject) -> Iterator[Candidate]:
    """The mean of a document's vectors, against the sum of the query's."""
    yield Candidate("mean", lambda: _one_vector(on, mean_of_tokens(on.documents)), True)


def hierarchical(on: Subject) -> Iterator[Candidate]:
    """Ward clusters of a document's vectors, in half precision, one byte and one bit."""

    def make() -> dict[int, Embeddings]:
        clusters = hierarchical_clusters(on.documents, LADDER, on.kept / "clusters" / on.documents.path.name)
        return pooled(on.documents, hierarchically(on.documents, clusters, LADDER))

    made = Once(make)

    def row(k: int, precision: str | None) -> Encoded:
        return quantised(_few_vectors(on, made()[k], {}), precision)

    for k in LADDER:  # at one, the clusters are the mean, which has rows of its own
        yield Candidate(f"hierarchical, {k}", partial(row, k, None), k in STAGES[1:])
    for k, (name, precision) in product(QUANTISED[1:], PRECISIONS.items()):
        yield Candidate(f"hierarchical, {k}, {name}", partial(row, k, precision))


def reinpool(on: Subject) -> Iterator[Candidate]:
    """A ReinPool head, at several numbers of vectors, in half precision, one byte and one bit."""
    method = METHODS["reinpool"]

    def make() -> tuple[dict[int, Embeddings], dict[str, float]]:
        folder = fit_run(on, method.run, [], method.fit_digest())
        head = AutoModel.from_pretrained(folder).eval()
        return pooled(on.documents, by_head(head, LADDER)), costs_of_fit(folder.parent)

    made = Once(make)

    def row(k: int, precision: str | None) -> Encoded:
        found, costs = made()
        return quantised(_few_vectors(on, found[k], costs), precision)

    for k in LADDER:
        yield Candidate(f"ReinPool, {k}", partial(row, k, None), k in STAGES)
    for k, (name, precision) in product(QUANTISED, PRECISIONS.items()):
        yield Candidate(f"ReinPool, {k}, {name}", partial(row, k, precision), (k, name) == (1, "one-bit"))


def lemur(on: Subject) -> Iterator[Candidate]:
    """A LEMUR head: one vector whose inner product follows MaxSim, at several widths."""
    method = METHODS["lemur"]

    def make() -> tuple[LemurModel, dict[str, Tensor], dict[str, float]]:
        # MaxSim is its teacher, so that a corpus without queries of its own needs no sentences taken from it.
        flags = [] if on.lessons.has_queries else ["--queries", "texts"]
        folder = fit_run(on, method.run, flags, method.fit_digest())
        head = LemurPooling.from_pretrained(str(folder), embedding_dim=LEMUR_DIMS[0]).model.eval()
        sides = {
            "query": head.encode_query_tokens(on.queries.values, on.queries.offsets),
            "document": head.encode_document_tokens(on.documents.values, on.documents.offsets),
        }
        return head, sides, costs_of_fit(folder.parent)

    made = Once(make)

    def row(dim: int, precision: str | None) -> Encoded:
        head, sides, costs = made()
        with torch.inference_mode():
            queries, documents = (head.reduce(vectors, task, dim).cpu().numpy() for task, vectors in sides.items())
        found = Encoded(in_memory(queries), in_memory(documents.astype(np.float16)), "dot", costs)
        return quantised(found, precision)

    for dim in (dim for dim in LEMUR_DIMS if dim < len(on.documents) or dim == LEMUR_DIMS[0]):
        yield Candidate(f"LEMUR, {dim}", partial(row, dim, None), dim != 256)
        for name, precision in PRECISIONS.items():
            if precision == "int8" or dim == 512:
                yield Candidate(f"LEMUR, {dim}, {name}", partial(row, dim, precision), (dim, name) == (512, "int8"))


def muvera(on: Subject) -> Iterator[Candidate]:
    """MUVERA's fixed dimensional encodings, which need no fit."""
    for settings in ({"k_sim": 5, "repetitions": 20}, {"k_sim": 4, "repetitions": 5}):

        def make(settings: dict[str, int] = settings) -> Encoded:
            encoder = Muvera(on.documents.dim, dim_proj=16, seed=on.seed, **settings)
            queries = _as_vectors(on.queries, encoder.queries, np.float32)
            return Encoded(queries, _as_vectors(on.documents, encoder.documents), "dot")

        made, width = Once(make), settings["repetitions"] * 2 ** settings["k_sim"] * 16
        yield Candidate(f"MUVERA, {width}", made, settings["k_sim"] == 5)
        if settings["k_sim"] == 5:
            yield Candidate(f"MUVERA, {width}, one-bit", partial(_lazily_quantised, made, "binary"), True)


def dense2sparse(on: Subject) -> Iterator[Candidate]:
    """A Dense2Sparse head at its two operating points."""
    method = METHODS["dense2sparse"]

    def make() -> tuple[Embeddings, Embeddings, dict[str, float]]:
        half = ["--bf16", str(fastest_dtype("auto") == torch.bfloat16)]
        folder = fit_run(on, method.run, half, method.fit_digest(), single=True)
        head = AutoModel.from_pretrained(folder).eval()
        queries = with_head(head, on.side(on.dataset, "query"), "query")
        return queries, with_head(head, on.side(on.dataset, "document"), "document"), costs_of_fit(folder.parent)

    made = Once(make)

    def row(query_words: int, document_words: int) -> Encoded:
        queries, documents, costs = made()
        return Encoded(pruned(queries, query_words), pruned(documents, document_words), "dot", costs)

    for point, words in OPERATING_POINTS.items():
        yield Candidate(f"Dense2Sparse, {point}", partial(row, *words), True)


def csr_rows(on: Subject) -> Iterator[Candidate]:
    """The stock sparse auto-encoder at several numbers of active dimensions."""
    code = METHODS["csr"].fit_digest()
    for size in CSR_SIZES:

        def make(size: int = size) -> Encoded:
            sides = [on.side(on.dataset, "query"), on.side(on.dataset, "document")]
            dim = sides[1].embeddings.dim
            size = min(size, dim)

            def fit(steps: int, folder: Path) -> None:
                set_seed(on.seed)
                module, objective = csr(dim, size)
                data = HeadData(labels=False)
                on.side(on.lessons.dataset, "query"), on.side(on.lessons.dataset, "document")
                model = on.single[1]
                data.add(model, on.lessons.dataset, cache_dir=on.cache_dir, batch_size=on.batch_size)
                options: dict[str, Any] = {"rate": CSR_RATE, "batch": CSR_BATCH, "seed": on.seed}
                fit_module(module, objective, data, folder, steps=steps, **options)

            folder = fitted(on, f"csr-{size}", [size, code], CSR_STEPS, fit)
            module, _ = csr(dim, size)
            load_model(module, folder / "module.safetensors")
            queries, documents = (with_csr(module.eval(), side) for side in sides)
            return Encoded(queries, documents, "cosine", costs_of_fit(folder))

        yield Candidate(f"CSR, {size}", Once(make), size == CSR_SIZES[-1])


def quantization(on: Subject) -> Iterator[Candidate]:
    """One byte or one bit a dimension, of the full vectors and of their mean."""

    def whole() -> Encoded:
        return Encoded(on.queries, on.documents, on.similarity)

    if on.kind == "tokens":
        averaged = Once(lambda: _one_vector(on, mean_of_tokens(on.documents)))
        for name, precision in PRECISIONS.items():
            yield Candidate(f"mean, {name}", partial(_lazily_quantised, averaged, precision), name == "one-bit")
    for name, precision in PRECISIONS.items():
        yield Candidate(f"{FULL}, {name}", partial(_lazily_quantised, whole, precision), on.kind == "sentence")


PRECISIONS = {"int8": "int8", "one-bit": "binary"}
"""Name in tables -> name in sentence-transformers."""

COMMON = ("candidates.py", "ready.py", "retrievers.py", "scoring.py")

METHODS = {
    "mean": Method(mean, ("tokens",)),
    "hierarchical": Method(hierarchical, ("tokens",), ("pooling.py",)),
    "reinpool": Method(reinpool, ("tokens",), ("pooling.py", "heads.py", "reinpool"), "reinpool-minilm"),
    "lemur": Method(lemur, ("tokens",), ("heads.py", "lemur"), "lemur-minilm"),
    "muvera": Method(muvera, ("tokens",), ("muvera.py",)),
    "dense2sparse": Method(
        dense2sparse, ("tokens", "sentence"), ("sparsify.py", "heads.py", "dense2sparse"), "dense2sparse-minilm"
    ),
    "csr": Method(csr_rows, ("tokens", "sentence"), ("sparsify.py", "heads.py"), "csr"),
    "quantization": Method(quantization, ("tokens", "sentence")),
}
"""Name of ``--methods`` -> method."""


def quantised(row: Encoded, precision: str | None) -> Encoded:
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
    vectors = float(row.documents.lengths.mean())
    if precision == "binary":
        size = bytes_per_document("binary", dims=dim, vectors=vectors) + 8 * several  # and an offset
    else:
        size = bytes_per_document("multi" if several else "dense", "int8", dims=dim, vectors=vectors)
    return replace(row, documents=replace(row.documents, values=found), costs=row.costs | {"bytes_per_document": size})


def _lazily_quantised(make: Callable[[], Encoded], precision: str) -> Encoded:
    return quantised(make(), precision)


def _one_vector(on: Subject, documents: Embeddings, costs: dict[str, float] | None = None) -> Encoded:
    """One vector a document against the sum of the query's, which is MaxSim then."""
    return Encoded(sum_of_tokens(on.queries), documents, "dot", costs or {})


def _few_vectors(on: Subject, documents: Embeddings, costs: dict[str, float]) -> Encoded:
    """Pooled documents; if each has one vector, as one vector."""
    costs = costs | {"vectors_per_document": float(documents.lengths.mean())}
    if (documents.lengths == 1).all():
        return _one_vector(on, replace(documents, kind="sentence", offsets=None), costs)
    return Encoded(on.queries, documents, on.similarity, costs)


def _as_vectors(tokens: Embeddings, encode: Callable[..., torch.Tensor], dtype: Any = np.float16) -> Embeddings:
    """One vector a text, by a function of flat token vectors and their offsets, a few thousand texts at a time."""
    assert tokens.offsets is not None
    parts = []
    for start in range(0, len(tokens), 4096):
        bounds = tokens.offsets[start : start + 4097]
        values = tokens.values[bounds[0] : bounds[-1]]
        parts.append(encode(values, bounds - bounds[0]).cpu().numpy().astype(dtype))
    return in_memory(np.concatenate(parts))
