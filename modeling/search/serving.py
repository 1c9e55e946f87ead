"""A model and its index behind a server: texts of requests that arrive while the model is busy are encoded together.

This part knows no web framework; docs/serving.md puts FastAPI in front of it.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch

from ..encoding.views import encode_views, views_of, weights_of_views
from ..errors import InputError
from ..hub.fingerprint import told
from .budget import budgets_of, refuse_budget
from .probability import Searcher
from .protocol import Asked, Hit, Index, refuse_unusable_weights

Task = Literal["query", "document"]
_Receive = Callable[[], Awaitable[dict[str, Any]]]
_Send = Callable[[dict[str, Any]], Awaitable[None]]


class Busy(Exception):
    """More texts wait than may: the client should come back."""


class _Plan(NamedTuple):
    """At which budget is searched; see :class:`polyrep.search.Index`."""

    budget: int | tuple[int | None, ...] | None = None
    first: int | tuple[int | None, ...] | None = None


_WHOLE = _Plan()


class _Job(NamedTuple):
    task: str  # search, query or document
    text: str
    k: int
    plan: _Plan
    answer: asyncio.Future[Any]


class Service:
    """Answers to concurrent requests, computed by one worker in batches: ``async with Service(...) as service``.

    Args:
        model: What :func:`polyrep.load` opens.
        index: Where to search.
        fingerprint: :func:`polyrep.hub.fingerprint` of the model.
        batch_texts: Texts that are answered together at most.
        waiting_texts: Texts that may wait; of a request that would exceed it, none is taken.
        weights: Name -> weight, for an index that holds several views of the model, whose scores are summed; default:
            what the model says of them.

    Raises:
        InputError: The model cannot encode texts, its calibration is damaged or another model's, the index holds
            vectors of another model, or a number or a weight cannot be used.
    """

    def __init__(
        self,
        model: Any,
        index: Index,
        *,
        fingerprint: str,
        batch_texts: int = 64,
        waiting_texts: int = 1024,
        weights: Mapping[str, float] | None = None,
    ):
        if batch_texts < 1 or waiting_texts < 1:
            raise InputError(
                f"batch_texts={batch_texts}, waiting_texts={waiting_texts}: no request could be answered. Use 1 or "
                "more."
            )
        if not hasattr(model, "encode_query"):
            raise InputError(
                f"{type(model).__name__}: a head alone, which reads vectors, so texts cannot be encoded. Serve the "
                "folder in which it stands behind its encoder."
            )
        for origin in index.origins.values():
            if origin.fingerprint != fingerprint:
                raise InputError(
                    f"the index: its vectors {origin.name!r} were made by model {told(origin.fingerprint)}, not by "
                    f"{told(fingerprint)}, so scores would mean nothing. Encode the corpus with the model served."
                )
        self._model, self._index, self._fingerprint = model, index, fingerprint
        names = list(index.origins)
        if weights is not None:
            refuse_unusable_weights(weights, [name for name in views_of(model) if name in names], "the service")
        self._weights = weights_of_views(model, names, "the index") if weights is None else dict(weights)
        # An index of one view need not be of the one that the model gives by itself.
        self._view = "" if self._weights else next((name for name in views_of(model) if names == [name]), "")
        self._searcher = Searcher(model, index, fingerprint)
        self._batch_texts, self._batches = batch_texts, 0
        # Texts of a forward pass, which sorts them by length: of more, a processor computes mostly padding.
        self._together = 8 if torch.device(getattr(model, "device", "cpu")).type == "cpu" else batch_texts
        self._queue: asyncio.Queue[_Job] = asyncio.Queue(waiting_texts)

    async def __aenter__(self) -> Service:
        gc.freeze()  # what is there now stays, and a pass over its million objects stops all answers for 0.3 s
        self._worker = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._worker.cancel()

    def health(self) -> dict[str, Any]:
        """What the service is, and how busy: fingerprint, documents, ready, batches so far, texts that wait."""
        return {
            "fingerprint": self._fingerprint,
            "documents": self._index.count(),
            "ready": bool(self._index.origins) and not self._worker.done(),
            "batches": self._batches,
            "waiting": self._queue.qsize(),
        }

    async def search(
        self, queries: list[str], k: int, *, budget: Asked = None, first: Asked = None
    ) -> list[list[Hit]]:
        """The best ``k`` documents of each query, with probabilities where the model's folder has a calibration.

        Args:
            queries: Texts.
            k: How many documents.
            budget: Of nested vectors, how many are compared; see :class:`polyrep.search.Index`. Texts that come with
                others are encoded together with them, and searched by themselves.
            first: Likewise, what finds the candidates that ``budget`` ranks.

        Raises:
            Busy: Too many texts wait.
            InputError: ``k`` is below 1.
            BudgetError: The index cannot be searched at this budget.
        """
        if k < 1:
            raise InputError(f"k={k}: asks for no document. Use 1 or more.")
        if budget is not None or first is not None:
            if self._weights or len(self._index.origins) != 1:
                refuse_budget(budget, first, "the index", "it holds no or several kinds of vectors. Leave it out.")
            budgets_of(next(iter(self._index.origins.values())), budget, first, "the index")
        plan = _Plan(_hashable(budget), _hashable(first))
        return [hits[:k] for hits in await self._answers("search", queries, k, plan)]

    async def encode(self, texts: list[str], task: Task) -> list[Any]:
        """What each text becomes, as plain numbers.

        Returns:
            A vector as ``[...]``, several as ``[[...], ...]``, a sparse one as
            ``{"indices": [...], "values": [...]}``.

        Raises:
            Busy: Too many texts wait.
        """
        return await self._answers(task, texts, 0)

    async def _answers(self, task: str, texts: list[str], k: int, plan: _Plan = _WHOLE) -> list[Any]:
        if self._queue.qsize() + len(texts) > self._queue.maxsize:
            raise Busy(f"{self._queue.qsize()} texts wait, {len(texts)} more are too many")
        loop = asyncio.get_running_loop()
        jobs = [_Job(task, text, k, plan, loop.create_future()) for text in texts]
        for job in jobs:
            self._queue.put_nowait(job)
        return await asyncio.gather(*(job.answer for job in jobs))

    async def _work(self) -> None:
        while True:
            jobs = [await self._queue.get()]
            while not self._queue.empty() and len(jobs) < self._batch_texts:
                jobs.append(self._queue.get_nowait())
            for task in dict.fromkeys(job.task for job in jobs):
                await self._settle([job for job in jobs if job.task == task])

    async def _settle(self, jobs: list[_Job]) -> None:
        """Answer jobs of one task, but not those whose client has gone."""
        jobs = [job for job in jobs if not job.answer.done()]
        vectors = await self._tried(jobs, self._encode)
        if vectors is None and len(jobs) > 1:
            for job in jobs:  # one by one, so that a text which cannot be encoded fails its own request alone
                await self._settle([job])
        elif vectors is not None:
            for plan in dict.fromkeys(job.plan for job in jobs):
                places = [place for place, job in enumerate(jobs) if job.plan == plan]
                some, theirs = jobs, vectors
                if len(places) < len(jobs):  # then vectors are nested, a matrix for each text
                    some, theirs = [jobs[place] for place in places], [vectors[place] for place in places]
                answers = await self._tried(some, self._finish, theirs)
                for job, answer in zip(some, answers or (), strict=False):
                    if not job.answer.done():
                        job.answer.set_result(answer)

    async def _tried(self, jobs: list[_Job], call: Callable[..., Any], *more: Any) -> Any:
        """Call in a thread; after an error None, and it is the answer unless jobs can be tried one by one."""
        try:
            return await asyncio.to_thread(call, jobs, *more) if jobs else None
        except Exception as error:
            if len(jobs) == 1 or more:
                for job in jobs:
                    if not job.answer.done():
                        job.answer.set_exception(error)
            return None

    def _encode(self, jobs: list[_Job]) -> Any:
        self._batches += 1
        names = list(self._weights) or [self._view]
        if names != [""] and jobs[0].task == "search":
            texts = [job.text for job in jobs]
            found = encode_views(self._model, texts, names, task="query", batch_size=self._together)
            return found if self._weights else found[self._view]
        encode = self._model.encode_document if jobs[0].task == "document" else self._model.encode_query
        return encode([job.text for job in jobs], batch_size=self._together, show_progress_bar=False)

    def _finish(self, jobs: list[_Job], vectors: Any) -> list[Any]:
        if jobs[0].task == "search" and self._weights:
            return self._index.search(vectors, max(job.k for job in jobs), weights=self._weights)
        if jobs[0].task == "search":
            texts, k, plan = [job.text for job in jobs], max(job.k for job in jobs), jobs[0].plan
            return self._searcher.search(texts, vectors, k, budget=plan.budget, first=plan.first)
        return [_numbers(vector) for vector in vectors]


class Deadline:
    """An ASGI application in which a request whose body does not arrive in time is refused with 408.

    Otherwise clients that send half a request and stay would keep what is waiting for the other half, and the server
    from ending. ASGI alone is needed: ``app.add_middleware(Deadline)`` in FastAPI and Starlette.

    Args:
        app: Another one.
        seconds: From the end of the header to the end of the body.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], seconds: float = 10.0):
        self._app, self._seconds = app, seconds

    async def __call__(self, scope: dict[str, Any], receive: _Receive, send: _Send) -> None:
        """See the specification of ASGI."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        limit, whole, late = asyncio.get_running_loop().time() + self._seconds, False, False

        async def received() -> dict[str, Any]:
            nonlocal whole, late
            if whole:  # what comes now is that the client goes, however long that takes
                return await receive()
            try:
                async with asyncio.timeout_at(limit):
                    message = await receive()
            except TimeoutError:
                message, late = {"type": "http.disconnect"}, True
            whole = not message.get("more_body", False)
            return message

        async def answered(message: dict[str, Any]) -> None:
            if not late:  # else the application speaks of a client that has gone
                await send(message)

        try:
            await self._app(scope, received, answered)
        except Exception:
            if not late:
                raise
        if late:
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": 408, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"detail": "the body came too slowly"}'})


def _hashable(asked: Asked) -> int | tuple[int | None, ...] | None:
    """A budget that was refused if it is no number and no pair."""
    return tuple(asked) if isinstance(asked, Sequence) else asked


def _numbers(vector: Any) -> Any:
    if isinstance(vector, torch.Tensor) and vector.layout != torch.strided:
        vector = vector.to_sparse_coo().coalesce()
        return {"indices": vector.indices()[0].tolist(), "values": vector.values().tolist()}
    return vector.tolist()
