"""Parameters of ours -> a folder in the released layout, for the PyTorch world: `monovl convert export`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monovl_jax.config import ConfigError, ModelConfig, config_to_json, read_config
from monovl_jax.convert.arrays import STORED, cast, contiguous, stored_dtype
from monovl_jax.convert.checkpoint import (
    PARAMS,
    OrbaxFolder,
    flatten,
    leaf_differences,
    leaf_shapes,
    open_orbax,
    read_marker,
    verify_params,
)
from monovl_jax.convert.errors import WeightsError
from monovl_jax.convert.folders import carried_files, check_destination, new_folder, own_file
from monovl_jax.convert.importer import with_dtype
from monovl_jax.convert.key_table import Row, key_table
from monovl_jax.convert.safetensors_out import SafetensorsWriter, Tensor, divide
from monovl_jax.convert.weights import EMBEDDING, HEAD
from monovl_jax.convert.workers import Progress, Task, run_all, silent

_SLACK = 16 << 20


@dataclass(frozen=True)
class Leaves:
    """Parameters by path. read: (path, layer or None for all of it) -> array. layered: whether reading one layer costs one layer."""

    where: str
    dtypes: dict[str, np.dtype]
    read: Callable[[str, int | None], np.ndarray]
    layered: Callable[[str], bool]


Entry = tuple[Tensor, Row, int | None]


def state_dict_order(config: ModelConfig) -> list[tuple[Row, int | None]]:
    """(row, layer) of every released tensor in the order of upstream's modules: vision, decoder layer by layer, projector last."""
    rows = key_table(config)
    vision = [row for row in rows if row.name.startswith("vision_model.")]
    projector = [row for row in rows if row.name.startswith("mlp1.")]
    language = [row for row in rows if row.name.startswith("language_model.")]
    blocks = sorted((row for row in language if row.per_layer), key=lambda row: "norm" in row.name)  # upstream makes the norms last
    outside = [row for row in language if not row.per_layer]
    layers = [(row, layer) for layer in range(config.decoder.num_layers) for row in blocks]
    whole = lambda chosen: [(row, None) for row in chosen]  # noqa: E731
    return [*whole(vision), *whole(outside[:1]), *layers, *whole(outside[1:]), *whole(projector)]


def _entries(config: ModelConfig, dtypes: dict[str, np.dtype], wanted: np.dtype | None, vocabulary: tuple[str, ...]) -> list[Entry]:
    found: list[Entry] = []
    for row, layer in state_dict_order(config):
        names = (row.name,) if layer is None else (row.name.format(layer=layer),)
        if row.name == EMBEDDING and config.decoder.tie_embeddings:
            names = vocabulary
        found += [(Tensor(name, row.shape, wanted or dtypes[row.paths[0]]), row, layer) for name in names]
    return found


def _saved_leaves(saved: OrbaxFolder) -> Leaves:
    stores = {path: saved.open(path) for path in saved.shapes}

    def read(path: str, layer: int | None) -> np.ndarray:
        return (stores[path] if layer is None else stores[path][layer]).read().result()

    def layered(path: str) -> bool:
        chunk = stores[path].chunk_layout.read_chunk.shape
        return chunk is not None and chunk[0] == 1

    return Leaves(str(saved.folder), saved.dtypes, read, layered)


def _write_config(folder: Path, config: ModelConfig, files: Path, cast_to: np.dtype | None) -> None:
    """The source's own config.json where it says the same, or else one written from `config`."""
    source = own_file(files, "config.json")
    try:
        same = source is not None and read_config(files) == config
    except ConfigError:
        same = False
    data = source.read_bytes() if same and source is not None else config_to_json(config).encode()
    (folder / "config.json").write_bytes(data if cast_to is None else with_dtype(data.decode("utf-8"), cast_to).encode())


def _tasks(entries: list[Entry], leaves: Leaves, wanted: np.dtype | None, writer: SafetensorsWriter) -> list[Task]:
    """One task per tensor; one per leaf where a leaf can only be read as a whole (a training run's)."""

    def write(tensor: Tensor, row: Row, parts: list[np.ndarray]) -> None:
        array = cast(contiguous(row.save(*parts)), wanted, f"{leaves.where}: tensor {tensor.name}")
        writer.write(tensor.name, contiguous(array))

    def one(tensor: Tensor, row: Row, layer: int | None) -> None:
        write(tensor, row, [leaves.read(path, layer) for path in row.paths])

    def every_layer(row: Row) -> None:
        whole = leaves.read(row.paths[0], None)
        for tensor, of, layer in entries:
            if of is row and layer is not None:
                write(tensor, row, [whole[layer]])

    tasks: list[Task] = []
    for row in {id(row): row for _, row, _ in entries}.values():
        mine = [entry for entry in entries if entry[1] is row]
        if row.per_layer and not leaves.layered(row.paths[0]):
            tasks.append((sum(tensor.nbytes for tensor, _, _ in mine), lambda row=row: every_layer(row)))
        else:
            tasks += [(entry[0].nbytes, lambda entry=entry: one(*entry)) for entry in mine]
    return tasks


