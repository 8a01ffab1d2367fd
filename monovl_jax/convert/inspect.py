"""What a model folder holds, against what its config asks for: `monovl convert inspect`."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path

from monovl_jax.config import ModelConfig, read_config
from monovl_jax.convert.arrays import FLOATS
from monovl_jax.convert.checkpoint import (
    NO_DIGESTS,
    PARAMS,
    damaged_params,
    is_imported,
    leaf_differences,
    leaf_shapes,
    open_orbax,
    read_marker,
    row_names,
)
from monovl_jax.convert.folders import carried_files, own_file
from monovl_jax.convert.key_table import key_table
from monovl_jax.convert.weights import EMBEDDING, HEAD, WeightFiles, differences


@dataclasses.dataclass(frozen=True)
class TableRow:
    """One line of the key table: an upstream name (with `{layer}` for one per layer) and where it lives here.

    shape: upstream's. dtypes: what was found, empty when nothing was. found, expected: how many tensors.
    """

    name: str
    paths: tuple[str, ...]
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    found: int
    expected: int


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A model folder. kind: `released`, `imported` or `orbax`. parameters: elements of the expected tensors, padding and ties left out.

    problems: one line for each tensor that is missing, left over, of another shape or no float, and for each damaged file of an imported
    model; empty when all is well. digests: one line on whether the files of the parameters are what was written.
    """

    folder: Path
    kind: str
    config: ModelConfig
    rows: tuple[TableRow, ...]
    parameters: int
    files: tuple[str, ...]
    problems: tuple[str, ...]
    digests: str = "none in this layout"

    def text(self) -> str:
        """For people: sizes, the key table, and what is wrong."""
        v, d = self.config.vision, self.config.decoder
        dtypes = Counter({kind: 0 for row in self.rows for kind in row.dtypes})
        for row in self.rows:
            for kind in row.dtypes:
                dtypes[kind] += row.found if len(row.dtypes) == 1 else 0
        heads = f"{d.num_heads} heads, {d.num_kv_heads} kv heads of {d.head_dim}"
        rope = f"rope theta {d.rope.theta:g}" + ("" if d.rope.scaling == "none" else f", {d.rope.scaling} scaling {d.rope.factor:g}")
        head = "tied to the embedding" if d.tie_embeddings else "of its own"
        experts = {"none": "none", "ffn": "visual FFN", "ffn+attention": "visual FFN and attention"}[d.experts]
        facts = {
            "folder": f"{self.folder} ({self.kind})",
            "decoder": f"{d.num_layers} layers, width {d.hidden_size}, FFN {d.intermediate_size}, {heads}, {rope}",
            "experts": experts,
            "vocabulary": f"{d.vocab_size} rows ({d.padded_vocab_size} here), head {head}",
            "vision": f"patches of {v.patch_size} px, width {v.hidden_size}, tiles of {v.tile_size} px = {v.tokens_per_tile} tokens",
            "chat": f"template {self.config.template}, {self.config.min_tiles} to {self.config.max_tiles} tiles"
            + (" and a thumbnail" if self.config.use_thumbnail else ""),
            "parameters": f"{self.parameters:,} in {sum(row.found for row in self.rows)} tensors",
            "dtypes": ", ".join(f"{kind} ({count} tensors)" for kind, count in sorted(dtypes.items())) or "none",
            "digests": self.digests,
            "other files": ", ".join(self.files) or "none",
        }
        lines = [f"{key:<12} {value}" for key, value in facts.items()]
        cells = [("upstream", "here", "shape", "dtype", "tensors")]
        for row in self.rows:
            tensors = str(row.found) if row.found == row.expected else f"{row.found} of {row.expected}"
            cells.append((row.name, " + ".join(row.paths), str(list(row.shape)), "/".join(row.dtypes) or "-", tensors))
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        lines += ["", *("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells)]
        lines += ["", f"{len(self.problems)} problems:" if self.problems else "everything is there, nothing is left over"]
        return "\n".join([*lines, *(f"  {problem}" for problem in self.problems)])


def inspect_model(src: str | Path, config: ModelConfig | None = None, verify: bool = True) -> Inspection:
    """Looks at a released folder, an imported one, or an Orbax folder of parameters; reads no weight, but for the two names of a tied
    embedding, and for the digests of an imported model.

    Args:
      src: the folder.
      config: of the model; `config.json` of the folder (or, for the parameters of an imported model, of the folder above) by default.
      verify: compare the digest of every file of an imported model.

    Raises ConfigError without a readable config, WeightsError when a file is damaged.
    """
    src = Path(src)
    if not is_imported(src) and (src / "_METADATA").is_file():
        home = src if config is not None or (src / "config.json").is_file() else src.parent
        return _inspect_orbax(src, src, config or read_config(home), "orbax")
    own_file(src, "config.json")
    config = config or read_config(src)
    if is_imported(src):
        marker = read_marker(src)
        problems = damaged_params(src, marker) if verify else []
        seen = _inspect_orbax(src, src / PARAMS, config, "imported")
        state = f"of {len(marker.get('sha256', ()))} files, " + (
            "not checked" if not verify else "damaged" if problems else "all as written"
        )
        if problems is None:
            state = f"none: this folder {NO_DIGESTS}"
        return dataclasses.replace(seen, problems=(*seen.problems, *(problems or ())), digests=state)
    files = WeightFiles(src)
    shapes, rows = files.shapes, []
    for row in key_table(config):
        names = row_names(row, config)
        if row.name == EMBEDDING and EMBEDDING not in shapes and config.decoder.tie_embeddings:
            names = [HEAD]
        there = [name for name in names if name in shapes]
        kinds = (FLOATS[files.dtypes[name]].name if files.dtypes[name] in FLOATS else files.dtypes[name] for name in there)
        rows.append(TableRow(row.name, row.paths, row.shape, tuple(sorted(set(kinds))), len(there), len(names)))
    return _inspection(src, "released", config, rows, differences(files, config))


def _inspect_orbax(folder: Path, params: Path, config: ModelConfig, kind: str) -> Inspection:
    saved, rows = open_orbax(params), []
    shapes = leaf_shapes(config)
    for row in key_table(config):
        right = all(saved.shapes.get(path) == shapes[path] for path in row.paths)
        kinds = {saved.dtypes[path].name for path in row.paths if path in saved.dtypes}
        count = len(row_names(row, config))
        rows.append(TableRow(row.name, row.paths, row.shape, tuple(sorted(kinds)), count if right else 0, count))
    return _inspection(folder, kind, config, rows, leaf_differences(saved, config))


def _inspection(folder: Path, kind: str, config: ModelConfig, rows: list[TableRow], problems: list[str]) -> Inspection:
    count = sum(math.prod(row.shape) * row.expected for row in rows)
    files = tuple(path.name for path in carried_files(folder))
    return Inspection(folder, kind, config, tuple(rows), count, files, tuple(problems))
