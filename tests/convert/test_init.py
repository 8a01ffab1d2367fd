"""A plain language model becomes the starting point of training: copies are copies, and text is answered as before."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from monovl_jax.config import ConfigError, ModelConfig, read_config, tiny
from monovl_jax.convert.checkpoint import flatten, load_imported
from monovl_jax.convert.errors import WeightsError
from monovl_jax.convert.exporter import export_model
from monovl_jax.convert.init import init_model
from monovl_jax.convert.special_tokens import SPECIAL_TOKENS
from monovl_jax.convert.weights import WeightFiles
from monovl_jax.data.tokenizer import Tokenizer
from monovl_jax.model import VLM, Ops
from tests.convert.helpers import ROOT, contents, random_upstream, write_model
from tests.quick import quick_jit

BF16 = np.dtype(jnp.bfloat16)
LAYERS, D, F, HEADS, KV, E, V = 2, 48, 80, 6, 2, 8, 100
COMMON = {
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "vocab_size": V,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "bos_token_id": 1,
}
TOKENIZERS = ROOT / "tests/golden/preprocess"


def qwen2(tied: bool = False) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A random Qwen2: q, k and v apart, with biases."""
    rng = np.random.default_rng(1)

    def draw(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) * 0.3).astype(np.float32)

    w = {"model.embed_tokens.weight": draw(V, D), "model.norm.weight": 0.3 + draw(D) / 10}
    if not tied:
        w["lm_head.weight"] = draw(V, D)
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        for name, rows in (("q", HEADS * E), ("k", KV * E), ("v", KV * E)):
            w |= {f"{p}self_attn.{name}_proj.weight": draw(rows, D), f"{p}self_attn.{name}_proj.bias": draw(rows)}
        w |= {f"{p}self_attn.o_proj.weight": draw(D, HEADS * E)}
        w |= {f"{p}mlp.gate_proj.weight": draw(F, D), f"{p}mlp.up_proj.weight": draw(F, D), f"{p}mlp.down_proj.weight": draw(D, F)}
        w |= {f"{p}input_layernorm.weight": 1 + draw(D), f"{p}post_attention_layernorm.weight": 1 + draw(D)}
    return {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": tied, **COMMON}, w


def internlm2() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A random InternLM2: one matrix for q, k and v with rows grouped by kv head; no biases."""
    rng = np.random.default_rng(2)

    def draw(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) * 0.3).astype(np.float32)

    w = {"model.tok_embeddings.weight": draw(V, D), "model.norm.weight": 0.3 + draw(D) / 10, "output.weight": draw(V, D)}
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        w |= {f"{p}attention.wqkv.weight": draw((HEADS + 2 * KV) * E, D), f"{p}attention.wo.weight": draw(D, HEADS * E)}
        w |= {f"{p}feed_forward.w1.weight": draw(F, D), f"{p}feed_forward.w3.weight": draw(F, D), f"{p}feed_forward.w2.weight": draw(D, F)}
        w |= {f"{p}attention_norm.weight": 1 + draw(D), f"{p}ffn_norm.weight": 1 + draw(D)}
    return {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": False, **COMMON}, w


def reference_logits(kind: str, w: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """The plain language model in float64, written from the two layouts' definitions. ids [T] -> [T, V]."""
    w = {name: a.astype(np.float64) for name, a in w.items()}
    qwen, t = kind == "qwen2", len(ids)

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + COMMON["rms_norm_eps"]) * scale

    angles = np.arange(t)[:, None] / COMMON["rope_theta"] ** (np.arange(0, E, 2) / E)
    cos, sin = (np.concatenate([f(angles)] * 2, -1)[:, None] for f in (np.cos, np.sin))

    def rotate(x: np.ndarray) -> np.ndarray:
        return x * cos + np.concatenate([-x[..., E // 2 :], x[..., : E // 2]], -1) * sin

    h = w["model.embed_tokens.weight" if qwen else "model.tok_embeddings.weight"][ids]
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        x = norm(h, w[p + ("input_layernorm" if qwen else "attention_norm") + ".weight"])
        if qwen:
            q, k, v = ((x @ w[f"{p}self_attn.{n}_proj.weight"].T + w[f"{p}self_attn.{n}_proj.bias"]).reshape(t, -1, E) for n in "qkv")
            out, mlp = w[p + "self_attn.o_proj.weight"], [w[f"{p}mlp.{n}_proj.weight"] for n in ("gate", "up", "down")]
        else:
            qkv = (x @ w[p + "attention.wqkv.weight"].T).reshape(t, KV, HEADS // KV + 2, E)
            q, k, v = qkv[:, :, :-2].reshape(t, HEADS, E), qkv[:, :, -2], qkv[:, :, -1]
            out, mlp = w[p + "attention.wo.weight"], [w[f"{p}feed_forward.{n}.weight"] for n in ("w1", "w3", "w2")]
        q, k = rotate(q), rotate(k)
        heads = []
        for j in range(HEADS):
            scores = q[:, j] @ k[:, j // (HEADS // KV)].T / np.sqrt(E)
            scores = np.where(np.tril(np.ones((t, t))) > 0, scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, j // (HEADS // KV)])
        h = h + np.concatenate(heads, -1) @ out.T
        x = norm(h, w[p + ("post_attention_layernorm" if qwen else "ffn_norm") + ".weight"])
        gate, up = x @ mlp[0].T, x @ mlp[1].T
        h = h + (gate / (1 + np.exp(-gate)) * up) @ mlp[2].T
    embedding = w["model.embed_tokens.weight" if qwen else "model.tok_embeddings.weight"]
    return norm(h, w["model.norm.weight"]) @ w.get("lm_head.weight" if qwen else "output.weight", embedding).T


def write_llm(folder: Path, raw: dict[str, Any], weights: dict[str, np.ndarray], tokenizer: str | None = None) -> Path:
    folder.mkdir()
    if tokenizer:
        for path in (TOKENIZERS / tokenizer / "tokenizer").iterdir():
            shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(weights, folder / "model.safetensors")
    return folder


def wanted(experts: Any = "ffn") -> ModelConfig:
    return dataclasses.replace(tiny(experts), template="internlm2-chat")


def logits(config: ModelConfig, params: Any, ids: np.ndarray, types: np.ndarray | None = None) -> np.ndarray:
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: VLM(config, nnx.Rngs(0))))
    batch = {
        "tokens": ids[None],
        "positions": np.arange(len(ids), dtype=np.float32)[None],
        "segment_ids": np.ones((1, len(ids)), np.int32),
    }
    batch |= {} if types is None else {"token_types": types[None]}

    def run(params: Any, batch: Any) -> jax.Array:
        model = nnx.merge(graphdef, params)
        return model.logits(model(batch, Ops())[0], Ops())

    return np.asarray(quick_jit(run)(params, batch))[0]


@pytest.mark.parametrize(
    ("kind", "experts", "tied"), [("internlm2", "ffn", False), ("qwen2", "ffn+attention", False), ("qwen2", "ffn", True)]
)
def test_text_is_answered_as_before(kind: str, experts: Any, tied: bool, tmp_path: Path) -> None:
    raw, weights = internlm2() if kind == "internlm2" else qwen2(tied)
    llm = write_llm(tmp_path / "llm", raw, weights)
    dst = init_model(llm, tmp_path / "dst", wanted(experts))
    config = read_config(dst)
    assert (config.decoder.vocab_size, config.decoder.experts, config.decoder.tie_embeddings) == (V + 9, experts, False)
    ids = np.random.default_rng(0).integers(0, V, 24).astype(np.int32)
    want = reference_logits(kind, weights, ids)
    assert want.std() > 0.3
    params = load_imported(dst, config)
    for types in (None, np.arange(24, dtype=np.int8) % 2):  # a visual expert begins as the text expert
        got = logits(config, params, ids, types)[:, : V + 9]
        np.testing.assert_allclose(got[:, :V], want, atol=1e-5, rtol=0)
        np.testing.assert_allclose(got[:, V:], np.tile(want.mean(-1, keepdims=True), (1, 9)), atol=1e-5, rtol=0)


def test_copies_are_bit_identical_and_new_rows_are_as_said(tmp_path: Path) -> None:
    raw, weights = internlm2()
    weights = {name: array.astype(BF16) for name, array in weights.items()}
    dst = init_model(write_llm(tmp_path / "llm", raw, weights), tmp_path / "dst", wanted("ffn+attention"), seed=3)
    files = WeightFiles(export_model(dst, tmp_path / "out"))
    assert set(files.dtypes.values()) == {"BF16"}
    for name, array in weights.items():
        if "layers" in name or name == "model.norm.weight":
            for copy in (name, name.replace("feed_forward.", "feed_forward_ve.").replace("wqkv", "wqkv_ve").replace("wo.", "wo_ve.")):
                assert files.read(f"language_model.{copy}").tobytes() == array.tobytes()
    table, head = files.read("language_model.model.tok_embeddings.weight"), files.read("language_model.output.weight")
    assert table[:V].tobytes() == weights["model.tok_embeddings.weight"].tobytes()
    assert head[:V].tobytes() == weights["output.weight"].tobytes()
    new = table[V:].astype(np.float32)
    assert new.shape == (9, D) and abs(new.mean()) < 0.005 and 0.018 < new.std() < 0.022 and len(np.unique(new, axis=0)) == 9
    mean = weights["output.weight"].astype(np.float32).mean(0).astype(BF16)
    assert all(row.tobytes() == mean.tobytes() for row in head[V:])
    assert np.asarray(files.read("vision_model.embeddings.patch_embedding.weight"), np.float32).std() > 0


def test_the_seed_decides_what_is_random(tmp_path: Path) -> None:
    llm = write_llm(tmp_path / "llm", *internlm2())
    trees = []
    for i, seed in enumerate((0, 0, 1)):
        dst = init_model(llm, tmp_path / str(i), wanted(), seed=seed)
        trees.append(flatten(load_imported(dst, read_config(dst))))
    differ = {path for path in trees[0] if np.asarray(trees[0][path]).tobytes() != np.asarray(trees[2][path]).tobytes()}
    assert all(np.asarray(trees[0][path]).tobytes() == np.asarray(trees[1][path]).tobytes() for path in trees[0])
    assert differ == {"vision/kernel", "vision/position_embedding", "projector/kernel1", "projector/kernel2", "decoder/embedding"}


def test_the_patch_embedding_of_a_model(tmp_path: Path) -> None:
    llm, config = write_llm(tmp_path / "llm", *internlm2()), tiny()
    weights = random_upstream(config, dtype=np.float16)
    vision = write_model(tmp_path / "vision", config, weights)
    files = WeightFiles(export_model(init_model(llm, tmp_path / "dst", wanted(), vision), tmp_path / "out"))
    for name in weights:
        if name.startswith("vision_model."):
            assert files.read(name).tobytes() == weights[name].tobytes()
    bare = {name.removeprefix("vision_model."): a for name, a in weights.items() if name.startswith("vision_model.")}
    save_file(bare | {"encoder.x": np.zeros(1, np.float32)}, vision / "model.safetensors")
    init_model(llm, tmp_path / "bare", wanted(), vision)
    bare["embeddings.patch_embedding.weight"] = np.zeros((32, 3, 14, 14), np.float32)
    save_file(bare, vision / "model.safetensors")
    with pytest.raises(WeightsError, match=r"patch_embedding\.weight is \[32, 3, 14, 14\]; a float tensor \[32, 3, 8, 8\] is needed"):
        init_model(llm, tmp_path / "never", wanted(), vision)
    assert not (tmp_path / "never").exists()


def without_picture_tokens(folder: Path) -> int:
    """Takes the nine tokens out of a tokenizer folder; returns the size of the vocabulary that is left."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {i: t for i, t in config["added_tokens_decoder"].items() if t["content"] not in SPECIAL_TOKENS}
    config["additional_special_tokens"] = [t for t in config.get("additional_special_tokens", []) if t not in SPECIAL_TOKENS]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name in ("special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            (folder / name).unlink()
    if (folder / "tokenizer.json").is_file():
        raw = json.loads((folder / "tokenizer.json").read_text())
        raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] not in SPECIAL_TOKENS]
        (folder / "tokenizer.json").write_text(json.dumps(raw))
    return Tokenizer.from_folder(folder).vocab_size


@pytest.mark.parametrize("labels", ["labels_internlm2", "labels_internvl2_5_qwentok"])
def test_the_tokenizer_gains_the_tokens(labels: str, tmp_path: Path) -> None:
    (raw, weights), sample = qwen2(), "<|im_start|>user\nWhat is 3 + 4?<|im_end|>"
    llm = write_llm(tmp_path / "llm", raw, weights, labels)
    size = without_picture_tokens(llm)
    rows = size + 13  # as Qwen2: rows that no token names
    weights["model.embed_tokens.weight"] = np.random.default_rng(0).normal(size=(rows, D)).astype(np.float32)
    weights["lm_head.weight"] = np.random.default_rng(1).normal(size=(rows, D)).astype(np.float32)
    save_file(weights, llm / "model.safetensors")
    (llm / "config.json").write_text(json.dumps(raw | {"vocab_size": rows}))
    before = Tokenizer.from_folder(llm)
    dst = init_model(llm, tmp_path / "dst", wanted())
    after, config = Tokenizer.from_folder(dst), read_config(dst)
    assert config.decoder.vocab_size == size + 9 == after.vocab_size
    assert [after.id_of(name) for name in SPECIAL_TOKENS] == list(range(size, size + 9))
    assert after.encode(sample) == before.encode(sample)
    assert after.encode("a<img><IMG_CONTEXT></img>b")[-4:-1] == [size, size + 2, size + 1]
    head = np.asarray(load_imported(dst, config)["decoder"]["head"]).T
    assert head[:size].tobytes() == weights["lm_head.weight"][:size].tobytes()
    np.testing.assert_allclose(head[size : size + 9], np.tile(weights["lm_head.weight"][:size].mean(0), (9, 1)), atol=1e-6)
    again = init_model(write_again(tmp_path, dst, config), tmp_path / "again", wanted())  # tokens that are there are not added again
    assert read_config(again).decoder.vocab_size == config.decoder.vocab_size


def write_again(tmp_path: Path, dst: Path, config: ModelConfig) -> Path:
    """A language model folder with the tokenizer of `dst`."""
    raw, weights = qwen2()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = np.ones((config.decoder.vocab_size, D), np.float32)
    llm = write_llm(tmp_path / "llm2", raw | {"vocab_size": config.decoder.vocab_size}, weights)
    for path in dst.iterdir():
        if path.name.startswith(("tokenizer", "added", "special")):
            shutil.copyfile(path, llm / path.name)
    return llm


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "llama"}, r"model_type is 'llama'; a language model of type internlm2 or qwen2"),
        ({"num_key_value_heads": None}, r"num_key_value_heads is missing"),
        ({"rope_theta": None}, r"rope_theta is missing"),
        ({"head_dim": 16}, r"head_dim is 16; it changes"),
        ({"use_sliding_window": True}, r"use_sliding_window is True"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, r"rope_scaling\.type is 'yarn'"),
        ({"vocab_size": 64}, r"wrong shape: lm_head\.weight is \[100, 48\], expected \[64, 48\]"),
        ({"num_hidden_layers": 1}, r"left over: model\.layers\.1\."),
    ],
)
def test_language_models_that_do_not_fit(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    raw, weights = qwen2()
    llm = write_llm(tmp_path / "llm", {k: v for k, v in (raw | change).items() if v is not None}, weights)
    before = contents(tmp_path)
    with pytest.raises((ConfigError, WeightsError), match=match):
        init_model(llm, tmp_path / "dst", wanted())
    assert contents(tmp_path) == before


def test_a_language_model_that_is_not_finite(tmp_path: Path) -> None:
    raw, weights = qwen2()
    weights["model.layers.1.self_attn.k_proj.weight"][3, 4] = np.nan
    llm = write_llm(tmp_path / "llm", raw, weights)
    with pytest.raises(WeightsError, match=r"layers\.1\.attention\.wqkv\.weight holds NaN"):
        init_model(llm, tmp_path / "dst", wanted())
    assert not (tmp_path / "dst").exists()
