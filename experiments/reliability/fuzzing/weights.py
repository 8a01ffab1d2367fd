"""Readers of models: config.json, tokenizers, safetensors, imported models, plain language models, runs, recorded cases."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from experiments.reliability.fuzzing.data import anything, digest, noise, small_tokenizer
from experiments.reliability.fuzzing.mutations import on_arrays, on_bytes, on_files, on_json, on_safetensors
from experiments.reliability.fuzzing.pool import Change, Reader, Refused
from monovl_jax.config import DecoderConfig, ModelConfig, RopeConfig, VisionConfig, config_from_json, config_to_json, read_config, tiny
from monovl_jax.convert.checkpoint import load_imported
from monovl_jax.convert.importer import import_model
from monovl_jax.convert.inspect import inspect_model
from monovl_jax.convert.key_table import upstream_shapes
from monovl_jax.convert.llm import QWEN2, QWEN2_QKV, open_llm
from monovl_jax.convert.weights import load_weights
from monovl_jax.data.chat import Turn, encode_prompt, template_named
from monovl_jax.data.tiling import TilingConfig, normalize, tile_image
from monovl_jax.data.tokenizer import Tokenizer
from monovl_jax.evaluation.parity import EXPECTED_ERRORS, run_case
from monovl_jax.evaluation.parity_files import read_arrays
from monovl_jax.recipes.evip import VISUAL
from monovl_jax.training.checkpoint import load_run, load_step
from monovl_jax.training.inventory import checkpoints, verify
from monovl_jax.training.loop import train
from monovl_jax.training.stages import Recipe, Stage

GOLDEN = Path(__file__).resolve().parents[3] / "tests/golden"


def small() -> ModelConfig:
    """A model of 20,000 parameters."""
    vision = VisionConfig(hidden_size=8, patch_size=8, tile_size=16, position_image_size=16)
    decoder = DecoderConfig(
        vocab_size=110, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1,
        rope=RopeConfig(theta=10_000.0), max_position_embeddings=64,
    )  # fmt: skip
    return dataclasses.replace(tiny(), vision=vision, decoder=decoder)


def tree_digest(tree: Any) -> str:
    """Of every leaf of a nested dict, its path, dtype and bits."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return digest(*(part for path, leaf in leaves for part in (str(path), str(leaf.dtype), leaf.shape, np.asarray(leaf).view(np.uint8))))


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def make_model(folder: Path, shards: int = 2) -> None:
    """A folder in the released layout with the weights in shards."""
    (folder / "config.json").write_text(config_to_json(small()))
    (folder / "generation_config.json").write_text('{"eos_token_id": [3]}')
    small_tokenizer().save(folder)
    weights, index = random_weights(upstream_shapes(small())), {}
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return
    for number in range(shards):
        part, file = dict(list(weights.items())[number::shards]), f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


# ---- config.json -------------------------------------------------------------------------------------------------------------------


def _make_config(folder: Path) -> None:
    (folder / "config.json").write_text(config_to_json(tiny("ffn+attention")))


def _read_config(folder: Path, names: frozenset[str]) -> ModelConfig:
    config = read_config(folder)
    template_named(config.template)
    upstream_shapes(config)
    v = config.vision
    TilingConfig(v.tile_size, config.min_tiles, config.max_tiles, config.use_thumbnail, normalization=v.pixel_statistics)
    return config


def _right_config(found: ModelConfig, whole: ModelConfig, change: Change) -> str:
    return "" if config_from_json(config_to_json(found)) == found else "written and read again, the config is another"


# ---- tokenizers --------------------------------------------------------------------------------------------------------------------


def _make_sentencepiece(folder: Path) -> None:
    shutil.copytree(GOLDEN / "preprocess/labels_internlm2/tokenizer", folder, dirs_exist_ok=True)


def _make_tokenizer_json(folder: Path) -> None:
    shutil.copytree(GOLDEN / "preprocess/labels_internvl2_5_qwentok/tokenizer", folder, dirs_exist_ok=True)


