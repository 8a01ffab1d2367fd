"""The fuzzer finds what was planted for it, makes it small, and finds nothing in the library."""

from __future__ import annotations

import json
import os
import random
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.reliability.fuzzing.mutations import Files, Mutation, change_json, on_bytes, on_files, read_folder, write_folder
from experiments.reliability.fuzzing.pool import BrokenReader, Change, Lane, Limits, Reader, Refused, fuzz, mutated, plan

LIMITS = Limits(seconds=30, memory=400 << 20)
HASTY = Limits(seconds=0.5)


# ---- readers with faults, which other processes look up here -------------------------------------------------------------------------


def make(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"good" * 8)
    (folder / "b.bin").write_bytes(b"other")


def _append(mark: bytes) -> Mutation:
    def apply(files: Files, rng: random.Random) -> None:
        files["a.bin"] = files["a.bin"] + mark  # type: ignore[operator]

    return Mutation(mark.decode(), apply)


HARMLESS, HARMFUL = _append(b"harmless"), _append(b"harmful")


def reads(fault: Callable[[], Any]) -> Callable[[Path, frozenset[str]], Any]:
    def read(folder: Path, names: frozenset[str]) -> int:
        data = (folder / "a.bin").read_bytes()
        if b"harmful" in data:
            fault()
        if b"harmless" in data:
            raise ValueError("it is not as it was; copy it again")
        return zlib.crc32(data)

    read.__module__ = __name__
    return read


def _panic() -> None:
    raise type("PanicException", (BaseException,), {})("called `Option::unwrap()` on a `None` value")


def _noise() -> None:
    os.write(2, b"thread '<unnamed>' panicked at src/lib.rs:1\n")


FAULTS: dict[str, tuple[str, Callable[[], Any]]] = {
    "a foreign error": ("crash", lambda: {}["absent"]),
    "a panic": ("crash", _panic),
    "a panic on standard error alone": ("crash", _noise),
    "the end of the process": ("crash", lambda: os._exit(3)),
    "an error without a word": ("crash", lambda: (_ for _ in ()).throw(ValueError(" "))),
    "no end": ("hang", lambda: time.sleep(60)),
    "a slow answer": ("hang", lambda: time.sleep(0.55)),
    "a memory hog": ("memory", lambda: bytearray(500 << 20).count(1)),
    "more memory than there may be": ("memory", lambda: bytearray(1 << 40)),
    "a silent change": ("wrong", lambda: None),
}


def right(found: Any, whole: Any, change: Change) -> str:
    return "" if change.forged or found == whole else "a damaged file is read"


def any_value(found: Any, whole: Any, change: Change) -> str:
    return ""


READERS = tuple(
    Reader(name.replace(" ", "_"), make, reads(fault), right if kind == "wrong" else any_value, (HARMLESS, HARMFUL))
    for name, (kind, fault) in FAULTS.items()
)


def numbers(reader: Reader) -> list[int]:
    """An input that is harmful, one that is not, and one that is both."""
    kinds = {number: {mutation for mutation, _ in plan(reader, 1, number)} for number in range(50)}
    return [next(number for number, found in kinds.items() if found == wanted) for wanted in ({HARMFUL}, {HARMLESS}, {HARMFUL, HARMLESS})]


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_what_is_planted_is_found_and_made_small(reader: Reader, tmp_path: Path) -> None:
    kind, _ = FAULTS[reader.name.replace("_", " ")]
    inputs, limits = numbers(reader), HASTY if kind == "hang" else LIMITS
    count = fuzz(reader, inputs, 1, tmp_path / "home", tmp_path / "kept", processes=1, limits=limits)
    harmful = [inputs[0], *([inputs[2]] if kind != "wrong" else [])]  # a file that is refused is not taken for whole
    assert count.counts[kind] == count.failed == len(harmful) and count.counts["refused"] == 3 - len(harmful)
    assert {failure.number for failure in count.failures} == set(harmful)
    for failure in count.failures:
        assert failure.mutations == ("harmful",) and failure.outcome.kind == kind
        folder = tmp_path / "kept" / f"{reader.name}-{failure.number}"
        assert (folder / "changed/a.bin").read_bytes() == b"good" * 8 + b"harmful" and not (folder / "changed/b.bin").exists()
        report = (folder / "report.txt").read_text()
        assert f"{kind} (" in report and f"--only {reader.name}:{failure.number}" in report


