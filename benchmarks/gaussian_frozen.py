"""What a variance gains behind a frozen encoder, beside the plain vector of as many numbers; and what it knows.

    python benchmarks/gaussian_frozen.py --teacher models/four/late-interaction-minilm/final --output results

Each text is encoded once; every setting then fits linear maps to that for seconds, with the shipped run's pairs,
negatives and steps. Rates and temperatures are chosen on dev with the first seed, one for all sets. Fits are kept, so
an interrupted run goes on where it was.
"""

from __future__ import annotations

import copy
import math
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import frozen_tier
import numpy as np
import torch
from bench import ROOT, code_of
from frozen_tier import DEPTH, RAW, chosen_on_dev, gain_claim, significant, test_tables
from scipy.stats import kendalltau
from sentence_transformers import SentenceTransformer
from transformers import HfArgumentParser

from polyrep.data.noise import narrowed
from polyrep.encoding import Embeddings, embed
from polyrep.evaluation.bm25 import rank_with_bm25
from polyrep.evaluation.systems import Ranking, costs_of
from polyrep.hub import fetch, fingerprint, load
from polyrep.hub.folder import fastest_dtype
from polyrep.methods import GaussianHead, GaussianOutput
from polyrep.report import provenance, write_results
from polyrep.search import exact_search
from polyrep.training.pairs import HeadData
from polyrep.training.teachers import open_teacher

RUN = ROOT / "hub_configs" / "gaussian-minilm-frozen"
CODE = [*code_of("methods/gaussian", "training"), ROOT / "modeling" / "data" / "noise.py"]

CONTROL = "vector"
DIMS = 369
"""The widest index up to that of the backbone, 384, that means with no, one and sixteen shared variances all give."""

CONTROL_TRIES = [f"{rate} --tau {tau}" for rate in ("3e-4", "6e-4", "1e-3", "2e-3") for tau in (0.025, 0.035, 0.05)]
"""The control is tuned harder than any setting, since there are many of them and one of it."""


PLAIN = ["--projection_dim", str(DIMS), "--equal_norms", "false", "--separate_variance", "false"]
PLAIN += ["--inclusion_weight", "0", "--difficulty_weight", "0"]
"""Nothing of what the shipped run has beyond the paper."""


def _setting(*flags: str, divergence: str = "kl", groups: int = 1, prior: float = 0.03) -> list[str]:
    found = [*PLAIN, "--divergence", divergence, "--beta", "20", "--variance_rate", "0.3"]
    return [*found, "--variance_groups", str(groups), "--prior_weight", str(prior), *flags]


VECTOR = ["--divergence", "dot", "--projection_dim", str(DIMS), "--equal_norms", "false"]
SURE = ["--separate_variance", "true", "--variance_rate", "1"]
TAUGHT = ["--distill_weight", "0.3"]

CONTROLS: dict[str, list[str]] = {
    CONTROL: VECTOR,
    "vector, not normalised": [*VECTOR, "--normalize_mean", "false"],
    "vector, 184 dims": [*VECTOR, "--projection_dim", "184"],
    "vector, taught": [*VECTOR, *TAUGHT],
    "vector, taught alone": [*VECTOR, "--distill_weight", "1", "--contrast_weight", "0"],
    "vector, mined again": [*VECTOR, "--remine", "true"],
}
"""The same recipe without a variance; each with what some of the Gaussians below also have."""

