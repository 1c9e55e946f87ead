"""The benchmarks of MetaEmbed run whole, on a small world and tiny models, and what they claim follows from values."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoModel, AutoTokenizer, BertConfig
from world import write_world

from polyrep import InputError
from polyrep.data import load_retrieval_dataset
from polyrep.evaluation.frontier import pooling
from polyrep.evaluation.metrics import METRICS

SIZES = {"train": 12, "dev": 6, "test": 8}
LADDER = (1, 2, 4, 8, 16, 32)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The benchmarks, which import each other by name, can be imported."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small data set."""
    return str(write_world(tmp_path_factory.mktemp("data") / "small", sizes=SIZES))


@pytest.fixture(scope="module")
def late(multi_vector_model, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny late-interaction model."""
    folder = tmp_path_factory.mktemp("late")
    multi_vector_model.save_pretrained(str(folder))
    return str(folder)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a benchmark in this process and gives what it says."""

    def run(benchmark: Any, *flags: str) -> str:
        monkeypatch.setattr("sys.argv", [f"{benchmark.__name__}.py", *flags])
        capsys.readouterr()
        benchmark.main()
        return capsys.readouterr().out

    return run


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what BM25, which is never kept, takes another time for."""
    return [{k: v for k, v in row.items() if not k.startswith(("search_ms", "encode_docs"))} for row in rows]


@pytest.fixture(scope="module")
def roomy(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model of one vector, with positions for 64 meta tokens behind a text."""
    folder = tmp_path_factory.mktemp("roomy")
    torch.manual_seed(3)
    AutoModel.from_config(BertConfig.from_pretrained(backbone, max_position_embeddings=160)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(folder)
    whole = SentenceTransformer(modules=[Transformer(str(folder)), Pooling(32, "mean")], device="cpu")
    whole.save_pretrained(str(folder / "whole"))
    return str(folder / "whole")


def written(path: Path) -> dict[str, Any]:
    """A JSON that a benchmark wrote."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_heads_of_a_frozen_model_are_chosen_and_measured_and_a_second_run_fits_nothing(
    data, late, tmp_path, ran, monkeypatch
):
    frozen, out = importlib.import_module("metaembed_frozen"), tmp_path / "out"
    tries = {system: [some[0], some[-1]] for system, some in frozen.TRIES.items()}  # of both kinds of queries
    monkeypatch.setattr(frozen, "TRIES", tries)
    small = functools.partial(pooling.token_batches, size=3)  # so that texts of several batches differ in length
    monkeypatch.setattr(pooling, "token_batches", small)
    flags = ["--datasets", data, "--backbone", late, "--cache_dir", str(tmp_path / "cache"), "--output", str(out)]
    flags += ["--seeds", "0", "1", "--systems", "MetaEmbed", "MetaEmbed not nested", "one vector"]
    # These flags stand behind the steps of tuning, so that all fits have two.
    flags += ["--tuning_steps", "1", "--flags", "--max_steps 2 --per_device_train_batch_size 4 --depth 3"]
    said = ran(frozen, *flags, "--dev", "--fit_only", "1/2")
    assert not out.exists() and said.count("train_runtime") == 2, "half of the fits, and no table"
    assert ran(frozen, *flags, "--dev").count("train_runtime") == 2, "the other half"
    dev = written(out / "metaembed-frozen-dev.json")
    found = {row["system"]: row["value"] for row in dev["rows"]}
    assert found.keys() == {f"{system}: {setting}" for system, some in tries.items() for setting in some}
    for system, some in tries.items():
        assert found[f"{system}: {dev['chosen'][system]}"] == max(found[f"{system}: {setting}"] for setting in some)
    table = [*flags, "--chosen", str(out / "metaembed-frozen-dev.json")]
    # Two seeds of MetaEmbed and of ReinPool, two slots, two ablations; MetaEmbed of the ablations' steps is of dev.
    assert ran(frozen, *table).count("train_runtime") == 8
    results = written(out / "metaembed-frozen.json")
    rows = {row["system"]: row for row in results["rows"] if row["metric"] == "nDCG@10"}
    ladders = ("MetaEmbed", "ReinPool", "hierarchical", "MetaEmbed not nested", "MetaEmbed at 1 steps")
    several = {f"{system}, {k}" for system in ladders for k in LADDER}
    singles = {"full MaxSim", "mean", "BM25", "one vector, 1", "ReinPool slots, 8", "ReinPool slots, 32"}
    assert rows.keys() == several | singles
    assert rows["MetaEmbed, 8"]["seeds"] == 2 and "seeds" not in rows["ReinPool slots, 8"]
    assert rows["MetaEmbed, 8"]["bytes_per_document"] == 8 * 16 * 2 + 8
    for system in ("MetaEmbed, 1", "ReinPool, 1", "hierarchical, 1"):
        assert rows[system]["bytes_per_document"] == 16 * 2, "one vector needs no offset"
    claims = {claim["claim"]: claim for claim in results["claims"]}
    margins = {f"{over}_{k}" for over in ("hierarchical", "reinpool") for k in LADDER} | {"slots_8", "slots_32"}
    others = {"gain_over_single", "mmr_gain_1", "mmr_cost_full", "monotone_steps", "prefix_error", "pairwise_cosine_8"}
    wanted = {f"metaembed.frozen_{name}" for name in others | {f"margin_over_{name}" for name in margins}}
    assert wanted | {"metaembed.head_fit_seconds"} == claims.keys() - {"metaembed.frozen_gap_closed_8"}
    over = rows["MetaEmbed, 4"]["value"] - rows["ReinPool, 4"]["value"]
    assert claims["metaembed.frozen_margin_over_reinpool_4"]["value"] == pytest.approx(100 * over)
    few = rows["MetaEmbed at 1 steps, 32"]["value"] - rows["one vector, 1"]["value"]
    assert claims["metaembed.frozen_gain_over_single"]["value"] == pytest.approx(100 * few)
    assert claims["metaembed.frozen_prefix_error"]["met"]
    assert (out / "metaembed-frozen.png").stat().st_size > 20_000
    assert "train_runtime" not in ran(frozen, *table)
    again = written(out / "metaembed-frozen.json")
    assert [untimed(again["rows"]), again["claims"]] == [untimed(results["rows"]), results["claims"]]


def test_trained_forms_are_chosen_and_measured_and_a_second_run_trains_nothing(
    data, roomy, tmp_path, ran, monkeypatch
):
    text, study = importlib.import_module("metaembed_text"), importlib.import_module("metaembed_study")
    for form in study.TRIES.keys() - {"MetaEmbed"}:
        monkeypatch.setitem(study.TRIES, form, study.TRIES[form][:1])
    out, lines = tmp_path / "out", tmp_path / "cache" / "metaembed-text.jsonl"
    flags = ["--datasets", data, "--backbone", roomy, "--cache_dir", str(tmp_path / "cache"), "--output", str(out)]
    flags += ["--seeds", "0", "--tries", "2", "--max_steps", "2", "--batch", "4"]
    flags += ["--max_length", "40", "--encoded_length", "60"]
    flags += ["--head_flags", "--max_steps 2 --per_device_train_batch_size 4 --depth 3"]
    with pytest.raises(InputError, match="--stage test: 'MetaEmbed' with .* has no row on dev yet.*Run --stage dev"):
        ran(text, *flags, "--stage", "test")
    said = ran(text, *flags, "--stage", "dev", "--time_budget", "0")
    assert said.count("train_runtime") == 1 and "run the same command again" in said
    # Another setting of MetaEmbed, one vector, the mean, late interaction, and ReinPool on the latter.
    said = ran(text, *flags, "--stage", "dev")
    assert said.count("train_runtime") == 5 and "all is done" in said
    with pytest.raises(InputError, match="--stage table: not nested: .* has no row yet.*Run --stage test"):
        ran(text, *flags, "--stage", "table")
    # Three more forms, and ReinPool with the steps of its run.
    said = ran(text, *flags, "--stage", "test")
    assert said.count("train_runtime") == 4 and "all is done" in said
    found = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    assert len(found) == 10
    assert "encode_overhead" in ran(text, *flags, "--stage", "costs")
    ran(text, *flags, "--stage", "table")
    results = written(out / "metaembed-text.json")
    rows = {row["system"]: row for row in results["rows"] if row["metric"] == "nDCG@10"}
    nested = ("MetaEmbed", "not nested", "without residual", "paper form", "ReinPool", "hierarchical")
    several = {f"{form}, {k}" for form in nested for k in LADDER} | {"paper form, 64"}
    assert rows.keys() == several | {"one vector", "mean + projection", "late interaction", "BM25"}
    width = 32  # of the encoder, which has none to spare for a projection
    assert rows["MetaEmbed, 8"]["bytes_per_document"] == 8 * width * 2 + 8
    assert rows["MetaEmbed, 1"]["bytes_per_document"] == rows["one vector"]["bytes_per_document"] == width * 2
    assert rows["MetaEmbed, 4"]["vectors_per_query"] == 2 and rows["MetaEmbed, 32"]["vectors_per_query"] == 8
    dev = results["dev"]["MetaEmbed"]
    best = max(dev, key=dev.get)
    assert list(dev) == study.TRIES["MetaEmbed"][:2] and f"MetaEmbed: --learning_rate {best}" in results["notes"][0]
    (row,) = (row for row in found if row["form"] == f"MetaEmbed: {best}")
    kept = row["datasets"]["small"]["test"]["MetaEmbed, 8"]["metrics"]["nDCG@10"]
    assert rows["MetaEmbed, 8"]["value"] == pytest.approx(np.mean(kept))
    claims = {claim["claim"].removeprefix("metaembed."): claim for claim in results["claims"]}
    ids = {"gain_over_single", "mmr_gain_1", "mmr_cost_full", "residual_gain", "monotone_steps", "prefix_error"}
    ids |= {f"margin_over_{other}_{k}" for other in ("hierarchical", "reinpool") for k in LADDER}
    ids |= {"pairwise_cosine_8", "encode_overhead", "search_ratio", "index_ratio", "step_memory_ratio"}
    assert claims.keys() - {"gap_closed_8"} == ids
    value = {name: row["value"] for name, row in rows.items()}
    for claim, ours, other in (
        ("gain_over_single", "MetaEmbed, 32", "one vector"),
        ("mmr_gain_1", "MetaEmbed, 1", "not nested, 1"),
        ("margin_over_reinpool_8", "MetaEmbed, 8", "ReinPool, 8"),
        ("residual_gain", "MetaEmbed, 32", "without residual, 32"),
    ):
        assert claims[claim]["value"] == pytest.approx(100 * (value[ours] - value[other])), claim
    size = rows["MetaEmbed, 32"]["bytes_per_document"] / rows["late interaction"]["bytes_per_document"]
    assert claims["index_ratio"]["value"] == pytest.approx(size)
    assert claims["prefix_error"]["met"], "an isolated prefix is a slice"
    assert claims["step_memory_ratio"]["value"] > 1, "40 meta tokens and their groups are more than 2"
    assert (out / "metaembed-text.png").stat().st_size > 20_000
    for stage in ("dev", "test", "table"):
        assert "train_runtime" not in ran(text, *flags, "--stage", stage)
    again = written(out / "metaembed-text.json")
    assert [untimed(again["rows"]), again["claims"]] == [untimed(results["rows"]), results["claims"]]


def arguments(benchmark: Any, **values: Any) -> Any:
    """Arguments of a benchmark, checked."""
    return benchmark.checked(benchmark.Arguments(**values))


def test_arguments_that_would_do_nothing_are_refused(tmp_path):
    frozen = importlib.import_module("metaembed_frozen")
    with pytest.raises(InputError, match="--systems no head: unknown.*'MetaEmbed'"):
        arguments(frozen, systems=["no head"])
    with pytest.raises(InputError, match="--ablation_seeds 7: not among --seeds 0 1"):
        arguments(frozen, seeds=[0, 1], ablation_seeds=[0, 7])
    with pytest.raises(InputError, match="--fit_only 1/2: what the table fits follows from.*Say --dev"):
        arguments(frozen, fit_only="1/2")
    assert arguments(frozen, fit_only="1/2", dev=True).dev
    for part in ("0/2", "3/2", "half", "1/", "1/2/3"):
        with pytest.raises(InputError, match=f"--fit_only '{part}'.*Write I/N"):
            frozen.fit_part([], [], part)
    path = tmp_path / "chosen.json"
    path.write_text(json.dumps({"chosen": {"MetaEmbed": frozen.TRIES["MetaEmbed"][0], "ReinPool": "1"}}))
    with pytest.raises(InputError, match="--chosen .*has no setting of 'ReinPool'.*Name the JSON"):
        frozen.read_choice(str(path))


def test_forms_and_stages_that_are_none_are_refused():
    text = importlib.import_module("metaembed_text")
    with pytest.raises(InputError, match="--stage final: unknown. There are dev, test, costs, table"):
        arguments(text, stage="final")
    with pytest.raises(InputError, match="--forms no form: unknown.*'paper form', 'ReinPool'"):
        arguments(text, forms=["no form", "MetaEmbed"])
    with pytest.raises(InputError, match="--tries 0: nothing would be there to choose"):
        arguments(text, tries=0)
    with pytest.raises(InputError, match="ReinPool pools the vectors of 'late interaction', which is not among"):
        arguments(text, forms=["MetaEmbed", "ReinPool"])
    with pytest.raises(InputError, match="--ablation_seeds 3: not among --seeds 0 1 2"):
        arguments(text, ablation_seeds=[3])


def test_a_row_of_several_seeds_is_their_mean_and_one_that_is_missing_is_named(data):
    text, study = importlib.import_module("metaembed_text"), importlib.import_module("metaembed_study")
    count = len(load_retrieval_dataset(data, "test").queries)
    jobs = [study.Job("MetaEmbed", "1", seed) for seed in (0, 1)]

    def found(seed: int) -> dict[str, Any]:
        metrics = {name: [0.2 + 0.4 * seed] * count for name in METRICS}
        entry = {"metrics": metrics, "costs": {"bytes_per_document": 6.0 + seed}}
        return {"datasets": {"small": {"test": {"MetaEmbed, 32": entry}}}}

    rows = {(job.key, job.seed): found(job.seed) for job in jobs}
    args = arguments(text, datasets=[data], seeds=[0, 1])
    made: Any = SimpleNamespace(
        found=rows, jobs=lambda stage: jobs, args=args, dataset=load_retrieval_dataset, forms=["MetaEmbed"]
    )
    table = text.Table(made)
    (row,) = (row for row in table.rows if row["system"] == "MetaEmbed, 32" and row["metric"] == "nDCG@10")
    assert row["value"] == pytest.approx(0.4) and row["seeds"] == 2 and row["bytes_per_document"] == 6.5
    kept = table.tests["small"]["MetaEmbed, 32"]
    assert {seed: set(values.tolist()) for seed, values in kept.items()} == {0: {0.2}, 1: {0.2 + 0.4}}
    del rows[jobs[1].key, 1]
    with pytest.raises(InputError, match="MetaEmbed: 1 with seed 1 has no row yet"):
        text.Table(made)


def test_a_row_depends_on_its_own_form_alone(data, tmp_path):
    study = importlib.import_module("metaembed_study")
    args = study.Arguments(datasets=[data], cache_dir=str(tmp_path))
    tier, key = study.tier_of(args), study.Job("MetaEmbed", study.TRIES["MetaEmbed"][0], 0).key
    study.Rows(args, tier).append({"form": key, "seed": 0, "split": "both", "datasets": {}})

    def kept(tier: Any, **values: Any) -> bool:
        return (key, 0) in study.Rows(dataclasses.replace(args, **values), tier).all("both")

    assert kept(tier) and kept(dataclasses.replace(tier, forms=tier.forms | {"another": ["--nested", "false"]}))
    assert not kept(dataclasses.replace(tier, forms=tier.forms | {key: ["--nested", "false"]}))
    assert not kept(dataclasses.replace(tier, forms={})), "a form that is not known any more"
    assert not kept(tier, encoded_length=100) and not kept(tier, max_steps=7)


def test_parts_of_the_fits_are_all_of_them_once():
    frozen = importlib.import_module("metaembed_frozen")
    made: list[tuple[str, Any]] = []

    class Bench:
        def __init__(self, name: str):
            self.name = name

        def fitted_head(self, fit: Any) -> None:
            made.append((self.name, fit))

    args = arguments(frozen)
    benches, chosen = [Bench(name) for name in "abc"], {system: tries[0] for system, tries in frozen.TRIES.items()}
    for fits in (frozen.tried_fits(args), list(frozen.table_fits(args, chosen))):
        made.clear()
        for part in ("1/2", "2/2"):
            frozen.fit_part(benches, fits, part)
        assert len(made) == len(set(made)) == 3 * len(fits)
    with pytest.raises(InputError, match="--tuning_steps 9: no fewer than --steps 9.*Use fewer"):
        arguments(frozen, steps=9, tuning_steps=9)
    few = f"{chosen['MetaEmbed']} --max_steps {args.tuning_steps}"
    assert frozen.Fit("MetaEmbed", few, 0) in frozen.tried_fits(args), "the ablations' control is there from dev"


def test_claims_compare_the_seeds_that_both_rows_have():
    claims = importlib.import_module("metaembed_claims")
    ours = {seed: np.full(5, 0.5 + 0.1 * seed) for seed in range(3)}
    tests = {name: {"ours": ours, "theirs": {2: np.full(5, 0.65)}, "none": {0: np.zeros(5)}} for name in "ab"}
    (claim,) = claims.gain("c", tests, "ours", "theirs", 4.0, by_value=True)
    assert claim["value"] == pytest.approx(5) and claim["met"] and claim["control"] == "theirs"
    assert claims.gain("c", tests, "ours", "missing") == []
    tests["b"]["ours"] = {2: np.full(5, 0.55)}
    (claim,) = claims.gain("c", tests, "ours", "theirs")
    assert claim["value"] == pytest.approx(-2.5) and not claim["met"]
    assert claim["by_dataset"] == {"a": pytest.approx(5), "b": pytest.approx(-10)}


def test_a_step_that_loses_much_and_a_gap_that_is_none_are_told():
    claims = importlib.import_module("metaembed_claims")

    def rows(*values: float) -> dict[str, dict[int, np.ndarray]]:
        return {f"M, {k}": {0: np.full(4, value)} for k, value in zip(LADDER, values, strict=True)}

    rising = rows(0.5, 0.501, 0.5, 0.6, 0.5985, 0.61)
    (claim,) = claims.monotone("m", {"a": rising}, "M")
    assert claim["value"] == 1 and claim["met"] and claim["worst_step"] == pytest.approx(-0.15)
    (claim,) = claims.monotone("m", {"a": rising, "b": rows(0.5, 0.5, 0.49, 0.5, 0.5, 0.5)}, "M")
    # Steps of the mean: +.05, -.55, +5.5, -.075, +.575 points.
    assert claim["value"] == pytest.approx(4 / 5) and not claim["met"] and claim["worst_step"] == pytest.approx(-0.55)
    tests = {"a": rising | {"low": {0: np.full(4, 0.4)}, "high": {0: np.full(4, 0.65)}}}
    (claim,) = claims.gap_closed("g", tests, "M, 8", "low", "high")
    assert claim["value"] == pytest.approx(0.8) and claim["met"]
    tests["b"] = rows(*[0.4] * 6) | {"low": {0: np.full(4, 0.4)}, "high": {0: np.full(4, 0.41)}}
    (claim,) = claims.gap_closed("g", tests, "M, 8", "low", "high")
    assert claim["by_dataset"].keys() == {"a"}
    assert claims.gap_closed("g", {"b": tests["b"]}, "M, 8", "low", "high") == []


def test_bytes_stand_above_the_picture(tmp_path):
    claims = importlib.import_module("metaembed_claims")
    plt = pytest.importorskip("matplotlib.pyplot")
    shown: list[Any] = []
    plt_close = plt.close

    def keep(figure: Any) -> None:
        shown.append([[text.get_text() for text in axis.child_axes[0].get_xticklabels()] for axis in figure.axes])
        plt_close(figure)

    row = {"metric": "nDCG@10", "interval": [0.3, 0.5], "value": 0.4, "dataset": "a"}
    rows = [row | {"system": f"M, {k}", "bytes_per_document": 256.0 * k + 8} for k in LADDER]
    results = {"rows": [*rows, row | {"system": "all"}]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plt, "close", keep)
        claims.draw(results, tmp_path / "picture.png", {"M": "C0", "of no row": "C1"}, {"all": "-"})
    assert shown == [[["256", "512", "1,024", "2,048", "4,096", "8,192"]]]
    assert (tmp_path / "picture.png").stat().st_size > 10_000
