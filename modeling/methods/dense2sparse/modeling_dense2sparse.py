"""Dense2Sparse: a frozen dense vector becomes sparse weights over words, for an inverted index that a person can read.

The head turns a vector into words (``Dense2SparseModel``), and one folder holds it and what makes the vector
(``Dense2SparseForRetrieval``): a text encoder, or two towers for texts and images.

After Nguyen, Hendriksen, Yates and de Rijke, "Multimodal Learned Sparse Retrieval with Probabilistic Expansion
Control" (ECIR 2024, arXiv 2402.17535): one small head, shared by queries and documents, projects the vector of any
encoder onto a vocabulary of words and their pieces. Where this code leaves the paper:

- A text's own words are known when it is encoded, and one dense vector cannot give them back. So with
  ``own_tokens="learned"`` they enter with a learned weight per word, saturated and normalised by length as in BM25,
  and the head only has to add the words that the text does not hold ("expansion"). An image is expansion only.
- Padding and special tokens are left out by mask, not by id: an id may stand for padding and for a word.
- Only words that can be learned are expanded to (``expansion_size``); every known word counts as a text's own.
"""

# mypy: ignore-errors
# Shipped: it speaks to transformers and torch through attributes that these type as Tensor | Module.

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.utils import ModelOutput

from .polyrep_fields import LAYERS, WIDTH, WORDS, check_weight, checked, config_of, fields_of, keep
from .polyrep_folder import BESIDE_A_HEAD, WholeWeights, whole_encoder
from .polyrep_room import (
    HeadModule,
    Module,
    SentenceTransformer,
    Transformer,
    begin_words,
    begin_words_of,
    entries_of,
    pool_tokens,
    prompt_tokens,
    text_inputs,
    warn_of_no_task,
)
from .polyrep_towers import (
    BOTH_TOWERS,
    MAPS,
    ImageInputs,
    TwoTowers,
    open_both_towers,
    shared_width,
    tower_configs,
)
from .polyrep_trunk import OF_VECTORS, Trunk, keep_trunk, pooled_parts, stock_parts

try:
    from sentence_transformers.base.modules import Normalize
    from sentence_transformers.sentence_transformer.modules import Pooling
except ImportError:  # only stock_modules makes some
    pass

_CHOICES = {
    "activation": ("log1p_relu", "double_log1p"),
    "expansion": ("both", "document", "query", "none"),
    "own_tokens": ("learned", "none"),
    "pooling": ("mean", "cls", "lasttoken"),
    "word_mark": ("##", "▁", "Ġ"),
}

_LONG_PROMPT = 8
"""Tokens by which a prompt is known without the last."""

_CONTROL = re.compile(r"<[^<>\s]+>")
"""What SentencePiece has beside words: bytes such as <0x0A>, and entries for special tokens."""

_SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003fffd]"
)
"""Scripts without spaces between words, where no piece goes on from another."""

_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = {chr(code): code for code in _PRINTED} | {
    chr(256 + n): code for n, code in enumerate(code for code in range(256) if code not in _PRINTED)
}
"""Character that byte-level BPE writes for a byte -> that byte."""


