"""The two forms of a whole model: one folder, which every library opens, and a pipeline of modules.

sentence-transformers puts a head behind the modules of a backbone. AutoModel on such a folder would open the first of
them alone. So a pipeline whose modules a method's own model can hold is written as that model, and any other with a
root that refuses to be opened in part.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoProcessor, PreTrainedModel

from ..errors import InputError, refusals
from ..files import write_json
from ..registry import ROOMS, Room, room_of
from .polyrep_fields import fields_of
from .polyrep_trunk import Backbone

Encoder = SentenceTransformer | SparseEncoder | MultiVectorEncoder

FORMS = ("folder", "pipeline")

_KEPT = ("processing_kwargs", "query_length", "document_length", "query_expansion")
"""Settings of a Transformer that say how inputs are read, whatever model is in it."""


def processor_of(folder: str) -> Any:
    """What prepares a backbone's inputs: its processor for pages, else its tokenizer."""
    return AutoProcessor.from_pretrained(folder, trust_remote_code=False)


def room_behind(model: Encoder) -> Room | None:
    """The method whose head is the last of several modules; None for any other model."""
    modules = list(model.children())
    head = getattr(modules[-1], "model", None)
    room = room_of(head.config.model_type) if len(modules) > 1 and isinstance(head, PreTrainedModel) else None
    return room if room and room.module else None


def own_room(model: Encoder) -> Room | None:
    """The method whose own model the only module holds; None for any other."""
    return first_room(model) if len(model) == 1 else None


def first_room(model: Encoder) -> Room | None:
    """The method whose own model the first module holds, whatever stands behind it; None for any other."""
    whole = getattr(model[0], "model", None)
    return room_of(whole.config.model_type) if isinstance(whole, PreTrainedModel) else None


def plain_room(model: Encoder) -> Room | None:
    """The method that stock modules without a head are; None where there is none."""
    if type(model) is not MultiVectorEncoder or own_room(model):
        return None
    return next((room for room in ROOMS.values() if room.transformer and not room.module), None)


def fold(model: Encoder, room: Room) -> PreTrainedModel:
    """The method's own model of a pipeline's modules; the encoder is shared, not copied.

    Raises:
        ValueError: One folder cannot hold them.
    """
    retriever: Any = room.model
    if not hasattr(retriever, "from_modules"):
        raise ValueError(f"{retriever.__name__}: is not made of the modules of others. Use form='pipeline'.")
    if not room.module:
        return retriever.from_modules(model)
    *modules, last = model.children()
    pooled = any(isinstance(part, Pooling) for part in modules)
    family: Any = SentenceTransformer if pooled else MultiVectorEncoder
    backbone = family(modules=modules, prompts=model.prompts, device=str(model.device))
    return retriever.from_modules(backbone, head=last.model)


def own_form(model: Encoder) -> Room | None:
    """The method whose own model :func:`~polyrep.hub.folder.save` writes of a model; None where modules stay."""
    room = room_behind(model)
    if room is None:
        return own_room(model)
    try:
        with torch.device("meta"), warnings.catch_warnings():  # no second copy, and torch remarks on each weight
            warnings.simplefilter("ignore")
            fold(model, room)
    except ValueError:
        return None
    return room


def place_of_backbone(model: Encoder) -> str:
    """Folder of a pipeline's first module in what :func:`save_pipeline` writes; empty for the root."""
    first: Any = model[0]
    kind = Backbone if type(first) is Transformer else type(first)
    return "" if kind.save_in_root else f"0_{kind.__name__}"


def write_folder(model: Encoder, whole: PreTrainedModel, room: Room, folder: Path) -> None:
    """Write a method's own model with the inputs, prompts and score of the pipeline that it was made of."""
    assert room.transformer
    first: Any = model[0]
    whole.save_pretrained(folder)
    first.processor.save_pretrained(folder)
    output = "token_embeddings" if type(model) is MultiVectorEncoder else "sentence_embedding"
    read = first.get_config_dict()
    how = {"method": "forward", "method_output_name": output}
    settings = {
        "transformer_task": first.transformer_task,
        "modality_config": dict.fromkeys(read["modality_config"], how),
        "module_output_name": output,
        "unpad_inputs": False,
    }
    write_json(folder / first.config_file_name, settings | {key: read[key] for key in _KEPT if read.get(key)})
    name = f"{room.transformer.__module__}.{room.transformer.__name__}"
    told = room.module.forward_kwargs if room.module else {"task"}
    entry = {"idx": 0, "name": "0", "path": "", "type": name, "kwargs": sorted(told)}
    write_json(folder / "modules.json", [entry])
    score = model.similarity_fn_name
    said = model._get_model_config() | {"similarity_fn_name": None if score is None else str(score)}
    write_json(folder / "config_sentence_transformers.json", said)


