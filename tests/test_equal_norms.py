"""The number that makes all documents of a head equally long: inner product, cosine and L2 then rank alike."""

from __future__ import annotations

import logging
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DOCUMENTS, QUERIES, write_beir
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoModel, AutoTokenizer

import polyrep
from polyrep.cli import train
from polyrep.hub import example, fingerprint
from polyrep.methods import (
    GaussianHead,
    GaussianHeadConfig,
    GaussianModel,
    GaussianPooling,
    GaussianTransformer,
    LemurConfig,
    LemurModel,
    LemurPooling,
    ReinPoolConfig,
    ReinPoolModel,
    ReinPoolPooling,
)
from polyrep.publishing.export import export_onnx
from polyrep.search import open_index

TEXTS, ASKED = list(DOCUMENTS.values()), list(QUERIES.values())
DIVERGENCES = ("kl", "reverse_kl", "likelihood", "w2", "csd", "dot")


def gaussian(**config: Any) -> GaussianHead:
    torch.manual_seed(0)
    made = GaussianHead(GaussianHeadConfig(**{"input_dim": 24, "mean_dim": 12, "variance_groups": 3} | config))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made.eval()


def lemur(**config: Any) -> LemurModel:
    torch.manual_seed(0)
    made = LemurModel(
        LemurConfig(**{"token_dim": 12, "latent_dim": 20, "num_anchors": 60, "rank": 8, "embedding_dim": 8} | config)
    )
    with torch.no_grad():
        made.anchors.copy_(torch.nn.functional.normalize(torch.randn(60, 12), dim=-1))
        for name in ("document_map", "query_map", "document_mean"):
            getattr(made, name).normal_()
    return made.eval()


def reinpool(**config: Any) -> ReinPoolModel:
    torch.manual_seed(0)
    config = {"output": "sentence_embedding", "weights": "soft", "projection": True, "refinement": 1} | config
    made = ReinPoolModel(ReinPoolConfig(dim=12, **config))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made.eval()


def vectors(head: Any, task: str, count: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 24) if isinstance(head, GaussianHead) else (count, 5, 12)
    inputs = torch.randn(shape, generator=generator).to(head.dtype)
    with torch.no_grad():
        if isinstance(head, ReinPoolModel):
            features = {"token_embeddings": inputs, "attention_mask": torch.ones(inputs.shape[:2])}
            return ReinPoolPooling(head)(features, task=task)["sentence_embedding"]
        return head(inputs, task=task).sentence_embedding


def rankings(queries: torch.Tensor, documents: torch.Tensor) -> dict[str, list[list[int]]]:
    """Documents of each query, best first, a number at a time in float64."""
    q, d = queries.double().tolist(), documents.double().tolist()

    def product(x: list[float], y: list[float]) -> float:
        return math.fsum(a * b for a, b in zip(x, y, strict=True))

    scores = {
        "dot": product,
        "cosine": lambda x, y: product(x, y) / math.sqrt(product(x, x) * product(y, y)),
        "l2": lambda x, y: -math.fsum((a - b) ** 2 for a, b in zip(x, y, strict=True)),
    }
    return {
        name: [sorted(range(len(d)), key=lambda i, x=x: -score(x, d[i])) for x in q] for name, score in scores.items()
    }


HEADS = [
    *(pytest.param(gaussian, {"divergence": name, "normalize_mean": False}, id=name) for name in DIVERGENCES),
    pytest.param(gaussian, {}, id="unit means"),
    pytest.param(lemur, {}, id="lemur"),
    pytest.param(reinpool, {}, id="reinpool"),
    pytest.param(reinpool, {"normalize": False, "tasks": ["document", "query"]}, id="reinpool of both sides"),
]


