"""How late interaction is learned: contrastively on MaxSim, and from a teacher that has read each pair together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers.multi_vector_encoder.losses import MultiVectorMultipleNegativesRankingLoss
from sentence_transformers.multi_vector_encoder.scoring import colbert_scores
from sentence_transformers.util import get_rank
from torch import Tensor

from ...training.losses import refuse_unknown_teaching, refuse_untaught, taught
from ...training.objective import Objective
from ...training.sides import Features


class LateInteractionObjective(Objective):
    """The stock contrastive loss on MaxSim, and beside it a teacher's scores of each query's document and negatives.

    One pass over the texts serves both. ColBERTv2 (Santhanam et al., 2022) learns from the teacher alone, of 64
    documents a query; with a few of them, what a batch has in other documents is worth keeping.

    Args:
        scale: Scores are multiplied by it before the softmax; MaxSim is a sum over query tokens, so 1 is a start.
        distill_weight: Weight of the teacher, see :func:`polyrep.training.losses.taught`; needs --teacher and
            --hard_negatives, or data with scores. 0 is the stock loss.
        distill: Follow the teacher's order, or its scores.
        gather_across_devices: Documents of all processes are negatives.
    """

    def __init__(
        self,
        model: Any,
        scale: float = 1.0,
        distill_weight: float = 0.0,
        distill: str = "order",
        gather_across_devices: bool = False,
    ):
        super().__init__()
        refuse_unknown_teaching(distill_weight, distill)
        self.model, self.scale, self.distill_weight, self.distill = model, scale, distill_weight, distill
        self.gather_across_devices = gather_across_devices
        self.contrast = MultiVectorMultipleNegativesRankingLoss(
            model, scale=scale, similarity_fct=self._scores, gather_across_devices=gather_across_devices
        )

    def _scores(self, *vectors: Any, **masks: Any) -> Tensor:
        """MaxSim ``(queries, queries x documents of each)``, kept for the teacher's part of the loss."""
        self.scores = colbert_scores(*vectors, **masks)
        return self.scores

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> dict[str, Tensor]:
        """Parts of the loss of a batch: columns of queries, their documents, and hard negatives.

        Args:
            sentence_features: As for any loss of sentence-transformers.
            labels: ``(batch, documents of each)`` scores of a teacher, if it is to be followed.

        Raises:
            InputError: There is no teacher's score to learn from.
        """
        columns = list(sentence_features)
        parts = {"contrast": self.contrast(columns)}
        if self.distill_weight:
            scored = labels if labels is not None and labels.ndim == 2 else None
            teacher = refuse_untaught(self.distill_weight, scored)
            batch, each = teacher.shape
            rows = torch.arange(batch, device=teacher.device)[:, None]
            first = get_rank() * batch if self.gather_across_devices else 0
            lists = (first + rows) * each + torch.arange(each, device=teacher.device)  # documents go query by query
            parts["distill"] = self.distill_weight * taught(
                self.scores.gather(1, lists) * self.scale, teacher, self.distill
            )
        del self.scores  # with its graph
        return parts

    def get_config_dict(self) -> dict[str, Any]:
        """Arguments, for the model card."""
        told = {"distill_weight": self.distill_weight, "distill": self.distill} if self.distill_weight else {}
        return {"scale": self.scale, "gather_across_devices": self.gather_across_devices} | told

    @property
    def citation(self) -> str:
        """BibTeX of the loss, for the model card."""
        return self.contrast.citation
