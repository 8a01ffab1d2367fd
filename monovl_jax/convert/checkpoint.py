"""Parameters as an Orbax folder, written and read leaf by leaf and layer by layer.

Orbax writes the skeleton (one element per leaf, so that its metadata are its own), then every leaf becomes an uncompressed zarr array of
chunks that hold one layer or a part of one. Nothing larger than a layer of a leaf, or the embedding, is ever in memory, and plain Orbax
reads the result; a host of a mesh reads only the chunks that its slices touch.
"""

from __future__ import annotations

import functools
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from monovl_jax import jsontext
from monovl_jax.config import ModelConfig
from monovl_jax.convert.arrays import FLOATS, STORED, cast, contiguous, stored_dtype
from monovl_jax.convert.digests import damaged, digests
from monovl_jax.convert.errors import WeightsError
from monovl_jax.convert.folders import write_json
from monovl_jax.convert.key_table import Row, key_table, set_leaf
from monovl_jax.convert.workers import Progress, Task, run_all, silent
from monovl_jax.model import VLM
from monovl_jax.parallel.saved_folders import check_folder
from monovl_jax.parallel.sharding import parameter_shardings

MARKER, PARAMS, FORMAT, LAYOUT = "model.json", "params", 1, "mono_internvl"

CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class Source:
    """Tensors by their released names.

    read: one of them, as a float array of the released shape; may be a view of a file. dtypes: of every one, known before it is read.
    """

    read: Callable[[str], np.ndarray]
    dtypes: Mapping[str, np.dtype]
    where: str


# ---- the leaves --------------------------------------------------------------------------------------------------------------------


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{`/`-separated path: leaf} of a nested dict."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


