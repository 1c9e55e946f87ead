"""Train low-rank adapters instead of an encoder's own weights (LoRA, Hu et al., 2021), by PEFT.

Adapters are a way to train, not a kind of model: every checkpoint holds the merged weights, so that it opens like any
other, and beside them ``adapters.safetensors``, from which training goes on.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import InputError
from ..hub.folder import PREFIX, Encoder
from ..registry import room_of

_FILE = "adapters.safetensors"


def add_adapters(model: Encoder, rank: int) -> None:
    """Freeze the encoders of a model and give each of their linear layers a trainable adapter; heads train as before.

    Raises:
        InputError: PEFT is not installed, or the rank is no size.
    """
    if rank < 1:
        raise InputError(f"--lora_rank {rank}: use 1 or more, e.g. 8, or 0 to train all weights.")
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError:
        raise InputError(
            '--lora_rank: the package peft is not installed. Run `pip install "polyrep[lora]"`.'
        ) from None
    for owner, name in _encoders(model):
        encoder: Any = getattr(owner, name)
        targets = [path for path, part in encoder.named_modules() if isinstance(part, nn.Linear)]
        setattr(owner, name, get_peft_model(encoder, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)))


def merge_adapters(model: Encoder) -> None:
    """Fold the adapters into the weights, for good."""
    for owner, name in _encoders(model):
        setattr(owner, name, getattr(owner, name).merge_and_unload())


@contextmanager
def merged(model: Encoder) -> Iterator[None]:
    """The model with merged copies of its encoders, so that it can be saved."""
    live = [(owner, name, getattr(owner, name)) for owner, name in _encoders(model)]
    try:
        for owner, name, encoder in live:
            setattr(owner, name, copy.deepcopy(encoder).merge_and_unload())
        yield
    finally:
        for owner, name, encoder in live:
            setattr(owner, name, encoder)


class AdapterTrainerMixin:
    """What a trainer of sentence-transformers does otherwise when it trains adapters: save and go on."""

    model: Any
    args: Any

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        with merged(self.model):
            super()._save(str(folder))  # type: ignore[misc]
        save_file(_trained(self.model), folder / _FILE)

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        stored = load_file(Path(checkpoint_path) / _FILE)
        if stored.keys() != _trained(self.model).keys():
            raise InputError(f"{checkpoint_path}/{_FILE}: is of another model or --lora_rank. Start anew.")
        self.model.load_state_dict(stored, strict=False)


def _trained(model: nn.Module) -> dict[str, Any]:
    return {name: value.detach().cpu().contiguous() for name, value in model.named_parameters() if value.requires_grad}


def _encoders(model: Encoder) -> list[tuple[Any, str]]:
    """Where the encoders of a model are: in a room's model, or the stock Transformer's own."""
    first: Any = model[0]
    kind = first.model.config.model_type
    if not kind.startswith(PREFIX):
        return [(first, "model")]
    room = room_of(kind)
    return [(first.model, name) for name, _ in first.model.named_children() if room and name in room.encoders]
