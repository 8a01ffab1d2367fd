"""The formulas, against sums done by hand for `tiny`: 2 layers, hidden 64, FFN 96, 4 visual tokens a tile."""

from __future__ import annotations

import dataclasses
import math

import pytest

from monovl_jax.config import tiny
from monovl_jax.planning import estimate as formulas
from monovl_jax.planning.collectives import Collective
from monovl_jax.planning.estimate import CHIPS, EFFICIENCY, accumulations, estimate, ring_seconds, saved_bytes, step_counts, working_bytes
from monovl_jax.training.devices import peak_flops
from monovl_jax.training.flops import step_flops
from tests.training.worlds import recipe, stage

LINK = 1e9


def row(kind: str, size: int, total: int, overlapped: bool = False) -> Collective:
    return Collective(kind, "fsdp", size, total, 1, overlapped)


@pytest.mark.parametrize(
    ("kind", "passes"),
    [("all-gather", 3 / 4), ("reduce-scatter", 3 / 4), ("all-reduce", 6 / 4), ("all-to-all", 3 / 4), ("collective-permute", 3 / 2)],
)
def test_time_on_a_ring(kind: str, passes: float) -> None:
    """1 GB over four devices and 1 GB/s: each link carries three quarters of a gathered array, twice that of a sum; both ways halve it."""
    assert ring_seconds(row(kind, 4, 10**9), LINK, wrapped=False) == pytest.approx(passes)
    assert ring_seconds(row(kind, 4, 10**9), LINK, wrapped=True) == pytest.approx(passes / 2)


def test_a_permutation_passes_one_link() -> None:
    assert ring_seconds(row("collective-permute", 2, 10**9), LINK, wrapped=False) == pytest.approx(1.0)


def test_counts_of_a_full_batch() -> None:
    """4 rows of 20 tokens with a tile of 4 each, 2 rows of 8 tokens of text."""
    assert step_counts(tiny(), stage()) == {
        "tokens": 4 * 20 + 2 * 8,
        "visual_tokens": 16,
        "tile_tokens": 16,
        "supervised": 80,
        "pairs": 4 * 210 + 2 * 36,
    }


@pytest.mark.parametrize(("remat", "numbers"), [("none", 12 * 64 + 6 * 96), ("save_projections", 2 * 64 + 2 * 96), ("full", 64)])
def test_activations_that_are_kept(remat: str, numbers: int) -> None:
    config = tiny()
    assert (config.decoder.num_layers, config.decoder.hidden_size, config.decoder.intermediate_size) == (2, 64, 96)
    assert saved_bytes(config, 10, remat) == 2 * 10 * 2 * numbers


def test_what_a_chip_works_with_shrinks_with_micro_batches_and_remat() -> None:
    mesh = {"data": 1, "fsdp": 2, "tensor": 1}
    big = stage(batch_size=4096, text_rows=0, text_length=0, text_mixture={}, accumulation=1)
    sizes = [
        working_bytes(tiny(), dataclasses.replace(big, accumulation=n), 1000, 0, frozenset(), remat, mesh, "TPU v5 lite")
        for remat in ("none", "full")
        for n in (1, 2, 4)
    ]
    assert sizes == sorted(sizes[:3], reverse=True) + sorted(sizes[3:], reverse=True) and sizes[3] < sizes[0]
    assert accumulations(dataclasses.replace(big, batch_size=12), 2) == [1, 2, 3, 6]
    assert accumulations(stage(batch_size=8, text_rows=4), 2) == [1, 2]


def test_the_logits_of_a_chunk_are_counted() -> None:
    """A v6e works on twice the rows of a v5e: 1,024 more of the vocabulary's columns, 14 bytes each."""
    text = stage(batch_size=8, sequence_length=4096, tiles_per_row=0, text_rows=0, text_length=0, text_mixture={}, accumulation=1)
    v5e, v6e = (
        working_bytes(tiny(), text, 0, 0, frozenset(), "full", {"data": 1, "fsdp": 1, "tensor": 1}, kind)
        for kind in ("TPU v5 lite", "TPU v6 lite")
    )
    assert v6e - v5e == pytest.approx(1.08 * 1024 * 14 * tiny().decoder.padded_vocab_size, abs=2)


