"""The measured tables of docs/kernels.md, from experiments/results/kernels/*.json and kernels_cpu.json, beside what was asked of them.

`python -m experiments.readme` writes them; a test fails when the page is out of date.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- tables: python -m experiments.readme -->", "<!-- end of tables -->"
CHIPS = ("v5e", "v5p", "v6e")
TOKENS = (4096, 16384)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)

BARS = {
    "forward": {4096: {"v5e": 1.12, "v5p": 1.12, "v6e": 1.18}, 16384: {"v5e": 1.08, "v5p": 1.08, "v6e": 1.12}},
    "backward, text frozen": {16384: {"v5e": 0.85, "v5p": 0.85, "v6e": 0.95}},
    "forward + backward, text frozen": {16384: {"v5e": 0.93, "v5p": 0.93, "v6e": 1.0}},
    "the same under full remat": {16384: {"v5e": 0.93, "v5p": 0.93, "v6e": 1.0}},
}
"""The most that a pass may cost, everything counted, as a multiple of the dense layer's."""

OPERATIONS = {
    "forward": (3, 0),
    "backward, text frozen": (3, 3),
    "forward + backward, text frozen": (6, 3),
    "the same under full remat": (8, 3),
}
"""The matmuls of a pass: those of all tokens, and those of visual tokens alone, the weight gradients."""

CPU_BARS = {"forward": 1.55, "forward + backward, text frozen": 1.3, "forward + backward": 1.3}


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


def _static(chip: str, tokens: int, share: float = 0.5) -> dict[str, Any] | None:
    path = RESULTS / "kernels" / (f"{chip}_{tokens}" + ("" if share == 0.5 else f"_visual{100 * share:.0f}") + ".json")
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def ratios() -> str:
    """Every pass, beside what is asked of it; what falls short first, then what is not known."""
    rows = []
    for name, tokens, chip in itertools.product(BARS, TOKENS, CHIPS):
        bar = BARS[name].get(tokens, {}).get(chip)
        found = (_static(chip, tokens) or {}).get("ratios", {})
        everything, kernels = found.get(f"{name}: all"), found.get(f"{name}: kernels")
        if bar is None and kernels is None:
            continue
        verdict = "" if bar is None else "**no estimate**" if everything is None else "met" if everything <= bar else "**missed**"
        shown = ["-" if ratio is None else f"{ratio:.3f}" for ratio in (everything, kernels)]
        rows.append((name, chip, f"{tokens:,}", shown[0], "-" if bar is None else f"{bar:.2f}", verdict, shown[1]))
    order = ("**missed**", "**no estimate**", "met", "")
    return _table(("pass", "chip", "tokens", "all", "bar", "", "kernels alone"), sorted(rows, key=lambda row: order.index(row[5])))


def summary() -> str:
    """The passes of most tokens, everything counted, in a line each."""
    rows = []
    for name in BARS:
        found = [(_static(chip, TOKENS[-1]) or {}).get("ratios", {}).get(f"{name}: all") for chip in CHIPS]
        rows.append((name, *("-" if ratio is None else f"{ratio:.3f}x" for ratio in found)))
    return _table(("a routed FFN over a dense one", *CHIPS), rows)


def cpu_ratio(what: str, share: float) -> float:
    """Of the implementation that a CPU takes."""
    records = json.loads((RESULTS / "kernels_cpu.json").read_text("utf-8"))["records"]
    return next(r["ratio"] for r in records if (r["implementation"], r["pass"], r["share"]) == ("xla", what, share))


def shares() -> str:
    """Every pass of 4096 tokens over the shares of visual tokens: the operations that it needs, and the chips that have all shares."""
    rows = []
    for name, (whole, of_visual) in OPERATIONS.items():
        needed = [(whole + of_visual * share) / (whole + of_visual) for share in SHARES]
        rows.append((name, "operations", *(f"{ratio:.3f}" for ratio in needed)))
        for chip in CHIPS:
            found = [_static(chip, TOKENS[0], share) for share in SHARES]
            if all(found):
                rows.append((name, chip, *(f"{result['ratios'][f'{name}: all']:.3f}" for result in found if result)))
    return _table(("pass", "chip", *(f"{share:.0%}" for share in SHARES)), rows)


def kernels() -> str:
    """Cycles and VMEM of every kernel at 4096 tokens."""
    found: dict[tuple[str, str], list[str]] = {}
    for column, chip in enumerate(CHIPS):
        result = _static(chip, 4096)
        if result is None:
            continue
        for case, cycles in result["cycles"].items():
            if case.startswith("floor") or isinstance(cycles, str):
                continue
            for kernel, count in cycles.items():
                cells = found.setdefault((case, kernel), ["-"] * len(CHIPS))
                vmem = result["vmem"].get(case, {}).get(kernel)
                cells[column] = f"{count / 1e3:,.0f}" + (f" ({vmem / 2**20:.1f} MiB)" if vmem else "")
    cases = list(dict.fromkeys(case for case, _ in found))
    ordered = sorted(found.items(), key=lambda item: cases.index(item[0][0]))
    rows = [(case, f"`{kernel}`" if kernel.startswith("routed") else kernel, *cells) for (case, kernel), cells in ordered]
    shown = [row for row in rows if row[0] != "routing"]
    return _table(("case", "kernel", *CHIPS), shown)


def cpu(result: dict[str, Any]) -> str:
    """The implementation that a CPU takes, the masked one and the baseline, over the shares of visual tokens."""
    rows = []
    for what, bar in CPU_BARS.items():
        for name in ("xla", "reference", "ragged"):
            cells = [f"{r['ratio']:.2f}" for r in result["records"] if (r["pass"], r["implementation"]) == (what, name)]
            if cells:
                rows.append((what, f"`{name}`", *cells, f"{bar:.2f} at 75%" if name == "xla" else ""))
    shares = [f"{share:.0%}" for share in dict.fromkeys(r["share"] for r in result["records"])]
    return _table(("pass", "", *shares, "bar"), rows)


def render() -> str:
    """The block between the markers: what there are results of."""
    sections = []
    if found := [result for tokens in TOKENS for chip in CHIPS if (result := _static(chip, tokens))]:
        one, most = found[0], found[-1]
        sections.append(f"""
### TPU, estimated

The compiler's cycles at {one["width"]} -> {one["inner"]}, bfloat16, half of the tokens visual, as multiples of the dense layer's
(jax {one["jax"]}, libtpu {one["libtpu"]}). "All" counts routing and the permutation of rows; "kernels alone" does not.
Rows that are computed and hold no token: {one["padding"]:.1%} of {one["tokens"]:,} tokens, {most["padding"]:.1%} of {most["tokens"]:,}.

{ratios()}

"All" by the share of visual tokens, at 4,096 tokens (`--share 0.25`; no weight gradient of text tokens is needed):

{shares()}

Thousands of cycles of each kernel at 4,096 tokens, and the VMEM it takes:

{kernels()}
""")
    if (path := RESULTS / "kernels_cpu.json").exists():
        times = json.loads(path.read_text("utf-8"))
        sections.append(f"""
### CPU, measured

{times["tokens"]} tokens, {times["width"]} -> {times["inner"]}, {times["dtype"]}, two cores (jax {times["jax"]}, {times["date"]}):
seconds over those of one dense layer in the same run, by share of visual tokens. The counts are known only at run time.

{cpu(times)}
""")
    return "".join(sections)
