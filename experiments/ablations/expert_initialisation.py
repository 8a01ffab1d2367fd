"""Claim: visual experts should start as copies of the text experts; and the choices of 1.5 that no source settles, measured.

Mono-InternVL initialises the visual FFN from the text FFN (second-hand: section 3.2); no ablation of it is published. Open in 1.5, and
decided here by our defaults: the visual attention expert copies qkv and the output projection; it trains from S1.1 on; norms are shared by
both modalities and frozen while the language model is. Norms of their own would add nothing that can be expressed: where a token's
attention and FFN projections are its own, the scale of the norm before them is absorbed by their rows (a test shows it).

    python -m experiments.ablations.expert_initialisation       -> experiments/results/ablations/expert_initialisation/page.md
    on a pod: monovl plan evip_plus_plus --topology v5e:16x16
"""

from __future__ import annotations

import dataclasses

from experiments.ablations.chains import VISION, Arm, Step
from experiments.ablations.evip_stages import S1_1, S1_2, STAGES
from experiments.ablations.pages import Panel
from experiments.ablations.runner import VISUAL as VISUAL_SCORE
from experiments.ablations.runner import Claim, Experiment, Score, main, more

_FFN_ALONE = (*VISION, r"^decoder/blocks/mlp/visual/")
_NORMS = (r"^decoder/blocks/(attention_norm|ffn_norm)$",)


def _in_stage_one(change: tuple[str, ...] | None = None, more_patterns: tuple[str, ...] = ()) -> tuple[Step, ...]:
    """The stages with S1.1 and S1.2 training something else."""
    changed = []
    for step in STAGES:
        if step in (S1_1, S1_2):
            step = dataclasses.replace(step, trainable=(change or step.trainable) + more_patterns)
        changed.append(step)
    return tuple(changed)


EXPERIMENT = Experiment(
    name="expert_initialisation",
    title="How visual experts begin",
    published="Mono-InternVL: the visual FFN starts as a copy of the text FFN (second-hand); no numbers are published.",
    arms=(
        Arm("copy", "copies of the text experts (default)", "ffn+attention", STAGES),
        Arm("random", "random experts", "ffn+attention", STAGES, "random"),
        Arm("zero output", "random experts whose last matrices are 0", "ffn+attention", STAGES, "zero output"),
        Arm("qkv alone", "no visual output projection", "ffn+attention", STAGES, attention_output=False),
        Arm("attention late", "visual attention trains from S1.3 on", "ffn+attention", _in_stage_one(_FFN_ALONE)),
        Arm("norms too", "norms of the blocks train from S1.1 on", "ffn+attention", _in_stage_one(None, _NORMS)),
    ),
    claims=(
        Claim("copies beat random experts", "copy", "random", more(VISUAL_SCORE), 2.0, "points"),
        Claim("copies beat experts with zero output", "copy", "zero output", more(VISUAL_SCORE), 2.0, "points"),
        Claim("a visual output projection helps", "copy", "qkv alone", more(VISUAL_SCORE), 2.0, "points"),
        Claim("training visual attention from S1.1 on helps", "copy", "attention late", more(VISUAL_SCORE), 2.0, "points"),
        Claim("frozen norms are better than trained ones", "copy", "norms too", more(VISUAL_SCORE), 2.0, "points"),
    ),
    columns=(
        VISUAL_SCORE,
        Score("after S1.3", "visual", "S1.3"),
        Score("answers", "answer_nll", None, "nats per token"),
        Score("prose after S1.2", "prose", "S1.2", "nats per token"),
        Score("prose at the end", "prose", None, "nats per token"),
    ),
    panels=(
        Panel("arms", "After S2", VISUAL_SCORE.of, "visual score, % of answers exact"),
        Panel("curve", "By samples seen", "answer_nll", "answers, nats per token"),
    ),
    rate_from=("tuning_strategy", "experts delta"),
    reading=(
        "No choice costs much but one: visual attention that trains from S1.3 on only is worse at every seed, by 1 to 10 points, about "
        "what having no attention experts costs (`attention_experts`). Random experts are behind copies at every seed too, by 0.3 to 6 "
        "points. Zero output, qkv alone and trained norms are on average within a point of the default. Only the last is decided: "
        "frozen norms are not 2 points better than trained ones, they are 0.8 worse. We keep them frozen while the language model is: "
        "trained ones change what it says of text alone, though here by no more than 0.003 nats per token after S1.2. The copies are of "
        "a language model taught for 350 steps; what a real one knows may make them worth more."
    ),
)

if __name__ == "__main__":
    main(EXPERIMENT)
