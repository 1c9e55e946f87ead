"""Dense2Sparse across images and texts: towers, inputs, objectives, and whole runs on drawn scenes."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_python
from drawings import write_scenes
from PIL import Image
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertTokenizer,
    BlipConfig,
    BlipForImageTextRetrieval,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    T5Config,
    T5EncoderModel,
    VisionTextDualEncoderProcessor,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import polyrep.encoding.cache
import polyrep.hub.vision
from polyrep import InputError
from polyrep.cli import train
from polyrep.hub.folder import fastest_dtype
from polyrep.methods import (
    CheckedTransformer,
    Dense2SparseConfig,
    Dense2SparseForRetrieval,
    Dense2SparseLoss,
    Dense2SparseModel,
    DualEncoderHead,
    DualEncoderHeadConfig,
    DualEncoderLoss,
    DualEncoderModel,
)
from polyrep.methods.dual_encoder.backbone import load_processor, open_backbone
from polyrep.methods.dual_encoder.example import dual_encoder, image_text_folder, tiny_vision

TEXTS = ["list a file", "ports of a list"]
TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def photo(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def both_towers(kind: str) -> torch.nn.Module:
    """The real class with a tiny random config whose words are those of the test's tokenizer."""
    text = TINY | {"vocab_size": 61, "max_position_embeddings": 20, "pad_token_id": 0, "eos_token_id": 3}
    vision = TINY | {"image_size": 32, "patch_size": 16}
    torch.manual_seed(11)
    if kind == "clip":
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()
    if kind == "siglip":
        return SiglipModel(SiglipConfig(text_config=text | {"projection_size": 16}, vision_config=vision)).eval()
    text |= {"bos_token_id": 2, "sep_token_id": 3, "encoder_hidden_size": 16}
    return BlipForImageTextRetrieval(
        BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=12)
    ).eval()


@pytest.fixture(scope="module", params=["clip", "siglip", "blip"])
def towers(request, backbone, tmp_path_factory) -> tuple[str, torch.nn.Module, Path]:
    """Kind, model, and its folder with a processor."""
    folder = tmp_path_factory.mktemp(request.param)
    model = both_towers(request.param)
    model.save_pretrained(folder)
    processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    VisionTextDualEncoderProcessor(processor, AutoTokenizer.from_pretrained(backbone)).save_pretrained(folder)
    return request.param, model, folder


