"""Gaussian: index vectors against divergences taken by hand, [VAR] in every encoder, the loss, and every door."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
import torch
from conftest import CLI, DOCUMENTS, QRELS, QUERIES, run_two_processes, write_beir
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer, BertConfig, BertModel

import polyrep
from polyrep import InputError
from polyrep.cli import main, train
from polyrep.data import RetrievalDataset, load_retrieval_dataset
from polyrep.data.noise import narrowed
from polyrep.encoding import embed
from polyrep.hub import example
from polyrep.methods import (
    GaussianConfig,
    GaussianHead,
    GaussianHeadConfig,
    GaussianHeadObjective,
    GaussianModel,
    GaussianOutput,
    GaussianPooling,
    GaussianTransformer,
)
from polyrep.methods.gaussian.objective import SCALE, inclusion, shortened
from polyrep.search import kl
from polyrep.training.arguments import RecipeArguments
from polyrep.training.losses import taught
from polyrep.training.mining import Miner, RemineCallback
from polyrep.training.pairs import HeadData
from polyrep.training.teachers import open_teacher, score_pairs

TEXTS = list(DOCUMENTS.values())
GROUPS = (None, 1, 4)
DIVERGENCES = ("kl", "reverse_kl", "likelihood", "w2", "csd")


def head(stir: float = 1.0, **config) -> GaussianHead:
    torch.manual_seed(0)
    made = GaussianHead(GaussianHeadConfig(**{"input_dim": 24, "mean_dim": 12} | config))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * stir)
    return made.eval()


def wide(output: GaussianOutput) -> torch.Tensor:
    """Variances of single dimensions, (batch, k)."""
    return output.variance.repeat_interleave(output.mean.shape[-1] // output.variance.shape[-1], -1)


def normals(query: GaussianOutput, document: GaussianOutput) -> tuple[Normal, Normal]:
    """Distributions that broadcast to (queries, documents, k)."""
    return (
        Normal(query.mean[:, None], wide(query).sqrt()[:, None]),
        Normal(document.mean[None], wide(document).sqrt()[None]),
    )


def brute_force(divergence: str, query: GaussianOutput, document: GaussianOutput) -> torch.Tensor:
    """Scores (queries, documents), dimension by dimension."""
    q, d = normals(query, document)
    if divergence == "kl":
        return -kl_divergence(q, d).sum(-1)
    if divergence == "reverse_kl":
        return -kl_divergence(d, q).sum(-1)
    if divergence == "likelihood":
        return d.log_prob(q.mean).sum(-1)
    apart = (q.mean - d.mean).square()
    if divergence == "w2":
        return -(apart + (q.stddev - d.stddev).square()).sum(-1)
    return -(apart + q.variance + d.variance).sum(-1)


# The index


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("normalize", [False, True])
def test_the_inner_product_is_the_divergence_up_to_a_constant_of_the_query(divergence, groups, normalize):
    made = head(variance_groups=groups, divergence=divergence, normalize_mean=normalize).double()
    x, y = torch.randn(6, 24).double(), torch.randn(9, 24).double()
    query, document = made(x, task="query"), made(y, task="document")
    rest = brute_force(divergence, query, document) - query.sentence_embedding @ document.sentence_embedding.T
    torch.testing.assert_close(rest, rest[:, :1].expand_as(rest), rtol=1e-9, atol=1e-9)
    expected = 12 + {"csd": 1}.get(divergence, 1 + (groups or 12))
    assert query.sentence_embedding.shape[1] == document.sentence_embedding.shape[1] == expected
    assert made.config.projection_dim == expected
    if divergence == "kl":
        torch.testing.assert_close(rest[:, 0], made.query_constant(query), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("groups", GROUPS)
def test_the_oracle_is_exact_and_broadcasts(groups):
    made = head(variance_groups=groups).double()
    query, document = made(torch.randn(6, 24).double()), made(torch.randn(9, 24).double())
    expected = -brute_force("kl", query, document)
    found = polyrep.methods.gaussian.kl_divergence(query, document)
    assert polyrep.methods.gaussian.kl_divergence is polyrep.search.scoring.kl and found.shape == (6, 9)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    several = SimpleNamespace(mean=query.mean.view(2, 3, -1), variance=query.variance.view(2, 3, -1))
    torch.testing.assert_close(kl(several, document), expected.view(2, 3, 9), rtol=1e-9, atol=1e-9)
    assert (kl(query, query).diagonal().abs() < 1e-9).all()


def test_precision_of_the_scores_in_float32_and_float64():
    generator = torch.Generator().manual_seed(0)
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        made = GaussianHead(GaussianHeadConfig(input_dim=256, mean_dim=64)).to(dtype)
        sides = []
        for count in (100, 400):
            mean = F.normalize(torch.randn(count, 64, generator=generator, dtype=torch.float64), dim=-1)
            variance = 10 ** (torch.rand(count, 64, generator=generator, dtype=torch.float64) * 4 - 3)  # 1e-3 to 10
            sides.append(SimpleNamespace(mean=mean, variance=variance))
        query, document = sides
        q, d = (made._index(s.mean.to(dtype), s.variance.to(dtype), s is query) for s in sides)
        constant = made.query_constant(query)[:, None]
        expected = -kl_divergence(
            Normal(query.mean[:, None], query.variance.sqrt()[:, None]),
            Normal(document.mean[None], document.variance.sqrt()[None]),
        ).sum(-1)
        error = ((q @ d.T).double() + constant - expected).abs() / expected.abs()
        assert error.max() < bound


def test_large_inputs_of_the_head_stay_finite():
    made = head(stir=0.0, variance_groups=None, normalize_mean=False)
    with torch.no_grad():
        made.variance_map.copy_(torch.eye(12, 24))
    x = torch.rand(50, 24) * 120 - 60
    exact = head(stir=0.0, normalize_mean=False).double()
    exact.load_state_dict(made.state_dict())
    for task in ("query", "document"):
        single, double = made(x, task=task), exact(x.double(), task=task)
        assert torch.isfinite(single.sentence_embedding).all() and torch.isfinite(double.sentence_embedding).all()
        assert (single.variance >= made.config.variance_floor).all()
        # Where the softplus is an exponential, single precision keeps seven digits of what the floor leaves.
        torch.testing.assert_close(single.sentence_embedding.double(), double.sentence_embedding, rtol=3e-4, atol=1e-3)
        assert made(x.half(), task=task).sentence_embedding.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        again = made(x, task="document")
    torch.testing.assert_close(again.sentence_embedding, made(x, task="document").sentence_embedding)


def test_uncertainty_is_half_the_log_determinant():
    for groups in GROUPS:
        output = head(variance_groups=groups)(torch.randn(5, 24))
        torch.testing.assert_close(output.uncertainty, wide(output).log().sum(-1) / 2)


def test_an_untrained_head_ranks_as_the_backbone(sentence_model):
    vectors = F.normalize(torch.randn(40, 24), dim=-1)
    cosine = vectors[:10] @ vectors.T
    for config in ({"mean_dim": 24}, {"mean_dim": 24, "variance_groups": 1}, {"mean_dim": 24, "divergence": "w2"}):
        made = GaussianHead(GaussianHeadConfig(input_dim=24, **config))
        made.align(vectors.T @ vectors)
        q, d = (made(x, task=t).sentence_embedding for x, t in ((vectors[:10], "query"), (vectors, "document")))
        scale = {"w2": 2.0}.get(made.config.divergence, 1 / made.config.initial_variance)
        rest = q @ d.T - scale * cosine
        torch.testing.assert_close(rest, rest[:, :1].expand_as(rest), atol=2e-4, rtol=1e-4)


def test_the_mean_starts_at_the_principal_axes():
    torch.manual_seed(0)
    low = torch.randn(200, 5) @ torch.linalg.qr(torch.randn(24, 5))[0].T  # a subspace of five dimensions
    made = GaussianHead(GaussianHeadConfig(input_dim=24, mean_dim=5, normalize_mean=False))
    made.align(low.T @ low)
    kept = made(low).mean
    torch.testing.assert_close(kept @ kept.T, low @ low.T, atol=1e-4, rtol=1e-4)
    again = GaussianHead(GaussianHeadConfig(input_dim=24, mean_dim=5, normalize_mean=False))
    again.align(low.double().T @ low.double())
    torch.testing.assert_close(again.mean_map, made.mean_map, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("divergence", ["kl", "likelihood"])
def test_before_training_queries_and_documents_are_the_backbones_vectors(divergence):
    """Nothing that all texts of a side share is left, which a graph index would take for nearness or for distance."""
    made = head(stir=0, normalize_mean=True, mean_dim=12, variance_groups=1, divergence=divergence)
    x = F.normalize(torch.randn(5, 24), dim=-1)
    with torch.no_grad():
        query, document = made(x, task="query"), made(x, task="document")
    mean = query.mean / made.config.initial_variance**0.5
    one, nothing = torch.ones(5, 1), torch.zeros(5, 1)
    close = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(query.sentence_embedding, torch.cat([one, nothing, mean], 1), **close)
    mean = document.mean / made.config.initial_variance**0.5
    torch.testing.assert_close(document.sentence_embedding, torch.cat([nothing, nothing, mean], 1), **close)


def test_faiss_finds_what_brute_force_finds():
    made = head(stir=0.02, normalize_mean=True)
    torch.manual_seed(1)
    x, y = (F.normalize(torch.randn(count, 24), dim=-1) for count in (30, 2000))
    with torch.no_grad():
        query, document = made(x, task="query"), made(y, task="document")
        doubles = [GaussianOutput(**{k: v.double() for k, v in side.items()}) for side in (query, document)]
    assert 0.15 < document.variance.log().std() < 0.3  # more than documents differ by after training
    exact = -kl(*doubles).numpy()
    best = -np.sort(-exact, axis=1)[:, :10]
    flat = faiss.IndexFlatIP(document.sentence_embedding.shape[1])
    hnsw = faiss.IndexHNSWFlat(document.sentence_embedding.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    hnsw.hnsw.efConstruction = hnsw.hnsw.efSearch = 200
    for index in (flat, hnsw):
        index.add(document.sentence_embedding.numpy())
        _, found = index.search(query.sentence_embedding.numpy(), 10)
        # Rank by rank as good a document: those whose exact scores differ by less than 1e-5 may change places.
        np.testing.assert_allclose(np.take_along_axis(exact, found, 1), best, rtol=1e-5)


# Configs


@pytest.mark.parametrize(
    ("config", "dims"),
    [
        ({}, (191, 383)),
        ({"variance_groups": 1}, (382, 384)),
        ({"variance_groups": 16}, (352, 369)),
        ({"projection_dim": 369}, (184, 369)),
        ({"projection_dim": 369, "variance_groups": 1}, (367, 369)),
        ({"projection_dim": 369, "variance_groups": 16}, (352, 369)),
        ({"divergence": "dot"}, (384, 384)),
        ({"divergence": "csd", "projection_dim": 369}, (368, 369)),
        ({"mean_dim": 384}, (384, 769)),
    ],
)
def test_index_dims_follow_from_the_distribution_and_the_other_way_round(config, dims):
    made = GaussianHeadConfig(input_dim=384, **config)
    assert (made.mean_dim, made.projection_dim) == dims
    assert GaussianHeadConfig(**made.to_diff_dict()).to_dict() == made.to_dict()


def test_a_name_of_another_score_or_a_cut_is_refused(sentence_model, backbone, tmp_path):
    modules = [*sentence_model.children(), GaussianPooling(input_dim=32, mean_dim=15)]
    assert SentenceTransformer(modules=modules, device="cpu").similarity_fn_name == "dot"
    with pytest.raises(ValueError, match="similarity_fn_name='cosine'.*inner product"):
        SentenceTransformer(modules=modules, device="cpu", similarity_fn_name="cosine")
    with pytest.raises(ValueError, match="truncate_dim=8 would cut"):
        SentenceTransformer(modules=modules, device="cpu", truncate_dim=8)
    with pytest.raises(ValueError, match="vectors have width 32, but the head was made for input_dim=64.*recorded"):
        SentenceTransformer(modules=[*sentence_model.children(), GaussianPooling(input_dim=64)], device="cpu")
    with pytest.raises(ValueError, match="Normalize stands behind it"):
        SentenceTransformer(modules=[*modules, Normalize()], device="cpu")
    folder = one_folder(backbone, tmp_path / "model")
    for options, word in (({"similarity_fn_name": "cosine"}, "similarity_fn_name"), ({"truncate_dim": 8}, "truncate")):
        with pytest.raises(ValueError, match=word):
            SentenceTransformer(str(folder), device="cpu", trust_remote_code=True, **options)


def test_values_that_are_not_finite_are_refused_by_row():
    vectors = torch.randn(3, 24)
    vectors[1, 5] = torch.nan
    with pytest.raises(ValueError, match="text 1 of the batch is not finite"):
        head()(vectors)


def test_an_index_in_half_precision_that_overflows_names_the_document(sentence_model):
    pooling = GaussianPooling(input_dim=32, mean_dim=15, beta=1e6, variance_floor=1e-6, normalize_mean=False)
    model = SentenceTransformer(modules=[*sentence_model.children(), pooling], device="cpu")
    with pytest.raises(InputError, match="'d1'.*float16.*float32"):
        embed(model, DOCUMENTS, task="document")
    assert len(embed(model, DOCUMENTS, task="document", dtype="float32")) == len(DOCUMENTS)


# The encoder and [VAR]

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
ENCODERS = {
    "bert": SMALL,
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "dropout": 0.0},
    "modernbert": SMALL | {"global_attn_every_n_layers": 2, "local_attention": 8, "reference_compile": False},
    "mpnet": SMALL,
    "xlm-roberta": SMALL,
    "t5": {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 64},
}


@pytest.fixture(scope="module")
def encoder_of(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder of an encoder of some kind with random weights and the small tokenizer."""
    root, tokenizer = tmp_path_factory.mktemp("encoders"), AutoTokenizer.from_pretrained(backbone)
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}

    def make(kind: str, **sizes) -> Path:
        folder = root / "-".join([kind, *map(str, sizes.values())])
        if not folder.exists():
            torch.manual_seed(0)
            config = AutoConfig.for_model(kind, **{"vocab_size": len(tokenizer)} | special | ENCODERS[kind] | sizes)
            for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate"):
                if hasattr(config, name):
                    setattr(config, name, 0.0)
            model = AutoModelForTextEncoding.from_config(config) if kind == "t5" else AutoModel.from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder

    return make


