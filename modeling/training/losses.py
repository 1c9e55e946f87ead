"""Parts of contrastive objectives, which hold when a batch is spread over processes."""

from __future__ import annotations

import math
from typing import Any

import torch
from sentence_transformers.base.model import BaseModel
from sentence_transformers.util import all_gather_with_grad, get_rank, get_world_size
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..search.scoring import packed_maxsim
from .sides import Features, pad_tokens


def gather(documents: Tensor) -> Tensor:
    """Documents of all processes, in rank order, with gradients to each: ``(batch, ...)`` to ``(world * batch, ...)``.

    Every process must pass the same shape. With one process this is the identity. Gradients of the processes are
    averaged afterwards, so the result equals one process with the whole batch.
    """
    gathered = all_gather_with_grad(documents)
    if gathered.requires_grad and get_world_size() > 1:  # gloo reads the memory of a transposed gradient as it lies
        gathered.register_hook(lambda gradient: gradient.contiguous())
    return gathered


def in_batch_labels(batch: int, device: torch.device | str, columns: int = 1) -> Tensor:
    """Place of each local query's own document among the gathered ones: ``(batch,)``.

    A process gathers its own documents first, then those of further columns, each as long: ``columns`` in all.
    """
    return torch.arange(batch, device=device) + get_rank() * batch * columns


def scored_lists(own: Tensor, columns: int, labels: Tensor | None) -> dict[str, Tensor]:
    """``lists`` and ``teacher`` of a batch of a whole model, if its labels are a teacher's scores of each document.

    Args:
        own: ``(batch,)`` see :func:`in_batch_labels`.
        columns: Of documents: the own ones, and hard negatives.
        labels: ``(batch, columns)`` scores, as sentence-transformers' own distillation losses take them.
    """
    if labels is None or labels.ndim != 2 or labels.shape[1] != columns:
        return {}
    lists = own[:, None] + len(own) * torch.arange(columns, device=own.device)  # (batch, columns) rows of documents
    return {"lists": lists, "teacher": labels}


def judged_relevant(features: list[dict[str, Tensor]]) -> Tensor:
    """``(queries, documents of all processes)`` True for what is relevant, in a batch of HeadData with labels."""
    index = gather(features[1]["index"])
    return (features[0]["judged"][..., None] == index + 1).any(1)


def info_nce(scores: Tensor, own: Tensor, asked: Tensor, candidates: Tensor, known: Tensor | None = None) -> Tensor:
    """Cross entropy of each row's own candidate, where the same item elsewhere among the candidates is left out.

    Args:
        scores: ``(batch, candidates)``.
        own: ``(batch,)`` column of each row's own candidate.
        asked: ``(batch,)`` the item that each row belongs to.
        candidates: ``(candidates,)`` the item that each column is.
        known: ``(batch, candidates)`` True for what else is no negative of a row, see :func:`judged_relevant`.
    """
    same = candidates[None] == asked[:, None]
    if known is not None:
        same |= known
    same[torch.arange(len(own)), own] = False
    return F.cross_entropy(scores.masked_fill(same, -math.inf), own)


TAUGHT = ("order", "scores")
"""What of a teacher's scores :func:`taught` follows."""


def taught(scores: Tensor, teacher: Tensor, follow: str = "order") -> Tensor:
    """Distillation of a teacher's scores of some documents of each query: mean over queries.

    By order, mistakes at the top of the student's ranking cost most (Zamani and Bendersky 2023, section 3.4): the sum
    over pairs with teacher(d) > teacher(d') of ``|1/rank(d) - 1/rank(d')| log(1 + exp(s(d') - s(d)))``. By scores, it
    is the divergence of the student's softmax from the teacher's, both at temperature 1 (ColBERTv2), which suits
    teachers whose scores are logits.

    Args:
        scores: ``(queries, documents)`` of the student, already divided by the temperature.
        teacher: ``(queries, documents)``.
        follow: One of :data:`TAUGHT`.
    """
    if follow == "scores":
        return F.kl_div(scores.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)
    order = scores.detach().argsort(1, descending=True)
    ranks = torch.empty_like(scores).scatter_(
        1, order, torch.arange(1.0, scores.shape[1] + 1).to(scores).expand_as(scores)
    )
    gain = (1 / ranks[:, :, None] - 1 / ranks[:, None]).abs()  # (queries, better, worse)
    pairs = F.softplus(scores[:, None] - scores[:, :, None])
    return (gain * pairs * (teacher[:, :, None] > teacher[:, None])).sum((1, 2)).mean()


def refuse_unknown_teaching(weight: float, follow: str) -> None:
    """InputError if a weight of :func:`taught` is none, or there is no such way to follow a teacher."""
    if not 0 <= weight < math.inf:
        raise InputError(f"--distill_weight {weight}: below 0 it would teach the opposite. Use 0 or more.")
    if follow not in TAUGHT:
        raise InputError(f"--distill {follow!r}: unknown. Use one of {', '.join(TAUGHT)}.")


