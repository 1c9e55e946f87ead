"""What must hold of a repository before it is uploaded: it tells nothing of this machine, and others can open it."""

from __future__ import annotations

import ast
import getpass
import json
import mmap
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_token
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..errors import InputError
from ..files import read_json, shipped_folder, write_json
from ..hub.cards import ABSOLUTE_PATH, places_of_heads
from ..hub.folder import PREFIX, Encoder
from ..hub.forms import head_of, own_form
from ..registry import room_of
from . import doors
from .signatures import trials

TOLERANCE = 1e-4
"""Largest difference between a number here and through a door, relative to the largest of its vector if above one."""

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_ADDRESS = re.compile(r"""\b(?:https?|ftp|git|ssh|hf|s3|gs)://[^\s"'<>()|,\\`]+""")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
"""Where any piece of any text may be a word."""

_NOBODY = {"root", "user", "admin", "ubuntu", "debian", "runner", "docker", "jovyan", "app", "test", "model", "data"}
"""Names of accounts that everybody has, and that tell of nobody."""

_PHRASE = 60
"""Characters of a string that may be a name or a part of a table; longer ones are prose."""


def refuse_secrets(folder: Path, repo: str = "") -> None:
    """Refuse a folder that tells of this machine: a token, a path, a user.

    A user's name is looked for as a word where names of places and people come from, in configs and in the tables and
    commands of a card: in its prose, and in vocabularies, it is more likely a word. One that polyrep itself writes
    there (an account ``train``, ``python`` or ``cosine``) is not looked for: it would stand there whoever made it.

    Args:
        folder: The repository to be.
        repo: Its name, which is public and may be the user's.

    Raises:
        InputError: File, line and what was found; a token is not repeated.
    """
    token, user = get_token(), _user()
    places = (str(Path.home()), os.getcwd(), tempfile.gettempdir())
    here = [place for place in places if len(Path(place).parts) > 2]  # not /root or /tmp, which tell nothing
    tells = user and len(user) > 2 and user not in _NOBODY | set(repo.split("/")) | own_words()
    name = re.compile(rf"(?<![\w-]){re.escape(user)}(?![\w-])") if tells else None
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        for number, line in _lines(file):
            text = _ADDRESS.sub("", line)
            found = None
            if _TOKEN.search(line) or token and token in line:
                found = "a token of the Hub"
            elif file.name in _VOCABULARIES:
                continue
            elif match := ABSOLUTE_PATH.search(text):
                found = f"the path {match[0]}"
            elif place := next((place for place in here if place in text), None):
                found = f"the path {place}"
            elif (
                name
                and file.suffix != ".py"
                and (file.suffix != ".md" or line.startswith(("|", "Made by")))
                and name.search(text)
            ):
                found = f"the user name {user}"
            if found:
                source = "training.json or the results" if file.suffix in (".md", ".yaml") else "the model's folder"
                raise InputError(
                    f"{file.relative_to(folder)}{f':{number}' if number else ''}: holds {found} of the machine it was "
                    f"made on, for everybody to read. Nothing was uploaded; it comes from {source}: mend it there."
                )