GAUSSIANS: dict[str, list[str]] = {
    "kl, no groups": _setting(groups=0),
    "kl, 1 group": _setting(),
    "kl, 16 groups": _setting(groups=16),
    "reverse kl": _setting(divergence="reverse_kl", groups=0),
    "likelihood": _setting(divergence="likelihood", groups=0),
    "w2": _setting(divergence="w2", groups=0),
    "csd": _setting(divergence="csd", groups=0),
    "csd, prior 30": _setting(divergence="csd", groups=0, prior=30.0),
    "csd, prior 300": _setting(divergence="csd", groups=0, prior=300.0),
    "kl, not normalised": _setting("--normalize_mean", "false"),
    "kl, no groups, not normalised": _setting("--normalize_mean", "false", groups=0),
    "kl, beta 1": _setting("--beta", "1", "--tau", "0.05"),
    "kl, beta 14": _setting("--beta", "14"),
    "kl, beta 28": _setting("--beta", "28"),
    **{f"kl, variance rate {rate}": _setting("--variance_rate", rate) for rate in ("0.03", "1", "10")},
    **{f"kl, prior {weight}": _setting(prior=weight) for weight in (0.0, 1e-4, 0.01)},
    "kl, inclusion": _setting("--inclusion_weight", "1"),
    "kl, inclusion, documents too": _setting("--inclusion_weight", "1", "--inclusion_documents", "true"),
    "kl, difficulty": _setting("--difficulty_weight", "1"),
    "kl, separate": _setting(*SURE),
    "kl, separate, inclusion": _setting(*SURE, "--inclusion_weight", "1"),
    "kl, separate, difficulty": _setting(*SURE, "--difficulty_weight", "1"),
    "kl, separate, both": _setting(*SURE, "--inclusion_weight", "1", "--difficulty_weight", "1"),
    "kl, separate, both, variance rate 0.3": _setting(
        *SURE, "--inclusion_weight", "1", "--difficulty_weight", "1", "--variance_rate", "0.3"
    ),
    "kl, separate, both, weights 0.1": _setting(
        *SURE, "--inclusion_weight", "0.1", "--difficulty_weight", "0.1", "--variance_rate", "0.3"
    ),
    "kl, separate, both, no groups": _setting(*SURE, "--inclusion_weight", "1", "--difficulty_weight", "1", groups=0),
    "kl, taught": _setting(*TAUGHT),
    "kl, taught alone": _setting("--distill_weight", "1", "--contrast_weight", "0"),
    "csd, taught": _setting(*TAUGHT, divergence="csd", groups=0),
    "kl, mined again": _setting("--remine", "true"),
}

SETTINGS = CONTROLS | GAUSSIANS
MATCHED = {
    "kl, taught": "vector, taught",
    "csd, taught": "vector, taught",
    "kl, taught alone": "vector, taught alone",
    "kl, mined again": "vector, mined again",
}
"""The control that learned from what a setting did; for the others the first."""


@dataclass
class Arguments(frozen_tier.Arguments):
    """What to fit and measure."""

    teacher: str = field(
        default="models/four/late-interaction-minilm/final",
        metadata={"help": "Model that the taught rows learn from."},
    )
    name: str = field(default="gaussian-frozen", metadata={"help": "Name of the files."})


