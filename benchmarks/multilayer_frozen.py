"""What several layers of a frozen encoder gain over its last one, every form beside the dual encoder.

    python benchmarks/multilayer_frozen.py --output results

The state of every layer is cached once; each form then trains a linear map on it for seconds, with the shipped run's
pairs, negatives and steps. Its learning rate is chosen on dev with the first seed, one for all sets. Rankings are kept
under a hash of data, settings and the method's code, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import frozen_tier
import numpy as np
import torch
from bench import ROOT, code_of
from frozen_tier import DEPTH, RAW, chosen_on_dev, gain_claim, significant, test_tables
from sentence_transformers import SentenceTransformer
from transformers import HfArgumentParser

from polyrep.encoding import Embeddings
from polyrep.evaluation.bm25 import rank_with_bm25
from polyrep.evaluation.systems import Ranking, costs_of
from polyrep.hub import fetch, fingerprint, load
from polyrep.hub.folder import fastest_dtype
from polyrep.methods import MultiLayerHead
from polyrep.report import provenance, write_results
from polyrep.search import exact_search
from polyrep.training.pairs import HeadData
from polyrep.training.sides import LayerSide

RUN = ROOT / "hub_configs" / "multilayer-minilm-frozen"
CODE = code_of("methods/multilayer", "training")

RATES = ("3e-4", "1e-3")
CONTROL_RATES = ("3e-4", "6e-4", "1e-3", "2e-3")
CONTROL_TRIES = [f"{rate} --tau {tau}" for rate in CONTROL_RATES for tau in ("0.03", "0.05", "0.07")]
"""The control is tuned harder than any form, since there are many of them and one of it."""

CONTROL = "dual encoder"


def _form(pooling: str, layers: str, *rest: str, shared: bool = True) -> list[str]:
    flags = ["--pooling", pooling, "--layers", *layers.split(), *rest]
    return [*flags, "--projection", "true"] if shared else flags


PAIRS = {"[-1,-2]": "-1 -2", "[-1,-3]": "-1 -3", "[-1,-4]": "-1 -4", "[-1,-5]": "-1 -5"}
FOUR, SEVEN = "-1 -2 -3 -4", "-1 -2 -3 -4 -5 -6 -7"
SELF = ("self_contrastive", "-1 -3")

PUBLISHED: dict[str, list[str]] = {
    **{f"mean {name}": _form("mean", layers) for name, layers in PAIRS.items()},
    "mean [-1..-4]": _form("mean", FOUR),
    **{f"scalar mix {name}": _form("scalar_mix", layers) for name, layers in PAIRS.items()},
    "scalar mix [-1..-4]": _form("scalar_mix", FOUR),
    **{f"multi {name}": _form("multi", layers) for name, layers in PAIRS.items()},
    "multi [-1..-4]": _form("multi", FOUR),
    "last + regulariser 0.1": _form("last", "-1 -3", "--lambda_", "0.1"),
    "last + regulariser 1": _form("last", "-1 -3", "--lambda_", "1"),
    **{
        f"self-contrastive [-1,-3], lambda {weight}": _form(*SELF, "--lambda_", weight) for weight in ("0", "0.1", "1")
    },
    **{
        f"self-contrastive {name}, lambda 0.1": _form("self_contrastive", layers, "--lambda_", "0.1")
        for name, layers in PAIRS.items()
        if name != "[-1,-3]"
    },
}
"""The paper's forms, with the backbone's own pooling and cosine, and one map behind all layers."""

OURS: dict[str, list[str]] = {
    "self-contrastive, learned temperature": _form(*SELF, "--lambda_", "0.1", "--learn_tau", "true"),
    "self-contrastive, stop-gradient": _form(*SELF, "--lambda_", "0.1", "--mode", "stop_gradient"),
    "self-contrastive, margin": _form(*SELF, "--lambda_", "0.1", "--mode", "margin"),
    "self-contrastive, random layer": _form("self_contrastive", SEVEN, "--lambda_", "0.1", "--random_layer", "true"),
    "self-contrastive, queries too": _form(*SELF, "--lambda_", "0.1", "--query_side", "true"),
    "mean [-1,-3], queries too": _form("mean", "-1 -3", "--pool_queries", "true"),
    "scalar mix [-1..-4], queries too": _form("scalar_mix", FOUR, "--pool_queries", "true"),
    "linear [-1,-3]": _form("linear", "-1 -3", shared=False),
    "linear [-1..-4]": _form("linear", FOUR, shared=False),
    "linear, all layers": _form("linear", SEVEN, shared=False),
}
"""Further forms: bounded (a), without drift (b), any layer (c), queries too (d), and a map of all layers together."""

CLS = ["--token", "cls", "--normalize", "false"]
BESIDE: dict[str, list[str]] = {
    "seven maps of the last layer": _form("linear", SEVEN, shared=False),
    "dual encoder, [CLS] and dot product": _form("last", "-1", *CLS, "--tau", "1"),
    "self-contrastive, [CLS] and dot product": _form(*SELF, *CLS, "--tau", "1", "--lambda_", "1"),
}
"""As many numbers as the map of all layers, but of the last alone; and the paper's own score on this backbone."""

