"""Keys and values that are kept: of a prompt, for all rows, and of each row's own tokens, for decoding."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from jaxbake.mesh import constrain, mesh_of
from jaxbake.models import apart
from jaxbake.models.spec import ModelConfig

PREFIX_AXES = ("layers", "prefix", "kv_heads", "head_dim")
CACHE_AXES = ("layers", "batch", "cached", "kv_heads", "head_dim")
"""Logical axes of a prefix's and a cache's keys and values."""


@flax.struct.dataclass
class Prefix:
    """Keys and values of a prompt, computed once and shared by all rows: k, v [L, P, K, H].

    Its tokens stand at positions 0 .. P - 1; how many of them a row's token sees is given with the row.
    """

    k: jax.Array
    v: jax.Array

    @property
    def length(self) -> int:
        return self.k[0].shape[-1] if apart.is_apart(self.k) else self.k.shape[1]


@flax.struct.dataclass
class Cache:
    """Keys and values per row, for decoding: k, v [L, B, S, K, H]; positions, segments [B, S]; index scalar int32.

    Slots from `index` on are free; free and padding slots have segment 0.
    """

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    segments: jax.Array
    index: jax.Array


def init_cache(config: ModelConfig, batch: int, length: int, dtype=jnp.float32) -> Cache:
    """An empty cache for `batch` rows of up to `length` tokens."""
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
    slots = jnp.zeros((batch, length), jnp.int32)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), slots, slots, jnp.int32(0))


def append(cache: Cache, kv: dict[str, jax.Array], positions_BT: jax.Array, segments_BT: jax.Array) -> Cache:
    """The cache with these tokens written at its index; there must be room (sizes are static, the caller's to plan)."""
    if not apart.is_apart(kv["k"]):
        kv = {name: _write(getattr(cache, name), kv[name], cache.index) for name in ("k", "v")}
    return take_slots(cache, positions_BT, segments_BT).replace(**kv)


def take_slots(cache: Cache, positions_BT: jax.Array, segments_BT: jax.Array) -> Cache:
    """The cache with its next slots given to these tokens."""
    return cache.replace(
        positions=_write(cache.positions, positions_BT, cache.index),
        segments=_write(cache.segments, segments_BT, cache.index),
        index=cache.index + positions_BT.shape[1],
    )


def _write(buffer: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
    """The buffer of a cache with tokens' entries written from slot `at` on."""
    start, axes = ((0, 0, at, 0, 0), CACHE_AXES) if buffer.ndim == 5 else ((0, at), CACHE_AXES[1:3])
    mesh = mesh_of(new)
    new = constrain(new.astype(buffer.dtype), axes, mesh)
    return constrain(jax.lax.dynamic_update_slice(buffer, new, start), axes, mesh)
