"""Train any run: a Hub folder without weights (``hub_configs/<run>``) in, a Hub folder with weights out.

What trains is a stock trainer, which is Accelerate underneath, so mixed precision, several processes, resuming and
reporting are theirs: that of the sentence-transformers family that the folder names for a whole model (``whole.py``),
that of transformers for a head on cached vectors (``frozen.py``). Here is only the order of things: refuse what cannot
be done, build the untrained model as ``<output_dir>/init``, train, write the trained one as ``<output_dir>/final``.
Reading the recipe and the flags is in ``recipes.py``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from pickle import UnpicklingError

import torch
from transformers import set_seed

from ..errors import InputError
from ..files import refuse_unwritable, write_json, writing
from ..hub.code import refuse_foreign_code
from .build import build
from .checkpoints import checkpoint_to_resume, last_checkpoint, steps_of
from .datasets import dev_of
from .frozen import HeadTraining
from .recipes import Plan
from .record import (
    RUN,
    card_context,
    lasting_settings,
    planned_steps,
    print_plan,
    refuse_another_run,
    write_record,
    written,
)
from .whole import WholeTraining

Training = WholeTraining | HeadTraining


def run(plan: Plan) -> Path | None:
    """Train a plan.

    Returns:
        The folder of the trained model; None after ``--dry_run``, and in all processes but the first.

    Raises:
        InputError: The data or the backbone cannot be used, or the loss stopped being finite.
        KeyboardInterrupt: Ctrl-C; the last checkpoint is told.
    """
    plan = plan.with_trainer(push_to_hub=False)  # the trainer would push checkpoints, without card or results
    args, output = plan.args, Path(plan.args.output_dir)
    if plan.recipe.dry_run:
        _show(plan)
        return None
    resume, earlier = _start(plan)
    training = _prepared(plan, resume)
    training.refuse_no_step()
    finished = resume if resume and not _steps_left(training, resume) else None
    if finished and (folder := written(output, steps_of(finished))):
        if args.process_index != 0:
            return None
        print(f"{finished}: all steps are done, so nothing is left to do. {folder} stays as it is.", flush=True)
        return folder
    context = card_context(plan, training.pair_counts)
    for path in earlier:  # only now that nothing of the new run can be refused any more
        shutil.rmtree(path)
    seconds = training.prepare_seconds
    if finished:  # but interrupted before the model was written
        training.restore(finished)
    else:
        seconds += _train(training, resume)
    if args.process_index != 0:
        return None
    made = training.save(output, context)
    seconds += training.trainer.so_far.seconds
    write_record(plan, made, context, training.trainer.state, seconds, output)
    return list(made.values())[-1]


def _start(plan: Plan) -> tuple[Path | None, list[Path]]:
    """What a run goes on from, if it does, and what it replaces of an earlier one; sets the seed.

    Raises:
        InputError: One process sees several GPUs, a folder cannot be written to, there is no checkpoint, it is of
            another run, or an earlier run would be replaced and nobody said so.
    """
    args, output = plan.args, Path(plan.args.output_dir)
    if args.n_gpu > 1:
        raise InputError(
            f"one process sees {args.n_gpu} GPUs, which would train with another batch size than the recipe's. Start "
            "with `accelerate launch`, or show it one GPU with CUDA_VISIBLE_DEVICES."
        )
    if args.process_index == 0:
        refuse_unwritable(output, "--output_dir")
        if plan.head:
            refuse_unwritable(Path(plan.head.cache_dir), "--cache_dir")
        if plan.recipe.hard_negatives:
            refuse_unwritable(Path(plan.recipe.mined_cache), "--mined_cache")
    resume = checkpoint_to_resume(output, args.resume_from_checkpoint)
    if resume and not plan.recipe.trust_remote_code:
        refuse_foreign_code(resume, "going on from it")
    earlier = []
    if resume:
        refuse_another_run(plan, output)
    elif args.process_index == 0 and not plan.recipe.dry_run:
        places = [output / "final", output / "head", *output.glob("checkpoint-*")]
        earlier = [path for path in places if path.exists()]
    if earlier and not plan.recipe.overwrite:
        raise InputError(
            f"{output}: holds {earlier[0].name} of an earlier run, which would be replaced. Go on from there with "
            "--resume_from_checkpoint last, choose another --output_dir, or pass --overwrite."
        )
    if args.use_cpu:  # accelerate launch gives each process one thread unless told otherwise
        torch.set_num_threads(max(torch.get_num_threads(), (os.cpu_count() or 1) // args.world_size))
    set_seed(args.seed)
    return resume, earlier


def _steps_left(training: Training, checkpoint: Path) -> int:
    """How many steps a run still has to take after a checkpoint; says from where it goes on.

    Raises:
        InputError: The checkpoint is beyond what is asked for.
    """
    steps, done = planned_steps(training.trainer)[0], steps_of(checkpoint)
    if done > steps:
        raise InputError(
            f"{checkpoint}: has {done} steps behind it, and {steps} are asked for, so no run of that length could go "
            "on from it. Name an earlier checkpoint with --resume_from_checkpoint, or more steps."
        )
    if done < steps and training.plan.args.process_index == 0:
        print(f"Going on from step {done} of {steps} ({checkpoint}).", flush=True)
    return steps - done


def _show(plan: Plan) -> None:
    """Print what would be done, by one process; nothing is left behind."""
    if plan.args.process_index != 0:
        return
    resume, _ = _start(plan)
    # The trainer makes its folder at once, and Windows keeps weights that are mapped.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        training = _prepared(plan.with_trainer(output_dir=scratch), resume)
        print_plan(plan, training.model, training.trainer, training.pair_counts)


def _prepared(plan: Plan, resume: Path | None) -> Training:
    """The untrained model, built by one process and opened by all, with its trainer."""
    args = plan.args
    if plan.room and plan.room.settled:
        dev_of(plan.recipe)  # which is read when all is trained, and may be refused
    init, settings = Path(args.output_dir) / "init", lasting_settings(plan)
    with nullcontext() if plan.recipe.dry_run else args.main_process_first(desc="build the untrained model"):
        if args.process_index == 0 and not (resume and init.exists()):
            shutil.rmtree(init, ignore_errors=True)
            if not plan.head:
                build(plan, init)
    training: Training = HeadTraining(plan) if plan.head else WholeTraining(plan, init)
    if args.process_index == 0 and not (resume and (init.parent / RUN).exists()):
        write_json(init.parent / RUN, settings)
    return training


def _train(training: Training, resume: Path | None) -> float:
    """Train from the start or from a checkpoint; return what it took, in seconds."""
    started, output = time.perf_counter(), Path(training.plan.args.output_dir)
    try:
        with writing(output):
            training.train(resume)
    except UnpicklingError:  # torch reads the trainer's state as weights only
        raise InputError(
            f"{resume}: the trainer's state in it (optimizer.pt, scheduler.pt, rng_state.pth) is damaged, or would "
            "run code. Name an earlier checkpoint with --resume_from_checkpoint, or start anew."
        ) from None
    except (KeyboardInterrupt, OSError):
        last = last_checkpoint(output)
        how = "Go on with --resume_from_checkpoint last." if last else "There is no checkpoint yet (--save_steps)."
        step = training.trainer.state.global_step
        print(f"Interrupted at step {step}; last checkpoint: {last}. {how}", flush=True)
        raise
    return time.perf_counter() - started