def one_folder(backbone: Path, folder: Path, **config) -> Path:
    """A saved GaussianModel that sentence-transformers opens."""
    model = example.one_folder(
        GaussianModel.from_encoder(str(backbone), **config), backbone, folder, transformer=GaussianTransformer
    )
    return polyrep.save(model, folder)


@pytest.mark.parametrize("kind", ENCODERS)
def test_var_is_inserted_in_second_place_of_every_encoder(encoder_of, kind):
    folder = encoder_of(kind)
    model = GaussianModel.from_encoder(str(folder), mean_from="cls").eval()
    with torch.no_grad():
        model.var_embedding.normal_()
        model.head.variance_map.normal_()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    output = model(**batch, task="document")
    for row in range(len(TEXTS)):  # one text by itself, without padding
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
        embedded = model.encoder.get_input_embeddings()(ids)
        embedded = torch.cat([embedded[:, :1], model.var_embedding[None, None], embedded[:, 1:]], 1)
        states = model.encoder(
            inputs_embeds=embedded, attention_mask=torch.ones(1, ids.shape[1] + 1)
        ).last_hidden_state
        expected = model.head(states[:, 0], states[:, 1], task="document")
        for name in ("mean", "variance", "sentence_embedding"):
            torch.testing.assert_close(output[name][row], expected[name][0], atol=1e-4, rtol=1e-4)
    left = AutoTokenizer.from_pretrained(folder, padding_side="left")(TEXTS, padding=True, return_tensors="pt")
    assert not left["attention_mask"][:, 0].all()
    for name in ("mean", "variance", "sentence_embedding"):
        torch.testing.assert_close(model(**left, task="document")[name], output[name], atol=1e-4, rtol=1e-4)


