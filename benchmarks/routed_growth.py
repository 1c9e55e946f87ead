"""What late interaction among equal keys costs as a corpus grows, beside MaxSim, LEMUR and Seismic, in one run.

python benchmarks/routed_growth.py --output results

Corpus, copies with noise and timing are those of ``search.py``: the documents of several real data sets are one corpus
in a seeded order, beyond which they are replicated with noise on their vectors, under the keys that they have, so that
lists grow as the corpus does. What is timed is one query alone, from its vectors to ids and scores. Recall is against
exact search by the same vectors; of two stages against exact search by what ranks. Finished rows are kept, and a run
that was interrupted goes on.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from search import NOISE, SPAN, TOP, Corpus, Representation, Table, in_arrays, occupied, quantiles, recalled, timed
from search import report_rows as rows_of_table
from transformers import HfArgumentParser

from polyrep.encoding import Embeddings, embed
from polyrep.encoding.embeddings import in_memory, rows
from polyrep.encoding.shards import Origin, Shard
from polyrep.encoding.views import View, views_of
from polyrep.errors import InputError
from polyrep.files import read_json
from polyrep.hub import fetch, fingerprint, load
from polyrep.hub.folder import fastest_dtype
from polyrep.methods import LemurPooling
from polyrep.report import provenance, write_results
from polyrep.search import open_index

MAXSIM, LEMUR, ROUTER, ROUTED = "full multi-vector", "LEMUR", "router", "routed"
RERANKED, CANDIDATES, LEMUR_DIM = f"{LEMUR} + {MAXSIM}", 200, 512
FOUND = f"{ROUTER} + {ROUTED}"

ENGINES = {
    MAXSIM: {"exact": "memory:"},
    ROUTER: {"exact": "memory:", "Seismic": "seismic://{}"},
    ROUTED: {"exact": "memory:", "index": "routed://{}", "index, int8": "routed://{}?precision=int8"},
}
"""Of each representation what searches it; the first says what should be found."""

STAGES = {RERANKED: (LEMUR, MAXSIM), FOUND: (ROUTER, ROUTED)}
"""What finds candidates in memory, and what ranks them anew."""

COLOURS = {MAXSIM: "#6b6b6b", RERANKED: "#3ca951", ROUTER: "#ff725c", ROUTED: "#4269d0", FOUND: "#97bbf5"}
STYLES = {"exact": ":", "index": "-", "index, int8": "--", "Seismic": "-", f"best {CANDIDATES}": "-"}


@dataclass
class Arguments:
    """What to measure."""

    datasets: list[str] = field(default_factory=lambda: ["tldr_pages", "scitldr", "scifact"])
    sizes: list[int] = field(default_factory=lambda: [1_000, 10_000, 100_000])
    model: str = field(default="models/citadel-minilm/final", metadata={"help": "Of routed entries."})
    backbone: str = field(
        default="models/four/late-interaction-minilm/final", metadata={"help": "Of several vectors."}
    )
    models: str = field(default="models/tldr", metadata={"help": "Folder of the shipped runs' outputs."})
    thresholds: list[float] = field(
        default_factory=lambda: [0.9], metadata={"help": "Lengths that entries must exceed in further indexes."}
    )
    queries: int = field(default=SPAN["dense"], metadata={"help": "Queries that are timed at most."})
    cache_dir: str = ".cache"
    time_budget: float = field(default=0.0, metadata={"help": "Seconds after which no row is begun; 0: none."})
    output: str | None = None


@dataclass
class Routed(Representation):
    """Routed entries.

    Attributes:
        view: What the model says of them.
    """

    view: View | None = None

    @property
    def origin(self) -> Origin:
        """See :class:`search.Representation`."""
        assert self.view is not None
        keys = {"vocabulary": self.view.vocabulary, "sentence_dim": self.view.sentence_dim}
        return replace(super().origin, **keys)  # type: ignore[arg-type]

    def shards(self, size: int, ids: list[str]) -> Iterator[Shard]:
        """The first ``size`` documents; copies have noise on their entries, and on the vectors of whole texts."""
        start = 0
        for shard in super().shards(size, ids):
            copies = np.arange(start, start + len(shard.ids)) >= len(self.documents)
            sentences, start = shard.vectors.sentences, start + len(shard.ids)
            if sentences is not None and copies.any():
                whole = np.array(sentences, np.float32)
                noise = np.random.default_rng(start).standard_normal(whole.shape, np.float32)
                length = np.linalg.norm(whole, axis=1, keepdims=True)
                whole += copies[:, None] * noise * length * NOISE / whole.shape[1] ** 0.5
                shard = replace(shard, vectors=replace(shard.vectors, sentences=whole.astype(np.float16)))
            yield shard


class Growing(Corpus):
    """Real documents and queries of several data sets, as the rows have them."""

    args: Any

    @cached_property
    def model(self) -> Any:
        """The model that routes."""
        model = load(self.args.model, trust_remote_code=True, dtype=fastest_dtype("auto"))
        if not {ROUTER, ROUTED} <= views_of(model).keys():
            raise InputError(f"--model {self.args.model}: has no views router and routed. Name a model that routes.")
        return model

    @cached_property
    def lemur(self) -> Representation:
        """One vector a text whose inner product follows MaxSim."""
        head = LemurPooling.from_pretrained(str(self.head("lemur-minilm")), embedding_dim=LEMUR_DIM).model.eval()
        with torch.inference_mode():
            queries = head.encode_query_tokens(self.tokens.queries.values, self.tokens.queries.offsets)
            documents = head.encode_document_tokens(self.tokens.documents.values, self.tokens.documents.offsets)
        sides = in_memory(queries.numpy()), in_memory(documents.half().numpy())
        return Representation(LEMUR, "sentence", "dot", *sides)

    @cached_property
    def router(self) -> Representation:
        """Weights of words."""
        return self._of_view(ROUTER)

    @cached_property
    def routed(self) -> Representation:
        """Entries under keys."""
        made, view = self._of_view(ROUTED), views_of(self.model)[ROUTED]
        return Routed(ROUTED, "routed", view.similarity, made.queries, made.documents, view=view)

    def make(self, name: str) -> Representation:
        """A representation by its name."""
        named = {MAXSIM: "tokens", LEMUR: "lemur", ROUTER: "router", ROUTED: "routed"}
        return getattr(self, named[name])

    def _of_view(self, name: str) -> Representation:
        view, sides = views_of(self.model)[name], []
        for task in ("query", "document"):
            found: list[Embeddings] = []
            for dataset in self.datasets:
                texts = dataset.queries if task == "query" else dataset.corpus
                options = {"kind": view.kind, "name": f"{dataset.name}-{name}", **self.options}
                found.append(embed(self.model, texts, task=task, **options))  # type: ignore[arg-type]
            sides.append(found)
        return self._made(name, view.kind, view.similarity, *sides)


def measure(args: Arguments, table: Table) -> None:
    """Every row that is not there yet, the smallest corpora first."""
    corpus, started = Growing(args), time.perf_counter()  # type: ignore[arg-type]
    engines = {name: dict(found) for name, found in ENGINES.items()}
    engines[ROUTED] |= {f"index above {one:g}": f"routed://{{}}?threshold={one:g}" for one in args.thresholds}
    for size in args.sizes:
        best: dict[str, list[list[str]]] = {}
        for name, several in engines.items():
            stages = [stage for stage, (_, ranks) in STAGES.items() if ranks == name]
            missing = [e for e in several if not table.has(f"{name}, {e}", size)]
            missing += [s for s in stages if not table.has(f"{s}, best {CANDIDATES}", size)]
            for engine, uri in several.items() if missing else ():
                if args.time_budget and time.perf_counter() - started > args.time_budget:
                    return
                if engine in missing or engine == "exact":  # which is searched again for what should be found
                    made = corpus.make(name)
                    found = measured(corpus, [made], size, uri, table, f"{name}, {engine}", best.get(name), args)
                    best.setdefault(name, found)
            for stage in stages:
                if stage in missing:
                    both = [corpus.make(one) for one in STAGES[stage]]
                    uri = f"memory:?prefetch={CANDIDATES}"
                    measured(corpus, both, size, uri, table, f"{stage}, best {CANDIDATES}", best[name], args)


def measured(
    corpus: Corpus,
    made: list[Representation],
    size: int,
    uri: str,
    table: Table,
    system: str,
    exact: list[list[str]] | None,
    args: Arguments,
) -> list[list[str]]:
    """Build an index, search it, and keep the row; returns what should be found.

    Args:
        corpus: The corpus.
        made: What to put into the index: what is searched, or what finds candidates and what ranks them.
        size: How many documents.
        uri: Of the index, with a place for its folder.
        table: Where rows go.
        system: Name of the row.
        exact: What should be found; None for exact search itself.
        args: Of the run.
    """
    folder = Path(tempfile.mkdtemp(prefix="polyrep-")) / "index"
    most = min(args.queries, SPAN["several" if made[-1].kind == "tokens" else "dense"], len(made[-1].queries))
    try:
        index = open_index(uri.format(folder))
        started = time.perf_counter()
        for one in made:
            index.add(one.shards(size, corpus.ids))
        asked = [{one.name: rows(one.queries, np.array([n])) for one in made} for n in range(most)]
        index.search(asked[0], TOP)  # what is built at the first search belongs to the build
        seconds = time.perf_counter() - started
        if exact is None:  # all at once: exact search is quicker so
            several = {one.name: rows(one.queries, np.arange(most)) for one in made}
            exact = [[hit.id for hit in hits] for hits in index.search(several, TOP)]
        found, ms = timed(index, asked)
        bytes_ = occupied(folder) if folder.exists() else sum(in_arrays(one, size) for one in made)
        row: dict[str, Any] = {"recall": recalled(found, exact), **quantiles(ms), "bytes": bytes_}
        row |= {"build_seconds": seconds, "replicated_with_noise": max(0, size - corpus.real)}
        row |= getattr(index, "statistics", dict)()
        table.add(system, size, **{name: value for name, value in row.items() if name != "documents"})
    finally:
        shutil.rmtree(folder.parent)
    return exact


def draw(results: dict[str, Any], path: Path) -> None:
    """Growth of milliseconds and bytes, a line for each system."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots(1, 2)
    shown: dict[str, dict[int, dict[str, float]]] = {}
    for row in results["rows"]:
        shown.setdefault(row["system"], {})[row["documents"]] = row
    for system, by_size in shown.items():
        name, _, engine = system.partition(", ")
        sizes = sorted(by_size)
        for axis, key, scale in ((axes[0], "ms_p50", 1), (axes[1], "bytes", 1e-6)):
            values = [by_size[size][key] * scale for size in sizes]
            axis.plot(sizes, values, STYLES.get(engine, "-."), color=COLOURS[name], marker="o", ms=3, lw=1.4)
    for axis, title in ((axes[0], "ms per query (median)"), (axes[1], "MB")):
        axis.set(xscale="log", yscale="log", xlabel="documents", title=title)
        axis.grid(alpha=0.25)
    lines = [axes[1].plot([], [], color=colour, lw=2, label=name)[0] for name, colour in COLOURS.items()]
    styles = STYLES | {"index above a threshold": "-."}
    lines += [axes[1].plot([], [], style, color="black", label=engine)[0] for engine, style in styles.items()]
    figure.legend(handles=lines, loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)


