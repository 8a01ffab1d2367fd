"""Readers of data: images and their names, JSON lines, META.json, tar shards, prepared shards, cached indices, files of prompts, a chat."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import random
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from PIL import Image
from rich.console import Console
from tokenizers import decoders, models

from experiments.reliability.fuzzing.mutations import (
    Files,
    Mutation,
    change_bytes,
    change_json,
    make_tar,
    on_arrays,
    on_bytes,
    on_files,
    on_images,
    on_json,
    on_lines,
    on_tar,
)
from experiments.reliability.fuzzing.pool import Change, Reader, Refused
from monovl_jax.config import tiny
from monovl_jax.data.chat import TEMPLATES
from monovl_jax.data.errors import SampleError
from monovl_jax.data.images import image_size, load_image, read_image
from monovl_jax.data.jsonl import JsonlSource
from monovl_jax.data.meta import read_meta
from monovl_jax.data.pictures import RootError, open_pictures
from monovl_jax.data.prepare import TextSettings, find_sets, prepare, verify
from monovl_jax.data.shards import PreparedSource, manifest_digest, shard_name
from monovl_jax.data.sources import BadSamples, Encoding
from monovl_jax.data.tiling import TilingConfig
from monovl_jax.data.tokenizer import Tokenizer
from monovl_jax.inference.batch import Summary, answer_file
from monovl_jax.inference.chat import Chat
from monovl_jax.inference.conversation import Conversation, Exchange
from monovl_jax.pretrained import Pretrained
from monovl_jax.recipes.launch import EXPECTED_ERRORS

_SPECIAL = ["<pad>", "<|user|>", "<|assistant|>", "<|end|>", "<img>", "</img>", "<IMG_CONTEXT>"]


def small_tokenizer() -> Tokenizer:
    """Of single characters and the tokens of the template `compact`."""
    vocabulary = {token: number for number, token in enumerate([*_SPECIAL, *map(chr, range(32, 127)), "\n"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.add_special_tokens(_SPECIAL)
    backend.decoder = decoders.Fuse()
    return Tokenizer.from_tokenizers(backend, eos="<|end|>", pad="<pad>")


@functools.cache
def encoding() -> Encoding:
    tiling = TilingConfig(tile_size=16, max_tiles=4, use_thumbnail=False)
    return Encoding(small_tokenizer(), TEMPLATES["compact"], tiling, visual_tokens_per_tile=4)


def digest(*parts: Any) -> str:
    """Of arrays, images and anything with a repr."""
    found = hashlib.sha256()
    for part in parts:
        found.update(
            np.ascontiguousarray(part).tobytes() if isinstance(part, np.ndarray) else repr(part).encode("utf-8", "backslashreplace")
        )
    return found.hexdigest()[:16]


def anything(found: Any, whole: Any, change: Change) -> str:
    """The format has no checksum: what is read may be what somebody wrote."""
    return ""


def noise(width: int, height: int, seed: int = 0, bands: int = 3) -> Image.Image:
    shape = (height, width) if bands == 1 else (height, width, bands)
    smooth = np.random.default_rng(seed).integers(0, 256, shape).astype(np.float32).cumsum(0)
    return Image.fromarray((smooth / max(1.0, smooth.max()) * 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


# ---- images ------------------------------------------------------------------------------------------------------------------------

_MODES = {"L": "PNG", "P": "PNG", "RGBA": "PNG", "LA": "PNG", "1": "PNG", "I;16": "PNG", "CMYK": "JPEG", "F": "TIFF"}


READ = (
    *("PNG.png", "JPEG.jpeg", "WEBP.webp", "GIF.gif", "BMP.bmp", "TIFF.tiff", "MPO.mpo", "DIB.dib", "progressive.jpg", "lossless.webp"),
    *("frames.png", "frames.gif", "frames.webp", "frames.tiff", "tiff_lzw.tiff", "tiff_adobe_deflate.tiff", "packbits.tiff", "jpeg.tiff"),
    *(f"mode-{mode.replace(';', '')}.{kind.lower()}" for mode, kind in _MODES.items()),
)
"""Images in formats that are read; the others of the folder are refused as they are."""


def _make_images(folder: Path) -> None:
    """One of every format that Pillow writes, and more of those that are read."""
    Image.init()
    colours = noise(64, 48)
    for kind in sorted(Image.SAVE):
        for mode in ("RGB", "L", "1", "P"):
            try:
                data = encoded(colours.convert(mode), kind)
            except Exception:  # not in this mode, or not at all
                continue
            (folder / f"{kind}.{'png' if kind in ('EPS', 'ICO') else kind.lower()}").write_bytes(data)
            break
    for mode, kind in _MODES.items():
        image = Image.fromarray(np.asarray(colours.convert("L")).astype(np.uint16) * 257) if mode == "I;16" else colours.convert(mode)
        image = Image.fromarray(np.asarray(image) / np.float32(255)) if mode == "F" else image
        (folder / f"mode-{mode.replace(';', '')}.{kind.lower()}").write_bytes(encoded(image, kind))
    many: dict[str, Any] = {"save_all": True, "append_images": [noise(64, 48, seed) for seed in (1, 2)]}
    exif = Image.Exif()
    exif[0x0112] = 6
    more = {
        "progressive.jpg": ("JPEG", {"progressive": True, "exif": exif, "icc_profile": b"x" * 100}),
        "frames.png": ("PNG", many),
        "frames.gif": ("GIF", many),
        "frames.webp": ("WEBP", many),
        "frames.tiff": ("TIFF", many),
        "lossless.webp": ("WEBP", {"lossless": True}),
        **{f"{packing}.tiff": ("TIFF", {"compression": packing}) for packing in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")},
    }
    for name, (kind, options) in more.items():
        (folder / name).write_bytes(encoded(colours, kind, **options))


def _image(path: Path) -> tuple[tuple[int, int], str, str]:
    """(size, digest of the pixels, what contradicts itself)."""
    size = image_size(path)
    data = read_image(path)
    image = load_image(path)
    pixels, problem = digest(np.asarray(image)), ""
    if image.size != size or image_size(path, data=data) != size:
        problem = "the size of the header is not that of the pixels"
    elif digest(np.asarray(load_image(path, data=data))) != pixels:
        problem = "by path and from memory the pixels differ"
    return size, pixels, problem


def _each(names: list[str], read: Callable[[str], Any]) -> dict[str, Any]:
    """{name: what is read}, without the names that are refused; raises when one is."""
    found: dict[str, Any] = {}
    refused: list[Exception] = []
    for name in names:
        try:
            found[name] = read(name)
        except SampleError as error:
            refused.append(error)
    if refused:
        raise Refused(str(refused[0]), found) from refused[0]
    return found


def _read_images(folder: Path, names: frozenset[str]) -> dict[str, Any]:
    try:
        return _each(sorted(names), lambda name: _image(folder / name))
    except Refused as error:
        if len(names) > 20:  # the valid folder, which has formats that are not read
            return error.found
        raise


def _right_images(found: Any, whole: Any, change: Change) -> str:
    for name, (_, pixels, problem) in found.items():
        if problem:
            return problem
        if name.endswith(".png") and not change.forged and name in whole and pixels != whole[name][1]:
            return f"a damaged PNG is read with other pixels: {name}"
    return ""


# ---- names -------------------------------------------------------------------------------------------------------------------------

_NAMES = [
    "a.png",
    "sub/b.png",
    "./a.png",
    "sub/../a.png",
    "link.png",
    "../secret.png",
    "/etc/passwd",
    "",
    "sub",
    "nowhere.png",
    "\u00e9.png",
]


def _make_names(folder: Path) -> None:
    (folder / "root/sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png", "link.png", "\u00e9.png"):
        (folder / "root" / name).write_bytes(encoded(noise(20, 10), "PNG"))
    (folder / "names.json").write_text(json.dumps(_NAMES))


def _listed(path: Path, otherwise: list[str]) -> list[Any]:
    """What a person types, which is in no file of the library's: a list of JSON where it still is one."""
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else otherwise
    except (OSError, ValueError, RecursionError):
        found = otherwise
    return found if isinstance(found, list) else [found]


