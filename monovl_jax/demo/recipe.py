"""The demo's model and its stages: stage 0 makes the "pre-trained LLM", then EViP as in the paper, at a size for two CPU cores."""

from __future__ import annotations

import dataclasses

from monovl_jax.config import DecoderConfig, ModelConfig, RopeConfig, VisionConfig
from monovl_jax.training.stages import Recipe, Stage
from monovl_jax.training.trainable import Tree, random_parameters

VISUAL = (r"^vision/", r"^projector/", r"/visual/")
TEXT = (r"^decoder/(embedding|head|norm)$", r"^decoder/blocks/(attention_norm|ffn_norm)$", r"/text/")
ATTENTION = (r"^decoder/blocks/attention/text/",)


def demo_model(vocab_size: int) -> ModelConfig:
    """1.4 M parameters: tiles of 32 px, 4 visual tokens each; FFN and attention experts."""
    return ModelConfig(
        vision=VisionConfig(hidden_size=128, patch_size=8, tile_size=32, position_image_size=32),
        decoder=DecoderConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=256,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            rope=RopeConfig(theta=10_000.0),
            max_position_embeddings=1024,
            experts="ffn+attention",
        ),
        template="compact",
        max_tiles=6,
        use_thumbnail=False,
    )


def _stage(name: str, mixture: dict[str, float], trainable: tuple[str, ...], steps: int, rate: float, **fields) -> Stage:
    return Stage(
        name=name,
        trainable=trainable,
        steps=steps,
        learning_rate=rate,
        mixture=mixture,
        warmup_steps=min(30, max(1, steps // 5)),
        final_fraction=0.05,
        weight_decay=0.01,
        b2=0.98,
        **fields,
    )


def demo_recipe(vocab_size: int, quick: bool = False, seed: int = 0) -> Recipe:
    """Stages S0 (text alone), S1.1, S1.2, S1.3, S2. `quick` keeps the shapes of everything and cuts the steps."""
    rows = {"batch_size": 12, "sequence_length": 224, "tiles_per_row": 13}
    stages = (
        _stage("S0", {"language": 1.0}, TEXT, 350, 2e-3, batch_size=16, sequence_length=128, tiles_per_row=0),
        _stage("S1.1", {"concept": 1.0}, VISUAL, 350, 3e-3, batch_size=12, sequence_length=120, tiles_per_row=9),
        _stage("S1.2", {"semantic": 1.0}, VISUAL, 180, 2e-3, **rows),
        _stage("S1.3", {"alignment": 0.47, "look_up": 0.45, "text_mix": 0.08}, VISUAL + ATTENTION, 900, 2e-3, **rows),
        _stage("S2", {"instruction": 0.74, "look_up": 0.18, "text_mix": 0.08}, (r".*",), 1650, 2e-3, **rows),
    )
    if quick:
        stages = tuple(
            dataclasses.replace(s, steps=n, warmup_steps=min(s.warmup_steps, n // 5))
            for s, n in zip(stages, (40, 60, 10, 15, 15), strict=True)
        )
    return Recipe("demo-quick" if quick else "demo", demo_model(vocab_size), stages, seed=seed, copy_experts_before="S1.1")


def initial_parameters(recipe: Recipe) -> Tree:
    """Random parameters, but for two things that let so small a language model learn to look things up within minutes:

    the output head starts as the transposed embedding, scaled: a word is at first its own best prediction;
    in the middle layers queries start near their keys: a token looks at tokens like itself (mimetic initialisation, arXiv 2305.09828).
    """
    tree = random_parameters(recipe.model, recipe.seed)
    decoder = tree["decoder"]
    decoder["head"] = decoder["embedding"].T * (2.0 * recipe.model.decoder.hidden_size**-0.5)
    attention = decoder["blocks"]["attention"]["text"]
    middle, qkv, near = slice(1, -1), attention["qkv"], 0.9  # qkv [layers, D, kv heads, queries + key + value, e]
    queries, keys = qkv[middle, :, :, :-2], qkv[middle, :, :, -2:-1]
    attention["qkv"] = qkv.at[middle, :, :, :-2].set(near * keys + (1 - near**2) ** 0.5 * queries)
    return tree
