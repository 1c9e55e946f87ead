"""Hard negatives for training whole models: mined with the backbone first, and with the model so far if wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import mine_hard_negatives
from transformers import TrainerCallback

from ..data.dataset import RetrievalDataset
from ..encoding.cache import embed
from ..errors import InputError
from ..hub.fingerprint import fingerprint
from ..hub.folder import fastest_dtype, fetch, load
from ..search.ranking import exact_search
from .arguments import RecipeArguments, negative_columns
from .losses import unwrapped
from .teachers import open_teacher, score_pairs


class Miner:
    """Adds ``negative_1`` and so on to pairs: documents that a model ranks high and nobody judged relevant.

    With a teacher, ``label`` holds its scores of each pair's document and negatives.

    Args:
        recipe: ``hard_negatives``, ``negative_margin``, ``teacher`` and the backbone.
    """

    def __init__(self, recipe: RecipeArguments):
        self.recipe = recipe
        remote: dict[str, Any] = {"revision": recipe.revision, "trust_remote_code": recipe.trust_remote_code}
        folder = fetch(recipe.backbone, **remote)
        self.backbone: Any = load(folder, trust_remote_code=recipe.trust_remote_code, dtype=fastest_dtype("auto"))
        if not isinstance(self.backbone, SentenceTransformer):
            raise InputError(
                f"--hard_negatives: {recipe.backbone} is a {type(self.backbone).__name__}, and mining takes one "
                "vector a text."
            )
        self.cache = Path(recipe.mined_cache) / fingerprint(folder)[:16]
        self.teacher = open_teacher(recipe.teacher, recipe.teacher_revision) if recipe.teacher else None
        self.columns = negative_columns(recipe.hard_negatives)

    def mine(self, dataset: RetrievalDataset, pairs: Dataset) -> Dataset:
        """Pairs with negatives by the backbone; those with too few are left out, which is said."""
        recipe = self.recipe
        own = _own_pairs(dataset)
        mined = mine_hard_negatives(
            _with_own(pairs, own),
            self.backbone,
            anchor_column_name="query",
            positive_column_name="positive",
            corpus=list(dict.fromkeys(dataset.corpus.values())),
            query_prompt=self.backbone.prompts.get("query") or None,
            corpus_prompt=self.backbone.prompts.get("document") or None,
            num_negatives=recipe.hard_negatives,
            relative_margin=recipe.negative_margin,
            output_format="n-tuple",
            verbose=False,
            cache_folder=str(self.cache),
        )
        if own:  # which were there so that no query gets the document that it is itself
            real = set(zip(pairs["query"], pairs["positive"], strict=True))
            mined = mined.filter(
                lambda query, positive: (query, positive) in real, input_columns=["query", "positive"]
            )
        if not len(mined):
            raise InputError(
                f"{dataset.name}: no pair has {recipe.hard_negatives} negatives that score "
                f"{recipe.negative_margin:.0%} below its document. Lower --hard_negatives or --negative_margin."
            )
        if left := len(pairs) - len(mined):
            print(
                f"{dataset.name}: {left:,} of {len(pairs):,} pairs have too few negatives and are left out.",
                flush=True,
            )
        named = mined.rename_column("negative", "negative_1") if "negative" in mined.column_names else mined
        return self._with_scores(dataset, named)

    def mine_again(self, model: Any, dataset: RetrievalDataset, pairs: Dataset) -> Dataset:
        """The same pairs in the same order with negatives by a model in training; the old ones where it has too few.

        They score no higher than the own document, and by the model's own score: an index vector of unit length, as
        the library's miner would take it, is no longer what the model ranks by.
        """
        asked, places = _numbered(pairs["query"]), _numbered(dataset.corpus.values())
        texts = list(places)
        options: dict[str, Any] = {"dtype": "float32", "batch_size": 64}
        queries = embed(model, _by_number(asked), task="query", **options)
        documents = embed(model, _by_number(places), task="document", **options)
        depth, similarity = 20 + 10 * len(self.columns), str(model.similarity_fn_name)
        options = {"similarity": similarity, "device": model.device}
        found, scores = exact_search(queries, documents, np.arange(len(texts)), k=depth, **options)
        rows = np.array([asked[text] for text in pairs["query"]])
        own = np.array([places[text] for text in pairs["positive"]])
        own_scores = np.full(len(rows), -np.inf, np.float32)  # below all that are kept, unless it is among them
        hit = found[rows] == own[:, None]  # (pairs, depth)
        own_scores[hit.any(1)] = scores[rows][hit]
        judged = [
            asked[dataset.queries[query]] * len(texts) + places[dataset.corpus[document]]
            for query, documents_of in dataset.qrels.items()
            for document, score in documents_of.items()
            if score > 0 and dataset.queries[query] in asked
        ]  # a number for each relevant (query, document)
        judged += [asked[query] * len(texts) + places[own] for query, own in _own_pairs(dataset) if query in asked]
        known = np.isin(np.arange(len(asked))[:, None] * len(texts) + found, judged)  # (queries, depth)
        fits = ~known[rows] & (scores[rows] <= own_scores[:, None])
        order = np.argsort(~fits, axis=1, kind="stable")[:, : len(self.columns)]  # the first that fit
        enough = fits.sum(1) >= len(self.columns)
        chosen = np.take_along_axis(found[rows], order, 1)
        fresh = {"query": pairs["query"][:], "positive": pairs["positive"][:]}
        for column, name in enumerate(self.columns):
            old = pairs[name][:]
            fresh[name] = [texts[chosen[row, column]] if enough[row] else old[row] for row in range(len(rows))]
        return self._with_scores(dataset, Dataset.from_dict(fresh))

    def _with_scores(self, dataset: RetrievalDataset, mined: Dataset) -> Dataset:
        """The same with the teacher's scores."""
        if self.teacher is None:
            return mined
        queries, documents = _numbered(mined["query"]), _numbered(dataset.corpus.values())
        columns = [mined[name] for name in ("positive", *self.columns)]
        wanted = [[(queries[q], documents[d]) for d in row] for q, *row in zip(mined["query"], *columns, strict=True)]
        scores = score_pairs(
            self.teacher,
            _by_number(queries),
            _by_number(documents),
            np.array(wanted).reshape(-1, 2),
            names=(f"{dataset.name}-{dataset.split}-taught", f"{dataset.name}-taught"),
            cache_dir=self.cache,
        )
        return mined.add_column("label", scores.reshape(len(mined), -1).tolist())


