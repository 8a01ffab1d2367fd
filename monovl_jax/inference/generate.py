"""Prefill and decode: compiled once per bucket of shapes, with the whole loop on the device.

prefill   a batch of prompts -> logits of the last slots, and a cache with room for what follows
extend    more slots onto a cache: the later pieces of a long prompt, the next turn of a conversation
begin     those logits -> the first token of every row
decode    one token after another, until a number of them is made or all rows have stopped
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from monovl_jax.config import ModelConfig
from monovl_jax.inference.prompts import Prompt, bucket, pieces, prompt_batch, slots_for
from monovl_jax.inference.sampling import GREEDY, Numbers, Sampling, choose, row_keys
from monovl_jax.model import VLM, KVCache, Ops
from monovl_jax.model.decoder import Layers, split_layers
from monovl_jax.parallel import fingerprint
from monovl_jax.parallel.ops import mesh_ops
from monovl_jax.parallel.sharding import check_rows, place_parameters


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """ids int32[B, N], filled with the pad id after a row has stopped; steps int32[]: how many columns were made before all rows had
    stopped; scores float32[N, B, V] raw logits of every step, or None."""

    ids: jax.Array
    steps: jax.Array
    scores: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """A generation under way. The last token made is in no cache yet.

    token int32[B] the last one made; lengths int32[B] of the prompts; longest int32[] of them (what dynamic NTK takes); done bool[B];
    seen bool[B, Vp], the tokens made; ids int32[B, N] and step int32[]: how many columns of it are made.
    """

    cache: KVCache
    token: jax.Array | Any  # Any: JAX rebuilds pytrees with placeholders in place of arrays
    lengths: jax.Array | Any
    longest: jax.Array | Any
    done: jax.Array | Any
    seen: jax.Array | Any
    ids: jax.Array | Any
    step: jax.Array | Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rules:
    """What decides over the next token: numbers of the sampling, a key per row, stop ids int32[n] (-1 matches none), the pad id int32."""

    numbers: Numbers
    keys: jax.Array | Any
    stop_ids: jax.Array | Any
    pad_id: jax.Array | Any


def abstract_model(config: ModelConfig) -> tuple[Any, dict[str, Any]]:
    """The graphdef of a model and its parameter shapes as a nested dict, without memory."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: VLM(config, nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)


def _last_logits(model: VLM, batch: dict[str, jax.Array], ops: Ops, cache: KVCache | int) -> tuple[jax.Array, KVCache]:
    """batch: fields of docs/batch.md, `last` int32[] (the slot whose logits are wanted) and `key_length` int32[]."""
    fields = {k: v for k, v in batch.items() if k not in ("last", "key_length")}
    hidden, grown = model(fields, ops, cache, key_length=batch["key_length"])
    assert isinstance(grown, KVCache)
    return model.logits(jax.lax.dynamic_index_in_dim(hidden, batch["last"], axis=1, keepdims=False), ops), grown


@functools.partial(jax.jit, static_argnames=("graphdef", "ops", "room"))
def prefill(graphdef: Any, params: dict[str, Any], batch: dict[str, Any], *, ops: Ops, room: int) -> tuple[jax.Array, KVCache]:
    """Logits float32[B, Vp] after the slot `last`, and a new cache of `room` slots that begins with this batch."""
    return _last_logits(nnx.merge(graphdef, params), batch, ops, room)


@functools.partial(jax.jit, static_argnames=("graphdef", "ops"))
def extend(graphdef: Any, params: dict[str, Any], batch: dict[str, Any], cache: KVCache, *, ops: Ops) -> tuple[jax.Array, KVCache]:
    """Logits after the slot `last` of this batch, which is appended to the cache; the cache must have room for all of its slots.

    Slots after `last` (padding on the right) are dropped again: the next tokens take their place.
    """
    start = cache.length
    logits, cache = _last_logits(nnx.merge(graphdef, params), batch, ops, cache.stacked())
    return logits, dataclasses.replace(cache, length=start + batch["last"] + 1)


