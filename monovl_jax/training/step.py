"""The training step: one pure function from parameters, optimizer state and batch to the next ones.

It differentiates with respect to the trainable subtree alone. The loss is sum(weights * nll) / sum(weights) over the GLOBAL batch:
all parts, micro-batches, devices and hosts. It knows no paper: a paper is a config, an `nll` function and stages.

A batch is a part or a tuple of parts of different shapes (rows with pictures and rows of text, say); a part is a dict of arrays
[B, ...] (docs/batch.md), or [A, B, ...] with A micro-batches. A part without `tiles` is text alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from monovl_jax.model import VLM, Ops
from monovl_jax.parallel.mesh import row_share
from monovl_jax.parallel.ops import mesh_ops
from monovl_jax.parallel.sharding import batch_sharding, check_rows, parameter_sharding, parameter_shardings, replicated
from monovl_jax.training.lora import ROOT, Lora, attach, without_adapters
from monovl_jax.training.losses import weighted_nll
from monovl_jax.training.optimizer import Optimizer
from monovl_jax.training.trainable import Tree, flatten, unflatten

Part = Mapping[str, Any]
Batch = Part | tuple[Part, ...]
Nll = Callable[[VLM, Part, Ops], jax.Array]
"""(model, micro-batch of one part, ops) -> float32[], the sum of loss_weights * nll."""

Metrics = dict[str, jax.Array]


class BatchError(ValueError):
    """A batch that does not fit the stage or the mesh; the message names part, field and shape."""


def next_token_nll(model: VLM, part: Part, ops: Ops) -> Float[Array, ""]:
    """float32[]: sum over tokens of loss_weights * -log p(target). Logits are made for supervised tokens only."""
    hidden, _ = model(dict(part), ops)
    nll = ops.over_mesh(partial(weighted_nll, vocab_size=model.config.decoder.vocab_size), "nll")
    return nll(hidden, model.decoder.head_kernel(), part["targets"], part["loss_weights"])


def as_parts(batch: Batch) -> tuple[Part, ...]:
    """A batch as a tuple of parts."""
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def micro_batches(part: Mapping[str, np.ndarray], accumulation: int, name: str = "the batch") -> dict[str, np.ndarray]:
    """Rows [R, ...] to [A, R / A, ...] when A = accumulation > 1; a part already shaped so is returned as it is.

    Raises BatchError when A does not divide the rows.
    """
    if accumulation == 1:
        return dict(part)
    if part["tokens"].ndim == 3 and part["tokens"].shape[0] == accumulation:
        return dict(part)
    rows = part["tokens"].shape[0]
    if part["tokens"].ndim != 2 or rows % accumulation:
        raise BatchError(f"{name}: tokens have shape {part['tokens'].shape}; {rows} rows cannot be cut into {accumulation} micro-batches")
    return {key: value.reshape(accumulation, rows // accumulation, *value.shape[1:]) for key, value in part.items()}


def place_batch(batch: Batch, mesh: Mesh, accumulation: int = 1) -> tuple[dict[str, jax.Array], ...]:
    """Host arrays to the mesh, rows divided over `data` and `fsdp`; every process gives its own rows (`parallel.mesh.row_share`).

    Parts of [R, ...] are cut into `accumulation` micro-batches first: BatchError when that does not divide the rows, MeshError when
    the mesh does not divide those of a micro-batch.
    """
    sharding = batch_sharding(mesh, accumulation > 1)
    axis, (_, shares) = (1 if accumulation > 1 else 0), row_share(mesh)
    placed = []
    for number, part in enumerate(as_parts(batch)):
        part = micro_batches(part, accumulation, f"part {number} of the batch")
        rows = part["tokens"].shape[axis] * shares
        check_rows(rows, f"part {number} of the batch", mesh)
        placed.append({})
        for key, value in part.items():
            shape = (*value.shape[:axis], rows, *value.shape[axis + 1 :])
            placed[-1][key] = jax.make_array_from_process_local_data(sharding, np.asarray(value), shape)
    return tuple(placed)


def optimizer_shardings(optimizer: Optimizer, trainable: Tree, mesh: Mesh) -> Any:
    """Where the optimizer state lies: moments beside their parameter, counters everywhere."""
    state = jax.eval_shape(optimizer.transform.init, trainable)
    paths = unflatten({path: path for path in flatten(trainable)})
    return optax.tree_utils.tree_map_params(
        optimizer.transform,
        lambda leaf, path: parameter_sharding(path, tuple(leaf.shape), mesh),
        state,
        paths,
        transform_non_params=lambda _: replicated(mesh),
    )


def _nlls(graphdef: Any, trees: tuple[Tree, ...], parts: tuple[Part, ...], ops: Ops, nll: Nll, lora: Lora | None = None) -> jax.Array:
    """float32[P]: the weighted nll sum of each part. lora: of the adapters in the first tree."""
    model = nnx.merge(graphdef, *map(without_adapters, trees))
    if lora is not None:
        attach(model, trees[0], lora)
    return jnp.stack([nll(model, part, ops).astype(jnp.float32) for part in parts])


def attended_pairs(segment_ids: Int[Array, "... t"]) -> Float[Array, ""]:
    """How many (query, key) pairs causal attention within segments has: n (n + 1) / 2 for a packed sample of n tokens.

    float32: a large batch has more than 2^31 of them. Example: [1 1 1 2 2 0] has 6 + 3.
    """
    t = segment_ids.shape[-1]
    place = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), segment_ids.shape)
    before = jnp.concatenate([jnp.zeros_like(segment_ids[..., :1]), segment_ids[..., :-1]], axis=-1)
    start = jax.lax.cummax(jnp.where(segment_ids != before, place, 0), axis=segment_ids.ndim - 1)
    return jnp.sum(jnp.where(segment_ids > 0, place - start + 1, 0), dtype=jnp.float32)


def _sums(parts: tuple[Part, ...]) -> tuple[jax.Array, dict[str, Any]]:
    """Weight sum per part float32[P], and counts over the whole batch."""
    weights = jnp.stack([jnp.sum(part["loss_weights"], dtype=jnp.float32) for part in parts])

    def total(count: Callable[[Part], Any], field: str) -> jax.Array:
        return sum((jnp.sum(count(part), dtype=jnp.int32) for part in parts if field in part), jnp.int32(0))

    counts = {
        "supervised": total(lambda part: part["loss_weights"] != 0, "loss_weights"),
        "tokens": total(lambda part: part["segment_ids"] > 0, "segment_ids"),
        "visual_tokens": total(lambda part: (part["token_types"] > 0) & (part["segment_ids"] > 0), "token_types"),
        "tile_tokens": total(lambda part: (part["token_types"] == 1) & (part["segment_ids"] > 0), "token_types"),
        "token_slots": jnp.int32(sum(part["tokens"].size for part in parts)),
        "tile_slots": jnp.int32(sum(math.prod(part["tiles"].shape[:-3]) for part in parts if "tiles" in part)),
        "pairs": sum((attended_pairs(part["segment_ids"]) for part in parts), jnp.float32(0)),
    }
    return weights, counts


def gradient_group(path: str) -> str:
    """Of a parameter or its adapter: `text_expert`, `visual_expert`, `vision` (patch embedding, projector) or `shared` (all else)."""
    if "/visual/" in path:
        return "visual_expert"
    if "/text/" in path:
        return "text_expert"
    return "vision" if path.startswith(("vision/", "projector/", f"{ROOT}/projector/")) else "shared"


def gradient_norms(gradients: Tree) -> dict[str, jax.Array]:
    """float32[]: the norm of the gradient over the leaves of each `gradient_group` that is trained."""
    groups: dict[str, list[jax.Array]] = {}
    for path, leaf in flatten(gradients).items():
        groups.setdefault(gradient_group(path), []).append(leaf)
    return {name: optax.tree.norm(leaves) for name, leaves in groups.items()}


def _mean(total: jax.Array, weight: jax.Array) -> jax.Array:
    """total / weight, and 0 where nothing is supervised."""
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)


def train_step(
    graphdef: Any,
    optimizer: Optimizer,
    ops: Ops,
    accumulation: int,
    nll: Nll,
    trainable: Tree,
    opt_state: Any,
    frozen: Tree,
    batch: Batch,
    lora: Lora | None = None,
) -> tuple[Tree, Any, Metrics]:
    """The unjitted step; `make_train_step` binds the first five arguments and `lora`, and jits it."""
    parts = as_parts(batch)
    weights, counts = _sums(parts)
    total = jnp.sum(weights)
    scale = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)

    def loss(trainable: Tree, micro: tuple[Part, ...]) -> tuple[jax.Array, jax.Array]:
        nlls = _nlls(graphdef, (trainable, frozen), micro, ops, nll, lora)
        return jnp.sum(nlls) * scale, nlls

    gradients_of = jax.grad(loss, has_aux=True)
    if accumulation == 1:
        gradients, nlls = gradients_of(trainable, parts)
    else:

        def add(carry: tuple[Tree, jax.Array], micro: tuple[Part, ...]) -> tuple[tuple[Tree, jax.Array], None]:
            gradients, nlls = gradients_of(trainable, micro)
            return (jax.tree.map(lambda a, b: a + b.astype(jnp.float32), carry[0], gradients), carry[1] + nlls), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable)
        (gradients, nlls), _ = jax.lax.scan(add, (zeros, jnp.zeros(len(parts), jnp.float32)), parts)

    mean, norm = _mean(jnp.sum(nlls), total), optax.tree.norm(gradients)
    finite = jnp.isfinite(mean) & jnp.isfinite(norm)
    metrics = {
        "loss": mean,
        "part_losses": _mean(nlls, weights),
        "grad_norm": norm,
        "grad_norms": gradient_norms(gradients),
        "skipped": jnp.where(finite, 0, 1).astype(jnp.int32),
        "learning_rate": optimizer.learning_rate(opt_state),
        "weight": total,
        **counts,
    }
    updates, state = optimizer.transform.update(gradients, opt_state, trainable)
    updated: Any = optax.apply_updates(trainable, updates)
    # Not by lax.cond: a select fuses into the update, and costs nothing beside it.
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), (updated, state), (trainable, opt_state))
    return kept[0], kept[1], metrics


def make_train_step(
    graphdef: Any,
    optimizer: Optimizer,
    ops: Ops,
    trainable: Tree,
    frozen: Tree,
    mesh: Mesh,
    accumulation: int = 1,
    nll: Nll = next_token_nll,
    lora: Lora | None = None,
    compiler_options: Mapping[str, Any] | None = None,
) -> Callable[[Tree, Any, Tree, Batch], tuple[Tree, Any, Metrics]]:
    """The jitted step: (trainable, opt_state, frozen, batch) -> (trainable, opt_state, metrics). The first two are donated.

    Args:
      graphdef: of the model (`trainable.Structure`).
      optimizer: from `make_optimizer`.
      trainable, frozen: the two subtrees, or their shapes: only shapes are read. Trainable leaves are float32 masters.
      mesh: parameters lie on it by the table of `parallel.sharding`; the batch as `place_batch` puts it.
      accumulation: A; with A > 1 batch leaves are [A, B, ...], and gradients are summed over micro-batches in float32.
      nll: what is minimised; see `Nll`.
      lora: of the adapters in `trainable`, if there are any.
      compiler_options: of XLA, for this program alone; see `training.devices.compiler_options`.

    A loss or gradient that is not finite leaves trainable and opt_state as they were, schedule included: metrics `skipped` is 1.

    Metrics stay on the device: loss, grad_norm (before clipping), learning_rate, weight (sum of loss weights), pairs (`attended_pairs`)
    float32[]; part_losses float32[P]; grad_norms {group: float32[]}; skipped, supervised, tokens (not padding), visual_tokens (of the
    visual expert), tile_tokens (visual tokens of tiles), token_slots, tile_slots int32[]. The same inputs give the same bits on CPU.
    """
    ops, places = mesh_ops(ops, mesh), parameter_shardings(trainable, mesh)
    states = optimizer_shardings(optimizer, trainable, mesh)

    def step(trainable: Tree, opt_state: Any, frozen: Tree, batch: Batch) -> tuple[Tree, Any, Metrics]:
        return train_step(graphdef, optimizer, ops, accumulation, nll, trainable, opt_state, frozen, batch, lora)

    return jax.jit(
        step,
        in_shardings=(places, states, parameter_shardings(frozen, mesh), None),
        out_shardings=(places, states, replicated(mesh)),
        donate_argnums=(0, 1),
        compiler_options=dict(compiler_options or {}) or None,
    )


def make_eval_step(graphdef: Any, ops: Ops, nll: Nll = next_token_nll, mesh: Mesh | None = None) -> Callable[[Tree, Batch], Metrics]:
    """The jitted evaluation step: (parameters, batch of [B, ...] parts) -> {nll: sum, weight: sum}, float32[].

    Perplexity over many batches is exp(sum of nll / sum of weight). Parameters are one nested dict of the whole model.

    mesh: parameters lie on it by the table of `parallel.sharding` (`place_parameters`), the batch as `place_batch` puts it. Without it
      the program is for one device.
    """
    if mesh is not None:
        ops = mesh_ops(ops, mesh)

    def step(parameters: Tree, batch: Batch) -> Metrics:
        parts = as_parts(batch)
        return {"nll": jnp.sum(_nlls(graphdef, (parameters,), parts, ops, nll)), "weight": jnp.sum(_sums(parts)[0])}

    return jax.jit(step)
