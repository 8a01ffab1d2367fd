"""EViP, endogenous visual pre-training of Mono-InternVL-2B (arXiv 2410.08202 section 3.3 and its appendix).

    stage  what it learns         samples   trains                                       visual tokens  tiles
    S1.1   concepts, noisy text   922M      patch embedding, projector, visual FFN       1,280          5
    S1.2   semantics, synthetic   258M      the same                                     1,792          7
    S1.3   alignment, tasks       143M      + attention projections                      3,328          13
    S2     instructions           7M        everything                                   6,400          25

What is certain (paper or released code): the order of stages, what each trains, 258M samples of S1.2, the loss on text alone.
Second-hand: the other sample counts (S2 is 5M or 7M: two tables disagree) and the visual tokens; tiles follow from 256 tokens a tile.
Unverified, overridable defaults: learning rates, schedules, weight decay, warm-up, batch sizes, sequence lengths, AdamW's b1, b2 and eps.
The clipping at 1.0 is the default of the upstream trainer. A row is one sample; with packing, fewer rows hold the same samples.
"""

from __future__ import annotations

from monovl_jax.config import mono_internvl_2b
from monovl_jax.training.stages import Recipe, Stage

VISUAL = (r"^vision/", r"^projector/", r"^decoder/blocks/mlp/visual/")
"""Patch embedding, projector and visual FFN: all that S1.1 and S1.2 train."""

TEXT_ATTENTION = (r"^decoder/blocks/attention/text/",)
"""qkv and output projections (upstream's `attention.`), not the norms."""

EVERYTHING = (r".*",)

S1_1 = Stage(
    name="S1.1",
    trainable=VISUAL,
    steps=922_000_000 // 16_384,
    batch_size=16_384,
    learning_rate=2e-4,
    schedule="constant",
    warmup_steps=200,
    weight_decay=0.05,
    sequence_length=1_425,
    tiles_per_row=5,
    mixture={"laion_2b": 1.0, "coyo_700m": 1.0},
)
"""Concept learning on noisy image-text pairs. The shares of the two sources are unverified."""

S1_2 = Stage(
    name="S1.2",
    trainable=VISUAL,
    steps=258_000_000 // 8_192,
    batch_size=8_192,
    learning_rate=1e-4,
    schedule="constant",
    warmup_steps=200,
    weight_decay=0.05,
    sequence_length=1_925,
    tiles_per_row=7,
    mixture={"synthetic_captions": 1.0},
)
"""Semantic learning on synthetic captions (published as Mono-InternVL-2B-Synthetic-Data)."""

S1_3 = Stage(
    name="S1.3",
    trainable=VISUAL + TEXT_ATTENTION,
    steps=143_000_000 // 4_096,
    batch_size=4_096,
    learning_rate=5e-5,
    schedule="cosine",
    warmup_steps=200,
    weight_decay=0.01,
    sequence_length=4_096,
    tiles_per_row=13,
    mixture={"captions": 0.539, "detection": 0.052, "ocr": 0.409},
)
"""Alignment learning on task data, with the attention projections. Shares of the mixture: second-hand."""

S2 = Stage(
    name="S2",
    trainable=EVERYTHING,
    steps=7_000_000 // 1_024,
    batch_size=1_024,
    learning_rate=4e-5,
    schedule="cosine",
    warmup_steps=200,
    weight_decay=0.01,
    sequence_length=8_192,
    tiles_per_row=25,
    mixture={"instructions": 1.0},
)
"""Instruction tuning of the whole model."""

STAGES = [S1_1, S1_2, S1_3, S2]


def evip_2b() -> Recipe:
    """Mono-InternVL-2B from a pre-trained InternLM2-chat-1.8B; visual FFNs start as copies of the text ones."""
    return Recipe("evip_2b", mono_internvl_2b(), tuple(STAGES), copy_experts_before="S1.1")


recipe = evip_2b
"""What `monovl train evip` runs."""
