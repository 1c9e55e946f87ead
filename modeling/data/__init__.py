"""A corpus, queries and judgments, from wherever they lie.

``named.py`` turns a name into a place: ``catalog.py`` knows where sets are to be had, ``converters.py`` what to make
of them, ``python_docs.py`` reads the corpus that every machine has. ``load.py`` tells what lies there and asks
``beir.py``, ``tables.py`` or ``captions.py``; all give the data set of ``dataset.py``. ``stream.py`` reads what is
only encoded, of any size, a span at a time. ``paraphrases.py`` pairs queries that say one need in two wordings.
"""

from .dataset import RetrievalDataset
from .load import load_corpus, load_retrieval_dataset
from .made_queries import inverse_cloze, texts_as_queries
from .paraphrases import Pairs, pairs_of

__all__ = [
    "Pairs",
    "RetrievalDataset",
    "inverse_cloze",
    "load_corpus",
    "load_retrieval_dataset",
    "pairs_of",
    "texts_as_queries",
]