@cache
def own_words() -> frozenset[str]:
    """Words that polyrep writes into configs, tables and commands: of its flags, strings, templates and runs."""
    package = Path(__file__).parent.parent
    texts = ["python accelerate launch polyrep", *(file.stem for file in package.rglob("*.py"))]
    for file in sorted(package.rglob("*.py")):
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        messages = {part for node in nodes if isinstance(node, ast.Raise) for part in ast.walk(node)}
        for node in nodes:
            if node in messages:  # prose, of which no card is made
                continue
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) <= _PHRASE:
                texts.append(node.value)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):  # a field, hence a flag
                texts.append(node.target.id)
    for name, pattern in (("model_cards", "*.md"), ("hub_configs", "*/*.*")):
        for file in shipped_folder(name).glob(pattern):
            texts += [line for line in file.read_text(encoding="utf-8").splitlines() if len(line) <= 2 * _PHRASE]
    return frozenset(word for text in texts for word in re.findall(r"[\w-]+", text))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # as in a container, whose users have no names
        return ""


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Numbered texts of a file: of weights their header, of graphs whatever looks like the place of a source file."""
    if file.suffix == ".safetensors":
        with file.open("rb") as weights:
            header = json.loads(weights.read(int.from_bytes(weights.read(8), "little")))
        yield 0, json.dumps(header.get("__metadata__", {}))
    elif file.suffix in (".onnx", ".data") and file.stat().st_size:
        with file.open("rb") as graph, mmap.mmap(graph.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for match in re.finditer(rb"[\x20-\x7e]{3,}\.py\b", content):
                yield 0, match[0].decode()
    elif file.suffix not in (".png", ".model"):
        with file.open(encoding="utf-8", errors="replace") as lines:
            yield from enumerate(lines, start=1)


def verify(folder: Path, model: Encoder | PreTrainedModel, trusted: bool = True) -> None:
    """Open a folder through every door in a process without polyrep, and compare with the model it was made of.

    Args:
        folder: The repository to be.
        model: What it was made of.
        trusted: Whether code in the folder may run.

    Raises:
        InputError: A door does not open, or gives something else.
    """
    wanted: list[tuple[list[str], dict[str, torch.Tensor]]] = []  # a door, and what it must give
    if not isinstance(model, PreTrainedModel):
        vectors = doors.encoded(model)
        wanted.append((["family", type(model).__name__], vectors))
        if (read_json(folder / "config.json", model_type=str).get("model_type") or "").startswith(PREFIX):
            lengthened = read_json(folder / "sentence_bert_config.json").get("query_expansion")
            alike = {name: v for name, v in vectors.items() if not (lengthened and name.startswith("query/"))}
            wanted.append((["transformers"], alike))
    with tempfile.TemporaryDirectory() as scratch:
        calls: dict[str, list[dict[str, Any]]] = {}
        for subfolder, (head, owner) in _heads(model).items():
            calls[subfolder], expected = _called(head, Path(scratch), subfolder)
            if subfolder or head is model:  # else AutoModel opens the whole
                wanted.append((["head", subfolder], expected))
            if owner:
                wanted.append((["module", subfolder, _reference(owner)], expected))
        job = {"folder": str(folder.resolve()), "trusted": trusted, "doors": [door for door, _ in wanted]}
        said = _open_elsewhere(job | {"trials": calls}, Path(scratch))
        for number, (door, expected) in enumerate(wanted):
            file = Path(scratch) / f"{number}.safetensors"
            if not file.is_file():
                raise InputError(
                    f"{' '.join(filter(None, door))}: does not open in a process without polyrep: "
                    f"{said}. Nothing was uploaded; mend the folder."
                )
            _compare(" ".join(filter(None, door)), load_file(file), expected)


def _heads(model: Encoder | PreTrainedModel) -> dict[str, tuple[PreTrainedModel, type | None]]:
    """Subfolder -> the head that is opened there, and the class of its module; the root is an empty name."""
    if isinstance(model, PreTrainedModel):
        room = room_of(model.config.model_type)
        return {"": (model, room.module if room else None)}
    modules: dict[str, Any] = dict(model.named_children())
    found: dict[str, tuple[PreTrainedModel, type | None]] = {}
    for place in places_of_heads(model):
        owner = modules[place.partition("_")[0] or str(len(modules) - 1)]
        if len(modules) > 1:
            found[place] = owner.model, type(owner)
        elif (room := own_form(model)) and room.head:
            found[place] = head_of(owner.model, room.head), room.module
    return found


def _called(
    head: PreTrainedModel, scratch: Path, subfolder: str
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Calls of a head, their inputs in files, and what they give here."""
    calls: list[dict[str, Any]] = [
        {"inputs": inputs, "method": graph.method, "fixed": dict(graph.fixed), "outputs": list(graph.outputs)}
        for graph, inputs in trials(head)
    ]
    expected = doors.tried(head, calls)
    for number, call in enumerate(calls):
        name = f"{subfolder}-{number}.inputs.safetensors"
        save_file(call["inputs"], scratch / name)
        call["inputs"] = name
    return calls, expected


def _open_elsewhere(job: dict[str, Any], scratch: Path) -> str:
    """Run ``doors.py`` in a process without polyrep, tokens and the Hub; the last line that it says."""
    file = scratch / "job.json"
    write_json(file, job)
    secret = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # what opens a model needs none
    environment = {name: value for name, value in os.environ.items() if name not in secret}
    environment |= {
        "HF_TOKEN_PATH": f"{scratch}/none",
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(scratch),
        "CUDA_VISIBLE_DEVICES": "",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    script = [sys.executable, "-P", str(Path(doors.__file__).resolve()), str(file)]
    ran = subprocess.run(script, capture_output=True, text=True, env=environment, cwd=scratch, check=False)
    return (ran.stderr.strip() or "it says nothing").splitlines()[-1].rstrip(".")


def _compare(door: str, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    if missing := sorted(set(expected) ^ set(found)):
        raise InputError(f"{door}: gives other parts than the model, e.g. {missing[0]}. Nothing was uploaded.")
    for name, ours in expected.items():
        theirs = found[name]
        scale = max(1.0, float(ours.abs().max())) if ours.numel() else 1.0
        same = theirs.shape == ours.shape
        largest = float((theirs - ours).abs().max()) if same and ours.numel() else 0.0
        if not same or not largest <= TOLERANCE * scale:  # NaN is not at most anything
            difference = f"differs by {largest:.3g}" if same else f"has shape {tuple(theirs.shape)}"
            raise InputError(
                f"{door}: opened without polyrep, {name} {difference} from the folder's own {tuple(ours.shape)}, so "
                "users would get another model. Nothing was uploaded; save the model again."
            )


def _reference(module: type) -> str:
    """A module's class as folders name it: ``modeling_room.Class``."""
    return f"{module.__module__.rpartition('.')[2]}.{module.__name__}"
