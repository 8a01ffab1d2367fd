"""The released names and shapes of every tensor, and where each lives in our tree. One table, read in both directions.

A row maps ONE upstream tensor to one of our leaves (or two: the first row of the position table is the
unused class position). A row with `{layer}` in its name stands for one tensor per decoder layer, stacked on the leading axis of our leaf.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from monovl_jax.config import DecoderConfig, ModelConfig
from monovl_jax.convert.arrays import copy_into
from monovl_jax.convert.errors import WeightsError

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    name: upstream name, with `{layer}` for a tensor per layer.
    paths: our leaves, `/`-separated.
    shape: upstream shape.
    load: upstream array -> one array per path. save: the inverse.
    """

    name: str
    paths: tuple[str, ...]
    shape: tuple[int, ...]
    load: Callable[[Array], tuple[Array, ...]]
    save: Callable[..., Array]

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.name


def _same(name: str, path: str, shape: tuple[int, ...]) -> Row:
    return Row(name, (path,), shape, lambda a: (a,), lambda a: a)


def _linear(name: str, path: str, out: int, inp: int) -> Row:
    """torch Linear [out, in] <-> kernel [in, out]."""
    return Row(name, (path,), (out, inp), lambda a: (a.T,), lambda a: a.T)


def _flat(name: str, path: str, ours: tuple[int, ...]) -> Row:
    """A vector upstream, an array of shape `ours` here."""
    return Row(name, (path,), (int(np.prod(ours)),), lambda a: (a.reshape(ours),), lambda a: a.reshape(-1))


def _vocabulary(name: str, path: str, c: DecoderConfig, transpose: bool) -> Row:
    """[V, D] upstream; padded to Vp rows here, and [D, Vp] for the head. Padding rows are zero and never exported."""
    shape = (c.hidden_size, c.padded_vocab_size) if transpose else (c.padded_vocab_size, c.hidden_size)

    def load(a: Array) -> tuple[Array, ...]:
        padded = np.zeros(shape, a.dtype)
        copy_into(padded[:, : c.vocab_size] if transpose else padded[: c.vocab_size], a.T if transpose else a)
        return (padded,)

    def save(a: Array) -> Array:
        return (a.T if transpose else a)[: c.vocab_size]

    return Row(name, (path,), (c.vocab_size, c.hidden_size), load, save)


def _qkv(name: str, path: str, c: DecoderConfig) -> Row:
    """wqkv rows are grouped per kv head as [q_0 .. q_{g-1}, k, v] (upstream modeling_internlm2_ve.py:375-387); ours [D, kv, g + 2, e]."""
    kv, slots, e, d = c.num_kv_heads, c.queries_per_kv + 2, c.head_dim, c.hidden_size
    return Row(name, (path,), (kv * slots * e, d), lambda a: (a.T.reshape(d, kv, slots, e),), lambda a: a.reshape(d, kv * slots * e).T)


def _position_table(name: str, c: int, n: int) -> Row:
    return Row(
        name,
        ("vision/class_position", "vision/position_embedding"),
        (1, 1 + n, c),
        lambda a: (a[0, 0], a[0, 1:]),
        lambda first, rest: np.concatenate([first[None], rest])[None],
    )


