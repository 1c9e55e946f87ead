"""Publish what was just trained: refused before training if it can be, measured and published after it."""

from __future__ import annotations

from pathlib import Path

from ..data.load import load_retrieval_dataset
from ..errors import InputError
from ..evaluation.bm25 import analyzer_of
from ..evaluation.evaluate import EvaluationArguments, evaluate_models
from ..evaluation.table import display_name
from ..flags import as_flags, command_line
from ..hub.folder import fetch, local
from ..training.arguments import RecipeArguments
from ..training.recipes import Plan
from .publish import PublishArguments, publish_folder
from .upload import check_repo_name, head_of


def refuse_unpublishable(plan: Plan) -> bool:
    """Say before training what can be known then of why a run could not be published.

    Returns:
        Whether all that it will be measured on are texts, which :func:`measure_and_publish` asks for.

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
    if not plan.card:
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
    return _holds_texts(recipe)


def _holds_texts(recipe: RecipeArguments) -> bool:
    """Whether the documents of all data are texts; InputError if the model could not be measured on some."""
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
    return texts


def _language(recipe: RecipeArguments) -> str:
    """That of BM25: each corpus' own, or English as in every table, which says so, where one does not tell it."""
    for source in recipe.datasets:
        dataset = load_retrieval_dataset(source, "test", keep_empty=recipe.keep_empty)
        try:
            analyzer_of(dataset, "auto")
        except InputError:
            return "en"
    return "auto"


def measure_and_publish(plan: Plan, folder: Path, texts: bool) -> None:
    """Measure a trained model beside its untouched backbone and BM25, on the test split of its data; publish it.

    Args:
        plan: The run.
        folder: What it made.
        texts: What :func:`refuse_unpublishable` said.

    Raises:
        InputError: It could not be measured or published; says how to go on.
    """
    args, recipe = plan.args, plan.recipe
    target = PublishArguments(args.hub_model_id, bool(args.hub_private_repo))
    target.trust_remote_code = recipe.trust_remote_code
    try:
        target.results = [str(_measured(plan, folder, texts))]
        publish_folder(folder, target)
    except InputError as error:
        said = {
            "repo": target.repo,
            "private": target.private or None,
            "trust_remote_code": target.trust_remote_code or None,
        }
        again = command_line("polyrep publish", [str(folder), *as_flags(said)])
        raise InputError(
            f"{folder} is trained and whole, but not published: {error} Then `{again}`, after `evaluate` where "
            "results are missing."
        ) from error


def _measured(plan: Plan, folder: Path, texts: bool) -> Path:
    """The file of what a trained model scores beside its backbone and BM25."""
    recipe, results = plan.recipe, folder.parent / "results"
    backbone, pinned = recipe.backbone, recipe.revision
    if not local(backbone):
        pinned = fetch(backbone, revision=recipe.revision).name  # a snapshot is called by its commit
    # BM25 reads no images, and neither does the text half of a dual encoder.
    baselines = ["bm25"] if texts else []
    baselines += [] if plan.head and plan.head.vision else [backbone]
    asked = EvaluationArguments(
        dataset=recipe.datasets,
        baselines=",".join(baselines) or "none",
        output=str(results),
        name="test",
        revision=pinned,
        trust_remote_code=recipe.trust_remote_code,
        keep_empty=recipe.keep_empty,
    )
    if texts:
        asked.language = _language(recipe)
    evaluate_models(asked, [str(folder)])
    return results / f"{asked.name}.json"
