"""Low-rank adapters (LoRA, arXiv 2106.09685) on the matrices of the decoder's blocks and of the projector.

W is frozen, A and B are trained, and a layer computes x @ W + (x @ A) @ (alpha / rank * B):

    W [L, in, ...out]     A [L, in, rank], N(0, 1 / in)     B [L, rank, prod(out)], zero: the first step starts from W itself

(without the layer axis L in the projector). Adapters are kept under `lora/<path>/{a,b}` beside the model's own leaves while a stage trains;
the step hangs them beside their kernels (`attach`). W + alpha / rank * A @ B is never made there: in bfloat16 it would lose most of a small
update. When the stage ends the adapters are added into the weights in float32 (`merged`), so a finished stage is an ordinary model whose
adapted matrices are float32. No gradient, optimizer state or float32 master of W exists.

Upstream's adapters name LLaMA modules and match nothing in InternLM2 (spec section 5.3); here the targets are parameter paths. There is no
dropout.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from monovl_jax.training.trainable import STACKED, TrainableError, Tree, flatten, select, unflatten

ROOT = "lora"

_ADAPTABLE = re.compile(rf"^{STACKED}.*/(qkv|out|gate|up|down)$|^projector/kernel[12]$")

TEXT_PROJECTIONS = (r"^decoder/blocks/attention/text/(qkv|out)$", r"^decoder/blocks/mlp/text/(gate|up|down)$")
ALL_PROJECTIONS = (r"^decoder/blocks/attention/(text|visual)/(qkv|out)$", r"^decoder/blocks/mlp/(text|visual)/(gate|up|down)$")


@dataclasses.dataclass(frozen=True)
class Lora:
    """rank: of the update. alpha: its scale is alpha / rank; 2 * rank by default, as upstream. targets: regexes over parameter paths."""

    rank: int
    alpha: float | None = None
    targets: tuple[str, ...] = ALL_PROJECTIONS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise TrainableError(f"lora rank is {self.rank}; give at least 1")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise TrainableError(f"lora alpha is {self.alpha}; give a positive number")

    @property
    def scale(self) -> float:
        return 2.0 if self.alpha is None else self.alpha / self.rank


def target_paths(shapes: Tree, lora: Lora) -> frozenset[str]:
    """The leaves that get an adapter. Raises TrainableError for a regex that matches nothing, or a leaf that takes none."""
    flat = flatten(shapes)
    chosen = select(list(flat), lora.targets)
    for path in sorted(chosen):
        if not _ADAPTABLE.search(path):
            raise TrainableError(
                f"lora target {path!r} has shape {list(flat[path].shape)}; only matrices of the decoder's blocks and of the projector take "
                "adapters, give regexes for these"
            )
    return chosen


def adapter_shapes(shapes: Tree, lora: Lora) -> Tree:
    """{"lora": {path: {a, b}}} as float32 ShapeDtypeStructs."""
    flat = flatten(shapes)
    result: dict[str, jax.ShapeDtypeStruct] = {}
    for path in sorted(target_paths(shapes, lora)):
        axes = 1 if path.startswith(STACKED) else 0
        layers, (inputs, *outputs) = flat[path].shape[:axes], flat[path].shape[axes:]
        result[f"{ROOT}/{path}/a"] = jax.ShapeDtypeStruct((*layers, inputs, lora.rank), jnp.float32)
        result[f"{ROOT}/{path}/b"] = jax.ShapeDtypeStruct((*layers, lora.rank, math.prod(outputs)), jnp.float32)
    return unflatten(result)


def init_adapters(shapes: Tree, lora: Lora, seed: int) -> Tree:
    """Adapters that change nothing yet."""
    result: dict[str, jax.Array] = {}
    for number, (path, leaf) in enumerate(flatten(adapter_shapes(shapes, lora)).items()):
        key = jax.random.fold_in(jax.random.key(seed), number)
        result[path] = jax.random.normal(key, leaf.shape) * leaf.shape[-2] ** -0.5 if path.endswith("/a") else jnp.zeros(leaf.shape)
    return unflatten(result)


def without_adapters(tree: Tree) -> Tree:
    """The model's own leaves of a tree."""
    return {key: value for key, value in tree.items() if key != ROOT}


def _by_path(tree: Tree) -> dict[str, tuple[jax.Array, jax.Array]]:
    """{path of the adapted leaf: (a, b)} of a tree with adapters."""
    flat = flatten(tree[ROOT])
    paths = sorted({path.rpartition("/")[0] for path in flat})
    return {path: (flat[f"{path}/a"], flat[f"{path}/b"]) for path in paths}


def attach(model: nnx.Module, trainable: Tree, lora: Lora) -> None:
    """Hangs the adapters of `trainable` beside their kernels, as `NAME_lora_a` and `NAME_lora_b`, the scale in b; the layers use them."""
    for path, (a, b) in _by_path(trainable).items():
        *parents, name = path.split("/")
        part = functools.reduce(getattr, parents, model)
        setattr(part, f"{name}_lora_a", nnx.Param(a))
        setattr(part, f"{name}_lora_b", nnx.Param(b * lora.scale))


def _add(weight: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """float32 weight + scale * a @ b, of one layer."""
    update = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return weight.astype(jnp.float32) + scale * update.reshape(weight.shape)


def merged(trainable: Tree, frozen: Tree, lora: Lora | None) -> tuple[Tree, Tree]:
    """(trainable without adapters, frozen with the adapters added): concrete arrays, for the end of a stage and for reading its steps.

    Adapted leaves become float32, whatever they were, and lie where they lay; others are shared. Layers are added one by one, so that
    nothing of the size of a leaf is made beside it.
    """
    if lora is None:
        return trainable, frozen
    flat = flatten(frozen)
    for path, (a, b) in _by_path(trainable).items():

        def add(weight: Any, a: Any, b: Any, stacked: bool = path.startswith(STACKED), scale: float = lora.scale) -> jax.Array:
            return jax.lax.map(lambda one: _add(one[0], one[1], one[2], scale), (weight, a, b)) if stacked else _add(weight, a, b, scale)

        weight = jnp.asarray(flat[path])
        flat[path] = jax.jit(add, out_shardings=weight.sharding)(weight, a, b)
    return without_adapters(trainable), unflatten(flat)
