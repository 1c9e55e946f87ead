"""``polyrep index`` puts encoded corpora into an index, ``polyrep search`` asks it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..encoding import bm25
from ..encoding.cache import embed
from ..encoding.encoders import kind_of
from ..encoding.shards import EncodedCorpus, Origin, Shard
from ..encoding.views import encode_views, views_of, weights_of_views
from ..errors import InputError, refuse_no_text
from ..flags import parse
from ..hub.fingerprint import fingerprint, told
from ..hub.folder import fastest_dtype, fetch, load
from .backends import open_index
from .budget import budget_of, cut_shards, said_budget
from .probability import Searcher
from .protocol import Hit, Index, Queries, refuse_unusable_weights


@dataclass
class IndexArguments:
    """Where to put documents."""

    _argument_group_name = "index"

    uri: str = field(
        default="",
        metadata={
            "help": "faiss:///PATH, seismic:///PATH, routed:///PATH, qdrant:///PATH, qdrant+https://HOST/COLLECTION."
        },
    )
    budget: str = field(
        default="",
        metadata={"help": "Of nested vectors, keep the first so many of each document; a search may use fewer."},
    )
    force: bool = field(default=False, metadata={"help": "Add to an index that another model's vectors are in."})


@dataclass
class SearchArguments:
    """Where to search, and with what."""

    _argument_group_name = "search"

    uri: str = field(default="", metadata={"help": "The index."})
    model: str = field(
        default="minilm",
        metadata={
            "help": "Folder or Hub id of the model that encoded it; for --weights several, comma-separated. BM25's is "
            "the folder of the documents that it encoded."
        },
    )
    name: str = field(default="", metadata={"help": "Which vectors, where the index has several kinds."})
    weights: str = field(
        default="",
        metadata={
            "help": "Rank by the weighted sum of several kinds, e.g. lexicon=1,dense=0.3; the first finds candidates. "
            "Default: what a model with views says of these."
        },
    )
    budget: str = field(
        default="",
        metadata={
            "help": "Of nested vectors, search the first so many of a document; with the query's: 4,8. Default: all."
        },
    )
    first: str = field(default="", metadata={"help": "Likewise, what finds candidates, which --budget ranks."})
    candidates: int | None = field(
        default=None,
        metadata={
            "help": "Documents of a query that a sum ranks (default: 1000), or that --first finds (prefetch's)."
        },
    )
    k: int = field(default=10, metadata={"help": "Documents to print."})
    revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of a Hub model."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that the model carries."})
    model_dtype: str = field(default="float32", metadata={"help": "Weights in memory, as for encode."})
    force: bool = field(default=False, metadata={"help": "Search although another model made the index."})


def index(argv: list[str], *, prog: str = "polyrep index") -> dict[str, int]:
    """Put the encoded corpora that ``argv`` names into an index; what is there already is passed over.

    Args:
        argv: Folders and flags.
        prog: How it was called.

    Returns:
        ``documents`` that were written, how many of them ``replaced`` another, ``shards_known``, and ``count``, all
        documents of the index.

    Raises:
        InputError: A corpus is incomplete or damaged, or the index cannot take it.
    """
    about = "Put encoded corpora into an index. Run it again to go on."
    args, folders = parse(IndexArguments, argv, prog, about, "CORPUS", "Folders of `polyrep encode`.", nargs="+")
    refuse_no_uri(args.uri)
    corpora = [EncodedCorpus(folder) for folder in folders]  # all of them are looked at before anything is written
    for corpus in corpora:
        if corpus.manifest["task"] != "document":
            raise InputError(f"{corpus.folder}: holds queries, which are to be searched with. Encode the documents.")
    budget = said_budget(args.budget, "--budget")
    for corpus in corpora if budget is not None else ():
        budget_of(corpus.origin, budget, "--budget", str(corpus.folder))
    target = open_index(args.uri, force=args.force)
    said = {"documents": 0, "replaced": 0, "shards_known": 0}
    started = time.perf_counter()
    for corpus in corpora:
        added = target.add(_shown(corpus) if budget is None else cut_shards(_shown(corpus), budget))
        said = {name: said[name] + getattr(added, name) for name in said}
    said["count"] = target.count()
    seconds = time.perf_counter() - started
    several = f" of {len(corpora)} corpora" if len(corpora) > 1 else ""
    print(
        f"{args.uri}: {said['documents']:,} documents{several} written in {seconds:,.1f} s, {said['replaced']:,} of "
        f"them in place of one with the same id; {said['shards_known']:,} shards were there already; now it has "
        f"{said['count']:,} documents",
        flush=True,
    )
    return said


def search(argv: list[str], *, prog: str = "polyrep search") -> list[list[Hit]]:
    """Print the best documents for each query that ``argv`` names.

    Args:
        argv: Queries and flags.
        prog: How it was called.

    Returns:
        The hits of each query, with probabilities where the model's folder has a calibration, and with the best window
        where the index has windows.

    Raises:
        InputError: The index, the model or its calibration cannot be used, or they do not belong together.
    """
    about = "Search an index."
    args, queries = parse(SearchArguments, argv, prog, about, "QUERY", "Texts to search for.", nargs="+")
    refuse_no_uri(args.uri)
    for query in queries:
        refuse_no_text(query, f"query {query!r}")
    if args.weights and args.name:
        raise InputError(f"--name {args.name}: --weights says which vectors are searched. Leave one of them out.")
    models = open_models(args)
    target = open_index(args.uri, fingerprint=models[0].fingerprint, force=args.force)
    found = find(target, models, queries, args)
    for query, hits in zip(queries, found, strict=True):
        print(query)
        for hit in hits:
            sure = "" if hit.probability is None else f"p={hit.probability:.3f}  "
            where = "" if hit.window is None else f"  window {hit.window}"
            print(f"  {hit.score:10.4f}  {sure}{hit.id}{where}")
    return found


def open_models(args: SearchArguments) -> list[Asker]:
    """What makes vectors of queries, as ``--model`` names it.

    Raises:
        InputError: One cannot be opened.
    """
    return [Asker.open(source, args) for source in _sources(args.model)]


def find(target: Index, models: Sequence[Asker], queries: Sequence[str], args: SearchArguments) -> list[list[Hit]]:
    """The hits of each query, as the flags of ``polyrep search`` say.

    Args:
        target: Where to search.
        models: What makes vectors of queries.
        queries: Texts.
        args: The flags.

    Raises:
        InputError: The index cannot be asked so, or it and the models do not belong together.
    """
    weights = (
        weights_of(args.weights) if args.weights else {} if args.name else models[0].weights(target.origins, args.uri)
    )
    plan = {"budget": said_budget(args.budget, "--budget"), "first": said_budget(args.first, "--first")}
    if args.candidates is not None and not weights and plan["first"] is None:
        raise InputError(
            f"--candidates {args.candidates}: of a weighted sum or of two stages alone, and there is neither. Add "
            "--weights or --first, or leave it out."
        )
    if weights:
        there = weights if weights.keys() <= target.origins.keys() else target.origins
        refuse_unusable_weights(weights, list(there), args.uri)
        askers = {name: _asker_of(target.origins[name], models, args) for name in weights}
        asked: dict[str, Queries] = {}
        for model in dict.fromkeys(askers.values()):  # one pass of each
            asked |= model.ask(queries, [name for name, asker in askers.items() if asker is model])
        return target.search(asked, args.k, weights=weights, candidates=args.candidates, **plan)
    if len(models) > 1:
        raise InputError(f"--model {args.model}: several models, but no --weights. Add it, or name one model.")
    return _by_one(models[0], target, queries, args, plan | {"candidates": args.candidates})


def _by_one(
    asker: Asker, target: Index, queries: Sequence[str], args: SearchArguments, plan: dict[str, Any]
) -> list[list[Hit]]:
    """Search one kind of vectors, by the budget and the candidates of a plan."""
    name = args.name
    if not name:  # the vectors of this model, where the index has those of several
        name = next((n for n, origin in target.origins.items() if origin.fingerprint == asker.fingerprint), "")
    elif name in target.origins and target.origins[name].fingerprint != asker.fingerprint and not args.force:
        raise InputError(
            f"{args.uri}: its vectors {name!r} were made by model {told(target.origins[name].fingerprint)}, not by "
            f"{told(asker.fingerprint)}, so scores would mean nothing. Name the model that made them, or pass --force."
        )
    asked = asker.ask(queries, [name])[name]
    if isinstance(asker.model, bm25.Bm25):
        return target.search({name: asked} if name else asked, args.k, **plan)
    return Searcher(asker.model, target, asker.fingerprint).search(queries, asked, args.k, name, **plan)


@dataclass(frozen=True, eq=False)
class Asker:
    """What makes vectors of queries: a model, or the words that BM25 has counted."""

    source: str
    model: Any
    fingerprint: str

    @classmethod
    def open(cls, source: str, args: SearchArguments) -> Asker:
        """Open a model as ``--model`` names it."""
        if Path(source, bm25.FILE).is_file():
            words = bm25.Bm25.load(Path(source))
            return cls(source, words, words.fingerprint)
        if source == "bm25":
            raise InputError(
                "--model bm25: its queries are read by the words of the documents. Name the folder of the corpus that "
                "`polyrep encode bm25` wrote."
            )
        folder = fetch(source, revision=args.revision, trust_remote_code=args.trust_remote_code)
        model = load(folder, trust_remote_code=args.trust_remote_code, dtype=fastest_dtype(args.model_dtype))
        return cls(source, model, fingerprint(folder))

    def weights(self, origins: Mapping[str, Origin], uri: str) -> dict[str, float]:
        """What the model says of its views, where the index has more than one of them; else nothing."""
        return weights_of_views(self.model, [name for name, origin in origins.items() if self.made(origin)], uri)

    def made(self, origin: Origin) -> bool:
        """Whether it is what made vectors."""
        return self.fingerprint == origin.fingerprint

    def ask(self, queries: Sequence[str], names: Sequence[str]) -> dict[str, Queries]:
        """Vectors of queries by name: of a model with views those that are named, and for other names its own."""
        if isinstance(self.model, bm25.Bm25):
            return dict.fromkeys(names, self.model.of_queries(queries))
        views = [name for name in names if name in views_of(self.model)]
        found: dict[str, Queries] = {**encode_views(self.model, queries, views, task="query")} if views else {}
        if found.keys() == {*names}:
            return found
        texts = {str(number): query for number, query in enumerate(queries)}
        options: dict[str, Any] = {"dtype": "float32", "kind": kind_of(self.model), "show_progress": False}
        return dict.fromkeys(names, embed(self.model, texts, task="query", name="queries", **options)) | found


def _asker_of(origin: Origin, models: Sequence[Asker], args: SearchArguments) -> Asker:
    """The model that made some vectors; with ``--force`` the only one."""
    for asker in models:
        if asker.made(origin) or (args.force and len(models) == 1):
            return asker
    raise InputError(
        f"{args.uri}: its vectors {origin.name!r} were made by model {told(origin.fingerprint)}, which is none of "
        f"--model {args.model}, so scores would mean nothing. Name it there, too, separated by a comma."
    )


def _sources(models: str) -> list[str]:
    """What ``--model`` names; a folder may have commas in its name."""
    return [models] if Path(models).exists() else models.split(",")


def weights_of(said: str) -> dict[str, float]:
    """What ``--weights`` says, e.g. ``lexicon=1,dense=0.3``, in its order.

    Raises:
        InputError: It is of another form, or names vectors twice.
    """
    found: dict[str, float] = {}
    for part in said.split(","):
        name, _, number = part.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = None
        if not name or value is None or name in found:
            raise InputError(
                f"--weights {said}: {part!r} is no name and number, or names vectors again. Write lexicon=1,dense=0.3."
            )
        found[name] = value
    return found


def _shown(corpus: EncodedCorpus) -> Iterator[Shard]:
    with tqdm(total=len(corpus), desc=corpus.folder.name, unit="document") as progress:
        for shard, record in zip(corpus, corpus.records, strict=True):
            yield shard
            progress.update(record["documents"])  # not of the shard, which is read only if it is not known yet


def refuse_no_uri(uri: str) -> None:
    """InputError if no index is named, or one that is gone when the command ends."""
    if not uri:
        raise InputError("--uri: missing. Say which index, e.g. --uri qdrant:///path/of/a/new/folder.")
    if uri.startswith("memory:"):
        raise InputError(f"--uri {uri}: is gone when the command ends. Name an index on disk or on a server.")