def _read_names(folder: Path, names: frozenset[str]) -> dict[str, Any]:
    (folder.parent / "secret.png").write_bytes(encoded(Image.new("RGB", (33, 7)), "PNG"))
    wanted = _listed(folder / "names.json", _NAMES)
    root = open_pictures(folder / "root")
    found = {}
    for number, name in enumerate(wanted[:50]):
        for use in (lambda name=name: root.size(name, 1 << 20), lambda name=name: root.load(name, 1 << 20).size):
            try:
                found[number] = use()
            except SampleError as error:
                json.dumps(str(error), ensure_ascii=False).encode()  # so that it can be listed
        if isinstance(name, str) and "\0" not in name and not os.path.isabs(name) and len(name) < 200:  # `--image PATH` goes anywhere
            with contextlib.suppress(SampleError):
                load_image(folder / "root" / name)
    return found


def _right_names(found: Any, whole: Any, change: Change) -> str:
    return "an image outside the root is read" if (33, 7) in found.values() else ""


# ---- lines of conversations --------------------------------------------------------------------------------------------------------


def _line(number: int) -> dict[str, Any]:
    images: Any = [None, "a.png", ["a.png", "b.jpg"], "", "sub/c.webp"][number % 5]
    count = len(images) if isinstance(images, list) else int(bool(images))
    turns = [{"from": "human", "value": "<image>" * count + f"what is {number}?"}, {"from": "gpt", "value": f"it is {number}"}]
    return {"id": number, "conversations": turns} | ({} if images is None else {"image": images})


