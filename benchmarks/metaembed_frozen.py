"""How well nested vectors of a frozen late-interaction model do at every size, beside equally taught pooling.

    python benchmarks/metaembed_frozen.py --dev --output results   # what dev chooses, metaembed-frozen-dev.json
    python benchmarks/metaembed_frozen.py --chosen results/metaembed-frozen-dev.json --output results   # the table

One head gives every number of vectors of MetaEmbed; ReinPool's ladder does, too, and its slots need a fit for each.
MetaEmbed and ReinPool are each tuned on dev, in few steps, one setting for all sets. What MetaEmbed's parts are worth
is told by fits of as few steps, beside MetaEmbed with as few.

Fitted heads and rankings are kept under a hash of data, settings and the methods' code, so a run that was interrupted
makes only what is missing. Several processes share the fits: each takes its part with ``--fit_only``, and then the
same command without it makes the rest. Since fits depend on the number of threads, all are started with the same::

    export OMP_NUM_THREADS=1
    for part in 1/2 2/2; do python benchmarks/metaembed_frozen.py --dev --fit_only $part & done; wait
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import reinpool_text
import torch
from bench import ROOT, code_of
from frozen_tier import at_most, best_settings
from metaembed_claims import Values, draw, gain, gap_closed, monotone
from tqdm import tqdm
from transformers import AutoModel, HfArgumentParser

from polyrep.data.named import made_here
from polyrep.encoding import Embeddings
from polyrep.encoding.embeddings import mean_of_tokens
from polyrep.errors import InputError
from polyrep.evaluation.bm25 import rank_with_bm25
from polyrep.evaluation.frontier.pooling import LADDER, pooled
from polyrep.evaluation.metrics import per_query_metrics
from polyrep.evaluation.systems import Ranking, keep_ranking, rank_embeddings
from polyrep.evaluation.table import table_rows
from polyrep.files import read_json
from polyrep.hub import fetch, fingerprint, load
from polyrep.hub.folder import fastest_dtype
from polyrep.methods.metaembed.frontier import as_searched, by_head, queries_by_head
from polyrep.report import print_and_write, provenance, write_results

RUN = ROOT / "hub_configs" / "metaembed-minilm-frozen"

NESTED, SINGLE, LADDERS, SLOTS = "MetaEmbed", "one vector", "ReinPool", "ReinPool slots"
NOT_NESTED, FROM_MEAN, NO_RESIDUAL = f"{NESTED} not nested", f"{NESTED} from the mean", f"{NESTED} without residual"
SLOT_NUMBERS = (8, 32)
"""Vectors for which ReinPool's slots are fitted."""

HEADS: dict[str, list[str]] = {
    NESTED: [],
    FROM_MEAN: ["--covering", "false"],
    NO_RESIDUAL: ["--residual", "false"],
    NOT_NESTED: ["--nested", "false"],
    SINGLE: ["--num_query_vectors", "1", "--num_document_vectors", "1"],
}
"""Heads of MetaEmbed: the method, and without each of its parts. All but the first take over its setting."""

TRIED_NUMBERS = (1, 8, 32)
"""Vectors of a document with which dev chooses."""

RIVALS: dict[str, list[str]] = {
    LADDERS: [],
    **{f"{SLOTS}, {k}": ["--pooling", "slots", "--num_vectors", str(k), "--ladder", str(k)] for k in SLOT_NUMBERS},
}
"""Heads of ReinPool. The slots take over the ladder's setting."""

ALIKE = shlex.split("--per_device_train_batch_size 32 --negatives 1 --queries judged")
"""Of every fit, whichever its run: the judgments of train, as many pairs a step and negatives of each. Beside the
judgments, ReinPool always learns from the frozen model's own scores, and MetaEmbed where dev says so."""

OWN_THREADS = ["--use_cpu", "false"]
"""Training on a processor would take all of its cores, also those of other parts of the fits. So it keeps what it has;
where there is no accelerator, it is on the processor all the same."""

