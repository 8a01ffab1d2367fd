"""What a step costs, by formula: no TPU has run here. Every figure rests on the `ASSUMPTIONS`, which the report prints.

step = max(compute, HBM) + exposed communication
compute = (model FLOPs + what remat computes again) / chips / (peak * EFFICIENCY)
HBM = (weights + activations of every micro-batch, optimizer and gradients) / bandwidth
exposed = what the program waits for + what it overlaps and is longer than the rest
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from monovl_jax.config import ModelConfig
from monovl_jax.planning.collectives import Collective
from monovl_jax.training.devices import peak_flops
from monovl_jax.training.flops import step_flops
from monovl_jax.training.losses import LOGIT_BYTES, chunk_rows
from monovl_jax.training.stages import Recipe, Stage
from monovl_jax.training.trainable import flatten, model_structure

EFFICIENCY = 0.75
"""Share of the peak that matrix products are taken to reach."""

ASSUMPTIONS = (
    f"matrix products reach {EFFICIENCY:.0%} of the chip's peak",
    "every slot of a row is used: all tiles are there and all other slots are text; all text is supervised; a row is one sample",
    "a collective runs as a ring on one axis of the torus, both ways where the axis wraps; it costs no latency",
    "collectives that the compiler made asynchronous hide behind the rest, the others hide behind nothing",
    "no time is lost to input, checkpoints, stragglers or several slices",
)


@dataclasses.dataclass(frozen=True)
class Chip:
    """hbm: bytes that the compiler may use. bandwidth: bytes/s of HBM. link: bytes/s of one ICI link, one way. wraps: the shortest axis of
    the torus whose ends are joined."""

    hbm: int
    bandwidth: float
    link: float
    wraps: int


CHIPS: dict[str, Chip] = {
    "v5e": Chip(int(15.75 * 2**30), 819e9, 45e9, 16),
    "v5p": Chip(int(95.74 * 2**30), 2765e9, 90e9, 4),
    "v6e": Chip(int(31.25 * 2**30), 1640e9, 90e9, 16),
}
"""By generation. hbm is what libtpu names in its refusals; bandwidth from Google's Cloud TPU pages; links from
"How to scale your model"."""

FILL = 0.85
"""Share of the HBM that the formula may fill when it chooses micro-batches. Nearer to the brim the compiler computes things twice to save
memory."""

SORTED_ROWS = 512
"""Rows by which tokens sorted by expert are padded, about."""

SAVED = {"none": (12, 6), "save_projections": (2, 2), "full": (1, 0)}
"""Numbers that the backward pass keeps per token and layer, as multiples of the hidden size and of the FFN's."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one step: FLOPs of the whole pod, seconds of one chip."""

    model_flops: float
    hardware_flops: float
    compute: float
    memory: float
    waited: float
    overlapped: float
    step: float
    tokens_per_second: float
    mfu: float
    days: float

    @property
    def exposed(self) -> float:
        return self.step - max(self.compute, self.memory)


