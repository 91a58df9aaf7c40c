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


def attend(q_BTNH: jax.Array, blocks: list[Keys], *, scale: float, softcap: float | None = None) -> jax.Array:
    """Softmax attention of the queries over all blocks together; returns [B, T, N * H] in the queries' dtype.

    Float32 softmax. Queries that see no key at all (padding) return finite values of no meaning.
    """
    b, t, n, h = q_BTNH.shape
    kv_heads = blocks[0].k.shape[-2]
    q = q_BTNH.reshape(b, t, kv_heads, n // kv_heads, h)
    logits = []
    for block in blocks:
        spec = "btkgh,skh->bkgts" if block.k.ndim == 3 else "btkgh,bskh->bkgts"
        score = einsum(spec, q, block.k).astype(jnp.float32) * scale
        if softcap is not None:
            score = softcap * jnp.tanh(score / softcap)
        logits.append(jnp.where(block.mask[:, None, None], score, MASKED))
    peak = jax.lax.stop_gradient(jnp.max(jnp.stack([jnp.max(x, -1) for x in logits]), 0))[..., None]
    weights = [jnp.exp(x - peak) for x in logits]
    total = sum(jnp.sum(w, -1) for w in weights)
    out = 0.0
    for block, w in zip(blocks, weights, strict=True):
        spec = "bkgts,skh->btkgh" if block.k.ndim == 3 else "bkgts,bskh->btkgh"
        out = out + einsum(spec, w.astype(q.dtype), block.v).astype(jnp.float32)
    out = out / jnp.einsum("bkgt->btkg", total)[..., None]
    return out.reshape(b, t, n * h).astype(q.dtype)
