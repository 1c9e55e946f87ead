"""Ways to make an index smaller that are nobody's room here: what a user would take instead."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_model
from transformers import set_seed

from ...encoding.embeddings import Embeddings, mean_of_tokens
from ...training.pairs import HeadData
from .csr import CSR_BATCH, CSR_RATE, CSR_SIZES, CSR_STEPS, csr, fit_module, with_csr
from .fit import costs_of_fit, fitted
from .muvera import Muvera
from .pooling import LADDER, hierarchical_clusters, hierarchically, pooled
from .rows import (
    FULL,
    QUANTISED,
    QUANTIZATIONS,
    STAGES,
    Candidate,
    Encoded,
    Method,
    Once,
    as_vectors,
    few_vectors,
    lazily_quantised,
    one_vector,
    quantised,
)
from .subject import Subject


def mean(on: Subject) -> Iterator[Candidate]:
    """The mean of a document's vectors, against the sum of the query's."""
    yield Candidate("mean", lambda: one_vector(on, mean_of_tokens(on.documents)), True)


def hierarchical(on: Subject) -> Iterator[Candidate]:
    """Ward clusters of a document's vectors, in half precision, one byte and one bit."""

    def make() -> dict[int, Embeddings]:
        clusters = hierarchical_clusters(on.documents, LADDER, on.kept / "clusters" / on.documents.path.name)
        return pooled(on.documents, hierarchically(on.documents, clusters, LADDER))

    made = Once(make)

    def row(k: int, precision: str | None) -> Encoded:
        return quantised(few_vectors(on, made()[k], {}), precision)

    for k in LADDER:  # at one, the clusters are the mean, which has rows of its own
        yield Candidate(f"hierarchical, {k}", partial(row, k, None), k in STAGES[1:])
    for k, (name, precision) in product(QUANTISED[1:], QUANTIZATIONS.items()):
        yield Candidate(f"hierarchical, {k}, {name}", partial(row, k, precision))


def muvera(on: Subject) -> Iterator[Candidate]:
    """MUVERA's fixed dimensional encodings, which need no fit."""
    for settings in ({"k_sim": 5, "repetitions": 20}, {"k_sim": 4, "repetitions": 5}):

        def make(settings: dict[str, int] = settings) -> Encoded:
            encoder = Muvera(on.documents.dim, dim_proj=16, seed=on.seed, **settings)
            queries = as_vectors(on.queries, encoder.queries, np.float32)
            return Encoded(queries, as_vectors(on.documents, encoder.documents), "dot")

        made, width = Once(make), settings["repetitions"] * 2 ** settings["k_sim"] * 16
        yield Candidate(f"MUVERA, {width}", made, settings["k_sim"] == 5)
        if settings["k_sim"] == 5:
            yield Candidate(f"MUVERA, {width}, one-bit", partial(lazily_quantised, made, "binary"), True)


def sparse_codes(on: Subject) -> Iterator[Candidate]:
    """The stock sparse auto-encoder at several numbers of active dimensions."""
    code = RIVALS["csr"].fit_digest()
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
        averaged = Once(lambda: one_vector(on, mean_of_tokens(on.documents)))
        for name, precision in QUANTIZATIONS.items():
            yield Candidate(f"mean, {name}", partial(lazily_quantised, averaged, precision), name == "one-bit")
    for name, precision in QUANTIZATIONS.items():
        yield Candidate(f"{FULL}, {name}", partial(lazily_quantised, whole, precision), on.kind == "sentence")


_HERE = "evaluation/frontier/"

RIVALS = {
    "mean": Method(mean, ("tokens",), (_HERE + "rivals.py",)),
    "hierarchical": Method(hierarchical, ("tokens",), (_HERE + "rivals.py", _HERE + "pooling.py")),
    "muvera": Method(muvera, ("tokens",), (_HERE + "rivals.py", _HERE + "muvera.py")),
    "csr": Method(sparse_codes, ("tokens", "sentence"), (_HERE + "rivals.py", _HERE + "csr.py"), "csr"),
    "quantization": Method(quantization, ("tokens", "sentence"), (_HERE + "rivals.py",)),
}
"""Name of ``--methods`` -> method."""
