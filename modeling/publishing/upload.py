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

from ..errors import InputError
from ..files import read_json
from ..registry import ROOMS, room_of

_CARRIED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*", "onnx/*.onnx", "onnx/*.data")
"""What of a folder belongs to a model, at any depth; nothing else is uploaded."""

_REPLACED = (
    *("*.safetensors", "*config*.json", "*.index.json", "modules.json", "modeling_*.py", "polyrep_*.py"),
    *("*.jinja", "*.model"),
    *("tokenizer.json", "added_tokens.json", "special_tokens_map.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("onnx/*", "results.png", "calibration.json"),
)
"""What an earlier version may have had and this one has not: removed, lest it be taken for part of this one."""


def is_carried(name: str) -> bool:
    """Whether a file of this name, relative to the folder, is part of a model."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in _CARRIED)


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


def head_of(repo: str, kind: str | None, *, private: bool) -> str | None:
    """Commit of an existing repository that may be replaced, None if there is none.

    Args:
        repo: Its name.
        kind: Of the model that would replace it, see :func:`model_kind`; None while that is not known.
        private: Whether it must not be seen by others.

    Raises:
        InputError: There is no token, the Hub refuses, the repository is public, or holds another kind of model.
    """
    refuse_without_token()
    api = HfApi()
    with _asking_the_hub(repo, "Nothing was changed."), tempfile.TemporaryDirectory() as scratch:
        try:
            info = api.model_info(repo)
        except RepositoryNotFoundError:
            return None
        if private and not info.private:
            raise InputError(
                f"{repo}: exists and is public, so --private cannot be kept. Refused; make it private on its page, or "
                "choose another --repo."
            )
        there = {sibling.rfilename for sibling in info.siblings or []}
        if kind is None or not there - {".gitattributes", "README.md", "LICENSE"}:
            return info.sha
        for name in ("config.json", "config_sentence_transformers.json", "modules.json"):
            try:
                if name in there:
                    api.hf_hub_download(repo, name, revision=info.sha, local_dir=scratch)
            except EntryNotFoundError:
                continue
        theirs = model_kind(Path(scratch))
    if theirs != kind:
        raise InputError(
            f"{repo}: holds a model of another kind ({theirs}) than this one ({kind}), which would be replaced. "
            "Refused; choose another --repo, or delete that one yourself."
        )
    return info.sha


def upload(repo: str, folder: Path, files: list[Path], *, private: bool, parent: str | None) -> str:
    """One commit with all files, and without what they replace, upon the one that was looked at; return it.

    Args:
        repo: Name of the repository.
        folder: Where the files are.
        files: All of them.
        private: Whether to make a new repository private.
        parent: What :func:`head_of` gave; None makes the repository.

    Raises:
        InputError: The Hub refuses, somebody else was faster, or the connection fails.
    """
    api = HfApi()
    with _asking_the_hub(repo, "Unless only its last answer was lost, no commit was made; the folder is as it was."):
        if parent is None:
            api.create_repo(repo, private=private)
        info = api.model_info(repo, revision=parent)
        names = {path.relative_to(folder).as_posix() for path in files}
        there = {sibling.rfilename for sibling in info.siblings or []}
        stale = sorted(n for n in there - names if any(fnmatch.fnmatch(n, pattern) for pattern in _REPLACED))
        for name in sorted(n for n in there - names if fnmatch.fnmatch(n, ".eval_results/*.yaml")):
            with tempfile.TemporaryDirectory() as scratch:  # others may have added theirs
                entry = api.hf_hub_download(repo, name, revision=info.sha, local_dir=scratch)
                stale += [name] if source_of(repo) in Path(entry).read_text(encoding="utf-8") else []
        if stale:
            print(f"Removed, since this version has them not: {', '.join(stale)}")
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


def source_of(repo: str) -> str:
    """Where evaluation results of ours say that they come from."""
    return f"https://huggingface.co/{repo}"


def model_kind(folder: Path) -> str:
    """What a repository's users rely on to stay the same: method and family, or model type, family and modules.

    Whether a method's model is one folder or modules is the same to them.
    """
    family = read_json(folder / "config_sentence_transformers.json").get("model_type")
    modules = [module["type"].rpartition(".")[2] for module in read_json(folder / "modules.json", list, type=str)]
    own = read_json(folder / "config.json", model_type=str).get("model_type")
    heads = {room.module.__name__: room for room in ROOMS.values() if room.module}
    room = heads.get(modules[-1]) if len(modules) > 1 else room_of(own) if modules else None
    parts = [room.config.model_type, family] if room else [own, family, " + ".join(modules)]
    return ", ".join(part for part in parts if part) or "none that can be told"


@contextmanager
def _asking_the_hub(repo: str, then: str) -> Iterator[None]:
    """Say what the Hub refused, and what can be done about it."""
    try:
        yield
    except InputError:  # ours, and a ValueError
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (409, 412):
            raise InputError(
                f"{repo}: was made or changed by somebody else meanwhile (HTTP {status}). {then} Look at it, then run "
                "the same command again."
            ) from error
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
    except ValueError as error:  # of the card's metadata, which the Hub checks before anything is sent
        raise InputError(
            f"{repo}: the Hub refuses the card: {error} {then} Mend --license, or the template."
        ) from error
