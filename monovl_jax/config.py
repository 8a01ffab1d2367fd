"""Model configurations: frozen dataclasses, the released sizes by name, and the upstream `config.json` in both directions.

A variant is `dataclasses.replace(config, ...)`. Sources: Mono-InternVL, arXiv 2410.08202 (V1) and 2507.12566 (V1.5); field names of the
JSON from upstream `configuration_internvl_chat.py`, `configuration_internlm2.py`, `configuration_intern_vit.py`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal, get_args

from monovl_jax import jsontext

Experts = Literal["none", "ffn", "ffn+attention"]
RopeScaling = Literal["none", "linear", "dynamic"]
PixelShuffle = Literal["v1", "v2"]
PixelStatistics = Literal["imagenet", "clip", "siglip"]

VOCAB_MULTIPLE = 128


class ConfigError(ValueError):
    """A configuration that cannot be built; the message names the field and the mend."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


_LARGEST = {
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 24,
    "num_layers": 1024,
    "num_heads": 4096,
    "num_kv_heads": 4096,
    "max_position_embeddings": 1 << 30,
    "patch_size": 1024,
    "tile_size": 4096,
    "position_image_size": 4096,
    "max_tiles": 256,
    "shuffle": 64,
}
"""Far above every released model: a larger value is damage, and would take memory or time without end."""

_LARGEST_IMAGE = 1 << 26  # pixels of all tiles of one image


def _require_size(name: str, value: int, where: str) -> None:
    _require(0 < value <= _LARGEST[name], f"{where}{name} is {_shown(value)}; it must be positive, {_LARGEST[name]} at most")


