"""Runs experiments: arms x learning rates at a seed that is not scored, then the best rate of each arm at the scored seeds.

Every run leaves one JSON file, written at once; the same command goes on where it was stopped. What several runs begin with is trained
once (`chains`). Two processes share the work of one command through file locks, each on one core.

    <results>/<size>/<experiment>/runs/<arm>-<rate>-<seed>.json      a run: scores and curves of every stage, seconds
                                 /summary.json  plot.png  page.md    made from the runs alone, by `pages`
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

from experiments.ablations import pages
from experiments.ablations.chains import Arm, Lab, locked
from experiments.ablations.setting import SIZES, Setting, Size, folder_of
from experiments.verdict import best_rate, decide, together
from monovl_jax.training.files import write_json

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "results"

Run = dict[str, Any]
"""What a run's file holds."""


class ExperimentError(RuntimeError):
    """An experiment that cannot run yet; the message names the command to run first."""


@dataclasses.dataclass(frozen=True)
class Score:
    """One number of a run. stage: after which stage, by default the last. key: of its scores. label, unit: for people."""

    label: str
    key: str
    stage: str | None = None
    unit: str = "%"

    def of(self, run: Run) -> float:
        stages = run["stages"]
        record = stages[-1] if self.stage is None else next(r for r in stages if r["stage"] == self.stage)
        return float(record["scores"][self.key])


VISUAL = Score("visual score", "visual")
"""Mean exact match over the held-out tasks, after the last stage."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence that is decided by `experiments.verdict`: arm `better` beats arm `worse` by at least `minimum`.

    gain: (run of better, run of worse) at one seed -> the difference in the direction of the claim, in `unit`.
    """

    text: str
    better: str
    worse: str
    gain: Callable[[Run, Run], float]
    minimum: float
    unit: str


def more(score: Score) -> Callable[[Run, Run], float]:
    """Higher is better."""
    return lambda better, worse: score.of(better) - score.of(worse)


