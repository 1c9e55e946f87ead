"""UnifieR: one pass of one encoder gives a text a dense vector and weights of words, for a search that uses both.

After Shen et al., "UnifieR: A Unified Retriever for Large-Scale Retrieval" (KDD 2023, arXiv 2205.11194). The lower
layers of an encoder are shared. The dense view u is the encoder's own vector. A branch leaves it at ``split_layer``,
reads the states H there and u beside them, and scores every word of the vocabulary at every token:

    dense     u = pooling of the encoder's last layer, as the backbone has it
    lexicon   v_w = log(1 + max over tokens of max(0, W_w . branch([u, H]) + b_w))
    gate      g = 2 sigmoid(w . u_q + b) of a query, which weighs its views: g for dense, 2 - g for lexicon

u enters the branch without gradient, so that the words cannot pull at the layers that make it. Where this code leaves
the paper:

- The dense view is the whole backbone with its own pooling and scale: before training it is the backbone's vector.
- The branch is layers of our own, which change nothing at first, so that it fits any encoder that gives hidden
  states; ``lexicon_init="copy"`` takes BERT's last layers, as the paper has it.
- u stands beside the tokens and not in the place of [CLS], so that an encoder without one loses no word.
- W starts as the word embeddings, or as the language model's output layer where the backbone has one, and is then
  learned by itself: only for words that occur, and while the encoder stays as it is.
- Half the vocabulary would be positive at first. The bias starts where ``initial_active`` words of a text are left.
- The paper shows its gate in a picture alone; the formula above is a reading of it.
"""

# mypy: ignore-errors
# Shipped: it speaks to transformers and torch through attributes that these type as Tensor | Module.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, initialization
from transformers.utils import ModelOutput

from .polyrep_fields import LAYERS, WIDTH, WORDS, check_weight, checked, config_of, fields_of, keep, unless_given
from .polyrep_folder import BESIDE_A_HEAD, WholeWeights, whole_encoder
from .polyrep_room import (
    HeadModule,
    Module,
    SentenceTransformer,
    keep_states,
    new_encoder,
    pool_tokens,
    pooling_of,
    text_inputs,
    warn_of_no_task,
)
from .polyrep_trunk import TrunkTransformer
from .polyrep_words import check_words, language_head, words_of

VIEWS = ("dense", "lexicon")

FAMILIES = {"dense": "SentenceTransformer", "lexicon": "SparseEncoder"}
"""View -> class of sentence-transformers that reads it."""

WORD_BLOCK = 4096
"""Words that are scored at a time: all of them at all tokens of a batch would be a gigabyte."""

CACHED_SCORES = 2**21
"""Scores of words that a processor computes at a time, as many as its cache holds."""

REPEATED = 0.9
"""BM25's k1: by how much a word weighs more for standing in a text again."""

PAIR_BLOCK = 2**15
"""Words of texts whose gradients are computed at a time."""

_CHOICES = {
    "lexicon_init": ("identity", "copy"),
    "global_token": ("detached", "attached", "none"),
    "pooling": ("mean", "cls", "lasttoken"),
    "gate": ("none", "query"),
    "view": VIEWS,
}