def by_the_parts(kind: str, model, tokens: dict, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors of one text and of images, from the parts of each class."""
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    if kind == "blip":
        text = model.text_proj(model.text_encoder(ids, attention_mask=mask).last_hidden_state[:, 0])
        image = model.vision_proj(model.vision_model(pixels).last_hidden_state[:, 0])
    elif kind == "clip":
        states = model.text_model(ids, attention_mask=mask).last_hidden_state
        text = model.text_projection(states[:, int((ids[0] == 3).int().argmax())])  # at the end of the text
        image = model.visual_projection(model.vision_model(pixels).pooler_output)
    else:
        padded = F.pad(ids, (0, 20 - ids.shape[1]))
        text = model.text_model.head(model.text_model(padded).last_hidden_state[:, -1])
        image = model.vision_model(pixels).pooler_output
    return F.normalize(text, dim=1), F.normalize(image, dim=1)


def test_towers_give_what_their_own_classes_give(towers):
    kind, model, folder = towers
    dual = DualEncoderModel.from_encoder(str(folder)).eval()
    processor = load_processor(str(folder))
    pixels = processor.image_processor([photo(), photo(seed=1)], return_tensors="pt")["pixel_values"]
    batch = processor.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = dual(**batch).sentence_embedding, dual.encode_image(pixels).sentence_embedding
        for row, text in enumerate(TEXTS):  # alone, so that padding cannot matter
            tokens = processor.tokenizer([text], return_tensors="pt")
            texts, images = by_the_parts(kind, model, tokens, pixels)
            torch.testing.assert_close(found[0][row], texts[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1], images, atol=1e-5, rtol=1e-4)
    assert found[0].shape[1] == found[1].shape[1] == dual.config.projection_dim


def test_towers_and_head_are_one_folder(towers, tmp_path):
    kind, _, folder = towers
    retriever = Dense2SparseForRetrieval.from_encoder(str(folder), average_length=3.0)
    processor = load_processor(str(folder))
    model = image_text_folder(retriever, processor, tmp_path / kind, SparseEncoder, CheckedTransformer, "expand")
    photo().save(tmp_path / "photo.png")
    images = model.encode_document([photo(), str(tmp_path / "photo.png")]).to_dense()
    torch.testing.assert_close(images[0], images[1], atol=1e-5, rtol=1e-4)
    queries = model.encode_query(TEXTS).to_dense()
    assert images.shape[1] == queries.shape[1] == retriever.config.vocab_size and (images > 0).any(1).all()
    backbone = open_backbone(str(folder), torch.float32)
    dense = torch.from_numpy(backbone.encode_document([photo()]))
    with torch.no_grad():
        expected = retriever.eval().head(dense, task="document", modality="image").sentence_embedding
    torch.testing.assert_close(images[:1], expected, atol=1e-5, rtol=1e-4)


def test_both_towers_are_opened_in_the_type_that_is_asked_for(towers, tmp_path):
    kind, _, folder = towers
    retriever = Dense2SparseForRetrieval.from_encoder(str(folder), average_length=3.0)
    processor = load_processor(str(folder))
    batch = processor.tokenizer(TEXTS, padding=True, return_tensors="pt")
    pixels = processor.image_processor([photo()], return_tensors="pt")["pixel_values"]
    for name, model in (("dense", DualEncoderModel.from_encoder(str(folder))), ("sparse", retriever)):
        model.save_pretrained(tmp_path / name)
        half = type(model).from_pretrained(tmp_path / name, dtype=torch.bfloat16)
        assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}, kind
        with torch.no_grad():
            for encode, inputs in (("forward", dict(batch)), ("encode_image", {"pixel_values": pixels})):
                found, expected = (getattr(m.eval(), encode)(**inputs).sentence_embedding for m in (half, model))
                assert (found - expected).norm() < 0.05 * expected.norm()


def test_a_retriever_knows_the_tied_weights_and_the_whole_blocks_of_its_towers(backbone, tmp_path):
    """T5 has its word embeddings under two names, of which a file holds one."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5EncoderModel(T5Config(vocab_size=61, **sizes)).save_pretrained(tmp_path / "t5")
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    tokenizer.save_pretrained(tmp_path / "t5")
    texts = SentenceTransformer(modules=[Transformer(str(tmp_path / "t5")), Pooling(16, "mean")], device="cpu")
    texts.save_pretrained(str(tmp_path / "texts"))
    vision = tiny_vision(tmp_path / "vision")
    dual = DualEncoderModel.from_encoder(str(tmp_path / "texts"), vision=str(vision), projection_dim=12)
    for part in (dual, tokenizer):
        part.save_pretrained(tmp_path / "dual")
    made = Dense2SparseForRetrieval.from_encoder(str(tmp_path / "dual"), average_length=3.0).eval()
    made.save_pretrained(tmp_path / "sparse")
    opened = Dense2SparseForRetrieval.from_pretrained(tmp_path / "sparse").eval()
    assert "T5Block" in opened._no_split_modules  # what device_map="auto" keeps on one device
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        found, expected = (model(**batch, task="query").sentence_embedding for model in (opened, made))
    torch.testing.assert_close(found, expected)


def test_a_text_encoder_alone_is_no_image_model(backbone, tmp_path):
    assert open_backbone(str(backbone), torch.float32) is None
    with pytest.raises(ValueError, match="'bert' has one tower"):
        DualEncoderModel.from_encoder(str(backbone))
    towers = dual_encoder(backbone, tmp_path)
    head = DualEncoderHead(DualEncoderHeadConfig(text_dim=32, image_dim=7))
    with pytest.raises(ValueError, match="the vision tower gives vectors of width 448, but the head was made for 7"):
        DualEncoderModel.from_encoder(str(tmp_path / "texts"), head, vision=str(tmp_path / "vision"))
    with pytest.raises(ValueError, match="image vectors of width 5, but this head was made for 448"):
        towers.head(torch.zeros(1, 5), "image")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("drawn") / "scenes")


@pytest.fixture(scope="module")
def images_model(backbone, tmp_path_factory) -> SparseEncoder:
    scratch = tmp_path_factory.mktemp("images")
    dual_encoder(backbone, scratch).save_pretrained(scratch / "towers")
    processor = load_processor(str(scratch / "texts"), str(scratch / "vision"))
    processor.save_pretrained(scratch / "towers")
    retriever = Dense2SparseForRetrieval.from_encoder(str(scratch / "towers"), average_length=3.0)
    return image_text_folder(retriever, processor, scratch / "model", SparseEncoder, CheckedTransformer, "expand")


def test_an_image_is_the_same_image_in_any_form(images_model, tmp_path):
    cmyk = photo().convert("CMYK")
    cmyk.save(tmp_path / "cmyk.tif")
    palette = photo().convert("P")
    palette.save(tmp_path / "palette.png")
    grey = photo().convert("L")
    one = Image.new("RGB", (1, 1), (200, 10, 10))
    given = [str(tmp_path / "cmyk.tif"), cmyk, tmp_path / "palette.png", palette, grey, one]
    plain = [image.convert("RGB") for image in (cmyk, cmyk, palette, palette, grey)]
    plain.append(Image.new("RGB", (32, 32), (200, 10, 10)))  # what one pixel is stretched to
    found, expected = (images_model.encode_document(images).to_dense() for images in (given, plain))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found[0], found[4], atol=1e-3), "different images are told apart"


def test_paths_are_checked_before_they_pass_for_texts(images_model, tmp_path):
    with pytest.raises(ValueError, match="'photo.jpg': looks like the path of an image, but there is no such file"):
        images_model.encode_document(["photo.jpg"])
    with pytest.raises(ValueError, match="no such file"):
        images_model.encode_document([{"image": str(tmp_path / "gone.PNG")}])
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="broken.jpg': cannot be read as an image"):
        images_model.encode_document([str(tmp_path / "broken.jpg")])
    photo().save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut.png': cannot be read as an image"):
        images_model.encode_document([str(tmp_path / "cut.png")])
    texts = images_model.encode_query(["a file.", "list photo.jpg of"])
    assert (texts.to_dense() > 0).any(1).all(), "texts that speak of files stay texts"


