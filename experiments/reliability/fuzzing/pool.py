"""Runs damaged inputs in processes of their own, which may crash, hang or fill the memory, and makes a failing one as small as it gets."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import multiprocessing
import os
import random
import resource
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from experiments.reliability.fuzzing.mutations import SECRET, Files, Mutation, read_folder, write_folder
from monovl_jax.cli import quiet_orbax

Kind = Literal["refused", "accepted", "crash", "hang", "memory", "wrong"]
FAILURES: tuple[Kind, ...] = ("crash", "hang", "memory", "wrong")
KINDS: tuple[Kind, ...] = ("refused", "accepted", *FAILURES)

MOST_MUTATIONS = 4
MINIMISED = 3
"""Inputs of one cause that are made small and kept; more of it are counted."""
_RENEWED = 1_000
"""Inputs after which a process is replaced: what libraries keep for good must not add up to a failure."""
_ROOM, _LARGEST_FILE = 4 << 30, 1 << 30
_STARTING = 300.0


@dataclasses.dataclass(frozen=True)
class Change:
    """names: files that are not what they were. forged: checksums were made to fit again."""

    names: frozenset[str]
    forged: bool


@dataclasses.dataclass(frozen=True)
class Reader:
    """One way in which the library reads what others wrote.

    make: writes a valid input into an empty folder, once. read: reads a folder as the library does and returns what it found; names: the
    files that are of interest. right: what is wrong with a value that was found, given the value of the valid input; "" when it is right,
    or when nothing in the format could tell. mutations: some drawn for each input. expected: what the commands catch and tell in one
    sentence.
    """

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path, frozenset[str]], Any]
    right: Callable[[Any, Any, Change], str]
    mutations: tuple[Mutation, ...]
    expected: tuple[type[Exception], ...] = (ValueError, OSError)

    def __reduce__(self) -> Any:
        """Mutations are functions within functions: another process looks the reader up in `READERS` of the module of `read`."""
        return _find, (self.read.__module__, self.name)


def _find(module: str, name: str) -> Reader:
    return next(reader for reader in importlib.import_module(module).READERS if reader.name == name)


class Refused(ValueError):
    """Some of an input was refused, and the rest was read. found: what `Reader.right` judges."""

    def __init__(self, message: str, found: Any) -> None:
        super().__init__(message)
        self.found = found


@dataclasses.dataclass(frozen=True)
class Limits:
    """seconds an input may take, bytes of memory that its process may hold."""

    seconds: float = 10.0
    memory: int = 2 << 30


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of an input. cause: the same for failures that have probably one reason."""

    kind: Kind
    message: str
    seconds: float = 0.0
    peak: int = 0
    cause: str = ""


@dataclasses.dataclass(frozen=True)
class Failure:
    """A failing input: the mutations that are needed, and the outcome with those alone."""

    reader: str
    number: int
    kept: tuple[int, ...]
    mutations: tuple[str, ...]
    outcome: Outcome


# ---- an input ----------------------------------------------------------------------------------------------------------------------


def plan(reader: Reader, seed: int, number: int) -> list[tuple[Mutation, str]]:
    """The mutations of an input, each with its own seed."""
    rng = random.Random(f"{seed} {reader.name} {number}")
    count = rng.choice((1, 1, 1, 2, 2, 3, MOST_MUTATIONS))
    return [(rng.choice(reader.mutations), f"{seed} {reader.name} {number} {place}") for place in range(count)]


def mutated(reader: Reader, whole: Files, seed: int, number: int, kept: Sequence[int] | None = None) -> tuple[Files, Change]:
    """The files of an input. kept: places of the mutations that are applied; all by default."""
    files, forged = dict(whole), False
    for place, (mutation, own) in enumerate(plan(reader, seed, number)):
        if kept is None or place in kept:
            mutation.apply(files, random.Random(own))
            forged |= mutation.forges
    names = frozenset(name for name in files.keys() | whole.keys() if files.get(name) != whole.get(name))
    return files, Change(names, forged)


# ---- in the process ----------------------------------------------------------------------------------------------------------------


def _status(field: str) -> int:
    """Bytes of a line of /proc/self/status; 0 where there is none."""
    try:
        with open("/proc/self/status") as status:
            return next((int(line.split()[1]) << 10 for line in status if line.startswith(field)), 0)
    except OSError:
        return 0


def _forget_peak() -> None:
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _peak() -> int:
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _limit_process() -> None:
    """An allocation that would end the machine fails instead; so does a file without end."""
    if size := _status("VmSize"):
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (size + _ROOM, hard))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST_FILE, hard))


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _beyond_any_machine(error: MemoryError) -> bool:
    """Whether NumPy asked for more than the machine has, which is refused at once, whatever the limit."""
    return getattr(error, "_total_size", 0) > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cause(error: BaseException) -> str:
    """Kind and last place in the library."""
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if "monovl_jax" in Path(frame.filename).parts]
    where = f"{Path(places[-1].filename).name}:{places[-1].lineno}" if places else "outside"
    return f"{type(error).__name__} at {where}"