class UnifierHeadConfig(PretrainedConfig):
    """Where the lexicon view leaves the encoder, what it is made of, and which view a folder shows.

    Args:
        split_layer (int): Hidden state that the branch reads: 0 is the embeddings, 12 or -1 the last of twelve layers.
            Default: -1 with ``mlm_head``, else -3.
        lexicon_layers (int): Layers of the branch; 0 reads words from the states as they are.
        lexicon_init (str): identity: layers that change nothing at first. copy: the last ones of a BERT.
        global_token (str): How the dense vector enters the branch: detached, without gradient; attached; or none.
        pooling (str): What the dense view is: mean over the tokens of the last layer, cls or lasttoken. Default: the
            backbone's own where there is one (``from_encoder``, ``from_backbone``, ``train``), else mean.
        normalize (bool): Bring dense vectors to unit length. Default: likewise, else not.
        projection (bool): One linear map of the dense vector, the identity at first: for an encoder that stays frozen.
        mlm_head (bool): Score words as the backbone's masked language model does, by its transform and output layer.
            Default: where it has one; else by its word embeddings.
        own_words (bool): A text's own words weigh more than a state says of them, each by a learned number.
        initial_active (int): Words that a text has before training beside its own, on the mean.
        query_top_k (int): Most words of a query; None keeps all.
        document_top_k (int): Most words of a document; None keeps all.
        gate (str): query: weigh the two views of each query. none: do not.
        dense_weight (float): Weight of the dense view in a search that sums both; None until it is chosen.
        view (str): The view that is the ``sentence_embedding``: dense or lexicon.
        hidden_size (int): Width of the encoder's states.
        num_hidden_layers (int): The encoder's layers; known once there is an encoder.
        num_heads (int): Attention heads of the branch. Default: the encoder's, else one for 64 dimensions.
        intermediate_size (int): Width inside the branch's layers. Default: the encoder's for copy, else fourfold.
        norm_eps (float): Of the branch's norms.
        vocab_size (int): Width of the lexicon view: entries of the vocabulary.
        words (int): Entries that a text can have; None for the whole vocabulary.
        special_token_ids (list): Tokens that are no words.
    """

    model_type = "polyrep_unifier_head"
    # What follows from the backbone and the corpus, and is nobody's choice.
    derived = (
        "hidden_size",
        "num_hidden_layers",
        "num_heads",
        "intermediate_size",
        "norm_eps",
        "vocab_size",
        "words",
        "special_token_ids",
    )

    @checked(
        **_CHOICES,
        split_layer=(-LAYERS[1] - 1, LAYERS[1]),
        lexicon_layers=LAYERS,
        initial_active=WORDS,
        query_top_k=WORDS,
        document_top_k=WORDS,
        dense_weight=(0, 1e6),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_heads=WIDTH,
        intermediate_size=WIDTH,
        norm_eps=(1e-15, 1),
        vocab_size=WORDS,
        words=WORDS,
        special_token_ids=(0, WORDS[1]),
    )
    def __init__(
        self,
        split_layer: int | None = None,
        lexicon_layers: int = 2,
        lexicon_init: str = "identity",
        global_token: str = "detached",
        pooling: str | None = None,
        normalize: bool | None = None,
        projection: bool = False,
        mlm_head: bool | None = None,
        own_words: bool = True,
        initial_active: int = 64,
        query_top_k: int | None = None,
        document_top_k: int | None = None,
        gate: str = "none",
        dense_weight: float | None = None,
        view: str = "dense",
        hidden_size: int = 384,
        num_hidden_layers: int | None = None,
        num_heads: int | None = None,
        intermediate_size: int | None = None,
        norm_eps: float = 1e-12,
        vocab_size: int = 30522,
        words: int | None = None,
        special_token_ids: list[int] | None = None,
        **kwargs,
    ):
        pooling, normalize, mlm_head = pooling or "mean", bool(normalize), bool(mlm_head)
        split_layer = (-1 if mlm_head else -3) if split_layer is None else split_layer
        words, special_token_ids = words or vocab_size, list(special_token_ids or [])
        num_heads = num_heads or _heads(hidden_size)
        intermediate_size = intermediate_size or min(4 * hidden_size, WIDTH[1])
        self._check(keep(self, locals()))
        super().__init__(**kwargs)
        self.num_hidden_layers = None
        self.fit(num_hidden_layers, hidden_size)

    def _check(self, name: str) -> None:
        check_weight(name, words=self.words, hidden_size=self.hidden_size)
        check_weight(name, intermediate_size=self.intermediate_size, hidden_size=self.hidden_size)
        for field in ("query_top_k", "document_top_k", "words"):
            if (value := getattr(self, field) or 0) > self.vocab_size:
                raise ValueError(
                    f"{name}: {field}={value} of a vocabulary of {self.vocab_size:,} words cannot be kept. Use 1 to "
                    f"{self.vocab_size:,}."
                )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"{name}: num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}, so heads would "
                f"be uneven. Use a divisor, e.g. {_heads(self.hidden_size)}."
            )

    def fit(self, num_hidden_layers: int | None, hidden_size: int, vocab_size: int | None = None) -> None:
        """Take the depth of an encoder, or ValueError if it has no such layer, or another shape or vocabulary."""
        depth, name = num_hidden_layers, type(self).__name__
        if depth is not None and not -depth - 1 <= self.split_layer <= depth:
            raise ValueError(
                f"{name}: split_layer={self.split_layer}, but the encoder has {depth} layers, so its hidden states "
                f"are 0 (embeddings) to {depth} (last), or {-depth - 1} to -1. Use one of these."
            )
        if hidden_size != self.hidden_size or self.num_hidden_layers not in (None, depth):
            raise ValueError(
                f"{name}: made for num_hidden_layers={self.num_hidden_layers} and hidden_size={self.hidden_size}, but "
                f"the encoder has {depth} layers of width {hidden_size}. Use the backbone it was trained on "
                f"({self.base_model_id or 'not recorded'}), or train it anew."
            )
        if vocab_size not in (None, self.vocab_size):
            raise ValueError(
                f"{name}: vocab_size={self.vocab_size}, but the encoder knows {vocab_size:,} tokens, so words would "
                f"be taken for others. Use the backbone it was made on ({self.base_model_id or 'not recorded'})."
            )
        self.num_hidden_layers = depth

    @property
    def similarity_fn_name(self) -> str:
        """How vectors of the view that is shown are scored."""
        return "cosine" if self.view == "dense" and self.normalize else "dot"

    @property
    def width(self) -> int:
        """Of the vectors of that view."""
        return self.hidden_size if self.view == "dense" else self.vocab_size

    def views(self) -> dict[str, dict]:
        """What a search can sum, as name -> fields of the ``View`` of polyrep's ``encoding.views``."""
        # A query's gate is the length of its dense vector, which a cosine would not see.
        compared = "cosine" if self.normalize and self.gate == "none" else "dot"
        lexicon = {"kind": "sparse", "dim": self.vocab_size, "similarity": "dot", "output": "lexicon", "weight": 1.0}
        dense = {"kind": "sentence", "dim": self.hidden_size, "similarity": compared, "output": "dense"}
        return {"lexicon": lexicon, "dense": dense | {"weight": self.dense_weight}}

    @property
    def reads_global(self) -> bool:
        """Whether the dense vector enters the branch."""
        return self.global_token != "none" and self.lexicon_layers > 0

    @property
    def split_is_last(self) -> bool:
        """Whether the branch reads the encoder's last layer, which it returns anyway."""
        return self.split_layer in (-1, self.num_hidden_layers)


