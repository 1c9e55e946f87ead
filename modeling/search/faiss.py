"""One vector per document in FAISS, exactly (``flat``) or by a graph of neighbours (``hnsw``).

A graph of inner products finds nearly what exact search finds for vectors of unequal lengths. It fails without a word
where documents share a large constant part that queries lack: of 10,000 random ones moved by five standard deviations
it found 6 % of the top 10. Compare a graph with ``index=flat`` once before you rely on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult

import numpy as np

from ..encoding.shards import Shard
from ..errors import InputError
from .faiss_file import check_faiss_file
from .local import Documents, FolderIndex, package
from .protocol import Asked, Hit, Queries, by_document, refuse_unknown, whole_number

FILE = "index.faiss"


class FaissIndex(FolderIndex):
    """Vectors in float32, all in memory; for cosine they and the queries are scaled to unit length.

    A flat index drops what is deleted or replaced. A graph cannot: there it is passed over in searches, and once it is
    more than half, the graph is built again.

    Args:
        parts: ``faiss:///absolute/path`` or ``faiss:relative/path``.
        settings: ``index``, ``flat`` without it, or ``hnsw``, which has ``m`` (32; neighbours of a document),
            ``ef_construction`` (200) and ``ef_search`` (128; candidates while building and while searching). An index
            that is there keeps its ``index`` and ``m``.
        force: Accept another model's fingerprint.

    Raises:
        InputError: The URI names no folder, a setting is unknown or differs from what the index was built with, FAISS
            is not installed, or the index is damaged.
    """

    backend = "faiss"
    kind = "sentence"
    similarities = ("dot", "cosine")

    def __init__(self, parts: SplitResult, settings: dict[str, str], *, force: bool = False):
        self.faiss = package("faiss")
        super().__init__(parts, force=force)
        variant = settings.pop("index", self.stored.get("index", "flat"))
        self.settings = {"index": variant}
        if variant == "hnsw":
            self.settings["m"] = whole_number(settings, "m", self.stored.get("m", 32), self.where)
            self.ef_construction = whole_number(settings, "ef_construction", 200, self.where)
            self.ef_search = whole_number(settings, "ef_search", 128, self.where)
        refuse_unknown(settings, self.where, "index=flat|hnsw, and for hnsw m, ef_construction and ef_search")
        if variant not in ("flat", "hnsw") or self.settings.get("m") == 1:
            raise InputError(f"{self.where}: there are index=flat and index=hnsw, the latter with m of 2 or more.")
        if self.stored and self.stored != self.settings:
            raise InputError(
                f"{self.where}: built with {self.stored}, not {self.settings}, which cannot be changed. Leave these "
                "settings out, or name another folder and add the shards there."
            )

    def search(
        self,
        queries: Queries | Mapping[str, Queries],
        k: int = 10,
        *,
        weights: Mapping[str, float] | None = None,
        candidates: int | None = None,
        budget: Asked = None,
        first: Asked = None,
    ) -> list[list[Hit]]:
        """See :class:`polyrep.search.Index`; there is no weighted sum, and no budget."""
        asked = self._query_vectors(queries, k, weights, budget, first)
        if not len(asked) or not self.count():
            return [[] for _ in range(len(asked))]
        values = self._scaled(asked.values)
        return by_document(lambda depth: self._nearest(values, depth), min(k, self.count()), self.documents.each)

    def _nearest(self, values: np.ndarray, wanted: int) -> list[list[Hit]]:
        """The positions with the highest scores, as hits of their documents."""
        total, wanted = len(self.documents.ids), min(wanted, self.documents.used)
        selector = self._selector() if self.documents.unused else None
        if self.settings["index"] == "flat":
            scores, found = self.engine.search(values, wanted, params=self.faiss.SearchParameters(sel=selector))
            return self.documents.hits(found, scores, self._by_window)
        # Candidates that are passed over count as well, so that more of them are needed.
        depth = max(self.ef_search, wanted) * total // self.documents.used
        params = self.faiss.SearchParametersHNSW(sel=selector, efSearch=depth)
        scores, found = self.engine.search(values, wanted, params=params)
        short = (found < 0).any(1)
        if short.any():  # the graph led to too few, so these queries are compared with every document
            storage = self.faiss.downcast_index(self.engine.storage)
            params = self.faiss.SearchParameters(sel=selector)
            scores[short], found[short] = storage.search(values[short], wanted, params=params)
        return self.documents.hits(found, scores, self._by_window)

    def _open(self, folder: Path | None, ids: list[str], arrays: dict[str, np.ndarray]) -> None:
        self.documents = Documents(ids)
        self.engine: Any = None
        if folder is not None:
            (origin,) = self.origins.values()
            check_faiss_file(folder / FILE, self.stored["index"], origin.dim, len(ids))
            with (folder / FILE).open("rb") as file:  # by Python, since FAISS opens only paths in ASCII on Windows
                self.engine = self.faiss.read_index(self.faiss.PyCallbackIOReader(file.read))

    def _append(self, shard: Shard) -> int:
        values = self._scaled(np.asarray(shard.vectors.values, np.float32))
        if not np.isfinite(values).all():
            raise InputError(f"{self.where}: a document has a number that is not finite. Encode the shard again.")
        if self.engine is None:
            self.engine = self._new(shard.origin.dim)
        self.engine.add(values)
        return self.documents.append(shard.ids, shard.vectors.windows)

    def _write(self, folder: Path) -> dict[str, np.ndarray]:
        total, unused = len(self.documents.ids), self.documents.unused
        if self.settings["index"] == "flat" and unused:
            dead = np.setdiff1d(np.arange(total), self.documents.compact())
            self.engine.remove_ids(dead)  # which moves the rest up, as `compact` does
        elif unused > total / 2:
            values = self.faiss.downcast_index(self.engine.storage).reconstruct_n(0, total)
            self.engine = self._new(self.engine.d)
            self.engine.add(values[self.documents.compact()])
        with (folder / FILE).open("wb") as file:
            self.faiss.write_index(self.engine, self.faiss.PyCallbackIOWriter(file.write))
        return {}

    def _new(self, dim: int) -> Any:
        if self.settings["index"] == "flat":
            return self.faiss.IndexFlatIP(dim)
        engine = self.faiss.IndexHNSWFlat(dim, self.settings["m"], self.faiss.METRIC_INNER_PRODUCT)
        engine.hnsw.efConstruction = self.ef_construction
        return engine

    def _scaled(self, values: np.ndarray) -> np.ndarray:
        """``(vectors, dim)`` in float32, of unit length for cosine."""
        (origin,) = self.origins.values()
        if origin.similarity == "cosine":
            values = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
        return np.ascontiguousarray(values)

    def _selector(self) -> Any:
        """Of positions that count."""
        live = np.zeros(len(self.documents.ids), bool)
        live[self.documents.live()] = True
        return self.faiss.IDSelectorBitmap(np.packbits(live, bitorder="little"))
