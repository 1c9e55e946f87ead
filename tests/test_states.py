"""Token states of an encoder on disk and in batches: those that the model itself gives for each text alone."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DOCUMENTS, QRELS, QUERIES
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoTokenizer, ModernBertConfig, ModernBertModel

from polyrep import InputError
from polyrep.data.dataset import RetrievalDataset
from polyrep.encoding import Embeddings, cache, embed
from polyrep.encoding.cache import open_cache
from polyrep.encoding.embeddings import joined, row_of, rows
from polyrep.encoding.windows import Windows
from polyrep.training.pairs import HeadData
from polyrep.training.sides import StatesSide

TEXTS = DOCUMENTS | {"long": "open the list of ports " * 9, "short": "x"}
HALF = {"rtol": 2**-11, "atol": 1e-6}  # float16 has 11 significant bits, and rounding errs by half of the last


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def alone(model: Any, text: str, layers: list[int]) -> tuple[np.ndarray, list[int]]:
    """``(tokens, layers, dim)`` of one text, unpadded, and its token ids."""
    tokens = model.tokenizer(text, truncation=True, max_length=model.max_seq_length, return_tensors="pt")
    with torch.no_grad():
        output = model[0].model.eval()(**tokens, output_hidden_states=True)
    states = [*output.hidden_states[:-1], output.last_hidden_state]
    return np.stack([states[layer][0].numpy() for layer in layers], 1), tokens["input_ids"][0].tolist()


def states_of(model: Any, texts: dict[str, str] = TEXTS, **options: Any) -> Embeddings:
    given: dict[str, Any] = {"task": "document", "kind": "states", "batch_size": 2, "show_progress": False}
    return embed(model, texts, **given | options)


@pytest.fixture(scope="module")
def modern(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    """An encoder that brings its last state to a norm of its own once more."""
    folder, size = tmp_path_factory.mktemp("modern"), {"hidden_size": 32, "intermediate_size": 48}
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=len(tokenizer), num_hidden_layers=2, num_attention_heads=4, pad_token_id=0, **size
    )
    ModernBertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return SentenceTransformer(modules=[Transformer(str(folder)), Pooling(32, "mean")], device="cpu")


@pytest.mark.parametrize("family", ["sentence_model", "modern"])
@pytest.mark.parametrize("chunk", [3, 40])
def test_a_cache_holds_the_states_of_each_token(request, monkeypatch, tmp_path, family, chunk):
    model = request.getfixturevalue(family)
    monkeypatch.setattr(cache, "CHUNK", chunk)
    found = states_of(model, cache_dir=tmp_path, layers=[-1, 0, 1])
    assert (found.kind, found.dim, len(found), str(found.values.dtype)) == ("states", 32, len(TEXTS), "float16")
    assert isinstance(found.values, np.memmap) and isinstance(found.indices, np.memmap)
    assert found.values.shape == (found.offsets[-1], 3, 32) and found.indices.shape == (found.offsets[-1],)
    for place, text in enumerate(TEXTS.values()):
        expected, ids = alone(model, text, [2, 0, 1])
        part = slice(*found.offsets[place : place + 2])
        assert found.indices[part].tolist() == ids
        np.testing.assert_allclose(found.values[part], expected, rtol=2**-10, atol=1e-3)
    assert found.lengths.max() == model.max_seq_length  # of the long text, which is cut there


def test_a_prompts_tokens_are_among_them(monkeypatch, sentence_model):
    monkeypatch.setitem(sentence_model.prompts, "query", "list: ")
    found = states_of(sentence_model, {"q": "port"}, task="query", layers=[1])
    expected, ids = alone(sentence_model, "list: port", [1])
    assert found.indices.tolist() == ids
    np.testing.assert_allclose(found.values, expected, **HALF)


def test_the_layers_are_part_of_the_key_by_their_place(tmp_path, sentence_model):
    first = states_of(sentence_model, cache_dir=tmp_path, layers=[-1])
    assert states_of(sentence_model, cache_dir=tmp_path, layers=(2,)).path == first.path
    other = states_of(sentence_model, cache_dir=tmp_path, layers=[1])
    assert other.path != first.path and not np.array_equal(other.values, first.values)
    again = open_cache(first.path)
    assert (again.kind, again.values.shape) == ("states", first.values.shape)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (None, r"layers \[\] of an encoder with 2 layers.*0 \(the embeddings\) to 2"),
        ([], r"layers \[\]"),
        ([3], r"layers \[3\] .*-3 to -1"),
        ([-4], r"layers \[-4\]"),
        ([2, -1], r"layers \[2, -1\] .*each once"),
    ],
)
def test_layers_that_are_not_there_are_refused(sentence_model, layers, words):
    with pytest.raises(InputError, match=words):
        states_of(sentence_model, layers=layers)


def test_layers_of_another_kind_and_models_without_layers_are_refused(sentence_model, static_model):
    with pytest.raises(InputError, match=r"layers \[1\] are for kind 'states', and 'sentence' is asked for"):
        states_of(sentence_model, kind="sentence", layers=[1])
    with pytest.raises(InputError, match="StaticEmbedding, which has no layers"):
        states_of(static_model, layers=[1])


def test_chosen_texts_and_blocks_keep_their_tokens(sentence_model):
    found = states_of(sentence_model, layers=[0, 2])
    order = np.array([6, 0, 3])
    chosen = rows(found, order)
    blocks = joined([rows(found, order[:1]), rows(found, order[1:])])
    for made in (chosen, blocks):
        for place, text in enumerate(order):
            one = row_of(found, int(text))
            part = slice(*made.offsets[place : place + 2])
            np.testing.assert_array_equal(made.values[part], one.values)
            np.testing.assert_array_equal(made.indices[part], one.indices)


def test_windows_have_states_of_their_own(sentence_model):
    windows = Windows.of(sentence_model, 8, None, "model")
    assert windows is not None
    found = states_of(sentence_model, layers=[1], windows=windows)
    pieces = [piece for text in TEXTS.values() for piece in windows.cut(text)]
    assert found.documents == len(TEXTS) < len(found) == len(pieces)
    for place, piece in enumerate(pieces):
        assert found.indices[slice(*found.offsets[place : place + 2])].tolist() == alone(sentence_model, piece, [1])[1]


def side(model: Any, **options: Any) -> StatesSide:
    given: dict[str, Any] = {"layers": [1, -1], "batch_size": 2, "show_progress": False}
    return StatesSide.encode(model, TEXTS, "document", "texts", **given | options)


def test_features_are_padded_states_with_their_tokens(sentence_model):
    found = side(sentence_model, first=10).features(np.array([6, 0]))  # the short text is padded
    assert found["index"].tolist() == [16, 10]
    for row, text in enumerate((TEXTS["short"], TEXTS["d1"])):
        expected, ids = alone(sentence_model, text, [1, 2])
        length = len(ids)
        assert found["input_ids"][row, :length].tolist() == ids and not found["input_ids"][row, length:].any()
        assert found["attention_mask"][row].tolist() == [1] * length + [0] * (len(found["input_ids"][0]) - length)
        np.testing.assert_allclose(found["token_states"][row, :length], expected, **HALF)
        assert not found["token_states"][row, length:].any()


@pytest.mark.parametrize("token", ["mean", "cls", "lasttoken"])
def test_one_vector_a_text_is_of_the_last_layer_that_is_kept(sentence_model, token):
    single = side(sentence_model, token=token).single("query")
    assert single.kind == "sentence" and single.offsets is None and single.values.shape == (len(TEXTS), 32)
    for vector, text in zip(single.values, TEXTS.values(), strict=True):
        last = alone(sentence_model, text, [2])[0][:, 0]
        expected = {"mean": last.mean(0), "cls": last[0], "lasttoken": last[-1]}[token]
        np.testing.assert_allclose(vector, expected, rtol=2e-3, atol=1e-3)


def test_one_vector_a_text_holds_few_states_in_memory():
    texts, tokens, dim = 1024, 32, 16
    values = np.ones((texts * tokens, 3, dim), np.float16)
    offsets = np.arange(texts + 1) * tokens
    found = StatesSide(Embeddings("states", values, offsets, np.zeros(len(values), np.int32), dim, 0.0, Path()))
    tracemalloc.start()
    single = found.single("document")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(single.values, np.ones((texts, dim), np.float32))
    assert most < values.nbytes / 2


def test_a_disk_that_is_too_small_for_all_states_is_told_after_some(sentence_model, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CHUNK", 3)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(InputError, match="a text takes .* kB, so 4 more need .* GB of the disk are free.*--cache_dir"):
        states_of(sentence_model, cache_dir=tmp_path, layers=[1])
    assert not list(tmp_path.iterdir())
    short = dict(list(TEXTS.items())[:2])
    assert len(states_of(sentence_model, short, cache_dir=tmp_path, layers=[1])) == 2


def test_pairs_of_states_come_in_batches_with_what_is_nearest(sentence_model):
    dataset = RetrievalDataset("tiny", "train", DOCUMENTS, QUERIES, QRELS)
    data = HeadData(kind="states", negatives=2, labels=True, depth=4)
    data.add(sentence_model, dataset, layers=[1, 2], show_progress=False)
    batch = data.collate([data[row] for row in range(len(data))])
    queries, documents = batch["features"]
    assert queries["token_states"].shape[::2] == (4, 2) and documents["token_states"].shape[::2] == (12, 2)
    assert documents["attention_mask"].shape == documents["token_states"].shape[:2] == documents["input_ids"].shape
    texts = {text: sentence_model.encode(text) for text in [*QUERIES.values(), *DOCUMENTS.values()]}
    place = list(DOCUMENTS)
    for row, query in enumerate(QUERIES.values()):
        near = sorted(DOCUMENTS, key=lambda d: -_cosine(texts[query], texts[DOCUMENTS[d]]))[:4]
        assert data.parts[0].nearest[row].tolist() == [place.index(document) for document in near]


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
