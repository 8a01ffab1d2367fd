"""What a run says while it trains: a JSONL log with one row per step, TensorBoard, and a progress line.

A row of `log.jsonl`:

    {"stage": "S1.1", "step": 120, "loss": 2.3456789, "lr": 0.0003, "grad_norm": 0.71, "part_losses": [2.2, 2.9], "supervised": 4096,
     "tokens": 9000, "tokens_per_second": 15000.0, "data_wait": 0.01, "seconds": 61.2, "time": 1760000000.0,
     "grad_norms": {"text_expert": 0.3, "visual_expert": 0.64}, "visual_tokens": 6000, "token_fill": 0.97, "tile_fill": 0.9,
     "tflops": 98.1, "mfu": 0.5, "goodput": 0.93, "hbm_gb": 61.0, "skipped": 0}

`step` counts from 1 in each stage. Floats are written so that reading gives the same bits; one that is not finite is null. `seconds`:
training time of the stage so far; `time`: of the wall clock, s since 1970; `data_wait`: share of the time since the row before that was
spent waiting for data; `token_fill`, `tile_fill`: shares of the token and tile slots of this step that were used; `tflops`: model FLOP/s
per device in 10^12 (`training.flops`), `mfu`: their share of the device's peak, null where it is not known; `goodput`: share of the time
since the stage first began, restarts included, in which steps were made that count; `hbm_gb`: memory in use, in 10^9 bytes; `skipped`: 1
when the update was left out because loss or gradient were not finite; `spikes`, where there are any: {series: value / recent median}.

`events.jsonl` has what is worth a sentence, {"time", "text"}; `evaluations.jsonl` the results of evaluations in the middle of a stage.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from monovl_jax import jsontext
from monovl_jax.training.files import AnyPath, is_remote, place

LOG, EVENTS, EVALUATIONS = "log.jsonl", "events.jsonl", "evaluations.jsonl"

SCALARS = (
    *("loss", "lr", "grad_norm", "tokens_per_second", "data_wait", "token_fill", "tile_fill"),
    *("tflops", "mfu", "goodput", "hbm_gb", "skipped"),
)
"""Fields of a row that TensorBoard shows, where they are numbers."""

REMOTE_INTERVAL = 60.0
"""Seconds between two writings of a log in a bucket, where nothing can be appended."""

PLAIN_INTERVAL = 5.0
"""Seconds between two lines where the output is no terminal."""

RECENT = 20
"""Rows over which the line averages its rates (the log holds each)."""

Row = dict[str, Any]


def finite(value: float) -> float | None:
    """A number as JSON can hold it: None for one that is not finite."""
    return value if math.isfinite(value) else None


def read_log(path: str | AnyPath) -> list[Row]:
    """The complete rows of a log, in order; a last line that a kill cut short is left out. [] when there is no file."""
    rows: list[Row] = []
    path = place(path)
    if not path.exists():
        return rows
    for line in path.read_bytes().decode("utf-8", errors="replace").splitlines():
        try:
            row = jsontext.loads(line)
        except jsontext.JsonError:
            continue
        if isinstance(row, dict) and "stage" in row and "step" in row:
            rows.append(row)
    return rows


def truncate_log(path: str | AnyPath, reached: Mapping[str, int]) -> int:
    """Keeps the rows up to step `reached[stage]`, each once; stages not named lose all. Returns how many lines went.

    A resumed run makes the steps after its checkpoint again; their rows would be there twice.
    """
    path = place(path)
    if not path.exists():
        return 0
    kept = {(row["stage"], row["step"]): row for row in reversed(read_log(path)) if row["step"] <= reached.get(row["stage"], 0)}
    text = "".join(json.dumps(row) + "\n" for row in reversed(kept.values()))
    before = path.read_bytes().decode("utf-8", errors="replace")
    if text != before:
        if is_remote(path):
            path.write_text(text, encoding="utf-8")
        else:
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
    return before.count("\n") + (not before.endswith("\n") and before != "") - len(kept)


def _duration(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


class _Lines:
    """A file of JSON lines. A line appended is in the operating system's hands on return; in a bucket the file is written now and then."""

    def __init__(self, path: AnyPath):
        self._path, self._file, self._text, self._wrote = path, None, "", time.monotonic()
        if isinstance(path, Path):
            self._file: TextIO | None = path.open("a", encoding="utf-8")
        elif path.exists():
            self._text = path.read_text(encoding="utf-8")

    def append(self, value: Any) -> None:
        line = json.dumps(value) + "\n"
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
            return
        self._text += line
        if time.monotonic() - self._wrote > REMOTE_INTERVAL:
            self.flush()

    def flush(self) -> None:
        if self._file is None and self._text:
            self._path.write_text(self._text, encoding="utf-8")
            self._wrote = time.monotonic()

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()


