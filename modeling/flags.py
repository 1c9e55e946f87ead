"""A dataclass as the flags of a command."""

from __future__ import annotations

from collections.abc import Sequence
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
