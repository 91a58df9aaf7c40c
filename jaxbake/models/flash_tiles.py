"""Flash attention's tiles: their sizes, the bounds that say which keys a query sees, and what each tile needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxbake.models.attention import Seen

_FAR = jnp.iinfo(jnp.int32).max
SKIP, PART, WHOLE = 0, 1, 2
"""What a tile of scores needs: nothing, the mask, no mask."""

TILES = {
    "TPU v5 lite": (512, 512, 512, 512),
    "TPU v5": (512, 512, 512, 512),
    "TPU v6 lite": (512, 1024, 512, 512),
}
"""Queries and keys of a tile, forward and backward, by chip. By the compiler's schedules (4 heads of size 128 a key
head, bfloat16), cycles per 1,000 scores, forward: v5e 5.3 at 256 x 512, 5.2 at 512 x 512, 5.8 at 256 x 1024; v6e 3.6 at
512 x 512, 3.2 at 512 x 1024. Backward: v5e 10.1 at 256 x 256, 9.4 at 256 x 512, 9.0 at 512 x 512; v6e 4.6 there."""
TILES_ELSEWHERE = (512, 512, 512, 512)


class Bounds(NamedTuple):
    """Which keys each query sees: positions first <= p <= last and the same segment. All int32.

    first, last, segments: [B, T]; key_positions, key_segments: [B, S], or [1, S] where all rows share the keys.
    """

    first: jax.Array
    last: jax.Array
    segments: jax.Array
    key_positions: jax.Array
    key_segments: jax.Array


def bounds_of(seen: Seen) -> Bounds:
    """The same with everything said: no bound is one that all keys meet, no segments are one segment."""
    last = jnp.asarray(seen.last, jnp.int32)
    first = jnp.full_like(last, -_FAR) if seen.first is None else jnp.asarray(seen.first, jnp.int32)
    positions = jnp.asarray(seen.positions, jnp.int32).reshape(-1, seen.positions.shape[-1])
    if seen.segments is None:
        return Bounds(first, last, jnp.zeros_like(last), positions, jnp.zeros_like(positions))
    own, theirs = jnp.asarray(seen.segments, jnp.int32), jnp.asarray(seen.key_segments, jnp.int32)
    return Bounds(first, last, own, positions, theirs)


def plan_tiles(bounds: Bounds, bq: int, bk: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What each tile needs [B, T / bq, S / bk], and the bounds as the kernels read them, [B, 3, T] and [B, S, 2].

    Judged from each tile's smallest and largest bounds; queries and keys added as padding see and show nothing.
    """
    first, last, own = (pad(x, 1, bq, fill) for x, fill in zip(bounds[:3], (_FAR, -1, 0), strict=True))
    position, segment = (pad(x, 1, bk, fill) for x, fill in zip(bounds[3:], (_FAR, 0), strict=True))

    def ends(x, size, axis):
        x = x.reshape(x.shape[0], -1, size)
        return jnp.expand_dims(x.min(-1), axis), jnp.expand_dims(x.max(-1), axis)

    (first_min, first_max), (last_min, last_max), (own_min, own_max) = (ends(x, bq, 2) for x in (first, last, own))
    (low, high), (segment_min, segment_max) = (ends(x, bk, 1) for x in (position, segment))
    none = (low > last_max) | (high < first_min) | (segment_min > own_max) | (segment_max < own_min)
    one = (segment_min == segment_max) & (own_min == own_max) & (segment_min == own_min)
    whole = (high <= last_min) & (low >= first_max) & one
    plan = jnp.where(none, SKIP, jnp.where(whole, WHOLE, PART)).astype(jnp.int32)
    return plan, jnp.stack([first, last, own], 1), jnp.stack([position, segment], 2)


def tile_size(wanted: int, length: int) -> int:
    """The tile size: at most what is wanted, in whole lanes (128) where that is, with little padding."""
    lanes = min(wanted, 128)
    tiles = -(-length // wanted)
    return -(-length // (tiles * lanes)) * lanes


def pad(x: jax.Array, axis: int, multiple: int, fill: int = 0) -> jax.Array:
    """The array, filled up along an axis to a multiple."""
    more = -x.shape[axis] % multiple
    if not more:
        return x
    return jnp.pad(x, [(0, more if n == axis else 0) for n in range(x.ndim)], constant_values=fill)