class Dense2SparseConfig(PretrainedConfig):
    """Everything that the head needs to encode.

    Args:
        input_dim (int): Width of the dense vectors.
        vocab_size (int): Width of the sparse vectors: entries of the vocabulary.
        expansion_size (int): Words that the head can add; None for the whole vocabulary.
        hidden_layers (int): Residual layers (GELU) before the vocabulary; the paper has none.
        activation (str): log1p_relu as in the paper, or double_log1p, which saturates harder.
        expansion (str): Which side may hold words that its text lacks: both, document, query or none.
        own_tokens (str): learned: a text's own words count with a learned weight. none: as in the paper.
        document_top_k (int): Most words of a document; None keeps all.
        query_top_k (int): Most words of a query; None keeps all.
        mass (float): Keep the heaviest words that hold this share of a text's total weight.
        min_weight (float): Drop words below this weight.
        average_length (float): Mean number of own tokens of a document where the head was trained.
        special_token_ids (list): Vocabulary entries that stand for no word: special and added tokens, spaces, single
            bytes and pieces of a character.
        word_mark (str): How the vocabulary tells words from their pieces: ## before what goes on (WordPiece), or ▁
            (SentencePiece) or Ġ (byte-level BPE) before what begins.
        space_tokens (bool): A space at a text's end is a token of its own, so that a prompt's may be.
        foreign_words (bool): The words are of another vocabulary than the encoder's, whose token ids mean others.
        added_tokens (int): Tokens that the encoder's tokenizer adds to any text.
        vocabulary_bytes (int): Length of the stored vocabulary in bytes; set by ``from_mlm``.
    """

    model_type = "polyrep_dense2sparse"
    # What follows from the backbone and the corpus, and is nobody's choice.
    derived = (
        "input_dim",
        "vocab_size",
        "expansion_size",
        "average_length",
        "special_token_ids",
        "word_mark",
        "space_tokens",
        "foreign_words",
        "added_tokens",
        "vocabulary_bytes",
    )

    @checked(
        input_dim=WIDTH,
        vocab_size=WORDS,
        expansion_size=(0, WORDS[1]),
        hidden_layers=LAYERS,
        activation=_CHOICES["activation"],
        expansion=_CHOICES["expansion"],
        own_tokens=_CHOICES["own_tokens"],
        document_top_k=WORDS,
        query_top_k=WORDS,
        mass=(1e-9, 1),
        min_weight=(0, 1e6),
        average_length=(1e-6, 1e9),
        special_token_ids=(0, WORDS[1]),
        word_mark=_CHOICES["word_mark"],
        added_tokens=(0, 2**16),
        vocabulary_bytes=(0, 2**28),
    )
    def __init__(
        self,
        input_dim: int = 384,
        vocab_size: int = 30522,
        expansion_size: int | None = None,
        hidden_layers: int = 0,
        activation: str = "log1p_relu",
        expansion: str = "both",
        own_tokens: str | None = "learned",
        document_top_k: int | None = None,
        query_top_k: int | None = None,
        mass: float | None = None,
        min_weight: float | None = None,
        average_length: float = 1.0,
        special_token_ids: list[int] | None = None,
        word_mark: str = "##",
        space_tokens: bool = False,
        foreign_words: bool = False,
        added_tokens: int = 2,
        vocabulary_bytes: int = 0,
        **kwargs,
    ):
        expansion_size = vocab_size if expansion_size is None else expansion_size
        own_tokens, special_token_ids = own_tokens or "none", list(special_token_ids or [])
        self._check(keep(self, locals()))
        kwargs.pop("projection_dim", None)
        super().__init__(**kwargs)
        self.projection_dim = vocab_size  # the name under which sentence-transformers looks for the width

    def _check(self, name: str) -> None:
        words, dim = self.vocab_size, self.input_dim
        check_weight(name, vocab_size=words, input_dim=dim)
        check_weight(name, input_dim=dim, hidden=2 * dim)
        for field in ("document_top_k", "query_top_k", "expansion_size"):
            if (value := getattr(self, field) or 0) > words:
                raise ValueError(
                    f"{name}: {field}={value!r} of a vocabulary of {words:,} words cannot be kept. "
                    f"Use 1 to {words:,}, or None for all."
                )
        if self.own_tokens == self.expansion == "none":
            raise ValueError(f"{name}: expansion and own_tokens are both 'none', so every vector is empty. Allow one.")
        if self.own_tokens == "learned" and self.foreign_words:
            raise ValueError(
                f"{name}: own_tokens='learned', but the words are of another vocabulary than the encoder's, so a "
                "text's token ids would be taken for other words. Use own_tokens='none'."
            )
        if self.own_tokens == "none" and self.expansion != "both":
            raise ValueError(
                f"{name}: expansion={self.expansion!r} without own tokens leaves the other side empty. Use "
                "expansion='both', or own_tokens='learned'."
            )


@dataclass
class Dense2SparseOutput(ModelOutput):
    """What head and retriever return.

    Attributes:
        sentence_embedding: ``(batch, vocab_size)`` word weights, zero almost everywhere.
    """

    sentence_embedding: Tensor | None = None


