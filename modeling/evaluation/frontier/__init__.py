"""Every way to make an index of one model smaller, in one table."""

from .full_model import FullModel
from .rows import Candidate, Encoded, Method

__all__ = ["Candidate", "Encoded", "FullModel", "Method"]
