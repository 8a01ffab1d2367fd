"""What lies in a run directory, and whether it is whole: `monovl checkpoints ls|verify`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from monovl_jax.training.checkpoint import EXPERIMENT, read_recipe
from monovl_jax.training.files import AnyPath, place, size_of
from monovl_jax.training.store import DROPPED, TEMPORARY, RunError, StageStore, complete, damaged_leaves


@dataclasses.dataclass(frozen=True)
class Entry:
    """One checkpoint. kind: base, step, final, `leftover` of a kill, which the next start removes, or `experiment`. step: of a step.

    leaves: arrays in it, 0 where no record tells. note: what a reader should know. damage: why its record cannot be used.
    """

    stage: str
    kind: str
    path: AnyPath
    step: int | None
    size: int
    leaves: int
    note: str = ""
    damage: str = ""

    def line(self) -> str:
        """For people."""
        what = f"step {self.step}" if self.step is not None else self.kind
        note = self.damage or self.note
        return f"{self.stage:12s} {what:14s} {self.size / 1e6:12,.1f} MB {self.leaves or '?':>5} leaves  {note}".rstrip()


@dataclasses.dataclass(frozen=True)
class Verdict:
    """problems: a phrase each; none for a checkpoint whose every bit is as it was written."""

    entry: Entry
    problems: tuple[str, ...]

    def line(self) -> str:
        """For people."""
        what = f"{'FAIL' if self.problems else 'PASS'}  {self.entry.path}"
        if not self.problems:
            return what
        more = f"; and {len(self.problems) - 5} more" if len(self.problems) > 5 else ""
        return f"{what}: {'; '.join(self.problems[:5])}{more}"


def _stages(run_dir: str | AnyPath) -> list[StageStore]:
    """The stages of a run that have a folder, in the order of its recipe. Raises RunError when the directory is no run."""
    run = place(run_dir)
    if not (run / EXPERIMENT).exists():
        raise RunError(f"{run} is no run directory: it has no {EXPERIMENT}; give the folder that `monovl train --run-dir` wrote")
    try:
        names = [stage.name for stage in read_recipe(run).stages]
    except RunError:  # `_experiment` tells of it
        names = sorted(folder.name for folder in (run / "stages").iterdir()) if (run / "stages").is_dir() else []
    return [store for name in names if (store := StageStore(run, name)).folder.is_dir()]


def _experiment(run_dir: str | AnyPath) -> Entry:
    path, damage = place(run_dir) / EXPERIMENT, ""
    try:
        read_recipe(run_dir)
    except RunError as error:
        damage = str(error)
    return Entry("", "experiment", path, None, 0, 0, damage=damage)


def _step(store: StageStore, step: int, latest: int | None) -> Entry:
    path, note, leaves, damage = store.step_folder(step), [], 0, ""
    try:
        leaves = len(store.check_step(step)["leaves"])
    except RunError as error:
        damage = str(error)
    if step == latest and not store.has_final():
        note.append("the run goes on here")
    if store.has_final():
        note.append("milestone")
    return Entry(store.stage, "step", path, step, size_of(path), leaves, ", ".join(note), damage)


def _record(read: Callable[[], dict[str, Any] | None]) -> tuple[dict[str, Any] | None, str]:
    """(record, damage) of what `read` gives or raises."""
    try:
        return read(), ""
    except RunError as error:
        return None, str(error)


def checkpoints(run_dir: str | AnyPath) -> list[Entry]:
    """Every checkpoint of a run, by stage and step, and a damaged `experiment.json`. Raises RunError when the directory is no run."""
    stores = _stages(run_dir)
    entries = [entry for entry in [_experiment(run_dir)] if entry.damage]
    for store in stores:
        record, damage = _record(store.base_record)
        if complete(store.base) or record is not None or damage:
            size = size_of(store.base) if store.base.exists() else 0
            note = f"frozen leaves, needed by {len(store.all_steps())} steps" if record else "not complete"
            leaves = len(record["leaves"]) if record else 0
            entries.append(Entry(store.stage, "base", store.base, None, size, leaves, note, damage))
        entries += [_step(store, step, store.latest()) for step in store.all_steps()]
        if store.has_final():
            record, damage = _record(store.final_record)
            damage = damage or _record(store.trained)[1] or _record(store.record)[1]
            leaves = len(record["leaves"]) if record else 0
            note = "the model after the stage"
            entries.append(Entry(store.stage, "final", store.final, None, size_of(store.final), leaves, note, damage))
        left = [*store.folder.glob(TEMPORARY), *store.folder.glob(f"{DROPPED}*"), *store.steps.glob(TEMPORARY), *store.steps.glob(DROPPED)]
        entries += [Entry(store.stage, "leftover", path, None, size_of(path), 0, "removed by the next start") for path in sorted(left)]
    return entries


def _problems(store: StageStore, entry: Entry) -> list[str]:
    if entry.damage:
        return [entry.damage]
    try:
        if entry.kind == "step" and entry.step is not None:
            marks = store.check_step(entry.step)["leaves"]
            return damaged_leaves(entry.path / "state", marks)
        record = store.base_record() if entry.kind == "base" else store.final_record()
    except RunError as error:
        return [str(error)]
    if record is None:
        return ["it has no record of what was written"]
    return damaged_leaves(entry.path, record["leaves"]) if record["leaves"] else []


def verify(run_dir: str | AnyPath, progress: Callable[[str], None] = lambda text: None) -> Iterator[Verdict]:
    """Reads every checkpoint of a run back, a leaf at a time, and compares its bits with those that were written.

    progress: told what is read now. Raises RunError when the directory is no run.
    """
    for entry in checkpoints(run_dir):
        if entry.kind != "leftover":
            progress(f"{entry.path} ({entry.size / 1e6:,.1f} MB)")
            yield Verdict(entry, tuple(_problems(StageStore(run_dir, entry.stage), entry)))
