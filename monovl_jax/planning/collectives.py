"""Collectives of a compiled program, read from its optimized HLO text: kind, bytes, mesh axes, and how often a step runs them.

    %all-gather.3 = bf16[2048,8192]{1,0} all-gather(%p), replica_groups=[4,4]<=[16], dimensions={0}

runs on four groups of four devices. Numbers are positions in the mesh's devices in order, so the axes that a group walks are known. The
computation that holds the line runs as often as those that call it; the body of a `while` times its known trip count.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_WIDTHS = {"pred": 1, "f16": 2, "bf16": 2, "f8e4m3fn": 1, "f8e5m2": 1}

_SHAPE = re.compile(r"\b(pred|bf16|f8e4m3fn|f8e5m2|[suf]\d+|c64|c128)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation|async_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{} ]*\})\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind over the same mesh axes, of one device and one step.

    axes: joined by `+`, as `fsdp`, or `fsdp+tensor` for groups over both. size: devices of a group. bytes: of the whole array, after
    gathering or before scattering, all runs summed. count: runs. overlapped: whether the compiler lets it run beside arithmetic.
    """

    kind: str
    axes: str
    size: int
    bytes: int
    count: int
    overlapped: bool


def shape_bytes(text: str) -> list[int]:
    """Bytes of every array type in a piece of HLO: `(bf16[4,8]{1,0}, f32[])` gives [64, 4]."""

    def width(kind: str) -> int:
        return _WIDTHS.get(kind) or int(re.sub(r"\D", "", kind)) // 8 or 1

    return [math.prod(int(n) for n in sizes.split(",") if n) * width(kind) for kind, sizes in _SHAPE.findall(text)]


def replica_groups(line: str) -> list[list[int]]:
    """The groups of a collective's line; pairs for a collective-permute, nothing for all devices in one group."""
    if iota := _IOTA.search(line):
        shape, order = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
        ids = np.arange(math.prod(order)).reshape(order)
        if iota[3]:
            ids = ids.transpose([int(n) for n in iota[3].split(",")])
        return ids.reshape(shape).tolist()
    listed = _LISTED.search(line) or _PAIRS.search(line)
    return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d, ]+)\}", listed[1])] if listed else []


def group_axes(groups: list[list[int]], mesh: Mapping[str, int]) -> str:
    """The mesh axes along which the members of a group differ, joined by `+`; all axes of more than one device without groups."""
    if not groups:
        return "+".join(name for name, size in mesh.items() if size > 1)
    where = np.stack(np.unravel_index(np.array(groups), tuple(mesh.values())))
    return "+".join(name for name, at in zip(mesh, where, strict=True) if (at != at[:, :1]).any())


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    """(name of the entry, {computation: its lines})."""
    entry, name, found = "", "", collections.defaultdict(list)
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            name = head[2]
            entry = name if head[1] else entry
        elif name:
            found[name].append(line)
    return entry, found


def _callees(line: str) -> Iterator[tuple[str, int]]:
    """(computation, runs for each run of the line)."""
    trips = int(found[1]) if " while(" in line and (found := _TRIPS.search(line)) else 1
    for name in _CALLED.findall(line):
        yield name, trips
    if branches := _BRANCHES.search(line):
        for name in branches[1].split(","):
            yield name.strip().lstrip("%"), 1


def runs(text: str) -> tuple[dict[str, int], dict[str, list[str]]]:
    """({computation: how often a step runs it}, {computation: its lines}) of an HLO module. Branches count as if all were taken."""
    entry, lines = _computations(text)
    calls = {name: [call for line in of for call in _callees(line)] for name, of in lines.items()}
    times: collections.Counter[str] = collections.Counter()

    def visit(name: str, factor: int) -> None:
        times[name] += factor
        for callee, trips in calls.get(name, ()):
            visit(callee, factor * trips)

    visit(entry, 1)
    return times, lines


def unknown_loops(text: str) -> int:
    """`while` loops whose trip count the compiler does not know: what is inside is counted once."""
    return sum(" while(" in line and not _TRIPS.search(line) for line in text.splitlines())


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """The collectives of an HLO module for devices in a mesh {axis: size}, largest first."""
    times, lines = runs(text)
    found: collections.Counter[tuple[str, str, int, bool]] = collections.Counter()
    counts: collections.Counter[tuple[str, str, int, bool]] = collections.Counter()
    for name, of in lines.items():
        for line in of:
            match = _INSTRUCTION.match(line)
            if not match or not times[name]:
                continue
            kind = match[3].removesuffix("-start")
            if kind not in KINDS:
                continue
            groups = replica_groups(line)
            size = 2 if kind == "collective-permute" else len(groups[0]) if groups else math.prod(mesh.values())
            parts = shape_bytes(match[2])
            if match[3].endswith("-start"):  # (operands, results, contexts)
                whole = max(parts, default=0)
            else:
                whole = sum(parts) * (size if kind == "reduce-scatter" else 1)
            overlapped = match[3].endswith("-start") or "async" in name
            key = kind, group_axes(groups, mesh), size, overlapped
            found[key] += whole * times[name]
            counts[key] += times[name]
    rows = [Collective(kind, axes, size, total, counts[kind, axes, size, late], late) for (kind, axes, size, late), total in found.items()]
    return sorted(rows, key=lambda row: -row.bytes)


def kernels(text: str) -> dict[str, int]:
    """{name of a Pallas kernel: how often a step runs it} of an HLO module."""
    times, lines = runs(text)
    found: collections.Counter[str] = collections.Counter()
    for name, of in lines.items():
        for line in of:
            if times[name] and 'custom_call_target="tpu_custom_call"' in line and (match := _INSTRUCTION.match(line)):
                found[re.sub(r"[.\d]+$", "", match[1])] += times[name]
    return dict(sorted(found.items()))