def test_mean_pooling_leaves_var_out(backbone):
    model = GaussianModel.from_encoder(str(backbone), mean_from="mean", variance_from="var_token").eval()
    batch = AutoTokenizer.from_pretrained(backbone)(TEXTS, padding=True, return_tensors="pt")
    seen = []
    model.encoder.register_forward_hook(lambda module, inputs, output: seen.append(output.last_hidden_state))
    output = model(**batch)
    for row, mask in enumerate(batch["attention_mask"].bool()):
        states = torch.cat([seen[0][row][:1], seen[0][row][2:]])[mask]
        expected = model.head(states.mean(0)[None]).mean[0]
        torch.testing.assert_close(output.mean[row], expected, atol=1e-5, rtol=1e-4)


# RoBERTa's first position is the one after that of padding, here 1, and [VAR] takes another.
@pytest.mark.parametrize(("kind", "limit"), [("bert", 15), ("xlm-roberta", 13), ("t5", None)])
def test_a_text_at_the_encoders_limit(encoder_of, tmp_path, kind, limit):
    positions = {} if limit is None else {"max_position_embeddings": 16}
    folder = encoder_of(kind, **positions, **({"pad_token_id": 1} if kind == "xlm-roberta" else {}))
    path = one_folder(folder, tmp_path / "model")
    model = AutoModel.from_pretrained(path, trust_remote_code=True)
    longest = torch.full((1, limit or 100), 7)
    longest[0, 0] = 2
    assert torch.isfinite(model(longest).mean).all()
    retriever = SentenceTransformer(str(path), trust_remote_code=True, device="cpu")
    long = " ".join(["file"] * 200)
    if limit is None:
        return
    with pytest.raises(ValueError, match=f"{limit + 1} tokens.* room for {limit} and .VAR..*max_length={limit}"):
        model(torch.full((1, limit + 1), 7))
    assert retriever.max_seq_length == limit and retriever[0].preprocess([long])["input_ids"].shape[1] == limit
    np.testing.assert_allclose(retriever.encode_document([long]), retriever.encode_document([long + " port"]))


