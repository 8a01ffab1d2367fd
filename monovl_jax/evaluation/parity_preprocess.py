"""Recorded preprocessing cases: tiling grids, prompt strings, ids and labels, tile arrays.

One function, `run_preprocess_case`, recognises the kind of a case by its files:

    grids.json      the tile grid for picture sizes            prompts.json   prompt strings of dialogs
    case.json       with "function": ids and labels; with "images": tiles and their normalisation

A check compares everything of one record; where a list has hundreds of records the checks are grouped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from monovl_jax import jsontext
from monovl_jax.data.chat import ChatTemplate, Role, Turn, build_prompt, encode_conversation, parse_turns, template_named
from monovl_jax.data.errors import SampleError
from monovl_jax.data.images import MAX_SIDE
from monovl_jax.data.tiling import NORMALIZATION, TilingConfig, choose_grid, count_tiles, normalize, tile_image
from monovl_jax.data.tokenizer import Tokenizer
from monovl_jax.evaluation.parity_files import case_file, read_arrays

MAX_LENGTH = 1 << 20
"""Most tokens of a recorded conversation."""

_RULES: dict[str, dict[str, bool]] = {
    "preprocess_internlm": dict(strip_text=True, empty_opens=True, ordered=True, system_turn=False),
    "preprocess_mpt": dict(strip_text=False, empty_opens=True, ordered=True, system_turn=False),
    "preprocess_phi3": dict(strip_text=False, empty_opens=True, ordered=True, system_turn=False),
    "preprocess_internvl2_5": dict(strip_text=False, empty_opens=False, ordered=False, system_turn=True),
}
"""What upstream's training functions do with the texts, whatever the template."""


@dataclass(frozen=True)
class Check:
    """One compared output: the largest absolute difference, the tolerance in words, the verdict, a remark."""

    name: str
    max_abs_diff: float
    tolerance: str
    passed: bool
    note: str = ""


def run_preprocess_case(case_dir: Path) -> list[Check]:
    """Runs one recorded case of the group `preprocess` and compares.

    Raises ValueError, in one sentence, if the folder holds no such case or one that this program does not understand.
    """
    folder = Path(case_dir)
    for name, run in (("grids.json", _run_grids), ("prompts.json", _run_prompts)):
        if case_file(folder, name).exists():
            return _guarded(folder, name, lambda folder=folder, name=name, run=run: run(_records(folder / name)))
    if not case_file(folder, "case.json").exists():
        raise ValueError(f"{folder} holds none of grids.json, prompts.json and case.json; give the folder of a recorded preprocess case.")
    case = _json(folder / "case.json")
    if not isinstance(case, dict) or not ("function" in case or "images" in case):
        raise ValueError(
            f"{folder / 'case.json'} has neither 'function' (labels) nor 'images' (tiles); it is no preprocess case known here."
        )
    run_case = _run_labels if "function" in case else _run_tiles
    return _guarded(folder, "case.json", lambda: run_case(folder, case))


def _guarded(folder: Path, name: str, run: Callable[[], list[Check]]) -> list[Check]:
    try:
        checks = run()
    except KeyError as error:
        raise ValueError(f"{folder / name} lacks or does not know {error}; record the case again with this field.") from None
    except ValueError:
        raise
    except Exception as error:  # a wrong type anywhere in what somebody else wrote
        raise ValueError(f"{folder / name} is not understood ({type(error).__name__}: {error}); record the case again.") from None
    if not checks:
        raise ValueError(f"{folder / name} compares nothing; record at least one entry.")
    return checks


def _json(path: Path) -> Any:
    try:
        return jsontext.read(path)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); record the case again.") from None


def _records(path: Path) -> list[dict]:
    records = _json(path)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path} must be a list of objects; record the case again.")
    return records