def _attempt(reader: Reader, folder: Path, whole: Any, change: Change, said: Any, limits: Limits) -> Outcome:
    """Reads a folder and judges. said: the file that takes the process's standard error."""
    said.seek(0)
    said.truncate()
    _forget_peak()
    began = time.monotonic()
    found, kind, message, cause = None, "accepted", "", ""
    try:
        found = reader.read(folder, change.names)
    except (*reader.expected, Refused) as error:
        found, kind, message, cause = getattr(error, "found", None), "refused", str(error), _cause(error)
        if any(isinstance(link, MemoryError) and not _beyond_any_machine(link) for link in _chain(error)):
            kind = "memory"
        elif not message.strip():
            kind, message = "crash", f"{type(error).__name__} without a word"
    except BaseException as error:  # a panic of Rust is no Exception
        kind = "memory" if isinstance(error, MemoryError) else "crash"
        message, cause = traceback.format_exc(), _cause(error)
    seconds, peak = time.monotonic() - began, _peak()
    said.seek(0)
    noise = said.read().decode(errors="replace")
    if (kind == "accepted" or found is not None) and (problem := reader.right(found, whole, change)):
        kind, message, cause = "wrong", problem, problem.split(":")[0]
    if kind in ("accepted", "refused") and ("panicked at" in noise or "Traceback (most recent" in noise):
        kind, message, cause = "crash", noise[-2_000:], "it wrote to standard error"
    if kind in ("accepted", "refused") and peak > limits.memory:
        kind, cause = "memory", cause or "too much memory"
        message = f"{peak / 1e9:.1f} GB at its peak. {message}"
    if kind in ("accepted", "refused") and seconds > limits.seconds:
        kind, cause = "hang", "slow"
        message = f"{seconds:.1f} s. {message}"
    return Outcome(kind, message[-4_000:], seconds, peak, cause)


def _work(reader: Reader, valid: Path, home: Path, seed: int, limits: Limits, connection: Any) -> None:
    """What a process does: reads the valid input, then every input that it is told, until it is told None."""
    said = os.fdopen(os.open(home / f"{os.getpid()}.stderr", os.O_RDWR | os.O_CREAT), "w+b", buffering=0)
    os.dup2(said.fileno(), 2)
    quiet_orbax()  # as every command does
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    place = home / str(os.getpid())
    try:
        files = read_folder(valid)
        place.mkdir()
        write_folder(files, place / "in")
        whole = reader.read(place / "in", frozenset(files))
        os.chdir(home)
        shutil.rmtree(place)
        _limit_process()
    except BaseException:
        connection.send(traceback.format_exc())
        return
    connection.send("")
    while (task := connection.recv()) is not None:
        number, kept = task
        place.mkdir()
        (place / SECRET).write_text("nobody should read this\n")
        changed, change = mutated(reader, files, seed, number, kept)
        write_folder(changed, place / "in")
        outcome = _attempt(reader, place / "in", whole, change, said, limits)
        os.chdir(home)
        shutil.rmtree(place, ignore_errors=True)
        connection.send(outcome)


# ---- outside of it -----------------------------------------------------------------------------------------------------------------


class BrokenReader(RuntimeError):
    """A reader whose valid input cannot be made or read; the message is its traceback."""


class Lane:
    """One process after another, each for many inputs, replaced when it dies, hangs or grows old."""

    def __init__(self, reader: Reader, valid: Path, home: Path, seed: int, limits: Limits) -> None:
        self._arguments = (reader, valid, home, seed, limits)
        self._limits, self._process, self._done = limits, None, 0
        self._connection: Any = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        process = context.Process(target=_work, args=(*self._arguments, theirs), daemon=True)
        process.start()
        self._process = process
        theirs.close()
        problem = "it did not start in time"
        if self._connection.poll(_STARTING):
            with contextlib.suppress(EOFError):
                problem = self._connection.recv()
        if problem:
            self.close()
            raise BrokenReader(f"{self._arguments[0].name}: the valid input cannot be read\n{problem}")
        self._done = 0

    def run(self, number: int, kept: Sequence[int] | None = None) -> Outcome:
        """What becomes of an input."""
        if self._process is None or self._done >= _RENEWED:
            self.close()
            self._start()
        assert self._process is not None
        began = time.monotonic()
        try:
            self._connection.send((number, kept))
            if self._connection.poll(1.5 * self._limits.seconds):  # it says itself when it was slow
                self._done += 1
                return self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join(10)
            code, seconds = self._process.exitcode, time.monotonic() - began
            self.close()
            return Outcome("crash", f"the process ended with code {code}", seconds, 0, f"exit {code}")
        self.close()
        return Outcome("hang", f"no end after {1.5 * self._limits.seconds:.1f} s", time.monotonic() - began, 0, "hang")

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            shutil.rmtree(self._arguments[2] / str(self._process.pid), ignore_errors=True)
            (self._arguments[2] / f"{self._process.pid}.stderr").unlink(missing_ok=True)
            self._process = None

    def __enter__(self) -> Lane:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def minimised(lane: Lane, reader: Reader, seed: int, number: int, outcome: Outcome) -> Failure | Outcome:
    """The input with as few mutations as still fail in the same way; another Outcome when it does not fail again by itself."""
    chosen = plan(reader, seed, number)
    kept, best = tuple(range(len(chosen))), lane.run(number)
    if best.kind not in FAILURES:
        return best
    for place in reversed(range(len(chosen))):
        fewer = tuple(other for other in kept if other != place)
        if fewer and (again := lane.run(number, fewer)).kind == best.kind:
            kept, best = fewer, again
    return Failure(reader.name, number, kept, tuple(chosen[place][0].name for place in kept), best)


