"""The decoder: packing, padding, cache, remat, depth, head, experts."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_kernels
from monovl_jax.config import RopeConfig
from monovl_jax.inference.generate import abstract_model
from monovl_jax.model import Ops, init_cache
from monovl_jax.model.ops import Remat
from tests.model.helpers import REFERENCE, SORTED, few_branches, logits, pack, random_params, sample, tiny_with
from tests.quick import quick_jit

EXPERTS = ("none", "ffn", "ffn+attention")


def test_a_packed_row_equals_separate_rows() -> None:
    config = tiny_with("ffn+attention", attention_bias=True)
    params, a, b = random_params(config), sample(config, 9, 1, 0), sample(config, 11, 2, 1)
    together = logits(config, params, pack(config, [[a, b], [b]], slots=22, tiles=3))
    alone = logits(config, params, pack(config, [[b], [a]], slots=22, tiles=3))
    np.testing.assert_allclose(together[0, :9], alone[1, :9], atol=2e-5)
    np.testing.assert_allclose(together[0, 9:20], alone[0, :11], atol=2e-5)
    assert np.isfinite(together).all(), "padding included"


def test_left_padding_changes_nothing() -> None:
    config = tiny_with("ffn+attention")
    params, a, b = random_params(config), sample(config, 9, 1, 0), sample(config, 12, 1, 1)
    right, left = (logits(config, params, pack(config, [[a], [b]], slots=12, tiles=1, left=left)) for left in (False, True))
    np.testing.assert_allclose(left[0, 3:], right[0, :9], atol=2e-5)
    np.testing.assert_allclose(left[1], right[1], atol=2e-5)


def test_decoding_with_a_cache_equals_the_full_forward() -> None:
    """Left-padded prefill of 8 slots with a picture, then 1, 1 and 2 tokens; the cache has slots to spare."""
    config = tiny_with("ffn+attention")
    graphdef, params = abstract_model(config)[0], random_params(config)
    batch = pack(config, [[sample(config, 9, 1, 0)], [sample(config, 12, 1, 1)]], slots=12, tiles=1, left=True)
    full = logits(config, params, batch)

    @quick_jit
    def step(params, part, cache):
        model = nnx.merge(graphdef, params)
        hidden, cache = model(part, REFERENCE, cache)
        return model.logits(hidden, REFERENCE), cache

    cache, made = init_cache(config.decoder, 2, 15, jnp.float32), []
    for a, b in ((0, 8), (8, 9), (9, 10), (10, 12)):
        part = {k: batch[k][:, a:b] for k in ("tokens", "positions", "segment_ids")}
        if a == 0:
            index = batch["visual_index"][:, a:b]
            part |= {"token_types": batch["token_types"][:, a:b], "visual_index": index, **{k: batch[k] for k in ("tiles", "visual_slot")}}
        out, cache = step(params, part, cache)
        made.append(np.asarray(out)[..., : config.decoder.vocab_size])
        assert int(cache.length) == b and not np.any(np.asarray(cache.segments)[:, b:])
    valid = batch["segment_ids"] > 0
    np.testing.assert_allclose(np.concatenate(made, 1)[valid], full[valid], atol=2e-5)


def test_dynamic_rotary_base_follows_the_key_length_given() -> None:
    """Beyond max_position_embeddings the plain forward takes its own length, or the one it is told."""
    config = tiny_with(rope=RopeConfig(theta=100.0, scaling="dynamic", factor=2.0), max_position_embeddings=8)
    plain = tiny_with(rope=RopeConfig(theta=100.0 * (2 * 12 / 8 - 1) ** (16 / 14)))
    params, batch = random_params(config), pack(config, [[sample(config, 12, 1, 1)]], slots=12, tiles=1)
    want = logits(plain, params, batch)
    np.testing.assert_allclose(logits(config, params, batch), want, atol=2e-5)
    graphdef = abstract_model(config)[0]

    @quick_jit
    def padded(params, batch, key_length):
        model = nnx.merge(graphdef, params)
        return model.logits(model(batch, REFERENCE, key_length=key_length)[0], REFERENCE)

    longer = pack(config, [[sample(config, 12, 1, 1)]], slots=16, tiles=1)
    got = np.asarray(padded(params, longer, jnp.int32(12)))[:, :12, : config.decoder.vocab_size]
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert np.abs(np.asarray(padded(params, longer, jnp.int32(16)))[:, :12, : config.decoder.vocab_size] - want).max() > 1e-3


# ---- remat and depth


def loss_of(config, ops: Ops):
    graphdef = abstract_model(config)[0]

    def loss(params, batch):
        hidden, _ = nnx.merge(graphdef, params)(batch, ops)
        return jnp.sum(jnp.where((batch["segment_ids"] > 0)[..., None], hidden, 0) ** 2) / hidden.size

    return loss


def test_remat_policies_give_the_same_loss_and_gradients() -> None:
    config = tiny_with("ffn")
    params, batch = random_params(config), pack(config, [[sample(config, 9, 1, 0), sample(config, 6, 1, 1)]], slots=17, tiles=2)
    results = {}
    for remat in ("none", "save_projections", "full"):
        run = quick_jit(jax.value_and_grad(loss_of(config, dataclasses.replace(REFERENCE, remat=remat)), allow_int=True))
        results[remat] = run(params, batch)
    for remat in ("save_projections", "full"):
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), results[remat], results["none"])


def abstract(config, rows: int = 1, slots: int = 80):
    return abstract_model(config)[1], pack(config, [[sample(config, 9, 1, 0)]] * rows, slots, tiles=1)


def count_matmuls(jaxpr) -> int:
    inner = [p for e in jaxpr.eqns for v in e.params.values() for p in (v if isinstance(v, list | tuple) else [v])]
    inner = [getattr(p, "jaxpr", p) for p in inner]
    return sum(e.primitive.name == "dot_general" for e in jaxpr.eqns) + sum(count_matmuls(p) for p in inner if hasattr(p, "eqns"))


def matmuls(config, ops: Ops) -> int:
    return count_matmuls(jax.make_jaxpr(jax.grad(loss_of(config, ops)))(*abstract(config)).jaxpr)


def test_remat_recomputes_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 1 and with 2 programs per expert's switch: what `save_projections` adds must not depend on it, as the FFN is not run again."""
    config, added = tiny_with("ffn"), {}
    for blocks in (1, 2):
        few_branches(monkeypatch, blocks)
        plain = matmuls(config, SORTED)
        for remat in ("save_projections", "full")[: 3 - blocks]:
            added[remat, blocks] = matmuls(config, dataclasses.replace(SORTED, remat=remat)) - plain
    assert 0 < added["save_projections", 1] == added["save_projections", 2] < added["full", 1]


