"""Configurations: released sizes, the upstream JSON in both directions, errors that name the field."""

import dataclasses
import json
from typing import Any

import pytest

from monovl_jax.config import (
    RELEASED,
    ConfigError,
    DecoderConfig,
    ModelConfig,
    RopeConfig,
    VisionConfig,
    config_from_json,
    config_to_json,
    mono_internvl_1_5_2b,
    mono_internvl_2b,
    named_config,
    read_config,
    tiny,
)


def test_the_released_2b() -> None:
    config = named_config("mono_internvl_2b")
    assert config == mono_internvl_2b()
    vision, decoder = config.vision, config.decoder
    assert (vision.hidden_size, vision.patch_size, vision.grid, vision.tokens_per_tile) == (1024, 14, 32, 256)
    assert (decoder.num_layers, decoder.hidden_size, decoder.intermediate_size) == (24, 2048, 8192)
    assert (decoder.num_heads, decoder.num_kv_heads, decoder.head_dim, decoder.queries_per_kv) == (16, 8, 128, 2)
    assert (decoder.vocab_size, decoder.padded_vocab_size) == (92_553, 92_672)
    assert decoder.rope == RopeConfig(theta=1e6, scaling="dynamic", factor=2.0) and decoder.max_position_embeddings == 32_768
    assert (decoder.rms_norm_eps, decoder.attention_bias, decoder.tie_embeddings, decoder.experts) == (1e-5, False, False, "ffn")
    assert (config.template, config.expert_of_type) == ("internlm2-chat", (0, 1, 1))


def test_the_1_5_adds_attention_experts_alone() -> None:
    config = named_config("mono_internvl_1_5_2b")
    assert config == mono_internvl_1_5_2b() and config.decoder.experts == "ffn+attention"
    assert dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, experts="ffn")) == mono_internvl_2b()


def test_names() -> None:
    assert named_config("tiny") == tiny() and named_config("tiny_1_5").decoder.experts == "ffn+attention"
    with pytest.raises(ConfigError, match=r"'mono_internvl_3b'; known: mono_internvl_2b, .*tiny"):
        named_config("mono_internvl_3b")


@pytest.mark.parametrize("vocabulary", [1, 127, 128, 129, 92_553])
def test_the_vocabulary_is_padded_to_128(vocabulary: int) -> None:
    padded = DecoderConfig(vocab_size=vocabulary).padded_vocab_size
    assert padded % 128 == 0 and 0 <= padded - vocabulary < 128


def test_configs_are_values() -> None:
    assert hash(tiny()) == hash(tiny()) and tiny() != tiny("none")
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny().template = "other"  # type: ignore[misc]


# ---- the upstream JSON

UPSTREAM: dict[str, Any] = {
    "architectures": ["InternVLChatModel"],
    "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": 448,
    "llm_config": {
        "_attn_implementation": "eager",
        "architectures": ["InternLM2VEForCausalLM"],
        "bias": False,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 32768,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 2.0, "type": "dynamic"},
        "rope_theta": 1000000,
        "temperature": 1.0,
        "vocab_size": 92553,
    },
    "max_dynamic_patch": 12,
    "min_dynamic_patch": 1,
    "ps_version": "v2",
    "select_layer": -1,
    "template": "internlm2-chat",
    "use_thumbnail": True,
    "vision_config": {"hidden_size": 1024, "image_size": 448, "model_type": "intern_vit_patch", "num_hidden_layers": 1, "patch_size": 14},
}


def changed(path: str, value: Any) -> str:
    """UPSTREAM with one field set, or left out when the value is `...`."""
    raw = json.loads(json.dumps(UPSTREAM))
    *parents, last = path.split(".")
    section = raw
    for part in parents:
        section = section[part]
    if value is ...:
        section.pop(last)
    else:
        section[last] = value
    return json.dumps(raw)


def test_reading_the_released_json() -> None:
    assert config_from_json(json.dumps(UPSTREAM)) == mono_internvl_2b()


@pytest.mark.parametrize("name", [*RELEASED, "tiny", "tiny_1_5"])
def test_ours_to_json_and_back(name: str) -> None:
    assert config_from_json(config_to_json(named_config(name))) == named_config(name)


