"""Adapters: they begin as nothing, end as ordinary weights, and touch their targets alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monovl_jax.config import tiny
from monovl_jax.training.checkpoint import load_run, read_recipe
from monovl_jax.training.loop import train
from monovl_jax.training.lora import Lora, adapter_shapes, init_adapters, merged, target_paths
from monovl_jax.training.stages import RecipeError
from monovl_jax.training.trainable import TrainableError, digests, flatten, model_structure
from tests.training.worlds import OPS, make_batches, plain_parameters, recipe, stage

QKV, GATE = "decoder/blocks/attention/text/qkv", "decoder/blocks/mlp/visual/gate"
LORA = Lora(rank=3, alpha=6.0, targets=(f"^{QKV}$", f"^{GATE}$"))
PLAIN = dict(text_rows=0, text_length=0, text_mixture={}, accumulation=1, steps=5)
QUIET: dict[str, Any] = dict(ops=OPS, initial=lambda: plain_parameters(tiny()), checkpoint_every=2, progress=False, tensorboard=False)


def lora_recipe(**changes: Any):
    return recipe(stages=(stage(**{**PLAIN, "trainable": (), "lora": LORA, **changes}),), copy_experts_before=None)


def test_adapters_begin_as_nothing_and_merge_as_written() -> None:
    parameters = plain_parameters(tiny())
    shapes = model_structure(tiny()).shapes
    adapters = init_adapters(shapes, LORA, seed=0)
    assert {p: (x.shape, x.dtype) for p, x in flatten(adapters).items()} == {
        p: (x.shape, x.dtype) for p, x in flatten(adapter_shapes(shapes, LORA)).items()
    }
    own, same = merged(adapters, parameters, LORA)
    assert own == {} and digests(same) == digests(parameters)

    adapters = jax.tree.map(lambda x: jnp.full(x.shape, 0.25), adapters)
    _, changed = merged(adapters, parameters, LORA)
    before, after = flatten(parameters), flatten(changed)
    assert {path for path in before if not np.array_equal(before[path], after[path])} == {QKV, GATE}
    # Every element of A @ B is rank * 0.25^2, and the scale is alpha / rank = 2.
    np.testing.assert_allclose(after[QKV] - before[QKV], 3 * 0.0625 * 2, atol=1e-6)
    assert after[QKV].shape == before[QKV].shape
    bf16 = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), parameters)
    assert flatten(merged(adapters, bf16, LORA)[1])[GATE].dtype == jnp.bfloat16


def test_a_stage_trains_adapters_and_ends_as_a_model(tmp_path: Path) -> None:
    wanted = lora_recipe()

    def crashing(stage: Any, position: int) -> Iterator:
        for number, batch in enumerate(make_batches(stage, position), position):
            if number == 3:
                raise RuntimeError("no more")
            yield batch

    straight = train(wanted, tmp_path / "straight", make_batches, **QUIET)
    with pytest.raises(RuntimeError, match="no more"):
        train(wanted, tmp_path / "cut", crashing, **QUIET)
    resumed = train(wanted, tmp_path / "cut", make_batches, **QUIET)
    name = wanted.stages[0].name
    assert resumed[name]["loss"] == straight[name]["loss"]
    config, end = load_run(tmp_path / "straight")
    assert config == tiny() and digests(end) == digests(load_run(tmp_path / "cut")[1])
    start = digests(plain_parameters(tiny()))
    assert {path for path, digest in digests(end).items() if digest != start[path]} == {QKV, GATE}
    assert read_recipe(tmp_path / "straight") == wanted


def test_the_first_step_is_that_of_the_model_itself(tmp_path: Path) -> None:
    """With B = 0 the loss of step 1 is the frozen model's, so it equals that of a stage that trains anything else."""
    other = recipe(stages=(stage(**{**PLAIN, "steps": 1, "warmup_steps": 0}),), copy_experts_before=None)
    one = lora_recipe(steps=1, warmup_steps=0)
    first = train(one, tmp_path / "a", make_batches, **QUIET)
    second = train(other, tmp_path / "b", make_batches, **QUIET)
    assert first[one.stages[0].name]["loss"] == pytest.approx(second[other.stages[0].name]["loss"], rel=1e-6)


def test_mistakes() -> None:
    shapes = model_structure(tiny()).shapes
    with pytest.raises(TrainableError, match="rank is 0"):
        Lora(rank=0)
    with pytest.raises(TrainableError, match="alpha is -1"):
        Lora(rank=1, alpha=-1.0)
    with pytest.raises(TrainableError, match="matches no parameter"):
        target_paths(shapes, Lora(rank=1, targets=("q_proj",)))
    with pytest.raises(TrainableError, match=r"'decoder/embedding' has shape .*; only matrices"):
        target_paths(shapes, Lora(rank=1, targets=("embedding$", QKV)))
    both = lora_recipe(trainable=(f"^{QKV}$",))
    with pytest.raises(RecipeError, match=f"{QKV} is trained and has a lora adapter"):
        both.trainable_paths(both.stages[0])
    with pytest.raises(RecipeError, match="trainable is empty; give at least one regex, or lora"):
        dataclasses.replace(both.stages[0], trainable=(), lora=None)
