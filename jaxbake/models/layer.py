"""The parts of a decoder's layer: norms, projections to queries, keys and values, the feed-forward network."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxbake.mesh import AnyMesh, constrain
from jaxbake.models.linear import linear
from jaxbake.models.spec import ModelConfig


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, offset: float) -> jax.Array:
    """Root-mean-square norm (arXiv 1910.07467) in float32 over the last axis; the scale is `offset + weight`."""
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)
    if offset:  # Gemma scales before rounding, the others after: as each was trained.
        return (x32 * (offset + weight.astype(x32.dtype))).astype(x.dtype)
    return x32.astype(x.dtype) * weight.astype(x.dtype)


def _activation(config: ModelConfig) -> Callable[[jax.Array], jax.Array]:
    if config.activation == "silu":
        return jax.nn.silu
    if config.activation == "gelu_tanh":
        return lambda x: jax.nn.gelu(x, approximate=True)
    if config.activation == "gelu":
        return lambda x: jax.nn.gelu(x, approximate=False)
    raise ValueError(f"unknown activation {config.activation}")


def take(x_BTX: jax.Array, at_BK: jax.Array | None) -> jax.Array:
    """What belongs to these positions of each row; None: to all."""
    if at_BK is None:
        return x_BTX
    return jnp.take_along_axis(x_BTX, at_BK.reshape(*at_BK.shape, *[1] * (x_BTX.ndim - 2)), axis=1)


def project_qkv(x, at, layer, factors, scale, config: ModelConfig):
    """Queries (of the positions `at`), keys and values."""
    n, k, h = config.num_heads, config.num_kv_heads, config.head_dim
    if config.fused_projections:
        q, key, value = jnp.split(linear(x, layer, "qkv_proj", factors, scale), [n * h, (n + k) * h], axis=-1)
        q = take(q, at)
    else:
        q = linear(take(x, at), layer, "q_proj", factors, scale)
        key, value = (linear(x, layer, slot, factors, scale) for slot in ("k_proj", "v_proj"))

    def norm(y, name):
        return rms_norm(y, layer[name], config.norm_eps, config.norm_offset)

    if config.qk_norm == "full":
        q, key = norm(q, "q_norm"), norm(key, "k_norm")
    q, key, value = (y.reshape(*y.shape[:2], -1, h) for y in (q, key, value))
    if config.qk_norm == "head":
        q, key = norm(q, "q_norm"), norm(key, "k_norm")
    return q, key, value


def mlp(x, layer, factors, scale, config: ModelConfig, mesh: AnyMesh | None, rows: str | None):
    if config.fused_projections:
        gate, up = jnp.split(linear(x, layer, "gate_up_proj", factors, scale), 2, axis=-1)
    else:
        gate, up = (linear(x, layer, slot, factors, scale) for slot in ("gate_proj", "up_proj"))
    inner = constrain(_activation(config)(gate) * up, (rows, "seq", "mlp"), mesh)
    return linear(inner, layer, "down_proj", factors, scale)
