"""Folders of saved arrays, looked at before Orbax and TensorStore open them: those wait on a pipe for ever, and die of deep JSON."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from monovl_jax import jsontext

METADATA = frozenset({"_METADATA", "_CHECKPOINT_METADATA", "_sharding", ".zarray", ".zattrs", ".zgroup", "zarr.json"})
"""Files of such folders that hold JSON."""


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Raises OSError or JsonError when a local folder holds anything but regular files and folders, or metadata that is no JSON.

    Links are refused too: a saved folder is whole by itself. A folder in a bucket holds objects alone, and is not looked at.
    """
    if "://" in os.fspath(folder):
        return
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent) / name
            kind = path.lstat().st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                raise OSError(f"{path} is a link, a pipe or a device, not a regular file")
        for name in files:
            path = Path(parent) / name
            if (name in METADATA or Path(parent).name == "array_metadatas") and path.stat().st_size:
                jsontext.read(path, allow_nan=True)
