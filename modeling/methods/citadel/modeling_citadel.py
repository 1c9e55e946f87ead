"""CITADEL: late interaction in which two tokens meet only where a router gives both the same word.

After Li et al., "CITADEL: Conditional Token Interaction via Dynamic Lexical Routing for Efficient and Effective
Multi-Vector Retrieval" (ACL 2023, arXiv 2211.10411). Late interaction compares each token of a query with every token
of a document. Here a router scores the words of the vocabulary at each token, and the best ones are the token's keys.
A key k of a token with the state h weighs ``w = log(1 + max(0, W_k . r + b_k))``, r being what the router reads of the
token, and the token's vector is ``v = P h``::

    s(q, d) = sum over keys k of query tokens of max(0, max over document tokens with k of (w_q v_q) . (w_d v_d))
              + a u_q . u_d

where u is the backbone's own vector of the text, if it has one. Of an inverted index that is one list for each word,
and a query reads as many lists as it has tokens. Where this code leaves the paper:

- Without a masked language model W starts as the word embeddings. The router then reads two layers before the last,
  where most states say which word they are, and a learned ``bonus`` at that word puts it first: training starts as
  COIL (Gao et al., NAACL 2021), whose tokens meet under equal words.
- Half the vocabulary would be positive at first. The bias starts where ``initial_active`` words of a token are left.
- u is the whole backbone's vector with its own pooling and scale, and not a new map of [CLS]; ``a`` is learned.
  Special tokens have no word and are left to it.
- The vectors start at the principal axes of the states.
- A token that meets none scores 0, which the formula of the paper leaves open, and with ``clamp`` none scores less.
- The frozen tier is ours: a router over the token vectors of any late-interaction model, which stays as it is. Its W
  starts as these vectors of the words themselves.
"""

# mypy: ignore-errors
# Shipped: it speaks to transformers and torch through attributes that these type as Tensor | Module.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, initialization
from transformers.utils import ModelOutput, cached_file

from .polyrep_fields import LAYERS, WIDTH, WORDS, check_weight, checked, fields_of, keep, unless_given
from .polyrep_folder import BESIDE_A_HEAD, WholeWeights, read_settings, whole_encoder
from .polyrep_room import (
    HeadModule,
    Module,
    MultiVectorEncoder,
    SentenceTransformer,
    keep_states,
    pool_tokens,
    pooling_of,
    warn_of_no_task,
)
from .polyrep_trunk import Trunk, TrunkTransformer, encoder_width, keep_trunk, read_inputs, stock_parts, trunk_parts
from .polyrep_words import check_words, language_head, words_of

KEYS = (1, 256)
"""Fewest and most keys of a token."""

WORD_BLOCK = 4096
"""Words that are scored at a time: all of them at all tokens of a batch would be a gigabyte."""

TOKEN_BLOCK = 256
"""Tokens whose scores of all words are in memory at a time in training.

Of more the arrays are so large that memory is asked for anew at each step of the arithmetic, which takes longer.
"""

SAMPLE = 512
"""Tokens by which bias and bonus are set."""

OWN_FIRST = 0.98
"""Share of the tokens whose own word is to be the first before training."""

CONTEXT = 24
"""Words of a made text, from which a late-interaction model's vectors of words are taken."""

FAMILY = "SparseEncoder"
"""Class of sentence-transformers that opens a folder: it reads the router's weights."""

_REFUSAL = (
    "{owner}: stands in a {family} that lets every two token vectors meet or pools them, whereas these meet only "
    f"where their keys are equal. Open it as {FAMILY}, which reads the router's weights of words; AutoModel's "
    "encode_routed gives the vectors with their keys."
)

_CHOICES = {
    "routing": ("learned", "static"),
    "router_reads": ("states", "vectors"),
    "pooling": ("mean", "cls", "lasttoken"),
}


