"""What comes in goes out bit by bit; what is imported is what the released folder says; an interrupted run leaves nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from monovl_jax import cli
from monovl_jax.config import config_from_json, config_to_json, mono_internvl_2b, read_config, tiny
from monovl_jax.convert import checkpoint
from monovl_jax.convert.arrays import FLOATS
from monovl_jax.convert.checkpoint import flatten, load_imported
from monovl_jax.convert.errors import WeightsError
from monovl_jax.convert.exporter import export_model, export_params, export_tree, state_dict_order
from monovl_jax.convert.folders import missing_code
from monovl_jax.convert.importer import import_model
from monovl_jax.convert.inspect import inspect_model
from monovl_jax.convert.key_table import tree_from_upstream, upstream_shapes
from monovl_jax.convert.safetensors_out import Tensor, divide, index_text
from monovl_jax.convert.weights import EMBEDDING, HEAD, load_weights
from tests.convert.helpers import GOLDEN, contents, random_upstream, tensors, variant, write_model

BF16 = np.dtype(jnp.bfloat16)
FULL = Path(os.environ.get("MONOVL_GOLDEN", Path(__file__).parents[3] / "shared" / "golden"))
CASES = sorted(path.parent for path in FULL.glob("mono_internvl*/*/config.json"))


def same_tree(got: Any, want: Any) -> None:
    got, want = flatten(got), flatten(want)
    assert got.keys() == want.keys()
    for path, array in want.items():
        assert got[path].dtype == array.dtype, path
        assert np.asarray(got[path]).tobytes() == np.ascontiguousarray(array).tobytes(), path


def there_and_back(src: Path, tmp: Path, **options: Any) -> None:
    """Import, load, export, and look at everything that should not have changed."""
    imported, exported = import_model(src, tmp / "imported"), tmp / "exported"
    config = read_config(src)
    same_tree(load_imported(imported, config), load_weights(src, config))
    export_model(imported, exported, **options)
    assert tensors(exported) == tensors(src)
    for name in ("config.json", "generation_config.json", "added_tokens.json", "tokenization_x.py"):
        if (src / name).is_file():
            assert (exported / name).read_bytes() == (src / name).read_bytes()


def test_an_export_says_which_code_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `auto_map` names and the source does not have: transformers would fail to load the folder, and nothing said why."""
    source = write_model(tmp_path / "source", variant(), random_upstream(variant()))
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_x.Model", "AutoConfig": "them/there--configuration_x.Config", "AutoProcessor": 3}
    (source / "config.json").write_text(json.dumps(config))
    words = {"auto_map": {"AutoTokenizer": ["tokenization_x.Slow", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(words))
    model = import_model(source, tmp_path / "model")
    assert cli.convert_export(model, tmp_path / "out") == 0
    assert (
        f"note: {tmp_path / 'out'} names code that {model} does not have; transformers needs modeling_x.py copied"
        in capsys.readouterr().err
    )
    (tmp_path / "out" / "modeling_x.py").touch()
    assert missing_code(tmp_path / "out") == []
    (tmp_path / "out" / "config.json").write_text("[" * 100_000)
    (tmp_path / "out" / "tokenization_x.py").unlink()
    assert missing_code(tmp_path / "out") == ["tokenization_x.py"]


# ---- identity


@pytest.mark.parametrize("case", GOLDEN, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_recorded_cases_come_back_byte_by_byte(case: Path, tmp_path: Path) -> None:
    sharded = (case / "model.safetensors.index.json").is_file()
    there_and_back(case, tmp_path, shard_gb=0.00046 if sharded else 5.0)
    for file in [*case.glob("*.safetensors"), *case.glob("*.index.json")]:  # upstream's files, not their tensors alone
        assert (tmp_path / "exported" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_recorded_case(case: Path, tmp_path: Path) -> None:
    if not list(case.glob("*.safetensors")):
        pytest.importorskip("torch", reason="this case is a .bin file")
        config = read_config(case)
        exported = export_model(import_model(case, tmp_path / "imported"), tmp_path / "exported")
        same_tree(load_weights(exported, config), load_weights(case, config))
        return
    there_and_back(case, tmp_path)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (variant("none"), np.float32),
        (variant("ffn", vocab_size=331), BF16),
        (variant("ffn+attention", attention_bias=True), np.float16),
        (variant("ffn+attention", attention_expert_output=False), BF16),
        (variant("ffn", tie_embeddings=True), np.float32),
    ],
    ids=["none", "ffn bf16", "attention experts, bias, f16", "qkv expert bf16", "tied"],
)
def test_random_layouts_come_back(config, dtype: Any, shards: int, tmp_path: Path) -> None:
    src = write_model(tmp_path / "src", config, random_upstream(config, dtype=dtype), shards)
    there_and_back(src, tmp_path, shard_gb=5.0 if shards == 1 else 0.0002)
    assert (tmp_path / "exported/model.safetensors.index.json").is_file() == (shards > 1)


@pytest.mark.parametrize("names", [(EMBEDDING,), (HEAD,), (EMBEDDING, HEAD)])
def test_tied_weights_keep_their_names(names: tuple[str, ...], tmp_path: Path) -> None:
    config = variant(tie_embeddings=True)
    weights = random_upstream(config)
    table = weights.pop(EMBEDDING)
    there_and_back(write_model(tmp_path / "src", config, weights | dict.fromkeys(names, table)), tmp_path)


def test_dtypes_that_differ_by_leaf_are_kept(tmp_path: Path) -> None:
    config = variant()
    weights = {name: a.astype(np.float32 if "norm" in name else BF16) for name, a in random_upstream(config).items()}
    there_and_back(write_model(tmp_path / "src", config, weights), tmp_path)


def test_a_cast_is_numpys_and_changes_the_config(tmp_path: Path) -> None:
    config = variant()
    weights = random_upstream(config)
    src = write_model(tmp_path / "src", config, weights)
    raw = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps(raw | {"torch_dtype": "float32"}))
    imported = import_model(src, tmp_path / "imported", dtype="bfloat16")
    want = {name: array.astype(BF16) for name, array in weights.items()}
    same_tree(load_imported(imported, config), tree_from_upstream(config, want.__getitem__))
    assert json.loads((imported / "config.json").read_text())["torch_dtype"] == "bfloat16"
    same_tree(load_imported(imported, config, dtype="float32"), tree_from_upstream(config, lambda name: want[name].astype(np.float32)))
    exported = export_model(imported, tmp_path / "exported", dtype="float32")
    assert {dtype for dtype, _, _ in tensors(exported).values()} == {"F32"}
    assert read_config(exported) == config and json.loads((exported / "config.json").read_text())["torch_dtype"] == "float32"


def test_plain_orbax_reads_it(tmp_path: Path) -> None:
    config = variant()
    src = write_model(tmp_path / "src", config, random_upstream(config, dtype=BF16))
    imported = import_model(src, tmp_path / "imported")
    with ocp.PyTreeCheckpointer() as checkpointer:
        same_tree(checkpointer.restore(imported / "params"), load_weights(src, config))


def test_layers_of_a_leaf_lie_in_chunks_of_bounded_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 4096)
    config = variant()
    src = write_model(tmp_path / "src", config, random_upstream(config))
    there_and_back(src, tmp_path)
    chunks = [path for path in (tmp_path / "imported/params/decoder.blocks.mlp.text.gate").iterdir() if path.name != ".zarray"]
    assert len(chunks) == 2 * 8 and {path.stat().st_size for path in chunks} == {64 * 96 * 4 // 8}
    assert checkpoint.chunk_shape((24, 2048, 8192), 2, True) == [1, 32, 64]


# ---- other sources of an export


def test_a_training_run_of_orbax_can_be_exported(tmp_path: Path) -> None:
    config = variant("ffn+attention")
    weights = random_upstream(config)
    tree = tree_from_upstream(config, weights.__getitem__)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "final", jax.tree.map(jnp.asarray, tree))
    (tmp_path / "files").mkdir()
    (tmp_path / "files/tokenizer_config.json").write_text("{}")
    exported = export_params(tmp_path / "final", config, tmp_path / "files", tmp_path / "exported")
    assert tensors(exported) == {name: ("F32", a.shape, a.tobytes()) for name, a in weights.items()}
    assert read_config(exported) == config and (exported / "tokenizer_config.json").is_file()
    other = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, experts="ffn"))
    with pytest.raises(WeightsError, match=r"do not fit the model: left over: decoder/blocks/attention/visual/out "):
        export_params(tmp_path / "final", other, tmp_path / "files", tmp_path / "other")


