"""A model is a folder: fetch, check, load, save, its code, its fingerprint, its card."""
