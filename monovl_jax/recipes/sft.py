"""Supervised fine-tuning on instructions, with the values of upstream's released script for Mono-InternVL-2B.

Source: Mono-InternVL shell/mono_internvl_finetune_llava_torchrun.sh and zero_stage1_config.json: 665,298 samples of LLaVA-v1.5-mix665k in
one epoch, 128 samples a step, 2,048 tokens, 6 tiles and a thumbnail a picture, everything trained. Unlike there several samples share a
row here (upstream pads each to itself), so that one pass takes fewer steps than the 5,197 given; set `steps` for your data.
"""

from __future__ import annotations

import dataclasses

from monovl_jax.config import ModelConfig
from monovl_jax.data.meta import EVERYTHING
from monovl_jax.training.lora import Lora
from monovl_jax.training.stages import Recipe, Stage

SFT = Stage(
    name="SFT",
    trainable=(r".*",),
    steps=665_298 // 128,
    batch_size=128,
    learning_rate=4e-5,
    schedule="cosine",
    warmup_steps=round(0.03 * (665_298 // 128)),
    weight_decay=0.01,
    b2=0.999,
    sequence_length=2_048,
    tiles_per_row=7,
    mixture={EVERYTHING: 1.0},
)
"""One stage on all data sets of META.json."""

LORA = dataclasses.replace(SFT, trainable=(), lora=Lora(rank=16), learning_rate=2e-4)
"""The same with adapters of rank 16 on all projections of the decoder and nothing else; rank and rate are ours, not upstream's."""


def _tiled(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, max_tiles=6) if model.dynamic_tiles else model


def recipe(model: ModelConfig) -> Recipe:
    """What `monovl train sft` runs, on the model of --init. Its visual experts stay as they are."""
    return Recipe("sft", _tiled(model), (SFT,))


def lora(model: ModelConfig) -> Recipe:
    """What `monovl train sft:lora` runs."""
    return Recipe("sft_lora", _tiled(model), (LORA,))