IMAGES = {"a.png": "PNG", "b.jpg": "JPEG", "sub/c.webp": "WEBP"}


def make_lines(folder: Path, count: int = 20) -> None:
    """`d.jsonl`, the images that it names, and META.json."""
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    for number, (name, kind) in enumerate(IMAGES.items()):
        (folder / name).write_bytes(encoded(noise(40, 20, number), kind))
    (folder / "d.jsonl").write_text("".join(json.dumps(_line(number)) + "\n" for number in range(count)))
    (folder / "META.json").write_text(json.dumps({"d": {"annotation": "d.jsonl", "root": "", "repeat_time": 2, "max_dynamic_patch": 2}}))


def _samples(source: Any, most: int = 12) -> list[str]:
    samples = [source[index] for index in range(min(most, len(source)))]
    return [digest(sample.ids, sample.loss_weights, sample.tiles) for sample in samples]


def _read_jsonl(folder: Path, names: frozenset[str]) -> dict[bytes, Any]:
    """{line: (tokens, tiles) and digest of its sample, None for a bad one} of the first samples."""
    read_meta(folder / "META.json")  # which looks whether the file is there
    bad = BadSamples(folder / "out/bad.jsonl")
    source = JsonlSource(folder / "d.jsonl", encoding(), image_root=folder, cache_dir=folder / "out", bad=bad)
    len(JsonlSource(folder / "d.jsonl", encoding(), image_root=folder, cache_dir=folder / "out", bad=bad))  # the index of the cache
    lines = dict.fromkeys((folder / "d.jsonl").read_bytes().split(b"\n"))
    raw = (folder / "d.jsonl").read_bytes()
    at = source.index
    for index, sample in enumerate(_samples(source, 40)):
        start, size = int(at.offsets[index]), int(at.sizes[index])
        lines[raw[start : start + size].rstrip(b"\n")] = source.length(index), sample
    return lines


def _right_jsonl(found: Any, whole: Any, change: Change) -> str:
    if change.names <= {"d.jsonl"}:
        for line in found.keys() & whole.keys():
            if found[line] != whole[line] and list(found).index(line) < 30:
                return f"a line that was not changed is read otherwise: {line[:80]!r} {found[line]}"
    return ""


