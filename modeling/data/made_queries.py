"""Queries for a corpus that has none: sentences of its documents, or the documents themselves."""

from __future__ import annotations

import hashlib
import logging
import random
from dataclasses import replace

from ..errors import InputError
from .dataset import Judgments, RetrievalDataset
from .words import count_words, sentences_of

logger = logging.getLogger(__name__)


class NoSentences(InputError):
    """A corpus whose documents are too short to take a sentence from."""


def inverse_cloze(dataset: RetrievalDataset, sentences: int = 3, seed: int = 0) -> RetrievalDataset:
    """A data set whose queries are sentences of the documents, each removed from its own (Lee et al., 2019).

    It lets a head be fitted to any corpus without queries. No more than a third of a document's sentences are taken,
    of two sentences one, and none of fewer than four words; a document that has too few is only there to be told
    apart from.

    Args:
        dataset: The corpus.
        sentences: Most sentences of one document.
        seed: Which ones.

    Raises:
        NoSentences: No document has sentences enough.
        InputError: The documents are images.
    """
    if sentences < 1:
        raise InputError(f"--cloze_sentences {sentences}: at least 1, else there is no query.")
    corpus: dict[str, str] = {}
    queries: dict[str, str] = {}
    qrels: Judgments = {}
    for identifier, text in dataset.corpus.items():
        if not isinstance(text, str):
            raise InputError(
                f"{dataset.name}: {identifier!r} is an image, which has no sentences. Use judged queries."
            )
        parts = sentences_of(text)
        long_enough = [i for i, part in enumerate(parts) if count_words(part) >= 4]
        count = min(sentences, len(long_enough), max(1, len(parts) // 3) if len(parts) > 1 else 0)
        taken = set(random.Random(f"{seed} {identifier}").sample(long_enough, count))
        corpus[identifier] = " ".join(part for i, part in enumerate(parts) if i not in taken)
        for i in sorted(taken):
            queries[f"{identifier}#{i}"] = parts[i].strip()
            qrels[f"{identifier}#{i}"] = {identifier: 1}
    if not queries:
        raise NoSentences(
            f"{dataset.name}: no document has two sentences, one of four words or more, so none can be taken for a "
            "query. Use judged queries."
        )
    asked = len({next(iter(judged)) for judged in qrels.values()})
    logger.info("%s: %s sentences of %s of %s documents.", dataset.name, len(queries), asked, len(corpus))
    return replace(dataset, name=f"{dataset.name}-cloze", split="cloze", corpus=corpus, queries=queries, qrels=qrels)


def texts_as_queries(dataset: RetrievalDataset, most: int = 2048) -> RetrievalDataset:
    """A data set whose queries are documents as they are, for what a head can learn of the query encoder alone.

    Args:
        dataset: The corpus.
        most: Of a larger corpus, so many documents, by their hashed ids.

    Raises:
        InputError: The documents are images.
    """
    if most < 1:
        raise InputError(f"--query_texts {most}: at least 1, else there is no query.")
    ids = list(dataset.corpus)
    if len(ids) > most:
        kept = set(sorted(ids, key=lambda i: hashlib.md5(i.encode(), usedforsecurity=False).hexdigest())[:most])
        ids = [identifier for identifier in ids if identifier in kept]
    queries = {identifier: dataset.corpus[identifier] for identifier in ids}
    if not isinstance(queries[ids[0]], str):
        raise InputError(
            f"{dataset.name}: its documents are images, which no query encoder reads. Use judged queries."
        )
    qrels = {identifier: {identifier: 1} for identifier in ids}
    return replace(dataset, split="texts", queries=queries, qrels=qrels)