@pytest.mark.parametrize(
    "changes",
    [
        {"vision": VisionConfig(pixel_shuffle="v1", pixel_statistics="siglip", downsample_ratio=0.25, tile_size=896)},
        {"decoder": DecoderConfig(rope=RopeConfig(theta=500.0, scaling="linear", factor=4.0), attention_bias=True, experts="none")},
        {"decoder": DecoderConfig(rope=RopeConfig(), tie_embeddings=True, rms_norm_eps=1e-6)},
        {"decoder": DecoderConfig(experts="ffn+attention", attention_expert_output=False)},
        {"template": "internvl2_5", "min_tiles": 2, "max_tiles": 40, "use_thumbnail": False},
    ],
)
def test_variants_to_json_and_back(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(ModelConfig(), **changes)
    assert config_from_json(config_to_json(config)) == config


def test_what_we_do_not_interpret_is_kept() -> None:
    raw = json.loads(json.dumps(UPSTREAM))
    raw["future"], raw["llm_config"]["future"], raw["vision_config"]["future"] = {"a": [1, None]}, "b", 3.5
    config = config_from_json(json.dumps(raw))
    written = json.loads(config_to_json(dataclasses.replace(config, template="other")))
    assert written["template"] == "other"

    def kept(old: dict, new: dict) -> None:
        for key, value in old.items():
            if isinstance(value, dict):
                kept(value, new[key])
            elif key != "template":
                assert new[key] == value, key

    kept(raw, written)


def test_switching_experts_leaves_no_stale_field() -> None:
    config = config_from_json(changed("llm_config.use_attention_ve", True))
    assert config.decoder.experts == "ffn+attention"
    plain = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, experts="ffn"))
    assert config_from_json(config_to_json(plain)) == plain


def test_absent_fields_take_upstreams_class_defaults() -> None:
    raw = {
        "llm_config": {"architectures": ["InternLM2VEForCausalLM"]},
        "vision_config": {"model_type": "intern_vit_patch", "image_size": 448, "patch_size": None},
    }
    config = config_from_json(json.dumps(raw))
    d, v = config.decoder, config.vision
    assert (d.vocab_size, d.hidden_size, d.intermediate_size, d.num_layers) == (103_168, 4096, 11_008, 32)
    assert (d.num_heads, d.num_kv_heads, d.rms_norm_eps, d.attention_bias) == (32, 32, 1e-6, True)
    assert d.rope == RopeConfig(theta=10_000.0) and d.max_position_embeddings == 2048
    assert (v.hidden_size, v.patch_size, v.tile_size, v.pixel_shuffle, v.pixel_statistics) == (3200, 14, 448, "v1", "imagenet")
    assert (config.min_tiles, config.max_tiles, config.use_thumbnail) == (1, 1, False)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("vision_config", ...),
        ("vision_config", 3),
        ("vision_config.model_type", "intern_vit_6b"),
        ("vision_config.model_type", ...),
        ("vision_config.hidden_size", 0),
        ("vision_config.hidden_size", "1024"),
        ("vision_config.patch_size", -14),
        ("vision_config.patch_size", 0),
        ("vision_config.image_size", 7),
        ("vision_config.image_size", 448.5),
        ("llm_config", ...),
        ("llm_config", []),
        ("llm_config.architectures", ["LlamaForCausalLM"]),
        ("llm_config.architectures", 3),
        ("llm_config.architectures", {"a": 1}),
        ("llm_config.hidden_act", "gelu"),
        ("llm_config.vocab_size", 0),
        ("llm_config.vocab_size", True),
        ("llm_config.hidden_size", 2050),
        ("llm_config.intermediate_size", -1),
        ("llm_config.num_hidden_layers", 0),
        ("llm_config.num_attention_heads", 0),
        ("llm_config.num_attention_heads", 2048),
        ("llm_config.num_key_value_heads", 5),
        ("llm_config.max_position_embeddings", 0),
        ("llm_config.rms_norm_eps", "small"),
        ("llm_config.rms_norm_eps", -1e-5),
        ("llm_config.rope_theta", 0),
        ("llm_config.rope_theta", float("nan")),
        ("llm_config.rope_theta", []),
        ("llm_config.rope_scaling", 2.0),
        ("llm_config.rope_scaling", {"type": "dynamic"}),
        ("llm_config.rope_scaling", {"factor": 2.0}),
        ("llm_config.rope_scaling", {"type": "yarn", "factor": 2.0}),
        ("llm_config.rope_scaling", {"type": "dynamic", "factor": 0.5}),
        ("llm_config.rope_scaling", {"type": "dynamic", "factor": "large"}),
        ("llm_config.rope_scaling", {"type": "dynamic", "factor": None}),
        ("llm_config.rope_scaling", {"type": "dynamic", "factor": float("nan")}),
        ("llm_config.bias", "yes"),
        ("llm_config.tie_word_embeddings", 1),
        ("llm_config.use_attention_ve", "yes"),
        ("llm_config.attention_ve_output", "no"),
        ("downsample_ratio", 0.3),
        ("downsample_ratio", 0),
        ("downsample_ratio", "half"),
        ("force_image_size", 450 - 14),
        ("force_image_size", "448"),
        ("ps_version", "v3"),
        ("normalize_type", "openai"),
        ("select_layer", -2),
        ("template", 3),
        ("min_dynamic_patch", 0),
        ("max_dynamic_patch", 0),
        ("use_thumbnail", "no"),
    ],
)
def test_a_bad_field_is_named(path: str, value: Any) -> None:
    """By its name in the file, or in the words of our own field."""
    ours = {
        "image_size": "image_size|position_image_size",
        "force_image_size": "force_image_size|tile_size|a tile of",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads|num_attention_heads|head size",
        "num_key_value_heads": "kv heads",
        "hidden_size": "hidden.size",
        "min_dynamic_patch": "min 0",
        "max_dynamic_patch": "max 0",
        "rope_theta": "rope.theta|NaN is no number",
        "rope_scaling": "rope_scaling|rope.factor|NaN is no number",
    }
    name = path.rsplit(".", 1)[-1]
    with pytest.raises(ConfigError, match=ours.get(name, name)):
        config_from_json(changed(path, value))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"vision_config": {}}', "null"])
