"""Where polyrep installs from wheels alone, so that nobody needs a compiler. It asks the index: `make test-install`.

A resolver reads pages of the index, and what wheels of the pinned versions say of themselves. None is installed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

PYTHONS = {"3.11": "3.11.0", "3.12": "3.12.0", "3.13": "3.13.0", "3.14": "3.14.0"}
LINUX, ARM, MAC, WINDOWS = (
    "x86_64-manylinux_2_28",
    "aarch64-manylinux_2_28",
    "aarch64-apple-darwin",
    "x86_64-pc-windows-msvc",
)
NEWER_LINUX = "x86_64-manylinux_2_34"
SEISMIC = ("3.11", NEWER_LINUX)
"""The one wheel that Seismic has."""

EXTRAS: set[str] = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def extras_without_compiler(python: str, machine: str) -> set[str]:
    """What installs from wheels there, by the table of README.md. ``dev`` has all the others in it."""
    if machine == ARM:
        return EXTRAS - {"mteb", "dev"}
    return EXTRAS - ({"seismic", "dev"} if (python, machine) == ("3.11", LINUX) else set())


def table() -> list[str]:
    """Rows of README.md."""
    extras = ", ".join(f"`{extra}`" for extra in sorted(EXTRAS - {"dev", "mteb", "seismic"}))
    *pythons, last = PYTHONS
    where = "Linux x86-64 and aarch64 (glibc 2.28), macOS 14 on Apple silicon, Windows x86-64"
    return [
        f"| polyrep, {extras} | {', '.join(pythons)}, {last} | {where} |",
        "| `mteb` | the same | the same but Linux aarch64, where it compiles pytrec-eval-terrier |",
        "| `seismic` | 3.11 | Linux x86-64 (glibc 2.34); elsewhere `pip install pyseismic-lsr` wants Rust |",
    ]


def test_readme_says_where():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line in table()] == table()


def resolve(cache: Path, python: str, machine: str, *what: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """The versions that a machine would get, a line each; of wheels alone."""
    uv = pytest.importorskip("uv", reason="the resolver is not installed: `pip install uv`")
    told = {"UV_CACHE_DIR": str(cache), "UV_PYTHON_DOWNLOADS": "never", "MACOSX_DEPLOYMENT_TARGET": "14.0"}
    configured = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
    if index := re.search(r"[.]index-url='(.+)'", configured.stdout):
        told["UV_DEFAULT_INDEX"] = index[1]
    command = [uv.find_uv_bin(), "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--only-binary", ":all:"]
    command += ["--python-version", PYTHONS[python], "--python-platform", machine, *what]
    return subprocess.run(command, input=text, capture_output=True, text=True, env=os.environ | told, cwd=ROOT)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: Any) -> Path:
    """Pages of the index that were read already."""
    folder: Path = tmp_path_factory.mktemp("uv")
    asked = resolve(folder, "3.11", LINUX, "-", text="packaging")
    if asked.returncode:
        pytest.skip(f"the package index cannot be reached, so nothing is known of wheels: {asked.stderr[-500:]}")
    return folder


@pytest.mark.install
def test_wheels_are_there_for_every_python_and_machine(cache):
    cases = list(product(PYTHONS, (LINUX, NEWER_LINUX, ARM, MAC, WINDOWS)))

    def resolved(case: tuple[str, str]) -> subprocess.CompletedProcess[str]:
        extras = [f"--extra={extra}" for extra in sorted(extras_without_compiler(*case))]
        return resolve(cache, *case, "-c", "constraints.txt", "pyproject.toml", *extras)

    with ThreadPoolExecutor(8) as pool:
        found = dict(zip(cases, pool.map(resolved, cases), strict=True))
    refused = [f"{' on '.join(case)}: {ran.stderr}" for case, ran in found.items() if ran.returncode]
    assert not refused, "\n".join(refused)
    assert [case for case, ran in found.items() if "pyseismic-lsr==" in ran.stdout] == [SEISMIC]
    pinned = re.findall(r"^([\w-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(), re.M)
    for case, ran in found.items():
        versions = dict(line.split("==") for line in ran.stdout.splitlines())
        # Torch says which version of its own needs it wants.
        unpinned = {name for name in versions if (name, versions[name]) not in pinned}
        assert not {name for name in unpinned if not re.match("cuda-|nvidia-|triton", name)}, case


@pytest.mark.install
@pytest.mark.parametrize(
    ("requirement", "python", "machine"),
    [("pyseismic-lsr==0.5.4", "3.11", WINDOWS), ("pytrec-eval-terrier==0.5.11", "3.12", ARM)],
)
def test_a_package_without_a_wheel_is_found_out(cache, requirement, python, machine):
    ran = resolve(cache, python, machine, "-", text=requirement)
    assert ran.returncode and f"{requirement} has no usable wheels" in ran.stderr
