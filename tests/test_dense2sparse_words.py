"""Words of Dense2Sparse in vocabularies of SentencePiece and of bytes, and beside the words of a prompt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast
from world import pages, write_world

import polyrep
from polyrep.cli import main, train
from polyrep.methods import Dense2SparseForRetrieval, Dense2SparseModel, Dense2SparsePooling
from polyrep.training.sides import SentenceSide

LANGUAGES = ("german", "chinese")
TEXTS = [
    "Der Zug fährt um 7:10 Uhr, Babette bleibt.",
    "每年五月到九月，从青螺码头开往云屿",
    "Uhr",
    "",
    "Zug Zug (Zug) zug",
]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def unigram() -> Tokenizer:
    """As XLM-R, mT5 and multilingual E5 have it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    control = [*SPECIAL, "<0x0A>", "<mask>"]
    tokenizer.train_from_iterator(
        texts_of(*LANGUAGES), trainers.UnigramTrainer(vocab_size=1500, special_tokens=control, unk_token="<unk>")
    )
    return tokenizer


def bytes_bpe() -> Tokenizer:
    """As RoBERTa, ModernBERT and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts_of(*LANGUAGES), trainer)
    return tokenizer


def sentence_bpe() -> Tokenizer:
    """As Gemma and Llama have it: BPE with the mark of SentencePiece, and single bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=[*SPECIAL, *(f"<0x{code:02X}>" for code in range(256))], max_token_length=12
    )
    tokenizer.train_from_iterator((f" {word}" for text in texts_of(*LANGUAGES) for word in text.split()), trainer)
    return tokenizer


KINDS: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "Unigram": (unigram, "▁"),
    "bytes": (bytes_bpe, "Ġ"),
    "SentencePiece BPE": (sentence_bpe, "▁"),
}


def texts_of(*names: str) -> list[str]:
    return [text for page in pages(*names) for text in (page.title, page.text, *page.queries)]


def write_encoder(folder: Path, tokens: Tokenizer, side: str = "right") -> Path:
    """A random BERT over a tokenizer, as a plain transformers folder."""
    tokens.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(token, SPECIAL.index(token)) for token in ("<s>", "</s>")]
    )
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, padding_side=side, model_max_length=512, **names)
    tokenizer.add_tokens(["<image>", "zzz\nzzz"])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer) + 5, **sizes)).eval().save_pretrained(folder)
    return folder


def sentence_model_of(folder: Path, **options: Any) -> SentenceTransformer:
    return SentenceTransformer(
        modules=[Transformer(str(folder)), Pooling(32, "mean"), Normalize()], device="cpu", **options
    )


