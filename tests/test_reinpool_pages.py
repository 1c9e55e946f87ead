"""ReinPool behind page-image retrievers of transformers, on pages of text, and pictures of what its filter keeps."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import world
from drawings import page as drawn_page
from PIL import Image
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.multi_vector_encoder.interpretability import get_n_patches
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    ColPaliConfig,
    ColPaliForRetrieval,
    ColPaliProcessor,
    ColQwen2Config,
    ColQwen2ForRetrieval,
    ColQwen2Processor,
    PaliGemmaConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import polyrep
from polyrep import InputError
from polyrep.methods import ReinPoolConfig, ReinPoolForRetrieval, ReinPoolModel, ReinPoolPooling
from polyrep.methods.reinpool.show import kept_patches, kept_tokens_html, kept_tokens_png, token_pieces

QUERIES = ["what plan covers drugs", "the image . what image"]
DIM = 16
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@dataclass
class PageRetriever:
    """A tiny random retriever of page images that scores image patches only.

    Attributes:
        model: The retriever.
        image_token_id: Of a patch.
        grids: (rows, columns) of patches of each page.
    """

    model: MultiVectorEncoder
    image_token_id: int
    grids: list[tuple[int, int]]

    @property
    def patches(self) -> list[int]:
        return [rows * columns for rows, columns in self.grids]


def word_tokenizer(special: list[str], **tokens: str) -> PreTrainedTokenizerFast:
    words = [*special, "<unk>", *"user Query Question : Describe the image . what plan covers drugs".split()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", additional_special_tokens=special, **tokens
    )


def colpali(folder: Path) -> int:
    """Every page is stretched to 8 rows of 8 patches of 14 pixels."""
    tokenizer = word_tokenizer(["<pad>", "<bos>", "<image>"], pad_token="<pad>", bos_token="<bos>")
    image_processor = SiglipImageProcessorPil(size={"height": 112, "width": 112})
    image_processor.image_seq_length = 64
    processor = ColPaliProcessor(image_processor, tokenizer)
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 112,
        "patch_size": 14,
        "vision_use_head": False,
    }
    config = PaliGemmaConfig(
        image_token_index=processor.image_token_id,
        vision_config=vision,
        text_config=TEXT | {"model_type": "gemma", "head_dim": 16, "vocab_size": len(tokenizer), "pad_token_id": 0},
        projection_dim=32,
    )
    ColPaliForRetrieval(ColPaliConfig(vlm_config=config, embedding_dim=DIM)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return processor.image_token_id


def colqwen2(folder: Path) -> int:
    """Pages keep their shape, up to 40 patches of 28 pixels, so a batch is padded, and to the left."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    tokenizer = word_tokenizer(special, pad_token=special[0], padding_side="left")
    image_processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 40 * 28 * 28})
    processor = ColQwen2Processor(image_processor, tokenizer)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    config = Qwen2VLConfig(
        image_token_id=processor.image_token_id,
        vision_start_token_id=3,
        vision_end_token_id=4,
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1},
        text_config=TEXT
        | {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "rope_parameters": rope},
    )
    ColQwen2ForRetrieval(ColQwen2Config(vlm_config=config, embedding_dim=DIM)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return processor.image_token_id


@pytest.fixture(scope="module")
def pages() -> list[Image.Image]:
    """One full of text in portrait, one with less in landscape."""
    documents = [f"{document.title}\n{document.text}" for document in world.pages("velmora")]
    return [drawn_page("\n".join(documents[:8]), 693, 896), drawn_page("\n".join(documents[8:11]), 896, 504)]


@pytest.fixture(scope="module", params=[colpali, colqwen2], ids=["ColPali", "ColQwen2"])
def retriever(request, pages, tmp_path_factory) -> PageRetriever:
    folder = tmp_path_factory.mktemp(request.param.__name__)
    torch.manual_seed(0)
    image_token_id = request.param(folder)
    transformer = MultiVectorEncoder(str(folder), device="cpu")[0]  # by its ForRetrieval class
    mask = MultiVectorMask(keep_only_token_ids=[image_token_id])
    if request.param is colpali:
        grids = [(8, 8) for _ in pages]
    else:  # the page shrunk to 40 patches, whole patches of it
        grids = [(int(math.sqrt(40 * p.height / p.width)), int(math.sqrt(40 * p.width / p.height))) for p in pages]
    return PageRetriever(MultiVectorEncoder(modules=[transformer, mask], device="cpu"), image_token_id, grids)


def pooling_of(vectors: list[torch.Tensor] | None = None, **config: Any) -> ReinPoolPooling:
    """A random head; given the vectors of pages, it keeps half of them."""
    torch.manual_seed(1)
    head = ReinPoolModel(ReinPoolConfig(**{"dim": DIM, "pooling": "kmeans", "num_vectors": 4} | config))
    with torch.no_grad():
        head.keep.weight.normal_()
        if vectors:
            logits = [head.keep_logits(x[None], torch.ones(1, len(x), dtype=torch.bool)) for x in vectors]
            ordered = torch.cat(logits, 1)[0].sort().values
            head.keep.bias -= ordered[len(ordered) // 2 - 1 :][:2].mean()  # between two, so that rounding moves none
    return ReinPoolPooling(head)


def as_pipeline(retriever: PageRetriever, pooling: ReinPoolPooling) -> MultiVectorEncoder:
    return MultiVectorEncoder(modules=[*retriever.model.children(), pooling], device="cpu")


def close(ours: list[torch.Tensor], theirs: list[torch.Tensor], atol: float = 1e-5) -> bool:
    return [x.shape for x in ours] == [x.shape for x in theirs] and all(
        torch.allclose(x, y, rtol=0, atol=atol) for x, y in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("way", ["call", "pipeline"])
def test_only_patches_reach_the_pooling(retriever, pages, way):
    pooling = pooling_of()
    seen: list[torch.Tensor] = []
    pooling.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][inputs[1]]))
    for page, patches in zip(pages, retriever.patches, strict=True):
        features = retriever.model.preprocess([page], task="document")
        is_patch = features["input_ids"] == retriever.image_token_id
        assert patches == is_patch.sum() < is_patch.numel()  # there are words of the prompt to leave out
        with torch.inference_mode():
            vectors = retriever.model[0](features)["token_embeddings"]
        if way == "call":
            retriever.model.encode_document([page], token_pooling=pooling)
        else:
            as_pipeline(retriever, pooling).encode_document([page])
        assert close([seen.pop()], [vectors[is_patch]])
    assert not seen


