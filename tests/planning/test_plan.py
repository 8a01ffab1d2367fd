"""The command as a user meets it, with devices that are not there: choices, refusals before compiling, what is printed and written."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from jax.sharding import AxisType, Mesh
from PIL import Image

from monovl_jax import cli
from monovl_jax.parallel.mesh import AXES, device_grid, mesh_shape
from monovl_jax.planning import compile as compiling
from monovl_jax.planning import plan as planning
from monovl_jax.planning import program, report
from monovl_jax.planning import sweep as sweeping
from monovl_jax.planning.collectives import Collective
from monovl_jax.planning.compile import CompiledStage
from monovl_jax.planning.estimate import CHIPS, FILL, Costs
from monovl_jax.planning.plan import StagePlan, fitted, mend, notes
from monovl_jax.planning.program import Memory, Program
from monovl_jax.recipes.evip import evip_2b
from tests.parallel.test_mesh import Device, grid_of
from tests.training.worlds import recipe, stage

GIB = 2**30


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Sixteen devices of a v5e:4x4 for every topology; what would be compiled is only listed."""
    asked: list[Any] = []

    def compile_stage(*arguments: Any) -> Any:
        asked.append(arguments)
        raise AssertionError("compiled")

    def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Any = ()) -> Mesh:  # the real one's types want real devices
        return Mesh(device_grid(mesh_shape(len(devices), data, fsdp, tensor), devices), AXES, axis_types=(AxisType.Auto,) * 3)

    for module in (compiling, sweeping):
        monkeypatch.setattr(module, "make_mesh", make_mesh)
    monkeypatch.setattr(planning, "topology", lambda name: [Device(n, device_kind="TPU v5 lite") for n in range(16)])
    monkeypatch.setattr(planning, "compile_stage", compile_stage)
    return asked


