"""Parity cases for configurations and inputs that the recorded cases leave out, made by the PyTorch twin.

The recorded cases fix what upstream computes for the released configuration. Here random tiny models vary everything else: head ratios,
biases, tied embeddings, pixel shuffles, resized position tables, rotary scaling, padding, batches, unused tiles, generation, gradients.
The twin (experiments/benchmarks/torch_twin.py) stands for upstream; it passes the recorded cases itself.

    python -m experiments.parity.variants DIR           # in the environment of the twin: torch, safetensors, numpy
    monovl parity DIR/*

Result: all 90 variants pass in float32 on the CPU (jax 0.10.2, torch 2.13.0); no difference exceeds 0.4 of its tolerance. Faults put into
the twin on purpose (another resizing, a transposed shuffle, unshifted weights, an NTK base off by one, ...) were noticed by the variants
that they touch.

Seeds are fixed: the same variant is the same case. Gradients are compared more strictly than in the recorded cases, relative to the
largest element of each array, because many of them are far smaller than the recorded cases' absolute tolerance.
"""

import argparse
import copy
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from experiments.benchmarks.torch_twin import MonoInternVL, TwinConfig, run_inputs
from experiments.parity.record import CLOSE_CALL, ImageIds, Inputs, build_inputs, expand, tolerance

IMAGE_IDS = ImageIds(start=301, context=300, end=302)
PAD_ID = 2
WORDS = (3, 300)  # ordinary tokens are drawn from here

LLM = {
    "architectures": ["InternLM2VEForCausalLM"],
    "model_type": "internlm2",
    "attn_implementation": "eager",
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD_ID,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 320,
}
VISION = {
    "architectures": ["InternVisionPatchModel"],
    "model_type": "intern_vit_patch",
    "hidden_size": 32,
    "image_size": 56,
    "patch_size": 14,
    "num_channels": 3,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
TOP = {
    "architectures": ["InternVLChatModel"],
    "model_type": "internvl_chat",
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": 56,
    "max_dynamic_patch": 6,
    "min_dynamic_patch": 1,
    "pad2square": False,
    "ps_version": "v2",
    "select_layer": -1,
    "template": "internlm2-chat",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_thumbnail": True,
}


@dataclass(frozen=True)
class Variant:
    """One case: what differs from the plain configuration, and the rows that go in.

    Attributes:
      rows: one text per row, words apart: `5` stands for five random tokens, `i3` for an image of three tiles.
      unused: places in the list of all tiles that hold a tile no row uses (image_flags 0).
      extra_padding: padded places on top of what the longest row needs, so that every row has some.
      mask_positions: give position_ids, cumsum(mask) - 1 with 1 at padding.
      positions: give these position_ids instead, one list for all rows.
      supervise: labels on that many last tokens of each row.
      weighted: give random loss weights too.
      gradients: of every parameter that takes part.
      generate: tokens to decode greedily; `plain` False leaves the logits of the plain forward out.
      eos_at: (row, step): the token that is generated there ends rows.
      first_is_image: the first generated token of row 0 is the image token itself.
      absent: fields left out of config.json, `llm_config.bias`, `ps_version`: upstream's class defaults stand for them.
      seed: of the weights and inputs; another one where a generated token leads too narrowly.
    """

    covers: str
    rows: tuple[str, ...]
    llm: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)
    unused: tuple[int, ...] = ()
    padding: str = "right"
    extra_padding: int = 0
    mask_positions: bool = False
    positions: tuple[int, ...] | None = None
    supervise: int = 0
    weighted: bool = False
    gradients: bool = False
    generate: int = 0
    eos_at: tuple[int, int] | None = None
    first_is_image: bool = False
    absent: tuple[str, ...] = ()
    seed: int = 0


def scaled(kind: str, factor: float, **other: Any) -> dict[str, Any]:
    return {"rope_scaling": {"type": kind, "factor": factor}, "rope_theta": 10000, **other}


NTK = scaled("dynamic", 2.0, max_position_embeddings=24)
QKV_EXPERT = {"use_attention_ve": True, "attention_ve_output": False}
QKVO_EXPERTS = {"use_attention_ve": True, "attention_ve_output": True}
ONE = ("6 i1 5",)
TWO = ("4 i2 3 i1 5", "7 i1 4")
TRAIN: dict[str, Any] = {"supervise": 9, "gradients": True}

