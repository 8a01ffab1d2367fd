"""Independent pieces of work on a few threads, with progress in bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

Progress = Callable[[int, int], None]
"""progress(bytes done, bytes in all); called from the thread that started the work."""

Task = tuple[int, Callable[[], None]]
"""(bytes, what to do)."""


def silent(done: int, total: int) -> None:
    """Shows nothing."""


def run_all(tasks: Sequence[Task], progress: Progress = silent) -> None:
    """Does every task; the largest first. The first error stops those that have not begun and is raised.

    numpy, tensorstore and file writes release the interpreter lock, so threads are enough.
    """
    total, done = sum(size for size, _ in tasks), 0
    progress(0, total)
    with ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1))) as pool:
        sizes = {pool.submit(work): size for size, work in sorted(tasks, key=lambda task: -task[0])}
        try:
            for future in as_completed(sizes):
                future.result()
                done += sizes[future]
                progress(done, total)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
