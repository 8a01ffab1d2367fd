"""safetensors files written piece by piece: the library's own writer wants a whole shard in memory.

The layout follows that library (tensors by falling element size, then name; header padded to 8 bytes) and the shards follow transformers
(filled in the order of the state dict, named `model-00001-of-00002.safetensors`, with an index), so that files come out as upstream's.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from monovl_jax.convert.arrays import FLOATS, bits

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

_CODES = {dtype: code for code, dtype in FLOATS.items()}


@dataclass(frozen=True)
class Tensor:
    """Name, shape and element type of a tensor that is still to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def divide(tensors: list[Tensor], shard_bytes: int) -> dict[str, list[Tensor]]:
    """{file name: its tensors}: one file when all fit into `shard_bytes`, or else shards filled in order."""
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def index_text(files: Mapping[str, list[Tensor]]) -> str:
    """The JSON that says which shard holds which tensor."""
    total = sum(tensor.nbytes for shard in files.values() for tensor in shard)
    names = {tensor.name: file for file, shard in files.items() for tensor in shard}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": names}, indent=2, sort_keys=True) + "\n"


class SafetensorsWriter:
    """Opens the files of a folder with their headers and their final size; `write` puts each tensor in its place, from any thread."""

    def __init__(self, folder: Path, files: Mapping[str, list[Tensor]]):
        self._descriptors: list[int] = []
        self._place: dict[str, tuple[int, int, int]] = {}
        for name, shard in files.items():
            descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            self._descriptors.append(descriptor)
            self._start(descriptor, shard)
        if len(files) > 1:
            (folder / INDEX).write_text(index_text(files), encoding="utf-8")

    def _start(self, descriptor: int, shard: list[Tensor]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        ordered = sorted(shard, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
        end = 0
        for tensor in ordered:
            offsets = [end, end + tensor.nbytes]
            header[tensor.name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
            end += tensor.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        os.write(descriptor, len(text).to_bytes(8, "little") + text)
        os.truncate(descriptor, start + end)
        offset = start
        for tensor in ordered:
            self._place[tensor.name] = (descriptor, offset, tensor.nbytes)
            offset += tensor.nbytes

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes the bytes of a contiguous array of the announced size. Raises OSError when the disk does not take them."""
        descriptor, offset, size = self._place[name]
        data = bits(array).reshape(-1).view(np.uint8).data
        if len(data) != size:
            raise ValueError(f"tensor {name} has {len(data)} bytes, {size} were announced")
        while data:
            written = os.pwrite(descriptor, data, offset)
            data, offset = data[written:], offset + written

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
