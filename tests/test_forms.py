"""A whole model as one folder and as modules: equal vectors, or a refusal where one folder cannot hold it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DOCUMENTS, QUERIES
from room_examples import EXAMPLES
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling
from transformers import AutoModel, AutoTokenizer

import polyrep
from polyrep import InputError
from polyrep.hub.cards import render_card
from polyrep.hub.forms import own_form
from polyrep.methods import (
    Dense2SparseModel,
    Dense2SparsePooling,
    GaussianPooling,
    LateInteractionModel,
    LemurConfig,
    LemurModel,
    LemurPooling,
    MultiLayerPooling,
    ReinPoolConfig,
    ReinPoolModel,
    ReinPoolPooling,
)
from polyrep.registry import ROOMS

TOKENS: Any = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
ASKED, TEXTS = list(QUERIES.values()), list(DOCUMENTS.values())


def dense(width: int, out: int, place: Any = TOKENS, **settings: Any) -> Dense:
    return Dense(width, out, **{"bias": False, "activation_function": torch.nn.Identity()} | place | settings)


BEHIND: dict[str, Any] = {
    "bare": lambda ids: [],
    "narrow": lambda ids: [dense(32, 16), MultiVectorMask(), Normalize(**TOKENS)],
    "two maps": lambda ids: [
        dense(32, 24, bias=True, activation_function=torch.nn.Tanh(), use_residual=True),
        dense(24, 24, use_residual=True),
        Normalize(**TOKENS),
    ],
    "unit length twice": lambda ids: [Normalize(**TOKENS), MultiVectorMask(), dense(32, 16), Normalize(**TOKENS)],
    "skip list": lambda ids: [
        dense(32, 16),
        MultiVectorMask(skiplist_words=[":", "a", "##s", "no such token"], skiplist_tasks=["query", "document"]),
    ],
    "patches": lambda ids: [MultiVectorMask(keep_only_token_ids=ids), Normalize(**TOKENS)],
    "query expansion": lambda ids: [dense(32, 16), MultiVectorMask(), Normalize(**TOKENS)],
}


def late_interaction(backbone: Path, kind: str) -> MultiVectorEncoder:
    torch.manual_seed(1)
    expansion: Any = {"strategy": "fixed", "attend": False, "length": 24} if kind == "query expansion" else None
    first = Transformer(str(backbone), query_expansion=expansion)
    ids = [first.tokenizer.get_vocab()[word] for word in ("file", "##s", "##e", "list")]
    return MultiVectorEncoder(modules=[first, *BEHIND[kind](ids)], prompts={"query": "list "}, device="cpu")


def attached(backbone: Any, method: str) -> Any:
    """A backbone with a random head behind it."""
    torch.manual_seed(2)
    width = backbone.get_embedding_dimension()
    if method == "lemur":
        head = LemurModel(LemurConfig(token_dim=width, latent_dim=24, num_anchors=40, rank=12, embedding_dim=10))
        with torch.no_grad():
            head.anchors.copy_(torch.nn.functional.normalize(torch.randn(40, width), dim=-1))
            for map_ in (head.query_map, head.document_map):
                map_.normal_()
        modules = [*backbone.children(), LemurPooling(head)]
        return SentenceTransformer(modules=modules, prompts=backbone.prompts, device="cpu")
    single = method == "reinpool-one"
    output = {"output": "sentence_embedding"} if single else {"num_vectors": 3, "pooling": "kmeans", "refinement": 1}
    pooling = ReinPoolPooling(ReinPoolModel(ReinPoolConfig(dim=width, projection=True, **output)))
    with torch.no_grad():
        for parameter in pooling.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    family: Any = SentenceTransformer if single else MultiVectorEncoder
    return family(modules=[*backbone.children(), pooling], prompts=backbone.prompts, device="cpu")


def vectors(model: Any, task: str) -> list[np.ndarray]:
    found = model.encode_query(ASKED) if task == "query" else model.encode_document(TEXTS)
    return [np.asarray(v.to_dense() if isinstance(v, torch.Tensor) else v) for v in found]


def assert_alike(ours: Any, theirs: Any) -> None:
    for task in ("query", "document"):
        for one, other in zip(vectors(ours, task), vectors(theirs, task), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("method", ["reinpool", "reinpool-one", "lemur"])
@pytest.mark.parametrize("kind", BEHIND)
def test_one_folder_gives_the_vectors_of_its_modules_to_the_bit(backbone, tmp_path, kind, method):
    model = attached(late_interaction(backbone, kind), method)
    folder = polyrep.save(model, tmp_path / "folder")
    opened = polyrep.load(folder)
    with torch.no_grad():  # as trainers of sentence-transformers tell it, by their router_mapping
        batch = opened.preprocess(ASKED, task="query")
        told, asked = (opened(dict(batch), task="query"), opened({**batch, "task": "query"}))
    for name in {"sentence_embedding", "token_embeddings"} & told.keys():
        assert torch.equal(told[name], asked[name])
    assert len(opened) == 1 and opened.prompts == model.prompts and type(opened) is type(model)
    assert opened.get_embedding_dimension() == model.get_embedding_dimension()
    assert_alike(opened, model)
    modules = polyrep.load(polyrep.save(opened, tmp_path / "modules", form="pipeline"))
    names = [type(module).__name__ for module in modules]
    assert names == ["Backbone", *(type(module).__name__ for module in list(model)[1:])]
    assert_alike(modules, model)
    again = polyrep.save(modules, tmp_path / "again", form="folder")
    assert polyrep.hub.fingerprint(again) == polyrep.hub.fingerprint(folder)


@pytest.mark.parametrize("kind", [kind for kind in BEHIND if kind != "query expansion"])
def test_automodel_gives_the_vectors_and_which_of_them_count(backbone, tmp_path, kind):
    model = attached(late_interaction(backbone, kind), "reinpool")
    folder = polyrep.save(model, tmp_path / "folder")
    whole = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    for task, texts in (("query", [f"list {text}" for text in ASKED]), ("document", TEXTS)):
        with torch.no_grad():
            output = whole(**tokenizer(texts, padding=True, return_tensors="pt"), task=task)
        assert (output.keep_probability is None) == (task == "query")
        for row, mask, expected in zip(output.token_embeddings, output.mask, vectors(model, task), strict=True):
            np.testing.assert_allclose(row[mask], expected, atol=1e-6)


def test_stock_modules_of_late_interaction_become_one_folder_and_are_stock_again(backbone, tmp_path):
    model = late_interaction(backbone, "skip list")
    stock = polyrep.save(model, tmp_path / "stock")
    assert not list(stock.glob("*.py"))
    folder = polyrep.save(model, tmp_path / "folder", form="folder")
    assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)) is LateInteractionModel
    opened = polyrep.load(folder)
    assert_alike(opened, model)
    again = polyrep.save(opened, tmp_path / "again", form="pipeline")
    assert not list(again.glob("*.py"))
    assert_alike(MultiVectorEncoder(str(again), device="cpu"), model)
    assert [part["type"] for part in json.loads((again / "modules.json").read_text())] == [
        part["type"] for part in json.loads((stock / "modules.json").read_text())
    ]


@pytest.mark.parametrize("method", ["lemur", "reinpool"])
def test_a_head_stands_on_late_interaction_in_one_folder(backbone, tmp_path, method):
    model = late_interaction(backbone, "narrow")
    late = polyrep.save(model, tmp_path / "late", form="folder")
    ours, theirs = attached(polyrep.load(late), method), attached(model, method)
    ours[-1].model.config.base_fingerprint = polyrep.hub.fingerprint(late)
    card: Any = ROOMS[ours[-1].inside].card
    assert str(render_card(ours, card)) == str(render_card(theirs, card))
    whole = polyrep.save(ours, tmp_path / "whole")
    modules = polyrep.save(polyrep.load(whole), tmp_path / "modules", form="pipeline")
    at_once = polyrep.save(ours, tmp_path / "at once", form="pipeline")
    assert polyrep.hub.fingerprint(at_once) == polyrep.hub.fingerprint(modules)
    for folder in (modules, at_once):  # whose backbone alone would else be what AutoModel opens
        with pytest.raises(ValueError, match="is a pipeline of Backbone, Dense"):
            AutoModel.from_pretrained(folder, trust_remote_code=True)
    for folder in (whole, modules, at_once):
        assert_alike(polyrep.load(folder), theirs)


SENTENCE: Any = {"module_input_name": "sentence_embedding"}
DENSE: dict[str, Any] = {
    "pooled": [],
    "unit": [Normalize()],
    "map": [dense(32, 16, SENTENCE, bias=True, activation_function=torch.nn.Tanh())],
    "unit, map, unit": [Normalize(), dense(32, 24, SENTENCE), Normalize()],
}


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("method", ["gaussian", "gaussian, as it is", "dense2sparse"])
def test_heads_on_pooled_vectors_take_what_stands_behind_the_pooling(backbone, tmp_path, method, kind, pooling):
    torch.manual_seed(3)
    modules = [Transformer(str(backbone)), Pooling(32, pooling), *DENSE[kind]]
    model = SentenceTransformer(modules=modules, device="cpu")
    width: Any = model.get_embedding_dimension()
    if method == "dense2sparse":
        head = Dense2SparseModel.from_backbone(model, query_top_k=20, document_top_k=30, average_length=5.0)
        with torch.no_grad():
            head.vocabulary.bias.normal_()
        whole: Any = SparseEncoder(modules=[*model.children(), Dense2SparsePooling(head)], device="cpu")
    else:
        last = GaussianPooling(input_dim=width, mean_dim=width // 2, normalize_input=method == "gaussian")
        with torch.no_grad():
            last.model.mean_map.add_(torch.randn_like(last.model.mean_map) * 0.3)
            last.model.variance_map.add_(torch.randn_like(last.model.variance_map) * 0.3)
        whole = SentenceTransformer(modules=[*model.children(), last], device="cpu")
    opened = polyrep.load(polyrep.save(whole, tmp_path / "folder", form="folder"))
    assert len(opened) == 1
    modules = polyrep.load(polyrep.save(opened, tmp_path / "modules", form="pipeline"))
    for ours in (opened, modules):
        for task in ("query", "document"):  # the head may normalise what a module did before it
            for one, other in zip(vectors(ours, task), vectors(whole, task), strict=True):
                np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-4)
    again = polyrep.load(polyrep.save(modules, tmp_path / "again"))
    assert len(again) == 1
    assert_alike(again, opened)


def other_module(backbone: Path) -> Any:
    return attached(MultiVectorEncoder(modules=[Transformer(str(backbone)), _Doubled()], device="cpu"), "reinpool")


class _Doubled(LayerNorm):
    """A module that is in no list: of its own class, and on token vectors."""

    def __init__(self) -> None:
        super().__init__(32)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return {**features, "token_embeddings": features["token_embeddings"] * 2}


REFUSED: dict[str, tuple[Any, str]] = {
    "another module": (other_module, "_Doubled is no such module"),
    "lower case": (
        lambda backbone: attached(
            MultiVectorEncoder(modules=[Transformer(str(backbone), do_lower_case=True)], device="cpu"), "reinpool"
        ),
        "makes texts lower-case",
    ),
    "another place": (
        lambda backbone: attached(
            MultiVectorEncoder(
                modules=[Transformer(str(backbone)), Normalize(module_input_name="elsewhere")],
                device="cpu",
            ),
            "reinpool",
        ),
        "Normalize works on elsewhere",
    ),
    "pooled in two ways": (
        lambda backbone: SentenceTransformer(
            modules=[Transformer(str(backbone)), Pooling(32, ("mean", "cls")), GaussianPooling(input_dim=64)],
            device="cpu",
        ),
        r"pooling \('mean', 'cls'\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_one_folder_cannot_hold_stays_modules_and_its_root_refuses(backbone, tmp_path, case):
    make, words = REFUSED[case]
    model = make(backbone)
    with pytest.raises(InputError, match=f"form='folder': .*{words}"):
        polyrep.save(model, tmp_path / "folder", form="folder")
    assert not (tmp_path / "folder").exists()
    if case == "another module":  # of the test, which no folder can carry
        return
    folder = polyrep.save(model, tmp_path / "modules")
    with pytest.raises(ValueError, match=r"is a pipeline of Backbone, .*trust_remote_code=True.*'0_Backbone'"):
        AutoModel.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises((ValueError, OSError)):
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert_alike(polyrep.load(folder), model)


def test_forms_that_a_model_cannot_have_are_refused(backbone, sentence_model, tmp_path):
    with pytest.raises(InputError, match="form='onnx': is no form of a model. Use folder or pipeline"):
        polyrep.save(sentence_model, tmp_path / "x", form="onnx")
    with pytest.raises(InputError, match=r"form='folder': Transformer \+ Pooling.*has no head of a method"):
        polyrep.save(sentence_model, tmp_path / "x", form="folder")
    example = EXAMPLES["polyrep_gaussian"](backbone, tmp_path)
    with pytest.raises(InputError, match="variance_from='var_token' is no vector that stock modules give"):
        polyrep.save(example.models["retriever"], tmp_path / "x", form="pipeline")
    assert not (tmp_path / "x").exists()


def test_a_head_is_taken_out_of_a_whole_models_folder(backbone, tmp_path):
    taken = 0
    for name, build in EXAMPLES.items():
        room = ROOMS[name]
        if not room.transformer or not room.module:
            continue
        scratch = tmp_path / name
        scratch.mkdir()
        for kind, model in build(backbone, scratch).models.items():
            folder = polyrep.save(model, scratch / f"{kind} saved")
            door: Any = room.module
            head = door.from_pretrained(str(folder)).model
            expected = polyrep.load(folder)[0].model.head.state_dict()
            assert type(head) is door.head_class and type(head.config) is door.head_class.config_class
            assert head.state_dict().keys() == expected.keys()
            assert all(torch.equal(value, expected[key]) for key, value in head.state_dict().items())
            taken += 1
    assert taken >= 8


def test_a_head_is_taken_out_of_a_folder_of_before(backbone, tmp_path):
    """Whose config lacks the fields that have come since."""
    folder = polyrep.save(EXAMPLES["polyrep_gaussian"](backbone, tmp_path).models["retriever"], tmp_path / "whole")
    config = json.loads((folder / "config.json").read_text())
    lacking = {name: value for name, value in config.items() if name not in ("equal_norms", "max_norm", "trunk")}
    (folder / "config.json").write_text(json.dumps(lacking | {"projection_dim": config["projection_dim"] - 1}))
    head = GaussianPooling.from_pretrained(str(folder)).model
    assert not head.config.equal_norms and head.config.projection_dim == config["projection_dim"] - 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("trunk", [{"type": "Normalize"}] * 65),
        ("trunk", [{"type": "Dense", "out_features": 10**9}]),
        ("trunk", {"type": "Dense"}),
        ("trunk", [{"type": "MultiVectorMask", "keep_only_token_ids": [1.5]}]),
        ("encoder_config", {"model_type": "bert", "hidden_size": 0}),
    ],
)
def test_a_damaged_trunk_is_refused_by_field(backbone, tmp_path, field, value):
    folder = polyrep.save(attached(late_interaction(backbone, "narrow"), "reinpool"), tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(ValueError, match=f"ReinPoolForRetrievalConfig: {field}"):
        AutoModel.from_pretrained(folder, trust_remote_code=True)


def test_a_head_of_another_width_is_refused_by_the_whole_models_config(backbone, tmp_path):
    folder = polyrep.save(attached(late_interaction(backbone, "narrow"), "reinpool"), tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dim": 8, "num_heads": 2}))
    with pytest.raises(ValueError, match="dim=8, but encoder and trunk give token vectors of width 16"):
        AutoModel.from_pretrained(folder, trust_remote_code=True)


def files_of(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("method", ["reinpool", "lemur"])
@pytest.mark.parametrize("before", ["older version", "pipeline", "shards"])
def test_of_a_model_in_the_same_place_nothing_stays(backbone, tmp_path, before, method):
    model, folder = attached(late_interaction(backbone, "narrow"), method), tmp_path / "model"
    if before == "older version":  # the backbone in the root
        model.save_pretrained(str(folder))
        polyrep.hub.localize(folder)
    else:
        polyrep.save(model, folder, form="pipeline" if before == "pipeline" else "folder")
    if before == "shards":
        polyrep.load(folder)[0].model.save_pretrained(folder, max_shard_size="10KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 1
    for name in ("notes.txt", "results.json", "1_Dense/mine.csv"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    opened = polyrep.load(folder)
    for form in ("folder", "folder", "pipeline", "folder"):  # the second time over what it was opened from
        polyrep.save(opened, folder, form=form, readme="")
        alone = polyrep.save(opened, tmp_path / "alone" / form, form=form, readme="")
        added = files_of(folder) - files_of(alone) - {file for file in files_of(folder) if file.endswith(".py")}
        assert added == {"notes.txt", "results.json", "1_Dense/mine.csv"}
        assert polyrep.hub.fingerprint(folder) == polyrep.hub.fingerprint(alone)
        assert_alike(polyrep.load(folder), model)


def test_a_model_alone_takes_the_place_of_weights_and_leaves_the_rest(backbone, tmp_path):
    folder = polyrep.save(attached(late_interaction(backbone, "narrow"), "lemur"), tmp_path / "model")
    before, whole = files_of(folder), polyrep.load(folder)
    whole[0].model.save_pretrained(folder, max_shard_size="10KB")
    polyrep.save(whole[0].model, folder)
    assert files_of(folder) == before
    assert_alike(polyrep.load(folder), whole)


def cut(backbone: Path, method: str) -> Any:
    usual: dict[str, Any]
    first, usual = Transformer(str(backbone)), {"prompts": {"x": ""}, "default_prompt_name": "x"}
    if method == "multilayer":
        head = MultiLayerPooling(layers=[-1, 1], pooling="scalar_mix", num_hidden_layers=2, hidden_size=32)
        return SentenceTransformer(modules=[first, head], truncate_dim=8, device="cpu", **usual)
    model = SentenceTransformer(modules=[first, Pooling(32, "mean")], device="cpu")
    head = Dense2SparseModel.from_backbone(model, average_length=5.0)
    modules = [*model.children(), Dense2SparsePooling(head)]
    return SparseEncoder(modules=modules, max_active_dims=7, device="cpu", **usual)


@pytest.mark.parametrize("method", ["multilayer", "dense2sparse"])
def test_each_form_keeps_how_many_numbers_count_and_the_usual_prompt(backbone, tmp_path, method):
    model = cut(backbone, method)
    for form in ("folder", "pipeline", "folder"):
        model = polyrep.load(polyrep.save(model, tmp_path / form, form=form))
        assert model.default_prompt_name == "x"
        for vector in vectors(model, "document"):
            assert vector.shape == (8,) if method == "multilayer" else 0 < np.count_nonzero(vector) <= 7


def test_a_form_is_told_of_layers_that_end_early(backbone):
    head = MultiLayerPooling(layers=[1], pooling="last", num_hidden_layers=2, hidden_size=32)
    assert own_form(SentenceTransformer(modules=[Transformer(str(backbone)), head], device="cpu")) is not None
