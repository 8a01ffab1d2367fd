"""Prepared samples: ArrayRecord shards with everything but the decoding of pictures done (`data.prepare` writes them).

    FOLDER/manifest.json              settings, counts, digests of every file; its own digest last
    FOLDER/shard-00000.arrayrecord    the samples, one record each, in the order of the JSONL file
    FOLDER/shard-00000.npz            the length index of the shard
    FOLDER/rejected.jsonl             {"file", "line", "reason", "id"?} of the samples that were left out

A record, little-endian, nothing executable in it:

    4 bytes          b"MVL1"
    uint32           bytes of the header
    header           JSON: {"line": 7, "id": ..., "tokens": n, "images": [[name, width, height, bytes], ...]}
    int32[n]         token ids, ONE image-context token for each picture
    uint8[(n+7)/8]   the label mask, a bit for each token, the highest bit first
    the bytes of each picture's file as they were

Tokens are stored before pictures are given their slots. How many tiles a picture makes follows from its size, which the header and the
index hold, so that one folder serves every stage: any row length, tile limit or number of tokens a tile. Only tokenizer and chat
template are fixed, and checked.
"""

from __future__ import annotations

import hashlib
import json
import logging
import struct
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monovl_jax import jsontext
from monovl_jax.data.chat import IMAGE_CONTEXT, IMAGE_END, Encoded
from monovl_jax.data.errors import SampleError
from monovl_jax.data.images import MAX_PIXELS, load_image, recompress
from monovl_jax.data.meta import MANIFEST, MetaError, file_digest
from monovl_jax.data.packing import Example
from monovl_jax.data.sources import BadSamples, Encoding, make_example
from monovl_jax.data.tiling import TilingConfig, count_tiles, tile_image

FORMAT = 1
TRUST = "trust_control_tokens"
REJECTED = "rejected.jsonl"
REJECTED_DIGEST = "rejected_sha256"  # in the manifest; version 0.1.0 did not write it
_MAGIC = b"MVL1"
COLUMNS = ("line", "tokens", "pictures", "answer", "before", "last")
_OPEN_SHARDS = 128
_SAMPLED_BLOCKS = 4  # of a shard, when its digest is compared before training: 256 KiB


@dataclass(frozen=True)
class StoredImage:
    """A picture's file: its name, (width, height) in pixels, its bytes."""

    name: str
    size: tuple[int, int]
    data: bytes


@dataclass(frozen=True)
class StoredSample:
    """What a record holds. ids: int32[n] with one context token a picture. supervised: bool[n]. line: of the JSONL file, from 1."""

    ids: np.ndarray
    supervised: np.ndarray
    images: Sequence[StoredImage]
    line: int
    id: object = None

    def to_bytes(self) -> bytes:
        images = [[image.name, *image.size, len(image.data)] for image in self.images]
        entry = {"line": self.line, "tokens": len(self.ids), "images": images} | ({} if self.id is None else {"id": self.id})
        header = json.dumps(entry, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
        parts = [_MAGIC, struct.pack("<I", len(header)), header, self.ids.astype("<i4").tobytes(), np.packbits(self.supervised).tobytes()]
        return b"".join([*parts, *(image.data for image in self.images)])

    @classmethod
    def from_bytes(cls, record: bytes) -> StoredSample:
        """Raises ValueError for bytes that `to_bytes` did not make."""
        if record[:4] != _MAGIC or len(record) < 8:
            raise ValueError("it does not begin with the mark of a record")
        at = 8 + struct.unpack_from("<I", record, 4)[0]
        try:
            entry = jsontext.loads(record[8:at].decode("utf-8", "surrogatepass"))
            count, images, line = entry["tokens"], entry["images"], entry["line"]
            sizes = [size for _, _, _, size in images]
            if any(not isinstance(n, int) or n < 0 for n in (count, line, *sizes)):
                raise ValueError("a size is no whole number")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"its header is damaged ({type(error).__name__})") from None
        packed = -(-count // 8)
        if at + 4 * count + packed + sum(sizes) != len(record):
            raise ValueError(f"it has {len(record)} bytes, not those that its header counts")
        ids = np.frombuffer(record, "<i4", count, at).astype(np.int32)
        mask = np.unpackbits(np.frombuffer(record, np.uint8, packed, at + 4 * count), count=count).astype(bool)
        at += 4 * count + packed
        stored = []
        for name, width, height, size in images:
            stored.append(StoredImage(name, (width, height), record[at : at + size]))
            at += size
        return cls(ids, mask, stored, line, entry.get("id"))


def index_row(sample: StoredSample, context: int, end: int) -> tuple[int, ...]:
    """What lengths are computed from, without reading the record: the values of the columns of the index.

    line, tokens (with one a picture), pictures, answer (place of the first token to learn after token 0, -1 for none), before (pictures
    before it), last (place of the last token that belongs to a picture, -1 without pictures).
    """
    pictures = len(sample.images)
    learned = np.flatnonzero(sample.supervised[1:])
    answer = int(learned[0]) + 1 if len(learned) else -1
    before = int(np.count_nonzero(sample.ids[: max(answer, 0)] == context)) if pictures else 0
    last = int(np.flatnonzero(np.isin(sample.ids, (context, end)))[-1]) if pictures else -1
    return sample.line, len(sample.ids), pictures, answer, before, last


@dataclass(frozen=True)
class ShardIndex:
    """columns: int64[n, 6], see `index_row`. sizes: int32[pictures of all, 2] (width, height)."""

    columns: np.ndarray
    sizes: np.ndarray

    def save(self, path: Path) -> None:
        with open(path, "wb") as stream:
            np.savez(stream, columns=self.columns, sizes=self.sizes)

    @classmethod
    def load(cls, path: Path) -> ShardIndex:
        """Raises ValueError, OSError, KeyError or MemoryError for a file that is none."""
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed")  # written so by nobody but one who wants the memory to run out
        with np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["columns"].astype(np.int64).reshape(-1, len(COLUMNS)), arrays["sizes"].astype(np.int32).reshape(-1, 2))


