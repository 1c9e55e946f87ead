"""The code on the card of every kind of model runs, before and after the model is published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pages import read_card
from room_examples import EXAMPLES, behind, no_folder_holds
from sentence_transformers import MultiVectorEncoder
from small_world import SmallWorld
from transformers import PreTrainedModel

import polyrep
from polyrep.hub import render_card
from polyrep.hub.cards import PINNED


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    return SmallWorld(tmp_path_factory.mktemp("world"))


def kinds_of(room_type: str | None, backbone: Path, stock: Any, scratch: Path) -> dict[str, tuple[Any, Any]]:
    """A model of every kind that a room's cards are of: ``template/kind`` -> it, and a backbone for its head."""
    if room_type is None:
        return {"late_interaction/stock": (stock, stock)}
    template, models = polyrep.ROOMS[room_type].card, EXAMPLES[room_type](backbone, scratch).models
    backbones = {kind: behind(model) for kind, model in models.items() if len(model) > 1}
    found: dict[str, tuple[Any, Any]] = {}
    for kind, model in models.items():
        name = f"{template}_images" if kind == "images" else template
        before = backbones.get(kind) or next(iter(backbones.values()), model)
        last = model[len(model) - 1].model
        found[f"{name}/{kind}"] = model, before
        if len(model) > 1:
            found[f"{name}/head of {kind}"] = last, before
            if len(model) > 2:  # else the head reads the encoder itself, behind which nothing may stand
                stays = no_folder_holds(model)
                found[f"{name}/modules of {kind}"] = stays, behind(stays)
        elif isinstance(getattr(last, "head", None), PreTrainedModel):
            found[f"{name}/head in {kind}"] = by_itself(last.head), before
    return found


def by_itself(head: Any) -> Any:
    """A head out of a whole model, whose config it shares there, with one of its own as ``train`` saves it."""
    fields = head.config_class().to_dict().keys() - {"model_type", "architectures", "auto_map"}
    own = type(head)(head.config_class(**{name: getattr(head.config, name) for name in fields}))
    own.load_state_dict(head.state_dict())
    return own


@pytest.mark.parametrize("published", [True, False], ids=["published", "local"])
@pytest.mark.parametrize("room_type", [None, *(name for name in EXAMPLES if polyrep.ROOMS[name].card)])
def test_cards_of_every_kind_of_model(
    room_type: str | None,
    published: bool,
    world: SmallWorld,
    backbone: Path,
    multi_vector_model: MultiVectorEncoder,
    tmp_path: Path,
) -> None:
    for name, (model, before) in kinds_of(room_type, backbone, multi_vector_model, tmp_path).items():
        model_id = "someone/model" if published else None
        readme = str(render_card(model, name.partition("/")[0], model_id=model_id))
        folder = polyrep.save(model, tmp_path / name, readme=readme)
        before.save_pretrained(str(tmp_path / "before"), create_model_card=False)
        standing_for = {
            "path/to/this/folder": str(folder),
            "the/same/backbone": str(tmp_path / "before"),
            "photo.jpg": world.photo,
        }
        if model_id:
            standing_for[PINNED] = world.put_on_hub(model_id, folder)
        read_card(world, folder / "README.md", standing_for)