class CitadelHeadConfig(PretrainedConfig):
    """How tokens get keys, weights and vectors.

    Args:
        router_layer (int): Hidden state that the router reads: 0 is the embeddings, 12 or -1 the last of twelve
            layers. Default: -1 with ``mlm_head``, else -3. Of a late-interaction model it reads the token vectors.
        token_dim (int): Width of the vectors. 0: none, weights alone, which is a sparse model. None: that of what they
            are made of.
        cls_dim (int): Width of the vector of the whole text whose inner product is added. None: the backbone's own,
            of which a late-interaction model has none; 0: none; else a linear map of it.
        query_keys (int): Keys of a query's token.
        document_keys (int): Keys of a document's token.
        threshold (float): Weight that an entry of a document must exceed; training keeps all.
        clamp (bool): A query's token scores 0 at least, if all it meets are unlike it.
        routing (str): learned: by the router. static: a token's key is its own word, with weight 1, as in COIL.
        own_bonus (bool): A learned number is added to what the router gives a token's own word. Default: yes, but for
            a late-interaction model, whose vectors do not tell it.
        initial_active (int): Words that a token has before training, on the mean.
        mlm_head (bool): Score words as the backbone's masked language model does, by its transform and output layer.
            Default: where it has one; else by its word embeddings.
        pooling (str): What the backbone's own vector is: mean over the tokens of the last layer, cls or lasttoken.
            Default: the backbone's own where there is one, else mean.
        normalize (bool): Bring it to unit length. Default: likewise, else not.
        router_reads (str): states: of an encoder. vectors: those of a late-interaction model.
        dim (int): Width of what the vectors are made of.
        num_hidden_layers (int): The encoder's layers; known once there is an encoder.
        norm_eps (float): Of the norm in a language model's transform.
        vocab_size (int): Entries of the vocabulary.
        words (int): Entries that can be keys; None for the whole vocabulary.
        special_token_ids (list): Tokens that are no words.
    """

    model_type = "polyrep_citadel_head"
    # What follows from the backbone and the corpus, and is nobody's choice.
    derived = (
        "router_reads",
        "dim",
        "num_hidden_layers",
        "norm_eps",
        "vocab_size",
        "words",
        "special_token_ids",
    )

    @checked(
        **_CHOICES,
        router_layer=(-LAYERS[1] - 1, LAYERS[1]),
        token_dim=(0, WIDTH[1]),
        cls_dim=(0, WIDTH[1]),
        query_keys=KEYS,
        document_keys=KEYS,
        threshold=(0, 1e6),
        initial_active=WORDS,
        dim=WIDTH,
        num_hidden_layers=LAYERS,
        norm_eps=(1e-15, 1),
        vocab_size=WORDS,
        words=WORDS,
        special_token_ids=(0, WORDS[1]),
    )
    def __init__(
        self,
        router_layer: int | None = None,
        token_dim: int | None = 32,
        cls_dim: int | None = None,
        query_keys: int = 1,
        document_keys: int = 5,
        threshold: float = 0.0,
        clamp: bool = True,
        routing: str = "learned",
        own_bonus: bool | None = None,
        initial_active: int = 2,
        mlm_head: bool | None = None,
        pooling: str | None = None,
        normalize: bool | None = None,
        router_reads: str = "states",
        dim: int = 384,
        num_hidden_layers: int | None = None,
        norm_eps: float = 1e-12,
        vocab_size: int = 30522,
        words: int | None = None,
        special_token_ids: list[int] | None = None,
        **kwargs,
    ):
        late = router_reads == "vectors"
        pooling, normalize, mlm_head = pooling or "mean", bool(normalize), bool(mlm_head)
        own_bonus = not late if own_bonus is None else own_bonus
        router_layer = (-1 if mlm_head or late else -3) if router_layer is None else router_layer
        token_dim = None if token_dim is not None and token_dim >= dim else token_dim
        cls_dim = 0 if cls_dim is None and late else cls_dim
        words, special_token_ids = words or vocab_size, list(special_token_ids or [])
        self._check(keep(self, locals()))
        super().__init__(**kwargs)
        if not late:
            self.fit(num_hidden_layers, dim, known=False)

    def _check(self, name: str) -> None:
        check_weight(name, words=self.words, dim=self.dim)
        check_weight(name, token_dim=self.token_dim or self.dim, dim=self.dim)
        check_weight(name, cls_dim=self.cls_dim or self.dim, dim=self.dim)
        if self.words > self.vocab_size:
            raise ValueError(
                f"{name}: words={self.words} of a vocabulary of {self.vocab_size:,} words cannot be keys. Use 1 to "
                f"{self.vocab_size:,}."
            )
        for field, only in (("router_layer", -1), ("mlm_head", False), ("own_bonus", False)):
            if self.router_reads == "vectors" and (value := getattr(self, field)) != only:
                raise ValueError(
                    f"{name}: {field}={value}, but of a late-interaction model the router reads the token vectors and "
                    "nothing else. Leave it out."
                )

    def fit(self, num_hidden_layers: int | None, dim: int, vocab_size: int | None = None, known: bool = True) -> None:
        """Take the depth of an encoder, or ValueError if it has no such layer, or another shape or vocabulary."""
        depth, name = num_hidden_layers, type(self).__name__
        if depth is not None and not -depth - 1 <= self.router_layer <= depth:
            raise ValueError(
                f"{name}: router_layer={self.router_layer}, but the encoder has {depth} layers, so its hidden states "
                f"are 0 (embeddings) to {depth} (last), or {-depth - 1} to -1. Use one of these."
            )
        if dim != self.dim or known and self.num_hidden_layers not in (None, depth):
            raise ValueError(
                f"{name}: made for num_hidden_layers={self.num_hidden_layers} and dim={self.dim}, but the encoder has "
                f"{depth} layers of width {dim}. Use the backbone it was trained on "
                f"({self.base_model_id or 'not recorded'}), or train it anew."
            )
        if vocab_size not in (None, self.vocab_size):
            raise ValueError(
                f"{name}: vocab_size={self.vocab_size}, but the encoder knows {vocab_size:,} tokens, so keys would be "
                f"taken for other words. Use the backbone it was made on ({self.base_model_id or 'not recorded'})."
            )
        self.num_hidden_layers = depth

    @property
    def similarity_fn_name(self) -> str:
        """How what the folder's family reads is scored."""
        return "dot"

    @property
    def width(self) -> int:
        """Of what the folder's family reads."""
        return self.vocab_size

    @property
    def entry_dim(self) -> int:
        """Width of an entry's vector; 1 where it is the weight alone."""
        return self.dim if self.token_dim is None else self.token_dim or 1

    @property
    def sentence_dim(self) -> int:
        """Width of the vector of the whole text; 0 for none."""
        return self.dim if self.cls_dim is None else self.cls_dim

    @property
    def projects(self) -> bool:
        """Whether the vectors are a linear map of the token states."""
        return self.token_dim != 0 and (self.token_dim is not None or self.router_reads == "states")

    @property
    def reads_last(self) -> bool:
        """Whether the router reads what the encoder returns anyway, or nothing."""
        return self.routing == "static" or self.router_layer in (-1, self.num_hidden_layers)


@dataclass
class CitadelEntries(ModelOutput):
    """Texts as an index of routed entries takes them.

    Attributes:
        keys: ``(batch, tokens, keys)`` ids of words.
        weights: ``(batch, tokens, keys)``, zero where there is no entry.
        vectors: ``(batch, tokens, entry_dim)`` of each token, which its weights multiply; with ``token_dim=0`` ones.
        mask: ``(batch, tokens, keys)``, True for entries that are there.
        sentence_embedding: ``(batch, sentence_dim)`` of the whole text, whose inner product is added; None without.
    """

    keys: Tensor | None = None
    weights: Tensor | None = None
    vectors: Tensor | None = None
    mask: Tensor | None = None
    sentence_embedding: Tensor | None = None


