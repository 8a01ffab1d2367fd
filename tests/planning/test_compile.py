"""What a chip holds: the shardings' sum against the compiler's own figures, on eight CPU devices; what is kept of a compilation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from monovl_jax.planning.program import Memory, PlanError, Program, cache_folder, compile_program, program_key

STAGES = """
import dataclasses, json, math
from monovl_jax.parallel.mesh import make_mesh
from monovl_jax.planning.collectives import collectives
from monovl_jax.planning.compile import compile_stage
from monovl_jax.training.trainable import flatten, model_structure
from tests.training.worlds import recipe, stage
from pathlib import Path

of, found = recipe(), []
for name, sizes, cache in (("S1.1", (2, 2, 2), None), ("S2", (2, 4, 1), None)):
    rows = dataclasses.replace(of.stage(name), batch_size=16, text_rows=16, accumulation=2)
    compiled = compile_stage(of, rows, make_mesh(*sizes), "none")
    axes = [row.axes for row in collectives(compiled.text, dict(zip(("data", "fsdp", "tensor"), sizes)))]
    found.append([compiled.state, compiled.memory.arguments, compiled.memory.aliased, compiled.arguments, axes])
shapes = flatten(model_structure(of.model).shapes)
sizes = {path: math.prod(leaf.shape) for path, leaf in shapes.items()}
print(json.dumps([found, sizes, sorted(model_structure(of.model).stored)]))
"""

QUICK = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"


def test_arguments_are_the_sum_over_shardings(run_python) -> None:
    """Masters and moments of the visual parameters alone in S1.1, of everything in S2; the CPU compiler counts the same bytes."""
    (visual, everything), sizes, stored = json.loads(run_python(STAGES, XLA_FLAGS=QUICK).splitlines()[-1])
    whole = ("vision/", "decoder/norm", "decoder/blocks/attention_norm", "decoder/blocks/ffn_norm", "projector/norm", "projector/bias")
    batch = 16 * 20 * (5 * 4 + 1 + 4) + 16 * 4 * 4 + 16 * 32 * 32 * 3 + 16 * 8 * 5 * 4  # rows, visual slots, tiles, rows of text

    def held(chosen: list[str], pieces: int) -> int:
        return sum(sizes[path] // (1 if path.startswith(whole) else pieces) for path in chosen)

    for (state, arguments, aliased, shaped, axes), trained, pieces, groups in (
        (visual, ("vision/", "projector/", "decoder/blocks/mlp/visual/"), 2 * 2, 4),
        (everything, ("",), 4, 8),
    ):
        chosen = [path for path in sizes if path.startswith(trained) and path not in stored]
        masters = 4 * held(chosen, pieces)
        assert state["masters"] == masters
        assert 2 * masters < state["optimizer"] <= 2 * masters + 64  # two moments and a few counters
        assert state["frozen"] == 2 * held([path for path in sizes if path not in chosen and path not in stored], pieces)
        assert state["batch"] == batch // groups
        assert arguments == shaped == sum(state.values())
        assert aliased == state["masters"] + state["optimizer"]
        assert any("fsdp" in axis for axis in axes) and any("data" in axis for axis in axes)
    assert any("tensor" in axis for axis in visual[4]) and not any("tensor" in axis for axis in everything[4])


# ---- what is kept ------------------------------------------------------------------------------------------------------------------


class Lowered:
    """Stands for `jax.jit(f).lower(...)`: counts how often it is compiled."""

    def __init__(self, text: str, error: str = ""):
        self.text, self.error, self.compiled = text, error, 0

    def as_text(self) -> str:
        return self.text

    def compile(self) -> Any:
        self.compiled += 1
        if self.error:
            raise jax.errors.JaxRuntimeError(self.error)
        return jax.jit(lambda x: x + 1).lower(np.zeros(4, np.float32)).compile()


def test_a_program_is_compiled_once(tmp_path: Path) -> None:
    lowered, devices = Lowered("module"), jax.devices()[:1]
    first = compile_program(lowered, "it", 16, devices, {}, tmp_path)
    again = compile_program(lowered, "it", 16, devices, {}, tmp_path)
    assert lowered.compiled == 1 and not first.cached and again == dataclasses.replace(first, cached=True)
    assert first.memory.arguments == 16 and "HloModule" in first.text
    compile_program(lowered, "it", 16, devices, {"xla_option": True}, tmp_path)
    compile_program(Lowered("module"), "it", 16, devices, {}, None)
    assert lowered.compiled == 2
    (kept, _) = sorted(tmp_path.iterdir(), key=lambda path: path.name != f"{program_key('module', {}, devices)}.json.gz")
    kept.write_bytes(b"damaged")
    assert not compile_program(lowered, "it", 16, devices, {}, tmp_path).cached and lowered.compiled == 3
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "words",
    [
        "Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm. Exceeded hbm capacity by 4.75G.",
        "Ran out of memory on HBM, the total memory required for HLO temporaries (20.5G) exceeds available HBM (15.75G).",
    ],
)
def test_too_much_memory_is_a_result_and_kept(words: str, tmp_path: Path) -> None:
    lowered, devices = Lowered("large", f"RESOURCE_EXHAUSTED: {words}"), jax.devices()[:1]
    need = round(20.5 * 2**30) + (16 if "temporaries" in words else 0)
    expected = Program(Memory(over=need), "", 0.0)
    for cached in (False, True):
        program = compile_program(lowered, "it", 16, devices, {}, tmp_path)
        assert dataclasses.replace(program, seconds=0.0) == dataclasses.replace(expected, cached=cached)
    assert lowered.compiled == 1 and program.memory.peak == need


def test_another_refusal_is_told(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="stage 'S2': the TPU compiler refuses the program: INTERNAL: no such thing"):
        compile_program(Lowered("odd", "INTERNAL: no such thing\nmore"), "stage 'S2'", 16, jax.devices()[:1], {}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_key_holds_all_that_decides() -> None:
    devices = jax.devices()[:1]
    keys = {program_key("a", {}, devices), program_key("b", {}, devices), program_key("a", {"x": 1}, devices), program_key("a", {}, [])}
    assert len(keys) == 4 and program_key("a", {"x": 1, "y": 2}, devices) == program_key("a", {"y": 2, "x": 1}, devices)


def test_the_key_does_not_depend_on_what_was_traced_before() -> None:
    """Every `checkify.debug_check` of a process has its own number."""

    def lowered() -> str:
        def checked(x: jax.Array) -> jax.Array:
            checkify.debug_check(jnp.all(x > 0), "x is {}", x[0])
            return 2 * x

        return jax.jit(checked).lower(jnp.ones(3)).as_text()

    first, second = lowered(), lowered()
    assert program_key(first, {}, []) == program_key(second, {}, [])
    assert program_key(first, {}, []) != program_key(first.replace("dense<2.0", "dense<3.0"), {}, [])


def test_where_programs_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "monovl_jax" / "plan"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "monovl_jax" / "plan"
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert not compile_program(Lowered("module"), "it", 16, jax.devices()[:1], {}, blocked / "plan").cached
