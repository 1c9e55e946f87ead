"""Results files: what is refused, what the table and the picture show, and that they appear whole or not at all."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import polyrep
from polyrep import InputError, report
from polyrep.report import check_results, draw, provenance, to_markdown, write_results

CLAIMS = [
    {"claim": "keeps its quality", "value": 0.97, "target": 0.95, "met": True},
    {"claim": "is quick", "value": 12.5, "target": 20, "met": False},
    {"claim": "just a number", "value": 3, "target": None, "met": None},
]


def row(system: str, value: float, metric: str = "nDCG@10", **more: Any) -> dict[str, Any]:
    return {"system": system, "dataset": "tiny", "split": "test", "metric": metric, "value": value} | more


def results(*rows: dict[str, Any], claims: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    default = [
        row("BM25", 0.5, interval=[0.4, 0.6], bytes_per_document=100.0, queries=1234),
        row("BM25", 0.25, metric="Recall@100"),
        row("model", 0.75, interval=[0.7, 0.8], bytes_per_document=1000.0, difference=0.25, p_value=0.0002),
    ]
    return {
        "name": "example",
        "command": "polyrep evaluate model --dataset tiny",
        "created": "2025-01-01T00:00:00Z",
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "hardware": "a processor, 2 threads",
        "versions": {"python": "3.11.7"},
        "seeds": [0],
        "settings_tried": 3,
        "models": {"model": "ab" * 32},
        "rows": list(rows) or default,
        "claims": copy.deepcopy(CLAIMS if claims is None else claims),
    }


def cells_of(markdown: str, first: str) -> list[list[str]]:
    """Cells of the rows of the table whose header starts with ``first``, header included."""
    lines = markdown.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} "))
    stop = lines.index("", start)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:stop] if "---" not in line]


# Layout


def test_results_as_they_should_be_are_accepted_and_every_field_is_needed():
    check_results(results())
    for name in results():
        lacking = {k: v for k, v in results().items() if k != name}
        with pytest.raises(InputError, match=f"results: field '{name}' is 'nothing'"):
            check_results(lacking)
        with pytest.raises(InputError, match=f"results: field '{name}'"):
            check_results(results() | {name: None})


@pytest.mark.parametrize("name", ["system", "dataset", "split", "metric", "value"])
def test_every_row_needs_its_fields(name):
    broken = results()
    del broken["rows"][1][name]
    with pytest.raises(InputError, match=rf"rows\[1\]: field '{name}' is 'nothing'"):
        check_results(broken)
    broken["rows"][1][name] = ["0.5"]
    with pytest.raises(InputError, match=rf"rows\[1\]: field '{name}' is \['0.5'\]"):
        check_results(broken)


@pytest.mark.parametrize("name", ["claim", "value", "target", "met"])
def test_every_claim_needs_its_fields(name):
    broken = results()
    del broken["claims"][2][name]
    with pytest.raises(InputError, match=rf"claims\[2\]: field '{name}'"):
        check_results(broken)
    broken["claims"][2][name] = ["?"]
    with pytest.raises(InputError, match=rf"claims\[2\]: field '{name}'"):
        check_results(broken)


@pytest.mark.parametrize(("target", "met"), [(0.5, None), (None, True), (None, False)])
def test_a_claim_with_a_target_says_whether_it_is_met(target, met):
    with pytest.raises(InputError, match="'it works': target and met"):
        check_results(results(claims=[{"claim": "it works", "value": 0.6, "target": target, "met": met}]))


@pytest.mark.parametrize("entry", ["a row", 3, None, []])
def test_a_row_that_is_no_object_is_refused(entry):
    with pytest.raises(InputError, match=re.escape(f"rows[3]: field 'system' is {entry!r}")):
        check_results(results() | {"rows": [*results()["rows"], entry]})


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.json")), ids=lambda path: path.stem)
def test_published_results_obey_the_layout(path):
    published = json.loads(path.read_text(encoding="utf-8"))
    check_results(published)
    assert published["name"] == path.stem


# Table


def test_the_best_system_comes_first_also_if_it_looks_equal():
    rows = [row("low", 0.1), row("second", 0.71236, interval=[0.7, 0.8]), row("first", 0.71244, interval=[0.6, 0.8])]
    table = cells_of(to_markdown(results(*rows)), "system")
    assert [cells[0] for cells in table] == ["system", "first", "second", "low"]
    assert table[1][1] == "0.712 [0.600, 0.800]"


def test_the_table_has_the_columns_that_anything_is_in():
    header, model, bm25 = cells_of(to_markdown(results()), "system")
    assert header == ["system", "nDCG@10", "Recall@100", "difference", "bytes/doc"]
    assert model == ["model", "0.750 [0.700, 0.800]", "", "+0.250 (p < 0.001)", "1,000"]
    assert bm25 == ["BM25", "0.500 [0.400, 0.600]", "0.250", "", "100"]
    assert "## tiny, test (1,234 queries)" in to_markdown(results())


def test_other_measurements_than_quality_are_shown_as_they_are_called():
    seconds, joules = row("model", 12.3456, metric="seconds"), row("model", 7.0, metric="joules")
    assert cells_of(to_markdown(results(seconds, joules)), "system")[1:] == [["model", "12.35", "7"]]
    mixed = cells_of(to_markdown(results(seconds, row("BM25", 0.5))), "system")
    assert mixed == [["system", "nDCG@10", "seconds"], ["BM25", "0.500", ""], ["model", "", "12.35"]]


def test_how_a_system_was_set_is_said_below_the_tables():
    english, german = ({"settings": {"language": code, "stop_words": 3}} for code in ("en", "de"))
    rows = [row("BM25", 0.5) | english, row("BM25", 0.5) | english | {"dataset": "large"}]
    markdown = to_markdown(results(*rows, row("BM25", 0.5) | german | {"dataset": "other"}))
    assert re.findall("^BM25: .*$", markdown, re.M) == [
        "BM25: language en, stop words 3 (tiny, large).",
        "BM25: language de, stop words 3 (other).",
    ]
    with pytest.raises(InputError, match="field 'settings' is 'en'"):
        check_results(results(row("BM25", 0.5) | {"settings": "en"}))


def test_each_data_set_and_split_has_a_table():
    other = [row("BM25", 0.9) | {"dataset": "large"}, row("BM25", 0.8) | {"split": "dev"}]
    markdown = to_markdown(results(row("BM25", 0.5), *other))
    assert re.findall("^## (.*)$", markdown, re.M) == ["tiny, test", "large, test", "tiny, dev"]
    assert re.findall(r"^\| BM25 \| (\S+) \|$", markdown, re.M) == ["0.500", "0.900", "0.800"]


def test_claims_are_listed_with_target_and_verdict():
    table = cells_of(to_markdown(results()), "claim")
    assert table[1:] == [
        ["keeps its quality", "0.97", "0.95", "True"],
        ["is quick", "12.5", "20", "False"],
        ["just a number", "3", "", "None"],
    ]
    assert "| claim |" not in to_markdown(results(claims=[]))


def test_the_table_says_where_its_numbers_come_from():
    content = results()
    for dirty in ("", "-dirty"):
        markdown = to_markdown(content | {"commit": content["commit"] + dirty})
        assert f"commit {content['commit'][:12]}{dirty}, " in markdown
    assert f"`{content['command']}`" in markdown and content["hardware"] in markdown
    assert "seeds [0], settings tried: 3." in markdown
    assert f"model: fingerprint {content['models']['model'][:16]} " in markdown


# Picture


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(2**24)) > 3  # not blank
        return image.size


def test_the_picture_has_a_panel_for_each_data_set(tmp_path):
    draw(results(), tmp_path / "one.png")
    second = [r | {"dataset": "large"} for r in results()["rows"][2:]]  # without BM25
    draw(results(*results()["rows"], *second), tmp_path / "two.png")
    third = [r | {"dataset": "huge"} for r in second]
    draw(results(*results()["rows"], *second, *third), tmp_path / "three.png")
    sizes = [size_of(tmp_path / f"{name}.png") for name in ("one", "two", "three")]
    (width, height), (wider, same), (_, higher) = sizes
    # Inches a panel, at 144 dots an inch; a third panel starts a second row, and a dot is cut.
    assert (wider - width, same - height) == (4.5 * 144, 0) and abs(higher - same - 3.2 * 144) <= 1


def test_equal_values_have_an_interval_of_length_zero(tmp_path):
    from polyrep.evaluation.statistics import bootstrap_interval

    values = np.full(37, 1 / np.log2(3))
    alike = row("alike", float(values.mean()), interval=list(bootstrap_interval(values)), bytes_per_document=10.0)
    draw(results(alike), tmp_path / "alike.png")
    assert size_of(tmp_path / "alike.png")[0] > 0


# Files


def test_three_files_are_written_and_the_table_is_returned(tmp_path):
    markdown = write_results(results(), tmp_path / "new" / "folder")
    names = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert names == {"example.json", "example.md", "example.png"}
    assert json.loads((tmp_path / "new" / "folder" / "example.json").read_text(encoding="utf-8")) == results()
    assert (tmp_path / "new" / "folder" / "example.md").read_text(encoding="utf-8") == markdown
    assert size_of(tmp_path / "new" / "folder" / "example.png")[0] > 0


@pytest.mark.parametrize(
    "rows", [[row("a", 0.5)], [row("a", 3.0, metric="seconds", bytes_per_document=9.0)]], ids=["no size", "no quality"]
)
def test_without_anything_to_draw_there_is_no_picture(tmp_path, rows):
    write_results(results(*rows), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"example.json", "example.md"}


def test_files_of_other_results_stay(tmp_path):
    write_results(results() | {"name": "other"}, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_results(results(), tmp_path)
    assert before.items() < {path.name: path.read_bytes() for path in tmp_path.iterdir()}.items()


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert write_results(results(), None) == to_markdown(results())
    assert list(tmp_path.iterdir()) == []


def broken_draw(results: dict[str, Any], path: Path) -> None:
    path.write_bytes(b"half a pict")
    raise OSError("no space left on device")


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("fault", ["draw", "nan", "infinity", "field"])
def test_after_a_failure_the_folder_is_as_it_was(tmp_path, monkeypatch, fault, existing):
    output = tmp_path / "results"
    if existing:
        write_results(results(), output)
    before = {path: path.read_bytes() for path in output.rglob("*")}
    content = results(row("changed", 0.9, bytes_per_document=7.0))
    if fault == "draw":
        monkeypatch.setattr(report, "draw", broken_draw)
    elif fault == "field":
        del content["rows"]
    else:
        content["rows"][0]["value"] = float(fault)
    with pytest.raises((OSError, ValueError), match="no space|JSON compliant|field 'rows'"):
        write_results(content, output)
    assert {path: path.read_bytes() for path in output.rglob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["results"] * existing  # hidden files count too


# Provenance


def test_provenance_has_every_field_that_results_need():
    found = provenance("polyrep evaluate 'a b'")
    check_results(results() | found)
    assert set(found) == {"command", "created", "commit", "hardware", "versions"}
    assert found["command"] == "polyrep evaluate 'a b'"
    age = datetime.now(UTC) - datetime.strptime(found["created"], "%Y-%m-%dT%H:%M:%S%z")
    assert -1 <= age.total_seconds() < 3600
    assert torch.__version__.startswith(found["versions"]["torch"])  # without +cpu
    assert found["versions"]["polyrep"] == polyrep.__version__
    assert {"python", "transformers", "sentence-transformers", "datasets", "accelerate"} < set(found["versions"])
    assert f", {torch.get_num_threads()} threads" in found["hardware"] and not found["hardware"].startswith(",")


def test_the_commit_is_that_of_the_code_wherever_it_runs(tmp_path, monkeypatch):
    git = ["git", "-C", str(Path(polyrep.__file__).parent), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    monkeypatch.chdir(tmp_path)
    assert provenance("")["commit"].removesuffix("-dirty") == (head or "unknown")


def test_without_git_the_commit_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance("")["commit"] == "unknown"


def test_a_package_that_is_not_installed_is_absent(monkeypatch):
    def version(name: str) -> str:
        if name == "accelerate":
            raise report.importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(report.importlib.metadata, "version", version)
    versions = provenance("")["versions"]
    assert versions["accelerate"] == "absent" and versions["torch"] == "1.0"