@dataclass
class CitadelOutput(ModelOutput):
    """What head and model return.

    Attributes:
        sentence_embedding: What the folder's family reads: ``router_embedding``.
        router_embedding: ``(batch, vocab_size)`` weight of each word, the largest at a token, zero almost everywhere.
            With ``token_dim=0`` a query's are sums over its tokens, so that the inner product is the score.
        keys: See :class:`CitadelEntries`.
        weights: Likewise.
        vectors: Likewise.
        mask: Likewise.
        dense: ``(batch, sentence_dim)``, the ``sentence_embedding`` there.
        dispatched: With ``prune=False``: ``(words,)`` tokens whose first word each is, of a text on the mean.
        probability: Likewise: ``(words,)`` sum over a text's tokens of the softmax over words.
        activation: Likewise: sum of the weights of all words at a text's tokens.
    """

    sentence_embedding: Tensor | None = None
    router_embedding: Tensor | None = None
    keys: Tensor | None = None
    weights: Tensor | None = None
    vectors: Tensor | None = None
    mask: Tensor | None = None
    dense: Tensor | None = None
    dispatched: Tensor | None = None
    probability: Tensor | None = None
    activation: Tensor | None = None

    @property
    def last_hidden_state(self):
        """Token vectors for whoever compares or pools all of them, as families of another kind would: ValueError."""
        raise ValueError(_REFUSAL.format(owner=type(self).__name__, family="model"))


