"""Train any run: a Hub folder without weights (``hub_configs/<run>``) in, a Hub folder with weights out.

What trains is the stock trainer of the sentence-transformers family that the folder names, which is Accelerate
underneath, so mixed precision, several processes, resuming and reporting are theirs. Here is only what they leave
open: building the untrained model as ``<output_dir>/init``, keeping its checkpoints loadable, and writing the trained
one as ``<output_dir>/final``. Reading the recipe and the flags is in ``recipes.py``.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules.transformer import Transformer
from sentence_transformers.util.misc import import_from_string
from transformers import AutoTokenizer, PreTrainedModel, TrainerCallback, set_seed

from .adapters import AdapterTrainerMixin, add_adapters, merge_adapters
from .data.dataset import RetrievalDataset, dataset_name
from .data.load import load_corpus, load_retrieval_dataset
from .data.made_queries import inverse_cloze, texts_as_queries
from .errors import InputError
from .files import read_json, staged_folder, write_json
from .heads import HeadData, HeadTrainer
from .hub.cards import check_template, data_licence, public_command, render_card, stated_licence
from .hub.code import localize
from .hub.fingerprint import fingerprint
from .hub.folder import MINILM_ID, Encoder, family_of, fastest_dtype, fetch, load, local, save
from .hub.vision import VisionEncoder, fetch_vision
from .mining import Miner, RemineCallback
from .recipes import QUERIES, TRAINERS, HeadArguments, Plan, RecipeArguments, resolve
from .report import provenance
from .teachers import open_teacher


def train(argv: list[str], *, prog: str = "polyrep train") -> Path | None:
    """Train the run named first in ``argv``; the rest are flags.

    Returns:
        The folder of the trained model; None after ``--dry_run`` or after Ctrl-C.

    Raises:
        InputError: The run, a flag, the data or the backbone cannot be used, or the loss stopped being finite.
    """
    plan = resolve(argv, prog=prog)
    args, recipe = plan.args, plan.recipe
    output = Path(args.output_dir)
    if recipe.dry_run and args.process_index != 0:
        return None
    if args.n_gpu > 1:
        raise InputError(
            f"one process sees {args.n_gpu} GPUs, which would train with another batch size than the recipe's. Start "
            "with `accelerate launch`, or show it one GPU with CUDA_VISIBLE_DEVICES."
        )
    card = recipe.card or (plan.room.card if plan.room else None)
    if card:
        check_template(card)
    push_to = None
    if args.push_to_hub:
        from .publish import measure_and_publish, refuse_unpublishable  # with all that measures: others need not wait

        push_to = refuse_unpublishable(plan, card)
        args.push_to_hub = False  # the trainer would push checkpoints, without card or results
    resume = _checkpoint_to_resume(output, args.resume_from_checkpoint)
    started_from = {"backbone": recipe.backbone, "objective": recipe.objective, **plan.config}
    # What older runs did not write down.
    later = ("hard_negatives", "negative_margin", "lora_rank", "teacher", "remine", "restval")
    started_from |= {name: getattr(recipe, name) for name in later} | plan.objective_arguments
    if plan.head:  # what the corpus and the objective make of the head before the first step
        started_from |= {"datasets": recipe.datasets, "split": recipe.split}
        seen = (
            "queries",
            "cloze_sentences",
            "query_texts",
            "max_length",
            "vocabulary",
            "negatives",
            "depth",
            "vision",
        )
        started_from |= {name: getattr(plan.head, name) for name in seen}
    earlier = [] if resume or recipe.dry_run else [output / "final", output / "head", *output.glob("checkpoint-*")]
    earlier = [path for path in earlier if path.exists()] if args.process_index == 0 else []
    if earlier and not recipe.overwrite:
        raise InputError(
            f"{output}: holds {earlier[0].name} of an earlier run, which would be replaced. Go on from there with "
            "--resume_from_checkpoint last, choose another --output_dir, or pass --overwrite."
        )
    before = {name: getattr(RecipeArguments, name) for name in later} | read_json(output / "run.json")
    if resume and (changed := [k for k, v in before.items() if started_from.get(k) != v]):
        raise InputError(
            f"{output}: started with another {', '.join(changed)}, so going on would mix two runs. Leave these flags "
            "as they were (run.json), or start anew in another --output_dir."
        )
    if args.use_cpu:  # accelerate launch gives each process one thread unless told otherwise
        torch.set_num_threads(max(torch.get_num_threads(), (os.cpu_count() or 1) // args.world_size))
    set_seed(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        if recipe.dry_run:
            args.output_dir = scratch  # the trainer makes its folder at once
        init = Path(args.output_dir) / "init"
        with nullcontext() if recipe.dry_run else args.main_process_first(desc="build the untrained model"):
            if args.process_index == 0 and not (resume and init.exists()):
                shutil.rmtree(init, ignore_errors=True)
                if not plan.head:
                    build(plan, init)
                write_json(init.parent / "run.json", started_from)
        if plan.head:
            trainer, counts, backbone = _head_trainer(plan)
            model = trainer.objective.model
        else:
            # The code of a room is ours; any other code in the folder came with the backbone.
            model = load(init, trust_remote_code=bool(plan.room) or recipe.trust_remote_code)
            if recipe.lora_rank:
                add_adapters(model, recipe.lora_rank)
            trainer, counts = _trainer(plan, model)
        if recipe.dry_run:
            _print_plan(plan, model, trainer, counts, output)
            return None
        with torch.random.fork_rng(devices=[]):
            no_batch = not plan.head and next(iter(trainer.get_train_dataloader().batch_sampler), None) is None
        if no_batch:
            raise InputError(
                f"{sum(counts.values())} pairs make no batch of {args.train_batch_size}, so there is no step. Lower "
                "--per_device_train_batch_size, name more --datasets, or take another --batch_sampler."
            )
        context = _card_context(plan, counts)
        for path in earlier:  # only now that nothing of the new run can be refused any more
            shutil.rmtree(path)
        started = time.perf_counter()
        try:
            if not plan.head or any(part.requires_grad for part in trainer.objective.parameters()):
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
            if plan.head:
                trainer.finish()
        except KeyboardInterrupt:
            last = _last_checkpoint(output)
            how = "Go on with --resume_from_checkpoint last." if last else "There is no checkpoint yet (--save_steps)."
            print(f"Interrupted at step {trainer.state.global_step}; last checkpoint: {last}. {how}", flush=True)
            raise
    seconds = time.perf_counter() - started
    if args.process_index != 0:
        return None
    if recipe.lora_rank:
        merge_adapters(model)
    made: dict[str, Path] = {}
    if plan.head:
        final = made["head"] = save(model, output / "head")
        if not plan.head.head_only:
            model = _with_backbone(plan, model, backbone)
    if not (plan.head and plan.head.head_only):
        readme = str(render_card(model, card, recipe=context)) if card else None
        final = made["final"] = save(model, output / "final", readme=readme)
    fingerprints = {name: fingerprint(folder) for name, folder in made.items()}
    write_json(
        output / "training.json",
        provenance(plan.command)
        | {
            "recipe": plan.defaults | _changed(recipe, RecipeArguments()) | plan.config | plan.objective_arguments,
            "learning_rate": args.learning_rate,
            "steps": trainer.state.global_step,
            "batch_size": args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
            "seed": args.seed,
            "backbone_fingerprint": fingerprint(fetch(recipe.backbone, revision=recipe.revision)),
            "fingerprint": fingerprints[final.name],
            "fingerprints": fingerprints,
            "template": card,
            "card": context,
            "pairs": counts,
            "seconds": round(seconds + getattr(trainer, "prepare_seconds", 0.0), 1),
            "log": trainer.state.log_history,
        },
    )
    if push_to:
        measure_and_publish(plan, final, *push_to, prog)
    return final


def build(plan: Plan, folder: Path, head: PreTrainedModel | None = None) -> None:
    """Write a model: the run's folder plus the backbone's weights and tokenizer, and a trained head if there is one.

    A room builds itself through ``from_encoder``. Several modules in ``modules.json`` are built one by one: the first
    from the backbone, stock ones from their own config with fresh weights, and a room's from its fields.
    """
    recipe = plan.recipe
    backbone = fetch(recipe.backbone, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
    with staged_folder(folder) as staged:
        shutil.copytree(plan.run, staged, dirs_exist_ok=True, ignore=shutil.ignore_patterns("recipe.yaml"))
        parts = read_json(plan.run / "modules.json") or [{}]
        if plan.room and len(parts) == 1:
            vision = (
                {"vision": str(fetch_vision(plan.head.vision, plan.head.vision_revision))}
                if plan.head and plan.head.vision
                else {}
            )
            try:
                options = {"head": head} if head is not None else plan.config
                model = plan.room.model.from_encoder(str(backbone), **options, **vision)  # type: ignore[attr-defined]
            except ValueError as error:  # how the config of a room refuses a value
                raise InputError(str(error)) from error
            model.save_pretrained(staged)
            load_processor: Any = getattr(model, "load_processor", AutoTokenizer.from_pretrained)
            load_processor(str(backbone), **vision).save_pretrained(staged)
            _inherit(staged, backbone, getattr(model.config, "similarity_fn_name", None))
            localize(staged)
            return
        family = family_of(plan.run)
        trusted = {"trust_remote_code": recipe.trust_remote_code}
        first = read_json(plan.run / "sentence_bert_config.json")
        modules: list[torch.nn.Module] = [
            Transformer(str(backbone), model_kwargs=trusted, processor_kwargs=trusted, config_kwargs=trusted, **first)
        ]
        for part in parts[1:]:
            module, _, name = part["type"].rpartition(".")
            if plan.room and plan.room.module and name == plan.room.module.__name__:
                modules.append(plan.room.module(**plan.config))
                continue
            if not module.startswith("sentence_transformers."):
                raise InputError(f"{plan.run}/modules.json: {part['type']} is neither stock nor of a registered room.")
            module_class = getattr(importlib.import_module(module), name)
            config = module_class.load_config(str(plan.run), subfolder=part["path"])
            if "activation_function" in config:  # Dense names a class and takes an instance
                config["activation_function"] = import_from_string(config["activation_function"])()
            modules.append(module_class(**config))
        settings = read_json(plan.run / "config_sentence_transformers.json")
        keep = {key: settings[key] for key in ("prompts", "similarity_fn_name") if settings.get(key)}
        try:
            save(family(modules=modules, **keep), staged)
        except ValueError as error:  # how a module of a room refuses what stands before it
            raise InputError(str(error)) from error


def _inherit(folder: Path, backbone: Path, similarity: str | None) -> None:
    """Give a built model the backbone's maximal length and prompts, and its own score, where the run says nothing."""
    for name, inherited in (
        ("sentence_bert_config.json", ("max_seq_length",)),
        ("config_sentence_transformers.json", ("prompts", "default_prompt_name")),
    ):
        own, theirs = read_json(folder / name), read_json(backbone / name)
        own |= {key: theirs[key] for key in inherited if theirs.get(key) is not None and not own.get(key)}
        if similarity and name.startswith("config_") and not own.get("similarity_fn_name"):
            own["similarity_fn_name"] = similarity
        write_json(folder / name, own)


