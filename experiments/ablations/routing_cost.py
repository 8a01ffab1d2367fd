"""What routing costs: reference (both experts on every token), gather, and ours, against the share of visual tokens.

The released code of Mono-InternVL runs both FFN experts on all tokens and blends by a mask, twice the FLOPs of a dense FFN
(modeling_internlm2_ve.py:704). Mono-InternVL-1.5 (arXiv 2507.12566) replaces it by a fused kernel: throughput 61 -> 77 tokens/s
(second-hand). Here one FFN layer, forward and backward; no verdict, since this is no kernel of theirs on no device of theirs.

    both      every expert computes every token, and each token selects its own (`implementation="reference"`)
    gather    every expert computes its own tokens, picked by indices; their number is a constant of the program: a bound, since in
              training it changes with every batch and would compile anew
    ours      `pallas_kernels.routed_swiglu`, one program for every share
    dense     one FFN without experts on all tokens: the floor

    python -m experiments.ablations.routing_cost      -> experiments/results/ablations/routing_cost/page.md
    on a TPU: python -m pallas_kernels.benchmark      (the Pallas kernels; --static v6e:2x2 estimates without one)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.ablations import pages
from experiments.ablations.chains import Lab
from experiments.ablations.measurement import Measurement, Result
from experiments.ablations.runner import main
from experiments.ablations.setting import SIZES
from pallas_kernels import make_routing, routed_swiglu
from pallas_kernels.reference import swiglu

SHARES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
METHODS = ("dense", "gather", "ours", "both")


def _gather(x: jax.Array, experts: Any, visual: np.ndarray) -> jax.Array:
    out = jnp.zeros_like(x)
    for e, weights in enumerate(experts):
        mine = np.flatnonzero(visual == e)
        if len(mine):
            out = out.at[mine].set(swiglu(x[mine], *weights))
    return out


def functions(visual: np.ndarray) -> dict[str, Callable[[jax.Array, Any, Any], jax.Array]]:
    """{method: (tokens [T, D], two experts, expert of each token) -> [T, D]}."""
    return {
        "dense": lambda x, experts, ids: swiglu(x, *experts[0]),
        "gather": lambda x, experts, ids: _gather(x, experts, visual),
        "ours": lambda x, experts, ids: routed_swiglu(x[None], experts, make_routing(ids[None]))[0],
        "both": lambda x, experts, ids: routed_swiglu(x[None], experts, make_routing(ids[None]), implementation="reference")[0],
    }


def rows_computed(visual: np.ndarray) -> dict[str, int]:
    """Rows that pass an FFN, by method. One row costs 6 D F FLOPs forward and twice that backward."""
    routing, tokens = make_routing(jnp.asarray(visual[None], jnp.int32)), len(visual)
    ours = int(jnp.sum(routing.blocks)) * routing.block_rows
    return {"dense": tokens, "gather": tokens, "ours": ours, "both": 2 * tokens}


def measure(lab: Lab, results: Path) -> Result:
    """Median seconds of forward and backward over rounds in which the methods take turns."""
    del results
    toy = lab.setting.size == SIZES["toy"]
    tokens, d, f, rounds = (64, 16, 32, 1) if toy else (2048, 256, 1024, 15)
    keys = jax.random.split(jax.random.key(0), 7)
    x = jax.random.normal(keys[0], (tokens, d))
    weights = [jax.random.normal(k, s) * s[0] ** -0.5 for k, s in zip(keys[1:], ((d, f), (d, f), (f, d)) * 2)]
    experts, compiled, out = (tuple(weights[:3]), tuple(weights[3:])), {}, []
    for share in SHARES[:: 4 if toy else 1]:
        visual = np.random.default_rng(0).permutation(np.arange(tokens) < share * tokens).astype(np.int32)
        ids = jnp.asarray(visual)
        for method, f_ in functions(visual).items():
            if method == "gather" or method not in compiled:
                compiled[method] = jax.jit(jax.grad(lambda x, e, ids, f_=f_: jnp.sum(f_(x, e, ids) ** 2), (0, 1)))
                jax.block_until_ready(compiled[method](x, experts, ids))
        seconds: dict[str, list[float]] = {method: [] for method in METHODS}
        for _ in range(rounds):
            for method in METHODS:
                began = time.perf_counter()
                jax.block_until_ready(compiled[method](x, experts, ids))
                seconds[method].append(time.perf_counter() - began)
        ratios = {m: np.array(seconds[m]) / np.array(seconds["dense"]) for m in METHODS}
        out.append(
            {
                "share": share,
                "rows": rows_computed(visual),
                "seconds": {m: float(np.median(s)) for m, s in seconds.items()},
                "ratio": {m: float(np.median(r)) for m, r in ratios.items()},
                "quartiles": {m: [float(q) for q in np.percentile(r, (25, 75))] for m, r in ratios.items()},
            }
        )
    return {"tokens": tokens, "hidden": d, "intermediate": f, "rounds": rounds, "shares": out}


def draw(result: Result, path: Path) -> None:
    """Two axes: FLOPs and time, relative to the dense FFN."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    shares = [100 * entry["share"] for entry in result["shares"]]
    for number, method in enumerate(METHODS):
        style = {"color": pages.GREYS[number], "linestyle": pages.LINES[number], "marker": pages.MARKS[number], "markersize": 4}
        left.plot(shares, [e["rows"][method] / e["rows"]["dense"] for e in result["shares"]], label=method, **style)
        right.plot(shares, [e["ratio"][method] for e in result["shares"]], label=method, **style)
        low, high = zip(*[e["quartiles"][method] for e in result["shares"]])
        right.fill_between(shares, low, high, color=pages.GREYS[number], alpha=0.12, linewidth=0)
    for ax, what in ((left, "FLOPs"), (right, "time (median and quartiles)")):
        ax.set_xlabel("visual tokens, % of all")
        ax.set_ylabel(f"{what}, dense FFN = 1", fontsize=9)
        ax.set_ylim(bottom=0)
        ax.grid(color="0.9", linewidth=0.8)
    left.legend(frameon=False, fontsize=9)
    pages.save(figure, path)


