"""Model cards: the templates of ``model_cards/`` filled with where a model comes from, what it scores, who may use it.

A card is written twice: by ``train`` beside the weights, and by ``publish``, which knows the repository's name and the
results. Both give every template the same variables (:data:`VARIABLES`), and a template that asks for another one is
refused, since a card with a hole in it looks finished.
"""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from sentence_transformers import MultiVectorEncoder
from transformers import PreTrainedModel

from ..errors import InputError
from ..files import shipped_folder
from ..registry import room_of
from ..report import METRIC_NAMES, to_markdown
from .calibration import Calibration
from .folder import PREFIX, Encoder, is_hub_id, prompts_of
from .forms import own_form, place_of_backbone

logger = logging.getLogger(__name__)

ABSOLUTE_PATH = re.compile(r"(?<![\w.~<>*)\]}-])(?:/[A-Za-z_][\w.@-]*(?:/[\w.@-]+)+|[A-Z]:\\{1,2}\w[\w\\.-]*)")
"""A path from the root, of two parts or more; no part of an address, once those are taken out."""

PINNED = "<commit>"
"""Stands for the 40 digits of a commit: a card cannot know those of the commit that it is part of."""

VARIABLES = {
    "card_data": "metadata of the card, as YAML",
    "title": "last part of the repository's name, or None",
    "model_id": "ORG/NAME, or None before it is published",
    "backbone": "the backbone as code opens it: its id on the Hub, or a path to be filled in",
    "prompts": "what sentence-transformers puts before queries and documents, where it puts something",
    "recipe": "what train recorded (command, pairs, licences, ...), or None",
    "config": "config of the room's part of the model; empty for stock modules",
    "output": "field of AutoModel's output that is the representation",
    "reading": "what sentence-transformers does to the length of queries and documents, where it does something",
    "pipeline": "folders of backbone and head of modules that no one folder of the method holds; empty for others",
    "opened": "function: what to call -> the line of code that opens the model with it",
    "opened_head": "function: the room's sentence-transformers module -> the line that opens its head, where it is",
    "head_alone": "whether the model is a head, to be attached to its backbone",
    "doors": "what opens the model, and its head: (name, line of code) for each",
    "results": "tables of what was measured on these weights, as Markdown; may be empty",
    "picture": "file name of their picture, or None",
    "calibration": "what `calibration.json` in the folder holds, or None",
    "licences": "(what, licence) for code, backbone and each data set",
}
"""Every variable of a template."""


@dataclass(frozen=True)
class HubId:
    """A data set of the Hub, its task there, by which leaderboards go, and its commit where that is known."""

    dataset: str
    task: str
    revision: str | None = None


def render_card(
    model: Encoder | PreTrainedModel,
    template: str,
    *,
    recipe: Mapping[str, Any] | None = None,
    model_id: str | None = None,
    results: Iterable[Mapping[str, Any]] = (),
    fingerprints: Collection[str] = (),
    hub_ids: Mapping[str, HubId] | None = None,
    picture: str | None = None,
    licence: str | None = None,
    calibration: Calibration | None = None,
) -> ModelCard:
    """Fill ``model_cards/<template>.md``.

    Args:
        model: The model that the card is of.
        template: Name of the template.
        recipe: What ``train`` recorded of the run, see ``training.json``; None where there is no such record.
        model_id: ``ORG/NAME`` of the repository, where it has one.
        results: Results in the layout of :func:`polyrep.report.write_results`, measured on this model.
        fingerprints: The model's, by which its rows are known among them; a head also has that of the whole model.
        hub_ids: Data set -> its id on the Hub, where the results do not say it.
        picture: File name of a picture of the results in the model's folder.
        licence: Licence of the weights as the Hub spells it; default: none is stated.
        calibration: What is in the model's folder.

    Raises:
        InputError: There is no such template, or it asks for a variable that no card has.
    """
    environment = check_template(template)
    results, heads = list(results), places_of_heads(model)
    context = {
        "card_data": _metadata(
            model, template, model_id, recipe, results, fingerprints, hub_ids or {}, licence
        ).to_yaml(),
        "title": model_id.rpartition("/")[2] if model_id else None,
        "model_id": model_id,
        "backbone": _backbone(recipe),
        "prompts": _prompts(model),
        "recipe": recipe,
        "config": _config_of(model),
        "output": "token_embeddings" if isinstance(model, MultiVectorEncoder) else "sentence_embedding",
        "reading": _reading(model),
        "pipeline": [place_of_backbone(model), *heads] if any(heads) else [],  # type: ignore[arg-type]
        "opened": partial(opened, model_id),
        "opened_head": partial(_opened_head, heads, model_id),
        "head_alone": isinstance(model, PreTrainedModel),
        "doors": _ways(model, model_id, heads),
        "results": "\n".join(_tables(result) for result in results),
        "picture": picture,
        "calibration": calibration,
        "licences": [(what, name or "not stated") for what, name in licences_of(model, recipe, licence)],
    }
    try:
        text = environment.get_template(f"{template}.md").render(context)
    except jinja2.UndefinedError as error:
        raise InputError(
            f"model_cards/{template}.md: {error.message}, so the card would have a hole. A model without a "
            "record of its training has no recipe, and fields of one must stand inside `{% if recipe %}`."
        ) from None
    return ModelCard(re.sub(r"\n{3,}", "\n\n", text))  # what an empty part leaves behind