def said(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """The one sentence of a refusal."""
    printed = capsys.readouterr()
    assert code == 2 and printed.out == "" and printed.err.count("\n") == 1 and printed.err.startswith("monovl plan: ")
    return printed.err


@pytest.mark.parametrize("name", ["v5e", "v5e:4", "v5e:4x4; rm", "V5E:4x4", "v5e:4x4x4x4", ""])
def test_a_topology_that_is_no_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = said(capsys, cli.plan("evip", topology=name))
    assert f"the topology {name!r} is not of the form GENERATION:SIZES; write v5e:4x4" in words


def test_without_libtpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(program.importlib.util, "find_spec", lambda name: None if name == "libtpu" else found(name))
    words = said(capsys, cli.plan("evip", topology="v5e:4x4"))
    assert "libtpu, the TPU compiler, is not installed; pip install 'monovl_jax[aot]'" in words


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"mesh_fsdp": 3}, "fsdp 3, tensor 1 does not fit 16 devices; change sizes so that they multiply to 16"),
        ({"mesh_data": 2, "mesh_fsdp": 4}, "data 2, fsdp 4, tensor 1 does not fit 16 devices"),
        ({"mesh_tensor": 16}, "cannot be divided over 16 devices of the mesh axis 'tensor': the 8 kv heads of the model"),
        ({"stages": ("S2",), "batch_size": 24}, "stage 'S2': batch_size has 24 rows a micro-batch, which 16 devices"),
        ({"stages": ("S2",), "accumulation": 128}, "stage 'S2': batch_size has 8 rows a micro-batch, which 16 devices"),
        ({"stages": ("S2",), "accumulation": 3}, "stage 'S2': batch_size is 1024, no multiple of accumulation 3"),
        ({"stages": ("S9",)}, "has no stage 'S9'"),
        ({"topology": "v9z:4x4"}, "v9z chips are not in the table of this command; use one of v5e, v5p, v6e"),
    ],
)
def test_what_does_not_divide_is_told_before_compiling(
    flags: dict[str, Any], words: str, no_compiler: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in said(capsys, cli.plan("evip", **{"topology": "v5e:4x4", **flags}))
    assert no_compiler == []


@pytest.mark.parametrize("where", ["", "none/plan.json", "file/plan.json"])
def test_a_place_that_cannot_be_written(where: str, tmp_path: Path, no_compiler: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for files in ({"out": tmp_path / where}, {"picture": tmp_path / where}):
        words = said(capsys, cli.plan("evip", topology="v5e:4x4", out=files.get("out"), picture=files.get("picture")))
        assert f"{tmp_path / where} cannot be written; give a file in a folder that is there" in words
    assert no_compiler == []


# ---- choices -----------------------------------------------------------------------------------------------------------------------


def test_micro_batches_are_as_few_as_fit() -> None:
    of = recipe(stages=(stage(batch_size=65_536, text_rows=0, text_length=0, text_mixture={}, accumulation=1),))
    mesh = grid_of((1, 4, 1))
    numbers = [fitted(of, of.stages[0], mesh, "save_projections", hbm).stage.accumulation for hbm in (2**40, 2**30, 2**29, 1)]
    assert numbers == sorted(numbers) and numbers[0] == 1 and 1 < numbers[1] < numbers[2] and numbers[3] == 65_536 // 4


HLO = f"HloModule jit_step, entry_computation_layout={{(f32[{GIB - 256}]{{0:T(128)}}, u8[1024]{{0}})->f32[4]{{0}}}}\n"


def compiled(peak: int, over: bool = False, **changes: Any) -> CompiledStage:
    state = {"masters": GIB, "optimizer": 2 * GIB, "frozen": GIB, "batch": 0}
    memory = Memory(over=peak) if over else Memory(4 * GIB, 3 * GIB, 3 * GIB, peak - 4 * GIB, 0)
    return CompiledStage(stage(text_rows=0, text_length=0, text_mixture={}, **changes), state, Program(memory, HLO, 60.0), 4.0)


def test_the_mend() -> None:
    of, mesh = recipe(), grid_of((2, 2, 1))
    large = compiled(22 * GIB, over=True, batch_size=16, accumulation=2)
    assert mend(large, of, mesh, "save_projections", 16 * GIB) == (
        "needs 1.4x the HBM: try --accumulation 4 or --mesh.fsdp 4 or --mesh.tensor 2 or --remat full"
    )
    last = compiled(22 * GIB, over=True, batch_size=4, accumulation=1)
    assert mend(last, of, grid_of((1, 4, 1)), "full", 16 * GIB) == "needs 1.4x the HBM: try --mesh.tensor 2"
    assert mend(last, of, grid_of((1, 2, 2)), "full", 16 * GIB) == "needs 1.4x the HBM: try --accumulation 2"
    assert mend(compiled(22 * GIB, over=True), of, grid_of((1, 4, 1)), "full", 8 * GIB).startswith("needs 2.8x the HBM")
    assert mend(compiled(12 * GIB), of, mesh, "none", 16 * GIB) == ""


def test_notes() -> None:
    body = "%b (p: f32[]) -> f32[] {\n  %s = f32[] all-reduce(%p), replica_groups={}\n}\n"
    loop = "ENTRY %main (p: f32[]) -> f32[] {\n  %w = (s32[]) while(%x), condition=%c, body=%b"
    assert notes(body + loop + ', backend_config={"known_trip_count":{"n":"3"}}\n}') == []
    assert notes(body + loop + "\n}") == ["1 loops have no known trip count; the collectives in them are counted once"]


def test_the_plain_command_takes_the_faster_remat_that_fits(no_compiler: list[Any]) -> None:
    """S2 of the 2B model: nothing kept of the layers on 16 chips of 16 GB, what spares arithmetic where there is room."""
    of, mesh = evip_2b(), sweeping.make_mesh(1, 16, 1, devices=[Device(n, device_kind="TPU v5 lite") for n in range(16)])
    last = of.stage("S2")
    small, remat = planning.fastest(of, last, mesh, CHIPS["v5e"].hbm, name="v5e:4x4")
    assert remat == "full" and small.stage.accumulation > 1
    large, remat = planning.fastest(of, last, mesh, 20 * CHIPS["v5e"].hbm, name="v5e:4x4")
    assert remat == "save_projections" and large.stage.accumulation < small.stage.accumulation
    found, remat = planning.fastest(of, last, mesh, CHIPS["v5e"].hbm, name="v5e:4x4", accumulation=4, remat="none")
    assert (found.stage, remat) == (dataclasses.replace(last, accumulation=4), "none")


def test_where_the_compiler_disagrees_more_micro_batches_are_tried(no_compiler: list[Any], monkeypatch, capsys) -> None:
    """A program that needs half as much again as there is: the next is chosen by that, and no third is needed."""
    tried: list[int] = []
    factors: list[float] = []

    def plan_stage(of: Any, stage: Any, mesh: Mesh, remat: str, name: str, hbm: int, *rest: Any) -> StagePlan:
        tried.append(stage.accumulation)
        need = planning.fitted(of, stage, mesh, remat, hbm, stage.accumulation).need
        factors.append(1.5 * hbm / need)
        peak = int(factors[0] * need)
        memory = Memory(over=peak) if peak > hbm else Memory(temporaries=peak)
        program = dataclasses.replace(compiled(GIB).program, memory=memory, text="")
        return dataclasses.replace(planned(), compiled=dataclasses.replace(compiled(GIB), stage=stage, program=program), hbm=hbm)

    monkeypatch.setattr(planning, "plan_stage", plan_stage)
    assert cli.plan("evip", topology="v5p:2x2x4", stages=("S1.3",)) == 0
    assert len(tried) == 2 and tried[0] < tried[1]
    tried.clear()
    factors.clear()
    assert cli.plan("evip", topology="v5p:2x2x4", stages=("S1.3",), accumulation=1) == 1 and tried == [1]


def test_a_sweep_ranks_by_formula_and_compiles_three(no_compiler: list[Any], monkeypatch, tmp_path: Path, capsys) -> None:
    seen: list[tuple[dict[str, int], str]] = []

    def plan_stage(of: Any, stage: Any, mesh: Mesh, remat: str, *rest: Any) -> StagePlan:
        seen.append((dict(mesh.shape), remat))
        return dataclasses.replace(planned(), mesh=dict(mesh.shape), remat=remat)

    monkeypatch.setattr(planning, "plan_stage", plan_stage)
    out, picture = tmp_path / "sweep.json", tmp_path / "sweep.png"
    assert cli.plan("evip", topology="v5p:2x2x4", stages=("S2",), sweep=True, mesh_tensor=2, out=out, picture=picture) == 0
    assert len(seen) == 3 and all(sizes["tensor"] == 2 and sizes["data"] * sizes["fsdp"] == 8 for sizes, _ in seen)
    printed = capsys.readouterr().out
    assert "candidates fit by the formula" in printed and "compiled, fastest first (3)" in printed
    (stage_told,) = json.loads(out.read_text())["stages"]
    steps = [(candidate["step"], candidate["mesh"]["fsdp"]) for candidate in stage_told["candidates"]]
    assert all(step <= 1.011 * later for (step, _), (later, _) in itertools.pairwise(steps)) and len(stage_told["compiled"]) == 3
    alike = [fsdp for step, fsdp in steps if step <= 1.0001 * steps[0][0]]
    assert alike == sorted(alike)
    assert all(candidate["filled"] <= FILL and candidate["mesh"]["tensor"] == 2 for candidate in stage_told["candidates"])
    assert seen == [(candidate["mesh"], candidate["remat"]) for candidate in stage_told["candidates"][:3]]
    with Image.open(picture) as image:
        assert image.height > 300
    words = said(capsys, cli.plan("evip", topology="v5e:4x4", stages=("S2",), sweep=True, mesh_fsdp=1, mesh_tensor=1))
    assert "stage 'S2': no mesh fits v5e:4x4 by the formula" in words


def test_guessed_collectives() -> None:
    """Two layers of hidden 64 and FFN 96 with a head of 384 columns: gathered twice in bfloat16, gradients in float32."""
    of = recipe()
    layers = 2 * (64 * 2 * 4 * 16 + 64 * 64 + 2 * 3 * 64 * 96)
    shape = sweeping.guessed_collectives
    rest = 64 * 384 + (128 * 64 + 64 * 64)  # head, projector: 32 * 4 and 64 columns in, 64 out
    rows = {row.axes: row for row in shape(of.model, of.stage("S2"), of.trainable_paths(of.stage("S2")), grid_of((1, 4, 1)).shape, "none")}
    assert list(rows) == ["fsdp"]
    both = shape(of.model, of.stage("S2"), of.trainable_paths(of.stage("S2")), grid_of((2, 4, 2)).shape, "none")
    gathers, scattered, summed, activations = both
    assert gathers.bytes == 2 * 2 * 2 * (layers + rest) // 2 and gathers.axes == "fsdp"  # two passes, two micro-batches, half of each
    assert scattered.bytes == 2 * 4 * (layers + rest) // 2 and scattered.kind in ("reduce-scatter", "all-reduce")
    assert summed.axes == "data" and activations.axes == "tensor"
    assert activations.bytes == 4 * 2 * 96 // 8 * 64 * 2  # 4 sums a layer of 96 tokens over 8 groups, bfloat16, hidden 64, two layers


# ---- what is printed and written ---------------------------------------------------------------------------------------------------

COSTS = Costs(1e15, 1.5e15, 2.0, 1.0, 0.5, 1.0, 2.5, 40_000.0, 0.4, 3.0)
ROWS = [Collective("all-gather", "fsdp", 4, 3 * 10**9, 48, True)]


def planned(fits: bool = True, extra: int = 0) -> StagePlan:
    found = compiled(12 * GIB) if fits else compiled(22 * GIB, over=True)
    if extra:
        program = dataclasses.replace(found.program, text=HLO.replace("u8[1024]", f"u8[{1024 + extra}]"))
        found = dataclasses.replace(found, program=program)
    rows, costs, told = (ROWS, COSTS, "") if fits else ([], None, "needs 1.4x the HBM: try --remat full")
    kernels = {"routed_swiglu": 48} if fits else {}
    mesh = {"data": 1, "fsdp": 4, "tensor": 1}
    return StagePlan(found, mesh, "save_projections", CHIPS["v5e"].hbm, rows, kernels, costs, told, ["a note"])


def test_lines_of_a_stage() -> None:
    text = "\n".join(report.stage_lines(planned()))
    for words in (
        "S1.1: fits   (compiled in 60 s)",
        "--mesh.data 1 --mesh.fsdp 4 --mesh.tensor 1 --accumulation 2 --remat save_projections",
        "masters 1.00 GiB, optimizer 2.00 GiB, frozen 1.00 GiB, batch 0.00 GiB",
        "12.00 GiB of 15.75 GiB, headroom 3.75 GiB: arguments 4.00 GiB, temporaries 8.00 GiB",
        "arguments          4,294,967,296 bytes, equal to the sum over shardings; layouts add 0.00 GiB",
        "routed_swiglu x48",
        "all-gather         over fsdp (4): 3 GB in 48 runs, asynchronous",
        "compute 2.00, HBM 1.00, communication waited for 0.50, asynchronous 1.00, exposed 0.50",
        "40,000 tokens/s, MFU 40%; 24 rows in 3.0 days",
        "note: a note",
    ):
        assert words in text
    assert "+512 against the sum over shardings" in "\n".join(report.stage_lines(planned(extra=512)))
    refused = "\n".join(report.stage_lines(planned(fits=False)))
    assert "S1.1: does not fit, needs 1.4x the HBM: try --remat full" in refused and "22.00 GiB of 15.75 GiB" in refused
    assert "estimated" not in refused and "arguments" not in refused
    assert any("no TPU has run this" in line for line in report.closing_lines())


def test_json_and_picture(tmp_path: Path) -> None:
    plans = [planned(), planned(fits=False)]
    report.write_json(tmp_path / "plan.json", "tiny", "v5e:4x4", plans)
    told = json.loads((tmp_path / "plan.json").read_text())
    assert (told["recipe"], told["topology"]) == ("tiny", "v5e:4x4") and len(told["assumptions"]) >= 5
    fits, refused = told["stages"]
    assert fits["fits"] and fits["memory_bytes"]["peak"] == 12 * GIB and fits["memory_bytes"]["headroom"] == CHIPS["v5e"].hbm - 12 * GIB
    assert (
        fits["arguments_bytes"] == sum(fits["state_bytes"].values()) == 4 * GIB
        and fits["costs"]["exposed"] == pytest.approx(0.5)
        and "text" not in json.dumps(list(fits))
    )
    assert not refused["fits"] and refused["costs"] is None and refused["memory_bytes"]["peak"] == 22 * GIB
    report.write_picture(tmp_path / "plan.png", "a title", plans)
    with Image.open(tmp_path / "plan.png") as picture:
        assert picture.width > 400
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "plan.png"]


@pytest.mark.parametrize("fits", [True, False])
def test_the_command(fits: bool, tmp_path: Path, no_compiler: list[Any], monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1 and the mend when a stage does not fit; the files are written all the same."""
    monkeypatch.setattr(planning, "plan_stage", lambda *arguments: planned(fits))
    code = cli.plan("evip", topology="v5e:4x4", stages=("S2",), out=tmp_path / "plan.json", picture=tmp_path / "plan.png")
    printed = capsys.readouterr()
    assert code == (0 if fits else 1) and ("does not fit, needs 1.4x the HBM" in printed.out) == (not fits)
    assert printed.err.startswith("compiling S2 for v5e:4x4: mesh {'data': 1, 'fsdp': 16, 'tensor': 1}, accumulation ")
    assert json.loads((tmp_path / "plan.json").read_text())["recipe"] == "evip" and (tmp_path / "plan.png").is_file()
