"""A model is a folder: fetch, check, load, save, its code, its fingerprint, its card."""

from .cards import render_card
from .code import localize
from .fingerprint import fingerprint
from .folder import Encoder, fetch, load, save

__all__ = ["Encoder", "fetch", "fingerprint", "load", "localize", "render_card", "save"]