def _export(
    leaves: Leaves,
    config: ModelConfig,
    files: Path,
    dst: Path,
    dtype: str | None,
    shard_gb: float,
    vocabulary: tuple[str, ...],
    progress: Progress,
) -> Path:
    wanted = stored_dtype(dtype)
    if not 0 < shard_gb < 1e9:
        raise WeightsError(f"shards of {shard_gb} GB cannot be written; give a positive size")
    check_destination(dst, files)
    entries, carried = _entries(config, leaves.dtypes, wanted, vocabulary), carried_files(files)
    tensors = [tensor for tensor, _, _ in entries]
    with new_folder(dst, files, sum(tensor.nbytes for tensor in tensors) + _SLACK) as folder:
        with SafetensorsWriter(folder, divide(tensors, int(shard_gb * 1e9))) as writer:
            run_all(_tasks(entries, leaves, wanted, writer), progress)
        for file in carried:
            shutil.copyfile(file, folder / file.name)
        _write_config(folder, config, files, wanted if any(kind != wanted for kind in leaves.dtypes.values()) else None)
    return dst


def export_params(
    params: str | Path,
    config: ModelConfig,
    files: str | Path,
    dst: str | Path,
    dtype: str | None = None,
    shard_gb: float = 5.0,
    progress: Progress = silent,
    vocabulary: tuple[str, ...] = (EMBEDDING,),
) -> Path:
    """Writes an Orbax folder of our nested dict (that of a training stage, say) in the released layout; returns `dst`.

    Args:
      params: the Orbax folder.
      config: of the model.
      files: folder with the tokenizer's files and, where there is one, upstream's config.json.
      dst: new, or an empty folder outside of both; it appears when everything is in it.
      dtype: float32, bfloat16 or float16 for every tensor; as stored by default.
      shard_gb: largest shard, in 10^9 bytes; upstream's by default.
      vocabulary: names of the embedding when it is tied to the head.

    Raises WeightsError when the folder does not fit the model, a tensor is not finite, or `dst` cannot be made.
    """
    saved = open_orbax(params)
    if problems := leaf_differences(saved, config):
        raise WeightsError(f"{params}: the parameters do not fit the model: {'; '.join(problems[:5])}; is it of another config?")
    check_destination(Path(dst), Path(params))
    try:
        return _export(_saved_leaves(saved), config, Path(files), Path(dst), dtype, shard_gb, vocabulary, progress)
    except WeightsError:
        raise
    except ValueError as error:  # how tensorstore reports a chunk that is cut off
        raise WeightsError(f"{params} cannot be read ({error}); convert or train again") from error


def export_model(
    src: str | Path,
    dst: str | Path,
    dtype: str | None = None,
    shard_gb: float = 5.0,
    progress: Progress = silent,
    verify: bool = True,
) -> Path:
    """Writes an imported model back in the released layout, bit by bit what came in; arguments and errors as `export_params`.

    verify: compare the digest of every file of the parameters first.
    """
    src = Path(src)
    marker = read_marker(src)
    vocabulary = tuple(marker.get("vocabulary_tensors") or (EMBEDDING,))
    if not set(vocabulary) <= {EMBEDDING, HEAD}:
        raise WeightsError(f"{src}: model.json names the vocabulary tensors {list(vocabulary)}; import the model again")
    if verify:
        check_destination(Path(dst), src)
        verify_params(src, marker)
    return export_params(src / PARAMS, read_config(src), src, dst, dtype, shard_gb, progress, vocabulary)


def export_tree(
    tree: dict[str, Any],
    config: ModelConfig,
    files: str | Path,
    dst: str | Path,
    dtype: str | None = None,
    shard_gb: float = 5.0,
    progress: Progress = silent,
) -> Path:
    """Writes parameters in memory (a nested dict of arrays) in the released layout; arguments and errors as `export_params`."""
    arrays, expected = flatten(tree), leaf_shapes(config)
    found = {path: tuple(leaf.shape) for path, leaf in arrays.items()}
    if found != expected:
        wrong = sorted(path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path))
        raise WeightsError(f"the parameters do not fit the model at {', '.join(wrong[:5])}; are they of another config?")
    dtypes = {path: np.dtype(leaf.dtype) for path, leaf in arrays.items()}
    if wrong := sorted(path for path, kind in dtypes.items() if kind not in STORED.values()):
        raise WeightsError(f"{wrong[0]} is {dtypes[wrong[0]].name}; parameters are {', '.join(STORED)}")

    def read(path: str, layer: int | None) -> np.ndarray:
        return np.asarray(arrays[path] if layer is None else arrays[path][layer])

    leaves = Leaves("the parameters in memory", dtypes, read, lambda path: True)
    return _export(leaves, config, Path(files), Path(dst), dtype, shard_gb, (EMBEDDING,), progress)
