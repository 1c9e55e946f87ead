"""A Python that has imported torch and what stands on it before it is asked for anything.

Those imports take seconds, and tests start a hundred programs: trainings in two processes, runs that are killed,
folders that are opened where polyrep is not. So one process imports once and forks for each program. :func:`python`
names an executable that is used as Python is: it takes Python's arguments, and its working directory, environment,
standard streams, signals and exit status are those of the program.

polyrep is not among what has been imported, so a program without it is as far from it as in a fresh interpreter.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SESSION = os.environ.setdefault("POLYREP_TEST_SESSION", str(os.getpid()))
"""The process of pytest that hands tests to workers: all of them share one server, which ends when it does."""

if "POLYREP_TEST_FOLDER" not in os.environ:
    os.environ["POLYREP_TEST_FOLDER"] = tempfile.mkdtemp(prefix="warm-")
    atexit.register(shutil.rmtree, os.environ["POLYREP_TEST_FOLDER"], ignore_errors=True)
FOLDER = Path(os.environ["POLYREP_TEST_FOLDER"])


def python() -> str:
    """The executable; the first call of a session starts the server behind it."""
    executable, address = FOLDER / "python", FOLDER / "socket"
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not executable.exists():
            _start(address)
            client = Path(__file__).with_name("client.py").read_text(encoding="utf-8")
            executable.write_text(f"#!{sys.executable} -IS\n{client}\nmain({str(address)!r})\n", encoding="utf-8")
            executable.chmod(0o700)
    return str(executable)


def _start(address: Path) -> None:
    """Start the server, and wait until it listens."""
    # A process with threads cannot be forked, and each of these would start some as it is imported.
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    command = [sys.executable, str(Path(__file__).with_name("server.py")), str(address), SESSION]
    with (FOLDER / "log").open("wb") as log:
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | single, start_new_session=True
        )
    while not address.exists():
        assert server.poll() is None, (FOLDER / "log").read_text(encoding="utf-8")
        time.sleep(0.02)
