"""Weights kept as small integers with scales (weight-only quantisation); `linear.py` multiplies by them."""

from __future__ import annotations

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxbake.errors import JaxbakeError, did_you_mean

KINDS = ("int8", "int4")
GROUP = 128
"""Most inputs that share a scale in int4; fewer where 128 does not divide the input."""
CLIPPED = (1.0, 0.9, 0.8, 0.7)
"""Parts of a group's largest weight that int4 is tried to reach."""


@flax.struct.dataclass
class Quantised:
    """The weight of a linear layer as integers: weight = values * scales.

    int8: values int8 [..., I, O], -127 to 127; scales float32 [..., O], one for each output channel.
    int4: values uint8 [..., I / 2, O], rows 2i and 2i + 1 of the weight, -8 to 7, in the low and the high half of a
      byte; scales float32 [..., I / group, O] of either sign, one for each output channel and group of consecutive
      inputs.
    """

    values: Any
    scales: Any

    @property
    def kind(self) -> str:
        return "int8" if self.values.dtype == jnp.int8 else "int4"


def check_kind(kind: str) -> None:
    """Raises JaxbakeError unless it is a kind there is."""
    if kind not in KINDS:
        raise JaxbakeError(f"quantize: '{kind}' is unknown; {did_you_mean(str(kind), KINDS)}")


def group_size(size_in: int) -> int:
    """How many inputs share a scale in int4: the largest power of two up to 128 that divides the input size.

    Raises JaxbakeError for an odd size.
    """
    size = math.gcd(size_in, GROUP)
    if size < 2:
        raise JaxbakeError(f"quantize: int4 holds two inputs in a byte; a layer of {size_in} inputs needs int8")
    return size


def quantise(weight_IO: np.ndarray, kind: str) -> Quantised:
    """One weight matrix [..., I, O] rounded to integers, by numpy: the largest weight of an output becomes 127 in int8;
    int4's scales are searched for (`_four_bits`)."""
    weight = np.asarray(weight_IO, np.float32)
    if kind == "int8":
        peak = np.abs(weight).max(axis=-2)
        scales = np.where(peak > 0, peak / np.float32(127), np.float32(1))
        return Quantised(np.rint(weight / scales[..., None, :]).astype(np.int8), scales)
    *lead, size_in, size_out = weight.shape
    size = group_size(size_in)
    grouped = weight.reshape(*lead, size_in // size, size, size_out)
    whole, scales = np.empty(grouped.shape, np.int8), np.empty((*lead, size_in // size, size_out), np.float32)
    for i in range(size_in // size):  # one at a time, since so much stays in a processor's cache
        whole[..., i, :, :], scales[..., i, :] = _four_bits(grouped[..., i, :, :])
    pairs = whole.view(np.uint8).reshape(*lead, size_in // 2, 2, size_out) & 15
    return Quantised(pairs[..., 0, :] | pairs[..., 1, :] << 4, scales)


def _four_bits(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers -8 to 7 of a group [..., group, O], and of the scales tried the one [..., O] with least squared error.

    A scale has the sign that puts the largest weight on -8, the longer side. A smaller one cuts that weight off and
    rounds all others more finely. For the integers q that a scale leads to, the best scale is <w, q> / <q, q>, and the
    error that it leaves |w|^2 - <w, q>^2 / <q, q>.
    """
    q = np.empty_like(weight)

    def round_to(scale: np.ndarray) -> np.ndarray:
        np.multiply(weight, 1 / scale[..., None, :], out=q)
        return np.clip(np.rint(q, out=q), -8, 7, out=q)

    peak = np.take_along_axis(weight, np.abs(weight).argmax(axis=-2)[..., None, :], axis=-2)[..., 0, :]
    peak = np.where(np.abs(peak) < 1e-30, np.float32(1), peak / np.float32(-8))  # of nothing at all, zeros are made
    most, best = np.zeros_like(peak), peak
    for part in CLIPPED:
        round_to(peak * np.float32(part))
        along = np.einsum("...io,...io->...o", weight, q)
        length = np.maximum(np.einsum("...io,...io->...o", q, q), 1)
        fit = along * along / length
        best, most = np.where(fit > most, along / length, best), np.maximum(fit, most)
    return round_to(best), best


def integers(weight: Quantised, dtype) -> jax.Array:
    """The values as an array [..., I, O] of a float type (exact, in bfloat16 too), without their scales."""
    if weight.kind == "int8":
        return weight.values.astype(dtype)
    low = (weight.values << 4).astype(jnp.int8) >> 4  # the shift back brings the sign
    high = weight.values.astype(jnp.int8) >> 4
    *lead, half, size_out = weight.values.shape
    return jnp.stack([low, high], axis=-2).reshape(*lead, 2 * half, size_out).astype(dtype)


def dequantised(weight: Quantised, dtype=jnp.float32) -> jax.Array:
    """The weight [..., I, O] that the integers stand for."""
    whole = integers(weight, dtype)
    if weight.kind == "int8":
        return whole * weight.scales[..., None, :].astype(dtype)
    *lead, groups, size_out = weight.scales.shape
    grouped = whole.reshape(*lead, groups, -1, size_out) * weight.scales[..., None, :].astype(dtype)
    return grouped.reshape(whole.shape)


def quantise_params(params: dict, kind: str, slots) -> dict:
    """The parameters with the weights of these linear layers quantised; all else as it is."""
    check_kind(kind)
    layers = dict(params["layers"])
    for slot in slots:
        layers[slot] = jax.tree.map(jnp.asarray, quantise(np.asarray(layers[slot], np.float32), kind))
    return {**params, "layers": layers}