def unfold(model: Encoder, room: Room) -> Encoder:
    """A method's own model, the first module, as stock modules and its head; and what stands behind it.

    Raises:
        InputError: What it does between encoder and head is no stock module.
    """
    first: Any = model[0]
    whole: Any = first.model
    if not hasattr(whole, "stock_modules"):
        raise InputError(
            f"form='pipeline': {type(whole).__name__} has no head behind stock modules, so no pipeline gives its "
            "vectors. Use form='folder'."
        )
    with refusals():
        behind = whole.stock_modules(first.tokenizer)
    if room.head and room.module:
        behind.append(room.module(head_of(whole, room.head)))
    behind += list(model)[1:]
    read = first.get_config_dict()
    output = "embeddings" if first.transformer_task == "retrieval" else "last_hidden_state"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:  # as weights may be mapped
        whole.encoder.save_pretrained(scratch)
        first.processor.save_pretrained(scratch)
        transformer = Transformer(
            scratch,
            transformer_task=first.transformer_task,
            modality_config=dict.fromkeys(first.modality_config, {"method": "forward", "method_output_name": output}),
            module_output_name="token_embeddings",
            unpad_inputs=False,
            **{key: read[key] for key in _KEPT if read.get(key)},
        )
    family: Any = type(model)
    cut = {name: getattr(model, name) for name in ("truncate_dim", "max_active_dims") if hasattr(model, name)}
    return family(
        modules=[transformer, *behind],
        prompts=model.prompts,
        default_prompt_name=model.default_prompt_name,
        similarity_fn_name=model.similarity_fn_name,
        device=str(model.device),
        **cut,
    )


def head_of(whole: Any, kind: type[PreTrainedModel]) -> PreTrainedModel:
    """The head of a whole model, with a config of its own."""
    config: Any = kind.config_class
    head = kind(config(**fields_of(whole.config, config)))
    head.load_state_dict(whole.head.state_dict())
    return head.to(next(whole.head.parameters()).dtype).eval()


@contextmanager
def showing(model: Any, view: str) -> Iterator[Encoder]:
    """A model that gives several views, as one of the family that reads a certain view: it does so meanwhile.

    Raises:
        InputError: The model has one view, or no such view.
    """
    modules = list(model.children()) if isinstance(model, Encoder) else []
    parts: list[Any] = [
        part for module in modules if isinstance(part := getattr(module, "model", None), PreTrainedModel)
    ]
    rooms: list[Any] = [room_of(part.config.model_type) for part in parts]
    found = [part for part, room in zip(parts, rooms, strict=True) if room and hasattr(room.model, "view_families")]
    if not found:
        raise InputError(
            f"view={view!r}: {type(model).__name__} is no sentence-transformers model that gives several views of a "
            "text. Leave it out."
        )
    config, families = found[0].config, rooms[parts.index(found[0])].model.view_families
    if view not in families:
        raise InputError(f"view={view!r}: is no view of the model. Use {' or '.join(families)}.")
    kind: Any = next(family for family in get_args(Encoder) if family.__name__ == families[view])
    kept: dict[str, Any] = {"prompts": model.prompts, "default_prompt_name": model.default_prompt_name}
    if isinstance(model, kind):
        names = ("similarity_fn_name", "truncate_dim", "max_active_dims")
        kept |= {name: getattr(model, name) for name in names if hasattr(model, name)}
    before, config.view = config.view, view
    try:
        shown = kind(modules=modules, device=str(model.device), **kept)
        shown.module_kwargs = model.module_kwargs
        yield shown
    finally:
        config.view = before


def save_pipeline(model: Encoder, folder: Path, **options: Any) -> None:
    """Save modules; behind a head of ours the backbone gets a folder of its own, and the root says so.

    A backbone with a module class of its own keeps its place.
    """
    first: Any = model[0]
    if type(first) is not Transformer or not room_behind(model):
        model.save_pretrained(str(folder), **options)
        return
    beside = Backbone.__new__(Backbone)
    vars(beside).update(vars(first))
    try:
        model[0] = beside  # type: ignore[operator]
        model.save_pretrained(str(folder), **options)
    finally:
        model[0] = first  # type: ignore[operator]
