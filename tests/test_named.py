"""Data sets by name: where a name is looked for, what is fetched, and that only what is whole and right is kept."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import ROOT, write_beir
from huggingface_hub import constants
from world import pages, write_world

from polyrep import InputError
from polyrep.cli import main
from polyrep.data import converters, load_corpus, load_retrieval_dataset, named
from polyrep.data.catalog import CATALOG, NamedSet
from polyrep.data.named import content_hashes, differences, fetched, located, unpack
from polyrep.data.stream import Fields, open_source

FILES: dict[str, bytes] = {}
"""Path -> content, of the server below."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        content = FILES.get(self.path)
        self.send_response(200 if content is not None else 404)
        if self.path.endswith("pieces"):  # the first of several, and then no more
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"ffff\r\n" + (content or b"")[:100])
            return
        announced = len(content or b"") + (1000 if self.path.endswith("broken") else 0)
        self.send_header("Content-Length", str(announced))
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    FILES.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, an empty working directory, and leave to go to the network."""
    monkeypatch.setenv("POLYREP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    named.warn_of.cache_clear()
    return tmp_path


def a_set(server: str, **changes: Any) -> NamedSet:
    """A named set of one archive, which holds the folder ``lamps-main`` with the world's German pages."""
    blank = NamedSet("lamps", "a lamp -> its page", 40, "ours", "us", "https://example.org/lamps", "c0ffee" * 6)
    return replace(blank, files=(f"{server}/{{commit}}/tar.gz/x",), convert=copied, **changes)


