"""What two views gain together when the whole encoder is trained, beside each alone, two models, and BM25.

    python benchmarks/unifier_finetuned.py --fit_only "UnifieR"                    # and once it takes steps, since
    python benchmarks/unifier_finetuned.py --fit_only "dense only" "lexicon only"  # both mine, this beside it
    python benchmarks/unifier_finetuned.py --output results                        # what is missing, and the table
    python benchmarks/unifier_finetuned.py --output results --splade naver/splade-v3   # and a SPLADE that learns alike

Every form is one training over all data sets, by the shipped run. Vectors of what was trained are kept under a hash
of data, flags and the method's code, so that a command trains what is missing, and one on which nothing is missing
makes the table. Texts are cut shorter in training than where they are measured, since its time goes there. dev chooses
the weight of every sum, and of several learning rates one; both for all data sets.
On a processor a training takes as many threads as OMP_NUM_THREADS says.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import frozen_tier
import numpy as np
import torch
import unifier_study
from bench import ROOT
from datasets import DatasetDict
from frozen_tier import RAW
from sentence_transformers import SparseEncoder, SparseEncoderTrainer, SparseEncoderTrainingArguments
from sentence_transformers.sparse_encoder import losses
from tqdm import tqdm
from transformers import HfArgumentParser, set_seed
from unifier_study import (
    ADAPTER_BM25,
    CANDIDATES,
    DENSE,
    ENCODED,
    HALF,
    KEPT,
    MOST_FLOPS,
    MOST_WORDS,
    RAW_BM25,
    SPLADE,
    TWO_MODELS,
    UNIFIER,
    VIEWS,
    WORDS,
    best,
    keep_vectors,
)
from unifier_text import ablations, flops_claim, gains, tables

from polyrep.data.named import made_here
from polyrep.encoding import embed
from polyrep.encoding.views import encode_views
from polyrep.errors import InputError
from polyrep.evaluation.hybrid import MULTIPLES
from polyrep.evaluation.systems import Ranking
from polyrep.hub import fetch, fingerprint, load
from polyrep.hub.folder import fastest_dtype
from polyrep.hub.reading import set_length
from polyrep.methods.dense2sparse.frontier import pruned
from polyrep.report import print_and_write, provenance
from polyrep.training.build import build
from polyrep.training.whole import WholeTraining

TIER = "finetuned_"

SPLADE_RATE = 2e-5
"""Learning rate of the SPLADE, as the others have one. At 1e-4 an encoder of two layers forgets its rare words."""
REGULARISED = {"query_regularizer_weight": 5e-5, "document_regularizer_weight": 3e-5}
"""Weights of its FLOPs loss, those of the documentation of sentence-transformers."""
SHARED = (
    *(
        "output_dir",
        "max_steps",
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "max_grad_norm",
        "weight_decay",
    ),
    *("per_device_train_batch_size", "dataloader_drop_last", "batch_sampler", "multi_dataset_batch_sampler"),
)
"""Arguments of training that it has in common with the others."""

FORMS = {
    # A map of its own, and so steps of its own, is of a frozen encoder alone.
    name: flags[:-2] if flags[-2:-1] == ["--dense_steps"] else flags
    for name, flags in unifier_study.SYSTEMS.items()
    if name != "BM25 negatives"
}
"""Name -> flags over the run, whose negatives the backbone finds; all but the first three are ablations."""

TUNED = (*unifier_study.TUNED, SPLADE)


@dataclass
class Arguments(frozen_tier.Arguments):
    """What to train and measure."""

    systems: list[str] = field(
        default_factory=lambda: [UNIFIER, DENSE, WORDS],
        metadata={"help": "Forms in the table; UnifieR always is. With its setting: " + ", ".join([*FORMS][3:])},
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds of each form."})
    max_steps: int = field(default=300, metadata={"help": "Steps of each training."})
    learning_rates: list[float] = field(
        default_factory=lambda: [2e-5], metadata={"help": "Of several, dev chooses one for each form."}
    )
    train_length: int = field(default=128, metadata={"help": "Tokens of a text in training."})
    max_length: int = field(default=256, metadata={"help": "Tokens of a text that is measured."})
    fit_only: list[str] = field(default_factory=list, metadata={"help": "Train these forms and leave."})
    splade: str | None = field(
        default=None,
        metadata={"help": "SparseEncoder that is trained by the stock SpladeLoss on the same pairs: a further row."},
    )
    name: str = field(default="unifier-finetuned", metadata={"help": "Name of the files."})

    @property
    def ablation_seeds(self) -> list[int]:
        """Those of all."""
        return self.seeds


class Bench(unifier_study.Bench):
    """One data set, and what is found in it by models that were trained."""

    run = ROOT / "hub_configs" / "unifier-minilm"

    @cached_property
    def texts(self) -> list[Any]:
        """What tells its texts and judgments."""
        splits = [self.split(split) for split in unifier_study.SPLITS]
        read = [list(splits[0].corpus.items()), *(list(split.queries.items()) for split in splits)]
        digest = hashlib.sha256(json.dumps(read).encode()).hexdigest()
        return [self.name, digest, *(split.qrels for split in splits)]


class Study(unifier_study.Study):
    """Trainings over all data sets together, and what they gain."""

    @cached_property
    def backbone(self) -> str:
        """What tells it."""
        return fingerprint(fetch(self.args.backbone))

    def fit(self, system: str, setting: str, seed: int) -> Path:
        """File with the vectors that a training gives all data sets, made now or before."""
        args, first = self.args, self.benches[0]
        rate = setting.partition(" --query_top_k")[0]
        flags = [
            "--bf16",
            str(HALF),
            *FORMS[WORDS if system == SPLADE else system],
            "--max_steps",
            str(args.max_steps),
            "--learning_rate",
            rate,
            *first.flags,
        ]
        lengths = [args.train_length, args.max_length]
        depends = {"flags": flags, "seed": seed, "lengths": lengths, "texts": [bench.texts for bench in self.benches]}
        if system == SPLADE:
            depends["splade"] = [fingerprint(fetch(str(args.splade))), REGULARISED]
        digest = first.digest(depends | {"backbone": self.backbone})
        path = Path(args.cache_dir) / "finetuned" / f"unifier-{system.replace(' ', '-')}-{digest}.safetensors"
        if not path.is_file():
            started = time.perf_counter()
            model, costs = self.trained(flags, seed, self.splade if system == SPLADE else self.unifier)
            set_length(model, args.max_length, str(args.splade if system == SPLADE else args.backbone))
            costs |= {"fit_seconds": time.perf_counter() - started}
            arrays = self.encoded(model, system)
            keep_vectors(path, arrays, costs | {"seconds": time.perf_counter() - started})
            print(f"{system}, seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
        return path

    def trained(self, flags: Sequence[str], seed: int, learn: Callable[[WholeTraining], Any]) -> Any:
        """What is learned from a training of the shipped run; ``train.py`` would take every core, also of others."""
        args = self.args
        what = ["--datasets", *args.datasets, "--backbone", args.backbone, "--mined_cache", f"{args.cache_dir}/mined"]
        with tempfile.TemporaryDirectory() as scratch:
            plan = frozen_tier.planned(self.benches[0], [*what, *flags], seed, scratch)
            set_seed(seed)
            build(plan, Path(scratch) / "init")
            training = WholeTraining(plan, Path(scratch) / "init")  # the words of whole texts are the ones that occur
            set_length(training.model, args.train_length, args.backbone)
            training.refuse_no_step()
            return learn(training)

    def unifier(self, training: WholeTraining) -> tuple[Any, dict[str, float]]:
        """The model of a training, done, and what it cost."""
        training.train(None)
        training.objective.complete(training.pairs)
        config = training.objective.head.config
        config.query_top_k = config.document_top_k = MOST_WORDS
        return training.model, {"words": config.words}

    def splade(self, training: WholeTraining) -> tuple[Any, dict[str, float]]:
        """The SPLADE by stock modules, loss and trainer, with the pairs and the arguments of a training."""
        model: Any = SparseEncoder(str(fetch(str(self.args.splade))), device=str(training.model.device))
        set_length(model, self.args.train_length, str(self.args.splade))
        arguments = SparseEncoderTrainingArguments(**{name: getattr(training.plan.args, name) for name in SHARED})
        loss = losses.SpladeLoss(model, losses.SparseMultipleNegativesRankingLoss(model), **REGULARISED)
        trainer = SparseEncoderTrainer(model, arguments, train_dataset=DatasetDict(training.pairs), loss=loss)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=HALF):  # a flag would ask for every core
            trainer.train()
        return model, {}

    def encoded(self, model: Any, system: str) -> dict[str, np.ndarray]:
        """Views of all texts that are measured, from one pass, as flat arrays in half precision."""
        views, arrays = VIEWS.get(system, ("dense", "lexicon")), {}
        for bench in tqdm(self.benches, desc="encode"):
            for which in ("documents", "dev", "test"):
                dataset = bench.split("dev" if which == "documents" else which)
                texts = dataset.corpus if which == "documents" else dataset.queries
                task = "document" if which == "documents" else "query"
                with torch.autocast(model.device.type, torch.bfloat16, enabled=HALF):
                    if system == SPLADE:
                        vectors = embed(model, texts, task=task, name=f"{bench.name}-{which}", batch_size=ENCODED)
                        found = {"lexicon": pruned(vectors, MOST_WORDS)}
                    else:
                        found = encode_views(model, list(texts.values()), views, task=task, batch_size=ENCODED)
                for view, vectors in found.items():
                    parts = {"values": vectors.values.astype(np.float16)}
                    if view == "lexicon":
                        parts |= {"indices": vectors.indices, "offsets": vectors.offsets}
                    arrays |= {f"{bench.name}.{which}.{view}.{part}": array for part, array in parts.items()}
        return arrays

    # Choices

    def tries(self, system: str) -> list[str]:
        """Settings of a form, among which dev chooses."""
        rates = [f"{rate:g}" for rate in ([SPLADE_RATE] if system == SPLADE else self.args.learning_rates)]
        return rates if system == DENSE else [f"{rate} {KEPT}" for rate in rates]

    @property
    def fitted(self) -> list[str]:
        """Forms that are trained, in the order of the table."""
        forms = [form for form in FORMS if form in self.args.systems or form == UNIFIER]
        return [*forms, *([SPLADE] if self.args.splade else [])]

    @cached_property
    def tried(self) -> list[dict[str, Any]]:
        """Every setting of the forms that are no ablations, with the first seed: what it has on dev."""
        forms = [form for form in self.fitted if form in TUNED]
        return [row for form in forms for setting in self.tries(form) for row in self.on_dev(form, setting)]

    @cached_property
    def chosen(self) -> tuple[dict[str, str], dict[str, float]]:
        """Each form's setting, which for ablations is UnifieR's, and its mean nDCG@10 on dev with the first seed."""
        choice = best(self.tried)
        settings = {form: choice.get(form, choice[UNIFIER]) for form in self.fitted}
        values = {
            form: float(
                np.mean([bench.ndcg(form, setting, self.args.seeds[0], "dev").mean() for bench in self.benches])
            )
            for form, setting in settings.items()
        }
        return settings, values

    def seeds(self, system: str) -> list[int]:
        """Those of all."""
        return self.args.seeds

    @property
    def hybrids(self) -> list[str]:
        """Sums of two systems that can be had."""
        there = [f"{DENSE} + {words}" for words in (WORDS, SPLADE) if {DENSE, words} <= self.settings.keys()]
        return [*there, RAW_BM25, *([ADAPTER_BM25] if DENSE in self.settings else [])]

    def rankings(self, bench: unifier_study.Bench, split: str = "test") -> list[Ranking]:
        """Every row of a data set; a form's seeds are rankings of one name."""
        plain = [bench.ranking("BM25", [bench.bm25], split), bench.ranking(RAW, [bench.raw], split)]
        return [*plain, *self.of_fits(bench, split), *self.of_hybrids(bench, split)]