def opened(
    model_id: str | None, opener: str, subfolder: str | None = None, code: bool = True, settings: str = ""
) -> str:
    """The line of code that opens a model: pinned where it is on the Hub, with the flag where it carries code.

    Args:
        model_id: ``ORG/NAME``, or None for a local folder.
        opener: What to call, e.g. ``SentenceTransformer`` or ``AutoModel.from_pretrained``.
        subfolder: Module folder, for a head inside a pipeline.
        code: Whether the opener runs code of the repository, which it must then be allowed to.
        settings: Further arguments, as code.
    """
    arguments = [f'"{model_id or "path/to/this/folder"}"']
    arguments += [f'subfolder="{subfolder}"'] if subfolder else []
    arguments += [settings] if settings else []
    arguments += [f'revision="{PINNED}"'] if model_id else []
    arguments += ["trust_remote_code=True"] if code else []
    return f"{opener}({', '.join(arguments)})"


def ways_to_open(model: Encoder | PreTrainedModel, model_id: str | None = None) -> list[tuple[str, str]]:
    """What opens a model, in the form that :func:`~polyrep.hub.folder.save` gives it, and what its head alone.

    Returns:
        A name and a line of code for each.
    """
    return _ways(model, model_id, places_of_heads(model))


def _ways(model: Encoder | PreTrainedModel, model_id: str | None, heads: Mapping[str, str]) -> list[tuple[str, str]]:
    line = partial(opened, model_id)
    alone = [
        (f"the head alone, {name} of polyrep", line(f"{name}.from_pretrained", place, code=False))
        for place, name in heads.items()
    ]
    if isinstance(model, PreTrainedModel):
        return [("transformers", line("AutoModel.from_pretrained")), *alone]
    code = any(_is_ours(getattr(module, "model", None)) for module in model)
    ways = [("sentence-transformers", line(type(model).__name__, code=code))]
    if any(heads):
        return [*ways, *(("the head alone", line("AutoModel.from_pretrained", place)) for place in heads), *alone]
    if code:
        ways.insert(0, ("transformers", line("AutoModel.from_pretrained")))
        whole: Any = model[0]
        if not alone and isinstance(getattr(whole.model, "head", None), PreTrainedModel):
            alone = [("the head alone", f"{line('AutoModel.from_pretrained')}.head")]
    return ways + alone


def places_of_heads(model: Encoder | PreTrainedModel) -> dict[str, str]:
    """Where a module of ours opens a head: its folder, empty for the root -> name of the module's class."""
    if isinstance(model, PreTrainedModel):
        room = room_of(model.config.model_type)
        return {"": room.module.__name__} if room and room.module else {}
    room = own_form(model)
    if room is None:
        return head_folders(model)
    inside = getattr(room.module, "inside", None)  # what it takes a head out of
    return {"": room.module.__name__} if room.module and inside == room.config.model_type else {}


def head_folders(model: Encoder) -> dict[str, str]:
    """Module folders of a pipeline that hold a head of ours -> name of the module's class."""
    modules = list(model.named_children())[1:]  # the first is the backbone
    return {
        f"{name}_{type(module).__name__}": type(module).__name__
        for name, module in modules
        if _is_ours(getattr(module, "model", None))
    }


def _opened_head(heads: Mapping[str, str], model_id: str | None, name: str, settings: str = "") -> str:
    """The head by its module, where it is, or else what was trained beside the folder."""
    for place, module in heads.items():
        if module == name:
            return opened(model_id, f"{name}.from_pretrained", place, code=False, settings=settings)
    return f'{name}.from_pretrained("path/to/head"{", " + settings if settings else ""})'


def _reading(model: Encoder | PreTrainedModel) -> dict[str, Any]:
    first: Any = None if isinstance(model, PreTrainedModel) else model[0]
    names = ("query_length", "document_length", "query_expansion")
    read = {name: getattr(first, name, None) for name in names}
    return read if any(read.values()) else {}


def _prompts(model: Encoder | PreTrainedModel) -> dict[str, str]:
    return {} if isinstance(model, PreTrainedModel) else {t: p for t, p in prompts_of(model).items() if p}