def _read_meta(folder: Path, names: frozenset[str]) -> dict[str, Any]:
    found = {}
    for name, entry in read_meta(folder / "META.json").items():
        source = JsonlSource(entry.annotation, encoding(), image_root=entry.root, cache_dir=folder / "out")
        found[name] = entry.identity(), entry.used(len(source)), _samples(source, 2)
    return found


def _make_tar_lines(folder: Path) -> None:
    make_lines(folder)
    (folder / "shards").mkdir()
    for number, name in enumerate(IMAGES):
        (folder / f"shards/{number}.tar").write_bytes(make_tar({name: (folder / name).read_bytes(), f"x{number}.png": b"none"}))
        (folder / name).unlink()
    (folder / "META.json").write_text(json.dumps({"d": {"annotation": "d.jsonl", "root": "shards/*.tar"}}))


def _read_tar(folder: Path, names: frozenset[str]) -> Any:
    read_meta(folder / "META.json")  # which looks whether the files are there
    source = JsonlSource(folder / "d.jsonl", encoding(), image_root=folder / "shards/*.tar")
    return _samples(source)


# ---- cached indices ----------------------------------------------------------------------------------------------------------------


def _make_cached(folder: Path) -> None:
    make_lines(folder)
    (folder / "d.jsonl").write_text((folder / "d.jsonl").read_text() + '{"id": "bad", "conversations": []}\n')
    len(JsonlSource(folder / "d.jsonl", encoding(), image_root=folder, cache_dir=folder / "cache"))  # makes the index
    next((folder / "cache").glob("*.npz")).rename(folder / "cache/index.npz")


def _read_cached(folder: Path, names: frozenset[str]) -> Any:
    source = JsonlSource(folder / "d.jsonl", encoding(), image_root=folder, cache_dir=folder / "cache")
    if os.path.lexists(folder / "cache/index.npz"):
        (folder / "cache/index.npz").rename(folder / f"cache/d-{source._key()}.npz")  # the name depends on path and time
    index = source.index
    return digest(index.offsets, index.sizes, index.lines, index.lengths, [line for line, _, _ in index.bad]), _samples(source, 3)


def _right_cached(found: Any, whole: Any, change: Change) -> str:
    return "" if change.forged or found == whole else "a damaged index is used"


# ---- prepared data -----------------------------------------------------------------------------------------------------------------


def _make_prepared(folder: Path) -> None:
    source = folder.parent / "source"
    source.mkdir()
    make_lines(source, 12)
    (source / "d.jsonl").write_text((source / "d.jsonl").read_text() + '{"id": "bad", "conversations": []}\n')
    (source / "META.json").write_text('{"d": {"annotation": "d.jsonl"}}')
    small_tokenizer().save(source / "tokenizer")
    settings = TextSettings(source / "tokenizer", "compact", encoding().tiling, 4)
    prepare(find_sets(source / "META.json"), folder, settings, samples_per_shard=5, say=lambda text: None)


def _read_prepared(folder: Path, names: frozenset[str]) -> Any:
    found: dict[str, Any] = {}
    refused: list[Exception] = []
    try:
        verify(folder, say=lambda text: None)
        found["verify"] = True
    except (ValueError, OSError) as error:
        refused.append(error)
    try:
        for name, entry in read_meta(folder).items():
            bad = BadSamples()
            source = PreparedSource(entry.root, encoding(), bad=bad)
            found[name] = _samples(source, 20), sorted(bad._seen)
    except (ValueError, OSError) as error:
        refused.append(error)
    if refused:
        raise Refused(str(refused[0]), found) from refused[0]
    return found


def _right_prepared(found: Any, whole: Any, change: Change) -> str:
    if change.forged or "META.json" in change.names:
        return ""
    if found.get("verify") and change.names:
        return "`data verify` calls damaged data whole"
    return "" if found.get("d", whole["d"]) == whole["d"] else "damaged prepared data is read otherwise"


