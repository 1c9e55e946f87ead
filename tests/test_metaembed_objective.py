"""How nested vectors are learned, against the formulas in float64 and with loops."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DOCUMENTS, QUERIES
from datasets import Dataset
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.multi_vector_encoder.losses import MultiVectorMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from torch.nn import functional as F

from polyrep import InputError
from polyrep.methods import (
    CachedMetaEmbedObjective,
    MetaEmbedHead,
    MetaEmbedHeadConfig,
    MetaEmbedHeadObjective,
    MetaEmbedModel,
    MetaEmbedObjective,
    MetaEmbedTransformer,
)
from polyrep.methods.metaembed.objective import principal_axes

GROUPS = [[1, 1], [2, 4], [3, 5]]
SIZES: dict[str, Any] = {"num_query_vectors": 3, "num_document_vectors": 5, "groups": GROUPS}


def whole(backbone: Path, folder: Path, by: float = 0.3, **config: Any) -> MultiVectorEncoder:
    """A tiny model with differing vectors."""
    torch.manual_seed(0)
    encoder = SentenceTransformer(modules=[Transformer(str(backbone)), Pooling(32, "mean")], device="cpu")
    inner = MetaEmbedModel.from_modules(encoder, **SIZES | config)
    with torch.no_grad():
        for name, parameter in inner.named_parameters():
            if not name.startswith("encoder."):
                parameter.add_(torch.randn_like(parameter) * by)
    inner.save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)
    output = config.get("output", "token_embeddings")
    how = {"text": {"method": "forward", "method_output_name": output}}
    module = MetaEmbedTransformer(str(folder), modality_config=how, module_output_name=output, unpad_inputs=False)
    family: Any = MultiVectorEncoder if output == "token_embeddings" else SentenceTransformer
    model = family(modules=[module], device="cpu")
    model.module_kwargs = {"0": ["task"]}
    return model


@pytest.fixture
def model(backbone: Path, tmp_path: Path) -> MultiVectorEncoder:
    return whole(backbone, tmp_path / "model")


def columns(model: Any, *texts: list[str]) -> list[dict[str, Any]]:
    """Batches of queries, their documents, and hard negatives."""
    return [{**model.preprocess(part, task="document" if number else "query")} for number, part in enumerate(texts)]


ASKED, OWN, HARD = list(QUERIES.values()), list(DOCUMENTS.values())[:3], list(DOCUMENTS.values())[2:]


def encoded(model: Any, texts: list[str], task: str) -> torch.Tensor:
    with torch.no_grad():
        found = model(model.preprocess(texts, task=task), task=task)["token_embeddings"]
    return found.double()


def score(query: torch.Tensor, document: torch.Tensor, asked: int, held: int, mean: bool = False) -> float:
    """The formula of the paper, number by number."""
    total = 0.0
    for vector in query[:asked]:
        total += max(float(vector @ other) for other in document[:held])
    return total / asked if mean else total


def cross_entropy(scores: list[float], own: int) -> float:
    top = max(scores)
    return top + math.log(sum(math.exp(s - top) for s in scores)) - scores[own]


@pytest.mark.parametrize("how", ["sum", "mean", "weights", "one", "own negatives"])
def test_the_loss_is_that_of_the_paper(model, how):
    options: dict[str, Any] = {
        "sum": {},
        "mean": {"score": "mean", "temperature": 0.1},
        "weights": {"group_weights": "1,0.5,2"},
        "one": {"nested": False},
        "own negatives": {"own_negatives": True},
    }[how]
    objective = MetaEmbedObjective(model, **options)
    parts = objective(columns(model, ASKED, OWN, HARD))
    queries = encoded(model, ASKED, "query")
    documents = [*encoded(model, OWN, "document"), *encoded(model, HARD, "document")]
    weights = [1, 0.5, 2] if how == "weights" else [1, 1, 1]
    expected = {}
    for (asked, held), weight in zip(GROUPS, weights, strict=True):
        total = 0.0
        for row, query in enumerate(queries):
            others = [*range(3), 3 + row] if how == "own negatives" else range(6)
            scores = [
                score(query, documents[i], asked, held, how == "mean") / options.get("temperature", 0.03)
                for i in others
            ]
            total += cross_entropy(scores, row)
        expected[f"{asked}x{held}"] = weight * total / 3
    if how == "one":
        expected = {"3x5": expected["3x5"]}
    assert parts.keys() == expected.keys()
    for name, value in expected.items():
        assert float(parts[name]) == pytest.approx(value, rel=1e-4), name


def test_one_vector_of_each_is_cross_entropy_of_cosines(backbone, tmp_path):
    sizes = {"num_query_vectors": 1, "num_document_vectors": 1, "groups": None}
    model = whole(backbone, tmp_path / "model", **sizes)
    loss = MetaEmbedObjective(model)(columns(model, ASKED, OWN))["1x1"]
    cosines = F.cosine_similarity(
        encoded(model, ASKED, "query")[:, None, 0], encoded(model, OWN, "document")[None, :, 0], dim=-1
    )
    assert float(loss) == pytest.approx(float(F.cross_entropy(cosines / 0.03, torch.arange(3))), rel=1e-4)


def test_one_group_is_the_stock_loss_and_so_are_its_gradients(model):
    stock = copy.deepcopy(model)
    batch = columns(model, ASKED, OWN, HARD)
    ours = MetaEmbedObjective(model, temperature=0.2, nested=False)([dict(part) for part in batch])["3x5"]
    theirs = MultiVectorMultipleNegativesRankingLoss(stock, scale=5.0)(
        [{**part, "task": "document" if number else "query"} for number, part in enumerate(batch)]
    )
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    ours.backward()
    theirs.backward()
    for one, other in zip(model.parameters(), stock.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("side", ["meta", "tokens"])
def test_the_cached_loss_has_the_value_and_the_gradients_of_the_plain_one(backbone, tmp_path, size, side):
    config = {} if side == "meta" else {"query_side": "tokens", "groups": None}
    model = whole(backbone, tmp_path / "model", **config)
    cached, batch = copy.deepcopy(model), columns(model, ASKED, OWN, HARD)
    plain = sum(MetaEmbedObjective(model, diversity_weight=0.5)([dict(part) for part in batch]).values())
    plain.backward()
    loss = CachedMetaEmbedObjective(cached, mini_batch_size=size, diversity_weight=0.5)(batch)
    assert float(loss) == pytest.approx(float(plain), rel=1e-5)
    loss.backward()
    compared, most = 0, max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    for (name, one), other in zip(model.named_parameters(), cached.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, atol=1e-4 * most, rtol=1e-3, msg=name)
            compared += 1
    assert compared > 20


def test_diversity_is_the_mean_squared_cosine_of_each_two_vectors_of_a_document(model):
    objective = MetaEmbedObjective(model, diversity_weight=0.7)
    parts = objective(columns(model, ASKED, OWN))
    squares, cosines = [], []
    for document in encoded(model, OWN, "document"):
        for i in range(5):
            for j in range(i):
                cosines.append(float(document[i] @ document[j]))
                squares.append(cosines[-1] ** 2)
    assert float(parts["diversity"]) == pytest.approx(0.7 * np.mean(squares), rel=1e-4)
    assert float(objective.metrics["pairwise_cosine"]) == pytest.approx(np.mean(cosines), rel=1e-4)


def test_vectors_that_answer_are_counted_as_if_they_did_so_alike(model):
    objective = MetaEmbedObjective(model)
    objective(columns(model, ASKED, OWN))
    wins = np.zeros(5)
    for query, document in zip(encoded(model, ASKED, "query"), encoded(model, OWN, "document"), strict=True):
        for vector in query:
            wins[max(range(5), key=lambda i: float(vector @ document[i]))] += 1  # noqa: B023
    shares = wins[wins > 0] / wins.sum()
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    assert float(objective.metrics["vectors_that_answer"]) == pytest.approx(expected, rel=1e-4)


def test_every_vector_takes_part_while_all_are_equal(backbone, tmp_path):
    model = whole(backbone, tmp_path / "model", by=0.0)
    with torch.no_grad():
        model[0].model.residual.weight.zero_()
    sum(MetaEmbedObjective(model)(columns(model, ASKED, OWN)).values()).backward()
    assert model[0].model.residual.weight.grad.abs().max() > 0


def test_a_new_projection_starts_at_the_principal_axes_of_the_documents(backbone, tmp_path):
    model = whole(backbone, tmp_path / "model", projection_dim=6)
    inner = model[0].model
    pairs = {"tiny": Dataset.from_dict({"query": ASKED, "positive": OWN})}
    MetaEmbedObjective(model).initialize(pairs)
    with torch.no_grad():
        batch = model.preprocess(OWN, task="document")
        vectors = inner.pooled(batch["input_ids"], batch["attention_mask"]).double()
    _, _, right = torch.linalg.svd(vectors)
    for row in range(3):  # three documents span as many directions
        assert abs(float(inner.projection.weight[row].double() @ right[row])) == pytest.approx(1, abs=1e-4)
    kept = inner.projection.weight.double() @ vectors.T
    torch.testing.assert_close(kept.T @ kept, vectors @ vectors.T, atol=1e-5, rtol=0)
    before, inner.config.own_projection = inner.projection.weight.clone(), True
    with torch.no_grad():
        inner.projection.weight.add_(1.0)
    MetaEmbedObjective(model).initialize(pairs)
    torch.testing.assert_close(inner.projection.weight, before + 1.0)


def test_principal_axes_come_in_the_order_of_what_they_keep():
    vectors = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 0.1, 2.0])
    axes = principal_axes(vectors, 3)
    kept = (F.normalize(vectors, dim=-1) @ axes.T).square().sum(0)
    torch.testing.assert_close(axes @ axes.T, torch.eye(3), atol=1e-5, rtol=0)
    assert kept.tolist() == sorted(kept.tolist(), reverse=True) and axes[0].abs().argmax() == 1


def test_rates_name_what_is_new(model):
    import re

    names = [name for name, _ in MetaEmbedObjective(model).named_parameters()]
    rates = {pattern: [n for n in names if re.search(pattern, n)] for pattern in MetaEmbedObjective.learning_rates}
    assert [len(found) for found in rates.values()] == [1, 1]


# The head.


def read(seed: int, lengths: list[int], first: int = 0) -> dict[str, torch.Tensor]:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    tokens = torch.randn(*mask.shape, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tokens = torch.where(mask[..., None], F.normalize(tokens, dim=-1), 0)
    index = torch.arange(first, first + len(lengths))
    return {"token_embeddings": tokens, "attention_mask": mask, "index": index}


def test_a_head_learns_from_pairs_and_from_maxsim_over_all_tokens():
    torch.manual_seed(0)
    config = MetaEmbedHeadConfig(dim=8, **SIZES)
    head = MetaEmbedHead(config).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    settings = {"label_weight": 0.4, "maxsim_weight": 0.6, "score_scale": 7.0}
    objective = MetaEmbedHeadObjective(head, **settings)
    queries, documents = read(1, [4, 2]), read(2, [6, 3, 5])
    queries["judged"] = torch.tensor([[2, 3], [1, 0]])  # places from 1: the first query has two
    parts = objective([queries, documents], torch.tensor([1, 0]))
    with torch.no_grad():
        asked, held = (
            head(side["token_embeddings"], side["attention_mask"], task).token_embeddings
            for side, task in ((queries, "query"), (documents, "document"))
        )
    teacher = torch.zeros(2, 3, dtype=torch.float64)
    for q, count in enumerate((4, 2)):
        for d, length in enumerate((6, 3, 5)):
            tokens = documents["token_embeddings"][d, :length]
            teacher[q, d] = 7 * score(queries["token_embeddings"][q], tokens, count, length, mean=True)
    divergences = []
    for a, b in GROUPS:
        total = 0.0
        for row, own, others in ((0, 1, (0, 1)), (1, 0, (0, 1, 2))):  # its other relevant one is no negative
            scores = [score(asked[row], held[i], a, b) / 0.03 for i in others]
            total += cross_entropy(scores, others.index(own))
        assert float(parts[f"{a}x{b}"]) == pytest.approx(0.4 * total / 2, rel=1e-6)
        student = torch.tensor(
            [[7 * score(asked[q], held[d], a, b, mean=True) for d in range(3)] for q in range(2)]
        ).double()
        both = []
        for ours, theirs in ((student, teacher), (student.T, teacher.T)):
            p, q = theirs.softmax(1), ours.softmax(1)
            both.append(float((p * (p / q).log()).sum(1).mean()))
        divergences.append(sum(both) / 2)
    assert float(parts["maxsim"]) == pytest.approx(0.6 * np.mean(divergences), rel=1e-6)


# Bad input.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 0.0}, "--temperature 0.0.*Use a positive one"),
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"score": "max"}, "--score 'max'.*Use sum or mean"),
        ({"diversity_weight": -0.1}, "--diversity_weight -0.1"),
        ({"group_weights": "1,2"}, "--group_weights '1,2': 3 groups.*Use e.g. 1,1,1"),
        ({"group_weights": "1,x,2"}, "--group_weights '1,x,2'"),
        ({"group_weights": "0,0,0"}, "one of them above"),
    ],
)
def test_settings_that_teach_nothing_are_refused(model, settings, words):
    with pytest.raises(InputError, match=words):
        MetaEmbedObjective(model, **settings)


def test_what_cannot_be_learned_from_is_refused(model, backbone, tmp_path, multi_vector_model):
    with pytest.raises(InputError, match="a batch of one pair without hard negatives"):
        MetaEmbedObjective(model)(columns(model, ASKED[:1], OWN[:1]))
    with pytest.raises(InputError, match="--mini_batch_size 0"):
        CachedMetaEmbedObjective(model, mini_batch_size=0)
    with pytest.raises(InputError, match="the model has no meta tokens"):
        MetaEmbedObjective(multi_vector_model)
    one = whole(backbone, tmp_path / "one", output="sentence_embedding")
    with pytest.raises(InputError, match="--output sentence_embedding.*view='sentence_embedding'"):
        MetaEmbedObjective(one)
    head = MetaEmbedHead(MetaEmbedHeadConfig(dim=8))
    for settings, words in (
        ({"label_weight": 0.0}, "nothing would be learned"),
        ({"maxsim_weight": -1.0}, "--maxsim_weight -1.0"),
        ({"score_scale": 0.0}, "--score_scale 0.0"),
    ):
        with pytest.raises(InputError, match=words):
            MetaEmbedHeadObjective(head, **settings)
