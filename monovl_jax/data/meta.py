"""META.json: which data sets there are, in upstream's form.

    {"street": {"root": "pictures/", "annotation": "street.jsonl", "data_augment": false, "repeat_time": 1, "max_dynamic_patch": 6}}

root: folder of the pictures (by default that of the annotation), or tar shards (`data.pictures`). annotation: a JSONL file
(`data.jsonl`). Paths are relative to the folder of META.json. repeat_time: below 1 only the first part of the samples is used, a whole
number repeats them. max_dynamic_patch: most tiles of a picture, thumbnail not counted (by default the model's). data_augment: compress
every tile as JPEG once. length: how many lines the annotation has, for people. `"prepared": FOLDER` stands in place of root and annotation
for samples that `monovl data prepare` has written (`data.shards`). A folder given as META.json stands for the META.json in it.
Source: Mono-InternVL internvl/train/finetune.py:585-640 (build_datasets); spec 5.3.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monovl_jax import jsontext
from monovl_jax.data.pictures import is_tar_root, tar_shards
from monovl_jax.data.tiling import MAX_TILES

EVERYTHING = "*"
"""In a stage's mixture: all data sets that it does not name."""

META, MANIFEST = "META.json", "manifest.json"

_FIELDS = ("root", "annotation", "prepared", "data_augment", "repeat_time", "max_dynamic_patch", "length")


class MetaError(ValueError):
    """A META.json, or a prepared folder, that cannot be used; the message names file, data set, field and mend."""


@dataclass(frozen=True)
class DataSet:
    """One entry. Paths are absolute or relative to the working directory; see the top of this file for the other fields.

    prepared: annotation is the manifest of a prepared folder, root that folder.
    """

    name: str
    root: Path
    annotation: Path
    data_augment: bool = False
    repeat_time: float = 1
    max_dynamic_patch: int | None = None
    length: int | None = None
    prepared: bool = False

    def used(self, samples: int) -> int:
        """How many of `samples` good ones repeat_time leaves."""
        return int(samples * self.repeat_time) if self.repeat_time < 1 else samples

    def identity(self) -> dict[str, Any]:
        """What decides the samples, as JSON values: the content of the annotation and the settings, not where they lie."""
        return {
            "annotation": file_digest(self.annotation),
            "repeat_time": self.repeat_time,
            "max_dynamic_patch": self.max_dynamic_patch,
            "data_augment": self.data_augment,
        }


def file_digest(path: str | Path, blocks: int = 64, block_bytes: int = 1 << 16) -> str:
    """Identifies a file by its size and evenly spaced blocks: at most 4 MiB are read, whatever its size; small files in full."""
    path = Path(path)
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as stream:
        if size <= blocks * block_bytes:
            digest.update(stream.read())
        else:
            for number in range(blocks):
                stream.seek(number * (size - block_bytes) // (blocks - 1))
                digest.update(stream.read(block_bytes))
    return digest.hexdigest()[:16]


def read_meta(path: str | Path) -> dict[str, DataSet]:
    """The data sets of a META.json by name. Raises MetaError for a file that is not so, an unknown field, or a path that leads nowhere."""
    path = Path(path)
    path = path / META if path.is_dir() else path
    try:
        raw = jsontext.read(path)
    except FileNotFoundError:
        raise MetaError(f"{path} does not exist; give a JSON file that lists the data sets") from None
    except (OSError, ValueError) as error:
        raise MetaError(f"{path} cannot be read as JSON ({error}); correct the file") from None
    if not isinstance(raw, dict) or not raw:
        raise MetaError(f"{path} holds no data set; write an object {{name: {{root, annotation}}}}")
    return {name: _data_set(path, name, entry) for name, entry in raw.items()}


def _data_set(path: Path, name: str, entry: Any) -> DataSet:
    where = f"{path}: data set {name!r}"

    def require(condition: bool, problem: str) -> None:
        if not condition:
            raise MetaError(f"{where}{problem}")

    require(bool(name) and name != EVERYTHING, ": the name may not be empty or '*'; rename it")
    require(isinstance(entry, dict), f" is a JSON {type(entry).__name__}; write an object with root and annotation")
    unknown = sorted(set(entry) - set(_FIELDS))
    require(not unknown, f" has the unknown field {unknown[0] if unknown else ''!r}; the fields are {', '.join(_FIELDS)}")
    annotation, root, prepared = entry.get("annotation"), entry.get("root"), entry.get("prepared")
    for field, value in (("annotation", annotation), ("root", root), ("prepared", prepared)):
        bucket = isinstance(value, str) and "://" in value
        require(not bucket, f": {field} is {value!r}; data is read from files, so mount the bucket or copy it and give the path")
    if prepared is not None:
        require(isinstance(prepared, str) and prepared != "", f": prepared is {prepared!r}; give a folder that `monovl data prepare` made")
        require(annotation is None and root is None, " has prepared beside annotation or root; keep the one or the other")
        manifest = path.parent / prepared / MANIFEST
        require(manifest.is_file(), f": {manifest} does not exist; run `monovl data prepare` to its end, or correct the path")
        annotation, root = f"{prepared}/{MANIFEST}", prepared
    require(isinstance(annotation, str) and annotation != "", f": annotation is {annotation!r}; give the path of a JSONL file")
    require(root is None or isinstance(root, str), f": root is {root!r}; give the path of a folder")
    file = path.parent / str(annotation)
    require(file.is_file(), f": the annotation {file} does not exist; paths are relative to the folder of {path.name}")
    folder = file.parent if root is None else path.parent / root
    there = bool(tar_shards(folder)) if is_tar_root(folder) else folder.is_dir()
    require(there, f": the root {folder} is not a folder, nor tar files that exist; paths are relative to the folder of {path.name}")

    augment = entry.get("data_augment", False)
    require(isinstance(augment, bool), f": data_augment is {augment!r}; write true or false")
    repeat = entry.get("repeat_time", 1)
    good = (
        isinstance(repeat, int | float)
        and not isinstance(repeat, bool)
        and 0 < repeat <= 1_000_000
        and (repeat < 1 or repeat == int(repeat))
    )
    require(
        good, f": repeat_time is {repeat!r}; give a number between 0 and 1 (the first part) or a whole number up to 1,000,000 (repeats)"
    )
    for field in ("max_dynamic_patch", "length"):
        value = entry.get(field)
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        require(value is None or whole, f": {field} is {value!r}; give a whole number of at least 1")
    tiles = entry.get("max_dynamic_patch") or 1
    require(tiles <= MAX_TILES, f": max_dynamic_patch is {tiles}; at most {MAX_TILES} tiles an image are possible")
    return DataSet(name, folder, file, augment, repeat, entry.get("max_dynamic_patch"), entry.get("length"), prepared is not None)


def shares(mixture: dict[str, float], sizes: dict[str, float]) -> dict[str, float]:
    """Relative weights by data set. `sizes`: of each candidate, samples times repeat_time.

        {"ocr": 1, "*": 3} with sizes a 30, b 10, ocr 5   ->   ocr 1, a 2.25, b 0.75

    What `*` weighs is divided among the candidates that the mixture does not name, by size; without any it weighs nothing.
    """
    named = {name: weight for name, weight in mixture.items() if name != EVERYTHING}
    rest = {name: size for name, size in sizes.items() if name not in named and size > 0} if EVERYTHING in mixture else {}
    total = sum(rest.values())
    return named | {name: mixture[EVERYTHING] * size / total for name, size in rest.items()}
