"""How LEMUR is fitted to cached token vectors: psi by gradient descent, everything else in closed form.

Psi learns what MaxSim needs of a token vector x by predicting, for a sample of documents at once, the largest inner
product of x with any of the document's vectors (section 3 of the paper). The layer that makes the predictions, a row
a document, is then thrown away: the same rows, better ones and for all documents, follow from psi by least squares.

Token vectors to learn from are those that the query encoder gives, since it is queries that psi will see: of queries
if there are any, and of the corpus read as if it were queries (``--queries texts``).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from ...errors import InputError
from ...search.scoring import padded_within
from ...training.objective import Objective
from ...training.pairs import HeadData
from ...training.sides import Side
from .modeling_lemur import LemurModel, token_maxima

logger = logging.getLogger(__name__)

WINDOW = 32
"""Tokens of a text that are taken together as one query would have them."""


TOKENS = 2**15
"""Of documents, padding included, whose maxima are taken at a time."""


class TokenTargets(Dataset):
    """Token vectors, and what a sample of documents makes of each.

    Args:
        tokens: ``(tokens, dim)``.
        targets: ``(tokens, documents)``, standardised.
    """

    def __init__(self, tokens: Tensor, targets: Tensor):
        self.tokens, self.targets = tokens, targets

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, row: int) -> int:
        return row

    def collate(self, rows: list[int]) -> dict[str, Tensor]:
        """A batch: ``features (batch, dim)`` and ``labels (batch, documents)``."""
        return {"features": self.tokens[rows], "labels": self.targets[rows].float()}


class LemurObjective(Objective):
    """Mean squared error of the predicted maxima, standardised by one mean and one deviation.

    Args:
        num_documents: Documents whose maxima are predicted (m' in the paper).
        num_tokens: Token vectors to learn from (n in the paper).
    """

    trains_on = "tokens"
    needs_labels = False
    """MaxSim itself is the teacher; no judgment has any influence."""

    def __init__(self, model: LemurModel, num_documents: int = 1024, num_tokens: int = 50_000):
        super().__init__()
        self.settings = {"num_documents": num_documents, "num_tokens": num_tokens}
        for name, value in self.settings.items():
            if value < 2:
                raise InputError(f"--{name} {value}: nothing can be learned from that. Use 2 or more.")
        self.model: Any = model  # whose buffers are typed as Tensor | Module
        self.readout: nn.Linear | None = None
        self.samples: tuple[Tensor, Tensor, Tensor] | None = None
        if model.config.feature_type == "elm":
            model.requires_grad_(False)

    @classmethod
    def planned_rows(cls, settings: Mapping[str, Any]) -> int:
        """Token vectors to learn from, as far as is known before anything is encoded."""
        return settings["num_tokens"]

    def prepare(self, data: HeadData) -> TokenTargets:
        """Sample tokens, anchors and documents, and compute the targets: what the trainer then goes through.

        A corpus with fewer tokens than anchors, or fewer documents than directions, gets as many as it has.

        Raises:
            InputError: There are too few tokens or documents to fit anything.
        """
        config, draw = self.model.config, np.random.default_rng(self.model.config.seed)
        tokens, windows = _sample_windows([part.queries for part in data.parts], self.settings["num_tokens"], draw)
        each_once = {part.documents.embeddings.path: part.documents for part in data.parts}
        corpora = list(each_once.values())
        documents = draw.permutation(sum(map(len, corpora)))[: 2 * self.settings["num_documents"]]
        if len(tokens) < 2 or len(documents) < 2:
            raise InputError(
                f"{len(tokens)} token vectors and {len(documents)} documents to fit LEMUR to, which is too few. Add "
                "--datasets, or --queries texts where there are hardly any queries."
            )
        anchors = torch.from_numpy(draw.permutation(len(tokens))[: config.num_anchors])
        if len(anchors) < config.num_anchors:
            logger.warning(
                "%s anchors were asked for, but there are %s token vectors to take them from: all are anchors.",
                f"{config.num_anchors:,}",
                f"{len(anchors):,}",
            )
        rank = min(config.rank, len(documents) - 1)
        if rank < config.rank:
            logger.warning(
                "%s directions were asked for, but %s documents differ in %s: so many are kept%s.",
                config.rank,
                len(documents),
                rank,
                ", and are the vectors" if rank < config.directions < config.latent_dim else "",
            )
            if config.embedding_dim < config.latent_dim:
                config.embedding_dim = min(config.directions, rank) + config.equal_norms
        self._resize(len(anchors), rank)
        model = self.model
        model.anchors.copy_(tokens[anchors])
        learned = documents[: self.settings["num_documents"]]
        maxima = _maxima(tokens, corpora, learned)  # (documents, tokens), in half precision
        sample = maxima[:, anchors].float()
        model.target_mean.copy_(sample.mean())
        model.target_std.copy_(sample.std().clamp(min=1e-6))
        if config.rank:
            at_anchors = torch.cat([sample, _maxima(tokens[anchors], corpora, documents[len(learned) :]).float()])
            self.samples = (tokens, windows, (at_anchors - model.target_mean) / model.target_std)
        if config.feature_type == "mlp":
            self.readout = nn.Linear(config.latent_dim, len(learned), bias=False)
        targets = ((maxima.T.float() - model.target_mean) / model.target_std).half().contiguous()
        return TokenTargets(tokens, targets)

    def _resize(self, anchors: int, rank: int) -> None:
        """Give the model buffers of the sizes that the data allow."""
        model, config = self.model, self.model.config
        config.num_anchors, config.rank = anchors, rank
        model.anchors = model.anchors.new_zeros(anchors, config.token_dim)
        for name in ("document_mean", "document_map", "query_map"):
            if not rank and hasattr(model, name):
                delattr(model, name)
            elif rank and name != "document_mean":
                setattr(model, name, model.anchors.new_zeros(config.latent_dim, rank))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean squared error of a batch.

        Args:
            features: ``(batch, dim)`` token vectors.
            labels: ``(batch, documents)`` standardised maxima.
        """
        assert self.readout is not None
        return F.mse_loss(self.readout(self.model.features(features)).float(), labels)

    @torch.no_grad()
    def finish(self) -> None:
        """Find the directions in which documents differ most for queries; before every save.

        Of two documents w and v, a query q sees (w - v) . q. With C the second moment of queries, the squares of that
        are on average (w - v)' C (w - v): after a map by the root of C, plain principal components are the best
        directions, and queries take the inverse of the root. Then each side gets the root of what documents spread
        along a direction, so that both spread alike. Inner products stay the same, and a graph index (HNSW), which
        links documents that are near to each other, links those that a query finds together.
        """
        if self.samples is None:
            return
        tokens, windows, at_anchors = self.samples
        model, config = self.model, self.model.config
        solution = model.solve().cpu()
        weights = at_anchors.double() @ solution  # (documents, latent_dim)
        queries = torch.zeros(int(windows[-1]) + 1, config.latent_dim)
        for part, owner in zip(tokens.split(4096), windows.split(4096), strict=True):
            queries.index_add_(0, owner, model.features(part.to(model.device)).cpu())
        queries = queries.double() / config.query_scale
        moment = queries.T @ queries / len(queries)
        moment.diagonal().add_(1e-4 * moment.diagonal().mean())
        values, vectors = torch.linalg.eigh(moment)
        root = values.clamp(min=1e-12).sqrt()
        mean = weights.mean(0)
        seen = (weights - mean) @ (vectors * root) @ vectors.T
        _, spread, directions = torch.linalg.svd(seen / len(seen) ** 0.5, full_matrices=False)
        directions = directions[: config.rank].T  # (latent_dim, rank)
        share = spread[: config.rank].clamp(min=1e-12 * float(spread[0])).sqrt()
        model.document_mean.copy_(mean)
        model.document_map.copy_((vectors * root) @ (vectors.T @ directions) / share)
        model.query_map.copy_((vectors / root) @ (vectors.T @ directions) * share)
        # In all directions, since a head may be opened with more of them.
        model.measure_norms([(weights - mean) @ model.document_map.cpu().double()])

    def get_config_dict(self) -> dict[str, Any]:
        """Settings, for the card."""
        return dict(self.settings)

    @property
    def citation(self) -> str:
        """BibTeX of the paper."""
        return """@inproceedings{jaasaari2026lemur,
  title = {LEMUR: Learned Multi-Vector Retrieval},
  author = {J{\\"a}{\\"a}saari, Elias and Hyv{\\"o}nen, Ville and Roos, Teemu},
  booktitle = {International Conference on Machine Learning},
  year = {2026},
  eprint = {2601.21853},
  archivePrefix = {arXiv}
}"""


def _sample_windows(sides: list[Side], wanted: int, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Token vectors in runs of up to :data:`WINDOW`, of each side about as many.

    Returns:
        ``(tokens, dim)`` in float32, and ``(tokens,)`` the number of each one's run.
    """
    found: list[np.ndarray] = []
    runs: list[np.ndarray] = []
    count = 0
    # The smallest first: what one does not have, the others may give.
    for number, side in enumerate(sorted(sides, key=lambda side: len(side.embeddings.values))):
        offsets = side.embeddings.offsets
        assert offsets is not None
        quota = (wanted - sum(map(len, found))) // (len(sides) - number)
        lengths = np.diff(offsets)
        pieces = -(-lengths // WINDOW)  # runs of each text
        text = np.repeat(np.arange(len(lengths)), pieces)
        first = offsets[text] + WINDOW * (np.arange(len(text)) - np.repeat(np.cumsum(pieces) - pieces, pieces))
        sizes = np.minimum(WINDOW, offsets[text + 1] - first)
        order = draw.permutation(len(text))
        order = order[: int(np.searchsorted(np.cumsum(sizes[order]), quota, side="right"))]
        first, sizes = first[order], sizes[order]
        rows = np.repeat(first - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
        found.append(side.embeddings.values[rows].astype(np.float32))
        runs.append(count + np.repeat(np.arange(len(sizes)), sizes))
        count += len(sizes)
    return torch.from_numpy(np.concatenate(found)), torch.from_numpy(np.concatenate(runs))


def _maxima(points: Tensor, corpora: list[Side], documents: np.ndarray) -> Tensor:
    """:func:`token_maxima` of some documents in half precision: ``(documents, points)``.

    Args:
        points: ``(points, dim)``.
        corpora: Counted through, one after the other.
        documents: ``(documents,)`` their numbers in that count.
    """
    result = torch.empty(len(documents), len(points), dtype=torch.float16)
    first = 0
    for corpus in corpora:
        mine = np.flatnonzero((documents >= first) & (documents < first + len(corpus)))
        lengths = corpus.embeddings.lengths[documents[mine] - first]
        order = mine[np.argsort(lengths, kind="stable")]
        for part in padded_within(np.sort(lengths), TOKENS):
            features = corpus.features(documents[order[part]] - first)
            found = token_maxima(points, features["token_embeddings"], features["attention_mask"])
            result[torch.from_numpy(order[part])] = found.half()
        first += len(corpus)
    return result
