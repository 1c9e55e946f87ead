"""Encode a corpus of any size into shards, from which indexes are built: ``polyrep encode MODEL --input ...``.

The input is a stream, cut into shards at fixed places. Process ``r`` of ``n`` takes the shards ``r, r + n, ...``,
passes over those that are there already, and never waits for another process; the one that finds all shards done says
so in ``complete.json``. So memory does not grow with the corpus, whatever is killed loses its open shard at most, and
the same command goes on, with more processes or fewer.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

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
from .cache import CHUNK
from .embeddings import Embeddings, Kind, by_document, joined, rows
from .encoders import encode_chunk, kind_of, refuse_broken_prompts, refuse_not_finite_vectors
from .shards import PRECISIONS, Origin, manifest_of, read_record, shard_path, write_shard
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
    name: str = field(
        default="", metadata={"help": "What an index calls these vectors; default: dense, multi or sparse."}
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
        ``shards``, ``done`` (how many are there now), ``documents`` and ``errors`` in them.

    Raises:
        InputError: A model, an input or a flag cannot be used; the folder holds something else; or, with ``--strict``,
            a record could not be used.
    """
    about = "Encode a corpus into shards, from which `polyrep index` builds an index. Run it again to go on."
    args, name = parse(EncodeArguments, argv, prog, about, "MODEL", "Folder, Hub id, or minilm.")
    _refuse_unusable(args)
    state = _process()
    fields = Fields(args.id_field, args.text_field, args.title_field, args.image_field)
    where = {"split": args.split, "config": args.config, "revision": args.input_revision}
    source = open_source(args.input, fields, **where)
    folder = fetch(name, revision=args.revision, trust_remote_code=args.trust_remote_code)
    dtype, device = fastest_dtype(args.model_dtype), str(state.device)
    model = load(folder, trust_remote_code=args.trust_remote_code, dtype=dtype, device=device)
    _refuse_unfit(model, source, args, name)
    windows = Windows.of(model, args.window, args.stride, name)
    origin, output = _origin(args, model, folder, windows), Path(args.output)
    size = args.shard_size or SHARD_SIZES[source.images]
    manifest = manifest_of(
        origin,
        model={"name": name, "revision": args.revision, "family": type(model).__name__},
        model_dtype=args.model_dtype,
        input={"fields": fields._asdict(), "images": source.images, **source.identity},
        task=args.task,
        prompt=(model.prompts or {}).get(args.task) or "",
        max_length=str(model.max_seq_length),
        shard_size=size,
        **provenance(shlex.join([*prog.split(), *argv])),
    )
    _refuse_another(output, manifest)
    work = _Work(model, origin, args.task, args.batch_size, output, manifest, windows)
    with _progress(output, source, state) as progress:
        shards = work.through(_own(source.spans(size), state), progress)
    if not shards:
        raise InputError(f"{args.input}: holds no record, so there is nothing to encode.")
    summary = _finish(output, shards)
    if state.is_main_process or summary["complete"]:
        print(_said(summary, output), flush=True)
    state.destroy_process_group()
    # Not before all is done: a process that fails has its launcher end the others.
    if args.strict and summary["complete"] and summary["errors"]:
        raise InputError(
            f"{args.input}: {summary['errors']} records could not be used (errors.jsonl in {output} says which and "
            "why); all others are encoded. Mend them, or leave out --strict."
        )
    return summary


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
    return Origin(
        args.name or NAMES[kind],
        kind,
        int(model.get_embedding_dimension() or 0),
        str(model.similarity_fn_name or "cosine"),
        fingerprint(folder),
        args.precision,
        *((windows.tokens, windows.stride) if windows else ()),
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

    def __init__(
        self,
        model: Encoder,
        origin: Origin,
        task: str,
        batch_size: int,
        output: Path,
        manifest: dict[str, Any],
        windows: Windows | None,
    ):
        self.model, self.origin, self.task, self.batch_size, self.output = model, origin, task, batch_size, output
        self.manifest, self.windows = manifest, windows

    def through(self, spans: Iterator[tuple[Span, bool]], progress: Any) -> int:
        """Encode what is this process's and not there yet; returns the number of spans."""
        shards, writing = 0, None
        with ThreadPoolExecutor(1) as writer:
            for span, own in spans:
                shards += 1
                if own and not self._is_done(span):
                    made = self._encoded(span, progress)
                    _settled(writing)
                    if writing is None:  # not before a shard is there to be written, lest a refusal leave anything
                        _begin(self.output, self.manifest)
                    writing = writer.submit(made)
                elif own:
                    progress.update(span.records)
            _settled(writing)
        return shards

    def _is_done(self, span: Span) -> bool:
        path = shard_path(self.output, span.number)
        record = _record(self.output, span.number)
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
        return partial(write_shard, self.output, span.number, ids, vectors, self.origin.precision, **record)

    def vectors(
        self, documents: Sequence[Document], progress: Any
    ) -> tuple[list[str], Embeddings, list[dict[str, str]]]:
        """Encode the longest texts first, side by side with others of their length; the order is then restored."""
        origin, kind = self.origin, self.origin.kind
        dtype = "float32" if origin.precision == "float32" else "float16"
        images = bool(documents) and not isinstance(documents[0].content, str)
        ids, bounds = [document.id for document in documents], np.arange(len(documents) + 1)
        if self.windows:
            cuts = [[Document(d.id, piece) for piece in self.windows.cut(str(d.content))] for d in documents]
            bounds = np.cumsum([0, *map(len, cuts)], dtype=np.int64)
            documents = list(itertools.chain.from_iterable(cuts))
        order = list(range(len(documents)))
        if not images:
            order.sort(key=lambda i: -len(documents[i].content))  # type: ignore[arg-type]
        step = self.batch_size if images else max(CHUNK, self.batch_size)
        kept: list[int] = []
        errors: list[dict[str, str]] = []
        parts = [_no_vectors(kind, origin.dim, dtype)]
        for start in range(0, len(order), step):
            numbers = order[start : start + step]
            content: list[Any] = [documents[i].content for i in numbers]
            progress.update(len(np.intersect1d(bounds[:-1], numbers)))  # documents of which this is the first window
            if images:
                content, numbers = self._pictures(documents, numbers, errors)
            if not content:
                continue
            values, lengths, indices, dim = encode_chunk(self.model, content, self.task, kind, self.batch_size)
            if dim != origin.dim:
                raise InputError(f"the model says {origin.dim} dimensions and gives {dim}. Its config is wrong.")
            with np.errstate(over="ignore"):  # refused in the next line, by the id of its document
                values = values.astype(dtype)
            refuse_not_finite_vectors(values, lengths, [documents[i].id for i in numbers], dtype)
            offsets = None if lengths is None else np.cumsum([0, *lengths], dtype=np.int64)
            terms = None if indices is None else indices.astype(np.int32)
            parts.append(Embeddings(kind, values, offsets, terms, dim, 0.0, Path()))
            kept += numbers
        vectors = rows(joined(parts), np.argsort(kept))
        if self.windows:
            return ids, by_document(vectors, bounds), errors
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


def _no_vectors(kind: Kind, dim: int, dtype: str) -> Embeddings:
    """Vectors of no document, for a shard of which nothing could be used."""
    offsets = None if kind == "sentence" else np.zeros(1, np.int64)
    indices = np.empty(0, np.int32) if kind == "sparse" else None
    return Embeddings(kind, np.empty(0 if kind == "sparse" else (0, dim), dtype), offsets, indices, dim, 0.0, Path())


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
    if Path(args.input).is_dir() and Path(args.output).resolve().is_relative_to(Path(args.input).resolve()):
        raise InputError(f"--output {args.output}: lies in the input, which it would become part of. Name another.")
    refuse_unwritable(Path(args.output), "--output")
    if args.precision not in PRECISIONS:
        raise InputError(f"--precision {args.precision}: use one of {', '.join(PRECISIONS)}.")
    if args.task not in ("document", "query"):
        raise InputError(f"--task {args.task}: use document or query.")


def _refuse_unfit(model: Any, source: Source, args: EncodeArguments, name: str) -> None:
    precision = args.precision
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
    if kind_of(model) == "sparse" and precision in ("int8", "binary"):
        raise InputError(
            f"--precision {precision}: sparse vectors are weights of words, kept in float16 or float32 alone."
        )
