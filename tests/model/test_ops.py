"""`Ops` is a value: what is equal compares equal, and compiles once."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from monovl_jax.inference.generate import Generator
from monovl_jax.inference.prompts import Prompt
from monovl_jax.model import Ops
from tests.model.helpers import random_params, tiny_with


def test_equal_fields_are_equal() -> None:
    for options in ({}, {"implementation": "xla"}, {"dtype": jnp.bfloat16, "remat": "full", "implementation": "reference"}):
        assert Ops(**options) == Ops(**options) and hash(Ops(**options)) == hash(Ops(**options))
        assert dataclasses.replace(Ops(**options), implementation=None) == Ops(**{**options, "implementation": None})
    assert Ops(implementation="xla") != Ops()
    assert dataclasses.replace(Ops(implementation="xla"), implementation="reference").by_expert(lambda **o: o)() == {
        "implementation": "reference"
    }


def test_over_a_mesh_too(run_python) -> None:
    run_python(
        """
from monovl_jax.model import Ops
from monovl_jax.parallel.mesh import make_mesh
from monovl_jax.parallel.ops import mesh_ops
one, two = (mesh_ops(Ops(), make_mesh(data=1, fsdp=2, tensor=1)) for _ in range(2))
assert one == two and hash(one) == hash(two) and one != Ops()
assert one != mesh_ops(Ops(), make_mesh(data=2, fsdp=1, tensor=1))
""",
        devices=2,
    )


def test_a_second_generator_compiles_nothing() -> None:
    config = tiny_with("ffn")
    params, events = random_params(config), []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: events.append(event) if event == "/jax/core/compile/backend_compile_duration" else None
    )

    def answer() -> np.ndarray:
        made = Generator(config, params, Ops(implementation="xla"), 299, [12345], 7)
        return made([Prompt(np.arange(5, dtype=np.int32))], 3)[0]

    first = answer()
    assert events
    events.clear()
    np.testing.assert_array_equal(answer(), first)
    assert not events
