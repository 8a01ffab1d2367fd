"""The pipeline: visual tokens in their slots, text without pictures, what must not leak."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monovl_jax.inference.generate import abstract_model
from monovl_jax.model.vlm import place_visual_tokens
from tests.model.helpers import REFERENCE, SORTED, few_branches, logits, pack, random_params, sample, tiny_with
from tests.quick import quick_jit

CONFIG = tiny_with("ffn+attention")


# ---- placing


def random_places(rng: np.random.Generator, b: int = 3, t: int = 10, n: int = 6):
    """An index and its inverse; row 0 uses all visual tokens, row 1 some, row 2 none."""
    index, slot = np.full((b, t), -1, np.int32), np.full((b, n), -1, np.int32)
    for row, count in enumerate((n, n // 2, 0)):
        which, where = rng.permutation(n)[:count], rng.permutation(t)[:count]
        index[row, where], slot[row, which] = which, where
    h, visual, dy = (rng.normal(size=(b, m, 4)).astype(np.float32) for m in (t, n, t))
    return h, visual, index, slot, dy


def plain_gather(h, visual, index, slot):
    del slot
    return jnp.where((index >= 0)[..., None], jnp.take_along_axis(visual, jnp.maximum(index, 0)[..., None], 1), h)


def value_and_gradients(place):
    def run(h, visual, index, slot, dy):
        y, pull = jax.vjp(lambda h, visual: place(h, visual, index, slot), h, visual)
        return y, pull(dy)

    return quick_jit(run)


def test_placing_equals_a_gather_and_so_do_its_gradients() -> None:
    ours, plain = value_and_gradients(place_visual_tokens), value_and_gradients(plain_gather)
    for seed in range(5):
        inputs = random_places(np.random.default_rng(seed))
        jax.tree.map(np.testing.assert_array_equal, ours(*inputs), plain(*inputs))


def test_the_gradient_is_a_gather_too() -> None:
    inputs = random_places(np.random.default_rng(0))
    ours, plain = (value_and_gradients(place).lower(*inputs).as_text() for place in (place_visual_tokens, plain_gather))
    assert "stablehlo.scatter" in plain and "scatter" not in ours and "gather" in ours


def test_bad_values_in_unused_visual_tokens_stay_there() -> None:
    h, visual, index, slot, dy = random_places(np.random.default_rng(0))
    run = value_and_gradients(place_visual_tokens)
    clean = run(h, visual, index, slot, dy)
    visual[slot < 0] = np.nan
    jax.tree.map(np.testing.assert_array_equal, run(h, visual, index, slot, dy), clean)


def test_only_visual_slots_change() -> None:
    """The embedded row: token embeddings, and visual tokens of tile 0, then tile 1, where visual_index says so."""
    graphdef, params = abstract_model(CONFIG)[0], random_params(CONFIG)
    batch = pack(CONFIG, [[sample(CONFIG, 7, 1, 0), sample(CONFIG, 6, 1, 1)]], slots=14, tiles=2)

    @quick_jit
    def embed(params, batch):
        model = nnx.merge(graphdef, params)
        h = model.embed(batch["tokens"], batch["tiles"], batch["visual_index"], batch["visual_slot"], REFERENCE)
        return h, model.visual_tokens(batch["tiles"], REFERENCE)

    h, visual = (np.asarray(a[0]) for a in embed(params, batch))
    np.testing.assert_array_equal(h[1:5], visual[:4])
    np.testing.assert_array_equal(h[8:12], visual[4:])
    text = batch["visual_index"][0] < 0
    np.testing.assert_array_equal(h[text], params["decoder"]["embedding"][batch["tokens"][0]][text])


# ---- text


def test_without_token_types_every_token_is_text() -> None:
    params, batch = random_params(CONFIG), pack(CONFIG, [[sample(CONFIG, 9, 0, 0)], [sample(CONFIG, 7, 0, 1)]], slots=12, tiles=2)
    plain = {k: batch[k] for k in ("tokens", "positions", "segment_ids")}
    valid = batch["segment_ids"] > 0
    np.testing.assert_allclose(logits(CONFIG, params, batch)[valid], logits(CONFIG, params, plain)[valid], atol=2e-5)


def test_token_ids_of_visual_slots_do_not_matter() -> None:
    params, batch = random_params(CONFIG), pack(CONFIG, [[sample(CONFIG, 9, 1, 0)], [sample(CONFIG, 7, 2, 1)]], slots=12, tiles=2)
    other = {**batch, "tokens": np.where(batch["token_types"] == 1, 299 - batch["tokens"], batch["tokens"]).astype(np.int32)}
    np.testing.assert_array_equal(logits(CONFIG, params, other), logits(CONFIG, params, batch))


# ---- what must not leak


@functools.cache
def values_and_gradients(config, ops):
    graphdef = abstract_model(config)[0]

    def loss(params, batch):
        model = nnx.merge(graphdef, params)
        hidden = jnp.where((batch["segment_ids"] > 0)[..., None], model(batch, ops)[0], 0)
        return jnp.sum(hidden**2), hidden

    return quick_jit(jax.value_and_grad(loss, has_aux=True))


def test_bad_unused_tiles_reach_nothing() -> None:
    """Float tiles: the second is NaN, and no slot shows it. Neither hidden states nor any gradient may notice."""
    params, batch = random_params(CONFIG), pack(CONFIG, [[sample(CONFIG, 9, 1, 0)], [sample(CONFIG, 7, 0, 1)]], slots=12, tiles=2)
    batch["tiles"] = (batch["tiles"] / 128 - 1).astype(np.float32)
    run = values_and_gradients(CONFIG, REFERENCE)
    clean = run(params, batch)
    used = (batch["visual_slot"] >= 0).reshape(2, 2, -1).any(-1)
    batch["tiles"][~used] = np.nan
    jax.tree.map(np.testing.assert_array_equal, run(params, batch), clean)


@pytest.mark.parametrize("ops", [REFERENCE, SORTED], ids=["reference", "sorted"])
def test_a_broken_visual_expert_does_not_touch_text(ops, monkeypatch: pytest.MonkeyPatch) -> None:
    few_branches(monkeypatch, 2)
    params, batch = random_params(CONFIG), pack(CONFIG, [[sample(CONFIG, 9, 0, 0)], [sample(CONFIG, 7, 0, 1)]], slots=12, tiles=2)
    run = values_and_gradients(CONFIG, ops)
    clean = run(params, batch)

    def broken(path, leaf):
        return np.full_like(leaf, np.nan) if "visual" in jax.tree_util.keystr(path) else leaf

    got = run(jax.tree_util.tree_map_with_path(broken, params), batch)
    np.testing.assert_array_equal(got[0][1], clean[0][1])

    def check(path, gradient, want):
        if "visual" not in jax.tree_util.keystr(path):
            np.testing.assert_array_equal(gradient, want, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, got[1], clean[1])


def test_what_stands_in_padding_slots_does_not_matter() -> None:
    params, batch = random_params(CONFIG), pack(CONFIG, [[sample(CONFIG, 9, 1, 0)], [sample(CONFIG, 7, 0, 1)]], slots=12, tiles=2)
    padding, rng = batch["segment_ids"] == 0, np.random.default_rng(0)
    run = values_and_gradients(CONFIG, REFERENCE)
    clean = run(params, batch)
    batch["tokens"][padding] = rng.integers(0, 300, padding.sum())
    batch["positions"][padding] = rng.uniform(0, 99, padding.sum())
    jax.tree.map(np.testing.assert_array_equal, run(params, batch), clean)
