r"""How alike the results of two wordings of one need are, and whether that is worth anything.

Of two lists cut at k, with A_d and B_d their first d documents (Webber, Moffat and Zobel 2010, "A similarity measure
for indefinite rankings", ACM TOIS 28(4)):

- average overlap, AO@k: the mean over d = 1 ... k of ``|A_d and B_d| / d``;
- Jaccard similarity, JS@k: ``|A_k and B_k| / |A_k or B_k|``, which knows no order;
- rank-biased overlap, RBO@k: agreement at depth d weighs ``p ** d``, and goes on beyond k as at k (their equation 32,
  for two lists of one length).

All are 1 for the same list and 0 for two without a common document. **A ranker that gives every query the same list
has 1 as well**, so none stands alone: nDCG of both wordings, and whether they find the document, stand beside.

Where a list is shorter than k, agreement at depth d is of the longer of both, ``|A_d and B_d| / max(|A_d|, |B_d|)``,
so that equal lists have 1 whatever their length; two empty ones agree in nothing. Equation 32 would guess how a
shorter list goes on, but here nothing follows: the system found no more. An inverted index finds no document that
shares no word with the query, so what has a score of 0 there is none that it found. How many lists were short is
counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from ..data.dataset import RetrievalDataset
from ..data.paraphrases import Pairs, pairs_of
from ..errors import InputError
from ..search.ranking import tie_ranks
from .metrics import best_first, per_query_metrics
from .statistics import RESAMPLES, clustered_intervals
from .systems import DEPTH, Ranking

K = 10
"""Documents of a list that are compared."""

PERSISTENCE = 0.9
"""Of rank-biased overlap: how likely a reader is to go on from one rank to the next."""

RANDOM_PAIRS = 2000
"""How many pairs of unrelated queries the floor is a mean of, about."""

BLOCK = 2**22
"""Comparisons of documents that are in memory at once."""

BANDS = (("rated >= 4", 4.0, np.inf), ("rated 3 to 4", 3.0, 4.0), ("rated < 3", -np.inf, 3.0))
"""Name, lowest rating and the rating below which it is, of the groups that rated pairs are told in."""

PARAPHRASE_NOTE = (
    "Paraphrases: AO, JS and RBO (p = {p:g}) compare the first {k} documents of two wordings; 1 is the same list. A "
    "ranker that gives every query the same list has 1, too, so read them beside nDCG@10 of both wordings, a / b. "
    "Flips: pairs of which one wording alone finds, among the first {k}, a document that is relevant to both. AO of "
    "both, one, none: of pairs of which so many wordings find one. Floor: AO of queries without a relevant document "
    "in common, paired at random. Brackets: 95 % bootstrap interval over documents, which pairs share."
)


def average_overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """AO of pairs of lists, ``(pairs,)`` in float64.

    Args:
        a: ``(pairs, k)`` positions of documents, best first, each once; below 0 where a list has no more.
        b: Likewise, of the other wordings.

    Raises:
        InputError: The two differ in shape, k is 0, or a list has a document twice.
    """
    return _agreement(a, b).mean(1)


def jaccard(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """JS of pairs of lists, ``(pairs,)`` in float64; arguments and errors as for :func:`average_overlap`."""
    common = _common(a, b)[:, -1]
    united = (a >= 0).sum(1) + (b >= 0).sum(1) - common
    return np.divide(common, united, out=np.zeros(len(a)), where=united > 0)


def rbo(a: np.ndarray, b: np.ndarray, p: float = PERSISTENCE) -> np.ndarray:
    """RBO of pairs of lists, extrapolated from depth k, ``(pairs,)`` in float64.

    Args:
        a: As for :func:`average_overlap`.
        b: Likewise.
        p: Persistence, between 0 and 1: the higher, the more do lower ranks count.

    Raises:
        InputError: As for :func:`average_overlap`, or ``p`` is out of its range.
    """
    refuse_persistence(p)
    agreement = _agreement(a, b)
    weights = (1 - p) * p ** np.arange(agreement.shape[1])  # (1 - p) / p * p^d of d = 1 ... k
    return agreement @ weights + agreement[:, -1] * p ** agreement.shape[1]


def _agreement(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``(pairs, k)`` share of the longer list's first d documents that both lists have there."""
    common = _common(a, b)  # which refuses what cannot be compared
    longer = np.maximum((a >= 0).cumsum(1), (b >= 0).cumsum(1))
    return np.divide(common, longer, out=np.zeros(common.shape), where=longer > 0)


