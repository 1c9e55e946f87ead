"""Late interaction in one folder: a head may stand behind it, and it opens as nothing but several vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import QUERIES
from room_examples import EXAMPLES
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from transformers import AutoModel

import polyrep
from polyrep.methods import LateInteractionConfig, ReinPoolConfig, ReinPoolModel, ReinPoolPooling

TEXTS = list(QUERIES.values())


@pytest.fixture
def late(backbone: Path, tmp_path: Path) -> MultiVectorEncoder:
    model = EXAMPLES[LateInteractionConfig.model_type](backbone, tmp_path).models["retriever"]
    return polyrep.load(polyrep.save(model, tmp_path / "late"), device="cpu")


def test_one_vector_of_a_head_behind_it_is_the_sum_of_a_query_and_opens_as_one_folder(late, tmp_path):
    head = ReinPoolPooling(ReinPoolModel(ReinPoolConfig(dim=16, output="sentence_embedding", weights="soft")))
    model = SentenceTransformer(modules=[*late.children(), head], device="cpu")
    queries = model.encode_query(TEXTS)
    for text, tokens in zip(queries, late.encode_query(TEXTS), strict=True):
        np.testing.assert_allclose(text, np.asarray(tokens).sum(0), atol=1e-5)
    whole: Any = AutoModel.from_pretrained(polyrep.save(model, tmp_path / "one"))
    assert type(whole).__name__ == "ReinPoolForRetrieval"
    with torch.no_grad():
        found = whole(**late.tokenizer(TEXTS, padding=True, return_tensors="pt"), task="query").sentence_embedding
    np.testing.assert_allclose(found, queries, atol=1e-5)


def test_alone_it_is_no_model_of_one_vector(late):
    with pytest.raises(ValueError, match="gives a vector a token, which a SentenceTransformer does not read"):
        SentenceTransformer(modules=list(late.children()), device="cpu")
