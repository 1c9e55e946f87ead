"""What ``metaembed_text.py`` measures: trained models of several forms, and poolings of a late-interaction one.

A finished model is a line in ``<cache_dir>/<name>.jsonl``: metrics of each query at every number of vectors, on dev
and on test. The line depends on its own form and setting alone, so others may be added and none is made again.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import finetuned_tier
import numpy as np
import reinpool_text
import torch
from bench import ROOT, code_of
from finetuned_tier import Tier, trained
from metaembed_frozen import ALIKE, LADDERS, OWN_THREADS, rank_few
from metaembed_frozen import TRIES as FROZEN_TRIES

from polyrep.data import load_retrieval_dataset
from polyrep.encoding import Embeddings, embed
from polyrep.encoding.nested import first_vectors, groups_of, queries_for
from polyrep.errors import InputError
from polyrep.evaluation.frontier.pooling import LADDER
from polyrep.evaluation.metrics import per_query_metrics
from polyrep.evaluation.systems import Ranking
from polyrep.hub import load
from polyrep.hub.folder import fastest_dtype
from polyrep.hub.reading import set_length
from polyrep.search.ranking import tie_ranks

RUN, LATE_RUN = "metaembed-minilm", "late-interaction-minilm"

NESTED, SINGLE, MEAN, LATE = "MetaEmbed", "one vector", "mean + projection", "late interaction"
NOT_NESTED, NO_RESIDUAL, PAPER = "not nested", "without residual", "paper form"
ONE = ["--num_query_vectors", "1", "--num_document_vectors", "1"]

FORMS: dict[str, list[str]] = {
    NESTED: [],
    SINGLE: ONE,
    MEAN: [*ONE, "--freeze", r"\bresidual\."],
    LATE: [],
    NOT_NESTED: ["--nested", "false"],
    NO_RESIDUAL: ["--residual", "false"],
    PAPER: "--residual false --attention full --num_query_vectors 16 --num_document_vectors 64".split(),
}
"""Form -> flags over its run. All start from one encoder, and but for late interaction from one projection.

``mean + projection`` is one vector whose own part stays zero. The paper form has a group more, (16, 32).
"""

TUNED = (NESTED, SINGLE, MEAN, LATE)
"""Forms that are tuned, and measured with every seed; the others take over the setting of the first."""

RATES = ("5e-5", "2e-5")
TRIES: dict[str, list[str]] = {
    NESTED: [f"{rate} --score {score}" for rate in RATES for score in ("sum", "mean")],
    SINGLE: list(RATES),
    MEAN: list(RATES),
    LATE: ["1e-4", "5e-5"],
    LADDERS: FROZEN_TRIES[LADDERS],
}
"""Learning rates and further flags that dev chooses among, with one seed. Late interaction's are about its recipe's,
which leaves the lowest layers as they are; ReinPool's are those that the frozen tier tries. What is likeliest to be
best stands first."""

SPLITS = ("dev", "test")
COMPARED = 8
"""Vectors of a document whose likeness is told."""

CHECKED = 16
"""Documents on which a prefix is compared with a slice."""


@dataclass
class Arguments(finetuned_tier.Arguments):
    """What to train and measure."""

    stage: str = field(default="dev", metadata={"help": "dev, test, costs or table; see above."})
    forms: list[str] = field(
        default_factory=lambda: [*FORMS, LADDERS], metadata={"help": "What is trained or fitted; MetaEmbed always is."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={"help": f"Seeds of {', '.join([*TUNED, LADDERS])}; dev takes the first."},
    )
    ablation_seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Of these, the seeds of the other forms."}
    )
    tries: int = field(
        default=4,
        metadata={"help": "Settings of each form, the first ones, that dev chooses among."},
    )
    batch: int = field(default=32, metadata={"help": "Pairs of a step."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a text while training."})
    encoded_length: int = field(
        default=256, metadata={"help": "Tokens of a text that are encoded: as many as the backbone reads."}
    )
    tuning_steps: int = field(
        default=100, metadata={"help": "Steps of ReinPool's fits among which dev chooses; what is chosen has more."}
    )
    head_flags: str = field(
        default="", metadata={"help": "Flags of ReinPool's run for every fit, e.g. '--max_steps 2'."}
    )
    cache_dir: str = field(
        default=".cache", metadata={"help": "Finished rows, late-interaction models, their vectors and fits."}
    )
    output: str | None = field(default=None, metadata={"help": "Folder for the JSON, Markdown and PNG."})
    name: str = field(default="metaembed-text", metadata={"help": "Name of the files."})


class Job(NamedTuple):
    """One model, or one fit of ReinPool to each data set's vectors of a late-interaction model."""

    form: str
    setting: str  # a learning rate and further flags
    seed: int
    of: str = ""  # ReinPool's: the setting of the late-interaction model

    @property
    def key(self) -> str:
        """Name of its row, but for the seed."""
        return f"{self.form}: {self.setting}" + (f", of {self.of}" if self.of else "")


