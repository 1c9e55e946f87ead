"""What tells one model from another: a hash over its weight files and module configs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..files import file_sha256, read_json

NOT_FINGERPRINTED = ("transformers_version", "_name_or_path", "__version__")


def fingerprint(folder: Path) -> str:
    """SHA-256 over the weight files and module configs of a model folder.

    Tokenizer, prompts and card do not count, nor do version stamps and the path a model was loaded from, so a copy
    saved again has the same value.
    """
    digest = hashlib.sha256()
    for file in weight_files(folder):
        digest.update(f"{file.relative_to(folder)}:{file_sha256(file)}\n".encode())
    for name in ("config.json", "sentence_bert_config.json"):
        for file in sorted(folder.rglob(name)):
            content = json.dumps(without(read_json(file), NOT_FINGERPRINTED), sort_keys=True)
            digest.update(f"{file.relative_to(folder)}:{content}\n".encode())
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """Every weight file of a model folder, those of its modules and of their parts included, but no exports."""
    files = sorted(folder.rglob("*.safetensors"))
    return [file for file in files if not {"onnx", "openvino"} & set(file.relative_to(folder).parts)]


def without(content: Any, keys: tuple[str, ...]) -> Any:
    """A copy of parsed JSON without some keys, at every depth."""
    if isinstance(content, dict):
        return {k: without(v, keys) for k, v in content.items() if k not in keys}
    return [without(v, keys) for v in content] if isinstance(content, list) else content
