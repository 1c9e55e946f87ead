"""Train a head on the cached embeddings of a frozen backbone: encode once, then every step costs milliseconds.

``HeadData`` serves batches from the caches of any number of data sets. ``HeadTrainer`` is the stock Trainer of
transformers over an objective that has the shape of a sentence-transformers loss: ``objective(features, labels)`` with
``features = [queries, documents]``. So the losses and modules of that library train here too, which is how controls
and rivals get the same data in the same order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, load_model, save_file
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import Trainer, TrainerCallback

from .data.dataset import RetrievalDataset
from .data.noise import narrowed
from .encoding.cache import embed
from .encoding.embeddings import Embeddings, in_memory, mean_of_tokens, sum_of_tokens
from .errors import InputError
from .search.ranking import exact_search, tie_ranks
from .teachers import Teacher, score_pairs

Features = dict[str, Tensor]

OWN_WEIGHTS = "objective.safetensors"
"""File of a checkpoint with what the objective itself learns."""


@dataclass(frozen=True)
class Side:
    """The queries or the documents of one data set, encoded.

    Attributes:
        embeddings: One vector a text or image.
        tokens: ``(tokens of all texts,)`` token ids, special tokens included; None of images.
        offsets: ``(texts + 1,)`` bounds of each text's tokens; None of images.
        first: Place of the first text among the texts of all data sets.
    """

    embeddings: Embeddings
    tokens: np.ndarray | None
    offsets: np.ndarray | None
    first: int = 0

    def features(self, rows: np.ndarray) -> Features:
        """Features of some items: ``sentence_embedding``, ``index``; of texts padded ``input_ids, attention_mask``."""
        if self.tokens is None or self.offsets is None:
            return {
                "sentence_embedding": torch.from_numpy(self.embeddings.values[rows].astype(np.float32)),
                "index": torch.from_numpy(self.first + rows),
            }
        lengths = np.diff(self.offsets)[rows]
        columns = np.arange(max(1, lengths.max(initial=1)))
        mask = columns < lengths[:, None]  # (texts, tokens)
        places = np.minimum(self.offsets[rows][:, None] + columns, max(0, len(self.tokens) - 1))
        ids = np.where(mask, self.tokens[places], 0)
        return {
            "sentence_embedding": torch.from_numpy(self.embeddings.values[rows].astype(np.float32)),
            "input_ids": torch.from_numpy(ids.astype(np.int64)),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
            "index": torch.from_numpy(self.first + rows),
        }

    def __len__(self) -> int:
        return len(self.embeddings)


def encode_side(
    model: SentenceTransformer,
    texts: dict[str, str],
    task: Any,
    name: str,
    *,
    first: int = 0,
    tokenizer: Any = None,
    vectors: np.ndarray | None = None,
    **options: Any,
) -> Side:
    """Encode and tokenise texts, or encode images.

    Args:
        model: The frozen backbone.
        texts: Id -> text or image.
        task: ``query`` or ``document``.
        name: Readable part of the cache's name.
        first: See :class:`Side`.
        tokenizer: Takes the place of the backbone's own where a head uses another vocabulary.
        vectors: ``(texts, width)``; with these nothing is encoded.
        options: Those of :func:`polyrep.encoding.cache.embed`.

    Raises:
        InputError: The backbone's similarity is neither dot nor cosine.
    """
    if vectors is not None:
        embeddings = in_memory(vectors)
    else:
        embeddings = embed(model, texts, task=task, name=name, kind="sentence", **options)
    prompt = (model.prompts or {}).get(task) or None
    similarity = str(model.similarity_fn_name)
    if similarity not in ("dot", "cosine"):
        raise InputError(
            f"{name}: the model scores by {similarity}, which no inner product of sparse vectors can follow. "
            "Use a model with dot or cosine similarity."
        )
    if similarity == "cosine":  # the inner product of unit vectors, so that everything after scores alike
        vectors = np.asarray(embeddings.values, np.float32)
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        embeddings = replace(embeddings, values=vectors.astype(embeddings.values.dtype))
    if not (isinstance(texts, dict) and isinstance(next(iter(texts.values())), str)):  # images are opened late
        return Side(embeddings, None, None, first)
    rows, lengths, content = [], [], list(texts.values())
    for start in range(0, len(content), 1024):
        part = content[start : start + 1024]
        if tokenizer is None:
            batch = model.preprocess(part, prompt=prompt, task=task)
        else:
            batch = tokenizer(
                part, padding=True, truncation=True, max_length=model.max_seq_length, return_tensors="pt"
            )
        mask = batch["attention_mask"].bool()
        mask[:, : int(torch.as_tensor(batch.get("prompt_length", 0)).max())] = False  # no words of the text
        rows.append(batch["input_ids"][mask].numpy().astype(np.int32))
        lengths.append(mask.sum(1).numpy())
    return Side(embeddings, np.concatenate(rows), np.cumsum(np.concatenate([[0], *lengths])), first)


@dataclass(frozen=True)
class TokenSide:
    """The queries or the documents of one data set as a late-interaction model encodes them.

    Attributes:
        embeddings: Several vectors a text.
        first: Place of the first text among the texts of all data sets.
    """

    embeddings: Embeddings
    first: int = 0

    def features(self, rows: np.ndarray) -> Features:
        """Features of some texts: padded ``token_embeddings (texts, tokens, dim), attention_mask``, and ``index``."""
        offsets = self.embeddings.offsets
        assert offsets is not None
        lengths = offsets[rows + 1] - offsets[rows]
        mask = np.arange(lengths.max(initial=1)) < lengths[:, None]  # (texts, tokens)
        starts = np.repeat(offsets[rows] - np.cumsum(lengths) + lengths, lengths)
        vectors = torch.zeros(*mask.shape, self.embeddings.dim)
        found = self.embeddings.values[starts + np.arange(lengths.sum())]
        vectors[torch.from_numpy(mask)] = torch.from_numpy(np.asarray(found, np.float32))
        return {
            "token_embeddings": vectors,
            "attention_mask": torch.from_numpy(mask),
            "index": torch.from_numpy(self.first + rows),
        }

    def __len__(self) -> int:
        return len(self.embeddings)


def encode_tokens(
    model: MultiVectorEncoder, texts: dict[str, str], task: Any, name: str, *, first: int = 0, **options: Any
) -> TokenSide:
    """Encode texts into token vectors.

    Args:
        model: The frozen backbone.
        texts: Id -> text.
        task: ``query`` or ``document``.
        name: Readable part of the cache's name.
        first: See :class:`TokenSide`.
        options: Those of :func:`polyrep.encoding.cache.embed`.

    Raises:
        InputError: A text has no vector, or one that is not finite or is zero; names its id.
    """
    embeddings = embed(model, texts, task=task, name=name, kind="tokens", **options)
    assert embeddings.offsets is not None
    ids = list(texts)
    if not embeddings.lengths.all():
        raise InputError(
            f"{name}: {task} {ids[int(np.argmin(embeddings.lengths))]!r} has no token that counts, so it cannot be "
            "scored. Remove it, or loosen the backbone's skiplist or keep_only_token_ids."
        )
    for start in range(0, len(embeddings.values), 2**18):  # 64 MiB at width 128, not the whole corpus
        lengths = np.linalg.norm(embeddings.values[start : start + 2**18].astype(np.float32), axis=1)
        bad = ~((lengths > 0) & np.isfinite(lengths))
        if bad.any():
            place = start + int(np.argmax(bad))
            text = int(np.searchsorted(embeddings.offsets, place, "right")) - 1
            raise InputError(
                f"{name}: {task} {ids[text]!r} has a token vector of length {lengths[place - start]} in the cache "
                f"{embeddings.path}, so its pooled vector would mean nothing. Delete the cache to have it made again; "
                "if the error stays, the backbone is broken."
            )
    return TokenSide(embeddings, first)


@dataclass(frozen=True)
class LayerSide:
    """The queries or the documents of one data set at every layer of an encoder.

    Attributes:
        embeddings: One vector a layer.
        first: Place of the first text among the texts of all data sets.
    """

    embeddings: Embeddings
    first: int = 0

    def features(self, rows: np.ndarray) -> Features:
        """Features of some texts: ``layer_embeddings (texts, layers + 1, dim)``, embeddings first, and ``index``."""
        return {
            "layer_embeddings": torch.from_numpy(self.embeddings.values[rows].astype(np.float32, copy=False)),
            "index": torch.from_numpy(self.first + rows),
        }

    def last(self) -> Embeddings:
        """The last layer alone."""
        return replace(self.embeddings, kind="sentence", values=self.embeddings.values[:, -1])

    def __len__(self) -> int:
        return len(self.embeddings)


def encode_layers(
    model: SentenceTransformer,
    texts: dict[str, str],
    task: Any,
    name: str,
    *,
    first: int = 0,
    token: str = "mean",
    **options: Any,
) -> LayerSide:
    """Encode texts into their state at every layer.

    Args:
        model: The frozen backbone, whose first module is the encoder.
        texts: Id -> text.
        task: ``query`` or ``document``.
        name: Readable part of the cache's name.
        first: See :class:`LayerSide`.
        token: ``mean`` of a text's tokens, or ``cls`` for the first.
        options: Those of :func:`polyrep.encoding.cache.embed`.
    """
    kind: Any = {"mean": "layers", "cls": "cls_layers"}[token]
    return LayerSide(embed(model, texts, task=task, name=name, kind=kind, **options), first)


def encode_dataset(
    model: Any,
    dataset: RetrievalDataset,
    *,
    kind: Literal["sentence", "tokens", "layers"] = "sentence",
    images: Any = None,
    first: tuple[int, int] = (0, 0),
    **options: Any,
) -> tuple[Any, Any]:
    """Encode both sides of a data set, or take the vectors that it brings.

    Args:
        model: The frozen backbone.
        dataset: The data set.
        kind: What the head reads, see :class:`HeadData`.
        images: Encodes the documents where the backbone cannot.
        first: Places of the first query and document, see :class:`Side`.
        options: Those of the encoding.

    Returns:
        Queries and documents, each a Side, TokenSide or LayerSide.

    Raises:
        InputError: Vectors have another width than the encoder's, or a caption of an image holds no known word.
    """
    encode: Any = {"sentence": encode_side, "tokens": encode_tokens, "layers": encode_layers}[kind]
    sides = []
    for side, encoder, texts, name, place in (
        ("query", model, dataset.queries, f"{dataset.name}-{dataset.split}", first[0]),
        ("document", images or model, dataset.corpus, dataset.name, first[1]),
    ):
        given = _given_vectors(dataset, side, model, images)
        more = options if given is None else {**options, "vectors": given}
        sides.append(encode(encoder, texts, side, name, first=place, **more))
    queries, documents = sides
    if _of_images(documents):
        _refuse_wordless(dataset, queries, options.get("tokenizer") or model.tokenizer)
    return queries, documents


def _of_images(side: Any) -> bool:
    return isinstance(side, Side) and side.tokens is None


class HeadData(Dataset):
    """Pairs of query and document, with negatives from the backbone's own ranking, over one or more data sets.

    Args:
        kind: What the head reads: ``sentence`` for one vector a text, ``tokens`` for several, ``layers`` for one a
            layer. Nearest documents of token vectors are those of their mean, since a full late-interaction search
            would cost more than the fit; of layers those of the last.
        negatives: Documents drawn for each query from the ``depth`` nearest of the backbone.
        labels: Take pairs from the judgments. Without, the nearest document takes the place of the judged one, so
            that no judgment has any influence. Images are always paired with their captions, which is all their text.
        depth: See ``negatives``.
        narrow_sides: ``query`` or ``document`` or both, whose texts are also encoded cut short or misspelt
            (:func:`polyrep.data.noise.narrowed`), for kind sentence.
        teacher: Scores each query's documents and nearest, for kind sentence and with labels.
    """

    def __init__(
        self,
        *,
        kind: Literal["sentence", "tokens", "layers"] = "sentence",
        negatives: int = 2,
        labels: bool = False,
        depth: int = 100,
        narrow_sides: Sequence[str] = (),
        teacher: Teacher | None = None,
    ):
        if negatives < 0 or depth < 1:
            raise InputError(f"--negatives {negatives}, --depth {depth}: none can be drawn. Use 0 and 1, or more.")
        self.kind, self.negatives, self.labels, self.depth, self.seed = kind, negatives, labels, depth, 0
        self.narrow_sides, self.teacher = tuple(narrow_sides), teacher
        if (teacher is not None or narrow_sides) and not (labels and kind == "sentence"):
            raise InputError(
                "--teacher, or texts with less in them: are for an objective that learns from judgments, and from one "
                "vector a text."
            )
        self.less: list[dict[str, Any]] = []  # queries, documents or both, narrowed
        self.taught: list[np.ndarray] = []  # (queries, depth + most judged) the teacher's scores: nearest, then judged
        self.teach: list[Callable[[np.ndarray], np.ndarray]] = []  # and what makes them
        # queries, documents, nearest (queries, depth)
        self.parts: list[tuple[Any, Any, np.ndarray]] = []
        self.pairs = np.empty((0, 3), np.int64)  # data set, query, document
        self.judged: list[np.ndarray] = []  # (queries, most judged) places of relevant documents from 1 on, else 0
        self.epoch = 0  # set by the trainer

    def add(self, model: Any, dataset: RetrievalDataset, images: Any = None, **options: Any) -> None:
        """Encode a data set, or map its cache, and add its pairs.

        Args:
            model: The frozen backbone.
            dataset: Whose vectors, if it brings any, are taken instead.
            images: Encodes the documents where the backbone cannot.
            options: Those of the encoding.

        Raises:
            InputError: The two sides do not fit together, or a caption of an image holds no known word.
        """
        firsts = [sum(len(part[side]) for part in self.parts) for side in (0, 1)]
        queries, documents = encode_dataset(
            model, dataset, kind=self.kind, images=images, first=(firsts[0], firsts[1]), **options
        )
        if _of_images(documents):
            self.labels = True
        if self.parts and self.has_images != _of_images(documents):
            raise InputError(f"{dataset.name}: one data set holds images, another texts. Train on one kind at a time.")
        ranks = tie_ranks(list(dataset.corpus))
        sides, similarity = (queries.embeddings, documents.embeddings), "dot"
        if self.kind == "tokens":
            sides = sum_of_tokens(sides[0]), mean_of_tokens(sides[1])
        elif self.kind == "layers":
            sides, similarity = (queries.last(), documents.last()), str(model.similarity_fn_name)
        if sides[0].dim == sides[1].dim:
            nearest, _ = exact_search(*sides, ranks, similarity=similarity, k=self.depth)
        elif self.negatives or self.teacher is not None or not self.labels:
            raise InputError(
                f"{dataset.name}: queries have vectors of {sides[0].dim} and documents of {sides[1].dim}, so none is "
                "nearest and could be drawn. Use --negatives 0 and an objective that learns from judgments."
            )
        else:
            nearest = np.zeros((len(queries), 1), np.int64)
        if self.labels:
            place = {identifier: i for i, identifier in enumerate(dataset.corpus)}
            judged = [
                (row, place[d])
                for row, query in enumerate(dataset.queries)
                for d, relevance in dataset.qrels[query].items()
                if relevance > 0
            ]
            pairs = np.array(judged, np.int64).reshape(-1, 2)
            counts = np.bincount(pairs[:, 0], minlength=len(queries))
            relevant = np.zeros((len(queries), counts.max(initial=1)), np.int64)
            starts = np.repeat(np.cumsum(counts) - counts, counts)
            relevant[pairs[:, 0], np.arange(len(pairs)) - starts] = firsts[1] + pairs[:, 1] + 1
            self.judged.append(relevant)
        else:
            pairs = np.stack([np.arange(len(queries)), nearest[:, 0]], axis=1)
        numbered = np.concatenate([np.full((len(pairs), 1), len(self.parts)), pairs], axis=1)
        self.parts.append((queries, documents, nearest))
        self.pairs = np.concatenate([self.pairs, numbered])
        less = {}
        for task, texts, name in (
            ("query", dataset.queries, f"{dataset.name}-{dataset.split}-narrowed"),
            ("document", dataset.corpus, f"{dataset.name}-narrowed"),
        ):
            if task in self.narrow_sides:
                less[task] = encode_side(model, narrowed(texts), task, name, **options)
        self.less.append(less)
        if self.teacher is not None:
            settings = {"cache_dir": options.get("cache_dir"), "batch_size": options.get("batch_size", 32)}
            names = (f"{dataset.name}-{dataset.split}", dataset.name)
            self.teach.append(
                partial(score_pairs, self.teacher, dataset.queries, dataset.corpus, names=names, **settings)
            )
            self.taught.append(self._taught(len(self.parts) - 1))

    def _taught(self, number: int) -> np.ndarray:
        """The teacher's scores of every query's nearest and judged documents; of padding, the first's."""
        documents, nearest = self.parts[number][1:]
        judged = np.maximum(self.judged[number] - 1 - documents.first, 0)
        wanted = np.concatenate([nearest, judged], axis=1)  # (queries, depth + most judged)
        rows = np.repeat(np.arange(len(wanted)), wanted.shape[1])
        return self.teach[number](np.stack([rows, wanted.reshape(-1)], axis=1)).reshape(wanted.shape)

    def mine_again(self, encode: Callable[[Features, str], Tensor]) -> None:
        """Take each query's nearest documents anew, by the inner product of the vectors that ``encode`` makes."""
        for number, (queries, documents, nearest) in enumerate(self.parts):
            sides = []
            for side, task in ((queries, "query"), (documents, "document")):
                rows = np.arange(len(side))
                with torch.inference_mode():
                    vectors = [
                        encode(side.features(part), task) for part in np.array_split(rows, -(-len(rows) // 2048))
                    ]
                values = torch.cat(vectors).float().cpu().numpy()
                sides.append(replace(side.embeddings, values=values, dim=values.shape[1]))
            ranks = np.arange(len(documents))
            found, _ = exact_search(sides[0], sides[1], ranks, similarity="dot", k=nearest.shape[1])
            self.parts[number] = (queries, documents, found)
            if self.teach:
                self.taught[number] = self._taught(number)

    def even_out(self, first: int) -> None:
        """Repeat pairs of the parts from ``first`` on until each has about as many as the largest of them.

        Each repeat draws its own negatives.
        """
        counts = np.bincount(self.pairs[:, 0])
        times = np.where(np.arange(len(counts)) < first, 1, np.round(counts[first:].max() / counts))
        self.pairs = np.repeat(self.pairs, times.astype(int)[self.pairs[:, 0]], axis=0)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, row: int) -> np.ndarray:
        return np.append(self.pairs[row], row)

    def collate(self, rows: list[np.ndarray]) -> dict[str, Any]:
        """A batch: ``features`` of queries and of documents, own ones first, then negatives; and ``labels``.

        With labels, queries carry ``judged``: ``index`` of every relevant document plus 1, padded with 0. With a
        teacher, ``list (batch, 1 + negatives)`` rows of their documents in the batch, and its ``teacher`` scores.
        """
        pairs = np.stack(rows)  # (batch, 4): data set, query, document, row
        # Draws follow from the seed and the rows, so that neither an interruption nor more processes change them.
        draws = np.stack(
            [np.random.default_rng([self.seed, self.epoch, row]).random(self.negatives) for row in pairs[:, 3]]
        )
        query_parts, own_parts, negative_parts, members = [], [], [], []
        for number in np.unique(pairs[:, 0]):
            queries, documents, nearest = self.parts[number]
            member = np.flatnonzero(pairs[:, 0] == number)
            drawn = (draws[member] * nearest.shape[1]).astype(np.int64)
            asked, own = pairs[member, 1], pairs[member, 2]
            texts = [asked, own, nearest[asked[:, None], drawn].reshape(-1)]
            found = [side.features(rows) for side, rows in zip((queries, documents, documents), texts, strict=True)]
            if self.labels:  # so that no relevant document need count as a negative
                found[0]["judged"] = torch.from_numpy(self.judged[number][asked])
            for features, rows, task in zip(found, texts, ("query", "document", "document"), strict=True):
                if task in self.narrow_sides:
                    less = self.less[number][task].embeddings.values[rows]
                    features["narrow_embedding"] = torch.from_numpy(less.astype(np.float32))
            if self.taught:
                column = (self.judged[number][asked] == documents.first + own[:, None] + 1).argmax(1)
                columns = np.concatenate([nearest.shape[1] + column[:, None], drawn], axis=1)  # own, then negatives
                found[0]["teacher"] = torch.from_numpy(self.taught[number][asked[:, None], columns])
            query_parts.append(found[0])
            own_parts.append(found[1])
            negative_parts.append(found[2])
            members.append(member)
        back = torch.from_numpy(np.argsort(np.concatenate(members)))  # from data set by data set to the order of rows
        features = [_concatenated(query_parts), _concatenated(own_parts + negative_parts)]
        places = [back, torch.cat([back, torch.arange(len(pairs), len(features[1]["index"]))])]
        features = [{n: v[order] for n, v in side.items()} for side, order in zip(features, places, strict=True)]
        if self.taught:  # rows of the documents that the teacher's scores are of
            drawn_of = len(pairs) + back[:, None] * self.negatives + torch.arange(self.negatives)
            features[0]["list"] = torch.cat([torch.arange(len(pairs))[:, None], drawn_of], 1)
        return {"features": features, "labels": torch.arange(len(pairs))}

    def batches(self, side: str, size: int = 1024) -> Iterator[Features]:
        """Every query or document once, in order, a batch at a time."""
        for queries, documents, _ in self.parts:
            texts = documents if side == "document" else queries
            for start in range(0, len(texts), size):
                yield texts.features(np.arange(start, min(start + size, len(texts))))

    @property
    def has_images(self) -> bool:
        """Whether the documents are images, which have no text of their own."""
        return any(_of_images(documents) for _, documents, _ in self.parts)

    def pair_batches(self, size: int = 1024) -> Iterator[tuple[Features, Features]]:
        """Features of every pair's query and document, in order, a batch at a time."""
        for number, (queries, documents, _) in enumerate(self.parts):
            pairs = self.pairs[self.pairs[:, 0] == number]
            for start in range(0, len(pairs), size):
                part = pairs[start : start + size]
                yield queries.features(part[:, 1]), documents.features(part[:, 2])

    def query_sums(self) -> Tensor:
        """``(queries, dim)`` sum of each query's token vectors, over all data sets."""
        sums = [sum_of_tokens(queries.embeddings).values for queries, _, _ in self.parts]
        return torch.from_numpy(np.concatenate(sums))

    def document_means(self) -> Tensor:
        """``(documents, dim)`` normalised mean of each document's token vectors, over all data sets."""
        means = [mean_of_tokens(documents.embeddings).values for _, documents, _ in self.parts]
        return torch.from_numpy(np.concatenate(means).astype(np.float32))

    def relevant(self) -> Tensor:
        """``(pairs, 2)`` place of a query and of its document among those of all data sets."""
        firsts = np.array([(queries.first, documents.first) for queries, documents, _ in self.parts])
        return torch.from_numpy(self.pairs[:, 1:] + firsts[self.pairs[:, 0]])

    def most_tokens(self) -> int:
        """Vectors of the longest document."""
        return max(int(documents.embeddings.lengths.max()) for _, documents, _ in self.parts)


def _given_vectors(dataset: RetrievalDataset, side: str, model: Any, images: Any) -> np.ndarray | None:
    """What a data set brings for a side, in the space of ``model`` (of ``images``, for documents); None for nothing.

    Images that come without vectors of their captions are features of the vision tower, if they have its width.
    """
    vectors = dataset.vectors.get(side)
    if vectors is None:
        return None
    encoder = images if images is not None and side == "document" else model
    widths = [encoder.get_embedding_dimension()]
    tower = getattr(getattr(model[0], "model", None), "head", None)
    if images is None and side == "document" and "query" not in dataset.vectors and tower is not None:
        if tower.config.image_dim == widths[0]:
            raise InputError(
                f"{dataset.name}: vectors of width {widths[0]} may be the vision tower's features or already mapped. "
                "Bring the captions' vectors too, if they are."
            )
        if vectors.shape[1] == tower.config.image_dim:
            with torch.inference_mode():
                parts = [
                    tower(torch.from_numpy(part.astype(np.float32)).to(tower.device, tower.dtype), "image")
                    for part in np.array_split(vectors, -(-len(vectors) // 2048))
                ]
            return torch.cat([part.sentence_embedding.float().cpu() for part in parts]).numpy().astype(np.float16)
        widths.append(tower.config.image_dim)
    if vectors.shape[1] not in widths:
        flag = "--vision" if images is not None and side == "document" else "--backbone"
        raise InputError(
            f"{dataset.name}: its {side} vectors have width {vectors.shape[1]}, but the encoder gives "
            f"{' or '.join(map(str, widths))}, so they come from another. Name the one that made them with {flag}."
        )
    if images is not None and side == "document":
        return vectors
    # As the encoder's own would be: of unit length, by which they are compared.
    lengths = np.linalg.norm(vectors.astype(np.float32), axis=1, keepdims=True)
    if not lengths.all():
        raise InputError(
            f"{dataset.name}: {side} vector {int(lengths.argmin())} of the split is zero, so it has no direction to "
            "compare. Make it again, or remove its image."
        )
    return (vectors / lengths).astype(np.float16)


def _refuse_wordless(dataset: RetrievalDataset, captions: Side, tokenizer: Any) -> None:
    """Images are found by the words of their captions alone, so each needs one."""
    assert captions.tokens is not None and captions.offsets is not None
    known = ~np.isin(captions.tokens, tokenizer.all_special_ids)
    words = np.diff(np.concatenate([[0], np.cumsum(known)])[captions.offsets])
    if not words.all():
        caption = list(dataset.queries)[int(words.argmin())]
        raise InputError(
            f"{dataset.name}: caption {caption!r} ({dataset.queries[caption]!r}) holds no word of the vocabulary, so "
            "nothing could find its image by it. Remove it or write it in the tokenizer's language."
        )


def _concatenated(parts: list[Features]) -> Features:
    """Features of several parts under one another, token ids or vectors padded to the longest."""
    joined = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        if tensors[0].ndim > 1 and not name.endswith(("sentence_embedding", "layer_embeddings", "narrow_embedding")):
            tensors = pad_tokens(tensors)
        joined[name] = torch.cat(tensors)
    return joined


def pad_tokens(tensors: list[Tensor]) -> list[Tensor]:
    """Pad the second axis, that of tokens, to the longest with zeros."""
    width = max(tensor.shape[1] for tensor in tensors)
    return [
        torch.nn.functional.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, width - tensor.shape[1]))
        for tensor in tensors
    ]


class _EpochCallback(TrainerCallback):
    """Tells the data which epoch it is, on which its draws depend, and may have it mine with the model so far."""

    def __init__(self, data: HeadData, encode: Callable[[Features, str], Tensor] | None):
        self.data, self.encode = data, encode

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.data.epoch = int(state.epoch or 0)
        if self.encode and self.data.epoch:
            self.data.mine_again(self.encode)


class HeadTrainer(Trainer):
    """The stock Trainer over an objective with the shape of a sentence-transformers loss.

    What trains is the objective as a whole: a step is then one forward pass, which is what sharing gradients between
    processes asks for. What is saved is ``objective.model``.

    Args:
        objective: Takes ``(features, labels)`` and returns a loss, or several by name that are added and logged apart.
            It may say which ``learning_rates`` (pattern -> multiple) some parameters take, and read ``progress``.
        remine: Take negatives anew before each further epoch, of the nearest by ``objective.vectors``. A resumed
            epoch takes them by the model that it resumes from.
        kwargs: Those of the Trainer.

    Raises:
        InputError: The objective makes no single vectors to mine with.
    """

    def __init__(self, *, objective: Any, remine: bool = False, **kwargs: Any):
        encode = getattr(objective, "vectors", None) if remine else None
        if remine and encode is None:
            raise InputError(f"--remine true: {type(objective).__name__} makes no vectors to mine with. Leave it out.")
        super().__init__(model=objective, **kwargs)
        self.objective: Any = objective
        self.model_accepts_loss_kwargs = False
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self.prepare_seconds = 0.0
        if isinstance(self.train_dataset, HeadData):
            self.train_dataset.seed = self.args.seed
            self.add_callback(_EpochCallback(self.train_dataset, encode))

    def get_train_dataloader(self) -> Any:
        """The stock one, unless there is no whole batch, which it would pass over in silence."""
        batch = self.args.train_batch_size * self.args.world_size
        pairs = len(self.train_dataset)  # type: ignore[arg-type]
        if pairs < batch:
            raise InputError(
                f"{pairs} pairs, but a step takes {batch}, so there is no step. Lower "
                "--per_device_train_batch_size, or name more --datasets."
            )
        return super().get_train_dataloader()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of a batch."""
        self.objective.seed = self.args.seed
        self.objective.progress = (self.state.global_step, self.state.max_steps)
        losses = model(inputs["features"], inputs["labels"])
        if not isinstance(losses, dict):
            losses = {"objective": losses}
        shown = losses | getattr(self.objective, "metrics", {})
        for name, value in shown.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=value.device)) + value.detach()
        self._steps += 1
        total = torch.stack(list(losses.values())).sum()
        return (total, {}) if return_outputs else total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of each part of the loss since the last time."""
        if "loss" in logs and len(self._sums) > 1:
            logs |= {name: round(float(value) / self._steps, 4) for name, value in self._sums.items()}
        if "loss" in logs:
            self._sums, self._steps = {}, 0
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """AdamW with the objective's own rates; a parameter that no pattern names takes ``--learning_rate``."""
        rates = getattr(self.objective, "learning_rates", {})
        groups: dict[float, list[Any]] = {}
        for name, parameter in self.objective.named_parameters():
            if parameter.requires_grad:
                factor = next((value for pattern, value in rates.items() if re.search(pattern, name)), 1.0)
                groups.setdefault(factor, []).append(parameter)
        optimizer, options = self.get_optimizer_cls_and_kwargs(self.args)
        rate = options.pop("lr")
        self.optimizer = optimizer(
            [{"params": part, "lr": rate * factor} for factor, part in groups.items()],
            weight_decay=self.args.weight_decay,
            **options,
        )
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:  # newer trainers ask every process
            return
        folder = Path(output_dir or str(self.args.output_dir))
        self.finish()
        self.objective.model.save_pretrained(folder)
        if own := self._own_weights():
            save_file(own, folder / OWN_WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        load_model(self.objective.model, folder / "model.safetensors")
        if own := self._own_weights():
            if not (folder / OWN_WEIGHTS).is_file():
                raise InputError(
                    f"{folder}: lacks {OWN_WEIGHTS}, what {type(self.objective).__name__} learned beside the model, "
                    "so going on would forget it. Start anew in another --output_dir."
                )
            self.objective.load_state_dict(own | load_file(folder / OWN_WEIGHTS), strict=False)

    def finish(self) -> None:
        """Bring what follows from the trained weights up to date, for objectives that have such a part."""
        getattr(self.objective, "finish", lambda: None)()

    def _own_weights(self) -> dict[str, Tensor]:
        """What the objective learns beside the model, which it needs to go on and nobody needs afterwards."""
        weights = self.objective.state_dict()
        return {name: value.contiguous() for name, value in weights.items() if not name.startswith("model.")}


def encode_sparse(encode: Callable[[Features], Tensor], side: Side, *, show_progress: bool = True) -> Embeddings:
    """Sparse vectors of cached texts, as :func:`polyrep.encoding.cache.embed` would give for the whole retriever.

    Args:
        encode: Turns features into word weights ``(texts, words)``.
        side: The texts.
        show_progress: Show a progress bar.

    Returns:
        Embeddings of kind ``sparse``, float16, in memory.
    """
    values, indices, counts, width = [], [], [np.zeros(1, np.int64)], 0
    with torch.inference_mode():
        for start in tqdm(range(0, len(side), 512), desc="sparse", unit="batch", disable=not show_progress):
            weights = encode(side.features(np.arange(start, min(start + 512, len(side))))).float().cpu().numpy()
            text_of, term = np.nonzero(weights)
            values.append(weights[text_of, term].astype(np.float16))
            indices.append(term.astype(np.int32))
            counts.append(np.bincount(text_of, minlength=len(weights)))
            width = weights.shape[1]
    offsets = np.cumsum(np.concatenate(counts), dtype=np.int64)
    return Embeddings("sparse", np.concatenate(values), offsets, np.concatenate(indices), width, 0.0, Path())