def _rows(config: ModelConfig) -> Iterator[Row]:
    v, d = config.vision, config.decoder
    width = v.hidden_size * v.shuffle**2
    hidden, ffn = d.hidden_size, d.intermediate_size

    vision = "vision_model.embeddings."
    yield Row(vision + "class_embedding", ("vision/class_embedding",), (1, 1, v.hidden_size), lambda a: (a[0, 0],), lambda a: a[None, None])
    yield Row(
        vision + "patch_embedding.weight",
        ("vision/kernel",),
        (v.hidden_size, 3, v.patch_size, v.patch_size),
        lambda a: (a.transpose(2, 3, 1, 0),),
        lambda a: a.transpose(3, 2, 0, 1),
    )
    yield _same(vision + "patch_embedding.bias", "vision/bias", (v.hidden_size,))
    yield _position_table(vision + "position_embedding", v.hidden_size, v.position_grid**2)

    yield _same("mlp1.0.weight", "projector/norm_scale", (width,))
    yield _same("mlp1.0.bias", "projector/norm_bias", (width,))
    yield _linear("mlp1.1.weight", "projector/kernel1", hidden, width)
    yield _same("mlp1.1.bias", "projector/bias1", (hidden,))
    yield _linear("mlp1.3.weight", "projector/kernel2", hidden, hidden)
    yield _same("mlp1.3.bias", "projector/bias2", (hidden,))

    yield _vocabulary("language_model.model.tok_embeddings.weight", "decoder/embedding", d, transpose=False)
    layer, ours = "language_model.model.layers.{layer}.", "decoder/blocks/"
    yield _same(layer + "attention_norm.weight", ours + "attention_norm", (hidden,))
    yield _same(layer + "ffn_norm.weight", ours + "ffn_norm", (hidden,))
    experts = [("", "text")] if d.experts == "none" else [("", "text"), ("_ve", "visual")]
    for suffix, expert in experts:
        if expert == "text" or d.experts == "ffn+attention":
            yield _qkv(f"{layer}attention.wqkv{suffix}.weight", f"{ours}attention/{expert}/qkv", d)
            if d.attention_bias:
                shape = (d.num_kv_heads, d.queries_per_kv + 2, d.head_dim)
                yield _flat(f"{layer}attention.wqkv{suffix}.bias", f"{ours}attention/{expert}/qkv_bias", shape)
            if expert == "text" or d.attention_expert_output:
                yield _linear(f"{layer}attention.wo{suffix}.weight", f"{ours}attention/{expert}/out", hidden, hidden)
                if d.attention_bias:
                    yield _same(f"{layer}attention.wo{suffix}.bias", f"{ours}attention/{expert}/out_bias", (hidden,))
        for upstream, name, out, inp in (("w1", "gate", ffn, hidden), ("w3", "up", ffn, hidden), ("w2", "down", hidden, ffn)):
            yield _linear(f"{layer}feed_forward{suffix}.{upstream}.weight", f"{ours}mlp/{expert}/{name}", out, inp)
    yield _same("language_model.model.norm.weight", "decoder/norm", (hidden,))
    if not d.tie_embeddings:
        yield _vocabulary("language_model.output.weight", "decoder/head", d, transpose=True)


def key_table(config: ModelConfig) -> list[Row]:
    """All rows of a model, in the released order of parts."""
    return list(_rows(config))


def upstream_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every upstream tensor name with its shape."""
    shapes = {}
    for row in key_table(config):
        for layer in range(config.decoder.num_layers) if row.per_layer else (0,):
            shapes[row.name.format(layer=layer)] = row.shape
    return shapes


def leaf(tree: dict[str, Any], path: str) -> Any:
    """The leaf of a nested dict at a `/`-separated path."""
    for part in path.split("/"):
        tree = tree[part]
    return tree


def set_leaf(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[last] = value


def tree_from_upstream(config: ModelConfig, read: Callable[[str], Array]) -> dict[str, Any]:
    """Builds our nested dict of arrays that own their memory; `read(name)` gives an upstream tensor. Stacked leaves are filled layer
    by layer. Raises WeightsError when layers differ in dtype."""
    tree: dict[str, Any] = {}
    layers = config.decoder.num_layers
    for row in key_table(config):
        if not row.per_layer:
            for path, array in zip(row.paths, row.load(read(row.name)), strict=True):
                leaf_of_ours = np.empty(array.shape, array.dtype)
                copy_into(leaf_of_ours, array)
                set_leaf(tree, path, leaf_of_ours)
            continue
        stacked: Array | None = None
        for i in range(layers):
            (array,) = row.load(read(row.name.format(layer=i)))
            if stacked is None:
                stacked = np.empty((layers, *array.shape), array.dtype)
            if array.dtype != stacked.dtype:
                raise WeightsError(f"{row.name} is {stacked.dtype.name} in layer 0 and {array.dtype.name} in layer {i}; choose one dtype")
            copy_into(stacked[i], array)
        set_leaf(tree, row.paths[0], stacked)
    return tree


def tree_to_upstream(config: ModelConfig, tree: dict[str, Any]) -> Iterator[tuple[str, Array]]:
    """Yields every upstream tensor of our nested dict, in table order."""
    for row in key_table(config):
        leaves = [np.asarray(leaf(tree, path)) for path in row.paths]
        if row.per_layer:
            for i in range(config.decoder.num_layers):
                yield row.name.format(layer=i), row.save(*(a[i] for a in leaves))
        else:
            yield row.name, row.save(*leaves)
