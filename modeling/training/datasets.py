"""The data sets of a run, one at a time."""

from __future__ import annotations

from collections.abc import Iterator

from ..data.dataset import RetrievalDataset
from ..data.load import load_corpus, load_retrieval_dataset
from ..data.made_queries import inverse_cloze, texts_as_queries
from ..errors import InputError, NoSplit
from .arguments import QUERIES, HeadArguments, RecipeArguments


def datasets_of(recipe: RecipeArguments, head: HeadArguments | None = None) -> Iterator[RetrievalDataset]:
    """The data sets of a run, one at a time; two of one name are refused, since counts and caches go by name."""
    seen = set()
    queries = head.queries if head else "judged"
    if queries not in QUERIES:
        raise InputError(f"--queries {queries!r}: use one of {', '.join(QUERIES)}.")
    for source in recipe.datasets:
        if queries in ("inverse_cloze", "texts"):
            dataset = load_corpus(source, keep_empty=recipe.keep_empty)
        else:
            dataset = load_retrieval_dataset(
                source, recipe.split, keep_empty=recipe.keep_empty, restval=recipe.restval
            )
        if dataset.name in seen:
            raise InputError(f"--datasets: two are called {dataset.name!r}; rename one folder.")
        seen.add(dataset.name)
        if queries not in ("inverse_cloze", "texts"):
            yield dataset
        if head and queries in ("inverse_cloze", "both"):
            yield inverse_cloze(dataset, head.cloze_sentences)
        if head and queries in ("texts", "judged+texts"):
            yield texts_as_queries(dataset, head.query_texts)


def dev_of(recipe: RecipeArguments) -> list[RetrievalDataset]:
    """Development queries of a run's data sets, of those that have some; none where the run learns from them.

    Raises:
        InputError: There are some, and they cannot be used.
    """
    found = []
    for source in recipe.datasets if recipe.split != "dev" else []:
        try:
            found.append(load_retrieval_dataset(source, "dev", keep_empty=recipe.keep_empty, restval=recipe.restval))
        except NoSplit:
            continue
    return found
