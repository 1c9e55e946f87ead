"""MetaEmbed: a few learned tokens behind a text become its vectors, and any first ones of them are an index by itself.

After Xiao et al., "MetaEmbed: Scaling Multimodal Retrieval at Test-Time with Flexible Late Interaction" (ICLR 2026,
arXiv 2509.18095). Meta tokens, some for queries and others for documents, stand behind the last token of a text or
page, and their last states are its vectors, for MaxSim. Training scores nested prefixes of them, so that whoever
searches chooses how many there are. With p the backbone's own vector, h_i the state of meta token i, P a projection
where there is one, and unit(x) for x at unit length::

    paper     e_i = unit(P h_i)
    residual  e_i = unit(P unit(p) + W h_i), with W = 0 at first

Where this code leaves the paper:

- ``residual``: a fresh token's state says next to nothing of its text, and a few hundred steps do not teach it to. So
  vectors start as the backbone's, which ranks as it always did, and learn how they are to differ.
- ``isolated``: the text does not see the meta tokens and none of them sees a later one. Then the text is read as the
  backbone reads it, and the first vectors alone equal the first of all. Causal models are so anyway.
- The tokens start as words of the vocabulary, drawn at random: around the mean word they would stay alike.
- The frozen tier is ours: meta tokens over the cached token vectors of any late-interaction model. There p is another
  mean for each vector, around the token that the means before it cover least, so that vectors differ from the start.
"""

# mypy: ignore-errors
# Shipped: it speaks to transformers and torch through attributes that these type as Tensor | Module.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, initialization
from transformers.utils import ModelOutput

from .polyrep_fields import LAYERS, WIDTH, check_weight, checked, keep, part_config, shown
from .polyrep_folder import BESIDE_A_HEAD, WholeWeights, whole_encoder
from .polyrep_room import (
    BaseTokenPooling,
    MultiVectorEncoder,
    SentenceTransformer,
    TokenPoolingModule,
    new_encoder,
    pool_tokens,
    pooling_of,
    text_limit,
    warn_of_no_task,
)
from .polyrep_trunk import Trunk, TrunkTransformer, encoder_width, keep_trunk, read_inputs, readable

VECTORS = (1, 4096)
"""Fewest and most meta tokens of a side."""

PAPER = {
    "num_query_vectors": 16,
    "num_document_vectors": 64,
    "groups": [[1, 1], [2, 4], [4, 8], [8, 16], [16, 64]],
    "residual": False,
    "attention": "full",
}
"""Fields of MetaEmbedConfig as the paper has them."""

FAMILIES = {"token_embeddings": "MultiVectorEncoder", "sentence_embedding": "SentenceTransformer"}
"""Output -> class of sentence-transformers that reads it."""

SHARPNESS = (8.0, 16.0)
"""What a head's means start with, from the first, which is broad, to the last, which is hardly more than one token."""

TOLERANCE = 1e-4
"""By how much states may differ, of their length, that are the same but for rounding."""

_CHOICES = {
    "attention": ("isolated", "full"),
    "query_side": ("meta", "tokens"),
    "output": tuple(FAMILIES),
    "pooling": ("mean", "cls", "lasttoken"),
    "isolation": ("mask", "causal", "none"),
}
_BUDGETS = dict.fromkeys(("num_query_vectors", "num_document_vectors", "query_budget", "document_budget"), VECTORS)


def default_groups(queries: int | None, documents: int) -> list[list[int | None]]:
    """Nested prefixes up to these numbers: (1, 1), (2, 4), (4, 8) and so on, each twice the one before.

    Args:
        queries: Vectors of a query; None where its tokens are kept.
        documents: Vectors of a document.
    """
    groups, step = [], 0
    while not groups or groups[-1] != [queries, documents]:
        number = min(2 ** (step + 1) if step else 1, documents)
        groups.append([None if queries is None else min(2**step, queries), number])
        step += 1
    return groups


class Nested:
    """What the configs share: how many vectors there are, which prefixes are trained, and how many are given."""

    def check_groups(self, name: str) -> None:
        """Set ``groups`` where none are given, and check them and the budgets.

        Raises:
            ValueError: Groups are none, not nested, or do not end with the full numbers; or a budget is beyond these.
        """
        queries = self.num_query_vectors if self.query_side == "meta" else None
        full = [queries, self.num_document_vectors]
        if self.groups is None:
            self.groups = default_groups(*full)
        said, groups = f"{name}: groups={shown(self.groups)} ", [list(group) for group in self.groups]
        if not groups or any(len(group) != 2 for group in groups):
            raise ValueError(f"{said}are no pairs of numbers. Use e.g. {default_groups(*full)}.")
        for asked, found in groups:
            if (asked is None) != (queries is None) or asked is not None and asked < 1 or not found or found < 1:
                raise ValueError(
                    f"{said}has {[asked, found]}, and query_side={self.query_side!r} wants "
                    f"{'null' if queries is None else 'a number from 1'} for queries and a number from 1 for "
                    f"documents. Use e.g. {default_groups(*full)}."
                )
        for before, after in zip(groups, groups[1:], strict=False):
            if before == after or any(a is not None and a > b for a, b in zip(before, after, strict=True)):
                raise ValueError(
                    f"{said}are not nested: {after} does not hold {before}. Put the smaller before the larger."
                )
        if groups[-1] != full:
            raise ValueError(
                f"{said}end with {groups[-1]}, but a query has {queries or 'its tokens'} and a document "
                f"{full[1]} vectors, so some would be {'missing' if _beyond(groups[-1], full) else 'untrained'}. End "
                f"with {full}."
            )
        self.groups = groups
        if queries is None and self.query_budget is not None:
            raise ValueError(
                f"{name}: query_budget={self.query_budget}, but with query_side='tokens' a query keeps its tokens. "
                "Leave it out."
            )
        for task in ("query", "document"):
            if budget := getattr(self, f"{task}_budget"):
                self.check_budget(name, task, budget)

    def check_budget(self, name: str, task: str, budget: int) -> None:
        """ValueError for a number of vectors that a text of this side does not have."""
        number = getattr(self, f"num_{task}_vectors")
        if type(budget) is not int or not 1 <= budget <= number:
            raise ValueError(
                f"{name}: a {task} holds {number} vectors; {shown(budget)} asked. Use 1 to {number}, or train more."
            )

    def budget_of(self, task: str, asked: int | None, training: bool, name: str) -> int:
        """How many vectors of a text are wanted: as many as are asked for, or the budget, or all.

        Args:
            task: ``query`` or ``document``.
            asked: In this call.
            training: All are trained, whatever the budget.
            name: Who asks, for messages.
        """
        if asked is not None:
            self.check_budget(name, task, asked)
            return asked
        number = getattr(self, f"num_{task}_vectors")
        if training:
            return number
        return 1 if self.output == "sentence_embedding" else getattr(self, f"{task}_budget") or number

    @property
    def nested_groups(self) -> list[list[int | None]]:
        """Pairs of numbers, ascending: vectors of a query, None where its tokens are kept, and of a document.

        Prefixes of what is encoded that were trained together; the last is all that is encoded.
        """
        most = [self.query_budget or self.groups[-1][0], self.document_budget or self.groups[-1][1]]
        return [group for group in self.groups if not _beyond(group, most) and group != most] + [most]

    @property
    def view(self) -> str:
        """The output, by the name that ``polyrep.save`` has for it."""
        return self.output

    @view.setter
    def view(self, value: str) -> None:
        self.output = value

    @property
    def similarity_fn_name(self) -> str:
        """How its vectors are scored."""
        return "cosine" if self.output == "sentence_embedding" else "maxsim"