def test_own_words_alone_are_those_of_the_caption(images_model):
    head, text = images_model[0].model.head, "list a file"
    own = set(images_model.tokenizer(text, add_special_tokens=False)["input_ids"])
    full, alone = (images_model.encode_query([text], expand=e).to_dense()[0] for e in (True, False))
    assert set(alone.nonzero()[:, 0].tolist()) == own
    assert (full > 0).sum() > len(own)
    torch.testing.assert_close(alone[alone > 0], full[alone > 0])
    assert {word for word, _ in images_model.decode(alone)} == {word for word, _ in head.decode(alone)}
    head.config.foreign_words = True
    try:
        with pytest.raises(ValueError, match="the encoder's tokens are not this head's words"):
            images_model.encode_query([text], expand=False)
    finally:
        head.config.foreign_words = False


def test_words_of_another_vocabulary_are_named_by_it(backbone, tmp_path):
    dual_encoder(backbone, tmp_path).save_pretrained(tmp_path / "towers")
    processor = load_processor(str(tmp_path / "texts"), str(tmp_path / "vision"))
    processor.save_pretrained(tmp_path / "towers")
    (tmp_path / "other").mkdir()
    words = (backbone / "vocab.txt").read_text().split()
    (tmp_path / "other" / "vocab.txt").write_text("\n".join([*words[:5], *reversed(words[5:])]) + "\n")
    other = BertTokenizer(str(tmp_path / "other" / "vocab.txt"))
    settings = {"own_tokens": "none", "foreign_words": True, "added_tokens": 1}
    head = Dense2SparseModel.from_mlm(AutoModel.from_pretrained(backbone), 12, other, **settings)
    retriever = Dense2SparseForRetrieval.from_encoder(str(tmp_path / "towers"), head=head)
    model = image_text_folder(retriever, processor, tmp_path / "model", SparseEncoder, CheckedTransformer, "expand")
    vector = torch.zeros(len(words))
    vector[7] = 1.0
    assert model.decode(vector) == [(list(reversed(words[5:]))[2], 1.0)]
    found = model.encode_query(["a"]).to_dense()
    assert (found > 0).any(), "one word beside what the tokenizer adds is a text"
    tokens = processor.tokenizer([""], return_tensors="pt")
    head.config.added_tokens = 2
    assert not head(torch.randn(1, 12), tokens["input_ids"], tokens["attention_mask"]).sentence_embedding.any()


def test_a_checkpoint_without_its_maps_is_refused(tmp_path):
    model = both_towers("blip")
    model.save_pretrained(tmp_path / "blip")
    weights = load_file(tmp_path / "blip" / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "proj.weight" not in k or "vision_model" in k},
        tmp_path / "blip" / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ValueError, match="lacks text_proj.weight and 1 more weights"):
        DualEncoderModel.from_encoder(str(tmp_path / "blip"))


def test_given_vectors_are_brought_to_the_length_of_the_encoders_own(images_model, scenes, tmp_path):
    from polyrep.data import load_retrieval_dataset
    from polyrep.training.vectors import encode_dataset

    arrays = {"images": np.random.default_rng(0).normal(size=(12, 12)), "captions": np.ones((60, 12))}
    arrays = {name: 7 * value.astype(np.float32) for name, value in arrays.items()}
    width = images_model.get_embedding_dimension()
    model = type("M", (), {"tokenizer": images_model.tokenizer, "prompts": {}, "similarity_fn_name": "dot"})()
    model.get_embedding_dimension = lambda: 12
    model.preprocess = images_model.preprocess
    type(model).__getitem__ = lambda self, i: images_model[0]
    dataset = load_retrieval_dataset(features(scenes, tmp_path / "set", **arrays), "test")
    for side in encode_dataset(model, dataset):
        lengths = np.linalg.norm(side.embeddings.values.astype(np.float32), axis=1)
        np.testing.assert_allclose(lengths, 1.0, atol=2e-3)
    arrays["images"][8] = 0  # the first of test
    dataset = load_retrieval_dataset(features(scenes, tmp_path / "zero", **arrays), "test")
    with pytest.raises(InputError, match="document vector 0 of the split is zero"):
        encode_dataset(model, dataset)
    assert width > 12


