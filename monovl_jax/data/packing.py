"""Several samples in one row of fixed size: planned from lengths, filled with examples.

A row of T = 12 token slots and K = 2 tiles of V = 2 visual tokens, holding two samples (i = image context, I = </img>):

    tokens          <img> i  i  I  a  b | c  d  e | .  .  .
    token_types        0  1  1  0  0  0   0  0  0  -1 -1 -1
    segment_ids        1  1  1  1  1  1   2  2  2   0  0  0
    positions          0  1  2  3  4  5   0  1  2   0  0  0
    visual_index      -1  0  1 -1 -1 -1  -1 -1 -1  -1 -1 -1     visual_slot  1  2 -1 -1
    loss weights       0  0  0  0  w  0   w  w  0   0  0  0     (b, d and e are supervised and sit one place to the right)

The fields are those of design section 5. Source of the weightings: InternVL patch/pad_data_collator.py; spec 5.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

LossWeighting = Literal["token", "sample", "square"]

TEXT, VISUAL, PADDING = 0, 1, -1
"""Values of `token_types` made here (2, query, is added by the models that have queries)."""


@dataclass(frozen=True, slots=True)
class Example:
    """One encoded sample.

    ids: int32[n]. loss_weights: float32[n], the weight of token j as a target (0 = not supervised; not shifted).
    tiles: uint8[k, S, S, 3]. failed: a picture was lost after planning (its tiles are zero, all weights 0).
    """

    ids: np.ndarray
    loss_weights: np.ndarray
    tiles: np.ndarray
    failed: bool = False


@dataclass(frozen=True)
class PackSpec:
    """The shape of a row and what fills it.

    tokens: T. tiles: K. visual_tokens_per_tile: V. tile_size: H = W = S in pixels. image_context_id: the id that marks visual
    slots. loss_weighting: the weight of each of the n supervised tokens of a sample, 'token' 1, 'sample' 1 / n,
    'square' 1 / sqrt(n).
    """

    tokens: int
    tiles: int
    visual_tokens_per_tile: int
    tile_size: int
    image_context_id: int
    pad_id: int = 0
    loss_weighting: LossWeighting = "token"

    def __post_init__(self) -> None:
        if self.tokens < 2 or self.tiles < 0 or self.visual_tokens_per_tile < 0 or self.tile_size < 1:
            raise ValueError(f"a row of {self.tokens} tokens and {self.tiles} tiles of {self.tile_size} px cannot be; give positive sizes.")
        if self.loss_weighting not in ("token", "sample", "square"):
            raise ValueError(f"loss_weighting {self.loss_weighting!r} is unknown; use 'token', 'sample' or 'square'.")

    def fits(self, tokens: int, tiles: int) -> bool:
        """Whether one sample of this length fits into an empty row."""
        return tokens <= self.tokens and tiles <= self.tiles

    def empty_rows(self, rows: int) -> dict[str, np.ndarray]:
        """A batch of `rows` rows of padding: the fields of design section 5 with a leading axis."""
        t, slots, side = self.tokens, self.tiles * self.visual_tokens_per_tile, self.tile_size
        return {
            "tokens": np.full((rows, t), self.pad_id, np.int32),
            "token_types": np.full((rows, t), PADDING, np.int8),
            "visual_index": np.full((rows, t), -1, np.int32),
            "visual_slot": np.full((rows, slots), -1, np.int32),
            "positions": np.zeros((rows, t), np.float32),
            "segment_ids": np.zeros((rows, t), np.int32),
            "targets": np.zeros((rows, t), np.int32),
            "loss_weights": np.zeros((rows, t), np.float32),
            "tiles": np.zeros((rows, self.tiles, side, side, 3), np.uint8),
        }


def plan_packs(lengths: np.ndarray, spec: PackSpec, *, longest_first: bool = True) -> list[np.ndarray]:
    """Which samples share a row: first fit over `lengths` int[n, 2] of (tokens, tiles).

    Returns index arrays, one per row, that together contain every sample once, except those too large for a row (see
    `PackSpec.fits`), which are in none. longest_first sorts by the larger of the two shares of a row, which wastes much less.
    """
    lengths = np.asarray(lengths, np.int64).reshape(-1, 2)
    order = np.flatnonzero((lengths[:, 0] <= spec.tokens) & (lengths[:, 1] <= spec.tiles))
    if longest_first and len(order):
        share = np.maximum(lengths[order, 0] / spec.tokens, lengths[order, 1] / max(1, spec.tiles))
        order = order[np.argsort(-share, kind="stable")]
    rows: list[list[int]] = []
    free_tokens, free_tiles = np.empty(len(order), np.int64), np.empty(len(order), np.int64)
    first = 0  # rows before this one are full of tokens
    for index, (tokens, tiles) in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = (free_tokens[first : len(rows)] >= tokens) & (free_tiles[first : len(rows)] >= tiles)
        at = first + int(fitting.argmax()) if fitting.any() else len(rows)
        if at == len(rows):
            rows.append([])
            free_tokens[at], free_tiles[at] = spec.tokens, spec.tiles
        rows[at].append(index)
        free_tokens[at] -= tokens
        free_tiles[at] -= tiles
        while first < len(rows) and free_tokens[first] < 2:
            first += 1
    return [np.asarray(row, np.int64) for row in rows]


def sample_weights(loss_weights: np.ndarray, weighting: LossWeighting) -> np.ndarray:
    """float32[n]: the weights of one sample scaled by 1, 1 / m or 1 / sqrt(m), m = how many are above 0 (0 stays 0)."""
    if weighting == "token":
        return loss_weights
    count = max(1, int(np.count_nonzero(loss_weights > 0)))
    return loss_weights * np.float32(1 / count if weighting == "sample" else count**-0.5)


def pack_row(examples: Sequence[Example], spec: PackSpec) -> dict[str, np.ndarray]:
    """The fields of design section 5 for one row: tokens int32[T], token_types int8[T], visual_index int32[T], visual_slot
    int32[K * V], positions float32[T], segment_ids int32[T], targets int32[T], loss_weights float32[T], tiles uint8[K, S, S, 3].

    Raises ValueError if the examples do not fit or one has another number of image slots than V times its tiles.
    """
    rows = spec.empty_rows(1)
    fill_row(examples, spec, rows, 0)
    return {name: array[0] for name, array in rows.items()}


def fill_row(examples: Sequence[Example], spec: PackSpec, rows: dict[str, np.ndarray], row: int) -> None:
    """Writes the examples into row `row` of a batch made by `spec.empty_rows`; see `pack_row`."""
    lengths = [len(example.ids) for example in examples]
    used, tiles_used = sum(lengths), sum(len(example.tiles) for example in examples)
    if used > spec.tokens or tiles_used > spec.tiles:
        raise ValueError(
            f"{len(examples)} samples with {used} tokens and {tiles_used} tiles do not fit a row of {spec.tokens} and {spec.tiles}; "
            "a source has announced smaller lengths than it delivers."
        )
    if not examples:
        return
    tokens, types, weights = rows["tokens"][row], rows["token_types"][row], rows["loss_weights"][row]
    tiles, positions, segments = rows["tiles"][row], rows["positions"][row], rows["segment_ids"][row]
    at = tile = 0
    for number, (example, length) in enumerate(zip(examples, lengths, strict=True), 1):
        end = at + length
        tokens[at:end] = example.ids
        segments[at:end] = number
        positions[at:end] = _range(length)
        if length > 1:
            weights[at : end - 1] = sample_weights(example.loss_weights, spec.loss_weighting)[1:]
        if len(example.tiles):
            tiles[tile : tile + len(example.tiles)] = example.tiles
            tile += len(example.tiles)
        at = end
    visual = tokens[:used] == spec.image_context_id
    slots = np.flatnonzero(visual)
    _check_slots(examples, slots, spec)
    types[:used] = visual  # TEXT 0, VISUAL 1
    rows["visual_index"][row, slots] = np.arange(len(slots), dtype=np.int32)
    rows["visual_slot"][row, : len(slots)] = slots
    np.multiply(tokens[1:used], weights[: used - 1] != 0, out=rows["targets"][row, : used - 1])


def _check_slots(examples: Sequence[Example], slots: np.ndarray, spec: PackSpec) -> None:
    """Every sample has V image slots per tile: checked by the ends of the samples among the slots."""
    ends = np.cumsum([len(example.ids) for example in examples])
    tiles = np.cumsum([len(example.tiles) for example in examples])
    wrong = np.flatnonzero(np.searchsorted(slots, ends) != tiles * spec.visual_tokens_per_tile)
    if len(wrong):
        example = examples[wrong[0]]
        found = int(np.count_nonzero(example.ids == spec.image_context_id))
        raise ValueError(
            f"a sample has {found} image slots for {len(example.tiles)} tiles of {spec.visual_tokens_per_tile} visual tokens; "
            "give the source and the rows the same visual_tokens_per_tile."
        )


_RANGE = np.arange(1 << 12, dtype=np.float32)


def _range(length: int) -> np.ndarray:
    return _RANGE[:length] if length <= len(_RANGE) else np.arange(length, dtype=np.float32)
