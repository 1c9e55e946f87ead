"""The benchmarks of MetaEmbed run whole, on a small world and tiny models, and what they claim follows from values."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from world import write_world

from polyrep import InputError

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
