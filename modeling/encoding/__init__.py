"""Texts and images become vectors, once, on disk."""

from .cache import embed, store
from .embeddings import Embeddings
from .shards import EncodedCorpus

__all__ = ["Embeddings", "EncodedCorpus", "embed", "store"]