class Deaf(BertModel):
    """Takes embeddings, and does not listen."""

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **kwargs):
        if inputs_embeds is not None:
            raise NotImplementedError("ids only")
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def test_a_backbone_that_takes_no_embeddings_is_refused(backbone, monkeypatch):
    class Idless(BertModel):
        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    config = BertConfig(**SMALL, vocab_size=64)
    for door in (AutoModel, AutoModelForTextEncoding):
        monkeypatch.setattr(door, "from_config", lambda config: Idless(config))
    with pytest.raises(ValueError, match=r"Idless takes none.*variance_from='mean'.*GaussianPooling"):
        GaussianModel(GaussianConfig(encoder_config=config))
    model = GaussianModel(GaussianConfig(encoder_config=config, variance_from="mean")).eval()
    assert model(torch.ones(2, 4, dtype=torch.long)).variance.shape == (2, 15)
    model = GaussianModel.__new__(GaussianModel)
    torch.nn.Module.__init__(model)
    model.encoder = Deaf(config)
    with pytest.raises(ValueError, match=r"Deaf refuses them \(ids only\).*GaussianPooling"):
        model._check_embeddings()


# Doors


def test_the_five_lines(backbone, sentence_model, tmp_path):
    folder = one_folder(backbone, tmp_path / "model", mean_dim=15)
    model = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    q, d = model.encode_query(list(QUERIES.values())), model.encode_document(TEXTS)
    assert q.shape == (3, 31) and model.similarity_fn_name == "dot" and model.get_embedding_dimension() == 31
    tokenizer = AutoTokenizer.from_pretrained(folder)
    auto = AutoModel.from_pretrained(folder, trust_remote_code=True)
    query = auto(**tokenizer(list(QUERIES.values()), padding=True, return_tensors="pt"), task="query")
    document = auto(**tokenizer(TEXTS, padding=True, return_tensors="pt"), task="document")
    np.testing.assert_allclose(document.sentence_embedding.detach(), d, atol=1e-5)
    assert document.mean.shape == (5, 15) and document.variance.shape == (5, 15) and document.uncertainty.shape == (5,)
    exact = -polyrep.methods.gaussian.kl_divergence(query, document)
    constant = (exact - model.similarity(q, d)).detach()
    torch.testing.assert_close(constant, constant[:, :1].expand_as(constant), atol=1e-3, rtol=1e-4)
    piped = SentenceTransformer(modules=[*sentence_model.children(), GaussianPooling(input_dim=32, mean_dim=15)])
    features = piped(piped.preprocess(TEXTS), task="query")
    assert piped.encode_query(TEXTS).shape == (5, 31) and features["uncertainty"].shape == (5,)


def test_from_encoder_keeps_what_the_backbone_does(backbone, tmp_path):
    modules = [Transformer(str(backbone)), Pooling(32, "cls"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(tmp_path / "plain"))
    model = GaussianModel.from_encoder(str(tmp_path / "plain"), mean_dim=32, variance_from="cls").eval()
    plain = SentenceTransformer(str(tmp_path / "plain"), device="cpu").encode(TEXTS, convert_to_tensor=True)
    batch = AutoTokenizer.from_pretrained(backbone)(TEXTS, padding=True, return_tensors="pt")
    torch.testing.assert_close(model(**batch).mean, plain, atol=1e-5, rtol=1e-4)
    assert model.config.mean_from == "cls" and model.config.normalize_mean and model.config.normalize_input
    for score, unit in (("cosine", True), ("dot", False)):  # what cosine compares are vectors of unit length
        folder = tmp_path / score
        SentenceTransformer(modules=modules[:2], device="cpu", similarity_fn_name=score).save_pretrained(str(folder))
        assert GaussianModel.from_encoder(str(folder)).config.normalize_input is unit
        behind = GaussianHead.from_backbone(SentenceTransformer(str(folder), device="cpu")).config
        assert behind.normalize_input is behind.normalize_mean is unit
    modules.append(Normalize())
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(tmp_path / "more"))
    with pytest.raises(ValueError, match=r"Normalize \+ Normalize.*GaussianPooling"):
        GaussianModel.from_encoder(str(tmp_path / "more"))


