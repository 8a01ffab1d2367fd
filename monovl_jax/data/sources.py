"""Where samples come from: files, memory, or a procedural world.

A source is anything with `__len__`, `length(i)` and `__getitem__(i)`. Conversations with pictures share one encoding path,
`ConversationSource`: a subclass says what is in sample i, in words (`turns`) and in pixels (`images`), and how large the
pictures are (`image_sizes`, for planning without pixels).
"""

from __future__ import annotations

import abc
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from monovl_jax import jsontext
from monovl_jax.data.chat import ChatTemplate, Encoded, Turn, encode_conversation, truncated
from monovl_jax.data.errors import SampleError
from monovl_jax.data.packing import Example
from monovl_jax.data.tiling import TilingConfig, tile_image, tiles_per_image
from monovl_jax.data.tokenizer import Tokenizer

Picture = Image.Image | np.ndarray
"""A Pillow picture or uint8[height, width, 3]."""


@runtime_checkable
class Source(Protocol):
    """Random access to samples. A source may also have `lengths(indices int64[n]) -> int[n, 2]`, which is used if present."""

    def __len__(self) -> int: ...

    def length(self, index: int) -> tuple[int, int]:
        """(tokens, tiles) that the sample needs, found without decoding pixels; an upper bound will do."""
        ...

    def __getitem__(self, index: int) -> Example:
        """The sample; a pure function of the index."""
        ...


def source_lengths(source: Source, indices: np.ndarray) -> np.ndarray:
    """int64[n, 2] (tokens, tiles) of the samples `indices`."""
    lengths = getattr(source, "lengths", None)
    if lengths is not None:
        return np.asarray(lengths(indices), np.int64).reshape(-1, 2)
    return np.asarray([source.length(int(index)) for index in indices], np.int64).reshape(-1, 2)


class BadSamples:
    """Counts bad samples and appends each once to a JSONL file: {"file", "line", "reason", "id"?}.

    path None only counts. What an earlier run wrote to the file is not written again. One line is one write in append mode,
    so that several worker processes can share the file; each process has its own `count`.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._seen: set[tuple[str, int]] = set()
        self._listed = self._read_listed()
        self._lock = threading.Lock()

    def _read_listed(self) -> set[tuple[str, int]]:
        if self.path is None or not self.path.is_file():
            return set()
        listed = set()
        for line in self.path.read_bytes().splitlines():
            try:
                entry = jsontext.loads(line)
                listed.add((entry["file"], entry["line"]))
            except (ValueError, KeyError, TypeError):
                continue  # a line cut by a crash is only listed once more
        return listed

    def add(self, file: object, line: int, reason: str, sample_id: object = None) -> None:
        """Notes a bad sample; the same (file, line) again changes nothing."""
        key = (str(file), line)
        with self._lock:
            if key in self._seen:
                return
            self._seen.add(key)
            if self.path is None or key in self._listed:
                return
            entry = {"file": str(file), "line": line, "reason": reason} | ({} if sample_id is None else {"id": sample_id})
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as stream:
                stream.write(json.dumps(entry, ensure_ascii=False, default=str).encode() + b"\n")

    @property
    def count(self) -> int:
        """Bad samples noted in this process."""
        return len(self._seen)

    @property
    def total(self) -> int:
        """Bad samples noted in this process or listed in the file by an earlier run."""
        return len(self._seen | self._listed)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


@dataclass(frozen=True)
class Encoding:
    """How conversations become ids and tiles: everything that a sample's length depends on.

    max_length: text beyond so many tokens is cut off (never a picture: such a sample is bad); None for no limit.
    max_tiles: a sample with more tiles, all its pictures together, is bad; None for no limit.
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    tiling: TilingConfig
    visual_tokens_per_tile: int
    max_length: int | None = None
    max_tiles: int | None = None

    def encode(self, turns: Sequence[Turn], tiles: Sequence[int]) -> Encoded:
        """Ids and mask of a conversation whose pictures have so many tiles. Raises SampleError."""
        self._check_tiles(tiles)
        whole = encode_conversation(turns, self.template, self.tokenizer, tiles, self.visual_tokens_per_tile)
        return self.fitted(whole, tiles)

    def fitted(self, encoded: Encoded, tiles: Sequence[int]) -> Encoded:
        """A whole encoded conversation cut to max_length. Raises SampleError if a picture or every answer would be lost."""
        self._check_tiles(tiles)
        if self.max_length is not None and len(encoded.ids) > self.max_length:
            encoded = truncated(encoded, self.max_length, self.tokenizer)
        if not encoded.supervised[1:].any():
            cut = f" within the first {self.max_length} tokens" if encoded.truncated else ""
            raise SampleError(f"the conversation has no answer to learn from{cut}; give at least one gpt turn with text.")
        return encoded

    def _check_tiles(self, tiles: Sequence[int]) -> None:
        if self.max_tiles is not None and sum(tiles) > self.max_tiles:
            raise SampleError(
                f"the sample has {len(tiles)} picture(s) of {sum(tiles)} tiles, a row holds {self.max_tiles}; raise tiles_per_row."
            )

    def no_tiles(self, count: int = 0) -> np.ndarray:
        """uint8[count, S, S, 3] of zeros."""
        side = self.tiling.tile_size
        return np.zeros((count, side, side, 3), np.uint8)


