"""Folders that come into being as a whole or not at all, and the files that travel with the weights."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from monovl_jax import jsontext
from monovl_jax.convert.errors import WeightsError
from monovl_jax.data.tokenizer import FILES as TOKENIZER_FILES

CARRIED = (
    *TOKENIZER_FILES,
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)
"""Files copied as they are in both directions, beside `config.json` and every `*.py` (data here: never imported, never run)."""


def own_file(folder: Path, name: str) -> Path | None:
    """`folder/name` when it is a file of that folder, None when nothing is there.

    A link may stay in the folder, or lead from `snapshots/REVISION` to `blobs` beside it (the cache of huggingface_hub). Raises
    WeightsError for a link to anywhere else.
    """
    path = folder / name
    if not path.is_file():
        return None
    real, home = path.resolve(), folder.resolve()
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(real.is_relative_to(place) for place in allowed):
        raise WeightsError(f"{path} is a link to {real}, outside its folder; put the file itself there")
    return path


def carried_files(folder: Path) -> list[Path]:
    """The files of a model folder that travel with its weights, `config.json` not among them."""
    names = [*CARRIED, *sorted(path.name for path in folder.glob("*.py"))]
    return [path for name in names if (path := own_file(folder, name)) is not None]


def missing_code(folder: Path) -> list[str]:
    """Python files that `auto_map` of config.json or tokenizer_config.json names and the folder lacks: transformers cannot load it so.

    Code of another repository (`owner/name--file.Class`) is no file of the folder. A file that cannot be read names nothing.
    """
    named: set[str] = set()
    for file in ("config.json", "tokenizer_config.json"):
        try:
            content = jsontext.read(folder / file)
        except (OSError, ValueError):
            continue
        classes = content.get("auto_map") if isinstance(content, dict) else None
        for value in classes.values() if isinstance(classes, dict) else ():
            entries = [entry for entry in (value if isinstance(value, list) else [value]) if isinstance(entry, str)]
            named |= {f"{module}.py" for module in (entry.partition(".")[0] for entry in entries) if module.isidentifier()}
    return sorted(named - {path.name for path in folder.glob("*.py")})


def write_json(path: Path, value: Any) -> None:
    """Writes JSON and waits until it is on the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def check_destination(dst: Path, src: Path) -> None:
    """Raises WeightsError unless `dst` is new or an empty folder, and lies outside `src`."""
    if dst.is_symlink() or (dst.exists() and not dst.is_dir()):
        raise WeightsError(f"{dst} is there and is no folder; give another destination")
    if dst.resolve().is_relative_to(src.resolve()):
        raise WeightsError(f"{dst} lies inside the source {src}; give a destination outside it")
    if dst.is_dir() and any(dst.iterdir()):
        raise WeightsError(f"{dst} is not empty; give another destination, or delete it")


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Holds a folder for this process where the system can; the lock dies with it."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WeightsError(f"another process is writing {folder}; wait for it, or give another destination") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_folder(dst: Path, src: Path, needed: int) -> Iterator[Path]:
    """Gives an empty folder beside `dst` that becomes `dst` when the block ends well, and vanishes when it does not.

    dst/..        .DST.partial/  being written      ->      DST/

    What a killed run left is removed by the next one. needed: bytes that will be written. Raises WeightsError when `dst` cannot be
    made: see `check_destination`; no room on the disk, no permission, another process at work.
    """
    check_destination(dst, src)
    dst = dst.absolute()
    partial = dst.parent / f".{dst.name}.partial"
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
        with _lock(partial):
            try:
                for leftover in partial.iterdir():
                    shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
                if (free := shutil.disk_usage(partial).free) < needed:
                    raise WeightsError(
                        f"{dst.parent} has {free / 1e9:.2f} GB free and {needed / 1e9:.2f} GB are to be written; make room, "
                        "or give another destination"
                    )
                yield partial
                os.rename(partial, dst)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        raise WeightsError(f"{dst} cannot be written ({error.strerror or error}); make room or change the permissions") from error
