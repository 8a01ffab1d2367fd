"""Image files that were made to hang, to run programs or to fill the memory: each is one bad sample, refused at once."""

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from monovl_jax.data import images
from monovl_jax.data.errors import SampleError
from monovl_jax.data.images import image_size, load_image, read_image, resolve_image_path, to_rgb
from monovl_jax.data.jsonl import JsonlSource
from monovl_jax.data.pictures import RootError, open_pictures
from tests.data.helpers import line, tiny_encoding


def png(width: int, height: int) -> bytes:
    """A header of so many pixels, and hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def ico(inner: bytes) -> bytes:
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22) + inner


def icns(inner: bytes) -> bytes:
    entry = b"ic07" + struct.pack(">I", len(inner) + 8) + inner
    return b"icns" + struct.pack(">I", len(entry) + 8) + entry


def many_scans() -> bytes:
    """A progressive JPEG whose last scan comes 1,000 times."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(stream, "JPEG", progressive=True)
    data = stream.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * 1000 + data[-2:]


def run_length_coded() -> bytes:
    """A BMP of 8 bits, all rows ended at once: Pillow fills each in a Python loop."""
    head = struct.pack("<IiiHHIIiiII", 40, 60_000, 1_000, 1, 8, 1, 2000, 0, 0, 256, 0)
    body = b"\0\0" * 1_000 + b"\0\1"
    return b"BM" + struct.pack("<IHHI", 14 + 40 + 1024 + len(body), 0, 0, 14 + 40 + 1024) + head + bytes(1024) + body


DDS = (
    b"DDS "
    + struct.pack("<7I", 124, 0x1007, 16, 16, 0, 0, 0)
    + bytes(44)
    + struct.pack("<II4s5I", 32, 4, b"ZZZZ", 0, 0, 0, 0, 0)
    + bytes(60)
)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
HOSTILE = {
    "a tall image": (png(1, 89_478_485), "limit of a side"),
    "a wide image": (png(89_478_485, 1), "limit of a side"),
    "an icon with a large image inside": (ico(png(89_478_485, 1)), "no format that is read"),
    "a macOS icon with one": (icns(png(1, 89_478_485)), "no format that is read"),
    "a DDS of an unknown kind": (DDS, "no format that is read"),
    "an EPS": (EPS, "no format that is read"),
    "a BMP that is decoded in Python": (run_length_coded(), "run-length coded"),
    "an empty TIFF": (b"II*\0" + struct.pack("<I", 8) + b"\0\0", "cannot be opened|no format"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_refused_by_the_header(case: str, tmp_path: Path) -> None:
    data, message = HOSTILE[case]
    (tmp_path / "a.png").write_bytes(data)
    for read in (image_size, load_image):
        with pytest.raises(SampleError, match=message):
            read(tmp_path / "a.png")
        with pytest.raises(SampleError, match=message):
            read("a.png", data=data)


def test_an_eps_never_starts_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "a.png").write_bytes(EPS)
    with pytest.raises(SampleError, match="no format that is read"):
        load_image(tmp_path / "a.png")
    assert not (tmp_path / "ran").exists()


def test_a_jpeg_of_a_thousand_scans() -> None:
    data = many_scans()
    assert image_size("a.jpg", data=data) == (32, 32)
    with pytest.raises(SampleError, match="more than 32 scans"):
        load_image("a.jpg", data=data)
    assert images._scans(data) == images.MAX_SCANS + 1


def test_what_looks_like_scans_outside_of_them_does_not_count() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (10, 200, 30)).save(stream, "JPEG", comment=b"\xff\xda" * 100)
    assert load_image("a.jpg", data=stream.getvalue() + b"\xff\xda" * 100).size == (8, 8)


def make_socket(path: Path) -> None:
    server = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket may not be long
    try:
        server.bind(path.name)
    finally:
        os.chdir(here)
        server.close()


