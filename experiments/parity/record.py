"""Record a parity case: what a PyTorch model computes, for `monovl parity` to compare with.

Point it at a folder of released weights together with their code, say what goes in, and it writes a case folder in the format of
docs/parity.md: inputs, logits, projected visual tokens, loss, chosen gradients, greedy generation.

    python -m experiments.parity.record --model Mono-InternVL-2B --trust-remote-code --out cases/two_images \\
        --prompt "<image> and <image>: what differs?" --images a.jpg b.jpg --generate 16 --grad mlp1.1.weight

It runs in float32 on the CPU, in evaluation mode. It needs torch, transformers, numpy and pillow and imports nothing else of this
project, because upstream's code asks for an old transformers (4.37.2) that cannot share an environment with a recent JAX:

    python -m venv .venv-record && .venv-record/bin/pip install torch "transformers==4.37.2" "numpy<2" pillow sentencepiece einops timm

A prompt is taken word for word: write the chat template into it if the model is to see one. Each `<image>` stands for the next of
`--images` (a file, or `noise` for a picture made from the seed). A row without any image gets what upstream's training gives it,
one tile that is flagged as unused.
"""

import argparse
import copy
import difflib
import importlib
import inspect
import json
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

IMAGE = "<image>"
UNSUPERVISED = -100
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLOSE_CALL = 1e-3  # a smaller lead of the best token over the next may fall the other way in an honest float32 run
# What two float32 implementations of the same model agree to when its logits are of order one.
TOLERANCES = {"loss": (5e-6, 0.0), "grad": (2e-5, 1e-4), "": (2e-5, 1e-5)}


class CannotRecord(Exception):
    """A request that makes no case; the message says what to change."""


# --- inputs: numpy alone ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageIds:
    """Token ids around and in an image block: start, context * (tiles * num_image_token), end."""

    start: int
    context: int
    end: int


# The arrays of inputs.npz by name; `labels` and `position_ids` only when asked for.
Inputs = dict[str, np.ndarray]


def picture_tiles(source: str, size: int, grid: tuple[int, int], noise: np.random.Generator) -> np.ndarray:
    """Cut one picture into tiles: uint8 [columns * rows (+ 1), size, size, 3], row by row, a thumbnail last when there are several.

    Which grid a picture deserves is the data pipeline's business; here the user says it, so that a case depends on nobody's rule.
    """
    from PIL import Image, UnidentifiedImageError

    columns, rows = grid
    if source == "noise":
        picture = Image.fromarray(noise.integers(0, 256, (size, size, 3), dtype=np.uint8))
    else:
        try:
            picture = Image.open(source).convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise CannotRecord(f"--images {source}: {error}") from error
    whole = picture.resize((size * columns, size * rows), Image.Resampling.BICUBIC)
    tiles = [
        np.asarray(whole.crop((column * size, row * size, (column + 1) * size, (row + 1) * size)))
        for row in range(rows)
        for column in range(columns)
    ]
    if len(tiles) > 1:
        tiles.append(np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)))
    return np.stack(tiles)