RATES = ("5e-4", "1e-3", "2e-3")
LEARNED = ("--label_weight 1", "--label_weight 0.3 --maxsim_weight 1")
TRIES = {
    NESTED: [
        f"{rate} --score mean {learned} --query_side {side}"
        for side in ("meta", "tokens")
        for rate in RATES
        for learned in LEARNED
    ],
    LADDERS: [f"{rate} --label_weight {weight}" for rate in RATES for weight in ("1", "0.3")],
}
"""Learning rates and further flags that are tried: of either the same rates and weights of the judgments, and of
MetaEmbed the two kinds of queries, of which ReinPool has one."""


@dataclass
class Arguments:
    """What to fit and measure."""

    datasets: list[str] = field(
        default_factory=lambda: ["tldr_pages", "scitldr", "scifact"], metadata={"help": "BEIR folders."}
    )
    backbone: str = field(
        default="models/four/late-interaction-minilm/final",
        metadata={"help": "Folder or Hub id of a MultiVectorEncoder."},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of MetaEmbed and of ReinPool's ladder."}
    )
    ablation_seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Of these, the seeds of all other fits: slots and ablations."}
    )
    steps: int = field(default=200, metadata={"help": "Steps of what is chosen, and of ReinPool's slots."})
    tuning_steps: int = field(
        default=60, metadata={"help": "Steps of the fits among which dev chooses, and of the ablations."}
    )
    systems: list[str] = field(
        default_factory=lambda: list(HEADS), metadata={"help": "Heads that are fitted; MetaEmbed always is."}
    )
    dev: bool = field(default=False, metadata={"help": "Choose on dev alone, and write what was tried as NAME-dev."})
    chosen: str | None = field(
        default=None, metadata={"help": "The JSON that --dev wrote: its choice is taken, and nothing chosen again."}
    )
    fit_only: str = field(
        default="", metadata={"help": "I/N: make the I-th of N parts of the fits, of --dev or --chosen, and end."}
    )
    flags: str = field(default="", metadata={"help": "Flags of the run for every fit, e.g. '--max_steps 2'."})
    cache_dir: str = field(default=".cache", metadata={"help": "Embeddings, fitted heads and rankings."})
    output: str | None = field(default=None, metadata={"help": "Folder for the JSON, Markdown and PNG."})
    name: str = field(default="metaembed-frozen", metadata={"help": "Name of the files."})


class Fit(NamedTuple):
    """One head of a data set."""

    system: str
    setting: str  # a learning rate and further flags
    seed: int


