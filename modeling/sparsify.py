"""Sparse vectors from cached dense ones: by a Dense2Sparse head, and by the stock sparse auto-encoder as its rival."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_model
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.losses import CSRLoss
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder
from torch import nn

from .encoding.embeddings import Embeddings
from .files import staged_folder, write_json
from .training.head_trainer import HeadTrainer
from .training.pairs import HeadData
from .training.recipes import HeadTrainingArguments
from .training.sides import Side, encode_sparse

OPERATING_POINTS = {"48/128 words": (48, 128), "12/128 words": (12, 128)}
"""Words kept of a query and of a document: the best on dev with FLOPs of at most 5 and of at most 1 on every set."""

CSR_SIZES = (32, 64, 128)
CSR_STEPS, CSR_BATCH = 300, 128
CSR_RATE = 1e-2
"""Learning rate: the best on dev of 1e-3 to 3e-2."""


def with_head(head: Any, side: Side, task: str, expand: bool = True) -> Embeddings:
    """Encode with a Dense2Sparse head, keeping every word that a document can hold, a third of the vocabulary.

    Args:
        head: A Dense2SparseModel, whose own pruning is switched off.
        side: Queries or documents.
        task: ``query`` or ``document``.
        expand: Whether words beyond the text's own may count.
    """
    config = head.config
    config.document_top_k = config.query_top_k = config.mass = config.min_weight = None
    ids = ("input_ids", "attention_mask")
    what: dict[str, Any] = {"modality": "text" if side.tokens is not None else "image", "compact": True}
    compact = encode_sparse(
        lambda f: head(f["sentence_embedding"], *map(f.get, ids), task, expand=expand, **what).sentence_embedding, side
    )
    assert compact.indices is not None
    terms = head.expansion_terms.numpy().astype(np.int32)
    return replace(compact, indices=terms[compact.indices], dim=config.vocab_size)


def pruned(embeddings: Embeddings, words: int | None = None, mass: float | None = None) -> Embeddings:
    """What the head's own pruning leaves (a test holds both to the same result), without encoding again.

    Args:
        embeddings: Of kind ``sparse``.
        words: Heaviest words of a text that are kept.
        mass: Share of a text's weight that the kept words reach together.
    """
    assert embeddings.offsets is not None and embeddings.indices is not None
    lengths = embeddings.lengths
    text_of = np.repeat(np.arange(len(embeddings)), lengths)
    heaviest_first = np.lexsort((-embeddings.values.astype(np.float32), text_of))
    values = embeddings.values[heaviest_first].astype(np.float64)
    place = np.arange(len(values)) - np.repeat(embeddings.offsets[:-1], lengths)
    keep = place < (words or embeddings.dim)
    if mass is not None:
        before = np.cumsum(values) - values
        before -= np.repeat(before[np.minimum(embeddings.offsets[:-1], len(values) - 1)], lengths)
        total = np.bincount(text_of, values, minlength=len(embeddings))
        keep &= before < mass * total[text_of]
    kept = heaviest_first[keep]
    counts = np.bincount(text_of[keep], minlength=len(embeddings))
    return replace(
        embeddings,
        values=embeddings.values[kept],
        indices=embeddings.indices[kept],
        offsets=np.concatenate([[0], np.cumsum(counts)]),
    )


def csr(dim: int, size: int) -> tuple[SparseAutoEncoder, CSRLoss]:
    """The stock sparse auto-encoder with ``size`` active dimensions, and its objective.

    As the library's own, but normalised inside, since vectors of unit length hardly move it, and without its
    contrastive part, which cost quality on dev; its scores are cosines for the same reason.
    """
    module = SparseAutoEncoder(dim, hidden_dim=4 * dim, k=size, k_aux=dim, normalize=True)
    return module, CSRLoss(SparseEncoder(modules=[module], device="cpu"), gamma=0.0)


def with_csr(module: nn.Module, side: Side) -> Embeddings:
    """Encode with a fitted sparse auto-encoder."""
    return encode_sparse(lambda f: module({"sentence_embedding": f["sentence_embedding"]})["sentence_embedding"], side)


def fit_module(
    module: nn.Module, objective: Any, data: HeadData, folder: Path, *, steps: int, rate: float, batch: int, seed: int
) -> None:
    """Train a module on cached pairs; write ``module.safetensors`` and ``training.json`` into ``folder``.

    Args:
        module: What is kept.
        objective: Takes features and labels as :class:`polyrep.training.head_trainer.HeadTrainer` passes them.
        data: The pairs.
        folder: Appears once all is written.
        steps: Of training.
        rate: Learning rate, reached after 20 steps.
        batch: Pairs of a step, or all if there are fewer.
        seed: Of the order of pairs.
    """
    with staged_folder(folder) as staged:
        arguments = HeadTrainingArguments(
            output_dir=str(staged / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=min(batch, len(data)),
            learning_rate=rate,
            warmup_steps=20,
            max_grad_norm=5.0,
            save_strategy="no",
            logging_steps=100,
            report_to="none",
            use_cpu=True,
            seed=seed,
            remove_unused_columns=False,
            dataloader_drop_last=True,
        )
        trainer = HeadTrainer(objective=objective, args=arguments, train_dataset=data, data_collator=data.collate)
        seconds = trainer.train().metrics["train_runtime"]
        save_model(module, str(staged / "module.safetensors"))
        write_json(
            staged / "training.json",
            {"steps": trainer.state.global_step, "seconds": seconds, "log": trainer.state.log_history},
        )
