"""Pictures in tar shards are those of the folder; an archive cannot reach beyond itself."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from monovl_jax.data.errors import SampleError
from monovl_jax.data.images import MAX_PIXELS
from monovl_jax.data.jsonl import JsonlSource
from monovl_jax.data.meta import MetaError, read_meta
from monovl_jax.data.pictures import FolderPictures, RootError, TarPictures, open_pictures
from monovl_jax.data.prepare import TextSettings, find_sets, prepare
from monovl_jax.data.sources import BadSamples
from tests.data.helpers import line, save_picture, tiny_encoding, tiny_tokenizer

NAMES = ("a.png", "sub/b.jpg", "sub/c.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """pictures/ with three pictures, shards/0.tar and 1.tar with the same, data.jsonl that names them."""
    for number, name in enumerate(NAMES):
        save_picture(tmp_path / "pictures" / name, (32, 16 * (number + 1)))
    pack(tmp_path / "shards" / "0.tar", tmp_path / "pictures", NAMES[:1])
    pack(tmp_path / "shards" / "1.tar", tmp_path / "pictures", NAMES[1:], prefix="./")
    (tmp_path / "data.jsonl").write_bytes(b"".join(line(name) for name in NAMES) + line("none.png"))
    return tmp_path


def pack(path: Path, pictures: Path, names: Sequence[str], prefix: str = "", mode: str = "w") -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, mode) as archive:  # pyright: ignore[reportArgumentType]
        for name in names:
            archive.add(pictures / name, prefix + name)


def member(archive: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, target: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, len(data)
    archive.addfile(info, io.BytesIO(data))


def test_the_same_bytes_from_folder_and_tar(root: Path) -> None:
    folder, tar = open_pictures(root / "pictures"), open_pictures(root / "shards" / "*.tar")
    assert isinstance(folder, FolderPictures) and isinstance(tar, TarPictures) and len(tar.shards) == 2
    for name in NAMES:
        assert folder.read(name) == tar.read(name) == tar.read(f"./{name}") and folder.size(name, MAX_PIXELS) == tar.size(name, MAX_PIXELS)
        assert np.array_equal(folder.load(name, MAX_PIXELS), tar.load(name, MAX_PIXELS))


def test_training_and_preparing_from_tar(root: Path) -> None:
    (root / "META.json").write_text(json.dumps({"data": {"annotation": "data.jsonl", "root": "shards/*.tar"}}))
    assert read_meta(root / "META.json")["data"].root == root / "shards" / "*.tar"
    bad = BadSamples(root / "bad.jsonl")
    direct = JsonlSource(root / "data.jsonl", tiny_encoding(), image_root=root / "pictures")
    packed = JsonlSource(root / "data.jsonl", tiny_encoding(), image_root=root / "shards" / "*.tar", bad=bad)
    assert len(direct) == len(packed) == 3 and "*.tar:none.png does not exist" in (root / "bad.jsonl").read_text()
    assert all(np.array_equal(direct[i].tiles, packed[i].tiles) for i in range(3))
    tiny_tokenizer().save(root / "model")
    settings = TextSettings(root / "model", "compact", tiny_encoding().tiling, 4)
    one, two = (
        prepare(find_sets(root / "data.jsonl", root / name), root / out, settings, say=lambda text: None)["data"]["shards"]
        for name, out in (("pictures", "from_folder"), ("shards/*.tar", "from_tar"))
    )
    assert one == two and one[0]["records"] == 3 and one[0]["rejected"] == 1


def test_members_that_lead_elsewhere(root: Path) -> None:
    shard = root / "hostile.tar"
    with tarfile.open(shard, "w") as archive:
        member(archive, "../../secret.png", b"x")
        member(archive, "/etc/passwd", b"x")
        member(archive, "soft.png", kind=tarfile.SYMTYPE, target="../secret.png")
        member(archive, "hard.png", kind=tarfile.LNKTYPE, target="/etc/passwd")
        member(archive, "pipe.png", kind=tarfile.FIFOTYPE)
        member(archive, "empty.png")
    pictures = open_pictures(shard)
    messages = {
        "../../secret.png": "contains '..' and may leave the image root",
        "/etc/passwd": "is absolute",
        "soft.png": r"hostile\.tar:soft\.png is a link or a special file of the archive; pack the picture itself",
        "hard.png": "is a link",
        "pipe.png": "is a link or a special file",
        "empty.png": r"is empty \(0 bytes\)",
        "absent.png": "does not exist",
    }
    for name, message in messages.items():
        with pytest.raises(SampleError, match=message):
            pictures.size(name, MAX_PIXELS)


def test_a_decompression_bomb(root: Path) -> None:
    """Few bytes, many pixels: refused by its header, in a tar as in a folder."""
    from PIL import Image

    stream = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(stream, "PNG")
    with tarfile.open(root / "bomb.tar", "w") as archive:
        member(archive, "huge.png", stream.getvalue())
    with pytest.raises(SampleError, match=r"bomb\.tar:huge\.png has more than 178 million pixels, the limit is 89,478,485"):
        open_pictures(root / "bomb.tar").load("huge.png", MAX_PIXELS)


def test_archives_that_cannot_be_used(root: Path) -> None:
    whole = (root / "shards" / "1.tar").read_bytes()
    filled = len(whole.rstrip(b"\0"))
    for cut in (300, 700, filled // 2, filled - 40, filled + 10):
        (root / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(RootError, match=r"cut\.tar is (no whole, uncompressed tar|damaged or cut off at byte)"):
            open_pictures(root / "cut.tar")
    for name in ("text.tar", "empty.tar"):
        (root / name).write_bytes(b"hello" if name[0] == "t" else b"")
        with pytest.raises(RootError, match="no whole, uncompressed tar file"):
            open_pictures(root / name)
    pack(root / "zipped.tar", root / "pictures", NAMES, mode="w:gz")
    with pytest.raises(RootError, match=r"zipped\.tar is no whole, uncompressed tar file"):
        open_pictures(root / "zipped.tar")
    pack(root / "shards" / "2.tar", root / "pictures", NAMES[:1])
    with pytest.raises(RootError, match=r"the picture 'a\.png' is in .*0\.tar and in .*2\.tar; keep one of the two"):
        open_pictures(root / "shards" / "*.tar")
    with pytest.raises(RootError, match="names no tar file"):
        open_pictures(root / "none*.tar")
    (root / "META.json").write_text(json.dumps({"data": {"annotation": "data.jsonl", "root": "none/*.tar"}}))
    with pytest.raises(MetaError, match="is not a folder, nor tar files that exist"):
        read_meta(root / "META.json")


def test_a_shard_that_changes_meanwhile(root: Path) -> None:
    pictures = open_pictures(root / "shards" / "1.tar")
    (root / "shards" / "1.tar").write_bytes(b"short")
    with pytest.raises(SampleError, match=r"has 0 of \d+ bytes; the shard changed meanwhile"):
        pictures.read("sub/c.png")
    (root / "shards" / "1.tar").unlink()
    with pytest.raises(SampleError, match=r"cannot be read \(FileNotFoundError"):
        pictures.read("sub/c.png")
