"""Asks the server for a fork that runs a program, and stands for it until it ends; imports as little as it can."""

import json
import os
import signal
import socket
import sys


def main(address: str) -> None:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    job = {"python": os.path.abspath(sys.argv[0]), "arguments": sys.argv[1:], "cwd": os.getcwd()}
    request = json.dumps(job | {"environment": dict(os.environ)}).encode()
    socket.send_fds(connection, [b"%8d" % len(request)], [0, 1, 2])
    connection.sendall(request)
    answers = connection.makefile()
    pid = int(answers.readline())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    status = os.waitstatus_to_exitcode(int(answers.readline()))
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if status != -signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    sys.exit(status)