def normalise(tiles: np.ndarray) -> np.ndarray:
    """uint8 [K, H, W, 3] to the float32 [K, 3, H, W] that upstream's models take (ImageNet statistics)."""
    mean, std = np.float32(IMAGENET_MEAN), np.float32(IMAGENET_STD)
    return ((tiles.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)


def expand(pieces: Sequence[int | None], tiles_of_images: Sequence[int], ids: ImageIds, tokens_per_tile: int) -> list[int]:
    """Token ids of a row; each None becomes the block of the next image.

    With 2 tokens per tile and one image of 3 tiles, [5, None, 6] becomes [5, start, c, c, c, c, c, c, end, 6].
    """
    images = iter(tiles_of_images)
    row: list[int] = []
    for piece in pieces:
        row += [piece] if piece is not None else [ids.start, *[ids.context] * (next(images) * tokens_per_tile), ids.end]
    return row


def build_inputs(
    rows: Sequence[Sequence[int]], pixel_values: np.ndarray, used: int, pad_id: int, padding: str, supervise: int, mask_positions: bool
) -> Inputs:
    """Pad rows of token ids into a batch.

    Args:
      rows: token ids, image blocks included.
      pixel_values: float32 [K, 3, H, W], tiles in the order of their blocks.
      used: how many of them have a block; the rest are flagged 0.
      pad_id: fills the rest of a row; its attention_mask is 0.
      padding: `right` or `left`.
      supervise: labels on that many last tokens of each row (at most half of it); 0 for no labels.
      mask_positions: give position_ids, cumsum(mask) - 1 with 1 at masked places; otherwise there are none and positions count padding.
    """
    length = max(map(len, rows))
    ids = np.full((len(rows), length), pad_id, np.int64)
    mask = np.zeros((len(rows), length), np.int64)
    labels = np.full((len(rows), length), UNSUPERVISED, np.int64)
    for number, row in enumerate(rows):
        start = length - len(row) if padding == "left" else 0
        ids[number, start : start + len(row)] = row
        mask[number, start : start + len(row)] = 1
        count = min(supervise, len(row) // 2)
        labels[number, start + len(row) - count : start + len(row)] = row[len(row) - count :]
    flags = (np.arange(len(pixel_values)) < used).astype(np.int64)
    inputs = {"pixel_values": pixel_values, "input_ids": ids, "image_flags": flags, "attention_mask": mask}
    if mask_positions:
        inputs["position_ids"] = np.where(mask == 1, mask.cumsum(1) - 1, 1)
    if supervise:
        inputs["labels"] = labels
    return inputs


def tolerance(name: str, array: np.ndarray, measured: float | None = None) -> dict[str, Any]:
    """The "compare" entry of an output.

    The usual tolerance holds for values of order one; larger ones (a released model's logits) get it times their standard
    deviation, and where the model was also run in float64 at least ten times the difference that was `measured`.
    """
    if name == "generated_ids":
        return {"exact": True}
    atol, rtol = TOLERANCES[next(kind for kind in TOLERANCES if name.startswith(kind))]
    if name != "loss":
        atol *= max(1.0, float(array.std()))
    return {"atol": max(atol, 10 * (measured or 0.0)), "rtol": rtol}


def group_of(config: dict[str, Any]) -> str:
    """The case group that upstream's config.json belongs to."""
    vision, language = config.get("vision_config", {}), config.get("llm_config", {})
    if vision.get("model_type") == "intern_vit_patch" and language.get("architectures") == ["InternLM2VEForCausalLM"]:
        return "mono_internvl_1_5" if language.get("use_attention_ve") else "mono_internvl"
    if config.get("model_type") == "internvl_chat":
        return "internvl"
    raise CannotRecord("config.json is of no known family: say which with --group")


# --- the model: torch -------------------------------------------------------------------------------------------------------------------


def load_model(folder: Path, config: dict[str, Any], arguments: argparse.Namespace) -> Any:
    """The model in float32, in evaluation mode, through transformers or through `--model-class`."""
    import torch

    if arguments.code:
        sys.path.insert(0, str(arguments.code))
    if arguments.model_class:
        module, _, name = arguments.model_class.partition(":")
        model = getattr(importlib.import_module(module), name).from_pretrained(str(folder), torch_dtype=torch.float32)
    else:
        if config.get("auto_map") and not arguments.trust_remote_code:
            raise CannotRecord(
                f"{folder} brings its own model code (auto_map in config.json): read it, then allow it with --trust-remote-code, "
                "or name a class of yours with --model-class MODULE:CLASS"
            )
        from transformers import AutoConfig, AutoModel

        settings = AutoConfig.from_pretrained(str(folder), trust_remote_code=arguments.trust_remote_code)
        if hasattr(settings, "llm_config"):
            settings.llm_config.attn_implementation = "eager"
        model = AutoModel.from_pretrained(
            str(folder), config=settings, torch_dtype=torch.float32, trust_remote_code=arguments.trust_remote_code
        )
    return model.float().eval()


def call(method: Any, given: dict[str, Any], optional: dict[str, Any]) -> Any:
    """Call with every `given` argument, and those `optional` ones that the method knows."""
    parameters = inspect.signature(method).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return method(**given, **optional)
    if unknown := sorted(set(given) - set(parameters)):
        raise CannotRecord(f"the model's {method.__name__} takes no {', '.join(unknown)}")
    return method(**given, **{name: value for name, value in optional.items() if name in parameters})


def tensors(inputs: Inputs, dtype: Any) -> dict[str, Any]:
    """Inputs as upstream's forward takes them: image_flags is a column."""
    import torch

    found = {name: torch.from_numpy(np.array(array)) for name, array in inputs.items()}
    found["pixel_values"] = found["pixel_values"].to(dtype)
    found["image_flags"] = found["image_flags"][:, None]
    return found


def run_forward(model: Any, inputs: Inputs, gradients: Sequence[str], hidden_states: bool, dtype: Any) -> dict[str, np.ndarray]:
    """logits, vit_embeds, loss (with labels), grad:NAME for each of `gradients`, hidden_i on request."""
    import torch

    parameters = dict(model.named_parameters())
    for name in gradients:
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, n=3, cutoff=0.3)
            raise CannotRecord(f"--grad {name}: the model has no such parameter" + (f"; the nearest are {', '.join(near)}" if near else ""))
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in gradients)
    given = tensors(inputs, dtype)
    with torch.set_grad_enabled(bool(gradients)):
        result = call(model.forward, given, {"output_hidden_states": hidden_states, "use_cache": False, "return_dict": True})
    with torch.no_grad():
        outputs = {"logits": result.logits, "vit_embeds": model.extract_feature(given["pixel_values"])}
    if "labels" in given:
        outputs["loss"] = result.loss
    if gradients:
        wanted = [parameters[name] for name in gradients]
        reached = result.loss.requires_grad  # false when the loss depends on none of them
        found = torch.autograd.grad(result.loss, wanted, allow_unused=True) if reached else [None] * len(wanted)
        for name, gradient in zip(gradients, found, strict=True):
            if gradient is None:
                raise CannotRecord(f"--grad {name}: the loss does not depend on this parameter")
            outputs[f"grad:{name}"] = gradient
    if hidden_states:
        outputs |= {f"hidden_{layer}": state for layer, state in enumerate(result.hidden_states or ())}
    return {name: value.detach().to(torch.float64 if dtype == torch.float64 else torch.float32).numpy() for name, value in outputs.items()}


