"""The URI of an index, and what opens it.

::

    memory:                                    exact, nothing on disk: the oracle that the others are measured by
    faiss:///PATH?index=flat|hnsw              FAISS, one vector per document
    seismic:///PATH                            Seismic, sparse vectors
    routed:///PATH                             exact over lists by key: routed entries, on disk
    qdrant:///PATH                             Qdrant's engine in this process: dense, sparse and several vectors
    qdrant+http(s)://HOST:PORT/COLLECTION      the same against a server or a cluster of Qdrant
"""

from __future__ import annotations

import importlib
from urllib.parse import parse_qsl, urlsplit

from ..errors import InputError
from ..hub.fingerprint import told
from .protocol import Index

BACKENDS = {
    "memory": "exact:ExactIndex",
    "faiss": "faiss:FaissIndex",
    "seismic": "seismic:SeismicIndex",
    "routed": "routed:RoutedIndex",
    "qdrant": "qdrant:open_embedded",
    "qdrant+http": "qdrant:open_server",
    "qdrant+https": "qdrant:open_server",
}
"""Scheme of a URI -> module and what in it opens an index; imported only when it is asked for."""


def open_index(uri: str, *, fingerprint: str = "", force: bool = False) -> Index:
    """Open an index, or begin one where there is none.

    Args:
        uri: Where it is and what does the work, see the module's table; settings follow ``?``.
        fingerprint: That of the model which will encode the queries (``polyrep.hub.fingerprint``): an index whose
            documents all came from others is refused.
        force: Accept another model's fingerprint, here and when documents are added.

    Raises:
        InputError: The URI names no back end, a setting is unknown, a package is missing, the index is damaged, or it
            was built by another model.
    """
    parts = urlsplit(uri)
    if parts.scheme not in BACKENDS:
        raise InputError(f"{uri}: {parts.scheme or 'no scheme'} is no back end. Use one of {', '.join(BACKENDS)}.")
    module, _, name = BACKENDS[parts.scheme].partition(":")
    settings = dict(parse_qsl(parts.query, keep_blank_values=True))
    index: Index = getattr(importlib.import_module(f".{module}", __package__), name)(parts, settings, force=force)
    known = {origin.fingerprint for origin in index.origins.values()}
    if fingerprint and known and fingerprint not in known and not force:
        raise InputError(
            f"{uri}: its vectors were made by model {', '.join(sorted(map(told, known)))}, not by "
            f"{told(fingerprint)}, so scores would mean nothing. Encode the corpus with this model, or pass --force "
            "(force=True) if you know that the two give the same vectors."
        )
    return index
