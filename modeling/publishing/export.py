"""``polyrep export-onnx``: a model folder as ONNX graphs, for engines and services that run no Python.

What leaves here is only what was compared: each graph runs in onnxruntime on inputs of several sizes, padded ones
among them, and appears under its name once it gives torch's numbers. Queries and documents are encoded differently,
so they are two graphs wherever the two differ. Next to them ``export.json`` says what they read, what they give, which
weights they are of and how far from torch they were.

A retriever reads what its tokenizer and its image processor give. What a head reads, only its room can tell:
:class:`polyrep.Graph`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor, AutoTokenizer, PreTrainedModel

from ..errors import InputError
from ..files import read_json, staged_folder, write_json
from ..flags import parse
from ..hub.fingerprint import fingerprint
from ..hub.folder import PREFIX, check_folder
from ..registry import ROOMS, Graph, room_of

TOLERANCE = 1e-4
"""Largest difference from torch, absolute for numbers up to one and relative beyond."""

TRACED = (3, 12)
"""Texts, and tokens of the longest, that a graph is made with; neither 1 nor equal, which would be taken for fixed."""

CHECKED = ((1, 3), (2, 7), (3, 12), (5, 33), (2, 200))
"""Sizes that it is compared at: one text without padding, and batches of which all but the longest are padded.

The last is longer than the windows and buckets of positions that encoders have, as far as the model takes it.
"""

ONE_FILE_BYTES = 1_500_000_000
"""Weights above which a graph refers to a second file, since one file of ONNX holds two gigabytes."""

MANIFEST = "export.json"

Inputs = dict[str, Tensor]
Axes = tuple[str | None, ...]


@dataclass
class ExportArguments:
    """What to write where."""

    _argument_group_name = "export"

    output: str | None = field(default=None, metadata={"help": "Folder for the graphs; default: FOLDER/onnx."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an export that is there."})


@dataclass
class _Door:
    """One way into a model.

    Attributes:
        name: Of the file; ``model`` for the one that needs none.
        method: Of the model.
        outputs: Fields of what it returns.
        fixed: Arguments that no graph can take.
        example: (batch, tokens, seed) -> inputs of that size.
        axes: Input -> the name of each axis that may vary, None where it may not.
    """

    name: str
    method: str
    outputs: tuple[str, ...]
    fixed: Mapping[str, Any]
    example: Callable[[int, int, int], Inputs]
    axes: dict[str, Axes]

    def label(self, name: str) -> str:
        """Name of an input in the graph, where no output may have the same."""
        return f"input_{name}" if name in self.outputs else name


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
    if target.exists() and not target.is_dir():
        raise InputError(f"{target}: is a file, and the graphs need a folder. Pass another --output.")
    if target.exists() and any(target.iterdir()) and not args.overwrite:
        raise InputError(f"{target}: exists and would be replaced. Pass --overwrite, or another --output.")
    model = _open(part)
    doors = _doors(model, part)
    before = read_json(target / MANIFEST) if target.is_dir() else {}
    with staged_folder(target, merge=True) as staged, torch.no_grad(), _quiet():
        graphs: dict[str, Any] = {}
        for door in doors:
            graphs |= _write(model, door, staged, part)
        write_json(staged / MANIFEST, _manifest(folder, part, model, graphs))
        written = {str(file.relative_to(staged)) for file in staged.rglob("*") if file.is_file()}
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
    modules = [folder / module.get("path", "") for module in read_json(folder / "modules.json") or []] or [folder]
    kinds = {part: read_json(part / "config.json").get("model_type") or "" for part in modules}
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
            f"{part}: cannot be opened by the installed class ({_first_line(error)}). If its encoder needs code of "
            "its own, install the package that has it; no code of a folder is run here."
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise InputError(
            f"{part}: the weights file lacks {', '.join(missing[:3])} ({len(missing)} in all), which would be random "
            "numbers. Fetch or save the model again."
        )
    return model.eval()


def _doors(model: PreTrainedModel, part: Path) -> list[_Door]:
    """Ways into a model: what its room says, and for a retriever what its folder does."""
    graphs = _graphs(model)
    settings: dict[str, Any] = {}
    if not any(graph.inputs for graph in graphs.values()) and "input_ids" in _arguments(model, "forward"):
        settings = read_json(part / "sentence_bert_config.json").get("modality_config") or {"text": {}}
    modalities = {"model" if kind == "text" else kind: entry for kind, entry in settings.items()}
    doors = []
    for name, entry in modalities.items():
        graph = graphs.get(name) or Graph(outputs=(entry.get("method_output_name") or "sentence_embedding",))
        method = entry.get("method") or "forward"
        if name not in ("model", "image"):
            raise InputError(f"{part}: reads {name}, and only texts and images can be exported. Save it without.")
        taken = _arguments(model, method)
        example = _images(part) if name == "image" else _texts(model, part)
        axes: dict[str, Axes] = {
            key: ("batch", *(None,) * (value.ndim - 1)) if name == "image" else ("batch", "tokens")
            for key, value in example(*TRACED, 0).items()
            if key in taken
        }
        doors.append(_Door(name, method, graph.outputs, graph.fixed, example, axes))
    for name, graph in graphs.items():
        if graph.inputs:
            axes = {
                key: tuple(axis if _size(model, axis) is None else None for axis in named)
                for key, named in graph.inputs.items()
            }
            doors.append(_Door(name, graph.method, graph.outputs, graph.fixed, _random(model, graph), axes))
    if not doors:
        raise InputError(
            f"{part}: {type(model).__name__} reads no text, and its room does not say what it reads. Name its inputs "
            "in Room(graphs={...}); see polyrep.Graph."
        )
    return doors


def _arguments(model: PreTrainedModel, method: str) -> list[str]:
    return list(inspect.signature(getattr(model, method)).parameters)


def _size(model: PreTrainedModel, axis: str) -> int | None:
    """Size of an axis that the model's config fixes: a number, or the length of a list."""
    value = getattr(model.config, axis, None)
    return len(value) if isinstance(value, list) else value