def less(score: Score) -> Callable[[Run, Run], float]:
    """Lower is better."""
    return lambda better, worse: score.of(worse) - score.of(better)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A claim of a paper as arms that differ in one thing.

    published: the paper's numbers and where they are from. rates: tried for every arm; empty to take what `rate_from` (experiment, arm)
    chose. columns: of the table. panels: of the plot. reading: what to make of the result, for the page.
    """

    name: str
    title: str
    published: str
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...]
    columns: tuple[Score, ...]
    panels: tuple[pages.Panel, ...]
    rates: tuple[float, ...] = ()
    rate_from: tuple[str, str] | None = None
    score: Score = VISUAL
    reading: str = ""

    @property
    def after(self) -> tuple[str, ...]:
        """Experiments that must be published first."""
        return self.rate_from[:1] if self.rate_from else ()

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    # ---- running -------------------------------------------------------------------------------------------------------------------

    def file(self, results: Path, arm: Arm, rate: float, seed: int) -> Path:
        return results / self.name / "runs" / f"{arm.name.replace(' ', '_')}-{rate:g}-{seed}.json"

    def load(self, results: Path, arm: Arm, rate: float, seed: int) -> Run | None:
        path = self.file(results, arm, rate, seed)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def tried(self, results: Path, arm: Arm, size: Size) -> dict[float, float]:
        """{learning rate: score at the tuning seed} of the runs that are there."""
        runs = {rate: self.load(results, arm, rate, size.tuning_seed) for rate in self.rates}
        return {rate: self.score.of(run) for rate, run in runs.items() if run is not None}

    def rate(self, results: Path, arm: Arm, size: Size) -> float | None:
        """The learning rate of an arm, None while it is not known."""
        if self.rate_from is None:
            tried = self.tried(results, arm, size)
            return best_rate(tried) if len(tried) == len(self.rates) else None
        other, name = self.rate_from
        path = results / other / "summary.json"
        if not path.is_file():
            return None
        return float(json.loads(path.read_text(encoding="utf-8"))["rates"][name]["chosen"])

    def jobs(self, results: Path, size: Size) -> Iterator[tuple[Arm, float, int]]:
        """The runs that can start or are done already: (arm, rate, seed)."""
        for rate in self.rates:
            yield from ((arm, rate, size.tuning_seed) for arm in self.arms)
        rates = {arm.name: self.rate(results, arm, size) for arm in self.arms}
        for seed in size.seeds:
            yield from ((arm, rate, seed) for arm in self.arms if (rate := rates[arm.name]) is not None)

    def finished(self, results: Path, size: Size) -> bool:
        """Whether every run left its file."""
        rates = [self.rate(results, arm, size) for arm in self.arms]
        return None not in rates and all(self.file(results, *job).is_file() for job in self.jobs(results, size))

    def missing(self, lab: Lab, results: Path) -> list[tuple[Arm, float, int]]:
        """The runs that can start now: those without a file, or with one of other stages, lessons or samples than today's."""
        return [job for job in self.jobs(results, lab.setting.size) if not self._there(lab, results, job)]

    def _there(self, lab: Lab, results: Path, job: tuple[Arm, float, int]) -> bool:
        run = self.load(results, *job)
        return run is not None and run["stages"][-1]["key"] == lab.chain(*job)[-1].key

    def work(self, lab: Lab, results: Path, until: float) -> None:
        """Makes runs until there are none left, or `until` (monotonic seconds). Another process may work beside this one.

        Raises ExperimentError when another experiment must choose the learning rate first.
        """
        while time.monotonic() < until and (missing := self.missing(lab, results)):
            if not any(self._attempt(lab, results, job, until) for job in missing):
                time.sleep(0.5)  # all that is left is in another process's hands
        if time.monotonic() < until and not self.finished(results, lab.setting.size):
            needed = " and ".join(f"python -m experiments.ablations.{name}" for name in self.after)
            raise ExperimentError(f"{self.name} takes its learning rate from another experiment; run {needed} first")

    def _attempt(self, lab: Lab, results: Path, job: tuple[Arm, float, int], until: float) -> bool:
        """Makes a run unless it is there, in other hands, or too late; whether it was made."""
        arm, rate, seed = job
        path = self.file(results, *job)
        if time.monotonic() >= until:
            return False
        with locked(lab.folder / "runs" / f"{self.name}-{path.stem}.lock", wait=False) as mine:
            if not mine or self._there(lab, results, job):
                return False
            began = time.monotonic()
            records = lab.run(arm, rate, seed)
            run = {
                "experiment": self.name,
                "arm": arm.name,
                "rate": rate,
                "seed": seed,
                "scored": seed in lab.setting.size.seeds,
                "stages": records,
                "device": jax.devices()[0].device_kind,
                "cpus": os.cpu_count(),
                "machine": platform.machine(),
                "jax": jax.__version__,
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, run)
            print(f"{self.name}: {arm.name}, rate {rate:g}, seed {seed}: {self.score.label} {self.score.of(run):.1f}", end="")
            print(f"  ({time.monotonic() - began:.0f} s)", flush=True)
        return True

    # ---- what came out -------------------------------------------------------------------------------------------------------------

    def runs(self, results: Path, size: Size) -> dict[str, list[Run]]:
        """{arm: its scored runs in the order of the seeds}."""
        return {
            arm.name: [json.loads(self.file(results, arm, rate, seed).read_text(encoding="utf-8")) for seed in size.seeds]
            for arm in self.arms
            if (rate := self.rate(results, arm, size)) is not None
        }

    def summarise(self, results: Path, size: Size) -> dict[str, Any]:
        """Everything the page says, from the files of the runs alone."""
        runs = self.runs(results, size)
        claims = []
        for claim in self.claims:
            pairs = zip(runs[claim.better], runs[claim.worse], strict=True)
            verdict = decide([claim.gain(better, worse) for better, worse in pairs], claim.minimum)
            claims.append({**dataclasses.asdict(verdict), "text": claim.text, "unit": claim.unit})
        links = {record["key"]: record["seconds"] for arm in runs.values() for run in arm for record in run["stages"]}
        rates: dict[str, Any] = {}
        for arm in self.arms:
            tried = self.tried(results, arm, size)
            rates[arm.name] = {"chosen": self.rate(results, arm, size), "tried": {f"{rate:g}": score for rate, score in tried.items()}}
            for rate in tried:
                run = self.load(results, arm, rate, size.tuning_seed)
                links |= {record["key"]: record["seconds"] for record in (run or {"stages": []})["stages"]}
        first = next(iter(runs.values()))[0]
        return {
            "experiment": self.name,
            "verdict": together(claim["word"] for claim in claims) if claims else None,
            "claims": claims,
            "rates": rates,
            "seeds": list(size.seeds),
            "tuning_seed": size.tuning_seed,
            "arms": {
                name: {
                    "scores": {column.label: [column.of(run) for run in mine] for column in self.columns},
                    "rows": sum(record["rows"] for record in mine[0]["stages"][1:]),
                    "parameters": [record["trainable_parameters"] for record in mine[0]["stages"]],
                }
                for name, mine in runs.items()
            },
            "seconds": sum(links.values()),
            "links": len(links),
            **{key: first[key] for key in ("device", "cpus", "machine", "jax")},
        }

    def publish(self, results: Path, size: Size) -> dict[str, Any]:
        """Writes summary, plot and page."""
        summary = self.summarise(results, size)
        folder = results / self.name
        pages.draw(self.panels, self.runs(results, size), folder / "plot.png")
        write_json(folder / "summary.json", summary)
        (folder / "page.md").write_text(self.page(summary, results), encoding="utf-8")
        return summary

    def page(self, summary: dict[str, Any], results: Path) -> str:
        """The page of a summary."""
        del results
        return pages.page(self, summary)


