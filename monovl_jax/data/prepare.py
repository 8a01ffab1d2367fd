"""`monovl data prepare`: LLaVA-style JSONL files and pictures to the shards of `data.shards`, in parallel and resumable.

    OUT/META.json                    the data sets, ready for `monovl train --data OUT`
    OUT/NAME/...                     one data set, see data.shards
    OUT/NAME/unfinished/plan.json    while it is being made: what is made, and from what
    OUT/NAME/unfinished/shard-00000.json   a shard that is done, with its counts and digests

The lines of a JSONL file are cut into ranges of `samples_per_shard`; a range becomes a shard, whatever process makes it and when, so that
the result is the same to the byte for any number of workers. A file appears under its name when it is whole, and the manifest when all
are. `prepare_shard` needs nothing but its job, which pickles: a pool of processes calls it here, workers of Beam in `data.beam`.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from monovl_jax import jsontext
from monovl_jax.config import read_config
from monovl_jax.data.chat import TEMPLATES, template_named
from monovl_jax.data.errors import SampleError
from monovl_jax.data.images import MAX_PIXELS, image_size, load_image
from monovl_jax.data.jsonl import parse_line
from monovl_jax.data.meta import MANIFEST, META, DataSet, MetaError, file_digest, read_meta
from monovl_jax.data.pictures import Pictures, is_tar_root, open_pictures, tar_shards
from monovl_jax.data.shards import (
    COLUMNS,
    FORMAT,
    REJECTED,
    REJECTED_DIGEST,
    ShardIndex,
    StoredImage,
    StoredSample,
    array_record,
    check_shards,
    count_slots,
    file_sha256,
    index_row,
    manifest_digest,
    read_manifest,
    read_rejected,
    sampled_digest,
    shard_name,
    text_settings,
    token_ids,
)
from monovl_jax.data.sources import Encoding
from monovl_jax.data.tiling import TilingConfig
from monovl_jax.data.tokenizer import Tokenizer

UNFINISHED, PLAN, _PARTIAL = "unfinished", "plan.json", ".partial"
_WRITER_OPTIONS = "group_size:1,zstd:1"  # a record by itself can be read by random access; tokens shrink, JPEG does not grow
_COUNTED = ("tile_size", "min_tiles", "max_tiles", "use_thumbnail")
_NAME = re.compile(r"\w[\w.-]*")

Say = Callable[[str], None]
Report = dict[str, Any]


@dataclass(frozen=True)
class TextSettings:
    """What tokens and counts of a shard depend on: the tokenizer's folder, the name of the chat template, and, for the counts of the
    manifest alone, how the model cuts pictures and how many tokens a tile has. verify_images: decode every picture, not only its header."""

    tokenizer: Path
    template: str
    tiling: TilingConfig
    visual_tokens_per_tile: int
    verify_images: bool = False
    max_pixels: int = MAX_PIXELS
    trust_control_tokens: bool = False

    def encoding(self) -> Encoding:
        """Without limits of rows. Raises ValueError for a folder without a tokenizer, or one without the picture tokens."""
        tokenizer = _tokenizer(self.tokenizer)
        template = replace(template_named(self.template), trust_control_tokens=self.trust_control_tokens)
        return Encoding(tokenizer, template, self.tiling, self.visual_tokens_per_tile)


@functools.lru_cache(maxsize=4)
def _tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@dataclass(frozen=True)
class ShardJob:
    """One shard: the bytes begin .. end of a JSONL file, whose first line has number `line` (from 1), to shard `number` in `folder`."""

    annotation: Path
    root: Path
    begin: int
    end: int
    line: int
    folder: Path
    number: int
    settings: TextSettings


def prepare_shard(job: ShardJob) -> Report:
    """Writes one shard, its index and its report, and returns the report: counts and digests as JSON values.

    A pure function of the job and the files it names. Bad samples are left out and listed in the report. Raises OSError.
    """
    module = array_record()
    settings, encoding = job.settings, job.settings.encoding()
    words = Encoding(encoding.tokenizer, encoding.template, encoding.tiling, 1)  # one token a picture
    context, end = token_ids(encoding)
    pictures = _pictures(job.root, _stamp(job.root))
    shard, index, report_file = (
        job.folder / f"{shard_name(job.number)}.arrayrecord",
        job.folder / f"{shard_name(job.number)}.npz",
        job.folder / UNFINISHED / f"{shard_name(job.number)}.json",
    )
    rows: list[tuple[int, ...]] = []
    sizes: list[tuple[int, int]] = []
    rejected: list[dict[str, Any]] = []
    temporary = _temporary(shard)
    writer = module.ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
    for line, raw in _lines(job):
        sample_id = None
        try:
            record = parse_line(raw)
            sample_id = record.id
            images = [_stored_image(pictures, name, settings) for name in record.images]
            encoded = words.encode(record.turns, [1] * len(images))
        except SampleError as error:
            entry = {"file": job.annotation.name, "line": line, "reason": str(error)}
            rejected.append(entry | ({} if sample_id is None else {"id": sample_id}))
            continue
        sample = StoredSample(encoded.ids, encoded.supervised, images, line, sample_id)
        writer.write(sample.to_bytes())
        rows.append(index_row(sample, context, end))
        sizes += [image.size for image in images]
    writer.close()
    reader = module.ArrayRecordReader(str(temporary))
    if not reader.ok() or reader.num_records() != len(rows):  # the writer is silent about a disk that is full
        raise OSError(f"{shard} cannot be written whole ({len(rows)} records); free some space and run the same command again")
    reader.close()
    found = ShardIndex(np.asarray(rows, np.int64).reshape(-1, len(COLUMNS)), np.asarray(sizes, np.int32).reshape(-1, 2))
    found.save(_temporary(index))
    tiles = int(count_slots(found.sizes, found.columns[:, 2], settings.tiling).sum())
    report = {
        "records": len(rows),
        "rejected": len(rejected),
        "pictures": len(sizes),
        "tiles": tiles,
        "tokens": int(found.columns[:, 1].sum()) + settings.visual_tokens_per_tile * tiles - len(sizes),
        "bytes": temporary.stat().st_size,
        "index_bytes": _temporary(index).stat().st_size,
        "sha256": file_sha256(temporary),
        "digest": sampled_digest(temporary),
        "index_sha256": file_sha256(_temporary(index)),
    }
    for path in (shard, index):
        _settle(path)
    _write_json(report_file, {"report": report, "rejected": rejected})
    return report


def _lines(job: ShardJob) -> Iterator[tuple[int, bytes]]:
    with open(job.annotation, "rb") as stream:
        stream.seek(job.begin)
        number = job.line
        while stream.tell() < job.end:
            raw = stream.readline()
            if not raw:
                return
            if raw.strip():
                yield number, raw
            number += 1


def _stored_image(pictures: Pictures, name: str, settings: TextSettings) -> StoredImage:
    where, data = pictures.where(name), pictures.read(name)
    size = image_size(where, settings.max_pixels, data)
    if settings.verify_images:
        load_image(where, settings.max_pixels, data)
    return StoredImage(name, size, data)


def _stamp(root: Path) -> tuple[tuple[str, int, int], ...]:
    """Changes with the tar shards of a root."""
    stats = [(shard.name, shard.stat()) for shard in tar_shards(root)] if is_tar_root(root) else []
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


@functools.lru_cache(maxsize=2)
def _pictures(root: Path, stamp: tuple[tuple[str, int, int], ...]) -> Pictures:
    """Kept by a worker from shard to shard: the headers of a tar take a while to read."""
    del stamp
    return open_pictures(root)


def _temporary(path: Path) -> Path:
    """Its own for every process, so that two that make the same shard do not write into one file."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}{_PARTIAL}")


