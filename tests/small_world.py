"""A small copy of the repository, in which the commands and the code of its pages run in seconds.

It has the layout and the file names of the repository, the packaged all-MiniLM-L6-v2, and the recipes, whose runs take
two steps. Data sets of all the names that pages say are cut from the texts of ``world``; drawings are its photographs.
Models are made by those recipes when they are first asked for, so what is opened as ``models/NAME/final`` has the
widths of the real one, and knows nothing.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from conftest import ROOT
from drawings import write_scenes
from huggingface_hub import constants
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from transformers import AutoModel
from world import ENGLISH, pages, write_world

from polyrep.cli import main
from polyrep.hub.folder import MINILM_ID, packaged_minilm
from polyrep.methods.dual_encoder.example import tiny_vision

SHORT = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "warmup_steps": 1,
    "logging_steps": 1,
    "save_strategy": "no",
}
"""What all recipes say instead."""

SHORTER: dict[str, dict[str, Any]] = {
    "dual-encoder-mobilenet-minilm": {"projection_dim": 64, "hidden_dim": 64},
    "multilayer-minilm-frozen": {"layers": [-1, -2, -3, -4]},
    # Vectors of 256 numbers want as many documents.
    "lemur-minilm": {"datasets": [".many/python_docs"], "num_documents": 300, "latent_dim": 544, "num_anchors": 512},
}
"""What some of them say instead, where time goes by the width."""

LAYERS = 3
"""Layers of all-MiniLM-L6-v2 that are kept."""

SIZES = {"train": 16, "dev": 6, "test": 8}
"""Queries kept of each split of a data set."""

NAMED = ("python_docs", "tldr_pages", "scitldr", "scifact", "pubmedqa")
"""Data sets that pages name."""

PAGE_MODEL = "vidore/colpali-v1.3-hf"
VISION = "google/mobilenet_v2_1.0_224"
FLAGS = {"dual-encoder-mobilenet-minilm": ["--datasets", "captions", "--vision", VISION]}
FLAGS["dense2sparse-mobilenet-minilm"] = ["--datasets", "captions"]
"""What a recipe cannot know, and its users say."""


class SmallWorld:
    """The copy in ``folder``; whoever runs something in it is in that folder.

    Attributes:
        folder: Its root.
        document_ids: Of all data sets.
        photo: Path of a photograph.
        on_hub: Ids whose folders lie in the cache of the Hub.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.on_hub: set[str] = set()
        self.commits = count(1)
        for name in ("train.py", "evaluate.py", "encode.py", "Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, folder / name)
        for name in ("README.md", "CONTRIBUTING.md", "LICENSE"):
            shutil.copy(ROOT / name, folder / name)
        for name in ("benchmarks", "docs", "demo", "hub_configs", "model_cards", "results"):
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "_build"))
        (folder / "modeling").symlink_to(ROOT / "modeling")
        for recipe in (folder / "hub_configs").glob("*/recipe.yaml"):
            shorten(recipe)
        for name in NAMED:
            write_world(folder / ".sets" / name, sizes=SIZES)
        write_world(folder / ".many" / "python_docs")
        write_scenes(folder / ".sets" / "captions")
        self.minilm = shallow_minilm(folder / ".hub" / "minilm")
        self.put_on_hub(MINILM_ID, self.minilm)
        self.put_on_hub(VISION, tiny_vision(folder / ".hub" / "vision"))
        self.document_ids = {page.id for page in pages(*ENGLISH)}
        self.photo = str(min((folder / ".sets" / "captions" / "images").iterdir()))
        self.lasting = set(folder.iterdir()) | {folder / name for name in (".cache", "models")}

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Be in its folder, where ``minilm`` is the shallow one and names of data sets are known."""
        shallow = mock.patch("polyrep.hub.folder.packaged_minilm", lambda: self.minilm)
        sets = mock.patch.dict(os.environ, POLYREP_DATA=str(self.folder / ".sets"))
        with contextlib.chdir(self.folder), shallow, sets:
            yield

    def put_on_hub(self, name: str, folder: Path) -> str:
        """Have a folder in the cache of the Hub as ``name``, as if it had been downloaded; return its commit."""
        commit = f"{next(self.commits):040x}"
        place = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
        shutil.rmtree(place, ignore_errors=True)
        for file in filter(Path.is_file, folder.rglob("*")):
            link = place / "snapshots" / commit / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(commit)
        self.on_hub.add(name)
        return commit

    def provide(self, text: str) -> None:
        """Make every model that a text names, unless it is there already."""
        for name in dict.fromkeys(re.findall(r"\bmodels/([a-z0-9-]+)/(?:final|head)\b", text)):
            self.train(name)
        for name in dict.fromkeys(re.findall(r"\bhub_configs/([a-z0-9-]+)", text)):
            self.provide(self._needs(name))
        if PAGE_MODEL in text and PAGE_MODEL not in self.on_hub:
            self.put_on_hub(PAGE_MODEL, page_model(self.minilm, self.folder / ".hub" / "pages"))

    def train(self, name: str) -> None:
        """Make ``models/NAME`` by its recipe, unless it is there already."""
        if any((self.folder / "models" / name / part).is_dir() for part in ("final", "head")):
            return
        self.provide(self._needs(name))
        output = io.StringIO()
        with self.entered(), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = main(["train", f"hub_configs/{name}", *FLAGS.get(name, [])], prog="train.py")
        assert status == 0, output.getvalue()

    def _needs(self, name: str) -> str:
        """What a recipe starts from."""
        return yaml.safe_load((self.folder / "hub_configs" / name / "recipe.yaml").read_text())["backbone"]

    def clear(self) -> None:
        """Remove what a page left, but for the models of recipes and caches, so that no page needs another."""
        runs = {self.folder / "models" / recipe.name for recipe in (self.folder / "hub_configs").iterdir()}
        for path in (set(self.folder.iterdir()) - self.lasting) | (set((self.folder / "models").glob("*")) - runs):
            path.unlink() if path.is_file() else shutil.rmtree(path)


def shorten(recipe: Path) -> None:
    """Rewrite a recipe for two steps."""
    content = yaml.safe_load(recipe.read_text())
    content.pop("bf16", None)  # slow where the processor has none
    if "datasets" in content:
        content["datasets"] = content["datasets"][:1]
    content |= SHORT | SHORTER.get(recipe.parent.name, {})
    recipe.write_text(f"{recipe.read_text().splitlines()[0]}\n{yaml.safe_dump(content)}")


def shallow_minilm(folder: Path) -> Path:
    """The packaged all-MiniLM-L6-v2 without its upper half, for a third of the time; it still knows the words."""
    shutil.copytree(packaged_minilm(), folder)
    model = AutoModel.from_pretrained(folder)
    del model.encoder.layer[LAYERS:]
    model.config.num_hidden_layers = LAYERS
    model.save_pretrained(folder)
    return folder


def page_model(minilm: Path, folder: Path) -> Path:
    """A late-interaction model whose tokenizer knows ``<image>``, in place of one of page images."""
    names = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    modules = [Transformer(str(minilm)), Dense(384, 16, bias=False, **names), MultiVectorMask(), Normalize(**names)]
    model = MultiVectorEncoder(modules=modules, device="cpu")
    model.tokenizer.add_tokens(["<image>"])
    modules[0].auto_model.resize_token_embeddings(len(model.tokenizer))
    model.save_pretrained(str(folder))
    return folder
