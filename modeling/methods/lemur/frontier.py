"""LEMUR's rows in the frontier: one head, several widths and precisions."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...encoding.embeddings import in_memory
from ...evaluation.frontier.fit import costs_of_fit, fit_run
from ...evaluation.frontier.full_model import FullModel
from ...evaluation.frontier.rows import QUANTIZATIONS, Candidate, Encoded, Method, Once, quantized
from .modeling_lemur import LemurModel, LemurPooling

LEMUR_DIMS = (2048, 512, 256, 128)
"""Of the features themselves, and of the directions that matter most."""


def rows(full: FullModel) -> Iterator[Candidate]:
    """A LEMUR head: one vector whose inner product follows MaxSim, at several widths."""

    def make() -> tuple[LemurModel, dict[str, Tensor], dict[str, float]]:
        # MaxSim is its teacher, so that a corpus without queries of its own needs no sentences taken from it.
        values: dict[str, Any] = {} if full.fit_data.has_queries else {"queries": "texts"}
        folder = fit_run(full, METHOD.run, METHOD.fit_digest(), **values)
        options = {"embedding_dim": LEMUR_DIMS[0], "equal_norms": False}  # rows are searched by the inner product
        head = LemurPooling.from_pretrained(str(folder), **options).model.eval()
        sides = {
            "query": head.encode_query_tokens(full.queries.values, full.queries.offsets),
            "document": head.encode_document_tokens(full.documents.values, full.documents.offsets),
        }
        return head, sides, costs_of_fit(folder.parent)

    made = Once(make)

    def row(dim: int, precision: str | None) -> Encoded:
        head, sides, costs = made()
        with torch.inference_mode():
            queries, documents = (head.reduce(vectors, task, dim).cpu().numpy() for task, vectors in sides.items())
        found = Encoded(in_memory(queries), in_memory(documents.astype(np.float16)), "dot", costs)
        return quantized(found, precision)

    for dim in (dim for dim in LEMUR_DIMS if dim < len(full.documents) or dim == LEMUR_DIMS[0]):
        yield Candidate(f"LEMUR, {dim}", partial(row, dim, None), dim != 256)
        for name, precision in QUANTIZATIONS.items():
            if precision == "int8" or dim == 512:
                yield Candidate(f"LEMUR, {dim}, {name}", partial(row, dim, precision), (dim, name) == (512, "int8"))


METHOD = Method(rows, ("tokens",), ("methods/lemur",), "lemur-minilm", "LEMUR")
