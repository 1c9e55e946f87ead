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
import hashlib
import json
import logging
import os
import re
import shutil
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from tqdm import tqdm

from ..errors import InputError, first_line
from ..files import read_json, staged_folder
from .beir import check_qrels, open_beir, open_hub, texts_by_id
from .catalog import CATALOG, NamedSet
from .converters import write_lines, write_qrels
from .dataset import dataset_name, in_dev_tenth
from .python_docs import is_python_docs, python_docs

logger = logging.getLogger(__name__)

SECONDS = 30
"""Without an answer from a server before it counts as unreachable."""

MOST_BYTES = 4 << 30
"""Of what one archive may hold."""


def located(name: str | Path) -> str:
    """The folder, file or Hub id that a data set is read from.

    Args:
        name: A path, a name of ``polyrep data list``, ``python_docs:PACKAGE,PACKAGE``, or ``ORG/NAME`` of the Hub.

    Raises:
        InputError: It is none of these, or a named set cannot be fetched or is not what it should be.
    """
    name = str(name)
    if Path(name).exists():
        return name
    if (own := among_own(name)) is not None:
        return str(own)
    if is_python_docs(name):
        with disk_errors(name):
            return str(python_docs(name, cache_folder()))
    if name in CATALOG:
        return str(fetched(CATALOG[name]))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        known = sorted({*CATALOG, *(folder.name for folder in _own_sets())})
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
        raise InputError(
            f"{name}: no such folder, no data set of `polyrep data list`, and not of the form ORG/NAME of the Hub "
            f"either. {'Did you mean ' + ' or '.join(near) if near else 'There are ' + ', '.join(known)}?"
        )
    return name


def on_hub(name: str) -> tuple[str, str | None]:
    """The Hub id that a name of the table stands for, and its commit; of anything else, itself."""
    entry = CATALOG.get(name)
    if entry is None or not re.fullmatch(r"[\w.-]+/[\w.-]+", entry.origin) or Path(name).exists() or among_own(name):
        return name, None
    return entry.origin, entry.commit


def made_here(*names: str) -> dict[str, dict[str, Any]]:
    """Data set -> what ``python_docs`` was read from on this machine, for those of these that are it."""
    found = {dataset_name(name): read_json(Path(located(name)) / "provenance.json") for name in names}
    return {
        name: {part: made[part] for part in ("documents", "queries", "fingerprint", "packages")}
        for name, made in found.items()
        if made
    }


def cache_folder() -> Path:
    """Where sets lie that were fetched or read: ``$POLYREP_CACHE/data``, or the same in the user's cache."""
    if folder := os.environ.get("POLYREP_CACHE"):
        return Path(folder) / "data"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polyrep" / "data"


def _own_sets() -> list[Path]:
    """Folders in ``$POLYREP_DATA``."""
    if not (root := os.environ.get("POLYREP_DATA")):
        return []
    if not Path(root).is_dir():
        raise InputError(f"POLYREP_DATA={root}: no such folder, so no data set is found there. Mend or unset it.")
    return sorted(folder for folder in Path(root).iterdir() if folder.is_dir())


def among_own(name: str) -> Path | None:
    """The folder of that name in ``$POLYREP_DATA``; a set of the table that is another one there is warned of."""
    found = next((folder for folder in _own_sets() if folder.name == name), None)
    if found and (entry := CATALOG.get(name)) and entry.sha256 and (differing := differences(found, entry)):
        logger.warning(
            "%s is not the %s that published results are of: %s. Figures made with it compare with themselves alone.",
            found,
            name,
            "; ".join(differing),
        )
    return found


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
        if entry.convert is None:
            try:
                _from_hub(entry, staged)
            except InputError as error:
                raise InputError(f"{error} {remedy}") from error
        else:
            with tempfile.TemporaryDirectory(dir=staged.parent, prefix=".fetched-") as place:
                for address in entry.files:
                    try:
                        download(address.format(commit=entry.commit), Path(place))
                    except OSError as error:
                        if error.errno == errno.ENOSPC:
                            raise
                        raise InputError(
                            f"{entry.name}: cannot be fetched from {entry.origin} ({first_line(error)}). {remedy}"
                        ) from error
                entry.convert(Path(place), staged)
        if not any_content and (differing := differences(staged, entry)):
            raise InputError(
                f"{entry.name}: what came from {entry.origin} is not what results are of: {'; '.join(differing)}. "
                f"Nothing is kept. `polyrep data get {entry.name} --any_content` takes it as it is."
            )
        (staged / "SOURCE.txt").write_text(source_note(entry), encoding="utf-8")
    return folder


def in_cache(entry: NamedSet) -> Path:
    """Where a set of the table lies once it was fetched."""
    return cache_folder() / entry.name / entry.commit[:12] / entry.name


