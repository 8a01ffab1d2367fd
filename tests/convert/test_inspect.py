"""inspect shows what is there, and names what is not."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from monovl_jax.config import ConfigError
from monovl_jax.convert.errors import WeightsError
from monovl_jax.convert.importer import import_model
from monovl_jax.convert.inspect import inspect_model
from monovl_jax.convert.key_table import key_table, upstream_shapes
from tests.convert.helpers import random_upstream, variant, write_model

CONFIG = variant("ffn+attention", vocab_size=331)


def test_a_folder_in_order_in_all_its_forms(tmp_path: Path) -> None:
    src = write_model(tmp_path / "src", CONFIG, random_upstream(CONFIG), shards=2)
    imported = import_model(src, tmp_path / "dst", dtype="bfloat16")
    for folder, kind, dtype in (
        (src, "released", "float32"),
        (imported, "imported", "bfloat16"),
        (imported / "params", "orbax", "bfloat16"),
    ):
        seen = inspect_model(folder)
        assert (seen.kind, seen.config, seen.problems) == (kind, CONFIG, ())
        assert seen.parameters == sum(math.prod(shape) for shape in upstream_shapes(CONFIG).values())
        assert [row.name for row in seen.rows] == [row.name for row in key_table(CONFIG)]
        assert all(row.dtypes == (dtype,) and row.found == row.expected for row in seen.rows)
        text = seen.text()
        assert f"{dtype} ({len(upstream_shapes(CONFIG))} tensors)" in text and "everything is there" in text
        assert f"{seen.parameters:,} in {len(upstream_shapes(CONFIG))} tensors" in text
        line = next(line for line in text.splitlines() if "feed_forward_ve.w2" in line)
        assert line.split("  ")[0] == "language_model.model.layers.{layer}.feed_forward_ve.w2.weight"
        assert "decoder/blocks/mlp/visual/down" in line and "[64, 96]" in line and line.endswith("2")


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    weights = random_upstream(CONFIG)
    gate = "language_model.model.layers.0.feed_forward_ve.w1.weight"
    weights[gate.replace("_ve", "_vf")] = weights.pop(gate)
    weights["mlp1.0.bias"] = weights["mlp1.0.bias"].astype(np.int32)
    seen = inspect_model(write_model(tmp_path / "src", CONFIG, weights))
    assert seen.problems == (
        f"left over: {gate.replace('_ve', '_vf')} [96, 64] (did you mean {gate}?)",
        f"missing: {gate} [96, 64]",
        "wrong dtype: mlp1.0.bias is I32, expected a float (F64, F32, F16, BF16)",
    )
    assert "3 problems:" in seen.text() and "1 of 2" in seen.text() and "I32" in seen.text()


def test_an_imported_folder_of_another_config(tmp_path: Path) -> None:
    imported = import_model(write_model(tmp_path / "src", CONFIG, random_upstream(CONFIG)), tmp_path / "dst")
    seen = inspect_model(imported, variant("ffn"))
    assert "left over: decoder/blocks/attention/visual/out [2, 64, 64]" in seen.problems
    assert inspect_model(imported, variant("ffn+attention", vocab_size=400)).problems == (
        "wrong shape: decoder/embedding is [384, 64], expected [512, 64]",
        "wrong shape: decoder/head is [64, 384], expected [64, 512]",
    )


def test_tied_embeddings_count_once(tmp_path: Path) -> None:
    config = variant(tie_embeddings=True)
    weights = random_upstream(config)
    weights["language_model.output.weight"] = weights.pop("language_model.model.tok_embeddings.weight")
    seen = inspect_model(write_model(tmp_path / "src", config, weights))
    assert not seen.problems and all(row.found == row.expected for row in seen.rows) and "tied to the embedding" in seen.text()


def test_no_model_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        inspect_model(tmp_path)
    src = write_model(tmp_path / "src", CONFIG, random_upstream(CONFIG))
    (src / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(WeightsError, match="no readable safetensors file"):
        inspect_model(src)
