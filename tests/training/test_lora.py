"""Adapters: they begin as nothing, end as ordinary weights, and touch their targets alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from monovl_jax.config import Experts, tiny
from monovl_jax.model import Ops
from monovl_jax.parallel.mesh import make_mesh
from monovl_jax.training.checkpoint import load_run, read_recipe
from monovl_jax.training.loop import train
from monovl_jax.training.lora import TEXT_PROJECTIONS, Lora, adapter_shapes, init_adapters, merged, target_paths
from monovl_jax.training.stages import RecipeError
from monovl_jax.training.step import make_train_step, next_token_nll, train_step
from monovl_jax.training.trainable import TrainableError, digests, flatten, model_structure, split_tree, unflatten
from tests.parallel.meshes import ADAPTERS, adapters, keeping_gradients
from tests.quick import quick_jit
from tests.training.worlds import OPS, image_rows, make_batches, plain_parameters, recipe, stage, text_rows

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


def test_the_end_of_a_stage_merges_in_float32() -> None:
    """An update far below the last bit of a bfloat16 weight is in the result; other leaves stay as they are."""
    bf16 = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), plain_parameters(tiny()))
    shapes = model_structure(tiny()).shapes
    adapters = jax.tree.map(lambda x: jnp.full(x.shape, 0.01), init_adapters(shapes, LORA, seed=0))
    before, after = flatten(bf16), flatten(merged(adapters, bf16, LORA)[1])
    for path in (QKV, GATE):  # rank * 0.01^2 * scale
        np.testing.assert_allclose(after[path] - np.asarray(before[path], np.float32), 6e-4, atol=1e-6)
    assert {path for path in after if after[path].dtype != jnp.bfloat16} == {QKV, GATE}
    assert all(after[path] is before[path] for path in after if path not in (QKV, GATE))


@pytest.mark.parametrize("experts", ["ffn+attention", pytest.param("none", marks=pytest.mark.slow)])
def test_a_step_computes_what_the_merged_model_does(experts: Experts) -> None:
    """Every matrix that takes an adapter, in float32: the loss, and each gradient against one through W + scale * A @ B."""
    config, lora, optimizer = tiny(experts), ADAPTERS, keeping_gradients()
    graphdef, frozen, at_work = model_structure(config).graphdef, plain_parameters(config), adapters(config)
    batch = (jax.tree.map(jnp.asarray, image_rows(config, 2, 16, 1, seed=1)),)

    def run(adapters: Any) -> Any:
        state = optimizer.transform.init(adapters)
        _, state, metrics = train_step(graphdef, optimizer, OPS, 1, next_token_nll, adapters, state, frozen, batch, lora)
        return metrics["loss"], state[0].trace

    def by_merging(adapters: Any) -> jax.Array:
        flat, pieces = flatten(frozen), flatten(adapters["lora"])
        for path in target_paths(frozen, lora):
            flat[path] += 2.0 * jnp.matmul(pieces[f"{path}/a"], pieces[f"{path}/b"]).reshape(flat[path].shape)
        return next_token_nll(nnx.merge(graphdef, unflatten(flat)), batch[0], OPS) / jnp.sum(batch[0]["loss_weights"])

    loss, gradients = quick_jit(run)(at_work)
    want, wanted = quick_jit(jax.value_and_grad(by_merging))(at_work)
    assert float(loss) == pytest.approx(float(want), rel=1e-6)
    for path, gradient in flatten(wanted).items():
        np.testing.assert_allclose(flatten(gradients)[path], gradient, atol=2e-5 * float(jnp.abs(gradient).max()), err_msg=path)


def step_of(lora: Lora, dtype: Any) -> Any:
    """Adapters -> (loss, gradients) of a step whose frozen weights and activations are of `dtype`; the weights are bfloat16 numbers."""
    config, optimizer = tiny(), keeping_gradients()
    graphdef = model_structure(config).graphdef
    frozen = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(dtype), plain_parameters(config))
    batch = (jax.tree.map(jnp.asarray, image_rows(config, 8, 32, 2, seed=1)),)

    def run(adapters: Any) -> Any:
        state = optimizer.transform.init(adapters)
        _, state, metrics = train_step(graphdef, optimizer, Ops(dtype=dtype), 1, next_token_nll, adapters, state, frozen, batch, lora)
        return metrics["loss"], state[0].trace

    return quick_jit(run)


@pytest.mark.slow
def test_small_updates_in_bfloat16_are_those_of_float32() -> None:
    """As after the first steps of a run: updates of less than the last bit of the weights change the loss as they do in float32."""
    lora = Lora(rank=4)
    zero = init_adapters(model_structure(tiny()).shapes, lora, seed=0)
    exact, rounded = step_of(lora, jnp.float32), step_of(lora, jnp.bfloat16)
    directions = flatten(exact(zero)[1])

    def moved(size: float) -> Any:
        return unflatten({p: x - size * jnp.sign(directions[p]) * p.endswith("/b") for p, x in flatten(zero).items()})

    (high, _), (low, gradients) = exact(moved(3e-5)), exact(moved(3e-4))
    (rounded_high, _), (rounded_low, rounded_gradients) = rounded(moved(3e-5)), rounded(moved(3e-4))
    assert float(rounded_high - rounded_low) == pytest.approx(float(high - low), rel=0.15)
    wrong = optax.tree.norm(jax.tree.map(jnp.subtract, rounded_gradients, gradients))
    assert float(wrong / optax.tree.norm(gradients)) < 0.03
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(rounded_gradients))


def test_a_step_holds_no_merged_weights() -> None:
    """Beside a step that trains the last norm alone, it needs much less than one copy of the adapted matrices."""
    config = tiny("none")
    decoder = dataclasses.replace(config.decoder, hidden_size=256, intermediate_size=1024, num_layers=6, num_heads=4, num_kv_heads=2)
    config = dataclasses.replace(config, decoder=decoder)
    shape, optimizer, mesh = model_structure(config), keeping_gradients(), make_mesh(1, 1, 1, devices=jax.devices()[:1])
    lora = Lora(rank=2, targets=TEXT_PROJECTIONS)
    batch = (text_rows(config, 1, 16, seed=0),)

    def temporaries(trainable: Any, frozen: Any, lora: Lora | None) -> int:
        state = jax.eval_shape(optimizer.transform.init, trainable)
        step: Any = make_train_step(shape.graphdef, optimizer, Ops(remat="full"), trainable, frozen, mesh, lora=lora)
        return step.lower(trainable, state, frozen, batch).compile().memory_analysis().temp_size_in_bytes

    plain = temporaries(*split_tree(shape.shapes, frozenset({"decoder/blocks/ffn_norm"})), None)
    adapted = temporaries(adapter_shapes(shape.shapes, lora), shape.shapes, lora)
    copy = 4 * sum(math.prod(flatten(shape.shapes)[path].shape) for path in target_paths(shape.shapes, lora))
    assert adapted - plain < 0.2 * copy


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
