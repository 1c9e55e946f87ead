"""What meta tokens cost: seconds to encode with them, and the memory of a step of training.

Both are told by a model that knows nothing yet, since neither depends on what it has learned.
"""

from __future__ import annotations

import itertools
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from metaembed_study import NESTED, RUN, SINGLE, TRIES, Arguments, Job, Study
from torch.autograd.graph import saved_tensors_hooks

from polyrep.data import load_retrieval_dataset
from polyrep.files import read_json, write_json
from polyrep.hub import load
from polyrep.hub.folder import fastest_dtype
from polyrep.hub.reading import set_length
from polyrep.training.build import build, freeze
from polyrep.training.recipes import Plan, resolve

TEXTS, TIMES = 128, 5
"""Documents of each data set that are encoded, and how often."""


def costs(study: Study) -> dict[str, Any]:
    """Both figures, measured now or read."""
    args = study.args
    keys = [study.rows.key_of(Job(form, setting_of(form), 0).key) for form in (NESTED, SINGLE)]
    path = Path(args.cache_dir) / f"{args.name}-costs-{'-'.join(keys)}.json"
    if not path.is_file():
        seconds = encode_seconds(args)
        memory = {form: step_bytes(study, form) for form in (NESTED, SINGLE)}
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {"encode_overhead": seconds["with metas"] / seconds["without"], "encode_seconds": seconds}
        found |= {"step_memory_ratio": memory[NESTED] / memory[SINGLE], "step_bytes": memory}
        write_json(path, found | {"texts": TEXTS * len(args.datasets)})
    return dict(read_json(path))


def setting_of(form: str) -> str:
    """Some setting of a form: neither figure depends on it."""
    return TRIES[form][0]


@torch.inference_mode()
def encode_seconds(args: Arguments) -> dict[str, float]:
    """Seconds that the encoder takes for some documents of every data set, with a document's meta tokens and without.

    In turn, so that what else the machine does meets both; the median of several times.
    """
    _, model = untrained(args, [], dtype=fastest_dtype("auto"))
    set_length(model, args.encoded_length, RUN)
    inner = model[0].model
    texts: list[str] = []
    for source in args.datasets:
        corpus = list(load_retrieval_dataset(source, "test").corpus.values())
        texts += corpus[:: max(1, len(corpus) // TEXTS)][:TEXTS]
    texts.sort(key=len)
    batches = [model.preprocess(texts[start : start + 32], task="document") for start in range(0, len(texts), 32)]
    batches = [{k: v.to(model.device) for k, v in batch.items() if isinstance(v, torch.Tensor)} for batch in batches]
    ways: dict[str, Callable[..., Any]] = {
        "with metas": lambda batch: inner(**batch, task="document"),
        "without": lambda batch: inner.pooled(**batch),
    }
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(TIMES + 1):
        for way, encode in ways.items():
            started = time.perf_counter()
            for batch in batches:
                encode(batch)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken[way].append(time.perf_counter() - started)
    return {way: float(np.median(seconds[1:])) for way, seconds in taken.items()}  # the first allocates


def untrained(args: Arguments, flags: Sequence[str], **options: Any) -> tuple[Plan, Any]:
    """The plan of a run, and its model before the first step."""
    with tempfile.TemporaryDirectory() as scratch:
        argv = [RUN, "--backbone", args.backbone, "--datasets", *args.datasets, "--output_dir", f"{scratch}/model"]
        plan = resolve([*argv, *flags, *shlex.split(args.flags)], prog="train.py")
        build(plan, Path(scratch) / "init")
        return plan, load(Path(scratch) / "init", **options)


def step_bytes(study: Study, form: str) -> int:
    """Bytes that a step of training holds: weights, gradients and two moments of Adam, and what backward reads.

    The last is counted as autograd keeps it, each piece of memory once, so that no two measurements differ; what an
    operation needs for itself alone is left out.
    """
    args = study.args
    flags = study.tier.forms[Job(form, setting_of(form), 0).key]
    plan, model = untrained(args, flags, device="cpu")
    set_length(model, args.max_length, form)
    freeze(plan.recipe.freeze, model)
    objective: Any = plan.objective(model, **plan.objective_arguments)
    share = -(-args.batch // len(args.datasets))
    pairs = [pair for source in args.datasets for pair in itertools.islice(pairs_of(source), share)]
    sides = zip(*pairs[: args.batch], strict=True)
    features = [
        model.preprocess(list(texts), task=task) for texts, task in zip(sides, ("query", "document"), strict=True)
    ]
    model.train()
    held: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=plan.args.bf16),
    ):
        loss = sum(objective(features, None).values())
    assert torch.isfinite(torch.as_tensor(loss))
    parameters = list(model.parameters())
    for parameter in parameters:  # which backward reads as well
        held.pop(parameter.untyped_storage().data_ptr(), None)
    weights = sum(p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in parameters)
    return weights + sum(held.values())


def pairs_of(source: str) -> Any:
    """Queries of train with their first relevant document."""
    dataset = load_retrieval_dataset(source, "train")
    for query, judged in dataset.qrels.items():
        document = next((name for name, relevance in judged.items() if relevance > 0), None)
        if document is not None:
            yield dataset.queries[query], dataset.corpus[document]