class Rows(finetuned_tier.Rows):
    """Finished rows, each of which depends on its own form alone."""

    def __init__(self, args: Arguments, tier: Tier):
        super().__init__(args, replace(tier, forms={}))
        self.tier, self.length = tier, args.encoded_length

    def key_of(self, form: str) -> str:
        """What a row depends on, as a hash; of a form that is not known any more, that of none."""
        if form not in self.tier.forms:
            return ""
        runs = [self.tier.run_of(form), *([reinpool_text.RUN.name] if form.startswith(f"{LADDERS}: ") else [])]
        folders = [ROOT / "hub_configs" / run for run in runs]
        files = [file.read_text(encoding="utf-8") for folder in folders for file in sorted(folder.iterdir())]
        depends = [self.key, form, self.tier.forms[form], self.length, files]
        return hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:12]


def tier_of(args: Arguments) -> Tier:
    """Every form with every setting, and what a row of it depends on."""
    jobs = [Job(form, setting, 0) for form in FORMS for setting in TRIES.get(form, TRIES[NESTED])]
    common = ["--max_length", str(args.max_length), "--bf16", str(fastest_dtype("auto") == torch.bfloat16)]
    forms = {job.key: [*common, *FORMS[job.form], "--learning_rate", *job.setting.split()] for job in jobs}
    for setting in TRIES[LADDERS]:
        for of in TRIES[LATE]:
            for flags in (setting, rehearsed(setting, args)):
                key = Job(LADDERS, flags, 0, of).key
                forms[key] = [*forms[Job(LATE, of, 0).key], "then", *flags.split(), args.head_flags]
    return Tier(
        name="metaembed-text",
        control=LATE,
        forms=forms,
        claims={},
        run_of=lambda key: LATE_RUN if key.startswith((f"{LATE}: ", f"{LADDERS}: ")) else RUN,
        monitors=("pairwise_cosine", "vectors_that_answer"),
        code=code_of("methods/metaembed", "methods/late_interaction", "methods/reinpool", "training"),
    )


def rehearsed(setting: str, args: Arguments) -> str:
    """A setting of ReinPool with the few steps of tuning."""
    return f"{setting} --max_steps {args.tuning_steps}"