def _settle(path: Path) -> None:
    """What is in the temporary file is on disk, then has its name."""
    with open(_temporary(path), "rb") as stream:
        os.fsync(stream.fileno())
    os.replace(_temporary(path), path)


def _write_json(path: Path, value: Any) -> None:
    _temporary(path).write_text(json.dumps(value, ensure_ascii=False, indent=1, default=str) + "\n", "utf-8", "surrogatepass")
    _settle(path)


RunJobs = Callable[[Sequence[ShardJob]], Iterable[Report]]
"""Does all jobs by `prepare_shard`, somewhere and in any order, and gives the reports."""


def plan_shards(data: DataSet, folder: Path, settings: TextSettings, samples_per_shard: int) -> list[ShardJob]:
    """The jobs of a data set; the JSONL file is read once to find its lines."""
    jobs, begin, first, offset, count = [], 0, 1, 0, 0

    def cut() -> None:
        jobs.append(ShardJob(data.annotation, data.root, begin, offset, first, folder, len(jobs), settings))

    with open(data.annotation, "rb") as stream:
        for raw in stream:
            if count and count % samples_per_shard == 0:
                cut()
                begin, first = offset, count + 1
            offset += len(raw)
            count += 1
    if offset > begin:
        cut()
    return jobs


def settings_of(
    model: Path | None,
    tokenizer: Path | None = None,
    template: str | None = None,
    verify_images: bool = False,
    trust_control_tokens: bool = False,
) -> TextSettings:
    """The settings for a model's folder (a released or imported one, or a run), or for a tokenizer's folder and the name of a template.

    Raises MetaError for too little; ValueError for a model folder without config.json.
    """
    if model is None and (tokenizer is None or template is None):
        raise MetaError("the tokens depend on tokenizer and chat template: give --model DIR, or --tokenizer DIR and --template NAME")
    if template is not None and template not in TEMPLATES:
        raise MetaError(f"the template {template!r} is unknown; use one of {', '.join(TEMPLATES)}")
    tiling, per_tile = TilingConfig(), 256
    if model is not None:
        config = read_config(model)
        template, tokenizer, per_tile = template or config.template, tokenizer or model, config.vision.tokens_per_tile
        tiling = TilingConfig(config.vision.tile_size, config.min_tiles, config.max_tiles, config.use_thumbnail)
    assert tokenizer is not None and template is not None
    return TextSettings(tokenizer, template, tiling, per_tile, verify_images, trust_control_tokens=trust_control_tokens)


