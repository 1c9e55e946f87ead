"""Long documents in windows: a model reads so many tokens of a text and drops the rest, so the rest is read apart.

A window is a piece of the text itself, which the model then reads like any other text: prompt and special tokens come
to each. It is cut where a word ends; a word longer than half a window, or writing without spaces, is cut between
tokens, but no character is. A piece may have other tokens than the whole text has there, so each is counted by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from ..errors import InputError
from ..hub.folder import Encoder


@dataclass(frozen=True)
class Windows:
    """How documents are cut; :meth:`of` makes it for a model.

    Attributes:
        tokens: Most tokens of the text in a window; what the model adds to each text comes on top.
        stride: Tokens from the start of a window to the start of the next; fewer than ``tokens`` and they overlap.
        tokenizer: The model's own, which says where in a text its tokens stand.
    """

    tokens: int
    stride: int
    tokenizer: Tokenizer = field(repr=False)

    @classmethod
    def of(cls, model: Encoder, tokens: int | None, stride: int | None, source: str) -> Windows | None:
        """The windows that ``--window`` and ``--stride`` ask for; None without the former.

        Args:
            model: The model that reads them, with its length as it is going to be.
            tokens: See the class.
            stride: See the class; None for ``tokens``, no overlap.
            source: What the user calls the model.

        Raises:
            InputError: A stride without a window or out of its range, a window that the model cannot read whole, or
                a model without a tokenizer that says where its tokens stand.
        """
        refuse_stride(tokens, stride)
        if tokens is None:
            return None
        found = getattr(model.tokenizer, "backend_tokenizer", model.tokenizer)
        if not isinstance(found, Tokenizer):
            raise InputError(
                f"--window {tokens}: {source} has no tokenizer that says where in a text its tokens stand (a fast one "
                "of the package tokenizers), so nothing can be cut at them. Leave it out."
            )
        room = room_for_text(model)
        if tokens > room:
            raise InputError(
                f"--window {tokens}: {source} reads {room} tokens of a text beside those that it adds, so the end of "
                f"each window would be dropped. Use {room} or less."
            )
        tokenizer = Tokenizer.from_str(found.to_str())  # a copy, since the model's own is set to truncate
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokens, stride or tokens, tokenizer)

    @property
    def key(self) -> dict[str, int]:
        """What of it vectors depend on beside the model; ``cut`` is raised once the same settings cut otherwise."""
        return {"tokens": self.tokens, "stride": self.stride, "cut": 2}

    def cut(self, text: str) -> list[str]:
        """The windows of a text in their order; a text that fits into one is its only window, as it is."""
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        count = len(encoded)
        if count <= self.tokens:
            return [text]
        words, places = encoded.word_ids, [*encoded.offsets, (len(text), len(text))]
        # Tokens before which nothing is divided: no character, of which there may be several, and better no word.
        whole = [i == count or i == 0 or places[i][0] >= places[i - 1][1] for i in range(count + 1)]
        begins = [
            whole[i] and (i in (0, count) or words[i] is None or words[i] != words[i - 1]) for i in range(count + 1)
        ]

        def place_at(token: int, first: int, least: int) -> int:
            """The last begin of a word after ``first`` and up to a token, else of a character after ``least``."""
            found = next((i for i in range(token, first, -1) if begins[i]), 0)
            found = found or next((i for i in range(token, least, -1) if whole[i]), 0)
            return found or next(i for i in range(token + 1, count + 1) if whole[i])

        found: list[str] = []
        start = stop = 0
        while stop < count:
            stop = min(start + self.tokens, count)
            while True:
                stop = place_at(stop, start + (stop - start) // 2, start)
                piece = text[places[start][0] if start else 0 : places[stop][0]].rstrip()
                # What stands alone may have more tokens: the rest of a word, or a word without the space before it.
                more = len(self.tokenizer.encode(piece, add_special_tokens=False)) - self.tokens
                if more <= 0 or not any(whole[start + 1 : stop]):
                    break
                stop = max(stop - more, start + 1)
            if piece.strip():
                found.append(piece)
            step = min(start + self.stride, count)
            start = min(place_at(step, start + (step - start) // 2, start), stop)
        return found or [text]


def refuse_stride(tokens: int | None, stride: int | None) -> None:
    """InputError if windows were to begin further apart than they are long, or without a length."""
    if stride is None:
        return
    if tokens is None:
        raise InputError(
            f"--stride {stride}: there are no windows to be that far apart. Add --window, or leave it out."
        )
    if not 1 <= stride <= tokens:
        raise InputError(
            f"--stride {stride}: of windows of {tokens} tokens, so a part of each document would be in none, or they "
            f"would never end. Use 1 to {tokens}; {tokens // 2 or 1} has each token in two windows."
        )


def room_for_text(model: Any) -> float:
    """Tokens of a document that a model reads, beside its prompt and special tokens; infinite without a limit."""
    lengths = [getattr(part, name, None) for part, name in ((model, "max_seq_length"), (model[0], "document_length"))]
    length = min((one for one in lengths if one is not None), default=math.inf)
    if length == math.inf:
        return length
    prompts = model.prompts or {}
    names = ("document", "passage", "corpus", model.default_prompt_name)  # in the order of encode_document
    prompt = next((prompts[name] for name in names if name in prompts), None)
    probe = "a"
    mask = model.preprocess([probe], prompt=prompt, task="document")["attention_mask"]
    return length - int(mask.sum()) + len(model.tokenizer(probe, add_special_tokens=False)["input_ids"])
