"""Reading data sets: what comes out of good files, and what is said about bad ones."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import DOCUMENTS, QRELS, QUERIES, write_beir
from PIL import Image
from world import pages

from polyrep import InputError
from polyrep.data import RetrievalDataset, inverse_cloze, load_corpus, load_retrieval_dataset, named, records
from polyrep.data.noise import cut_short
from polyrep.data.stream import Fields, open_source
from polyrep.data.words import count_words, sentences_of, words_of

HEADER = "query-id\tcorpus-id\tscore\n"


def jsonl(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def zip_file(path: Path) -> Path:
    zipped = write(path.with_name(f"{path.name}.gz"), gzip.compress(path.read_bytes()))
    path.unlink()
    return zipped


def many_queries(folder: Path, count: int) -> Path:
    """``count`` queries for the document ``d``, all in the train split."""
    write(folder / "corpus.jsonl", jsonl([{"_id": "d", "text": "a document"}]))
    write(folder / "queries.jsonl", jsonl({"_id": f"q{i}", "text": f"query {i}"} for i in range(count)))
    write(folder / "qrels" / "train.tsv", HEADER + "".join(f"q{i}\td\t1\n" for i in range(count)))
    return folder


def said_about(path: Path, split: str = "test", **options) -> str:
    with pytest.raises(InputError) as refusal:
        load_retrieval_dataset(path, split, **options)
    return str(refusal.value)


# Good files.


def test_a_text_is_title_space_text_without_outer_space(beir):
    rows = [
        {"_id": "both", "title": "tar", "text": "archive files "},
        {"_id": "no-title", "text": " a text"},
        {"_id": "empty-title", "title": "", "text": "a text"},
        {"_id": "null-title", "title": None, "text": "a text"},
        {"_id": "title-only", "title": "tar", "text": ""},
    ]
    write(beir / "corpus.jsonl", jsonl(rows))
    write(beir / "qrels" / "test.tsv", HEADER + "q1\tboth\t1\n")
    assert load_retrieval_dataset(beir).corpus == {
        "both": "tar archive files",
        "no-title": "a text",
        "empty-title": "a text",
        "null-title": "a text",
        "title-only": "tar",
    }


def test_a_folder_gives_corpus_queries_and_judgments_in_file_order(beir):
    loaded = load_retrieval_dataset(str(beir))
    assert (loaded.name, loaded.split) == ("tiny", "test")
    assert list(loaded.corpus.items()) == list(DOCUMENTS.items())
    assert list(loaded.queries.items()) == list(QUERIES.items())
    assert loaded.qrels == QRELS


def test_zipped_and_plain_files_read_the_same(beir):
    plain = load_retrieval_dataset(beir)
    zip_file(beir / "corpus.jsonl")
    zip_file(beir / "queries.jsonl")
    assert load_retrieval_dataset(beir) == plain


def test_windows_line_ends_and_blank_lines_change_nothing(beir):
    plain = load_retrieval_dataset(beir)
    for path in (beir / "corpus.jsonl", beir / "queries.jsonl", beir / "qrels" / "test.tsv"):
        write(path, path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert load_retrieval_dataset(beir) == plain


def test_only_judged_queries_are_kept(beir):
    write(beir / "qrels" / "test.tsv", HEADER + "q3\td4\t1\nq1\td2\t0\n")
    loaded = load_retrieval_dataset(beir)
    assert list(loaded.queries) == ["q1", "q3"]  # the order of queries.jsonl
    assert loaded.qrels == {"q1": {"d2": 0}, "q3": {"d4": 1}}


def test_pairs_are_the_positive_judgments(beir):
    with (beir / "qrels" / "test.tsv").open("a") as lines:
        lines.write("q1\td5\t0\nq2\td5\t-1\n")
    positive = [(q, d) for q, judged in QRELS.items() for d in judged]
    expected = [{"query": QUERIES[q], "positive": DOCUMENTS[d]} for q, d in positive]
    assert load_retrieval_dataset(beir).pairs().to_list() == expected


def test_the_same_judgment_twice_counts_once(beir):
    with (beir / "qrels" / "test.tsv").open("a") as lines:
        lines.write("q1\td2\t1\n")
    assert load_retrieval_dataset(beir).qrels == QRELS


def test_the_folder_that_one_stands_in_has_a_name(beir, monkeypatch):
    monkeypatch.chdir(beir)
    assert load_retrieval_dataset(".").name == "tiny"


# The dev split that a set without one gets.


def test_without_dev_a_tenth_of_train_is_dev(tmp_path):
    folder = many_queries(tmp_path / "many", 1000)
    train, dev = (load_retrieval_dataset(folder, split) for split in ("train", "dev"))
    assert not train.qrels.keys() & dev.qrels.keys()
    assert train.qrels | dev.qrels == {f"q{i}": {"d": 1} for i in range(1000)}
    assert train.queries.keys() == train.qrels.keys() and dev.queries.keys() == dev.qrels.keys()
    assert 60 < len(dev.queries) < 140  # a binomial of mean 100 and standard deviation 9.5


def test_which_queries_are_dev_depends_on_nothing_but_their_ids(tmp_path):
    few, many = many_queries(tmp_path / "few", 200), many_queries(tmp_path / "many", 1000)
    lines = (many / "qrels" / "train.tsv").read_text().splitlines(keepends=True)
    write(many / "qrels" / "train.tsv", lines[0] + "".join(reversed(lines[1:])))
    dev_of_few, dev_of_many = (set(load_retrieval_dataset(folder, "dev").queries) for folder in (few, many))
    assert dev_of_few == dev_of_many & {f"q{i}" for i in range(200)} != set()


def test_an_existing_dev_split_is_used_as_it_is(tmp_path):
    folder = many_queries(tmp_path / "many", 100)
    in_tenth = {f"q{i}" for i in range(100) if int(hashlib.md5(f"q{i}".encode()).hexdigest(), 16) % 10 == 0}
    outside = next(f"q{i}" for i in range(100) if f"q{i}" not in in_tenth)
    write(folder / "qrels" / "dev.tsv", HEADER + f"{outside}\td\t1\n")
    assert set(load_retrieval_dataset(folder, "dev").queries) == {outside}
    assert set(load_retrieval_dataset(folder, "train").queries) == {f"q{i}" for i in range(100)} > in_tenth != set()


# The two arrangements of the Hub, from a local clone.


def write_hub(folder: Path, configs: dict[str, dict[str, str]]) -> Path:
    """A folder whose README.md says, as on the Hub, which file is which split of which configuration."""
    lines = ["---", "configs:"]
    for name, splits in configs.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        lines += [line for split, path in splits.items() for line in (f"  - split: {split}", f"    path: {path}")]
    write(folder / "README.md", "\n".join([*lines, "---", "# A data set", ""]))
    return folder


TEXT_CONFIGS = {"corpus": {"corpus": "texts/corpus.jsonl"}, "queries": {"queries": "texts/queries.jsonl"}}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small data set as one repository with configurations corpus, queries and default."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    default = {"test": "judged/test.jsonl", "train": "judged/train.jsonl"}
    folder = write_hub(tmp_path / "hub", TEXT_CONFIGS | {"default": default})
    write(folder / "texts" / "corpus.jsonl", jsonl({"_id": k, "title": "T", "text": v} for k, v in DOCUMENTS.items()))
    write(folder / "texts" / "queries.jsonl", jsonl({"_id": k, "text": v} for k, v in QUERIES.items()))
    judged = [{"query-id": q, "corpus-id": d, "score": s} for q, judged in QRELS.items() for d, s in judged.items()]
    write(folder / "judged" / "test.jsonl", jsonl(judged))
    write(folder / "judged" / "train.jsonl", jsonl(judged[:1]))
    return folder


def test_a_hub_set_with_judgments_in_the_same_repository(hub):
    loaded = load_retrieval_dataset(hub)
    assert (loaded.name, loaded.split) == ("hub", "test")
    assert list(loaded.corpus.items()) == [(key, f"T {text}") for key, text in DOCUMENTS.items()]
    assert list(loaded.queries.items()) == list(QUERIES.items())
    assert loaded.qrels == QRELS
    assert "['test', 'train']" in said_about(hub, "validation")


def test_a_hub_set_with_judgments_in_a_repository_of_their_own_and_numbers_for_ids(hub):
    write_hub(hub, TEXT_CONFIGS)
    write(hub / "texts" / "corpus.jsonl", jsonl({"_id": k[1:], "text": v} for k, v in DOCUMENTS.items()))
    write(hub / "texts" / "queries.jsonl", jsonl({"_id": k[1:], "text": v} for k, v in QUERIES.items()))
    rows = "".join(f"{q[1:]}\t{d[1:]}\t{s}\n" for q, judged in QRELS.items() for d, s in judged.items())
    write(hub.with_name("hub-qrels") / "test.tsv", HEADER + rows)
    loaded = load_retrieval_dataset(hub)
    assert loaded.qrels == {q[1:]: {d[1:]: s for d, s in judged.items()} for q, judged in QRELS.items()}
    assert list(loaded.corpus.values()) == list(DOCUMENTS.values())


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"query-id": "q1", "corpus-id": "d2", "score": 0.5}, "score 0.5 is not an integer"),
        ({"query-id": "q1", "corpus-id": "d2", "score": None}, "score None is not an integer"),
        ({"query-id": "q9", "corpus-id": "d2", "score": 1}, "query 'q9'"),
        ({"query-id": "q1", "corpus-id": None, "score": 1}, "document 'None'"),
        ({"query": "q1", "corpus-id": "d2", "score": 1}, "no ['query-id']"),
    ],
)
def test_a_bad_judgment_on_the_hub_is_refused_by_its_row(hub, row, expected):
    write(hub / "judged" / "train.jsonl", jsonl([row]))
    write_hub(hub, TEXT_CONFIGS | {"default": {"test": "judged/train.jsonl"}})
    message = said_about(hub)
    assert f"{hub} test row 1" in message and expected in message


def test_a_malformed_file_on_the_hub_is_refused(hub):
    write(hub / "texts" / "corpus.jsonl", '{"_id": "d1", "text"\n')
    message = said_about(hub)
    assert str(hub) in message and "configurations corpus, queries and default" in message


def test_a_folder_that_is_only_described_is_refused(hub):
    write(hub / "README.md", "No front matter here.\n")
    message = said_about(hub)
    assert str(hub) in message and "configurations corpus, queries and default" in message


# The corpus alone, and queries made of it.


def test_a_corpus_needs_no_queries_and_no_judgments(beir):
    whole = load_retrieval_dataset(beir)
    (beir / "queries.jsonl").unlink()
    (beir / "qrels" / "test.tsv").unlink()
    zip_file(beir / "corpus.jsonl")
    (beir / "vectors.parquet").write_bytes(b"of somebody else")
    loaded = load_corpus(beir)
    assert list(loaded.corpus.items()) == list(whole.corpus.items())
    assert (loaded.name, loaded.queries, loaded.qrels) == ("tiny", {}, {})


@pytest.mark.parametrize("path", ["nowhere", "no-such-org/no-such-set", "folder"])
def test_a_corpus_that_cannot_be_had_is_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=path):
        load_corpus(path)


def test_a_corpus_of_the_hub_is_read_from_a_local_clone_too(hub):
    assert load_corpus(hub).corpus == load_retrieval_dataset(hub).corpus


def corpus_of(**texts: str) -> RetrievalDataset:
    return RetrievalDataset("made", "corpus", texts, {}, {})


SENTENCES = [f"Sentence number {i} of the text is here." for i in range(9)]


def test_a_cloze_query_is_a_sentence_that_its_document_no_longer_has():
    made = inverse_cloze(corpus_of(long=" ".join(SENTENCES), other="One sentence of five words. Two\nThree?"))
    assert (made.name, made.split) == ("made-cloze", "cloze")
    assert len(made.queries) == 3 + 1 and made.qrels.keys() == made.queries.keys()
    for query, text in made.queries.items():
        (document,) = made.qrels[query]
        assert made.qrels[query] == {document: 1} and query.startswith(f"{document}#")
        assert text not in made.corpus[document]
    taken = [SENTENCES.index(text) for query, text in made.queries.items() if query.startswith("long")]
    assert made.corpus["long"] == " ".join(s for i, s in enumerate(SENTENCES) if i not in taken)
    assert made.corpus["other"] == "Two Three?" and made.queries["other#0"] == "One sentence of five words."


@pytest.mark.parametrize("sentences", [1, 2, 5, 100])
def test_no_more_than_a_third_of_a_document_is_taken(sentences):
    made = inverse_cloze(corpus_of(**{f"d{n}": " ".join(SENTENCES[:n]) for n in range(1, 10)}), sentences)
    for n in range(1, 10):
        count = sum(query.startswith(f"d{n}#") for query in made.queries)
        # Of two sentences, one; of one, none, for nothing would be left.
        assert count == (0 if n == 1 else min(sentences, max(1, n // 3)))
        assert made.corpus[f"d{n}"]


def test_short_sentences_are_no_queries_and_their_documents_stay_as_they_are():
    made = inverse_cloze(corpus_of(short="Three words only. Again three words.", long="\n".join(SENTENCES[:2])))
    assert {query.partition("#")[0] for query in made.queries} == {"long"}
    assert made.corpus["short"] == "Three words only. Again three words."


def test_cloze_queries_follow_from_the_seed_and_the_document_alone():
    texts = {f"d{n}": " ".join(SENTENCES) for n in range(20)}
    first, again = inverse_cloze(corpus_of(**texts)), inverse_cloze(corpus_of(**texts))
    assert first == again and first.queries != inverse_cloze(corpus_of(**texts), seed=1).queries
    few = inverse_cloze(corpus_of(d7=texts["d7"]))
    assert few.queries == {query: text for query, text in first.queries.items() if query.startswith("d7#")}
    assert len({query.partition("#")[2] for query in first.queries}) > 3, "not the same sentences of every document"


def test_a_corpus_that_gives_no_cloze_query_is_refused():
    with pytest.raises(InputError, match="made: no document has two sentences.*Use judged queries"):
        inverse_cloze(corpus_of(a="One sentence of five words.", b="Too short. Also short."))
    with pytest.raises(InputError, match="--cloze_sentences 0: at least 1"):
        inverse_cloze(corpus_of(a=" ".join(SENTENCES)), sentences=0)
    with pytest.raises(InputError, match="'page' is an image, which has no sentences"):
        inverse_cloze(RetrievalDataset("made", "corpus", {"page": Image.new("RGB", (2, 2))}, {}, {}))


# Tables of pairs.


# Scripts without spaces.


def test_words_of_a_script_without_spaces_are_its_characters_and_their_pairs():
    assert words_of("GPUで学習 and Réseau_1 é") == ["gpu", "で", "学", "習", "で学", "学習", "and", "réseau_1"]
    assert words_of("パン。") == ["パ", "ン", "パン"]
    assert "ที" in words_of("ที่นี่"), "vowels and tones are marks, and belong to their word"


def test_marks_belong_to_their_word_in_scripts_with_spaces_too():
    assert words_of("दिल्ली में माँ, 1") == ["दिल्ली", "में", "माँ"]
    assert words_of("cafe\u0301 u\u0308ber") == words_of("caf\u00e9 \u00fcber") == ["caf\u00e9", "\u00fcber"]
    assert words_of("וְאָהַבְתָּ مُحَمَّد") == ["וְאָהַבְתָּ", "مُحَمَّد"]


def test_sentences_end_without_a_space_where_a_script_has_none():
    assert sentences_of("猫は好きです。「庭で寝ます。」本当？はい") == [
        "猫は好きです。",
        "「庭で寝ます。」",
        "本当？",
        "はい",
    ]
    assert sentences_of("真的！？是的。。。好") == ["真的！？", "是的。。。", "好"]
    assert sentences_of("แมวนอนหลับ หมาเห่า") == ["แมวนอนหลับ", "หมาเห่า"]
    assert sentences_of("यह एक है। वह दो है।") == ["यह एक है।", "वह दो है।"]
    assert sentences_of("One. Two: three") == ["One.", "Two:", "three"]
    assert [count_words(text) for text in ("one two, three", "庭で寝ます。", "はい。", "แมวนอนหลับ")] == [3, 4, 2, 3]


def test_cloze_takes_sentences_of_chinese_pages():
    known = {page.id: page.text for page in pages("chinese") if not set("！？」”") & set(page.text)}
    made = inverse_cloze(corpus_of(**known))
    assert len(known) > 20 and set(made.corpus) == set(known)
    for identifier, text in known.items():
        sentences = [f"{part}。" for part in text.split("。") if part]
        taken = [made.queries[query] for query, judged in made.qrels.items() if identifier in judged]
        assert set(taken) <= set(sentences) and len(taken) == min(3, max(1, len(sentences) // 3)), text
        assert made.corpus[identifier].replace(" ", "") == "".join(s for s in sentences if s not in taken).replace(
            " ", ""
        )


def test_a_cloze_query_is_found_in_a_script_without_spaces():
    made = inverse_cloze(corpus_of(a="猫は好きです。庭で寝ます。", b="犬"))
    ((query, text),) = made.queries.items()
    assert made.qrels[query] == {"a": 1}
    assert {text, made.corpus["a"]} == {"猫は好きです。", "庭で寝ます。"}


def test_a_text_without_spaces_is_cut_at_characters():
    text = "猫は庭で寝ます"
    found = {cut_short(text, random.Random(seed)) for seed in range(20)}
    assert len(found) > 1 and all(text.startswith(part) and 2 <= len(part) <= 4 for part in found)


def write_pairs(folder: Path, splits: dict[str, dict[str, list]], features: datasets.Features | None = None) -> Path:
    folder.mkdir(parents=True)
    for split, columns in splits.items():
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(folder / f"{split}.parquet"))
    return folder


@pytest.fixture
def local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("column", ["document", "positive", "answer", "text"])
def test_a_table_of_pairs_is_a_data_set_and_equal_documents_are_one(tmp_path, local_cache, column):
    train = {"query": ["a", "b", " c "], column: ["one", "two ", "one"]}
    test = {"query": ["d", "e"], column: ["three", "two"]}
    folder = write_pairs(tmp_path / "pairs", {"train": train, "test": test})
    loaded = load_retrieval_dataset(folder)
    assert (loaded.name, loaded.split) == ("pairs", "test")
    assert sorted(loaded.corpus.values()) == ["one", "three", "two"], "the documents of all splits"
    asked = {text: [loaded.corpus[d] for d in loaded.qrels[q]] for q, text in loaded.queries.items()}
    assert asked == {"d": ["three"], "e": ["two"]}
    ids = {f"train-{i}" for i in range(3)}
    tenth = {q for q in ids if int(hashlib.md5(q.encode()).hexdigest(), 16) % 10 == 0}
    loaded = load_retrieval_dataset(folder, "train")
    assert set(loaded.queries) == ids - tenth != set()
    expected = {"a": "one", "b": "two", "c": "one"}
    for query, text in loaded.queries.items():
        ((document, score),) = loaded.qrels[query].items()
        assert loaded.corpus[document] == expected[text] and score == 1
    assert sorted(load_corpus(folder).corpus.values()) == ["one", "three", "two"]
    with pytest.raises(InputError, match=r"no split 'validation'; it has \['test', 'train'\]"):
        load_retrieval_dataset(folder, "validation")


@pytest.mark.parametrize(("query", "document"), [("a", ""), ("a", "  "), ("a", None), ("", "x"), (None, "x")])
def test_a_pair_without_a_text_is_refused_by_its_row(tmp_path, local_cache, query, document):
    folder = write_pairs(tmp_path / "pairs", {"test": {"query": ["q", query], "document": ["d", document]}})
    with pytest.raises(InputError, match="pairs test row 1: an empty query or document"):
        load_retrieval_dataset(folder)


def test_equal_queries_of_a_table_are_one_with_several_relevant_documents(tmp_path, local_cache):
    columns = {
        "query": ["how", "why", " how", "how"],
        "document": ["one", "two", "three", "one "],
        "negative_1": ["a", "b", "c", "d"],
    }
    loaded = load_retrieval_dataset(write_pairs(tmp_path / "pairs", {"test": columns}))
    answers = {text: {loaded.corpus[d] for d in loaded.qrels[q]} for q, text in loaded.queries.items()}
    assert answers == {"how": {"one", "three"}, "why": {"two"}} and len(loaded.queries) == 2
    rows = {tuple(row.values()) for row in loaded.pairs()}  # each row's own negative
    assert rows == {("how", "one", "a"), ("how", "one", "d"), ("how", "three", "c"), ("why", "two", "b")}


@pytest.mark.parametrize(
    ("query", "document"), [([1, 2], ["x", "y"]), (["a", "b"], [3, 4]), (["a", "\u200b"], ["x", "y"])]
)
def test_a_column_that_is_no_text_is_refused_by_its_row(tmp_path, local_cache, query, document):
    folder = write_pairs(tmp_path / "pairs", {"test": {"query": query, "document": document}})
    with pytest.raises(InputError, match="pairs test row [01]: "):
        load_retrieval_dataset(folder)


def test_a_damaged_parquet_file_is_named(tmp_path, local_cache):
    folder = write_pairs(tmp_path / "pairs", {"test": {"query": ["a"], "document": ["x"]}})
    (folder / "train.parquet").write_bytes((folder / "test.parquet").read_bytes()[:50])
    with pytest.raises(InputError, match="train.parquet: cannot be read as a table"):
        load_retrieval_dataset(folder)
    (folder / "train.parquet").unlink()
    (folder / "train.parquet").symlink_to(folder / "nowhere")
    with pytest.raises(InputError, match="train.parquet: a link to what is not there"):
        load_retrieval_dataset(folder)


def test_pairs_of_queries_and_pages_stay_undecoded_until_they_are_asked_for(tmp_path, local_cache, monkeypatch):
    pages = [Image.fromarray(np.full((3, 4, 3), value, np.uint8)) for value in (10, 200, 90)]
    columns = {"query": ["a", "b", "c", "d"], "image": [pages[0], pages[1], pages[0], pages[2]]}
    features = datasets.Features({"query": datasets.Value("string"), "image": datasets.Image()})
    folder = write_pairs(tmp_path / "pages", {"test": columns}, features)
    opened: list[object] = []
    plain = Image.open
    monkeypatch.setattr(
        Image, "open", lambda file, *rest, **more: (opened.append(file), plain(file, *rest, **more))[1]
    )
    loaded = load_retrieval_dataset(folder)
    assert len(loaded.corpus) == 3 and list(loaded.queries.values()) == ["a", "b", "c", "d"]
    assert not opened, "reading the table decodes nothing"
    found = [np.asarray(loaded.corpus[d]) for judged in loaded.qrels.values() for d in judged]
    assert len(opened) == 4
    for image, page in zip(found, columns["image"], strict=True):
        np.testing.assert_array_equal(image, np.asarray(page))
    assert loaded.qrels["test-0"] == loaded.qrels["test-2"]
    with pytest.raises(InputError, match="is an image"):
        inverse_cloze(load_corpus(folder))


# Bad files: each refusal names the file, the line and what was expected.

BAD_LINES = [
    ("corpus.jsonl", '{"_id": "d9", "text": "x"', ["not a JSON object", "column 26", '{"_id": "d1"']),
    ("corpus.jsonl", '["d9", "x"]', ["expected a JSON object", '"_id"']),
    ("corpus.jsonl", '{"text": "x"}', ["no '_id'", 'strings "_id" and "text"']),
    ("corpus.jsonl", '{"_id": "d9"}', ["no 'text'", 'strings "_id" and "text"']),
    ("corpus.jsonl", '{"_id": 9.5, "text": "x"}', ["_id=9.5", 'strings "_id" and "text"']),
    ("corpus.jsonl", '{"_id": true, "text": "x"}', ["_id=True", 'strings "_id" and "text"']),
    ("corpus.jsonl", '{"_id": "", "text": "x"}', ["an empty _id"]),
    ("corpus.jsonl", '{"_id": "d9", "title": ["a", "b"], "text": "x"}', ["title=['a', 'b']", '"title"']),
    ("corpus.jsonl", '{"_id": "d9", "title": 0, "text": "x"}', ["title=0", '"title"']),
    ("corpus.jsonl", '{"_id": "d9", "text": "\\u200b\\ufeff \\u2060"}', ["'d9' has an empty text", "--keep_empty"]),
    (
        "corpus.jsonl",
        '{"_id": "d9", "text": "half \\ud83d"}',
        ["text holds half of a surrogate pair", "'\\ud83d' at 5"],
    ),
    ("corpus.jsonl", '{"_id": "d\\udc00", "text": "x"}', ["_id holds half of a surrogate pair"]),
    ("corpus.jsonl", '{"_id": "d9", "title": "\\ud83d", "text": "x"}', ["title holds half of a surrogate pair"]),
    ("corpus.jsonl", '{"_id": "d9", "x": ' + "[" * 100_000, ["nested too deep"]),
    ("queries.jsonl", '{"_id": "q9", "text": "half \\ud83d"}', ["text holds half of a surrogate pair"]),
    ("corpus.jsonl", '{"_id": "d9", "text": null}', ["text=None", 'strings "_id" and "text"']),
    ("corpus.jsonl", '{"_id": "d1", "text": "x"}', ["id 'd1' occurs twice", "Rename"]),
    ("corpus.jsonl", '{"_id": "d9", "title": " ", "text": "\\n"}', ["'d9' has an empty text", "--keep_empty"]),
    ("queries.jsonl", "{]", ["not a JSON object", "column 2", '{"_id": "d1"']),
    ("queries.jsonl", '{"_id": "q9", "query": "x"}', ["no 'text'", 'strings "_id" and "text"']),
    ("queries.jsonl", '{"_id": "q1", "text": "x"}', ["id 'q1' occurs twice", "Rename"]),
    ("queries.jsonl", '{"_id": "q9", "text": " "}', ["'q9' has an empty text", "--keep_empty"]),
    ("qrels/test.tsv", "q1\td2", ["2 tab-separated fields", "expected 3: query id, document id, score"]),
    ("qrels/test.tsv", "q1 d2 1", ["1 tab-separated fields", "expected 3: query id, document id, score"]),
    ("qrels/test.tsv", "q1\t0\td2\t1", ["4 tab-separated fields", "expected 3: query id, document id, score"]),
    ("qrels/test.tsv", "q1\td1\t1.5", ["score '1.5' is not an integer"]),
    ("qrels/test.tsv", "q1\td1\t" + "9" * 12, ["is no grade of relevance"]),
    ("qrels/test.tsv", "q1\td1\t" + "9" * 5000, ["is not an integer"]),
    ("qrels/test.tsv", "q1\td1\tyes", ["score 'yes' is not an integer"]),
    ("qrels/test.tsv", "q9\td1\t1", ["query 'q9'", "not in the data set", "Add the query or remove the line"]),
    ("qrels/test.tsv", "q1\td9\t1", ["document 'd9'", "not in the data set", "Add the document or remove the line"]),
    ("qrels/test.tsv", "q1\td2\t2", ["('q1', 'd2') twice with different scores", "Keep one"]),
]


@pytest.mark.parametrize(("file", "line", "expected"), BAD_LINES)
def test_a_bad_line_is_refused_by_its_number(beir, file, line, expected):
    lines = (beir / file).read_text().splitlines()
    write(beir / file, "\n".join([*lines[:3], line, *lines[3:]]) + "\n")
    if "twice" in expected[0]:  # the repetition is what is refused, so it has to come last
        write(beir / file, "\n".join([*lines, line]) + "\n")
    number = (beir / file).read_text().splitlines().index(line) + 1
    message = said_about(beir)
    for part in [f"{beir / file}:{number}:", *expected]:
        assert part in message


def test_a_bad_line_in_a_zipped_file_is_refused_by_its_number(beir):
    write(beir / "corpus.jsonl", jsonl([{"_id": "d1", "text": "x"}, {"_id": "d2"}]))
    zipped = zip_file(beir / "corpus.jsonl")
    assert f"{zipped}:2: no 'text'" in said_about(beir)


@pytest.mark.parametrize("score", ["1", "-1", "1 ", "0.5"])
def test_a_judgment_in_place_of_the_header_is_refused(beir, score):
    path = write(beir / "qrels" / "test.tsv", f"q1\td2\t{score}\nq2\td1\t1\n")
    message = said_about(beir)
    assert f"{path}:1:" in message and "a header is expected" in message
    assert "query-id<TAB>corpus-id<TAB>score" in message


def test_a_byte_that_is_no_text_is_refused(beir):
    path = write(beir / "qrels" / "test.tsv", HEADER.encode() + b"q1\td2\xff\t1\n")
    assert f"{path}:2: not UTF-8 (byte 0xff at column 6)" in said_about(beir)
    path = write(beir / "corpus.jsonl", '{"_id": "d1", "text": "x"}\n{"_id": "d2", "text": "é"}\n'.encode("latin-1"))
    assert f"{path}:2: not UTF-8 (byte 0xe9 at column 24)" in said_about(beir)


RECORDS = {  # a record, and what it is: the text, or a part of the refusal
    '{"_id": 7, "text": "x"}': ("7", "x"),
    '{"docid": "d", "title": null, "text": "x"}': ("d", "x"),
    '{"_id": "d", "title": "a", "text": "\\u200b"}': ("d", "a \u200b"),
    '{"_id": "d", "title": 5, "text": "x"}': "title=5",
    '{"_id": "d", "title": false, "text": "x"}': "title=False",
    '{"_id": "d", "title": [], "text": "x"}': "title=[]",
    '{"_id": "d", "text": "\\u2060\\u200d"}': "an empty text",
    '{"_id": "\\ufeff", "text": "x"}': "an empty _id",
    '{"_id": "d", "text": "\\udfff"}': "surrogate",
    '{"_id": 1e3, "text": "x"}': "_id=1000.0",
    '{"_id": "d", "text": ' + "[" * 100_000: "nested too deep",
}


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_record_is_the_same_wherever_it_is_read(tmp_path, record, mark):
    path = write(tmp_path / "set" / "corpus.jsonl", mark + record)
    (span,) = open_source(str(path), Fields()).spans(5)
    documents, errors = span.read()
    expected = RECORDS[record]
    if isinstance(expected, tuple):
        assert dict(documents) == dict([expected]) and not errors
        assert load_corpus(path.parent).corpus == dict([expected])
    else:
        assert not documents and expected in errors[0]["error"] and errors[0]["place"] == f"{path}:1"
        with pytest.raises(InputError) as refusal:
            load_corpus(path.parent)
        assert expected in str(refusal.value) and f"{path}:1: " in str(refusal.value)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_line_that_is_a_bomb_is_refused_unread(beir, monkeypatch, zipped):
    monkeypatch.setattr(records, "MOST_BYTES", 1000)
    rows = [{"_id": "d1", "text": "x"}, {"_id": "d2", "text": "x" * 2000}]
    path = write(beir / "corpus.jsonl", jsonl(rows))
    path = zip_file(path) if zipped else path
    assert f"{path}:2: longer than 1,000 bytes" in said_about(beir)
    with pytest.raises(InputError, match=":2: longer than 1,000 bytes"):
        list(open_source(str(path), Fields()).spans(5))


def test_what_has_the_name_of_a_file_and_is_none_is_refused(beir, tmp_path):
    path = beir / "qrels" / "test.tsv"
    for make in (
        path.mkdir,
        lambda: path.symlink_to(path),
        lambda: path.symlink_to("nowhere"),
        lambda: os.mkfifo(path),
    ):
        path.rmdir() if path.is_dir() else path.unlink()
        make()
        assert f"{path}: " in (said := said_about(beir)) and ("called like one" in said or "a link" in said)
    (tmp_path / "images" / "a.png").mkdir(parents=True)
    with pytest.raises(InputError, match="a.png: no file, but is called like one"):
        open_source(str(tmp_path / "images"), Fields())


# Queries that are documents.


def same_ids(queries: dict[str, str], qrels: dict[str, dict[str, int]], **options) -> list[int]:
    corpus = {"x": "other", "a": "Title  Dogs bark.", "b": "b text", "c": "c text"}
    return RetrievalDataset("any", "test", corpus, queries, qrels, **options).own.tolist()


def test_a_document_with_the_id_and_the_text_of_a_query_is_its_own():
    asked, judged = {"a": "dogs BARK.", "q": "b text", "b": "b text"}, {"a": {"c": 1}, "q": {"c": 1}, "b": {"c": 1}}
    assert same_ids(asked, judged) == [1, -1, 2]
    assert same_ids(asked, judged, same_ids=False) == [-1, -1, -1]
    judged["a"]["a"] = 0
    judged["b"]["b"] = 1  # then the document is one to be found
    assert same_ids(asked, judged) == [1, -1, -1]


@pytest.mark.parametrize(
    "query",
    ["Dogs bark", "Title: dogs bark, loudly", "DOGS BARK!?", "\ufb01ne dogs bark in the Title", "dogs bark\u2014"],
    ids=["shorter", "longer", "marks", "ligature", "dash"],
)
def test_a_query_is_its_document_however_it_is_written(query):
    assert same_ids({"a": query}, {"a": {"c": 1}}) == [1]


def test_texts_without_words_are_one_if_they_are_equal():
    for query, own in (("\U0001f600 \U0001f601", [0]), ("\U0001f600", [-1])):
        corpus = {"a": "\U0001f600 \U0001f601", "c": "c text"}
        assert RetrievalDataset("any", "test", corpus, {"a": query}, {"a": {"c": 1}}).own.tolist() == own


def test_ids_that_meet_by_chance_mean_nothing():
    asked, judged = {"a": "cats", "b": "birds", "c": "c text"}, {q: {"x": 1} for q in "abc"}
    assert same_ids(asked, judged) == [-1, -1, -1], "one of three"
    assert same_ids(asked, judged, same_ids=True) == [1, 2, 3]
    assert same_ids({"a": ""}, {"a": {"x": 1}}) == [-1]


def test_a_named_set_says_what_mteb_says(monkeypatch):
    mteb = pytest.importorskip("mteb")
    tasks = {t.metadata.dataset["path"]: t for t in map(mteb.get_task, ("ArguAna", "SciFact", "NFCorpus", "FiQA2018"))}
    for path, task in tasks.items():
        assert named.same_ids(path) is task.ignore_identical_ids
    assert named.same_ids("someone/else") is None


def test_empty_texts_are_accepted_on_request(beir):
    for stem, row in (("corpus", {"_id": "d9", "text": ""}), ("queries", {"_id": "q9", "text": " "})):
        with (beir / f"{stem}.jsonl").open("a") as lines:
            lines.write(json.dumps(row) + "\n")
    with (beir / "qrels" / "test.tsv").open("a") as lines:
        lines.write("q9\td9\t1\n")
    loaded = load_retrieval_dataset(beir, keep_empty=True)
    assert (loaded.corpus["d9"], loaded.queries["q9"], loaded.qrels["q9"]) == ("", "", {"d9": 1})


@pytest.mark.parametrize("stem", ["corpus", "queries"])
def test_an_empty_file_is_refused(beir, stem):
    write(beir / f"{stem}.jsonl", "\n")
    message = said_about(beir)
    assert f"{beir} {stem}: empty" in message and "at least one line" in message


def test_a_missing_file_is_named(beir):
    (beir / "queries.jsonl").unlink()
    message = said_about(beir)
    assert str(beir) in message and "queries.jsonl (or queries.jsonl.gz) is missing" in message
    (beir / "corpus.jsonl").unlink()
    message = said_about(beir)
    assert str(beir) in message and "neither corpus.jsonl nor corpus.jsonl.gz" in message
    assert "Expected corpus.jsonl, queries.jsonl and qrels/test.tsv" in message


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut in the middle": lambda content: content[: len(content) // 2],
    "cut in the checksum at the end": lambda content: content[:-4],
    "wrong checksum": lambda content: content[:-8] + bytes(8),
    "block of a type that does not exist": lambda content: content[:10] + b"\x07" + content[11:],
    "not zipped": lambda content: b"not zipped",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_zipped_file_is_refused(beir, damage):
    zipped = zip_file(beir / "corpus.jsonl")
    zipped.write_bytes(DAMAGE[damage](zipped.read_bytes()))
    message = said_about(beir)
    assert f"{zipped}: damaged or truncated" in message and "Fetch the file again" in message


def test_an_unknown_split_is_refused_with_those_that_exist(beir):
    write(beir / "qrels" / "extra.tsv", HEADER + "q1\td2\t1\n")
    for split in ("train", "dev", "tests"):
        message = said_about(beir, split)
        assert str(beir) in message and repr(split) in message and "['extra', 'test']" in message
    for path in (beir / "qrels").iterdir():
        path.unlink()
    assert "it has none" in said_about(beir)


def test_a_split_that_judges_nothing_is_refused(beir, tmp_path):
    write(beir / "qrels" / "test.tsv", HEADER)
    assert "split 'test' judges no query" in said_about(beir)
    one = write_beir(tmp_path / "one", split="train")  # none of its three queries is in the tenth
    assert not any(int(hashlib.md5(q.encode()).hexdigest(), 16) % 10 == 0 for q in QUERIES)
    assert "split 'dev' judges no query" in said_about(one, "dev")


@pytest.mark.parametrize("path", ["nowhere", "a/b/c", "/no/such/folder", "org/na me", ""])
def test_a_path_that_is_neither_a_folder_nor_an_id_is_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    message = said_about(path)
    assert message.startswith(path) and ("ORG/NAME" in message or "neither corpus.jsonl" in message)


def test_an_id_that_cannot_be_had_is_refused():
    message = said_about("no-such-org/no-such-set")
    assert message.startswith("no-such-org/no-such-set:") and "Check the path, the id and the network" in message
