"""What all shipped files share of a method: its encoder, its pooling, its score, and its head as a module.

A model folder holds a copy of this file beside its modeling file, since it must open where polyrep is not installed,
and of ``polyrep_fields.py`` and ``polyrep_folder.py``. The ones to change are those of ``polyrep/hub``: `make rooms`
renews the copies in the folders of the methods, and a test compares them byte by byte. None of them defines a config
class: transformers would load it twice.
"""

# mypy: ignore-errors
# Shipped: it speaks to transformers and torch through attributes that these type as Tensor | Module.

from __future__ import annotations

import inspect
import logging
import shutil
import threading
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoModel,
    AutoModelForTextEncoding,
    PretrainedConfig,
    PreTrainedModel,
)

from .polyrep_fields import fields_of
from .polyrep_folder import fingerprints_of

try:
    from sentence_transformers import MultiVectorEncoder, SentenceTransformer
    from sentence_transformers.base.modules import Module, Transformer
except ImportError:  # AutoModel works without sentence-transformers
    MultiVectorEncoder = SentenceTransformer = None
    Module = Transformer = nn.Module

try:
    from sentence_transformers.multi_vector_encoder.modules.token_pooling import BaseTokenPooling
except ImportError:  # by itself: most rooms pool no tokens
    BaseTokenPooling = nn.Module

logger = logging.getLogger(__name__)

SIDES = "router_mapping={'query': 'query', 'positive': 'document'}"
"""How the trainers of sentence-transformers are told the side of a score that each column of their data is."""

HEADROOM = 1.25
"""How much longer than the longest document of training a document may be."""

_COUNTING = threading.Lock()


def new_encoder(config: PretrainedConfig, reads: str = "input_ids") -> PreTrainedModel:
    """An encoder of a config's kind, without the decoder where there is one (T5).

    Args:
        config: Of the encoder.
        reads: What its ``forward`` must take.

    Raises:
        ValueError: The config makes none.
    """
    encoders = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
    try:
        encoder = encoders.from_config(config)
    except Exception as error:  # each model refuses in its own way
        why = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{type(config).__name__}: no encoder can be made of it ({type(error).__name__}: {why}). Take the config "
            "from the backbone's folder again."
        ) from error
    if reads not in inspect.signature(encoder.forward).parameters:
        raise ValueError(
            f"{type(config).__name__}: its {type(encoder).__name__} reads no {reads}. Use the config of another one."
        )
    return encoder