@dataclass
class UnifierOutput(ModelOutput):
    """What head and model return.

    Attributes:
        sentence_embedding: The view that the config names.
        dense: ``(batch, hidden_size)``.
        lexicon: ``(batch, vocab_size)`` word weights, zero almost everywhere.
        gate: ``(batch,)`` of all but documents, with ``gate="query"``: what dense is to be multiplied by, and 2 less
            it what lexicon is, as :meth:`UnifierModel.encode_views` does. For one view alone it changes no ranking.
    """

    sentence_embedding: Tensor | None = None
    dense: Tensor | None = None
    lexicon: Tensor | None = None
    gate: Tensor | None = None


class Layer(nn.Module):
    """A transformer layer of the branch: with the norms first and no output at first, or as BERT has it."""

    def __init__(self, config):
        super().__init__()
        dim, eps = config.hidden_size, config.norm_eps
        self.heads, self.norm_first = config.num_heads, config.lexicon_init == "identity"
        self.query, self.key, self.value, self.output = (nn.Linear(dim, dim) for _ in range(4))
        self.up, self.down = nn.Linear(dim, config.intermediate_size), nn.Linear(config.intermediate_size, dim)
        self.attention_norm, self.norm = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)

    def forward(self, states: Tensor, attended: Tensor) -> Tensor:
        """States ``(batch, tokens, dim)`` to the same shape; ``attended (batch, tokens)`` is True for what is read."""
        if self.norm_first:
            states = states + self._attend(self.attention_norm(states), attended)
            return states + self._inside(self.norm(states))
        states = self.attention_norm(states + self._attend(states, attended))
        return self.norm(states + self._inside(states))

    def _attend(self, states: Tensor, attended: Tensor) -> Tensor:
        query, key, value = (
            part(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (batch, heads, tokens, part)
            for part in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attended[:, None, None])
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _inside(self, states: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(states)))


