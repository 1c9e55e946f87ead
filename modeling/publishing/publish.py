"""Publish a finished folder as a Hub repository that opens in one line.

What goes up is a copy of the folder with everything that it should carry (code, requirements, card, results) and
nothing that it should not (paths, names and tokens of this machine, pickles, what a trainer left). The copy is opened
through every door in a process without polyrep, and only if that gives the folder's own vectors is it uploaded, in one
commit. The folder itself is never written to.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from transformers import PreTrainedModel

from ..errors import InputError
from ..files import file_sha256, read_json, shipped_folder, staged_folder, write_text
from ..flags import parse
from ..hub.cards import PINNED, HubId, check_template, hub_place, own_rows, render_card, ways_to_open
from ..hub.code import code_of, localize, refuse_foreign_code
from ..hub.fingerprint import fingerprint
from ..hub.folder import Encoder, check_folder, is_hub_id, load
from ..registry import ROOMS, room_of
from ..report import check_results
from .inspection import refuse_secrets, verify
from .upload import check_repo_name, head_of, is_carried, model_kind, source_of, upload

_LEFT_BEHIND = ("checkpoint-*", "runs", "trainer_state.json", "training_args.json", ".*")
"""What a trainer or an editor leaves, by the name of the file or of a folder above it."""


@dataclass
class PublishArguments:
    """What to publish where."""

    _argument_group_name = "publish"

    repo: str = field(metadata={"help": "ORG/NAME of the repository."})
    private: bool = field(default=False, metadata={"help": "Make a new repository private."})
    dry_run: bool = field(
        default=False, metadata={"help": "Do everything but the upload, list the files and ask the Hub nothing."}
    )
    results: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Files of evaluate (--output), or folders that hold some; default: `results` beside the folder."
        },
    )
    output: str | None = field(
        default=None, metadata={"help": "Keep what is uploaded in this new folder, to look at."}
    )
    card: str = field(default="", metadata={"help": "Template in model_cards/; default: that of the method."})
    license: str | None = field(
        default=None, metadata={"help": "Licence of the weights as the Hub spells it; default: none is stated."}
    )
    hub_dataset: list[str] = field(
        default_factory=list,
        metadata={
            "help": "NAME=ORG/NAME or NAME=ORG/NAME:TASK: the data set NAME of the results is a copy of this one on "
            "the Hub, TASK its task there (default: NAME)."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code in the folder that is not this polyrep's, which you have read."}
    )


@dataclass(frozen=True)
class Finished:
    """A folder that has all that a repository needs, and what is known of it.

    Attributes:
        folder: Where it is.
        fingerprint: Its own.
        fingerprints: Also those of what was trained together with it (a head and the whole model).
        recipe: What its card says of the training; None where that is not recorded.
        template: Name of the card's template.
        results: What was measured on it, in the layout of results, oldest first.
        picture: Picture of the latest of them that has one.
    """

    folder: Path
    fingerprint: str
    fingerprints: Collection[str]
    recipe: Mapping[str, Any] | None
    template: str
    results: list[dict[str, Any]]
    picture: Path | None


def publish(argv: list[str], *, prog: str = "polyrep publish") -> str | None:
    """Publish the folder named in ``argv``; see :func:`publish_folder`."""
    about = "Publish FOLDER, a trained and measured model, as the repository ORG/NAME on the Hub."
    args, given = parse(PublishArguments, argv, prog, about, "FOLDER", "A model that is trained and measured.")
    return publish_folder(Path(given), args)


def publish_folder(folder: Path, args: PublishArguments) -> str | None:
    """Publish a folder.

    Args:
        folder: A model that is trained and measured.
        args: Where to, and how.

    Returns:
        The commit, 40 hex digits; None after ``--dry_run``.

    Raises:
        InputError: The folder is not finished, its results are another model's, it opens to other vectors, it tells
            what is nobody's business, or the Hub refuses. Nothing is uploaded then, and the folder is as it was.
    """
    check_repo_name(args.repo)
    hub_ids = _hub_ids(args.hub_dataset)
    finished = collect(folder, args.results, args.card, hub_ids)
    if args.output and (Path(args.output).exists() or finished.folder in Path(args.output).resolve().parents):
        raise InputError(f"--output {args.output}: exists, or is in the model's folder. Name a new one elsewhere.")
    head = None if args.dry_run else head_of(args.repo, model_kind(finished.folder), private=args.private)
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(args.output) if args.output else Path(scratch) / "repository"
        with staged_folder(target) as staged:
            model, trusted = _open(finished.folder, args.trust_remote_code)
            _stage(finished, model, args, hub_ids, staged)
            refuse_secrets(staged, args.repo)
            verify(staged, model, trusted)
            lines = ways_to_open(model, args.repo)
            del model
        for note in _what_is_missing(finished, args):
            print(f"Note: {note}")
        files = sorted(path for path in target.rglob("*") if path.is_file())
        size = sum(path.stat().st_size for path in files)
        if args.dry_run:
            for path in files:
                print(f"{path.stat().st_size:>13,}  {path.relative_to(target)}")
            print(f"{args.repo}: {len(files)} files, {size:,} bytes, open without polyrep. Nothing was uploaded.")
            return None
        commit = upload(args.repo, target, files, private=args.private, parent=head)
    print(f"{args.repo}: {len(files)} files, {size:,} bytes, at commit {commit}. It opens by")
    for name, line in lines:
        print(f"  {name:<20} {line.replace(PINNED, commit)}")
    return commit


def collect(
    folder: Path, results: list[str], template: str = "", hub_ids: Mapping[str, HubId] | None = None
) -> Finished:
    """What is known of a finished folder.

    Args:
        folder: The model.
        results: Files of results, or folders that hold some; empty for ``results`` beside the model's folder.
        template: Of the card; default: what ``train`` recorded, else the method's.
        hub_ids: Data sets of the results that are on the Hub under another name.

    Raises:
        InputError: What is missing, all at once; or a file of results is not of this model.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder. Name one that `train` wrote, e.g. models/NAME/final.")
    folder = folder.resolve()
    named = [Path(place) for place in results]
    files = _files_of_results(folder, named)
    digest, record = fingerprint(folder), read_json(folder.parent / "training.json")
    trained = {record.get("fingerprint"), *(record.get("fingerprints") or {}).values()} - {None}
    if digest not in trained:  # recorded of other weights
        record, trained = {}, set()
    fingerprints = {digest} | trained
    # Older records have no card of their own, but what its recipe says.
    name = template or record.get("template") or record.get("recipe", {}).get("card") or _card_of(folder)
    check_template(name)
    ours = _own_results(folder, files, named, digest, fingerprints)
    known = {row["dataset"] for result in ours.values() for row in result["rows"]}
    if unknown := [name for name in hub_ids or {} if name not in known]:
        raise InputError(f"--hub_dataset {unknown[0]}: the results have no such data set; they have {sorted(known)}.")
    pictures = [file.with_suffix(".png") for file in ours if file.with_suffix(".png").is_file()]
    picture = pictures[-1] if pictures else None
    return Finished(folder, digest, fingerprints, record.get("card"), name, list(ours.values()), picture)


