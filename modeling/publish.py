"""Publish a finished folder as a Hub repository that opens in one line.

What goes up is a copy of the folder with everything that it should carry (code, requirements, card, results) and
nothing that it should not (paths, names and tokens of this machine, pickles, what a trainer left). The copy is opened
through every door in a process without polyrep, and only if that gives the folder's own vectors is it uploaded, in one
commit. The folder itself is never written to.
"""

from __future__ import annotations

import fnmatch
import getpass
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml, get_token
from safetensors.torch import load_file, save_file
from transformers import HfArgumentParser, PreTrainedModel

from . import ROOMS, Room, doors, export
from .cards import head_folders, own_rows, render_card, ways_to_open
from .data import load_retrieval_dataset
from .errors import InputError
from .evaluation import evaluate
from .files import staged_folder, write_json, write_text
from .hub import PREFIX, Encoder, check_folder, fetch, file_sha256, fingerprint, load, localize, read_json, without
from .recipes import Plan
from .report import check_results
from .upload import check_repo_name, head_of, refuse_without_token, upload

TOLERANCE = 1e-4
"""Largest difference between a vector here and through a door, as a share of the largest number: rounding is below."""

_CARRIED = (
    "*.json",
    "*.safetensors",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.py",
    "LICENSE*",
    "onnx/*.onnx",
    "onnx/*.data",
)
"""What a model repository holds, at any depth; of a folder's other files none is uploaded."""

