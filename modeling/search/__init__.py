"""Search in encoded corpora, whatever engine does it: ``open_index(uri)`` gives ``add, search, delete, count``."""

from .backends import open_index
from .budget import BudgetError, cut_shards
from .probability import Searcher
from .protocol import Added, Hit, Index
from .ranking import exact_search
from .scoring import kl, maxsim
from .serving import Busy, Deadline, Service

__all__ = [
    "Added",
    "BudgetError",
    "Busy",
    "Deadline",
    "Hit",
    "Index",
    "Searcher",
    "Service",
    "cut_shards",
    "exact_search",
    "kl",
    "maxsim",
    "open_index",
]
