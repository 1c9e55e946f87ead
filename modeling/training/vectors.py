"""Both sides of a data set, encoded, or the vectors that it brings, in the space of the model that will read them."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from ..data.dataset import RetrievalDataset
from ..errors import InputError
from ..registry import room_of
from .sides import KINDS, SentenceSide, Side


def encode_dataset(
    model: Any,
    dataset: RetrievalDataset,
    *,
    kind: Literal["sentence", "tokens", "layers", "states"] = "sentence",
    images: Any = None,
    first: tuple[int, int] = (0, 0),
    **options: Any,
) -> tuple[Side, Side]:
    """Encode both sides of a data set, or take the vectors that it brings.

    Args:
        model: The frozen backbone.
        dataset: The data set.
        kind: What the head reads, see :class:`~polyrep.training.pairs.HeadData`.
        images: Encodes the documents where the backbone cannot.
        first: Places of the first query and document, see :class:`~polyrep.training.sides.Side`.
        options: Those of the encoding.

    Returns:
        Queries and documents.

    Raises:
        InputError: Vectors have another width than the encoder's, or a caption of an image holds no known word.
    """
    sides = []
    for task, encoder, texts, name, place in (
        ("query", model, dataset.queries, f"{dataset.name}-{dataset.split}", first[0]),
        ("document", images or model, dataset.corpus, dataset.name, first[1]),
    ):
        given = _given_vectors(dataset, task, model, images)
        more = options if given is None else {**options, "vectors": given}
        sides.append(KINDS[kind].encode(encoder, texts, task, name, first=place, **more))
    queries, documents = sides
    if documents.has_images:
        _refuse_wordless(dataset, queries, options.get("tokenizer") or model.tokenizer)
    return queries, documents


def _given_vectors(dataset: RetrievalDataset, side: str, model: Any, images: Any) -> np.ndarray | None:
    """What a data set brings for a side, in the space of its encoder; None where it brings nothing."""
    vectors = dataset.vectors.get(side)
    if vectors is None:
        return None
    of_images = images is not None and side == "document"
    widths = [(images if of_images else model).get_embedding_dimension()]
    tower = _tower_of(model) if images is None and side == "document" and "query" not in dataset.vectors else None
    if tower is not None:  # images that come without vectors of their captions are features of the vision encoder
        if tower.config.image_dim == widths[0]:
            raise InputError(
                f"{dataset.name}: vectors of width {widths[0]} may be the vision tower's features or already mapped. "
                "Bring the captions' vectors too, if they are."
            )
        if vectors.shape[1] == tower.config.image_dim:
            return _mapped(vectors, tower)
        widths.append(tower.config.image_dim)
    if vectors.shape[1] not in widths:
        raise InputError(
            f"{dataset.name}: its {side} vectors have width {vectors.shape[1]}, but the encoder gives "
            f"{' or '.join(map(str, widths))}, so they come from another. Name the one that made them with "
            f"{'--vision' if of_images else '--backbone'}."
        )
    if of_images:
        return vectors
    # As the encoder's own would be: of unit length, by which they are compared.
    lengths = np.linalg.norm(vectors.astype(np.float32), axis=1, keepdims=True)
    if not lengths.all():
        raise InputError(
            f"{dataset.name}: {side} vector {int(lengths.argmin())} of the split is zero, so it has no direction to "
            "compare. Make it again, or remove its image."
        )
    return (vectors / lengths).astype(np.float16)


def _tower_of(model: Any) -> Any:
    """What maps features of a vision encoder into the space of a backbone that joins one; None for any other."""
    inner = getattr(model[0], "model", None)
    room = room_of(getattr(getattr(inner, "config", None), "model_type", None))
    return getattr(inner, "head", None) if room and room.joins_vision else None


def _mapped(features: np.ndarray, tower: Any) -> np.ndarray:
    """``(images, image_dim)`` features of a vision encoder, in the space of the model that joins it."""
    with torch.inference_mode():
        parts = [
            tower(torch.from_numpy(part.astype(np.float32)).to(tower.device, tower.dtype), "image")
            for part in np.array_split(features, -(-len(features) // 2048))
        ]
    return torch.cat([part.sentence_embedding.float().cpu() for part in parts]).numpy().astype(np.float16)


def _refuse_wordless(dataset: RetrievalDataset, captions: Side, tokenizer: Any) -> None:
    """Images are found by the words of their captions alone, so each needs one."""
    assert isinstance(captions, SentenceSide) and captions.tokens is not None and captions.offsets is not None
    known = ~np.isin(captions.tokens, tokenizer.all_special_ids)
    words = np.diff(np.concatenate([[0], np.cumsum(known)])[captions.offsets])
    if not words.all():
        caption = list(dataset.queries)[int(words.argmin())]
        raise InputError(
            f"{dataset.name}: caption {caption!r} ({dataset.queries[caption]!r}) holds no word of the vocabulary, so "
            "nothing could find its image by it. Remove it or write it in the tokenizer's language."
        )
