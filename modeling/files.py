"""Whole files or none: everything polyrep writes appears under its final name only once it is complete."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import reprlib
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from .errors import InputError, first_line

_FULL = {code: os.strerror(code) for code in (errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EDQUOT)}
_REFUSED = {*_FULL, errno.EACCES, errno.EPERM, errno.EIO}
"""What a disk that is full, too small or not to be written to answers."""


def disk_error(error: BaseException) -> OSError | None:
    """An error as that of a disk which takes no more, whatever library raises it; None for any other error."""
    if isinstance(error, OSError):
        return error if error.errno in _REFUSED or isinstance(error, FileExistsError | NotADirectoryError) else None
    if isinstance(error, ValueError) or not isinstance(error, Exception):
        return None
    said = str(error)  # safetensors and faiss repeat what the system says, torch does not
    code = next((code for code, words in _FULL.items() if words in said or f"os error {code})" in said), None)
    if code is None and ("PytorchStreamWriter" in said or "unexpected pos" in said):
        return OSError(errno.EIO, "a file could not be written whole")
    return None if code is None else OSError(code, os.strerror(code))


def is_memory_error(error: BaseException) -> bool:
    """Whether there was not enough memory, whatever library says so."""
    said = str(error)
    words = ("can't allocate memory", "not enough memory", "out of memory", "can't start new thread")
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(part in said for part in words)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Have what a full or read-only disk raises come as an OSError with a file name: ``place`` where none is told."""
    try:
        yield
    except Exception as error:
        refused = disk_error(error)
        if refused is None:
            raise
        if refused.filename is None:
            refused.filename = str(place)
        if refused is error:
            raise
        raise refused from error


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
        with writing(target):
            yield staged
        if merge and target.exists():
            for file in sorted(path for path in staged.rglob("*") if path.is_file()):
                destination = target / file.relative_to(staged)
                destination.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, destination)
        else:
            try:
                with suppress(OSError):
                    target.rmdir()  # an empty one, which Windows renames nothing to
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
        with suppress(FileNotFoundError):
            os.stat(folder)  # which no name may be too long for
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
        with writing(target):
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
        if (found := ours.fullmatch(leftover.name)) and not psutil.pid_exists(int(found[1])):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def _staged(target: Path) -> Path:
    return target.with_name(f".{target.name}.{socket.gethostname()}-{os.getpid()}.partial")


def write_text(path: Path, text: str) -> None:
    r"""Replace ``path`` by ``text`` in one step, so that a reader sees the old file or the new one.

    The bytes are the same on every system. A path in it may hold some that are not UTF-8: written as ``\udce9``, which
    JSON reads as what they were.
    """
    with staged_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_json(path: Path, content: Any) -> None:
    """Replace ``path`` by ``content`` as indented JSON; a NaN is refused, since JSON has none."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as hex digits, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


LARGE = 64 * 2**20
"""Bytes from which on a file's hash is remembered."""


def known_sha256(path: Path) -> str:
    """:func:`file_sha256`, where a large file is read again only if it was written since this user last asked."""
    state = path.stat()
    if state.st_size < LARGE:
        return file_sha256(path)
    kept = user_cache() / "sha256" / digest([str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ino])
    with suppress(OSError, UnicodeDecodeError):
        if len(known := kept.read_text(encoding="ascii")) == 64:
            return known
    found = file_sha256(path)
    with suppress(OSError):  # a cache that cannot be written to costs time alone
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(kept, found)
    return found


def user_cache() -> Path:
    """Where polyrep keeps what is this user's: ``$POLYREP_CACHE``, or ``polyrep`` in the user's cache."""
    if folder := os.environ.get("POLYREP_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polyrep"


def shipped_folder(name: str) -> Path:
    """Folder of data that comes with polyrep (``model_cards``, ``hub_configs``), in a wheel or in a clone."""
    inside = Path(__file__).parent / name
    return inside if inside.is_dir() else Path(__file__).parent.parent / name


DEEPEST = 100
"""Most values of a JSON file inside each other; libraries that walk through it stop at a depth of their own."""


def read_json(
    path: Path, expect: Any = dict, /, *, remedy: str = "Fetch or save the model again.", **fields: type
) -> Any:
    """Content of a JSON file, an empty one where there is no file.

    Args:
        path: The file.
        expect: What it holds: ``dict`` for an object, ``list`` for a list of objects, ``object`` for anything.
        remedy: What to do about one that is damaged.
        fields: Type of fields that the caller reads: of an object where they are there and not null, of each object
            of a list always. ``list`` stands for a list of texts.

    Raises:
        InputError: It cannot be read, holds something else, or is no JSON; with the line where there is one.
    """
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        return expect()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)}). {remedy}") from None
    except (ValueError, RecursionError) as error:
        why = str(error).partition(";")[0]
        where = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else str(path)
        if isinstance(error, json.JSONDecodeError):
            why = "a byte order mark, which UTF-8 has none of" if "BOM" in error.msg else error.msg
        elif isinstance(error, UnicodeDecodeError):
            why = f"byte {error.start} is no UTF-8"
        raise InputError(f"{where}: not valid JSON ({why}). {remedy}") from None
    if _deeper(content, DEEPEST):
        raise InputError(f"{path}: holds more than {DEEPEST} values inside each other. {remedy}")
    if not isinstance(content, expect):
        wanted = "an object" if expect is dict else "a list of objects"
        raise InputError(f"{path}: holds {reprlib.repr(content)}, not {wanted}. {remedy}")
    for part in content if expect is list else [content]:
        if not isinstance(part, dict) and expect is not object:
            raise InputError(f"{path}: its list holds {reprlib.repr(part)}, not an object. {remedy}")
        for name, kind in fields.items():
            value: Any = part.get(name)
            texts = value if kind is list and isinstance(value, list) else ()
            fits = isinstance(value, kind) and all(isinstance(item, str) for item in texts)
            if not fits and (value is not None or expect is list):
                names: dict[type, str] = {str: "a text", list: "a list of texts", dict: "an object"}
                wanted = names[kind]
                raise InputError(f"{path}: {name} is {reprlib.repr(value)}, not {wanted}. {remedy}")
    return content


def _deeper(content: Any, depth: int) -> bool:
    """Whether parsed JSON goes deeper than that."""
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return depth < 0 or any(_deeper(part, depth - 1) for part in parts)


def digest(content: Any) -> str:
    """A short hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
