"""The demo without a browser: scores against loops, what is escaped and refused, and the Space that it becomes."""

from __future__ import annotations

import copy
import importlib
import io
import json
import math
import os
import re
import socket
import subprocess
import time
import tomllib
import urllib.request
import zlib
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import collection as demo
import images
import numpy as np
import pytest
import space
import storage
import torch
import views
import warm
import yaml
from conftest import PATIENCE, ROOT
from matplotlib.cbook import get_sample_data
from matplotlib.figure import Figure
from PIL import Image

from polyrep import InputError
from polyrep.data import load_retrieval_dataset
from polyrep.evaluation.bm25 import rank_with_bm25
from polyrep.evaluation.frontier.advice import best_of, within
from polyrep.methods import GaussianOutput
from polyrep.methods.gaussian.show import draw_ellipses
from polyrep.methods.reinpool.show import kept_tokens_flow, words_of
from polyrep.search import kl

MODELS = ROOT / "demo" / "models"
QUERY = "can I bring my bike across the water"
EVIL = '<script>alert("1")</script><img src=x onerror=alert(2)>'


@pytest.fixture(scope="session")
def app() -> Any:
    """The program; it imports gradio, which takes seconds, so only who needs it pays for it."""
    return importlib.import_module("app")


@pytest.fixture(scope="session")
def whole(sets: Any) -> Any:
    return load_retrieval_dataset(sets / "python_docs")


@pytest.fixture(scope="session")
def dataset(whole: Any) -> Any:
    smaller = demo.few(whole, 60, [document for query in list(whole.qrels)[:6] for document in whole.qrels[query]])
    return replace(smaller, corpus={**smaller.corpus, EVIL: f"{EVIL} ferry"})


@pytest.fixture(scope="session")
def opened(dataset: Any, tmp_path_factory: pytest.TempPathFactory) -> demo.Collection:
    cache = tmp_path_factory.mktemp("demo")
    return demo.Collection(dataset, storage.open_models(MODELS, demo.RUNS, cache), cache)


@pytest.fixture(scope="session")
def found(opened: demo.Collection) -> dict[str, demo.Found]:
    return {one.representation.name: one for one in opened.search(QUERY, k=len(opened.ids))}


@pytest.fixture(scope="session")
def vectors(opened: demo.Collection) -> tuple[torch.Tensor, torch.Tensor]:
    """A query and the documents by MiniLM itself, away from the caches."""
    encode = opened.minilm.encode
    return tuple(encode(texts, convert_to_tensor=True).float().cpu() for texts in ([QUERY], opened.texts))  # type: ignore[return-value]


