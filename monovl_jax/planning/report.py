"""A plan as lines of text, as JSON, and as a picture of what fills a chip's memory."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monovl_jax.planning.estimate import ASSUMPTIONS, EFFICIENCY
from monovl_jax.planning.plan import StagePlan, Sweep
from monovl_jax.planning.serve import ServePlan

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
    when = " then, now taken from the cache" if compiled.program.cached else ""
    state = ", ".join(f"{name} {_gib(size)}" for name, size in compiled.state.items())
    lines = [
        f"{stage.name}: {'fits' if plan.fits else 'does not fit, ' + plan.mend}   (compiled in {compiled.program.seconds:.0f} s{when})",
        f"  {train_flags(plan)}",
        f"  state per chip     {state}",
    ]
    if memory.over is None:
        lines += [
            f"  HBM per chip       {_gib(memory.peak)} of {_gib(plan.hbm)}, headroom {_gib(plan.headroom)}: "
            f"arguments {_gib(memory.arguments)}, temporaries {_gib(memory.temporaries)}, "
            f"outputs {_gib(memory.outputs)} of which {_gib(memory.aliased)} lie in arguments",
        ]
        more = compiled.arguments - sum(compiled.state.values())
        said = (
            f"{more:+,} against the sum over shardings (what a step never reads is no argument)"
            if more
            else "equal to the sum over shardings"
        )
        lines.append(f"  arguments          {compiled.arguments:,} bytes, {said}; layouts add {_gib(compiled.padding)}")
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
            f"  estimated speed    {costs.tokens_per_second:,.0f} tokens/s, MFU {costs.mfu:.0%}; "
            f"{stage.steps * stage.batch_size:,} rows in {costs.days:.1f} days",
        ]
    return lines + [f"  note: {note}" for note in plan.notes]


def serve_lines(model: str, plan: ServePlan) -> list[str]:
    """What a person reads about prefill and decode."""
    lines = [f"{model}: {plan.rows} rows of {plan.prompt} + {plan.new} tokens on each chip: {'fits' if plan.fits else 'does not fit'}"]
    for part in (plan.prefill, plan.decode):
        memory, state = part.program.memory, ", ".join(f"{name} {_gib(size)}" for name, size in part.state.items())
        then = " then, now taken from the cache" if part.program.cached else ""
        lines.append(f"  {part.name:8s} {_gib(memory.peak)} of {_gib(part.hbm)}: {state}; compiled in {part.program.seconds:.0f} s{then}")
    if not plan.fits:
        lines.append("  try a smaller --batch-size or --sequence-length")
    elif plan.first_token is not None and plan.decode.seconds is not None and plan.tokens_per_second is not None:
        lines += [
            f"  estimated  first token after {plan.first_token:.3f} s ({plan.pieces} pieces), then {1 / plan.decode.seconds:,.0f} tokens/s "
            "a row",
            f"  estimated  {plan.tokens_per_second:,.0f} new tokens/s a chip with its prompts, "
            f"{plan.tokens_per_second * plan.chips:,.0f} on {plan.chips} chips that answer each for itself",
        ]
    return lines + [
        "times are estimates; no TPU has run this. They assume that:",
        f"  - matrix products reach {EFFICIENCY:.0%} of the chip's peak, or weights and cache pass once a step at all of HBM's bandwidth",
        "  - all rows are of full length, and nothing waits for requests",
    ]


def write_serve(path: Path, model: str, topology: str, plan: ServePlan) -> None:
    """Writes the plan of prefill and decode whole or not at all."""
    _write_text(path, {"model": model, "topology": topology} | plan.as_json())


def closing_lines() -> list[str]:
    """What the estimates rest on."""
    return ["times are estimates; no TPU has run this. They assume that:", *(f"  - {words}" for words in ASSUMPTIONS)]


def as_json(recipe: str, topology: str, plans: Sequence[StagePlan]) -> dict[str, Any]:
    return {"recipe": recipe, "topology": topology, "assumptions": list(ASSUMPTIONS), "stages": [plan.as_json() for plan in plans]}


def sweep_lines(sweep: Sweep, rows: int = 12) -> list[str]:
    """The ranking of a stage by formula, and what the compiler says about the first of it."""
    lines = [f"{sweep.stage}: {len(sweep.candidates)} candidates fit by the formula; the first are", "  " + SWEEP_HEAD]
    for found in sweep.candidates[:rows]:
        sizes = " x ".join(str(size) for size in found.sizes.values())
        lines.append(
            f"  {sizes:>22s}  {found.remat:16s} {found.stage.accumulation:12d} {found.filled:6.0%} {found.costs.step:9.2f} "
            f"{found.costs.exposed:9.2f} {found.costs.mfu:5.0%}"
        )
    lines.append(f"  compiled, fastest first ({len(sweep.plans)}):")
    return lines + ["  " + line for plan in sweep.plans for line in stage_lines(plan)]


SWEEP_HEAD = f"{'data x fsdp x tensor':>22s}  {'remat':16s} accumulation filled    step s exposed s   MFU"


def _write_text(path: Path, value: Any) -> None:
    near = path.with_name(f".{path.name}.part")
    near.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(near, path)


def write_json(path: Path, recipe: str, topology: str, plans: Sequence[StagePlan]) -> None:
    """Writes the plan whole or not at all."""
    _write_text(path, as_json(recipe, topology, plans))


def write_sweep(path: Path, recipe: str, topology: str, sweeps: Sequence[Sweep]) -> None:
    """Writes a sweep whole or not at all: of each stage the candidates by formula and the compiled plans."""
    stages = [
        {"stage": s.stage, "candidates": [c.as_json() for c in s.candidates], "compiled": [plan.as_json() for plan in s.plans]}
        for s in sweeps
    ]
    _write_text(path, {"recipe": recipe, "topology": topology, "assumptions": list(ASSUMPTIONS), "stages": stages})


def _save(figure: Any, path: Path) -> None:
    near = path.with_name(f".{path.name}.part")
    figure.savefig(near, format="png", dpi=100)
    os.replace(near, path)


def write_sweep_picture(path: Path, title: str, sweeps: Sequence[Sweep], rows: int = 10) -> None:
    """Bars of the step time by mesh, a panel each stage: compute, what HBM adds, what communication adds; diamonds where compiled."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.8 + 3 * len(sweeps)), layout="constrained")
    panels = figure.subplots(len(sweeps), squeeze=False)[:, 0]
    for axes, sweep in zip(panels, sweeps, strict=True):
        shown = sweep.candidates[:rows]
        names = [f"{' x '.join(map(str, c.sizes.values()))}, {c.remat}" for c in shown]
        costs = [c.costs for c in shown]
        parts = {
            "compute": [c.compute for c in costs],
            "HBM beyond it": [max(0.0, c.memory - c.compute) for c in costs],
            "exposed communication": [c.exposed for c in costs],
        }
        left = [0.0] * len(shown)
        for label, widths in parts.items():
            axes.barh(names, widths, left=left, label=label)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for plan in sweep.plans:
            name = f"{' x '.join(map(str, plan.mesh.values()))}, {plan.remat}"
            if plan.costs and name in names:
                axes.plot(plan.costs.step, names.index(name), "kD", markersize=5)
        axes.invert_yaxis()
        axes.set(xlabel="seconds a step, by formula; diamonds: with the compiled program's collectives", title=f"{title}, {sweep.stage}")
        axes.tick_params(labelsize=8)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    _save(figure, path)


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
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    _save(figure, path)
