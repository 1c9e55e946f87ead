"""``polyrep index`` puts encoded corpora into an index, ``polyrep search`` asks it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from ..encoding.cache import embed
from ..encoding.encoders import kind_of
from ..encoding.shards import EncodedCorpus, Shard
from ..errors import InputError, refuse_no_text
from ..flags import parse
from ..hub.fingerprint import fingerprint, told
from ..hub.folder import fastest_dtype, fetch, load
from .backends import open_index
from .probability import Searcher
from .protocol import Hit


@dataclass
class IndexArguments:
    """Where to put documents."""

    _argument_group_name = "index"

    uri: str = field(
        default="",
        metadata={"help": "faiss:///PATH, seismic:///PATH, qdrant:///PATH, qdrant+https://HOST/COLLECTION."},
    )
    force: bool = field(default=False, metadata={"help": "Add to an index that another model's vectors are in."})


@dataclass
class SearchArguments:
    """Where to search, and with what."""

    _argument_group_name = "search"

    uri: str = field(default="", metadata={"help": "The index."})
    model: str = field(default="minilm", metadata={"help": "Folder or Hub id of the model that encoded it."})
    name: str = field(default="", metadata={"help": "Which vectors, where the index has several kinds."})
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
    _refuse_no_uri(args.uri)
    corpora = [EncodedCorpus(folder) for folder in folders]  # all of them are looked at before anything is written
    for corpus in corpora:
        if corpus.manifest["task"] != "document":
            raise InputError(f"{corpus.folder}: holds queries, which are to be searched with. Encode the documents.")
    target = open_index(args.uri, force=args.force)
    said = {"documents": 0, "replaced": 0, "shards_known": 0}
    started = time.perf_counter()
    for corpus in corpora:
        added = target.add(_shown(corpus))
        said = {name: said[name] + getattr(added, name) for name in said}
    said["count"] = target.count()
    seconds = time.perf_counter() - started
    print(
        f"{args.uri}: {said['documents']:,} documents written in {seconds:,.1f} s, {said['replaced']:,} of them in "
        f"place of one with the same id; {said['shards_known']:,} shards were there already; now it has "
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
    _refuse_no_uri(args.uri)
    for query in queries:
        refuse_no_text(query, f"query {query!r}")
    folder = fetch(args.model, revision=args.revision, trust_remote_code=args.trust_remote_code)
    name, print_ = args.name, fingerprint(folder)
    target = open_index(args.uri, fingerprint=print_, force=args.force)
    if not name:  # the vectors of this model, where the index has those of several
        name = next((n for n, origin in target.origins.items() if origin.fingerprint == print_), "")
    elif name in target.origins and target.origins[name].fingerprint != print_ and not args.force:
        raise InputError(
            f"{args.uri}: its vectors {name!r} were made by model {told(target.origins[name].fingerprint)}, not by "
            f"{told(print_)}, so scores would mean nothing. Name the model that made them, or pass --force."
        )
    model = load(folder, trust_remote_code=args.trust_remote_code, dtype=fastest_dtype(args.model_dtype))
    searcher = Searcher(model, target, print_)
    texts = {str(number): query for number, query in enumerate(queries)}
    options: dict[str, Any] = {"task": "query", "dtype": "float32", "kind": kind_of(model), "show_progress": False}
    asked = embed(model, texts, name="queries", **options)
    found = searcher.search(queries, asked, args.k, name)
    for query, hits in zip(queries, found, strict=True):
        print(query)
        for hit in hits:
            sure = "" if hit.probability is None else f"p={hit.probability:.3f}  "
            where = "" if hit.window is None else f"  window {hit.window}"
            print(f"  {hit.score:10.4f}  {sure}{hit.id}{where}")
    return found


def _shown(corpus: EncodedCorpus) -> Iterator[Shard]:
    with tqdm(total=len(corpus), desc=corpus.folder.name, unit="document") as progress:
        for shard, record in zip(corpus, corpus.records, strict=True):
            yield shard
            progress.update(record["documents"])  # not of the shard, which is read only if it is not known yet


def _refuse_no_uri(uri: str) -> None:
    if not uri:
        raise InputError("--uri: missing. Say which index, e.g. --uri qdrant:///path/of/a/new/folder.")
    if uri.startswith("memory:"):
        raise InputError(f"--uri {uri}: is gone when the command ends. Name an index on disk or on a server.")
