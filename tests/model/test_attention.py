"""Attention over packed rows against a loop over queries."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monovl_jax.model.attention import attention, by_head, cached_attention, packed_causal_attention, splash_attention, splash_blocks
from tests.quick import quick_jit

attend, cached = quick_jit(packed_causal_attention), quick_jit(cached_attention)
KV, GROUP, WIDTH = 2, 3, 4


def qkv(b: int, t: int, seed: int = 0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=s).astype(dtype) for s in ((b, t, KV, GROUP, WIDTH), (b, t, KV, WIDTH), (b, t, KV, WIDTH))]


def by_loops(q, k, v, segments) -> np.ndarray:
    """Each query by itself, in float64; nan for padding."""
    out = np.full(q.shape, np.nan)
    for b, t, h, g in np.ndindex(*q.shape[:4]):
        keys = [s for s in range(t + 1) if segments[b, s] == segments[b, t] > 0]
        if keys:
            scores = k[b, keys, h].astype(np.float64) @ q[b, t, h, g] / WIDTH**0.5
            weights = np.exp(scores - scores.max())
            out[b, t, h, g] = weights / weights.sum() @ v[b, keys, h]
    return out


SEGMENTS = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1]], np.int32)


def test_against_loops() -> None:
    q, k, v = qkv(2, 8)
    got, want = np.asarray(attend(q, k, v, SEGMENTS)), by_loops(q, k, v, SEGMENTS)
    valid = SEGMENTS > 0
    np.testing.assert_allclose(got[valid], want[valid], atol=1e-5)
    assert np.isfinite(got).all(), "padding rows hold finite values"


@pytest.mark.parametrize("t", [64, 65, 150])
def test_more_queries_than_fit_one_piece(t: int) -> None:
    q, k, v = qkv(1, t)
    segments = np.where(np.arange(t) < 100, 1, 2)[None].astype(np.int32)
    np.testing.assert_allclose(attend(q, k, v, segments), by_loops(q, k, v, segments), atol=1e-5)


def test_packed_samples_equal_separate_runs() -> None:
    q, k, v = qkv(1, 8)
    packed = np.asarray(attend(q, k, v, SEGMENTS[:1]))
    for a, b in ((0, 3), (3, 5)):
        ones = np.ones((1, b - a), np.int32)
        alone = attend(q[:, a:b], k[:, a:b], v[:, a:b], ones)
        np.testing.assert_allclose(packed[:, a:b], alone, atol=1e-6)


def test_a_segment_number_may_come_again_only_in_its_own_row() -> None:
    q, k, v = qkv(2, 8)
    both = np.asarray(attend(q, k, v, SEGMENTS))
    k[1], v[1] = 7, 7
    np.testing.assert_array_equal(attend(q, k, v, SEGMENTS)[0], both[0])


@pytest.mark.parametrize("start", [0, 3, 6])
def test_later_queries_against_earlier_keys(start: int) -> None:
    """Decode: queries from slot `start` on against all keys, of which the later ones are not there yet."""
    q, k, v = qkv(2, 8)
    whole = np.asarray(attend(q, k, v, SEGMENTS))
    kv_segments = np.where(np.arange(8) < start + 2, SEGMENTS, 0)
    keys, values = (np.asarray(by_head(jnp.asarray(a))) for a in (k, v))
    own = SEGMENTS[:, start : start + 2]
    part = np.asarray(cached(q[:, start : start + 2], keys, values, own, kv_segments, jnp.int32(start)))
    valid = SEGMENTS[:, start : start + 2] > 0
    np.testing.assert_allclose(part[valid], whole[:, start : start + 2][valid], atol=1e-6)


def test_gradients_are_finite_and_padding_gets_none() -> None:
    q, k, v = qkv(2, 8)
    valid = (SEGMENTS > 0)[..., None, None, None]

    def loss(q, k, v):
        return jnp.sum(jnp.where(valid, packed_causal_attention(q, k, v, jnp.asarray(SEGMENTS)), 0) ** 2)

    for gradient in quick_jit(jax.grad(loss, (0, 1, 2)))(q, k, v):
        assert np.isfinite(gradient).all() and not np.any(np.asarray(gradient)[SEGMENTS == 0])


def test_bfloat16_scores_in_float32() -> None:
    q, k, v = qkv(2, 8, dtype=jnp.bfloat16)
    got = attend(q, k, v, SEGMENTS)
    assert got.dtype == jnp.bfloat16
    want, valid = by_loops(*(np.asarray(a, np.float64) for a in (q, k, v)), SEGMENTS), SEGMENTS > 0
    np.testing.assert_allclose(np.asarray(got, np.float64)[valid], want[valid], atol=3e-2)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = qkv(2, 8)
    got = np.asarray(attend(q * 1e4, k * 1e4, v, SEGMENTS))
    assert np.isfinite(got).all()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "tokens"), [(64, 256), (128, 256), (128, 250), (128, 1100)])
def test_splash_equals_plain_attention(width: int, tokens: int) -> None:
    """The TPU's kernel, run by the interpreter: values and gradients, packed rows with padding, grouped heads, a row of no whole tiles."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, tokens, 2, *more, width)).astype(np.float32) for more in ((2,), (), ()))
    segments = np.where(np.arange(tokens) < 100, 1, np.where(np.arange(tokens) < 240, 2, 0))[None].astype(np.int32)
    valid = (segments > 0)[..., None, None, None]

    def run(f, q, k, v):
        return jnp.where(valid, f(q, k, v, jnp.asarray(segments)), 0)

    def loss(f, *qkv):
        out = run(f, *qkv)
        return jnp.sum(out**2), out

    def both(f):
        return quick_jit(jax.value_and_grad(partial(loss, f), (0, 1, 2), has_aux=True))(q, k, v)

    (_, got), got_grads = both(partial(splash_attention, interpret=True))
    (_, want), want_grads = both(packed_causal_attention)
    for a, b in zip((got, *got_grads), (want, *want_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_splash_works_on_blocks_as_large_as_divide_the_row() -> None:
    sizes = {t: splash_blocks(t) for t in (128, 384, 1280, 2048, 4096, 4608, 16384)}
    assert {t: (s.block_q, s.block_kv, s.block_kv_compute) for t, s in sizes.items()} == {
        128: (128, 128, 128),
        384: (384, 384, 384),
        1280: (640, 640, 128),
        2048: (1024, 1024, 512),
        4096: (1024, 1024, 512),
        4608: (768, 768, 384),
        16384: (1024, 1024, 512),
    }
    assert {t for t, s in sizes.items() if not s.use_fused_bwd_kernel} == {4608, 16384}
    assert all(s.has_backward_blocks for s in sizes.values())


def test_a_tpu_takes_splash_for_rows_of_at_least_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monovl_jax.model.attention.tpu_generation", lambda: "v6e")
    kernels = {}
    for t in (100, 128, 130):
        q, k, v = (jax.ShapeDtypeStruct((1, t, *shape), jnp.float32) for shape in ((2, 3, 128), (2, 128), (2, 128)))
        kernels[t] = str(jax.make_jaxpr(attention)(q, k, v, jax.ShapeDtypeStruct((1, t), jnp.int32))).count("pallas_call")
    assert kernels == {100: 0, 128: 1, 130: 1}
