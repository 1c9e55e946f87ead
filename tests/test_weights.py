"""Weight files of strangers: what opens holds every weight of the model, and all else is refused by name."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense, Router, Transformer
from sentence_transformers.sentence_transformer.modules import BoW, Pooling, StaticEmbedding, WordEmbeddings
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
from sentence_transformers.sparse_encoder.modules import SpladePooling
from tokenizers import Tokenizer
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

import polyrep
from polyrep import InputError
from polyrep.cli import main
from polyrep.hub.vision import VisionEncoder, fetch_vision
from polyrep.hub.weights import MOST_HEADER, read_header
from polyrep.methods.dense2sparse import Dense2SparseForRetrieval, Dense2SparseModel
from polyrep.methods.dense2sparse.vocabulary import head_from_words
from polyrep.methods.gaussian.modeling_gaussian import (
    GaussianHead,
    GaussianHeadConfig,
    GaussianModel,
    GaussianPooling,
)
from polyrep.methods.multilayer import MultiLayerModel
from polyrep.training.teachers import open_teacher

TEXTS = ["list open ports", "a file"]
SIZE = 61  # words of the backbone's tokenizer
WORDS = "embeddings.word_embeddings.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(backbone: Path, tmp_path: Path) -> Path:
    """A stock model of three modules, two of which have weights."""
    torch.manual_seed(3)
    modules = [Transformer(str(backbone)), Pooling(32, "mean"), Dense(32, 16)]
    return polyrep.save(SentenceTransformer(modules=modules, device="cpu"), tmp_path / "model")


@pytest.fixture
def words(backbone: Path, tmp_path: Path) -> Path:
    """A masked language model, whose output layer is its word embeddings."""
    torch.manual_seed(4)
    BertForMaskedLM(BertConfig.from_pretrained(backbone)).save_pretrained(tmp_path / "words")
    AutoTokenizer.from_pretrained(backbone).save_pretrained(tmp_path / "words")
    return tmp_path / "words"


def encoded(folder: Path) -> Any:
    return polyrep.load(folder, device="cpu").encode(TEXTS)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file({k: w.contiguous() for k, w in change(load_file(file)).items()}, file, metadata={"format": "pt"})


def shard(folder: Path, parts: int = 3) -> dict[str, Any]:
    """The weights in several files, and an index; returns it."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    place = {key: f"model-{number % parts}.safetensors" for number, key in enumerate(sorted(weights))}
    for file in set(place.values()):
        kept = {key: weights[key] for key in weights if place[key] == file}
        save_file(kept, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": place}
    (folder / INDEX).write_text(json.dumps(index))
    return index


def lacking(key: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda weights: {k: w for k, w in weights.items() if k != key})


def with_(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda weights: weights | {key: change(weights[key])})


LAYER = "encoder.layer.1.output.dense.weight"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lacking(LAYER), f"lack {LAYER} .1 in all., which would be random"),
        (lambda folder: edit(folder, lambda w: {f"x.{k}": v for k, v in w.items()}), f"lack {WORDS}, .*random"),
        (lambda folder: edit(folder, lambda w: {}), f"lack {WORDS}, .*random|no weights"),
        (with_(LAYER, lambda w: w.T), rf"{LAYER} is \[64, 32\], and the config asks for \[32, 64\]"),
        (with_(LAYER, lambda w: w[:-1]), rf"{LAYER} is \[31, 64\], and the config asks for \[32, 64\]"),
        (with_(LAYER, lambda w: w.to(torch.int8)), f"{LAYER} is stored as I8, .*fraction"),
        (with_(LAYER, lambda w: w.to(torch.float8_e4m3fn)), f"{LAYER} is stored as F8_E4M3"),
        (with_(LAYER, lambda w: w.index_fill(0, torch.tensor(2), torch.inf)), f"model.safetensors: .*{LAYER} has"),
        (lambda folder: lacking("linear.bias")(folder / "2_Dense"), "Dense: Missing.*linear.bias"),
        (
            lambda folder: with_("linear.weight", lambda w: w * torch.nan)(folder / "2_Dense"),
            "2_Dense/model.safetensors: linear.weight has values that are not finite",
        ),
        (lambda folder: edit_json(folder / "config.json", hidden_size=60000), r"\[61, 32\].*asks for \[61, 60000\]"),
        (lambda folder: edit_json(folder / "config.json", vocab_size=10**12), r"asks for \[1000000000000, 32\]"),
        (lambda folder: edit_json(folder / "config.json", num_hidden_layers=10**8), "num_hidden_layers=100000000"),
    ],
)
def test_weights_that_are_not_the_models_are_refused_by_name(folder, damage, words):
    damage(folder)
    started = time.process_time()
    with pytest.raises(InputError, match=f"(?s){words}"):
        polyrep.load(folder, device="cpu")
    assert time.process_time() - started < 60, "a model of these sizes was built"