def _shown(value: Any) -> str:
    """The value for a message, however long it is."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else text[:80] + "..."


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (rotate-half). `factor` applies to the `linear` and `dynamic` (NTK) scalings."""

    theta: float = 1_000_000.0
    scaling: RopeScaling = "none"
    factor: float = 1.0

    def __post_init__(self) -> None:
        _require(self.scaling in ("none", "linear", "dynamic"), f"rope.scaling is {self.scaling!r}; use 'none', 'linear' or 'dynamic'")
        _require(0 < self.theta <= 1e15, f"rope.theta is {self.theta}; it must be a positive number, 1e15 at most")
        _require(1.0 <= self.factor <= 1e6, f"rope.factor is {self.factor}; it must be a number from 1 to 1e6")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The visual tokenizer: tiles -> patches -> pixel shuffle. There is no transformer in it (V1 section 3.1)."""

    hidden_size: int = 1024
    patch_size: int = 14
    position_image_size: int = 448
    """Image size whose patch grid the stored position table covers; other grids are interpolated."""
    tile_size: int = 448
    """Side of a tile in pixels (`force_image_size`)."""
    downsample_ratio: float = 0.5
    pixel_shuffle: PixelShuffle = "v2"
    pixel_statistics: PixelStatistics = "imagenet"

    def __post_init__(self) -> None:
        for name in ("hidden_size", "patch_size", "tile_size", "position_image_size"):
            _require_size(name, getattr(self, name), "vision.")
        _require(self.pixel_shuffle in ("v1", "v2"), f"ps_version is {self.pixel_shuffle!r}; use 'v1' or 'v2'")
        _require(self.pixel_statistics in ("imagenet", "clip", "siglip"), f"pixel_statistics is {self.pixel_statistics!r}")
        smallest = 1 / _LARGEST["shuffle"]
        _require(smallest <= self.downsample_ratio <= 1, f"downsample_ratio is {self.downsample_ratio}; it must be in [{smallest}, 1]")
        _require(
            abs(self.shuffle * self.downsample_ratio - 1) < 1e-6,
            f"downsample_ratio is {self.downsample_ratio}; one over it must be a whole number",
        )
        for name, size in (("tile_size", self.tile_size), ("position_image_size", self.position_image_size)):
            _require(size >= self.patch_size, f"vision.{name} is {size}, smaller than one patch of {self.patch_size} px")
        _require(
            self.grid % self.shuffle == 0,
            f"a tile of {self.tile_size} px has {self.grid} patches a side, which is no multiple of the pixel shuffle {self.shuffle}",
        )

    @property
    def shuffle(self) -> int:
        """Patches merged per side by the pixel shuffle."""
        return round(1 / self.downsample_ratio)

    @property
    def grid(self) -> int:
        """Patches per side of a tile."""
        return self.tile_size // self.patch_size

    @property
    def position_grid(self) -> int:
        return self.position_image_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one tile (256 in the released model)."""
        return (self.grid // self.shuffle) ** 2


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The language side: an InternLM2 decoder with experts per token type."""

    vocab_size: int = 92_553
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_layers: int = 24
    num_heads: int = 16
    num_kv_heads: int = 8
    rms_norm_eps: float = 1e-5
    rope: RopeConfig = RopeConfig(scaling="dynamic", factor=2.0)
    max_position_embeddings: int = 32_768
    attention_bias: bool = False
    tie_embeddings: bool = False
    experts: Experts = "ffn"
    attention_expert_output: bool = True
    """With attention experts: whether the output projection has a visual copy beside the fused qkv (our choice: papers leave it open)."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "max_position_embeddings",
        ):
            _require_size(name, getattr(self, name), "decoder.")
        _require(0 < self.rms_norm_eps < 1, f"decoder.rms_norm_eps is {self.rms_norm_eps}; it must lie between 0 and 1")
        _require(self.hidden_size % self.num_heads == 0, f"hidden size {self.hidden_size} is no multiple of {self.num_heads} heads")
        _require(self.num_heads % self.num_kv_heads == 0, f"{self.num_heads} heads are no multiple of {self.num_kv_heads} kv heads")
        _require(self.head_dim % 2 == 0, f"head size {self.head_dim} is odd; rotary embedding needs an even one")
        _require(self.experts in ("none", "ffn", "ffn+attention"), f"experts is {self.experts!r}; use 'none', 'ffn' or 'ffn+attention'")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def queries_per_kv(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def padded_vocab_size(self) -> int:
        """Vocabulary rounded up to a multiple of 128; the extra rows are masked in logits and never exported."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One vision-language model: a vision path, a projector (its sizes follow from both sides) and a decoder."""

    vision: VisionConfig = VisionConfig()
    decoder: DecoderConfig = DecoderConfig()
    template: str = "internlm2-chat"
    min_tiles: int = 1
    max_tiles: int = 12
    use_thumbnail: bool = True
    expert_of_type: tuple[int, ...] = (0, 1, 1)
    """Expert that serves each token type: text, visual, query."""
    upstream: str = dataclasses.field(default="{}", repr=False, compare=False)
    """The JSON this config was read from, so that writing it back keeps what we do not interpret."""

    def __post_init__(self) -> None:
        _require(
            1 <= self.min_tiles <= self.max_tiles,
            f"tiles per image: min {_shown(self.min_tiles)}, max {_shown(self.max_tiles)}; need 1 <= min <= max",
        )
        _require(
            self.max_tiles <= _LARGEST["max_tiles"],
            f"max_dynamic_patch is {_shown(self.max_tiles)}; it must be {_LARGEST['max_tiles']} at most",
        )
        _require(
            self.max_tiles * self.vision.tile_size**2 <= _LARGEST_IMAGE,
            f"{self.max_tiles} tiles of {self.vision.tile_size} px are more than {_LARGEST_IMAGE} pixels an image; lower one of them",
        )
        _require(
            len(self.expert_of_type) == 3 and all(e in (0, 1) for e in self.expert_of_type),
            f"expert_of_type is {self.expert_of_type}; give expert 0 or 1 for each of text, visual and query tokens",
        )

    @property
    def dynamic_tiles(self) -> bool:
        """False where config.json says `dynamic_image_size: false`: an image is one tile, whatever a data set says."""
        return self.max_tiles > 1 or jsontext.loads(self.upstream).get("dynamic_image_size") is not False


def mono_internvl_2b() -> ModelConfig:
    """Mono-InternVL-2B as released: 253 tensors, 3,111,355,392 parameters."""
    return ModelConfig()


def mono_internvl_1_5_2b() -> ModelConfig:
    """Mono-InternVL-1.5-2B: the same with visual attention experts; 3,413,345,280 parameters by our reading of the paper."""
    return dataclasses.replace(mono_internvl_2b(), decoder=DecoderConfig(experts="ffn+attention"))


def tiny(experts: Experts = "ffn") -> ModelConfig:
    """A model of a few hundred thousand parameters for tests."""
    return ModelConfig(
        vision=VisionConfig(hidden_size=32, patch_size=8, tile_size=32, position_image_size=32),
        decoder=DecoderConfig(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=96,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            rope=RopeConfig(theta=10_000.0),
            max_position_embeddings=512,
            experts=experts,
        ),
        template="compact",
        max_tiles=4,
        use_thumbnail=False,
    )


RELEASED = {"mono_internvl_2b": mono_internvl_2b, "mono_internvl_1_5_2b": mono_internvl_1_5_2b}


def named_config(name: str) -> ModelConfig:
    """A released size or `tiny` by name. Raises ConfigError with the known names."""
    known = {**RELEASED, "tiny": tiny, "tiny_1_5": lambda: tiny("ffn+attention")}
    if name not in known:
        raise ConfigError(f"no model is called {name!r}; known: {', '.join(known)}")
    return known[name]()


# ---- the upstream config.json ------------------------------------------------------------------------------------------------------

_VE_ARCHITECTURE = "InternLM2VEForCausalLM"


def _get(section: dict[str, Any], key: str, default: Any, where: str, kind: type | tuple[type, ...]) -> Any:
    value = section.get(key, default)
    if value is None:
        value = default
    _require(
        isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool),
        f"config.json: {where}{key} is {_shown(value)}; expected {getattr(kind, '__name__', 'a number')}",
    )
    return value


