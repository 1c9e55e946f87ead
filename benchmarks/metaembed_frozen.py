"""How well nested vectors of a frozen late-interaction model do at every size, beside equally taught pooling.

    python benchmarks/metaembed_frozen.py --dev --output results   # what dev chooses, metaembed-frozen-dev.json
    python benchmarks/metaembed_frozen.py --chosen results/metaembed-frozen-dev.json --output results   # the table

One head gives every number of vectors of MetaEmbed; ReinPool's ladder does, too, and its slots need a fit for each.
Fitted heads and rankings are kept under a hash of data, settings and the methods' code, so a run that was interrupted
makes only what is missing.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import reinpool_text
import torch
from bench import ROOT, code_of
from frozen_tier import gain_claim
from tqdm import tqdm
from transformers import AutoModel, HfArgumentParser

from polyrep.data.named import made_here
from polyrep.encoding import Embeddings
from polyrep.encoding.embeddings import mean_of_tokens
from polyrep.encoding.nested import groups_of, queries_for
from polyrep.errors import InputError
from polyrep.evaluation.bm25 import rank_with_bm25
from polyrep.evaluation.frontier.pooling import LADDER, pooled
from polyrep.evaluation.metrics import per_query_metrics
from polyrep.evaluation.systems import Ranking, keep_ranking, rank_embeddings
from polyrep.evaluation.table import table_rows
from polyrep.files import read_json
from polyrep.hub import fetch, fingerprint, load
from polyrep.hub.folder import fastest_dtype
from polyrep.methods.metaembed.frontier import by_head
from polyrep.report import print_and_write, provenance, write_results

RUN = ROOT / "hub_configs" / "metaembed-minilm-frozen"

NESTED, SINGLE, SLOTS = "MetaEmbed", "one vector", "ReinPool slots"
FITS: dict[str, list[str]] = {
    NESTED: [],
    "MetaEmbed from the mean": ["--covering", "false"],
    "MetaEmbed without residual": ["--residual", "false"],
    "MetaEmbed not nested": ["--nested", "false"],
    SINGLE: ["--num_query_vectors", "1", "--num_document_vectors", "1"],
}
"""Heads by the shipped run: the method, and without each of its parts. All but the first take over its setting."""

SLOT_NUMBERS = (8, 32)
"""Vectors for which ReinPool's slots are fitted."""

DISTIL = "--maxsim_weight 1 --label_weight 0.3"
TRIES = [
    f"{rate} --score mean {learned} {side}".strip()
    for side in ("", "--query_side tokens")
    for rate in ("5e-4", "2e-3")
    for learned in ("", DISTIL)
]
"""Learning rates and further flags."""

REINPOOL_TRIES = ["5e-4", "2e-3"]
"""Learning rates of the controls, whose other settings were chosen for these sets before."""


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
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the fits."})
    systems: list[str] = field(default_factory=lambda: list(FITS), metadata={"help": "Heads that are fitted."})
    dev: bool = field(default=False, metadata={"help": "Choose on dev alone, and write what was tried as NAME-dev."})
    chosen: str | None = field(
        default=None, metadata={"help": "The JSON that --dev wrote: its choice is taken, and nothing chosen again."}
    )
    flags: str = field(default="", metadata={"help": "Flags of the run for every fit, e.g. '--max_steps 2'."})
    cache_dir: str = field(default=".cache", metadata={"help": "Embeddings, fitted heads and rankings."})
    output: str | None = field(default=None, metadata={"help": "Folder for the JSON, Markdown and PNG."})
    name: str = field(default="metaembed-frozen", metadata={"help": "Name of the files."})


