"""The test room's objective: InfoNCE over the documents of all processes."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from polyrep.search.scoring import dot
from polyrep.training.losses import gather, in_batch_labels


class ToyLoss(torch.nn.Module):
    """InfoNCE with in-batch negatives.

    Args:
        model: The model to train.
        temperature: Scores are divided by it.
    """

    def __init__(self, model, temperature: float = 0.1):
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, sentence_features, labels=None):
        tasks = ("query", "document")
        queries, documents = (
            F.normalize(self.model(f, task=t)["sentence_embedding"], dim=-1)
            for f, t in zip(sentence_features, tasks, strict=True)
        )
        scores = dot(queries, gather(documents)) / self.temperature  # (local queries, documents of all processes)
        return F.cross_entropy(scores, in_batch_labels(len(queries), queries.device))

    def get_config_dict(self):
        return {"temperature": self.temperature}
