import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from monovl_jax.data.errors import SampleError
from monovl_jax.data.images import image_size, load_image, resolve_image_path
from monovl_jax.data.tiling import TilingConfig, choose_grid, count_tiles, normalize, tile_image, tiles_per_image
from tests.data.helpers import save_picture


@pytest.mark.parametrize(("side", "grid"), [(633, (1, 1)), (634, (2, 2)), (950, (2, 2)), (951, (3, 3))])
def test_square_pictures_change_grid_where_the_spec_says(side: int, grid: tuple[int, int]) -> None:
    assert choose_grid(side, side, 1, 12, 448) == grid


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 9), st.booleans(), st.booleans())
def test_the_count_from_the_size_is_the_number_of_tiles(width: int, height: int, limit: int, thumbnail: bool, dynamic: bool) -> None:
    config = TilingConfig(8, 1, limit, thumbnail, dynamic)
    picture = np.zeros((height, width, 3), np.uint8)
    tiles = tile_image(picture, config)
    assert tiles.shape == (count_tiles(width, height, config), 8, 8, 3) and tiles.dtype == np.uint8
    assert len(tiles) <= limit + 1


def test_tiles_go_row_by_row_and_the_thumbnail_is_last() -> None:
    picture = np.zeros((16, 24, 3), np.uint8)
    for row in range(2):
        for col in range(3):
            picture[8 * row : 8 * row + 8, 8 * col : 8 * col + 8] = 10 * row + col
    tiles = tile_image(picture, TilingConfig(8, 1, 6, True))
    assert tiles[:6, 0, 0, 0].tolist() == [0, 1, 2, 10, 11, 12] and len(tiles) == 7
    array_path = tile_image(picture, TilingConfig(8, 1, 6, False))
    assert np.array_equal(array_path, tile_image(Image.fromarray(picture), TilingConfig(8, 1, 6, False)))


def test_several_pictures_share_the_limit() -> None:
    config = TilingConfig(448, 1, 6, False)
    assert tiles_per_image([(1344, 448)] * 2, config) == [3, 3]
    assert tiles_per_image([(1344, 448)] * 9, config) == [1] * 9
    assert TilingConfig(448, 4, 6).for_images(3).min_tiles == 2


def test_padding_uses_the_mean_colour() -> None:
    config = TilingConfig(8, dynamic=False, pad2square=True, normalization="siglip")
    tile = tile_image(np.zeros((8, 4, 3), np.uint8), config)[0]
    assert tile[0, 0].tolist() == [127] * 3 and tile[4, 4].tolist() == [0] * 3


@pytest.mark.parametrize("options", [dict(min_tiles=0), dict(min_tiles=5, max_tiles=4), dict(normalization="none"), dict(tile_size=0)])
def test_impossible_configs(options: dict) -> None:
    with pytest.raises(ValueError, match=r"min_tiles|normalization|tile_size"):
        TilingConfig(**options)
    with pytest.raises(ValueError, match="unknown"):
        normalize(np.zeros((1, 2, 2, 3), np.uint8), "none")


def test_one_pixel_and_every_mode(tmp_path) -> None:
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"):
        path = tmp_path / f"{mode.replace(';', '')}.tif"
        Image.new(mode, (1, 1)).save(path)
        assert image_size(path) == (1, 1) and load_image(path).mode == "RGB"
        assert tile_image(load_image(path), TilingConfig(8)).shape == (1, 8, 8, 3)


def test_broken_pictures_name_the_file(tmp_path) -> None:
    save_picture(tmp_path / "cut.jpg", (64, 64), cut=0.5)
    assert image_size(tmp_path / "cut.jpg") == (64, 64)
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    save_picture(tmp_path / "head.png", cut=0.02)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    Image.new("1", (20_000, 2)).save(tmp_path / "wide.png")
    cases = {
        "cut.jpg": "truncated",
        "empty.png": "is empty",
        "text.png": "no format",
        "head.png": "no format",
        "huge.png": "limit",
        "no.png": "not exist",
    }
    for name, message in cases.items():
        with pytest.raises(SampleError, match=message) as caught:
            load_image(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(SampleError, match="is a folder"):
        image_size(tmp_path)
    assert count_tiles(*image_size(tmp_path / "wide.png"), TilingConfig()) == 13
    with pytest.raises(SampleError, match="39,999"):
        image_size(tmp_path / "wide.png", max_pixels=39_999)


def test_paths_stay_under_the_root(tmp_path) -> None:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (tmp_path / "secret.png").touch()
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "inner.png").symlink_to(root / "a")
    assert resolve_image_path(root, "a/b.png") == (root / "a" / "b.png").resolve()
    assert resolve_image_path(root, "inner.png")
    for name in ("../secret.png", "a/../../secret.png", "/etc/passwd", "link.png", "", "a\0b", "C:\\x.png", "a\\..\\..\\x", "~/x.png"):
        with pytest.raises(SampleError, match="image path"):
            resolve_image_path(root, name)
