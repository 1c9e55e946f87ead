"""What several layers gain when the whole encoder is trained: every form beside the dual encoder.

    python benchmarks/multilayer_finetuned.py --stage dev --time_budget 540     # all forms, one seed; again until done
    python benchmarks/multilayer_finetuned.py --stage test --time_budget 540    # the control and the best three
    python benchmarks/multilayer_finetuned.py --stage table --output results

A model is trained on the union of the train sets for each form and seed, and every finished one is a line in
``<cache_dir>/multilayer-finetuned.jsonl``. A command ends when the next model would not fit into its time budget, and
goes on after the last line when it is started again. Meant for a GPU; ``--max_steps 2`` tries it on any machine.
"""

from __future__ import annotations

import finetuned_tier
import multilayer_frozen as frozen

CONTROL, FOUR, SEVEN = frozen.CONTROL, frozen.FOUR, frozen.SEVEN


def _form(pooling: str, layers: str = "-1 -3", *rest: str, lambda_: str = "0") -> list[str]:
    return ["--pooling", pooling, "--layers", *layers.split(), "--lambda_", lambda_, *rest]


PUBLISHED: dict[str, list[str]] = {
    "mean [-1,-3]": _form("mean"),
    "scalar mix [-1,-3]": _form("scalar_mix"),
    "scalar mix [-1,-5]": _form("scalar_mix", "-1 -5"),
    "multi [-1,-3]": _form("multi"),
    "multi [-1..-4]": _form("multi", FOUR),
    "last + regulariser 0.1": _form("last", lambda_="0.1"),
    "last + regulariser 1": _form("last", lambda_="1"),
    **{f"self-contrastive [-1,-3], lambda {w}": _form("self_contrastive", lambda_=w) for w in ("0", "0.1", "1")},
    "self-contrastive [-1,-5], lambda 0.1": _form("self_contrastive", "-1 -5", lambda_="0.1"),
}
OURS: dict[str, list[str]] = {
    "self-contrastive, learned temperature": _form("self_contrastive", "-1 -3", "--learn_tau", "true", lambda_="0.1"),
    "self-contrastive, stop-gradient": _form("self_contrastive", "-1 -3", "--mode", "stop_gradient", lambda_="0.1"),
    "self-contrastive, margin": _form("self_contrastive", "-1 -3", "--mode", "margin", lambda_="0.1"),
    "self-contrastive, random layer": _form("self_contrastive", SEVEN, "--random_layer", "true", lambda_="0.1"),
    "self-contrastive, queries too": _form("self_contrastive", "-1 -3", "--query_side", "true", lambda_="0.1"),
    "linear, all layers": _form("linear", SEVEN),
    "early layers too": _form("last", "-1 -2 -3 -4 -5 -6", "--early_weight", "0.5"),
}
CLS = ["--token", "cls", "--normalize", "false", "--tau", "1"]
BESIDE: dict[str, list[str]] = {
    "dual encoder, [CLS] and dot product": _form("last", "-1", *CLS),
    "self-contrastive, [CLS] and dot product": _form("self_contrastive", "-1 -3", *CLS, lambda_="1"),
}
SETTINGS = {CONTROL: _form("last", "-1"), **PUBLISHED, **OURS, **BESIDE}

TIER = finetuned_tier.Tier(
    name="multilayer-finetuned",
    control=CONTROL,
    forms=SETTINGS,
    claims={
        "multilayer.gain_finetuned": (list(PUBLISHED), 0.5),
        "multilayer.gain_best_form_finetuned": ([*PUBLISHED, *OURS], 0.5),
    },
    run_of=lambda form: "multilayer-minilm" + ("-multi" if "multi" in SETTINGS[form][1] else ""),
    monitors=("layer_",),
    code=frozen.CODE,
)

if __name__ == "__main__":
    finetuned_tier.run(TIER)
