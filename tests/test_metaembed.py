"""MetaEmbed's vectors: fewer are the first of all, in every encoder and through every door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import world
from conftest import DOCUMENTS, QUERIES, write_beir
from drawings import page as drawn_page
from PIL import Image
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from test_encode import write_lines
from test_nested import brute, by_name, close
from test_reinpool_pages import colqwen2
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    Gemma3TextConfig,
    Gemma3TextModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    Qwen3Config,
    Qwen3Model,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
)

import polyrep
from polyrep import InputError
from polyrep.cli import main
from polyrep.encoding import Embeddings, EncodedCorpus
from polyrep.encoding.embeddings import row_of
from polyrep.encoding.encode import encode
from polyrep.encoding.nested import groups_of
from polyrep.evaluation.frontier.pooling import pooled
from polyrep.methods import (
    MetaEmbedBudget,
    MetaEmbedConfig,
    MetaEmbedHead,
    MetaEmbedHeadConfig,
    MetaEmbedModel,
    MetaEmbedPooling,
    MetaEmbedTransformer,
)
from polyrep.methods.metaembed.backbone import open_backbone
from polyrep.methods.metaembed.frontier import as_searched, by_head, queries_by_head
from polyrep.methods.metaembed.modeling_metaembed import PAPER, SHARPNESS
from polyrep.search import open_index
from polyrep.training.adapters import add_adapters, merge_adapters

ASKED, TEXTS = list(QUERIES.values()), list(DOCUMENTS.values())

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CAUSAL = {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 2, "eos_token_id": 3}

ENCODERS: dict[str, Any] = {
    "BERT": lambda: BertModel(BertConfig(**SHAPE, **QUIET)),
    "RoBERTa": lambda: RobertaModel(RobertaConfig(**SHAPE, **QUIET)),
    "DistilBERT": lambda: DistilBertModel(
        DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=61, max_position_embeddings=64)
    ),
    "ModernBERT": lambda: ModernBertModel(
        ModernBertConfig(**SHAPE | {"num_hidden_layers": 4}, local_attention=8, bos_token_id=2, eos_token_id=3)
    ),
    "MPNet": lambda: MPNetModel(MPNetConfig(**SHAPE, **QUIET)),
    "T5": lambda: T5EncoderModel(
        T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=61, pad_token_id=0)
    ),
    "Qwen3": lambda: Qwen3Model(Qwen3Config(**SHAPE, **CAUSAL)),
    "Gemma3": lambda: Gemma3TextModel(
        Gemma3TextConfig(**SHAPE, **CAUSAL, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    ),
}
"""Random encoders of each way to attend: to all, within windows, with positions of several kinds, and to what was."""

OF_A_MASK = {"BERT", "RoBERTa", "DistilBERT", "ModernBERT", "MPNet", "T5"}


def stirred(model: Any, by: float = 0.3) -> Any:
    """A model whose vectors differ, as they do once something is learned."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("encoder."):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * by)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer(backbone: Path) -> Any:
    return AutoTokenizer.from_pretrained(backbone)


@pytest.fixture(scope="module")
def models(tokenizer) -> dict[str, MetaEmbedModel]:
    torch.manual_seed(0)
    sizes = {"num_query_vectors": 3, "num_document_vectors": 6, "projection_dim": 16}
    return {name: stirred(MetaEmbedModel.around(make(), tokenizer, **sizes)) for name, make in ENCODERS.items()}


def batch(lengths: list[int], side: str = "right") -> dict[str, torch.Tensor]:
    """Random texts of some lengths, padded on one side."""
    generator = torch.Generator().manual_seed(2)
    ids, mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long), None
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    mask = mask if side == "right" else mask.flip(1)
    for row, length in enumerate(lengths):
        ids[row, mask[row]] = torch.randint(5, 61, (length,), generator=generator)
    return {"input_ids": ids, "attention_mask": mask.long()}


def vectors(model: Any, tokens: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**tokens, **options).token_embeddings


# What every encoder must hold to.


@pytest.mark.parametrize("name", ENCODERS)
def test_text_states_are_the_backbones_and_fewer_vectors_the_first_of_all(models, name):
    model, tokens = models[name], batch([24, 9, 1])
    assert model.config.isolation == ("mask" if name in OF_A_MASK else "causal")
    with torch.no_grad():
        plain = model.encoder(**tokens).last_hidden_state
        states, where = model._with_metas(dict(tokens), 6, 3, True)
    there = tokens["attention_mask"].bool()
    torch.testing.assert_close(states[:, :24][there], plain[there], atol=1e-5, rtol=1e-5)
    assert where.columns.tolist() == [[*range(24, 30)], [*range(9, 15)], [*range(1, 7)]]
    for task, number in (("document", 6), ("query", 3)):
        all_of_them = vectors(model, tokens, task=task)
        assert all_of_them.shape == (3, number, 16)
        cosines = all_of_them @ all_of_them.transpose(1, 2)
        assert (cosines - torch.eye(number)).abs().max() < 1 - 1e-3, "vectors of a text differ"
        for count in range(1, number + 1):
            fewer = vectors(model, tokens, task=task, num_vectors=count)
            torch.testing.assert_close(fewer, all_of_them[:, :count], atol=1e-6, rtol=0)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ENCODERS)
