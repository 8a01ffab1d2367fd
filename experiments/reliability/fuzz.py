"""Claim: no damaged or hostile input crashes the library, makes it hang or fills the memory, and none with a checksum is taken for whole.

    python -m experiments.reliability.fuzz [--inputs 10000] [--seed 0] [--out experiments/results/fuzz.json]
    python -m experiments.reliability.fuzz --readers images config            # some of the readers alone
    python -m experiments.reliability.fuzz --seed 0 --only images:123         # one input again, with all that is said about it

For every reader of files that somebody else may have written, a valid input is made once, changed in one to four places by mutations that
follow from the seed (bits, bytes, whole files, links and pipes, JSON values, members of archives, headers), and read as the commands read
it, in a process of its own. What comes of it is one of

    refused    an error that the commands tell in one sentence         hang      more than 10 s
    accepted   read, and right                                         memory    more than 2 GB
    crash      any other error, a panic, the end of the process        wrong     read, but not what was written, and a checksum could tell

The last four are failures. Each is tried again by itself and with fewer mutations, and kept with the changed files under `--failures`,
three of each cause at most. Exit code 0: there is none; 1: there are; 2: a reader cannot read its valid input.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import tyro

from experiments.reliability.fuzzing.pool import KINDS, BrokenReader, Count, Failure, Lane, Limits, Reader, fuzz, keep, minimised


@dataclasses.dataclass
class Settings:
    """inputs: of all readers together. seed: of all that is random. readers: names; all by default. only: READER:NUMBER, one input.
    processes: at work side by side. failures: where failing inputs are kept. out: the result; none where it is not given."""

    inputs: int = 10_000
    seed: int = 0
    readers: tuple[str, ...] = ()
    only: str | None = None
    processes: int = 2
    failures: Path = Path("runs/fuzz")
    out: Path | None = None


def head() -> str:
    return f"{'reader':14s} {'inputs':>7s} " + " ".join(f"{kind:>8s}" for kind in KINDS) + f" {'slowest':>8s} {'peak':>8s} {'time':>7s}"


def line(name: str, count: Count) -> str:
    """One row of the table."""
    counts = " ".join(f"{count.counts[kind]:8d}" for kind in KINDS)
    return f"{name:14s} {sum(count.counts.values()):7d} {counts} {count.slowest:6.1f} s {count.peak / 1e9:5.2f} GB {count.seconds:5.0f} s"


def record(counts: dict[str, Count], seed: int) -> dict[str, Any]:
    """The result as JSON values."""
    from importlib.metadata import version

    libraries = ("jax", "numpy", "pillow", "orbax-checkpoint", "tensorstore", "tokenizers", "sentencepiece", "safetensors", "array_record")
    return {
        "seed": seed,
        "inputs": sum(sum(count.counts.values()) for count in counts.values()),
        "failures": sum(count.failed for count in counts.values()),
        "readers": {
            name: {
                **count.counts,
                "slowest_seconds": round(count.slowest, 2),
                "peak_bytes": count.peak,
                "seconds": round(count.seconds, 1),
                "causes": dict(sorted(count.causes.items())),
            }
            for name, count in counts.items()
        },
        "python": platform.python_version(),
        "versions": {name: version(name) for name in libraries},
    }


def once(reader: Reader, number: int, settings: Settings) -> int:
    """One input again, made small and kept where it fails."""
    with tempfile.TemporaryDirectory() as home:
        valid = Path(home) / "valid"
        valid.mkdir()
        reader.make(valid)
        with Lane(reader, valid, Path(home), settings.seed, Limits()) as lane:
            outcome = lane.run(number)
            print(f"{outcome.kind}  {outcome.seconds:.2f} s  {outcome.peak / 1e9:.2f} GB\n{outcome.message}")
            smallest = minimised(lane, reader, settings.seed, number, outcome)
            if isinstance(smallest, Failure):
                print(keep(smallest, reader, valid, settings.seed, settings.failures))
                return 1
    return 0


def main(settings: Settings) -> int:
    """Tries the inputs, prints the table as it grows, writes the result; see the exit codes above."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from experiments.reliability.fuzzing.readers import READERS

    if unknown := sorted(set(settings.readers) - set(READERS)):
        print(f"no reader is called {unknown[0]!r}; known: {', '.join(READERS)}", file=sys.stderr)
        return 2
    if settings.only is not None:
        name, _, number = settings.only.partition(":")
        return once(READERS[name], int(number), settings)
    chosen = settings.readers or tuple(READERS)
    share = -(-settings.inputs // len(chosen))
    counts: dict[str, Count] = {}
    print(head(), flush=True)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as home:
        for name in chosen:
            try:
                counts[name] = fuzz(READERS[name], range(share), settings.seed, Path(home), settings.failures, processes=settings.processes)
            except BrokenReader as error:
                print(error, file=sys.stderr)
                return 2
            print(line(name, counts[name]), flush=True)
            for cause, times in sorted(counts[name].causes.items()):
                print(f"    {times:6d}  {cause}", flush=True)
    result = record(counts, settings.seed)
    if settings.out is not None:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{result['inputs']} inputs, {result['failures']} failures" + (f": see {settings.failures}" if result["failures"] else ""))
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
