"""What the routed SwiGLU costs against its floor, one dense SwiGLU of the same token count.

    python -m pallas_kernels.benchmark [--tokens 4096] [--width 2048] [--inner 8192] [--dtype bfloat16] [--out times.json]
    python -m pallas_kernels.benchmark --static v6e:2x2 [--tokens 4096] [--share 0.5] [--out cycles.json]     # the estimate of aot_tpu.py
    python -m pallas_kernels.benchmark --aot h100 [--tokens 4096] [--out gpu_aot.json]    # the report of aot_gpu.py

The first times, on this machine's device, every implementation that runs there and grouped matmuls that are not ours (megablox on a TPU,
tokamax where it is installed): forward, and forward + backward with the text expert frozen and with both trained, over shares of visual
tokens. Each is timed in turn with the others, in both orders, and the median counts; routing is part of what is timed. With --out it also
draws the ratios, as a PNG beside the JSON, which needs matplotlib. The others need no device (libtpu; the extra `aot-cuda`).
"""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import aot_gpu, aot_tpu, make_routing, ragged, reference, routed_swiglu
from pallas_kernels.api import IMPLEMENTATIONS
from pallas_kernels.device import device_kind, hopper_cores, tpu_generation
from pallas_kernels.routing import TPU_ROWS

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
PEAKS = {
    "v5e": (197e12, 819e9),
    "v5p": (459e12, 2765e9),
    "v6e": (918e12, 1640e9),
    "tpu7x": (1153.5e12, 3690e9),
    "NVIDIA H100 80GB HBM3": (989e12, 3352e9),
    "NVIDIA H200": (989e12, 4800e9),
}
"""bfloat16 operations and bytes of memory per second of a device, from the data sheets; of a tpu7x half of the chip's."""


def with_gradient(f: Callable[..., jax.Array]) -> Callable[..., Any]:
    """(x, weights, dy, ...) -> (y, gradients of x and weights)."""

    def run(x, weights, dy, *rest):
        y, pull = jax.vjp(lambda x, w: f(x, w, *rest), x, weights)
        return y, pull(dy)

    return run


def dense(x: jax.Array, weights: Any) -> jax.Array:
    return reference.swiglu(x, *weights)


PASSES = ("forward", "forward + backward, text frozen", "forward + backward")


def needed(tokens: int, width: int, inner: int, itemsize: int, used: int, trained: Sequence[float] | None = None) -> tuple[float, float]:
    """Operations, and bytes moved if everything went to memory and back once: what no implementation can do without.

    used: how many experts have tokens; the others are not read. trained: of each trained expert, its share of the tokens; None for the
    forward pass alone.
    """
    layer, weights = 2 * tokens * width * inner, 3 * width * inner
    if trained is None:
        return 3.0 * layer, float(itemsize * (2 * tokens * width + used * weights))
    rows = 4 * tokens * width + 4 * tokens * inner  # x, dy, y, dx; gate and up written and read
    return (6 + 3 * sum(trained)) * layer, float(itemsize * (rows + (2 * used + len(trained)) * weights))


def implementations(dtype: str) -> dict[str, Callable[..., jax.Array]]:
    """(x, (text, visual), expert) -> y, by name: the floor, all of ours that run here, and others'."""
    here = {"pallas_tpu": tpu_generation(), "pallas_gpu": hopper_cores() and dtype == "bfloat16"}

    def ours(x, experts, expert, name):
        return routed_swiglu(x, experts, make_routing(expert), name)

    def theirs(x, experts, expert, dot):
        return ragged.routed_swiglu(x, experts, make_routing(expert), dot)

    return {
        "dense": lambda x, experts, expert: dense(x, experts[1]),
        **{name: functools.partial(ours, name=name) for name in IMPLEMENTATIONS if here.get(name, True)},
        **{name: functools.partial(theirs, dot=dot) for name, dot in ragged.others().items()},
    }


def measure(tokens: int, width: int, inner: int, dtype: str, rounds: int) -> dict[str, Any]:
    """The device, the sizes and, under 'records', per share, implementation and pass: seconds (median), ratio to the dense floor of that
    pass, and the shares of the device's peaks in operations and bytes, None where these are not known."""
    rng = np.random.default_rng(0)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) * shape[0] ** -0.5, dtype)

    x, dy = array(tokens, width), array(tokens, width)
    text, visual = ((array(width, inner), array(width, inner), array(inner, width)) for _ in range(2))
    # one program for all shares: how many tokens an expert has is known at run time
    programs: dict[tuple[str, str], Any] = {}
    for name, f in implementations(dtype).items():
        programs[name, PASSES[0]] = jax.jit(lambda x, text, visual, dy, expert, f=f: f(x, (text, visual), expert))
        frozen = with_gradient(lambda x, visual, text, expert, f=f: f(x, (text, visual), expert))
        programs[name, PASSES[1]] = jax.jit(lambda x, text, visual, dy, expert, run=frozen: run(x, visual, dy, text, expert))
        if name != "dense":
            programs[name, PASSES[2]] = jax.jit(lambda x, text, visual, dy, expert, f=f: with_gradient(f)(x, (text, visual), dy, expert))
    peaks = PEAKS.get(tpu_generation() or device_kind()) if dtype == "bfloat16" else None
    records = []
    for share in SHARES:
        expert = jnp.asarray(rng.permutation(np.arange(tokens) < share * tokens), jnp.int32)
        times = collections.defaultdict(list)
        for turn in range(rounds + 1):
            for key in list(programs)[:: 1 if turn % 2 else -1]:
                start = time.perf_counter()
                jax.block_until_ready(programs[key](x, text, visual, dy, expert))
                if turn:  # the first compiles
                    times[key].append(time.perf_counter() - start)
        times["dense", PASSES[2]] = times["dense", PASSES[1]]
        for (name, what), taken in times.items():
            seconds, floor = float(np.median(taken)), float(np.median(times["dense", what]))
            trained = {PASSES[0]: None, PASSES[1]: (share,), PASSES[2]: (share, 1 - share)}[what]
            if name == "dense" and trained:
                trained = (1.0,)
            used = 1 if name == "dense" or share in (0, 1) else 2
            work = needed(tokens, width, inner, x.dtype.itemsize, used, trained)
            of_peak = [w / seconds / peak for w, peak in zip(work, peaks, strict=True)] if peaks else [None, None]
            records.append(
                {
                    "share": share,
                    "implementation": name,
                    "pass": what,
                    "seconds": seconds,
                    "ratio": seconds / floor,
                    "of matmul peak": of_peak[0],
                    "of bandwidth": of_peak[1],
                }
            )
    sizes = {"tokens": tokens, "width": width, "inner": inner, "dtype": dtype}
    about = {"device": device_kind(), "jax": jax.__version__, "date": str(datetime.date.today()), "rounds": rounds}
    return {**about, **sizes, "records": records}


