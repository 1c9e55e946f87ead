"""Encode one chunk of texts or images with a model of any family, into flat arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sentence_transformers import MultiVectorEncoder, SparseEncoder
from sentence_transformers.util import batch_to_device
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..errors import InputError, refuse_no_text
from ..hub.folder import Encoder
from ..hub.polyrep_room import keep_states
from .embeddings import Embeddings, Kind, joined, rows


def kind_of(model: Encoder) -> Kind:
    """What a model of this family gives for a text."""
    if isinstance(model, MultiVectorEncoder):
        return "tokens"
    return "sparse" if isinstance(model, SparseEncoder) else "sentence"


class Encoded(NamedTuple):
    """Texts of a chunk as flat arrays, in their order.

    Attributes:
        values: The numbers.
        lengths: ``(texts,)`` rows of each text; None: one.
        indices: ``(rows,)`` what each row is: the term of a sparse vector, the key of a routed entry, the id of a
            token whose states are kept; else None.
        dim: Width of a vector.
        sentences: ``(texts, width)`` vectors of whole texts beside routed entries, where the model has them.
    """

    values: np.ndarray
    lengths: np.ndarray | None
    indices: np.ndarray | None
    dim: int
    sentences: np.ndarray | None = None

    def embeddings(self, kind: Kind) -> Embeddings:
        """The same as embeddings without a cache."""
        offsets = None if self.lengths is None else np.cumsum([0, *self.lengths], dtype=np.int64)
        indices = None if self.indices is None else self.indices.astype(np.int32)
        return Embeddings(kind, self.values, offsets, indices, self.dim, 0.0, Path(), sentences=self.sentences)


class Router(NamedTuple):
    """What gives the tokens of a text their keys.

    Attributes:
        config: Says ``vocab_size`` (keys), ``entry_dim`` and ``sentence_dim`` (widths) and ``clamp``.
        entries: Makes of a batch and a task what :func:`token_router_of` names.
    """

    config: Any
    entries: Callable[[dict[str, Any], str], dict[str, Any]]


def token_router_of(model: Any) -> Router | None:
    """What of a model routes its tokens to keys; None for most models.

    It is the model of the first module, if that has a method ``encode_routed(**tokens, task=...)``, which returns, as
    fields or by name, ``keys``, ``weights`` and ``mask``, each ``(batch, tokens, keys of a token)``, ``vectors (batch,
    tokens, dim)``, and ``sentence_embedding (batch, width)`` or None. Or it is a later module with a method ``route``,
    for vectors that are there, which leaves the same in a batch, but the last as ``dense``.
    """
    parts = list(model.children()) if isinstance(model, nn.Module) else []
    inner: Any = getattr(parts[0], "model", None) if parts else None
    if callable(getattr(inner, "encode_routed", None)):

        def asked(batch: dict[str, Any], task: str) -> dict[str, Any]:
            tokens = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
            output = inner.encode_routed(**tokens, task=task)
            names = (*_ENTRIES, "sentence_embedding")
            # A field of a ModelOutput may be called as one of its methods, keys.
            by_name = isinstance(output, dict) and not isinstance(output, ModelOutput)
            return {name: output.get(name) if by_name else getattr(output, name) for name in names}

        return Router(inner.config, asked)
    head: Any = next((part for part in parts if callable(getattr(part, "route", None))), None)
    if head is None:
        return None

    def left(batch: dict[str, Any], task: str) -> dict[str, Any]:
        output = model(batch, task=task)
        return {name: output[name] for name in _ENTRIES} | {"sentence_embedding": output.get("dense")}

    return Router(head.model.config, left)


_ENTRIES = ("keys", "weights", "mask", "vectors")


def encode_chunk(
    model: Encoder, texts: list[Any], task: str, kind: Kind, batch_size: int, layers: Sequence[int] | None = None
) -> Encoded:
    """Encode texts or images without a cache.

    Args:
        model: Any sentence-transformers model.
        texts: As many as fit into memory, encoded.
        task: ``query`` or ``document``.
        kind: What to keep.
        batch_size: Texts per forward pass.
        layers: For ``states``, the hidden states that are kept; see :func:`layers_of`.

    Returns:
        The texts in their order.

    Raises:
        InputError: The model does not give this kind, or for ``routed`` not what it says.
    """
    if kind == "states":
        return _encode_states(model, texts, task, batch_size, layers_of(model, layers))
    return _ENCODERS[kind](model, texts, task, batch_size)


def layers_of(model: Encoder, layers: Sequence[int] | None) -> list[int]:
    """Hidden states of a model's encoder by their places from the first: 0 is the embeddings.

    Args:
        model: Any sentence-transformers model whose first module is a transformer.
        layers: Places from either end: 12 or -1 is the last of twelve layers.

    Raises:
        InputError: None is named, one is named twice or is not there, or the model has no layers.
    """
    first: Any = model[0]
    depth = getattr(getattr(getattr(first, "model", None), "config", None), "num_hidden_layers", None)
    if not isinstance(depth, int):
        raise InputError(
            f"token states: begin with {type(first).__name__}, which has no layers to read them at. Use a model whose "
            "first module is a transformer."
        )
    wanted = list(layers or [])
    found = [layer % (depth + 1) for layer in wanted if -depth - 1 <= layer <= depth]
    if not wanted or len(set(found)) < len(wanted):
        raise InputError(
            f"token states: layers {wanted} of an encoder with {depth} layers. Name one or more, each once: 0 (the "
            f"embeddings) to {depth} (the last), or {-depth - 1} to -1."
        )
    return found


def prompt_of(model: Any, task: str) -> str | None:
    """What ``encode_query`` and ``encode_document`` put before a text."""
    prompts = model.prompts or {}
    names = ("query",) if task == "query" else ("document", "passage", "corpus")
    return next((prompts[name] for name in (*names, model.default_prompt_name) if name in prompts), None)


def _encode_call(model: Any, task: str) -> Any:
    return model.encode_query if task == "query" else model.encode_document


def _encode_sentence(model: Encoder, texts: list[str], task: str, batch_size: int) -> Encoded:
    values = _encode_call(model, task)(texts, batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True)
    return Encoded(values, None, None, values.shape[1])


def _encode_tokens(model: Encoder, texts: list[str], task: str, batch_size: int) -> Encoded:
    vectors = _encode_call(model, task)(texts, batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True)
    values = np.concatenate(vectors)
    return Encoded(values, np.array([len(v) for v in vectors]), None, values.shape[1])


def _encode_sparse(model: Encoder, texts: list[str], task: str, batch_size: int) -> Encoded:
    matrix = _encode_call(model, task)(
        texts, batch_size=batch_size, show_progress_bar=False, convert_to_sparse_tensor=True, save_to_cpu=True
    ).coalesce()  # (texts, vocabulary), sorted by text and then by term
    text_of, term = matrix.indices().numpy()
    counts = np.bincount(text_of, minlength=len(texts))
    return Encoded(matrix.values().float().numpy(), counts, term, matrix.shape[1])


@torch.inference_mode()
def _encode_routed(model: Encoder, texts: list[str], task: str, batch_size: int) -> Encoded:
    router = token_router_of(model)
    if router is None:
        raise InputError(
            f"kind 'routed': {type(model).__name__} has no router, by which its tokens would have keys. Use a model "
            "whose first module has encode_routed."
        )
    model.eval()
    prompt, order = prompt_of(model, task), sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    parts: list[Encoded] = []
    for start in range(0, len(texts), batch_size):
        batch = model.preprocess([texts[i] for i in order[start : start + batch_size]], prompt=prompt, task=task)
        batch = batch_to_device(batch, model.device)
        parts.append(_entries(router.entries(batch, task), router.config))
    blocks = [part.embeddings("routed") for part in parts]
    found = rows(joined(blocks), np.argsort(order))
    return Encoded(found.values, found.lengths, found.indices, found.dim, found.sentences)


def _entries(said: dict[str, Any], config: Any) -> Encoded:
    """What a router says of a batch as entries: the vector of each token, by its weight, for each of its keys."""
    mask, vectors, whole = said["mask"].bool(), said["vectors"], said["sentence_embedding"]
    text, token, place = mask.nonzero(as_tuple=True)  # (entries,) each
    keys = said["keys"][text, token, place].cpu().numpy()
    if len(keys) and not 0 <= int(keys.min()) <= int(keys.max()) < config.vocab_size:
        raise InputError(
            f"the router: gives keys from {keys.min()} to {keys.max()}, but vocab_size={config.vocab_size} in its "
            "config, so no list would hold them. Correct the config."
        )
    values = said["weights"][text, token, place].float()[:, None] * vectors[text, token].float()
    widths = values.shape[1], 0 if whole is None else whole.shape[1]
    if widths != (config.entry_dim, config.sentence_dim):
        raise InputError(
            f"the router: gives vectors of widths {widths} for tokens and for whole texts, but entry_dim="
            f"{config.entry_dim} and sentence_dim={config.sentence_dim} in its config, so an index would be made for "
            "others. Correct the config."
        )
    lengths = text.bincount(minlength=len(mask)).cpu().numpy()
    sentences = None if whole is None else whole.float().cpu().numpy()
    return Encoded(values.cpu().numpy(), lengths, keys, config.entry_dim, sentences)


def _hidden_states(
    model: Encoder, texts: list[str], order: Sequence[int], task: str, batch_size: int
) -> Iterator[tuple[dict[str, torch.Tensor], Any]]:
    """What the encoder reads and gives, its hidden states among it, of some texts at a time in some order."""
    transformer: Any = model[0].eval()
    keep_states(transformer.model)
    prompt = model.prompts.get(task) or None
    for start in range(0, len(texts), batch_size):
        batch = model.preprocess([texts[i] for i in order[start : start + batch_size]], prompt=prompt, task=task)
        inputs = {k: v.to(model.device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
        accepted = {k: inputs[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in inputs}
        yield inputs, transformer.model(**accepted, output_hidden_states=True)
    keep_states(transformer.model)


@torch.inference_mode()
def _encode_layers(model: Encoder, texts: list[str], task: str, batch_size: int, cls: bool = False) -> Encoded:
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    pooled: list[torch.Tensor] = []
    for inputs, output in _hidden_states(model, texts, order, task, batch_size):
        states = torch.stack(output.hidden_states, dim=1)
        mask = inputs["attention_mask"]
        if cls:
            layers = states[torch.arange(len(mask)), :, mask.int().argmax(1)]
        else:
            weights = mask[:, None, :, None].to(states.dtype)  # (batch, 1, tokens, 1)
            layers = (states * weights).sum(2, dtype=torch.float32) / weights.sum(2, dtype=torch.float32).clamp(min=1)
        pooled.append(layers.float().cpu())  # (batch, layers + 1, dim)
    values = torch.cat(pooled)[torch.tensor(np.argsort(order))].numpy()
    return Encoded(values, None, None, values.shape[2])


@torch.inference_mode()
def _encode_states(model: Encoder, texts: list[str], task: str, batch_size: int, layers: list[int]) -> Encoded:
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    states: list[np.ndarray] = []  # of each text, (tokens, layers, dim)
    tokens: list[np.ndarray] = []
    for inputs, output in _hidden_states(model, texts, order, task, batch_size):
        # The last is what the encoder returns: some bring it to a norm of its own once more.
        last = len(output.hidden_states) - 1
        kept = [output.last_hidden_state if layer == last else output.hidden_states[layer] for layer in layers]
        mask = inputs["attention_mask"].bool()
        counts: list[int] = mask.sum(1).tolist()
        states += [part.float().cpu().numpy() for part in torch.stack(kept, 2)[mask].split(counts)]
        tokens += [part.cpu().numpy() for part in inputs["input_ids"][mask].split(counts)]
    back = np.argsort(order)
    values = np.concatenate([states[place] for place in back])
    lengths = np.array([len(states[place]) for place in back])
    return Encoded(values, lengths, np.concatenate([tokens[place] for place in back]), values.shape[2])


_ENCODERS: dict[str, Any] = {
    "sentence": _encode_sentence,
    "tokens": _encode_tokens,
    "sparse": _encode_sparse,
    "routed": _encode_routed,
    "layers": _encode_layers,
    "cls_layers": partial(_encode_layers, cls=True),
}


@torch.inference_mode()
def uncertainty_of(model: Encoder, queries: Sequence[str], batch_size: int = 16) -> np.ndarray | None:
    """How unsure a model is of what queries mean, by a part of it whose output has ``uncertainty``; None without one.

    Args:
        model: Any sentence-transformers model.
        queries: Their texts.
        batch_size: Texts per forward pass.

    Returns:
        ``(queries,)`` in the model's own unit.
    """
    said: list[torch.Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        value = output.get("uncertainty") if isinstance(output, ModelOutput) else None
        if value is not None:
            said.append(value.float().cpu())

    hooks = [part.register_forward_hook(keep) for part in model.modules() if isinstance(part, PreTrainedModel)]
    prompt, found = model.prompts.get("query") or None, []
    try:
        model.eval()
        for start in range(0, len(queries), batch_size):
            said.clear()
            batch = model.preprocess(list(queries[start : start + batch_size]), prompt=prompt, task="query")
            model(batch_to_device(batch, model.device), task="query")
            if not said:
                return None
            found.append(said[-1].numpy())  # (texts of the batch,)
    finally:
        for hook in hooks:
            hook.remove()
    return np.concatenate(found) if found else None


def refuse_broken_prompts(model: Encoder) -> None:
    """Refuse a model with a prompt that no tokenizer reads."""
    for name, prompt in (model.prompts or {}).items():
        refuse_no_text(prompt or "", f"the model's prompt {name!r}")


def refuse_not_finite_vectors(values: np.ndarray, lengths: np.ndarray | None, ids: Sequence[str], dtype: str) -> None:
    """Refuse vectors in ``dtype`` of which a number is not finite, by the id of the text."""
    rows = ~np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
    if rows.any():
        text = (
            int(np.argmax(rows))
            if lengths is None
            else int(np.searchsorted(np.cumsum(lengths), np.argmax(rows), "right"))
        )
        raise InputError(
            f"{ids[text]!r}: its vector is not finite in {dtype}, so every score with it would be meaningless. "
            "If its numbers exceed 65,504, use float32; else the model is broken."
        )
