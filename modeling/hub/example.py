"""The tiny model of a method that the shared tests hold to the rules of every method, and how it becomes a folder.

A method's ``example.py`` makes it, on a backbone of two layers and in no time; only tests ask for it. It may name
``RUNS`` beside it: the shipped runs that the shared tests train, by a word for each, as :class:`TinyRun`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from transformers import AutoTokenizer

from .folder import Encoder


@dataclass
class Example:
    """What the shared tests need of a method.

    Attributes:
        models: Name -> sentence-transformers model of each kind of folder that the method makes; a model whose name
            has ``retriever`` in it is one folder without modules of its own.
        weight: Name of a weight of the method's own in the first model's root file, for the test that drops it.
        bad_config: (config class, arguments, word the error must contain) for each check of the config.
        symmetric: Queries and documents are encoded alike.
    """

    models: dict[str, Encoder]
    weight: str | None = None
    bad_config: list[tuple[type, dict[str, Any], str]] = field(default_factory=list)
    symmetric: bool = False


@dataclass(frozen=True)
class TinyRun:
    """A shipped run made one of seconds, on the backbone of the example's pipeline.

    Attributes:
        run: Its name in ``hub_configs``.
        flags: What makes it small.
        batch: Pairs a step.
        together: Further flags under which processes that share a step take the steps of one: what each of them draws
            or orders for itself is switched off.
        solved: Weights that are solved for after training, which are known but for their signs.
    """

    run: str
    flags: str = ""
    batch: int = 2
    together: str = ""
    solved: Sequence[str] = ()


def one_folder(
    model: Any,
    reads: Any,
    folder: Path,
    family: type[Encoder] = SentenceTransformer,
    transformer: type[Transformer] = Transformer,
    *,
    methods: Mapping[str, str] = {"text": "forward"},  # noqa: B006  read only
    keywords: Sequence[str] = ("task",),
    output: str = "sentence_embedding",
) -> Any:
    """A method's retriever as a folder, opened as its ``sentence_bert_config.json`` would have it.

    Args:
        model: The retriever.
        reads: Its tokenizer or processor, or a folder whose tokenizer it takes.
        folder: Where to write it.
        family: What opens it; it scores by the inner product, or of several vectors by MaxSim.
        transformer: Module class around the model.
        methods: Modality -> method of the model that encodes it.
        keywords: What its ``forward`` is told beside the batch.
        output: Field of its output that is read.
    """
    model.save_pretrained(folder)
    processor = AutoTokenizer.from_pretrained(reads) if isinstance(reads, str | Path) else reads
    processor.save_pretrained(folder)
    opened = transformer(
        str(folder),
        modality_config={
            modality: {"method": method, "method_output_name": output} for modality, method in methods.items()
        },
        module_output_name=output,
        unpad_inputs=False,
    )
    score: Any = "maxsim" if output == "token_embeddings" else "dot"
    whole: Any = family(modules=[opened], similarity_fn_name=score, device="cpu")
    whole.module_kwargs = {"0": list(keywords)}
    return whole