class Bench(reinpool_text.Bench):
    """One data set with its cached token vectors, what is fitted to them, and what that finds."""

    run, code, label = RUN, code_of("methods/metaembed", "training"), "metaembed"

    def __init__(self, args: Any, source: str, model: Any):
        super().__init__(args, source, model)
        self.reinpool = reinpool_text.Bench(args, source, model)
        self.given = cache(self._given)

    def fitted_head(self, fit: Fit) -> Path:
        """The folder of a head, fitted now or before."""
        of, flags = (self, HEADS) if fit.system in HEADS else (self.reinpool, RIVALS)
        return of.head([*ALIKE, *OWN_THREADS, *flags[fit.system], "--learning_rate", *fit.setting.split()], fit.seed)

    def _given(self, folder: Path, split: str) -> tuple[dict[int, Embeddings], dict[int, Embeddings]]:
        """What a head of MetaEmbed makes by number of document vectors: queries of a split, and documents."""
        head = AutoModel.from_pretrained(folder).eval()
        numbers = [k for k in LADDER if k <= head.config.num_document_vectors]
        queries = queries_by_head(head, self.queries(split), numbers)
        return queries, pooled(self.documents, by_head(head, "document", numbers))

    def nested(self, system: str, folder: Path, k: int, split: str) -> Ranking:
        """What the first vectors of a head find."""
        depends = {"head": folder.parent.name, "vectors": k, "split": split, "data": self.split(split).qrels}
        path = Path(self.args.cache_dir) / "rankings" / f"{self.name}-{self.digest(depends)}.safetensors"

        def make() -> Ranking:
            queries, documents = self.given(folder, split)
            return rank_few(system, queries[k], documents[k], self.ranks)

        return keep_ranking(path, system, make, reinpool_text.KEPT_DEPTH)

    def found(self, fit: Fit, split: str, title: str, numbers: Sequence[int]) -> dict[int, Ranking]:
        """Rankings of a head by number of vectors, as rows called ``title, NUMBER``.

        The passes over the corpus that they ask for are made once for all of them, and then forgotten.
        """
        folder = self.fitted_head(fit)
        if fit.system in HEADS:
            rankings = {k: self.nested(f"{title}, {k}", folder, k, split) for k in numbers}
            self.given.cache_clear()
            return rankings
        out = reinpool_text.Measured(self.reinpool, split)
        make: Callable[..., dict[int, Embeddings]] = lambda n: self.reinpool.by_head(folder, n)  # noqa: E731
        reinpool_text.add_ladder(out, title, folder.parent.name, make, numbers)
        return dict(zip(numbers, out.rankings, strict=True))

    def ndcg(self, ranking: Ranking, split: str) -> np.ndarray:
        """nDCG@10 of each query."""
        return per_query_metrics(self.split(split), ranking)["nDCG@10"]


def rank_few(system: str, queries: Embeddings, documents: Embeddings, ranks: np.ndarray) -> Ranking:
    """What some vectors of each text find; documents of one vector are scored as one vector, in an index of such.

    Args:
        system: Name of the row.
        queries: Of kind tokens.
        documents: Of kind tokens, as many vectors of each.
        ranks: What decides ties.
    """
    vectors = {"document": float(documents.lengths.mean()), "query": float(queries.lengths.mean())}
    asked, held, similarity = as_searched(queries, documents)
    found = rank_embeddings(system, asked, held, ranks, similarity=similarity)
    return replace(found, costs=found.costs | {f"vectors_per_{side}": count for side, count in vectors.items()})


def sizes(system: str) -> Sequence[int]:
    """Numbers of vectors that a head gives, and has rows of."""
    if system.startswith(f"{SLOTS}, "):
        return (int(system.rpartition(" ")[2]),)
    return LADDER[:1] if system == SINGLE else LADDER


# What is fitted


def lasting(setting: str, steps: int) -> str:
    """A setting with its steps."""
    return f"{setting} --max_steps {steps}"


def rehearsal(args: Arguments) -> str:
    """What MetaEmbed is called with the few steps of the ablations, with which these are compared."""
    return f"{NESTED} at {args.tuning_steps} steps"


def tried_fits(args: Arguments) -> list[Fit]:
    """What dev chooses among, with one seed."""
    seed, few = args.seeds[0], args.tuning_steps
    return [Fit(system, lasting(setting, few), seed) for system, tries in TRIES.items() for setting in tries]


def table_fits(args: Arguments, chosen: Mapping[str, str]) -> dict[Fit, str]:
    """Fits of the table, and what their rows are called before the number of vectors."""
    full = {system: lasting(setting, args.steps) for system, setting in chosen.items()}
    few = lasting(chosen[NESTED], args.tuning_steps)
    found = {Fit(system, full[system], seed): system for system in (NESTED, LADDERS) for seed in args.seeds}
    for seed in args.ablation_seeds:
        found |= {Fit(system, full[LADDERS], seed): SLOTS for system in RIVALS if system != LADDERS}
        others = [system for system in HEADS if system in args.systems and system != NESTED]
        found |= {Fit(system, few, seed): system for system in others}
        if others:
            found[Fit(NESTED, few, seed)] = rehearsal(args)
    return found