class Dense2SparseModel(WholeWeights, PreTrainedModel):
    """The head: dense vectors, and for texts their own token ids, become word weights."""

    config_class = Dense2SparseConfig
    _keys_to_ignore_on_load_unexpected = BESIDE_A_HEAD
    _supports_sdpa = _supports_flash_attn = True  # no attention here, whatever the encoder is asked for

    def __init__(self, config):
        super().__init__(config)
        dim = config.input_dim
        self.input = nn.Linear(dim, dim)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
            for _ in range(config.hidden_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.vocabulary = nn.Linear(dim, config.expansion_size)
        self.register_buffer("expansion_terms", torch.arange(config.expansion_size))  # vocabulary id of each output
        self.own_weight = nn.Parameter(torch.zeros(config.vocab_size))  # cut at zero: a word can be learned away
        self.own_saturation = nn.Parameter(torch.tensor(1.0))  # k1 and b of BM25, before softplus and sigmoid
        self.own_length = nn.Parameter(torch.tensor(1.0))
        self.log_scale = nn.Parameter(torch.tensor(0.0))  # of scores, against the teacher's; ranks do not need it
        # The words, one a line: they travel with the weights, so no second file can be lost or be of another model.
        self.register_buffer("vocabulary_text", torch.zeros(config.vocabulary_bytes, dtype=torch.uint8))
        self.begin = None  # of the encoder's tokens, see prompt_tokens
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Dense2SparseModel):
            initialization.eye_(module.input.weight)
            initialization.constant_(module.own_weight, 0.5)
            for parameter, value in ((module.own_saturation, 1.0), (module.own_length, 1.0), (module.log_scale, 0.0)):
                initialization.constant_(parameter, value)
            initialization.copy_(module.expansion_terms, torch.arange(module.config.expansion_size))
            initialization.zeros_(module.vocabulary_text)
            for layer in module.layers:  # a residual layer starts as none
                initialization.zeros_(layer[-1].weight)

    @classmethod
    def from_mlm(cls, model: str | PreTrainedModel, input_dim: int, tokenizer=None, **config) -> Dense2SparseModel:
        """A head whose vocabulary projection starts from the word embeddings of a language model.

        Args:
            model: Object, folder or Hub id of a masked language model, whose output layer and last LayerNorm are taken
                as they are, or of any BERT-like embedding model, whose word embeddings are, centred and of one length.
            input_dim: Width of the dense vectors that the head will read. Words of another width are projected to it
                by their principal directions, and lose the LayerNorm.
            tokenizer: Of that model; default: loaded from where the model came from.
            config: Further fields of Dense2SparseConfig.

        Raises:
            ValueError: The tokenizer is neither WordPiece, Unigram nor BPE on bytes or with SentencePiece's mark, so
                its entries are no words that one could index.
        """
        if isinstance(model, (str, Path)):
            architectures = AutoConfig.from_pretrained(model, trust_remote_code=False).architectures or [""]
            masked = architectures[0].endswith("ForMaskedLM")
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(model, trust_remote_code=False)
            kind = AutoModelForMaskedLM if masked else AutoModel
            model = whole_encoder(kind.from_pretrained(model, trust_remote_code=False), cls.__name__)
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(model.name_or_path, trust_remote_code=False)
        mark = _mark_of(tokenizer)
        words = ["" if "\n" in word else word for word in entries_of(tokenizer)]
        none = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        none |= {i for i, word in enumerate(words) if not _readable(word, mark)}
        stored = torch.frombuffer(bytearray("\n".join(words).encode()), dtype=torch.uint8)
        settings = {
            "vocab_size": len(words),
            "special_token_ids": sorted(none),
            "word_mark": mark,
            "space_tokens": begin_words_of(tokenizer) is not None,
            "added_tokens": tokenizer.num_special_tokens_to_add(),
        } | config
        head = cls(Dense2SparseConfig(input_dim=input_dim, vocabulary_bytes=len(stored), **settings))
        head.vocabulary_text.copy_(stored)
        head._start_from_words(model)
        return head

    @torch.no_grad()
    def _start_from_words(self, model: PreTrainedModel | TwoTowers) -> None:
        """Take the vocabulary projection from a model's output layer, or else from its word embeddings."""
        output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        words, input_dim = (output or model.get_input_embeddings()).weight, self.config.input_dim
        words = words.detach().float()[: self.config.vocab_size]  # (words, hidden)
        if words.shape[1] != input_dim:
            kept = torch.pca_lowrank(words, min(input_dim, *words.shape))[2]
            words = F.pad(words @ kept, (0, input_dim - kept.shape[1]))
        elif output is not None:
            body = set(model.base_model.modules())
            norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm) and m not in body]
            if norms and norms[-1].elementwise_affine:
                self.norm.load_state_dict(norms[-1].state_dict())
            if output.bias is not None:
                self.vocabulary.bias.copy_(output.bias[: self.config.expansion_size])
        else:  # rows of one length: frequent words have short embeddings, and would never be chosen
            words = F.normalize(words - words.mean(0), dim=1)
        self.vocabulary.weight.copy_(words[: self.config.expansion_size])

    @classmethod
    def from_backbone(cls, model: SentenceTransformer, **config) -> Dense2SparseModel:
        """An untrained head for a SentenceTransformer, on that model's own word embeddings; see ``from_mlm``."""
        return cls.from_mlm(model[0].model, model.get_embedding_dimension(), model.tokenizer, **config)

    @torch.no_grad()
    def restrict_expansion(self, terms: Tensor) -> None:
        """Keep only some words to expand to, ``(words,)`` ascending vocabulary ids out of those present, in place."""
        kept = torch.isin(self.expansion_terms, terms.to(self.expansion_terms.device))
        vocabulary = nn.Linear(self.config.input_dim, int(kept.sum())).to(self.vocabulary.weight)
        vocabulary.weight.copy_(self.vocabulary.weight[kept])
        vocabulary.bias.copy_(self.vocabulary.bias[kept])
        self.vocabulary, self.expansion_terms = vocabulary, self.expansion_terms[kept]
        self.config.expansion_size = len(self.expansion_terms)

    def hidden(self, sentence_embedding: Tensor) -> Tensor:
        """What the vocabulary projection reads: ``(batch, input_dim)`` to the same shape."""
        state = self.input(sentence_embedding)
        for layer in self.layers:
            state = state + layer(state)
        return self.norm(state)

    def forward(
        self,
        sentence_embedding: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        task: str | None = None,
        gate: Tensor | None = None,
        compact: bool = False,
        expand: bool = True,
        modality: str = "text",
        prompt: Tensor | None = None,
        **kwargs,
    ) -> Dense2SparseOutput:
        """Word weights of a batch.

        Args:
            sentence_embedding: ``(batch, input_dim)`` vectors of the frozen encoder.
            input_ids: ``(batch, tokens)`` the text's own tokens; needed where own tokens count or control expansion.
            attention_mask: ``(batch, tokens)``, zero where a token is padding; default: all count.
            task: "query" or "document"; None counts as a document.
            gate: ``(batch, 1)`` or ``(batch, expansion_size)`` zeros and ones: the expansion that is allowed, which
                never touches own tokens. The expansion control of training draws it.
            compact: Return only the ``(batch, expansion_size)`` columns that can be expanded to, and prune nothing.
            expand: False leaves a text its own words alone, as the first of two stages of a search asks with.
            modality: "image" for vectors of images, which have no words of their own and are always expanded.
            prompt: ``(batch, tokens)``, true for tokens of a prompt before the text, which are no words of its own.
            kwargs: Ignored; what other heads read.

        Raises:
            ValueError: The vectors have another width than the head, own tokens are missing, or an image may not be
                expanded.
        """
        config, image = self.config, modality == "image"
        owned = not image and (config.own_tokens == "learned" or gate is not None or not expand)
        self._check(sentence_embedding, task, expand, image, missing=owned and input_ids is None)
        if config.expansion != "both" or config.own_tokens == "learned" or config.query_top_k != config.document_top_k:
            warn_of_no_task(self, task)
        weights = self._expansion(sentence_embedding, task, compact)
        added = config.added_tokens
        if prompt is not None and not image:
            attention_mask = (torch.ones_like(prompt) if attention_mask is None else attention_mask.bool()) & ~prompt
            added = (added - prompt.any(1, keepdim=True).long()).clamp(min=0)  # the first of them is the prompt's
        if owned:
            gate = gate if expand else sentence_embedding.new_zeros(1, 1)
            weights = self._with_own_words(weights, gate, input_ids, attention_mask, task, compact)
        elif not image and attention_mask is not None:  # what the tokenizer adds to any text is an empty one
            weights = weights * (attention_mask.sum(1, keepdim=True) > added)
        return Dense2SparseOutput(sentence_embedding=weights if compact else self._prune(weights, task))

    def _check(self, vectors: Tensor, task: str | None, expand: bool, image: bool, missing: bool) -> None:
        config, name = self.config, type(self).__name__
        if vectors.shape[-1] != config.input_dim:
            raise ValueError(
                f"{name}: vectors of width {vectors.shape[-1]}, but the head was made for input_dim="
                f"{config.input_dim}, so it does not belong to this encoder. Use the one it was trained on "
                f"({config.base_model_id or 'not recorded'}), or train a head for this one."
            )
        if not expand and not image and config.foreign_words:
            raise ValueError(
                f"{name}: expand=False asks for a text's own words, but the encoder's tokens are not this head's "
                "words. Use expand=True, or a head with the encoder's own vocabulary."
            )
        if image and config.expansion not in ("both", task or "document"):
            raise ValueError(
                f"{name}: expansion={config.expansion!r} leaves images without a word. Use a head with "
                "expansion='both', or encode them as documents."
            )
        if missing:
            raise ValueError(
                f"{name}: no input_ids, but a text's own words are asked for (own_tokens={config.own_tokens!r}, "
                f"expand={expand}). Pass input_ids and attention_mask beside the vectors, or modality='image' for "
                "those of images."
            )

    def _expansion(self, vectors: Tensor, task: str | None, compact: bool) -> Tensor:
        """Weights of the words that the head finds, ``(batch, words)``; zero for a side that is not expanded."""
        config = self.config
        weights = vectors.new_zeros(vectors.shape[0], config.expansion_size if compact else config.vocab_size)
        if config.expansion not in ("both", task or "document"):
            return weights
        expanded = torch.log1p(F.relu(self.vocabulary(self.hidden(vectors))))
        expanded = torch.log1p(expanded) if config.activation == "double_log1p" else expanded
        expanded = expanded.to(weights.dtype)
        return expanded if compact else weights.index_copy(1, self.expansion_terms, expanded)

    def _with_own_words(
        self,
        weights: Tensor,
        gate: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        task: str | None,
        compact: bool,
    ) -> Tensor:
        """Weights of the expansion that the gate lets through, and of the text's own words, the larger of the two."""
        counts, lengths = (x.to(weights.dtype) for x in self.count(input_ids, attention_mask, compact))
        if gate is not None:
            gate = gate.to(weights.dtype)
            if not compact and gate.shape[1] > 1:
                gate = torch.zeros_like(weights).index_copy(1, self.expansion_terms, gate)
            weights = weights * torch.maximum(gate, (counts > 0).to(weights.dtype))
        if self.config.own_tokens == "learned":
            own = F.relu(self.own_weight)
            own = own[self.expansion_terms] if compact else own
            weights = torch.maximum(weights, own * self.saturate(counts, lengths, task))
        return weights * (lengths > 0)  # nothing is known of a text without a known word

    def count(self, input_ids: Tensor, attention_mask: Tensor | None = None, compact: bool = False) -> tuple:
        """Own tokens of texts: times that each word occurs ``(batch, words)``, and length ``(batch, 1)``."""
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        special = [i for i in self.config.special_token_ids if i < self.config.vocab_size]
        known = torch.ones(self.config.vocab_size, dtype=torch.bool)
        known[special] = False  # there may be thousands, too many to compare each token with
        real = real & known.to(input_ids.device)[input_ids]
        lengths, columns = real.sum(1, keepdim=True), input_ids
        if compact:  # vocabulary id -> column; words that cannot be expanded to have none
            column_of = input_ids.new_full((self.config.vocab_size,), -1)
            column_of[self.expansion_terms] = torch.arange(len(self.expansion_terms), device=input_ids.device)
            columns = column_of[input_ids]
            real = real & (columns >= 0)
        width = self.config.expansion_size if compact else self.config.vocab_size
        counts = torch.zeros(input_ids.shape[0], width, device=input_ids.device)
        return counts.scatter_add_(1, columns.clamp(min=0), real.float()), lengths

    def saturate(self, counts: Tensor, lengths: Tensor, task: str | None) -> Tensor:
        """Term frequency as BM25 takes it: a repeated word counts more, in a long document less. Queries: 0 or 1."""
        if task == "query":
            return (counts > 0).to(counts.dtype)
        k1, b = F.softplus(self.own_saturation), torch.sigmoid(self.own_length)
        return counts * (k1 + 1) / (counts + k1 * (1 - b + b * lengths / self.config.average_length))

    def _prune(self, weights: Tensor, task: str | None) -> Tensor:
        """Zero what the top k, mass and min_weight leave out: ``(batch, vocab_size)``."""
        config = self.config
        if config.min_weight:
            weights = weights * (weights >= config.min_weight)
        top_k = config.query_top_k if task == "query" else config.document_top_k
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # a graph cannot look at how many there are
            most = weights.shape[1]
        else:
            most = int((weights > 0).sum(1).max()) if len(weights) else 0
        if not most or (config.mass is None and (top_k is None or top_k >= most)):
            return weights
        values, terms = weights.topk(min(top_k or most, most), dim=1)  # heaviest first
        if config.mass is not None:
            total = weights.sum(1, keepdim=True)
            before = values.float().cumsum(1) - values.float()
            values = values * (before < config.mass * total.float())
        return torch.zeros_like(weights).scatter_(1, terms, values)

    @property
    def words(self) -> list[str]:
        """The vocabulary, by id, as the tokenizer writes it; empty for an entry that is on no single line."""
        return bytes(self.vocabulary_text.cpu().numpy()).decode().split("\n")

    def prompt_tokens(self, input_ids: Tensor, attention_mask: Tensor, prompt_length) -> Tensor:
        """What :meth:`forward` takes as ``prompt``, of a prompt's length in tokens; see :func:`prompt_tokens`."""
        if self.begin is None and self.config.space_tokens and not self.config.foreign_words:
            self.begin = begin_words(self.words)
        if self.begin is not None:
            self.begin = self.begin.to(input_ids.device)
        return prompt_tokens(input_ids, attention_mask, prompt_length, self.begin)

    def decode(self, embeddings: Tensor, top_k: int | None = None) -> list:
        """Words and weights of sparse vectors, heaviest first.

        Words are written for people: without the marks of SentencePiece, bytes as the characters that they are, and
        what goes on within a word behind ``##``, as WordPiece has it. Two entries may then read alike, such as a
        Chinese word with and without a space before it.

        Args:
            embeddings: ``(vocab_size,)`` or ``(batch, vocab_size)``, dense or sparse.
            top_k: Most words to give; None gives all.

        Returns:
            ``[(word, weight), ...]``, or a list of such lists for a batch.

        Raises:
            ValueError: The vectors have another width, or top_k is not a positive number.
        """
        embeddings = torch.as_tensor(embeddings)
        embeddings = (embeddings.to_dense() if embeddings.layout != torch.strided else embeddings).detach().cpu()
        if embeddings.shape[-1] != self.config.vocab_size or embeddings.ndim > 2:
            raise ValueError(
                f"decode: vectors of shape {tuple(embeddings.shape)}, but this head's have {self.config.vocab_size:,} "
                "words, so they are of another model. Pass what this model's encode returned."
            )
        if top_k is not None and top_k < 1:
            raise ValueError(f"decode: top_k={top_k} asks for no word. Use 1 or more, or None for all.")
        words, mark = self.words, self.config.word_mark
        batch = embeddings.float().reshape(-1, self.config.vocab_size)
        values, terms = (part[:, :top_k].tolist() for part in batch.sort(dim=1, descending=True, stable=True))
        rows = [
            [(_readable(words[t], mark) or words[t], w) for t, w in zip(row_terms, row, strict=True) if w > 0]
            for row, row_terms in zip(values, terms, strict=True)
        ]
        return rows[0] if embeddings.ndim == 1 else rows


