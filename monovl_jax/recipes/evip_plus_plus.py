"""EViP++ of Mono-InternVL-1.5-2B (arXiv 2507.12566): visual attention experts, and 42% of EViP's data.

    stage  samples   trains
    S1.1   250M      patch embedding, projector, visual FFN, visual attention
    S1.2   150M      the same
    S1.3   150M      + text attention projections
    S2     7M        everything

Second-hand: 400M, 150M and 7M samples for pre-training, alignment and instructions. Unverified: the split of the 400M into 250M and
150M, and that visual attention trains from S1.1 on. Everything else is taken over from EViP (`recipes.evip`), unverified for 1.5.
"""

from __future__ import annotations

import dataclasses

from monovl_jax.config import mono_internvl_1_5_2b
from monovl_jax.recipes import evip
from monovl_jax.training.stages import Recipe

VISUAL = (*evip.VISUAL, r"^decoder/blocks/attention/visual/")
"""Everything that only visual tokens pass through."""

S1_1 = dataclasses.replace(evip.S1_1, trainable=VISUAL, steps=250_000_000 // evip.S1_1.batch_size)
S1_2 = dataclasses.replace(evip.S1_2, trainable=VISUAL, steps=150_000_000 // evip.S1_2.batch_size)
S1_3 = dataclasses.replace(evip.S1_3, trainable=VISUAL + evip.TEXT_ATTENTION, steps=150_000_000 // evip.S1_3.batch_size)
S2 = evip.S2

STAGES = [S1_1, S1_2, S1_3, S2]


def evip_plus_plus_2b() -> Recipe:
    """Mono-InternVL-1.5-2B from a pre-trained InternLM2-chat-1.8B; visual FFN and attention start as copies of the text ones."""
    return Recipe("evip_plus_plus_2b", mono_internvl_1_5_2b(), tuple(STAGES), copy_experts_before="S1.1")


recipe = evip_plus_plus_2b
"""What `monovl train evip_plus_plus` runs."""