# The loss


def some(count: int, k: int = 6, groups: int | None = None) -> GaussianOutput:
    return head(0.5, input_dim=8, mean_dim=k, variance_groups=groups)(torch.randn(count, 8), task="document")


def test_contrast_is_cross_entropy_of_the_divergence_and_its_scale_that_of_the_index():
    made = head(0.4, input_dim=8, mean_dim=6).double()
    objective = GaussianHeadObjective(made, tau=0.7)
    x, y = torch.randn(4, 8).double(), torch.randn(9, 8).double()
    query, document = made(x, task="query"), made(y, task="document")
    parts = objective.losses(query, document, torch.tensor([0, 1, 2, 3]))
    total = 0.0
    for i in range(4):  # constants of the query drop out of the softmax, so the exact divergence gives the same
        scores = [
            float(-kl_divergence(Normal(query.mean[i], query.variance[i].sqrt()), Normal(m, v.sqrt())).sum() / 0.7)
            for m, v in zip(document.mean, document.variance, strict=True)
        ]
        total += -scores[i] + math.log(sum(map(math.exp, scores)))
    assert float(parts["contrast"]) == pytest.approx(total / 4, rel=1e-6)
    known = torch.zeros(4, 9, dtype=torch.bool)
    known[0, 5] = known[0, 0] = True
    less = objective.losses(query, document, torch.tensor([0, 1, 2, 3]), known=known)["contrast"]
    assert float(less) < float(parts["contrast"])
    with pytest.raises(InputError, match="a batch of one pair"):
        objective.losses(query, made(y[:1]), torch.tensor([0]))


def test_listwise_distillation_against_loops():
    torch.manual_seed(0)
    scores, teacher = torch.randn(3, 5), torch.randn(3, 5).round()
    total = 0.0
    for row, wanted in zip(scores.tolist(), teacher.tolist(), strict=True):
        rank = {i: 1 + sorted(row, reverse=True).index(s) for i, s in enumerate(row)}
        for i in range(5):
            for j in range(5):
                if wanted[i] > wanted[j]:
                    total += abs(1 / rank[i] - 1 / rank[j]) * math.log1p(math.exp(row[j] - row[i]))
    assert float(taught(scores, teacher)) == pytest.approx(total / 3, rel=1e-5)


def test_inclusion_is_the_ratio_of_integrals_and_moves_variances_alone():
    full, less = (SimpleNamespace(mean=torch.randn(2, 1), variance=torch.rand(2, 1) + 0.2) for _ in range(2))
    x = torch.linspace(-30, 30, 200_001, dtype=torch.float64)
    total = 0.0
    for row in range(2):
        p, q = (torch.exp(Normal(s.mean[row], s.variance[row].sqrt()).log_prob(x)) for s in (full, less))
        inside = torch.log((p**2 * q).sum()) - torch.log((p * q**2).sum())
        total += float(F.softplus(-inside / SCALE)) / 2
    assert float(inclusion(full, less)) == pytest.approx(total, rel=1e-5)
    mean = torch.randn(2, 1, requires_grad=True)
    variance = torch.full((2, 1), 0.5, requires_grad=True)
    inclusion(SimpleNamespace(mean=mean, variance=variance), less).backward()
    assert mean.grad is None and variance.grad.abs().min() > 0


def test_prior_is_the_divergence_from_the_start_and_difficulty_orders_widths():
    made = head(0.4, input_dim=8, mean_dim=6, variance_groups=3)
    objective = GaussianHeadObjective(made, prior_weight=0.5, difficulty_weight=2.0)
    query, document = made(torch.randn(4, 8), task="query"), made(torch.randn(4, 8), task="document")
    parts = objective.losses(query, document, torch.arange(4))
    start = Normal(torch.zeros(6), math.sqrt(made.config.initial_variance))
    expected = kl_divergence(Normal(0.0, wide(document).sqrt()), start).sum(-1).mean() / 2
    torch.testing.assert_close(parts["prior"], expected, atol=1e-5, rtol=1e-4)
    scores = query.sentence_embedding @ document.sentence_embedding.T
    each = F.cross_entropy(scores, torch.arange(4), reduction="none")
    widths = wide(query).log().mean(-1)
    terms = [F.softplus((widths[j] - widths[i]) / SCALE) for i in range(4) for j in range(4) if each[i] > each[j]]
    torch.testing.assert_close(parts["difficulty"], 2 * torch.stack(terms).mean())


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"tau": 0.0}, "--tau 0.0"),
        ({"prior_weight": -1.0}, "--prior_weight -1.0"),
        ({"variance_rate": -1.0}, "--variance_rate"),
        ({"contrast_weight": 0.0}, "nothing would be learned"),
    ],
)
def test_bad_settings_of_the_objective(arguments, word):
    with pytest.raises(InputError, match=word):
        GaussianHeadObjective(head(), **arguments)


def test_the_control_has_no_variance_and_a_teacher_must_be_there():
    control = GaussianHeadObjective(head(divergence="dot", variance_groups=4), inclusion_weight=1.0, prior_weight=1.0)
    output = control.model(torch.randn(3, 24))
    assert output.variance is None and not control.narrowed
    with pytest.raises(InputError, match="the queries have no variance"):
        kl(output, output)
    assert list(control.losses(output, output, torch.arange(3))) == ["contrast"]
    with pytest.raises(InputError, match="--distill_weight 1.0: the data has no teacher's scores"):
        output = head()(torch.randn(3, 24))
        GaussianHeadObjective(head(), distill_weight=1.0).losses(output, output, torch.arange(3))


