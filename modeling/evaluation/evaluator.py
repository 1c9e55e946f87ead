"""The overlap of two wordings' results while a model trains, or of any model of sentence-transformers."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

from sentence_transformers.base.evaluation import BaseEvaluator

from ..data.dataset import RetrievalDataset
from ..data.paraphrases import Pairs, Source, pairs_of
from ..encoding.cache import embed
from ..errors import InputError
from ..search.ranking import deeper, exact_search, tie_ranks
from .metrics import DEEPEST
from .rank_similarity import PERSISTENCE, K, compare_wordings, refuse_depth, refuse_persistence
from .systems import Ranking, costs_of

logger = logging.getLogger(__name__)


class RankSimilarityEvaluator(BaseEvaluator):
    """How alike a model's results for two wordings of one need are, for a trainer or by hand.

    It takes a ``SentenceTransformer``, a ``SparseEncoder`` or a ``MultiVectorEncoder``, and searches exactly. Metrics
    are of the first group of :meth:`polyrep.evaluation.rank_similarity.RankSimilarity.groups`, that is of pairs rated
    4 and more where there are ratings: ``average_overlap@10``, ``jaccard@10``, ``rbo@10``, ``flip_rate``,
    ``both_found@10``, ``ndcg@10_a`` and ``ndcg@10_b``, ``floor``.

    The primary metric is ``both_found``, the share of pairs both of whose wordings find a document that is relevant to
    both. Overlap itself is none to choose a model by: a model that gives every query the same list has all of it.

    Args:
        dataset: Queries of one split, their documents and judgments.
        pairs: Pairs of its queries, or where to take them from; see :func:`polyrep.data.pairs_of`.
        k: Documents of a list that are compared.
        p: Persistence of rank-biased overlap.
        name: What stands before the names of metrics.
        batch_size: Texts per forward pass.
        dtype: Numbers that scores are computed from, ``float32`` or ``float16``.
        show_progress_bar: Show progress of encoding.
        write_csv: Append a line to ``rank_similarity_<name>_results.csv`` where a trainer names a folder.

    Raises:
        InputError: There are no pairs, they are of another data set, none has a relevant document in common, ``k`` is
            less than 1 or more than there are documents, or ``p`` is not between 0 and 1.
    """

    def __init__(
        self,
        dataset: RetrievalDataset,
        pairs: Pairs | Source = "file",
        *,
        k: int = K,
        p: float = PERSISTENCE,
        name: str = "",
        batch_size: int = 32,
        dtype: str = "float32",
        show_progress_bar: bool = False,
        write_csv: bool = True,
    ):
        super().__init__()
        refuse_depth(k, dataset)
        refuse_persistence(p)
        self.pairs = pairs if isinstance(pairs, Pairs) else pairs_of(dataset, pairs)
        if self.pairs.dataset is not dataset:
            raise InputError(
                f"{dataset.name}, {dataset.split}: the pairs are of another data set ({self.pairs.dataset.name}, "
                f"{self.pairs.dataset.split}) or of another copy, so their places could mean other queries. Pass the "
                "one that they were made of, pairs.dataset."
            )
        if not self.pairs.common.nnz:
            raise InputError(
                f"{dataset.name}, {dataset.split}: no pair has a relevant document in common, so nothing says whether "
                "both wordings find it. Pair queries of one need."
            )
        self.dataset, self.k, self.p, self.name = dataset, k, p, name
        self.options: dict[str, Any] = {
            "batch_size": batch_size,
            "dtype": dtype,
            "show_progress": show_progress_bar,
        }
        self.write_csv = write_csv
        self.csv_file = "_".join(filter(None, ["rank_similarity", name, "results.csv"]))
        self.primary_metric: str | None = f"both_found@{k}"

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """Encode, search and compare.

        Args:
            model: Any model of the three families.
            output_path: Folder of the CSV file.
            epoch: In which epoch of a training, -1 outside of one.
            steps: After how many steps of it, -1 at its end.

        Returns:
            The metrics, each after ``name`` and ``_`` where there is a name.
        """
        found = self._measure(model)
        metrics = self.prefix_name_to_metrics(found, self.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        logger.info("%s: %s", self.description, ", ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
        if output_path is not None and self.write_csv:
            self._append(Path(output_path), {"epoch": epoch, "steps": steps} | found)
        return metrics

    def _measure(self, model: Any) -> dict[str, float]:
        documents = embed(model, self.dataset.corpus, task="document", name=self.dataset.name, **self.options)
        ranks, similarity = tie_ranks(list(self.dataset.corpus)), str(model.similarity_fn_name)
        rankings = []
        for side in self.pairs.sides:
            queries = embed(model, side.queries, task="query", name=f"{side.name}-{side.split}", **self.options)
            best = exact_search(
                queries,
                documents,
                ranks,
                similarity=similarity,
                k=deeper(max(self.k, DEEPEST), side.own),
                left_out=side.own,
                device=model.device,
            )
            rankings.append(Ranking("model", *best, costs_of(queries, documents)))
        entry = compare_wordings(self.pairs, *rankings, k=self.k, p=self.p).summary(resamples=1)[0]
        k = self.k
        found = {f"{name}@{k}": entry[name] for name in ("average_overlap", "jaccard", "rbo")}
        found |= {"flip_rate": entry["flip_rate"], f"both_found@{k}": entry["pairs_both"] / entry["pairs"]}
        found |= {"ndcg@10_a": entry["ndcg_a"], "ndcg@10_b": entry["ndcg_b"]}
        return found | ({"floor": entry["floor"]} if "floor" in entry else {})

    def _append(self, folder: Path, row: dict[str, Any]) -> None:
        """Add a line to the CSV file, below its header where it is new."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.csv_file
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)

    @property
    def description(self) -> str:
        """In logs and on model cards."""
        return "Rank Similarity"

    def get_config_dict(self) -> dict[str, Any]:
        """What a model card says of it."""
        return {"pairs": self.pairs.source, "k": self.k, "p": self.p}