def _number(section: dict[str, Any], key: str, default: float, where: str) -> float:
    """A field as a finite float."""
    value = _get(section, key, default, where, (int, float))
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    _require(math.isfinite(number), f"config.json: {where}{key} is {_shown(value)}; expected a finite number")
    return number


_READ_LLM = {
    *("attention_ve_output", "bias", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "hidden_act"),
    *("rope_parameters", "rope_scaling", "rope_theta", "use_attention_ve"),
}
_COMPUTATION = (
    *("rope", "rotary", "attention", "attn", "norm", "window", "softcap", "scal", "multipl", "bias", "expert", "moe", "quant"),
    *("dropout", "pdrop", "head", "embedding_type", "layer_types", "parallel_residual", "adapter", "chunk"),
)
_NO_COMPUTATION = ("attn_implementation", "output_attentions", "gradient", "token_id", "auto_map", "initializer", "use_flash_attn", "label")


def _refuse_unknown(section: dict[str, Any], neutral: dict[str, tuple[Any, ...]], where: str, names: tuple[str, ...]) -> None:
    """Raises ConfigError for a field that by its name changes the computation, that we do not read, and that is not switched off.

    neutral: further values of a field that change nothing. names: parts of the names that are looked at.
    """
    for key, value in section.items():
        if key in neutral and any(type(value) is type(known) and value == known for known in neutral[key]):
            continue
        if key not in neutral and (
            not any(part in key for part in names) or any(part in key for part in _NO_COMPUTATION) or (where and key in _READ_LLM)
        ):
            continue
        if value is None or value is False or (not isinstance(value, bool) and value in (0, 0.0, "", [], {})):
            continue
        raise ConfigError(f"config.json: {where}{key} is {_shown(value)}; it changes the computation and is not supported")


