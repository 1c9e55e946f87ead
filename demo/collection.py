"""A corpus under every representation at once: exact search with each, and what each knows of a text.

Two backbones encode: all-MiniLM-L6-v2, whose layers are kept, and the late-interaction model, whose token vectors are.
Everything else follows from these by a head, for the corpus once and for a query when it is asked.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import torch
from PIL import Image
from storage import digest_of, digest_of_code, encoded, kept
from torch import Tensor

from polyrep.data import RetrievalDataset
from polyrep.data.noise import cut_short, misspelt
from polyrep.encoding import Embeddings
from polyrep.encoding.embeddings import in_memory, rows, sum_of_tokens
from polyrep.encoding.encoders import encode_chunk
from polyrep.errors import InputError
from polyrep.evaluation.bm25 import K1, B, analyzer
from polyrep.evaluation.frontier.pooling import pooled
from polyrep.evaluation.frontier.timed import ReadyIndex
from polyrep.evaluation.systems import bytes_per_document, costs_of
from polyrep.hub import fetch, fingerprint, load
from polyrep.hub.folder import fastest_dtype
from polyrep.methods import GaussianOutput
from polyrep.methods.reinpool.frontier import by_head
from polyrep.methods.reinpool.show import token_pieces
from polyrep.search import kl
from polyrep.search.ranking import rescore, tie_ranks
from polyrep.training.sides import LayerSide, SentenceSide, encode_sparse

RUNS = {
    "late-interaction-minilm": "final",
    "reinpool-minilm": "head",
    "lemur-minilm": "head",
    "dense2sparse-minilm": "head",
    "gaussian-minilm-frozen": "head",
    "multilayer-minilm-frozen": "head",
}
"""The models of the demo, each with the part of a run's output that it is."""

TOP = 10
RERANKED = 50
"""Documents that LEMUR finds and full MaxSim ranks."""

FULL = "Full MaxSim"
REPEATS = 3
"""Times that a step is measured; the median is shown."""

LONGEST = {"query": 500, "document": 5_000}
"""Characters of a text. The models read 256 tokens of it."""


def checked(text: Any, what: str) -> str:
    """A text without blanks around it, refused if it is empty or too long.

    Args:
        text: What somebody typed.
        what: ``query`` or ``document``.

    Raises:
        InputError: The reason, in words for whoever typed it.
    """
    text, most = (text or "").strip(), LONGEST[what]
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InputError(f"The {what} is no valid Unicode, so no tokenizer reads it. Type it anew.")
    if not text:
        raise InputError(f"The {what} is empty, so there is nothing to encode. Type a few words.")
    if len(text) > most:
        raise InputError(
            f"The {what} has {len(text):,} characters, more than the {most:,} that the demo takes. Shorten it."
        )
    return text


