"""From the name of a data set to the place that it is read from, fetched and checked if it has to be.

A name is looked for where a user would expect it, and the first place has it:

1. a folder or file of that path;
2. ``$POLYREP_DATA/NAME``, a folder of one's own sets or of a team's;
3. the user's cache, ``$POLYREP_CACHE`` or ``~/.cache/polyrep``, where sets lie that were fetched or read before;
4. where the table of ``catalog.py`` says that it comes from; ``python_docs`` is read from the packages installed.

What is neither is left as it is if it may be ``ORG/NAME`` of the Hub, and refused if not.
"""

from __future__ import annotations

import difflib
import errno
import gzip
import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import tarfile
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from tqdm import tqdm

from ..errors import InputError, first_line
from ..files import read_json, staged_folder, user_cache
from .beir import check_qrels, open_beir, open_hub, texts_by_id
from .catalog import CATALOG, NamedSet
from .converters import write_lines, write_qrels
from .dataset import dataset_name, in_dev_tenth
from .python_docs import is_python_docs, python_docs
from .records import identifier_in

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

SECONDS = 30
"""Without an answer from a server before it counts as unreachable."""

MOST_BYTES = 4 << 30
"""Of what one archive may hold."""

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""Numbers of errors that say that nothing can be written."""


def located(name: str | Path) -> str:
    """The folder, file or Hub id that a data set is read from.

    Args:
        name: A path, a name of ``polyrep data list``, ``python_docs:PACKAGE,PACKAGE``, or ``ORG/NAME`` of the Hub.

    Raises:
        InputError: It is none of these, or a named set cannot be fetched or is not what it should be.
    """
    name = str(name)
    if is_path(name):
        return name
    if (own := among_own(name)) is not None:
        warn_of(own, name)
        return str(own)
    if is_python_docs(name):
        with disk_errors(name):
            return str(python_docs(name, cache_folder()))
    if name in CATALOG:
        folder = fetched(CATALOG[name])
        warn_of(folder, name)
        return str(folder)
    if not HUB_ID.fullmatch(name):
        known = sorted({*CATALOG, *(folder.name for folder in _own_sets())})
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
        raise InputError(
            f"{name}: no such file or folder, no data set of `polyrep data list`, and not of the form ORG/NAME of the "
            f"Hub either. {'Did you mean ' + ' or '.join(near) if near else 'There are ' + ', '.join(known)}?"
        )
    return name


def entry_of(name: str) -> NamedSet | None:
    """What the table knows of the set that a name stands for here; None for a folder, one's own set, or the Hub."""
    if is_path(name) or among_own(name) is not None:
        return None
    return CATALOG["python_docs"] if is_python_docs(name) else CATALOG.get(name)


def same_ids(name: str) -> bool | None:
    """Whether a document with the id of a query is that query, by MTEB's word; None where it has none."""
    entry = entry_of(name) or next((e for e in CATALOG.values() if e.origin == name and not is_path(name)), None)
    return entry.same_ids if entry and entry.origin.startswith("mteb/") else None


def on_hub(name: str) -> tuple[str, str | None]:
    """The Hub id that a name of the table stands for, and its commit; of anything else, itself."""
    entry = entry_of(name)
    if entry is None or not HUB_ID.fullmatch(entry.origin):
        return name, None
    return entry.origin, entry.commit


def made_here(*names: str) -> dict[str, dict[str, Any]]:
    """Data set -> what ``python_docs`` was read from on this machine, for those of these that are it."""
    made = {
        dataset_name(name): read_json(Path(located(name)) / "provenance.json", remedy="Bring the set again.")
        for name in names
        if is_python_docs(name) and entry_of(name)
    }
    parts = ("documents", "queries", "fingerprint", "packages")
    return {name: {part: found[part] for part in parts} for name, found in made.items()}


def cache_folder() -> Path:
    """Where sets lie that were fetched or read: ``data`` in the user's cache of polyrep."""
    return user_cache() / "data"


def is_path(name: str) -> bool:
    """Whether something lies there; what is too long for a file's name does not."""
    try:
        return bool(name) and Path(name).exists()
    except (OSError, ValueError):
        return False


def _own_sets() -> list[Path]:
    """Folders in ``$POLYREP_DATA``."""
    if not (root := os.environ.get("POLYREP_DATA")):
        return []
    if not Path(root).is_dir():
        raise InputError(f"POLYREP_DATA={root}: no such folder, so no data set is found there. Mend or unset it.")
    return sorted(folder for folder in Path(root).iterdir() if folder.is_dir())


def among_own(name: str) -> Path | None:
    """The folder of that name in ``$POLYREP_DATA``."""
    return next((folder for folder in _own_sets() if folder.name == name), None)