def _files_of_results(folder: Path, named: list[Path]) -> list[Path]:
    """Files that the user names, those in folders that he names, or those beside the model; the model is checked too.

    Raises:
        InputError: What is missing, all at once.
    """
    missing = []
    try:
        check_folder(folder)
    except InputError as error:
        missing.append(str(error))
    beside = folder.parent / "results"
    places = named or [beside]
    files = [file for place in places for file in (sorted(place.glob("*.json")) if place.is_dir() else [place])]
    if not files or not all(file.is_file() for file in files):
        missing.append(
            f"{' '.join(map(str, places))}: no results. Measure the model first: `python evaluate.py {folder} "
            f"--dataset DATA --trust_remote_code --output {beside}`, with its control as a second model."
        )
    if missing:
        raise InputError(f"{folder}: not finished.\n  " + "\n  ".join(missing))
    return files


def _own_results(
    folder: Path, files: list[Path], named: list[Path], digest: str, fingerprints: Collection[str]
) -> dict[Path, dict[str, Any]]:
    """Those of the files that are of this model, oldest first.

    Raises:
        InputError: A file that should be is not, or claims something of another model.
    """
    measured = {file: read_results(file) for file in files}
    ours = {file: result for file, result in measured.items() if own_rows(result, fingerprints)}
    # A folder that the user names may hold other models' results too; the model's own may not, nor may a named file.
    for file in files if not named or not ours else [place for place in named if place in measured]:
        if file not in ours:
            models = measured[file]["models"]
            of = ", ".join(f"{system} ({value[:12]})" for system, value in models.items()) or "no model"
            raise InputError(
                f"{file}: measured on {of}, but {folder} has fingerprint {digest[:12]}, so its numbers are another "
                "model's. Refused; measure this model, or leave the file out."
            )
    for file, result in ours.items():
        _refuse_others_claims(file, result, fingerprints)
    return dict(sorted(ours.items(), key=lambda item: item[1]["created"]))