def _exact(name: str, ours: Any, theirs: Any, note: str = "") -> Check:
    """Compares integer or boolean arrays, or texts, exactly."""
    if isinstance(theirs, str):
        passed = ours == theirs
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
        return Check(
            name, 0.0 if passed else 1.0, "exact", passed, note if passed else f"first difference at character {at}. {note}".strip()
        )
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    if ours.shape != theirs.shape:
        return Check(name, float("inf"), "exact", False, f"shape {list(ours.shape)} instead of {list(theirs.shape)}. {note}".strip())
    difference = np.abs(ours.astype(np.int64) - theirs.astype(np.int64))
    return Check(name, float(difference.max(initial=0)), "exact", not difference.any(), note)


def _close(name: str, ours: np.ndarray, theirs: np.ndarray, atol: float) -> Check:
    if ours.shape != theirs.shape:
        return Check(name, float("inf"), f"atol {atol:g}", False, f"shape {list(ours.shape)} instead of {list(theirs.shape)}")
    worst = float(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max(initial=0.0))
    return Check(name, worst, f"atol {atol:g}", worst <= atol)


def _run_grids(records: list[dict]) -> list[Check]:
    groups: dict[str, list[tuple[list[int], list[int], str]]] = defaultdict(list)
    for r in records:
        config = TilingConfig(r["image_size"], r["min_num"], r["max_num"], r["use_thumbnail"])
        grid = choose_grid(r["width"], r["height"], config.min_tiles, config.max_tiles, config.tile_size)
        name = f"grids min {r['min_num']} max {r['max_num']} {'with' if r['use_thumbnail'] else 'without'} thumbnail"
        ours, theirs = [*grid, count_tiles(r["width"], r["height"], config)], [*r["grid_cols_rows"], r["tiles"]]
        groups[name].append((ours, theirs, f"{r['width']} x {r['height']}"))
    checks = []
    for name, rows in groups.items():
        wrong = [size for ours, theirs, size in rows if ours != theirs]
        note = f"wrong for {', '.join(wrong[:5])}" if wrong else f"{len(rows)} sizes"
        checks.append(_exact(name, [row[0] for row in rows], [row[1] for row in rows], note))
    return checks


def _run_prompts(records: list[dict]) -> list[Check]:
    checks = []
    for number, r in enumerate(records):
        template = template_named(r["template"])
        roles: dict[str, Role] = {
            "user": "user",
            "assistant": "assistant",
            "human": "user",
            "gpt": "assistant",
            template.user_header: "user",
        }
        roles[template.assistant_header] = "assistant"
        turns = [Turn(roles[role], text) for role, text in r["messages"]]
        name = f"{number} {r['template']} {r['dialog']}"
        checks.append(_exact(name, build_prompt(template, turns, r.get("system_override")), r["prompt"]))
        if "sep" in r and r["sep"] != template.separator:
            checks.append(_exact(f"{name} separator", template.separator, r["sep"]))
    return checks


def _run_labels(folder: Path, case: dict) -> list[Check]:
    if case["function"] not in _RULES:
        raise ValueError(f"{folder / 'case.json'}: function {case['function']!r} is unknown; known are {', '.join(_RULES)}.")
    template = replace(template_named(case["template"]), trust_control_tokens=True, **_RULES[case["function"]])
    tokenizer = Tokenizer.from_folder(folder / "tokenizer")
    checks = [_exact(f"id of {token}", tokenizer.id_of(token), index) for token, index in case.get("special_ids", {}).items()]
    _size(folder, "model_max_length", case["model_max_length"])
    outputs = read_arrays(folder, "outputs.npz")
    for record in case["cases"]:
        for slots in record["num_image_token_list"]:
            _size(folder, "num_image_token_list", slots)
        checks += _check_conversation(record, case, template, tokenizer, outputs)
    return checks


