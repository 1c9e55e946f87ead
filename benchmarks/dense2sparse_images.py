"""What Dense2Sparse gains between images and captions, beside its controls and rivals on the same dense vectors.

    python benchmarks/dense2sparse_images.py --dataset CAPTIONS --tried "--control batch"  # a sketch, on dev
    python benchmarks/dense2sparse_images.py --dataset CAPTIONS --weights NPZ --labels TXT --output results

CAPTIONS is a folder as ``polyrep.data.captions`` reads it, with features of the vision encoder that
``models/dual-encoder-mobilenet-minilm/final`` holds. Needed before: ``accelerate launch train.py
hub_configs/dual-encoder-mobilenet-minilm --datasets CAPTIONS --vision ...``. Fitted heads are kept under a hash of all
they depend on, so an interrupted run goes on where it was. A score shared with another image counts as lost; the
captions of an image are resampled together.

"Paper's recipe" is distillation and L1 with no label, as Nguyen et al. have it, but for the teacher's temperature
(0.05 instead of 0.001), the batch (256 instead of 512) and the length (300 steps, 2.5 epochs, instead of 200 epochs).
"""

from __future__ import annotations

import resource
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from dense2sparse_text import Bench, adapted_by, all_scores, bm25_scores, pruned, standardised, with_head
from scipy.sparse import csr_matrix
from tqdm import tqdm
from transformers import AutoModel, HfArgumentParser

from polyrep.data import RetrievalDataset, load_retrieval_dataset
from polyrep.encoding import Embeddings
from polyrep.errors import InputError
from polyrep.evaluation.statistics import bootstrap_interval, compare
from polyrep.evaluation.systems import costs_of
from polyrep.files import read_json
from polyrep.hub import fetch, fingerprint, load
from polyrep.hub.folder import fastest_dtype
from polyrep.report import provenance, write_results
from polyrep.training.sides import SentenceSide, encode_sparse
from polyrep.training.vectors import encode_dataset

ROOT = Path(__file__).parent.parent
RUN = ROOT / "hub_configs" / "dense2sparse-mobilenet-minilm"
HYBRID_WEIGHTS = np.arange(0.1, 1.0, 0.1)
LABEL_COUNTS = (1, 2, 3, 5, 10)
CSR_SIZES = (32, 64, 128)
SETTINGS_TRIED = 70
"""On dev: 49 of Dense2Sparse, 7 of the dense encoder, 9 hybrid weights, 5 counts of labels."""

METRICS = ("R@1", "R@5", "R@10", "MRR@10")
TEXT_TO_IMAGE, IMAGE_TO_TEXT = "text to image", "image to text"

FLOPS = ["--regularizer", "flops", "--regularizer_weight", "0.003"]
PUBLISHED = [
    *("--own_tokens", "none", "--alignment", "none", "--label_weight", "0", "--negatives", "0"),
    *(
        "--noise",
        "0",
        "--mixup",
        "0",
        "--teacher_temperature",
        "0.05",
        "--teacher_unit",
        "score",
        "--max_steps",
        "300",
    ),
    *("--regularizer", "l1", "--regularizer_weight", "0.0003"),
]
FREE, CONTROLLED = "paper's recipe, no control", "paper's recipe, batch control"
SPARSER = "Dense2Sparse, regulariser 0.1"
SYSTEMS: dict[str, tuple[bool, list[str]]] = {
    "Dense2Sparse": (True, []),
    "Dense2Sparse, regulariser 0.02": (False, ["--regularizer_weight", "0.02"]),
    SPARSER: (True, ["--regularizer_weight", "0.1"]),
    "Dense2Sparse, regulariser 0.4": (False, ["--regularizer_weight", "0.4"]),
    "Dense2Sparse, caption control": (False, ["--control", "caption"]),
    "Dense2Sparse, no labels": (False, ["--label_weight", "0"]),
    FREE: (True, PUBLISHED),
    CONTROLLED: (True, [*PUBLISHED, "--control", "batch"]),
    f"{FREE}, L1 0.001": (False, [*PUBLISHED, "--regularizer_weight", "0.001"]),
    f"{FREE}, L1 0.003": (False, [*PUBLISHED, "--regularizer_weight", "0.003"]),
    f"{CONTROLLED}, L1 0.001": (False, [*PUBLISHED, "--regularizer_weight", "0.001", "--control", "batch"]),
    f"{CONTROLLED}, L1 0.003": (False, [*PUBLISHED, "--regularizer_weight", "0.003", "--control", "batch"]),
    "paper's recipe, caption control": (False, [*PUBLISHED, "--control", "caption"]),
    "paper's recipe, term control": (False, [*PUBLISHED, "--control", "term"]),
    "paper's recipe, batch control to half": (False, [*PUBLISHED, "--control", "batch", "--control_until", "0.5"]),
    "paper's recipe, FLOPS, no control": (False, [*PUBLISHED, *FLOPS]),
    "paper's recipe, FLOPS, batch control": (False, [*PUBLISHED, *FLOPS, "--control", "batch"]),
    "paper's recipe, gate supervision, no control": (False, [*PUBLISHED, "--gate_weight", "0.1"]),
    "paper's recipe, lexical alignment, no control": (False, [*PUBLISHED, "--alignment", "ridge"]),
}
"""Name -> whether it is fitted with every seed or with the first alone, and flags over the shipped run."""


