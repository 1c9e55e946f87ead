"""Texts and images become vectors, once, on disk."""