@pytest.mark.parametrize("remat", ["none", "save_projections", "full"])
def test_only_full_remat_makes_gate_and_up_apart_from_the_output(remat: Remat) -> None:
    """Elsewhere the forward pass, which writes them, is not run again."""
    said = []

    def routed(*args, recomputed: bool, **options):
        said.append(recomputed)
        return pallas_kernels.routed_swiglu(*args, recomputed=recomputed, **options)

    config, ops = tiny_with("ffn"), dataclasses.replace(REFERENCE, remat=remat, routed_swiglu=routed)
    jax.make_jaxpr(loss_of(config, ops))(*abstract(config))
    assert said and set(said) == {remat == "full"}


def test_the_program_does_not_grow_with_depth() -> None:
    def lines(layers: int) -> int:
        config = tiny_with("ffn+attention", num_layers=layers)
        run = jax.jit(jax.value_and_grad(loss_of(config, dataclasses.replace(REFERENCE, remat="full"))))
        return run.lower(*abstract(config)).as_text().count("\n")

    assert lines(2) == lines(8)


def test_an_unknown_remat_policy() -> None:
    with pytest.raises(Exception, match="remat"):
        Ops(remat="some")


# ---- head


@pytest.mark.parametrize("tied", [False, True])
def test_head(tied: bool) -> None:
    config = tiny_with(tie_embeddings=tied)
    graphdef, params = abstract_model(config)[0], random_params(config)
    assert ("head" in params["decoder"]) != tied
    h = np.random.default_rng(0).normal(size=(2, 3, 64)).astype(np.float32)
    got = np.asarray(quick_jit(lambda params, h: nnx.merge(graphdef, params).logits(h, REFERENCE))(params, h))
    kernel = params["decoder"]["embedding"].T if tied else params["decoder"]["head"]
    assert got.shape == (2, 3, 384) and got.dtype == np.float32
    np.testing.assert_allclose(got[..., :300], (h @ kernel)[..., :300], atol=1e-4)
    assert (got[..., 300:] == np.float32(-1e30)).all(), "ids that do not exist never win"