def fit_part(benches: Sequence[Bench], fits: Sequence[Fit], part: str) -> None:
    """Make the I-th of N parts of some fits of every data set.

    Raises:
        InputError: ``part`` is no I/N.
    """
    number, _, count = part.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise InputError(f"--fit_only {part!r}: no part of the fits. Write I/N with I from 1 to N, e.g. 1/2.")
    # By its place in all of them, not among those that are missing: these change while others are at work.
    mine = [(fit, bench) for fit in fits for bench in benches][int(number) - 1 :: int(count)]
    for fit, bench in tqdm(mine, desc=f"fits, {part}"):
        bench.fitted_head(fit)


def tuned(benches: Sequence[Bench], args: Arguments) -> list[dict[str, Any]]:
    """Every setting that is tried on dev: mean nDCG@10 over some numbers of vectors, a row a set."""
    rows = []
    for fit in tqdm(tried_fits(args), desc="tuning"):
        setting = fit.setting.rpartition(" --max_steps")[0]
        for bench in benches:
            found = bench.found(fit, "dev", fit.system, TRIED_NUMBERS)
            by_number = {str(k): float(bench.ndcg(ranking, "dev").mean()) for k, ranking in found.items()}
            row = {"system": fit.system, "dataset": bench.name, "split": "dev", "metric": "nDCG@10"}
            row |= {"setting": setting, "value": float(np.mean(list(by_number.values()))), "by_number": by_number}
            rows.append(row | {"queries": len(bench.split("dev").queries)})
            shown = " ".join(f"{k}: {value:.4f}" for k, value in by_number.items())
            tqdm.write(f"{fit.system:<12} {setting:<70} {bench.name:<12} {shown}")
    return rows


def read_choice(path: str) -> dict[str, str]:
    """What ``--chosen`` names; InputError unless it has a setting that is known for all that is tuned."""
    chosen = read_json(Path(path)).get("chosen")
    for system, tries in TRIES.items():
        if not isinstance(chosen, dict) or chosen.get(system) not in tries:
            raise InputError(
                f"--chosen {path}: has no setting of {system!r} that is among those tried here, so nothing says how "
                "to fit it. Name the JSON that --dev wrote with this code."
            )
    return dict(chosen)


# The table


def rankings(bench: Bench, args: Arguments, chosen: Mapping[str, str]) -> list[tuple[Ranking, int | None]]:
    """Every row of a data set, and the seed that it is of; a system's seeds are rankings of one name."""
    out = reinpool_text.Measured(bench.reinpool, "test")
    out.add("full MaxSim", "full", lambda: bench.documents)
    mean = replace(mean_of_tokens(bench.documents), offsets=np.arange(len(bench.documents) + 1))
    out.add("mean", "mean", lambda: mean, single=True)
    reinpool_text.add_ladder(out, "hierarchical", "hierarchical", bench.reinpool.hierarchical, LADDER)
    bm25 = replace(rank_with_bm25(bench.split("test"), reinpool_text.KEPT_DEPTH), system="BM25")
    found: list[tuple[Ranking, int | None]] = [(ranking, None) for ranking in [*out.rankings, bm25]]
    for fit, name in table_fits(args, chosen).items():
        made = bench.found(fit, "test", name, sizes(fit.system))
        found += [(ranking, fit.seed) for ranking in made.values()]
    return found


