"""What is refused: by name, in one sentence, with nothing written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from monovl_jax import jsontext
from monovl_jax.convert import checkpoint, folders
from monovl_jax.convert.checkpoint import load_imported
from monovl_jax.convert.errors import WeightsError
from monovl_jax.convert.exporter import export_model, export_params
from monovl_jax.convert.importer import import_model
from monovl_jax.convert.key_table import upstream_shapes
from monovl_jax.convert.weights import WeightFiles, compare, load_weights
from tests.convert.helpers import contents, random_upstream, variant, write_model

CONFIG = variant()
GATE = "language_model.model.layers.1.feed_forward_ve.w1.weight"


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return write_model(tmp_path / "src", CONFIG, random_upstream(CONFIG))


def refused(src: Path, match: str, dst: Path | None = None, **options: Any) -> None:
    """import_model refuses in one sentence, and everything around `src` is as before."""
    before = contents(src.parent)
    with pytest.raises(WeightsError, match=match) as caught:
        import_model(src, dst or src.parent / "dst", **options)
    assert not str(caught.value).endswith(".") and len(str(caught.value).splitlines()) <= 22
    assert contents(src.parent) == before
    assert not (src.parent / ".dst.partial").exists()


# ---- the tensors


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, "bfloat16", np.float16])
def test_a_tensor_that_is_not_finite(tmp_path: Path, value: float, dtype: Any) -> None:
    weights = random_upstream(CONFIG, dtype=np.dtype(dtype) if dtype != "bfloat16" else checkpoint.FLOATS["BF16"])
    weights[GATE][5, 7] = value
    src = write_model(tmp_path / "src", CONFIG, weights)
    refused(src, rf"tensor {GATE} holds NaN or infinite values")
    with pytest.raises(WeightsError, match=rf"tensor {GATE} holds NaN"):
        load_weights(src, CONFIG)


def test_an_export_that_is_not_finite(src: Path, tmp_path: Path) -> None:
    imported = import_model(src, tmp_path / "imported")
    chunk = imported / "params/decoder.blocks.mlp.visual.gate/1.0.0"
    chunk.write_bytes(struct.pack("<f", float("nan")) + chunk.read_bytes()[4:])
    with pytest.raises(WeightsError, match=rf"tensor {GATE} holds NaN"):
        export_model(imported, tmp_path / "dst", verify=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["imported", "src"]


def test_values_too_large_for_the_dtype(tmp_path: Path) -> None:
    weights = random_upstream(CONFIG)
    weights[GATE][0, 0] = 1e5
    src = write_model(tmp_path / "src", CONFIG, weights)
    refused(src, rf"tensor {GATE} holds values too large for float16; convert to bfloat16", dtype="float16")
    import_model(src, tmp_path / "dst", dtype="bfloat16")


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.bool_])
def test_integers_where_floats_are_expected(tmp_path: Path, dtype: Any) -> None:
    weights = random_upstream(CONFIG)
    weights[GATE] = weights[GATE].astype(dtype)
    refused(write_model(tmp_path / "src", CONFIG, weights), rf"wrong dtype: {GATE} is (I32|U8|BOOL), expected a float")


def test_float64_and_mixed_layers_ask_for_a_dtype(tmp_path: Path) -> None:
    weights = random_upstream(CONFIG)
    weights[GATE] = weights[GATE].astype(np.float16)
    src = write_model(tmp_path / "src", CONFIG, weights)
    refused(src, r"feed_forward_ve\.w1\.weight is float16, float32 in different layers; choose one with --dtype")
    with pytest.raises(WeightsError, match=r"float32 in layer 0 and float16 in layer 1"):
        load_weights(src, CONFIG)
    double = write_model(tmp_path / "double", CONFIG, {name: a.astype(np.float64) for name, a in weights.items()})
    refused(double, "is float64; choose one of float32")
    import_model(double, tmp_path / "dst", dtype="float32")


def test_an_unknown_dtype(src: Path) -> None:
    for name in ("int8", "float8_e4m3fn", "float64", "", "no such"):
        refused(src, "cannot hold weights; use float32, float16, bfloat16", dtype=name)


def test_differences_are_listed_with_the_nearest_name(tmp_path: Path) -> None:
    weights = random_upstream(CONFIG)
    weights[GATE.replace("w1", "w9")] = weights.pop(GATE)
    refused(write_model(tmp_path / "src", CONFIG, weights), rf"missing: {GATE}(.|\n)*|left over: .*did you mean {GATE}")


# ---- the files


@pytest.mark.parametrize("size", [0, 7, 100, -1000, -1])
def test_a_truncated_file(src: Path, size: int) -> None:
    path = src / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(src, r"model\.safetensors is no readable safetensors file .*download it again")


def test_a_header_that_names_a_tensor_twice(tmp_path: Path, src: Path) -> None:
    path = src / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].decode().rstrip()
    entry = json.dumps({"mlp1.0.bias": json.loads(header)["mlp1.0.bias"]})[1:-1]
    text = (header[:-1] + "," + entry + "}").encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    refused(src, r"no readable safetensors file")


def test_a_file_that_is_longer_than_its_header_says(src: Path) -> None:
    with open(src / "model.safetensors", "ab") as file:
        file.write(b"\0" * 64)
    refused(src, r"no readable safetensors file")


def edit_index(folder: Path, edit: Callable[[dict], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", 3])
def test_an_index_that_leaves_the_folder(tmp_path: Path, shard: Any) -> None:
    src = write_model(tmp_path / "src", CONFIG, random_upstream(CONFIG), shards=2)
    save_file({GATE: np.zeros((96, 64), np.float32)}, tmp_path / "secret.safetensors")
    edit_index(src, lambda index: index.update({GATE: shard}))
    refused(src, r"plain file names in the same folder|is missing|is no index")


def test_an_index_that_names_the_wrong_shard(tmp_path: Path) -> None:
    src = write_model(tmp_path / "src", CONFIG, random_upstream(CONFIG), shards=2)
    other = {f"model-0000{a}-of-00002.safetensors": f"model-0000{3 - a}-of-00002.safetensors" for a in (1, 2)}
    edit_index(src, lambda index: index.update({GATE: other[index[GATE]]}))
    refused(src, rf"the index places '{GATE}' in model-.*which does not hold it")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenization_x.py", "added_tokens.json"])
def test_a_link_out_of_the_folder(src: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.move(src / name, outside / name)
    (src / name).symlink_to(outside / name)
    refused(src, r"is a link to .*outside its folder; put the file itself there")


def test_links_of_a_hub_cache_are_followed(src: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--x--y"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in src.iterdir():
        shutil.copyfile(path, blobs / path.name.upper())
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name.upper())
    import_model(snapshot, tmp_path / "dst")
    assert not any(path.is_symlink() for path in (tmp_path / "dst").rglob("*"))


# ---- PyTorch files


class Evil:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.path, "executed"))


def bin_folder(src: Path, data: bytes) -> None:
    (src / "model.safetensors").unlink()
    (src / "pytorch_model.bin").write_bytes(data)


def test_a_bin_file_without_torch(src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bin_folder(src, b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(src, r"pytorch_model\.bin is a PyTorch file; install the extra with `pip install 'monovl_jax\[torch\]'`")


def test_a_pickle_is_never_executed(src: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is an extra")
    bin_folder(src, pickle.dumps({"x": Evil(tmp_path / "proof")}))
    refused(src, r"cannot be loaded with weights_only=True .*never loaded otherwise")
    assert not (tmp_path / "proof").exists()


def test_a_bin_file_with_torch(src: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is an extra")
    weights = {name: torch.from_numpy(a).to(torch.bfloat16) for name, a in random_upstream(CONFIG).items()}
    (src / "model.safetensors").unlink()
    torch.save(weights, src / "pytorch_model.bin")
    exported = export_model(import_model(src, tmp_path / "imported"), tmp_path / "exported")
    files = WeightFiles(exported)
    for name, tensor in weights.items():
        assert files.read(name).view(np.int16).tobytes() == tensor.view(torch.int16).numpy().tobytes()
    torch.save([1, 2], src / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="no dictionary of tensors"):
        WeightFiles(src)


# ---- the destination


def test_a_destination_that_is_not_empty(src: Path, tmp_path: Path) -> None:
    (tmp_path / "dst").mkdir()
    import_model(src, tmp_path / "dst")  # empty is fine
    refused(src, "is not empty; give another destination, or delete it")
    refused(src, "is not empty|lies inside", dst=src)
    (tmp_path / "file").write_text("")
    refused(src, "is there and is no folder", dst=tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused(src, "is there and is no folder", dst=tmp_path / "link")


def test_a_destination_inside_the_source(src: Path, tmp_path: Path) -> None:
    refused(src, "lies inside the source", dst=src / "jax")
    refused(src, "lies inside the source", dst=tmp_path / "other" / ".." / "src" / "jax")
    imported = import_model(src, tmp_path / "imported")
    for dst in (imported / "out", imported / "params" / "out"):
        with pytest.raises(WeightsError, match="lies inside the source"):
            export_model(imported, dst)
    with pytest.raises(WeightsError, match="lies inside the source"):
        export_params(imported / "params", CONFIG, src, imported / "params" / "out")


def test_a_parent_that_is_a_file(src: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(src, r"cannot be written \(Not a directory\)|cannot be written \(File exists\)", dst=tmp_path / "file" / "dst")


def test_a_disk_without_room(src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1 << 20))
    refused(src, r"has 0\.00 GB free and 0\.02 GB are to be written; make room")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_fills_up(src: Path, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    imported = import_model(src, tmp_path / "imported")
    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(WeightsError, match=rf"dst cannot be written \({os.strerror(number)}\); make room"):
        export_model(imported, tmp_path / "dst")
    monkeypatch.setattr(checkpoint, "write_json", fail)
    refused(src, rf"cannot be written \({os.strerror(number)}\)")


def test_tensorstores_own_complaint(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises ValueError when it cannot write: here a file stands where a chunk's folder should be."""
    real = checkpoint._create_leaf

    def spoil(params: Path, path: str, *rest: Any) -> Any:
        store = real(params, path, *rest)
        if path == "decoder/norm":
            shutil.rmtree(params / "decoder.norm")
            (params / "decoder.norm").write_text("")
        return store

    monkeypatch.setattr(checkpoint, "_create_leaf", spoil)
    refused(src, r"cannot be written \(.*decoder\.norm")


