"""UnifieR's rows in the frontier: the words of one head, and the weighted sum of its two views."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModel

from ...encoding.embeddings import Embeddings, in_memory, joined, rows
from ...errors import InputError
from ...evaluation.frontier.fit import costs_of_fit, fit_run
from ...evaluation.frontier.full_model import FullModel
from ...evaluation.frontier.rows import Candidate, Encoded, Method, Once
from ...evaluation.hybrid import Tuned, choose_weight, ratio_of_spreads
from ...evaluation.systems import DEPTH, costs_of
from ...search.weighted import View, find_candidates
from ...training.sides import StatesSide
from .modeling_unifier import UnifierHead, weighed
from .objective import UnifierHeadObjective

WORDS = 48, 128
"""Words kept of a query and of a document: those of Dense2Sparse's first operating point, for the two to compare."""

SAMPLE = 256
"""Queries at most, of those that heads learn from, whose scores tell the weight where no dev queries do."""


class Views(NamedTuple):
    """Texts in both views, of queries multiplied by their gate."""

    lexicon: Embeddings
    dense: Embeddings


def table_rows(full: FullModel) -> Iterator[Candidate]:
    """The lexicon view of one head, and the sum of both; the dense one is the full model's vector by a map."""

    def make() -> tuple[UnifierHead, Views, Views, dict[str, float]]:
        if full.similarity not in ("dot", "cosine"):
            raise InputError(
                f"the model scores by {full.similarity}, which no inner product of its vectors follows, so none could "
                "be added to one of words. Use a model with dot or cosine similarity."
            )
        folder = fit_run(full, METHOD.run, METHOD.fit_digest())
        head = AutoModel.from_pretrained(folder).eval().to(full.model.device)
        head.config.query_top_k, head.config.document_top_k = WORDS
        return head, encoded(full, head, "query"), encoded(full, head, "document"), costs_of_fit(folder.parent)

    made = Once(make)

    def lexicon() -> Encoded:
        _, queries, documents, costs = made()
        return Encoded(queries.lexicon, documents.lexicon, "dot", costs)

    def both() -> Encoded:
        head, queries, documents, costs = made()
        weight, how = dense_weight(full, head, documents)
        sizes = costs_of(queries.lexicon, documents.lexicon), costs_of(queries.dense, documents.dense)
        size = sum(of["bytes_per_document"] for of in sizes)
        settings = {"weights": f"lexicon=1,dense={weight:g}", "chosen_on": how}
        costs = sizes[0] | costs | {"bytes_per_document": size}
        return Encoded(both_in_one(queries, weight), both_in_one(documents), "dot", costs, settings)

    yield Candidate("UnifieR, lexicon", lexicon, True)
    yield Candidate("UnifieR, both views", both)


def encoded(full: FullModel, head: UnifierHead, task: Any, dataset: Any = None, most: int | None = None) -> Views:
    """Queries or documents in both views, from token states that are kept.

    They are states of as many tokens as the full model reads, although fewer would take less room: then the dense view
    is the full model's own, and documents are encoded once for the fit and for the rows.

    Args:
        full: The model.
        head: Fitted to it.
        task: ``query`` or ``document``.
        dataset: Whose; default: what is measured.
        most: Texts at most, spread over all of them.
    """
    objective = UnifierHeadObjective(head)
    kept = {"layers": objective.state_layers, "token": objective.layer_token}
    side = full.states(dataset or full.dataset, task, **kept)
    if most is not None and most < len(side):
        chosen = np.linspace(0, len(side) - 1, most).astype(int)
        side = replace(side, embeddings=rows(side.embeddings, chosen))
    return with_head(objective, side, task, full.batch_size)