def source_note(entry: NamedSet) -> str:
    """Where a set comes from, whom to credit, and under which licence."""
    return (
        f"{entry.name}: {entry.task}.\nFrom {entry.origin} at {entry.commit}.\n{entry.citation}.\n{entry.licence}.\n"
    )


def _from_hub(entry: NamedSet, target: Path) -> None:
    """A data set of the Hub in BEIR layout; one without a dev split gets the usual tenth."""
    corpus, queries, splits, read_qrels = open_hub(entry.origin, entry.commit)
    write_lines(
        target / "corpus.jsonl",
        ({"_id": row["_id"], "title": row.get("title") or "", "text": row["text"]} for _, row in corpus),
    )
    write_lines(target / "queries.jsonl", ({"_id": row["_id"], "text": row["text"]} for _, row in queries))
    judged = {split: [(q, d, int(score)) for _, q, d, score in read_qrels(split)] for split in sorted(splits)}
    if "train" in judged and "dev" not in judged:
        judged["dev"] = [row for row in judged["train"] if in_dev_tenth(row[0])]
        judged["train"] = [row for row in judged["train"] if not in_dev_tenth(row[0])]
    (target / "qrels").mkdir()
    for split, rows in judged.items():
        write_qrels(target / "qrels" / f"{split}.tsv", rows)


def download(address: str, folder: Path) -> None:
    """Fetch a file into a folder; an archive is unpacked into it, and only whole.

    Raises:
        OSError: The server cannot be reached, refuses, or sends less than it announced.
        InputError: An archive is damaged, too large, or has members outside of the folder.
    """
    name = address.rpartition("/")[2]
    archive = next((suffix for suffix in ("tar.gz", "zip") if f"/{suffix}/" in address or name.endswith(suffix)), "")
    request = urllib.request.Request(address, headers={"User-Agent": "polyrep"})
    with tempfile.NamedTemporaryFile(dir=folder.parent, prefix=".download-") as file:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:  # noqa: S310  addresses are the table's
            expected = int(answer.headers.get("Content-Length") or 0)
            bar = tqdm(total=expected or None, unit="B", unit_scale=True, desc=name[:40])
            with bar:
                while part := answer.read(1 << 20):
                    file.write(part)
                    bar.update(len(part))
        file.flush()
        if expected and file.tell() != expected:
            raise OSError(f"{address}: broke off after {file.tell():,} of {expected:,} bytes")
        if archive:
            unpack(Path(file.name), archive, folder)
        else:
            shutil.copyfile(file.name, folder / name)


def unpack(file: Path, kind: str, folder: Path) -> None:
    """Unpack an archive, refusing members that would lie outside, and more bytes than anybody needs.

    Args:
        file: The archive.
        kind: ``tar.gz`` or ``zip``.
        folder: Where to.

    Raises:
        InputError: It is damaged, too large, or reaches outside of the folder.
    """
    try:
        if kind == "zip":
            with zipfile.ZipFile(file) as archive:
                names = [(member.filename, member.file_size) for member in archive.infolist()]
                _refuse_members(names, folder)
                archive.extractall(folder)
        else:
            with tarfile.open(file, "r:gz") as tar:
                members = [member for member in tar if member.isreg() or member.isdir()]
                _refuse_members([(member.name, member.size) for member in members], folder)
                tar.extractall(folder, members, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        raise InputError(f"The archive that came is damaged ({first_line(error)}). Fetch it again.") from None


def _refuse_members(members: list[tuple[str, int]], folder: Path) -> None:
    root = folder.resolve()
    for name, _ in members:
        if not (root / name).resolve().is_relative_to(root) or Path(name).is_absolute() or "\\" in name:
            raise InputError(
                f"The archive that came has a member outside of its folder, {name!r}: nothing is unpacked."
            )
    if (size := sum(size for _, size in members)) > MOST_BYTES:
        raise InputError(f"The archive that came unpacks to {size:,} bytes, over {MOST_BYTES:,}: nothing is unpacked.")


def content_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of what a BEIR folder says, in whatever order and form its files say it.

    Of ``corpus`` and ``queries`` the sorted ``[id, title, text]`` and ``[id, text]``, of each ``qrels/SPLIT`` the
    sorted ``[query, document, score]``, as JSON lines: the same for a file that is zipped, or ordered otherwise.
    """
    corpus, queries, splits, read_qrels = open_beir(str(folder), "test", None)
    texts: dict[str, Iterator[list[str | int]]] = {
        "corpus": ([row["_id"], row.get("title") or "", row["text"]] for _, row in corpus),
        "queries": ([row["_id"], row["text"]] for _, row in queries),
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
    texts = texts_by_id(corpus, entry.name, True, lambda row: row["text"])
    asked = texts_by_id(queries, entry.name, True, lambda row: row["text"])
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
        raise InputError(
            f"{name}: cannot be kept in {folder or cache_folder()} ({first_line(error)}), so nothing is. Make room "
            f"there{remedy}."
        ) from error
