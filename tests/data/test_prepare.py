"""Prepared shards give what the JSONL file gives, whoever made them and however often that was interrupted; damage is named."""

import contextlib
import io
import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from monovl_jax.config import config_to_json, tiny
from monovl_jax.data import commands
from monovl_jax.data import prepare as module
from monovl_jax.data import shards as shards_module
from monovl_jax.data.images import MAX_PIXELS
from monovl_jax.data.jsonl import JsonlSource
from monovl_jax.data.meta import MetaError, read_meta
from monovl_jax.data.pipeline import Part, Pipeline
from monovl_jax.data.prepare import ShardJob, TextSettings, find_sets, prepare, prepare_shard, settings_of, verify
from monovl_jax.data.shards import PreparedSource, StoredImage, StoredSample, manifest_digest
from monovl_jax.data.sources import BadSamples, Encoding, First, Source
from monovl_jax.recipes.launch import OwnData
from monovl_jax.training.stages import Stage
from tests.data.helpers import line, save_picture, tiny_encoding, tiny_spec, tiny_tokenizer

LINES = [
    line("a.png", id="first"),
    line("sub/b.jpg", question="No placeholder: it goes first."),
    line("gone.png", id="gone"),
    b"\n",
    line(["a.png", "tall.png"], question="<image>x<image>Two pictures"),
    line(None, question="text alone", answer="long " * 12),
    b'{"conversations": "\xff"}\n',
    line("cut.jpg", id=7),
    line("a.png", question="y" * 60 + "<image>"),
    line(["wide.png", "a.png", "sub/b.jpg"], question="<image><image><image>three", answer="z" * 20),
    line("../secret.png"),
    line("wide.png", question="of many tiles <image> é", id={"a": [1]}),
    line("huge.png"),
    line("link.png"),
    b'{"conversations": []}\n',
    line("a.png", question="a false </img> after <image> and one at the end </img>"),
    line(None, question="no end of line").rstrip(),
]
REJECTED = {3: "does not exist", 7: "not UTF-8", 11: "contains '..'", 13: "limit", 14: "symbolic link", 15: "is empty"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    pictures = home / "pictures"
    for name, size in {"a.png": (64, 32), "sub/b.jpg": (40, 40), "tall.png": (16, 90), "wide.png": (70, 33)}.items():
        save_picture(pictures / name, size)
    save_picture(pictures / "cut.jpg", (64, 64), cut=0.6)
    Image.new("1", (20_000, 20_000)).save(pictures / "huge.png")
    save_picture(home / "secret.png")
    (pictures / "link.png").symlink_to(home / "secret.png")
    (home / "street.jsonl").write_bytes(b"".join(LINES))
    (home / "words.jsonl").write_bytes(b"".join(line(None, question=f"say {i}", answer=str(i)) for i in range(9)))
    meta = {
        "street": {"root": "pictures", "annotation": "street.jsonl", "data_augment": True, "repeat_time": 2, "max_dynamic_patch": 3},
        "words": {"annotation": "words.jsonl", "repeat_time": 0.5, "length": 10},
    }
    (home / "META.json").write_text(json.dumps(meta))
    tiny_tokenizer().save(home / "model")
    (home / "model" / "config.json").write_text(config_to_json(tiny()))
    make(home, home / "prepared")
    return home


def text_settings(home: Path, **options: Any) -> TextSettings:
    return TextSettings(home / "model", "compact", tiny_encoding().tiling, 4, **options)


def make(home: Path, out: Path, source: str = "META.json", root: Path | None = None, **options: Any) -> dict[str, dict[str, Any]]:
    return prepare(find_sets(home / source, root), out, text_settings(home), samples_per_shard=4, say=lambda text: None, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def copied(home: Path, tmp_path: Path) -> Path:
    """A prepared data set to damage."""
    return shutil.copytree(home / "prepared" / "street", tmp_path / "street")


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name]) for name in a)


# ---- the same samples ----------------------------------------------------------------------------------------------------------------