def _mark(state: State, token: jax.Array, rules: Rules) -> State:
    """The state with one more token per row."""
    token = jnp.where(state.done, rules.pad_id, token)
    done = state.done | jnp.any(token[:, None] == rules.stop_ids[None, :], axis=1)
    seen = state.seen.at[jnp.arange(len(token)), token].set(True)
    ids = jax.lax.dynamic_update_slice_in_dim(state.ids, token[:, None], state.step, axis=1)
    return dataclasses.replace(state, token=token, done=done, seen=seen, ids=ids, step=state.step + 1)


def _choose(logits: jax.Array, state: State, rules: Rules) -> jax.Array:
    keys = jax.vmap(jax.random.fold_in, (0, None))(rules.keys, state.step)
    return choose(logits, state.seen, keys, rules.numbers)


def _begin(logits: jax.Array, cache: KVCache, lengths: jax.Array, longest: jax.Array, rules: Rules, columns: int) -> State:
    rows, vocabulary = logits.shape
    state = State(
        cache=cache,
        token=jnp.zeros((rows,), jnp.int32),
        lengths=lengths,
        longest=longest,
        done=jnp.zeros((rows,), bool),
        seen=jnp.zeros((rows, vocabulary), bool),
        ids=jnp.full((rows, columns), rules.pad_id, jnp.int32),
        step=jnp.int32(0),
    )
    return _mark(state, _choose(logits, state, rules), rules)


@functools.partial(jax.jit, static_argnames=("columns", "split"))
def begin(logits: jax.Array, cache: KVCache, lengths: jax.Array, rules: Rules, *, columns: int, split: bool) -> State:
    """The first token of every row, from the logits of prefill.

    columns: the most tokens that will be made. split: whether the layers of the cache are to be split.
    """
    return _begin(logits, cache.split() if split else cache, lengths, jnp.max(lengths), rules, columns)


def _feed(model: VLM, state: State, ops: Ops, layers: Layers | None) -> tuple[jax.Array, KVCache]:
    """Runs the last token of every row: logits [B, Vp] of the next one, and the cache with it. It is text, whatever its id, as upstream."""
    one = {
        "tokens": state.token[:, None],
        "positions": (state.lengths + state.step - 1).astype(jnp.float32)[:, None],
        "segment_ids": jnp.ones((len(state.token), 1), jnp.int32),
    }
    hidden, cache = model(one, ops, state.cache, key_length=state.longest + state.step, layers=layers)
    assert isinstance(cache, KVCache)
    return model.logits(hidden[:, 0], ops), cache


