"""One program compiled by the TPU compiler for devices that are not there: its memory and its text. Nothing is allocated, nothing runs.

What the compiler said is kept on disk, so that the same program is not compiled twice: the key holds the program itself, the compiler's
options and version, and the places of the devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from monovl_jax import jsontext

LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}
"""Environment under which libtpu compiles on a machine without a TPU, also in two processes at once. The last two change nothing of a
topology that is asked for by name; without them libtpu warns that it finds no TPU."""

_NAME = re.compile(r"[a-z0-9]+:\d+x\d+(x\d+)?")
_NEEDED = re.compile(
    r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm|HBM, the total memory required for HLO temporaries \(([\d.]+)([KMGT]?)\)"
)
"""Both ways in which libtpu says that a program does not fit; the second leaves out the arguments."""


_CHECK = re.compile(
    r"(%\S+) = stablehlo\.constant dense<\d+>( : tensor<i32>\s+(%\S+) = stablehlo\.constant dense<-1> : tensor<i32>"
    r"\s+%\S+ = stablehlo\.select %\S+, \3, \1 :)"
)
"""What is left of a `checkify.debug_check` outside checkify: nothing reads it, and its number depends on what was traced before."""


class PlanError(ValueError):
    """A plan that cannot be made; the message says in one sentence what is wrong and the mend."""


def topology(name: str) -> list[Any]:
    """The devices of a TPU topology such as `v5e:4x4`, as libtpu describes them.

    Raises PlanError when the name is malformed or unknown to libtpu, or libtpu is not installed.
    """
    if not _NAME.fullmatch(name):
        raise PlanError(f"the topology {name!r} is not of the form GENERATION:SIZES; write v5e:4x4, v5p:8x8x8 or v6e:16x16, for example")
    if importlib.util.find_spec("libtpu") is None:
        raise PlanError("libtpu, the TPU compiler, is not installed; pip install 'monovl_jax[aot]'")
    os.environ.update(LIBTPU)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:  # jax wraps what libtpu says in several types
        words = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise PlanError(
            f"libtpu does not know the topology {name!r} ({words}); write v5e:4x4, v5p:8x8x8 or v6e:16x16, for example"
        ) from None


@dataclasses.dataclass(frozen=True)
class Memory:
    """HBM of one chip in bytes, as the compiler gives them; temporaries do not hold the arguments. aliased: outputs that lie in donated
    arguments. over: None where the program compiled; else what it would need in all, found too much by the compiler, which then tells
    nothing else."""

    arguments: int = 0
    outputs: int = 0
    aliased: int = 0
    temporaries: int = 0
    code: int = 0
    over: int | None = None

    @property
    def peak(self) -> int:
        return self.over if self.over is not None else self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Program:
    """text: the optimized HLO, empty when the program does not fit. seconds: of compiling, whenever that was. cached: whether it was
    compiled before."""

    memory: Memory
    text: str
    seconds: float
    cached: bool = False


def cache_folder() -> Path:
    """Where programs are kept: under XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "monovl_jax" / "plan"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def program_key(text: str, options: Mapping[str, Any], devices: Sequence[Any]) -> str:
    """A digest of all that decides what the compiler makes of a StableHLO text."""
    versions = [_version(package) for package in ("jax", "jaxlib", "libtpu")]
    places = [[device.device_kind, device.id, list(getattr(device, "coords", ()))] for device in devices]
    rest = json.dumps([versions, sorted((name, str(value)) for name, value in options.items()), places])
    text = _CHECK.sub(r"\1 = stablehlo.constant dense<1>\2", text)
    return hashlib.sha256(f"{rest}\n{text}".encode()).hexdigest()[:32]


def _load(path: Path) -> Program | None:
    """What was kept; None when nothing is there, or nothing that can be read."""
    try:
        kept = jsontext.loads(gzip.decompress(jsontext.read_bytes(path)))
        return Program(Memory(**kept["memory"]), str(kept["text"]), float(kept["seconds"]), cached=True)
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None


def _keep(path: Path, program: Program) -> None:
    """Keeps a program, whole or not at all; a folder that cannot be written is no reason to stop."""
    text = json.dumps({"memory": dataclasses.asdict(program.memory), "text": program.text, "seconds": program.seconds})
    near = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        near.write_bytes(gzip.compress(text.encode(), 6))
        os.replace(near, path)
    except OSError:
        with contextlib.suppress(OSError):
            near.unlink(missing_ok=True)


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * 1024 ** " KMGT".index(unit or " "))


def compile_program(
    lowered: Any, what: str, arguments: int, devices: Sequence[Any], options: Mapping[str, Any], cache: Path | None
) -> Program:
    """A lowered program (`jax.jit(f).lower(...)`) compiled for the devices it was lowered for, or taken from the folder `cache`.

    arguments: bytes of them on one device. options: the compiler options it was jitted with, for the key.

    Raises PlanError when the compiler refuses it for another reason than that it needs too much memory, which the result says.
    """
    path = None if cache is None else cache / f"{program_key(lowered.as_text(), options, devices)}.json.gz"
    if path is not None and (kept := _load(path)) is not None:
        return kept
    began = time.monotonic()
    memory, text = Memory(), ""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = _NEEDED.search(str(error))
        if found is None:
            raise PlanError(f"{what}: the TPU compiler refuses the program: {str(error).splitlines()[0][:300]}") from error
        memory = Memory(over=_bytes(found[1], found[2]) if found[1] else arguments + _bytes(found[3], found[4]))
    else:
        m = compiled.memory_analysis()
        memory = Memory(
            m.argument_size_in_bytes,
            m.output_size_in_bytes,
            m.alias_size_in_bytes,
            m.temp_size_in_bytes,
            m.generated_code_size_in_bytes,
        )
        text = compiled.as_text()
    program = Program(memory, text, time.monotonic() - began)
    if path is not None:
        _keep(path, program)
    return program
