"""An index that is measured as its users search it: with what it lost to quantization, graphs and cut lists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np

from ..data.dataset import RetrievalDataset
from ..errors import InputError
from ..search.backends import BACKENDS, open_index
from ..search.commands import Asker, SearchArguments, find, open_models, refuse_no_uri, weights_of
from ..search.protocol import Index
from ..search.ranking import deeper
from .hybrid import filled
from .metrics import DEEPEST
from .systems import DEPTH, Ranking


class Flags(Protocol):
    """What of a command's flags is read here."""

    index_model: str
    index_weights: str
    hybrid: bool
    window: int | None
    max_length: int | None
    revision: str | None
    trust_remote_code: bool
    model_dtype: str


def is_index(source: str) -> bool:
    """Whether a name is the URI of an index rather than a model."""
    return source.partition(":")[0] in BACKENDS and ":" in source


def refuse_unfit_indexes(
    args: Flags, uris: Sequence[str], datasets: Sequence[RetrievalDataset], benchmarks: bool
) -> None:
    """Refuse what indexes cannot do, before anything is encoded or searched.

    Args:
        args: The flags of a command.
        uris: The indexes that it names.
        datasets: What they are measured on.
        benchmarks: Whether MTEB is to be run.

    Raises:
        InputError: A flag is of an index, and there is none; one cannot be asked for what a flag says; it or what
            makes vectors of queries cannot be opened; or it holds more or fewer documents than its data set.
    """
    if not uris:
        for flag, given in (("index_model", args.index_model != "minilm"), ("index_weights", args.index_weights)):
            if given:
                raise InputError(
                    f"--{flag} {getattr(args, flag)}: of an index, and no MODEL is the URI of one. Name one, e.g. "
                    "qdrant:///path, or leave it out."
                )
        return
    if len(datasets) > 1:
        raise InputError(
            f"{uris[0]}: an index holds the documents of one data set, and --dataset names {len(datasets)}. Name its "
            "own."
        )
    unfit = {
        "mteb": benchmarks,
        "hybrid": args.hybrid,
        "window": args.window is not None,
        "max_length": args.max_length is not None,
    }
    for flag, given in unfit.items():
        if given:
            raise InputError(
                f"--{flag}: has no part in an index such as {uris[0]}, which is searched as it is. Leave it out."
            )
    for uri in uris:
        with opened(uri, open_askers(uri, args), datasets[0]):
            pass  # it is closed again, since only one process and one handle may hold some


def open_askers(uri: str, args: Flags) -> list[Asker]:
    """What makes vectors of queries for an index.

    Raises:
        InputError: It cannot be opened, or the index is one that no other command can have filled.
    """
    refuse_no_uri(uri)
    return open_models(_search(uri, args, 1))


@contextmanager
def opened(uri: str, askers: list[Asker], dataset: RetrievalDataset) -> Iterator[Index]:
    """An index of the documents of a data set, which is let go of afterwards.

    Raises:
        InputError: It cannot be opened, another model made it, or it holds more or fewer documents.
    """
    target = open_index(uri, fingerprint=askers[0].fingerprint)
    try:
        if target.count() != len(dataset.corpus):
            raise InputError(
                f"{uri}: holds {target.count():,} documents, {dataset.name} has {len(dataset.corpus):,}, so what is "
                "found could not be judged. Name the data set that was indexed, or index the rest."
            )
        yield target
    finally:
        getattr(target, "close", lambda: None)()  # of those that hold a folder or a connection


def rank_with_index(
    uri: str, target: Index, askers: list[Asker], dataset: RetrievalDataset, args: Flags, depth: int = 1
) -> Ranking:
    """Search an index for every query of a split, as ``polyrep search`` does.

    Args:
        uri: The index, by which its row is called.
        target: What :func:`opened` gives.
        askers: What makes vectors of queries.
        dataset: Whose documents the index holds.
        args: The flags of a command.
        depth: Documents of a query that are needed, :data:`polyrep.evaluation.systems.DEPTH` at most; as many as
            metrics look at are asked for at least.

    Raises:
        InputError: The index cannot be searched, or holds other documents.
    """
    wanted = min(max(depth, DEEPEST), DEPTH, len(dataset.corpus))
    k = min(deeper(wanted, dataset.own), len(dataset.corpus))
    found = find(target, askers, list(dataset.queries.values()), _search(uri, args, k))
    place = {identifier: number for number, identifier in enumerate(dataset.corpus)}
    inverted = _is_inverted(target, askers[0], args)
    best = []
    for hits, own in zip(found, dataset.own.tolist(), strict=True):
        # An inverted index finds no document that shares no word with the query; some fill their list with these.
        hits = [hit for hit in hits if (hit.score or not inverted) and place.get(hit.id) != own][:wanted]
        if stranger := next((hit.id for hit in hits if hit.id not in place), None):
            raise InputError(
                f"{uri}: has document {stranger!r}, which is none of {dataset.name}, so rankings of two corpora would "
                "be compared. Name the data set that was indexed."
            )
        best.append((np.array([place[hit.id] for hit in hits], np.int64), np.array([hit.score for hit in hits])))
    positions, scores = filled(best, len(place))
    return Ranking(uri, positions, scores)


def _is_inverted(target: Index, asker: Asker, args: Flags) -> bool:
    """Whether only vectors are searched under whose terms a document has to be to be found."""
    if args.index_weights:
        names = weights_of(args.index_weights).keys() & target.origins.keys()
    else:
        names = {name for name, origin in target.origins.items() if asker.made(origin)}
    return bool(names) and {target.origins[name].kind for name in names} <= {"sparse", "routed"}


def _search(uri: str, args: Flags, k: int) -> SearchArguments:
    return SearchArguments(
        uri=uri,
        model=args.index_model,
        weights=args.index_weights,
        k=k,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
        model_dtype=args.model_dtype,
    )
