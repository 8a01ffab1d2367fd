"""Weak scaling on paper: stage S2 of the 2B model on 16 to 512 chips of v5p, two rows a chip.

    python -m experiments.planning.weak_scaling [--out experiments/results/plan/weak_scaling.json]

Every size is compiled by the TPU compiler (extra `aot`, no TPU); parameters lie in 16 pieces on each, so that only `data` grows. Compute
and communication follow the formulas of `monovl_jax.planning.estimate` from the compiled program's collectives. Efficiency is the tokens/s
of a chip against those at 16. No TPU has run any of it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import tyro

TOPOLOGIES = ("v5p:2x2x4", "v5p:2x4x4", "v5p:4x4x4", "v5p:4x4x8", "v5p:4x8x8", "v5p:8x8x8")
ROWS_PER_CHIP = 2


def chips(topology: str) -> int:
    """Of a topology by its name: 16 of `v5p:2x2x4`."""
    number = 1
    for size in topology.partition(":")[2].split("x"):
        number *= int(size)
    return number


def row(plan: Any, topology: str) -> dict[str, Any]:
    """What the table shows of one plan."""
    kinds: dict[str, int] = {}
    for found in plan.collectives:
        key = f"{found.kind} over {found.axes}"
        kinds[key] = kinds.get(key, 0) + found.bytes
    return {
        "topology": topology,
        "chips": chips(topology),
        "mesh": plan.mesh,
        "batch_size": plan.compiled.stage.batch_size,
        "accumulation": plan.compiled.stage.accumulation,
        "remat": plan.remat,
        "fits": plan.fits,
        "peak_bytes": plan.compiled.memory.peak,
        "compile_seconds": round(plan.compiled.program.seconds, 1),
        "collective_bytes": kinds,
        **({} if plan.costs is None else dataclasses.asdict(plan.costs) | {"exposed": plan.costs.exposed}),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| chips | mesh | rows | compute s | collectives, GB a chip | exposed s | step s | tokens/s a chip | efficiency |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    first = rows[0]["tokens_per_second"] / rows[0]["chips"]
    for found in rows:
        each, moved = found["tokens_per_second"] / found["chips"], sum(found["collective_bytes"].values()) / 1e9
        lines.append(
            f"| {found['chips']} | {' x '.join(str(size) for size in found['mesh'].values())} | {found['batch_size']} | "
            f"{found['compute']:.2f} | {moved:.0f} | {found['exposed']:.2f} | {found['step']:.2f} | {each:,.0f} | {each / first:.0%} |"
        )
    return "\n".join(lines)


def main(out: Path | None = None, topologies: tuple[str, ...] = TOPOLOGIES, stage: str = "S2") -> int:
    """Compiles what is not in the cache yet, and prints the table.

    Args:
        out: a JSON file for the rows.
        topologies: smallest first.
        stage: of the recipe `evip`.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from monovl_jax.planning.plan import EXPECTED_ERRORS, plan, prepare

    rows = []
    try:
        for topology in topologies:
            job = prepare("evip", stages=(stage,), batch_size=ROWS_PER_CHIP * chips(topology), outputs=(out,))
            (found,) = plan(job, topology, say=lambda text: print(text, file=sys.stderr, flush=True))
            rows.append(row(found, topology))
    except EXPECTED_ERRORS as error:
        print(f"weak_scaling: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    if out is not None:
        out.write_text(json.dumps({"stage": stage, "rows_per_chip": ROWS_PER_CHIP, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
