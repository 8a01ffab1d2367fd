"""Claim: visual attention experts beside the visual FFN experts see better, and need fewer samples for the same score.

Mono-InternVL-1.5 (arXiv 2507.12566): EViP++ adds visual attention experts and pre-trains on 58% fewer samples (400M + 150M instead of
1.18B + 143M, second-hand); MLLM average 53.7 -> 55.6, VQA average 70.1 -> 70.4. The paper's ablation tables are not among our sources.

Here: both models through the same stages on the same samples. For the samples: at which share of its samples each model first reaches the
final score of the weaker one, by straight lines between the scored points of all stages.

    python -m experiments.ablations.attention_experts           -> experiments/results/ablations/attention_experts/page.md
    on a pod: monovl plan evip_plus_plus --topology v5e:16x16   (beside monovl plan evip)
"""

from __future__ import annotations

import math

from experiments.ablations.chains import Arm
from experiments.ablations.evip_stages import RATES, STAGES
from experiments.ablations.pages import Panel, Run, points
from experiments.ablations.runner import VISUAL as VISUAL_SCORE
from experiments.ablations.runner import Claim, Experiment, Score, main, more


def rows_until(run: Run, score: float) -> float:
    """Rows after which a run first has this visual score; infinite when it never does."""
    before, had = 0.0, 0.0
    for rows, value in zip(*points(run, "visual"), strict=True):
        if value >= score:
            return before + (rows - before) * (score - had) / (value - had) if value > had else before
        before, had = rows, value
    return math.inf


def samples_saved(better: Run, worse: Run) -> float:
    """log2 of (samples that `worse` needs / samples that `better` needs) for the final score of the weaker of the two.

    58% fewer samples are 1.25. Negative when it is `better` that needs more.
    """
    score = min(VISUAL_SCORE.of(better), VISUAL_SCORE.of(worse))
    return math.log2(max(1.0, rows_until(worse, score)) / max(1.0, rows_until(better, score)))


EXPERIMENT = Experiment(
    name="attention_experts",
    title="Visual attention experts",
    published="Mono-InternVL-1.5 against Mono-InternVL: MLLM average 53.7 to 55.6 with 58% fewer pre-training samples (second-hand).",
    arms=(
        Arm("FFN", "visual FFN experts", "ffn", STAGES),
        Arm("FFN and attention", "visual FFN and attention experts", "ffn+attention", STAGES),
    ),
    claims=(
        Claim("attention experts see better at the same samples", "FFN and attention", "FFN", more(VISUAL_SCORE), 2.0, "points"),
        Claim(
            "attention experts need fewer samples for the same score", "FFN and attention", "FFN", samples_saved, 0.15, "log2 of samples"
        ),
    ),
    columns=(
        VISUAL_SCORE,
        Score("after S1.3", "visual", "S1.3"),
        Score("captions", "captions"),
        Score("words", "words"),
        Score("answers", "answer_nll", None, "nats per token"),
        Score("prose at the end", "prose", None, "nats per token"),
    ),
    panels=(
        Panel("arms", "After S2", VISUAL_SCORE.of, "visual score, % of answers exact"),
        Panel("curve", "By samples seen", "visual", "visual score, % of answers exact"),
        Panel("curve", "By samples seen", "answer_nll", "answers, nats per token"),
    ),
    rates=RATES,
    reading=(
        "At the same samples the attention experts see better at every seed, by 2, 4 and 11 points, and from S1.1's end on; three seeds "
        "that spread so leave 0 in the interval. The saving of samples is small and steady: they reach the final score of the FFN "
        "experts with 8% to 10% fewer, an interval above 0, but short of the 10% (0.15) that was fixed in advance and far from the "
        "paper's 58%. That number is not like this one: it compares two recipes, 550M samples against 1,323M. Here the recipe is the "
        "same, and each stage begins after the same rows for both, so that there is little room to be early."
    ),
)

if __name__ == "__main__":
    main(EXPERIMENT)