def _mark_of(tokenizer) -> str:
    """How a tokenizer's vocabulary tells words from their pieces; ValueError if its entries are no words."""
    kind = "slow"
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        model, kind = content["model"], content["model"]["type"]
        steps = json.dumps([content[name] for name in ("normalizer", "pre_tokenizer", "decoder")], ensure_ascii=False)
        if kind == "WordPiece":
            return "##"
        if kind in ("Unigram", "BPE") and not model.get("end_of_word_suffix"):  # as CLIP has one
            for mark, step in (("Ġ", '"ByteLevel"'), ("▁", "▁")):
                if step in steps:
                    return mark
    raise ValueError(
        f"Dense2SparseModel: the tokenizer of {tokenizer.name_or_path!r} is {kind}, and neither WordPiece nor Unigram "
        "or BPE that marks where words begin, so its entries are no words to index under. Take the vocabulary of "
        "another model instead, which leaves the text's own tokens out: --vocabulary google-bert/bert-base-uncased "
        "--own_tokens none, or from_mlm('google-bert/bert-base-uncased', input_dim, own_tokens='none')."
    )


def _readable(word: str, mark: str) -> str:
    """An entry of a vocabulary as a person writes it; empty if it is no word or piece of one."""
    if mark == "##":
        return word
    text = "" if mark == "▁" and _CONTROL.fullmatch(word) else word.replace("▁", " ")
    if mark == "Ġ":
        try:
            text = bytes(_BYTES[character] for character in word).decode()
        except (KeyError, UnicodeDecodeError):  # not of bytes, or not of whole characters
            return ""
    shown = text.strip()
    within = shown and not text[0].isspace() and unicodedata.category(shown[0])[0] in "LMN"
    return f"##{shown}" if within and not _SPACELESS.match(shown) else shown


