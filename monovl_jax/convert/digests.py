"""SHA-256 of every file of a folder of parameters: a flipped bit leaves names, shapes and sizes as they were."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def _digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """{path below the folder: SHA-256} of every regular file, read on a few threads."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
        return dict(zip((file.relative_to(folder).as_posix() for file in files), pool.map(_digest, files), strict=True))


def damaged(folder: Path, expected: Mapping[str, str]) -> list[str]:
    """One phrase for every file that differs from its digest, is missing, or has none."""
    found = digests(folder)
    problems = [f"damaged: {name} is not what was written" for name in found.keys() & expected.keys() if found[name] != expected[name]]
    problems += [f"missing: {name}" for name in expected.keys() - found.keys()]
    problems += [f"left over: {name}" for name in found.keys() - expected.keys()]
    return sorted(problems)