def test_recalls_are_those_of_a_loop():
    bench = script("dense2sparse_images")
    rng = np.random.default_rng(0)
    owners = np.repeat(np.arange(15), 2)
    scores = rng.integers(0, 9, (30, 15)).astype(float)  # with many ties, which count as lost
    found = bench.recalls(scores, owners)
    for image in range(15):
        places = [sum(scores[c] >= scores[c, image]) - 1 for c in np.flatnonzero(owners == image)]
        best = max(scores[c, image] for c in np.flatnonzero(owners == image))
        back = sum(scores[c, image] >= best for c in range(30) if owners[c] != image)
        for k in (1, 5, 10):
            assert found[bench.TEXT_TO_IMAGE, f"R@{k}"][image] == np.mean([p < k for p in places])
            assert found[bench.IMAGE_TO_TEXT, f"R@{k}"][image] == (back < k)
        reciprocal = np.mean([1 / (p + 1) if p < 10 else 0 for p in places])
        assert found[bench.TEXT_TO_IMAGE, "MRR@10"][image] == pytest.approx(reciprocal)
    scores[3, 3] = np.nan
    with pytest.raises(InputError, match="not finite"):
        bench.recalls(scores, owners)


def test_images_are_expansion_and_nothing_else():
    torch.manual_seed(0)
    head = Dense2SparseModel(Dense2SparseConfig(input_dim=6, vocab_size=12)).eval()
    vectors = torch.randn(3, 6)
    expected = torch.log1p(torch.relu(head.vocabulary(head.norm(head.input(vectors)))))
    for task in ("query", "document"):
        found = head(vectors, task=task, modality="image").sentence_embedding
        torch.testing.assert_close(found, expected)
    head.config.expansion = "document"
    with pytest.raises(ValueError, match="expansion='document' leaves images without a word"):
        head(vectors, task="query", modality="image")
    retriever_of_texts = Dense2SparseForRetrieval.encode_image
    with pytest.raises(ValueError, match="reads texts only"):
        retriever_of_texts(type("T", (), {"config": type("C", (), {"has_images": False})})(), vectors)


class Pairs:
    """Captions and images as the objective meets them: six captions of three images."""

    has_images = True

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.captions = {
            "sentence_embedding": F.normalize(torch.randn(6, 8, generator=generator), dim=1),
            "input_ids": torch.randint(2, 12, (6, 4), generator=generator),
            "attention_mask": torch.tensor([[1, 1, 1, 0]] * 3 + [[1, 1, 1, 1]] * 3),
            "index": torch.arange(6),
        }
        own = torch.tensor([0, 0, 1, 1, 2, 2])
        vectors = F.normalize(torch.randn(3, 8, generator=generator), dim=1)
        self.images = {"sentence_embedding": vectors, "index": torch.arange(3)}
        self.of_caption = {"sentence_embedding": vectors[own], "index": own}

    def batches(self, side, size=1024):
        yield self.captions if side == "query" else self.images

    def pair_batches(self):
        yield self.captions, self.of_caption


def test_a_head_of_images_starts_from_its_captions_words():
    torch.manual_seed(1)
    pairs = Pairs()
    head = Dense2SparseModel(Dense2SparseConfig(input_dim=8, vocab_size=12, special_token_ids=[0, 1]))
    plain = Dense2SparseModel(Dense2SparseConfig(input_dim=8, vocab_size=12, special_token_ids=[0, 1]))
    plain.load_state_dict(head.state_dict())
    Dense2SparseLoss(plain, alignment="none").prepare(pairs)
    plain.requires_grad_(False)
    Dense2SparseLoss(head, alignment_ridge=0.2, alignment_gain=2.0, alignment_bias=-0.3).prepare(pairs)
    said = [
        [int(t) for t, m in zip(*row, strict=True) if m]
        for row in zip(pairs.captions["input_ids"].tolist(), pairs.captions["attention_mask"].tolist(), strict=True)
    ]
    assert head.expansion_terms.tolist() == sorted({t for row in said for t in row})
    assert head.config.average_length == pytest.approx(np.mean([len(row) for row in said]))
    for place, term in enumerate(plain.expansion_terms.tolist()):
        n = sum(term in row for row in said)
        expected = np.log(1 + (6 - n + 0.5) / (n + 0.5))
        assert float(plain.own_weight[term] / plain.own_weight.max()) == pytest.approx(
            np.sqrt(expected / max(np.log(1 + (6 - m + 0.5) / (m + 0.5)) for m in _frequencies(said, 12))), abs=1e-5
        ), place
    # Ridge regression in float64 of every caption's weights on its own and on its image's vector.
    with torch.no_grad():
        lengths = torch.tensor([[float(len(row))] for row in said])
        counts = torch.tensor([[float(row.count(t)) for t in plain.expansion_terms.tolist()] for row in said])
        own = plain.own_weight[plain.expansion_terms].relu() * plain.saturate(counts, lengths, "document")
        x = torch.cat(
            [plain.hidden(pairs.captions["sentence_embedding"]), plain.hidden(pairs.of_caption["sentence_embedding"])]
        )
    x, z, e = (
        x.double().numpy(),
        torch.cat([own, own]).double().numpy(),
        plain.vocabulary.weight.detach().double().numpy(),
    )
    xc, zc = x - x.mean(0), z - z.mean(0)
    moment, cross = xc.T @ xc / 12, xc.T @ zc / 12
    prior = e.T * max(0.0, (e.T * cross).sum() / (e.T * (moment @ e.T)).sum())
    solution = prior + np.linalg.solve(moment + 0.2 * moment.diagonal().mean() * np.eye(8), cross - moment @ prior)
    np.testing.assert_allclose(head.vocabulary.weight.detach(), 2 * solution.T, atol=1e-4)
    np.testing.assert_allclose(head.vocabulary.bias.detach(), 2 * (z.mean(0) - x.mean(0) @ solution) - 0.3, atol=1e-4)