def renamed(names: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda weights: {names(key): weight for key, weight in weights.items()})


@pytest.mark.parametrize(
    "change",
    [
        renamed("bert.{}".format),
        renamed(lambda key: key.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")),
        lambda folder: edit(folder, lambda weights: {k: w for k, w in weights.items() if "pooler" not in k}),
        lambda folder: edit(folder, lambda weights: weights | {"cls.predictions.bias": torch.ones(SIZE)}),
        lambda folder: shard(folder),
        lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": "b.safetensors"}}'),
        lambda folder: (folder / "2_Dense" / "pytorch_model.bin").write_bytes(b"no pickle"),
    ],
    ids=[
        "a larger model's",
        "old names",
        "no pooler",
        "more",
        "shards",
        "an index beside the file",
        "a pickle beside it",
    ],
)
def test_what_transformers_reads_as_the_same_weights_opens(folder, change):
    expected = encoded(folder)
    change(folder)
    assert np.array_equal(encoded(folder), expected)


def test_weights_that_are_links_into_a_cache_open(folder, tmp_path):
    expected = encoded(folder)
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.rglob("*.safetensors"))):
        shutil.move(file, tmp_path / "blobs" / str(number))
        file.symlink_to(tmp_path / "blobs" / str(number))
    assert np.array_equal(encoded(folder), expected)


def test_an_output_layer_that_is_the_word_embeddings_is_not_missing(words, tmp_path):
    modules = [Transformer(str(words), transformer_task="fill-mask"), SpladePooling()]
    model = SparseEncoder(modules=modules, device="cpu")
    again = polyrep.load(polyrep.save(model, tmp_path / "splade"), device="cpu")
    assert torch.equal(again.encode(TEXTS).to_dense(), model.encode(TEXTS).to_dense())
    lacking("cls.predictions.transform.dense.weight")(tmp_path / "splade")
    with pytest.raises(InputError, match="lack cls.predictions.transform.dense.weight"):
        polyrep.load(tmp_path / "splade")


def test_a_splade_folder_that_says_no_width_has_that_of_its_words(words, tmp_path):
    modules = [Transformer(str(words), transformer_task="fill-mask"), SpladePooling()]
    folder = polyrep.save(SparseEncoder(modules=modules, device="cpu"), tmp_path / "splade")
    assert json.loads((folder / "1_SpladePooling" / "config.json").read_text())["embedding_dimension"] is None
    model = polyrep.load(folder, device="cpu")
    assert model.get_embedding_dimension() == len(AutoTokenizer.from_pretrained(words)) == model.encode("a").shape[0]