def _refuse_what_is_not_computed(raw: dict[str, Any], vision: dict[str, Any], llm: dict[str, Any]) -> None:
    """The fields of all three sections that we would otherwise ignore in silence. The patch embedding has no layers, so what the vision
    section says of attention, norms and dropout has no effect, upstream either."""
    neutral: dict[str, tuple[Any, ...]] = {
        "partial_rotary_factor": (1, 1.0),
        "rotary_pct": (1, 1.0),
        "pretraining_tp": (0, 1),
        "attention_bias": (True,) if llm.get("bias", True) else (),
        "position_embedding_type": ("rope", "rotary"),
        "head_dim": (0,),
        "logit_scale": (1, 1.0),
    }
    heads, width = llm.get("num_attention_heads"), llm.get("hidden_size")
    if isinstance(heads, int) and isinstance(width, int) and heads > 0 and width % heads == 0:
        neutral["head_dim"] = (width // heads,)
    layers = llm.get("layer_types")
    if isinstance(layers, list) and all(kind == "full_attention" for kind in layers):
        neutral["layer_types"] = (layers,)
    if llm.get("use_sliding_window", llm.get("model_type") != "qwen2") is False:  # then the widths say nothing
        neutral |= {key: (llm[key],) for key in ("sliding_window", "max_window_layers") if key in llm}
    _refuse_unknown(llm, neutral, "llm_config.", _COMPUTATION)
    _refuse_unknown(vision, {"num_channels": (3,)}, "vision_config.", ("quant", "rope", "rotary", "embedding_type"))
    _refuse_unknown(raw, {"pad2square": (), "quantization_config": ()}, "", ("quant",))


def config_from_json(text: str) -> ModelConfig:
    """Reads an upstream `config.json` (model type `internvl_chat` with a patch vision model and an InternLM2 decoder).

    Absent fields take the upstream class defaults, not ours. Raises ConfigError naming the field for anything not supported.
    """
    try:
        raw = jsontext.loads(text)
    except jsontext.JsonError as error:
        raise ConfigError(f"config.json is not valid JSON: {error}") from None
    _require(isinstance(raw, dict), "config.json: expected an object at the top")
    for part in ("vision_config", "llm_config"):
        _require(isinstance(raw.get(part), dict), f"config.json: {part} is missing; is this a Mono-InternVL folder?")
    vision, llm = raw["vision_config"], raw["llm_config"]

    kind = vision.get("model_type", "intern_vit_6b")
    _require(
        kind == "intern_vit_patch",
        f"config.json: vision_config.model_type is {_shown(kind)}; only 'intern_vit_patch' is supported so far",
    )
    architectures = llm.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    _require(
        architecture in (_VE_ARCHITECTURE, "InternLM2ForCausalLM"),
        f"config.json: llm_config.architectures is {_shown(architectures)}; supported: [{_VE_ARCHITECTURE!r}], ['InternLM2ForCausalLM']",
    )
    select_layer = raw.get("select_layer", -1)
    _require(
        select_layer == -1, f"config.json: select_layer is {_shown(select_layer)}; the patch embedding has no layers, so it must be -1"
    )
    activation = llm.get("hidden_act", "silu")
    _require(activation == "silu", f"config.json: llm_config.hidden_act is {_shown(activation)}; only 'silu' is supported")

    shuffle, statistics = _get(raw, "ps_version", "v1", "", str), _get(raw, "normalize_type", "imagenet", "", str)
    _require(shuffle in get_args(PixelShuffle), f"config.json: ps_version is {_shown(shuffle)}; use 'v1' or 'v2'")
    _require(
        statistics in get_args(PixelStatistics),
        f"config.json: normalize_type is {_shown(statistics)}; known pixel statistics: {', '.join(get_args(PixelStatistics))}",
    )

    _refuse_what_is_not_computed(raw, vision, llm)

    def integer(section: dict[str, Any], key: str, default: int, where: str) -> int:
        return _get(section, key, default, where, int)

    dynamic = _get(raw, "dynamic_image_size", False, "", bool)
    tiles = (integer(raw, "min_dynamic_patch", 1, ""), integer(raw, "max_dynamic_patch", 6, ""))
    image_size = integer(vision, "image_size", 224, "vision_config.")
    attention_experts = _get(llm, "use_attention_ve", False, "llm_config.", bool) or _get(raw, "use_attention_ve", False, "", bool)
    output_expert = _get(llm, "attention_ve_output", _get(raw, "attention_ve_output", True, "", bool), "llm_config.", bool)
    experts: Experts = "none" if architecture != _VE_ARCHITECTURE else "ffn+attention" if attention_experts else "ffn"
    heads = integer(llm, "num_attention_heads", 32, "llm_config.")
    return ModelConfig(
        vision=VisionConfig(
            hidden_size=integer(vision, "hidden_size", 3200, "vision_config."),
            patch_size=integer(vision, "patch_size", 14, "vision_config."),
            position_image_size=image_size,
            tile_size=integer(raw, "force_image_size", image_size, ""),
            downsample_ratio=_number(raw, "downsample_ratio", 0.5, ""),
            pixel_shuffle=shuffle,
            pixel_statistics=statistics,
        ),
        decoder=DecoderConfig(
            vocab_size=integer(llm, "vocab_size", 103_168, "llm_config."),
            hidden_size=integer(llm, "hidden_size", 4096, "llm_config."),
            intermediate_size=integer(llm, "intermediate_size", 11_008, "llm_config."),
            num_layers=integer(llm, "num_hidden_layers", 32, "llm_config."),
            num_heads=heads,
            num_kv_heads=integer(llm, "num_key_value_heads", heads, "llm_config."),
            rms_norm_eps=_number(llm, "rms_norm_eps", 1e-6, "llm_config."),
            rope=_rope_from_json(llm),
            max_position_embeddings=integer(llm, "max_position_embeddings", 2048, "llm_config."),
            attention_bias=_get(llm, "bias", True, "llm_config.", bool),
            tie_embeddings=_get(llm, "tie_word_embeddings", False, "llm_config.", bool),
            experts=experts,
            attention_expert_output=output_expert,
        ),
        template=_get(raw, "template", "internlm2-chat", "", str),
        min_tiles=tiles[0] if dynamic else 1,  # one tile is the whole image, resized
        max_tiles=tiles[1] if dynamic else 1,
        use_thumbnail=_get(raw, "use_thumbnail", False, "", bool),
        upstream=json.dumps(raw | {"dynamic_image_size": dynamic}),
    )


def _rope_from_json(llm: dict[str, Any]) -> RopeConfig:
    """From `rope_theta` and `rope_scaling`, or from the `rope_parameters` of newer transformers that hold both; they must agree."""
    sections = {name: llm[name] for name in ("rope_parameters", "rope_scaling") if llm.get(name) is not None}
    kinds = {_rope_scaling(section, name, llm) for name, section in sections.items()} or {("none", 1.0)}
    _require(len(kinds) == 1, "config.json: llm_config.rope_parameters and rope_scaling differ; make the two agree")
    places = [llm, *sections.values()]
    thetas = {_number(place, "rope_theta", 10_000, "llm_config.") for place in places if place.get("rope_theta") is not None} or {10_000.0}
    _require(len(thetas) == 1, f"config.json: llm_config.rope_theta is {' and '.join(map(str, sorted(thetas)))}; make the two agree")
    scaling, factor = kinds.pop()
    return RopeConfig(thetas.pop(), scaling, factor)


def _rope_scaling(section: Any, name: str, llm: dict[str, Any]) -> tuple[RopeScaling, float]:
    where = f"config.json: llm_config.{name}"
    _require(
        isinstance(section, dict) and ("type" in section or "rope_type" in section),
        f"{where} is {_shown(section)}; expected {{'type': 'linear' | 'dynamic', 'factor': number}}",
    )
    kind = section.get("rope_type", section.get("type"))
    _require(section.get("type", kind) == kind, f"{where} is {_shown(section)}; its type and rope_type differ")
    known = ("type", "rope_type", "factor", "rope_theta")
    neutral = {"partial_rotary_factor": (1, 1.0), "original_max_position_embeddings": (llm.get("max_position_embeddings"),)}
    _refuse_unknown({key: value for key, value in section.items() if key not in known}, neutral, f"llm_config.{name}.", ("",))
    if kind == "default":
        return "none", 1.0
    if kind not in ("linear", "dynamic"):
        raise ConfigError(f"{where}.type is {_shown(kind)}; use 'default', 'linear' or 'dynamic'")
    _require(section.get("factor") is not None, f"{where}.factor is missing; expected a number >= 1")
    return kind, _number(section, "factor", 1.0, f"llm_config.{name}.")


def config_to_json(config: ModelConfig) -> str:
    """Writes the upstream `config.json`. Fields that we do not interpret are kept from the file that was read."""
    raw = jsontext.loads(config.upstream)
    vision, decoder = config.vision, config.decoder
    tiles = {"min_dynamic_patch": config.min_tiles, "max_dynamic_patch": config.max_tiles}
    raw |= {
        "model_type": "internvl_chat",
        "architectures": raw.get("architectures", ["InternVLChatModel"]),
        "downsample_ratio": vision.downsample_ratio,
        "dynamic_image_size": config.dynamic_tiles,
        "force_image_size": vision.tile_size,
        **(tiles if config.dynamic_tiles else {}),
        "ps_version": vision.pixel_shuffle,
        "select_layer": -1,
        "template": config.template,
        "use_thumbnail": config.use_thumbnail,
    }
    if vision.pixel_statistics != "imagenet" or "normalize_type" in raw:
        raw["normalize_type"] = vision.pixel_statistics
    raw["vision_config"] = raw.get("vision_config", {}) | {
        "model_type": "intern_vit_patch",
        "num_channels": 3,
        "hidden_size": vision.hidden_size,
        "patch_size": vision.patch_size,
        "image_size": vision.position_image_size,
    }
    rope = decoder.rope
    raw["llm_config"] = raw.get("llm_config", {}) | {
        "model_type": "internlm2",
        "architectures": ["InternLM2ForCausalLM" if decoder.experts == "none" else _VE_ARCHITECTURE],
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.intermediate_size,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "rms_norm_eps": decoder.rms_norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.scaling == "none" else {"type": rope.scaling, "factor": rope.factor},
        "max_position_embeddings": decoder.max_position_embeddings,
        "bias": decoder.attention_bias,
        "tie_word_embeddings": decoder.tie_embeddings,
        "hidden_act": "silu",
    }
    for key in ("use_attention_ve", "attention_ve_output"):
        raw.pop(key, None)
        raw["llm_config"].pop(key, None)
    raw["llm_config"].pop("rope_parameters", None)  # written as rope_theta and rope_scaling, which upstream reads
    if decoder.experts == "ffn+attention":
        raw["llm_config"]["use_attention_ve"] = True
        raw["llm_config"]["attention_ve_output"] = decoder.attention_expert_output
    return json.dumps(raw, indent=2, ensure_ascii=False) + "\n"


def read_config(folder: str | Path) -> ModelConfig:
    """Reads `config.json` of a model folder."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; give a model folder in the released layout")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no UTF-8 text (byte {error.start}); download it again") from None
    return config_from_json(text)