class RunLog:
    """Writes rows, and shows them. Only one process of a run may have one.

    Args:
      run_dir: where `log.jsonl` and `tensorboard/` lie.
      reached: steps done per stage when this process starts; later rows are dropped (see `truncate_log`).
      starts: number of the first step of each stage in the whole run, the horizontal axis in TensorBoard.
      progress: show a line at all. tensorboard: write event files.
    """

    def __init__(
        self,
        run_dir: str | AnyPath,
        reached: Mapping[str, int],
        starts: Mapping[str, int],
        progress: bool = True,
        tensorboard: bool = True,
    ):
        run = place(run_dir)
        self._starts, self._show = starts, progress
        self.dropped = truncate_log(run / LOG, reached)
        truncate_log(run / EVALUATIONS, reached)
        self._rows, self._events, self._evaluations = (_Lines(run / name) for name in (LOG, EVENTS, EVALUATIONS))
        self._writer: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=sum(reached.values()) + 1)
        self._console = Console(file=sys.stderr)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._stage, self._steps, self._done_before, self._began, self._spoke = "", 0, 0, time.monotonic(), 0.0
        self._recent: deque[Row] = deque(maxlen=RECENT)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end_stage()
        for lines in (self._rows, self._events, self._evaluations):
            lines.close()
        if self._writer is not None:
            self._writer.close()

    def say(self, text: str) -> None:
        """One line for the person who watches."""
        if self._show:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def event(self, text: str) -> None:
        """Something out of the ordinary: said, and kept in `events.jsonl`."""
        self._events.append({"time": time.time(), "text": text})
        self.say(text)

    def evaluation(self, stage: str, step: int, result: Any, seconds: float) -> None:
        """What an evaluation in the middle of a stage returned; its numbers go to TensorBoard."""
        self._evaluations.append({"stage": stage, "step": step, "result": result, "seconds": seconds, "time": time.time()})
        if self._writer is not None and isinstance(result, Mapping):
            for name, value in result.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(f"evaluation/{name}", value, self._starts[stage] + step)

    def flush(self) -> None:
        """Brings logs in a bucket up to date, at a checkpoint: what is beyond it would be made again anyway."""
        for lines in (self._rows, self._events, self._evaluations):
            lines.flush()

    def begin_stage(self, stage: str, steps: int, done: int) -> None:
        """A stage of `steps` starts, or goes on after `done` of them."""
        self._stage, self._steps, self._done_before, self._began = stage, steps, done, time.monotonic()
        self._spoke = time.monotonic()
        self._recent.clear()
        if self._show and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=8), TextColumn("{task.fields[text]}"))
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task(stage, total=steps, completed=done, text="compiling ...")
            self._bar.start()
        else:
            self.say(f"{stage}: {steps} steps" + (f", continued after {done}" if done else "") + "; compiling ...")

    def end_stage(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = None

    def write(self, row: Row) -> None:
        """Appends a row to the log, TensorBoard and the progress line. A kill after it does not lose the row of a local log."""
        self._rows.append(row)
        if self._writer is not None:
            step = self._starts[row["stage"]] + row["step"]
            for name in SCALARS:
                if row.get(name) is not None:
                    self._writer.add_scalar(f"train/{name}", row[name], step)
            for name, norm in row["grad_norms"].items():
                if norm is not None:
                    self._writer.add_scalar(f"train/grad_norm_{name}", norm, step)
            if len(row["part_losses"]) > 1:
                for number, loss in enumerate(row["part_losses"]):
                    if loss is None:
                        continue
                    self._writer.add_scalar(f"train/loss_part_{number}", loss, step)
        self._progress(row)

    def _progress(self, row: Row) -> None:
        if not self._show:
            return
        now, step = time.monotonic(), row["step"]
        self._recent.append(row)
        seconds = [r["tokens"] / max(r["tokens_per_second"], 1e-9) for r in self._recent]
        rate = sum(r["tokens"] for r in self._recent) / max(sum(seconds), 1e-9)
        waiting = sum(s * r["data_wait"] for s, r in zip(seconds, self._recent)) / max(sum(seconds), 1e-9)
        left = (now - self._began) / max(1, step - self._done_before) * (self._steps - step)
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.3f}"
        use = "" if row.get("mfu") is None else f"MFU {row['mfu']:.0%}  "
        text = (
            f"{step}/{self._steps}  loss {loss}  lr {row['lr']:.1e}  {rate:,.0f} tokens/s  {use}"
            f"data wait {waiting:.0%}  ETA {_duration(left)}"
        )
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif now - self._spoke >= PLAIN_INTERVAL or step == self._steps:
            self._spoke = now
            self.say(f"{self._stage}  {text}")
