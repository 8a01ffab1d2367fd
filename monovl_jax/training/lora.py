"""Low-rank adapters (LoRA, arXiv 2106.09685) on stacked decoder matrices.

W is frozen, W + alpha / rank * A @ B is used, and A and B are trained:

    W [L, in, ...out]     A [L, in, rank], N(0, 1 / in)     B [L, rank, prod(out)], zero: the first step starts from W itself

Adapters live beside the model's own leaves under `lora/<path>/{a,b}` while a stage trains, and are added into the weights when it ends,
so a finished stage is an ordinary model. No gradient, optimizer state or float32 master of W exists; what remains is one merged copy of the
targets in the compute dtype, and its gradient, inside the step. Upstream's adapters name LLaMA modules and match nothing in InternLM2
(spec section 5.3); here the targets are parameter paths. There is no dropout.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from monovl_jax.training.trainable import STACKED, TrainableError, Tree, flatten, select, unflatten

ROOT = "lora"

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
    """The leaves that get an adapter. Raises TrainableError for a regex that matches nothing, or a leaf that is no stacked matrix."""
    flat = flatten(shapes)
    chosen = select(list(flat), lora.targets)
    for path in sorted(chosen):
        if not path.startswith(STACKED) or len(flat[path].shape) < 3:
            raise TrainableError(
                f"lora target {path!r} has shape {list(flat[path].shape)}; only matrices of the decoder's blocks take adapters"
            )
    return chosen


def adapter_shapes(shapes: Tree, lora: Lora) -> Tree:
    """{"lora": {path: {a, b}}} as float32 ShapeDtypeStructs."""
    flat = flatten(shapes)
    result: dict[str, jax.ShapeDtypeStruct] = {}
    for path in sorted(target_paths(shapes, lora)):
        layers, inputs, *outputs = flat[path].shape
        result[f"{ROOT}/{path}/a"] = jax.ShapeDtypeStruct((layers, inputs, lora.rank), jnp.float32)
        result[f"{ROOT}/{path}/b"] = jax.ShapeDtypeStruct((layers, lora.rank, math.prod(outputs)), jnp.float32)
    return unflatten(result)


def init_adapters(shapes: Tree, lora: Lora, seed: int) -> Tree:
    """Adapters that change nothing yet."""
    result: dict[str, jax.Array] = {}
    for number, (path, leaf) in enumerate(flatten(adapter_shapes(shapes, lora)).items()):
        key = jax.random.fold_in(jax.random.key(seed), number)
        result[path] = jax.random.normal(key, leaf.shape) * leaf.shape[1] ** -0.5 if path.endswith("/a") else jnp.zeros(leaf.shape)
    return unflatten(result)


def merged(trainable: Tree, frozen: Tree, lora: Lora | None) -> tuple[Tree, Tree]:
    """(trainable without adapters, frozen with the adapters added), both in the dtypes they came in. The product is made in float32."""
    if lora is None:
        return trainable, frozen
    own = {key: value for key, value in trainable.items() if key != ROOT}
    adapters, flat = flatten(trainable[ROOT]), flatten(frozen)
    for path in {adapter.rpartition("/")[0] for adapter in adapters}:
        weight = flat[path]
        update = jnp.matmul(adapters[f"{path}/a"], adapters[f"{path}/b"], preferred_element_type=jnp.float32) * lora.scale
        flat[path] = (weight.astype(jnp.float32) + update.reshape(weight.shape)).astype(weight.dtype)
    return own, unflatten(flat)
