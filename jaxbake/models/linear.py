"""The one place where a weight meets an activation."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum_low(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _einsum_low_fwd(spec, a, b):
    return _einsum_low(spec, a, b), (a, b)


def _einsum_low_bwd(spec, saved, cotangent):
    a, b = saved
    (left, right), out = spec.split("->")[0].split(","), spec.split("->")[1]
    grad_a = jnp.einsum(f"{out},{right}->{left}", cotangent.astype(b.dtype), b, preferred_element_type=jnp.float32)
    grad_b = jnp.einsum(f"{left},{out}->{right}", a, cotangent.astype(a.dtype), preferred_element_type=jnp.float32)
    return grad_a.astype(a.dtype), grad_b.astype(b.dtype)


_einsum_low.defvjp(_einsum_low_fwd, _einsum_low_bwd)


def einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum` of two operands that accumulates in float32, forward and backward.

    Low-precision operands keep their precision in the backward products too (the cotangent is rounded to it): what
    matrix units want. Returns float32 for them, the operands' own dtype otherwise.
    """
    if a.dtype == b.dtype and a.dtype in (jnp.bfloat16, jnp.float16):
        return _einsum_low(spec, a, b)
    return jnp.einsum(spec, a, b)


def linear(x_BTI: jax.Array, layer: dict, slot: str, delta: dict | None = None, scale=None) -> jax.Array:
    """`x @ W + bias`, plus `scale * (x @ A) @ B` where a delta has factors for this slot.

    Args:
      layer: parameters of one block; `layer[slot]` is [I, O], `layer[slot + "_bias"]` [O] where the model has one.
      delta: factors of one block, `delta[slot] = {"a": [I, R], "b": [R, O]}`, or None.
      scale: float32 scalar, alpha / rank times strength.
    """
    dtype = x_BTI.dtype
    y = einsum("bti,io->bto", x_BTI, layer[slot].astype(dtype)).astype(dtype)
    if (bias := layer.get(f"{slot}_bias")) is not None:
        y = y + bias.astype(dtype)
    if delta is not None and (factors := delta.get(slot)) is not None:
        low = einsum("bti,ir->btr", x_BTI, factors["a"].astype(dtype)).astype(dtype)
        y = y + (scale * einsum("btr,ro->bto", low, factors["b"].astype(dtype))).astype(dtype)
    return y