def keep(failure: Failure, reader: Reader, valid: Path, seed: int, folder: Path) -> Path:
    """Writes a failing input, its files that were changed and what happened into a new folder."""
    target = folder / f"{reader.name}-{failure.number}"
    shutil.rmtree(target, ignore_errors=True)
    files, change = mutated(reader, read_folder(valid), seed, failure.number, failure.kept)
    write_folder({name: content for name, content in files.items() if name in change.names}, target / "changed")
    missing = sorted(change.names - files.keys())
    told = failure.outcome
    lines = [
        f"{reader.name}, input {failure.number} of seed {seed}: {told.kind} ({told.cause})",
        f"mutations: {', '.join(failure.mutations)}; files: {', '.join(sorted(change.names))[:500]}",
        *([f"removed: {', '.join(missing)}"] if missing else []),
        f"{told.seconds:.1f} s, {told.peak / 1e9:.2f} GB",
        f"python -m experiments.reliability.fuzz --seed {seed} --only {reader.name}:{failure.number}",
        "",
        told.message,
    ]
    (target / "report.txt").write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")
    return target


@dataclasses.dataclass
class Count:
    """What became of all inputs of a reader."""

    counts: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    causes: dict[str, int] = dataclasses.field(default_factory=dict)
    failures: list[Failure] = dataclasses.field(default_factory=list)
    slowest: float = 0.0
    peak: int = 0
    seconds: float = 0.0

    def add(self, outcome: Outcome) -> None:
        self.counts[outcome.kind] += 1
        self.slowest, self.peak = max(self.slowest, outcome.seconds), max(self.peak, outcome.peak)
        if outcome.kind in FAILURES:
            cause = f"{outcome.kind}: {outcome.cause}"
            self.causes[cause] = self.causes.get(cause, 0) + 1

    @property
    def failed(self) -> int:
        return sum(self.counts[kind] for kind in FAILURES)


def fuzz(
    reader: Reader,
    inputs: Sequence[int],
    seed: int,
    home: Path,
    failures: Path,
    *,
    processes: int = 2,
    limits: Limits = Limits(),
    progress: Callable[[int], None] = lambda done: None,
) -> Count:
    """Tries inputs of one reader; failing ones go, as small as they get, into folders of `failures`.

    Raises BrokenReader when the valid input itself cannot be read.
    """
    began, count, lock = time.monotonic(), Count(), threading.Lock()
    valid = home / reader.name / "valid"
    shutil.rmtree(home / reader.name, ignore_errors=True)
    valid.mkdir(parents=True)
    reader.make(valid)
    waiting, done = iter(inputs), 0

    def settle(lane: Lane, number: int, outcome: Outcome) -> None:
        nonlocal done
        cause = f"{outcome.kind}: {outcome.cause}"
        if outcome.kind in FAILURES and count.causes.get(cause, 0) < MINIMISED:
            smallest = minimised(lane, reader, seed, number, outcome)
            if isinstance(smallest, Failure):
                keep(smallest, reader, valid, seed, failures)
                outcome = dataclasses.replace(smallest.outcome, seconds=outcome.seconds)
                with lock:
                    count.failures.append(smallest)
            else:
                outcome = smallest  # it was the other process, or a busy machine
        with lock:
            count.add(outcome)
            done += 1
            progress(done)

    def work() -> None:
        with Lane(reader, valid, home / reader.name, seed, limits) as lane:
            while True:
                with lock:
                    number = next(waiting, None)
                if number is None:
                    return
                settle(lane, number, lane.run(number))

    with ThreadPoolExecutor(processes) as threads:
        for lane in [threads.submit(work) for _ in range(processes)]:
            lane.result()
    count.seconds = time.monotonic() - began
    return count


assert sys.platform != "win32", "pipes, limits of memory and /proc are those of Linux and macOS"
