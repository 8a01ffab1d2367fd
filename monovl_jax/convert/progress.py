"""A progress bar for the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from monovl_jax.convert.workers import Progress


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """Gives a `progress` function that draws bytes, speed and time left on stderr; nothing but the title where there is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Bar(*columns, console=Console(stderr=True))

    def show(done: int, total: int) -> None:
        if not bar.tasks:  # nothing is drawn for work that is refused at once
            bar.start()
            bar.add_task(title)
        bar.update(bar.task_ids[0], completed=done, total=total)

    try:
        yield show
    finally:
        if bar.tasks:
            bar.stop()
