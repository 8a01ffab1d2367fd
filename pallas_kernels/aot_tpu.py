"""What the routed SwiGLU costs on a TPU by the compiler's own estimate of cycles, on a machine without one (needs libtpu).

    python -m pallas_kernels.benchmark --static v6e:2x2 [--tokens 4096] [--share 0.5] [--out cycles.json]

Half of the tokens are visual and one more (or another share of them), so that both experts end in a partly filled tile. The estimate
waits for each copy as if it had the memory to itself, and a faster memory than the chip's: what a tile of few rows waits for its owner's
weights is added, and a kernel counts with the time its bytes take at the chip's bandwidth if that is more. The floor is what the matmuls
of the dense layer take, compiled one by one.

The estimator walks through every step of a kernel's grid, and needs 20 GB for the backward pass of 16,384 tokens. Above MOST_TOKENS
what needs too much is compiled at two smaller sizes, two row tiles apart, and what a tile adds is counted as often as there are tiles.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.extend.core import ClosedJaxpr, Jaxpr, Var
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import Routing, make_routing, tpu, tpu_permutation
from pallas_kernels.routing import TPU_HALF_FULL, TPU_LEAST_ROWS, TPU_ROWS, gap

CHIPS = {"v5e": (1.5e9, 819e9), "v5p": (1.75e9, 2765e9), "v6e": (1.75e9, 1640e9)}
"""Clock in Hz, inferred from the published peak, and memory bandwidth in bytes per second."""
CASE_SECONDS = 600
MOST_TOKENS = 4096
"""Up to so many a case is compiled at its own size."""
READ_PER_TILE = {"routed_ffn": 3, "routed_ffn_dx": 3, "routed_down": 1}
"""The kernels of which every row tile reads whole matrices of its owner, and how many."""
LIBTPU = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def compile_for(topology: str, f: Callable[..., Any], *args: Any) -> Any:
    """f compiled for one chip of a TPU topology such as 'v5e:2x2', on any machine with libtpu. args: ShapeDtypeStructs in pytrees."""
    os.environ.update(LIBTPU)
    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(chips[:1]), ("chip",))
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, PartitionSpec())), args)
    whole = jax.shard_map(f, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    return jax.jit(whole).trace(*args).lower().compile()


def kernels_of(f: Callable[..., Any], *args: Any) -> list[dict[str, Any]]:
    """The parameters of every `pallas_call` of f, without those whose results f does not use: XLA drops them too."""
    found: list[dict[str, Any]] = []

    def walk(jaxpr: Any) -> None:
        live = {v for v in jaxpr.outvars if isinstance(v, Var)}
        for eqn in reversed(jaxpr.eqns):
            if live.isdisjoint(eqn.outvars):
                continue
            live.update(v for v in eqn.invars if isinstance(v, Var))
            if eqn.primitive.name == "pallas_call":
                found.append(eqn.params)
            else:
                for inner in eqn.params.values():
                    if isinstance(inner, ClosedJaxpr | Jaxpr):
                        walk(getattr(inner, "jaxpr", inner))

    walk(jax.make_jaxpr(f)(*args).jaxpr)
    return found


def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def runs(tokens: int, share: float = 0.5) -> jax.Array:
    """int32[tokens]: pictures of 1, 3, 5, 7 and 13 tiles of 256 visual tokens, and texts so long that a share of the tokens is visual, none
    of which begins with a block."""
    if share in (0, 1):
        return jnp.full((tokens,), int(share), jnp.int32)
    text = round(256 * (1 - share) / share)
    pair = tuple(part * tiles for tiles in (1, 3, 5, 7, 13) for part in (256, text))
    lengths = (219, *pair * (1 + tokens // sum(pair)))
    return jnp.repeat(jnp.arange(len(lengths)) % 2, jnp.array(lengths), total_repeat_length=sum(lengths))[:tokens].astype(jnp.int32)


def moves_of(routing: Routing, rows: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """What a routing that is known makes of `Tpu.moves`: pairs, and blocks or tiles read, into slot order and back."""

    def counted(by_slot: bool) -> tuple[int, int]:
        found = tpu_permutation.pairs(routing, rows, by_slot)
        read = found.block if by_slot else found.tile
        return int(found.count), 1 + int(jnp.sum(read[1:] != read[:-1]))

    return counted(True), counted(False)


def kernel_cases(generation: str, tokens: int, width: int, inner: int, share: float = 0.5) -> dict[str, tuple[Callable[..., Any], tuple]]:
    """What is profiled, each alone, with its operands as parameters of the program. bfloat16."""
    multiple, tile_rows = rows_of(generation, tokens)
    known = make_routing(runs(tokens, share), row_multiple=multiple, tile_rows=tile_rows)
    moves = moves_of(known, tpu.Tpu(generation).move_rows(known))
    backend = tpu.Tpu(generation, counts=of_each(tokens, share), moves=moves)
    x, weights = array(tokens, width), (array(width, inner), array(width, inner), array(inner, width))
    routing = jax.eval_shape(lambda e: make_routing(e, row_multiple=multiple, tile_rows=tile_rows), array(tokens, dtype=jnp.int32))
    slots = routing.source.shape[0]
    rows, hidden, experts = array(slots, width), array(slots, inner), (weights, weights)

    def permutation(x: jax.Array, y: jax.Array, routing: Routing) -> tuple[jax.Array, jax.Array]:
        return backend.to_slots(x, routing), backend.to_tokens(y, routing)

    def order(expert: jax.Array) -> tuple[Any, ...]:  # what of a routing these kernels use
        routing = make_routing(expert, row_multiple=multiple, tile_rows=tile_rows)
        return routing.slot, routing.first_slot, routing.counts

    def backward(*args: Any) -> Any:
        dx, (_, visual) = backend.swiglu_bwd(*args)
        return dx, visual

    return {
        "forward": (backend.swiglu, (rows, experts, routing)),
        "forward, gate and up saved": (backend.swiglu_fwd, (rows, experts, routing)),
        "gate and up again": (backend.gate_up, (rows, experts, routing)),
        "backward, text frozen": (backward, (rows, hidden, hidden, rows, experts, routing)),
        "permutation": (permutation, (x, rows, routing)),
        "routing": (order, (array(tokens, dtype=jnp.int32),)),
    }


def vmem_of_kernels(text: str) -> dict[str, int]:
    """The bytes of VMEM that each Pallas kernel takes, from a compiled program's text."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        name = re.match(r"\s*(?:ROOT )?%(\S+) = .*custom_call_target=\"tpu_custom_call\"", line)
        used = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1".*?"size":"(\d+)"', line)
        if name and used:
            kernel = without_number(name[1])
            found[kernel] = max(found.get(kernel, 0), int(used[1]))
    return found


