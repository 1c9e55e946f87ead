"""What the benchmarks of frozen encoders share: fits of a head over cached vectors, chosen on dev, measured on test.

Rankings are kept under a hash of data, settings and the method's code, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from bench import FitBench
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import set_seed

from polyrep.evaluation.metrics import per_query_metrics
from polyrep.evaluation.statistics import compare, macro_interval
from polyrep.evaluation.systems import Ranking
from polyrep.evaluation.table import table_rows
from polyrep.training.head_trainer import HeadTrainer
from polyrep.training.pairs import HeadData, Part
from polyrep.training.recipes import Plan, resolve
from polyrep.training.sides import Side

DEPTH = 100
"""Documents of a ranking that are kept: as many as the metrics read."""

RAW = "all-MiniLM-L6-v2"


@dataclass
class Arguments:
    """What to fit and measure."""

    datasets: list[str] = field(
        default_factory=lambda: ["tldr_pages", "scitldr", "scifact"], metadata={"help": "BEIR folders."}
    )
    backbone: str = field(default="minilm", metadata={"help": "Folder or Hub id of a SentenceTransformer."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the fits."})
    flags: str = field(default="", metadata={"help": "Flags of the run for every fit, e.g. '--max_steps 2'."})
    cache_dir: str = field(default=".cache", metadata={"help": "Embeddings and rankings."})
    output: str | None = field(default=None, metadata={"help": "Folder for the JSON and Markdown."})
    name: str = field(default="frozen", metadata={"help": "Name of the files."})


Found = tuple[dict[str, np.ndarray], dict[str, float]]
"""Arrays by name, ``<split>.positions`` and ``<split>.scores`` among them, and costs."""


class Bench(FitBench):
    """One data set, and what fits of one run find on it."""

    settings: ClassVar[Mapping[str, list[str]]]

    def fit(self, system: str, flags: list[str], seed: int) -> Found:
        """Fit a system and rank dev and test."""
        raise NotImplementedError

    def depends(self, system: str) -> dict[str, Any]:
        """What a ranking depends on beside flags, seed, code and judgments."""
        raise NotImplementedError

    def found(self, system: str, setting: str, seed: int) -> Found:
        """What a fit found, made now or read; ``setting`` is a learning rate and further flags."""
        flags = [*self.settings[system], "--learning_rate", *setting.split(), *self.flags]
        splits = [self.split(name).qrels for name in ("train", "dev", "test")]
        digest = self.digest(self.depends(system) | {"flags": flags, "seed": seed, "splits": splits})
        path = Path(self.args.cache_dir) / "rankings" / f"{self.run.name}-{self.name}-{digest}.safetensors"
        if not path.is_file():
            arrays, costs = self.fit(system, flags, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
            save_file(tensors, path.with_suffix(".part"), metadata={"costs": json.dumps(costs)})
            path.with_suffix(".part").replace(path)
        with safe_open(path, framework="numpy") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}, json.loads(stored.metadata()["costs"])

    def ranked(self, system: str, setting: str, seed: int, split: str) -> Ranking:
        """A fit's ranking of a split."""
        arrays, costs = self.found(system, setting, seed)
        return Ranking(system, arrays[f"{split}.positions"], arrays[f"{split}.scores"], costs)

    def ndcg(self, system: str, setting: str, seed: int, split: str) -> np.ndarray:
        """Its nDCG@10 of each query."""
        return per_query_metrics(self.split(split), self.ranked(system, setting, seed, split))["nDCG@10"]


def planned(bench: FitBench, flags: list[str], seed: int, output: str = "fit") -> Plan:
    """The shipped run with flags over it."""
    argv = [bench.run.name, "--datasets", bench.source, "--seed", str(seed), "--output_dir", output, *flags]
    return resolve([*argv, "--save_strategy", "no", "--disable_tqdm", "true"], prog="train.py")


def fitted(
    bench: FitBench,
    flags: list[str],
    seed: int,
    head_of: Callable[[Plan], Any],
    data_of: Callable,
    objective_class: Any = None,
) -> Any:
    """The trainer of a fitted head, with the shipped run's steps.

    Args:
        bench: The data set.
        flags: Over the run's recipe.
        seed: Of the fit.
        head_of: Makes the head of a plan.
        data_of: Gives the training pairs of a plan and an objective.
        objective_class: Takes the place of the run's objective, with its arguments.
    """
    with tempfile.TemporaryDirectory() as scratch:
        plan = planned(bench, flags, seed, scratch)
        set_seed(seed)
        objective: Any = (objective_class or plan.objective)(head_of(plan), **plan.objective_arguments)
        data: HeadData = data_of(plan, objective)
        objective.prepare(data)
        trainer = HeadTrainer(
            objective=objective,
            args=plan.args,
            train_dataset=data,
            data_collator=data.collate,
            callbacks=[],
            remine=plan.recipe.remine,
        )
        trainer.train()
    objective.to("cpu")  # what follows reads vectors there
    return trainer