def text_inputs(input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None) -> dict:
    """What an encoder reads beside the tokens: all count by default, and types only where there are some."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return {"attention_mask": mask} | ({} if token_type_ids is None else {"token_type_ids": token_type_ids})


def text_limit(encoder: PreTrainedModel) -> int:
    """Most tokens of a text: the encoder's positions less those of padding (RoBERTa); -1 for no limit."""
    positions = getattr(encoder.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 0:
        return -1
    for module in encoder.modules():
        if isinstance(getattr(module, "position_embeddings", None), nn.Embedding):
            padding = getattr(module, "padding_idx", None)
            positions -= padding + 1 if isinstance(padding, int) else 0
    return positions


def pool_tokens(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """States ``(batch, tokens, dim)`` to a vector each: mean, cls or lasttoken, to the bit as the stock Pooling."""
    if pooling == "mean":
        weights = mask[..., None].to(states.dtype)  # (batch, tokens, 1)
        exact = torch.promote_types(states.dtype, torch.float32)
        total = (states * weights).sum(1, dtype=exact)
        return (total / weights.sum(1, dtype=exact).clamp(min=1e-9)).to(states.dtype)
    # The first or last token that counts: not the first or last column, whichever side texts are padded on.
    ranks = mask if pooling == "cls" else mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return states[torch.arange(states.shape[0], device=states.device), ranks.to(torch.int32).argmax(1)]


def prompt_tokens(input_ids: Tensor, mask: Tensor, prompt_length, begin: Tensor | None = None) -> Tensor:
    """Which tokens are a prompt's and not the text's, on whichever side texts are padded: ``(batch, tokens)``.

    Args:
        input_ids: ``(batch, tokens)``.
        mask: ``(batch, tokens)``, zero where a token is padding.
        prompt_length: Tokens of the prompt alone with those that stand before any text; a number, or a tensor of
            equal ones, as sentence-transformers has it.
        begin: ``(vocabulary,)``, tokens that begin a word with the space before it, see :func:`begin_words`. Where a
            prompt ends in a space, its last token alone is that space; before a text it is the text's first word.
    """
    length, place = int(torch.as_tensor(prompt_length).max()), mask.long().cumsum(1)  # places from 1
    found = mask.bool() & (place <= length)
    return found if begin is None else found & ~((place == length) & begin[input_ids])


def begin_words(tokens: Iterable[str]) -> Tensor:
    """Which tokens begin a word and hold the space before it, of SentencePiece or byte-level BPE: ``(tokens,)``."""
    return torch.tensor([t[:1] in ("▁", "Ġ") and len(t) > 1 and t[1] != t[0] for t in tokens])


def begin_words_of(tokenizer) -> Tensor | None:
    """:func:`begin_words` of a tokenizer; None where no prompt's last token is a space: it is dropped, or no mark."""
    last = tokenizer.convert_ids_to_tokens(tokenizer("a ", add_special_tokens=False)["input_ids"])[-1:]
    return begin_words(entries_of(tokenizer)) if last in (["▁"], ["Ġ"]) else None


def entries_of(tokenizer) -> list[str]:
    """A tokenizer's vocabulary, by id; empty where an id is no token's."""
    return [tokenizer.convert_ids_to_tokens(i) or "" for i in range(max(tokenizer.get_vocab().values()) + 1)]


def pooling_of(
    model, owner: str, poolings: tuple, remedy: str, prompts: bool = True, more: bool = False
) -> tuple[str, bool]:
    """Pooling of a SentenceTransformer and whether it normalises; ValueError if it does more than that.

    Args:
        model: The SentenceTransformer.
        owner: Whose folder is to hold it.
        poolings: Those that it may have.
        remedy: What to do else.
        prompts: Whether it may put words before a text.
        more: Whether any modules may stand behind the pooling.
    """
    names = [type(module).__name__ for module in model]
    pooled = names[:2] in (["Transformer", "Pooling"], ["Backbone", "Pooling"])
    pooling = model[1].pooling_mode if pooled else None
    plain = pooled and model[1].include_prompt and not getattr(model[0], "do_lower_case", False)
    plain = plain and (prompts or not any((model.prompts or {}).values()))
    if not plain or pooling not in poolings or not more and names[2:] not in ([], ["Normalize"]):
        raise ValueError(
            f"{owner}: the backbone is {' + '.join(names)} with pooling {pooling!r} and prompts {model.prompts}, and "
            f"one folder of this kind holds a transformer and one pooling, {' or '.join(poolings)}"
            f"{'' if prompts else ', and no prompt'}. {remedy}"
        )
    return pooling, names[2:] == ["Normalize"]


_HOOKED = "_output_capturing_hooks_installed"
"""Where transformers marks a model that has hooks to take its hidden states."""

_KNOWN = WeakSet()
"""Models whose classes transformers knows in this process as ones that have hidden states."""


class _Hooked(int):
    """That mark, which no copy of a model has, so that transformers makes hooks for it anew."""

    def __reduce__(self):
        return bool, ()


class _Hook:
    """A hook of transformers. It is a local function, which cannot be pickled, so in a copy this does nothing."""

    def __init__(self, hook=None):
        self.hook = hook

    def __call__(self, *args):
        return None if self.hook is None else self.hook(*args)

    def __reduce__(self):
        return type(self), ()


def keep_states(model: nn.Module, *_) -> None:
    """Let an encoder that gives hidden states be copied and pickled, as for a pool of processes.

    transformers takes states by hooks that cannot be pickled, and only of classes of which it has made a model in the
    process. Call this before it gives some and after, or make it a module's hook on both sides; all but the first
    calls do nothing.
    """
    if torch.compiler.is_compiling():
        return
    if model not in _KNOWN:
        for part in model.modules():
            if isinstance(part, PreTrainedModel):
                PreTrainedModel.__init__(type(part).__new__(type(part)), part.config)
        _KNOWN.add(model)
    marks = (vars(part)[_HOOKED] for part in model.modules() if vars(part).get(_HOOKED))
    if next(marks, None) is not True:  # no hooks, or ours
        return
    hooked = [part for part in model.modules() if vars(part).get(_HOOKED) is True]
    for hooks in (module._forward_hooks for part in hooked for module in part.modules()):
        for number, hook in list(hooks.items()):
            if isinstance(hook, _Hook) and hook.hook is None:  # of the model that this is a copy of
                hooks.pop(number, None)
            elif getattr(hook, "__module__", None) == "transformers.utils.output_capturing":
                hooks[number] = _Hook(hook)
    for part in reversed(hooked):
        setattr(part, _HOOKED, _Hooked(True))


def warn_of_no_task(model: nn.Module, task: str | None) -> None:
    """Say once that a training tells no queries from documents, for a model that encodes them in different ways."""
    if task is None and model.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        logger.warning_once(
            f"{type(model).__name__}: training with task=None, so every text is encoded as a document, queries too. "
            f"With a trainer of sentence-transformers, say in its arguments which column holds which: {SIDES}."
        )


def check_score(model, owner: str, because: str, cut: str, config: PretrainedConfig | None = None) -> None:
    """Let a model score by the inner product where nothing is said; ValueError for what would rank otherwise.

    Args:
        model: A sentence-transformers model.
        owner: Who checks.
        because: Why another similarity is wrong.
        cut: What ``truncate_dim`` would do, and the remedy.
        config: Of a head that has :class:`EqualNorms`; cosine and euclidean are as good then.
    """
    if model._similarity_fn_name is None:
        model.similarity_fn_name = "dot"
    equal = config is not None and config.equal_norms and config.max_norm
    if str(model.similarity_fn_name) not in (("dot", "cosine", "euclidean") if equal else ("dot",)):
        also = ", or a head trained with --equal_norms true" if config is not None else ""
        raise ValueError(
            f"{owner}: similarity_fn_name={model.similarity_fn_name!r}, but {because}. Use similarity_fn_name='dot'"
            f"{also}."
        )
    if model.truncate_dim is not None:
        raise ValueError(f"{owner}: truncate_dim={model.truncate_dim} would {cut}")


class EqualNorms:
    """One more number of each vector, by which all documents are equally long; beside PreTrainedModel.

    An inner product ranks otherwise than cosine or L2 as soon as documents differ in length. With
    ``sqrt(max_norm^2 - |d|^2)`` behind a document d, and 0 behind a query, the product stays what it was and all three
    rank alike: in an engine that stores unit vectors, too. Bachrach et al., "Speeding Up the Xbox Recommender System
    Using a Euclidean Transformation for Inner-Product Spaces", RecSys 2014, section 3.

    Its config has ``equal_norms``, whether that number is there, and ``max_norm``, None until training has measured
    it. The number is 0 until then, and in training.

    Attributes:
        clipped: Documents that were longer than ``max_norm`` and were scaled back to it, as far as this process has
            counted them: not in a compiled model or an exported graph.
    """

    clipped = 0

    def with_equal_norms(self, vectors: Tensor, query: bool) -> Tensor:
        """Vectors ``(texts, dim)`` with that number behind them, where the config wants it: ``(texts, dim + 1)``."""
        most = self.config.max_norm
        if not self.config.equal_norms:
            return vectors
        if query or most is None or self.training:
            return torch.cat([vectors, torch.zeros_like(vectors[:, :1])], -1)
        lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)  # (texts, 1)
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            self._count_clipped(lengths)
        vectors = vectors * (most / lengths.clamp(min=most))
        lengths = lengths.clamp(max=most)
        # As a product it cancels no digits. Not quite 0 for the longest: the slope of a root is infinite there.
        rest = ((most - lengths) * (most + lengths)).clamp(min=1e-12 * most**2).sqrt()
        return torch.cat([vectors, rest], -1)

    @torch.no_grad()
    def measure_norms(self, documents: Iterable[Tensor]) -> None:
        """Set ``max_norm`` by the longest of some documents, with :data:`HEADROOM`.

        Args:
            documents: Their vectors, some at a time; they are asked for while nothing is clipped.
        """
        if self.config.equal_norms:
            self.config.max_norm = None
            longest = max(float(torch.linalg.vector_norm(vectors, dim=-1).max()) for vectors in documents)
            self.config.max_norm = float(f"{max(longest, 1e-3) * HEADROOM:.6g}")

    def _count_clipped(self, lengths: Tensor) -> None:
        """Count documents that are too long, and warn when their number gets another digit."""
        lengths = lengths.detach()
        longer = int((lengths > self.config.max_norm).sum())
        if not longer:
            return
        with _COUNTING:
            before, self.clipped = self.clipped, self.clipped + longer
        if not before or len(str(self.clipped)) > len(str(before)):
            logger.warning(
                f"{type(self).__name__}: documents longer than max_norm={self.config.max_norm:g} were scaled back to "
                f"it and score lower than they should: {self.clipped} so far, the longest of this batch of length "
                f"{float(lengths.max()):g}. If there are many, train the head again on documents like these."
            )


class HeadModule:
    """A head as a sentence-transformers module, beside the class of theirs that it extends: its folder, its backbone.

    Args:
        model: The head; default: a new one of these fields of its config.
        config: See there.

    Attributes:
        head_class: The PreTrainedModel; its ``base_fingerprint`` says what it was trained on.
        inside: ``model_type`` of the whole model that holds one, as ``head``.
        reads: Field of its config: the width of the vectors that it reads.
        gives: Likewise: of those that it makes.
        changeable: Fields that a head may be opened with other values of.
        made: How a head comes about, in messages.
    """

    head_class = inside = None
    reads, gives = "input_dim", "projection_dim"
    changeable = {"base_fingerprint"}
    made = "trained"

    def __init__(self, model: PreTrainedModel | None = None, **config):
        super().__init__()
        self.model = self.head_class(self.head_class.config_class(**config)) if model is None else model

    def __call__(self, features, task=None, **kwargs):
        """Run the head for the task that it is told, or else that of the batch, where trainers put it."""
        return super().__call__(features, task=task or features.get("task"), **kwargs)

    def on_model_ready(self, model):
        """Check the backbone, as soon as there is one."""
        self.check_backbone(model)

    def check_backbone(self, model) -> None:
        """Refuse a backbone with vectors of another width, and warn of other weights than the head was trained on.

        A pipeline does this by itself when it is put together. For pooling in single calls, call it once.

        Args:
            model: A sentence-transformers model, with this module in it or without.
        """
        modules, config = list(model), self.model.config
        before = modules[: modules.index(self)] if self in modules else modules
        widths = [module.get_embedding_dimension() for module in before if hasattr(module, "get_embedding_dimension")]
        width, expected = next((w for w in reversed(widths) if w), None), getattr(config, self.reads)
        if width is not None and width != expected:
            raise ValueError(
                f"{type(self).__name__}: the backbone's vectors have width {width}, but the head was made for "
                f"{self.reads}={expected}. Use the backbone it was {self.made} on "
                f"({config.base_model_id or 'not recorded'}), or a head made for this one."
            )
        if before and config.base_fingerprint:
            found = fingerprints_of(before[0])
            if found and config.base_fingerprint not in found:
                self.other_backbone(before[0].model.name_or_path, found[0])

    def other_backbone(self, name: str, found: str) -> None:
        """Say that a backbone, by its name and fingerprint, is not the one that the head was trained on."""
        config = self.model.config
        logger.warning(
            f"{type(self).__name__}: the head was trained on {config.base_model_id} (fingerprint "
            f"{config.base_fingerprint[:16]}), this backbone is {name} (fingerprint {found[:16]}). Same shape, other "
            "vectors: expect worse results."
        )

    def check_last(self, model, loss: str) -> None:
        """ValueError if a module stands behind this one, with what would be lost."""
        if (last := list(model)[-1]) is not self:
            raise ValueError(
                f"{type(self).__name__}: {type(last).__name__} stands behind it and would change the vectors, so that "
                f"{loss}. Put this module last."
            )

    def get_embedding_dimension(self):
        """Width of the vectors."""
        return getattr(self.model.config, self.gives)

    def save(self, output_path, *args, **kwargs):
        """Write the head as a folder of its own, and the code to the folder above, where it is looked for."""
        self.model.save_pretrained(output_path)
        for file in Path(output_path).glob("*.py"):
            shutil.copy(file, Path(output_path).parent)

    @classmethod
    def load(cls, model_name_or_path, subfolder="", **kwargs):
        """Open a head's folder or repository, that of a whole model, or the module folder of a saved pipeline.

        Args:
            model_name_or_path: Folder or Hub id.
            subfolder: Of the head in it.
            kwargs: ``revision, token, local_files_only, cache_folder``; and fields in ``changeable`` to open the head
                with other values of, such as ``base_fingerprint=None`` to let any backbone pass.

        Raises:
            ValueError: It holds something else, or a field is not to be changed.
        """
        kept = {k: v for k, v in kwargs.items() if k in ("revision", "token", "local_files_only")}
        kept["cache_dir"] = kwargs.get("cache_folder")
        content, _ = PretrainedConfig.get_config_dict(model_name_or_path, subfolder=subfolder, **kept)
        expected = cls.head_class.config_class
        if content.get("model_type") == cls.inside is not None:  # of the whole model, the head's weights alone
            kept |= {"config": expected(**fields_of(content, expected)), "key_mapping": {r"^head\.": ""}}
        elif content.get("model_type") != expected.model_type:
            raise ValueError(
                f"{cls.__name__}: {model_name_or_path} holds a model of type {content.get('model_type')!r}, not a "
                f"{expected.model_type} head. Name the head's own folder; of a saved pipeline that is its last "
                f"module: subfolder='4_{cls.__name__}', or whichever number it has in modules.json."
            )
        model = cls.head_class.from_pretrained(model_name_or_path, subfolder=subfolder, **kept)
        fields = model.config.to_dict()
        for name in kwargs.keys() - fields.keys():
            if near := get_close_matches(name, cls.changeable - {name}, n=1, cutoff=0.65):
                raise ValueError(f"{cls.__name__}: {name}={kwargs[name]!r} is no setting. Did you mean {near[0]!r}?")
        changes = {k: v for k, v in kwargs.items() if k in fields and fields[k] != v and k not in kept}
        if changes:
            cls.check_changes(fields, changes)
            model.config = expected(**(fields | changes))
        return cls(model)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """:meth:`load`, by the name that transformers has for it."""
        return cls.load(*args, **kwargs)

    @classmethod
    def check_changes(cls, fields: dict, changes: dict, fixed: set = frozenset()) -> None:
        """ValueError for a change to a field that the weights fit no other value of, or that is ``fixed`` here."""
        allowed = cls.changeable - fixed
        if name := next(iter(sorted(changes.keys() - allowed)), None):
            raise ValueError(
                f"{cls.__name__}: {name}={changes[name]!r}, but the head was {cls.made} with {name}={fields[name]!r}, "
                f"and its weights fit nothing else. Change only {', '.join(sorted(allowed))}, or get another head."
            )


class TokenPoolingModule(HeadModule, BaseTokenPooling):
    """A head as token pooling: for one call, by itself, or as last module behind any MultiVectorEncoder.

    The head reads token vectors, their mask and the ``task``, and gives vectors and the ``mask`` of those that are
    there. All texts of a batch go through it at once.

    Attributes:
        output_field: Of the head's output: where its vectors are, ``(batch, vectors, dim)``.
    """

    output_field = "token_embeddings"

    @torch.inference_mode()
    def pool(self, embeddings, *, task=None, attention_mask=None, padding_side="right"):
        """Pool encoded texts: a list of ``(tokens, dim)``, or a padded ``(batch, tokens, dim)``.

        Args:
            embeddings: Token vectors of each text.
            task: What they were encoded for; what is not pooled passes unchanged.
            attention_mask: ``(batch, tokens)`` of a padded tensor; default: rows that are not zero.
            padding_side: Where the result of a padded tensor is padded.

        Returns:
            A list of ``(vectors, dim)``, or a padded ``(batch, vectors, dim)``.

        Raises:
            ValueError: There is no such side, a text of a list is of another shape, or the head refuses the tokens.
        """
        if not self.applies_to(task) or not len(embeddings):
            return embeddings
        name = type(self).__name__
        if padding_side not in ("left", "right"):
            raise ValueError(f"{name}: padding_side={padding_side!r} is neither 'left' nor 'right'. Use one of these.")
        padded = isinstance(embeddings, Tensor)
        if padded:
            tokens = embeddings
            mask = embeddings.abs().sum(-1) > 0 if attention_mask is None else attention_mask.bool()
        else:
            if wrong := [tuple(text.shape) for text in embeddings if text.ndim != 2]:
                raise ValueError(
                    f"{name}: a text of the list has shape {wrong[0]}, so it is no list of token vectors. Use tensors "
                    "of shape (tokens, dim)."
                )
            tokens = nn.utils.rnn.pad_sequence(embeddings, batch_first=True)
            lengths = torch.tensor([len(text) for text in embeddings], device=tokens.device)
            mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        output = self._run(tokens, mask, task)
        pooled = [vectors[there] for vectors, there in zip(output[self.output_field], output.mask, strict=True)]
        if not padded:
            return pooled
        return nn.utils.rnn.pad_sequence(pooled, batch_first=True, padding_side=padding_side)

    def pool_one(self, embedding, task=None, **kwargs):
        """One text, ``(tokens, dim)`` to ``(vectors, dim)``."""
        return self.pool([embedding], task=task)[0]

    def _run(self, tokens, mask, task):
        """Pool on the tokens' device, without dropout: nobody moves or sets a pooling that is passed to a call."""
        if self.model.device != tokens.device:
            with torch.inference_mode(False):  # else the weights could never be trained again
                self.model.to(tokens.device)
        training = self.model.training
        self.model.eval()
        try:
            return self.model(tokens, mask, task=task)
        finally:
            self.model.train(training)