def _check_conversation(record: dict, case: dict, template: ChatTemplate, tokenizer: Tokenizer, outputs: Any) -> list[Check]:
    name, slots, limit = record["name"], record["num_image_token_list"], case["model_max_length"]
    try:
        # Upstream cuts anywhere, also inside a picture: parity needs the plain cut, data preparation refuses it.
        encoded = encode_conversation(parse_turns(record["conversation"]), template, tokenizer, slots, 1)
    except SampleError as error:
        raised = record.get("error") is not None
        return [Check(f"{name} error", 0.0 if raised else 1.0, "exact", raised, f"{'both refuse' if raised else 'refused here'}: {error}")]
    if record.get("error") is not None:
        return [Check(f"{name} error", 1.0, "exact", False, f"upstream refuses it ({record['error']}), we accept it")]
    ids, labels = encoded.ids[:limit], encoded.labels[:limit]
    padding = 0 if case.get("group_by_length", True) else limit - len(ids)
    ids = np.pad(ids, (0, padding), constant_values=case["pad_token_id"])
    labels = np.pad(labels, (0, padding), constant_values=-100)
    theirs = outputs[f"{name}/labels"].reshape(-1)
    note = f"{int((labels != -100).sum())} supervised"
    if (theirs == -100).all() and (labels != -100).any() and not _upstream_lengths_agree(case, template, tokenizer, record, encoded.ids):
        note = "upstream drops every label of this sample, because its own lengths of the pieces disagree; so do they here"
        labels = np.full_like(labels, -100)
    checks = [
        _exact(f"{name} input_ids", ids, outputs[f"{name}/input_ids"].reshape(-1), f"{len(ids)} tokens"),
        _exact(f"{name} labels", labels, theirs, note),
    ]
    if f"{name}/attention_mask" in outputs:
        checks.append(_exact(f"{name} attention_mask", ids != case["pad_token_id"], outputs[f"{name}/attention_mask"].reshape(-1)))
    return checks


def _run_tiles(folder: Path, case: dict) -> list[Check]:
    kind, thumbnail = case["normalize_type"], bool(case["use_thumbnail"])
    if kind not in NORMALIZATION:
        raise ValueError(f"{folder / 'case.json'}: normalize_type {kind!r} is unknown; known are {', '.join(NORMALIZATION)}.")
    config = TilingConfig(case["image_size"], case["min_num"], case["max_num"], thumbnail, normalization=kind)
    whole = replace(config, dynamic=False, pad2square=bool(case["pad2square"]))
    checks = []
    inputs, outputs = read_arrays(folder, "inputs.npz"), read_arrays(folder, "outputs.npz")
    for record in case["images"]:
        checks += _check_tiles(record, _as_upstream(record["image"], inputs[record["image"]]), config, whole, outputs)
    return checks


def _size(folder: Path, name: str, value: Any) -> None:
    if not isinstance(value, int) or not 0 <= value <= MAX_LENGTH:
        raise ValueError(f"{folder / 'case.json'}: {name} holds {value!r}; it must be a whole number up to {MAX_LENGTH:,}.")


def _as_upstream(name: str, array: np.ndarray) -> np.ndarray:
    """uint8[H, W, 3] of a recorded image, by Pillow's `convert("RGB")` as upstream: alpha is dropped, values over 255 are cut.

    array: uint8 [H, W], [H, W, 1], [H, W, 2] (grey and alpha), [H, W, 3] or [H, W, 4] (RGBA), or uint16 [H, W]. Raises ValueError else.
    """
    grey = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    known = (array.dtype == np.uint8 and (grey.ndim == 2 or (grey.ndim == 3 and grey.shape[2] in (2, 3, 4)))) or (
        array.dtype == np.uint16 and grey.ndim == 2
    )
    if not known or not grey.size or max(grey.shape[:2]) > MAX_SIDE:
        raise ValueError(f"the image {name!r} is {array.dtype}{list(array.shape)}; record uint8 grey, RGB or RGBA, or uint16 grey.")
    return np.asarray(Image.fromarray(grey).convert("RGB"))


