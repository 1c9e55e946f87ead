"""Every folder that polyrep saves, in the hands of somebody who knows transformers and sentence-transformers alone.

``python tests/test_doors.py`` renews the table of docs/doors.md.
"""

from __future__ import annotations

import fcntl
import io
import json
import pickle
import shutil
import sys
import tempfile
from contextlib import chdir, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warm
from conftest import DOCUMENTS, QRELS, QUERIES, ROOT, run_python, write_beir
from doors_script import OTHER_RANKINGS, arrays, distance
from room_examples import EXAMPLES
from small_models import write_backbone

import polyrep
from polyrep.evaluation.evaluate import evaluate
from polyrep.registry import ROOMS

PAGE = ROOT / "docs" / "doors.md"
BEGIN, END = "<!-- python tests/test_doors.py -->\n", "<!-- end -->"

DOORS = {
    "family": "its class of sentence-transformers",
    "automodel": "`AutoModel`",
    "named_folder": "a relative path, blanks and dots",
    "save": "`save_pretrained`",
    "deepcopy": "`copy.deepcopy`",
    "bfloat16": "`dtype=torch.bfloat16`",
    "eager_attention": '`attn_implementation="eager"`',
    "max_seq_length": "`max_seq_length`",
    "device_map": "`device_map`",
    "compile": "`torch.compile`",
    "pool": "`start_multi_process_pool`",
    "normalize": "`normalize_embeddings=True`",
    "evaluator": "`InformationRetrievalEvaluator`",
    "trainer": "its trainer",
    "lora": "a LoRA adapter",
    "langchain": "LangChain",
    "llama_index": "LlamaIndex",
}
"""What tests/doors_script.py tries -> its row in the table."""


@dataclass(repr=False)
class Tried:
    """What came of it.

    Attributes:
        report: ``method/kind`` -> door -> what tests/doors_script.py says.
        expected: ``method/kind`` -> the vectors of the model in memory.
        measured: ``method/kind`` -> nDCG@10 and MRR@10 of ``polyrep evaluate``.
        folders: ``method/kind`` -> the folder.
    """

    report: dict[str, dict[str, Any]]
    expected: dict[str, dict[str, list[np.ndarray]]]
    measured: dict[str, dict[str, float]]
    folders: dict[str, Path]

    def fault(self, name: str, door: str) -> str:
        """What is wrong with a door of a folder; empty if nothing is."""
        said = self.report[name][door]
        if door == "family" and isinstance(said, dict):
            found = {task: [np.array(vector) for vector in some] for task, some in said.items()}
            far = distance(found, self.expected[name])
            return "" if far <= 1e-5 else f"vectors differ by {far:.2g} of their length"
        if door == "evaluator" and isinstance(said, dict):
            return "" if said == pytest.approx(self.measured[name]) else f"{said}, not {self.measured[name]}"
        return "" if said in ("yes", None) or self.told(name, door) else str(said)

    def told(self, name: str, door: str) -> str:
        """Why a folder does not open, or that it ranks otherwise, where it may; empty if it does not say so."""
        said = str(self.report[name][door])
        may = door == "normalize" or door == "automodel" and self.modules(name) > 1
        if not may or said == OTHER_RANKINGS:
            return said if may else ""
        if not said.startswith("ValueError: "):
            return ""
        sentence = said.replace(str(self.folders[name]), "the folder").split(". ")[0]
        return f"refused: {sentence.split(': ', 2)[-1]}"

    def modules(self, name: str) -> int:
        return len(json.loads((self.folders[name] / "modules.json").read_text()))

    def cell(self, method: str, door: str) -> str:
        """What the table says of a door of a method."""
        kinds: dict[str, list[str]] = {}
        for name, doors in self.report.items():
            if name.startswith(f"{method}/") and doors[door] is not None:
                said = self.told(name, door) or ("no" if self.fault(name, door) else "yes")
                kinds.setdefault(said, []).append(name.partition("/")[2])
        if len(kinds) < 2:
            return "".join(kinds) or "—"
        return "; ".join(f"{', '.join(of)}: {said}" for said, of in kinds.items())


def try_all(root: Path) -> Tried:
    """Save every example, and try every door of it in a process without polyrep."""
    backbone, folders, expected = write_backbone(root / "backbone"), {}, {}
    for method, build in EXAMPLES.items():
        (root / "examples" / method).mkdir(parents=True)
        for kind, model in build(backbone, root / "examples" / method).models.items():
            name = f"{method}/{kind}"
            folders[name] = polyrep.save(model, root / f"{method}-{kind}")
            expected[name] = {
                "query": arrays(model.encode_query(list(QUERIES.values()))),
                "document": arrays(model.encode_document(list(DOCUMENTS.values()))),
            }
    job = {
        "folders": {name: str(folder) for name, folder in folders.items()},
        "queries": QUERIES,
        "corpus": DOCUMENTS,
        "qrels": QRELS,
        "scratch": str(root / "scratch"),
        "python": sys.executable,
        "report": str(root / "report.json"),
    }
    (root / "job.json").write_text(json.dumps(job))
    ran = run_python(str(Path(__file__).with_name("doors_script.py")), str(root / "job.json"), cwd=root, timeout=900)
    assert ran.returncode == 0, ran.stderr[-3000:]
    flags = ["--dataset", write_beir(root / "tiny"), "--baselines", "none", "--dtype", "float32"]
    with chdir(root), redirect_stdout(io.StringIO()):  # caches go where it runs
        rows = evaluate([*map(str, [*folders.values(), *flags])])["rows"]
    measured: dict[str, dict[str, float]] = {name: {} for name in folders}
    for name, folder in folders.items():
        for metric, title in (("ndcg", "nDCG@10"), ("mrr", "MRR@10")):
            [measured[name][metric]] = [
                row["value"] for row in rows if (row["system"], row["metric"]) == (folder.name, title)
            ]
    return Tried(json.loads((root / "report.json").read_text()), expected, measured, folders)


