"""What a score means: ``calibration.json`` in a model's folder, a map from scores to probabilities of relevance.

``polyrep calibrate`` writes it, search reads it. It is numbers alone, and bound to the fingerprint of the model: of
another model the same score means something else.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..files import read_json, write_json
from .fingerprint import fingerprint, told

logger = logging.getLogger(__name__)

CALIBRATION, PICTURE = "calibration.json", "calibration.png"
VERSION = 1
INPUTS = ("score", "lead", "uncertainty")
"""What a map may read of a document that was found: see :func:`inputs_of`."""

_SOURCE = "_polyrep_folder"


@dataclass(frozen=True)
class Calibration:
    """A monotone map from what a search gives to the probability that a document is judged relevant.

    The inputs of a document, each by its weight, add up to its evidence; between the places ``at`` the probability is
    linear in the evidence, and beyond them constant. Neither the score nor the lead has a negative weight, so a higher
    score with the rest equal never has a lower probability, and probabilities follow the order of a query's documents.

    Attributes:
        fingerprint: :func:`polyrep.hub.fingerprint` of the model.
        dataset: What it was fitted on.
        split: Whose queries.
        queries: ``judged``, or ``inverse_cloze`` for sentences, whose one relevant document is where they stood.
        depth: How many of the best documents of each query it was fitted on.
        seed: Of the folds.
        counts: ``queries``, ``candidates`` (documents found, of all queries) and ``relevant`` (of these).
        held_out: What the map did not see when ``ece`` was measured.
        ece: How many of the best documents of each query count -> the expected calibration error of their held-out
            probabilities, in ten bins of equal mass.
        command: What made it.
        weights: Some of :data:`INPUTS` -> weight.
        at: Places, rising.
        probability: At each of them, not falling.
        window: Tokens of the windows that documents were cut into, whose best score counted; 0 for whole documents.
        stride: Tokens from one window to the next; 0 without windows.
    """

    fingerprint: str
    dataset: str
    split: str
    queries: str
    depth: int
    seed: int
    counts: Mapping[str, int]
    held_out: str
    ece: Mapping[str, float]
    command: str
    weights: Mapping[str, float]
    at: Sequence[float]
    probability: Sequence[float]
    window: int = 0
    stride: int = 0

    def evidence(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Weighted sum of the inputs, each of any one shape, which is kept."""
        return sum_of(self.weights, inputs)

    def probabilities(self, scores: np.ndarray, uncertainty: np.ndarray | None = None) -> np.ndarray:
        """Probability of each document of each query.

        Args:
            scores: ``(queries, documents)``, best first: two at least where the index has as many.
            uncertainty: ``(queries,)`` of the queries, where the map reads it.

        Returns:
            ``(queries, documents)``.
        """
        return np.interp(self.evidence(inputs_of(scores, uncertainty)), self.at, self.probability)