@cache
def warn_of(folder: Path, name: str) -> None:
    """Say once if a folder under a known name is not the set that results are of."""
    entry = CATALOG.get(name)
    if entry is None or not entry.sha256:
        return
    try:
        differing = differences(folder, entry)
    except InputError as error:  # of another layout, say
        differing = [str(error)]
    if differing:
        logger.warning(
            "%s is not the %s that published results are of: %s. Figures made with it compare with themselves alone.",
            folder,
            name,
            "; ".join(differing),
        )


def fetched(entry: NamedSet, *, any_content: bool = False) -> Path:
    """The folder of a set of the table in the user's cache; what is not there is fetched, converted and checked first.

    Args:
        entry: Of the table.
        any_content: Accept what differs from the hashes on record.

    Raises:
        InputError: There is nothing to fetch, no network, no space, or what came is not what it should be.
    """
    if (folder := in_cache(entry)).is_dir():
        return folder
    remedy = (
        f"Where there is a network, `polyrep data get {entry.name}` fetches it; a folder {entry.name} of your own is "
        "found in the folder that the environment variable POLYREP_DATA names."
    )
    if not entry.origin:
        raise InputError(
            f"{entry.name}: nobody may pass it on ({entry.licence}), so it cannot be fetched. Bring {entry.bring}, "
            f"and name it, or put it as {entry.name} into the folder that POLYREP_DATA names."
        )
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"{entry.name}: not on this machine, and HF_HUB_OFFLINE forbids to fetch it. {remedy}")
    with disk_errors(entry.name), staged_folder(folder) as staged:
        try:
            _from_hub(entry, staged) if entry.convert is None else _from_files(entry, staged)
        except InputError as error:
            raise InputError(f"{error} {remedy}") from error
        if not any_content and (differing := differences(staged, entry)):
            raise InputError(
                f"{entry.name}: what came from {entry.origin} is not what results are of: {'; '.join(differing)}. "
                f"Nothing is kept. `polyrep data get {entry.name} --any_content` takes it as it is."
            )
        (staged / "SOURCE.txt").write_text(source_note(entry), encoding="utf-8", newline="\n")
    return folder


def in_cache(entry: NamedSet) -> Path:
    """Where a set of the table lies once it was fetched."""
    return cache_folder() / entry.name / entry.commit[:12] / entry.name


def source_note(entry: NamedSet) -> str:
    """Where a set comes from, whom to credit, and under which licence."""
    return (
        f"{entry.name}: {entry.task}.\nFrom {entry.origin} at {entry.commit}.\n{entry.citation}.\n{entry.licence}.\n"
    )


def _from_files(entry: NamedSet, target: Path) -> None:
    """Download the files of a set and convert them."""
    assert entry.convert is not None
    place = target / ".fetched"  # goes with the staged folder, whatever ends this process
    place.mkdir()
    for address in entry.files:
        try:
            download(address.format(commit=entry.commit), place)
        except OSError as error:
            if error.errno in DISK:
                raise
            raise InputError(f"{entry.name}: cannot be fetched from {entry.origin} ({first_line(error)}).") from error
    entry.convert(place, target)
    shutil.rmtree(place)


def _from_hub(entry: NamedSet, target: Path) -> None:
    """A data set of the Hub in BEIR layout; one without a dev split gets the usual tenth."""
    corpus, queries, splits, read_qrels = open_hub(entry.origin, entry.commit)

    def of(row: dict[str, Any], *fields: str) -> str:
        for name in fields:
            if isinstance(row.get(name), str):
                return row[name]
        raise InputError(f"{entry.name}: a row of {entry.origin} has no {fields[0]} but {sorted(row)}.")

    documents = ({"_id": of(r, "_id", "id"), "title": r.get("title") or "", "text": of(r, "text")} for _, r in corpus)
    write_lines(target / "corpus.jsonl", documents)
    write_lines(target / "queries.jsonl", ({"_id": of(r, "_id", "id"), "text": of(r, "text")} for _, r in queries))
    judged = {split: [(q, d, int(score)) for _, q, d, score in read_qrels(split)] for split in sorted(splits)}
    if "train" in judged and "dev" not in judged:
        judged["dev"] = [row for row in judged["train"] if in_dev_tenth(row[0])]
        judged["train"] = [row for row in judged["train"] if not in_dev_tenth(row[0])]
    (target / "qrels").mkdir()
    for split, rows in judged.items():
        write_qrels(target / "qrels" / f"{split}.tsv", rows)


