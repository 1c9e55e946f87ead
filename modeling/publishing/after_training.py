"""Publish what was just trained: refused before training if it can be, measured and published after it."""

from __future__ import annotations

from pathlib import Path

from ..data.load import load_retrieval_dataset
from ..errors import InputError
from ..evaluation.evaluate import evaluate
from ..evaluation.table import display_name
from ..hub.folder import fetch, local
from ..training.recipes import Plan
from .publish import publish
from .upload import check_repo_name, head_of


def refuse_unpublishable(plan: Plan, card: str | None) -> tuple[str, bool]:
    """What can be known before training of whether a run can be published.

    Args:
        plan: The run.
        card: Template of its card.

    Returns:
        The repository's name, and whether all data are texts.

    Raises:
        InputError: No name, token or card, a repository that may not be replaced, a head alone, or data on whose test
            split the model could not be measured.
    """
    args, recipe = plan.args, plan.recipe
    if args.hub_token:
        raise InputError(
            "--hub_token: command lines are kept with the model, and this one could be read there. Set HF_TOKEN, or "
            "run `hf auth login`."
        )
    if not args.hub_model_id:
        raise InputError("--push_to_hub: no name to publish under. Add --hub_model_id ORG/NAME.")
    check_repo_name(args.hub_model_id)
    if not recipe.dry_run:
        head_of(args.hub_model_id, None, private=bool(args.hub_private_repo))
    if not card:
        raise InputError("--push_to_hub: this run makes no card. Name a template with --card.")
    if plan.head and plan.head.head_only:
        raise InputError(
            "--push_to_hub: the head alone encodes no text, so it could not be measured. Leave out --head_only."
        )
    if display_name(recipe.backbone) == display_name(str(Path(args.output_dir) / "final")):
        raise InputError(
            f"--output_dir {args.output_dir}: called like its backbone, beside which the model is measured. Choose "
            "another name."
        )
    texts = True
    for source in recipe.datasets:
        try:
            dataset = load_retrieval_dataset(source, "test", keep_empty=recipe.keep_empty)
        except InputError as error:
            raise InputError(
                f"--push_to_hub: a model is published with what it scores on the test split of its data. {error} Or "
                "train without, measure the model on other data, and `polyrep publish` it."
            ) from error
        if dataset.vectors:
            raise InputError(
                f"--push_to_hub: {source} brings vectors, not what they were made of, so the model could not be "
                "measured on it. Train without, measure on a data set with images, then `polyrep publish`."
            )
        texts &= isinstance(next(iter(dataset.corpus.values())), str)
    return str(args.hub_model_id), texts


def measure_and_publish(plan: Plan, folder: Path, repo: str, texts: bool, prog: str) -> None:
    """Measure a trained model beside its untouched backbone and BM25, on the test split of its data; publish it.

    Args:
        plan: The run.
        folder: What it made.
        repo: Where it goes.
        texts: Whether all data are texts.
        prog: How ``train`` was called, so that the recorded command is one of the same kind.
    """
    recipe, results = plan.recipe, folder.parent / "results"
    backbone, pinned = recipe.backbone, recipe.revision
    if not local(backbone):
        pinned = fetch(backbone, revision=recipe.revision).name  # a snapshot is called by its commit
    # BM25 reads no images, and neither does the text half of a dual encoder.
    baselines = (["bm25"] if texts else []) + ([] if plan.head and plan.head.vision else [backbone])
    measure = [str(folder), "--dataset", *recipe.datasets, "--baselines", ",".join(baselines) or "none"]
    measure += ["--trust_remote_code", "--output", str(results), "--name", "test"]
    measure += [*(["--revision", pinned] if pinned else []), *(["--keep_empty"] if recipe.keep_empty else [])]
    flags = ["--repo", repo, *(["--private"] if plan.args.hub_private_repo else [])]
    flags += ["--trust_remote_code"] if recipe.trust_remote_code else []
    try:
        evaluate(
            measure,
            prog="evaluate.py" if prog.endswith(".py") else "polyrep evaluate",
            untrusted=[] if recipe.trust_remote_code else [backbone],  # the model's own code is ours
        )
        publish([str(folder), *flags, "--results", str(results / "test.json")])
    except InputError as error:
        raise InputError(
            f"{folder} is trained and whole, but not published: {error} Then `polyrep publish {folder} "
            f"{' '.join(flags)}`, after `evaluate` where results are missing."
        ) from error
