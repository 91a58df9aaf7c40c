"""All tokens, a chunk of them at a time: never the logits of more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbake.objectives.inputs import Divergence, Heads, Tokens
from jaxbake.objectives.spread import map_on_mesh, vocab_axes


def map_tokens(
    f: Callable[[Divergence, Tokens, Heads], tuple[Any, Any]], how: Divergence, tokens: Tokens, heads: Heads
) -> tuple[Any, Any]:
    """`f` over chunks of tokens, and on a mesh over parts of the vocabulary: see `spread.map_on_mesh`."""
    if how.mesh is not None:
        how = replace(how, axes=vocab_axes(how.mesh))
        return map_on_mesh(partial(f, how), _map_chunks, how, tokens, heads)

    def chunk(tokens: Tokens) -> tuple[Any, Any]:
        values, sums = f(how, tokens, heads)
        return values, jax.tree.map(lambda x: x.astype(tokens.hidden_ND.dtype), sums)

    return _map_chunks(chunk, tokens, how.chunk_size)


def _map_chunks(f: Callable[[Tokens], Any], tokens: Tokens, chunk_size: int) -> Any:
    """`f` over chunks of at most `chunk_size` tokens, one after the other; its outputs for all tokens [N, ...].

    A chunk takes every k-th token, so that tokens spread over devices in blocks are spread within every chunk.
    """
    count = tokens.hidden_ND.shape[0]
    chunks, size = _split(count, chunk_size)
    if chunks == 1:
        return f(tokens)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, chunks * size - count)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(size, chunks, *x.shape[1:]).swapaxes(0, 1)

    def join(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(chunks * size, *x.shape[2:])[:count]

    return jax.tree.map(join, lax.map(f, jax.tree.map(cut, tokens)))


def _split(count: int, chunk_size: int) -> tuple[int, int]:
    """(chunks, tokens in each): as few as may be, or up to twice as many where that divides the tokens evenly."""
    least = max(1, -(-count // chunk_size))
    chunks = next((k for k in range(least, 2 * least) if count % k == 0), least)
    return chunks, -(-count // chunks)