@torch.inference_mode()
def with_head(objective: UnifierHeadObjective, side: StatesSide, task: str, batch_size: int) -> Views:
    """Both views of cached token states, of documents in the half precision that an index stores.

    Args:
        objective: Of the head, whose own pruning counts.
        side: Queries or documents, or the windows of these.
        task: ``query`` or ``document``.
        batch_size: Texts at a time.
    """
    head = objective.head
    dtype = np.float16 if task == "document" else np.float32
    order = np.argsort(side.embeddings.lengths, kind="stable")  # equal lengths side by side: little padding
    lexicon, dense = [], []
    for start in tqdm(range(0, len(order), batch_size), desc="UnifieR", unit="batch"):
        features = side.features(order[start : start + batch_size])
        features = {name: value.to(head.device) for name, value in features.items()}
        found = weighed(objective.encode(features, task, prune=True))
        text_of, term = found["lexicon"].nonzero(as_tuple=True)
        values = found["lexicon"][text_of, term].float().cpu().numpy().astype(dtype)
        counts = text_of.bincount(minlength=len(found["lexicon"])).cpu().numpy()
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        terms = term.cpu().numpy().astype(np.int32)
        lexicon.append(Embeddings("sparse", values, offsets, terms, head.config.vocab_size, 0.0, Path()))
        dense.append(in_memory(found["dense"].float().cpu().numpy().astype(dtype)))
    back, windows = np.argsort(order), side.embeddings.windows
    return Views(*(replace(rows(joined(parts), back), windows=windows) for parts in (lexicon, dense)))


def both_in_one(views: Views, weight: float = 1.0) -> Embeddings:
    """Both views as one sparse vector a text, whose inner product is the weighted sum of theirs.

    Behind the words of the vocabulary stands each number of the dense vector, whatever its sign.

    Args:
        views: Of queries or of documents.
        weight: Of the dense view; for one side alone.
    """
    words, dense = views
    assert words.offsets is not None and words.indices is not None
    offsets = words.offsets + dense.dim * np.arange(len(words) + 1)
    is_dense = np.zeros(offsets[-1], bool)
    is_dense[offsets[1:, None] - dense.dim + np.arange(dense.dim)] = True  # (texts, dim)
    values, indices = np.empty(len(is_dense), words.values.dtype), np.empty(len(is_dense), np.int32)
    values[~is_dense], indices[~is_dense] = words.values, words.indices
    values[is_dense] = weight * dense.values.reshape(-1)
    indices[is_dense] = np.tile(words.dim + np.arange(dense.dim), len(words))
    return replace(words, values=values, indices=indices, offsets=offsets, dim=words.dim + dense.dim)


def dense_weight(full: FullModel, head: UnifierHead, documents: Views) -> tuple[float, str]:
    """What the dense view weighs in the sum, and how that was chosen: never by a query that is measured.

    The best on dev is taken. Without dev queries it is the weight at which the scores of both views are spread alike,
    for which no judgment is needed. Of documents that are cut, each view tells its own best window here, and the row
    takes the window whose sum is best: the weight need not be exact.

    Args:
        full: The model.
        head: Fitted to it.
        documents: The corpus.
    """

    def candidates(queries: Views, left_out: np.ndarray | None = None) -> Any:
        views = [View(*sides, "dot") for sides in zip(queries, documents, strict=True)]
        return find_candidates(views, full.ranks, count=DEPTH, left_out=left_out)

    if full.dev is not None:
        found = candidates(encoded(full, head, "query", full.dev), full.dev.own)
        return choose_weight([Tuned(found, full.dev, full.ranks)]), f"dev ({len(full.dev.queries):,} queries)"
    queries = encoded(full, head, "query", full.fit_data.dataset, SAMPLE)
    weight = ratio_of_spreads(candidates(queries).scores)
    how = f"the spread of scores of {len(queries.dense):,} queries that heads learn from"
    return float(f"{weight:.3g}"), how


METHOD = Method(
    table_rows,
    ("sentence",),
    ("methods/unifier", "evaluation/hybrid.py", "search/weighted.py"),
    "unifier-minilm-frozen",
    "UnifieR",
    reads_dev=True,
)