def test_a_file_that_is_no_config(text: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        config_from_json(text)


def test_reading_a_folder(tmp_path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(json.dumps(UPSTREAM).encode() + b"\xff")
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(UPSTREAM))
    assert read_config(str(tmp_path)) == mono_internvl_2b()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: RopeConfig(factor=0.9), "rope.factor"),
        (lambda: RopeConfig(theta=-1.0), "rope.theta"),
        (lambda: DecoderConfig(rms_norm_eps=0.0), "rms_norm_eps"),
        (lambda: DecoderConfig(hidden_size=24, num_heads=8, num_kv_heads=8), "head size 3 is odd"),
        (lambda: VisionConfig(tile_size=8), "tile_size"),
        (lambda: VisionConfig(position_image_size=8), "position_image_size"),
        (lambda: ModelConfig(min_tiles=3, max_tiles=2), "min 3, max 2"),
        (lambda: ModelConfig(expert_of_type=(0, 1, 2)), "expert_of_type"),
        (lambda: ModelConfig(expert_of_type=(0,)), "expert_of_type"),
    ],
)
def test_a_config_that_cannot_be_built(make, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        make()


# ---- what is in the file and would otherwise be ignored, or take all memory


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}, RopeConfig(1e6, "dynamic", 2.0)),
        ({"type": "linear", "rope_type": "linear", "factor": 4, "rope_theta": 500}, RopeConfig(500.0, "linear", 4.0)),
        ({"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0}, RopeConfig(1e6)),
        ({"rope_type": "default"}, RopeConfig(10_000.0)),
    ],
)
def test_rope_parameters_of_newer_files_are_read(parameters: dict[str, Any], expected: RopeConfig) -> None:
    raw = json.loads(json.dumps(UPSTREAM))
    del raw["llm_config"]["rope_theta"], raw["llm_config"]["rope_scaling"]
    raw["llm_config"]["rope_parameters"] = parameters
    config = config_from_json(json.dumps(raw))
    assert config.decoder.rope == expected
    assert config_from_json(config_to_json(config)) == config


