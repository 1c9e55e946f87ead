"""A graph beside the model it was made of: run in onnxruntime at several sizes, and compared number by number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..errors import InputError, first_line
from .signatures import MOST_TOKENS, Signature

TOLERANCE = 1e-4
"""Largest difference from torch, absolute for numbers up to one and relative beyond."""

CHECKED = ((1, 3), (2, 7), (3, 12), (5, 33), (2, MOST_TOKENS))
"""Sizes that it is compared at: one text without padding, and batches of which all but the longest are padded.

The last is longer than the windows and buckets of positions that encoders have, as far as the model takes it.
"""


def compare(reference: nn.Module, signature: Signature, file: Path, part: Path) -> dict[str, Any]:
    """Run the graph beside torch at all sizes; InputError with the numbers if they differ."""
    import onnxruntime

    difference = dict.fromkeys(signature.outputs, 0.0)
    try:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        for seed, (batch, tokens) in enumerate(CHECKED, 1):
            example = signature.example(batch, tokens, seed)
            expected = reference(*(example[name] for name in signature.axes))
            found = session.run(None, {signature.label(name): example[name].numpy() for name in signature.axes})
            for name, ours, theirs in zip(signature.outputs, expected, found, strict=True):
                difference[name] = max(difference[name], difference_of(ours.numpy(), theirs))
    except Exception as error:  # onnxruntime's own kinds share no other base
        raise InputError(
            f"{part}: {file.name} and the model cannot be compared ({first_line(error)}). Nothing was written; serve "
            "the folder with torch."
        ) from error
    if not max(difference.values()) <= TOLERANCE:
        numbers = ", ".join(f"{name} {value:.1e}" for name, value in difference.items())
        raise InputError(
            f"{part}: {file.name} gives other numbers in onnxruntime than the model in torch: {numbers} off, where "
            f"{TOLERANCE:.0e} is allowed. Nothing was written; serve the folder with torch."
        )
    described = {
        kind: {node.name: {"type": node.type, "shape": node.shape} for node in nodes}
        for kind, nodes in (("inputs", session.get_inputs()), ("outputs", session.get_outputs()))
    }
    return {**described, "compared_at": [list(size) for size in CHECKED], "difference": difference}


def difference_of(ours: Any, theirs: Any) -> float:
    """Largest difference of two arrays, relative where numbers are above one; infinite if shapes differ or at NaN.

    Where a model keeps the heaviest values of each row, which of several equal ones at the cut stay is nobody's
    choice, and the two choose differently; nor is the order of several vectors of a text, where clusters tie. That is
    no difference.
    """
    if ours.shape != theirs.shape:
        return float("inf")
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    if ours.ndim == 3:  # (batch, vectors, dim)
        ours, theirs = (np.take_along_axis(x, x.sum(-1, keepdims=True).argsort(1), 1) for x in (ours, theirs))
    off = np.abs(ours - theirs) / np.maximum(1.0, np.abs(ours))
    lightest = np.where(ours > 0, ours, np.inf).min(-1, keepdims=True, initial=np.inf)
    either = np.maximum(ours, theirs)
    tied = (np.minimum(ours, theirs) == 0) & (np.abs(either - lightest) <= TOLERANCE * np.maximum(1.0, either))
    tied &= (ours > 0).sum(-1, keepdims=True) == (theirs > 0).sum(-1, keepdims=True)
    worst = np.where(tied, 0.0, off).max(initial=0.0)
    return float("inf") if np.isnan(worst) else float(worst)