_LEFT_BEHIND = ("checkpoint-*", "runs", "trainer_state.json", "training_args.json", ".*")
"""What a trainer or an editor leaves, by the name of the file or of a folder above it."""

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_ABSOLUTE = re.compile(r"(?<![\w.~:/<>*)\]}-])(?:/[A-Za-z_][\w.-]*(?:/[\w.-]+)+|[A-Z]:\\{1,2}\w+)")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
"""Where any piece of any text may be a word."""


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
        default=None, metadata={"help": "Licence of the weights as the Hub spells it; default: the backbone's."}
    )
    hub_dataset: list[str] = field(
        default_factory=list,
        metadata={"help": "NAME=ORG/NAME: the data set NAME of the results is a copy of this one on the Hub."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code in the folder that is not this polyrep's, which you have read."}
    )


@dataclass(frozen=True)
class Finished:
    """A folder that has all that a repository needs, and what is known of it.

    Attributes:
        folder: Where it is.
        fingerprints: Its own, and those of what was trained together with it (a head and the whole model).
        recipe: What its card says of the training; None where it was made by hand.
        template: Name of the card's template.
        results: What was measured on it, in the layout of results, oldest first.
        picture: Picture of the latest of them that has one.
    """

    folder: Path
    fingerprints: Collection[str]
    recipe: Mapping[str, Any] | None
    template: str
    results: list[dict[str, Any]]
    picture: Path | None


def publish(argv: list[str], *, prog: str = "polyrep publish") -> str | None:
    """Publish the folder named in ``argv``.

    Returns:
        The commit, 40 hex digits; None after ``--dry_run``.

    Raises:
        InputError: The folder is not finished, its results are another model's, it opens to other vectors, it tells
            what is nobody's business, or the Hub refuses. Nothing is uploaded then, and the folder is as it was.
    """
    parser = HfArgumentParser(
        [PublishArguments],  # type: ignore[list-item]
        prog=prog,
        allow_abbrev=False,
        description="Publish FOLDER, a trained and measured model, as the repository ORG/NAME on the Hub.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="A model that is trained and measured.")
    args, named = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    check_repo_name(args.repo)
    hub_ids = _hub_ids(args.hub_dataset)
    finished = collect(Path(named.folder), args.results, args.card, hub_ids)
    if args.output and Path(args.output).exists():
        raise InputError(f"--output {args.output}: exists already. Name a new folder.")
    head = None if args.dry_run else head_of(args.repo, finished.folder)
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(args.output) if args.output else Path(scratch) / "repository"
        with staged_folder(target) as staged:
            model = _open(finished.folder, args.trust_remote_code)
            _stage(finished, model, args, hub_ids, staged)
            refuse_secrets(staged)
            verify(staged, model)
            lines = ways_to_open(model, args.repo)
            del model
        files = sorted(path for path in target.rglob("*") if path.is_file())
        size = sum(path.stat().st_size for path in files)
        if args.dry_run:
            for path in files:
                print(f"{path.stat().st_size:>13,}  {path.relative_to(target)}")
            print(f"{args.repo}: {len(files)} files, {size:,} bytes, opens through every door. Nothing was uploaded.")
            return None
        commit = upload(args.repo, target, files, private=args.private, parent=head)
    print(f"{args.repo}: {len(files)} files, {size:,} bytes, at commit {commit}. It opens by")
    for name, line in lines:
        print(f"  {name:<20} {line.replace('<commit>', commit)}")
    return commit


def refuse_unpublishable(plan: Plan) -> str:
    """What can be known before training of whether a run can be published: return the repository's name.

    Raises:
        InputError: No name or no token, a head alone, or data without a judged test split of texts or images.
    """
    args, recipe = plan.args, plan.recipe
    if args.hub_token:
        raise InputError(
            "--hub_token: command lines are kept with the model, and this one could be read there. Set HF_TOKEN, or "
            "run `hf auth login`."
        )
    if not args.hub_model_id:
        raise InputError("--push_to_hub: no name to publish under. Add --hub_model_id ORG/NAME.")
    check_repo_name(args.hub_model_id)
    if not recipe.dry_run:
        refuse_without_token()
    if plan.head and plan.head.head_only:
        raise InputError(
            "--push_to_hub: the head alone encodes no text, so it could not be measured. Leave out --head_only."
        )
    for source in recipe.datasets:
        dataset = load_retrieval_dataset(source, "test", keep_empty=recipe.keep_empty)
        if dataset.vectors:
            raise InputError(
                f"--push_to_hub: {source} brings vectors, not what they were made of, so the model could not be "
                "measured on it. Train without, measure on a data set with images, then `polyrep publish`."
            )
    return str(args.hub_model_id)


def measure_and_publish(plan: Plan, folder: Path, repo: str, prog: str) -> None:
    """Measure a trained model beside its untouched backbone and BM25, on the test split of its data; publish it.

    Args:
        plan: The run.
        folder: What it made.
        repo: Where it goes.
        prog: How ``train`` was called, so that the recorded command is one of the same kind.
    """
    recipe, results = plan.recipe, folder.parent / "results"
    backbone, pinned = recipe.backbone, recipe.revision
    if backbone != "minilm" and not Path(backbone).is_dir():
        pinned = fetch(backbone, revision=recipe.revision).name  # a snapshot is called by its commit
    verb = "evaluate.py" if prog.endswith(".py") else "polyrep evaluate"
    corpora = [load_retrieval_dataset(d, "test", keep_empty=recipe.keep_empty).corpus for d in recipe.datasets]
    texts = all(isinstance(next(iter(corpus.values())), str) for corpus in corpora)
    # BM25 reads no images, and neither does the text half of a dual encoder.
    baselines = (["bm25"] if texts else []) + ([] if plan.head and plan.head.vision else [backbone])
    command = [str(folder), "--dataset", *recipe.datasets, "--baselines", ",".join(baselines) or "none"]
    command += ["--trust_remote_code"]
    command += ["--output", str(results), "--name", "test", *(["--revision", pinned] if pinned else [])]
    try:
        evaluate([*command, *(["--keep_empty"] if recipe.keep_empty else [])], prog=verb)
        flags = ["--private"] if plan.args.hub_private_repo else []
        flags += ["--trust_remote_code"] if recipe.trust_remote_code else []
        publish([str(folder), "--repo", repo, "--results", str(results / "test.json"), *flags])
    except InputError as error:
        raise InputError(
            f"{folder} is trained and whole, but not published: {error} Go on with `polyrep publish {folder} --repo "
            f"{repo}`, after `evaluate` where results are missing."
        ) from error


def collect(
    folder: Path, results: list[str], template: str = "", hub_ids: Mapping[str, str] | None = None
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
    missing = []
    try:
        check_folder(folder)
    except InputError as error:
        missing.append(str(error))
    places = [Path(place) for place in results] or [folder.resolve().parent / "results"]
    files = [file for place in places for file in (sorted(place.glob("*.json")) if place.is_dir() else [place])]
    if not files or not all(file.is_file() for file in files):
        named = " ".join(results) or f"{folder.parent / 'results'}"
        missing.append(
            f"{named}: no results. Measure the model first: `python evaluate.py {folder} --dataset DATA --output "
            f"{folder.parent / 'results'}`, with its control as a second model."
        )
    if missing:
        raise InputError(f"{folder}: not finished.\n  " + "\n  ".join(missing))
    digest = fingerprint(folder)
    record = read_json(folder.resolve().parent / "training.json")
    trained = {record.get("fingerprint"), *(record.get("fingerprints") or {}).values()} - {None}
    if digest not in trained:
        record = {}
    fingerprints = {digest} | (trained if record else set())
    recipe = record.get("card")
    name = template or record.get("template") or _card_of(folder)
    measured = {file: read_results(file) for file in files}
    ours = {file: result for file, result in measured.items() if own_rows(result, fingerprints)}
    # A folder that the user names may hold other models' results too; the model's own may not, nor may a named file.
    for file in files if not results or not ours else [place for place in places if place in measured]:
        if file not in ours:
            models = measured[file]["models"]
            of = ", ".join(f"{system} ({value[:12]})" for system, value in models.items()) or "no model"
            raise InputError(
                f"{file}: measured on {of}, but {folder} has fingerprint {digest[:12]}, so its numbers are another "
                "model's. Refused; measure this model, or leave the file out."
            )
    kept = sorted(ours, key=lambda file: ours[file]["created"])
    known = {row["dataset"] for result in ours.values() for row in result["rows"]}
    if unknown := [name for name in hub_ids or {} if name not in known]:
        raise InputError(f"--hub_dataset {unknown[0]}: the results have no such data set; they have {sorted(known)}.")
    pictures = [file.with_suffix(".png") for file in kept if file.with_suffix(".png").is_file()]
    measurements = [ours[file] for file in kept]
    return Finished(folder, fingerprints, recipe, name, measurements, pictures[-1] if pictures else None)


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


def refuse_secrets(folder: Path) -> None:
    """Refuse a folder whose texts tell of this machine: a token, a home directory, a user.

    Raises:
        InputError: File, line and what was found; a token is not repeated.
    """
    user, token = getpass.getuser(), get_token()
    address = re.compile(rf"(?<![\w-]){re.escape(user)}@")
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        for number, line in enumerate(_lines(file), start=1):
            found = None
            if _TOKEN.search(line) or token and token in line:
                found = "a token of the Hub"
            elif file.name not in _VOCABULARIES and (match := _ABSOLUTE.search(line)):
                found = f"the path {match[0]}"
            elif file.name not in _VOCABULARIES and address.search(line):
                found = f"the user {user}"
            if found:
                raise InputError(
                    f"{file.relative_to(folder)}:{number}: holds {found} of the machine it was made on, which "
                    "everybody could read. Nothing was uploaded; remove it from the model's folder, or train anew."
                )


def verify(folder: Path, model: Encoder | PreTrainedModel) -> None:
    """Open a folder through every door in a process without polyrep, and compare with the model it was made of.

    Raises:
        InputError: A door does not open, or gives something else.
    """
    heads: dict[str, tuple[PreTrainedModel, type | None]] = {}  # subfolder -> the head and its module's class
    wanted: list[tuple[list[str], dict[str, torch.Tensor]]] = []
    if isinstance(model, PreTrainedModel):
        room = next((room for room in ROOMS.values() if isinstance(model, room.head or room.model)), None)
        heads[""] = model, room.module if room else None
    else:
        vectors = doors.encoded(model)
        wanted.append((["family", type(model).__name__], vectors))
        if read_json(folder / "config.json").get("model_type", "").startswith(PREFIX):
            wanted.append((["transformers"], vectors))
        modules: dict[str, Any] = dict(model.named_children())
        for subfolder in head_folders(model):
            module = modules[subfolder.partition("_")[0]]
            heads[subfolder] = module.model, type(module)
    with tempfile.TemporaryDirectory() as scratch:
        trials: dict[str, list[dict[str, Any]]] = {}
        for subfolder, (head, owner) in heads.items():
            calls: list[dict[str, Any]] = [
                {"inputs": inputs, "method": graph.method, "fixed": dict(graph.fixed), "outputs": list(graph.outputs)}
                for graph, inputs in export.trials(head)
            ]
            expected = doors.tried(head, calls)
            wanted.append((["head", subfolder], expected))
            if owner:
                wanted.append((["module", subfolder, _reference(owner)], expected))
            for number, call in enumerate(calls):
                name = f"{subfolder}-{number}.inputs.safetensors"
                save_file(call["inputs"], Path(scratch) / name)
                call["inputs"] = name
            trials[subfolder] = calls
        job = Path(scratch) / "job.json"
        write_json(job, {"folder": str(folder.resolve()), "doors": [door for door, _ in wanted], "trials": trials})
        secret = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # what opens a model needs none
        environment = {name: value for name, value in os.environ.items() if name not in secret}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch, "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        script = [sys.executable, "-P", str(Path(doors.__file__).resolve()), str(job)]
        ran = subprocess.run(script, capture_output=True, text=True, env=environment, cwd=scratch, check=False)
        for number, (door, expected) in enumerate(wanted):
            file = Path(scratch) / f"{number}.safetensors"
            if not file.is_file():
                said = (ran.stderr.strip() or "it says nothing").splitlines()[-1].rstrip(".")
                raise InputError(
                    f"{' '.join(filter(None, door))}: does not open in a process without polyrep: "
                    f"{said}. Nothing was uploaded; mend the folder."
                )
            _compare(" ".join(filter(None, door)), load_file(file), expected)


def _compare(door: str, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    if missing := sorted(set(expected) ^ set(found)):
        raise InputError(f"{door}: gives other parts than the model, e.g. {missing[0]}. Nothing was uploaded.")
    for name, ours in expected.items():
        theirs = found[name]
        scale = max(1.0, float(ours.abs().max())) if ours.numel() else 1.0
        same = theirs.shape == ours.shape
        largest = float((theirs - ours).abs().max()) if same and ours.numel() else 0.0
        if not same or not largest <= TOLERANCE * scale:  # NaN is not at most anything
            difference = f"differs by {largest:.3g}" if same else f"has shape {tuple(theirs.shape)}"
            raise InputError(
                f"{door}: opened without polyrep, {name} {difference} from the folder's own {tuple(ours.shape)}, so "
                "users would get another model. Nothing was uploaded; save the model again."
            )


def _reference(module: type) -> str:
    """A module's class as folders name it: ``modeling_room.Class``."""
    return f"{module.__module__.rpartition('.')[2]}.{module.__name__}"


def _card_of(folder: Path) -> str:
    """Template of the method whose model a folder holds, by its configs."""
    types = {read_json(file).get("model_type") for file in folder.rglob("config.json")}
    rooms: dict[str, Room] = {}
    for room in ROOMS.values():
        for part in filter(None, (room.model, room.head)):
            rooms[part.config_class.model_type] = room  # type: ignore[union-attr]
    if found := [rooms[name].card for name in types if name in rooms and rooms[name].card]:
        return str(found[0])
    raise InputError(f"{folder}: made by none of polyrep's methods, so it has no card. Name one with --card.")


def _hub_ids(named: list[str]) -> dict[str, str]:
    pairs = [name.partition("=")[::2] for name in named]
    for name, identifier in pairs:
        if not name or not re.fullmatch(r"[\w.-]+/[\w.-]+", identifier):
            raise InputError(f"--hub_dataset {name}={identifier}: expected NAME=ORG/NAME, e.g. scifact=mteb/scifact.")
    return dict(pairs)


def _open(folder: Path, trusted: bool) -> Encoder | PreTrainedModel:
    """The model, on the CPU; code that is not the installed one's needs the user's word."""
    shipped = {file_sha256(Path(str(sys.modules[room.model.__module__].__file__))) for room in ROOMS.values()}
    foreign = [file for file in sorted(folder.rglob("*.py")) if file_sha256(file) not in shipped]
    if foreign and not trusted:
        raise InputError(
            f"{foreign[0]}: is not the code of this polyrep, and opening the model would run it. Read it, then pass "
            "--trust_remote_code."
        )
    return load(folder, trust_remote_code=True, device="cpu")


def _stage(
    finished: Finished,
    model: Encoder | PreTrainedModel,
    args: PublishArguments,
    hub_ids: Mapping[str, str],
    staged: Path,
) -> None:
    """Copy what belongs into the repository, and add what a folder does not hold by itself."""
    source = finished.folder
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        name = file.relative_to(source)
        if any(fnmatch.fnmatch(part, pattern) for part in name.parts for pattern in _LEFT_BEHIND):
            continue
        if not any(fnmatch.fnmatch(str(name), pattern) for pattern in _CARRIED):
            continue
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".safetensors":
            _link(file, staged / name)  # never written to, and large
        else:
            shutil.copyfile(file, staged / name)
    for file in staged.rglob("*.json"):
        if file.name in ("config.json", "tokenizer_config.json"):
            write_json(file, without(read_json(file), ("_name_or_path", "name_or_path")))
    localize(staged)
    exported = read_json(staged / "onnx" / "export.json").get("fingerprint")
    if exported and exported != fingerprint(source):
        raise InputError(f"{source}/onnx: exported from other weights. Export them again, or remove the folder.")
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


def _eval_results(finished: Finished, hub_ids: Mapping[str, str], repo: str) -> dict[str, list[dict[str, Any]]]:
    """Entries for the leaderboards of the data sets that are on the Hub: file name -> what it holds."""
    entries: dict[str, list[EvalResultEntry]] = {}
    for result in finished.results:
        rows = own_rows(result, finished.fingerprints)
        ranked = {(row["dataset"], row["split"]) for row in rows if row["metric"] == "nDCG@10"}
        for row in rows:
            identifier = row.get("hub_dataset") or hub_ids.get(row["dataset"])
            beside = (row["dataset"], row["split"]) in ranked and row["metric"] != "nDCG@10"
            if not identifier or beside:  # a leaderboard takes one number a task
                continue
            entry = EvalResultEntry(
                dataset_id=identifier,
                task_id=row["dataset"],
                value=round(row["value"], 5),
                dataset_revision=row.get("hub_revision"),
                date=result["created"],
                source_url=f"https://huggingface.co/{repo}",
                source_name="Model card",
                notes=f"{row['metric']}, {row['split']} split",
            )
            entries.setdefault(identifier.replace("/", "--"), []).append(entry)
    return {name: eval_result_entries_to_yaml(some) for name, some in entries.items()}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


def _lines(file: Path) -> Iterator[str]:
    """Texts of a file that somebody may read: of weights, the header."""
    if file.suffix == ".safetensors":
        with file.open("rb") as weights:
            header = json.loads(weights.read(int.from_bytes(weights.read(8), "little")))
        yield json.dumps(header.get("__metadata__", {}))
    elif file.suffix not in (".png", ".onnx", ".data", ".model"):
        with file.open(encoding="utf-8", errors="replace") as lines:
            yield from lines