@pytest.mark.parametrize("in_rows", [False, True], ids=["set", "rows"])
def test_pages_pool_alike_in_a_call_and_in_a_pipeline(retriever, pages, in_rows):
    patches = retriever.model.encode_document(pages)
    assert [len(vectors) for vectors in patches] == retriever.patches
    pooling = pooling_of(patches, patch_columns=retriever.grids[0][1] if in_rows else None)
    pooled = retriever.model.encode_document(pages, token_pooling=pooling)
    assert [vectors.shape for vectors in pooled] == [(4, DIM)] * len(pages)
    assert all(torch.allclose(vectors.norm(dim=-1), torch.ones(4), atol=1e-5) for vectors in pooled)
    assert not torch.allclose(pooled[0], pooled[1], atol=1e-2)
    assert close(as_pipeline(retriever, pooling).encode_document(pages), pooled)
    one_by_one = [retriever.model.encode_document([page], token_pooling=pooling)[0] for page in pages]
    assert close(one_by_one, pooled)  # neither padding nor its side moves a patch to another place


def test_places_on_the_page_count_only_with_patch_columns(retriever, pages):
    vectors = retriever.model.encode_document(pages[:1])[0]
    order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(2))
    for columns, moves in ((None, False), (retriever.grids[0][1], True)):
        model = pooling_of(patch_columns=columns).model
        with torch.inference_mode():
            before, after = model(torch.stack([vectors, vectors[order]])).keep_probability
        assert torch.allclose(before[order], after, atol=1e-5) is not moves