SETTINGS = {CONTROL: _form("last", "-1"), **PUBLISHED, **OURS, **BESIDE}


@dataclass
class Arguments(frozen_tier.Arguments):
    """What to fit and measure."""

    name: str = field(default="multilayer-frozen", metadata={"help": "Name of the files."})


class Bench(frozen_tier.Bench):
    """One data set with its cached layers."""

    run, code, settings = RUN, CODE, SETTINGS

    def __init__(self, args: Arguments, source: str, model: SentenceTransformer):
        super().__init__(args, source, model)
        self.sides: dict[tuple[str, str], LayerSide] = {}
        self.training: dict[str, HeadData] = {}
        self.token = MultiLayerHead.from_backbone(model).config.token

    def side(self, which: str, token: str | None = None) -> LayerSide:
        """Layers of the documents, or of the queries of a split; pooled as the backbone does, or as told."""
        token = token or self.token
        if (which, token) not in self.sides:
            dataset = self.split("dev" if which == "documents" else which)
            texts = (
                (dict(dataset.corpus), "document", self.name)
                if which == "documents"
                else (dataset.queries, "query", f"{self.name}-{which}")
            )
            self.sides[which, token] = LayerSide.encode(self.model, *texts, token=token, **self.options)
        return self.sides[which, token]

    def pairs(self, plan: Any, token: str) -> HeadData:
        """Training pairs of the shipped run, encoded once for every fit."""
        if token not in self.training:
            data = HeadData(kind="layers", negatives=plan.head.negatives, labels=True, depth=plan.head.depth)
            data.add(self.model, self.split("train"), token=token, **self.options)
            data.parts = [frozen_tier.in_memory(part) for part in data.parts]
            self.training[token] = data
        return self.training[token]

    def depends(self, system: str) -> dict[str, Any]:
        """The layers, and what no flag says."""
        return {
            "system": system if system in BESIDE else None,
            "documents": self.side("documents").embeddings.path.name,
        }

    def fit(self, system: str, flags: list[str], seed: int) -> frozen_tier.Found:
        """Fit a form and rank dev and test."""
        same = system == "seven maps of the last layer"

        def pairs(plan: Any, objective: Any) -> HeadData:
            if same:
                inner = objective.forward

                def forward(features: Any, labels: Any) -> Any:
                    copies = [
                        f | {"layer_embeddings": f["layer_embeddings"][:, -1:].expand(-1, 7, -1)} for f in features
                    ]
                    return inner(copies, labels)

                objective.forward = forward
            return self.pairs(plan, objective.model.config.token)

        trainer = frozen_tier.fitted(
            self, flags, seed, lambda plan: MultiLayerHead.from_backbone(self.model, **plan.config), pairs
        )
        head = trainer.objective.model
        arrays: dict[str, np.ndarray] = {}
        costs: dict[str, float] = {}
        documents = self.encoded(head, "documents", same)
        for split in ("dev", "test"):
            queries = self.encoded(head, split, same)
            similarity = "maxsim" if queries.kind == "tokens" else "dot"
            positions, scores = exact_search(queries, documents, self.ranks, similarity=similarity, k=DEPTH)
            arrays |= {f"{split}.positions": positions.astype(np.int32), f"{split}.scores": scores}
            costs = costs_of(queries, documents)
        logged = next((entry for entry in reversed(trainer.state.log_history) if "loss" in entry), {})
        costs |= {k: v for k, v in logged.items() if k.startswith("layer_")}
        costs["parameters"] = sum(p.numel() for p in head.parameters() if p.requires_grad)
        return arrays, costs

    @torch.inference_mode()
    def encoded(self, head: MultiLayerHead, which: str, same: bool = False) -> Embeddings:
        """Vectors of the documents or of a split's queries."""
        side = self.side(which, head.config.token)
        task, found = "document" if which == "documents" else "query", []
        for start in range(0, len(side), 2048):
            states = side.features(np.arange(start, min(start + 2048, len(side))))["layer_embeddings"]
            states = states[:, [-1] * 7] if same else states[:, head.config.layers]
            output = head.eval()(states, task=task)
            found.append(output.token_embeddings if output.sentence_embedding is None else output.sentence_embedding)
        values = torch.cat(found)
        kind, offsets = "sentence", None
        if values.ndim == 3:
            kind, offsets = "tokens", np.arange(len(values) + 1) * values.shape[1]
            values = values.flatten(0, 1)
        return replace(
            side.embeddings,
            kind=kind,
            values=values.numpy().astype(np.float16),
            offsets=offsets,
            dim=values.shape[-1],
        )

    def beside(self) -> list[Ranking]:
        """BM25 and the untouched backbone on test."""
        queries, documents = self.side("test").last(), self.side("documents").last()
        positions, scores = exact_search(queries, documents, self.ranks, similarity="cosine", k=DEPTH)
        raw = Ranking(RAW, positions, scores, costs_of(queries, documents))
        return [rank_with_bm25(self.split("test"), DEPTH), raw]