def _frequencies(said: list[list[int]], words: int) -> list[int]:
    return [sum(t in row for row in said) for t in range(words)]


def test_images_have_no_words_for_bm25():
    head = Dense2SparseModel(Dense2SparseConfig(input_dim=8, vocab_size=12))
    with pytest.raises(InputError, match="--teacher_lexical 0.1: images have no words"):
        Dense2SparseLoss(head, teacher_lexical=0.1).prepare(Pairs())


def test_noise_and_mixing_reach_head_and_teacher_alike():
    torch.manual_seed(2)
    pairs = Pairs()
    head = Dense2SparseModel(Dense2SparseConfig(input_dim=8, vocab_size=12))
    objective = Dense2SparseLoss(head, noise=0.5, mixup=0.5, alignment="none").train()
    objective.prepare(pairs)
    objective.progress = (3, 10)
    scaled = {**pairs.images, "sentence_embedding": 2 * pairs.images["sentence_embedding"]}
    once, again = (objective._blurred(scaled, 3, 1)["sentence_embedding"] for _ in range(2))
    assert torch.equal(once, again), "draws follow from seed and step"
    objective.progress = (4, 10)
    assert not torch.equal(once, objective._blurred(scaled, 3, 1)["sentence_embedding"])
    torch.testing.assert_close(once.norm(dim=1), torch.full((3,), 2.0))
    # A teacher of clean vectors would give another loss than one of what the head sees.
    features = [pairs.captions, pairs.of_caption]
    loss = objective(features, torch.arange(6))["distillation"]
    blurred = [objective._blurred(side, 6, number) for number, side in enumerate(features)]
    clean = Dense2SparseLoss(head, alignment="none").train()
    clean.deviations = objective.deviations
    clean.progress = (4, 10)
    torch.testing.assert_close(loss, clean(blurred, torch.arange(6))["distillation"])
    objective.eval()
    assert objective._blurred(scaled, 3, 1) is scaled, "only in training"


def test_the_contrastive_loss_is_that_of_a_loop():
    torch.manual_seed(4)
    head = DualEncoderHead(DualEncoderHeadConfig(text_dim=8, image_dim=8, projection_dim=5)).eval()
    pairs, objective = Pairs(), DualEncoderLoss(head, temperature=0.2)
    objective.prepare(pairs)
    found = objective([pairs.captions, pairs.of_caption], torch.arange(6))
    with torch.no_grad():
        t = head(pairs.captions["sentence_embedding"]).sentence_embedding.double().numpy()
        i = head(pairs.of_caption["sentence_embedding"], "image").sentence_embedding.double().numpy()
    own, total = pairs.of_caption["index"].tolist(), 0.0
    for a in range(6):
        others = [b for b in range(6) if own[b] != own[a]]
        forth = [np.exp(t[a] @ i[b] / 0.2) for b in (a, *others)]
        back = [np.exp(i[a] @ t[b] / 0.2) for b in (a, *others)]
        total -= (np.log(forth[0] / sum(forth)) + np.log(back[0] / sum(back))) / 12
    assert float(found) == pytest.approx(total, abs=1e-5)
    features = torch.randn(50, 8) * 3 + 1
    objective.prepare(type("D", (), {"batches": lambda self, side: [{"sentence_embedding": features}]})())
    np.testing.assert_allclose(head.image.mean, features.mean(0), atol=1e-4)
    np.testing.assert_allclose(head.image.deviation, features.std(0, correction=0), atol=1e-4)
    with pytest.raises(InputError, match="--temperature 0"):
        DualEncoderLoss(head, temperature=0.0)


def test_a_hidden_layer_beside_the_map_starts_as_none():
    torch.manual_seed(5)
    head = DualEncoderHead(DualEncoderHeadConfig(text_dim=8, image_dim=6, projection_dim=5, hidden_dim=7)).eval()
    vectors = torch.randn(2, 6)
    expected = F.normalize(head.image.linear(vectors), dim=1)
    torch.testing.assert_close(head(vectors, "image").sentence_embedding, expected)
    torch.nn.init.normal_(head.image.hidden[-1].weight)
    assert not torch.allclose(head(vectors, "image").sentence_embedding, expected, atol=1e-3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, backbone, scenes) -> dict[str, Path]:
    """Both runs on the twelve scenes, with a tiny vision encoder: dual encoder, then words."""
    root = tmp_path_factory.mktemp("runs")
    dual_encoder(backbone, root)  # leaves its text encoder and vision encoder behind
    shared = [
        "--datasets",
        str(scenes),
        "--cache_dir",
        str(root / "cache"),
        "--max_steps",
        "3",
        "--disable_tqdm",
        "true",
    ]
    shared += ["--per_device_train_batch_size", "8", "--save_steps", "2", "--bf16", "false"]
    shared += ["--warmup_steps", "0", "--learning_rate", "0.01"]
    dual = root / "dual"
    train(
        ["dual-encoder-mobilenet-minilm", "--backbone", str(root / "texts"), "--vision", str(root / "vision")]
        + ["--output_dir", str(dual), "--projection_dim", "12", "--hidden_dim", "8", *shared]
    )
    words = root / "words"
    trusted = ["--trust_remote_code", "true"]
    backbone = ["--backbone", str(dual / "final"), *trusted]
    train(["dense2sparse-mobilenet-minilm", *backbone, "--output_dir", str(words), *shared])
    return {"root": root, "dual": dual, "words": words, "shared": shared}


