"""What a run says while it trains: a JSONL log with one row per step, TensorBoard, and a progress line.

A row of `log.jsonl`:

    {"stage": "S1.1", "step": 120, "loss": 2.3456789, "lr": 0.0003, "grad_norm": 0.71, "part_losses": [2.2, 2.9], "supervised": 4096,
     "tokens": 9000, "tokens_per_second": 15000.0, "data_wait": 0.01, "seconds": 61.2, "time": 1760000000.0}

`step` counts from 1 in each stage. Floats are written so that reading gives the same bits. `seconds`: training time of the stage so far;
`data_wait`: share of the time since the row before that was spent waiting for data; `time`: of the wall clock, s since 1970.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

LOG = "log.jsonl"
PLAIN_INTERVAL = 5.0
"""Seconds between two lines where the output is no terminal."""

RECENT = 20
"""Rows over which the line averages its rates (the log holds each)."""

Row = dict[str, Any]


def read_log(path: str | Path) -> list[Row]:
    """The complete rows of a log, in order; a last line that a kill cut short is left out. [] when there is no file."""
    rows: list[Row] = []
    if not Path(path).exists():
        return rows
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "stage" in row and "step" in row:
            rows.append(row)
    return rows


def truncate_log(path: str | Path, reached: Mapping[str, int]) -> int:
    """Keeps the rows up to step `reached[stage]`, each once; stages not named lose all. Returns how many lines went.

    A resumed run makes the steps after its checkpoint again; their rows would be there twice.
    """
    path = Path(path)
    if not path.exists():
        return 0
    kept = {(row["stage"], row["step"]): row for row in reversed(read_log(path)) if row["step"] <= reached.get(row["stage"], 0)}
    text = "".join(json.dumps(row) + "\n" for row in reversed(kept.values()))
    before = path.read_text(encoding="utf-8", errors="replace")
    if text != before:
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    return before.count("\n") + (not before.endswith("\n") and before != "") - len(kept)


def _duration(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


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
        run_dir: str | Path,
        reached: Mapping[str, int],
        starts: Mapping[str, int],
        progress: bool = True,
        tensorboard: bool = True,
    ):
        run = Path(run_dir)
        self._starts, self._show = starts, progress
        self.dropped = truncate_log(run / LOG, reached)
        self._file = (run / LOG).open("a", encoding="utf-8")
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
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def say(self, text: str) -> None:
        """One line for the person who watches."""
        if self._show:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

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
        """Appends a row to all three. The line is in the operating system's hands on return: a kill of this process does not lose it."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._writer is not None:
            step = self._starts[row["stage"]] + row["step"]
            for name in ("loss", "lr", "grad_norm", "tokens_per_second", "data_wait"):
                self._writer.add_scalar(f"train/{name}", row[name], step)
            if len(row["part_losses"]) > 1:
                for number, loss in enumerate(row["part_losses"]):
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
        text = (
            f"{step}/{self._steps}  loss {row['loss']:.3f}  lr {row['lr']:.1e}  {rate:,.0f} tokens/s  "
            f"data wait {waiting:.0%}  ETA {_duration(left)}"
        )
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif now - self._spoke >= PLAIN_INTERVAL or step == self._steps:
            self._spoke = now
            self.say(f"{self._stage}  {text}")
