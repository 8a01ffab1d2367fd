"""The next token from logits: the likeliest, or one drawn after repetition penalty, temperature, top-k and top-p, in this order."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of one generation. The defaults are greedy.

    temperature: 0 takes the likeliest token; else logits are divided by it and a token is drawn.
    top_k: draw from the k likeliest tokens only; 0 for all.
    top_p: draw from the likeliest tokens that together have at least this probability.
    repetition_penalty: positive logits of tokens that this answer has already are divided by it, negative ones multiplied. The prompt
      does not count (upstream passes embeddings, so its penalty sees no prompt either). It works on greedy decoding too.
    seed: of the draws.

    Raises ValueError for a number outside its range. All of them are arguments of the compiled program: changing one compiles nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or a positive number"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or a positive number"),
            ("top_p", 0 < self.top_p <= 1, "a number in (0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a positive number, 1 for none"),
            ("seed", 0 <= self.seed < 2**32, "a number from 0 to 4294967295"),
        )
        for name, right, wanted in checks:
            if not right:
                raise ValueError(f"sampling: {name} is {getattr(self, name)}; give {wanted}")

    def numbers(self) -> Numbers:
        """The settings as arguments of a compiled program."""
        return Numbers(
            temperature=np.float32(self.temperature),
            top_p=np.float32(self.top_p),
            repetition_penalty=np.float32(self.repetition_penalty),
            top_k=np.int32(min(self.top_k, 2**31 - 1)),
        )


GREEDY = Sampling()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Numbers:
    """The settings of a `Sampling` as scalars: temperature, top_p, repetition_penalty float32, top_k int32."""

    temperature: Any
    top_p: Any
    repetition_penalty: Any
    top_k: Any


def row_keys(seed: int, draws: np.ndarray) -> Key[Array, " b"]:
    """One random key per row from the seed and the row's own number: neither its place in the batch nor its neighbours matter."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(np.uint32(seed)), jnp.asarray(draws, jnp.uint32))


def choose(logits: Float[Array, "b v"], seen: Bool[Array, "b v"], keys: Key[Array, " b"], numbers: Numbers) -> Int[Array, " b"]:
    """The next token of every row, int32; row r depends on row r of logits, seen and keys alone.

    logits: float32; columns of -1e30 are never drawn. seen: which tokens the penalty concerns. Tokens as likely as the last one that top-k
    or top-p keeps are kept with it.
    """
    penalty = numbers.repetition_penalty
    logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)

    def draw(logits: jax.Array) -> jax.Array:
        scaled = logits / numbers.temperature
        kept = _kept(scaled, numbers.top_k, numbers.top_p)
        return jax.vmap(jax.random.categorical)(keys, jnp.where(kept, scaled, -jnp.inf))

    return jax.lax.cond(numbers.temperature > 0, draw, lambda logits: jnp.argmax(logits, axis=-1), logits).astype(jnp.int32)


def _kept(logits: Float[Array, "b v"], top_k: Any, top_p: Any) -> Bool[Array, "b v"]:
    """Which tokens may be drawn: the k likeliest, and of those the fewest that reach the probability p."""
    ordered = -jnp.sort(-logits, axis=-1)
    rank = jnp.arange(logits.shape[-1])
    ordered = jnp.where((rank < top_k) | (top_k == 0), ordered, -jnp.inf)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    least = jnp.min(jnp.where(((before < top_p) | (rank == 0)) & (ordered > -jnp.inf), ordered, jnp.inf), axis=-1, keepdims=True)
    return logits >= least
