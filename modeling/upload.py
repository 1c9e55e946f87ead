"""Speak with the Hub: may this be written there, over what, and then all of it in one commit.

Only calls that the Hub and its mirrors have in common: create a repository, look at one, commit.
"""

from __future__ import annotations

import fnmatch
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from .errors import InputError
from .hub import read_json

_REPLACED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "modeling_*.py",
    "[0-9]*_*/*",
    ".eval_results/*",
    "onnx/*",
    "results*.png",
)
"""What an earlier version may have in the repository that would be taken for part of this one."""


def check_repo_name(repo: str) -> None:
    """Refuse a name that the Hub would refuse, before anything is done for it.

    Raises:
        InputError: The name, what is wrong with it and what is right.
    """
    try:
        validate_repo_id(repo)
        wrong = None if repo.count("/") == 1 else "it has no organisation or user before a slash"
    except HFValidationError as error:
        wrong = str(error).rstrip(".")
    if wrong:
        raise InputError(
            f"--repo {repo}: the Hub would refuse this name: {wrong}. Use ORG/NAME of letters, digits, '-', '_', '.'."
        )


def refuse_without_token() -> None:
    """Raise InputError unless there is a token, which only the Hub can tell the rights of."""
    if not get_token():
        raise InputError(
            "no token for the Hub, so nothing can be uploaded. Run `hf auth login` with one that may write, or set "
            "HF_TOKEN. Try everything else with --dry_run."
        )


def head_of(repo: str, folder: Path) -> str | None:
    """Commit of an existing repository, None if there is none; InputError if it holds another kind of model."""
    refuse_without_token()
    api = HfApi()
    with _asking_the_hub(repo, "Nothing was changed."), tempfile.TemporaryDirectory() as scratch:
        try:
            info = api.model_info(repo)
        except RepositoryNotFoundError:
            return None
        there = {sibling.rfilename for sibling in info.siblings or []}
        if not there - {".gitattributes", "README.md", "LICENSE"}:
            return info.sha
        for name in ("config.json", "config_sentence_transformers.json", "modules.json"):
            try:
                if name in there:
                    api.hf_hub_download(repo, name, revision=info.sha, local_dir=scratch)
            except EntryNotFoundError:
                continue
        theirs, ours = _kind_of(Path(scratch)), _kind_of(folder)
    if theirs != ours:
        raise InputError(
            f"{repo}: holds a model of another kind ({theirs}) than {folder} ({ours}), which would be replaced. "
            "Refused; choose another --repo, or delete that one yourself."
        )
    return info.sha


def upload(repo: str, folder: Path, files: list[Path], *, private: bool, parent: str | None) -> str:
    """One commit with all files, and without what they replace; return it."""
    api = HfApi()
    with _asking_the_hub(repo, "No commit was made, and the folder is as it was."):
        if parent is None:
            api.create_repo(repo, private=private, exist_ok=True)
        info = api.model_info(repo)
        names = {path.relative_to(folder).as_posix() for path in files}
        there = {sibling.rfilename for sibling in info.siblings or []}
        stale = sorted(n for n in there - names if any(fnmatch.fnmatch(n, pattern) for pattern in _REPLACED))
        commit = api.create_commit(
            repo,
            [
                *(CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=f"Publish with polyrep: {len(names)} files",
            parent_commit=info.sha,
        )
    return str(commit.oid)


def _kind_of(folder: Path) -> str:
    """Model type, family and own modules of a folder: what a repository's users rely on to stay the same."""
    family = read_json(folder / "config_sentence_transformers.json").get("model_type")
    modules = [module["type"].rpartition(".")[2] for module in read_json(folder / "modules.json") or []]
    parts = [read_json(folder / "config.json").get("model_type"), family, " + ".join(modules)]
    return ", ".join(part for part in parts if part) or "none that can be told"


@contextmanager
def _asking_the_hub(repo: str, then: str) -> Iterator[None]:
    """Say what the Hub refused, and what can be done about it."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise InputError(
                f"{repo}: the Hub refused (HTTP {status}), so the token may not write there. {then} Take a token with "
                "write access to that organisation or user: `hf auth login`, or HF_TOKEN."
            ) from error
        raise InputError(f"{repo}: the Hub answered {error}. {then} Run the same command again.") from error
    except (HTTPError, OSError, RuntimeError) as error:
        raise InputError(
            f"{repo}: the connection failed ({type(error).__name__}: {error}). {then} Run the same command again; "
            "files that have arrived are not sent twice."
        ) from error
