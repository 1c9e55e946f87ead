"""How two frozen encoders are brought into one space: the dense teacher, and backbone, of an image-text head."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from sentence_transformers.util import get_rank
from torch import Tensor

from ...errors import InputError
from ...training.losses import gather, in_batch_labels, info_nce, judged_relevant
from ...training.objective import Objective, Rows
from ...training.pairs import HeadData
from ...training.sides import Features
from .modeling_dual_encoder import DualEncoderHead


class DualEncoderLoss(Objective):
    """InfoNCE in both directions over all captions and images of a step, with a learned temperature (CLIP).

    The same image under another of its captions is no negative. Both encoders stay as they are: their vectors come
    from a cache, and two maps are learned.

    Args:
        model: The head.
        temperature (float): Of the softmax at the start.
        standardize (bool): Bring every feature of either side to mean 0 and deviation 1 over the training data.
    """

    trains_on = "sentence"
    needs_labels = True

    def __init__(self, model: DualEncoderHead, temperature: float = 0.05, standardize: bool = True):
        super().__init__()
        if temperature <= 0:
            raise InputError(f"--temperature {temperature}: a softmax needs one above 0. Use e.g. 0.05.")
        self.model, self.temperature, self.standardize = model, temperature, standardize

    @torch.no_grad()
    def prepare(self, data: HeadData) -> Rows:
        """Measure both sides' features, and start the temperature."""
        self.model.log_scale.fill_(-math.log(self.temperature))
        for side, layer in (("query", cast(Any, self.model.text)), ("document", cast(Any, self.model.image))):
            moments, count = torch.zeros(2, len(layer.mean), dtype=torch.float64), 0
            for batch in data.batches(side) if self.standardize else ():
                vectors = batch["sentence_embedding"].double()
                moments += torch.stack([vectors.sum(0), vectors.square().sum(0)])
                count += len(vectors)
            if count:
                mean, square = moments / count
                layer.mean.copy_(mean)
                deviation = (square - mean**2).clamp(min=0).sqrt()
                # A feature that hardly ever moves would otherwise be blown up to noise.
                layer.deviation.copy_(deviation.clamp(min=1e-2 * float(deviation.mean()) + 1e-12))
        return data

    def forward(self, features: list[Features], labels: Tensor) -> Tensor:
        """Loss of a batch.

        Args:
            features: Captions ``(batch, ...)``, then images ``(candidates, ...)``; with ``sentence_embedding`` and
                ``index``, an item's place in the corpus; captions of HeadData also have ``judged``.
            labels: ``(batch,)`` row of each caption's own image among this process's images.
        """
        captions, images = features
        texts = self.model(captions["sentence_embedding"], "text").sentence_embedding.float()
        pictures = self.model(images["sentence_embedding"], "image").sentence_embedding.float()
        own = labels + get_rank() * len(pictures)
        everyone, of_caption = gather(images["index"]), gather(images["index"][labels])
        with torch.autocast(texts.device.type, enabled=False):
            scale = self.model.log_scale.exp()
            asked = images["index"][labels]
            known = judged_relevant(features) if "judged" in captions else None
            forth = info_nce(texts @ gather(pictures).T * scale, own, asked, everyone, known)
            mine = in_batch_labels(len(texts), texts.device)
            back = pictures[labels] @ gather(texts).T * scale
            return (forth + info_nce(back, mine, asked, of_caption)) / 2

    def get_config_dict(self) -> dict[str, Any]:
        """Settings, for the card."""
        return {"temperature": self.temperature, "standardize": self.standardize}

    @property
    def citation(self) -> str:
        """BibTeX of the objective's source."""
        return """@inproceedings{radford2021clip,
  title = {Learning Transferable Visual Models From Natural Language Supervision},
  author = {Radford, Alec and Kim, Jong Wook and Hallacy, Chris and others},
  booktitle = {ICML},
  year = {2021},
  eprint = {2103.00020}
}"""
