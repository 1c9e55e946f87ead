"""A tiny model with meta tokens: one folder for several vectors a text, and one for the first of them."""

from __future__ import annotations

from pathlib import Path

import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from ...hub.example import Example, TinyRun, one_folder
from .modeling_metaembed import MetaEmbedConfig, MetaEmbedModel, MetaEmbedTransformer

SMALL = "--batch_sampler batch_sampler --bf16 false --num_query_vectors 2 --num_document_vectors 4 --projection_dim 8"
RUNS = {"whole": TinyRun("metaembed-minilm", SMALL)}


def build(backbone: Path, scratch: Path) -> Example:
    """Two retrievers."""
    torch.manual_seed(11)
    encoder = SentenceTransformer(modules=[Transformer(str(backbone)), Pooling(32, "mean"), Normalize()], device="cpu")

    def stirred(**config: object) -> MetaEmbedModel:
        model = MetaEmbedModel.from_modules(encoder, num_query_vectors=2, num_document_vectors=4, **config)
        with torch.no_grad():
            for parameter in (*model.metas.parameters(), *model.residual.parameters()):
                parameter.add_(torch.randn_like(parameter) * 0.3)
        return model

    several = (MultiVectorEncoder, MetaEmbedTransformer)
    one = (SentenceTransformer, MetaEmbedTransformer)
    vectors = one_folder(
        stirred(projection_dim=16), backbone, scratch / "metaembed-retriever", *several, output="token_embeddings"
    )
    single = one_folder(stirred(output="sentence_embedding"), backbone, scratch / "metaembed-one", *one)
    single.similarity_fn_name = "cosine"
    return Example(
        {"retriever": vectors, "one-retriever": single},
        weight="metas.weight",
        bad_config=[
            (MetaEmbedConfig, {"num_document_vectors": 0}, "num_document_vectors=0"),
            (MetaEmbedConfig, {"groups": []}, r"groups=\[\] are no pairs"),
            (MetaEmbedConfig, {"groups": [[1]]}, r"groups=\[\[1\]\] are no pairs"),
            (MetaEmbedConfig, {"groups": [[2, 4], [1, 8], [8, 32]]}, r"not nested: \[1, 8\] does not hold \[2, 4\]"),
            (MetaEmbedConfig, {"groups": [[1, 1], [1, 1], [8, 32]]}, "not nested"),
            (MetaEmbedConfig, {"groups": [[1, 1], [8, 64]]}, r"end with \[8, 64\].*32 vectors.*missing"),
            (MetaEmbedConfig, {"groups": [[1, 1], [8, 16]]}, r"end with \[8, 16\].*untrained.*End with \[8, 32\]"),
            (MetaEmbedConfig, {"groups": [[None, 1], [8, 32]]}, "query_side='meta' wants a number from 1 for queries"),
            (MetaEmbedConfig, {"groups": [[0, 1], [8, 32]]}, "a number from 1"),
            (MetaEmbedConfig, {"document_budget": 64}, "a document holds 32 vectors; 64 asked"),
            (MetaEmbedConfig, {"query_side": "tokens", "query_budget": 2}, "a query keeps its tokens"),
            (MetaEmbedConfig, {"attention": "isolated", "isolation": "none"}, "Use attention='full'"),
            (MetaEmbedConfig, {"attention": "causal"}, "isolated, full"),
            (MetaEmbedConfig, {"output": "embedding"}, "token_embeddings, sentence_embedding"),
        ],
    )
