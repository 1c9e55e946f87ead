"""Weight files, their indexes and the folders of modules, damaged or hostile, through :func:`polyrep.load`.

What opens must give the vectors of the folder before the damage, unless the damage is to values: then they must be
finite, and the folder must have another fingerprint. Nothing pickled may ever run.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense, Router, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder, SpladePooling
from tokenizers import Tokenizer
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM, BertModel, BertTokenizer

import polyrep
from polyrep.registry import ROOMS

from . import Outcome, judge

TEXTS = ["list open ports", "a file"]
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SAME, CHANGED, REFUSED, ANY = "same", "changed", "refused", "any"
"""What a mutation may lead to: the same vectors or a refusal; others, or one; a refusal; what opens, or one."""

Mutation = Callable[[Path, random.Random], str]


class Trap:
    """What creates a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return open, (self.marker, "w")


def run(count: int, seed: int, folder: Path) -> list[Outcome]:
    """Try ``count`` mutations, the same ones for the same seed, in ``folder``."""
    bases = build(folder / "bases")
    expected = {
        name: answers(polyrep.load(base, trust_remote_code=True, device="cpu")) for name, base in bases.items()
    }
    prints = {name: polyrep.hub.fingerprint(base) for name, base in bases.items()}
    outcomes = []
    for number in range(count):
        chance = random.Random(f"{seed}-{number}")
        kind = chance.choice(list(MUTATIONS))
        name = chance.choice([name for name, base in bases.items() if MUTATIONS[kind][0](base)])
        place = folder / "case" / str(number)
        shutil.copytree(bases[name], place)
        marker, before = folder / "marker", _contents(place)
        result = MUTATIONS[kind][1](place, chance)
        if result == CHANGED and _contents(place) == before:
            result = SAME
        for trap in place.rglob("*.bin"):
            trap.write_bytes(pickle.dumps(Trap(marker)))

        def call(place: Path = place, result: str = result, name: str = name) -> None:
            model = polyrep.load(place, trust_remote_code=True, device="cpu")
            assert result != REFUSED, "it opened"
            found = answers(model)
            if result == SAME:
                same = len(found) == len(expected[name]) and all(map(np.array_equal, found, expected[name]))
                assert same, "opened with other vectors"
            elif result == CHANGED:
                assert polyrep.hub.fingerprint(place) != prints[name], "other weights of the same fingerprint"
                assert all(np.isfinite(vector).all() for vector in found) or _is_large(model), "vectors not finite"

        outcome = judge(f"{seed}-{number} {kind}: {name}", call)
        if marker.exists():
            marker.unlink()
            outcome = outcome._replace(verdict="fault", detail="ran a pickle")
        outcomes.append(outcome)
        shutil.rmtree(place)
    return outcomes


def answers(model: Any) -> list[np.ndarray]:
    """Vectors of a few texts, or the weights of a head."""
    if not isinstance(model, polyrep.hub.folder.Encoder):
        return [tensor.float().numpy() for _, tensor in sorted(model.state_dict().items())]
    found = []
    for encode in (model.encode_query, model.encode_document):
        vectors = encode(TEXTS)
        found += [np.asarray(v.to_dense() if hasattr(v, "to_dense") else v, np.float32) for v in vectors]
    return found


def _contents(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()]


def _is_large(model: torch.nn.Module) -> bool:
    """Whether a product of weights may leave the range of numbers."""
    return any(bool((tensor.abs() > 1e8).any()) for tensor in model.state_dict().values() if tensor.numel())


def build(root: Path) -> dict[str, Path]:
    """Tiny folders of every layout, by name; made once."""
    if not root.is_dir():
        root.mkdir(parents=True)
        _write_backbone(root / "backbone")
        for name, model in _models(root).items():
            polyrep.save(model, root / "saved" / name)
        _write_variants(root)
    return {str(path.relative_to(root / "saved")): path for path in sorted((root / "saved").iterdir())}


