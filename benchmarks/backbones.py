r"""Does it carry over? Each method beside its control on other backbones, with the settings of all-MiniLM-L6-v2.

    for encoder in minilm answerdotai/answerai-colbert-small-v1; do
        accelerate launch train.py hub_configs/late-interaction-minilm --backbone $encoder \
            --datasets tldr_pages scitldr scifact pubmedqa --output_dir models/four/late-$(basename $encoder)
    done
    python benchmarks/backbones.py --dense minilm BAAI/bge-small-en-v1.5 intfloat/multilingual-e5-small \
        --late models/four/late-minilm/final models/four/late-answerai-colbert-small-v1/final --output results

Nothing is tuned again: what was chosen on dev for one encoder of 22 million parameters meets others, at one seed. This
table is what found that Dense2Sparse's temperature has to follow how far the dense scores spread; the row of one
temperature is what it had before.
Heads and rankings are those of the frontier and of the frozen tiers, and kept as there, so that an interrupted run
goes on where it was.
"""

from __future__ import annotations

import gc
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import dense2sparse_text
import frozen_tier
import gaussian_frozen
import matplotlib.pyplot as plt
import multilayer_frozen
import numpy as np
from transformers import AutoModel, HfArgumentParser

from polyrep.data.named import made_here
from polyrep.encoding.encoders import kind_of
from polyrep.errors import InputError
from polyrep.evaluation.frontier import FullModel
from polyrep.evaluation.frontier.command import rank_all
from polyrep.evaluation.frontier.fit_data import judged_queries
from polyrep.evaluation.frontier.rows import FULL
from polyrep.evaluation.metrics import per_query_metrics
from polyrep.evaluation.systems import Ranking
from polyrep.evaluation.table import display_name, table_rows
from polyrep.hub import fetch, fingerprint, load
from polyrep.hub.folder import fastest_dtype
from polyrep.methods.dense2sparse.frontier import pruned, with_head
from polyrep.report import print_and_write, provenance

WORDS, ONE_TEMPERATURE = "Dense2Sparse, 48/128 words", "Dense2Sparse, one temperature"
FIXED = ["--teacher_unit", "score", "--teacher_temperature", "0.05"]
ALL, LAST, EQUAL = "MultiLayer, all layers", "last layer alone", "seven maps of the last layer"
VECTOR, VARIANCE, INFORMED = "vector", "Gaussian", "Gaussian, informed"

LAYERS = {
    LAST: (multilayer_frozen.CONTROL, "1e-3 --tau 0.03"),
    ALL: ("linear, all layers", "3e-4"),
    EQUAL: ("seven maps of the last layer", "1e-4"),
}
GAUSSIANS = {
    VECTOR: (gaussian_frozen.CONTROL, "1e-3 --tau 0.035"),
    VARIANCE: ("kl, 1 group", "1e-3"),
    f"{VARIANCE}, beta 28": ("kl, beta 28", "1e-3"),
    INFORMED: ("kl, separate, both, weights 0.1", "1e-3"),
}
"""Row -> its name in the tables of the frozen tiers, and what dev chose there; the informed Gaussian is shipped."""

SMALLER = {
    "sentence": (("dense2sparse", "csr"), ("BM25", WORDS, "CSR, 128")),
    "tokens": (
        ("hierarchical", "reinpool", "lemur"),
        (
            *("BM25", "hierarchical, 8", "ReinPool, 8", "hierarchical, 32", "ReinPool, 32"),
            *("LEMUR, 512", "LEMUR, 512, rerank 200"),
        ),
    ),
}
"""Kind of a model -> methods of the frontier, and those of their rows that are shown."""


@dataclass(frozen=True)
class Question:
    """What a method is asked of a backbone.

    Attributes:
        claim: Its name.
        system: The method's row.
        control: The row beside it.
        ratio: Whether it is asked for the share of the control's nDCG@10, not for points above it.
        target: What the lower end of the interval should reach, as for all-MiniLM-L6-v2; of a ratio, the value itself.
        title: Of its picture.
    """

    claim: str
    system: str
    control: str
    ratio: bool
    target: float | None
    title: str


