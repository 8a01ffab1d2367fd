"""The mesh-aware `Ops`: every part of the model that has weights or looks at several tokens, run on each device's own share.

    part        rows over data, fsdp     what `tensor` divides                   where partial results meet
    vision      tiles -> patches         nothing (1.6M parameters)
    projector   in and out: as qkv and out of attention
    embedding   tokens -> rows           the vocabulary [Vp, D]                  sum over tensor
    routing     indices of own rows      nothing
    qkv         x [B, T, D]              heads: kernel [D, kv * (g + 2) * e]     gradient of x: sum over tensor
    attention   q, k, v of own rows      heads
    out         x [B, T, heads * e]      heads: kernel [heads * e, D]            sum over tensor
    mlp         x [B, T, D]              hidden units: [D, F], [D, F], [F, D]    sum over tensor, and gradient of x
    nll         h [B, T, D]              the vocabulary of the head [D, Vp]      inside `losses.weighted_nll`

Weights enter in pieces over `fsdp` and `tensor`, as `sharding.RULES` lays them. They are cast to the compute dtype, then gathered over
`fsdp`; so the gradient of a gather is a reduce-scatter, and a frozen weight has none. Every sum between devices is written in float32:
gradients leave a device as float32, and so do the partial sums of `tensor`. The sums of activations are rounded to the compute dtype right
after, for which XLA for TPU may send them in it already.

Nothing here is partitioned by the compiler, which could not cut a Mosaic kernel; what is left to it works on single tokens (norms, rotary
tables, activations), where nothing moves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from monovl_jax.model.ops import Ops
from monovl_jax.parallel.mesh import AXES
from monovl_jax.parallel.sharding import ROWS
from pallas_kernels import Routing

GATHERED = "gathered"
"""Name of gathered weights for `jax.checkpoint`: never kept for the backward pass, which gathers them again."""

COLUMNS = ("qkv", "projector_in")
"""Parts whose kernel is divided by its columns: their output lies over `tensor`."""

LINES = ("out", "projector_out")
"""Parts whose kernel is divided by its lines: their input lies over `tensor`, and what devices compute are parts of a sum."""

_COLUMNS, _LINES = P("fsdp", "tensor"), P("tensor", "fsdp")


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_weight(w: jax.Array, dtype: Any, axis: int) -> jax.Array:
    """A weight whole along `axis` from its pieces over fsdp, in the compute dtype. Its gradient is reduced and scattered in float32."""
    w = checkpoint_name(w.astype(dtype), GATHERED)
    return checkpoint_name(jax.lax.all_gather(w, "fsdp", axis=axis, tiled=True), GATHERED)


def _gather_fwd(w: jax.Array, dtype: Any, axis: int) -> tuple[jax.Array, jax.Array]:
    return gather_weight(w, dtype, axis), jnp.zeros((0,), w.dtype)


def _gather_bwd(dtype: Any, axis: int, like: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    del dtype
    pieces = jax.lax.psum_scatter(g.astype(jnp.float32), "fsdp", scatter_dimension=axis, tiled=True)
    return (pieces.astype(like.dtype),)


gather_weight.defvjp(_gather_fwd, _gather_bwd)


@dataclasses.dataclass(frozen=True)
class _Constrain:
    """`Ops.constrain` of one mesh."""

    mesh: Mesh

    def __call__(self, x: jax.Array, kind: str) -> jax.Array:
        """[B, T, ...]: rows over data and fsdp; heads (axis 2) and logits (the last) over tensor."""
        spec = {"tokens": P(ROWS), "heads": P(ROWS, None, "tensor"), "logits": P(ROWS, *[None] * (x.ndim - 2), "tensor")}[kind]
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


@dataclasses.dataclass(frozen=True)
class _OverMesh:
    """`Ops.over_mesh` of one mesh."""

    mesh: Mesh
    dtype: Any
    keep_gathered: bool

    @property
    def tensor(self) -> int:
        return self.mesh.shape["tensor"]

    def __call__(self, f: Callable[..., Any], part: str) -> Callable[..., Any]:
        run = {
            "vision": self.vision,
            "embedding": self.embedding,
            "routing": self.routing,
            "attention": self.attention,
            "nll": self.nll,
        }.get(part)
        return partial(self.layer, f, part) if run is None else partial(run, f)

    def shard(self, f: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`shard_map` without its check of what varies over which axis: kernels do not say."""
        return jax.shard_map(f, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def wide(self, x: jax.Array) -> jax.Array:
        """What is whole on several devices of `tensor` enters as float32, so that its gradients meet in float32."""
        return x.astype(jnp.float32) if self.tensor > 1 else x

    def weight(self, w: jax.Array, spec: P) -> jax.Array:
        """Inside a shard: the weight in the compute dtype, whole along the dimension that fsdp divides."""
        if self.mesh.shape["fsdp"] == 1 or "fsdp" not in spec:
            return w.astype(self.dtype)
        return gather_weight(w, self.dtype, spec.index("fsdp"))

    # ---- the parts -----------------------------------------------------------------------------------------------------------------

    def vision(self, f: Callable[..., jax.Array], tiles: jax.Array, parameters: Any) -> jax.Array:
        """f(tiles [N, H, W, 3], parameters) -> [N, V, C]; parameters are whole everywhere."""
        return self.shard(f, (P(ROWS), P()), P(ROWS))(tiles, parameters)

    def routing(self, f: Callable[..., Routing], expert: jax.Array) -> Routing:
        """A routing for the rows of each device: its indices count from the first of them."""
        return self.shard(f, P(ROWS), P(ROWS))(expert)

    def attention(self, f: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        heads = P(ROWS, None, "tensor")
        return self.shard(f, (heads, heads, heads, P(ROWS)), heads)(q, k, v, segments)

    def layer(self, f: Callable[..., jax.Array], part: str, x: jax.Array, *rest: Any) -> jax.Array:
        """A projection or feed-forward, dense or routed: f(x, weights and a routing in any nesting) -> [B, T, M]."""
        specs = _layer_specs(part, rest)
        summed = part not in COLUMNS and self.tensor > 1
        dtype = x.dtype

        def place(leaf: Any, spec: P) -> Any:
            if isinstance(leaf, Routing):
                return leaf
            if summed and spec == P():  # a bias is added once, not by every device of `tensor`
                leaf = jnp.where(jax.lax.axis_index("tensor") == 0, leaf, 0)
            return self.weight(leaf, spec)

        def run(x: jax.Array, *rest: Any) -> jax.Array:
            y = f(x.astype(dtype), *jax.tree.map(place, rest, specs, is_leaf=_is_routing))
            return y.astype(jnp.float32)[None] if summed else y

        if not self.keep_gathered:
            run = jax.checkpoint(run, policy=jax.checkpoint_policies.save_anything_except_these_names(GATHERED), prevent_cse=False)
        heads = P(ROWS, None, "tensor")
        in_spec, x = (heads, x) if part in LINES else (P(ROWS), self.wide(x))
        out_spec = heads if part in COLUMNS else P("tensor", ROWS) if summed else P(ROWS)
        y = self.shard(run, (in_spec, *specs), out_spec)(x, *rest)
        return y.sum(0).astype(dtype) if summed else y

    def embedding(self, f: Callable[..., jax.Array], table: jax.Array, tokens: jax.Array) -> jax.Array:
        """f(table [Vp, D], tokens [B, T]) -> [B, T, D], a row of zeros for a token outside.

        The table stays where it is: a device looks up the tokens of all its fsdp neighbours in its own columns, and they exchange.
        """

        def run(table: jax.Array, tokens: jax.Array) -> jax.Array:
            tokens = jax.lax.all_gather(tokens, "fsdp", axis=0, tiled=True)
            local = tokens - jax.lax.axis_index("tensor") * table.shape[0]
            local = jnp.where(local < 0, table.shape[0], local)  # a negative index would count from the end
            h = f(table, local).astype(self.dtype)
            return jax.lax.all_to_all(h, "fsdp", split_axis=0, concat_axis=2, tiled=True)[None]

        # At most one device of `tensor` has a row that is not zero, so that the sum is exact in any dtype.
        return self.shard(run, (_LINES, P(ROWS)), P("tensor", ROWS))(table, tokens).sum(0)

    def nll(self, f: Callable[..., jax.Array], h: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        """f(h, head, targets, weights, axes=...) -> float32[], summed over all rows."""
        dtype = h.dtype

        def run(h: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
            total = f(h.astype(dtype), self.weight(head, _COLUMNS), targets, weights, axes=AXES)
            return jnp.where(jax.lax.axis_index("tensor") == 0, total, 0)[None]

        specs = (P(ROWS), _COLUMNS, P(ROWS), P(ROWS))
        return jnp.sum(self.shard(run, specs, P((*ROWS, "tensor")))(self.wide(h), head, targets, weights))


def _is_routing(leaf: Any) -> bool:
    return isinstance(leaf, Routing)


def _layer_specs(part: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """A PartitionSpec for every weight of a part, as in `sharding.RULES` without the layer axis; a routing lies like the rows."""
    number = -1

    def spec(leaf: Any) -> P:
        nonlocal number
        if _is_routing(leaf):
            return P(ROWS)
        if leaf.ndim == 1:
            return P("tensor") if part in COLUMNS else P()
        number += 1
        down = part == "mlp" and number % 3 == 2  # gate, up, down of each expert
        return _LINES if part in LINES or down else _COLUMNS

    return jax.tree.map(spec, arguments, is_leaf=_is_routing)


def mesh_ops(ops: Ops, mesh: Mesh) -> Ops:
    """The same computation over a mesh: `ops` on each device's share. `ops` itself on a mesh of one device.

    Batches must lie as `training.step.place_batch` puts them, parameters as `sharding.RULES` says; `sharding.check_mesh` tells before
    anything compiles whether a model fits the mesh.
    """
    if mesh.size == 1:
        return ops
    over = _OverMesh(mesh, ops.dtype, keep_gathered=ops.remat != "none" or mesh.shape["fsdp"] == 1)
    return dataclasses.replace(ops, over_mesh=over, constrain=_Constrain(mesh))