@pytest.fixture(scope="session")
def tokens(opened: demo.Collection) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Likewise by the late-interaction model."""
    query, *_ = opened.late.encode_query([QUERY], convert_to_numpy=False)
    documents = opened.late.encode_document(opened.texts, convert_to_numpy=False)
    return query.float(), [one.float() for one in documents]


def scores_of(one: demo.Found, ids: list[str]) -> np.ndarray:
    by_id = {hit.id: hit.score for hit in one.hits}
    return np.array([by_id[identifier] for identifier in ids])


def maxsim(query: torch.Tensor, document: torch.Tensor) -> float:
    return sum(max(float(q @ d) for d in document) for q in query)


def test_every_representation_scores_every_document_best_first(found, opened):
    assert list(found)[:5] == ["BM25", "Dense", "Dense2Sparse", "Gaussian", "MultiLayer"]
    assert list(found)[5:] == ["ReinPool, 1", "ReinPool, 8", "LEMUR, MaxSim", demo.FULL]
    for name, one in found.items():
        assert len(one.hits) == (demo.RERANKED if name == "LEMUR, MaxSim" else len(opened.ids))
        assert [hit.score for hit in one.hits] == sorted((hit.score for hit in one.hits), reverse=True)
        assert one.encode_ms >= 0 and one.search_ms > 0
    assert found[demo.FULL].overlap == 1


def test_bm25_ranks_as_the_product_does(found, opened, dataset):
    asked = replace(dataset, queries={"q": QUERY}, qrels={"q": {}})
    ranking = rank_with_bm25(asked)
    assert [hit.id for hit in found["BM25"].hits] == [opened.ids[place] for place in ranking.positions[0]]
    assert [hit.score for hit in found["BM25"].hits] == pytest.approx(ranking.scores[0].tolist())
    assert found["BM25"].representation.bytes_per_document == ranking.costs["bytes_per_document"]


@torch.inference_mode()
def test_scores_of_one_vector_are_those_of_the_models(found, opened, vectors):
    query, documents = vectors
    ids = opened.ids
    assert scores_of(found["Dense"], ids) == pytest.approx((documents @ query[0]).numpy(), abs=0.01)
    asked, held = opened.gaussian(query, task="query"), opened.gaussian(documents, task="document")
    divergence = kl(*(GaussianOutput(mean=one.mean.double(), variance=one.variance.double()) for one in (asked, held)))
    assert scores_of(found["Gaussian"], ids) == pytest.approx(-divergence[0].numpy(), abs=0.3)  # of 5 to 25 nats


@torch.inference_mode()
def test_scores_of_words_are_the_products_of_the_shown_words(found, opened):
    asked = {word: weight for word, weight, _ in opened.words(QUERY, "query").words}
    for hit in found["Dense2Sparse"].hits[:5]:
        held = {word: weight for word, weight, _ in opened.words(hit.text, "document").words}
        assert hit.score == pytest.approx(sum(weight * held.get(word, 0) for word, weight in asked.items()), rel=0.02)


@torch.inference_mode()
def test_scores_of_several_vectors_are_maxsim_by_loops(found, opened, tokens):
    query, documents = tokens
    by_loops = np.array([maxsim(query, document) for document in documents])
    assert scores_of(found[demo.FULL], opened.ids) == pytest.approx(by_loops, rel=0.02)
    staged = found["LEMUR, MaxSim"].hits
    full = {hit.id: hit.score for hit in found[demo.FULL].hits}
    assert all(hit.score == pytest.approx(full[hit.id], abs=1e-4) for hit in staged)
    for k in (1, 8):
        pooled = [opened.reinpool(document[None], num_vectors=k) for document in documents]
        by_loops = np.array([maxsim(query, one.embeddings[0][one.mask[0]]) for one in pooled])
        assert scores_of(found[f"ReinPool, {k}"], opened.ids) == pytest.approx(by_loops, rel=0.05, abs=0.1)


def test_bytes_are_those_of_numbers_in_16_bits(found, tokens):
    vectors_each = np.mean([len(document) for document in tokens[1]])
    full = vectors_each * 128 * 2 + 8
    size = {name: one.representation.bytes_per_document for name, one in found.items()}
    assert size[demo.FULL] == pytest.approx(full)
    assert size["LEMUR, MaxSim"] == pytest.approx(full + 512 * 2)
    assert size["ReinPool, 1"] == 128 * 2 and size["ReinPool, 8"] <= 8 * 128 * 2 + 8
    assert size["Dense"] == size["MultiLayer"] == size["Gaussian"] == 384 * 2


def test_a_judged_query_that_nothing_answers_says_so(opened):
    answers = [replace(one, hits=[hit for hit in one.hits if not hit.relevant]) for one in opened.search(QUERY)]
    assert "None of these is what" in views.search(QUERY, answers, True)
    assert "Only queries of the test set" in views.search(QUERY, answers, False)


def test_one_vector_takes_the_same_bytes_in_two_tabs(found, opened):
    kept = opened.kept_tokens("list open ports and sockets", 1)
    assert kept.bytes_after == found["ReinPool, 1"].representation.bytes_per_document == 256


def test_a_cut_without_queries_is_refused(whole):
    asked = {document for judged in whole.qrels.values() for document in judged}
    with pytest.raises(InputError, match="none of its queries.*Take more"):
        demo.few(whole, 1, [document for document in whole.corpus if document not in asked][:1])


def test_relevant_hits_are_marked_for_test_queries_alone(found, opened):
    assert [hit.id for hit in found[demo.FULL].hits if hit.relevant] == ["velmora-000"]
    assert not any(hit.relevant for one in opened.search("something else") for hit in one.hits)


def test_shares_of_layers_add_up_to_the_score(opened, found):
    shown = opened.layer_scores(QUERY)
    assert shown.layers == [*(f"layer {number}" for number in (6, 5, 4, 3, 2, 1)), "embeddings"]
    assert shown.shares.sum(1) == pytest.approx([hit.score for hit in shown.hits], abs=1e-5)
    assert np.abs(shown.shares).min() > 0
    searched = {hit.id: hit.score for hit in found["MultiLayer"].hits}
    assert [hit.score for hit in shown.hits] == pytest.approx([searched[hit.id] for hit in shown.hits], abs=2e-3)
    # By hand: what layer 6 adds is its block of the map times the layer, over the length of the whole sum.
    head, place = opened.multilayer, opened.ids.index(shown.hits[0].id)
    states = torch.from_numpy(np.asarray(opened.layers.values[place], np.float64))
    weight = head.map.weight.detach().double()
    blocks = {layer: weight[:, 384 * i : 384 * (i + 1)] for i, layer in enumerate(head.config.layers)}
    whole = sum(block @ states[layer] for layer, block in blocks.items())
    asked = head(opened.ask(QUERY).layers[:, head.config.layers], task="query").sentence_embedding[0].detach().double()
    assert shown.shares[0, 0] == pytest.approx(float(asked @ (blocks[-1] @ states[-1]) / whole.norm()), abs=1e-5)


def test_a_query_with_less_in_it_stands_beside_the_whole(opened):
    shown = opened.uncertainty(QUERY, k=5)
    assert list(shown.queries) == ["as it is", "cut short", "misspelt"] and shown.queries["as it is"] == QUERY
    assert QUERY.startswith(shown.queries["cut short"]) and len(set(shown.queries.values())) == 3
    spread = shown.asked.variance.log().sum(1) * (shown.asked.mean.shape[1] / shown.asked.variance.shape[1] / 2)
    assert shown.nats == pytest.approx(spread.tolist(), rel=1e-5)
    assert len(shown.hits) == len(shown.documents.mean) == 5
    page = views.uncertainty(shown)
    assert "wider: less sure" in page or "narrower: surer" in page
    assert re.search(r'<img src="data:image/png;base64,[^"]+" alt="[^"]*1: [^"]+"', page)
    assert views.uncertainty(opened.uncertainty("a"))  # of one letter no shorter query


def test_ellipses_lie_where_the_means_are_and_are_as_wide_as_the_deviation():
    documents = GaussianOutput(mean=torch.tensor([[0.0, 1, 4], [0, 3, 8]]), variance=torch.tensor([[4.0], [9.0]]))
    query = GaussianOutput(mean=torch.tensor([[5.0, 6, 7]]), variance=torch.tensor([[1.0, 16, 25]]))
    axis = Figure().add_subplot()
    assert draw_ellipses(axis, documents, query, ["a", "$b$"], ["q"]) == (2, 1)  # where the documents differ most
    drawn = [(*patch.center, patch.width, patch.height) for patch in axis.patches]
    expected = [(4, 1, 0.8, 0.8), (8, 3, 1.2, 1.2), (7, 6, 2.0, 1.6)]  # twice a fifth of the deviation
    assert np.array(drawn) == pytest.approx(np.array(expected))
    assert axis.get_legend_handles_labels()[1] == ["q"]
    for documents_, names in ((documents, ["a"]), (GaussianOutput(mean=documents.mean), ["a", "b"])):
        with pytest.raises(InputError, match="nothing to draw"):
            draw_ellipses(axis, documents_, query, names, ["q"])


def test_tokens_for_a_page_of_ones_own_name_their_vector():
    flow = kept_tokens_flow(["a", "##b", "<i>"], [0.25, 0.75, 0.5], clusters=[1, 2, 1])
    plain = re.sub("<[^>]+>", "", flow)
    assert plain == "ab &lt;i&gt;" and re.findall(r'data-cluster="(\d)"', flow) == ["1", "2", "1"]
    assert flow.count('class="kept"') == 1 and "--p:0.250" in flow and "vector 2" in flow
    assert words_of(["a", "##b", "<i>"]) == ["a", "b", "<i>"]
    with pytest.raises(InputError, match="1 clusters for 2 tokens"):
        kept_tokens_flow(["a", "b"], [0.5, 0.5], clusters=[1])


def test_kept_tokens_are_those_that_go_into_each_vector(opened):
    text = opened.dataset.corpus["velmora-000"]
    kept = opened.kept_tokens(text, 4)
    assert len(kept.tokens) == len(kept.clusters) == len(kept.keep_probability)
    assert sorted(set(kept.clusters)) == [1, 2, 3, 4]
    assert kept.bytes_before == len(kept.tokens) * 256 + 8 and kept.bytes_after == 4 * 256 + 8
    page = views.kept_tokens(kept)
    assert page.count("data-cluster=") == len(kept.tokens) + 4  # each token, and each vector's name
    assert sum(map(int, re.findall(r"<small>(\d+) tokens?</small>", page))) == len(kept.tokens)
    assert opened.kept_tokens("port", 16).bytes_after <= 3 * 256 + 8  # no more vectors than tokens


def test_words_of_a_text_are_its_own_or_added(opened):
    asked = opened.words(QUERY, "query")
    own = {word for word, _, mine in asked.words if mine}
    assert {"bring", "bike", "water"} <= own and 0 < asked.own < len(asked.words) <= 48
    assert "ferry" not in own
    weights = [weight for _, weight, _ in asked.words]
    assert weights == sorted(weights, reverse=True) and weights[-1] > 0
    assert opened.words(QUERY, "document").words != asked.words
    page = views.words(asked, "query")
    assert page.count("<li>") == views.SHOWN_WORDS and "sr-only" in page


def test_a_photograph_becomes_words(app, opened, vision):
    collection = copy.copy(opened)
    collection.images = app.open_vision(str(vision), None, trusted=True)
    picture = images.opened(get_sample_data("grace_hopper.jpg", asfileobj=False))
    words = collection.image_words(picture)
    assert words.words and words.own == 0
    assert (
        words.words
        == collection.image_words(picture).words
        != collection.image_words(Image.new("RGB", (60, 40))).words
    )
    page = views.words(words, "image", picture, 'my "dog" <b>')
    assert 'alt="my &quot;dog&quot; &lt;b&gt;"' in page


def test_a_model_without_words_of_images_is_refused(app, opened):
    for name in ("minilm", str(opened.models["late-interaction-minilm"])):
        with pytest.raises(InputError, match="--vision .*gives no words of images.*dense2sparse-mobilenet-minilm"):
            app.open_vision(name, None, trusted=False)


def test_nothing_that_was_typed_or_indexed_becomes_markup(app, opened):
    search = app.answered(lambda text: views.search(text, opened.search(text), False))
    words = opened.words(EVIL, "query")
    pages = [search(EVIL), search("ferry")]
    pages += [views.words(words, EVIL), views.kept_tokens(opened.kept_tokens(EVIL, 4)), views.refusal(EVIL)]
    pages += [views.uncertainty(opened.uncertainty(EVIL)), views.layers(opened.layer_scores(EVIL))]
    pages += [views.choices(EVIL, [EVIL]), views.words(words, "image", Image.new("RGB", (9, 9)), EVIL)]
    assert "script" in pages[0] and EVIL.split(">")[0][1:] in pages[1]
    for page in pages:
        assert "<script" not in page and "<img src=x" not in page


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "The query is empty"),
        ("  \n ", "The query is empty"),
        (None, "The query is empty"),
        ("a" * 501, "501 characters, more than the 500"),
        ("\ud800", "no valid Unicode"),
    ],
)
def test_bad_text_gets_a_message(app, opened, text, message):
    for call in (opened.search, opened.uncertainty, opened.layer_scores, lambda t: opened.words(t, "query")):
        page = app.answered(call)(text)
        assert 'role="alert"' in page and message in page


def test_limits_of_a_document_are_its_own(app, opened):
    assert "5,001 characters" in app.answered(lambda t: opened.kept_tokens(t, 8))("a" * 5001)
    assert opened.kept_tokens("ab " * 1600, 8).bytes_after > 0  # what the model does not read is cut off


def test_strange_text_is_answered(opened):
    for text in ("?", "。。。", "\u202e\x00\x07 x", "🙂", "a" * 500):
        assert len(opened.search(text)) == 9, text
        assert opened.layer_scores(text).hits and opened.uncertainty(text).hits


def test_a_fault_of_ours_is_a_message_too_and_goes_to_the_log(app, caplog):
    def broken(_: str) -> str:
        raise RuntimeError("secret detail")

    page = app.answered(broken)("x")
    assert 'role="alert"' in page and "Something went wrong" in page and "secret" not in page
    assert "secret detail" in caplog.text


def picture(mode: str = "RGB", size: tuple[int, int] = (64, 48), kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 10,000 x 10,000 pixels."""
    content = bytearray(picture(size=(1, 1)))
    content[16:24] = (10_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"this is a text", "no image that can be read"),
        (b"", "no image that can be read"),
        (picture(kind="JPEG")[:900], "damaged or cut off"),
        (picture()[:200], "damaged or cut off"),
        (bomb(), "10,000 × 10,000 pixels"),
        (b"\xff\xd8" + b"0" * images.MOST_BYTES, "MB, more than the 8 MB"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"></svg>', "no image that can be read"),
        (picture(kind="TIFF"), "no image that can be read"),
    ],
    ids=["text", "empty", "jpeg", "png", "bomb", "bytes", "svg", "tiff"],
)
def test_bad_uploads_get_a_message(tmp_path, content, message):
    path = tmp_path / "upload.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        images.opened(path)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK"])
