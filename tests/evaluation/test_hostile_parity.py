"""Cases that somebody made to fill the memory, to wait for ever or to read elsewhere: exit code 2 and one sentence; and odd images."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from monovl_jax.data.tiling import NORMALIZATION
from monovl_jax.evaluation import parity_files
from monovl_jax.evaluation.parity import UnknownCase, _ModelCase, run_case
from tests.evaluation.test_parity import LOGITS, RULE, SMALL, copy, edit_arrays, inputs, quick, spoil

__all__ = ["quick"]  # a fixture
Spoil = Callable[[Path], None]


def header(shape: str, dtype: str = "<f4") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def member(data: bytes, name: str = "input_ids.npy") -> Spoil:
    def write(folder: Path) -> None:
        with zipfile.ZipFile(folder / "inputs.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, data)

    return write


def bomb(folder: Path) -> None:
    """3 GiB of zeros in 3 MB, by the archive's own table; nothing of it may be unpacked."""
    member(header("(805306368,)") + bytes(1000))(folder)
    path = folder / "inputs.npz"
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 24 : at + 28] = (3 << 30).to_bytes(4, "little")
    path.write_bytes(data)


def replaced(name: str, make: Spoil) -> Spoil:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def outside(name: str) -> Spoil:
    def change(folder: Path) -> None:
        shutil.move(folder / name, folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return change


def one_npy(folder: Path) -> None:
    with open(folder / "inputs.npz", "wb") as file:
        np.save(file, np.zeros(3))


GENERATED: dict[str, Any] = {"compare": {"generated_ids": RULE}}
HOSTILE: dict[str, tuple[dict[str, Any], Spoil | None, str]] = {
    "bomb": ({}, bomb, "at most 10,000 of 1,073,741,824 are read"),
    "a header of a petabyte": ({}, member(header("(1000000000000000,)")), "does not hold"),
    "a negative shape": ({}, member(header("(-1, -4)") + bytes(16)), "does not hold"),
    "objects": ({}, member(header("(1,)", "|O") + b"N."), "not numbers"),
    "texts": ({"compare": LOGITS}, inputs(input_ids=np.array([["a"]])), "not numbers"),
    "one array": ({}, one_npy, "no readable .npz"),
    "a damaged member": ({}, member(b"\x93NUMPY\x09\x00" + bytes(50)), "unknown format"),
    "arrays in a pipe": ({}, replaced("inputs.npz", os.mkfifo), "no regular file"),
    "arrays of a device": ({}, replaced("outputs.npz", lambda path: path.symlink_to("/dev/zero")), "leads out of the folder"),
    "arrays elsewhere": ({}, outside("inputs.npz"), "leads out of the folder"),
    "case.json elsewhere": ({}, outside("case.json"), "leads out of the folder"),
    "case.json in a pipe": ({}, replaced("case.json", os.mkfifo), "no regular file"),
    "case.json nested": ({}, spoil("case.json", b"[" * 100_000 + b"]" * 100_000), "nested more than 64"),
    "a generate list": (GENERATED | {"generate": [1]}, None, r"generate is \[1\]"),
    "a negative end": (GENERATED | {"generate": {"eos": -7}}, None, "generate.eos is -7"),
    "a huge end": (GENERATED | {"generate": {"eos": 1 << 40}}, None, "generate.eos is 1099511627776"),
    "a huge padding id": (GENERATED | {"pad_token_id": 1 << 40}, None, "pad_token_id is 1099511627776"),
    "endless generation": (
        GENERATED,
        lambda f: edit_arrays(f / "outputs.npz", generated_ids=np.zeros((1, 100_000), np.int64)),
        "100000 generated tokens are too many",
    ),
    "ids of floats": ({"compare": LOGITS}, inputs(input_ids=lambda a: a.astype(np.float32)), "input_ids is float32"),
    "a mask of floats": ({"compare": LOGITS}, inputs(attention_mask=lambda a: a * 0.5), "attention_mask is float64"),
    "endless rows": ({"compare": LOGITS}, inputs(input_ids=np.zeros((1, 1 << 20), np.int8)), "1 rows of 1048576 tokens"),
    "labels beyond the vocabulary": (
        {"compare": {"loss": RULE}},
        lambda f: (
            edit_arrays(f / "inputs.npz", labels=np.full((1, 45), 10**6)),
            edit_arrays(f / "outputs.npz", loss=np.zeros(())),
        )[0],
        r"labels must be -100 or lie in \[0, 320\)",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.usefixtures("quick")
def test_hostile_model_cases(case: str, tmp_path: Path) -> None:
    changes, change, message = HOSTILE[case]
    folder = copy(tmp_path, **changes)
    if change:
        change(folder)
    with pytest.raises(UnknownCase, match=message) as caught:
        run_case(folder)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def preprocess(folder: Path, case: Any, **arrays: np.ndarray) -> Path:
    folder.mkdir()
    (folder / "case.json").write_text(json.dumps(case))
    np.savez(folder / "inputs.npz", **arrays)
    np.savez(folder / "outputs.npz", **arrays)
    return folder


TILES = {
    "images": [{"image": "a", "tiles": 1}],
    "image_size": 8,
    "min_num": 1,
    "max_num": 1,
    "use_thumbnail": False,
    "normalize_type": "imagenet",
    "pad2square": False,
}
GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_num": 10**6}, "lower one of them"),
        ({"image_size": 10**6}, "lower one of them"),
        ({"image_size": "8"}, "not understood"),
        ({"images": 7}, "not understood"),
        ({"images": [7]}, "not understood"),
        ({"images": [{"image": "a", "tiles": {}}]}, "not understood"),
        ({"normalize_type": []}, "not understood"),
        ({"images": [{"image": "b", "tiles": 1}]}, "lacks or does not know 'b'"),
    ],
)
def test_hostile_preprocess_cases(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownCase, match=message):
        run_case(preprocess(tmp_path / "c", TILES | changes, a=GREY))


def test_damaged_arrays_of_a_preprocess_case(tmp_path: Path) -> None:
    folder = preprocess(tmp_path / "c", TILES, a=GREY)
    data = bytearray((folder / "outputs.npz").read_bytes())
    data[80] ^= 255
    (folder / "outputs.npz").write_bytes(data)
    with pytest.raises(UnknownCase, match=re.escape("outputs.npz is no readable .npz")):
        run_case(folder)


def test_conversations_of_endless_length(tmp_path: Path) -> None:
    folder = shutil.copytree(SMALL / "preprocess" / "labels_internlm2", tmp_path / "c")
    case = json.loads((folder / "case.json").read_text())
    for change in ({"model_max_length": 10**12}, {"cases": [case["cases"][0] | {"num_image_token_list": [10**9]}]}):
        (folder / "case.json").write_text(json.dumps(case | change))
        with pytest.raises(UnknownCase, match="must be a whole number up to"):
            run_case(folder)


RGBA = np.stack([GREY, 255 - GREY, GREY // 2, np.full_like(GREY, 9)], -1)
IMAGES: dict[str, tuple[np.ndarray, np.ndarray]] = {  # as recorded, and what upstream's `convert("RGB")` makes of it
    "grey": (GREY, np.stack([GREY] * 3, -1)),
    "grey with an axis": (GREY[..., None], np.stack([GREY] * 3, -1)),
    "grey and alpha": (RGBA[..., 2:], np.stack([GREY // 2] * 3, -1)),
    "RGBA": (RGBA, RGBA[..., :3]),
    "16 bits": (GREY.astype(np.uint16) * 200, np.stack([np.minimum(GREY.astype(int) * 200, 255).astype(np.uint8)] * 3, -1)),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_images_of_any_channels(kind: str, tmp_path: Path) -> None:
    image, rgb = IMAGES[kind]
    folder = preprocess(tmp_path / "c", TILES, a=image)
    mean, std = NORMALIZATION["imagenet"]
    values = ((rgb / 255 - mean) / std).transpose(2, 0, 1)
    np.savez(folder / "outputs.npz", a_tiles_uint8=rgb[None], a_single_f16=values.astype(np.float16))
    checks = run_case(folder)
    assert len(checks) == 4 and all(check.passed for check in checks), checks


@pytest.mark.parametrize("image", [np.zeros((8, 8, 5), np.uint8), np.zeros((8, 8), np.int32), np.zeros((8, 8, 3), np.uint16)])
def test_images_of_no_known_kind(image: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(UnknownCase, match="the image 'a' is"):
        run_case(preprocess(tmp_path / "c", TILES, a=image))


@pytest.mark.usefixtures("quick")
def test_gradients_of_the_weighted_loss(tmp_path: Path) -> None:
    """Equal weights give PyTorch's gradients of the mean loss; weights of 0 those of the mean over the labels that are left."""
    folder = shutil.copytree(SMALL / "mono_internvl" / "gradients", tmp_path / "case")
    case = json.loads((folder / "case.json").read_text())
    labels, recorded = np.load(folder / "inputs.npz")["labels"], np.load(folder / "outputs.npz")
    names = [name for name in case["compare"] if name.startswith("grad:")]
    weighted = [name.replace("grad:", "grad_weighted:") for name in names]

    def passed(weights: np.ndarray, expected: list[np.ndarray]) -> list[bool]:
        compare = {new: case["compare"][old] for new, old in zip(weighted, names, strict=True)}
        (folder / "case.json").write_text(json.dumps(case | {"compare": compare}))
        edit_arrays(folder / "inputs.npz", labels=labels, loss_weight=weights)
        np.savez(folder / "outputs.npz", **dict(zip(weighted, expected, strict=True)))
        return [check.passed for check in run_case(folder)]

    theirs = [recorded[name] for name in names]
    assert all(passed(np.where(labels == -100, 0, 0.25).astype(np.float32), theirs))
    left = np.where(np.arange(labels.shape[1]) % 2, labels, -100)
    edit_arrays(folder / "inputs.npz", labels=left)
    plain = _ModelCase(folder, case)
    expected = [plain._output(name) for name in names]
    weights = np.where(left == -100, 0, 3).astype(np.float32)
    assert all(passed(weights, expected)) and not all(passed(weights, theirs))


def test_limits_leave_room() -> None:
    assert parity_files.MAX_ARRAY_BYTES >= 92_553 * 2_048 * 4, "the gradient of the embeddings of a released model"