def test_a_text_has_the_vectors_that_it_has_alone(models, name, side):
    if side == "left" and name in ("BERT", "DistilBERT", "MPNet"):
        pytest.skip("counts positions by column, so padding on the left makes other texts of them anyway")
    model, tokens = models[name], batch([24, 9, 1], side)
    padded = vectors(model, tokens)
    for row in range(3):
        there = tokens["attention_mask"][row].bool()
        alone = {key: value[row : row + 1, there] for key, value in tokens.items()}
        torch.testing.assert_close(vectors(model, alone)[0], padded[row], atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["BERT", "ModernBERT", "T5", "Gemma3"])
def test_a_saved_model_is_the_same_when_opened(models, tokenizer, tmp_path, name):
    models[name].save_pretrained(tmp_path)
    opened = AutoModel.from_pretrained(tmp_path).eval()
    assert type(opened) is MetaEmbedModel
    assert torch.equal(vectors(opened, batch([7, 4])), vectors(models[name], batch([7, 4])))


def test_meta_tokens_start_as_words_as_the_embedding_layer_gives_them(tokenizer):
    for name in ("BERT", "Gemma3"):  # the latter scales them
        torch.manual_seed(0)
        model = MetaEmbedModel.around(ENCODERS[name](), tokenizer, num_query_vectors=2, num_document_vectors=50)
        plain = [i for i in range(61) if i not in tokenizer.all_special_ids]
        with torch.no_grad():
            words = model.words(torch.tensor([plain]))[0]
        equal = (model.metas.weight[:, None] == words[None]).all(-1)  # (metas, words)
        assert equal.any(1).all() and equal.any(0).sum() == 52, "each of them another word"


def test_meta_tokens_learn_and_words_keep_their_place(models):
    model = models["BERT"]
    model.zero_grad()
    model(**batch([5, 3])).token_embeddings.sum().backward()
    gradient = model.metas.weight.grad.abs().sum(1)
    assert (gradient[:3] == 0).all() and (gradient[3:] > 0).all(), "those of documents alone"
    model.zero_grad()


def test_adapters_leave_meta_tokens_and_projection_free(backbone, tokenizer, tmp_path):
    encoder = SentenceTransformer(modules=[Transformer(str(backbone)), Pooling(32, "mean")], device="cpu")
    whole = MetaEmbedModel.from_modules(encoder, num_query_vectors=2, num_document_vectors=4, projection_dim=8)
    whole.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    how = {"text": {"method": "forward", "method_output_name": "token_embeddings"}}
    module = MetaEmbedTransformer(str(tmp_path), modality_config=how, module_output_name="token_embeddings")
    model = MultiVectorEncoder(modules=[module], device="cpu")
    add_adapters(model, 2)
    free = {name.partition("0.model.")[2] for name, p in model.named_parameters() if p.requires_grad}
    ours = {name for name in free if "lora" not in name}
    assert ours == {"metas.weight", "projection.weight", "projection.bias", "residual.weight"}
    with torch.no_grad():
        model[0].model.metas.weight.add_(1.0)
    learned = model.encode_document(TEXTS)
    merge_adapters(model)
    for ours, theirs in zip(model.encode_document(TEXTS), learned, strict=True):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=1e-6)


# Encoders that do not keep a mask, and full attention.


def deberta() -> DebertaV2Model:
    return DebertaV2Model(DebertaV2Config(**SHAPE, **QUIET))


def test_an_encoder_that_keeps_no_mask_is_refused_unless_all_may_see_all(tokenizer):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="DebertaV2Model does not keep a mask of ours.*attention='full'"):
        MetaEmbedModel.around(deberta(), tokenizer)
    full = {"attention": "full", "num_query_vectors": 2, "num_document_vectors": 5}
    model = stirred(MetaEmbedModel.around(deberta(), tokenizer, **full))
    assert model.config.isolation == "none"
    tokens = batch([9, 4])
    for count in (1, 3):  # a slice of a run with all of them, which is all that it can be
        assert torch.equal(vectors(model, tokens, num_vectors=count), vectors(model, tokens)[:, :count])