def test_one_folder_gives_the_same_vectors(retriever, pages, tmp_path):
    pipeline = as_pipeline(retriever, pooling_of(retriever.model.encode_document(pages)))
    folder = polyrep.save(pipeline, tmp_path / "pipeline")
    opened = polyrep.load(folder, trust_remote_code=True, device="cpu")
    assert type(opened) is MultiVectorEncoder and type(opened[0].model) is ReinPoolForRetrieval
    assert close(opened.encode_document(pages), pipeline.encode_document(pages))
    assert close(opened.encode_query(QUERIES), pipeline.encode_query(QUERIES))
    tokens, vectors = token_pieces(opened, pages[1])
    assert len(set(tokens)) == 1 and len(tokens) == retriever.patches[1]
    assert close([vectors], retriever.model.encode_document(pages[1:]))


def test_text_queries_score_pooled_pages_by_maxsim(retriever, pages):
    pipeline = as_pipeline(retriever, pooling_of(retriever.model.encode_document(pages)))
    queries, documents = pipeline.encode_query(QUERIES), pipeline.encode_document(pages)
    assert close(queries, retriever.model.encode_query(QUERIES))  # queries are not pooled
    expected = [[sum(max(float(t @ v) for v in d) for t in q) for d in documents] for q in queries]
    assert torch.allclose(pipeline.similarity(queries, documents), torch.tensor(expected), atol=1e-5)


def test_one_vector_in_a_dense_index_scores_as_maxsim(retriever, pages):
    patches = retriever.model.encode_document(pages)
    many = as_pipeline(retriever, pooling_of(patches, num_vectors=1))
    single = pooling_of(patches, num_vectors=1, output="sentence_embedding")
    dense = SentenceTransformer(modules=[*retriever.model.children(), single], device="cpu")
    documents = many.encode_document(pages)
    maxsim = many.similarity(many.encode_query(QUERIES), documents)
    queries, vectors = (torch.as_tensor(x) for x in (dense.encode_query(QUERIES), dense.encode_document(pages)))
    assert queries.shape == (len(QUERIES), DIM) and dense.similarity_fn_name == "dot"
    assert torch.allclose(vectors, torch.cat(documents), atol=1e-5)
    assert torch.allclose(dense.similarity(queries, vectors), maxsim, atol=1e-5)
    plain = pooling_of(num_vectors=1)
    torch.nn.init.zeros_(plain.model.keep.weight)
    torch.nn.init.ones_(plain.model.keep.bias)
    mean = torch.stack([vectors.mean(0) for vectors in patches])
    pooled = torch.cat(as_pipeline(retriever, plain).encode_document(pages))
    assert torch.allclose(pooled, mean / mean.norm(dim=1, keepdim=True), atol=1e-5)


def test_patches_of_a_page_are_lit_where_they_lie(retriever, pages):
    pooling = pooling_of(retriever.model.encode_document(pages))
    for page, (rows, columns) in zip(pages, retriever.grids, strict=True):
        assert get_n_patches(retriever.model, page.size) == (columns, rows)
        _, vectors = token_pieces(as_pipeline(retriever, pooling), page)
        with torch.inference_mode():
            probability = pooling.model(vectors[None]).keep_probability
        lit = np.asarray(kept_patches(page, probability, rows, columns))
        kept = (probability > 0.5).reshape(rows, columns).numpy()
        for row in range(rows):
            for column in range(columns):
                x, y = int((column + 0.5) * page.width / columns), int((row + 0.5) * page.height / rows)
                before = np.array(page.getpixel((x, y)))
                after = before if kept[row, column] else np.round(0.4 * before + 0.6 * 96)
                assert (lit[y, x] == after).all()


def test_dropped_patches_are_dimmed_to_the_pixel():
    page = Image.new("RGB", (7, 5), (200, 100, 0))
    probability = [0.9, 0.1, 0.5, 0.2, 0.51, 1.0]  # 2 rows of 3; at the threshold is not above it
    shown = np.asarray(kept_patches(page, probability, 2, 3))
    for y in range(5):
        for x in range(7):  # the patch that the middle of the pixel lies in
            patch = int((y + 0.5) * 2 / 5) * 3 + int((x + 0.5) * 3 / 7)
            # a dropped one is 0.4 of the page and 0.6 of a grey of 96
            assert shown[y, x].tolist() == ([200, 100, 0] if patch in (0, 4, 5) else [138, 98, 58])
    assert kept_patches(page.convert("L"), probability, 2, 3, threshold=0.05).getextrema()[0][0] > 100  # all kept
    assert page.getpixel((6, 0)) == (200, 100, 0)  # the caller's page is as it was