@pytest.fixture(scope="module", params=list(KINDS))
def encoder(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A backbone's folder, and the mark of its vocabulary."""
    make, mark = KINDS[request.param]
    return write_encoder(tmp_path_factory.mktemp("encoder"), make()), mark


@pytest.fixture
def head(encoder) -> Dense2SparseModel:
    head = Dense2SparseModel.from_backbone(sentence_model_of(encoder[0]))
    with torch.no_grad():
        head.own_weight.uniform_(0.5, 2.0)
    return head


def own_words(model: SparseEncoder, text: str) -> list[str]:
    return [word for word, _ in model.decode(model.encode_query([text], expand=False)[0])]


def test_a_vocabulary_says_how_it_marks_words(encoder, head):
    folder, mark = encoder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert head.config.word_mark == mark and head.config.vocab_size == len(tokenizer)
    assert head.config.added_tokens == 2
    reopened = type(head.config).from_dict(head.config.to_dict())
    assert reopened.word_mark == mark
    known = [(i, word) for i, word in enumerate(head.words) if "\n" not in tokenizer.convert_ids_to_tokens(i)]
    assert [word for _, word in known] == tokenizer.convert_ids_to_tokens([i for i, _ in known])


def test_what_is_no_word_never_counts_as_one(encoder, head):
    """Special and added tokens, spaces, single bytes, and of bytes what is no whole character."""
    folder, mark = encoder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for word, i in tokenizer.get_vocab().items():
        if mark == "Ġ" and i not in expected:
            text = tokenizer.backend_tokenizer.decoder.decode([word])
            letters = "" if "\ufffd" in text else text
        else:
            letters = "" if word.startswith("<0x") or word == "<mask>" else word.replace("▁", " ")
        if not letters.strip():
            expected.add(i)
    assert set(head.config.special_token_ids) == expected
    assert len(expected) > len(SPECIAL) + 2
    ids = torch.tensor([sorted(expected)])
    assert not head(torch.randn(1, 32), ids, task="document").sentence_embedding.any()


def test_decode_writes_words_for_people(encoder, head):
    folder, mark = encoder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = SparseEncoder(modules=[*sentence_model_of(folder).children(), Dense2SparsePooling(head)], device="cpu")
    for text in ("der Zug bleibt am Bahnsteig", "der Schaffner verlässt Föhnwinkel"):
        shown = own_words(model, f" {text}")
        begun = {word for word in shown if not word.startswith("##")}
        assert begun <= {text[a:b] for a in range(len(text)) for b in range(a + 1, len(text) + 1)} and "der" in begun
        assert not any(set("▁ĠĊ") & set(word) for word in shown) and "Ã" not in "".join(shown)
        # Put together again, pieces are the text: of each token once, in its order.
        pieces = []
        for i in tokenizer(f" {text}")["input_ids"]:
            one = torch.zeros(head.config.vocab_size)
            one[i] = 1.0
            if i not in head.config.special_token_ids:
                pieces.append(model.decode(one)[0][0])
            elif tokenizer.convert_ids_to_tokens(i) == "▁":  # a word's space, apart from it
                pieces.append("")
        joined = "".join(piece[2:] if piece.startswith("##") else f" {piece}" for piece in pieces)
        assert joined.strip() == text
    assert set("".join(own_words(model, "每年五月到九月"))) == set("每年五月到九月"), "and nothing marked"


def test_clip_marks_ends_of_words_and_is_refused(backbone, tmp_path):
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    ends = Tokenizer(models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"))
    ends.pre_tokenizer = pre_tokenizers.ByteLevel()
    plain = Tokenizer(models.BPE({"a": 0}, []))
    for tokens, kind in ((words, "WordLevel"), (ends, "BPE"), (plain, "BPE")):
        with pytest.raises(ValueError, match=rf"is {kind}, and neither WordPiece.*own_tokens='none'"):
            Dense2SparseModel.from_mlm(
                BertModel.from_pretrained(backbone), 32, PreTrainedTokenizerFast(tokenizer_object=tokens)
            )


# --- prompts ---

PROMPTS = {"query": "query: ", "document": "Seite: "}


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_prompts_words_are_not_the_texts_own_in_any_form(encoder, head, side, tmp_path):
    """Without expansion and lengths, a text has the weights that it has without a prompt."""
    folder = shutil.copytree(encoder[0], tmp_path / "encoder")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    tokenizer.save_pretrained(folder)
    dense = sentence_model_of(folder, prompts=PROMPTS)
    dense.save_pretrained(str(tmp_path / "dense"))
    pipeline = SparseEncoder(modules=[*dense.children(), Dense2SparsePooling(head)], prompts=PROMPTS, device="cpu")
    bare = SparseEncoder(modules=[*dense.children(), Dense2SparsePooling(head)], device="cpu")
    one = polyrep.save(pipeline, tmp_path / "one")
    retriever: Any = SparseEncoder(str(one), trust_remote_code=True, device="cpu")
    assert len(retriever) == 1 and retriever.prompts == PROMPTS
    # A word at the very beginning lacks a space that it has behind a prompt, so each text begins with one.
    texts = [f" {text}" for text in TEXTS if text]
    for task in ("query", "document"):
        found = {
            name: (model.encode_query if task == "query" else model.encode_document)
            for name, model in (("pipeline", pipeline), ("one", retriever), ("bare", bare))
        }
        own = {name: encode(texts, expand=False).to_dense() for name, encode in found.items()}
        torch.testing.assert_close(own["one"], own["pipeline"])
        stripped = {
            name: encode([text.strip() for text in texts], expand=False).to_dense() for name, encode in found.items()
        }
        torch.testing.assert_close(stripped["one"] > 0, own["bare"] > 0)
        torch.testing.assert_close(stripped["pipeline"] > 0, own["bare"] > 0)
        whole = found["one"](TEXTS).to_dense()
        torch.testing.assert_close(whole, found["pipeline"](TEXTS).to_dense())
        assert not whole[TEXTS.index("")].any(), "a prompt alone is an empty text"
        auto = AutoModel.from_pretrained(one, trust_remote_code=True).eval()
        batch = tokenizer([PROMPTS[task] + text for text in TEXTS], padding=True, return_tensors="pt")
        with torch.no_grad():
            torch.testing.assert_close(auto(**batch, task=task).sentence_embedding, whole)
    other = {"prompt": "Bahnsteig: "}  # of a call, and none that the folder knows
    torch.testing.assert_close(
        retriever.encode_query(TEXTS, **other).to_dense(), pipeline.encode_query(TEXTS, **other).to_dense()
    )
    assert not {"Bahnsteig", "##Bahnsteig", ":"} & {
        word for word, _ in retriever.decode(retriever.encode_query(["Zug"], expand=False, **other)[0])
    }


def test_one_word_behind_a_prompt_is_no_empty_text(encoder):
    dense = sentence_model_of(encoder[0], prompts=PROMPTS)
    head = Dense2SparseModel.from_backbone(dense, own_tokens="none")
    model = SparseEncoder(modules=[*dense.children(), Dense2SparsePooling(head)], prompts=PROMPTS, device="cpu")
    one = SparseEncoder(modules=[*dense.children(), Dense2SparsePooling(head)], device="cpu")
    assert (model.encode_query(["Uhr", ""]).to_dense() > 0).any(1).tolist() == [True, False]
    assert (one.encode_query(["Uhr", ""]).to_dense() > 0).any(1).tolist() == [True, False]


def with_head(dense: SentenceTransformer, head: Dense2SparseModel, prompts: dict[str, str]) -> SparseEncoder:
    return SparseEncoder(modules=[*dense.children(), Dense2SparsePooling(head)], prompts=prompts, device="cpu")


@pytest.mark.parametrize("text", ["bleibt am Bahnsteig", "(bleibt)", "7:10"])
def test_a_prompt_may_end_in_a_word(encoder, head, text, tmp_path):
    """Whose space is a token in some vocabularies, and dropped in others; the next text's first word has one, too."""
    prompts = {"query": "Zug Uhr ", "document": ""}
    dense = sentence_model_of(encoder[0], prompts=prompts)
    pipeline = with_head(dense, head, prompts)
    one = SparseEncoder(str(polyrep.save(pipeline, tmp_path / "one")), trust_remote_code=True, device="cpu")
    expected = sorted(own_words(with_head(dense, head, {}), f" {text}"))
    side = SentenceSide.encode(dense, {"q": text}, "query", "some", cache_dir=str(tmp_path))
    with torch.no_grad():
        trained = head(**side.vectors_of(np.arange(1)), task="query", expand=False).sentence_embedding[0]
    assert sorted(own_words(pipeline, text)) == sorted(own_words(one, text)) == expected
    assert sorted(word for word, _ in head.decode(trained)) == expected
    of_call = pipeline.encode_query([text], prompt="Seite Uhr ", expand=False)[0]
    assert sorted(word for word, _ in pipeline.decode(of_call)) == expected


def test_a_prompt_may_begin_with_another(encoder, head):
    for prompts in ({"query": "Zug: Uhr: ", "document": "Zug: "}, {"query": "Zug: ", "document": "Zug: Uhr: "}):
        dense = sentence_model_of(encoder[0], prompts=prompts)
        retriever = Dense2SparseForRetrieval.from_modules(dense, head).eval()
        for task, prompt in prompts.items():
            batch = dense.tokenizer([f"{prompt}Babette"], return_tensors="pt")
            with torch.no_grad():
                found = retriever(**batch, task=task, expand=False).sentence_embedding
            bare = own_words(with_head(dense, head, {}), " Babette")
            assert sorted(word for word, _ in retriever.decode(found)[0]) == sorted(bare)


def test_a_prompts_end_may_grow_into_the_text(tmp_path):
    """A prompt without a space behind it: its colon and the text's quotation mark are one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [*SPECIAL, *alphabet, ':"']
    tokens = Tokenizer(models.BPE({entry: i for i, entry in enumerate(entries)}, [(":", '"')]))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    prompts = {"query": "Instruct: find.\nQuery:", "document": ""}
    dense = sentence_model_of(write_encoder(tmp_path / "encoder", tokens), prompts=prompts)
    head = Dense2SparseModel.from_backbone(dense)
    retriever = Dense2SparseForRetrieval.from_modules(dense, head).eval()
    for text, own in (('"zz"', '"z'), ("zz", "z")):
        batch = dense.tokenizer([prompts["query"] + text], return_tensors="pt")
        with torch.no_grad():
            found = retriever(**batch, task="query", expand=False).sentence_embedding[0]
        assert {word.removeprefix("##") for word, _ in retriever.decode(found)} == set(own)


def test_one_word_behind_a_prompt_is_no_empty_text_in_words_of_another_model(encoder, tmp_path):
    dense = sentence_model_of(encoder[0], prompts=PROMPTS)
    other = write_encoder(tmp_path / "other", unigram())
    head = Dense2SparseModel.from_mlm(str(other), 32, own_tokens="none", foreign_words=True)
    pipeline = with_head(dense, head, PROMPTS)
    one = SparseEncoder(str(polyrep.save(pipeline, tmp_path / "one")), trust_remote_code=True, device="cpu")
    for model, options in ((pipeline, {}), (one, {}), (one, {"prompt": "Bahnsteig: "})):
        found = model.encode_query(["Zug", ""], **options).to_dense()
        assert (found > 0).any(1).tolist() == [True, False]


def test_training_reads_the_words_that_encoding_reads(encoder, head, tmp_path):
    dense = sentence_model_of(encoder[0], prompts=PROMPTS)
    texts = {str(i): text for i, text in enumerate(TEXTS) if text}
    pipeline = SparseEncoder(modules=[*dense.children(), Dense2SparsePooling(head)], prompts=PROMPTS, device="cpu")
    for task in ("query", "document"):
        side = SentenceSide.encode(dense, texts, task, "some", cache_dir=str(tmp_path))
        batch = side.vectors_of(torch.arange(len(texts)).numpy())
        with torch.no_grad():
            found = head(**batch, task=task, expand=False).sentence_embedding
        encode = pipeline.encode_query if task == "query" else pipeline.encode_document
        own = encode(list(texts.values()), expand=False).to_dense()
        torch.testing.assert_close(found > 0, own > 0)
        # Vectors are cached in half precision, and words of the text alone may differ by that.
        torch.testing.assert_close(found, own, atol=2e-3, rtol=2e-3)


def test_an_exported_graph_knows_the_prompt_and_what_is_no_word(encoder, head, tmp_path):
    dense = sentence_model_of(encoder[0], prompts=PROMPTS)
    pipeline = SparseEncoder(modules=[*dense.children(), Dense2SparsePooling(head)], prompts=PROMPTS, device="cpu")
    folder = polyrep.save(pipeline, tmp_path / "one")
    onnxruntime = pytest.importorskip("onnxruntime")
    assert main(["export-onnx", str(folder)]) == 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for task, encode in (("query", pipeline.encode_query), ("document", pipeline.encode_document)):
        session = onnxruntime.InferenceSession(str(folder / "onnx" / f"{task}.onnx"))
        batch = tokenizer([PROMPTS[task] + text for text in TEXTS], padding=True, return_tensors="np")
        found = session.run(None, {node.name: batch[node.name] for node in session.get_inputs()})[0]
        np.testing.assert_allclose(found, encode(TEXTS).to_dense(), atol=1e-4, rtol=1e-4)


# --- from end to end ---


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_multilingual_backbone_becomes_a_lexical_model(encoder, language, tmp_path):
    dense = sentence_model_of(encoder[0], prompts=PROMPTS)
    dense.save_pretrained(str(tmp_path / "dense"))
    data = write_world(tmp_path / language, language)
    shipped = polyrep.files.shipped_folder("hub_configs") / "dense2sparse-minilm"
    flags = ["--backbone", str(tmp_path / "dense"), "--datasets", str(data), "--max_steps", "3"]
    flags += ["--per_device_train_batch_size", "4", "--save_strategy", "no", "--cache_dir", str(tmp_path / "cache")]
    train([str(shipped), *flags, "--output_dir", str(tmp_path / "out"), "--bf16", "false"])
    model = polyrep.load(tmp_path / "out" / "final", trust_remote_code=True)
    assert len(model) == 1 and isinstance(model[0].model, Dense2SparseForRetrieval) and model.prompts == PROMPTS
    known = pages(language)
    documents = model.encode_document([page.text for page in known])
    # By its own words the first sentence of a page finds that page; what a random encoder adds finds anything.
    stop = "。" if language == "chinese" else ". "
    queries = [page.text.split(stop)[0] for page in known]
    own = model.encode_document([page.text for page in known], expand=False)
    best = model.similarity(model.encode_query(queries, expand=False), own).argmax(1).tolist()
    assert best == list(range(len(known)))
    config = json.loads((tmp_path / "out" / "final" / "config.json").read_text())
    assert config["expansion_size"] < config["vocab_size"] and config["word_mark"] == encoder[1]
    special = set(config["special_token_ids"])
    assert not special & set(documents.to_dense().nonzero()[:, 1].tolist())
    words = {word for row in model.decode(documents) for word, _ in row}
    assert not any(set("▁Ġ") & set(word) for word in words) and len(words) > 100
    pipeline = polyrep.save(model, tmp_path / "pipeline", form="pipeline")
    apart = SparseEncoder(str(pipeline), trust_remote_code=True, device="cpu")
    torch.testing.assert_close(
        apart.encode_query(queries[:5]).to_dense(), model.encode_query(queries[:5]).to_dense().cpu()
    )
    assert apart.decode(documents[0], top_k=5) == model.decode(documents[0], top_k=5)