def _beyond(group: list, most: list) -> bool:
    """Whether one of a pair of numbers is larger than that of another pair."""
    return any(a is not None and b is not None and a > b for a, b in zip(group, most, strict=True))


class MetaEmbedConfig(Nested, PretrainedConfig):
    """An encoder and its meta tokens.

    Args:
        encoder_config (dict): Config of the encoder.
        num_query_vectors (int): Meta tokens, and so vectors, of a query.
        num_document_vectors (int): Likewise of a document.
        groups (list): Prefixes that are trained, each a pair: vectors of a query and of a document. The smaller ones
            first, and all at the end. Default: (1, 1), (2, 4), (4, 8), doubling up to the full numbers.
        projection_dim (int): Width of the vectors, to which wider states are projected; None for that of the states.
        residual (bool): Vectors are the backbone's own plus what is learned. Else, as in the paper, states alone.
        attention (str): isolated: the text does not see the meta tokens, nor one of them a later one. full: all see
            all, as the encoder has it.
        query_side (str): meta: a query has vectors of its meta tokens. tokens: it keeps one for each token.
        output (str): token_embeddings for a MultiVectorEncoder; sentence_embedding: vector 1, for cosine.
        pooling (str): What the backbone's own vector is: mean over the text's tokens, cls or lasttoken. Default: the
            backbone's own where there is one, else mean.
        query_budget (int): Vectors of a query that are given where a call asks for no number. Default: all.
        document_budget (int): Likewise of a document.
        isolation (str): What isolates the meta tokens in this encoder: a mask, its causal attention, or none.
        own_projection (bool): Whether the projection came with the backbone.
        max_position_embeddings (int): Tokens that a text can have; -1 where positions have no end.
    """

    model_type = "polyrep_metaembed"
    sub_configs = {"encoder_config": AutoConfig}
    derived = ("isolation", "own_projection", "max_position_embeddings")

    @checked(**_CHOICES, **_BUDGETS, projection_dim=WIDTH, max_position_embeddings=(-1, 2**40))
    def __init__(
        self,
        encoder_config=None,
        num_query_vectors: int = 8,
        num_document_vectors: int = 32,
        groups: list[list[int | None]] | None = None,
        projection_dim: int | None = None,
        residual: bool = True,
        attention: str = "isolated",
        query_side: str = "meta",
        output: str = "token_embeddings",
        pooling: str | None = None,
        query_budget: int | None = None,
        document_budget: int | None = None,
        isolation: str = "mask",
        own_projection: bool = False,
        max_position_embeddings: int = -1,
        **kwargs,
    ):
        pooling = pooling or "mean"
        name = keep(self, locals())
        default = {"model_type": "bert"} if encoder_config is None else encoder_config
        self.encoder_config = part_config(default, name, "encoder_config")
        width = getattr(self.encoder_config.get_text_config(), "hidden_size", None)
        if type(width) is not int or not WIDTH[0] <= width <= WIDTH[1]:
            raise ValueError(
                f"{name}: encoder_config of {self.encoder_config.model_type!r} has hidden_size={shown(width)}, and "
                "states must have one width. Use the config of an encoder of texts or of pages."
            )
        check_weight(name, num_document_vectors=num_document_vectors, hidden_size=width)
        if projection_dim is not None and projection_dim >= width and not own_projection:
            self.projection_dim = projection_dim = None
        check_weight(name, projection_dim=projection_dim or width, hidden_size=width)
        if attention == "isolated" and isolation == "none":
            raise ValueError(
                f"{name}: attention='isolated', but isolation='none': this encoder keeps no mask of ours, so text and "
                "meta tokens would see each other. Use attention='full'."
            )
        self.check_groups(name)
        kwargs.pop("hidden_size", None)
        super().__init__(**kwargs)
        self.hidden_size = projection_dim or width  # the name under which sentence-transformers looks for the width

    @property
    def width(self) -> int:
        """Of the vectors."""
        return self.hidden_size


@dataclass
class MetaEmbedOutput(ModelOutput):
    """What models and head return.

    Attributes:
        sentence_embedding: ``(batch, dim)``, vector 1, if that is the output.
        token_embeddings: ``(batch, vectors, dim)`` of unit length.
        mask: ``(batch, vectors)``, True for vectors that count in a score: all but padding of tokens that are kept.
    """

    sentence_embedding: Tensor | None = None
    token_embeddings: Tensor | None = None
    mask: Tensor | None = None


def made_output(config: Nested, vectors: Tensor, mask: Tensor, single: Tensor | None = None) -> MetaEmbedOutput:
    """Vectors as a config wants them; ``single (batch, dim)`` stands for a text whose vectors are its tokens."""
    if config.output == "token_embeddings":
        return MetaEmbedOutput(token_embeddings=vectors, mask=mask)
    return MetaEmbedOutput(vectors[:, 0] if single is None else single, vectors, mask)