class CitadelHead(WholeWeights, PreTrainedModel):
    """The head: a router, which gives tokens their keys and weights, and maps of what the encoder knows of them."""

    config_class = CitadelHeadConfig
    _keys_to_ignore_on_load_unexpected = BESIDE_A_HEAD
    _supports_sdpa = _supports_flash_attn = True  # it attends to nothing, whatever the encoder is asked for

    def __init__(self, config):
        super().__init__(config)
        dim = config.dim
        if config.routing == "learned":
            if config.mlm_head:
                self.transform, self.transform_norm = nn.Linear(dim, dim), nn.LayerNorm(dim, config.norm_eps)
            self.decoder = nn.Linear(dim, config.words)
            self.register_buffer("terms", torch.arange(config.words))  # vocabulary id of each output
            self.register_buffer("learned", torch.ones(config.words, dtype=torch.bool))  # those that training scores
            if config.own_bonus:
                self.bonus = nn.Parameter(torch.empty(()))
        if config.projects:
            self.projection = nn.Linear(dim, config.entry_dim, bias=False)
        if config.cls_dim:
            self.sentence_map = nn.Linear(dim, config.cls_dim, bias=False)
        if config.sentence_dim:
            self.sentence_scale = nn.Parameter(torch.empty(()))
        self._seen = None
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        for name in ("projection", "sentence_map"):
            if module is getattr(self, name, None):
                initialization.orthogonal_(module.weight)
        if module is self:
            if hasattr(self, "terms"):
                initialization.copy_(self.terms, torch.arange(self.config.words))
                initialization.copy_(self.learned, torch.ones(self.config.words, dtype=torch.bool))
            if hasattr(self, "bonus"):
                initialization.zeros_(self.bonus)
            if hasattr(self, "sentence_scale"):  # by which such models multiply cosines where they are trained
                initialization.constant_(self.sentence_scale, 20.0 if self.config.normalize else 1.0)

    @classmethod
    def from_backbone(cls, model, **config) -> CitadelHead:
        """An untrained head for an opened backbone.

        Args:
            model: A SentenceTransformer of a transformer, one pooling and perhaps a normalisation; or a
                MultiVectorEncoder, whose token vectors the router then reads.
            config: Fields of CitadelHeadConfig; what can follow from the backbone does so by default.

        Raises:
            ValueError: It has other modules, or its words are of another width than its states.
        """
        if type(model) is MultiVectorEncoder:
            return cls._of_vectors(model, **config)
        pooling, normalize = CitadelModel.pooled_by(model)
        encoder, spoken = model[0].model, None
        _shape(encoder, cls.__name__)
        if config.get("routing") != "static":
            check_words(encoder, cls.__name__)
            spoken = language_head(encoder, config.get("mlm_head"), cls.__name__)
        given = unless_given(config, pooling=pooling, normalize=normalize, mlm_head=spoken is not None)
        head = cls(CitadelHeadConfig(**given | _sizes(encoder.config) | words_of(model)))
        head._start(encoder, spoken)
        return head

    @classmethod
    @torch.no_grad()
    def _of_vectors(cls, model: MultiVectorEncoder, **config) -> CitadelHead:
        """A head whose router reads a late-interaction model's token vectors, and starts as those of the words."""
        config |= {"dim": model.get_embedding_dimension(), "router_reads": "vectors"}
        head = cls(CitadelHeadConfig(**config | words_of(model)))
        rows = vectors_of_words(model, head._words())
        if head.config.routing == "learned":
            head.terms.copy_(head._words())
            head.decoder.weight.copy_(rows)
            head.decoder.bias.zero_()
        head.calibrate(lambda: head(rows[None], None, "document", head._words()[None]))
        return head

    def _words(self) -> Tensor:
        """Ids of all tokens that are words."""
        special = set(self.config.special_token_ids)
        return torch.tensor([i for i in range(self.config.vocab_size) if i not in special])

    @torch.no_grad()
    def _start(self, encoder: PreTrainedModel, spoken: tuple | None) -> None:
        """Take the weights that an encoder has for the head, and set the others by texts of random words."""
        words = self._words()
        if self.config.routing == "learned":
            self.terms.copy_(words)
            if spoken is None:
                self.decoder.weight.copy_(encoder.get_input_embeddings().weight[words])
                self.decoder.bias.zero_()
            else:
                transform, norm, output = spoken
                for ours, theirs in ((self.transform, transform), (self.transform_norm, norm)):
                    ours.weight.copy_(theirs.weight)
                    ours.bias.copy_(0 if theirs.bias is None else theirs.bias)
                self.decoder.weight.copy_(output.weight[words])
                self.decoder.bias.copy_(0 if output.bias is None else output.bias[words])
        ids = words[torch.randint(len(words), (16, CONTEXT), generator=torch.Generator().manual_seed(0))]
        training = encoder.training
        keep_states(encoder)
        output = encoder.eval()(
            input_ids=ids.to(encoder.device), attention_mask=torch.ones_like(ids), output_hidden_states=True
        )
        keep_states(encoder)
        encoder.train(training)
        last = output.last_hidden_state.float()
        states = last if self.config.reads_last else output.hidden_states[self.config.router_layer].float()
        pooled = pool_tokens(last, torch.ones_like(ids), self.config.pooling)
        self.calibrate(lambda: self(last, torch.ones_like(ids), "document", ids, states, pooled))

    @torch.no_grad()
    def calibrate(self, encode: Callable[[], None]) -> None:
        """Set what follows from some texts before training: bonus, bias, and the maps to the principal axes.

        The bonus puts a token's own word first, all but ever. The bias of all words moves alike, so that tokens have
        ``initial_active`` words, on the mean. An encoder's states are scaled so that an entry has length 1; a
        late-interaction model's vectors stay as they are, and there the router is scaled so that a first weight is 1.

        Args:
            encode: Has the head read these texts, in one call or several.
        """
        config, self._seen = self.config, []
        training = self.training
        self.train()  # which scores what is learned alone
        try:
            encode()
            read, own, vectors, pooled = (
                torch.cat(parts) if parts[0] is not None else None for parts in zip(*self._seen, strict=True)
            )
            self._seen = None
            if not len(read):
                return
            count = min(SAMPLE, len(read))
            chosen = torch.arange(count, device=read.device) * len(read) // count
            first = self._set_router(read[chosen], own[chosen]) if config.routing == "learned" else 1.0
        finally:
            self._seen = None
            self.train(training)
        if config.projects:
            late = config.router_reads == "vectors"
            self.projection.weight.copy_(principal_axes(vectors, config.entry_dim, centred=not late))
            if not late:
                lengths = self.projection(vectors.to(self.projection.weight)).norm(dim=-1)
                self.projection.weight.div_((lengths.mean() * first).clamp(min=1e-6))
        if config.cls_dim and pooled is not None:
            self.sentence_map.weight.copy_(principal_axes(pooled, config.cls_dim))

    def _set_router(self, read: Tensor, own: Tensor) -> float:
        """Set bonus and bias by what the router reads of some tokens, and return their mean first weight."""
        weight, bias, _ = self._rows()
        scores = F.linear(read.to(weight), weight, bias).float()  # (tokens, words)
        known = own >= 0
        if hasattr(self, "bonus"):
            if known.any():
                gap = scores[known].amax(1) - scores[known, own[known]]
                self.bonus.copy_(torch.quantile(gap, OWN_FIRST).clamp(min=0))
            scores[known, own[known]] += self.bonus.float()
        count = self.config.initial_active * len(scores)
        threshold = scores.new_zeros(())
        if count < scores.numel():
            threshold = scores.flatten().topk(count + 1).values[-2:].mean()  # between the two, whatever rounding does
        self.decoder.bias.sub_(threshold.to(self.decoder.bias))
        top = (scores.amax(1) - threshold).clamp(min=0)
        if self.config.router_reads == "vectors" and top.mean() > 0:
            factor = (math.e - 1) / top.mean()  # as the logarithm of 1 more is 1 there
            self.decoder.weight.mul_(factor)
            self.decoder.bias.mul_(factor)
            top = top * factor
        return float(torch.log1p(top).mean())

    @torch.no_grad()
    def restrict(self, terms: Tensor) -> None:
        """Keep only some words as keys, ``(words,)`` vocabulary ids out of those present, in place.

        Raises:
            ValueError: None of them is present.
        """
        kept = torch.isin(self.terms, terms.to(self.terms.device))
        if not kept.any():
            raise ValueError("CitadelHead: none of the words is one of the head's, so tokens have none. Name others.")
        decoder = nn.Linear(self.config.dim, int(kept.sum())).to(self.decoder.weight)
        decoder.weight.copy_(self.decoder.weight[kept])
        decoder.bias.copy_(self.decoder.bias[kept])
        self.decoder, self.terms, self.learned = decoder, self.terms[kept], self.learned[kept]
        self.config.words = len(self.terms)

    def forward(
        self,
        token_embeddings: Tensor,
        attention_mask: Tensor | None = None,
        task: str | None = None,
        input_ids: Tensor | None = None,
        router_states: Tensor | None = None,
        pooled: Tensor | None = None,
        prune: bool = True,
        **kwargs,
    ) -> CitadelOutput:
        """Keys, weights and vectors of tokens.

        Args:
            token_embeddings: ``(batch, tokens, dim)`` of the last layer, or a late-interaction model's token vectors.
            attention_mask: ``(batch, tokens)``, True where a token counts; default: all.
            task: "query", else a document.
            input_ids: ``(batch, tokens)``, which say what a token's own word is. Not needed for vectors.
            router_states: ``(batch, tokens, dim)`` what the router reads; default: ``token_embeddings``.
            pooled: ``(batch, dim)`` the backbone's vector of each text before ``normalize``; default: the mean.
            prune: Whether ``threshold`` counts, and ``router_embedding`` is of kept keys. Else, as training wants it,
                of all words, and there is what balances them.
            kwargs: Ignored.

        Raises:
            ValueError: Another width than the config's, no ids where they are needed, or a value that is not finite.
        """
        config = self.config
        if config.query_keys != config.document_keys or config.threshold or config.sentence_dim:
            warn_of_no_task(self, task)
        mask = torch.ones_like(token_embeddings[..., 0]) if attention_mask is None else attention_mask
        mask = mask.bool()
        self._check(token_embeddings, mask, input_ids)
        dtype = next((parameter.dtype for parameter in self.parameters()), token_embeddings.dtype)
        token_embeddings = token_embeddings.to(dtype)  # a backbone may be in half precision
        read = token_embeddings if router_states is None else router_states.to(dtype)
        pooled = None if pooled is None else pooled.to(dtype)
        counted, own = self._own(input_ids, mask)
        dense, whole = self._dense(token_embeddings, mask, pooled, task)
        if self._seen is not None:  # see calibrate
            said = torch.full_like(mask, -1, dtype=torch.int64) if own is None else own
            seen = self._read(read)[counted].float(), said[counted], token_embeddings[counted].float(), whole
            self._seen.append(seen)
            return CitadelOutput()
        vectors = self._vectors(token_embeddings)
        count = config.query_keys if task == "query" else config.document_keys
        if config.routing == "static":
            keys, weights = input_ids[..., None], counted[..., None].to(vectors.dtype)
            found = {}
        elif prune:
            scores, rows = self._best(self._read(read), own, count)
            keys, weights, found = self._rows()[2][rows], _weights(scores), {}
        else:
            scores, rows, most, found = self._all(self._read(read), own, counted, count)
            terms = self._rows()[2]
            keys, weights = terms[rows], _weights(scores)
            found["router_embedding"] = self._spread(_weights(most), terms)
        least = config.threshold if prune and task != "query" else 0
        there = counted[..., None] & (weights > least)
        weights = torch.where(there, weights, 0)
        if self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            # All weights are in every pass, by nothing: processes that share gradients wait for those of each.
            weights = weights + 0 * sum(parameter.sum() for parameter in self.parameters())
        if "router_embedding" not in found:
            found["router_embedding"] = self._router_embedding(keys, weights, task)
        return CitadelOutput(
            sentence_embedding=found["router_embedding"],
            keys=keys,
            weights=weights,
            vectors=vectors,
            mask=there,
            dense=dense,
            **found,
        )

    def _own(self, input_ids: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens that get keys ``(batch, tokens)``, and the output that is each token's own word, -1 without one.

        Of a late-interaction model special tokens have vectors too, which are routed as all others.
        """
        config = self.config
        counted, own = mask, None
        if config.routing == "static" or config.router_reads == "states":
            known = torch.ones(config.vocab_size, dtype=torch.bool)
            known[[i for i in config.special_token_ids if i < config.vocab_size]] = False
            counted = mask & known.to(input_ids.device)[input_ids]
        if config.routing == "learned" and config.router_reads == "states":
            terms = self._rows()[2]
            place = torch.full((config.vocab_size,), -1, device=terms.device)
            own = place.index_copy(0, terms, torch.arange(terms.shape[0], device=terms.device))[input_ids]
        return counted, own

    def _dense(
        self, tokens: Tensor, mask: Tensor, pooled: Tensor | None, task: str | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The vector of each text, a query's as long as it is to count, and what it was mapped from."""
        config = self.config
        if not config.sentence_dim:
            return None, None
        pooled = pool_tokens(tokens, mask, config.pooling) if pooled is None else pooled
        dense = self.sentence_map(pooled) if config.cls_dim else pooled
        dense = F.normalize(dense, dim=-1) if config.normalize else dense
        return dense * self.sentence_scale if task == "query" else dense, pooled

    def _vectors(self, tokens: Tensor) -> Tensor:
        """Vectors of tokens ``(batch, tokens, entry_dim)``; ones where weights are all there is."""
        if self.config.token_dim == 0:
            return torch.ones_like(tokens[..., :1])
        return self.projection(tokens) if self.config.projects else tokens

    def _rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, biases and vocabulary ids of the words that are scored: in training those that are learned."""
        weight, bias, terms = self.decoder.weight, self.decoder.bias, self.terms
        if self.training and not torch.compiler.is_compiling() and not self.learned.all():
            return weight[self.learned], bias[self.learned], terms[self.learned]
        return weight, bias, terms

    def _read(self, states: Tensor) -> Tensor:
        """States as the output layer takes them."""
        if hasattr(self, "transform"):
            return self.transform_norm(F.gelu(self.transform(states)))
        return states

    def _scores(self, states: Tensor, weight: Tensor, bias: Tensor, own: Tensor | None) -> Tensor:
        """Scores of words at tokens ``(batch, tokens, words)``; ``own`` is the place of a token's own among them."""
        scores = F.linear(states, weight, bias)
        if own is None or not hasattr(self, "bonus"):
            return scores
        inside = (own >= 0) & (own < weight.shape[0])
        added = torch.where(inside, self.bonus, 0).to(scores.dtype)
        return scores.scatter_add(-1, own.clamp(0, weight.shape[0] - 1)[..., None], added[..., None])

    def _best(self, states: Tensor, own: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
        """The largest scores at each token and their words, both ``(batch, tokens, count)``, a block at a time."""
        weight, bias, _ = self._rows()
        values = rows = None
        for start in range(0, weight.shape[0], WORD_BLOCK):
            block = slice(start, start + WORD_BLOCK)
            scores = self._scores(states, weight[block], bias[block], None if own is None else own - start)
            value, row = scores.topk(min(count, scores.shape[-1]), -1)
            row = row + start
            if values is not None:
                value, row = torch.cat([values, value], -1), torch.cat([rows, row], -1)
                value, place = value.topk(min(count, value.shape[-1]), -1)
                row = row.gather(-1, place)
            values, rows = value, row
        return values, rows

    def _all(
        self, states: Tensor, own: Tensor | None, counted: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """The same, the largest score of each word in a text ``(batch, words)``, and what balances words.

        Scores of all words are in memory for some texts at a time, and once more when gradients are wanted.
        """
        weight, bias, _ = self._rows()

        def of_block(states: Tensor, own: Tensor, counted: Tensor) -> tuple[Tensor, ...]:
            scores = self._scores(states, weight, bias, own if hasattr(self, "bonus") else None)
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # (texts, tokens, words)
            values, rows = scores.topk(min(count, scores.shape[-1]), -1)
            there = counted[..., None]
            most = scores.masked_fill(~there, -math.inf).amax(1)
            shares = (scores.softmax(-1) * there).sum((0, 1))
            active = (_weights(scores) * there).sum()
            return values, rows, most, shares, active

        own = torch.zeros_like(counted, dtype=torch.int64) if own is None else own
        texts = max(1, TOKEN_BLOCK // max(1, states.shape[1]))
        parts = [
            checkpoint(of_block, *part, use_reentrant=False) if torch.is_grad_enabled() else of_block(*part)
            for part in zip(states.split(texts), own.split(texts), counted.split(texts), strict=True)
        ]
        values, rows, most, shares, active = zip(*parts, strict=True)
        rows, batch = torch.cat(rows), max(1, len(states))
        first = torch.bincount(rows[..., 0][counted], minlength=weight.shape[0])
        balance = {
            "dispatched": first.to(shares[0].dtype) / batch,
            "probability": torch.stack(shares).sum(0) / batch,
            "activation": torch.stack(active).sum() / batch,
        }
        return torch.cat(values), rows, torch.cat(most), balance

    def _spread(self, weights: Tensor, terms: Tensor) -> Tensor:
        """Weights of scored words in the places that these have in the vocabulary: ``(batch, vocab_size)``."""
        return weights.new_zeros(weights.shape[0], self.config.vocab_size).index_copy(1, terms, weights)

    def _router_embedding(self, keys: Tensor, weights: Tensor, task: str | None) -> Tensor:
        """Weight of each word in a text, of kept keys: ``(batch, vocab_size)``."""
        zeros = weights.new_zeros(weights.shape[0], self.config.vocab_size)
        keys, weights = keys.flatten(1), weights.flatten(1)
        if task == "query" and self.config.token_dim == 0:  # each token of a query has its own best
            return zeros.scatter_add(1, keys, weights)
        return zeros.scatter_reduce(1, keys, weights, "amax")

    def _check(self, tokens: Tensor, mask: Tensor, input_ids: Tensor | None) -> None:
        config, name = self.config, type(self).__name__
        if tokens.ndim != 3 or tokens.shape[-1] != config.dim:
            raise ValueError(
                f"{name}: token vectors of shape {tuple(tokens.shape)}, but the head was made for (texts, tokens, "
                f"{config.dim}). Use the backbone it was trained on ({config.base_model_id or 'not recorded'}), or "
                "train a head for this one."
            )
        if input_ids is None and (config.routing == "static" or config.router_reads == "states"):
            raise ValueError(
                f"{name}: no input_ids, and with routing={config.routing!r}, router_reads={config.router_reads!r} a "
                "token has its own word by its id. Put it behind a transformer that reads texts."
            )
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # a graph cannot look at the numbers
            return
        bad = (mask & ~torch.isfinite(tokens).all(-1)).any(1)
        if bool(bad.any()):
            raise ValueError(
                f"{name}: text {int(bad.int().argmax())} of the batch has token vectors that are not finite, so no "
                "score with it would be. Encode in float32 or bfloat16; if it stays, the backbone is broken."
            )


def _weights(scores: Tensor) -> Tensor:
    """Weights of words from their scores, at least in float32."""
    return torch.log1p(F.relu(scores.to(torch.promote_types(scores.dtype, torch.float32))))


def principal_axes(vectors: Tensor, dim: int, centred: bool = False) -> Tensor:
    """The directions ``(dim, width)`` that keep most of some vectors ``(vectors, width)``, or of how they differ."""
    unit = (vectors - vectors.mean(0) if centred else vectors).double()
    axes = torch.linalg.eigh(unit.T @ unit).eigenvectors  # ascending
    return axes.flip(1)[:, :dim].T.to(vectors.dtype)


@torch.no_grad()
def vectors_of_words(model: MultiVectorEncoder, words: Tensor) -> Tensor:
    """A late-interaction model's vectors of some words, each in a text of others drawn at random.

    Args:
        model: The model.
        words: ``(words,)`` ids.

    Returns:
        ``(words, dim)`` of unit length.
    """
    limit = model.max_seq_length
    length = min(CONTEXT, limit if isinstance(limit, int) and limit > 0 else CONTEXT)
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0))
    padded = F.pad(order, (0, -len(order) % length), value=int(order[0])).view(-1, length)
    training, found = model.training, []
    model.eval()
    for part in padded.split(32):
        ids = words[part].to(model.device)
        features = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found.append(model(features, task="document")["token_embeddings"].float())
    model.train(training)
    made = torch.cat(found).flatten(0, 1)[: len(order)]
    return F.normalize(made.new_empty(made.shape).index_copy(0, order.to(made.device), made), dim=-1).cpu()


class CitadelConfig(CitadelHeadConfig):
    """An encoder and the head in one.

    Args:
        encoder_config (dict): Config of the encoder.
        trunk (list): Modules of a late-interaction model behind it, see :func:`keep_trunk`.
    """

    model_type = "polyrep_citadel"
    sub_configs = {"encoder_config": AutoConfig}

    @checked()
    def __init__(self, encoder_config=None, trunk=None, **kwargs):
        width = keep_trunk(self, encoder_config, trunk)
        late = kwargs.get("router_reads") == "vectors"
        depth = {} if late else {"num_hidden_layers": getattr(self.encoder_config, "num_hidden_layers", None)}
        super().__init__(**{"dim": width} | kwargs | depth)
        if self.dim != width or not late and self.trunk:
            raise ValueError(
                f"{type(self).__name__}: dim={self.dim} and router_reads={self.router_reads!r}, but encoder and trunk "
                f"give vectors of width {width} behind {len(self.trunk)} modules, so the head belongs to others. Use "
                "those that it was trained on."
            )


class CitadelModel(WholeWeights, Trunk, PreTrainedModel):
    """Encoder and head in one state dict."""

    config_class = CitadelConfig
    otherwise = (
        "Put the head behind it: SparseEncoder(modules=[*backbone.children(), CitadelPooling(...)]), or --pipeline "
        "true."
    )
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = True

    def __init__(self, config):
        super().__init__(config)
        self.add_trunk(config)
        self.head = CitadelHead(config)
        self.post_init()

    @classmethod
    def from_encoder(cls, backbone: str, head: CitadelHead | None = None, **config) -> CitadelModel:
        """A model of any embedding model that is a transformer, one pooling and perhaps a normalisation.

        Args:
            backbone: Folder or Hub id of a SentenceTransformer, of a bare encoder, or of a late-interaction model of
                stock modules, whose token vectors the router then reads.
            head: A trained head; default: an untrained one.
            config: Fields of CitadelHeadConfig for the untrained one.

        Raises:
            ValueError: See :meth:`CitadelHead.from_backbone`.
        """
        family = MultiVectorEncoder if _is_late(str(backbone)) else SentenceTransformer
        return cls.from_modules(family(str(backbone), device="cpu"), head, **config)

    @classmethod
    def from_modules(cls, model, head: CitadelHead | None = None, **config) -> CitadelModel:
        """A model of an opened SentenceTransformer or MultiVectorEncoder."""
        if head is None:
            head = CitadelHead.from_backbone(model, **config)
        encoder, trunk, maps = cls.check_backbone(model, head.config.router_reads == "vectors")
        if head.config.router_reads == "states":
            head.config.fit(*_shape(encoder, cls.__name__))
        fields = fields_of(head.config, CitadelHeadConfig)
        whole = CitadelConfig(encoder_config=encoder.config, trunk=trunk, **fields)
        return cls.of_parts(whole, encoder, maps, head)

    @classmethod
    def check_backbone(cls, model, late: bool | None = None):
        """Encoder, trunk and maps of a backbone.

        Args:
            model: The backbone.
            late: Whether it is taken as a late-interaction model; default: where it is one.

        Raises:
            ValueError: It has modules that one folder does not hold.
        """
        if type(model) is MultiVectorEncoder if late is None else late:
            return trunk_parts(model, cls.__name__, cls.otherwise)
        cls.pooled_by(model)
        return whole_encoder(model[0].model, cls.__name__), [], []

    @classmethod
    def pooled_by(cls, model) -> tuple[str, bool]:
        """Pooling of a SentenceTransformer, and whether it normalises, by a module or by its score.

        Raises:
            ValueError: It does more than that.
        """
        if [type(module).__name__ for module in model] in (["Transformer"], ["Backbone"]):
            return "mean", False
        remedy = "Take its transformer alone: modules=[Transformer(backbone), CitadelPooling(head)]."
        pooling, normalize = pooling_of(model, cls.__name__, _CHOICES["pooling"], remedy)
        return pooling, normalize or model.similarity_fn_name == "cosine"

    def stock_modules(self, tokenizer) -> list:
        """What stands between encoder and head, as modules of sentence-transformers."""
        return stock_parts(self, tokenizer)

    @property
    def width(self) -> int:
        """Of what the folder's family reads."""
        return self.config.width

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        task: str | None = None,
        prune: bool = True,
        **kwargs,
    ) -> CitadelOutput:
        """Entries of texts, and the router's weights of words.

        Args:
            input_ids: ``(batch, tokens)``.
            attention_mask: ``(batch, tokens)``; default: all tokens count.
            task: "query", else a document.
            prune: See :class:`CitadelHead`.
            kwargs: What else the encoder reads.

        Raises:
            ValueError: See :class:`CitadelHead`.
        """
        config = self.config
        if config.router_reads == "vectors":
            vectors, mask = self.token_vectors(input_ids, attention_mask, task, **kwargs)
            return self.head(vectors, mask, task, input_ids, prune=prune)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        deep = not config.reads_last
        if deep:
            keep_states(self.encoder)
        inputs = {"input_ids": input_ids, "attention_mask": mask} | kwargs
        output = self.encoder(**read_inputs(inputs, self._reads) | {"output_hidden_states": deep, "return_dict": True})
        if deep:
            keep_states(self.encoder)
        if deep and output.hidden_states is None:
            raise ValueError(
                f"CitadelModel: {type(self.encoder).__name__} returned no hidden states, so router_layer="
                f"{config.router_layer} cannot be read. Use another encoder, or router_layer=-1."
            )
        last = output.last_hidden_state
        states = output.hidden_states[config.router_layer] if deep else last
        pooled = pool_tokens(last, mask, config.pooling)
        return self.head(last, mask, task, input_ids, states, pooled, prune)

    def encode_routed(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        task: str | None = None,
        **kwargs,
    ) -> CitadelEntries:
        """Texts as an index of routed entries takes them, which meet where their keys are equal.

        Args:
            input_ids: ``(batch, tokens)``.
            attention_mask: Likewise.
            task: "query", else a document.
            kwargs: What else the encoder reads.
        """
        return entries_of(self(input_ids, attention_mask, task, **kwargs))


def entries_of(output) -> CitadelEntries:
    """The entries in an output, or in a batch's features."""
    found = {name: output[name] for name in ("keys", "weights", "vectors", "mask")}
    return CitadelEntries(**found, sentence_embedding=output.get("dense"))


class CitadelTransformer(TrunkTransformer):
    """The stock Transformer around a CitadelModel, which leaves the entries in a batch's features, too."""

    def forward(self, features, task=None, **kwargs):
        """Add ``sentence_embedding``, the weights of words, and all else that the model gives."""
        given = {**features, **kwargs}
        if task is not None:  # trainers put it into the batch, by their router_mapping
            given["task"] = task
        features.update(self.model(**given).items())
        return features

    def on_model_ready(self, model):
        """Check the family."""
        _check_family(model, type(self).__name__)


class CitadelPooling(HeadModule, Module):
    """The head behind any modules that leave token vectors.

    Behind a stock Transformer that returns its hidden states it takes the place of a pooling. Behind the modules of a
    late-interaction model it routes the vectors that are there. The model is a SparseEncoder of the router's weights,
    and leaves the entries in its features; of vectors that are encoded already, :meth:`route` makes entries.

    Args:
        model: A head; ``CitadelHead.from_backbone`` makes an untrained one. Default: a new one of these fields of
            CitadelHeadConfig, whose words are random.
        config: See CitadelHeadConfig.
    """

    head_class, inside = CitadelHead, CitadelConfig.model_type
    reads, gives = "dim", "width"
    changeable = {"threshold", "query_keys", "document_keys", "clamp"} | HeadModule.changeable
    forward_kwargs = {"task"}

    def forward(self, features, task=None):
        """Add ``sentence_embedding``, the weights of words, and all else that the head gives."""
        config, states = self.model.config, features.pop("all_layer_embeddings", None)
        tokens, mask = features["token_embeddings"], features["attention_mask"]
        ids, prune = features.get("input_ids"), features.get("prune", True)
        if "cu_seq_lens_q" in features:
            raise ValueError(
                "CitadelPooling: the encoder was fed without padding, so texts cannot be told apart. Load the "
                "Transformer with unpad_inputs=False."
            )
        if config.router_reads == "vectors":
            output = self.model(tokens, mask, task, ids, prune=prune)
        else:
            if states is None and not config.reads_last:
                raise ValueError(
                    f"CitadelPooling: the encoder gave no hidden states, so router_layer={config.router_layer} cannot "
                    "be read. Put this module directly behind a Transformer whose model returns them."
                )
            read = tokens if config.reads_last or states is None else states[config.router_layer]
            pooled = pool_tokens(tokens, mask, config.pooling)
            output = self.model(tokens, mask, task, ids, read, pooled, prune)
        features.update(output.items())
        return features

    @torch.inference_mode()
    def route(self, embeddings: list[Tensor], task: str | None = None) -> CitadelEntries:
        """Entries of texts that a late-interaction model has encoded already.

        Args:
            embeddings: Token vectors ``(tokens, dim)`` of each text.
            task: What they were encoded for.

        Raises:
            ValueError: The head reads more than token vectors.
        """
        config = self.model.config
        if config.router_reads != "vectors" or config.routing == "static":
            raise ValueError(
                f"CitadelPooling: router_reads={config.router_reads!r} and routing={config.routing!r}, so token "
                "vectors alone do not tell the keys. Put the head behind its Transformer."
            )
        if not len(embeddings):
            raise ValueError("CitadelPooling: no text is there to be routed. Pass one or more.")
        texts = [torch.as_tensor(text, device=self.model.device) for text in embeddings]
        tokens = nn.utils.rnn.pad_sequence(texts, batch_first=True)
        lengths = torch.tensor([len(text) for text in texts], device=tokens.device)
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        training = self.model.training
        self.model.eval()
        try:
            return entries_of(self.model(tokens.to(self.model.dtype), mask, task))
        finally:
            self.model.train(training)

    def on_model_ready(self, model):
        """Check encoder and family, and let the encoder keep its hidden states where they are read."""
        config, modules = self.model.config, list(model)
        _check_family(model, "CitadelPooling")
        self.check_backbone(model)
        if config.router_reads == "vectors":
            return
        before = modules[modules.index(self) - 1] if modules.index(self) else None
        encoder = getattr(before, "model", None)
        if not isinstance(encoder, PreTrainedModel):
            names = " + ".join(type(module).__name__ for module in modules)
            raise ValueError(
                f"CitadelPooling: stands in {names}, but reads hidden states, which only a Transformer before it "
                "gives. Use modules=[Transformer(backbone), CitadelPooling(head)]."
            )
        config.fit(*_shape(encoder, "CitadelPooling"))
        if config.reads_last:
            return
        if keep_states not in before._forward_hooks.values():
            before.register_forward_pre_hook(keep_states)
            before.register_forward_hook(keep_states)
        encoder.config.output_hidden_states = True


def _check_family(model, owner: str) -> None:
    """Let a SparseEncoder score by the inner product; ValueError for a model of another family."""
    if FAMILY not in [family.__name__ for family in type(model).__mro__]:
        raise ValueError(_REFUSAL.format(owner=owner, family=type(model).__name__))
    if model._similarity_fn_name is None:
        model.similarity_fn_name = "dot"


def _is_late(backbone: str) -> bool:
    """Whether a folder or a repository says that it holds a late-interaction model."""
    try:
        file = cached_file(backbone, "config_sentence_transformers.json")
    except OSError:  # of a bare encoder
        return False
    return read_settings(Path(file)).get("model_type") == "MultiVectorEncoder"


def _shape(encoder: PreTrainedModel, owner: str) -> tuple[int, int, int | None]:
    """Depth, width and vocabulary of an encoder; ValueError if it does not tell."""
    config = encoder.config
    depth, width = (getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size"))
    if depth is None or width is None:
        raise ValueError(
            f"{owner}: {type(encoder).__name__} tells no num_hidden_layers and hidden_size, so its hidden states are "
            "not known. Use a text encoder such as BERT."
        )
    return depth, width, getattr(config, "vocab_size", None)


def _sizes(encoder: PretrainedConfig) -> dict:
    """What a head's config takes from that of its encoder."""
    found = {"dim": encoder_width(encoder), "num_hidden_layers": getattr(encoder, "num_hidden_layers", None)}
    eps = getattr(encoder, "layer_norm_eps", None)
    return found | ({"norm_eps": eps} if isinstance(eps, float) else {})


for config, model in ((CitadelHeadConfig, CitadelHead), (CitadelConfig, CitadelModel)):
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModel")
