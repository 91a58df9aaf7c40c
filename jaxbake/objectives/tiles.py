"""A vocabulary in tiles, one after the other: what lies between the products with a tile stays in a CPU's cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbake.objectives.inputs import Heads
from jaxbake.objectives.sums import ABSENT

ROWS = 2048
"""Rows of a tile, about: fewer make small products, and more do not stay in the cache."""


class Tile(NamedTuple):
    """Rows of the student's unembedding, from `start` on. real: which of them count here, bool; None: all."""

    student_VD: jax.Array
    start: jax.Array
    real: jax.Array | None

    @property
    def columns(self) -> jax.Array:
        """Their places in the part of the vocabulary at hand."""
        return self.start + jnp.arange(self.student_VD.shape[0])

    def of(self, logits_CV: jax.Array) -> jax.Array:
        """These columns of logits over the whole part."""
        size = self.student_VD.shape[0]
        if size < logits_CV.shape[1]:
            logits_CV = lax.dynamic_slice_in_dim(logits_CV, self.start, size, axis=1)
        return self.masked(logits_CV)

    def masked(self, logits: jax.Array) -> jax.Array:
        """Logits, with those that do not count made nothing of by any softmax."""
        return logits if self.real is None else jnp.where(self.real, logits, ABSENT)


def cut(vocab: int) -> tuple[int, int]:
    """(tiles, rows of each): one for a small vocabulary. Rows divide it, if some from 3/4 to 3/2 of `ROWS` do; else the
    last tile repeats rows of the one before."""
    if vocab <= 4 * ROWS:
        return 1, vocab
    sizes = sorted(range(ROWS * 3 // 4, ROWS * 3 // 2 + 1), key=lambda size: abs(size - ROWS))
    size = next((size for size in sizes if vocab % size == 0), ROWS)
    return -(-vocab // size), size


def sweep(f: Callable[[Any, Tile], tuple[Any, Any]], carry: Any, heads: Heads) -> tuple[Any, Any]:
    """`lax.scan` of `f(carry, tile) -> (carry, y)` over the tiles of the student's unembedding."""
    vocab = heads.student_VD.shape[0]
    count, size = cut(vocab)

    def one(carry: Any, i: jax.Array) -> tuple[Any, Any]:
        start = jnp.minimum(i * size, vocab - size)
        columns, real = start + jnp.arange(size), None
        if count * size != vocab:
            real = columns >= i * size
        if heads.valid is not None:
            real = (columns < heads.valid) & (True if real is None else real)
        return f(carry, Tile(lax.dynamic_slice_in_dim(heads.student_VD, start, size), start, real))

    return lax.scan(one, carry, jnp.arange(count))
