"""Print the docstrings of a package's public objects, one JSON object a line: a program of its own.

    python -P docstrings.py PACKAGE ... [--skip MODULE ...]

:mod:`polyrep.data.python_docs` starts it, since importing a module runs it. It imports nothing of polyrep. What is
imported may print, raise, or try to reach further; it finds no terminal and no window, is refused networks and other
programs, and may write to a scratch folder (the working directory) alone. That is a fence against accidents, since
packages are what the user has installed and runs anyway; it holds no attacker. A module that hangs is for the caller
to stop: each is announced before it is imported.

Lines::

    {"importing": "json.tool"}
    {"skipped": "json.tool", "why": "SystemExit: 2"}
    {"name": "json.dumps", "class": "", "doc": "..."}       class: the class that it is, or is of
    {"done": "yes"}                                         the last, unless the process was ended
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import sys
import types
import warnings
from collections.abc import Callable, Container, Iterator
from typing import Any

PASSED_OVER = {"antigravity", "idlelib", "turtledemo", "this", "test", "posix", "nt"}
"""Of the standard library: what opens a window or a browser, tells a joke or tests; and what is documented as os."""

NOT_PUBLIC = {"tests", "test", "testing_utils", "test_utils", "conftest", "setup", "externals", "distutils"}
"""Names of modules in a package that are its own business."""

FORBIDDEN = (
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile", "os.kill"),
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostby", "socket.getnameinfo", "socket.send"),
    *("webbrowser.open", "os.chdir", "ftplib.", "smtplib.", "urllib.Request"),
)
"""Beginnings of audit events that no import has a reason for."""

CHANGES = {
    **dict.fromkeys(("os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.chown", "os.utime", "os.mkdir"), 1),
    **dict.fromkeys(("shutil.rmtree", "sqlite3.connect", "os.setxattr", "os.removexattr"), 1),
    **dict.fromkeys(("os.rename", "os.link", "os.symlink", "shutil.move", "shutil.copyfile"), 2),
}
"""Events that change something, and how many paths their arguments begin with; allowed in the scratch folder alone."""

IN_FOLDER = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 2, "os.rename": 2, "os.link": 2, "os.symlink": 2}
"""Of these, where arguments tell that the path is relative to an open folder."""


def main() -> None:
    """Read, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", nargs="+", help="importable names; stdlib: the standard library")
    parser.add_argument("--skip", nargs="*", default=[], help="modules that are known to hang")
    args = parser.parse_args()
    say = _own_channel()
    _forbid(os.path.realpath(os.getcwd()))
    warnings.simplefilter("ignore")
    tops = set(args.packages) - {"stdlib"}
    owners = tops | {f"_{top}" for top in tops}
    if "stdlib" in args.packages:
        tops |= {name for name in sys.stdlib_module_names - PASSED_OVER if not name.startswith("_")}
        owners |= sys.stdlib_module_names
    imported = []
    for name in sorted({found for top in tops for found in public_modules(top)} - set(args.skip)):
        say({"importing": name})
        try:
            imported.append(importlib.import_module(name))
        except BaseException as error:  # a module may raise SystemExit, and worse of its own
            say({"skipped": name, "why": f"{type(error).__name__}: {error}"[:200]})
    say({"importing": ""})
    for row in documented(imported, owners):
        say(row)
    say({"done": "yes"})