class MetaTokens(nn.Module):
    """The embeddings of the meta tokens: those of queries, then those of documents."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))


class WithMetas:
    """Stands for the ``forward`` of an embedding layer: ids beyond its vocabulary are those of meta tokens.

    The layer stays what it is, and its weights keep their names. An encoder thus makes positions, masks and places of
    images from ids, as it does for words, where vectors in the place of ids would take another way in some.

    Args:
        words: The embedding layer.
        metas: The meta tokens, which are no part of it: adapters that freeze an encoder leave them free.
    """

    def __init__(self, words: nn.Embedding, metas: MetaTokens):
        self.words, self.metas = words, metas

    def __call__(self, input_ids: Tensor, *args, **kwargs) -> Tensor:
        """Embeddings ``(batch, tokens, width)`` of ids ``(batch, tokens)``."""
        size = self.words.num_embeddings
        beyond = input_ids >= size
        found = type(self.words).forward(self.words, input_ids.masked_fill(beyond, 0), *args, **kwargs)
        metas = self.metas.weight[(input_ids - size).clamp(min=0)].to(found.dtype)
        return torch.where(beyond[..., None], metas, found)


@dataclass
class Behind:
    """Where meta tokens stand: directly behind the last token of each text, on whichever side it is padded.

    Attributes:
        source: ``(batch, tokens + metas)`` column that each place had before.
        order: ``(batch, tokens + metas)`` number of the meta token there, from 1; 0 for what was there before.
        columns: ``(batch, metas)`` columns of the meta tokens.
    """

    source: Tensor
    order: Tensor
    columns: Tensor

    @classmethod
    def of(cls, mask: Tensor, count: int) -> Behind:
        """Places of ``count`` meta tokens behind texts with this mask, ``(batch, tokens)``."""
        places = torch.arange(mask.shape[1] + count, device=mask.device)[None]
        ranks = mask.to(torch.int32) * torch.arange(1, mask.shape[1] + 1, device=mask.device, dtype=torch.int32)
        last = ranks.argmax(1, keepdim=True)  # (batch, 1)
        behind = places - last  # (batch, tokens + count)
        order = torch.where((behind > 0) & (behind <= count), behind, 0)
        source = torch.where(behind > 0, places - count, places).clamp(min=0)
        return cls(source, order, last + 1 + torch.arange(count, device=mask.device))

    def spread(self, values: Tensor, at_metas: Tensor | int) -> Tensor:
        """Values of tokens ``(batch, tokens)`` with others at the meta tokens: ``(batch, tokens + metas)``."""
        moved = values.gather(1, self.source)
        return torch.where(self.order > 0, torch.as_tensor(at_metas, device=values.device).to(values.dtype), moved)

    def seen(self, mask: Tensor, window: int | None = None) -> Tensor:
        """Which place sees which: ``(batch, 1, tokens + metas, tokens + metas)``.

        A text sees its tokens, and a meta token sees these, the ones before it and itself. A place that sees nothing
        sees itself, since attention to nothing is no number.

        Args:
            mask: ``(batch, tokens + metas)`` of places that count.
            window: Most columns between two places that see each other; None for any.
        """
        seen = mask[:, None, :] & (self.order[:, None, :] <= self.order[:, :, None])
        places = torch.arange(mask.shape[1], device=mask.device)
        apart = (places[:, None] - places[None]).abs()
        if window is not None:
            seen = seen & (apart <= window)
        return (seen | (apart == 0))[:, None]


class MetaEmbedModel(WholeWeights, PreTrainedModel):
    """An encoder and its meta tokens in one state dict.

    Attributes:
        view_families: Output -> class of sentence-transformers that reads it.
    """

    config_class = MetaEmbedConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # not flash attention, which takes no mask of ours
    view_families = FAMILIES

    def __init__(self, config):
        super().__init__(config)
        width = encoder_width(config.encoder_config)
        self.encoder = new_encoder(config.encoder_config)
        self._reads = readable(self.encoder)
        self.metas = MetaTokens(config.num_query_vectors + config.num_document_vectors, width)
        if config.projection_dim:
            self.projection = nn.Linear(width, config.projection_dim)
        if config.residual:
            self.residual = nn.Linear(width, config.width, bias=False)
        self.attach()
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if module is getattr(self, "residual", None):
            initialization.zeros_(module.weight)
        elif module is getattr(self, "projection", None):
            initialization.orthogonal_(module.weight)
            initialization.zeros_(module.bias)
        elif module is self.metas:
            initialization.normal_(module.weight, std=0.02)

    def attach(self) -> None:
        """Have the encoder's embedding layer know the meta tokens, and what else has the same words (T5's stack).

        Raises:
            ValueError: There is none.
        """
        words = self.words
        for part in self.encoder.modules():
            if isinstance(part, PreTrainedModel) and (found := embeddings_of(part)) is not None:
                if found.weight.shape == words.weight.shape:
                    found.forward = WithMetas(found, self.metas)

    @property
    def words(self) -> nn.Embedding:
        """The encoder's embedding layer."""
        return words_of(self.encoder, type(self).__name__)

    @classmethod
    def from_encoder(cls, backbone: str, **config) -> MetaEmbedModel:
        """An untrained model on the encoder of any embedding model, causal language model or vision-language model.

        Args:
            backbone: Folder or Hub id of a SentenceTransformer of a transformer and one pooling, of a bare encoder, or
                of a page retriever of transformers (ColQwen2), whose projection it takes.
            config: Fields of MetaEmbedConfig.

        Raises:
            ValueError: The backbone has other modules or no embeddings of words, a text could have no token, or with
                ``attention="isolated"`` the encoder does not keep the mask that isolates meta tokens.
        """
        if _is_retrieval(str(backbone)):
            model = MultiVectorEncoder(str(backbone), device="cpu")
            whole = model[0].model
            encoder, projection = getattr(whole, "vlm", None), getattr(whole, "embedding_proj_layer", None)
            if encoder is None or not isinstance(projection, nn.Linear):
                raise ValueError(
                    f"{cls.__name__}: {backbone} is a {type(whole).__name__}, which has no vlm and no "
                    "embedding_proj_layer as ColQwen2 has. Name a ColQwen2, or its language model by itself."
                )
            whole_encoder(whole, cls.__name__)
            return cls.around(encoder, model.tokenizer, projection, **config)
        return cls.from_modules(SentenceTransformer(str(backbone), device="cpu"), **config)

    @classmethod
    def from_modules(cls, model, **config) -> MetaEmbedModel:
        """Likewise of an opened SentenceTransformer."""
        pooling = "mean"
        if [type(module).__name__ for module in model] not in (["Transformer"], ["Backbone"]):
            remedy = "Take its transformer alone: SentenceTransformer(modules=[model[0]])."
            pooling, _ = pooling_of(model, cls.__name__, _CHOICES["pooling"], remedy)
        encoder = getattr(model[0], "model", None)
        if not isinstance(encoder, PreTrainedModel):
            raise ValueError(
                f"{cls.__name__}: the backbone begins with {type(model[0]).__name__}, which is no transformer. Name "
                "another one."
            )
        config["pooling"] = config.get("pooling") or pooling
        return cls.around(whole_encoder(encoder, cls.__name__), model.tokenizer, **config)

    @classmethod
    @torch.no_grad()
    def around(
        cls, encoder: PreTrainedModel, tokenizer, projection: nn.Linear | None = None, **config
    ) -> MetaEmbedModel:
        """A model that holds this very encoder, of which no second one is made.

        Args:
            encoder: Becomes part of the model.
            tokenizer: Says which words meta tokens can start as.
            projection: That of the backbone, if it has one.
            config: Fields of MetaEmbedConfig.
        """
        name = cls.__name__
        words = words_of(encoder, name)
        given = config.get("projection_dim")
        if projection is not None and given not in (None, projection.out_features):
            raise ValueError(
                f"{name}: projection_dim={given}, but the backbone's own projection has width "
                f"{projection.out_features}. Leave projection_dim out."
            )
        fields = {"projection_dim": given if projection is None else projection.out_features}
        fields |= {"own_projection": projection is not None}
        config = MetaEmbedConfig(encoder_config=encoder.config, **config | fields)
        metas = max(config.num_query_vectors, config.num_document_vectors)
        limit = text_limit(encoder)
        if limit > 0:
            least = tokenizer.num_special_tokens_to_add() + 1
            if limit - metas < least:
                raise ValueError(
                    f"{name}: {metas} meta tokens, but the encoder has positions for {limit} tokens, so "
                    f"{max(0, limit - metas)} of a text would be left. Use {limit - least} or fewer."
                )
            config.max_position_embeddings = limit - metas
        with torch.device("meta"):
            whole = cls(config)
        width = words.weight.shape[1]
        whole.encoder, whole.metas = encoder, MetaTokens(len(whole.metas.weight), width)
        whole._reads = readable(encoder)
        start = torch.tensor(_plain_words(tokenizer, words.num_embeddings))
        drawn = start[torch.randperm(len(start)).repeat(-(-len(whole.metas.weight) // len(start)))]
        ids = drawn[: len(whole.metas.weight)].to(words.weight.device)
        whole.metas.weight.copy_(words(ids[None])[0])  # as the layer gives them: Gemma's scales
        for part, of in (("projection", projection), ("residual", None)):
            if hasattr(whole, part):
                made = getattr(whole, part).to_empty(device=words.weight.device)
                whole._init_weights(made)
                if of is not None:
                    made.weight.copy_(of.weight)
                    made.bias.copy_(0 if of.bias is None else of.bias)
        whole.attach()
        whole.to(encoder.dtype)
        config.isolation = whole.probe(start)
        if config.attention == "isolated" and config.isolation == "none":
            raise ValueError(
                f"{name}: {type(encoder).__name__} does not keep a mask of ours: behind a text, meta tokens change "
                "its states, or a later one those before it, so fewer vectors would not be the first of all. Use "
                "another backbone, e.g. BERT, ModernBERT or a causal language model, or attention='full'."
            )
        return whole

    @torch.no_grad()
    def probe(self, words: Tensor) -> str:
        """What isolates meta tokens in the encoder, tried: ``causal``, a ``mask``, or ``none``.

        Args:
            words: Ids that texts can be made of.
        """
        window = _window(self.encoder.config)
        length, most = 12 if window is None else window + 12, self.config.max_position_embeddings
        length = min(length, most) if most > 0 else length
        ids = words[torch.arange(2 * length) % len(words)].view(2, length).to(self.words.weight.device)
        mask = torch.ones_like(ids)
        mask[1, length - length // 4 :] = 0
        training, config = self.training, self.config
        before = config.isolation
        self.eval()
        try:
            plain = self._states({"input_ids": ids, "attention_mask": mask})
            for config.isolation in ("causal", "mask"):
                if self._isolated(ids, mask, plain):
                    return config.isolation
            return "none"
        finally:
            config.isolation = before
            self.train(training)

    def _isolated(self, ids: Tensor, mask: Tensor, plain: Tensor) -> bool:
        """Whether text and first meta tokens are as they are by themselves, with more tokens behind them."""
        found = []
        for count in (2, min(4, self.config.num_document_vectors + self.config.num_query_vectors)):
            try:
                states, where = self._with_metas({"input_ids": ids, "attention_mask": mask}, count, 0, True)
            except (ValueError, RuntimeError, TypeError, IndexError, AttributeError):  # it takes no such mask
                return False
            if not states.isfinite().all():
                return False
            text = torch.arange(ids.shape[1], device=ids.device)[None] < mask.sum(1, keepdim=True)
            if not _alike(states[:, : ids.shape[1]][text], plain[text]):
                return False
            found.append(_at(states, where.columns))
        return _alike(found[1][:, :2], found[0][:, : found[1].shape[1]])

    @property
    def width(self) -> int:
        """Of its vectors."""
        return self.config.width

    @property
    def nested_groups(self) -> list[list[int | None]]:
        """See :attr:`Nested.nested_groups`."""
        return self.config.nested_groups

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        task: str | None = None,
        num_vectors: int | None = None,
        **kwargs,
    ) -> MetaEmbedOutput:
        """Vectors of texts or pages.

        Args:
            input_ids: ``(batch, tokens)``.
            attention_mask: ``(batch, tokens)``; default: all tokens count.
            task: "query", else a document.
            num_vectors: The first so many vectors; default: the config's budget, or all.
            kwargs: What else the encoder reads, such as ``pixel_values``.

        Raises:
            ValueError: More vectors than there are, or more tokens than the encoder has positions for.
        """
        warn_of_no_task(self, task)
        config, name = self.config, type(self).__name__
        limit = config.max_position_embeddings
        followed = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if not followed and 0 < limit < input_ids.shape[1]:
            raise ValueError(
                f"{name}: texts of {input_ids.shape[1]} tokens, but with meta tokens behind them the encoder has "
                f"positions for {limit}. Cut them: max_seq_length={limit}, or truncation=True, max_length={limit}."
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        inputs = read_inputs({**kwargs, "input_ids": input_ids, "attention_mask": mask}, self._reads)
        side = "query" if task == "query" else "document"
        if side == "query" and config.query_side == "tokens":
            if num_vectors is not None:
                raise ValueError(
                    f"{name}: {num_vectors} vectors asked, but a query keeps one for each token "
                    "(query_side='tokens'). Leave num_vectors out."
                )
            states = self._states(inputs)
            vectors = F.normalize(self._projected(states), dim=-1)
            single = F.normalize(self._projected(pool_tokens(states, mask, config.pooling)), dim=-1)
            return made_output(config, vectors, mask.bool(), single)
        count = config.budget_of(side, num_vectors, self.training, name)
        isolated = config.attention == "isolated" or config.isolation == "causal"
        run = count if isolated else getattr(config, f"num_{side}_vectors")
        offset = 0 if side == "query" else config.num_query_vectors
        states, where = self._with_metas(inputs, run, offset, config.attention == "isolated")
        metas = _at(states, where.columns)  # (batch, run, width)
        if config.residual:
            text = where.spread(mask, 0)
            pooled = F.normalize(pool_tokens(states, text, config.pooling), dim=-1)
            vectors = self._projected(pooled)[:, None] + self.residual(metas)
        else:
            vectors = self._projected(metas)
        vectors = F.normalize(vectors, dim=-1)[:, :count]
        return made_output(config, vectors, torch.ones_like(vectors[..., 0], dtype=torch.bool))

    def pooled(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        """The backbone's own vector of texts, of unit length and before the projection: ``(batch, width)``."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        inputs = read_inputs({**kwargs, "input_ids": input_ids, "attention_mask": mask}, self._reads)
        return F.normalize(pool_tokens(self._states(inputs), mask, self.config.pooling), dim=-1)

    def _projected(self, states: Tensor) -> Tensor:
        return self.projection(states) if self.config.projection_dim else states

    def _states(self, inputs: dict) -> Tensor:
        """Last states ``(batch, tokens, width)``."""
        grid, pixels = inputs.get("image_grid_thw"), inputs.get("pixel_values")
        if grid is not None and pixels is not None and pixels.ndim == 3:  # ColQwen2's processor pads pages
            patches = grid[:, 1] * grid[:, 2]
            there = torch.arange(pixels.shape[1], device=pixels.device) < patches[:, None]
            inputs = {**inputs, "pixel_values": pixels[there]}
        image = getattr(self.encoder.config, "image_token_id", None)
        if grid is not None and image is not None and inputs.get("mm_token_type_ids") is None:  # nor does it say
            inputs = {**inputs, "mm_token_type_ids": (inputs["input_ids"] == image).to(inputs["input_ids"].dtype)}
        return self.encoder(**inputs, return_dict=True).last_hidden_state

    def _with_metas(self, inputs: dict, count: int, offset: int, isolated: bool) -> tuple[Tensor, Behind]:
        """Last states of texts with meta tokens behind them, and where these stand.

        Args:
            inputs: What the encoder reads, of texts alone.
            count: Meta tokens.
            offset: Number of the first.
            isolated: Whether a mask isolates them, where the encoder needs one.
        """
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        where = Behind.of(mask, count)
        spread = {"input_ids": where.spread(ids, self.words.num_embeddings + offset + where.order - 1)}
        for name, value in inputs.items():
            if name not in spread and isinstance(value, Tensor) and value.shape == ids.shape:  # kinds of tokens: 0
                spread[name] = where.spread(value, 1 if name == "attention_mask" else 0)
        if isolated and self.config.isolation != "causal":
            spread["attention_mask"] = self._masks(where, spread["attention_mask"].bool())
        return self._states({**inputs, **spread}), where

    def _masks(self, where: Behind, mask: Tensor) -> Tensor | dict[str, Tensor]:
        """What isolates meta tokens, added to scores of attention; of an encoder with windows, for each kind."""
        dtype = self.words.weight.dtype

        def added(window: int | None = None) -> Tensor:
            seen = where.seen(mask, window)
            return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)

        window = _window(self.encoder.config)
        return added() if window is None else {"full_attention": added(), "sliding_attention": added(window)}


def embeddings_of(model: PreTrainedModel) -> nn.Embedding | None:
    """The embedding layer of a model's words; None if it has none."""
    try:
        words = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return words if isinstance(words, nn.Embedding) else None


def words_of(encoder: nn.Module, owner: str) -> nn.Embedding:
    """The embedding layer of an encoder's words; ValueError if it has none, or reads no ids."""
    words = embeddings_of(encoder)
    if words is None or "input_ids" not in (readable(encoder) or ("input_ids",)):
        raise ValueError(
            f"{owner}: {type(encoder).__name__} has no embeddings of words for meta tokens to stand among. Use an "
            "encoder of texts, or a vision-language model that reads both in one sequence."
        )
    return words


def _is_retrieval(backbone: str) -> bool:
    """Whether a folder or repository is a page retriever of transformers (ColQwen2)."""
    try:
        content, _ = PretrainedConfig.get_config_dict(backbone)
    except OSError:  # its transformer lies in a folder inside
        return False
    return str(next(iter(content.get("architectures") or [""]))).endswith("ForRetrieval")


def _plain_words(tokenizer, size: int) -> list[int]:
    """Ids of a vocabulary that are no special tokens."""
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}
    return [i for i in range(min(size, len(tokenizer))) if i not in special] or [0]


def _window(config: PretrainedConfig) -> int | None:
    """Most columns between two tokens that see each other in some layers of an encoder that is not causal."""
    text = config.get_text_config()
    if "sliding_attention" not in (getattr(text, "layer_types", None) or ()):
        return None
    return getattr(text, "sliding_window", None)


def _at(states: Tensor, columns: Tensor) -> Tensor:
    """States ``(batch, tokens, width)`` at some columns of each text, ``(batch, columns)``."""
    return states.gather(1, columns[..., None].expand(-1, -1, states.shape[-1]))


def _alike(found: Tensor, expected: Tensor) -> bool:
    """Whether states are the same but for rounding."""
    tolerance = TOLERANCE if found.dtype == torch.float32 else 0.05
    off = (found - expected).float().norm(dim=-1)
    return bool((off <= tolerance * expected.float().norm(dim=-1).clamp(min=1e-6)).all())


class MetaEmbedTransformer(TrunkTransformer):
    """The stock Transformer around one of our models: all vectors of a text, or vector 1, as its config says."""

    def forward(self, features, task=None, **kwargs):
        """Add ``token_embeddings`` and their ``attention_mask``, or ``sentence_embedding``."""
        given = {**features, **kwargs}
        if task is not None:  # trainers put it into the batch, by their router_mapping
            given["task"] = task
        output = self.model(**given)
        if output.get("sentence_embedding") is not None:
            features["sentence_embedding"] = output.sentence_embedding
        else:
            features["token_embeddings"], features["attention_mask"] = output.token_embeddings, output.mask
        return features

    def get_config_dict(self):
        """As the stock one has it, with the output that the model gives now."""
        found, output = super().get_config_dict(), self.model.config.output
        told = {modality: how | {"method_output_name": output} for modality, how in found["modality_config"].items()}
        return found | {"module_output_name": output, "modality_config": told}

    def on_model_ready(self, model):
        """Check that the family reads the output."""
        _check_family(model, self.model.config, type(self).__name__)


class MetaEmbedBudget(BaseTokenPooling):
    """The first vectors of each text alone: a smaller index, or a cheaper query, of what was encoded once.

    ``model.encode_document(texts, token_pooling=MetaEmbedBudget(4))`` gives what the first four vectors of
    ``model.encode_document(texts)`` are.

    Args:
        n: Vectors that are kept.
        tasks: What it applies to; default: queries and documents, whichever are encoded.
    """

    config_keys = ["n", "tasks"]

    def __init__(self, n: int, tasks: str | list[str] | None = None):
        super().__init__(tasks=tasks or ["query", "document"])
        if type(n) is not int or n < 1:
            raise ValueError(f"MetaEmbedBudget: n={n!r} is no number of vectors. Use 1 or more.")
        self.n = n

    def forward(self, features, task=None):
        """Cut a batch."""
        if self.applies_to(task) and len(features["token_embeddings"]):
            tokens, mask = features["token_embeddings"], features["attention_mask"].bool()
            features["token_embeddings"] = self._first(tokens, mask, task)
            features["attention_mask"] = torch.ones_like(features["token_embeddings"][..., 0], dtype=torch.bool)
        return features

    def pool(self, embeddings, *, task=None, attention_mask=None, padding_side="right"):
        """Cut encoded texts: a list of ``(vectors, dim)``, or a padded ``(batch, vectors, dim)``.

        Args:
            embeddings: Vectors of each text.
            task: What they were encoded for.
            attention_mask: ``(batch, vectors)`` of a padded tensor; default: rows that are not zero.
            padding_side: Of no account, since the result has no padding.

        Raises:
            ValueError: A text has fewer vectors.
        """
        if not self.applies_to(task) or not len(embeddings):
            return embeddings
        if isinstance(embeddings, Tensor):
            mask = embeddings.abs().sum(-1) > 0 if attention_mask is None else attention_mask.bool()
            return self._first(embeddings, mask, task)
        return [self.pool_one(vectors, task=task) for vectors in embeddings]

    def pool_one(self, embedding, task=None, **kwargs):
        """One text, ``(vectors, dim)`` to ``(n, dim)``."""
        self._refuse(len(embedding), task)
        return embedding[: self.n]

    def _first(self, vectors: Tensor, mask: Tensor, task: str | None) -> Tensor:
        """The first vectors that count of each text: ``(batch, n, dim)``."""
        self._refuse(int(mask.sum(1).min()), task)
        places = mask.int().argsort(dim=1, descending=True, stable=True)[:, : self.n]
        return _at(vectors, places)

    def _refuse(self, held: int, task: str | None) -> None:
        if self.n > held:
            raise ValueError(
                f"MetaEmbedBudget: a {task or 'document'} holds {held} vectors; {self.n} asked. Use up to {held}, or "
                "a model that was trained for more."
            )


class MetaEmbedHeadConfig(Nested, PretrainedConfig):
    """Meta tokens over the token vectors of a frozen late-interaction model.

    Args:
        dim (int): Width of the token vectors.
        num_query_vectors (int): Vectors of a query.
        num_document_vectors (int): Vectors of a document.
        groups (list): See MetaEmbedConfig.
        projection_dim (int): Width of the vectors, to which wider token vectors are projected; None for theirs.
        residual (bool): Meta tokens, and what they give, are added to means of the token vectors; else they are alone.
        covering (bool): Each mean after the first is around the token that those before it cover least; else all are
            the mean of all tokens.
        query_side (str): meta: a query has vectors of its own meta tokens. tokens: it keeps its token vectors.
        output (str): token_embeddings for a MultiVectorEncoder; sentence_embedding: vector 1, for cosine.
        query_budget (int): Vectors of a query that are given where a call asks for no number. Default: all.
        document_budget (int): Likewise of a document.
        num_layers (int): Layers through which meta tokens look at the token vectors and at those before them.
        num_heads (int): Attention heads of a layer. Default: one for 64 dimensions, where that divides dim.
        ffn_mult (int): Width of a layer's feed-forward part over dim.
        dropout (float): While training.
    """

    model_type = "polyrep_metaembed_head"
    derived = ("dim",)

    @checked(
        query_side=_CHOICES["query_side"],
        output=_CHOICES["output"],
        **_BUDGETS,
        dim=WIDTH,
        projection_dim=WIDTH,
        num_layers=(1, LAYERS[1]),
        num_heads=WIDTH,
        ffn_mult=(1, 64),
        dropout=(0, 0.999),
    )
    def __init__(
        self,
        dim: int = 128,
        num_query_vectors: int = 8,
        num_document_vectors: int = 32,
        groups: list[list[int | None]] | None = None,
        projection_dim: int | None = None,
        residual: bool = True,
        covering: bool = True,
        query_side: str = "meta",
        output: str = "token_embeddings",
        query_budget: int | None = None,
        document_budget: int | None = None,
        num_layers: int = 1,
        num_heads: int | None = None,
        ffn_mult: int = 2,
        dropout: float = 0.0,
        **kwargs,
    ):
        num_heads = num_heads or next(count for count in range(max(1, dim // 64), 0, -1) if dim % count == 0)
        projection_dim = None if projection_dim is None or projection_dim >= dim else projection_dim
        name = keep(self, locals())
        check_weight(name, dim=dim, width=dim, ffn_mult=ffn_mult)
        check_weight(name, num_document_vectors=num_document_vectors, dim=dim)
        check_weight(name, projection_dim=projection_dim or dim, dim=dim)
        if dim % num_heads:
            fitting = next(count for count in range(min(num_heads, dim), 0, -1) if dim % count == 0)
            raise ValueError(
                f"{name}: num_heads={num_heads} does not divide dim={dim}, so attention heads would be uneven. Use a "
                f"divisor of {dim}, e.g. {fitting}."
            )
        self.check_groups(name)
        kwargs.pop("hidden_size", None)
        super().__init__(**kwargs)
        self.hidden_size = projection_dim or dim  # the name under which sentence-transformers looks for the width

    @property
    def width(self) -> int:
        """Of the vectors."""
        return self.projection_dim or self.dim


class Layer(nn.Module):
    """Meta tokens look at the token vectors, and at the meta tokens before them; norms first, both parts residual."""

    def __init__(self, config: MetaEmbedHeadConfig):
        super().__init__()
        dim, hidden = config.dim, config.ffn_mult * config.dim
        self.heads, self.dropout = config.num_heads, config.dropout
        self.norm, self.token_norm, self.ffn_norm = (nn.LayerNorm(dim) for _ in range(3))
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.ffn_in, self.ffn_out = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, metas: Tensor, tokens: Tensor, seen: Tensor) -> Tensor:
        """Meta tokens ``(batch, n, dim)`` over tokens ``(batch, m, dim)``; ``seen (batch, n, m + n)``."""
        normed = self.norm(metas)
        context = torch.cat([self.token_norm(tokens), normed], 1)
        split = (metas.shape[0], -1, self.heads, metas.shape[-1] // self.heads)
        query, key, value = (
            part(x).view(split).transpose(1, 2)  # (batch, heads, n or m + n, dim / heads)
            for part, x in ((self.query, normed), (self.key, context), (self.value, context))
        )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen[:, None], dropout_p=dropout)
        metas = metas + F.dropout(self.out(mixed.transpose(1, 2).flatten(2)), dropout)
        return metas + F.dropout(self.ffn_out(F.gelu(self.ffn_in(self.ffn_norm(metas)))), dropout)


class MetaEmbedHead(WholeWeights, PreTrainedModel):
    """The head: token vectors of a text to a few vectors, any first ones of which are enough."""

    config_class = MetaEmbedHeadConfig
    _keys_to_ignore_on_load_unexpected = BESIDE_A_HEAD
    _supports_sdpa = _supports_flash_attn = True  # so that it may sit behind any backbone

    def __init__(self, config):
        super().__init__(config)
        count = config.num_query_vectors + config.num_document_vectors
        self.metas = MetaTokens(count, config.dim)
        if config.residual and config.covering:
            self.sharpness = MetaTokens(count, 1)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim)
        if config.projection_dim:
            self.projection = nn.Linear(config.dim, config.projection_dim, bias=False)
        self.residual = nn.Linear(config.dim, config.width, bias=False)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if module is getattr(self, "sharpness", None):
            counts = self.config.num_query_vectors, self.config.num_document_vectors
            start = torch.cat([torch.linspace(*SHARPNESS, count) for count in counts])
            initialization.copy_(module.weight, start[:, None])
        elif module is self.metas:
            initialization.normal_(module.weight)
        elif module is getattr(self, "projection", None):
            initialization.orthogonal_(module.weight)
        elif module is self.residual:  # vectors start as means
            if self.config.residual:
                initialization.zeros_(module.weight)
            else:
                initialization.orthogonal_(module.weight)

    @classmethod
    def from_backbone(cls, model, **config) -> MetaEmbedHead:
        """An untrained head, whose vectors are means of token vectors, for a MultiVectorEncoder."""
        return cls(MetaEmbedHeadConfig(dim=model.get_embedding_dimension(), **config))

    @property
    def nested_groups(self) -> list[list[int | None]]:
        """See :attr:`Nested.nested_groups`."""
        return self.config.nested_groups

    def forward(
        self,
        token_embeddings: Tensor,
        attention_mask: Tensor | None = None,
        task: str | None = None,
        num_vectors: int | None = None,
        **kwargs,
    ) -> MetaEmbedOutput:
        """Vectors of texts.

        Args:
            token_embeddings: ``(batch, tokens, dim)``, padded.
            attention_mask: ``(batch, tokens)``, True where there is a token; default: all.
            task: "query", else a document.
            num_vectors: The first so many vectors; default: the config's budget, or all.
            kwargs: Ignored.

        Raises:
            ValueError: Another width than the config's, a text without a token, a vector that is not finite or is
                zero, or more vectors than there are.
        """
        config, name, dtype = self.config, type(self).__name__, token_embeddings.dtype
        warn_of_no_task(self, task)
        mask = torch.ones_like(token_embeddings[..., 0]) if attention_mask is None else attention_mask
        mask = mask.bool()
        self._check(token_embeddings, mask)
        tokens = torch.where(mask[..., None], token_embeddings, 0).to(self.metas.weight.dtype)
        side = "query" if task == "query" else "document"
        if side == "query" and config.query_side == "tokens":
            if num_vectors is not None:
                raise ValueError(
                    f"{name}: {num_vectors} vectors asked, but a query keeps its token vectors "
                    "(query_side='tokens'). Leave num_vectors out."
                )
            kept = F.normalize(self.projection(tokens), dim=-1) if config.projection_dim else tokens
            kept = torch.where(mask[..., None], kept, 0).to(dtype)
            mean = self._projected(F.normalize(pool_tokens(tokens, mask, "mean"), dim=-1))
            return made_output(config, kept, mask, F.normalize(mean, dim=-1).to(dtype))
        count = config.budget_of(side, num_vectors, self.training, name)
        first = 0 if side == "query" else config.num_query_vectors
        chosen = slice(first, first + count)
        metas = self.metas.weight[chosen].expand(tokens.shape[0], -1, -1)  # (batch, count, dim)
        if config.residual:
            # Of the first mean alone, the sharpness has no part in it.
            means = self._means(tokens, mask, self.sharpness.weight[chosen] if config.covering else metas[0, :1, :1])
            metas = metas + config.dim**0.5 * means  # as long as a meta token is at first
        before = torch.ones(count, count, dtype=torch.bool, device=tokens.device).tril()
        seen = torch.cat([mask[:, None].expand(-1, count, -1), before.expand(tokens.shape[0], -1, -1)], -1)
        for layer in self.layers:
            metas = layer(metas, tokens, seen)
        vectors = self.residual(self.norm(metas))
        if config.residual:
            vectors = vectors + self._projected(means)
        vectors = F.normalize(vectors, dim=-1).to(dtype)
        return made_output(config, vectors, torch.ones_like(vectors[..., 0], dtype=torch.bool))

    def _means(self, tokens: Tensor, mask: Tensor, sharpness: Tensor) -> Tensor:
        """Means of token vectors, ``(batch, n, width)``, each around the token that those before it cover least.

        The first is the mean of all. A token is covered as well as the most like of the means so far is to it. The
        next mean is around the one that is covered least: each token counts by the exponential of its cosine to that
        one, times ``sharpness (n, 1)``. So any first means are those of a call that asks for no more.
        """
        unit = F.normalize(tokens, dim=-1)
        centres, covered = [], torch.full_like(unit[..., 0], -1.0).masked_fill(~mask, torch.inf)
        with torch.no_grad():  # which token is next has no gradient
            mean = F.normalize(pool_tokens(tokens, mask, "mean"), dim=-1)
            for sharp in sharpness[1:]:
                covered = torch.maximum(covered, (unit @ mean[..., None])[..., 0])  # (batch, tokens)
                place = covered.argmin(1)[:, None, None].expand(-1, -1, unit.shape[-1])
                centre = unit.gather(1, place)[:, 0]
                centres.append(centre)
                near = (unit @ centre[..., None])[..., 0].masked_fill(~mask, -torch.inf)
                mean = F.normalize((torch.softmax(sharp * near, 1)[:, None] @ tokens)[:, 0], dim=-1)
        first = F.normalize(pool_tokens(tokens, mask, "mean"), dim=-1)[:, None]
        if not centres:
            return first
        near = sharpness[1:] * (torch.stack(centres, 1) @ unit.transpose(1, 2))  # (batch, n - 1, tokens)
        shares = near.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
        return torch.cat([first, F.normalize(shares @ tokens, dim=-1)], 1)

    def _projected(self, vectors: Tensor) -> Tensor:
        return self.projection(vectors) if self.config.projection_dim else vectors

    def _check(self, tokens: Tensor, mask: Tensor) -> None:
        config, name = self.config, type(self).__name__
        if tokens.ndim != 3 or tokens.shape[-1] != config.dim:
            raise ValueError(
                f"{name}: token vectors of shape {tuple(tokens.shape)}, but the head was made for (texts, tokens, "
                f"{config.dim}). Use the backbone it was trained on ({config.base_model_id or 'not recorded'}), or "
                "train a head for this one."
            )
        if mask.shape != tokens.shape[:2]:
            raise ValueError(
                f"{name}: a mask of shape {tuple(mask.shape)} for tokens {tuple(tokens.shape)}. Use one of "
                f"{tuple(tokens.shape[:2])}."
            )
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # a graph cannot look at the numbers
            return
        norms = tokens.float().norm(dim=-1)  # one pass finds NaN, infinity and zero
        bad = (mask & ~((norms > 0) & norms.isfinite())).any(1)
        empty = ~mask.any(1)
        if bool((bad | empty).any()):
            row = int((bad | empty).nonzero()[0])
            why = "no token that counts" if empty[row] else "a token vector that is zero or not finite"
            raise ValueError(
                f"{name}: text {row} of the batch has {why}, so its vectors would mean nothing. Leave empty texts "
                "out, or loosen the skiplist of the backbone; if it has tokens, use float32."
            )


class MetaEmbedForRetrievalConfig(MetaEmbedHeadConfig):
    """A late-interaction model and the head in one.

    Args:
        encoder_config (dict): Config of the encoder.
        trunk (list): Modules behind the encoder, see :func:`keep_trunk`.
    """

    model_type = "polyrep_metaembed_for_retrieval"
    sub_configs = {"encoder_config": AutoConfig}

    @checked()
    def __init__(self, encoder_config=None, trunk=None, **kwargs):
        width = keep_trunk(self, encoder_config, trunk)
        super().__init__(**{"dim": width} | kwargs)
        if self.dim != width:
            raise ValueError(
                f"{type(self).__name__}: dim={self.dim}, but encoder and trunk give token vectors of width {width}, "
                "so the head belongs to others. Use those that it was trained on."
            )


class MetaEmbedForRetrieval(WholeWeights, Trunk, PreTrainedModel):
    """A late-interaction model and the head in one state dict.

    Attributes:
        view_families: Output -> class of sentence-transformers that reads it.
    """

    config_class = MetaEmbedForRetrievalConfig
    otherwise = (
        "Put the head behind it: MultiVectorEncoder(modules=[*backbone.children(), MetaEmbedPooling(...)]), "
        "or --pipeline true."
    )
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = True
    view_families = FAMILIES

    def __init__(self, config):
        super().__init__(config)
        self.add_trunk(config)
        self.head = MetaEmbedHead(config)
        self.post_init()

    @property
    def width(self) -> int:
        """Of its vectors."""
        return self.config.width

    @property
    def nested_groups(self) -> list[list[int | None]]:
        """See :attr:`Nested.nested_groups`."""
        return self.config.nested_groups

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        task: str | None = None,
        num_vectors: int | None = None,
        **kwargs,
    ) -> MetaEmbedOutput:
        """Vectors of texts or pages.

        Args:
            input_ids: ``(batch, tokens)``.
            attention_mask: ``(batch, tokens)``; default: all tokens count.
            task: "query", else a document.
            num_vectors: The first so many vectors; default: the config's budget, or all.
            kwargs: What else the encoder reads.

        Raises:
            ValueError: See ``MetaEmbedHead``.
        """
        tokens, mask = self.token_vectors(input_ids, attention_mask, task, **kwargs)
        return self.head(tokens, mask, task, num_vectors)


class MetaEmbedPooling(TokenPoolingModule):
    """The head as token pooling: for one call, by itself, or as last module behind any MultiVectorEncoder.

    With ``output="sentence_embedding"`` it makes a SentenceTransformer of the same modules: vector 1 of each text.
    """

    head_class, inside = MetaEmbedHead, MetaEmbedForRetrievalConfig.model_type
    reads, gives = "dim", "width"
    changeable = {"output", "query_budget", "document_budget"} | TokenPoolingModule.changeable

    def __init__(self, model: MetaEmbedHead):
        super().__init__(model)
        self.tasks = ["query", "document"]

    def applies_to(self, task):
        """Every text is pooled: what is no query is a document."""
        return True

    @property
    def nested_groups(self) -> list[list[int | None]]:
        """See :attr:`Nested.nested_groups`."""
        return self.model.nested_groups

    def forward(self, features, task=None):
        """Replace a batch's token vectors by few, or add vector 1."""
        tokens, mask = features["token_embeddings"], features["attention_mask"].bool()
        warn_of_no_task(self, task)
        if len(tokens):
            output = self._run(tokens, mask, task)
            if output.sentence_embedding is not None:
                features["sentence_embedding"] = output.sentence_embedding
            else:
                features["token_embeddings"], features["attention_mask"] = output.token_embeddings, output.mask
        return features

    def on_model_ready(self, model):
        """Check the backbone, and that the family reads the output."""
        _check_family(model, self.model.config, type(self).__name__)
        self.check_backbone(model)


def _check_family(model, config: Nested, owner: str) -> None:
    """Let a model of the family that reads the output score as it does; ValueError for one of another family."""
    wanted = FAMILIES[config.output]
    if wanted not in [family.__name__ for family in type(model).__mro__]:
        other = next(output for output in FAMILIES if output != config.output)
        raise ValueError(
            f"{owner}: output={config.output!r} in a {type(model).__name__}, which would read another one. Open it as "
            f"{wanted}, or save the other output: polyrep.save(model, folder, view={other!r})."
        )
    if model._similarity_fn_name is None:
        model.similarity_fn_name = config.similarity_fn_name


for config, model in (
    (MetaEmbedConfig, MetaEmbedModel),
    (MetaEmbedHeadConfig, MetaEmbedHead),
    (MetaEmbedForRetrievalConfig, MetaEmbedForRetrieval),
):
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModel")
