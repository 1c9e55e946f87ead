"""BM25: scores against the formula, the language that it reads in, and what it says of that."""

from __future__ import annotations

import json
import math
import re
import sys
import time

import numpy as np
import pytest
from bm25s.stopwords import STOPWORDS_EN
from conftest import DOCUMENTS, QUERIES, write_beir
from snowballstemmer.english_stemmer import EnglishStemmer
from world import write_world

from polyrep import InputError
from polyrep.cli import main
from polyrep.data import RetrievalDataset
from polyrep.encoding.bm25 import _OTHER_CODES, STOP_WORDS, Bm25, analyzer, language_of
from polyrep.evaluation import bm25 as bm25_rows
from polyrep.evaluation.bm25 import rank_with_bm25
from polyrep.publishing.after_training import _language
from polyrep.search.ranking import sparse_rows
from polyrep.training.arguments import RecipeArguments

STEMMER = EnglishStemmer()  # not the one that is tested, though of the same rules


def words(text: str) -> list[str]:
    return [STEMMER.stemWord(word) for word in re.findall(r"\b\w\w+\b", text.lower()) if word not in STOPWORDS_EN]


def bm25(query: str, corpus: list[str], k1: float = 1.5, b: float = 0.75) -> list[float]:
    """Score of each document by the formula of Lucene (Kamphuis et al. 2020, table 1), without its constant k1 + 1."""
    documents = [words(text) for text in corpus]
    average = sum(map(len, documents)) / len(documents)
    scores = [0.0] * len(documents)
    for term in words(query):
        found = sum(term in document for document in documents)
        weight = math.log(1 + (len(documents) - found + 0.5) / (found + 0.5))
        for i, document in enumerate(documents):
            count = document.count(term)
            scores[i] += weight * count / (count + k1 * (1 - b + b * len(document) / average))
    return scores


def small(documents: dict[str, str], queries: dict[str, str]) -> RetrievalDataset:
    return RetrievalDataset("small", "test", documents, queries, {q: {next(iter(documents)): 1} for q in queries})


TEXTS = DOCUMENTS | {
    "d10": DOCUMENTS["d2"],  # the same text: equal scores
    "d9": DOCUMENTS["d2"] + " open open",
    "d11": "The of and.",  # stop words only
}
ASKED = QUERIES | {
    "twice": "file file ports",
    "unknown": "xylophone quartet",
    "stop": "is it the",
    "mixed": "xylophone FILE, grep!",
}


def test_bm25_scores_as_the_formula_says():
    ranking = rank_with_bm25(small(TEXTS, ASKED))
    ids = list(TEXTS)
    for row, query in enumerate(ASKED.values()):
        scores = np.array(bm25(query, list(TEXTS.values())))
        np.testing.assert_allclose(ranking.scores[row], scores[ranking.positions[row]], rtol=1e-5)
        expected = sorted(range(len(ids)), key=lambda i, s=scores: (round(s[i], 6), ids[i]), reverse=True)
        assert ranking.positions[row].tolist() == expected
    assert ranking.scores[0, 0] > 0  # "show open ports"


def test_a_query_without_a_known_word_finds_all_documents_by_falling_id():
    ranking = rank_with_bm25(small(TEXTS, {"unknown": "xylophone", "stop": "is it the", "empty": "?"}))
    assert not ranking.scores.any()
    for positions in ranking.positions:
        assert [list(TEXTS)[p] for p in positions] == sorted(TEXTS, reverse=True)


def test_bm25_finds_words_of_scripts_without_spaces():
    documents = {"d1": "猫は好きです。庭で寝ます。", "d2": "犬が夜に吠える。", "d3": "パンは小麦粉と水で作る。"}
    documents |= {"d4": "GPUで学習する", "d5": "แมวนอนหลับอยู่ในสวน"}
    ranking = rank_with_bm25(small(documents, {"1": "猫", "3": "パンの作り方", "4": "gpu", "5": "แมว"}))
    assert [list(documents)[row[0]] for row in ranking.positions] == ["d1", "d3", "d4", "d5"]


def test_bm25_leaves_a_querys_own_document_out_and_loses_no_place():
    whole = rank_with_bm25(small(TEXTS, {"q": TEXTS["d2"]}))
    own = list(TEXTS).index("d2")
    cut = rank_with_bm25(small(TEXTS, {"d2": TEXTS["d2"]}), depth=4)
    assert cut.positions[0].tolist() == [p for p in whole.positions[0] if p != own][:4]


def test_bm25_is_cut_at_the_depth(monkeypatch):
    whole = rank_with_bm25(small(TEXTS, ASKED))
    monkeypatch.setattr(bm25_rows, "DEPTH", 2)
    np.testing.assert_array_equal(rank_with_bm25(small(TEXTS, ASKED)).positions, whole.positions[:, :2])


