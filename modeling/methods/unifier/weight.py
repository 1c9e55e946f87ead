"""How much the dense view weighs in a sum of both: chosen on development queries once a model is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ...data.dataset import RetrievalDataset
from ...encoding.views import encode_views, part_with_views, views_of
from ...evaluation.hybrid import Tuned, choose_weight
from ...hub.folder import fastest_dtype
from ...search.ranking import tie_ranks
from ...search.weighted import View, find_candidates

QUERIES = 2000
"""Of a data set at most: a sample of dev, which may be a tenth of a million train queries."""

DOCUMENTS = 5000
"""Of a corpus at most: all that these queries judge, and a sample of the others. One number is chosen, and a model
that was fitted in minutes should not encode for longer than that."""

CANDIDATES = 1000
"""Documents of a query that are summed: the best by the lexicon, as a search takes them."""


def choose_dense_weight(model: Any, datasets: Sequence[RetrievalDataset]) -> None:
    """Set ``dense_weight`` of a model's config to what ranks development queries best, on the mean over data sets.

    Scores are those that an index sums: inner products, of queries multiplied by their gate.

    Args:
        model: A trained model of sentence-transformers with two views.
        datasets: With development queries; without any, and where a weight was given, the config stays as it is.
    """
    config = part_with_views(model).model.config
    if not datasets or config.dense_weight is not None:
        return
    views, half = views_of(model), fastest_dtype("auto")
    tuned = []
    for dataset in map(_smaller, datasets):
        bar = f"{dataset.name}: weight of views"
        with torch.autocast(model.device.type, half, enabled=half != torch.float32):
            encoded = [
                encode_views(model, list(texts.values()), list(views), task=task, progress=f"{bar}, {task}")
                for task, texts in (("query", dataset.queries), ("document", dataset.corpus))
            ]
        compared = [View(encoded[0][name], encoded[1][name], view.similarity) for name, view in views.items()]
        ranks = tie_ranks(list(dataset.corpus))
        found = find_candidates(compared, ranks, count=CANDIDATES, left_out=dataset.own)
        tuned.append(Tuned(found, dataset, ranks))
    config.dense_weight = choose_weight(tuned)


def _smaller(dataset: RetrievalDataset) -> RetrievalDataset:
    """A data set of at most ``QUERIES`` queries, and ``DOCUMENTS`` documents unless these queries judge more."""
    draw = np.random.default_rng(0)
    if len(dataset.queries) > QUERIES:
        names = list(dataset.queries)
        asked = {names[i]: dataset.queries[names[i]] for i in np.sort(draw.permutation(len(names))[:QUERIES])}
        dataset = replace(dataset, queries=asked, qrels={name: dataset.qrels[name] for name in asked})
    judged = {document for documents in dataset.qrels.values() for document in documents}
    others = [name for name in dataset.corpus if name not in judged]
    room = max(0, DOCUMENTS - len(judged))
    if len(others) > room:
        kept = judged | {others[i] for i in draw.permutation(len(others))[:room]}
        return replace(dataset, corpus={name: text for name, text in dataset.corpus.items() if name in kept})
    return dataset
