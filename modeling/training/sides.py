"""The queries or the documents of a data set as a frozen backbone encodes them, cut into features of batches.

There is a class for each kind of cached vectors. It encodes texts, or maps the cache, refuses what no head could learn
from, and gives the features of any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from tqdm import tqdm

from ..encoding.cache import embed
from ..encoding.embeddings import Embeddings, in_memory, mean_of_tokens, rows, side_by_side, sum_of_tokens
from ..encoding.windows import Windows
from ..errors import InputError
from ..hub.polyrep_room import begin_words_of, prompt_tokens

Features = dict[str, Tensor]
"""Name -> tensor, whose first axis is that of the texts."""


@dataclass(frozen=True)
class Side:
    """One side of a data set, encoded.

    Attributes:
        embeddings: Of each text.
        first: Place of the first text among the texts of all data sets.
        same: ``(texts,)`` row of the first text that each equals, itself if there is none before; None if all differ.
    """

    embeddings: Embeddings
    first: int = 0
    same: np.ndarray | None = field(default=None, kw_only=True)

    @classmethod
    def encode(
        cls, model: Any, texts: Mapping[str, Any], task: Any, name: str, *, first: int = 0, **options: Any
    ) -> Self:
        """Encode texts, or map the cache.

        Args:
            model: The frozen backbone.
            texts: Id -> text, or where the backbone reads them, image.
            task: ``query`` or ``document``.
            name: Readable part of the cache's name.
            first: See the class.
            options: Those of the kind of vectors, and of :func:`polyrep.encoding.cache.embed`.

        Raises:
            InputError: Nothing could be learned from such vectors.
        """
        raise NotImplementedError

    def features(self, rows: np.ndarray) -> Features:
        """Features of some texts: what the class says, and ``index``, their places among those of all data sets.

        Equal texts have one place, so that none counts as a negative of itself.
        """
        return {**self.vectors_of(rows), "index": torch.from_numpy(self.places(rows))}

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Places of some texts among those of all data sets: of equal texts, that of the first."""
        return self.first + (rows if self.same is None else self.same[rows])

    def vectors_of(self, rows: np.ndarray) -> Features:
        """The same without their places."""
        raise NotImplementedError

    def single(self, task: str) -> Embeddings:
        """One vector a text, by which documents are near to a query."""
        raise NotImplementedError

    @property
    def has_images(self) -> bool:
        """Whether it is of images, which have no tokens."""
        return False

    def __len__(self) -> int:
        return len(self.embeddings)