def _prompt_ids(model: SentenceTransformer, task: str) -> list[int]:
    """Tokens that a model's prompt for a task puts before every text, whatever the text begins with."""
    prompt = (model.prompts or {}).get(task)
    if not prompt:
        return []
    rows = [model.tokenizer(prompt + text)["input_ids"] for text in ("", "a", "7")]
    length = next((n for n, ids in enumerate(zip(*rows, strict=False)) if len(set(ids)) > 1), min(map(len, rows)))
    return rows[0][:length]


class TowersConfig(PretrainedConfig):
    """The two towers that a retriever for images and texts holds, as the dual encoder that they are of has it.

    Of one model type with the dual encoder's own config, whose folders this reads; no model is made of it.
    """

    model_type = "polyrep_dual_encoder"
    sub_configs = {"encoder_config": AutoConfig, "text_config": AutoConfig, "vision_config": AutoConfig}

    @checked(**MAPS, pooling=_CHOICES["pooling"])
    def __init__(
        self,
        encoder_config=None,
        text_config=None,
        vision_config=None,
        text_dim: int = 384,
        image_dim: int = 1280,
        projection_dim: int = 512,
        hidden_dim: int = 0,
        dropout: float = 0.0,
        text_dropout: float = 0.0,
        pooling: str = "mean",
        normalize: bool = True,
        **kwargs,
    ):
        keep(self, locals())
        parts = (encoder_config, text_config, vision_config)
        if parts != (None, None, None):  # as a default
            parts = tower_configs(type(self).__name__, *parts)
        self.encoder_config, self.text_config, self.vision_config = parts
        super().__init__(**kwargs)