class Bench(reinpool_text.Bench):
    """One data set with its cached token vectors, what is fitted to them, and what that finds."""

    run, code, label = RUN, code_of("methods/metaembed", "training"), "metaembed"

    def __init__(self, args: Any, source: str, model: Any):
        super().__init__(args, source, model)
        self.reinpool = reinpool_text.Bench(args, source, model)
        self.given = cache(self._given)

    def _given(self, folder: Path) -> tuple[Any, dict[str, dict[int, Embeddings]], dict[int, Embeddings]]:
        """What a fitted head makes: numbers that go together, queries of both splits, and documents at each number."""
        head = AutoModel.from_pretrained(folder).eval()
        groups = groups_of(head)
        numbers = [k for k in LADDER if k <= head.config.num_document_vectors]
        asked: dict[int, Any] = {k: queries_for(groups, k) for k in numbers}
        queries: dict[str, dict[int, Embeddings]] = {}
        for split in ("dev", "test"):
            whole = self.queries(split)
            counts = sorted({count for count in asked.values() if count})
            made = pooled(whole, by_head(head, "query", counts)) if counts else {}
            queries[split] = {k: made[asked[k]] if asked[k] else whole for k in numbers}
        return asked, queries, pooled(self.documents, by_head(head, "document", numbers))

    def nested(self, system: str, folder: Path, k: int, split: str) -> Ranking:
        """What the first vectors of a head find."""
        depends = {"head": folder.parent.name, "vectors": k, "split": split, "data": self.split(split).qrels}
        path = Path(self.args.cache_dir) / "rankings" / f"{self.name}-{self.digest(depends)}.safetensors"

        def make() -> Ranking:
            asked, queries, documents = self.given(folder)
            found = rank_embeddings(system, queries[split][k], documents[k], self.ranks, similarity="maxsim")
            costs = {"vectors_per_document": float(k), "vectors_per_query": float(queries[split][k].lengths.mean())}
            return replace(found, costs=found.costs | costs)

        return keep_ranking(path, system, make, reinpool_text.KEPT_DEPTH)

    def fit(self, system: str, setting: str, seed: int) -> Path:
        """The folder of a head of :data:`FITS`; ``setting`` is a learning rate and further flags."""
        return self.head(["--learning_rate", *setting.split(), *FITS[system]], seed)

    def ndcg(self, ranking: Ranking, split: str) -> np.ndarray:
        """nDCG@10 of each query."""
        return per_query_metrics(self.split(split), ranking)["nDCG@10"]


def sizes(system: str) -> Sequence[int]:
    """Numbers of vectors at which a system has a row."""
    return LADDER[:1] if system == SINGLE else LADDER


def tuned(benches: Sequence[Bench], seed: int) -> list[dict[str, Any]]:
    """Every setting of what is tuned on dev with one seed: mean nDCG@10 over the numbers of vectors, a row a set."""
    rows = []
    tries = [(NESTED, setting) for setting in TRIES] + [("ReinPool", rate) for rate in REINPOOL_TRIES]
    for system, setting in tqdm(tries, desc="tuning"):
        for bench in benches:
            if system == NESTED:
                folder = bench.fit(system, setting, seed)
                found = {k: bench.nested(f"{system}, {k}", folder, k, "dev") for k in LADDER}
                bench.given.cache_clear()
            else:
                found = ladder(bench, ["--learning_rate", setting], seed, "dev")
            by_number = {str(k): float(bench.ndcg(ranking, "dev").mean()) for k, ranking in found.items()}
            row = {"system": system, "dataset": bench.name, "split": "dev", "metric": "nDCG@10", "setting": setting}
            row |= {"value": float(np.mean(list(by_number.values()))), "by_number": by_number}
            rows.append(row | {"queries": len(bench.split("dev").queries)})
            tqdm.write(
                f"{system:<12} {setting:<70} {bench.name:<12} { {k: round(v, 4) for k, v in by_number.items()} }"
            )
    return rows


