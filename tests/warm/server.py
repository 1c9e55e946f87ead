"""Imports what takes seconds, then forks a process for each program that a client asks for.

    python server.py ADDRESS SESSION

It listens on the Unix socket ADDRESS, and ends when the process SESSION has ended.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import traceback
import types
from typing import Any

IMPORTED = """
    accelerate.commands.launch datasets jinja2 matplotlib.pyplot pandas peft PIL.Image
    scipy.cluster.hierarchy scipy.stats sentence_transformers torch.distributed.run transformers.hf_argparser
    transformers.models.auto.modeling_auto transformers.models.auto.processing_auto
    transformers.models.bert.modeling_bert transformers.models.bert.tokenization_bert
    transformers.models.blip.modeling_blip transformers.models.clip.modeling_clip
    transformers.models.siglip.modeling_siglip transformers.trainer yaml
"""
"""What polyrep imports, at once or when it is used."""


def serve(address: str, session: int) -> dict[str, Any]:
    """Fork for each request, and tell its client the process and its end; return the request in the new process."""
    awakened, wake = socket.socketpair()
    for end in (awakened, wake):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno())
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.partial")
    listener.listen(64)
    os.rename(f"{address}.partial", address)
    clients: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        for source in (listener, awakened):
            selector.register(source, selectors.EVENT_READ)
        while _runs(session):
            for key, _ in selector.select(timeout=1):
                if key.fileobj is listener:
                    client, _ = listener.accept()
                    request = _receive(client)
                    if (pid := os.fork()) == 0:
                        _let_go(listener, awakened, wake, client, *clients.values())
                        return request
                    for stream in request["streams"]:
                        os.close(stream)
                    client.sendall(b"%d\n" % pid)
                    clients[pid] = client
                    selector.register(client, selectors.EVENT_READ, pid)
                elif key.fileobj is awakened:
                    awakened.recv(4096)
                else:  # its client has gone, so nobody waits for this program
                    os.kill(key.data, signal.SIGKILL)
                    selector.unregister(key.fileobj)
            for pid, status in _ended():
                with clients.pop(pid) as client, contextlib.suppress(KeyError, BrokenPipeError):  # if it has gone
                    selector.unregister(client)
                    client.sendall(b"%d\n" % status)
    for pid in clients:
        os.kill(pid, signal.SIGKILL)
    sys.exit()


def _let_go(*sockets: socket.socket) -> None:
    """Drop in a new process what is the server's."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a server in the background ignores
    for end in sockets:
        end.close()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def _receive(client: socket.socket) -> dict[str, Any]:
    length, streams, _, _ = socket.recv_fds(client, 8, 3)
    with client.makefile("rb") as text:
        return json.loads(text.read(int(length))) | {"streams": streams}


def _ended() -> list[tuple[int, int]]:
    """Processes that have ended since it was last asked, each with its status."""
    found = []
    with contextlib.suppress(ChildProcessError):  # none is left
        while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            found.append(ended)
    return found


def run(request: dict[str, Any]) -> None:
    """Be the program that was asked for."""
    for number, stream in enumerate(request["streams"]):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["cwd"])
    sys.executable = request["python"]
    _take_on(request["environment"])
    status = 0
    try:
        _run(request["arguments"])
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        traceback.print_exc()
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _run(arguments: list[str]) -> None:
    """What Python does with its arguments, as far as tests use them."""
    if paths := [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]:
        sys.path[:0] = paths
        sys.modules.pop("sitecustomize", None)
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module("sitecustomize")  # as Python itself does
    safe = False
    while arguments and arguments[0] in ("-u", "-P"):
        safe |= arguments.pop(0) == "-P"
    what, *sys.argv = arguments if arguments[0] in ("-c", "-m") else ["", *arguments]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if what == "-c":
        code, sys.argv[0] = sys.argv[0], "-c"
        sys.path[:0] = [] if safe else [""]
        exec(compile(code, "<string>", "exec", dont_inherit=True), main.__dict__)
    elif what == "-m":
        sys.path[:0] = [] if safe else [os.getcwd()]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[:0] = [] if safe else [os.path.dirname(os.path.abspath(sys.argv[0]))]
        runpy.run_path(sys.argv[0], run_name="__main__")


def _take_on(environment: dict[str, str]) -> None:
    """Take on an environment, also what libraries have read of it as they were imported."""
    os.environ.clear()
    os.environ.update(environment)
    constants = importlib.reload(sys.modules["huggingface_hub.constants"])
    sys.modules["huggingface_hub.hf_api"].api.endpoint = constants.ENDPOINT
    modules = os.environ.get("HF_MODULES_CACHE", os.path.join(constants.HF_HOME, "modules"))
    for name in ("utils", "utils.hub", "dynamic_module_utils"):
        sys.modules[f"transformers.{name}"].HF_MODULES_CACHE = modules


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, which programs do not see
    for module in IMPORTED.split():
        importlib.import_module(module)
    gc.freeze()  # what a process never frees, it need not copy
    run(serve(sys.argv[1], int(sys.argv[2])))
