"""Train a head on the cached vectors of a frozen backbone, and put the two together."""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from transformers import PreTrainedModel, set_seed

from ..errors import InputError, refusals
from ..hub.cards import render_card
from ..hub.fingerprint import fingerprint
from ..hub.folder import Encoder, family_of, fastest_dtype, fetch, load, save
from ..hub.reading import set_length
from ..hub.vision import VisionEncoder, fetch_vision
from .build import build, freeze, refuse_cut, settle
from .checkpoints import CheckpointCallback, restore_state
from .datasets import datasets_of
from .head_trainer import HeadTrainer
from .objective import contract
from .pairs import HeadData
from .recipes import Plan
from .record import base_id
from .teachers import open_teacher

BACKBONES: dict[str, tuple[type[Encoder], str]] = {
    "sentence": (SentenceTransformer, "one dense vector a text"),
    "tokens": (MultiVectorEncoder, "several vectors a text"),
    "layers": (SentenceTransformer, "the layers of an encoder with one dense vector a text"),
    "states": (SentenceTransformer, "the token states of an encoder with one dense vector a text"),
}
"""What a head learns from -> family of the backbone that gives it, and its name for a reader."""


class HeadTraining:
    """A head, the backbone whose cached vectors it reads, and a trainer over pairs of them.

    Attributes:
        plan: The run.
        model: The head.
        backbone: The frozen model.
        trainer: Goes through the pairs, or through what the objective makes of them.
        pair_counts: Data set -> number of its pairs.
        prepare_seconds: What the objective took before the first step.

    Args:
        plan: The run.
    """

    def __init__(self, plan: Plan):
        assert plan.room and plan.head
        self.plan, recipe = plan, plan.recipe
        _refuse_one_corpus_twice(plan)
        weights = fastest_dtype(plan.head.model_dtype)
        folder = fetch(recipe.backbone, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
        self.backbone = _open_backbone(plan, folder, weights)
        images = _open_vision(plan, weights)
        set_seed(plan.args.seed)
        self.model, tokenizer = _untrained_head(plan, folder, self.backbone, images)
        freeze(recipe.freeze, self.model)
        with refusals():
            objective = contract(plan.objective(self.model, **plan.objective_arguments))
        data, self.pair_counts = _cached_pairs(plan, self.backbone, objective, images, tokenizer)
        planned = objective.planned_rows(plan.objective_arguments)
        started = time.perf_counter()
        rows = objective.prepare(data) if not recipe.dry_run else data if planned is None else range(planned)
        self.prepare_seconds = time.perf_counter() - started
        with refusals():  # of arguments that do not go together
            self.trainer = HeadTrainer(
                objective=objective,
                args=plan.args,
                train_dataset=rows,
                data_collator=data.collate if isinstance(rows, range) else rows.collate,
                callbacks=[CheckpointCallback()],
                remine=recipe.remine,
            )

    @property
    def learns(self) -> bool:
        """Whether anything is left to gradient descent: a head may follow from its data in closed form."""
        return any(parameter.requires_grad for parameter in self.trainer.objective.parameters())

    def refuse_no_step(self) -> None:
        """InputError if there is no whole batch."""
        if self.learns:
            self.trainer.refuse_no_batch()

    def train(self, resume: Path | None) -> None:
        """Train, from a checkpoint if one is named."""
        if self.learns:
            self.trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        self.trainer.objective.finish()

    def restore(self, checkpoint: Path) -> None:
        """Take the head and the state of a checkpoint, without a step."""
        self.trainer._load_from_checkpoint(str(checkpoint))
        restore_state(self.trainer, checkpoint)
        self.trainer.objective.finish()

    def save(self, output: Path, context: dict[str, Any]) -> dict[str, Path]:
        """Write the head as ``head``, and unless it is to stay alone the whole model and its card as ``final``.

        Returns:
            These names -> folders.
        """
        assert self.plan.head
        made = {"head": save(self.model, output / "head")}
        if not self.plan.head.head_only:
            whole, card = with_backbone(self.plan, self.model, self.backbone), self.plan.card
            settle(self.plan, whole)
            readme = str(render_card(whole, card, recipe=context)) if card else None
            made["final"] = save(whole, output / "final", readme=readme)
        return made


def _refuse_one_corpus_twice(plan: Plan) -> None:
    """InputError if a data set would be there twice for an objective to which all texts are one corpus."""
    assert plan.head
    if plan.head.queries in ("both", "judged+texts") and contract(plan.objective).one_corpus:
        raise InputError(
            f"--queries {plan.head.queries}: {plan.objective.__name__} ranks all texts as one corpus, in which every "
            "document would be twice and count against itself. Use judged or inverse_cloze."
        )


def _open_backbone(plan: Plan, folder: Path, weights: torch.dtype) -> Encoder:
    """The backbone with weights of some type.

    Raises:
        InputError: It gives other vectors than the head reads, or will not fit in one folder with the head.
    """
    room, recipe, settings = plan.room, plan.recipe, plan.head
    assert room and settings
    refuse_cut(folder, recipe.backbone)
    backbone = _opened(plan, folder, weights)
    family, reads = BACKBONES[str(contract(plan.objective).trains_on)]
    if type(backbone) is not family:
        raise InputError(
            f"{recipe.backbone}: is a {type(backbone).__name__}, but this head reads {reads}. "
            f"Name a {family.__name__}."
        )
    if not isinstance(getattr(backbone[0], "model", None), PreTrainedModel):
        raise InputError(
            f"{recipe.backbone}: begins with {type(backbone[0]).__name__}, which is no transformer, and this head "
            "needs the tokens that one reads. Name a model whose first module is a transformer."
        )
    set_length(backbone, settings.max_length, recipe.backbone)
    if not settings.pipeline and not settings.head_only:
        retriever: Any = room.model
        with refusals():
            retriever.check_backbone(backbone)
    return backbone


def _opened(plan: Plan, folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The backbone as its room opens it, or as its folder says; default: weights as they are saved."""
    assert plan.room
    backbone: Any = plan.room.open_backbone(str(folder), dtype) if plan.room.open_backbone else None
    if backbone is None:
        backbone = load(folder, trust_remote_code=plan.recipe.trust_remote_code, dtype=dtype)
    return backbone


def _open_vision(plan: Plan, weights: torch.dtype) -> VisionEncoder | None:
    """The encoder of images, of a head that joins one with the backbone; None for any other head."""
    room, settings = plan.room, plan.head
    assert room and settings
    if not room.joins_vision:
        if settings.vision:
            head = (room.head or room.model).__name__
            raise InputError(f"--vision {settings.vision}: {head} joins no encoders. Leave it out.")
        return None
    if not settings.vision:
        raise InputError(
            "this head joins a text encoder and a vision encoder, and none is named for the images. Add --vision, "
            "e.g. google/mobilenet_v2_1.0_224."
        )
    return VisionEncoder.open(fetch_vision(settings.vision, settings.vision_revision), weights)


def _untrained_head(
    plan: Plan, folder: Path, backbone: Encoder, images: VisionEncoder | None
) -> tuple[PreTrainedModel, Any]:
    """A head for the backbone, and the tokenizer of its words where these are not the backbone's, else None.

    Raises:
        InputError: The head's config refuses a value, or head and backbone do not fit together.
    """
    room, recipe, settings = plan.room, plan.recipe, plan.head
    assert room and settings
    head_class: Any = room.head or room.model
    config = plan.config | {
        "base_model_id": base_id(recipe.backbone),
        "base_revision": recipe.revision,
        "base_fingerprint": fingerprint(folder),
    }
    if room.seeded:
        config["seed"] = plan.args.seed
    if images is not None:
        config |= {"image_dim": images.get_embedding_dimension(), "vision_model_id": base_id(settings.vision)}
    tokenizer = None
    with refusals():
        if settings.vocabulary:
            if not room.head_from_words:
                raise InputError(
                    f"--vocabulary {settings.vocabulary}: {head_class.__name__} reads no words. Leave it out."
                )
            head, tokenizer = room.head_from_words(settings.vocabulary, backbone, **config)
        else:
            head = head_class.from_backbone(backbone, **config)
        if _behind_modules(plan, backbone) and not settings.head_only:
            assert room.module  # what does not fit together should say so before training
            family_of(plan.run)(modules=[*backbone.children(), room.module(copy.deepcopy(head))])
    return head, tokenizer


def _cached_pairs(
    plan: Plan, backbone: Encoder, objective: Any, images: VisionEncoder | None, tokenizer: Any
) -> tuple[HeadData, dict[str, int]]:
    """The pairs of all data sets with their vectors, and how many each has; in a dry run they are only counted."""
    recipe, settings = plan.recipe, plan.head
    assert settings
    data = HeadData(
        kind=objective.trains_on,
        negatives=settings.negatives,
        labels=objective.needs_labels,
        depth=settings.depth,
        narrowed=objective.narrowed,
        teacher=open_teacher(recipe.teacher, recipe.teacher_revision)
        if recipe.teacher and not recipe.dry_run
        else None,
    )
    options: dict[str, Any] = {"cache_dir": settings.cache_dir, "batch_size": settings.encode_batch_size}
    if tokenizer is not None:
        options["tokenizer"] = tokenizer
    if data.kind in ("layers", "states"):
        options["token"] = objective.layer_token
    if data.kind == "states":
        options["layers"] = objective.state_layers
    counts: dict[str, int] = {}
    for dataset in datasets_of(recipe, settings):
        judged = sum(score > 0 for documents in dataset.qrels.values() for score in documents.values())
        pairs = judged if data.labels else len(dataset.queries)
        counts[dataset.name] = counts.get(dataset.name, 0) + pairs
        if recipe.dry_run:
            data.count(pairs)
        else:
            with plan.args.main_process_first(desc="encode"):
                data.add(backbone, dataset, images, **options)
        if settings.queries == "both" and dataset.split == "cloze":
            data.even_out(len(counts) - 2)  # this data set's judged queries and its sentences
    return data, counts


def with_backbone(plan: Plan, head: PreTrainedModel, backbone: Encoder) -> Encoder:
    """The trained head and its backbone as one retriever, with the backbone's prompts and length."""
    assert plan.room and plan.head
    recipe = plan.recipe
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:  # Windows keeps weights that are mapped
        made = Path(scratch) / "model"
        if _behind_modules(plan, backbone):
            assert plan.room.module
            # Opened afresh: for encoding, its weights may have been halved.
            folder = fetch(recipe.backbone, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
            whole = _opened(plan, folder)
            modules = [*whole.children(), plan.room.module(head)]
            model = family_of(plan.run)(modules=modules, prompts=whole.prompts)
            save(model, made, readme="", form="pipeline" if plan.head.pipeline else "folder")
        else:
            build(plan, made, head)
        model = load(made, trust_remote_code=recipe.trust_remote_code)
    model.prompts, model.max_seq_length = backbone.prompts, backbone.max_seq_length
    return model


def _behind_modules(plan: Plan, backbone: Encoder) -> bool:
    """Whether a head is put behind the backbone's own modules, from which one folder may then be made."""
    assert plan.head
    return plan.head.pipeline or type(backbone) is MultiVectorEncoder
