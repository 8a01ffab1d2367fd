"""The account of a stage while it trains: steps that come back, time that was useful, updates that were left out."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from monovl_jax.config import VisionConfig
from monovl_jax.training.devices import bytes_in_use, peak_flops
from monovl_jax.training.files import AnyPath
from monovl_jax.training.flops import StepFlops
from monovl_jax.training.guards import SpikeDetector, Watchdog, save_batch
from monovl_jax.training.metrics import Row, RunLog, finite
from monovl_jax.training.stages import Stage


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, why, and the mend."""


@dataclasses.dataclass(frozen=True)
class Pending:
    """A dispatched step whose metrics are still on the device. waited: the prefetcher's clock when it was dispatched."""

    step: int
    metrics: dict[str, Any]
    batch: Any
    waited: float
    logged: bool


@dataclasses.dataclass
class Progress:
    """How far a stage is, as its checkpoints keep it (JSON values).

    position: number of the next batch. seconds: training time so far. began: wall clock when the stage first began. useful: seconds in
    which steps were made that count. skipped, in_a_row: updates left out so far, and the last of them in a row. loss: the last finite one.
    data: where the data were when it was saved (`training.loop.DataState`); version 0.1.0 did not write it.
    """

    step: int = 0
    position: int = 0
    seconds: float = 0.0
    began: float = dataclasses.field(default_factory=time.time)
    useful: float = 0.0
    skipped: int = 0
    in_a_row: int = 0
    loss: float = math.nan
    data: Any = None

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> Progress:
        names = [field.name for field in dataclasses.fields(cls) if field.name != "data"]
        return cls(**{name: meta[name] for name in names}, data=meta.get("data"))


class Clock:
    """Training time of a stage over all its processes, and what happened since the last row."""

    def __init__(self, progress: Progress):
        self._progress, self._before, self._began = progress, progress.seconds, time.monotonic()
        self._row, self._row_waited, self._tokens, self._flops = self._began, 0.0, 0, 0.0
        self._settled: float | None = None
        self._settled_waited = self._aside = 0.0

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._began

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Time in which no step is made (saving, evaluating)."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._aside += time.monotonic() - began

    def count(self, tokens: int, flops: float, waited: float) -> None:
        """A step has come back. The first of a process holds the compilation and is not counted as useful."""
        now = time.monotonic()
        self._tokens, self._flops = self._tokens + tokens, self._flops + flops
        if self._settled is not None:
            self._progress.useful += max(0.0, now - self._settled - self._aside - (waited - self._settled_waited))
        self._settled, self._settled_waited, self._aside = now, waited, 0.0
        self._progress.seconds = self.seconds

    def lap(self, waited: float) -> tuple[float, float, float]:
        """(tokens per second, model FLOP/s, share of time waited) since the last lap."""
        now = time.monotonic()
        span = max(now - self._row, 1e-9)
        result = self._tokens / span, self._flops / span, min(1.0, (waited - self._row_waited) / span)
        self._row, self._row_waited, self._tokens, self._flops = now, waited, 0, 0.0
        return result

    def goodput(self) -> float:
        return self._progress.useful / max(time.time() - self._progress.began, 1e-9)


@dataclasses.dataclass
class Settler:
    """Waits for dispatched steps, one behind, and keeps account of them.

    folder: of the stage. max_skipped: updates in a row that may be left out, less one. pending: the step that has not been waited for.
    """

    stage: Stage
    vision: VisionConfig
    folder: AnyPath
    max_skipped: int
    progress: Progress
    clock: Clock
    flops: StepFlops
    log: RunLog | None
    watchdog: Watchdog
    pending: Pending | None = None

    def __post_init__(self) -> None:
        self._spikes = SpikeDetector()
        self._peak = peak_flops(jax.local_devices()[0].device_kind)

    def settle(self) -> None:
        """Waits for the pending step, if there is one, and writes its row. Raises TrainingError after too many skipped updates in a row."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        with self.watchdog.doing("step", self.stage.name, pending.step):
            got: dict[str, Any] = jax.device_get(pending.metrics)
        progress, vision = self.progress, self.vision
        skipped, loss = bool(got["skipped"]), float(got["loss"])
        norms = {name: float(norm) for name, norm in got["grad_norms"].items()}
        progress.step, progress.position = pending.step, progress.position + 1
        progress.in_a_row = progress.in_a_row + 1 if skipped else 0
        progress.skipped += skipped
        progress.loss = progress.loss if skipped else loss
        self.clock.count(int(got["tokens"]), self.flops.step(got, vision.tokens_per_tile), pending.waited)
        spikes = self._spikes({"loss": loss, **{f"grad_norm_{name}": norm for name, norm in norms.items()}})
        if self.log is not None:
            if pending.logged or skipped:
                self.log.write(self.row(pending, got, norms) | ({"spikes": spikes} if spikes else {}))
            if spikes:
                words = ", ".join(f"{name} is {times:g} times its recent median" for name, times in spikes.items())
                self.log.event(f"{self.stage.name}, step {pending.step}: {words}")
        if skipped:
            self.skip(pending, loss, norms)

    def skip(self, pending: Pending, loss: float, norms: Mapping[str, float]) -> None:
        """Says that an update was left out; saves the batch and raises TrainingError when it was one too many."""
        progress, limit = self.progress, self.max_skipped
        wrong = ", ".join(name for name, norm in norms.items() if not math.isfinite(norm)) or "none"
        what = f"stage {self.stage.name!r}, step {pending.step}: loss {loss}, gradients that are not finite: {wrong}"
        if self.log is not None:
            self.log.event(f"{what}; the update was left out ({progress.in_a_row} in a row, {progress.skipped} in all)")
        if progress.in_a_row >= limit:
            path = save_batch(self.folder / "not_finite", f"step_{pending.step}", pending.batch)
            raise TrainingError(
                f"{what}, {progress.in_a_row} updates in a row; the last batch is in {path}. The checkpoints are good: look at the batch, "
                f"or start a new run with a lower learning rate (now {self.stage.learning_rate})"
            )

    def row(self, pending: Pending, got: Mapping[str, Any], norms: Mapping[str, float]) -> Row:
        """A row of the log; see `metrics`."""
        rate, flops, share = self.clock.lap(pending.waited)
        each, used = flops / jax.device_count(), bytes_in_use()
        tiles = int(got["tile_slots"]) * self.vision.tokens_per_tile
        return {
            "stage": self.stage.name,
            "step": pending.step,
            "loss": finite(float(got["loss"])),
            "lr": float(got["learning_rate"]),
            "grad_norm": finite(float(got["grad_norm"])),
            "part_losses": [finite(float(x)) for x in got["part_losses"]],
            "supervised": int(got["supervised"]),
            "tokens": int(got["tokens"]),
            "tokens_per_second": rate,
            "data_wait": share,
            "seconds": self.clock.seconds,
            "time": time.time(),
            "grad_norms": {name: finite(norm) for name, norm in norms.items()},
            "visual_tokens": int(got["visual_tokens"]),
            "token_fill": int(got["tokens"]) / int(got["token_slots"]),
            "tile_fill": int(got["tile_tokens"]) / tiles if tiles else None,
            "tflops": each / 1e12,
            "mfu": None if self._peak is None else each / self._peak,
            "goodput": self.clock.goodput(),
            "hbm_gb": None if used is None else used / 1e9,
            "skipped": int(got["skipped"]),
        }