class UnifierHead(WholeWeights, PreTrainedModel):
    """The head: an encoder's states become words, and its pooled vector the dense view and the gate."""

    config_class = UnifierHeadConfig
    _keys_to_ignore_on_load_unexpected = BESIDE_A_HEAD
    _supports_sdpa = _supports_flash_attn = True  # the branch has its own, whatever the encoder is asked for

    def __init__(self, config):
        super().__init__(config)
        dim = config.hidden_size
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.lexicon_layers))
        if config.reads_global:  # a vector of unit length becomes as long as a state
            self.global_norm, self.global_map = nn.LayerNorm(dim), nn.Linear(dim, dim, bias=False)
        if config.projection:
            self.map = nn.Linear(dim, dim, bias=False)
        if config.mlm_head:
            self.transform, self.transform_norm = nn.Linear(dim, dim), nn.LayerNorm(dim, config.norm_eps)
        self.decoder = nn.Linear(dim, config.words)
        if config.own_words:
            self.own, self.own_bias = nn.Embedding(config.words, 1), nn.Parameter(torch.zeros(1))
        self.register_buffer("terms", torch.arange(config.words))  # vocabulary id of each output
        self.register_buffer("learned", torch.ones(config.words, dtype=torch.bool))  # outputs that training computes
        if config.gate == "query":
            self.gate = nn.Linear(dim, 1)
        self._seen = self.step_words = None
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, UnifierHead):
            initialization.copy_(module.terms, torch.arange(module.config.words))
            initialization.copy_(module.learned, torch.ones(module.config.words, dtype=torch.bool))
            for name in ("global_map", "map"):
                if hasattr(module, name):
                    initialization.eye_(getattr(module, name).weight)
            if module.config.own_words:
                initialization.zeros_(module.own.weight)
                initialization.zeros_(module.own_bias)
            zeros = [module.gate] if hasattr(module, "gate") else []
            if module.config.lexicon_init == "identity":
                zeros += [part for layer in module.layers for part in (layer.output, layer.down)]
            for part in zeros:
                initialization.zeros_(part.weight)
                initialization.zeros_(part.bias)

    @classmethod
    def from_backbone(cls, model: SentenceTransformer, **config) -> UnifierHead:
        """An untrained head for a SentenceTransformer of a transformer, one pooling and perhaps a normalisation.

        Args:
            model: The SentenceTransformer.
            config: Fields of UnifierHeadConfig; pooling, normalisation and output layer default to the backbone's own.

        Raises:
            ValueError: It has other modules, its words are of another width than its states, or it is no BERT whose
                layers or output layer could be copied.
        """
        pooling, normalize = UnifierModel.check_backbone(model)
        encoder = model[0].model
        check_words(encoder, cls.__name__)
        spoken = language_head(encoder, config.get("mlm_head"), cls.__name__)
        given = unless_given(config, pooling=pooling, normalize=normalize, mlm_head=spoken is not None)
        head = cls(UnifierHeadConfig(**given | _sizes(encoder.config, given) | words_of(model)))
        head._start(encoder, spoken)
        return head

    @torch.no_grad()
    def _start(self, encoder: PreTrainedModel, spoken: tuple | None) -> None:
        """Take the weights that an encoder has for the head, and set the bias by texts of random words."""
        special = set(self.config.special_token_ids)
        words = torch.tensor([i for i in range(self.config.vocab_size) if i not in special])
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
        if self.config.lexicon_init == "copy" and self.layers:
            self._copy(encoder)
        ids = words[torch.randint(len(words), (16, 24), generator=torch.Generator().manual_seed(0))]
        states, last = (part.to(self.decoder.weight) for part in self._states(encoder, ids.to(encoder.device)))
        pooled = pool_tokens(last, torch.ones_like(ids), self.config.pooling)
        self.calibrate(lambda: self(states, pooled, ids, views=("lexicon",)))

    def _states(self, encoder: PreTrainedModel, ids: Tensor, layer: int | None = None) -> tuple[Tensor, Tensor]:
        """An encoder's states of tokens at the layer of the split, or at another one, and at the last."""
        training = encoder.training
        keep_states(encoder)
        output = encoder.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
        keep_states(encoder)
        encoder.train(training)
        layer, last = self.config.split_layer if layer is None else layer, output.last_hidden_state
        if layer in (-1, self.config.num_hidden_layers):
            return last, last
        return output.hidden_states[layer], last

    @torch.no_grad()
    def _copy(self, encoder: PreTrainedModel) -> None:
        """Make the branch the last layers of a BERT; ValueError if it has other ones."""
        count = len(self.layers)
        refusal = (
            f"UnifierHead: lexicon_init='copy' takes the last {count} layers of a BERT, and {type(encoder).__name__} "
            "has others, or fewer. Use lexicon_init='identity'."
        )
        theirs = getattr(getattr(encoder, "encoder", None), "layer", None)
        if theirs is None or len(theirs) < count or getattr(encoder.config, "is_decoder", False):
            raise ValueError(refusal)
        try:
            for ours, layer in zip(self.layers, list(theirs)[-count:], strict=True):
                attention, after = layer.attention.self, layer.attention.output
                for part, name in ((attention.query, "query"), (attention.key, "key"), (attention.value, "value")):
                    getattr(ours, name).load_state_dict(part.state_dict())
                ours.output.load_state_dict(after.dense.state_dict())
                ours.attention_norm.load_state_dict(after.LayerNorm.state_dict())
                ours.up.load_state_dict(layer.intermediate.dense.state_dict())
                ours.down.load_state_dict(layer.output.dense.state_dict())
                ours.norm.load_state_dict(layer.output.LayerNorm.state_dict())
        except (AttributeError, RuntimeError) as error:
            raise ValueError(refusal) from error
        ids = torch.arange(16, device=encoder.device).view(2, 8) % self.config.vocab_size
        made, expected = (part.to(self.decoder.weight) for part in self._states(encoder, ids, -1 - count))
        for layer in self.layers:
            made = layer(made, torch.ones_like(made[..., 0], dtype=torch.bool))
        if not torch.allclose(made, expected, 1e-2, 1e-2):  # another activation, say
            raise ValueError(refusal)

    @torch.no_grad()
    def calibrate(self, encode: Callable[[], None]) -> None:
        """Move the bias of all words alike, so that texts have ``initial_active`` words, on the mean.

        Own words do not count. The mean of their scores is what ``own_bias`` takes away.

        Args:
            encode: Has the head read these texts, in one call or several.
        """
        self._seen = []
        try:
            encode()
            most = torch.cat([part.float() for part, _ in self._seen])  # (texts, words)
            own = torch.cat([part.float() for _, part in self._seen])  # (tokens,)
        finally:
            self._seen = None
        if self.config.own_words and len(own):
            self.own_bias.fill_(-own.mean())
        count = self.config.initial_active * len(most)
        if count < most.numel():
            threshold = most.flatten().topk(count + 1).values[-2:].mean()  # between the two, whatever rounding does
            if torch.isfinite(threshold):
                self.decoder.bias.sub_(threshold.to(self.decoder.bias))

    @torch.no_grad()
    def weigh_own(self, documents: Tensor, count: int) -> None:
        """Let own words start with the square root of BM25's inverse document frequency, so that products have it.

        Args:
            documents: ``(vocab_size,)`` in how many documents each entry of the vocabulary is.
            count: Documents there are.
        """
        there = documents.to(self.own.weight)[self.terms.to(documents.device)]
        self.own.weight[:, 0] = torch.log1p((count - there + 0.5) / (there + 0.5)).sqrt()

    @torch.no_grad()
    def restrict(self, terms: Tensor) -> None:
        """Keep only some words, ``(words,)`` vocabulary ids out of those present, in place.

        Raises:
            ValueError: None of them is present.
        """
        kept = torch.isin(self.terms, terms.to(self.terms.device))
        if not kept.any():
            raise ValueError("UnifierHead: none of the words is one of the head's, so texts have none. Name others.")
        decoder = nn.Linear(self.config.hidden_size, int(kept.sum())).to(self.decoder.weight)
        decoder.weight.copy_(self.decoder.weight[kept])
        decoder.bias.copy_(self.decoder.bias[kept])
        if self.config.own_words:
            own = nn.Embedding(len(decoder.bias), 1).to(self.own.weight)
            own.weight.copy_(self.own.weight[kept])
            self.own = own
        self.decoder, self.terms, self.learned = decoder, self.terms[kept], self.learned[kept]
        self.config.words = len(self.terms)

    def forward(
        self,
        token_states: Tensor | None,
        pooled: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        task: str | None = None,
        views: tuple[str, ...] = VIEWS,
        prune: bool = True,
        **kwargs,
    ) -> UnifierOutput:
        """Both views of texts.

        Args:
            token_states: ``(batch, tokens, hidden_size)`` at ``split_layer``; None where only dense is asked for.
            pooled: ``(batch, hidden_size)`` the pooled last layer.
            input_ids: ``(batch, tokens)``, which say what is a word.
            attention_mask: ``(batch, tokens)``; default: all tokens count.
            task: "query", else a document.
            views: Those that are asked for; what is not costs nothing.
            prune: Whether the top k are kept. Training sees all.
            kwargs: Ignored.

        Raises:
            ValueError: A value is not finite.
        """
        config = self.config
        if not (self.training or torch.compiler.is_compiling() or torch.jit.is_tracing()):
            _refuse_not_finite(*[part for part in (token_states, pooled) if part is not None])
        dense = self.map(pooled) if config.projection else pooled
        dense = F.normalize(dense, dim=-1) if config.normalize else dense
        found = {"dense": dense} if "dense" in views else {}
        if "lexicon" in views:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            found["lexicon"] = self._lexicon(token_states, dense, input_ids, mask.bool(), task, prune)
        if config.gate == "query" and task != "document" and len(found) > 1:
            found["gate"] = 2 * torch.sigmoid(self.gate(dense.detach()))[:, 0]
        if self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            self._take_part(found, dense)
        return UnifierOutput(sentence_embedding=found.get(config.view), **found)

    def _take_part(self, found: dict[str, Tensor], dense: Tensor) -> None:
        """Let all weights be in every pass, by nothing: processes that share gradients wait for those of each."""
        if "lexicon" not in found:
            idle = sum(parameter.sum() for parameter in self.parameters())
        else:
            idle = dense.sum() + (sum(part.sum() for part in self.gate.parameters()) if hasattr(self, "gate") else 0)
        view = next(iter(found))
        found[view] = found[view] + 0 * idle.to(found[view].dtype)

    def _lexicon(
        self, states: Tensor, dense: Tensor, input_ids: Tensor, mask: Tensor, task: str | None, prune: bool
    ) -> Tensor:
        """Word weights ``(batch, vocab_size)``."""
        config = self.config
        if prune and config.query_top_k != config.document_top_k:
            warn_of_no_task(self, task)
        attended = mask | ~mask.any(1, keepdim=True)  # attention to nothing is no number
        if config.reads_global:
            dense = dense if config.global_token == "attached" else dense.detach()
            first = self.global_map(self.global_norm(dense))[:, None].to(states.dtype)  # (batch, 1, dim)
            states = torch.cat([first, states], 1)
            attended = torch.cat([torch.ones_like(attended[:, :1]), attended], 1)
        for layer in self.layers:
            states = layer(states, attended)
        states = states[:, 1:] if config.reads_global else states
        if config.mlm_head:
            states = self.transform_norm(F.gelu(self.transform(states)))
        weight, bias, terms = self.decoder.weight, self.decoder.bias, self.terms
        own = torch.expm1(self.own.weight[:, 0]) + self.own_bias if config.own_words else None
        learned = self.learned if self.step_words is None else self.step_words & self.learned
        if self.training and not torch.compiler.is_compiling() and not learned.all():
            weight, bias, terms = weight[learned], bias[learned], terms[learned]
            own = None if own is None else own[learned]
        known = torch.ones(config.vocab_size, dtype=torch.bool)
        known[[i for i in config.special_token_ids if i < config.vocab_size]] = False
        counted = mask & known.to(input_ids.device)[input_ids]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            most = _Most.apply(states, weight, bias, counted)
        else:
            most = _most(states, weight, bias, counted, placed=False)[0]
        most = most.to(torch.promote_types(most.dtype, torch.float32))
        if own is None:
            place, scores = None, most.new_zeros(0)
        else:
            place, scores = _of_own_words(states, input_ids, counted, weight, terms, config.vocab_size)
        if self._seen is not None:
            self._seen.append((most, scores[scores.isfinite()]))
        if own is not None:
            most = most.scatter_reduce(1, place, (scores + own[place]).to(most.dtype), "amax")
        weights = torch.log1p(F.relu(most))
        if own is not None:  # a word that a text repeats weighs more, as in BM25
            times = weights.new_zeros(weights.shape).scatter_add(1, place, scores.isfinite().to(weights.dtype))
            weights = weights * torch.where(times > 0, (1 + REPEATED) * times / (REPEATED + times), 1)
        weights = weights.new_zeros(weights.shape[0], config.vocab_size).index_copy(1, terms, weights)
        return self._prune(weights, task) if prune else weights

    def _prune(self, weights: Tensor, task: str | None) -> Tensor:
        """Zero all but the top k: ``(batch, vocab_size)``."""
        top_k = self.config.query_top_k if task == "query" else self.config.document_top_k
        if top_k is None:
            return weights
        values, terms = weights.topk(min(top_k, weights.shape[1]), dim=1)
        return torch.zeros_like(weights).scatter(1, terms, values)