def test_bm25_costs_are_counted_in_distinct_words():
    costs = rank_with_bm25(small(TEXTS, ASKED)).costs
    documents, queries = ([set(words(text)) for text in texts.values()] for texts in (TEXTS, ASKED))
    distinct = np.mean([len(document) for document in documents])
    assert costs["active_dims"] == pytest.approx(distinct)
    assert costs["bytes_per_document"] == pytest.approx(distinct * (4 + 4))  # a term id and a float32
    assert costs["flops"] == pytest.approx(np.mean([len(q & d) for q in queries for d in documents]))


# Languages


SENTENCES = {
    "da": "Hunden løb hjem, fordi den var sulten, og så fik den noget at spise af os. Hvad ville I ellers have gjort?",
    "de": "Der Hund lief nach Hause, weil er hungrig war, und dort bekam er von uns etwas zu fressen. Was sonst?",
    "en": "The dog ran home because it was hungry, and there it was given something to eat by us. What else is there?",
    "es": "El perro corrió a casa porque tenía hambre, y allí le dimos algo de comer. ¿Qué más se puede hacer con él?",
    "fr": "Le chien est rentré à la maison parce qu'il avait faim, et nous lui avons donné à manger. Et puis?",
    "it": "Il cane è tornato a casa perché aveva fame, e noi gli abbiamo dato qualcosa. Che cosa si può fare di più?",
    "nl": "De hond liep naar huis omdat hij honger had, en daar kreeg hij van ons wat te eten. Wat zou je doen?",
    "no": "Hunden løp hjem fordi den var sulten, og så fikk den noe å spise av oss. Hva ville dere ellers ha gjort?",
    "pt": "O cão correu para casa porque estava com fome, e nós demos a ele algo para comer. Que mais se pode fazer?",
    "ru": "Собака побежала домой, потому что она была голодна, и там мы дали ей поесть. Что же ещё нам было делать?",
    "sv": "Hunden sprang hem eftersom den var hungrig, och där fick den något att äta av oss. Vad skulle ni ha gjort?",
    "tr": "Köpek eve koştu çünkü çok acıkmıştı, ve biz ona yemek için bir şey verdik. Daha başka ne yapılabilir ki?",
    "none": "犬は家に走って帰りました。お腹が空いていたからです。",
}


def test_stop_words_of_every_language_are_a_list_and_have_a_stemmer():
    for code in STOP_WORDS:
        found = analyzer(code)
        assert found.language == code and len(found.stop_words) > 30
        assert found.words([" ".join(found.stop_words)]) == [[]]
    assert set(_OTHER_CODES.values()) == set(STOP_WORDS)


@pytest.mark.parametrize(
    ("language", "text", "stems"),
    [
        ("en", "The runners were running", ["runner", "were", "run"]),
        ("EN", "The runners", ["runner"]),
        ("deu", "Die Häuser und das Haus", ["haus", "haus"]),
        ("fi", "taloissa talo", ["talo", "talo"]),  # a stemmer without a list
        ("none", "The Runners", ["the", "runners"]),
        ("en", "走るGPUs", ["走", "る", "走る", "gpus"]),
        ("none", "ＧＰＵ ２０２４", ["gpu", "2024"]),
        ("none", "ｶﾞｽ", ["ガ", "ス", "ガス"]),
        ("none", "ﬁle Fuß\u00adball", ["file", "fußball"]),
        ("none", "İzmir", ["izmir"]),
        ("tr", "İstanbul'da IŞIK", ["istanbul", "ışık"]),
        ("nb", "jentene", ["jent"]),
    ],
)
def test_words_are_those_of_the_language(language, text, stems):
    assert analyzer(language).words([text]) == [stems]


def test_a_language_without_bm25_is_refused(tmp_path, capsys):
    folder = str(write_beir(tmp_path / "commands"))
    assert main(["evaluate", "minilm", "--dataset", folder, "--baselines", "none", "--language", "de"]) == 2
    assert "--language de: of bm25, which is no row here" in capsys.readouterr().err


def test_an_inflected_word_is_found():
    dataset = small({"d1": "He walks.", "d2": "A talk."}, {"q": "walking"})
    assert rank_with_bm25(dataset).scores[0].tolist() > [0, 0]
    assert rank_with_bm25(dataset, language="none").scores[0].tolist() == [0, 0]


@pytest.mark.parametrize("language", ["xx", "zh", "english", "porter", "pt-BR", "", "e"])
def test_a_language_without_a_stemmer_is_refused(language):
    with pytest.raises(InputError, match=f"--language {language}: PyStemmer knows no such language.*none"):
        analyzer(language)


@pytest.mark.parametrize("language", SENTENCES)
def test_the_language_is_told_by_its_stop_words(language):
    assert language_of([SENTENCES[language]] * 3) == language
    assert analyzer("auto", [SENTENCES[language]] * 3) == analyzer(language)


