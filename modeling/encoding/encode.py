"""Encode a corpus of any size into shards, from which indexes are built: ``polyrep encode MODEL --input ...``.

The input is a stream, cut into shards at fixed places. Process ``r`` of ``n`` takes the shards ``r, r + n, ...``,
passes over those that are there already, and never waits for another process; the one that finds all shards done says
so in ``complete.json``. So memory does not grow with the corpus, whatever is killed loses its open shard at most, and
the same command goes on, with more processes or fewer.

Of a model with several views each is a corpus of its own, and ``bm25`` in place of a model reads the input twice: once
to count its words, once to write them as sparse vectors.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import PreTrainedModel

from ..data.stream import Document, Fields, Source, Span, open_source, picture
from ..errors import InputError, refuse_no_text
from ..files import read_json, refuse_unwritable, remove_leftovers, staged_file, write_json
from ..flags import parse
from ..hub.fingerprint import fingerprint
from ..hub.folder import Encoder, fastest_dtype, fetch, load
from ..report import provenance
from . import bm25
from .arrays import plain_name
from .cache import CHUNK
from .embeddings import Embeddings, by_document, joined, rows
from .encoders import encode_chunk, kind_of, refuse_broken_prompts, refuse_not_finite_vectors
from .nested import groups_of, refuse_other_lengths
from .shards import PRECISIONS, Origin, manifest_of, read_record, shard_path, write_shard
from .views import encode_views, refuse_unknown_views, views_of
from .windows import Windows, refuse_stride

SHARD_SIZES = {False: 4096, True: 512}
"""Records of a shard, by whether they are images."""

NAMES = {"sentence": "dense", "tokens": "multi", "sparse": "sparse"}
"""What vectors of a kind are called in an index, unless they are given a name."""

NOT_COMPARED = ("model", "command", "created", "commit", "hardware", "versions")
"""What of a manifest may differ when work goes on."""


@dataclass
class EncodeArguments:
    """What to encode, and into what."""

    _argument_group_name = "encode"

    input: str = field(
        default="",
        metadata={"help": "A .jsonl(.gz) or .parquet file, a folder of such files or of images, or a Hub data set."},
    )
    output: str = field(default="", metadata={"help": "Folder for the shards; one that is begun goes on."})
    task: str = field(default="document", metadata={"help": "Encode as document or as query."})
    views: str = field(
        default="",
        metadata={
            "help": "Comma-separated, of a model that gives several: a corpus of each in a folder below --output."
        },
    )
    language: str | None = field(
        default=None, metadata={"help": "Of bm25's stems and stop words, as for evaluate; default: en."}
    )
    name: str = field(
        default="", metadata={"help": "What an index calls these vectors; default: dense, multi, sparse or bm25."}
    )
    precision: str = field(default="float16", metadata={"help": f"Of the numbers: {', '.join(PRECISIONS)}."})
    batch_size: int = field(default=32, metadata={"help": "Texts or images per forward pass."})
    window: int | None = field(
        default=None,
        metadata={"help": "Cut documents into windows of so many tokens; default: what is not read is dropped."},
    )
    stride: int | None = field(
        default=None, metadata={"help": "Tokens from one window to the next; default: --window, no overlap."}
    )
    shard_size: int = field(default=0, metadata={"help": "Records per shard; default: 4096 texts or 512 images."})
    id_field: str = field(default="", metadata={"help": "Default: _id, id, docid or doc_id; row_number counts."})
    text_field: str = field(default="text", metadata={"help": "Field of the text."})
    title_field: str = field(default="title", metadata={"help": "Field of what is put before it, if there."})
    image_field: str = field(default="", metadata={"help": "Encode the images in this field instead of texts."})
    split: str = field(default="train", metadata={"help": "Of a Hub data set."})
    config: str = field(default="", metadata={"help": "Configuration of a Hub data set."})
    input_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of a Hub data set."})
    revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of a Hub model."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that the model carries."})
    model_dtype: str = field(
        default="float32",
        metadata={"help": "Weights in memory: float32, bfloat16, float16, or auto for the fastest safe."},
    )
    strict: bool = field(default=False, metadata={"help": "Fail in the end if a record could not be used."})


def encode(argv: list[str], *, prog: str = "polyrep encode") -> dict[str, Any]:
    """Encode what ``argv`` names; several processes, started by ``accelerate launch``, share the work.

    Args:
        argv: The model and flags.
        prog: How it was called.

    Returns:
        ``shards``, ``done`` (how many are there now), ``documents`` and ``errors`` in them; with ``--views`` these of
        each view by name.

    Raises:
        InputError: A model, an input or a flag cannot be used; the folder holds something else; or, with ``--strict``,
            a record could not be used.
    """
    about = "Encode a corpus into shards, from which `polyrep index` builds an index. Run it again to go on."
    wanted = "Folder, Hub id, or minilm; or bm25, and for its queries the folder of the documents it encoded."
    args, name = parse(EncodeArguments, argv, prog, about, "MODEL", wanted)
    _refuse_unusable(args)
    state = _process()
    fields = Fields(args.id_field, args.text_field, args.title_field, args.image_field)
    where = {"split": args.split, "config": args.config, "revision": args.input_revision}
    source = open_source(args.input, fields, **where)
    size = args.shard_size or SHARD_SIZES[source.images]
    opened = (_open_bm25 if _is_bm25(name) else _open_model)(args, name, source, size, str(state.device))
    corpora = []
    for origin in opened.origins:
        manifest = manifest_of(
            origin,
            **opened.said,
            input={"fields": fields._asdict(), "images": source.images, **source.identity},
            task=args.task,
            shard_size=size,
            **provenance(shlex.join([*prog.split(), *argv])),
        )
        output = Path(args.output, origin.name) if args.views else Path(args.output)
        _refuse_another(output, manifest)
        corpora.append(_Corpus(origin, output, manifest))
    work = _Work(opened, corpora, args.batch_size)
    with _progress(Path(args.output), source, state) as progress:
        shards = work.through(_own(source.spans(size), state), progress)
    if not shards:
        raise InputError(f"{args.input}: holds no record, so there is nothing to encode.")
    for corpus in corpora:  # each time, since a run before may have been killed, or the file lost
        opened.keep(corpus.output)
    summaries = {corpus.origin.name: _finish(corpus.output, shards) for corpus in corpora}
    for corpus, summary in zip(corpora, summaries.values(), strict=True):
        if state.is_main_process or summary["complete"]:
            print(_said(summary, corpus.output), flush=True)
    state.destroy_process_group()
    # Not before all is done: a process that fails has its launcher end the others.
    summary = next(iter(summaries.values()))
    if args.strict and summary["complete"] and summary["errors"]:
        raise InputError(
            f"{args.input}: {summary['errors']} records could not be used (errors.jsonl in {corpora[0].output} says "
            "which and why); all others are encoded. Mend them, or leave out --strict."
        )
    return summaries if args.views else summary


class _Corpus(NamedTuple):
    """What is written to, and what it says of itself."""

    origin: Origin
    output: Path
    manifest: dict[str, Any]


@dataclass(frozen=True)
class _Opened:
    """What encodes.

    Attributes:
        encode: Gives of some contents the vectors of each origin.
        origins: What the vectors are; several of a model with views.
        said: What a manifest says of the model.
        windows: How documents are cut.
        keep: Writes what else the folder of a corpus has.
    """

    encode: Callable[[list[Any]], list[Embeddings]]
    origins: list[Origin]
    said: dict[str, Any]
    windows: Windows | None = None
    keep: Callable[[Path], None] = lambda folder: None


def _open_model(args: EncodeArguments, name: str, source: Source, size: int, device: str) -> _Opened:
    if args.language:
        raise InputError(f"--language {args.language}: of bm25 alone, and {name} is a model. Leave it out.")
    folder = fetch(name, revision=args.revision, trust_remote_code=args.trust_remote_code)
    dtype = fastest_dtype(args.model_dtype)
    model = load(folder, trust_remote_code=args.trust_remote_code, dtype=dtype, device=device)
    _refuse_unfit(model, source, args, name)
    windows = Windows.of(model, args.window, args.stride, name)
    said = {
        "model": {"name": name, "revision": args.revision, "family": type(model).__name__},
        "model_dtype": args.model_dtype,
        "prompt": (model.prompts or {}).get(args.task) or "",
        "max_length": str(model.max_seq_length),
    }
    if not args.views:
        origin = _origin(args, model, folder, windows)

        def encoded(content: list[Any]) -> list[Embeddings]:
            return [encode_chunk(model, content, args.task, origin.kind, args.batch_size).embeddings(origin.kind)]

        return _Opened(encoded, [origin], said, windows)
    views, names, print_ = views_of(model), args.views.split(","), fingerprint(folder)
    refuse_unknown_views(views, names, name)
    cut = (windows.tokens, windows.stride) if windows else ()

    def origin_of(name: str) -> Origin:
        view = views[name]
        _refuse_narrow(view.kind, args.precision)
        first = Origin(name, view.kind, view.dim, view.similarity, print_, args.precision, *cut)
        return replace(first, vocabulary=view.vocabulary, sentence_dim=view.sentence_dim)

    def viewed(content: list[Any]) -> list[Embeddings]:
        found = encode_views(model, content, names, task=args.task, batch_size=args.batch_size)
        return [found[n] for n in names]

    return _Opened(viewed, [origin_of(name) for name in names], said, windows)


def _is_bm25(name: str) -> bool:
    return name == "bm25" or Path(name, bm25.FILE).is_file()


def _open_bm25(args: EncodeArguments, name: str, source: Source, size: int, device: str) -> _Opened:
    if args.views or args.window:
        flag = "--views" if args.views else "--window"
        raise InputError(f"{flag}: BM25 has one kind of vectors, of whole texts. Leave it out.")
    if source.images:
        raise InputError("bm25: finds no words in images. Encode texts, or name a model.")
    _refuse_narrow("sparse", args.precision)
    if (name == "bm25") != (args.task == "document"):
        raise InputError(
            f"--task {args.task}: BM25 knows words by the documents that have them. Encode these with bm25, and then "
            "queries with --task query and the folder of the documents in place of bm25."
        )
    if args.language and name != "bm25":
        raise InputError(
            f"--language {args.language}: queries are read as {name} says of its documents. Leave it out."
        )
    if name == "bm25":

        def texts() -> Iterator[str]:
            return (str(document.content) for span in source.spans(size) for document in span.read()[0])

        read = bm25.analyzer(args.language or "en", bm25.spread(texts()) if args.language == "auto" else ())
        made = bm25.Bm25.of(read, texts())
    else:
        made = bm25.Bm25.load(Path(name))
    vectors: Callable[[Iterable[str]], Embeddings] = made.of_documents if name == "bm25" else made.of_queries
    said = {"model": {"name": name, "revision": None, "family": "BM25"}, "language": made.analyzer.language}
    origin = Origin(args.name or "bm25", "sparse", made.dim, "dot", made.fingerprint, args.precision)
    keep = made.save if name == "bm25" else lambda folder: None
    return _Opened(lambda content: [vectors(content)], [origin], said, keep=keep)


def _process() -> PartialState:
    """This process among those that were launched; on CPUs it takes its share of the cores."""
    state = PartialState(cpu=not torch.accelerator.is_available())  # else several processes would not know each other
    launched = state.num_processes > 1 or "ACCELERATE_USE_CPU" in os.environ  # which gives each process one thread
    if state.device.type == "cpu" and launched:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        here = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
        torch.set_num_threads(max(torch.get_num_threads(), cores // here))
    return state


def _origin(args: EncodeArguments, model: Encoder, folder: Path, windows: Windows | None) -> Origin:
    kind = kind_of(model)
    # Of a document in windows the first vectors are those of its first window, which is no prefix of the whole.
    nested = groups_of(model) if kind == "tokens" and not windows else ()
    return Origin(
        args.name or NAMES[kind],
        kind,
        int(model.get_embedding_dimension() or 0),
        str(model.similarity_fn_name or "cosine"),
        fingerprint(folder),
        args.precision,
        windows.tokens if windows else 0,
        windows.stride if windows else 0,
        nested,
    )


def _progress(output: Path, source: Source, state: PartialState) -> Any:
    number = f" {state.process_index + 1}/{state.num_processes}" if state.num_processes > 1 else ""
    return tqdm(
        total=source.total and -(-source.total // state.num_processes),
        desc=output.name + number,
        unit="document",
        disable=not state.is_local_main_process,
    )


class _Work:
    """The shards of one process. The last shard is being written while the next is encoded."""

    def __init__(self, opened: _Opened, corpora: Sequence[_Corpus], batch_size: int):
        self.opened, self.corpora, self.batch_size = opened, corpora, batch_size

    def through(self, spans: Iterator[tuple[Span, bool]], progress: Any) -> int:
        """Encode what is this process's and not there yet; returns the number of spans."""
        shards, writing = 0, None
        with ThreadPoolExecutor(1) as writer:
            for span, own in spans:
                shards += 1
                if own and not all([self._is_done(span, corpus.output) for corpus in self.corpora]):
                    made = self._encoded(span, progress)
                    _settled(writing)
                    if writing is None:  # not before a shard is there to be written, lest a refusal leave anything
                        for corpus in self.corpora:
                            _begin(corpus.output, corpus.manifest)
                    writing = writer.submit(made)
                elif own:
                    progress.update(span.records)
            _settled(writing)
        return shards

    def _is_done(self, span: Span, output: Path) -> bool:
        path = shard_path(output, span.number)
        record = _record(output, span.number)
        if not record or not path.is_file() or path.stat().st_size != record["bytes"]:
            return False
        if record["input_sha256"] != span.digest():
            raise InputError(
                f"{path}: the input has changed in its records {span.number} x shard size and following since this "
                "shard was written, so old and new vectors would mix. Encode into another --output."
            )
        return True

    def _encoded(self, span: Span, progress: Any) -> Callable[[], Any]:
        """What writes a span's shard."""
        documents, errors = span.read()
        progress.update(len(errors))
        ids, vectors, undecodable = self.vectors(documents, progress)
        errors += undecodable
        if not ids and span.number == 0:
            raise InputError(
                f"none of the first {span.records} records can be used; the first, {errors[0]['place']}: "
                f"{errors[0]['error']}."
            )
        record = {"records": span.records, "input_sha256": span.digest(), "errors": errors}

        def write() -> None:
            for (origin, output, _), found in zip(self.corpora, vectors, strict=True):
                write_shard(output, span.number, ids, found, origin.precision, **record)

        return write

    def vectors(
        self, documents: Sequence[Document], progress: Any
    ) -> tuple[list[str], list[Embeddings], list[dict[str, str]]]:
        """Encode the longest texts first, side by side with others of their length; the order is then restored."""
        origins, windows = [corpus.origin for corpus in self.corpora], self.opened.windows
        document = self.corpora[0].manifest["task"] == "document"
        dtype = "float32" if origins[0].precision == "float32" else "float16"
        images = bool(documents) and not isinstance(documents[0].content, str)
        ids, bounds = [document.id for document in documents], np.arange(len(documents) + 1)
        if windows:
            cuts = [[Document(d.id, piece) for piece in windows.cut(str(d.content))] for d in documents]
            bounds = np.cumsum([0, *map(len, cuts)], dtype=np.int64)
            documents = list(itertools.chain.from_iterable(cuts))
        order = list(range(len(documents)))
        if not images:
            order.sort(key=lambda i: -len(documents[i].content))  # type: ignore[arg-type]
        step = self.batch_size if images else max(CHUNK, self.batch_size)
        kept: list[int] = []
        errors: list[dict[str, str]] = []
        parts = [[_no_vectors(origin, dtype)] for origin in origins]
        for start in range(0, len(order), step):
            numbers = order[start : start + step]
            content: list[Any] = [documents[i].content for i in numbers]
            progress.update(len(np.intersect1d(bounds[:-1], numbers)))  # documents of which this is the first window
            if images:
                content, numbers = self._pictures(documents, numbers, errors)
            if not content:
                continue
            for origin, part, found in zip(origins, parts, self.opened.encode(content), strict=True):
                if found.dim != origin.dim:
                    raise InputError(
                        f"the model says {origin.dim} dimensions and gives {found.dim}. Its config is wrong."
                    )
                with np.errstate(over="ignore"):  # refused in the next line, by the id of its document
                    values = found.values.astype(dtype)
                lengths, names = None if found.offsets is None else found.lengths, [documents[i].id for i in numbers]
                refuse_not_finite_vectors(values, lengths, names, dtype)
                if origin.nested:
                    refuse_other_lengths(found, names, origin.nested[-1][document])
                if (sentences := found.sentences) is not None:
                    with np.errstate(over="ignore"):
                        sentences = sentences.astype(dtype)
                    refuse_not_finite_vectors(sentences, None, names, dtype)
                part.append(replace(found, values=values, sentences=sentences))
            kept += numbers
        vectors = [rows(joined(part), np.argsort(kept)) for part in parts]
        if windows:
            return ids, [by_document(one, bounds) for one in vectors], errors
        return [ids[i] for i in sorted(kept)], vectors, errors

    @staticmethod
    def _pictures(
        documents: Sequence[Document], numbers: list[int], errors: list[dict[str, str]]
    ) -> tuple[list[Any], list[int]]:
        found, kept = [], []
        for number in numbers:
            try:
                found.append(picture(documents[number].content))  # type: ignore[arg-type]
                kept.append(number)
            except ValueError as error:
                errors.append({"place": documents[number].id, "error": str(error)})
        return found, kept


