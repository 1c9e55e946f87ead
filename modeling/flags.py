"""A dataclass as the flags of a command, and the command that says what a dataclass holds."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any


def parse(
    arguments: type, argv: Sequence[str], prog: str, about: str, metavar: str, wanted: str, **options: Any
) -> tuple[Any, Any]:
    """The flags of a command, one for each field of ``arguments``, and what it is about, which needs no flag.

    Args:
        arguments: A dataclass as HfArgumentParser takes it.
        argv: The command line after the verb.
        prog: Program and verb, for messages.
        about: What the command does.
        metavar: Name of what it is about, e.g. ``FOLDER``.
        wanted: Help on that.
        options: Further settings of it, e.g. ``nargs``.
    """
    from transformers import HfArgumentParser  # which takes seconds, that a mistyped verb need not wait for

    parser = HfArgumentParser([arguments], prog=prog, allow_abbrev=False, description=about)  # type: ignore[list-item]
    parser.add_argument("given", metavar=metavar, help=wanted, **options)
    flags, named = parser.parse_args_into_dataclasses(list(argv), look_for_args_file=False)
    return flags, named.given


def command_line(prog: str, words: Sequence[str], launcher: str = "python") -> str:
    """What a user typed.

    Args:
        prog: ``polyrep VERB``, or a script of the repository.
        words: What stood behind it.
        launcher: What stands before a script.
    """
    return shlex.join([*(launcher.split() if prog.endswith(".py") else []), *prog.split(), *words])


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """The flags that say these values; None has no flag."""
    words: list[str] = []
    for name, value in values.items():
        if value is None:
            continue
        said = value if isinstance(value, list | tuple) else [value]
        words += [f"--{name}", *(str(part).lower() if isinstance(part, bool) else str(part) for part in said)]
    return words


def changed_fields(arguments: Any) -> dict[str, Any]:
    """Fields of a dataclass that differ from their defaults."""
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(arguments)
        if field.init
    }
    return {name: value for name, value in vars(arguments).items() if name in defaults and value != defaults[name]}
