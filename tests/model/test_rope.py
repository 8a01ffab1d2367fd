"""Rotary embedding against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monovl_jax.config import RopeConfig
from monovl_jax.model.rope import apply_rope, rope_table

MAX = 16


def table(positions: np.ndarray, rope: RopeConfig, key_length: int, head_dim: int = 8):
    return [np.asarray(a) for a in rope_table(jnp.asarray(positions, jnp.float32), head_dim, rope, MAX, key_length)]


def expected(positions: np.ndarray, base: float, head_dim: int = 8):
    angles = positions[..., None] * base ** -(np.arange(0, head_dim, 2) / head_dim)
    return np.cos(angles), np.sin(angles)


POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 0, 0.5, 1.25, 37]], np.float64)


@pytest.mark.parametrize("length", [1, MAX, 500])
def test_plain_depends_on_positions_alone(length: int) -> None:
    for got, want in zip(table(POSITIONS, RopeConfig(theta=10_000.0), length), expected(POSITIONS, 10_000.0), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
        assert got.dtype == np.float32 and got.shape == (1, 10, 4)


def test_linear_divides_positions() -> None:
    got = table(POSITIONS, RopeConfig(theta=10_000.0, scaling="linear", factor=4.0), 500)
    np.testing.assert_allclose(got, expected(POSITIONS / 4, 10_000.0), atol=1e-5)


@pytest.mark.parametrize("length", [1, MAX - 1, MAX])
def test_dynamic_changes_nothing_up_to_the_trained_length(length: int) -> None:
    plain = table(POSITIONS, RopeConfig(theta=10_000.0), length)
    np.testing.assert_array_equal(table(POSITIONS, RopeConfig(theta=10_000.0, scaling="dynamic", factor=2.0), length), plain)


@pytest.mark.parametrize("length", [MAX + 1, 40, 4 * MAX])
def test_dynamic_raises_the_base_beyond_it(length: int) -> None:
    base = 10_000.0 * (2.0 * length / MAX - 1) ** (8 / 6)
    got = table(POSITIONS, RopeConfig(theta=10_000.0, scaling="dynamic", factor=2.0), length)
    np.testing.assert_allclose(got, expected(POSITIONS, base), atol=1e-5)


def test_a_traced_length_gives_the_same() -> None:
    rope, positions = RopeConfig(theta=10_000.0, scaling="dynamic", factor=2.0), jnp.asarray(POSITIONS, jnp.float32)
    run = jax.jit(lambda n: rope_table(positions, 8, rope, MAX, n))
    for length in (MAX, 40):
        np.testing.assert_allclose(run(length), table(POSITIONS, rope, length), atol=1e-6)


def test_large_positions_keep_their_last_digit() -> None:
    positions = np.array([[32_767.0, 100_003.0]])
    np.testing.assert_allclose(table(positions, RopeConfig(theta=1e6), 10), expected(positions, 1e6), atol=2e-2)
    neighbours = table(np.array([[2.0**24 - 1, 2.0**24 - 2]]), RopeConfig(theta=1e6), 10)
    assert np.abs(neighbours[0][0, 0, 0] - neighbours[0][0, 1, 0]) > 0.1


@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 3, 4, 8), (2, 3, 4, 5, 8)])
def test_rotates_halves(shape: tuple[int, ...]) -> None:
    """x * cos + rotate_half(x) * sin, with the table doubled, as upstream writes it."""
    rng = np.random.default_rng(0)
    x, positions = rng.normal(size=shape).astype(np.float32), rng.uniform(0, 20, (2, 3))
    cos, sin = (np.concatenate([a, a], -1).reshape(2, 3, *[1] * (len(shape) - 3), 8) for a in expected(positions, 100.0))
    half = np.concatenate([-x[..., 4:], x[..., :4]], -1)
    got = apply_rope(jnp.asarray(x), tuple(jnp.asarray(a, jnp.float32) for a in expected(positions, 100.0)))
    np.testing.assert_allclose(got, x * cos + half * sin, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)


def test_bfloat16_is_rotated_in_float32() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 10, 2, 8)), jnp.bfloat16)
    angles = tuple(jnp.asarray(a, jnp.float32) for a in expected(POSITIONS, 100.0))
    got = apply_rope(x, angles)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, apply_rope(x.astype(jnp.float32), angles).astype(jnp.bfloat16))