def saved_bytes(model: ModelConfig, tokens: int, remat: str, tensor: int = 1) -> int:
    """bfloat16 bytes of activations that the layers keep for `tokens` tokens of one chip."""
    hidden, inner = SAVED[remat]
    decoder = model.decoder
    return 2 * tokens * decoder.num_layers * (hidden * decoder.hidden_size + inner * decoder.intermediate_size // tensor)


def _parameters(model: ModelConfig) -> int:
    return sum(math.prod(leaf.shape) for leaf in flatten(model_structure(model).shapes).values())


def working_bytes(
    model: ModelConfig,
    stage: Stage,
    masters: int,
    batch: int,
    trained: frozenset[str],
    remat: str,
    mesh: Mapping[str, int],
    device_kind: str,
) -> int:
    """A guess at the temporaries of one chip: activations kept, a layer and the head with a chunk of logits at work, gradients like the
    float32 masters, and a copy of the batch, whose `batch` bytes the compiler lays out anew for the loop over micro-batches. device_kind:
    of the chip, as JAX names it."""
    groups, tensor, decoder = mesh["data"] * mesh["fsdp"], mesh["tensor"], model.decoder
    rows = stage.batch_size // stage.accumulation // groups
    tokens = rows * stage.sequence_length + stage.text_rows // stage.accumulation // groups * stage.text_length
    at_work = 4 * tokens * (6 * decoder.hidden_size + 4 * decoder.intermediate_size // tensor)
    columns = decoder.padded_vocab_size // tensor
    at_work += LOGIT_BYTES * columns * chunk_rows(tokens, columns, device_kind)
    shapes = flatten(model_structure(model).shapes)
    for path, leaf in shapes.items():
        size = math.prod(leaf.shape) // tensor
        if path.startswith("decoder/blocks/"):  # gathered while the one before is in use, and its gradient before it is scattered
            at_work += size // decoder.num_layers * (4 + 4 * (path in trained))
        elif path in ("decoder/head", "decoder/embedding" if decoder.tie_embeddings else ""):
            at_work += size * (2 + 8 * (path in trained))
    pixels = 8 * rows * stage.tiles_per_row * model.vision.grid**2 * model.vision.hidden_size
    again = stage.accumulation > 1
    kept = saved_bytes(model, tokens + SORTED_ROWS, remat, tensor)
    return int(1.08 * (kept + at_work + pixels + masters * (1 + again) + 1.15 * batch * again))


def accumulations(stage: Stage, groups: int) -> list[int]:
    """The numbers of micro-batches that divide a stage's rows over `groups` devices, smallest first."""
    rows = math.gcd(stage.batch_size, stage.text_rows) // groups
    return [n for n in range(1, rows + 1) if rows % n == 0]


def step_counts(model: ModelConfig, stage: Stage) -> dict[str, float]:
    """The metrics of a step whose slots are all used, for `StepFlops.step`."""
    visual = stage.batch_size * min(stage.tiles_per_row * model.vision.tokens_per_tile, stage.sequence_length)
    tokens = stage.batch_size * stage.sequence_length + stage.text_rows * stage.text_length
    pairs = sum(n * t * (t + 1) / 2 for n, t in ((stage.batch_size, stage.sequence_length), (stage.text_rows, stage.text_length)))
    return {"tokens": tokens, "visual_tokens": visual, "tile_tokens": visual, "supervised": tokens - visual, "pairs": pairs}


def recomputed(model: ModelConfig, counts: Mapping[str, float], remat: str) -> float:
    """FLOPs that the backward pass spends on what the forward pass did: all of the layers, or their attention."""
    if remat == "none":
        return 0.0
    forward = step_flops(model, frozenset())
    visual = counts["visual_tokens"]
    layers, scores = forward.text * (counts["tokens"] - visual) + forward.visual * visual, forward.pair * counts["pairs"]
    if remat == "full":
        return layers + scores
    shapes = flatten(model_structure(model).shapes)
    sizes = {part: sum(math.prod(x.shape) for p, x in shapes.items() if f"/{part}/text/" in p) for part in ("attention", "mlp")}
    return layers * sizes["attention"] / sum(sizes.values()) + scores


def ring_seconds(row: Collective, link: float, wrapped: bool) -> float:
    """Of one kind of collective: a byte passes a link once (gather, scatter), twice (all-reduce), or on a share of the way (all-to-all)."""
    share = {"all-reduce": 2.0, "all-to-all": row.size / 4, "collective-permute": 2.0}.get(row.kind, 1.0) * (row.size - 1) / row.size
    return row.bytes * share / (link * (2 if wrapped else 1))


def hbm_bytes(model: ModelConfig, stage: Stage, masters: int, remat: str, mesh: Mapping[str, int]) -> float:
    """Bytes that one chip moves in a step. Weights are written once and read once by each of three passes over a micro-batch; a layer's
    activations are written and read by three passes; AdamW reads and writes masters and both moments and reads gradients."""
    decoder = model.decoder
    tokens = step_counts(model, stage)["tokens"] / (mesh["data"] * mesh["fsdp"])
    weights = 6 * 2 * _parameters(model) / mesh["tensor"] * stage.accumulation
    layer = 2 * 3 * tokens * decoder.num_layers * (10 * decoder.hidden_size + 6 * decoder.intermediate_size / mesh["tensor"])
    return weights + layer + 2 * saved_bytes(model, int(tokens), remat, mesh["tensor"]) + masters * (7 + 2 * (stage.accumulation - 1))


def estimate(
    recipe: Recipe,
    stage: Stage,
    rows: Sequence[Collective],
    masters: int,
    remat: str,
    mesh: Mapping[str, int],
    topology: str,
    device_kind: str,
) -> Costs:
    """The costs of a step. rows: its collectives. masters: bytes of trainable parameters on a chip."""
    generation, sizes = topology.split(":")
    chip, peak, chips = CHIPS[generation], peak_flops(device_kind), math.prod(mesh.values())
    assert peak is not None
    counts = step_counts(recipe.model, stage)
    needed = step_flops(recipe.model, recipe.trainable_paths(stage)).step(counts, recipe.model.vision.tokens_per_tile)
    done = needed + recomputed(recipe.model, counts, remat)
    compute = done / chips / (peak * EFFICIENCY)
    memory = hbm_bytes(recipe.model, stage, masters, remat, mesh) / chip.bandwidth
    wrapped = max(int(size) for size in sizes.split("x")) >= chip.wraps
    waited, overlapped = (sum(ring_seconds(row, chip.link, wrapped) for row in rows if row.overlapped == late) for late in (False, True))
    busy = max(compute, memory)
    step = busy + waited + max(0.0, overlapped - busy)
    return Costs(
        needed,
        done,
        compute,
        memory,
        waited,
        overlapped,
        step,
        counts["tokens"] / step,
        needed / (step * chips * peak),
        stage.steps * step / 86_400,
    )
