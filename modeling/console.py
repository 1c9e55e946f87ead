"""What a command prints reaches any console, or the command says that it cannot."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from .errors import InputError


@contextmanager
def console() -> Iterator[None]:
    r"""Let what runs inside print whatever it likes, wherever it is printed to.

    A character that the console's encoding lacks is printed as its escape, e.g. ``\u2192``. A stream that was closed
    before the program began takes everything and keeps nothing.

    Raises:
        InputError: What was printed could not be written, as to a full disk.
        SystemExit: The reader has gone, as of ``polyrep search ... | head -1``: 141, as a shell has it.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  stays open as long as we run
        elif hasattr(stream := getattr(sys, name), "reconfigure"):  # notebooks have streams of their own
            with suppress(OSError):  # one that cannot be flushed now is told of below
                stream.reconfigure(errors="backslashreplace")
    failed = False
    try:
        yield
    except OSError:
        failed = True
        raise
    finally:
        if (error := _lost(sys.stdout, failed)) is not None:
            if isinstance(error, BrokenPipeError):
                raise SystemExit(141) from None
            raise InputError(
                f"standard output: cannot be written ({error.strerror}), so what the command printed is lost. "
                "Make room, or send it elsewhere."
            ) from None


def _lost(stream: TextIO, failed: bool) -> OSError | None:
    """Why what was printed cannot be written, None if it can; then the rest goes nowhere, as does the interpreter's.

    Args:
        stream: Where it was printed.
        failed: Whether something could not be written, here or elsewhere: an unbuffered stream forgets what that was.
    """
    try:
        if failed and getattr(stream, "write_through", False):
            stream.write("\n")
        stream.flush()
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        return error
    return None


def say_below_launcher(message: str) -> None:
    """Print a refusal once more, when the launcher that started this program has ended.

    ``accelerate launch`` prints a traceback of its own below the last words of a program that ended with a status,
    unless it is asked not to (``--quiet``), and who reads the end of it finds no reason there. Only Linux tells when a
    process ends that is not one's own child; elsewhere nothing is printed again.
    """
    if os.environ.get("RANK", "0") != "0":  # one of several processes says it for all
        return
    parent = os.getppid()
    try:
        words = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
        launcher = os.pidfd_open(parent)
    except (AttributeError, OSError):
        return
    names = [os.path.basename(word) for word in words]
    launched = (b"accelerate", b"launch") in zip(names, names[1:], strict=False) or b"accelerate-launch" in names
    if not launched or {b"-q", b"--quiet"} & set(words):
        return
    try:
        sys.stderr.flush()
        if os.fork():
            return
    except OSError:  # it was said once, and there may be no memory to say it again
        return
    try:
        os.setsid()  # what ends the launcher does not end this
        if select.select([launcher], [], [], 60)[0]:
            os.write(2, f"{message}\n".encode(errors="backslashreplace"))
    finally:
        os._exit(0)
