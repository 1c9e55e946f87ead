"""What is imported is what is to be tested, here and in programs that tests start: `make test-min` lays it over."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, run_python

LOWEST = Path(next((path for path in sys.path if path.endswith("build/lowest/site-packages")), ""))
IMPORTED = """
import json, importlib
modules = [importlib.import_module(name) for name in {names!r}]
print(json.dumps([[module.__version__, module.__file__] for module in modules]))
"""


def test_programs_import_what_the_tests_do():
    bounds = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    lowest = dict(bound.split(">=") for bound in bounds)
    names = ["polyrep", "transformers", "sentence_transformers", "huggingface_hub"]
    found = [[sys.modules[name].__version__, sys.modules[name].__file__] for name in names]
    ran = run_python("-c", IMPORTED.format(names=names))
    assert json.loads(ran.stdout) == found, ran.stderr
    if LOWEST != Path():
        for name, (version, file) in zip(names, found, strict=True):
            assert Path(file).is_relative_to(LOWEST)
            if bound := lowest.get(name.replace("_", "-")):
                assert re.fullmatch(rf"{re.escape(bound)}(\.0)*", version), (name, version, bound)


@pytest.mark.parametrize("command", ["train late-interaction-minilm", "evaluate", "encode", "index", "search"])
def test_the_command_that_was_installed_runs_anywhere(command):
    folder = LOWEST / "bin" if LOWEST != Path() else Path(sys.executable).parent
    arguments = [str(folder / "polyrep"), *command.split(), "--help"]
    ran = run_python(*arguments, cwd=os.sep)
    assert ran.returncode == 0 and "usage: polyrep" in ran.stdout, ran.stderr
    if command == "encode":  # and once by Python itself, which has imported nothing yet
        cold = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=os.sep, check=True)
        assert cold.stdout == ran.stdout
