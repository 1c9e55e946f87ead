"""How routed token vectors are learned: what tokens of one word score, what the router alone scores, and its balance.

One loss, two ways to feed it. ``CitadelObjective`` trains a whole model with the trainers of sentence-transformers;
``CitadelHeadObjective`` fits a router to the cached token vectors of a frozen late-interaction model, by the MaxSim
that these have without it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sentence_transformers.util import get_rank
from torch import Tensor
from torch.nn import functional as F

from ...errors import InputError, refusals
from ...search.scoring import dot
from ...training.losses import (
    divergence,
    gather,
    gather_tokens,
    in_batch_labels,
    judged_relevant,
    maxsim_taught,
    product_dtype,
    refuse_single,
    unwrapped,
)
from ...training.objective import Objective, Rows
from ...training.pairs import HeadData
from ...training.sides import Features, pad_tokens
from .modeling_citadel import CitadelHead

if TYPE_CHECKING:
    from datasets import Dataset

SAMPLE = 128
"""Documents by which a whole model's router is set before training."""

TOKENS = 2**15
"""Token vectors of a side by which a frozen model's router is set before training."""

BLOCK = 2048
"""Token vectors that are scored against all words at a time there."""

_CHOICES = {"rows": ("occurring", "all")}


class Entries(NamedTuple):
    """Routed entries of some texts, one after another.

    Attributes:
        keys: ``(entries,)`` ids of words.
        vectors: ``(entries, dim)``, times their weights.
        texts: ``(entries,)`` number of the text that each belongs to.
    """

    keys: Tensor
    vectors: Tensor
    texts: Tensor


def flat(keys: Tensor, weights: Tensor, vectors: Tensor, mask: Tensor) -> Entries:
    """Entries of padded texts: keys, weights and mask ``(texts, tokens, keys)``, vectors ``(texts, tokens, dim)``."""
    texts, tokens, _ = mask.nonzero(as_tuple=True)
    return Entries(keys[mask], weights[mask][:, None] * vectors[texts, tokens], texts)