def test_parameters_in_memory_can_be_exported(tmp_path: Path) -> None:
    config = variant()
    weights = random_upstream(config)
    tree = jax.tree.map(jnp.asarray, tree_from_upstream(config, weights.__getitem__))
    exported = export_tree(tree, config, tmp_path, tmp_path.parent / f"{tmp_path.name}-out", dtype="bfloat16")
    assert {name: data for name, (_, _, data) in tensors(exported).items()} == {n: a.astype(BF16).tobytes() for n, a in weights.items()}
    del tree["projector"]["bias1"]
    with pytest.raises(WeightsError, match="do not fit the model at projector/bias1"):
        export_tree(tree, config, tmp_path, tmp_path.parent / "never")


# ---- the released size


def test_shards_of_the_2b_are_the_published_ones() -> None:
    """4.97 and 1.25 GB, and an index of 24,100 bytes (model card of Mono-InternVL-2B)."""
    config = mono_internvl_2b()
    order = state_dict_order(config)
    announced = [Tensor(row.name.format(layer=layer), row.shape, BF16) for row, layer in order]
    assert {t.name: t.shape for t in announced} == upstream_shapes(config)
    files = divide(announced, 5_000_000_000)
    assert list(files) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert [round(sum(t.nbytes for t in shard) / 1e9, 2) for shard in files.values()] == [4.97, 1.25]
    assert len(index_text(files)) == 24_100


