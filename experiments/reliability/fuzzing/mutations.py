"""Ways to damage a folder of files, {name: bytes or Special} in memory: bits, whole files, JSON values, members of archives, headers.

A mutation changes a folder in place, by a random generator of its own: any of several can be left out, and the others do as before.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np


@dataclasses.dataclass(frozen=True)
class Special:
    """What is no file of bytes. target: of a link."""

    kind: Literal["pipe", "link", "folder"]
    target: str = ""


Files = dict[str, bytes | Special]
SECRET = "secret.txt"
"""A file beside the folder, which nothing in the folder may reach."""


@dataclasses.dataclass(frozen=True)
class Mutation:
    """forges: it makes checksums fit again, so that nobody could notice it."""

    name: str
    apply: Callable[[Files, random.Random], None]
    forges: bool = False


def read_folder(folder: Path) -> Files:
    """The regular files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_folder(files: Files, folder: Path) -> None:
    """Lays the files out in a new folder; names that would leave it are left out."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif content.kind == "pipe":
                os.mkfifo(path)
            elif content.kind == "folder":
                path.mkdir()
            else:
                path.symlink_to(content.target)
        except (OSError, ValueError):  # a file where another needs a folder
            continue


# ---- bytes -------------------------------------------------------------------------------------------------------------------------

_NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """One change of a kind that is drawn."""
    if not data:
        return rng.randbytes(rng.randint(1, 64))
    new, at = bytearray(data), rng.randrange(len(data))
    length = min(rng.choice((1, 2, 4, 16, 64, 1024)), len(data) - at)
    kind = rng.choice(("bit", "bit", "bits", "run", "zeros", "cut", "delete", "insert", "repeat", "number", "number", "swap", "longer"))
    if kind == "bit":
        new[at] ^= 1 << rng.randrange(8)
    elif kind == "bits":
        for _ in range(rng.randint(2, 16)):
            new[rng.randrange(len(new))] ^= 1 << rng.randrange(8)
    elif kind == "run":
        new[at : at + length] = rng.randbytes(length)
    elif kind == "zeros":
        new[at : at + length] = bytes([rng.choice((0, 0xFF))]) * length
    elif kind == "cut":
        del new[at:]
    elif kind == "delete":
        del new[at : at + length]
    elif kind == "insert":
        new[at:at] = rng.randbytes(length)
    elif kind == "repeat":
        new[at:at] = new[at : at + length] * rng.choice((1, 2, 100))
    elif kind == "number":
        size, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
        new[at : at + size] = (rng.choice(_NUMBERS) % (1 << 8 * size)).to_bytes(size, order)[: len(data) - at]
    elif kind == "swap":
        other = rng.randrange(len(data) - length + 1)
        if other + length <= at or at + length <= other:
            new[at : at + length], new[other : other + length] = data[other : other + length], data[at : at + length]
    else:
        new += rng.choice((bytes, rng.randbytes))(rng.choice((1, 16, 4096)))
    return bytes(new)


def _plain(files: Files, names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if isinstance(files.get(name), bytes))


def on_bytes(names: Iterable[str] | None = None) -> Mutation:
    """Changes bytes of one file. names: of the files that may be changed; all by default."""
    allowed = None if names is None else frozenset(names)

    def apply(files: Files, rng: random.Random) -> None:
        if found := _plain(files, files.keys() if allowed is None else files.keys() & allowed):
            name = rng.choice(found)
            content = files[name]
            assert isinstance(content, bytes)
            files[name] = change_bytes(content, rng)

    return Mutation("bytes", apply)


# ---- whole files -------------------------------------------------------------------------------------------------------------------

_TARGETS = ("/dev/zero", "/dev/null", "/dev/stdin", "/proc/version", f"../{SECRET}", ".", "nowhere", "/proc/self/pagemap")
_NESTED = b"[" * 100_000 + b"]" * 100_000
_CONTENTS = (
    b"",
    b"\0",
    b"{}",
    b"[]",
    b"null\n",
    b"7",
    b'"x"',
    _NESTED,
    b'{"a":' * 100_000,
    b"\xff\xfe{\0}\0",
    bytes(1 << 16),
    b"\n" * 10_000,
)


def on_files(names: Iterable[str] | None = None, forges: bool = False) -> Mutation:
    """Removes, exchanges or replaces a file: by another, a pipe, a device, a folder, a link, or something short that is no such file.

    forges: another file in its place is a good one, as far as anybody can tell.
    """
    allowed = None if names is None else frozenset(names)

    def apply(files: Files, rng: random.Random) -> None:
        found = sorted(files.keys() if allowed is None else files.keys() & allowed)
        if not found:
            return
        name, kind = rng.choice(found), rng.choice(("remove", "copy", "exchange", "pipe", "folder", "link", "itself", "content", "content"))
        other = rng.choice(found)
        if kind == "remove":
            del files[name]
        elif kind == "copy":
            files[name] = files[other]
        elif kind == "exchange":
            files[name], files[other] = files[other], files[name]
        elif kind in ("pipe", "folder"):
            files[name] = Special("pipe" if kind == "pipe" else "folder")
        elif kind == "link":
            depth = name.count("/")
            target = rng.choice(_TARGETS)
            files[name] = Special("link", "../" * depth + target if target.startswith("..") else target)
        elif kind == "itself":
            files[name] = Special("link", Path(name).name)
        else:
            files[name] = rng.choice(_CONTENTS)

    return Mutation("files", apply, forges)


# ---- JSON --------------------------------------------------------------------------------------------------------------------------

_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        7,
        255,
        65_536,
        1 << 31,
        1 << 32,
        1 << 62,
        1 << 63,
        10**30,
        -(1 << 40),
        0.0,
        0.5,
        -0.5,
        1e-300,
        1e300,
    ),
    *("", " ", "x", "../x", "/etc/passwd", "/dev/zero", ".", "a" * 100_000, "0", "1e9", "\0", "\n", "é", "😀", "<image>", "<IMG_CONTEXT>"),
    *([], {}, [None], [[]], {"": None}, [0] * 10_000, {str(i): i for i in range(2_000)}, ["x", 1], {"content": 7}, {"type": "BPE"}),
)
_RAW = (
    *(
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-0",
        "0.1e-400",
        "9" * 5_000,
        "1" + "0" * 400,
        '"\\ud800"',
        '"\\udc00\\ud800"',
        "tru",
        "''",
    ),
    *("[" * 500 + "]" * 500, "[" * 20_000, "{" * 100, '{"a": 1, "a": 2}', "\x00", "[1, 2", '"\\x"', "01", "\ufeff1"),
)
_MARK = "@@here@@"


def _nodes(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside."""
    found, todo = [], [value]
    while todo:
        item = todo.pop()
        pairs = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
        for key, child in pairs:
            found.append((item, key))
            todo.append(child)
    return found