_TEXTS = ("What is 1+1?", "<|im_start|>user\nHi<|im_end|>", " a  b\t\u00e9\u4e66\U0001f600 </s><s>", "<img><IMG_CONTEXT></img>")


def _read_tokenizer(folder: Path, names: frozenset[str]) -> tuple[Tokenizer, list[list[int]]]:
    tokenizer = Tokenizer.from_folder(folder)
    ids = [tokenizer.encode(text, prefix=True) for text in _TEXTS]
    for row in ids:
        tokenizer.decode(row).encode("utf-8")
        tokenizer.decode([*row, 10**6, 0], skip_special=False)
    tokenizer.fingerprint()
    with contextlib.suppress(ValueError):
        encode_prompt([Turn("user", "<image>hi")], template_named("internvl2_5"), tokenizer, [2], 3)
    tokenizer.save(folder.parent / "saved")
    return tokenizer, ids


def _right_tokenizer(found: Any, whole: Any, change: Change) -> str:
    tokenizer, ids = found
    return "" if all(0 <= number < tokenizer.vocab_size for row in ids for number in row) else "an id is not in the vocabulary"


# ---- weights -----------------------------------------------------------------------------------------------------------------------


def _read_released(folder: Path, names: frozenset[str]) -> Any:
    inspect_model(folder).text()
    config = read_config(folder)
    return config, load_weights(folder, config)


def _right_released(found: Any, whole: Any, change: Change) -> str:
    _, tree = found
    return "" if all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(tree)) else "a weight is not finite"


def _make_qwen2(folder: Path) -> None:
    c = small().decoder
    raw = {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": c.vocab_size, "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 64, "rope_theta": 10_000.0, "hidden_act": "silu", "tie_word_embeddings": False,
        "use_sliding_window": False, "sliding_window": 32,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(raw))
    d, f, e = c.hidden_size, c.intermediate_size, c.head_dim
    layer: dict[str, tuple[int, ...]] = {"attention_norm.weight": (d,), "ffn_norm.weight": (d,), "attention.wo.weight": (d, d)}
    layer |= {"feed_forward.w1.weight": (f, d), "feed_forward.w3.weight": (f, d), "feed_forward.w2.weight": (d, f)}
    shapes: dict[str, tuple[int, ...]] = {QWEN2["model.norm.weight"]: (d,)}
    shapes |= {QWEN2[name]: (c.vocab_size, d) for name in ("model.tok_embeddings.weight", "output.weight")}
    for number in range(c.num_layers):
        shapes |= {f"model.layers.{number}.{QWEN2[name]}": shape for name, shape in layer.items()}
        for name, bias, heads in zip(QWEN2_QKV["weight"], QWEN2_QKV["bias"], (2, 1, 1), strict=True):
            shapes |= {f"model.layers.{number}.{name}": (heads * e, d), f"model.layers.{number}.{bias}": (heads * e,)}
    save_file(random_weights(shapes), folder / "model.safetensors")


def _read_qwen2(folder: Path, names: frozenset[str]) -> Any:
    llm = open_llm(folder)
    wanted = ("model.tok_embeddings.weight", "output.weight", *(f"model.layers.{i}.attention.wqkv.weight" for i in range(2)))
    return [llm.read(name) for name in wanted if "output" not in name or not llm.decoder.tie_embeddings]


# ---- imported models ---------------------------------------------------------------------------------------------------------------


def _make_imported(folder: Path) -> None:
    source = folder.parent / "released"
    source.mkdir()
    make_model(source)
    import_model(source, folder)


