"""Queries or documents of a data set as a frozen backbone encodes them, cut into features of batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from torch import Tensor
from tqdm import tqdm

from ..data.dataset import RetrievalDataset
from ..encoding.cache import embed
from ..encoding.embeddings import Embeddings, in_memory
from ..errors import InputError

Features = dict[str, Tensor]


@dataclass(frozen=True)
class Side:
    """The queries or the documents of one data set, encoded.

    Attributes:
        embeddings: One vector a text or image.
        tokens: ``(tokens of all texts,)`` token ids, special tokens included; None of images.
        offsets: ``(texts + 1,)`` bounds of each text's tokens; None of images.
        first: Place of the first text among the texts of all data sets.
    """

    embeddings: Embeddings
    tokens: np.ndarray | None
    offsets: np.ndarray | None
    first: int = 0

    def features(self, rows: np.ndarray) -> Features:
        """Features of some items: ``sentence_embedding``, ``index``; of texts padded ``input_ids, attention_mask``."""
        if self.tokens is None or self.offsets is None:
            return {
                "sentence_embedding": torch.from_numpy(self.embeddings.values[rows].astype(np.float32)),
                "index": torch.from_numpy(self.first + rows),
            }
        lengths = np.diff(self.offsets)[rows]
        columns = np.arange(max(1, lengths.max(initial=1)))
        mask = columns < lengths[:, None]  # (texts, tokens)
        places = np.minimum(self.offsets[rows][:, None] + columns, max(0, len(self.tokens) - 1))
        ids = np.where(mask, self.tokens[places], 0)
        return {
            "sentence_embedding": torch.from_numpy(self.embeddings.values[rows].astype(np.float32)),
            "input_ids": torch.from_numpy(ids.astype(np.int64)),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
            "index": torch.from_numpy(self.first + rows),
        }

    def __len__(self) -> int:
        return len(self.embeddings)


def encode_side(
    model: SentenceTransformer,
    texts: dict[str, str],
    task: Any,
    name: str,
    *,
    first: int = 0,
    tokenizer: Any = None,
    vectors: np.ndarray | None = None,
    **options: Any,
) -> Side:
    """Encode and tokenise texts, or encode images.

    Args:
        model: The frozen backbone.
        texts: Id -> text or image.
        task: ``query`` or ``document``.
        name: Readable part of the cache's name.
        first: See :class:`Side`.
        tokenizer: Takes the place of the backbone's own where a head uses another vocabulary.
        vectors: ``(texts, width)``; with these nothing is encoded.
        options: Those of :func:`polyrep.encoding.cache.embed`.

    Raises:
        InputError: The backbone's similarity is neither dot nor cosine.
    """
    if vectors is not None:
        embeddings = in_memory(vectors)
    else:
        embeddings = embed(model, texts, task=task, name=name, kind="sentence", **options)
    prompt = (model.prompts or {}).get(task) or None
    similarity = str(model.similarity_fn_name)
    if similarity not in ("dot", "cosine"):
        raise InputError(
            f"{name}: the model scores by {similarity}, which no inner product of sparse vectors can follow. "
            "Use a model with dot or cosine similarity."
        )
    if similarity == "cosine":  # the inner product of unit vectors, so that everything after scores alike
        vectors = np.asarray(embeddings.values, np.float32)
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        embeddings = replace(embeddings, values=vectors.astype(embeddings.values.dtype))
    if not (isinstance(texts, dict) and isinstance(next(iter(texts.values())), str)):  # images are opened late
        return Side(embeddings, None, None, first)
    rows, lengths, content = [], [], list(texts.values())
    for start in range(0, len(content), 1024):
        part = content[start : start + 1024]
        if tokenizer is None:
            batch = model.preprocess(part, prompt=prompt, task=task)
        else:
            batch = tokenizer(
                part, padding=True, truncation=True, max_length=model.max_seq_length, return_tensors="pt"
            )
        mask = batch["attention_mask"].bool()
        mask[:, : int(torch.as_tensor(batch.get("prompt_length", 0)).max())] = False  # no words of the text
        rows.append(batch["input_ids"][mask].numpy().astype(np.int32))
        lengths.append(mask.sum(1).numpy())
    return Side(embeddings, np.concatenate(rows), np.cumsum(np.concatenate([[0], *lengths])), first)


@dataclass(frozen=True)
class TokenSide:
    """The queries or the documents of one data set as a late-interaction model encodes them.

    Attributes:
        embeddings: Several vectors a text.
        first: Place of the first text among the texts of all data sets.
    """

    embeddings: Embeddings
    first: int = 0

    def features(self, rows: np.ndarray) -> Features:
        """Features of some texts: padded ``token_embeddings (texts, tokens, dim), attention_mask``, and ``index``."""
        offsets = self.embeddings.offsets
        assert offsets is not None
        lengths = offsets[rows + 1] - offsets[rows]
        mask = np.arange(lengths.max(initial=1)) < lengths[:, None]  # (texts, tokens)
        starts = np.repeat(offsets[rows] - np.cumsum(lengths) + lengths, lengths)
        vectors = torch.zeros(*mask.shape, self.embeddings.dim)
        found = self.embeddings.values[starts + np.arange(lengths.sum())]
        vectors[torch.from_numpy(mask)] = torch.from_numpy(np.asarray(found, np.float32))
        return {
            "token_embeddings": vectors,
            "attention_mask": torch.from_numpy(mask),
            "index": torch.from_numpy(self.first + rows),
        }

    def __len__(self) -> int:
        return len(self.embeddings)


def encode_tokens(
    model: MultiVectorEncoder, texts: dict[str, str], task: Any, name: str, *, first: int = 0, **options: Any
) -> TokenSide:
    """Encode texts into token vectors.

    Args:
        model: The frozen backbone.
        texts: Id -> text.
        task: ``query`` or ``document``.
        name: Readable part of the cache's name.
        first: See :class:`TokenSide`.
        options: Those of :func:`polyrep.encoding.cache.embed`.

    Raises:
        InputError: A text has no vector, or one that is not finite or is zero; names its id.
    """
    embeddings = embed(model, texts, task=task, name=name, kind="tokens", **options)
    assert embeddings.offsets is not None
    ids = list(texts)
    if not embeddings.lengths.all():
        raise InputError(
            f"{name}: {task} {ids[int(np.argmin(embeddings.lengths))]!r} has no token that counts, so it cannot be "
            "scored. Remove it, or loosen the backbone's skiplist or keep_only_token_ids."
        )
    for start in range(0, len(embeddings.values), 2**18):  # 64 MiB at width 128, not the whole corpus
        lengths = np.linalg.norm(embeddings.values[start : start + 2**18].astype(np.float32), axis=1)
        bad = ~((lengths > 0) & np.isfinite(lengths))
        if bad.any():
            place = start + int(np.argmax(bad))
            text = int(np.searchsorted(embeddings.offsets, place, "right")) - 1
            raise InputError(
                f"{name}: {task} {ids[text]!r} has a token vector of length {lengths[place - start]} in the cache "
                f"{embeddings.path}, so its pooled vector would mean nothing. Delete the cache to have it made again; "
                "if the error stays, the backbone is broken."
            )
    return TokenSide(embeddings, first)


@dataclass(frozen=True)
class LayerSide:
    """The queries or the documents of one data set at every layer of an encoder.

    Attributes:
        embeddings: One vector a layer.
        first: Place of the first text among the texts of all data sets.
    """

    embeddings: Embeddings
    first: int = 0

    def features(self, rows: np.ndarray) -> Features:
        """Features of some texts: ``layer_embeddings (texts, layers + 1, dim)``, embeddings first, and ``index``."""
        return {
            "layer_embeddings": torch.from_numpy(self.embeddings.values[rows].astype(np.float32, copy=False)),
            "index": torch.from_numpy(self.first + rows),
        }

    def last(self) -> Embeddings:
        """The last layer alone."""
        return replace(self.embeddings, kind="sentence", values=self.embeddings.values[:, -1])

    def __len__(self) -> int:
        return len(self.embeddings)


def encode_layers(
    model: SentenceTransformer,
    texts: dict[str, str],
    task: Any,
    name: str,
    *,
    first: int = 0,
    token: str = "mean",
    **options: Any,
) -> LayerSide:
    """Encode texts into their state at every layer.

    Args:
        model: The frozen backbone, whose first module is the encoder.
        texts: Id -> text.
        task: ``query`` or ``document``.
        name: Readable part of the cache's name.
        first: See :class:`LayerSide`.
        token: ``mean`` of a text's tokens, or ``cls`` for the first.
        options: Those of :func:`polyrep.encoding.cache.embed`.
    """
    kind: Any = {"mean": "layers", "cls": "cls_layers"}[token]
    return LayerSide(embed(model, texts, task=task, name=name, kind=kind, **options), first)


def encode_dataset(
    model: Any,
    dataset: RetrievalDataset,
    *,
    kind: Literal["sentence", "tokens", "layers"] = "sentence",
    images: Any = None,
    first: tuple[int, int] = (0, 0),
    **options: Any,
) -> tuple[Any, Any]:
    """Encode both sides of a data set, or take the vectors that it brings.

    Args:
        model: The frozen backbone.
        dataset: The data set.
        kind: What the head reads, see :class:`HeadData`.
        images: Encodes the documents where the backbone cannot.
        first: Places of the first query and document, see :class:`Side`.
        options: Those of the encoding.

    Returns:
        Queries and documents, each a Side, TokenSide or LayerSide.

    Raises:
        InputError: Vectors have another width than the encoder's, or a caption of an image holds no known word.
    """
    encode: Any = {"sentence": encode_side, "tokens": encode_tokens, "layers": encode_layers}[kind]
    sides = []
    for side, encoder, texts, name, place in (
        ("query", model, dataset.queries, f"{dataset.name}-{dataset.split}", first[0]),
        ("document", images or model, dataset.corpus, dataset.name, first[1]),
    ):
        given = _given_vectors(dataset, side, model, images)
        more = options if given is None else {**options, "vectors": given}
        sides.append(encode(encoder, texts, side, name, first=place, **more))
    queries, documents = sides
    if is_of_images(documents):
        _refuse_wordless(dataset, queries, options.get("tokenizer") or model.tokenizer)
    return queries, documents


def is_of_images(side: Any) -> bool:
    """Whether a side holds images, which have no tokens."""
    return isinstance(side, Side) and side.tokens is None


def _given_vectors(dataset: RetrievalDataset, side: str, model: Any, images: Any) -> np.ndarray | None:
    """What a data set brings for a side, in the space of ``model`` (of ``images``, for documents); None for nothing.

    Images that come without vectors of their captions are features of the vision tower, if they have its width.
    """
    vectors = dataset.vectors.get(side)
    if vectors is None:
        return None
    encoder = images if images is not None and side == "document" else model
    widths = [encoder.get_embedding_dimension()]
    tower = getattr(getattr(model[0], "model", None), "head", None)
    if images is None and side == "document" and "query" not in dataset.vectors and tower is not None:
        if tower.config.image_dim == widths[0]:
            raise InputError(
                f"{dataset.name}: vectors of width {widths[0]} may be the vision tower's features or already mapped. "
                "Bring the captions' vectors too, if they are."
            )
        if vectors.shape[1] == tower.config.image_dim:
            with torch.inference_mode():
                parts = [
                    tower(torch.from_numpy(part.astype(np.float32)).to(tower.device, tower.dtype), "image")
                    for part in np.array_split(vectors, -(-len(vectors) // 2048))
                ]
            return torch.cat([part.sentence_embedding.float().cpu() for part in parts]).numpy().astype(np.float16)
        widths.append(tower.config.image_dim)
    if vectors.shape[1] not in widths:
        flag = "--vision" if images is not None and side == "document" else "--backbone"
        raise InputError(
            f"{dataset.name}: its {side} vectors have width {vectors.shape[1]}, but the encoder gives "
            f"{' or '.join(map(str, widths))}, so they come from another. Name the one that made them with {flag}."
        )
    if images is not None and side == "document":
        return vectors
    # As the encoder's own would be: of unit length, by which they are compared.
    lengths = np.linalg.norm(vectors.astype(np.float32), axis=1, keepdims=True)
    if not lengths.all():
        raise InputError(
            f"{dataset.name}: {side} vector {int(lengths.argmin())} of the split is zero, so it has no direction to "
            "compare. Make it again, or remove its image."
        )
    return (vectors / lengths).astype(np.float16)


def _refuse_wordless(dataset: RetrievalDataset, captions: Side, tokenizer: Any) -> None:
    """Images are found by the words of their captions alone, so each needs one."""
    assert captions.tokens is not None and captions.offsets is not None
    known = ~np.isin(captions.tokens, tokenizer.all_special_ids)
    words = np.diff(np.concatenate([[0], np.cumsum(known)])[captions.offsets])
    if not words.all():
        caption = list(dataset.queries)[int(words.argmin())]
        raise InputError(
            f"{dataset.name}: caption {caption!r} ({dataset.queries[caption]!r}) holds no word of the vocabulary, so "
            "nothing could find its image by it. Remove it or write it in the tokenizer's language."
        )


def encode_sparse(encode: Callable[[Features], Tensor], side: Side, *, show_progress: bool = True) -> Embeddings:
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
    offsets = np.cumsum(np.concatenate(counts), dtype=np.int64)
    return Embeddings("sparse", np.concatenate(values), offsets, np.concatenate(indices), width, 0.0, Path())