def _other(value: Any, rng: random.Random) -> Any:
    """A value of the same kind, not far away."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return rng.choice((value + 1, value - 1, -value, value * 2, value * 1000, value // 2, float(value), str(value), [value]))
    if isinstance(value, str):
        at = rng.randint(0, len(value))
        return rng.choice(
            (value + "x", value[:at], value[:at] + rng.choice(" \0/.é\n<>\\") + value[at:], value[:9_999] * 50, [value], value.upper())
        )
    if isinstance(value, list):
        return rng.choice((value[::-1], value * 2, value[:1], value[1:], value[0] if value else None, dict(enumerate(value))))
    return rng.choice((list(value), list(value.values()), dict(list(value.items())[:1]), [value]))


def change_json(value: Any, rng: random.Random) -> str:
    """The text of a JSON value with one thing in it changed; it may be no JSON any more."""
    value = json.loads(json.dumps({"": value}))
    nodes, raw = _nodes(value), None
    container, key = rng.choice(nodes)
    kind = rng.choice(("value", "value", "raw", "other", "other", "remove", "rename", "twice", "new", "exchange"))
    if kind == "raw":
        raw, container[key] = rng.choice(_RAW), _MARK
    elif kind == "other":
        container[key] = _other(container[key], rng)
    elif kind == "exchange":
        second, index = rng.choice(nodes)
        container[key], second[index] = json.loads(json.dumps((second[index], container[key])))
    elif kind == "value" or isinstance(container, list) or container is value:
        container[key] = rng.choice(_VALUES)
    elif kind == "remove":
        del container[key]
    elif kind == "rename":
        container[rng.choice((key.upper(), f"{key}_", "", key[1:], "x" * 1_000))] = container.pop(key)
    elif kind == "new":
        container[rng.choice(("new", "__class__", "_", "quantization_config", "rope_scaling", "id"))] = rng.choice(_VALUES)
    else:
        raw = f"{json.dumps(container[key])}, {json.dumps(key)}: {json.dumps(rng.choice(_VALUES))}"
        container[key] = _MARK
    text = json.dumps(value.get(""), ensure_ascii=rng.random() < 0.5)
    return text if raw is None else text.replace(json.dumps(_MARK), raw)


def _same_json(text: str, content: bytes) -> bool:
    try:
        return json.loads(text) == json.loads(content)
    except (ValueError, RecursionError):
        return False


def on_json(names: Iterable[str] | None = None) -> Mutation:
    """Changes one value, key or place in one of the JSON files."""
    allowed = None if names is None else frozenset(names)

    def apply(files: Files, rng: random.Random) -> None:
        found = _plain(files, (name for name in files if name.endswith(".json") and (allowed is None or name in allowed)))
        if not found:
            return
        name = rng.choice(found)
        content = files[name]
        assert isinstance(content, bytes)
        try:
            text = change_json(json.loads(content), rng)
            if not _same_json(text, content):  # else two equal values were exchanged, or a key has its value twice
                files[name] = text.encode("utf-8", "surrogatepass")
        except (ValueError, TypeError, OverflowError, RecursionError):  # another mutation was there
            files[name] = change_bytes(content, rng)

    return Mutation("json", apply)


def on_lines(name: str) -> Mutation:
    """Changes, repeats, cuts, joins or moves lines of a file of JSON lines."""

    def apply(files: Files, rng: random.Random) -> None:
        content = files.get(name)
        if not isinstance(content, bytes):
            return
        lines = content.split(b"\n")
        at = rng.randrange(len(lines))
        kind = rng.choice(("json", "json", "json", "json", "bytes", "repeat", "swap", "join", "blank", "long", "crlf", "mark"))
        if kind == "json":
            try:
                lines[at] = change_json(json.loads(lines[at]), rng).replace("\n", " ").encode("utf-8", "surrogatepass")
            except (ValueError, TypeError, OverflowError, RecursionError):
                lines[at] = change_bytes(lines[at], rng)
        elif kind == "bytes":
            lines[at] = change_bytes(lines[at], rng)
        elif kind == "repeat":
            lines[at:at] = [lines[at]] * rng.choice((1, 3))
        elif kind == "swap":
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == "join":
            lines[at : at + 2] = [b"".join(lines[at : at + 2])]
        elif kind == "blank":
            lines[at:at] = [rng.choice((b"", b" \t", b"\0", b"#", b"\r"))]
        elif kind == "long":
            lines[at:at] = [rng.choice((_NESTED, b'"' + b"x" * (17 << 20) + b'"', b"9" * 100_000))]
        elif kind == "crlf":
            lines = [line + b"\r" for line in lines]
        else:
            lines[0] = b"\xef\xbb\xbf" + lines[0]
        files[name] = b"\n".join(lines)

    return Mutation("lines", apply)


# ---- archives of arrays ------------------------------------------------------------------------------------------------------------


def _npy(rng: random.Random) -> bytes:
    """An .npy member that is wrong in one way."""
    stream = io.BytesIO()
    kind = rng.choice(("objects", "shape", "text", "empty", "other", "version", "long", "bomb"))
    if kind == "other":
        shape = rng.choice(((), (0,), (3,), (2, 2), (1, 4), (2, 3, 4), (0, 2)))
        array = np.full(shape, rng.choice((0, 1, -1, 7, 1 << 30)), rng.choice(("i8", "i4", "f4", "f8", "u1", "?", "c8", "U3", "f2", ">i4")))
        np.save(stream, array, allow_pickle=False)
        return stream.getvalue()
    if kind == "bomb":
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", 10) + b"{" + b" " * 8 + b"\n" + bytes(64 << 20)
    shapes = {"shape": "(1000000000, 1000)", "empty": "()", "long": "(" + "1," * 2_000 + ")", "text": "('x',)"}
    described = "'|O'" if kind == "objects" else rng.choice(("'<f4'", "'<i8'", "'<U9'", "[('a', '<i4')]", "'<f16'", "'V0'", "7"))
    header = (
        f"{{'descr': {described}, 'fortran_order': {rng.choice(('False', 'True', '7'))}, 'shape': {shapes.get(kind, '(3,)')}, }}\n".encode()
    )
    version = b"\x01\x00" if kind != "version" else rng.choice((b"\x03\x00", b"\x09\x00", b"\x02\x00"))
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header + rng.randbytes(rng.choice((0, 12, 64)))


def on_arrays(name: str) -> Mutation:
    """Writes an .npz file again, its checksums right, with a member that is changed, exchanged, renamed, repeated or left out."""

    def apply(files: Files, rng: random.Random) -> None:
        content = files.get(name)
        if not isinstance(content, bytes):
            return
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                members = [(member.filename, archive.read(member)) for member in archive.infolist()]
        except Exception:  # another mutation was there
            return
        at = rng.randrange(len(members)) if members else 0
        kind = rng.choice(("member", "member", "bytes", "rename", "twice", "remove", "many", "exchange"))
        if not members or kind == "many":
            members += [(f"a{i}.npy", b"") for i in range(12_000)]
        elif kind == "member":
            members[at] = members[at][0], _npy(rng)
        elif kind == "bytes":
            members[at] = members[at][0], change_bytes(members[at][1], rng)
        elif kind == "rename":
            members[at] = rng.choice(("x.npy", "../x.npy", "", "input_ids", "bad.npy", "\u00e9.npy")), members[at][1]
        elif kind == "twice":
            members.append((members[at][0], members[rng.randrange(len(members))][1]))
        elif kind == "remove":
            del members[at]
        else:
            other = rng.randrange(len(members))
            members[at], members[other] = (members[at][0], members[other][1]), (members[other][0], members[at][1])
        stream = io.BytesIO()
        method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        with zipfile.ZipFile(stream, "w", method) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that are there twice
            for member, data in members:
                archive.writestr(zipfile.ZipInfo(member), data, method)
        files[name] = stream.getvalue()

    return Mutation("arrays", apply, forges=True)


# ---- tar ---------------------------------------------------------------------------------------------------------------------------


def on_tar(name: str) -> Mutation:
    """Writes a header of a tar again, its checksum right, with a field that is changed."""
    fields = {"name": (0, 100), "size": (124, 12), "kind": (156, 1), "link": (157, 100), "magic": (257, 8), "prefix": (345, 155)}

    def apply(files: Files, rng: random.Random) -> None:
        content = files.get(name)
        if not isinstance(content, bytes):
            return
        new = bytearray(content)
        heads = [at for at in range(0, len(new) - 511, 512) if new[at + 257 : at + 262] == b"ustar"]
        if not heads:
            return
        at, (offset, size) = rng.choice(heads), fields[rng.choice(tuple(fields))]
        values = {
            12: (
                b"00000000000\0",
                b"77777777777\0",
                b"\x80" + bytes(10) + b"\x01",
                b"\xff" * 12,
                b"-0000000001\0",
                b"           \0",
                b"0x7\0",
            ),
            1: tuple(b"01234567KLSxgXVDMA\0"),
        }
        value: Any = rng.choice(values.get(size, (b"a.png\0", b"../x\0", b"/etc/passwd\0", b"\0", b"\xff" * 8, b"x" * 100, b"./\0")))
        value = bytes([value]) if isinstance(value, int) else value
        new[at + offset : at + offset + size] = value[:size].ljust(size, b"\0")
        new[at + 148 : at + 156] = b" " * 8
        new[at + 148 : at + 156] = b"%06o\0 " % sum(new[at : at + 512])
        if rng.random() < 0.2:
            new[at:at] = new[at : at + 512] * rng.choice((1, 5, 2_000))
        files[name] = bytes(new)

    return Mutation("tar", apply, forges=True)


def make_tar(members: dict[str, bytes]) -> bytes:
    """An uncompressed archive."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


