"""A plain language model -> the starting point of the first training stage: `monovl convert init`.

Upstream trains from it but never released the step (Mono-InternVL section 3.2): every visual expert begins as a copy of the text expert,
the vocabulary gains the picture tokens, the patch embedding is taken from a vision model or is random, the projector is random.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
from flax import nnx

from monovl_jax.config import ModelConfig, config_to_json
from monovl_jax.convert.arrays import FLOATS, stored_dtype
from monovl_jax.convert.checkpoint import Source
from monovl_jax.convert.errors import WeightsError
from monovl_jax.convert.folders import carried_files, check_destination, new_folder
from monovl_jax.convert.importer import build, bytes_to_write
from monovl_jax.convert.key_table import key_table, leaf, upstream_shapes
from monovl_jax.convert.llm import PlainLLM, open_llm
from monovl_jax.convert.special_tokens import SPECIAL_TOKENS, add_tokens, new_ids
from monovl_jax.convert.weights import EMBEDDING, HEAD, WeightFiles
from monovl_jax.convert.workers import Progress, silent
from monovl_jax.data.tokenizer import Tokenizer
from monovl_jax.model.patch_embed import PatchEmbed
from monovl_jax.model.projector import Projector

EMBEDDING_STD = 0.02

_VISION = "vision_model."


def _random_vision(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Patch embedding and projector as a fresh model has them, in float32 under released names."""
    rngs, v = nnx.Rngs(seed), config.vision
    tree = {
        "vision": nnx.to_pure_dict(nnx.state(PatchEmbed(v, rngs))),
        "projector": nnx.to_pure_dict(nnx.state(Projector(v.hidden_size * v.shuffle**2, config.decoder.hidden_size, rngs))),
    }
    rows = [row for row in key_table(config) if row.paths[0].split("/")[0] in tree]
    return {row.name: np.asarray(row.save(*(np.asarray(leaf(tree, path)) for path in row.paths))) for row in rows}


def _vision_tensors(folder: Path, config: ModelConfig) -> dict[str, np.ndarray]:
    """The patch embedding of a released folder: `vision_model.embeddings.*` of a whole model, or `embeddings.*` of a vision model."""
    files, tensors = WeightFiles(folder), {}
    for name, shape in upstream_shapes(config).items():
        if name.startswith(_VISION):
            stored = name if name in files.shapes else name.removeprefix(_VISION)
            if files.shapes.get(stored) != shape or files.dtypes[stored] not in FLOATS:
                found = list(files.shapes[stored]) if stored in files.shapes else "absent"
                raise WeightsError(f"{folder}: {name} is {found}; a float tensor {list(shape)} is needed")
            tensors[name] = files.read(stored)
    return tensors


def _model_config(llm: PlainLLM, config: ModelConfig, vocab_size: int) -> ModelConfig:
    """`config` with the decoder of the language model. The head is of its own: new input and output rows differ."""
    wanted = config.decoder
    decoder = dataclasses.replace(
        llm.decoder,
        vocab_size=vocab_size,
        experts=wanted.experts,
        attention_expert_output=wanted.attention_expert_output,
        tie_embeddings=False,
    )
    kept = llm.raw if llm.kind == "internlm2" else {}
    section = {key: value for key, value in kept.items() if key not in ("auto_map", "_name_or_path")}
    section |= {key: llm.raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in llm.raw}
    return dataclasses.replace(config, decoder=decoder, upstream=json.dumps({"llm_config": section}))


def _source(llm: PlainLLM, config: ModelConfig, kept: int, vision: Path | None, seed: int) -> Source:
    """The tensors of the new model. kept: rows of the vocabulary that stay as they are; those after them are new."""
    rng = np.random.default_rng(seed)
    added = config.decoder.vocab_size - kept
    input_rows = rng.normal(0.0, EMBEDDING_STD, (added, config.decoder.hidden_size))
    kind = llm.dtype("model.tok_embeddings.weight")
    seen = {name: array.astype(kind) for name, array in _random_vision(config, seed).items()}
    seen |= {} if vision is None else _vision_tensors(vision, config)

    def plain(name: str) -> str:
        return re.sub(r"_ve\b", "", name.removeprefix("language_model."))

    def read(name: str) -> np.ndarray:
        if name in seen:
            return seen[name]
        array = llm.read(plain(name))
        if name in (EMBEDDING, HEAD):
            array = array[:kept]
            rows = input_rows if name == EMBEDDING else np.tile(array.mean(axis=0, dtype=np.float32), (added, 1))
            array = np.concatenate([array, rows.astype(array.dtype)])
        return array

    names = upstream_shapes(config)
    dtypes = {name: seen[name].dtype if name in seen else llm.dtype(plain(name)) for name in names}
    return Source(read, dtypes, str(llm.folder))


def init_model(
    llm: str | Path,
    dst: str | Path,
    config: ModelConfig,
    vision: str | Path | None = None,
    seed: int = 0,
    dtype: str | None = None,
    progress: Progress = silent,
) -> Path:
    """Builds an imported model that answers text as the language model does; returns `dst`.

    Args:
      llm: an InternLM2 or Qwen2 folder in the usual layout, with its tokenizer; tied embeddings become two.
      dst: new, or an empty folder.
      config: vision path, experts and tiling (`named_config("mono_internvl_2b")`); the decoder's sizes come from the language model.
      vision: a released folder whose patch embedding is taken; a random one by default.
      seed: of all that is random.
      dtype: float32, bfloat16 or float16 for every tensor; that of the language model by default.
      progress: called with bytes done and bytes in all.

    New input rows are N(0, 0.02), new output rows the mean of the others (upstream internvl_chat_finetune.py:844-851). A language model
    with more rows than its tokenizer has tokens (Qwen2) loses the rows that no token names, as upstream's does. Without tokenizer files
    the special tokens take the ids after the last row, in the order of `SPECIAL_TOKENS`.

    Raises ConfigError or WeightsError with what does not fit; nothing is written then.
    """
    llm, dst, wanted = Path(llm), Path(dst), stored_dtype(dtype)
    check_destination(dst, llm)
    plain = open_llm(llm)
    carried = [path for path in carried_files(llm) if not path.name.startswith(("modeling_", "configuration_"))]
    with_tokenizer = any(path.name in ("tokenizer.json", "tokenizer.model") for path in carried)
    kept, ids = plain.decoder.vocab_size, {name: plain.decoder.vocab_size + i for i, name in enumerate(SPECIAL_TOKENS)}
    if with_tokenizer:
        tokenizer = Tokenizer.from_folder(llm)
        kept, ids = tokenizer.vocab_size, new_ids(tokenizer)
        if kept > plain.decoder.vocab_size:
            raise WeightsError(
                f"{llm}: the tokenizer has {kept} tokens and the model {plain.decoder.vocab_size} rows; are they one model's?"
            )
    config = _model_config(plain, config, kept + len(ids))
    source = _source(plain, config, kept, None if vision is None else Path(vision), seed)
    with new_folder(dst, llm, bytes_to_write(config, source, wanted)) as folder:
        for file in carried:
            shutil.copyfile(file, folder / file.name)
        if with_tokenizer and ids:
            add_tokens(folder, ids)
        (folder / "config.json").write_text(config_to_json(config), encoding="utf-8")
        build(folder, config, source, wanted, [], "init", progress)
    return dst