class Dense2SparseForRetrievalConfig(Dense2SparseConfig):
    """A frozen encoder and the head in one.

    Args:
        encoder_config (dict): Config of the text encoder, or a dual encoder's for texts and images.
        pooling (str): How a text encoder's token states become the dense vector: mean, cls or lasttoken.
        normalize (bool): Bring a text encoder's vector to unit length.
        trunk (list): Modules behind a text encoder's pooling, see :func:`keep_trunk`.
        query_prompt_ids (list): Tokens that the backbone's prompt puts before a query, so that they are known for none
            of its own words.
        document_prompt_ids (list): Likewise before a document.
    """

    model_type = "polyrep_dense2sparse_for_retrieval"
    derived = (*Dense2SparseConfig.derived, "query_prompt_ids", "document_prompt_ids")
    sub_configs = {"encoder_config": AutoConfig}

    @checked(pooling=_CHOICES["pooling"], query_prompt_ids=(0, WORDS[1]), document_prompt_ids=(0, WORDS[1]))
    def __init__(
        self,
        encoder_config=None,
        pooling: str = "mean",
        normalize: bool = True,
        trunk=None,
        query_prompt_ids: list[int] | None = None,
        document_prompt_ids: list[int] | None = None,
        **kwargs,
    ):
        self.query_prompt_ids, self.document_prompt_ids = list(query_prompt_ids or []), list(document_prompt_ids or [])
        self.encoder_config, self.trunk = _encoder_config(encoder_config, type(self).__name__), []
        if trunk or not self.has_images:
            width = keep_trunk(self, self.encoder_config, trunk, OF_VECTORS)
        self.pooling, self.normalize = pooling, normalize
        super().__init__(**kwargs)
        if self.has_images:
            if self.expansion not in ("both", "document"):
                raise ValueError(
                    f"{type(self).__name__}: expansion={self.expansion!r} leaves images without a word. Use both or "
                    "document."
                )
            width = self.encoder_config.projection_dim
        if encoder_config is not None and width != self.input_dim:
            raise ValueError(
                f"{type(self).__name__}: the {'towers give' if self.has_images else 'encoder gives'} vectors of "
                f"{width}, but input_dim={self.input_dim}, so the head belongs to others. Use those that it was "
                "trained on."
            )

    @property
    def has_images(self) -> bool:
        """Whether the encoder has a tower for images."""
        return isinstance(self.encoder_config, TowersConfig)


def _encoder_config(part, owner: str) -> PretrainedConfig:
    """A text encoder's config, or that of two towers; a dual encoder's own becomes one of towers."""
    if getattr(part, "model_type", None) == TowersConfig.model_type and not isinstance(part, TowersConfig):
        part = {name: value for name, value in part.to_dict().items() if name != "auto_map"}  # whose code is not here
    if isinstance(part, dict) and part.get("model_type") == TowersConfig.model_type:
        return TowersConfig.from_dict(part)
    return part if isinstance(part, TowersConfig) else config_of(part, owner)