def margins(tests: Values, few: str) -> list[dict[str, Any]]:
    """What nested vectors gain at each number, and what their parts are worth.

    Args:
        tests: What was measured.
        few: What MetaEmbed is called with the steps of the ablations.
    """
    found: list[dict[str, Any]] = []
    most, name = LADDER[-1], "metaembed.frozen_"
    for k in SLOT_NUMBERS:
        found += gain(f"{name}margin_over_slots_{k}", tests, f"{NESTED}, {k}", f"{SLOTS}, {k}")
    for k in LADDER:
        ours, target = f"{NESTED}, {k}", 0.0 if k <= 8 else -0.5
        found += gain(f"{name}margin_over_hierarchical_{k}", tests, ours, f"hierarchical, {k}", target)
        found += gain(f"{name}margin_over_reinpool_{k}", tests, ours, f"{LADDERS}, {k}", -0.5)
    whole = f"{few}, {most}"
    found += gain(f"{name}gain_over_single", tests, whole, f"{SINGLE}, 1")
    found += gain(f"{name}mmr_gain_1", tests, f"{few}, 1", f"{NOT_NESTED}, 1", 3.0, by_value=True)
    found += gain(f"{name}mmr_cost_full", tests, whole, f"{NOT_NESTED}, {most}", -0.5, by_value=True)
    found += gain(f"{name}covering_gain", tests, whole, f"{FROM_MEAN}, {most}")
    found += gain(f"{name}residual_gain", tests, whole, f"{NO_RESIDUAL}, {most}")
    found += monotone(f"{name}monotone_steps", tests, NESTED)
    return found + gap_closed(f"{name}gap_closed_8", tests, f"{NESTED}, 8", "mean", "full MaxSim")


def of_heads(benches: Sequence[Bench], args: Arguments, chosen: Mapping[str, str]) -> list[dict[str, Any]]:
    """How long a fit takes, how alike a document's vectors are, and by how much a prefix differs from a slice."""
    seconds, cosines, errors = {}, {}, []
    for bench in benches:
        folder = bench.fitted_head(Fit(NESTED, lasting(chosen[NESTED], args.steps), args.seeds[0]))
        seconds[bench.name] = float(read_json(folder.parent / "training.json")["seconds"])
        head = AutoModel.from_pretrained(folder).eval()
        documents = pooled(bench.documents, by_head(head, "document", [8]))[8]
        vectors = torch.from_numpy(np.asarray(documents.values, np.float32)).view(len(documents), 8, -1)
        pairs = torch.triu_indices(8, 8, 1)
        cosines[bench.name] = float((vectors @ vectors.transpose(1, 2))[:, pairs[0], pairs[1]].mean())
        tokens = bench.documents.values[: bench.documents.offsets[1]]  # type: ignore[index]
        text = torch.from_numpy(np.asarray(tokens, np.float32))[None]
        with torch.inference_mode():
            whole = head(text, task="document").token_embeddings
            few = [head(text, task="document", num_vectors=k).token_embeddings - whole[:, :k] for k in LADDER]
        errors.append(max(float(part.abs().max()) for part in few))
    common: dict[str, Any] = {"system": NESTED, "split": "test"}
    mean = float(np.mean(list(cosines.values())))
    return [
        at_most("metaembed.head_fit_seconds", max(seconds.values()), 180.0, by_dataset=seconds, steps=args.steps)
        | common,
        at_most("metaembed.frozen_pairwise_cosine_8", mean, 0.9, by_dataset=cosines) | common,
        at_most("metaembed.frozen_prefix_error", max(errors), 1e-6) | common,
    ]


LINES = {NESTED: "C0", LADDERS: "C1", SLOTS: "C3", "hierarchical": "C2"}
ACROSS = {"full MaxSim": "-", "mean": "--", "BM25": ":"}


def checked(args: Arguments) -> Arguments:
    """The arguments; InputError for those that do not go together."""
    if unknown := sorted(set(args.systems) - HEADS.keys()):
        raise InputError(f"--systems {', '.join(unknown)}: unknown. There are {', '.join(map(repr, HEADS))}.")
    if beyond := sorted(set(args.ablation_seeds) - set(args.seeds)):
        raise InputError(
            f"--ablation_seeds {' '.join(map(str, beyond))}: not among --seeds {' '.join(map(str, args.seeds))}, so "
            "MetaEmbed would have no fit to compare them with. Name some of those."
        )
    if args.tuning_steps >= args.steps:
        raise InputError(
            f"--tuning_steps {args.tuning_steps}: no fewer than --steps {args.steps}, so the ablations would be "
            "compared with what the table has already. Use fewer, e.g. a third."
        )
    if args.fit_only and not (args.dev or args.chosen):
        raise InputError(
            f"--fit_only {args.fit_only}: what the table fits follows from what dev chooses. Say --dev, or --chosen "
            "with the JSON that --dev wrote."
        )
    return args