@functools.partial(jax.jit, static_argnames=("graphdef", "ops"), donate_argnames=("state",))
def decode(
    graphdef: Any, params: dict[str, Any], layers: Layers | None, state: State, rules: Rules, until: jax.Array, *, ops: Ops
) -> State:
    """Goes on until `until` tokens are made, or all rows have stopped. The given state is used up."""
    model = nnx.merge(graphdef, params)

    def more(state: State) -> jax.Array:
        return (state.step < until) & ~jnp.all(state.done)

    def one(state: State) -> State:
        logits, cache = _feed(model, state, ops, layers)
        return _mark(dataclasses.replace(state, cache=cache), _choose(logits, state, rules), rules)

    return jax.lax.while_loop(more, one, state)


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
    """Greedy decoding of a left-padded batch (`prompt_batch`) as one program, with the logits of every step if asked for.

    The first token comes from the prefill's last slot. Generated tokens are text, whatever their id, as upstream. Dynamic NTK takes the
    length of the longest prompt plus the tokens made so far, never the padded length.

    Args:
      stop_ids: int32[n]; a row stops after making one of them (it is part of the result). An empty array never stops.
      pad_id: int32, fed to and recorded for rows that have stopped.
    """
    model = nnx.merge(graphdef, params)
    rows, slots = batch["tokens"].shape
    vocabulary = model.config.decoder.vocab_size
    lengths = jnp.sum(batch["segment_ids"] > 0, axis=1).astype(jnp.int32)
    longest = batch.get("key_length", jnp.max(lengths))
    rules = Rules(GREEDY.numbers(), row_keys(0, np.zeros(rows)), stop_ids, pad_id)
    logits, cache = _last_logits(model, {**batch, "last": jnp.int32(slots - 1), "key_length": longest}, ops, slots + max_new_tokens)
    state = _begin(logits, cache, lengths, longest, rules, max_new_tokens)
    scores = jnp.zeros((max_new_tokens, rows, vocabulary)).at[0].set(logits[:, :vocabulary]) if keep_scores else None

    def more(carry: tuple[State, jax.Array | None]) -> jax.Array:
        return (carry[0].step < max_new_tokens) & ~jnp.all(carry[0].done)

    def one(carry: tuple[State, jax.Array | None]) -> tuple[State, jax.Array | None]:
        state, scores = carry
        logits, cache = _feed(model, state, ops, None)
        if scores is not None:
            scores = scores.at[state.step].set(logits[:, :vocabulary])
        return _mark(dataclasses.replace(state, cache=cache), _choose(logits, state, rules), rules), scores

    state, scores = jax.lax.while_loop(more, one, (state, scores))
    return Generated(state.ids, state.step, scores)