class ConversationSource(abc.ABC):
    """Base of sources of conversations with pictures. Subclasses define `__len__`, `turns`, `image_sizes` and `images`."""

    def __init__(self, encoding: Encoding) -> None:
        self.encoding = encoding

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def turns(self, index: int) -> Sequence[Turn]:
        """The conversation of sample `index`; `<image>` marks where a picture stands."""

    def image_sizes(self, index: int) -> Sequence[tuple[int, int]]:
        """(width, height) of each picture, without decoding it."""
        return ()

    def images(self, index: int) -> Sequence[Picture]:
        """The pictures."""
        return ()

    def length(self, index: int) -> tuple[int, int]:
        tiles = tiles_per_image(self.image_sizes(index), self.encoding.tiling)
        return len(self.encoding.encode(self.turns(index), tiles).ids), sum(tiles)

    def __getitem__(self, index: int) -> Example:
        pictures = self.images(index)
        tiling = self.encoding.tiling.for_images(len(pictures))
        tiles = [tile_image(picture, tiling) for picture in pictures]
        encoded = self.encoding.encode(self.turns(index), [len(t) for t in tiles])
        return make_example(encoded, tiles, self.encoding)


def make_example(encoded: Encoded, tiles: Sequence[np.ndarray], encoding: Encoding) -> Example:
    """An Example of an encoded conversation and the tiles of each of its pictures."""
    if not tiles:
        joined = encoding.no_tiles()
    else:
        joined = tiles[0] if len(tiles) == 1 else np.concatenate(tiles)
    return Example(encoded.ids, encoded.supervised.astype(np.float32), joined)


@dataclass(frozen=True)
class Sample:
    """A conversation and its pictures, in memory."""

    turns: Sequence[Turn]
    images: Sequence[Picture] = ()


class MemorySource(ConversationSource):
    """Samples held in memory."""

    def __init__(self, samples: Sequence[Sample], encoding: Encoding) -> None:
        super().__init__(encoding)
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def turns(self, index: int) -> Sequence[Turn]:
        return self.samples[index].turns

    def image_sizes(self, index: int) -> Sequence[tuple[int, int]]:
        return [_size(image) for image in self.samples[index].images]

    def images(self, index: int) -> Sequence[Picture]:
        return self.samples[index].images


def _size(picture: Picture) -> tuple[int, int]:
    return (picture.shape[1], picture.shape[0]) if isinstance(picture, np.ndarray) else picture.size


class First:
    """The first `count` samples of a source."""

    def __init__(self, source: Source, count: int) -> None:
        self.source, self.count = source, min(count, len(source))

    def __len__(self) -> int:
        return self.count

    def length(self, index: int) -> tuple[int, int]:
        return self.source.length(index)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return source_lengths(self.source, indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[index]


class TextSource:
    """Plain text for language modelling: the documents joined by the end-of-text token and cut into pieces of `length` tokens.

    Every token of a piece except its first is supervised; a last piece shorter than `length` is kept if it has 2 tokens.
    Raises ValueError if there is no text.
    """

    def __init__(self, documents: Sequence[str], tokenizer: Tokenizer, length: int, *, tile_size: int = 1) -> None:
        if length < 2:
            raise ValueError(f"pieces of {length} tokens teach nothing; give a length of at least 2.")
        end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        ids = [index for text in documents for index in [*tokenizer.encode(text), *end]]
        if len(ids) < 2:
            raise ValueError("the documents hold less than two tokens; give some text.")
        self._ids, self._length = np.asarray(ids, np.int32), length
        self._tiles = np.zeros((0, tile_size, tile_size, 3), np.uint8)

    def __len__(self) -> int:
        whole, rest = divmod(len(self._ids), self._length)
        return whole + (rest >= 2)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        tokens = np.minimum(len(self._ids) - np.asarray(indices, np.int64) * self._length, self._length)
        return np.stack([tokens, np.zeros_like(tokens)], axis=1)

    def length(self, index: int) -> tuple[int, int]:
        return min(len(self._ids) - index * self._length, self._length), 0

    def __getitem__(self, index: int) -> Example:
        ids = self._ids[index * self._length : (index + 1) * self._length]
        weights = np.ones(len(ids), np.float32)
        weights[0] = 0
        return Example(ids, weights, self._tiles)