def seal_manifest() -> Mutation:
    """Changes a record, an index or the manifest, and makes all digests fit again, as only somebody who means it does."""

    def apply(files: Files, rng: random.Random) -> None:
        try:
            manifest = json.loads(files["d/manifest.json"])  # type: ignore[arg-type]
            name = rng.choice([name for name in files if name.startswith("d/shard-")])
            if rng.random() < 0.4:
                manifest = json.loads(change_json(manifest, rng))
            elif name.endswith(".npz") and rng.random() < 0.8:
                on_arrays(name).apply(files, rng)
            else:
                files[name] = change_bytes(files[name], rng)  # type: ignore[arg-type]
            for number, entry in enumerate(manifest["shards"]):
                shard, index = (files[f"d/{shard_name(number)}{suffix}"] for suffix in (".arrayrecord", ".npz"))
                entry |= {"bytes": len(shard), "sha256": hashlib.sha256(shard).hexdigest()}  # type: ignore[arg-type]
                entry |= {"index_bytes": len(index), "index_sha256": hashlib.sha256(index).hexdigest()}  # type: ignore[arg-type]
                entry["digest"] = hashlib.sha256(str(len(shard)).encode() + shard).hexdigest()[:16]  # type: ignore[arg-type, operator]
            manifest["digest"] = manifest_digest(manifest)
            files["d/manifest.json"] = json.dumps(manifest).encode()
        except Exception:  # another mutation was there
            return

    return Mutation("sealed", apply, forges=True)


# ---- prompts -----------------------------------------------------------------------------------------------------------------------


@functools.cache
def _model() -> Pretrained:
    return Pretrained(tiny(), {}, small_tokenizer(), Path("."))


class _NoGenerator:
    """Answers every prompt with the same word, and computes nothing."""

    piece = 256

    def fingerprint(self) -> str:
        return "none"

    def __call__(self, prompts: Any, *_: Any) -> list[np.ndarray]:
        return [np.asarray(small_ids(), np.int32) for _ in prompts]


@functools.cache
def small_ids() -> tuple[int, ...]:
    return tuple(small_tokenizer().encode("yes"))


def _answer(folder: Path) -> Summary:
    generator: Any = _NoGenerator()
    return answer_file(_model(), generator, folder / "q.jsonl", folder / "answers.jsonl", max_new_tokens=16, image_root=folder)