def tables(result: Result) -> str:
    """FLOPs and time relative to the dense FFN."""
    rows = [
        (
            f"{entry['share']:.1%}",
            *(f"{entry['rows'][m] / entry['rows']['dense']:.2f}" for m in METHODS[1:]),
            *(f"{entry['ratio'][m]:.2f}" for m in METHODS[1:]),
        )
        for entry in result["shares"]
    ]
    header = ("visual tokens", *(f"FLOPs, {m}" for m in METHODS[1:]), *(f"time, {m}" for m in METHODS[1:]))
    size = f"{result['tokens']} tokens, hidden size {result['hidden']}, intermediate size {result['intermediate']}, float32"
    return f"One FFN layer, {size}; forward and backward, relative to a dense FFN; median of {result['rounds']} rounds in turn.\n\n" + (
        pages.table(header, rows)
    )


EXPERIMENT = Measurement(
    name="routing_cost",
    title="What routing costs",
    published="The released code computes both FFN experts for every token, 2x the FLOPs; fused in 1.5: 61 to 77 tokens/s (second-hand).",
    measure=measure,
    draw=draw,
    tables=tables,
    reading=(
        "Both experts on every token cost what their FLOPs say, twice a dense layer, at every share. Ours costs 1% less to 24% more "
        "than the dense layer, most where one expert has all tokens, and is one program for every share. The bound that knows the "
        "number of tokens of each expert while compiling stays within 4% of it. Two cores, small sizes: what it says of a TPU is in "
        "docs/kernels.md."
    ),
)

if __name__ == "__main__":
    main(EXPERIMENT)