class Listed(BadSamples):
    """Keeps the reasons."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[int, str, object]] = []

    def add(self, file: object, line: int, reason: str, sample_id: object = None) -> None:
        self.entries.append((line, reason, sample_id))
        super().add(file, line, reason, sample_id)


def test_every_row_limit_leaves_the_same_samples_with_the_same_reasons(home: Path) -> None:
    seen: set[int] = set()
    for max_length in (None, 14, 20, 40, 55, 80, 130):
        for max_tiles, most in ((None, 4), (2, 2), (5, 4), (7, 4)):
            base = tiny_encoding(max_length, max_tiles=most, use_thumbnail=most == 4)
            for visual in (1, 4):
                encoding = Encoding(base.tokenizer, base.template, base.tiling, visual, max_length, max_tiles)
                direct, bad = JsonlSource(home / "street.jsonl", encoding, image_root=home / "pictures", bad=(a := Listed())), Listed()
                prepared = PreparedSource(home / "prepared" / "street", encoding, bad=bad)
                everything = np.arange(len(direct))
                assert len(prepared) == len(direct) and a.entries == bad.entries and prepared.rejected == direct.rejected
                assert np.array_equal(prepared.lengths(everything), direct.lengths(everything))
                seen.add(len(direct))
                for i in range(len(direct)) if visual == 4 and max_tiles != 2 else []:
                    one, two = direct[i], prepared[i]
                    assert np.array_equal(one.ids, two.ids) and np.array_equal(one.loss_weights, two.loss_weights)
                    assert np.array_equal(one.tiles, two.tiles) and one.failed == two.failed and prepared.length(i) == direct.length(i)
    assert len(seen) > 5, "the limits must tell samples apart"


def parts(home: Path, meta: Path) -> list[Part]:
    say: Callable[[str], None] = lambda text: None  # noqa: E731
    data = OwnData(tiny(), tiny_tokenizer(), read_meta(meta), BadSamples(), home / "index", 3, False, False, say)
    stage = Stage("S2", (".*",), 1, 2, 1e-3, 128, 6, {"street": 2.0, "*": 1.0})
    return data(stage, stage.mixture, 128, 6)


def test_batches_are_those_of_the_jsonl_files(home: Path) -> None:
    """Through META.json: mixture, repeat_time, max_dynamic_patch, data_augment, shuffle, packing; several epochs."""
    v, side = tiny().vision.tokens_per_tile, tiny().vision.tile_size
    encoding = Encoding(tiny_tokenizer(), tiny_encoding().template, tiny_encoding(tile_size=side).tiling, v)
    spec = tiny_spec(encoding, tokens=128, tiles=6)
    make_parts = parts(home, home / "META.json"), parts(home, home / "prepared")
    assert [(type(part.source), part.weight, part.name) for part in make_parts[0]] == [
        (First, part.weight, part.name) for part in make_parts[1]
    ]
    for seed in (0, 1):
        a, b = (Pipeline(p, spec, 2, seed, window=13, threads=0) for p in make_parts)
        batches = [(a.batch(number), b.batch(number)) for number in range(8)]
        assert all(equal(one, two) for one, two in batches)
    assert sum((one["token_types"] == 1).any() for one, _ in batches) >= 4


def test_the_order_depends_on_the_seed_alone(home: Path) -> None:
    """Not on threads, worker processes, hosts, or how the shards were cut."""
    encoding = tiny_encoding(96)
    spec = tiny_spec(encoding, tokens=96, tiles=6)

    def source(folder: str) -> Source:
        return PreparedSource(home / folder / "street", encoding)

    prepare(find_sets(home / "META.json"), home / "other", text_settings(home), samples_per_shard=3, say=lambda text: None)
    whole = Pipeline([source("prepared")], spec, 2, 5, window=10, threads=0)
    expected = [whole.batch(number) for number in range(6)]
    for options in ({"threads": 3}, {"workers": 2, "prefetch": 2}):
        with Pipeline([source("other")], spec, 2, 5, window=10, **options).batches(1) as batches:
            assert all(equal(batch, expected[1 + i]) for i, batch in enumerate(islice(batches, 5)))
    hosts = [Pipeline([source("prepared")], spec, 2, 5, window=10, threads=0, process_index=i, process_count=2) for i in range(2)]
    for number in range(4):
        halves = [host.batch(number) for host in hosts]
        assert equal({key: np.concatenate([half[key] for half in halves]) for key in halves[0]}, expected[number])
    assert not equal(Pipeline([source("prepared")], spec, 2, 6, window=10, threads=0).batch(0), expected[0])


def test_a_picture_that_does_not_decode_keeps_its_slots(home: Path, tmp_path: Path) -> None:
    found = Listed()
    source = PreparedSource(home / "prepared" / "street", tiny_encoding(), bad=found)
    before = len(found.entries)
    failed = [i for i in range(len(source)) if source[i].failed]
    assert len(failed) == 1 and found.entries[before][0] == 8 and "truncated" in found.entries[before][1]
    assert (len(source[failed[0]].ids), len(source[failed[0]].tiles)) == source.length(failed[0])
    with pytest.raises(ValueError, match=r"street\.jsonl:3: "):
        PreparedSource(home / "prepared" / "street", tiny_encoding(), strict=True)
    assert len(PreparedSource(home / "prepared" / "street", tiny_encoding(), verify_images=True)) == len(source) - 1
    checked = prepare(
        find_sets(home / "street.jsonl", home / "pictures"),
        tmp_path / "out",
        text_settings(home, verify_images=True),
        say=lambda text: None,
    )
    assert checked["street"]["rejected"] == len(REJECTED) + 1


# ---- making it -----------------------------------------------------------------------------------------------------------------------


def test_what_is_written(home: Path) -> None:
    folder = home / "prepared" / "street"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["records"] == 10 and manifest["rejected"] == len(REJECTED) and len(manifest["shards"]) == 5
    assert manifest["pictures"] == 11 and manifest["annotation"] == "street.jsonl"
    unlimited = JsonlSource(home / "street.jsonl", tiny_encoding(), image_root=home / "pictures")
    assert [manifest["tokens"], manifest["tiles"]] == unlimited.lengths(np.arange(len(unlimited))).sum(0).tolist()
    entries = [json.loads(text) for text in (folder / "rejected.jsonl").read_text().splitlines()]
    assert {entry["line"] for entry in entries} == set(REJECTED) and all(REJECTED[entry["line"]] in entry["reason"] for entry in entries)
    assert entries[0]["id"] == "gone" and {entry["file"] for entry in entries} == {"street.jsonl"}
    names = {f"shard-{number:05d}.{suffix}" for number in range(5) for suffix in ("arrayrecord", "npz")}
    assert {path.name for path in folder.iterdir()} == names | {"manifest.json", "rejected.jsonl"}
    assert json.loads((home / "prepared" / "META.json").read_text())["street"] == {
        "prepared": "street",
        "data_augment": True,
        "repeat_time": 2,
        "max_dynamic_patch": 3,
    }
    assert read_meta(home / "prepared")["words"].length == 10


def test_worker_processes_write_the_same_bytes(home: Path, tmp_path: Path) -> None:
    make(home, tmp_path / "two", workers=2)
    assert files(tmp_path / "two") == files(home / "prepared")


def test_an_interrupted_run_goes_on(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made: list[int] = []

    def stopping(jobs: Sequence[ShardJob]) -> Iterator[dict[str, Any]]:
        for job in jobs:
            if len(made) == 2:
                (job.folder / f".shard-00002.arrayrecord.elsewhere-1{module._PARTIAL}").write_bytes(b"half")
                (job.folder / "shard-00003.arrayrecord").write_bytes(b"a shard whose report was lost")
                raise KeyboardInterrupt
            made.append(job.number)
            yield prepare_shard(job)

    with pytest.raises(KeyboardInterrupt):
        make(home, out, run=stopping)
    with pytest.raises(MetaError, match=r"manifest\.json does not exist; run `monovl data prepare` to its end"):
        PreparedSource(out / "street", tiny_encoding())
    assert not (out / "META.json").exists()
    kept = (out / "street" / "shard-00001.arrayrecord").stat().st_mtime_ns
    with pytest.raises(MetaError, match="begun with another samples_per_shard"):
        prepare(find_sets(home / "META.json"), out, text_settings(home), samples_per_shard=5, say=lambda text: None)
    make(home, out)
    assert (out / "street" / "shard-00001.arrayrecord").stat().st_mtime_ns == kept
    assert files(out) == files(home / "prepared")
    told: list[str] = []
    prepare(find_sets(home / "META.json"), out, text_settings(home), samples_per_shard=4, say=told.append)
    assert told == ["street: prepared already", "words: prepared already"]


def test_a_second_process_is_refused(home: Path, tmp_path: Path) -> None:
    problems: list[str] = []

    def meanwhile(jobs: Sequence[ShardJob]) -> Iterator[dict[str, Any]]:
        def other() -> None:
            with pytest.raises(MetaError, match="another process is preparing") as caught:
                make(home, tmp_path / "out")
            problems.append(str(caught.value))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        yield from map(prepare_shard, jobs)

    make(home, tmp_path / "out", run=meanwhile)
    assert len(problems) == 2 and files(tmp_path / "out") == files(home / "prepared")


def test_places_that_will_not_do(home: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").touch()
    with pytest.raises(MetaError, match=r"holds 'note\.txt', which is not of this data; give a new folder"):
        make(home, tmp_path)
    with pytest.raises(MetaError, match="is a file; give a folder"):
        make(home, tmp_path / "note.txt")
    (tmp_path / "out" / "street").mkdir(parents=True)
    (tmp_path / "out" / "street" / "mine.bin").touch()
    with pytest.raises(MetaError, match="did not begin; give a new folder"):
        make(home, tmp_path / "out")
    with pytest.raises(MetaError, match="'street' is prepared already"):
        find_sets(home / "prepared")
    with pytest.raises(MetaError, match="only those take --root"):
        find_sets(home / "META.json", home)
    with pytest.raises(MetaError, match=r"none\.jsonl does not exist"):
        find_sets(home / "none.jsonl")
    with pytest.raises(MetaError, match="0 workers"):
        make(home, tmp_path / "new", workers=0)
    (tmp_path / "META.json").write_text(json.dumps({"../x": {"annotation": str(home / "words.jsonl")}}))
    with pytest.raises(MetaError, match=r"'\.\./x' cannot be a folder's name"):
        find_sets(tmp_path / "META.json")
    (tmp_path / "META.json").write_text(json.dumps({"a": {"annotation": "gs://bucket/a.jsonl"}}))
    with pytest.raises(MetaError, match=r"annotation is 'gs://bucket/a\.jsonl'; data is read from files, so mount the bucket or copy it"):
        read_meta(tmp_path / "META.json")
    (tmp_path / "META.json").write_text(json.dumps({"a": {"prepared": "a", "root": "b"}}))
    with pytest.raises(MetaError, match="prepared beside annotation or root"):
        read_meta(tmp_path / "META.json")
    with pytest.raises(MetaError, match="give --model DIR, or --tokenizer DIR and --template NAME"):
        settings_of(None, home / "model")
    with pytest.raises(MetaError, match="template 'x' is unknown; use one of internlm2-chat"):
        settings_of(home / "model", None, "x")


def test_an_annotation_that_changes_meanwhile(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(line(None, question="a") * 9)

    def appending(jobs: Sequence[ShardJob]) -> Iterator[dict[str, Any]]:
        yield from map(prepare_shard, jobs)
        path.write_bytes(line(None, question="b") * 9)

    with pytest.raises(MetaError, match=r"data\.jsonl changed while it was prepared"):
        prepare(find_sets(path), tmp_path / "out", text_settings(home), run=appending, say=lambda text: None)
    assert not (tmp_path / "out" / "data" / "manifest.json").exists()


def test_a_full_disk_is_an_error(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer of ArrayRecord says nothing when bytes are lost; the file is read back before it counts."""
    real = shards_module.array_record()

    class Losing:
        ArrayRecordReader = real.ArrayRecordReader

        class ArrayRecordWriter:
            def __init__(self, path: str, options: str) -> None:
                Path(path).write_bytes(b"")

            def write(self, record: bytes) -> None: ...

            def close(self) -> None: ...

    monkeypatch.setattr(module, "array_record", lambda: Losing)
    with pytest.raises(OSError, match=r"shard-00000\.arrayrecord cannot be written whole \(2 records\); free some space"):
        make(home, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("shard-*"))