def refuse_untaught(weight: float, teacher: Tensor | None) -> Tensor:
    """The teacher's scores; InputError if there are none to learn from."""
    if teacher is None:
        raise InputError(
            f"--distill_weight {weight}: the data has no teacher's scores. Name a --teacher with --hard_negatives (of "
            "a head: --negatives), or use a table with negatives and a column `scores`."
        )
    return teacher


def product_dtype(device: torch.device) -> torch.dtype:
    """What ``--bf16`` or ``--fp16`` asks products to be in; float32 without."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


def gather_tokens(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Padded vectors of all processes, whose longest texts differ: ``(world * batch, tokens, dim)`` and their mask."""
    if get_world_size() > 1:
        width = torch.tensor(tokens.shape[1], device=tokens.device)
        torch.distributed.all_reduce(width, torch.distributed.ReduceOp.MAX)
        widest = torch.empty(0, int(width), device=tokens.device)
        tokens, mask = pad_tokens([tokens, widest[..., None]])[0], pad_tokens([mask.float(), widest])[0]
        tokens, mask = gather(tokens), gather(mask) > 0
    return tokens, mask


def first_places(index: Tensor) -> tuple[Tensor, Tensor]:
    """First place of each different entry, in order, and for every entry the number of the place that is its own."""
    same = index[:, None] == index[None]  # (entries, entries)
    first = same.float().argmax(1)
    columns = (first == torch.arange(len(index), device=index.device)).nonzero()[:, 0]
    return columns, torch.searchsorted(columns, first)


def maxsim_taught(queries: Features, documents: Features, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What a head over token vectors is to score: MaxSim over all of them, of the queries of all processes.

    Queries travel between processes, being short, and scores come back.

    Args:
        queries: Of this process, of a :class:`~polyrep.training.sides.TokenSide`.
        documents: Likewise.
        dtype: Of the products.

    Returns:
        ``(queries, different documents)`` MaxSim for each query vector, rows of these among the documents of all
        processes, and ``(queries, 1)`` vectors of each query.
    """
    columns, _ = first_places(gather(documents["index"]))
    with torch.no_grad():
        tokens, mask = gather_tokens(queries["token_embeddings"], queries["attention_mask"])
        mine = packed_maxsim(
            tokens.to(dtype), documents["token_embeddings"].to(dtype), mask, documents["attention_mask"]
        )
        # Rows, then transposed: of what is not contiguous, torch's all_gather mixes up the entries.
        counts = mask.sum(1, keepdim=True)
        return gather(mine.T.contiguous())[columns].T / counts, columns, counts


def divergence(scores: Tensor, teacher: Tensor) -> Tensor:
    """How far scores of documents are from those of a teacher, of queries over documents and the other way round.

    The mean of both KL divergences of softmaxes, each a mean over its rows.

    Args:
        scores: ``(queries, documents)``.
        teacher: ``(queries, documents)``.
    """

    def of_rows(scores: Tensor, teacher: Tensor) -> Tensor:
        return F.kl_div(scores.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)

    return (of_rows(scores, teacher) + of_rows(scores.T, teacher.T)) / 2


def refuse_single(documents: Tensor) -> None:
    """InputError if there is no second document to tell a query's own from."""
    if len(documents) < 2:
        raise InputError(
            "a batch of one pair without hard negatives has nothing to tell the document from, so nothing would be "
            "learned. Use --per_device_train_batch_size 2 or more, or --hard_negatives."
        )


def row_uniform(batch: int, *shape: int, seed: int, step: int, device: torch.device | str = "cpu") -> Tensor:
    """Uniform draws in [0, 1) for this process's rows of a step: ``(batch, *shape)``.

    They follow from seed, step and the row's place in the whole batch, never from the rank, so several processes draw
    what one with the whole batch would.
    """
    generator = torch.Generator().manual_seed(hash((seed, step)) % 2**63)
    everyone = torch.rand(get_world_size() * batch, *shape, generator=generator)
    return everyone[get_rank() * batch : (get_rank() + 1) * batch].to(device)


def learned_scale(scale: nn.Parameter) -> nn.Parameter:
    """The same parameter, with the mean gradient of all processes: the trainer of a model shares only the model's."""
    if scale.requires_grad and get_world_size() > 1:
        scale.register_hook(lambda g: gather(g[None]).detach().mean())
    return scale


def unwrapped(model: Any) -> BaseModel:
    """The sentence-transformers model inside what several processes or a compiler put around it."""
    while not isinstance(model, BaseModel):
        model = model.module if hasattr(model, "module") else model._orig_mod
    return model
