"""Fixtures: models small enough to build in a test, and a run of the test room."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jinja2
import pytest
import torch
import toy  # noqa: F401  registers the test room
from conftest import write_beir
from safetensors.torch import load_file
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig, BertTokenizer
from world import write_world

import polyrep
from polyrep.hub.folder import packaged_minilm

HERE, SOURCE = Path(polyrep.__file__).parent, Path(__file__).parent.parent / "modeling"
assert HERE == SOURCE or "site-packages" in polyrep.__file__, f"tests of {SOURCE} would test {HERE}"

jinja2.Template = functools.cache(jinja2.Template)  # saving a model compiles the template of its card, always the same


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone"))


def write_backbone(folder: Path) -> Path:
    """A random BERT of two layers with a word-piece tokenizer, as a plain transformers folder. No dropout."""
    folder.mkdir(exist_ok=True)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *(f"##{x}" for x in letters),
        ":",
        "file",
        "port",
        "list",
    ]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shallow_backbone(tmp_path_factory: pytest.TempPathFactory, backbone: Path) -> Path:
    """The same with one layer, for tests whose time goes by the operations of a model."""
    folder = tmp_path_factory.mktemp("shallow")
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(backbone)
    config.num_hidden_layers = 1
    AutoModel.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sentence_model(backbone: Path) -> SentenceTransformer:
    return SentenceTransformer(modules=[Transformer(str(backbone)), Pooling(32, "mean")], device="cpu")


@pytest.fixture(scope="session")
def multi_vector_model(backbone: Path) -> MultiVectorEncoder:
    torch.manual_seed(1)
    dense = Dense(
        32,
        16,
        bias=False,
        activation_function=torch.nn.Identity(),
        module_input_name="token_embeddings",
        module_output_name="token_embeddings",
    )
    modules = [
        Transformer(str(backbone)),
        dense,
        MultiVectorMask(),
        Normalize(module_input_name="token_embeddings", module_output_name="token_embeddings"),
    ]
    return MultiVectorEncoder(modules=modules, device="cpu")


@pytest.fixture(scope="session")
def sparse_model(backbone: Path) -> SparseEncoder:
    torch.manual_seed(2)
    return SparseEncoder(
        modules=[Transformer(str(backbone)), Pooling(32, "mean"), SparseAutoEncoder(32, hidden_dim=64, k=8)],
        device="cpu",
    )


@pytest.fixture(scope="session")
def static_model() -> SentenceTransformer:
    """Bag of the real word vectors of all-MiniLM-L6-v2: quick, and it retrieves something."""
    folder = packaged_minilm()
    words = load_file(folder / "model.safetensors")["embeddings.word_embeddings.weight"].float()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=words.numpy())], device="cpu")


@pytest.fixture
def stock_run(tmp_path: Path) -> Path:
    """A run of stock modules: late interaction as sentence-transformers has it, made for another width."""
    run = tmp_path / "stock-run"
    run.mkdir()
    tokens = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    parts = {
        "": "base.modules.transformer.Transformer",
        "1_Dense": "base.modules.dense.Dense",
        "2_MultiVectorMask": "multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask",
        "3_Normalize": "base.modules.normalize.Normalize",
    }
    modules = [Dense(384, 128, bias=False, activation_function=torch.nn.Identity(), **tokens), MultiVectorMask()]
    for place, module in zip(list(parts)[1:], [*modules, Normalize(**tokens)], strict=True):
        (run / place).mkdir()
        module.save_config(str(run / place))
    listing = [
        {"idx": idx, "name": str(idx), "path": place, "type": f"sentence_transformers.{kind}"}
        for idx, (place, kind) in enumerate(parts.items())
    ]
    (run / "modules.json").write_text(json.dumps(listing))
    output = {"method": "forward", "method_output_name": "last_hidden_state"}
    settings = {"modality_config": {"text": output}, "module_output_name": "token_embeddings", "max_seq_length": 256}
    (run / "sentence_bert_config.json").write_text(json.dumps(settings))
    family = {"model_type": "MultiVectorEncoder", "similarity_fn_name": "maxsim"}
    (run / "config_sentence_transformers.json").write_text(json.dumps(family))
    recipe = {"objective": "MultiVectorMultipleNegativesRankingLoss", "card": "late_interaction", "report_to": "none"}
    (run / "recipe.yaml").write_text("# test\n" + json.dumps(recipe))
    return run


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory: pytest.TempPathFactory, backbone: Path) -> Path:
    """A run of the test room on the small data: a folder as under hub_configs/."""
    folder = tmp_path_factory.mktemp("hub_configs") / "toy"
    folder.mkdir()
    data = write_beir(folder.parent / "data" / "tiny", split="train")
    module = {
        "idx": 0,
        "name": "0",
        "path": "",
        "type": "sentence_transformers.base.modules.transformer.Transformer",
        "kwargs": ["task"],
    }
    (folder / "modules.json").write_text(json.dumps([module]))
    (folder / "config.json").write_text(json.dumps({"model_type": "polyrep_toy", "projection_dim": 6}))
    output = {"method": "forward", "method_output_name": "sentence_embedding"}
    settings = {
        "transformer_task": "feature-extraction",
        "modality_config": {"text": output},
        "module_output_name": "sentence_embedding",
        "unpad_inputs": False,
    }
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    (folder / "config_sentence_transformers.json").write_text(
        json.dumps({"model_type": "SentenceTransformer", "similarity_fn_name": "dot"})
    )
    recipe = {
        "backbone": str(backbone),
        "datasets": [str(data)],
        "objective": "ToyLoss",
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": "none",
        "disable_tqdm": True,
    }
    (folder / "recipe.yaml").write_text("# test\n" + json.dumps(recipe))
    return folder


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What POLYREP_DATA may name: invented pages, under the name of the corpus that every machine has."""
    return write_world(tmp_path_factory.mktemp("sets") / "python_docs").parent


@pytest.fixture(scope="session")
def vision(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that makes words of images."""
    from polyrep.methods.dense2sparse.example import build

    folder = tmp_path_factory.mktemp("vision")
    polyrep.save(build(backbone, folder).models["images"], folder / "model")
    return folder / "model"