def copied(fetched: Path, target: Path) -> None:
    """A converter of what is in BEIR layout already."""
    (folder,) = fetched.iterdir()
    for file in [file for file in folder.rglob("*") if file.is_file()]:
        (target / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        (target / file.relative_to(folder)).write_bytes(file.read_bytes())


def tarball(folder: Path, name: str = "lamps-main") -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        archive.add(folder, name)
    return content.getvalue()


@pytest.fixture
def lamps(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NamedSet:
    """The set, served, in the table, its hashes on record."""
    folder = write_world(tmp_path / "made" / "lamps", "german")
    entry = a_set(server)
    FILES[f"/{entry.commit}/tar.gz/x"] = tarball(folder)
    entry = replace(entry, sha256=content_hashes(folder))
    monkeypatch.setitem(CATALOG, "lamps", entry)
    return entry


def said(name: str, **options: Any) -> str:
    with pytest.raises(InputError) as refused:
        load_retrieval_dataset(name, **options)
    return str(refused.value)


def leftovers(places: Path) -> list[str]:
    """Files in the cache."""
    return sorted(str(path.relative_to(places / "cache")) for path in (places / "cache").rglob("*") if path.is_file())


# Where a name is looked for.


def test_a_folder_of_that_path_goes_first_then_ones_own_sets_then_the_cache_then_the_network(
    lamps, places, monkeypatch
):
    dataset = load_retrieval_dataset("lamps")
    assert dataset.name == "lamps" and len(dataset.corpus) == len(pages("german")) == 40
    FILES.clear()  # from now on nothing can be fetched
    assert Path(located("lamps")).is_relative_to(places / "cache")
    assert load_corpus("lamps").corpus == dataset.corpus
    own = write_world(places / "own" / "lamps", "chinese")
    monkeypatch.setenv("POLYREP_DATA", str(own.parent))
    assert located("lamps") == str(own)
    write_beir(Path("lamps"))
    assert located("lamps") == "lamps" and len(load_retrieval_dataset("lamps").corpus) == 5
    assert open_source("lamps", Fields()).identity["files"][0]["name"] == "corpus.jsonl"


def test_a_name_that_nobody_knows_is_refused_with_its_neighbours(places, monkeypatch):
    message = said("tldr_page")
    assert message.startswith("tldr_page: no such file or folder") and "Did you mean tldr_pages?" in message
    assert "polyrep data list" in message and "ORG/NAME" in message
    assert "There are arguana" in said("zzzz")
    write_world(places / "own" / "tldr_paper", "german", sizes={"test": 2})
    monkeypatch.setenv("POLYREP_DATA", str(places / "own"))
    assert "tldr_paper" in said("tldr_pape")
    with pytest.raises(InputError, match="Did you mean scifact"):
        open_source("scifac", Fields())


def test_a_folder_of_ones_own_sets_that_is_not_there_is_refused(places, monkeypatch):
    monkeypatch.setenv("POLYREP_DATA", str(places / "nowhere"))
    assert "nowhere: no such folder" in said("scifact")
    write_beir(Path("here"))
    assert len(load_retrieval_dataset("here").corpus) == 5, "a path needs it not"


def test_ones_own_set_under_a_known_name_is_taken_and_what_differs_is_said(lamps, places, monkeypatch, caplog):
    monkeypatch.setenv("POLYREP_DATA", str(places / "made"))
    assert len(load_retrieval_dataset("lamps").corpus) == 40 and not caplog.records
    write_world(places / "own" / "lamps", "chinese")
    monkeypatch.setenv("POLYREP_DATA", str(places / "own"))
    assert len(load_retrieval_dataset("lamps").corpus) == 40
    assert (
        "corpus has 40 documents of 40, or other texts" in caplog.text and "queries has other content" in caplog.text
    )


def test_ones_own_set_in_another_layout_is_read_as_it_is(places, monkeypatch, caplog, capsys):
    monkeypatch.setenv("POLYREP_DATA", str(places / "own"))
    (places / "own" / "scifact").mkdir(parents=True)
    rows = [{"query": f"query {n}", "document": f"document {n}"} for n in range(5)]
    datasets.Dataset.from_list(rows).to_parquet(places / "own" / "scifact" / "test.parquet")
    assert len(load_retrieval_dataset("scifact").corpus) == 5
    assert "is not the scifact that published results are of" in caplog.text
    assert main(["data", "list"]) == 0 and "scifact" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["x" * 300, "python_docs:" + ",".join(f"package{n}" for n in range(60)), "a\0b", ""])
def test_names_that_no_file_can_have_are_refused_like_others(name):
    assert "Traceback" not in said(name)


def test_licences_and_hub_ids_are_those_of_the_set_that_is_meant(places, monkeypatch):
    assert named.entry_of("scifact").licence.startswith("CC BY 4.0")
    assert named.entry_of("python_docs:jinja2").licence == "of each package"
    assert named.on_hub("scifact") == ("mteb/scifact", CATALOG["scifact"].commit)
    assert named.on_hub("tldr_pages") == ("tldr_pages", None) and named.on_hub("org/set") == ("org/set", None)
    write_world(places / "own" / "scifact", "german")
    monkeypatch.setenv("POLYREP_DATA", str(places / "own"))
    assert named.entry_of("scifact") is None and named.on_hub("scifact") == ("scifact", None)
    write_world(Path("nfcorpus"), "german")
    assert named.entry_of("nfcorpus") is None
    assert named.made_here("scifact", "nfcorpus") == {}


# What is fetched.


def test_what_is_fetched_is_kept_whole_with_its_source(lamps, places):
    folder = fetched(lamps)
    assert differences(folder, lamps) == []
    assert "https://example.org/lamps at c0ffee" in (folder / "SOURCE.txt").read_text()
    assert sorted(file.name for file in folder.iterdir()) == ["SOURCE.txt", "corpus.jsonl", "qrels", "queries.jsonl"]
    FILES.clear()
    assert fetched(lamps) == folder


def test_what_differs_from_the_hashes_is_refused_by_name_unless_it_is_accepted(lamps, places, caplog):
    folder = places / "made" / "lamps"
    text = (folder / "queries.jsonl").read_text(encoding="utf-8")
    (folder / "queries.jsonl").write_text(text.replace("Bahn", "Zug"), encoding="utf-8")
    (folder / "qrels" / "dev.tsv").unlink()
    FILES[f"/{lamps.commit}/tar.gz/x"] = tarball(folder)
    message = said("lamps")
    assert "qrels/dev is missing" in message and "queries has other content (SHA-256" in message
    assert "corpus" not in message.replace("corpora", "") and "--any_content" in message
    assert not leftovers(places)
    assert main(["data", "get", "lamps", "--any_content"]) == 0
    assert len(load_retrieval_dataset("lamps").corpus) == 40
    assert "is not the lamps that published results are of: qrels/dev is missing" in caplog.text


def test_a_corpus_with_a_document_less_says_how_many_there_are(lamps, places):
    folder = places / "made" / "lamps"
    lines = (folder / "corpus.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    lost = json.loads(lines[0])["_id"]
    (folder / "corpus.jsonl").write_text("".join(lines[1:]), encoding="utf-8")
    for file in (folder / "qrels").iterdir():
        file.write_text("".join(line for line in file.read_text().splitlines(keepends=True) if lost not in line))
    FILES[f"/{lamps.commit}/tar.gz/x"] = tarball(folder)
    assert "corpus has 39 documents of 40" in said("lamps")


def test_hashes_are_of_the_content_whatever_its_order_and_form(tmp_path):
    folder = write_world(tmp_path / "a", "german")
    other = write_world(tmp_path / "b", "german")
    lines = (other / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    (other / "corpus.jsonl").unlink()
    with gzip.open(other / "corpus.jsonl.gz", "wt", encoding="ascii") as file:
        file.writelines(json.dumps(dict(reversed(json.loads(line).items()))) + "\n" for line in reversed(lines))
    assert content_hashes(folder) == content_hashes(other)
    text = (folder / "queries.jsonl").read_text(encoding="utf-8")
    (folder / "queries.jsonl").write_text(text.replace("Bahn", "Zug"), encoding="utf-8")
    changed, before = content_hashes(folder), content_hashes(other)
    assert {name for name in changed if changed[name] != before[name]} == {"queries"}


@pytest.mark.parametrize("how", ["broken", "pieces"])
def test_half_a_download_leaves_nothing(lamps, places, monkeypatch, how):
    monkeypatch.setitem(CATALOG, "lamps", replace(lamps, files=(f"{lamps.files[0]}.{how}",)))
    FILES[f"/{lamps.commit}/tar.gz/x.{how}"] = FILES[f"/{lamps.commit}/tar.gz/x"]
    message = said("lamps")
    assert "broke off" in message and "polyrep data get lamps" in message and "POLYREP_DATA" in message
    assert not leftovers(places)


@pytest.mark.parametrize("files", [("{server}/nothing",), ("http://127.0.0.1:9/nobody",)])
def test_a_server_that_refuses_or_is_not_there_is_named_with_both_remedies(lamps, places, monkeypatch, server, files):
    monkeypatch.setitem(CATALOG, "lamps", replace(lamps, files=(files[0].replace("{server}", server),)))
    message = said("lamps")
    assert message.startswith("lamps: cannot be fetched from https://example.org/lamps (")
    assert "`polyrep data get lamps`" in message and "POLYREP_DATA" in message
    assert not leftovers(places)


def test_offline_is_said_before_anything_is_tried(lamps, places, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = said("lamps")
    assert "HF_HUB_OFFLINE forbids" in message and "`polyrep data get lamps`" in message and "POLYREP_DATA" in message


def test_what_nobody_may_pass_on_says_what_to_bring():
    message = said("flickr8k")
    assert "research and education" in message and "captions.py" in message and "POLYREP_DATA" in message


@pytest.mark.parametrize("name", ["../outside.txt", "/tmp/outside.txt", "a/../../outside.txt"])
def test_an_archive_that_reaches_outside_is_not_unpacked(tmp_path, name):
    file, folder = tmp_path / "archive", tmp_path / "deep" / "folder"
    folder.mkdir(parents=True)
    with tarfile.open(file, "w:gz") as archive:
        for member in ("fine.txt", name):
            info = tarfile.TarInfo(member)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"out"))
    with pytest.raises(InputError, match="outside of its folder"):
        unpack(file, folder)
    assert not list(folder.iterdir()) and not (tmp_path / "deep" / "outside.txt").exists()


def test_links_in_an_archive_are_left_out(tmp_path):
    file, folder = tmp_path / "archive", tmp_path / "folder"
    folder.mkdir()
    with tarfile.open(file, "w:gz") as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    unpack(file, folder)
    assert not list(folder.iterdir())


def test_a_damaged_archive_is_refused_wherever_the_damage_is(tmp_path):
    file, folder = tmp_path / "archive", tmp_path / "folder"
    folder.mkdir()
    whole = tarball(write_world(tmp_path / "world"))
    turned = [whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :] for at in range(20, len(whole) - 8, 997)]
    for content in (whole[: len(whole) // 2], b"nothing", b"", *turned):
        file.write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            unpack(file, folder)
    assert not list(folder.iterdir()) and len(turned) > 20


def test_an_archive_that_holds_too_much_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(named, "MOST_BYTES", 100)
    file = tmp_path / "archive"
    file.write_bytes(tarball(write_beir(tmp_path / "beir")))
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="over 100"):
        unpack(file, tmp_path / "folder")
    assert not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize("where", ["download", "convert"])
def test_a_full_disk_is_said_and_leaves_nothing(lamps, places, monkeypatch, where):
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "download":
        monkeypatch.setattr(named, "download", full)
    else:
        monkeypatch.setitem(CATALOG, "lamps", replace(lamps, convert=full))
    message = said("lamps")
    assert "No space left on device" in message and "POLYREP_CACHE" in message and str(places / "cache") in message
    assert not leftovers(places)


def test_a_cache_that_cannot_be_written_is_said(lamps, places):
    (places / "cache").write_text("a file where the folder should be")
    assert "cannot be kept in" in said("lamps") and "POLYREP_CACHE" in said("lamps")


def test_a_set_of_the_hub_comes_at_its_commit_with_a_dev_split(places, monkeypatch):
    asked = []
    tables = {
        "corpus": [{"_id": f"d{n}", "title": "T", "text": f"text {n}"} for n in range(60)],
        "queries": [{"_id": f"q{n}", "text": f"query {n}"} for n in range(60)],
        "default": [{"query-id": f"q{n}", "corpus-id": f"d{n}", "score": 1.0} for n in range(60)],
    }

    def load_dataset(path: str, name: str, *, revision: str | None = None) -> Any:
        asked.append((path, name, revision))
        rows = datasets.Dataset.from_list(tables[name])
        parts = {"train": rows.select(range(50)), "test": rows.select(range(50, 60))}
        return datasets.DatasetDict(parts if name == "default" else {name: rows})

    monkeypatch.setattr("polyrep.data.beir.load_dataset", load_dataset)
    entry = CATALOG["nfcorpus"]
    found = {split: load_retrieval_dataset("nfcorpus", split) for split in ("train", "dev", "test")}
    assert {revision for *_, revision in asked} == {entry.commit} and {path for path, *_ in asked} == {"mteb/nfcorpus"}
    assert found["test"].qrels == {f"q{n}": {f"d{n}": 1} for n in range(50, 60)}
    assert found["test"].corpus["d3"] == "T text 3"
    assert len(found["train"].queries) + len(found["dev"].queries) == 50 and found["dev"].queries
    assert len(asked) == 3, "kept after the first"


def test_a_set_of_the_hub_that_cannot_be_had_names_the_remedies(places):
    message = said("arguana")
    assert "mteb/arguana" in message and "`polyrep data get arguana`" in message and "POLYREP_DATA" in message


# Converters, from small archives and back from the sets themselves.

TLDR = {
    "common/lamp.md": "# lamp\n\n> Light a lamp.\n> Lamp hangs.\n> See also: `wick`.\n> More information: <https://x>.\n\n"
    "- [l]ight it:\n\n`lamp {{on|off}}`\n\n- Read `stdin`:\n\n`lamp {{[-f|--file]}} -`\n",
    "common/old.md": "# old\n\n> This command is an alias of `lamp`.\n\n- See it:\n\n`tldr lamp`\n",
    "linux/twin.md": "# twin\n\n> Do it twice.\n\n- Do:\n\n`twin`\n",
    "osx/twin.md": "# twin\n\n> Do it twice.\n\n- Do it:\n\n`twin now`\n",
}


def test_tldr_pages_become_pages_and_what_introduces_them(tmp_path):
    for name, text in TLDR.items():
        file = tmp_path / "fetched" / "tldr-main" / "pages" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "target").mkdir()
    converters.tldr_pages(tmp_path / "fetched", tmp_path / "target")
    rows = [json.loads(line) for line in (tmp_path / "target" / "corpus.jsonl").open()]
    text = "light it: lamp on|off . Read `stdin`: lamp [-f|--file] - ."
    assert rows[0] == {"_id": "common/lamp", "title": "lamp", "text": text}
    assert [row["_id"] for row in rows[1:]] == ["linux/twin", "osx/twin"]
    (query,) = [json.loads(line) for line in (tmp_path / "target" / "queries.jsonl").open()]
    assert query == {"_id": "q:common/lamp", "text": "Light a this command. this command hangs."}


def test_scitldr_and_pubmedqa_become_abstracts_and_what_asks_for_them(tmp_path):
    (tmp_path / "fetched").mkdir()
    row = {"paper_id": "p1", "title": " A title", "source": ["One.", "Two  words. "], "target": ["Short.", "Shorter."]}
    for split in ("train", "dev", "test"):
        (tmp_path / "fetched" / f"{split}.jsonl").write_text(json.dumps(row | {"paper_id": split}) + "\n")
    (tmp_path / "a").mkdir()
    converters.scitldr(tmp_path / "fetched", tmp_path / "a")
    dataset = load_retrieval_dataset(tmp_path / "a", "dev")
    assert dataset.corpus["dev"] == "A title One. Two words."
    assert dataset.queries == {"dev-0": "Short.", "dev-1": "Shorter."}
    papers = {str(n): {"QUESTION": f"Is it {n}?", "CONTEXTS": ["Before.", "After."]} for n in range(60)}
    (tmp_path / "fetched" / "ori_pqal.json").write_text(json.dumps(papers))
    (tmp_path / "fetched" / "test_ground_truth.json").write_text(json.dumps({"3": "yes"}))
    (tmp_path / "b").mkdir()
    converters.pubmedqa(tmp_path / "fetched", tmp_path / "b")
    assert load_retrieval_dataset(tmp_path / "b").queries == {"q3": "Is it 3?"}
    assert load_retrieval_dataset(tmp_path / "b").corpus["7"] == "Before. After."
    splits = [len(load_retrieval_dataset(tmp_path / "b", split).queries) for split in ("train", "dev")]
    assert sum(splits) == 59 and 0 < splits[1] < 15


@pytest.mark.parametrize(
    "name, content, refused",
    [
        ("train.jsonl", b"{", "train.jsonl:1: no JSON"),
        ("train.jsonl", b'{"paper_id": "p"}\n', "expected an object with paper_id, title, source, target"),
        ("train.jsonl", b"\xff", "cannot be read"),
        ("ori_pqal.json", b"[1]", "list where an object is expected"),
        ("ori_pqal.json", b'{"1": {}}', "1 has no QUESTION and CONTEXTS"),
        ("ori_pqal.json", None, "cannot be read"),
    ],
)
def test_sources_of_another_form_are_refused(tmp_path, name, content, refused):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    (tmp_path / "test_ground_truth.json").write_text("{}")
    with pytest.raises(InputError, match=refused):
        (converters.scitldr if name == "train.jsonl" else converters.pubmedqa)(tmp_path, tmp_path / "target")


def backwards(name: str, folder: Path, target: Path) -> None:
    """What a converter reads, made from what it writes, as far as that tells it."""
    dataset = {split: load_retrieval_dataset(folder, split) for split in ("train", "dev", "test")}
    corpus = {row["_id"]: row for row in map(json.loads, (folder / "corpus.jsonl").open(encoding="utf-8"))}
    texts = dict(
        (row["_id"], row["text"]) for row in map(json.loads, (folder / "queries.jsonl").open(encoding="utf-8"))
    )
    if name == "scitldr":
        for split, part in dataset.items():
            papers = dict.fromkeys(next(iter(judged)) for judged in part.qrels.values())
            rows = []
            for paper in papers:
                own = [texts[f"{paper}-{n}"] for n in range(1000) if f"{paper}-{n}" in texts]
                row = {
                    "paper_id": paper,
                    "title": corpus[paper]["title"],
                    "source": [corpus[paper]["text"]],
                    "target": own,
                }
                rows.append(json.dumps(row) + "\n")
            (target / f"{split}.jsonl").write_text("".join(rows))
    else:
        papers = {paper: {"QUESTION": texts[f"q{paper}"], "CONTEXTS": [corpus[paper]["text"]]} for paper in corpus}
        (target / "ori_pqal.json").write_text(json.dumps(papers))
        official = {next(iter(judged)): "yes" for judged in dataset["test"].qrels.values()}
        (target / "test_ground_truth.json").write_text(json.dumps(official))


REAL = os.environ.get("POLYREP_TEST_DATA", "")
needs_sets = pytest.mark.skipif(not REAL, reason="POLYREP_TEST_DATA names no folder of real data sets")


@needs_sets
@pytest.mark.parametrize("name", [name for name, entry in CATALOG.items() if entry.sha256])
def test_the_hashes_on_record_are_those_of_the_real_sets(name):
    assert differences(Path(REAL) / name, CATALOG[name]) == []


@needs_sets
@pytest.mark.parametrize("name", ["scitldr", "pubmedqa"])
def test_a_converter_gives_the_real_set_back(name, tmp_path):
    (tmp_path / "fetched").mkdir()
    (tmp_path / "target").mkdir()
    backwards(name, Path(REAL) / name, tmp_path / "fetched")
    CATALOG[name].convert(tmp_path / "fetched", tmp_path / "target")
    assert differences(tmp_path / "target", CATALOG[name]) == []


# The verb, the table and its page.


def test_the_verb_lists_shows_and_gets(lamps, places, capsys):
    assert main(["data", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert lines.keys() >= CATALOG.keys() and " no " in lines["lamps"] and "CC BY 4.0" in lines["tldr_pages"]
    assert main(["data", "show", "lamps"]) == 0
    shown = capsys.readouterr().out
    assert f"corpus {lamps.sha256['corpus']}" in shown and "here       no" in shown and "c0ffee" in shown
    assert main(["data", "get", "lamps", "--output", "copy"]) == 0
    assert capsys.readouterr().out.strip() == "copy" and differences(Path("copy"), lamps) == []
    assert main(["data", "show", "lamps"]) == 0
    assert "verified   yes" in capsys.readouterr().out
    assert main(["data", "list"]) == 0
    assert " yes " in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("lamps"))


def test_the_verb_refuses_what_it_cannot_do(lamps, places, capsys):
    Path("there").mkdir()
    for words, message in (
        (["get", "lamps", "--output", "there"], "exists already"),
        (["get", "lampz"], "Did you mean lamps"),
        (["show", "lampz"], "Did you mean lamps"),
        (["get", "someone/set"], "a data set of the Hub"),
        (["show", "x" * 300], "no such file or folder"),
        (["get", "flickr8k"], "captions.py"),
    ):
        assert main(["data", *words]) == 2
        assert message in capsys.readouterr().err, words
    Path("file").write_text("x")
    assert main(["data", "get", "lamps", "--output", "file/deeper"]) == 2
    assert "file" in capsys.readouterr().err
    assert not list(Path("there").iterdir())


@pytest.mark.parametrize("entry", CATALOG.values(), ids=CATALOG)
def test_an_entry_says_all_that_a_user_needs(entry):
    assert entry.task and entry.licence and entry.citation
    assert bool(entry.origin) == bool(entry.commit)
    assert len(entry.commit) in (0, 40) and all(len(value) == 64 for value in entry.sha256.values())
    assert (entry.convert is None) == (not entry.files)
    assert all("{commit}" in address and address.startswith("https://") for address in entry.files)
    assert not entry.sha256 or entry.sha256.keys() >= {"corpus", "queries", "qrels/test"}


def test_the_page_has_the_table():
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    for entry in CATALOG.values():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{entry.name}` |")]
        assert entry.task.replace("->", "→") in line and entry.licence in line
        assert not entry.documents or f"{entry.documents:,}" in line
        assert not entry.origin or entry.origin in line
