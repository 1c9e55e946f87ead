"""What a teacher says of pairs reaches every objective that asks for it, against loops; and is kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DOCUMENTS, QUERIES, write_beir
from room_examples import EXAMPLES
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.multi_vector_encoder.losses import MultiVectorMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from test_reinpool import DOCUMENT_OF, LABELS, random_head
from test_reinpool import batch as reinpool_batch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

import polyrep
from polyrep.cli import train
from polyrep.data import load_retrieval_dataset
from polyrep.errors import InputError
from polyrep.methods import LateInteractionConfig, MultiLayerHead, MultiLayerHeadConfig
from polyrep.methods.late_interaction import LateInteractionObjective
from polyrep.methods.multilayer import MultiLayerHeadObjective
from polyrep.methods.reinpool import SoftGateObjective
from polyrep.training.losses import taught
from polyrep.training.pairs import HeadData
from polyrep.training.teachers import open_teacher, score_pairs

TEXTS = list(DOCUMENTS.values())
PAIRS = np.array([[0, 1], [2, 4], [1, 0], [0, 3], [2, 2]])

batch = reinpool_batch  # the fixture


@pytest.fixture(scope="module")
def cross_encoder(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "ce"
    torch.manual_seed(5)
    BertForSequenceClassification(BertConfig.from_pretrained(backbone, num_labels=1)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(folder)
    return folder


@pytest.fixture
def plain(backbone: Path, tmp_path: Path) -> Path:
    modules = [Transformer(str(backbone)), Pooling(32, "mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(tmp_path / "plain"))
    return tmp_path / "plain"


def by_order(scores: list[float], teacher: list[float]) -> float:
    rank = {i: 1 + sorted(scores, reverse=True).index(s) for i, s in enumerate(scores)}
    return sum(
        abs(1 / rank[i] - 1 / rank[j]) * math.log1p(math.exp(scores[j] - scores[i]))
        for i in range(len(scores))
        for j in range(len(scores))
        if teacher[i] > teacher[j]
    )


def by_scores(scores: list[float], teacher: list[float]) -> float:
    def log_softmax(x: list[float]) -> list[float]:
        total = math.log(sum(map(math.exp, x)))
        return [value - total for value in x]

    return sum(math.exp(t) * (t - s) for t, s in zip(log_softmax(teacher), log_softmax(scores), strict=True))


FOLLOW = {"order": by_order, "scores": by_scores}


@pytest.mark.parametrize("follow", FOLLOW)
def test_distillation_is_that_of_loops(follow):
    torch.manual_seed(0)
    scores, teacher = torch.randn(3, 5), torch.randn(3, 5)
    expected = np.mean([FOLLOW[follow](*row) for row in zip(scores.tolist(), teacher.tolist(), strict=True)])
    assert float(taught(scores, teacher, follow)) == pytest.approx(expected, rel=1e-5)
    assert float(taught(teacher, teacher, "scores")) == pytest.approx(0, abs=1e-6)


def test_a_cross_encoder_reads_a_pair_once_and_again_when_anything_changes(cross_encoder, tmp_path, monkeypatch):
    teacher: Any = open_teacher(str(cross_encoder))
    expected = teacher.predict([(list(QUERIES.values())[q], TEXTS[d]) for q, d in PAIRS], activation_fn=LOGITS)
    read: list[int] = []
    plain = CrossEncoder.predict
    monkeypatch.setattr(
        CrossEncoder,
        "predict",
        lambda self, pairs, **options: (read.append(len(pairs)), plain(self, pairs, **options))[1],
    )
    monkeypatch.setattr("polyrep.training.teachers.KEPT", 2)

    def scores(pairs: np.ndarray = PAIRS, cache_dir: Path | None = tmp_path / "cache") -> np.ndarray:
        return score_pairs(teacher, QUERIES, DOCUMENTS, pairs, names=("q", "d"), cache_dir=cache_dir)

    np.testing.assert_allclose(scores(PAIRS[:3]), expected[:3], atol=1e-5)
    assert read == [2, 1]
    (kept,) = (tmp_path / "cache").glob("teacher-*.npy")
    before = kept.read_bytes()
    np.testing.assert_allclose(scores(), expected, atol=1e-5)
    assert read == [2, 1, 2], "pairs that are new alone"
    np.testing.assert_array_equal(scores(), scores(PAIRS[[0, 1, 2, 3, 4]]))
    np.testing.assert_allclose(scores(PAIRS[[4, 0, 4]]), expected[[4, 0, 4]], atol=1e-5)
    assert read == [2, 1, 2], "all of it was kept"
    kept.write_bytes(before)  # as if it had been interrupted
    np.testing.assert_allclose(scores(), expected, atol=1e-5)
    assert read == [2, 1, 2, 2]
    scores(cache_dir=None)
    with torch.no_grad():
        teacher.model.classifier.bias.add_(1.0)
    np.testing.assert_allclose(scores(), expected + 1, atol=1e-5)
    with torch.no_grad():
        teacher.model.classifier.bias.fill_(float("nan"))
    kept_before = set((tmp_path / "cache").iterdir())
    with pytest.raises(InputError, match="d: 2 of 2 scores are not finite"):
        scores()
    assert set((tmp_path / "cache").iterdir()) == kept_before, "what is refused is not kept"


@pytest.mark.parametrize("kind", ["sentence", "layers", "tokens"])
def test_every_kind_of_cached_vectors_carries_scores(kind, plain, multi_vector_model, cross_encoder, tmp_path):
    dataset = load_retrieval_dataset(write_beir(tmp_path / "tiny"), "test")
    model = multi_vector_model if kind == "tokens" else SentenceTransformer(str(plain), device="cpu")
    teacher: Any = open_teacher(str(cross_encoder))
    data = HeadData(kind=kind, negatives=2, labels=True, depth=3, teacher=teacher)
    data.add(model, dataset, cache_dir=tmp_path / "cache")
    queries, documents = data.collate([data[i] for i in range(len(data))])["features"]
    asked, found = list(dataset.queries.values()), list(dataset.corpus.values())
    for row, (listed, scores) in enumerate(zip(queries["list"], queries["teacher"], strict=True)):
        pairs = [(asked[queries["index"][row]], found[documents["index"][place]]) for place in listed]
        np.testing.assert_allclose(scores, teacher.predict(pairs, activation_fn=LOGITS), atol=1e-5)


def test_scores_without_judgments_are_refused():
    with pytest.raises(InputError, match="--teacher: is for an objective that learns from judgments"):
        HeadData(teacher=object(), labels=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("follow", FOLLOW)
def test_a_map_of_layers_follows_a_teacher(follow):
    torch.manual_seed(1)
    head = MultiLayerHead(MultiLayerHeadConfig(layers=[-1, -2], pooling="linear", hidden_size=4, num_hidden_layers=1))
    states = [torch.randn(3, 2, 4), torch.randn(7, 2, 4)]
    lists, teacher = torch.tensor([[0, 3, 4], [1, 5, 6], [2, 0, 3]]), torch.randn(3, 3)
    judged = torch.tensor([[1], [2], [3]])
    features: list[Any] = [
        {"layer_embeddings": states[0], "judged": judged, "list": lists, "teacher": teacher},
        {"layer_embeddings": states[1], "index": torch.arange(7)},
    ]
    objective = MultiLayerHeadObjective(head, distill_weight=0.5, distill=follow, tau=0.2)
    parts = objective(features, torch.arange(3))
    q, d = (
        head(side[:, head.config.layers], task=task).sentence_embedding.double()
        for side, task in zip(states, ("query", "document"), strict=True)
    )
    scores = (q @ d.T / 0.2).detach()
    expected = np.mean([FOLLOW[follow](scores[i, lists[i]].tolist(), teacher[i].tolist()) for i in range(3)])
    assert float(parts["distill"]) == pytest.approx(0.5 * expected, rel=1e-4)
    assert set(MultiLayerHeadObjective(head)(features, torch.arange(3))) == {"contrast"}
    with pytest.raises(InputError, match="--distill_weight 0.5: the data has no teacher's scores"):
        objective([{k: v for k, v in features[0].items() if k != "teacher"}, features[1]], torch.arange(3))


@pytest.mark.parametrize("follow", FOLLOW)
def test_pooled_documents_follow_a_teacher_beside_maxsim(batch, follow):
    head = random_head(pooling="kmeans", num_vectors=2, weights="soft")
    lists = torch.tensor([[0, 4], [1, 3], [2, 3]])  # rows of the batch: the own document and a negative
    batch[0] |= {"list": lists, "teacher": torch.tensor([[2.0, 0.5], [-1.0, 1.0], [0.3, 0.2]])}
    objective = SoftGateObjective(head, ladder="2", distill_weight=0.4, distill=follow)
    losses = objective(batch, LABELS)
    assert set(losses) == {"distillation", "teacher"}
    queries, documents = batch
    weights = torch.sigmoid(head.keep_logits(documents["token_embeddings"], documents["attention_mask"]))
    pooled, there = head.pool(documents["token_embeddings"], weights * documents["attention_mask"], 2)
    total = 0.0
    for row in range(3):
        tokens = queries["token_embeddings"][row][queries["attention_mask"][row].bool()]
        scores = []
        for place in lists[row].tolist():
            first = DOCUMENT_OF.index(DOCUMENT_OF[place])  # a document that is there twice counts at its first place
            vectors = head.fold(pooled)[first][there[first].bool()]
            scores.append(float((tokens @ vectors.T).amax(1).sum()) * 30 / len(tokens))
        total += FOLLOW[follow](scores, batch[0]["teacher"][row].tolist()) / 3
    assert float(losses["teacher"]) == pytest.approx(0.4 * total, rel=1e-3)


# A whole model


@pytest.fixture
def late(backbone: Path, tmp_path: Path) -> Any:
    model = EXAMPLES[LateInteractionConfig.model_type](backbone, tmp_path).models["retriever"]
    return polyrep.load(polyrep.save(model, tmp_path / "late"), device="cpu")


LOGITS = torch.nn.Identity()

COLUMNS = (list(QUERIES.values()), TEXTS[:3], TEXTS[1:4])


def features_of(model: Any) -> list[dict[str, Any]]:
    tasks = ("query", "document", "document")
    return [model.preprocess(list(texts), task=task) for texts, task in zip(COLUMNS, tasks, strict=True)]


@pytest.mark.parametrize("follow", FOLLOW)
def test_late_interaction_is_the_stock_loss_and_a_teacher_beside_it(late, follow):
    labels = torch.tensor([[2.0, 0.5], [-1.0, 1.0], [0.3, 0.2]])
    stock = MultiVectorMultipleNegativesRankingLoss(late, scale=0.5)(features_of(late))
    plain = LateInteractionObjective(late, scale=0.5)(features_of(late))
    assert set(plain) == {"contrast"} and float(plain["contrast"]) == pytest.approx(float(stock))
    objective = LateInteractionObjective(late, scale=0.5, distill_weight=2.0, distill=follow)
    parts = objective(features_of(late), labels)
    assert float(parts["contrast"]) == pytest.approx(float(stock))
    queries = late.encode_query(list(COLUMNS[0]))
    columns = [late.encode_document(list(texts)) for texts in COLUMNS[1:]]
    total = 0.0
    for row, query in enumerate(queries):
        scores = [0.5 * float((np.asarray(query) @ np.asarray(column[row]).T).max(1).sum()) for column in columns]
        total += FOLLOW[follow](scores, labels[row].tolist()) / 3
    assert float(parts["distill"]) == pytest.approx(2 * total, rel=1e-3)
    with pytest.raises(InputError, match="the data has no teacher's scores"):
        objective(features_of(late))


RUNS = {
    "late-interaction-minilm": ["--objective", "LateInteractionObjective", "--hard_negatives", "1"],
    "multilayer-minilm": ["--hard_negatives", "1", "--layers", "-1", "0"],
    "multilayer-minilm cached": [
        *("--objective", "CachedMultiLayerObjective", "--mini_batch_size", "1", "--hard_negatives", "1"),
        *("--layers", "-1", "0"),
    ],
    "multilayer-minilm-frozen": ["--layers", "-1", "0", "--negatives", "1", "--depth", "2"],
    "gaussian-minilm-frozen": ["--negatives", "1", "--depth", "2"],
}


@pytest.mark.parametrize("run", RUNS)
def test_a_run_learns_from_a_cross_encoder(run, plain, cross_encoder, tmp_path):
    data, output = write_beir(tmp_path / "tiny", split="train"), tmp_path / "out"
    flags = ["--backbone", str(plain), "--datasets", str(data), "--output_dir", str(output), "--max_steps", "2"]
    flags += ["--per_device_train_batch_size", "2", "--save_steps", "2", "--logging_steps", "1"]
    flags += ["--teacher", str(cross_encoder), "--distill_weight", "0.5", "--distill", "scores", *RUNS[run]]
    if "--hard_negatives" in flags:
        flags += ["--negative_margin", "0", "--mined_cache", str(tmp_path / "mined"), "--bf16", "false"]
        flags += ["--batch_sampler", "batch_sampler"]
    else:
        flags += ["--cache_dir", str(tmp_path / "cache")]
    final = train([run.split()[0], *flags, "--disable_tqdm", "true"])
    log = json.loads((output / "training.json").read_text())["log"]
    first = next(entry for entry in log if "loss" in entry)
    assert first.get("distill", 1) > 0 and ("distill" in first or "cached" in run)
    assert polyrep.load(final, trust_remote_code=True, device="cpu").encode_query(["file"]) is not None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--distill_weight", "-1"], "--distill_weight -1.0: below 0"),
        (["--distill_weight", "1", "--distill", "margin"], "--distill 'margin': unknown. Use one of order, scores"),
        (["--distill_weight", "1"], "Name a --teacher"),
    ],
)
def test_what_no_teacher_can_teach_is_refused(flags, words, plain, tmp_path):
    data = write_beir(tmp_path / "tiny", split="train")
    common = ["--backbone", str(plain), "--datasets", str(data), "--output_dir", str(tmp_path / "out")]
    common += [] if words == "Name a --teacher" else ["--teacher", str(plain)]
    with pytest.raises(InputError, match=words):
        train(["multilayer-minilm-frozen", *common, "--layers", "-1", "0", *flags])
