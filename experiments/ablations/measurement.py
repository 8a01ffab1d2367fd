"""Experiments that are not arms at learning rates: one file of numbers, a plot and a page."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from experiments.ablations import pages
from experiments.ablations.chains import Lab, locked
from experiments.ablations.setting import Size
from experiments.verdict import decide, together
from monovl_jax.training.files import write_json

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Within:
    """A claim about one model at a time: `gain` reads one entry of result["runs"], there is one per seed."""

    text: str
    gain: Callable[[Result], float]
    minimum: float
    unit: str


@dataclasses.dataclass(frozen=True)
class Measurement:
    """measure: makes result, with a list `runs`, one entry per seed where there are claims. draw: its plot. tables: its Markdown.

    after: experiments that must be published first.
    """

    name: str
    title: str
    published: str
    measure: Callable[[Lab, Path], Result]
    draw: Callable[[Result, Path], None]
    tables: Callable[[Result], str]
    claims: tuple[Within, ...] = ()
    after: tuple[str, ...] = ()
    reading: str = ""

    def _path(self, results: Path) -> Path:
        return results / self.name / "runs" / "result.json"

    def finished(self, results: Path, size: Size) -> bool:
        del size
        return self._path(results).is_file()

    def work(self, lab: Lab, results: Path, until: float) -> None:
        """Measures, unless it is done, too late, or another process is at it; then waits for that one."""
        with locked(lab.folder / "runs" / f"{self.name}.lock", wait=True):
            if self.finished(results, lab.setting.size) or time.monotonic() >= until:
                return
            began = time.monotonic()
            result = self.measure(lab, results)
            machine = {
                "device": jax.devices()[0].device_kind,
                "cpus": os.cpu_count(),
                "machine": platform.machine(),
                "jax": jax.__version__,
            }
            self._path(results).parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path(results), result | machine | {"seconds": time.monotonic() - began})

    def summarise(self, results: Path, size: Size) -> dict[str, Any]:
        """The result with its verdicts."""
        del size
        result = json.loads(self._path(results).read_text(encoding="utf-8"))
        claims = []
        for claim in self.claims:
            verdict = decide([claim.gain(run) for run in result["runs"]], claim.minimum)
            claims.append({**dataclasses.asdict(verdict), "text": claim.text, "unit": claim.unit})
        about = {key: result[key] for key in ("device", "cpus", "machine", "jax", "seconds")}
        words = [claim["word"] for claim in claims]
        return {"experiment": self.name, "verdict": together(words) if words else None, "claims": claims, **about}

    def publish(self, results: Path, size: Size) -> dict[str, Any]:
        """Writes summary, plot and page."""
        summary, folder = self.summarise(results, size), results / self.name
        result = json.loads(self._path(results).read_text(encoding="utf-8"))
        self.draw(result, folder / "plot.png")
        write_json(folder / "summary.json", summary)
        (folder / "page.md").write_text(self.page(summary, results), encoding="utf-8")
        return summary

    def page(self, summary: Result, results: Path) -> str:
        """The page, from the summary and the file of numbers."""
        result = json.loads(self._path(results).read_text(encoding="utf-8"))
        parts = [f"# {self.title}\n\n{self.published}"]
        if summary["claims"]:
            parts += [f"Verdict: **{summary['verdict']}** (rule: `experiments/verdict.py`).", pages.claims_table(summary)]
        parts += ["![plot](plot.png)", self.tables(result)]
        parts += [self.reading] if self.reading else []
        parts.append(
            f"Measured in {summary['seconds'] / 60:.1f} minutes, on {summary['device']} ({summary['cpus']} cores, {summary['machine']}, "
            f"jax {summary['jax']}).\n\n    python -m experiments.ablations.{self.name}\n"
        )
        return "\n\n".join(parts)
