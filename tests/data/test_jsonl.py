import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from monovl_jax.data.errors import SampleError
from monovl_jax.data.jsonl import JsonlSource, parse_line
from monovl_jax.data.sources import BadSamples, Source
from tests.data.helpers import line, save_picture, tiny_encoding

GOOD = [line("a.png"), line("sub/b.jpg", question="what?"), line(None, question="hi"), line(["a.png", "a.png"], question="<image><image>?")]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    save_picture(tmp_path / "a.png")
    save_picture(tmp_path / "sub" / "b.jpg", (16, 16))
    save_picture(tmp_path / "cut.jpg", (32, 32), cut=0.6)
    save_picture(tmp_path / "dot.png", (1, 1))
    (tmp_path / "empty.png").touch()
    return tmp_path


def write(root: Path, lines: list[bytes]) -> Path:
    path = root / "data.jsonl"
    path.write_bytes(b"".join(lines))
    return path


def bad_lines(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def test_good_samples(root: Path) -> None:
    source = JsonlSource(write(root, [b"\xef\xbb\xbf" + GOOD[0], b"\n", *GOOD[1:], line("dot.png").rstrip()]), tiny_encoding())
    assert isinstance(source, Source) and len(source) == 5 and source.bad.count == 0
    for i in range(5):
        example, (tokens, tiles) = source[i], source.length(i)
        assert (len(example.ids), len(example.tiles)) == (tokens, tiles) and not example.failed
        assert example.ids.dtype == np.int32 and example.tiles.dtype == np.uint8
        assert (example.ids == 6).sum() == 4 * tiles and example.loss_weights.sum() > 0
    assert source.lengths(np.arange(5))[:, 1].tolist() == [2, 1, 0, 4, 1]
    assert source.record(1).images == ["sub/b.jpg"]
    again = pickle.loads(pickle.dumps(source))
    assert again[1].ids.tolist() == source[1].ids.tolist()


BAD = {
    "does not exist": line("no.png"),
    "is empty (0 bytes)": line("empty.png"),
    "'image' must be": line(3),
    "empty or not text": line([""]),
    "1 <image> for 2": line(["a.png", "a.png"]),
    "2 <image> for 1": line("a.png", question="<image><image>"),
    "1 <image> for 0": line(None),
    "conversation is empty": b'{"conversations": []}\n',
    "unknown role 'robot'": b'{"conversations": [{"from": "robot", "value": "x"}]}\n',
    "not UTF-8 (byte 2 is 0xff)": b'"\xff"\n',
    "not valid JSON": b"{\n",
    "JSON list": b"[]\n",
    "no 'conversations'": b"{}\n",
    "contains '..'": line("../x.png"),
    "is absolute": line("/etc/passwd"),
    "symbolic link": line("link.png"),
    "no answer to learn from": b'{"conversations": [{"from": "human", "value": "x"}]}\n',
    "do not alternate": json.dumps({"conversations": [{"from": "human", "value": "x"}] * 2}).encode() + b"\n",
}


def test_bad_samples_are_skipped_counted_and_listed(root: Path) -> None:
    (root / "link.png").symlink_to("/etc/hostname")
    path, listed = write(root, [GOOD[0], *BAD.values(), GOOD[2]]), root / "run" / "bad_samples.jsonl"
    source = JsonlSource(path, tiny_encoding(), bad=BadSamples(listed), cache_dir=root / "cache")
    assert len(source) == 2 and source.bad.count == len(BAD)
    entries = bad_lines(listed)
    assert [entry["line"] for entry in entries] == list(range(2, 2 + len(BAD)))
    for entry, reason in zip(entries, BAD, strict=True):
        assert entry["file"] == str(path) and reason in entry["reason"]
    cached = JsonlSource(path, tiny_encoding(), bad=BadSamples(listed), cache_dir=root / "cache")
    assert len(cached) == 2 and cached.bad.count == len(BAD) and len(bad_lines(listed)) == len(BAD)


@pytest.mark.parametrize("reason", BAD)
def test_strict_names_file_and_line(root: Path, reason: str) -> None:
    (root / "link.png").symlink_to("/etc/hostname")
    path = write(root, [GOOD[0], BAD[reason]])
    for _ in range(2):
        source = JsonlSource(path, tiny_encoding(), strict=True, cache_dir=root / "cache")
        with pytest.raises(SampleError) as caught:
            len(source)
        assert str(caught.value).startswith(f"{path}:2: ") and reason in str(caught.value)
        assert len(JsonlSource(path, tiny_encoding(), cache_dir=root / "cache")) == 1


def test_a_picture_lost_after_planning_keeps_its_slots(root: Path) -> None:
    lines = [line("cut.jpg", id="x"), line(["a.png", "cut.jpg", "a.png"], question="<image><image><image>")]
    listed = root / "bad_samples.jsonl"
    source = JsonlSource(write(root, lines), tiny_encoding(max_tiles=6), bad=BadSamples(listed))
    assert len(source) == 2 and source.bad.count == 0
    for i in range(2):
        example = source[i]
        assert example.failed and not example.loss_weights.any() and not example.tiles.any()
        assert (len(example.ids), len(example.tiles)) == source.length(i)
    assert source.bad.count == 2 and bad_lines(listed)[0]["id"] == "x" and "truncated" in bad_lines(listed)[0]["reason"]
    strict = JsonlSource(source.path, tiny_encoding(), strict=True)
    with pytest.raises(SampleError, match=r"data\.jsonl:1: .*truncated"):
        strict[0]
    assert len(JsonlSource(source.path, tiny_encoding(), verify_images=True, bad=BadSamples())._load_or_make_index().bad) == 2


def test_a_picture_that_changed_is_not_trusted(root: Path) -> None:
    source = JsonlSource(write(root, [GOOD[0]]), tiny_encoding())
    assert source.length(0)[1] == 2
    save_picture(root / "a.png", (16, 16))
    assert source[0].failed


def test_the_index_follows_the_file_and_the_settings(root: Path) -> None:
    path = write(root, GOOD)
    first = JsonlSource(path, tiny_encoding(), cache_dir=root / "cache")
    assert len(first) == 4
    assert JsonlSource(path, tiny_encoding(max_tiles=1), cache_dir=root / "cache").length(0)[1] == 1
    write(root, GOOD[:2])
    assert len(JsonlSource(path, tiny_encoding(), cache_dir=root / "cache")) == 2
    for file in (root / "cache").iterdir():
        file.write_bytes(b"broken")
    assert len(JsonlSource(path, tiny_encoding(), cache_dir=root / "cache")) == 2


def test_text_beyond_the_limit_is_cut_and_progress_is_told(root: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = write(root, [line("a.png", answer="x" * 500)] * 300 + [line("a.png", question="<image>" + "y" * 90)])
    source = JsonlSource(path, tiny_encoding(max_length=64), progress=lambda done, total: seen.append((done, total)))
    assert source.length(0) == (64, 2) and len(source[0].ids) == 64 and len(source) == 300 and source.bad.count == 1
    assert seen[-1][0] == seen[-1][1] == path.stat().st_size and len(seen) == 2


def test_wrong_places_are_errors(root: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        JsonlSource(root / "none.jsonl", tiny_encoding())
    with pytest.raises(ValueError, match="image root"):
        JsonlSource(write(root, GOOD), tiny_encoding(), image_root=root / "none")
    with pytest.raises(SampleError, match="not valid JSON"):
        parse_line(b"[" * 100_000)


@pytest.mark.parametrize("field", ["images", "video", "videos", "audio"])
def test_media_that_is_not_read_is_refused(field: str) -> None:
    """Such a sample would be trained as text alone."""
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a"}]
    with pytest.raises(SampleError, match=f"has '{field}', which is not read"):
        parse_line(json.dumps({"conversations": turns, field: ["a.png"]}).encode())
    assert parse_line(json.dumps({"conversations": turns, field: []}).encode()).images == []


def test_an_empty_image_is_a_sample_of_text() -> None:
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a"}]
    assert parse_line(json.dumps({"conversations": turns, "image": ""}).encode()).images == []


def test_an_image_put_in_place_later_is_found(root: Path, tmp_path: Path) -> None:
    """Although the index that missed it is cached."""
    (root / "late.jsonl").write_bytes(line("late.png") + line("a.png"))
    made = lambda: JsonlSource(root / "late.jsonl", tiny_encoding(), cache_dir=tmp_path / "index")  # noqa: E731
    assert (len(made()), made().rejected) == (1, 1)
    save_picture(root / "late.png")
    assert (len(made()), made().rejected) == (2, 0)


def test_a_damaged_cache_is_made_anew(root: Path, tmp_path: Path) -> None:
    (root / "good.jsonl").write_bytes(line("a.png") * 3)
    made = lambda: JsonlSource(root / "good.jsonl", tiny_encoding(), cache_dir=tmp_path / "index")  # noqa: E731
    want = made().index
    (cached,) = (tmp_path / "index").iterdir()
    whole, rng = cached.read_bytes(), np.random.default_rng(0)
    for damage in (b"", b"PK", whole[: len(whole) // 2], *(bytes(flipped(whole, rng)) for _ in range(60))):
        cached.write_bytes(damage)
        got = made().index
        for name in ("offsets", "sizes", "lines", "lengths"):
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    np.savez(
        cached, offsets=want.offsets + 10**9, sizes=want.sizes, lines=want.lines, lengths=want.lengths, bad=np.frombuffer(b"[]", np.uint8)
    )
    np.testing.assert_array_equal(made().index.offsets, want.offsets)


def flipped(data: bytes, rng: np.random.Generator) -> bytearray:
    changed = bytearray(data)
    changed[rng.integers(len(data))] ^= int(rng.integers(1, 256))
    return changed
