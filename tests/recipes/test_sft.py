"""Weights come in, are fine-tuned on a user's data, go back out, and are the same model there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from monovl_jax import cli
from monovl_jax.config import config_from_json, config_to_json, tiny
from monovl_jax.convert.exporter import export_tree
from monovl_jax.data.meta import DataSet
from monovl_jax.model import Ops
from monovl_jax.pretrained import export, from_pretrained
from monovl_jax.recipes import launch, sft
from monovl_jax.training.checkpoint import load_run
from monovl_jax.training.trainable import digests, random_parameters
from tests.data.helpers import line, save_picture, tiny_tokenizer
from tests.recipes.test_launch import quick_compiles, reference_ops  # noqa: F401 (a fixture)

TEN = dict(steps=10, batch_size=2, sequence_length=64, checkpoint_every=100, threads=1, learning_rate=1e-2)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """released/ (weights and tokenizer as they are published), imported/, and data."""
    home = tmp_path_factory.mktemp("home")
    tiny_tokenizer().save(home / "tokenizer")
    released = export_tree(random_parameters(tiny(), 3), tiny(), home / "tokenizer", home / "released")
    assert cli.convert_import(released, home / "imported") == 0
    save_picture(home / "a.png", (32, 32))
    (home / "some.jsonl").write_bytes(b"".join([line("a.png"), *(line(None, question=f"say {i}", answer=str(i)) for i in range(6))]))
    (home / "meta.json").write_text(json.dumps({"some": {"root": ".", "annotation": "some.jsonl"}}))
    return home


def fine_tuned(home: Path, recipe: str, run: Path, **options: Any) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "make_ops", reference_ops)
        assert cli.train(recipe, data=home / "meta.json", init=home / "imported", run_dir=run, **{**TEN, **options}) == 0
    return run


@pytest.mark.parametrize("recipe", ["sft:lora", pytest.param("sft", marks=pytest.mark.slow)])
def test_import_train_export_reload(home: Path, tmp_path: Path, recipe: str) -> None:
    run = fine_tuned(home, recipe, tmp_path / "run")
    assert cli.convert_export(run, tmp_path / "out") == 0
    config, end = load_run(run)
    back = from_pretrained(tmp_path / "out")
    assert digests(back.params) == digests(end) and back.config == config
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}

    start, out = load_file(home / "released" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert start.keys() == out.keys()
    changed = {name for name in start if not np.array_equal(start[name], out[name])}
    projections = {name for name in start if ".attention.w" in name or ".feed_forward" in name}
    last = f"language_model.model.layers.{config.decoder.num_layers - 1}.feed_forward_ve"
    idle = {name for name in projections if name.startswith(last)}  # nothing after it reads visual tokens; only decay moves it
    assert idle and changed == projections - idle if recipe == "sft:lora" else changed >= projections
    assert "vision_model.embeddings.class_embedding" not in changed

    prompt = back.prompt("what is it?", [home / "a.png"])
    running = from_pretrained(run)
    ops = reference_ops()
    assert isinstance(ops, Ops)
    ours, theirs = (model.answer(model.generator(ops), [prompt], 4) for model in (running, back))
    assert ours == theirs


def test_save_pretrained_is_the_inverse(home: Path, tmp_path: Path) -> None:
    model = from_pretrained(home / "imported")
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/model.safetensors").read_bytes() == (home / "released/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is a model folder, not a run; it has no stage 'S2'"):
        export(home / "imported", tmp_path / "no", stage="S2")
    with pytest.raises(ValueError, match="is no folder"):
        from_pretrained(tmp_path / "nothing")


def test_one_stage_of_freezing(home: Path, tmp_path: Path) -> None:
    run = fine_tuned(home, "sft", tmp_path / "run", steps=2, trainable=("^projector/",))
    start, end = digests(from_pretrained(home / "imported").params), digests(load_run(run)[1])
    assert {path.split("/")[0] for path in start if start[path] != end[path]} == {"projector"}


@pytest.mark.parametrize(("dynamic", "tiles"), [(True, (6, 6, 4)), (False, (1, 1, 1))])
def test_a_model_without_dynamic_tiling_is_trained_on_one_tile_an_image(dynamic: bool, tiles: tuple[int, ...], tmp_path: Path) -> None:
    """Whatever the recipe, META.json and the rows of a stage would allow."""
    raw = json.loads(config_to_json(tiny())) | {"dynamic_image_size": dynamic}
    made = sft.recipe(config_from_json(json.dumps(raw)))
    own = launch.OwnData.__new__(launch.OwnData)
    own.model = made.model
    sets = [DataSet("a", tmp_path, tmp_path / "a.jsonl", max_dynamic_patch=most) for most in (None, 6, 4)]
    assert tuple(own.tiling(data, 0).max_tiles for data in sets) == tiles and sft.lora(made.model).model.max_tiles == tiles[0]
