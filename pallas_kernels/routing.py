"""Which token goes to which expert, and where it sits when tokens are sorted by expert.

Tokens in order (t text, v visual, . padding), blocks of 2 rows:

    token     0 1 2 3 4 5 6 7          slot      0 1 | 2 3 | 4 5 | 6 7 | ...
    expert    t t v v v . t .          source    0 1 | 6 - | 2 3 | 4 - | - - ...
    slot      0 1 4 5 6 - 2 -          owner     text  text  visual visual none

Every expert starts on a block boundary, so a block belongs to one expert, and each expert wastes less than one block.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.device import tpu_generation

BLOCKS = 16
"""A row count is rounded up to a sixteenth of the token count: two experts then waste less than an eighth of it."""

TPU_ROWS = 128
"""On a TPU a block is also a multiple of this many rows, so that row tiles of the kernels divide it."""

SMALL = 64
"""Below this many tokens sorting costs more than computing every expert on all of them (decode steps)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """The sorted order of N tokens. Made by `make_routing`.

    expert: int32[N], the expert of each token, -1 for none (padding).
    source: int32[S], the token in each slot; N where the slot is empty. S = (BLOCKS + num_experts) * block_rows.
    slot:   int32[N], the slot of each token; S where it has none.
    blocks: int32[num_experts], how many blocks each expert owns.
    counts: int32[num_experts], how many tokens each expert owns.
    """

    expert: jax.Array | Any  # Any: JAX rebuilds pytrees with placeholders in place of arrays
    source: jax.Array | Any
    slot: jax.Array | Any
    blocks: jax.Array | Any
    counts: jax.Array | Any
    num_experts: int = dataclasses.field(metadata={"static": True})

    @property
    def block_rows(self) -> int:
        return self.source.shape[0] // (BLOCKS + self.num_experts)


def make_routing(expert: jax.Array, num_experts: int = 2, row_multiple: int | None = None) -> Routing:
    """Sorts tokens by expert.

    Args:
      expert: integer array of any shape, the expert of each token in [0, num_experts), or -1 for none. It is flattened.
      num_experts: static.
      row_multiple: static; the rows of a block are a multiple of it. None takes TPU_ROWS on a TPU and 1 elsewhere.

    Raises ValueError for an empty or non-integer array, and for a row multiple below 1.
    """
    if row_multiple is None:
        row_multiple = TPU_ROWS if tpu_generation() else 1
    if row_multiple < 1:
        raise ValueError(f"make_routing: row_multiple is {row_multiple}; give at least 1")
    if not jnp.issubdtype(expert.dtype, jnp.integer):
        raise ValueError(f"make_routing: expert ids have dtype {expert.dtype}; give integers")
    if expert.size == 0:
        raise ValueError(f"make_routing: no tokens (shape {expert.shape}); give at least one")
    expert = expert.reshape(-1).astype(jnp.int32)
    tokens = expert.shape[0]
    rows = -(-tokens // (BLOCKS * row_multiple)) * row_multiple
    slots = (BLOCKS + num_experts) * rows

    slot = jnp.full_like(expert, slots)
    blocks, counts, start = [], [], jnp.int32(0)
    for e in range(num_experts):
        mine = expert == e
        slot = jnp.where(mine, start * rows + jnp.cumsum(mine, dtype=jnp.int32) - 1, slot)
        counts.append(jnp.sum(mine, dtype=jnp.int32))
        blocks.append((counts[-1] + rows - 1) // rows)
        start = start + blocks[-1]
    source = jnp.full((slots,), tokens, jnp.int32).at[slot].set(jnp.arange(tokens, dtype=jnp.int32), mode="drop")
    return Routing(expert, source, slot, jnp.stack(blocks), jnp.stack(counts), num_experts)
