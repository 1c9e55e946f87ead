"""The command line, whose verbs are those of :data:`COMMANDS`; the scripts at the repository's root call it too."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from .errors import InputError

COMMANDS = {
    "train": "training.train:train",
    "evaluate": "evaluation.evaluate:evaluate",
    "encode": "encoding.encode:encode",
    "index": "search.commands:index",
    "search": "search.commands:search",
    "export-onnx": "publishing.export:export_onnx",
    "publish": "publishing.publish:publish",
}
"""Verb -> module of polyrep and its function; imported only when it is asked for."""

FRONTIER = "evaluation.frontier.command:frontier"
"""What ``evaluate --frontier`` is, with all that fits heads: an ordinary table need not wait for it."""


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run one command; return its exit status: 0 done, 2 unusable input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments[0] if arguments else "--help"
    if verb not in COMMANDS:
        print(f"usage: polyrep {{{','.join(COMMANDS)}}} ... (each takes --help)")
        return 0 if verb in ("-h", "--help") else 2
    try:
        command = COMMANDS[verb]
        if verb == "evaluate" and any(word.partition("=")[0] == "--frontier" for word in arguments):
            command = FRONTIER
        module, _, function = command.partition(":")
        run = getattr(importlib.import_module(f".{module}", __package__), function)
        run(arguments[1:], prog=prog or f"polyrep {verb}")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
