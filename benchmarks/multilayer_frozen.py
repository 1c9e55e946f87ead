"""What several layers of a frozen encoder gain over its last one, every form beside the dual encoder.

    python benchmarks/multilayer_frozen.py --output results

The state of every layer is cached once; each form then trains a linear map on it for seconds, with the shipped run's
pairs, negatives and steps. Its learning rate is chosen on dev with the first seed, one for all sets. Rankings are kept
under a hash of data, settings and the method's code, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
import tempfile
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from tqdm import tqdm
from transformers import HfArgumentParser, set_seed

from polyrep.cache import Embeddings
from polyrep.data import RetrievalDataset, load_retrieval_dataset
from polyrep.evaluation import compare, macro_interval, per_query_metrics, table_rows
from polyrep.heads import HeadData, HeadTrainer, LayerSide, encode_layers
from polyrep.hub import fastest_dtype, fetch, fingerprint, load
from polyrep.multilayer import MultiLayerHead
from polyrep.recipes import resolve
from polyrep.report import provenance, write_results
from polyrep.retrievers import Ranking, costs_of, rank_with_bm25
from polyrep.scoring import exact_search, tie_ranks

ROOT = Path(__file__).parent.parent
RUN = ROOT / "hub_configs" / "multilayer-minilm-frozen"
CODE = [*sorted((ROOT / "modeling" / "multilayer").glob("[mo]*.py")), ROOT / "modeling" / "heads.py"]

RATES = ("3e-4", "1e-3")
CONTROL_RATES = ("3e-4", "6e-4", "1e-3", "2e-3")
CONTROL_TRIES = [f"{rate} --tau {tau}" for rate in CONTROL_RATES for tau in ("0.03", "0.05", "0.07")]
"""The control is tuned harder than any form, since there are many of them and one of it."""

DEPTH = 100
"""Documents of a ranking that are kept: as many as the metrics read."""

CONTROL = "dual encoder"
RAW = "all-MiniLM-L6-v2"


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
class Arguments:
    """What to fit and measure."""

    datasets: list[str] = field(
        default_factory=lambda: ["data/tldr_pages", "data/scitldr", "data/scifact"], metadata={"help": "BEIR folders."}
    )
    backbone: str = field(default="minilm", metadata={"help": "Folder or Hub id of a SentenceTransformer."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the fits."})
    flags: str = field(default="", metadata={"help": "Flags of the run for every fit, e.g. '--max_steps 2'."})
    cache_dir: str = field(default=".cache", metadata={"help": "Embeddings and rankings."})
    output: str | None = field(default=None, metadata={"help": "Folder for the JSON and Markdown."})
    name: str = field(default="multilayer-frozen", metadata={"help": "Name of the files."})


class Bench:
    """One data set with its cached layers."""

    def __init__(self, args: Arguments, source: str, model: SentenceTransformer):
        self.args, self.source, self.model = args, source, model
        self.name = Path(source).name
        self.options: dict[str, Any] = {"cache_dir": f"{args.cache_dir}/embeddings", "batch_size": 32}
        self.sides: dict[tuple[str, str], LayerSide] = {}
        self.training: dict[str, HeadData] = {}

    def split(self, name: str) -> RetrievalDataset:
        """A split of the data set."""
        return load_retrieval_dataset(self.source, name)

    @cached_property
    def ranks(self) -> np.ndarray:
        """What decides ties."""
        return tie_ranks(list(self.split("dev").corpus))

    def side(self, which: str, token: str = "mean") -> LayerSide:
        """Layers of the documents, or of the queries of a split."""
        if (which, token) not in self.sides:
            dataset = self.split("dev" if which == "documents" else which)
            texts = (
                (dict(dataset.corpus), "document", self.name)
                if which == "documents"
                else (dataset.queries, "query", f"{self.name}-{which}")
            )
            self.sides[which, token] = encode_layers(self.model, *texts, token=token, **self.options)
        return self.sides[which, token]

    def pairs(self, plan: Any, token: str) -> HeadData:
        """Training pairs of the shipped run, encoded once for every fit."""
        if token not in self.training:
            data = HeadData(kind="layers", negatives=plan.head.negatives, labels=True, depth=plan.head.depth)
            data.add(self.model, self.split("train"), token=token, **self.options)
            data.parts = [(_in_memory(q), _in_memory(d), nearest) for q, d, nearest in data.parts]
            self.training[token] = data
        return self.training[token]

    def ranked(self, system: str, setting: str, seed: int) -> dict[str, Ranking]:
        """What a fit of a system finds on dev and test; ``setting`` is a learning rate and further flags."""
        flags = [*SETTINGS[system], "--learning_rate", *setting.split(), *shlex.split(self.args.flags)]
        depends = {
            "system": system if system in BESIDE else None,
            "flags": flags,
            "seed": seed,
            "documents": self.side("documents").embeddings.path.name,
            "code": [hashlib.sha256(file.read_bytes()).hexdigest() for file in CODE],
            "recipe": [file.read_text(encoding="utf-8") for file in sorted(RUN.iterdir())],
            "splits": [self.split(name).qrels for name in ("train", "dev", "test")],
        }
        digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
        path = Path(self.args.cache_dir) / "rankings" / f"multilayer-{self.name}-{digest}.safetensors"
        if not path.is_file():
            self._fit(system, flags, seed, path)
        with safe_open(path, framework="numpy") as stored:
            costs = json.loads(stored.metadata()["costs"])
            return {
                split: Ranking(
                    system, stored.get_tensor(f"{split}.positions"), stored.get_tensor(f"{split}.scores"), costs
                )
                for split in ("dev", "test")
            }

    def _fit(self, system: str, flags: list[str], seed: int, path: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            argv = [RUN.name, "--datasets", self.source, "--seed", str(seed), "--output_dir", scratch, *flags]
            plan = resolve([*argv, "--save_strategy", "no", "--disable_tqdm", "true"], prog="train.py")
            set_seed(seed)
            head = MultiLayerHead.from_backbone(self.model, **plan.config)
            data = self.pairs(plan, head.config.token)
            same = system == "seven maps of the last layer"
            objective = plan.objective(head, **plan.objective_arguments)
            if same:
                inner = objective.forward

                def forward(features: Any, labels: Any) -> Any:
                    copies = [
                        f | {"layer_embeddings": f["layer_embeddings"][:, -1:].expand(-1, 7, -1)} for f in features
                    ]
                    return inner(copies, labels)

                objective.forward = forward
            trainer = HeadTrainer(
                objective=objective, args=plan.args, train_dataset=data, data_collator=data.collate, callbacks=[]
            )
            trainer.train()
        tensors, costs = {}, {}
        documents = self.encoded(head, "documents", same)
        for split in ("dev", "test"):
            queries = self.encoded(head, split, same)
            similarity = "maxsim" if queries.kind == "tokens" else "dot"
            positions, scores = exact_search(queries, documents, self.ranks, similarity=similarity, k=DEPTH)
            tensors[f"{split}.positions"] = torch.from_numpy(positions.astype(np.int32))
            tensors[f"{split}.scores"] = torch.from_numpy(scores)
            costs = costs_of(queries, documents)
        logged = next((entry for entry in reversed(trainer.state.log_history) if "loss" in entry), {})
        costs |= {k: v for k, v in logged.items() if k.startswith("layer_")}
        costs["parameters"] = sum(p.numel() for p in head.parameters() if p.requires_grad)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path.with_suffix(".part"), metadata={"costs": json.dumps(costs)})
        path.with_suffix(".part").replace(path)

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

    def raw(self, split: str) -> Ranking:
        """The untouched backbone."""
        queries, documents = self.side(split).last(), self.side("documents").last()
        positions, scores = exact_search(queries, documents, self.ranks, similarity="cosine", k=DEPTH)
        return Ranking(RAW, positions, scores, costs_of(queries, documents))


def tries(system: str) -> list[str]:
    """Learning rates, and for the control temperatures, that are tried on dev."""
    if system == CONTROL:
        return CONTROL_TRIES
    many = system.startswith(("linear", "seven maps"))  # more numbers, smaller steps
    return ["1e-4", *RATES] if many else list(RATES)


def _in_memory(side: LayerSide) -> LayerSide:
    """A side whose layers are no memory map: hundreds of fits read them."""
    return replace(side, embeddings=replace(side.embeddings, values=side.embeddings.values.astype(np.float32)))


def significant(tests: dict[str, dict[str, np.ndarray]], chosen: list[str]) -> dict[str, list[str]]:
    """Data sets on which each system chosen on dev beats the control, corrected for the chosen ones alone."""
    better: dict[str, list[str]] = {system: [] for system in chosen}
    for name, values in tests.items():
        outcomes = compare({system: values[system] for system in better}, values[CONTROL])
        for system, outcome in zip(better, outcomes, strict=True):
            if outcome["difference"] > 0 and outcome["p_value"] < 0.05:
                better[system].append(name)
    return better


def claims(tests: dict[str, dict[str, np.ndarray]], published: str, best: str) -> list[dict[str, Any]]:
    """The card's figures: gains over the dual encoder on test, of the forms that were best on dev."""
    names = list(tests)
    found: list[dict[str, Any]] = []

    def gain(claim: str, system: str, control: str, target: float | None = 0.0) -> None:
        differences = {n: 100 * (tests[n][system] - tests[n][control]) for n in names}
        low, high = macro_interval(differences)
        by_dataset = {n: float(differences[n].mean()) for n in names}
        entry: dict[str, Any] = {"claim": f"multilayer.{claim}", "value": float(np.mean(list(by_dataset.values())))}
        entry |= {"interval": [low, high], "target": target, "met": None if target is None else low > target}
        found.append(entry | {"held_to": "lower", "system": system, "split": "test", "by_dataset": by_dataset})

    gain("gain_frozen", published, CONTROL)
    gain("gain_best_form_frozen", best, CONTROL)
    if best == "linear, all layers":
        gain("gain_over_equal_parameters", best, "seven maps of the last layer")
    gain("gain_self_contrastive_frozen", "self-contrastive [-1,-3], lambda 0.1", CONTROL, None)
    better = significant(tests, [best, published])
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
    dev = {bench.name: bench.split("dev") for bench in benches}

    def on_dev(system: str, setting: str, seed: int) -> float:
        found = [
            per_query_metrics(dev[b.name], b.ranked(system, setting, seed)["dev"])["nDCG@10"].mean() for b in benches
        ]
        return float(np.mean(found))

    rates: dict[str, str] = {}
    values: dict[str, float] = {}
    for system in tqdm(SETTINGS, desc="forms"):
        tried = {setting: on_dev(system, setting, args.seeds[0]) for setting in tries(system)}
        rates[system] = max(tried, key=lambda rate: tried[rate])
        values[system] = float(np.mean([on_dev(system, rates[system], seed) for seed in args.seeds]))
        tqdm.write(f"{system:<44} dev {100 * values[system]:.2f}  {tried}")
    published = max(PUBLISHED, key=lambda name: values[name])
    best = max([*PUBLISHED, *OURS], key=lambda name: values[name])

    tables: dict[str, list[dict[str, Any]]] = {}
    tests: dict[str, dict[str, np.ndarray]] = {}
    for bench in benches:
        dataset = bench.split("test")
        rankings = [rank_with_bm25(dataset, DEPTH), bench.raw("test")]
        rankings += [bench.ranked(s, rates[s], seed)["test"] for s in SETTINGS for seed in args.seeds]
        tables[bench.name] = table_rows(dataset, rankings, CONTROL)
        for row in tables[bench.name]:
            if row["system"] in rates and row["metric"] == "nDCG@10":
                row |= {"setting": f"--learning_rate {rates[row['system']]}", "dev_macro": values[row["system"]]}
        tests[bench.name] = {
            system: np.mean([per_query_metrics(dataset, r)["nDCG@10"] for r in rankings if r.system == system], axis=0)
            for system in SETTINGS
        }
    results = made_by | {
        "name": args.name,
        "seeds": args.seeds,
        "models": {args.backbone: fingerprint(folder)},
        "settings_tried": sum(len(tries(system)) for system in SETTINGS) + SKETCHES,
        "drawn": [],
        "rows": [row for rows in tables.values() for row in rows],
        "claims": claims(tests, published, best),
    }
    print(write_results(results, Path(args.output) if args.output else None))


SKETCHES = 52
"""Settings tried on dev beside this grid: rates, steps, temperatures, negatives, weight decay and layers of linear."""


if __name__ == "__main__":
    main()
