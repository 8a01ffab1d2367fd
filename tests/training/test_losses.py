"""The chunked loss against all logits at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monovl_jax.training import losses
from monovl_jax.training.losses import weighted_nll
from tests.quick import quick_jit

N, D, V, PADDED = 37, 6, 50, 64


def naive(h, head, targets, weights, vocab_size):
    logits = jnp.matmul(h, head.astype(h.dtype), preferred_element_type=jnp.float32)[:, :vocab_size]
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], 1)[:, 0]
    return jnp.sum(jnp.where(weights != 0, weights * nll, 0))


def both(dtype=np.float32, scale: float = 1.0):
    """(h, head, targets, weights) -> (value, (dh, dhead)), ours and naive; the loss goes on into something, as in a mean."""
    return [quick_jit(jax.value_and_grad(lambda h, head, t, w, f=f: scale * f(h, head, t, w, V), (0, 1))) for f in (weighted_nll, naive)]


OURS, NAIVE = both(scale=0.25)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 8 rows, so that 37 rows are several and the last is not full."""
    monkeypatch.setattr(losses, "chunk_rows", lambda rows, vocab, kind: min(rows, 8))


def inputs(seed: int = 0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    h, head = rng.normal(size=(N, D)).astype(dtype), rng.normal(size=(D, PADDED)).astype(np.float32)
    return h, head, rng.integers(0, V, N).astype(np.int32), rng.uniform(0.1, 2, N).astype(np.float32)


def masked(weights: np.ndarray, which: str) -> np.ndarray:
    keep = {
        "all": np.ones(N, bool),
        "none": np.zeros(N, bool),
        "some": np.random.default_rng(1).random(N) < 0.4,
        "two chunks exactly": (np.arange(N) % 2 == 0) & (np.arange(N) < 32),
        "first": np.arange(N) == 0,
        "last": np.arange(N) == N - 1,
    }[which]
    return np.where(keep, weights, 0).astype(np.float32)


@pytest.mark.parametrize("which", ["all", "none", "some", "two chunks exactly", "first", "last"])
def test_value_and_gradients(which: str) -> None:
    h, head, targets, weights = inputs()
    weights = masked(weights, which)
    (value, (dh, dhead)), (want, (want_dh, want_dhead)) = OURS(h, head, targets, weights), NAIVE(h, head, targets, weights)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(dh, want_dh, atol=1e-5)
    np.testing.assert_allclose(dhead, want_dhead, atol=1e-5)
    assert value.dtype == jnp.float32
    assert not np.any(np.asarray(dh)[weights == 0]) and not np.any(np.asarray(dhead)[:, V:])
    assert (which == "none") == (float(value) == 0)


def test_negative_weights_count() -> None:
    h, head, targets, weights = inputs()
    weights[::3] *= -1
    np.testing.assert_allclose(OURS(h, head, targets, weights)[0], NAIVE(h, head, targets, weights)[0], rtol=1e-5)
    np.testing.assert_allclose(OURS(h, head, targets, weights)[1][0], NAIVE(h, head, targets, weights)[1][0], atol=1e-5)


def test_padding_columns_take_no_part() -> None:
    h, head, targets, weights = inputs()
    value, (dh, _) = OURS(h, head, targets, weights)
    head[:, V:] = 1e6
    again, (dh_again, dhead) = OURS(h, head, targets, weights)
    np.testing.assert_array_equal(again, value)
    np.testing.assert_allclose(dh_again, dh, atol=1e-6)
    assert not np.any(np.asarray(dhead)[:, V:])


def test_rows_without_weight_may_hold_anything() -> None:
    h, head, targets, weights = inputs()
    weights = masked(weights, "some")
    clean = OURS(h, head, targets, weights)
    off = weights == 0
    h[off], targets[off] = np.nan, -100
    jax.tree.map(np.testing.assert_array_equal, OURS(h, head, targets, weights), clean)


def test_large_logits_do_not_overflow() -> None:
    h, head, targets, weights = inputs()
    value, gradients = OURS(h * 1e3, head, targets, weights)
    np.testing.assert_allclose(value, NAIVE(h * 1e3, head, targets, weights)[0], rtol=1e-5)
    assert all(np.isfinite(g).all() for g in gradients)


def test_bfloat16() -> None:
    """Activations in bfloat16, the head in float32: logits and sums are float32, each gradient has the dtype of its argument."""
    h, head, targets, weights = inputs(dtype=jnp.bfloat16)
    weights = masked(weights, "some")
    (value, (dh, dhead)), (want, (want_dh, want_dhead)) = OURS(h, head, targets, weights), NAIVE(h, head, targets, weights)
    assert (value.dtype, dh.dtype, dhead.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(value, want, rtol=1e-3)
    for got, expected in ((dh, want_dh), (dhead, want_dhead)):
        got, expected = np.asarray(got, np.float32), np.asarray(expected, np.float32)
        np.testing.assert_allclose(got, expected, atol=2e-2 * np.abs(expected).max())


def test_chunks_of_its_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real chunk rule: no more rows than there are; on a CPU at most 512 and at least 128."""
    monkeypatch.undo()
    assert losses.chunk_rows(37, PADDED, "cpu") == losses.chunk_rows(37, PADDED, "TPU v5 lite") == 37
    assert losses.chunk_rows(10_000, PADDED, "cpu") == 512
    assert losses.chunk_rows(10_000, 92_672, "cpu") == 181
    assert losses.chunk_rows(10_000, 2**24, "cpu") == 128
    h, head, targets, weights = inputs()
    run = quick_jit(lambda *a: weighted_nll(*a, V))
    np.testing.assert_allclose(run(h, head, targets, weights), 4 * NAIVE(h, head, targets, weights)[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "peak", "bandwidth"), [("TPU v5 lite", 197e12, 819e9), ("TPU v5", 459e12, 2765e9), ("TPU v6 lite", 918e12, 1640e9)]
)
def test_a_chunk_on_an_accelerator_is_bound_by_arithmetic(
    monkeypatch: pytest.MonkeyPatch, kind: str, peak: float, bandwidth: float
) -> None:
    """6 FLOPs a row for each element of the head take longer than its 12 bytes."""
    monkeypatch.undo()
    rows = losses.chunk_rows(10_000, 92_672, kind)
    assert 6 * rows / peak > 12 / bandwidth


def test_the_chunk_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(losses, "device_kind", lambda: "TPU v5 lite")
    h, head, targets, weights = (
        jax.ShapeDtypeStruct((4096, *shape), dtype) for shape, dtype in [((6,), "f4"), ((), "f4"), ((), "i4"), ((), "f4")]
    )
    head = jax.ShapeDtypeStruct((6, 92_672), "f4")
    assert "f32[1024,92672]" in str(jax.make_jaxpr(lambda *a: weighted_nll(*a, V))(h, head, targets, weights))


def test_a_frozen_head_costs_no_gradient() -> None:
    """With chunks in a loop, the head's gradient is a [D, V] carry: it must be gone when only h is differentiated."""

    def matmuls(argnums) -> int:
        f = quick_jit(jax.grad(lambda h, head, t, w: weighted_nll(h, head, t, w, V), argnums))
        return f.lower(*inputs()).compile().as_text().count(" dot(")

    assert matmuls((0, 1)) - matmuls((0,)) == 1