class Study:
    """Models that are trained, and what is found by them.

    Args:
        args: Arguments of the benchmark.
    """

    def __init__(self, args: Arguments):
        self.args, self.tier = args, tier_of(args)
        self.rows = Rows(args, self.tier)
        self.dataset = cache(load_retrieval_dataset)

    @cached_property
    def found(self) -> dict[tuple[str, int], dict[str, Any]]:
        """Rows by key and seed."""
        return self.rows.all("both")

    # What is to be made

    @property
    def forms(self) -> list[str]:
        """What is trained, in the order of the table."""
        return [form for form in FORMS if form in self.args.forms or form == NESTED]

    @property
    def pools(self) -> bool:
        """Whether ReinPool is fitted."""
        return LADDERS in self.args.forms and LATE in self.forms

    def jobs(self, stage: str) -> Iterator[Job]:
        """What a stage makes, in an order in which each follows from what stands before it.

        Raises:
            InputError: Stage test, before dev has chosen.
        """
        first = self.args.seeds[0]
        if stage == "dev":
            yield from (Job(form, s, first) for form in TUNED if form in self.forms for s in self.tries(form))
            if self.pools:
                late = self.choice(LATE)
                yield from (Job(LADDERS, rehearsed(s, self.args), first, late) for s in self.tries(LADDERS))
            return
        for form in self.forms:
            setting = self.choice(form if form in TUNED else NESTED)
            yield from (Job(form, setting, seed) for seed in self.seeds(form))
        if self.pools:
            yield from (Job(LADDERS, self.choice(LADDERS), seed, self.choice(LATE)) for seed in self.args.seeds)

    def seeds(self, form: str) -> list[int]:
        """Of a form on test."""
        return self.args.seeds if form in (*TUNED, LADDERS) else self.args.ablation_seeds

    def tries(self, form: str) -> list[str]:
        """Settings of a form that dev chooses among."""
        return TRIES[form][: self.args.tries]

    def on_dev(self, form: str) -> dict[str, float]:
        """Setting -> mean nDCG@10 on dev, over data sets and numbers of vectors, of what has a row."""
        found = {}
        for setting in self.tries(form):
            job = Job(form, setting, self.args.seeds[0])
            if form == LADDERS:
                job = job._replace(setting=rehearsed(setting, self.args), of=self.choice(LATE))
            if row := self.found.get((job.key, job.seed)):
                found[setting] = macro(row, form)
        return found

    def choice(self, form: str) -> str:
        """The setting that is best on dev.

        Raises:
            InputError: One has no row yet.
        """
        values = self.on_dev(form)
        if missing := [setting for setting in self.tries(form) if setting not in values]:
            raise InputError(
                f"--stage {self.args.stage}: {form!r} with {missing[0]!r} has no row on dev yet, so nothing is "
                "chosen. Run --stage dev first, until it says that all is done."
            )
        return max(values, key=lambda setting: values[setting])

    # How it is made

    def run(self, stage: str) -> bool:
        """Make what a stage lacks, within the budget of time; whether all of it is there."""
        started = time.perf_counter()
        longest = 0.0
        for job in self.jobs(stage):
            if (job.key, job.seed) in self.found:
                continue
            left = self.args.time_budget - (time.perf_counter() - started)
            if longest and left < longest:  # one is made in any case
                print(f"--stage {stage}: not all is done yet; run the same command again.")
                return False
            begun = time.perf_counter()
            with tempfile.TemporaryDirectory() as scratch:
                made = {LADDERS: self._pooled, LATE: self._late}.get(job.form, self._nested)(job, Path(scratch))
            gc.collect()
            seconds = round(time.perf_counter() - begun, 1)
            row = {"form": job.key, "seed": job.seed, "split": "both", "seconds": seconds, **made}
            self.rows.append(row)
            self.found[job.key, job.seed] = row
            longest = max(longest, seconds)
            print(f"{job.key:<60} seed {job.seed} dev {100 * macro(row, job.form):.2f} in {seconds:.0f} s", flush=True)
        print(f"--stage {stage}: all is done.")
        return True

    def _nested(self, job: Job, scratch: Path) -> dict[str, Any]:
        """A model of meta tokens: trained, and searched at every number of vectors."""
        args = self.args
        final, monitors = trained(args, self.tier, job.key, job.seed, scratch / "model")
        model = load(final, dtype=fastest_dtype("auto"))
        set_length(model, args.encoded_length, str(final))
        groups = groups_of(model)
        most = groups[-1][1]
        row: dict[str, Any] = {**monitors, "datasets": {}}
        cosines = {}
        for source in args.datasets:
            whole = self.dataset(source, "test")
            ranks = tie_ranks(list(whole.corpus))
            documents = embed(model, whole.corpus, task="document", name=whole.name, batch_size=32)
            measured: dict[str, dict[str, Any]] = {}
            for split in SPLITS:
                part = self.dataset(source, split)
                queries = embed(model, part.queries, task="query", name=f"{part.name}-{split}", batch_size=32)
                measured[split] = {}
                for k in sorted({most, *(number for number in LADDER if number < most)}):
                    asked = queries_for(groups, k)
                    few = queries if asked is None else first_vectors(queries, asked)
                    name = job.form if most == 1 else f"{job.form}, {k}"
                    measured[split][name] = entry(part, rank_few(name, few, first_vectors(documents, k), ranks))
            row["datasets"][whole.name] = measured
            if most >= COMPARED:
                cosines[whole.name] = likeness(documents)
        if most >= COMPARED:
            row["cosine_8"] = cosines
        if model[0].model.config.attention == "isolated" and most > 1:
            texts = list(self.dataset(args.datasets[0], "test").corpus.values())
            row["prefix_error"] = prefix_error(final, texts[:: max(1, len(texts) // CHECKED)], args.encoded_length)
        return row

    def _late(self, job: Job, scratch: Path) -> dict[str, Any]:
        """A late-interaction model, searched by all its vectors and by clusters of them."""
        datasets = {}
        for bench in self._benches(self._kept(job)):
            measured = {}
            for split in SPLITS:
                out = reinpool_text.Measured(bench, split)
                out.add(LATE, "full", lambda b=bench: b.documents)
                reinpool_text.add_ladder(out, "hierarchical", "hierarchical", bench.hierarchical, LADDER)
                measured[split] = {ranking.system: entry(out.dataset, ranking) for ranking in out.rankings}
            datasets[bench.name] = measured
        return {"datasets": datasets}

    def _pooled(self, job: Job, scratch: Path) -> dict[str, Any]:
        """ReinPool fitted to each data set's vectors of a late-interaction model."""
        datasets = {}
        for bench in self._benches(self._kept(Job(LATE, job.of, job.seed))):
            folder = bench.head([*ALIKE, *OWN_THREADS, "--learning_rate", *job.setting.split()], job.seed)
            measured = {}
            for split in SPLITS:
                out = reinpool_text.Measured(bench, split)
                key = folder.parent.name
                reinpool_text.add_ladder(out, LADDERS, key, lambda n, b=bench, f=folder: b.by_head(f, n), LADDER)
                measured[split] = {ranking.system: entry(out.dataset, ranking) for ranking in out.rankings}
            datasets[bench.name] = measured
        return {"datasets": datasets}

    def _kept(self, job: Job) -> Path:
        """The folder of a late-interaction model, which is trained if it is not there (any more)."""
        folder = Path(self.args.cache_dir) / "models" / f"late-{self.rows.key_of(job.key)}-{job.seed}"
        if not (folder / "training.json").is_file():  # what comes last
            shutil.rmtree(folder, ignore_errors=True)
            trained(self.args, self.tier, job.key, job.seed, folder)
        return folder / "final"

    def _benches(self, folder: Path) -> Iterator[reinpool_text.Bench]:
        """The data sets as a late-interaction model encodes them."""
        model = load(folder, dtype=fastest_dtype("auto"))
        args: Any = replace(self.args, backbone=str(folder), flags=self.args.head_flags)
        for source in self.args.datasets:
            yield reinpool_text.Bench(args, source, model, length=self.args.encoded_length)


def macro(row: Mapping[str, Any], form: str, split: str = "dev") -> float:
    """Mean nDCG@10 of the rows of a form, over data sets and numbers of vectors."""
    return float(
        np.mean(
            [
                np.mean(found["metrics"]["nDCG@10"])
                for measured in row["datasets"].values()
                for name, found in measured[split].items()
                if name.partition(", ")[0] == form
            ]
        )
    )


def entry(dataset: Any, ranking: Ranking) -> dict[str, Any]:
    """What is kept of a ranking: metrics of each query, and what it cost."""
    found = per_query_metrics(dataset, ranking)
    return {
        "metrics": {name: [round(float(value), 5) for value in values] for name, values in found.items()},
        "costs": ranking.costs,
    }


def likeness(documents: Embeddings) -> float:
    """Mean cosine between two of a document's first eight vectors."""
    few = first_vectors(documents, COMPARED)
    vectors = torch.from_numpy(np.asarray(few.values, np.float32)).view(len(few), COMPARED, -1)
    first, second = torch.triu_indices(COMPARED, COMPARED, 1)
    return float(torch.cosine_similarity(vectors[:, first], vectors[:, second], dim=-1).mean())


def prefix_error(folder: Path, texts: Sequence[str], length: int) -> float:
    """By how much at most the vectors of a model that gives fewer differ from the first of all."""
    model = load(folder, dtype=torch.float32)
    set_length(model, length, str(folder))
    config = model[0].model.config
    worst = 0.0
    whole = model.encode_document(list(texts), convert_to_numpy=True)
    for k in (number for number in LADDER if number < config.num_document_vectors):
        config.document_budget = k
        for few, full in zip(model.encode_document(list(texts), convert_to_numpy=True), whole, strict=True):
            worst = max(worst, float(np.abs(few - full[:k]).max()))
    return worst
