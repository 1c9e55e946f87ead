"""How several layers train one vector: contrastively, with the other layers as negatives of a text's own.

One loss, three ways to feed it. ``MultiLayerObjective`` trains a whole model with the trainers of
sentence-transformers; ``CachedMultiLayerObjective`` does the same for batches larger than memory (GradCache);
``MultiLayerHeadObjective`` fits a head to the cached layers of a frozen encoder, which takes seconds.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from sentence_transformers.base.losses import CachedLossMixin, RandContext
from sentence_transformers.util import get_rank, get_world_size
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import InputError
from ...training.losses import (
    gather,
    in_batch_labels,
    judged_relevant,
    learned_scale,
    refuse_single,
    refuse_unknown_teaching,
    refuse_untaught,
    scored_lists,
    taught,
    unwrapped,
)
from ...training.objective import Objective
from ...training.sides import Features
from .modeling_multilayer import MultiLayerHead, MultiLayerHeadConfig


class _LayerContrast(Objective):
    """The loss, given each text's vectors (Xie and Lukasiewicz, equations 2 to 9).

    With ``s[i, j, l]`` the product of query i and layer l of document j, where l = 0 is the layer that is served, and
    P(i) the document of query i, self-contrastive pooling minimises::

        CE over j of (s[i, P(i), 0] for the own document, max over l of s[i, j, l] for the others) / tau
        + lambda * CE over l of s[i, P(i), :] / tau_r, with target 0.

    With another ``pooling`` the first term is plain InfoNCE over what a document is; with ``last`` the second can be
    added to it (the paper's ablation of the regulariser alone). One layer and lambda 0 are a dual encoder.

    The paper scores by unbounded inner products, of which the second term can be lowered for ever by turning the other
    layers away from every query: then they are no negatives any more, and the first term is a dual encoder's.
    ``metrics`` shows it: ``layer_wins``, the share of negatives whose best layer is not layer 0, is then zero. With it
    come ``layer_margin``, the mean of s[i, P(i), 0] less the best other layer, and ``layer_saturation``, the
    probability of layer 0 in the second term.

    Args:
        lambda_: Weight of the second term; 1 from BERT and .1 from a retrieval model in the paper. Default: 1 for
            self_contrastive, else 0.
        tau: Temperature. Default: .05 for vectors of unit length, else 1 as in the paper.
        tau_r: Temperature of the second term. Default: tau.
        mode: How other layers take part. paper: as above. stop_gradient: as negatives that are themselves not moved.
            margin: the second term is a hinge, which is content once layer 0 leads by ``margin``.
        margin: Lead that the hinge asks for, in units of the score.
        query_side: The other layers of queries are negatives too.
        random_layer: Each step draws one of the layers after the first, instead of taking all.
        learn_tau: Learn the temperature of the first term, at the learning rate of everything else. It is no part of
            the model: a resumed run starts from ``tau`` again.
        early_weight: Each step also trains one of the layers after the first, queries and documents alike, to rank by
            itself and to follow the first layer's scores, so that the encoder can be cut there.
        distill_weight: Weight of what a teacher says of each query's document and negatives, see
            :func:`polyrep.training.losses.taught`; needs --teacher, or data with scores.
        distill: Follow the teacher's order, or its scores.
    """

    def __init__(
        self,
        model: Any,
        lambda_: float | None = None,
        tau: float | None = None,
        tau_r: float | None = None,
        mode: str = "paper",
        margin: float = 0.1,
        query_side: bool = False,
        random_layer: bool = False,
        learn_tau: bool = False,
        early_weight: float = 0.0,
        distill_weight: float = 0.0,
        distill: str = "order",
    ):
        super().__init__()
        self.model = model
        config = self.head_config
        lambda_ = lambda_ if lambda_ is not None else float(config.pooling == "self_contrastive")
        tau = tau if tau is not None else 0.05 if config.normalize else 1.0
        tau_r = tau if tau_r is None else tau_r
        for name, value in (("tau", tau), ("tau_r", tau_r)):
            if not 0 < value < math.inf:
                raise InputError(f"--{name} {value}: scores are divided by it. Use e.g. 0.05, or 1 as in the paper.")
        for name, value in (("lambda_", lambda_), ("early_weight", early_weight), ("margin", margin)):
            if not 0 <= value < math.inf:
                raise InputError(f"--{name} {value}: below 0 it would teach the opposite. Use 0 or more.")
        refuse_unknown_teaching(distill_weight, distill)
        if mode not in ("paper", "stop_gradient", "margin"):
            raise InputError(f"--mode {mode!r}: use paper, stop_gradient or margin.")
        if lambda_ and config.pooling not in ("self_contrastive", "last"):
            raise InputError(
                f"--lambda_ {lambda_} with --pooling {config.pooling}: would push away layers that a document is made "
                "of. Use --lambda_ 0, or --pooling self_contrastive or last."
            )
        contrasts = config.pooling == "self_contrastive" or lambda_ > 0 or early_weight > 0
        if contrasts and len(config.layers) < 2:
            raise InputError(
                f"--layers {config.layers} with pooling {config.pooling!r}, lambda {lambda_} and early_weight "
                f"{early_weight}: the loss compares layers, and there is one. Name more, or use --pooling last with "
                "--lambda_ 0."
            )
        self.lambda_, self.tau, self.tau_r, self.mode, self.margin = lambda_, tau, tau_r, mode, margin
        self.query_side, self.random_layer, self.early_weight = query_side, random_layer, early_weight
        self.contrasts, self.distill_weight, self.distill = contrasts, distill_weight, distill
        self.log_scale = learned_scale(nn.Parameter(torch.tensor(-math.log(tau)), requires_grad=learn_tau))
        if not getattr(config, "tied", True) and get_world_size() > 1 and not isinstance(self, CachedLossMixin):
            raise InputError(
                "--tied false with several processes: a step runs the towers one after the other, which "
                "DistributedDataParallel takes for unused parameters. Use --objective CachedMultiLayerObjective."
            )

    @property
    def head_config(self) -> MultiLayerHeadConfig:
        """Config with layers and pooling of the model."""
        raise NotImplementedError

    def losses(
        self,
        queries: tuple[Tensor, Tensor | None],
        documents: tuple[Tensor, Tensor | None],
        labels: Tensor,
        known: Tensor | None = None,
        drawn: int | None = None,
        lists: Tensor | None = None,
        teacher: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Parts of the loss of some queries against all documents.

        Args:
            queries: ``(queries, dim)`` what is served, and ``(queries, layers, dim)`` every layer, if needed.
            documents: ``(documents, dim)``, or ``(documents, layers, dim)`` for multi, and every layer likewise.
            labels: ``(queries,)`` row of each query's own document.
            known: ``(queries, documents)`` True for what is relevant, the own document among it, and so no negative.
            drawn: The layer that ``random_layer`` or ``early_weight`` take this step.
            lists: ``(queries, length)`` rows of the documents that the teacher has scored for each query.
            teacher: ``(queries, length)`` its scores.

        Raises:
            InputError: There is no other document to tell the own one from, or no teacher's score to learn from.
        """
        refuse_single(documents[0])
        config, scale = self.head_config, self.log_scale.exp()
        hot = F.one_hot(labels, len(documents[0])).bool()
        rows = torch.arange(len(labels), device=labels.device)
        vectors = documents[0] if documents[0].ndim == 3 else documents[0][:, None]
        ranked = torch.einsum("bd,nkd->bnk", queries[0].float(), vectors.float()).amax(-1)  # (queries, documents)
        served, layers = ranked, None
        if self.contrasts:
            assert queries[1] is not None and documents[1] is not None
            q, d = queries[1].float(), documents[1].float()
            every = q, d
            if drawn is not None and self.random_layer:
                q, d = q[:, [0, drawn]], d[:, [0, drawn]]
            others = d[:, 1:].detach() if self.mode == "stop_gradient" else d[:, 1:]
            layers = torch.einsum("bd,nld->bnl", q[:, 0], torch.cat([d[:, :1], others], 1))
            served = layers[..., 0] if config.pooling == "self_contrastive" else served
            if self.query_side:
                asked = q[:, 1:].detach() if self.mode == "stop_gradient" else q[:, 1:]
                layers = torch.cat([layers, torch.einsum("bld,nd->bnl", asked, d[:, 0])], 2)
            if config.pooling == "self_contrastive":
                ranked = torch.where(hot, layers[..., 0], layers.amax(-1))
        no_negative = torch.zeros_like(hot) if known is None else known & ~hot
        parts = {"contrast": F.cross_entropy((ranked * scale).masked_fill(no_negative, -torch.inf), labels)}
        if self.distill_weight:
            teacher = refuse_untaught(self.distill_weight, teacher)
            assert lists is not None
            parts["distill"] = self.distill_weight * taught((served * scale).gather(1, lists), teacher, self.distill)
        if layers is not None:
            own = layers[rows, labels]  # (queries, layers)
            lead = own[:, :1] - own[:, 1:]
            share = (own.detach() / self.tau_r).softmax(1)[:, 0]
            wins = (layers.detach().argmax(-1) > 0)[~hot].float().mean()
            self.metrics = {"layer_margin": lead.detach().amin(1).mean(), "layer_saturation": share.mean()}
            self.metrics["layer_wins"] = wins
            if self.lambda_ and self.mode == "margin":
                parts["layers"] = self.lambda_ * F.relu(self.margin - lead).mean() / self.tau_r
            elif self.lambda_:
                parts["layers"] = self.lambda_ * F.cross_entropy(own / self.tau_r, torch.zeros_like(labels))
        if self.early_weight:
            assert drawn is not None
            q, d = (side[:, drawn] for side in every)
            early = (q @ d.T * scale).masked_fill(no_negative, -1e9)  # finite: the divergence of two infinities
            target = (served.detach() * scale.detach()).masked_fill(no_negative, -1e9).softmax(1)
            follow = F.kl_div(early.log_softmax(1), target, reduction="batchmean")
            parts["early"] = self.early_weight * (F.cross_entropy(early, labels) + follow)
        return parts

    def draw(self) -> int | None:
        """The layer of this step, by its place in ``layers``; the same in every process."""
        if not (self.random_layer or self.early_weight):
            return None
        draw = torch.randint(1, len(self.head_config.layers), (1,), device=self.log_scale.device)
        return int(gather(draw)[0])

    def get_config_dict(self) -> dict[str, Any]:
        """Arguments, for the model card."""
        names = [name for name in inspect.signature(type(self)).parameters if name not in ("model", "learn_tau")]
        learned = {"learn_tau": True} if self.log_scale.requires_grad else {}
        return {name: getattr(self, name) for name in names} | learned

    @property
    def citation(self) -> str:
        """BibTeX, for the model card."""
        return (
            "@inproceedings{xie-lukasiewicz-2025-multilayer,\n"
            "    title={Investigating Multi-layer Representations for Dense Passage Retrieval},\n"
            "    author={Zhongbin Xie and Thomas Lukasiewicz},\n"
            "    booktitle={Findings of EMNLP},\n"
            "    year={2025},\n"
            "    url={https://arxiv.org/abs/2509.23861},\n"
            "}"
        )


class MultiLayerObjective(_LayerContrast):
    """Train a whole model: pairs of query and document, and any number of hard negatives, with in-batch negatives.

    Documents of all processes are negatives. Features come as for any loss of sentence-transformers.
    """

    @property
    def head_config(self) -> MultiLayerHeadConfig:
        """Config with layers and pooling of the model."""
        for module in unwrapped(self.model):
            config: Any = getattr(getattr(module, "model", None), "config", None)
            if getattr(config, "model_type", "").startswith("polyrep_multilayer"):  # the class may be the folder's own
                return config
        raise InputError(
            f"{type(self).__name__}: the model has no layers to compare. Use a MultiLayerModel, or put a "
            "MultiLayerPooling behind a Transformer."
        )

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> dict[str, Tensor]:
        """Parts of the loss of a batch: columns of queries, their documents, and hard negatives."""
        queries, *columns = (
            self.vectors(features, "document" if column else "query")
            for column, features in enumerate(sentence_features)
        )
        documents, own = self.gathered(columns)
        return self.losses(queries, documents, own, drawn=self.draw(), **scored_lists(own, len(columns), labels))

    def vectors(self, features: Features, task: str) -> tuple[Tensor, Tensor | None]:
        """What is served of texts, ``(batch, dim)`` or for multi ``(batch, layers, dim)``, and every layer."""
        with self.shown():
            output = self.model(features, task=task)
        if self.head_config.pooling == "multi":
            tokens = output["token_embeddings"]
            return tokens[:, 0] if task == "query" else tokens, output.get("all_layer_embeddings")
        return output["sentence_embedding"], output.get("all_layer_embeddings")

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The model with every layer in its output, if the loss compares them."""
        first: Any = unwrapped(self.model)[0]
        config = first.model.config
        before = config.output_hidden_states
        config.output_hidden_states = self.contrasts or before
        try:
            yield
        finally:
            config.output_hidden_states = before

    def gathered(self, columns: list[tuple[Tensor, Tensor | None]]) -> tuple[tuple[Tensor, Tensor | None], Tensor]:
        """Documents of all columns and processes, and the row of each local query's own."""
        batch = len(columns[0][0])
        documents = gather(torch.cat([served for served, _ in columns]))
        layers = gather(torch.cat([every for _, every in columns])) if self.contrasts else None  # type: ignore[misc]
        return (documents, layers), in_batch_labels(batch, documents.device, len(columns))


class CachedMultiLayerObjective(CachedLossMixin, MultiLayerObjective):
    """The same for batches larger than memory: vectors first, then their gradients, then the encoder (GradCache).

    Gao, Zhang, Han and Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (2021). Costs
    a second forward pass.

    Args:
        mini_batch_size: Texts whose activations are in memory at a time.
    """

    def __init__(
        self,
        model: Any,
        mini_batch_size: int = 32,
        lambda_: float | None = None,
        tau: float | None = None,
        tau_r: float | None = None,
        mode: str = "paper",
        margin: float = 0.1,
        query_side: bool = False,
        random_layer: bool = False,
        early_weight: float = 0.0,
        distill_weight: float = 0.0,
        distill: str = "order",
    ):
        if mini_batch_size < 1:
            raise InputError(f"--mini_batch_size {mini_batch_size}: use 1 or more.")
        early: dict[str, Any] = {"random_layer": random_layer, "early_weight": early_weight}
        told: dict[str, Any] = {"distill_weight": distill_weight, "distill": distill}
        super().__init__(model, lambda_, tau, tau_r, mode, margin, query_side, **early, **told)
        self.mini_batch_size = mini_batch_size

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Loss of a batch."""
        self.drawn = self.draw()
        tasked: list[dict[str, Any]] = [
            {**features, "task": "document" if column else "query"}
            for column, features in enumerate(sentence_features)
        ]
        return self.forward_cached(tasked, labels)

    def embed_minibatch(
        self,
        sentence_feature: dict[str, Any],
        begin: int,
        end: int,
        with_grad: bool,
        copy_random_state: bool,
        random_state: RandContext | None = None,
    ) -> tuple[Tensor, RandContext | None]:
        """Served vector and layers of some texts in one tensor, ``(texts, 1 or layers, dim)``; see ``split``."""
        size = len(sentence_feature["input_ids"])
        part = {
            name: value[begin:end] if isinstance(value, Tensor) and value.ndim and len(value) == size else value
            for name, value in sentence_feature.items()
            if name != "task"
        }
        with random_state or nullcontext(), nullcontext() if with_grad else torch.no_grad():
            before = RandContext(*part.values()) if copy_random_state else None
            served, layers = self.vectors(part, sentence_feature["task"])
        served = served if served.ndim == 3 else served[:, None]
        return served if layers is None else torch.cat([served, layers], 1), before

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Loss from all vectors, ``mini_batch_size`` queries at a time."""
        multi = self.head_config.pooling == "multi"
        queries, *columns = (torch.cat(side) for side in reps)

        def split(side: Tensor, several: bool) -> tuple[Tensor, Tensor | None]:
            count = len(self.head_config.layers) if several else 1
            return side[:, :count] if several else side[:, 0], side[:, count:] if self.contrasts else None

        (documents, layers), own = self.gathered([split(column, multi) for column in columns])
        asked, asked_layers = split(queries, False)
        total = torch.zeros((), device=own.device)
        metrics: dict[str, Tensor] = {}
        scored = scored_lists(own, len(columns), labels)
        for start in range(0, len(queries), self.mini_batch_size):
            rows = slice(start, start + self.mini_batch_size)
            each = asked[rows], None if asked_layers is None else asked_layers[rows]
            told = {name: values[rows] for name, values in scored.items()}
            parts = self.losses(each, (documents, layers), own[rows], drawn=self.drawn, **told)
            share = len(each[0]) / len(queries)
            loss = torch.stack(list(parts.values())).sum() * share
            if with_backward:
                loss.backward()
                loss = loss.detach()
            total = total + loss
            metrics = {name: metrics.get(name, total * 0) + value * share for name, value in self.metrics.items()}
        self.metrics = metrics
        return total


class MultiLayerHeadObjective(_LayerContrast):
    """Fit a head to the layers of a frozen encoder, from the cache: the model is the head alone.

    Negatives are the other documents of the batch and what ``negatives`` draws of the encoder's nearest.
    """

    trains_on = "layers"
    needs_labels = True
    model: MultiLayerHead

    @property
    def head_config(self) -> MultiLayerHeadConfig:
        """Config of the head."""
        config: Any = self.model.config
        return config

    @property
    def layer_token(self) -> str:
        """As the config says."""
        return self.head_config.token

    def forward(self, features: list[Features], labels: Tensor) -> dict[str, Tensor]:
        """Parts of the loss of a batch of :class:`~polyrep.training.pairs.HeadData`: queries, and all documents."""
        sides = []
        for side, task in zip(features, ("query", "document"), strict=True):
            states = side["layer_embeddings"][:, self.head_config.layers]
            output = self.model(states, task=task, output_hidden_states=self.contrasts)
            served = output.token_embeddings if output.sentence_embedding is None else output.sentence_embedding
            sides.append((served[:, 0] if task == "query" and served.ndim == 3 else served, output.hidden_states))
        queries, (served, layers) = sides
        documents = gather(served), None if layers is None else gather(layers)
        first, lists = get_rank() * len(served), features[0].get("list")
        return self.losses(
            queries,
            documents,
            labels + first,
            known=judged_relevant(features),
            drawn=self.draw(),
            lists=None if lists is None else lists + first,
            teacher=features[0].get("teacher"),
        )
