"""Writes the tables of docs/planning.md from experiments/results/plan/*.json, so that no number there is typed by hand.

    python -m experiments.planning.tables      # after new plans; a test fails when the page is out of date

The plans are made by `monovl plan evip --topology TOPOLOGY --out experiments/results/plan/GENERATION.json`, the scaling by
`python -m experiments.planning.weak_scaling`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.planning.weak_scaling import table

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS, PAGE = ROOT / "experiments" / "results" / "plan", ROOT / "docs" / "planning.md"
GENERATIONS = ("v5e", "v5p", "v6e")


def _plans() -> list[dict[str, Any]]:
    paths = [RESULTS / f"{generation}.json" for generation in GENERATIONS]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


def stages_table() -> str:
    """Every stage on every topology that was planned."""
    lines = [
        "| topology | stage | mesh | micro-batches | remat | HBM of a chip, GiB | step, s | MFU | compiled in, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for plan in _plans():
        for stage in plan["stages"]:
            memory, costs, mesh = stage["memory_bytes"], stage["costs"], " x ".join(str(size) for size in stage["mesh"].values())
            used = f"{memory['peak'] / 2**30:.2f} of {memory['hbm'] / 2**30:.2f}" + ("" if stage["fits"] else ": does not fit")
            time = f"{costs['step']:.1f} | {costs['mfu']:.0%}" if costs else "- | -"
            lines.append(
                f"| {plan['topology']} | {stage['stage']} | {mesh} | {stage['accumulation']} | {stage['remat']} | {used} | {time} | "
                f"{stage['compile_seconds']:.0f} |"
            )
    return "\n".join(lines)


def delta_table() -> str:
    """What S1.1 and S2 hold on a chip because they train."""
    lines = [
        "| topology | stage | float32 masters, MiB | optimizer, MiB | frozen bfloat16, MiB | together |",
        "|---|---|---|---|---|---|",
    ]
    for plan in _plans():
        stages = {stage["stage"]: stage["state_bytes"] for stage in plan["stages"]}
        if not {"S1.1", "S2"} <= stages.keys():
            continue
        whole = sum(stages["S2"][part] for part in ("masters", "optimizer", "frozen"))
        for name in ("S1.1", "S2"):
            parts = [stages[name][part] for part in ("masters", "optimizer", "frozen")]
            sizes = " | ".join(f"{part / 2**20:,.1f}" for part in parts)
            lines.append(f"| {plan['topology']} | {name} | {sizes} | {sum(parts) / whole:.0%} of S2 |")
    return "\n".join(lines)


def sweep_table() -> str:
    """The meshes that a sweep compiled, fastest first, beside what its formula said of them."""
    path = RESULTS / "sweep_v5p.json"
    if not path.is_file():
        return ""
    (stage,) = json.loads(path.read_text(encoding="utf-8"))["stages"]
    guessed = {(tuple(c["mesh"].values()), c["remat"]): c for c in stage["candidates"]}
    lines = ["| mesh | remat | step by formula, s | step as compiled, s | HBM by formula | HBM as compiled |", "|---|---|---|---|---|---|"]
    for plan in stage["compiled"]:
        sizes, remat = tuple(plan["mesh"].values()), plan["remat"]
        guess, filled = guessed[sizes, remat], plan["memory_bytes"]["peak"] / plan["memory_bytes"]["hbm"]
        cells = f"{guess['step']:.3f} | {plan['costs']['step']:.3f} | {guess['filled']:.0%} | {filled:.0%}"
        lines.append(f"| {' x '.join(map(str, sizes))} | {remat} | {cells} |")
    return "\n".join(lines)


def scaling_table() -> str:
    """Weak scaling, where it was made."""
    path = RESULTS / "weak_scaling.json"
    return table(json.loads(path.read_text(encoding="utf-8"))["rows"]) if path.is_file() else ""


def render(page: str) -> str:
    """The page with its tables anew; each stands between a comment that names it and `<!-- end -->`."""
    for name, made in (("stages", stages_table()), ("delta", delta_table()), ("sweep", sweep_table()), ("scaling", scaling_table())):
        begin = f"<!-- {name}: python -m experiments.planning.tables -->"
        if begin in page:
            before, _, rest = page.partition(begin)
            page = f"{before}{begin}\n\n{made}\n\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