def main() -> None:
    """Fit, measure and write."""
    args = checked(HfArgumentParser([Arguments]).parse_args_into_dataclasses()[0])
    made_by = provenance(shlex.join(["python", *sys.argv]))  # the code as it is now, not after an hour of edits
    folder = fetch(args.backbone)
    model = load(folder, dtype=fastest_dtype("auto"))
    benches = [Bench(args, source, model) for source in args.datasets]
    output = Path(args.output) if args.output else None
    chosen = read_choice(args.chosen) if args.chosen and not args.dev else None
    if args.fit_only:
        fit_part(benches, tried_fits(args) if chosen is None else list(table_fits(args, chosen)), args.fit_only)
        return
    common = made_by | {
        "models": {args.backbone: fingerprint(folder)},
        "settings_tried": sum(map(len, TRIES.values())),
        "data": made_here(*args.datasets),
    }
    if chosen is None:
        tried = tuned(benches, args)
        chosen = best_settings(tried)
        if args.dev:
            results = common | {
                "name": f"{args.name}-dev",
                "seeds": args.seeds[:1],
                "rows": [row | {"system": f"{row['system']}: {row['setting']}"} for row in tried],
                "chosen": chosen,
                "claims": [],
                "notes": [
                    f"Fits of {args.tuning_steps} steps. Values are means over {', '.join(map(str, TRIED_NUMBERS))} "
                    "vectors of a document."
                ],
            }
            print(write_results(results, output))
            return
    found: list[dict[str, Any]] = []
    tests: dict[str, dict[str, dict[int, np.ndarray]]] = {}
    for bench in benches:
        some = rankings(bench, args, chosen)
        found += table_rows(bench.split("test"), [ranking for ranking, _ in some], "full MaxSim")
        values = tests[bench.name] = {}
        for ranking, seed in some:
            ndcg = bench.ndcg(ranking, "test")
            values.setdefault(ranking.system, {}).update(
                dict.fromkeys(args.seeds if seed is None else [seed], ndcg),
            )
    results = common | {
        "name": args.name,
        "seeds": args.seeds,
        "rows": found,
        "claims": [*margins(tests, rehearsal(args)), *of_heads(benches, args, chosen)],
        "chosen": chosen,
        "notes": notes(args, chosen),
    }
    print_and_write(results, output, lambda results, path: draw(results, path, LINES, ACROSS))


def notes(args: Arguments, chosen: Mapping[str, str]) -> list[str]:
    """What a reader of the tables should know."""
    seeds = ", ".join(map(str, args.ablation_seeds))
    found = [
        f"{NESTED}: --learning_rate {chosen[NESTED]}, one fit of {args.steps} steps a set and seed for all numbers of "
        f"vectors. {LADDERS}: "
        f"the run of reinpool-minilm at --learning_rate {chosen[LADDERS]}. Both chosen on dev, of "
        f"{len(TRIES[NESTED])} and {len(TRIES[LADDERS])} settings at {args.tuning_steps} steps. Every fit: "
        f"{' '.join(ALIKE)}. {LADDERS} learns from the frozen model's scores beside the judgments, and so does a fit "
        "of MetaEmbed with --maxsim_weight.",
        f"{SLOTS}: seeds {seeds} alone, as MetaEmbed in the claims that compare them.",
    ]
    others = [system for system in HEADS if system in args.systems and system != NESTED]
    if others:
        found.append(
            f"{', '.join(others)}: with MetaEmbed's setting, seeds {seeds} and {args.tuning_steps} steps, as "
            f"{rehearsal(args)!r}, with which the claims compare them."
        )
    return found


if __name__ == "__main__":
    main()
