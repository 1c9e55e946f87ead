"""Results as one JSON file, one Markdown table and one picture, each with the command that made them."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


def provenance(command: str) -> dict[str, Any]:
    """Where numbers come from: command, date, commit, hardware and versions, as every results file records them."""
    packages = ("polyrep", "torch", "transformers", "sentence-transformers", "datasets", "accelerate")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return {
        "command": command,
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _commit(),
        "hardware": f"{_processor()}, {torch.get_num_threads()} threads{gpu}",
        "versions": versions,
    }


def _commit() -> str:
    """Commit of the clone that runs, with ``-dirty`` for uncommitted changes; ``unknown`` outside a clone."""
    described = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "unknown"


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
