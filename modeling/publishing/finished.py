"""What is known of a finished folder: its weights, how it was trained, and what was measured on it alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import read_json, shipped_folder
from ..hub.calibration import Calibration, read_calibration
from ..hub.cards import HubId, check_template, own_rows
from ..hub.fingerprint import fingerprints, told
from ..hub.folder import check_folder
from ..registry import room_of
from ..report import check_results


@dataclass(frozen=True)
class Finished:
    """A folder that has all that a repository needs, and what is known of it.

    Attributes:
        folder: Where it is.
        fingerprints: Its own, of all versions, and those of what was trained together with it (a head and the whole
            model).
        recipe: What its card says of the training; None where that is not recorded.
        template: Name of the card's template.
        results: What was measured on it, in the layout of results, oldest first.
        picture: Picture of the latest of them that has one.
        calibration: What its scores mean, where that was fitted.
    """

    folder: Path
    fingerprints: Collection[str]
    recipe: Mapping[str, Any] | None
    template: str
    results: list[dict[str, Any]]
    picture: Path | None
    calibration: Calibration | None


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
        InputError: What is missing, all at once; or a file of results, or the calibration, is not of this model.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder. Name one that `train` wrote, e.g. models/NAME/final.")
    folder = folder.resolve()
    named = [Path(place) for place in results]
    files = _files_of_results(folder, named)
    own, record = fingerprints(folder), read_json(folder.parent / "training.json")
    trained = {record.get("fingerprint"), *(record.get("fingerprints") or {}).values()} - {None}
    if not trained & set(own):  # recorded of other weights
        record, trained = {}, set()
    known = {*own, *trained}
    # Older records have no card of their own, but what its recipe says.
    name = template or record.get("template") or record.get("recipe", {}).get("card") or _card_of(folder)
    check_template(name)
    ours = _own_results(folder, files, named, own[0], known)
    datasets = {row["dataset"] for result in ours.values() for row in result["rows"]}
    if unknown := [name for name in hub_ids or {} if name not in datasets]:
        raise InputError(
            f"--hub_dataset {unknown[0]}: the results have no such data set; they have {sorted(datasets)}."
        )
    pictures = [file.with_suffix(".png") for file in ours if file.with_suffix(".png").is_file()]
    picture = pictures[-1] if pictures else None
    calibration = read_calibration(folder, own[0])
    return Finished(folder, known, record.get("card"), name, list(ours.values()), picture, calibration)


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
            f"--dataset DATA --output {beside}`, with its control as a second model."
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
            of = ", ".join(f"{system} ({told(value)})" for system, value in models.items()) or "no model"
            raise InputError(
                f"{file}: measured on {of}, but {folder} has fingerprint {told(digest)}, so its numbers are another "
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
    result = read_json(file, remedy="Name a file that `evaluate` wrote.")
    try:
        check_results(result)
    except InputError as error:
        raise InputError(f"{file}: no results of `evaluate`: {error}") from None
    return result


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
    configs = [folder / "config.json", *sorted(folder.glob("*/config.json"))]
    kinds = [read_json(file, model_type=str).get("model_type") for file in configs]
    cards = [room.card for room in map(room_of, kinds) if room and room.card]
    if not cards:
        raise InputError(f"{folder}: made by none of polyrep's methods, so it has no card. Name one with --card.")
    takes = read_json(folder / "sentence_bert_config.json", modality_config=dict).get("modality_config") or {}
    of_images = f"{cards[0]}_images"
    return (
        of_images if "image" in takes and (shipped_folder("model_cards") / f"{of_images}.md").is_file() else cards[0]
    )