class Trap:
    """What writes a file as it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return open, (self.marker, "w")


def static_routes(backbone: Path, folder: Path) -> Path:
    tokenizer = Tokenizer.from_file(str(backbone / "tokenizer.json"))
    routes = [[StaticEmbedding(tokenizer, embedding_dim=8)] for _ in range(2)]
    return polyrep.save(SentenceTransformer(modules=[Router.for_query_document(*routes)], device="cpu"), folder)


@pytest.mark.parametrize("name", ["", "2_Dense", "router"])
def test_a_pickle_in_place_of_weights_is_refused_and_never_read(folder, backbone, tmp_path, name):
    if name == "router":
        folder = static_routes(backbone, tmp_path / "router")
        name = next(path.parent.name for path in folder.glob("document*/model.safetensors"))
    (folder / name / "model.safetensors").unlink()
    (folder / name / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "marker")))
    with pytest.raises(InputError, match=f"{name}/pytorch_model.bin: pickled weights only.*convert"):
        polyrep.load(folder)
    assert not (tmp_path / "marker").exists()


def test_a_head_is_read_from_safetensors_alone_and_from_memory(tmp_path):
    torch.manual_seed(8)
    head = GaussianHead(GaussianHeadConfig(input_dim=4))
    weights = {name: torch.randn_like(weight) for name, weight in head.state_dict().items()}
    opened, found = GaussianHead.from_pretrained(
        None, config=head.config, state_dict=dict(weights), output_loading_info=True
    )
    assert not found["missing_keys"]
    assert all(torch.equal(opened.state_dict()[name], weight) for name, weight in weights.items())
    weights.pop("mean_map")
    with pytest.raises(ValueError, match="the state dict lacks mean_map .1 in all., which would be random"):
        GaussianHead.from_pretrained(None, config=head.config, state_dict=weights)
    head.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(head.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="no file named model.safetensors"):
        GaussianHead.from_pretrained(tmp_path)


@pytest.mark.parametrize("door", [GaussianHead.from_pretrained, polyrep.load, GaussianPooling.from_pretrained])
def test_a_config_of_a_larger_head_is_refused_before_it_takes_memory(tmp_path, door):
    GaussianHead(GaussianHeadConfig(input_dim=4, mean_dim=4)).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", input_dim=60_000, mean_dim=60_000, projection_dim=None)  # 14 GB a map
    started = time.process_time()
    with pytest.raises(ValueError, match=r"has mean_map of \[4, 4\], and the config asks for \[60000, 60000\]"):
        door(str(tmp_path))
    assert time.process_time() - started < 60


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ("../outside.safetensors", "'../outside.safetensors' is no safetensors file of this folder"),
        ("{tmp}/outside.safetensors", "outside.safetensors' is no safetensors file of this folder"),
        ("evil.bin", "'evil.bin' is no safetensors"),
        ("a\0.safetensors", "is no safetensors file"),
        ("C:a.safetensors", "is no safetensors file"),
        ("", "'' is no safetensors file"),
        (7, "'7' is no safetensors file"),
        (None, "'None' is no safetensors file"),
        ("gone.safetensors", "gone.safetensors: is missing, and model.safetensors.index.json names it"),
        ("model-0.safetensors", f"model-0.safetensors lacks {WORDS}"),
    ],
)
def test_an_index_that_lies_is_refused_by_what_it_says(folder, tmp_path, lie, words):
    index = shard(folder)
    shutil.copy(folder / index["weight_map"][WORDS], tmp_path / "outside.safetensors")
    assert index["weight_map"][WORDS] != "model-0.safetensors"
    index["weight_map"][WORDS] = lie.format(tmp=tmp_path) if isinstance(lie, str) else lie
    (folder / "evil.bin").write_bytes(pickle.dumps(Trap(tmp_path / "marker")))
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError) as refusal:
        polyrep.load(folder)
    assert words in str(refusal.value) and not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "content", ["{}", "[]", "3", '{"weight_map": {}}', '{"weight_map": ["a"]}', "[" * 100_000, "{"]
)
def test_an_index_without_a_map_is_refused(folder, content):
    shard(folder)
    (folder / INDEX).write_text(content)
    with pytest.raises(InputError, match=f"{INDEX}(: no weight_map|: holds|:1: not valid|: not valid)"):
        polyrep.load(folder)


@pytest.mark.parametrize("named", ["evil.bin", "adapter_model.bin", "../outside.safetensors", 3])
def test_a_config_that_names_other_weights_is_refused(folder, named):
    edit_json(folder / "config.json", transformers_weights=named)
    with pytest.raises(InputError, match="transformers_weights=.*names no safetensors in this folder"):
        polyrep.load(folder)


def test_only_the_usual_config_names_weights(folder):
    (folder / "evil.bin").write_bytes(b"evil")
    fields = json.loads((folder / "config.json").read_text()) | {"transformers_weights": "adapter_model.bin"}
    (folder / "config.4.0.0.json").write_text(json.dumps(fields))
    edit_json(folder / "config.json", configuration_files=["config.4.0.0.json"])
    with pytest.raises(InputError, match=r"config.4.0.0.json: names weights, which config.json alone may"):
        polyrep.load(folder)


def test_an_older_router_says_its_routes_in_its_config(backbone, tmp_path):
    torch.manual_seed(8)
    routes = {"query": [Dense(32, 8)], "document": [Dense(32, 8)]}
    modules = [Transformer(str(backbone)), Pooling(32, "mean"), Router(routes, default_route="query")]
    new = polyrep.save(SentenceTransformer(modules=modules, device="cpu"), tmp_path / "new")
    old = shutil.copytree(new, tmp_path / "old")
    (old / "2_Router" / "router_config.json").rename(old / "2_Router" / "config.json")
    expected = SentenceTransformer(str(new), device="cpu").encode_document(TEXTS)
    np.testing.assert_array_equal(polyrep.load(old, device="cpu").encode_document(TEXTS), expected)
    part = next((old / "2_Router").glob("*document*"))
    with_("linear.weight", lambda weight: weight * math.nan)(part)
    with pytest.raises(InputError, match="not finite"):
        polyrep.load(old)


def test_words_without_a_tokenizer_of_transformers_open(tmp_path):
    vocabulary = ["PADDING_TOKEN", "list", "file"]
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    words = WordEmbeddings(WhitespaceTokenizer(vocabulary, stop_words=[]), rows)
    saved = SentenceTransformer(modules=[words, Pooling(4, "mean")], device="cpu")
    opened = polyrep.load(polyrep.save(saved, tmp_path / "words"), device="cpu")
    np.testing.assert_allclose(opened.encode("list file"), rows[1:].mean(0))
    dense = Dense(
        2, 2, bias=False, activation_function=torch.nn.Identity(), init_weight=torch.tensor([[2.0, 3], [5, 7]])
    )
    counts = SentenceTransformer(modules=[BoW(["list", "file"], {}), dense], device="cpu")
    opened = polyrep.load(polyrep.save(counts, tmp_path / "counts"), device="cpu")
    np.testing.assert_allclose(opened.encode("file"), [3, 7])


@pytest.mark.parametrize("damage", ["lacking", "not finite", "pickle"])
def test_a_teacher_scores_with_all_its_weights(words, damage):
    config = BertConfig.from_pretrained(words, num_labels=1)
    BertForSequenceClassification(config).save_pretrained(words)
    assert isinstance(open_teacher(str(words)), CrossEncoder)
    if damage == "pickle":
        (words / "model.safetensors").rename(words / "other.safetensors")
        (words / "pytorch_model.bin").write_bytes(b"evil")
    elif damage == "lacking":
        lacking("bert.pooler.dense.weight")(words)  # which the classifier stands on
    else:
        with_("classifier.weight", lambda weight: weight * math.nan)(words)
    with pytest.raises(InputError, match=damage if damage == "not finite" else "lack .*pooler|pickled weights only"):
        open_teacher(str(words))


VISION = "layernorm.weight"


@pytest.mark.parametrize("damage", ["lacking", "pooler", "not finite", "pickle", "code"])
def test_a_vision_encoder_is_looked_at_like_any_model(tmp_path, damage):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    assert VisionEncoder.open(fetch_vision(str(tmp_path)), torch.float32).get_embedding_dimension() == 8
    if damage == "pickle":
        (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
        (tmp_path / "pytorch_model.bin").write_bytes(b"evil")
    elif damage == "code":
        edit_json(tmp_path / "config.json", attn_implementation="someone/else")
    elif damage == "not finite":
        with_(VISION, lambda weight: weight * math.nan)(tmp_path)
    else:
        lacking(VISION if damage == "lacking" else "pooler.dense.weight")(tmp_path)
    words = {"pickle": "pickled weights only", "code": "code of another repository", "not finite": "not finite"}
    with pytest.raises(InputError, match=words.get(damage, f"lack .*{VISION}|lack pooler")):
        VisionEncoder.open(fetch_vision(str(tmp_path)), torch.float32)


def test_words_come_from_a_model_with_all_its_weights(words, sentence_model):
    backbone = polyrep.load(sentence_model, device="cpu") if isinstance(sentence_model, Path) else sentence_model
    assert head_from_words(str(words), backbone, own_tokens="none")[0].config.vocab_size == SIZE
    lacking("bert.embeddings.word_embeddings.weight")(words)
    with pytest.raises(InputError, match=f"lack {WORDS}"):
        head_from_words(str(words), backbone, own_tokens="none")


@pytest.mark.parametrize("run", ["late-interaction-minilm", "gaussian-minilm"])
def test_a_run_takes_no_backbone_without_its_weights(backbone, beir, tmp_path, capsys, run):
    shutil.copytree(backbone, tmp_path / "damaged")
    lacking(LAYER)(tmp_path / "damaged")
    flags = ["--datasets", str(beir), "--output_dir", str(tmp_path / "out"), "--hard_negatives", "0", "--dry_run"]
    assert main(["train", run, "--backbone", str(tmp_path / "damaged"), *flags]) == 2
    assert f"lack {LAYER}" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["model.safetensors", "2_Dense/model.safetensors", INDEX])
def test_what_is_no_regular_file_is_not_waited_for(folder, place):
    if place == INDEX:
        shard(folder)
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink(path, path)):
        (folder / place).unlink()
        make(folder / place)
        with pytest.raises(InputError, match=f"{place}.*(no regular file|cannot be read)"):
            polyrep.load(folder)
        if (folder / place).is_dir():
            (folder / place).rmdir()
            (folder / place).touch()


def write_header(file: Path, header: str | bytes, data: bytes = b"", length: int | None = None) -> None:
    made = header.encode() if isinstance(header, str) else header
    file.write_bytes((len(made) if length is None else length).to_bytes(8, "little") + made + data)


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    ("header", "length", "words"),
    [
        ("{" + ENTRY[1:], None, "damaged"),
        ('{"a":' + ENTRY + ',"a":' + ENTRY + "}", None, "a name occurs twice"),
        ('{"a":' + ENTRY + ',"b":' + ENTRY + "}", None, "damaged"),
        ('{"a":' + ENTRY.replace("[1]", "[2]") + "}", None, "damaged"),
        ('{"a":' + ENTRY.replace("0,4", "0,400") + "}", None, "damaged"),
        ('{"a":' + ENTRY.replace("[1]", "[60000,60000]") + "}", None, "damaged"),
        ("[" * 100_000, None, "damaged"),
        ("{}", 2**63, "a header of 9,223,372,036,854,775,808"),
        ("", 7, "8 bytes"),
        ("{" + ",".join(f'"w{n}":{ENTRY}' for n in range(100_001)) + "}", None, "100,001 tensors"),
    ],
    ids=range(10),
)
def test_a_header_that_cannot_be_believed_is_refused(tmp_path, header, length, words):
    write_header(tmp_path / "model.safetensors", header, bytes(4) if header else b"", length)
    with pytest.raises(InputError, match=words):
        read_header(tmp_path / "model.safetensors")


def test_a_header_is_read_with_a_bound(tmp_path):
    file = tmp_path / "model.safetensors"
    write_header(file, "", length=MOST_HEADER + 1)
    os.truncate(file, MOST_HEADER + 100)  # a hole, which takes no place
    with pytest.raises(InputError, match="a header of 100,000,001 bytes"):
        read_header(file)


def test_a_header_says_names_types_and_shapes(tmp_path):
    write_header(tmp_path / "x.safetensors", '{"__metadata__":{"format":"pt"},"a":' + ENTRY + "}", bytes(4))
    assert read_header(tmp_path / "x.safetensors") == {"a": (tmp_path / "x.safetensors", "F32", (1,))}


@pytest.fixture
def colbert(backbone: Path, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """An original ColBERT checkpoint, and its projection."""
    torch.manual_seed(5)
    folder = tmp_path / "colbert"
    shutil.copytree(backbone, folder)
    edit_json(folder / "config.json", architectures=["HF_ColBERT"])
    (folder / "artifact.metadata").write_text(json.dumps({"doc_maxlen": 20, "query_maxlen": 8}))
    linear = torch.randn(8, 32)
    edit(folder, lambda weights: {f"bert.{k}": w for k, w in weights.items()} | {"linear.weight": linear})
    return folder, linear


@pytest.mark.parametrize("sharded", [False, True])
def test_an_original_colbert_checkpoint_opens_with_its_projection(colbert, sharded):
    folder, linear = colbert
    if sharded:
        shard(folder)
    model = polyrep.load(folder, device="cpu")
    assert type(model) is MultiVectorEncoder and torch.equal(model[1].linear.weight, linear)
    [tokens] = model.encode_document(["ports"])
    inputs = model.tokenizer(model.prompts["document"] + "ports", return_tensors="pt")
    with torch.no_grad():
        states = BertModel.from_pretrained(folder)(**inputs).last_hidden_state[0]
    expected = torch.nn.functional.normalize(states @ linear.T, dim=-1)
    kept = [row for row in expected if (row @ tokens.T).max() > 1 - 1e-5]  # punctuation is left out
    assert len(kept) == len(tokens) > 2


@pytest.mark.parametrize("sharded", [False, True])
def test_a_colbert_checkpoint_without_its_projection_is_refused(colbert, sharded):
    folder, _ = colbert
    lacking("linear.weight")(folder)
    if sharded:
        shard(folder)
    with pytest.raises(InputError, match="without linear.weight, .*random"):
        polyrep.load(folder, device="cpu")


def test_a_projection_of_another_width_is_refused(colbert):
    folder, _ = colbert
    with_("linear.weight", lambda weight: weight[:, 1:])(folder)
    with pytest.raises(InputError, match=r"linear.weight is \[8, 31\] of F32, and cannot map states of width 32"):
        polyrep.load(folder, device="cpu")


@pytest.mark.parametrize("family", ["MultiVectorEncoder", "SparseEncoder", "ColBERT"])
def test_a_family_that_would_add_random_layers_to_a_bare_model_is_refused(backbone, tmp_path, family):
    shutil.copytree(backbone, tmp_path / "bare")
    (tmp_path / "bare" / "config_sentence_transformers.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(InputError, match="names no modules, and a (Dense|SparseAutoEncoder) .*random"):
        polyrep.load(tmp_path / "bare", device="cpu")


def test_a_folder_of_pylate_opens_with_and_without_its_name(backbone, tmp_path):
    torch.manual_seed(6)
    dense = Dense(32, 8, bias=False, activation_function=torch.nn.Identity(), module_input_name="token_embeddings")
    model = MultiVectorEncoder(modules=[Transformer(str(backbone)), dense], device="cpu")
    model.save_pretrained(str(tmp_path / "named"))
    listing = json.loads((tmp_path / "named" / "modules.json").read_text())[:2]
    listing[1]["type"] = "pylate.models.Dense.Dense"
    (tmp_path / "named" / "modules.json").write_text(json.dumps(listing))
    settings = {"model_type": "ColBERT", "query_prefix": "[Q] ", "document_prefix": "[D] ", "document_length": 20}
    (tmp_path / "named" / "config_sentence_transformers.json").write_text(json.dumps(settings))
    shutil.copytree(tmp_path / "named", tmp_path / "unnamed")
    settings.pop("model_type")
    (tmp_path / "unnamed" / "config_sentence_transformers.json").write_text(json.dumps(settings))
    opened = [polyrep.load(tmp_path / name, device="cpu") for name in ("named", "unnamed")]
    assert [type(each) for each in opened] == [MultiVectorEncoder] * 2
    for ours, theirs in zip(*(each.encode_document(TEXTS) for each in opened), strict=True):
        assert ours.shape[1] == 8 and torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))


def test_vectors_of_words_open_as_model2vec_writes_them_and_fewer_than_words_are_refused(backbone, tmp_path):
    torch.manual_seed(7)
    rows = torch.randn(SIZE, 8)
    save_file({"embeddings": rows}, tmp_path / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(backbone / "tokenizer.json"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "model2vec", "architectures": ["StaticModel"]}))
    module = {"idx": 0, "name": "0", "path": ".", "type": "sentence_transformers.models.StaticEmbedding"}
    (tmp_path / "modules.json").write_text(json.dumps([module]))
    numbers = tokenizer.encode("list a file", add_special_tokens=False).ids
    np.testing.assert_allclose(polyrep.load(tmp_path).encode("list a file"), rows[numbers].mean(0), atol=1e-6)
    save_file({"embeddings": rows[:-1].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="61 tokens and the weights 60 rows"):
        polyrep.load(tmp_path)


BACKBONES = {
    "gaussian": GaussianModel.from_encoder,
    "multilayer": MultiLayerModel.from_encoder,
    "dense2sparse": Dense2SparseForRetrieval.from_encoder,
    "words": lambda folder: Dense2SparseModel.from_mlm(folder, 32),
}


@pytest.mark.parametrize("made", BACKBONES)
@pytest.mark.parametrize("damage", ["lacks", "not finite"])
def test_a_method_is_made_of_no_backbone_with_random_or_broken_weights(backbone, tmp_path, made, damage):
    folder = shutil.copytree(backbone, tmp_path / "backbone")
    assert BACKBONES[made](str(folder)) is not None
    weights = load_file(folder / "model.safetensors")
    if damage == "lacks":
        weights = {f"x.{name}": weight for name, weight in weights.items()}
    else:
        weights[WORDS][3, 3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=damage):
        BACKBONES[made](str(folder))