def test_the_step_is_compute_and_what_does_not_hide() -> None:
    of, mesh = recipe(), {"data": 1, "fsdp": 4, "tensor": 4}
    last = of.stage("S2")
    rows = [row("all-gather", 4, 10**12), row("all-gather", 4, 3 * 10**12, overlapped=True)]
    costs = estimate(of, last, rows, 10**6, "none", mesh, "v5e:4x4", "TPU v5 lite")
    counts, peak = step_counts(of.model, last), peak_flops("TPU v5 lite")
    assert peak is not None and peak == 197e12
    needed = step_flops(of.model, of.trainable_paths(last)).step(counts, of.model.vision.tokens_per_tile)
    assert costs.model_flops == costs.hardware_flops == needed
    assert costs.compute == pytest.approx(needed / 16 / (peak * EFFICIENCY))
    assert costs.waited == pytest.approx(0.75e12 / CHIPS["v5e"].link) and costs.overlapped == pytest.approx(3 * costs.waited)
    busy = max(costs.compute, costs.memory)
    assert costs.step == pytest.approx(costs.waited + costs.overlapped) and costs.exposed == pytest.approx(costs.step - busy)
    assert costs.tokens_per_second == pytest.approx(96 / costs.step)
    assert costs.mfu == pytest.approx(needed / (16 * peak) / costs.step)
    assert costs.days == pytest.approx(last.steps * costs.step / 86_400)
    alone = estimate(of, last, [], 10**6, "none", mesh, "v5e:4x4", "TPU v5 lite")
    assert alone.step == busy and alone.exposed == 0
    hidden = estimate(of, last, [row("all-gather", 4, 10, overlapped=True)], 10**6, "none", mesh, "v5e:4x4", "TPU v5 lite")
    assert hidden.step == alone.step


def test_remat_costs_arithmetic() -> None:
    of, mesh = recipe(), {"data": 1, "fsdp": 4, "tensor": 4}
    costs = {r: estimate(of, of.stage("S2"), [], 0, r, mesh, "v5e:4x4", "TPU v5 lite") for r in ("none", "save_projections", "full")}
    assert costs["none"].hardware_flops < costs["save_projections"].hardware_flops < costs["full"].hardware_flops
    counts, forward = step_counts(of.model, of.stage("S2")), step_flops(of.model, frozenset())
    layers = forward.text * (counts["tokens"] - 16) + forward.visual * 16 + forward.pair * counts["pairs"]
    assert costs["full"].hardware_flops == pytest.approx(costs["none"].hardware_flops + layers)
    attention, ffn = 64 * 2 * 4 * 16 + 64 * 64, 3 * 64 * 96  # qkv: 2 kv heads of 2 queries, key and value, 16 wide
    share = attention / (attention + ffn)
    some = (forward.text * (counts["tokens"] - 16) + forward.visual * 16) * share + forward.pair * counts["pairs"]
    assert costs["save_projections"].hardware_flops == pytest.approx(costs["none"].hardware_flops + some)


def test_an_axis_that_wraps_sends_both_ways() -> None:
    of, mesh = recipe(), {"data": 1, "fsdp": 4, "tensor": 1}
    rows = [row("all-gather", 4, 10**13)]
    plain, wrapped = (estimate(of, of.stage("S2"), rows, 0, "none", mesh, name, "TPU v5 lite").waited for name in ("v5e:4x4", "v5e:16x16"))
    assert plain == pytest.approx(2 * wrapped)
    assert all(math.isfinite(chip.link) and chip.hbm > 2**33 for chip in formulas.CHIPS.values())
