"""Which tokens may be drawn: temperature, then top-k, top-p, min-p, in the order transformers applies them.

Every filter takes logits [..., V] and returns them with the excluded tokens at minus infinity. Tokens that tie with the
last one kept are kept too.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from jaxbake.errors import JaxbakeError


@flax.struct.dataclass
class Filters:
    """Limits on what is drawn, None for no limit: top_k an int, top_p and min_p floats in (0, 1]."""

    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


def make_filters(top_k: int | None = None, top_p: float | None = None, min_p: float | None = None) -> Filters:
    """Checked `Filters`; values that exclude nothing become None. Raises JaxbakeError out of range."""
    if top_k is not None and top_k < 1:
        raise JaxbakeError(f"top_k: {top_k} must be at least 1")
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value is not None and not 0 < value <= 1:
            raise JaxbakeError(f"{name}: {value} must be in (0, 1]")
    return Filters(top_k=top_k, top_p=None if top_p == 1 else top_p, min_p=min_p)


def _keep(logits: jax.Array, weights: jax.Array, target: jax.Array | float) -> jax.Array:
    """Keeps the fewest most likely tokens whose weights sum to at least the target; all where none suffice.

    The threshold is found by bisection over the bits of the logits: exact, and far cheaper than sorting a vocabulary.
    """
    bits = jax.lax.bitcast_convert_type(logits.astype(jnp.float32), jnp.int32)
    ranks = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats

    def halve(_, bounds):
        low, high = bounds  # the tokens from `low` up reach the target (or are all), those from `high` up do not
        middle = (low & high) + ((low ^ high) >> 1)
        reached = jnp.sum(jnp.where(ranks >= middle, weights, 0), axis=-1, keepdims=True) >= target
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    bounds = jnp.min(ranks, -1, keepdims=True), jnp.max(ranks, -1, keepdims=True) + 1
    threshold, _ = jax.lax.fori_loop(0, 32, halve, bounds)
    return jnp.where(ranks < threshold, -jnp.inf, logits)


def keep_top_k(logits: jax.Array, k: jax.Array | int) -> jax.Array:
    """The k most likely tokens; k above V keeps all."""
    return _keep(logits, jnp.ones_like(logits, jnp.int32), k)


def keep_top_p(logits: jax.Array, p: jax.Array | float) -> jax.Array:
    """The nucleus (arXiv 1904.09751): the fewest most likely tokens whose probabilities sum to at least p."""
    return _keep(logits, jax.nn.softmax(logits, axis=-1), p)


def keep_min_p(logits: jax.Array, p: jax.Array | float) -> jax.Array:
    """Tokens at least p times as likely as the most likely one (arXiv 2407.01082)."""
    return jnp.where(logits < jnp.max(logits, axis=-1, keepdims=True) + jnp.log(p), -jnp.inf, logits)


def filter_logits(logits: jax.Array, filters: Filters) -> jax.Array:
    """Tempered logits [..., V] with all the filters applied in order."""
    if filters.top_k is not None:
        logits = keep_top_k(logits, filters.top_k)
    if filters.top_p is not None:
        logits = keep_top_p(logits, filters.top_p)
    if filters.min_p is not None:
        logits = keep_min_p(logits, filters.min_p)
    return logits


BLOCK = 256
"""Tokens whose probabilities are summed before one of them is drawn."""


def draw(
    logits_BV: jax.Array, temperature_B: jax.Array, keys_B: jax.Array, filters: Filters, *, greedy: bool = False
) -> jax.Array:
    """One token per row, int32 [B], with the row's own key; the most likely (the first of such) where temperature is 0.

    By Gumbel-max twice: a block of the vocabulary by its total weight, then a token of that block by its own. That is
    exact, P(token) = P(block) P(token | block), and asks for V / 256 + 256 random numbers a row in place of V, which
    on a CPU take longer than the model's layers. A token of no weight is never drawn.

    greedy: all temperatures are known to be 0, so that no noise is made.
    """
    b, vocab = logits_BV.shape
    scores = logits_BV
    if not greedy:
        scores = filter_logits(logits_BV / jnp.where(temperature_B > 0, temperature_B, 1.0)[:, None], filters)
    scores = jnp.pad(scores, ((0, 0), (0, -vocab % BLOCK)), constant_values=-jnp.inf).reshape(b, -1, BLOCK)
    peaks = jnp.max(scores, axis=-1)  # of each block
    within = jnp.zeros((b, BLOCK))
    if not greedy:
        weights = jnp.sum(jnp.exp(scores - jnp.max(peaks, axis=-1)[:, None, None]), axis=-1)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (peaks.shape[1] + BLOCK,), jnp.float32))(keys_B)
        drawn = temperature_B[:, None] > 0
        peaks = jnp.where(drawn, jnp.log(weights) + noise[:, BLOCK:], peaks)
        within = jnp.where(drawn, noise[:, :BLOCK], 0.0)
    block = jnp.argmax(peaks, axis=-1)
    within = within + jnp.take_along_axis(scores, block[:, None, None], 1)[:, 0]
    return (block * BLOCK + jnp.argmax(within, axis=-1)).astype(jnp.int32)
