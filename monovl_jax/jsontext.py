"""The one reader of JSON from outside: files, lines and headers that somebody else may have written.

Python's own `json` answers hostile text with a dozen kinds of errors, or with values that fail far away (`Infinity`, 5,000 digits, half of
a character). Here there is one error, raised where the text is read.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from typing import Any

MAX_BYTES = 256 << 20
"""Longest file that is read as one JSON value. The index of the largest released models takes 0.2 MB."""
MAX_LINE_BYTES = 16 << 20
"""Longest line of a file of lines."""
MAX_DEPTH = 64
"""Deepest nesting of lists and objects."""
MAX_DIGITS = 40
"""Longest whole number. Tokenizer files write 10^30 for "no limit"."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class JsonError(ValueError):
    """Text that is no JSON value as we take them; the message says what is wrong with it, and where it can."""


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise JsonError(f"a number of {len(text)} digits; at most {MAX_DIGITS} are read")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise JsonError(f"the number {text[:MAX_DIGITS]} is too large")
    return value


def _constant(text: str) -> float:
    raise JsonError(f"{text} is no number of JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for name, item in pairs:
        if name in value:
            raise JsonError(f"the key {name!r} appears twice")
        value[name] = item
    return value


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [
        child for item in level if isinstance(item, list | dict) for child in (item.values() if isinstance(item, dict) else item)
    ]:
        depth += 1
        if depth > MAX_DEPTH:
            raise JsonError(f"lists and objects are nested more than {MAX_DEPTH} deep")


def loads(text: str | bytes, *, unique_keys: bool = False, allow_nan: bool = False) -> Any:
    """The value of JSON text. Raises JsonError for anything else, and for what no reader of ours could use:

    bytes that are not UTF-8, nesting deeper than MAX_DEPTH, whole numbers longer than MAX_DIGITS, infinite numbers and NaN, and half of a
    surrogate pair (no Unicode character). unique_keys: a key given twice in one object is refused too; else the last one counts.
    allow_nan: NaN and infinities are read, as Python writes them.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise JsonError(f"it is not UTF-8 (byte {error.start + 1} is 0x{text[error.start]:02x})") from None
    try:
        hook = _unique if unique_keys else None
        constant = float if allow_nan else _constant
        value = json.loads(text, parse_int=_integer, parse_float=_finite, parse_constant=constant, object_pairs_hook=hook)
    except JsonError:
        raise
    except RecursionError:
        raise JsonError(f"lists and objects are nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:
        raise JsonError(str(error)) from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise JsonError("a string holds half of a surrogate pair, which is no character") from None
    return value


def read_bytes(path: os.PathLike[str], limit: int = MAX_BYTES) -> bytes:
    """The contents of a regular file, local or in a bucket. Raises OSError for anything else than a file, and for one over `limit` bytes.

    A pipe or a device is refused before it is opened: reading it could wait for ever, or never end.
    """
    name = os.fspath(path)
    if "://" not in name:
        found = os.stat(name)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(f"{name} is a folder, not a file")
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{name} is no regular file")
        if found.st_size > limit:
            raise OSError(f"{name} has {found.st_size:,} bytes; at most {limit:,} are read")
        with open(name, "rb") as file:
            data = file.read(found.st_size + 1 if found.st_size else 1 << 20)  # a file of /proc has no size
    else:
        data = path.read_bytes()  # pyright: ignore[reportAttributeAccessIssue]: epath
    if len(data) > limit:
        raise OSError(f"{name} has more than {limit:,} bytes, which is the most that is read")
    return data


def read(path: os.PathLike[str], limit: int = MAX_BYTES, *, allow_nan: bool = False) -> Any:
    """The JSON value of a file (a byte order mark is skipped). Raises OSError (`read_bytes`) or JsonError (`loads`)."""
    return loads(read_bytes(path, limit).removeprefix(b"\xef\xbb\xbf"), allow_nan=allow_nan)


def lines(stream: io.BufferedIOBase) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, offset of its first byte, bytes) of the lines that are not blank.

    Of a line longer than MAX_LINE_BYTES one byte more than that is given, whatever its length; `line` refuses it.
    """
    offset, number = stream.tell(), 1
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        size, tail = len(raw), raw
        while len(tail) > MAX_LINE_BYTES and not tail.endswith(b"\n"):
            tail = stream.readline(MAX_LINE_BYTES + 1)
            size += len(tail)
        if raw.strip():
            yield number, offset, raw
        offset += size
        number += 1


def line(raw: bytes) -> Any:
    """The JSON value of one line (a byte order mark is skipped). Raises JsonError (`loads`), also for a line over MAX_LINE_BYTES."""
    if len(raw) > MAX_LINE_BYTES:
        raise JsonError(f"it has more than {MAX_LINE_BYTES:,} bytes")
    return loads(raw.removeprefix(b"\xef\xbb\xbf"))
