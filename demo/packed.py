"""Models small enough to lie in a repository: a byte a weight, without what the packaged all-MiniLM-L6-v2 has.

    python demo/packed.py models/late-interaction-minilm/final models/reinpool-minilm/head ... --output demo/models

:func:`pack` writes such a folder, :func:`unpack` makes the ordinary model folder of it again, which anything opens.
The result is the same to the byte on every machine: a head knows the model that it belongs to by a hash of weights.
A packed file of weights has a name of its own, so that nothing takes it for the model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from polyrep.errors import InputError
from polyrep.files import staged_folder
from polyrep.hub.code import code_of
from polyrep.hub.folder import PACKED, packaged_minilm
from polyrep.registry import ROOMS

SCALE = ".scale"
"""Ends the name of what a matrix of whole numbers is multiplied with, row by row."""

BORROWED = "borrowed"
"""In a file's metadata: tensor -> its name in the packaged MiniLM."""

SMALL = 4096
"""A tensor of no more numbers is kept as it is: a few bytes are not worth its precision."""

LEFT_OUT = ("README.md", "tokenizer.json", "*.py")
"""Files that the installed packages have or that say nothing to a model: the card, the tokenizer, the code."""


def pack(folder: Path, target: Path) -> Path:
    """Write a model folder small.

    A matrix becomes int8, with one scale for each row, whose largest number becomes 127. Small tensors, vectors and
    whole numbers stay as they are.

    Args:
        folder: A model folder of which each tensor is its own or one of the packaged MiniLM.
        target: Where to write; must not exist.

    Returns:
        ``target``.

    Raises:
        InputError: ``target`` exists, or the folder is packed already or has a vocabulary of its own.
    """
    if target.exists():
        raise InputError(f"{target}: exists already, and packing would mix two models. Remove it first.")
    if (folder / "tokenizer.json").is_file():
        own, theirs = (AutoTokenizer.from_pretrained(path).get_vocab() for path in (folder, packaged_minilm()))
        if own != theirs:
            raise InputError(
                f"{folder}: its vocabulary of {len(own):,} tokens is not all-MiniLM-L6-v2's, which unpacking would "
                "put in its place. Ship this model as it is."
            )
    if packed := next(folder.rglob(f"*{PACKED}"), None):
        raise InputError(f"{packed}: is packed already. Unpack its folder first, with --unpack.")
    known = {_digest(tensor): name for name, tensor in _minilm().items() if tensor.numel() > SMALL}
    with staged_folder(target) as staged:
        for file, written in _weights_beside_copies(folder, staged):
            tensors = load_file(file)
            borrowed = {
                name: known[digest] for name, tensor in tensors.items() if (digest := _digest(tensor)) in known
            }
            own = {name: tensor for name, tensor in tensors.items() if name not in borrowed}
            metadata = {BORROWED: json.dumps(borrowed, sort_keys=True)}
            save_file(_to_bytes(own), written.with_suffix(PACKED), metadata=metadata)
    return target


def unpack(folder: Path, target: Path) -> Path:
    """Make the model folder that :func:`pack` was given, up to the rounding of its weights.

    Args:
        folder: What ``pack`` wrote.
        target: Where to write; a folder that is there already is taken for the result of an earlier call.

    Returns:
        ``target``.

    Raises:
        InputError: The packaged MiniLM is missing, or a file of ``folder`` is not one that ``pack`` wrote.
    """
    if target.exists():
        return target
    minilm = _minilm()
    with staged_folder(target) as staged:
        if (folder / "tokenizer_config.json").is_file():
            AutoTokenizer.from_pretrained(packaged_minilm()).save_pretrained(staged)  # its settings follow
        for file, written in _weights_beside_copies(folder, staged):
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata() or {}
            if BORROWED not in metadata or not file.name.endswith(PACKED):
                raise InputError(f"{file}: says nothing of what it borrows, so it is no packed file. Pack the model.")
            borrowed = {name: minilm[source].clone() for name, source in json.loads(metadata[BORROWED]).items()}
            name = written.name.removesuffix(PACKED) + ".safetensors"
            save_file(_from_bytes(load_file(file)) | borrowed, written.with_name(name), metadata={"format": "pt"})
        _copy_code(staged)
    return target


def _to_bytes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Large matrices (rows, ...) as int8 and ``<name>.scale`` (rows, 1, ...) beside it."""
    packed = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.dim() < 2 or tensor.numel() <= SMALL:
            packed[name] = tensor
            continue
        scale = tensor.abs().flatten(1).amax(1).clamp_min(1e-12).div(127).view(-1, *[1] * (tensor.dim() - 1))
        packed[name], packed[name + SCALE] = (tensor / scale).round().to(torch.int8), scale
    return packed


def _from_bytes(packed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of :func:`_to_bytes`: one product of float32 for each number, the same everywhere."""
    return {
        name: tensor.float() * packed[name + SCALE] if name + SCALE in packed else tensor
        for name, tensor in packed.items()
        if not name.endswith(SCALE)
    }


def _copy_code(folder: Path) -> None:
    """Put the code of the installed package where the configs of a folder name it."""
    for config in folder.rglob("config.json"):
        for reference in json.loads(config.read_text(encoding="utf-8")).get("auto_map", {}).values():
            name = reference.partition(".")[0]
            modules = {room.model.__module__ for room in ROOMS.values()}
            for code in code_of(next(module for module in modules if module.endswith(f".{name}"))):
                shutil.copyfile(code, folder / code.name)


def _weights_beside_copies(folder: Path, staged: Path) -> Iterator[tuple[Path, Path]]:
    """Copy what is no weight, and yield the files that are, each with its place to be."""
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not any(file.match(pattern) for pattern in LEFT_OUT):
            written = staged / file.relative_to(folder)
            written.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".safetensors":
                yield file, written
            else:
                shutil.copyfile(file, written)


def _minilm() -> dict[str, torch.Tensor]:
    return load_file(packaged_minilm() / "model.safetensors")


def _digest(tensor: torch.Tensor) -> str:
    shape_and_type = f"{tuple(tensor.shape)} {tensor.dtype}".encode()
    return hashlib.sha256(shape_and_type + tensor.contiguous().numpy().tobytes()).hexdigest()


def main() -> None:
    """Pack each folder under the name of its run, or unpack it under its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="models/<run>/final or models/<run>/head")
    parser.add_argument("--output", type=Path, default=Path("demo/models"))
    parser.add_argument("--unpack", action="store_true", help="make model folders of packed ones")
    args = parser.parse_args()
    try:
        for folder in map(Path.resolve, args.folders):
            if not args.unpack:
                pack(folder, args.output / folder.parent.name)
            elif (target := args.output / folder.name).exists():
                raise InputError(f"{target}: exists already, perhaps of other weights. Remove it first.")
            else:
                unpack(folder, target)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