def keys(dataset: RetrievalDataset, models: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """What is kept of a corpus, by name: the key of each, which says all that its vectors depend on.

    Args:
        dataset: The corpus.
        models: Run -> folder, for each of :data:`RUNS`.
    """
    texts = digest_of(list(dataset.corpus.items()))
    content = {"texts": texts, "task": "document", "dtype": "float16", "code": digest_of_code()}
    layers = content | {"kind": "layers", "model": fingerprint(fetch("minilm"))}
    tokens = content | {"kind": "tokens", "model": fingerprint(models["late-interaction-minilm"])}
    found = {"all-MiniLM-L6-v2": layers, "late-interaction-minilm": tokens, "dense": layers | {"kind": "sentence"}}
    for name, source, run, kind in (
        ("dense2sparse-minilm", layers, "dense2sparse-minilm", "sparse"),
        ("gaussian-minilm-frozen", layers, "gaussian-minilm-frozen", "sentence"),
        ("multilayer-minilm-frozen", layers, "multilayer-minilm-frozen", "sentence"),
        ("lemur-minilm", tokens, "lemur-minilm", "sentence"),
        ("reinpool-minilm-1", tokens, "reinpool-minilm", "sentence"),
        ("reinpool-minilm-8", tokens, "reinpool-minilm", "tokens"),
    ):
        found[name] = source | {"kind": kind, "head": fingerprint(models[run]), "name": name}
    return found


@dataclass(frozen=True)
class Asked:
    """A query as both backbones encode it.

    Attributes:
        text: The query.
        features: ``sentence_embedding (1, dim)`` of MiniLM, and the ``input_ids`` and ``attention_mask`` of the text.
        layers: ``(1, layers + 1, dim)`` MiniLM's state at each layer, embeddings first.
        tokens: Of the late-interaction model.
        milliseconds: Backbone -> what it took.
    """

    text: str
    features: dict[str, Tensor]
    layers: Tensor
    tokens: Embeddings
    milliseconds: dict[str, float]


@dataclass(frozen=True)
class Representation:
    """One way to hold a corpus, and to ask it.

    Attributes:
        name: In tables.
        idea: In one line.
        backbone: What encodes the query before ``ask``: ``MiniLM``, ``late interaction`` or none.
        bytes_per_document: In the index, in the mean.
        ask: Turns an encoded query into what ``search`` takes.
        search: From that and a number of documents to positions and scores, ``(1, k)`` each, best first. Exact.
        unit: What a score is.
    """

    name: str
    idea: str
    backbone: str
    bytes_per_document: float
    ask: Callable[[Asked], Any]
    search: Callable[[Any, int], tuple[np.ndarray, np.ndarray]]
    unit: str


@dataclass(frozen=True)
class Hit:
    """A document that was found."""

    id: str
    text: str
    score: float
    relevant: bool


@dataclass(frozen=True)
class Found:
    """What one representation found, and what that took.

    Attributes:
        representation: Which.
        hits: Best first.
        encode_ms: Backbone and head, for the query.
        search_ms: From the query's vectors to the sorted hits.
        overlap: Share of full MaxSim's best documents that are among these.
    """

    representation: Representation
    hits: list[Hit]
    encode_ms: float
    search_ms: float
    overlap: float


@dataclass(frozen=True)
class Words:
    """What Dense2Sparse makes of a text or an image: ``(word, weight, whether the text holds it)``, heaviest first."""

    words: list[tuple[str, float, bool]]

    @property
    def own(self) -> int:
        """Words that the text holds."""
        return sum(own for _, _, own in self.words)


@dataclass(frozen=True)
class KeptTokens:
    """A document before and after ReinPool.

    Attributes:
        tokens: As the tokenizer writes them.
        keep_probability: ``(tokens,)``, the weight of each token in its vector.
        clusters: ``(tokens,)`` number of the vector, from 1, that each token goes into.
        bytes_before: Of all token vectors in 16 bits, and the offset.
        bytes_after: Of the pooled ones.
    """

    tokens: list[str]
    keep_probability: list[float]
    clusters: list[int]
    bytes_before: float
    bytes_after: float


@dataclass(frozen=True)
class Uncertainty:
    """How sure the Gaussian model is of a query, beside the same query with less in it.

    Attributes:
        queries: Label -> text, the query as it is first.
        nats: ``(queries,)`` half the sum of the log variances, the entropy up to a constant.
        asked: Distributions of the queries.
        documents: Of the best documents.
        hits: Those, with -KL in nats as score.
    """

    queries: dict[str, str]
    nats: list[float]
    asked: GaussianOutput
    documents: GaussianOutput
    hits: list[Hit]


@dataclass(frozen=True)
class LayerScores:
    """What each layer of a document adds to its score.

    Attributes:
        layers: Names, the last layer first.
        hits: The best documents, with the model's own score.
        shares: ``(documents, layers)``; a row's sum is the score.
    """

    layers: list[str]
    hits: list[Hit]
    shares: np.ndarray


class Bm25:
    """Lucene's BM25 as :func:`polyrep.evaluation.bm25.rank_with_bm25` has it, kept for one query at a time."""

    def __init__(self, texts: Sequence[str], ranks: np.ndarray):
        self.analyzer = analyzer("en")
        self.index = bm25s.BM25(k1=K1, b=B, method="lucene")
        self.index.index(self.analyzer.words(texts), show_progress=False)
        self.by_rank = np.argsort(ranks)  # ties must fall as everywhere else: this order, then sort stably
        self.size = bytes_per_document("sparse", "float32", nnz=len(self.index.scores["data"]) / len(texts))

    def ask(self, asked: Asked) -> list[str]:
        """Stems of a query."""
        return self.analyzer.words([asked.text])[0]

    def search(self, words: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The best documents and their scores."""
        scores = self.index.get_scores(words) if words else np.zeros(len(self.by_rank), np.float32)
        places = self.by_rank[np.argsort(-scores[self.by_rank], kind="stable")[:k]]
        return places[None], scores[places][None]


class Collection:
    """A corpus, encoded; opening it for the first time takes minutes, and seconds afterwards.

    Args:
        dataset: The corpus, and test queries with their judgments for examples.
        models: Run -> folder, for each of :data:`RUNS`.
        cache: Where what was encoded is kept.
        images: A model whose words are those of images, if there is one.

    Raises:
        InputError: The documents are images.
    """

    def __init__(self, dataset: RetrievalDataset, models: Mapping[str, Path], cache: Path, images: Any = None):
        self.dataset, self.models, self.cache, self.images = dataset, models, cache, images
        self.ids, self.texts = list(dataset.corpus), list(dataset.corpus.values())
        if not isinstance(self.texts[0], str):
            raise InputError(f"{dataset.name}: its documents are images, which these models do not read. Use texts.")
        self.ranks = tie_ranks(self.ids)
        dtype = fastest_dtype("auto")
        minilm = fetch("minilm")
        self.minilm, self.late = load(minilm, dtype=dtype), load(models["late-interaction-minilm"], dtype=dtype)
        names = ("dense2sparse-minilm", "gaussian-minilm-frozen", "multilayer-minilm-frozen")
        self.dense2sparse, self.gaussian, self.multilayer = (load(models[name]).eval() for name in names)
        self.reinpool, self.lemur = (load(models[name]).eval() for name in ("reinpool-minilm", "lemur-minilm"))
        self._keys = keys(dataset, models)
        self.layers, self.tokens = (
            encoded(cache, name, self._keys[name], model, dataset.corpus)
            for name, model in (("all-MiniLM-L6-v2", self.minilm), ("late-interaction-minilm", self.late))
        )
        self.representations = self._represent()
        self.relevant: dict[str, list[str]] = {}
        for query, text in dataset.queries.items():
            judged = [document for document, grade in dataset.qrels[query].items() if grade > 0]
            self.relevant.setdefault(text, []).extend(judged)

    @torch.inference_mode()
    def _represent(self) -> list[Representation]:
        """Every representation, its vectors from the cache or made from the backbones'."""
        dense = self._held("dense", lambda: in_memory(self._dense(self.layers).numpy()))
        sparse = self._held("dense2sparse-minilm", lambda: self._sparse(dense))
        gaussian = self._held("gaussian-minilm-frozen", lambda: self._gaussian(dense))
        layered = self._held("multilayer-minilm-frozen", self._layered)
        lemur = self._held("lemur-minilm", self._lemur)
        one, eight = (self._held(f"reinpool-minilm-{k}", partial(self._pooled, k)) for k in (1, 8))
        full = ReadyIndex(self.tokens, self.ranks, "maxsim")
        bm25 = Bm25(self.texts, self.ranks)

        first = ReadyIndex(lemur, self.ranks, "dot")

        def two_stages(queries: tuple[Embeddings, Embeddings], k: int) -> tuple[np.ndarray, np.ndarray]:
            places, _ = first.search(queries[0], RERANKED)
            places, scores = rescore(queries[1], full.documents, places, self.ranks, similarity="maxsim")
            return places[:, :k], scores[:, :k]

        late = "late interaction"
        table: list[tuple[str, str, str, Embeddings, Callable[[Asked], Embeddings], str, str]] = [
            ("Dense", "one vector of all-MiniLM-L6-v2", "MiniLM", dense, self._ask_dense, "dot", "cosine"),
            (
                "Dense2Sparse",
                "weighted words, own and added",
                "MiniLM",
                sparse,
                self._ask_sparse,
                "dot",
                "dot product",
            ),
            ("Gaussian", "a mean and a variance", "MiniLM", gaussian, self._ask_gaussian, "dot", "−KL in nats"),
            ("MultiLayer", "one map of all layers of MiniLM", "MiniLM", layered, self._ask_layers, "dot", "cosine"),
            (
                "ReinPool, 1",
                "token vectors pooled to one",
                late,
                one,
                lambda asked: sum_of_tokens(asked.tokens),
                "dot",
                "dot product",
            ),
            (
                "ReinPool, 8",
                "token vectors pooled to eight",
                late,
                eight,
                lambda asked: asked.tokens,
                "maxsim",
                "MaxSim",
            ),
            (FULL, "one vector a token", late, self.tokens, lambda asked: asked.tokens, "maxsim", "MaxSim"),
        ]
        found = [Representation("BM25", "the words by their stems", "", bm25.size, bm25.ask, bm25.search, "BM25")]
        for name, idea, backbone, documents, ask, similarity, unit in table:
            index = full if documents is self.tokens else ReadyIndex(documents, self.ranks, similarity)
            size = costs_of(documents, documents)["bytes_per_document"]
            found.append(Representation(name, idea, backbone, size, ask, index.search, unit))
        both = costs_of(lemur, lemur)["bytes_per_document"] + found[-1].bytes_per_document
        idea = f"one vector finds {RERANKED}, all vectors rank them"
        found.insert(-1, Representation("LEMUR, MaxSim", idea, late, both, self._ask_lemur, two_stages, "MaxSim"))
        return found

    def _held(self, name: str, make: Callable[[], Embeddings]) -> Embeddings:
        """Vectors that follow from a backbone's, in 16 bits."""

        def in_half() -> Embeddings:
            made = make()
            return replace(made, values=made.values.astype(np.float16))

        return kept(self.cache, name, self._keys[name], in_half)

    def _dense(self, layers: Embeddings) -> Tensor:
        """MiniLM's own vectors, of unit length, from its last layer."""
        last = torch.from_numpy(np.asarray(LayerSide(layers).last().values, np.float32))
        return torch.nn.functional.normalize(last, dim=-1)

    def _sparse(self, dense: Embeddings) -> Embeddings:
        side = SentenceSide.encode(self.minilm, dict(self.dataset.corpus), "document", "corpus", vectors=dense.values)
        return encode_sparse(lambda f: self.dense2sparse(**f, task="document").sentence_embedding, side)

    def _gaussian(self, dense: Embeddings) -> Embeddings:
        vectors = torch.from_numpy(np.asarray(dense.values, np.float32))
        return in_memory(self.gaussian(vectors, task="document").sentence_embedding.numpy())

    def _layered(self) -> Embeddings:
        parts = [
            self.multilayer(self._chosen(self.layers.values[start : start + 1024])).sentence_embedding
            for start in range(0, len(self.layers), 1024)
        ]
        return in_memory(torch.cat(parts).numpy())

    def _chosen(self, states: Any) -> Tensor:
        """The layers that MultiLayer reads, in its order, of ``(texts, layers + 1, dim)``."""
        return torch.as_tensor(np.asarray(states, np.float32))[:, self.multilayer.config.layers]

    def _pooled(self, k: int) -> Embeddings:
        made = pooled(self.tokens, by_head(self.reinpool, (k,)), desc=f"pooling to {k}")[k]
        return in_memory(made.values) if k == 1 else made

    def _lemur(self) -> Embeddings:
        return in_memory(self.lemur.encode_document_tokens(self.tokens.values, self.tokens.offsets).numpy())

    def _ask_dense(self, asked: Asked) -> Embeddings:
        return in_memory(asked.features["sentence_embedding"].numpy())

    def _ask_sparse(self, asked: Asked) -> Embeddings:
        weights = self.dense2sparse(**asked.features, task="query").sentence_embedding[0]
        terms = weights.nonzero()[:, 0]
        offsets = np.array([0, len(terms)])
        return Embeddings(
            "sparse", weights[terms].numpy(), offsets, terms.int().numpy(), len(weights), 0.0, self.cache
        )

    def _ask_gaussian(self, asked: Asked) -> Embeddings:
        output = self.gaussian(asked.features["sentence_embedding"], task="query")
        return in_memory(output.sentence_embedding.numpy())

    def _ask_layers(self, asked: Asked) -> Embeddings:
        return in_memory(self.multilayer(self._chosen(asked.layers), task="query").sentence_embedding.numpy())

    def _ask_lemur(self, asked: Asked) -> tuple[Embeddings, Embeddings]:
        tokens = asked.tokens
        return in_memory(self.lemur.encode_query_tokens(tokens.values, tokens.offsets).numpy()), tokens

    @torch.inference_mode()
    def ask(self, text: str, repeats: int = 0) -> Asked:
        """Encode a query by both backbones.

        Args:
            text: The query.
            repeats: Times that encoding is measured.

        Raises:
            InputError: The text is empty or too long.
        """
        text = checked(text, "query")

        def minilm() -> tuple[Tensor, dict[str, Tensor]]:
            layers = encode_chunk(self.minilm, [text], "query", "layers", 1).embeddings("layers")
            dense = self._dense(layers)
            side = SentenceSide.encode(self.minilm, {"query": text}, "query", "query", vectors=dense.numpy())
            return torch.from_numpy(layers.values), side.features(np.arange(1))

        def late() -> Embeddings:
            tokens = encode_chunk(self.late, [text], "query", "tokens", 1).embeddings("tokens")
            return replace(tokens, values=tokens.values.astype(np.float32))

        (layers, features), minilm_ms = timed(minilm, repeats)
        tokens, late_ms = timed(late, repeats)
        return Asked(text, features, layers, tokens, {"": 0.0, "MiniLM": minilm_ms, "late interaction": late_ms})

    @torch.inference_mode()
    def search(self, text: str, k: int = TOP) -> list[Found]:
        """Search with every representation.

        Raises:
            InputError: The text is empty or too long.
        """
        asked = self.ask(text, REPEATS)
        answers = []
        for representation in self.representations:
            queries, ask_ms = timed(partial(representation.ask, asked))
            (places, scores), search_ms = timed(partial(representation.search, queries, k))
            if representation.name == "Gaussian":  # what the index leaves out, since it is the same for all documents
                scores = scores + self._query_constant(asked)
            answers.append((representation, places[0], scores[0], ask_ms, search_ms))
        best = set(answers[-1][1].tolist())
        return [
            Found(
                representation,
                self._hits(asked.text, places, scores),
                asked.milliseconds[representation.backbone] + ask_ms,
                search_ms,
                len(best & set(places.tolist())) / len(best),
            )
            for representation, places, scores, ask_ms, search_ms in answers
        ]

    def _query_constant(self, asked: Asked) -> float:
        output = self.gaussian(asked.features["sentence_embedding"], task="query")
        return float(self.gaussian.query_constant(output)[0])

    def _hits(self, text: str, places: Sequence[int] | np.ndarray, scores: Sequence[float] | np.ndarray) -> list[Hit]:
        relevant = self.relevant.get(text, [])
        return [
            Hit(self.ids[place], self.texts[place], float(score), self.ids[place] in relevant)
            for place, score in zip(places, scores, strict=True)
        ]

    def _best(self, name: str, asked: Asked, k: int) -> np.ndarray:
        representation = next(r for r in self.representations if r.name == name)
        return representation.search(representation.ask(asked), k)[0][0]

    @torch.inference_mode()
    def words(self, text: str, task: str) -> Words:
        """Words that Dense2Sparse gives a text as a ``query`` or as a ``document``.

        Raises:
            InputError: The text is empty or too long.
        """
        text = checked(text, task)
        vectors = self.minilm.encode([text], convert_to_numpy=True, show_progress_bar=False)
        features = SentenceSide.encode(self.minilm, {"text": text}, task, "text", vectors=vectors).features(
            np.arange(1)
        )
        weights = self.dense2sparse(**features, task=task).sentence_embedding
        alone = self.dense2sparse(**features, task=task, expand=False).sentence_embedding
        own = dict(self.dense2sparse.decode(alone)[0])
        return Words([(word, weight, word in own) for word, weight in self.dense2sparse.decode(weights)[0]])

    @torch.inference_mode()
    def image_words(self, image: Image.Image) -> Words:
        """Words that Dense2Sparse gives an image."""
        weights = self.images.encode_document([image], convert_to_sparse_tensor=False, show_progress_bar=False)
        return Words([(word, weight, False) for word, weight in self.images.decode(weights)[0]])

    @torch.inference_mode()
    def kept_tokens(self, text: str, k: int) -> KeptTokens:
        """What ReinPool makes of a document's token vectors when it pools them to at most ``k``.

        Raises:
            InputError: The text is empty or too long.
        """
        tokens, vectors = token_pieces(self.late, checked(text, "document"))
        vectors = vectors.float()[None]
        mask = torch.ones(vectors.shape[:2], dtype=torch.bool)
        weights = self.reinpool.decide(self.reinpool.keep_logits(vectors, mask), mask)
        shares = self.reinpool.assign(vectors, weights, k)[0]  # (vectors, tokens)
        used = shares.sum(1) > 0
        dim = vectors.shape[-1]
        before = bytes_per_document("multi", dims=dim, vectors=float(len(tokens)))
        several = bytes_per_document("multi", dims=dim, vectors=float(used.sum()))
        after = several if k > 1 else bytes_per_document("dense", dims=dim)
        clusters = shares[used].argmax(0) + 1
        return KeptTokens(tokens, weights[0].tolist(), clusters.tolist(), before, after)

    @torch.inference_mode()
    def uncertainty(self, text: str, k: int = 8) -> Uncertainty:
        """A query's distribution beside those of the query cut short and misspelt, and of its best documents.

        Raises:
            InputError: The text is empty or too long.
        """
        asked = self.ask(text)
        queries = {"as it is": asked.text}
        for label, less in (("cut short", cut_short), ("misspelt", misspelt)):
            if len(changed := less(asked.text, random.Random(0))) and changed != asked.text:
                queries[label] = changed
        vectors = self.minilm.encode_query(list(queries.values()), convert_to_tensor=True, show_progress_bar=False)
        output = self.gaussian(vectors.float().cpu(), task="query")
        places = self._best("Gaussian", asked, k)
        documents = self.gaussian(self._dense(rows(self.layers, places)), task="document")
        divergences = kl(GaussianOutput(mean=output.mean[:1], variance=output.variance[:1]), documents)[0]
        hits = self._hits(asked.text, places, (-divergences).tolist())
        return Uncertainty(queries, output.uncertainty.tolist(), output, documents, hits)

    @torch.inference_mode()
    def layer_scores(self, text: str, k: int = 5) -> LayerScores:
        """What each layer adds to the scores of the best documents.

        A document is the sum of a linear map of each of its layers, brought to unit length. The length is one number
        for the whole document, so the score is a sum over layers.

        Raises:
            InputError: The text is empty or too long, or the model is not linear.
        """
        config = self.multilayer.config
        if config.pooling != "linear":
            raise InputError(
                f"layer_scores: pooling={config.pooling!r} does not add up. Use multilayer-minilm-frozen."
            )
        asked = self.ask(text)
        query = self.multilayer(self._chosen(asked.layers), task="query").sentence_embedding[0]
        places = self._best("MultiLayer", asked, k)
        states = self._chosen(self.layers.values[places])  # (documents, layers, dim)
        maps = self.multilayer.map.weight.unflatten(1, (len(config.layers), -1))  # (dim, layers, dim)
        parts = torch.einsum("olh,dlh->dlo", maps, states)  # (documents, layers, dim)
        length = parts.sum(1).norm(dim=-1, keepdim=True) if config.normalize else torch.ones(len(states), 1)
        shares = parts @ query / length
        scores = self.multilayer(states).sentence_embedding @ query
        depth = config.num_hidden_layers
        place_of = [layer % (depth + 1) for layer in config.layers]
        order = np.argsort(place_of)[::-1]  # the last layer weighs most
        names = ["embeddings" if place_of[i] == 0 else f"layer {place_of[i]}" for i in order]
        return LayerScores(names, self._hits(asked.text, places, scores.tolist()), shares.numpy()[:, order])


def timed(call: Callable[[], Any], repeats: int = REPEATS) -> tuple[Any, float]:
    """What a call gives, and the median of the milliseconds that further calls take; NaN without any."""
    result, taken = call(), []  # the first one at a size chooses and compiles its kernels
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        taken.append(1000 * (time.perf_counter() - started))
    return result, statistics.median(taken) if taken else math.nan


def few(dataset: RetrievalDataset, documents: int, needed: Sequence[str] = ()) -> RetrievalDataset:
    """A smaller data set: as many documents spread over the corpus, and the queries whose relevant ones are there.

    Args:
        dataset: The whole.
        documents: How many, at least those needed.
        needed: Ids of documents that stay.

    Raises:
        InputError: No query is left.
    """
    spread = list(dataset.corpus)[:: max(1, math.ceil(len(dataset.corpus) / documents))]
    chosen = set([*dict.fromkeys([*needed, *spread])][:documents])
    corpus = {identifier: text for identifier, text in dataset.corpus.items() if identifier in chosen}
    qrels = {query: judged for query, judged in dataset.qrels.items() if chosen >= set(judged)}
    queries = {query: dataset.queries[query] for query in qrels}
    if not queries:
        raise InputError(
            f"{dataset.name}: none of its queries has all its relevant documents among {len(corpus):,} of them, so "
            "there is nothing to ask for. Take more documents."
        )
    return replace(dataset, corpus=corpus, queries=queries, qrels=qrels)