class Bench(frozen_tier.Bench):
    """One data set with its cached vectors."""

    run, code, settings = RUN, CODE, SETTINGS

    def __init__(self, args: Arguments, source: str, model: SentenceTransformer, teacher: Any):
        super().__init__(args, source, model)
        self.teacher = teacher
        self.training: dict[str, HeadData] = {}

    @cached_property
    def vectors(self) -> dict[str, Embeddings]:
        """Documents, queries of dev and test, and these with less in them, none of it seen in training."""
        found = {"documents": self._embedded(dict(self.split("dev").corpus), "document", self.name)}
        for split in ("dev", "test"):
            queries = self.split(split).queries
            found[split] = self._embedded(queries, "query", f"{self.name}-{split}")
            for how in ("cut", "misspelt"):
                less = narrowed(queries, how, seed=1)  # type: ignore[arg-type]
                found[f"{split}.{how}"] = self._embedded(less, "query", f"{self.name}-{split}-{how}")
        return found

    def _embedded(self, texts: dict[str, str], task: Any, name: str) -> Embeddings:
        return embed(self.model, texts, task=task, name=name, kind="sentence", **self.options)

    def pairs(self, plan: Any, objective: Any) -> HeadData:
        """Training pairs of the shipped run, encoded once for every fit."""
        kind = "taught" if objective.weights["distill"] else "narrowed" if objective.narrowed else "plain"
        if kind not in self.training:
            data = HeadData(
                negatives=plan.head.negatives,
                labels=True,
                depth=plan.head.depth,
                narrowed=objective.narrowed if kind == "narrowed" else (),
                teacher=self.teacher if kind == "taught" else None,
            )
            data.add(self.model, self.split("train"), **self.options)
            data.parts = [frozen_tier.in_memory(part) for part in data.parts]
            self.training[kind] = data
        fresh = copy.copy(self.training[kind])  # a fit that mines again must leave it as it was
        fresh.parts = list(fresh.parts)
        return fresh

    def depends(self, system: str) -> dict[str, Any]:
        """The vectors, and whoever taught."""
        taught = "distill" in " ".join(self.settings[system])
        return {
            "documents": self.vectors["documents"].path.name,
            "teacher": fingerprint(fetch(self.args.teacher)) if taught else None,
        }

    def fit(self, system: str, flags: list[str], seed: int) -> frozen_tier.Found:
        """Fit a setting, rank dev and test, and look at its variances."""
        trainer = frozen_tier.fitted(
            self, flags, seed, lambda plan: GaussianHead.from_backbone(self.model, **plan.config), self.pairs
        )
        head: GaussianHead = trainer.objective.model.eval()
        documents = self.encoded(head, "documents")
        arrays: dict[str, np.ndarray] = {}
        costs: dict[str, float] = {}
        for split in ("dev", "test"):
            queries = self.encoded(head, split)
            index = self._index(split, queries), self._index("documents", documents)
            positions, scores = exact_search(*index, self.ranks, similarity="dot", k=DEPTH)
            arrays |= {f"{split}.positions": positions.astype(np.int32), f"{split}.scores": scores}
            costs |= costs_of(*index)
            if queries.variance is None:
                continue
            for name in (split, f"{split}.cut", f"{split}.misspelt"):
                arrays[f"{name}.uncertainty"] = self.encoded(head, name).uncertainty.numpy()
            flat = [_with_mean_variance(head, side, side is queries) for side in (queries, documents)]
            flattened = [replace(part, values=vectors.numpy()) for part, vectors in zip(index, flat, strict=True)]
            other, _ = exact_search(*flattened, self.ranks, similarity="dot", k=10)
            kept = (positions[:, :10, None] == other[:, None]).any(-1).mean()
            costs[f"{split}_rank_change"] = 1 - float(kept)
        if documents.variance is not None:
            costs["log_variance_std"] = float(documents.variance.log().mean(-1).std())
        return arrays, costs

    @torch.inference_mode()
    def encoded(self, head: GaussianHead, which: str) -> GaussianOutput:
        """Distributions of documents or of some queries."""
        vectors = torch.from_numpy(self.vectors[which].values.astype(np.float32))
        return head(vectors, task="document" if which == "documents" else "query")

    def _index(self, which: str, output: GaussianOutput) -> Embeddings:
        """Index vectors as they would be stored, in half precision."""
        values = output.sentence_embedding.numpy().astype(np.float16)
        return replace(self.vectors[which], values=values, dim=values.shape[1])

    def beside(self) -> list[Ranking]:
        """BM25 and the untouched backbone on test."""
        sides = self.vectors["test"], self.vectors["documents"]
        raw = exact_search(*sides, self.ranks, similarity="cosine", k=DEPTH)
        return [rank_with_bm25(self.split("test"), DEPTH), Ranking(RAW, *raw, costs_of(*sides))]

    @cached_property
    def words(self) -> dict[str, dict[str, np.ndarray]]:
        """Predictors that need no retrieval, of each query of dev and test: its length and how rare its words are."""
        tokenizer: Any = self.model.tokenizer

        def tokens(texts: Sequence[str]) -> list[list[int]]:
            return tokenizer(texts, add_special_tokens=False, truncation=True)["input_ids"]

        corpus = tokens(list(self.split("dev").corpus.values()))
        frequency = Counter(word for document in corpus for word in set(document))
        found = {}
        for split in ("dev", "test"):
            asked = tokens(list(self.split(split).queries.values()))
            rarity = [[math.log((len(corpus) + 1) / (frequency[w] + 0.5)) for w in query] or [0.0] for query in asked]
            found[split] = {
                "query length": np.array([float(len(query)) for query in asked]),
                "mean IDF": np.array([np.mean(values) for values in rarity]),
                "max IDF": np.array([np.max(values) for values in rarity]),
            }
        return found

    def predictors(self, settings: Mapping[str, str], system: str, seed: int, split: str) -> dict[str, np.ndarray]:
        """Every predictor of how well a query is answered: its words, what was found for it, and its certainty."""
        control = self.ranked(CONTROL, settings[CONTROL], seed, split).scores
        arrays, _ = self.found(system, settings[system], seed)
        own, uncertainty = arrays[f"{split}.scores"], arrays[f"{split}.uncertainty"]
        return self.words[split] | {
            "top score of the vector": control[:, 0],
            "score gap of the vector": control[:, 0] - control[:, 1],
            "top -KL": own[:, 0] + uncertainty,  # what the index leaves out is this, and the same for all queries
            "gap of -KL": own[:, 0] - own[:, 1],
            "certainty": -uncertainty,
        }