def _write_backbone(folder: Path) -> None:
    torch.manual_seed(0)
    folder.mkdir()
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]", "[unused1]", *letters]
    words += [*(f"##{letter}" for letter in letters), "file", "port", "list"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    config = BertConfig(vocab_size=len(words), max_position_embeddings=64, **SIZE, **DROPOUT)
    AutoModel.from_config(config).save_pretrained(folder)


def _models(root: Path) -> dict[str, Any]:
    backbone = root / "backbone"
    models: dict[str, Any] = {}
    for room_type, room in ROOMS.items():
        scratch = root / "scratch" / room_type
        scratch.mkdir(parents=True)
        for kind, model in room.named(room.example)(backbone, scratch).models.items():
            models[f"{room_type}-{kind}"] = model
            if kind == "pipeline":
                models[f"{room_type}-head"] = model[-1].model
    dense = [Transformer(str(backbone)), Pooling(32, "mean"), Dense(32, 16)]
    models["dense"] = SentenceTransformer(modules=dense, device="cpu")
    csr = [Transformer(str(backbone)), Pooling(32, "mean"), SparseAutoEncoder(32, hidden_dim=64, k=8)]
    models["csr"] = SparseEncoder(modules=csr, device="cpu")
    words = BertForMaskedLM(BertConfig.from_pretrained(backbone))
    words.save_pretrained(root / "words")
    AutoTokenizer.from_pretrained(backbone).save_pretrained(root / "words")
    splade = [Transformer(str(root / "words"), transformer_task="fill-mask"), SpladePooling()]
    models["splade"] = SparseEncoder(modules=splade, device="cpu")
    tokenizer = Tokenizer.from_file(str(backbone / "tokenizer.json"))
    static = StaticEmbedding(tokenizer, embedding_dim=8)
    models["static"] = SentenceTransformer(modules=[static], device="cpu")
    routes = {"query": [StaticEmbedding(tokenizer, embedding_dim=32)], "document": dense[:2]}
    models["router"] = SentenceTransformer(modules=[Router.for_query_document(*routes.values())], device="cpu")
    return models


def _write_variants(root: Path) -> None:
    saved = root / "saved"
    for name, source in (("sharded", saved / "dense"), ("bare", root / "backbone")):
        shutil.copytree(source, saved / name)
    (saved / "sharded" / "model.safetensors").unlink()
    BertModel.from_pretrained(saved / "dense").save_pretrained(saved / "sharded", max_shard_size="20KB")
    for name in ("colbert", "colbert-sharded"):
        shutil.copytree(saved / "bare", saved / name)
        weights = load_file(saved / "bare" / "model.safetensors")
        weights = {f"bert.{key}": weight for key, weight in weights.items()} | {"linear.weight": torch.randn(8, 32)}
        _edit(saved / name / "config.json", architectures=["HF_ColBERT"])
        if name == "colbert":
            save_file(weights, saved / name / "model.safetensors", metadata={"format": "pt"})
        else:
            (saved / name / "model.safetensors").unlink()
            _write_shards(saved / name, weights)


def _write_shards(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    names = sorted(weights)
    parts = {f"model-0000{n + 1}-of-00003.safetensors": names[n::3] for n in range(3)}
    for file, keys in parts.items():
        save_file({key: weights[key] for key in keys}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _file(folder: Path, chance: random.Random) -> Path:
    return chance.choice(sorted(folder.rglob("*.safetensors")))


def _flip(data: bytearray, start: int, end: int, chance: random.Random) -> None:
    for _ in range(chance.choice((1, 1, 1, 3, 20))):
        data[chance.randrange(start, end)] ^= 1 << chance.randrange(8)


def flip_header(folder: Path, chance: random.Random) -> str:
    """Bits of the header, or of its length."""
    file = _file(folder, chance)
    data = bytearray(file.read_bytes())
    _flip(data, 0, min(len(data), 8 + int.from_bytes(data[:8], "little")), chance)
    file.write_bytes(data)
    return CHANGED  # offsets of two tensors of a size may be exchanged


def flip_data(folder: Path, chance: random.Random) -> str:
    """Bits of the weights."""
    file = _file(folder, chance)
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    if start == len(data):
        return SAME
    _flip(data, start, len(data), chance)
    file.write_bytes(data)
    return CHANGED


def cut(folder: Path, chance: random.Random) -> str:
    """A file ends early, or goes on."""
    file = _file(folder, chance)
    data = file.read_bytes()
    size = chance.choice((0, 1, 7, 8, 9, len(data) // 2, len(data) - 1, chance.randrange(len(data))))
    file.write_bytes(chance.choice((data[:size], data + bytes(chance.choice((1, 8, 4096))), data + data)))
    return REFUSED


def _changed_weights(change: Callable[[dict[str, torch.Tensor], str, random.Random], str]) -> Mutation:
    def mutate(folder: Path, chance: random.Random) -> str:
        file = _file(folder, chance)
        weights = load_file(file)
        result = change(weights, chance.choice(sorted(weights)), chance)
        kept = {key: weight.contiguous().clone() for key, weight in weights.items()}
        save_file(kept, file, metadata={"format": "pt"})
        return result

    return functools.update_wrapper(mutate, change)  # type: ignore[return-value]


@_changed_weights
def drop(weights: dict[str, torch.Tensor], key: str, chance: random.Random) -> str:
    """Some weights, or all, are missing."""
    for name in chance.choice(
        ([key], [key], sorted(weights), chance.sample(sorted(weights), (len(weights) + 1) // 2))
    ):
        del weights[name]
    return SAME


@_changed_weights
def rename(weights: dict[str, torch.Tensor], key: str, chance: random.Random) -> str:
    """Weights have other names."""
    new = chance.choice((f"x.{key}", f"{key}s", key.upper(), f"model.{key}", f"bert.{key}", "", key[1:], "ü\n" + key))
    for name in chance.choice(([key], list(weights))):
        weights[name.replace(key, new) if name == key else f"{new}{name}"] = weights.pop(name)
    return SAME


@_changed_weights
def add(weights: dict[str, torch.Tensor], key: str, chance: random.Random) -> str:
    """Weights that no model has."""
    weights[chance.choice(("foo", f"{key}.x", "__metadata", "ä"))] = torch.ones(chance.choice(((), (3,), (0, 2))))
    return SAME


@_changed_weights
def reshape(weights: dict[str, torch.Tensor], key: str, chance: random.Random) -> str:
    """A weight of another shape."""
    tensor = weights[key]
    ways = [tensor[None], tensor.reshape(-1), torch.cat([tensor.reshape(-1)] * 3), tensor.reshape(-1)[:0]]
    ways += [tensor.T] if tensor.ndim == 2 else []
    ways += [tensor[:-1]] if tensor.ndim else []
    weights[key] = chance.choice(ways)
    return CHANGED


@_changed_weights
def retype(weights: dict[str, torch.Tensor], key: str, chance: random.Random) -> str:
    """Weights as another type."""
    names = ("int8", "uint8", "int64", "bool", "float16", "bfloat16", "float64", "float8_e4m3fn", "complex64")
    dtype = getattr(torch, chance.choice(names))
    for name in chance.choice(([key], list(weights))):
        weights[name] = weights[name].to(dtype)
    return CHANGED


@_changed_weights
def poison(weights: dict[str, torch.Tensor], key: str, chance: random.Random) -> str:
    """A value that is not finite."""
    numbers = sorted(name for name, weight in weights.items() if weight.is_floating_point() and weight.numel())
    if not numbers:
        return SAME
    flat = weights[chance.choice(numbers)].view(-1)
    flat[chance.randrange(len(flat))] = chance.choice((torch.nan, torch.inf, -torch.inf))
    return REFUSED


@_changed_weights
def scale(weights: dict[str, torch.Tensor], key: str, chance: random.Random) -> str:
    """Values far from what they were, and still numbers."""
    if weights[key].is_floating_point():
        weights[key] = weights[key] * chance.choice((0.0, -1.0, 1e10))
    return CHANGED


def lie(folder: Path, chance: random.Random) -> str:
    """A header says what is not so."""
    file = _file(folder, chance)
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    key = chance.choice([name for name in header if name != "__metadata__"] or [""])
    entry = header.get(key, {"shape": [1], "data_offsets": [0, 4]})
    lies = [
        {"shape": [60000, 60000]},
        {"shape": [2**40, 2**40]},
        {"shape": [-1]},
        {"shape": "no"},
        {"shape": [10**25]},
        {"dtype": chance.choice(("I32", "F64", "F8_E4M3", "U8", "X", None))},
        {"data_offsets": [0, 2**62]},
        {"data_offsets": [4, 0]},
        {"data_offsets": [entry["data_offsets"][0] + 4, entry["data_offsets"][1] + 4]},
        {"data_offsets": []},
    ]
    header[key] = entry | chance.choice(lies)
    made = chance.choice(
        (
            json.dumps(header),
            json.dumps(header | {"__metadata__": 3}),
            json.dumps(header)[:-1] + f', "{key}": ' + json.dumps(entry) + "}",
            "[" * 50000,
            "[]",
            '{"a": {}}',
        )
    ).encode()
    file.write_bytes(len(made).to_bytes(8, "little") + made + data[8 + length :])
    return CHANGED


def flood(folder: Path, chance: random.Random) -> str:
    """A header without end, or of more tensors than any model has."""
    file = _file(folder, chance)
    if chance.random() < 0.5:
        entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
        made = ("{" + ",".join(f'"w{number}":{entry}' for number in range(200_000)) + "}").encode()
        file.write_bytes(len(made).to_bytes(8, "little") + made)
        return REFUSED
    size = chance.choice((2**63, 2**64 - 1, 2**30, 150_000_000))
    with file.open("wb") as stream:
        stream.write(size.to_bytes(8, "little"))
        stream.truncate(min(size + 8, 2**31))  # sparse
    return REFUSED


def replace(folder: Path, chance: random.Random) -> str:
    """Something else than a file, or a link."""
    file, way = _file(folder, chance), chance.choice(("fifo", "folder", "nothing", "zero", "loop", "link", "twin"))
    if way in ("link", "twin"):
        kept = folder.parent / f"{folder.name}-{'kept' if way == 'link' else 'twin'}"
        kept.mkdir()
        shutil.move(file, kept / "blob")
        os.symlink(kept / "blob", file)  # as the cache of the Hub has it
        if way == "twin":
            os.symlink(kept, file.parent / "more", target_is_directory=True)
        return SAME
    file.unlink()
    if way == "fifo":
        os.mkfifo(file)
    elif way == "folder":
        file.mkdir()
    elif way != "nothing":
        os.symlink({"zero": "/dev/zero", "loop": str(file)}[way], file)
    return SAME  # sentence-transformers needs no weights of some modules that have a file


def pickled(folder: Path, chance: random.Random) -> str:
    """Pickles beside the weights, or in their place; :func:`run` fills them."""
    file = _file(folder, chance)
    name = chance.choice(("pytorch_model.bin", "pytorch_model.bin", "adapter_model.bin", "model.bin", "evil.bin"))
    (file.parent / name).touch()
    way = chance.choice(("beside", "instead", "instead", "named", "adapter", "index"))
    if way == "instead":
        file.unlink()
    elif way == "named" and (file.parent / "config.json").is_file():
        _edit(file.parent / "config.json", transformers_weights=name)
    elif way == "adapter":
        (file.parent / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x/y"}')
    elif way == "index":
        content = {"weight_map": {"embeddings.word_embeddings.weight": name}}
        (file.parent / "model.safetensors.index.json").write_text(json.dumps(content))
    return SAME


def index(folder: Path, chance: random.Random) -> str:
    """An index that lies."""
    file = folder / "model.safetensors.index.json"
    content = json.loads(file.read_text())
    shards = content["weight_map"]
    key, other = chance.sample(sorted(shards), 2)
    outside = folder.parent / f"{folder.name}-outside.safetensors"
    shutil.copy(folder / shards[key], outside)
    names: list[Any] = [f"../{outside.name}", str(outside), "a\0.safetensors", "evil.bin", "", ".", "x.safetensors"]
    names += [3, None, ["a"], {}, shards[other], f"./{shards[key]}", f"{shards[key]}/", "model.safetensors.index.json"]
    way = chance.choice(("name", "name", "all", "type", "extra", "text", "fifo", "deep", "lost"))
    (folder / "evil.bin").touch()
    if way == "name":
        shards[key] = chance.choice(names)
    elif way == "all":
        content["weight_map"] = dict.fromkeys(shards, chance.choice(names))
    elif way == "type":
        content = chance.choice(({}, [], {"weight_map": []}, {"weight_map": {}}, {"weight_map": "x"}, 3, None))
    elif way == "extra":
        shards["foo"] = shards[key]
    elif way == "lost":
        (folder / shards[key]).unlink()
    text = {"text": "{", "deep": "[" * 100000}.get(way, json.dumps(content))
    file.write_text(text)
    if way == "fifo":
        file.unlink()
        os.mkfifo(file)
    return SAME


def layout(folder: Path, chance: random.Random) -> str:
    """Modules in other places."""
    file = folder / "modules.json"
    modules = json.loads(file.read_text())
    paths = ["..", "/", "/etc", "../..", "x", "./", ".", "a/../..", str(folder), str(folder.parent), "\0", "x" * 300]
    chance.choice(modules)["path"] = chance.choice([*paths, *(module["path"] for module in modules), None, 3, []])
    file.write_text(json.dumps(modules))
    return ANY  # a module reads the config of the folder that it is sent to


def sizes(folder: Path, chance: random.Random) -> str:
    """A config of a larger model."""
    config = chance.choice(sorted(folder.rglob("config.json")))
    fields = json.loads(config.read_text())
    nested = [fields, *(value for value in fields.values() if isinstance(value, dict))]
    where = chance.choice(nested)
    counts = [name for name, value in where.items() if type(value) is int and value > 1]
    if not counts:
        return SAME
    name = chance.choice(counts)
    where[name] = chance.choice((where[name] * 2, 60000, 10**6, 10**9, 2**63))
    config.write_text(json.dumps(fields))
    return CHANGED


def swap(folder: Path, chance: random.Random) -> str:
    """The file of another module."""
    files = sorted(folder.rglob("*.safetensors"))
    one, other = chance.choice(files), chance.choice(files)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    if chance.random() < 0.5:
        other.write_bytes(content)
    return SAME


def _has(name: str, count: int = 1) -> Callable[[Path], bool]:
    return lambda folder: len(list(folder.rglob(name))) >= count


MUTATIONS: dict[str, tuple[Callable[[Path], bool], Mutation]] = {
    function.__name__: (suits, function)  # type: ignore[attr-defined]
    for suits, functions in (
        (_has("*"), (flip_header, flip_data, cut, lie, flood, replace, pickled)),
        (_has("config.json"), (sizes,)),
        (_has("*"), (drop, rename, add, reshape, retype, poison, scale)),
        (_has("model.safetensors.index.json"), (index,)),
        (_has("modules.json"), (layout,)),
        (_has("*.safetensors", 2), (swap,)),
    )
    for function in functions
}
"""Name -> the folders that it suits, and what it does."""