class Dense2SparseForRetrieval(WholeWeights, Trunk, PreTrainedModel):
    """Encoder and head in one state dict, so that one folder is a whole sparse retriever.

    ``forward`` encodes texts, and ``encode_image`` images where the encoder has a tower for them.
    """

    config_class = Dense2SparseForRetrievalConfig
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config):
        super().__init__(config)
        encoder = config.encoder_config
        if config.has_images:
            self.encoder, self.trunk = TwoTowers(encoder), nn.ModuleList()
        else:
            self.add_trunk(config)
        self.head = Dense2SparseModel(config)
        self.post_init()

    @classmethod
    def from_encoder(cls, backbone: str, head: Dense2SparseModel | None = None, **config) -> Dense2SparseForRetrieval:
        """A retriever from any embedding model that is a transformer, one pooling and perhaps a normalisation.

        Args:
            backbone: Folder or Hub id of such a SentenceTransformer, of a dual encoder, or of CLIP, SigLIP or
                ``BlipForImageTextRetrieval``.
            head: A trained head; default: an untrained one on the backbone's word embeddings.
            config: Fields of Dense2SparseConfig for the untrained one.

        Raises:
            ValueError: The backbone has modules that one folder of this kind cannot hold.
        """
        encoder = _towers_of(backbone)
        if encoder is None:
            return cls.from_modules(SentenceTransformer(str(backbone), device="cpu"), head, **config)
        if head is None:
            tokenizer = AutoTokenizer.from_pretrained(backbone, trust_remote_code=False)
            head = Dense2SparseModel.from_mlm(encoder, encoder.config.projection_dim, tokenizer, **config)
        return cls._of(encoder, head)

    @classmethod
    def from_modules(cls, model, head: Dense2SparseModel | None = None, **config) -> Dense2SparseForRetrieval:
        """Likewise of an opened SentenceTransformer for texts."""
        pooling, normalize, trunk, maps = cls.check_backbone(model)
        encoder = whole_encoder(model[0].model, cls.__name__)
        if head is None:
            head = Dense2SparseModel.from_mlm(encoder, model.get_embedding_dimension(), model.tokenizer, **config)
        prompts = {f"{task}_prompt_ids": _prompt_ids(model, task) for task in ("query", "document")}
        return cls._of(encoder, head, maps, pooling=pooling, normalize=normalize, trunk=trunk, **prompts)

    @classmethod
    def _of(cls, encoder, head: Dense2SparseModel, maps=(), **whole) -> Dense2SparseForRetrieval:
        retriever = cls(
            Dense2SparseForRetrievalConfig(**fields_of(head.config), encoder_config=encoder.config, **whole)
        )
        retriever.take_trunk(encoder, maps)
        retriever.head.load_state_dict(head.state_dict())
        return retriever.to(encoder.dtype)

    @staticmethod
    def check_backbone(model: SentenceTransformer) -> tuple:
        """See :func:`pooled_parts`; a dual encoder's own config says what it does."""
        if len(model) == 1 and model[0].model.config.model_type == TowersConfig.model_type:
            return "mean", True, [], []
        remedy = (
            "Put the head behind the backbone's own modules instead: --pipeline true, or "
            "SparseEncoder(modules=[*model.children(), Dense2SparsePooling(head)])."
        )
        return pooled_parts(model, "Dense2SparseForRetrieval", _CHOICES["pooling"], remedy)

    def stock_modules(self, tokenizer) -> list:
        """What stands between encoder and head, as modules of sentence-transformers; ValueError where it is none."""
        if self.config.has_images:
            raise ValueError(
                "Dense2SparseForRetrieval: two towers are no module of sentence-transformers. Keep them as one folder."
            )
        pooling = Pooling(self.config.encoder_config.hidden_size, self.config.pooling)
        unit = [Normalize()] if self.config.normalize else []
        return [pooling, *unit, *stock_parts(self, tokenizer, "sentence_embedding")]

    def text_vectors(self, input_ids: Tensor, attention_mask: Tensor, **inputs) -> Tensor:
        """The frozen encoder's dense vectors of texts: ``(batch, tokens)`` to ``(batch, input_dim)``."""
        if self.config.has_images:
            return self.encoder.text_vectors(input_ids, attention_mask, **inputs)
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        vectors = pool_tokens(states, attention_mask, self.config.pooling)
        return self.behind(F.normalize(vectors, dim=-1) if self.config.normalize else vectors)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        task: str | None = None,
        expand: bool = True,
        prompt_length: int | Tensor | None = None,
        **kwargs,
    ) -> Dense2SparseOutput:
        """Sparse vectors of texts.

        Args:
            input_ids: ``(batch, tokens)``.
            attention_mask: ``(batch, tokens)``; default: all tokens count.
            token_type_ids: ``(batch, tokens)``, for encoders that know them.
            task: "query" or "document".
            expand: False gives a text's own words alone.
            prompt_length: Tokens of a prompt before the texts, with those that stand before any text. Not needed for
                the backbone's own prompts, which are known where they stand.
            kwargs: Ignored; what other retrievers read.
        """
        inputs = text_inputs(input_ids, attention_mask, token_type_ids)
        vectors = self.text_vectors(input_ids, **inputs)
        mask = inputs["attention_mask"]
        prompt = self._prompt(input_ids, mask, prompt_length)
        return self.head(vectors, input_ids, mask, task, expand=expand, prompt=prompt)

    def _prompt(self, input_ids: Tensor, mask: Tensor, prompt_length: int | Tensor | None) -> Tensor | None:
        """Tokens of a prompt, known or of a given length: ``(batch, tokens)``; None where there is none."""
        config, found = self.config, None
        if prompt_length is not None:
            found = self.head.prompt_tokens(input_ids, mask, prompt_length)
        for ids in filter(None, (config.query_prompt_ids, config.document_prompt_ids)):
            place = mask.long().cumsum(1)  # from 1, on whichever side texts are padded
            expected = torch.tensor([0, *ids], device=input_ids.device)[place.clamp(max=len(ids))]
            inside = mask.bool() & (place <= len(ids))
            # By the last of many it may have grown into the text: Query: and a quotation mark are one token of some.
            same = (input_ids == expected) | ~inside | (place == len(ids)) & (len(ids) > _LONG_PROMPT)
            prompt = same.all(1, keepdim=True) & (place[:, -1:] >= len(ids)) & inside
            found = prompt if found is None else found | prompt
        return found

    def encode_image(self, pixel_values: Tensor, task: str | None = None) -> Dense2SparseOutput:
        """Sparse vectors of images.

        Args:
            pixel_values: ``(batch, channels, height, width)``, as the folder's processor gives them.
            task: "query" or "document".

        Raises:
            ValueError: The encoder has no tower for images.
        """
        if not self.config.has_images:
            raise ValueError(
                "Dense2SparseForRetrieval: this model's encoder reads texts only. Train a head on a dual encoder "
                "(DualEncoderModel, CLIP, SigLIP, BLIP) for images."
            )
        return self.head(self.encoder.image_vectors(pixel_values), task=task, modality="image")

    def decode(self, embeddings: Tensor, top_k: int | None = None) -> list:
        """See Dense2SparseModel.decode."""
        return self.head.decode(embeddings, top_k)


