"""The benchmark at a toy size, what it counts as needed work, and the baselines that are not ours."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import aot_tpu, benchmark, make_routing, ragged, routed_swiglu
from tests.pallas_kernels.helpers import close, make_inputs
from tests.quick import quick_jit


def test_every_implementation_is_timed_against_the_dense_layer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr("pallas_kernels.routing.BLOCKS", 2)
    monkeypatch.setattr(jax, "jit", quick_jit)
    monkeypatch.setattr(benchmark, "PEAKS", {"cpu": (1e12, 1e11)})
    out = tmp_path / "new" / "times.json"
    sizes = ["--tokens", "12", "--width", "3", "--inner", "4", "--rounds", "2", "--dtype", "bfloat16"]
    monkeypatch.setattr("sys.argv", ["benchmark", *sizes, "--out", str(out)])
    benchmark.main()
    result = json.loads(out.read_text())
    assert result["tokens"] == 12 and result["device"] == "cpu" and out.with_suffix(".png").stat().st_size > 1000
    for share in benchmark.SHARES:
        for what in benchmark.PASSES:
            mine = {r["implementation"]: r for r in result["records"] if (r["share"], r["pass"]) == (share, what)}
            assert mine.keys() >= {"dense", "reference", "xla", "ragged"} and not mine.keys() & {"pallas_tpu", "pallas_gpu"}
            assert mine["dense"]["ratio"] == 1
            for r in mine.values():
                assert r["ratio"] == pytest.approx(r["seconds"] / mine["dense"]["seconds"])
                trained = {0: None, 1: (share,), 2: (share, 1 - share)}[benchmark.PASSES.index(what)]
                used = 1 if share in (0, 1) else 2
                if r["implementation"] == "dense":
                    used, trained = 1, trained and (1.0,)
                operations, moved = benchmark.needed(12, 3, 4, 2, used, trained)
                assert r["of matmul peak"] == pytest.approx(operations / r["seconds"] / 1e12)
                assert r["of bandwidth"] == pytest.approx(moved / r["seconds"] / 1e11)
    assert capsys.readouterr().out.count("of matmul peak") == len(result["records"])


@pytest.mark.parametrize(
    ("used", "trained", "operations", "numbers"),
    [
        (2, None, 6 * 12, 2 * 10 * 3 + 2 * 36),
        (1, None, 6 * 12, 2 * 10 * 3 + 36),  # the other expert is not read
        (1, (0.0,), 12 * 12, 4 * 10 * 3 + 4 * 10 * 4 + 3 * 36),  # read twice, and zeros for the trained one
        (2, (0.5,), 15 * 12, 4 * 10 * 3 + 4 * 10 * 4 + 5 * 36),
        (2, (0.5, 0.5), 18 * 12, 4 * 10 * 3 + 4 * 10 * 4 + 6 * 36),
    ],
)
def test_the_work_that_nothing_can_do_without(used: int, trained: tuple | None, operations: int, numbers: int) -> None:
    """10 tokens, 3 -> 4: operations in multiples of the tokens, numbers moved."""
    assert benchmark.needed(10, 3, 4, 2, used, trained) == (10 * operations, 2 * numbers)


def test_megablox_is_called_as_it_should_be() -> None:
    x, experts, dy = make_inputs("swiglu", (100, 128, 256))
    expert = jax.numpy.asarray(np.random.default_rng(0).integers(-1, 2, 100))

    def run(x, experts, dy, ours):
        routing = make_routing(expert, row_multiple=128)

        def f(x, experts):
            if ours:
                return routed_swiglu(x, experts, routing, "reference")
            return ragged.routed_swiglu(x, experts, routing, functools.partial(ragged._megablox, interpret=True))

        y, pull = jax.vjp(f, x, experts)
        return y, pull(dy)

    want, got = (quick_jit(functools.partial(run, ours=ours))(x, experts, dy) for ours in (True, False))
    close(got, want, 1e-5)


def test_others_are_those_that_run_here() -> None:
    assert "megablox" not in ragged.others()
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("chip",), abstract_device=device)):
        assert "megablox" in ragged.others()


def test_the_estimate_of_many_tokens_is_a_line_through_two_sizes() -> None:
    assert aot_tpu.compiled_tokens("v6e", 4096, "forward") == (4096,) and aot_tpu.compiled_tokens("v6e", 16384, "floor: x up") == (16384,)
    assert aot_tpu.compiled_tokens("v5e", 16384, "forward") == (4096, 5120)
    sizes = aot_tpu.compiled_tokens("v6e", 16384, "forward")
    cycles = [{"routed_ffn": 30.0 + 2.0 * tokens} for tokens in sizes]
    assert aot_tpu.extended(sizes, cycles, 16384) == {"routed_ffn": 30.0 + 2.0 * 16384}
    assert aot_tpu.extended((4096,), [{"routed_ffn": 7.0}], 4096) == {"routed_ffn": 7.0}


def test_the_pairs_of_the_estimate_are_those_of_its_runs() -> None:
    """A text of 219 tokens, a picture of 256, as much text ...: blocks of 256 tokens 0-255, 256-511, ..."""
    expert = np.asarray(aot_tpu.runs(1024))
    assert list(np.flatnonzero(np.diff(expert))) == [218, 218 + 256, 218 + 512]
    # 475 tokens of text in the slots of tiles 0 and 1, the others from slot 1024 on, tile 4
    routing = make_routing(jnp.asarray(expert), row_multiple=1024)
    slots, tokens = (aot_tpu.tpu_permutation.pairs(routing, 256, by_slot) for by_slot in (True, False))
    found = {(int(b), int(t)) for b, t in zip(slots.block, slots.tile, strict=True)}
    assert found == {(0, 0), (1, 0), (2, 1), (0, 4), (1, 4), (2, 5), (3, 5), (3, 6)}
    assert found == {(int(b), int(t)) for b, t in zip(tokens.block, tokens.tile, strict=True)}
    assert aot_tpu.moves_of(routing, 256) == ((8, 7), (8, 7))


@pytest.mark.parametrize("share", benchmark.SHARES)
def test_the_estimate_of_a_share_of_visual_tokens(share: float) -> None:
    expert = np.asarray(aot_tpu.runs(16384, share))
    assert abs(expert.mean() - share) < 0.05 and len(expert) == 16384
    text, visual = aot_tpu.of_each(4096, share)
    assert text + visual == 4096 and 0 <= visual - 4096 * share <= 1
    assert aot_tpu.padding(4096, share) == (0 if share in (0, 1) else 128 / 4096)
    cases = aot_tpu.kernel_cases("v6e", 512, 256, 512, share)
    for f, args in cases.values():
        jax.eval_shape(f, *args)
    assert aot_tpu.bounded("v6e:2x2", "forward", {"routed_ffn": 1e12}, 512, 256, 512, share) == {"routed_ffn": 1e12}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vmem"], "name the case"),
        (["--share", "0.25"], "without --static every share is measured"),
        (["--aot", "h100", "--share", "0.25"], "without --static every share is measured"),
        (["--static", "v6e:2x2", "--share", "0.25", "--tokens", "16384"], "are estimated for up to 4,096 tokens"),
        (["--static", "v4:2x2"], "the chip must be one of v5e, v5p, v6e"),
        (["--static", "v6e:2x2", "--case", "nothing"], "with --static, one of"),
    ],
)
def test_flags_that_make_no_sense(flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark", *flags])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert message in capsys.readouterr().err


def test_a_kernel_takes_at_least_what_its_bytes_take() -> None:
    """On a v6e, 1.75 GHz and 1640 GB/s."""
    sizes = {"tokens": 4096, "width": 2048, "inner": 8192}
    moved = aot_tpu.bounded("v6e:2x2", "permutation", {"routed_to_slots": 1.0, "routed_to_tokens": 1e9, "which tiles": 3.0}, **sizes)
    at_least = 2 * (4096 + 5 * 1024) * 2048 * 1.75e9 / 1640e9  # every token read, every slot written
    assert at_least <= moved["routed_to_slots"] <= 1.3 * at_least and moved["routed_to_tokens"] == 1e9 and moved["which tiles"] == 3.0
    weights = 2 * 3 * 2048 * 8192  # bytes of one expert; each row tile reads its owner's
    assert aot_tpu.bounded("v6e:2x2", "forward", {"routed_ffn": 1.0}, **sizes)["routed_ffn"] > 5 * weights * 1.75e9 / 1640e9
    # a tile of 128 rows waits: not these, since 2,049 tokens lie in tiles of 1,024, 512 and 513
    cycles = 34 * 27e3
    assert aot_tpu.bounded("v6e:2x2", "forward", {"routed_ffn": cycles}, **sizes)["routed_ffn"] == cycles


def test_a_tile_of_few_rows_waits_for_its_weights() -> None:
    assert aot_tpu.waiting(900.0, 50.0, (1024, 129), 512, 0) == 0.0  # 10 sub-blocks of 128 rows, 90 each: the last two take 180
    assert aot_tpu.waiting(900.0, 100.0, (1024, 1), 512, 0) == 0.0  # 9 sub-blocks take 100 each
    assert aot_tpu.waiting(900.0, 150.0, (1024, 1), 512, 0) == 50.0
    assert aot_tpu.waiting(900.0, 450.0, (1024, 1), 512, 0) == 350.0 + 50.0 + 50.0
    # the 1,025 lie in tiles of 512, 256 and 257, half of the second tile being empty: 4, 2 and 3 sub-blocks
    assert aot_tpu.waiting(900.0, 350.0, (1025,), 512, 512) == 150.0 + 50.0
    assert aot_tpu.waiting(900.0, 150.0, (1025,), 256, 512) == 50.0  # 2, 2, 2, none, 2 and 1
    assert aot_tpu.waiting(900.0, 150.0, (1025,), 128, 512) == 9 * 50.0  # two tiles are empty


@pytest.mark.parametrize("generation", aot_tpu.CHIPS)
def test_every_case_of_the_estimate_can_be_traced(generation: str) -> None:
    x, h, wide, tall = (512, 256), (512, 512), (256, 512), (512, 256)
    of_floor = {"x up": h, "h down": x, "dy down^T": h, "dup up^T": x, "x^T dup": wide, "h^T dy": tall}
    of_floor |= {spare: of_floor[matmul] for matmul, spare in aot_tpu.INSTEAD.items()}
    cases = aot_tpu.all_cases(generation, 512, 256, 512)
    for case, (f, args) in cases.items():
        made = jax.eval_shape(f, *args)
        if case.startswith(aot_tpu.FLOOR):
            assert made.shape == of_floor.pop(case.removeprefix(aot_tpu.FLOOR))
    assert not of_floor and len(cases) == 8 + 6


def test_a_record_of_what_was_compiled_and_what_was_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot_tpu.importlib.metadata, "version", lambda name: f"{name} 1.0")
    monkeypatch.setattr(aot_tpu, "waiting", lambda *args: 0.0)
    small, large = ({"routed_ffn": count} for count in (1e6, 1.5e6))
    sizes = {case: aot_tpu.compiled_tokens("v6e", 16384, case) for case in aot_tpu.floor_cases(16384, 2048, 8192)}
    floor = {case: [{case: 1e6 * n * size / 16384} for size in sizes[case]] for n, case in enumerate(sizes, 1)}
    spares = {name: floor.pop(name) for name in [aot_tpu.FLOOR + spare for spare in aot_tpu.INSTEAD.values()]}
    results = {**floor, "forward": [small, large], "permutation": ["no estimate within 1 s"]}
    vmem = {"forward": {"routed_ffn": 7}, "routing": {}}
    made = aot_tpu.record("v6e:2x2", 16384, 2048, 8192, results, vmem)
    assert made["kernels compiled at"] == (4096, 6144) and made["ratios"] == {"forward: kernels": 1.0}
    backward = 3e6 + 2 * 4e6 + 2 * 5e6 + 6e6
    both = {"dense forward + backward": 4e6 + backward, "dense under full remat": 6e6 + backward}
    assert made["cycles"]["floor"] == {"dense forward": 4e6, "dense backward": backward, **both}
    results["floor: h^T dy"] = ["no estimate"]
    made = aot_tpu.record("v6e:2x2", 16384, 2048, 8192, results, vmem)
    assert made["ratios"] and made["cycles"]["floor"] == {"dense forward": 4e6} and made["cycles"]["floor: h^T dy"] == "no estimate"
    instead = {**results, **spares}
    assert aot_tpu.record("v6e:2x2", 16384, 2048, 8192, instead, vmem)["cycles"]["floor"]["dense backward"] == backward + 2e6
    results["floor: x up"] = ["no estimate"]
    assert not aot_tpu.record("v6e:2x2", 16384, 2048, 8192, results, vmem)["ratios"]
    assert made["cycles"]["permutation"] == "no estimate within 1 s" and made["vmem"] == {"forward": {"routed_ffn": 7}}


def test_static_ratios_count_the_routing_once_and_every_move() -> None:
    floor = {"dense forward": 100.0, "dense backward": 200.0, "dense forward + backward": 300.0, "dense under full remat": 380.0}
    cycles = {
        "floor": floor,
        "forward": {"routed_ffn": 101.0},
        "forward, gate and up saved": {"routed_gate_up_saved": 70.0, "routed_down": 35.0},
        "gate and up again": {"routed_gate_up_again": 68.0},
        "backward, text frozen": {"routed_ffn_dx": 110.0, "routed_weight_gradient": 50.0},
        "permutation": {"routed_to_slots": 2.0, "routed_to_tokens": 1.5, "which tiles": 0.5},
        "routing": {"fusion": 1.0},
    }
    found = aot_tpu.ratios(cycles)
    assert found["forward: kernels"] == 1.01 and found["forward: all"] == 1.06
    assert found["backward, text frozen: all"] == round(165 / 200, 3)
    assert found["forward + backward, text frozen: all"] == round((105 + 160 + 9) / 300, 3)
    assert found["the same under full remat: all"] == round((101 + 68 + 160 + 1 + 3 * 2 + 2 * 1.5 + 3 * 0.5) / 380, 3)
    assert not any(name.startswith("backward") for name in aot_tpu.ratios({**cycles, "backward, text frozen": "no estimate"}))
    without = aot_tpu.ratios({**cycles, "permutation": "no estimate"})
    assert without["forward: kernels"] == 1.01 and not any(name.endswith(": all") for name in without)
    assert aot_tpu.ratios({**cycles, "floor": {}}) == {}