def find_sets(source: Path, root: Path | None = None) -> dict[str, DataSet]:
    """The data sets of a META.json, or the one of a JSONL file with its pictures in `root` (by default the file's folder).

    Raises MetaError for what cannot be prepared.
    """
    if source.suffix == ".jsonl":
        pictures = source.parent if root is None else root
        if not source.is_file():
            raise MetaError(f"{source} does not exist; correct the path")
        open_pictures(pictures)
        sets = {source.stem: DataSet(source.stem, pictures, source)}
    elif root is not None:
        raise MetaError(f"{source} is no .jsonl file, and only those take --root; a META.json names the root of each data set itself")
    else:
        sets = read_meta(source)
    for name, data in sets.items():
        if data.prepared:
            raise MetaError(f"{source}: data set {name!r} is prepared already; name its JSONL file as annotation instead")
        if not _NAME.fullmatch(name):
            raise MetaError(f"{source}: the data set {name!r} cannot be a folder's name; use letters, digits, '_', '-' and '.'")
    return sets


def prepare(
    sets: Mapping[str, DataSet],
    out: Path,
    settings: TextSettings,
    *,
    workers: int = 1,
    samples_per_shard: int = 2048,
    say: Say = print,
    run: RunJobs | None = None,
) -> dict[str, dict[str, Any]]:
    """Prepares data sets into the folder `out`; returns the manifests by name. The same call again goes on after a stop.

    workers: processes; 1 works in this one. run: what does the jobs instead of them (`data.beam`). Raises MetaError for a folder that holds
    something else, or an annotation that changes meanwhile; ValueError for a tokenizer that will not do; OSError.
    """
    if workers < 1 or samples_per_shard < 1:
        raise MetaError(f"{workers} workers and {samples_per_shard} samples a shard cannot be; give at least 1 of each")
    array_record()
    token_ids(settings.encoding())
    _check_out(out, sets)
    every = run or functools.partial(_run, workers=workers)
    manifests = {name: _prepare_set(data, out / name, settings, samples_per_shard, every, say) for name, data in sets.items()}
    _write_json(out / META, {name: _entry(data) for name, data in sets.items()})
    return manifests