def download(address: str, folder: Path) -> None:
    """Fetch a file into a folder; an archive (``.../tar.gz/...``) is unpacked into it, and only whole.

    Raises:
        OSError: The server cannot be reached, refuses, or sends less than it announced.
        InputError: An archive is damaged, too large, or has members outside of the folder.
    """
    name = address.rpartition("/")[2]
    request = urllib.request.Request(address, headers={"User-Agent": "polyrep"})
    file = folder / f".{name}"
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer, file.open("wb") as written:
            expected = int(answer.headers.get("Content-Length") or 0)
            with tqdm(total=expected or None, unit="B", unit_scale=True, desc=name[:40]) as bar:
                while part := answer.read(1 << 20):
                    bar.update(written.write(part))
    except http.client.HTTPException as error:  # an answer in pieces that breaks off
        raise OSError(f"{address}: broke off ({first_line(error)})") from error
    if expected and file.stat().st_size != expected:
        raise OSError(f"{address}: broke off after {file.stat().st_size:,} of {expected:,} bytes")
    if "/tar.gz/" in address:
        unpack(file, folder)
        file.unlink()
    else:
        file.replace(folder / name)


def unpack(file: Path, folder: Path) -> None:
    """Unpack a ``.tar.gz``: its files and folders, none of them outside, and no more bytes than anybody needs.

    Raises:
        InputError: It is damaged, too large, or reaches outside of the folder.
    """
    try:
        with gzip.open(file) as whole:  # to the end, where its checksum stands: tarfile would stop before it
            size = 0
            while part := whole.read(1 << 20):
                size += len(part)
                if size > MOST_BYTES:
                    raise InputError(f"The archive that came holds over {MOST_BYTES:,} bytes. It is not unpacked.")
        with tarfile.open(file, "r:gz") as archive:
            members = [member for member in archive if member.isreg() or member.isdir()]
            for member in members:
                if not (folder / member.name).resolve().is_relative_to(folder.resolve()):
                    raise InputError(
                        f"The archive that came has a member outside of its folder, {member.name!r}. It is not "
                        "unpacked."
                    )
            # Python 3.11 before 3.11.4 has no filters, and would not need them after these checks.
            options: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            archive.extractall(folder, members, **options)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno in DISK:
            raise
        raise InputError(f"The archive that came is damaged ({first_line(error)}). Fetch it again.") from None


def content_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of what a BEIR folder says, in whatever order and form its files say it.

    Of ``corpus`` and ``queries`` the sorted ``[id, title, text]`` and ``[id, text]``, of each ``qrels/SPLIT`` the
    sorted ``[query, document, score]``, as JSON lines: the same for a file that is zipped, or ordered otherwise.
    """
    corpus, queries, splits, read_qrels = open_beir(str(folder), "test", None)
    texts: dict[str, Iterator[list[str | int]]] = {
        "corpus": ([identifier_in(row), row.get("title") or "", row["text"]] for _, row in corpus),
        "queries": ([identifier_in(row), row["text"]] for _, row in queries),
    }
    for split in sorted(splits):
        texts[f"qrels/{split}"] = ([query, document, int(score)] for _, query, document, score in read_qrels(split))
    found = {}
    for name, rows in texts.items():
        lines = sorted(json.dumps(row, ensure_ascii=False) for row in rows)
        found[name] = hashlib.sha256("\n".join(lines).encode(errors="surrogatepass")).hexdigest()
    return found


def differences(folder: Path, entry: NamedSet) -> list[str]:
    """In what a folder is not the set on record; empty where it is, or none is on record."""
    if not entry.sha256:
        return []
    corpus, queries, splits, read_qrels = open_beir(str(folder), "test", None)
    texts = texts_by_id(corpus, entry.name, True, titles=True)
    asked = texts_by_id(queries, entry.name, True)
    for split in splits:
        check_qrels(read_qrels(split), texts, asked)
    hashes = content_hashes(folder)
    found = [f"{name} is missing" for name in entry.sha256.keys() - hashes.keys()]
    found += [f"{name} is not part of it" for name in hashes.keys() - entry.sha256.keys()]
    if hashes.get("corpus") != entry.sha256["corpus"]:
        found.append(f"corpus has {len(texts):,} documents of {entry.documents:,}, or other texts")
    return found + [
        f"{name} has other content (SHA-256 {hashes[name][:12]}, expected {entry.sha256[name][:12]})"
        for name in sorted(hashes.keys() & entry.sha256.keys() - {"corpus"})
        if hashes[name] != entry.sha256[name]
    ]


@contextmanager
def disk_errors(name: str, folder: Path | None = None) -> Iterator[None]:
    """Say what a full or read-only disk means, in the cache if no folder is named."""
    try:
        yield
    except OSError as error:
        remedy = " or name another folder with the environment variable POLYREP_CACHE" if folder is None else ""
        if error.errno not in DISK and not isinstance(error, FileExistsError | NotADirectoryError):
            raise InputError(f"{name}: cannot be had ({first_line(error)}), so nothing is kept. Try again.") from error
        raise InputError(
            f"{name}: cannot be kept in {folder or cache_folder()} ({first_line(error)}), so nothing is. Make room "
            f"there{remedy}."
        ) from error