VARIANTS: dict[str, Variant] = {
    # attention heads and sizes
    "mha": Variant("as many key heads as query heads", TWO, llm={"num_key_value_heads": 4}, **TRAIN),
    "mqa_8to1": Variant("eight query heads on one key head", TWO, llm={"num_attention_heads": 8, "num_key_value_heads": 1}, **TRAIN),
    "gqa_6to2": Variant(
        "three query heads per key head", TWO, llm={"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}, **TRAIN
    ),
    "gqa_8to2_generate": Variant(
        "four query heads per key head, decoding", ONE, llm={"num_attention_heads": 8, "num_key_value_heads": 2}, generate=8
    ),
    "head_dim_2": Variant("the smallest head", ONE, llm={"hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "odd_vocabulary": Variant("a vocabulary of 331 and an FFN of 83", TWO, llm={"vocab_size": 331, "intermediate_size": 83}, **TRAIN),
    "one_layer": Variant("a single layer", ONE, llm={"num_hidden_layers": 1}, **TRAIN),
    "five_layers": Variant("five layers, decoding", ONE, llm={"num_hidden_layers": 5}, generate=6),
    "rms_eps_large": Variant("rms_norm_eps 0.1, which shows", ONE, llm={"rms_norm_eps": 0.1}, **TRAIN),
    "rms_eps_small": Variant("rms_norm_eps 1e-6", ONE, llm={"rms_norm_eps": 1e-6}),
    "absent_fields": Variant(
        "fields that upstream's class defaults stand for: biases, as many key heads, eps 1e-6, theta 10000, shuffle v1",
        TWO,
        absent=(
            *(f"llm_config.{key}" for key in ("bias", "num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling")),
            "llm_config.tie_word_embeddings",
            "vision_config.patch_size",
            "ps_version",
            "downsample_ratio",
            "force_image_size",
        ),
        **TRAIN,
    ),
    # biases
    "bias": Variant("biases in wqkv and wo", TWO, llm={"bias": True}, **TRAIN),
    "bias_generate": Variant("biases, decoding", ONE, llm={"bias": True}, generate=8),
    "bias_gqa_6to2": Variant(
        "biases with three query heads per key head", ONE, llm={"bias": True, "hidden_size": 48, "num_attention_heads": 6}, **TRAIN
    ),
    "bias_qkv_expert": Variant("biases with visual wqkv only", TWO, llm={"bias": True, **QKV_EXPERT}, **TRAIN),
    "bias_qkvo_experts": Variant("biases with visual wqkv and wo", TWO, llm={"bias": True, **QKVO_EXPERTS}, **TRAIN),
    "bias_qkvo_generate": Variant("biases, attention experts, decoding", ONE, llm={"bias": True, **QKVO_EXPERTS}, generate=8, seed=1),
    # experts
    "qkv_expert_gradients": Variant("visual wqkv only, all gradients", TWO, llm=QKV_EXPERT, **TRAIN),
    "qkvo_experts_gradients": Variant("visual wqkv and wo, all gradients", TWO, llm=QKVO_EXPERTS, **TRAIN),
    "qkvo_experts_generate": Variant("attention experts, decoding", TWO[:1], llm=QKVO_EXPERTS, generate=10),
    "qkvo_experts_left_padding": Variant(
        "attention experts, batched decoding with left padding", TWO, llm=QKVO_EXPERTS, padding="left", generate=8
    ),
    "visual_supervised": Variant("labels within the image block", ("5 i2 2",), supervise=12, gradients=True),
    # head
    "tied": Variant("tied embeddings: no output.weight", TWO, llm={"tie_word_embeddings": True}, **TRAIN),
    "tied_generate": Variant("tied embeddings, decoding", ONE, llm={"tie_word_embeddings": True}, generate=8),
    "tied_bias_experts": Variant(
        "tied, biases, attention experts", TWO, llm={"tie_word_embeddings": True, "bias": True, **QKVO_EXPERTS}, **TRAIN
    ),
    # pixel shuffle
    "shuffle_v1": Variant("pixel shuffle v1: tokens column by column", TWO, top={"ps_version": "v1"}, **TRAIN),
    "shuffle_quarter": Variant(
        "downsample_ratio 0.25, four tokens per tile",
        TWO,
        top={"downsample_ratio": 0.25, "force_image_size": 112},
        vision={"image_size": 112},
        **TRAIN,
    ),
    "shuffle_quarter_v1": Variant(
        "downsample_ratio 0.25, v1",
        TWO,
        top={"downsample_ratio": 0.25, "force_image_size": 112, "ps_version": "v1"},
        vision={"image_size": 112},
    ),
    "shuffle_quarter_one_token": Variant("downsample_ratio 0.25, one token per tile", ("3 i4 2 i1 5",), top={"downsample_ratio": 0.25}),
    "shuffle_whole": Variant("downsample_ratio 1.0: a token per patch", TWO, top={"downsample_ratio": 1.0}, **TRAIN),
    "shuffle_whole_v1": Variant("downsample_ratio 1.0, v1: a transposition", ONE, top={"downsample_ratio": 1.0, "ps_version": "v1"}),
    # position table
    "positions_up": Variant("the table of 4x4 resized to 8x8", TWO, top={"force_image_size": 112}, **TRAIN),
    "positions_up_odd": Variant("the table of 3x3 resized to 4x4", TWO, vision={"image_size": 42}, **TRAIN),
    "positions_down": Variant("the table of 8x8 resized to 4x4", TWO, vision={"image_size": 112}, **TRAIN),
    "positions_down_odd": Variant("the table of 7x7 resized to 4x4", TWO, vision={"image_size": 98}, **TRAIN),
    "positions_one": Variant("a table of one patch resized to 4x4", ONE, vision={"image_size": 14}, **TRAIN),
    "patch_7": Variant("patches of seven pixels", ONE, vision={"patch_size": 7, "image_size": 28}, top={"force_image_size": 28}, **TRAIN),
    # rotary scaling
    "linear_rope": Variant("linear scaling by 4", TWO, llm=scaled("linear", 4.0), **TRAIN),
    "linear_rope_generate": Variant(
        "linear scaling by 2.5, decoding past max_position_embeddings",
        ONE,
        llm=scaled("linear", 2.5, max_position_embeddings=20),
        generate=8,
    ),
    "ntk_below": Variant("dynamic NTK, 17 tokens under a limit of 24", ONE, llm=NTK, supervise=5),
    "ntk_at_limit": Variant("dynamic NTK, as many tokens as the limit", ("6 i1 12",), llm=NTK, supervise=5),
    "ntk_one_above": Variant("dynamic NTK, one token over the limit", ("6 i1 13",), llm=NTK, supervise=5),
    "ntk_above_factor_3": Variant(
        "dynamic NTK, factor 3, 41 tokens", ("6 i3 21",), llm=scaled("dynamic", 3.0, max_position_embeddings=16), **TRAIN
    ),
    "ntk_crossing": Variant("dynamic NTK, decoding from 17 tokens past the limit of 24", ONE, llm=NTK, generate=14),
    "ntk_below_generate": Variant("dynamic NTK, decoding that stays under the limit", ("2 i1 2",), llm=NTK, generate=8),
    "ntk_batch_right": Variant("dynamic NTK, rows of 40 and 12 tokens, right padding", ("6 i2 22", "3 i1 3"), llm=NTK, **TRAIN),
    "ntk_batch_right_positions": Variant("the same with position_ids", ("6 i2 22", "3 i1 3"), llm=NTK, mask_positions=True, supervise=5),
    "ntk_left": Variant("dynamic NTK, rows of 40 and 12 tokens, left padding", ("6 i2 22", "3 i1 3"), llm=NTK, padding="left", supervise=5),
    "ntk_left_positions": Variant(
        "the same with position_ids", ("6 i2 22", "3 i1 3"), llm=NTK, padding="left", mask_positions=True, supervise=5
    ),
    "ntk_left_generate": Variant(
        "dynamic NTK above the limit, batched decoding, left padding", ("6 i2 22", "3 i1 3"), llm=NTK, padding="left", generate=8
    ),
    "ntk_left_crossing": Variant(
        "rows of 20 and 12 tokens cross the limit together while decoding", ("9 i1 5", "3 i1 3"), llm=NTK, padding="left", generate=10
    ),
    "ntk_padding_counts_right": Variant(
        "17 tokens under the limit, with padding over it: the padding counts", ONE, llm=NTK, extra_padding=13, **TRAIN
    ),
    "ntk_padding_counts_left": Variant(
        "the same, left padding and position_ids", ONE, llm=NTK, padding="left", extra_padding=13, mask_positions=True, **TRAIN
    ),
    "ntk_padding_counts_generate": Variant(
        "the same while decoding", ("6 i1 5", "2 i1 4"), llm=NTK, padding="left", extra_padding=13, generate=8
    ),
    "ntk_padding_crosses": Variant(
        "decoding crosses the limit because of the padding alone", ONE, llm=NTK, padding="left", extra_padding=4, generate=6
    ),
    "ntk_experts_crossing": Variant(
        "attention experts and biases while crossing the limit", ONE, llm={**NTK, **QKVO_EXPERTS, "bias": True}, generate=14
    ),
    "theta_10000": Variant("rope_theta 10000", ONE, llm={"rope_theta": 10000}, **TRAIN),
    # tiles and rows
    "seven_tiles": Variant("seven tiles in one image", ("4 i7 6",), **TRAIN),
    "many_images": Variant("four images in one row", ("2 i1 3 i2 1 i1 2 i3 4",), **TRAIN),
    "adjacent_images": Variant("images without text between them", ("2 i1 i2 i1 4",), **TRAIN),
    "image_first": Variant("rows that begin with an image", ("i2 6", "i1 9"), **TRAIN),
    "image_last": Variant("rows that end with an image, decoding from there", ("6 i2",), generate=6),
    "uneven_rows": Variant("one, zero, three and two tiles per row", ("5 i1 4", "9", "2 i1 3 i2 3", "4 i2 7"), **TRAIN),
    "unused_between": Variant(
        "unused tiles at the front, in the middle and at the end",
        ("5 i1 4", "9", "2 i1 3 i2 3", "4 i2 7"),
        unused=(0, 2, 3, 6, 9),
        **TRAIN,
    ),
    "unused_generate": Variant("unused tiles in the middle, decoding", ("4 i2 3", "6 i1 4"), unused=(1, 3), padding="left", generate=6),
    "all_text_batch": Variant("two rows of text, two unused tiles", ("9", "14"), unused=(0, 1), **TRAIN),
    "text_generate": Variant("decoding from text alone", ("9",), unused=(0,), generate=8, seed=1),
    "text_generate_left": Variant("batched decoding of a row of text and one with an image", ("5", "3 i2 6"), padding="left", generate=8),
    "text_generate_experts": Variant("decoding from text alone with attention experts", ("9",), llm=QKVO_EXPERTS, unused=(0,), generate=8),
    "single_token": Variant("a row of one token beside a longer one", ("1", "3 i1 4"), padding="left", generate=6),
    # padding and positions
    "left": Variant("left padding, positions that count it", TWO, padding="left", **TRAIN),
    "left_positions": Variant("left padding with position_ids", TWO, padding="left", mask_positions=True, **TRAIN),
    "left_all": Variant("left padding in every row, decoding", ("4 i2 3", "6"), padding="left", extra_padding=5, generate=8),
    "right_all": Variant("right padding in every row", ("4 i2 3", "6"), extra_padding=5, **TRAIN),
    "right": Variant("right padding, three rows", ("4 i2 3", "9", "2 i1 12"), **TRAIN),
    "right_positions": Variant("right padding with position_ids", ("4 i2 3", "9", "2 i1 12"), mask_positions=True, **TRAIN),
    "given_positions": Variant(
        "positions with gaps and a restart", ONE, positions=(0, 1, 2, 5, 9, 10, 11, 12, 13, 14, 40, 0, 1, 2, 3, 3, 7), **TRAIN
    ),
    # losses
    "weighted": Variant("weighted loss", TWO, supervise=9, weighted=True),
    "weighted_left": Variant("weighted loss, left padding", TWO, padding="left", mask_positions=True, supervise=9, weighted=True),
    "weighted_uneven": Variant("weighted loss, rows with and without images", ("5 i1 14", "9", "2 i1 3 i2 3"), supervise=20, weighted=True),
    "one_label": Variant("a single supervised token in the batch", ("5 i1 4",), supervise=1, gradients=True),
    # generation
    "batch_left": Variant(
        "batched decoding, left padding, rows of unequal length", ("4 i2 3 i1 5", "7 i1 4", "3"), padding="left", generate=10
    ),
    "batch_equal": Variant("batched decoding, rows of equal length", ("4 i1 5", "3 i1 6"), generate=8),
    "batch_right_equal": Variant("batched decoding, three equal rows with different images", ("2 i2 3", "3 i2 2", "5 i1 4"), generate=5),
    "eos_first_row": Variant("row 0 ends early and is fed the pad token", ("4 i2 3", "7 i1 4"), padding="left", generate=10, eos_at=(0, 3)),
    "eos_last_row": Variant("row 2 ends at once", ("4 i2 3", "7 i1 4", "5"), padding="left", generate=10, eos_at=(2, 0)),
    "eos_all": Variant("a single row ends: nothing comes after", ONE, generate=10, eos_at=(0, 5)),
    "generates_image_token": Variant(
        "the first generated token is the image token: embedded and routed as text", ONE, generate=6, first_is_image=True
    ),
    "generates_image_token_experts": Variant("the same with attention experts", ONE, llm=QKVO_EXPERTS, generate=6, first_is_image=True),
    "generate_one": Variant("a single generated token", ONE, generate=1),
}


# --- making a case ----------------------------------------------------------------------------------------------------------------------


def config_of(variant: Variant) -> dict[str, Any]:
    """The variant's config.json."""
    config = {**TOP, **variant.top, "llm_config": {**LLM, **variant.llm}, "vision_config": {**VISION, **variant.vision}}
    for path in variant.absent:
        group, _, key = path.rpartition(".")
        del (config[group] if group else config)[key]
    return config


def random_model(config: TwinConfig, noise: torch.Generator) -> MonoInternVL:
    """Weights spread like those of the recorded cases, so that every part shows in the logits."""
    model = MonoInternVL(config, IMAGE_IDS.context).eval()
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=noise)
        if "norm" in name or name == "mlp1.0.weight":
            values = 1 + 0.2 * values
        elif name.endswith(("position_embedding", "class_embedding")):
            values = 0.3 * values
        elif name.endswith("patch_embedding.weight"):
            values = 0.05 * values
        else:
            values = 0.1 * values
        parameter.data.copy_(values)
    return model


def random_rows(rows: Sequence[str], tokens_per_tile: int, noise: np.random.Generator) -> tuple[list[list[int]], int]:
    """Token ids of every row and the number of tiles they use."""
    made, used = [], 0
    for row in rows:
        pieces: list[int | None] = []
        tiles = []
        for word in row.split():
            if word.startswith("i"):
                pieces.append(None)
                tiles.append(int(word[1:]))
            else:
                pieces += noise.integers(*WORDS, int(word)).tolist()
        made.append(expand(pieces, tiles, IMAGE_IDS, tokens_per_tile))
        used += sum(tiles)
    return made, used


def random_inputs(variant: Variant, config: TwinConfig, noise: np.random.Generator) -> Inputs:
    """inputs.npz of the variant."""
    rows, used = random_rows(variant.rows, config.num_image_token, noise)
    total = used + len(variant.unused)
    pixels = noise.standard_normal((total, 3, config.tile_size, config.tile_size)).astype(np.float32)
    longest = max(map(len, rows)) + variant.extra_padding
    blank = [PAD_ID] * longest  # a row that stretches the batch, and is dropped again
    inputs = build_inputs([*rows, blank], pixels, used, PAD_ID, variant.padding, 0, variant.mask_positions)
    for name in ("input_ids", "attention_mask", "position_ids"):
        if name in inputs:
            inputs[name] = inputs[name][:-1]
    inputs["image_flags"] = np.array([place not in variant.unused for place in range(total)], np.int64)
    if variant.positions is not None:
        inputs["position_ids"] = np.tile(np.array(variant.positions, np.int64), (len(rows), 1))
    if variant.supervise:
        mask = inputs["attention_mask"]
        last = mask[:, ::-1].cumsum(1)[:, ::-1]  # 1 at the last token of a row, 2 before it, ...
        supervised = (mask == 1) & (last <= variant.supervise)
        inputs["labels"] = np.where(supervised, inputs["input_ids"], -100)
        if variant.weighted:
            inputs["loss_weight"] = np.where(supervised, noise.uniform(0.2, 2.0, mask.shape), 0).astype(np.float32)
    return inputs


def compare_entry(name: str, value: np.ndarray) -> dict[str, Any]:
    """The recorder's tolerance; for gradients at most that, and no more than 2e-4 of the largest element."""
    entry = tolerance(name, value)
    if name.startswith("grad:"):
        entry["atol"] = max(1e-7, min(2e-5, 2e-4 * float(np.abs(value).max(initial=0.0))))
    return entry


def make_case(name: str, variant: Variant, folder: Path) -> None:
    """Write one case folder."""
    seed = zlib.crc32(name.encode()) + variant.seed
    noise, weights = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    raw = config_of(variant)
    config = TwinConfig.from_json(raw)
    model = random_model(config, weights)
    inputs = random_inputs(variant, config, noise)

    wanted = [f"grad:{key}" for key, _ in model.named_parameters()] if variant.gradients else []
    generate: dict[str, Any] | None = {} if variant.generate else None

    def run(chosen: MonoInternVL) -> dict[str, np.ndarray]:
        return run_inputs(chosen, inputs, generate, wanted, variant.generate, PAD_ID)

    if variant.first_is_image:
        first = int(run(model)["generated_ids"][0, 0])
        rows = model.language_model["output"].weight.data
        rows[[first, IMAGE_IDS.context]] = rows[[IMAGE_IDS.context, first]]
    if variant.eos_at is not None:
        generate = {"eos": int(run(model)["generated_ids"][variant.eos_at])}
    outputs = run(model)
    exact = run(copy.deepcopy(model).double())
    kept = inputs["attention_mask"] == 1
    if variant.generate:
        best = np.sort(outputs["gen_scores"], axis=-1)
        if (lead := float((best[..., -1] - best[..., -2]).min())) < CLOSE_CALL:
            print(f"note: {name}: a generated token leads by {lead:.1e} only; choose another seed")
        if variant.first_is_image and outputs["generated_ids"][0, 0] != IMAGE_IDS.context:
            raise ValueError(f"{name}: the first generated token is not the image token")

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    save_file(
        {key: value.detach().contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"}
    )
    np.savez(folder / "inputs.npz", **inputs, img_context_token_id=np.int64(IMAGE_IDS.context))
    np.savez(folder / "outputs.npz", **outputs)
    case = {
        "group": "mono_internvl_1_5" if config.attention_experts else "mono_internvl",
        "case": name,
        "official": False,
        "img_context_token_id": IMAGE_IDS.context,
        "img_start_token_id": IMAGE_IDS.start,
        "img_end_token_id": IMAGE_IDS.end,
        "pad_token_id": PAD_ID,
        "seed": seed,
        "num_image_token": config.num_image_token,
        "fp32_vs_fp64_max_abs_diff": {
            key: float(np.abs((value - exact[key])[kept] if key == "logits" else value - exact[key]).max(initial=0.0))
            for key, value in outputs.items()
        },
        "logits_std": float(outputs["logits"].std()),
        "generate": generate,
        "inputs": {key: list(value.shape) for key, value in inputs.items()},
        "outputs": {key: list(value.shape) for key, value in outputs.items()},
        "compare": {key: compare_entry(key, value) for key, value in outputs.items()},
        "debug_only": [],
    }
    (folder / "case.json").write_text(json.dumps(case, indent=1) + "\n", encoding="utf-8")
    (folder / "README.txt").write_text(f"{name}: {variant.covers}.\nMade by experiments/parity/variants.py; torch {torch.__version__}.\n")


def chosen(names: Sequence[str]) -> Iterator[tuple[str, Variant]]:
    for name in names or VARIANTS:
        if name not in VARIANTS:
            raise SystemExit(f"--only {name}: there is no such variant; there are {', '.join(VARIANTS)}")
        yield name, VARIANTS[name]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.parity.variants", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="where a folder per variant is written")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these variants (default: all)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name, variant in chosen(given.only):
        make_case(name, variant, given.folder / name)
        print(f"{name:32} {variant.covers}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
