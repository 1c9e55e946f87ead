"""A dataclass as the flags of a command, and the command that says what a dataclass holds."""

from __future__ import annotations

import math
import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, NoReturn

from .errors import InputError, UsageError

_RANGES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    (
        f"a whole number from 1 to {2**31 - 1}",
        lambda value: 1 <= value < 2**31 and value == int(value),
        (
            *("batch_size", "gradient_accumulation_steps", "max_length", "query_texts", "cloze_sentences", "depth"),
            *("k", "candidates", "dataloader_prefetch_factor", "settings_tried", "window", "stride"),
        ),
    ),
    (
        f"a whole number from 0 to {2**31 - 1}",
        lambda value: 0 <= value < 2**31 and value == int(value),
        ("shard_size", "negatives", "lora_rank", "save_total_limit", "dataloader_num_workers"),
    ),
    ("a whole number from 0 to 100", lambda value: 0 <= value <= 100 and value == int(value), ("hard_negatives",)),
    (
        "a whole number from 0 to 4294967295",
        lambda value: 0 <= value < 2**32 and value == int(value),
        ("seed", "data_seed"),
    ),
    ("-1 for none, or a whole number from 1 on", lambda value: value == -1 or value >= 1, ("max_steps",)),
    (
        "a number from 0 on",
        lambda value: 0 <= value < math.inf,
        ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "eval_delay", "hybrid_weight"),
    ),
    (
        "a number above 0",
        lambda value: 0 < value < math.inf,
        ("num_train_epochs", "adam_epsilon", "logging_steps", "save_steps", "eval_steps", "scale"),
    ),
    (
        "a number from 0 to 1",
        lambda value: 0 <= value <= 1,
        ("negative_margin", "warmup_ratio", "label_smoothing_factor"),
    ),
    ("a number from 0 to below 1", lambda value: 0 <= value < 1, ("adam_beta1", "adam_beta2")),
    ("a number", lambda value: value == value, ()),
)
"""What flags of these names may be, of all commands: ``batch_size`` whatever stands before it, the last any other."""


def refuse_out_of_range(values: Mapping[str, Any]) -> None:
    """InputError that names the first number which its flag cannot be; what is no number is passed over."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        kind = "batch_size" if name.endswith("batch_size") else name
        wanted, fits, _ = next((one for one in _RANGES if kind in one[2]), _RANGES[-1])
        if not fits(value):
            raise InputError(f"--{name} {value}: is out of its range. Use {wanted}.")


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

    Raises:
        InputError: A number is out of its flag's range.
    """
    from transformers import HfArgumentParser  # which takes seconds, that a mistyped verb need not wait for

    parser = HfArgumentParser([arguments], prog=prog, allow_abbrev=False, description=about)  # type: ignore[list-item]
    say_usage(parser)
    parser.add_argument("given", metavar=metavar, help=wanted, **options)
    flags, named, unknown = parser.parse_args_into_dataclasses(
        list(argv), look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    refuse_out_of_range(vars(flags))
    return flags, named.given


def say_usage(parser: ArgumentParser) -> None:
    """Let a parser end the program by UsageError, with the words that argparse has for it."""

    def error(message: str) -> NoReturn:
        said = f"{parser.prog}: error: {message}"
        parser.print_usage(sys.stderr)
        print(said, file=sys.stderr)
        raise UsageError(said)

    parser.error = error  # type: ignore[method-assign]


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
