"""The visual tokenizer against loops and index formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monovl_jax.config import VisionConfig
from monovl_jax.model.patch_embed import PIXEL_STATISTICS, PatchEmbed, bicubic_matrix, normalize_pixels, pixel_shuffle, resize_positions
from tests.quick import quick_jit

CONFIG = VisionConfig(hidden_size=5, patch_size=4, tile_size=16, position_image_size=16)


def tiles(n: int = 2, side: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def embed(config: VisionConfig, x: np.ndarray, dtype=jnp.float32) -> np.ndarray:
    def run(x):
        return PatchEmbed(config, nnx.Rngs(0))(x, dtype)

    return np.asarray(quick_jit(run)(x), np.float32)


# ---- pixel shuffle


@pytest.mark.parametrize("r", [1, 2, 4])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_pixel_shuffle_by_index(version: str, r: int) -> None:
    """Channel (r * dr + dc) * C + c of merged patch (R, Q) is channel c of patch (r R + dr, r Q + dc); v1 swaps R and Q afterwards."""
    x = np.arange(2 * 4 * 8 * 3, dtype=np.float32).reshape(2, 4, 8, 3)
    want = np.zeros((2, 4 // r, 8 // r, 3 * r * r), np.float32)
    for n, row, col, dr, dc, c in np.ndindex(2, 4 // r, 8 // r, r, r, 3):
        want[n, row, col, (r * dr + dc) * 3 + c] = x[n, r * row + dr, r * col + dc, c]
    np.testing.assert_array_equal(pixel_shuffle(jnp.asarray(x), r, version), want if version == "v2" else want.transpose(0, 2, 1, 3))


def upstream_pixel_shuffle(x: np.ndarray, ratio: float, version: str) -> np.ndarray:
    """Upstream's views and permutations, line by line (modeling_internvl_chat.py:284-298)."""
    n, w, h, c = x.shape
    x = x.reshape(n, w, int(h * ratio), int(c / ratio)).transpose(0, 2, 1, 3)
    x = x.reshape(n, int(h * ratio), int(w * ratio), int(c / ratio**2))
    return x if version == "v1" else x.transpose(0, 2, 1, 3)


@pytest.mark.parametrize("r", [1, 2, 4])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_pixel_shuffle_is_upstreams(version: str, r: int) -> None:
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    np.testing.assert_array_equal(pixel_shuffle(jnp.asarray(x), r, version), upstream_pixel_shuffle(x, 1 / r, version))


# ---- positions


@pytest.mark.parametrize(("old", "new"), [(1, 3), (2, 5), (4, 8), (8, 4), (7, 7), (32, 24)])
def test_bicubic_rows_sum_to_one(old: int, new: int) -> None:
    matrix = bicubic_matrix(old, new)
    assert matrix.shape == (new, old) and matrix.dtype == np.float32
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-6, err_msg="left and right are treated alike")


def test_bicubic_known_values() -> None:
    np.testing.assert_array_equal(bicubic_matrix(6, 6), np.eye(6))
    doubled = bicubic_matrix(4, 8)
    taps = np.float32([-0.03515625, 0.26171875, 0.87890625, -0.10546875])  # the cubic with a = -0.75 at 1.75, 0.75, 0.25, 1.25
    np.testing.assert_allclose(doubled[4], [taps[0], taps[1], taps[2], taps[3]])
    np.testing.assert_allclose(doubled[2], [taps[0] + taps[1], taps[2], taps[3], 0], err_msg="the tap outside moves to the border")
    np.testing.assert_allclose(doubled[0], [taps[:3].sum(), taps[3], 0, 0], err_msg="at -0.25: three taps fall on the first value")
    halved = bicubic_matrix(8, 4)  # no anti-aliasing: only the four values around a centre
    np.testing.assert_allclose(halved[1, 1:5], [-0.09375, 0.59375, 0.59375, -0.09375])
    assert np.count_nonzero(halved[1]) == 4


