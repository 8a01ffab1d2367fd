"""A folder in the released layout -> a folder that JAX restores: `monovl convert import`."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np

from monovl_jax import jsontext
from monovl_jax.config import ModelConfig, read_config
from monovl_jax.convert.arrays import FLOATS, stored_dtype
from monovl_jax.convert.checkpoint import PARAMS, Source, leaf_dtypes, leaf_shapes, write_marker, write_params
from monovl_jax.convert.errors import WeightsError
from monovl_jax.convert.folders import carried_files, check_destination, new_folder, own_file
from monovl_jax.convert.weights import EMBEDDING, HEAD, WeightFiles, check_names
from monovl_jax.convert.workers import Progress, silent

_SLACK = 16 << 20  # tokenizer, metadata


def released_source(files: WeightFiles) -> Source:
    """The tensors of a released folder; a tied embedding that is stored under the other name is found there."""
    dtypes = {name: FLOATS[code] for name, code in files.dtypes.items() if code in FLOATS}
    other = EMBEDDING not in files.shapes
    if other and HEAD in dtypes:
        dtypes[EMBEDDING] = dtypes[HEAD]
    return Source(lambda name: files.read(HEAD if other and name == EMBEDDING else name), dtypes, str(files.folder))


def with_dtype(config_json: str, dtype: np.dtype) -> str:
    """A `config.json` whose `torch_dtype` fields say `dtype`; those absent stay absent."""
    raw = jsontext.loads(config_json)
    for part in (raw, raw.get("llm_config"), raw.get("vision_config")):
        for key in ("torch_dtype", "dtype"):
            if isinstance(part, dict) and part.get(key) is not None:
                part[key] = dtype.name
    return json.dumps(raw, indent=2, ensure_ascii=False) + "\n"


def bytes_to_write(config: ModelConfig, source: Source, dtype: np.dtype | None) -> int:
    """Size of the parameters on the disk."""
    shapes = leaf_shapes(config)
    return sum(math.prod(shapes[path]) * kind.itemsize for path, kind in leaf_dtypes(config, source, dtype).items()) + _SLACK


def build(
    folder: Path,
    config: ModelConfig,
    source: Source,
    dtype: np.dtype | None,
    names: list[str],
    origin: str,
    progress: Progress,
) -> None:
    """Fills an empty folder: parameters, then the marker."""
    try:
        write_params(folder / PARAMS, config, source, dtype, progress)
    except WeightsError:
        raise
    except ValueError as error:  # how tensorstore reports a full disk or a missing permission
        raise WeightsError(f"{folder.parent} cannot be written ({error}); make room or change the permissions") from error
    write_marker(folder, config, leaf_dtypes(config, source, dtype), names, origin)


def import_model(src: str | Path, dst: str | Path, dtype: str | None = None, progress: Progress = silent) -> Path:
    """Converts a released folder into an imported one (docs/conversion.md), tensor by tensor; returns `dst`.

    Args:
      src: config.json with safetensors (or `.bin`, with the extra `torch`), single or sharded.
      dst: new, or an empty folder. It appears when everything is in it; an interrupted import leaves nothing that loads.
      dtype: float32, bfloat16 or float16 for every tensor; as stored by default.
      progress: called with bytes done and bytes in all.

    Raises ConfigError or WeightsError with what is wrong in `src`, or why `dst` cannot be made; nothing is written then.
    """
    src, dst, wanted = Path(src), Path(dst), stored_dtype(dtype)
    own_file(src, "config.json")
    config = read_config(src)
    check_destination(dst, src)
    files = WeightFiles(src)
    check_names(files, config)
    source, carried = released_source(files), carried_files(src)
    needed = bytes_to_write(config, source, wanted)
    with new_folder(dst, src, needed) as folder:
        for file in carried:
            shutil.copyfile(file, folder / file.name)
        text = (src / "config.json").read_bytes()
        changed = wanted is not None and any(kind != wanted for kind in source.dtypes.values())
        (folder / "config.json").write_bytes(with_dtype(text.decode("utf-8"), wanted).encode() if changed and wanted else text)
        names = sorted({EMBEDDING, HEAD} & files.shapes.keys())
        build(folder, config, source, wanted, names, "import", progress)
    return dst
