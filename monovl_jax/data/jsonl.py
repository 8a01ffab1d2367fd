"""LLaVA-style JSONL files: one sample a line.

    {"id": "7", "image": "a/cat.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                        {"from": "gpt", "value": "A cat."}]}

`image` is a path relative to the image root, a list of paths, or absent. An index of byte offsets and lengths is made on first
use, from text and picture headers alone, and kept in a cache folder. Bad samples never reach training: they are counted,
skipped and listed with file, line and reason, or raise at once with `strict`. A picture that turns out broken when it is
decoded keeps its slots with weight 0, because the packs are planned by then; it is counted and listed as well.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monovl_jax import jsontext
from monovl_jax.data.chat import Turn, parse_turns
from monovl_jax.data.errors import SampleError
from monovl_jax.data.images import MAX_PIXELS, recompress
from monovl_jax.data.packing import Example
from monovl_jax.data.pictures import Pictures, open_pictures
from monovl_jax.data.sources import BadSamples, Encoding, make_example
from monovl_jax.data.tiling import tile_image, tiles_per_image

_INDEX_VERSION = 1


@dataclass(frozen=True)
class Record:
    """One line: the turns, the names of its pictures, its id if it has one."""

    turns: list[Turn]
    images: list[str]
    id: object = None


@dataclass(frozen=True)
class _Index:
    """Where the good samples are and what they need; the bad lines with their reasons."""

    offsets: np.ndarray  # int64[n] first byte of the line
    sizes: np.ndarray  # int64[n] bytes of the line
    lines: np.ndarray  # int64[n] line numbers from 1
    lengths: np.ndarray  # int32[n, 2] tokens, tiles
    bad: list[tuple[int, str, object]]  # line, reason, id


MAX_INDEX_BYTES = 64 << 30
"""Largest cached index that is read; 48 bytes are written for a sample."""

NOT_READ = ("images", "video", "videos", "audio", "audios")
"""Fields of other forms of data. A sample that has one would be trained as text alone."""


def parse_line(raw: bytes) -> Record:
    """The record in one line of a JSONL file. Raises SampleError for bad UTF-8, bad JSON, wrong fields or bad turns.

    An empty `image` is a sample of text, as upstream takes it (internvl_chat_finetune.py:538).
    """
    try:
        entry = jsontext.line(raw)
    except jsontext.JsonError as error:
        raise SampleError(f"the line is not valid JSON ({error}); write one object per line.") from None
    if not isinstance(entry, dict):
        raise SampleError(f"the line holds a JSON {type(entry).__name__}; write one object per line.")
    if "conversations" not in entry:
        raise SampleError("the sample has no 'conversations'; add the list of turns.")
    if unread := [key for key in NOT_READ if entry.get(key)]:
        raise SampleError(f"the sample has {unread[0]!r}, which is not read; name its images in 'image', a path or a list of paths.")
    images = entry.get("image")
    images = [] if images in (None, "") else [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise SampleError("'image' must be a path or a list of paths; correct the field or leave it out.")
    return Record(parse_turns(entry["conversations"]), images, entry.get("id"))


class JsonlSource:
    """Samples of one JSONL file. Implements `Source`.

    image_root: folder that picture paths are relative to and must stay in (default: the file's folder), or tar shards (`data.pictures`).
    cache_dir: where the index is kept (None: made anew each time). bad: where bad samples are counted and listed.
    strict: raise SampleError, with file and line, instead of skipping. verify_images: decode every picture for the index.
    augment_seed: compress every tile as JPEG once, quality by this seed and the sample's index (`images.recompress`); None: don't.
    progress: called now and then while indexing with (bytes done, bytes in all).
    Raises ValueError if the file or the root does not exist, or a tar shard is damaged.
    """

    def __init__(
        self,
        path: str | Path,
        encoding: Encoding,
        *,
        image_root: str | Path | None = None,
        cache_dir: str | Path | None = None,
        bad: BadSamples | None = None,
        strict: bool = False,
        verify_images: bool = False,
        max_pixels: int = MAX_PIXELS,
        augment_seed: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.path, self.encoding = Path(path), encoding
        self.image_root = Path(image_root) if image_root is not None else self.path.parent
        self.bad = BadSamples() if bad is None else bad
        self._strict, self._verify, self._max_pixels = strict, verify_images, max_pixels
        self._cache_dir = None if cache_dir is None else Path(cache_dir)
        self._progress, self._augment_seed = progress, augment_seed
        self._index: _Index | None = None
        self._file: int | None = None
        self._lock = threading.RLock()
        if not self.path.is_file():
            raise ValueError(f"the data file {self.path} does not exist; correct the path.")
        self.pictures: Pictures = open_pictures(self.image_root)

    def __len__(self) -> int:
        return len(self.index.offsets)

    @property
    def rejected(self) -> int:
        """How many samples were found bad when the index was made."""
        return len(self.index.bad)

    @property
    def first_rejected(self) -> tuple[int, str] | None:
        """(line, reason) of the first bad sample."""
        return self.index.bad[0][:2] if self.index.bad else None

    def length(self, index: int) -> tuple[int, int]:
        tokens, tiles = self.index.lengths[index]
        return int(tokens), int(tiles)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return self.index.lengths[indices]

    def __getitem__(self, index: int) -> Example:
        line = int(self.index.lines[index])
        record = self.record(index)
        try:
            tiles = self._tiles(record, index)
        except SampleError as error:
            if self._strict:
                raise error.at(self.path, line) from None
            self.bad.add(self.path, line, str(error), record.id)
            return self._lost(record, index)
        return make_example(self.encoding.encode(record.turns, [len(t) for t in tiles]), tiles, self.encoding)

    def record(self, index: int) -> Record:
        """The text of sample `index` and the names of its pictures."""
        with self._lock:
            if self._file is None:
                self._file = os.open(self.path, os.O_RDONLY)
        found = self.index
        raw = os.pread(self._file, int(found.sizes[index]), int(found.offsets[index]))
        try:
            return parse_line(raw)
        except SampleError as error:
            raise SampleError(f"{self.path}:{found.lines[index]}: the file changed after it was indexed ({error}); start again.") from None

    def _tiles(self, record: Record, index: int) -> list[np.ndarray]:
        tiling = self.encoding.tiling.for_images(len(record.images))
        tiles = [tile_image(self.pictures.load(name, self._max_pixels), tiling) for name in record.images]
        planned = int(self.index.lengths[index, 1])
        if sum(map(len, tiles)) != planned:
            raise SampleError(f"a picture changed its size after indexing ({sum(map(len, tiles))} tiles, {planned} planned); index again.")
        if self._augment_seed is not None:
            tiles = [recompress(t, (self._augment_seed, index, number)) for number, t in enumerate(tiles)]
        return tiles

    def _lost(self, record: Record, index: int) -> Example:
        """The planned slots without pixels and without weight; how the tiles are shared among pictures no longer matters."""
        total, count = int(self.index.lengths[index, 1]), len(record.images)
        encoded = self.encoding.encode(record.turns, [total - count + 1] + [1] * (count - 1))
        return Example(encoded.ids, np.zeros(len(encoded.ids), np.float32), self.encoding.no_tiles(total), failed=True)

    @property
    def index(self) -> _Index:
        """The index, made or read from the cache on first use."""
        with self._lock:
            if self._index is None:
                self._index = self._load_or_make_index()
                for line, reason, sample_id in self._index.bad:
                    if self._strict:
                        raise SampleError(reason).at(self.path, line)
                    self.bad.add(self.path, line, reason, sample_id)
            return self._index

    def _load_or_make_index(self) -> _Index:
        if self._cache_dir is None:
            return self._make_index()
        cached = self._cache_dir / f"{self.path.stem}-{self._key()}.npz"
        if (found := self._cached_index(cached)) is not None and not self._some_are_good_now(found.bad):
            return found
        index = self._make_index()
        self._cache_dir.mkdir(parents=True, exist_ok=True)
        bad = np.frombuffer(json.dumps(index.bad, ensure_ascii=False, default=str).encode(), np.uint8)
        temporary = cached.with_name(f".{os.getpid()}-{cached.name}")
        np.savez(temporary, offsets=index.offsets, sizes=index.sizes, lines=index.lines, lengths=index.lengths, bad=bad)
        os.replace(temporary, cached)
        return index

    def _cached_index(self, cached: Path) -> _Index | None:
        """None when there is none, or one that is damaged: it is made anew."""
        if not cached.is_file() or cached.stat().st_size > MAX_INDEX_BYTES:
            return None
        try:
            with np.load(cached, allow_pickle=False) as arrays:
                bad = [(int(line), str(reason), sample_id) for line, reason, sample_id in jsontext.loads(bytes(arrays["bad"]))]
                index = _Index(arrays["offsets"], arrays["sizes"], arrays["lines"], arrays["lengths"], bad)
            columns = (index.offsets, index.sizes, index.lines)
            sound = all(c.dtype == np.int64 and c.shape == index.lines.shape == (len(index.lengths),) and (c >= 0).all() for c in columns)
            sound &= index.lengths.dtype == np.int32 and index.lengths.shape[1:] == (2,) and bool((index.lengths >= 0).all())
            return index if sound and (index.offsets + index.sizes <= self.path.stat().st_size).all() else None
        except Exception:  # NumPy and zipfile answer damage with errors of every kind
            return None

    def _some_are_good_now(self, bad: list[tuple[int, str, object]]) -> bool:
        """Whether an image that was missing or damaged when the index was made has been put in place since."""
        lines = {line for line, _, _ in bad}
        for number, _, raw in self._raw_lines() if lines else ():
            if number in lines:
                try:
                    self._measure(parse_line(raw))
                except SampleError:
                    continue
                return True
        return False

    def _key(self) -> str:
        """Changes with the file and with everything that lengths depend on (the pictures themselves are taken on trust)."""
        stat, encoding = self.path.stat(), self.encoding
        parts = {
            "version": _INDEX_VERSION,
            "file": [str(self.path.resolve()), stat.st_size, stat.st_mtime_ns],
            "root": str(self.image_root.resolve()),
            "tokenizer": encoding.tokenizer.fingerprint(),
            "template": asdict(encoding.template),
            "tiling": asdict(encoding.tiling),
            "limits": [encoding.visual_tokens_per_tile, encoding.max_length, encoding.max_tiles, self._max_pixels, self._verify],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]

    def _raw_lines(self) -> Iterator[tuple[int, int, bytes]]:
        """(line number, offset, bytes) of the lines that are not blank."""
        total = self.path.stat().st_size
        with open(self.path, "rb") as stream:
            for number, offset, raw in jsontext.lines(stream):
                if offset >= total:  # what is written meanwhile, or a file of /proc that has no end
                    break
                yield number, offset, raw
                if self._progress is not None and number % 256 == 0:
                    self._progress(offset, total)
        if self._progress is not None:
            self._progress(total, total)

    def _make_index(self) -> _Index:
        rows: list[tuple[int, int, int, int, int]] = []
        bad: list[tuple[int, str, object]] = []
        for number, offset, raw in self._raw_lines():
            record = None
            try:
                record = parse_line(raw)
                tokens, tiles = self._measure(record)
            except SampleError as error:
                if self._strict:
                    raise error.at(self.path, number) from None
                bad.append((number, str(error), record and record.id))
                continue
            rows.append((offset, len(raw), number, tokens, tiles))
        table = np.asarray(rows, np.int64).reshape(-1, 5)
        return _Index(table[:, 0].copy(), table[:, 1].copy(), table[:, 2].copy(), table[:, 3:].astype(np.int32), bad)

    def _measure(self, record: Record) -> tuple[int, int]:
        if self._verify:
            sizes = [self.pictures.load(name, self._max_pixels).size for name in record.images]
        else:
            sizes = [self.pictures.size(name, self._max_pixels) for name in record.images]
        tiles = tiles_per_image(sizes, self.encoding.tiling)
        return len(self.encoding.encode(record.turns, tiles).ids), sum(tiles)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_lock": None, "_progress": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()