class OneWriterMixin:
    """Put before a sentence-transformers trainer: of several processes, only the main one writes a checkpoint.

    Newer releases of transformers ask every process to save, while this ``_save`` takes itself for process zero's, so
    all of them would write the same files at once.
    """

    def _save(self, *args: Any, **kwargs: Any) -> None:
        trainer: Any = super()
        if self.args.should_save:  # type: ignore[attr-defined]
            trainer._save(*args, **kwargs)


class CheckpointCallback(TrainerCallback):
    """Makes every checkpoint a folder that opens without polyrep, and stops a run that is no longer finite.

    Args:
        objective: Its ``metrics``, if it has any, are logged as they are at that step.
    """

    def __init__(self, objective: Any = None):
        self.objective = objective

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Raise InputError before a checkpoint is written, and an older one deleted for it, if a weight is NaN."""
        if control.should_save and not all(torch.isfinite(parameter).all() for parameter in model.parameters()):
            raise InputError(f"a weight is not finite at step {state.global_step}; {_WHEN_NOT_FINITE}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Localise the checkpoint that was just written."""
        if state.is_world_process_zero:
            localize(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Raise InputError on a NaN or infinite loss; add the objective's figures to what is logged."""
        loss = (logs or {}).get("loss", 0.0)
        if logs and "loss" in logs and (metrics := getattr(self.objective, "metrics", None)):
            shown = {name: round(float(value), 4) for name, value in metrics.items()}
            logs.update(shown)
            state.log_history[-1].update(shown)
        if not math.isfinite(loss):
            raise InputError(f"loss is {loss} at step {state.global_step}; {_WHEN_NOT_FINITE}")


_WHEN_NOT_FINITE = (
    "further steps cannot mend the model, so training stops. Lower --learning_rate or --max_grad_norm, or train in "
    "float32; earlier checkpoints are intact."
)


def _trainer(plan: Plan, model: Encoder) -> tuple[Any, dict[str, int]]:
    """The family's trainer over one data set per source, and the number of pairs in each."""
    sources, loaded_from, callbacks = {}, {}, []
    miner = Miner(plan.recipe) if plan.recipe.hard_negatives and not plan.recipe.dry_run else None
    for loaded in _datasets(plan.recipe):
        sources[loaded.name] = loaded.pairs()
        if miner is not None and loaded.given:
            raise InputError(
                f"--hard_negatives {plan.recipe.hard_negatives}: {loaded.name} brings negatives of its own. Use 0."
            )
        if miner is not None:
            with plan.args.main_process_first(desc="mine negatives"):
                sources[loaded.name] = miner.mine(loaded, sources[loaded.name])
            loaded_from[loaded.name] = (loaded, sources[loaded.name])
    _freeze(plan.recipe.freeze, model)
    objective: Any = plan.objective(model, **plan.objective_arguments)
    if hasattr(objective, "prepare") and not plan.recipe.dry_run and not plan.args.resume_from_checkpoint:
        objective.prepare(sources)
    if plan.args.learning_rate_mapping == {} and hasattr(objective, "learning_rates"):
        names = [name for name, _ in objective.named_parameters()]
        plan.args.learning_rate_mapping = {
            pattern: factor * plan.args.learning_rate
            for pattern, factor in objective.learning_rates.items()
            if any(re.search(pattern, name) for name in names)
        }
    if miner is not None and plan.recipe.remine:
        callbacks = [RemineCallback(miner, loaded_from)]
        sources = callbacks[0].shown()
    # Asked for here, since not every sentence-transformers passes on what its trainer says.
    if plan.args.gradient_checkpointing:
        kwargs = plan.args.gradient_checkpointing_kwargs or {"use_reentrant": False}
        first: Any = model[0]
        first.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        plan.args.gradient_checkpointing = False
    mixins = (OneWriterMixin, AdapterTrainerMixin) if plan.recipe.lora_rank else (OneWriterMixin,)
    trainer = type("FamilyTrainer", (*mixins, TRAINERS[type(model).__name__][0]), {})(
        model=model,
        args=plan.args,
        train_dataset=DatasetDict(sources) if len(sources) > 1 else next(iter(sources.values())),
        loss=objective,
        callbacks=[CheckpointCallback(objective), *callbacks],
    )
    return trainer, {name: len(pairs) for name, pairs in sources.items()}


def _datasets(recipe: RecipeArguments, head: HeadArguments | None = None) -> Iterator[RetrievalDataset]:
    """The data sets of a run, one at a time; two of one name are refused, since counts and caches go by name."""
    seen = set()
    queries = head.queries if head else "judged"
    if queries not in QUERIES:
        raise InputError(f"--queries {queries!r}: use one of {', '.join(QUERIES)}.")
    for source in recipe.datasets:
        if queries in ("inverse_cloze", "texts"):
            dataset = load_corpus(source, keep_empty=recipe.keep_empty)
        else:
            dataset = load_retrieval_dataset(
                source, recipe.split, keep_empty=recipe.keep_empty, restval=recipe.restval
            )
        if dataset.name in seen:
            raise InputError(f"--datasets: two are called {dataset.name!r}; rename one folder.")
        seen.add(dataset.name)
        if queries not in ("inverse_cloze", "texts"):
            yield dataset
        if head and queries in ("inverse_cloze", "both"):
            yield inverse_cloze(dataset, head.cloze_sentences)
        if head and queries in ("texts", "judged+texts"):
            yield texts_as_queries(dataset, head.query_texts)


def _freeze(patterns: list[str], model: torch.nn.Module) -> None:
    for pattern in patterns:
        matched = [parameter for name, parameter in model.named_parameters() if re.search(pattern, name)]
        if not matched:
            names = [name for name, _ in model.named_parameters()]
            raise InputError(f"--freeze {pattern!r}: matches no parameter. The first is {names[0]!r}.")
        for parameter in matched:
            parameter.requires_grad_(False)


def _head_trainer(plan: Plan) -> tuple[HeadTrainer, dict[str, int], Encoder]:
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
        "base_model_id": _base_id(recipe.backbone),
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
        base |= {"image_dim": images.get_embedding_dimension(), "vision_model_id": _base_id(settings.vision)}
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
    _freeze(recipe.freeze, head)
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
    for dataset in _datasets(recipe, settings):
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


def _with_backbone(plan: Plan, head: PreTrainedModel, backbone: Encoder) -> Encoder:
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


def _print_plan(plan: Plan, model: Encoder, trainer: Any, counts: dict[str, int], output: Path) -> None:
    args = plan.args
    per_epoch = math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
    everything = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    plan_lines = {
        "run": plan.run,
        "backbone": plan.recipe.backbone,
        "method": plan.config or "stock modules: " + ", ".join(type(module).__name__ for module in model.children()),
        "objective": f"{plan.recipe.objective} {plan.objective_arguments}",
        "pairs": ", ".join(f"{name} {count:,}" for name, count in counts.items()) + f" = {sum(counts.values()):,}",
        "batch": f"{args.train_batch_size} x {args.world_size} processes x {args.gradient_accumulation_steps}",
        "steps": f"{steps:,} ({steps / per_epoch:.3g} epochs of {per_epoch:,})",
        "parameters": f"{everything:,}, {trainable:,} trainable",
        "output": output / "final",
    }
    print("\n".join(f"{key:<11} {value}" for key, value in plan_lines.items()))


def _checkpoint_to_resume(output: Path, wanted: str | None) -> Path | None:
    if not wanted:
        return None
    if wanted.lower() not in ("last", "true"):
        if not _is_complete(Path(wanted)):
            raise InputError(f"--resume_from_checkpoint {wanted}: no complete checkpoint (trainer_state.json) there.")
        return Path(wanted)
    if (last := _last_checkpoint(output)) is None:
        raise InputError(f"--resume_from_checkpoint {wanted}: {output} holds no complete checkpoint to go on from.")
    return last


def _last_checkpoint(output: Path) -> Path | None:
    complete = [path for path in output.glob("checkpoint-*") if _is_complete(path)]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_complete(checkpoint: Path) -> bool:
    """The trainer writes its state last, so a checkpoint cut off while it was written has none that can be read."""
    try:
        return "global_step" in json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False


def _base_id(backbone: str) -> str:
    """A backbone's name for others: its Hub id, or the last part of a path that says something; the rest is ours."""
    if backbone == "minilm":
        return MINILM_ID
    path = Path(backbone).resolve()
    return (path.parent if path.name == "final" else path).name if path.is_dir() else backbone


def _card_context(plan: Plan, counts: dict[str, int]) -> dict[str, Any]:
    """What the card says of a run: nothing of the machine that made it, and whose weights and data went into it."""
    recipe = plan.recipe
    vision = plan.head.vision if plan.head else ""
    sources = {dataset_name(source): source for source in recipe.datasets}
    names = {name: sources.get(name) or sources[name.removesuffix("-cloze")] for name in counts}
    backbone = fetch(recipe.backbone, revision=recipe.revision)
    licences = {
        "backbone": stated_licence(backbone),
        "vision": stated_licence(fetch_vision(vision, plan.head.vision_revision)) if plan.head and vision else None,
        "data": {name: data_licence(source) for name, source in names.items()},
    }
    return {
        "command": public_command(plan.command),
        "backbone_id": _base_id(recipe.backbone),
        # A snapshot is called by its commit.
        "backbone_revision": None if local(recipe.backbone) else backbone.name,
        "vision_id": _base_id(vision) if vision else None,
        "labels": plan.objective_arguments.get("label_weight", 1) > 0,
        "objective": recipe.objective,
        "pairs": counts,
        "datasets": {name: None if Path(source).is_dir() else source for name, source in names.items()},
        "licences": licences,
        "versions": ", ".join(f"{name} {version}" for name, version in provenance("")["versions"].items()),
        "seed": plan.args.seed,
        "batch_size": plan.args.train_batch_size * plan.args.world_size,
        "learning_rate": plan.args.learning_rate,
        "length": f"{plan.args.max_steps} steps"
        if plan.args.max_steps > 0
        else f"{plan.args.num_train_epochs:g} epochs",
    }


def _changed(values: Any, defaults: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(values).items() if value != getattr(defaults, key)}