# ---- a mesh


@pytest.mark.slow
def test_restoring_onto_a_mesh(run_python, tmp_path: Path) -> None:
    config = variant("ffn+attention", vocab_size=331)
    src = write_model(tmp_path / "src", config, random_upstream(config, dtype=BF16))
    import_model(src, tmp_path / "imported")
    code = f"""
import jax, numpy as np
from monovl_jax.config import read_config
from monovl_jax.convert.checkpoint import flatten, load_imported
from monovl_jax.convert.weights import load_weights
from monovl_jax.parallel.mesh import make_mesh
config = read_config({str(tmp_path / "src")!r})
tree = flatten(load_imported({str(tmp_path / "imported")!r}, config, mesh=make_mesh(data=1, fsdp=2)))
want = flatten(load_weights({str(tmp_path / "src")!r}, config))
gate = tree["decoder/blocks/mlp/visual/gate"]
assert [s.data.shape for s in gate.addressable_shards] == [(2, 32, 96)] * 2, gate.sharding
for path, array in want.items():
    assert np.asarray(tree[path]).tobytes() == array.tobytes(), path
print("same")
"""
    assert run_python(code, devices=2).strip() == "same"


# ---- whole or not at all


class Stop(Exception):
    """An interruption."""


@pytest.mark.parametrize("step", ["import", "export"])
@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_an_interrupted_run_leaves_nothing(step: str, error: type, tmp_path: Path) -> None:
    config = variant()
    src = write_model(tmp_path / "src", config, random_upstream(config))
    if step == "export":
        src = import_model(src, tmp_path / "imported")
    before, seen = contents(tmp_path), []

    def stop(done: int, total: int) -> None:
        seen.append(contents(tmp_path).keys() - before.keys())
        if done > total / 2:
            raise error

    run = import_model if step == "import" else export_model
    with pytest.raises(error):
        run(src, tmp_path / "dst", progress=stop)
    assert seen[-1] and all(name.startswith(".dst.partial/") for name in seen[-1]), "it was at work, and not at its destination"
    assert contents(tmp_path) == before and not (tmp_path / "dst").exists() and not (tmp_path / ".dst.partial").exists()
    run(src, tmp_path / "dst")
    assert (tmp_path / "dst/config.json").is_file()