def _own_channel() -> Callable[[dict[str, str]], None]:
    """Keep standard output for this program; what others print goes nowhere."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nowhere, descriptor)

    def say(row: dict[str, str]) -> None:
        out.write(json.dumps(row) + "\n")
        out.flush()

    return say


def _forbid(scratch: str) -> None:
    """Refuse what an import has no business with, where Python says that it happens: no sandbox, but a fence."""

    def refuse(what: str) -> None:
        raise PermissionError(f"{what} while documentation is read")

    def check(event: str, path: Any) -> None:
        full = os.path.realpath(os.fsdecode(path))
        if (
            full != scratch
            and not full.startswith((scratch + os.sep, "/dev/null", "/dev/shm/"))
            and full != os.path.realpath(os.devnull)
        ):
            refuse(f"{event} of {full}")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or set(mode or "") & set("wax+")
            if writes and not isinstance(path, int):
                check(event, path)
        elif event in CHANGES:
            for path in arguments[: CHANGES[event]]:
                if not isinstance(path, int) and path != ":memory:":
                    check(event, path)
            # A path may be relative to an open folder, of which nobody knows where it is.
            if (
                any(isinstance(value, int) and value > 2 for value in arguments[CHANGES[event] :])
                and "mod" not in event
            ):
                refuse(f"{event} in another folder")
        elif event.startswith(FORBIDDEN):
            refuse(event)

    def open_here(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if dir_fd is not None and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refuse("os.open in another folder")
        return opened(path, flags, mode, dir_fd=dir_fd)

    opened, os.open = os.open, open_here  # its event does not tell of dir_fd
    with contextlib.suppress(ImportError):
        forking: Any = importlib.import_module("_posixsubprocess")  # which has no event
        forking.fork_exec = lambda *arguments: refuse("fork_exec")
    sys.addaudithook(hook)


def public_modules(top: str) -> Iterator[str]:
    """A package and the public modules right in it, which is where its documentation lists what there is."""
    yield top
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return
    # Of no places, iter_modules would take all there are.
    for module in pkgutil.iter_modules(spec and spec.submodule_search_locations or []):
        if not module.name.startswith("_") and module.name not in NOT_PUBLIC:
            yield f"{top}.{module.name}"


def documented(modules: list[types.ModuleType], owners: set[str]) -> Iterator[dict[str, str]]:
    """Each public object with a docstring of its own, once, by the shortest of its names.

    Args:
        modules: Where to look.
        owners: Top-level names of the modules whose objects count; a package imports from others, too.
    """
    found: dict[int, tuple[tuple[int, int, str], Any]] = {}
    for module in modules:
        for part, thing in sorted(vars(module).items()):
            with contextlib.suppress(Exception):  # an object of somebody else's may raise at any question
                if rank := rank_of(module, part, thing, owners):
                    found[id(thing)] = min(found.get(id(thing), (rank, thing)), (rank, thing), key=lambda e: e[0])
    for module in modules:
        if doc := own_doc(module):
            yield {"name": module.__name__, "class": "", "doc": doc}
    seen = set(found)
    for (*_, name), thing in sorted(found.values(), key=lambda entry: entry[0]):
        name = name.removeprefix("builtins.")
        if doc := own_doc(thing):
            yield {"name": name, "class": name if isinstance(thing, type) else "", "doc": doc}
        for part, member in members(thing, found, owners) if isinstance(thing, type) else ():
            if id(member) not in seen and (doc := own_doc(member)):
                seen.add(id(member))
                yield {"name": f"{name}.{part}", "class": name, "doc": doc}


def rank_of(module: types.ModuleType, part: str, thing: Any, owners: set[str]) -> tuple[int, int, str] | None:
    """How good a name of a module is for an object, least first; None if it is no public object of the package.

    Short names go first; then those that the object itself tells, or that the module exports.
    """
    if part.startswith("_") or isinstance(thing, types.ModuleType) or not callable(thing):
        return None
    home, name = getattr(thing, "__module__", None), f"{module.__name__}.{part}"
    if isinstance(home, str) and home.partition(".")[0] not in owners:
        return None
    away = name != f"{home}.{getattr(thing, '__qualname__', '')}"
    return name.count("."), away + (part not in (getattr(module, "__all__", None) or ())), name


def members(owner: type, public: Container[int], owners: set[str]) -> Iterator[tuple[str, Any]]:
    """What a class defines itself, or has of a base that its package hides: methods, properties and descriptors."""
    ours = (base for base in owner.__mro__[1:] if base.__module__.partition(".")[0] in owners)
    bases = [base for base in ours if id(base) not in public and base is not object]
    defined: dict[str, Any] = {}
    for base in (owner, *bases):
        defined = {**vars(base), **defined}
    for part, member in sorted(defined.items()):
        member = getattr(member, "__func__", member)
        lent = getattr(member, "__objclass__", owner) not in owner.__mro__  # as the old tensor types of torch have it
        if not part.startswith("_") and not isinstance(member, type) and not lent:
            if callable(member) or inspect.isdatadescriptor(member):
                yield part, member


def own_doc(thing: Any) -> str:
    """A docstring that is the object's own: not of its class, nor inherited; empty if there is none."""
    try:
        doc = thing.__doc__
        inherited = not isinstance(thing, type) and doc is type(thing).__doc__
        if isinstance(thing, type):
            inherited = any(doc is parent.__doc__ for parent in thing.__mro__[1:])
    except Exception:  # a descriptor of somebody else's
        return ""
    return inspect.cleandoc(doc) if isinstance(doc, str) and not inherited else ""


if __name__ == "__main__":
    main()
