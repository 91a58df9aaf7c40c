"""Sums over a vocabulary that may lie in parts on several devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Axes = tuple[str, ...]
"""The mesh axes over which logits at hand are a part of the vocabulary."""

ABSENT = -1e30
"""The logit of what is not there."""


def normaliser(logits_CV: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """The logits' maximum and the log of the sum of exp(logits - maximum) [C, 1].

    Kept apart, since their sum would round away digits of the smaller one. The barrier makes what follows subtract the
    maximum anew: a CPU does so faster than it writes [C, V] differences out and reads them again.
    """
    max_C1 = jnp.max(logits_CV, axis=-1, keepdims=True)
    max_C1 = lax.pmax(max_C1, axes) if axes else max_C1
    log_sum_C1 = jnp.log(vocab_sum(jnp.exp(logits_CV - max_C1), axes))[:, None]
    return lax.optimization_barrier((max_C1, log_sum_C1))


def vocab_sum(x_CV: jax.Array, axes: Axes) -> jax.Array:
    """The sum over the vocabulary [C], wherever it lies."""
    x_C = jnp.sum(x_CV, axis=-1)
    return lax.psum(x_C, axes) if axes else x_C