def test_shortened_texts_keep_their_first_tokens_and_end_as_before():
    ids = torch.tensor([[2, 11, 12, 13, 14, 15, 16, 3], [2, 21, 22, 3, 0, 0, 0, 0]])
    mask = (ids > 0).long()
    torch.manual_seed(0)
    cut = shortened({"input_ids": ids, "attention_mask": mask})
    for row in range(2):
        length, before = int(cut["attention_mask"][row].sum()), int(mask[row].sum())
        assert 3 <= length < before
        assert cut["input_ids"][row, : length - 1].tolist() == ids[row, : length - 1].tolist()
        assert cut["input_ids"][row, length - 1] == 3


def test_noise_is_seeded_and_leaves_less():
    texts = {str(i): text for i, text in enumerate([*TEXTS, "one"])}
    cut, typos = narrowed(texts, "cut"), narrowed(texts, "misspelt")
    assert cut == narrowed(texts, "cut") and cut != narrowed(texts, "cut", seed=1)
    for key, text in texts.items():
        assert text.startswith(cut[key]) and 1 <= len(cut[key].split()) <= max(1, len(text.split()) * 2 // 3)
        assert len(typos[key].split()) == len(text.split())
        assert typos[key] != text


# Training


@pytest.fixture
def plain(backbone, tmp_path) -> Path:
    """A backbone as sentence-transformers saves one."""
    modules = [Transformer(str(backbone)), Pooling(32, "mean"), Normalize()]
    # Its own length is all that the encoder takes, which [VAR] must find room in.
    modules[0].max_seq_length = 64
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(tmp_path / "plain"))
    return tmp_path / "plain"


def flags(plain: Path, data: Path, output: Path, *more: str) -> list[str]:
    common = ["--backbone", str(plain), "--datasets", str(data), "--output_dir", str(output), "--max_steps", "4"]
    common += ["--per_device_train_batch_size", "2", "--batch_sampler", "batch_sampler", "--bf16", "false"]
    return [*common, "--save_steps", "2", "--logging_steps", "1", "--disable_tqdm", "true", *more]


def head_flags(plain: Path, data: Path, output: Path, *more: str) -> list[str]:
    common = ["--backbone", str(plain), "--datasets", str(data), "--output_dir", str(output), "--max_steps", "4"]
    common += ["--per_device_train_batch_size", "2", "--save_steps", "2", "--logging_steps", "1"]
    return [*common, "--disable_tqdm", "true", "--cache_dir", str(output.parent / "cache"), *more]


def test_a_whole_model_trains_from_pairs_negatives_a_teacher_and_shorter_texts(plain, tmp_path):
    data = write_beir(tmp_path / "tiny", split="train")
    more = ["--hard_negatives", "1", "--negative_margin", "0", "--mined_cache", str(tmp_path / "mined")]
    more += ["--teacher", str(plain), "--distill_weight", "0.5", "--inclusion_weight", "0.1", "--prior_weight", "1e-4"]
    more += ["--remine", "true", "--num_train_epochs", "3", "--learning_rate", "1e-3"]
    final = train(["gaussian-minilm", *flags(plain, data, tmp_path / "run", *more)])
    log = json.loads((tmp_path / "run" / "training.json").read_text())["log"]
    first = next(entry for entry in log if "loss" in entry)
    assert {"contrast", "distill", "inclusion", "prior", "query_log_variance_std"} <= first.keys()
    model = SentenceTransformer(str(final), trust_remote_code=True, device="cpu")
    before = SentenceTransformer(str(tmp_path / "run" / "init"), trust_remote_code=True, device="cpu")
    moved = (model[0].model.head.variance_map - before[0].model.head.variance_map).abs().max()
    assert model.encode_query(["file"]).shape == (1, 32) and moved > 0
    assert "modeling_gaussian.GaussianTransformer" in (final / "modules.json").read_text()


def test_the_variance_has_a_learning_rate_of_its_own(plain, tmp_path):
    data, moved = write_beir(tmp_path / "tiny", split="train"), {}
    for rate in ("0", "1", "100"):
        more = ("--variance_rate", rate, "--max_steps", "1", "--learning_rate", "1e-4", "--warmup_steps", "0")
        final = train(["gaussian-minilm", *flags(plain, data, tmp_path / rate, *more, "--hard_negatives", "0")])
        weights = AutoModel.from_pretrained(final, trust_remote_code=True)
        moved[rate] = float(weights.head.variance_map.abs().max())
        head_final = train(["gaussian-minilm-frozen", *head_flags(plain, data, tmp_path / f"h{rate}", *more)])
        weights = AutoModel.from_pretrained(head_final, trust_remote_code=True)
        moved["head " + rate] = float(weights.head.variance_map.abs().max())
    for kind in ("", "head "):  # a step of Adam moves by the rate
        assert moved[kind + "0"] == 0 and moved[kind + "1"] > 0
        assert moved[kind + "100"] == pytest.approx(100 * moved[kind + "1"], rel=0.05)


