"""Write the untrained model of a run, or a trained head and its backbone, as a folder."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.module import Module
from sentence_transformers.base.modules.transformer import Transformer
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from ..errors import InputError, refusals
from ..files import read_json, staged_folder, write_json
from ..hub.code import listed_activation, listed_module, localize, may_run
from ..hub.folder import Encoder, family_of, fetch, opening, save
from ..hub.reading import positions_in
from ..hub.vision import fetch_vision
from ..hub.weights import check_sizes
from ..registry import Room
from .datasets import dev_of
from .recipes import Plan

_CONFIGS = ("config.json", "config_sentence_transformers.json", "modules.json", "sentence_bert_config.json")
"""What a model takes of the folder of its run, beside the configs of further modules."""

_OF_TRANSFORMERS = {
    "do_lower_case",
    "document_length",
    "max_seq_length",
    "modality_config",
    "module_output_name",
    "query_expansion",
    "query_length",
    "transformer_task",
    "unpad_inputs",
}
"""What a run may say of its Transformer."""


def build(plan: Plan, folder: Path, head: PreTrainedModel | None = None) -> None:
    """Write a model: the run's folder plus the backbone's weights and tokenizer, and a trained head if there is one.

    A room builds itself through ``from_encoder``. Several modules in ``modules.json`` are built one by one: the first
    from the backbone, stock ones from their own config with fresh weights, made for the width of what stands before
    them, and a room's from its fields.

    Raises:
        InputError: A value of the config, a module or the backbone cannot be used.
    """
    recipe = plan.recipe
    backbone = fetch(recipe.backbone, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
    allowed = may_run(backbone, recipe.trust_remote_code)
    check_sizes(backbone, whole=head is None)  # that of a head is opened already
    parts = read_json(plan.run / "modules.json", list, path=str, type=str)
    for part in parts:
        _listed(plan, part)
    room = plan.room if len(parts) < 2 else None  # else it is one of several modules
    if room:
        refuse_cut(backbone, recipe.backbone)
    with staged_folder(folder) as staged:
        for file in _CONFIGS:  # a run is data: whatever else lies in its folder stays there
            if (plan.run / file).is_file():
                shutil.copyfile(plan.run / file, staged / file)
        if room:
            _build_one_folder(plan, room, backbone, staged, head)
        else:
            _build_pipeline(plan, backbone, staged, parts, allowed)


def refuse_cut(backbone: Path, name: str) -> None:
    """InputError if a backbone keeps only the first numbers of its vectors, which no folder that holds it would do."""
    cut = read_json(backbone / "config_sentence_transformers.json").get("truncate_dim")
    if cut is not None and family_of(backbone) is SentenceTransformer:
        raise InputError(
            f"{name}: cuts its vectors to {cut} numbers (truncate_dim), but a model that holds its encoder would have "
            "whole ones, so it would not fit what was trained. Leave truncate_dim out of "
            "config_sentence_transformers.json in a copy of the folder."
        )


def _build_one_folder(plan: Plan, room: Room, backbone: Path, folder: Path, head: PreTrainedModel | None) -> None:
    """Write a room's retriever, with the tokenizer, prompts and length of its backbone."""
    vision = {}
    if plan.head and plan.head.vision:
        vision = {"vision": str(fetch_vision(plan.head.vision, plan.head.vision_revision))}
    retriever: Any = room.model
    options = plan.config if head is None else {"head": head}
    with refusals():
        model = retriever.from_encoder(str(backbone), **options, **vision)
    model.save_pretrained(folder)
    if room.load_processor:
        processor = room.load_processor(str(backbone), **vision)
    else:
        processor = AutoTokenizer.from_pretrained(str(backbone), trust_remote_code=False)
    processor.save_pretrained(folder)
    _inherit(folder, backbone, model)
    localize(folder)