QUESTIONS = (
    Question("dense2sparse_ratio", WORDS, FULL, True, 1.0, "Dense2Sparse / dense"),
    Question(
        "dense2sparse_ratio_at_one_temperature", ONE_TEMPERATURE, FULL, True, None, "... at one temperature / dense"
    ),
    Question("dense2sparse_margin_over_csr", WORDS, "CSR, 128", False, 0.0, "Dense2Sparse - CSR"),
    Question("dense2sparse_margin_over_bm25", WORDS, "BM25", False, None, "Dense2Sparse - BM25"),
    Question("multilayer_gain", ALL, LAST, False, 0.0, "MultiLayer - last layer"),
    Question("multilayer_gain_over_equal_size", ALL, EQUAL, False, 0.0, "MultiLayer - equal size"),
    Question("gaussian_gain", VARIANCE, VECTOR, False, 0.0, "Gaussian - vector"),
    Question("gaussian_gain_informed", INFORMED, VECTOR, False, None, "Gaussian, informed - vector"),
    *(
        Question(
            f"reinpool_margin_over_hierarchical_{k}", f"ReinPool, {k}", f"hierarchical, {k}", False, target, title
        )
        for k, target, title in ((8, 0.0, "ReinPool - clusters, 8"), (32, None, "ReinPool - clusters, 32"))
    ),
    Question("lemur_rerank_retention", "LEMUR, 512, rerank 200", FULL, True, 0.99, "LEMUR then MaxSim / MaxSim"),
)

NOTE = (
    "Settings are those that dev chose for all-MiniLM-L6-v2, and one seed is fitted; nothing was tuned on these "
    "backbones. Differences and p are to that backbone's own vectors. Claims are means over the data sets, with 95 % "
    "bootstrap intervals over queries; by_dataset in the JSON has each. BM25 has English stems and stop words."
)


@dataclass
class Arguments(frozen_tier.Arguments):
    """What to fit and measure."""

    dense: list[str] = field(
        default_factory=lambda: ["minilm", "BAAI/bge-small-en-v1.5", "intfloat/multilingual-e5-small"],
        metadata={"help": "Models with one vector a text."},
    )
    late: list[str] = field(default_factory=list, metadata={"help": "Models with several vectors a text."})
    note: list[str] = field(default_factory=list, metadata={"help": "Sentences below the tables, on the backbones."})
    name: str = field(default="backbones", metadata={"help": "Name of the files."})


Values = Mapping[str, Mapping[str, np.ndarray]]
"""Data set -> system -> nDCG@10 of each query."""


def smaller(args: Arguments, model: Any, folder: Path, source: str) -> tuple[Any, list[Ranking]]:
    """What the frontier ranks: the data set, and the rows that are shown, the full model's first."""
    methods, shown = SMALLER[kind_of(model)]
    full = FullModel(
        model,
        folder,
        *judged_queries(source, "test"),
        f"{args.cache_dir}/embeddings",
        Path(args.cache_dir) / "frontier",
        weights=fastest_dtype("auto"),
    )
    found = rank_all(full, list(methods))
    if found.failures:
        raise InputError(f"{source}: {found.failures[0]['system']} failed: {found.failures[0]['reason']}")
    rankings = {ranking.system: ranking for ranking in found.rankings}
    return full.dataset, [rankings[system] for system in (FULL, *shown)]


def one_temperature(args: Arguments, model: Any, source: str) -> Ranking:
    """Dense2Sparse with a temperature that does not follow how far the dense scores spread."""
    bench = dense2sparse_text.Bench(args, source, model)
    head = AutoModel.from_pretrained(bench.dense2sparse(FIXED, args.seeds[0]) / "head").eval()
    point = dense2sparse_text.OPERATING_POINTS[dense2sparse_text.WIDE]
    sides = [(bench.queries("test"), "query"), (bench.documents, "document")]
    cut = [pruned(with_head(head, *side), words) for side, words in zip(sides, point, strict=True)]
    return bench.ranking(ONE_TEMPERATURE, *cut)


def frozen(args: Arguments, model: Any, source: str) -> list[Ranking]:
    """Heads of the frozen tiers, on vectors and on layers."""
    layers = multilayer_frozen.Bench(args, source, model)
    vectors = gaussian_frozen.Bench(args, source, model, teacher=None)
    found = []
    for bench, some in ((layers, LAYERS), (vectors, GAUSSIANS)):
        for name, (system, setting) in some.items():
            found.append(replace(bench.ranked(system, setting, args.seeds[0], "test"), system=name))
    return found


def measured(args: Arguments, backbone: str) -> tuple[list[dict[str, Any]], Values, str]:
    """Rows of one backbone on all data sets, nDCG@10 of each query, and the model's fingerprint."""
    folder = fetch(backbone)
    model = load(folder, dtype=fastest_dtype("auto"))
    args = replace(args, backbone=backbone)
    rows: list[dict[str, Any]] = []
    values: dict[str, dict[str, np.ndarray]] = {}
    for source in args.datasets:
        dataset, rankings = smaller(args, model, folder, source)
        if kind_of(model) == "sentence":
            rankings += [one_temperature(args, model, source), *frozen(args, model, source)]
        kept = {"bytes_per_document", "vectors_per_document", "active_dims", "flops", "fit_seconds"}
        rankings = [replace(r, costs={n: v for n, v in r.costs.items() if n in kept}, settings={}) for r in rankings]
        found = table_rows(dataset, rankings, FULL)
        name = display_name(backbone)
        rows += [row | {"dataset": f"{row['dataset']}, {name}", "backbone": name} for row in found]
        values[dataset.name] = {r.system: per_query_metrics(dataset, r)["nDCG@10"] for r in rankings}
        gc.collect()
    return rows, values, fingerprint(folder)


