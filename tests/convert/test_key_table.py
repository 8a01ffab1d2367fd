"""The key table covers the released layout and our tree, each exactly once; reading is strict."""

from __future__ import annotations

import collections
import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from monovl_jax.config import ModelConfig, mono_internvl_1_5_2b, mono_internvl_2b, tiny
from monovl_jax.convert.key_table import key_table, leaf, tree_from_upstream, tree_to_upstream, upstream_shapes
from monovl_jax.convert.weights import EMBEDDING, HEAD, WeightsError, load_weights
from monovl_jax.inference.generate import abstract_model

LAYER = "language_model.model.layers.{}."
LAYER_SHAPES_2B = {
    "attention.wqkv.weight": (4096, 2048),
    "attention.wo.weight": (2048, 2048),
    "attention_norm.weight": (2048,),
    "ffn_norm.weight": (2048,),
    "feed_forward.w1.weight": (8192, 2048),
    "feed_forward.w3.weight": (8192, 2048),
    "feed_forward.w2.weight": (2048, 8192),
    "feed_forward_ve.w1.weight": (8192, 2048),
    "feed_forward_ve.w3.weight": (8192, 2048),
    "feed_forward_ve.w2.weight": (2048, 8192),
}
SHAPES_2B = {
    "vision_model.embeddings.class_embedding": (1, 1, 1024),
    "vision_model.embeddings.patch_embedding.weight": (1024, 3, 14, 14),
    "vision_model.embeddings.patch_embedding.bias": (1024,),
    "vision_model.embeddings.position_embedding": (1, 1025, 1024),
    "mlp1.0.weight": (4096,),
    "mlp1.0.bias": (4096,),
    "mlp1.1.weight": (2048, 4096),
    "mlp1.1.bias": (2048,),
    "mlp1.3.weight": (2048, 2048),
    "mlp1.3.bias": (2048,),
    "language_model.model.tok_embeddings.weight": (92553, 2048),
    "language_model.model.norm.weight": (2048,),
    "language_model.output.weight": (92553, 2048),
} | {LAYER.format(i) + name: shape for i in range(24) for name, shape in LAYER_SHAPES_2B.items()}


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.rstrip("/"): tree}
    return {key: value for name, part in tree.items() for key, value in flat(part, f"{prefix}{name}/").items()}


def variant(experts: str = "ffn", **decoder: Any) -> ModelConfig:
    return dataclasses.replace(tiny(experts), decoder=dataclasses.replace(tiny(experts).decoder, **decoder))


VARIANTS = {
    "none": variant("none"),
    "ffn": variant("ffn"),
    "ffn+attention": variant("ffn+attention"),
    "qkv expert alone": variant("ffn+attention", attention_expert_output=False, attention_bias=True),
    "bias": variant("ffn+attention", attention_bias=True),
    "tied": variant("ffn", tie_embeddings=True),
    "odd vocabulary": variant("ffn", vocab_size=331),
    "full vocabulary": variant("ffn", vocab_size=384),
    "other heads": variant("ffn", num_heads=8, num_kv_heads=1, num_layers=3),
    "quarter shuffle": dataclasses.replace(tiny(), vision=dataclasses.replace(tiny().vision, downsample_ratio=0.25)),
}


# ---- the released sizes


def test_the_2b_has_the_released_names_and_shapes() -> None:
    shapes = upstream_shapes(mono_internvl_2b())
    assert shapes == SHAPES_2B and len(shapes) == 253
    assert sum(int(np.prod(s)) for s in shapes.values()) == 3_111_355_392


def test_the_1_5_adds_two_projections_per_layer() -> None:
    shapes = upstream_shapes(mono_internvl_1_5_2b())
    added = {
        LAYER.format(i) + name: s
        for i in range(24)
        for name, s in (("attention.wqkv_ve.weight", (4096, 2048)), ("attention.wo_ve.weight", (2048,) * 2))
    }
    assert shapes == SHAPES_2B | added
    assert sum(int(np.prod(s)) for s in shapes.values()) == 3_413_345_280


@pytest.mark.parametrize(
    ("config", "count"), [(mono_internvl_2b(), 3_111_355_392), (mono_internvl_1_5_2b(), 3_413_345_280)], ids=["2b", "1_5_2b"]
)
def test_the_model_itself_has_that_many_parameters(config: ModelConfig, count: int) -> None:
    leaves = flat(abstract_model(config)[1])
    padding = 2 * (config.decoder.padded_vocab_size - config.decoder.vocab_size) * config.decoder.hidden_size
    assert sum(int(np.prod(a.shape)) for a in leaves.values()) - padding == count


@pytest.mark.parametrize("config", [mono_internvl_1_5_2b(), *VARIANTS.values()], ids=["1_5_2b", *VARIANTS])
def test_every_leaf_of_the_model_is_covered_once(config: ModelConfig) -> None:
    leaves, rows = flat(abstract_model(config)[1]), key_table(config)
    assert collections.Counter(path for row in rows for path in row.paths) == collections.Counter(leaves.keys())
    names = [row.name.format(layer=i) for row in rows for i in (range(config.decoder.num_layers) if row.per_layer else (0,))]
    assert len(set(names)) == len(names) == len(upstream_shapes(config))
    for row in rows:
        loaded = row.load(np.broadcast_to(np.int8(0), row.shape))
        for path, array in zip(row.paths, loaded, strict=True):
            stacked = (config.decoder.num_layers,) if row.per_layer else ()
            assert stacked + array.shape == leaves[path].shape, path