def test_logits_are_float32_in_bfloat16() -> None:
    config = tiny_with("ffn+attention")
    params, batch = random_params(config), pack(config, [[sample(config, 9, 1, 0)]], slots=10, tiles=1)
    low = logits(config, params, batch, dataclasses.replace(REFERENCE, dtype=jnp.bfloat16))
    high = logits(config, params, batch)
    assert low.dtype == np.float32 and not np.array_equal(low, low.astype(jnp.bfloat16).astype(np.float32))
    assert np.abs(low - high)[:, :9].max() < 0.3 and np.corrcoef(low[0, :9].ravel(), high[0, :9].ravel())[0, 1] > 0.99


# ---- experts


@pytest.mark.parametrize("output", [True, False])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("experts", EXPERTS)
def test_leaves(experts: str, bias: bool, output: bool) -> None:
    params = abstract_model(tiny_with(experts, attention_bias=bias, attention_expert_output=output))[1]["decoder"]["blocks"]
    assert set(params["mlp"]) == ({"text"} if experts == "none" else {"text", "visual"})
    full = {"qkv", "out"} | ({"qkv_bias", "out_bias"} if bias else set())
    assert set(params["attention"]["text"]) == full
    if experts == "ffn+attention":
        assert set(params["attention"]["visual"]) == (full if output else full - {"out", "out_bias"})
    else:
        assert "visual" not in params["attention"]
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(params)), "every leaf has a layer axis"


@pytest.mark.parametrize(("experts", "output"), [("ffn", True), ("ffn+attention", True), ("ffn+attention", False)])
def test_each_token_type_has_its_own_weights(experts: str, output: bool) -> None:
    """All tokens of one type give what a model without experts gives with that expert's weights."""
    config = tiny_with(experts, attention_bias=True, attention_expert_output=output)
    plain = tiny_with("none", attention_bias=True)
    params, batch = random_params(config), pack(config, [[sample(config, 9, 0, 0)]], slots=10, tiles=1)
    for kind, expert in ((0, "text"), (1, "visual"), (2, "visual")):
        batch["token_types"] = np.where(batch["segment_ids"] > 0, kind, -1).astype(np.int8)
        blocks = dict(params["decoder"]["blocks"])
        for part in ("attention", "mlp"):
            blocks[part] = {"text": blocks[part]["text"] | blocks[part].get(expert, {})}
        alone = {**params, "decoder": {**params["decoder"], "blocks": blocks}}
        np.testing.assert_allclose(logits(config, params, batch)[:, :9], logits(plain, alone, batch)[:, :9], atol=2e-5)


def test_expert_of_type_decides_who_serves_queries() -> None:
    config = tiny_with("ffn")
    params, batch = random_params(config), pack(config, [[sample(config, 9, 0, 0)]], slots=10, tiles=1)
    as_text = logits(config, params, batch)
    batch["token_types"] = np.where(batch["segment_ids"] > 0, 2, -1).astype(np.int8)
    np.testing.assert_allclose(
        logits(dataclasses.replace(config, expert_of_type=(0, 1, 0)), params, batch)[:, :9], as_text[:, :9], atol=1e-6
    )
    assert np.abs(logits(config, params, batch) - as_text)[:, :9].max() > 0.1


def test_sorted_and_reference_layers_give_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    few_branches(monkeypatch, 3)
    config = tiny_with("ffn+attention", attention_bias=True)
    params, batch = random_params(config), pack(config, [[sample(config, 9, 1, 0), sample(config, 20, 3, 1)]], slots=31, tiles=4)
    np.testing.assert_allclose(logits(config, params, batch, SORTED), logits(config, params, batch), atol=2e-5)


def test_on_a_tpu_the_experts_are_pallas_kernels_unless_ops_says_otherwise() -> None:
    config = tiny_with("ffn+attention", hidden_size=128, intermediate_size=256)
    graphdef, params = abstract_model(config)
    batch = pack(config, [[sample(config, 70, 1, 0)]], slots=96, tiles=1)
    device = jax.sharding.AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")

    def kernels(ops: Ops) -> int:
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("chip",), abstract_device=device)):
            return str(jax.make_jaxpr(lambda p, batch: nnx.merge(graphdef, p)(batch, ops)[0])(params, batch)).count("pallas_call[")

    assert kernels(Ops()) == 9, "qkv, out and the FFN of the scanned layer, each between two that move rows"
    assert kernels(Ops(implementation="xla")) == 0
    assert kernels(dataclasses.replace(Ops(), implementation="reference")) == 0