@pytest.mark.parametrize(("make", "config"), HEADS)
def test_product_cosine_and_distance_rank_alike(make, config):
    plain, equal = make(**config).double(), make(**config, equal_norms=True).double()
    found = rankings(vectors(plain, "query", 6), vectors(plain, "document", 40, seed=2))
    assert not found["dot"] == found["cosine"] == found["l2"]
    equal.measure_norms([vectors(equal, "document", 40, seed=2)])
    documents = vectors(equal, "document", 40, seed=2)
    queries = vectors(equal, "query", 6)
    assert queries.shape[1] == documents.shape[1] and not queries[:, -1].any()
    np.testing.assert_allclose(documents.norm(dim=1), equal.config.max_norm, rtol=1e-6)
    again = rankings(queries, documents)
    assert again["dot"] == again["cosine"] == again["l2"] and equal.clipped == 0
    if make is not lemur:  # which gives up a direction for it
        width = "projection_dim" if make is gaussian else "embedding_dim"
        assert getattr(equal.config, width) == getattr(plain.config, width) + 1 == documents.shape[1]
        torch.testing.assert_close(documents[:, :-1], vectors(plain, "document", 40, seed=2))
        torch.testing.assert_close(queries[:, :-1], vectors(plain, "query", 6))
        assert again["dot"] == found["dot"]
    else:
        assert documents.shape[1] == plain.config.embedding_dim
        torch.testing.assert_close(documents[:, :-1], vectors(plain, "document", 40, seed=2)[:, :-1])


def test_the_number_is_the_root_of_what_is_left_with_room_for_longer_documents():
    head = gaussian(equal_norms=True)
    head.measure_norms(vectors(head, "document", 20, seed=seed) for seed in (2, 3))
    longest = max(float(vectors(gaussian(), "document", 20, seed=seed).norm(dim=1).max()) for seed in (2, 3))
    assert head.config.max_norm == pytest.approx(1.25 * longest, rel=1e-5)
    documents = vectors(head, "document", 20, seed=2).double()
    left = head.config.max_norm**2 - documents[:, :-1].square().sum(1)
    torch.testing.assert_close(documents[:, -1], left.sqrt(), rtol=1e-5, atol=0)


def test_longer_documents_are_scaled_back_and_counted(caplog):
    head = gaussian(equal_norms=True)
    whole = vectors(head, "document", 40)[:, :-1]
    head.config.max_norm = most = float(whole.norm(dim=1).median())
    longer = int((whole.norm(dim=1) > most).sum())
    assert 10 <= longer < 40
    with caplog.at_level(logging.WARNING):
        documents = vectors(head, "document", 40)
        vectors(head, "query", 40)
        vectors(head, "document", 40)
    assert head.clipped == 2 * longer
    said = [record.message for record in caplog.records if "max_norm" in record.message]
    assert len(said) == 1 and f": {longer} so far" in said[0] and "train the head again" in said[0]
    np.testing.assert_allclose(documents.norm(dim=1), most, rtol=1e-6)
    shortened = whole * (most / whole.norm(dim=1, keepdim=True)).clamp(max=1)
    torch.testing.assert_close(documents[:, :-1], shortened)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            vectors(head, "document", 40)
    said = [record.message for record in caplog.records if "max_norm" in record.message]
    assert head.clipped == 7 * longer and len(said) == 1 + (7 * longer >= 100)


