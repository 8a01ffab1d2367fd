"""Generation and evaluation on a mesh of eight devices against one device."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow  # two programs of eight devices each


def test_eight_devices_answer_as_one(run_python) -> None:
    """Three prompts on four groups of rows: one row is filled up. A conversation's single row is refused, in one sentence."""
    run_python(
        """
import numpy as np
import pytest
from monovl_jax.inference.generate import Generator
from monovl_jax.inference.prompts import Prompt
from monovl_jax.inference.sampling import Sampling
from monovl_jax.model import Ops
from monovl_jax.parallel.mesh import MeshError, make_mesh
from tests.parallel.meshes import model
from tests.training.worlds import plain_parameters

config = model("ffn")
params = plain_parameters(config)
context, side = config.decoder.vocab_size - 1, config.vision.tile_size
rng = np.random.default_rng(0)

def prompt(n, tiles):
    ids = np.concatenate([np.full(tiles * config.vision.tokens_per_tile, context), rng.integers(0, context, n)]).astype(np.int32)
    return Prompt(ids, rng.integers(0, 256, (tiles, side, side, 3)).astype(np.uint8) if tiles else None)

prompts = [prompt(5, 1), prompt(9, 2), prompt(3, 0)]
mesh = make_mesh(2, 2, 2)
one, eight = (Generator(config, params, Ops(), context, [-1], 0, mesh=m) for m in (None, mesh))
assert len(eight.params["decoder"]["blocks"]["mlp"]["text"]["gate"].sharding.device_set) == 8
for sampling in (Sampling(), Sampling(temperature=1.0, seed=3)):
    want, got = (made(prompts, 6, sampling=sampling) for made in (one, eight))
    assert len(got) == 3
    for a, b in zip(want, got, strict=True):
        np.testing.assert_array_equal(a, b)
batch = {"tokens": np.ones((1, 4), np.int32)}
with pytest.raises(MeshError, match="the batch of prompts has 1 rows"):
    eight.read(batch, 4, 3, 8)
""",
        devices=8,
    )


def test_evaluation_on_eight_devices(run_python) -> None:
    run_python(
        """
import numpy as np
from monovl_jax.model import Ops
from monovl_jax.parallel.mesh import make_mesh
from monovl_jax.parallel.sharding import place_parameters
from monovl_jax.training.step import make_eval_step, place_batch
from monovl_jax.training.trainable import model_structure
from tests.parallel.meshes import model
from tests.training.worlds import image_rows, plain_parameters, text_rows

config = model("ffn")
params, graphdef = plain_parameters(config), model_structure(config).graphdef
batch = image_rows(config, 8, 24, 2, seed=1), text_rows(config, 8, 12, seed=2)
mesh = make_mesh(2, 2, 2)
want = make_eval_step(graphdef, Ops())(params, batch)
compiled = make_eval_step(graphdef, Ops(), mesh=mesh)
placed, rows = place_parameters(params, mesh), place_batch(batch, mesh)
got = compiled(placed, rows)
for key in want:
    np.testing.assert_allclose(float(got[key]), float(want[key]), rtol=1e-5)
assert "shard_map" in str(compiled.trace(placed, rows).jaxpr)  # kernels lie inside it
""",
        devices=8,
    )