def _build_pipeline(plan: Plan, backbone: Path, folder: Path, parts: list[dict[str, Any]], allowed: bool) -> None:
    """Write the modules that ``modules.json`` lists, the first the backbone's own, with its code if that may run."""
    trusted = {"trust_remote_code": allowed}
    file = plan.run / "sentence_bert_config.json"
    first = read_json(file)
    if unknown := sorted(first.keys() - _OF_TRANSFORMERS):
        raise InputError(
            f"{file}: {unknown[0]!r} is no setting that a run may make, since it could open more than the backbone. "
            f"Settings: {', '.join(sorted(_OF_TRANSFORMERS))}."
        )
    with opening(backbone):
        modules: list[nn.Module] = [
            Transformer(str(backbone), model_kwargs=trusted, processor_kwargs=trusted, config_kwargs=trusted, **first)
        ]
    for part in parts[1:]:
        modules.append(_untrained(plan, part, _width(modules)))
    settings = read_json(plan.run / "config_sentence_transformers.json")
    keep = {key: settings[key] for key in ("prompts", "similarity_fn_name") if settings.get(key)}
    with refusals():
        save(family_of(plan.run)(modules=modules, **keep), folder)


def _listed(plan: Plan, part: dict[str, Any]) -> type[Module]:
    """The class of an entry of ``modules.json``; InputError if it is on no list, or its config outside of the run."""
    listing = plan.run / "modules.json"
    if not (plan.run / part["path"]).resolve().is_relative_to(plan.run.resolve()):
        raise InputError(f"{listing}: module path {part['path']!r} leaves the folder. Refused; mend it.")
    return listed_module(part["type"], listing)


def _width(modules: list[nn.Module]) -> int | None:
    """Width of the vectors behind some modules, as far as they tell."""
    widths = [m.get_embedding_dimension() for m in modules if hasattr(m, "get_embedding_dimension")]  # type: ignore[operator]
    return next((width for width in reversed(widths) if width), None)


_READ_WIDTHS = {
    "Dense": "in_features",
    "Pooling": "embedding_dimension",
    "LayerNorm": "dimension",
    "SparseAutoEncoder": "input_dim",
}
"""Stock module -> field of its config with the width of what it reads, which follows from what stands before it."""


def _untrained(plan: Plan, part: dict[str, Any], width: int | None) -> nn.Module:
    """A module of ``modules.json``, behind vectors of some width: the room's, or a stock one from its config."""
    kind: Any = _listed(plan, part)
    if plan.room and plan.room.module and kind is plan.room.module:
        with refusals():
            return kind(**plan.config)
    config = kind.load_config(str(plan.run), subfolder=part["path"])
    if width and kind.__name__ in _READ_WIDTHS:
        config[_READ_WIDTHS[kind.__name__]] = width
    if "activation_function" in config:  # Dense names a class and takes an instance
        config["activation_function"] = listed_activation(config["activation_function"], plan.run / part["path"])
    return kind(**config)


def settle(plan: Plan, model: Encoder) -> None:
    """Let the method set in a trained model's config what it chooses on development queries."""
    if plan.room and plan.room.settled:
        plan.room.named(plan.room.settled)(model, dev_of(plan.recipe))


def _inherit(folder: Path, backbone: Path, model: PreTrainedModel) -> None:
    """Give a built model the backbone's maximal length and prompts, and its own score, where the run says nothing."""
    similarity, positions = getattr(model.config, "similarity_fn_name", None), positions_in(model)
    for name, inherited in (
        ("sentence_bert_config.json", ("max_seq_length",)),
        ("config_sentence_transformers.json", ("prompts", "default_prompt_name")),
    ):
        own, theirs = read_json(folder / name), read_json(backbone / name)
        own |= {key: theirs[key] for key in inherited if theirs.get(key) is not None and not own.get(key)}
        if positions and (own.get("max_seq_length") or 0) > positions:  # runs are for backbones of any length
            own["max_seq_length"] = positions
        if similarity and name.startswith("config_") and not own.get("similarity_fn_name"):
            own["similarity_fn_name"] = similarity
        write_json(folder / name, own)


def freeze(patterns: list[str], model: nn.Module) -> None:
    """Leave parameters as they are; InputError names a pattern that matches none."""
    for pattern in patterns:
        try:
            matched = [parameter for name, parameter in model.named_parameters() if re.search(pattern, name)]
        except re.error as error:
            raise InputError(f"--freeze {pattern!r}: is no regular expression ({error}).") from None
        if not matched:
            names = [name for name, _ in model.named_parameters()]
            raise InputError(f"--freeze {pattern!r}: matches no parameter. The first is {names[0]!r}.")
        for parameter in matched:
            parameter.requires_grad_(False)