def _check_out(out: Path, sets: Mapping[str, DataSet]) -> None:
    if out.exists() and not out.is_dir():
        raise MetaError(f"{out} is a file; give a folder")
    names = {path.name for path in out.iterdir() if not path.name.endswith(_PARTIAL)} if out.is_dir() else set()
    if others := sorted(names - {META, *sets}):
        raise MetaError(f"{out} holds {others[0]!r}, which is not of this data; give a new folder")
    if any(data.annotation.resolve().is_relative_to(out.resolve()) for data in sets.values()):
        raise MetaError(f"{out} holds the annotations themselves; give a new folder")


def _entry(data: DataSet) -> dict[str, Any]:
    """The entry of META.json for a prepared data set, its settings kept."""
    kept = {"data_augment": data.data_augment, "repeat_time": data.repeat_time, "max_dynamic_patch": data.max_dynamic_patch}
    return {"prepared": data.name} | {key: value for key, value in {**kept, "length": data.length}.items() if value is not None}


def _identity(data: DataSet, settings: TextSettings, samples_per_shard: int) -> dict[str, Any]:
    """What the files of a prepared folder depend on, as JSON values."""
    counted = {key: value for key, value in asdict(settings.tiling).items() if key in _COUNTED}
    return {
        "format": FORMAT,
        "annotation": data.annotation.name,
        "annotation_digest": file_digest(data.annotation),
        "samples_per_shard": samples_per_shard,
        "settings": text_settings(settings.encoding()),
        "verify_images": settings.verify_images,
        "max_pixels": settings.max_pixels,
        "counted_with": counted | {"visual_tokens_per_tile": settings.visual_tokens_per_tile},
    }