# ---- both directions


def random_upstream(config: ModelConfig, seed: int = 0, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in upstream_shapes(config).items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_in_and_out_again(name: str) -> None:
    config = VARIANTS[name]
    weights = random_upstream(config)
    tree = tree_from_upstream(config, weights.__getitem__)
    out = dict(tree_to_upstream(config, tree))
    assert list(out) == list(weights)
    for key, array in weights.items():
        np.testing.assert_array_equal(out[key], array, err_msg=key)
    again = tree_from_upstream(config, out.__getitem__)
    assert flat(again).keys() == flat(tree).keys()
    for path, array in flat(tree).items():
        np.testing.assert_array_equal(leaf(again, path), array)
        assert array.flags.c_contiguous


def test_where_things_lie() -> None:
    config = variant("ffn+attention", vocab_size=331)
    d = config.decoder
    up = random_upstream(config)
    tree = tree_from_upstream(config, up.__getitem__)
    kv, g, e = d.num_kv_heads, d.queries_per_kv, d.head_dim
    for suffix, expert in (("", "text"), ("_ve", "visual")):
        wqkv, qkv = up[f"{LAYER.format(1)}attention.wqkv{suffix}.weight"], tree["decoder"]["blocks"]["attention"][expert]["qkv"][1]
        for head, slot, dim in ((0, 0, 0), (1, g, 3), (kv - 1, g + 1, e - 1)):  # queries, then the key, then the value of each kv head
            np.testing.assert_array_equal(qkv[:, head, slot, dim], wqkv[(head * (g + 2) + slot) * e + dim])
        mlp = tree["decoder"]["blocks"]["mlp"][expert]
        for name, ours in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            np.testing.assert_array_equal(mlp[ours][0], up[f"{LAYER.format(0)}feed_forward{suffix}.{name}.weight"].T)
    np.testing.assert_array_equal(tree["decoder"]["embedding"][:331], up[EMBEDDING])
    np.testing.assert_array_equal(tree["decoder"]["head"][:, :331], up[HEAD].T)
    assert not tree["decoder"]["embedding"][331:].any() and not tree["decoder"]["head"][:, 331:].any()
    table = up["vision_model.embeddings.position_embedding"]
    np.testing.assert_array_equal(tree["vision"]["class_position"], table[0, 0])
    np.testing.assert_array_equal(tree["vision"]["position_embedding"], table[0, 1:])
    conv = up["vision_model.embeddings.patch_embedding.weight"]
    np.testing.assert_array_equal(tree["vision"]["kernel"][2, 5, 1], conv[:, 1, 2, 5])


# ---- files


def write(folder: Path, weights: dict[str, np.ndarray], shards: int = 1) -> Path:
    """The weights as one file, or dealt over shards with their index."""
    folder.mkdir(exist_ok=True)
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    index = {}
    for i in range(shards):
        part, file = dict(list(weights.items())[i::shards]), f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def edit_index(folder: Path, edit) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


CONFIG = tiny()


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_loading(tmp_path: Path, shards: int, dtype: Any) -> None:
    weights = random_upstream(CONFIG, dtype=dtype)
    folder = write(tmp_path, weights, shards)
    want = tree_from_upstream(CONFIG, weights.__getitem__)
    for given, expected in ((None, dtype), (np.float32, np.float32)):
        got = flat(load_weights(folder, CONFIG, given))
        for path, array in flat(want).items():
            assert got[path].dtype == expected and isinstance(got[path], np.ndarray)
            np.testing.assert_array_equal(got[path], array.astype(expected))


def test_tied_weights_may_carry_either_name_or_both(tmp_path: Path) -> None:
    config = variant(tie_embeddings=True)
    weights = random_upstream(config)
    want = flat(tree_from_upstream(config, weights.__getitem__))
    both = weights | {HEAD: weights[EMBEDDING]}
    for i, kept in enumerate((weights, both, {k: v for k, v in both.items() if k != EMBEDDING})):
        got = flat(load_weights(write(tmp_path / str(i), kept), config))
        assert got.keys() == want.keys() and all(np.array_equal(got[k], want[k]) for k in want)
    with pytest.raises(WeightsError, match=r"ties the embeddings, but .*output.weight differs"):
        load_weights(write(tmp_path / "other", both | {HEAD: weights[EMBEDDING] + 1}), config)


def without(weights: dict, *names: str) -> dict:
    return {k: v for k, v in weights.items() if k not in names}


GATE = LAYER.format(1) + "feed_forward_ve.w1.weight"


def test_all_differences_are_listed(tmp_path: Path) -> None:
    weights = random_upstream(CONFIG)
    broken = without(weights, GATE, "mlp1.3.bias") | {
        GATE.replace("feed_forward_ve", "feed_forward_v"): weights[GATE],
        "vision_model.encoder.layers.0.attn": np.zeros((2, 3), np.float32),
        "mlp1.1.bias": weights["mlp1.1.bias"][:-1],
    }
    with pytest.raises(WeightsError) as caught:
        load_weights(write(tmp_path, broken), CONFIG)
    message = str(caught.value)
    assert str(tmp_path) in message and "(5 differences)" in message
    for line in (
        f"missing: {GATE} [96, 64]",
        "missing: mlp1.3.bias [64]",
        f"left over: {GATE.replace('feed_forward_ve', 'feed_forward_v')} [96, 64] (did you mean {GATE}?)",
        "left over: vision_model.encoder.layers.0.attn [2, 3]",
        "wrong shape: mlp1.1.bias is [63], expected [64]",
    ):
        assert line in message


def test_a_transposed_matrix_and_a_padded_vocabulary_are_wrong_shapes(tmp_path: Path) -> None:
    weights = random_upstream(CONFIG)
    weights[GATE] = np.ascontiguousarray(weights[GATE].T)
    weights[HEAD] = np.concatenate([weights[HEAD], weights[HEAD][:84]])
    with pytest.raises(WeightsError, match=r"\[64, 96\], expected \[96, 64\](.|\n)*\[384, 64\], expected \[300, 64\]"):
        load_weights(write(tmp_path, weights), CONFIG)


def test_the_list_of_differences_ends(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"and 13 more$"):
        load_weights(write(tmp_path, {}), CONFIG)


def test_experts_that_the_config_does_not_have_are_left_over(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"left over: .*feed_forward_ve\.w1"):
        load_weights(write(tmp_path, random_upstream(CONFIG)), tiny("none"))


@pytest.mark.parametrize(
    "make", [lambda p: None, lambda p: (p / "model.ckpt").write_bytes(b"x"), lambda p: (p / "config.json").write_text("{}")]
)
def test_no_weights_at_all(tmp_path: Path, make) -> None:
    make(tmp_path)
    with pytest.raises(WeightsError, match=r"has no weights: expected model\.safetensors"):
        load_weights(tmp_path, CONFIG)
    with pytest.raises(WeightsError, match="has no weights"):
        load_weights(tmp_path / "absent", CONFIG)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = write(tmp_path, random_upstream(CONFIG), 2)
    second = folder / "model-00002-of-00002.safetensors"
    weights = random_upstream(CONFIG)
    save_file(dict(list(weights.items())[1::2]) | {GATE: weights[GATE], "mlp1.0.weight": weights["mlp1.0.weight"]}, second)
    with pytest.raises(WeightsError, match=r"00002-of-00002.*appears in two files"):
        load_weights(folder, CONFIG)


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = write(tmp_path, random_upstream(CONFIG), 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model-00002-of-00003\.safetensors is missing"):
        load_weights(folder, CONFIG)


def test_a_shard_that_lacks_what_the_index_says(tmp_path: Path) -> None:
    folder = write(tmp_path, random_upstream(CONFIG), 2)
    edit_index(folder, lambda index: index.update({"mlp1.9.weight": "model-00001-of-00002.safetensors"}))
    with pytest.raises(WeightsError, match=r"'mlp1\.9\.weight' in model-00001.*incomplete"):
        load_weights(folder, CONFIG)


def test_a_shard_with_more_than_the_index_says(tmp_path: Path) -> None:
    folder = write(tmp_path, random_upstream(CONFIG), 2)
    edit_index(folder, lambda index: index.pop(GATE))
    with pytest.raises(WeightsError, match=r"the index does not list: .*feed_forward_ve"):
        load_weights(folder, CONFIG)


@pytest.mark.parametrize("shard", ["../x", "../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", "", 3, None])
def test_an_index_that_points_elsewhere(tmp_path: Path, shard: Any) -> None:
    write(tmp_path, random_upstream(CONFIG))  # a good file one level up
    folder = write(tmp_path / "model", random_upstream(CONFIG), 2)
    edit_index(folder, lambda index: index.update({GATE: shard}))
    with pytest.raises(WeightsError, match=r"plain file names in the same folder|is missing|is no index"):
        load_weights(folder, CONFIG)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": {}}}', "\udcff", '{"weight_map": {}}'])
def test_a_broken_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(WeightsError, match=r"is no index|differences"):
        load_weights(tmp_path, CONFIG)


@pytest.mark.parametrize("size", [0, 4, 100, -1000, -1])
def test_a_truncated_file(tmp_path: Path, size: int) -> None:
    path = write(tmp_path, random_upstream(CONFIG)) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(WeightsError, match=r"model\.safetensors is no readable safetensors file .*download it again"):
        load_weights(tmp_path, CONFIG)


def test_a_header_that_lies(tmp_path: Path) -> None:
    header = json.dumps({"mlp1.0.weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(WeightsError, match="no readable safetensors file"):
        load_weights(tmp_path, CONFIG)
