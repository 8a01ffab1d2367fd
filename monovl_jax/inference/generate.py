"""Greedy generation: one prefill, then a decode loop that stays on the device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from monovl_jax.config import ModelConfig
from monovl_jax.inference.prompts import Prompt, bucket, prompt_batch
from monovl_jax.model import VLM, KVCache, Ops, init_cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """ids int32[B, N], filled with the pad id after a row has stopped; steps int32[]: how many columns were made before all rows had
    stopped; scores float32[N, B, V] raw logits of every step, or None."""

    ids: jax.Array
    steps: jax.Array
    scores: jax.Array | None


def abstract_model(config: ModelConfig) -> tuple[Any, dict[str, Any]]:
    """The graphdef of a model and its parameter shapes as a nested dict, without memory."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: VLM(config, nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)


@functools.partial(jax.jit, static_argnames=("graphdef", "ops", "max_new_tokens", "keep_scores"))
def greedy(
    graphdef: Any,
    params: dict[str, Any],
    batch: dict[str, jax.Array],
    stop_ids: jax.Array,
    pad_id: jax.Array,
    *,
    ops: Ops,
    max_new_tokens: int,
    keep_scores: bool = False,
) -> Generated:
    """Greedy decoding of a left-padded batch (`prompt_batch`).

    The first token comes from the prefill's last slot. Generated tokens are text, whatever their id, as upstream. Dynamic NTK takes the
    length of the longest prompt plus the tokens made so far, never the padded length.

    Args:
      stop_ids: int32[n]; a row stops after making one of them (it is part of the result). An empty array never stops.
      pad_id: int32, fed to and recorded for rows that have stopped.
    """
    model = nnx.merge(graphdef, params)
    rows, slots = batch["tokens"].shape
    config = model.config.decoder
    lengths = jnp.sum(batch["segment_ids"] > 0, axis=1)
    longest = jnp.max(lengths) if "key_length" not in batch else batch["key_length"]
    fields = {k: v for k, v in batch.items() if k != "key_length"}

    def pick(hidden: jax.Array, done: jax.Array):
        logits = model.logits(hidden, ops)
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        token = jnp.where(done, pad_id, token)
        return logits[:, : config.vocab_size], token, done | jnp.any(token[:, None] == stop_ids[None, :], axis=1)

    cache = init_cache(config, rows, slots + max_new_tokens, ops.dtype)
    hidden, cache = model(fields, ops, cache, key_length=longest)
    scores, token, done = pick(hidden[:, -1], jnp.zeros((rows,), bool))
    all_scores = jnp.zeros((max_new_tokens, *scores.shape)).at[0].set(scores) if keep_scores else None
    ids = jnp.full((rows, max_new_tokens), pad_id, jnp.int32).at[:, 0].set(token)

    def more(carry):
        step, _, _, done, _, _ = carry
        return (step < max_new_tokens) & ~jnp.all(done)

    def decode(carry):
        step, cache, token, done, ids, all_scores = carry
        one = {
            "tokens": token[:, None],
            "positions": (lengths + step - 1).astype(jnp.float32)[:, None],
            "segment_ids": jnp.ones((rows, 1), jnp.int32),
        }
        hidden, cache = model(one, ops, cache, key_length=longest + step)
        scores, token, done = pick(hidden[:, 0], done)
        if keep_scores:
            all_scores = all_scores.at[step].set(scores)
        return step + 1, cache, token, done, ids.at[:, step].set(token), all_scores

    carry: tuple[Any, KVCache, Any, Any, Any, Any] = (jnp.int32(1), cache, token, done, ids, all_scores)
    step, _, _, _, ids, all_scores = jax.lax.while_loop(more, decode, carry)
    return Generated(ids, step, all_scores)


class Generator:
    """A model ready to answer: parameters on the device and one compiled program per bucket of prompt lengths."""

    def __init__(self, config: ModelConfig, params: dict[str, Any], ops: Ops, context_id: int, stop_ids: Sequence[int], pad_id: int):
        self.config, self.ops, self.context_id = config, ops, context_id
        self._graphdef, _ = abstract_model(config)
        self._params = jax.device_put(params)
        self._stop_ids, self._pad_id = np.asarray(stop_ids, np.int32), np.int32(pad_id)

    def __call__(
        self, prompts: Sequence[Prompt], max_new_tokens: int, slots: int | None = None, tiles: int | None = None
    ) -> list[np.ndarray]:
        """New token ids of every prompt, without the stop token and what follows it."""
        batch = prompt_batch(prompts, self.config.vision, self.context_id, slots, tiles)
        made = greedy(
            self._graphdef, self._params, batch, self._stop_ids, self._pad_id, ops=self.ops, max_new_tokens=bucket(max_new_tokens, 8)
        )
        out = []
        for row in np.asarray(made.ids)[:, :max_new_tokens]:
            stops = np.flatnonzero(np.isin(row, self._stop_ids))
            out.append(row[: stops[0]] if len(stops) else row)
        return out
