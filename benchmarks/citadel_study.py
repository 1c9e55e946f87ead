"""What ``citadel_text.py`` measures: fits of CITADEL and of what it is held against, and what they find.

Fits, and what was found by them, are kept under a hash of data, settings and the method's code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import frozen_tier
import lemur_text
import numpy as np
import reinpool_text
import torch
from bench import ROOT, FitBench, code_of
from tqdm import tqdm
from transformers import AutoModel

from polyrep.cli import train as train_run
from polyrep.encoding import Embeddings, embed
from polyrep.encoding.embeddings import in_memory, side_by_side
from polyrep.encoding.views import views_of
from polyrep.errors import InputError
from polyrep.evaluation.bm25 import rank_with_bm25
from polyrep.evaluation.evaluate import EvaluationArguments
from polyrep.evaluation.frontier.rows import Encoded, quantized
from polyrep.evaluation.frontier.timed import ReadyIndex
from polyrep.evaluation.hybrid import load_dev, rank_hybrid, side_of_bm25, side_of_model
from polyrep.evaluation.metrics import per_query_metrics
from polyrep.evaluation.systems import Ranking, bytes_per_document, costs_of, keep_ranking
from polyrep.files import digest, read_json, write_json
from polyrep.hub import load
from polyrep.hub.folder import fastest_dtype
from polyrep.methods import CitadelHead, CitadelHeadConfig, CitadelHeadObjective
from polyrep.methods.citadel.frontier import routed_tokens, similarity_of
from polyrep.methods.citadel.modeling_citadel import principal_axes
from polyrep.search import exact_search
from polyrep.search.ranking import deeper, rescore, without
from polyrep.search.routed import statistics_of_lists
from polyrep.training.pairs import HeadData
from polyrep.training.sides import Features, TokenSide

CITADEL, STATIC, WEIGHTS = "CITADEL", "static keys", "weights alone"
FULL, NARROW = "MaxSim", "MaxSim, 32 dims"
NO_BALANCE = "no balance"


@dataclass(frozen=True)
class System:
    """What is fitted.

    Attributes:
        flags: Over the tier's run.
        whole: Whether it has as many steps as the method; else those of the fits among which dev chooses.
        run: Another run than the tier's, which takes of the method's setting the learning rate alone.
    """

    flags: tuple[str, ...] = ()
    whole: bool = False
    run: str = ""


SHARED = {
    CITADEL: System(whole=True),
    WEIGHTS: System(("--token_dim", "0"), whole=True),
    **{f"{count} key{'s' * (count > 1)}": System(("--document_keys", str(count))) for count in (1, 3, 7)},
    NO_BALANCE: System(("--balance_weight", "0")),
    "no router loss": System(("--router_weight", "0")),
    "no regularisation": System(("--balance_weight", "0", "--sparsity_weight", "0")),
}
"""The method, and without each of its parts; by itself it has five keys."""


@dataclass(frozen=True)
class Tier:
    """A way to learn.

    Attributes:
        run: The shipped run.
        systems: Name -> what is fitted.
        tries: Learning rates and further flags, among which dev chooses.
    """

    run: Path
    systems: Mapping[str, System]
    tries: Sequence[str]


TIERS = {
    "frozen": Tier(
        ROOT / "hub_configs" / "citadel-minilm-frozen",
        SHARED | {STATIC: System(whole=True)},
        [
            f"{rate} --initial_active {active} {learned}".strip()
            for rate in ("1e-3", "3e-3")
            for active in (2, 8)
            for learned in ("", "--label_weight 0.3")
        ],
    ),
    "finetuned": Tier(
        ROOT / "hub_configs" / "citadel-minilm",
        SHARED
        | {
            STATIC: System(("--routing", "static"), whole=True),
            "router at the last layer": System(("--router_layer", "-1")),
            f"{FULL}, trained alike": System(whole=True, run="late-interaction-minilm"),
            f"{NARROW}, trained alike": System(("--dim", "32"), whole=True, run="late-interaction-minilm"),
        },
        ["1e-4", "1e-4 --initial_active 4", "2e-4"],
    ),
}
"""A router over the cached token vectors of a late-interaction model, or the whole encoder."""

RIVALS = ("ReinPool", "hierarchical", "dense + BM25", "LEMUR")
POOLED = (8, 16, 32)
"""Vectors of a document, in a byte a number, to whose size entries are cut, too."""

LEMUR_DIM, RERANKED = 512, 200
OWN_SAMPLE = 1024
"""Documents by which the map of static keys' vectors is set."""


