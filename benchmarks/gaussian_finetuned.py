"""What a variance gains when the whole encoder is trained: every setting beside the plain vector of as many numbers.

    python benchmarks/gaussian_finetuned.py --stage dev --time_budget 540     # one seed; again until done
    python benchmarks/gaussian_finetuned.py --stage test --time_budget 540    # the control and the best three
    python benchmarks/gaussian_finetuned.py --stage table --output results

A model is trained on the union of the train sets for each setting and seed, the variance from an inserted [VAR] as in
the paper. Meant for a GPU; ``--max_steps 2`` tries it on any machine. Rows that are taught need
models/four/late-interaction-minilm/final, which train.py makes.
"""

from __future__ import annotations

import finetuned_tier
import gaussian_frozen as frozen

CONTROL = frozen.CONTROL
TAUGHT = ["--teacher", "models/four/late-interaction-minilm/final", "--hard_negatives", "4", "--distill_weight", "0.3"]


def _setting(*flags: str, divergence: str = "kl", groups: int = 1) -> list[str]:
    found = [*frozen.PLAIN, "--divergence", divergence, "--beta", "20", "--prior_weight", "0.03"]
    return [*found, "--variance_groups", str(groups), *flags]


BOTH = ["--separate_variance", "true", "--inclusion_weight", "1", "--difficulty_weight", "1"]

VECTOR = [*frozen.VECTOR, "--variance_from", "mean"]  # no [VAR]
CONTROLS: dict[str, list[str]] = {
    **{
        f"{CONTROL}{name}": [*VECTOR, "--tau", tau]
        for name, tau in (("", "0.035"), (", tau 0.05", "0.05"), (", tau 0.025", "0.025"))
    },
    "vector, taught": [*VECTOR, "--tau", "0.035", *TAUGHT],
    "vector, mined again": [*VECTOR, "--tau", "0.035", "--remine", "true"],
}
GAUSSIANS: dict[str, list[str]] = {
    "kl, no groups": _setting(groups=0),
    "kl, 1 group": _setting(),
    "kl, 16 groups": _setting(groups=16),
    "kl, 1 group, variance from the mean's state": _setting("--variance_from", "mean"),
    **{f"kl, variance rate {rate}": _setting("--variance_rate", rate) for rate in ("1", "50")},
    **{f"kl, beta {beta}": _setting("--beta", beta) for beta in ("14", "28")},
    "kl, not normalised": _setting("--normalize_mean", "false"),
    "reverse kl": _setting(divergence="reverse_kl", groups=0),
    "likelihood": _setting(divergence="likelihood", groups=0),
    "w2": _setting(divergence="w2", groups=0),
    "csd": _setting(divergence="csd", groups=0),
    "kl, inclusion": _setting("--inclusion_weight", "1"),
    "kl, separate, both": _setting(*BOTH),
    "kl, taught": _setting(*TAUGHT),
    "kl, mined again": _setting("--remine", "true"),
}

TIER = finetuned_tier.Tier(
    name="gaussian-finetuned",
    control=CONTROL,
    forms=CONTROLS | GAUSSIANS,
    claims={"gaussian.gain_over_vector_control_finetuned": (list(GAUSSIANS), 0.0)},
    run_of=lambda form: "gaussian-minilm",
    monitors=("query_log_variance",),
    code=frozen.CODE,
    matched=lambda form: next(
        ([f"{CONTROL}, {how}"] for how in ("taught", "mined again") if form.endswith(how)),
        [CONTROL, "vector, tau 0.05", "vector, tau 0.025"],
    ),
)

if __name__ == "__main__":
    finetuned_tier.run(TIER)