def table(result: dict[str, Any]) -> str:
    """The records of `measure`, a line each."""
    lines = ["{device}, {tokens} tokens, {width} -> {inner}, {dtype}; ratio to the dense SwiGLU of the same run".format(**result)]
    for r in result["records"]:
        peaks = [f"{r[of]:6.1%} {of}" for of in ("of matmul peak", "of bandwidth") if r[of] is not None]
        times = f"{1e3 * r['seconds']:10.3f} ms  {r['ratio']:6.2f}  {'  '.join(peaks)}".rstrip()
        lines.append(f"{r['share']:5.0%} visual  {r['implementation']:12} {r['pass']:32} {times}")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """The ratios over the share of visual tokens as a PNG, a panel for each pass and a line for each implementation."""
    from matplotlib.figure import Figure

    records = result["records"]
    passes = list(dict.fromkeys(r["pass"] for r in records))
    figure = Figure(figsize=(5 * len(passes), 4), layout="constrained")
    figure.suptitle("{device}, {tokens} tokens, {width} -> {inner}, {dtype}".format(**result))
    for axes, what in zip(figure.subplots(1, len(passes), squeeze=False)[0], passes, strict=True):
        for name in dict.fromkeys(r["implementation"] for r in records):
            mine = [r for r in records if (r["pass"], r["implementation"]) == (what, name)]
            axes.plot([100 * r["share"] for r in mine], [r["ratio"] for r in mine], marker="o", label=name)
        axes.set(title=what, xlabel="% of tokens visual", ylabel="seconds / seconds of one dense SwiGLU", ylim=(0, None))
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=8192)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--static", metavar="TOPOLOGY", help="v5e:2x2, v5p:2x2x1 or v6e:2x2: cycles by the compiler; needs no TPU")
    parser.add_argument("--aot", choices=("h100",), help="registers, spills and shared memory of the GPU kernels; needs no GPU")
    parser.add_argument("--case", help="with --static: profile this one alone, in this process")
    parser.add_argument("--share", type=float, choices=SHARES, help="with --static: of visual tokens; 0.5 unless given")
    parser.add_argument("--vmem", action="store_true", help="with --case: what VMEM its kernels take, in place of their cycles")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    a = parser.parse_args()
    chips = TPU_ROWS if a.vmem else aot_tpu.CHIPS  # of a tpu7x the compiler makes programs, and no estimates
    if a.static and a.static.split(":")[0] not in chips:
        parser.error(f"--static {a.static}: the chip must be one of {', '.join(chips)}, as in v5e:2x2")
    if a.share is not None and not a.static:
        parser.error("--share: without --static every share is measured")
    share = 0.5 if a.share is None else a.share
    if a.vmem and not a.case:
        parser.error("--vmem: name the case whose VMEM is asked for, with --case")
    if a.aot:
        aot_gpu.show(a.tokens, a.width, a.inner, a.dtype, a.out)
        return
    if a.case:
        cases = aot_tpu.all_cases(a.static.split(":")[0], a.tokens, a.width, a.inner, share) if a.static else {}
        if a.case not in cases:
            parser.error(f"--case {a.case}: with --static, one of {', '.join(cases) or 'its cases'}")
        jax.config.update("jax_platforms", "cpu")  # or JAX would start libtpu before it is told to write profiles
        ask = aot_tpu.vmem_of_case if a.vmem else aot_tpu.profile
        print(json.dumps(ask(a.static, a.case, a.tokens, a.width, a.inner, share)))
        return
    if a.static:
        if share != 0.5 and a.tokens > aot_tpu.MOST_TOKENS:
            parser.error(f"--share {share}: other shares than 0.5 are estimated for up to {aot_tpu.MOST_TOKENS:,} tokens")
        result = aot_tpu.report(a.static, a.tokens, a.width, a.inner, share)
        print(json.dumps(result, indent=1))
    else:
        result = measure(a.tokens, a.width, a.inner, a.dtype, a.rounds)
        print(table(result))
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        if not a.static:
            try:
                draw(result, a.out.with_suffix(".png"))
            except ModuleNotFoundError as error:
                print(f"{a.out} is written, its picture needs {error.name}: pip install matplotlib", file=sys.stderr)


if __name__ == "__main__":
    main()
