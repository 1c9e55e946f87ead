"""What ``unifier_text.py`` measures: fits of UnifieR and of its controls over several data sets, and sums of systems.

Vectors of fits, and what was found by them, are kept under a hash of data, settings and the method's code.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import dense2sparse_text
import frozen_tier
import numpy as np
import torch
from bench import ROOT, FitBench, code_of
from frozen_tier import RAW, best_settings, chosen_on_dev
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModel

from polyrep.encoding import Embeddings
from polyrep.encoding.bm25 import Bm25
from polyrep.encoding.embeddings import rows
from polyrep.errors import InputError
from polyrep.evaluation.bm25 import analyzer_of, rank_with_bm25
from polyrep.evaluation.hybrid import Tuned, choose_weight, filled, fused
from polyrep.evaluation.metrics import per_query_metrics
from polyrep.evaluation.systems import Ranking, costs_of, keep_ranking
from polyrep.files import read_json, staged_file, write_json
from polyrep.hub.folder import fastest_dtype
from polyrep.hub.polyrep_room import pool_tokens
from polyrep.methods import UnifierHead
from polyrep.methods.dense2sparse.frontier import OPERATING_POINTS, pruned, with_head
from polyrep.methods.unifier.modeling_unifier import weighed
from polyrep.search import exact_search
from polyrep.search.weighted import View, find_candidates
from polyrep.training.pairs import HeadData
from polyrep.training.sides import StatesSide

RUN = ROOT / "hub_configs" / "unifier-minilm-frozen"
CODE = code_of("methods/unifier", "training")

UNIFIER, DENSE, WORDS = "UnifieR", "dense only", "lexicon only"
TWO_MODELS = f"{DENSE} + {WORDS}"
SPLADE = "SPLADE"
"""A stock sparse encoder, which the fine-tuned tier trains beside them where one is named."""

SYSTEMS: dict[str, list[str]] = {
    UNIFIER: [],
    DENSE: ["--lexicon_loss", "0", "--sum_loss", "0"],
    WORDS: ["--dense_loss", "0", "--sum_loss", "0", "--dense_steps", "0"],
    "no loss of the sum": ["--sum_loss", "0"],
    "no dense vector": ["--global_token", "none"],
    "dense vector attached": ["--global_token", "attached"],
    "KL": ["--kl", "forward"],
    "KL reversed": ["--kl", "reverse"],
    "gate": ["--gate", "query"],
    "no own words": ["--own_words", "false", "--initial_active", "64", "--lexicon_tau", "1"],
    "BM25 negatives": [],
}
"""Name -> flags over the run; the first three are tuned, each by the same number of settings."""

TUNED = (UNIFIER, DENSE, WORDS)
VIEWS = {DENSE: ("dense",), WORDS: ("lexicon",), SPLADE: ("lexicon",)}
"""Of the others both count; a view that learned nothing is no row."""

KEPT = "--query_top_k 48 --document_top_k 128"
BOTH_TRIES = [f"{rate} {KEPT}" for rate in ("3e-4", "1e-3")]
TRIES = {
    UNIFIER: BOTH_TRIES,
    WORDS: BOTH_TRIES,
    DENSE: [f"{rate} --tau {tau}" for rate in ("3e-4", "1e-3") for tau in ("0.05", "0.1")],
}
"""Learning rates and further flags. How many words are kept asks for no fit of its own."""

MOST_FLOPS = 5.0
"""Of the lexicon view on dev, on every set: settings beyond it are not chosen."""

CANDIDATES, FEW = 1000, 200
RAW_BM25, RAW_D2S = f"{RAW} + BM25", f"{RAW} + Dense2Sparse"
ADAPTER_BM25, ADAPTER_D2S = f"{DENSE} + BM25", f"{DENSE} + Dense2Sparse"
OWN = "adapter of its own"
OWN_BM25, OWN_D2S = f"{OWN} + BM25", f"{OWN} + Dense2Sparse"
"""With an adapter that is fitted to each set alone, and reads as much of a text as the backbone does."""

SUM = f"{UNIFIER}, sum"


@dataclass
class Arguments(frozen_tier.Arguments):
    """What to fit and measure."""

    systems: list[str] = field(
        default_factory=lambda: list(SYSTEMS), metadata={"help": "Systems that are fitted; UnifieR always is."}
    )
    ablation_seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Seeds of the fits beside the three that are tuned."}
    )
    max_length: int = field(
        default=256,
        metadata={"help": "Tokens of a text, of which states are kept: as many as the backbone reads."},
    )
    dev: bool = field(default=False, metadata={"help": "Choose on dev alone, and write what was tried as NAME-dev."})
    chosen: str | None = field(
        default=None, metadata={"help": "The JSON that --dev wrote: its choice is taken, and nothing chosen again."}
    )
    name: str = field(default="unifier-text", metadata={"help": "Name of the files."})


@dataclass(frozen=True)
class Source:
    """Vectors of one data set by one system.

    Attributes:
        key: What tells them from others.
        read: Gives those of ``documents``, or of the queries of a split.
    """

    key: str
    read: Callable[[str], Embeddings]

    def view(self, split: str) -> View:
        """Queries of a split, and the documents; what is normalised has unit length already."""
        return View(self.read(split), self.read("documents"), "dot")


class Bench(FitBench):
    """One data set, and what is found in it.

    Args:
        args: Arguments of the benchmark.
        source: BEIR folder.
        model: The backbone, which reads ``max_length`` tokens.
        whole: The backbone as it is.
    """

    run, code = RUN, CODE

    def __init__(self, args: Arguments, source: str, model: Any, whole: Any):
        super().__init__(args, source, model)
        self.study: Study
        self.cut = UnifierHead.from_backbone(model).config
        self.side: Callable[[str], StatesSide] = cache(self._side)
        self.beside = dense2sparse_text.Bench(args, source, whole)  # type: ignore[arg-type]

    @property
    def layers(self) -> dict[str, Any]:
        """What is kept of the states."""
        return {"layers": (self.cut.split_layer, -1), "token": self.cut.pooling}

    def _side(self, which: str) -> StatesSide:
        """Token states of the documents, or of the queries of a split."""
        dataset = self.split("dev" if which == "documents" else which)
        texts: tuple[Any, Any, str] = (
            (dataset.corpus, "document", self.name)
            if which == "documents"
            else (dataset.queries, "query", f"{self.name}-{which}")
        )
        return StatesSide.encode(self.model, *texts, **self.layers, **self.options)

    @cached_property
    def texts(self) -> list[Any]:
        """What tells its texts and judgments."""
        caches = [self.side(which).embeddings.path.name for which in ("documents", *SPLITS)]
        return [*caches, *(self.split(split).qrels for split in SPLITS)]

    # What is measured beside

    @cached_property
    def bm25(self) -> Source:
        """BM25 over stems."""
        dataset = self.split("dev")
        read = cache(lambda: Bm25.of(analyzer_of(dataset, "en"), dataset.corpus.values()))

        def vectors(which: str) -> Embeddings:
            if which == "documents":
                return read().of_documents(dataset.corpus.values())
            return read().of_queries(self.split(which).queries.values())

        return Source("BM25", cache(vectors))

    @cached_property
    def raw(self) -> Source:
        """The backbone as it is."""

        def vectors(which: str) -> Embeddings:
            side = self.beside.documents if which == "documents" else self.beside.queries(which)
            return side.embeddings

        return Source(self.beside.inputs["documents"], cache(vectors))

    def adapted(self, seed: int) -> Source:
        """The backbone as it is, behind an adapter that is fitted to this data set alone."""
        adapter: Any = cache(lambda: self.beside.rival("adapter", seed))

        def vectors(which: str) -> Embeddings:
            side = self.beside.documents if which == "documents" else self.beside.queries(which)
            return dense2sparse_text.adapted_by(adapter(), side)

        return Source(f"adapter, {seed}, {self.raw.key}, {self.beside.flags}", cache(vectors))

    @cached_property
    def dense2sparse(self) -> Source:
        """Words of a Dense2Sparse head, fitted to this data set by the shipped run."""
        folder = self.beside.dense2sparse([], self.args.seeds[0])
        head = cache(lambda: AutoModel.from_pretrained(folder / "head").eval())
        most = OPERATING_POINTS[dense2sparse_text.WIDE]

        def vectors(which: str) -> Embeddings:
            if which == "documents":
                return pruned(with_head(head(), self.beside.documents, "document"), most[1])
            return pruned(with_head(head(), self.beside.queries(which), "query"), most[0])

        return Source(f"{folder.name}, {most}", cache(vectors))

    # What is found

    def kept_at(self, label: str, *depends: Any) -> Path:
        """Where something is kept that was found here, without an ending."""
        digest = self.digest({"found by": [file.read_text(encoding="utf-8") for file in FINDERS], "depends": depends})
        return Path(self.args.cache_dir) / "rankings" / f"unifier-{self.name}-{label}-{digest}"

    def ranking(
        self, title: str, sources: Sequence[Source], split: str, weight: float = 0.0, count: int = CANDIDATES
    ) -> Ranking:
        """What one system finds, or the weighted sum of two: the first finds ``count`` candidates, both score them."""
        dataset = self.split(split)

        def make() -> Ranking:
            views = [source.view(split) for source in sources]
            costs = [costs_of(view.queries, view.documents) for view in views]
            if len(views) == 1:
                options: dict[str, Any] = {"similarity": "dot", "k": frozen_tier.DEPTH, "left_out": dataset.own}
                return Ranking(title, *exact_search(*views[0][:2], self.ranks, **options), costs[0])
            candidates = find_candidates(views, self.ranks, count=count, left_out=dataset.own)
            best = filled(candidates.best((1.0, weight), self.ranks, frozen_tier.DEPTH), len(self.ranks))
            both = {"bytes_per_document": sum(cost["bytes_per_document"] for cost in costs)}
            return Ranking(title, *best, both, settings={"weights": f"1 and {weight:g}"})

        keys = [source.key for source in sources]
        path = self.kept_at(split, keys, weight, count, self.texts).with_suffix(".safetensors")
        return keep_ranking(path, title, make, frozen_tier.DEPTH)

    def fused(self, title: str, sources: Sequence[Source], split: str) -> Ranking:
        """Reciprocal rank fusion of two systems."""

        def make() -> Ranking:
            views = [source.view(split) for source in sources]
            both = sum(costs_of(view.queries, view.documents)["bytes_per_document"] for view in views)
            return Ranking(title, *fused(views, self.split(split), self.ranks), {"bytes_per_document": both})

        path = self.kept_at(f"{split}-fused", [source.key for source in sources], self.texts)
        return keep_ranking(path.with_suffix(".safetensors"), title, make, frozen_tier.DEPTH)

    def ndcg(self, system: str, setting: str, seed: int, split: str) -> np.ndarray:
        """What a system is tuned by, of each query: nDCG@10 of its one view, or of the sum of both."""
        return self.measured(self.study.whole(self, system, setting, seed, split))

    def measured(self, ranking: Ranking, split: str = "dev") -> np.ndarray:
        """nDCG@10 of each query."""
        return per_query_metrics(self.split(split), ranking)["nDCG@10"]


SPLITS = ("train", "dev", "test")
FINDERS = [ROOT / "modeling" / part for part in ("search/weighted.py", "evaluation/hybrid.py", "encoding/bm25.py")]


class Study:
    """Fits over all data sets together, and what they gain.

    Args:
        args: Arguments of the benchmark.
        benches: The data sets.
    """

    def __init__(self, args: Arguments, benches: Sequence[Bench]):
        self.args, self.benches = args, benches
        for bench in benches:
            bench.study = self
        self.weight: Callable[..., float] = cache(self._weight)

    # Fits

    @cached_property
    def pairs(self) -> HeadData:
        """Training pairs of all data sets, whose states stay on the disk."""
        plan = frozen_tier.planned(self.benches[0], [], 0)
        data = HeadData(kind="states", negatives=plan.head.negatives, labels=True, depth=plan.head.depth)
        for bench in self.benches:
            data.add(bench.model, bench.split("train"), **bench.layers, **bench.options)
        return data

    def pairs_of(self, system: str) -> HeadData:
        """The same, or with the negatives that BM25 finds."""
        data = copy.copy(self.pairs)
        data.parts = list(data.parts)
        if system == "BM25 negatives":
            for number, bench in enumerate(self.benches):
                found = rank_with_bm25(bench.split("train"), data.depth).positions
                data.parts[number] = replace(data.parts[number], nearest=found)
        return data

    def fit(self, system: str, setting: str, seed: int) -> Path:
        """File with the vectors that a fit gives all data sets, made now or before."""
        learned = setting.partition(" --query_top_k")[0].split()
        flags = ["--bf16", str(HALF), *SYSTEMS[system], "--learning_rate", *learned, *self.benches[0].flags]
        texts = [bench.texts for bench in self.benches]
        bm25 = system if system == "BM25 negatives" else None
        digest = self.benches[0].digest({"flags": flags, "seed": seed, "texts": texts, "negatives": bm25})
        path = Path(self.args.cache_dir) / "heads" / f"unifier-{system.replace(' ', '-')}-{digest}.safetensors"
        if not path.is_file():
            started = time.perf_counter()
            trainer = frozen_tier.fitted(
                self.benches[0],
                ["--datasets", *self.args.datasets, *flags],
                seed,
                lambda plan: UnifierHead.from_backbone(self.benches[0].model, **plan.config),
                lambda plan, objective: self.pairs_of(system),
            )
            head = trainer.objective.model.eval()
            seconds = {"fit_seconds": time.perf_counter() - started}
            arrays = {}
            for bench in self.benches:
                for which in ("documents", "dev", "test"):
                    found = encoded(head, bench.side(which), which, trainer.objective.views)
                    arrays |= {f"{bench.name}.{which}.{name}": array for name, array in found.items()}
            costs = seconds | {"words": head.config.words, "seconds": time.perf_counter() - started}
            keep_vectors(path, arrays, costs)
        return path

    def source(self, bench: Bench, system: str, setting: str, seed: int, view: str) -> Source:
        """A view of a data set by a fit."""
        path = self.fit(system, setting, seed)
        words = dict(zip(("query", "document"), setting.split()[-3::2], strict=True)) if view == "lexicon" else {}

        def vectors(which: str) -> Embeddings:
            with safe_open(path, framework="numpy") as stored:
                start = f"{bench.name}.{which}."
                names = [name for name in stored.keys() if name.startswith(start + view)]  # noqa: SIM118
                part = {name.rpartition(".")[2]: stored.get_tensor(name) for name in names}
            if view == "dense":
                return Embeddings("sentence", part["values"], None, None, part["values"].shape[1], 0.0, Path())
            width = bench.cut.vocab_size
            whole = Embeddings("sparse", part["values"], part["offsets"], part["indices"], width, 0.0, Path())
            return pruned(whole, int(words["document" if which == "documents" else "query"]))

        return Source(f"{path.stem}, {view}, {words}", cache(vectors))

    def sources(self, bench: Bench, system: str, setting: str, seed: int) -> list[Source]:
        """The views of a fit that learned something, the one that finds candidates first."""
        return [self.source(bench, system, setting, seed, view) for view in VIEWS.get(system, ("lexicon", "dense"))]

    # Sums

    def _weight(self, name: str, setting: str = "") -> float:
        """Of the second system of a sum: the best on dev, on the mean of the data sets, with the first seed.

        Args:
            name: A fitted system with two views, or a hybrid of :meth:`hybrid`.
            setting: Of the fit.
        """
        first, pairs = (
            self.benches[0],
            [self.parts(bench, name, setting, self.args.seeds[0]) for bench in self.benches],
        )
        keys = [[source.key for source in pair] for pair in pairs]
        path = first.kept_at("weight", keys, [bench.texts for bench in self.benches]).with_suffix(".json")
        if not path.is_file():
            tuned = []
            for bench, pair in zip(self.benches, pairs, strict=True):
                views, dev = [source.view("dev") for source in pair], bench.split("dev")
                found = find_candidates(views, bench.ranks, count=CANDIDATES, left_out=dev.own)
                tuned.append(Tuned(found, dev, bench.ranks))
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"weight": choose_weight(tuned)})
        return float(read_json(path)["weight"])

    def parts(self, bench: Bench, name: str, setting: str, seed: int) -> list[Source]:
        """What is summed: the views of one fit, or two systems."""
        return self.sources(bench, name, setting, seed) if name in SYSTEMS else self.hybrid(bench, name, seed)

    def hybrid(self, bench: Bench, name: str, seed: int) -> list[Source]:
        """Two systems by the name of their sum, the one that finds candidates first.

        Two of our own models do it as UnifieR does, by words. With others it is the dense one, which is best for them:
        BM25 and Dense2Sparse find no document that shares no word with a query.
        """
        dense, words = name.split(" + ")
        lexical = {"BM25": lambda: bench.bm25, "Dense2Sparse": lambda: bench.dense2sparse}
        others = {RAW: lambda: bench.raw, OWN: lambda: bench.adapted(seed)}
        meaning = others[dense]() if dense in others else self.one(bench, dense, seed)
        return [meaning, lexical[words]()] if words in lexical else [self.one(bench, words, seed), meaning]

    def one(self, bench: Bench, system: str, seed: int) -> Source:
        """A system of one view, as it was tuned."""
        (source,) = self.sources(bench, system, self.settings[system], seed)
        return source

    def summed(
        self, bench: Bench, title: str, name: str, setting: str, seed: int, split: str, count: int = CANDIDATES
    ) -> Ranking:
        """The sum of two views or systems by the weight that dev chose."""
        parts = self.parts(bench, name, setting, seed)
        return bench.ranking(title, parts, split, self.weight(name, setting), count)

    def whole(self, bench: Bench, system: str, setting: str, seed: int, split: str) -> Ranking:
        """What a system is there for: the sum of its views, or its only one."""
        if system in VIEWS:
            return bench.ranking(system, self.sources(bench, system, setting, seed), split)
        return self.summed(bench, f"{system}, sum", system, setting, seed, split)

    # Choices

    @property
    def fitted(self) -> list[str]:
        """Systems that are fitted, in the order of the table."""
        return [system for system in SYSTEMS if system in self.args.systems or system == UNIFIER]

    @cached_property
    def tried(self) -> list[dict[str, Any]]:
        """Every setting of what is tuned, with the first seed: what it has on dev, and what it costs."""
        rows = []
        tuned = [(system, setting) for system in TUNED if system in self.fitted for setting in TRIES[system]]
        for system, setting in tqdm(tuned, desc="tuning"):
            rows += self.on_dev(system, setting)
        return rows

    def on_dev(self, system: str, setting: str) -> list[dict[str, Any]]:
        """What a setting has on dev of each data set and costs, with the first seed."""
        rows, seed = [], self.args.seeds[0]
        for bench in self.benches:
            row: dict[str, Any] = {"system": system, "dataset": bench.name, "split": "dev", "metric": "nDCG@10"}
            row |= {"setting": setting, "value": float(bench.ndcg(system, setting, seed, "dev").mean())}
            if system != DENSE:
                words = self.source(bench, system, setting, seed, "lexicon")
                row["flops"] = bench.ranking(f"{system}, lexicon", [words], "dev").costs["flops"]
            rows.append(row | {"queries": len(bench.split("dev").queries)})
        tqdm.write(f"{system:<16} {setting:<70} {[round(row['value'], 4) for row in rows]}")
        return rows

    @cached_property
    def chosen(self) -> tuple[dict[str, str], dict[str, float]]:
        """Each system's setting, and its mean nDCG@10 on dev."""
        choice = self._choice() if self.args.chosen else best(self.tried)
        tuned = {system: [choice[system]] for system in TUNED if system in self.fitted}
        settings, values = chosen_on_dev(self.benches, tuned, self.args.seeds)  # type: ignore[arg-type]
        others = {system: [settings[UNIFIER]] for system in self.fitted if system not in TUNED}
        more, more_values = chosen_on_dev(self.benches, others, self.args.ablation_seeds)  # type: ignore[arg-type]
        return settings | more, values | more_values

    def _choice(self) -> dict[str, str]:
        """What ``--chosen`` names; InputError unless it has a setting that is known for every system that is tuned."""
        chosen = read_json(Path(self.args.chosen or "")).get("chosen")
        for system in (system for system in TUNED if system in self.fitted):
            if not isinstance(chosen, dict) or chosen.get(system) not in TRIES[system]:
                raise InputError(
                    f"--chosen {self.args.chosen}: has no setting of {system!r} that is among those tried here, so "
                    "nothing says how to fit it. Name the JSON that --dev wrote with this code."
                )
        return chosen

    @property
    def settings(self) -> dict[str, str]:
        """System -> what dev chose; of the ablations, that of UnifieR."""
        return self.chosen[0]

    def seeds(self, system: str) -> list[int]:
        """Of a system's fits."""
        return self.args.seeds if system in TUNED else self.args.ablation_seeds

    @property
    def hybrids(self) -> list[str]:
        """Sums of two systems that can be had."""
        there = [TWO_MODELS] if WORDS in self.settings and DENSE in self.settings else []
        adapted = [ADAPTER_BM25, ADAPTER_D2S] if DENSE in self.settings else []
        return [*there, RAW_BM25, RAW_D2S, OWN_BM25, OWN_D2S, *adapted]

    def rankings(self, bench: Bench, split: str = "test") -> list[Ranking]:
        """Every row of a data set; a system's seeds are rankings of one name."""
        return [
            bench.ranking("BM25", [bench.bm25], split),
            bench.ranking(RAW, [bench.raw], split),
            bench.ranking("Dense2Sparse", [bench.dense2sparse], split),
            *(bench.ranking(OWN, [bench.adapted(seed)], split) for seed in self.args.seeds),
            *self.of_fits(bench, split),
            *self.of_hybrids(bench, split),
        ]

    def of_fits(self, bench: Bench, split: str) -> list[Ranking]:
        """Rows of what is fitted: views and sums."""
        found = []
        for system, setting in self.settings.items():
            for seed in self.seeds(system):
                if system not in VIEWS:
                    for view in ("lexicon", "dense"):
                        source = self.source(bench, system, setting, seed, view)
                        found.append(bench.ranking(f"{system}, {view}", [source], split))
                whole = self.whole(bench, system, setting, seed, split)
                found.append(replace(whole, settings={"flags": f"--learning_rate {setting}"} | whole.settings))
                if system == UNIFIER:
                    parts = self.sources(bench, system, setting, seed)
                    found.append(bench.fused(f"{system}, RRF", parts, split))
                    found.append(self.summed(bench, FEWER, system, setting, seed, split, FEW))
        return found

    def of_hybrids(self, bench: Bench, split: str) -> list[Ranking]:
        """Rows of sums of two systems."""
        return [
            self.summed(bench, f"{name}, sum", name, "", seed, split)
            for name in self.hybrids
            for seed in (self.args.seeds if name not in (RAW_BM25, RAW_D2S) else self.args.seeds[:1])
        ]


