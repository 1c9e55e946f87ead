"""The verb ``data``: what sets there are by name, what one of them is, and a copy of it."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from ..files import read_json, staged_folder
from .catalog import CATALOG, NamedSet
from .named import among_own, cache_folder, differences, disk_errors, fetched, in_cache, is_path, located
from .python_docs import is_python_docs


def data(argv: Sequence[str], *, prog: str = "polyrep data") -> None:
    """List the sets that are known by name, show one, or get it.

    Raises:
        InputError: The name is unknown, or the set cannot be fetched, checked or written.
    """
    parser = argparse.ArgumentParser(prog=prog, description="Data sets by name, as --dataset takes them.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="all there are, and which of them lie on this machine")
    show = verbs.add_parser("show", help="task, size, licence, origin and hashes of one")
    get = verbs.add_parser("get", help="fetch one and check it; prints its folder")
    for one in (show, get):
        one.add_argument("name", help="of the list; python_docs:PACKAGE,PACKAGE; or a folder in POLYREP_DATA")
    get.add_argument("--output", type=Path, help="put a copy into this new folder, in BEIR layout")
    get.add_argument("--any_content", action="store_true", help="accept what differs from the hashes on record")
    args = parser.parse_args(argv)
    if args.verb == "list":
        print(listing())
    elif args.verb == "show":
        print(shown(args.name))
    else:
        print(got(args.name, args.output, any_content=args.any_content))


def listing() -> str:
    """The table, one line a set."""
    lines = [("NAME", "DOCUMENTS", "HERE", "LICENCE", "TASK")]
    for entry in CATALOG.values():
        there = is_python_docs(entry.name) or here(entry.name)
        lines.append((entry.name, size_of(entry), "yes" if there else "no", entry.licence, entry.task))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    table = ["  ".join([*map(str.ljust, line[:4], widths), line[4]]) for line in lines]
    return "\n".join([*table, "", f"Sets that were fetched lie in {cache_folder()}."])


def size_of(entry: NamedSet) -> str:
    """Documents of a set."""
    return f"{entry.documents:,}" if entry.documents else "about 13,600"


def here(name: str) -> Path | None:
    """Where a set lies on this machine already; what is read from the machine itself is there in any case."""
    if is_path(name):
        return Path(name)
    if (own := among_own(name)) is not None:
        return own
    if is_python_docs(name):
        return Path(located(name))
    return folder if (entry := CATALOG.get(name)) and (folder := in_cache(entry)).is_dir() else None


def shown(name: str) -> str:
    """What there is to know of a set; nothing is fetched for it, and ``python_docs`` is read."""
    entry, place = CATALOG.get(name), here(name)
    if entry is None and place is None:
        located(name)  # refuses what is no name
    lines = [name]
    if entry:
        lines += [f"  task       {entry.task}", f"  documents  {size_of(entry)}", f"  licence    {entry.licence}"]
        lines += [f"  credit     {entry.citation}"]
        lines += [f"  origin     {entry.origin} at {entry.commit}"] if entry.origin else []
        lines += [f"  bring      {entry.bring}"] if entry.bring else []
        lines += [f"  sha256     {part} {value}" for part, value in entry.sha256.items()]
    lines.append(f"  here       {place or 'no'}")
    if place and entry and entry.sha256:
        differing = differences(place, entry)
        lines.append(f"  verified   {'no: ' + '; '.join(differing) if differing else 'yes, the hashes on record'}")
    for key, value in read_json(place / "provenance.json").items() if place and is_python_docs(name) else ():
        if isinstance(value, dict):
            lines.append(f"  {key.replace('_', ' ')} ({len(value)}):")
            lines += [f"    {part}: {of}" for part, of in value.items()]
        else:
            lines.append(f"  {key:<10} {value}")
    return "\n".join(lines)


def got(name: str, output: Path | None = None, *, any_content: bool = False) -> Path:
    """The folder of a set, which is fetched if it is not there; with ``output``, a copy of it in that new folder.

    Raises:
        InputError: It cannot be had, ``output`` exists, or cannot be written.
    """
    if output and output.exists():
        raise InputError(f"--output {output}: exists already, and would be mixed with the set. Name a new folder.")
    entry = CATALOG.get(name)
    if entry and any_content and here(name) is None:
        place = fetched(entry, any_content=True)
    else:
        place = Path(located(name))
    if not place.is_dir():
        raise InputError(f"{name}: no folder but a file or a data set of the Hub, which is read as it is. Name it so.")
    if output is None:
        return place
    with disk_errors(name, output.parent), staged_folder(output) as staged:
        shutil.copytree(place, staged, dirs_exist_ok=True)
    return output