def notes(study: Study) -> list[str]:
    """What a reader of the tables should know."""
    args, first = study.args, study.args.seeds[0]
    ablated = [form for form in study.settings if form not in TUNED]
    beside = f" {', '.join(ablated)}: with UnifieR's setting." if ablated else ""
    stock = (
        [
            f"{SPLADE} is {args.splade}, another encoder, trained by the stock SpladeLoss ({REGULARISED}) on the same "
            f"pairs, at a learning rate of {SPLADE_RATE:g}."
        ]
        if args.splade
        else []
    )
    return [
        f"The whole encoder is trained, once for each form and seed over {', '.join(b.name for b in study.benches)} "
        f"together, {args.max_steps} steps, of texts cut at {args.train_length} tokens, and measured at "
        f"{args.max_length}. dev chose with seed {first} among learning rates, with at most {MOST_FLOPS:g} FLOPs, of "
        f" {', '.join(f'{rate:g}' for rate in args.learning_rates)}.{beside}",
        f"Sums are of raw scores: the words, or beside BM25 the dense vectors, find {CANDIDATES:,} candidates, both "
        f"score them, and the weight of the other score is the best of {len(MULTIPLES)} on dev with seed {first}, one "
        f"for all sets. {TWO_MODELS} are two encoders.",
        *stock,
    ]


