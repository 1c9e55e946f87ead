"""``polyrep export-onnx``: a model folder as ONNX graphs, for engines and services that run no Python.

What leaves here is only what was compared: each graph runs in onnxruntime on inputs of several sizes, padded ones
among them, and appears under its name once it gives torch's numbers. Queries and documents are encoded differently,
so they are two graphs wherever the two differ. Next to them ``export.json`` says what they read, what they give, which
weights they are of and how far from torch they were.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from ..errors import InputError, first_line
from ..files import read_json, refuse_unwritable, staged_folder, write_json
from ..flags import parse
from ..hub.fingerprint import fingerprint
from ..hub.folder import PREFIX, check_folder
from ..registry import ROOMS, room_of
from .compare import compare
from .signatures import TRACED, Signature, arguments_of, signatures_of

ONE_FILE_BYTES = 1_500_000_000
"""Weights above which a graph refers to a second file, since one file of ONNX holds two gigabytes."""

MANIFEST = "export.json"


@dataclass
class ExportArguments:
    """What to write where."""

    _argument_group_name = "export"

    output: str | None = field(default=None, metadata={"help": "Folder for the graphs; default: FOLDER/onnx."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an export that is there."})


def export_onnx(argv: list[str], *, prog: str = "polyrep export-onnx") -> Path:
    """Write the folder named in ``argv`` as ONNX graphs that give torch's numbers.

    Returns:
        The folder of the graphs.

    Raises:
        InputError: A package is missing, the folder holds no model of ours, a graph cannot be made of it or gives
            other numbers, or there is an export already.
    """
    about = "Write a model folder as ONNX graphs, each compared with torch in onnxruntime first."
    wanted = "Of a retriever, of a head, or of a pipeline with a head."
    args, given = parse(ExportArguments, argv, prog, about, "FOLDER", wanted)
    folder = Path(given)
    target = Path(args.output) if args.output else folder / "onnx"
    _refuse_missing_packages()
    part = _part_of_ours(folder)
    refuse_unwritable(target, "--output" if args.output else "")
    if target.exists() and any(target.iterdir()) and not args.overwrite:
        raise InputError(f"{target}: exists and would be replaced. Pass --overwrite, or another --output.")
    model = _open(part)
    signatures = signatures_of(model, part)
    before = read_json(target / MANIFEST) if target.is_dir() else {}
    with staged_folder(target, merge=True) as staged, torch.no_grad(), _quiet():
        graphs: dict[str, Any] = {}
        for signature in signatures:
            graphs |= _write(model, signature, staged, part)
        write_json(staged / MANIFEST, _manifest(folder, part, model, graphs))
        written = {file.relative_to(staged).as_posix() for file in staged.rglob("*") if file.is_file()}
    for name in before.get("graphs", {}):  # an export replaced by one of fewer graphs
        for stale in {name, f"{name}.data"} - written:
            (target / Path(stale).name).unlink(missing_ok=True)
    print(f"{type(model).__name__} of {part}:")
    for name, graph in graphs.items():
        worst = max(graph["difference"].values())
        print(f"  {target / name}: {graph['bytes'] / 1e6:.1f} MB, {graph['seconds']} s, within {worst:.1e} of torch")
    return target


def _refuse_missing_packages() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"export-onnx: {', '.join(missing)} not installed, so no graph can be written and compared. "
            'Run `pip install "polyrep[export]"`.'
        )


def _part_of_ours(folder: Path) -> Path:
    """The folder itself if it holds a model of ours, else the module folder that holds the head of a pipeline."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder. export-onnx takes a folder on this machine; download it first.")
    check_folder(folder)
    listed = read_json(folder / "modules.json", list, path=str)
    modules = [folder / module["path"] for module in listed] or [folder]
    kinds = {part: read_json(part / "config.json", model_type=str).get("model_type") or "" for part in modules}
    ours = [part for part, kind in kinds.items() if room_of(kind)]
    if not ours:
        foreign = sorted(kind for kind in kinds.values() if kind.startswith(PREFIX))
        code = foreign or read_json(folder / "config.json").get("auto_map") or any(folder.glob("modeling_*.py"))
        raise InputError(
            f"{folder}: its model ({', '.join(foreign or sorted(filter(None, kinds.values()))) or 'no type'}) is none "
            f"of polyrep's ({', '.join(ROOMS)}). "
            + (
                "Its class is in code that the folder carries, and an export runs installed code only: install the "
                "package that has the class."
                if code
                else "Stock modules need no export of ours: sentence-transformers does it, with backend='onnx'."
            )
        )
    if ours[-1].resolve() == folder.resolve() and len(modules) > 1:
        behind = ", ".join(part.name for part in modules[1:])
        raise InputError(
            f"{folder}: {behind} behind the model changes its vectors, and a graph of the model alone would give "
            "others. Save the model without what is behind it."
        )
    if ours[-1] != modules[-1]:
        raise InputError(
            f"{folder}: {modules[-1].name} stands behind {ours[-1].name}, so a graph of the head would not give the "
            "model's vectors. Put the head last."
        )
    return ours[-1]


