"""The command line, whose verbs are those of :data:`COMMANDS`; the scripts at the repository's root call it too."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .console import console, say_below_launcher
from .errors import HALF, InputError, UsageError, first_line
from .files import disk_error, is_memory_error

COMMANDS = {
    "data": "data.command:data",
    "train": "cli:train",
    "evaluate": "cli:evaluate",
    "calibrate": "evaluation.calibrate:calibrate",
    "encode": "encoding.encode:encode",
    "index": "search.commands:index",
    "search": "search.commands:search",
    "export-onnx": "publishing.export:export_onnx",
    "publish": "publishing.publish:publish",
}
"""Verb -> module of polyrep and its function; imported only when it is asked for."""


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run one command; return its exit status: 0 done, 2 unusable input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments[0] if arguments else "--help"
    if verb not in COMMANDS:
        print(f"usage: polyrep {{{','.join(COMMANDS)}}} ... (each takes --help)")
        return 0 if verb in ("-h", "--help") else 2
    try:
        module, _, function = COMMANDS[verb].partition(":")
        with console():
            run = getattr(importlib.import_module(f".{module}", __package__), function)
            run(arguments[1:], prog=prog or f"polyrep {verb}")
    except InputError as error:
        return _refuse(str(error))
    except UsageError as error:
        say_below_launcher(error.message)
        raise
    except UnicodeEncodeError as error:
        if not any(HALF.search(word) for word in arguments):
            raise
        return _refuse(
            f"{error.object!r}: holds half of a surrogate pair, as bytes become that are not UTF-8, and a library "
            "takes UTF-8 alone. Write the text, or rename the file, in UTF-8."
        )
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if is_memory_error(error):
            return _refuse(
                f"{verb}: not enough memory ({first_line(error)}), so the work stops here. What was finished is kept. "
                "Take less at a time, e.g. with a smaller batch size or --max_length, or give it more."
            )
        if (refused := disk_error(error)) is None:
            raise
        return _refuse(
            f"{refused.filename or verb}: {refused.strerror}, so the work stops here. What was finished is kept. Make "
            "room there or name another place, then give the command again."
        )
    return 0


def _refuse(message: str) -> int:
    """Say why a command does no work; return its exit status."""
    print(f"error: {message}", file=sys.stderr)
    say_below_launcher(f"error: {message}")
    return 2


# Verbs of several parts, each imported only when its turn comes: a table need not wait for all that trains.


def train(argv: list[str], *, prog: str = "polyrep train") -> Path | None:
    """Train the run named first in ``argv``; measure and publish what comes of it where ``--push_to_hub`` asks.

    Returns:
        The folder of the trained model; None after ``--dry_run``.

    Raises:
        InputError: The run, a flag, the data or the backbone cannot be used, the loss stopped being finite, or what is
            trained could not be published: as far as can be known, this is said before it trains.
    """
    from .training.recipes import resolve
    from .training.train import run

    plan = resolve(argv, prog=prog)
    if not plan.args.push_to_hub:
        return run(plan)
    from .publishing.after_training import measure_and_publish, refuse_unpublishable

    texts = refuse_unpublishable(plan)
    folder = run(plan)
    if folder is not None:
        measure_and_publish(plan, folder, texts)
    return folder


def evaluate(argv: list[str], *, prog: str = "polyrep evaluate") -> dict[str, Any]:
    """Measure models on data sets, or with ``--frontier`` every way to make the index of one smaller."""
    if any(word.partition("=")[0] == "--frontier" for word in argv):
        from .evaluation.frontier.command import frontier

        return frontier(argv, prog=prog)
    from .evaluation.evaluate import evaluate

    return evaluate(argv, prog=prog)