def _own_pairs(dataset: RetrievalDataset) -> list[tuple[str, str]]:
    """Texts of each query and of the document that it is itself."""
    documents = list(dataset.corpus)
    owned = zip(dataset.queries.values(), dataset.own, strict=True)
    return [(text, dataset.corpus[documents[place]]) for text, place in owned if place >= 0]


def _with_own(pairs: Dataset, own: list[tuple[str, str]]) -> Dataset:
    """Pairs, and each query with its own document, as if that were relevant."""
    if not own:
        return pairs
    asked = set(pairs["query"])
    more = [(query, text) for query, text in own if query in asked]
    columns = {"query": [q for q, _ in more], "positive": [d for _, d in more]}
    return concatenate_datasets([pairs.select_columns(["query", "positive"]), Dataset.from_dict(columns)])


def _numbered(texts: Iterable[str]) -> dict[str, int]:
    """Text -> its number among the different ones."""
    return {text: number for number, text in enumerate(dict.fromkeys(texts))}


def _by_number(numbers: Mapping[str, int]) -> dict[str, str]:
    """Number -> text, as texts are encoded."""
    return {str(number): text for text, number in numbers.items()}


class RemineCallback(TrainerCallback):
    """Gives the pairs negatives by the model so far, before each epoch after the first.

    The trainer keeps its data sets, so they are shown through a transform that looks into what was mined last. A
    resumed epoch is mined with the model that it resumes from.

    Args:
        miner: What mines.
        sources: Name -> the retrieval data set, and its pairs with the first negatives.
    """

    def __init__(self, miner: Miner, sources: dict[str, tuple[RetrievalDataset, Dataset]]):
        self.miner, self.sources = miner, sources
        self.mined = {name: pairs for name, (_, pairs) in sources.items()}

    def shown(self) -> dict[str, Dataset]:
        """Data sets for the trainer."""
        found = {}
        for name, (_, pairs) in self.sources.items():
            numbered = pairs.add_column("row", list(range(len(pairs))))
            numbered.set_transform(self._look(name))
            found[name] = numbered
        return found

    def _look(self, name: str) -> Callable[[dict[str, list[Any]]], dict[str, list[Any]]]:
        def current(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            return self.mined[name][batch["row"]]

        return current

    def on_epoch_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Mine."""
        if not int(state.epoch or 0):
            return
        inner: Any = unwrapped(model)
        training = inner.training
        self.mined = {
            name: self.miner.mine_again(inner.eval(), dataset, self.mined[name])
            for name, (dataset, _) in self.sources.items()
        }
        inner.train(training)