# ---- safetensors -------------------------------------------------------------------------------------------------------------------


def on_safetensors(names: Iterable[str]) -> Mutation:
    """Writes the header of a safetensors file again, its length right, with a value changed, or with thousands of empty tensors more."""
    allowed = frozenset(names)

    def apply(files: Files, rng: random.Random) -> None:
        found = _plain(files, files.keys() & allowed)
        if not found:
            return
        name = rng.choice(found)
        content = files[name]
        assert isinstance(content, bytes)
        size = int.from_bytes(content[:8], "little")
        try:
            header = json.loads(content[8 : 8 + size])
            if rng.random() < 0.05:
                end = max(entry["data_offsets"][1] for entry in header.values())
                header |= {f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [end, end]} for i in range(30_000)}
                text = json.dumps(header)
            else:
                text = change_json(header, rng)
        except Exception:  # another mutation was there
            return
        new = text.encode("utf-8", "surrogatepass")
        new += b" " * (-len(new) % 8)
        files[name] = len(new).to_bytes(8, "little") + new + content[8 + size :]

    return Mutation("safetensors", apply, forges=True)


# ---- images ------------------------------------------------------------------------------------------------------------------------


def _png(data: bytes, rng: random.Random) -> bytes:
    """A PNG with one chunk changed, repeated, moved or added, and right checksums."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    if not chunks:
        return data
    number = rng.randrange(len(chunks))
    kind, body = chunks[number]
    what = rng.choice(("bytes", "size", "remove", "repeat", "rename", "text", "pixels"))
    if what == "bytes":
        chunks[number] = kind, change_bytes(body, rng)
    elif what == "size":
        sides = (rng.choice((0, 1, 17, 65_535, 65_536, 89_478_485, (1 << 31) - 1, (1 << 32) - 1)) for _ in range(2))
        chunks[0] = b"IHDR", struct.pack(">II", *sides) + chunks[0][1][8:]
    elif what == "remove":
        del chunks[number]
    elif what == "repeat":
        chunks[number:number] = [chunks[number]] * rng.choice((1, 2, 1_000))
    elif what == "rename":
        chunks[number] = rng.choice((b"acTL", b"fcTL", b"fdAT", b"tRNS", b"PLTE", b"iCCP", b"eXIf", b"zTXt", b"gAMA", b"\0\0\0\0")), body
    elif what == "text":
        chunks.insert(1, (rng.choice((b"zTXt", b"iCCP", b"iTXt")), b"a\0\0" + zlib.compress(bytes(80 << 20), 9)))
    else:
        chunks[number] = b"IDAT", zlib.compress(rng.randbytes(1 << 12) + bytes(rng.choice((0, 1 << 26))), 1)
    return data[:8] + b"".join(struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks)


def _jpeg(data: bytes, rng: random.Random) -> bytes:
    """A JPEG with another size, the last scan many times, or a segment changed."""
    start = next((i for i in range(len(data) - 9) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC1, 0xC2)), None)
    scan = data.rfind(b"\xff\xda")
    what = rng.choice(("size", "scans", "parts", "segment"))
    if what == "size" and start is not None:
        sides = struct.pack(">HH", *(rng.choice((0, 1, 9, 16_000, 65_500, 65_535)) for _ in range(2)))
        return data[: start + 5] + sides + data[start + 9 :]
    if what == "scans" and scan > 0:
        return data[:-2] + data[scan:-2] * rng.choice((2, 40, 1_500)) + data[-2:]
    if what == "parts" and start is not None:
        return data[: start + 9] + bytes([rng.choice((0, 1, 2, 4, 255))]) + data[start + 10 :]
    body = rng.randbytes(rng.choice((0, 4, 300)))
    return (
        data[:2]
        + bytes([0xFF, rng.choice((0xE0, 0xE1, 0xE2, 0xEE, 0xDB, 0xC4, 0xDD, 0xFE))])
        + struct.pack(">H", len(body) + 2)
        + body
        + data[2:]
    )


def _tiff(data: bytes, rng: random.Random) -> bytes:
    """A TIFF with one entry of its directory changed, or a directory that leads to itself."""
    order = "<" if data[:2] == b"II" else ">"
    at = struct.unpack_from(order + "I", data, 4)[0]
    if at + 2 > len(data):
        return data
    count, new = struct.unpack_from(order + "H", data, at)[0], bytearray(data)
    entry = at + 2 + 12 * rng.randrange(max(1, count))
    what = rng.choice(("value", "value", "value", "tag", "type", "count", "next", "entries"))
    if what == "next":
        entry, value = at + 2 + 12 * count, struct.pack(order + "I", at)
    elif what == "entries":
        entry, value = at, struct.pack(order + "H", rng.choice((0, 1, 65_535)))
    elif what == "tag":
        value = struct.pack(
            order + "H", rng.choice((254, 256, 257, 258, 259, 262, 266, 273, 277, 279, 284, 317, 320, 322, 324, 330, 338, 347, 34665))
        )
    elif what == "type":
        entry, value = entry + 2, struct.pack(order + "H", rng.choice((0, 1, 2, 3, 5, 12, 13, 16, 99)))
    elif what == "count":
        entry, value = entry + 4, struct.pack(order + "I", rng.choice((0, 1, 2, 1_000_000, (1 << 32) - 1)))
    else:
        numbers = (0, 1, 2, 3, 4, 5, 7, 8, 16, 32, 1000, 32_773, 34_925, 50_000, 65_535, 89_478_485, (1 << 32) - 1)
        entry, value = entry + 8, struct.pack(order + "I", rng.choice(numbers))
    new[entry : entry + len(value)] = value
    return bytes(new)


def _sizes(data: bytes, rng: random.Random) -> bytes:
    """Large numbers near the front, where most formats keep their size."""
    new = bytearray(data)
    for _ in range(2):
        size, order = rng.choice((2, 4)), rng.choice(("little", "big"))
        at = rng.randrange(4, max(5, min(64, len(new) - size)))
        new[at : at + size] = rng.choice(
            (0, 1, 2, 4, 1_000, 16_000, 65_535, 89_478_485 % (1 << 8 * size), (1 << 8 * size - 1) - 1)
        ).to_bytes(size, order)
    return bytes(new)


def on_images(names: Iterable[str] | None = None) -> Mutation:
    """Changes an image as its format is built: another size, more scans, other tags, compressed text without end."""
    allowed = None if names is None else frozenset(names)

    def apply(files: Files, rng: random.Random) -> None:
        found = _plain(files, files.keys() if allowed is None else files.keys() & allowed)
        if not found:
            return
        name = rng.choice(found)
        content = files[name]
        assert isinstance(content, bytes)
        special = {b"\x89PNG": _png, b"\xff\xd8\xff": _jpeg, b"II*\0": _tiff, b"MM\0*": _tiff}
        change = next((change for mark, change in special.items() if content.startswith(mark)), _sizes)
        files[name] = (change if rng.random() < 0.8 else _sizes)(content, rng)

    return Mutation("images", apply, forges=True)
