"""Where every parameter and every batch lies on the mesh: one table of rules, first match wins."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from monovl_jax.parallel.mesh import MeshError

RULES: tuple[tuple[str, P], ...] = (
    # The visual tokenizer is 1.6M parameters: whole everywhere.
    (r"^vision/", P()),
    (r"^projector/kernel1$", P("fsdp", "tensor")),  # [C, D]
    (r"^projector/kernel2$", P("tensor", "fsdp")),  # [D, D]
    (r"^projector/(norm_scale|norm_bias|bias1|bias2)$", P()),
    (r"^decoder/embedding$", P("tensor", "fsdp")),  # [Vp, D]
    (r"^decoder/head$", P("fsdp", "tensor")),  # [D, Vp]
    (r"^decoder/norm$", P()),
    # Leaves of the blocks have a leading layer axis, which the scan walks: never sharded.
    (r"^decoder/blocks/(attention|ffn)_norm$", P()),
    (r"^decoder/blocks/attention/(text|visual)/qkv$", P(None, "fsdp", "tensor")),  # [L, D, kv, g + 2, e]
    (r"^decoder/blocks/attention/(text|visual)/qkv_bias$", P(None, "tensor")),  # [L, kv, g + 2, e]
    (r"^decoder/blocks/attention/(text|visual)/out$", P(None, "tensor", "fsdp")),  # [L, heads * e, D]
    (r"^decoder/blocks/attention/(text|visual)/out_bias$", P()),
    (r"^decoder/blocks/mlp/(text|visual)/(gate|up)$", P(None, "fsdp", "tensor")),  # [L, D, F]
    (r"^decoder/blocks/mlp/(text|visual)/down$", P(None, "tensor", "fsdp")),  # [L, F, D]
    # Adapters (`training.lora`) are small: whole everywhere.
    (r"^lora/", P()),
)

ROWS = ("data", "fsdp")
"""Mesh axes over which the rows of a batch are divided."""


def partition_spec(path: str, rules: tuple[tuple[str, P], ...] = RULES) -> P:
    """The rule for a parameter path (`decoder/blocks/mlp/visual/gate`). Raises ValueError when none matches."""
    for pattern, spec in rules:
        if re.search(pattern, path):
            return spec
    raise ValueError(f"no sharding rule matches the parameter {path!r}; add a line to monovl_jax.parallel.sharding.RULES")


def parameter_sharding(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The place of one parameter. Raises ValueError when no rule matches, MeshError when a mesh axis cannot divide its dimension."""
    spec = partition_spec(path)
    for dimension, axis in enumerate(spec):
        size = 1 if axis is None else mesh.shape[axis]
        if dimension >= len(shape) or shape[dimension] % size:
            heads = f": the {shape[dimension]} kv heads of the model" if axis == "tensor" and "/qkv" in path else ""
            raise MeshError(
                f"{path} has shape {list(shape)}; its dimension {dimension} cannot be divided over {size} devices of the mesh axis "
                f"{axis!r}{heads}; make that axis smaller"
            )
    return NamedSharding(mesh, spec)


def parameter_shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of a nested dict of parameters (arrays or ShapeDtypeStructs)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: parameter_sharding(jax.tree_util.keystr(path, simple=True, separator="/"), tuple(leaf.shape), mesh), tree
    )


def place_parameters(tree: Any, mesh: Mesh) -> Any:
    """Parameters of the host or of one device where the rules say, in the dtypes they have. Each process copies only what it holds.

    Leaves that lie there already are taken as they are.
    """

    def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and (jax.process_count() == 1 or not leaf.is_fully_addressable):
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, tree, parameter_shardings(tree, mesh))


def check_rows(rows: int, what: str, mesh: Mesh) -> None:
    """Raises MeshError when data * fsdp does not divide the rows of a micro-batch."""
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % groups:
        raise MeshError(
            f"{what} has {rows} rows a micro-batch, which {groups} devices (data {mesh.shape['data']} * fsdp {mesh.shape['fsdp']}) cannot "
            "share equally; change batch_size, accumulation or the mesh"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, accumulated: bool = False) -> NamedSharding:
    """Rows divided over `data` and `fsdp`: the first axis of [B, ...], or the second of [A, B, ...] when `accumulated`."""
    return NamedSharding(mesh, P(None, ROWS) if accumulated else P(ROWS))
