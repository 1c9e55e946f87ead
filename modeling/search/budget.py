"""A budget of vectors, chosen per query: the first of every document are searched, the rest is not looked at.

Vectors that can be cut say so by their groups (:mod:`polyrep.encoding.nested`). ``budget=8`` compares the first 8
vectors of each document with as many query vectors as go with them by the smallest group that holds 8; ``(4, 8)`` says
both. With ``first`` that smaller number finds candidates, which the budget, or without one all vectors, ranks anew.
Scores are those of an index that holds no other vectors: sums of the best product of each query vector, plain MaxSim.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

from ..encoding.embeddings import Embeddings
from ..encoding.nested import first_vectors, queries_for
from ..encoding.shards import Origin, Shard
from ..errors import InputError
from .protocol import Asked, Queries, stages


class BudgetError(InputError):
    """A budget at which these vectors cannot be searched."""


class Budget(NamedTuple):
    """How many vectors are compared: the first ``queries`` (None: all) of a query, and ``documents`` of a document."""

    queries: int | None
    documents: int


class Stage(NamedTuple):
    """One stage of a search.

    Attributes:
        origin: What is compared.
        queries: With what, cut to the budget.
        documents: The first so many vectors of each document; None for all.
    """

    origin: Origin
    queries: Embeddings
    documents: int | None = None


def budget_of(origin: Origin, asked: Asked, name: str, where: str) -> Budget:
    """What a budget means for vectors.

    Args:
        origin: The vectors.
        asked: Document vectors, or a pair of query vectors and these; None for all that there are.
        name: What the budget is called, for messages.
        where: Whose vectors they are, for messages.

    Raises:
        BudgetError: They are not nested, or there are not as many.
    """
    said = f"{where}: {name}={asked!r:.80}"
    if not origin.nested:
        raise BudgetError(f"{said}: {_why_not(origin)}, so it has no prefix to search. Leave {name} out.")
    full = Budget(*origin.nested[-1])
    if asked is None:
        return full
    paired = isinstance(asked, Sequence) and not isinstance(asked, str) and len(asked) == 2
    queries, documents = asked if paired else (None, asked)  # type: ignore[misc]
    if not isinstance(documents, int) or isinstance(documents, bool):
        raise BudgetError(
            f"{said}: expected a whole number of document vectors, e.g. 8, or a pair of query vectors and these, e.g. "
            "(4, 8)."
        )
    if not 1 <= documents <= full.documents:
        raise BudgetError(
            f"{said}: a document holds {full.documents} vectors; {documents} asked. Use 1 to {full.documents}."
        )
    if not paired:
        queries = queries_for(origin.nested, documents)
    elif full.queries is None and queries is not None:
        raise BudgetError(f"{said}: queries keep the vectors of all their tokens. Use {documents} alone.")
    elif full.queries is not None and (type(queries) is not int or not 1 <= queries <= full.queries):
        raise BudgetError(
            f"{said}: a query holds {full.queries} vectors; {queries!r:.80} asked. Use 1 to {full.queries}."
        )
    return Budget(queries, documents)


def budgets_of(origin: Origin, budget: Asked, first: Asked, where: str) -> list[Budget]:
    """What finds documents, and where ``first`` is given what ranks them anew.

    Args:
        origin: The vectors.
        budget: See :func:`budget_of`.
        first: Likewise, of the stage that finds candidates; None for a single stage.
        where: Whose vectors they are, for messages.

    Raises:
        BudgetError: One of them cannot be searched at, or the first has more vectors than what ranks.
    """
    if first is None:
        return [budget_of(origin, budget, "budget", where)]
    finds, ranks = budget_of(origin, first, "first", where), budget_of(origin, budget, "budget", where)
    if finds.documents > ranks.documents:
        raise BudgetError(
            f"{where}: first={first!r} has more vectors than budget={budget!r}, which ranks what it finds, so the "
            "better ranking would be lost. Exchange them."
        )
    return [finds, ranks]


def budgeted_stages(
    origins: Mapping[str, Origin],
    queries: Queries | Mapping[str, Queries],
    k: int,
    where: str,
    budget: Asked,
    first: Asked,
) -> list[Stage]:
    """The stages of a search: one, or candidates and what ranks them anew.

    Raises:
        InputError: As :func:`polyrep.search.protocol.stages`.
        BudgetError: The vectors cannot be searched at a budget, or a query has not as many as it wants.
    """
    asked_for = stages(origins, queries, k, where)
    if budget is None and first is None:
        return [Stage(*pair) for pair in asked_for]
    if len(asked_for) > 1:
        raise BudgetError(
            f"{where}: budget={budget!r}, first={first!r}: of one kind of vectors, and "
            f"{' and '.join(origin.name for origin, _ in asked_for)} are asked for. Name one, or leave them out."
        )
    ((origin, asked),) = asked_for
    found = []
    for one in budgets_of(origin, budget, first, where):
        if one.queries is not None and len(asked) and asked.lengths.min() < one.queries:
            raise BudgetError(
                f"{where}: a query has {asked.lengths.min()} vectors; {one.queries} go with {one.documents} of a "
                "document. Encode queries whole; they are cut here."
            )
        cut = asked if one.queries is None else first_vectors(asked, one.queries)
        found.append(Stage(origin, cut, None if one.documents == origin.nested[-1][1] else one.documents))
    return found


def refuse_budget(budget: Asked, first: Asked, where: str, why: str) -> None:
    """Refuse a budget where there can be none.

    Args:
        budget: None if it was not given.
        first: Likewise.
        where: Who refuses.
        why: The rest of the sentence, and what to do.

    Raises:
        BudgetError: One was given.
    """
    if budget is not None or first is not None:
        raise BudgetError(f"{where}: budget={budget!r:.80}, first={first!r:.80}, but {why}")


def said_budget(said: str, flag: str) -> Asked:
    """What a flag says of a budget: ``8``, ``4,8``, or nothing.

    Raises:
        BudgetError: It is of another form.
    """
    if not said:
        return None
    try:
        numbers = tuple(int(part) for part in said.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) not in (1, 2):
        raise BudgetError(f"{flag} {said}: expected document vectors, e.g. 8, or query vectors and these, e.g. 4,8.")
    return numbers if len(numbers) == 2 else numbers[0]


def cut_shards(shards: Iterable[Shard], budget: Asked) -> Iterator[Shard]:
    """Shards of the first vectors of each document alone, for an index that is to hold no more.

    It is then searched at this budget or a smaller one.

    Args:
        shards: Of an :class:`polyrep.encoding.EncodedCorpus`, say.
        budget: See :func:`budget_of`.

    Raises:
        BudgetError: The vectors have no such prefix.
    """
    return (_Cut(shard, budget_of(shard.origin, budget, "budget", "the corpus")) for shard in shards)


class _Cut(Shard):
    """A shard that is read once its content is asked for."""

    def __init__(self, shard: Shard, budget: Budget):
        last = budget.queries, budget.documents
        within = (one for one in shard.origin.nested if (one[0] or 0) <= (last[0] or 0) and one[1] <= last[1])
        origin = replace(shard.origin, nested=(*(one for one in within if one != last), last))
        self.__dict__ |= {"whole": shard, "origin": origin, "count": budget.documents, "checksum": shard.checksum}

    @property
    def ids(self) -> Sequence[str]:
        """See :class:`Shard`."""
        return self.__dict__["whole"].ids

    @cached_property
    def vectors(self) -> Embeddings:  # type: ignore[override]
        """See :class:`Shard`."""
        return first_vectors(self.__dict__["whole"].vectors, self.__dict__["count"])


def _why_not(origin: Origin) -> str:
    if origin.kind != "tokens":
        what = {"sentence": "one vector", "sparse": "weights of words"}.get(origin.kind, "entries under keys")
        return f"a document has {what} under {origin.name!r}"
    if origin.window:
        return (
            f"vectors {origin.name!r} are of windows of {origin.window} tokens, one window's behind the other's, of "
            "which the first would be those of the first window"
        )
    return (
        f"vectors {origin.name!r} are not nested by what their manifest says, as those of most models and those that "
        "were encoded before it said so"
    )