@pytest.mark.parametrize(
    ("probability", "message"),
    [
        ([0.5] * 5, "5 keep probabilities for 2 rows of 3 patches"),
        ([0.5] * 5 + [3.2], "3.2 is no probability"),
        ([0.5] * 5 + [float("nan")], "nan is no probability"),
    ],
)
def test_wrong_probabilities_of_patches_are_refused(probability, message):
    with pytest.raises(InputError, match=message):
        kept_patches(Image.new("RGB", (6, 4)), probability, 2, 3)


class Seen(HTMLParser):
    """Text, attributes of spans, names of all elements, and elements that were opened but not closed."""

    def __init__(self, page: str):
        super().__init__()
        self.text, self.spans, self.names, self.open = "", [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        if tag == "span":
            self.spans.append(dict(attrs))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "p" in self.open and self.open[-1] in ("p", "span"):
            self.text += data


def test_tokens_are_coloured_in_html():
    tokens = ["[CLS]", "north", "##wind", "<script>", "alert(1)", '"&', "[SEP]"]
    probability = torch.tensor([0.0, 0.875, 0.25, 0.5, 1.0, 0.75, 0.125], dtype=torch.bfloat16)
    page = kept_tokens_html(tokens, probability, title="<b>Plans & prices</b>")
    seen = Seen(page)
    assert not seen.open
    assert "script" not in seen.names and "b" not in seen.names
    assert "<title>&lt;b&gt;Plans &amp; prices&lt;/b&gt;</title>" in page
    assert seen.text.endswith('[CLS] northwind <script> alert(1) "& [SEP]')
    assert [float(re.search(r"[\d.]+$", span["title"])[0]) for span in seen.spans] == probability.tolist()
    assert [float(span["style"].removeprefix("--p:")) for span in seen.spans] == probability.tolist()
    assert [span.get("class") for span in seen.spans] == [None, "kept", None, None, "kept", "kept", None]
    assert "3 of 7 tokens above 0.5" in page
    assert not re.search(r"(src|href|url|@import)", page)  # nothing to fetch


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (["<s>", "▁Open", "▁port", "s", ".", "</s>"], "<s> Open ports.</s>"),
        (["[CLS]", "##", "ĠOpen", "Ġcaf", "Ã©", "s", "Ċ", "."], "[CLS]## Open cafés ␣."),
        (["open", "port", "##s", "##", "."], "open ports ## ."),
        (["?"], "?"),
    ],
    ids=["SentencePiece", "bytes", "WordPiece", "one"],
)
def test_word_pieces_are_joined_as_their_tokenizer_means(tokens, text):
    assert Seen(kept_tokens_html(tokens, [0.5] * len(tokens))).text.endswith(text)


@pytest.mark.parametrize(
    ("tokens", "probability", "message"),
    [
        (["a", "b"], [0.5], "1 keep probabilities for 2 tokens"),
        ([], [], "0 keep probabilities for 0 tokens"),
        (["a"], [-0.5], "-0.5 is no probability"),
    ],
)
def test_wrong_probabilities_of_tokens_are_refused(tokens, probability, message, tmp_path):
    with pytest.raises(InputError, match=message):
        kept_tokens_html(tokens, probability)
    file = tmp_path / "old.png"
    file.write_bytes(b"old")
    with pytest.raises(InputError, match=message):
        kept_tokens_png([(["a"], [1.0]), (tokens, probability)], file)
    with pytest.raises(InputError, match="1 documents and 2 titles"):
        kept_tokens_png([(["a"], [1.0])], file, titles=["a", "b"])
    with pytest.raises(InputError, match="0 documents"):
        kept_tokens_png([], file)
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


