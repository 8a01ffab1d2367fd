"""Runs recorded cases and writes the summary that the README quotes.

    python -m experiments.parity.summarise CASE_DIR... --out experiments/results/parity.json

Cases with `.bin` weights need the extra `torch`; a case that cannot run is an error here, never left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import tyro

from monovl_jax.evaluation.parity import run_case


def main(cases: tyro.conf.Positional[tuple[Path, ...]], out: Path | None = None) -> dict[str, Any]:
    """Counts compared outputs and failures, and the largest difference of logits, losses and gradients."""
    results = {case: run_case(case) for case in cases}
    checks = [check for found in results.values() for check in found]

    def largest(*prefixes: str) -> float:
        return max((c.max_abs_diff for c in checks if c.name.startswith(prefixes)), default=0.0)

    groups: dict[str, int] = {}
    for case in results:
        groups[case.parent.name] = groups.get(case.parent.name, 0) + 1
    summary = {
        "cases": len(results),
        "groups": groups,
        "checks": len(checks),
        "failed": sum(not c.passed for c in checks),
        "logits": largest("logits", "gen_scores"),
        "loss": largest("loss"),
        "gradients": largest("grad:"),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    text = json.dumps(summary, indent=2)
    print(text)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    return summary


if __name__ == "__main__":
    tyro.cli(main)