@contextlib.contextmanager
def _profiles() -> Iterator[Path]:
    """The folder where libtpu writes its estimates, if this comes before its first use in the process."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_static_llo_profile_to={folder}"
        yield Path(folder)


def _cycles(folder: Path) -> collections.Counter[str]:
    """Cycles of the operations of what was compiled since the last call."""
    cycles: collections.Counter[str] = collections.Counter()
    for path in folder.iterdir():
        for name, count in re.findall(r'hlo_op_name: "([^"]+)"\s+estimated_cycles: (\d+)', path.read_text("utf-8")):
            cycles[without_number(name)] += int(count)
        path.unlink()
    return cycles


def without_number(name: str) -> str:
    """The name that XLA gave to an operation, without what tells it from others of the same name."""
    return re.sub(r"[.\d]+$", "", name)


def profile(topology: str, case: str, tokens: int, width: int, inner: int, share: float = 0.5) -> dict[str, float]:
    """Cycles of each operation of a case. libtpu reads its flags once: a process profiles one case."""
    f, args = all_cases(topology.split(":")[0], tokens, width, inner, share)[case]
    with _profiles() as folder:
        try:
            compile_for(topology, f, *args)
        except jax.errors.JaxRuntimeError as error:
            # Where profiles are written, XLA counts the limit of a kernel's VMEM on top of what it takes, and gives up in the end, when
            # all are written. `vmem_of_case` compiles the same without them.
            if "memory space vmem" not in str(error):
                raise
        cycles = _cycles(folder)
    if case.startswith(FLOOR):
        return {case: float(cycles.total())}
    kernels = {name: float(cycles[name]) for name in {kernel["name"] for kernel in kernels_of(f, *args)}}
    if missing := [name for name, count in kernels.items() if not count]:
        raise RuntimeError(f"{topology}, {case}: the compiler estimated no cycles of {', '.join(missing)}")
    if case in ("permutation", "routing"):
        kernels["which tiles" if kernels else case] = float(sum(n for name, n in cycles.items() if name not in kernels and name != "copy"))
    return kernels  # what is copied around a kernel that is compiled alone is no part of it


def vmem_of_case(topology: str, case: str, tokens: int, width: int, inner: int, share: float = 0.5) -> dict[str, int]:
    """The bytes of VMEM that each kernel of a case takes, compiled as a user's program is: in a process that has not profiled."""
    f, args = all_cases(topology.split(":")[0], tokens, width, inner, share)[case]
    return vmem_of_kernels(compile_for(topology, f, *args).as_text())


