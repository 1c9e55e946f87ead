"""The stock sparse auto-encoder on cached vectors: what a learned sparse head is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_model
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.losses import CSRLoss
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder
from torch import nn

from ...encoding.embeddings import Embeddings
from ...files import staged_folder, write_json
from ...training.arguments import HeadTrainingArguments
from ...training.head_trainer import HeadTrainer
from ...training.pairs import HeadData
from ...training.sides import SentenceSide, encode_sparse

CSR_SIZES = (32, 64, 128)
CSR_STEPS, CSR_BATCH = 300, 128
CSR_RATE = 1e-2
"""Learning rate: the best on dev of 1e-3 to 3e-2."""


def csr(dim: int, size: int) -> tuple[SparseAutoEncoder, CSRLoss]:
    """The stock sparse auto-encoder with ``size`` active dimensions, and its objective.

    As the library's own, but normalised inside, since vectors of unit length hardly move it, and without its
    contrastive part, which cost quality on dev; its scores are cosines for the same reason.
    """
    module = SparseAutoEncoder(dim, hidden_dim=4 * dim, k=size, k_aux=dim, normalize=True)
    return module, CSRLoss(SparseEncoder(modules=[module], device="cpu"), gamma=0.0)


def with_csr(module: nn.Module, side: SentenceSide) -> Embeddings:
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
