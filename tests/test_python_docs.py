"""The documentation of installed packages as a data set: what is read, what not, and what imports may not do."""

from __future__ import annotations

import json
import queue
import re
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import PATIENCE

from polyrep import InputError
from polyrep.cli import main
from polyrep.data import load_retrieval_dataset
from polyrep.data.named import cache_folder, located
from polyrep.data.python_docs import arranged, python_docs, read_package, summary_and_text

LONG = "This paragraph has more than the twelve words that a text of this corpus needs to be a document."


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an importable package ``lanterns``, which tests fill."""
    folder = tmp_path / "site" / "lanterns"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setenv("PYTHONPATH", str(folder.parent))
    sys.modules.pop("lanterns", None)
    return folder


def source(text: str) -> str:
    return textwrap.dedent(text).replace("LONG", LONG)


def names(rows: list[dict[str, str]]) -> list[str]:
    return sorted(row["name"] for row in rows)


def test_each_public_object_is_there_once_under_the_shortest_of_its_names(package):
    (package / "__init__.py").write_text(
        source('''
            """Light the harbour."""
            from json import dumps  # of another package
            from .deep import Lamp, kindle
            from ._hidden import snuff
            light = kindle
        ''')
    )
    (package / "_hidden.py").write_text('def snuff():\n    """Put it out."""\n')
    (package / "deep.py").write_text(
        source('''
            class Base:
                """What burns."""
                def burn(self):
                    """Burn slowly."""
                def _own(self):
                    """Not for others."""
            class Lamp(Base):
                """A lamp that hangs."""
                def burn(self):
                    pass
                @property
                def oil(self):
                    """What is left."""
                @classmethod
                def made(cls):
                    """Another one."""
            class Bare(Base):
                pass
            def kindle():
                """Make it burn."""
            constant = 3
        ''')
    )
    rows, passed_over = read_package("lanterns", 60)
    assert not passed_over
    assert names(rows) == [
        "lanterns",
        "lanterns.Lamp",
        "lanterns.Lamp.made",
        "lanterns.Lamp.oil",
        "lanterns.deep.Base",
        "lanterns.deep.Base.burn",
        "lanterns.kindle",
        "lanterns.snuff",
    ]
    of = {row["name"]: row for row in rows}
    assert of["lanterns.Lamp.oil"]["class"] == of["lanterns.Lamp"]["class"] == "lanterns.Lamp"
    assert of["lanterns.kindle"] == {"name": "lanterns.kindle", "class": "", "doc": "Make it burn."}


class Impatient(queue.Queue):
    """Waits a second for the module that hangs, and for any other as long as a busy machine may take."""

    last = b""

    def get(self, timeout: float) -> bytes:  # type: ignore[override]
        self.last = super().get(timeout=1 if b"hangs" in self.last else PATIENCE)
        return self.last


def test_modules_that_print_raise_hang_or_end_the_process_spoil_nothing(package, monkeypatch):
    used = SimpleNamespace(SimpleQueue=Impatient, Empty=queue.Empty)
    monkeypatch.setattr(sys.modules[read_package.__module__], "queue", used)
    (package / "good.py").write_text('def lit():\n    """It is lit."""\n')
    (package / "prints.py").write_text(
        'import os, sys\nprint("{}")\nos.write(1, b"x")\nprint("x", file=sys.stderr)\ndef said():\n    """Said."""\n'
    )
    (package / "raises.py").write_text("raise RuntimeError('no lamp here')")
    (package / "exits.py").write_text("import sys\nsys.exit(3)")
    (package / "ends.py").write_text("import os\nos._exit(0)")
    (package / "hangs.py").write_text("import time\ntime.sleep(1000)")
    rows, passed_over = read_package("lanterns", 5)
    assert names(rows) == ["lanterns.good.lit", "lanterns.prints.said"]
    assert passed_over["lanterns.raises"] == "RuntimeError: no lamp here"
    assert passed_over["lanterns.exits"] == "SystemExit: 3"
    assert "5 s" in passed_over["lanterns.hangs"] and "ended" in passed_over["lanterns.ends"]
    assert len(passed_over) == 4


FORBIDDEN = {
    "write": "open({outside!r}, 'w')",
    "append": "open({outside!r}, 'a')",
    "descriptor": "import os; os.open({outside!r}, os.O_CREAT | os.O_WRONLY)",
    "remove": "import os; os.remove({kept!r})",
    "folder": "import os; os.mkdir({outside!r})",
    "tree": "import shutil; shutil.rmtree({tree!r})",
    "over": "import os; open('x', 'w').write('x'); os.replace('x', {kept!r})",
    "link": "import os; open('x', 'w').write('x'); os.symlink('x', {outside!r})",
    "beside": "import os; os.open('outside', os.O_CREAT | os.O_WRONLY, dir_fd=os.open({parent!r}, os.O_RDONLY))",
    "unlink": "import os; os.unlink('kept', dir_fd=os.open({parent!r}, os.O_RDONLY))",
    "database": "import sqlite3; sqlite3.connect({outside!r})",
    "move": "import shutil; open('x', 'w').write('x'); shutil.move('x', {outside!r})",
    "program": "import subprocess; subprocess.run(['true'])",
    "system": "import os; os.system('true')",
    "spawn": "from multiprocessing.util import spawnv_passfds; spawnv_passfds(b'/bin/true', [b'true'], [])",
    "network": "import socket; socket.create_connection(('127.0.0.1', 9))",
    "name": "import socket; socket.gethostbyname('localhost')",
    "datagram": "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
}


def test_an_import_may_change_nothing_and_reach_nobody(package, tmp_path):
    outside, kept, tree = tmp_path / "outside", tmp_path / "kept", tmp_path / "tree"
    kept.write_text("mine")
    (tree / "deep").mkdir(parents=True)
    (tree / "deep" / "file").write_text("mine")
    places = {"outside": outside, "kept": kept, "tree": tree, "parent": tmp_path}
    for name, code in FORBIDDEN.items():
        (package / f"{name}.py").write_text(code.format(**{place: str(path) for place, path in places.items()}))
    (package / "scratch.py").write_text("open('here', 'w').write('x')\ndef made():\n    'Here.'\n")
    rows, passed_over = read_package("lanterns", 60)
    assert names(rows) == ["lanterns.scratch.made"]
    assert set(passed_over) == {f"lanterns.{name}" for name in FORBIDDEN}
    assert all("PermissionError" in why for why in passed_over.values()), passed_over
    assert not outside.exists() and kept.read_text() == "mine" and not Path("here").exists()
    assert (tree / "deep" / "file").read_text() == "mine"


def test_objects_that_raise_at_any_question_and_halves_of_letters_spoil_nothing(package):
    (package / "odd.py").write_text(
        source('''
            class Proxy:
                def __getattribute__(self, name):
                    raise RuntimeError("not now")
                def __call__(self):
                    pass
            proxy = Proxy()
            def half():
                """Half of a letter."""
            half.__doc__ = "Half of a letter \\ud800."
            class Own(dict):
                """A dictionary of our own."""
                def mine(self):
                    """What a dictionary has not."""
            class _Base:
                def shared(self):
                    """What a hidden base gives."""
            class Shown(_Base):
                """A class with a hidden base."""
        ''')
    )
    rows, passed_over = read_package("lanterns", 60)
    of = {row["name"]: row["doc"] for row in rows}
    assert not passed_over and of["lanterns.odd.half"] == "Half of a letter ?."
    assert {"lanterns.odd.Own.mine", "lanterns.odd.Shown.shared"} <= of.keys()
    assert "lanterns.odd.Own.items" not in of, "a dictionary's, and no word of this package"


@pytest.mark.parametrize(
    "doc, summary, text",
    [
        ("Open a lamp.\n\nMore of it.", "Open a lamp.", "More of it."),
        ("Open a\n  lamp.\n\nA\n\nB", "Open a lamp.", "A\n\nB"),
        ("kindle(x, y=1) -> Lamp\n\nMake it burn.\n\nMore.", "Make it burn.", "kindle(x, y=1) -> Lamp\n\nMore."),
        ("kindle(x)\nMake it burn.\n\nMore.", "Make it burn.", "kindle(x)\n\nMore."),
        ("kindle(\n    x,\n    y=(1, 2),\n)\n\nMake it burn.", "Make it burn.", "kindle(\n    x,\n    y=(1, 2),\n)"),
        ("a = kindle(x)\na = kindle(x, y)\n\nMake it burn.", "Make it burn.", "a = kindle(x)\na = kindle(x, y)"),
        ("Give :class:`~lanterns.Lamp` its ``oil``.", "Give Lamp its oil.", ""),
        ("Give [`~lanterns.Lamp`] *all* of it, x*y.", "Give Lamp all of it, x*y.", ""),
        ("=====\nLamps\n=====\n\nMore.", "Lamps", "More."),
        ("", "", ""),
    ],
)
def test_the_summary_is_a_line_without_markup_and_a_signature_stays_with_the_text(doc, summary, text):
    assert summary_and_text(doc) == (summary, text)


def row(name: str, summary: str, text: str = LONG, of_class: str = "") -> dict[str, str]:
    return {"name": name, "class": of_class, "doc": f"{summary}\n\n{text} {name}" if text else summary}


def test_short_texts_long_summaries_and_copies_are_left_out():
    rows = [
        row("a", "Light the lamp now"),
        row("b", "Light lamps now"),  # three words
        row("c", " ".join(["word"] * 31)),
        row("d", "Light the lamp later", text=""),
        row("e", "Light the other lamp"),
        row("e", "Light the other lamp again"),  # the name a second time
        {"name": "f", "class": "", "doc": f"Light a copied lamp\n\n{LONG} a"},  # the text of a
    ]
    documents, queries, judged = arranged(rows)
    assert list(documents) == ["a", "e"] and documents["a"] == ("a", f"{LONG} a")
    assert queries == {"q:a": "Light the lamp now", "q:e": "Light the other lamp"}
    assert sorted(sum(judged.values(), [])) == [("q:a", "a"), ("q:e", "e")]


def test_equal_summaries_are_one_query_and_all_that_shares_stands_in_one_split():
    rows = [
        row(f"p.C{number}.{part}", f"Do {part} as all classes do", of_class=f"p.C{number}")
        for number in range(40)
        for part in ("this", "that")
    ]
    rows += [row(f"p.D{n}.{part}", f"Do {part} in D{n} alone", of_class=f"p.D{n}") for n in range(40) for part in "xy"]
    _, queries, judged = arranged(rows)
    split_of = {document: split for split, pairs in judged.items() for _, document in pairs}
    assert len(queries) == 2 + 80 and len(split_of) == 160
    assert len({split_of[f"p.C{number}.{part}"] for number in range(40) for part in ("this", "that")}) == 1
    assert all(split_of[f"p.D{n}.x"] == split_of[f"p.D{n}.y"] for n in range(40))
    assert len({split_of[f"p.D{n}.x"] for n in range(40)}) == 3, "a hash assigns them"
    turned = arranged(list(reversed(rows)))[2]
    again = {document: split for split, pairs in turned.items() for _, document in pairs}
    assert again == split_of, "in whatever order they come"


def test_the_corpus_of_this_machine_is_what_its_page_says(capfd):
    """The whole, which takes 40 seconds of a core: the one test that every module of every package can be read."""
    sets = {split: load_retrieval_dataset("python_docs", split) for split in ("train", "dev", "test")}
    documents = sets["test"].corpus
    assert 8_000 <= len(documents) <= 14_000
    assert sets["test"].name == "python_docs"
    counts = {split: len(found.queries) for split, found in sets.items()}
    assert counts["train"] > 6_000 and counts["dev"] > 600 and counts["test"] > 600
    assert any(len(judged) > 1 for judged in sets["test"].qrels.values())
    for found in sets.values():
        assert all(4 <= len(query.split()) <= 30 for query in found.queries.values())
    whole = [json.loads(line) for line in (Path(located("python_docs")) / "corpus.jsonl").open(encoding="utf-8")]
    assert all(len(re.findall(r"\w+", row["text"])) >= 12 for row in whole)
    assert documents["json.dumps"].startswith("json.dumps If ``skipkeys`` is true")
    assert {"str.split", "numpy.argsort", "pandas.DataFrame.groupby", "torch.nn.Linear", "os.stat"} <= documents.keys()
    asked = {found.queries[q]: judged for found in sets.values() for q, judged in found.qrels.items()}
    assert asked["Group DataFrame using a mapper or by a Series of columns."].keys() == {"pandas.DataFrame.groupby"}
    assert not set().union(*(set(found.queries.values()) for found in [sets["train"]])) & set(
        sets["test"].queries.values()
    )
    for owner in (
        "str",
        "numpy.ndarray",
        "pandas.DataFrame",
        "torch.Tensor",
        "datasets.Dataset",
        "threading.Condition",
    ):
        splits = {
            split
            for split, found in sets.items()
            if any(name.startswith(f"{owner}.") for judged in found.qrels.values() for name in judged)
        }
        assert len(splits) == 1, f"{owner} in {splits}"
    made = json.loads((Path(located("python_docs")) / "provenance.json").read_text(encoding="utf-8"))
    assert made["documents"] == len(documents) and made["queries"] == counts
    assert made["packages"]["numpy"].startswith("numpy ") and re.fullmatch("[0-9a-f]{16}", made["fingerprint"])
    assert "asyncio.windows_events" in made["passed_over"] or sys.platform == "win32"
    capfd.readouterr()
    assert main(["data", "show", "python_docs"]) == 0
    said = capfd.readouterr().out
    assert made["fingerprint"] in said and "numpy 2" in said
    assert f"passed over ({len(made['passed_over'])}):" in said


def test_packages_of_ones_own_are_a_flag(package, tmp_path):
    (package / "__init__.py").write_text(
        "".join(f'def f{n}():\n    """Do the thing number {n} now.\n\n    {LONG} {n}\n    """\n' for n in range(30))
    )
    found = [load_retrieval_dataset("python_docs:lanterns", split) for split in ("train", "dev", "test")]
    assert found[0].name == "python_docs-lanterns" and len(found[0].corpus) == 30
    assert sum(len(part.queries) for part in found) == 30
    folder = Path(located("python_docs:lanterns"))
    assert folder.is_relative_to(cache_folder())
    (package / "more.py").write_text(f'def more():\n    """Do another thing than those.\n\n    {LONG}\n    """\n')
    assert len(load_retrieval_dataset("python_docs:lanterns").corpus) == 31, "read anew, since the package changed"
    assert folder.is_dir(), "what others may be reading stays"


@pytest.mark.parametrize(
    "name, said",
    [
        ("python_docs:no_such_package", "no_such_package is not installed in this environment"),
        ("python_docs:", "'' is no name of a package"),
        ("python_docs:../x", "'../x' is no name of a package"),
        ("python_docs:lanterns", "no object in it has a summary of 4 to 30 words"),
        ("python_docs:lanterns.deep", "'lanterns.deep' is no name of a package"),
        ("python_docs:__main__", "'__main__' is no name of a package"),
    ],
)
def test_packages_that_are_not_there_or_say_nothing_are_refused(package, name, said):
    with pytest.raises(InputError, match=re.escape(said)):
        load_retrieval_dataset(name)


def test_a_package_that_cannot_be_imported_is_refused_with_the_reason(package, tmp_path):
    (package / "__init__.py").write_text("raise ImportError('the oil is missing')")
    with pytest.raises(InputError, match=r"lanterns: cannot be imported \(ImportError: the oil is missing\)"):
        python_docs("python_docs:lanterns", tmp_path / "cache")
    (package / "__init__.py").write_text("while True: pass")
    with pytest.raises(InputError, match="did not come back within 2 s"):
        python_docs("python_docs:lanterns", tmp_path / "cache", seconds=2)
    assert not list((tmp_path / "cache").rglob("*")), "nothing is left as if it were whole"
