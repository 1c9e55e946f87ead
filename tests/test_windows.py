"""Long documents in windows: cut at tokens, the best window counts, and every document is found once."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from conftest import needs_seismic
from qdrant_server import StandIn
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
from test_encode import write_lines
from test_evaluation import brute_force
from test_search import DIM, closed, packed, same, score, texts

from polyrep import InputError
from polyrep.cli import main
from polyrep.encoding import EncodedCorpus, embed
from polyrep.encoding.encode import encode
from polyrep.encoding.shards import Origin, Shard
from polyrep.encoding.windows import Windows
from polyrep.evaluation.evaluate import evaluate
from polyrep.search import Hit, Index, exact_search, open_index
from polyrep.search.ranking import rescore, tie_ranks

LONG = {
    "d1": " ".join(["port", "list", "file", "of", "a", "cat", "and", "dog", ":"] * 9),
    "d2": "list",
    "d3": "file port " * 30 + "antidisestablishmentarianism" * 3,
    "d4": "a cat",
}
QUERIES = {"q1": "port", "q2": "cat and dog", "q3": "file list of a dog"}


def bare_tokens(model: Any, text: str) -> list[str]:
    """Tokens that look alike at the start of a word and inside."""
    return [token.removeprefix("##") for token in model.tokenizer.tokenize(text)]


@pytest.mark.parametrize(("tokens", "stride"), [(12, None), (12, 6), (7, 1), (30, 29), (1, 1)])
def test_windows_hold_all_tokens_of_a_text_and_no_more_than_they_may(sentence_model, tokens, stride):
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(1, 14))) for _ in range(40)]
    text = "  ".join([*words, "qwertyuiopasdfghjklzxcvbnm", "file:port list"])
    whole = bare_tokens(sentence_model, text)
    start, end = -1, 0
    for cut in Windows.of(sentence_model, tokens, stride, "model").cut(text):
        found = bare_tokens(sentence_model, cut)
        assert len(found) <= tokens
        # Windows start in order, and no token lies between two of them.
        start = next(place for place in range(start + 1, end + 1) if whole[place : place + len(found)] == found)
        end = max(end, start + len(found))
    assert end == len(whole)


def test_a_word_is_cut_only_if_it_is_longer_than_half_a_window(sentence_model):
    words = ["port", "abcdefg", "list", "file", "hijk", "cat"] * 5
    cuts = Windows.of(sentence_model, 10, None, "model").cut(" ".join(words))
    assert " ".join(cuts).split() == words
    (single, *_), long = Windows.of(sentence_model, 10, None, "model").cut("x" * 25), "x" * 25
    assert single == long[:10]


WRITINGS = {
    "prose": "Each shell has its own way to list files, ports and users; see port_list(1) for more. " * 20,
    "compounds": "Donaudampfschifffahrtskapitänsmützenfabrik " * 12,
    "letters": "qwjxzkvbpygfmdlhrutsnioae" * 16,
    "no spaces": "日本語の文章は空白なしで書かれる。" * 12,
    "several tokens a character": "👩‍👩‍👧‍👦🇩🇪😀" * 12,
    "decomposed": "e\u0301a\u0308" * 60,
    "characters that are words": "\ufdfa \u00bd \ufb01ne " * 20,
    "control": "a\u200bb\x00c " * 40,
    "spaces": "\n\n   " + "word  and \n " * 40 + "  \n",
}


def tokenizer_of(kind: str) -> tokenizers.Tokenizer:
    """A small one of each family, over the texts above."""
    byte = kind.startswith("byte")
    made = tokenizers.Tokenizer(tokenizers.models.BPE() if byte else tokenizers.models.Unigram())
    if byte:
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer: Any = tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<s>", "</s>"],
        )
    else:
        made.normalizer, made.pre_tokenizer = tokenizers.normalizers.NFKC(), tokenizers.pre_tokenizers.Metaspace()
        trainer = tokenizers.trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", special_tokens=["<unk>"])
    made.train_from_iterator(WRITINGS.values(), trainer)
    if kind == "byte, trimmed":  # offsets without the space that a token holds
        made.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim_offsets=True)
    return made


@pytest.mark.parametrize("kind", ["byte", "byte, trimmed", "sentencepiece"])
@pytest.mark.parametrize("writing", WRITINGS)
def test_windows_of_any_writing_fit_and_hold_each_character_once(kind, writing):
    tokenizer, text = tokenizer_of(kind), WRITINGS[writing]
    for tokens in (24, 31):  # more than the longest character has
        cuts = Windows(tokens, tokens, tokenizer).cut(text)
        assert all(cut.strip() for cut in cuts)
        assert max(len(tokenizer.encode(cut, add_special_tokens=False)) for cut in cuts) <= tokens
        assert "".join("".join(cuts).split()) == "".join(text.split())
        half = Windows(tokens, tokens // 2, tokenizer).cut(text)
        assert max(len(tokenizer.encode(cut, add_special_tokens=False)) for cut in half) <= tokens
        end = 0  # and none is left out between two windows
        for cut in half:
            least = len(text) - len(text[end:].lstrip())
            assert (start := text.rfind(cut, 0, least + len(cut))) >= 0
            end = start + len(cut)
        assert not text[end:].strip()


def test_a_text_of_nothing_but_spaces_is_one_window():
    assert Windows(4, 2, tokenizer_of("byte")).cut(" \n" * 50) == [" \n" * 50]


def test_without_a_stride_windows_do_not_overlap_and_with_half_each_token_is_in_two(sentence_model):
    letters = " ".join("abcdefghijklmnopqrstuvwxyz")
    side_by_side = Windows.of(sentence_model, 8, None, "model").cut(letters)
    assert [cut.replace(" ", "") for cut in side_by_side] == ["abcdefgh", "ijklmnop", "qrstuvwx", "yz"]
    half = Windows.of(sentence_model, 8, 4, "model").cut(letters)
    starts = ["abcdefgh", "efghijkl", "ijklmnop", "mnopqrst", "qrstuvwx", "uvwxyz"]
    assert [cut.replace(" ", "") for cut in half] == starts


@pytest.mark.parametrize("family", ["sentence_model", "multi_vector_model", "sparse_model"])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_the_best_window_counts_or_all_vectors_together(family, similarity, tmp_path, request, monkeypatch):
    model = request.getfixturevalue(family)
    windows = Windows.of(model, 10, 5, "model")
    monkeypatch.setattr("polyrep.encoding.cache.CHUNK", 3)  # so that windows of a document are in several
    options: dict[str, Any] = {"cache_dir": tmp_path, "dtype": "float32", "show_progress": False}
    documents = embed(model, LONG, task="document", windows=windows, **options)
    queries = embed(model, QUERIES, task="query", **options)
    asked = list(model.encode_query(list(QUERIES.values())))
    expected = np.empty((len(QUERIES), len(LONG)))
    counts = []
    for place, text in enumerate(LONG.values()):
        found = [model.encode_document([cut])[0] for cut in windows.cut(text)]
        counts.append(len(found))
        for row, query in enumerate(asked):
            if family == "multi_vector_model":
                similarity = "maxsim"
                expected[row, place] = score("maxsim", np.asarray(query), np.concatenate(found))
            else:
                sides = [v.to_dense().numpy() if isinstance(v, torch.Tensor) else v for v in [query, *found]]
                expected[row, place] = max(score(similarity, sides[0], one) for one in sides[1:])
    assert max(counts) > 3 and documents.documents == len(LONG)
    if family == "multi_vector_model":
        assert documents.windows is None and len(documents) == len(LONG)
    else:
        assert documents.windows.tolist() == np.cumsum([0, *counts]).tolist()
    ranks = tie_ranks(list(LONG))
    monkeypatch.setattr("polyrep.search.ranking.CHUNK_ELEMENTS", 4 * documents.dim)  # less than the windows of one
    positions, scores = exact_search(queries, documents, ranks, similarity=similarity, k=10)
    assert positions.shape == expected.shape
    assert scores == pytest.approx(np.take_along_axis(expected, positions, 1), rel=1e-4, abs=1e-5)
    assert np.sort(positions).tolist() == [[0, 1, 2, 3]] * 3
    if family != "sparse_model":
        some = np.array([[2, 0]] * len(QUERIES))
        again, scored = rescore(queries, documents, some, ranks, similarity=similarity)
        assert scored == pytest.approx(np.take_along_axis(expected, again, 1), rel=1e-4, abs=1e-5)


def test_windows_have_a_cache_of_their_own_and_without_them_nothing_changes(sentence_model, tmp_path):
    options: dict[str, Any] = {"task": "document", "cache_dir": tmp_path, "show_progress": False}
    plain = embed(sentence_model, LONG, **options)
    made = [Windows.of(sentence_model, 10, stride, "model") for stride in (None, 5)]
    cut = [embed(sentence_model, LONG, windows=windows, **options) for windows in made]
    assert len({plain.path, *(found.path for found in cut)}) == 3
    key = json.loads((plain.path / "manifest.json").read_text())["key"]
    assert "windows" not in key  # so that caches made before there were windows are found
    assert embed(sentence_model, LONG, windows=made[1], **options).windows.tolist() == cut[1].windows.tolist()
    assert plain.windows is None and cut[0].seconds > 0


# Engines

ENGINES = [
    ("memory:", "sentence", "dot"),
    ("memory:", "sentence", "euclidean"),
    ("memory:", "sparse", "dot"),
    ("faiss:{}?index=flat", "sentence", "cosine"),
    ("faiss:{}?index=hnsw", "sentence", "dot"),
    pytest.param(("seismic:{}", "sparse", "dot"), marks=needs_seismic, id="seismic"),
    ("qdrant:{}", "sentence", "dot"),
    ("qdrant:{}", "sparse", "dot"),
    ("server", "sentence", "dot"),
]

Cut = dict[str, list[np.ndarray]]  # id -> the vectors of its windows


def cut_texts(kind: str, counts: dict[str, int], seed: int) -> Cut:
    drawn = iter(texts(kind, sum(counts.values()), seed).values())
    return {name: [next(drawn) for _ in range(count)] for name, count in counts.items()}


def cut_shard(kind: str, similarity: str, *blocks: Cut, checksum: str = "") -> Shard:
    ids = [name for block in blocks for name in block]
    found = [vectors for block in blocks for vectors in block.values()]
    bounds = np.cumsum([0, *map(len, found)])
    vectors = replace(packed(kind, [v for several in found for v in several]), windows=bounds)
    return Shard(ids, vectors, Origin("v", kind, DIM[kind], similarity, "model", window=8, stride=4), checksum)


def truth(similarity: str, queries: dict[str, np.ndarray], documents: Cut, k: int) -> list[list[Hit]]:
    found = []
    for query in queries.values():
        hits = [Hit(name, max(score(similarity, query, v) for v in several)) for name, several in documents.items()]
        found.append(sorted(hits, key=lambda hit: -hit.score)[:k])
    return found


@pytest.fixture(params=ENGINES, ids=lambda case: "-".join(case).replace(":{}", ""))
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    uri, kind, similarity = request.param
    if uri != "server":
        yield lambda **more: open_index(uri.format(tmp_path / "index"), **more), kind, similarity
        return
    with StandIn() as server:
        yield lambda **more: open_index(f"qdrant+http://{server.address}/windows", **more), kind, similarity


def test_an_index_of_windows_finds_each_document_once_at_its_best_window(engine):
    opened, kind, similarity = engine
    counts = {f"d{n}é": 1 + n % 4 for n in range(30)}
    documents = cut_texts(kind, counts, 1)
    queries = texts(kind, 5, 2)
    # A document with many windows near to the first query, all of which are before any other document.
    first = next(iter(queries.values()))
    documents["long"] = [(first * np.float16(1 - n / 1000)).astype(np.float16) for n in range(60)]
    index = opened()
    added = index.add([cut_shard(kind, similarity, documents, checksum="one")])
    assert (added.documents, added.replaced, index.count()) == (31, 0, 31)
    asked = packed(kind, list(queries.values()))
    for k in (1, 10, 31, 40):
        found = index.search(asked, k)
        assert same(found, truth(similarity, queries, documents, k))
        for query, hits in zip(queries.values(), found, strict=True):
            own = [score(similarity, query, documents[hit.id][hit.window]) for hit in hits]
            assert own == pytest.approx([hit.score for hit in hits], rel=1e-5, abs=1e-6)
    assert [hit.id for hit in index.search(asked, 3)[0]][0] == "long"

    # Shorter and longer ones in the place of others, one of them twice, and then some are removed.
    new = cut_texts(kind, {"long": 2, "d3é": 1, "d4é": 6, "new": 3}, 3)
    earlier = cut_texts(kind, {"new": 5, "d3é": 2}, 4)
    added = index.add([cut_shard(kind, similarity, earlier, new)])
    assert (added.documents, added.replaced, index.count()) == (6, 5, 32)
    documents |= new
    assert same(index.search(asked, 32), truth(similarity, queries, documents, 32))
    assert index.delete(["d4é", "new", "d0é", "nobody"]) == 3
    for name in ("d4é", "new", "d0é"):
        del documents[name]
    assert index.count() == len(documents)
    assert same(index.search(asked, 32), truth(similarity, queries, documents, 32))
    if not isinstance(index, type(open_index("memory:"))):
        closed(index)
        index = opened()
        found = index.search(asked, 7)
        assert same(found, truth(similarity, queries, documents, 7))
        assert any(hit.window for hits in found for hit in hits) and index.count() == len(documents)
    added = index.add([cut_shard(kind, similarity, cut_texts(kind, {"d4é": 2}, 5))])
    assert (added.replaced, index.count()) == (0, len(documents) + 1)
    closed(index)


def test_a_search_of_windows_counts_no_points(tmp_path, monkeypatch):
    """Which reads all of them: a search would take longer with every document of the index."""
    index = open_index(f"qdrant:{tmp_path / 'index'}")
    documents, queries = cut_texts("sentence", {f"d{n}": 9 for n in range(20)}, 1), texts("sentence", 2, 2)
    index.add([cut_shard("sentence", "dot", documents)])
    monkeypatch.setattr(index.engine, "count", lambda *_, **__: pytest.fail("counted"))
    found = index.search(packed("sentence", list(queries.values())), 20)
    assert same(found, truth("dot", queries, documents, 20))
    closed(index)


@pytest.mark.parametrize("uri", ["memory:", "qdrant:{}"])
def test_windows_do_not_mix_with_whole_documents_or_with_other_vectors(uri, tmp_path):
    def filled() -> Index:
        index = open_index(uri.format(tmp_path / "index"))
        index.add([cut_shard("sentence", "dot", cut_texts("sentence", {"a": 2}, 1))])
        return index

    index = filled()
    cut = cut_shard("sentence", "dot", cut_texts("sentence", {"a": 2}, 1))
    for origin in (replace(cut.origin, window=0, stride=0), replace(cut.origin, stride=8)):
        vectors = cut.vectors if origin.window else replace(cut.vectors, windows=None)
        with pytest.raises(InputError, match="have window 8, these have 0|have stride 4, these have 8"):
            index.add([Shard(["a", "b"][: vectors.documents], vectors, origin)])
    other = packed("sentence", list(texts("sentence", 1, 3).values()))
    beside = Shard(["a"], other, Origin("other", "sentence", 16, "dot", "model"))
    if uri == "memory:":
        assert index.add([beside]).documents == index.count() == 1
    else:
        with pytest.raises(InputError, match="windows have no vectors of another name"):
            index.add([beside])
    closed(index)


# Commands


@pytest.fixture
def models(tmp_path, sentence_model, multi_vector_model, static_model) -> dict[str, Path]:
    found = {}
    for name, model in {"one": sentence_model, "many": multi_vector_model, "bag": static_model}.items():
        found[name] = tmp_path / name
        model.save_pretrained(str(found[name]), create_model_card=False)
    return found


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_ids_stay_those_of_documents_from_encode_to_search(precision, models, static_model, tmp_path, capsys):
    pages = {f"p{n}": f"show open ports {'and archives of files ' * (3 * n)} number {n}" for n in range(12)}
    pages["p7"] += " penguins live in antarctica"
    source, encoded = write_lines(tmp_path / "corpus.jsonl", pages), tmp_path / "encoded"
    flags = [str(models["bag"]), "--input", str(source), "--output", str(encoded), "--precision", precision]
    flags += ["--window", "6", "--stride", "3", "--shard_size", "5"]
    assert encode(flags)["documents"] == 12
    manifest = json.loads((encoded / "manifest.json").read_text())
    assert (manifest["vectors"]["window"], manifest["vectors"]["stride"]) == (6, 3)
    windows = Windows.of(static_model, 6, 3, "model")
    for shard in EncodedCorpus(encoded):
        cuts = [static_model.encode_document(windows.cut(pages[name])) for name in shard.ids]
        assert np.diff(shard.vectors.windows).tolist() == list(map(len, cuts))
        wrong = np.abs(np.concatenate(cuts) - shard.vectors.values).max()
        assert wrong <= np.abs(np.concatenate(cuts)).max() / (250 if precision == "int8" else 1000)
    assert [name for shard in EncodedCorpus(encoded) for name in shard.ids] == list(pages)
    uri = f"faiss:{tmp_path / 'index'}"
    assert main(["index", str(encoded), "--uri", uri]) == 0
    assert "12 documents written" in capsys.readouterr().out
    assert main(["search", "penguins of antarctica", "--uri", uri, "--model", str(models["bag"]), "--k", "12"]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert shown[0][1] == "p7" and sorted(name for _, name, *_ in shown) == sorted(pages)
    assert shown[0][2] == "window" and "penguins" in windows.cut(pages["p7"])[int(shown[0][3])]
    # A second run goes on only with the same windows.
    assert main(["encode", *flags]) == 0
    for other in (["--stride", "6"], ["--window", "7"]):
        assert main(["encode", *flags, *other]) == 2
        assert "was begun with another vectors" in capsys.readouterr().err


def test_vectors_of_all_windows_are_one_document_of_several_vectors(models, multi_vector_model, tmp_path):
    source = write_lines(tmp_path / "corpus.jsonl", LONG)
    flags = [str(models["many"]), "--input", str(source), "--output", str(tmp_path / "encoded"), "--window", "10"]
    encode([*flags, "--precision", "float32"])
    (shard,) = EncodedCorpus(tmp_path / "encoded")
    windows = Windows.of(multi_vector_model, 10, None, "model")
    offsets = shard.vectors.offsets
    for place, text in enumerate(LONG.values()):
        expected = np.concatenate([multi_vector_model.encode_document([cut])[0] for cut in windows.cut(text)])
        assert shard.vectors.values[slice(*offsets[place : place + 2])] == pytest.approx(expected, abs=1e-5)
    index = open_index("memory:")
    index.add([shard])
    assert index.count() == 4


@pytest.mark.parametrize(
    ("model", "flags", "words"),
    [
        ("one", ["--window", "63"], "reads 62 tokens of a text beside those that it adds.*Use 62 or less"),
        ("many", ["--window", "63"], "Use 62 or less"),
        ("one", ["--window", "8", "--stride", "0"], "--stride 0: is out of its range"),
        ("one", ["--window", "0"], "--window 0: is out of its range"),
        ("one", ["--window", "8", "--stride", "9"], "--stride 9: of windows of 8 tokens.*Use 1 to 8; 4 has"),
        ("one", ["--stride", "9"], "no windows to be that far apart"),
    ],
)
def test_windows_that_cannot_be_are_refused(model, flags, words, models, beir, tmp_path, capsys):
    source = ["--input", str(beir), "--output", str(tmp_path / "out")]
    for command in (
        ["encode", str(models[model]), *source],
        ["evaluate", str(models[model]), "--dataset", str(beir), "--cache_dir", str(tmp_path / "cache")],
        ["evaluate", str(models[model]), "--frontier", "--dataset", str(beir), "--cache_dir", str(tmp_path / "cache")],
    ):
        assert main([*command, *flags]) == 2
        error = capsys.readouterr().err
        assert re.search(words, error, re.DOTALL), error
    assert not (tmp_path / "out").exists()


def test_a_prompt_takes_its_part_of_what_a_model_reads(sentence_model):
    prompts = {"query": "", "document": "file : "}
    model = SentenceTransformer(modules=list(sentence_model), prompts=prompts, device="cpu")
    assert Windows.of(model, 60, None, "model").tokens == 60
    with pytest.raises(InputError, match="Use 60 or less"):
        Windows.of(model, 61, None, "model")


def test_a_model_whose_tokenizer_knows_no_places_is_refused(static_model):
    model = type("Bag", (), {"tokenizer": WhitespaceTokenizer(["a"])})()
    with pytest.raises(InputError, match="no tokenizer that says where"):
        Windows.of(model, 8, None, "bag")
    assert Windows.of(static_model, 10_000, None, "bag").tokens == 10_000  # which reads texts of any length


def test_queries_are_not_cut(models, beir, tmp_path, capsys):
    flags = ["--input", str(beir), "--output", str(tmp_path / "out"), "--task", "query", "--window", "8"]
    assert main(["encode", str(models["one"]), *flags]) == 2
    assert "documents alone are cut" in capsys.readouterr().err


@pytest.fixture
def long_beir(tmp_path: Path) -> Path:
    """Pages that differ in words beyond what the models read of them."""
    folder = tmp_path / "long"
    words = ["penguin", "volcano", "saxophone", "glacier", "tractor", "violin"]
    pages = {f"d{n}": f"{'port list file ' * 30} {word}" for n, word in enumerate(words)}
    pages["d9"] = "cat"
    write_lines(folder / "corpus.jsonl", pages)
    write_lines(folder / "queries.jsonl", {f"q{n}": word for n, word in enumerate(words)})
    for split in ("train", "test"):
        lines = ["query-id\tcorpus-id\tscore", *(f"q{n}\td{n}\t1" for n in range(len(words)))]
        (folder / "qrels").mkdir(exist_ok=True)
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def rows_of(results: dict[str, Any], metric: str = "nDCG@10") -> dict[str, dict[str, Any]]:
    return {row["system"]: row for row in results["rows"] if row["metric"] == metric}


def test_evaluate_finds_what_stands_beyond_the_first_window(models, static_model, long_beir, tmp_path):
    flags = [str(models["bag"]), str(models["one"]), "--dataset", str(long_beir), "--baselines", "none"]
    flags += ["--dtype", "float32", "--cache_dir", str(tmp_path / "cache")]
    whole, cut = rows_of(evaluate(flags)), rows_of(results := evaluate([*flags, "--window", "30", "--stride", "15"]))
    windows = Windows.of(static_model, 30, 15, "model")
    corpus = [json.loads(line) for line in (long_beir / "corpus.jsonl").read_text().splitlines()]
    cuts = {page["_id"]: windows.cut(page["text"].strip()) for page in corpus}
    mean = np.mean([len(several) for several in cuts.values()])
    assert cut["bag"]["windows_per_document"] == pytest.approx(mean) and mean > 3
    assert cut["bag"]["bytes_per_document"] == pytest.approx(mean * 384 * 4)
    assert whole["bag"]["bytes_per_document"] == 384 * 4 and "windows_per_document" not in whole["bag"]
    expected = []
    for number, word in enumerate(["penguin", "volcano", "saxophone", "glacier", "tractor", "violin"]):
        query = static_model.encode_query(word)
        best = {name: max(score("cosine", query, v) for v in static_model.encode(c)) for name, c in cuts.items()}
        ranked = sorted(best, key=lambda name: (np.float32(best[name]), name), reverse=True)
        expected.append(brute_force({f"d{number}": 1}, ranked)["nDCG@10"])
    assert cut["bag"]["value"] == pytest.approx(np.mean(expected))
    assert "windows of 30 tokens, a new one every 15" in results["notes"][0]


def test_images_are_not_cut(tmp_path, backbone, capsys):
    from PIL import Image
    from room_examples import EXAMPLES

    from polyrep.hub import save

    model = EXAMPLES["polyrep_dual_encoder"](backbone, tmp_path / "scratch").models["retriever"]
    folder = save(model, tmp_path / "model")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    flags = ["--input", str(tmp_path / "images"), "--output", str(tmp_path / "out"), "--window", "8"]
    assert main(["encode", str(folder), *flags]) == 2
    assert "images have no tokens" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