def test_what_a_killed_import_left_does_not_load_and_is_removed(tmp_path: Path) -> None:
    config = variant()
    src = write_model(tmp_path / "src", config, random_upstream(config))
    leftover = tmp_path / ".dst.partial"
    (leftover / "params/decoder.norm").mkdir(parents=True)
    (leftover / "config.json").write_text(config_to_json(config))
    with pytest.raises(WeightsError, match=r"no imported model: it has no model\.json"):
        load_imported(leftover, config)
    import_model(src, tmp_path / "dst")
    assert not leftover.exists() and "params/decoder.norm" not in contents(tmp_path / "dst")
    same_tree(load_imported(tmp_path / "dst", config), load_weights(src, config))


def test_damage_after_the_import_is_noticed(tmp_path: Path) -> None:
    config = variant()
    imported = import_model(write_model(tmp_path / "src", config, random_upstream(config)), tmp_path / "dst")
    chunk = imported / "params/decoder.blocks.mlp.text.gate/1.0.0"
    data = chunk.read_bytes()
    for damage in (chunk.unlink, lambda: chunk.write_bytes(data[:-4])):
        damage()
        with pytest.raises(WeightsError, match=r"holds .* model\.json says .*; import the model again"):
            load_imported(imported, config)
    chunk.write_bytes(data)
    with pytest.raises(WeightsError, match=r"do not fit config\.json: left over: decoder/blocks/mlp/visual"):
        load_imported(imported, tiny("none"))
    for text in ("", "[]", '{"format": 2, "layout": "mono_internvl"}'):
        (imported / "model.json").write_text(text)
        with pytest.raises(WeightsError, match=r"model\.json (cannot be read|is .* of format 2)"):
            load_imported(imported, config)


def test_helpers_know_the_released_layout() -> None:
    """The folder that these tests write is one that upstream's names and our reader agree on."""
    assert GOLDEN and config_from_json(config_to_json(variant())) == variant()
    assert set(FLOATS) == {"F64", "F32", "F16", "BF16"}


@pytest.mark.parametrize("damage", ["flip", "zero", "swap"])
def test_a_damage_that_keeps_all_sizes_is_named(damage: str, tmp_path: Path) -> None:
    """On load, on export and by inspect, in any file of the parameters."""
    config = variant()
    imported = import_model(write_model(tmp_path / "src", config, random_upstream(config)), tmp_path / "dst")
    first, second = (imported / f"params/decoder.blocks.mlp.text.gate/{layer}.0.0" for layer in (0, 1))
    data = first.read_bytes()
    if damage == "swap":
        first.write_bytes(second.read_bytes())
        second.write_bytes(data)
    else:
        first.write_bytes(bytes([data[0] ^ 1]) + data[1:] if damage == "flip" else bytes(len(data)))
    match = r"damaged: decoder\.blocks\.mlp\.text\.gate/0\.0\.0 is not what was written"
    with pytest.raises(WeightsError, match=match):
        load_imported(imported, config)
    with pytest.raises(WeightsError, match=match):
        export_model(imported, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    seen = inspect_model(imported)
    assert re.search(match, "\n".join(seen.problems)) and "everything is there" not in seen.text()
    assert inspect_model(imported, verify=False).problems == ()
    assert load_imported(imported, config, verify=False) and export_model(imported, tmp_path / "out", verify=False)


def test_every_byte_of_the_parameters_is_under_a_digest(tmp_path: Path) -> None:
    config = variant()
    imported = import_model(write_model(tmp_path / "src", config, random_upstream(config)), tmp_path / "dst")
    kept = json.loads((imported / "model.json").read_text())["sha256"]
    files = [file for file in sorted((imported / "params").rglob("*")) if file.is_file()]
    assert kept == {str(file.relative_to(imported / "params")): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_folder_of_the_time_before_digests_loads_with_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = variant()
    src = write_model(tmp_path / "src", config, random_upstream(config))
    imported = import_model(src, tmp_path / "dst")
    marker = json.loads((imported / "model.json").read_text())
    del marker["sha256"]
    (imported / "model.json").write_text(json.dumps(marker))
    same_tree(load_imported(imported, config), load_weights(src, config))
    assert [record.getMessage() for record in caplog.records if "kept no digests" in record.getMessage()]
    seen = inspect_model(imported)
    assert seen.problems == () and "kept no digests" in seen.text()