def test_threads_lose_no_count():
    head = gaussian(equal_norms=True, max_norm=1e-3)
    workers = [threading.Thread(target=vectors, args=(head, "document", 8)) for _ in range(16)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert head.clipped == 16 * 8


@pytest.mark.parametrize("numbers", [(3.0, 4.0), (6.0, 8.0), (1.0, 1.0), (0.0, 0.0)])  # of lengths 5, 10, less, and 0
def test_gradients_are_finite_at_the_edge(numbers):
    head = gaussian(equal_norms=True, max_norm=5.0)
    document = torch.tensor([[*numbers, 0.0]], requires_grad=True)
    made = head.with_equal_norms(document, query=False)
    query = torch.tensor([1.0, 2.0, 3.0, 0.0])  # the slope of the root times 0 is no number where it is infinite
    (made @ query).sum().backward()
    if max(numbers) < 3:
        torch.testing.assert_close(document.grad, query[None, :3])
    made = head.with_equal_norms(document, query=False)
    made.square().sum().backward()
    assert torch.isfinite(document.grad).all()


def test_in_training_nothing_is_clipped_and_the_number_is_0():
    head = gaussian(equal_norms=True, max_norm=1e-3).train()
    made = vectors(head, "document", 5)
    torch.testing.assert_close(made[:, :-1], vectors(gaussian(), "document", 5))
    assert not made[:, -1].any() and head.clipped == 0
    assert not vectors(gaussian(equal_norms=True), "document", 5)[:, -1].any(), "not measured yet"


def test_half_precision_keeps_the_ranking():
    for make in (gaussian, lemur):
        head = make(equal_norms=True)
        head.measure_norms([vectors(head, "document", 40, seed=2)])
        exact = vectors(head, "query", 6) @ vectors(head, "document", 40, seed=2).T
        unit = [torch.nn.functional.normalize(vectors(head, task, n, seed=s), dim=1) for task, n, s in ASKED_OF]
        q, d = (side.bfloat16().float() for side in unit)
        scale = vectors(head, "query", 6).norm(dim=1, keepdim=True) * head.config.max_norm
        assert float((q @ d.T - exact / scale).abs().max()) < 2 * 2**-8
        cast = make(equal_norms=True, max_norm=head.config.max_norm).bfloat16()
        documents = vectors(cast, "document", 40, seed=2)
        assert documents.dtype == torch.float32  # where index vectors are made whatever the weights are
        np.testing.assert_allclose(documents.norm(dim=1), head.config.max_norm, rtol=1e-5)


ASKED_OF = (("query", 6, 1), ("document", 40, 2))


@pytest.mark.parametrize("make", [gaussian, lemur])
def test_a_compiled_head_clips_without_a_count(make):
    head = make(equal_norms=True, max_norm=1e-3)
    expected = {task: vectors(head, task, 7) for task in ("query", "document")}
    head.clipped = 0
    torch._dynamo.reset()
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn((7, 24) if make is gaussian else (7, 5, 12), generator=generator)
    with torch.no_grad():
        for task, exact in expected.items():
            torch.testing.assert_close(compiled(inputs, task=task).sentence_embedding, exact, rtol=1e-4, atol=1e-6)
    assert head.clipped == 0


# Configs


def test_the_number_comes_out_of_the_width_that_was_asked_for():
    made = GaussianHeadConfig(input_dim=384, variance_groups=1, equal_norms=True)
    assert (made.mean_dim, made.projection_dim) == (381, 384)
    assert GaussianHeadConfig(**made.to_diff_dict()).to_dict() == made.to_dict()
    with pytest.raises(ValueError, match=r"k \+ 16 \+ 1 \+ 1. Use 354 .mean_dim=336. or 370 .mean_dim=352."):
        GaussianHeadConfig(input_dim=384, variance_groups=16, projection_dim=369, equal_norms=True)
    control = GaussianHeadConfig(input_dim=384, divergence="dot", equal_norms=True)
    assert control.projection_dim == 384 and not control.equal_norms, "means of unit length are equally long"
    assert LemurConfig(embedding_dim=512, equal_norms=True).directions == 511
    assert LemurConfig(embedding_dim=513, equal_norms=True).directions == 512
    for config, words in (
        ({"embedding_dim": 514}, "embedding_dim=514, but only rank=512"),
        ({"embedding_dim": 2048}, "embedding_dim=2048 has no number to spare for equal_norms=True"),
        ({"embedding_dim": 1}, "embedding_dim=1 has no number to spare"),
        ({"embedding_dim": 8, "max_norm": 0.0}, "max_norm=0.0 does not fit. Use a number from 1e-06"),
    ):
        with pytest.raises(ValueError, match=words):
            LemurConfig(equal_norms=True, **config)


def test_a_head_of_before_opens_as_it_was(tmp_path):
    for make, kind in ((gaussian, GaussianHead), (lemur, LemurModel), (reinpool, ReinPoolModel)):
        head = make()
        head.save_pretrained(tmp_path / kind.__name__)
        file = tmp_path / kind.__name__ / "config.json"
        content = file.read_text()
        for line in ('  "equal_norms": false,\n', '  "max_norm": null,\n'):
            assert line in content
            content = content.replace(line, "")
        file.write_text(content)
        before = fingerprint(tmp_path / kind.__name__)
        opened = kind.from_pretrained(tmp_path / kind.__name__)
        assert not opened.config.equal_norms
        torch.testing.assert_close(vectors(opened, "document", 5), vectors(head, "document", 5), rtol=0, atol=0)
        opened.save_pretrained(tmp_path / "again" / kind.__name__)
        assert fingerprint(tmp_path / "again" / kind.__name__) == before
        opened.config.max_norm = 2.0
        opened.save_pretrained(tmp_path / "other" / kind.__name__)
        assert fingerprint(tmp_path / "other" / kind.__name__) != before


def test_a_lemur_head_opens_in_any_width_with_it_and_without(tmp_path):
    head = lemur(equal_norms=True)
    head.measure_norms([vectors(head, "document", 40)])
    head.save_pretrained(tmp_path)
    narrow = LemurPooling.from_pretrained(str(tmp_path), embedding_dim=4).model.eval()
    np.testing.assert_allclose(vectors(narrow, "document", 9).norm(dim=1), head.config.max_norm, rtol=1e-6)
    assert narrow.clipped == 0
    torch.testing.assert_close(vectors(narrow, "document", 9)[:, :3], vectors(head, "document", 9)[:, :3])
    whole = LemurPooling.from_pretrained(str(tmp_path), embedding_dim=20, equal_norms=False).model.eval()
    assert vectors(whole, "document", 9).shape == (9, 20)
    with pytest.raises(ValueError, match="embedding_dim=20 has no number to spare.*equal_norms=False"):
        LemurPooling.from_pretrained(str(tmp_path), embedding_dim=20)


# Doors


@pytest.fixture(scope="module")
def whole(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gaussian in one folder, measured on the small documents."""
    folder = tmp_path_factory.mktemp("equal") / "model"
    torch.manual_seed(3)
    made = GaussianModel.from_encoder(str(backbone), variance_groups=1, equal_norms=True)
    with torch.no_grad():
        for name in ("head.variance_map", "var_embedding"):
            made.get_parameter(name).add_(torch.randn_like(made.get_parameter(name)) * 0.3)
    model = example.one_folder(made, backbone, folder, transformer=GaussianTransformer)
    head = model[0].model.head
    head.measure_norms([torch.from_numpy(model.encode_document(TEXTS))])
    return polyrep.save(model, folder)


def test_every_door_gives_them_and_unit_length_ranks_alike(whole, tmp_path):
    model = SentenceTransformer(str(whole), trust_remote_code=True, device="cpu")
    queries, documents = model.encode_query(ASKED), model.encode_document(TEXTS)
    assert documents.shape[1] == model.get_embedding_dimension() == 32
    most = model[0].model.config.max_norm
    np.testing.assert_allclose(np.linalg.norm(documents, axis=1), most, rtol=1e-5)
    unit = [
        encode(x, normalize_embeddings=True)
        for encode, x in ((model.encode_query, ASKED), (model.encode_document, TEXTS))
    ]
    np.testing.assert_array_equal((-(queries @ documents.T)).argsort(1), (-(unit[0] @ unit[1].T)).argsort(1))
    tokens = AutoTokenizer.from_pretrained(whole)(TEXTS, padding=True, return_tensors="pt")
    auto = AutoModel.from_pretrained(whole, trust_remote_code=True)
    with torch.no_grad():
        np.testing.assert_allclose(auto(**tokens, task="document").sentence_embedding, documents, atol=1e-4)
    model.save_pretrained(str(tmp_path / "again"))
    again = SentenceTransformer(str(tmp_path / "again"), trust_remote_code=True, device="cpu")
    np.testing.assert_array_equal(again.encode_document(TEXTS), documents)
    assert fingerprint(tmp_path / "again") == fingerprint(whole)


def test_cosine_and_distance_are_allowed_once_measured(whole, sentence_model, backbone):
    scores = {}
    for name in ("dot", "cosine", "euclidean"):
        model = SentenceTransformer(str(whole), trust_remote_code=True, device="cpu", similarity_fn_name=name)
        scores[name] = model.similarity(model.encode_query(ASKED), model.encode_document(TEXTS))
    for name in ("cosine", "euclidean"):
        assert scores[name].argsort(1).tolist() == scores["dot"].argsort(1).tolist()
    with pytest.raises(ValueError, match="similarity_fn_name='manhattan'"):
        SentenceTransformer(str(whole), trust_remote_code=True, device="cpu", similarity_fn_name="manhattan")
    with pytest.raises(ValueError, match="truncate_dim=8 would cut"):
        SentenceTransformer(str(whole), trust_remote_code=True, device="cpu", truncate_dim=8)
    for config in ({}, {"equal_norms": True}):  # without the number, and before it is measured
        modules = [Transformer(str(backbone)), Pooling(32, "mean"), GaussianPooling(input_dim=32, **config)]
        with pytest.raises(ValueError, match="similarity_fn_name='cosine'.*--equal_norms true"):
            SentenceTransformer(modules=modules, device="cpu", similarity_fn_name="cosine")


def test_graphs_of_onnx_have_the_number_too(whole, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    folder = export_onnx([str(whole), "--output", str(tmp_path / "onnx")])
    model = SentenceTransformer(str(whole), trust_remote_code=True, device="cpu")
    tokens = AutoTokenizer.from_pretrained(whole)(TEXTS, padding=True, return_tensors="np")
    session = onnxruntime.InferenceSession(str(folder / "document.onnx"), providers=["CPUExecutionProvider"])
    feeds = {node.name: tokens[node.name] for node in session.get_inputs()}
    np.testing.assert_allclose(session.run(["sentence_embedding"], feeds)[0], model.encode_document(TEXTS), atol=1e-3)


def test_an_index_by_cosine_finds_what_the_inner_product_finds(whole, tmp_path):
    from polyrep.encoding import EncodedCorpus
    from polyrep.encoding.encode import encode

    data, found = write_beir(tmp_path / "tiny"), {}
    model = SentenceTransformer(str(whole), trust_remote_code=True, device="cpu", similarity_fn_name="cosine")
    folders = {"dot": whole, "cosine": polyrep.save(model, tmp_path / "cosine")}
    for name, folder in folders.items():
        encode([str(folder), "--input", str(data / "corpus.jsonl"), "--output", str(tmp_path / name / "shards")])
        index = open_index("memory:", fingerprint=fingerprint(folder))
        index.add(EncodedCorpus(tmp_path / name / "shards"))
        found[name] = [[hit.id for hit in hits] for hits in index.search(model.encode_query(ASKED), k=5)]
    assert found["dot"] == found["cosine"] and fingerprint(folders["dot"]) != fingerprint(folders["cosine"])


# Training


@pytest.fixture(scope="module")
def late(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A late-interaction model."""
    torch.manual_seed(0)
    names = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    narrow = Dense(32, 12, bias=False, activation_function=torch.nn.Identity(), **names)
    modules = [Transformer(str(backbone)), narrow, MultiVectorMask(), Normalize(**names)]
    folder = tmp_path_factory.mktemp("late") / "final"
    MultiVectorEncoder(modules=modules, device="cpu").save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def plain(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence encoder with unit vectors."""
    folder = tmp_path_factory.mktemp("plain") / "final"
    modules = [Transformer(str(backbone)), Pooling(32, "mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder))
    return folder


WHOLE = ["--bf16", "false", "--hard_negatives", "0", "--batch_sampler", "batch_sampler"]
LEMUR = "--latent_dim 24 --num_anchors 30 --rank 3 --embedding_dim 4 --num_tokens 60 --bf16 false".split()


@pytest.mark.parametrize(
    ("run", "more"),
    [
        ("gaussian-minilm-frozen", []),
        ("gaussian-minilm", WHOLE),
        ("lemur-minilm", LEMUR),
        ("reinpool-minilm-one", ["--depth", "4", "--warmup_steps", "0"]),
    ],
)
def test_training_measures_the_documents(run, more, plain, late, tmp_path):
    data, backbone = write_beir(tmp_path / "tiny", split="train"), plain if run.startswith("gaussian") else late
    flags = [run, "--backbone", str(backbone), "--datasets", str(data), "--output_dir", str(tmp_path / "run")]
    flags += ["--max_steps", "4", "--save_steps", "2", "--per_device_train_batch_size", "2", "--disable_tqdm", "true"]
    if run != "gaussian-minilm":
        flags += ["--cache_dir", str(tmp_path / "cache")]
    final = train([*flags, *more])
    model = SentenceTransformer(str(final), trust_remote_code=True, device="cpu")
    head = model[0].model.head
    documents, most = model.encode_document(TEXTS), head.config.max_norm
    np.testing.assert_allclose(np.linalg.norm(documents, axis=1), most, rtol=1e-4)
    lengths = np.linalg.norm(documents[:, :-1], axis=1)
    if run == "gaussian-minilm":  # the documents of the pairs
        lengths = lengths[[TEXTS.index(text) for text in TEXTS if text in _asked_for(data)]]
    assert head.clipped == 0 and 1.2 * lengths.max() < most < 1.3 * lengths.max()
    again = train([*flags, *more, "--resume_from_checkpoint", "last"])
    assert again == final


def _asked_for(data: Path) -> set[str]:
    rows = (data / "qrels" / "train.tsv").read_text().splitlines()[1:]
    return {DOCUMENTS[row.split("\t")[1]] for row in rows}