def _texts(model: PreTrainedModel, part: Path) -> Callable[[int, int, int], Inputs]:
    """What the folder's tokenizer makes of random words; the first text is the longest."""
    try:
        processor = AutoProcessor.from_pretrained(part, trust_remote_code=False)
        tokenizer: Any = getattr(processor, "tokenizer", processor)
        if not hasattr(tokenizer, "get_vocab"):
            tokenizer = AutoTokenizer.from_pretrained(part, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{part}: no tokenizer that can be opened ({_first_line(error)}), so there are no texts to compare with. "
            "Save the tokenizer of the model into the folder."
        ) from error
    limit = min(tokenizer.model_max_length, *_positions(model.config.to_dict()), CHECKED[-1][1])
    special = set(tokenizer.all_special_ids)
    ids = [i for i in sorted(tokenizer.get_vocab().values()) if i not in special]

    def example(batch: int, tokens: int, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        lengths = [max(1, tokens - row * tokens // batch) for row in range(batch)]
        drawn = [[ids[i] for i in torch.randint(len(ids), (n,), generator=generator).tolist()] for n in lengths]
        texts = [tokenizer.decode(row) for row in drawn]
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=min(tokens, limit), return_tensors="pt")
        return dict(encoded)

    return example


def _positions(config: dict[str, Any]) -> list[int]:
    """How long a text may be, as a config and those in it say."""
    own = config.get("max_position_embeddings")
    found = [own] if isinstance(own, int) and own > 0 else []
    return found + [limit for part in config.values() if isinstance(part, dict) for limit in _positions(part)]


def _images(part: Path) -> Callable[[int, int, int], Inputs]:
    """What the folder's image processor makes of random pixels."""
    try:
        processor: Any = AutoProcessor.from_pretrained(part, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{part}: no image processor that can be opened ({_first_line(error)}), so there are no images to compare "
            "with. Save the processor of the model into the folder."
        ) from error
    processor = getattr(processor, "image_processor", processor)

    def example(batch: int, tokens: int, seed: int) -> Inputs:
        pixels = np.random.default_rng(seed).integers(0, 256, (batch, 48, 64, 3), dtype=np.uint8)
        return dict(processor(images=[Image.fromarray(image) for image in pixels], return_tensors="pt"))

    return example


def trials(head: PreTrainedModel) -> list[tuple[Graph, Inputs]]:
    """Random inputs for each graph that a head's room tells of, to compare two openings of it by."""
    drawn = [(graph, _random(head, graph)(*TRACED, 0)) for graph in _graphs(head).values() if graph.inputs]
    return [(g, {n: v.to(head.dtype) if v.is_floating_point() else v for n, v in x.items()}) for g, x in drawn]


def _graphs(model: PreTrainedModel) -> Mapping[str, Graph]:
    """What a model's room tells of it; by the model type, since the class may be a folder's own copy of the room's."""
    room = room_of(model.config.model_type)
    told = room.graphs.items() if room else ()
    return next((graphs for owner, graphs in told if owner.config_class.model_type == model.config.model_type), {})  # type: ignore[union-attr]


def _random(model: PreTrainedModel, graph: Graph) -> Callable[[int, int, int], Inputs]:
    """Random inputs of a head: vectors of unit length, token ids, and a mask that pads all texts but the first."""

    def example(batch: int, tokens: int, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.tensor([max(1, tokens - row * tokens // batch) for row in range(batch)])
        varying, inputs = {"batch": batch, "tokens": tokens}, {}
        for name, axes in graph.inputs.items():
            sizes = [_size(model, axis) or varying.get(axis, 32) for axis in axes]
            if name == "attention_mask":
                inputs[name] = (torch.arange(tokens) < lengths[:, None]).long()
            elif name.endswith("_ids"):
                inputs[name] = torch.randint(model.config.vocab_size, sizes, generator=generator)
            else:
                inputs[name] = F.normalize(torch.randn(sizes, generator=generator), dim=-1)
        return inputs

    return example


class _Positional(nn.Module):
    """A model's method as a module of tensors alone, which is what can be traced."""

    def __init__(self, model: PreTrainedModel, door: _Door, task: str | None) -> None:
        super().__init__()
        self.model, self.door = model, door
        self.fixed = dict(door.fixed) | ({} if task is None else {"task": task})

    def answer(self, *values: Tensor) -> Any:
        inputs = dict(zip(self.door.axes, values, strict=True))
        return getattr(self.model, self.door.method)(**inputs, **self.fixed)

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        output = self.answer(*values)
        return tuple(output[name] for name in self.door.outputs)


def _write(model: PreTrainedModel, door: _Door, staged: Path, part: Path) -> dict[str, Any]:
    """Trace, convert, save and compare one door: file name -> its entry in the manifest."""
    example = door.example(*TRACED, 0)
    values = tuple(example[name] for name in door.axes)
    tasks = ("query", "document") if "task" in _arguments(model, door.method) else (None,)
    traced: dict[str | None, Any] = {}
    started = time.monotonic()
    dynamic = tuple(
        {i: torch.export.Dim.DYNAMIC for i, axis in enumerate(axes) if axis} for axes in door.axes.values()
    )
    wrapped = {task: _Positional(model, door, task).eval() for task in tasks}
    refusals: list[ValueError] = []
    for task in tasks:
        try:
            output = wrapped[task].answer(*values)
        except ValueError as error:  # of one task perhaps, as of images that are documents alone
            refusals.append(error)
            continue
        door.outputs = tuple(name for name in door.outputs if output.get(name) is not None)
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
        stem = "_".join(filter(None, (None if task and door.name == "model" else door.name, task)))
        file = staged / f"{stem}.onnx"
        reference = wrapped[task] if task in wrapped else wrapped["query"]
        opset = _convert(program, door, file, part, model)
        seconds = round(time.monotonic() - started, 1)
        entries[file.name] = {
            "method": door.method,
            "task": task,
            "opset": opset,
            **_compare(reference, door, file, part),
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


def _convert(program: Any, door: _Door, file: Path, part: Path, model: PreTrainedModel) -> int:
    """Write a trace as ONNX, with names for what goes in and out; its opset."""
    shapes = tuple({i: axis for i, axis in enumerate(axes) if axis} for axes in door.axes.values())
    try:
        converted = torch.onnx.export(
            program,
            dynamo=True,
            dynamic_shapes={"values": shapes},
            input_names=[door.label(name) for name in door.axes],
            output_names=list(door.outputs),
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
        f"{part}: no ONNX graph can be made of {type(model).__name__} ({_first_line(cause)}). It does what "
        "torch.export or ONNX cannot express; serve the folder with torch, or take another backbone."
    )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


def _compare(reference: nn.Module, door: _Door, file: Path, part: Path) -> dict[str, Any]:
    """Run the graph beside torch at all sizes; InputError with the numbers if they differ."""
    import onnxruntime

    difference = dict.fromkeys(door.outputs, 0.0)
    try:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        for seed, (batch, tokens) in enumerate(CHECKED, 1):
            example = door.example(batch, tokens, seed)
            expected = reference(*(example[name] for name in door.axes))
            found = session.run(None, {door.label(name): example[name].numpy() for name in door.axes})
            for name, ours, theirs in zip(door.outputs, expected, found, strict=True):
                difference[name] = max(difference[name], _difference(ours.numpy(), theirs))
    except Exception as error:  # onnxruntime's own kinds share no other base
        raise InputError(
            f"{part}: {file.name} and the model cannot be compared ({_first_line(error)}). Nothing was written; serve "
            "the folder with torch."
        ) from error
    if not max(difference.values()) <= TOLERANCE:
        numbers = ", ".join(f"{name} {value:.1e}" for name, value in difference.items())
        raise InputError(
            f"{part}: {file.name} gives other numbers in onnxruntime than the model in torch: {numbers} off, where "
            f"{TOLERANCE:.0e} is allowed. Nothing was written; serve the folder with torch."
        )
    described = {
        kind: {node.name: {"type": node.type, "shape": node.shape} for node in nodes}
        for kind, nodes in (("inputs", session.get_inputs()), ("outputs", session.get_outputs()))
    }
    return {**described, "compared_at": [list(size) for size in CHECKED], "difference": difference}


def _difference(ours: Any, theirs: Any) -> float:
    """Largest difference of two arrays, relative where numbers are above one; infinite if shapes differ or at NaN.

    Where a model keeps the heaviest values of each row, which of several equal ones at the cut stay is nobody's
    choice, and the two choose differently; nor is the order of several vectors of a text, where clusters tie. That is
    no difference.
    """
    if ours.shape != theirs.shape:
        return float("inf")
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    if ours.ndim == 3:  # (batch, vectors, dim)
        ours, theirs = (np.take_along_axis(x, x.sum(-1, keepdims=True).argsort(1), 1) for x in (ours, theirs))
    off = np.abs(ours - theirs) / np.maximum(1.0, np.abs(ours))
    lightest = np.where(ours > 0, ours, np.inf).min(-1, keepdims=True, initial=np.inf)
    either = np.maximum(ours, theirs)
    tied = (np.minimum(ours, theirs) == 0) & (np.abs(either - lightest) <= TOLERANCE * np.maximum(1.0, either))
    tied &= (ours > 0).sum(-1, keepdims=True) == (theirs > 0).sum(-1, keepdims=True)
    worst = np.where(tied, 0.0, off).max(initial=0.0)
    return float("inf") if np.isnan(worst) else float(worst)


def _manifest(folder: Path, part: Path, model: PreTrainedModel, graphs: dict[str, Any]) -> dict[str, Any]:
    import onnx
    import onnxruntime
    import transformers

    settings = read_json(folder / "config_sentence_transformers.json")
    return {
        "model": type(model).__name__,
        "part": str(part.relative_to(folder)),
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