def keep_vectors(path: Path, arrays: Mapping[str, np.ndarray], costs: Mapping[str, float]) -> None:
    """Write what a fit gives the data sets, whole or not at all."""
    with staged_file(path) as partial:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        save_file(tensors, partial, metadata={"costs": json.dumps(costs)})


def best(tried: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Each system's setting with the best mean on dev, one for all sets.

    Settings whose words cost more than :data:`MOST_FLOPS` on any set are left out; where all do, the cheapest is it.
    """
    costs: dict[str, dict[str, float]] = {}
    for row in tried:
        of = costs.setdefault(row["system"], {})
        of[row["setting"]] = max(of.get(row["setting"], 0.0), row.get("flops", 0.0))
    allowed = {
        system: [setting for setting, cost in of.items() if cost <= MOST_FLOPS] or [min(of, key=of.__getitem__)]
        for system, of in costs.items()
    }
    return best_settings([row for row in tried if row["setting"] in allowed[row["system"]]])


HALF = fastest_dtype("auto") == torch.bfloat16
"""Products are in half precision where the processor computes in it; scores never are."""

FEWER = f"{UNIFIER}, sum of {FEW}"

ENCODED, MOST_WORDS = 32, 256
"""Texts of a batch, and words of a text that are kept at most."""


@torch.inference_mode()
def encoded(head: UnifierHead, side: StatesSide, which: str, views: Sequence[str]) -> dict[str, np.ndarray]:
    """Views of cached texts, of queries weighed by the gate, as flat arrays in half precision."""
    head.config.query_top_k = head.config.document_top_k = MOST_WORDS
    task = "document" if which == "documents" else "query"
    order = np.argsort(side.embeddings.lengths, kind="stable")  # side by side with others of their length
    dense: list[np.ndarray] = []
    words: dict[str, list[np.ndarray]] = {"values": [], "indices": [], "lengths": []}
    for start in tqdm(range(0, len(order), ENCODED), desc=which, leave=False):
        features = side.features(order[start : start + ENCODED])
        states, mask = features["token_states"], features["attention_mask"]
        pooled = pool_tokens(states[:, :, -1], mask, head.config.pooling)
        read = states[:, :, 0], pooled, features["input_ids"], mask, task
        with torch.autocast("cpu", torch.bfloat16, enabled=HALF):
            output = head(*read, tuple(views))
        if "dense" in views:  # which costs nothing, and is compared with what was never rounded so
            output["dense"] = head(*read, ("dense",)).dense
        found = weighed(output)
        if "dense" in found:
            dense.append(found["dense"].half().numpy())
        if "lexicon" in found:
            text_of, word = found["lexicon"].nonzero(as_tuple=True)
            words["values"].append(found["lexicon"][text_of, word].half().numpy())
            words["indices"].append(word.numpy().astype(np.int32))
            words["lengths"].append(text_of.bincount(minlength=len(states)).numpy())
    arrays, back = {}, np.argsort(order)
    if dense:
        arrays["dense.values"] = np.concatenate(dense)[back]
    if words["lengths"]:
        values, indices, lengths = (np.concatenate(part) for part in words.values())
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        sorted_ = Embeddings("sparse", values, offsets, indices, head.config.vocab_size, 0.0, Path())
        whole = rows(sorted_, back)
        arrays |= {f"lexicon.{name}": getattr(whole, name) for name in ("values", "indices", "offsets")}
    return arrays