def test_every_mode_opens_as_rgb(tmp_path, mode):
    path = tmp_path / "upload"
    path.write_bytes(picture(mode, kind="JPEG" if mode == "CMYK" else "PNG"))
    assert (images.opened(path).mode, images.opened(path).size) == ("RGB", (64, 48))


def test_what_is_transparent_lies_on_white_and_an_animation_is_its_first_frame(tmp_path):
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert images.opened(tmp_path / "clear.png").getpixel((4, 4)) == (255, 255, 255)
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert images.opened(tmp_path / "two.gif").getpixel((4, 4)) == (255, 0, 0)


def test_an_image_stands_upright_and_is_made_small(tmp_path):
    image, exif = Image.new("RGB", (2000, 1000), "red"), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert images.opened(tmp_path / "turned.jpg").size == (images.SHOWN // 2, images.SHOWN)


def test_an_interrupted_encoding_goes_on_where_it_stopped(sentence_model, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "PART", 2)
    texts, calls = {str(n): f"file {n}" for n in range(5)}, []
    encode = storage.encode_chunk

    def failing(model: Any, part: list[str], *more: Any) -> Any:
        calls.append(part)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(model, part, *more)

    monkeypatch.setattr(storage, "encode_chunk", failing)
    key = {"kind": "sentence", "of": "test"}
    with pytest.raises(KeyboardInterrupt):
        storage.encoded(tmp_path, "tiny", key, sentence_model, texts)
    made = storage.encoded(tmp_path, "tiny", key, sentence_model, texts)
    assert [len(part) for part in calls] == [2, 2, 2, 1]  # the second part twice, the first once
    assert [part.name for part in tmp_path.iterdir()] == [storage.place(tmp_path, "tiny", key).name]
    assert np.asarray(made.values) == pytest.approx(sentence_model.encode(list(texts.values())), abs=1e-3)
    storage.encoded(tmp_path, "tiny", key, sentence_model, texts)
    assert len(calls) == 4 and isinstance(made.values, np.memmap)


def test_keys_tell_corpora_and_models_apart(dataset, opened):
    known = demo.keys(dataset, opened.models)
    other = demo.keys(replace(dataset, corpus={**dataset.corpus, "one": "more"}), opened.models)
    head = demo.keys(dataset, opened.models | {"lemur-minilm": opened.models["reinpool-minilm"]})
    assert all(known[name] != other[name] for name in known)
    assert [name for name in known if known[name] != head[name]] == ["lemur-minilm"]
    assert len({storage.digest_of(key) for key in known.values()}) == len(known) == 9


def test_a_missing_model_is_named_with_a_remedy(tmp_path):
    with pytest.raises(InputError, match="neither late-interaction-minilm/final.*train.py"):
        storage.open_models(tmp_path, demo.RUNS, tmp_path)


def test_a_budget_takes_the_best_row_within_it(app):
    for name in app.FRONTIERS:
        results = json.loads((ROOT / "results" / f"frontier-{name}.json").read_text())
        rows = views.quality_rows(results)
        for size, time_ in ((16, 1e9), (256, 1), (1024, 8), (1e9, 1e9)):
            row = best_of(within(rows, {"bytes": size, "ms": time_}))
            fitting = [r for r in rows if r["bytes_per_document"] <= size and r["search_ms_p50"] <= time_]
            assert row in fitting and row["value"] == max(r["value"] for r in fitting)
        assert "Allow more" in views.recommended(results, {"bytes": 1.0, "ms": 1.0})
        page = views.frontier(b"", results, name)
        assert page.count("<tr>") == len(rows) + 1 and 'alt="Quality against bytes' in page
    published = next(r for r in results["recommendations"] if r["budget"] == {"bytes": 256.0})
    assert best_of(within(rows, {"bytes": 256.0}))["system"] == published["system"]  # as the command itself says


def nested_rows() -> list[dict[str, Any]]:
    """Rows of a benchmark of MetaEmbed on two data sets."""
    several = [(system, k) for system in ("hierarchical", "MetaEmbed") for k in (1, 2, 4, 8, 16, 32)]
    names = [(f"{system}, {k}", 256.0 * k) for system, k in several] + [("late interaction", 9000.0)]
    return [
        {"system": name, "dataset": dataset, "metric": metric, "value": place / 100, "bytes_per_document": size}
        for place, (name, size) in enumerate(names)
        for dataset in ("one", EVIL)
        for metric in ("nDCG@10", "MRR@10")
    ]


def test_a_number_of_vectors_shows_what_each_way_finds_with_as_many(app, tmp_path, monkeypatch):
    monkeypatch.setattr(app, "RESULTS", tmp_path)
    assert app.nested_results("a head over a frozen model") == ("metaembed-frozen", None)
    note = views.unmeasured("metaembed-frozen")
    assert "results/metaembed-frozen.json is not there" in note and "benchmarks/metaembed_frozen.py" in note
    assert app.nested_results("what is no choice") == ("metaembed-text", None)
    (tmp_path / "metaembed-text.json").write_text(json.dumps({"rows": nested_rows()}))
    name, results = app.nested_results("trained with the encoder")
    page = views.few_vectors(results, 4)
    assert name == "metaembed-text" and EVIL not in page and page.count("<tr>") == 3 + 1
    # The places in the list: MetaEmbed, 4 is the ninth row, hierarchical, 4 the third, late interaction the last.
    cells = ("MetaEmbed</th>", "0.080", "hierarchical</th>", "0.020", "late", "0.120")
    order = [page[page.index("<table") :].index(cell) for cell in cells]
    assert order == sorted(order) and "4 vectors of MetaEmbed, 1,024 bytes: nDCG@10 0.080 on one" in page
    assert "1 vector of MetaEmbed, 256 bytes" in views.few_vectors(results, 1)
    curve = views.vectors_curve(picture(), results, name)
    assert "1: 0.060; 2: 0.070; 4: 0.080; 8: 0.090; 16: 0.100; 32: 0.110" in curve and "data:image/png" in curve


def test_a_smaller_corpus_keeps_what_is_needed(whole):
    smaller = demo.few(whole, 50, ["velmora-000"])
    assert len(smaller.corpus) == 50 and "velmora-000" in smaller.corpus
    assert smaller.queries and all(set(judged) <= set(smaller.corpus) for judged in smaller.qrels.values())
    assert len(demo.few(whole, 10**6).corpus) == len(whole.corpus)


def contrast(first: str, second: str) -> float:
    """WCAG's ratio of two colours."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_colours_of_text_have_contrast_in_both_themes():
    style = (ROOT / "demo" / "style.css").read_text()
    themes = [
        dict(re.findall(r"--([\w-]+): (#\w{6})", block))
        for block in re.findall(r"polyrep \{([^}]*--ink:[^}]*)\}", style)
    ]
    assert len(themes) == 2
    for theme in themes:
        for text in ("ink", "soft", "accent", "own", "added"):
            assert min(contrast(theme[text], theme[ground]) for ground in ("paper", "panel")) >= 4.5, text
        assert contrast(theme["good"], theme["good-bg"]) >= 4.5 and contrast(theme["bad"], theme["bad-bg"]) >= 4.5


def test_the_space_asks_for_what_the_package_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["quickstart"]]
    lines = (ROOT / "demo" / "requirements.txt").read_text().splitlines()
    assert sorted(line for line in lines if not line.startswith("#")) == sorted(wanted)
    head = yaml.safe_load((ROOT / "demo" / "README.md").read_text().split("---")[1])
    assert (head["sdk"], head["app_file"], head["license"]) == ("gradio", "app.py", "apache-2.0")
    assert version("gradio").split(".")[0] == head["sdk_version"].split(".")[0]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_the_staged_space_starts_by_itself(tmp_path, sets, monkeypatch):
    folder = tmp_path / "space"
    monkeypatch.setenv("POLYREP_DATA", str(sets))
    assert space.stage(folder, tmp_path / "cache") is False  # nothing was encoded there
    with pytest.raises(InputError, match="exists already"):
        space.stage(folder, tmp_path / "cache")
    assert not list(folder.rglob("__pycache__")) and not list(folder.rglob(".*.partial"))
    assert (folder / "python_docs" / "corpus.jsonl").is_file(), "where the app finds it by its name"
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "POLYREP_DATA")}
    env = clean | {"HF_HUB_OFFLINE": "1", "GRADIO_SERVER_PORT": str(free_port())}
    code = "import app, collection, polyrep; print(polyrep.__file__, app.ROOT)"
    where = subprocess.run(
        [warm.python(), "-c", code], cwd=folder, env=env, capture_output=True, text=True, check=True
    )
    assert where.stdout.split() == [str(folder / "polyrep" / "__init__.py"), str(folder)]
    with (tmp_path / "log").open("w+") as log:
        options: dict[str, Any] = {"cwd": folder, "env": env, "stdout": log, "stderr": log}
        server = subprocess.Popen([warm.python(), "app.py", "--documents", "12", "--cache", "encoded"], **options)
        try:
            page = awaited(f"http://127.0.0.1:{env['GRADIO_SERVER_PORT']}/config", server)
        finally:
            server.terminate()
            server.wait(PATIENCE)
        log.seek(0)
        assert page is not None, log.read()
    assert "MultiLayer" in page and str(ROOT) not in page and str(tmp_path) not in page
    assert len(list((folder / "encoded").glob("*/manifest.json"))) == 9


def awaited(url: str, server: subprocess.Popen[Any], seconds: float = PATIENCE) -> str | None:
    """What a server answers once it does; None if it ends before."""
    stop = time.monotonic() + seconds
    while time.monotonic() < stop and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                return answer.read().decode()
        except OSError:
            time.sleep(0.2)
    return None


def test_an_encoded_corpus_goes_along(tmp_path, monkeypatch, sets):
    monkeypatch.setenv("POLYREP_DATA", str(sets))
    wanted = {"one": {"kind": "sentence"}}
    monkeypatch.setattr(space, "keys", lambda dataset, models: wanted)
    place = storage.place(tmp_path / "cache", "one", wanted["one"])
    place.mkdir(parents=True)
    (place / "manifest.json").write_text("{}")
    assert space.stage(tmp_path / "space", tmp_path / "cache")
    assert (tmp_path / "space" / "encoded" / place.name / "manifest.json").is_file()


def test_milliseconds_are_medians(monkeypatch):
    ticks = iter([0.0, 0.001, 1.0, 1.009, 2.0, 2.002])
    monkeypatch.setattr(demo.time, "perf_counter", lambda: next(ticks))
    result, taken = demo.timed(lambda: "done")
    assert result == "done" and math.isclose(taken, 2, rel_tol=1e-6)
