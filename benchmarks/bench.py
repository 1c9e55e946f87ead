"""What benchmarks of fitted heads share: splits of a data set, and fits kept under a hash of all that made them."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from polyrep.data import RetrievalDataset, load_retrieval_dataset
from polyrep.search.ranking import tie_ranks

ROOT = Path(__file__).parent.parent
THREADS = torch.get_num_threads()  # now: training may raise it


def code_of(*parts: str) -> list[Path]:
    """Python files of folders of the package."""
    return [file for part in parts for file in sorted((ROOT / "modeling" / part).glob("*.py"))]


class FitBench:
    """One data set, and what is fitted to it by one run.

    Args:
        args: Arguments of the benchmark: ``backbone``, ``cache_dir``, and ``flags`` over the run for every fit.
        source: BEIR folder.
        model: The opened backbone.
    """

    run: ClassVar[Path]
    code: ClassVar[Sequence[Path]]

    def __init__(self, args: Any, source: str, model: Any):
        self.args, self.source, self.model = args, source, model
        self.name, self.flags = Path(source).name, shlex.split(args.flags)
        self.options: dict[str, Any] = {"cache_dir": f"{args.cache_dir}/embeddings", "batch_size": 32}
        self.split: Callable[[str], RetrievalDataset] = cache(lambda name: load_retrieval_dataset(source, name))

    @cached_property
    def ranks(self) -> np.ndarray:
        """What decides ties."""
        return tie_ranks(list(self.split("dev").corpus))

    @property
    def inputs(self) -> dict[str, Any]:
        """What tells the vectors that a fit reads."""
        raise NotImplementedError

    def digest(self, depends: Mapping[str, Any]) -> str:
        """Hash of what something depends on, with code and recipe."""
        made_by = {
            "code": [hashlib.sha256(file.read_bytes()).hexdigest() for file in self.code],
            "recipe": {file.name: file.read_text(encoding="utf-8") for file in sorted(self.run.iterdir())},
        }
        return hashlib.sha256(json.dumps(made_by | dict(depends), sort_keys=True).encode()).hexdigest()[:16]

    def fitted(self, label: str, depends: Mapping[str, Any], fit: Callable[[Path], None]) -> Path:
        """The folder that ``fit`` fills, kept under a hash of what it depends on."""
        train = self.split("train")
        pairs = [train.queries, train.qrels]
        digest = self.digest({**depends, **self.inputs, "pairs": pairs, "threads": THREADS, "flags": self.flags})
        folder = Path(self.args.cache_dir) / "heads" / f"{self.name}-{label}-{digest}"
        if not (folder / "training.json").is_file():
            fit(folder)
        return folder