def test_two_imports_at_once(src: Path, tmp_path: Path) -> None:
    def again(done: int, total: int) -> None:
        with pytest.raises(WeightsError, match="another process is writing"):
            import_model(src, tmp_path / "dst")

    import_model(src, tmp_path / "dst", progress=again)
    assert (tmp_path / "dst" / "model.json").is_file()


def test_the_work_for_tensors_left_over_grows_with_their_number() -> None:
    """Four times the tensors are about four times the time, not sixteen; with 100,000 of them it was minutes."""
    expected = upstream_shapes(CONFIG)

    def seconds(extra: int) -> float:
        files = WeightFiles.__new__(WeightFiles)
        files.folder = Path("m")
        files.shapes = {name: shape for name, shape in expected.items() if name != GATE} | {f"extra.{i}": (1,) for i in range(extra)}
        files.dtypes = dict.fromkeys(files.shapes, "F32")
        began = time.process_time()
        assert len(compare(files, expected, None)) == extra + 1
        return time.process_time() - began

    assert min(seconds(40_000) for _ in range(2)) < 9 * min(seconds(10_000) for _ in range(3)) + 0.1


def test_one_name_twice_among_very_many() -> None:
    """Found in one pass: 100,000 comparisons of each with each would take minutes."""
    entries = [f'"t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(100_000)]
    with pytest.raises(jsontext.JsonError, match="'t7' appears twice"):
        jsontext.loads("{" + ",".join([*entries, entries[7]]) + "}", unique_keys=True)


def test_a_header_whose_entry_is_a_list(tmp_path: Path) -> None:
    """The library in Rust takes it for an object."""
    header = json.dumps({"a": ["F32", [2], [0, 8]]}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(WeightsError, match=r"is no readable safetensors file"):
        WeightFiles(tmp_path)


@pytest.mark.parametrize("damage", ["pipe", "deep", "chunk"])
def test_imported_folders_that_would_stop_orbax(src: Path, tmp_path: Path, damage: str) -> None:
    """Without a look at the digests too."""
    imported = import_model(src, tmp_path / "imported")
    files = sorted(path for path in (imported / "params").rglob("*") if path.is_file())
    if damage == "chunk":
        largest = max(files, key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    else:
        path = next(path for path in files if path.name in ("_METADATA", ".zarray", "zarr.json"))
        path.unlink()
        os.mkfifo(path) if damage == "pipe" else path.write_text("[" * 100_000)
    for verify in (True, False):
        with pytest.raises(WeightsError):
            load_imported(imported, CONFIG, verify=verify)
