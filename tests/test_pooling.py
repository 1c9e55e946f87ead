"""Pooling of a whole corpus at several numbers of vectors against the library's, document by document."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling
from test_retrievers import vectors_of

from polyrep.evaluation.frontier.pooling import hierarchical_clusters, hierarchically, pooled
from polyrep.methods import ReinPoolConfig, ReinPoolModel
from polyrep.methods.reinpool.frontier import by_head

LENGTHS = [5, 1, 12, 9, 2, 30]


def texts_of(documents):
    return [documents.values[start:stop].astype(np.float32) for start, stop in itertools.pairwise(documents.offsets)]


def test_one_linkage_cut_at_every_number_gives_the_clusters_of_the_library(tmp_path):
    documents = vectors_of(np.random.default_rng(0), LENGTHS)
    clusters = hierarchical_clusters(documents, (1, 2, 4, 8), tmp_path / "clusters")
    found = pooled(documents, hierarchically(documents, clusters, (1, 2, 4, 8)))
    for number, pools in found.items():
        for tokens, vectors in zip(texts_of(documents), texts_of(pools), strict=True):
            factor = max(len(tokens) / (number + 0.5), 1.0)
            stock = HierarchicalTokenPooling(factor, num_protected_tokens=0).pool_one(torch.from_numpy(tokens))
            stock = torch.nn.functional.normalize(stock, dim=-1).numpy()
            assert len(vectors) == min(number, len(tokens)) == len(stock)
            order = [np.lexsort(part.round(2).T) for part in (vectors, stock)]
            np.testing.assert_allclose(vectors[order[0]], stock[order[1]], atol=2e-3)


def test_clusters_are_made_once(tmp_path):
    documents = vectors_of(np.random.default_rng(1), LENGTHS)
    first = hierarchical_clusters(documents, (2,), tmp_path / "clusters")
    unread = replace(documents, values=np.full_like(documents.values, np.nan), path=Path("elsewhere"))
    np.testing.assert_array_equal(hierarchical_clusters(unread, (2,), tmp_path / "clusters")[2], first[2])


def test_a_head_pools_a_corpus_as_it_pools_each_document():
    documents = vectors_of(np.random.default_rng(2), LENGTHS)
    torch.manual_seed(0)
    config = ReinPoolConfig(dim=12, num_layers=1, pooling="kmeans", num_vectors=4, weights="soft", projection=True)
    head = ReinPoolModel(config).eval()
    found = pooled(documents, by_head(head, (1, 4)))
    binary = pooled(documents, by_head(head, (4,)), binary=True)[4]
    for number, pools in found.items():
        for tokens, vectors in zip(texts_of(documents), texts_of(pools), strict=True):
            with torch.inference_mode():
                alone = head(torch.from_numpy(tokens)[None], num_vectors=number)
            np.testing.assert_allclose(vectors, alone.embeddings[0][alone.mask[0]].numpy(), atol=2e-3)
    np.testing.assert_array_equal(binary.values > 0, found[4].values >= 0)
    np.testing.assert_allclose(np.linalg.norm(binary.values.astype(float), axis=1), 1, rtol=1e-2)
