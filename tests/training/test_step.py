"""The step: against full logits, over micro-batches, with frozen leaves, on two devices."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monovl_jax.config import tiny
from monovl_jax.model import VLM, Ops
from monovl_jax.parallel.mesh import make_mesh
from monovl_jax.parallel.sharding import RULES, parameter_shardings, partition_spec
from monovl_jax.training.optimizer import make_optimizer
from monovl_jax.training.step import BatchError, make_eval_step, make_train_step, micro_batches, place_batch
from monovl_jax.training.trainable import cast, digests, flatten, merge_trees, model_structure, select, split_tree
from tests.quick import quick_jit
from tests.training.worlds import OPS, VISUAL, image_rows, plain_parameters, stage, text_rows

CONFIG = tiny()
TRAINED = (*VISUAL, r"^decoder/(embedding|head)$", r"^decoder/blocks/attention")
"""Some of everything; what stays frozen: the text FFN and two norms."""


def naive_nll(model: VLM, part: dict) -> tuple[jax.Array, jax.Array]:
    """(sum of weights * nll, sum of weights) with all logits and log_softmax."""
    part = {key: jnp.asarray(value) for key, value in part.items()}
    hidden, _ = model(part, OPS)
    logits = (hidden @ model.decoder.head_kernel())[..., : CONFIG.decoder.vocab_size]
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), part["targets"][..., None], axis=-1)[..., 0]
    return jnp.sum(nll * part["loss_weights"]), jnp.sum(part["loss_weights"])


@functools.cache
def starting(patterns: tuple[str, ...]) -> tuple:
    shape = model_structure(CONFIG)
    tree = plain_parameters(CONFIG)
    chosen = select(shape.paths, patterns, shape.stored)
    return shape.graphdef, tree, *split_tree(tree, chosen)


@functools.cache
def compiled(patterns: tuple[str, ...], accumulation: int = 1, ops: Ops = OPS) -> tuple:
    """(optimizer, step), one for all tests that use the same: compiling is what takes the time here."""
    graphdef, _, trainable, frozen = starting(patterns)
    optimizer = make_optimizer(stage(learning_rate=1e-2, schedule="constant", warmup_steps=0, eps=1e-2))
    return optimizer, make_train_step(graphdef, optimizer, ops, trainable, frozen, make_mesh(), accumulation)


def run(patterns: tuple[str, ...], batch: tuple, accumulation: int = 1, steps: int = 1, ops: Ops = OPS) -> tuple:
    """(trainable, opt_state, frozen, metrics of each step)."""
    _, _, trainable, frozen = starting(patterns)
    optimizer, step = compiled(patterns, accumulation, ops)
    trainable = cast(trainable, jnp.float32, copy=True)
    state, metrics = optimizer.transform.init(trainable), []
    for _ in range(steps):
        trainable, state, m = step(trainable, state, frozen, place_batch(batch, make_mesh(), accumulation))
        metrics.append(jax.device_get(m))
    return trainable, state, frozen, metrics


@pytest.fixture(scope="module")
def batch() -> tuple:
    return image_rows(CONFIG, 8, 20, 1, seed=1), text_rows(CONFIG, 4, 12, seed=2)


@pytest.mark.parametrize("ops", [OPS, pytest.param(Ops(), marks=pytest.mark.slow)], ids=["plain", "sorted"])
def test_loss_and_gradient_equal_full_logits(batch: tuple, ops: Ops) -> None:
    graphdef, _, trainable, frozen = starting(TRAINED)

    def loss(trainable):
        sums = [naive_nll(nnx.merge(graphdef, trainable, frozen), part) for part in batch]
        return sum(s for s, _ in sums) / sum(w for _, w in sums)

    value, gradients = quick_jit(jax.value_and_grad(loss))(trainable)
    _, _, _, (metrics,) = run(TRAINED, batch, ops=ops)
    assert metrics["loss"] == pytest.approx(float(value), rel=1e-6)
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradients)))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    weights = [float(part["loss_weights"].sum()) for part in batch]
    assert metrics["weight"] == pytest.approx(sum(weights), rel=1e-6)
    assert metrics["loss"] == pytest.approx(float(np.dot(metrics["part_losses"], weights)) / sum(weights), rel=1e-6)
    assert metrics["supervised"] == sum(int((part["loss_weights"] != 0).sum()) for part in batch)
    assert metrics["tokens"] == 8 * 18 + 4 * 12
    assert metrics["learning_rate"] == np.float32(1e-2)


def test_frozen_leaves_have_no_state_and_keep_their_bits(batch: tuple) -> None:
    _, tree, shapes, _ = starting(TRAINED)
    before = digests(tree)
    trainable, state, frozen, metrics = run(TRAINED, batch, steps=3)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    after = digests(merge_trees(trainable, frozen))
    changed = {path for path in before if before[path] != after[path]}
    assert changed == set(flatten(shapes))
    moments = [x for x in jax.tree.leaves(state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in jax.tree.leaves(shapes))


def test_accumulation_equals_one_batch(batch: tuple) -> None:
    """With weights that differ between micro-batches: the mean is over the whole batch, not over micro-batches."""
    first, second = ({**part, "loss_weights": part["loss_weights"].copy()} for part in batch)
    first["loss_weights"][:4] *= 5
    second["loss_weights"][0] = 0
    one, _, _, (a,) = run(TRAINED, (first, second))
    four, _, _, (b,) = run(TRAINED, (first, second), accumulation=4)
    for key in ("loss", "weight", "grad_norm"):
        assert a[key] == pytest.approx(b[key], rel=1e-6), key
    for path, leaf in flatten(one).items():
        np.testing.assert_allclose(leaf, flatten(four)[path], atol=1e-6, err_msg=path)


def test_same_inputs_same_bits(batch: tuple) -> None:
    a, _, _, first = run(TRAINED, batch, steps=2)
    b, _, _, second = run(TRAINED, batch, steps=2)
    assert digests(a) == digests(b)
    assert [m["loss"].tobytes() for m in first] == [m["loss"].tobytes() for m in second]


def test_nothing_supervised_changes_nothing(batch: tuple) -> None:
    blank = tuple({**part, "loss_weights": np.zeros_like(part["loss_weights"])} for part in batch)
    _, _, _, (metrics,) = run(TRAINED, blank)
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0 and metrics["supervised"] == 0


def test_text_only_part_with_and_without_picture_fields() -> None:
    part = text_rows(CONFIG, 4, 12, seed=2)
    routed = {**part, "token_types": np.zeros((4, 12), np.int8)}
    evaluate = make_eval_step(model_structure(CONFIG).graphdef, OPS)
    tree = plain_parameters(CONFIG)
    plain, other = evaluate(tree, part), evaluate(tree, (routed,))
    assert float(plain["nll"]) == pytest.approx(float(other["nll"]), rel=1e-6)


def test_eval_step_sums(batch: tuple) -> None:
    graphdef, tree, _, _ = starting(TRAINED)
    sums = [naive_nll(nnx.merge(graphdef, tree), part) for part in batch]
    got = make_eval_step(graphdef, OPS)(tree, batch)
    assert float(got["nll"]) == pytest.approx(float(sum(s for s, _ in sums)), rel=1e-6)
    assert float(got["weight"]) == pytest.approx(float(sum(w for _, w in sums)), rel=1e-6)


def test_micro_batches() -> None:
    part = text_rows(CONFIG, 6, 5, seed=0)
    cut = micro_batches(part, 3)
    assert cut["tokens"].shape == (3, 2, 5) and (cut["tokens"][1] == part["tokens"][2:4]).all()
    assert micro_batches(cut, 3)["tokens"].shape == (3, 2, 5)
    with pytest.raises(BatchError, match="6 rows cannot be cut into 4"):
        micro_batches(part, 4)


@pytest.mark.slow
def test_frozen_bfloat16(batch: tuple) -> None:
    """Frozen leaves may be bfloat16 under float32 masters; the compute dtype is that of ops."""
    _, _, trainable, frozen = starting(TRAINED)
    optimizer, step = compiled(TRAINED, 1, dataclasses.replace(OPS, dtype=jnp.bfloat16))
    trainable = cast(trainable, jnp.float32, copy=True)
    state, losses = optimizer.transform.init(trainable), []
    for _ in range(3):
        trainable, state, metrics = step(trainable, state, cast(frozen, jnp.bfloat16), place_batch(batch[:1], make_mesh()))
        losses.append(float(metrics["loss"]))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(trainable)) and losses[-1] < losses[0]


# --- the mesh -----------------------------------------------------------------------------------------------------------------------


def test_every_parameter_has_a_rule() -> None:
    for experts in ("none", "ffn", "ffn+attention"):
        parameter_shardings(model_structure(tiny(experts)).shapes, make_mesh())
    with pytest.raises(ValueError, match="no sharding rule matches the parameter 'decoder/fuser/kernel'"):
        partition_spec("decoder/fuser/kernel")
    paths = model_structure(tiny("ffn+attention")).paths
    assert all(any(partition_spec(p) is spec for p in [*paths, "decoder/blocks/attention/text/qkv_bias"]) for _, spec in RULES if spec)


def test_mesh_sizes() -> None:
    assert dict(make_mesh().shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    with pytest.raises(ValueError, match="does not fit 1 devices"):
        make_mesh(data=2)
    with pytest.raises(ValueError, match="at most one"):
        make_mesh(data=-1, fsdp=-1)


TWO_DEVICES = """
import jax, json
from monovl_jax.config import tiny
from monovl_jax.parallel.mesh import make_mesh
from monovl_jax.parallel.sharding import parameter_shardings
from monovl_jax.training.optimizer import make_optimizer
from monovl_jax.training.step import make_train_step, optimizer_shardings, place_batch
from monovl_jax.training.trainable import cast, model_structure, select, split_tree
from tests.training.test_step import TRAINED
from tests.training.worlds import OPS, image_rows, plain_parameters, stage, text_rows