def bounded(
    topology: str, case: str, cycles: dict[str, float], tokens: int, width: int, inner: int, share: float = 0.5
) -> dict[str, float]:
    """The cycles of `profile`, or those that the bytes of an operation take at the chip's bandwidth where they are more."""
    generation = topology.split(":")[0]
    clock, bandwidth = CHIPS[generation]
    f, args = kernel_cases(generation, tokens, width, inner, share)[case]
    moved: collections.Counter[str] = collections.Counter()
    waits = dict.fromkeys(cycles, 0.0)
    for kernel in kernels_of(f, *args):
        name = kernel["name"]
        moved[name] += kernel["cost_estimate"].bytes_accessed * clock / bandwidth
        if name in READ_PER_TILE:
            weights = READ_PER_TILE[name] * width * inner * 2 * clock / bandwidth
            rows = kernel["out_avals"][0].shape[0] // kernel["grid_mapping"].grid[0]
            waits[name] = waiting(cycles[name], weights, of_each(tokens, share), rows, rows_of(generation, tokens)[1])
    return {name: max(count + waits[name], moved[name]) for name, count in cycles.items()}


def rows_of(generation: str, tokens: int) -> tuple[int, int]:
    """row_multiple and tile_rows of the routing, as `make_routing` chooses them on that generation."""
    rows = min(TPU_ROWS[generation], tokens // 4)
    return rows, rows if generation in TPU_HALF_FULL else 0


def of_each(tokens: int, share: float) -> tuple[int, int]:
    """The tokens of each expert, in every case: where both have some, both end in a partly filled tile."""
    visual = round(share * tokens) + (0 < share < 1)
    return tokens - visual, visual


def padding(tokens: int, share: float) -> float:
    """How many rows without a token are computed in the parts of tiles that hold some, as a share of the tokens."""
    return sum(-count % TPU_LEAST_ROWS for count in of_each(tokens, share)) / tokens


def waiting(cycles: float, weights: float, counts: Sequence[int], rows: int, tile_rows: int) -> float:
    """How long a kernel waits in those tiles whose rows take less than reading all weights of their owner. In cycles, as its first
    arguments: what its rows take together, and what the weights take once. rows, tile_rows: of its tile, and of the largest."""
    filled = []
    for count in counts:
        empty, more = gap(count, tile_rows)
        for first in range(0, count + more, rows):
            tile = min(rows, (empty if first < empty + more else count + more) - first)
            if tile > 0:  # no tile that is all gap
                filled.append(-(-tile // TPU_LEAST_ROWS) * TPU_LEAST_ROWS)
    return sum(max(0.0, weights - cycles * part / sum(filled)) for part in filled)


def compiled_tokens(generation: str, tokens: int, case: str) -> tuple[int, ...]:
    """The token counts at which a case is compiled, to know what it takes for `tokens`."""
    small = case in ("permutation", "routing") or (case.startswith(FLOOR) and case != FLOOR + "dy down^T")  # that one takes 17 GB
    if tokens <= MOST_TOKENS or small:
        return (tokens,)
    return MOST_TOKENS, MOST_TOKENS + 2 * TPU_ROWS[generation]


def extended(sizes: tuple[int, ...], cycles: list[dict[str, float]], tokens: int) -> dict[str, float]:
    """The cycles of `tokens` tokens on the line through those of one size, which is `tokens`, or of two."""
    if len(sizes) == 1:
        return cycles[0]
    (first, second), (small, large) = sizes, cycles
    return {name: count + (large[name] - count) * (tokens - first) / (second - first) for name, count in small.items()}


FLOOR = "floor: "
INSTEAD = {"x^T dup": "x^T dup, given x^T", "h^T dy": "h^T dy, given h^T"}
"""What stands for a matmul of the floor where it has no estimate: less work, so that no ratio is too kind."""


def floor_cases(tokens: int, width: int, inner: int) -> dict[str, tuple[Callable[..., Any], tuple]]:
    """The matmuls of a dense layer, which are the floor of its passes, as if all else were free. bfloat16.

    XLA's estimate of the layer compiled as a whole is larger. What XLA notes in the text of a program without the profile is larger too,
    by 17% on a v6e.
    """
    x, h, wide, tall = array(tokens, width), array(tokens, inner), array(width, inner), array(inner, width)
    return {
        FLOOR + "x up": (jnp.dot, (x, wide)),
        FLOOR + "h down": (jnp.dot, (h, tall)),
        FLOOR + "dy down^T": (lambda a, w: a @ w.T, (x, tall)),
        FLOOR + "dup up^T": (lambda a, w: a @ w.T, (h, wide)),
        FLOOR + "x^T dup": (lambda a, b: a.T @ b, (x, h)),
        FLOOR + "h^T dy": (lambda a, b: a.T @ b, (h, x)),
        FLOOR + INSTEAD["x^T dup"]: (jnp.dot, (array(width, tokens), h)),
        FLOOR + INSTEAD["h^T dy"]: (jnp.dot, (array(inner, tokens), x)),
    }


def all_cases(generation: str, tokens: int, width: int, inner: int, share: float = 0.5) -> dict[str, tuple[Callable[..., Any], tuple]]:
    """Everything that `profile` can be asked for, the floor first."""
    return floor_cases(tokens, width, inner) | kernel_cases(generation, tokens, width, inner, share)


FORWARD = {"x up": 2, "h down": 1}
ALL = "dense forward + backward"
BACKWARD = {"dy down^T": 1, "dup up^T": 2, "x^T dup": 2, "h^T dy": 1}
DENSE_PASSES = {
    "dense forward": FORWARD,
    "dense backward": BACKWARD,
    ALL: {**FORWARD, **BACKWARD},
    "dense under full remat": {**FORWARD, **BACKWARD, "x up": 4},
}
"""How often each matmul is in a pass of the dense layer, the gate costing what up costs."""


def dense_passes(cycles: dict[str, float]) -> dict[str, float]:
    """The cycles of those passes whose matmuls, or what stands for them, are all known."""
    known = {}
    for matmul in DENSE_PASSES[ALL]:
        for name in (INSTEAD.get(matmul, matmul), matmul):
            if FLOOR + name in cycles:
                known[matmul] = cycles[FLOOR + name]
    return {
        name: sum(times * known[matmul] for matmul, times in parts.items())
        for name, parts in DENSE_PASSES.items()
        if parts.keys() <= known.keys()
    }


def report(topology: str, tokens: int, width: int, inner: int, share: float = 0.5) -> dict[str, Any]:
    """`profile` of every case, those of the floor first, each in a process that has CASE_SECONDS; and what follows from them.

    Up to MOST_TOKENS where share is not 0.5: the line through two sizes is for a tile more of each expert.
    """
    generation = topology.split(":")[0]
    found: dict[str, list[Any]] = {}
    vmem: dict[str, Any] = {}
    stands_for = {FLOOR + spare: FLOOR + matmul for matmul, spare in INSTEAD.items()}
    for case in all_cases(generation, tokens, width, inner):
        if case in stands_for and not any(isinstance(result, str) for result in found[stands_for[case]]):
            continue
        for size in compiled_tokens(generation, tokens, case):
            print(f"{topology}, {size} tokens: {case}", file=sys.stderr, flush=True)
            found.setdefault(case, []).append(_in_process(topology, case, size, width, inner, share))
        if not case.startswith(FLOOR):
            vmem[case] = _in_process(topology, case, compiled_tokens(generation, tokens, case)[0], width, inner, share, "--vmem")
    return record(topology, tokens, width, inner, found, vmem, share)


def _in_process(topology: str, case: str, tokens: int, width: int, inner: int, share: float, *flags: str) -> dict[str, Any] | str:
    sizes = ["--tokens", str(tokens), "--width", str(width), "--inner", str(inner), "--share", str(share)]
    command = [sys.executable, "-m", "pallas_kernels.benchmark", "--static", topology, "--case", case, *sizes, *flags]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=CASE_SECONDS, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return f"no estimate within {CASE_SECONDS} s"
    return json.loads(child.stdout.splitlines()[-1]) if child.returncode == 0 else f"no estimate: {child.stderr.strip()[-300:]}"


def record(
    topology: str, tokens: int, width: int, inner: int, found: dict[str, list[Any]], vmem: dict[str, Any], share: float = 0.5
) -> dict[str, Any]:
    """What is written of a report.

    found: by case, for each size of `compiled_tokens`, the result of `profile`, or a word on why there is none. vmem: by case,
    the result of `vmem_of_case` at the first of them, or such a word, which is left out.
    """
    cycles: dict[str, Any] = {}
    floor: dict[str, float] = {}
    for case, results in found.items():
        sizes = compiled_tokens(topology.split(":")[0], tokens, case)
        if word := next((r for r in results if isinstance(r, str)), None):
            cycles[case] = word
            continue
        made = extended(sizes, results, tokens)
        if case.startswith(FLOOR):
            floor |= made
        else:
            cycles[case] = bounded(topology, case, made, tokens, width, inner, share)
    cycles["floor"] = dense_passes(floor)
    return {
        "topology": topology,
        "tokens": tokens,
        "kernels compiled at": compiled_tokens(topology.split(":")[0], tokens, "forward"),
        "width": width,
        "inner": inner,
        "dtype": "bfloat16",
        "visual share": share,
        "padding": round(padding(tokens, share), 4),
        **{name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        "date": str(datetime.date.today()),
        "ratios": ratios(cycles),
        "cycles": cycles,
        "vmem": {case: kernels for case, kernels in vmem.items() if kernels and isinstance(kernels, dict)},
    }


def ratios(result: dict[str, Any]) -> dict[str, float]:
    """Each pass over its dense floor: the kernels alone, and with the order of the tokens made once and every move of rows.

    What has no estimate is left out.
    """
    total = {case: sum(r.values()) for case, r in result.items() if isinstance(r, dict)}
    floor = result["floor"]
    moves = result.get("permutation")
    passes = {  # kernels, rows that are moved (x into slot order, y back), floor
        "forward": (("forward",), "xy", "dense forward"),
        "forward, gate and up saved": (("forward, gate and up saved",), "xy", "dense forward"),
        "backward, text frozen": (("backward, text frozen",), "xy", "dense backward"),
        "forward + backward, text frozen": (("forward, gate and up saved", "backward, text frozen"), "xyxy", "dense forward + backward"),
        "the same under full remat": (
            ("forward", "gate and up again", "backward, text frozen"),
            "xyxxy",
            "dense under full remat",
        ),
    }
    table = {}
    for name, (parts, rows, dense) in passes.items():
        if dense in floor and all(part in total for part in parts):
            kernels, dense_cycles = sum(total[part] for part in parts), floor[dense]
            table[f"{name}: kernels"] = round(kernels / dense_cycles, 3)
            if isinstance(moves, dict) and "routing" in total:
                cost = {"x": moves["routed_to_slots"], "y": moves["routed_to_tokens"]}
                around = total["routing"] + len(parts) * moves["which tiles"] + sum(cost[row] for row in rows)
                table[f"{name}: all"] = round((kernels + around) / dense_cycles, 3)
    return table
