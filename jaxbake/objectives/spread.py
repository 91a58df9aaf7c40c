"""The objectives on a mesh: every device works on a part of the vocabulary, and it is never gathered.

The tokens of an fsdp group come together instead, a chunk at a time: each device computes their logits over its own
part, maxima and sums over the vocabulary are joined (numbers per token), and gradients with respect to the hidden
states are summed back to where their tokens lie. The unembedding, stored split by vocabulary over tp and by width over
fsdp, is first regrouped to whole rows of a part of the vocabulary: a device sends and receives what it holds of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxbake.mesh import AnyMesh, parts, split_over
from jaxbake.objectives.inputs import Divergence, Heads, Tokens

MOST_TOKENS = 2048
"""Logits over a part of the vocabulary are small, but beyond so many tokens a chunk's products become no faster."""


def map_on_mesh(
    f: Callable[[Tokens, Heads], tuple[Any, Any]],
    map_chunks: Callable[[Callable[[Tokens], Any], Tokens, int], Any],
    how: Divergence,
    tokens: Tokens,
    heads: Heads,
) -> tuple[Any, Any]:
    """`f` over chunks of tokens, its vocabulary in parts over `how.axes`; its outputs for all tokens.

    f: gives (values, sums), trees of [C, ...]: values are the same on all devices that share a vocabulary, sums this
    device's share of what is to be summed over them, which comes out in the dtype of the hidden states.
    """
    mesh, axes, count = how.mesh, how.axes, tokens.hidden_ND.shape[0]
    rows = split_over("batch", mesh)
    shared = tuple(axis for axis in rows if axis in axes)  # tokens lie apart over these; for the product they meet
    rest = tuple(axis for axis in axes if axis not in shared)
    group = _size(shared, mesh)
    size = min(how.chunk_size * _size(axes, mesh), max(how.chunk_size, MOST_TOKENS))
    stored = jax.tree.map(lambda x: _stored(x.shape, mesh), heads)

    def together(x: jax.Array) -> jax.Array:
        return lax.all_gather(x, shared, tiled=True) if shared else x

    def own(x: jax.Array) -> jax.Array:
        here = x.shape[0] // group
        return lax.dynamic_slice_in_dim(x, lax.axis_index(shared) * here, here) if shared else x

    def summed(x: jax.Array) -> jax.Array:
        x = lax.psum_scatter(x, shared, tiled=True) if shared else x
        return lax.psum(x, rest) if rest else x

    def local(tokens: Tokens, heads: Heads) -> tuple[Any, Any]:
        student = _regroup(heads.student_VD, stored.student_VD, mesh, axes)
        teacher = None if heads.teacher_VE is None else _regroup(heads.teacher_VE, stored.teacher_VE, mesh, axes).head
        mine = Heads(student.head, teacher, student.first, student.valid)

        def chunk(tokens: Tokens) -> tuple[Any, Any]:
            values, sums = f(jax.tree.map(together, tokens), mine)
            return jax.tree.map(own, values), jax.tree.map(lambda x: summed(x).astype(tokens.hidden_ND.dtype), sums)

        return map_chunks(chunk, tokens, -(-size // group))

    padding = -count % parts("batch", mesh)
    tokens = jax.tree.map(lambda x: jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)), tokens)
    spread = jax.shard_map(
        local, mesh=mesh, in_specs=(P(rows or None), stored), out_specs=P(rows or None), check_vma=False
    )
    return jax.tree.map(lambda x: x[:count], spread(tokens, heads))


def vocab_axes(mesh: AnyMesh | None) -> tuple[str, ...]:
    """The mesh axes whose devices share the vocabulary: all but the copies of the model."""
    return tuple(axis for name in ("vocab", "embed", "seq") for axis in split_over(name, mesh))


class _Part(NamedTuple):
    """Whole rows [V', D] of an unembedding; the token id of the first; how many of them are real (None: all)."""

    head: jax.Array
    first: jax.Array
    valid: jax.Array | None


def _size(axes: tuple[str, ...], mesh: AnyMesh) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _stored(shape: tuple[int, int], mesh: AnyMesh) -> P:
    """How an unembedding [V, D] lies; whole along an axis that the mesh does not divide."""
    named = zip(("vocab", "embed"), shape, strict=True)
    return P(*((split_over(name, mesh) if size % parts(name, mesh) == 0 else None) or None for name, size in named))


def _regroup(head: jax.Array, stored: P, mesh: AnyMesh, axes: tuple[str, ...]) -> _Part:
    """This device's part of the vocabulary, from its block of an unembedding as stored."""
    by_vocab, by_width = (split or () for split in stored)
    apart = tuple(axis for axis in axes if axis not in by_vocab)  # the block's rows are divided among these
    real = head.shape[0]
    size = -(-real // _size(apart, mesh))
    head = jnp.pad(head, [(0, size * _size(apart, mesh) - real), (0, 0)])
    start = 0
    for axis in apart:
        rows, here = head.shape[0] // mesh.shape[axis], lax.axis_index(axis)
        if axis in by_width:
            head = lax.all_to_all(head, axis, split_axis=0, concat_axis=1, tiled=True)
        else:
            head = lax.dynamic_slice_in_dim(head, here * rows, rows)
        start += here * rows
    valid = None if size * _size(apart, mesh) == real else jnp.clip(real - start, 0, size)
    return _Part(head, start + (lax.axis_index(by_vocab) * real if by_vocab else 0), valid)
