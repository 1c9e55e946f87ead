"""Sparse vectors in Seismic, which prunes to be fast: it skips blocks of documents that promise too little.

Documents without a word of the query are not found. While it builds an index, Seismic prints to standard output, and
has no option against it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult

import numpy as np

from ..encoding.arrays import check_bounds
from ..encoding.embeddings import Embeddings, rows
from ..encoding.shards import Shard
from ..errors import InputError
from ..files import file_sha256, known_sha256, user_cache
from .local import FolderIndex, Vectors, package
from .protocol import Asked, Hit, Queries, by_document, refuse_unknown, whole_number
from .ranking import sparse_rows

STEP = 65_536
"""Documents that are handed over at a time, which bounds the memory of their copies in wider types."""

QUERIES = 64
"""Queries of a batch, likewise."""


class SeismicIndex(FolderIndex):
    """Blocks of similar documents with summaries; weights in float16, and scores computed again from the vectors.

    Seismic's index neither grows nor shrinks. So the vectors are kept beside it, and it is built before the first
    search after a change; other settings have it built again.

    With the defaults it found the exact top 10 of every query in synthetic vectors of 1,000 and 10,000 documents.

    Args:
        parts: ``seismic:///absolute/path`` or ``seismic:relative/path``.
        settings: To build: ``n_postings`` (400), documents that a word's list keeps, its heaviest, on average over
            words, and ``max_fraction`` (6.0), how many times as many at most; ``summary_energy`` (0.8), share of a
            block's weight in its summary. To search: ``heap_factor`` (0.9), a block is skipped if its summary promises
            less than this times the k-th best score so far; ``query_cut`` (1000), words of a query looked up.
        force: Accept another model's fingerprint.

    Raises:
        InputError: The URI names no folder, a setting is unknown or out of range, Seismic is not installed, or the
            index is damaged.
    """

    backend = "seismic"
    kind = "sparse"
    similarities = ("dot",)
    documents: Vectors

    def __init__(self, parts: SplitResult, settings: dict[str, str], *, force: bool = False):
        self.seismic = package("seismic")
        super().__init__(parts, force=force)
        self.settings = {
            "n_postings": whole_number(settings, "n_postings", 400, self.where),
            "max_fraction": _positive(settings, "max_fraction", 6.0, self.where),
            "summary_energy": _positive(settings, "summary_energy", 0.8, self.where, most=1),
        }
        self.pruning = {
            "heap_factor": _positive(settings, "heap_factor", 0.9, self.where, most=1),
            "query_cut": whole_number(settings, "query_cut", 1_000, self.where),
        }
        refuse_unknown(settings, self.where, ", ".join(self.settings | self.pruning))

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
        if not self.count():
            return [[] for _ in range(len(asked))]
        return by_document(lambda depth: self._nearest(asked, depth), min(k, self.count()), self.documents.each)

    def _nearest(self, asked: Embeddings, wanted: int) -> list[list[Hit]]:
        """The positions with the highest scores, as hits of their documents."""
        found: list[list[Hit]] = [[] for _ in range(len(asked))]
        engine, text = self._built(), self.seismic.get_seismic_string()
        assert asked.offsets is not None and asked.indices is not None
        filled = np.flatnonzero(asked.lengths)  # the others have no word to look up
        for start in range(0, len(filled), QUERIES):
            batch = filled[start : start + QUERIES]
            bounds = [slice(*asked.offsets[row : row + 2]) for row in batch]
            results = engine.batch_search(
                batch.astype(text),
                [asked.indices[part].astype(text) for part in bounds],
                [asked.values[part] for part in bounds],
                wanted,
                **self.pruning,
            )
            # The queries come back in any order, each hit with the query's id: (query, position of document)
            pairs = np.array([(query, place) for hits in results for query, _, place in hits], np.int64).reshape(-1, 2)
            for query, hits in self._scored(asked, pairs):
                found[query] = hits
        return found

    def _scored(self, asked: Embeddings, pairs: np.ndarray) -> list[tuple[int, list[Hit]]]:
        """What was found for each query, by true inner products of ``(pairs, 2)`` queries and documents."""
        if not len(pairs):
            return []
        sides = [rows(asked, pairs[:, 0]), rows(self.documents.contiguous(), pairs[:, 1])]
        left, right = (sparse_rows(side, 0, len(pairs), "dot").astype(np.float64) for side in sides)
        scores = np.asarray(left.multiply(right).sum(1)).ravel()
        order = np.lexsort((-scores, pairs[:, 0]))
        chosen = np.unique(pairs[:, 0])
        groups = np.split(order, np.searchsorted(pairs[order, 0], chosen[1:]))
        hits, cut = self.documents.hits, self._by_window
        return [
            (int(query), hits(pairs[None, group, 1], scores[None, group], cut)[0])
            for query, group in zip(chosen, groups, strict=True)
        ]

    def _open(self, folder: Path | None, ids: list[str], arrays: dict[str, np.ndarray]) -> None:
        self.engine: Any = None
        self.documents = Vectors()
        if folder is not None:
            (origin,) = self.origins.values()
            values, offsets, indices = arrays["values"], arrays["offsets"], arrays["indices"]
            vectors = Embeddings("sparse", values, offsets, indices, origin.dim, 0.0, Path())
            check_bounds(vectors, len(ids))
            if not np.isfinite(values).all():
                raise ValueError("a number that is not finite")
            self.documents.add(ids, vectors)

    def _append(self, shard: Shard) -> int:
        return self.documents.add(shard.ids, shard.vectors)

    def _write(self, folder: Path) -> dict[str, np.ndarray]:
        self.engine = None
        vectors = self.documents.contiguous()
        assert vectors.offsets is not None and vectors.indices is not None
        return {"values": vectors.values, "offsets": vectors.offsets, "indices": vectors.indices}

    def _built(self) -> Any:
        """Seismic's index of the present documents: from memory, from its file, or made."""
        if self.engine is not None:
            return self.engine
        vectors = self.documents.contiguous()
        wide = "LV" if vectors.dim > 2**16 else ""  # Seismic numbers words in 16 bits otherwise
        kind = getattr(self.seismic, f"SeismicIndex{wide}")
        folder = self.path / f"{self.generation:08d}"
        kept = folder / f"{'-'.join(map(str, self.settings.values()))}.index.seismic"
        # Seismic believes what a file says of its sizes, so it reads none but those that this user has built.
        built = user_cache() / "seismic"
        with suppress(OSError):  # it is not there, or damaged
            if (built / known_sha256(kept)).is_file():
                self.engine = kind.load(str(kept))
                if self.engine.len == np.count_nonzero(vectors.lengths):
                    return self.engine
        dataset = getattr(self.seismic, f"SeismicDataset{wide}")(dim=vectors.dim)
        for start in range(0, len(vectors), STEP):
            matrix = sparse_rows(vectors, start, min(start + STEP, len(vectors)), "dot").copy()
            matrix.sum_duplicates()  # Seismic wants the words of a document in order
            names = [str(place) for place in range(start, start + matrix.shape[0])]
            dataset.add_documents_by_id(
                names, matrix.indices.astype(np.int64), matrix.data, matrix.indptr.astype(np.int64)
            )
        self.engine = kind.build_from_dataset(dataset, **self.settings)
        with suppress(OSError):  # an index in a folder that cannot be written to can be searched all the same
            partial = folder / f".{os.getpid()}"
            self.engine.save(str(partial))
            built.mkdir(parents=True, exist_ok=True)
            (built / file_sha256(Path(f"{partial}.index.seismic"))).touch()
            os.replace(f"{partial}.index.seismic", kept)
        return self.engine


def _positive(settings: dict[str, str], name: str, default: float, uri: str, most: float = 1_000.0) -> float:
    """A setting of a URI above 0, taken out of ``settings``."""
    value = settings.pop(name, str(default))
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number <= most:
        raise InputError(f"{uri}: {name}={value}: expected a number above 0, {most:g} at most.")
    return number