@torch.inference_mode()
def _with_mean_variance(head: GaussianHead, output: GaussianOutput, query: bool) -> torch.Tensor:
    """Index vectors whose variances are those of the average text, dimension by dimension."""
    average = output.variance.log().mean(0).exp().expand_as(output.variance)
    return head._index(output.mean, average, query)


def tries(system: str) -> list[str]:
    """Learning rates, and for a control temperatures, that are tried on dev."""
    if system == CONTROL:
        return CONTROL_TRIES
    if system == "vector, not normalised":
        return CONTROL_TRIES[3:9]
    if system in CONTROLS:
        return [f"{rate} --tau 0.035" for rate in ("3e-4", "6e-4", "1e-3")]
    return ["3e-4", "6e-4", "1e-3"]


def kendall(predictor: np.ndarray, quality: np.ndarray) -> float:
    """Kendall's tau-b; 0 for a predictor that says the same of every query."""
    found = kendalltau(predictor, quality).statistic
    return 0.0 if math.isnan(found) else float(found)


def prediction(
    benches: Sequence[Bench], settings: Mapping[str, str], system: str, seeds: Sequence[int]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Claims of what uncertainty tells of a query, and the curves of what is left when the uncertain are not answered.

    The quality that is predicted is nDCG@10 of the system itself; signs and the best other predictor are dev's.
    """
    names = list(benches[0].predictors(settings, system, seeds[0], "dev"))

    def taus(split: str, rows: Mapping[str, np.ndarray] | None = None) -> dict[str, list[float]]:
        """Of each predictor on each data set, the mean over seeds; ``rows`` draws queries."""
        found: dict[str, list[float]] = {name: [] for name in names}
        for bench in benches:
            drawn = slice(None) if rows is None else rows[bench.name]
            several = [_cached(bench, settings, system, seed, split) for seed in seeds]
            for name in names:
                values = [kendall(predictors[name][drawn], quality[drawn]) for predictors, quality in several]
                found[name].append(float(np.mean(values)))
        return found

    on_dev = {name: float(np.mean(values)) for name, values in taus("dev").items()}
    sign = {name: math.copysign(1.0, value) for name, value in on_dev.items()}
    others = [name for name in names if name != "certainty"]
    groups = {"": others, "_pre_retrieval": others[:3]}
    best = {group: max(members, key=lambda name: abs(on_dev[name])) for group, members in groups.items()}
    on_test = taus("test")
    generator = np.random.default_rng(0)
    resampled: dict[str, list[float]] = {name: [] for name in {"certainty", *best.values()}}
    for _ in range(500):
        rows = {
            b.name: generator.integers(len(b.split("test").queries), size=len(b.split("test").queries))
            for b in benches
        }
        found = taus("test", rows)
        for name in resampled:
            resampled[name].append(sign[name] * float(np.mean(found[name])))

    def claim(name: str, value: float, draws: Sequence[float], target: float | None, **more: Any) -> dict[str, Any]:
        low, high = (float(x) for x in np.percentile(draws, [2.5, 97.5]))
        met = None if target is None else low > target
        entry = {"claim": f"gaussian.{name}", "value": value, "interval": [low, high], "target": target, "met": met}
        return entry | {"held_to": "lower", "system": system, "split": "test"} | more

    signed = {name: sign[name] * float(np.mean(values)) for name, values in on_test.items()}
    by_dataset = {b.name: {n: sign[n] * on_test[n][i] for n in names} for i, b in enumerate(benches)}
    claims = [claim("qpp_kendall", signed["certainty"], resampled["certainty"], None, by_dataset=by_dataset)]
    for group, other in best.items():
        margins = np.array(resampled["certainty"]) - np.array(resampled[other])
        claims.append(
            claim(f"qpp_margin{group}", signed["certainty"] - signed[other], list(margins), 0.0, best_other=other)
        )
    for how in ("cut", "misspelt"):
        shares = {}
        for bench in benches:
            several = [bench.found(system, settings[system], seed)[0] for seed in seeds]
            wider = [a[f"test.{how}.uncertainty"] > a["test.uncertainty"] for a in several]
            shares[bench.name] = np.mean(wider, axis=0)
        value = float(np.mean([share.mean() for share in shares.values()]))
        draws = [
            np.mean([share[generator.integers(len(share), size=len(share))].mean() for share in shares.values()])
            for _ in range(2000)
        ]
        per_set = {name: float(share.mean()) for name, share in shares.items()}
        claims.append(claim(f"wider_{how}", value, draws, None, by_dataset=per_set))
    shown = ["certainty", *dict.fromkeys(best.values())]
    curves = {
        bench.name: {
            name: np.mean(
                [
                    _kept(sign[name] * p[name], q)
                    for p, q in (_cached(bench, settings, system, s, "test") for s in seeds)
                ],
                axis=0,
            ).tolist()
            for name in shown
        }
        for bench in benches
    }
    return claims, {"shares": SHARES, "datasets": curves}


SHARES = [round(0.1 * step, 1) for step in range(1, 11)]
"""Shares of the queries that are answered, along the abstention curve."""

_CACHE: dict[tuple[str, str, int, str], tuple[dict[str, np.ndarray], np.ndarray]] = {}


def _cached(bench: Bench, settings: Mapping[str, str], system: str, seed: int, split: str) -> Any:
    """Predictors and nDCG@10 of a fit's queries."""
    key = (bench.name, system, seed, split)
    if key not in _CACHE:
        quality = bench.ndcg(system, settings[system], seed, split)
        _CACHE[key] = bench.predictors(settings, system, seed, split), quality
    return _CACHE[key]


def _kept(certainty: np.ndarray, quality: np.ndarray) -> list[float]:
    """Mean quality of the most certain share of the queries, for each of ``SHARES``."""
    ordered = quality[np.argsort(-certainty, kind="stable")]
    return [float(ordered[: max(1, round(share * len(ordered)))].mean()) for share in SHARES]


def main() -> None:
    """Fit, measure and write."""
    (args,) = HfArgumentParser([Arguments]).parse_args_into_dataclasses()
    made_by = provenance(shlex.join(["python", *sys.argv]))  # the code as it is now, not after an hour of edits
    folder = fetch(args.backbone)
    model, teacher = load(folder, dtype=fastest_dtype("auto")), open_teacher(args.teacher)
    benches = [Bench(args, source, model, teacher) for source in args.datasets]
    settings, values = chosen_on_dev(benches, {system: tries(system) for system in SETTINGS}, args.seeds)
    best = max(GAUSSIANS, key=lambda name: values[name])
    control = max(CONTROLS, key=lambda name: values[name])
    surest = max((name for name in GAUSSIANS if "both" in name), key=lambda name: values[name])
    rows, tests = test_tables(benches, settings, values, args.seeds, Bench.beside, CONTROL)
    matched = MATCHED.get(best, CONTROL)
    better = significant(tests, [best], matched)[best]
    claims = [
        gain_claim("gaussian.gain_over_vector_control_frozen", tests, best, matched) | {"control": matched},
        gain_claim("gaussian.gain_over_best_control_frozen", tests, best, control, None),
        gain_claim("gaussian.gain_of_informed_variance_frozen", tests, surest, CONTROL, None),
        {
            "claim": "gaussian.significant_datasets",
            "value": len(better),
            "target": 2,
            "met": len(better) >= 2,
            "system": best,
            "datasets": better,
            "split": "test",
        },
    ]
    costs = [bench.found(best, settings[best], seed)[1] for bench in benches for seed in args.seeds]
    spread = float(np.mean([cost["log_variance_std"] for cost in costs]))
    claims.append({"claim": "gaussian.log_variance_std", "value": spread, "target": None, "met": None, "system": best})
    told, curves = prediction(benches, settings, surest, args.seeds)
    results = made_by | {
        "name": args.name,
        "seeds": args.seeds,
        "models": {name: fingerprint(fetch(name)) for name in (args.backbone, args.teacher)},
        "settings_tried": sum(len(tries(system)) for system in SETTINGS) + SKETCHES,
        "drawn": [],
        "rows": rows,
        "claims": claims + told,
        "abstention": curves,
    }
    print(write_results(results, Path(args.output) if args.output else None))


SKETCHES = 110
"""Settings tried on dev beside this grid: rates, temperatures, sharpness, priors, negatives and weights."""


if __name__ == "__main__":
    main()