def _prepare_set(data: DataSet, folder: Path, settings: TextSettings, samples_per_shard: int, run: RunJobs, say: Say) -> dict[str, Any]:
    identity = _identity(data, settings, samples_per_shard)
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        _same(folder, manifest, identity)
        check_shards(folder, manifest)
        say(f"{data.name}: prepared already")
        _remove_unfinished(folder)
        return manifest
    plan = folder / UNFINISHED / PLAN
    if plan.is_file():
        _same(folder, _read_plan(plan), identity)
    elif folder.is_dir() and any(path.name != UNFINISHED for path in folder.iterdir()):
        raise MetaError(f"{folder} holds files that `monovl data prepare` did not begin; give a new folder")
    else:
        plan.parent.mkdir(parents=True, exist_ok=True)
        _write_json(plan, identity)
    import fcntl  # not on Windows, where array_record is not either

    with open(plan, "rb") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise MetaError(f"another process is preparing {folder}; wait for it, or give another folder") from None
        jobs = plan_shards(data, folder, settings, samples_per_shard)
        left = [job for job in jobs if not is_done(job)]
        say(f"{data.name}: {len(jobs)} shards, {len(jobs) - len(left)} there before")
        for done, report in enumerate(run(left), len(jobs) - len(left) + 1):
            say(f"{data.name}: {done} of {len(jobs)} shards; the last has {report['records']} samples, {report['rejected']} rejected")
        if file_digest(data.annotation) != identity["annotation_digest"]:
            raise MetaError(f"{data.annotation} changed while it was prepared; give a new folder and run again")
        manifest = _finish(folder, identity, jobs)
    say(f"{data.name}: {manifest['records']} samples, {manifest['pictures']} pictures, {manifest['bytes']:,} bytes")
    if manifest["rejected"]:
        say(f"{data.name}: {manifest['rejected']} samples rejected, listed with the reasons in {folder / REJECTED}")
    return manifest


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        plan = jsontext.read(path)
        if isinstance(plan, dict):
            return plan
        problem = f"a JSON {type(plan).__name__}"
    except (OSError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise MetaError(f"{path} is damaged ({problem}); remove the folder {path.parent.parent} and run again")


def _same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if different := [key for key in now if before.get(key) != now[key]]:
        raise MetaError(f"{folder} was begun with another {different[0]}; give a new folder, or the same settings and files as then")


def is_done(job: ShardJob) -> bool:
    """Whether the report of a shard is there and its files are as long as it says."""
    try:
        report = read_report(job)["report"]
        files = {".arrayrecord": report["bytes"], ".npz": report["index_bytes"]}
        return all((job.folder / f"{shard_name(job.number)}{suffix}").stat().st_size == size for suffix, size in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_report(job: ShardJob) -> dict[str, Any]:
    path = job.folder / UNFINISHED / f"{shard_name(job.number)}.json"
    return jsontext.loads(jsontext.read_bytes(path).decode("utf-8", "surrogatepass"))


def _run(jobs: Sequence[ShardJob], workers: int) -> Iterator[Report]:
    """The reports as shards get done, in any order."""
    if workers == 1 or len(jobs) < 2:
        yield from map(prepare_shard, jobs)
        return
    # spawn: tokenizers has threads, which a fork would lose
    with ProcessPoolExecutor(min(workers, len(jobs)), multiprocessing.get_context("spawn")) as pool:
        waiting = iter(jobs)
        running: set[Future[Report]] = {pool.submit(prepare_shard, job) for job in islice(waiting, 2 * workers)}
        try:
            while running:
                finished, running = wait(running, return_when="FIRST_COMPLETED")
                for future in finished:
                    yield future.result()
                    running |= {pool.submit(prepare_shard, job) for job in islice(waiting, 1)}
        except BrokenProcessPool:
            raise OSError("a worker process died, out of memory perhaps; run the same command again, with fewer --workers") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _finish(folder: Path, identity: dict[str, Any], jobs: Sequence[ShardJob]) -> dict[str, Any]:
    shards = []
    rejected_file = folder / REJECTED
    with open(_temporary(rejected_file), "wb") as stream:
        for job in jobs:
            found = read_report(job)
            shards.append(found["report"])
            for entry in found["rejected"]:
                stream.write(json.dumps(entry, ensure_ascii=True).encode() + b"\n")
    _settle(rejected_file)
    totals = {key: sum(shard[key] for shard in shards) for key in ("records", "rejected", "pictures", "tiles", "tokens", "bytes")}
    manifest = identity | totals | {"shards": shards, REJECTED_DIGEST: file_sha256(rejected_file)}
    manifest["digest"] = manifest_digest(manifest)
    _write_json(folder / MANIFEST, manifest)
    _remove_unfinished(folder)
    return manifest


def _remove_unfinished(folder: Path) -> None:
    """What was only needed to go on after a stop."""
    unfinished = folder / UNFINISHED
    if unfinished.is_dir():
        for path in unfinished.iterdir():
            path.unlink()
        unfinished.rmdir()
    for path in folder.glob(f".*{_PARTIAL}"):
        path.unlink()


def verify(out: Path, say: Say = print) -> None:
    """Compares every byte of a prepared folder (of `prepare`, or of one data set) with its manifests. Raises MetaError."""
    folders = [out] if (out / MANIFEST).is_file() else [data.root for data in read_meta(out).values() if data.prepared]
    if not folders:
        raise MetaError(f"{out} lists no prepared data set; give a folder that `monovl data prepare` made")
    for folder in folders:
        manifest = read_manifest(folder)
        check_shards(folder, manifest, full=True)
        read_rejected(folder, manifest)
        say(f"{folder}: {len(manifest['shards'])} shards, {manifest['records']} samples, {manifest['rejected']} rejected: whole")