@dataclass
class Arguments:
    """What to fit and measure."""

    dataset: str = field(default="", metadata={"help": "Folder of images with captions, or of their features."})
    backbone: str = field(
        default="models/dual-encoder-mobilenet-minilm/final", metadata={"help": "The dense teacher."}
    )
    weights: str = field(default="", metadata={"help": "Arrays of MobileNetV2, for BM25 on its ImageNet labels."})
    labels: str = field(default="", metadata={"help": "Names of the ImageNet classes, one a line."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the fits."})
    tried: list[str] = field(
        default_factory=list,
        metadata={"help": "Flags to sketch on dev with the first seed, each a string."},
    )
    flags: str = field(default="", metadata={"help": "Flags of the run for every fit, before its own."})
    cache_dir: str = field(default=".cache", metadata={"help": "Embeddings and fitted heads."})
    redraw: bool = field(default=False, metadata={"help": "Draw the PNG anew from the JSON, and stop."})
    output: str | None = field(default=None, metadata={"help": "Folder for the JSON, Markdown and PNG."})
    name: str = field(default="dense2sparse-images", metadata={"help": "Name of the files."})


class ImageBench(Bench):
    """The collection, whose images differ from split to split."""

    run = RUN
    rival_steps, rival_batch = 600, 256

    @cache  # noqa: B019  there is one bench
    def sides(self, split: str) -> tuple[SentenceSide, SentenceSide]:
        """Encoded captions and images of a split."""
        return encode_dataset(self.model, self.split(split), **self.options)

    def queries(self, split: str) -> SentenceSide:
        """Encoded captions."""
        return self.sides(split)[0]

    @property
    def documents(self) -> SentenceSide:
        """Images of dev, for the name of a cache."""
        return self.sides("dev")[1]

    @cache  # noqa: B019
    def owners(self, split: str) -> np.ndarray:
        """``(captions,)`` place of each caption's image."""
        dataset = self.split(split)
        place = {identifier: i for i, identifier in enumerate(dataset.corpus)}
        return np.array([place[next(iter(dataset.qrels[caption]))] for caption in dataset.queries])


def recalls(scores: np.ndarray, owners: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
    """(direction, metric) -> ``(images,)`` value for each image: of its captions, averaged, or as it asks itself.

    Args:
        scores: ``(captions, images)``.
        owners: ``(captions,)`` place of each caption's image.

    Raises:
        InputError: A score is not finite.
    """
    if not np.isfinite(scores).all():
        raise InputError("a score is not finite, so no ranking exists. The vectors are damaged.")
    captions_of = np.bincount(owners, minlength=scores.shape[1])
    own = scores[np.arange(len(scores)), owners]
    lost = (scores >= own[:, None]).sum(1) - 1  # other images that score as much: (captions,)
    of_image = np.arange(scores.shape[1])[:, None] == owners  # (images, captions)
    best = np.where(of_image, scores.T, -np.inf).max(1)
    back = ((scores.T >= best[:, None]) & ~of_image).sum(1)  # captions of others that score as the best own one
    found = {}
    for direction, place in ((TEXT_TO_IMAGE, lost), (IMAGE_TO_TEXT, back)):
        for k in (1, 5, 10):
            found[direction, f"R@{k}"] = (place < k).astype(float)
        found[direction, "MRR@10"] = np.where(place < 10, 1 / (place + 1), 0.0)
    for (direction, metric), values in found.items():
        if direction == TEXT_TO_IMAGE:
            found[direction, metric] = np.bincount(owners, values, scores.shape[1]) / captions_of
    return found


def readability(
    captions: SentenceSide, texts: Embeddings, images: Embeddings, owners: np.ndarray, special: list[int]
) -> dict:
    """What the words have to do with what was said: shares in [0, 1], entropy in bits.

    ``own_token_share`` of a caption's 20 heaviest words occur in it, ``image_term_precision`` of an image's in one of
    its captions; ``caption_token_recall`` of its captions' words are active in an image's 20 heaviest and, as
    ``..._all``, among all. ``coactivation`` is the share of a caption's words that an image picked at random has too.
    """
    kept = ~np.isin(captions.tokens, special)
    caption_of = np.repeat(np.arange(len(captions)), np.diff(captions.offsets))[kept]
    words = captions.tokens[kept]
    said = csr_matrix((np.ones(len(words), np.float32), (caption_of, words)), shape=(len(captions), texts.dim))
    shown = csr_matrix((np.ones(len(words), np.float32), (owners[caption_of], words)), shape=(len(images), texts.dim))

    def top(side: Embeddings, present: csr_matrix) -> tuple[float, float]:
        short = pruned(side, 20)
        active = csr_matrix((np.ones(len(short.values), np.float32), short.indices, short.offsets), present.shape)
        hits = np.asarray(active.multiply(present > 0).sum(1))[:, 0]
        types = np.asarray((present > 0).sum(1))[:, 0]
        return float((hits / np.maximum(short.lengths, 1)).mean()), float((hits / np.maximum(types, 1)).mean())

    everything = csr_matrix((np.ones(len(images.values), np.float32), images.indices, images.offsets), shown.shape)
    all_hits = np.asarray(everything.multiply(shown > 0).sum(1))[:, 0]
    usage = np.bincount(images.indices, minlength=images.dim) / max(1, len(images.indices))
    precision, recall = top(images, shown)
    cost = costs_of(texts, images)
    return {
        "own_token_share": top(texts, said)[0],
        "image_term_precision": precision,
        "caption_token_recall": recall,
        "caption_token_recall_all": float((all_hits / np.asarray((shown > 0).sum(1))[:, 0]).mean()),
        "entropy_bits": -float((usage[usage > 0] * np.log2(usage[usage > 0])).sum()),
        "coactivation": cost["flops"] / max(cost["query_active_dims"], 1e-9),
        "FLOPs": cost["flops"],
        "image dims": cost["active_dims"],
        "caption dims": cost["query_active_dims"],
    }


@dataclass
class Measured:
    """A system on one split: per-item values of each seed, and figures averaged over seeds."""

    values: dict[tuple[str, str], list[np.ndarray]] = field(default_factory=dict)
    figures: dict[str, list[float]] = field(default_factory=dict)

    def add(self, values: dict[tuple[str, str], np.ndarray], figures: dict[str, float]) -> None:
        """One more seed."""
        for key, value in values.items():
            self.values.setdefault(key, []).append(value)
        for name, figure in figures.items():
            self.figures.setdefault(name, []).append(figure)

    def mean(self, key: tuple[str, str] = (TEXT_TO_IMAGE, "R@1")) -> np.ndarray:
        """Per item, averaged over seeds."""
        return np.mean(self.values[key], axis=0)

    def figure(self, name: str) -> float:
        """Mean over seeds."""
        return float(np.mean(self.figures[name]))


def sparse_system(bench: ImageBench, flags: list[str], seed: int, split: str) -> tuple[Any, dict[str, Embeddings]]:
    """A fitted head, and what it makes of a split: ``texts``, ``unexpanded``, ``images``; and its training log."""
    folder = bench.dense2sparse(flags, seed)
    head = AutoModel.from_pretrained(folder / "head").eval()
    captions, images = bench.sides(split)
    limits = head.config.query_top_k, head.config.document_top_k
    made = {
        "texts": pruned(with_head(head, captions, "query"), limits[0]),
        "unexpanded": pruned(with_head(head, captions, "query", expand=False), limits[0]),
    }
    head = AutoModel.from_pretrained(folder / "head").eval()
    made["images"] = pruned(with_head(head, images, "document"), limits[1])
    return read_json(folder / "training.json"), made | {"special": head.config.special_token_ids}


def measured_sparse(bench: ImageBench, flags: list[str], seeds: list[int], split: str) -> Measured:
    """A variant of Dense2Sparse on a split."""
    out, owners = Measured(), bench.owners(split)
    for seed in seeds:
        log, made = sparse_system(bench, flags, seed, split)
        texts, images = made["texts"], made["images"]
        unexpanded = recalls(all_scores(made["unexpanded"], images), owners)[TEXT_TO_IMAGE, "R@1"].mean()
        figures = readability(bench.queries(split), texts, images, owners, made["special"])
        more = {"R@1 unexpanded": float(unexpanded), "fit seconds": log["seconds"]}
        out.add(recalls(all_scores(texts, images), owners), figures | more)
    return out


def dense_pair(bench: ImageBench, split: str) -> tuple[Embeddings, Embeddings]:
    """The teacher's own vectors."""
    captions, images = bench.sides(split)
    return captions.embeddings, images.embeddings


def label_texts(args: Arguments, count: int, split: str) -> RetrievalDataset:
    """The split with each image replaced by the names of the classes that its encoder gives the highest scores."""
    dataset = load_retrieval_dataset(args.dataset, split)
    features = np.asarray(dataset.vectors["document"], np.float32)
    names = Path(args.labels).read_text(encoding="utf-8").splitlines()
    with np.load(args.weights, allow_pickle=False) as arrays:
        weight, bias = (arrays[name].astype(np.float32) for name in ("w52", "b52"))
    if len(names) != len(bias):
        raise InputError(f"{args.labels}: {len(names)} names for {len(bias)} classes, so they would go with others.")
    logits = features @ weight.reshape(len(bias), -1).T + bias
    best = np.argsort(-logits, axis=1)[:, :count]
    texts = {i: " ".join(names[place] for place in row) for i, row in zip(dataset.corpus, best, strict=True)}
    return RetrievalDataset(dataset.name, split, texts, dataset.queries, dataset.qrels)


def table(args: Arguments, bench: ImageBench, split: str) -> dict[str, Measured]:
    """Every row, on one split."""
    owners, systems = bench.owners(split), {}
    dense = all_scores(*dense_pair(bench, split))
    systems["dense"] = Measured()
    systems["dense"].add(recalls(dense, owners), {"bytes": 2 * dense_pair(bench, split)[1].dim})
    systems["dense, adapter with labels"] = Measured()
    for seed in args.seeds:
        adapter: Any = bench.rival("adapter", seed)
        pair = [adapted_by(adapter, side) for side in bench.sides(split)]
        systems["dense, adapter with labels"].add(recalls(all_scores(*pair), owners), {})
    if args.weights:
        scored = {
            count: recalls(bm25_scores(label_texts(args, count, "dev")), bench.owners("dev")) for count in LABEL_COUNTS
        }
        count = max(scored, key=lambda c: scored[c][TEXT_TO_IMAGE, "R@1"].mean())
        name = f"BM25, {count} ImageNet labels an image"
        systems[name] = Measured()
        systems[name].add(recalls(bm25_scores(label_texts(args, count, split)), owners), {})
    for name, (every, flags) in tqdm(SYSTEMS.items(), desc="systems"):
        systems[name] = measured_sparse(bench, flags, args.seeds if every else args.seeds[:1], split)
    for size in CSR_SIZES:
        for name in (f"CSR, {size} dims", f"Dense2Sparse, {size} words", "dense + Dense2Sparse"):
            systems.setdefault(name, Measured())
    weight = hybrid_weight(args, bench)
    for seed in args.seeds:
        _, whole = sparse_system(bench, [], seed, split)
        _, sparser = sparse_system(bench, SYSTEMS[SPARSER][1], seed, split)
        for size in CSR_SIZES:
            made = whole if size > 64 else sparser
            short = pruned(made["texts"], size), pruned(made["images"], size)
            figures = readability(bench.queries(split), *short, owners, made["special"])
            systems[f"Dense2Sparse, {size} words"].add(recalls(all_scores(*short), owners), figures)
            if seed != args.seeds[0]:
                continue  # one seed of the rival, for time
            module = bench.rival("csr", seed, size, labels=False)
            pair = [
                encode_sparse(
                    lambda f, m=module: m({"sentence_embedding": f["sentence_embedding"]})["sentence_embedding"], side
                )
                for side in bench.sides(split)
            ]
            cost = costs_of(*pair)
            figures = {"FLOPs": cost["flops"], "image dims": cost["active_dims"]}
            figures["caption dims"] = cost["query_active_dims"]
            systems[f"CSR, {size} dims"].add(recalls(cosines(*pair), owners), figures)
        words = all_scores(whole["texts"], whole["images"])
        forth = recalls(weight * standardised(words) + (1 - weight) * standardised(dense), owners)
        back = recalls((weight * standardised(words.T) + (1 - weight) * standardised(dense.T)).T, owners)
        both = {key: (forth if key[0] == TEXT_TO_IMAGE else back)[key] for key in forth}
        systems["dense + Dense2Sparse"].add(both, {"weight": weight})
    return systems


def cosines(queries: Embeddings, documents: Embeddings) -> np.ndarray:
    """Every cosine of sparse vectors: ``(queries, documents)``."""
    lengths = [
        np.sqrt(np.add.reduceat(np.append(side.values.astype(np.float64) ** 2, 0.0), side.offsets[:-1]))
        for side in (queries, documents)
    ]
    return all_scores(queries, documents) / np.maximum(lengths[0][:, None] * lengths[1], 1e-12)


def hybrid_weight(args: Arguments, bench: ImageBench) -> float:
    """Share of the words in the hybrid: the best on dev with the first seed."""
    _, made = sparse_system(bench, [], args.seeds[0], "dev")
    words = standardised(all_scores(made["texts"], made["images"]))
    dense = standardised(all_scores(*dense_pair(bench, "dev")))
    owners = bench.owners("dev")
    found = [recalls(w * words + (1 - w) * dense, owners)[TEXT_TO_IMAGE, "R@1"].mean() for w in HYBRID_WEIGHTS]
    return float(HYBRID_WEIGHTS[int(np.argmax(found))])


def rows_of(systems: dict[str, Measured], collection: str, split: str) -> list[dict[str, Any]]:
    """The table: a row for each system, direction and metric; figures stand with text to image."""
    rows: list[dict[str, Any]] = []
    for direction in (TEXT_TO_IMAGE, IMAGE_TO_TEXT):
        reference = np.stack(systems["dense"].values[direction, "R@1"])
        others = [name for name in systems if name != "dense"]
        values = {name: np.stack(systems[name].values[direction, "R@1"]) for name in others}
        tests = dict(zip(others, compare(values, reference), strict=True))
        for name, system in systems.items():
            shared = {"system": name, "dataset": f"{collection}, {direction}", "split": split}
            for metric in METRICS:
                per_seed = np.stack(system.values[direction, metric])
                row = shared | {"metric": metric, "value": float(per_seed.mean()), "queries": per_seed.shape[1]}
                row |= {"interval": list(bootstrap_interval(per_seed)), "seeds": len(per_seed)}
                if metric == "R@1" and name in tests:
                    row |= {"reference": "dense"} | tests[name]
                rows.append(row)
            if direction == TEXT_TO_IMAGE:
                rows += [shared | {"metric": figure, "value": system.figure(figure)} for figure in system.figures]
    return rows


def claims(systems: dict[str, Measured], split: str) -> list[dict[str, Any]]:
    """What the card promises, with intervals from resampling images with their captions."""
    draws = np.random.default_rng(0).integers(len(systems["dense"].mean()), size=(2000, len(systems["dense"].mean())))
    found: list[dict[str, Any]] = []

    def claim(
        name: str,
        statistic: Callable[[np.ndarray], np.ndarray] | float,
        target: float | None,
        met: Callable[[float], bool] | None = None,
        **more: Any,
    ) -> None:
        if callable(statistic):
            value = float(statistic(np.arange(draws.shape[1])[None])[0])
            interval = [float(x) for x in np.percentile(statistic(draws), [2.5, 97.5])]
        else:
            value, interval = float(statistic), None
        met = met or (lambda v: v >= target)
        entry = {"claim": f"dense2sparse.{name}", "value": value, "interval": interval, "target": target}
        found.append(entry | {"met": None if target is None else bool(met(value)), "split": split} | more)

    def mean(name: str) -> Callable[[np.ndarray], np.ndarray]:
        values = systems[name].mean()
        return lambda rows: values[rows].mean(1)

    ours, dense, adapter = mean("Dense2Sparse"), mean("dense"), mean("dense, adapter with labels")
    claim("image_ratio", lambda r: ours(r) / dense(r), 1.0, flops=systems["Dense2Sparse"].figure("FLOPs"))
    claim("image_ratio_to_adapter", lambda r: ours(r) / adapter(r), 1.0)
    unlabelled = mean("Dense2Sparse, no labels")
    claim("image_ratio_without_labels", lambda r: unlabelled(r) / dense(r), 1.0)
    # FLOPs that the recipe without control needs for the R@1 of the one with it, and half a point more.
    curve = sorted((systems[n].mean().mean(), systems[n].figure("FLOPs")) for n in systems if n.startswith(FREE))
    recall = systems[CONTROLLED].mean().mean()
    needed = np.exp(np.interp(recall + 0.005, [r for r, _ in curve], np.log([f for _, f in curve])))
    cut = needed / systems[CONTROLLED].figure("FLOPs")
    at_same_weight = systems[FREE].figure("FLOPs") / systems[CONTROLLED].figure("FLOPs")
    free, held = mean(FREE), mean(CONTROLLED)
    claim("image_flops_cut_by_control", cut, 5.0, at_the_same_weight=at_same_weight)
    claim("image_points_lost_by_control_at_the_same_weight", lambda r: 100 * (free(r) - held(r)), None)
    for name in (FREE, CONTROLLED, "Dense2Sparse"):
        shares = {f: systems[name].figure(f) for f in ("own_token_share", "image_term_precision", "coactivation")}
        claim(f"image_own_token_share, {name}", shares.pop("own_token_share"), None, **shares)
    for size in CSR_SIZES:
        words, rival = mean(f"Dense2Sparse, {size} words"), mean(f"CSR, {size} dims")
        claim(f"image_margin_over_csr_{size}", lambda r, a=words, b=rival: 100 * (a(r) - b(r)), 0.0)
    hybrid = mean("dense + Dense2Sparse")
    claim("image_hybrid_gain", lambda r: 100 * (hybrid(r) - np.maximum(ours(r), dense(r))), 0.0, lambda v: v > 0)
    claim("image_fit_seconds", max(systems["Dense2Sparse"].figures["fit seconds"]), 300, lambda v: v <= 300)
    return found


def draw_frontier(rows: list[dict[str, Any]], path: Path) -> None:
    """Text-to-image R@1 against FLOPs: a line for what one knob trades, a named point for every other lever."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["dataset"].endswith(TEXT_TO_IMAGE):
            found.setdefault(row["system"], {})[row["metric"]] = row["value"]
    lines = {
        "Dense2Sparse, by regulariser": [
            "Dense2Sparse",
            *(f"Dense2Sparse, regulariser {w}" for w in (0.02, 0.1, 0.4)),
        ],
        f"{FREE}, by L1": [name for name in found if name.startswith(FREE)],
        f"{CONTROLLED}, by L1": [name for name in found if name.startswith(CONTROLLED) and "half" not in name],
        "CSR, by dims": [name for name in found if name.startswith("CSR")],
    }
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for label, names in lines.items():
        points = sorted((found[name]["FLOPs"], 100 * found[name]["R@1"]) for name in names)
        axis.plot(*zip(*points, strict=True), "o-", ms=5, label=label)
    for name in set(found) - {name for names in lines.values() for name in names}:
        if "FLOPs" not in found[name] or "words" in name:
            continue
        place = found[name]["FLOPs"], 100 * found[name]["R@1"]
        axis.plot(*place, "x", color="0.3", ms=5)
        label, up = name.removeprefix("paper's recipe, "), "half" in name or name.startswith("Dense2Sparse")
        axis.annotate(
            label, place, (0, 6 if up else -10), textcoords="offset points", fontsize=7, ha="center", color="0.3"
        )
    for name, style in (("dense", "-"), ("dense + Dense2Sparse", ":")):
        axis.axhline(100 * found[name]["R@1"], color="0.5", lw=1, ls=style, label=name)
    axis.set(xscale="log", xlabel="FLOPs: words that a caption and an image share", ylabel="text to image, R@1 (%)")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=144)
    plt.close(figure)


def main() -> None:
    """Fit, measure and write."""
    (args,) = HfArgumentParser([Arguments]).parse_args_into_dataclasses()
    if args.redraw:
        draw_frontier(
            read_json(Path(args.output) / f"{args.name}.json")["rows"], Path(args.output) / f"{args.name}.png"
        )
        return
    if not args.dataset or not Path(args.dataset).is_dir():
        raise InputError(f"--dataset {args.dataset!r}: no such folder. Name one with captions and image features.")
    made_by = provenance(shlex.join(["python", *sys.argv]))
    folder = fetch(args.backbone)
    model = load(folder, dtype=fastest_dtype("auto"))
    bench = ImageBench(args, args.dataset, model)
    for tried in args.tried:
        system = measured_sparse(bench, shlex.split(tried), args.seeds[:1], "dev")
        shown = {name: system.figure(name) for name in system.figures}
        first = " ".join(f"{100 * system.mean((d, m)).mean():.1f}" for d, m in system.values if m != "MRR@10")
        print(f"{tried or 'default'} | {first} | " + " ".join(f"{k} {v:.3g}" for k, v in shown.items()), flush=True)
    if args.tried:
        dense = recalls(all_scores(*dense_pair(bench, "dev")), bench.owners("dev"))
        print("dense", " ".join(f"{100 * v.mean():.1f}" for (_, m), v in dense.items() if m != "MRR@10"))
        return
    systems = table(args, bench, "test")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    collection = Path(args.dataset).name
    whole = {"system": "all fits", "dataset": f"{collection}, the run", "split": "test", "metric": "peak memory, GiB"}
    results = made_by | {
        "name": args.name,
        "seeds": args.seeds,
        "settings_tried": SETTINGS_TRIED,
        "models": {Path(args.backbone).parent.name: fingerprint(folder)},
        "rows": [*rows_of(systems, collection, "test"), whole | {"value": peak}],
        "claims": claims(systems, "test"),
        "drawn": [],
    }
    print(write_results(results, Path(args.output) if args.output else None))
    if args.output:
        draw_frontier(results["rows"], Path(args.output) / f"{args.name}.png")


if __name__ == "__main__":
    main()
