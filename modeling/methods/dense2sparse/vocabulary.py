"""A head over the words of another model, for backbones whose tokens are no words."""

from __future__ import annotations

from typing import Any

from sentence_transformers import SentenceTransformer

from .modeling_dense2sparse import Dense2SparseModel


def head_from_words(words: str, tokenizer: Any, backbone: SentenceTransformer, **config: Any) -> Dense2SparseModel:
    """An untrained head for a backbone, on the word embeddings and with the vocabulary of another model.

    Args:
        words: Folder of that model.
        tokenizer: Its own.
        backbone: Whose vectors the head reads.
        config: Fields of Dense2SparseConfig.

    Raises:
        ValueError: Own tokens are asked for: only the backbone's tokenizer sees a text when it is encoded.
    """
    if config.get("own_tokens") != "none":
        raise ValueError(
            f"--vocabulary {words}: with another vocabulary than the backbone's, own tokens are not known when a text "
            "is encoded. Add --own_tokens none."
        )
    added = backbone.tokenizer.num_special_tokens_to_add()
    dim = backbone.get_embedding_dimension()
    assert dim
    return Dense2SparseModel.from_mlm(words, dim, tokenizer, foreign_words=True, added_tokens=added, **config)