def words_run(runs: dict[str, Path], *flags: str) -> list[str]:
    """The run of the words on the small dual encoder, whose folder carries our own code."""
    backbone = ["--backbone", str(runs["dual"] / "final"), "--trust_remote_code", "true"]
    return ["dense2sparse-mobilenet-minilm", *backbone, *flags]


OPEN = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("polyrep", "modeling"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import json, torch
from PIL import Image
from sentence_transformers import SentenceTransformer, SparseEncoder
from transformers import AutoModel, AutoProcessor
words, dual, photo = sys.argv[1:]
model = SparseEncoder(words, trust_remote_code=True, device="cpu")
images = model.encode_document([Image.open(photo), photo])
pixels = AutoProcessor.from_pretrained(words, trust_remote_code=True)(images=[Image.open(photo)], return_tensors="pt")
with torch.no_grad():
    auto = AutoModel.from_pretrained(words, trust_remote_code=True).encode_image(pixel_values=pixels["pixel_values"])
dense = SentenceTransformer(dual, trust_remote_code=True, device="cpu")
try:
    model.encode_document(["gone.jpg"])
    refused = False
except ValueError as error:
    refused = "no such file" in str(error)
print("REPORT" + json.dumps({
    "images": images.to_dense().tolist(), "auto": auto.sentence_embedding.tolist(), "refused": refused,
    "caption": model.encode_query(["a boat with a sail"]).to_dense().tolist(),
    "words": model.decode(images[0], top_k=5), "dense": dense.encode_document([photo]).tolist(),
}))
"""


def test_pixels_go_in_and_words_come_out_where_polyrep_is_not(runs, scenes):
    image = scenes / "images" / "boat.png"
    result = run_python("-c", OPEN, str(runs["words"] / "final"), str(runs["dual"] / "final"), str(image))
    assert result.returncode == 0, result.stderr[-3000:]
    seen = json.loads(result.stdout.partition("REPORT")[2])
    model = polyrep.load(runs["words"] / "final", trust_remote_code=True, device="cpu")
    expected = model.encode_document([str(image)]).to_dense().numpy()
    for found in (*seen["images"], *seen["auto"]):
        np.testing.assert_allclose(found, expected[0], atol=1e-5)
    np.testing.assert_allclose(seen["caption"], model.encode_query(["a boat with a sail"]).to_dense(), atol=1e-5)
    assert seen["refused"] and len(seen["words"]) == 5
    assert [word for word, _ in seen["words"]] == [word for word, _ in model.decode(torch.from_numpy(expected[0]), 5)]
    dense = polyrep.load(runs["dual"] / "final", trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(seen["dense"], dense.encode_document([str(image)]), atol=1e-5)


def test_the_folders_tell_where_they_come_from_and_carry_no_path(runs):
    head = json.loads((runs["dual"] / "head" / "config.json").read_text())
    assert (head["base_model_id"], head["vision_model_id"]) == ("texts", "vision")
    for folder in (runs["words"], runs["dual"]):
        assert (folder / "final" / "processor_config.json").is_file()
        for file in (folder / "final").glob("*.json"):
            assert str(runs["root"]) not in file.read_text(), file
        card = (folder / "final" / "README.md").read_text()
        assert "scenes 30" in card and "encode_image" in card


def test_what_was_trained_is_what_the_folder_holds(runs):
    head = AutoModel.from_pretrained(runs["words"] / "head")
    whole = AutoModel.from_pretrained(runs["words"] / "final")
    for name, value in head.state_dict().items():
        torch.testing.assert_close(whole.head.state_dict()[name], value)
    towers = AutoModel.from_pretrained(runs["dual"] / "final")
    for name, value in towers.state_dict().items():
        torch.testing.assert_close(whole.encoder.state_dict()[name], value, msg=name)
    assert any(p.abs().sum() > 0 for p in head.vocabulary.parameters())


def test_runs_evaluate_on_images(runs, scenes):
    from polyrep.evaluation.evaluate import evaluate

    final = str(runs["words"] / "final")
    flags = ["--dataset", str(scenes), "--split", "test", "--baselines", "none", "--trust_remote_code", "true"]
    results = evaluate([final, *flags, "--cache_dir", str(runs["root"] / "cache")])
    rows = [row for row in results["rows"] if row["metric"] == "nDCG@10"]
    assert [row["queries"] for row in rows] == [20] and 0 < rows[0]["value"] <= 1


def features(scenes: Path, folder: Path, **arrays: np.ndarray) -> Path:
    """The captions of the scenes with vectors in the place of the images."""
    folder.mkdir()
    shutil.copyfile(scenes / "captions.jsonl", folder / "captions.jsonl")
    if len(arrays) == 1:
        np.save(folder / "v.npy", arrays["images"])
    else:
        save_arrays(arrays, folder / "v.safetensors")
    return folder


def test_features_of_the_tower_train_what_its_images_do(runs, scenes, tmp_path):
    vision = polyrep.hub.vision.VisionEncoder.open(runs["root"] / "vision", fastest_dtype("auto"))
    names = [json.loads(line)["image"] for line in (scenes / "captions.jsonl").read_text().splitlines()]
    own = vision.encode_document([Image.open(scenes / "images" / name).convert("RGB") for name in names])
    folder = features(scenes, tmp_path / "features", images=own.astype(np.float16))
    flags = [flag if flag != str(scenes) else str(folder) for flag in runs["shared"]]

    def dual(data: Path, name: str) -> dict[str, torch.Tensor]:
        train(
            ["dual-encoder-mobilenet-minilm", "--backbone", str(runs["root"] / "texts")]
            + [flag if flag != str(scenes) else str(data) for flag in runs["shared"]]
            + ["--vision", str(runs["root"] / "vision"), "--projection_dim", "12", "--hidden_dim", "8"]
            + ["--head_only", "true", "--output_dir", str(tmp_path / name)]
        )
        return AutoModel.from_pretrained(tmp_path / name / "head").state_dict()

    expected, found = AutoModel.from_pretrained(runs["dual"] / "head").state_dict(), dual(folder, "dual")
    exchanged = dual(
        features(scenes, tmp_path / "exchanged", images=np.roll(own, 1, axis=0).astype(np.float16)), "other"
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=5e-3, rtol=5e-2, msg=name)
    weight = "image.linear.weight"
    apart = [float((side[weight] - expected[weight]).abs().max()) for side in (found, exchanged)]
    assert apart[1] > 5 * apart[0], "features that go with other images train another map"
    train(words_run(runs, *flags) + ["--head_only", "true", "--output_dir", str(tmp_path / "words")])
    ours, theirs = (AutoModel.from_pretrained(path / "head") for path in (tmp_path / "words", runs["words"]))
    torch.testing.assert_close(ours.vocabulary.weight, theirs.vocabulary.weight, atol=2e-2, rtol=5e-2)


def test_vectors_of_both_sides_need_no_encoding(towers, scenes, tmp_path, monkeypatch):
    kind, _, folder = towers
    width = DualEncoderModel.from_encoder(str(folder)).config.projection_dim
    generator = np.random.default_rng(0)
    arrays = {n: generator.normal(size=(c, width)).astype(np.float32) for n, c in (("images", 12), ("captions", 60))}
    data = features(scenes, tmp_path / "vectors", **arrays)
    monkeypatch.setattr("polyrep.training.sides.embed", lambda *_, **__: pytest.fail("encoded"))
    flags = ["--datasets", str(data), "--max_steps", "2", "--per_device_train_batch_size", "8", "--bf16", "false"]
    train(
        ["dense2sparse-mobilenet-minilm", "--backbone", str(folder), *flags, "--output_dir", str(tmp_path / "out")]
        + ["--disable_tqdm", "true"]
    )
    model = polyrep.load(tmp_path / "out" / "final", trust_remote_code=True, device="cpu")
    assert model.encode_document([photo()]).to_dense().shape == (1, model[0].model.config.vocab_size)


@pytest.mark.parametrize(
    ("run", "change", "words"),
    [
        ("dual", {"images": (12, 9)}, "its document vectors have width 9, but the encoder gives 448.*--vision"),
        ("words", {"images": (12, 9)}, "width 9, but the encoder gives 12 or 448.*--backbone"),
        ("words", {"images": (12, 12), "captions": (60, 9)}, "its query vectors have width 9"),
        ("dual", {"images": (11, 448)}, r"shape \(11, 448\).*12 images"),
    ],
)
def test_vectors_of_another_encoder_are_refused(runs, scenes, tmp_path, run, change, words):
    arrays = {name: np.ones(shape, np.float32) for name, shape in change.items()}
    data = features(scenes, tmp_path / "vectors", **arrays)
    name = "dual-encoder-mobilenet-minilm" if run == "dual" else "dense2sparse-mobilenet-minilm"
    backbone = runs["root"] / "texts" if run == "dual" else runs["dual"] / "final"
    vision = ["--vision", str(runs["root"] / "vision")] if run == "dual" else []
    flags = [flag if flag != str(scenes) else str(data) for flag in runs["shared"]]
    with pytest.raises(InputError, match=words):
        trusted = ["--trust_remote_code", str(run == "words")]
        train([name, "--backbone", str(backbone), *trusted, *vision, *flags, "--output_dir", str(tmp_path / "out")])


def test_a_caption_without_a_known_word_is_refused(runs, scenes, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    lines = [json.loads(line) for line in (data / "captions.jsonl").read_text().splitlines()]
    train_line = next(line for line in lines if line["split"] == "train")
    train_line["captions"][2] = "☃☃"
    (data / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = [flag if flag != str(scenes) else str(data) for flag in runs["shared"]]
    with pytest.raises(InputError, match=f"caption '{train_line['image']}#2' .'☃☃'. holds no word"):
        train(words_run(runs, *flags) + ["--output_dir", str(tmp_path / "out")])


def test_a_dual_encoder_needs_a_vision_encoder(runs, tmp_path):
    start = ["dual-encoder-mobilenet-minilm", "--backbone", str(runs["root"] / "texts"), *runs["shared"]]
    start += ["--output_dir", str(tmp_path / "out")]
    with pytest.raises(InputError, match="Add --vision"):
        train(start)
    with pytest.raises(InputError, match="--vision .*needs weights .* preprocessor_config.json"):
        (tmp_path / "empty").mkdir()
        train([*start, "--vision", str(tmp_path / "empty")])
    with pytest.raises(InputError, match="no such folder, and not to be had from the Hub"):
        train([*start, "--vision", "nobody/nothing"])
    with pytest.raises(InputError, match="joins no encoders"):
        train(
            words_run(runs, *runs["shared"])
            + ["--output_dir", str(tmp_path / "out"), "--vision", str(runs["root"] / "vision")]
        )


def test_images_and_texts_are_not_trained_on_together(runs, beir, tmp_path):
    (beir / "qrels" / "test.tsv").rename(beir / "qrels" / "train.tsv")
    flags = [*runs["shared"][:2], str(beir), *runs["shared"][2:]]
    with pytest.raises(InputError, match="one data set holds images, another texts"):
        train(words_run(runs, *flags) + ["--output_dir", str(tmp_path / "out")])


def script(name: str):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_a_converted_mobilenet_is_the_plain_network(tmp_path):
    """Against the network written out: TensorFlow's padding, biases for batch norms, ReLU6."""
    rng = np.random.default_rng(0)
    plan = [(3, 32, 3, 1, 2), (32, 32, 3, 32, 1), (32, 16, 1, 1, 1)]  # in, out, kernel, groups, stride
    width = 16
    for expand, out, repeats, stride in (
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for i in range(repeats):
            inner = expand * width
            plan += [(width, inner, 1, 1, 1), (inner, inner, 3, inner, stride if i == 0 else 1), (inner, out, 1, 1, 1)]
            width = out
    plan.append((320, 1280, 1, 1, 1))
    arrays = {}
    for number, (i, o, k, groups, _) in enumerate(plan):
        arrays[f"w{number}"] = (rng.normal(size=(o, i // groups, k, k)) / np.sqrt(i // groups * k * k)).astype(
            np.float32
        )
        arrays[f"b{number}"] = (0.3 * rng.normal(size=o)).astype(np.float32)
    np.savez(tmp_path / "w.npz", **arrays)
    model = script("mobilenet").convert(tmp_path / "w.npz")
    x = torch.rand(2, 3, 64, 64) * 2 - 1

    def layer(x: torch.Tensor, number: int, linear: bool) -> torch.Tensor:
        _, _, k, groups, stride = plan[number]
        if k == 3:
            x = F.pad(x, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))
        w, b = (torch.from_numpy(arrays[f"{n}{number}"]) for n in "wb")
        x = F.conv2d(x, w, b, stride, 0, 1, groups)
        return x if linear else x.clamp(0, 6)

    state, number = x, 0
    while number < len(plan):
        if number == len(plan) - 1:
            state, number = layer(state, number, False), number + 1
            continue
        before = state
        for place in range(3):
            state = layer(state, number + place, place == 2)
        if number and before.shape == state.shape:
            state = state + before
        number += 3
    with torch.no_grad():
        found = model(x)
    torch.testing.assert_close(found.last_hidden_state, state, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.pooler_output, state.mean((2, 3)), atol=1e-3, rtol=1e-3)
    del arrays["b7"]
    np.savez(tmp_path / "w.npz", **arrays)
    with pytest.raises(InputError, match="b7 has shape None"):
        script("mobilenet").convert(tmp_path / "w.npz")


def test_a_vision_encoder_is_cached_as_texts_are(tmp_path):
    vision = polyrep.hub.vision.VisionEncoder.open(tiny_vision(tmp_path / "vision"), torch.float32)
    images = {"a": photo(), "b": photo(seed=1)}
    found = polyrep.encoding.cache.embed(
        vision, images, task="document", cache_dir=tmp_path / "cache", dtype="float32"
    )
    assert found.values.shape == (2, vision.get_embedding_dimension())
    again = polyrep.encoding.cache.embed(
        vision, images, task="document", cache_dir=tmp_path / "cache", dtype="float32"
    )
    assert again.path == found.path
    other = polyrep.encoding.cache.embed(
        vision, images | {"b": photo(seed=2)}, task="document", cache_dir=tmp_path / "cache"
    )
    assert other.path != found.path
    with pytest.raises(NotImplementedError, match="part of a dual encoder"):
        vision[0].save("anywhere")
