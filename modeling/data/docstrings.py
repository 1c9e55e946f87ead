"""Print the docstrings of a package's public objects, one JSON object a line: a program of its own.

    python -P docstrings.py PACKAGE ... [--skip MODULE ...]

:mod:`polyrep.data.python_docs` starts it, since importing a module runs it. It imports nothing of polyrep. What is
imported may print, raise, or try to reach further; it finds no terminal, no window, no network, no other program, and
a scratch folder (the working directory) as the only place to write to. A module that hangs is for the caller to stop:
each is announced before it is imported.

Lines::

    {"importing": "json.tool"}
    {"skipped": "json.tool", "why": "SystemExit: 2"}
    {"name": "json.dumps", "class": "", "doc": "..."}       class: the class that it is, or is of
    {"done": "yes"}                                         the last, unless the process was ended
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

PASSED_OVER = {"antigravity", "idlelib", "turtledemo", "this", "test", "posix", "nt"}
"""Of the standard library: what opens a window or a browser, tells a joke or tests; and what is documented as os."""

NOT_PUBLIC = {"tests", "test", "testing_utils", "test_utils", "conftest", "setup", "externals", "distutils"}
"""Names of modules in a package that are its own business."""

FORBIDDEN = (
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.startfile", "os.kill"),
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "webbrowser.open"),
)
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
"""Audit events: what no import may do, and what it may do in the scratch folder alone."""


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
    """Refuse, by an audit hook, what an import has no business with."""
    inside = (scratch + os.sep, "/dev/null", "/dev/shm/", os.devnull)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or set(mode or "") & set("wax+")
            if not writes or isinstance(path, int):
                return
        elif event in CHANGES:
            path = arguments[0]
        elif event.startswith(FORBIDDEN):
            raise PermissionError(f"{event} while documentation is read")
        else:
            return
        path = os.path.realpath(os.fsdecode(path))
        if path != scratch and not path.startswith(inside):
            raise PermissionError(f"{event} of {path} while documentation is read")

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
    found: dict[int, tuple[tuple[int, bool, str], str, Any]] = {}

    def meet(name: str, thing: Any) -> None:
        home = f"{getattr(thing, '__module__', None)}.{getattr(thing, '__qualname__', '')}"
        rank = (name.count("."), name != home, name)
        if id(thing) not in found or rank < found[id(thing)][0]:
            found[id(thing)] = (rank, name, thing)

    for module in modules:
        for name, thing in sorted(vars(module).items()):
            if name.startswith("_") or isinstance(thing, types.ModuleType) or not callable(thing):
                continue
            home = getattr(thing, "__module__", None)
            if not isinstance(home, str) or home.partition(".")[0] in owners:
                meet(f"{module.__name__}.{name}", thing)
    for module in modules:
        if doc := own_doc(module):
            yield {"name": module.__name__, "class": "", "doc": doc}
    seen: set[int] = set()
    for _, name, thing in sorted(found.values(), key=lambda entry: entry[0]):
        name = name.removeprefix("builtins.")
        if doc := own_doc(thing):
            yield {"name": name, "class": name if isinstance(thing, type) else "", "doc": doc}
        for part, member in sorted(vars(thing).items()) if isinstance(thing, type) else ():
            member = getattr(member, "__func__", member)
            if part.startswith("_") or isinstance(member, type) or id(member) in seen | found.keys():
                continue
            if (callable(member) or inspect.isdatadescriptor(member)) and (doc := own_doc(member)):
                seen.add(id(member))
                yield {"name": f"{name}.{part}", "class": name, "doc": doc}


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
