"""Prompts of unequal lengths as one left-padded batch.

    prompts  [7 8 9], [5 6]  ->  tokens  7 8 9     positions  0 1 2     segment_ids  1 1 1
                                         . 5 6                1 0 1                  0 1 1

Left padding puts the last token of every row in the last slot, where generation continues. Padded slots carry position 1, as upstream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from monovl_jax.config import VisionConfig
from monovl_jax.model.vlm import PADDING, TEXT, VISUAL


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt: ids int32[n] with an image-context id in every visual slot, and its tiles uint8[k, H, W, 3] (k may be 0)."""

    ids: np.ndarray
    tiles: np.ndarray | None = None


def bucket(n: int, smallest: int = 32) -> int:
    """The next power of two, or one and a half times one: few compiled shapes, at most a third of padding."""
    size = smallest
    while size < n:
        if size * 3 // 2 >= n:
            return size * 3 // 2
        size *= 2
    return size


def slots_for(n: int, piece: int) -> int:
    """Slots for n tokens: a bucket, or beyond a piece a whole number of pieces."""
    return min(bucket(n), piece) if n <= piece else -(-n // piece) * piece


def pieces(batch: dict[str, np.ndarray], size: int, tokens_per_tile: int) -> list[dict[str, np.ndarray]]:
    """A batch cut into pieces of `size` slots (the first takes what is left over), each with the tiles that its slots show.

    A tile on the border of two pieces goes to both. All pieces that show tiles have room for the same number of them.
    """
    t, v = batch["tokens"].shape[1], tokens_per_tile
    if t <= size:
        return [batch]
    tiles = batch.get("tiles")
    places = 0 if tiles is None else min(tiles.shape[1], size // v + 2)
    cut = []
    for stop in range(t % size or size, t + 1, size):
        here = slice(max(0, stop - size), stop)
        part = {k: x[:, here] for k, x in batch.items() if k not in ("tiles", "visual_slot", "visual_index")}
        index = batch["visual_index"][:, here] if tiles is not None else np.full_like(part["tokens"], -1)
        if tiles is not None and (index >= 0).any():
            rows = len(index)
            part |= {
                "visual_index": np.full_like(index, -1),
                "visual_slot": np.full((rows, places * v), -1, np.int32),
                "tiles": np.zeros((rows, places, *tiles.shape[2:]), tiles.dtype),
            }
            for row in range(rows):
                where = np.flatnonzero(index[row] >= 0)
                if len(where):
                    shown = index[row, where]
                    first, last = shown[0] // v, shown[-1] // v + 1
                    part["tiles"][row, : last - first] = tiles[row, first:last]
                    part["visual_index"][row, where] = shown - first * v
                    part["visual_slot"][row, shown - first * v] = where
        cut.append(part)
    return cut


def prompt_batch(
    prompts: Sequence[Prompt], vision: VisionConfig, context_id: int, slots: int | None = None, tiles: int | None = None
) -> dict[str, np.ndarray]:
    """A left-padded batch with the fields of docs/batch.md, padded to `slots` tokens and `tiles` tiles a row (by default: buckets).

    Raises ValueError for an empty prompt, or when the visual slots of a prompt are not tokens_per_tile for each of its tiles.
    """
    if not prompts:
        raise ValueError("no prompts: give at least one")
    v, side = vision.tokens_per_tile, vision.tile_size
    counts = [0 if p.tiles is None else len(p.tiles) for p in prompts]
    for i, (p, k) in enumerate(zip(prompts, counts, strict=True)):
        found = int((p.ids == context_id).sum())
        if len(p.ids) == 0:
            raise ValueError(f"prompt {i} is empty: give at least one token")
        if found != k * v:
            raise ValueError(
                f"prompt {i} has {found} visual slots but {k} tiles of {v} visual tokens; expand `<image>` with the tile count"
            )
        if p.tiles is not None and k and (p.tiles.dtype != np.uint8 or p.tiles.shape[1:] != (side, side, 3)):
            raise ValueError(f"prompt {i} has tiles {p.tiles.dtype}{list(p.tiles.shape)}; they must be uint8[k, {side}, {side}, 3]")
    b, t = len(prompts), slots or bucket(max(len(p.ids) for p in prompts))
    k = tiles if tiles is not None else (bucket(max(counts), 1) if max(counts) else 0)
    if k < max(counts):
        raise ValueError(f"a prompt has {max(counts)} tiles, more than the {k} of a row; give more tiles")
    batch = {
        "tokens": np.zeros((b, t), np.int32),
        "token_types": np.full((b, t), PADDING, np.int8),
        "positions": np.ones((b, t), np.float32),
        "segment_ids": np.zeros((b, t), np.int32),
    }
    if k:
        batch["visual_index"] = np.full((b, t), -1, np.int32)
        batch["visual_slot"] = np.full((b, k * v), -1, np.int32)
        batch["tiles"] = np.zeros((b, k, side, side, 3), np.uint8)
    for row, p in enumerate(prompts):
        start = t - len(p.ids)
        if start < 0:
            raise ValueError(f"prompt {row} has {len(p.ids)} tokens, more than the {t} slots; give more slots")
        visual = p.ids == context_id
        batch["tokens"][row, start:] = p.ids
        batch["token_types"][row, start:] = np.where(visual, VISUAL, TEXT)
        batch["positions"][row, start:] = np.arange(len(p.ids))
        batch["segment_ids"][row, start:] = 1
        if p.tiles is not None and counts[row]:
            where = start + np.flatnonzero(visual)
            batch["visual_index"][row, where] = np.arange(len(where))
            batch["visual_slot"][row, : len(where)] = where
            batch["tiles"][row, : counts[row]] = p.tiles
    return batch
