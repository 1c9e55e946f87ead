"""Scores of a stronger model, a teacher, for pairs of query and document.

A teacher is any model of sentence-transformers: one that encodes both sides, through the cache, or a cross-encoder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from tqdm import tqdm

from ..encoding.cache import describe, embed
from ..encoding.embeddings import Embeddings
from ..errors import InputError
from ..files import digest, read_json, staged_file
from ..hub.code import may_run
from ..hub.folder import Encoder, fastest_dtype, fetch, load, opening
from ..hub.reading import give_padding
from ..hub.weights import check_loaded
from ..search.ranking import filled, sparse_rows
from ..search.scoring import CHUNK_ELEMENTS

Teacher = Encoder | CrossEncoder


def open_teacher(
    name: str,
    revision: str | None = None,
    *,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    flag: str = "--teacher",
) -> Teacher:
    """Open a teacher by folder or Hub id; a classifier of pairs is a cross-encoder.

    Args:
        name: The folder or id.
        revision: Commit, tag or branch of a Hub id.
        trust_remote_code: Run the code that it carries, as for :func:`polyrep.load`.
        dtype: Type of the weights in memory; default: as saved of a cross-encoder, else the fastest.
        flag: What names it, for messages.

    Raises:
        InputError: It cannot be opened, lacks weights, or scores no pair of texts.
    """
    folder = fetch(name, revision=revision, trust_remote_code=trust_remote_code)
    family = read_json(folder / "config_sentence_transformers.json").get("model_type")
    kinds = read_json(folder / "config.json", architectures=list).get("architectures") or [""]
    plain = kinds[0].endswith("ForSequenceClassification") and not (folder / "modules.json").is_file()
    if family == "CrossEncoder" or plain:
        allowed = may_run(folder, trust_remote_code)
        with opening(folder):
            weights = {"use_safetensors": True} | ({"dtype": dtype} if dtype is not None else {})
            teacher: Any = CrossEncoder(str(folder), trust_remote_code=allowed, model_kwargs=weights)
            check_loaded(folder, teacher)
        give_padding(teacher.tokenizer, name)
        teacher.model.config.pad_token_id = teacher.tokenizer.pad_token_id
        return teacher
    teacher = load(folder, trust_remote_code=trust_remote_code, dtype=dtype or fastest_dtype("auto"))
    if not isinstance(teacher, Encoder):
        raise InputError(f"{flag} {name}: is a {type(teacher).__name__}, which scores no pair of texts.")
    return teacher


def score_pairs(
    teacher: Teacher,
    queries: Mapping[str, str],
    documents: Mapping[str, Any],
    pairs: np.ndarray,
    *,
    names: tuple[str, str],
    cache_dir: str | Path | None = None,
    batch_size: int = 32,
) -> np.ndarray:
    """Score pairs.

    Args:
        teacher: See :func:`open_teacher`.
        queries: Id -> text.
        documents: Id -> text or page image.
        pairs: ``(pairs, 2)`` place of a query and of a document.
        names: Readable part of the caches' names, of queries and of documents.
        cache_dir: See :func:`polyrep.encoding.cache.embed`; what a cross-encoder says of a pair is kept there, too,
            and written every few thousand pairs, so that an interrupted run goes on where it was.
        batch_size: Texts, or pairs, of a forward pass.

    Returns:
        ``(pairs,)`` float32; of a cross-encoder the logits.

    Raises:
        InputError: A score is not finite, or the teacher scores by a distance.
    """
    if isinstance(teacher, CrossEncoder):
        query_texts, document_texts = list(queries.values()), list(documents.values())
        read = [(query_texts[q], document_texts[d]) for q, d in pairs]
        if all(isinstance(text, str) for text in document_texts):
            scores = _of_texts(teacher, read, Path(cache_dir) if cache_dir else None, batch_size, names[1])
        else:  # page images
            scores = teacher.predict(read, batch_size=batch_size, activation_fn=LOGITS)
    else:
        options: dict[str, Any] = {"cache_dir": cache_dir, "batch_size": batch_size}
        encoder: Any = teacher
        q = embed(encoder, queries, task="query", name=names[0], **options)
        d = embed(encoder, documents, task="document", name=names[1], **options)
        scores = _of_embeddings(q, d, np.asarray(pairs), str(teacher.similarity_fn_name), teacher.device)
    return _one_a_pair(scores, len(pairs), names[1])


LOGITS = torch.nn.Identity()
"""In place of the sigmoid that a cross-encoder may end in, which makes ties of high scores."""

KEPT = 4096
"""Pairs of a cross-encoder after which what it has said is written."""

_SAID = np.dtype([("pair", "<u8"), ("score", "<f4")])
"""A pair by eight bytes of its hash, of which a million meet with a probability of 3e-8; sorted by them."""


def _one_a_pair(scores: Any, pairs: int, name: str) -> np.ndarray:
    """``(pairs,)`` float32; InputError if they are not, or not finite."""
    scores = np.asarray(scores, np.float32)
    if scores.shape != (pairs,):
        raise InputError(
            f"{name}: the model gave {scores.shape} scores for {pairs} pairs, so none is kept. Use one that gives a "
            "number a pair."
        )
    if lost := int((~np.isfinite(scores)).sum()):
        raise InputError(
            f"{name}: {lost} of {pairs} scores are not finite, so none is kept. Try float32 weights, or another model."
        )
    return scores


def _of_texts(
    teacher: CrossEncoder, pairs: list[tuple[str, str]], folder: Path | None, batch_size: int, name: str
) -> np.ndarray:
    """Scores by a cross-encoder, pairs of like length together; what it has said before is read from ``folder``."""
    keys = np.fromiter((_key(*pair) for pair in pairs), np.uint64, len(pairs))
    file, said = None, np.empty(0, _SAID)
    if folder is not None:
        model = [[describe(module) for module in teacher], teacher.max_length]
        file = folder / f"teacher-{digest(model)[:16]}.npy"
        said = np.load(file, allow_pickle=False) if file.is_file() else said
    _, first = np.unique(keys, return_index=True)
    new = first[~np.isin(keys[first], said["pair"])]
    new = new[np.argsort([-len(pairs[i][0]) - len(pairs[i][1]) for i in new], kind="stable")]
    options: dict[str, Any] = {"batch_size": batch_size, "activation_fn": LOGITS, "show_progress_bar": False}
    for start in tqdm(range(0, len(new), KEPT), desc="teacher", unit=f"{KEPT} pairs"):
        part = new[start : start + KEPT]
        found = _one_a_pair(teacher.predict([pairs[i] for i in part], **options), len(part), name)
        fresh = np.empty(len(part), _SAID)
        fresh["pair"], fresh["score"] = keys[part], found
        said = np.sort(np.concatenate([said, fresh]), order="pair")
        if file is not None:
            with staged_file(file) as partial, partial.open("wb") as opened:
                np.save(opened, said)
    return said["score"][np.searchsorted(said["pair"], keys)]


def _key(query: str, document: str) -> int:
    first = query.encode()
    content = len(first).to_bytes(8, "little") + first + document.encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _of_embeddings(
    queries: Embeddings, documents: Embeddings, pairs: np.ndarray, similarity: str, device: Any
) -> np.ndarray:
    """Scores of pairs of encoded texts, batches of documents of like length."""
    if similarity not in ("dot", "cosine", "maxsim", "meanmaxsim"):
        raise InputError(f"--teacher: scores by {similarity}. Use one with dot, cosine or maxsim.")
    scores = np.empty(len(pairs), np.float32)
    if queries.kind == "sparse":
        query_rows, document_rows = (sparse_rows(side, 0, len(side), similarity) for side in (queries, documents))
        for start in range(0, len(pairs), 4096):
            q, d = pairs[start : start + 4096].T
            scores[start : start + 4096] = np.asarray(query_rows[q].multiply(document_rows[d]).sum(1)).ravel()
        return scores
    order = np.argsort(documents.lengths[pairs[:, 1]], kind="stable")
    widest = int(queries.lengths.max()) if queries.kind == "tokens" else 1
    start = 0
    with tqdm(total=len(pairs), desc="teacher", unit="pair") as progress:
        while start < len(pairs):
            long = int(documents.lengths[pairs[order[min(start + 4095, len(pairs) - 1)], 1]])
            size = max(1, CHUNK_ELEMENTS // (max(widest * long, (widest + long) * queries.dim)))
            part = order[start : start + min(size, 4096)]
            scores[part] = _part(queries, documents, pairs[part], similarity, device)
            start += len(part)
            progress.update(len(part))
    return scores


def _part(queries: Embeddings, documents: Embeddings, pairs: np.ndarray, similarity: str, device: Any) -> np.ndarray:
    if queries.kind == "sentence":
        q, d = (
            torch.from_numpy(s.values[p].astype(np.float32)).to(device)
            for s, p in zip((queries, documents), pairs.T, strict=True)
        )
        if similarity == "cosine":
            q, d = (torch.nn.functional.normalize(side, dim=-1) for side in (q, d))
        return (q * d).sum(-1).cpu().numpy()
    q, d = (torch.from_numpy(filled(s, p)).to(device) for s, p in zip((queries, documents), pairs.T, strict=True))
    lengths = torch.from_numpy(queries.lengths[pairs[:, 0]]).to(device)
    best = (q @ d.mT).amax(-1)  # (pairs, query tokens)
    best = best * (torch.arange(best.shape[1], device=device) < lengths[:, None])
    total = best.sum(-1)
    return (total / lengths if similarity == "meanmaxsim" else total).cpu().numpy()
