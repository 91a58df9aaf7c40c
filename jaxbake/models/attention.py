"""Attention over several blocks of keys (shared prefix, cache, the row itself), joined by one softmax."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbake.models.linear import einsum

MASKED = -1e30


class Keys(NamedTuple):
    """One block of keys and values.

    k, v: [B, S, K, H], or [S, K, H] when all rows share them (then they are never copied per row).
    mask: bool [B, T, S], which keys each query sees.
    """

    k: jax.Array
    v: jax.Array
    mask: jax.Array


def _products(left_BKGTX: jax.Array, right: jax.Array, spec: str) -> jax.Array:
    """Batched matrix product with keys or values: [B, K, G, T, X] by [B, K, S, H] or shared [K, S, H].

    Query heads of a group and their tokens are laid side by side as rows of one matrix per key head (and per batch row,
    unless the keys are shared): few, large products, and the keys are not repeated.
    """
    b, k, g, t, x = left_BKGTX.shape
    if right.ndim == 3:
        rows = left_BKGTX.transpose(1, 0, 2, 3, 4).reshape(k, b * g * t, x)
        return einsum(spec, rows, right).reshape(k, b, g, t, -1).transpose(1, 0, 2, 3, 4)
    rows = left_BKGTX.reshape(b * k, g * t, x)
    return einsum(spec, rows, right.reshape(b * k, *right.shape[2:])).reshape(b, k, g, t, -1)


def attend(q_BTNH: jax.Array, blocks: list[Keys], *, scale: float, softcap: float | None = None) -> jax.Array:
    """Softmax attention of the queries over all blocks together; returns [B, T, N * H] in the queries' dtype.

    Float32 softmax. Queries that see no key at all (padding) return finite values of no meaning.
    """
    b, t, n, h = q_BTNH.shape
    kv_heads = blocks[0].k.shape[-2]
    q = q_BTNH.reshape(b, t, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4)
    logits = []
    for block in blocks:
        score = _products(q, block.k.swapaxes(-3, -2), "bqh,bsh->bqs")
        score = score.astype(jnp.promote_types(score.dtype, jnp.float32)) * scale
        if softcap is not None:
            score = softcap * jnp.tanh(score / softcap)
        logits.append(jnp.where(block.mask[:, None, None], score, MASKED))
    peak = logits[0].max(-1, keepdims=True)
    for score in logits[1:]:
        peak = jnp.maximum(peak, score.max(-1, keepdims=True))
    weights = [jnp.exp(score - jax.lax.stop_gradient(peak)) for score in logits]
    total = sum(w.sum(-1, keepdims=True) for w in weights)
    out = 0.0
    for block, w in zip(blocks, weights, strict=True):
        out = out + _products((w / total).astype(q.dtype), block.v.swapaxes(-3, -2), "bqs,bsh->bqh")
    return out.astype(q.dtype).transpose(0, 3, 1, 2, 4).reshape(b, t, n * h)