def test_resizing_treats_rows_and_columns_alike() -> None:
    table = np.random.default_rng(0).normal(size=(4, 4, 3)).astype(np.float32)
    m = bicubic_matrix(4, 6).astype(np.float64)
    want = np.stack([m @ table[..., c] @ m.T for c in range(3)], -1)
    np.testing.assert_allclose(resize_positions(jnp.asarray(table.reshape(16, 3)), 4, 6), want.reshape(36, 3), atol=1e-5)
    same = jnp.asarray(table.reshape(16, 3))
    assert resize_positions(same, 4, 4) is same
    assert resize_positions(same.astype(jnp.bfloat16), 4, 6).dtype == jnp.bfloat16


# ---- pixels


@pytest.mark.parametrize("statistics", PIXEL_STATISTICS)
def test_normalisation(statistics: str) -> None:
    pixels = tiles()
    mean, std = (np.array(v) for v in PIXEL_STATISTICS[statistics])
    np.testing.assert_allclose(normalize_pixels(jnp.asarray(pixels), statistics), (pixels / 255 - mean) / std, atol=2e-6)
    floats = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 2, 3)), jnp.float32)
    np.testing.assert_array_equal(normalize_pixels(floats, statistics), floats)


def test_bytes_and_normalised_floats_are_the_same_picture() -> None:
    pixels = tiles()
    floats = np.asarray(normalize_pixels(jnp.asarray(pixels), CONFIG.pixel_statistics))
    np.testing.assert_allclose(embed(CONFIG, pixels), embed(CONFIG, floats), atol=1e-6)


# ---- the whole


@pytest.mark.parametrize(("version", "side"), [("v2", 16), ("v2", 24), ("v1", 18)])
def test_patch_by_patch(version: str, side: int) -> None:
    """A linear map of every patch, plus its position, then the shuffle; pixels beyond the last whole patch are cut (18 = 4 * 4 + 2)."""
    config = dataclasses.replace(CONFIG, pixel_shuffle=version)
    x = np.random.default_rng(1).normal(size=(2, side, side, 3)).astype(np.float32)
    module = PatchEmbed(config, nnx.Rngs(0))
    module.bias[...] = jnp.arange(5.0)
    kernel, bias, table = (np.asarray(p[...], np.float64) for p in (module.kernel, module.bias, module.position_embedding))
    grid = side // 4
    m = bicubic_matrix(4, grid).astype(np.float64)
    positions = np.einsum("ac,bd,cde->abe", m, m, table.reshape(4, 4, 5))
    want = np.zeros((2, grid, grid, 5))
    for n, i, j in np.ndindex(2, grid, grid):
        want[n, i, j] = np.einsum("hwc,hwcd->d", x[n, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4], kernel) + bias + positions[i, j]
    want = upstream_pixel_shuffle(want, 0.5, version).reshape(2, -1, 20)
    got = quick_jit(lambda x: module(x, jnp.float32))(x)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_the_compute_dtype_is_the_result() -> None:
    got = jax.eval_shape(lambda x: PatchEmbed(CONFIG, nnx.Rngs(0))(x, jnp.bfloat16), tiles())
    assert got.dtype == jnp.bfloat16 and got.shape == (2, CONFIG.tokens_per_tile, 5 * 4)
    np.testing.assert_allclose(embed(CONFIG, tiles(), jnp.bfloat16), embed(CONFIG, tiles()), atol=0.1)


def test_stored_arrays_take_no_part() -> None:
    module = PatchEmbed(CONFIG, nnx.Rngs(0))
    names = {path[0] for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param))}
    assert names == {"kernel", "bias", "position_embedding"}


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 16, 12, 3), r"\(1, 16, 12, 3\); they must be square"), ((1, 20, 20, 3), "20 px have 5 patches a side, no multiple")],
)
def test_errors(shape: tuple[int, ...], message: str) -> None:
    module = PatchEmbed(CONFIG, nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        module(jnp.zeros(shape, jnp.uint8), jnp.float32)
