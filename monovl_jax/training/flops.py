"""Model FLOPs of a training step, counted per token type: what the arithmetic of the model needs, whatever a program makes of it.

A matrix of n numbers costs 2 n per token that passes it forward, 2 n for the gradient of its input where anything before it is trained,
and 2 n for its own gradient where it is trained. Text tokens pass the text expert, visual ones the visual expert, all the rest is passed
by both; the head only by supervised tokens. Attention costs 4 * heads * head_dim per layer for a pair of query and key forward, twice
that backward. Nothing is counted for recomputation (remat), norms, softmax, the optimizer, adapters or padding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from monovl_jax.config import ModelConfig
from monovl_jax.training.trainable import flatten, model_structure


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOPs per unit of what a batch holds.

    text, visual: tokens of either expert. tile: tiles. supervised: supervised tokens. pair: attended (query, key) pairs.
    """

    text: float
    visual: float
    tile: float
    supervised: float
    pair: float

    def step(self, counts: Mapping[str, Any], tokens_per_tile: int) -> float:
        """Of one step, from its metrics `tokens`, `visual_tokens`, `tile_tokens`, `supervised`, `pairs`."""
        text = float(counts["tokens"]) - float(counts["visual_tokens"])
        tiles = float(counts["tile_tokens"]) / tokens_per_tile
        return (
            self.text * text
            + self.visual * float(counts["visual_tokens"])
            + self.tile * tiles
            + self.supervised * float(counts["supervised"])
            + self.pair * float(counts["pairs"])
        )


def _depth(path: str) -> float:
    """Where a parameter stands on the way from pixels and ids to the loss. An adapter (`lora/...`) stands beside its matrix."""
    beginnings = {"vision/": 0, "projector/kernel2": 1.2, "projector/": 1, "decoder/embedding": 1.5, "decoder/norm": 3, "decoder/head": 4}
    return next((depth for start, depth in beginnings.items() if path.removeprefix("lora/").startswith(start)), 2)


def step_flops(config: ModelConfig, trained: frozenset[str]) -> StepFlops:
    """The FLOPs of a training step that trains the parameters at the paths `trained`; without any, of a forward pass."""
    shapes = {path: leaf.shape for path, leaf in flatten(model_structure(config).shapes).items()}
    lowest = min((_depth(path) for path in trained), default=5.0)
    decoder, vision = config.decoder, config.vision
    in_blocks = lowest <= 2
    """Whether gradients pass the blocks. They pass all layers: which one is trained first is not asked, for layers are trained alike."""

    def passes(path: str, depth: float) -> int:
        """1 forward, 1 for the input's gradient, 1 for its own."""
        return 1 + (in_blocks if depth == 2 else lowest < depth) + (path in trained)

    def cost(path: str) -> float:
        return 2.0 * math.prod(shapes[path]) * passes(path, _depth(path))

    text = visual = 0.0
    for part, names in (("attention", ("qkv", "out")), ("mlp", ("gate", "up", "down"))):
        for name in names:
            own, other = (f"decoder/blocks/{part}/{expert}/{name}" for expert in ("text", "visual"))
            text += cost(own)
            visual += cost(other if other in shapes else own)
    tile = cost("vision/kernel") * vision.grid**2 + vision.tokens_per_tile * (cost("projector/kernel1") + cost("projector/kernel2"))
    head = "decoder/embedding" if decoder.tie_embeddings else "decoder/head"
    supervised = 2.0 * decoder.hidden_size * decoder.vocab_size * passes(head, 4)  # without the padding of the vocabulary
    pair = 4.0 * decoder.num_layers * decoder.hidden_size * (3 if in_blocks else 1)
    return StepFlops(text, visual, tile, supervised, pair)
