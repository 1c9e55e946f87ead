"""An index of LEMUR vectors in memory, which takes further documents at any time and re-ranks by exact MaxSim.

For large corpora the vectors go into any engine for inner products; this one is for a corpus that fits into memory,
and says in a hundred lines what such an engine has to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from ...encoding.embeddings import in_memory
from ...errors import InputError
from ...files import read_json, staged_folder, write_json
from ...hub.folder import save
from ...search.ranking import exact_search, rescore, tie_ranks
from .modeling_lemur import LemurModel, LemurPooling

FORMAT = "polyrep-lemur-index-1"


class LemurIndex:
    """Documents by id: a LEMUR vector of each to find it by, and its token vectors to rank it by.

    Both are kept in 16 bits. A document costs ``2 * embedding_dim`` bytes, and ``2 * token_dim`` for each token.

    Args:
        head: What the vectors are made with.
    """

    def __init__(self, head: LemurModel):
        self.pooling = LemurPooling(head.eval())
        self.ids: list[str] = []
        self.vectors = np.empty((0, head.config.embedding_dim), np.float16)
        self.tokens = np.empty((0, head.config.token_dim), np.float16)
        self.offsets = np.zeros(1, np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, ids: Sequence[str], tokens: Sequence[Any], *, fingerprint: str | None = None) -> None:
        """Add documents. Those that are there already stay as they are, whatever comes later.

        Args:
            ids: One a document.
            tokens: ``(tokens, token_dim)`` for each, as the encoder's ``encode_document`` gives them.
            fingerprint: See :meth:`LemurPooling.pool`.

        Raises:
            InputError: An id is there already, or as many ids as documents there are not; a document has no token,
                or vectors of another encoder; a number does not fit into 16 bits.
        """
        seen = set(self.ids)
        doubles = [i for i in ids if i in seen or seen.add(i)]  # type: ignore[func-returns-value]
        if doubles or len(ids) != len(tokens):
            what = f"id {doubles[0]!r} twice" if doubles else f"{len(ids)} ids for {len(tokens)} documents"
            raise InputError(
                f"LemurIndex.add: {what}, so a hit could mean either. Give each document an id of its own."
            )
        if not ids:
            return
        with np.errstate(over="ignore"):  # refused below
            vectors = self._encode(tokens, "document", fingerprint).astype(np.float16)
            values = _flat(tokens).astype(np.float16)
        if not (np.isfinite(vectors).all() and np.isfinite(values).all()):
            raise InputError(
                "LemurIndex.add: a vector does not fit into 16 bits, so every score with it would be meaningless. Is "
                "the head fitted to this encoder?"
            )
        ends = self.offsets[-1] + np.cumsum([len(text) for text in tokens])
        self.vectors, self.tokens = np.concatenate([self.vectors, vectors]), np.concatenate([self.tokens, values])
        self.offsets, self.ids = np.concatenate([self.offsets, ends]), [*self.ids, *ids]

    def search(
        self, queries: Sequence[Any], k: int = 10, *, candidates: int = 200, fingerprint: str | None = None
    ) -> list[list[tuple[str, float]]]:
        """The best documents of each query.

        Args:
            queries: ``(tokens, token_dim)`` for each, as the encoder's ``encode_query`` gives them.
            k: How many.
            candidates: How many are found by LEMUR and then ranked by MaxSim; 0 ranks by LEMUR alone.
            fingerprint: See :meth:`LemurPooling.pool`.

        Returns:
            For each query ``(id, score)``, best first: MaxSim, or LEMUR's own score without candidates.

        Raises:
            InputError: The index is empty, k is no count, or the queries are of another encoder.
        """
        if k < 1 or candidates < 0:
            raise InputError(f"LemurIndex.search: k={k}, candidates={candidates}. Use 1 and 0, or more.")
        if not self.ids:
            raise InputError("LemurIndex.search: the index holds no document. Add some first.")
        if not queries:
            return []
        asked = in_memory(self._encode(queries, "query", fingerprint))
        ranks = tie_ranks(self.ids)
        depth = max(k, candidates)
        found, scores = exact_search(asked, in_memory(self.vectors), ranks, similarity="dot", k=depth)
        if candidates:
            values = _flat(queries)
            bounds = np.cumsum([0, *map(len, queries)])
            sides = in_memory(values, bounds), in_memory(self.tokens, self.offsets)
            found, scores = rescore(*sides, found, ranks, similarity="maxsim")
        return [
            [(self.ids[place], float(score)) for place, score in zip(places[:k], values[:k], strict=True)]
            for places, values in zip(found, scores, strict=True)
        ]

    def _encode(self, tokens: Sequence[Any], task: str, fingerprint: str | None) -> np.ndarray:
        try:
            return self.pooling.pool(tokens, task=task, fingerprint=fingerprint).cpu().numpy()
        except ValueError as error:
            raise InputError(str(error)) from error

    def save(self, folder: str | Path) -> Path:
        """Write index and head into a folder; what an interruption leaves is the folder as it was."""
        with staged_folder(Path(folder), merge=True) as staged:
            save(self.pooling.model, staged / "head")
            arrays = {"vectors": self.vectors, "tokens": self.tokens, "offsets": self.offsets}
            save_file(
                {name: np.ascontiguousarray(value) for name, value in arrays.items()}, staged / "index.safetensors"
            )
            write_json(staged / "index.json", {"format": FORMAT, "ids": self.ids})
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> LemurIndex:
        """Open what :meth:`save` wrote.

        Raises:
            InputError: The folder holds no such index, or parts of two.
        """
        folder = Path(folder)
        content = read_json(folder / "index.json", remedy="Make the index again.", ids=list)
        if content.get("format") != FORMAT:
            raise InputError(f"{folder}: no index.json of format {FORMAT}, so this is no LEMUR index.")
        index = cls(LemurPooling.from_pretrained(str(folder / "head")).model)
        arrays = load_file(folder / "index.safetensors")
        index.ids, index.vectors = content["ids"], arrays["vectors"]
        index.tokens, index.offsets = arrays["tokens"], arrays["offsets"]
        sizes = (len(index.ids), len(index.vectors), len(index.offsets) - 1)
        if len(set(sizes)) > 1 or index.vectors.shape[1] != index.pooling.model.config.embedding_dim:
            raise InputError(
                f"{folder}: {sizes[0]} ids, {sizes[1]} vectors and {sizes[2]} documents' tokens: parts of two "
                "indexes. Save it again."
            )
        return index


def _flat(texts: Sequence[Any]) -> np.ndarray:
    """Token vectors of all texts under one another, from whatever device and type they are."""
    return torch.cat([torch.as_tensor(text).float().cpu() for text in texts]).numpy()
