"""The Python that tests start programs with is Python, but for what it has imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import warm
from conftest import PATIENCE, run_python

PROGRAMS = {
    "what it is told": "import os, sys; print(sys.argv, os.getcwd(), os.environ['GIVEN'], __name__, sys.path[0])",
    "input": "print(input())",
    "a status": "raise SystemExit(3)",
    "a reason": "import sys; sys.exit('a reason')",
    "an error": "1 / 0",
    "at its exit": "import atexit, threading; atexit.register(print, 'exit'); threading.Thread(target=print).start()",
    "killed": "import os; os.kill(os.getpid(), 9)",
    "terminated": "import os; os.kill(os.getpid(), 15)",
    "a child": "import subprocess, sys; print(subprocess.run([sys.executable, '-c', 'exit(5)']).returncode)",
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("how", ["-c", "a file", "-m"])
def test_programs_cannot_tell(tmp_path, program, how):
    (tmp_path / "program.py").write_text(PROGRAMS[program])
    start = {"-c": ["-c", PROGRAMS[program]], "a file": [str(tmp_path / "program.py")], "-m": ["-m", "program"]}[how]
    ended = []
    for python in (warm.python(), sys.executable):
        options = {"cwd": tmp_path, "env": os.environ | {"GIVEN": "x"}, "input": "words\n"}
        ran = subprocess.run(
            [python, *start, "one", "-c"], capture_output=True, text=True, timeout=PATIENCE, **options
        )
        ended.append((ran.returncode, ran.stdout, ran.stderr.splitlines()[-1:]))
    assert ended[0] == ended[1]


def test_torch_is_there_and_polyrep_is_not():
    code = "import sys; print(*({'torch', 'sentence_transformers', 'polyrep', 'toy', 'conftest'} & set(sys.modules)))"
    assert set(run_python("-c", code).stdout.split()) == {"torch", "sentence_transformers"}


def test_settings_that_libraries_read_once_are_those_of_the_program(tmp_path):
    code = "from huggingface_hub import constants as c; from transformers.dynamic_module_utils import HF_MODULES_CACHE"
    code += "; print(c.ENDPOINT, c.HF_HUB_OFFLINE, c.HF_HUB_CACHE, HF_MODULES_CACHE)"
    settings = {"HF_ENDPOINT": "http://hub", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    said = run_python("-c", code, env=os.environ | settings).stdout
    assert said.split() == ["http://hub", "False", f"{tmp_path}/hub", f"{tmp_path}/modules"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_reaches_the_program_and_nothing_outlives_its_client(number):
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([warm.python(), "-c", code], **options) as client:
        pid = int(client.stdout.readline())
        client.send_signal(number)
        said = client.communicate(timeout=PATIENCE)[1]
    assert client.returncode == -number and ("KeyboardInterrupt" in said) == (number == signal.SIGINT)
    while os.path.exists(f"/proc/{pid}"):
        time.sleep(0.01)
