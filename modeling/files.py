"""Whole files or none: everything polyrep writes appears under its final name only once it is complete."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError, first_line


@contextmanager
def staged_folder(target: Path, *, merge: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside ``target`` that becomes ``target`` when the block ends without an error.

    After an error, Ctrl-C included, the staged folder is removed and ``target`` is as it was. After ``kill -9`` it
    stays under its hidden ``*.partial`` name, which nobody reads, until the next attempt on this machine removes it.

    Args:
        target: The folder to make.
        merge: Move the files one by one into an existing ``target``, keeping what else is there. Without it, an
            existing ``target`` (another process was faster with the same content) is left as it is.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent, re.escape(target.name))
    staged = _staged(target)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    try:
        yield staged
        if merge and target.exists():
            for file in sorted(path for path in staged.rglob("*") if path.is_file()):
                destination = target / file.relative_to(staged)
                destination.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, destination)
        else:
            try:
                os.rename(staged, target)
            except OSError:
                if not target.exists():
                    raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def refuse_unwritable(folder: Path, flag: str = "") -> None:
    """Refuse a folder that could not be written to, or made, before anything is computed for it; nothing is left.

    Args:
        folder: Where something is to be written.
        flag: What named it, for the message.

    Raises:
        InputError: It or a folder above it is a file, may not be written to, or lies on a full disk.
    """
    there = folder.absolute()
    while not os.path.lexists(there):
        there = there.parent
    said = f"{flag} {folder}".strip()
    if not there.is_dir():
        raise InputError(f"{said}: {there} is no folder, so nothing can be written there. Name another folder.")
    try:
        with tempfile.TemporaryFile(dir=there) as probe:
            probe.write(b"polyrep")
    except OSError as error:
        raise InputError(
            f"{said}: {there} cannot be written to ({error.strerror}). Name another folder, or make it writable."
        ) from None


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Yield a path near ``target`` that replaces it in one step when the block ends without an error.

    It lies in a folder of its own, since libraries write beside it, too. After ``kill -9`` that folder stays under its
    hidden name until :func:`remove_leftovers`.
    """
    staged = _staged(target)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        yield staged / target.name
        os.replace(staged / target.name, target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def remove_leftovers(folder: Path, name: str = ".+") -> None:
    """Remove what processes of this machine that no longer run have left unfinished in a folder.

    Args:
        folder: Where they wrote.
        name: Pattern of what they would have written.
    """
    ours = re.compile(rf"\.{name}\.{re.escape(socket.gethostname())}-(\d+)\.partial")
    for leftover in folder.iterdir():
        if (found := ours.fullmatch(leftover.name)) and not _is_running(int(found[1])):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def _staged(target: Path) -> Path:
    return target.with_name(f".{target.name}.{socket.gethostname()}-{os.getpid()}.partial")


def write_text(path: Path, text: str) -> None:
    r"""Replace ``path`` by ``text`` in one step, so that a reader sees the old file or the new one.

    A path in it may hold bytes that are not UTF-8: written as ``\udce9``, which JSON reads as what they were.
    """
    with staged_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: Any) -> None:
    """Replace ``path`` by ``content`` as indented JSON; a NaN is refused, since JSON has none."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, under another user
        return True
    return True


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as hex digits, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shipped_folder(name: str) -> Path:
    """Folder of data that comes with polyrep (``model_cards``, ``hub_configs``), in a wheel or in a clone."""
    inside = Path(__file__).parent / name
    return inside if inside.is_dir() else Path(__file__).parent.parent / name


def read_json(path: Path) -> Any:
    """Content of a JSON file, ``{}`` where there is none; InputError names a malformed line, or what bars it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg}). Fetch or save the model again."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({first_line(error)}). Fetch or save it again.") from None


def digest(content: Any) -> str:
    """A short hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