def read_results(file: Path) -> dict[str, Any]:
    """Results from a file, checked against their layout.

    Raises:
        InputError: It is no JSON, or not of that layout.
    """
    result = read_json(file)
    try:
        check_results(result)
    except InputError as error:
        raise InputError(f"{file}: no results of `evaluate`: {error}") from None
    return result


def _what_is_missing(finished: Finished, args: PublishArguments) -> list[str]:
    """What a reader of the card would ask for in vain."""
    notes = []
    if not args.license:
        notes.append("no --license, so the card states none for the weights, only what it knows of their parts.")
    if finished.recipe is None:
        notes.append(
            f"{finished.folder.parent / 'training.json'} is of other weights, of an older polyrep or not there, so "
            "the card does not say how the model was trained."
        )
    measured = {system for result in finished.results for system in {row["system"] for row in result["rows"]}}
    own = {row["system"] for result in finished.results for row in own_rows(result, finished.fingerprints)}
    if measured == own:
        notes.append(
            "nothing was measured beside the model, so its numbers say little: add its control and a baseline."
        )
    return notes


def _refuse_others_claims(file: Path, result: Mapping[str, Any], fingerprints: Collection[str]) -> None:
    """A card repeats the claims of its results, so each must be of this model, and say so if others were measured."""
    own = {system for system, digest in result["models"].items() if digest in fingerprints}
    for claim in result["claims"]:
        of = claim.get("system") or (None if set(result["models"]) - own else next(iter(own)))
        if of not in own:
            raise InputError(
                f"{file}: claims {claim['claim']!r} of {of or 'one of several models without saying which'}, and the "
                f"card is of {', '.join(sorted(own))}. Refused; give the claim its `system`, or leave the file out."
            )


def _card_of(folder: Path) -> str:
    """Template of the method whose model a folder holds, by its configs: of the root first, then of its modules."""
    kinds = [
        read_json(file).get("model_type") for file in [folder / "config.json", *sorted(folder.glob("*/config.json"))]
    ]
    cards = [room.card for room in map(room_of, kinds) if room and room.card]
    if not cards:
        raise InputError(f"{folder}: made by none of polyrep's methods, so it has no card. Name one with --card.")
    takes = read_json(folder / "sentence_bert_config.json").get("modality_config") or {}
    of_images = f"{cards[0]}_images"
    return (
        of_images if "image" in takes and (shipped_folder("model_cards") / f"{of_images}.md").is_file() else cards[0]
    )


def _hub_ids(named: list[str]) -> dict[str, HubId]:
    found = {}
    for entry in named:
        name, _, place = entry.partition("=")
        identifier, _, task = place.partition(":")
        if not name or not is_hub_id(identifier):
            raise InputError(f"--hub_dataset {entry}: expected NAME=ORG/NAME, e.g. scifact=mteb/scifact.")
        found[name] = HubId(identifier, task or name)
    return found