def _of_own_words(
    states: Tensor, input_ids: Tensor, counted: Tensor, weight: Tensor, terms: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Place ``(batch, tokens)`` of each token among the words, and its score ``w . z``; minus infinity for no word."""
    columns = torch.arange(len(terms), device=terms.device)
    place = columns.new_full((size,), -1).scatter(0, terms, columns)[input_ids]
    known, place = counted & (place >= 0), place.clamp(min=0)
    scores = (states * weight[place]).sum(-1)
    return place, scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~known, -math.inf)


def _most(
    states: Tensor, weight: Tensor, bias: Tensor, counted: Tensor, placed: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Largest score of each word at a token that counts, ``(batch, words)``, and where; without one, -infinity."""
    followed = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if states.device.type == "cpu" and not followed:
        return _most_of_each(states, weight, bias, counted, placed)
    values, places, left_out = [], [], ~counted[..., None]
    for start in range(0, weight.shape[0], WORD_BLOCK):
        block = slice(start, start + WORD_BLOCK)
        scores = F.linear(states, weight[block], bias[block])  # (batch, tokens, words)
        value, place = scores.masked_fill(left_out, -math.inf).max(1)
        values.append(value)
        places.append(place)
    return torch.cat(values, 1), torch.cat(places, 1)


def _most_of_each(
    states: Tensor, weight: Tensor, bias: Tensor, counted: Tensor, placed: bool
) -> tuple[Tensor, Tensor | None]:
    """The same text by text: padding is not scored, and so few words at a time that a processor's cache holds them.

    Where nobody asks for the places, the maximum alone takes a sixth of the time.
    """
    lengths, place_of = counted.sum(1).tolist(), counted.nonzero()[:, 1]
    packed, place_of = states[counted], place_of.split(lengths)  # (tokens, dim)
    values, places, step = [], [], max(32, CACHED_SCORES // max(1, len(packed)))
    for start in range(0, weight.shape[0], step):
        block = slice(start, start + step)
        scores = F.linear(packed, weight[block], bias[block])  # (tokens, words)
        value = scores.new_full((len(lengths), scores.shape[1]), -math.inf)
        place = counted.new_zeros(value.shape, dtype=torch.int64) if placed else None
        for row, part in enumerate(scores.split(lengths)):
            if len(part) and place is None:
                value[row] = part.amax(0)
            elif len(part):
                value[row], best = part.max(0)
                place[row] = place_of[row][best]
        values.append(value)
        places.append(place)
    return torch.cat(values, 1), torch.cat(places, 1) if placed else None


class _Most(torch.autograd.Function):
    """:func:`_most` with a gradient that remembers a token for each word of a text, and not the scores of all."""

    @staticmethod
    def forward(ctx, states, weight, bias, counted):
        values, places = _most(states, weight, bias, counted)
        ctx.save_for_backward(states, weight, places)
        return values

    @staticmethod
    def backward(ctx, gradient):
        states, weight, places = ctx.saved_tensors
        batch, tokens, dim = states.shape
        of_states = torch.zeros(batch * tokens, dim, dtype=states.dtype, device=states.device)
        of_weight = torch.zeros_like(weight)
        flat = states.reshape(-1, dim)
        for texts, words in zip(*(part.split(PAIR_BLOCK) for part in gradient.nonzero(as_tuple=True)), strict=True):
            rows = texts * tokens + places[texts, words]
            slope = gradient[texts, words][:, None]  # (pairs, 1)
            of_states.index_add_(0, rows, (slope * weight[words]).to(states.dtype))
            of_weight.index_add_(0, words, (slope * flat[rows]).to(weight.dtype))
        return of_states.view_as(states), of_weight, gradient.sum(0).to(weight.dtype), None


class UnifierConfig(UnifierHeadConfig):
    """An encoder and the head in one.

    Args:
        encoder_config (dict): Config of the encoder.
    """

    model_type = "polyrep_unifier"
    sub_configs = {"encoder_config": AutoConfig}

    @checked()
    def __init__(self, encoder_config=None, **kwargs):
        self.encoder_config = config_of(encoder_config, type(self).__name__)
        super().__init__(**kwargs | _sizes(self.encoder_config, kwargs))


class UnifierModel(WholeWeights, PreTrainedModel):
    """Encoder and head in one state dict.

    Attributes:
        view_families: View -> class of sentence-transformers that reads it.
    """

    config_class = UnifierConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    view_families = FAMILIES

    def __init__(self, config):
        super().__init__(config)
        self.encoder = new_encoder(config.encoder_config)
        self.head = UnifierHead(config)
        self.post_init()

    @classmethod
    def from_encoder(cls, backbone: str, head: UnifierHead | None = None, **config) -> UnifierModel:
        """A model from any embedding model that is a transformer, one pooling and perhaps a normalisation.

        Args:
            backbone: Folder or Hub id of a SentenceTransformer, or of a bare encoder.
            head: A trained head; default: an untrained one.
            config: Fields of UnifierHeadConfig for the untrained one.

        Raises:
            ValueError: See :meth:`UnifierHead.from_backbone`.
        """
        return cls.from_modules(SentenceTransformer(str(backbone), device="cpu"), head, **config)

    @classmethod
    def from_modules(cls, model, head: UnifierHead | None = None, **config) -> UnifierModel:
        """Likewise of an opened SentenceTransformer, or of its modules."""
        encoder = whole_encoder(model[0].model, cls.__name__)
        if head is None:
            head = UnifierHead.from_backbone(model, **config)
        else:
            cls.check_backbone(model)
            shape = encoder.config
            head.config.fit(shape.num_hidden_layers, shape.hidden_size, getattr(shape, "vocab_size", None))
        return cls.around(encoder, head)

    @classmethod
    def around(cls, encoder: PreTrainedModel, head: UnifierHead) -> UnifierModel:
        """A model that holds this very encoder, of which no second one is made, and a copy of the head."""
        config = UnifierConfig(encoder_config=encoder.config, **fields_of(head.config, UnifierHeadConfig))
        with torch.device("meta"):
            whole = cls(config)
        whole.encoder, whole.head = encoder, UnifierHead(config)
        whole.head.load_state_dict(head.state_dict())
        return whole.to(encoder.dtype)

    @staticmethod
    def check_backbone(model: SentenceTransformer) -> tuple[str, bool]:
        """Pooling of a SentenceTransformer, and whether it normalises, by a module or by its score.

        Raises:
            ValueError: It does more than that.
        """
        if [type(module).__name__ for module in model] in (["Transformer"], ["Backbone"]):
            return "mean", False
        remedy = "Take its transformer alone: modules=[Transformer(backbone), UnifierPooling(head)]."
        pooling, normalize = pooling_of(model, "UnifierModel", _CHOICES["pooling"], remedy)
        return pooling, normalize or model.similarity_fn_name == "cosine"

    @property
    def width(self) -> int:
        """Of the vectors of the view that is shown."""
        return self.config.width

    def stock_modules(self, tokenizer) -> list:
        """What stands between encoder and head: nothing."""
        return []

    def views(self) -> dict[str, dict]:
        """What :meth:`encode_views` gives, as the config says."""
        return self.config.views()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        task: str | None = None,
        views: tuple[str, ...] = VIEWS,
        prune: bool = True,
        **kwargs,
    ) -> UnifierOutput:
        """Both views of texts, and of queries the gate.

        Args:
            input_ids: ``(batch, tokens)``.
            attention_mask: ``(batch, tokens)``; default: all tokens count.
            token_type_ids: ``(batch, tokens)``, for encoders that know them.
            task: "query", else a document.
            views: Those that are asked for; dense alone costs what the backbone costs.
            prune: Whether the top k are kept. Training sees all.
            kwargs: Ignored; what other retrievers read.
        """
        config, inputs = self.config, text_inputs(input_ids, attention_mask, token_type_ids)
        deep = "lexicon" in views and not config.split_is_last
        if deep:
            keep_states(self.encoder)
        output = self.encoder(input_ids=input_ids, output_hidden_states=deep, **inputs)
        if deep:
            keep_states(self.encoder)
        if deep and output.hidden_states is None:
            raise ValueError(
                f"UnifierModel: {type(self.encoder).__name__} returned no hidden states, so split_layer="
                f"{config.split_layer} cannot be read. Use another encoder, or split_layer=-1."
            )
        last, mask = output.last_hidden_state, inputs["attention_mask"]
        states = output.hidden_states[config.split_layer] if deep else last
        pooled = pool_tokens(last, mask, config.pooling)
        return self.head(states, pooled, input_ids, mask, task, views, prune)

    def encode_views(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        task: str | None = None,
        **kwargs,
    ) -> dict[str, Tensor]:
        """Both views of texts from one pass, of queries weighed by the gate: what a search of the sum takes.

        Args:
            input_ids: ``(batch, tokens)``.
            attention_mask: Likewise.
            token_type_ids: Likewise.
            task: "query", else a document.
            kwargs: Ignored.

        Returns:
            View -> vectors: ``dense (batch, hidden_size)`` and ``lexicon (batch, vocab_size)``. A query's dense one
            has the length of the gate then, so score by the inner product.
        """
        return weighed(self(input_ids, attention_mask, token_type_ids, task or "document"))


def weighed(output) -> dict[str, Tensor]:
    """The views in an output, or in a batch's features, each multiplied by what the gate gives it, if there is one."""
    found = {view: output[view] for view in VIEWS if output.get(view) is not None}
    if (gate := output.get("gate")) is not None:
        found = {"dense": found["dense"] * gate[:, None], "lexicon": found["lexicon"] * (2 - gate[:, None])}
    return found


class TwoViews:
    """What a module of sentence-transformers with two views says of itself: see ``encoding/views.py`` of polyrep."""

    def views(self) -> dict[str, dict]:
        """What a batch with ``views`` asks for, as the config says."""
        return self.model.config.views()

    def weighed(self, features) -> dict[str, Tensor]:
        """The views of a batch, of queries multiplied by what the gate gives each."""
        return weighed(features)


class UnifierTransformer(TrunkTransformer, TwoViews):
    """The stock Transformer around a UnifierModel, which computes the view that its family reads.

    A batch with ``views`` asks for others: then there are ``dense``, ``lexicon`` and ``gate`` as well.
    """

    def forward(self, features, task=None, **kwargs):
        """Add ``sentence_embedding``, and what else is asked for."""
        asked = {"views": (self.model.config.view,)} | features | kwargs
        if task is not None:  # trainers put it into the batch, by their router_mapping
            asked["task"] = task
        features.update(self.model(**asked).items())
        return features

    def on_model_ready(self, model):
        """Check that the family reads the view."""
        _check_family(model, self.model.config, type(self).__name__)


class UnifierPooling(HeadModule, Module, TwoViews):
    """The head behind any stock Transformer that returns its hidden states, in the place of a pooling.

    With ``view="lexicon"`` the model is a SparseEncoder, else a SentenceTransformer. A batch with ``views`` asks for
    both: then there are ``dense``, ``lexicon`` and ``gate``.

    Args:
        model: A head; ``UnifierHead.from_backbone`` makes an untrained one. Default: a new one of these fields of
            UnifierHeadConfig, whose words are random.
        config: See UnifierHeadConfig.
    """

    head_class, inside = UnifierHead, UnifierConfig.model_type
    reads, gives = "hidden_size", "width"
    forward_kwargs = {"task"}

    def forward(self, features, task=None):
        """Add ``sentence_embedding`` to a batch's features."""
        config, states = self.model.config, features.pop("all_layer_embeddings", None)
        views = features.get("views") or (config.view,)
        if states is None and not config.split_is_last and "lexicon" in views:
            raise ValueError(
                f"UnifierPooling: the encoder gave no hidden states, so split_layer={config.split_layer} cannot be "
                "read. Put this module directly behind a Transformer whose model returns them."
            )
        if "cu_seq_lens_q" in features:
            raise ValueError(
                "UnifierPooling: the encoder was fed without padding, so texts cannot be told apart. Load the "
                "Transformer with unpad_inputs=False."
            )
        last, mask = features["token_embeddings"], features["attention_mask"]
        chosen = last if config.split_is_last or states is None else states[config.split_layer]
        pooled = pool_tokens(last, mask, config.pooling)
        output = self.model(chosen, pooled, features["input_ids"], mask, task, views, features.get("prune", True))
        features.update(output.items())
        return features

    def on_model_ready(self, model):
        """Check encoder and family, and let the encoder keep its hidden states where they are read."""
        config, modules = self.model.config, list(model)
        before = modules[modules.index(self) - 1] if modules.index(self) else None
        encoder = getattr(before, "model", None)
        if not isinstance(encoder, PreTrainedModel):
            names = " + ".join(type(module).__name__ for module in modules)
            raise ValueError(
                f"UnifierPooling: stands in {names}, but reads hidden states, which only a Transformer before it "
                "gives. Use modules=[Transformer(backbone), UnifierPooling(head)]."
            )
        _check_family(model, config, "UnifierPooling")
        self.check_backbone(model)
        depth, width = (getattr(encoder.config, name, None) for name in ("num_hidden_layers", "hidden_size"))
        if depth is None or width is None:
            raise ValueError(
                f"UnifierPooling: {type(encoder).__name__} tells no num_hidden_layers and hidden_size, so its hidden "
                "states are not known. Use a text encoder such as BERT."
            )
        config.fit(depth, width, getattr(encoder.config, "vocab_size", None))
        if config.split_is_last:
            return
        if keep_states not in before._forward_hooks.values():
            before.register_forward_pre_hook(keep_states)
            before.register_forward_hook(keep_states)
        encoder.config.output_hidden_states = True


def _check_family(model, config: UnifierHeadConfig, owner: str) -> None:
    """Let a model of the family that reads the view score as it does; ValueError for one of another family."""
    wanted = FAMILIES[config.view]
    if wanted not in [family.__name__ for family in type(model).__mro__]:
        raise ValueError(
            f"{owner}: view={config.view!r} in a {type(model).__name__}, which would read another output. Open it as "
            f"{wanted}, or save the other view: polyrep.save(model, folder, view=...)."
        )
    if model._similarity_fn_name is None:
        model.similarity_fn_name = config.similarity_fn_name


def _heads(width: int) -> int:
    """As many attention heads as give each 64 dimensions or a few more."""
    return next(count for count in range(max(1, width // 64), 0, -1) if width % count == 0)


def _sizes(encoder: PretrainedConfig, given: dict) -> dict:
    """What a head's config takes from that of its encoder."""
    width = encoder.hidden_size
    found = {"hidden_size": width, "num_hidden_layers": encoder.num_hidden_layers}
    if given.get("vocab_size") is None and isinstance(words := getattr(encoder, "vocab_size", None), int):
        found["vocab_size"] = words
    heads, inside = (getattr(encoder, name, None) for name in ("num_attention_heads", "intermediate_size"))
    if given.get("num_heads") is None and isinstance(heads, int) and heads and width % heads == 0:
        found["num_heads"] = heads
    if given.get("intermediate_size") is None and given.get("lexicon_init") == "copy" and isinstance(inside, int):
        found["intermediate_size"] = inside
    eps = getattr(encoder, "layer_norm_eps", None)
    if "norm_eps" not in given and isinstance(eps, float):
        found["norm_eps"] = eps
    return found


def _refuse_not_finite(*vectors: Tensor) -> None:
    """ValueError that names the first text of a batch with a value that is not finite."""
    for part in vectors:
        bad = ~torch.isfinite(part).flatten(1).all(1)
        if bad.any():
            raise ValueError(
                f"UnifierHead: the states of text {int(bad.int().argmax())} of the batch are not finite, so its "
                "views would not be either. Encode in float32 or bfloat16; if it stays, the backbone is broken."
            )


for config, model in ((UnifierHeadConfig, UnifierHead), (UnifierConfig, UnifierModel)):
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModel")
