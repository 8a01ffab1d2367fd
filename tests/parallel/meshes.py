"""One step of a tiny model on a mesh: its loss and every gradient, whole, on the host. Run in a process with enough devices."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from monovl_jax.config import Experts, ModelConfig, tiny
from monovl_jax.model import Ops
from monovl_jax.parallel.mesh import make_mesh
from monovl_jax.parallel.sharding import place_parameters
from monovl_jax.training.lora import ALL_PROJECTIONS, Lora, adapter_shapes
from monovl_jax.training.optimizer import Optimizer
from monovl_jax.training.step import make_train_step, optimizer_shardings, place_batch
from monovl_jax.training.trainable import Tree, flatten, model_structure, select, split_tree
from tests.training.worlds import image_rows, plain_parameters, text_rows

EIGHT = [(d, f, 8 // d // f) for d in (8, 4, 2, 1) for f in (8, 4, 2, 1) if 8 % (d * f) == 0]
"""Every (data, fsdp, tensor) of eight devices."""


def model(experts: Experts) -> ModelConfig:
    """`tiny` with eight kv heads, so that any mesh of eight devices divides it; two queries a kv head and biases in attention."""
    config = tiny(experts)
    decoder = dataclasses.replace(config.decoder, hidden_size=128, num_heads=16, num_kv_heads=8, attention_bias=experts == "ffn+attention")
    return dataclasses.replace(config, decoder=decoder)


def keeping_gradients() -> Optimizer:
    """An optimizer whose state holds the gradient it was given."""
    return Optimizer(optax.chain(optax.trace(decay=0.0), optax.scale_by_learning_rate(optax.constant_schedule(1.0))), lambda step: 1.0)


def _batch(config: ModelConfig) -> tuple[dict[str, np.ndarray], ...]:
    """Packed rows with pictures and rows of text; micro-batches and devices of unlike weight, one row of none."""
    batch = image_rows(config, 16, 24, 2, seed=1), text_rows(config, 16, 12, seed=2)
    batch[0]["loss_weights"][:5] *= 3
    batch[0]["loss_weights"][9] = 0
    return batch


ADAPTERS = Lora(rank=3, targets=(*ALL_PROJECTIONS, r"^projector/kernel[12]$"))


def adapters(config: ModelConfig) -> Tree:
    """Adapters on every matrix that takes one, all of them at work."""
    rng = np.random.default_rng(4)
    return jax.tree.map(
        lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), adapter_shapes(model_structure(config).shapes, ADAPTERS)
    )


def one_step(config: ModelConfig, sizes: tuple[int, int, int], ops: Ops, adapted: bool = False) -> dict[str, np.ndarray]:
    """{"loss" and path of each trained leaf: its gradient} of one step with two micro-batches. adapted: `adapters` are trained alone."""
    mesh = make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    shape, optimizer = model_structure(config), keeping_gradients()
    tree = place_parameters(plain_parameters(config), mesh)
    trainable, frozen = split_tree(tree, frozenset() if adapted else select(shape.paths, (".*",), shape.stored))
    if adapted:
        trainable = place_parameters(adapters(config), mesh)
    places = optimizer_shardings(optimizer, trainable, mesh)
    state = jax.jit(optimizer.transform.init, out_shardings=places)(trainable)
    step = make_train_step(shape.graphdef, optimizer, ops, trainable, frozen, mesh, accumulation=2, lora=ADAPTERS if adapted else None)
    shardings = {path: leaf.sharding for path, leaf in flatten(trainable).items()}
    trainable, state, metrics = step(trainable, state, frozen, place_batch(_batch(config), mesh, 2))
    gradients: dict[str, Any] = flatten(state[0].trace)
    for path, leaf in [*flatten(trainable).items(), *gradients.items()]:
        assert leaf.sharding.is_equivalent_to(shardings[path], leaf.ndim), f"{path} lies on {leaf.sharding}, not {shardings[path]}"
    return {"loss": np.asarray(metrics["loss"])} | {path: np.asarray(leaf) for path, leaf in gradients.items()}


def collectives(config: ModelConfig, sizes: tuple[int, int, int], ops: Ops, patterns: tuple[str, ...]) -> list[tuple[str, str]]:
    """(kind, operand as `64x48xbf16`) of every collective that the step asks for; frozen leaves are bfloat16. Nothing is compiled."""
    mesh, shape, optimizer = make_mesh(*sizes), model_structure(config), keeping_gradients()
    trainable, frozen = split_tree(shape.shapes, select(shape.paths, patterns, shape.stored))
    frozen = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), frozen)
    state = jax.eval_shape(optimizer.transform.init, trainable)
    step = make_train_step(shape.graphdef, optimizer, ops, trainable, frozen, mesh, accumulation=2)
    text = step.lower(trainable, state, frozen, place_batch(_batch(config), mesh, 2)).as_text()
    found = []
    for match in re.finditer(r'"stablehlo[.](all_reduce|reduce_scatter|all_gather|all_to_all)"', text):
        of = r"[}][)] : [(]tensor<([^>]*)>" if "reduce" in match.group(1) else r" : [(]tensor<([^>]*)>"  # reductions carry a function
        operand = re.compile(of).search(text, match.end())
        assert operand is not None
        found.append((match.group(1), operand.group(1)))
    return found


def differences(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, float]:
    """||a - b|| / ||a|| of every entry."""
    assert one.keys() == other.keys()
    return {key: float(np.linalg.norm(one[key] - other[key]) / max(np.linalg.norm(one[key]), 1e-30)) for key in one}
