"""A model is a folder: fetch, check, load, save, its code, its fingerprint, its card."""

from .cards import render_card
from .code import localize
from .fingerprint import fingerprint
from .folder import fetch, load, save

__all__ = ["fetch", "fingerprint", "load", "localize", "render_card", "save"]
