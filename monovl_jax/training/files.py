"""Folders and small files of a run, on a local disk or in a bucket (`gs://...`, through epath)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
from etils import epath

from monovl_jax import jsontext

CHECKSUM = "checksum"

AnyPath = Path | epath.Path
"""A folder or file: `pathlib` for a local one, `epath` for one in a bucket."""


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path lies in a bucket (`gs://...`)."""
    return "://" in os.fspath(path)


def place(path: str | os.PathLike[str]) -> AnyPath:
    """The path object of a folder: absolute when local. Raises OSError when what reads such a bucket is not installed."""
    if not is_remote(path):
        return Path(path).absolute()
    scheme = os.fspath(path).split("://")[0]
    try:
        fsspec.get_filesystem_class({"gs": "gcs"}.get(scheme, scheme))
    except (ImportError, ValueError) as error:
        raise OSError(f"{os.fspath(path)}: {error}") from None
    return epath.Path(path)


def canonical(value: Any) -> bytes:
    """The one spelling of a JSON value, for digests."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the checksum of everything in it, under `checksum`."""
    body = jsontext.loads(canonical({key: value for key, value in record.items() if key != CHECKSUM}), allow_nan=True)
    return {**body, CHECKSUM: hashlib.sha256(canonical(body)).hexdigest()}


def is_intact(record: Mapping[str, Any]) -> bool:
    """Whether a record is as it was sealed. Records of version 0.1.0 have no checksum, and pass."""
    return CHECKSUM not in record or sealed(record)[CHECKSUM] == record[CHECKSUM]


def write_bytes(path: AnyPath, data: bytes) -> None:
    """Writes a file so that a kill leaves the old one or the new one: by a rename, or by one object of a bucket, which is atomic."""
    if is_remote(path):
        path.write_bytes(data)
        return
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def write_json(path: AnyPath, value: Any) -> None:
    """Writes JSON as `write_bytes` writes."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def remove_tree(path: AnyPath) -> None:
    """Removes a folder and what is in it; one that is not there is no error."""
    if isinstance(path, Path):
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.rmtree()


def free_bytes(path: AnyPath) -> int | None:
    """Free space on the disk of a folder that exists; None for a bucket, which has no end."""
    return None if is_remote(path) else shutil.disk_usage(path).free


def size_of(path: AnyPath) -> int:
    """Bytes of all files below a folder."""
    if isinstance(path, Path):
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return sum(size_of(child) if child.is_dir() else child.stat().length for child in path.iterdir())
