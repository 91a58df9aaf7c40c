"""The two compiled parts of sampling: reading the prompts, and the decoding loop."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxbake.models import apart
from jaxbake.models.cache import Cache, Prefix, append, init_cache
from jaxbake.models.decoder import forward_kv, logits_from
from jaxbake.models.spec import ModelConfig
from jaxbake.sampling.filters import Filters, draw

KEY_TYPE = "threefry2x32"  # drawn per row: the same numbers whatever the batch, the devices or jax's default


@flax.struct.dataclass
class Rows:
    """What is asked, one entry per row: the same arrays through prefill and every decoding call.

    tokens int32 [B, T]: prompts, left-padded so that all rows write at one cache index. lengths [B]: their real
    lengths, 0 for a row that only fills the batch. visible [B]: tokens of the shared prefix in front. keys uint32
    [B, 2]: PRNG key data. temperature float32 [B], 0 = greedy. stop_ids int32 [n], -1 for unused entries.
    """

    tokens: jax.Array
    lengths: jax.Array
    visible: jax.Array
    keys: jax.Array
    temperature: jax.Array
    stop_ids: jax.Array


ROW_AXES = Rows(("batch", None), ("batch",), ("batch",), ("batch", None), ("batch",), (None,))
"""Logical axes of what is asked."""


@flax.struct.dataclass
class State:
    """Decoding under way. `step` tokens have been drawn; tokens, logprobs [B, M]; lengths, finished [B].

    tokens hold 0 after a row's end. logprobs are those of the untempered, unfiltered model.
    """

    cache: Cache
    tokens: jax.Array
    logprobs: jax.Array
    lengths: jax.Array
    finished: jax.Array
    step: jax.Array


def _pick(state: State, rows: Rows, logits_BV: jax.Array, filters: Filters, greedy: bool) -> State:
    """Draws every row's next token; token t of a row is drawn with `fold_in(key of the row, t)`."""
    keys = jax.random.wrap_key_data(rows.keys, impl=KEY_TYPE)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, state.step)
    token = draw(logits_BV, rows.temperature, keys, filters, greedy=greedy)
    chosen = jnp.take_along_axis(logits_BV, token[:, None], 1)[:, 0]
    logprob = chosen - jax.nn.logsumexp(logits_BV, axis=-1)
    live = ~state.finished
    return state.replace(
        tokens=state.tokens.at[:, state.step].set(jnp.where(live, token, 0)),
        logprobs=state.logprobs.at[:, state.step].set(jnp.where(live, logprob, 0.0)),
        lengths=state.lengths + live,
        finished=state.finished | jnp.any(token[:, None] == rows.stop_ids, axis=1),
        step=state.step + 1,
    )


@partial(jax.jit, static_argnames=("config", "max_tokens", "greedy"))
def prefill(
    params: Any,
    delta: Any,
    rows: Rows,
    prefix: Prefix | None,
    filters: Filters,
    *,
    config: ModelConfig,
    max_tokens: int,
    greedy: bool = False,
) -> State:
    """Reads all prompts at once and draws the first token; the cache has room for `max_tokens` in all."""
    b, t = rows.tokens.shape
    offset = jnp.arange(t) - (t - rows.lengths[:, None])
    segments = (offset >= 0).astype(jnp.int32)
    positions = jnp.where(segments, offset + rows.visible[:, None], 0)
    seen = None if prefix is None else segments * rows.visible[:, None]
    hidden, kv = forward_kv(
        params, delta, rows.tokens, config=config, positions=positions, segment_ids=segments, prefix=prefix,
        prefix_visible=seen,
    )  # fmt: skip
    cache = append(init_cache(config, b, t + max_tokens - 1, kv["k"].dtype), kv, positions, segments)
    state = State(
        cache=cache,
        tokens=jnp.zeros((b, max_tokens), jnp.int32),
        logprobs=jnp.zeros((b, max_tokens), jnp.float32),
        lengths=jnp.zeros(b, jnp.int32),
        finished=rows.lengths == 0,
        step=jnp.int32(0),
    )
    return _pick(state, rows, logits_from(params, hidden[:, -1], config=config), filters, greedy)


@partial(jax.jit, static_argnames=("config", "greedy"), donate_argnames=("state",))
def decode(
    params: Any,
    delta: Any,
    rows: Rows,
    prefix: Prefix | None,
    filters: Filters,
    state: State,
    limit: jax.Array,
    *,
    config: ModelConfig,
    greedy: bool = False,
) -> State:
    """Draws tokens until `limit` have been drawn in all or every row has finished; the state is updated in place."""
    segments = (rows.lengths > 0).astype(jnp.int32)[:, None]
    seen = None if prefix is None else segments * rows.visible[:, None]

    def unfinished(state: State):
        return (state.step < limit) & ~jnp.all(state.finished)

    def step(state: State) -> State:
        token = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
        positions = (rows.visible + rows.lengths)[:, None] + state.step - 1
        hidden, kv = forward_kv(
            params, delta, token, config=config, positions=positions, segment_ids=segments, prefix=prefix,
            prefix_visible=seen, cache=state.cache,
        )  # fmt: skip
        state = state.replace(cache=append(state.cache, kv, positions, segments))
        return _pick(state, rows, logits_from(params, hidden[:, 0], config=config), filters, greedy)

    if not apart.wanted(params):
        return jax.lax.while_loop(unfinished, step, state)
    params, delta = apart.lay_apart(params, delta)
    prefix = None if prefix is None else apart.turned(prefix)
    state = jax.lax.while_loop(unfinished, step, state.replace(cache=apart.turned(state.cache)))
    return state.replace(cache=apart.stacked(state.cache))