@functools.cache
def leaf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the model by its path; nothing is computed."""
    state = nnx.state(nnx.eval_shape(lambda: VLM(config, nnx.Rngs(0))))
    return {path: tuple(leaf.shape) for path, leaf in flatten(nnx.to_pure_dict(state)).items()}


def row_names(row: Row, config: ModelConfig) -> list[str]:
    """The released names that a row of the key table stands for, in the order of layers."""
    return [row.name.format(layer=i) for i in range(config.decoder.num_layers)] if row.per_layer else [row.name]


def leaf_dtypes(config: ModelConfig, source: Source, dtype: np.dtype | None) -> dict[str, np.dtype]:
    """What every leaf will be stored as. Raises WeightsError when layers of one leaf differ, or JAX has no such type."""
    dtypes = {}
    for row in key_table(config):
        found = {source.dtypes[name] for name in row_names(row, config)} if dtype is None else {dtype}
        if len(found) > 1:
            kinds = ", ".join(sorted(kind.name for kind in found))
            raise WeightsError(f"{source.where}: {row.name} is {kinds} in different layers; choose one with --dtype")
        if (kind := found.pop()) not in STORED.values():
            raise WeightsError(f"{source.where}: {row.name} is {kind.name}; choose one of {', '.join(STORED)} with --dtype")
        dtypes |= dict.fromkeys(row.paths, kind)
    return dtypes


def chunk_shape(shape: tuple[int, ...], itemsize: int, layered: bool) -> list[int]:
    """One layer, or a part of it: the longest axis is halved while a chunk is larger than 8 MiB and the axis is even."""
    chunk = [1, *shape[1:]] if layered else list(shape)
    while math.prod(chunk) * itemsize > CHUNK_BYTES and any(size % 2 == 0 and size > 1 for size in chunk):
        longest = max((size, -axis) for axis, size in enumerate(chunk) if size % 2 == 0)
        chunk[-longest[1]] //= 2
    return chunk


def _kvstore(params: Path, path: str) -> dict[str, Any]:
    return {"driver": "file", "path": f"{params / path.replace('/', '.')}/"}


def _create_leaf(params: Path, path: str, shape: tuple[int, ...], dtype: np.dtype, layered: bool) -> ts.TensorStore:
    shutil.rmtree(params / path.replace("/", "."))
    metadata = {
        "shape": shape,
        "chunks": chunk_shape(shape, dtype.itemsize, layered),
        "dtype": "bfloat16" if dtype == FLOATS["BF16"] else dtype.str,
        "compressor": None,
    }
    spec = {
        "driver": "zarr",
        "kvstore": _kvstore(params, path),
        "metadata": metadata,
        "store_data_equal_to_fill_value": True,  # so that a chunk that is missing later is a damage, not zeros
        "create": True,
        "context": {"file_io_sync": False},
    }
    return ts.open(spec).result()


def _save_skeleton(params: Path, dtypes: Mapping[str, np.dtype]) -> None:
    tree: dict[str, Any] = {}
    for path, dtype in dtypes.items():
        set_leaf(tree, path, np.zeros(1, dtype))
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)  # Orbax warns that there is no OCDBT database to merge; none is wanted
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False)) as checkpointer:
            checkpointer.save(params.absolute(), tree)
    finally:
        logger.setLevel(level)


def write_params(params: Path, config: ModelConfig, source: Source, dtype: np.dtype | None, progress: Progress = silent) -> None:
    """Writes the Orbax folder `params` from released tensors, in their own dtype or cast.

    Raises WeightsError that names the tensor when one is not finite, or does not fit into `dtype`.
    """
    shapes, dtypes = leaf_shapes(config), leaf_dtypes(config, source, dtype)
    _save_skeleton(params, dtypes)
    tasks: list[Task] = []
    for row in key_table(config):
        stores = [_create_leaf(params, path, shapes[path], dtypes[path], row.per_layer) for path in row.paths]
        for layer, name in enumerate(row_names(row, config)):

            def write(row=row, stores=stores, layer=layer, name=name) -> None:
                array = cast(source.read(name), dtype, f"{source.where}: tensor {name}")
                for store, part in zip(stores, row.load(array), strict=True):
                    target = store[layer] if row.per_layer else store
                    target.write(contiguous(part)).result()

            tasks.append((math.prod(row.shape) * dtypes[row.paths[0]].itemsize, write))
    run_all(tasks, progress)


# ---- an Orbax folder of anyone -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OrbaxFolder:
    """A saved nested dict of arrays: shape and dtype of every leaf by path, and the way to each."""

    folder: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]
    ocdbt: bool
    zarr3: bool

    def open(self, path: str) -> ts.TensorStore:
        """A leaf, to be read in slices."""
        store = _kvstore(self.folder, path)
        if self.ocdbt:
            store = {"driver": "ocdbt", "base": f"file://{self.folder}/", "path": f"{path.replace('/', '.')}/"}
        return ts.open({"driver": "zarr3" if self.zarr3 else "zarr", "kvstore": store}, read=True).result()


def open_orbax(folder: str | Path) -> OrbaxFolder:
    """Looks at an Orbax checkpoint of one nested dict. Raises WeightsError when the folder is none."""
    folder = Path(folder).absolute()
    try:
        check_folder(folder)
        flags = jsontext.read(folder / "_METADATA")
        with ocp.StandardCheckpointer() as checkpointer:
            metadata: Any = checkpointer.metadata(folder)
        leaves = flatten(getattr(metadata, "item_metadata", metadata).tree)
        shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
        dtypes = {path: np.dtype(leaf.dtype) for path, leaf in leaves.items()}
        return OrbaxFolder(folder, shapes, dtypes, bool(flags.get("use_ocdbt", True)), bool(flags.get("use_zarr3", False)))
    except Exception as error:  # Orbax and what lies below it answer damaged files with errors of every kind
        raise WeightsError(f"{folder} is no readable Orbax checkpoint ({error}); convert or train again") from None


def leaf_differences(saved: OrbaxFolder, config: ModelConfig) -> list[str]:
    """One phrase for every leaf that is missing, left over, of another shape, or no float."""
    expected, found = leaf_shapes(config), saved.shapes
    problems = [f"missing: {path} {list(expected[path])}" for path in sorted(expected.keys() - found.keys())]
    problems += [f"left over: {path} {list(found[path])}" for path in sorted(found.keys() - expected.keys())]
    for path in sorted(expected.keys() & found.keys()):
        if expected[path] != found[path]:
            problems.append(f"wrong shape: {path} is {list(found[path])}, expected {list(expected[path])}")
        if saved.dtypes[path] not in STORED.values():
            problems.append(f"wrong dtype: {path} is {saved.dtypes[path].name}, expected one of {', '.join(STORED)}")
    return problems


# ---- an imported model -------------------------------------------------------------------------------------------------------------


def is_imported(folder: str | Path) -> bool:
    """Whether `monovl convert` made this folder."""
    return (Path(folder) / MARKER).is_file()


def _sizes(params: Path) -> dict[str, int]:
    sizes = [path.stat().st_size for path in params.rglob("*") if path.is_file()]
    return {"files": len(sizes), "bytes": sum(sizes)}


def write_marker(folder: Path, config: ModelConfig, dtypes: Mapping[str, np.dtype], names: list[str], origin: str) -> None:
    """Writes `model.json`, the last file of an imported model.

    names: those of the released tensors; with tied embeddings a source has one of two, or both. origin: `import` or `init`.
    """
    shapes = leaf_shapes(config)
    count = dict.fromkeys(sorted({dtype.name for dtype in dtypes.values()}), 0)
    for path, dtype in dtypes.items():
        count[dtype.name] += math.prod(shapes[path])
    marker = {"format": FORMAT, "layout": LAYOUT, "made_by": origin, "elements": count, "params": _sizes(folder / PARAMS)}
    marker["sha256"] = digests(folder / PARAMS)
    if config.decoder.tie_embeddings:
        marker["vocabulary_tensors"] = names
    write_json(folder / MARKER, marker)


def read_marker(folder: str | Path) -> dict[str, Any]:
    """`model.json` of an imported model. Raises WeightsError when it is absent, damaged, of another format, or files are missing."""
    path = Path(folder) / MARKER
    try:
        marker = jsontext.read(path)
        found = (marker["format"], marker["layout"])
    except FileNotFoundError:
        raise WeightsError(f"{folder} is no imported model: it has no {MARKER}; make one with `monovl convert import`") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path} cannot be read ({error}); import the model again") from None
    if found != (FORMAT, LAYOUT):
        raise WeightsError(f"{path} is {found[1]!r} of format {found[0]!r}, this version reads {LAYOUT!r} of {FORMAT}; import again")
    if (sizes := _sizes(Path(folder) / PARAMS)) != marker.get("params"):
        raise WeightsError(f"{Path(folder) / PARAMS} holds {sizes}, {MARKER} says {marker.get('params')}; import the model again")
    if not isinstance(marker.get("sha256", {}), dict):
        raise WeightsError(f"{path} cannot be read (sha256 is no object); import the model again")
    return marker


NO_DIGESTS = "was imported by a version that kept no digests, so damage to its weights cannot be noticed; import it again to have them"


def damaged_params(folder: str | Path, marker: Mapping[str, Any]) -> list[str] | None:
    """One phrase for every file of the parameters that is not what was written; None for a folder without digests."""
    return damaged(Path(folder) / PARAMS, marker["sha256"]) if "sha256" in marker else None


def verify_params(folder: str | Path, marker: Mapping[str, Any]) -> None:
    """Reads every file of the parameters and compares its digest; one line is logged where the folder has none.

    Raises WeightsError that names the first damaged files.
    """
    problems = damaged_params(folder, marker)
    if problems is None:
        logging.getLogger(__name__).warning("%s %s", folder, NO_DIGESTS)
    elif problems:
        raise WeightsError(f"{Path(folder) / PARAMS}: {'; '.join(problems[:3])}; import the model again, or load it with --no-verify")


def load_imported(
    folder: str | Path,
    config: ModelConfig,
    mesh: Mesh | None = None,
    dtype: str | np.dtype | type | None = None,
    verify: bool = True,
) -> dict[str, Any]:
    """The parameters of an imported model as a nested dict of jax arrays.

    Args:
      folder: made by `monovl convert import` or `init`.
      config: of the model (`read_config(folder)`).
      mesh: where to put them, by the rules of `monovl_jax.parallel.sharding`: each host reads only the chunks that its slices touch. By
        default on the first device.
      dtype: of every leaf; as stored by default.
      verify: compare the digest of every file first.

    Raises WeightsError when the folder is incomplete, damaged or of another model.
    """
    marker = read_marker(folder)
    if verify:
        verify_params(folder, marker)
    saved, wanted = open_orbax(Path(folder) / PARAMS), stored_dtype(dtype)
    if problems := leaf_differences(saved, config):
        raise WeightsError(f"{folder}: the parameters do not fit config.json: {'; '.join(problems[:5])}; import the model again")
    target: dict[str, Any] = {}
    for path, shape in saved.shapes.items():
        set_leaf(target, path, jax.ShapeDtypeStruct(shape, wanted or saved.dtypes[path]))
    first = SingleDeviceSharding(jax.local_devices()[0])
    places = jax.tree.map(lambda _: first, target) if mesh is None else parameter_shardings(target, mesh)
    target = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), target, places)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(Path(folder).absolute() / PARAMS, target)
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # as in `open_orbax`
        raise WeightsError(f"{Path(folder) / PARAMS} cannot be read ({_first_line(error)}); import the model again") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
