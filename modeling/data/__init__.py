"""A corpus, queries and judgments, from wherever they lie."""

from .dataset import RetrievalDataset
from .load import load_corpus, load_retrieval_dataset
from .made_queries import inverse_cloze, texts_as_queries

__all__ = ["RetrievalDataset", "inverse_cloze", "load_corpus", "load_retrieval_dataset", "texts_as_queries"]
