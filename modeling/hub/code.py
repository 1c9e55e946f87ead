"""The code that a model folder carries: ours, made independent of the installed package; others', refused."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from ..errors import InputError
from ..files import read_json, write_json
from .fingerprint import without

REQUIREMENTS = {"transformers": ">=5.17", "sentence-transformers": ">=6.0.1"}
"""What a folder with polyrep code needs; sentence-transformers checks it on load and drops it on save."""


def code_of(module: str) -> list[Path]:
    """The files that an imported module of shipped code consists of: its own, and what it imports from beside it."""
    file = str(sys.modules[module].__file__)
    return [Path(file), *map(Path, sorted(get_relative_import_files(file)))]


def localize(folder: str | Path) -> None:
    """Make a saved folder independent of the installed package, in place.

    ``modules.json`` written while a room's module is importable names it as
    ``polyrep.methods.room.modeling_room.Class``. This keeps the last two parts, which is how sentence-transformers
    names code inside a folder, copies the modeling file and what it imports from beside it to the folder's root, and
    restores the version requirements that saving drops.
    """
    folder = Path(folder)
    for config in [*folder.rglob("config.json"), *folder.rglob("tokenizer_config.json")]:
        content = read_json(config)
        if (public := without(content, ("_name_or_path", "name_or_path"))) != content:
            write_json(config, public)  # the builder's path is nobody's business
    modules_file = folder / "modules.json"
    if not modules_file.is_file():
        return
    modules = read_json(modules_file, list, type=str)
    for module in modules:
        name, _, class_name = module["type"].rpartition(".")
        stem = name.rpartition(".")[2]
        if name.startswith("sentence_transformers.") or name == stem:
            continue  # stock, or local to the folder already
        if name not in sys.modules:
            raise InputError(f"{modules_file}: {module['type']} is not imported, so its code cannot be copied.")
        for file in code_of(name):
            shutil.copyfile(file, folder / file.name)
        module["type"] = f"{stem}.{class_name}"
    write_json(modules_file, modules)
    if any(folder.glob("modeling_*.py")):
        config = folder / "config_sentence_transformers.json"
        write_json(config, read_json(config) | {"requirements": REQUIREMENTS})


def refuse_foreign_code(folder: Path) -> None:
    """Raise InputError if a folder takes code from elsewhere: it would change without anybody's looking at it."""
    if foreign := _foreign_code(folder):
        raise InputError(
            f"{foreign[0]}: takes its code from another repository ({foreign[1]}), at whatever that holds today. "
            "Refused; copy the code into the folder, or open the model without --trust_remote_code."
        )


def _foreign_code(folder: Path) -> tuple[Path, str] | None:
    """The first reference ``OTHER/REPOSITORY--file.Class`` to code that the folder does not carry, and its file.

    Such a reference may stand in the config of anything (model, tokenizer, processor, part, module) and at any depth.
    """
    for file in sorted(folder.rglob("*config*.json")):
        if found := next(filter(_is_elsewhere, _references(read_json(file, object))), None):
            return file, found
    for module in read_json(folder / "modules.json", list, type=str):
        if _is_elsewhere(module["type"]):
            return folder / "modules.json", module["type"]
    return None


def _is_elsewhere(reference: str) -> bool:
    return "--" in reference


def _references(content: Any) -> Iterator[str]:
    """Every reference to code in the ``auto_map`` of a config or of one inside it."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _texts_in(value) if key == "auto_map" else _references(value)
    elif isinstance(content, list):
        for value in content:
            yield from _references(value)


def _texts_in(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _texts_in(value)
