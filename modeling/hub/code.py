"""The code that a model folder carries, or names: ours, made independent of the package; others', on the user's word.

What a folder says is data. It runs as code only where it is polyrep's own, byte for byte, or where the user gave
``--trust_remote_code`` on the command line; see ``docs/trust.md``.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sentence_transformers.base.modules.module import Module
from torch import nn
from transformers.dynamic_module_utils import get_relative_import_files

from ..errors import InputError
from ..files import read_json, write_json
from ..registry import ROOMS
from . import polyrep_trunk
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


def may_run(folder: Path, trusted: bool) -> bool:
    """Whether what opens a model folder may run the code in it, as ``trust_remote_code``.

    Code that is polyrep's own, byte for byte, needs nobody's word. Any other needs the user's, who gives it by naming
    the folder beside the flag. Without it the folder is data: classes are taken from lists.

    Args:
        folder: The model.
        trusted: What the user said.

    Raises:
        InputError: The folder takes code from another repository, or has other files opened in place of its own; or,
            without trust, it names a module, a tokenizer, an activation function or an attention that would be
            imported or fetched.
    """
    _refuse_other_files(folder)
    if trusted:
        _refuse_elsewhere(folder)
        return True
    _refuse_unlisted(folder)
    return any(folder.rglob("*.py")) and _foreign(folder) is None


def refuse_foreign_code(folder: Path, use: str) -> None:
    """InputError if a folder holds or names code that is not polyrep's own, byte for byte, with what would run it."""
    _refuse_elsewhere(folder)
    if foreign := _foreign(folder):
        raise InputError(
            f"{foreign}: is not the code of this polyrep, and {use} would run it. Read it, then pass "
            "--trust_remote_code."
        )


def listed_module(reference: str, where: Path) -> type[Module]:
    """The class of a module by its name in ``modules.json``: of sentence-transformers, or of a registered method.

    Args:
        reference: ``sentence_transformers....Class``, or ``modeling_x.Class`` with whatever stands before it.
        where: The file that names it.

    Raises:
        InputError: It is neither.
    """
    if (found := _listed(reference)) is None:
        raise InputError(
            f"{where}: {reference!r} is no module of sentence-transformers, nor of a method of polyrep. Importing it "
            "would run code that the folder chose, so it is refused."
        )
    return found


def listed_activation(name: str, where: Path) -> nn.Module:
    """An activation function by its name in the config of a Dense; InputError if torch has none of that name."""
    if name not in _ACTIVATIONS:
        raise InputError(
            f"{where}: activation_function {name!r} is none of torch.nn, and importing it would run code that the "
            f"folder chose. Use one of torch.nn.modules.activation, e.g. torch.nn.modules.activation.Tanh."
        )
    return _ACTIVATIONS[name]()


_ACTIVATIONS: dict[str, type[nn.Module]] = {
    f"{package}.{kind.__name__}": kind
    for kind in (*map(partial(getattr, nn), nn.modules.activation.__all__), nn.Identity)
    if kind not in (nn.MultiheadAttention, nn.Threshold)  # which need arguments
    for package in ("torch.nn", kind.__module__)
}


_CALLED = ("activation_function", "activation_fn", "sbert_ce_default_activation_function")
"""Keys whose value sentence-transformers imports and calls, in a Dense or a cross-encoder."""


_ELSEWHERE = (
    "adapter_kwargs",
    "allow_all_kernels",
    "gguf_file",
    "kernel_config",
    "offload_folder",
    "tokenizer_name_or_path",
    "transformers_weights",
    "use_kernels",
    "variant",
)
"""Settings by which a module of sentence-transformers opens, fetches or writes something else than its own files."""


def _listed(reference: str) -> type[Module] | None:
    module, _, name = reference.rpartition(".")
    if reference.startswith("sentence_transformers."):
        try:
            found = getattr(importlib.import_module(module), name, None)
        except (ImportError, ValueError):
            return None
    else:
        stem = module.rpartition(".")[2]
        shipped = [polyrep_trunk.__name__, *(room.model.__module__ for room in ROOMS.values())]
        found = next((getattr(sys.modules[part], name, None) for part in shipped if part.endswith(f".{stem}")), None)
    return found if isinstance(found, type) and issubclass(found, Module) else None