def claims(table: Table) -> list[dict[str, Any]]:
    """Speed and size beside MaxSim in the largest corpus, and whether the index finds what exact search finds."""
    rows_ = {(row["system"], row["documents"]): row for row in table.rows}
    largest = max(size for _, size in rows_)
    ours, theirs = rows_[f"{ROUTED}, index", largest], rows_[f"{MAXSIM}, exact", largest]
    exact = min(row["recall"] for (system, _), row in rows_.items() if system == f"{ROUTED}, index")
    speed, size = theirs["ms_p50"] / ours["ms_p50"], ours["bytes"] / theirs["bytes"]
    return [
        {"claim": "citadel.speedup", "value": speed, "target": 10, "met": speed >= 10},
        {"claim": "citadel.bytes_ratio", "value": size, "target": 0.15, "met": size <= 0.15},
        {"claim": "citadel.index_exact", "value": exact, "target": 1, "met": exact == 1},
    ]


def main() -> None:
    """Measure, and write the results once every row is there."""
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]  # type: ignore[arg-type]
    folders = [args.model, args.backbone, f"{args.models}/lemur-minilm/head"]
    models = {folder: fingerprint(fetch(folder)) for folder in folders}
    settings = {k: v for k, v in asdict(args).items() if k in ("datasets", "sizes", "queries", "thresholds")}
    key = {"models": models, "arguments": settings}
    path = Path(args.cache_dir) / "routed-growth" / "rows.jsonl"
    if read_json(path.with_name("key.json")) != key:
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name("key.json").write_text(json.dumps(key), encoding="utf-8")
    table = Table(path)
    measure(args, table)
    results = provenance(shlex.join(["python", *sys.argv])) | {
        "name": "citadel-growth",
        "seeds": [0],
        "settings_tried": 1,
        "models": models,
        "rows": rows_of_table(table),
        "claims": claims(table),
        "axis": "ms_p50",
        "notes": [
            "Bytes are what the files occupy; of exact search and of two stages in memory, those of the vectors.",
            "The noise on copies is drawn anew for each representation. Their keys are those of what they copy.",
            f"Two stages rank the best {CANDIDATES} of the first; recall is against exact search by the second.",
        ],
    }
    picture: Callable[[dict[str, Any], Path], None] = draw
    print(write_results(results, Path(args.output) if args.output else None, picture))


if __name__ == "__main__":
    main()
