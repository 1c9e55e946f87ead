"""BM25 as whoever compares with it would set it up: by ``bm25s``, over the words of :mod:`polyrep.encoding.bm25`."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from tqdm import tqdm

from ..data.dataset import RetrievalDataset
from ..data.words import words_of
from ..encoding.bm25 import K1, Analyzer, B, analyzer
from ..errors import InputError
from ..search.ranking import deeper, without
from .systems import DEPTH, Ranking, bytes_per_document, flops, latency


def analyzer_of(dataset: RetrievalDataset, language: str | Analyzer) -> Analyzer:
    """The :func:`analyzer` by which BM25 finds documents of a data set.

    Raises:
        InputError: It has nothing to find them by, which is no word in any, or images; or see :func:`analyzer`.
    """
    texts: list[Any] = list(dataset.corpus.values()) if isinstance(dataset.corpus, dict) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(
            f"{dataset.name}: documents are images, in which BM25 finds no words. Leave it out (--baselines none)."
        )
    if any(map(words_of, texts)):
        made = language if isinstance(language, Analyzer) else analyzer(language, texts)
        if any(made.words([text])[0] for text in texts):
            return made
    raise InputError(
        f"{dataset.name}: no document has a word of two letters that is no stop word, so BM25 would find nothing. "
        "Leave it out (--baselines none)."
    )


def rank_with_bm25(dataset: RetrievalDataset, depth: int | None = None, *, language: str | Analyzer = "en") -> Ranking:
    """BM25 (Lucene's variant, k1 = 1.5, b = 0.75) over stems without stop words, by ``bm25s``.

    Args:
        dataset: Corpus and queries.
        depth: Documents of a query; default: :data:`polyrep.evaluation.systems.DEPTH`.
        language: See :func:`analyzer`; or one made by hand.

    Raises:
        InputError: See :func:`analyzer_of`.
    """
    read = analyzer_of(dataset, language)
    import bm25s

    started = time.perf_counter()
    index = bm25s.BM25(k1=K1, b=B, method="lucene")
    index.index(read.words(dataset.corpus.values()), show_progress=False)
    seconds = time.perf_counter() - started
    queries = read.words(dataset.queries.values())
    # Ties must fall as everywhere else: put the documents in order of falling id, then sort stably.
    by_id = sorted(range(len(dataset.corpus)), key=list(dataset.corpus).__getitem__, reverse=True)
    positions, scores, timed = [], [], []
    for query in tqdm(queries, desc="bm25", unit="query"):
        begun = time.perf_counter()
        found = index.get_scores(query) if query else np.zeros(len(by_id), np.float32)
        order = np.argsort(-found[by_id], kind="stable")[: deeper(depth or DEPTH, dataset.own)]
        timed.append(time.perf_counter() - begun)
        positions.append(np.asarray(by_id)[order])
        scores.append(found[positions[-1]])
    # bm25s keeps one score per (term, document) pair, in float32.
    nnz = len(index.scores["data"]) / len(dataset.corpus)
    postings = np.diff(index.scores["indptr"])  # documents of each term
    askings = np.zeros(len(postings))  # queries of each term
    for query in queries:
        askings[index.get_tokens_ids(query)] += 1  # a repeated term counts once
    found, scored = without(dataset.own, np.stack(positions), np.stack(scores), depth or DEPTH)
    costs = {
        "bytes_per_document": bytes_per_document("sparse", "float32", nnz=nnz),
        "active_dims": nnz,
        "flops": flops(askings / len(queries), postings / len(dataset.corpus)),
        "encode_docs_per_s": len(dataset.corpus) / seconds,
    }
    return Ranking("BM25", found, scored, costs | latency(timed), np.array(timed), read.settings)
