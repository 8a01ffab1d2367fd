"""Where the pictures of a data set lie: files under a folder, or members of tar shards.

    root "pictures/"            cats/1.jpg is the file pictures/cats/1.jpg
    root "pictures.tar"         cats/1.jpg is the member of that name
    root "shards/*.tar"         the member of that name in one of the shards, whichever

A tar is never unpacked: its headers are read once, and then a picture is one read at its offset. Only ordinary members count; a name that
is a link, a device or a sparse file is refused, and so is one with `..` or from the root, whoever wrote the archive.
"""

from __future__ import annotations

import fnmatch
import os
import tarfile
from pathlib import Path

from PIL import Image

from monovl_jax.data.errors import SampleError
from monovl_jax.data.images import MAX_FILE_BYTES, check_image_name, image_size, load_image, read_image, resolve_image_path

_REFUSED = -1


class RootError(ValueError):
    """Pictures that cannot be reached as a whole: no folder, no shard, a damaged or a compressed one. The message names it and the mend."""


class Pictures:
    """Reads pictures by their names in a data set. Every method raises SampleError for a name or a picture that will not do."""

    def where(self, name: str) -> str:
        """What messages call the picture."""
        raise SampleError(f"picture {name!r} is nowhere; give a folder or tar shards.")

    def read(self, name: str) -> bytes:
        """The picture's file as it is."""
        raise SampleError(f"picture {name!r} is nowhere; give a folder or tar shards.")

    def size(self, name: str, max_pixels: int) -> tuple[int, int]:
        """(width, height) in pixels, from the header."""
        return image_size(self.where(name), max_pixels, self.read(name))

    def load(self, name: str, max_pixels: int) -> Image.Image:
        """The decoded picture in mode RGB."""
        return load_image(self.where(name), max_pixels, self.read(name))


class FolderPictures(Pictures):
    """Files under a folder. Raises RootError if it is none."""

    def __init__(self, root: Path) -> None:
        self.root = root
        if not root.is_dir():
            raise RootError(f"the image root {root} is not a folder; correct the path")

    def where(self, name: str) -> str:
        return str(resolve_image_path(self.root, name))

    def read(self, name: str) -> bytes:
        return read_image(self.where(name))

    def size(self, name: str, max_pixels: int) -> tuple[int, int]:
        return image_size(self.where(name), max_pixels)

    def load(self, name: str, max_pixels: int) -> Image.Image:
        return load_image(self.where(name), max_pixels)


class TarPictures(Pictures):
    """Members of tar shards. Raises RootError for a shard that is missing, cut off, compressed or no tar, and a name in two shards."""

    def __init__(self, root: Path) -> None:
        self.root, self.shards = root, tar_shards(root)
        if not self.shards:
            raise RootError(f"the image root {root} names no tar file; correct the path")
        self._members: dict[str, tuple[int, int, int]] = {}  # shard, offset, bytes
        for number, shard in enumerate(self.shards):
            for name, place in _members(shard, number).items():
                if name in self._members:
                    other = self.shards[self._members[name][0]]
                    raise RootError(f"the picture {name!r} is in {other} and in {shard}; keep one of the two")
                self._members[name] = place

    def where(self, name: str) -> str:
        name = check_image_name(self.root, name)
        found = self._members.get(name)
        return f"{self.root if found is None else self.shards[found[0]]}:{name}"

    def read(self, name: str) -> bytes:
        where = self.where(name)
        found = self._members.get(check_image_name(self.root, name))
        if found is None:
            raise SampleError(f"image {where} does not exist; correct the path or the tar shards.")
        shard, offset, size = found
        if size == _REFUSED:
            raise SampleError(f"image {where} is a link or a special file of the archive; pack the picture itself.")
        if size > MAX_FILE_BYTES:
            raise SampleError(f"image {where} is a file of more than {MAX_FILE_BYTES:,} bytes; shrink it.")
        try:
            file = os.open(self.shards[shard], os.O_RDONLY)
            try:
                data = os.pread(file, size, offset)
            finally:
                os.close(file)
        except OSError as error:
            raise SampleError(f"image {where} cannot be read ({type(error).__name__}: {error}); copy the shard again.") from None
        if len(data) != size:
            raise SampleError(f"image {where} has {len(data)} of {size} bytes; the shard changed meanwhile, start again.")
        return data


def is_tar_root(root: Path) -> bool:
    """Whether a root names tar shards and not a folder."""
    return root.name.endswith(".tar") and not root.is_dir()


def tar_shards(root: Path) -> list[Path]:
    """The tar files that a root names, by name; `*` stands in its last part."""
    try:
        return sorted(path for path in root.parent.iterdir() if fnmatch.fnmatchcase(path.name, root.name) and path.is_file())
    except OSError:
        return []


def open_pictures(root: Path) -> Pictures:
    """The pictures under a root. Raises RootError."""
    return TarPictures(root) if is_tar_root(root) else FolderPictures(root)


def _members(shard: Path, number: int) -> dict[str, tuple[int, int, int]]:
    found: dict[str, tuple[int, int, int]] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                archive.members = []  # pyright: ignore[reportAttributeAccessIssue]  (or it keeps every header it has seen)
                plain = member.isreg() and not member.issparse()
                if not member.isdir():
                    found[member.name.removeprefix("./")] = number, member.offset_data, member.size if plain else _REFUSED
            end = archive.offset
        with open(shard, "rb") as stream:
            stream.seek(end)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes anything that is no header for the end
                raise RootError(f"{shard} is damaged or cut off at byte {end:,}; copy it again")
    except RootError:
        raise
    except OSError as error:
        raise RootError(f"{shard} cannot be read ({type(error).__name__}: {error}); copy it again") from None
    except RecursionError:
        raise RootError(f"{shard} has long chains of headers that lead to no member; make it again with `tar -cf`") from None
    except Exception as error:  # TarError, and nearly anything else on damaged headers
        raise RootError(f"{shard} is no whole, uncompressed tar file ({error}); make it again with `tar -cf`") from None
    return found