def test_a_head_trains_from_the_cache_and_opens_in_one_folder(plain, tmp_path):
    data = write_beir(tmp_path / "tiny", split="train")
    more = ["--teacher", str(plain), "--distill_weight", "0.5", "--inclusion_weight", "0.1", "--remine", "true"]
    more += ["--difficulty_weight", "0.1", "--num_train_epochs", "4"]
    final = train(["gaussian-minilm-frozen", *head_flags(plain, data, tmp_path / "run", *more)])
    assert final.name == "final"
    model = SentenceTransformer(str(final), trust_remote_code=True, device="cpu")
    trained = GaussianHead.from_pretrained(tmp_path / "run" / "head")
    pooled = torch.from_numpy(SentenceTransformer(str(plain), device="cpu").encode(TEXTS))
    torch.testing.assert_close(
        torch.from_numpy(model.encode_document(TEXTS)),
        trained(pooled, task="document").sentence_embedding.detach(),
        atol=1e-4,
        rtol=1e-4,
    )
    assert trained.variance_map.abs().max() > 0


def test_negatives_are_mined_again_with_the_model_so_far(plain, tmp_path):
    dataset = load_retrieval_dataset(write_beir(tmp_path / "tiny"), "test")
    model = SentenceTransformer(str(plain), device="cpu")
    data = HeadData(kind="sentence", negatives=1, labels=True, depth=2)
    data.add(model, dataset, cache_dir=tmp_path / "cache")
    (before,) = data.parts
    data.mine_again(lambda features, task: features["sentence_embedding"] * (1 if task == "query" else -1))
    sides = before.queries, before.documents
    vectors = [torch.from_numpy(side.embeddings.values.astype(np.float32)) for side in sides]
    expected = (-vectors[0] @ vectors[1].T).topk(2).indices
    (part,) = data.parts
    assert (part.nearest == expected.numpy()).all() and (part.nearest != before.nearest).any()


def test_no_query_is_its_own_hard_negative(plain, tmp_path):
    corpus = {"a": "Title: print a file", "b": "show ports", "c": "copy files", "d": "stop a process", "e": "a file"}
    queries = {"a": "print a file", "q1": "open ports", "q2": "open ports"}
    dataset = RetrievalDataset("own", "train", corpus, queries, {"a": {"c": 1}, "q1": {"b": 1}, "q2": {"d": 1}})
    arguments = RecipeArguments(backbone=str(plain), hard_negatives=2, negative_margin=-10.0)  # whatever the score
    arguments.mined_cache = str(tmp_path / "mined")
    miner = Miner(arguments)
    pairs = miner.mine(dataset, dataset.pairs())
    assert sorted(zip(pairs["query"], pairs["positive"], strict=True)) == [
        ("open ports", "show ports"),
        ("open ports", "stop a process"),
        ("print a file", "copy files"),
    ]
    never = {"print a file": {corpus["a"], corpus["c"]}, "open ports": {corpus["b"], corpus["d"]}}
    for found in (pairs, miner.mine_again(miner.backbone.float(), dataset, pairs)):
        for row in found:
            assert not never[row["query"]] & {row["negative_1"], row["negative_2"]}


def test_a_whole_model_mines_by_its_own_score_and_shows_it_to_the_trainer(plain, tmp_path, monkeypatch):
    dataset = load_retrieval_dataset(write_beir(tmp_path / "tiny", split="train"), "train")
    arguments = RecipeArguments(backbone=str(plain), hard_negatives=1, negative_margin=0.0)
    arguments.mined_cache = str(tmp_path / "mined")
    miner = Miner(arguments)
    pairs = miner.mine(dataset, dataset.pairs())
    pooling = GaussianPooling(input_dim=32, mean_dim=15)
    with torch.no_grad():
        pooling.model.variance_map.normal_(std=0.1)
    student = SentenceTransformer(modules=[*miner.backbone.float().children(), pooling], device="cpu")
    callback = RemineCallback(miner, {"tiny": (dataset, pairs)})
    shown = callback.shown()["tiny"]
    assert shown[0]["negative_1"] == pairs[0]["negative_1"] and set(shown[0]) == {"query", "positive", "negative_1"}
    callback.on_epoch_begin(None, SimpleNamespace(epoch=0), None, model=student)
    assert callback.mined["tiny"] is pairs  # the first epoch has the backbone's
    callback.on_epoch_begin(None, SimpleNamespace(epoch=1.0), None, model=student)
    queries, documents = student.encode_query(pairs["query"]), student.encode_document(TEXTS)
    changed = 0
    for row, scores in enumerate(queries @ documents.T):
        own = TEXTS.index(pairs[row]["positive"])
        judged = [TEXTS[int(d[1:]) - 1] for d in QRELS[next(q for q in QUERIES if QUERIES[q] == pairs[row]["query"])]]
        below = [i for i in np.argsort(-scores) if scores[i] <= scores[own] and TEXTS[i] not in judged]
        expected = TEXTS[below[0]] if below else pairs[row]["negative_1"]
        assert shown[row]["negative_1"] == expected and shown[row]["query"] == pairs[row]["query"]
        changed += expected != pairs[row]["negative_1"]
    assert changed


def test_teacher_scores_are_those_of_the_pairs_that_are_drawn(plain, multi_vector_model, tmp_path):
    dataset = load_retrieval_dataset(write_beir(tmp_path / "tiny"), "test")
    model = SentenceTransformer(str(plain), device="cpu")
    data = HeadData(kind="sentence", negatives=2, labels=True, depth=3, teacher=multi_vector_model)
    data.add(model, dataset, cache_dir=tmp_path / "cache")
    batch = data.collate([data[i] for i in range(len(data))])
    queries, documents = batch["features"]
    encoded = [
        [torch.as_tensor(v).float() for v in encode(list(texts.values()))]
        for encode, texts in (
            (multi_vector_model.encode_query, dataset.queries),
            (multi_vector_model.encode_document, dataset.corpus),
        )
    ]
    for row, (listed, scores) in enumerate(zip(queries["list"], queries["teacher"], strict=True)):
        assert listed[0] == row
        for place, score in zip(listed, scores, strict=True):
            q, d = encoded[0][queries["index"][row]], encoded[1][documents["index"][place]]
            assert float(score) == pytest.approx(float((q @ d.T).amax(1).sum()), abs=0.02)  # caches are float16


