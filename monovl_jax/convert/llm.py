"""Plain language models, InternLM2 and Qwen2, seen as the decoder of ours: one table of names, and the query heads regrouped."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monovl_jax import jsontext
from monovl_jax.config import ConfigError, DecoderConfig, config_from_json
from monovl_jax.convert.arrays import FLOATS
from monovl_jax.convert.weights import WeightFiles, compare, refuse

# InternLM2 name -> Qwen2 name, under `model.layers.N.` or at the top; wqkv is made of three, wo.bias of none
QWEN2 = {
    "model.tok_embeddings.weight": "model.embed_tokens.weight",
    "model.norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
}
QWEN2_QKV = {kind: tuple(f"self_attn.{part}_proj.{kind}" for part in "qkv") for kind in ("weight", "bias")}

_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "rms_norm_eps", "max_position_embeddings"),
)


@dataclass(frozen=True)
class PlainLLM:
    """A language model in a folder, with its tensors under InternLM2 names.

    kind: internlm2 or qwen2. decoder: its sizes, without experts. raw: its config.json. Read tensors with `read`.
    """

    folder: Path
    kind: str
    decoder: DecoderConfig
    raw: dict[str, Any]
    files: WeightFiles

    def read(self, name: str) -> np.ndarray:
        """A tensor by its InternLM2 name (`model.layers.3.attention.wqkv.weight`)."""
        embedding, head = vocabulary_names(self.kind)
        if self.kind == "internlm2":
            stored = name
        elif name.endswith("attention.wo.bias"):  # Qwen2 has none
            return np.zeros(self.decoder.hidden_size, self.dtype(name))
        elif "attention.wqkv." in name:
            layer, _, kind = name.rpartition("attention.wqkv.")
            return self._grouped([self.files.read(layer + part) for part in QWEN2_QKV[kind]])
        else:
            stored = _qwen2_name(name)
        if self.decoder.tie_embeddings and stored in (embedding, head) and stored not in self.files.shapes:
            stored = head if stored == embedding else embedding
        return self.files.read(stored)

    def dtype(self, name: str) -> np.dtype:
        """The element type of a tensor by its InternLM2 name; that of the embedding for a tensor which is not stored."""
        for stored in _stored_names(self.kind, name):
            if stored in self.files.dtypes:
                return FLOATS[self.files.dtypes[stored]]
        there = next(name for name in vocabulary_names(self.kind) if name in self.files.dtypes)
        return FLOATS[self.files.dtypes[there]]

    def _grouped(self, qkv: list[np.ndarray]) -> np.ndarray:
        """[q_0 .. q_{g-1}, k, v] per kv head, of matrices [rows, D] or biases [rows]."""
        c = self.decoder
        sizes = (c.queries_per_kv, 1, 1)
        parts = [part.reshape(c.num_kv_heads, size, c.head_dim, *part.shape[1:]) for part, size in zip(qkv, sizes, strict=True)]
        return np.concatenate(parts, axis=1).reshape(-1, *qkv[0].shape[1:])


def vocabulary_names(kind: str) -> tuple[str, str]:
    """(embedding, head) as the folder names them."""
    ours = ("model.tok_embeddings.weight", "output.weight")
    return ours if kind == "internlm2" else (QWEN2[ours[0]], QWEN2[ours[1]])


def _qwen2_name(name: str) -> str:
    if name in QWEN2:
        return QWEN2[name]
    _, _, number, part = name.split(".", 3)
    return f"model.layers.{number}.{QWEN2[part]}"


def _stored_names(kind: str, name: str) -> tuple[str, ...]:
    """What an InternLM2 name is called in the folder; three tensors for Qwen2's qkv, none for a bias that it has not."""
    if kind == "internlm2":
        return (name,)
    if "attention.wqkv." in name:
        layer, _, part = name.rpartition("attention.wqkv.")
        return tuple(layer + stored for stored in QWEN2_QKV[part])
    return () if name.endswith("attention.wo.bias") else (_qwen2_name(name),)


def _shapes(kind: str, c: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the folder with its shape."""
    d, f, e = c.hidden_size, c.intermediate_size, c.head_dim
    layer: dict[str, tuple[int, ...]] = {"attention_norm.weight": (d,), "ffn_norm.weight": (d,), "attention.wo.weight": (d, d)}
    layer |= {"feed_forward.w1.weight": (f, d), "feed_forward.w3.weight": (f, d), "feed_forward.w2.weight": (d, f)}
    if kind == "internlm2":
        rows = (c.num_heads + 2 * c.num_kv_heads) * e
        layer["attention.wqkv.weight"] = (rows, d)
        if c.attention_bias:
            layer |= {"attention.wqkv.bias": (rows,), "attention.wo.bias": (d,)}
    else:
        layer = {QWEN2[name]: shape for name, shape in layer.items()}
        heads = (c.num_heads, c.num_kv_heads, c.num_kv_heads)
        for name, bias, count in zip(QWEN2_QKV["weight"], QWEN2_QKV["bias"], heads, strict=True):
            layer |= {name: (count * e, d), bias: (count * e,)}
    embedding, head = vocabulary_names(kind)
    shapes = {embedding: (c.vocab_size, d), "model.norm.weight": (d,)}
    if not c.tie_embeddings:
        shapes[head] = (c.vocab_size, d)
    return shapes | {f"model.layers.{i}.{name}": shape for i in range(c.num_layers) for name, shape in layer.items()}


def _decoder_config(raw: dict[str, Any], kind: str, path: Path) -> DecoderConfig:
    if missing := [field for field in _FIELDS if raw.get(field) is None]:
        raise ConfigError(f"{path}: {missing[0]} is missing; give the folder of a whole language model")
    parameters = raw.get("rope_parameters")  # transformers 5 writes theta in here
    if raw.get("rope_theta") is None and not (isinstance(parameters, dict) and "rope_theta" in parameters):
        raise ConfigError(f"{path}: rope_theta is missing; give the folder of a whole language model")
    section = raw | {  # all fields, so that those which are not supported are refused
        "architectures": ["InternLM2ForCausalLM"],
        "bias": True if kind == "qwen2" else raw.get("bias", True),
    }
    vision = {"model_type": "intern_vit_patch", "image_size": 448}
    return config_from_json(json.dumps({"vision_config": vision, "llm_config": section})).decoder


def open_llm(folder: str | Path) -> PlainLLM:
    """A plain InternLM2 or Qwen2 folder, checked against its config. Raises ConfigError or WeightsError naming what does not fit."""
    folder = Path(folder)
    path = folder / "config.json"
    try:
        raw = jsontext.read(path)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give the folder of a language model") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no readable JSON ({error}); download it again") from None
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind not in ("internlm2", "qwen2"):
        raise ConfigError(f"{path}: model_type is {kind!r}; a language model of type internlm2 or qwen2 is needed")
    decoder, files = _decoder_config(raw, kind, path), WeightFiles(folder)
    for name in [name for name in files.shapes if name.endswith("rotary_emb.inv_freq")]:  # a buffer that old versions saved
        del files.shapes[name], files.dtypes[name]
    refuse(files, compare(files, _shapes(kind, decoder), vocabulary_names(kind) if decoder.tie_embeddings else None))
    return PlainLLM(folder, kind, decoder, raw, files)
