"""Every room under torch.compile and in bfloat16: the same vectors from one graph, and the same up to rounding."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from room_examples import EXAMPLES

from polyrep.hub.example import Example
from polyrep.methods import MultiLayerConfig

# Batches of two shapes; neither size is one that a model has, which a compiler would take for it.
BATCHES = (
    ["show open ports", "make an archive of a file", "x", "open"],
    ["find a pattern in a file", "l", "list a port file: a port file list a port", "tar", "q"],
)

ROUNDING = 0.05
"""What bfloat16 may change of a vector, of its length. It keeps 8 bits, so each number is off by up to 0.4 %, and the
errors of a layer's dozen operations add up to one or two percent. A sum in too few bits, or a variance that overflows,
is off by far more."""

AT_THE_CUT = 0.9
"""Words that a sparse vector must keep: of those whose weights are nearly equal, rounding decides which are cut."""


@pytest.fixture(scope="module", params=EXAMPLES)
def example(
    request: pytest.FixtureRequest, backbone: Path, shallow_backbone: Path, tmp_path_factory: pytest.TempPathFactory
) -> Example:
    deep = request.param == MultiLayerConfig.model_type  # which needs layers to choose from
    return EXAMPLES[request.param](backbone if deep else shallow_backbone, tmp_path_factory.mktemp("example"))


def encode(model: Any, task: str, texts: list[str]) -> list[np.ndarray]:
    """One array a text, ``(vectors, dim)``."""
    vectors = getattr(model, f"encode_{task}")(texts)
    dense = [vector.to_dense().float() if isinstance(vector, torch.Tensor) else vector for vector in vectors]
    return [np.atleast_2d(np.asarray(vector, np.float64)) for vector in dense]


def test_compiled_models_give_the_same_vectors_from_one_graph_for_all_sizes(example):
    last = {type(model[len(model) - 1].model): kind for kind, model in reversed(example.models.items())}
    for kind in last.values():  # one model of each class: the whole model, or the head of a pipeline
        model = example.models[kind]
        module = model[len(model) - 1]
        eager = {(t, i): encode(model, t, x) for t in ("query", "document") for i, x in enumerate(BATCHES)}
        graphs: list[Any] = []

        def keep(graph: Any, inputs: Any, graphs: list[Any] = graphs) -> Any:
            graphs.append(graph)
            return graph.forward  # no code is generated, so no compiler for C++ is needed

        torch._dynamo.reset()
        whole, module.model = module.model, torch.compile(module.model, dynamic=True, fullgraph=True, backend=keep)
        try:
            made = []
            for i, texts in enumerate(BATCHES):
                for task in ("query", "document"):
                    for ours, theirs in zip(encode(model, task, texts), eager[task, i], strict=True):
                        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4, err_msg=f"{kind} {task}")
                made.append(len(graphs))
        finally:
            module.model = whole
        assert made in ([1, 1], [2, 2]), f"{kind}: one graph a task at most, and no new one for another size"


def test_bfloat16_changes_vectors_by_its_rounding_only(example):
    for kind, model in example.models.items():
        half = copy.deepcopy(model).to(torch.bfloat16)
        assert {p.dtype for p in half[0].parameters()} == {torch.bfloat16}  # a head may know better
        for task in ("query", "document"):
            for texts in BATCHES:
                for ours, theirs in zip(encode(half, task, texts), encode(model, task, texts), strict=True):
                    assert ours.shape == theirs.shape and np.isfinite(ours).all()
                    both = (ours != 0) & (theirs != 0)
                    assert (both.sum(1) >= AT_THE_CUT * (theirs != 0).sum(1)).all(), f"{kind} {task}"
                    off = np.linalg.norm((ours - theirs) * both, axis=1) / np.linalg.norm(theirs, axis=1)
                    assert 0 < off.max() < ROUNDING, f"{kind} {task}: {off.max()}"
