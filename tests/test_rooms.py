"""Rules that every room obeys: its folders open where polyrep is not installed, and give the same vectors."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import logging
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import QUERIES, run_python
from huggingface_hub import constants
from room_examples import EXAMPLES
from safetensors.torch import load_file, save_file
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Transformer
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig, BertModel
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import polyrep
from polyrep import InputError
from polyrep.hub.code import code_of
from polyrep.hub.example import Example
from polyrep.hub.polyrep_fields import shown
from polyrep.hub.polyrep_folder import fingerprints, fingerprints_of
from polyrep.registry import ROOMS

TEXTS = list(QUERIES.values())

# SparseEncoder opens a SentenceTransformer folder on purpose: it adds a layer to train, which is its own feature.
CONFUSABLE = {
    "SentenceTransformer": ["MultiVectorEncoder"],
    "SparseEncoder": ["SentenceTransformer", "MultiVectorEncoder"],
    "MultiVectorEncoder": ["SentenceTransformer", "SparseEncoder"],
}

FRESH = """
import copy, importlib.abc, json, pickle, sys
import numpy as np

class Absent(importlib.abc.MetaPathFinder):  # as if polyrep and the test room were not installed
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("polyrep", "modeling", "toy"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import sentence_transformers, torch
from transformers import AutoModel, AutoTokenizer

jobs = json.loads(sys.argv[1])
texts = jobs["texts"]
report = {}
for name, (folder, again, wrong) in jobs["folders"].items():
    entry = report[name] = {}
    family = json.load(open(f"{folder}/config_sentence_transformers.json"))["model_type"]
    try:
        getattr(sentence_transformers, family)(folder)
        entry["refused_without_flag"] = False
    except Exception:
        entry["refused_without_flag"] = True
    model = getattr(sentence_transformers, family)(folder, trust_remote_code=True, device="cpu")
    for task, encode in (("query", model.encode_query), ("document", model.encode_document)):
        vectors = encode(texts)
        entry[task] = [np.asarray(v.to_dense() if hasattr(v, "to_dense") else v, np.float64).tolist() for v in vectors]
    for how, made in (("copy", copy.deepcopy(model)), ("pickle", pickle.loads(pickle.dumps(model)))):
        second = pickle.loads(pickle.dumps(made))
        for task, encode in (("query", second.encode_query), ("document", second.encode_document)):
            vectors = [np.asarray(v.to_dense() if hasattr(v, "to_dense") else v, np.float64) for v in encode(texts)]
            entry[f"{how} {task}"] = [v.tolist() for v in vectors] == entry[task]
    entry["dimension"] = model.get_embedding_dimension()
    entry["module"] = type(model[-1]).__module__
    model.save_pretrained(again)  # what a user does, without any help of ours
    config = json.load(open(f"{folder}/config.json"))
    try:
        auto = AutoModel.from_pretrained(folder, trust_remote_code=True)
        entry["auto"] = [type(auto).__name__, config["architectures"][0]]
    except ValueError as error:
        entry["auto"] = ["refused", str(error)]
    entry["heads"] = []
    for module in json.load(open(f"{folder}/modules.json")):
        part = f"{folder}/{module['path']}"
        if module["path"] and json.load(open(f"{part}/config.json")).get("model_type", "").startswith("polyrep_"):
            head = AutoModel.from_pretrained(part, trust_remote_code=True)
            door = type(model[module["idx"]]).from_pretrained(part).model
            named = json.load(open(f"{part}/config.json"))["architectures"][0]
            sums = [float(sum(p.double().abs().sum() for p in m.parameters())) for m in (head, door)]
            entry["heads"].append([type(head).__name__, type(door).__name__, named, *sums])
    if config["model_type"].startswith("polyrep_"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            output = auto(**tokens, task="query")
        entry["auto_query"] = output.sentence_embedding.double().tolist() if "sentence_embedding" in output else None
        entry["last_hidden_state"] = "last_hidden_state" in output
    for other in wrong:
        try:
            getattr(sentence_transformers, other)(folder, trust_remote_code=True, device="cpu").encode(texts)
            entry[f"opened as {other}"] = True
        except Exception as error:
            entry[f"opened as {other}"] = False
refusals = {}
for name, folder in jobs["damaged"].items():
    try:
        AutoModel.from_pretrained(folder, trust_remote_code=True)
        refusals[name] = "opened"
    except ValueError as error:
        refusals[name] = str(error)
print("REPORT" + json.dumps([report, refusals]))
"""


@pytest.fixture(scope="module")
def examples(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Example]:
    return {room: build(backbone, tmp_path_factory.mktemp("example")) for room, build in EXAMPLES.items()}


@pytest.fixture(scope="module")
def saved(examples: dict[str, Example], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every example saved by polyrep, what is made of several modules in both forms: ``room/kind`` -> folder."""
    root = tmp_path_factory.mktemp("saved")
    return {
        f"{room}/{kind}": polyrep.save(model, root / room / kind, form="pipeline" if MODULES in kind else None)
        for room, kind, model in kinds(examples)
    }


DAMAGES: dict[str, Callable[[Any], Any]] = {
    "lacks {}": lambda weight: None,
    "has {} of": lambda weight: weight[:-1].contiguous() if weight.ndim else weight[None].repeat(2),
    "stores {} as": lambda weight: weight.to(torch.int8) if weight.is_floating_point() else weight.float(),
    "{} has values that are not finite": lambda weight: weight.index_fill(0, torch.tensor(0), torch.nan),
}
"""What AutoModel says of a weight -> what was done to it."""


@pytest.fixture(scope="module")
def damaged(saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every head and every model of ours with its largest weight of numbers damaged: what is to be said -> folder."""
    root = tmp_path_factory.mktemp("damaged")
    found: dict[str, Path] = {}
    for name, source in saved.items():
        for config in sorted(source.rglob("config.json")):
            if not json.loads(config.read_text()).get("model_type", "").startswith("polyrep_"):
                continue
            weights = load_file(config.parent / "model.safetensors")
            numbers = {key: w for key, w in weights.items() if w.is_floating_point() and w.ndim}
            key = max(numbers, key=lambda key: numbers[key].numel())
            for words, change in DAMAGES.items():
                folder = root / str(len(found))
                shutil.copytree(config.parent, folder)
                changed = {**weights, key: change(weights[key])}
                kept = {name: weight for name, weight in changed.items() if weight is not None}
                save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
                found[f"{name}/{config.parent.name}: {words.format(key)}"] = folder
            for elsewhere in ("../model.safetensors", "pytorch_model.bin"):
                folder = root / str(len(found))
                shutil.copytree(config.parent, folder, ignore=shutil.ignore_patterns("*.safetensors"))
                index = {"metadata": {}, "weight_map": dict.fromkeys(weights, elsewhere)}
                (folder / "model.safetensors.index.json").write_text(json.dumps(index))
                found[f"{name}/{config.parent.name}: its index names {elsewhere!r}"] = folder
    return found


def fresh_process(
    folders: dict[str, Path], again: Path, families: dict[str, str], damaged: dict[str, Path]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Open all folders in one process without polyrep, encode, and save each again as a user would."""
    jobs = {
        name: (str(folder), str(again / name), CONFUSABLE[families[name]] if "retriever" in name else [])
        for name, folder in folders.items()
    }
    again.mkdir(parents=True, exist_ok=True)
    bad = {name: str(folder) for name, folder in damaged.items()}
    result = run_python("-c", FRESH, json.dumps({"texts": TEXTS, "folders": jobs, "damaged": bad}), cwd=again)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.partition("REPORT")[2])


@pytest.fixture(scope="module")
def processes(
    saved: dict[str, Path],
    examples: dict[str, Example],
    damaged: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """What two fresh processes saw: the first opens our folders, the second what the first saved again."""
    families = {f"{room}/{kind}": type(model).__name__ for room, kind, model in kinds(examples)}
    root = tmp_path_factory.mktemp("again")
    first = fresh_process(saved, root / "first", families, damaged)
    second = fresh_process({name: root / "first" / name for name in saved}, root / "second", families, {})
    return [first, second]


@pytest.fixture(scope="module")
def opened(processes: list[tuple[dict[str, Any], dict[str, str]]]) -> list[dict[str, Any]]:
    """What they saw of the folders that are whole."""
    return [report for report, _ in processes]


def test_automodel_refuses_damaged_weights_without_polyrep(processes, damaged):
    refusals = processes[0][1]
    assert len(refusals) == len(damaged) >= 4 * len(ROOMS)
    for name, said in refusals.items():
        assert name.partition(": ")[2] in said, f"{name}: {said}"


def dense(vectors: Any) -> Any:
    """Vectors as numpy takes them: those of a SparseEncoder are sparse tensors."""
    return vectors.to_dense().numpy() if isinstance(vectors, torch.Tensor) else vectors


MODULES = "as modules"


def kinds(examples: dict[str, Example]) -> list[tuple[str, str, Any]]:
    found = [(room, kind, model) for room, example in examples.items() for kind, model in example.models.items()]
    return found + [(room, f"{kind} {MODULES}", model) for room, kind, model in found if len(model) > 1]


@pytest.mark.parametrize("process", ["after polyrep.save", "after a user's save"])
def test_folders_give_the_same_vectors_without_polyrep(examples, opened, process):
    seen = opened[process == "after a user's save"]
    for room, kind, model in kinds(examples):
        for task, encode in (("query", model.encode_query), ("document", model.encode_document)):
            for ours, theirs in zip(dense(encode(TEXTS)), seen[f"{room}/{kind}"][task], strict=True):
                np.testing.assert_allclose(np.asarray(ours), theirs, atol=1e-5, err_msg=f"{room}/{kind} {task}")
        assert seen[f"{room}/{kind}"]["dimension"] == model.get_embedding_dimension()


def test_a_model_that_has_encoded_can_be_copied_and_pickled_and_encodes_the_same(saved, opened):
    for seen in opened:
        for name in saved:
            for how in ("copy query", "copy document", "pickle query", "pickle document"):
                assert seen[name][how] is True, f"{name}: {how}"


def test_the_test_would_notice_other_vectors(examples):
    for room, _, model in kinds(examples):
        if examples[room].symmetric:
            continue
        queries, documents = dense(model.encode_query(TEXTS)), dense(model.encode_document(TEXTS))
        differ = [q.shape != d.shape or np.abs(q - d).max() > 1e-3 for q, d in zip(queries, documents, strict=True)]
        assert any(differ), "queries and documents must differ for task to be tested"


def test_the_task_of_a_batch_counts_as_that_of_the_call(examples):
    """Trainers of sentence-transformers put it there, by their ``router_mapping``."""
    for room, kind, model in kinds(examples):
        output = "token_embeddings" if isinstance(model, MultiVectorEncoder) else "sentence_embedding"
        for task in ("query", "document"):
            with torch.no_grad():
                expected = model(model.preprocess(TEXTS, task=task), task=task)[output]
                found = model(model.preprocess(TEXTS, task=task) | {"task": task})[output]
            torch.testing.assert_close(found, expected, msg=lambda said, of=f"{room}/{kind} {task}": f"{of}: {said}")


def test_automodel_gives_the_methods_class_in_both_worlds_or_refuses_what_is_modules(saved, opened):
    for name, folder in saved.items():
        if (folder / "0_Backbone").exists():
            with pytest.raises(
                ValueError, match=r"is a pipeline of Backbone.*subfolder '0_Backbone', and the head in"
            ):
                AutoModel.from_pretrained(folder, trust_remote_code=True)
            assert all("is a pipeline of Backbone" in seen[name]["auto"][1] for seen in opened), name
            continue
        here = type(AutoModel.from_pretrained(folder, trust_remote_code=True))
        assert here in [room.model for room in ROOMS.values()]
        for seen in opened:
            assert seen[name]["auto"] == [here.__name__, here.__name__]
        assert MODULES not in name


def test_heads_open_by_themselves_through_automodel_and_through_their_module(examples, opened):
    heads = 0
    for room, kind, model in kinds(examples):
        stay = MODULES in kind or not hasattr(ROOMS[room].model, "from_modules")
        own = [m.model for m in list(model)[1:] if getattr(m, "model", None) and stay]
        for seen in opened:
            entries = seen[f"{room}/{kind}"]["heads"]
            assert len(entries) == len(own)
            for head, (auto, door, named, *sums) in zip(own, entries, strict=True):
                assert auto == door == named == type(head).__name__
                expected = sum(p.detach().double().abs().sum().item() for p in head.parameters())
                np.testing.assert_allclose(sums, [expected, expected], rtol=1e-6)
                heads += 1
    assert heads


def test_automodel_gives_the_representation_and_no_token_states(examples, opened):
    for room, kind, model in kinds(examples):
        for seen in opened:
            entry = seen[f"{room}/{kind}"]
            assert not entry.get("last_hidden_state", False)
            if entry.get("auto_query") is not None:
                np.testing.assert_allclose(dense(model.encode_query(TEXTS)), entry["auto_query"], atol=1e-5)


def test_code_runs_only_with_the_users_flag(saved, opened):
    assert all(seen[name]["refused_without_flag"] for seen in opened for name in saved)


def test_a_retriever_opened_by_another_family_fails_instead_of_giving_other_vectors(opened):
    answers = {k: v for entry in opened[0].values() for k, v in entry.items() if k.startswith("opened as")}
    assert answers and not any(answers.values()), answers


def test_polyrep_load_opens_what_it_saved(examples, saved):
    for room, kind, model in kinds(examples):
        again = polyrep.load(saved[f"{room}/{kind}"], trust_remote_code=True, device="cpu")
        assert type(again) is type(model)
        for encode in ("encode_query", "encode_document"):
            found, expected = (dense(getattr(m, encode)(TEXTS)) for m in (again, model))
            for ours, theirs in zip(found, expected, strict=True):  # several vectors a text are no one array
                np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=1e-5, err_msg=f"{room}/{kind}")


def test_saved_folders_name_no_installed_package_and_state_their_requirements(saved):
    for folder in saved.values():
        for module in json.loads((folder / "modules.json").read_text()):
            stock = module["type"].startswith("sentence_transformers.")
            assert stock or (
                module["type"].count(".") == 1 and (folder / f"{module['type'].split('.')[0]}.py").is_file()
            )
        assert (
            json.loads((folder / "config_sentence_transformers.json").read_text())["requirements"]
            == polyrep.hub.code.REQUIREMENTS
        )
        assert not list(folder.rglob("*.bin")) and list(folder.rglob("*.safetensors"))


def test_a_dropped_weight_is_refused_by_load_and_automodel_and_a_new_one_follows_the_seed(examples, saved, tmp_path):
    for room, example in examples.items():
        if example.weight is None:
            continue
        folder = tmp_path / room
        shutil.copytree(saved[f"{room}/{next(iter(example.models))}"], folder)
        weights = load_file(folder / "model.safetensors")
        shape = weights.pop(example.weight).shape
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=example.weight):
            polyrep.load(folder, trust_remote_code=True)
        with pytest.raises(ValueError, match=f"lacks {example.weight}"):
            AutoModel.from_pretrained(folder, trust_remote_code=True)
        config, fresh = AutoConfig.from_pretrained(folder, trust_remote_code=True), []
        for _ in range(2):
            torch.manual_seed(0)
            fresh.append(AutoModel.from_config(config, trust_remote_code=True).get_parameter(example.weight))
        assert fresh[0].shape == shape and torch.equal(*fresh), "an initialised weight follows the seed"
        assert 0 < fresh[0].abs().max() < 1


def test_a_weight_dropped_from_a_head_in_a_pipeline_is_refused(examples, saved, tmp_path):
    for name, source in saved.items():
        for part in {json_part["path"] for json_part in json.loads((source / "modules.json").read_text())} - {""}:
            if (
                not json.loads((source / part / "config.json").read_text())
                .get("model_type", "")
                .startswith("polyrep_")
            ):
                continue
            folder = tmp_path / name
            shutil.copytree(source, folder)
            weights = load_file(folder / part / "model.safetensors")
            dropped = sorted(weights)[0]
            weights.pop(dropped)
            save_file(weights, folder / part / "model.safetensors", metadata={"format": "pt"})
            with pytest.raises(InputError, match=dropped):
                polyrep.load(folder, trust_remote_code=True)


def test_no_saved_config_tells_where_it_was_built(saved):
    for folder in saved.values():
        for config in folder.rglob("config.json"):
            assert str(folder.parent.parent.parent) not in config.read_text()


@pytest.fixture(scope="module")
def other(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The backbone with other weights of the same shape."""
    folder = tmp_path_factory.mktemp("other") / "other"
    shutil.copytree(backbone, folder)
    model = BertModel.from_pretrained(backbone)
    torch.nn.init.normal_(model.embeddings.word_embeddings.weight)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def recorded(examples: dict[str, Example], backbone: Path) -> dict[str, Any]:
    """Room -> its pipeline on the backbone, whose head says so."""
    found = {room: example.models["pipeline"] for room, example in examples.items() if "pipeline" in example.models}
    assert set(found) == {room_type for room_type, room in ROOMS.items() if room.module}
    for pipeline in found.values():
        config = pipeline[-1].model.config
        config.base_model_id, config.base_fingerprint = "org/ours", polyrep.hub.fingerprint(backbone)
    yield found
    for pipeline in found.values():
        pipeline[-1].model.config.base_model_id = pipeline[-1].model.config.base_fingerprint = None


def put_behind(first: Transformer, pipeline: Any, caplog: pytest.LogCaptureFixture) -> str:
    """The warnings of a pipeline that is put together with another first module."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        type(pipeline)(modules=[first, *list(pipeline)[1:]], device="cpu")
    return caplog.text


def said_behind(first: Transformer, pipeline: Any, caplog: pytest.LogCaptureFixture) -> str:
    """What a head says when it is put behind another first module: in a warning, or as it refuses."""
    try:
        return put_behind(first, pipeline, caplog)
    except ValueError as error:
        return str(error)


def test_a_head_behind_another_backbone_of_the_same_width_names_both(recorded, backbone, other, caplog):
    ours, theirs = polyrep.hub.fingerprint(backbone), polyrep.hub.fingerprint(other)
    for room, pipeline in recorded.items():
        said = said_behind(Transformer(str(other)), pipeline, caplog)
        assert "org/ours" in said and ours[:16] in said and theirs[:16] in said, room
        assert "the head was" in said, room


def test_a_head_is_silent_behind_its_own_backbone_and_where_none_is_known(recorded, backbone, other, tmp_path, caplog):
    in_memory = Transformer(str(other))
    in_memory.model.config.name_or_path = in_memory.model.name_or_path = ""
    half = Transformer(str(backbone), model_kwargs={"dtype": torch.bfloat16})
    polyrep.save(next(iter(recorded.values())), tmp_path / "pipeline", form="pipeline")
    taken_out = polyrep.load(tmp_path / "pipeline", trust_remote_code=True, device="cpu")[0]
    for room, pipeline in recorded.items():
        for first in (Transformer(str(backbone)), in_memory, half, taken_out):
            assert "fingerprint" not in put_behind(first, pipeline, caplog), room
        pipeline[-1].model.config.base_fingerprint = None
        assert "fingerprint" not in put_behind(Transformer(str(other)), pipeline, caplog), room


def test_a_head_behind_vectors_of_another_width_is_refused(recorded, backbone, tmp_path):
    config = BertConfig.from_pretrained(backbone, hidden_size=48, intermediate_size=64)
    BertModel(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(tmp_path)
    for pipeline in recorded.values():
        with pytest.raises(ValueError, match="width 48.*org/ours"):
            type(pipeline)(modules=[Transformer(str(tmp_path)), pipeline[-1]], device="cpu")


def test_a_backbone_is_known_by_its_folder_unless_a_head_is_in_it(saved):
    for name, folder in saved.items():
        module = SimpleNamespace(model=SimpleNamespace(name_or_path=str(folder)))
        parts = [json.loads(file.read_text()) for file in folder.glob("*/config.json")]
        has_head = any(part.get("model_type", "").startswith("polyrep_") for part in parts)
        expected = [] if has_head else fingerprints(folder)
        assert fingerprints_of(module) == expected, name


def test_a_head_knows_its_backbone_at_the_revision_that_was_loaded(recorded, backbone, other, caplog):
    """In the cache of the Hub, where several versions of a repository lie side by side."""
    cache = Path(constants.HF_HUB_CACHE) / "models--org--ours"
    old, new = "a" * 40, "b" * 40
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(new)
    for commit, folder in ((old, backbone), (new, other)):
        shutil.copytree(folder, cache / "snapshots" / commit)
    try:
        pinned = {"revision": old}
        first = Transformer("org/ours", model_kwargs=pinned, config_kwargs=pinned, processor_kwargs=pinned)
        for room, pipeline in recorded.items():
            assert "fingerprint" not in put_behind(first, pipeline, caplog), room
            pipeline[-1].model.config.base_fingerprint = "c" * 64
            assert "fingerprint cccc" in said_behind(first, pipeline, caplog), room
    finally:
        shutil.rmtree(cache)


def test_configs_refuse_bad_values_by_name(examples):
    for example in examples.values():
        assert example.bad_config
        for config_class, arguments, words in example.bad_config:
            with pytest.raises(ValueError, match=words):
                config_class(**arguments)


CONFIGS = [model.config_class for room in ROOMS.values() for model in (room.model, room.head) if model]
NO_FIELD = [float("nan"), -(10**18), 10**18, 10**400, [{}], {"a": 1}, ["x"], "\ud800", "no such choice\n"]
"""What no field of ours can be."""


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_each_field_of_a_config_is_refused_by_class_name_and_value(config):
    arguments = inspect.signature(config.__init__).parameters.values()
    fields = {
        argument.name: str(argument.annotation) for argument in arguments if argument.name not in ("self", "kwargs")
    }
    for field, annotation in (fields | dict.fromkeys(("base_model_id", "base_fingerprint"), "str | None")).items():
        wrong = [*NO_FIELD, *(["yes", 1, 0] if "bool" in annotation else [True])]
        wrong += [float("inf"), "1"] if "int" in annotation or "float" in annotation else [0.5]
        wrong += [1.0] if "float" not in annotation else []
        wrong = [5, "x", [], [{}]] if field.endswith("_config") else wrong
        for value in wrong:
            with pytest.raises(ValueError) as refused:
                config(**{field: value})
            message = str(refused.value)
            assert message.startswith(f"{config.__name__}: ") and field in message and "Use " in message, message
            if not field.endswith("_config"):
                assert f"{field}={shown(value)} " in message and len(message) < 500, message


def test_a_config_takes_nothing_that_is_part_of_its_class_nor_what_transformers_cannot_take():
    for config in CONFIGS:
        for field, value in {
            "to_dict": 1,
            "self": 1,
            "attribute_map": 5,
            "model_type": "bert",
            "dtype": "nn",
            "auto_map": 5,
            "id2label": {"a": 1},
            "num_labels": 10**9,
            "architectures": 7,
            "problem_type": [],
        }.items():
            with pytest.raises(ValueError, match=f"^{config.__name__}: {field}=") as refused:
                config(**{field: value})
            assert re.search("Use |eave it out", str(refused.value))


ENCODERS: dict[str, Any] = {
    "hidden_size": 10**9,
    "num_hidden_layers": 10**9,
    "num_attention_heads": 10**18,
    "intermediate_size": 10**18,
    "vocab_size": 10**10,
    "pad_token_id": 10**400,
    "max_position_embeddings": 10**18,
    "dtype": "nn",
}


@pytest.mark.parametrize("config", [c for c in CONFIGS if "encoder_config" in c.sub_configs], ids=lambda c: c.__name__)
def test_sizes_of_an_encoder_are_refused_before_it_is_made(config):
    started = time.process_time()
    for field, value in ENCODERS.items():
        encoder = {"model_type": "clip" if "text_config" in config.sub_configs else "bert", field: value}
        with pytest.raises(ValueError, match=rf"^{config.__name__}: encoder_config\.{field}="):
            config(encoder_config=encoder)
    inside: dict[str, Any] = {"model_type": "bert"}
    for _ in range(5_000):
        inside = {"model_type": "bert", "text_config": inside}
    for encoder in (
        inside,
        {"model_type": "no_such"},
        {"hidden_size": 8},
        {"model_type": []},
        {"model_type": "polyrep_toy"},
    ):
        with pytest.raises(ValueError, match=f"^{config.__name__}: encoder_config"):
            config(encoder_config=encoder)
    assert time.process_time() - started < 60


SHARED = sorted(Path(polyrep.hub.__file__).parent.glob("polyrep_*.py"))
"""Masters of what shipped files import from beside them."""


def shipped_files() -> list[Path]:
    return [*SHARED, *sorted({code_of(room.model.__module__)[0] for room in ROOMS.values()})]


@pytest.mark.parametrize("file", shipped_files(), ids=lambda p: p.name)
def test_shipped_files_import_only_what_every_machine_has(file):
    source = file.read_text()
    assert set(get_relative_imports(file)) <= {shared.stem for shared in SHARED}
    guarded = {
        inner
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Try)
        for statement in node.body
        for inner in (ast.unparse(n) for n in ast.walk(statement) if isinstance(n, ast.Import | ast.ImportFrom))
    }
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module in {shared.stem for shared in SHARED}:
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
        for name in names:
            package = name.split(".")[0]
            allowed = package in sys.stdlib_module_names or package in ("torch", "transformers")
            assert allowed or (package == "sentence_transformers" and ast.unparse(node) in guarded), ast.unparse(node)
        private = [a.name for a in node.names if a.name.startswith("_")] + [n for n in names if "._" in n]
        assert not [p for p in private if p != "annotations"], f"private names: {private}"
    assert set(get_imports(file)) - sys.stdlib_module_names <= {"torch", "transformers"}, (
        "a docstring line is taken for an import"
    )


def test_what_shipped_files_share_is_the_same_in_every_room():
    copies = [file for room in ROOMS.values() for file in code_of(room.model.__module__)[1:]]
    assert copies
    for copy in copies:
        master = next(shared for shared in SHARED if shared.name == copy.name)
        assert copy.read_bytes() == master.read_bytes(), f"{copy}: run `make rooms`"
    for shared in SHARED:  # which transformers would load twice: for a model, and for its config
        assert not re.search(r"^class \w+\(\w*Config\)", shared.read_text(), re.M)


@pytest.mark.parametrize("absent", ["", ".multi_vector_encoder.modules.token_pooling"])
def test_what_rooms_share_is_there_without_sentence_transformers_or_its_token_pooling(absent, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(f"sentence_transformers{absent}")]:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    file = next(shared for shared in SHARED if shared.stem == "polyrep_room")
    spec: Any = importlib.util.spec_from_file_location("polyrep.hub.polyrep_room_again", file)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert again.TokenPoolingModule.__mro__[2] is again.BaseTokenPooling is torch.nn.Module
    assert again.Transformer is (Transformer if absent else torch.nn.Module)


def test_one_config_class_and_model_type_for_each_model_class():
    models = [m for room in ROOMS.values() for m in (room.model, room.head) if m]
    types = [model.config_class.model_type for model in models]
    assert len({m.config_class for m in models}) == len(models) and len(set(types)) == len(types)
    assert all(t.startswith(polyrep.hub.folder.PREFIX) for t in types)


def test_save_leaves_nothing_half_written_and_keeps_other_files(examples, tmp_path, monkeypatch):
    model = next(iter(next(iter(examples.values())).models.values()))
    folder = polyrep.save(model, tmp_path / "model")
    (folder / "notes.txt").write_text("mine")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    monkeypatch.setattr(
        polyrep.hub.folder, "localize", lambda folder: (_ for _ in ()).throw(OSError("No space left on device"))
    )
    with pytest.raises(OSError, match="No space left"):
        polyrep.save(model, folder)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_rooms_are_the_packages_own_folders():
    methods = Path(polyrep.__file__).parent / "methods"  # of the clone, or of the installed wheel
    for room_type, room in ROOMS.items():
        if room_type != "polyrep_toy":
            assert Path(str(sys.modules[room.model.__module__].__file__)).parent.parent == methods