@dataclass
class Arguments(frozen_tier.Arguments):
    """What to fit and measure."""

    tier: str = field(default="frozen", metadata={"help": f"What learns: {' or '.join(TIERS)}."})
    datasets: list[str] = field(
        default_factory=lambda: ["tldr_pages", "scitldr", "scifact", "pubmedqa"], metadata={"help": "BEIR folders."}
    )
    backbone: str = field(
        default="models/four/late-interaction-minilm/final",
        metadata={
            "help": "Folder or Hub id of a MultiVectorEncoder: what MaxSim and its rivals read, and of the "
            "tier frozen the router."
        },
    )
    dense: str = field(default="minilm", metadata={"help": "A SentenceTransformer, which BM25 is added to."})
    systems: list[str] = field(default_factory=list, metadata={"help": "Systems that are fitted; default: all."})
    rivals: list[str] = field(default_factory=lambda: list(RIVALS), metadata={"help": "What is measured beside."})
    ablation_seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Seeds of the fits beside the method."}
    )
    tuning_steps: int = field(
        default=100,
        metadata={
            "help": "Steps of the fits among which dev chooses, and of the ablations; 0: as many as the others."
        },
    )
    dev: bool = field(default=False, metadata={"help": "Choose on dev alone, and write what was tried as NAME-dev."})
    chosen: str | None = field(
        default=None, metadata={"help": "The JSON that --dev wrote: its choice is taken, and nothing chosen again."}
    )
    fit_only: str = field(
        default="", metadata={"help": "1/2: fit and rank every second system from the first on, and write nothing."}
    )
    name: str = field(default="", metadata={"help": "Name of the files; default: citadel-TIER."})


class Sides(NamedTuple):
    """Queries and documents of one row."""

    queries: Embeddings
    documents: Embeddings
    similarity: str
    costs: Mapping[str, float] = {}
    settings: Mapping[str, Any] = {}


class OwnWords(CitadelHeadObjective):
    """The control COIL over cached vectors: a token's key is its own word, and the map of its vector is learned."""

    own_words = True

    def prepare(self, data: HeadData) -> HeadData:
        """Start the map at the principal axes of some documents."""
        documents = [part.documents for part in data.parts]
        step = -(-sum(map(len, documents)) // OWN_SAMPLE)
        sample = [side.features(np.arange(0, len(side), step)) for side in documents]

        def encode() -> None:
            for side in sample:
                self.model(side["token_embeddings"], side["attention_mask"], "document", side["input_ids"])

        self.model.calibrate(encode)
        return data


@dataclass(frozen=True)
class WordSide(TokenSide):
    """Token vectors and the ids of their words: ``input_ids`` among the features.

    Attributes:
        ids: ``(vectors of all texts,)``.
    """

    ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), kw_only=True)

    def vectors_of(self, rows: np.ndarray) -> Features:
        """Vectors and ids under one another."""
        found = super().vectors_of(rows)
        assert self.embeddings.offsets is not None
        places, _ = side_by_side(self.embeddings.offsets, rows)
        ids = torch.zeros(found["attention_mask"].shape, dtype=torch.int64)
        ids[found["attention_mask"]] = torch.from_numpy(self.ids[places].astype(np.int64))
        return found | {"input_ids": ids}


