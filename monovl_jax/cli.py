"""`monovl <command>`: parse, call, print. No logic."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import tyro

Positional = tyro.conf.Positional


def parity(cases: Positional[tuple[Path, ...]], *, json_output: Annotated[bool, tyro.conf.arg(name="json")] = False) -> int:
    """Compare the model with recorded outputs of the PyTorch code (docs/parity.md). Exit code 1 on any FAIL, 2 on a case not understood.

    Args:
        cases: folders of recorded cases.
        json_output: print one JSON object instead of lines.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from monovl_jax.evaluation.parity import EXPECTED_ERRORS, run_case

    if not cases:
        print("monovl parity: give at least one case folder", file=sys.stderr)
        return 2
    results, failed, unknown = [], False, False
    for case in cases:
        try:
            checks = run_case(case)
        except EXPECTED_ERRORS as error:
            results.append({"case": str(case), "error": str(error)})
            print(f"monovl parity: {error}", file=sys.stderr)
            unknown = True
            continue
        results.append({"case": str(case), "checks": [dataclasses.asdict(c) for c in checks]})
        failed |= not all(c.passed for c in checks)
        if not json_output:
            for c in checks:
                note = f"  ({c.note})" if c.note else ""
                print(f"{'PASS' if c.passed else 'FAIL'}  {case.parent.name}/{case.name}  {c.name}  {c.max_abs_diff:.3g}  [{c.tolerance}]{note}")
    code = 1 if failed else 2 if unknown else 0
    if json_output:
        print(json.dumps({"cases": results, "exit_code": code}, indent=2))
    return code


COMMANDS = {"parity": parity}


def main() -> None:
    """Entry point of the console script."""
    sys.exit(tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="monovl", description="Monolithic vision-language models in JAX."))


if __name__ == "__main__":
    main()