def _open(folder: Path, trusted: bool) -> tuple[Encoder | PreTrainedModel, bool]:
    """The model, on the CPU, and whether its code may run; what is not the installed one's needs the user's word."""
    refuse_foreign_code(folder)
    shipped = {file_sha256(file) for room in ROOMS.values() for file in code_of(room.model.__module__)}
    code = sorted(folder.rglob("*.py"))
    foreign = [file for file in code if file_sha256(file) not in shipped]
    if foreign and not trusted:
        raise InputError(
            f"{foreign[0]}: is not the code of this polyrep, and opening the model would run it. Read it, then pass "
            "--trust_remote_code."
        )
    trusted = bool(code) or trusted
    return load(folder, trust_remote_code=trusted, device="cpu"), trusted


def _stage(
    finished: Finished,
    model: Encoder | PreTrainedModel,
    args: PublishArguments,
    hub_ids: Mapping[str, HubId],
    staged: Path,
) -> None:
    """Copy what belongs into the repository, and add what a folder does not hold by itself."""
    source = finished.folder
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        name = file.relative_to(source)
        if any(fnmatch.fnmatch(part, pattern) for part in name.parts for pattern in _LEFT_BEHIND):
            continue
        if not is_carried(name.as_posix()):
            continue
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".safetensors":
            _link(file, staged / name)  # never written to, and large
        else:
            shutil.copyfile(file, staged / name)
    localize(staged)
    exported_from = read_json(staged / "onnx" / "export.json").get("fingerprint")
    if any(staged.glob("onnx/*")) and exported_from != finished.fingerprint:
        raise InputError(
            f"{source / 'onnx'}: exported from other weights, or by something that does not say from which, so they "
            "may be another model. Export them again with `polyrep export-onnx --overwrite`, or remove the folder."
        )
    picture = None
    if finished.picture:
        picture = "results.png"
        shutil.copyfile(finished.picture, staged / picture)
    card = render_card(
        model,
        finished.template,
        recipe=finished.recipe,
        model_id=args.repo,
        results=finished.results,
        fingerprints=finished.fingerprints,
        hub_ids=hub_ids,
        picture=picture,
        licence=args.license,
    )
    write_text(staged / "README.md", str(card))
    for dataset, entries in _eval_results(finished, hub_ids, args.repo).items():
        write_text(staged / ".eval_results" / f"{dataset}.yaml", yaml.safe_dump(entries, sort_keys=False))


def _eval_results(finished: Finished, hub_ids: Mapping[str, HubId], repo: str) -> dict[str, list[dict[str, Any]]]:
    """Entries for the leaderboards of the data sets that are on the Hub: file name -> what it holds.

    A leaderboard takes one number a task: nDCG@10 where there is one, of the test split, and the latest.
    """
    entries: dict[tuple[str, str], EvalResultEntry] = {}
    for result in finished.results:
        # MTEB's tasks have splits of their own.
        rows = [r for r in own_rows(result, finished.fingerprints) if r["split"] == "test" or "task_type" in r]
        ranked = {row["dataset"] for row in rows if row["metric"] == "nDCG@10"}
        for row in rows:
            known = hub_place(row, hub_ids)
            if known is None or row["dataset"] in ranked and row["metric"] != "nDCG@10":
                continue
            entries[known.dataset, known.task] = EvalResultEntry(
                dataset_id=known.dataset,
                task_id=known.task,
                value=round(row["value"], 5),
                dataset_revision=known.revision,
                date=result["created"],
                source_url=source_of(repo),
                source_name="Model card",
                notes=f"{row['metric']}, {row['split']} split",
            )
    files: dict[str, list[EvalResultEntry]] = {}
    for (dataset, _), entry in entries.items():
        files.setdefault(dataset.replace("/", "--"), []).append(entry)
    return {name: eval_result_entries_to_yaml(some) for name, some in files.items()}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