def test_beam_writes_the_same_bytes(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("apache_beam", reason="needs the extra beam")
    from monovl_jax.data.beam import beam_runner

    run = beam_runner("--runner=DirectRunner")
    make(home, tmp_path / "beam", run=run)
    assert files(tmp_path / "beam") == files(home / "prepared")


def test_without_beam(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    code, out, err = command(commands.data_prepare, home / "META.json", tmp_path / "out", model=home / "model", beam="")
    assert code == 2 and not out and len(err.splitlines()) == 1 and "pip install 'monovl_jax[beam]'" in err
    assert not (tmp_path / "out").exists()


# ---- damage --------------------------------------------------------------------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None], sign: bool) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    if sign:
        manifest["digest"] = manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x55
    path.write_bytes(bytes(data))


def bomb(folder: Path) -> None:
    """An index that would unpack to gigabytes, and a manifest that vouches for it."""
    np.savez_compressed(folder / "shard-00000.npz", columns=np.zeros((1 << 20, 6), np.int64), sizes=np.ones((1, 2), np.int32))
    path = folder / "shard-00000.npz"

    def change(manifest: dict[str, Any]) -> None:
        manifest["shards"][0] |= {"index_bytes": path.stat().st_size, "index_sha256": module.file_sha256(path)}

    rewrite(folder, change, sign=True)


def rejected_by_a_device(folder: Path) -> None:
    (folder / "rejected.jsonl").unlink()
    (folder / "rejected.jsonl").symlink_to("/dev/zero")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "shard-00001.arrayrecord is missing": lambda folder: (folder / "shard-00001.arrayrecord").unlink(),
    "shard-00002.npz is missing": lambda folder: (folder / "shard-00002.npz").unlink(),
    "shard-00000.arrayrecord has 100 bytes, the manifest says": lambda folder: (folder / "shard-00000.arrayrecord").write_bytes(b"x" * 100),
    "shard-00003.arrayrecord was changed": lambda folder: flip(folder / "shard-00003.arrayrecord", -5),
    "shard-00003.npz was changed": lambda folder: flip(folder / "shard-00003.npz", 100),
    "'shard-00005.arrayrecord', which the manifest does not list": lambda folder: shutil.copy(
        folder / "shard-00000.arrayrecord", folder / "shard-00005.arrayrecord"
    ),
    "manifest.json does not exist": lambda folder: (folder / "manifest.json").unlink(),
    "manifest.json was changed": lambda folder: rewrite(folder, lambda m: m.update(records=3), sign=False),
    "no manifest of prepared data (JsonError: Expecting": lambda folder: (folder / "manifest.json").write_text('{"format": 1,'),
    "no manifest of prepared data (TypeError": lambda folder: (folder / "manifest.json").write_text("[]"),
    "no manifest of prepared data (JsonError: lists and objects": lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
    "has format 99, this version": lambda folder: rewrite(folder, lambda m: m.update(format=99), sign=True),
    "(shard 1 lacks a count or a digest)": lambda folder: rewrite(folder, lambda m: m["shards"][1].pop("bytes"), sign=True),
    "(settings or annotation is absent)": lambda folder: rewrite(folder, lambda m: m.update(settings=None), sign=True),
    "does not list the 7 records": lambda folder: rewrite(folder, lambda m: m["shards"][0].update(records=7), sign=True),
    "rejected.jsonl lists 1 samples, the manifest says 6": lambda folder: (folder / "rejected.jsonl").write_text('{"line":1,"reason":"x"}'),
    "rejected.jsonl cannot be read": lambda folder: (folder / "rejected.jsonl").write_text("no"),
    "rejected.jsonl cannot be read (FileNotFoundError": lambda folder: (folder / "rejected.jsonl").unlink(),
    "rejected.jsonl is no regular file": rejected_by_a_device,
    "rejected.jsonl cannot be read (TypeError": lambda folder: (folder / "rejected.jsonl").write_text("null\n"),
    "rejected.jsonl was changed": lambda folder: (folder / "rejected.jsonl").write_text(
        (folder / "rejected.jsonl").read_text().replace("does", "did", 1)
    ),
    "no index of a shard (ValueError: it is compressed)": bomb,
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_named_before_training(copied: Path, message: str) -> None:
    DAMAGE[message](copied)
    with pytest.raises(MetaError) as caught:
        PreparedSource(copied, tiny_encoding())
    assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1


INDEX_DIFFERS = "the index of its shard says something else of it"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sample: replace(sample, ids=np.full_like(sample.ids, 1 << 30)), "it holds the id 1073741824, the tokenizer has ids below"),
        (lambda sample: replace(sample, ids=-sample.ids), "it holds the id -"),
        (
            lambda sample: replace(sample, ids=sample.ids[1:], supervised=sample.supervised[1:]),
            INDEX_DIFFERS,
        ),
        (lambda sample: replace(sample, line=sample.line + 1), INDEX_DIFFERS),
        (
            lambda sample: replace(sample, images=[replace(i, size=(1, 1)) for i in sample.images]),
            INDEX_DIFFERS,
        ),
    ],
    ids=["an id too large", "negative ids", "a shorter sample", "another line", "another size"],
)
def test_forged_records_are_named(copied: Path, change: Callable[[StoredSample], StoredSample], message: str) -> None:
    """All digests are those of the forged shard: what a record holds is compared with the tokenizer and with the index."""
    records, path = shards_module.array_record(), copied / "shard-00000.arrayrecord"
    reader = records.ArrayRecordReader(str(path))
    samples = [StoredSample.from_bytes(record) for record in reader.read_all()]
    reader.close()
    assert samples[0].images
    writer = records.ArrayRecordWriter(str(path), "group_size:1")
    for sample in samples:
        writer.write(change(sample).to_bytes())
    writer.close()
    told = {"bytes": path.stat().st_size, "sha256": module.file_sha256(path), "digest": shards_module.sampled_digest(path)}
    rewrite(copied, lambda m: m["shards"][0].update(told), sign=True)
    with pytest.raises(MetaError, match=f"shard-00000.arrayrecord: record 0 cannot be read .{message}"):
        PreparedSource(copied, tiny_encoding())[0]