def _common(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``(pairs, k)`` how many documents the first d of both lists have in common."""
    if a.ndim != 2 or a.shape != b.shape or not a.shape[1]:
        raise InputError(
            f"lists of shapes {a.shape} and {b.shape} cannot be compared. Pass two arrays (pairs, k), k from 1 on."
        )
    for name, lists in (("a", a), ("b", b)):
        in_order = np.sort(lists, axis=1)
        if ((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)).any():
            raise InputError(f"{name}: a list has a document twice, which would count twice. Pass each once.")
    pairs, k = a.shape
    counts = np.empty((pairs, k), np.int64)
    deeper = np.maximum.outer(np.arange(k), np.arange(k))  # the depth at which both lists have a document
    step = max(1, BLOCK // k**2)
    for start in range(0, pairs, step):
        one, other = a[start : start + step], b[start : start + step]
        pair, i, j = np.nonzero((one[:, :, None] == other[:, None, :]) & (one >= 0)[:, :, None])
        first = np.bincount(pair * k + deeper[i, j], minlength=one.size).reshape(one.shape)
        counts[start : start + step] = first.cumsum(1)
    return counts


@dataclass(frozen=True)
class RankSimilarity:
    """How alike one system's results for two wordings are, pair by pair.

    Attributes:
        system: Name of its row.
        pairs: What was compared.
        k: Documents of a list that were compared.
        p: Persistence of RBO.
        average_overlap: ``(pairs,)``.
        jaccard: ``(pairs,)``.
        rbo: ``(pairs,)``.
        finds: ``(2, pairs)`` whether each wording finds a document that is relevant to both among the first k.
        ndcg: ``(2, pairs)`` nDCG@10 of each wording.
        lengths: ``(2, pairs)`` how many documents each list has, at most k.
        floor: Mean AO of queries without a relevant document in common; NaN if there are none.
    """

    system: str
    pairs: Pairs
    k: int
    p: float
    average_overlap: np.ndarray
    jaccard: np.ndarray
    rbo: np.ndarray
    finds: np.ndarray
    ndcg: np.ndarray
    lengths: np.ndarray
    floor: float

    def groups(self) -> dict[str, np.ndarray]:
        """Name -> ``(pairs,)`` which pairs belong to it, the one that matters most first; none is empty.

        Pairs with a relevant document in common, by their rating where they have one, and then the others by kind.
        """
        pairs = self.pairs
        common, rated = pairs.common.getnnz(1) > 0, ~np.isnan(pairs.similarity)
        found = {name: common & (pairs.similarity >= low) & (pairs.similarity < high) for name, low, high in BANDS}
        found["not rated" if rated.any() else "all"] = common & ~rated
        for kind in dict.fromkeys(pairs.kinds[~common]):
            found[f"no document in common: {kind}"] = ~common & (pairs.kinds == kind)
        return {name: members for name, members in found.items() if members.any()}

    def summary(self, seed: int = 0, resamples: int = RESAMPLES) -> list[dict[str, Any]]:
        """One entry for each group, as results files hold them under ``paraphrases``.

        Args:
            seed: Seed of the bootstrap over documents.
            resamples: How many times to resample.
        """
        documents, flips = self._documents(), self.finds[0] != self.finds[1]
        known = self.pairs.common.getnnz(1) > 0
        entries = []
        for name, members in self.groups().items():
            measures = {"average_overlap": self.average_overlap, "jaccard": self.jaccard, "rbo": self.rbo}
            if known[members].all():
                measures["flip_rate"] = flips.astype(float)
            values = np.stack([of[members] for of in measures.values()])
            intervals = clustered_intervals(values, documents[members], seed, resamples)
            entry: dict[str, Any] = {
                "system": self.system,
                "dataset": self.pairs.dataset.name,
                "split": self.pairs.dataset.split,
                "source": self.pairs.source,
                "group": name,
                "pairs": int(members.sum()),
                "documents": len(np.unique(documents[members])),
                "k": self.k,
                "p": self.p,
            }
            for row, (measure, of) in enumerate(zip(measures, values.mean(1).tolist(), strict=True)):
                entry[measure] = of
                if intervals is not None:
                    entry[f"{measure}_interval"] = intervals[row].tolist()
            if "flip_rate" in measures:
                entry |= self._by_finding(members)
            entry |= {
                "ndcg_a": float(self.ndcg[0, members].mean()),
                "ndcg_b": float(self.ndcg[1, members].mean()),
                "short_lists": int((self.lengths[:, members] < self.k).sum()),
                "empty_lists": int((self.lengths[:, members] == 0).sum()),
            }
            if not np.isnan(self.floor):
                entry["floor"] = self.floor
            entries.append(entry)
        return entries

    def _by_finding(self, members: np.ndarray) -> dict[str, Any]:
        """Pairs, and their AO, of which both, one or none of the wordings finds the document."""
        found: dict[str, Any] = {}
        for wordings, name in ((2, "both"), (1, "one"), (0, "none")):
            chosen = members & (self.finds.sum(0) == wordings)
            found[f"pairs_{name}"] = int(chosen.sum())
            if chosen.any():
                found[f"average_overlap_{name}"] = float(self.average_overlap[chosen].mean())
        return found

    def _documents(self) -> np.ndarray:
        """``(pairs,)`` the document that a pair is resampled with: the first in common, else the first wording's.

        The first by its id, so that the order of the corpus changes no interval.
        """
        by_id = np.argsort(tie_ranks(list(self.pairs.dataset.corpus)))
        first, relevant = (_first(side[:, by_id]) for side in (self.pairs.common, self.pairs.relevant[0]))
        # A query that no document answers is one of its own, behind all documents.
        relevant = np.where(relevant < 0, len(by_id) + self.pairs.a, relevant)
        return np.where(first < 0, relevant, first)


def compare_wordings(
    pairs: Pairs,
    ranking: Ranking,
    reworded: Ranking | None = None,
    *,
    k: int = K,
    p: float = PERSISTENCE,
    seed: int = 0,
) -> RankSimilarity:
    """Compare what a system found for both wordings of each pair.

    Args:
        pairs: See :func:`polyrep.data.pairs_of`.
        ranking: What it found for the queries of ``pairs.dataset``.
        reworded: What it found for those of ``pairs.reworded``; default: they are the same queries.
        k: Documents of a list that are compared.
        p: Persistence of RBO.
        seed: Of the random pairs that the floor is of.

    Raises:
        InputError: ``k`` is less than 1 or more than there are documents, a ranking is not of these queries and
            documents, or the reworded queries were not searched for.
    """
    refuse_depth(k, pairs.dataset)
    if reworded is None:
        if pairs.needs_second_search:
            raise InputError(
                f"{ranking.system}: pairs by {pairs.source} need a second ranking, of the reworded queries "
                "(pairs.reworded), and there is none. Pass reworded=."
            )
        reworded = ranking
    if list(pairs.dataset.corpus) != list(pairs.reworded.corpus):
        raise InputError(
            f"{pairs.dataset.name} and {pairs.reworded.name}: other documents, or in another order, so a position "
            "means two things. Search both wordings in one corpus."
        )
    sides = [(pairs.dataset, ranking)]
    if reworded is not ranking:
        sides.append((pairs.reworded, reworded))
    # Of queries of one search, what is found for the first wordings is found for the second ones.
    lists = [best_documents(dataset, found, k) for dataset, found in sides]
    gains = [per_query_metrics(dataset, found)["nDCG@10"] for dataset, found in sides]
    first, second = lists[0][pairs.a], lists[-1][pairs.b]
    return RankSimilarity(
        ranking.system,
        pairs,
        k,
        p,
        average_overlap(first, second),
        jaccard(first, second),
        rbo(first, second, p),
        np.stack([_holds(pairs, best) for best in (first, second)]),
        np.stack([gains[0][pairs.a], gains[-1][pairs.b]]),
        np.stack([(best >= 0).sum(1) for best in (first, second)]),
        _floor(pairs, lists[0], lists[-1], seed),
    )


def open_pairs(source: str | None, k: int, datasets: Sequence[RetrievalDataset]) -> list[Pairs]:
    """Pairs of wordings of each data set, none unless they are asked for.

    Args:
        source: See :func:`polyrep.data.pairs_of`; None for no pairs.
        k: Documents of a list that are to be compared.
        datasets: Whose queries.

    Raises:
        InputError: A data set has no such pairs, ``k`` is out of its range, or it is told and nothing is compared.
    """
    if source is None:
        if k != K:
            raise InputError(f"--paraphrase_k {k}: there is no --paraphrases, so no lists are compared. Add it.")
        return []
    pairs = [pairs_of(dataset, source) for dataset in datasets]
    for dataset in datasets:
        refuse_depth(k, dataset, DEPTH)
    return pairs


def paraphrase_entries(
    pairs: Pairs, rankings: Sequence[Ranking], reworded: Sequence[Ranking] | None, *, k: int = K, seed: int = 0
) -> list[dict[str, Any]]:
    """What results files hold of every system: :meth:`RankSimilarity.summary` of its rankings.

    Args:
        pairs: What is compared.
        rankings: What each system found for the queries of ``pairs.dataset``.
        reworded: In the same order, for those of ``pairs.reworded``; None where these are the same.
        k: See :func:`compare_wordings`.
        seed: Likewise, and of the bootstrap.

    Raises:
        InputError: See :func:`compare_wordings`.
    """
    others: Sequence[Ranking | None] = [None] * len(rankings) if reworded is None else reworded
    found = [compare_wordings(pairs, *both, k=k, seed=seed) for both in zip(rankings, others, strict=True)]
    return [entry for of in found for entry in of.summary(seed)]


def paraphrase_notes(pairs: Sequence[Pairs], k: int = K) -> list[str]:
    """What a reader of :func:`paraphrase_entries` should know."""
    left_out = [
        f"{of.dataset.name}, {of.dataset.split}: {of.same_text:,} pairs by {of.source} of equal texts are left out."
        for of in pairs
        if of.same_text
    ]
    return [PARAPHRASE_NOTE.format(k=k, p=PERSISTENCE), *left_out]


def refuse_depth(k: int, dataset: RetrievalDataset, deepest: int | None = None) -> None:
    """InputError if lists cannot be compared at depth k: there are not as many documents, or rankings end before."""
    most = min(len(dataset.corpus), deepest or len(dataset.corpus))
    if not 1 <= k <= most:
        raise InputError(
            f"{dataset.name}: k={k}, but lists have 1 to {most:,} documents, so nothing could be compared. Choose k "
            "within."
        )


def refuse_persistence(p: float) -> None:
    """InputError if no sum over ranks exists."""
    if not 0 < p < 1:
        raise InputError(f"rbo: p={p!r}, so no sum over ranks exists. Use a number between 0 and 1, e.g. 0.9.")


def best_documents(dataset: RetrievalDataset, ranking: Ranking, k: int) -> np.ndarray:
    """``(queries, k)`` positions of the documents found first, ties by higher document id, -1 where there are no more.

    Raises:
        InputError: The ranking is not of these queries and documents.
    """
    queries, documents = len(dataset.queries), len(dataset.corpus)
    positions = ranking.positions
    last, first = positions.max(initial=-1), positions.min(initial=documents)
    if len(positions) != queries or not positions.size or first < 0 or last >= documents:
        raise InputError(
            f"{ranking.system}: a ranking of {len(positions):,} queries and "
            + (f"of positions {first} to {last}" if positions.size else "of no documents")
            + f", but {dataset.name} has {queries:,} queries and {documents:,} documents, so it is of others. Rank "
            "these queries in this corpus."
        )
    found, scores = best_first(dataset, ranking, k)
    there = scores > -np.inf
    if {"active_dims", "entries_per_document"} & ranking.costs.keys():  # an inverted index
        there &= scores != 0
    best = np.full((queries, k), -1)
    best[:, : found.shape[1]] = np.where(there, found, -1)  # fewer where a second stage returns no more
    return best


def _first(relevant: csr_matrix) -> np.ndarray:
    """``(rows,)`` the first column of each row of a sparse matrix, -1 for a row without one."""
    relevant.sort_indices()
    columns = np.append(relevant.indices, -1)  # so that there is one behind an empty row at the end
    return np.where(np.diff(relevant.indptr) > 0, columns[relevant.indptr[:-1]], -1)


def _holds(pairs: Pairs, best: np.ndarray) -> np.ndarray:
    """``(pairs,)`` whether a list holds a document that is relevant to both wordings."""
    rows = np.repeat(np.arange(len(best)), best.shape[1])
    hit = np.asarray(pairs.common[rows, best.clip(0).ravel()]).reshape(best.shape)
    return np.any(hit.astype(bool) & (best >= 0), axis=1)


def _floor(pairs: Pairs, first: np.ndarray, second: np.ndarray, seed: int) -> float:
    """Mean AO of first and second wordings of different pairs that have no relevant document in common."""
    generator = np.random.default_rng(seed)
    rounds = -(-RANDOM_PAIRS // len(pairs))
    here = np.tile(np.arange(len(pairs)), rounds)
    there = np.concatenate([generator.permutation(len(pairs)) for _ in range(rounds)])
    relevant = pairs.relevant
    apart = relevant[0][here].multiply(relevant[1][there]).getnnz(1) == 0
    apart &= pairs.a[here] != pairs.b[there]
    if not apart.any():
        return float("nan")
    return float(average_overlap(first[pairs.a[here[apart]]], second[pairs.b[there[apart]]]).mean())
