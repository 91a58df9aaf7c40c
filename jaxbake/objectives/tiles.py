"""A vocabulary in tiles, one after the other: what lies between the products with a tile stays in a CPU's cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbake.objectives.inputs import Divergence, Heads, Tokens
from jaxbake.objectives.logits import soft_logits
from jaxbake.objectives.sums import ABSENT

ROWS = 1024
"""Rows of a tile, about: fewer make small products, and more do not stay in the cache."""


class Tile(NamedTuple):
    """Rows of the unembeddings. columns: their places in the part of the vocabulary at hand. real: which of them count
    here, bool; None: all."""

    student_VD: jax.Array
    teacher_VE: jax.Array
    columns: jax.Array
    real: jax.Array | None

    def logits(self, how: Divergence, tokens: Tokens) -> tuple[jax.Array, jax.Array | None]:
        """The student's and the teacher's [C, rows]; None for one whose hidden states there are not."""
        s = self._masked(soft_logits(tokens.hidden_ND, self.student_VD, how.softcap, how.temperature))
        if tokens.teacher is None:
            return s, None
        return s, self._masked(soft_logits(tokens.teacher, self.teacher_VE, how.teacher_softcap, how.temperature))

    def _masked(self, logits: jax.Array) -> jax.Array:
        return logits if self.real is None else jnp.where(self.real, logits, ABSENT)


def cut(vocab: int) -> tuple[int, int]:
    """(tiles, rows of each): one for a small vocabulary. Rows divide it, if some from 3/4 to 3/2 of `ROWS` do; else the
    last tile repeats rows of the one before."""
    if vocab <= 4 * ROWS:
        return 1, vocab
    sizes = sorted(range(ROWS * 3 // 4, ROWS * 3 // 2 + 1), key=lambda size: abs(size - ROWS))
    size = next((size for size in sizes if vocab % size == 0), ROWS)
    return -(-vocab // size), size


def sweep(f: Callable[[Any, Tile, Any], tuple[Any, Any]], carry: Any, heads: Heads, xs: Any = None) -> tuple[Any, Any]:
    """`lax.scan` of `f(carry, tile, x) -> (carry, y)` over the tiles of the unembeddings; xs: of each tile."""
    vocab = heads.student_VD.shape[0]
    count, size = cut(vocab)
    teacher_VE = heads.student_VD if heads.teacher_VE is None else heads.teacher_VE

    def one(carry: Any, ix: tuple[jax.Array, Any]) -> tuple[Any, Any]:
        i, x = ix
        start = jnp.minimum(i * size, vocab - size)
        columns, real = start + jnp.arange(size), None
        if count * size != vocab:
            real = columns >= i * size
        if heads.valid is not None:
            real = (columns < heads.valid) & (True if real is None else real)
        student, teacher = (lax.dynamic_slice_in_dim(table, start, size) for table in (heads.student_VD, teacher_VE))
        return f(carry, Tile(student, teacher, columns, real), x)

    return lax.scan(one, carry, (jnp.arange(count), xs))