def tries(system: str) -> list[str]:
    """Learning rates, and for the control temperatures, that are tried on dev."""
    if system == CONTROL:
        return CONTROL_TRIES
    many = system.startswith(("linear", "seven maps"))  # more numbers, smaller steps
    return ["1e-4", *RATES] if many else list(RATES)


def claims(tests: dict[str, dict[str, np.ndarray]], published: str, best: str) -> list[dict[str, Any]]:
    """The card's figures: gains over the dual encoder on test, of the forms that were best on dev."""
    found = [
        gain_claim("multilayer.gain_frozen", tests, published, CONTROL),
        gain_claim("multilayer.gain_best_form_frozen", tests, best, CONTROL),
    ]
    if best == "linear, all layers":
        claim = "multilayer.gain_over_equal_parameters"
        found.append(gain_claim(claim, tests, best, "seven maps of the last layer"))
    self_contrastive = "self-contrastive [-1,-3], lambda 0.1"
    found.append(gain_claim("multilayer.gain_self_contrastive_frozen", tests, self_contrastive, CONTROL, None))
    better = significant(tests, [best, published], CONTROL)
    for claim, system, target in (("", best, 2), ("_published", published, None)):
        entry = {"claim": f"multilayer.significant_datasets{claim}", "value": len(better[system]), "target": target}
        entry |= {"met": None if target is None else len(better[system]) >= target, "system": system}
        found.append(entry | {"datasets": better[system], "split": "test"})
    return found


def main() -> None:
    """Fit, measure and write."""
    (args,) = HfArgumentParser([Arguments]).parse_args_into_dataclasses()
    made_by = provenance(shlex.join(["python", *sys.argv]))  # the code as it is now, not after an hour of edits
    folder = fetch(args.backbone)
    model = load(folder, dtype=fastest_dtype("auto"))
    benches = [Bench(args, source, model) for source in args.datasets]
    settings, values = chosen_on_dev(benches, {system: tries(system) for system in SETTINGS}, args.seeds)
    published = max(PUBLISHED, key=lambda name: values[name])
    best = max([*PUBLISHED, *OURS], key=lambda name: values[name])
    rows, tests = test_tables(benches, settings, values, args.seeds, Bench.beside, CONTROL)
    results = made_by | {
        "name": args.name,
        "seeds": args.seeds,
        "models": {args.backbone: fingerprint(folder)},
        "settings_tried": sum(len(tries(system)) for system in SETTINGS) + SKETCHES,
        "drawn": [],
        "rows": rows,
        "claims": claims(tests, published, best),
    }
    print(write_results(results, Path(args.output) if args.output else None))


SKETCHES = 52
"""Settings tried on dev beside this grid: rates, steps, temperatures, negatives, weight decay and layers of linear."""


if __name__ == "__main__":
    main()