# ---- the command ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Options:
    """How to run.

    size: cpu (two cores), 10x (an accelerator) or toy. workers: processes, each on one core; 1 on an accelerator. minutes: stop starting
    runs after so long, exit code 3; the same command goes on. work: where stages shared by runs are kept. results: where results go.
    """

    size: Literal["cpu", "10x", "toy"] = "cpu"
    workers: int = 2
    minutes: float = math.inf
    work: Path = Path("runs/ablations")
    results: Path = RESULTS


def run(experiments: Sequence[Any], options: Options) -> int:
    """Runs experiments in order and publishes each that is finished. 0: all are; 3: to be continued."""
    size, until = SIZES[options.size], time.monotonic() + 60 * options.minutes
    if not jax.config.jax_compilation_cache_dir:  # processes share what they compile  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str((options.work / "compiled").absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    if options.workers > 1:
        _run_beside(experiments, options)
    else:
        lab: Lab | None = None
        for experiment in experiments:
            results = folder_of(size, jax.devices()[0].device_kind, options.results)
            lab = lab or Lab(Setting(size), options.work / options.size)
            experiment.work(lab, results, until)
            with locked(options.work / options.size / "publish.lock", wait=True):  # another may need the rates that this one chose
                if experiment.finished(results, size):
                    experiment.publish(results, size)
    results = folder_of(size, "cpu" if options.workers > 1 else jax.devices()[0].device_kind, options.results)
    done = [experiment.finished(results, size) for experiment in experiments]
    for experiment, finished in zip(experiments, done, strict=True):
        if finished:
            summary = json.loads((results / experiment.name / "summary.json").read_text(encoding="utf-8"))
            print(f"{experiment.name}: {summary['verdict'] or 'measured'}", flush=True)
    return 0 if all(done) else 3


def _run_beside(experiments: Sequence[Any], options: Options) -> None:
    """The same command in several processes of one core each; a process that fails ends the others' command with its exit code."""
    names = [experiment.name for experiment in experiments]
    flags = ["--workers", "1", "--size", options.size, "--minutes", str(options.minutes)]
    flags += ["--work", str(options.work), "--results", str(options.results)]
    environment = {**os.environ, "NPROC": "1", "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "experiments.ablations", *names, *flags]
    children = [subprocess.Popen(command, env=environment) for _ in range(options.workers)]
    try:
        codes = [child.wait() for child in children]
    except BaseException:
        for child in children:
            child.terminate()
        raise
    if failed := [code for code in codes if code not in (0, 3)]:
        raise SystemExit(failed[0])


def main(experiment: Any) -> None:
    """The command of one experiment."""
    options = tyro.cli(Options, description=experiment.title)
    try:
        code = run([experiment], options)
    except ExperimentError as error:
        raise SystemExit(str(error)) from None
    raise SystemExit(code)