def test_tokens_are_drawn_with_a_colour_for_each_probability(tmp_path):
    words = ["[CLS]", *["north", "##wind", "costs", r"$\no formula$", "."] * 60]

    def drawn(probability: list[float], titles: list[str] | None = None, **options: float) -> np.ndarray:
        file = tmp_path / "drawn.png"
        kept_tokens_png([(words, probability)], file, titles=titles, **options)
        assert list(tmp_path.iterdir()) == [file]
        with Image.open(file) as picture:
            return np.asarray(picture.convert("RGB"), int)

    def area(picture: np.ndarray) -> int:
        """Pixels of the colour for 1, which is 0.6 of the hue over white; the colour bar's aside."""
        color = 255 - 0.6 * (255 - np.array([33, 113, 181]))
        return int((abs(picture[:-120] - color).max(-1) <= 1).sum())

    none, all_, half = (drawn(p) for p in ([0.0] * 301, [1.0] * 301, [1.0] + [0.0] * 150 + [1.0] * 150))
    assert none.std() > 10  # words are there
    assert area(none) == 0 and 0.4 < area(half) / area(all_) < 0.6
    dropped = drawn([1.0] * 301, threshold=1.0)
    more = (all_ - dropped)[:-120].max(-1)  # the same but for lines below kept tokens, for those who see no colours
    assert more.max() <= 0 and (all_ < dropped - 100)[:-120].any(-1).sum() > 200
    for picture in (none, all_):  # words wrap within the margins
        assert (picture[:-120, :24] == 255).all() and (picture[:-120, -24:] == 255).all()
    titled = drawn([0.0] * 301, ["Benefit $options$ " * 20])
    assert titled.shape[1] == none.shape[1] and titled.shape[0] > none.shape[0]


def with_skiplist(model: MultiVectorEncoder, *more: torch.nn.Module) -> MultiVectorEncoder:
    transformer, dense, _, normalize = model
    mask = MultiVectorMask(skiplist_words=[":", "a"])
    return MultiVectorEncoder(modules=[transformer, dense, mask, normalize, *more], device="cpu")


@pytest.mark.parametrize("pooled", [False, True])
def test_a_skiplist_does_not_shift_tokens_against_vectors(multi_vector_model, pooled):
    text = "tar: make a list of a file : port"
    every_token, every_vector = token_pieces(multi_vector_model, text)
    assert every_token[0] == "[CLS]" and every_token.count(":") == 2 and every_token.count("a") == 2
    pooling = [pooling_of()] if pooled else []
    tokens, vectors = token_pieces(with_skiplist(multi_vector_model, *pooling), text)
    counts = [token not in (":", "a") for token in every_token]
    assert tokens == [token for token, count in zip(every_token, counts, strict=True) if count]
    assert torch.equal(vectors, every_vector[torch.tensor(counts)])
    assert torch.equal(vectors, with_skiplist(multi_vector_model).encode_document(text))
    assert not vectors.is_inference()


def test_token_pieces_are_those_that_encoding_scores(multi_vector_model):
    model = with_skiplist(multi_vector_model, pooling_of())
    model.prompts = {"passage": "list "}
    text = "port " * 80  # longer than the 64 tokens that the encoder reads
    before = model.encode_document(text)
    tokens, vectors = token_pieces(model, text)
    assert tokens == ["[CLS]", "list", *["port"] * 61, "[SEP]"]
    assert close([pooling_of().pool_one(vectors)], [before])
    assert not model[-1]._forward_pre_hooks
    single = SentenceTransformer(
        modules=[*list(model)[:-1], pooling_of(num_vectors=1, output="sentence_embedding")], device="cpu"
    )
    assert token_pieces(single, "port")[0] == ["[CLS]", "port", "[SEP]"]


def test_a_model_without_token_vectors_is_refused():
    tokenizer = Tokenizer(models.WordLevel({"port": 0, "[UNK]": 1}, unk_token="[UNK]"))
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=4)], device="cpu")
    with pytest.raises(InputError, match="token_embeddings absent"):
        token_pieces(model, "port")
