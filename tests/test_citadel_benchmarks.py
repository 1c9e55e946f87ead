"""The benchmark of CITADEL with tiny models: whole runs of both tiers, and what its rows are made of."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, run_python
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from test_citadel import encoder_of
from test_routed import drawn, ids_of, kept_above, looped, origin, scores_in
from world import write_world

from polyrep import InputError
from polyrep.encoding.embeddings import in_memory
from polyrep.encoding.shards import Shard
from polyrep.search import open_index

SCRIPT = ROOT / "benchmarks" / "citadel_text.py"

WIDTH = 40
"""Of token vectors: more than the 32 numbers of an entry."""


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The file of the fits as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("citadel_study")


@pytest.fixture
def text(study: Any) -> Any:
    """The file of the claims as a module."""
    return importlib.import_module("citadel_text")


def late_model(backbone: Path, *skipped: str) -> MultiVectorEncoder:
    torch.manual_seed(1)
    names: Any = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    narrow = Dense(32, WIDTH, bias=False, activation_function=torch.nn.Identity(), **names)
    mask = MultiVectorMask(skiplist_words=list(skipped))
    return MultiVectorEncoder(modules=[Transformer(str(backbone)), narrow, mask, Normalize(**names)], device="cpu")


@pytest.fixture
def world(tmp_path: Path, backbone: Path) -> list[str]:
    """Flags that name a small data set and tiny models."""
    data = write_world(tmp_path / "tiny", sizes={"train": 16, "dev": 6, "test": 8})
    late_model(backbone).save_pretrained(str(tmp_path / "late"))
    encoder_of(backbone).save_pretrained(str(tmp_path / "dense"))
    models = ["--backbone", str(tmp_path / "late"), "--dense", str(tmp_path / "dense")]
    return ["--datasets", str(data), *models, "--cache_dir", str(tmp_path / "cache"), "--output", str(tmp_path)]


def run(*flags: str) -> Any:
    made = run_python(str(SCRIPT), *flags)
    assert made.returncode == 0, made.stderr[-3000:]
    return made


def value(results: dict[str, Any], system: str, field: str = "value") -> float:
    (row,) = [row for row in results["rows"] if (row["system"], row["metric"]) == (system, "nDCG@10")]
    return row[field]


def test_the_frozen_tier_runs_whole_and_fits_nothing_that_another_process_has_fitted(world, tmp_path):
    few = "--max_steps 2 --per_device_train_batch_size 4 --depth 3"
    flags = [*world, "--seeds", "0", "1", "--flags", few]
    run(*flags, "--dev")
    chosen = json.loads((tmp_path / "citadel-frozen-dev.json").read_text())
    tried = {row["setting"]: row["value"] for row in chosen["rows"]}
    assert len(tried) == 8 == chosen["settings_tried"]
    assert tried[chosen["chosen"]["CITADEL"]] == max(tried.values())

    flags += ["--chosen", str(tmp_path / "citadel-frozen-dev.json")]
    share = run(*flags, "--fit_only", "1/2")
    assert not (tmp_path / "citadel-frozen.json").exists()
    whole = run(*flags)
    # CITADEL has two seeds, and six ablations and two controls one; ReinPool and LEMUR have two each.
    fits = [made.stdout.count("train_runtime") for made in (share, whole)]
    assert fits == [7, 7]
    results = json.loads((tmp_path / "citadel-frozen.json").read_text())
    claims = {claim["claim"].removeprefix("citadel."): claim for claim in results["claims"]}
    assert {claim["tier"] for claim in results["claims"]} == {"frozen"}
    ours, full = value(results, "CITADEL"), value(results, "MaxSim")
    assert claims["posthoc_retention"]["value"] == pytest.approx(ours / full)
    for cost, claim in (("bytes_per_document", "bytes_ratio"), ("products", "interactions_ratio")):
        ratio = value(results, "CITADEL", cost) / value(results, "MaxSim", cost)
        assert claims[claim]["value"] == pytest.approx(ratio)
    assert value(results, "CITADEL", "bytes_per_document") == pytest.approx(
        value(results, "CITADEL", "entries_per_document") * (32 * 2 + 4)
    )
    at, without = (value(results, name, "longest_list") for name in ("CITADEL at 100 steps", "no balance"))
    assert claims["largest_list_ratio"]["value"] == pytest.approx(at / without)
    assert claims["index_exact"]["value"] == 1 and claims["speedup"]["value"] > 0
    margins = claims["margin_at_equal_bytes"]["at_vectors"]
    for k in (8, 16, 32):
        cut = f"CITADEL, int8, as large as {k} vectors"
        size = value(results, cut, "bytes_per_document")
        assert size <= k * WIDTH + 8 and size == pytest.approx(value(results, cut, "entries_per_document") * (32 + 8))
        rivals = [value(results, f"{name}, {k}, int8") for name in ("ReinPool", "hierarchical")]
        assert margins[str(k)]["value"] == pytest.approx(100 * (value(results, cut) - max(rivals)))
    assert claims["margin_at_equal_bytes"]["value"] == margins["32"]["value"]
    systems = {row["system"] for row in results["rows"]}
    assert {"CITADEL, words", "CITADEL, int8", "1 key", "3 keys", "7 keys", "no router loss"} <= systems
    assert {"weights alone", "static keys", "no regularisation", "MaxSim, 32 dims", "dense + BM25"} <= systems
    assert "LEMUR, 512, rerank 200" in systems
    said = (tmp_path / "citadel-frozen.md").read_text()
    assert all(
        f"| {column} |" in said for column in ("entries/doc", "longest list", "Gini of lists", "without entries")
    )
    assert value(results, "static keys", "products") > 0 and value(results, "weights alone", "products") > 0
    assert 0 <= value(results, "CITADEL", "gini") < 1
    gain = claims["gain_over_weights"]
    assert gain["target"] == 1 and gain["control"] == "weights alone"


def test_the_whole_encoder_has_the_same_table(world, backbone, tmp_path):
    few = f"--backbone {backbone} --bf16 false --max_steps 2 --per_device_train_batch_size 4"
    few += " --batch_sampler batch_sampler"
    names = ["CITADEL", "static keys", "no balance", "MaxSim, trained alike"]
    flags = [*world, "--tier", "finetuned", "--systems", *names, "--rivals", "hierarchical", "--seeds", "0"]
    flags += ["--tuning_steps", "0", "--flags", few]
    run(*flags)
    results = json.loads((tmp_path / "citadel-finetuned.json").read_text())
    claims = {claim["claim"].removeprefix("citadel."): claim for claim in results["claims"]}
    assert {claim["tier"] for claim in results["claims"]} == {"finetuned"} and "posthoc_retention" not in claims
    kept = value(results, "CITADEL") / value(results, "MaxSim, trained alike")
    assert claims["retention"]["value"] == pytest.approx(kept)
    gain = 100 * (value(results, "CITADEL") - value(results, "static keys"))
    assert claims["gain_over_static"]["value"] == pytest.approx(gain) and claims["index_exact"]["value"] == 1
    ratio = value(results, "CITADEL", "longest_list") / value(results, "no balance", "longest_list")
    assert claims["largest_list_ratio"]["value"] == pytest.approx(ratio)
    size = value(results, "CITADEL", "entries_per_document") * (32 * 2 + 4) + 32 * 2  # and the vector of the whole
    assert value(results, "CITADEL", "bytes_per_document") == pytest.approx(size)
    assert "train_runtime" not in run(*flags).stdout


@pytest.mark.parametrize("whole", [0, 4])
@pytest.mark.parametrize("size", [50.0, 300.0])
def test_rows_of_fewer_bytes_are_what_an_index_of_them_finds(study, size, whole, tmp_path):
    queries, documents = drawn(6, 1, whole=whole), drawn(40, 2, whole=whole)
    kept, threshold = study.within(documents, size)
    coarse, stored = study.eight_bits(kept)
    each = 8 + 8  # numbers of a byte; a scale and a document
    assert stored == pytest.approx(kept.offsets[-1] * each / 40 + 2 * whole) and stored <= size
    if size == 50:
        assert stored + each / 40 > size and threshold > 0
        np.testing.assert_array_equal(kept.values, kept_above(documents, threshold).values)
    else:  # there is room for all
        assert (kept, threshold) == (documents, 0.0)
    index = open_index(f"routed:{tmp_path}/index?precision=int8&threshold={threshold}")
    index.add([Shard(ids_of(documents), documents, origin(sentence_dim=whole))])
    found = scores_in(index.search(queries, 40), ids_of(documents))
    np.testing.assert_allclose(found, looped(queries, coarse, True), rtol=1e-5, atol=1e-5)
    said, lists = index.statistics(), study.lists_of(kept)
    assert lists == {name: said[name] for name in lists} and len(lists) == 4


def test_a_map_of_token_vectors_is_a_product_with_each(study):
    side = in_memory(np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32), np.array([0, 4, 9]))
    axes = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.5, 0.0, 0.0, 2.0]])
    found = study.projected(side, axes, np.float32)
    np.testing.assert_allclose(found.values, side.values @ axes.numpy().T, rtol=1e-6)
    assert found.dim == 2 and found.offsets is side.offsets and found.kind == "tokens"


def test_words_of_cached_vectors_are_those_of_their_tokens(study, backbone):
    texts = {"a": "list the open ports", "b": "print: a file"}
    for model, refused in ((late_model(backbone), False), (late_model(backbone, ":"), True)):
        vectors = model.encode_document(list(texts.values()))
        offsets = np.cumsum([0, *map(len, vectors)])
        cached = in_memory(np.concatenate([np.asarray(v) for v in vectors]), offsets)
        bench: Any = SimpleNamespace(model=model, documents=cached, name="tiny", args=SimpleNamespace(backbone="late"))
        bench.split = lambda _: SimpleNamespace(corpus=texts)
        if refused:  # a colon of a document has no vector
            with pytest.raises(InputError, match="which words they are of is not known.*Leave 'static keys' out"):
                study.Bench.own_words(bench, "documents")
            continue
        ids = study.Bench.own_words(bench, "documents")
        assert ids.tolist() == [i for text in texts.values() for i in model.tokenizer(text)["input_ids"]]
        side = study.WordSide(cached, ids=ids)
        found = side.features(np.array([1, 0]))
        for row, text in enumerate((1, 0)):
            length = offsets[text + 1] - offsets[text]
            assert found["attention_mask"][row].sum() == length
            assert found["input_ids"][row, :length].tolist() == ids[offsets[text] : offsets[text + 1]].tolist()
            np.testing.assert_array_equal(found["token_embeddings"][row, :length], vectors[text])


@pytest.mark.parametrize("share", ["3/2", "0/2", "1", "one/2"])
def test_a_share_that_is_none_is_refused(text, share):
    with pytest.raises(InputError, match=f"--fit_only {share}: names no share of the fits"):
        text.shared(share)
    assert text.shared("2/3") == (1, 3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tier", "other"], "--tier other: unknown. There are frozen, finetuned"),
        (["--systems", "CITADEL", "x"], "--systems x: unknown. There are 'CITADEL'"),
        (["--systems", "static keys"], "'CITADEL' is missing"),
        (["--rivals", "x"], "--rivals x: unknown. There are 'ReinPool'"),
        (["--fit_only", "1/2"], "without --chosen each process would fit all"),
        (["--chosen", "bad.json"], "has no setting of 'CITADEL' that is among those tried in the tier frozen"),
    ],
)
def test_what_cannot_be_measured_is_refused(text, world, flags, words, tmp_path, monkeypatch):
    (tmp_path / "bad.json").write_text('{"chosen": {"CITADEL": "1e-9"}}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["citadel_text.py", *world, *flags])
    with pytest.raises(InputError, match=words):
        text.main()


def test_claims_compare_a_control_with_the_same_seeds(text):
    """The method's first seed is a point better than its control, the others are not measured against it."""
    asked = []

    def ndcg(system: str, setting: str, seeds: list[int], split: str) -> dict[str, np.ndarray]:
        asked.append((system, tuple(seeds)))
        return {"one": np.full(9, 0.51 if system == "CITADEL" else 0.5)}

    args = SimpleNamespace(tier="frozen", ablation_seeds=[4], rivals=[])
    benches = [SimpleNamespace(name="one")]
    study = SimpleNamespace(args=args, fitted=["CITADEL", "static keys"], ndcg=ndcg, benches=benches)
    tests = {"one": {"CITADEL": np.full(9, 0.9), "static keys": np.full(9, 0.5), "MaxSim": np.full(9, 1.0)}}
    claims = {claim["claim"]: claim for claim in text.quality_claims(study, tests, "1e-3")}
    assert claims["citadel.gain_over_static"]["value"] == pytest.approx(1)
    assert asked == [("CITADEL", (4,)), ("static keys", (4,))]
    assert claims["citadel.posthoc_retention"]["value"] == pytest.approx(0.9)
    assert not claims["citadel.posthoc_retention"]["met"] and claims["citadel.gain_over_static"]["met"]
