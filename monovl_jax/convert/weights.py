"""Reads the weights of a folder in the released layout: single or sharded safetensors, `.bin` files through torch when it is there."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from monovl_jax import jsontext
from monovl_jax.config import ModelConfig
from monovl_jax.convert.arrays import FLOATS, cast
from monovl_jax.convert.errors import WeightsError
from monovl_jax.convert.folders import own_file
from monovl_jax.convert.key_table import tree_from_upstream, upstream_shapes

EMBEDDING, HEAD = "language_model.model.tok_embeddings.weight", "language_model.output.weight"

_SUGGESTIONS = 100  # names left over for which the nearest expected one is looked for, each against all that are missing

_FORMATS = (("model.safetensors", "model.safetensors.index.json"), ("pytorch_model.bin", "pytorch_model.bin.index.json"))


class WeightFiles:
    """The tensors of a folder by name, read one at a time. `shapes` and `dtypes` (as safetensors spells them) hold every name."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._reader: dict[str, Callable[[], np.ndarray]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        files, index = self._files()
        home: dict[str, str] = {}
        for file in files:
            before = len(self._reader)
            (self._open_safetensors if file.suffix == ".safetensors" else self._open_torch)(file)
            home |= dict.fromkeys(itertools.islice(self._reader, before, None), file.name)
        for name, file in (index or {}).items():
            if home.get(name) != file:
                raise WeightsError(
                    f"{self.folder}: the index places {name!r} in {file}, which does not hold it; the download is incomplete"
                )
        if index is not None and (extra := sorted(set(self._reader) - set(index))):
            raise WeightsError(f"{self.folder}: the shards hold tensors that the index does not list: {', '.join(extra[:5])}")

    def _files(self) -> tuple[list[Path], dict[str, str] | None]:
        for single, index_name in _FORMATS:
            if (index_path := own_file(self.folder, index_name)) is not None:
                try:
                    index = jsontext.read(index_path)["weight_map"]
                    shards = sorted(set(index.values()))
                except (OSError, ValueError, KeyError, TypeError, AttributeError):
                    raise WeightsError(f"{index_path} is no index: expected a JSON object with `weight_map`") from None
                return [self._shard(index_path, shard) for shard in shards], index
            if (path := own_file(self.folder, single)) is not None:
                return [path], None
        raise WeightsError(f"{self.folder} has no weights: expected model.safetensors or model.safetensors.index.json")

    def _shard(self, index_path: Path, shard: Any) -> Path:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise WeightsError(f"{index_path} points to {shard!r}; shards must be plain file names in the same folder")
        if (path := own_file(self.folder, shard)) is None:
            raise WeightsError(f"{self.folder / shard} is missing; the index lists it")
        return path

    def _add(self, file: Path, name: str, shape: tuple[int, ...], dtype: str, read: Callable[[], np.ndarray]) -> None:
        if name in self._reader:
            raise WeightsError(f"{file}: tensor {name!r} appears in two files")
        self._reader[name], self.shapes[name], self.dtypes[name] = read, shape, dtype

    def _open_safetensors(self, file: Path) -> None:
        try:
            with safe_open(file, framework="numpy"):  # checks the header: offsets without gap or overlap, sizes, the length of the file
                pass
            with open(file, "rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                header = jsontext.loads(stream.read(size), unique_keys=True)
            if not all(isinstance(entry, dict) for entry in header.values()):
                raise ValueError("an entry of its header is no object")
        except (SafetensorError, OSError, ValueError) as error:
            raise WeightsError(f"{file} is no readable safetensors file ({error}); download it again") from None
        data = np.memmap(file, np.uint8, mode="r", offset=0)[8 + size :]
        for name, entry in header.items():
            if name != "__metadata__":
                shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
                dtype = FLOATS.get(entry["dtype"], np.dtype(np.uint8))
                part = data[start:stop]
                self._add(file, name, shape, entry["dtype"], lambda part=part, shape=shape, dtype=dtype: _view(part, shape, dtype))

    def _open_torch(self, file: Path) -> None:
        try:
            import torch
        except ImportError:
            raise WeightsError(
                f"{file} is a PyTorch file; install the extra with `pip install 'monovl_jax[torch]'` or convert it to safetensors"
            ) from None
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise WeightsError(f"{file} cannot be loaded with weights_only=True ({reason}); it is never loaded otherwise") from None
        if not isinstance(tensors, Mapping) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
            raise WeightsError(f"{file} is no dictionary of tensors; save the model's state_dict")
        codes = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
        for name, tensor in tensors.items():
            code = codes.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
            self._add(file, str(name), tuple(tensor.shape), code, lambda tensor=tensor, code=code: _from_torch(tensor, code))

    def read(self, name: str) -> np.ndarray:
        """A tensor as it is stored; often a read-only view of the file."""
        return self._reader[name]()


def _view(part: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.require(np.asarray(part).view(dtype).reshape(shape), requirements="A")


def _from_torch(tensor: Any, code: str) -> np.ndarray:
    import torch

    if code == "BF16":
        return tensor.contiguous().view(torch.int16).numpy().view(FLOATS[code])
    return tensor.contiguous().numpy()


def check_names(files: WeightFiles, config: ModelConfig) -> None:
    """Every upstream tensor of the model is there once, as floats of its shape, and nothing else.

    Raises WeightsError that lists all differences, with the nearest expected name for what is left over.
    """
    refuse(files, differences(files, config))


def refuse(files: WeightFiles, problems: list[str]) -> None:
    """Raises WeightsError with the first twenty problems, if there are any."""
    if problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise WeightsError(f"{files.folder}: the weights do not fit config.json ({len(problems)} differences):\n  {shown}{more}")


def differences(files: WeightFiles, config: ModelConfig) -> list[str]:
    """One line for each tensor that is missing, left over, of another shape or no float.

    Raises WeightsError when the config ties the embeddings and the folder holds two that differ.
    """
    return compare(files, upstream_shapes(config), (EMBEDDING, HEAD) if config.decoder.tie_embeddings else None)


def compare(files: WeightFiles, expected: Mapping[str, tuple[int, ...]], tied: tuple[str, str] | None) -> list[str]:
    """One line for each tensor that differs from `expected`. tied: two names of one tensor, of which a folder has either or both."""
    found = dict(files.shapes)
    if tied is not None and tied[1] in found:
        embedding, head = tied
        both = embedding in found and found[embedding] == found[head]
        if both and not np.array_equal(files.read(head), files.read(embedding)):
            raise WeightsError(f"{files.folder}: the config ties the embeddings, but {head} differs from {embedding}")
        found.setdefault(embedding, found[head])
        del found[head]
    missing = sorted(expected.keys() - found.keys())
    problems = [f"missing: {name} {list(expected[name])}" for name in missing]
    for number, name in enumerate(sorted(found.keys() - expected.keys())):
        near = difflib.get_close_matches(name, missing, n=1) if number < _SUGGESTIONS else []
        problems.append(f"left over: {name} {list(found[name])}" + (f" (did you mean {near[0]}?)" if near else ""))
    for name in expected.keys() & found.keys():
        if expected[name] != found[name]:
            problems.append(f"wrong shape: {name} is {list(found[name])}, expected {list(expected[name])}")
    known = {*expected, *(tied or ())}
    for name, dtype in files.dtypes.items():
        if name in known and dtype not in FLOATS:
            problems.append(f"wrong dtype: {name} is {dtype}, expected a float ({', '.join(FLOATS)})")
    return sorted(problems)


def load_weights(folder: str | Path, config: ModelConfig, dtype: Any = None) -> dict[str, Any]:
    """Our nested dict of numpy arrays from a folder in the released layout, in the stored dtype or cast to `dtype`.

    Raises WeightsError when a file is damaged, a tensor is missing, left over, of another shape or dtype, or not finite; nothing is
    returned in part.
    """
    files = WeightFiles(folder)
    check_names(files, config)
    wanted = None if dtype is None else np.dtype(dtype)

    def read(name: str) -> np.ndarray:
        stored = HEAD if name == EMBEDDING and name not in files.shapes else name  # tied, and the file kept the other of the two names
        return cast(files.read(stored), wanted, f"{files.folder}: tensor {stored}")

    return tree_from_upstream(config, read)