def array_record() -> Any:
    """The module that reads and writes ArrayRecord files. Raises MetaError where there is none, as on Windows."""
    try:
        from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]  # compiled, without types
    except ImportError as error:
        raise MetaError(
            f"prepared data needs the package array_record, which cannot be loaded here ({error}); install it with pip, on Linux or macOS, "
            "or train from the JSONL files"
        ) from None
    return array_record_module


def shard_name(number: int) -> str:
    """Name of shard `number` without suffix."""
    return f"shard-{number:05d}"


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a whole file in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sampled_digest(path: str | Path) -> str:
    """A digest of size and a few blocks of a shard, quick whatever its size."""
    return file_digest(path, blocks=_SAMPLED_BLOCKS)


def manifest_digest(manifest: dict[str, Any]) -> str:
    """Digest of a manifest without its own "digest"."""
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def text_settings(encoding: Encoding) -> dict[str, Any]:
    """What stored tokens depend on, as JSON values."""
    return {"tokenizer": encoding.tokenizer.fingerprint(), "template": asdict(encoding.template)}


def _manifest_problem(manifest: dict[str, Any]) -> str | None:
    """A digest only tells accidents from the rest: what is read later must also be of the right kind."""
    counts, texts = ("records", "rejected", "bytes", "index_bytes"), ("digest", "sha256", "index_sha256")
    if not isinstance(manifest.get("settings"), dict) or not isinstance(manifest.get("annotation"), str):
        return "settings or annotation is absent"
    if not isinstance(manifest.get("shards"), list) or not isinstance(manifest.get("rejected"), int):
        return "shards or rejected is absent"
    for number, entry in enumerate(manifest["shards"]):
        if not isinstance(entry, dict):
            return f"shard {number} is no object"
        whole = all(isinstance(entry.get(key), int) and entry[key] >= 0 for key in counts)
        if not whole or not all(isinstance(entry.get(key), str) for key in texts):
            return f"shard {number} lacks a count or a digest"
    return None


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a prepared folder. Raises MetaError for one that is absent, damaged, changed, or of another version."""
    path = Path(folder) / MANIFEST
    again = "run `monovl data prepare` again into a new folder"
    try:
        manifest = jsontext.read(path)
        version, digest = manifest["format"], manifest["digest"]
    except FileNotFoundError:
        raise MetaError(f"{path} does not exist; run `monovl data prepare` to its end, or correct the path") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MetaError(f"{path} is no manifest of prepared data ({type(error).__name__}: {error}); {again}") from None
    if version != FORMAT:
        raise MetaError(f"{path} has format {version}, this version of monovl_jax reads {FORMAT}; {again}")
    if manifest_digest(manifest) != digest:
        raise MetaError(f"{path} was changed after it was written (its digest does not match); restore it, or {again}")
    if problem := _manifest_problem(manifest):
        raise MetaError(f"{path} is no manifest of prepared data ({problem}); {again}")
    return manifest


def check_shards(folder: str | Path, manifest: dict[str, Any], *, full: bool = False) -> None:
    """Raises MetaError when a file of the folder is missing or not the one that was written.

    Sizes, indices in full, and some blocks of every shard are compared; with `full` every byte.
    """
    folder = Path(folder)
    listed = {f"{shard_name(number)}.arrayrecord" for number in range(len(manifest["shards"]))}
    if foreign := sorted({path.name for path in folder.glob("*.arrayrecord")} - listed):
        raise MetaError(f"{folder} holds {foreign[0]!r}, which the manifest does not list; remove it, or copy the folder again")
    for number, entry in enumerate(manifest["shards"]):
        for suffix, bytes_key in ((".arrayrecord", "bytes"), (".npz", "index_bytes")):
            path = folder / f"{shard_name(number)}{suffix}"
            if not path.is_file():
                raise MetaError(f"{path} is missing ({len(manifest['shards'])} shards are in the manifest); copy the folder again")
            if (size := path.stat().st_size) != entry[bytes_key]:
                raise MetaError(f"{path} has {size} bytes, the manifest says {entry[bytes_key]}; copy it again")
        shard, index = (folder / f"{shard_name(number)}{suffix}" for suffix in (".arrayrecord", ".npz"))
        if file_sha256(index) != entry["index_sha256"]:
            raise MetaError(f"{index} was changed after it was written (its digest does not match the manifest); copy it again")
        if sampled_digest(shard) != entry["digest"] or (full and file_sha256(shard) != entry["sha256"]):
            raise MetaError(f"{shard} was changed after it was written (its digest does not match the manifest); copy it again")


def read_rejected(folder: str | Path, manifest: dict[str, Any]) -> list[tuple[int, str, object]]:
    """(line, reason, id) of the samples that were left out. Raises MetaError when the file is missing or not the one that was written."""
    path = Path(folder) / REJECTED
    try:
        data = jsontext.read_bytes(path)
        entries = [jsontext.loads(line) for line in data.splitlines()]
        found = [(entry["line"], entry["reason"], entry.get("id")) for entry in entries]
        if any(type(line) is not int or not isinstance(reason, str) for line, reason, _ in found):
            raise ValueError("a line is no number, or a reason no text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MetaError(f"{path} cannot be read ({type(error).__name__}: {error}); copy the folder again") from None
    if len(found) != manifest["rejected"]:
        raise MetaError(f"{path} lists {len(found)} samples, the manifest says {manifest['rejected']}; copy the folder again")
    digest = hashlib.sha256(data).hexdigest()
    if manifest.get(REJECTED_DIGEST, digest) != digest:
        raise MetaError(f"{path} was changed after it was written (its digest does not match the manifest); copy it again")
    return found


def count_slots(sizes: np.ndarray, pictures: np.ndarray, tiling: TilingConfig) -> np.ndarray:
    """int64[m] tiles of each of the pictures `sizes` int[m, 2], which belong to samples of `pictures` int[n] pictures each (sum m)."""
    if not len(sizes):
        return np.zeros(0, np.int64)
    rows = np.concatenate([sizes, np.repeat(pictures, pictures)[:, None]], axis=1)
    kinds, which = np.unique(rows, axis=0, return_inverse=True)
    tiles = [count_tiles(width, height, tiling.for_images(count)) for width, height, count in kinds.tolist()]
    return np.asarray(tiles, np.int64)[which.reshape(-1)]


class PreparedSource:
    """Samples of a prepared folder. Implements `Source`; the samples, their order and their tokens are those of the JSONL file.

    What does not fit the rows (`encoding.max_length`, `encoding.max_tiles`) is left out here as `JsonlSource` leaves it out. bad, strict,
    augment_seed, verify_images: as there. Raises MetaError for a folder that is not whole, or made with another tokenizer or template.
    """

    def __init__(
        self,
        folder: str | Path,
        encoding: Encoding,
        *,
        bad: BadSamples | None = None,
        strict: bool = False,
        verify_images: bool = False,
        max_pixels: int = MAX_PIXELS,
        augment_seed: int | None = None,
    ) -> None:
        self._array_record = array_record()
        self.folder, self.encoding = Path(folder), encoding
        self.bad = BadSamples() if bad is None else bad
        self._strict, self._max_pixels, self._augment_seed = strict, max_pixels, augment_seed
        self._readers: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()
        self.manifest = read_manifest(self.folder)
        self.annotation = self.manifest["annotation"]
        self._check_settings()
        check_shards(self.folder, self.manifest)
        self._read_index()
        bad_lines = read_rejected(self.folder, self.manifest) + self._select()
        if verify_images:
            bad_lines += self._verify()
        for line, reason, sample_id in sorted(bad_lines, key=lambda entry: entry[0]):
            if strict:
                raise SampleError(reason).at(self.annotation, line)
            self.bad.add(self.annotation, line, reason, sample_id)
        self.rejected = len(bad_lines)
        self.first_rejected = bad_lines[0][:2] if bad_lines else None

    def _check_settings(self) -> None:
        there, here = self.manifest["settings"], text_settings(self.encoding)
        template = there.get("template")
        if isinstance(template, dict) and TRUST not in template:  # of version 0.1.0, which took control tokens in texts for such
            there = {**there, "template": template | {TRUST: here["template"][TRUST]}}
            if not here["template"][TRUST]:
                logging.getLogger(__name__).warning("%s is of version 0.1.0: control tokens in its texts are control tokens", self.folder)
        elif isinstance(template, dict) and template[TRUST] != here["template"][TRUST]:
            how = "with" if template[TRUST] else "without"
            raise MetaError(f"{self.folder} was prepared {how} --trust-control-tokens; train {how} it, or prepare again")
        for key, value in here.items():
            if there.get(key) != value:
                raise MetaError(
                    f"{self.folder} was prepared with another {'tokenizer' if key == 'tokenizer' else 'chat template'} than this run's; "
                    "give that one, or run `monovl data prepare` again with --model of this run"
                )

    def _read_index(self) -> None:
        parts = []
        for number, entry in enumerate(self.manifest["shards"]):
            path = self.folder / f"{shard_name(number)}.npz"
            try:
                part = ShardIndex.load(path)
            except Exception as error:  # NumPy and zipfile answer damage with errors of every kind
                raise MetaError(f"{path} is no index of a shard ({type(error).__name__}: {error}); copy the folder again") from None
            sound = (part.columns >= -1).all() and (part.columns[:, 1:3] >= 0).all() and (part.sizes >= 1).all()
            if not sound or len(part.columns) != entry["records"] or part.columns[:, 2].sum() != len(part.sizes):
                raise MetaError(f"{path} does not list the {entry['records']} records of its shard; copy the folder again")
            parts.append(part)
        none = ShardIndex(np.zeros((0, len(COLUMNS)), np.int64), np.zeros((0, 2), np.int32))
        self._columns = np.concatenate([none.columns, *(part.columns for part in parts)])
        self._sizes = sizes = np.concatenate([none.sizes, *(part.sizes for part in parts)])
        self._ends = np.cumsum([len(part.columns) for part in parts], dtype=np.int64)
        pictures = self._columns[:, 2]
        self._slots = count_slots(sizes, pictures, self.encoding.tiling)
        self._picture_ends = np.cumsum(pictures)

    def _select(self) -> list[tuple[int, str, object]]:
        """Finds the samples that fit the rows; returns the others with reasons, which are those of the JSONL path."""
        columns, v = self._columns, self.encoding.visual_tokens_per_tile
        _, tokens, pictures, answer, before, last = columns.T
        sums = np.concatenate([[0], np.cumsum(self._slots)])
        begin = self._picture_ends - pictures
        tiles = sums[self._picture_ends] - sums[begin]
        lengths = tokens + v * tiles - pictures
        most_tiles, most = self.encoding.max_tiles, self.encoding.max_length
        good = np.ones(len(columns), bool) if most_tiles is None else tiles <= most_tiles
        if most is not None:
            # places in the ids once every picture has its slots; all pictures lie before `last`, `before` of them before the answer
            first_answer = answer + v * (sums[begin + before] - sums[begin]) - before
            good &= (last + v * tiles - pictures < most) | (pictures == 0)
            good &= first_answer < most
            lengths = np.minimum(lengths, most)
        self._good = np.flatnonzero(good)
        self._lengths = np.stack([lengths, tiles], axis=1)[self._good]
        bad = []
        for place in np.flatnonzero(~good).tolist():
            sample = self._sample(place)
            try:
                self._encoded(sample, self._tiles_of(place))
            except SampleError as error:
                bad.append((sample.line, str(error), sample.id))
        return bad

    def _verify(self) -> list[tuple[int, str, object]]:
        keep, bad = np.ones(len(self._good), bool), []
        for number, place in enumerate(self._good.tolist()):
            sample = self._sample(place)
            try:
                for image in sample.images:
                    load_image(image.name, self._max_pixels, image.data)
            except SampleError as error:
                keep[number] = False
                bad.append((sample.line, str(error), sample.id))
        self._good, self._lengths = self._good[keep], self._lengths[keep]
        return bad

    def __len__(self) -> int:
        return len(self._good)

    def length(self, index: int) -> tuple[int, int]:
        tokens, tiles = self._lengths[index]
        return int(tokens), int(tiles)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return self._lengths[indices]

    def __getitem__(self, index: int) -> Example:
        place = int(self._good[index])
        sample = self._sample(place)
        planned = self._tiles_of(place)
        try:
            tiles = self._tiles(sample, planned, index)
        except SampleError as error:
            if self._strict:
                raise error.at(self.annotation, sample.line) from None
            self.bad.add(self.annotation, sample.line, str(error), sample.id)
            total, count = sum(planned), len(planned)
            encoded = self._encoded(sample, [total - count + 1] + [1] * (count - 1))
            return Example(encoded.ids, np.zeros(len(encoded.ids), np.float32), self.encoding.no_tiles(total), failed=True)
        return make_example(self._encoded(sample, planned), tiles, self.encoding)

    def _tiles_of(self, place: int) -> list[int]:
        end = int(self._picture_ends[place])
        return self._slots[end - int(self._columns[place, 2]) : end].tolist()

    def _tiles(self, sample: StoredSample, planned: list[int], index: int) -> list[np.ndarray]:
        tiling = self.encoding.tiling.for_images(len(sample.images))
        tiles = [tile_image(load_image(image.name, self._max_pixels, image.data), tiling) for image in sample.images]
        if [len(t) for t in tiles] != planned:
            raise SampleError("a picture decodes to another size than its header says; replace the file and prepare again.")
        if self._augment_seed is not None:
            tiles = [recompress(t, (self._augment_seed, index, number)) for number, t in enumerate(tiles)]
        return tiles

    def _encoded(self, sample: StoredSample, tiles: Sequence[int]) -> Encoded:
        """Ids and mask with the slots of each picture, cut to the row. Raises SampleError for a sample that does not fit."""
        return self.encoding.fitted(self._expanded(sample, tiles), tiles)

    def _expanded(self, sample: StoredSample, tiles: Sequence[int]) -> Encoded:
        if not tiles:
            return Encoded(sample.ids, sample.supervised)
        slots = np.asarray(tiles, np.int64) * self.encoding.visual_tokens_per_tile
        repeats = np.ones(len(sample.ids), np.int64)
        repeats[sample.ids == self.encoding.tokenizer.id_of(IMAGE_CONTEXT)] = slots
        return Encoded(np.repeat(sample.ids, repeats), np.repeat(sample.supervised, repeats), int(slots.sum()))

    def _sample(self, place: int) -> StoredSample:
        shard = int(np.searchsorted(self._ends, place, side="right"))
        number = place - (int(self._ends[shard - 1]) if shard else 0)
        path = self.folder / f"{shard_name(shard)}.arrayrecord"
        try:
            sample = StoredSample.from_bytes(self._reader(shard, path).read([number])[0])
            self._check_sample(sample, place)
            return sample
        except (RuntimeError, ValueError, IndexError) as error:
            raise MetaError(f"{path}: record {number} cannot be read ({error}); look with `monovl data verify`, copy it again.") from None

    def _check_sample(self, sample: StoredSample, place: int) -> None:
        """Raises ValueError for a record with ids that the tokenizer does not have, or one of which the index says something else."""
        known = self.encoding.tokenizer.vocab_size
        if len(sample.ids) and not 0 <= sample.ids.min() <= sample.ids.max() < known:
            wrong = sample.ids[(sample.ids < 0) | (sample.ids >= known)][0]
            raise ValueError(f"it holds the id {wrong}, the tokenizer has ids below {known}")
        context, end = (self.encoding.tokenizer.id_of(token) for token in (IMAGE_CONTEXT, IMAGE_END))
        last = int(self._picture_ends[place])
        sizes = self._sizes[last - int(self._columns[place, 2]) : last].tolist()
        if index_row(sample, context, end) != tuple(self._columns[place].tolist()) or [list(i.size) for i in sample.images] != sizes:
            raise ValueError("the index of its shard says something else of it")

    def _reader(self, shard: int, path: Path) -> Any:
        with self._lock:
            reader = self._readers.pop(shard, None)
            if reader is None:
                options = "readahead_buffer_size:0,max_parallelism:0"  # what random access asks for
                reader = self._array_record.ArrayRecordReader(str(path), options=options, file_reader_buffer_size=1 << 15)
                if not reader.ok():
                    raise RuntimeError("it does not open")
            self._readers[shard] = reader
            while len(self._readers) > _OPEN_SHARDS:
                self._readers.popitem(last=False)
            return reader

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": OrderedDict(), "_lock": None, "_array_record": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._array_record = array_record()
        self._lock = threading.Lock()


def token_ids(encoding: Encoding) -> tuple[int, int]:
    """(image-context id, image-end id)."""
    return encoding.tokenizer.id_of(IMAGE_CONTEXT), encoding.tokenizer.id_of(IMAGE_END)