def answer(question: Question, values: Values, seed: int = 0, resamples: int = 10_000) -> dict[str, Any]:
    """The claim of one method on one backbone: the mean over data sets, its interval and each set's own value."""
    generator = np.random.default_rng(seed)

    def of(system: np.ndarray, control: np.ndarray) -> np.ndarray:
        return system / control if question.ratio else 100 * (system - control)

    by_dataset, draws = {}, []
    for name, systems in values.items():
        pair = np.stack([systems[question.system], systems[question.control]])
        by_dataset[name] = float(of(*pair.mean(1)))
        some = generator.integers(pair.shape[1], size=(resamples, pair.shape[1]))
        draws.append(of(*(part[some].mean(1) for part in pair)))
    low, high = (float(x) for x in np.percentile(np.mean(draws, axis=0), [2.5, 97.5]))
    value = float(np.mean(list(by_dataset.values())))
    reached = question.target is not None and (value >= question.target if question.ratio else low > question.target)
    return {
        "value": value,
        "interval": [low, high],
        "target": question.target,
        "met": None if question.target is None else bool(reached),
        "held_to": "value" if question.ratio else "lower",
        "split": "test",
        "by_dataset": by_dataset,
    }


def answers(measured: Mapping[str, Values]) -> Iterator[dict[str, Any]]:
    """A claim for each question and each backbone that it can be asked of."""
    for question in QUESTIONS:
        for backbone, values in measured.items():
            if all({question.system, question.control} <= systems.keys() for systems in values.values()):
                claim = {"claim": f"backbones.{question.claim}: {backbone}", "system": backbone}
                yield claim | answer(question, values) | {"question": question.claim}


def draw(results: dict[str, Any], path: Path) -> None:
    """One panel for each question: a backbone's mean with its interval, and its data sets as small marks."""
    asked = [q for q in QUESTIONS if any(c["question"] == q.claim for c in results["claims"])]
    columns = 2
    figure, axes = plt.subplots(-(-len(asked) // columns), columns, figsize=(11, 1.9 * -(-len(asked) // columns)))
    marks: dict[str, str] = {}
    for question, axis in zip(asked, np.ravel(axes), strict=False):
        claims = [claim for claim in results["claims"] if claim["question"] == question.claim]
        for place, claim in enumerate(reversed(claims)):
            low, high = claim["interval"]
            axis.plot([low, high], [place, place], color="black", linewidth=1.5)
            axis.plot(claim["value"], place, "o", color="black")
            for name, value in claim["by_dataset"].items():
                color = marks.setdefault(name, f"C{len(marks)}")
                axis.plot(value, place + 0.25, "|", color=color, markersize=9, markeredgewidth=2)
        axis.axvline(1.0 if question.ratio else 0.0, color="grey", linewidth=0.8, linestyle="--")
        axis.set_yticks(range(len(claims)), [claim["system"] for claim in reversed(claims)])
        axis.set_ylim(-0.6, len(claims) - 0.2)
        axis.set_title(question.title + (" (nDCG@10, ratio)" if question.ratio else " (nDCG@10, points)"), fontsize=10)
    for axis in np.ravel(axes)[len(asked) :]:
        axis.set_visible(False)
    handles = [plt.Line2D([], [], color=color, marker="|", linestyle="", label=name) for name, color in marks.items()]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Fit, measure and write, again after each backbone, so that none is lost."""
    (args,) = HfArgumentParser([Arguments]).parse_args_into_dataclasses()
    made_by = provenance(shlex.join(["python", *sys.argv]))  # the code as it is now, not after an hour of edits
    rows: list[dict[str, Any]] = []
    models: dict[str, str] = {}
    found: dict[str, Values] = {}
    write: Callable[[dict[str, Any]], None] = lambda results: print_and_write(  # noqa: E731
        results, Path(args.output) if args.output else None, draw
    )
    for backbone in [*args.dense, *args.late]:
        some, found[display_name(backbone)], models[display_name(backbone)] = measured(args, backbone)
        rows += some
        write(
            made_by
            | {
                "name": args.name,
                "seeds": args.seeds[:1],
                "models": models,
                "settings_tried": 1,
                "rows": rows,
                "claims": list(answers(found)),
                "data": made_here(*args.datasets),
                "notes": [NOTE, *args.note],
            }
        )


if __name__ == "__main__":
    main()