def _careful(folder: Path, names: frozenset[str]) -> int:
    data = (folder / "a.bin").read_bytes()
    if b"harmful" in data:
        raise Refused("a part of it is damaged; copy it again", zlib.crc32(data[:32]))
    return zlib.crc32(data[:32])


def _broken(folder: Path, names: frozenset[str]) -> None:
    raise KeyError("not even the valid one")


READERS += (
    Reader("careful", make, _careful, right, (HARMFUL, HARMLESS)),
    Reader("broken", make, _broken, right, (HARMFUL,)),
)


def test_refusals_and_right_answers_are_no_failures(tmp_path: Path) -> None:
    reader = next(reader for reader in READERS if reader.name == "careful")
    count = fuzz(reader, range(8), 0, tmp_path / "home", tmp_path / "kept", limits=LIMITS)
    assert count.failed == 0 and count.counts["refused"] > 0 < count.counts["accepted"] and not (tmp_path / "kept").exists()


def test_a_reader_that_cannot_read_its_valid_input_is_told(tmp_path: Path) -> None:
    reader = next(reader for reader in READERS if reader.name == "broken")
    with pytest.raises(BrokenReader, match="not even the valid one"):
        fuzz(reader, range(3), 0, tmp_path / "home", tmp_path / "kept", processes=1, limits=LIMITS)


def test_a_process_that_ended_is_replaced(tmp_path: Path) -> None:
    reader = next(reader for reader in READERS if reader.name == "the_end_of_the_process")
    valid = tmp_path / "valid"
    valid.mkdir()
    make(valid)
    harmful, harmless, _ = numbers(reader)
    with Lane(reader, valid, tmp_path, 1, LIMITS) as lane:
        assert [lane.run(number).kind for number in (harmless, harmful, harmless)] == ["refused", "crash", "refused"]


# ---- mutations -----------------------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"a": [1, {"b": "x"}], "c": None}))
    (tmp_path / "b.bin").write_bytes(bytes(range(256)))
    whole = read_folder(tmp_path)
    reader = Reader("any", make, _careful, right, (on_bytes(), on_files(), Mutation("json", lambda f, r: None)))
    first = [mutated(reader, whole, 3, number)[0] for number in range(50)]
    assert first == [mutated(reader, whole, 3, number)[0] for number in range(50)]
    assert first != [mutated(reader, whole, 4, number)[0] for number in range(50)] and whole == read_folder(tmp_path)
    for number, files in enumerate(first):
        write_folder(files, tmp_path / f"out{number}")


def test_changed_json_is_another_text() -> None:
    value = {"a": [1, 2.5, {"b": "text"}], "c": None, "d": True}
    texts = {change_json(value, random.Random(seed)) for seed in range(300)}
    assert len(texts) > 200 and json.dumps(value) not in {text for text in texts if "{" not in text}
    assert any("Infinity" in text for text in texts) and any("\\ud800" in text for text in texts)


# ---- the command and the library -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory and /proc are those of Linux")
def test_nothing_fails_in_300_inputs_of_each_reader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from experiments.reliability.fuzz import Settings, main
    from experiments.reliability.fuzzing.readers import READERS as ALL

    assert main(Settings(readers=("nothing",))) == 2
    assert "no reader is called 'nothing'; known: images, " in capsys.readouterr().err
    settings = Settings(inputs=300 * len(ALL), failures=tmp_path / "failures", out=tmp_path / "fuzz.json")
    assert main(settings) == 0, capsys.readouterr().out
    result = json.loads(settings.out.read_text())  # type: ignore[union-attr]
    assert result["inputs"] == 300 * len(ALL) and result["failures"] == 0
    assert all(sum(row[kind] for kind in ("refused", "accepted")) == 300 for row in result["readers"].values())
