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
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from transformers import PreTrainedModel

from ..errors import InputError
from ..files import read_json, refuse_unwritable, staged_folder, write_text
from ..flags import parse
from ..hub.calibration import CALIBRATION
from ..hub.cards import PINNED, HubId, hub_place, own_rows, render_card, ways_to_open
from ..hub.code import localize, may_run, refuse_foreign_code
from ..hub.fingerprint import fingerprint, fingerprints, told
from ..hub.folder import Encoder, is_hub_id, load, save
from ..hub.forms import own_form, room_behind
from .finished import Finished, collect
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


def publish(argv: list[str], *, prog: str = "polyrep publish") -> str | None:
    """Publish the folder named in ``argv``; see :func:`publish_folder`."""
    about = "Publish FOLDER, a trained and measured model, as the repository ORG/NAME on the Hub."
    args, given = parse(PublishArguments, argv, prog, about, "FOLDER", "A model that is trained and measured.")
    return publish_folder(Path(given), args)


def publish_folder(folder: Path, args: PublishArguments) -> str | None:
    """Publish a folder, a model that is trained and measured.

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
    if args.output:
        refuse_unwritable(Path(args.output), "--output")
    head = None if args.dry_run else head_of(args.repo, model_kind(finished.folder), private=args.private)
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(args.output) if args.output else Path(scratch) / "repository"
        with staged_folder(target) as staged:
            model, trusted = _open(finished.folder, args.trust_remote_code)
            _stage(finished, model, args, hub_ids, staged)
            refuse_secrets(staged, args.repo)
            verify(staged, model, trusted)
            lines = ways_to_open(model, args.repo)
            converted = _to_convert(model)
            del model
        notes = _what_is_missing(finished, args)
        if converted:
            notes.append(
                f"{finished.folder} is modules with a head behind them; published is the same model in one folder, "
                f"which AutoModel opens, too. Its fingerprint is {told(fingerprint(target))}: an index made with the "
                "folder itself is refused with it."
            )
        for note in notes:
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
    if not trusted:
        refuse_foreign_code(folder, "opening the model")
    return load(folder, trust_remote_code=trusted, device="cpu"), trusted or may_run(folder, trusted)


def _stage(
    finished: Finished,
    model: Encoder | PreTrainedModel,
    args: PublishArguments,
    hub_ids: Mapping[str, HubId],
    staged: Path,
) -> None:
    """Copy what belongs into the repository, and add what a folder does not hold by itself."""
    source = finished.folder
    with tempfile.TemporaryDirectory() as scratch:
        carried = _carried(source)
        if _to_convert(model):
            assert isinstance(model, Encoder)
            if "onnx" in {name.parts[0] for name in carried}:
                raise InputError(
                    f"{source / 'onnx'}: is an export of the head, and what is published is the whole model in one "
                    f"folder. Save that with `polyrep.save(polyrep.load({str(source)!r}), NEW)` and export NEW, or "
                    "remove the folder."
                )
            licences = {name: file for name, file in carried.items() if name.match("LICENSE*")}
            carried = licences | _carried(save(model, Path(scratch) / "model", form="folder"))
        for name, file in carried.items():
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".safetensors":
                _link(file, staged / name)  # never written to, and large
            else:
                shutil.copyfile(file, staged / name)
    localize(staged)
    exported_from = read_json(staged / "onnx" / "export.json").get("fingerprint")
    if any(staged.glob("onnx/*")) and exported_from not in fingerprints(source):
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
        calibration=finished.calibration if (staged / CALIBRATION).is_file() else None,
    )
    write_text(staged / "README.md", str(card))
    for dataset, entries in _eval_results(finished, hub_ids, args.repo).items():
        write_text(staged / ".eval_results" / f"{dataset}.yaml", yaml.safe_dump(entries, sort_keys=False))


def _carried(folder: Path) -> dict[Path, Path]:
    """What of a folder belongs into a repository: name relative to the folder -> file."""
    return {
        name: file
        for file in sorted(path for path in folder.rglob("*") if path.is_file())
        for name in [file.relative_to(folder)]
        if is_carried(name.as_posix())
        and not any(fnmatch.fnmatch(part, pattern) for part in name.parts for pattern in _LEFT_BEHIND)
    }


def _to_convert(model: Encoder | PreTrainedModel) -> bool:
    """Whether a folder holds modules with a head behind them that the method's own model can hold."""
    return isinstance(model, Encoder) and bool(room_behind(model) and own_form(model))


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