def _check_tiles(record: dict, image: np.ndarray, config: TilingConfig, whole: TilingConfig, outputs: Any) -> list[Check]:
    name, kind = record["image"], config.normalization
    tiles = tile_image(image, config)
    values = normalize(tiles, kind).transpose(0, 3, 1, 2)
    single = normalize(tile_image(image, whole), kind).transpose(0, 3, 1, 2)[0]
    checks = [
        _exact(f"{name} tiles", len(tiles), record["tiles"]),
        _exact(f"{name} tiles counted from the size", count_tiles(image.shape[1], image.shape[0], config), record["tiles"]),
    ]
    computed: dict[str, Callable[[], np.ndarray]] = {
        "pixel_values_f16_tile0": lambda: values[0].astype(np.float16),
        "last_tile_f16": lambda: values[-1].astype(np.float16),
        "mean_per_tile_channel": lambda: values.mean((2, 3), dtype=np.float64),
        "std_per_tile_channel": lambda: values.std((2, 3), dtype=np.float64),
        "single_f16": lambda: single.astype(np.float16),
        "single_mean": lambda: single.mean((1, 2), dtype=np.float64),
    }
    if f"{name}_tiles_uint8" in outputs:
        checks.append(_exact(f"{name} tiles_uint8", tiles, outputs[f"{name}_tiles_uint8"]))
    for output, compute in computed.items():
        if f"{name}_{output}" in outputs:
            # float16 near 2 has steps of 2e-3; sums over a tile differ by their order.
            atol = 2e-3 if output.endswith("f16") or "_f16_" in output else 1e-6
            checks.append(_close(f"{name} {output}", compute(), outputs[f"{name}_{output}"], atol))
    return checks


def _upstream_lengths_agree(case: dict, template: ChatTemplate, tokenizer: Tokenizer, record: dict, ids: np.ndarray) -> bool:
    """Whether upstream's sum of separately tokenised pieces equals the length of the whole (spec section 4, labels).

    Only preprocess_internlm, _mpt and _phi3 check this; each subtracts or adds what suits its own tokenizer.
    """
    if case["function"] == "preprocess_internvl2_5":
        return True
    limit, total = case["model_max_length"], int((ids[: case["model_max_length"]] != case["pad_token_id"]).sum())
    text = _expanded_prompt(record, template)

    def length(piece: str) -> int:
        return min(limit, len(tokenizer.encode(piece, prefix=True)))

    if case["function"] == "preprocess_internlm":
        first, *rest = text.split(template.assistant_header)
        reached = 1 + length(first + template.assistant_header) - 1
        for part in rest[:-1]:
            answer, _, question = part.partition(template.user_header)
            reached += length(answer) - 1 + length(template.user_header + question + template.assistant_header) - 1
        reached += length(rest[-1] if rest else first) - 1
    else:
        phi3 = case["function"] == "preprocess_phi3"
        pieces = text.split(template.separator)
        rounds = [template.separator.join(pieces[:3]), *(template.separator.join(pieces[i : i + 2]) for i in range(3, len(pieces), 2))]
        reached = int(phi3)
        for number, turn in enumerate(rounds):
            if not turn or turn.count(template.separator + template.assistant_header) != 1:
                break
            reached += length(turn) + ((0 if number == 0 else -1) if phi3 else 1)
    return reached >= limit or reached == total


def _expanded_prompt(record: dict, template: ChatTemplate) -> str:
    turns = parse_turns(record["conversation"])
    if turns[0].role == "assistant":
        turns = turns[1:]
    if template.strip_text:
        turns = [replace(turn, text=(turn.text or "").strip()) for turn in turns]
    text = build_prompt(template, turns)
    for slots in record["num_image_token_list"]:
        text = text.replace("<image>", f"<img>{'<IMG_CONTEXT>' * slots}</img>", 1)
    return text