def test_verify_reads_the_rejected_samples(copied: Path) -> None:
    (copied / "rejected.jsonl").unlink()
    with pytest.raises(MetaError, match=r"rejected\.jsonl cannot be read"):
        verify(copied, lambda text: None)


def test_folders_of_the_first_version_are_read(copied: Path) -> None:
    """Their manifest has no digest of the rejected samples."""
    rewrite(copied, lambda m: m.pop("rejected_sha256"), sign=True)
    verify(copied, lambda text: None)
    assert len(PreparedSource(copied, tiny_encoding()))


def test_control_tokens_of_prepared_texts_are_those_of_the_run(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoding = tiny_encoding()
    trusting = replace(encoding, template=replace(encoding.template, trust_control_tokens=True))
    with pytest.raises(MetaError, match="was prepared without --trust-control-tokens; train without it, or prepare again"):
        PreparedSource(copied, trusting)
    rewrite(copied, lambda m: m["settings"]["template"].pop("trust_control_tokens"), sign=True)  # as version 0.1.0 wrote it
    for either in (encoding, trusting):
        assert len(PreparedSource(copied, either))
    assert caplog.text.count("is of version 0.1.0: control tokens in its texts are control tokens") == 1


def test_another_tokenizer_or_template_is_refused(home: Path) -> None:
    encoding = tiny_encoding()
    with pytest.raises(MetaError, match="prepared with another chat template"):
        PreparedSource(home / "prepared" / "street", replace(encoding, template=replace(encoding.template, separator="<|end|>!")))
    other = tiny_tokenizer()
    other.prefix_ids = [1]
    with pytest.raises(MetaError, match="prepared with another tokenizer"):
        PreparedSource(home / "prepared" / "street", replace(encoding, tokenizer=other))


def test_every_byte_is_compared_by_verify(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard too large to be read at the start is compared in a few blocks; the rest is what `verify` is for."""
    out = tmp_path / "out"
    monkeypatch.setattr(module, "sampled_digest", digest := lambda path: "the same")
    monkeypatch.setattr("monovl_jax.data.shards.sampled_digest", digest)
    make(home, out)
    told: list[str] = []
    verify(out, told.append)
    assert told[0].endswith("5 shards, 10 samples, 6 rejected: whole") and len(told) == 2
    shard = out / "street" / "shard-00000.arrayrecord"
    flip(shard, shard.stat().st_size // 2)
    with pytest.raises(MetaError, match=r"shard-00000\.arrayrecord was changed"):
        verify(out, told.append)
    source = PreparedSource(out / "street", tiny_encoding())
    with pytest.raises(MetaError, match=r"shard-00000\.arrayrecord: record \d cannot be read"):
        for i in range(3):
            source[i]
    with pytest.raises(MetaError, match="lists no prepared data set"):
        verify(home)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 300), st.integers(0, 255))
def test_records_of_any_bytes(junk: bytes, at: int, value: int) -> None:
    sample = StoredSample(np.arange(11, dtype=np.int32), np.arange(11) % 3 == 0, [StoredImage("ü.png", (3, 4), b"abc")], 5, "id")
    record = sample.to_bytes()
    again = StoredSample.from_bytes(record)
    assert again.ids.tolist() == sample.ids.tolist() and again.supervised.tolist() == sample.supervised.tolist()
    assert (list(again.images), again.line, again.id) == (sample.images, 5, "id")
    changed = bytearray(record)
    changed[at % len(record)] = value
    for hostile in (junk, b"MVL1" + junk, bytes(changed), record + junk, record[: at % len(record)]):
        with contextlib.suppress(ValueError):
            StoredSample.from_bytes(hostile)


def test_without_array_record(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "array_record.python", None)
    for attempt in (lambda: PreparedSource(home / "prepared" / "street", tiny_encoding()), lambda: make(home, tmp_path / "out")):
        with pytest.raises(
            MetaError, match=r"needs the package array_record, which cannot be loaded here .* or train from the JSONL files"
        ):
            attempt()
    assert not (tmp_path / "out").exists()


# ---- the command ---------------------------------------------------------------------------------------------------------------------


def command(function: Callable[..., int], *arguments: Any, **options: Any) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = function(*arguments, **options)
    return code, out.getvalue(), err.getvalue()


def test_the_command_takes_a_jsonl_file_and_a_model(home: Path, tmp_path: Path) -> None:
    options = dict(model=home / "model", template="compact", root=home / "pictures", workers=1)
    code, out, err = command(commands.data_prepare, home / "street.jsonl", tmp_path / "out", **options)
    assert (code, out.strip()) == (0, str(tmp_path / "out")) and "6 samples rejected, listed with the reasons in" in err
    manifest = json.loads((tmp_path / "out" / "street" / "manifest.json").read_text())
    assert manifest["counted_with"]["tile_size"] == tiny().vision.tile_size and manifest["max_pixels"] == MAX_PIXELS
    assert command(commands.data_verify, tmp_path / "out")[:2] == (
        0,
        f"{tmp_path / 'out' / 'street'}: 1 shards, 10 samples, 6 rejected: whole\n",
    )
    flip(tmp_path / "out" / "street" / "shard-00000.npz", 50)
    code, out, err = command(commands.data_verify, tmp_path / "out")
    assert code == 1 and err.startswith("monovl data verify: ") and "was changed" in err
    code, out, err = command(commands.data_prepare, home / "street.jsonl", tmp_path / "new", model=home)
    assert code == 2 and err.startswith("monovl data prepare: ") and not (tmp_path / "new").exists()
