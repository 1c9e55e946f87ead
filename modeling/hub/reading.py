"""How a model reads texts: as many tokens as say something and as it has positions for, and side by side."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import InputError
from ..files import read_json

logger = logging.getLogger(__name__)

_TABLES = ("position_embeddings", "position_embedding", "wpe", "embed_positions")
"""What encoders call their table of positions."""


def ready_to_read(model: Any, folder: Path, source: str) -> None:
    """Hold a model that was just opened to its positions, and let its tokenizer pad.

    Args:
        model: A sentence-transformers model.
        folder: Where it comes from.
        source: What the user calls it.

    Raises:
        InputError: It says that it reads more than it has positions for, or has no token to pad with.
    """
    give_padding(model.tokenizer, source)
    positions, length = positions_of(model), getattr(model, "max_seq_length", None)
    if length is not None and not (isinstance(length, int | float) and length > 0):
        raise InputError(
            f"{source}: says that it reads {length!r:.80} tokens of a text, which is no number. Write one as "
            "max_seq_length into its sentence_bert_config.json, or as model_max_length into tokenizer_config.json."
        )
    if positions is None or length is not None and length <= positions:
        return
    if length in [read_json(file).get("max_seq_length") for file in folder.rglob("sentence_bert_config.json")]:
        raise InputError(
            f"{source}: says that it reads {length} tokens of a text, but has positions for {positions}, so a longer "
            f"text would stop it midway. Write {positions} as max_seq_length into its sentence_bert_config.json."
        )
    model.max_seq_length = positions  # what a tokenizer says is of other models too


def give_padding(tokenizer: Any, source: str) -> None:
    """Have a tokenizer without a padding token pad with its end of text, which the attention mask leaves out.

    Raises:
        InputError: It has no end of text either.
    """
    if getattr(tokenizer, "pad_token", "") is not None:
        return
    if tokenizer.eos_token is None:
        raise InputError(
            f"{source}: its tokenizer has no token to pad with, so texts of different lengths could not be read "
            "together. Set `tokenizer.pad_token` to one of its tokens and save it again."
        )
    tokenizer.pad_token = tokenizer.eos_token
    logger.warning("%s: its tokenizer has no padding token, so it pads with %r.", source, tokenizer.eos_token)


def set_length(model: Any, length: int | None, source: str) -> None:
    """Have a model read so many tokens of a text; None for its own length.

    Args:
        model: A sentence-transformers model.
        length: Tokens, special ones included.
        source: What the user calls the model.

    Raises:
        InputError: It has no maximal length, no positions for as many, or nothing of a text would be left.
    """
    if length is None:
        return
    if model.max_seq_length in (None, math.inf):
        raise InputError(f"{source}: has no maximal length, so --max_length {length} means nothing. Leave it out.")
    check_length(model, length, source)
    model.max_seq_length = length


def check_length(model: Any, length: int, source: str) -> None:
    """InputError if a model cannot read texts of so many tokens; see :func:`set_length`."""
    added = getattr(model.tokenizer, "num_special_tokens_to_add", int)()
    if length <= added:
        raise InputError(
            f"--max_length {length}: {source} adds {added} tokens to each text, so nothing of the text would be left. "
            f"Use {added + 1} or more."
        )
    positions = positions_of(model)
    if positions is not None and length > positions:
        raise InputError(
            f"--max_length {length}: {source} has positions for {positions} tokens, so a longer text would stop it "
            f"midway. Use {positions} or less."
        )


def positions_of(model: Any) -> int | None:
    """:func:`positions_in` the encoder of a sentence-transformers model."""
    encoder = getattr(model[0], "model", None)
    return positions_in(encoder) if isinstance(encoder, nn.Module) else None


def positions_in(encoder: Any) -> int | None:
    """Most tokens of a text that an encoder has learned positions for; None where positions are computed."""
    counts = []
    for name, part in encoder.named_modules():
        of_images = "vision" in name or "visual" in name or "image" in name
        if name.rpartition(".")[2] in _TABLES and isinstance(part, nn.Embedding) and not of_images:
            # RoBERTa counts from behind the position of padding, OPT and BART from an offset.
            first = 0 if part.padding_idx is None else part.padding_idx + 1
            counts.append(part.num_embeddings - int(getattr(part, "offset", first)))
    if counts and encoder.config.model_type.startswith("polyrep_"):  # which may add a token of its own
        stated = getattr(encoder.config, "max_position_embeddings", None)
        counts += [stated] if isinstance(stated, int) and stated > 0 else []
    return min(counts, default=None)
