"""Reading the files of a recorded case that somebody else may have made: nothing outside the folder, nothing beyond a limit."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

import numpy as np

MAX_ARRAY_BYTES = 1 << 30
"""Most bytes of all arrays of one .npz file, unpacked."""

MAX_ARRAYS = 10_000


def case_file(folder: Path, name: str) -> Path:
    """The path of a file of the case. Raises ValueError if it leads out of the folder, or is a pipe, a device or a folder.

    A missing file is not an error here.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path} leads out of the folder of the case; copy the file into it")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file; record the case again")
    return path


def read_arrays(folder: Path, name: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz file of the case: whole numbers, floats and booleans, read-only, in this machine's byte order.

    Sizes are compared with the limit and with the archive before anything is unpacked. Raises ValueError, in one sentence.
    """
    path = case_file(folder, name)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            total = sum(member.file_size for member in members)
            if len(members) > MAX_ARRAYS or total > MAX_ARRAY_BYTES:
                raise ValueError(f"{len(members)} arrays of {total:,} bytes; at most {MAX_ARRAYS:,} of {MAX_ARRAY_BYTES:,} are read")
            return {member.filename.removesuffix(".npy"): _array(archive, member) for member in members}
    except Exception as error:  # zipfile and numpy raise nearly anything on damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is no readable .npz file of plain arrays ({reason}); record the case again") from None


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{member.filename} has the unknown format {version}")
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read_header(stream)
        if dtype.kind not in "biuf":
            raise ValueError(f"{member.filename} is {dtype}, not numbers")
        if min(shape, default=0) < 0 or (size := math.prod(shape) * dtype.itemsize) != member.file_size - stream.tell():
            raise ValueError(f"{member.filename} does not hold {dtype}{list(shape)}")
        data = stream.read(size + 1)  # reading to the end compares the checksum
    if len(data) != size:
        raise ValueError(f"{member.filename} is cut off")
    array = np.ndarray(shape, dtype, data, order="F" if by_columns else "C")
    return array.astype(dtype.newbyteorder("="), copy=False)