def _no_vectors(origin: Origin, dtype: str) -> Embeddings:
    """Vectors of no document, for a shard of which nothing could be used."""
    kind, dim = origin.kind, origin.dim
    offsets = None if kind == "sentence" else np.zeros(1, np.int64)
    indices = np.empty(0, np.int32) if kind in ("sparse", "routed") else None
    sentences = np.empty((0, origin.sentence_dim), dtype) if origin.sentence_dim else None
    values = np.empty(0 if kind == "sparse" else (0, dim), dtype)
    return Embeddings(kind, values, offsets, indices, dim, 0.0, Path(), sentences=sentences)


def _own(spans: Iterator[Span], state: PartialState) -> Iterator[tuple[Span, bool]]:
    return ((span, span.number % state.num_processes == state.process_index) for span in spans)


def _settled(writing: Future | None) -> None:
    if writing is not None:
        writing.result()  # raises what went wrong there, e.g. a full disk


def _begin(output: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, unless another process or an earlier run has."""
    (output / "shards").mkdir(parents=True, exist_ok=True)
    remove_leftovers(output / "shards")
    if not _refuse_another(output, manifest):
        write_json(output / "manifest.json", manifest)


def _refuse_another(output: Path, manifest: dict[str, Any]) -> bool:
    """Whether the folder has shards of this manifest; InputError if they are of another. One without binds nobody."""
    known = read_json(output / "manifest.json", remedy="Choose another --output, or delete the folder to begin anew.")
    if not known or not any((output / "shards").glob("*.json")):
        return False
    differing = [
        name
        for name in dict.fromkeys([*known, *manifest])
        if name not in NOT_COMPARED and known.get(name) != manifest.get(name)
    ]
    if differing:
        raise InputError(
            f"{output}: was begun with another {', '.join(differing)} (manifest.json says which), so going on would "
            "mix two corpora. Choose another --output, or delete the folder to begin anew."
        )
    return True


def _record(output: Path, number: int) -> dict[str, Any]:
    """What is known of a shard, ``{}`` if it is not there yet."""
    path = shard_path(output, number).with_suffix(".json")
    return read_record(path, input_sha256=str, errors=list) if path.exists() else {}


def _finish(output: Path, shards: int) -> dict[str, Any]:
    """Declare the corpus complete if it is, whoever wrote the last shard."""
    summary = dict.fromkeys(("done", "documents", "bytes", "errors"), 0)
    # Names of files may be any bytes.
    options: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"}
    with staged_file(output / "errors.jsonl") as partial, partial.open("w", **options) as errors:
        for number in range(shards):
            if record := _record(output, number):
                summary["done"] += 1
                summary["documents"] += record["documents"]
                summary["bytes"] += record["bytes"]
                summary["errors"] += len(record["errors"])
                errors.writelines(json.dumps(error, ensure_ascii=False) + "\n" for error in record["errors"])
    summary |= {"shards": shards, "complete": summary["done"] == shards}
    if summary["complete"]:
        write_json(output / "complete.json", summary)
    return summary


def _said(summary: dict[str, Any], output: Path) -> str:
    said = (
        f"{output}: {summary['documents']:,} documents in {summary['done']:,} shards, {summary['bytes'] / 1e6:,.1f} MB"
    )
    if summary["errors"]:
        said += f"; {summary['errors']:,} records could not be used, see errors.jsonl"
    if not summary["complete"]:
        said += f"; {summary['shards'] - summary['done']:,} shards are left to other processes"
    return said


def _refuse_unusable(args: EncodeArguments) -> None:
    refuse_stride(args.window, args.stride)
    if args.window and args.task == "query":
        raise InputError(f"--window {args.window}: queries are read whole or not at all; documents alone are cut.")
    for flag in ("input", "output"):
        if not getattr(args, flag):
            raise InputError(f"--{flag}: missing. Say what to encode with --input, and where to with --output.")
    refuse_no_text(args.name, "--name")
    if args.views and args.name:
        raise InputError(f"--name {args.name}: views have names of their own ({args.views}). Leave it out.")
    names = args.views.split(",")
    if args.views and (not all(plain_name(name) for name in names) or len({*names}) < len(names)):
        raise InputError(f"--views {args.views}: expected names of views, each once, e.g. dense,lexicon.")
    if Path(args.input).is_dir() and Path(args.output).resolve().is_relative_to(Path(args.input).resolve()):
        raise InputError(f"--output {args.output}: lies in the input, which it would become part of. Name another.")
    refuse_unwritable(Path(args.output), "--output")
    if args.precision not in PRECISIONS:
        raise InputError(f"--precision {args.precision}: use one of {', '.join(PRECISIONS)}.")
    if args.task not in ("document", "query"):
        raise InputError(f"--task {args.task}: use document or query.")


def _refuse_unfit(model: Any, source: Source, args: EncodeArguments, name: str) -> None:
    if isinstance(model, PreTrainedModel):
        raise InputError(
            f"{name}: is a head alone, which reads vectors and not documents. Name the folder of the whole model."
        )
    wanted = "image" if source.images else "text"
    if wanted not in model[0].modalities:
        raise InputError(
            f"{name}: takes {' and '.join(model[0].modalities)}, but the input is {wanted}s. Use a model for them."
        )
    if args.window and source.images:
        raise InputError(f"--window {args.window}: images have no tokens to be cut at. Leave it out.")
    refuse_broken_prompts(model)
    if not args.views:
        _refuse_narrow(kind_of(model), args.precision)


def _refuse_narrow(kind: str, precision: str) -> None:
    if kind == "sparse" and precision in ("int8", "binary"):
        raise InputError(
            f"--precision {precision}: sparse vectors are weights of words, kept in float16 or float32 alone."
        )
    if kind == "routed" and precision == "binary":
        raise InputError(
            "--precision binary: routed entries have their weight in their length, which signs lack, so every token "
            "would count alike. Use int8, 40 bytes of an entry of 32 numbers with its key and scale."
        )