def test_full_attention_changes_what_a_text_is(tokenizer):
    torch.manual_seed(0)
    encoder = ENCODERS["BERT"]()
    model = MetaEmbedModel.around(encoder, tokenizer, attention="full", num_document_vectors=8)
    tokens = batch([9, 4])
    with torch.no_grad():
        plain = encoder(**tokens).last_hidden_state
        states, _ = model.eval()._with_metas(dict(tokens), 8, 8, False)
    assert (states[0, :9] - plain[0]).abs().max() > 1e-3


# The start.


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_every_vector_starts_as_the_backbones(backbone, pooling):
    model = SentenceTransformer(modules=[Transformer(str(backbone)), Pooling(32, pooling), Normalize()], device="cpu")
    whole = MetaEmbedModel.from_modules(model, num_query_vectors=2, num_document_vectors=4).eval()
    assert whole.config.pooling == pooling
    for task, texts, number in (("query", ASKED, 2), ("document", TEXTS, 4)):
        tokens = model.tokenizer(texts, padding=True, return_tensors="pt")
        found = vectors(whole, tokens, task=task)
        expected = torch.from_numpy(model.encode(texts))[:, None].expand(-1, number, -1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_without_residual_vectors_are_states_of_the_meta_tokens(models, tokenizer):
    torch.manual_seed(0)
    encoder = BertModel(BertConfig(**SHAPE | {"max_position_embeddings": 128}, **QUIET))
    model = MetaEmbedModel.around(encoder, tokenizer, **PAPER, projection_dim=8).eval()
    assert model.config.groups == PAPER["groups"] and not hasattr(model, "residual")
    tokens = batch([9, 4])
    with torch.no_grad():
        states, where = model._with_metas(dict(tokens), 64, 16, False)
        metas = torch.stack([row[columns] for row, columns in zip(states, where.columns, strict=True)])
        expected = F.normalize(model.projection(metas), dim=-1)
    torch.testing.assert_close(vectors(model, tokens), expected)


# The doors.


@pytest.fixture(scope="module")
def folder(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with differing vectors, saved."""
    torch.manual_seed(3)
    encoder = SentenceTransformer(modules=[Transformer(str(backbone)), Pooling(32, "mean"), Normalize()], device="cpu")
    whole = MetaEmbedModel.from_modules(encoder, num_query_vectors=4, num_document_vectors=8, projection_dim=16)
    root = tmp_path_factory.mktemp("metaembed")
    stirred(whole).save_pretrained(root / "plain")
    encoder.tokenizer.save_pretrained(root / "plain")
    how = {"text": {"method": "forward", "method_output_name": "token_embeddings"}}
    module = MetaEmbedTransformer(
        str(root / "plain"), modality_config=how, module_output_name="token_embeddings", unpad_inputs=False
    )
    model = MultiVectorEncoder(modules=[module], similarity_fn_name="maxsim", device="cpu")
    model.module_kwargs = {"0": ["task"]}
    return polyrep.save(model, root / "model")


def same(ours: Any, theirs: Any) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=1e-6)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_a_budget_is_a_slice_through_every_door(folder, tmp_path, count):
    model = MultiVectorEncoder(str(folder), trust_remote_code=True, device="cpu")
    everything = model.encode_document(TEXTS)
    assert [np.asarray(text).shape for text in everything] == [(8, 16)] * len(TEXTS)
    first = [text[:count] for text in everything]
    same(model.encode_document(TEXTS, token_pooling=MetaEmbedBudget(count)), first)
    stored = model.encode_document(TEXTS)
    same(MetaEmbedBudget(count).pool(stored), first)
    same(MetaEmbedBudget(count).pool(torch.stack([torch.as_tensor(text) for text in stored])), first)
    behind = MultiVectorEncoder(modules=[model[0], MetaEmbedBudget(count, "document")], device="cpu")
    same(behind.encode_document(TEXTS), first)
    again = MultiVectorEncoder(str(polyrep.save(behind, tmp_path / "cut")), trust_remote_code=True, device="cpu")
    same(again.encode_document(TEXTS), first)
    same(again.encode_query(ASKED), model.encode_query(ASKED))
    whole = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    tokens = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(TEXTS, padding=True, return_tensors="pt")
    same(vectors(whole, tokens, num_vectors=count), first)
    assert vectors(whole, tokens).shape == (len(TEXTS), 8, 16)
    whole.config.document_budget = count
    same(vectors(whole, tokens), first)
    assert whole.train()(**tokens).token_embeddings.shape[1] == 8, "training goes over all of them"


def test_one_index_of_its_vectors_is_searched_at_every_size_that_was_trained(folder, tmp_path):
    model = polyrep.load(folder)
    groups = groups_of(model)
    assert len(groups) > 2 and groups[-1] == (4, 8)
    source = write_lines(tmp_path / "corpus.jsonl", DOCUMENTS)
    encode([str(folder), "--input", str(source), "--output", str(tmp_path / "out"), "--precision", "float32"])
    index = open_index("memory:")
    index.add(EncodedCorpus(tmp_path / "out"))
    asked = np.stack([np.asarray(text) for text in model.encode_query(ASKED)])
    documents = np.stack([np.asarray(text) for text in model.encode_document(TEXTS)])
    for pair in groups:
        found = index.search(list(asked), 3, budget=pair[1])
        assert close(found, by_name(brute(asked, documents, pair, 3)))


def test_vector_one_is_a_model_of_one_vector(folder, tmp_path):
    model = MultiVectorEncoder(str(folder), trust_remote_code=True, device="cpu")
    one = polyrep.save(model, tmp_path / "one", view="sentence_embedding")
    single = SentenceTransformer(str(one), trust_remote_code=True, device="cpu")
    assert single.similarity_fn_name == "cosine" and single.get_embedding_dimension() == 16
    same(single.encode_document(TEXTS), [text[0] for text in model.encode_document(TEXTS)])
    same(single.encode_query(ASKED), [text[0] for text in model.encode_query(ASKED)])
    back = polyrep.save(single, tmp_path / "all", view="token_embeddings")
    again = MultiVectorEncoder(str(back), trust_remote_code=True, device="cpu")
    same(again.encode_document(TEXTS), model.encode_document(TEXTS))
    with pytest.raises((ValueError, InputError), match="polyrep.save"):
        SentenceTransformer(modules=[model[0]], device="cpu")


def test_queries_that_keep_their_tokens(backbone, tokenizer):
    torch.manual_seed(0)
    model = SentenceTransformer(modules=[Transformer(str(backbone)), Pooling(32, "mean")], device="cpu")
    whole = stirred(MetaEmbedModel.from_modules(model, query_side="tokens", num_document_vectors=4, projection_dim=8))
    assert whole.nested_groups == [[None, 1], [None, 4]]
    tokens = tokenizer(ASKED, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = whole(**tokens, task="query")
        expected = F.normalize(whole.projection(whole.encoder(**tokens).last_hidden_state), dim=-1)
    assert torch.equal(output.mask, tokens["attention_mask"].bool())
    torch.testing.assert_close(output.token_embeddings, expected)
    assert vectors(whole, tokens, task="document").shape == (3, 4, 8)
    with pytest.raises(ValueError, match="a query keeps one for each token"):
        whole(**tokens, task="query", num_vectors=2)


def test_vectors_are_no_wider_than_what_they_are_made_of():
    assert MetaEmbedConfig(projection_dim=128).width == 128
    assert MetaEmbedConfig(encoder_config={"model_type": "bert", "hidden_size": 96}, projection_dim=128).width == 96
    assert MetaEmbedHeadConfig(dim=96, projection_dim=128).width == 96
    assert MetaEmbedHeadConfig(dim=384, projection_dim=128).width == 128


def test_groups_are_nested_up_to_what_is_given():
    assert MetaEmbedConfig().nested_groups == [[1, 1], [2, 4], [4, 8], [8, 16], [8, 32]]
    assert MetaEmbedConfig(num_query_vectors=1, num_document_vectors=1).nested_groups == [[1, 1]]
    assert MetaEmbedConfig(**PAPER).nested_groups[-1] == [16, 64]
    budgets = MetaEmbedConfig(query_budget=4, document_budget=6)
    assert budgets.nested_groups == [[1, 1], [2, 4], [4, 6]]
    head = MetaEmbedHead(MetaEmbedHeadConfig(dim=8, query_side="tokens", num_document_vectors=8))
    assert MetaEmbedPooling(head).nested_groups == head.nested_groups == [[None, 1], [None, 4], [None, 8]]


# Vision and language.


@pytest.fixture(scope="module")
def pages() -> list[Image.Image]:
    """Two pages of different shape, which make different numbers of patches."""
    documents = [f"{document.title}\n{document.text}" for document in world.pages("velmora")]
    return [drawn_page("\n".join(documents[:8]), 693, 896), drawn_page("\n".join(documents[8:11]), 896, 504)]


def test_meta_tokens_stand_behind_pages_of_a_vision_language_model(pages, tmp_path):
    torch.manual_seed(0)
    colqwen2(tmp_path / "colqwen2")
    theirs = MultiVectorEncoder(str(tmp_path / "colqwen2"), device="cpu")
    whole = MetaEmbedModel.from_encoder(
        str(tmp_path / "colqwen2"), num_query_vectors=2, num_document_vectors=6, pooling="mean"
    )
    retriever, config = theirs[0].model, whole.config
    assert type(whole.encoder).__name__ == "Qwen2VLModel" and config.isolation == "causal" and config.own_projection
    assert torch.equal(whole.projection.weight, retriever.embedding_proj_layer.weight)
    stirred(whole)
    with pytest.raises(ValueError, match="projection_dim=8, but the backbone's own projection has width 16"):
        MetaEmbedModel.from_encoder(str(tmp_path / "colqwen2"), projection_dim=8)
    whole.save_pretrained(tmp_path / "ours")
    theirs[0].processor.save_pretrained(tmp_path / "ours")
    how = {"method": "forward", "method_output_name": "token_embeddings"}
    module = MetaEmbedTransformer(
        str(tmp_path / "ours"),
        modality_config=dict.fromkeys(theirs[0].modality_config, how),
        module_output_name="token_embeddings",
        unpad_inputs=False,
    )
    model = MultiVectorEncoder(modules=[module], device="cpu")
    together = model.encode_document(pages)
    assert [np.asarray(page).shape for page in together] == [(6, 16)] * 2
    for page, found in zip(pages, together, strict=True):
        same(model.encode_document([page]), [found])
    same(model.encode_document(pages, token_pooling=MetaEmbedBudget(2)), [page[:2] for page in together])
    batch = model.preprocess(pages, task="document")
    with torch.no_grad():
        inner = model[0].model
        inner.config.document_budget = 2
        same(inner(**batch).token_embeddings, [page[:2] for page in together])
        inner.config.document_budget = None
        inputs = {name: v for name, v in batch.items() if isinstance(v, torch.Tensor)}
        plain = inner._states(inputs)  # with ids, so that places of patches have rows and columns
        states, where = inner._with_metas(inputs, 3, 2, True)
    there = batch["attention_mask"].bool()
    moved = torch.stack([row[order == 0] for row, order in zip(states, where.order, strict=True)])
    torch.testing.assert_close(moved[there], plain[there], atol=1e-5, rtol=1e-5)
    asked = model.encode_query(["what plan covers drugs", "the image"])
    assert [np.asarray(query).shape for query in asked] == [(2, 16)] * 2


def test_a_head_stands_behind_a_page_retriever(pages, tmp_path):
    torch.manual_seed(0)
    colqwen2(tmp_path / "colqwen2")
    retriever = MultiVectorEncoder(str(tmp_path / "colqwen2"), device="cpu")
    head = MetaEmbedHead.from_backbone(retriever, num_query_vectors=2, num_document_vectors=4)
    stirred(head).save_pretrained(tmp_path / "head")
    pooling = MetaEmbedPooling.from_pretrained(str(tmp_path / "head"))
    found = retriever.encode_document(pages, token_pooling=pooling)
    for page, plain in zip(found, retriever.encode_document(pages), strict=True):
        with torch.no_grad():
            expected = head(torch.as_tensor(np.asarray(plain))[None]).token_embeddings[0]
        np.testing.assert_allclose(np.asarray(page), expected, atol=1e-5)
        assert page.shape == (4, 16)
    two = MetaEmbedPooling.from_pretrained(str(tmp_path / "head"), document_budget=2)
    same(retriever.encode_document(pages, token_pooling=two), [page[:2] for page in found])


# The head.


def head(**config: Any) -> MetaEmbedHead:
    torch.manual_seed(0)
    sizes = {"dim": 16, "num_query_vectors": 3, "num_document_vectors": 6, "num_layers": 2}
    return stirred(MetaEmbedHead(MetaEmbedHeadConfig(**sizes | config)))


def tokens_of(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return F.normalize(torch.randn(*mask.shape, 16, generator=torch.Generator().manual_seed(4)), dim=-1), mask


@pytest.mark.parametrize("projection", [None, 8])
def test_fewer_vectors_of_a_head_are_the_first_of_all_and_padding_is_nothing(projection):
    model, (tokens, mask) = head(projection_dim=projection), tokens_of([7, 4, 1])
    with torch.no_grad():
        everything = model(tokens, mask).token_embeddings
        for count in (1, 2, 5):
            fewer = model(tokens, mask, num_vectors=count).token_embeddings
            torch.testing.assert_close(fewer, everything[:, :count], atol=1e-6, rtol=0)
        for row, length in enumerate((7, 4, 1)):
            alone = model(tokens[row : row + 1, :length]).token_embeddings
            torch.testing.assert_close(alone[0], everything[row], atol=1e-6, rtol=0)
    assert (everything[:, 0] - everything[:, 1]).norm(dim=-1).min() > 1e-2


def means(tokens: torch.Tensor, sharpness: list[float]) -> list[torch.Tensor]:
    """A text's means, one after another: of all tokens, then around the one that those before cover least."""
    units = [token / token.norm() for token in tokens]
    found = [F.normalize(tokens.mean(0), dim=0)]
    for sharp in sharpness[1:]:
        covered = [max(float(unit @ mean) for mean in found) for unit in units]
        centre = units[int(np.argmin(covered))]
        shares = torch.stack([sharp * (unit @ centre) for unit in units]).softmax(0)
        found.append(F.normalize(shares @ tokens, dim=0))
    return found


@pytest.mark.parametrize("task", ["query", "document"])
def test_a_head_starts_as_means_around_what_is_not_covered_yet(task):
    model, (tokens, mask) = (
        MetaEmbedHead(MetaEmbedHeadConfig(dim=16, num_query_vectors=3)).double(),
        tokens_of([7, 4, 1]),
    )
    tokens = tokens.double() * torch.tensor([0.5, 2.0, 1.0, 3.0, 1.0, 0.7, 1.3], dtype=torch.float64)[:, None]
    with torch.no_grad():
        found = model.eval()(tokens, mask, task).token_embeddings
    count = {"query": 3, "document": 32}[task]
    for row, length in enumerate((7, 4, 1)):
        expected = means(tokens[row, :length], torch.linspace(*SHARPNESS, count).tolist())
        torch.testing.assert_close(found[row], torch.stack(expected), atol=1e-6, rtol=0)
    alike = MetaEmbedHead(MetaEmbedHeadConfig(dim=16, num_query_vectors=3, covering=False)).double().eval()
    with torch.no_grad():
        torch.testing.assert_close(alike(tokens, mask, task).token_embeddings, found[:, :1].expand_as(found))


def test_enough_means_are_the_tokens_themselves():
    """Tokens at right angles, each of them a mean once the means are sharp."""
    model, tokens = MetaEmbedHead(MetaEmbedHeadConfig(dim=16, num_document_vectors=9)), torch.eye(16)[None, :8]
    with torch.no_grad():
        model.sharpness.weight.fill_(50.0)
        found = model.eval()(tokens).token_embeddings[0, 1:]
    torch.testing.assert_close(found.sum(0)[:8], torch.ones(8))
    torch.testing.assert_close(found @ found.T, torch.eye(8), atol=1e-6, rtol=0)


def test_a_layer_attends_as_its_formula_says():
    """Token by token in float64: to all tokens, to the meta tokens before it, and to itself."""
    model, (tokens, mask) = head(num_layers=1, num_heads=2).double(), tokens_of([5, 3])
    tokens, layer, metas = tokens.double(), model.layers[0], model.metas.weight[3:]
    sharpness = model.sharpness.weight[3:, 0].tolist()
    with torch.no_grad():
        found = model(tokens, mask).token_embeddings
        for row, length in enumerate((5, 3)):
            text = tokens[row, :length]
            starts = means(text, sharpness)
            seeds = [meta + 4 * start for meta, start in zip(metas, starts, strict=True)]
            normed = [layer.norm(seed) for seed in seeds]
            for place, meta in enumerate(seeds):
                context = [layer.token_norm(token) for token in text] + normed[: place + 1]
                mixed = []
                for part in (slice(0, 8), slice(8, 16)):
                    query = layer.query(normed[place])[part]
                    scores = torch.stack([query @ layer.key(other)[part] for other in context]) / 8**0.5
                    values = torch.stack([layer.value(other)[part] for other in context])
                    mixed.append(scores.softmax(0) @ values)
                state = meta + layer.out(torch.cat(mixed))
                state = state + layer.ffn_out(F.gelu(layer.ffn_in(layer.ffn_norm(state))))
                expected = F.normalize(starts[place] + model.residual(model.norm(state)), dim=0)
                torch.testing.assert_close(found[row, place], expected, atol=1e-9, rtol=0)


def test_queries_of_a_head_keep_their_tokens_or_have_vectors(multi_vector_model):
    for side, shape in (("meta", (3, 16)), ("tokens", None)):
        pooling = MetaEmbedPooling(head(query_side=side))
        found = multi_vector_model.encode_query(ASKED, token_pooling=pooling)
        plain = multi_vector_model.encode_query(ASKED)
        if shape:
            assert {np.asarray(query).shape for query in found} == {shape}
        else:
            same(found, plain)
        documents = multi_vector_model.encode_document(TEXTS, token_pooling=pooling)
        assert {np.asarray(document).shape for document in documents} == {(6, 16)}


@pytest.mark.parametrize("side", ["meta", "tokens"])
def test_rows_of_a_head_ask_with_what_goes_with_their_documents(side):
    model, lengths = head(query_side=side, groups=[[1, 1], [3, 6]] if side == "meta" else None).eval(), [7, 4, 1]
    tokens, mask = tokens_of(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    texts = Embeddings("tokens", tokens[mask].numpy().astype(np.float16), offsets, None, 16, 0.0, Path())
    asked = queries_by_head(model, texts, (1, 2, 6))
    held = pooled(texts, by_head(model, "document", [1, 6]))
    with torch.no_grad():
        expected = [
            model(text[:length][None].half().float(), task="query")
            for text, length in zip(tokens, lengths, strict=True)
        ]
    for documents, count in ((1, 1), (2, 3), (6, 3)):
        for place, output in enumerate(expected):
            vectors = output.token_embeddings[0]
            vectors = vectors[:count] if side == "meta" else vectors
            np.testing.assert_allclose(row_of(asked[documents], place).values, vectors, atol=1e-3)
    one, single, similarity = as_searched(asked[1], held[1])
    assert (one.kind, single.kind, similarity) == ("sentence", "sentence", "dot")
    whole = [
        row_of(asked[1], place).values.astype(np.float32) @ held[1].values.astype(np.float32).T for place in range(3)
    ]
    np.testing.assert_allclose(one.values @ single.values.T, [scores.sum(0) for scores in whole], atol=1e-2)
    assert as_searched(asked[6], held[6]) == (asked[6], held[6], "maxsim")


@pytest.mark.parametrize(("side", "task"), [("meta", "query"), ("meta", "document"), ("tokens", "query")])
def test_a_pooling_gives_the_same_for_a_text_a_list_and_a_batch_padded_on_either_side(side, task):
    model, lengths = head(query_side=side, dropout=0.5).eval(), [7, 4, 1]
    tokens, mask = tokens_of(lengths)
    rows = [text[:length] for text, length in zip(tokens, lengths, strict=True)]
    left = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    with torch.no_grad():
        expected = [model(row[None], task=task).token_embeddings[0] for row in rows]
    pooling = MetaEmbedPooling(model.train())  # nobody encodes with dropout
    filled = torch.where(mask[..., None], tokens, 7.0)
    found = {
        "a text": [pooling.pool_one(row, task=task) for row in rows],
        "a list": pooling.pool(rows, task=task),
        "by its mask": pooling.pool(filled, task=task, attention_mask=mask),
        "by its zeros": pooling.pool(left, task=task, padding_side="left"),
    }
    assert pooling.model.training, "training goes on as it was"
    for name, texts in found.items():
        for text, vectors in zip(texts, expected, strict=True):
            text = text.flip(0) if name == "by its zeros" else text  # what is padded on the left
            vectors = vectors.flip(0) if name == "by its zeros" else vectors
            torch.testing.assert_close(text[: len(vectors)], vectors, atol=1e-6, rtol=0, msg=name)
            assert not text[len(vectors) :].any(), name


def test_a_pooling_takes_what_is_no_query_for_a_document_and_refuses_what_it_cannot_pool():
    pooling, (tokens, _) = MetaEmbedPooling(head()), tokens_of([3, 3])
    assert pooling.pool([]) == [] and pooling.pool(tokens[:0]).shape == (0, 3, 16)
    for task in (None, "passage"):
        assert torch.equal(pooling.pool(tokens, task=task), pooling.pool(tokens, task="document"))
    assert not torch.allclose(pooling.pool(tokens, task="query"), pooling.pool(tokens)[:, :3])
    with pytest.raises(ValueError, match="^MetaEmbedPooling: padding_side='middle' is neither"):
        pooling.pool(tokens, padding_side="middle")
    with pytest.raises(ValueError, match=r"^MetaEmbedPooling: a text .* shape \(16,\).* shape \(tokens, dim\)"):
        pooling.pool([tokens[0], tokens[0, 0]])


@pytest.fixture
def pooled_backbone(backbone: Path, tmp_path: Path) -> Path:
    """A model of one vector a text, saved."""
    modules = [Transformer(str(backbone)), Pooling(32, "mean"), Normalize()]
    SentenceTransformer(modules=modules, prompts={"query": "list "}, device="cpu").save_pretrained(
        str(tmp_path / "pooled")
    )
    return tmp_path / "pooled"


def test_token_states_of_a_model_of_one_vector_have_its_vector_as_their_mean(pooled_backbone):
    plain = SentenceTransformer(str(pooled_backbone), device="cpu")
    opened = open_backbone(str(pooled_backbone), None)
    for task, texts in (("query", ASKED), ("document", TEXTS)):
        found = [np.asarray(tokens).mean(0) for tokens in getattr(opened, f"encode_{task}")(texts)]
        same([mean / np.linalg.norm(mean) for mean in found], getattr(plain, f"encode_{task}")(texts))


def test_a_head_is_trained_on_a_model_of_one_vector_and_is_one_folder_with_it(pooled_backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_beir(tmp_path / "tiny", "train")
    flags = "--num_query_vectors 2 --num_document_vectors 4 --projection_dim 8 --depth 4 --max_steps 2"
    flags += " --per_device_train_batch_size 2 --disable_tqdm true --output_dir out --overwrite true"
    where = ["--backbone", str(pooled_backbone), "--datasets", str(data)]
    assert main(["train", "metaembed-minilm-frozen", *where, *flags.split()]) == 0
    model = MultiVectorEncoder("out/final", trust_remote_code=True, device="cpu")
    assert type(model[0].model).__name__ == "MetaEmbedForRetrieval" and model.prompts["query"] == "list "
    assert {np.asarray(text).shape for text in model.encode_document(TEXTS)} == {(4, 8)}
    pooling = MetaEmbedPooling.from_pretrained("out/head")
    backbone = open_backbone(str(pooled_backbone), None)
    for task, texts in (("query", ASKED), ("document", TEXTS)):
        encode = f"encode_{task}"
        same(getattr(backbone, encode)(texts, token_pooling=pooling), getattr(model, encode)(texts))


def test_a_model_that_pools_otherwise_is_no_late_interaction_model(backbone, tmp_path, capsys):
    modules = [Transformer(str(backbone)), Pooling(32, "cls")]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(tmp_path / "cls"))
    assert open_backbone(str(tmp_path / "cls"), None) is None
    data = write_beir(tmp_path / "tiny", "train")
    where = ["--backbone", str(tmp_path / "cls"), "--datasets", str(data), "--output_dir", str(tmp_path / "out")]
    assert main(["train", "metaembed-minilm-frozen", *where]) != 0
    assert "is a SentenceTransformer, but this head reads several vectors a text" in capsys.readouterr().err


# Bad input.


def test_budgets_that_no_text_has_are_refused_with_both_numbers(folder):
    model = MultiVectorEncoder(str(folder), trust_remote_code=True, device="cpu")
    with pytest.raises(ValueError, match="n=0 is no number of vectors"):
        MetaEmbedBudget(0)
    with pytest.raises(ValueError, match="n='4' is no number of vectors"):
        MetaEmbedBudget("4")
    with pytest.raises(ValueError, match="a document holds 8 vectors; 64 asked. Use up to 8"):
        model.encode_document(TEXTS, token_pooling=MetaEmbedBudget(64))
    with pytest.raises(ValueError, match="a query holds 4 vectors; 5 asked. Use up to 4"):
        model.encode_query(ASKED, token_pooling=MetaEmbedBudget(5))
    whole = model[0].model
    tokens = model.preprocess(TEXTS)
    for asked in (0, 9, True):
        with pytest.raises(ValueError, match=f"a document holds 8 vectors; {asked} asked. Use 1 to 8"):
            whole(tokens["input_ids"], num_vectors=asked)


def test_texts_leave_room_for_the_meta_tokens(folder, backbone):
    model = MultiVectorEncoder(str(folder), trust_remote_code=True, device="cpu")
    assert model.max_seq_length == 64 - 8, "positions less meta tokens"
    model.encode_document(["a " * 200])
    whole = model[0].model
    with pytest.raises(ValueError, match="texts of 57 tokens.*positions for 56. Cut them: max_seq_length=56"):
        whole(torch.full((1, 57), 7))
    with pytest.raises(ValueError, match="62 meta tokens, but the encoder has positions for 64.*Use 61 or fewer"):
        MetaEmbedModel.from_encoder(str(backbone), num_document_vectors=62)


def test_a_backbone_without_one_sequence_of_words_is_refused(backbone, tokenizer):
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=small, vision_config=small | {"image_size": 32, "patch_size": 16})
    with pytest.raises(ValueError, match="CLIPModel has no embeddings of words"):
        MetaEmbedModel.around(CLIPModel(config), tokenizer)
    model = SentenceTransformer(modules=[Transformer(str(backbone)), Pooling(32, "mean"), Dense(32, 16)], device="cpu")
    with pytest.raises(ValueError, match=r"Transformer \+ Pooling \+ Dense.*Take its transformer alone"):
        MetaEmbedModel.from_modules(model)


def test_a_head_refuses_what_it_cannot_read():
    model, (tokens, mask) = head(), tokens_of([5, 3])
    with pytest.raises(ValueError, match=r"shape \(2, 5, 8\).*\(texts, tokens, 16\)"):
        model(tokens[..., :8], mask)
    with pytest.raises(ValueError, match=r"a mask of shape \(2, 4\)"):
        model(tokens, mask[:, :4])
    with pytest.raises(ValueError, match="text 1 of the batch has no token that counts"):
        model(tokens, mask & torch.tensor([[True], [False]]))
    with pytest.raises(ValueError, match="text 0 of the batch has a token vector that is zero or not finite"):
        model(tokens.masked_fill(torch.arange(5)[None, :, None] == 0, torch.nan), mask)
    with pytest.raises(ValueError, match="a document holds 6 vectors; 7 asked"):
        model(tokens, mask, num_vectors=7)