def in_memory(part: Part) -> Part:
    """A part whose vectors are no memory map: hundreds of fits read them."""

    def read(side: Side) -> Side:
        return replace(side, embeddings=replace(side.embeddings, values=np.array(side.embeddings.values, np.float32)))

    narrowed = {task: read(side) for task, side in part.narrowed.items()}
    return replace(part, queries=read(part.queries), documents=read(part.documents), narrowed=narrowed)


def chosen_on_dev(
    benches: Sequence[Bench], tries: Mapping[str, list[str]], seeds: Sequence[int]
) -> tuple[dict[str, str], dict[str, float]]:
    """Each system's setting that is best on dev with the first seed, one for all sets, and its mean over seeds."""

    def on_dev(system: str, setting: str, seed: int) -> float:
        return float(np.mean([bench.ndcg(system, setting, seed, "dev").mean() for bench in benches]))

    settings: dict[str, str] = {}
    values: dict[str, float] = {}
    for system in tqdm(tries, desc="systems"):
        tried = {setting: on_dev(system, setting, seeds[0]) for setting in tries[system]}
        settings[system] = max(tried, key=lambda setting: tried[setting])
        values[system] = float(np.mean([on_dev(system, settings[system], seed) for seed in seeds]))
        tqdm.write(f"{system:<44} dev {100 * values[system]:.2f}  {tried}")
    return settings, values


def test_tables(
    benches: Sequence[Bench],
    settings: Mapping[str, str],
    values: Mapping[str, float],
    seeds: Sequence[int],
    beside: Callable[[Any], list[Ranking]],
    control: str,
) -> tuple[list[dict[str, Any]], dict[str, dict[str, np.ndarray]]]:
    """Rows of all systems on test, and their nDCG@10 of each query, averaged over seeds: data set -> system -> values.

    Args:
        benches: The data sets.
        settings: System -> its setting.
        values: System -> what it has on dev.
        seeds: Of the fits.
        beside: Rankings of what is not fitted.
        control: The system that all others are tested against.
    """
    rows: list[dict[str, Any]] = []
    tests: dict[str, dict[str, np.ndarray]] = {}
    for bench in benches:
        dataset = bench.split("test")
        rankings = [bench.ranked(s, settings[s], seed, "test") for s in settings for seed in seeds]
        table = table_rows(dataset, [*beside(bench), *rankings], control)
        for row in table:
            if row["system"] in settings and row["metric"] == "nDCG@10":
                row |= {
                    "setting": f"--learning_rate {settings[row['system']]}",
                    "dev_macro": values[row["system"]],
                }
        rows += table
        tests[bench.name] = {
            system: np.mean([bench.ndcg(system, settings[system], seed, "test") for seed in seeds], axis=0)
            for system in settings
        }
    return rows, tests


def gain_claim(
    claim: str,
    tests: Mapping[str, Mapping[str, np.ndarray]],
    system: str,
    control: str,
    target: float | None = 0.0,
) -> dict[str, Any]:
    """A claim in nDCG@10 points, the macro mean over data sets of a system less a control."""
    differences = {name: 100 * (values[system] - values[control]) for name, values in tests.items()}
    low, high = macro_interval(differences)
    by_dataset = {name: float(difference.mean()) for name, difference in differences.items()}
    entry: dict[str, Any] = {"claim": claim, "value": float(np.mean(list(by_dataset.values())))}
    entry |= {"interval": [low, high], "target": target, "met": None if target is None else low > target}
    return entry | {"held_to": "lower", "system": system, "split": "test", "by_dataset": by_dataset}


def held_to_value(claim: dict[str, Any]) -> dict[str, Any]:
    """A claim that is held to its value, not to the lower end of its interval."""
    return claim | {"met": claim["value"] >= claim["target"], "held_to": "value"}


def at_most(claim: str, value: float, target: float, **beside: Any) -> dict[str, Any]:
    """A claim that a figure is no larger than its target."""
    return {"claim": claim, "value": value, "target": target, "met": value <= target} | beside


def best_settings(tried: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Each system's setting with the best mean on dev, one for all sets.

    Args:
        tried: ``system``, ``setting`` and ``value``, a row a data set.
    """
    values: dict[str, dict[str, list[float]]] = {}
    for row in tried:
        values.setdefault(row["system"], {}).setdefault(row["setting"], []).append(row["value"])
    return {system: max(of, key=lambda setting, of=of: float(np.mean(of[setting]))) for system, of in values.items()}


def significant(
    tests: Mapping[str, Mapping[str, np.ndarray]], chosen: Sequence[str], control: str
) -> dict[str, list[str]]:
    """Data sets on which each system chosen on dev beats the control, corrected for the chosen ones alone."""
    better: dict[str, list[str]] = {system: [] for system in chosen}
    for name, values in tests.items():
        outcomes = compare({system: values[system] for system in better}, values[control])
        for system, outcome in zip(better, outcomes, strict=True):
            if outcome["difference"] > 0 and outcome["p_value"] < 0.05:
                better[system].append(name)
    return better