SPECIAL: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "terminal": lambda path: path.symlink_to("/dev/tty"),
    "socket": make_socket,
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_only_regular_files_are_opened(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    SPECIAL[kind](path)
    for read in (image_size, load_image, read_image):
        with pytest.raises(SampleError, match=r"no regular file|does not exist"):
            read(path)


@pytest.mark.parametrize("error", [MemoryError, NotImplementedError, RecursionError, struct.error, ZeroDivisionError, AssertionError])
def test_every_error_of_a_decoder_is_a_bad_sample(error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    def fail(*_: object, **__: object) -> None:
        raise error("broken")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(SampleError, match="does not decode"):
        load_image(tmp_path / "a.png")
    monkeypatch.setattr("PIL.Image.open", fail)
    (tmp_path / "d.jsonl").write_bytes(line("a.png") + line(None, question="what?"))
    source = JsonlSource(tmp_path / "d.jsonl", tiny_encoding())
    assert len(source) == 1 and "cannot be opened" in source.index.bad[0][1]


def test_a_file_and_its_bytes_give_the_same_pixels(tmp_path: Path) -> None:
    """Of a TIFF whose last rows are in no strip, Pillow shows what follows in the file when it maps it, and black when it reads it."""
    path = tmp_path / "a.tif"
    Image.fromarray(np.arange(37 * 53, dtype=np.uint16).reshape(37, 53)).save(path)
    data = bytearray(path.read_bytes())
    tags, count = struct.unpack_from("<I", data, 4)[0], 0
    for number in range(struct.unpack_from("<H", data, tags)[0]):
        at = tags + 2 + 12 * number
        if struct.unpack_from("<H", data, at)[0] == 278:  # RowsPerStrip
            struct.pack_into("<HII", data, at + 2, 4, 1, 36)
            count += 1
    assert count == 1
    path.write_bytes(data)
    assert np.array_equal(np.asarray(load_image(path)), np.asarray(load_image(path, data=bytes(data))))


def test_sixteen_bits_and_floats_are_scaled(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65_535, 256).reshape(16, 16)  # steps of 257
    for name, mode in (("a.png", np.uint16), ("a.tif", np.uint16), ("b.tif", ">u2"), ("c.tif", np.int32)):
        Image.fromarray(ramp.astype(mode)).save(tmp_path / name)
        assert np.asarray(load_image(tmp_path / name))[..., 0].ravel().tolist() == list(range(256))
    Image.fromarray((ramp / 65_535).astype(np.float32)).save(tmp_path / "f.tif")
    assert np.asarray(load_image(tmp_path / "f.tif"))[..., 2].ravel().tolist() == list(range(256))
    assert to_rgb(Image.fromarray(np.array([[0, 128, 129, 65_535]], np.uint16))).getpixel((2, 0)) == (1, 1, 1)


@pytest.mark.parametrize("values", [np.float32([[0, 1.5]]), np.float32([[-1, 0]]), np.float32([[np.nan, 0]]), np.int32([[0, 65_536]])])
def test_values_of_no_known_range_are_refused(values: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(SampleError, match=r"a\.tif: its values go from"):
        load_image(tmp_path / "a.tif")


def test_a_name_with_half_a_character(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="surrogate"):
        resolve_image_path(tmp_path, "a\ud800.png")


def test_tar_roots(tmp_path: Path) -> None:
    """`**` in the name, and headers that announce a header a thousand times."""
    with pytest.raises(RootError):
        open_pictures(tmp_path / "x" / "**.tar")
    header = bytearray(512)
    header[:13], header[100:108], header[108:116], header[116:124] = b"././@LongLink", b"0000000\0", b"0000000\0", b"0000000\0"
    header[124:136], header[136:148], header[148:156], header[156:157] = b"00000000002\0", b"00000000000\0", b" " * 8, b"L"
    header[257:265] = b"ustar  \0"
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "chain.tar").write_bytes((bytes(header) + b"a\0".ljust(512, b"\0")) * 5_000)
    with pytest.raises(RootError, match=r"chain\.tar"):
        open_pictures(tmp_path / "**.tar")


def test_a_flipped_bit_of_a_png_is_found(tmp_path: Path) -> None:
    """Also where the compressed pixels still decode."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(stream, "PNG", compress_level=0)
    whole = stream.getvalue()
    assert load_image("a.png", data=whole).size == (40, 40)
    for at in range(60, len(whole) - 20, 97):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        with pytest.raises(SampleError):
            load_image("a.png", data=bytes(damaged))