def _config_of(model: Encoder | PreTrainedModel) -> dict[str, Any]:
    parts = [model] if isinstance(model, PreTrainedModel) else [getattr(module, "model", None) for module in model]
    parts.reverse()  # a head may stand behind another model of ours
    return next((part.config.to_dict() for part in parts if part is not None and _is_ours(part)), {})


def _is_ours(model: Any) -> bool:
    return isinstance(model, PreTrainedModel) and model.config.model_type.startswith(PREFIX)


def licences_of(
    model: Encoder | PreTrainedModel, recipe: Mapping[str, Any] | None, own: str | None = None
) -> list[tuple[str, str | None]]:
    """What a model is made of, each part with its licence, None where its publisher states none.

    What the weights as a whole may be used for is ``own``, the publisher's word: it does not follow from the parts.
    """
    stated = (recipe or {}).get("licences") or {}
    parts = [("these weights", own)]
    if _config_of(model):
        parts.append(("code in this repository", "apache-2.0"))
    if recipe:
        parts.append(("backbone weights", stated.get("backbone")))
        if recipe.get("vision_id"):
            parts.append(("vision encoder's weights", stated.get("vision")))
        parts += [(f"training data {name}", stated.get("data", {}).get(name)) for name in recipe["pairs"]]
    return parts


def stated_licence(folder: Path) -> str | None:
    """Licence in the metadata of a folder's README.md, of a model or a data set; None where it states none."""
    readme = folder / "README.md"
    found = re.match(r"---\n(.*?)\n---\n", readme.read_text(encoding="utf-8") if readme.is_file() else "", re.S)
    try:
        data = (yaml.safe_load(found[1]) if found else None) or {}
    except yaml.YAMLError as error:
        logger.warning("%s: its metadata cannot be read (%s), so its licence is not known.", readme, error)
        return None
    licence = data.get("license") if isinstance(data, dict) else None
    if licence == "other":
        licence = data.get("license_name") or "other"
    return ", ".join(licence) if isinstance(licence, list) else licence


def data_licence(source: str) -> str | None:
    """Licence of a data set, a folder or a Hub id, by its card; None where that states none or is not to be had."""
    if Path(source).is_dir():
        return stated_licence(Path(source))
    try:
        return stated_licence(Path(hf_hub_download(source, "README.md", repo_type="dataset")).parent)
    except (HfHubHTTPError, OSError) as error:
        logger.warning("%s: its card is not to be had (%s), so its licence is not known.", source, error)
        return None


def public_command(command: str) -> str:
    """A command as others may read it: no path of this machine, and nothing about where it wrote or who may write."""
    shown: list[str] = []
    hidden = ""
    for word in shlex.split(command):
        flag, equals, value = word.partition("=")
        flag = flag.replace("-", "_").replace("__", "--", 1) if flag.startswith("--") else flag  # as it may be spelt
        if hidden in _WHERE or hidden in _SWITCHES and word.lower() in ("true", "false"):
            hidden = ""  # the value of the flag before
        elif flag in (*_WHERE, *_SWITCHES):
            hidden = "" if equals else flag
        else:
            hidden = ""
            given = word.partition("=")[0]
            shown.append(f"{given}={_last_part(value)}" if equals and flag.startswith("--") else _last_part(word))
    return shlex.join(shown)


_WHERE = (
    *("--output_dir", "--output", "--cache_dir", "--mined_cache", "--mteb_cache"),
    *("--hub_model_id", "--hub_token"),
)
_SWITCHES = ("--overwrite", "--push_to_hub", "--hub_private_repo")
"""Flags that a card leaves out, with a value and without."""


def _last_part(word: str) -> str:
    """A path that leads out of the working directory as its last part, also in a list with commas; else the word."""
    if "," in word:
        return ",".join(map(_last_part, word.split(",")))
    path = Path(word)
    if path.is_absolute() or ".." in path.parts or word.startswith("~"):
        return path.parent.name if path.name == "final" and path.parent.name else path.name
    return ABSOLUTE_PATH.sub(lambda match: Path(match[0]).name, word)  # inside JSON, say


def hub_place(row: Mapping[str, Any], hub_ids: Mapping[str, HubId]) -> HubId | None:
    """Where on the Hub the data set of a row is, by the publisher's word or by the row's; None if it is not there."""
    if known := hub_ids.get(row["dataset"]):
        return known
    return HubId(row["hub_dataset"], row["dataset"], row.get("hub_revision")) if "hub_dataset" in row else None


def own_rows(result: Mapping[str, Any], fingerprints: Collection[str]) -> list[dict[str, Any]]:
    """The rows of results that were measured on the model with one of these fingerprints."""
    systems = {system for system, digest in result["models"].items() if digest in fingerprints}
    return [row for row in result["rows"] if row["system"] in systems]