def _refuse_other_files(folder: Path) -> None:
    """InputError if a module's settings have other files opened than those that were checked."""
    for file in sorted(folder.rglob("sentence_*_config.json")):
        for key, value in _items(read_json(file)):
            if key in _ELSEWHERE and value not in (None, False):
                raise InputError(
                    f"{file}: {key} {value!r} opens something else than the files of this folder. Refused; remove it."
                )


def _refuse_elsewhere(folder: Path) -> None:
    """InputError if a folder takes code from another repository."""
    if found := next((found for found in _references_of(folder) if "--" in found[1]), None):
        raise InputError(
            f"{found[0]}: takes its code from another repository ({found[1]}), at whatever that holds today. Refused; "
            "copy the code into the folder, or open the model without --trust_remote_code."
        )


def _foreign(folder: Path) -> str | None:
    """The first file of code in a folder that is not ours, or the first name of code that is in no file there."""
    files = sorted(folder.rglob("*.py"))
    if other := next((file for file in files if not _is_ours(file)), None):
        return str(other)
    here = {file.stem for file in files}
    named = ((file, text) for file, text in _references_of(folder) if text.partition(".")[0] not in here)
    return next((f"{file}: {text}" for file, text in named), None)


def _is_ours(file: Path) -> bool:
    """Whether a file is shipped code of this polyrep, byte for byte."""
    rooms = (code for room in ROOMS.values() for code in code_of(room.model.__module__))
    shipped = [*Path(__file__).parent.glob("polyrep_*.py"), *rooms]
    return any(code.read_bytes() == file.read_bytes() for code in shipped if code.name == file.name)


def _refuse_unlisted(folder: Path) -> None:
    """InputError if a folder names something to import or to fetch that is on no list."""
    remedy = "Opening the model would run that code: read it, then pass --trust_remote_code."
    for file, reference in _module_types(folder):
        # PyLate's names are read as those of sentence-transformers' own classes.
        if not reference.startswith("pylate.") and _listed(reference) is None:
            raise InputError(
                f"{file}: names {reference!r}, no module of sentence-transformers or of polyrep's methods. {remedy}"
            )
    for file in sorted(folder.rglob("*config*.json")):
        for key, value in _items(read_json(file, object)):
            if "attn_implementation" in key and (kernel := next((t for t in _texts_in(value) if "/" in t), None)):
                raise InputError(f"{file}: {key} {kernel!r} is code of another repository. {remedy}")
            if not isinstance(value, str):
                continue
            if key in _CALLED and "." in value and value not in _ACTIVATIONS:
                raise InputError(f"{file}: {key} {value!r} is none of torch.nn. {remedy}")
            if key == "tokenizer_class" and "." in value and not value.startswith("sentence_transformers."):
                raise InputError(f"{file}: tokenizer_class {value!r} is none of sentence-transformers. {remedy}")


def _module_types(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every module that sentence-transformers would import, those of a Router too, and the file that names it."""
    listing = folder / "modules.json"
    yield from ((listing, part["type"]) for part in read_json(listing, list, type=str))
    for file in sorted(folder.rglob("*config.json")):
        for key, value in _items(read_json(file, object)):
            if key == "types" and isinstance(value, dict):
                yield from ((file, name) for name in value.values() if isinstance(name, str))


def _references_of(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every reference ``file.Class`` or ``OTHER/REPOSITORY--file.Class`` to code, and the file that names it.

    Such a reference may stand in the config of anything (model, tokenizer, processor, part, module) and at any depth.
    """
    for file in sorted(folder.rglob("*config*.json")):
        for key, value in _items(read_json(file, object)):
            if key == "auto_map":
                yield from ((file, text) for text in _texts_in(value))
    for file, reference in _module_types(folder):
        if not reference.startswith("sentence_transformers."):
            yield file, reference


def _items(content: Any) -> Iterator[tuple[str, Any]]:
    """Every key of parsed JSON with its value, at any depth."""
    if isinstance(content, dict):
        yield from content.items()
    for value in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from _items(value)


def _texts_in(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _texts_in(value)