@pytest.fixture(scope="module")
def tried() -> Tried:
    """Tried by one worker of a session, while others wait for it."""
    root = warm.FOLDER / "doors"
    with (warm.FOLDER / "doors.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "tried").exists():
            shutil.rmtree(root, ignore_errors=True)  # of a worker that failed
            root.mkdir()
            made = pickle.dumps(try_all(root))
            (root / "tried").write_bytes(made)
        return pickle.loads((root / "tried").read_bytes())


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("method", EXAMPLES)
def test_a_folder_opens_through_every_door(tried, method, door):
    names = [name for name in tried.report if name.startswith(f"{method}/")]
    assert names
    if not all(door in tried.report[name] for name in names):
        pytest.skip(f"{DOORS[door]} is not installed")
    assert not {name: fault for name in names if (fault := tried.fault(name, door))}


def table(tried: Tried, page: str) -> str:
    """The table of the page; the row of what is not installed here stays as it is, by its columns."""
    methods = [method for method, room in ROOMS.items() if room.package.startswith("polyrep.")]
    packages = [ROOMS[method].package.rpartition(".")[2] for method in methods]
    titles = [  # a package may have two models, each with a folder of its own
        method.removeprefix("polyrep_") if package in packages[:place] else package
        for place, (method, package) in enumerate(zip(methods, packages, strict=True))
    ]
    rows = [["door", *titles], ["---"] * (len(methods) + 1)]
    before = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in page.splitlines() if line[:2] == "| "
    ]
    columns = next((row for row in before if row[0] == "door"), [])
    kept = {row[0]: dict(zip(columns, row, strict=False)) for row in before}
    for door, title in DOORS.items():
        if all(door in doors for doors in tried.report.values()):
            rows.append([title, *(tried.cell(method, door) for method in methods)])
        elif title in kept:
            rows.append([title, *(kept[title].get(name, "not tried") for name in titles)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def inserted(page: str, made: str) -> str:
    """The page with the table between its marks."""
    head, _, rest = page.partition(BEGIN)
    return head + BEGIN + made + END + rest.partition(END)[2]


def test_the_table_of_docs_doors_is_what_was_tried(tried):
    page = PAGE.read_text(encoding="utf-8")
    assert inserted(page, table(tried, page)) == page, "run python tests/test_doors.py"


def test_a_cell_tells_what_opens_what_refuses_and_what_fails(tmp_path):
    folders = {name: tmp_path / name.replace("/", "-") for name in ("m/one", "m/two", "other/one")}
    for number, folder in enumerate(folders.values(), start=1):
        folder.mkdir()
        (folder / "modules.json").write_text(json.dumps([{}] * number))
    refusal = f"ValueError: Head: {tmp_path}/m-two has two modules, so none is the model. Use the other door."
    said = {"normalize": "yes", "automodel": refusal, "pool": None, "lora": "yes", "save": "yes"}
    report = {"m/one": {**said, "lora": "ValueError: Head: no.", "automodel": "yes"}, "m/two": said, "other/one": said}
    tried = Tried(report, {}, {}, folders)
    assert {door: tried.cell("m", door) for door in said} == {
        "normalize": "yes",
        "automodel": "one: yes; two: refused: the folder has two modules, so none is the model",
        "pool": "—",
        "lora": "one: no; two: yes",
        "save": "yes",
    }
    assert tried.fault("m/one", "lora") == "ValueError: Head: no." and not tried.fault("m/two", "automodel")
    report["m/one"]["automodel"] = refusal  # of a folder whose one module could be the model
    assert tried.fault("m/one", "automodel") == refusal


def test_a_row_of_what_is_not_installed_keeps_its_columns():
    page = "| door | lemur | gaussian |\n| --- | --- | --- |\n| LangChain | yes | one: yes; two: no |\n"
    made = {
        line.split(" | ")[0]: line.strip("| ").split(" | ")
        for line in table(Tried({"m/one": {}}, {}, {}, {}), page).splitlines()
    }
    found = dict(zip(made["| door"], made["| LangChain"], strict=True))
    assert (found["lemur"], found["gaussian"], found["multilayer"]) == ("yes", "one: yes; two: no", "not tried")


def test_the_page_says_of_every_door_what_it_is_for():
    page = PAGE.read_text(encoding="utf-8").partition(END)[2]
    assert [title for title in DOORS.values() if f"- **{title}**: " not in page] == []


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found, before = try_all(Path(folder)), PAGE.read_text(encoding="utf-8")
        PAGE.write_text(inserted(before, table(found, before)), encoding="utf-8")
        for name, doors in found.report.items():
            for door in doors:
                if fault := found.fault(name, door):
                    print(f"{name}, {DOORS[door]}: {fault}")
