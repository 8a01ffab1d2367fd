"""Prefill and decode of a tiny model, compiled for one CPU device in the place of a chip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import pytest

from monovl_jax import cli
from monovl_jax.config import tiny
from monovl_jax.planning import serve as serving
from monovl_jax.planning.estimate import CHIPS
from monovl_jax.training.trainable import flatten, model_structure


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(serving, "known_topology", lambda name: (jax.devices()[:1], CHIPS["v5e"].hbm))
    monkeypatch.setattr(serving, "peak_flops", lambda kind: 197e12)


def test_prefill_and_decode_of_a_batch(one_device: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two rows of 32 slots with 8 more in the cache: weights and cache to the byte, and what the compiler counts as arguments."""
    out = tmp_path / "serve.json"
    assert cli.plan("tiny", topology="v5e:1x1", serve=True, batch_size=2, sequence_length=30, new_tokens=6, out=out) == 0
    told, config = json.loads(out.read_text()), tiny()
    weights = 2 * sum(leaf.size for leaf in flatten(model_structure(config).shapes).values())
    cache = 2 * 2 * config.decoder.num_layers * 2 * config.decoder.num_kv_heads * 40 * config.decoder.head_dim + 2 * 40 * 4 + 4
    for name in ("prefill", "decode"):
        assert told[name]["state_bytes"]["weights"] == weights and told[name]["fits"] and told[name]["seconds"] > 0
        assert 0 < told[name]["memory_bytes"]["arguments"] <= sum(told[name]["state_bytes"].values())
    assert told["decode"]["state_bytes"]["cache"] == cache
    batch = 2 * 32 * (4 + 1 + 4 + 4 + 4) + 2 * 4 * 4 * 4 + 2 * 4 * 32 * 32 * 3 + 8  # four tiles of 4 tokens a row, two scalars
    assert told["prefill"]["state_bytes"]["batch"] == batch
    assert told["first_token_seconds"] == told["prefill"]["seconds"]
    assert told["tokens_per_second_per_chip"] == pytest.approx(12 / (told["prefill"]["seconds"] + 5 * told["decode"]["seconds"]))
    printed = capsys.readouterr().out
    assert "tiny: 2 rows of 30 + 6 tokens on each chip: fits" in printed and "first token after" in printed
    again = serving.serve(config, "v5e:1x1", rows=2, prompt=30, new=6)
    assert again.prefill.program.cached and again.decode.program.cached


def test_a_long_prompt_is_read_in_pieces(one_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "PIECE", 16)
    found = serving.serve(tiny(), "v5e:1x1", rows=1, prompt=40, new=4)
    assert found.pieces == 3 and "cache" in found.prefill.state
    assert found.first_token is not None and found.first_token == pytest.approx(3 * (found.prefill.seconds or 0))


@pytest.mark.parametrize(
    ("model", "sizes", "words"),
    [
        ("mono", {}, "no model is called 'mono'; known: mono_internvl_2b"),
        ("tiny", {"new_tokens": 0}, "new_tokens is 0; give at least 1"),
        ("tiny", {"batch_size": -1}, "batch_size is -1; give at least 1"),
        ("tiny", {"sweep": True, "mesh_fsdp": 8}, "not training; leave out --mesh.fsdp, --sweep"),
    ],
)
def test_what_cannot_be_served(model: str, sizes: dict[str, Any], words: str, one_device: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.plan(model, topology="v5e:1x1", serve=True, **sizes) == 2  # pyright: ignore[reportArgumentType]
    printed = capsys.readouterr()
    assert words in printed.err and printed.out == ""