@pytest.mark.parametrize(
    "texts",
    [
        [],
        [SENTENCES["en"][:12]],
        [SENTENCES["en"], SENTENCES["de"]] * 5,
        ["Koira juoksi kotiin, koska sillä oli nälkä, ja siellä se sai meiltä syötävää."] * 5,
        ["파이썬은 배우기 쉬운 언어입니다"] * 5,
        ["def main(argv): return parse(argv)"] * 5,
    ],
)
def test_a_language_that_the_texts_do_not_tell_is_refused(texts):
    with pytest.raises(InputError, match=f"--language auto: the words of {len(texts)} documents do not tell"):
        analyzer("auto", texts)


def test_a_trained_model_is_measured_beside_the_bm25_of_its_data(tmp_path):
    german, code = write_world(tmp_path / "german", "german"), write_beir(tmp_path / "commands")
    assert _language(RecipeArguments(datasets=[str(german)])) == "auto"
    assert _language(RecipeArguments(datasets=[str(german), str(code)])) == "en"  # which tells none


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "Stemmer", None)
    with pytest.raises(InputError, match=r"bm25s and PyStemmer.*polyrep\[quickstart\]"):
        rank_with_bm25(small(TEXTS, ASKED))


def test_the_table_says_the_language_and_the_command_refuses_an_unknown_one(tmp_path, capsys):
    folders = [str(write_world(tmp_path / name, name)) for name in ("velmora", "german", "chinese")]
    argv = ["evaluate", "bm25", "--dataset", *folders, "--baselines", "none"]
    assert main([*argv, "--language", "auto", "--output", str(tmp_path), "--name", "x"]) == 0
    shown = capsys.readouterr().out
    assert "BM25: language en, stemmer Snowball, stop words 33, k1 1.5, b 0.75 (velmora)." in shown
    assert "BM25: language de, stemmer Snowball, stop words 232, k1 1.5, b 0.75 (german)." in shown
    assert "BM25: language none, stemmer none, stop words 0, k1 1.5, b 0.75 (chinese)." in shown
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    main_rows = {row["dataset"]: row for row in rows if row["metric"] == "nDCG@10"}
    assert main_rows["german"]["settings"]["language"] == "de"
    assert main([*argv, "--language", "klingon"]) == 2
    assert "--language klingon: PyStemmer knows no such language" in capsys.readouterr().err


# As sparse vectors


def test_vectors_of_bm25_give_its_scores(tmp_path):
    """Whatever is asked: words that repeat, that nobody has, and none at all."""
    found = rank_with_bm25(small(TEXTS, ASKED))
    made = Bm25.of(analyzer("en"), TEXTS.values())
    documents, queries = made.of_documents(TEXTS.values()), made.of_queries(ASKED.values())
    assert (documents.kind, documents.dim, len(documents), len(queries)) == (
        "sparse",
        made.dim,
        len(TEXTS),
        len(ASKED),
    )
    scores = (
        sparse_rows(queries, 0, len(queries), "dot") @ sparse_rows(documents, 0, len(documents), "dot").T
    ).toarray()
    for row, query in enumerate(ASKED.values()):
        assert scores[row].tolist() == pytest.approx(bm25(query, list(TEXTS.values())), abs=1e-6)
        assert np.take(scores[row], found.positions[row]) == pytest.approx(found.scores[row], abs=1e-5)
    made.save(tmp_path)
    again = Bm25.load(tmp_path)
    assert (
        (again, again.fingerprint)
        == (made, made.fingerprint)
        != (None, Bm25.of(analyzer("de"), TEXTS.values()).fingerprint)
    )
    with pytest.raises(InputError, match="none of 2 documents has a word"):
        Bm25.of(analyzer("en"), ["the", "!"])


def test_a_long_document_takes_no_longer_than_its_words_in_short_ones():
    words = [f"{number:05}" for number in range(20_000)]
    short = [" ".join(words[start : start + 100]) for start in range(0, len(words), 100)]
    made = Bm25.of(analyzer("none"), short)

    def seconds(texts: list[str]) -> float:
        made.of_documents(short[:1])
        started = time.perf_counter()
        made.of_documents(texts)
        return time.perf_counter() - started

    assert seconds([" ".join(words)]) < 5 * seconds(short) + 0.2


@pytest.mark.parametrize(
    "change",
    [
        {"k1": 2},
        {"words": []},
        {"words": ["one"]},
        {"documents": 0},
        {"average": "x"},
        {"format": None},
        {"language": 3},
        {"language": None},
        {"language": "klingon"},
    ],
)
def test_damaged_words_of_bm25_are_refused(change, tmp_path):
    Bm25.of(analyzer("en"), TEXTS.values()).save(tmp_path)
    said = json.loads((tmp_path / "bm25.json").read_text())
    (tmp_path / "bm25.json").write_text(json.dumps(said | change))
    with pytest.raises(InputError, match="bm25.json.* Encode the corpus again"):
        Bm25.load(tmp_path)
