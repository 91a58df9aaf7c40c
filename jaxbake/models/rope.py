"""Rotary position embedding: frequencies of every rescaling, and the half-rotation of transformers."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxbake.errors import JaxbakeError
from jaxbake.models.spec import ModelConfig, RopeConfig


def frequencies(rope: RopeConfig, head_dim: int, *, long: bool = False) -> tuple[np.ndarray, float]:
    """Inverse frequencies [rotary_dim / 2] in float64 and the factor on cos and sin.

    Sources: llama3 as in Llama 3.1's release; yarn arXiv 2309.00071; longrope arXiv 2402.13753 (`long`: which of its
    two sets of factors).
    """
    dim = int(head_dim * rope.rotary_fraction)
    inverse = rope.theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    if rope.kind == "none":
        return np.zeros_like(inverse), 1.0
    if rope.kind == "default":
        return inverse, 1.0
    if rope.kind == "linear":
        return inverse / rope.factor, 1.0
    if rope.kind == "llama3":
        turns = rope.original_max_positions * inverse / (2 * np.pi)
        span = rope.high_freq_factor - rope.low_freq_factor
        keep = np.clip((turns - rope.low_freq_factor) / span, 0.0, 1.0)
        return inverse * (keep + (1 - keep) / rope.factor), 1.0
    if rope.kind == "yarn":
        attention = rope.attention_factor
        if attention is None:
            attention = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

        def dimension(rotations: float) -> float:
            length = rope.original_max_positions / (rotations * 2 * math.pi)
            return dim * math.log(length) / (2 * math.log(rope.theta))

        low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
        return inverse * (1 - ramp) + inverse / rope.factor * ramp, attention
    if rope.kind == "longrope":
        attention = rope.attention_factor
        if attention is None:
            growth = math.log(max(rope.factor, 1.0)) / math.log(rope.original_max_positions)
            attention = math.sqrt(1 + growth)
        return inverse / np.asarray(rope.long_factor if long else rope.short_factor, np.float64), attention
    raise JaxbakeError(f"rope kind '{rope.kind}' is not supported; known: default, linear, llama3, yarn, longrope")


def tables(config: ModelConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin for every rope of the model: two float32 arrays [ropes, B, T, rotary_dim / 2].

    longrope: rows that reach beyond the length the model was pretrained at take the long factors, others the short
    ones, as transformers does. (So keys cached before a row crosses that length are not those of the whole row.)
    """
    cos, sin = [], []
    for rope in config.ropes:
        inverse, factor = frequencies(rope, config.head_dim)
        inverse = jnp.asarray(inverse, jnp.float32)
        if rope.kind == "longrope":
            beyond = positions_BT.max(-1)[:, None, None] >= rope.original_max_positions
            longer, _ = frequencies(rope, config.head_dim, long=True)
            inverse = jnp.where(beyond, jnp.asarray(longer, jnp.float32), inverse)
        angle = positions_BT[..., None].astype(jnp.float32) * inverse
        cos.append(jnp.cos(angle) * factor)
        sin.append(jnp.sin(angle) * factor)
    return jnp.stack(cos), jnp.stack(sin)


def rotate(x_BTNH: jax.Array, cos_BTR: jax.Array, sin_BTR: jax.Array) -> jax.Array:
    """Rotates the first 2R of H dimensions, first half against second half (transformers' `rotate_half`)."""
    half = cos_BTR.shape[-1]
    cos, sin = (t[:, :, None].astype(x_BTNH.dtype) for t in (cos_BTR, sin_BTR))
    first, second, rest = x_BTNH[..., :half], x_BTNH[..., half : 2 * half], x_BTNH[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