def sum_of(weights: Mapping[str, float], inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Weighted sum of inputs by their names, in float64."""
    return np.sum([weight * np.asarray(inputs[name], np.float64) for name, weight in weights.items()], axis=0)


def inputs_of(scores: np.ndarray, uncertainty: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """What a map may read, each ``(queries, documents)``.

    The lead is a document's score less the best other score of its query: of the first document what it is ahead by,
    of the others what they are behind. Unlike the margin to the next document it never has a lower document of a query
    overtake a higher one.

    Args:
        scores: ``(queries, documents)``, best first.
        uncertainty: ``(queries,)``, or None where a model says nothing of it.
    """
    scores = np.asarray(scores, np.float64)
    lead = scores - scores[:, :1]
    if scores.shape[1] > 1:
        lead[:, 0] = scores[:, 0] - scores[:, 1]
    found = {"score": scores, "lead": lead}
    if uncertainty is not None:
        found["uncertainty"] = np.broadcast_to(np.asarray(uncertainty, np.float64)[:, None], scores.shape)
    return found


def write_calibration(folder: Path, calibration: Calibration) -> None:
    """Write ``calibration.json`` into a model's folder, whole or not at all."""
    write_json(folder / CALIBRATION, {"version": VERSION} | asdict(calibration))


def read_calibration(folder: Path, fingerprint: str) -> Calibration | None:
    """The calibration in a model's folder; None where there is none.

    Args:
        folder: The model.
        fingerprint: The model's.

    Raises:
        InputError: The file is damaged, of another version, or of another model.
    """
    file = folder / CALIBRATION
    if not file.is_file():
        return None
    remedy = "Delete the file, or make it again with `polyrep calibrate --overwrite`."
    content = read_json(file, remedy=remedy)
    if content.pop("version", None) != VERSION:
        raise InputError(f"{file}: of another version of the format than {VERSION}. {remedy}")
    content = {"window": 0, "stride": 0} | content  # which files of before there were windows lack
    if wrong := _fault(content):
        raise InputError(f"{file}: {wrong}, so it gives no probabilities. {remedy}")
    found = Calibration(**{name: content[name] for name in Calibration.__dataclass_fields__})
    if found.fingerprint != fingerprint:
        raise InputError(
            f"{file}: made for model {told(found.fingerprint)}, and this one is {told(fingerprint)}, of which a score "
            f"means something else. {remedy}"
        )
    return found


def keep_source(model: Any, folder: Path) -> None:
    """Have an opened model know its folder, where a calibration may lie, now or later."""
    setattr(model, _SOURCE, folder.absolute())


def calibration_of(model: Any, fingerprint: str) -> Calibration | None:
    """The calibration in the folder that a model was opened from; None where there is none, or the model is of none.

    Raises:
        InputError: See :func:`read_calibration`.
    """
    folder = getattr(model, _SOURCE, None)
    return None if folder is None else read_calibration(folder, fingerprint)


def carry_calibration(model: Any, saved: Path, folder: Path) -> None:
    """Copy the calibration that belongs to a model beside what was saved of it.

    Args:
        model: If it was opened from a folder, that one's calibration is its own as long as it is the same model.
        saved: Where it was saved.
        folder: Where that is to lie in the end; what is there already may have the calibration, too.
    """
    for source in dict.fromkeys((getattr(model, _SOURCE, None), folder.absolute())):
        if source is None or not (source / CALIBRATION).is_file():
            continue
        try:
            read_calibration(source, fingerprint(saved))
        except InputError as error:
            logger.warning("The calibration is left behind. %s", error)
            continue
        for name in (CALIBRATION, PICTURE):
            if (source / name).is_file():
                shutil.copyfile(source / name, saved / name)
        return


def _fault(content: Mapping[str, Any]) -> str | None:
    """What is wrong with the content of a file; None if nothing is."""
    for name, kind in _KINDS.items():
        if type(content.get(name)) is not kind:
            return f"{name} is {content.get(name)!r:.80}"
    weights, at, probability = content["weights"], content["at"], content["probability"]
    numbers = {"weights": weights.values(), "ece": content["ece"].values(), "at": at, "probability": probability}
    for name, values in numbers.items():
        if not all(type(value) in (int, float) and abs(value) <= 1e300 for value in values):
            return f"{name} holds something that is no finite number"
    counts = content["counts"]
    if any(type(counts.get(name)) is not int or counts[name] < 0 for name in ("queries", "candidates", "relevant")):
        return f"counts are {counts!r:.80}"
    if "10" not in content["ece"]:
        return f"ece is {content['ece']!r:.80}, without that of the ten best"
    if not weights or weights.keys() - set(INPUTS) or min(weights.get("score", 0), weights.get("lead", 0)) < 0:
        return f"weights are {weights!r:.80}, not of {', '.join(INPUTS)} with none below 0 of the first two"
    if not at or len(at) != len(probability):
        return f"{len(at)} places have {len(probability)} probabilities"
    if (np.diff(at) <= 0).any() or (np.diff(probability) < 0).any():
        return "places do not rise, or probabilities fall"
    return None if 0 <= probability[0] and probability[-1] <= 1 else "a probability is not from 0 to 1"


_KINDS = {
    **dict.fromkeys(("fingerprint", "dataset", "split", "queries", "held_out", "command"), str),
    **dict.fromkeys(("depth", "seed", "window", "stride"), int),
    **dict.fromkeys(("counts", "ece", "weights"), dict),
    **dict.fromkeys(("at", "probability"), list),
}