def _make_prompts(folder: Path) -> None:
    (folder / "sub").mkdir()
    for number, (name, kind) in enumerate(IMAGES.items()):
        (folder / name).write_bytes(encoded(noise(40, 20, number), kind))
    images: list[Any] = [{}, {"image": "a.png"}, {"images": ["a.png", "b.jpg"]}, {"image": "sub/c.webp"}]
    lines = [{"id": f"q{i}", "prompt": f"what is {i}?"} | images[i % 4] for i in range(9)] + [{"prompt": "no id"}]
    (folder / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _answer(folder)
    kept = (folder / "answers.jsonl").read_text().splitlines(keepends=True)
    (folder / "answers.jsonl").write_text("".join(kept[:4]))


def _read_prompts(folder: Path, names: frozenset[str]) -> dict[str, Any]:
    """{"ids": of the answers, "lost": whether whole lines that were in the file of answers are gone, "twice": whether an id is}."""
    target = folder / "answers.jsonl"
    before = target.read_bytes() if target.is_file() and target.stat().st_size else b""
    whole = before[: before.rfind(b"\n") + 1]
    try:
        _answer(folder)
    except (ValueError, OSError) as error:
        lost = bool(before) and not target.read_bytes().startswith(whole)
        raise Refused(str(error), {"lost": lost, "twice": False}) from error
    after = target.read_bytes()
    ids = [repr(json.loads(line)["id"]) for line in after.splitlines()]
    return {"ids": ids, "lost": not after.startswith(whole), "twice": len(set(ids)) < len(ids)}


def _right_prompts(found: Any, whole: Any, change: Change) -> str:
    if found["lost"]:
        return "lines of the file of answers are gone"
    if found["twice"] and "answers.jsonl" not in change.names:
        return "an answer is there twice"
    if change.names <= {"answers.jsonl"} and "ids" in found and set(found["ids"]) < set(whole["ids"]):
        return "a question has no answer"
    return ""


class _Silent(Conversation):
    """A conversation that reads questions and images, and answers with one word."""

    def __init__(self) -> None:
        self.model, self.system, self.exchanges = _model(), None, []
        self.session = types.SimpleNamespace(tokens=[], reset=lambda: None)  # type: ignore[assignment]

    def ask(self, question: str, images: Any = (), *_: Any) -> Iterator[str]:  # type: ignore[override]
        if not question.strip():
            raise SampleError("the question is empty; write what you want to know.")
        asked, _prompt = self.prompt(question, images)
        yield "yes"
        self.exchanges.append(Exchange(asked, tuple(map(str, images)), "yes"))


_CHAT = [
    "hi",
    "/image a.png",
    "what is it?",
    "/image b.jpg",
    "/image sub/c.webp",
    "two <image> <image>",
    "/save saved.json",
    "/help",
    "/reset",
]


def _make_chat(folder: Path) -> None:
    (folder / "sub").mkdir()
    for number, (name, kind) in enumerate(IMAGES.items()):
        (folder / name).write_bytes(encoded(noise(40, 20, number), kind))
    (folder / "chat.json").write_text(json.dumps(_CHAT))


def _read_chat(folder: Path, names: frozenset[str]) -> int:
    lines = _listed(folder / "chat.json", _CHAT)
    # nothing is written outside the folder
    inside = [line for line in lines if isinstance(line, str) and (not line.lstrip().startswith("/save") or "saved.json" in line[-12:])]
    waiting = iter([line for line in inside if "/save /" not in line and "/save ." not in line and "/save ~" not in line])

    def read() -> str:
        line = next(waiting, None)
        if line is None:
            raise EOFError
        return line

    os.chdir(folder)
    conversation = _Silent()
    Chat(conversation, Console(file=io.StringIO()), read).run()
    return len(conversation.exchanges)


READERS = (
    Reader(
        "images",
        _make_images,
        _read_images,
        _right_images,
        (on_bytes(READ), on_bytes(READ), on_images(READ), on_images(READ), on_images(), on_files(forges=True)),
        (SampleError,),
    ),
    Reader("names", _make_names, _read_names, _right_names, (on_json(), on_files(), on_files(), on_images()), (SampleError, RootError)),
    Reader(
        "jsonl",
        make_lines,
        _read_jsonl,
        _right_jsonl,
        (on_lines("d.jsonl"), on_lines("d.jsonl"), on_bytes(), on_files(), on_images(IMAGES)),
        EXPECTED_ERRORS,
    ),
    Reader(
        "meta",
        make_lines,
        _read_meta,
        anything,
        (on_json(), on_json(), on_json(), on_bytes(("META.json",)), on_files()),
        EXPECTED_ERRORS,
    ),
    Reader(
        "tar",
        _make_tar_lines,
        _read_tar,
        anything,
        (*(on_tar(f"shards/{i}.tar") for i in range(3)), on_bytes(), on_files(), on_lines("d.jsonl")),
        EXPECTED_ERRORS,
    ),
    Reader(
        "cached_index",
        _make_cached,
        _read_cached,
        _right_cached,
        (on_bytes(("cache/index.npz",)), on_files(("cache/index.npz",)), on_arrays("cache/index.npz")),
        EXPECTED_ERRORS,
    ),
    Reader(
        "prepared",
        _make_prepared,
        _read_prepared,
        _right_prepared,
        (on_bytes(), on_bytes(), on_files(), on_json(), on_lines("d/rejected.jsonl"), seal_manifest()),
        EXPECTED_ERRORS,
    ),
    Reader(
        "prompts",
        _make_prompts,
        _read_prompts,
        _right_prompts,
        (on_lines("q.jsonl"), on_lines("q.jsonl"), on_lines("answers.jsonl"), on_bytes(), on_files(), on_images(IMAGES)),
    ),
    Reader("chat", _make_chat, _read_chat, anything, (on_json(), on_json(), on_files(), on_images(IMAGES)), ()),
)
