"""Train any run: a Hub folder without weights (``hub_configs/<run>``) in, a Hub folder with weights out.

What trains is the stock trainer of the sentence-transformers family that the folder names, which is Accelerate
underneath, so mixed precision, several processes, resuming and reporting are theirs. Here is only what they leave
open: building the untrained model as ``<output_dir>/init``, keeping its checkpoints loadable, and writing the trained
one as ``<output_dir>/final``. Reading the recipe and the flags is in ``recipes.py``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import set_seed

from ..errors import InputError
from ..files import read_json, write_json
from ..hub.cards import check_template, render_card
from ..hub.fingerprint import fingerprint
from ..hub.folder import fetch, load, save
from ..report import provenance
from .adapters import add_adapters, merge_adapters
from .build import build
from .checkpoints import checkpoint_to_resume, last_checkpoint
from .frozen import head_trainer, with_backbone
from .recipes import RecipeArguments, resolve
from .record import card_context, not_default, print_plan
from .whole import family_trainer


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
        from ..publishing.after_training import (  # with all that measures: others need not wait
            measure_and_publish,
            refuse_unpublishable,
        )

        push_to = refuse_unpublishable(plan, card)
        args.push_to_hub = False  # the trainer would push checkpoints, without card or results
    resume = checkpoint_to_resume(output, args.resume_from_checkpoint)
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
            trainer, counts, backbone = head_trainer(plan)
            model = trainer.objective.model
        else:
            # The code of a room is ours; any other code in the folder came with the backbone.
            model = load(init, trust_remote_code=bool(plan.room) or recipe.trust_remote_code)
            if recipe.lora_rank:
                add_adapters(model, recipe.lora_rank)
            trainer, counts = family_trainer(plan, model)
        if recipe.dry_run:
            print_plan(plan, model, trainer, counts, output)
            return None
        with torch.random.fork_rng(devices=[]):
            no_batch = not plan.head and next(iter(trainer.get_train_dataloader().batch_sampler), None) is None
        if no_batch:
            raise InputError(
                f"{sum(counts.values())} pairs make no batch of {args.train_batch_size}, so there is no step. Lower "
                "--per_device_train_batch_size, name more --datasets, or take another --batch_sampler."
            )
        context = card_context(plan, counts)
        for path in earlier:  # only now that nothing of the new run can be refused any more
            shutil.rmtree(path)
        started = time.perf_counter()
        try:
            if not plan.head or any(part.requires_grad for part in trainer.objective.parameters()):
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
            if plan.head:
                trainer.finish()
        except KeyboardInterrupt:
            last = last_checkpoint(output)
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
            model = with_backbone(plan, model, backbone)
    if not (plan.head and plan.head.head_only):
        readme = str(render_card(model, card, recipe=context)) if card else None
        final = made["final"] = save(model, output / "final", readme=readme)
    fingerprints = {name: fingerprint(folder) for name, folder in made.items()}
    write_json(
        output / "training.json",
        provenance(plan.command)
        | {
            "recipe": plan.defaults | not_default(recipe, RecipeArguments()) | plan.config | plan.objective_arguments,
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