def routed_scores(queries: Entries, documents: Entries, shape: tuple[int, int], clamp: bool = True) -> Tensor:
    """Sum over a query's entries of the best inner product with an entry of the document that has the same key.

    Only pairs of one key are ever computed, and of these one number each is kept.

    Args:
        queries: Their entries.
        documents: Likewise.
        shape: Numbers of queries and of documents.
        clamp: An entry scores 0 at least. Where it meets none it does in any case.

    Returns:
        ``shape``.
    """
    order = documents.keys.argsort(stable=True)
    keys = documents.keys[order]
    first = torch.searchsorted(keys, queries.keys)
    counts = torch.searchsorted(keys, queries.keys, right=True) - first
    asked = torch.arange(len(counts), device=keys.device).repeat_interleave(counts)  # (pairs,)
    inside = torch.arange(len(asked), device=keys.device) - (counts.cumsum(0) - counts)[asked]
    held = order[first[asked] + inside]
    products = (queries.vectors[asked] * documents.vectors[held]).sum(-1)
    segments, place = (asked * shape[1] + documents.texts[held]).unique(return_inverse=True)
    best = products.new_zeros(len(segments)).scatter_reduce(0, place, products, "amax", include_self=False)
    best = best.clamp(min=0) if clamp else best
    pairs = queries.texts[segments // shape[1]] * shape[1] + segments % shape[1]
    return best.new_zeros(shape[0] * shape[1]).index_add(0, pairs, best).view(shape)


def everyones(outputs: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Outputs of columns of texts as one, of all processes: what scores need of them.

    Args:
        outputs: Of each column of this process, with as many texts each.

    Returns:
        ``keys, weights (texts, tokens, keys)``, ``vectors (texts, tokens, dim)``, and where there are some
        ``dense (texts, dim)`` and ``router_embedding (texts, words)``.
    """
    count, dtype = outputs[0]["weights"].shape[-1], outputs[0]["weights"].dtype
    packs = [
        torch.cat([found["weights"], found["vectors"].to(dtype), found["keys"].to(dtype)], -1) for found in outputs
    ]
    pack = torch.cat(pad_tokens(packs))  # (texts, tokens, 2 keys + dim)
    pack, _ = gather_tokens(pack, torch.ones_like(pack[..., 0]))
    weights, vectors, keys = pack.split([count, pack.shape[-1] - 2 * count, count], -1)
    together = {"weights": weights, "vectors": vectors, "keys": keys.round().long()}
    for name in ("dense", "router_embedding"):
        if outputs[0].get(name) is not None:
            part = torch.cat([found[name] for found in outputs])
            together[name] = gather(part.to(torch.promote_types(part.dtype, torch.float32)))
    return together


def scores_of(queries: Mapping[str, Tensor], documents: Mapping[str, Tensor], clamp: bool) -> Tensor:
    """Scores ``(queries, documents)`` of what :func:`everyones` gives: of entries, and of whole texts."""
    sides = [flat(s["keys"], s["weights"], s["vectors"], s["weights"] > 0) for s in (queries, documents)]
    scores = routed_scores(sides[0], sides[1], (len(queries["keys"]), len(documents["keys"])), clamp)
    return scores + queries["dense"] @ documents["dense"].T if "dense" in queries else scores


class _RoutedLoss(Objective):
    """What both objectives weigh alike (sections 3.2 to 3.4 of the paper).

    With ``f_k`` the tokens of a text whose first word is k, and ``p_k`` the sum over its tokens of the softmax over
    words, both a mean over texts, balance is ``sum over k of f_k p_k``, which is least where all words are as
    frequent. Sparsity is the sum of all weights at a text's tokens. Both are of queries and of documents, added.
    Padding counts in neither, as it does in the authors' code.

    Args:
        router_weight: Weight of the loss of the router alone, whose score is the inner product of weights of words.
        balance_weight: Weight of the balance, the paper's alpha.
        sparsity_weight: Weight of the sparsity, the paper's beta.
        rows: Words that can be keys in the end: those that occur, or all.
    """

    def __init__(
        self,
        model: Any,
        router_weight: float = 1.0,
        balance_weight: float = 1e-2,
        sparsity_weight: float = 1e-5,
        rows: str = "occurring",
    ):
        super().__init__()
        self.model = model
        weights = {
            "router_weight": router_weight,
            "balance_weight": balance_weight,
            "sparsity_weight": sparsity_weight,
        }
        for name, value in weights.items():
            if not 0 <= value < math.inf:
                raise InputError(f"--{name} {value}: below 0 it would teach the opposite. Use 0 or more.")
        if rows not in _CHOICES["rows"]:
            raise InputError(f"--rows {rows!r}: unknown. Use one of {', '.join(_CHOICES['rows'])}.")
        self.router_weight, self.balance_weight, self.sparsity_weight = weights.values()
        self.rows = rows

    @property
    def head(self) -> Any:
        """The CitadelHead that is trained."""
        raise NotImplementedError

    @property
    def learned(self) -> bool:
        """Whether there is a router."""
        return self.head.config.routing == "learned"

    def refuse_without_entries(self, queries: Mapping[str, Tensor], documents: Mapping[str, Tensor]) -> None:
        """InputError if no query or no document of a step has an entry left, alike in every process."""
        for name, side in (("query", queries), ("document", documents)):
            if not side["weights"].detach().any():
                raise InputError(
                    f"every {name} of a step has lost its entries, so nothing can be learned: --sparsity_weight "
                    f"{self.sparsity_weight:g} outweighs the pairs, or --learning_rate is too high. Lower one tenfold."
                )

    def balance(self, sides: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Tensor]:
        """Balance and sparsity of outputs of this process, each a side's columns; and the step's metrics."""
        parts: dict[str, Tensor] = {}
        self.metrics = {}
        if not self.learned:
            return parts
        balances, actives = [], []
        for name, columns in zip(("query", "document"), sides, strict=True):
            first, share, active = (
                gather(torch.stack([column[field] for column in columns]).mean(0)[None]).mean(0)
                for field in ("dispatched", "probability", "activation")
            )
            balances.append(first @ share)
            actives.append(active)
            entries = torch.cat([column["mask"].detach().flatten(1).sum(1).float() for column in columns])
            self.metrics[f"{name}_entries"] = entries.mean()
            self.metrics[f"{name}_largest_list"] = first.max() / first.sum().clamp(min=1e-9)
        if self.balance_weight:
            parts["balance"] = self.balance_weight * torch.stack(balances).sum()
        if self.sparsity_weight:
            parts["sparsity"] = self.sparsity_weight * torch.stack(actives).sum()
        return parts

    def get_config_dict(self) -> dict[str, Any]:
        """Arguments, for the model card."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters if name != "model"}

    @property
    def citation(self) -> str:
        """BibTeX, for the model card."""
        return (
            "@inproceedings{li2023citadel,\n"
            "    title={CITADEL: Conditional Token Interaction via Dynamic Lexical Routing for Efficient and "
            "Effective Multi-Vector Retrieval},\n"
            "    author={Minghan Li and Sheng-Chieh Lin and Barlas Oguz and Asish Ghoshal and Jimmy Lin and Yashar "
            "Mehdad and Wen-tau Yih and Xilun Chen},\n"
            "    booktitle={ACL},\n"
            "    year={2023},\n"
            "    url={https://arxiv.org/abs/2211.10411},\n"
            "}"
        )


class CitadelObjective(_RoutedLoss):
    """Train a whole model: pairs of query and document, and any number of hard negatives, with in-batch negatives.

    With s the score and Phi the weights of words of a text, each word's largest at a token::

        CE(s / tau) + router_weight * CE(Phi_q . Phi_d) + balance_weight * balance + sparsity_weight * sparsity

    Documents of all processes are negatives.

    Args:
        tau: Temperature of the score.
    """

    learning_rates = {r"\bhead\.(projection|sentence_map)\.": 10.0, r"\bhead\.(bonus|sentence_scale)$": 100.0}
    """What is new has further to go than the encoder, and single numbers furthest."""

    def __init__(
        self,
        model: Any,
        tau: float = 1.0,
        router_weight: float = 1.0,
        balance_weight: float = 1e-2,
        sparsity_weight: float = 1e-5,
        rows: str = "occurring",
    ):
        super().__init__(model, router_weight, balance_weight, sparsity_weight, rows)
        if not 0 < tau < math.inf:
            raise InputError(f"--tau {tau}: scores are divided by it. Use a positive number, e.g. 1.")
        self.tau = tau

    @property
    def head(self) -> Any:
        """That of the model, or of a pipeline's last module."""
        for module in unwrapped(self.model):
            inner: Any = getattr(module, "model", None)
            kind = str(getattr(getattr(inner, "config", None), "model_type", ""))
            if kind.startswith("polyrep_citadel"):  # the class may be the folder's own
                return getattr(inner, "head", inner)
        raise InputError(
            f"{type(self).__name__}: the model has no router. Use a CitadelModel, or put a CitadelPooling behind a "
            "Transformer."
        )

    def initialize(self, pairs: Mapping[str, Dataset]) -> None:
        """Find the words that occur, and set router and vectors by some documents."""
        model, head = unwrapped(self.model), self.head
        columns = [data[name] for data in pairs.values() for name in data.column_names if name != "label"]
        if self.rows == "occurring" and self.learned:
            occurring = torch.zeros(head.config.vocab_size, dtype=torch.bool)
            for column in columns:
                for start in range(0, len(column), 1024):
                    batch = model.preprocess(list(column[start : start + 1024]))
                    occurring[batch["input_ids"].unique().cpu()] = True
            head.learned.copy_(occurring.to(head.terms.device)[head.terms])
            if not head.learned.any():
                raise InputError("no training text holds a word of the vocabulary, so no word could be learned.")
        documents = [text for data in pairs.values() for text in data["positive"][:]]
        sample = documents[:: -(-len(documents) // SAMPLE)]
        training = model.training
        model.eval()

        def encode() -> None:
            for start in range(0, len(sample), 16):
                batch = model.preprocess(sample[start : start + 16], task="document")
                there = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                model(there, task="document")

        head.calibrate(encode)
        model.train(training)

    def complete(self, pairs: Mapping[str, Dataset]) -> None:
        """Leave out the words that did not occur."""
        head = self.head
        if self.learned and not head.learned.all():
            head.restrict(head.terms[head.learned])

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> dict[str, Tensor]:
        """Parts of the loss of a batch: columns of queries, their documents, and hard negatives."""
        query, *columns = (
            self.model({**features, "prune": False}, task="document" if number else "query")
            for number, features in enumerate(sentence_features)
        )
        device = query["weights"].device
        with torch.autocast(device.type, enabled=False):
            return self.losses(query, columns)

    def losses(self, query: Mapping[str, Any], columns: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Parts of the loss, from outputs of queries and of each column of documents."""
        queries, documents = everyones([query]), everyones(columns)
        refuse_single(documents["keys"])
        self.refuse_without_entries(queries, documents)
        batch, device = len(query["weights"]), query["weights"].device
        mine = slice(get_rank() * batch, (get_rank() + 1) * batch)
        queries = {name: values[mine] for name, values in queries.items()}
        own = in_batch_labels(batch, device, len(columns))
        parts = {"entries": F.cross_entropy(scores_of(queries, documents, self.head.config.clamp) / self.tau, own)}
        if self.router_weight and self.learned:
            scores = dot(queries["router_embedding"], documents["router_embedding"])
            parts["router"] = self.router_weight * F.cross_entropy(scores, own)
        return parts | self.balance([[query], columns])


class CitadelHeadObjective(_RoutedLoss):
    """Fit a router to the cached token vectors of a frozen late-interaction model: the model is the head alone.

    What it learns is to score the documents of a batch as MaxSim over all tokens does: the divergence of their
    softmaxes in both directions, of the entries' scores and of the router's own. Judgments may be learned from, too.

    Args:
        label_weight: Weight of the cross entropy of judged documents; with 0 no judgment has any influence.
        maxsim_weight: Weight of the divergence from MaxSim.
        score_scale: Factor of scores per query vector before the softmax of the divergence.
    """

    trains_on = "tokens"
    model: CitadelHead
    own_words = False
    """Whether batches have ``input_ids``, which say what words the vectors are of: no cache keeps them."""

    def __init__(
        self,
        model: CitadelHead,
        label_weight: float = 0.0,
        maxsim_weight: float = 1.0,
        score_scale: float = 30.0,
        router_weight: float = 1.0,
        balance_weight: float = 1e-2,
        sparsity_weight: float = 1e-5,
        rows: str = "occurring",
    ):
        super().__init__(model, router_weight, balance_weight, sparsity_weight, rows)
        for name, value in (("label_weight", label_weight), ("maxsim_weight", maxsim_weight)):
            if not 0 <= value < math.inf:
                raise InputError(f"--{name} {value}: below 0 it would teach the opposite. Use 0 or more.")
        if not label_weight and not maxsim_weight:
            raise InputError("--label_weight 0 --maxsim_weight 0: nothing would be learned. Leave one out.")
        if not 0 < score_scale < math.inf:
            raise InputError(f"--score_scale {score_scale}: a softmax needs a positive factor, e.g. 30.")
        if not self.learned and not self.own_words:
            raise InputError(
                "--routing static: cached token vectors do not tell which words they are of, so none would meet. "
                "Train a whole model, hub_configs/citadel-minilm."
            )
        self.label_weight, self.maxsim_weight, self.score_scale = label_weight, maxsim_weight, score_scale

    @property
    def needs_labels(self) -> bool:
        """Whether judgments are learned from."""
        return self.label_weight > 0

    @classmethod
    def learns_from_labels(cls, settings: Mapping[str, Any]) -> bool:
        """Only with ``label_weight``."""
        return settings.get("label_weight", 0) > 0

    @property
    def head(self) -> CitadelHead:
        """The model."""
        return self.model

    @torch.no_grad()
    def prepare(self, data: HeadData) -> Rows:
        """Move each word to the mean of the vectors that are nearest to it, and leave out those that nothing has."""
        head = self.head
        tokens = {side: _some_tokens(data, side).to(head.device) for side in ("query", "document")}
        rows = F.normalize(head.decoder.weight, dim=-1)
        nearest = _nearest(tokens["document"], rows, 1)[:, 0]
        sums = torch.zeros_like(rows).index_add(0, nearest, tokens["document"])
        lengths = head.decoder.weight.norm(dim=-1, keepdim=True)
        moved = torch.where(sums.norm(dim=-1, keepdim=True) > 0, F.normalize(sums, dim=-1), rows)
        head.decoder.weight.copy_(moved * lengths)
        if self.rows == "occurring":
            counts = {"query": head.config.query_keys, "document": head.config.document_keys}
            found = [_nearest(tokens[side], moved, count).flatten() for side, count in counts.items()]
            with refusals():
                head.restrict(head.terms[torch.cat(found).unique()])
        head.calibrate(lambda: head(tokens["document"][None], task="document"))
        return data

    def forward(self, features: list[Features], labels: Tensor) -> dict[str, Tensor]:
        """Parts of the loss of a batch of :class:`~polyrep.training.pairs.HeadData`: queries, and all documents."""
        query, document = (
            self.model(side["token_embeddings"], side["attention_mask"], task, side.get("input_ids"), prune=False)
            for side, task in zip(features, ("query", "document"), strict=True)
        )
        device = query["weights"].device
        dtype = product_dtype(device)
        with torch.autocast(device.type, enabled=False):
            queries, documents = everyones([query]), everyones([document])
            refuse_single(documents["keys"])
            self.refuse_without_entries(queries, documents)
            scores = scores_of(queries, documents, self.head.config.clamp)  # of all processes
            parts = {}
            if self.maxsim_weight:
                teacher, columns, lengths = maxsim_taught(features[0], features[1], dtype)
                teacher = teacher * self.score_scale
                said = scores[:, columns] * self.score_scale / lengths
                parts["maxsim"] = self.maxsim_weight * divergence(said, teacher)
                if self.router_weight and self.learned:
                    words = dot(queries["router_embedding"], documents["router_embedding"][columns])
                    said = words * self.score_scale / lengths
                    parts["router"] = self.router_weight * divergence(said, teacher)
            if self.label_weight:
                batch = len(query["weights"])
                own = labels + get_rank() * len(document["weights"])
                known = judged_relevant(features) & ~F.one_hot(own, scores.shape[1]).bool()
                mine = scores[get_rank() * batch : (get_rank() + 1) * batch].masked_fill(known, -math.inf)
                parts["labels"] = self.label_weight * F.cross_entropy(mine, own)
            return parts | self.balance([[query], [document]])


def _some_tokens(data: HeadData, side: str) -> Tensor:
    """Token vectors of some data, spread over all of it: ``(tokens, dim)``, some :data:`TOKENS` at most."""
    texts = [part.documents if side == "document" else part.queries for part in data.parts]
    step = -(-sum(int(part.embeddings.lengths.sum()) for part in texts) // TOKENS)
    found = []
    for features in data.batches(side, 256):
        found.append(features["token_embeddings"][features["attention_mask"].bool()][::step])
    return torch.cat(found)


def _nearest(tokens: Tensor, rows: Tensor, count: int) -> Tensor:
    """Words whose rows ``(words, dim)`` have the largest inner products with each token: ``(tokens, count)``."""
    return torch.cat([(part @ rows.T).topk(min(count, len(rows)), -1).indices for part in tokens.split(BLOCK)])