def _open(part: Path) -> PreTrainedModel:
    """The model in float32, by its installed class; InputError if a weight is missing."""
    try:
        model, found = AutoModel.from_pretrained(
            part, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{part}: cannot be opened by the installed class ({first_line(error)}). If its encoder needs code of "
            "its own, install the package that has it; no code of a folder is run here."
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise InputError(
            f"{part}: the weights file lacks {', '.join(missing[:3])} ({len(missing)} in all), which would be random "
            "numbers. Fetch or save the model again."
        )
    return model.eval()


class _Positional(nn.Module):
    """A model's method as a module of tensors alone, which is what can be traced."""

    def __init__(self, model: PreTrainedModel, signature: Signature, task: str | None) -> None:
        super().__init__()
        self.model, self.signature = model, signature
        self.fixed = dict(signature.fixed) | ({} if task is None else {"task": task})

    def answer(self, *values: Tensor) -> Any:
        inputs = dict(zip(self.signature.axes, values, strict=True))
        return getattr(self.model, self.signature.method)(**inputs, **self.fixed)

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        output = self.answer(*values)
        return tuple(output[name] for name in self.signature.outputs)


def _write(model: PreTrainedModel, signature: Signature, staged: Path, part: Path) -> dict[str, Any]:
    """Trace, convert, save and compare one signature: file name -> its entry in the manifest."""
    example = signature.example(*TRACED, 0)
    values = tuple(example[name] for name in signature.axes)
    tasks = ("query", "document") if "task" in arguments_of(model, signature.method) else (None,)
    traced: dict[str | None, Any] = {}
    started = time.monotonic()
    dynamic = tuple(
        {i: torch.export.Dim.DYNAMIC for i, axis in enumerate(axes) if axis} for axes in signature.axes.values()
    )
    wrapped = {task: _Positional(model, signature, task).eval() for task in tasks}
    refusals: list[ValueError] = []
    for task in tasks:
        try:
            output = wrapped[task].answer(*values)
        except ValueError as error:  # of one task perhaps, as of images that are documents alone
            refusals.append(error)
            continue
        there = tuple(name for name in signature.outputs if output.get(name) is not None)
        wrapped[task].signature = replace(signature, outputs=there)  # which may differ between tasks
        try:
            traced[task] = torch.export.export(wrapped[task], values, dynamic_shapes={"values": dynamic}, strict=False)
        except Exception as error:  # torch raises many kinds
            raise _unsupported(part, model, error) from error
    if not traced:
        raise InputError(f"{part}: the model refuses its inputs: {refusals[0]}")
    if len(traced) == 2 and _same(*traced.values()):
        traced = {None: traced["query"]}
    entries: dict[str, Any] = {}
    for task, program in traced.items():
        stem = "_".join(filter(None, (None if task and signature.name == "model" else signature.name, task)))
        file = staged / f"{stem}.onnx"
        reference = wrapped[task] if task in wrapped else wrapped["query"]
        opset = _convert(program, reference.signature, file, part, model)
        seconds = round(time.monotonic() - started, 1)
        entries[file.name] = {
            "method": signature.method,
            "task": task,
            "opset": opset,
            **compare(reference, reference.signature, file, part),
            "bytes": sum(f.stat().st_size for f in staged.glob(f"{file.name}*")),
            "seconds": seconds,
        }
        started = time.monotonic()
    return entries


def _same(first: Any, second: Any) -> bool:
    """Whether two traces of one model are the same operations on the same weights and constants."""
    if str(first.graph) != str(second.graph) or str(first.graph_signature) != str(second.graph_signature):
        return False
    ours, theirs = first.constants, second.constants
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def _convert(program: Any, signature: Signature, file: Path, part: Path, model: PreTrainedModel) -> int:
    """Write a trace as ONNX, with names for what goes in and out; its opset."""
    shapes = tuple({i: axis for i, axis in enumerate(axes) if axis} for axes in signature.axes.values())
    try:
        converted = torch.onnx.export(
            program,
            dynamo=True,
            dynamic_shapes={"values": shapes},
            input_names=[signature.label(name) for name in signature.axes],
            output_names=list(signature.outputs),
            verbose=False,
        )
    except Exception as error:
        raise _unsupported(part, model, error) from error
    assert converted is not None
    _forget_sources(converted.model)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    converted.save(file, external_data=weights > ONE_FILE_BYTES)
    return converted.model.opset_imports[""]


def _forget_sources(model: Any) -> None:
    """Drop what the exporter notes of each operation: the line of code it came from, with its path on this machine."""
    model.doc_string = None
    model.metadata_props.clear()
    for graph in (model.graph, *model.functions.values()):
        graph.doc_string = None
        graph.metadata_props.clear()
        for node in graph.all_nodes():
            node.doc_string = None
            for noted in (node, *node.outputs):
                noted.metadata_props.clear()
        for value in (*graph.inputs, *getattr(graph, "initializers", {}).values()):
            value.metadata_props.clear()


def _unsupported(part: Path, model: PreTrainedModel, error: Exception) -> InputError:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return InputError(
        f"{part}: no ONNX graph can be made of {type(model).__name__} ({first_line(cause)}). It does what "
        "torch.export or ONNX cannot express; serve the folder with torch, or take another backbone."
    )


def _manifest(folder: Path, part: Path, model: PreTrainedModel, graphs: dict[str, Any]) -> dict[str, Any]:
    import onnx
    import onnxruntime
    import transformers

    settings = read_json(folder / "config_sentence_transformers.json")
    return {
        "model": type(model).__name__,
        "part": part.relative_to(folder).as_posix(),
        "fingerprint": fingerprint(folder),
        "similarity": settings.get("similarity_fn_name"),
        "prompts": {name: text for name, text in (settings.get("prompts") or {}).items() if text},
        "versions": {
            "polyrep": importlib.metadata.version("polyrep"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
        "graphs": graphs,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages and operators that no model of ours has."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
