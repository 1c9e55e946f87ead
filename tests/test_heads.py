"""Training on cached vectors: the batches are the right rows, and stock losses and modules train on them too."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DOCUMENTS, QUERIES, ROOT, run_python, write_beir
from sentence_transformers import MultiVectorEncoder, SparseEncoder
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sparse_encoder.losses import CSRLoss
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder

from polyrep import InputError
from polyrep.data import RetrievalDataset, load_retrieval_dataset
from polyrep.encoding import Embeddings
from polyrep.methods import Dense2SparseConfig, Dense2SparseModel
from polyrep.training.arguments import HeadTrainingArguments
from polyrep.training.head_trainer import HeadTrainer
from polyrep.training.losses import judged_relevant
from polyrep.training.pairs import HeadData
from polyrep.training.sides import SentenceSide, TokenSide, encode_sparse

sys.path.insert(0, str(ROOT / "benchmarks"))
import dense2sparse_text as bench


def two_folders(root: Path) -> list[Path]:
    """The small data set, and a second one with the first three documents and one query."""
    first, second = write_beir(root / "first", "train"), write_beir(root / "second", "train")
    lines = (second / "corpus.jsonl").read_text().splitlines()[:3]
    (second / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    (second / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq2\td1\t1\n")
    return [first, second]


@pytest.fixture
def two_sets(sentence_model, tmp_path) -> HeadData:
    data = HeadData(negatives=2, labels=True, depth=3)
    for folder in two_folders(tmp_path):
        data.add(sentence_model, load_retrieval_dataset(folder, "train"), show_progress=False)
    return data


def test_batches_hold_the_rows_that_they_name(two_sets, sentence_model):
    texts = {side: [] for side in ("query", "document")}
    for side in texts:
        for batch in two_sets.batches(side, size=2):
            texts[side].append(batch["sentence_embedding"])
    vectors = {side: torch.cat(parts) for side, parts in texts.items()}
    assert {side: len(v) for side, v in vectors.items()} == {"query": 4, "document": 8}
    np.testing.assert_allclose(
        vectors["document"][5:],
        sentence_model.encode_document(list(DOCUMENTS.values())[:3], normalize_embeddings=True),  # it scores by cosine
        atol=1e-3,
    )
    rows = [two_sets[i] for i in (4, 0, 2)]  # out of order, from both sets
    batch = two_sets.collate(rows)
    queries, documents = batch["features"]
    for features, side in ((queries, "query"), (documents, "document")):
        torch.testing.assert_close(features["sentence_embedding"], vectors[side][features["index"]])
    assert batch["labels"].tolist() == [0, 1, 2] and len(documents["index"]) == 3 + 3 * 2
    own = dict(zip(queries["index"].tolist(), documents["index"][:3].tolist(), strict=True))
    assert own == {0: 1, 2: own[2], 3: 5} and own[2] in (2, 3)
    tokenizer = sentence_model.tokenizer
    expected = [*DOCUMENTS.values(), *list(DOCUMENTS.values())[:3]]
    for ids, mask, index in zip(documents["input_ids"], documents["attention_mask"], documents["index"], strict=True):
        assert ids[mask.bool()].tolist() == tokenizer(expected[index])["input_ids"]


def test_small_sets_are_repeated_until_they_count_as_much_as_the_largest(two_sets):
    two_sets.pairs = np.array([[0, 0, 1]] * 2 + [[1, q, 0] for q in range(5)])
    two_sets.even_out(0)
    assert two_sets.pairs.tolist() == [[0, 0, 1]] * 4 + [[1, q, 0] for q in range(5)]  # 5 / 2 is nearest to 2
    whole = two_sets.pairs
    two_sets.even_out(1)
    assert two_sets.pairs is not whole and two_sets.pairs.tolist() == whole.tolist()
    two_sets.negatives = 1
    drawn = [two_sets.collate([two_sets[row]])["features"][1]["index"][1].item() for row in range(4)]
    assert len(set(drawn)) > 1  # by its own draw


def test_negatives_are_among_the_nearest_of_the_same_set(two_sets, sentence_model):
    scores = sentence_model.similarity(
        sentence_model.encode_query(list(QUERIES.values())), sentence_model.encode_document(list(DOCUMENTS.values()))
    )
    nearest = scores.topk(3, dim=1).indices
    for _ in range(5):
        documents = two_sets.collate([two_sets[0], two_sets[1]])["features"][1]["index"][2:].reshape(2, 2)
        for row, negatives in enumerate(documents):
            assert set(negatives.tolist()) <= set(nearest[row].tolist())
        assert set(two_sets.collate([two_sets[4]])["features"][1]["index"][1:].tolist()) <= {5, 6, 7}


@pytest.fixture
def twins() -> RetrievalDataset:
    """Equal documents, equal queries, and a query that is a document."""
    corpus = {"a": "print a file", "b": "show ports", "b2": "show ports", "c": "copy files", "d": "stop a process"}
    queries = {"q1": "what is open", "q2": "what is open", "d": "stop a process"}
    return RetrievalDataset("twins", "train", corpus, queries, {"q1": {"b": 1}, "q2": {"a": 1}, "d": {"b2": 1}})


def test_nothing_is_a_negative_of_itself(twins, sentence_model):
    data = HeadData(labels=True, negatives=3)
    data.add(sentence_model, twins, show_progress=False)
    assert 4 not in data.parts[0].nearest[2], "a query's own document"
    features = data.collate([data[0], data[1], data[2]])["features"]
    assert set(features[1]["index"].tolist()) <= {0, 1, 3, 4}, "equal documents have one place"
    known = judged_relevant(features)
    right = [{0, 1}, {0, 1}, {1, 4}]  # of equal queries, the documents of both; of a document, itself too
    for row, places in enumerate(right):
        assert known[row].tolist() == [int(place) in places for place in features[1]["index"]]
    assert data.relevant().tolist() == [[0, 1], [1, 0], [2, 1]]


def test_without_labels_no_query_is_paired_with_itself(twins, sentence_model):
    data = HeadData(negatives=1)
    data.add(sentence_model, twins, show_progress=False)
    assert data.pairs[2, 2] != 4 and (data.parts[0].nearest[2] != 4).all()
    data.mine_again(lambda features, task: features["sentence_embedding"])
    assert (data.parts[0].nearest[2] != 4).all()


def test_without_labels_the_nearest_document_takes_the_place_of_the_judged(sentence_model, tmp_path):
    data = HeadData()
    data.add(sentence_model, load_retrieval_dataset(write_beir(tmp_path / "a", "train"), "train"), show_progress=False)
    scores = sentence_model.similarity(
        sentence_model.encode_query(list(QUERIES.values())), sentence_model.encode_document(list(DOCUMENTS.values()))
    )
    assert data.pairs[:, 2].tolist() == scores.argmax(1).tolist() and len(data) == len(QUERIES)


def test_a_stock_module_under_a_stock_loss_learns(two_sets, tmp_path):
    torch.manual_seed(0)
    module = SparseAutoEncoder(32, hidden_dim=64, k=8, k_aux=32)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    arguments = HeadTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=30,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = HeadTrainer(
        objective=CSRLoss(SparseEncoder(modules=[module], device="cpu")),
        args=arguments,
        train_dataset=two_sets,
        data_collator=two_sets.collate,
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log[-1]["loss"] < log[0]["loss"]
    parts = {name for name in log[0] if "loss" in name and name != "loss"}
    assert len(parts) > 1 and sum(log[0][part] for part in parts) == pytest.approx(log[0]["loss"], rel=0.02)
    assert not torch.equal(module.encoder.weight, before["encoder.weight"])


# Several vectors a text.


@pytest.fixture
def two_token_sets(multi_vector_model, tmp_path) -> HeadData:
    data = HeadData(kind="tokens", negatives=2, labels=True, depth=3)
    for folder in two_folders(tmp_path):
        data.add(multi_vector_model, load_retrieval_dataset(folder, "train"), show_progress=False)
    return data


def test_token_batches_hold_the_rows_that_they_name_padded(two_token_sets, multi_vector_model):
    texts = {
        "query": [*QUERIES.values(), QUERIES["q2"]],
        "document": [*DOCUMENTS.values(), *list(DOCUMENTS.values())[:3]],
    }
    vectors = {
        "query": multi_vector_model.encode_query(texts["query"], convert_to_numpy=True),
        "document": multi_vector_model.encode_document(texts["document"], convert_to_numpy=True),
    }
    batch = two_token_sets.collate([two_token_sets[i] for i in (4, 0, 2)])  # out of order, from both sets
    assert batch["labels"].tolist() == [0, 1, 2]
    assert batch["features"][0]["index"].tolist() == [3, 0, 2]
    own = batch["features"][1]["index"].tolist()
    assert own[0] == 5 and own[1] == 1 and own[2] in (2, 3) and len(own) == 3 + 3 * 2
    everything = {side: [*two_token_sets.batches(side, size=2)] for side in texts}
    for side, parts in (("query", batch["features"][:1]), ("document", batch["features"][1:])):
        for features in [*parts, *everything[side]]:
            lengths = [len(vectors[side][i]) for i in features["index"]]
            assert features["attention_mask"].sum(1).tolist() == lengths
            assert features["token_embeddings"].shape == (len(lengths), features["attention_mask"].shape[1], 16)
            for tokens, mask, index in zip(
                features["token_embeddings"], features["attention_mask"], features["index"], strict=True
            ):
                np.testing.assert_allclose(tokens[mask], vectors[side][index], atol=1e-3)
                assert not tokens[~mask].any()
    found = [torch.cat([part["index"] for part in everything[side]]).tolist() for side in ("query", "document")]
    assert found == [[*range(4)], [*range(8)]]


def test_what_objectives_ask_of_all_sets_is_counted_over_all_sets(two_token_sets, multi_vector_model):
    queries = multi_vector_model.encode_query([*QUERIES.values(), QUERIES["q2"]], convert_to_numpy=True)
    np.testing.assert_allclose(two_token_sets.query_sums(), [q.sum(0) for q in queries], atol=5e-3)
    means = [
        d.mean(0) for d in multi_vector_model.encode_document([*DOCUMENTS.values(), *list(DOCUMENTS.values())[:3]])
    ]
    expected = [d / np.linalg.norm(d) for d in means]
    np.testing.assert_allclose(two_token_sets.document_means(), expected, atol=1e-3)
    # Queries q1 to q3 and documents d1 to d5, then q2 and d1 to d3 of the second set.
    assert sorted(map(tuple, two_token_sets.relevant().tolist())) == [(0, 1), (1, 0), (2, 2), (2, 3), (3, 5)]
    longest = max(len(x) for x in multi_vector_model.encode_document(list(DOCUMENTS.values())))
    assert two_token_sets.most_tokens() == longest


def test_negatives_of_token_sets_are_among_the_nearest_by_their_mean(two_token_sets, multi_vector_model):
    queries = [q.double().numpy().sum(0) for q in multi_vector_model.encode_query(list(QUERIES.values()))]
    means = [d.double().numpy().mean(0) for d in multi_vector_model.encode_document(list(DOCUMENTS.values()))]
    scores = np.array([[q @ (d / np.linalg.norm(d)) for d in means] for q in queries])
    nearest = np.argsort(-scores, axis=1)[:, :3]
    for epoch in range(8):
        two_token_sets.epoch = epoch
        documents = two_token_sets.collate([two_token_sets[0], two_token_sets[1]])["features"][1]["index"][2:]
        for row, negatives in enumerate(documents.reshape(2, 2)):
            assert set(negatives.tolist()) <= set(nearest[row].tolist())


@pytest.mark.parametrize(("value", "length"), [(0.0, "0.0"), (np.nan, "nan"), (np.inf, "inf")])
def test_a_token_vector_that_means_nothing_names_its_text(multi_vector_model, tmp_path, value, length):
    options = {"cache_dir": tmp_path, "show_progress": False}
    side = TokenSide.encode(multi_vector_model, DOCUMENTS, "document", "tiny", **options)
    bounds, path = side.embeddings.offsets, side.embeddings.path
    for text, row in (("d3", bounds[2]), ("d3", bounds[3] - 1), ("d5", bounds[5] - 1)):
        values = np.fromfile(path / "values.bin", np.float16).reshape(-1, 16)
        healthy = values.copy()
        values[row] = value
        (path / "values.bin").write_bytes(values.tobytes())
        with pytest.raises(InputError, match=f"tiny: document '{text}' has a token vector of length {length}.*{path}"):
            TokenSide.encode(multi_vector_model, DOCUMENTS, "document", "tiny", **options)
        (path / "values.bin").write_bytes(healthy.tobytes())
    assert len(TokenSide.encode(multi_vector_model, DOCUMENTS, "document", "tiny", **options)) == 5


def test_a_text_without_a_token_that_counts_is_named(multi_vector_model):
    port = multi_vector_model.tokenizer.convert_tokens_to_ids("list")
    modules = [
        MultiVectorMask(keep_only_token_ids=[port]) if isinstance(m, MultiVectorMask) else m
        for m in multi_vector_model.children()
    ]
    model = MultiVectorEncoder(modules=modules, device="cpu")
    texts = {"d5": DOCUMENTS["d5"], "d3": DOCUMENTS["d3"]}
    with pytest.raises(InputError, match="tiny: document 'd3' has no token that counts.*keep_only_token_ids"):
        TokenSide.encode(model, texts, "document", "tiny", show_progress=False)
    assert TokenSide.encode(
        model, {"d5": DOCUMENTS["d5"]}, "document", "tiny", show_progress=False
    ).embeddings.lengths == [1]


def test_pruning_a_cache_is_pruning_in_the_head():
    torch.manual_seed(0)
    head = Dense2SparseModel(Dense2SparseConfig(input_dim=6, vocab_size=40)).eval()
    torch.nn.init.normal_(head.vocabulary.weight)
    vectors = np.random.default_rng(0).normal(size=(9, 6)).astype(np.float32)
    tokens = np.random.default_rng(1).integers(0, 40, 45)
    embeddings = Embeddings("sentence", vectors, None, None, 6, 0.0, Path())
    side = SentenceSide(embeddings, tokens=tokens.astype(np.int32), offsets=np.arange(0, 46, 5))
    full = bench.with_head(head, side, "document")
    for words, mass in ((5, None), (None, 0.5), (8, 0.7)):
        head.config.document_top_k, head.config.mass = words, mass
        expected = encode_sparse(
            lambda f: (
                head(f["sentence_embedding"], f["input_ids"], f["attention_mask"], "document").sentence_embedding
            ),
            side,
        )
        found = bench.pruned(full, words, mass)
        np.testing.assert_array_equal(found.offsets, expected.offsets)
        for row in range(9):
            part = slice(*found.offsets[row : row + 2])
            ours = dict(zip(found.indices[part].tolist(), found.values[part].tolist(), strict=True))
            assert ours == dict(zip(expected.indices[part].tolist(), expected.values[part].tolist(), strict=True))


def test_the_quick_start_runs_and_its_second_run_fits_nothing(backbone, sparse_model, tmp_path):
    data = write_beir(tmp_path / "tiny", "train")
    for split in ("dev", "test"):
        shutil.copy(data / "qrels" / "train.tsv", data / "qrels" / f"{split}.tsv")
    command = [str(ROOT / "benchmarks" / "dense2sparse_text.py"), "--quick", "--datasets", str(data)]
    command += ["--backbone", str(backbone), "--cache_dir", str(tmp_path / "cache"), "--output", str(tmp_path / "out")]
    command += [
        "--flags",
        "--max_steps 2 --per_device_train_batch_size 2 --depth 3 --document_top_k 20 --query_top_k 10",
        "--name",
        "quick",
    ]
    first = run_python(*command)
    assert first.returncode == 0, first.stderr[-3000:]
    systems = {row["system"] for row in json.loads((tmp_path / "out" / "quick.json").read_text())["rows"]}
    expected = {"BM25", "dense", "Dense2Sparse", "CSR", "dense + Dense2Sparse"}
    assert expected <= {system.partition(", ")[0] for system in systems}
    assert first.stdout.count("\n    ") == 3, "three queries with their words"
    assert (tmp_path / "out" / "quick.png").stat().st_size > 10_000
    heads = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "heads").rglob("*.safetensors")}
    sparse_model.save_pretrained(str(tmp_path / "rival"))
    second = run_python(*command, "--splade", str(tmp_path / "rival"))
    assert second.returncode == 0 and "train_runtime" in first.stdout and "train_runtime" not in second.stdout
    assert heads == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "heads").rglob("*.safetensors")}
    rows = {r["system"]: r for r in json.loads((tmp_path / "out" / "quick.json").read_text())["rows"] if "flops" in r}
    active = [
        (encode(list(texts.values())).to_dense() != 0).double().mean(0)
        for encode, texts in ((sparse_model.encode_query, QUERIES), (sparse_model.encode_document, DOCUMENTS))
    ]
    assert rows["SPLADE (rival)"]["flops"] == pytest.approx(float(active[0] @ active[1]))
    assert rows["SPLADE (rival), 48/128 words"]["flops"] == rows["SPLADE (rival)"]["flops"], "it has fewer"
    with pytest.raises(InputError, match="--splade .*is a SentenceTransformer.*Name a SparseEncoder"):
        bench.open_splade(str(backbone))
    with pytest.raises(InputError, match="no/such"):
        bench.open_splade("no/such")
