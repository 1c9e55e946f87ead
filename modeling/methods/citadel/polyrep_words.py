"""Which words a text encoder knows, and how it scores them: what a head that reads words takes from its backbone.

Beside ``polyrep_room.py``, and renewed like it; there is no config class here either.
"""

# mypy: ignore-errors
# Shipped: it speaks to transformers and torch through attributes that these type as Tensor | Module.

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, PreTrainedModel


def words_of(model) -> dict:
    """What a head's config says of the words of a sentence-transformers model."""
    size = model[0].model.get_input_embeddings().weight.shape[0]
    special = {*model.tokenizer.all_special_ids, *getattr(model.tokenizer, "added_tokens_decoder", ())}
    special |= {*range(len(model.tokenizer), size)}  # rows beyond the tokenizer, which some backbones have
    special = sorted(i for i in special if i < size)
    return {"vocab_size": size, "words": size - len(special), "special_token_ids": special}


def check_words(encoder: PreTrainedModel, owner: str) -> None:
    """ValueError for an encoder whose words are of another width than its states, as ALBERT's are."""
    width, words = encoder.config.hidden_size, encoder.get_input_embeddings().weight.shape[1]
    if width != words:
        raise ValueError(
            f"{owner}: hidden_size={width} of {type(encoder).__name__}, but its word embeddings have width {words}, "
            "so its states cannot be scored against them. Use a backbone whose words are as wide as its states, e.g. "
            "BERT."
        )


def language_head(encoder: PreTrainedModel, wanted: bool | None, owner: str) -> tuple | None:
    """Transform, norm and output layer of the masked language model that an encoder was saved as; None without.

    Raises:
        ValueError: There is none and it is wanted, or it is not of these three.
    """
    source, named = encoder.name_or_path, (getattr(encoder.config, "architectures", None) or [""])[0]
    if wanted is False or not source or not named.endswith("ForMaskedLM"):
        if wanted:
            raise ValueError(
                f"{owner}: mlm_head=True, but {source or 'the backbone'} is a {named or type(encoder).__name__} and "
                "has none. Use mlm_head=False, which scores words by their embeddings."
            )
        return None
    revision = {"revision": getattr(encoder.config, "_commit_hash", None)}
    model, loaded = AutoModelForMaskedLM.from_pretrained(
        source, trust_remote_code=False, output_loading_info=True, **revision
    )
    if loaded["missing_keys"]:  # they would be random: the folder holds the encoder alone
        if wanted:
            raise ValueError(
                f"{owner}: mlm_head=True, but the weights of {source} lack {min(loaded['missing_keys'])}. Use "
                "mlm_head=False, which scores words by their embeddings."
            )
        return None
    model.eval()
    body, output = set(model.base_model.modules()), model.get_output_embeddings()
    beside = [module for module in model.modules() if module not in body and module is not output]
    maps = [module for module in beside if isinstance(module, nn.Linear)]
    norms = [module for module in beside if isinstance(module, nn.LayerNorm)]
    wide = isinstance(output, nn.Linear) and output.in_features == encoder.config.hidden_size
    if wide and len(maps) == len(norms) == 1 and maps[0].weight.shape == (output.in_features, output.in_features):
        with torch.no_grad():
            ids = torch.arange(16).view(2, 8) % output.out_features
            states = model.base_model(input_ids=ids).last_hidden_state
            found = output(norms[0](F.gelu(maps[0](states))))
            if torch.allclose(found, model(input_ids=ids).logits, 1e-2, 1e-2):
                return maps[0], norms[0], output
    raise ValueError(
        f"{owner}: mlm_head=True, but the {named} of {source} scores words by something else than a linear map, GELU, "
        "a norm and an output layer. Use mlm_head=False, which scores words by their embeddings."
    )