class Generator:
    """A model ready to answer: parameters on the device in the compute dtype, and one compiled program per bucket of shapes.

    Args:
      params: nested dict of arrays.
      stop_ids: a row ends after one of them.
      pad_id: fed to rows that have ended.
      piece: longer prompts are prefilled in pieces of so many slots, so that memory does not grow with the prompt.
      mesh: of all devices that compute. Parameters are placed on it by the table of `parallel.sharding`, rows are divided over data and
        fsdp: a call fills up its rows, a conversation (one row) needs a mesh of `tensor` alone. By default one device.

    Raises MeshError when the mesh cannot divide the model, and `read` when it cannot divide the rows.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: dict[str, Any],
        ops: Ops,
        context_id: int,
        stop_ids: Sequence[int],
        pad_id: int,
        piece: int = 1024,
        mesh: Mesh | None = None,
    ):
        self.config, self.context_id, self.piece, self.mesh = config, context_id, piece, mesh
        self.ops = ops if mesh is None else mesh_ops(ops, mesh)
        self.graphdef, _ = abstract_model(config)
        decoder = jax.tree.map(lambda leaf: leaf if leaf.dtype == ops.dtype else leaf.astype(ops.dtype), params["decoder"])
        whole = {**params, "decoder": decoder}
        self.params = jax.device_put(whole) if mesh is None else place_parameters(whole, mesh)
        alone = mesh is None and jax.default_backend() == "cpu"
        self.layers = split_layers(self.params["decoder"]["blocks"]) if alone else None
        self.stop_ids, self.pad_id = np.asarray(stop_ids, np.int32), np.int32(pad_id)

    def fingerprint(self) -> str:
        """A digest of the model: its config, the compute dtype, and every bit of its parameters."""
        model = repr((self.config, jnp.dtype(self.ops.dtype).name)) + fingerprint.digest(fingerprint.fingerprints(self.params))
        return hashlib.sha256(model.encode()).hexdigest()[:16]

    def rules(self, sampling: Sampling, draws: Sequence[int]) -> Rules:
        return Rules(sampling.numbers(), row_keys(sampling.seed, np.asarray(draws)), self.stop_ids, self.pad_id)

    def read(
        self, batch: dict[str, np.ndarray], key_length: int, last: int, room: int, cache: KVCache | None = None
    ) -> tuple[Any, KVCache]:
        """Prefills a batch, in pieces if it is long: logits after its slot `last`, and the cache.

        room: slots of a new cache. cache: one to append to instead, with room for the batch.

        Raises ValueError for a token that the model's vocabulary does not have, and for more tokens than its context takes.
        """
        self._check(batch, key_length)
        if self.mesh is not None:
            check_rows(len(batch["tokens"]), "the batch of prompts", self.mesh)
        if "tiles" not in batch:  # all text: the plain layers, which compile sooner
            batch = {k: v for k, v in batch.items() if k != "token_types"}
        cut, logits = pieces(batch, self.piece, self.config.vision.tokens_per_tile), None
        for number, part in enumerate(cut):
            width = part["tokens"].shape[1]
            part = {**part, "last": np.int32(min(last, width - 1)), "key_length": np.int32(key_length)}
            last -= width
            if cache is None:
                logits, begun = prefill(self.graphdef, self.params, part, ops=self.ops, room=room)
                cache = dataclasses.replace(begun, length=jnp.int32(part["last"] + 1)) if number == len(cut) - 1 else begun
            else:
                logits, cache = extend(self.graphdef, self.params, part, cache, ops=self.ops)
        assert cache is not None
        return logits, cache

    def _check(self, batch: dict[str, np.ndarray], key_length: int) -> None:
        decoder = self.config.decoder
        if (largest := int(batch["tokens"].max())) >= decoder.vocab_size:
            raise ValueError(
                f"the prompt has the token id {largest}, and the model has a vocabulary of {decoder.vocab_size}; "
                "its tokenizer is that of another model, or was given tokens that the model was not"
            )
        if key_length > decoder.max_position_embeddings and decoder.rope.scaling != "dynamic":
            raise ValueError(
                f"the prompt has {key_length} tokens, and the model takes {decoder.max_position_embeddings}; "
                "shorten it, or give smaller images"
            )

    def begin(self, logits: Any, cache: KVCache, lengths: np.ndarray, rules: Rules, columns: int) -> State:
        return begin(logits, cache, np.asarray(lengths, np.int32), rules, columns=columns, split=self.layers is not None)

    def decode(self, state: State, rules: Rules, until: int) -> State:
        """Goes on until `until` tokens are made, or all rows have stopped; the given state is used up."""
        return decode(self.graphdef, self.params, self.layers, state, rules, np.int32(until), ops=self.ops)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        slots: int | None = None,
        tiles: int | None = None,
        sampling: Sampling = GREEDY,
        draws: Sequence[int] | None = None,
    ) -> list[np.ndarray]:
        """New token ids of every prompt, without the stop token and what follows it.

        Args:
          slots, tiles: the size of a row of the batch; by default the next bucket.
          draws: a number for each prompt, by default its place, that decides over its random draws together with the seed.

        Raises ValueError when prompts and tiles disagree (`prompt_batch`), or for fewer than one new token.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; ask for at least one token")
        asked, own_draws = len(prompts), list(range(len(prompts)) if draws is None else draws)
        if self.mesh is not None and asked:  # copies of the last row, which end when it ends
            missing = -asked % (self.mesh.shape["data"] * self.mesh.shape["fsdp"])
            prompts, own_draws = [*prompts, *[prompts[-1]] * missing], own_draws + own_draws[-1:] * missing
        slots = slots or slots_for(max((len(p.ids) for p in prompts), default=0), self.piece)
        batch = prompt_batch(prompts, self.config.vision, self.context_id, slots, tiles)
        lengths, columns = [len(p.ids) for p in prompts], bucket(max_new_tokens, 8)
        rules = self.rules(sampling, own_draws)
        state = self.begin(*self.read(batch, max(lengths), slots - 1, slots + columns), np.asarray(lengths), rules, columns)
        ids = np.asarray(self.decode(state, rules, max_new_tokens).ids)
        return [self.until_stop(row[:max_new_tokens]) for row in ids[:asked]]

    def until_stop(self, ids: np.ndarray) -> np.ndarray:
        """The ids before the first stop id."""
        stops = np.flatnonzero(np.isin(ids, self.stop_ids))
        return ids[: stops[0]] if len(stops) else ids