config, losses = tiny(), {}
shape = model_structure(config)
batch = image_rows(config, 8, 20, 1, seed=1), text_rows(config, 4, 12, seed=2)
assert len(jax.devices()) == 2
for name in MESHES:
    mesh = {"data": make_mesh(), "fsdp": make_mesh(1, 2), "tensor": make_mesh(1, 1, 2)}[name]
    optimizer = make_optimizer(stage(learning_rate=1e-2, schedule="constant", warmup_steps=0, eps=1e-2))
    tree = jax.device_put(plain_parameters(config), parameter_shardings(shape.shapes, mesh))
    trainable, frozen = split_tree(tree, select(shape.paths, TRAINED, shape.stored))
    state = jax.jit(optimizer.transform.init, out_shardings=optimizer_shardings(optimizer, trainable, mesh))(trainable)
    step = make_train_step(shape.graphdef, optimizer, OPS, trainable, frozen, mesh)
    losses[name] = []
    for _ in range(3):
        trainable, state, metrics = step(trainable, state, frozen, place_batch(batch, mesh))
        losses[name].append(float(metrics["loss"]))
print(json.dumps(losses))
"""


@pytest.mark.parametrize("meshes", [["data"], pytest.param(["fsdp", "tensor"], marks=pytest.mark.slow)])
def test_two_devices_give_the_same_loss(run_python: Callable[..., str], batch: tuple, meshes: list[str]) -> None:
    losses = json.loads(run_python(f"MESHES = {meshes}\n{TWO_DEVICES}", devices=2))
    one = [float(metrics["loss"]) for metrics in run(TRAINED, batch, steps=3)[3]]
    assert one[-1] < one[0]
    for name in meshes:
        np.testing.assert_allclose(losses[name], one, rtol=1e-5, err_msg=name)