def _read_imported(folder: Path, names: frozenset[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    refused: list[Exception] = []

    def attempt(name: str, read: Any) -> None:
        try:
            found[name] = read()
        except (ValueError, OSError) as error:
            refused.append(error)

    def inspected(path: Path) -> int:
        seen = inspect_model(path)
        seen.text()
        return len(seen.problems)

    attempt("inspect", lambda: inspected(folder))
    attempt("inspect_params", lambda: inspected(folder / "params"))
    attempt("weights", lambda: tree_digest(load_imported(folder, read_config(folder))))
    if refused:
        raise Refused(str(refused[0]), found) from refused[0]
    return found


def _right_imported(found: Any, whole: Any, change: Change) -> str:
    if "config.json" in change.names or "model.json" in change.names:  # neither is under a digest
        return ""
    if change.names and found.get("inspect") == 0 and any(name.startswith("params/") for name in change.names):
        return "`convert inspect` calls damaged weights whole"
    return "" if found.get("weights", whole["weights"]) == whole["weights"] else "damaged weights are loaded"


def _read_unverified(folder: Path, names: frozenset[str]) -> Any:
    return tree_digest(load_imported(folder, read_config(folder), verify=False))


# ---- runs --------------------------------------------------------------------------------------------------------------------------


def _make_run(folder: Path) -> None:
    from experiments.benchmarks.train_step import half_visual_batch

    config = small()
    stage = Stage("S1", VISUAL, steps=2, batch_size=2, learning_rate=1e-3, sequence_length=8, tiles_per_row=1, mixture={"noise": 1.0})

    def batches(stage: Stage, position: int) -> Iterator[dict[str, Any]]:
        while True:
            yield half_visual_batch(config, 2, 1, seed=position)
            position += 1

    recipe = Recipe("small", config, (stage,), copy_experts_before="S1")
    train(recipe, folder, batches, checkpoint_every=1, milestone_every=1, tensorboard=False, progress=False)


def _read_run(folder: Path, names: frozenset[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    refused: list[Exception] = []
    try:
        entries = checkpoints(folder)
        found["listed"] = {entry.kind for entry in entries}
        verdicts = list(verify(folder))
        found["whole"] = not any(verdict.problems for verdict in verdicts) and not any(entry.damage for entry in entries)
        if not found["whole"]:
            refused.append(ValueError("; ".join(verdict.line() for verdict in verdicts if verdict.problems) or "damage"))
    except (ValueError, OSError) as error:
        refused.append(error)
    loads = {"final": lambda: load_run(folder), "step": lambda: load_step(folder, "S1", 1)}
    for name, load in loads.items():
        try:
            config, tree = load()
            found[name] = config.decoder.rope.theta, tree_digest(tree)
        except (ValueError, OSError) as error:
            refused.append(error)
    if refused:
        raise Refused(str(refused[0]), found) from refused[0]
    return found


def _right_run(found: Any, whole: Any, change: Change) -> str:
    for name in ("final", "step"):
        if found.get(name, whole[name]) != whole[name]:
            return f"damaged parameters are loaded: {name}"
    if found.get("whole") and any(name in found["listed"] and name not in found for name in ("final", "step")):
        return "`checkpoints verify` calls whole what does not load"
    return ""


# ---- recorded cases ----------------------------------------------------------------------------------------------------------------

_ARRAYS = ("inputs.npz", "outputs.npz")


def _make_case(folder: Path) -> None:
    make_model(folder, shards=1)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    rng = np.random.default_rng(0)
    np.savez(folder / "inputs.npz", input_ids=rng.integers(0, 110, (1, 8)), attention_mask=np.ones((1, 8), np.int64))
    np.savez(folder / "outputs.npz", logits=rng.normal(size=(1, 8, 110)).astype(np.float32))
    case = {"group": "mono_internvl", "case": "x", "img_context_token_id": 6, "generate": None}
    (folder / "case.json").write_text(json.dumps(case | {"compare": {"logits": {"atol": 2e-5, "rtol": 1e-5}}}))


def _case_arrays(folder: Path, files: tuple[str, ...]) -> dict[str, str]:
    return {f"{file}/{name}": digest(array, array.dtype) for file in files for name, array in read_arrays(folder, file).items()}


def _read_case(folder: Path, names: frozenset[str]) -> Any:
    jax.clear_caches()
    checks = run_case(folder)
    return _case_arrays(folder, _ARRAYS), [(check.name, check.passed) for check in checks]


def _right_case(found: Any, whole: Any, change: Change) -> str:
    if not change.forged and any(found[0][name] != whole[0][name] for name in found[0].keys() & whole[0].keys()):
        return "a damaged array is read"
    return ""


def _make_preprocess(folder: Path) -> None:
    for name in ("grids_ties_448", "templates", "labels_internlm2", "labels_internvl2_5_qwentok"):
        shutil.copytree(GOLDEN / "preprocess" / name, folder / name)
    tiles = folder / "tiles"
    tiles.mkdir()
    image = np.asarray(noise(50, 20))
    config = TilingConfig(16, 1, 4, True, normalization="imagenet")
    made = tile_image(image, config)
    np.savez(tiles / "inputs.npz", a=image)
    values = normalize(made, "imagenet").transpose(0, 3, 1, 2)
    np.savez(tiles / "outputs.npz", a_tiles_uint8=made, a_mean_per_tile_channel=values.mean((2, 3), dtype=np.float64))
    case = {"image_size": 16, "min_num": 1, "max_num": 4, "use_thumbnail": True, "normalize_type": "imagenet", "pad2square": False}
    (tiles / "case.json").write_text(json.dumps(case | {"images": [{"image": "a", "tiles": len(made)}]}))


def _read_preprocess(folder: Path, names: frozenset[str]) -> Any:
    found = {}
    for name in sorted({name.partition("/")[0] for name in names}):
        found[name] = [(check.name, check.passed) for check in run_case(folder / name)]
    return found


_MODEL = ("config.json", "model.json", "model.safetensors.index.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
_SHARDS = tuple(f"model-{number:05}-of-00002.safetensors" for number in (1, 2))

READERS = (
    Reader("config", _make_config, _read_config, _right_config, (on_json(), on_json(), on_json(), on_bytes(), on_files())),
    Reader("sentencepiece", _make_sentencepiece, _read_tokenizer, _right_tokenizer, (on_json(), on_json(), on_bytes(), on_files())),
    Reader("tokenizer", _make_tokenizer_json, _read_tokenizer, _right_tokenizer, (on_json(), on_json(), on_json(), on_bytes(), on_files())),
    Reader(
        "safetensors", make_model, _read_released, _right_released,
        (on_safetensors(_SHARDS), on_safetensors(_SHARDS), on_bytes(_SHARDS), on_json(_MODEL[:3]), on_files(), on_bytes(_MODEL)),
    ),
    Reader(
        "language_model", _make_qwen2, _read_qwen2, anything,
        (on_safetensors(("model.safetensors",)), on_bytes(("model.safetensors",)), on_json(), on_files()),
    ),
    Reader("imported", _make_imported, _read_imported, _right_imported, (on_bytes(), on_bytes(), on_files(), on_json(), on_json(_MODEL))),
    Reader("unverified", _make_imported, _read_unverified, anything, (on_bytes(), on_bytes(), on_files(), on_json())),
    Reader("run", _make_run, _read_run, _right_run, (on_bytes(), on_bytes(), on_files(), on_json(), on_json())),
    Reader(
        "case", _make_case, _read_case, _right_case,
        (on_arrays("inputs.npz"), on_arrays("outputs.npz"), on_bytes(_ARRAYS), on_json(), on_files(forges=True), on_bytes()),
        EXPECTED_ERRORS,
    ),
    Reader(
        "preprocessing", _make_preprocess, _read_preprocess, anything,
        (on_arrays("tiles/inputs.npz"), on_arrays("labels_internlm2/outputs.npz"), on_json(), on_json(), on_bytes(), on_files()),
        EXPECTED_ERRORS,
    ),
)  # fmt: skip
