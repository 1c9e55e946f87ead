"""Train a head on the cached embeddings of a frozen backbone, and put the two together."""

from __future__ import annotations

import copy
import inspect
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from transformers import AutoTokenizer, PreTrainedModel, set_seed

from ..errors import InputError
from ..hub.fingerprint import fingerprint
from ..hub.folder import Encoder, family_of, fastest_dtype, fetch, load
from ..hub.vision import VisionEncoder, fetch_vision
from .build import build
from .checkpoints import CheckpointCallback
from .datasets import datasets_of
from .head_trainer import HeadTrainer
from .pairs import HeadData
from .recipes import Plan
from .record import base_id
from .teachers import open_teacher
from .whole import freeze


def head_trainer(plan: Plan) -> tuple[HeadTrainer, dict[str, int], Encoder]:
    """A trainer of the room's head over cached embeddings, the number of pairs in each data set, and the backbone."""
    recipe, settings = plan.recipe, plan.head
    assert plan.room and settings
    if settings.queries in ("both", "judged+texts") and getattr(plan.objective, "one_corpus", False):
        raise InputError(
            f"--queries {settings.queries}: {plan.objective.__name__} ranks all texts as one corpus, in which every "
            "document would be twice and count against itself. Use judged or inverse_cloze."
        )
    head_class: Any = plan.room.head or plan.room.model
    remote: dict[str, Any] = {"revision": recipe.revision, "trust_remote_code": recipe.trust_remote_code}
    folder = fetch(recipe.backbone, **remote)
    weights = fastest_dtype(settings.model_dtype)
    open_backbone: Any = getattr(plan.room.model, "open_backbone", lambda *_: None)
    backbone = open_backbone(str(folder), weights)
    if backbone is None:
        backbone = load(folder, trust_remote_code=recipe.trust_remote_code, dtype=weights)
    kind = plan.objective.trains_on  # type: ignore[attr-defined]
    needed, reads = {
        "sentence": (SentenceTransformer, "one dense vector a text"),
        "tokens": (MultiVectorEncoder, "several vectors a text"),
        "layers": (SentenceTransformer, "the layers of an encoder with one dense vector a text"),
    }[kind]
    if type(backbone) is not needed:
        raise InputError(
            f"{recipe.backbone}: is a {type(backbone).__name__}, but this head reads {reads}. "
            f"Name a {needed.__name__}."
        )
    if settings.max_length:
        backbone.max_seq_length = settings.max_length
    if not settings.pipeline and not settings.head_only:
        try:
            plan.room.model.check_backbone(backbone)  # type: ignore[attr-defined]
        except ValueError as error:
            raise InputError(str(error)) from error
    base = {
        "base_model_id": base_id(recipe.backbone),
        "base_revision": recipe.revision,
        "base_fingerprint": fingerprint(folder),
    }
    if "seed" in inspect.signature(head_class.config_class).parameters:
        base["seed"] = plan.args.seed
    images = None
    if "image_dim" in inspect.signature(head_class.config_class).parameters:
        if not settings.vision:
            raise InputError(
                "this head joins a text encoder and a vision encoder, and none is named for the images. Add --vision, "
                "e.g. google/mobilenet_v2_1.0_224."
            )
        images = VisionEncoder.open(fetch_vision(settings.vision, settings.vision_revision), weights)
        base |= {"image_dim": images.get_embedding_dimension(), "vision_model_id": base_id(settings.vision)}
    elif settings.vision:
        raise InputError(f"--vision {settings.vision}: {head_class.__name__} joins no encoders. Leave it out.")
    set_seed(plan.args.seed)
    tokenizer = None
    try:
        if settings.vocabulary:
            if plan.config.get("own_tokens") != "none":
                raise InputError(
                    f"--vocabulary {settings.vocabulary}: with another vocabulary than the backbone's, own tokens are "
                    "not known when a text is encoded. Add --own_tokens none."
                )
            words = fetch(settings.vocabulary, revision=None)
            tokenizer = AutoTokenizer.from_pretrained(words)
            dim = backbone.get_embedding_dimension()
            foreign = {"foreign_words": True, "added_tokens": backbone.tokenizer.num_special_tokens_to_add()}
            head = head_class.from_mlm(str(words), dim, tokenizer, **foreign, **plan.config, **base)
        else:
            head = head_class.from_backbone(backbone, **plan.config, **base)
        if settings.pipeline and not settings.head_only:  # what does not fit together should say so before training
            assert plan.room.module
            family_of(plan.run)(modules=[*backbone.children(), plan.room.module(copy.deepcopy(head))])
    except ValueError as error:
        raise InputError(str(error)) from error
    freeze(recipe.freeze, head)
    objective: Any = plan.objective(head, **plan.objective_arguments)
    teacher = open_teacher(recipe.teacher, recipe.teacher_revision) if recipe.teacher and not recipe.dry_run else None
    data = HeadData(
        kind=kind,
        negatives=settings.negatives,
        labels=objective.needs_labels,
        depth=settings.depth,
        narrow_sides=getattr(objective, "narrowed", ()),
        teacher=teacher,
    )
    counts = {}
    for dataset in datasets_of(recipe, settings):
        judged = sum(score > 0 for documents in dataset.qrels.values() for score in documents.values())
        pairs = judged if data.labels else len(dataset.queries)
        counts[dataset.name] = counts.get(dataset.name, 0) + pairs
        if recipe.dry_run:
            part = np.full((pairs, 3), len(counts) - 1)
            data.pairs = np.concatenate([data.pairs, part])  # for the number of steps
        else:
            with plan.args.main_process_first(desc="encode"):
                options: dict[str, Any] = {"cache_dir": settings.cache_dir, "batch_size": settings.encode_batch_size}
                if tokenizer is not None:
                    options["tokenizer"] = tokenizer
                if kind == "layers":
                    options["token"] = head.config.token
                data.add(backbone, dataset, images, **options)
        if settings.queries == "both" and dataset.split == "cloze":
            data.even_out(len(counts) - 2)  # this data set's judged queries and its sentences
    started = time.perf_counter()
    rows: Any = None  # what the trainer goes through; None: the pairs
    if not recipe.dry_run:
        rows = objective.prepare(data)
    elif hasattr(objective, "planned_rows"):
        rows = range(objective.planned_rows)
    prepared = time.perf_counter() - started
    trainer = HeadTrainer(
        objective=objective,
        args=plan.args,
        train_dataset=data if rows is None else rows,
        data_collator=getattr(rows, "collate", data.collate),
        callbacks=[CheckpointCallback()],
        remine=recipe.remine,
    )
    trainer.prepare_seconds = prepared
    return trainer, counts, backbone


def with_backbone(plan: Plan, head: PreTrainedModel, backbone: Encoder) -> Encoder:
    """The trained head and its backbone as one retriever, with the backbone's prompts and length."""
    assert plan.room and plan.head
    if plan.head.pipeline:
        assert plan.room.module
        recipe = plan.recipe  # opened afresh: for encoding, its weights may have been halved
        folder = fetch(recipe.backbone, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
        whole: Any = load(folder, trust_remote_code=recipe.trust_remote_code)
        model = family_of(plan.run)(modules=[*whole.children(), plan.room.module(head)], prompts=whole.prompts)
        if plan.head.max_length:
            model.max_seq_length = plan.head.max_length
        return model
    with tempfile.TemporaryDirectory() as scratch:
        build(plan, Path(scratch) / "model", head)
        model = load(Path(scratch) / "model", trust_remote_code=True)
    model.prompts, model.max_seq_length = backbone.prompts, backbone.max_seq_length
    return model