def run_generate(model: Any, inputs: Inputs, steps: int, eos: int | None, pad_id: int) -> dict[str, np.ndarray]:
    """Greedy decoding with upstream's own generate: the new tokens, every step's logits and the lead of the best token."""
    import torch
    from transformers import GenerationConfig

    given = tensors(inputs, torch.float32)
    if not (flags := given["image_flags"][:, 0] == 1).any():
        raise CannotRecord("--generate needs an image: upstream cannot generate from text alone")
    settings = GenerationConfig(
        max_new_tokens=steps, do_sample=False, eos_token_id=eos, pad_token_id=pad_id, output_scores=True, return_dict_in_generate=True
    )
    with torch.no_grad():
        result = model.generate(
            pixel_values=given["pixel_values"][flags],
            input_ids=given["input_ids"],
            attention_mask=given["attention_mask"],
            generation_config=settings,
        )
    scores = torch.stack(tuple(result.scores)).float()
    best = scores.topk(2, dim=-1).values
    return {
        "generated_ids": result.sequences[:, -len(scores) :].numpy(),  # some versions put a BOS before the new tokens
        "gen_scores": scores.numpy(),
        "gen_top2_margin": (best[..., 0] - best[..., 1]).numpy(),
    }


# --- the command ------------------------------------------------------------------------------------------------------------------------


def read_rows(
    arguments: argparse.Namespace, config: dict[str, Any], size: int, tokens_per_tile: int
) -> tuple[list[list[int]], list[np.ndarray], ImageIds, int]:
    """Rows of token ids, the tiles of each image, the ids of image tokens, the padding id."""
    noise = np.random.default_rng(arguments.seed)
    images = [picture_tiles(source, size, grid_of(arguments.grid), noise) for source in arguments.images]
    rows = arguments.prompt or arguments.token_ids
    marks = sum(row.split().count(IMAGE) if arguments.token_ids else row.count(IMAGE) for row in rows)
    if marks != len(images):
        raise CannotRecord(f"the rows have {marks} {IMAGE} marks but --images names {len(images)}")
    counts = iter([len(tiles) for tiles in images])
    default_pad = config.get("llm_config", {}).get("pad_token_id") or 0

    if arguments.token_ids:
        if arguments.img_ids is None:
            raise CannotRecord("--token-ids needs --img-ids START CONTEXT END: there is no tokenizer to ask")
        ids = ImageIds(*arguments.img_ids)
        done = []
        for row in rows:
            pieces = [None if word == IMAGE else int(word) for word in row.split()]
            done.append(expand(pieces, [next(counts) for piece in pieces if piece is None], ids, tokens_per_tile))
        return done, images, ids, default_pad if arguments.pad_id is None else arguments.pad_id

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(arguments.model), trust_remote_code=arguments.trust_remote_code, use_fast=False)
    names = ("<img>", "<IMG_CONTEXT>", "</img>")
    ids = ImageIds(*(arguments.img_ids or tokenizer.convert_tokens_to_ids(list(names))))
    done = []
    for row in rows:
        head, *tails = row.split(IMAGE)
        blocks = [next(counts) * tokens_per_tile for _ in tails]
        text = head + "".join(names[0] + names[1] * block + names[2] + tail for block, tail in zip(blocks, tails, strict=True))
        tokens = list(tokenizer(text)["input_ids"])
        if tokens.count(ids.context) != sum(blocks):
            raise CannotRecord(f"the tokenizer of {arguments.model} does not know {names[1]} as one token (id {ids.context})")
        done.append(tokens)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else default_pad
    return done, images, ids, pad if arguments.pad_id is None else arguments.pad_id


