"""Small model folders, and looking at what became of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from monovl_jax.config import ModelConfig, config_to_json, tiny
from monovl_jax.convert.key_table import upstream_shapes

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = sorted(path.parent for path in (ROOT / "tests/golden").glob("mono_internvl*/*/config.json"))


def variant(experts: Any = "ffn", **decoder: Any) -> ModelConfig:
    base = tiny(experts)
    return dataclasses.replace(base, decoder=dataclasses.replace(base.decoder, **decoder))


def random_upstream(config: ModelConfig, seed: int = 0, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in upstream_shapes(config).items()}


def write_model(folder: Path, config: ModelConfig, weights: dict[str, np.ndarray], shards: int = 1) -> Path:
    """A released folder of the weights, dealt over shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config_to_json(config), encoding="utf-8")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2]}', encoding="utf-8")
    (folder / "added_tokens.json").write_text('{"<img>": 291}', encoding="utf-8")
    (folder / "tokenization_x.py").write_text("raise SystemExit('executed')\n", encoding="utf-8")
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    index = {}
    for i in range(shards):
        part, file = dict(list(weights.items())[i::shards]), f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """name -> (dtype, shape, bytes) of every tensor in the safetensors files of a folder, read without our code."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + size]).items():
            if name != "__metadata__":
                start, stop = (8 + size + offset for offset in entry["data_offsets"])
                assert name not in found
                found[name] = (entry["dtype"], tuple(entry["shape"]), data[start:stop])
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