def test_rope_fields_that_say_the_same_twice() -> None:
    same = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1_000_000}
    assert config_from_json(changed("llm_config.rope_parameters", same)) == mono_internvl_2b()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("llm_config.rope_parameters", {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e6}),
        ("llm_config.rope_parameters", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e5}),
        ("llm_config.rope_parameters", {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e6}),
        ("llm_config.rope_parameters", {"rope_type": "dynamic", "factor": 2.0, "beta_fast": 32}),
        ("llm_config.rope_parameters", {"rope_type": "dynamic", "type": "linear", "factor": 2.0}),
        ("llm_config.rope_parameters", [1]),
        ("llm_config.rope_scaling", {"type": "dynamic", "factor": 2.0, "attention_factor": 1.5}),
        ("llm_config.partial_rotary_factor", 0.5),
        ("llm_config.head_dim", 64),
        ("llm_config.sliding_window", 4096),
        ("llm_config.use_sliding_window", True),
        ("llm_config.layer_types", ["full_attention", "sliding_attention"]),
        ("llm_config.qk_norm", True),
        ("llm_config.attention_bias", True),
        ("llm_config.mlp_bias", True),
        ("llm_config.attn_logit_softcapping", 50.0),
        ("llm_config.final_logit_softcapping", 30.0),
        ("llm_config.residual_multiplier", 0.2),
        ("llm_config.num_experts", 8),
        ("llm_config.quantization_config", {"bits": 4}),
        ("llm_config.attention_dropout", 0.1),
        ("vision_config.num_channels", 4),
        ("vision_config.quantization_config", {"bits": 4}),
        ("quantization_config", {"bits": 4}),
        ("pad2square", True),
    ],
)
def test_a_field_that_would_change_the_computation_is_refused(path: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=path.rsplit(".", 1)[-1].replace("rope_parameters", "rope_(parameters|theta)")):
        config_from_json(changed(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("llm_config.partial_rotary_factor", 1.0),
        ("llm_config.head_dim", 128),
        ("llm_config.layer_types", ["full_attention"]),
        ("llm_config.attn_implementation", "flash_attention_2"),
        ("llm_config.attention_dropout", 0.0),
        ("llm_config.pruned_heads", {}),
        ("llm_config.rope_parameters", None),
        ("vision_config.drop_path_rate", 0.1),
        ("vision_config.norm_type", "layer_norm"),
        ("vision_config.num_channels", 3),
        ("pad2square", False),
    ],
)
def test_a_field_that_changes_nothing_is_kept(path: str, value: Any) -> None:
    assert config_from_json(changed(path, value)) == mono_internvl_2b()


def test_without_dynamic_tiling_an_image_is_one_tile() -> None:
    config = config_from_json(changed("dynamic_image_size", False))
    assert (config.min_tiles, config.max_tiles, config.dynamic_tiles) == (1, 1, False)
    written = json.loads(config_to_json(config))
    assert written["dynamic_image_size"] is False and written["max_dynamic_patch"] == 12
    assert config_from_json(json.dumps(written)) == config
    wider = dataclasses.replace(config, max_tiles=6)
    assert wider.dynamic_tiles and json.loads(config_to_json(wider))["dynamic_image_size"] is True
    assert dataclasses.replace(mono_internvl_2b(), max_tiles=1).dynamic_tiles


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("llm_config.num_hidden_layers", 10**9),
        ("llm_config.hidden_size", 2**40),
        ("llm_config.intermediate_size", 2**40),
        ("llm_config.vocab_size", 2**40),
        ("llm_config.num_attention_heads", 2**20),
        ("llm_config.num_key_value_heads", 2**20),
        ("llm_config.max_position_embeddings", 2**40),
        ("llm_config.rms_norm_eps", float("inf")),
        ("llm_config.rms_norm_eps", 10**400),
        ("llm_config.rope_theta", 10**400),
        ("llm_config.rope_scaling", {"type": "dynamic", "factor": float("inf")}),
        ("downsample_ratio", 1e-320),
        ("downsample_ratio", float("nan")),
        ("force_image_size", 10**6),
        ("vision_config.image_size", 10**6),
        ("vision_config.patch_size", 10**6),
        ("vision_config.hidden_size", 10**9),
        ("max_dynamic_patch", 1000),
        ("force_image_size", 2048 * 2),  # 12 tiles of it
    ],
)
def test_a_size_beyond_all_models_is_refused_in_one_short_sentence(path: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_json(changed(path, value))
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)