@dataclass(frozen=True)
class SentenceSide(Side):
    """One vector a text or image, and the text's tokens.

    Its features are ``sentence_embedding (texts, dim)``, and of texts padded ``input_ids, attention_mask``.

    Attributes:
        tokens: ``(tokens of all texts,)`` token ids, special tokens included; None of images.
        offsets: ``(texts + 1,)`` bounds of each text's tokens; None of images.
    """

    tokens: np.ndarray | None = None
    offsets: np.ndarray | None = None

    @classmethod
    def encode(
        cls,
        model: SentenceTransformer,
        texts: Mapping[str, Any],
        task: Any,
        name: str,
        *,
        first: int = 0,
        tokenizer: Any = None,
        vectors: np.ndarray | None = None,
        windows: Windows | None = None,
        **options: Any,
    ) -> Self:
        """Encode and tokenise texts, or encode images; see :meth:`Side.encode`.

        With ``vectors (texts, dim)`` nothing is encoded, and with ``windows`` each window of a text is one. A
        ``tokenizer`` takes the place of the backbone's own, where a head uses another vocabulary.

        Raises:
            InputError: The backbone's similarity is neither dot nor cosine.
        """
        if vectors is not None:
            embeddings = in_memory(vectors)
        else:
            embeddings = embed(model, texts, task=task, name=name, kind="sentence", windows=windows, **options)
        similarity = str(model.similarity_fn_name)
        if similarity not in ("dot", "cosine"):
            raise InputError(
                f"{name}: the model scores by {similarity}, which no inner product of sparse vectors can follow. "
                "Use a model with dot or cosine similarity."
            )
        if similarity == "cosine":  # the inner product of unit vectors, so that everything after scores alike
            found = np.asarray(embeddings.values, np.float32)
            found = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
            embeddings = replace(embeddings, values=found.astype(embeddings.values.dtype))
        if not isinstance(texts, dict) or not isinstance(next(iter(texts.values())), str):  # images are opened late
            return cls(embeddings, first)
        if windows is None:
            return cls(embeddings, first, *_tokenized(model, list(texts.values()), task, tokenizer))
        cuts = [windows.cut(text) for text in texts.values()]
        tokens, offsets = _tokenized(model, list(chain.from_iterable(cuts)), task, tokenizer)
        if embeddings.windows is None:  # one vector for all windows of a text, and so are its tokens
            offsets = offsets[np.cumsum([0, *map(len, cuts)])]
        return cls(embeddings, first, tokens, offsets)

    def vectors_of(self, rows: np.ndarray) -> Features:
        """Vectors and tokens."""
        found = {"sentence_embedding": torch.from_numpy(self.embeddings.values[rows].astype(np.float32))}
        if self.tokens is None or self.offsets is None:
            return found
        lengths = np.diff(self.offsets)[rows]
        columns = np.arange(max(1, lengths.max(initial=1)))
        mask = columns < lengths[:, None]  # (texts, tokens)
        places = np.minimum(self.offsets[rows][:, None] + columns, max(0, len(self.tokens) - 1))
        ids = np.where(mask, self.tokens[places], 0)
        found["input_ids"] = torch.from_numpy(ids.astype(np.int64))
        found["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        return found

    def single(self, task: str) -> Embeddings:
        """The vectors."""
        return self.embeddings

    @property
    def has_images(self) -> bool:
        """Whether it is of images, which have no tokens."""
        return self.tokens is None


def _tokenized(
    model: SentenceTransformer, texts: list[str], task: str, tokenizer: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of texts without the words of a prompt: ``(tokens of all texts,)``, and bounds ``(texts + 1,)``."""
    prompt = (model.prompts or {}).get(task) or None
    begin = begin_words_of(model.tokenizer) if prompt and tokenizer is None else None
    rows, lengths = [], []
    for start in range(0, len(texts), 1024):
        part = texts[start : start + 1024]
        if tokenizer is None:
            batch = model.preprocess(part, prompt=prompt, task=task)
        else:
            batch = tokenizer(
                part, padding=True, truncation=True, max_length=model.max_seq_length, return_tensors="pt"
            )
        mask = batch["attention_mask"].bool()
        if "prompt_length" in batch:  # no words of the text; what stands before any text stays
            ids, special = batch["input_ids"], torch.tensor(model.tokenizer.all_special_ids)
            mask &= ~prompt_tokens(ids, mask, batch["prompt_length"], begin) | torch.isin(ids, special)
        rows.append(batch["input_ids"][mask].numpy().astype(np.int32))
        lengths.append(mask.sum(1).numpy())
    return np.concatenate(rows), np.cumsum(np.concatenate([[0], *lengths]))


@dataclass(frozen=True)
class TokenSide(Side):
    """Several vectors a text, of a late-interaction model.

    Its features are padded ``token_embeddings (texts, tokens, dim)`` and ``attention_mask``.
    """

    @classmethod
    def encode(
        cls, model: Any, texts: Mapping[str, Any], task: Any, name: str, *, first: int = 0, **options: Any
    ) -> Self:
        """See :meth:`Side.encode`.

        Raises:
            InputError: A text has no vector, or one that is not finite or is zero; names its id.
        """
        embeddings = embed(model, texts, task=task, name=name, kind="tokens", **options)
        _refuse_meaningless(embeddings, list(texts), f"{name}: {task}")
        return cls(embeddings, first)

    def vectors_of(self, rows: np.ndarray) -> Features:
        """Vectors under one another, zero where there are no more."""
        offsets = self.embeddings.offsets
        assert offsets is not None
        lengths = offsets[rows + 1] - offsets[rows]
        mask = np.arange(lengths.max(initial=1)) < lengths[:, None]  # (texts, tokens)
        starts = np.repeat(offsets[rows] - np.cumsum(lengths) + lengths, lengths)
        vectors = torch.zeros(*mask.shape, self.embeddings.dim)
        found = self.embeddings.values[starts + np.arange(lengths.sum())]
        vectors[torch.from_numpy(mask)] = torch.from_numpy(np.asarray(found, np.float32))
        return {"token_embeddings": vectors, "attention_mask": torch.from_numpy(mask)}

    def single(self, task: str) -> Embeddings:
        """Their sum for a query, their mean for a document: full late interaction would cost more than the fit."""
        return sum_of_tokens(self.embeddings) if task == "query" else mean_of_tokens(self.embeddings)


def _refuse_meaningless(embeddings: Embeddings, ids: list[str], subject: str) -> None:
    """InputError if a text has no token vector, or one without a direction."""
    assert embeddings.offsets is not None
    if not embeddings.lengths.all():
        raise InputError(
            f"{subject} {ids[int(np.argmin(embeddings.lengths))]!r} has no token that counts, so it cannot be scored. "
            "Remove it, or loosen the backbone's skiplist or keep_only_token_ids."
        )
    for start in range(0, len(embeddings.values), 2**18):  # 64 MiB at width 128, not the whole corpus
        lengths = np.linalg.norm(embeddings.values[start : start + 2**18].astype(np.float32), axis=1)
        bad = ~((lengths > 0) & np.isfinite(lengths))
        if bad.any():
            place = start + int(np.argmax(bad))
            text = int(np.searchsorted(embeddings.offsets, place, "right")) - 1
            raise InputError(
                f"{subject} {ids[text]!r} has a token vector of length {lengths[place - start]} in the cache "
                f"{embeddings.path}, so its pooled vector would mean nothing. Delete the cache to have it made again; "
                "if the error stays, the backbone is broken."
            )


@dataclass(frozen=True)
class LayerSide(Side):
    """One vector a layer of an encoder.

    Its features are ``layer_embeddings (texts, layers + 1, dim)``, the embeddings first.
    """

    @classmethod
    def encode(
        cls,
        model: Any,
        texts: Mapping[str, Any],
        task: Any,
        name: str,
        *,
        first: int = 0,
        token: str = "mean",
        **options: Any,
    ) -> Self:
        """See :meth:`Side.encode`; the first module of the backbone is the encoder.

        At each layer ``token`` stands for a text: the ``mean`` of all, or ``cls``, the first.
        """
        kind: Any = {"mean": "layers", "cls": "cls_layers"}[token]
        return cls(embed(model, texts, task=task, name=name, kind=kind, **options), first)

    def vectors_of(self, rows: np.ndarray) -> Features:
        """States at every layer."""
        return {"layer_embeddings": torch.from_numpy(self.embeddings.values[rows].astype(np.float32, copy=False))}

    def single(self, task: str) -> Embeddings:
        """The last layer."""
        return self.last()

    def last(self) -> Embeddings:
        """The last layer alone."""
        return replace(self.embeddings, kind="sentence", values=self.embeddings.values[:, -1])


STATES_BLOCK = 256
"""Texts whose token states are in memory at a time where all are read."""


@dataclass(frozen=True)
class StatesSide(Side):
    """Every token of a text at some layers of an encoder.

    Its features are padded ``token_states (texts, tokens, layers, dim)``, ``input_ids`` and ``attention_mask``.

    Attributes:
        token: What stands for a text where one vector is asked for: the ``mean`` of its tokens at the last layer that
            is kept, or its first (``cls``) or last (``lasttoken``) token there.
    """

    token: str = field(default="mean", kw_only=True)

    @classmethod
    def encode(
        cls,
        model: Any,
        texts: Mapping[str, Any],
        task: Any,
        name: str,
        *,
        first: int = 0,
        layers: Sequence[int] = (-1,),
        token: str = "mean",
        **options: Any,
    ) -> Self:
        """See :meth:`Side.encode`; the first module of the backbone is the encoder, and ``layers`` its hidden states.

        Raises:
            InputError: The encoder has no such layers, or a text no token; names its id.
        """
        embeddings = embed(model, texts, task=task, name=name, kind="states", layers=layers, **options)
        if not embeddings.lengths.all():
            empty = list(texts)[int(np.argmin(embeddings.lengths))]
            raise InputError(f"{name}: {task} {empty!r} has no token, so nothing is known of it. Remove it.")
        return cls(embeddings, first, token=token)

    def vectors_of(self, rows: np.ndarray) -> Features:
        """States under one another, zero where there are no more."""
        embeddings = self.embeddings
        assert embeddings.offsets is not None and embeddings.indices is not None
        places, bounds = side_by_side(embeddings.offsets, rows)
        lengths = np.diff(bounds)
        mask = torch.from_numpy(np.arange(lengths.max(initial=1)) < lengths[:, None])  # (texts, tokens)
        states = torch.zeros(*mask.shape, *embeddings.values.shape[1:])
        states[mask] = torch.from_numpy(np.asarray(embeddings.values[places], np.float32))
        ids = torch.zeros(mask.shape, dtype=torch.int64)
        ids[mask] = torch.from_numpy(np.asarray(embeddings.indices[places], np.int64))
        return {"token_states": states, "input_ids": ids, "attention_mask": mask.long()}

    def single(self, task: str) -> Embeddings:
        """One token, or the mean of all, at the last layer that is kept."""
        embeddings = self.embeddings
        assert embeddings.offsets is not None
        if self.token == "mean":
            last = replace(embeddings, kind="tokens", values=embeddings.values[:, -1], indices=None)
            blocks = np.split(np.arange(len(self)), range(STATES_BLOCK, len(self), STATES_BLOCK))
            sums = [sum_of_tokens(rows(last, block)).values for block in blocks]
            values = np.concatenate(sums) / embeddings.lengths[:, None]
        else:
            place = embeddings.offsets[:-1] if self.token == "cls" else embeddings.offsets[1:] - 1
            values = np.asarray(embeddings.values[place, -1], np.float32)
        return replace(embeddings, kind="sentence", values=values.astype(np.float32), offsets=None, indices=None)


KINDS: dict[str, type[Side]] = {
    "sentence": SentenceSide,
    "tokens": TokenSide,
    "layers": LayerSide,
    "states": StatesSide,
}
"""What a head learns from -> how it is encoded."""


_PADDED = ("input_ids", "attention_mask", "token_embeddings", "token_states", "judged")
"""Features whose second axis is as long as a text has tokens, or a query relevant documents."""


def concatenated(parts: list[Features]) -> Features:
    """Features of several parts under one another, padded to the longest text."""
    joined = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        if name in _PADDED:
            tensors = pad_tokens(tensors)
        joined[name] = torch.cat(tensors)
    return joined


def pad_tokens(tensors: list[Tensor]) -> list[Tensor]:
    """Pad the second axis, that of tokens, to the longest with zeros."""
    width = max(tensor.shape[1] for tensor in tensors)
    return [
        torch.nn.functional.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, width - tensor.shape[1]))
        for tensor in tensors
    ]


def encode_sparse(
    encode: Callable[[Features], Tensor], side: SentenceSide, *, show_progress: bool = True
) -> Embeddings:
    """Sparse vectors of cached texts, as :func:`polyrep.encoding.cache.embed` would give for the whole retriever.

    Args:
        encode: Turns features into word weights ``(texts, words)``.
        side: The texts.
        show_progress: Show a progress bar.

    Returns:
        Embeddings of kind ``sparse``, float16, in memory.
    """
    values, indices, counts, width = [], [], [np.zeros(1, np.int64)], 0
    with torch.inference_mode():
        for start in tqdm(range(0, len(side), 512), desc="sparse", unit="batch", disable=not show_progress):
            weights = encode(side.features(np.arange(start, min(start + 512, len(side))))).float().cpu().numpy()
            text_of, term = np.nonzero(weights)
            values.append(weights[text_of, term].astype(np.float16))
            indices.append(term.astype(np.int32))
            counts.append(np.bincount(text_of, minlength=len(weights)))
            width = weights.shape[1]
    offsets, windows = np.cumsum(np.concatenate(counts), dtype=np.int64), side.embeddings.windows
    return Embeddings("sparse", np.concatenate(values), offsets, np.concatenate(indices), width, 0.0, Path(), windows)