def _metadata(
    model: Encoder | PreTrainedModel,
    template: str,
    model_id: str | None,
    recipe: Mapping[str, Any] | None,
    results: list[Mapping[str, Any]],
    fingerprints: Collection[str],
    hub_ids: Mapping[str, HubId],
    licence: str | None,
) -> ModelCardData:
    """What the Hub reads: library, task, tags, base model, data, licence, and the results as a model index."""
    stock = getattr(model, "model_card_data", None)  # a bare head is no sentence-transformers model
    tags = [tag for tag in (stock.tags if stock else []) if not tag.startswith(("dataset_size:", "loss:"))]
    tags += ["polyrep", template.replace("_", "-")]
    base = datasets = None
    if recipe:
        tags += [f"loss:{recipe['objective']}", f"dataset_size:{sum(recipe['pairs'].values())}"]
        base = [i for i in (recipe["backbone_id"], recipe.get("vision_id")) if i and is_hub_id(i)] or None
        datasets = [source for source in recipe.get("datasets", {}).values() if source] or None
    # Of one number measured twice, the latest.
    measured = {
        (row["dataset"], row["split"], row["metric"]): row
        for result in results
        for row in own_rows(result, fingerprints)
    }
    entries = [
        EvalResult(
            task_type="information-retrieval" if kind == "Retrieval" else kind.lower(),
            task_name=kind,
            dataset_type=place.dataset if place else row["dataset"],
            dataset_name=row["dataset"],
            dataset_split=row["split"],
            dataset_revision=place.revision if place else None,
            metric_type=METRIC_NAMES.get(row["metric"], row["metric"]),
            metric_name=row["metric"],
            metric_value=round(row["value"], 5),
        )
        for row in measured.values()
        for kind, place in [(row.get("task_type", "Retrieval"), hub_place(row, hub_ids))]
    ]
    index: dict[str, Any] = {"model_name": model_id or template, "eval_results": entries} if entries else {}
    return ModelCardData(
        library_name="sentence-transformers" if stock else "transformers",
        pipeline_tag=(stock.pipeline_tag if stock else None) or "feature-extraction",
        tags=list(dict.fromkeys(tags)),
        base_model=base[0] if base and len(base) == 1 else base,
        datasets=datasets,
        license=licence,
        **index,
    )


def _backbone(recipe: Mapping[str, Any] | None) -> str:
    name = recipe["backbone_id"] if recipe else "the/same/backbone"
    return name if is_hub_id(name) or not recipe else f"path/to/{name}"


def _tables(result: Mapping[str, Any]) -> str:
    """The tables of a results file as part of a card: headings one level down, the command as others may read it."""
    markdown = to_markdown({**result, "command": public_command(result["command"])})
    return re.sub(r"^# .*\n+", "", markdown).replace("\n## ", "\n### ").replace("## ", "### ", 1).strip() + "\n"


def check_template(template: str) -> jinja2.Environment:
    """Look at a template and at the parts it includes before any of it is filled; return what fills it.

    Raises:
        InputError: There is no such template, it cannot be parsed, or it asks for a variable that no card has.
    """
    folder = shipped_folder("model_cards")
    environment = jinja2.Environment(  # Markdown, not HTML: nothing is escaped
        loader=jinja2.FileSystemLoader(folder), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    pending, seen = [f"{template}.md"], set()
    while pending:
        name = pending.pop()
        seen.add(name)
        there = sorted(path.stem for path in folder.glob("[!_]*.md"))
        if template not in there or not (folder / name).is_file():
            raise InputError(f"model_cards/{name}: no such template. There are {', '.join(there)}.")
        try:
            tree = environment.parse((folder / name).read_text(encoding="utf-8"))
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"model_cards/{name}:{error.lineno}: {error.message}. Mend the template.") from None
        for variable in sorted(jinja2.meta.find_undeclared_variables(tree) - set(VARIABLES)):
            near = get_close_matches(variable, VARIABLES, n=1)
            raise InputError(
                f"model_cards/{name}: asks for {variable!r}, which no card has, so the card would have a hole. "
                + (f"Did you mean {near[0]!r}?" if near else f"Variables: {', '.join(VARIABLES)}.")
            )
        pending += [part for part in jinja2.meta.find_referenced_templates(tree) if part and part not in seen]
    return environment


def hub_source(path: str, revision: str | None = None) -> dict[str, str]:
    """Fields of a row that name its data set on the Hub; none for a folder."""
    if Path(path).is_dir() or not is_hub_id(path):
        return {}
    return {"hub_dataset": path} | ({"hub_revision": revision} if revision else {})