def grid_of(text: str) -> tuple[int, int]:
    """`2x3` to (2 columns, 3 rows)."""
    columns, _, rows = text.partition("x")
    if not (columns.isdigit() and rows.isdigit() and int(columns) * int(rows)):
        raise CannotRecord(f"--grid {text}: write COLUMNSxROWS, such as 2x1")
    return int(columns), int(rows)


def place_weights(folder: Path, out: Path, how: str) -> list[str]:
    """Put config and weights beside the recorded arrays; returns the file names."""
    patterns = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
    if not any(folder.glob("*.safetensors")):
        patterns += ("pytorch_model*.bin", "pytorch_model.bin.index.json")
    placed = []
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        if how == "copy":
            shutil.copyfile(path, out / path.name)
        else:
            (out / path.name).symlink_to(path.resolve())
        placed.append(path.name)
    return placed


def libraries() -> str:
    """Versions of what computed the case."""
    found = [f"python {platform.python_version()}"]
    for name in ("torch", "transformers", "numpy", "safetensors", "pillow"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def record(arguments: argparse.Namespace) -> Path:
    """Run the model and write the case folder.

    Raises:
      CannotRecord: the arguments and the folder do not make a case.
    """
    folder, out = Path(arguments.model), Path(arguments.out)
    if not (folder / "config.json").is_file():
        raise CannotRecord(f"--model {folder}: there is no config.json in it")
    if out.exists() and any(out.iterdir()):
        raise CannotRecord(f"--out {out}: the folder is not empty; a case is recorded into a new one")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    group = arguments.group or group_of(config)

    import torch

    torch.manual_seed(arguments.seed)
    model = load_model(folder, config, arguments)
    size = config.get("force_image_size") or config["vision_config"]["image_size"]
    rows, images, ids, pad_id = read_rows(arguments, config, size, model.num_image_token)
    model.img_context_token_id = ids.context
    if arguments.generate and len({len(row) for row in rows}) > 1 and arguments.padding == "right":
        raise CannotRecord("rows of different lengths generate only with --padding left")
    if arguments.grad and not arguments.supervise:
        raise CannotRecord("--grad needs a loss: give --supervise a number of tokens")
    tiles = np.concatenate(images) if images else np.full((1, size, size, 3), 255, np.uint8)
    used = len(tiles) if images else 0
    mask_positions = arguments.positions == "mask"
    inputs = build_inputs(rows, normalise(tiles), used, pad_id, arguments.padding, arguments.supervise, mask_positions)

    outputs = run_forward(model, inputs, arguments.grad, arguments.hidden_states, torch.float32)
    debug = [name for name in outputs if name.startswith("hidden_")]
    measured: dict[str, float] = {}
    if arguments.float64:
        exact = run_forward(copy.deepcopy(model).double(), inputs, arguments.grad, False, torch.float64)
        kept = inputs["attention_mask"] == 1
        for name, value in exact.items():
            difference = np.abs(value - outputs[name])
            measured[name] = float((difference[kept] if name == "logits" else difference).max())
    generate = None
    if arguments.generate:
        outputs |= run_generate(model, inputs, arguments.generate, arguments.eos, pad_id)
        debug.append("gen_top2_margin")
        generate = {} if arguments.eos is None else {"eos": arguments.eos}
        measured["gen_scores"] = measured.get("logits", 0.0)
        if (lead := float(outputs["gen_top2_margin"].min())) < CLOSE_CALL:
            print(f"note: at one step the best token leads by {lead:.1e} only; another honest float32 run may choose the other")

    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "inputs.npz", **inputs, img_context_token_id=np.int64(ids.context))
    np.savez(out / "outputs.npz", **outputs)
    case = {
        "group": group,
        "case": out.name,
        "img_context_token_id": ids.context,
        "img_start_token_id": ids.start,
        "img_end_token_id": ids.end,
        "pad_token_id": pad_id,
        "seed": arguments.seed,
        "num_image_token": int(model.num_image_token),
        "fp32_vs_fp64_max_abs_diff": measured or None,
        "logits_std": float(outputs["logits"].std()),
        "generate": generate,
        "outputs": {name: list(value.shape) for name, value in outputs.items()},
        "inputs": {name: list(value.shape) for name, value in inputs.items()},
        "compare": {name: tolerance(name, value, measured.get(name)) for name, value in outputs.items() if name not in debug},
        "debug_only": debug,
    }
    (out / "case.json").write_text(json.dumps(case, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    placed = place_weights(folder, out, arguments.weights)
    told = [
        f"{group}/{out.name}",
        f"Recorded by experiments/parity/record.py from {folder.resolve().name} on the CPU in float32, evaluation mode.",
        *(f"Row {number}: {row}" for number, row in enumerate(arguments.prompt or arguments.token_ids)),
        f"Images: {len(images)}; tiles: {used}. Libraries: {libraries()}.",
        f"Weights ({arguments.weights}): {', '.join(placed)}.",
    ]
    (out / "README.txt").write_text("\n".join(told) + "\n", encoding="utf-8")
    for name, value in outputs.items():
        print(f"{name:60} {value.dtype!s:8} {list(value.shape)}{'  (debug only)' if name in debug else ''}")
    print(f"recorded {out}; compare with: monovl parity {out}")
    return out


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m experiments.parity.record", description=__doc__.splitlines()[0])
    add = made.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="upstream weights: config.json, safetensors or .bin, code")
    add("--out", type=Path, required=True, metavar="CASE_DIR", help="the case folder to write")
    rows = made.add_mutually_exclusive_group(required=True)
    rows.add_argument("--prompt", nargs="+", metavar="TEXT", help="one text per row, taken word for word; <image> marks an image")
    rows.add_argument("--token-ids", nargs="+", metavar="IDS", help='a row of ids each, "1 17 <image> 9", for want of a tokenizer')
    add("--images", nargs="*", default=[], metavar="FILE", help="one per <image>, in order; `noise` makes one from the seed")
    add("--grid", default="1x1", metavar="CxR", help="tiles of every image, columns x rows; more than one adds a thumbnail (default 1x1)")
    add("--padding", choices=("right", "left"), default="right", help="where short rows are padded (default right)")
    add("--positions", choices=("none", "mask"), default="none", help="mask: give position_ids that skip padding (default none)")
    add("--supervise", type=int, default=8, metavar="N", help="labels on the last N tokens of a row; 0 for no loss (default 8)")
    add("--grad", nargs="*", default=[], metavar="NAME", help="parameters whose gradients of the loss are recorded")
    add("--generate", type=int, default=0, metavar="N", help="also decode N tokens greedily")
    add("--eos", type=int, metavar="ID", help="stop generation at this token (default: never)")
    add("--img-ids", type=int, nargs=3, metavar=("START", "CONTEXT", "END"), help="ids around and in an image (default: the tokenizer's)")
    add("--pad-id", type=int, metavar="ID", help="id of padding (default: the tokenizer's, or the config's)")
    add("--hidden-states", action="store_true", help="record hidden states too, for finding a mismatch; they are not compared")
    add("--float64", action="store_true", help="run in float64 as well and widen the tolerances to ten times the difference")
    add("--group", help="group of the case (default: by config.json)")
    add("--weights", choices=("link", "copy"), default="link", help="how config and weights come into the case folder (default link)")
    add("--trust-remote-code", action="store_true", help="run the Python code that lies in the model folder")
    add("--code", type=Path, metavar="DIR", help="put this folder on the import path first, for --model-class")
    add("--model-class", metavar="MODULE:CLASS", help="load with this class instead of transformers' AutoModel")
    add("--seed", type=int, default=0)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 2 with a sentence on what is wrong."""
    try:
        record(parser().parse_args(arguments))
    except CannotRecord as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"error: {error}. Recording needs torch and transformers: see the top of this file", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
