"""Configs as a stranger may have written them: fields of our classes, of encoders in them, and files of JSON.

Three cases of four change one to three fields of a valid config, make it, bring it through a dict, build its model
without memory, and run it where it is small. The fourth damages one file of JSON in a model folder and opens that.
"""

from __future__ import annotations

import copy
import json
import logging
import random
import re
import shutil
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from room_examples import EXAMPLES
from small_models import write_backbone
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

import polyrep
from polyrep.registry import ROOMS

from . import Outcome, judge

HERE = Path(polyrep.__file__).parent
RUNNABLE = 3_000_000
"""Most parameters of a model that is made and run."""

FOREIGN = {
    r"_config\.(model_type|num_channels)=": "what another architecture takes and gives is only seen when it runs",
}
"""Cases in which another library may raise what it likes in its own code, and why no class of ours can be first."""


class Kind(NamedTuple):
    """A config class with what makes it, and its model."""

    config: type[PretrainedConfig]
    model: type[PreTrainedModel]
    fields: dict[str, Any]
    graphs: list[tuple[dict[str, tuple[str, ...]], dict[str, Any]]]


def run(count: int, seed: int, folder: Path) -> list[Outcome]:
    """See :mod:`fuzz`."""
    transformers.logging.set_verbosity(logging.CRITICAL)
    warnings.simplefilter("ignore")
    kinds, saved = _kinds(folder)
    outcomes = []
    for number in range(count):
        draw = random.Random(f"{seed}/{number}")
        if number % 4 == 3:
            outcomes.append(_file_case(draw, f"seed {seed}, case {number}", saved, folder / "case"))
        else:
            kind = kinds[(number - number // 4) % len(kinds)]
            outcomes.append(_field_case(draw, f"seed {seed}, case {number}", kind))
    return outcomes


def _kinds(folder: Path) -> tuple[list[Kind], list[Path]]:
    """Every config class with valid fields, and a saved folder of every kind."""
    backbone = write_backbone(folder / "backbone")
    found: dict[type, Kind] = {}
    saved = []
    for name, room in ROOMS.items():
        (folder / name).mkdir()
        models = EXAMPLES[name](backbone, folder / name).models
        made = [
            polyrep.save(model, folder / "saved" / f"{name}-{kind}", readme="a card") for kind, model in models.items()
        ]
        opened = [*models.values(), *map(polyrep.load, made)]  # heads by themselves, and inside of whole models
        parts = [part for whole in opened for part in whole.modules() if isinstance(part, PreTrainedModel)]
        for model in filter(None, (room.model, room.head)):
            graphs = [(dict(graph.inputs), dict(graph.fixed)) for graph in room.graphs.get(model, {}).values()]
            whole = next((part.config for part in parts if type(part) is model), room_config(parts, room))
            config: Any = model.config_class
            own = config().to_dict().keys() - PretrainedConfig().to_dict().keys()
            fields = {field: value for field, value in json.loads(whole.to_json_string(False)).items() if field in own}
            found[config] = Kind(config, model, fields | {"model_type": config.model_type}, graphs)
        saved += made
    return list(found.values()), saved


def room_config(parts: list[PreTrainedModel], room: Any) -> PretrainedConfig:
    """The config of a room's model, where its head is nowhere by itself."""
    return next(part.config for part in parts if type(part) is room.model)


def deep(depth: int) -> Any:
    """Lists inside each other."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def deep_object(depth: int) -> Any:
    """Objects inside each other."""
    value: Any = 1
    for _ in range(depth):
        value = {"encoder_config": value}
    return value


VALUES: list[Callable[[], Any]] = [
    *(
        lambda value=value: copy.copy(value)
        for value in (
            *(
                None,
                True,
                False,
                -1,
                0,
                1,
                2,
                3,
                5,
                7,
                64,
                1_000,
                65_536,
                10**6,
                2**31,
                10**9,
                10**18,
                10**400,
                -(10**18),
            ),
            *(0.0, 1.0, 0.5, -0.5, 2.5, 1e-300, 1e300, float("nan"), float("inf"), float("-inf")),
            *("", "x", "10", "none", "mean", "\ud800", "\x00", "\u202e", "../..", "a" * 100_000),
            *([], [1], [None], ["x"], [[1]], [1, 1], [-1, 10**9], {}, {"a": 1}, {"model_type": "bert"}, {"1": "x"}),
            *({"model_type": "no_such"}, {"model_type": None}, {"AutoModel": "o/r--m.C"}, {"": None}, (1, 2)),
        )
    ),
    lambda: 10**5_000,
    lambda: list(range(100_000)),
    lambda: deep(500),
    lambda: deep(100_000),
    lambda: deep_object(30),
    lambda: deep_object(5_000),
]

THEIRS = (
    *("architectures", "auto_map", "dtype", "torch_dtype", "id2label", "label2id", "num_labels", "problem_type"),
    *("output_hidden_states", "output_attentions", "return_dict", "attn_implementation", "_attn_implementation"),
    *("name_or_path", "_name_or_path", "transformers_version", "chunk_size_feed_forward", "is_encoder_decoder"),
    *("layer_types", "mlp_layer_types", "per_layer_config", "rope_scaling", "rope_theta", "rope_parameters"),
    *("tie_word_embeddings", "pad_token_id", "quantization_config", "vocab_size", "hidden_size", "num_hidden_layers"),
    *("head_dim", "num_heads", "embed_dim", "model_type", "sub_configs", "attribute_map", "self", "cls", "kwargs"),
    *(name for name in dir(PretrainedConfig) if name != "__dict__"),
)


def _field_case(draw: random.Random, name: str, kind: Kind) -> Outcome:
    fields = copy.deepcopy(kind.fields)
    changed = [_change(draw, fields) for _ in range(draw.choice((1, 1, 2, 3)))]
    said = f"{name}: {kind.config.__name__} with {', '.join(what for what, _ in changed)}"
    touched = {part for _, path in changed for part in path}

    def call() -> None:
        try:
            _foreign(said, lambda: _made_and_run(kind, fields))
        except ValueError as error:
            message = str(error)
            known = re.match(r"\w+: |Specified `(attn|experts)_implementation|The dimension to be chunked", message)
            assert known and len(message) < 3_000, f"unclear: {message[:500]}"
            named = (
                {"_implementation", "vectors of width", "to be chunked"} | touched | kind.fields.keys() | {"Config: "}
            )
            assert any(part in message for part in named), f"names no field: {message}"
            raise

    return judge(said, call)


def _foreign(said: str, call: Callable[[], Any]) -> None:
    """Call, and take what another library raises in one of the cases of :data:`FOREIGN` for its way to refuse."""
    try:
        call()
    except ValueError:
        raise
    except Exception as error:
        where = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        own = where.is_relative_to(HERE) or where == Path(__file__)
        if own or not any(re.search(pattern, said) for pattern in FOREIGN):
            raise
        raise ValueError(f"{where.stem}: Config: {type(error).__name__}: {error}") from error


def _change(draw: random.Random, fields: dict[str, Any]) -> tuple[str, list[str]]:
    """Change one field in place; what was done, and where."""
    dice = draw.random()
    if dice < 0.12:
        place, path = fields, [draw.choice(THEIRS)]
    else:
        places = list(_places(fields))
        inner = [pair for pair in places if pair[1]]
        place, path = draw.choice(inner) if inner and dice < 0.45 else places[0]
        path = [*path, draw.choice(sorted(place) or ["model_type"])]
    field = path[-1]
    old = place.get(field)
    if dice > 0.94 and field in place:
        del place[field]
        return f"no {'.'.join(path)}", path
    if field == "model_type" and draw.random() < 0.7:
        value: Any = draw.choice(list(CONFIG_MAPPING))
    elif type(old) is int and abs(old) < 2**63 and draw.random() < 0.3:
        value = draw.choice((old + 1, old - 1, 2 * old, 3 * old, -old, float(old), str(old), [old]))
    elif isinstance(old, str) and draw.random() < 0.3:
        value = draw.choice((old.upper(), old + " ", [old], *(text for text in fields.values() if type(text) is str)))
    else:
        value = draw.choice(VALUES)()
    place[field] = value
    return f"{'.'.join(path)}={_cut(value)}", path


def _cut(value: Any) -> str:
    try:
        return ascii(value)[:60]
    except (ValueError, RecursionError) as error:
        return f"{type(value).__name__} ({type(error).__name__})"


def _places(fields: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
    if len(path) < 5:
        yield fields, path
        for name, value in fields.items():
            if isinstance(value, dict):
                yield from _places(value, (*path, name))


def _made_and_run(kind: Kind, fields: dict[str, Any]) -> None:
    """All that a config goes through."""
    config = kind.config(**fields)
    again = kind.config.from_dict(json.loads(config.to_json_string()))
    for field in kind.fields:
        before, after = getattr(config, field), getattr(again, field)
        if isinstance(before, PretrainedConfig):
            before, after = before.to_json_string(), after.to_json_string()
        assert before == after, f"{field} is another after a trip through JSON: {before!r} {after!r}"[:1000]
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind.model(config).parameters())
    if size > RUNNABLE:
        return
    torch.manual_seed(0)
    made: Any = kind.model(config).eval()
    with torch.inference_mode():
        for buffer in made.buffers():
            if buffer.is_floating_point():  # as a fit would leave it
                buffer.uniform_()
        stock = ({"embedding": ("batch", "input_dim")} if not config.sub_configs else {}, {})
        for axes, fixed in kind.graphs or [stock]:
            for task in ("query", "document"):
                made(**_inputs(axes, config), **fixed, task=task)
        if getattr(config, "vision_config", None):
            made.encode_image(torch.rand(2, 3, 32, 32), task="document")


def _inputs(axes: dict[str, tuple[str, ...]], config: Any) -> dict[str, torch.Tensor]:
    if not axes:
        return {"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    made = {}
    for name, sizes in axes.items():
        fields = [{"batch": 2, "tokens": 3}.get(size, getattr(config, size, None)) for size in sizes]
        shape = [len(size) if isinstance(size, list) else size or 8 for size in fields]
        made[name] = (
            torch.ones(shape, dtype=torch.long) if name in ("attention_mask", "input_ids") else torch.rand(shape)
        )
    return made | ({"input_ids": torch.zeros_like(made["input_ids"])} if "input_ids" in made else {})


def _file_case(draw: random.Random, name: str, saved: list[Path], folder: Path) -> Outcome:
    source = draw.choice(saved)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder, copy_function=_linked)
    files = [file for file in folder.rglob("*.json") if file.name != "tokenizer.json"]
    file = draw.choice(sorted(files))
    how, content = _damaged(draw, file.read_bytes())
    file.unlink()
    file.write_bytes(content)

    said = f"{name}: {source.name}/{file.relative_to(folder)} with {how}"

    def call() -> None:
        _foreign(said, lambda: polyrep.load(folder, trust_remote_code=True, device="cpu"))

    return judge(said, call)


def _linked(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def _damaged(draw: random.Random, content: bytes) -> tuple[str, bytes]:
    """Bytes of a JSON file that are others, and how they came about."""
    place = draw.randrange(len(content))
    flipped = bytes([content[place] ^ 1 << draw.randrange(8)])
    roots = (b"[]", b"{}", b"null", b'"x"', b"5", b"[5]", b"[{}]", b"NaN")
    whole: list[tuple[str, bytes]] = [
        ("a byte order mark", b"\xef\xbb\xbf" + content),
        ("UTF-16", content.decode().encode("utf-16")),
        ("a byte of Latin-1", content[:place] + b"\xe9" + content[place:]),
        ("nothing in it", b""),
        (f"only {place} bytes", content[:place]),
        (f"byte {place} flipped", content[:place] + flipped + content[place + 1 :]),
        ("50,000 brackets", b"[" * 50_000),
        ("50,000 objects", b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
        ("a long number", b'{"num_vectors": ' + b"9" * 5_000 + b"}"),
        *((f"{root.decode()} as a whole", root) for root in roots),
    ]
    if draw.random() < 0.5:
        return draw.choice(whole)
    parsed = json.loads(content)
    objects = parsed if isinstance(parsed, list) else [parsed]
    objects = [part for part in objects if isinstance(part, dict) and part] or [{"a": 1}]
    how, _ = _change(draw, draw.choice(objects))
    try:
        return how, json.dumps(parsed).encode()
    except (TypeError, ValueError, RecursionError):
        return "null as a whole", b"null"
