"""A plan as lines of text, as JSON, and as a picture of what fills a chip's memory."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monovl_jax.planning.estimate import ASSUMPTIONS
from monovl_jax.planning.plan import StagePlan

GIB = 2**30


def _gib(value: int) -> str:
    return f"{value / GIB:.2f} GiB"


def train_flags(plan: StagePlan) -> str:
    """The flags of `monovl train` that make the step that was planned."""
    sizes = " ".join(f"--mesh.{axis} {size}" for axis, size in plan.mesh.items())
    return f"{sizes} --accumulation {plan.compiled.stage.accumulation} --remat {plan.remat}"


def stage_lines(plan: StagePlan) -> list[str]:
    """What a person reads about one stage."""
    compiled, memory, stage = plan.compiled, plan.compiled.memory, plan.compiled.stage
    state = ", ".join(f"{name} {_gib(size)}" for name, size in compiled.state.items())
    lines = [
        f"{stage.name}: {'fits' if plan.fits else 'does not fit, ' + plan.mend}   (compiled in {compiled.seconds:.0f} s)",
        f"  {train_flags(plan)}",
        f"  state per chip     {state}",
    ]
    if memory.over is None:
        lines += [
            f"  HBM per chip       {_gib(memory.peak)} of {_gib(plan.hbm)}, headroom {_gib(plan.headroom)}: arguments {_gib(memory.arguments)}, "
            f"temporaries {_gib(memory.temporaries)}, outputs {_gib(memory.outputs)} of which {_gib(memory.aliased)} lie in arguments",
        ]
    else:
        lines += [f"  HBM per chip       {_gib(memory.over)} of {_gib(plan.hbm)}"]
    if plan.kernels:
        lines.append("  Pallas kernels     " + ", ".join(f"{name} x{count}" for name, count in plan.kernels.items()))
    for row in plan.collectives:
        lines.append(
            f"  {row.kind:18s} over {row.axes or 'none'} ({row.size}): {row.bytes / 1e9:.3g} GB in {row.count} runs"
            f"{', asynchronous' if row.overlapped else ''}"
        )
    if costs := plan.costs:
        lines += [
            f"  FLOPs per step     model {costs.model_flops:.3g}, with remat {costs.hardware_flops:.3g}",
            f"  estimated step     {costs.step:.2f} s: compute {costs.compute:.2f}, HBM {costs.memory:.2f}, communication waited for "
            f"{costs.waited:.2f}, asynchronous {costs.overlapped:.2f}, exposed {costs.exposed:.2f}",
            f"  estimated speed    {costs.tokens_per_second:,.0f} tokens/s, MFU {costs.mfu:.0%}; {stage.steps * stage.batch_size:,} rows in "
            f"{costs.days:.1f} days",
        ]
    return lines + [f"  note: {note}" for note in plan.notes]


def closing_lines() -> list[str]:
    """What the estimates rest on."""
    return ["times are estimates; no TPU has run this. They assume that:", *(f"  - {words}" for words in ASSUMPTIONS)]


def as_json(recipe: str, topology: str, plans: Sequence[StagePlan]) -> dict[str, Any]:
    return {"recipe": recipe, "topology": topology, "assumptions": list(ASSUMPTIONS), "stages": [plan.as_json() for plan in plans]}


def write_json(path: Path, recipe: str, topology: str, plans: Sequence[StagePlan]) -> None:
    """Writes the plan whole or not at all."""
    near = path.with_name(f".{path.name}.part")
    near.write_text(json.dumps(as_json(recipe, topology, plans), indent=2) + "\n", encoding="utf-8")
    os.replace(near, path)


def write_picture(path: Path, title: str, plans: Sequence[StagePlan]) -> None:
    """Bars of the memory of one chip, a stage each, with the line that they must not pass."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.6 + 0.6 * len(plans)), layout="constrained")
    axes = figure.subplots()
    names = [plan.compiled.stage.name for plan in plans]
    left = [0.0] * len(plans)
    for part in ("frozen", "masters", "optimizer", "batch", "temporaries and the rest"):
        widths = []
        for plan in plans:
            state, whole = plan.compiled.state, plan.compiled.memory.peak
            widths.append((state[part] if part in state else max(0, whole - sum(state.values()))) / GIB)
        axes.barh(names, widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.axvline(plans[0].hbm / GIB, color="black", linestyle="--", label="HBM of a chip")
    axes.invert_yaxis()
    axes.set(xlabel="GiB per chip", title=title)
    axes.legend(fontsize=8)
    near = path.with_name(f".{path.name}.part")
    figure.savefig(near, format="png", dpi=120)
    os.replace(near, path)
