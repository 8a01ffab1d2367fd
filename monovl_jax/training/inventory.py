"""What lies in a run directory, and whether it is whole: `monovl checkpoints ls|verify`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from monovl_jax.training.checkpoint import EXPERIMENT, read_recipe
from monovl_jax.training.files import AnyPath, place, size_of
from monovl_jax.training.store import DROPPED, TEMPORARY, RunError, StageStore, complete, damaged_leaves


@dataclasses.dataclass(frozen=True)
class Entry:
    """One checkpoint. kind: base, step, final, or `leftover` of a kill, which the next start removes. step: of a step checkpoint.

    leaves: arrays in it, 0 where no record tells. note: what a reader should know.
    """

    stage: str
    kind: str
    path: AnyPath
    step: int | None
    size: int
    leaves: int
    note: str = ""

    def line(self) -> str:
        """For people."""
        what = f"step {self.step}" if self.step is not None else self.kind
        return f"{self.stage:12s} {what:14s} {self.size / 1e6:12,.1f} MB {self.leaves or '?':>5} leaves  {self.note}".rstrip()


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
    stores = [StageStore(run, stage.name) for stage in read_recipe(run).stages]
    return [store for store in stores if store.folder.exists()]


def _step(store: StageStore, step: int, latest: int | None) -> Entry:
    path, note, leaves = store.step_folder(step), [], 0
    try:
        meta = store.meta(step)
        leaves = len(meta["leaves"])
        base = store.base_record()
        if base is None or base["digest"] != meta["base"]:
            note.append("its base is not there")
        if meta["stage"] != store.stage:
            note.append(f"of stage {meta['stage']}")
    except RunError:
        note.append("its meta cannot be read")
    if step == latest and not store.has_final():
        note.append("the run goes on here")
    if store.has_final():
        note.append("milestone")
    return Entry(store.stage, "step", path, step, size_of(path), leaves, ", ".join(note))


def checkpoints(run_dir: str | AnyPath) -> list[Entry]:
    """Every checkpoint of a run, by stage and step. Raises RunError when the directory is no run."""
    entries = []
    for store in _stages(run_dir):
        if complete(store.base) or store.base_record() is not None:
            record, steps = store.base_record(), store.all_steps()
            size = size_of(store.base) if store.base.exists() else 0
            note = f"frozen leaves, needed by {len(steps)} steps" if record else "not complete"
            entries.append(Entry(store.stage, "base", store.base, None, size, len(record["leaves"]) if record else 0, note))
        entries += [_step(store, step, store.latest()) for step in store.all_steps()]
        if store.has_final():
            record = store.final_record()
            leaves = len(record["leaves"]) if record else 0
            entries.append(Entry(store.stage, "final", store.final, None, size_of(store.final), leaves, "the model after the stage"))
        left = [*store.folder.glob(TEMPORARY), *store.folder.glob(f"{DROPPED}*"), *store.steps.glob(TEMPORARY), *store.steps.glob(DROPPED)]
        entries += [Entry(store.stage, "leftover", path, None, size_of(path), 0, "removed by the next start") for path in sorted(left)]
    return entries


def _problems(store: StageStore, entry: Entry) -> list[str]:
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