def main() -> None:
    """Train, measure and write."""
    (args,) = HfArgumentParser([Arguments]).parse_args_into_dataclasses()
    for flag in ("systems", "fit_only"):
        if unknown := set(getattr(args, flag)) - FORMS.keys():
            there = ", ".join(map(repr, FORMS))
            raise InputError(f"--{flag} {' '.join(map(repr, sorted(unknown)))}: unknown form. There are {there}.")
    made_by = provenance(shlex.join(["python", *sys.argv]))  # the code as it is now, not after hours of edits
    folder = fetch(args.backbone)
    model = load(folder, dtype=fastest_dtype("auto"))
    study = Study(args, [Bench(args, source, model, model) for source in args.datasets])
    for form in args.fit_only:
        # Of several learning rates the other seeds are trained with the one that dev will have chosen.
        for seed in args.seeds[: 1 if len(args.learning_rates) > 1 else None]:
            for setting in study.tries(form):
                study.fit(form, setting, seed)
    if args.fit_only:
        return
    rankings, rows, tests = tables(study)
    results = made_by | {
        "name": args.name,
        "seeds": args.seeds,
        "settings_tried": len({(row["system"], row["setting"]) for row in study.tried}),
        "models": {name: fingerprint(fetch(name)) for name in (args.backbone, args.splade) if name},
        "data": made_here(*args.datasets),
        "drawn": [],
        "rows": rows,
        "claims": [*gains(study, tests, TIER), *ablations(study, TIER), flops_claim(rankings, TIER)],
        "notes": notes(study),
    }
    print_and_write(results, Path(args.output) if args.output else None)


if __name__ == "__main__":
    main()
