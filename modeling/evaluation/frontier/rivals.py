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
from .full_model import FullModel
from .muvera import Muvera
from .pooling import LADDER, hierarchical_clusters, hierarchically, pooled
from .rows import (
    FULL,
    QUANTIZATIONS,
    QUANTIZED_NUMBERS,
    STAGES,
    Candidate,
    Encoded,
    Method,
    Once,
    as_vectors,
    few_vectors,
    lazily_quantized,
    one_vector,
    quantized,
)


def mean(full: FullModel) -> Iterator[Candidate]:
    """The mean of a document's vectors, against the sum of the query's."""
    yield Candidate("mean", lambda: one_vector(full, mean_of_tokens(full.documents)), True)


def hierarchical(full: FullModel) -> Iterator[Candidate]:
    """Ward clusters of a document's vectors, in half precision, one byte and one bit."""

    def make() -> dict[int, Embeddings]:
        clusters = hierarchical_clusters(full.documents, LADDER, full.kept / "clusters" / full.documents.path.name)
        return pooled(full.documents, hierarchically(full.documents, clusters, LADDER))

    made = Once(make)

    def row(k: int, precision: str | None) -> Encoded:
        return quantized(few_vectors(full, made()[k], {}), precision)

    for k in LADDER:  # at one, the clusters are the mean, which has rows of its own
        yield Candidate(f"hierarchical, {k}", partial(row, k, None), k in STAGES[1:])
    for k, (name, precision) in product(QUANTIZED_NUMBERS[1:], QUANTIZATIONS.items()):
        yield Candidate(f"hierarchical, {k}, {name}", partial(row, k, precision))


def muvera(full: FullModel) -> Iterator[Candidate]:
    """MUVERA's fixed dimensional encodings, which need no fit."""
    for settings in ({"k_sim": 5, "repetitions": 20}, {"k_sim": 4, "repetitions": 5}):

        def make(settings: dict[str, int] = settings) -> Encoded:
            encoder = Muvera(full.documents.dim, dim_proj=16, seed=full.seed, **settings)
            queries = as_vectors(full.queries, encoder.queries, np.float32)
            return Encoded(queries, as_vectors(full.documents, encoder.documents), "dot")

        made, width = Once(make), settings["repetitions"] * 2 ** settings["k_sim"] * 16
        yield Candidate(f"MUVERA, {width}", made, settings["k_sim"] == 5)
        if settings["k_sim"] == 5:
            yield Candidate(f"MUVERA, {width}, one-bit", partial(lazily_quantized, made, "binary"), True)


def sparse_codes(full: FullModel) -> Iterator[Candidate]:
    """The stock sparse auto-encoder at several numbers of active dimensions."""
    code = RIVALS["csr"].fit_digest()
    for size in CSR_SIZES:

        def make(size: int = size) -> Encoded:
            sides = [full.side(full.dataset, "query"), full.side(full.dataset, "document")]
            dim = sides[1].embeddings.dim
            size = min(size, dim)

            def fit(steps: int, folder: Path) -> None:
                set_seed(full.seed)
                module, objective = csr(dim, size)
                data = HeadData(labels=False)
                full.side(full.fit_data.dataset, "query"), full.side(full.fit_data.dataset, "document")
                model = full.single[1]
                data.add(model, full.fit_data.dataset, cache_dir=full.cache_dir, batch_size=full.batch_size)
                options: dict[str, Any] = {"rate": CSR_RATE, "batch": CSR_BATCH, "seed": full.seed}
                fit_module(module, objective, data, folder, steps=steps, **options)

            folder = fitted(full, f"csr-{size}", [size, code], CSR_STEPS, fit)
            module, _ = csr(dim, size)
            load_model(module, folder / "module.safetensors")
            queries, documents = (with_csr(module.eval(), side) for side in sides)
            return Encoded(queries, documents, "cosine", costs_of_fit(folder))

        yield Candidate(f"CSR, {size}", Once(make), size == CSR_SIZES[-1])


def quantization(full: FullModel) -> Iterator[Candidate]:
    """One byte or one bit a dimension, of the full vectors and of their mean."""

    def whole() -> Encoded:
        return Encoded(full.queries, full.documents, full.similarity)

    if full.kind == "tokens":
        averaged = Once(lambda: one_vector(full, mean_of_tokens(full.documents)))
        for name, precision in QUANTIZATIONS.items():
            yield Candidate(f"mean, {name}", partial(lazily_quantized, averaged, precision), name == "one-bit")
    for name, precision in QUANTIZATIONS.items():
        yield Candidate(f"{FULL}, {name}", partial(lazily_quantized, whole, precision), full.kind == "sentence")


_HERE = "evaluation/frontier/"

RIVALS = {
    "mean": Method(mean, ("tokens",), (_HERE + "rivals.py",)),
    "hierarchical": Method(hierarchical, ("tokens",), (_HERE + "rivals.py", _HERE + "pooling.py")),
    "muvera": Method(muvera, ("tokens",), (_HERE + "rivals.py", _HERE + "muvera.py")),
    "csr": Method(sparse_codes, ("tokens", "sentence"), (_HERE + "rivals.py", _HERE + "csr.py"), "csr"),
    "quantization": Method(quantization, ("tokens", "sentence"), (_HERE + "rivals.py",)),
}
"""Name of ``--methods`` -> method."""