class Bench(FitBench):
    """One data set: the backbone's cached token vectors, and what is found in it."""

    code = code_of("methods/citadel", "training")

    def __init__(self, args: Arguments, source: str, model: Any):
        super().__init__(args, source, model)
        self.run = TIERS[args.tier].run
        self.late = reinpool_text.Bench(args, source, model)

    @property
    def documents(self) -> Embeddings:
        """Token vectors of the corpus."""
        return self.late.documents

    def queries(self, split: str) -> Embeddings:
        """Token vectors of the queries of a split."""
        return self.late.queries(split)

    @cached_property
    def texts(self) -> list[Any]:
        """What tells its texts, their vectors, and judgments."""
        caches = [self.documents.path.name, *(self.queries(split).path.name for split in ("train", "dev", "test"))]
        return [*caches, *(self.split(split).qrels for split in ("train", "dev", "test"))]

    def own_words(self, which: str) -> np.ndarray:
        """Ids of the words that the cached vectors of the documents, or of a split's queries, are of.

        Raises:
            InputError: The backbone gives no vector of some words.
        """
        texts = list((self.split("dev").corpus if which == "documents" else self.split(which).queries).values())
        task, found = "document" if which == "documents" else "query", []
        for start in range(0, len(texts), 1024):
            batch = self.model.preprocess(texts[start : start + 1024], task=task)
            mask = batch["attention_mask"].bool()
            found += [ids[there].numpy() for ids, there in zip(batch["input_ids"], mask, strict=True)]
        vectors = self.documents if which == "documents" else self.queries(which)
        if [len(ids) for ids in found] != vectors.lengths.tolist():
            raise InputError(
                f"{self.args.backbone}: gives {len(vectors.values):,} vectors of {sum(map(len, found)):,} tokens "
                f"({self.name}, {which}), so which words they are of is not known, and none could be its own key. "
                f"Leave {STATIC!r} out of --systems."
            )
        return np.concatenate(found)

    def rank(self, sides: Sides, split: str) -> Ranking:
        """What a row finds, as deep as is kept, and what it costs."""
        dataset = self.split(split)
        depth, (queries, documents, similarity, costs, settings) = frozen_tier.DEPTH, sides
        if documents.kind == "routed":  # list by list, as an index does it
            found = ReadyIndex(documents, self.ranks, similarity).search(queries, deeper(depth, dataset.own))
            found = without(dataset.own, *found, depth)
        else:
            options: dict[str, Any] = {"similarity": similarity, "k": depth, "left_out": dataset.own}
            found = exact_search(queries, documents, self.ranks, **options)
        said = costs_of(queries, documents) | (lists_of(documents) if documents.kind == "routed" else {})
        if documents.kind == "tokens":
            said["products"] = float(queries.lengths.mean() * documents.lengths.mean())
        return Ranking("", *found, {**said, **costs}, settings=dict(settings))

    def kept(self, title: str, key: Any, split: str, make: Callable[[], Ranking]) -> Ranking:
        """A row from where it is kept, made first if it is not there."""
        name = digest([key, split, self.texts])
        path = Path(self.args.cache_dir) / "rankings" / f"citadel-{self.name}-{split}-{name}.safetensors"
        return keep_ranking(path, title, make, frozen_tier.DEPTH)

    def measured(self, ranking: Ranking, split: str) -> np.ndarray:
        """nDCG@10 of each query."""
        return per_query_metrics(self.split(split), ranking)["nDCG@10"]

    # What is measured beside

    def beside(self, split: str) -> Iterator[Ranking]:
        """MaxSim of the backbone over all token vectors, and over their principal axes."""
        yield self.kept(
            FULL, ["full"], split, lambda: self.rank(Sides(self.queries(split), self.documents, "maxsim"), split)
        )

        def narrow() -> Ranking:
            step = -(-len(self.documents.values) // 2**17)
            sample = torch.from_numpy(np.asarray(self.documents.values[::step], np.float32))
            axes = principal_axes(sample, min(32, self.documents.dim))
            sides = (projected(side, axes) for side in (self.queries(split), self.documents))
            return self.rank(Sides(*sides, "maxsim"), split)

        yield self.kept(NARROW, ["narrow"], split, narrow)

    def rival(self, name: str, split: str = "test") -> list[Ranking]:
        """Rows of something else that could be done with the same model, or without it."""
        return {
            "ReinPool": self._reinpool,
            "hierarchical": self._hierarchical,
            "dense + BM25": self._hybrid,
            "LEMUR": self._lemur,
        }[name](split)

    def _pooled(self, name: str, key: Any, split: str, make: Callable[[Any], dict[int, Embeddings]]) -> list[Ranking]:
        lazily = reinpool_text.Lazily(lambda: make(POOLED))

        def ranked(k: int) -> Ranking:
            row = quantized(Encoded(self.queries(split), lazily.at(k)(), "maxsim"), "int8")
            return self.rank(Sides(row.queries, row.documents, "maxsim", row.costs), split)

        return [self.kept(f"{name}, {k}, int8", [name, key, k], split, lambda k=k: ranked(k)) for k in POOLED]

    def _hierarchical(self, split: str) -> list[Ranking]:
        return self._pooled("hierarchical", None, split, self.late.hierarchical)

    def _reinpool(self, split: str) -> list[Ranking]:
        found = []
        for seed in self.args.seeds:
            folder = self.late.head([], seed)
            make: Any = lambda numbers, folder=folder: self.late.by_head(folder, numbers)  # noqa: E731
            found += self._pooled("ReinPool", folder.parent.name, split, make)
        return found

    def _lemur(self, split: str) -> list[Ranking]:
        other = lemur_text.Bench(self.args, self.source, self.model, split)
        dataset, title = self.split(split), f"LEMUR, {LEMUR_DIM}, rerank {RERANKED}"
        found = []
        for seed in self.args.seeds:
            folder = lemur_text.fit(self.args, [self.source], seed, [], other.caches)

            def make(folder: Path = folder) -> Ranking:
                head = lemur_text.opened(folder)
                with torch.inference_mode():
                    both = lemur_text.encode(head, other)[:2]
                    queries, documents = (
                        head.reduce(side, task, LEMUR_DIM).numpy()
                        for side, task in zip(both, ("query", "document"), strict=True)
                    )
                sides = in_memory(queries), in_memory(documents.astype(np.float16))
                options: dict[str, Any] = {"similarity": "dot", "k": RERANKED, "left_out": dataset.own}
                first, _ = exact_search(*sides, self.ranks, **options)
                asked = self.queries(split)
                second = rescore(asked, self.documents, first, self.ranks, similarity="maxsim")
                both_sizes = costs_of(*sides), costs_of(asked, self.documents)
                return Ranking(
                    title, *second, {"bytes_per_document": sum(c["bytes_per_document"] for c in both_sizes)}
                )

            found.append(self.kept(title, folder.parent.name, split, make))
        return found

    def _hybrid(self, split: str) -> list[Ranking]:
        dataset = self.split(split)

        @lru_cache(1)
        def made() -> dict[str, Ranking]:
            dev = load_dev(self.source, dataset, EvaluationArguments(hybrid=True))
            options: dict[str, Any] = {"cache_dir": self.options["cache_dir"], "batch_size": 32}
            model = load(self.args.dense, dtype=fastest_dtype("auto"))
            first = side_of_model("dense", model, dataset, dev, None, **options)
            both, _ = rank_hybrid(first, side_of_bm25("BM25", dataset, dev, "en"), dataset, dev, None)
            alone = self.rank(Sides(first.queries, first.documents, first.similarity), split)
            return {"dense": alone, "BM25": rank_with_bm25(dataset, frozen_tier.DEPTH), "dense + BM25": both}

        names = ("dense", "BM25", "dense + BM25")
        rankings = [self.kept(n, [n, self.args.dense], split, lambda n=n: made()[n]) for n in names]
        return [replace(r, costs={"bytes_per_document": r.costs["bytes_per_document"]}) for r in rankings]


class Study:
    """Fits over all data sets together, and what they find.

    Args:
        args: Arguments of the benchmark.
        benches: The data sets.
    """

    def __init__(self, args: Arguments, benches: Sequence[Bench]):
        self.args, self.benches, self.tier = args, benches, TIERS[args.tier]
        self.vectors = lru_cache(1)(self._vectors)

    # Fits

    @property
    def fitted(self) -> list[str]:
        """Systems that are fitted, in the order of the table."""
        return [name for name in self.tier.systems if name in (self.args.systems or self.tier.systems)]

    def seeds(self, system: str) -> list[int]:
        """Of a system's fits."""
        return self.args.seeds if system == CITADEL else self.args.ablation_seeds

    def flags(self, system: str, setting: str) -> list[str]:
        """Of a fit, over its run; ``setting`` is a learning rate and further flags."""
        what = self.tier.systems[system]
        learned = setting.split()[: 1 if what.run else None]
        return ["--learning_rate", *learned, *what.flags, *self.benches[0].flags]

    def rehearsed(self, setting: str) -> str:
        """A setting with as few steps as dev chooses among; flags of the command say otherwise."""
        return f"{setting} --max_steps {self.args.tuning_steps}" if self.args.tuning_steps else setting

    def setting_of(self, system: str, chosen: str) -> str:
        """The setting of a system: the method's, with its number of steps."""
        return chosen if self.tier.systems[system].whole else self.rehearsed(chosen)

    def fit(self, system: str, setting: str, seed: int) -> Path:
        """The folder of a head, or of a model, made now or before."""
        what, flags = self.tier.systems[system], self.flags(system, setting)
        run = ROOT / "hub_configs" / what.run if what.run else self.tier.run
        depends = {"system": system == STATIC, "flags": flags, "seed": seed, "tier": self.args.tier}
        depends |= {"texts": [bench.texts for bench in self.benches], "backbone": self.args.backbone}
        depends["recipe"] = [file.read_text(encoding="utf-8") for file in sorted(run.iterdir())]
        name = f"citadel-{system.replace(' ', '-').replace(',', '')}-{self.benches[0].digest(depends)}"
        folder = Path(self.args.cache_dir) / "heads" / name
        if not (folder / "training.json").is_file():
            threads = torch.get_num_threads()
            if system == STATIC and self.args.tier == "frozen":
                self._fit_own_words(folder, flags, seed)
            else:
                where = ["--output_dir", str(folder), "--overwrite", "--save_strategy", "no", "--seed", str(seed)]
                argv = [run.name, "--datasets", *self.args.datasets, *where, *flags]
                if self.args.tier == "frozen":
                    argv += ["--backbone", self.args.backbone, "--head_only", "true"]
                    argv += ["--cache_dir", self.benches[0].options["cache_dir"]]
                train_run(argv, prog="train.py")
            torch.set_num_threads(threads)
        return folder / ("head" if self.args.tier == "frozen" else "final")

    def _fit_own_words(self, folder: Path, flags: list[str], seed: int) -> None:
        first = self.benches[0]

        def head_of(plan: Any) -> CitadelHead:
            words = {"vocab_size": len(first.model.tokenizer), "special_token_ids": []}  # [CLS] meets [CLS] as well
            reads = {"routing": "static", "router_reads": "vectors", "dim": first.documents.dim}
            return CitadelHead(CitadelHeadConfig(**plan.config | reads | words))

        def data_of(plan: Any, objective: Any) -> HeadData:
            labels = objective.needs_labels
            data = HeadData(kind="tokens", negatives=plan.head.negatives, labels=labels, depth=plan.head.depth)
            for number, bench in enumerate(self.benches):
                data.add(bench.model, bench.split("train"), **bench.options)
                part = data.parts[number]
                sides = {
                    name: WordSide(side.embeddings, side.first, same=side.same, ids=bench.own_words(which))
                    for name, side, which in (
                        ("queries", part.queries, "train"),
                        ("documents", part.documents, "documents"),
                    )
                }
                data.parts[number] = replace(part, **sides)
            return data

        flags = ["--datasets", *self.args.datasets, *flags]
        head = head_of(frozen_tier.planned(first, flags, seed))
        if not head.config.projects:  # vectors as they are, of which nothing is learned
            head.save_pretrained(folder / "head")
            write_json(folder / "training.json", {"steps": 0})
            return
        trainer = frozen_tier.fitted(first, flags, seed, head_of, data_of, objective_class=OwnWords)
        trainer.objective.model.save_pretrained(folder / "head")
        write_json(folder / "training.json", {"steps": trainer.state.global_step, "log": trainer.state.log_history})

    # Vectors and rows

    def _vectors(self, bench: Bench, system: str, folder: Path) -> dict[str, Any]:
        """Vectors of a data set by a fit: ``dev``, ``test``, ``documents``; with ``similarity`` and ``vocabulary``."""
        split = {"documents": "document", "dev": "query", "test": "query"}
        if self.args.tier == "finetuned":
            model = load(folder, trust_remote_code=True, dtype=fastest_dtype("auto"))
            view = views_of(model).get("routed")  # none of a model that compares by MaxSim
            similarity = view.similarity if view else str(model.similarity_fn_name)
            found: dict[str, Any] = {"similarity": similarity, "vocabulary": view.vocabulary if view else 0}
            for which, task in split.items():
                dataset = bench.split("dev" if which == "documents" else which)
                texts = dataset.corpus if which == "documents" else dataset.queries
                options: dict[str, Any] = {"task": task, "kind": view and view.kind, **bench.options}
                found[which] = embed(model, texts, name=f"{bench.name}-{which}", **options)
            return found
        head = AutoModel.from_pretrained(folder).eval()
        sides = {which: bench.documents if which == "documents" else bench.queries(which) for which in split}
        found = {"similarity": similarity_of(head), "vocabulary": head.config.vocab_size}
        for which, side in sides.items():
            if head.config.routing == "static":
                dtype = np.float16 if which == "documents" else np.float32
                axes = head.projection.weight.detach() if head.config.projects else None
                made = projected(side, axes, dtype)
                found[which] = replace(made, kind="routed", indices=bench.own_words(which).astype(np.int32))
            else:
                made = routed_tokens(head, side, split[which])
                found |= {which: made.entries, f"{which}, words": made.words}
        return found

    def sides(self, bench: Bench, system: str, folder: Path, split: str) -> dict[str, Callable[[], Sides]]:
        """Rows of a fit: of the method several, of others one."""

        def whole() -> Sides:
            found = self.vectors(bench, system, folder)
            return Sides(found[split], found["documents"], found["similarity"])

        def words() -> Sides:
            found = self.vectors(bench, system, folder)
            return Sides(found[f"{split}, words"], found["documents, words"], "dot")

        def coarse(size: float | None = None) -> Sides:
            row = whole()
            documents, threshold = within(row.documents, size) if size else (row.documents, 0.0)
            documents, stored = eight_bits(documents)
            settings = {"threshold": f"{threshold:.3g}"} if size else {}
            return row._replace(documents=documents, costs={"bytes_per_document": stored}, settings=settings)

        if system != CITADEL or split == "dev":
            return {system: whole}
        rows: dict[str, Callable[[], Sides]] = {CITADEL: whole, f"{CITADEL}, int8": coarse}
        for k in POOLED:
            size = bytes_per_document("multi", "int8", dims=bench.documents.dim, vectors=k)
            rows[cut_to(k)] = lambda size=size: coarse(size)
        return rows | ({f"{CITADEL}, words": words} if self.args.tier == "frozen" else {})

    def rows(self, bench: Bench, system: str, setting: str, seed: int, split: str) -> dict[str, Ranking]:
        """Rankings of a fit's rows."""
        folder, found = self.fit(system, setting, seed), {}
        for row, make in self.sides(bench, system, folder, split).items():
            said = {"settings": {"flags": f"--learning_rate {setting}"}} if row == CITADEL else {}
            ranking = bench.kept(
                row,
                [folder.parent.name, row, STORED],
                split,
                lambda make=make: bench.rank(make(), split),
            )
            found[row] = replace(ranking, **said)
        return found

    def ndcg(self, system: str, setting: str, seeds: Sequence[int], split: str) -> dict[str, np.ndarray]:
        """nDCG@10 of each query by data set, averaged over seeds."""

        def of_seed(bench: Bench, seed: int) -> np.ndarray:
            return bench.measured(self.rows(bench, system, setting, seed, split)[system], split)

        return {b.name: np.mean([of_seed(b, seed) for seed in seeds], axis=0) for b in self.benches}

    # Choices

    def tried(self) -> list[dict[str, Any]]:
        """Every setting with the first seed and few steps: what it has on dev, a row a data set."""
        rows = []
        for setting in tqdm(self.tier.tries, desc="tuning"):
            for bench in self.benches:
                ranking = self.rows(bench, CITADEL, self.rehearsed(setting), self.args.seeds[0], "dev")[CITADEL]
                row = {"system": CITADEL, "dataset": bench.name, "split": "dev", "metric": "nDCG@10"}
                row |= {"setting": setting, "value": float(bench.measured(ranking, "dev").mean())}
                row |= {name: ranking.costs[name] for name in ("bytes_per_document", "products")}
                rows.append(row | {"queries": len(bench.split("dev").queries)})
            tqdm.write(f"{setting:<60} {[round(row['value'], 4) for row in rows[-len(self.benches) :]]}")
        return rows

    def choice(self) -> str:
        """The method's setting: what ``--chosen`` names, or the best on dev.

        Raises:
            InputError: It names none that is tried here.
        """
        if not self.args.chosen:
            return frozen_tier.best_settings(self.tried())[CITADEL]
        chosen = read_json(Path(self.args.chosen)).get("chosen")
        if not isinstance(chosen, dict) or chosen.get(CITADEL) not in self.tier.tries:
            raise InputError(
                f"--chosen {self.args.chosen}: has no setting of {CITADEL!r} that is among those tried in the tier "
                f"{self.args.tier}, so nothing says how to fit it. Name the JSON that --dev wrote with this code."
            )
        return str(chosen[CITADEL])

    # The order of things

    def jobs(self) -> list[Callable[[], Any]]:
        """What takes time and is kept, each by itself.

        Raises:
            InputError: Nothing was chosen yet, which would be done in each process.
        """
        if self.args.dev:
            seed = self.args.seeds[0]
            return [
                lambda s=setting: [self.rows(b, CITADEL, self.rehearsed(s), seed, "dev") for b in self.benches]
                for setting in self.tier.tries
            ]
        if not self.args.chosen:
            raise InputError(
                "--fit_only: without --chosen each process would fit all that dev chooses among. Share these first, "
                "with --dev, and name the JSON that --dev then writes."
            )
        chosen = self.choice()
        found: list[Callable[[], Any]] = [
            lambda n=name, s=seed: [self.rows(b, n, self.setting_of(n, chosen), s, "test") for b in self.benches]
            for name in self.fitted
            for seed in self.seeds(name)
        ]
        if self.few:  # the method that these are compared with
            found += [
                lambda s=seed: [self.rows(b, CITADEL, self.rehearsed(chosen), s, "test") for b in self.benches]
                for seed in self.args.ablation_seeds
            ]
        return found + [lambda n=n, b=b: b.rival(n) for n in self.args.rivals for b in self.benches]

    def rankings(self, bench: Bench, chosen: str) -> list[Ranking]:
        """Every row of a data set; a system's seeds are rankings of one name."""
        found = [*bench.beside("test")]
        for name in self.args.rivals:
            found += bench.rival(name)
        for system in self.fitted:
            for seed in self.seeds(system):
                found += self.rows(bench, system, self.setting_of(system, chosen), seed, "test").values()
        if self.few:
            for seed in self.args.ablation_seeds:
                ranking = self.rows(bench, CITADEL, self.rehearsed(chosen), seed, "test")[CITADEL]
                found.append(replace(ranking, system=self.rehearsal))
        return found

    @property
    def few(self) -> bool:
        """Whether some fits have fewer steps than the method."""
        return bool(self.args.tuning_steps) and any(not self.tier.systems[name].whole for name in self.fitted)

    @property
    def rehearsal(self) -> str:
        """Name of the method in as few steps as the ablations."""
        return f"{CITADEL} at {self.args.tuning_steps} steps"


STORED = digest([(ROOT / "modeling" / part).read_text("utf-8") for part in ("search/routed.py", "search/scoring.py")])
"""What tells how entries are scored."""


def cut_to(k: int) -> str:
    """Row of the entries that take as many bytes as so many vectors."""
    return f"{CITADEL}, int8, as large as {k} vectors"


def projected(side: Embeddings, axes: torch.Tensor | None, dtype: type = np.float16) -> Embeddings:
    """Token vectors through a linear map ``(dim, width)``, some at a time; without one as they are."""
    if axes is None:
        return replace(side, values=np.asarray(side.values, dtype))
    found = np.empty((len(side.values), len(axes)), dtype)
    for start in range(0, len(found), 2**18):
        part = torch.from_numpy(np.asarray(side.values[start : start + 2**18], np.float32))
        found[start : start + 2**18] = (part @ axes.T).numpy()
    return replace(side, values=found, dim=len(axes))


def lengths_of(documents: Embeddings) -> np.ndarray:
    """Length of each entry: how much it can add at most is this times that of the query's."""
    return np.linalg.norm(np.asarray(documents.values, np.float32), axis=1)


def within(documents: Embeddings, size: float) -> tuple[Embeddings, float]:
    """The longest entries of a corpus that take so many bytes a document in int8, and the length that they exceed.

    Vectors of whole texts stay, in float16, and count among the bytes.
    """
    ordered = np.sort(lengths := lengths_of(documents))[::-1]
    room = max(0.0, size - 2 * documents.sentence_dim)
    most = int(room * len(documents) / bytes_per_document("routed", "int8", dims=documents.dim, nnz=1))
    if most >= len(ordered):
        return documents, 0.0
    threshold = float(ordered[max(0, most - 1) : most + 1].mean())  # between the two, whatever rounding does
    kept = lengths > threshold
    owner = np.repeat(np.arange(len(documents)), documents.lengths)[kept]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(documents)))]).astype(np.int64)
    assert documents.indices is not None
    return (
        replace(documents, values=documents.values[kept], indices=documents.indices[kept], offsets=offsets),
        threshold,
    )


def eight_bits(documents: Embeddings) -> tuple[Embeddings, float]:
    """Entries as an index in int8 compares them, and the bytes of a document there."""
    values = np.asarray(documents.values, np.float32)
    steps = np.abs(values).max(1, initial=0, keepdims=True) / 127
    size = bytes_per_document("routed", "int8", dims=documents.dim, nnz=float(documents.lengths.mean()))
    size += 2 * documents.sentence_dim  # which stay in float16
    return replace(documents, values=np.rint(values / np.where(steps == 0, 1, steps)) * steps), size


def lists_of(documents: Embeddings) -> dict[str, float]:
    """How long the lists of an index are, and how many documents are in none."""
    assert documents.indices is not None
    lengths = np.unique(np.asarray(documents.indices), return_counts=True)[1]
    found = statistics_of_lists(lengths, len(documents), int((documents.lengths == 0).sum()))
    return {name: float(found[name]) for name in ("lists", "longest_list", "gini", "documents_without_entries")}
