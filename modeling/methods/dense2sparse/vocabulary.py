"""A head over the words of another model, for backbones whose tokens are no words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ...hub.folder import fetch
from ...hub.reading import give_padding
from ...hub.weights import check_sizes
from .modeling_dense2sparse import Dense2SparseModel


def head_from_words(
    words: str, backbone: SentenceTransformer, **config: Any
) -> tuple[Dense2SparseModel, PreTrainedTokenizerBase]:
    """An untrained head for a backbone, on the word embeddings and with the vocabulary of another model.

    Args:
        words: Folder or Hub id of that model.
        backbone: Whose vectors the head reads.
        config: Fields of Dense2SparseConfig.

    Returns:
        The head, and the tokenizer of its words.

    Raises:
        InputError: The model lacks weights.
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
    folder = str(fetch(words))
    check_sizes(Path(folder), whole=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    give_padding(tokenizer, words)
    options: dict[str, Any] = {"foreign_words": True, "added_tokens": added} | config
    return Dense2SparseModel.from_mlm(folder, dim, tokenizer, **options), tokenizer
