"""Open a model folder through every door that its card names, as somebody does who has never heard of polyrep.

``publish`` runs this file as a script, in a process of its own where polyrep cannot be imported and no Hub is asked,
and compares what comes out with the model that it is about to publish. So this file imports nothing of polyrep either.
"""

from __future__ import annotations

import importlib.abc
import inspect
import json
import sys
from pathlib import Path
from typing import Any

TEXTS = ["open ports", "list a folder of files", "tar: archive many files into one file"]
"""Of different lengths, so that some are padded; short, so that no encoder cuts them."""


class Absent(importlib.abc.MetaPathFinder):
    """Makes polyrep unimportable, as on a machine that does not have it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Refuse polyrep under both of its names, and leave everything else to others."""
        if name.split(".")[0] in ("polyrep", "modeling"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def picture() -> Any:
    """An image that is the same everywhere: red grows to the right, green downwards."""
    import numpy as np
    from PIL import Image

    rows, columns = np.mgrid[0:64, 0:64] * 4
    return Image.fromarray(np.stack([columns, rows, 255 - rows], axis=-1).astype(np.uint8))


def encoded(model: Any) -> dict[str, Any]:
    """What a sentence-transformers model gives for :data:`TEXTS` and, where it takes images, for :func:`picture`.

    Returns:
        ``task/kind/number`` -> the vector, or vectors, of that text or image in float32.
    """
    import torch

    def dense(vector: Any) -> Any:
        tensor = torch.as_tensor(vector)
        return (tensor.to_dense() if tensor.layout != torch.strided else tensor).detach().cpu().float().clone()

    found = {}
    for task, encode in (("query", model.encode_query), ("document", model.encode_document)):
        inputs: dict[str, list[Any]] = {"text": TEXTS}
        if task == "document" and "image" in model[0].modalities:
            inputs["image"] = [picture()]
        for kind, some in inputs.items():
            for number, vector in enumerate(encode(some, show_progress_bar=False)):
                found[f"{task}/{kind}/{number}"] = dense(vector)
    return found


def through_transformers(folder: Path, prompts: dict[str, str]) -> dict[str, Any]:
    """The same by AutoModel and the tokenizer or processor alone, as the folder's own settings say to call them.

    Without queries where sentence-transformers lengthens them, which a tokenizer does not.
    """
    import torch
    from transformers import AutoModel, AutoProcessor, AutoTokenizer

    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    settings = json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))
    calls = settings["modality_config"]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    found = {}
    for task in ("document",) if settings.get("query_expansion") else ("query", "document"):
        inputs = {"text": tokenizer([prompts[task] + text for text in TEXTS], padding=True, return_tensors="pt")}
        if task == "document" and "image" in calls:
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
            inputs["image"] = processor(images=[picture()], return_tensors="pt")
        for kind, features in inputs.items():
            with torch.no_grad():
                output = getattr(model, calls[kind]["method"])(**features, task=task)
            name = calls[kind]["method_output_name"]
            there = output.mask if name == "token_embeddings" else [...] * len(output[name])
            for number, vector in enumerate(output[name]):
                found[f"{task}/{kind}/{number}"] = vector[there[number]].float().clone()
    return found


def tried(head: Any, trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Every weight of a head, and what it gives.

    Args:
        head: The model.
        trials: Of each call the ``inputs``, the ``method``, ``fixed`` arguments and the ``outputs`` to keep.
    """
    import torch

    found = {f"weight/{name}": tensor.detach().cpu().clone() for name, tensor in head.state_dict().items()}
    for number, trial in enumerate(trials):
        call = getattr(head.eval(), trial["method"])
        for task in ("query", "document") if "task" in inspect.signature(call).parameters else (None,):
            with torch.no_grad():
                output = call(**trial["inputs"], **trial["fixed"], **({"task": task} if task else {}))
            kept = {name: output.get(name) for name in trial["outputs"]}
            found |= {f"{number}/{task}/{n}": v.float().clone() for n, v in kept.items() if v is not None}
    return found


def main(job: Path) -> None:
    """Open the folder that a JSON file names, door after door; write ``<number>.safetensors`` beside it for each.

    The file holds ``folder``, and ``doors``: lists of a kind, and of what that kind needs. ``family`` takes the class
    of sentence-transformers, ``transformers`` nothing, ``head`` a subfolder, ``module`` that and a class reference.
    ``trusted`` says whether code in the folder may run: without it, only stock models open, by ``family``. ``trials``
    are those of :func:`tried` by subfolder, with the name of a file beside this one for ``inputs``.
    """
    sys.meta_path.insert(0, Absent())
    import sentence_transformers
    from safetensors.torch import load_file, save_file
    from transformers import AutoModel
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    wanted = json.loads(job.read_text(encoding="utf-8"))
    folder, trials = Path(wanted["folder"]), wanted["trials"]
    for trial in (trial for some in trials.values() for trial in some):
        trial["inputs"] = load_file(job.parent / trial["inputs"])
    prompts = {"query": "", "document": ""}
    for number, (kind, *how) in enumerate(wanted["doors"]):
        if kind == "family":
            options = {"trust_remote_code": wanted["trusted"], "device": "cpu"}
            model = getattr(sentence_transformers, how[0])(str(folder), **options)
            found, prompts = encoded(model), {task: model.prompts.get(task) or "" for task in prompts}
        elif kind == "transformers":
            found = through_transformers(folder, prompts)
        elif kind == "head":
            found = tried(AutoModel.from_pretrained(folder, subfolder=how[0], trust_remote_code=True), trials[how[0]])
        else:
            module: Any = get_class_from_dynamic_module(how[1], folder)
            found = tried(module.from_pretrained(str(folder), subfolder=how[0]).model, trials[how[0]])
        save_file(found, job.parent / f"{number}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
