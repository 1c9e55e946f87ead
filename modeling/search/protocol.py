"""What every index does, and the checks that all of them share."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from scipy.sparse import csr_matrix, issparse

from ..encoding.embeddings import Embeddings, in_memory
from ..encoding.nested import Groups, first_vectors, refuse_other_lengths
from ..encoding.shards import Origin, Shard
from ..errors import InputError
from ..hub.fingerprint import told

logger = logging.getLogger(__name__)

HOLDERS = {"routed": "routed: or memory:"}
"""Back ends for kinds that few of them hold."""

CANDIDATES = 1000
"""Documents of a query that a weighted sum ranks."""

Asked = int | Sequence[int | None] | None
"""A budget of vectors as it is asked for: document vectors, or query vectors and these; None for all."""

Queries = Any
"""What ``encode_query`` returns: ``(queries, dim)`` as array or tensor; a list of ``(vectors, dim)`` where a query has
several; ``(queries, vocabulary)`` sparse, of torch or scipy; or :class:`polyrep.encoding.embeddings.Embeddings`."""


class Hit(NamedTuple):
    """A document that was found.

    Attributes:
        id: Of the document.
        score: Of the model.
        probability: That the document is judged relevant, from 0 to 1, where the model is calibrated (``polyrep
            calibrate``) and its :class:`~polyrep.search.Service` or ``polyrep search`` was asked; else None.
        window: Which of the document's windows has the score, from 0 on, where documents are cut into windows with
            vectors of their own; of a weighted sum, where those of one name alone are cut. Else None.
    """

    id: str
    score: float
    probability: float | None = None
    window: int | None = None


@dataclass(frozen=True)
class Added:
    """What became of documents that were handed over.

    Attributes:
        documents: How many were written.
        replaced: How many of them took the place of a document with their id, earlier in the index or in the input.
        shards_known: Shards that were there already, and were passed over.
    """

    documents: int = 0
    replaced: int = 0
    shards_known: int = 0


class Index(Protocol):
    """Documents by their ids, and the search in them.

    Documents may have vectors of several kinds, each under the name of its
    :class:`polyrep.encoding.shards.Origin`: add one corpus, then the other. Those back ends that hold one kind alone
    refuse the second.
    """

    origins: dict[str, Origin]
    """What is in it, by name; empty as long as nothing is."""

    def add(self, shards: Iterable[Shard]) -> Added:
        """Write documents; one whose id is there already is replaced, for the kind of vectors that is added.

        Whatever stops it, running it again with the same shards goes on, and ends in the same index.

        Raises:
            InputError: The vectors differ in kind, width or similarity from those in the index under this name, or
                came from another model and ``force`` was not set.
        """

    def search(
        self,
        queries: Queries | Mapping[str, Queries],
        k: int = 10,
        *,
        weights: Mapping[str, float] | None = None,
        candidates: int | None = None,
        budget: Asked = None,
        first: Asked = None,
    ) -> list[list[Hit]]:
        """The best ``k`` documents of each query, best first, or fewer where there are not as many.

        Args:
            queries: Vectors of the queries. Of an index with vectors of several kinds: name -> vectors; with two
                names, the first finds candidates, of which the second, scored exactly, takes the best.
            k: How many.
            weights: Name -> weight, for each name of ``queries``. Documents are then ranked by the weighted sum of
                their scores under all names, as the models give them: the first name of ``queries`` finds candidates,
                and all score these exactly. Sparse vectors find only documents that share a word with the query;
                where there is none, the next name finds the candidates, and a warning says for how many queries.
            candidates: Documents of a query that a weighted sum or a second stage ranks, or ``k`` if that is more.
                Where there are no more documents, all of them are. Default: of a sum :data:`CANDIDATES`, of a second
                stage what the URI says by ``prefetch``.
            budget: Of nested vectors (:mod:`polyrep.encoding.nested`): search the first so many of each document, with
                the query vectors of the smallest group that holds them; a pair says both. Queries come whole.
                Default: all that the index holds.
            first: Likewise, what finds the candidates that ``budget`` ranks.

        Raises:
            InputError: The index is empty, the queries are of another kind or width, a weight cannot be used,
                documents lack vectors that a sum needs, or the back end holds one kind of vectors and has no sum.
            BudgetError: The vectors are not nested or not as many, or the back end cannot search at this budget.
        """

    def delete(self, ids: Iterable[str]) -> int:
        """Remove documents, ids that are not there being no error; returns how many were."""

    def count(self) -> int:
        """Documents in the index."""


def checked_origin(
    origins: Mapping[str, Origin],
    new: Origin,
    where: str,
    *,
    kinds: Sequence[str],
    force: bool,
    beside_windows: bool = False,
) -> Origin:
    """The origin that an index goes on with once ``new`` is added, or a refusal.

    Args:
        origins: What is in the index.
        new: What is to be added.
        where: The index, for messages.
        kinds: What it can hold.
        force: Accept another fingerprint.
        beside_windows: Whether it can hold vectors of another name beside those of windows.

    Raises:
        InputError: Another kind, width, similarity or model.
    """
    if new.kind not in kinds:
        holder = HOLDERS.get(new.kind, "another back end")
        raise InputError(f"{where}: holds {' or '.join(kinds)} vectors, not {new.kind}. Use {holder}.")
    known = origins.get(new.name)
    if known is None:
        if origins and not beside_windows and any(origin.by_window for origin in (*origins.values(), new)):
            raise InputError(
                f"{where}: holds vectors {', '.join(origins)}, and {new.name!r} would join them, but a document's "
                "windows have no vectors of another name beside theirs. Use an index of their own, or memory:."
            )
        return new
    for field in ("kind", "dim", "similarity", "window", "stride", "vocabulary", "sentence_dim"):
        if getattr(known, field) != getattr(new, field):
            raise InputError(
                f"{where}: its vectors {new.name!r} have {field} {getattr(known, field)}, these have "
                f"{getattr(new, field)}, so no query could be compared with both. Use an index of their own, or "
                "another --name when encoding."
            )
    if known.nested != new.nested:
        raise InputError(
            f"{where}: its vectors {new.name!r} have {_said(known.nested)}, these {_said(new.nested)}, so a budget "
            "would mean two things. Use an index of their own, or cut these as those were (--budget of polyrep index)."
        )
    if known.precision != new.precision and "binary" in (known.precision, new.precision):
        raise InputError(
            f"{where}: its vectors {new.name!r} are {known.precision}, these {new.precision}: one of them are signs, "
            "whose scores are of another size. Use an index of their own, or another --name when encoding."
        )
    if known.fingerprint != new.fingerprint and not force:
        raise InputError(
            f"{where}: its vectors {new.name!r} were made by model {told(known.fingerprint)}, these by "
            f"{told(new.fingerprint)}, so their scores would not be comparable. Start a new index, or pass --force "
            "(force=True) to mix them."
        )
    return known


def _said(groups: Groups) -> str:
    return f"nested groups {', '.join(map(str, groups))}" if groups else "no nested groups"


def refuse_unlike_groups(shard: Shard) -> None:
    """InputError if a document of a shard has not as many vectors as its nested groups say."""
    if shard.origin.nested:
        refuse_other_lengths(shard.vectors, shard.ids, shard.origin.nested[-1][1])


def refuse_unfit_entries(vectors: Embeddings, origin: Origin, whose: str, ids: Sequence[str] = ()) -> None:
    """Refuse routed entries that are not what their origin says; other kinds pass.

    Args:
        vectors: Of queries or documents.
        origin: What they should be.
        whose: Of what they are, for messages.
        ids: Of the texts, for messages.

    Raises:
        InputError: A key outside the vocabulary, vectors of whole texts of another width, or a number that is not
            finite.
    """
    if vectors.kind != "routed":
        return
    assert vectors.indices is not None and vectors.offsets is not None
    remedy, offsets = "Encode again with the model that made the index.", vectors.offsets

    def told(row: int) -> str:
        text = int(np.searchsorted(offsets, row, "right")) - 1
        return f"{whose} {ids[text]!r:.80}" if len(ids) else f"{whose} {text}"

    outside = np.flatnonzero((vectors.indices < 0) | (vectors.indices >= origin.vocabulary))
    if len(outside):
        raise InputError(
            f"{told(outside[0])}: has the key {vectors.indices[outside[0]]}, but the vocabulary of {origin.name!r} "
            f"has {origin.vocabulary} from 0 on, so no list holds it. {remedy}"
        )
    if vectors.values.shape[1:] != (origin.dim,) or vectors.sentence_dim != origin.sentence_dim:
        raise InputError(
            f"{whose}: entries of width {vectors.values.shape[-1]} and vectors of whole texts of width "
            f"{vectors.sentence_dim}, but {origin.name!r} has {origin.dim} and {origin.sentence_dim}, so they cannot "
            f"be compared. {remedy}"
        )
    broken = np.flatnonzero(~np.isfinite(vectors.values).all(1))
    if len(broken):
        raise InputError(
            f"{told(broken[0])}: an entry has a number that is not finite, so its scores would mean nothing. {remedy}"
        )
    if vectors.sentences is not None and not np.isfinite(vectors.sentences).all():
        text = int(np.argmin(np.isfinite(vectors.sentences).all(1)))
        raise InputError(
            f"{whose} {ids[text] if len(ids) else text!r:.80}: the vector of the whole text has a number that is not "
            f"finite, so its scores would mean nothing. {remedy}"
        )


def candidates_of(candidates: int | None, default: int, where: str) -> int:
    """How many candidates there are to be.

    Raises:
        InputError: None could be found.
    """
    if candidates is None:
        return default
    if type(candidates) is not int or candidates < 1:
        raise InputError(f"{where}: candidates={candidates!r}, so nothing could be ranked. Pass 1 or more.")
    return candidates


def stages(
    origins: Mapping[str, Origin], queries: Queries | Mapping[str, Queries], k: int, where: str, most: int = 2
) -> list[tuple[Origin, Embeddings]]:
    """The stages of a search: one, or candidates and what ranks them anew.

    Raises:
        InputError: ``k`` is less than 1, the index is empty, a name is unknown or missing, there are more stages than
            ``most``, or queries do not fit the vectors of the index.
    """
    if k < 1:
        raise InputError(f"{where}: k={k}, so nothing could be found. Pass 1 or more.")
    if not origins:
        raise InputError(f"{where}: empty, so there is nothing to search in. Add shards first.")
    if not isinstance(queries, Mapping):
        if len(origins) > 1:
            raise InputError(
                f"{where}: has vectors of several kinds ({', '.join(origins)}), so say which the queries are for: "
                f"search({{{next(iter(origins))!r}: queries}})."
            )
        queries = {next(iter(origins)): queries}
    if not 1 <= len(queries) <= most or queries.keys() - origins.keys():
        raise InputError(
            f"{where}: asked for {', '.join(queries) or 'nothing'}; it has {', '.join(origins)}. Name one, or two of "
            "which the first finds candidates and the second ranks them; weights= sums the scores of any number."
        )
    found = [(origins[name], as_embeddings(asked, origins[name], where)) for name, asked in queries.items()]
    if len({len(asked) for _, asked in found}) > 1:
        raise InputError(f"{where}: the two stages have {' and '.join(str(len(a)) for _, a in found)} queries.")
    return found


def weighted_stages(
    origins: Mapping[str, Origin],
    queries: Queries | Mapping[str, Queries],
    k: int,
    where: str,
    weights: Mapping[str, float],
) -> list[tuple[Origin, Embeddings, float]]:
    """What a search by a weighted sum asks, and the weight of each; the first finds candidates.

    Raises:
        InputError: As :func:`stages`, and where weights cannot be used.
    """
    names = list(queries) if isinstance(queries, Mapping) else list(origins)
    refuse_unusable_weights(weights, names, where)
    found = stages(origins, queries, k, where, most=len(origins))
    return [(origin, asked, float(weights[origin.name])) for origin, asked in found]


def refuse_unusable_weights(weights: Mapping[str, float], names: Sequence[str], where: str) -> None:
    """Refuse weights that no sum could be made with.

    Args:
        weights: Name -> weight.
        names: What is summed.
        where: Who asks, for messages.

    Raises:
        InputError: A name has no weight or is unknown, a weight is not finite or below 0, or all are 0.
    """
    if unknown := [name for name in weights if name not in names]:
        raise InputError(
            f"{where}: weights[{unknown[0]!r}]={weights[unknown[0]]!r}: there are no scores of that name, only of "
            f"{', '.join(map(repr, names))}. Leave it out, or pass queries for it."
        )
    for name in names:
        if name not in weights:
            raise InputError(
                f"{where}: weights has no {name!r}, so its part of the sum is not known. Add it; 0 leaves it out."
            )
        value = weights[name]
        if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not 0 <= value < math.inf:
            raise InputError(f"{where}: weights[{name!r}]={value!r}: expected a number from 0 on, e.g. 0.3.")
    if not any(weights.values()):
        raise InputError(
            f"{where}: weights are all 0, so every document would have the score 0. Raise one, e.g. to 1."
        )


def tell_without_candidates(queries: int, total: int, names: Sequence[str], where: str) -> None:
    """Warn of queries for which the first of several kinds of vectors found nothing."""
    if queries:
        logger.warning(
            "%s: %d of %d queries share no word with any document by %r, so %s finds their candidates.",
            where,
            queries,
            total,
            names[0],
            " or ".join(map(repr, names[1:])) or "nothing",
        )


def by_document(search: Callable[[int], list[list[Hit]]], k: int, each: int) -> list[list[Hit]]:
    """The best ``k`` documents of each query, from an engine that finds positions, of which a document may have many.

    It is asked deeper until every query has ``k`` documents or there is no more to be found.

    Args:
        search: Gives for a depth the best positions of each query, as hits of their documents.
        k: Documents.
        each: Positions of a document, more or less; 1 unless documents are cut into windows.
    """
    depth = k * each
    while True:
        found = search(depth)
        best = [first_of_each(hits)[:k] for hits in found]
        if all(len(few) == k or len(hits) < depth for few, hits in zip(best, found, strict=True)):
            return best
        depth *= 2


def first_of_each(hits: Iterable[Hit]) -> list[Hit]:
    """Of each document the first hit."""
    found: dict[str, Hit] = {}
    for hit in hits:
        found.setdefault(hit.id, hit)
    return list(found.values())


def as_embeddings(queries: Queries, origin: Origin, where: str) -> Embeddings:
    """Queries in any of their forms as flat arrays in float32, checked against what they are to be compared with.

    Of documents that are prefixes of nested vectors, they are cut to the query vectors that go with these.

    Raises:
        InputError: Another kind or width, or a number that is not finite.
    """
    found = _flat(queries)
    if (found.kind, found.dim) != (origin.kind, origin.dim):
        raise InputError(
            f"{where}: queries are {found.kind} of width {found.dim}, its vectors {origin.name!r} {origin.kind} of "
            f"width {origin.dim}. Encode queries with the model that encoded the documents."
        )
    if not np.isfinite(found.values).all():
        raise InputError(f"{where}: a query has a number that is not finite, so no score would mean anything.")
    refuse_unfit_entries(found, origin, f"{where}: query")
    count = origin.nested[-1][0] if origin.nested else None
    if count is not None and len(found) and found.lengths.min() >= count:
        found = first_vectors(found, count)
    sentences = None if found.sentences is None else np.ascontiguousarray(found.sentences, np.float32)
    return replace(found, values=np.ascontiguousarray(found.values, np.float32), sentences=sentences)


def _flat(queries: Queries) -> Embeddings:
    if isinstance(queries, Embeddings):
        return queries
    if isinstance(queries, torch.Tensor) and queries.layout != torch.strided:
        matrix = queries.detach().cpu().float().to_sparse_coo().coalesce()
        rows, columns = matrix.indices().numpy()
        queries = csr_matrix((matrix.values().numpy(), (rows, columns)), shape=tuple(matrix.shape))
    if issparse(queries):
        queries = queries.tocsr(copy=True)
        queries.sum_duplicates()  # an engine is told of each word once
        offsets = queries.indptr.astype(np.int64)
        indices = queries.indices.astype(np.int32)
        return Embeddings("sparse", queries.data, offsets, indices, queries.shape[1], 0.0, Path())
    if isinstance(queries, list | tuple):
        parts = [_array(part) for part in queries]
        if parts and parts[0].ndim == 2:
            return in_memory(np.concatenate(parts), np.cumsum([0, *map(len, parts)], dtype=np.int64))
        queries = np.stack(parts) if parts else np.empty((0, 0), np.float32)
    array = _array(queries)
    if array.ndim != 2:
        raise InputError(
            f"queries of shape {array.shape}: expected (queries, dim), also for one query, or a list of "
            "(vectors, dim) for several vectors a query."
        )
    return in_memory(array)


def _array(part: Any) -> np.ndarray:
    return part.detach().cpu().float().numpy() if isinstance(part, torch.Tensor) else np.asarray(part)


def unique_ids(ids: Iterable[str]) -> list[str]:
    """Ids without doubles; a single text, whose letters would be taken for ids, is refused."""
    if isinstance(ids, str):
        raise InputError(f"delete({ids!r}): takes a list of ids, as there may be several: delete([{ids!r}]).")
    return list(dict.fromkeys(ids))


def whole_number(settings: dict[str, str], name: str, default: int, uri: str) -> int:
    """A positive setting of a URI, taken out of ``settings``.

    Raises:
        InputError: It is no whole number, or less than 1.
    """
    value = settings.pop(name, str(default))
    if not re.fullmatch(r"[0-9]+", value) or int(value) < 1:
        raise InputError(f"{uri}: {name}={value}: expected a whole number from 1 on.")
    return int(value)


def refuse_unknown(settings: dict[str, str], uri: str, known: str) -> None:
    """Refuse settings that nobody has taken.

    Raises:
        InputError: Names them, and what there is.
    """
    if settings:
        raise InputError(f"{uri}: unknown settings {', '.join(settings)}. There are {known}.")
