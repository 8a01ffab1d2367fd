"""The one reader of JSON: what it refuses, and that nothing else reads JSON."""

from __future__ import annotations

import ast
import io
import os
from pathlib import Path

import pytest

from monovl_jax import jsontext

PACKAGE = Path(jsontext.__file__).parent


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested more than"),
        ("[" * 100 + "]" * 100, "nested more than"),
        ('{"a": ' * 80 + "1" + "}" * 80, "nested more than"),
        ("1" * 5000, "5000 digits"),
        ("[1e999]", "too large"),
        ("[NaN]", "no number of JSON"),
        ("-Infinity", "no number of JSON"),
        ('"\\ud800"', "surrogate"),
        ('{"\\uDC00x": 1}', "surrogate"),
        (b'"\xff"', "byte 2 is 0xff"),
        ("{", "line 1"),
        ("", "line 1"),
    ],
)
def test_refused(text: str | bytes, problem: str) -> None:
    with pytest.raises(jsontext.JsonError, match=problem):
        jsontext.loads(text)


def test_accepted() -> None:
    assert jsontext.loads('{"a": [1, 2.5, null, true, "\\ud83d\\ude00"], "b": 1000000000000000019884624838656}') == {
        "a": [1, 2.5, None, True, "\U0001f600"],
        "b": 1000000000000000019884624838656,
    }
    assert jsontext.loads("[" * 64 + "]" * 64) is not None
    assert jsontext.loads('{"a": 1, "a": 2}') == {"a": 2}
    assert str(jsontext.loads("NaN", allow_nan=True)) == "nan"
    with pytest.raises(jsontext.JsonError, match="'a' appears twice"):
        jsontext.loads('{"a": 1, "a": 2}', unique_keys=True)


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert jsontext.read(tmp_path / "a.json") == [1]
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(OSError, match="no regular file"):
        jsontext.read(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    with pytest.raises(OSError, match="no regular file"):
        jsontext.read(tmp_path / "zero.json")
    with pytest.raises(OSError, match="is a folder"):
        jsontext.read(tmp_path)
    with pytest.raises(OSError, match="at most 2 are read"):
        jsontext.read(tmp_path / "a.json", limit=2)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_else_reads_json(path: Path) -> None:
    if path.name == "jsontext.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "json":
            assert node.attr not in ("load", "loads", "JSONDecodeError"), f"{path}:{node.lineno}: read JSON by jsontext"


def test_lines_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line beyond the limit is not read whole, and the next ones keep their numbers and places."""
    monkeypatch.setattr(jsontext, "MAX_LINE_BYTES", 8)
    data = b'{"a":1}\n\n' + b"[" * 8 + b"\n" + b"7" * 30 + b"\n[1]"
    found = list(jsontext.lines(io.BytesIO(data)))
    assert [(number, data[offset : offset + len(raw)] == raw) for number, offset, raw in found] == [
        (1, True),
        (3, True),
        (4, True),
        (5, True),
    ]
    assert [len(raw) for _, _, raw in found] == [8, 9, 9, 3] and jsontext.line(found[3][2]) == [1]
    with pytest.raises(jsontext.JsonError, match="more than 8 bytes"):
        jsontext.line(found[2][2])
