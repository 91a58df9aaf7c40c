"""The kernels' arithmetic: what a token of the vocabulary adds to a divergence, and its slope, by any tile of logits.

A tile knows of the rest of the vocabulary what `Known` holds: the normalisers of both softmaxes, joined from every
tile's, and for the reverse and the Jensen-Shannon divergence a mean under q, whose slope is q times the distance from
it. Where one token has nearly all of q, that distance is far smaller than the rounding of the mean. So the mean is kept
as a distance from the value at the student's most probable token, whose own distance is thereby exactly nothing.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbake.objectives.inputs import Divergence
from jaxbake.objectives.sums import Axes, vocab_sum

MEANS = ("reverse", "jsd")
"""Divergences whose slopes need a mean under q."""


class Sums(NamedTuple):
    """Of parts of the vocabulary [C, parts]: the largest logit, the sum of exp(logit - largest), and, where a mean will
    be needed, teacher's less student's logit where the student's is largest. None: there is no such thing."""

    s_peak: Any
    s_total: Any
    t_peak: Any = None
    t_total: Any = None
    gap: Any = None


class Known(NamedTuple):
    """Of the whole vocabulary [C, 1], or repeated along a tile's columns. None: not needed.

    s_log, t_log: logs of the sums of exp(logit - peak). centre: `bent` at the student's most probable token; mean: of
    how far it lies above the centre, under q. target: which column of the part at hand is the target.
    """

    s_peak: Any
    s_log: Any
    t_peak: Any = None
    t_log: Any = None
    centre: Any = None
    mean: Any = None
    target: Any = None


def join(how: Divergence, sums: Sums, axes: Axes) -> Known:
    """What the parts know together [C, 1], those on the devices along the mesh axes included."""

    def side(peak_CP: jax.Array, total_CP: jax.Array) -> tuple[jax.Array, jax.Array]:
        peak_C1 = _largest(peak_CP, axes)
        return peak_C1, jnp.log(vocab_sum(total_CP * jnp.exp(peak_CP - peak_C1), axes))[:, None]

    s_peak, s_log = side(sums.s_peak, sums.s_total)
    if sums.t_peak is None:
        return Known(s_peak, s_log)
    known = Known(s_peak, s_log, *side(sums.t_peak, sums.t_total))
    if sums.gap is None:
        return known
    gap = _largest(jnp.where(sums.s_peak == s_peak, sums.gap, -jnp.inf), axes)
    return known._replace(centre=bent(how, gap - _shift(known)))


def above_centre(how: Divergence, s: jax.Array, t: jax.Array, known: Known) -> jax.Array:
    """What sums to `Known.mean`."""
    return _q(s, known) * (bent(how, (t - s) - _shift(known)) - known.centre)


def terms(
    how: Divergence, s: jax.Array, t: jax.Array | None, known: Known, columns: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Every token's term of the divergence, and temperature times its derivative by the uncapped student's logit.

    s, t: logits, capped and softened; columns: their places in the part at hand, for cross-entropy.
    """
    q = _q(s, known)
    if how.name == "cross_entropy":
        hit = columns == known.target
        term, slope = jnp.where(hit, (known.s_peak - s) + known.s_log, 0.0), q - hit.astype(q.dtype)
    else:
        p = jnp.exp((t - known.t_peak) - known.t_log)
        r = (t - s) - _shift(known)
        match how.name:
            case "forward":
                term, slope = kl_term(p, q, r), q - p
            case "reverse":
                term, slope = kl_term(q, p, -r), q * (known.mean - (r - known.centre))
            case "jsd":
                beta, softplus = how.beta, bent(how, r)
                m = beta * p + (1 - beta) * q
                to_p = kl_term(p, m, r + (math.log(1 / (1 - beta)) - softplus))
                to_q = kl_term(q, m, -softplus - math.log1p(-beta))
                term = beta * to_p + (1 - beta) * to_q
                slope = (1 - beta) * q * (known.mean - (softplus - known.centre))
    if how.softcap is not None:
        slope *= 1 - jnp.square(s * (how.temperature / how.softcap))
    return term, slope


def bent(how: Divergence, r: jax.Array) -> jax.Array:
    """What the slope compares with its mean, of r = log p/q: r for reverse; log m/q and a constant for Jensen-Shannon
    (see `fused._jensen_shannon`)."""
    if how.name == "reverse":
        return r
    x = r + math.log(how.beta / (1 - how.beta))
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def kl_term(a: jax.Array, b: jax.Array, r: jax.Array) -> jax.Array:
    """A term of KL(a || b), r = log a/b, of one sign: see `fused._kl_terms`."""
    series = r * r * (1 / 2 + r * (-1 / 6 + r * (1 / 24 + r * (-1 / 120 + r * (1 / 720 - r / 5040)))))
    return jnp.where(jnp.abs(r) < 0.3, a * series, (b - a) + a * r)


def find_targets(
    targets_C: jax.Array, first: jax.Array | None, count: jax.Array, axes: Axes
) -> tuple[jax.Array, jax.Array]:
    """Targets as columns of the part of the vocabulary at hand, so many tokens from `first` (None: 0) on, and whether
    any part has them [C, 1]."""
    at_C1 = (targets_C if first is None else targets_C - first)[:, None].astype(jnp.int32)
    here_C1 = (at_C1 >= 0) & (at_C1 < count)
    return at_C1, lax.pmax(here_C1.astype(jnp.int32), axes) > 0 if axes else here_C1


def _largest(x_CP: jax.Array, axes: Axes) -> jax.Array:
    x_C1 = jnp.max(x_CP, axis=-1, keepdims=True)
    return lax.pmax(x_C1, axes) if axes else x_C1


def _q(s: jax.Array, known: Known) -> jax.Array:
    return jnp.exp((s - known.s_peak) - known.s_log)


def _shift(known: Known) -> jax.Array:
    """What log p/q is less than the difference of the logits."""
    return (known.t_peak - known.s_peak) + (known.t_log - known.s_log)
