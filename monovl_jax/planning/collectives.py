"""Collectives of a compiled program, read from its optimized HLO text: kind, bytes, mesh axes, and how often a step runs them.

    %all-gather.3 = bf16[2048,8192]{1,0} all-gather(%p), replica_groups=[4,4]<=[16], dimensions={0}

runs on four groups of four devices. Numbers are positions in the mesh's devices in order, so the axes that a group walks are known. The
computation that holds the line runs as often as those that call it; the body of a `while` times its trip count, which is what the line
says, or else the one number that its condition compares with: the compiler's loops count from 0.

The TPU compiler spreads an asynchronous gather over several fusions of one chain, each of which names it; it counts where it starts.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
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
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_LIMIT = re.compile(r" = [su](?:8|16|32|64)\[\][^ ]* constant\((\d+)\)")
_STARTED = re.compile(r"^\s+%?(?:async-collective-start[\w.-]* = .*|[\w.-]+ = .* async-start\(.*) ?calls=%?([\w.-]+)")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
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


def argument_bytes(text: str) -> int:
    """Bytes of a module's arguments by their shapes, without what the tiles of their layouts add."""
    return sum(shape_bytes(text.partition("entry_computation_layout={(")[2].partition(")->")[0]))


def replica_groups(line: str) -> list[list[int]]:
    """The groups of a collective's line; pairs for a collective-permute, nothing for all devices in one group."""
    if iota := _IOTA.search(line):
        shape, order = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
        ids = np.arange(math.prod(order)).reshape(order)
        if iota[3]:
            ids = ids.transpose([int(n) for n in iota[3].split(",")])
        return ids.reshape(shape).tolist()
    if named := _NAMED.search(line):  # by the axes of a mesh, as newer compilers write: mesh['data'=2,'fsdp'=4] {'fsdp'}
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", named[1])}
        axes = [list(sizes).index(name) for name in re.findall(r"'([^']*)'", named[2])]
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        inside = math.prod(ids.shape[axis] for axis in axes)
        return np.moveaxis(ids, axes, range(-len(axes), 0)).reshape(-1, inside).tolist()
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


def _trips(line: str, lines: Mapping[str, list[str]]) -> int | None:
    """How often a `while` runs its body, by what the line or its condition says; None where neither does."""
    if found := _TRIPS.search(line):
        return int(found[1])
    of = lines.get(condition[1], []) if (condition := _CONDITION.search(line)) else []
    limits = [int(match[1]) for text in of if (match := _LIMIT.search(text))]
    compared = [text for text in of if " compare(" in text]
    return limits[0] if len(limits) == len(compared) == 1 and "direction=LT" in compared[0] else None


def _callees(line: str, lines: Mapping[str, list[str]]) -> Iterator[tuple[str, int]]:
    """(computation, runs for each run of the line). What an asynchronous call runs is counted at its start."""
    if (match := _INSTRUCTION.match(line)) and match[3] in ("async-update", "async-done"):
        return
    trips = (_trips(line, lines) or 1) if " while(" in line else 1
    for name in _CALLED.findall(line):
        yield name, trips
    if branches := _BRANCHES.search(line):
        for name in branches[1].split(","):
            yield name.strip().lstrip("%"), 1


def runs(text: str) -> tuple[dict[str, int], dict[str, list[str]]]:
    """({computation: how often a step runs it}, {computation: its lines}) of an HLO module. Branches count as if all were taken."""
    entry, lines = _computations(text)
    calls = {name: [call for line in of for call in _callees(line, lines)] for name, of in lines.items()}
    times: collections.Counter[str] = collections.Counter()

    def visit(name: str, factor: int) -> None:
        times[name] += factor
        for callee, trips in calls.get(name, ()):
            visit(callee, factor * trips)

    visit(entry, 1)
    return times, lines


def unknown_loops(text: str) -> int:
    """`while` loops with collectives in them whose trip count the text does not tell: what is inside is counted once."""
    _, lines = _computations(text)

    @functools.cache
    def holds(name: str) -> bool:
        of = lines.get(name, [])
        here = any((match := _INSTRUCTION.match(line)) and match[3].removesuffix("-start") in KINDS for line in of)
        return here or any(holds(callee) for line in of for callee, _ in _callees(line, lines))

    loops = [line for of in lines.values() for line in of if " while(" in line and _trips(line, lines) is None]
    return sum(any(holds(callee) for callee, _ in _callees(line, lines)) for line in loops)


def _whole_bytes(name: str, parts: list[int], size: int) -> int:
    """Bytes of the whole arrays of an instruction whose type holds arrays of `parts` bytes, for groups of `size` devices.

    A start of gathering or scattering gives (operands, results), whose larger side is `size` times the other; one of a permutation
    (operands, results, two counters of 4 bytes); one of a reduction its results alone.
    """
    if name in ("all-gather-start", "reduce-scatter-start"):
        return sum(parts) * size // (size + 1)
    if name == "collective-permute-start":
        return sum(parts[:-2] or parts) // 2
    return sum(parts) * (size if name == "reduce-scatter" else 1)


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """The collectives of an HLO module for devices in a mesh {axis: size}, largest first."""
    times, lines = runs(text)
    starts = {match[1] for of in lines.values() for line in of if (match := _STARTED.match(line))}
    found: collections.Counter[tuple[str, str, int, bool]] = collections.Counter()
    counts: collections.Counter[tuple[str, str, int, bool]] = collections.Counter()
    for name, of in lines.items():
        for line in of:
            match = _INSTRUCTION.match(line)
            if not match or not times[name]:
                continue
            kind = match[3].removesuffix("-start")
            if kind not in KINDS or ('chain_id="' in line and name not in starts):
                continue
            groups = replica_groups(line)
            size = 2 if kind == "collective-permute" else len(groups[0]) if groups else math.prod(mesh.values())
            whole = _whole_bytes(match[3], shape_bytes(match[2]), size)
            overlapped = match[3].endswith("-start") or name in starts
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
