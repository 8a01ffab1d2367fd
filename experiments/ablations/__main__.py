"""Runs all ablations, or those named: `make ablations`. The same command goes on where it was stopped.

python -m experiments.ablations [NAME ...] [--size cpu|10x|toy] [--workers 2] [--minutes M]
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import tyro

from experiments.ablations import pages
from experiments.ablations.catalogue import EXPERIMENTS
from experiments.ablations.runner import ExperimentError, Options, run
from experiments.ablations.setting import SIZES, folder_of, selected


def entries(results: Path) -> list[tuple[Any, dict[str, Any] | None]]:
    """Every experiment with its summary, None where it has not run."""
    found = []
    for experiment in EXPERIMENTS:
        path = results / experiment.name / "summary.json"
        found.append((experiment, json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None))
    return found


def publish_index(results: Path) -> None:
    """Writes the index and the page of all plots from the summaries that are there."""
    results.mkdir(parents=True, exist_ok=True)
    (results / "index.md").write_text(pages.index(entries(results)), encoding="utf-8")
    (results / "index.html").write_text(pages.gallery(entries(results), results), encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Arguments(Options):
    """Runs the ablations, and goes on where they were stopped.

    names: experiments to run, by default all, in the order in which they need each other.
    """

    names: tyro.conf.Positional[tuple[str, ...]] = ()


def main() -> None:
    """The command."""
    arguments = tyro.cli(Arguments)
    wanted = selected(arguments.names, [experiment.name for experiment in EXPERIMENTS])
    options = Options(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Options)})
    try:
        code = run([experiment for experiment in EXPERIMENTS if experiment.name in wanted], options)
    except ExperimentError as error:
        raise SystemExit(str(error)) from None
    device = "cpu" if options.workers > 1 else jax.devices()[0].device_kind
    publish_index(folder_of(SIZES[options.size], device, options.results))
    raise SystemExit(code)


if __name__ == "__main__":
    main()