@pytest.mark.parametrize("family", ["sentence_model", "multi_vector_model", "sparse_model"])
def test_every_family_teaches(family, request):
    teacher = request.getfixturevalue(family)
    pairs = np.array([[0, 1], [2, 4], [1, 0]])
    found = score_pairs(teacher, QUERIES, DOCUMENTS, pairs, names=("q", "d"))
    queries, documents = teacher.encode_query(list(QUERIES.values())), teacher.encode_document(TEXTS)
    expected = teacher.similarity(queries, documents).numpy()
    np.testing.assert_allclose(found, expected[pairs[:, 0], pairs[:, 1]], atol=0.05, rtol=2e-2)


def test_a_cross_encoder_teaches(backbone, tmp_path):
    from sentence_transformers import CrossEncoder
    from transformers import BertForSequenceClassification

    BertForSequenceClassification(BertConfig.from_pretrained(backbone, num_labels=1)).save_pretrained(tmp_path / "ce")
    AutoTokenizer.from_pretrained(backbone).save_pretrained(tmp_path / "ce")
    CrossEncoder(str(tmp_path / "ce"), device="cpu").save_pretrained(str(tmp_path / "saved"))
    assert isinstance(open_teacher(str(tmp_path / "saved")), CrossEncoder)
    teacher = open_teacher(str(tmp_path / "ce"))
    assert isinstance(teacher, CrossEncoder)
    found = score_pairs(teacher, QUERIES, DOCUMENTS, np.array([[0, 1], [2, 4]]), names=("q", "d"))
    pairs = [(QUERIES["q1"], TEXTS[1]), (QUERIES["q3"], TEXTS[4])]
    expected = teacher.predict(pairs, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_scores_of_a_column_are_the_labels(plain, tmp_path):
    rows = {"query": list(QUERIES.values()), "positive": [TEXTS[1], TEXTS[0], TEXTS[3]]}
    rows |= {"negative_1": [TEXTS[2]] * 3, "scores": [[3.0, 1.0], [2.0, 0.5], [1.0, 4.0]]}
    table = tmp_path / "table"
    table.mkdir()
    Dataset.from_dict(rows).to_parquet(str(table / "train.parquet"))
    pairs = load_retrieval_dataset(table, "train").pairs()
    kept = [row for row in range(3) if rows["query"][row] in pairs["query"]]  # dev is taken from train
    assert pairs["label"] == [rows["scores"][row] for row in kept] and pairs.column_names[-1] == "label"
    final = train(
        ["gaussian-minilm", *flags(plain, table, tmp_path / "run", "--hard_negatives", "0", "--distill_weight", "1")]
    )
    log = json.loads((final.parent / "training.json").read_text())["log"]
    assert log[0]["distill"] > 0
    rows["scores"][0] = [1.0]
    Dataset.from_dict(rows).to_parquet(str(table / "train.parquet"))
    with pytest.raises(InputError, match=r"scores is \[1.0\]; expected 2 numbers, of the document and of each"):
        load_retrieval_dataset(table, "train").pairs()


def test_memory_of_a_step_does_not_hold_every_pair_by_dimension():
    made = head(input_dim=64, mean_dim=32).requires_grad_(True)
    objective = GaussianHeadObjective(made)
    sizes = []

    def watch(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(watch, lambda t: t):
        query, document = (made(torch.randn(64, 64), task=t) for t in ("query", "document"))
        objective.losses(query, document, torch.arange(64))["contrast"].backward()
    assert max(sizes) <= max(64 * 65, 64 * 64) < 64 * 64 * 32


def test_the_published_runs_say_what_they_train(plain, tmp_path, capsys):
    data = write_beir(tmp_path / "tiny", split="train")
    for run, extra in (("gaussian-minilm", flags), ("gaussian-minilm-frozen", head_flags)):
        assert main(["train", run, *extra(plain, data, tmp_path / "run"), "--dry_run", "true"]) == 0
        said = capsys.readouterr().out
        assert "objective" in said and "'variance_groups': 1" in said and "difficulty_weight" in said


def test_index_dims_that_do_not_fit_are_refused_by_train(plain, tmp_path):
    data = write_beir(tmp_path / "tiny", split="train")
    with pytest.raises(InputError, match="k . 1 . 1 . 1 = 12 dimensions, not projection_dim=20"):
        train(["gaussian-minilm", *flags(plain, data, tmp_path / "x", "--mean_dim", "9", "--projection_dim", "20")])


def test_two_processes_use_both_variance_maps_in_a_step_and_texts_cut_short(plain, tmp_path):
    data = write_beir(tmp_path / "tiny", split="train")
    more = ["--inclusion_weight", "1", "--difficulty_weight", "1", "--max_steps", "3", "--hard_negatives", "1"]
    more += ["--negative_margin", "0", "--mined_cache", str(tmp_path / "mined"), "--per_device_train_batch_size", "1"]
    ran = run_two_processes(CLI, "train", "gaussian-minilm", *flags(plain, data, tmp_path / "two", *more))
    assert ran.returncode == 0, ran.stderr[-3000:]
