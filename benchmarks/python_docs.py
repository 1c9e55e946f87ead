"""What layers and a variance gain on the documentation of this machine's packages, behind a frozen encoder.

    python benchmarks/python_docs.py --output results

MultiLayer and Gaussian, each beside its control: the same fit to the same judgments of one layer, or without a
variance. Rates, and the controls' temperatures, are chosen on dev with the first seed. ``multilayer_frozen.py`` and
``gaussian_frozen.py`` try every form of both methods on other sets; this is what those found best, on ``python_docs``.
Dense2Sparse is in ``dense2sparse_text.py``, and what is fitted to late interaction in the frontier.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import frozen_tier
import gaussian_frozen
import multilayer_frozen
from frozen_tier import chosen_on_dev, gain_claim, test_tables
from transformers import HfArgumentParser

from polyrep.data.named import made_here
from polyrep.hub import fetch, fingerprint, load
from polyrep.hub.folder import fastest_dtype
from polyrep.report import provenance, write_results

LAYERS = (multilayer_frozen.CONTROL, "linear, all layers", "seven maps of the last layer", "scalar mix [-1,-3]")
VARIANCE = (gaussian_frozen.CONTROL, "kl, 1 group", "kl, separate, both, weights 0.1")
"""The control of each method, then its forms; the last Gaussian is the shipped run."""


@dataclass
class Arguments(frozen_tier.Arguments):
    """What to fit and measure."""

    datasets: list[str] = field(default_factory=lambda: ["python_docs"], metadata={"help": "Names or folders."})
    name: str = field(default="python_docs", metadata={"help": "Name of the files."})


def nothing(bench: Any) -> list[Any]:
    """No further rows, in the second of two tables of one data set."""
    return []


def main() -> None:
    """Fit, measure and write."""
    (args,) = HfArgumentParser([Arguments]).parse_args_into_dataclasses()
    made_by = provenance(shlex.join(["python", *sys.argv]))  # the code as it is now, not after edits
    folder = fetch(args.backbone)
    model = load(folder, dtype=fastest_dtype("auto"))
    rows, claims, tried = [], [], 0
    layers: Any = partial(multilayer_frozen.Bench, args, model=model)
    variance: Any = partial(gaussian_frozen.Bench, args, model=model, teacher=None)
    for method, systems, module, open_bench, beside in (
        ("multilayer", LAYERS, multilayer_frozen, layers, multilayer_frozen.Bench.beside),
        ("gaussian", VARIANCE, gaussian_frozen, variance, nothing),
    ):
        benches = [open_bench(source) for source in args.datasets]
        settings, values = chosen_on_dev(benches, {system: module.tries(system) for system in systems}, args.seeds)
        found, tests = test_tables(benches, settings, values, args.seeds, beside, systems[0])
        rows += found
        best = max(systems[1:], key=lambda name: values[name])
        claims.append(gain_claim(f"{method}.gain_on_python_docs", tests, best, systems[0]))
        tried += sum(len(module.tries(system)) for system in systems)
    results = made_by | {
        "name": args.name,
        "seeds": args.seeds,
        "models": {args.backbone: fingerprint(folder)},
        "settings_tried": tried,
        "drawn": [],
        "rows": rows,
        "claims": claims,
        "data": made_here(*args.datasets),
    }
    print(write_results(results, Path(args.output) if args.output else None))


if __name__ == "__main__":
    main()
