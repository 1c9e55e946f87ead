"""Write the untrained model of a run, or a trained head and its backbone, as a folder."""

from __future__ import annotations

import importlib
import re
import shutil
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.transformer import Transformer
from sentence_transformers.util.misc import import_from_string
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from ..errors import InputError, refusals
from ..files import read_json, staged_folder, write_json
from ..hub.code import localize
from ..hub.folder import family_of, fetch, save
from ..hub.reading import positions_in
from ..hub.vision import fetch_vision
from ..registry import Room
from .recipes import Plan


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
    parts = read_json(plan.run / "modules.json") or [{}]
    room = plan.room if len(parts) == 1 else None  # else it is one of several modules
    if room:
        refuse_cut(backbone, recipe.backbone)
    with staged_folder(folder) as staged:
        shutil.copytree(plan.run, staged, dirs_exist_ok=True, ignore=shutil.ignore_patterns("recipe.yaml"))
        if room:
            _build_one_folder(plan, room, backbone, staged, head)
        else:
            _build_pipeline(plan, backbone, staged, parts)


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
    load_processor = room.load_processor or AutoTokenizer.from_pretrained
    load_processor(str(backbone), **vision).save_pretrained(folder)
    _inherit(folder, backbone, model)
    localize(folder)


def _build_pipeline(plan: Plan, backbone: Path, folder: Path, parts: list[dict[str, Any]]) -> None:
    """Write the modules that ``modules.json`` lists, the first of them the backbone's own transformer."""
    trusted = {"trust_remote_code": plan.recipe.trust_remote_code}
    first = read_json(plan.run / "sentence_bert_config.json")
    modules: list[nn.Module] = [
        Transformer(str(backbone), model_kwargs=trusted, processor_kwargs=trusted, config_kwargs=trusted, **first)
    ]
    for part in parts[1:]:
        modules.append(_untrained(plan, part, _width(modules)))
    settings = read_json(plan.run / "config_sentence_transformers.json")
    keep = {key: settings[key] for key in ("prompts", "similarity_fn_name") if settings.get(key)}
    with refusals():
        save(family_of(plan.run)(modules=modules, **keep), folder)


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
    module, _, name = part["type"].rpartition(".")
    if plan.room and plan.room.module and name == plan.room.module.__name__:
        with refusals():
            return plan.room.module(**plan.config)
    if not module.startswith("sentence_transformers."):
        raise InputError(f"{plan.run}/modules.json: {part['type']} is neither stock nor of a registered room.")
    module_class = getattr(importlib.import_module(module), name)
    config = module_class.load_config(str(plan.run), subfolder=part["path"])
    if width and name in _READ_WIDTHS:
        config[_READ_WIDTHS[name]] = width
    if "activation_function" in config:  # Dense names a class and takes an instance
        config["activation_function"] = import_from_string(config["activation_function"])()
    return module_class(**config)


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
        matched = [parameter for name, parameter in model.named_parameters() if re.search(pattern, name)]
        if not matched:
            names = [name for name, _ in model.named_parameters()]
            raise InputError(f"--freeze {pattern!r}: matches no parameter. The first is {names[0]!r}.")
        for parameter in matched:
            parameter.requires_grad_(False)
