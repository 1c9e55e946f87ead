"""Retrieval data sets, by name or from a folder or the Hub: BEIR layout, tables of pairs, images with captions.

A data set is a corpus, the queries of one split and their judgments (qrels). Everything is checked while it is read,
because a silently skipped line moves nDCG by an amount that nobody can explain later.

Where queries are documents themselves, each query's own is left out for it: see ``RetrievalDataset.own``.

Folder layout, each ``.jsonl`` optionally gzipped (``.jsonl.gz``)::

    corpus.jsonl      {"_id": "d1", "title": "optional", "text": "..."}
    queries.jsonl     {"_id": "q1", "text": "..."}
    qrels/test.tsv    header line, then: query id <TAB> document id <TAB> integer score

On the Hub both common arrangements are read: configurations ``corpus``, ``queries`` and ``default`` in one repository,
or ``corpus`` and ``queries`` with the judgments in ``<repository>-qrels``. So is a plain table of pairs, with a column
``query`` and one of ``document``, ``positive``, ``answer``, ``text`` or ``image``: equal documents are one, so are
equal queries, and each row is a judgment. Page images stay as they are stored until they are encoded. Such a table may
bring its own hard negatives for training, in columns ``negative_1`` and so on, and in ``scores`` what a teacher gave
to the document and to each of them. Images with captions, or vectors of both, are another kind of folder: see
``captions.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetsError

from ..errors import InputError, NoSplit
from .beir import check_qrels, hub_rows, load_part, open_beir, read_jsonl, texts_by_id
from .captions import is_captions, load_captions
from .dataset import RetrievalDataset, dataset_name, in_dev_tenth
from .named import located, same_ids
from .tables import from_pairs, open_pairs

logger = logging.getLogger(__name__)


def load_retrieval_dataset(
    path_or_id: str | Path,
    split: str = "test",
    *,
    revision: str | None = None,
    keep_empty: bool = False,
    restval: str = "train",
) -> RetrievalDataset:
    """Read one split of a retrieval data set.

    A data set with a train split but no dev split still has a dev split here: the tenth of the train queries whose
    hashed id says so, which ``split="train"`` then leaves out. Choosing settings on test is thus never necessary.

    Args:
        path_or_id: A name of ``polyrep data list``, a folder in BEIR layout, or a data set id on the Hub such as
            ``"mteb/scifact"``.
        split: Split of the qrels, e.g. ``"train"``, ``"dev"``, ``"test"``.
        revision: Commit, tag or branch of a Hub data set.
        keep_empty: Accept documents and queries without text instead of refusing the data set.
        restval: For images with captions, see :func:`polyrep.data.captions.load_captions`.

    Raises:
        NoSplit: The split is not there, or judges no query.
        InputError: A file, line or field is missing or malformed; an id is duplicated or unknown; a text is empty.
    """
    source = located(path_or_id)
    folder = Path(source)
    if is_captions(folder):
        return load_captions(folder, split, restval=restval)
    if (table := open_pairs(source, revision)) is not None:
        return from_pairs(source, table, split)
    corpus_rows, query_rows, splits, read_qrels = open_beir(source, split, revision)
    wanted = split
    if split in ("train", "dev") and "train" in splits and "dev" not in splits:
        wanted = "train"
        logger.info("%s has no dev split: dev is a fixed tenth of its train queries.", source)
    if wanted not in splits:
        raise NoSplit(f"{source}: no judgments for split {split!r}; it has {sorted(splits) or 'none'}.")

    corpus = texts_by_id(corpus_rows, f"{source} corpus", keep_empty, titles=True)
    all_queries = texts_by_id(query_rows, f"{source} queries", keep_empty)
    qrels = check_qrels(read_qrels(wanted), corpus, all_queries)
    if wanted != split or (split == "train" and "dev" not in splits):
        qrels = {q: judged for q, judged in qrels.items() if in_dev_tenth(q) == (split == "dev")}
    if not qrels:
        raise NoSplit(f"{source}: split {split!r} judges no query, so there is nothing to train on or to measure.")
    queries = {q: text for q, text in all_queries.items() if q in qrels}
    qrels = {q: qrels[q] for q in queries}
    same, place = same_ids(str(path_or_id)), folder if folder.is_dir() else None
    return RetrievalDataset(dataset_name(folder), split, corpus, queries, qrels, same_ids=same, folder=place)


def load_corpus(path_or_id: str | Path, *, revision: str | None = None, keep_empty: bool = False) -> RetrievalDataset:
    """Read the documents of a data set alone, for training or measuring without its queries, which need not be there.

    Args:
        path_or_id: As for :func:`load_retrieval_dataset`.
        revision: Likewise.
        keep_empty: Likewise.

    Raises:
        InputError: The corpus is missing or malformed.
    """
    source = located(path_or_id)
    folder = Path(source)
    if (table := open_pairs(source, revision, queries=False)) is not None:
        corpus: Mapping[str, Any] = from_pairs(source, table, None).corpus
    else:
        if any(folder.glob("corpus.jsonl*")) or folder.is_dir() and not (folder / "README.md").is_file():
            rows = read_jsonl(folder, "corpus")
        else:
            try:
                rows = hub_rows(load_part(source, "corpus", revision), f"{source} corpus")
            except (OSError, ValueError, DatasetsError) as error:
                raise InputError(
                    f"{source}: neither a folder with corpus.jsonl nor a readable Hub data set "
                    f"({type(error).__name__}: {error}). Check the path, the id and the network."
                ) from error
        corpus = texts_by_id(rows, f"{source} corpus", keep_empty, titles=True)
    return RetrievalDataset(dataset_name(folder), "corpus", corpus, {}, {})
