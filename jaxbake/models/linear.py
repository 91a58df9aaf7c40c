"""The one place where a weight meets an activation."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxbake.chip import chip
from jaxbake.models.quantised import Quantised, dequantised, integers

LINEAR = "linear"
"""Name of the results of linear layers and of attention, for policies of what to keep for the backward pass."""


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


@jax.custom_vjp
def _merged_linear(x_NI: jax.Array, w_IO: jax.Array, a_IR: jax.Array, b_RO: jax.Array, scale: jax.Array) -> jax.Array:
    """`x @ (W + scale * A @ B)`: no products of the tokens with the factors, and nothing to add to their result."""
    return x_NI @ add_factors(w_IO, a_IR, b_RO, scale)


def add_factors(w_IO: jax.Array, a_IR: jax.Array, b_RO: jax.Array, scale: jax.Array) -> jax.Array:
    """`W + scale * A @ B`."""
    return w_IO + (scale * a_IR) @ b_RO


def _merged_linear_fwd(x_NI, w_IO, a_IR, b_RO, scale):
    return _merged_linear(x_NI, w_IO, a_IR, b_RO, scale), (x_NI, w_IO, a_IR, b_RO, scale)


def _merged_linear_bwd(saved, grad_NO):
    x_NI, w_IO, a_IR, b_RO, scale = saved
    grad_x_NI = _dot(grad_NO, add_factors(w_IO, a_IR, b_RO, scale), 1, 1)
    # Sums over tokens with the rank as rows of the result: the other way round they are several times slower.
    grad_a_RI = jax.lax.optimization_barrier(_dot(_dot(grad_NO, b_RO, 1, 1), x_NI, 0, 0))
    grad_b_RO = _dot(_dot(x_NI, a_IR, 1, 0), grad_NO, 0, 0)
    grad_scale = jnp.sum(grad_b_RO * b_RO)  # like the weight's, dropped by the compiler where nobody asks for it
    return grad_x_NI, _dot(x_NI, grad_NO, 0, 0), scale * grad_a_RI.T, scale * grad_b_RO, grad_scale


_merged_linear.defvjp(_merged_linear_fwd, _merged_linear_bwd)


def _dot(a: jax.Array, b: jax.Array, over_a: int, over_b: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((over_a,), (over_b,)), ((), ())))


def _merges(x_BTI: jax.Array, w_IO: jax.Array | Quantised) -> bool:
    """Whether to add the factors to the weight rather than their product to the result.

    It is faster where tokens are many (from half the weight's smaller side on), on a CPU, which moves less memory for
    it. In low precision the sum would round the delta away.
    """
    if isinstance(w_IO, Quantised):
        return False
    tokens = x_BTI.shape[0] * x_BTI.shape[1]
    here = chip()
    return here.platform == "cpu" and here.alone and x_BTI.dtype == jnp.float32 and 2 * tokens >= min(w_IO.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _quantised_product(dtype, x_BTI: jax.Array, weight: Quantised) -> jax.Array:
    """`x @ W`; int8's scales belong to the outputs and come after the product, int4's to the weight itself."""
    if weight.kind == "int8":
        return einsum("bti,io->bto", x_BTI, integers(weight, dtype)) * weight.scales
    return einsum("bti,io->bto", x_BTI, dequantised(weight, dtype))


def _quantised_product_fwd(dtype, x_BTI, weight):
    return _quantised_product(dtype, x_BTI, weight), weight  # the integers: floats would be kept for every layer


def _quantised_product_bwd(dtype, weight, cotangent_BTO):
    if weight.kind == "int8":
        scaled, whole = (cotangent_BTO * weight.scales).astype(dtype), integers(weight, dtype)
    else:
        scaled, whole = cotangent_BTO.astype(dtype), dequantised(weight, dtype)
    return einsum("bto,io->bti", scaled, whole).astype(dtype), None


_quantised_product.defvjp(_quantised_product_fwd, _quantised_product_bwd)


def _product(x_BTI: jax.Array, weight: jax.Array | Quantised) -> jax.Array:
    if isinstance(weight, Quantised):
        return _quantised_product(x_BTI.dtype, x_BTI, weight)
    return einsum("bti,io->bto", x_BTI, weight.astype(x_BTI.dtype))


@jax.custom_vjp
def _many_low_rank(x_MNI: jax.Array, a_MIR: jax.Array, b_MRO: jax.Array, scale_M: jax.Array) -> jax.Array:
    """`scale * (x @ A) @ B` of M deltas, each over the tokens of its own rows; accumulated as `einsum` does.

    Only what has the rank as its width is scaled, forward and backward.
    """
    return _many_low_rank_fwd(x_MNI, a_MIR, b_MRO, scale_M)[0]


def _many_low_rank_fwd(x_MNI, a_MIR, b_MRO, scale_M):
    low_MNR = checkpoint_name(einsum("mni,mir->mnr", x_MNI, a_MIR), LINEAR)  # so narrow that it is kept, too
    scaled_MNR = (scale_M[:, None, None] * low_MNR).astype(x_MNI.dtype)
    return einsum("mnr,mro->mno", scaled_MNR, b_MRO), (x_MNI, a_MIR, b_MRO, scale_M, low_MNR)


def _many_low_rank_bwd(saved, grad_MNO):
    x_MNI, a_MIR, b_MRO, scale_M, low_MNR = saved
    dtype, scale_M11 = x_MNI.dtype, scale_M[:, None, None]
    grad_MNO = grad_MNO.astype(dtype)
    grad_scaled_MNR = einsum("mno,mro->mnr", grad_MNO, b_MRO)
    grad_low_MNR = (scale_M11 * grad_scaled_MNR).astype(dtype)
    # The rank as rows of the result: the other way round a CPU is several times slower.
    grad_a_MRI = jax.lax.optimization_barrier(einsum("mnr,mni->mri", grad_low_MNR, x_MNI))
    grad_b_MRO = einsum("mnr,mno->mro", (scale_M11 * low_MNR).astype(dtype), grad_MNO)
    grad_x_MNI = einsum("mnr,mir->mni", grad_low_MNR, a_MIR)
    grad_scale_M = jnp.sum(grad_scaled_MNR * low_MNR, axis=(1, 2))  # dropped by the compiler where nobody asks for it
    return grad_x_MNI.astype(dtype), grad_a_MRI.swapaxes(1, 2).astype(dtype), grad_b_MRO.astype(dtype), grad_scale_M


_many_low_rank.defvjp(_many_low_rank_fwd, _many_low_rank_bwd)


def linear(x_BTI: jax.Array, layer: dict, slot: str, delta: dict | None = None, scale=None) -> jax.Array:
    """`x @ W + bias`, plus `scale * (x @ A) @ B` where a delta has factors for this slot.

    Args:
      layer: parameters of one block; `layer[slot]` is [I, O] or a `Quantised`, `layer[slot + "_bias"]` [O] where there
        is one.
      delta: factors of one block, `delta[slot] = {"a": [I, R], "b": [R, O]}`, or None. Of M deltas at once,
        [M, I, R] and [M, R, O]: the rows B are M equal groups, in order, and each group has its own (M = B: each row).
      scale: float32 scalar, alpha / rank times strength; [M] of M deltas.
    """
    dtype = x_BTI.dtype
    weight, bias = layer[slot], layer.get(f"{slot}_bias")
    factors = None if delta is None else delta.get(slot)
    merges = factors is not None and factors["a"].ndim == 2 and _merges(x_BTI, weight)
    if merges:
        a, b = (factors[name].astype(dtype) for name in ("a", "b"))
        y = _merged_linear(x_BTI.reshape(-1, x_BTI.shape[-1]), weight.astype(dtype), a, b, scale)
        y = y.reshape(*x_BTI.shape[:2], -1)
    else:
        y = _product(x_BTI, weight).astype(dtype)
    if bias is not None:
        y = y + bias.astype(dtype)
    if factors is not None and not merges:
        a, b = factors["a"].astype(dtype), factors["b"].astype(dtype)
        if a.ndim == 2:
            low = einsum("bti,ir->btr", x_BTI, a).astype(dtype)
            y = y + (scale * einsum("btr,ro->bto", low, b)).astype(dtype)
        else:
            change = _many_low_rank(x_BTI.reshape(a.shape[0], -1, a.shape[1]), a, b, scale)
            y = y + change.astype(dtype).reshape(y.shape)
    return checkpoint_name(y, LINEAR)