class CheckedTransformer(ImageInputs, Transformer):
    """The stock Transformer around a model of ours, with images checked first and words read from the right list.

    On its own a SparseEncoder would name a vector's words by the encoder's tokenizer, whose they need not be, and as
    that writes them.
    """

    def on_model_ready(self, model):
        """See :func:`_read_words`."""
        _read_words(model, self.model, self.model.head)


class Dense2SparsePooling(HeadModule, Module):
    """The head as last module behind any SentenceTransformer, which thereby becomes a SparseEncoder.

    It reads ``sentence_embedding``, and for own tokens ``input_ids`` and ``attention_mask``, of the modules before it.
    """

    head_class, inside = Dense2SparseModel, Dense2SparseForRetrievalConfig.model_type
    gives = "vocab_size"
    forward_kwargs = {"task", "expand"}

    def forward(self, features, task=None, expand=True):
        """Replace the batch's ``sentence_embedding`` by sparse vectors, ``(batch, vocab_size)``."""
        vectors, ids = features["sentence_embedding"], features.get("input_ids")
        if ids is not None and len(ids) != len(vectors):
            raise ValueError(
                f"Dense2SparsePooling: {len(vectors)} vectors but input_ids of shape {tuple(ids.shape)}: the encoder "
                "was fed without padding, so a text's own tokens cannot be told apart. Load it with "
                "unpad_inputs=False."
            )
        mask, prompt = features.get("attention_mask"), None
        if mask is not None and ids is not None and features.get("prompt_length") is not None:
            prompt = self.model.prompt_tokens(ids, mask, features["prompt_length"])
        how = {"expand": expand, "modality": features.get("modality", "text"), "prompt": prompt}
        output = self.model(vectors, ids, mask, task, **how)
        return {**features, "sentence_embedding": output.sentence_embedding}

    def on_model_ready(self, model):
        """Refuse a backbone with vectors or a vocabulary of another kind, and warn of other weights."""
        self.check_backbone(model)
        config = self.model.config
        if config.own_tokens == "learned" and list(model)[0] is not self:
            vocabulary = model.tokenizer.get_vocab()
            own = [vocabulary.get(word) == i for i, word in enumerate(self.model.words) if word]
            if max(vocabulary.values(), default=-1) + 1 != config.vocab_size or not all(own):
                raise ValueError(
                    f"Dense2SparsePooling: the backbone's tokenizer has {len(vocabulary):,} entries that are not the "
                    f"{config.vocab_size:,} words of the head, so own tokens would be taken for other words. Use the "
                    "backbone it was trained on, or a head with own_tokens='none'."
                )
        _read_words(model, self.model, self.model)


def _read_words(model, owner, head) -> None:
    """Let a model's ``decode`` read the head's own words where the encoder has others or marks them.

    And tell a head of other words the encoder's tokens, by which it finds where a prompt ends.
    """
    if head.config.foreign_words or head.config.word_mark != "##":
        model.decode = owner.decode
    if head.config.foreign_words and (tokenizer := getattr(model, "tokenizer", None)) is not None:
        head.begin = begin_words_of(tokenizer)


def _towers_of(backbone: str) -> TwoTowers | None:
    """The two towers that a folder or Hub id holds; None if it holds a text encoder."""
    kind = AutoConfig.from_pretrained(backbone, trust_remote_code=False).model_type
    if kind in BOTH_TOWERS:
        encoder = open_both_towers(backbone, "Dense2SparseForRetrieval")
        towers = TwoTowers(TowersConfig(encoder_config=encoder.config, projection_dim=shared_width(encoder.config)))
        towers.encoder = encoder
        return towers.eval()
    if kind != TowersConfig.model_type:
        return None
    model = AutoModel.from_pretrained(backbone, trust_remote_code=False)
    towers = TwoTowers(_encoder_config(model.config, "Dense2SparseForRetrieval")).to(model.dtype)
    towers.load_state_dict(model.state_dict())
    return towers.eval()  # as from_pretrained gives a model


for config, model in (
    (Dense2SparseConfig, Dense2SparseModel),
    (Dense2SparseForRetrievalConfig, Dense2SparseForRetrieval),
):
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModel")