def best(tried: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Each system's setting with the best mean on dev, one for all sets."""
    found = {}
    for system in dict.fromkeys(row["system"] for row in tried):
        values: dict[str, list[float]] = {}
        for row in tried:
            if row["system"] == system:
                values.setdefault(row["setting"], []).append(row["value"])
        found[system] = max(values, key=lambda setting: float(np.mean(values[setting])))
    return found


def ladder(bench: Bench, flags: list[str], seed: int, split: str) -> dict[int, Ranking]:
    """ReinPool's head at every number of vectors."""
    out = reinpool_text.Measured(bench.reinpool, split)
    folder = bench.reinpool.head(flags, seed)
    make: Callable[..., dict[int, Embeddings]] = lambda numbers: bench.reinpool.by_head(folder, numbers)  # noqa: E731
    reinpool_text.add_ladder(out, "ReinPool", folder.parent.name, make, LADDER)
    return dict(zip(LADDER, out.rankings, strict=True))


def slots(bench: Bench, flags: list[str], seed: int, k: int, split: str) -> Ranking:
    """ReinPool's slots, of which each number of vectors needs a head."""
    out = reinpool_text.Measured(bench.reinpool, split)
    some = ["--pooling", "slots", "--num_vectors", str(k), "--ladder", str(k)]
    folder = bench.reinpool.head([*some, *flags], seed)
    out.add(f"{SLOTS}, {k}", folder.parent.name, lambda: bench.reinpool.by_head(folder, (k,))[k])
    return out.rankings[0]


def rankings(bench: Bench, args: Arguments, chosen: Mapping[str, str]) -> list[Ranking]:
    """Every row of a data set; a system's seeds are rankings of one name."""
    out = reinpool_text.Measured(bench.reinpool, "test")
    out.add("full MaxSim", "full", lambda: bench.documents)
    mean = replace(mean_of_tokens(bench.documents), offsets=np.arange(len(bench.documents) + 1))
    out.add("mean", "mean", lambda: mean, single=True)
    reinpool_text.add_ladder(out, "hierarchical", "hierarchical", bench.reinpool.hierarchical, LADDER)
    found = [*out.rankings, replace(rank_with_bm25(bench.split("test"), reinpool_text.KEPT_DEPTH), system="BM25")]
    rate = ["--learning_rate", chosen["ReinPool"]]
    for seed in args.seeds:
        found += ladder(bench, rate, seed, "test").values()
        found += [slots(bench, rate, seed, k, "test") for k in SLOT_NUMBERS]
        for system in args.systems:
            folder = bench.fit(system, chosen[NESTED], seed)
            found += [bench.nested(f"{system}, {k}", folder, k, "test") for k in sizes(system)]
            bench.given.cache_clear()
    return found


# Claims

Values = dict[str, dict[str, np.ndarray]]
"""Data set -> row -> nDCG@10 of each query, averaged over seeds."""


def margins(tests: Values) -> list[dict[str, Any]]:
    """What nested vectors gain at each number, and what their parts are worth."""
    there = {row for values in tests.values() for row in values}
    found = []

    def claim(name: str, ours: str, other: str, target: float | None, by_value: bool = False) -> None:
        if ours in there and other in there:
            entry = gain_claim(f"metaembed.{name}", tests, ours, other, target)
            if by_value and target is not None:
                entry |= {"met": entry["value"] >= target, "held_to": "value"}
            found.append(entry | {"control": other})

    most = LADDER[-1]
    for k in SLOT_NUMBERS:
        claim(f"frozen_margin_over_slots_{k}", f"{NESTED}, {k}", f"{SLOTS}, {k}", 0.0)
    for k in LADDER:
        claim(f"frozen_margin_over_hierarchical_{k}", f"{NESTED}, {k}", f"hierarchical, {k}", 0.0 if k <= 8 else -0.5)
        claim(f"frozen_margin_over_reinpool_{k}", f"{NESTED}, {k}", f"ReinPool, {k}", -0.5)
    claim("frozen_gain_over_single", f"{NESTED}, {most}", f"{SINGLE}, 1", 0.0)
    claim("frozen_mmr_gain_1", f"{NESTED}, 1", "MetaEmbed not nested, 1", 3.0, by_value=True)
    claim("frozen_mmr_cost_full", f"{NESTED}, {most}", f"MetaEmbed not nested, {most}", -0.5, by_value=True)
    claim("frozen_covering_gain", f"{NESTED}, {most}", f"MetaEmbed from the mean, {most}", 0.0)
    claim("frozen_residual_gain", f"{NESTED}, {most}", f"MetaEmbed without residual, {most}", 0.0)
    macro = [float(np.mean([values[f"{NESTED}, {k}"].mean() for values in tests.values()])) for k in LADDER]
    worst = 100 * min(after - before for before, after in zip(macro, macro[1:], strict=False))
    found.append({"claim": "metaembed.frozen_monotone_steps", "value": worst, "target": -0.2, "met": worst >= -0.2})
    closed = {
        name: float(
            (values[f"{NESTED}, 8"].mean() - values["mean"].mean())
            / (values["full MaxSim"].mean() - values["mean"].mean())
        )
        for name, values in tests.items()
    }
    gap = float(np.mean(list(closed.values())))
    found.append(
        {
            "claim": "metaembed.frozen_gap_closed_8",
            "value": gap,
            "target": 0.75,
            "met": gap >= 0.75,
            "by_dataset": closed,
        }
    )
    return found


def of_heads(benches: Sequence[Bench], args: Arguments, chosen: Mapping[str, str]) -> list[dict[str, Any]]:
    """How long a fit takes, how alike a document's vectors are, and by how much a prefix differs from a slice."""
    seconds, cosines, errors = [], [], []
    for bench in benches:
        folder = bench.fit(NESTED, chosen[NESTED], args.seeds[0])
        seconds.append(float(read_json(folder.parent / "training.json")["seconds"]))
        documents = bench.given(folder)[2][8]
        vectors = torch.from_numpy(np.asarray(documents.values, np.float32)).view(len(documents), 8, -1)
        pairs = torch.triu_indices(8, 8, 1)
        cosines.append(float((vectors @ vectors.transpose(1, 2))[:, pairs[0], pairs[1]].mean()))
        head = AutoModel.from_pretrained(folder).eval()
        tokens = bench.documents.values[: bench.documents.offsets[1]]  # type: ignore[index]
        text = torch.from_numpy(np.asarray(tokens, np.float32))[None]
        with torch.inference_mode():
            whole = head(text).token_embeddings
            few = [head(text, num_vectors=k).token_embeddings - whole[:, :k] for k in LADDER]
        errors.append(max(float(part.abs().max()) for part in few))
        bench.given.cache_clear()
    found = []
    for name, value, target in (
        ("frozen_head_fit_seconds", max(seconds), 180.0),
        ("frozen_pairwise_cosine_8", float(np.mean(cosines)), 0.9),
        ("frozen_prefix_error", max(errors), 1e-6),
    ):
        found.append({"claim": f"metaembed.{name}", "value": value, "target": target, "met": value <= target})
    return found


# The picture

DRAWN = {NESTED: "C0", "ReinPool": "C1", "hierarchical": "C2"}


def draw(results: dict[str, Any], path: Path) -> None:
    """Quality over the number of vectors: a panel for each data set, a line for each pooling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in results["rows"] if row["metric"] == "nDCG@10"]
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    figure, axes = plt.subplots(1, len(datasets), figsize=(1 + 3.2 * len(datasets), 3.2), squeeze=False)
    for axis, dataset in zip(axes[0], datasets, strict=True):
        value = {row["system"]: row["value"] for row in rows if row["dataset"] == dataset}
        for system, color in DRAWN.items():
            there = [k for k in LADDER if f"{system}, {k}" in value]
            axis.plot(there, [value[f"{system}, {k}"] for k in there], "o-", color=color, label=system, markersize=4)
        for system, style in (("full MaxSim", "-"), ("mean", "--"), ("BM25", ":")):
            axis.axhline(value[system], color="grey", linestyle=style, linewidth=0.9, label=system)
        axis.set_xscale("log", base=2)
        axis.set_xticks(LADDER, [str(k) for k in LADDER])
        axis.set_title(dataset, fontsize=10)
        axis.set_xlabel("vectors of a document")
        axis.grid(linewidth=0.3)
    axes[0][0].set_ylabel("nDCG@10, test")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def choice(args: Arguments, benches: Sequence[Bench]) -> dict[str, str]:
    """What dev chose: read, or chosen now."""
    if not args.chosen:
        return best(tuned(benches, args.seeds[0]))
    chosen = read_json(Path(args.chosen)).get("chosen")
    known = {NESTED: TRIES, "ReinPool": REINPOOL_TRIES}
    for system, tries in known.items():
        if not isinstance(chosen, dict) or chosen.get(system) not in tries:
            raise InputError(
                f"--chosen {args.chosen}: has no setting of {system!r} that is among those tried here, so nothing "
                "says how to fit it. Name the JSON that --dev wrote with this code."
            )
    return dict(chosen)


def main() -> None:
    """Fit, measure and write."""
    (args,) = HfArgumentParser([Arguments]).parse_args_into_dataclasses()
    if unknown := set(args.systems) - FITS.keys() or {NESTED} - set(args.systems):
        raise InputError(
            f"--systems: {sorted(unknown)} unknown or missing. There are {list(FITS)}, and {NESTED} always."
        )
    made_by = provenance(shlex.join(["python", *sys.argv]))  # the code as it is now, not after an hour of edits
    folder = fetch(args.backbone)
    model = load(folder, dtype=fastest_dtype("auto"))
    benches = [Bench(args, source, model) for source in args.datasets]
    output = Path(args.output) if args.output else None
    common = made_by | {
        "models": {args.backbone: fingerprint(folder)},
        "settings_tried": len(TRIES) + len(REINPOOL_TRIES),
        "data": made_here(*args.datasets),
    }
    if args.dev:
        tried = tuned(benches, args.seeds[0])
        results = common | {
            "name": f"{args.name}-dev",
            "seeds": args.seeds[:1],
            "rows": [row | {"system": f"{row['system']}: {row['setting']}"} for row in tried],
            "chosen": best(tried),
            "claims": [],
            "notes": [f"Values are means over {', '.join(map(str, LADDER))} vectors of a document."],
        }
        print(write_results(results, output))
        return
    chosen = choice(args, benches)
    found: list[dict[str, Any]] = []
    tests: Values = {}
    for bench in benches:
        some = rankings(bench, args, chosen)
        found += table_rows(bench.split("test"), some, "full MaxSim")
        tests[bench.name] = {
            name: np.mean([bench.ndcg(ranking, "test") for ranking in some if ranking.system == name], axis=0)
            for name in dict.fromkeys(ranking.system for ranking in some)
        }
    results = common | {
        "name": args.name,
        "seeds": args.seeds,
        "rows": found,
        "claims": [*margins(tests), *of_heads(benches, args, chosen)],
        "notes": [
            f"{NESTED}: --learning_rate {chosen[NESTED]}, one fit a set and seed for all numbers of vectors, and its "
            "controls with the same setting. ReinPool and its slots: the shipped run of reinpool-minilm at "
            f"--learning_rate {chosen['ReinPool']}. Both learning from the same judgments of train.",
        ],
    }
    print_and_write(results, output, draw)


if __name__ == "__main__":
    main()
