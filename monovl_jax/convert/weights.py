"""Reads the weights of a folder in the released layout: single or sharded safetensors, `.bin` files through torch when it is there."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from monovl_jax.config import ModelConfig
from monovl_jax.convert.key_table import tree_from_upstream, upstream_shapes

EMBEDDING, HEAD = "language_model.model.tok_embeddings.weight", "language_model.output.weight"


class WeightsError(ValueError):
    """Weights that do not fit the model; the message lists what is wrong and where."""


class WeightFiles:
    """The tensors of a folder by name, read one at a time. `shapes` holds every name with its shape."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._reader: dict[str, Callable[[], np.ndarray]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        files, index = self._files()
        for file in files:
            (self._open_safetensors if file.suffix == ".safetensors" else self._open_torch)(file)
        for name, file in (index or {}).items():
            if name not in self._reader:
                raise WeightsError(
                    f"{self.folder}: the index places {name!r} in {file}, which does not hold it; the download is incomplete"
                )
        if index is not None and (extra := sorted(set(self._reader) - set(index))):
            raise WeightsError(f"{self.folder}: the shards hold tensors that the index does not list: {', '.join(extra[:5])}")

    def _files(self) -> tuple[list[Path], dict[str, str] | None]:
        for single, index_name in (
            ("model.safetensors", "model.safetensors.index.json"),
            ("pytorch_model.bin", "pytorch_model.bin.index.json"),
        ):
            index_path = self.folder / index_name
            if index_path.is_file():
                try:
                    index = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
                    shards = sorted(set(index.values()))
                except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
                    raise WeightsError(f"{index_path} is no index: expected a JSON object with `weight_map`") from None
                for shard in shards:
                    if not isinstance(shard, str) or Path(shard).name != shard:
                        raise WeightsError(f"{index_path} points to {shard!r}; shards must be plain file names in the same folder")
                    if not (self.folder / shard).is_file():
                        raise WeightsError(f"{self.folder / shard} is missing; the index lists it")
                return [self.folder / s for s in shards], index
            if (self.folder / single).is_file():
                return [self.folder / single], None
        raise WeightsError(f"{self.folder} has no weights: expected model.safetensors or model.safetensors.index.json")

    def _add(self, file: Path, name: str, shape: tuple[int, ...], read: Callable[[], np.ndarray]) -> None:
        if name in self._reader:
            raise WeightsError(f"{file}: tensor {name!r} appears in two files")
        self._reader[name], self.shapes[name] = read, shape

    def _open_safetensors(self, file: Path) -> None:
        try:
            handle = safe_open(file, framework="flax")
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                shape = tuple(handle.get_slice(name).get_shape())
                self._add(file, name, shape, lambda name=name, handle=handle: np.asarray(handle.get_tensor(name)))
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{file} is no readable safetensors file ({error}); download it again") from None

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
            raise WeightsError(f"{file} cannot be loaded with weights_only=True ({error}); it is never loaded otherwise") from None
        for name, tensor in tensors.items():

            def read(tensor=tensor) -> np.ndarray:
                if tensor.dtype == torch.bfloat16:
                    return tensor.contiguous().view(torch.int16).numpy().view(jnp.bfloat16)
                return tensor.contiguous().numpy()

            self._add(file, name, tuple(tensor.shape), read)

    def read(self, name: str) -> np.ndarray:
        return self._reader[name]()


def check_names(files: WeightFiles, config: ModelConfig) -> None:
    """Every upstream tensor of the model is there once with its shape, and nothing else. Raises WeightsError that lists all differences."""
    expected, found = upstream_shapes(config), dict(files.shapes)
    if config.decoder.tie_embeddings:
        if HEAD in found and EMBEDDING in found and not np.array_equal(files.read(HEAD), files.read(EMBEDDING)):
            raise WeightsError(f"{files.folder}: the config ties the embeddings, but {HEAD} differs from {EMBEDDING}")
        if HEAD in found:
            found.setdefault(EMBEDDING, found[HEAD])
            del found[HEAD]
    problems = []
    for name in expected.keys() - found.keys():
        problems.append(f"missing: {name} {list(expected[name])}")
    for name in found.keys() - expected.keys():
        near = difflib.get_close_matches(name, expected.keys() - found.keys(), n=1)
        problems.append(f"left over: {name} {list(found[name])}" + (f" (did you mean {near[0]}?)" if near else ""))
    for name in expected.keys() & found.keys():
        if expected[name] != found[name]:
            problems.append(f"wrong shape: {name} is {list(found[name])}, expected {list(expected[name])}")
    if problems:
        shown = "\n  ".join(sorted(problems)[:20])
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise WeightsError(f"{files.folder}: the weights do not fit config.json ({len(problems)} differences):\n  {shown}{more}")


def load_weights(folder: str | Path, config: ModelConfig, dtype: Any = None) -> dict[str, Any]:
    """Our nested dict of numpy arrays from a folder in the released layout, in the stored dtype or cast to `dtype`.

    Raises WeightsError when a file is damaged, a tensor is missing, left over or of another shape; nothing is returned in part.
    """
    files = WeightFiles(folder)
    check_names(files, config)

    def read(name: str) -> np.ndarray:
        if name == EMBEDDING and name not in files.shapes:
            name = HEAD  # tied, and the file kept the other of the two names
        array = files.read(name)
        return array if dtype is None else array.astype(dtype)

    return tree_from_upstream(config, read)
